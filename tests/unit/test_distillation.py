"""On-policy distillation: divergences in closed form, the gradient against one sequence at a time,
and a student that becomes its teacher."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from posttrain.losses.distillation import TeacherDivergence, distillation, divergence
from posttrain.losses.policy import clipped
from posttrain.losses.reduce import weighted_sum
from posttrain.models.policy import Policy
from posttrain.packing.plan import PackingConfig, plan_step, row_tokens
from posttrain.training.step import step_gradient
from posttrain.types import PromptGroup
from tests.helpers import (
    gradients_of,
    max_difference,
    plain_logps,
    random_groups,
    tiny_gpt2,
    tiny_llama,
)
from tests.losses_for_tests import as_rollouts
from tests.tiny import byte_tokenizer

F64 = torch.float64
GROUPS = as_rollouts(random_groups(5, seed=4), seed=2)


def test_closed_forms():
    """S = (1/2, 1/2), T = (1/4, 3/4)."""
    student, teacher = torch.zeros(1, 2, dtype=F64), torch.tensor([[0.25, 0.75]], dtype=F64).log()
    assert float(divergence(student, teacher)) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-12)
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(divergence(student, teacher, kind="forward_kl")) == pytest.approx(
        forward, abs=1e-12
    )
    m = (0.375, 0.625)
    half = [
        sum(p * math.log(p / q) for p, q in zip(dist, m, strict=True))
        for dist in ((0.25, 0.75), (0.5, 0.5))
    ]
    found = float(divergence(student, teacher, kind="jensen_shannon"))
    assert found == pytest.approx(sum(half) / 2, abs=1e-12)
    far = torch.tensor([[60.0, -60.0]], dtype=F64)
    assert float(divergence(far, -far, kind="jensen_shannon")) == pytest.approx(math.log(2))
    for kind in ("reverse_kl", "forward_kl", "jensen_shannon"):
        assert float(divergence(teacher, teacher, kind=kind)) == pytest.approx(0, abs=1e-15)
        padded = torch.cat([teacher, torch.full((1, 3), 9.0, dtype=F64)], -1)
        cut = divergence(student, padded, kind=kind)
        assert float(cut) == pytest.approx(float(divergence(student, teacher, kind=kind)))
    with pytest.raises(ValueError, match="reverse_kl, forward_kl, jensen_shannon"):
        divergence(student, teacher, kind="kl")


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("block", [2**21, 14], ids=["one block", "two rows a block"])
def test_the_gradient_is_that_of_finite_differences(kind, block, monkeypatch):
    """Seven columns against five: the two that the teacher lacks get none."""
    monkeypatch.setattr("posttrain.blocks.CPU_BLOCK_ELEMENTS", block)
    torch.manual_seed(0)
    student = (3 * torch.randn(5, 7, dtype=F64)).requires_grad_()
    teacher = 3 * torch.randn(5, 5, dtype=F64)
    assert torch.autograd.gradcheck(
        lambda x: divergence(x, teacher, kind=kind, mix=0.3), (student,), atol=1e-8
    )
    divergence(student, teacher, kind=kind, mix=0.3).sum().backward()
    assert student.grad[:, :5].abs().min() > 0 and not student.grad[:, 5:].any()


def plain_logits(model, group, k):
    c = group.completions[k]
    ids = torch.tensor([[*group.prompt_ids, *c.token_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
    return logits[torch.tensor(c.loss_mask)]


@pytest.mark.parametrize("mode", ["shared", "packed", "single"])
@pytest.mark.parametrize("budget", ["one", "split"])
def test_gradient_is_that_of_whole_distributions_one_sequence_at_a_time(mode, budget):
    """Two teachers, one of another architecture, and a clipped surrogate beside."""
    model = tiny_gpt2().double().eval()
    others = [tiny_gpt2(seed=5).double().eval(), tiny_llama(seed=6).double().eval()]
    kinds = ("reverse_kl", "jensen_shannon")
    total, tokens, surrogate, count = 0.0, 0, 0.0, 0
    for group in GROUPS:
        for k, c in enumerate(group.completions):
            if not c.num_trained:
                continue
            mine = torch.log_softmax(plain_logits(model, group, k), -1)
            with torch.no_grad():
                theirs = [torch.log_softmax(plain_logits(o, group, k), -1) for o in others]
            total = total + 0.7 * (mine.exp() * (mine - theirs[0])).sum()
            m = (mine.exp() / 2 + theirs[1].exp() / 2).log()
            js = theirs[1].exp() * (theirs[1] - m) + mine.exp() * (mine - m)
            total = total + 0.3 * js.sum() / 2
            ratio = torch.exp(
                plain_logps(model, group, k)
                - torch.tensor(c.columns["proximal_logps"][c.loss_mask])
            )
            a = c.columns["advantage"]
            surrogate = surrogate - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
            tokens, count = tokens + c.num_trained, count + 1
    wanted = total / tokens + 0.5 * surrogate / count
    wanted.backward()
    truth = {n: p.grad.clone() for n, p in model.named_parameters()}

    twin = tiny_gpt2().double().train()
    policy = Policy(twin, PackingConfig(mode=mode, logits_chunk=3))
    frozen = [Policy(o, PackingConfig(mode=mode)) for o in others]
    teachers = [
        (w, TeacherDivergence(str(i), lambda _, batch, f=f: f.head_input(batch), kind=kind))
        for i, (w, f, kind) in enumerate(zip((0.7, 0.3), frozen, kinds, strict=True))
    ]
    loss = weighted_sum([(1.0, distillation(teachers)), (0.5, clipped)])
    alone = max(
        row_tokens(PromptGroup(prompt_ids=g.prompt_ids, completions=[c]), mode="shared")
        for g in GROUPS
        for c in g.completions
    )
    plan = plan_step(
        GROUPS,
        world_size=1,
        max_tokens=10**4 if budget == "one" else alone,
        mode=mode,
        coupled=loss.couples_completions,
    )
    result = step_gradient(Accelerator(cpu=True), policy, GROUPS, plan, loss, mode=mode)
    assert abs(result.loss - float(wanted.detach())) < 1e-10
    assert max_difference(gradients_of(twin), truth) < 1e-10
    assert set(result.metrics) >= {"divergence/0_nats", "divergence/1_nats"}


def test_a_teacher_of_the_same_weights_teaches_nothing():
    policy = Policy(tiny_llama().double(), PackingConfig())
    output = TeacherDivergence("self", lambda student, batch: student.head_input(batch))
    loss = distillation([(1.0, output)])
    plan = plan_step(GROUPS, world_size=1, max_tokens=500, mode="shared", coupled=False)
    result = step_gradient(Accelerator(cpu=True), policy, GROUPS, plan, loss, mode="shared")
    assert abs(result.loss) < 1e-12
    assert max(float(g.abs().max()) for g in gradients_of(policy.model).values()) < 1e-12


def test_teachers_are_named_apart():
    one = TeacherDivergence("a", lambda student, batch: None)
    for wrong in ([], [(1.0, one), (2.0, one)]):
        with pytest.raises(ValueError, match="teachers of different names"):
            distillation(wrong)


@pytest.fixture
def folders(tmp_path):
    """A student, and a teacher whose head is another."""
    tokenizer = byte_tokenizer()
    made = []
    for name in ("student", "teacher"):
        model = tiny_llama(vocab_size=len(tokenizer))
        if name == "teacher":
            torch.manual_seed(0)
            with torch.no_grad():
                model.lm_head.weight += (
                    6 * torch.randn_like(model.lm_head.weight) * model.lm_head.weight.std()
                )
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        made.append(tmp_path / name)
    return made


def settings(folders, tmp_path, **changes):
    from posttrain.models.load import ModelConfig
    from posttrain.rl.batches import RolloutConfig
    from posttrain.rollout.engine import SamplingConfig
    from posttrain.trainers.distill import DistillConfig, TeacherConfig
    from posttrain.training.config import TrainConfig
    from posttrain.training.optimizer import OptimizerConfig

    config = DistillConfig(
        model=ModelConfig(name=str(folders[0])),
        teachers=[TeacherConfig(model=str(folders[1]))],
        sampling=SamplingConfig(max_tokens=6),
        rollout=RolloutConfig(group_size=4, show_every=0),
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant"),
        train=TrainConfig(
            run_dir=str(tmp_path), name="run", batch_size=4, max_steps=25, precision="fp32"
        ),
    )
    return replace(config, **changes)


def test_the_student_becomes_its_teacher_without_a_reward(folders, tmp_path):
    from posttrain.trainers.distill import DistillTrainer

    rows = [{"prompt": f"{i}?"} for i in range(8)]
    DistillTrainer(train_dataset=rows, config=settings(folders, tmp_path)).train()
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    nats = [x["divergence/teacher_nats"] for x in lines if "divergence/teacher_nats" in x]
    assert len(nats) == 25 and sum(nats[-5:]) < 0.5 * sum(nats[:5]), nats


def test_mistakes_are_said_before_the_first_step(folders, tmp_path):
    from posttrain.trainers.distill import DistillTrainer, TeacherConfig

    config = settings(folders, tmp_path)
    with pytest.raises(ValueError, match="got none"):
        DistillTrainer(config=replace(config, teachers=[]))
    with pytest.raises(ValueError, match="got both"):
        DistillTrainer(config=config, teachers=["x"])
    with pytest.raises(ValueError, match="read with a reward_weight"):
        DistillTrainer(config=replace(config, algorithm_options={"epsilon_high": 0.3}))
    other = byte_tokenizer()
    other.add_tokens(["<extra>"])
    other.save_pretrained(folders[1])
    with pytest.raises(ValueError, match="'<extra>' is .* there and None here"):
        DistillTrainer(
            config=replace(config, teachers=[TeacherConfig(model=str(folders[1]))])
        ).train()
