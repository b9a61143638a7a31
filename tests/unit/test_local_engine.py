"""The engine in this process: the model's own greedy tokens, the trainer's log-probs, and nothing
depends on the batch."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from scipy import stats

from posttrain.data.prompts import Prompt
from posttrain.models.policy import Policy
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig
from posttrain.rl.rollouts import RolloutBuffer, request_of
from posttrain.rollout.engine import Request, SamplingConfig
from posttrain.rollout.local import LocalConfig, LocalEngine
from posttrain.types import Completion, PromptGroup, Ragged
from tests.helpers import tiny_llama

FAMILIES = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "gpt2",
    "phi3",
    "granite",
    "cohere",
    "olmo2",
]


def tiny(family: str, dtype=torch.float64):
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    if family == "gpt2":
        shape = dict(
            vocab_size=61,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    else:
        shape |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if family in ("gemma2", "gemma3"):
        shape |= dict(head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    name = {"gemma3": "gemma3_text"}.get(family, family)
    config = AutoConfig.for_model(name, **shape)
    if family == "mistral":
        config.sliding_window = 5
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def engine_of(model, *, max_rows=64, stop_ids=(), compute=None, max_tokens=400):
    policy = Policy(model, PackingConfig(max_tokens=max_tokens))
    return policy, LocalEngine(
        policy,
        compute=compute or next(model.parameters()).dtype,
        stop_ids=stop_ids,
        config=LocalConfig(max_rows=max_rows),
    )


def requests(count=5, samples=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        n = int(torch.randint(1, 14, (1,), generator=g))
        ids = tuple(torch.randint(3, 61, (n,), generator=g).tolist())
        made.append(Request(prompt_ids=ids, seeds=tuple(1000 * i + k for k in range(samples))))
    return made


def tokens(drawn):
    return [[d.token_ids for d in row] for row in drawn]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family):
    model = tiny(family)
    wanted = []
    for r in requests():
        out = model.generate(
            input_ids=torch.tensor([r.prompt_ids]),
            attention_mask=torch.ones(1, len(r.prompt_ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=7,
            pad_token_id=0,
        )
        wanted.append(tuple(out[0, len(r.prompt_ids) :].tolist()))
    _, engine = engine_of(model, stop_ids=[7], max_rows=4)
    drawn = engine.generate(
        [Request(prompt_ids=r.prompt_ids, seeds=(0,)) for r in requests()],
        SamplingConfig(max_tokens=12, temperature=0),
    )
    assert [d.token_ids for (d,) in drawn] == wanted
    assert all(d.finish_reason == ("stop" if d.token_ids[-1] == 7 else "length") for (d,) in drawn)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_samples_depend_on_neither_rows_nor_order(family):
    model = tiny(family)
    sampling = SamplingConfig(max_tokens=16, temperature=1.2)
    wanted = engine_of(model, max_rows=64, stop_ids=range(3, 9))[1].generate(requests(), sampling)
    for max_rows in (1, 2, 5):
        assert tokens(
            engine_of(model, max_rows=max_rows, stop_ids=range(3, 9))[1].generate(
                requests(), sampling
            )
        ) == tokens(wanted)
    backwards = engine_of(model, stop_ids=range(3, 9), max_tokens=20)[1].generate(
        requests()[::-1], sampling
    )[::-1]
    assert tokens(backwards) == tokens(wanted)
    assert (
        len({len(d.token_ids) for row in wanted for d in row}) > 2
    )  # of different lengths, so that slots were handed on


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5, "temperature": 1.3}, {"min_p": 0.1}],
)
def test_log_probs_are_the_trainers(options):
    model = tiny("llama")
    policy, engine = engine_of(model, stop_ids=[7])
    sampling = SamplingConfig(max_tokens=10, **options)
    drawn = engine.generate(requests(), sampling)
    policy = Policy(model, PackingConfig(), temperature=sampling.temperature)
    groups = [
        PromptGroup(
            prompt_ids=r.prompt_ids,
            completions=[
                Completion(
                    token_ids=d.token_ids,
                    loss_mask=[1] * len(d.token_ids),
                    columns={} if d.kept_ids is None else {"kept_ids": Ragged.of(d.kept_ids)},
                )
                for d in row
            ],
            pairs=(),
        )
        for r, row in zip(requests(), drawn, strict=True)
    ]
    batch = pack(
        groups,
        [GroupPart(group=g, completions=(0, 1, 2)) for g in range(len(groups))],
        mode="shared",
    )
    with torch.no_grad():
        trainer = policy(batch).logps_T
    sampler = torch.tensor([p for row in drawn for d in row for p in d.logps], dtype=torch.float64)
    assert torch.allclose(trainer, sampler, atol=1e-10)
    assert (drawn[0][0].kept_ids is None) == (not sampling.truncates)


def test_a_partial_rollout_continues_as_if_it_had_never_stopped():
    """Budget B, length l: ceil(l / B) calls give the tokens of one call."""
    model = tiny("llama")
    _, engine = engine_of(model, stop_ids=[7])
    whole = engine.generate(requests(), SamplingConfig(max_tokens=17))
    state = [[() for _ in r.seeds] for r in requests()]
    open_ones = {(i, k) for i, r in enumerate(requests()) for k in range(len(r.seeds))}
    calls = 0
    while open_ones:
        calls += 1
        asked, where = [], []
        for i, r in enumerate(requests()):
            ks = [k for k in range(len(r.seeds)) if (i, k) in open_ones]
            if ks:
                prefixes = tuple(state[i][k] for k in ks) if any(state[i][k] for k in ks) else ()
                asked.append(
                    Request(
                        prompt_ids=r.prompt_ids,
                        seeds=tuple(r.seeds[k] for k in ks),
                        prefixes=prefixes,
                    )
                )
                where.append([(i, k) for k in ks])
        for places, row in zip(
            where,
            engine.generate(asked, SamplingConfig(max_tokens=17, budget_tokens=5)),
            strict=True,
        ):
            for (i, k), d in zip(places, row, strict=True):
                state[i][k] += d.token_ids
                if d.finish_reason != "budget":
                    open_ones.discard((i, k))
    assert calls == 4 and state == [[d.token_ids for d in row] for row in whole]


def test_the_training_model_is_left_as_it_was():
    model = tiny("llama", torch.float32)
    policy, engine = engine_of(model, compute=torch.bfloat16)
    policy.train()
    model.model.layers[0].eval()
    group = PromptGroup(
        prompt_ids=(3, 4), completions=[Completion(token_ids=(5, 6), loss_mask=(1, 1))]
    )
    batch = pack([group], [GroupPart(group=0, completions=(0,))], mode="shared")

    def trained():
        return [m.training for m in policy.modules()], policy(batch).logps_T.tolist()

    before = trained()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    engine.generate(requests(), SamplingConfig(max_tokens=5))
    assert trained() == before
    assert all(
        p.dtype == torch.float32 and torch.equal(p, weights[n]) for n, p in model.named_parameters()
    )
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("lora", [False, True])
def test_refresh_takes_over_new_weights_and_not_before(lora):
    model = tiny("llama", torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
    policy, engine = engine_of(model, compute=torch.bfloat16)
    sampling = SamplingConfig(max_tokens=6, temperature=0)
    before = engine.generate(requests(), sampling)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ("proj" in name or not lora):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.std())
    engine.refresh(3)
    after = engine.generate(requests(), sampling)
    assert after != before and after[0][0].policy_version == 3
    fresh = engine_of(model, compute=torch.bfloat16)[1]
    fresh.refresh(3)
    assert fresh.generate(requests(), sampling) == after


def test_what_cannot_be_sampled_says_why():
    model = tiny("llama")
    _, engine = engine_of(model)
    with pytest.raises(ValueError, match="knows 256 positions"):
        engine.generate(requests(), SamplingConfig(max_tokens=300))
    policy = Policy(model, PackingConfig(mode="single"))
    with pytest.raises(ValueError, match="Use a vLLM server"):
        LocalEngine(policy, compute=torch.float64, stop_ids=[])
    small = LocalEngine(
        Policy(model, PackingConfig()),
        compute=torch.float64,
        stop_ids=[],
        config=LocalConfig(kv_cache_gb=1e-6),
    )
    with pytest.raises(ValueError, match="Raise kv_cache_gb"):
        small.generate(requests(), SamplingConfig(max_tokens=10))


def exact_distribution(model, prompt, sampling, *, stop):
    """{completion of at most two tokens: its probability}, by enumeration."""

    def following(ids):
        with torch.no_grad():
            p = torch.softmax(
                model(input_ids=torch.tensor([ids])).logits[0, -1] / sampling.temperature, 0
            ).tolist()
        order = sorted(range(len(p)), key=lambda v: -p[v])
        kept = order[: sampling.top_k or len(order)]
        if (
            sampling.top_p < 1
        ):  # the smallest set of likeliest tokens with at least this probability
            kept = kept[
                : next(
                    n for n in range(1, len(p) + 1) if sum(p[v] for v in kept[:n]) >= sampling.top_p
                )
            ]
        total = sum(p[v] for v in kept)
        return {v: p[v] / total for v in kept}

    found = {}
    for a, p_a in following(list(prompt)).items():
        if a == stop:
            found[(a,)] = p_a
        else:
            found |= {(a, b): p_a * p_b for b, p_b in following([*prompt, a]).items()}
    return found


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "top_k": 4}]
)
def test_completions_follow_the_exact_distribution(options):
    """Chi-square over all completions of two tokens, of which a stop token ends some after the
    first; two prompts in one batch."""
    count, prompts = 8000, [(3, 4, 5), (6,)]
    model = tiny_llama(vocab_size=7, initializer_range=0.15).double().eval()
    plain = copy.deepcopy(model)
    sampling = SamplingConfig(max_tokens=2, **options)
    _, engine = engine_of(model, stop_ids=[2], max_rows=1000)
    asked = [
        Request(prompt_ids=p, seeds=tuple(range(i * count, (i + 1) * count)))
        for i, p in enumerate(prompts)
    ]
    for prompt, row in zip(prompts, engine.generate(asked, sampling), strict=True):
        exact = exact_distribution(plain, prompt, sampling, stop=2)
        seen = Counter(d.token_ids for d in row)
        assert (
            sum(exact.values()) == pytest.approx(1) and set(seen) <= set(exact) and len(exact) > 8
        )
        assert all(
            sum(d.logps) == pytest.approx(math.log(exact[d.token_ids]), abs=1e-9) for d in row[:500]
        )
        assert all(d.finish_reason == ("stop" if d.token_ids[-1] == 2 else "length") for d in row)
        big = [c for c, p in exact.items() if p * count >= 5]
        observed = [*(seen[c] for c in big), count - sum(seen[c] for c in big)]
        expected = [*(exact[c] * count for c in big), (1 - sum(exact[c] for c in big)) * count]
        if expected[-1] < 1e-6:
            observed, expected = observed[:-1], expected[:-1]
        assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranks_together_draw_bit_for_bit_what_one_draws(family):
    """The share of each of 2 and 3 ranks in its own engine; with budgets, so that completions are
    continued."""
    prompts = [Prompt(ids=r.prompt_ids, sample={}) for r in requests(count=7)]
    model = tiny(family)
    sampling = SamplingConfig(max_tokens=12, budget_tokens=5, temperature=1.2)

    def draw_of(ranks):
        engines = [
            engine_of(copy.deepcopy(model), max_rows=5, stop_ids=range(3, 12))[1]
            for _ in range(ranks)
        ]
        buffer, finished = RolloutBuffer(prompts, ranks=ranks), []
        buffer.begin(range(len(prompts)), iteration=0, group_size=3, seed=4)
        while buffer.groups:
            for rank, engine in enumerate(engines):
                wanted = [
                    (group, [t for t in group.trajectories if t.finish_reason is None])
                    for group in buffer.of_rank(rank)
                ]
                rows = engine.generate([request_of(*one) for one in wanted], sampling)
                for (_, open_ones), row in zip(wanted, rows, strict=True):
                    for trajectory, drawn in zip(open_ones, row, strict=True):
                        trajectory.extend(drawn)
            finished += buffer.take_finished()
        counts = Counter(group.rank for group in finished)
        assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == ranks
        return [t for group in sorted(finished, key=lambda g: g.index) for t in group.trajectories]

    whole = draw_of(1)
    assert len({len(t.token_ids) for t in whole}) > 3 and len({len(t.segments) for t in whole}) > 2
    for ranks in (2, 3):
        for one, other in zip(whole, draw_of(ranks), strict=True):
            assert list(one.token_ids) == list(other.token_ids)
            assert (one.segments, one.finish_reason) == (other.segments, other.finish_reason)
            assert other.logps == pytest.approx(one.logps, abs=1e-12)
