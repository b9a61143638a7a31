"""A look at what will be trained, before anything is: one sample in colours, and whether any end is
ever trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from posttrain.types import PromptGroup

if TYPE_CHECKING:
    from rich.text import Text


def check_stop_trained(groups: Iterable[PromptGroup], stop_ids: Iterable[int]) -> None:
    """ValueError if no completion trains a stop token: the model would never learn to end its
    answer."""
    stops = set(stop_ids)
    number = 0
    for number, group in enumerate(groups, start=1):  # noqa: B007
        for completion in group.completions:
            if any(
                m and t in stops
                for t, m in zip(completion.token_ids, completion.loss_mask, strict=True)
            ):
                return
    raise ValueError(
        f"No stop token is ever trained: none of the {number} samples has one of the ids "
        f"{sorted(stops)} under its loss mask, so the model would not learn to end an answer. "
        "Either every sample is cut (raise --data.max_length), or the chat template writes no "
        "end-of-turn token (set --data.chat_template), or the tokenizer has no EOS token."
    )


def highlight_sample(group: PromptGroup, tokenizer: Any) -> Text:
    """The group's text as the model sees it, trained tokens in bold green, all others dim.

    A piece is what the decoded text gains by its tokens, so characters of several tokens and
    leading spaces come out right; a character split between two pieces goes to the second.
    """
    from rich.text import Text

    out = Text()
    for k, completion in enumerate(group.completions):
        ids = [*group.prompt_ids, *completion.token_ids]
        mask = [0] * len(group.prompt_ids) + [int(bool(m)) for m in completion.loss_mask]
        if k:
            out.append("\n" + "-" * 20 + "\n", style="dim")
        borders = [i for i in range(1, len(ids)) if mask[i] != mask[i - 1]] + [len(ids)]
        shown = 0
        for border in borders:
            text = tokenizer.decode(
                ids[:border], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if border != len(ids):
                text = text.rstrip("\ufffd")
            out.append(text[shown:], style="bold green" if mask[border - 1] else "dim")
            shown = max(shown, len(text))
    return out
