"""The check that the packed forward is the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from posttrain.models.adapters import products_in_float32
from posttrain.models.policy import PlainSequence, Policy, in_eval_mode, segment_attention
from posttrain.packing.batch import pack
from posttrain.packing.plan import plan_step
from posttrain.training.config import UserFacingError
from posttrain.types import Completion, PromptGroup


class SelfCheckError(UserFacingError):
    """The packed forward does not give the model's own log-probs."""


# Largest root-mean-square difference in nats. Rounding through 30 layers of SmolLM2-135M: 2e-6 in
# float32, 0.02 in bfloat16; a completion that sees a sibling, a shifted position or a missing logit
# transform: 0.2 and more.
SELF_CHECK_RMS_NATS = {
    torch.float64: 1e-4,
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.05,
}


SELF_CHECK_TOKENS = 256
"""Completions are checked up to here, so that the model's own forward holds few logits."""
SELF_CHECK_PROMPT_TOKENS = 1792
"""Of a longer prompt the last ones are checked. The model's own attention can hold all its scores,
in float32: 32 heads on 2,048 tokens 0.5 GB, on 16,384 tokens 34 GB."""


@torch.no_grad()
def self_check(
    policy: Policy,
    groups: Sequence[PromptGroup],
    *,
    max_tokens: int,
    compute: torch.dtype | None = None,
) -> float:
    """RMS difference (nats) between packed log-probs and the model's plain forward, one sequence at
    a time.

    Under packing.mode auto a difference is a step down (``Policy.step_down``), and the next mode is
    checked. Raises SelfCheckError when it is beyond the rounding of ``compute`` (None: the weights'
    dtype), ValueError if ``groups`` train nothing. 4-bit layers compute in float32 here, as all
    others outside of autocast. A collective where weights are sharded. The row is computed segment
    by segment (FlexAttention's kernel is compared with that in ``attention.why_not_flex``), on at
    most SELF_CHECK_PROMPT_TOKENS of a prompt and SELF_CHECK_TOKENS of a completion.
    """
    forward_mode = policy.forward_mode
    groups = [_shortened(group) for group in groups]
    plan = plan_step(
        groups,
        world_size=1,
        max_tokens=max_tokens,
        mode=forward_mode.mode,
        length_limit=forward_mode.length_limit,
    )
    device = policy.base.get_input_embeddings().weight.device
    squares: list[Tensor] = []
    worst = (0.0, "")
    limit = SELF_CHECK_RMS_NATS[compute or next(policy.parameters()).dtype]
    with in_eval_mode(policy), products_in_float32(policy), segment_attention(policy.model):
        for micro_batch in plan.ranks[0]:
            batch = pack(groups, micro_batch.parts, mode=forward_mode.mode).to(device)
            packed_T = policy(batch).logps_T
            for s, (g, k) in enumerate(batch.refs):
                plain_T = policy(PlainSequence(group=groups[g], completion=k))
                if forward_mode.mode == "single" and not squares:
                    _check_causal(policy, groups[g], k, plain_T, limit)
                difference = (packed_T[batch.sequence_T == s] - plain_T).double()
                squares.append(difference.square())
                worst = max(worst, (float(difference.abs().max()), groups[g].where))
    rms = float(torch.cat(squares).mean().sqrt())
    mode = forward_mode.mode
    if not rms <= limit and policy.step_down(f"{mode} log-probs differ by {rms:.2g} nats"):
        return self_check(policy, groups, max_tokens=max_tokens, compute=compute)
    if not rms <= limit:
        raise SelfCheckError(
            f"Self-check failed: log-probs of the packed forward ({forward_mode.mode}) differ from "
            f"the model's own by {rms:.3g} nats (rms; limit {limit:g}), most in {worst[1]} "
            f"({worst[0]:.3g}). This model does something that packing or our LM head does not "
            "know. Leave --packing.mode at auto, which steps down to the model's own forward."
        )
    return rms


def _check_causal(
    policy: Policy, group: PromptGroup, k: int, plain_T: Tensor, limit: float
) -> None:
    """Raise SelfCheckError if the model's own log-probs of a completion's first trained tokens
    change where those that follow stand in another order: it sees what it shall predict."""
    completion = group.completions[k]
    half = completion.num_trained // 2
    if not half:
        return
    end = int(completion.trained[half - 1]) + 1
    ids = np.concatenate([completion.token_ids[:end], completion.token_ids[end:][::-1]])
    turned = replace(group, completions=[replace(completion, token_ids=ids)], pairs=())
    turned_T = policy(PlainSequence(group=turned, completion=0))
    rms = float((turned_T - plain_T)[:half].double().square().mean().sqrt())
    if not rms <= limit:
        raise SelfCheckError(
            f"{type(policy.base).__name__} is not causal: log-probs of {group.where} change by "
            f"{rms:.3g} nats (rms) with the tokens that follow, so it sees what it shall predict. "
            "If its config has a switch (is_decoder, causal, attn_type), set it and save the model."
        )


def _shortened(group: PromptGroup) -> PromptGroup:
    """The same group with its prompt and completions cut; those that then train nothing go.

    Where none is left, one completion is checked from its first trained token on, and what stands
    before belongs to the prompt.
    """

    def cut(completion: Completion, start: int) -> Completion:
        part = slice(start, start + SELF_CHECK_TOKENS)
        return Completion(
            token_ids=completion.token_ids[part], loss_mask=completion.loss_mask[part]
        )

    prompt = group.prompt_ids
    trained = [c for c in (cut(c, 0) for c in group.completions) if c.num_trained]
    if not trained:
        whole = next(c for c in group.completions if c.num_trained)
        start = int(whole.trained[0])
        prompt = np.concatenate([prompt, whole.token_ids[:start]])
        trained = [cut(whole, start)]
    prompt = prompt[-SELF_CHECK_PROMPT_TOKENS:]
    return replace(group, prompt_ids=prompt, completions=trained, pairs=())
