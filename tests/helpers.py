"""Tiny random models, random groups, and the slow obvious computation that the packed step is
compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.types import Completion, PromptGroup

VOCAB = 97


def tiny_gpt2(*, dropout: float = 0.0, seed: int = 0, tied: bool = True) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    return GPT2LMHeadModel(config)


def tiny_llama(*, seed: int = 0, **overrides: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


def random_groups(
    count: int,
    *,
    sizes: Sequence[int] = (1, 2, 4),
    seed: int = 0,
    max_prompt: int = 12,
    max_completion: int = 10,
) -> list[PromptGroup]:
    """Groups of 1, 2, 4, ... completions with holes in their loss masks; every completion trains at
    least one token."""
    rng = random.Random(seed)
    groups = []
    for row in range(count):
        completions = []
        for _ in range(sizes[row % len(sizes)]):
            length = rng.randint(1, max_completion)
            mask = [rng.random() < 0.7 for _ in range(length)]
            mask[rng.randrange(length)] = True
            completions.append(
                Completion(token_ids=[rng.randrange(VOCAB) for _ in range(length)], loss_mask=mask)
            )
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, max_prompt))]
        groups.append(
            PromptGroup(
                prompt_ids=prompt, completions=completions, meta={"file": "random", "row": row}
            )
        )
    return groups


def plain_logps(model: nn.Module, group: PromptGroup, k: int) -> Tensor:
    """Log-probs of the trained tokens of one completion through the model's own forward: one
    sequence, no packing."""
    completion = group.completions[k]
    ids = torch.tensor([[*group.prompt_ids, *completion.token_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    mask = torch.tensor([bool(m) for m in completion.loss_mask])
    return logps[len(group.prompt_ids) - 1 :][mask]


def plain_states(model: nn.Module, group: PromptGroup, k: int) -> tuple[Tensor, Tensor]:
    """(entropy, hidden states) at the positions that predict the trained tokens of one completion,
    by the model's own forward."""
    completion = group.completions[k]
    ids = torch.tensor([[*group.prompt_ids, *completion.token_ids]])
    output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    mask = torch.tensor([bool(m) for m in completion.loss_mask])
    start = len(group.prompt_ids) - 1
    logits, hidden = (x[0, start:-1][mask] for x in (output.logits, output.hidden_states[-1]))
    logps = torch.log_softmax(logits, -1)
    return -(logps.exp() * logps).sum(-1), hidden


def reference_gradient(
    model: nn.Module, groups: Sequence[PromptGroup], value: Callable[[list[list[Tensor]]], Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient by the obvious way: every sequence alone,
    ``value(logps[group][completion])``, one backward."""
    model.zero_grad()
    logps = [[plain_logps(model, g, k) for k in range(len(g.completions))] for g in groups]
    loss = value(logps)
    loss.backward()
    gradient = {
        n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return float(loss.detach()), gradient


def token_mean(logps: list[list[Tensor]]) -> Tensor:
    """-sum of log-probs / number of trained tokens."""
    flat = torch.cat([lp for group in logps for lp in group])
    return -flat.sum() / flat.numel()


def max_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference over all parameters; the two must have the same ones."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
