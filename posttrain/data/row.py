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
    """
    id _id idx index uuid hash row row_id row_number prompt_id question_id problem_id
    conversation_id conversation_hash message_id parent_id post_id task_id sample_id qid name url
    link source sources data_source prompt_source source_dataset dataset dataset_name origin file
    split subset subreddit license author user user_id labeler annotator judge worker worker_id
    metadata meta info extra extra_info generator generation_model model models model_name model_a
    model_b model_names chosen_model rejected_model response_model policy response_0_source
    response_1_source response_0_sha256 response_1_sha256 date timestamp tstamp created created_at
    created_at_utc created_at_utc_A created_at_utc_B created_date version seconds_difference lang
    language locale country header hashed_ip state redacted toxic anony turn turns turn_identifier
    num_turns num_responses category categories subcategory topic tag tags category_tag raw_tags
    skill_types domain field subject ability task_type task_category other_task_category
    problem_type question_type type kind style level grade difficulty difficulty_level
    gpt_difficulty llama8b_solve_rate pass_rate intent views is_code evaluation_order
    evaluation_session_id conv_metadata upvote_ratio score_ratio c_root_id_A c_root_id_B
    openai_moderation detoxify_moderation toxic_chat_tag moderation llama_guard_2 is_response_0_safe
    is_response_1_safe response_0_harm_category response_1_harm_category response_0_severity_level
    response_1_severity_level coherence complexity verbosity honesty truthfulness
    instruction_following finish_reason finish_reasons token_count num_tokens tokens length
    instruction_length response_length gen_input_configs gen_tulu3 input_quality quality_explanation
    instruct_reward min_neighbor_distance min_similar_uuid repeat_count preference_statement
    preference_elaboration three_most_similar_preferences all_preferences_unprocessed
    individual_preference raw_preference good_natured hash_id avatarUrl skip_prompt_formatting
    is_quality_control_question time_limit memory_limit picture_num chosen-model rejected-model
    """.split()
)
"""Columns and keys of messages that say where a row is from or describe it. Listed in the data
report, with counts."""
CARRIED_INSIDE = CARRIED.union(
    "annotations critique custom_system_prompt fine-grained_score principle rationale".split()
)
"""Keys of an answer in a list."""
CARRIED_BESIDE = {
    "rated": ("correctness",),
    "messages": ("reward_model", "knowledge"),
    "ranked": ("principle",),
}
"""Columns of one layout, besides."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_ADVICE = "What changes nothing is carried along by name: --data.carry '[{0}]' (prep: --carry {0})"


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
    """Column to ``used``, ``carried`` or ``for the rewards``; keys of messages as
    ``messages.key``."""

    def margin_of(self, better: Answer, worse: Answer) -> float | None:
        """The row's margin, else the difference of the scores; None where neither is known."""
        if self.margin is None and better.score is not None and worse.score is not None:
            return better.score - worse.score
        return self.margin


class Columns:
    """A row's filled columns under the names of the layouts; what a layout takes is used."""

    def __init__(
        self,
        values: Values,
        columns: Mapping[str, str] | None = None,
        carry: Collection[str] = (),
        *,
        format: str = "auto",
        prompt_column: str | None = None,
    ) -> None:
        self.carry, self.mapped, self.format = frozenset(carry), frozenset(columns or ()), format
        self.prompt_column = prompt_column
        plain = {
            k: v if isinstance(v, str) or not hasattr(v, "tolist") else v.tolist()
            for k, v in values.items()
        }
        self.all = _renamed(plain, columns, self.carry) if columns else plain
        self.seen: dict[str, str] = {k: "carried" for k in self.all if k in self.carry}
        self.filled = {k: v for k, v in self.all.items() if k not in self.carry and not is_empty(v)}

    def name(self, among: Iterable[str]) -> str | None:
        """The first of the names that is filled."""
        return next(filter(self.filled.__contains__, among), None)

    def use(self, name: str) -> Any:
        """The value of a column, which is used thereby."""
        self.seen[name] = "used"
        return self.all[name]

    def take(self, *among: str) -> Any:
        """``use`` of the first of the names that is filled; None if none is."""
        name = self.name(n for n in among if n != self.prompt_column)
        return None if name is None else self.use(name)

    def number(self, *among: str) -> float | None:
        """The same as a finite number."""
        name = self.name(among)
        return None if name is None else number_of(name, self.use(name))

    def needs(self, value: Any, what: str) -> Any:
        """The value; ValueError that names what is missing if it is None or empty."""
        if value is None or value == []:
            raise ValueError(f"this row lacks {what}; it has {sorted(map(str, self.filled))}")
        return value

    def leave(self, key: str, inside: str = "messages") -> None:
        """A key of a message or an answer that is not read: carried along, or refused."""
        allowed = CARRIED if inside == "messages" else CARRIED_INSIDE
        if key not in allowed and not self.carry & {key, "*"}:
            raise ValueError(
                f"nothing reads the key {key!r} in {inside}. {_ADVICE.format(key)}, or rename it "
                "to one that is read"
            )
        self.seen[f"{inside}.{key}"] = "carried"

    def turns(self, value: Any, role: str) -> list[Message]:
        """Messages of a text, a message or a list."""
        return turns(value, role, self.leave)

    def conversation(self, name: str | None) -> list[Message]:
        """Messages of the column, which is used thereby."""
        name = self.needs(name, f"one of {', '.join(names.CONVERSATIONS)}")
        return self.turns(_listed(self.use(name)), "user")


def _renamed(values: Values, columns: Mapping[str, str], carry: frozenset[str]) -> dict[str, Any]:
    missing = sorted(c for c in columns.values() if c not in values)
    if missing:
        raise ValueError(f"--data.columns names {missing}; this row has {sorted(map(str, values))}")
    kept = {k: v for k, v in values.items() if k not in columns.values()}
    lost = sorted(c for c in columns if c in kept and c not in carry and not is_empty(kept[c]))
    if lost:
        raise ValueError(
            f"--data.columns puts other columns in the place of {lost}, which this row has. "
            f"{_ADVICE.format(lost[0])}"
        )
    return kept | {ours: values[theirs] for ours, theirs in columns.items()}


def settle(row: Columns, sample: Sample) -> None:
    """Columns that are left over are carried along, or the row is refused with their names."""
    left = [name for name in row.filled if name not in row.seen]
    lost = [name for name in left if not _changes_nothing(row, name, sample)]
    if lost:
        listed = ", ".join(map(str, lost))
        raise ValueError(
            f"nothing reads {listed} in a row read as {sample.layout}. {_ADVICE.format(listed)}; "
            "else name what it is with --data.columns, or choose what is read with --data.format"
        )
    sample.columns = row.seen | dict.fromkeys(left, "carried")


def _changes_nothing(row: Columns, name: str, sample: Sample) -> bool:
    value = row.filled[name]
    is_kind = name == "task" and isinstance(value, str) and len(value.split()) == 1
    if name in CARRIED or "*" in row.carry or is_kind:
        return True
    if name in CARRIED_BESIDE.get(sample.layout, ()):
        return True
    read_with_any = (*row.mapped, *names.SYSTEM, *names.TOOLS, *names.PARTS)
    is_of_layout = name in COLUMNS
    if is_of_layout and row.format != "auto" and name not in read_with_any:
        return True
    return (is_of_layout or name == "text") and _repeats(row, name, sample)


def _repeats(row: Columns, name: str, sample: Sample) -> bool:
    """Whether a column says again what was used: the text of a message, all texts as one, messages,
    or the result that a conversation's answer ends with."""
    value = row.filled[name]
    is_conversation = sample.layout == "messages"
    answers = [a.messages for a in sample.answers]
    sides = [[*sample.prompt, *messages] for messages in answers]
    if isinstance(value, str) and not value.lstrip().startswith("["):
        text = value.strip()
        if text in (m["content"].strip() for side in sides for m in side):
            return True
        if name == "text" and sample.layout == "prompt_completion":
            used = [v for n in row.seen if isinstance(v := row.filled.get(n), str)]
            return len(used) > 1 and all(said.strip() in value for said in used)
        is_result = is_conversation and name in names.ANSWERS
        return is_result and any(text in a.text for a in sample.answers)

    def said(messages: Iterable[Message], roles_left_out: Collection[str] = ()) -> list[Any]:
        return [
            sorted((k, str(v)) for k, v in m.items() if is_conversation or k != "weight")
            for m in messages
            if m["role"] not in roles_left_out
        ]

    try:
        found = said(turns(_listed(value), "user", lambda _: None))
    except (ValueError, TypeError, AttributeError):
        return False
    known = [sample.prompt, *sides, *answers]
    return any(found in (said(part), said(part, ["system"])) for part in known)


def truth_of(name: str, value: Any) -> bool | None:
    """The value as true or false; None for None."""
    text = str(value).lower()
    if text not in ("none", "true", "false", "1", "0", "1.0", "0.0"):
        raise ValueError(
            f"{name} is true (desirable) or false; got {short(value)}. If it is no verdict: "
            f"{_ADVICE.format(name)}"
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


def _listed(value: Any) -> list[Any]:
    """The list in a conversation's column, also as JSON text."""
    value = from_json(value, "messages") if isinstance(value, str) else decoded(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"a conversation is a non-empty list of messages; got {short(value)}")
    return value


def conversation_name(row: Columns) -> str | None:
    """The column with a conversation: a list, also as JSON text."""
    for name in filter(row.filled.__contains__, names.CONVERSATIONS):
        value = row.filled[name]
        if not isinstance(value, str) or value.lstrip().startswith("["):
            return name
    return None


def prompt_name(row: Columns) -> str | None:
    """The column with the prompt; a text called context is none, but follows one."""
    context = isinstance(row.filled.get("context"), str)
    listed = (n for n in names.PROMPTS if not (context and n == "context"))
    return row.prompt_column or row.name(listed)


def prompt_of(row: Columns) -> list[Message]:
    """Earlier turns, the prompt, and with a prompt of one text its inputs."""
    name = prompt_name(row)
    if name is None and not row.name(names.CONVERSATIONS):
        known = ", ".join((*names.PROMPTS, *names.CONVERSATIONS))
        raise ValueError(
            f"no prompt: none of the columns {known} holds one; the row has "
            f"{sorted(map(str, row.filled))}"
        )
    messages = _asked(row, name) if name else row.conversation(row.name(names.CONVERSATIONS))
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


def _asked(row: Columns, name: str) -> list[Message]:
    value = decoded(row.use(name))
    if not isinstance(value, str):
        return row.turns(value, "user")
    if is_dialogue(value):
        return dialogue(value)
    if value.rstrip().endswith("\n\nAssistant:"):
        raise ValueError(
            "the prompt ends in 'Assistant:' but does not start with 'Human:'. Give messages"
        )
    among = (*names.PARTS, *names.SEEN) if "corrected_action" in row.filled else names.PARTS
    texts = [value]
    for part in (n for n in among if n != name and n in row.filled):
        said = row.use(part)
        if not isinstance(said, str):
            raise ValueError(f"{part} follows the prompt, so it must be a text; got {short(said)}")
        texts += [said] if said.strip() else []
    return row.turns("\n\n".join(texts), "user")


def _history(row: Columns, value: list[Any]) -> list[Message]:
    """Earlier turns: messages, or [instruction, answer] pairs."""
    if not all(isinstance(m, Mapping) for m in value):
        if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value):
            wanted = "history is a list of messages, or of [instruction, answer] pairs"
            raise ValueError(f"{wanted}; got {short(value)}")
        value = [{"input": asked, "output": answered} for asked, answered in value]
    return row.turns(value, "user")


def system_and_tools(row: Columns, sample: Sample) -> None:
    """The row's tools, and its system message before the prompt."""
    sample.tools = tool_schemas(row.take(*names.TOOLS))
    system = row.take(*names.SYSTEM)
    if system is None:
        return
    if not isinstance(system, str):
        raise ValueError(f"a system column holds a text; got {short(system)}")
    head = next((m["content"] for m in sample.prompt if m["role"] in ("system", "developer")), None)
    if head is not None and head.strip() != system.strip():
        raise ValueError(f"two system messages, {short(system)} and {short(head)}. Leave one out")
    if head is None and system.strip():
        sample.prompt = [*row.turns(system, "system"), *sample.prompt]
        sample.is_text = False
