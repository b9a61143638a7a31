"""Runs that would train nothing, or something else, end before their first step and say why."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from posttrain import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
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
from posttrain.data import DataConfig, groups_from_rows
from posttrain.training.forward import ForwardPlan, batch_mean
from posttrain.training.metrics import read_metrics
from posttrain.types import Completion, PromptGroup
from tests.tiny import byte_tokenizer, model_folder

pytestmark = pytest.mark.usefixtures("no_measurement")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


def config_of(kind, folder, tmp_path, *, steps=2, batch_size=4, name="run", **more):
    train = TrainConfig(
        run_dir=str(tmp_path),
        name=name,
        batch_size=batch_size,
        max_steps=steps,
        precision="fp32",
        save_every=1,
    )
    known = {"model": ModelConfig(name=str(folder)), "packing": PackingConfig(max_tokens=300)}
    return kind(**known | more, train=train, optimizer=OptimizerConfig(lr=1e-3))


def labelled(n, prompts=4):
    return [
        {"prompt": f"fruit {i % prompts}?", "completion": f"pear {i}", "label": i % 2 == 0}
        for i in range(n)
    ]


def pairs(n):
    return [
        {"prompt": f"fruit {i}?", "chosen": f"pear {i}", "rejected": f"brick {i}"} for i in range(n)
    ]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_a_reward_model_is_not_trained_on_labelled_answers(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"<memory>:1: labelled rows are no reward data.*`posttrain prep pairs`"
    ):
        RewardTrainer(
            train_dataset=labelled(8), config=config_of(RewardConfig, folder, tmp_path)
        ).train()
    groups = groups_from_rows(labelled(8), byte_tokenizer(), purpose="preference")
    with pytest.raises(
        ValueError,
        match=r"a reward model learns from compared answers, but 8 of 8 groups have none \(8 of them have labels",
    ):
        RewardTrainer(
            train_dataset=groups, config=config_of(RewardConfig, folder, tmp_path)
        ).train()
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_two_kinds_of_feedback_in_one_run_are_counted_over_all_rows(folder, tmp_path, loss):
    """The first row is of the right kind, and so are most."""
    sources = [
        jsonl(tmp_path / "pairs.jsonl", pairs(9 if loss == "dpo" else 2)),
        jsonl(tmp_path / "labelled.jsonl", labelled(2 if loss == "dpo" else 9)),
    ]
    data = DataConfig(
        train=sources if loss == "dpo" else sources[::-1],
        cache_dir=str(tmp_path / "cache"),
        overlong="drop",
    )
    what = "compared answers, but 2 of 11 groups have none (2 of them have labels instead)"
    if loss == "kto":
        what = "labelled answers, but 2 of 11 groups have none (2 of them have pairs instead)"
    with pytest.raises(ValueError) as caught:
        DPOTrainer(config=config_of(DPOConfig, folder, tmp_path, loss=loss, data=data)).train()
    assert what in str(
        caught.value
    ) and f"{'labelled' if loss == 'dpo' else 'pairs'}.jsonl:1" in str(caught.value)


def test_groups_without_a_pair_are_named(folder, tmp_path):
    made = groups_from_rows(pairs(6), byte_tokenizer(), purpose="preference")
    made[4] = replace(made[4], pairs=[replace(made[4].pairs[0], weight=0.0)])
    with pytest.raises(
        ValueError, match=r"1 of 6 groups have none \(0 of them.*the first <memory>:5"
    ):
        DPOTrainer(train_dataset=made, config=config_of(DPOConfig, folder, tmp_path)).train()


def test_kto_batches_of_one_prompt_have_a_reference_point_of_0_and_are_counted_before_the_first_step(
    folder, tmp_path, caplog
):
    rows = [
        {"prompt": f"fruit {p}?", "completion": f"pear {p} {k}", "label": k % 2 == 0}
        for p in range(4)
        for k in range(4)
    ]
    with caplog.at_level(logging.WARNING):
        DPOTrainer(
            train_dataset=rows,
            config=config_of(DPOConfig, folder, tmp_path, loss="kto", batch_size=2, steps=24),
        ).train()
    (said,) = [r.getMessage() for r in caplog.records if "belong to one prompt" in r.getMessage()]
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in m]
    lone = int(said.split()[1])
    assert (
        len(steps) == 24
        and 0 < lone < 24
        and said.startswith(f"in {lone} of 24 steps all 2 answers")
    )
    assert sum(m["kl_estimate_nats"] == 0 for m in steps) >= lone
    with pytest.raises(
        ValueError,
        match=r"no batch of 1 has two different prompts \(4 in the data\). Raise --train.batch_size",
    ):
        DPOTrainer(
            train_dataset=rows,
            config=config_of(DPOConfig, folder, tmp_path, loss="kto", batch_size=1, name="one"),
        ).train()


def test_a_batch_statistic_of_no_items_is_0():
    from accelerate import Accelerator

    from posttrain.losses.preference import kto
    from posttrain.models.policy import Policy
    from posttrain.packing.plan import PackingConfig
    from tests.helpers import tiny_llama

    group = PromptGroup(
        prompt_ids=[1, 2],
        completions=[Completion(token_ids=[3], loss_mask=[1], columns={"label": 1})],
    )
    plan = ForwardPlan(accelerator=Accelerator(cpu=True), mode="shared", max_tokens=100)
    assert (
        float(batch_mean(plan, Policy(tiny_llama(), PackingConfig()), None, kto, [group, group]))
        == 0.0
    )


def sft(rows, folder, tmp_path, steps, **options):
    SFTTrainer(
        train_dataset=rows, config=config_of(SFTConfig, folder, tmp_path, steps=steps, **options)
    ).train()


def from_files(rows, folder, tmp_path, steps):
    data = DataConfig(
        train=[jsonl(tmp_path / "rows.jsonl", rows)], cache_dir=str(tmp_path / "cache")
    )
    SFTTrainer(config=config_of(SFTConfig, folder, tmp_path, steps=steps, data=data)).train()


def length(completion, sample):
    return float(len(completion) % 3)


def rl(rows, folder, tmp_path, steps):
    rows = [{"prompt": r["prompt"], "answer": r["completion"]} for r in rows]
    more = {
        "algorithm_options": {"beta": 0.0},
        "sampling": SamplingConfig(max_tokens=4),
        "rollout": RolloutConfig(group_size=2, show_every=0),
    }
    config = config_of(RLConfig, folder, tmp_path, steps=steps, batch_size=2, **more)
    RLTrainer(train_dataset=rows, rewards={length: 1.0}, config=config).train()


@pytest.mark.parametrize("train", [sft, from_files, rl])
def test_a_run_is_not_continued_on_other_data(folder, tmp_path, train):
    """One of forty rows was edited, or their order; the same data go on."""
    rows = [{"prompt": f"count {i}", "completion": f"it is {i}"} for i in range(40)]
    train(rows, folder, tmp_path, 1)
    edited = [
        [*rows[:at], {**rows[at], "completion": "it is wrong"}, *rows[at + 1 :]]
        for at in (0, 37, 38, 39)
    ]
    for other in (*edited, rows[::-1]):
        with pytest.raises(
            ValueError,
            match=r"holds another run, at step 1.*data: rows.*set another --train.name.*--train.resume restart",
        ):
            train(other, folder, tmp_path, 2)
    train(rows, folder, tmp_path, 2)
    assert [
        m["step"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in m
    ] == [1, 2]
