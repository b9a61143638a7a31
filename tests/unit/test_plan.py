"""Token-budget micro-batches: every trained completion exactly once, no row over budget, ranks
level, errors that name rows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.packing.batch import pack
from posttrain.packing.plan import PackingConfig, count_units, plan_step, row_tokens
from posttrain.types import Completion, PromptGroup


@st.composite
def batches(draw):
    """Groups of any shape, some completions without a trained token."""
    groups = []
    for row in range(draw(st.integers(1, 12))):
        completions = []
        for _ in range(draw(st.integers(1, 5))):
            n = draw(st.integers(1, 9))
            completions.append(
                Completion(
                    token_ids=list(range(n)),
                    loss_mask=draw(st.lists(st.booleans(), min_size=n, max_size=n)),
                )
            )
        prompt = list(range(draw(st.integers(1, 9))))
        groups.append(
            PromptGroup(prompt_ids=prompt, completions=completions, meta={"file": "f", "row": row})
        )
    return groups


@settings(max_examples=300, deadline=None)
@given(
    groups=batches(),
    world_size=st.integers(1, 4),
    max_tokens=st.integers(18, 60),
    mode=st.sampled_from(["shared", "packed", "single"]),
    coupled=st.booleans(),
    length_limit=st.sampled_from([None, 8]),
)
def test_every_plan_trains_everything_once_within_the_budget(
    groups, world_size, max_tokens, mode, coupled, length_limit
):
    if count_units(groups).tokens == 0:
        with pytest.raises(ValueError, match="at least one trained token"):
            plan_step(groups, world_size=world_size, max_tokens=max_tokens, mode=mode)
        return
    plan = plan_step(
        groups,
        world_size=world_size,
        max_tokens=max_tokens,
        mode=mode,
        coupled=coupled,
        length_limit=length_limit,
    )
    assert len(plan.ranks) == world_size and len({len(rank) for rank in plan.ranks}) == 1
    seen = []
    home: dict[int, set[int]] = {}
    for rank, micro_batches in enumerate(plan.ranks):
        for m in micro_batches:
            batch = pack(groups, m.parts, mode=mode)
            assert batch.input_ids_L.shape[0] == m.num_tokens <= max_tokens
            assert max(batch.position_ids_L.tolist()) < 18
            if mode == "single":
                assert len(batch.refs) == 1
            if length_limit is not None:
                long = {
                    int(batch.layout.length_with_prefix(i)) > length_limit
                    for i in range(len(batch.layout.lengths))
                    if batch.layout.prefixes[i] >= 0 or mode != "shared"
                }
                assert len(long) <= 1
            if not m.is_dummy:
                seen += batch.refs
                if m.coupled_group is not None:
                    home.setdefault(m.coupled_group, set()).add(rank)
    trained = [
        (g, k)
        for g, group in enumerate(groups)
        for k, c in enumerate(group.completions)
        if c.num_trained
    ]
    assert sorted(seen) == trained
    assert all(len(ranks) == 1 for ranks in home.values()), (
        "parts of a coupled group stay on one rank"
    )


def test_what_no_trained_token_needs_is_not_computed():
    """The last trained token is only a target; what follows it is nothing at all."""
    group = PromptGroup(
        prompt_ids=[1, 2], completions=[Completion(token_ids=[3, 4, 5, 6], loss_mask=[1, 1, 0, 0])]
    )
    assert row_tokens(group, mode="shared") == 3


def test_prompts_are_computed_once():
    group = PromptGroup(
        prompt_ids=[1] * 10, completions=[Completion(token_ids=[3] * 4, loss_mask=[1] * 4)] * 8
    )
    assert row_tokens(group, mode="shared") == 10 + 8 * 3
    assert row_tokens(group, mode="packed") == 8 * 13


def test_a_completion_over_budget_is_named():
    group = PromptGroup(
        prompt_ids=[1] * 10,
        completions=[Completion(token_ids=[3] * 9, loss_mask=[1] * 9)],
        meta={"file": "a.jsonl", "row": 7},
    )
    with pytest.raises(
        ValueError, match=r"18 tokens in a.jsonl:7, budget 17. Raise --packing.max_tokens"
    ):
        plan_step([group], world_size=1, max_tokens=17, mode="shared")


def test_ranks_are_balanced():
    """64 sequences of 10 to 73 tokens on 4 ranks: the heaviest rank has at most 5 % more tokens
    than the lightest."""
    groups = [
        PromptGroup(
            prompt_ids=[1] * 5, completions=[Completion(token_ids=[2] * n, loss_mask=[1] * n)]
        )
        for n in range(6, 70)
    ]
    plan = plan_step(groups, world_size=4, max_tokens=300, mode="shared")
    loads = [sum(m.num_tokens for m in rank) for rank in plan.ranks]
    assert max(loads) <= 1.05 * min(loads)
    assert not any(m.is_dummy for rank in plan.ranks for m in rank)


@pytest.mark.parametrize("field", ["max_tokens", "logits_chunk"])
def test_budgets_are_positive(field):
    with pytest.raises(ValueError, match=f"packing.{field}"):
        PackingConfig(**{field: 0})
