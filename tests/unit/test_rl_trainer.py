"""RLTrainer from Python on the tiny model: adapters, the reference that is replaced, and a sampler
that is not the policy."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from posttrain import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ReferenceConfig,
    RLConfig,
    RLTrainer,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)
from posttrain.models.load import load_model, load_tokenizer
from posttrain.rewards.text import think_answer_format
from posttrain.rl.batches import MismatchError
from posttrain.rollout import local
from posttrain.rollout.local import LocalEngine
from posttrain.training.metrics import read_metrics
from tests.tiny import byte_tokenizer, model_folder

pytestmark = pytest.mark.usefixtures("no_measurement")

ROWS = [{"prompt": f"{a}?"} for a in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Larger embeddings than at random: a frozen head can prefer a token, and temperature
    matters."""
    path = model_folder(tmp_path_factory.mktemp("model") / "tiny")
    model = load_model(ModelConfig(name=str(path)), dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)
    model.save_pretrained(path)
    return path


def digit(completion, sample):
    return float(completion[:1].isdigit())


def odd(completion, sample):
    """About half of all completions: every group has a signal."""
    return float(sum(map(ord, completion)) % 2)


def run(
    folder,
    tmp_path,
    *,
    lora=None,
    rollout=None,
    model=None,
    tokenizer=None,
    reward=digit,
    max_tokens=2,
    lr=1e-2,
    steps=5,
    algorithm="grpo",
    options=None,
    reference=None,
):
    """(model, metrics of each step) of a run; without another reward, a digit at the start is worth
    1."""
    source = ModelConfig(name=str(folder), lora=lora or LoraConfig())
    model = model or load_model(source, dtype=torch.float32)
    config = RLConfig(
        algorithm=algorithm,
        algorithm_options=options or {},
        reference=reference or ReferenceConfig(),
        sampling=SamplingConfig(max_tokens=max_tokens),
        rollout=RolloutConfig(**{"group_size": 8, "show_every": 0} | (rollout or {})),
        packing=PackingConfig(max_tokens=400),
        optimizer=OptimizerConfig(lr=lr, schedule="constant", weight_decay=0.0),
        train=TrainConfig(
            run_dir=str(tmp_path), name="run", batch_size=8, max_steps=steps, precision="fp32"
        ),
    )
    tokenizer = tokenizer or load_tokenizer(source)
    trainer = RLTrainer(
        model=model, tokenizer=tokenizer, train_dataset=ROWS, rewards={reward: 1.0}, config=config
    )
    trainer.train()
    return model, [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in m]


def test_dr_grpo_learns_a_bandit_from_chance(folder, tmp_path):
    """Without a division by length or deviation; its constant is the generation budget."""
    _, steps = run(folder, tmp_path, algorithm="dr_grpo", steps=50)
    rewards = [s["reward"] for s in steps]
    assert rewards[0] < 0.25 and statistics.median(rewards[-20:]) > 0.9, rewards


def test_a_reward_for_the_format_alone_makes_every_completion_well_formed(folder, tmp_path):
    """From a model that a few steps of supervised learning brought to some well-formed completions,
    as R1's cold start does.

    Over six seeds and two sets of CPU instructions the median of the last 20 steps was never below
    0.96.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    model = load_model(ModelConfig(name=str(folder)), dtype=torch.float32)
    torch.manual_seed(0)  # for the rows that are new
    model.resize_token_embeddings(len(tokenizer))
    chat = [[{"role": "user", "content": row["prompt"]}] for row in ROWS[10:]]
    prompts = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    shape = tokenizer.encode("<think>ab</think><answer>c</answer><|im_end|>")
    rows = torch.tensor([ids + shape for ids in prompts])
    labels = rows.clone()
    labels[:, : -len(shape)] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(55):
        optimizer.zero_grad()
        model(input_ids=rows, labels=labels).loss.backward()
        optimizer.step()
    _, steps = run(
        folder,
        tmp_path,
        model=model,
        tokenizer=tokenizer,
        reward=think_answer_format,
        max_tokens=10,
        lr=6e-3,
        steps=80,
    )
    rates = [s["reward"] for s in steps]
    assert 0.02 < rates[0] < 0.6 and statistics.median(rates[-20:]) > 0.9, rates


def test_adapters_learn_from_their_own_samples_and_the_base_stays(folder, tmp_path):
    """The frozen head bounds what can be reached: no direction of hidden states is a digit
    alone."""
    base = load_model(ModelConfig(name=str(folder)), dtype=torch.float32).state_dict()
    model, steps = run(folder, tmp_path, lora=LoraConfig(rank=8), options={"beta": 0.0}, steps=40)
    assert steps[0]["reward"] < 0.1 and sum(s["reward"] for s in steps[-10:]) / 10 > 0.5, [
        s["reward"] for s in steps
    ]
    assert max(s["sampler_mismatch_nats"] for s in steps) < 1e-4
    frozen = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for n, p in model.named_parameters()
        if "lora" not in n
    }
    assert frozen.keys() <= base.keys() and len(frozen) > 15
    assert all(torch.equal(p, base[n]) for n, p in frozen.items())
    moved = {n: float(p.abs().max()) for n, p in model.named_parameters() if "lora_B" in n}
    assert len(moved) == 14 and min(moved.values()) > 0, "B is 0 at the start"


def test_a_sampler_at_another_temperature_stops_the_run_before_an_update(
    folder, tmp_path, monkeypatch
):
    model = load_model(ModelConfig(name=str(folder)), dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}

    class Warmer(LocalEngine):
        def generate(self, requests, sampling, *, on_finished=None):
            return super().generate(
                requests, replace(sampling, temperature=2.0), on_finished=on_finished
            )

    with monkeypatch.context() as patch:
        patch.setattr(local, "LocalEngine", Warmer)
        with pytest.raises(MismatchError, match="do not have the same weights or temperature"):
            run(
                folder,
                tmp_path / "wrong",
                model=model,
                rollout={"max_mismatch_nats": 0.02},
                options={"beta": 0.0},
                steps=1,
            )
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        _, steps = run(
            folder,
            tmp_path / "off",
            model=model,
            rollout={"max_mismatch_nats": 0.0},
            options={"beta": 0.0},
            steps=1,
        )
        assert steps[0]["sampler_mismatch_nats"] > 0.02
        model.load_state_dict(before, strict=False)
    _, steps = run(
        folder,
        tmp_path / "right",
        model=model,
        rollout={"max_mismatch_nats": 0.02},
        options={"beta": 0.0},
        steps=1,
    )
    assert steps[0]["sampler_mismatch_nats"] < 1e-5


@pytest.mark.parametrize(
    ("reference", "begin_at_the_reference"),
    [
        (ReferenceConfig(), [1, 4, 7]),
        (ReferenceConfig(sync_every=2, sync_mix=1.0), [1, 3, 5, 7]),
    ],
    ids=["of the algorithm", "of the settings, which come first"],
)
def test_r1_replaces_its_reference_by_the_policy_every_so_many_steps(
    folder, tmp_path, reference, begin_at_the_reference
):
    """The KL is 0 in the steps that begin at the reference, and not in the others."""
    options = {"reference_every": 3}
    _, steps = run(
        folder,
        tmp_path,
        algorithm="r1",
        options=options,
        reward=odd,
        steps=7,
        reference=reference,
    )
    zero = [s["step"] for s in steps if s["kl_reference_nats"] < 1e-9]
    others = [s["kl_reference_nats"] for s in steps if s["step"] not in zero]
    assert zero == begin_at_the_reference and min(others) > 1e-5
