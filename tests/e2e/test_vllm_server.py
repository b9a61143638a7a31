"""The client and recipes/rl.py against a real vLLM server on the CPU: ``make test-vllm`` (it has an
environment of its own)."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from posttrain.models.load import ModelConfig, load_model, load_tokenizer, save_model
from posttrain.rollout.engine import Request, Sampled, SamplingConfig, kept_by_truncation
from posttrain.rollout.handover import FolderHandover, ReceiptError, probe_ids, probe_logps
from posttrain.rollout.vllm import Probe, VLLMConfig, VLLMEngine
from posttrain.training.metrics import TIMING_KEYS, read_metrics
from tests.e2e.launching import REPO, check, command, environment, run
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.vllm
REQUESTS = [
    Request(prompt_ids=tuple(b"one and"), seeds=(1, 2, 3)),
    Request(prompt_ids=tuple(b"two"), seeds=(4, 5)),
]


def tiny_model(path: Path) -> Path:
    """Two layers whose heads have 32 channels, the fewest that vLLM's attention takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Server:
    """launch/vllm.sh as a user starts it; float32, so that log-probs can be compared closely."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._model, self._log = model, log
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "MAX_MODEL_LEN": "256", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_PYTHON", str(REPO / ".venv-vllm" / "bin" / "python"))
        command = [
            "bash",
            str(REPO / "launch" / "vllm.sh"),
            str(self._model),
            str(self.port),
            "--dtype",
            "float32",
        ]
        command += ["--max-num-batched-tokens", "256"]  # two long prompts do not fit
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        for _ in range(300):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-4000:]}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    started = Server(tiny_model(folder / "model"), folder / "log")
    started.model = folder / "model"
    yield started
    started.kill()


@pytest.fixture
def policy(server):
    config = ModelConfig(name=str(server.model))
    return load_model(config, dtype=torch.float32), load_tokenizer(config)


def engine(server, policy, tmp_path, **options) -> VLLMEngine:
    model, tokenizer = policy
    handover = FolderHandover(
        tmp_path / "weights", lambda folder: save_model(model, tokenizer, folder)
    )
    config = VLLMConfig(url=server.url, **options)
    ids = probe_ids(model.config.vocab_size)
    probe = Probe(
        ids=ids,
        logps=lambda: probe_logps(model, ids, compute=torch.float32),
        dtype="float32",
    )
    return VLLMEngine(
        config,
        handover=handover,
        stop_ids=[tokenizer.eos_token_id],
        decode=tokenizer.decode,
        probe=probe,
    )


def mismatch(model, request: Request, drawn: Sampled, k: int, temperature: float) -> float:
    """Largest |log-prob of the server - of the model in transformers| of a completion's tokens."""
    prefix = request.prefixes[k] if request.prefixes else ()
    before = [*request.prompt_ids, *prefix]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *drawn.token_ids]])).logits[0] / temperature
    logps = logits.log_softmax(-1)[len(before) - 1 : -1].gather(
        1, torch.tensor(drawn.token_ids)[:, None]
    )[:, 0]
    return float((logps - torch.tensor(drawn.logps)).abs().max())


def test_log_probs_are_those_of_the_weights_that_were_handed_over(server, policy, tmp_path):
    model, _ = policy
    client = engine(server, policy, tmp_path)
    sampling = SamplingConfig(max_tokens=20, temperature=0.7)
    drawn_before = client.generate(REQUESTS, sampling)
    for version in (1, 2):  # twice: the second reload goes over what the first left
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
        client.refresh(version)
        drawn = client.generate(REQUESTS, sampling)
        assert [[d.token_ids for d in row] for row in drawn] != [
            [d.token_ids for d in row] for row in drawn_before
        ]
        for request, row in zip(REQUESTS, drawn, strict=True):
            for k, d in enumerate(row):
                assert d.policy_version == version and mismatch(model, request, d, k, 0.7) < 2e-4
    assert client.generate(REQUESTS, sampling) == drawn  # the seeds decide


def scale(model, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def test_the_receipt_of_a_real_server(server, policy, tmp_path):
    """Checksums of every tensor that was saved, the probe within float32's noise; a file that is
    changed on the way, and weights that the server does not use, stop the run."""
    from safetensors.torch import load_file, save_file

    model, _ = policy
    client = engine(server, policy, tmp_path, retries=0)
    file = tmp_path / "weights" / "current" / "model.safetensors"
    for version in (1, 2):
        scale(model, 1.1)
        receipt = client.refresh(version)
        assert receipt.tensors == len(load_file(file)) > 15 and receipt.read_back >= 6
        assert receipt.probe_gap_nats < 2e-5
    send = client.handover.send

    def changed(call):
        sent = send(call)
        tensors = load_file(file)
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] *= 1.001
        save_file(tensors, file, metadata={"format": "pt"})
        path = str(file.parent.resolve())
        call("POST", "/collective_rpc", {"method": "mark_policy", "kwargs": {"mark": None}})
        kwargs = {"weights_path": path}
        call("POST", "/collective_rpc", {"method": "reload_policy", "kwargs": kwargs})
        return sent

    client.handover.send = changed
    with pytest.raises(ReceiptError, match="layers.1.self_attn.k_proj.weight has checksum"):
        client.refresh(3)
    client.handover.send = send
    client._probe_logps = [
        p - 0.01 for p in probe_logps(model, client.probe.ids, compute=torch.float32)
    ]
    with pytest.raises(ReceiptError, match="log-probs of the probe differ .* by 0.01 nats"):
        client._load_weights(4)
    assert client._server_mark() is None
    assert client.refresh(5).version == 5


TRUNCATED = SamplingConfig(max_tokens=12, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)


def test_masks_of_truncated_sampling_come_back(server, policy, tmp_path):
    """They are those of transformers' own warpers, and log-probs are renormalised over them."""
    model, _ = policy
    client = engine(server, policy, tmp_path)
    client.refresh(1)
    tokens = same = 0
    for request, row in zip(REQUESTS, client.generate(REQUESTS, TRUNCATED), strict=True):
        for d in row:
            before = len(request.prompt_ids)
            with torch.no_grad():
                logits = model(torch.tensor([[*request.prompt_ids, *d.token_ids]])).logits[0]
            scores = logits[before - 1 : -1] / TRUNCATED.temperature
            wanted = kept_by_truncation(scores, TRUNCATED)
            for t, (token, ids) in enumerate(zip(d.token_ids, d.kept_ids, strict=True)):
                kept = torch.zeros_like(wanted[t])
                kept[list(ids)] = True
                assert token in ids and 1 <= len(ids) <= 20
                logps = scores[t].masked_fill(~kept, float("-inf")).log_softmax(-1)
                assert abs(float(logps[token]) - d.logps[t]) < 2e-4
                tokens, same = tokens + 1, same + int(torch.equal(kept, wanted[t]))
    assert same >= 0.95 * tokens > 20, "apart from tokens at the very edge"


def test_stops_lengths_and_partial_rollouts(server, policy, tmp_path):
    model, tokenizer = policy
    client = engine(server, policy, tmp_path)
    client.refresh(1)
    whole = client.generate(REQUESTS, SamplingConfig(max_tokens=40))
    for d in (d for row in whole for d in row):
        stopped = d.token_ids[-1] == tokenizer.eos_token_id
        assert d.finish_reason == ("stop" if stopped else "length") and (
            stopped or len(d.token_ids) == 40
        )
    letter = next(text for t in whole[0][0].token_ids if (text := tokenizer.decode([t])).isalpha())
    (first, *_), _ = client.generate(REQUESTS, SamplingConfig(max_tokens=40, stop_strings=[letter]))
    assert (
        first.finish_reason == "stop"
        and first.token_ids == whole[0][0].token_ids[: len(first.token_ids)]
    )
    assert tokenizer.decode(first.token_ids).endswith(letter) and letter not in tokenizer.decode(
        first.token_ids[:-1]
    )
    looping = client.generate(
        REQUESTS, SamplingConfig(max_tokens=40, repeat_ngram=1, repeat_times=2)
    )
    for drawn, row in zip(looping, whole, strict=True):
        for a, b in zip(drawn, row, strict=True):
            assert a.token_ids == b.token_ids[: len(a.token_ids)]
            assert (a.finish_reason == "repeat") == (
                len(a.token_ids) > 1 and a.token_ids[-1] == a.token_ids[-2]
            )
    begun = client.generate(REQUESTS, SamplingConfig(max_tokens=12, budget_tokens=5))
    assert all(
        d.finish_reason in ("budget", "stop") and len(d.token_ids) <= 5
        for row in begun
        for d in row
    )
    going_on = [
        Request(prompt_ids=r.prompt_ids, seeds=r.seeds, prefixes=tuple(d.token_ids for d in row))
        for r, row in zip(REQUESTS, begun, strict=True)
    ]
    for request, row in zip(
        going_on, client.generate(going_on, SamplingConfig(max_tokens=12)), strict=True
    ):
        for k, d in enumerate(row):
            assert (
                len(request.prefixes[k]) + len(d.token_ids) <= 12
                and mismatch(model, request, d, k, 1.0) < 2e-4
            )


def test_more_prompts_than_a_batch_of_the_server_holds(server, policy, tmp_path):
    """Prefilled in parts they stop vLLM 0.32 on a CPU, whose generators have no offset."""
    client = engine(server, policy, tmp_path)
    requests = [Request(prompt_ids=tuple(b"%d " % i * 60)[:180], seeds=(i,)) for i in range(10, 18)]
    client.refresh(1)
    drawn = client.generate(requests, SamplingConfig(max_tokens=4))
    for request, (d,) in zip(requests, drawn, strict=True):
        assert mismatch(policy[0], request, d, 0, 1.0) < 2e-4


def test_a_restart_in_the_middle_loses_nothing_and_gets_the_weights_again(server, policy, tmp_path):
    model, _ = policy
    client = engine(server, policy, tmp_path, retries=8, concurrency=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    client.refresh(7)
    requests = [
        Request(prompt_ids=tuple(f"question {i}".encode()), seeds=tuple(range(8 * i, 8 * i + 8)))
        for i in range(8)
    ]
    finished: list[tuple[int, int]] = []
    enough = threading.Event()

    def count(i: int, k: int, _: Sampled) -> None:
        finished.append((i, k))
        if len(finished) == 6:
            enough.set()

    def restart() -> None:
        enough.wait()
        server.kill()
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    drawn = client.generate(requests, SamplingConfig(max_tokens=60), on_finished=count)
    thread.join()
    assert sorted(finished) == [(i, k) for i in range(8) for k in range(8)]  # each once
    for request, row in zip(requests, drawn, strict=True):
        for k, d in enumerate(row):
            assert (
                mismatch(model, request, d, k, 1.0) < 2e-4
            )  # the restarted one would have the folder's own weights


def settings(server, tmp_path: Path, name: str, reward: str) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{a}?"}) + "\n" for a in range(40)))
    return [
        "--model.name",
        str(server.model),
        "--data.train",
        f"[{rows}]",
        "--train.run_dir",
        str(tmp_path),
        "--train.name",
        name,
        "--train.batch_size",
        "8",
        "--rollout.group_size",
        "8",
        "--optimizer.lr",
        "1e-2",
        "--optimizer.schedule",
        "constant",
        "--optimizer.weight_decay",
        "0",
        "--packing.max_tokens",
        "400",
        "--train.precision",
        "fp32",
        "--rewards.functions",
        json.dumps({f"tests.reward_functions.{reward}": 1.0}),
        "--engine",
        "vllm",
        "--vllm.url",
        server.url,
        "--algorithm_options.beta",
        "0.0",
    ]


def steps_of(folder: Path) -> list[dict]:
    return [m for m in read_metrics(folder / "metrics.jsonl", drop=TIMING_KEYS) if "grad_norm" in m]


def test_recipe_learns_with_the_server(server, tmp_path):
    arguments = [
        *settings(server, tmp_path, "run", "starts_with_digit"),
        "--sampling.max_tokens",
        "2",
        "--train.max_steps",
        "30",
    ]
    check(run("cpu.yaml", "rl", *arguments))
    steps = steps_of(tmp_path / "run")
    assert [s["step"] for s in steps] == list(range(1, 31))
    assert max(s["sampler_mismatch_nats"] for s in steps) < 1e-4
    rewards = [s["reward"] for s in steps]
    assert rewards[0] < 0.3 and statistics.median(rewards[-5:]) > 0.8, rewards


def test_merged_adapters_are_what_the_trainer_samples_from(server, tmp_path):
    """The probe is computed without merging: it compares the merge too."""
    arguments = [
        *settings(server, tmp_path, "run", "starts_with_digit"),
        *("--model.lora.rank", "4", "--sampling.max_tokens", "4", "--train.max_steps", "4"),
    ]
    check(run("cpu.yaml", "rl", *arguments))
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 4 and max(s["sampler_mismatch_nats"] for s in steps) < 1e-4


def test_recipe_trains_right_with_truncated_sampling(server, tmp_path):
    arguments = [
        *settings(server, tmp_path, "run", "starts_with_digit"),
        *("--sampling.top_k", "30", "--sampling.top_p", "0.95", "--sampling.max_tokens", "6"),
        *("--train.max_steps", "8", "--rollout.updates", "2"),
    ]
    check(run("cpu.yaml", "rl", *arguments))
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 8
    assert max(s["sampler_mismatch_nats"] for s in steps[::2]) < 1e-3


def test_recipe_killed_in_the_middle_of_rollouts_goes_on_bit_for_bit(server, tmp_path):
    """Some completions of the iteration are in the journal, the others are still with the
    server."""
    more = [
        "--sampling.max_tokens",
        "30",
        "--train.max_steps",
        "6",
        "--train.save_every",
        "2",
        "--vllm.concurrency",
        "1",
    ]
    check(run("cpu.yaml", "rl", *settings(server, tmp_path, "whole", "slow_digit"), *more))
    arguments = [*settings(server, tmp_path, "cut", "slow_digit"), *more]
    kept = 0
    for iteration in (1, 4):
        journal = tmp_path / "cut" / "rollouts" / f"iteration_{iteration:06d}_rank0.jsonl"
        process = subprocess.Popen(
            command("cpu.yaml", "rl", *arguments),
            cwd=REPO,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (journal.exists() and journal.read_text().count("\n") > 4):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
        process.wait()
        kept += 4 < journal.read_text().count("\n") < 64
    assert kept == 2, "no kill fell into a rollout"
    check(run("cpu.yaml", "rl", *arguments))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert (whole / "final" / "model.safetensors").read_bytes() == (
        cut / "final" / "model.safetensors"
    ).read_bytes()
    assert steps_of(whole) == steps_of(cut)
