"""Raw file -> `posttrain prep` -> recipes/dpo.py and recipes/reward.py -> a model that plain
transformers loads."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from posttrain.training.metrics import TIMING_KEYS, read_metrics
from tests.e2e.launching import REPO, check, environment, posttrain, posttrain_warm, run, run_warm
from tests.tiny import model_folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model, and raw dialogues in Anthropic's format: the answer that counts on is better
    than the one that repeats."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    rows = []
    for _ in range(160):
        start = rng.randrange(0, 6)
        shared = f"\n\nHuman: count from {start}, {rng.randrange(1000)}\n\nAssistant:"
        up, same = "".join(str(start + i) for i in range(4)), str(start) * rng.randint(3, 5)
        rows.append({"chosen": f"{shared} {up}", "rejected": f"{shared} {same}"})
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps(r) + "\n" for r in rows) + "not json\n")
    return model_folder(folder / "model"), raw


@pytest.fixture(scope="module")
def pairs(inputs) -> Path:
    out = inputs[1].parent / "pairs"
    result = check(
        posttrain(
            "prep",
            "pairs",
            str(inputs[1]),
            "--out",
            str(out),
            "--test-fraction",
            "0.25",
            "--near-duplicates",
            "split",
        )
    )
    assert "161 rows read, 1 bad" in result.stdout
    return out


def settings(inputs, pairs: Path, tmp_path: Path, name: str, *more: str) -> list[str]:
    return [
        "--model.name",
        str(inputs[0]),
        "--data.train",
        f"[{pairs / 'train'}]",
        "--data.eval",
        f"[{pairs / 'test'}]",
        "--data.cache_dir",
        str(tmp_path / "data"),
        "--train.run_dir",
        str(tmp_path),
        "--train.name",
        name,
        "--train.batch_size",
        "16",
        "--train.max_steps",
        "12",
        "--optimizer.lr",
        "3e-3",
        "--packing.max_tokens",
        "400",
        "--train.precision",
        "fp32",
        *more,
    ]


def steps_of(folder: Path) -> list[dict]:
    return [m for m in read_metrics(folder / "metrics.jsonl", drop=TIMING_KEYS) if "grad_norm" in m]


def test_what_prep_writes_is_read_by_datasets_and_shown(pairs):
    import datasets

    loaded = datasets.load_dataset(
        "parquet", data_files=str(pairs / "train" / "*.parquet"), split="train"
    )
    assert (
        loaded[0]["prompt"][0]["role"] == "user" and loaded[0]["chosen"][0]["role"] == "assistant"
    )
    shown = check(posttrain_warm("prep", "show", str(pairs), "--n", "2")).stdout
    assert shown.count("chosen") == 2 and "raw.jsonl:" in shown
    again = posttrain_warm("prep", "pairs", "x.jsonl", "--out", str(pairs))
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_prep_leaves_no_output(inputs, tmp_path, stop):
    big = tmp_path / "big.jsonl"
    big.write_text(inputs[1].read_text() * 3000)
    arguments = [
        sys.executable,
        "-m",
        "posttrain.cli.main",
        "prep",
        "pairs",
        str(big),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        arguments,
        env=environment(),
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out-*/spill/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(stop)
    assert process.wait(timeout=60) != 0
    assert not (tmp_path / "out").exists()
    if stop == signal.SIGINT:
        assert not list(tmp_path.glob(".out-*"))


def test_dpo_learns_and_a_cached_reference_changes_nothing(inputs, pairs, tmp_path):
    longer = ("--train.max_steps", "24", "--loss_options.beta", "0.5")
    live = check(run("cpu.yaml", "dpo", *settings(inputs, pairs, tmp_path, "live", *longer)))
    assert (
        "self-check passed" in live.stdout and "held out, before and after 24 steps" in live.stdout
    )
    lines = read_metrics(tmp_path / "live" / "metrics.jsonl")
    first, last = lines[0], lines[-1]
    assert (
        first["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
        and first["rewards_eval/accuracies"] == 0.0
    )
    assert last["rewards_eval/accuracies"] > 0.9 and last["eval_loss"] < 0.4
    check(
        run_warm(
            "cpu.yaml",
            "dpo",
            *settings(
                inputs,
                pairs,
                tmp_path,
                "cached",
                *longer,
                "--reference.cache",
                "true",
                "--reference.cache_dir",
                str(tmp_path),
            ),
        )
    )
    for a, b in zip(steps_of(tmp_path / "live"), steps_of(tmp_path / "cached"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_two_ranks_do_what_one_does(inputs, pairs, tmp_path):
    """Dropout-free and in float32: the same losses up to rounding, KTO's statistic over ranks
    included."""
    labelled = tmp_path / "labelled"
    check(
        posttrain_warm(
            "prep",
            "pairs",
            str(inputs[1]),
            "--out",
            str(labelled),
            "--layout",
            "labelled",
            "--test-fraction",
            "0.25",
        )
    )
    for name, data, more in (("dpo", pairs, []), ("kto", labelled, ["--loss", "kto"])):
        for launch in ("cpu", "cpu2"):
            arguments = settings(
                inputs, data, tmp_path, f"{name}_{launch}", "--train.max_steps", "4", *more
            )
            check(run_warm(f"{launch}.yaml", "dpo", *arguments))
        one, two = (steps_of(tmp_path / f"{name}_{launch}") for launch in ("cpu", "cpu2"))
        for a, b in zip(one, two, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert any(m["kl_estimate_nats"] > 0 for m in one)


def test_a_moving_reference_resumes_bit_for_bit(inputs, pairs, tmp_path):
    arguments = settings(
        inputs,
        pairs,
        tmp_path,
        "whole",
        "--reference.sync_every",
        "3",
        "--train.save_every",
        "4",
        "--train.save_total_limit",
        "0",
        "--loss",
        "0.9*dpo + 0.1*nll_chosen",
        "--loss_options.beta",
        "0.2",
    )
    check(run_warm("cpu.yaml", "dpo", *arguments))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    for step in (8, 12):
        shutil.rmtree(cut / "checkpoints" / f"step_{step}")
    resumed = check(run_warm("cpu.yaml", "dpo", *[a if a != "whole" else "cut" for a in arguments]))
    assert "step_4" in resumed.stderr
    assert (whole / "final" / "model.safetensors").read_bytes() == (
        cut / "final" / "model.safetensors"
    ).read_bytes()
    assert steps_of(whole) == steps_of(cut)


@pytest.mark.parametrize("lora", [False, True])
def test_reward_model_learns_and_scores_the_same_in_plain_transformers(
    inputs, pairs, tmp_path, lora
):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from posttrain.models.heads import Scorer
    from posttrain.packing.batch import GroupPart, pack
    from posttrain.packing.plan import PackingConfig
    from posttrain.types import SCORE_SLOT, Completion, PromptGroup

    more = (
        ["--model.lora.rank", "4", "--optimizer.lr", "2e-2"]
        if lora
        else ["--train.max_steps", "36", "--optimizer.lr", "1e-2"]
    )
    arguments = settings(inputs, pairs, tmp_path, "rm", "--loss_options.centering", "0.01", *more)
    check((run_warm if lora else run)("cpu.yaml", "reward", *arguments))
    last = read_metrics(tmp_path / "rm" / "metrics.jsonl")[-1]
    assert last["eval_accuracy"] > 0.9
    assert {
        "eval_ece",
        "eval_margin",
        "eval_length_correlation",
        "eval_longer_preferred",
    } <= last.keys()
    final = tmp_path / "rm" / "final"
    if lora:
        merged = check(posttrain_warm("merge", str(final), "--out", str(tmp_path / "merged")))
        assert "Merged" in merged.stdout
        final = tmp_path / "merged"
    model = AutoModelForSequenceClassification.from_pretrained(final, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert (
        tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
        and model.config.pad_token_id == tokenizer.pad_token_id
    )
    texts = [
        "count from 1<|im_end|>",
        "count from 2, then more<|im_end|>",
        "3",
    ]  # ends in EOS, in EOS, in text
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    assert ids[0][-1] == tokenizer.eos_token_id
    with torch.no_grad():
        alone = torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in ids])
        for side in ("right", "left"):
            tokenizer.padding_side = side
            padded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            scores = model(
                input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
            ).logits[:, 0]
            assert torch.allclose(scores, alone, atol=1e-5), side
        groups = [
            PromptGroup(
                prompt_ids=row[:1],
                completions=[
                    Completion(
                        token_ids=[*row[1:], SCORE_SLOT], loss_mask=[0] * (len(row) - 1) + [1]
                    )
                ],
            )
            for row in ids
        ]
        batch = pack(
            groups, [GroupPart(group=i, completions=(0,)) for i in range(3)], mode="shared"
        )
        packed = Scorer(model, PackingConfig())(batch).logps_T
    assert torch.allclose(packed, alone, atol=1e-5)
    assert float((alone[0] - alone[1]).abs()) > 1e-4


def test_mistakes_are_told_in_one_line(inputs, pairs, tmp_path):
    cases = {
        ("--loss", "dpp"): "function of posttrain.losses.preference",
        ("--loss_options.beat", "1"): "Did you mean beta?",
        ("--loss", "simpo", "--reference.cache", "true"): "reads no reference",
        ("--loss", "kto", "--reference.cache", "true"): "no cache holds",
        ("--loss", "kto"): "learns from labelled answers",
        ("--data.train", f"[{inputs[1]}]"): "raw.jsonl:161: not JSON",
    }
    for more, message in cases.items():
        result = run_warm("cpu.yaml", "dpo", *settings(inputs, pairs, tmp_path, "bad", *more))
        assert result.returncode == 2, (more, result.stderr[-2000:])
        assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr, (
            more,
            result.stderr[-2000:],
        )
