"""FSDP2 and DeepSpeed ZeRO-1, 2, 3 through real two-process launches: the numbers of one process,
resumed bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from posttrain.training.metrics import TIMING_KEYS, read_metrics
from tests.e2e.launching import check, run, run_warm
from tests.e2e.sharded_script import relative
from tests.tiny import model_folder

LAUNCH = {
    "zero1": "zero_cpu2.yaml --zero_stage 1",
    "zero2": "zero_cpu2.yaml --zero_stage 2",
    "zero3": "zero_cpu2.yaml",
    "fsdp2": "fsdp_cpu2.yaml",
}


@pytest.mark.parametrize("kind", LAUNCH)
def test_three_updates_are_those_of_one_process(tmp_path, kind):
    """Clipped AdamW with decay against torch's own on one sequence at a time: float64 under FSDP2,
    fp32 masters under DeepSpeed.

    The first use of DeepSpeed on a machine compiles an extension (1-2 minutes).
    """
    out = tmp_path / "results.json"
    precise = kind == "fsdp2"
    start = run if kind in ("zero3", "fsdp2") else run_warm
    check(
        start(
            LAUNCH[kind],
            "tests/e2e/sharded_script.py",
            str(out),
            "float64" if precise else "float32",
            timeout_s=600,
        )
    )
    results = json.loads(out.read_text())
    assert len(results) == 8 and {r["kind"] for r in results} == {kind}
    worst = max(results, key=lambda r: max(r["errors"]))
    assert max(worst["errors"]) < (1e-10 if precise else 1e-5), worst
    assert all(r["all_stop"] for r in results), (
        "a gradient that is not finite on one rank stops all"
    )
    for result in results:
        for rank, states in enumerate(result["states"]):
            check_states(kind, rank, result["parameters"], states)
    shapes = {tuple(sorted(r["micro_batches"])) for r in results}
    assert (
        any(0 in shape for shape in shapes)
        and any(0 < a < b for a, b in shapes)
        and any(r["coupled"] for r in results)
    )


@pytest.mark.parametrize("kind", LAUNCH)
def test_the_largest_rank_holds_what_the_planner_says(inputs, tmp_path, kind):
    """To the byte, bf16, policies (SFT, DPO, RL) and reward models, whole and with adapters."""
    out = tmp_path / "states.json"
    check(
        run_warm(
            LAUNCH[kind],
            "tests/e2e/states_script.py",
            str(inputs[0]),
            str(out),
            "bf16",
            timeout_s=600,
        )
    )
    results = json.loads(out.read_text())
    assert len(results) == 4 and {r["kind"] for r in results} == {kind}
    for result in results:
        for item, predicted in result["predicted"].items():
            largest, other = sorted((rank[item] for rank in result["measured"]), reverse=True)
            assert largest == predicted, (result["case"], item, largest, predicted)
            if kind == "fsdp2" and item == "moments":  # its parts are of whole rows, unpadded
                assert largest + other == 2 * 4 * result["trained"], (
                    result["case"],
                    largest,
                    other,
                )
            else:
                assert largest == other, (result["case"], item)
    assert (
        kind != "zero3"
        or results[0]["measured"][0]["buckets"] == 2 * results[0]["predicted"]["master"]
    ), "two of bf16"
    for result in results:  # ZeRO-3 keeps what it gathered, up to 1e9 elements (training/sharding.py); frozen ones not all
        whole, every = result["gathered"], result["parameters"] if kind == "zero3" else 0
        assert 2 * every / 3 <= whole <= every and (whole == every or result["case"][1])


def check_states(kind: str, rank: int, shapes: list[list[int]], states: dict[str, int]) -> None:
    """To the byte: FSDP2 cuts rows (float64 here) and pads its storage, ZeRO-3 cuts every
    parameter, ZeRO-1 and 2 a flat buffer."""
    rows = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    if kind == "fsdp2":
        part = 8 * sum(-(-n // 2) * width for n, width in rows)
        mine = 8 * sum((-(-n // 2) if rank == 0 else n // 2) * width for n, width in rows)
        assert states == {
            "weights": part,
            "gradients": part,
            "master": 0,
            "moments": 2 * mine,
            "counters": 4 * len(shapes),
            "buckets": 0,
        }
        return
    part = 4 * sum(-(-n * width // 2) for n, width in rows)
    assert states["master"] == part and states["moments"] == 2 * part
    assert states["weights"] == (part if kind == "zero3" else 2 * part)
    # the flat cut falls inside a parameter, whose whole gradient both ranks keep
    assert (
        states["gradients"] == part if kind == "zero3" else part <= states["gradients"] <= 2 * part
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model and pairs: the answer that counts on is better than the one that repeats."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = []
    for i in range(48):
        start = i % 6
        up, same = "".join(str(start + k) for k in range(4)), str(start) * (3 + i % 3)
        turns = {"prompt": f"count from {start}, {i * 37 % 1000}", "chosen": up, "rejected": same}
        rows.append(
            {
                k: [{"role": "user" if k == "prompt" else "assistant", "content": v}]
                for k, v in turns.items()
            }
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return model_folder(folder / "model"), folder / "pairs.jsonl"


def settings(inputs, run_dir: Path, name: str, *more: str) -> list[str]:
    return [
        "--model.name",
        str(inputs[0]),
        "--data.train",
        f"[{inputs[1]}]",
        "--data.cache_dir",
        str(run_dir / "data"),
        "--train.run_dir",
        str(run_dir),
        "--train.name",
        name,
        "--train.batch_size",
        "8",
        "--train.max_steps",
        "4",
        "--optimizer.lr",
        "3e-3",
        "--optimizer.eps",
        "1e-4",
        "--optimizer.weight_decay",
        "0.1",
        "--packing.max_tokens",
        "150",
        "--train.precision",
        "fp32",
        *more,
    ]


RECIPES = {
    "dpo": (
        "dpo",
        ["--reference.sync_every", "2", "--train.save_every", "2", "--data.eval_fraction", "0.2"],
    ),
    "lora": ("dpo", ["--model.lora.rank", "4", "--optimizer.lr", "2e-2"]),
    "reward": ("reward", ["--loss_options.centering", "0.01"]),
}


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Path:
    """Every recipe by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, (script, more) in RECIPES.items():
        check(run_warm("cpu.yaml", script, *settings(inputs, folder, name, *more)))
    return folder


def steps_of(folder: Path) -> list[dict]:
    return [m for m in read_metrics(folder / "metrics.jsonl", drop=TIMING_KEYS) if "grad_norm" in m]


def assert_same_run(folder: Path, other: Path) -> None:
    """Losses, gradient norms, held-out figures and final weights agree up to rounding."""
    for a, b in zip(
        read_metrics(folder / "metrics.jsonl"), read_metrics(other / "metrics.jsonl"), strict=True
    ):
        for name in ("loss", "grad_norm", "eval_loss", "rewards_eval/margins"):
            assert (name in a) == (name in b) and a.get(name, 0) == pytest.approx(
                b.get(name, 0), rel=1e-4, abs=1e-6
            ), (
                name,
                a,
                b,
            )
    (weights,) = (folder / "final").glob("*model.safetensors")
    mine, theirs = load_file(weights), load_file(other / "final" / weights.name)
    assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    assert relative(mine, theirs) < 1e-4


@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp2"])
def test_dpo_with_a_moving_reference_is_the_run_of_one_process_and_resumes_bit_for_bit(
    inputs, alone, tmp_path, kind
):
    from transformers import AutoModelForCausalLM

    script, more = RECIPES["dpo"]
    check(run_warm(LAUNCH[kind], script, *settings(inputs, tmp_path, "whole", *more)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert_same_run(whole, alone / "dpo")
    model, report = AutoModelForCausalLM.from_pretrained(whole / "final", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before = dict(AutoModelForCausalLM.from_pretrained(inputs[0]).named_parameters())
    assert relative(dict(model.named_parameters()), before) > 0.01
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "step_4")
    resumed = check(run_warm(LAUNCH[kind], script, *settings(inputs, tmp_path, "cut", *more)))
    assert "step_2" in resumed.stderr
    assert (whole / "final" / "model.safetensors").read_bytes() == (
        cut / "final" / "model.safetensors"
    ).read_bytes()
    assert steps_of(whole) == steps_of(cut)


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
@pytest.mark.parametrize("recipe", ["lora", "reward"])
def test_adapters_and_reward_models_are_those_of_one_process(inputs, alone, tmp_path, kind, recipe):
    script, more = RECIPES[recipe]
    check(run_warm(LAUNCH[kind], script, *settings(inputs, tmp_path, recipe, *more)))
    assert_same_run(tmp_path / recipe, alone / recipe)
    final = tmp_path / recipe / "final"
    if recipe == "lora":
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(final)
        assert any(
            float(p.detach().abs().max()) > 0 for n, p in model.named_parameters() if "lora_B" in n
        )
    else:
        from transformers import AutoModelForSequenceClassification

        model, report = AutoModelForSequenceClassification.from_pretrained(
            final, output_loading_info=True
        )
        assert not report["missing_keys"] and model.score.weight.shape == (1, 32)


def test_reinforcement_learning_under_zero2_is_that_of_one_process(inputs, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}?"}) + "\n" for a in range(24))
    )
    for name, launch in (("one", "cpu.yaml"), ("zero2", LAUNCH["zero2"])):
        arguments = [
            "--model.name",
            str(inputs[0]),
            "--data.train",
            f"[{tmp_path / 'rows.jsonl'}]",
            "--train.run_dir",
            str(tmp_path),
            "--train.name",
            name,
            "--train.batch_size",
            "4",
            "--train.max_steps",
            "4",
            "--rollout.group_size",
            "4",
            "--sampling.max_tokens",
            "3",
            "--optimizer.lr",
            "1e-3",
            "--optimizer.eps",
            "1e-4",
            "--train.precision",
            "fp32",
            "--rewards.functions",
            json.dumps({"tests.reward_functions.starts_with_digit": 1.0}),
        ]
        check(run_warm(launch, "rl", *arguments))
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "zero2")
    assert [s["reward"] for s in one] == [s["reward"] for s in two] and len(
        {s["reward"] for s in one}
    ) > 1
    assert_same_run(tmp_path / "zero2", tmp_path / "one")
