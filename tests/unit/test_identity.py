"""A run is continued only by itself: whatever decides its weights and differs is an error that names
it; what decides none is no difference."""

from __future__ import annotations

import importlib
import linecache
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from posttrain import (
    DPOConfig,
    DPOTrainer,
    LossOutput,
    OptimizerConfig,
    PackingConfig,
    RewardsConfig,
    RLConfig,
    RLTrainer,
    RolloutConfig,
    SamplingConfig,
    SFTConfig,
    SFTTrainer,
    TrainConfig,
    loss,
)
from posttrain.rl.algorithms import ALGORITHMS, GRPO
from posttrain.training.identity import code_digest, sampled_weights_digest, source_digest
from posttrain.training.metrics import read_metrics
from tests.helpers import tiny_llama
from tests.tiny import model_folder

ROWS = [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(4) for b in range(4)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "?"} for r in ROWS]
FACTOR = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(model_folder(tmp_path_factory.mktemp("model") / "tiny"))


def settings(tmp_path, kind=SFTConfig, *, train=None, optimizer=None, **more):
    own = dict(run_dir=str(tmp_path), name="run", max_steps=1, batch_size=4, precision="fp32")
    return kind(
        train=TrainConfig(**own | (train or {})),
        optimizer=OptimizerConfig(**{"lr": 1e-3} | (optimizer or {})),
        packing=PackingConfig(max_tokens=300),
        **more,
    )


def plain(logps):
    return LossOutput(items=-FACTOR * logps.logps_T)


def doubled(logps):
    return LossOutput(items=-2 * FACTOR * logps.logps_T)


def test_each_thing_that_decides_the_weights_of_sft_is_named(folder, tmp_path, monkeypatch):
    def train(model=folder, rows=ROWS, loss=plain, **more):
        return SFTTrainer(model, settings(tmp_path, **more), train_dataset=rows, loss=loss).train()

    first = train()
    other = model_folder(tmp_path / "other", seed=1)
    for name, change in {
        "data": {"rows": ROWS[:-1] + [{"prompt": "9", "completion": "9"}]},
        "loss": {"loss": doubled},
        "model": {"model": str(other)},
        "optimizer.lr 0.001 -> 0.002": {"optimizer": {"lr": 2e-3}},
        "train.seed 0 -> 1": {"train": {"seed": 1}},
        "train.batch_size 4 -> 2": {"train": {"batch_size": 2}},
        "model.dropout None -> False": {
            "config_of_model": False,
        },
    }.items():
        if "config_of_model" in change:
            changed = settings(tmp_path)
            changed = replace(changed, model=replace(changed.model, dropout=False))
            again = SFTTrainer(folder, changed, train_dataset=ROWS, loss=plain).train
        else:
            again = lambda change=change: train(**change)  # noqa: E731
        with pytest.raises(ValueError, match=f"holds another run, at step 1.*{name}") as error:
            again()
        assert "--train.resume restart" in str(error.value), "it says what to type"
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.raises(ValueError, match="this differs: loss"):
        train()
    monkeypatch.undo()
    weights = (first.final / "model.safetensors").read_bytes()
    assert (train().final / "model.safetensors").read_bytes() == weights, "the same run is complete"


def test_what_decides_no_weight_is_no_difference(folder, tmp_path, caplog):
    """More steps, other cadence, a moved copy of the model, another token budget."""
    SFTTrainer(folder, settings(tmp_path), train_dataset=ROWS).train()
    moved = model_folder(tmp_path / "moved")
    config = settings(
        tmp_path,
        train={
            "max_steps": 3,
            "save_every": 1,
            "log_every": 2,
            "save_total_limit": 5,
            "eval_every": 1,
        },
    )
    config = replace(config, packing=PackingConfig(max_tokens=400))
    result = SFTTrainer(str(moved), config, train_dataset=ROWS, eval_dataset=ROWS[:4]).train()
    assert result.step == 3
    assert "not bit-identical: packing.max_tokens 300 -> 400" in caplog.text


def test_a_complete_run_says_so(folder, tmp_path, caplog):
    SFTTrainer(folder, settings(tmp_path), train_dataset=ROWS).train()
    SFTTrainer(folder, settings(tmp_path), train_dataset=ROWS).train()
    assert "the run is complete (step 1 of 1): nothing is trained" in caplog.text


def test_restart_puts_the_old_run_aside_and_trains(folder, tmp_path, capsys):
    for number in (1, 2, 3):
        config = settings(tmp_path, train={"resume": "restart", "seed": number})
        SFTTrainer(folder, config, train_dataset=ROWS).train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]
    seeds = [
        (tmp_path / name / "config.yaml").read_text().count(f"seed: {seed}\n  precision")
        for name, seed in (("run.old-1", 1), ("run.old-2", 2), ("run", 3))
    ]
    assert seeds == [1, 1, 1], "each kept its own settings"
    assert (tmp_path / "run.old-1" / "final" / "model.safetensors").exists()
    assert len([m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in m]) == 1


def test_training_a_trained_model_again_under_one_name_is_refused(folder, tmp_path):
    """The notebook's trap: the cell is run twice, and the model in memory is another by then."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def cell():
        return SFTTrainer(
            model, settings(tmp_path), processing_class=tokenizer, train_dataset=ROWS
        ).train()

    cell()
    with pytest.raises(ValueError, match="model: the weights that training starts from"):
        cell()


def test_beta_and_a_retrained_reference_are_other_dpo_runs(folder, tmp_path):
    reference = model_folder(tmp_path / "reference", seed=1)

    def train(beta=0.1):
        config = settings(tmp_path, DPOConfig, beta=beta)
        config = replace(config, reference=replace(config.reference, model=str(reference)))
        return DPOTrainer(folder, config, train_dataset=PAIRS).train()

    train()
    with pytest.raises(ValueError, match="loss .*; beta 0.1 -> 0.2"):
        train(beta=0.2)
    model_folder(reference, seed=2)
    with pytest.raises(ValueError, match="reference: the weights of the reference model"):
        train()


def reward(completion, sample):
    return float(len(completion) % 3)


def other_reward(completion, sample):
    return float(len(completion) % 2)


def test_algorithm_rewards_and_sampling_are_named_in_rl(folder, tmp_path):
    def train(rewards=reward, algorithm=None, max_tokens=4):
        config = settings(
            tmp_path,
            RLConfig,
            sampling=SamplingConfig(max_tokens=max_tokens),
            rollout=RolloutConfig(group_size=2, show_every=0),
        )
        rows = [{"prompt": r["prompt"], "answer": r["completion"]} for r in ROWS]
        return RLTrainer(
            folder,
            config,
            train_dataset=rows,
            rewards={rewards: 1.0},
            algorithm=algorithm or replace(GRPO, beta=0.0),
        ).train()

    train()
    with pytest.raises(ValueError, match="rewards .digest"):
        train(rewards=other_reward)
    with pytest.raises(ValueError, match="algorithm .digest"):
        train(algorithm=replace(GRPO, beta=0.0, loss_options={"epsilon_high": 0.4}))
    with pytest.raises(ValueError, match="sampling.max_tokens 4 -> 5"):
        train(max_tokens=5)
    assert train().step == 1


def test_a_reward_that_the_settings_name_is_known_by_its_code(folder, tmp_path, monkeypatch):
    """The same dotted name, another body."""
    module = tmp_path / "my_rewards_here.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    def train(at_least):
        module.write_text(f"def digits(completion, sample):\n    return {at_least}.0\n")
        linecache.clearcache()
        sys.modules.pop("my_rewards_here", None)
        importlib.invalidate_caches()
        config = settings(
            tmp_path,
            RLConfig,
            sampling=SamplingConfig(max_tokens=4),
            rollout=RolloutConfig(group_size=2, show_every=0),
            rewards=RewardsConfig(functions={"my_rewards_here.digits": 1.0}),
        )
        rows = [{"prompt": r["prompt"], "answer": r["completion"]} for r in ROWS]
        return RLTrainer(
            folder, config, train_dataset=rows, algorithm=replace(GRPO, beta=0.0)
        ).train()

    train(1)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises(ValueError, match="rewards .digest"):
        train(23)


def test_code_digests_follow_what_the_code_does():
    """Closures, lambdas, constants and helpers of the module, options, declarations."""

    def scaled(by):
        def function(logps):
            return LossOutput(items=-by * logps.logps_T)

        return function

    assert code_digest(scaled(1)) == code_digest(scaled(1)) != code_digest(scaled(2))
    assert code_digest(lambda x: x) != code_digest(lambda x: x + 1)
    assert code_digest(plain) != code_digest(doubled)
    assert code_digest(loss(reference=False)(plain)) != code_digest(loss(reference=True)(plain))
    assert len({code_digest(a) for a in ALGORITHMS.values()}) == len(ALGORITHMS)
    table = np.arange(4.0)
    assert code_digest(scaled(table)) == code_digest(scaled(table.copy()))
    assert code_digest(scaled(table)) != code_digest(scaled(table + 1))
    teacher, twin = tiny_llama(seed=1), tiny_llama(seed=1)
    assert code_digest(scaled(teacher)) == code_digest(scaled(twin))
    with torch.no_grad():
        next(twin.parameters()).mul_(1.001)
    assert code_digest(scaled(teacher)) != code_digest(scaled(twin))
    assert sampled_weights_digest(teacher) != sampled_weights_digest(twin)


def test_a_source_digest_is_of_the_weights(tmp_path):
    one, same = model_folder(tmp_path / "one"), model_folder(tmp_path / "same")
    other = model_folder(tmp_path / "other", seed=1)
    assert source_digest(str(one)) == source_digest(str(same)) != source_digest(str(other))
