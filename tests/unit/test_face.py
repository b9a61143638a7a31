"""What users of TRL and transformers type: names, data sets, callbacks, peft's configs, the model
afterwards."""

from __future__ import annotations

import base64
import dataclasses
import functools
import inspect
import io
import json
import os
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback

import posttrain
from posttrain import (
    DPOConfig,
    DPOTrainer,
    OptimizerConfig,
    PackingConfig,
    RewardConfig,
    RewardTrainer,
    RLConfig,
    RLTrainer,
    RolloutConfig,
    SamplingConfig,
    SFTConfig,
    SFTTrainer,
    TrainConfig,
)
from posttrain.training.metrics import MetricsLog, read_metrics
from tests.tiny import model_folder

ROWS = [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(5) for b in range(4)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "?"} for r in ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(model_folder(tmp_path_factory.mktemp("model") / "tiny"))


def settings(tmp_path, kind=SFTConfig, *, lr=1e-3, **train):
    own = dict(run_dir=str(tmp_path), name="run", max_steps=2, batch_size=4, precision="fp32")
    return kind(
        train=TrainConfig(**own | train),
        optimizer=OptimizerConfig(lr=lr, schedule="constant"),
        packing=PackingConfig(max_tokens=400),
    )


def metrics(tmp_path, name="loss"):
    return [m[name] for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if name in m]


def test_every_public_name_is_there_and_importing_changes_nothing():
    for name in posttrain.__all__:
        assert getattr(posttrain, name) is not None
    code = (
        "import os, sys; before = dict(os.environ); import posttrain; "
        "assert dict(os.environ) == before; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.parametrize(
    "kind, given, said",
    [
        (DPOConfig, "betta", "DPOConfig has no field 'betta'. Did you mean beta?"),
        (
            TrainConfig,
            "batchsize",
            "TrainConfig has no field 'batchsize'. Did you mean batch_size?",
        ),
        (SFTConfig, "learning_rate", "optimizer.lr, as in optimizer=OptimizerConfig(lr=...)?"),
        (SFTConfig, "per_device_train_batch_size", "train.batch_size, as in train=TrainConfig("),
        (
            RLConfig,
            "num_generations",
            "rollout.group_size, as in rollout=RolloutConfig(group_size=",
        ),
        (SFTConfig, "rank", "model.lora.rank, as in model=ModelConfig(lora=LoraConfig(rank=...))?"),
        (OptimizerConfig, "learning_rate", "Did you mean optimizer.lr?"),
        (RewardConfig, "zzz", "RewardConfig has no field 'zzz'.\n"),
    ],
)
def test_an_unknown_keyword_names_the_nearest_field_also_of_groups(kind, given, said):
    for build in (kind, functools.partial(dataclasses.replace, kind())):
        with pytest.raises(TypeError) as error:
            build(**{given: 1})
        assert said in str(error.value) and "docs/from_trl.md" in str(error.value)


def test_every_settings_class_says_so_and_keeps_its_signature():
    kinds = [getattr(posttrain, n) for n in posttrain.__all__ if n.endswith("Config")]
    for kind in kinds:
        with pytest.raises(TypeError, match=f"{kind.__name__} has no field 'one'.*\n.*'two'"):
            kind(one=1, two=2)
        assert list(inspect.signature(kind).parameters) == [
            f.name for f in dataclasses.fields(kind)
        ]
        assert pickle.loads(pickle.dumps(kind())) == kind()


def test_positional_model_and_args_a_dataset_and_the_trained_model(folder, tmp_path):
    """The model of the trainer is the one in final/; evaluate() before and after training are the
    figures of the log."""
    trainer = SFTTrainer(
        folder,
        settings(tmp_path),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=datasets.Dataset.from_list(ROWS[:6]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert [before["eval_loss"], after["eval_loss"]] == metrics(tmp_path, "eval_loss")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert all(
        torch.equal(p, q)
        for p, q in zip(trainer.model.parameters(), loaded.parameters(), strict=True)
    )
    saved = trainer.save_model(tmp_path / "elsewhere")
    assert (saved / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "final" / "model.safetensors"
    ).read_bytes()
    assert trainer.evaluate(ROWS[:6]) == after and trainer.evaluate(ROWS[6:]) != after
    assert trainer.processing_class is trainer.tokenizer


def test_a_stream_trains_as_the_same_rows_in_their_order_and_resumes(folder, tmp_path):
    """Rows of a stream come in order and begin anew at its end; a run that goes on after step 3 is
    the uninterrupted one."""

    def stream():
        yield from ROWS

    rows = datasets.IterableDataset.from_generator(stream)
    whole = SFTTrainer(folder, settings(tmp_path / "a", max_steps=7), train_dataset=rows).train()
    SFTTrainer(folder, settings(tmp_path / "b", max_steps=3), train_dataset=rows).train()
    twice = SFTTrainer(folder, settings(tmp_path / "b", max_steps=7), train_dataset=rows).train()
    for part in ("model.safetensors", "config.json"):
        assert (whole.final / part).read_bytes() == (twice.final / part).read_bytes()
    # the reference: each step's rows, trained by hand as one batch
    groups = SFTTrainer(folder, settings(tmp_path / "c"), train_dataset=[*ROWS, *ROWS])
    first = SFTTrainer(
        folder, settings(tmp_path / "d", max_steps=1), train_dataset=ROWS[:4]
    ).train()
    assert metrics(tmp_path / "a")[0] == pytest.approx(first.metrics["loss"], rel=1e-6)
    assert groups.evaluate(ROWS[:4])["eval_loss"] == pytest.approx(
        metrics(tmp_path / "a")[0], rel=1e-5
    )
    with pytest.raises(ValueError, match="set train.max_steps"):
        SFTTrainer(folder, settings(tmp_path / "e", max_steps=0), train_dataset=rows).train()

    def edited():
        yield {"prompt": "0+0", "completion": "1"}
        yield from ROWS[1:]

    others = datasets.IterableDataset.from_generator(edited)
    with pytest.raises(ValueError, match="The stream gives other rows"):
        SFTTrainer(folder, settings(tmp_path / "b", max_steps=8), train_dataset=others).train()


def test_several_evaluation_sets_by_name(folder, tmp_path):
    sets = {"small": PAIRS[:4], "large": PAIRS[4:]}
    trainer = DPOTrainer(
        folder, settings(tmp_path, DPOConfig), train_dataset=PAIRS, eval_dataset=sets
    )
    result = trainer.train()
    for name, rows in sets.items():
        alone = trainer.evaluate(rows)
        assert result.metrics[f"eval_{name}_loss"] == alone["eval_loss"]
        assert result.metrics[f"eval_{name}_rewards/margins"] == alone["rewards_eval/margins"]


def test_compute_metrics_gets_groups_and_their_log_probs(folder, tmp_path):
    def perplexity(held_out):
        tokens = sum(g.num_trained for g in held_out.groups)
        return {"perplexity": 2.718281828459045 ** (-sum(held_out.sums.values()) / tokens)}

    trainer = SFTTrainer(
        folder,
        settings(tmp_path),
        train_dataset=ROWS,
        eval_dataset=ROWS[:6],
        compute_metrics=perplexity,
    )
    found = trainer.evaluate()
    assert found["eval_perplexity"] == pytest.approx(2.718281828459045 ** found["eval_loss"])


def test_early_stopping_of_transformers_and_the_best_weights(folder, tmp_path):
    """A learning rate at which the held-out loss rises: patience 2 ends the run, best/ holds the
    weights with the least loss, and the finished run stays finished."""

    class Seen(TrainerCallback):
        events: list = []

        def on_train_begin(self, args, state, control, model=None, **known):
            assert model is not None and args.max_steps == 40
            self.events.append("begin")

        def on_step_end(self, args, state, control, **known):
            self.events.append(state.global_step)

        def on_train_end(self, args, state, control, **known):
            self.events.append("end")

    def trainer():
        return SFTTrainer(
            folder,
            settings(
                tmp_path, lr=0.5, max_steps=40, eval_every=1, save_every=1, best_metric="eval_loss"
            ),
            train_dataset=ROWS,
            eval_dataset=ROWS[:6],
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2), Seen()],
        )

    result = trainer().train()
    losses = metrics(tmp_path, "eval_loss")[1:]
    best, patience, expected = None, 0, None
    for step, value in enumerate(losses, start=1):
        patience = 0 if best is None or value < best else patience + 1
        best = value if best is None else min(best, value)
        if patience == 2:
            expected = step
            break
    assert result.step == expected == len(losses) < 40
    assert Seen.events == ["begin", *range(1, result.step + 1), "end"]
    held = SFTTrainer(
        str(tmp_path / "run" / "best"), settings(tmp_path / "x"), train_dataset=ROWS
    ).evaluate(ROWS[:6])
    assert held["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert trainer().train().step == result.step, "a stopped run is complete"


def test_a_callback_asks_for_an_evaluation_and_a_checkpoint(folder, tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **known):
            control.should_evaluate = control.should_save = state.global_step == 2
            return control

    config = settings(tmp_path, max_steps=4, save_total_limit=0)
    SFTTrainer(folder, config, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[Ask()]).train()
    steps = [
        m["step"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in m
    ]
    assert steps == [0, 2, 4]
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_2", "step_4"]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 7}])
def test_any_lora_of_peft(folder, tmp_path, options):
    config = peft.LoraConfig(r=4, target_modules="all-linear", **options)
    base = {
        n: p.clone() for n, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()
    }
    trainer = SFTTrainer(folder, settings(tmp_path), train_dataset=ROWS, peft_config=config)
    result = trainer.train()
    assert (result.final / "adapter_config.json").exists()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(result.final)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    again = dict(loaded.named_parameters())
    assert trained and all(torch.equal(p, again[n]) for n, p in trained.items())
    frozen = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for n, p in trainer.model.named_parameters()
        if not p.requires_grad
    }
    assert frozen.keys() == base.keys() and all(torch.equal(p, base[n]) for n, p in frozen.items())
    with pytest.raises(ValueError, match="adapters: peft_config"):
        other = peft.LoraConfig(r=2, target_modules="all-linear", **options)
        SFTTrainer(folder, settings(tmp_path), train_dataset=ROWS, peft_config=other).train()


def test_configs_that_cannot_be_packed_or_are_not_of_peft_are_refused(folder, tmp_path):
    for config, message in (
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "adds tokens"),
        (posttrain.LoraConfig(rank=4), "config.model.lora"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTTrainer(folder, settings(tmp_path), train_dataset=ROWS, peft_config=config).train()


def test_reward_functions_as_trl_has_them(folder, tmp_path):
    """f(prompts, completions, **columns) -> list: conversations in as lists of messages, texts as
    texts, and each row's columns beside them."""
    seen = []

    def by_length(prompts, completions, answer, **columns):
        seen.append((prompts[0], completions[0], answer[0]))
        return [float(len(c[0]["content"] if isinstance(c, list) else c) % 3) for c in completions]

    async def slow(prompts, completions, **columns):
        return [0.5] * len(completions)

    for number, prompt in enumerate((ROWS[0]["prompt"], [{"role": "user", "content": "hi"}])):
        config = RLConfig(
            train=settings(tmp_path, name=f"run{number}", max_steps=1).train,
            beta=0.0,
            packing=PackingConfig(max_tokens=200),
            sampling=SamplingConfig(max_tokens=3),
            rollout=RolloutConfig(group_size=2, show_every=0),
        )
        rows = [{"prompt": prompt, "answer": "7"}] * 8
        trainer = RLTrainer(folder, config, train_dataset=rows, reward_funcs=[by_length, slow])
        result = trainer.train()
        assert result.metrics["reward/slow"] == 0.5
        said, text, answer = seen[-1]
        assert said == prompt and answer == "7"
        assert isinstance(text, list if number else str)


def test_reinforcement_learning_evaluates_on_demand(folder, tmp_path):
    config = RLConfig(
        train=settings(tmp_path, max_steps=1).train,
        beta=0.0,
        packing=PackingConfig(max_tokens=200),
        sampling=SamplingConfig(max_tokens=3),
        rollout=RolloutConfig(group_size=2, show_every=0),
    )
    rows = [{"prompt": r["prompt"], "answer": r["completion"]} for r in ROWS]

    def short(completion, sample):
        return float(len(completion) < 2)

    trainer = RLTrainer(
        folder, config, train_dataset=rows, eval_dataset=rows[:4], rewards={short: 1.0}
    )
    before = trainer.evaluate()
    trainer.train()
    logged = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_pass@1" in m]
    assert before["eval_pass@1"] == logged[0]["eval_pass@1"]
    assert trainer.evaluate()["eval_pass@1"] == logged[-1]["eval_pass@1"]
    with pytest.raises(ValueError, match="takes no loss"):
        RLTrainer(folder, config, train_dataset=rows, rewards={short: 1.0}, loss=short)


def test_the_model_card_says_what_was_done(folder, tmp_path):
    trainer = RewardTrainer(
        folder, settings(tmp_path, RewardConfig), train_dataset=PAIRS, eval_dataset=PAIRS[:4]
    )
    result = trainer.train()
    _, head, text = (result.final / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "base_model": folder,
        "tags": ["posttrain", "reward"],
    }
    assert "2 steps of Reward (bradley_terry)" in text
    assert f"| eval_loss | {metrics(tmp_path, 'eval_loss')[0]:.4f} |" in text
    assert "| optimizer.lr | 0.001 |" in text and "optimizer.weight_decay" not in text


HUB = '''
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub for small files, and a log of it."""
    def log_message(self, *_): pass
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": False})
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        entry = [self.path, self.headers.get("authorization"), body]
        with open(sys.argv[1], "a") as log:
            print(json.dumps(entry), file=log)
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        url = f"http://{self.headers['host']}/me/mine"
        self.answer({"url": url, "id": "me/mine", "name": "me/mine", "success": True,
                     "commitUrl": url + "/commit/1", "commitOid": "1" * 40})

server = HTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
'''


def test_push_to_hub_creates_the_repository_and_uploads_final_with_its_card(folder, tmp_path):
    """The requests of huggingface_hub itself, against a server that answers as the hub does."""
    trainer = SFTTrainer(folder, settings(tmp_path, max_steps=1), train_dataset=ROWS)
    with pytest.raises(ValueError, match="call train.. or save_model.. first"):
        trainer.push_to_hub("me/mine")
    final = trainer.train().final
    log = tmp_path / "requests"
    hub = subprocess.Popen([sys.executable, "-c", HUB, str(log)], stdout=subprocess.PIPE, text=True)
    assert hub.stdout is not None
    try:
        port = int(hub.stdout.readline())
        code = (
            "from posttrain.trainers.card import upload; from pathlib import Path; "
            f"print(upload(Path({str(final)!r}), 'me/mine', private=True, token='hf_secret'))"
        )
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip().endswith("/me/mine")
    finally:
        hub.kill()
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(who == "Bearer hf_secret" for _, who, _ in requests)
    created = next(json.loads(body) for path, _, body in requests if path == "/api/repos/create")
    assert created["name"] == "mine" and created["organization"] == "me"
    assert created.get("private") or created.get("visibility") == "private"
    commit = next(body for path, _, body in requests if path.endswith("/commit/main"))
    sent = [json.loads(line)["value"] for line in commit.splitlines()]
    files = {v["path"]: base64.b64decode(v["content"]) for v in sent if "content" in v}
    assert files.keys() == {p.name for p in final.iterdir()} and "README.md" in files
    assert all(content == (final / name).read_bytes() for name, content in files.items())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("has_colour", [True, False])
def test_progress_has_colours_on_a_terminal_unless_no_color_says_not(
    monkeypatch, tmp_path, has_colour
):
    shown = progress(monkeypatch, tmp_path, Terminal(), NO_COLOR="" if has_colour else "1")
    assert "2/2" in shown and "\x1b[?25l" in shown  # the bar: the cursor is hidden
    colours = re.findall(r"\x1b\[[0-9;]*3[0-9;]*m", shown)
    assert bool(colours) == has_colour


@pytest.mark.parametrize(("stdout", "term"), [(io.StringIO, "xterm"), (Terminal, "dumb")])
def test_progress_elsewhere_is_whole_lines_without_escapes(monkeypatch, tmp_path, stdout, term):
    """In a pipe, and where no cursor can move."""
    shown = progress(monkeypatch, tmp_path, stdout(), TERM=term)
    numbers = "  ".join(f"figure_{i} {i}.5" for i in range(20))
    assert shown == f"step 0: {numbers}\nstep 1/2  loss 1\nstep 2/2  loss 0.5\n"


def progress(monkeypatch, tmp_path, stdout, **environment):
    """What two steps show on this stdout."""
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "COLORTERM": "", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", stdout)
    log = MetricsLog(
        tmp_path / "metrics.jsonl",
        num_steps=2,
        start=0,
        accelerator=SimpleNamespace(is_main_process=True, log=lambda values, step: None),
        log_every=1,
        shown=("loss",),
    )
    log.evaluation(0, {f"figure_{i}": i + 0.5 for i in range(20)})
    for step in (1, 2):
        log.step(step, {"loss": 1 / step, "hidden": 3.0})
    log.close()
    return stdout.getvalue()
