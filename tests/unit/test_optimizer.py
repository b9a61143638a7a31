"""AdamW against the numbers of Loshchilov & Hutter 2019 (arXiv:1711.05101), decay groups on real
architectures, schedules."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from posttrain.precision import PRECISIONS
from posttrain.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    build_schedule,
    decay_groups,
    lr_multiplier,
)

# --- AdamW: the numbers
# ---------------------------------------------------------------------------------------------------
PAPER = OptimizerConfig(
    lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, schedule="constant"
)
PLANS = [pytest.param(None, id="fused"), pytest.param(PRECISIONS["fp16"], id="foreach")]


def trajectory(
    config: OptimizerConfig, gradients: Iterable[float], *, plan: Any = None
) -> list[float]:
    """theta after every step from theta = 1, in float64, of a 1x1 matrix (a matrix decays)."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    optimizer = build_optimizer(model, config, plan=plan)
    thetas = []
    for g in gradients:
        model.weight.grad = torch.full_like(model.weight, g)
        optimizer.step()
        thetas.append(model.weight.item())
    return thetas


@pytest.mark.parametrize("plan", PLANS)
def test_one_and_three_steps_of_the_paper(plan: Any) -> None:
    assert trajectory(PAPER, [0.1], plan=plan) == pytest.approx([0.9989900001], abs=5e-11)
    expected = [0.9989900001, 0.9993461137, 0.9989928792]
    assert trajectory(PAPER, [0.1, -0.2, 0.3], plan=plan) == pytest.approx(expected, abs=5e-11)


@pytest.mark.parametrize("plan", PLANS)
def test_the_decay_stays_out_of_the_moments(plan: Any) -> None:
    """g = 0: AdamW shrinks by exactly 1 - lr lambda per step, (0.99)^10; Adam with L2 would reach
    0.07625."""
    config = OptimizerConfig(lr=0.1, weight_decay=0.1)
    assert trajectory(config, [0.0] * 10, plan=plan)[-1] == pytest.approx(0.9043820750, abs=5e-11)


@pytest.mark.parametrize("plan", PLANS)
def test_the_bias_correction_makes_every_step_of_a_constant_gradient_equal(plan: Any) -> None:
    config = OptimizerConfig(lr=1e-3, weight_decay=0.0, eps=1e-2)
    thetas = [1.0, *trajectory(config, [0.1] * 5, plan=plan)]
    steps = [a - b for a, b in zip(thetas, thetas[1:], strict=False)]
    assert steps == pytest.approx([1e-3 * 0.1 / (0.1 + 1e-2)] * 5, rel=1e-12)


def test_the_scale_of_the_gradient_does_not_matter() -> None:
    small = trajectory(PAPER, [0.1, -0.2, 0.3])[-1]
    large = trajectory(PAPER, [100.0, -200.0, 300.0])[-1]
    assert small == pytest.approx(0.99899288, abs=5e-9)
    assert large == pytest.approx(0.99899288, abs=2e-8)
    assert small != large  # eps


def test_against_the_algorithm_in_plain_python() -> None:
    """Algorithm 2 with torch's lambda, for a changing rate and gradient."""
    config = OptimizerConfig(
        lr=0.02, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-3, schedule="cosine", warmup_steps=3
    )
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 12)
    theta, m, v = 1.0, 0.0, 0.0
    for t in range(1, 13):
        g = math.sin(t)
        rate = 0.02 * (t / 4 if t <= 3 else 0.5 * (1 + math.cos(math.pi * (t - 4) / 9)))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        theta -= rate * (m / (1 - 0.8**t) / (math.sqrt(v / (1 - 0.95**t)) + 1e-3) + 0.3 * theta)
        model.weight.grad = torch.full_like(model.weight, g)
        optimizer.step()
        schedule.step()
        assert model.weight.item() == pytest.approx(theta, rel=1e-12)


def test_fused_repeats_bit_for_bit_and_agrees_with_foreach() -> None:
    def run(plan: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(129, 67)
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.1), plan=plan)
        for _ in range(5):
            model.weight.grad, model.bias.grad = torch.randn(67, 129), torch.randn(67)
            optimizer.step()
        return model.weight.detach()

    assert torch.equal(run(None), run(None))
    torch.testing.assert_close(run(None), run(PRECISIONS["fp16"]), rtol=0, atol=1e-6)


# --- decay groups
# ---------------------------------------------------------------------------------------------------------
TINY = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def llama(**overrides: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **overrides}))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=4)
    )


def gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TINY, head_dim=4))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**TINY, tie_word_embeddings=False)
    )


def cohere() -> nn.Module:
    return transformers.CohereForCausalLM(transformers.CohereConfig(**TINY, use_qk_norm=True))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **TINY, head_dim=4, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssForCausalLM(config)


def lora(base: nn.Module, **settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(base, peft.LoraConfig(r=2, **settings))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biased": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
    "gemma2": gemma2,
    "qwen2": qwen2,
    "cohere-qk-norm": cohere,
    "gpt-oss": gpt_oss,
    "lora": lambda: lora(llama(), target_modules="all-linear"),
    "dora": lambda: lora(llama(), target_modules=["q_proj"], use_dora=True),
    "lora-embedding": lambda: lora(llama(), target_modules=["embed_tokens", "q_proj"]),
    "lora-full-embedding": lambda: lora(
        llama(), target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "lora-trainable-tokens": lambda: lora(
        llama(), target_modules=["q_proj"], trainable_token_indices=[3, 4]
    ),
    "lora-gpt2": lambda: lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True),
}


def decaying_names(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the parameters that decay, and of those that do not."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {
        g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in decay_groups(model, 0.1)
    }
    return groups.get(0.1, set()), groups.get(0.0, set())


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_is_in_exactly_one_group(name: str) -> None:
    model = MODELS[name]()
    held = Counter(id(p) for group in decay_groups(model, 0.1) for p in group["params"])
    assert held == Counter({id(p): 1 for p in model.parameters() if p.requires_grad})


@pytest.mark.parametrize("name", MODELS)
def test_what_decays_is_told_by_the_names(name: str) -> None:
    """Names are an independent witness: the groups are made from module types."""
    decay, keep = decaying_names(MODELS[name]())
    never = ("norm", "ln_", "bias", "embed", "wte", "wpe", "sinks", "magnitude", "trainable_tokens")
    assert not [n for n in decay if any(word in n for word in never)]
    assert not [n for n in keep if not any(word in n for word in never)]
    assert decay


def test_the_groups_of_a_llama_by_hand() -> None:
    decay, keep = decaying_names(llama(num_hidden_layers=1))
    layer = "model.layers.0"
    assert keep == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        f"{layer}.input_layernorm.weight",
        f"{layer}.post_attention_layernorm.weight",
    }
    matrices = [f"{layer}.self_attn.{x}_proj.weight" for x in "qkvo"]
    matrices += [f"{layer}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    assert decay == {*matrices, "lm_head.weight"}


def test_a_head_tied_to_the_embedding_counts_as_embedding() -> None:
    decay, keep = decaying_names(llama(tie_word_embeddings=True))
    assert "lm_head.weight" not in decay
    assert "model.embed_tokens.weight" in keep
    assert "lm_head.weight" in decaying_names(llama(tie_word_embeddings=False))[0]


def test_matrices_that_are_norms_or_biases_do_not_decay() -> None:
    model = cohere()
    assert model.model.layers[0].self_attn.q_norm.weight.ndim == 2
    assert "model.layers.0.self_attn.q_norm.weight" in decaying_names(model)[1]
    model = gpt_oss()
    assert model.model.layers[0].mlp.experts.gate_up_proj_bias.ndim == 2
    decay, keep = decaying_names(model)
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in keep
    assert "model.layers.0.mlp.experts.gate_up_proj" in decay


def test_lora_trains_the_adapter_only() -> None:
    decay, keep = decaying_names(MODELS["lora-embedding"]())
    assert sorted(n.split("embed_tokens.")[1] for n in keep) == [
        "lora_embedding_A.default",
        "lora_embedding_B.default",
    ]
    assert all("q_proj.lora_" in n for n in decay)
    assert len(decay) == 4  # A and B of two layers


def test_an_embedding_is_known_by_its_base_class() -> None:
    class Lookup(nn.Embedding):
        pass

    assert decaying_names(nn.Sequential(Lookup(4, 4), nn.Linear(4, 4, bias=False))) == (
        {"1.weight"},
        {"0.weight"},
    )


def test_groups_do_not_depend_on_the_wrapper(tmp_path) -> None:
    model = llama()
    plain = decaying_names(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        wrapped = decaying_names(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert wrapped == tuple({f"module.{n}" for n in names} for names in plain)


def test_partitioned_and_marked_parameters() -> None:
    """ZeRO-3 leaves an empty vector and the real shape in ds_shape; state-space models mark 2-D
    vectors."""
    model = nn.Module()
    model.matrix, model.a_log = nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(4, 4))
    model.matrix.ds_shape = (4, 4)
    model.a_log._no_weight_decay = True
    assert decaying_names(model) == ({"matrix"}, {"a_log"})


def test_a_norm_weight_without_gradient_stays_bit_identical_under_decay() -> None:
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for n, p in model.named_parameters():
        if "norm" in n or "embed" in n:
            assert torch.equal(p, before[n]), n
        else:
            torch.testing.assert_close(p.detach(), before[n] * (1 - 0.1 * 0.5) ** 3)


def test_without_decay_a_parameter_without_gradient_does_not_move() -> None:
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="Nothing to train in LlamaForCausalLM.*--model.lora.rank"):
        build_optimizer(llama().requires_grad_(False), OptimizerConfig())


# --- schedules
# ------------------------------------------------------------------------------------------------------------
def curve(num_steps: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(**settings)
    return [lr_multiplier(step, config, num_steps) for step in range(num_steps + 2)]


def test_closed_form_values() -> None:
    assert curve(4, schedule="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert curve(4, schedule="linear") == [1, 0.75, 0.5, 0.25, 0, 0]
    assert curve(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0.2]
    )
    assert curve(5, schedule="linear", warmup_steps=1) == [0.5, 1, 0.75, 0.5, 0.25, 0, 0]
    half = math.sqrt(0.5)
    assert curve(4, schedule="cosine") == pytest.approx(
        [1, (1 + half) / 2, 0.5, (1 - half) / 2, 0, 0], abs=1e-15
    )
    assert curve(4, schedule="cosine", min_lr_ratio=0.1)[2:5:2] == pytest.approx([0.55, 0.1])
    wsd = curve(10, schedule="wsd", warmup_steps=1, wsd_decay_ratio=0.4, min_lr_ratio=0.2)
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_a_decay_that_would_start_within_the_warmup_starts_after_it() -> None:
    assert curve(4, schedule="wsd", warmup_steps=2, wsd_decay_ratio=1.0) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5, 0, 0]
    )


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_no_step_is_spent_at_rate_zero(schedule: Any, warmup: int) -> None:
    rates = curve(8, schedule=schedule, warmup_steps=warmup)[:8]
    assert min(rates) > 0
    assert max(rates) == 1 == rates[warmup]


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            OptimizerConfig(schedule="constant", warmup_steps=4),
            lambda o: transformers.get_constant_schedule_with_warmup(o, 4),
        ),
        (
            OptimizerConfig(schedule="linear", warmup_steps=4),
            lambda o: transformers.get_linear_schedule_with_warmup(o, 4, 20),
        ),
        (
            OptimizerConfig(schedule="cosine", warmup_steps=4, min_lr_ratio=0.1),
            lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(
                o, 4, 20, min_lr_rate=0.1
            ),
        ),
        (
            OptimizerConfig(schedule="wsd", warmup_steps=4, min_lr_ratio=0.1, wsd_decay_ratio=0.25),
            lambda o: transformers.get_wsd_schedule(
                o, 4, 5, num_training_steps=20, decay_type="linear", min_lr_ratio=0.1
            ),
        ),
    ],
    ids=lambda x: x.schedule if isinstance(x, OptimizerConfig) else "",
)
def test_transformers_gives_the_same_rates_after_the_warmup(
    config: OptimizerConfig, reference: Callable[[Any], LambdaLR]
) -> None:
    def rates(make: Callable[[Any], LambdaLR]) -> list[float]:
        optimizer = build_optimizer(nn.Linear(1, 1), config)
        schedule = make(optimizer)
        seen = []
        for _ in range(20):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    ours = rates(lambda o: build_schedule(o, config, 20))
    assert ours[4:] == pytest.approx(rates(reference)[4:], rel=1e-12)
    assert ours[0] == pytest.approx(config.lr / 5)


def test_warmup_as_a_ratio() -> None:
    assert OptimizerConfig(warmup_ratio=0.1).num_warmup_steps(25) == 3  # rounded up
    assert (
        OptimizerConfig(warmup_ratio=0.9).num_warmup_steps(1) == 0
    )  # a smoke test of one step trains at the full rate
    with pytest.raises(ValueError, match="warmup_steps=10 must be below.*got 10 steps"):
        OptimizerConfig(warmup_steps=10).num_warmup_steps(10)
    with pytest.raises(ValueError, match="num_steps >= 1"):
        build_schedule(build_optimizer(nn.Linear(1, 1), OptimizerConfig()), OptimizerConfig(), 0)


# --- config
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be finite and > 0; got 0.0"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"lr": math.inf}, "lr must be finite"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be finite and in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9,)}, "betas needs two numbers"),
        ({"eps": 0.0}, "eps must be"),
        (
            {"schedule": "cosin"},
            "OptimizerConfig.schedule is one of constant, linear, cosine, wsd; got 'cosin'",
        ),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "both set and one would be ignored"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must be"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "would be ignored by schedule='constant'"),
        ({"schedule": "linear", "wsd_decay_ratio": 0.2}, "would be ignored by schedule='linear'"),
        ({"schedule": "wsd", "wsd_decay_ratio": 0.0}, "wsd_decay_ratio must be"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be"),
    ],
)
def test_bad_settings_are_refused_when_the_config_is_built(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)
