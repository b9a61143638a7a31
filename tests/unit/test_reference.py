"""Reference log-probs: frozen copy, adapters off, moving, and kept on disk."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator

from posttrain.models.policy import Policy, freeze, frozen_copy, weights_digest
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig
from posttrain.precision import resolve_precision
from posttrain.training.forward import ForwardPlan, forward_values
from posttrain.training.reference import ReferenceConfig, RunReference
from posttrain.types import Forward
from tests.helpers import random_groups, tiny_llama

GROUPS = random_groups(8, sizes=(2, 4), seed=5)


def plan_of(max_tokens=10_000, mode="shared"):
    return ForwardPlan(accelerator=Accelerator(cpu=True), mode=mode, max_tokens=max_tokens)


def started(model, config, *, plan=None, groups=GROUPS):
    policy = Policy(model, PackingConfig())
    reference = RunReference(config, precision=resolve_precision("fp32", "cpu"), groups=[groups])
    plan = plan or plan_of()
    reference.build(policy, plan.accelerator)
    reference.start(policy, plan)
    return policy, reference


def as_forward(compute):
    def computed(groups, batch):
        value = compute(groups, batch)
        return value if isinstance(value, Forward) else Forward(value)

    return computed


def values(reference, *, max_tokens=10_000):
    (found,) = forward_values(plan_of(max_tokens), GROUPS, [as_forward(reference)])
    return {ref: forward.logps_T for ref, forward in found.items()}


def change(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def test_a_frozen_copy_stays_when_the_policy_moves():
    model = tiny_llama()
    policy, reference = started(model, ReferenceConfig())
    before = values(lambda _, batch: policy(batch))
    change(model)
    after = values(lambda _, batch: policy(batch))
    frozen = values(reference)
    assert all(torch.equal(frozen[ref], before[ref]) for ref in before)
    assert any(float((after[ref] - before[ref]).abs().max()) > 0.01 for ref in before)
    assert not any(p.requires_grad for p in reference.frozen.parameters())


def test_adapters_off_is_a_separate_copy_of_the_base():
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    separate = freeze(Policy(copy.deepcopy(base), PackingConfig()))
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    policy, reference = started(model, ReferenceConfig())
    policy.train()
    off, alone = values(reference), values(lambda _, batch: separate(batch))
    on = values(lambda _, batch: policy(batch))
    assert policy.training
    assert reference.num_bytes == 0
    for ref in alone:
        assert torch.equal(off[ref], alone[ref])
    assert any(float((on[ref] - alone[ref]).abs().max()) > 0.01 for ref in alone)


def test_cached_equals_live_bit_for_bit_in_the_same_packing_and_closely_in_another(tmp_path):
    model = tiny_llama()
    config = ReferenceConfig(cache=True, cache_dir=str(tmp_path))
    _, cached = started(model, config)
    live = values(started(tiny_llama(), ReferenceConfig())[1])
    change(model)
    same, other = values(cached), values(started(tiny_llama(), ReferenceConfig())[1], max_tokens=40)
    assert all(torch.equal(same[ref], live[ref]) for ref in live)
    assert max(float((same[ref] - other[ref]).abs().max()) for ref in live) < 1e-6 * 30
    assert cached.num_bytes == 0


def test_the_cache_is_reused_for_the_same_tokens_and_weights_only(tmp_path, monkeypatch):
    config = ReferenceConfig(cache=True, cache_dir=str(tmp_path))
    started(tiny_llama(), config)
    (file,) = (tmp_path / "reference").iterdir()
    written = file.stat().st_mtime_ns

    def never(*_, **__):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.training.reference._compute", never)
        started(tiny_llama(), config)
        for changed in (
            dict(model=tiny_llama(seed=1)),
            dict(model=tiny_llama(), groups=GROUPS[1:]),
        ):
            with pytest.raises(AssertionError, match="computed again"):
                started(changed.pop("model"), config, **changed)
    assert file.stat().st_mtime_ns == written
    _, reference = started(tiny_llama(), config)
    stranger = random_groups(1, seed=77)
    batch = pack(stranger, [GroupPart(group=0, completions=(0,))], mode="shared")
    with pytest.raises(KeyError, match="random:0: no reference log-probs"):
        reference(stranger, batch)


def test_the_digest_of_a_base_is_the_same_with_adapters_around_it():
    from peft import LoraConfig, get_peft_model

    plain = weights_digest(tiny_llama())
    assert (
        weights_digest(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")))
        == plain
    )
    assert weights_digest(tiny_llama(seed=1)) != plain


def test_a_moving_reference_is_the_stated_average_and_survives_a_checkpoint(tmp_path):
    model = tiny_llama()
    policy, reference = started(model, ReferenceConfig(sync_every=2, sync_mix=0.6))
    old = {n: p.clone() for n, p in model.named_parameters()}
    change(model)
    reference.after_step(1, policy)
    name = "model.layers.0.mlp.up_proj.weight"
    frozen = dict(reference.frozen.model.named_parameters())
    assert torch.equal(frozen[name], old[name])
    reference.after_step(2, policy)
    new = dict(model.named_parameters())
    assert torch.allclose(frozen[name], 0.6 * new[name] + 0.4 * old[name], atol=1e-7)
    reference.write(tmp_path, is_main=True)
    _, resumed = started(tiny_llama(), ReferenceConfig(sync_every=2, sync_mix=0.6))
    resumed.read(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.frozen.parameters(), reference.frozen.parameters(), strict=True)
    )


def test_linear_weights_in_the_compute_dtype_are_what_autocast_makes_of_them():
    policy = Policy(tiny_llama(tie_word_embeddings=True), PackingConfig())
    whole, halved = frozen_copy(policy), frozen_copy(policy, compute=torch.bfloat16)
    batch = pack(GROUPS, [GroupPart(group=1, completions=(0, 1, 2, 3))], mode="shared")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(batch).logps_T, halved(batch).logps_T)
    assert sum(p.numel() * p.element_size() for p in halved.parameters()) < 0.8 * sum(
        p.numel() * p.element_size() for p in whole.parameters()
    )
