"""SFTTrainer from Python: a custom loss, rows or groups in memory, and settings that would be
ignored."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import (
    Completion,
    DataConfig,
    DPOConfig,
    DPOTrainer,
    Logps,
    LossOutput,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    PromptGroup,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    TrainConfig,
)
from posttrain.losses.sft import sft
from posttrain.training.config import resolve_loss
from posttrain.training.metrics import ModelFlops, model_flops, read_metrics
from posttrain.types import as_loss
from tests.helpers import random_groups, tiny_llama
from tests.tiny import model_folder

ROWS = [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(5) for b in range(5)]


def config(tmp_path, **train) -> SFTConfig:
    settings = dict(run_dir=str(tmp_path), max_steps=2, batch_size=4, precision="fp32") | train
    return SFTConfig(
        train=TrainConfig(**settings),
        optimizer=OptimizerConfig(lr=1e-3),
        packing=PackingConfig(max_tokens=300),
    )


def focal(logps: Logps, *, gamma: float = 2.0) -> LossOutput:
    """-(1 - p)^gamma log p. Lin et al. 2017, arXiv:1708.02002 eq. 5."""
    p_T = logps.logps_T.exp()
    return LossOutput(items=-((1 - p_T) ** gamma) * logps.logps_T, metrics={"p": p_T.detach()})


def test_a_custom_loss_trains_and_reports_its_metrics(tmp_path):
    folder = model_folder(tmp_path / "model")
    result = SFTTrainer(
        model=str(folder), train_dataset=ROWS, config=config(tmp_path), loss=focal
    ).train()
    steps = [m for m in read_metrics(result.folder / "metrics.jsonl") if "loss" in m]
    assert len(steps) == 2 and all(0 < m["p"] < 1 for m in steps)
    nll = -math.log(steps[0]["p"])
    assert steps[0]["loss"] == pytest.approx((1 - steps[0]["p"]) ** 2 * nll, rel=0.05), (
        "all tokens are about as likely at the start"
    )


def test_a_loaded_model_and_groups_of_several_completions(tmp_path):
    folder = model_folder(tmp_path / "model")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    stop = Completion(token_ids=[tokenizer.eos_token_id], loss_mask=[1])
    groups = [*random_groups(6, sizes=(3,)), PromptGroup(prompt_ids=[5], completions=[stop])]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=groups,
        eval_dataset=groups[:2],
        config=config(tmp_path),
    ).train()
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_loss_by_dotted_path_keeps_its_declaration_and_checks_its_options():
    assert resolve_loss("posttrain.losses.sft.sft", {}) is sft
    loss = resolve_loss("posttrain.losses.sft.sft", {"aggregation": "sequence_mean"})
    assert not loss.couples_completions and as_loss(focal).couples_completions
    with pytest.raises(
        ValueError, match=r"has no option 'gama'; it has \['gamma'\]. Did you mean gamma"
    ):
        resolve_loss("tests.unit.test_trainer.focal", {"gama": 1.0})


def test_a_loss_in_the_folder_one_starts_in_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_losses_here.py").write_text(
        "def mine(logps, *, weight=1.0):\n    return weight\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert resolve_loss("my_losses_here.mine", {"weight": 2.0})(None) == 2.0


def test_settings_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs its tokenizer too"):
        SFTTrainer(model=tiny_llama(), train_dataset=ROWS)
    with pytest.raises(ValueError, match="eval_dataset without train_dataset"):
        SFTTrainer(model="x", eval_dataset=ROWS)
    with pytest.raises(ValueError, match="data.train beside train_dataset"):
        SFTTrainer(
            model="x", train_dataset=ROWS, config=SFTConfig(data=DataConfig(train=["a.jsonl"]))
        )
    with pytest.raises(ValueError, match="beside a loaded model"):
        SFTTrainer(
            model=tiny_llama(),
            tokenizer=object(),
            train_dataset=ROWS,
            config=SFTConfig(model=ModelConfig(gradient_checkpointing=True)),
        )
    with pytest.raises(ValueError, match="focal has no option 'aggregation'; it has gamma"):
        SFTTrainer(
            model="x", loss=focal, config=SFTConfig(loss_options={"aggregation": "sequence_mean"})
        )
    with pytest.raises(ValueError, match="are two models; give one"):
        SFTTrainer("a", SFTConfig(model=ModelConfig(name="b")))
    with pytest.raises(ValueError, match="args is config by another name"):
        SFTTrainer("a", SFTConfig(), config=SFTConfig())
    with pytest.raises(ValueError, match="beta is set twice"):
        DPOTrainer("a", DPOConfig(beta=0.1, loss_options={"beta": 0.2}))
    with pytest.raises(ValueError, match="bradley_terry has no option 'beta'"):
        RewardTrainer("a", RewardConfig(loss_options={"beta": 0.2}))


def test_untrained_stop_tokens_are_refused_for_groups_too(tmp_path):
    folder = model_folder(tmp_path / "model")
    groups = [
        PromptGroup(prompt_ids=[5, 6], completions=[Completion(token_ids=[7, 8], loss_mask=[1, 1])])
    ] * 8
    with pytest.raises(ValueError, match="No stop token is ever trained"):
        SFTTrainer(model=str(folder), train_dataset=groups, config=config(tmp_path)).train()


def test_a_finished_run_starts_again_without_training(tmp_path):
    folder = model_folder(tmp_path / "model")
    first = SFTTrainer(model=str(folder), train_dataset=ROWS, config=config(tmp_path)).train()
    weights = (first.final / "model.safetensors").read_bytes()
    again = SFTTrainer(model=str(folder), train_dataset=ROWS, config=config(tmp_path)).train()
    assert (again.final / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="train.resume is never"):
        SFTTrainer(
            model=str(folder), train_dataset=ROWS, config=config(tmp_path, resume="never")
        ).train()


def test_a_model_loaded_in_bf16_is_refused_where_float32_masters_are_promised(tmp_path):
    folder = model_folder(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    trainer = SFTTrainer(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        train_dataset=ROWS,
        config=config(tmp_path),
    )
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        trainer.train()


def test_fewer_steps_than_done_are_refused(tmp_path):
    folder = model_folder(tmp_path / "model")
    first = SFTTrainer(
        model=str(folder), train_dataset=ROWS, config=config(tmp_path, max_steps=3)
    ).train()
    again = SFTTrainer(
        model=str(folder), train_dataset=ROWS, config=config(tmp_path, max_steps=3)
    ).train()
    assert again.metrics["loss"] == first.metrics["loss"]
    with pytest.raises(ValueError, match="at step 3, past the 2 steps"):
        SFTTrainer(
            model=str(folder), train_dataset=ROWS, config=config(tmp_path, max_steps=2)
        ).train()


def test_every_group_is_trained_in_an_epoch_and_repeats_are_refused():
    assert TrainConfig(batch_size=13).num_steps(25) == 2
    with pytest.raises(ValueError, match="more than the 10 groups"):
        TrainConfig(batch_size=64).num_steps(10)


def test_flops_are_six_per_weight_and_token_plus_attention():
    """Llama of known sizes, counted by hand."""
    from posttrain.packing.batch import Layout

    flops = model_flops(tiny_llama())
    per_layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert flops == ModelFlops(
        layer_weights=2 * per_layer,
        trainable_layer_weights=2 * per_layer,
        head_weights=97 * 32,
        trainable_head_weights=97 * 32,
        attention_width=2 * 32,
    )
    layout = Layout(lengths=(3, 2), prefixes=(-1, 0))
    pairs = (1 + 2 + 3) + (4 + 5)
    assert (
        flops.step(layout, num_trained=2)
        == 6 * 2 * per_layer * 5 + 6 * 97 * 32 * 2 + 12 * 64 * pairs
    )


def test_the_default_model_config_is_the_embedded_model():
    assert ModelConfig().name == "smollm2-135m"
