"""What the engine in this process samples with: casts, merged adapters and oneDNN's layout against
the plain computation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from posttrain.models.adapters import LoraConfig
from posttrain.models.load import ModelConfig, load_model
from posttrain.models.policy import Policy
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig
from posttrain.plan.job import job_of
from posttrain.plan.price import memory_plan
from posttrain.precision import PRECISIONS
from posttrain.rewards.compose import RewardsConfig
from posttrain.rollout.engine import Request, SamplingConfig
from posttrain.rollout.local import LocalEngine, SamplingLinear, SamplingWeights
from posttrain.trainers.rl import RLConfig
from posttrain.types import Completion, PromptGroup
from tests.helpers import tiny_llama
from tests.tiny import model_folder

BF16 = torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 32, 48), (3, 17, 5), (64, 64, 64), (129, 33, 100)]
)
@pytest.mark.parametrize("compute", [BF16, torch.float16])
def test_a_layer_is_the_plain_product_of_rounded_numbers(bias, rows, inner, outer, compute):
    """In oneDNN's blocked layout (bfloat16 on a CPU) as in torch's own: exact products, rounded
    once to the compute dtype."""
    torch.manual_seed(0)
    base = nn.Linear(inner, outer, bias=bias)
    layer = SamplingLinear(base, compute)
    layer.take(base.weight)
    x = torch.randn(2, rows, inner)
    with torch.no_grad():
        got = layer(x)
        x64, w64 = x.to(compute).double(), base.weight.to(compute).double()
        exact = x64 @ w64.T + (base.bias.to(compute).double() if bias else 0.0)
        size = x64.abs() @ w64.abs().T + 1.0
    assert got.dtype == compute and got.shape == (2, rows, outer)
    unit = torch.finfo(compute).eps
    assert bool(((got.double() - exact).abs() <= unit * exact.abs() + 1e-5 * size).all())
    layer.take(-base.weight)
    assert bool((layer(x).double() - got.double()).abs().max() > 0.1), "take replaces the values"


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, adapters)


def test_adapters_are_merged_into_the_copy_and_the_rest_is_shared():
    """Every adapted layer holds W + (alpha / r) B A, summed in float32 and rounded once; norms and
    embeddings are the model's own."""
    policy = Policy(with_adapters(tiny_llama()), PackingConfig())
    weights = SamplingWeights(policy, compute=BF16)
    adapted = {n: m for n, m in policy.base.named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == 14  # 2 layers of q, k, v, o, gate, up, down
    for name, module in adapted.items():
        layer = weights.model.get_submodule(name)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        merged = (module.base_layer.weight + 8 / 4 * (b @ a)).detach()
        identity = torch.eye(merged.shape[1])
        assert isinstance(layer, SamplingLinear) and not hasattr(layer, "lora_A")
        assert torch.equal(layer(identity).T, merged.to(BF16)), name
        assert not torch.equal(merged.to(BF16), module.base_layer.weight.to(BF16))
    own = dict(policy.base.named_parameters())
    shared = dict(weights.model.named_parameters())
    assert shared and all(p is own[n] for n, p in shared.items())
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(shared)


@pytest.mark.parametrize("rank", [0, 4, -4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
def test_the_copy_is_what_the_plan_says(tmp_path, precision, rank):
    """A rank below 0: adapters around weights in 4 bit, which are not merged."""
    if rank < 0:
        pytest.importorskip("bitsandbytes")
    plan = PRECISIONS[precision]
    config = ModelConfig(
        name=str(model_folder(tmp_path)), lora=LoraConfig(rank=abs(rank), quantize_4bit=rank < 0)
    )
    policy = Policy(
        load_model(config, dtype=plan.load_dtype, compute=getattr(torch, plan.compute)),
        PackingConfig(),
    )
    weights = SamplingWeights(policy, compute=getattr(torch, plan.compute))
    layers = [m for m in weights.model.modules() if isinstance(m, SamplingLinear)]
    settings = RLConfig(
        model=config, algorithm="grpo", rewards=RewardsConfig(functions={"math_answer": 1.0})
    )
    job = job_of(
        settings, "rl", precision=plan, device="cpu", wants_reference=False, model=policy.model
    )
    assert memory_plan(job).phases["update"].get("rollout copy", 0) == sum(
        m.weight.numel() * 2 for m in layers
    )
    assert bool(layers) == (precision == "bf16" or (precision == "bf16-pure" and rank != 0))


def test_samples_of_merged_adapters_have_the_trainers_log_probs():
    """bfloat16: closer than its rounding to the adapted model in float32, far from the model
    without adapters."""
    model = with_adapters(tiny_llama())
    twin = copy.deepcopy(model).eval()
    policy = Policy(model, PackingConfig())
    engine = LocalEngine(policy, compute=BF16, stop_ids=[])
    requests = [
        Request(prompt_ids=(5, 6, 7 + i), seeds=tuple(range(10 * i, 10 * i + 4))) for i in range(6)
    ]
    drawn = engine.generate(requests, SamplingConfig(max_tokens=8))
    groups = [
        PromptGroup(
            prompt_ids=r.prompt_ids,
            pairs=(),
            completions=[Completion(token_ids=d.token_ids, loss_mask=[1] * 8) for d in row],
        )
        for r, row in zip(requests, drawn, strict=True)
    ]
    sampler = torch.tensor([p for row in drawn for d in row for p in d.logps])

    def trainers(autocast):
        batch = pack(
            groups, [GroupPart(group=g, completions=(0, 1, 2, 3)) for g in range(6)], mode="shared"
        )
        with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
            return policy(batch).logps_T.float()

    with torch.no_grad():
        own = []
        for r, row in zip(requests, drawn, strict=True):
            for d in row:
                logits = twin(input_ids=torch.tensor([[*r.prompt_ids, *d.token_ids]])).logits[
                    0, len(r.prompt_ids) - 1 : -1
                ]
                own += (
                    torch.log_softmax(logits, -1)
                    .gather(1, torch.tensor(d.token_ids)[:, None])[:, 0]
                    .tolist()
                )
    rounding = float((trainers(True) - trainers(False)).abs().mean())
    assert torch.allclose(trainers(False), torch.tensor(own), atol=1e-4)
    assert float((sampler - torch.tensor(own)).abs().mean()) < 2 * rounding + 1e-3
    with policy.model.disable_adapter():
        assert float((sampler - trainers(False)).abs().mean()) > 20 * rounding
