"""The same rollouts and advantages through TRL's GRPO loss: value and gradient to 1e-12, for every
loss type it shares with us.

TRL's `cispo` takes its cap from epsilon_high and its `dapo` denominator from num_items_in_batch,
the tokens of the batch.
"""

from __future__ import annotations

import copy

import pytest
import torch

from posttrain.losses import policy as losses
from posttrain.losses.reduce import reduce_term
from posttrain.models.policy import Policy
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig, count_units
from posttrain.rl.algorithms import resolve_algorithm
from posttrain.types import Completion, Loss, PromptGroup
from tests.helpers import tiny_gpt2
from tests.tiny import byte_tokenizer

PROMPTS = [[5, 6, 7, 8], [20, 21]]
COMPLETIONS = [
    [[9, 10, 11], [12, 13, 14, 15, 16, 17], [18]],
    [[22, 23, 24, 25], [26, 27], [28, 29, 30]],
]
REWARDS = [[1.0, 0.0, 0.3], [0.0, 0.5, 1.0]]
TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=8,
        temperature=TEMPERATURE,
        beta=0.0,
    )
    model = tiny_gpt2().double()
    made = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=byte_tokenizer(),
    )
    made.current_gradient_accumulation_steps = 1
    assert (config.sapo_temperature_pos, config.sapo_temperature_neg) == (1.0, 1.05), "as ours"
    return made


def noise(values, seed):
    g = torch.Generator().manual_seed(seed)
    return [v + 0.4 * float(torch.randn((), generator=g)) for v in values]


def old_and_reference(model):
    """Per token: log-probs of slightly different policies, so that some ratios are clipped."""
    with torch.no_grad():
        batch, logps_T = forward(
            Policy(copy.deepcopy(model), PackingConfig(), temperature=TEMPERATURE), groups()
        )
    parts = [logps_T[batch.sequence_T == s].tolist() for s in range(len(batch.refs))]
    return [noise(p, 10 + s) for s, p in enumerate(parts)], [
        noise(p, 50 + s) for s, p in enumerate(parts)
    ]


def groups(advantages=None, old=None):
    made, s = [], 0
    for g, prompt in enumerate(PROMPTS):
        completions = []
        for k, ids in enumerate(COMPLETIONS[g]):
            completions.append(
                Completion(
                    token_ids=ids,
                    loss_mask=[1] * len(ids),
                    columns={
                        "advantage": 0.0 if advantages is None else advantages[g][k],
                        **({} if old is None else {"proximal_logps": old[s]}),
                    },
                )
            )
            s += 1
        made.append(PromptGroup(prompt_ids=prompt, completions=completions, pairs=()))
    return made


def forward(policy, rows):
    batch = pack(rows, [GroupPart(group=g, completions=(0, 1, 2)) for g in range(2)], mode="shared")
    return batch, policy(batch).logps_T


def padded(rows, width, left=False, value=0.0):
    fill = [[value] * (width - len(r)) for r in rows]
    made = torch.tensor(
        [f + list(r) if left else list(r) + f for r, f in zip(rows, fill, strict=True)],
        dtype=torch.float64,
    )
    return made if isinstance(value, float) else made.long()


CASES = [
    ("grpo", {}, "grpo", {}),
    ("grpo", {"beta": 0.04}, "grpo", {"beta": 0.04}),
    (
        "grpo",
        {"beta": 0.04, "use_bias_correction_kl": True},
        "grpo",
        {"beta": 0.04, "kl_estimator": "k3_corrected"},
    ),
    ("grpo", {"delta": 1.25}, "grpo", {"ceiling": 1.25}),
    ("dapo", {"epsilon_high": 0.28}, "dapo", {}),
    ("bnpo", {}, "grpo", {"aggregation": "token_mean"}),
    ("dr_grpo", {}, "dr_grpo", {"constant": 8.0, "std": "population"}),
    ("cispo", {"epsilon_high": 1.1}, "cispo", {"cap": 1.1}),
    (
        "grpo",
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        "gspo",
        {},
    ),
    # TRL keeps the slopes in float32 (trl 1.16, grpo_trainer.py, line 3122), where 1.05 is not exact
    ("sapo", {"sapo_temperature_neg": 1.0625}, "sapo", {"tau_negative": 1.0625}),
    ("vespo", {}, "vespo", {}),
]


@pytest.mark.parametrize(
    ("loss_type", "settings", "name", "options"), CASES, ids=lambda v: str(v)[:40]
)
@pytest.mark.parametrize("updates", ["first", "later"])
def test_value_and_gradient(trainer, loss_type, settings, name, options, updates):
    options = {"beta": 0.0, **options}
    algorithm = resolve_algorithm(name, options)
    advantages = algorithm.advantages(REWARDS, **algorithm.advantage_options)
    old, reference = old_and_reference(trainer.model)
    flat = [ids for row in COMPLETIONS for ids in row]
    width = max(map(len, flat))
    inputs = {
        "prompt_ids": padded([p for p in PROMPTS for _ in range(3)], 4, left=True, value=0),
        "prompt_mask": padded(
            [[1] * len(p) for p in PROMPTS for _ in range(3)], 4, left=True, value=0
        ),
        "completion_ids": padded(flat, width, value=0),
        "completion_mask": padded([[1] * len(ids) for ids in flat], width, value=0),
        "advantages": torch.tensor([a for row in advantages for a in row], dtype=torch.float64),
        "num_items_in_batch": torch.tensor(float(sum(map(len, flat)))),
        "ref_per_token_logps": padded(reference, width),
    }
    if updates == "later":
        inputs["old_per_token_logps"] = padded(old, width)
    theirs_loss, theirs = gradient_of_trl(trainer, inputs, loss_type, settings)

    policy = Policy(copy.deepcopy(trainer.model), PackingConfig(), temperature=TEMPERATURE)
    rows = groups(advantages, old if updates == "later" else None)
    batch, logps_T = forward(policy, rows)
    view = batch.with_logps(
        logps_T, reference_T=torch.tensor([v for r in reference for v in r], dtype=torch.float64)
    )
    terms = algorithm.objective(view).terms
    loss = sum(reduce_term(term, view, count_units(rows)) for term in terms)
    assert float(loss.detach()) == pytest.approx(theirs_loss, abs=1e-12)
    loss.backward()
    for (n, p), q in zip(policy.model.named_parameters(), theirs, strict=True):
        assert torch.allclose(p.grad, q, atol=1e-12, rtol=0), (n, float((p.grad - q).abs().max()))


def plain_head(model):
    """The model as TRL's loss calls it, with TRL's log-softmax of its logits in float64. TRL's own
    fused head adds in float32 whatever the model's dtype (trl 1.16, kernels/chunked_logprob.py,
    lines 340 to 346 and 407 to 412). Positions are those without padding."""
    from trl.trainer.utils import FusedCausalLMOutput, selective_log_softmax_and_entropy

    def forward(input_ids, attention_mask, labels, fused_lm_head):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions
        ).logits
        log_probs, entropy = selective_log_softmax_and_entropy(
            logits[:, :-1], labels[:, 1:].clamp(min=0), temperature=TEMPERATURE
        )
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy)

    return forward


def gradient_of_trl(trainer, inputs, loss_type, settings):
    on_args = {"delta": None, "use_bias_correction_kl": False, "sapo_temperature_neg": 1.05}
    wanted = {
        "loss_type": loss_type,
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
    }
    for name, value in {**on_args, **settings}.items():
        if name in on_args:
            setattr(trainer.args, name, value)
    for name, value in {**wanted, **settings}.items():
        if name in wanted:
            setattr(trainer, name, value)
    trainer.args.steps_per_generation = 1
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(plain_head(trainer.model), inputs)
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in trainer.model.parameters()]


def test_nothing_of_ours_is_left_out():
    """Losses without a counterpart in TRL's GRPO: k1.5's, and plain REINFORCE (which its RLOO
    trainer has, with clipping)."""
    mine = {f for f in vars(losses).values() if isinstance(f, Loss)}
    compared = {resolve_algorithm(name, {}).loss for _, _, name, _ in CASES}
    assert {f.__name__ for f in mine - compared} == {
        "mirror_descent",
        "reinforce",
        "gmpo",
        "clip_cov",
        "kl_cov",
        "entropy_bonus",
    }
