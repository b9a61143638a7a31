"""Rows to prompts for reinforcement learning: token ids to sample from, and the row that rewards look into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.chat import leading_special
from posttrain.data.readers import read_rows

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)
"""DeepSeek-AI 2025, arXiv:2501.12948 table 1."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Where prompts come from and how they become tokens."""

    train: list[str] = field(default_factory=list)
    """Sources of rows: files, folders or hub ids, as for the other recipes."""
    eval: list[str] = field(default_factory=list)
    """Held-out sources."""
    prompt_column: str = "prompt"
    """Column with the prompt, a text or messages; default prompt, else question, else messages (whose last assistant turn is
    left out). Every other column is there for the rewards."""
    template: str = "chat"
    """chat: the tokenizer's chat template; r1-zero: the text of DeepSeek-R1-Zero, for base models; plain: the text as it is;
    or the path of a text file with {prompt} in it."""
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


def load_prompts(config: PromptConfig, sources: Sequence[str], tokenizer: Any) -> tuple[list[Prompt], dict[str, int]]:
    """(prompts, {"read", "kept", "too long"}). Raises ValueError naming the row for one without a prompt."""
    rows = ({**row.values, "_where": row.where} for source in sources for row in read_rows(source, split=config.split))
    return prompts_from_rows(rows, tokenizer, config)


def prompts_from_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, config: PromptConfig
) -> tuple[list[Prompt], dict[str, int]]:
    """The same for rows in memory."""
    counts = {"read": 0, "kept": 0, "too long": 0}
    prompts: list[Prompt] = []
    encode = _Encoder(tokenizer, config)
    for number, row in enumerate(rows, start=1):
        sample = {"_where": f"row {number}", **row}
        ids = encode(sample)
        counts["read"] += 1
        if len(ids) > config.max_prompt_length:
            counts["too long"] += 1
            continue
        counts["kept"] += 1
        prompts.append(Prompt(ids=tuple(ids), sample=sample))
    if not prompts:
        raise ValueError(
            f"No prompt is left of {counts['read']} rows ({counts['too long']} longer than data.max_prompt_length="
            f"{config.max_prompt_length}). Give data.train, or raise the limit."
        )
    return prompts, counts


class _Encoder:
    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        if config.template == "chat" and tokenizer.chat_template is None:
            raise ValueError("data.template=chat, but the tokenizer has no chat template. Use r1-zero, plain or a file.")
        named = {"chat": None, "plain": "{prompt}", "r1-zero": R1_ZERO_TEMPLATE}
        text = named[config.template] if config.template in named else Path(config.template).read_text(encoding="utf-8")
        if text is not None and text.count("{prompt}") != 1:
            raise ValueError(f"data.template {config.template} must contain {{prompt}} exactly once.")
        if text is not None and config.system is not None:
            raise ValueError("data.system is part of the chat template; with another data.template it would be ignored.")
        self._text = text

    def __call__(self, sample: Mapping[str, Any]) -> list[int]:
        prompt = self._prompt_of(sample)
        if self._text is None:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if self._config.system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self._config.system}, *messages]
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            said = prompt if isinstance(prompt, str) else "\n\n".join(str(m["content"]) for m in prompt)
            text = self._text.replace("{prompt}", said)
        ids = list(self._tokenizer(text + self._config.opening, add_special_tokens=False)["input_ids"])
        return ids if self._text is None else [*leading_special(self._tokenizer), *ids]

    def _prompt_of(self, sample: Mapping[str, Any]) -> str | Sequence[Mapping[str, Any]]:
        for column in dict.fromkeys((self._config.prompt_column, "question", "messages")):
            value = sample.get(column)
            if isinstance(value, str) and value.strip():
                return value
            if isinstance(value, (list, tuple)) and value:
                messages = list(value)[:-1] if value[-1].get("role") == "assistant" else list(value)
                if messages:
                    return messages
        raise ValueError(
            f"{sample['_where']}: no prompt in column {self._config.prompt_column!r}, question or messages; the row has "
            f"{', '.join(k for k in sample if k != '_where')}. Set --data.prompt_column."
        )
