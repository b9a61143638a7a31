"""One row: its filled columns under the names of the layouts, which of them were used, and the
sample that it becomes.

Every filled column is *used*, *carried along* (it cannot change training: an id, a source, a
repetition of what was used, or named by ``carry``), or the row is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from posttrain.data.messages import (
    Message,
    decoded,
    dialogue,
    from_json,
    is_dialogue,
    is_empty,
    message_text,
    short,
    tool_schemas,
    turns,
)

Values = Mapping[str, Any]

_NAMES = """
PROMPTS prompt question instruction query problem history trajectory context description input
CONVERSATIONS messages conversations conversation dialogue
ANSWERS completion response output answer solution
ANSWER_LISTS completions responses answers generations outputs candidates solutions
SYSTEM system system_prompt system_message
TOOLS tools functions
PARTS input context starter_code
SEEN state observation
BETTER chosen response_j corrected_action
WORSE rejected response_k wrong_action
SCORES score rating overall_score overall_rating reward helpfulness
SCORE_LISTS scores ratings rewards score rating overall_scores
RANK_LISTS ranks rank ranking
VERDICT_LISTS is_correct correct correctness correctness_math_verify verdicts passed
LABELS label is_correct desirable
WINNERS winner preference preferred better_response_id safer_response_id choice
STRENGTHS preference_strength overall_preference
OTHERS margin weight labels
"""
names = SimpleNamespace(
    **{kind: tuple(listed) for kind, *listed in map(str.split, _NAMES.strip().splitlines())}
)
"""What columns are called, by what they are; the first that is filled is read. PARTS are texts that
follow the prompt's own, SEEN too where an action is corrected."""
COLUMNS = tuple(dict.fromkeys(name for listed in vars(names).values() for name in listed))
"""Every column that a layout reads: the keys that ``columns`` accepts."""

CARRIED = frozenset(
    """id _id idx index uuid hash row row_id row_number prompt_id question_id problem_id
    conversation_id conversation_hash message_id parent_id post_id task_id sample_id
    qid name url link source sources data_source prompt_source source_dataset dataset
    dataset_name origin file split subset subreddit license author user user_id
    labeler annotator judge worker worker_id metadata meta info extra extra_info
    generator generation_model model models model_name model_a model_b model_names
    chosen_model rejected_model response_model policy response_0_source
    response_1_source response_0_sha256 response_1_sha256 date timestamp tstamp
    created created_at created_at_utc created_at_utc_A created_at_utc_B created_date
    version seconds_difference lang language locale country header hashed_ip state
    redacted toxic anony turn turns turn_identifier num_turns num_responses category
    categories subcategory topic tag tags category_tag raw_tags skill_types domain
    field subject ability task_type task_category other_task_category problem_type
    question_type type kind style level grade difficulty difficulty_level
    gpt_difficulty llama8b_solve_rate pass_rate intent views is_code evaluation_order
    evaluation_session_id conv_metadata upvote_ratio score_ratio c_root_id_A
    c_root_id_B openai_moderation detoxify_moderation toxic_chat_tag moderation
    llama_guard_2 is_response_0_safe is_response_1_safe response_0_harm_category
    response_1_harm_category response_0_severity_level response_1_severity_level
    coherence complexity verbosity honesty truthfulness instruction_following
    finish_reason finish_reasons token_count num_tokens tokens length
    instruction_length response_length gen_input_configs gen_tulu3 input_quality
    quality_explanation instruct_reward min_neighbor_distance min_similar_uuid
    repeat_count preference_statement preference_elaboration
    three_most_similar_preferences all_preferences_unprocessed individual_preference
    raw_preference good_natured hash_id avatarUrl skip_prompt_formatting
    is_quality_control_question time_limit memory_limit picture_num chosen-model
    rejected-model""".split()
)
"""Columns and keys of messages that say where a row is from or describe it. Listed in the data
report, with counts."""
CARRIED_INSIDE = frozenset(
    ("annotations critique custom_system_prompt fine-grained_score principle rationale").split()
)
"""Keys of an answer in a list, besides."""
CARRIED_BESIDE = {
    "rated": ("correctness",),
    "messages": ("reward_model", "knowledge"),
    "ranked": ("principle",),
}
"""Columns of one layout, besides."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(kw_only=True)
class Answer:
    """One completion of a prompt."""

    messages: list[Message]
    rank: float | None = None
    """Lower is better, equal ranks are ties; only comparable inside one sample. None: not rated,
    and in no pair."""
    score: float | None = None
    """Higher is better, in the data's own units."""
    label: bool | None = None
    """Correct, desirable or preferred; None where the data only ranks."""

    @property
    def text(self) -> str:
        """Everything it says."""
        return "\n".join(message_text(m) for m in self.messages)


@dataclass(kw_only=True)
class Sample:
    """What one row says about one prompt."""

    prompt: list[Message]
    answers: list[Answer]
    layout: str = ""
    """Name of its layout."""
    tools: list[Any] | None = None
    """Schemas for the chat template."""
    margin: float | None = None
    """Of the first answer over the second, where the row has a column for it."""
    weight: float = 1.0
    """How often the pair counts."""
    is_text: bool = False
    """The prompt is one text and so are the answers: trained as raw text by a tokenizer without a
    chat template."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column to ``used`` or ``carried``; keys of messages as ``messages.key``."""

    @property
    def is_scattered(self) -> bool:
        """Rows with the same prompt are parts of one sample: single answers, labelled or rated."""
        return self.layout in ("labelled", "rated")


class Row:
    """A row's filled columns under the names of the layouts; what a layout takes is used."""

    def __init__(
        self,
        values: Values,
        columns: Mapping[str, str] | None,
        carry: Collection[str],
        *,
        format: str = "auto",
    ) -> None:
        self.carry, self.mapped, self.format = frozenset(carry), frozenset(columns or ()), format
        held = {
            k: v if isinstance(v, str) or not hasattr(v, "tolist") else v.tolist()
            for k, v in values.items()
        }
        self.all = _renamed(held, columns, self.carry) if columns else held
        self.seen: dict[str, str] = {k: "carried" for k in self.all if k in self.carry}
        self.filled = {
            k: v for k, v in self.all.items() if k not in self.carry and not is_nothing(v)
        }

    def name(self, among: Iterable[str], kind: type | tuple[type, ...] = object) -> str | None:
        """The first of the names that is filled with such a value."""
        there = filter(self.filled.__contains__, among)
        return next(
            there if kind is object else (n for n in there if isinstance(self.filled[n], kind)),
            None,
        )

    def use(self, name: str) -> Any:
        """The value of a column, which is used thereby."""
        self.seen[name] = "used"
        return self.all[name]

    def take(self, *among: str) -> Any:
        """``use`` of the first of the names that is filled; None if none is."""
        name = self.name(among)
        return None if name is None else self.use(name)

    def number(self, *among: str) -> float | None:
        """The same as a finite number."""
        name = self.name(among)
        return None if name is None else number_of(name, self.use(name))

    def needs(self, value: Any, what: str) -> Any:
        """The value; ValueError that names what is missing if it is None or empty."""
        if value is None or value == []:
            raise ValueError(
                f"this row lacks {what}; it has {sorted(map(str, self.filled))}. All rows of a "
                "source have one format"
            )
        return value

    def leave(self, key: str, inside: str = "messages") -> None:
        """A key of a message or an answer that is not read: carried along, or refused."""
        allowed = key in CARRIED or (inside != "messages" and key in CARRIED_INSIDE)
        if not allowed and key not in self.carry and "*" not in self.carry:
            raise ValueError(
                f"nothing reads the key {key!r} in {inside}. {_ADVICE.format(key)}, or rename it "
                "to one that is read"
            )
        self.seen[f"{inside}.{key}"] = "carried"

    def turns(self, value: Any, role: str) -> list[Message]:
        """Messages of a text, a message or a list."""
        return turns(value, role, self.leave)


_ADVICE = "What changes nothing is carried along by name: --data.carry '[{0}]' (prep: --carry {0})"


def is_nothing(value: Any) -> bool:
    """Whether a column holds nothing: null, an empty text, or lists and objects of such."""
    return (
        value is None
        or value == ""
        or (isinstance(value, list | tuple | Mapping) and is_empty(value))
    )


def _renamed(values: Values, columns: Mapping[str, str], carry: frozenset[str]) -> dict[str, Any]:
    missing = sorted(c for c in columns.values() if c not in values)
    if missing:
        raise ValueError(
            f"--data.columns names {missing}, which this row lacks; it has "
            f"{sorted(map(str, values))}. Correct the mapping"
        )
    lost = sorted(
        c
        for c in columns
        if c not in columns.values() and c not in carry and not is_nothing(values.get(c))
    )
    if lost:
        raise ValueError(
            f"--data.columns puts other columns in the place of {lost}, which this row has. "
            f"{_ADVICE.format(lost[0])}"
        )
    kept = {k: v for k, v in values.items() if k not in columns.values()}
    return kept | {ours: values[theirs] for ours, theirs in columns.items()}


def settle(row: Row, sample: Sample) -> None:
    """Columns that are left over are carried along, or the row is refused with their names."""
    lost = [
        name
        for name in row.filled
        if name not in row.seen and not _changes_nothing(row, name, sample)
    ]
    if lost:
        listed = ", ".join(map(str, lost))
        raise ValueError(
            f"nothing reads {listed} in a row read as {sample.layout}. {_ADVICE.format(listed)}; "
            "else name what it is with --data.columns, or choose what is read with --data.format"
        )
    sample.columns = row.seen | {name: "carried" for name in row.filled if name not in row.seen}


def _changes_nothing(row: Row, name: str, sample: Sample) -> bool:
    value = row.filled[name]
    if name in CARRIED or "*" in row.carry or name in CARRIED_BESIDE.get(sample.layout, ()):
        return True
    if (
        name == "task" and isinstance(value, str) and len(value.split()) == 1
    ):  # a kind, no instruction
        return True
    is_other_layout = (
        row.format != "auto"
        and name in COLUMNS
        and name not in (*row.mapped, *names.SYSTEM, *names.TOOLS, *names.PARTS)
    )
    return is_other_layout or ((name in COLUMNS or name == "text") and _repeats(row, name, sample))


def _repeats(row: Row, name: str, sample: Sample) -> bool:
    """Whether a column says again what was used: the text of a message, all texts as one, messages,
    or the result that a conversation's answer ends with."""
    value = row.filled[name]
    whole = sample.layout == "messages"

    def said_by(messages: Iterable[Message]) -> list[Any]:
        return [
            sorted((k, str(v)) for k, v in m.items() if whole or k != "weight") for m in messages
        ]

    sides = [[*sample.prompt, *a.messages] for a in sample.answers]
    if isinstance(value, str) and not value.lstrip().startswith("["):
        said = {m["content"].strip() for side in sides for m in side}
        texts = [row.filled[n] for n in row.seen if isinstance(row.filled.get(n), str)]
        is_whole = name == "text" and sample.layout == "prompt_completion" and len(texts) > 1
        is_gold = (
            name in names.ANSWERS and whole and any(value.strip() in a.text for a in sample.answers)
        )
        return (
            is_gold
            or value.strip() in said
            or (is_whole and all(t.strip() in value for t in texts))
        )
    try:
        found = turns(conversation_of(value), "user", lambda _: None)
    except (ValueError, TypeError, AttributeError):
        return False
    known = [sample.prompt, *sides, *(a.messages for a in sample.answers)]
    plainer = [[m for m in part if m["role"] != "system"] for part in known]
    return said_by(found) in [said_by(part) for part in (*known, *plainer)]


def truth_of(name: str, value: Any) -> bool | None:
    """The value as true or false; None for None."""
    text = str(value).lower()
    if text not in ("none", "true", "false", "1", "0", "1.0", "0.0"):
        raise ValueError(
            f"{name} is true (desirable) or false; got {short(value)}. If it is no "
            f"verdict: {_ADVICE.format(name)}"
        )
    return None if text == "none" else text in ("true", "1", "1.0")


def number_of(name: str, value: Any) -> float | None:
    """The value as a finite number; None for None."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number; got {short(value)}")
    return number


def conversation_of(value: Any) -> Any:
    """The list in a conversation's column, also as JSON text."""
    value = from_json(value, "messages") if isinstance(value, str) else decoded(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"a conversation is a non-empty list of messages; got {short(value)}")
    return value


def conversation_name(row: Row) -> str | None:
    """The column with a conversation: a list, also as JSON text."""
    among = (n for n in names.CONVERSATIONS if n in row.filled)
    return next(
        (
            n
            for n in among
            if not isinstance(row.filled[n], str) or row.filled[n].lstrip().startswith("[")
        ),
        None,
    )


def prompt_name(row: Row, first: str | None = None) -> str | None:
    """The column with the prompt; a text called context is none, but follows one."""
    if first is not None and first in row.filled:
        return first
    listed = names.PROMPTS
    return row.name(n for n in listed if n != "context" or not isinstance(row.filled.get(n), str))


def prompt_of(row: Row, first: str | None = None) -> list[Message]:
    """Earlier turns, the prompt, and with a prompt of one text its inputs."""
    name = prompt_name(row, first)
    if name is not None:
        messages = _asked(row, name)
    elif row.name(names.CONVERSATIONS):
        messages = row.turns(conversation_of(row.take(*names.CONVERSATIONS)), "user")
    else:
        known = ", ".join((*names.PROMPTS, *names.CONVERSATIONS))
        raise ValueError(
            f"no prompt: none of the columns {known} holds one; the row has "
            f"{sorted(map(str, row.filled))}"
        )
    earlier = row.filled.get("history")
    if name != "history" and isinstance(earlier, list):
        messages = _history(row, row.use("history")) + messages
    if not any(m["content"].strip() or m.get("tool_calls") for m in messages):
        raise ValueError("the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            "the prompt ends with an assistant turn. If it is an answer, give it as one "
            "(completion; for RL: answer); the beginning of a reply is set with --data.opening"
        )
    return messages


def _asked(row: Row, name: str) -> list[Message]:
    value = decoded(row.use(name))
    if not isinstance(value, str):
        return row.turns(value, "user")
    if is_dialogue(value):
        return dialogue(value)
    if value.rstrip().endswith("\n\nAssistant:"):
        raise ValueError(
            "the prompt ends in 'Assistant:' but does not start with 'Human:'. Give "
            "its turns as messages"
        )
    among = (*names.PARTS, *names.SEEN) if "corrected_action" in row.filled else names.PARTS
    parts = {n: row.use(n) for n in among if n != name and n in row.filled}
    for part, said in parts.items():
        if not isinstance(said, str):
            raise ValueError(f"{part} follows the prompt, so it must be a text; got {short(said)}")
    return row.turns(
        "\n\n".join([value, *(said for said in parts.values() if said.strip())]), "user"
    )


def _history(row: Row, value: list[Any]) -> list[Message]:
    """Earlier turns: messages, or [instruction, answer] pairs."""
    if all(isinstance(m, Mapping) for m in value):
        return row.turns(value, "user")
    if any(
        not isinstance(t, list | tuple) or len(t) != 2 or not all(isinstance(s, str) for s in t)
        for t in value
    ):
        raise ValueError(
            f"history is a list of messages, or of [instruction, answer] pairs; got {short(value)}"
        )
    return [
        {"role": role, "content": said}
        for turn in value
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]


def system_and_tools(row: Row, sample: Sample) -> None:
    """The row's tools, and its system message before the prompt."""
    sample.tools = tool_schemas(row.take(*names.TOOLS)) if row.name(names.TOOLS) else None
    system = row.take(*names.SYSTEM)
    if system is None:
        return
    if not isinstance(system, str):
        raise ValueError(f"a system column holds a text; got {short(system)}")
    head = next((m["content"] for m in sample.prompt if m["role"] in ("system", "developer")), None)
    if head is not None and head.strip() != system.strip():
        raise ValueError(
            f"two system messages: {short(system)} in a column and {short(head)} in "
            "the conversation. Leave one out"
        )
    if head is None and system.strip():
        sample.prompt = [*row.turns(system, "system"), *sample.prompt]
        sample.is_text = False
