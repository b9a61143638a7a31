"""Policy losses and advantages against the numbers of their papers and against loops written from
the formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.losses import policy
from posttrain.losses.reduce import reduce_term
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import count_units
from posttrain.rl.algorithms import ALGORITHMS, DAPO, GRPO, KIMI_K15, R1, resolve_algorithm
from posttrain.rl.credit import (
    batch_normalised,
    group_normalised,
    leave_one_out,
    log_mean_exp,
    mean_normalised,
    mirror_baseline,
)
from posttrain.types import Completion, PromptGroup

F64 = torch.float64


def batch(lengths, advantages, *, ratio=None, prompt=1):
    """One group; log-probs drawn once, the proximal ones so that every token's ratio is
    ``ratio[k]``."""
    completions = [
        Completion(token_ids=[5] * n, loss_mask=[1] * n, columns={"advantage": a})
        for n, a in zip(lengths, advantages, strict=True)
    ]
    groups = [PromptGroup(prompt_ids=[prompt], completions=completions, pairs=())]
    packed = pack(
        groups, [GroupPart(group=0, completions=tuple(range(len(lengths))))], mode="shared"
    )
    logps = (
        -torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0), dtype=F64)
    ).requires_grad_()
    view = packed.with_logps(logps)
    if ratio is not None:
        shift = torch.cat(
            [torch.full((n,), math.log(r), dtype=F64) for n, r in zip(lengths, ratio, strict=True)]
        )
        view = given(view, proximal_logps=logps.detach() - shift)
    return view, count_units(groups)


def given(view, **columns):
    """The batch with other columns by token."""
    return replace(view, columns_T={**view.columns_T, **columns})


def value(loss, view, counts, **options):
    output = loss(view, **options)
    return sum(reduce_term(term, view, counts) for term in output.terms)


def test_advantages_of_one_right_in_four():
    r = [[1.0, 0.0, 0.0, 0.0]]
    third = 1 / 3
    assert group_normalised(r)[0] == pytest.approx(
        [math.sqrt(3), *[-1 / math.sqrt(3)] * 3], abs=1e-12
    )
    assert group_normalised(r, std="sample")[0] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-12)
    assert leave_one_out(r)[0] == pytest.approx([1, -third, -third, -third], abs=1e-12)
    assert group_normalised(r, std="none")[0] == pytest.approx(
        [0.75, -0.25, -0.25, -0.25], abs=1e-12
    )
    sixteen = [[1.0] * 4 + [0.0] * 12]
    assert group_normalised(sixteen)[0][::15] == pytest.approx([1.7320508, -0.5773503], abs=1e-7)
    assert group_normalised(sixteen, std="sample")[0][::15] == pytest.approx(
        [1.6770510, -0.5590170], abs=1e-7
    )


@pytest.mark.parametrize(
    "make",
    [group_normalised, leave_one_out, batch_normalised, mirror_baseline, mean_normalised],
)
def test_equal_rewards_give_exactly_zero_and_unscored_ones_none(make):
    assert make([[0.1, 0.1, 0.1]]) == [[0.0, 0.0, 0.0]]
    scored = make([[0.3, None, 0.7], [0.2, 0.2, 0.9]])
    assert scored[0][1] is None and all(a is not None for a in (scored[0][0], *scored[1]))
    assert scored[0][0] < 0 < scored[0][2]
    assert make([[None, None]]) == [[None, None]]


def test_advantages_ignore_what_they_should():
    r = [[0.3, -1.2, 2.0, 0.1], [1.0, 0.0, 0.5, 0.25]]
    scaled = [[3 * x + 7 for x in g] for g in r]
    for a, b in zip(group_normalised(r), group_normalised(scaled), strict=True):
        assert a == pytest.approx(b, abs=1e-12)
    shifted = [[x + 7 for x in g] for g in r]
    for make in (leave_one_out, mirror_baseline):
        for a, b in zip(make(r), make(shifted), strict=True):
            assert a == pytest.approx(b, abs=1e-12)
    permuted = [g[::-1] for g in r]
    assert [g[::-1] for g in group_normalised(permuted)] == [
        pytest.approx(g) for g in group_normalised(r)
    ]
    flat = [a for g in batch_normalised(r) for a in g]
    assert sum(flat) == pytest.approx(0, abs=1e-12) and sum(
        a * a for a in flat
    ) / 8 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("tau", "wanted"), [(0.1, 0.930690), (1, 0.620115), (10, 0.512495), (100, 0.501250)]
)
def test_log_mean_exp_between_maximum_and_mean(tau, wanted):
    assert log_mean_exp([1.0, 0.0], tau=tau) == pytest.approx(wanted, abs=1e-6)
    assert mirror_baseline([[1.0, 0.0]], baseline="log_mean_exp", tau=tau)[0] == pytest.approx(
        [1 - wanted, -wanted], abs=1e-6
    )


def test_values_by_aggregation():
    view, counts = batch([2, 8], [1.0, -1.0])
    assert float(value(policy.clipped, view, counts)) == pytest.approx(0, abs=1e-12)
    assert float(value(policy.clipped, view, counts, aggregation="token_mean")) == pytest.approx(
        0.6, abs=1e-12
    )
    assert float(
        value(policy.clipped, view, counts, aggregation="constant", constant=16.0)
    ) == pytest.approx(0.1875, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "item", "slope"),
    [(1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1.5), (0.5, 1, -0.5, -0.5), (0.5, -1, 0.8, 0)],
)
def test_clipping(ratio, advantage, item, slope):
    view, _ = batch([1], [float(advantage)], ratio=[ratio])
    (term,) = policy.clipped(view, epsilon_low=0.2, epsilon_high=0.2).terms
    assert term.items.tolist() == pytest.approx([item], abs=1e-12)
    (gradient,) = torch.autograd.grad(term.items.sum(), view.logps_T)
    assert gradient.tolist() == pytest.approx([slope], abs=1e-12)


def test_two_sided_ceiling_bounds_what_plain_clipping_does_not():
    view, _ = batch([1], [-1.0], ratio=[9.0])
    assert policy.clipped(view).terms[0].items.tolist() == pytest.approx([9.0])
    assert policy.clipped(view, ceiling=4.0).terms[0].items.tolist() == pytest.approx([4.0])


def test_r1_epsilon_never_reaches_its_lower_bound():
    view, _ = batch([1, 1], [1.0, -1.0], ratio=[10.9, 1e-6])
    items = policy.clipped(view, **R1.loss_options).terms[0].items
    assert items.tolist() == pytest.approx([-10.9, 1e-6])


def test_gspo_ratio_is_the_geometric_mean():
    view, counts = batch([3], [1.0], ratio=[1.0])
    shift = torch.log(torch.tensor([1.1, 0.9, 1.2], dtype=F64))
    view = given(view, proximal_logps=view.logps_T.detach() - shift)
    assert float(value(policy.gspo, view, counts, epsilon_high=1.0)) == pytest.approx(
        -1.0591045, abs=1e-7
    )
    assert float(value(policy.gspo, view, counts)) == pytest.approx(-1.0004, abs=1e-9)


@pytest.mark.parametrize(
    "loss", [policy.clipped, policy.reinforce, policy.cispo, policy.gspo, policy.mirror_descent]
)
def test_on_policy_gradient_is_reinforce(loss):
    """At the sampling policy: -(1/N) sum A d log pi, with the normalisation of each loss's own
    aggregation; epsilon plays no role."""
    lengths, advantages = [2, 8, 3], [0.7, -0.4, -0.3]
    view, counts = batch(lengths, advantages)
    (gradient,) = torch.autograd.grad(value(loss, view, counts), view.logps_T)
    by_length = {policy.clipped: True, policy.gspo: True, policy.cispo: None}.get(loss, False)
    wanted = []
    for n, a in zip(lengths, advantages, strict=True):
        scale = 1 / sum(lengths) if by_length is None else 1 / (3 * n) if by_length else 1 / 3
        wanted += [-a * scale] * n
    assert gradient.tolist() == pytest.approx(wanted, abs=1e-12)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    view, counts = batch([1, 1], [1.0, 1.0], ratio=[9.0, 0.5])
    (gradient,) = torch.autograd.grad(value(policy.cispo, view, counts, cap=5.0), view.logps_T)
    assert gradient.tolist() == pytest.approx([-2.5, -0.25], abs=1e-12)


def test_k15_equation_3():
    view, counts = batch([1, 1, 1], [1 / 3, -2 / 3, 1 / 3])
    logps = torch.tensor([-3.0, -4.0, -2.5], dtype=F64, requires_grad=True)
    view = given(
        replace(view, logps_T=logps), proximal_logps=torch.tensor([-3.2, -3.9, -2.5], dtype=F64)
    )
    tau = 0.5
    loss = value(policy.mirror_descent, view, counts, tau=tau)
    assert float(2 * tau * loss) == pytest.approx(0.1819444, abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert (-gradient).tolist() == pytest.approx([0.0777778, -0.2055556, 0.1111111], abs=1e-7)


def test_k15_optimum_of_two_actions():
    """pi_i = (.5, .5), r = (1, 0), tau = 1: with the exact Z the squared residual is 0 at pi* =
    pi_i exp(r / tau) / Z."""
    pi = torch.tensor([0.731059, 0.268941], dtype=F64)
    b = log_mean_exp([1.0, 0.0], tau=1.0)
    view, counts = batch([1, 1], [1 - b, -b])
    view = given(
        replace(view, logps_T=pi.log()),
        proximal_logps=torch.full((2,), math.log(0.5), dtype=F64),
    )
    assert float(value(policy.mirror_descent, view, counts, tau=1.0)) == pytest.approx(0, abs=1e-11)


def test_k15_leaves_masked_tokens_out_of_the_log_ratio():
    """A segment of an earlier iteration is prompt: neither its gradient nor its log-ratio
    counts."""
    whole = Completion(
        token_ids=[5] * 4,
        loss_mask=[0, 0, 1, 1],
        columns={"advantage": 0.5, "proximal_logps": [-9.0, -9.0, -1.0, -2.0]},
    )
    groups = [PromptGroup(prompt_ids=[1], completions=[whole], pairs=())]
    packed = pack(groups, [GroupPart(group=0, completions=(0,))], mode="shared")
    logps = torch.tensor([-1.5, -1.7], dtype=F64)
    loss = value(policy.mirror_descent, packed.with_logps(logps), count_units(groups), tau=0.5)
    assert float(loss) == pytest.approx((0.5 - 0.5 * (-0.5 + 0.3)) ** 2)


def test_k15_corrected_for_the_sampler_weighs_whole_completions():
    """min(w, cap) of the completion times its square; above the cap a mask leaves it out."""
    view, counts = batch([2, 1], [0.5, -0.5])
    sampler = view.logps_T.detach() - torch.log(torch.tensor([3.0, 0.5, 4.0], dtype=F64))
    view = given(view, sampler_logps=sampler)
    squares = [0.25 / 2, 0.25 / 2]  # tau = 1, at pi_i
    for correction, weights in (("sequence_truncate", (1.5, 2.0)), ("sequence_mask", (1.5, 0.0))):
        wanted = sum(w * s for w, s in zip(weights, squares, strict=True)) / 2
        corrected = policy.objective(policy.mirror_descent, correction=correction)
        assert float(value(corrected, view, counts)) == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(ValueError, match="belong to each completion"):
        policy.objective(policy.mirror_descent, correction="token_mask")(view)
    with pytest.raises(ValueError, match="items of its loss are completions"):
        resolve_algorithm("k15", {"correction": "token_mask"})


@pytest.mark.parametrize(
    ("d", "wanted"),
    [
        (math.log(2), (-0.693147, 0.240227, 0.306853)),
        (-math.log(2), (0.693147, 0.240227, 0.193147)),
    ],
)
def test_kl_estimators(d, wanted):
    view, _ = batch([1], [0.0])
    view = replace(view, reference_T=view.logps_T.detach() + d)
    for name, number in zip(("k1", "k2", "k3"), wanted, strict=True):
        assert float(policy.kl_penalty(view, estimator=name)) == pytest.approx(number, abs=1e-6)


def test_kl_estimators_and_their_gradients_in_expectation():
    """Two actions, pi = (.5, .5), ref = (.25, .75): E k3 is the KL; as losses, k2 and the corrected
    k3 have the gradient of KL(pi || ref), k3 that of KL(ref || pi), k1 none."""
    logits = torch.zeros(2, dtype=F64, requires_grad=True)
    ref = torch.tensor([0.25, 0.75], dtype=F64).log()

    def gradient_of(f):
        return torch.autograd.grad(f, logits)[0]

    def expectation(estimator):
        pi = torch.log_softmax(logits, 0)
        view, _ = batch([1, 1], [0.0, 0.0])
        view = replace(view, logps_T=pi, reference_T=ref)
        return (pi.detach().exp() * policy.kl_penalty(view, estimator=estimator)).sum()

    pi = torch.log_softmax(logits, 0)
    assert float(expectation("k3")) == pytest.approx(0.143841036, abs=1e-9)
    reverse = gradient_of((pi.exp() * (pi - ref)).sum())
    forward = gradient_of((ref.exp() * (ref - torch.log_softmax(logits, 0))).sum())
    for name, wanted in (
        ("k1", torch.zeros(2, dtype=F64)),
        ("k2", reverse),
        ("k3", forward),
        ("k3_corrected", reverse),
    ):
        assert torch.allclose(gradient_of(expectation(name)), wanted, atol=1e-12), name


def test_grpo_gradient_with_kl_is_the_papers():
    """(1/G)(1/|o|)[A + beta (pi_ref / pi - 1)] by token, to be ascended. DeepSeekMath eq. 21."""
    view, counts = batch([2, 3], [1.0, -1.0])
    view = replace(view, reference_T=view.logps_T.detach() + 0.3)
    (gradient,) = torch.autograd.grad(
        value(policy.objective(policy.clipped, beta=0.04), view, counts), view.logps_T
    )
    coefficient = [
        -(a + 0.04 * (math.exp(0.3) - 1)) / (2 * n)
        for n, a in ((2, 1.0), (3, -1.0))
        for _ in range(n)
    ]
    assert gradient.tolist() == pytest.approx(coefficient, abs=1e-12)


@pytest.mark.parametrize(
    ("correction", "wanted"),
    [
        ("token_truncate", [2.0, 0.5, 1.0]),
        ("token_mask", [0.0, 0.5, 1.0]),
        ("sequence_truncate", [1.5, 1.5, 1.0]),
        ("sequence_mask", [1.5, 1.5, 1.0]),
    ],
)
def test_importance_weights(correction, wanted):
    view, _ = batch([2, 1], [1.0, 1.0])
    sampler = view.logps_T.detach() - torch.log(torch.tensor([3.0, 0.5, 1.0], dtype=F64))
    view = given(view, sampler_logps=sampler)
    assert policy.importance_weights(
        view, correction=correction, cap=2.0
    ).tolist() == pytest.approx(wanted)
    (term,) = policy.objective(policy.clipped, correction=correction)(view).terms
    assert term.items.tolist() == pytest.approx([-w for w in wanted])


def test_options_reach_what_has_them_and_unknown_ones_are_refused():
    made = resolve_algorithm("grpo", {"std": "sample", "epsilon_high": 0.28, "beta": 0.0})
    assert (
        made.advantage_options == {"std": "sample"}
        and made.loss_options == {"epsilon_high": 0.28}
        and made.beta == 0.0
    )
    k15 = resolve_algorithm("k15", {"tau": 0.3, "baseline": "log_mean_exp"})
    assert k15.loss_options["tau"] == 0.3 and k15.advantage_options == {
        "baseline": "log_mean_exp",
        "tau": 0.3,
    }
    with pytest.raises(ValueError, match="Did you mean epsilon_high"):
        resolve_algorithm("grpo", {"epsilon_hi": 1})
    with pytest.raises(ValueError, match="dotted path of an Algorithm"):
        resolve_algorithm("gropo", {})


def test_beta_goes_where_the_algorithm_has_its_kl():
    """RLOO and REINFORCE++ take it off the reward, GRPO has a term of the loss."""
    rloo = resolve_algorithm("rloo", {"beta": 0.5})
    assert rloo.advantage_options == {"beta": 0.5} and rloo.beta == 0.0 and rloo.needs_reference
    assert not resolve_algorithm("rloo", {"beta": 0.0}).needs_reference
    assert not resolve_algorithm("reinforce_pp", {"beta": 0.0}).credit.reads("policy")
    grpo = resolve_algorithm("grpo", {"beta": 0.5})
    assert grpo.beta == 0.5 and grpo.objective.reference and not grpo.credit.reads("reference")
    for name in ("rloo", "grpo"):
        with pytest.raises(ValueError, match="beta is the weight of a KL penalty and >= 0"):
            resolve_algorithm(name, {"beta": -0.1})


def test_sums_of_equal_rewards_in_another_order_are_equal():
    assert (
        group_normalised([[0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1]])
        == leave_one_out([[0.1 + 0.2, 0.3]])
        == [[0.0, 0.0]]
    )


@pytest.mark.parametrize("loss", [policy.clipped, policy.mirror_descent, policy.sapo])
def test_kl_and_entropy_go_around_any_loss(loss):
    """loss + beta mean k3 - weight mean H, tokens aggregated as the loss's own."""
    view, counts = batch([2, 3], [1.0, -1.0], ratio=[1.1, 0.9])
    entropy = torch.rand(5, generator=torch.Generator().manual_seed(4), dtype=F64)
    view = replace(view, reference_T=view.logps_T.detach() + 0.3, outputs={"entropy": entropy})
    whole = policy.objective(loss, beta=0.04, entropy_weight=0.01)
    assert whole.outputs == ("entropy",) and whole.reference
    weights = torch.ones(5, dtype=F64) / 2  # the mean over completions of their sums
    if loss is not policy.mirror_descent:  # ... of their means
        weights = torch.tensor([1 / 4] * 2 + [1 / 6] * 3, dtype=F64)
    kl = policy.kl_penalty(view)
    wanted = value(loss, view, counts) + (weights * (0.04 * kl - 0.01 * entropy)).sum()
    assert float(value(whole, view, counts)) == pytest.approx(float(wanted), abs=1e-12)
    assert torch.equal(whole(view).metrics["entropy_nats"], entropy)
    assert not resolve_algorithm("grpo", {"beta": 0.0, "entropy_weight": 0.1}).skips(
        first_update=True
    )


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_zero_advantage_means_a_zero_gradient_where_the_algorithm_says_so(name):
    algorithm = replace(ALGORITHMS[name], beta=0.0)
    zeros = torch.zeros(5, dtype=F64)
    first, _ = batch([2, 3], [0.0, 0.0])
    later, counts = batch([2, 3], [0.0, 0.0], ratio=[1.3, 0.6])
    for view, is_first in ((first, True), (later, False)):
        view = given(view, covariant=zeros + 1)
        options = {
            **algorithm.loss_options,
            **(
                {"constant": 8.0} if algorithm.loss_options.get("aggregation") == "constant" else {}
            ),
        }
        (gradient,) = torch.autograd.grad(
            value(algorithm.loss, view, counts, **options), view.logps_T
        )
        assert bool((gradient == 0).all()) == algorithm.skips(first_update=is_first)
    assert (
        not GRPO.skips(first_update=True)
        and DAPO.skips(first_update=False)
        and KIMI_K15.skips(first_update=True)
    )
