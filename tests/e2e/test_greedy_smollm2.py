"""SmolLM2-135M in float32: 64 prompts, greedy, token by token what transformers' generate gives."""

from __future__ import annotations

import torch

from posttrain.data import stop_token_ids
from posttrain.models.load import ModelConfig, load_model, load_tokenizer
from posttrain.models.policy import Policy, plain_attention
from posttrain.packing.plan import PackingConfig
from posttrain.rollout.engine import Request, SamplingConfig
from posttrain.rollout.local import LocalConfig, LocalEngine

NEW_TOKENS = 6
TIE = 1e-4
"""Where the two best logits are closer than this, either may come first."""
SUBJECTS = [
    "a river",
    "seven and five",
    "the moon",
    "a short poem",
    "bread",
    "the word green",
    "winter",
    "a list of three fruits",
]
TASKS = [
    "Tell me about {}.",
    "What is {}?",
    "Repeat: {}",
    "Write one line on {}",
    "Why {}?",
    "Is {} good? Yes or no.",
    "Translate {} to French.",
    "Say the opposite of {}",
]


def test_greedy_tokens_are_those_of_generate():
    tokenizer = load_tokenizer(ModelConfig())
    policy = Policy(load_model(ModelConfig(), dtype=torch.float32), PackingConfig()).eval()
    stop_ids = stop_token_ids(tokenizer)
    chats = [
        [{"role": "user", "content": task.format(subject)}]
        for task in TASKS
        for subject in SUBJECTS
    ]
    prompts = [
        tokenizer.apply_chat_template(
            c, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for c in chats
    ]
    engine = LocalEngine(
        policy, compute=torch.float32, stop_ids=stop_ids, config=LocalConfig(max_rows=24)
    )
    drawn = engine.generate(
        [Request(prompt_ids=tuple(p), seeds=(0,)) for p in prompts],
        SamplingConfig(max_tokens=NEW_TOKENS, temperature=0.0),
    )
    identical = 0
    with plain_attention(policy.model), torch.no_grad():
        for length in {len(p) for p in prompts}:  # equally long prompts: no padding
            rows = [
                (p, list(ours.token_ids))
                for p, (ours,) in zip(prompts, drawn, strict=True)
                if len(p) == length
            ]
            ids = torch.tensor([p for p, _ in rows])
            out = policy.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=stop_ids,
            )
            for (prompt, ours), theirs in zip(rows, out[:, length:].tolist(), strict=True):
                ends = [i + 1 for i, token in enumerate(theirs) if token in stop_ids]
                theirs = theirs[: ends[0]] if ends else theirs
                if theirs == ours:
                    identical += 1
                    continue
                at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
                best = (
                    policy.model(torch.tensor([[*prompt, *theirs[:at]]]))
                    .logits[0, -1]
                    .topk(2)
                    .values
                )
                assert best[0] - best[1] < TIE, (prompt, at)
    assert len(prompts) == 64 and identical >= 60
