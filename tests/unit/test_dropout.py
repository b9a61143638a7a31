"""Dropout: off where probabilities are compared, unless asked; never on in a reference, an
evaluation or a statistic.

And temperature: what is sampled, trained and compared with is the same distribution, also at a
temperature that is not 1.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from accelerate import Accelerator

from posttrain import (
    DPOConfig,
    DPOTrainer,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ReferenceConfig,
    RLConfig,
    RLTrainer,
    RolloutConfig,
    SamplingConfig,
    SFTConfig,
    SFTTrainer,
    TrainConfig,
)
from posttrain.losses.preference import kto
from posttrain.losses.sft import sft
from posttrain.models.dropout import has_dropout
from posttrain.models.load import load_model, load_tokenizer, save_model, set_dropout
from posttrain.models.policy import Policy, choose_mode
from posttrain.packing.batch import GroupPart, pack
from posttrain.precision import resolve_precision
from posttrain.training.forward import ForwardPlan, batch_mean, evaluate, forward_values
from posttrain.training.metrics import read_metrics
from posttrain.training.reference import RunReference
from posttrain.types import Counts, Forward, loss
from tests.helpers import random_groups, tiny_gpt2, tiny_llama
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.usefixtures("no_measurement")

RATE = 0.3
GROUPS = random_groups(4, sizes=(2, 3), seed=5)


def opt():
    """Calls F.dropout with rates that its layers keep as numbers."""
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            dropout=RATE,
            attention_dropout=RATE,
            activation_dropout=RATE,
            layerdrop=RATE,
        )
    )


def llama_with_adapters():
    from peft import LoraConfig as Peft
    from peft import get_peft_model

    torch.manual_seed(0)
    model = tiny_llama()
    model.config.attention_dropout = RATE
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = RATE
    return get_peft_model(
        model, Peft(r=4, target_modules="all-linear", lora_dropout=RATE, init_lora_weights=False)
    )


MODELS = {
    "gpt2": lambda: tiny_gpt2(dropout=RATE),
    "opt": opt,
    "llama with lora": llama_with_adapters,
}


@pytest.mark.parametrize("name", MODELS)
def test_without_dropout_training_mode_is_evaluation_mode_and_the_prompt_can_be_shared(name):
    model = MODELS[name]()
    ids = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = model.eval()(input_ids=ids).logits
    assert (
        has_dropout(model)
        and choose_mode(model, PackingConfig(), device_type="cpu").mode == "packed"
    )
    assert not torch.allclose(model.train()(input_ids=ids).logits, expected, atol=1e-4), (
        "the rate must matter"
    )
    set_dropout(model, ModelConfig(), default=False)
    assert model.training and not has_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert choose_mode(model, PackingConfig(), device_type="cpu").mode == "shared"


def test_what_is_saved_keeps_the_models_rates(tmp_path):
    model = tiny_gpt2(dropout=RATE)
    set_dropout(model, ModelConfig(), default=False)
    save_model(model, byte_tokenizer(), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["resid_pdrop"] == saved["embd_pdrop"] == saved["attn_pdrop"] == RATE
    assert not has_dropout(model), "the run goes on without"


def test_dropout_that_is_asked_for_stays_and_adapters_say_when_theirs_would_not_work():
    model = tiny_gpt2(dropout=RATE)
    set_dropout(model, ModelConfig(dropout=True), default=False)
    set_dropout(model, ModelConfig(), default=True)
    assert has_dropout(model)
    with pytest.raises(
        ValueError, match=r"lora.dropout=0.1 would have no effect.*--model.dropout true"
    ):
        set_dropout(model, ModelConfig(lora=LoraConfig(rank=4, dropout=0.1)), default=False)


def gpt2_folder(path):
    """GPT-2 with its checkpoints' habit of dropout."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=RATE,
            embd_pdrop=RATE,
            attn_pdrop=RATE,
        )
    )
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)  # else every distribution is nearly uniform
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gpt2_folder(tmp_path_factory.mktemp("models") / "gpt2")


def peft_model(folder):
    from peft import LoraConfig as Peft
    from peft import get_peft_model

    model = load_model(ModelConfig(name=str(folder)), dtype=torch.float32)
    return get_peft_model(
        model, Peft(r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=RATE)
    )


def steps_of(folder):
    return [m for m in read_metrics(folder / "metrics.jsonl") if "grad_norm" in m]


PAIRS = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]


@pytest.mark.parametrize("adapters", [False, True])
def test_dpo_starts_at_ln_2_with_a_model_that_has_dropout(folder, tmp_path, adapters):
    model = peft_model(folder) if adapters else None
    train = TrainConfig(
        run_dir=str(tmp_path), name="run", batch_size=8, max_steps=1, precision="fp32"
    )
    config = DPOConfig(model=ModelConfig(name=str(folder)), train=train)
    tokenizer = load_tokenizer(config.model)
    DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=PAIRS, config=config).train()
    (step,) = steps_of(tmp_path / "run")
    assert step["loss"] == pytest.approx(math.log(2), abs=2e-6)
    if not adapters:
        asked = replace(
            config, model=replace(config.model, dropout=True), train=replace(train, name="asked")
        )
        DPOTrainer(train_dataset=PAIRS, config=asked).train()
        assert abs(steps_of(tmp_path / "asked")[0]["loss"] - math.log(2)) > 1e-3


def test_sft_keeps_the_models_dropout(folder, tmp_path):
    rows = [{"prompt": f"{i}?", "completion": f"yes {i}"} for i in range(8)]
    losses = {}
    for name, asked in (("own", None), ("off", False)):
        train = TrainConfig(
            run_dir=str(tmp_path), name=name, batch_size=8, max_steps=1, precision="fp32"
        )
        config = SFTConfig(model=ModelConfig(name=str(folder), dropout=asked), train=train)
        SFTTrainer(train_dataset=rows, config=config).train()
        losses[name] = steps_of(tmp_path / name)[0]["loss"]
    assert abs(losses["own"] - losses["off"]) > 1e-3, losses


def spread(completion, sample):
    return float(sum(map(ord, completion)) % 7)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_ratios_of_a_first_update_are_1_and_the_sampler_is_the_policy_at_every_temperature(
    folder, tmp_path, adapters, temperature, monkeypatch
):
    """Two updates on each batch of rollouts: in the first the policy is the one that sampled, in
    the second it is not."""
    seen = []
    from posttrain.losses import policy as losses

    clipped = losses.clipped

    @loss(reference=False, couples_completions=False)
    def watched(logps, **options):
        seen.append(float((logps.logps_T - logps.proximal_T).detach().abs().max()))
        return clipped(logps, **options)

    from posttrain.rl.algorithms import GRPO

    algorithm = replace(GRPO, loss=watched, beta=0.04)
    model = peft_model(folder) if adapters else None
    config = RLConfig(
        model=ModelConfig(name=str(folder)),
        sampling=SamplingConfig(max_tokens=6, temperature=temperature),
        rollout=RolloutConfig(group_size=4, show_every=0, updates=2),
        optimizer=OptimizerConfig(lr=1e-3, schedule="constant"),
        train=TrainConfig(
            run_dir=str(tmp_path), name="run", batch_size=4, max_steps=2, precision="fp32"
        ),
    )
    rows = [{"prompt": f"{a}?"} for a in range(16)]
    RLTrainer(
        model=model,
        tokenizer=load_tokenizer(config.model),
        train_dataset=rows,
        rewards={spread: 1.0},
        algorithm=algorithm,
        config=config,
    ).train()
    first, second = steps_of(tmp_path / "run")
    assert seen and seen[0] < 1e-6, "exp of it is the ratio"
    assert max(first["sampler_mismatch_nats"], second["sampler_mismatch_nats"]) < 1e-4
    assert abs(first["kl_reference_nats"]) < 1e-6, (
        "the reference is the policy at its start, at the same temperature"
    )
    assert second["kl_reference_nats"] > 1e-9


def plan(max_tokens=10_000, mode="packed"):
    return ForwardPlan(accelerator=Accelerator(cpu=True), mode=mode, max_tokens=max_tokens)


def policy_with_dropout(adapters=False):
    """In training mode, its dropout on."""
    model = llama_with_adapters() if adapters else tiny_gpt2(dropout=RATE)
    return Policy(model, PackingConfig()).train()


def values(forward):
    def computed(groups, batch):
        value = forward(groups, batch)
        return value if isinstance(value, Forward) else Forward(value)

    (found,) = forward_values(plan(), GROUPS, [computed])
    return {ref: value.logps_T for ref, value in found.items()}


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_reference_has_no_dropout(adapters, cache, tmp_path):
    """Adapters off is the same model with its dropout; a cache is filled by the policy itself."""
    policy = policy_with_dropout(adapters)
    config = ReferenceConfig(cache=cache, cache_dir=str(tmp_path))
    reference = RunReference(config, precision=resolve_precision("fp32", "cpu"), groups=[GROUPS])
    reference.build(policy, plan().accelerator)
    reference.start(policy, plan())
    once, again = values(reference), values(reference)
    assert policy.training and all(torch.equal(once[ref], again[ref]) for ref in once)
    plain = RunReference(
        ReferenceConfig(), precision=resolve_precision("fp32", "cpu"), groups=[GROUPS]
    )
    plain.build(policy.eval(), plan().accelerator)
    plain.start(policy, plan())
    wanted = values(plain)
    policy.train()
    assert all(torch.equal(once[ref], wanted[ref]) for ref in once), "as in evaluation mode"
    noisy = values(lambda _, batch: policy(batch)), values(lambda _, batch: policy(batch))
    assert any(not torch.equal(noisy[0][ref], noisy[1][ref]) for ref in once), "the policy's is on"


def test_a_held_out_evaluation_has_no_dropout():
    policy = policy_with_dropout()
    counts = Counts(
        tokens=sum(g.num_trained for g in GROUPS),
        completions=sum(len(g.completions) for g in GROUPS),
        groups=len(GROUPS),
    )
    once, again = (
        evaluate(plan(), policy, GROUPS, sft, counts=counts)["eval_loss"] for _ in range(2)
    )
    policy.eval()
    assert once == again == evaluate(plan(), policy, GROUPS, sft, counts=counts)["eval_loss"]


def test_ktos_reference_point_has_no_dropout():
    policy = policy_with_dropout()
    reference = RunReference(
        ReferenceConfig(), precision=resolve_precision("fp32", "cpu"), groups=[GROUPS]
    )
    reference.build(policy, plan().accelerator)
    reference.start(policy, plan())
    assert policy.training and float(batch_mean(plan(), policy, reference, kto, GROUPS)) == 0.0, (
        "policy = reference"
    )


def test_another_model_around_the_same_forward_has_its_temperature():
    """The reference of RL is compared with the policy at the temperature of sampling."""
    policy = Policy(tiny_llama(), PackingConfig(), temperature=0.7)
    other = policy.around(tiny_llama(), device_type="cpu")
    assert other.transform == policy.transform and other.transform.temperature == 0.7
    mine, theirs = values(lambda _, batch: policy(batch)), values(lambda _, batch: other(batch))
    assert all(torch.equal(mine[ref], theirs[ref]) for ref in mine)


@pytest.mark.parametrize("mode", ["shared", "packed"])
def test_the_parts_of_a_cut_group_know_its_whole_size(mode):
    """``group_size_S`` counts the group's completions with a trained token, not those in the
    micro-batch: group means divide by it."""
    (group,) = random_groups(1, sizes=(5,), seed=3)
    untrained = replace(group.completions[4], loss_mask=[0] * len(group.completions[4].token_ids))
    group = replace(group, completions=[*group.completions[:4], untrained])
    for completions in ((0, 1), (2, 3, 4), (1,), (0, 1, 2, 3, 4)):
        batch = pack([group], [GroupPart(group=0, completions=completions)], mode=mode)
        assert batch.group_size_S.tolist() == [4] * len(completions)
