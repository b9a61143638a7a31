"""The SFT recipe through its real command: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from posttrain.training.metrics import read_metrics
from tests.e2e.launching import check, posttrain_warm, run, run_warm
from tests.tiny import byte_tokenizer, model_folder, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return model_folder(folder / "model"), write_rows(folder / "rows.jsonl", 60)


def options(inputs, run_dir: Path, *more: str) -> list[str]:
    model, rows = inputs
    return [
        "--model.name",
        str(model),
        "--data.train",
        f"[{rows}]",
        "--data.cache_dir",
        str(run_dir / "cache"),
        "--train.run_dir",
        str(run_dir),
        "--train.max_steps",
        "3",
        "--train.batch_size",
        "8",
        "--packing.max_tokens",
        "400",
        *more,
    ]


def test_a_run_writes_what_the_readme_says(tmp_path, inputs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = check(
        run(
            "cpu.yaml",
            "sft",
            *options(
                inputs, tmp_path, "--data.eval_fraction", "0.2", "--train.trackers", "[tensorboard]"
            ),
        )
    )
    folder = tmp_path / "sft"
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=2).shape[1] > prompt["input_ids"].shape[1]
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [m for m in metrics if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    wanted = {
        "loss",
        "grad_norm",
        "lr",
        "trained_tokens",
        "computed_tokens",
        "tokens_per_s",
        "tflops_per_s",
        "peak_fraction",
        "step_s",
    }
    assert wanted <= set(steps[0])
    assert metrics[0]["data"]["read"] == 60 and metrics[0]["data"]["dropped"] == 0
    assert [m["step"] for m in metrics if "eval_loss" in m] == [0, 3]
    assert (folder / "config.yaml").read_text().startswith("model:")
    about = json.loads((folder / "about.json").read_text())
    assert about["num_steps"] == 3 and about["environment"]["num_processes"] == 1
    memory = about["memory"]
    said = re.search(r"memory: predicted ([\d.]+) GB, measured ([\d.]+) GB", result.stdout)
    peak = max(sum(items.values()) for items in memory["planned_bytes"].values())
    assert (f"{peak / 1e9:.2f}", f"{memory['measured_bytes'] / 1e9:.2f}") == said.groups()
    assert metrics[0]["data"]["columns"] == {"used": {"messages": 60}}
    assert (folder / "checkpoints" / "step_3" / "manifest.json").is_file()
    assert list(folder.rglob("events.out.tfevents*")), "tensorboard was asked for"
    assert (
        "trained tokens are highlighted" in result.stdout and "self-check passed" in result.stdout
    )
    assert str(folder / "final") in result.stdout.replace("\n", "")


def test_the_printed_config_is_the_same_run(tmp_path, inputs):
    """--print_config of YAML plus overrides, fed back, resolves to itself."""
    first = check(
        run_warm(
            "cpu.yaml",
            "sft",
            *options(inputs, tmp_path, "--optimizer.lr", "0.5", "--print_config"),
        )
    )
    saved = tmp_path / "resolved.yaml"
    saved.write_text(first.stdout)
    second = check(run_warm("cpu.yaml", "sft", "--config", str(saved), "--print_config"))
    assert first.stdout == second.stdout and "lr: 0.5" in first.stdout


def test_help_lists_every_option_with_its_meaning_and_default():
    result = check(run_warm("cpu.yaml", "sft", "--help"))
    text = " ".join(result.stdout.split())
    for option in (
        "--model.lora.rank",
        "--data.max_length",
        "--packing.max_tokens",
        "--optimizer.lr",
        "--train.save_total_limit",
        "--loss",
    ):
        assert option in text
    assert "Global L2 norm" in text and "(type: int, default: 4096)" in text
    lines = [
        line
        for line in result.stdout.splitlines()
        if line.startswith("  --") and " CONFIG" not in line
    ]
    assert len(lines) > 50


def test_lora_trains_an_adapter_and_merge_makes_a_plain_model(tmp_path, inputs):
    from transformers import AutoModelForCausalLM

    check(
        run_warm(
            "cpu.yaml",
            "sft",
            *options(
                inputs,
                tmp_path,
                "--model.lora.rank",
                "4",
                "--optimizer.lr",
                "0.01",
                "--model.gradient_checkpointing",
                "true",
            ),
        )
    )
    adapter = tmp_path / "sft" / "final"
    assert (adapter / "adapter_model.safetensors").is_file() and not (
        adapter / "model.safetensors"
    ).exists()
    check(posttrain_warm("merge", str(adapter), "--out", str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(inputs[0])
    ids = torch.arange(40, 60)[None]
    assert float((merged(ids).logits - base(ids).logits).abs().max()) > 1e-3


def test_loss_falls_in_every_precision_that_a_cpu_has(tmp_path, inputs):
    for precision in ("fp32", "bf16", "bf16-pure"):
        name = [
            "--train.name",
            precision,
            "--train.precision",
            precision,
            "--train.max_steps",
            "12",
            "--optimizer.lr",
            "0.01",
        ]
        check(run_warm("cpu.yaml", "sft", *options(inputs, tmp_path, *name)))
        losses = [
            m["loss"] for m in read_metrics(tmp_path / precision / "metrics.jsonl") if "loss" in m
        ]
        assert losses[-1] < losses[0] - 0.5, precision
        dtype = json.loads((tmp_path / precision / "final" / "config.json").read_text())["dtype"]
        assert dtype == ("bfloat16" if precision == "bf16-pure" else "float32")


def no_assistant(path: Path) -> Path:
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    return path


def not_json(path: Path) -> Path:
    write_rows(path, 3)
    path.write_text(path.read_text() + "{broken\n")
    return path


def empty(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.batchsize", "3"], "Did you mean --train.batch_size?"),
        (["--learning_rate", "3"], "Did you mean --optimizer.lr?"),
        (["--train.batch_size", "0"], "number of groups >= 1; got 0"),
        (["--train.precision", "fp16"], "needs a CUDA device"),
        (["--loss", "posttrain.losses.sft.sfd"], "--loss is a function of"),
        (["--loss_options.agregation", "x"], "Did you mean aggregation?"),
        (["--packing.max_tokens", "10"], "Raise --packing.max_tokens"),
        (["--packing.backend", "flex"], "needs CUDA"),
        (["--optimizer.schedule", "cosin"], "cosin"),
        (["--data.train", "[no/such/place/rows.jsonl]"], "no/such/place/rows.jsonl"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, inputs, arguments, message):
    result = run_warm("cpu.yaml", "sft", *options(inputs, tmp_path, *arguments))
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr, (
        result.stderr[-1500:]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [(empty, "empty"), (no_assistant, "rows.jsonl:1"), (not_json, "rows.jsonl:4")],
)
def test_bad_rows_are_named(tmp_path, inputs, make, message):
    rows = make(tmp_path / "rows.jsonl")
    result = run_warm("cpu.yaml", "sft", *options((inputs[0], rows), tmp_path))
    assert result.returncode != 0 and message in " ".join(result.stderr.split())


def test_models_that_cannot_be_trained_are_refused(tmp_path, inputs):
    """A tokenizer with more ids than the embedding has rows; a folder with pickle weights only."""
    bigger = byte_tokenizer()
    bigger.add_tokens(["<one>", "<two>"])
    bigger.save_pretrained(tmp_path / "bigger")
    result = run_warm(
        "cpu.yaml",
        "sft",
        *options(inputs, tmp_path, "--model.tokenizer", str(tmp_path / "bigger")),
    )
    assert result.returncode != 0 and "2 tokens have no row" in " ".join(result.stderr.split())
    pickled = model_folder(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    result = run_warm("cpu.yaml", "sft", *options((pickled, inputs[1]), tmp_path))
    assert result.returncode != 0 and "pickle only" in " ".join(result.stderr.split())


def test_an_unwritable_output_folder_is_said_before_training(tmp_path, inputs):
    (tmp_path / "file").write_text("")
    result = run_warm(
        "cpu.yaml",
        "sft",
        *options(inputs, tmp_path, "--train.run_dir", str(tmp_path / "file" / "runs")),
    )
    assert result.returncode != 0 and "cannot be written" in " ".join(result.stderr.split())
    assert "step 1" not in result.stdout


def test_a_diverging_run_stops_before_the_optimizer_and_names_where(tmp_path, inputs):
    result = run_warm(
        "cpu.yaml",
        "sft",
        *options(
            inputs,
            tmp_path,
            "--optimizer.lr",
            "1e30",
            "--optimizer.max_grad_norm",
            "0",
            "--train.save_every",
            "1",
        ),
    )
    text = " ".join(result.stderr.split())
    assert (
        result.returncode != 0 and "stopped before the optimizer" in text and "rows.jsonl:" in text
    )
    assert "the last checkpoint is intact" in text


def test_two_processes_train_the_same_model_as_one(tmp_path, inputs):
    from safetensors.torch import load_file

    for launch in ("cpu.yaml", "cpu2.yaml"):
        arguments = options(
            inputs,
            tmp_path,
            "--train.name",
            launch,
            "--train.precision",
            "fp32",
            "--optimizer.lr",
            "1e-3",
        )
        check(run_warm(launch, "sft", *arguments))
    one, two = (
        load_file(tmp_path / launch / "final" / "model.safetensors")
        for launch in ("cpu.yaml", "cpu2.yaml")
    )
    base = load_file(inputs[0] / "model.safetensors")
    for name in one:
        moved = float((one[name] - base[name]).norm())
        assert float((one[name] - two[name]).norm()) <= 1e-2 * moved + 1e-7, name
