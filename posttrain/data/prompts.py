"""Rows to prompts for reinforcement learning: token ids to sample from, and the row that rewards
look into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.chat import leading_special, render_prompt
from posttrain.data.layouts import read_prompt
from posttrain.data.messages import located
from posttrain.data.readers import read_rows
from posttrain.data.report import column_counts
from posttrain.data.row import Sample, names
from posttrain.resolve import settings

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)
"""DeepSeek-AI 2025, arXiv:2501.12948 table 1."""


@settings
class PromptConfig:
    """Where prompts come from and how they become tokens."""

    train: list[str] = field(default_factory=list)
    """Sources of rows: files, folders or hub ids, as for the other recipes."""
    eval: list[str] = field(default_factory=list)
    """Held-out sources."""
    prompt_column: str | None = None
    """Column with the prompt, a text or messages. Default: found as in every row (prompt, question,
    problem, ..., or a conversation, whose last assistant turn is then the answer). Columns that are
    not read are there for the rewards."""
    carry: list[str] = field(default_factory=list)
    """Columns that look as if they belonged to the prompt (``input``, ``context``, ...), but are
    for the rewards alone."""
    template: str = "chat"
    """chat: the tokenizer's chat template; r1-zero: the text of DeepSeek-R1-Zero, for base models;
    plain: the text as it is; or the path of a text file with {prompt} in it."""
    system: str | None = None
    """System message of the chat template."""
    opening: str = ""
    """Text that the assistant's turn begins with, part of the prompt (for example <think>)."""
    max_prompt_length: int = 512
    """Longer prompts are left out and counted, tokens."""
    split: str = "train"
    """Split of hub ids."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row, ready to be sampled from."""

    ids: tuple[int, ...]
    sample: Mapping[str, Any]
    """The row; ``_where`` names its file and row."""


def load_prompts(
    config: PromptConfig, sources: Sequence[str], tokenizer: Any
) -> tuple[list[Prompt], dict[str, Any]]:
    """(prompts, {"read", "kept", "too long", "columns"}). Raises ValueError naming the row for one
    without a prompt."""
    rows = (
        {**row.values, "_where": row.where}
        for source in sources
        for row in read_rows(source, split=config.split)
    )
    return prompts_from_rows(rows, tokenizer, config)


def prompts_from_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    config: PromptConfig,
    *,
    suffix: str = "",
    may_be_none: bool = False,
) -> tuple[list[Prompt], dict[str, Any]]:
    """The same for rows in memory; ``suffix`` goes after what the last message says."""
    columns: Counter[tuple[tuple[str, str], ...]] = Counter()
    prompts: list[Prompt] = []
    read = 0
    encode = _Encoder(tokenizer, config)
    for read, row in enumerate(rows, start=1):
        sample = {"_where": f"row {read}", **row}
        with located(sample["_where"]):
            values = {k: v for k, v in sample.items() if k != "_where"}
            asked = read_prompt(values, column=config.prompt_column, carry=config.carry)
            last = asked.prompt[-1]
            asked.prompt[-1] = {**last, "content": last["content"] + suffix}
            ids = encode(asked)
        sample = with_answer(sample, asked)
        columns[tuple(asked.columns.items())] += 1
        if len(ids) <= config.max_prompt_length:
            prompts.append(Prompt(ids=tuple(ids), sample=sample))
    too_long = read - len(prompts)
    if not prompts and not may_be_none:
        raise ValueError(
            f"No prompt is left of {read} rows ({too_long} longer than data.max_prompt_length="
            f"{config.max_prompt_length}). Give data.train, or raise the limit."
        )
    counts = {"read": read, "kept": len(prompts), "too long": too_long}
    return prompts, {**counts, "columns": column_counts(columns)}


def with_answer(sample: Mapping[str, Any], asked: Sample) -> dict[str, Any]:
    """The row as rewards look into it: the last assistant turn of a conversation is its ``answer``
    where no column is."""
    has_own = not asked.answers or sample.get("answer") is not None
    return {**sample, **({} if has_own else {"answer": asked.answers[0].text})}


class _Encoder:
    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        name = config.template
        if name == "chat":
            if tokenizer.chat_template is None:
                raise ValueError(
                    "data.template=chat, but the tokenizer has none. Use r1-zero, plain or a file."
                )
            return
        named = {"plain": "{prompt}", "r1-zero": R1_ZERO_TEMPLATE}
        self._text = named.get(name) or Path(name).read_text(encoding="utf-8")
        if self._text.count("{prompt}") != 1:
            raise ValueError(f"data.template {name} must contain {{prompt}} exactly once.")
        if config.system is not None:
            raise ValueError(
                "data.system is part of the chat template; another template ignores it."
            )

    def __call__(self, asked: Sample) -> list[int]:
        config, messages, tokenizer = self._config, asked.prompt, self._tokenizer
        before: list[int] = []
        if config.template == "chat":
            if config.system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": config.system}, *messages]
            text = render_prompt(tokenizer, messages, asked.tools)
        else:
            is_conversation = any(asked.columns.get(n) == "used" for n in names.CONVERSATIONS)
            if asked.tools or is_conversation or len(messages) > 1:
                raise ValueError(
                    f"data.template={config.template} writes one text; got the roles "
                    f"{[m['role'] for m in messages]} and {len(asked.tools or ())} tools. Use the "
                    "chat template, or name a column with a text: --data.prompt_column"
                )
            text = self._text.replace("{prompt}", messages[0]["content"])
            before = leading_special(tokenizer)
        return before + tokenizer(text + config.opening, add_special_tokens=False)["input_ids"]
