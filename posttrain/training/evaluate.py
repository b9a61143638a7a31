"""Held-out loss through the packed forward, greedy answers, and the check that the packed forward is the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.policy import Policy, plain_attention
from posttrain.packing.batch import GroupPart, PackingMode, pack
from posttrain.packing.plan import plan_step
from posttrain.training.config import UserFacingError
from posttrain.types import PromptGroup

GROUPS_PER_PLAN = 256


@torch.no_grad()
def evaluate_loss(
    accelerator: Any,
    policy: nn.Module,
    groups: Sequence[PromptGroup],
    *,
    mode: PackingMode,
    max_tokens: int,
    length_limit: int | None = None,
) -> dict[str, float]:
    """{"eval_loss": mean negative log-prob per trained token (nats), "eval_tokens"}, over all groups and ranks."""
    was_training = policy.training
    policy.eval()
    totals = torch.zeros(2, dtype=torch.float64 if accelerator.device.type != "mps" else torch.float32)
    totals = totals.to(accelerator.device)
    for at in range(0, len(groups), GROUPS_PER_PLAN):
        part = [groups[i] for i in range(at, min(at + GROUPS_PER_PLAN, len(groups)))]
        plan = plan_step(part, world_size=accelerator.num_processes, max_tokens=max_tokens, mode=mode, length_limit=length_limit)
        for micro_batch in plan.ranks[accelerator.process_index]:
            logps_T = policy(pack(part, micro_batch.parts, mode=mode).to(accelerator.device))
            if not micro_batch.is_dummy:
                totals += torch.stack([-logps_T.sum().to(totals), torch.tensor(logps_T.shape[0]).to(totals)])
    policy.train(was_training)
    nll, tokens = accelerator.reduce(totals, reduction="sum").tolist()
    return {"eval_loss": nll / tokens, "eval_tokens": int(tokens)}


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Greedy completions of tokenised prompts, decoded without special tokens, in the order given.

    Prompts are batched by length with left padding; ``advance(n)`` is called after each batch (a progress bar).
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, str] = {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    with plain_attention(model):
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), width), pad, device=device)
            mask = torch.zeros_like(ids)
            for r, i in enumerate(rows):
                ids[r, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]), device=device)
                mask[r, width - len(prompts[i]) :] = 1
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                use_cache=True,
            )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            answers.update(zip(rows, texts, strict=True))
            if advance is not None:
                advance(len(rows))
    model.train(was_training)
    yield from (answers[i] for i in range(len(prompts)))


class SelfCheckError(UserFacingError):
    """The packed forward does not give the model's own log-probs."""


# Largest root-mean-square difference in nats. Rounding through 30 layers of SmolLM2-135M: 2e-6 in float32, 0.02 in bfloat16;
# a completion that sees a sibling, a shifted position or a missing logit transform: 0.2 and more.
SELF_CHECK_RMS_NATS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@torch.no_grad()
def self_check(policy: Policy, groups: Sequence[PromptGroup]) -> float:
    """RMS difference (nats) between packed log-probs and the model's plain forward, one sequence at a time.

    Raises SelfCheckError when it is beyond the rounding of the weights' dtype.
    """
    mode = policy.forward_mode.mode
    was_training = policy.training
    policy.eval()
    device = next(policy.parameters()).device
    trained = [tuple(k for k, c in enumerate(g.completions) if c.num_trained) for g in groups]
    parts = [GroupPart(group=i, completions=ks) for i, ks in enumerate(trained) if ks]
    rows = [parts] if mode != "single" else [
        [GroupPart(group=part.group, completions=(k,))] for part in parts for k in part.completions
    ]  # fmt: skip
    squares, worst = [], (0.0, "")
    for row in rows:
        batch = pack(groups, row, mode=mode).to(device)
        packed_T = policy(batch)
        for s, (g, k) in enumerate(batch.refs):
            difference = (packed_T[batch.sequence_T == s] - _plain(policy, groups[g], k, device)).double()
            squares.append(difference.square())
            worst = max(worst, (float(difference.abs().max()), groups[g].where))
    policy.train(was_training)
    rms = float(torch.cat(squares).mean().sqrt())
    limit = SELF_CHECK_RMS_NATS[next(policy.parameters()).dtype]
    if not rms <= limit:
        raise SelfCheckError(
            f"Self-check failed: log-probs of the packed forward ({mode}) differ from the model's own by {rms:.3g} nats (rms; "
            f"limit {limit:g}), most in {worst[1]} ({worst[0]:.3g}). This model does something between its layers and its "
            "logits that packing does not know. Train with --packing.mode single, and report the model."
        )
    return rms


def _plain(policy: Policy, group: PromptGroup, k: int, device: torch.device) -> Tensor:
    """Log-probs of one completion's trained tokens through the model as transformers ships it."""
    completion = group.completions[k]
    last = max(i for i, m in enumerate(completion.loss_mask) if m)
    ids = torch.tensor([*group.prompt_ids, *completion.token_ids[: last + 1]], device=device)
    with plain_attention(policy.model):
        logits = policy.model(input_ids=ids[None, :-1], use_cache=False).logits[0]
    logits = logits[-(last + 1) :]
    logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    logps = logps.gather(1, ids[-(last + 1) :, None]).squeeze(1)
    mask = torch.tensor([bool(m) for m in completion.loss_mask[: last + 1]], device=device)
    return logps[mask]
