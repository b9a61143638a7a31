"""A learned reward model as a reward: ours, or any sequence classifier of transformers with one label."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from posttrain.types import PromptGroup


def reward_model(
    completions: Sequence[str],
    samples: Sequence[Mapping[str, Any]],
    *,
    model: str,
    prompt_column: str = "prompt",
    max_length: int = 4096,
) -> list[float | None]:
    """The model's score of each conversation (prompt, then the completion as the assistant's turn).

    The answers of one prompt are scored in one packed row, the prompt computed once. ``model``: folder or hub id. An answer that
    is longer with its prompt than ``max_length`` tokens, or empty, is None. Runs in the training process, on the CPU or the first
    CUDA device.
    """
    scorer, tokenizer = _loaded(model)
    scores: list[float | None] = [None] * len(completions)
    by_prompt: dict[int, list[int]] = {}
    for i, (text, sample) in enumerate(zip(completions, samples, strict=True)):
        if text.strip():
            by_prompt.setdefault(id(sample), []).append(i)

    def score(rows: list[dict[str, Any]], places: list[list[int]]) -> list[int]:
        """Fills in the scores of the rows that fit; places of the others."""
        groups = _encoded(rows, tokenizer, max_length) if rows else []
        for group, values in zip(groups, _scores(scorer, groups, max_length), strict=True):
            for place, value in zip(places[group.meta["row"] - 1], values, strict=True):
                scores[place] = value
        kept = {group.meta["row"] - 1 for group in groups}
        return [place for r, row in enumerate(places) if r not in kept for place in row]

    several = [places for places in by_prompt.values() if len(places) > 1]
    together = [
        {"prompt": _prompt_of(samples[ks[0]], prompt_column), "completions": [str(completions[k]) for k in ks]} for ks in several
    ]
    alone = [places[0] for places in by_prompt.values() if len(places) == 1] + score(together, several)
    score(
        [{"prompt": _prompt_of(samples[k], prompt_column), "completion": str(completions[k]), "label": True} for k in alone],
        [[k] for k in alone],
    )
    return scores


reward_model.batched = True  # type: ignore[attr-defined]


def _prompt_of(sample: Mapping[str, Any], column: str) -> Any:
    prompt = sample.get(column) or sample.get("question") or sample.get("messages")
    is_dialogue = isinstance(prompt, (list, tuple)) and bool(prompt)
    return list(prompt)[:-1] if is_dialogue and prompt[-1].get("role") == "assistant" else prompt  # type: ignore[index,arg-type]


def _encoded(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[PromptGroup]:
    """Groups of the rows that fit; ``meta["row"]`` is their number, from 1."""
    from posttrain.data import DataConfig, groups_from_rows

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return groups_from_rows(rows, tokenizer, config=DataConfig(max_length=max_length, overlong="drop"), purpose="reward")
        except ValueError as error:
            if "max_length" in str(error):  # none fits
                return []
            raise


def _scores(scorer: Any, groups: Sequence[PromptGroup], max_length: int) -> list[list[float]]:
    """[group][completion]"""
    import torch

    from posttrain.packing.batch import pack
    from posttrain.packing.plan import plan_step

    if not groups:
        return []
    found: list[list[float]] = [[0.0] * len(g.completions) for g in groups]
    mode, device = scorer.forward_mode.mode, next(scorer.parameters()).device
    with torch.no_grad():
        for part in plan_step(groups, world_size=1, max_tokens=max_length, mode=mode).ranks[0]:
            batch = pack(groups, part.parts, mode=mode).to(device)
            for (g, k), value in zip(batch.refs, scorer(batch).tolist(), strict=True):
                found[g][k] = value
    return found


@lru_cache(maxsize=2)
def _loaded(model: str) -> tuple[Any, Any]:
    import torch

    from posttrain.models.heads import Scorer, load_reward_model
    from posttrain.models.load import ModelConfig, load_tokenizer
    from posttrain.packing.plan import PackingConfig
    from posttrain.precision import default_precision, torch_dtype

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig(name=model)
    tokenizer = load_tokenizer(config)
    loaded = load_reward_model(config, tokenizer, dtype=torch_dtype(default_precision(kind).compute)).to(kind)
    return Scorer(loaded, PackingConfig(), device_type=kind).eval(), tokenizer
