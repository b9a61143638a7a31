"""One raw row becomes one sample: a prompt, its answers, and what is known of them. Everything that
reads rows reads them here.

Layouts, by the first that fits:

* ``pairs``: ``chosen`` and ``rejected``; or two answers (``response_a``, ``response_b``, ...) and a
  verdict or scores.
* ``ranked``: a list of answers with ranks, scores or verdicts; ``format="ranked"`` says that a bare
  list is best first.
* ``labelled``: one answer and ``label`` (true: desirable). ``rated``: one answer and a score.
* ``messages``: a conversation. ``prompt_completion``: a prompt and an answer, Alpaca's columns
  among them.

A prompt has the row's system message and earlier turns before it, and inputs after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from posttrain.data.messages import (
    Message,
    after_colon,
    decoded,
    dialogue,
    from_json,
    is_dialogue,
    is_empty,
    short,
)
from posttrain.data.row import (
    MEDIA,
    Answer,
    Columns,
    Sample,
    Values,
    conversation_name,
    names,
    number_of,
    prompt_name,
    prompt_of,
    settle,
    system_and_tools,
    truth_of,
)

_ANSWER, _LISTS = ", ".join(names.ANSWERS), ", ".join(names.ANSWER_LISTS)
KNOWN = (
    "pairs: chosen, rejected; or two answers and a verdict; ranked: a prompt and a list of "
    f"answers ({_LISTS}) with ranks, scores or verdicts; labelled: a prompt, an answer, label; "
    f"rated: a prompt, an answer, score; messages: {', '.join(names.CONVERSATIONS)}; "
    f"prompt_completion: a prompt ({', '.join(names.PROMPTS)}) and an answer ({_ANSWER})"
)
_STEMS = ("response", "answer", "output", "completion", "conversation", "human_ref", "assistant")
_ENDS = (("_a", "_b"), ("_A", "_B"), ("_0", "_1"), ("_1", "_2"), ("1", "2"))
_SCORE_OF = ("{}_score", "score_{}", "{}_rating", "rating_{}", "{}-rating", "{}_reward")
_WINS, _LOSES, _TIES, _BOTH_BAD = (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)
_MISREAD = (KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What a value of a kind that no layout has raises where it is read."""


def read_sample(
    values: Values,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    carry: Collection[str] = (),
) -> Sample:
    """The row as a sample. ``columns``: {column of a layout: column of the row}; ``carry``: columns
    that are not read ("*": all that no layout needs). ValueError with the reason where the row fits
    no layout, or a column is left over."""
    layout = SAME.get(format, format)
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"format is auto, {', '.join((*LAYOUTS, *SAME))}; got {format!r}")
    if not isinstance(values, Mapping):
        raise ValueError(f"a row is an object with columns; got {short(values)}")
    try:
        row = Columns(values, columns, carry, format=layout)
        layout = _layout(row) if layout == "auto" else layout
        sample = LAYOUTS[layout](row)
        sample.layout = layout
        system_and_tools(row, sample)
        settle(row, sample)
    except _MISREAD as error:
        raise ValueError(f"not a row of layout {layout}: {type(error).__name__} {error}") from error
    return sample


def read_prompt(
    values: Values, *, column: str | None = None, carry: Collection[str] = ()
) -> Sample:
    """The row as a prompt to sample from. The prompt is ``column``, else the row's prompt as in
    every layout, else its conversation without the last assistant turn; what is not used is for the
    rewards, unless it would belong to the prompt. The sample's answer, if it has one, is what the
    row itself says is right: that turn, or ``reward_model.ground_truth``. ValueError with the
    reason."""
    if column is not None and is_empty(values.get(column)):
        raise ValueError(
            f"no prompt in data.prompt_column={column}; the row has {sorted(map(str, values))}"
        )
    try:
        row = Columns(values, None, carry, prompt_column=column)
        sample = _prompt(row, column)
        system_and_tools(row, sample)
        _check_left(row)
        truth = _ground_truth(values.get("reward_model"))
    except _MISREAD as error:
        raise ValueError(f"not a row with a prompt: {type(error).__name__} {error}") from error
    if truth:
        sample.answers = [Answer(messages=[{"role": "assistant", "content": truth}])]
    sample.columns = {k: row.seen.get(k, "for the rewards") for k in row.filled}
    return sample


def _prompt(row: Columns, column: str | None) -> Sample:
    conversation = None if column else conversation_name(row)
    prompt: list[Message] = []
    if column in names.CONVERSATIONS:
        conversation = column
    elif prompt_name(row):
        prompt = prompt_of(row)
    answers: list[Answer] = []
    if conversation is not None:
        whole = row.conversation(conversation)
        if whole[-1]["role"] == "assistant":
            answers = [Answer(messages=[whole.pop()])]
        if not whole or whole[-1]["role"] == "assistant":
            raise ValueError(f"{conversation} has no user turn before its last assistant turn")
        if prompt and prompt[-1] not in whole:
            raise ValueError(
                f"{short(prompt[-1]['content'])} is not in {conversation}. Which is the prompt? "
                "Set --data.prompt_column"
            )
        prompt = max(whole, prompt, key=len)
    elif not prompt:
        prompt = LAYOUTS[_layout(row)](row).prompt
    return Sample(prompt=prompt, answers=answers)


def _check_left(row: Columns) -> None:
    """What belongs to a prompt is not left to the rewards."""
    belongs = {*names.PARTS, *names.SYSTEM, *names.TOOLS, "history", *MEDIA}
    lost = ", ".join(n for n in row.filled if n not in row.seen and str(n).lower() in belongs)
    if lost:
        raise ValueError(
            f"nothing reads {lost}, which would belong to the prompt (inputs follow one text; "
            f"names are in lower case). What is for the rewards alone: --data.carry '[{lost}]'"
        )


def _ground_truth(value: Any) -> str | None:
    """verl's ``reward_model``: {ground_truth}, also as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = from_json(value, "reward_model")
    truth = decoded(value.get("ground_truth")) if isinstance(value, Mapping) else None
    truth = truth[0] if isinstance(truth, list) and len(truth) == 1 else truth
    return str(truth) if isinstance(truth, str | int | float) else None


def _layout(row: Columns) -> str:
    """The first layout that has what it needs in this row."""
    is_meant = not row.mapped or row.mapped & {*names.CONVERSATIONS, *names.SYSTEM, *names.TOOLS}
    conversation = conversation_name(row) if is_meant else None
    prompt = conversation or prompt_name(row)
    if _sides(row) or _alternatives(row):
        return "pairs"
    if prompt and (_list(row) or _verified(row)):
        return "ranked"
    if conversation or (prompt and row.name((*names.ANSWERS, "answers"))):
        if row.name((*names.LABELS, *names.SCORES)):
            return "labelled" if row.name(names.LABELS) else "rated"
        return "messages" if conversation else "prompt_completion"
    empty = [k for k in row.all if k not in row.filled and k not in row.seen]
    columns = f"{sorted(map(str, row.all))}{f' (empty: {empty})' if empty else ''}"
    raise ValueError(
        f"unknown format: the columns {columns} fit no layout. Known: {KNOWN}. Name the columns "
        "(--data.columns '{prompt: <yours>, completion: <yours>}'), or rename them"
    )


def _sides(row: Columns) -> tuple[str, str] | None:
    """The columns of the better and the worse answer; one of them may hold an empty text."""
    for pair in zip(names.BETTER, names.WORSE, strict=True):
        if row.filled.keys() & {*pair} and not row.carry & {*pair}:
            if None not in map(row.all.get, pair):
                return pair
    return None


def _alternatives(row: Columns) -> tuple[str, str, str] | None:
    """The stem of the names of two answers, and their ends in order."""
    for stem in _STEMS:
        for ends in _ENDS:
            if all(stem + end in row.filled for end in ends):
                return stem, *ends
    return None


def _list(row: Columns) -> str | None:
    """The column with several answers, unless it holds calls, which are one answer."""
    name = row.name(n for n in names.ANSWER_LISTS if isinstance(row.all.get(n), list | tuple))
    return None if name == "answers" and row.name(names.TOOLS) else name


def _verified(row: Columns) -> list[str]:
    """Columns that are each a solution with a verdict."""
    return [n for n, v in row.filled.items() if isinstance(v, Mapping) and "is_correct" in v]


Numbers = Sequence[float | None]
Sides = tuple[list[Message], list[list[Message]], bool]
"""(what all answers continue, how each goes on, whether all of it is text)."""


def _sample(
    sides: Sides,
    *,
    order: Numbers = (),
    scores: Numbers = (),
    labels: Sequence[bool | None] = (),
    of: str = "order",
) -> Sample:
    """Answers with the rank that ``order`` (lower is better), else their scores, else their labels
    give them; a single one has rank 0. ValueError where one of the others says the contrary."""
    prompt, answers, is_text = sides
    unknown = [None] * len(answers)
    said = {
        of: order,
        "scores": [None if s is None else -s for s in scores],
        "is_correct": [None if v is None else float(not v) for v in labels],
    }
    known = [(what, ranks) for what, ranks in said.items() if set(ranks) - {None}]
    (what, ranks), *others = known or [("", [0.0] if len(answers) == 1 else unknown)]
    for other, values in others:
        both = zip(ranks, values, strict=True)
        rated = [(a, b) for a, b in both if a is not None and b is not None]
        if any(a < c and b > d for a, b in rated for c, d in rated):
            raise ValueError(
                f"the {what} and {other} contradict each other, so which of them is better? "
                f"{short(list(ranks))} by the one, {short(values)} by the other (lower is better)"
            )
    given = zip(answers, ranks, scores or unknown, labels or unknown, strict=True)
    made = [Answer(messages=m, rank=r, score=s, label=v) for m, r, s, v in given]
    return Sample(prompt=prompt, answers=made, is_text=is_text)


def _messages(row: Columns, **known: Any) -> Sample:
    """The answer is what follows the last user or tool turn."""
    messages = row.conversation(row.name(names.CONVERSATIONS))
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise ValueError(
            f"no assistant turn, so nothing to train; roles are {roles}. Correct or remove it"
        )
    if roles[0] == "assistant":
        raise ValueError(
            "starts with an assistant turn, which answers nothing. Put a user message before it"
        )
    start = len(roles) - roles[::-1].index("assistant")
    while roles[start - 1] == "assistant":
        start -= 1
    return _sample((messages[:start], [messages[start:]], False), **known)


def _single(row: Columns, **known: Any) -> Sample:
    """A prompt and one answer."""
    if not row.name(names.ANSWERS) and row.name(names.CONVERSATIONS):
        return _messages(row, **known)
    answer = row.take(*names.ANSWERS)
    if answer is None and row.name(names.TOOLS) and "answers" in row.filled:
        # xLAM: its answers are calls, all of one turn
        answer = [{"role": "assistant", "content": "", "tool_calls": row.use("answers")}]
    answer = row.needs(answer, f"an answer ({_ANSWER})")
    return _sample(_read_sides(row, [answer]), **known)


def _prompt_completion(row: Columns) -> Sample:
    """Answers in the history are trained, as Alpaca's are; others in the prompt are not."""
    sample = _single(row)
    if "history" not in row.seen:
        sample.prompt = [
            {**m, "weight": 0} if m["role"] == "assistant" else m for m in sample.prompt
        ]
    return sample


def _labelled(row: Columns) -> Sample:
    label = truth_of("label", row.needs(row.take(*names.LABELS), "label"))
    return _single(row, labels=[label])


def _rated(row: Columns) -> Sample:
    score = row.needs(row.number(*names.SCORES), f"a score ({', '.join(names.SCORES)})")
    return _single(row, scores=[score])


def _pairs(row: Columns) -> Sample:
    """A better and a worse answer, with their scores, a margin and a weight; or two answers and who
    wins."""
    columns = _sides(row)
    if columns is None:
        return _compared(row, *row.needs(_alternatives(row), "chosen and rejected"))
    sides = _read_sides(row, [row.use(n) for n in columns])
    scores = [row.number(*(form.format(n) for form in _SCORE_OF)) for n in columns]
    sample = _sample(sides, order=_WINS, scores=scores, of=f"order {' > '.join(columns)}")
    sample.margin, weight = row.number("margin"), row.number("weight")
    if min(weight or 0, sample.margin or 0) < 0:
        raise ValueError(
            f"margin says how much better {columns[0]} is, weight how often the pair counts, and "
            f"both must be >= 0; got margin {sample.margin}, weight {weight}"
        )
    sample.weight = 1.0 if weight is None else weight
    return sample


def _compared(row: Columns, stem: str, *ends: str) -> Sample:
    columns = [stem + end for end in ends]
    values = [row.use(n) for n in columns]
    listed = [_text_list(v) for v in (row.filled.get("prompt"), *values)]
    if all(listed):  # the texts of both sides' turns, as lists
        asked, *replies = listed
        if len({*map(len, listed)}) > 1:
            raise ValueError(
                f"prompt, {' and '.join(columns)} need one text for each turn, all of them as many"
            )
        row.use("prompt")
        del row.filled["prompt"]
        values = [
            [{"input": q, "output": a} for q, a in zip(asked, texts, strict=True)]
            for texts in replies
        ]
    sides = _read_sides(row, values)
    bare = [end.lstrip("_") for end in ends]
    scores = [row.number(f"score_{end}") for end in bare]
    verdict = _verdict(row, [end.lower() for end in bare], stem)
    if verdict is None and None in scores:
        raise ValueError(
            f"nothing says which of {' and '.join(columns)} is better. Name the column with the "
            f"verdict {', '.join((*names.WINNERS, *names.STRENGTHS))}, or give scores"
        )
    labels = [False, False] if verdict == _BOTH_BAD else []
    return _sample(sides, order=verdict or (), scores=scores, labels=labels, of="verdict")


def _text_list(value: Any) -> list[str]:
    try:
        is_list = isinstance(value, str) and value.lstrip().startswith('["')
        listed = json.loads(value) if is_list else []
    except json.JSONDecodeError:
        return []
    return listed if all(isinstance(v, str) for v in listed) else []


def _verdict(row: Columns, ends: list[str], stem: str) -> tuple[float, float] | None:
    """Ranks of two answers by every column that says something, which must agree; None if none
    does."""
    winners = [name for name in names.WINNERS if name in row.filled]
    found = {name: _winner(name, row.use(name), ends, stem) for name in winners}
    for name in names.STRENGTHS:
        if (strength := row.number(name)) is not None:
            found[name] = _TIES if strength == 0 else _WINS if strength < 0 else _LOSES
    flags = {n: row.number(n) for n in ("winner_model_a", "winner_model_b", "winner_tie")}
    wins = [flag or 0 for flag in flags.values()]
    if {*flags.values()} != {None}:
        if sorted(wins) != [0, 0, 1]:
            raise ValueError(f"one of {', '.join(flags)} is 1 and the others are 0; got {wins}")
        found["winner_model_a"] = (_WINS, _LOSES, _TIES)[wins.index(1)]
    if stem == "human_ref" and "labels" in row.filled:
        found["labels"] = _WINS if truth_of("labels", row.use("labels")) else _LOSES
    if len(set(found.values())) > 1:
        raise ValueError(
            f"the verdicts {', '.join(found)} disagree. Choose one, and carry the others by name"
        )
    return next(iter(found.values()), None)


def _winner(name: str, value: Any, ends: list[str], stem: str) -> tuple[float, float]:
    is_whole = isinstance(value, float) and value.is_integer()
    said = str(int(value)) if is_whole else str(value).lower()
    before = next((p for p in ("model_", f"{stem}_", stem) if said.startswith(p)), "")
    said = said.removeprefix(before)
    if said.startswith(("tie", "both")):
        return _BOTH_BAD if "bad" in said else _TIES
    if said not in ends:
        raise ValueError(
            f"{name} is {ends[0]}, {ends[1]} or tie (after model_ or {stem}_); got {value!r}"
        )
    return _WINS if said == ends[0] else _LOSES


def _ranked(row: Columns) -> Sample:
    """A list of answers; ranks, scores and verdicts in parallel lists, or in the items."""
    name = _list(row)
    items = list(row.use(name)) if name else [row.use(n) for n in _verified(row)]
    row.needs(items, f"a list of answers ({_LISTS})")
    if "labels" in row.filled:
        raise ValueError(
            f"labels beside {name} are of stepwise supervision (PRM); nothing here trains on it. "
            "If they are verdicts on alternatives, name the column is_correct"
        )
    texts, *inside = zip(*(_item(row, name or "solutions", i) for i in items), strict=True)
    listed = (names.RANK_LISTS, names.SCORE_LISTS, names.VERDICT_LISTS)
    given = [_parallel(row, among, own) for among, own in zip(listed, inside, strict=True)]
    ranks, scores = ([number_of("rank or score", v) for v in values] for values in given[:2])
    labels = [truth_of("is_correct", v) for v in given[2]]
    if {*ranks, *scores, *labels} == {None}:
        if row.format != "ranked":
            raise ValueError(
                f"nothing says which of the {len(items)} {name} is better: no ranks, scores or "
                "is_correct. If they are best first: --data.format ranked (prep: --format ranked)"
            )
        ranks = [float(i) for i in range(len(items))]
    return _sample(_read_sides(row, texts), order=ranks, scores=scores, labels=labels)


def _item(row: Columns, column: str, item: Any) -> tuple[Any, Any, Any, Any]:
    """(text or messages, rank, score, verdict) of one of several answers; the last three None where
    it is no object that holds them."""
    if not isinstance(item, Mapping) or item.keys() & {"role", "from"}:
        return item, None, None, None
    kinds = ((*names.ANSWERS, "text", "content"), ("rank",), names.SCORES, names.LABELS)
    taken = [next((n for n in among if item.get(n) is not None), None) for among in kinds]
    for key, value in item.items():
        if key not in taken and not is_empty(value):
            row.leave(key, inside=column)
    said, rank, score, label = (None if key is None else item[key] for key in taken)
    return said, rank, score, label


def _parallel(row: Columns, columns: Iterable[str], inside: Sequence[Any]) -> Sequence[Any]:
    """One value for each answer, of a column or of the answers themselves. None: not rated."""
    name = row.name(columns)
    if name is None:
        return inside
    values = decoded(row.use(name))
    values = from_json(values, name) if isinstance(values, str) else values
    if not isinstance(values, list) or len(values) != len(inside):
        raise ValueError(
            f"{name} needs one number per completion ({len(inside)}); got {short(values)}"
        )
    if any(own is not None and own != value for own, value in zip(inside, values, strict=True)):
        raise ValueError(
            f"{name} {short(values)} differs from what the answers say themselves, "
            f"{short(inside)}. Leave one out"
        )
    return values


def _read_sides(row: Columns, values: Sequence[Any]) -> Sides:
    values = [decoded(v) for v in values]
    values = [[v] if isinstance(v, Mapping) and v.keys() & {"role", "from"} else v for v in values]
    kinds, dialogues = {type(v) for v in values}, {is_dialogue(v) for v in values}
    if kinds not in ({str}, {list}):
        given = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"the answers must be all texts or all lists of messages; got {given}")
    if dialogues == {True, False}:
        raise ValueError(
            "one answer is a whole dialogue (Human: ..., Assistant: ...) and another is not"
        )
    if kinds == {str} and dialogues == {False}:
        prompt, name = prompt_of(row), prompt_name(row)
        asked = decoded(row.filled[name]) if name else None
        replies = [after_colon(v) for v in values] if is_dialogue(asked) else values
        is_text = isinstance(asked, str) and len(prompt) == 1 and not is_dialogue(asked)
        return prompt, [row.turns(v, "assistant") for v in replies], is_text
    sides = [dialogue(v) if isinstance(v, str) else row.turns(v, "assistant") for v in values]
    prompt = _shared(row, sides)
    if not prompt or prompt[0]["role"] == "assistant":
        raise ValueError(
            "no prompt, and the answers share no first message that could be one. Add a prompt"
        )
    rest, beginnings = [], [p for p in (prompt, _plainer(prompt)) if p]
    for side in sides:
        begins = next((p for p in beginnings if side[: len(p)] == p), [])
        rest.append(side[len(begins) :])
        if not rest[-1] or rest[-1][0]["role"] != "assistant":
            raise ValueError(
                "the sides share no prompt: they differ before an assistant turn (one goes on with "
                f"no assistant turn but {[m['role'] for m in rest[-1]]})"
            )
    return prompt, rest, False


def _plainer(messages: list[Message]) -> list[Message]:
    return [m for m in messages if m["role"] != "system"]


def _shared(row: Columns, sides: list[list[Message]]) -> list[Message]:
    """The prompt of conversations: the row's, or what all of them start with."""
    given = prompt_of(row) if row.name((*names.PROMPTS, *names.CONVERSATIONS)) else []
    plainer = _plainer(given)
    if given and any(
        s[0]["role"] == "assistant" or plainer == s[: len(plainer)] or given == s[: len(given)]
        for s in sides
    ):
        return given
    shared, longest = 0, min(map(len, sides)) - 1
    while shared < longest and all(s[shared] == sides[0][shared] for s in sides):
        shared += 1
    prompt = sides[0][:shared]
    said = [m["content"].strip() for m in prompt]
    if given and (len(given) > 1 or given[0]["content"].strip() not in said):
        raise ValueError(
            f"the prompt {short(given[-1]['content'])} is not in the turns that the answers share"
        )
    return prompt


LAYOUTS: dict[str, Callable[[Columns], Sample]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "pairs": _pairs,
    "ranked": _ranked,
    "labelled": _labelled,
    "rated": _rated,
}
SAME = {"sharegpt": "messages", "alpaca": "prompt_completion"}
"""Names that others give to a layout."""
