"""`posttrain sft|dpo|reward|rl|distill` and the recipes to copy: the command that is shown, shipped
settings by name, one line where something is wrong."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from posttrain.cli.train import TRAINERS, num_gpus
from posttrain.resolve import shipped
from posttrain.training.metrics import TIMING_KEYS, read_metrics
from tests.e2e.launching import REPO, check, environment, posttrain, posttrain_warm, run_warm
from tests.tiny import model_folder

ROWS = {
    "sft": [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(12)],
    "dpo": [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no"} for i in range(12)],
    "rl": [{"prompt": f"say {i}", "answer": f"{i}"} for i in range(12)],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model_folder(folder / "model")
    model_folder(folder / "teacher", seed=1)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(inputs, run_dir, method):
    rows = {"reward": "dpo", "distill": "rl"}.get(method, method)
    options = {
        "--model.name": inputs / "model",
        "--data.train": f"[{inputs / rows}.jsonl]",
        "--train.run_dir": run_dir,
        "--train.name": method,
        "--train.max_steps": 2,
        "--train.batch_size": 4,
        "--train.precision": "fp32",
        "--packing.max_tokens": 300,
        "--optimizer.lr": "1e-3",
    }
    if method in ("rl", "distill"):
        options |= {
            "--sampling.max_tokens": 4,
            "--rollout.group_size": 2,
            "--rewards.functions": "{repetition_penalty: 1.0}",
        }
    if method == "distill":
        options["--teachers"] = f"[{{model: {inputs / 'teacher'}}}]"
    return [str(part) for pair in options.items() for part in pair]


@pytest.mark.parametrize("method", TRAINERS)
def test_a_recipe_with_its_method_written_out_is_the_command(inputs, tmp_path, method):
    """The same losses to the last bit, or (written in another order) to float32's rounding."""
    check(run_warm("cpu.yaml", method, *settings(inputs, tmp_path / "command", method)))
    check(run_warm("cpu.yaml", f"recipes/{method}.py", *settings(inputs, tmp_path / "own", method)))
    ours, theirs = (
        [m["loss"] for m in read_metrics(tmp_path / w / method / "metrics.jsonl") if "loss" in m]
        for w in ("command", "own")
    )
    assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_a_recipe_refuses_the_option_that_its_function_replaces(inputs, tmp_path):
    for script, option in (("dpo", "--loss=ipo"), ("rl", "--algorithm=dapo")):
        result = run_warm(
            "cpu.yaml", f"recipes/{script}.py", *settings(inputs, tmp_path, script), option
        )
        assert result.returncode == 2 and "is given in Python" in result.stderr


def test_the_command_is_shown_and_can_be_pasted(inputs, tmp_path):
    """A real launch; what it printed, typed into a shell, is the same run: complete. Nothing but
    posttrain speaks: nothing is on stderr, which is no terminal."""
    arguments = settings(inputs, tmp_path, "sft")
    first = check(posttrain("sft", *arguments))
    assert first.stderr == "" and "[WARNING]" not in first.stdout
    assert "step 2/2  loss " in first.stdout and "\x1b" not in first.stdout
    shown = next(line for line in first.stdout.splitlines() if line.startswith("$ "))
    assert shown.startswith("$ accelerate launch") and "-m posttrain.cli.train sft" in shown
    command = shlex.split(shown.removeprefix("$ accelerate"))
    again = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command],
        env=environment(),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0 and "the run is complete (step 2 of 2)" in again.stderr
    lines = read_metrics(tmp_path / "sft" / "metrics.jsonl", drop=TIMING_KEYS)
    assert [m["step"] for m in lines if "loss" in m] == [1, 2]


def test_a_mistake_is_one_line_without_a_trace(inputs, tmp_path):
    result = posttrain("sft", *settings(inputs, tmp_path, "sft"), "--optimizer.lrr", "1")
    assert result.returncode != 0
    assert "Did you mean --optimizer.lr?" in result.stderr and "Traceback" not in result.stderr


def test_shipped_settings_by_name(tmp_path):
    assert "dpo, 134.52 M parameters" in check(posttrain_warm("plan", "dpo_smollm2")).stdout
    wrong = posttrain_warm("sft", "--config", "sft_smolm2")
    assert wrong.returncode == 2 and "Did you mean sft_smollm2?" in wrong.stderr
    assert "one of cpu, cpu2, ddp" in posttrain_warm("sft", "--launch", "nothing").stderr
    listed = check(posttrain_warm("recipes")).stdout
    for folder in ("recipes/configs", "launch"):
        for path in shipped(folder).glob("*.yaml"):
            assert path.stem in listed
    check(posttrain_warm("recipes", "--copy", str(tmp_path / "mine")))
    assert (tmp_path / "mine" / "recipes" / "rl.py").exists()
    assert (tmp_path / "mine" / "launch" / "cpu.yaml").exists()
    assert posttrain_warm("recipes", "--copy", str(tmp_path / "mine")).returncode == 2


def test_the_help_has_every_setting_with_its_text():
    text = check(posttrain_warm("dpo", "--help")).stdout
    for part in (
        "--launch FILE|NAME",
        "--beta",
        "--reference.cache",
        "dpo_smollm2",
        "--train.resume",
    ):
        assert part in text


def test_gpus_are_counted_without_torch(monkeypatch):
    for visible, count in (("", 0), ("0", 1), ("0,3,5", 3), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert num_gpus() == count
