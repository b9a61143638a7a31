"""What the engine in the training process draws, against transformers' generate and against itself
in other batches.

    python benchmarks/rollout_checks.py --rows gsm8k_train_2000.jsonl.gz

`greedy`: tokens of 64 GSM8K questions in float32, equal to generate's token for token; where they
part, how far apart the two best logits are. `flips`: the share of sampled tokens that are others
when 16 completions are drawn at once instead of one by one, up to the first that differs in each.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import torch

from posttrain.data import read_rows, stop_token_ids
from posttrain.models.load import ModelConfig, load_model, load_tokenizer
from posttrain.models.policy import Policy, plain_attention
from posttrain.packing.plan import PackingConfig
from posttrain.rollout.engine import Request, SamplingConfig
from posttrain.rollout.local import LocalConfig, LocalEngine


def questions(path: str, count: int, tokenizer: Any) -> list[tuple[int, ...]]:
    """Chat prompts as token ids."""
    rows = random.Random(0).sample([row.values["question"] for row in read_rows(path)], count)
    chats = [[{"role": "user", "content": question}] for question in rows]
    return [
        tuple(
            tokenizer.apply_chat_template(
                c, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
        for c in chats
    ]


def greedy(
    policy: Policy, prompts: list[tuple[int, ...]], stop_ids: list[int], max_tokens: int
) -> dict[str, Any]:
    """Ours and generate's, token by token."""
    engine = LocalEngine(policy, compute=torch.float32, stop_ids=stop_ids)
    ours = engine.generate(
        [Request(prompt_ids=p, seeds=(0,)) for p in prompts],
        SamplingConfig(max_tokens=max_tokens, temperature=0.0),
    )
    same, margins = 0, []
    for prompt, (drawn,) in zip(prompts, ours, strict=True):
        with plain_attention(policy.model), torch.no_grad():
            ids = torch.tensor([prompt])
            out = policy.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=stop_ids,
            )
            theirs = out[0, len(prompt) :].tolist()
            if theirs == list(drawn.token_ids):
                same += 1
                continue
            at = next(
                i for i, (a, b) in enumerate(zip(drawn.token_ids, theirs, strict=False)) if a != b
            )
            logits = policy.model(torch.tensor([[*prompt, *theirs[:at]]])).logits[0, -1]
            best = logits.topk(2).values
            margins.append(float(best[0] - best[1]))
    return {"prompts": len(prompts), "identical": same, "margins_where_they_part": margins}


def flips(
    policy: Policy,
    prompts: list[tuple[int, ...]],
    stop_ids: list[int],
    max_tokens: int,
    compute: torch.dtype,
) -> float:
    """Differing tokens per token compared, the same seeds in batches of 1 and of 16."""
    requests = [Request(prompt_ids=p, seeds=(2 * i, 2 * i + 1)) for i, p in enumerate(prompts)]
    sampling = SamplingConfig(max_tokens=max_tokens)
    drawn = [
        LocalEngine(
            policy, compute=compute, stop_ids=stop_ids, config=LocalConfig(max_rows=rows)
        ).generate(requests, sampling)
        for rows in (1, 16)
    ]
    compared = different = 0
    for alone, together in zip(*drawn, strict=True):
        for a, b in zip(alone, together, strict=True):
            pairs = list(zip(a.token_ids, b.token_ids, strict=False))
            first = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
            compared += len(pairs) if first is None else first + 1
            different += first is not None
    return different / compared


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", required=True, help="GSM8K rows (question, answer)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args()
    config = ModelConfig()
    tokenizer = load_tokenizer(config)
    policy = Policy(load_model(config, dtype=torch.float32), PackingConfig()).eval()
    prompts, stop_ids = questions(args.rows, args.prompts, tokenizer), stop_token_ids(tokenizer)
    print(
        "greedy, float32:",
        json.dumps(greedy(policy, prompts, stop_ids, args.max_tokens)),
        flush=True,
    )
    for compute in (torch.float32, torch.bfloat16):
        share = flips(policy, prompts[:16], stop_ids, args.max_tokens, compute)
        print(
            f"flips, {compute}: {share:.3%} of the tokens before the first difference", flush=True
        )


if __name__ == "__main__":
    main()
