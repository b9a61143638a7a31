"""Rows of public layouts become the sample they must become, or are refused; and no change to a row
changes it silently."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from posttrain.data import DataConfig, groups_from_rows, read_prompt, read_sample
from posttrain.data.messages import message_text
from posttrain.data.row import CARRIED, COLUMNS
from tests import layouts
from tests.layouts import CASES
from tests.tiny import byte_tokenizer


def shown(message):
    more = sorted(message.keys() - {"role", "content"})
    return f"{message['role']}: {message['content']}" + (f" ({', '.join(more)})" if more else "")


def said(sample):
    tools = f" with {len(sample.tools)} tool" if sample.tools else ""
    rated = sorted((a for a in sample.answers if a.rank is not None), key=lambda a: a.rank)
    by_rank = {}
    for a in rated:
        by_rank.setdefault(a.rank, []).append("\n".join(message_text(m) for m in a.messages))
    return [" = ".join(texts) + tools for texts in by_rank.values()] + [
        f"[{a.text}]" for a in sample.answers if a.rank is None
    ]


def read(case, row):
    return read_sample(
        row, format=case.format, carry=case.carry, columns=dict(case.columns) or None
    )


def test_there_are_many_layouts_and_the_documentation_has_them():
    assert len(CASES) >= 60
    assert layouts.table() in (Path(__file__).parents[2] / "docs" / "data.md").read_text(), (
        "run python -m tests.layouts"
    )


@pytest.mark.parametrize("case", CASES, ids=[c.of for c in CASES])
def test_a_public_layout(case):
    if case.refused:
        with pytest.raises(ValueError) as caught:
            read(case, case.row)
        assert case.refused in str(caught.value)
    else:
        sample = read(case, case.row)
        assert sample.layout == case.layout
        assert [shown(m) for m in sample.prompt] == list(case.prompt)
        assert said(sample) == list(case.answers)
        assert set(sample.columns.values()) <= {"used", "carried"}
        filled = {k for k, v in case.row.items() if v not in (None, "", [], {})}
        assert filled <= sample.columns.keys(), "every filled column is used or carried"
    if case.rl:
        found = read_prompt(case.row)
        assert [
            "\n".join(map(shown, found.prompt)),
            case.row.get("answer") or "".join(a.text for a in found.answers) or None,
        ] == list(case.rl)


def test_lists_of_names_have_no_name_twice_and_what_is_carried_is_read_by_no_layout():
    assert CARRIED & set(COLUMNS) == {"state"}, "read only where an action is corrected"


def tokens(row, case):
    """What is trained, per purpose: token ids and masks; or the refusal."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    found = []
    for purpose in ("sft", "preference"):
        config = DataConfig(max_length=4096, format=case.format, carry=list(case.carry))
        try:
            (group,) = groups_from_rows([row], tokenizer, config=config, purpose=purpose)
        except ValueError as error:
            found.append(f"refused: {error}"[:8])
            continue
        sides = [
            (tuple(c.token_ids), tuple(map(bool, c.loss_mask)), c.columns.get("label"))
            for c in group.completions
        ]
        found.append((tuple(group.prompt_ids), tuple(sides), tuple(group.trained_pairs)))
    return found


TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<tools>' + (tools | tojson) + '</tools>' }}{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ (m['reasoning_content'] or '') + m['content'] + ((m['tool_calls'] | tojson) if m['tool_calls'] "
    "else '') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def places(value, path=()):
    """Paths of all keys; not inside what is the data's own: schemas, arguments."""
    if isinstance(value, dict):
        for k in value.keys() - {"arguments"}:
            yield (*path, k)
            if k != "tools":
                yield from places(value[k], (*path, k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from places(v, (*path, i))


def as_text(value):
    return value if value is None or isinstance(value, str) else json.dumps(value)


CHANGES = {
    "renamed": lambda key, value: {f"{key}_x": value},
    "nested": lambda key, value: {key: {"value_x": value}},
    "in a list": lambda key, value: {key: [value]},
    "nulled": lambda key, value: {key: None},
    "as text": lambda key, value: {key: as_text(value)},
}


def changed(row, rng):
    """(what was done, the row with one key changed, at any depth; without the key)."""
    new, without = json.loads(json.dumps(row)), json.loads(json.dumps(row))
    path = rng.choice(sorted(places(new), key=str))
    how = rng.choice(list(CHANGES))
    *above, key = path
    holder, other = new, without
    for step in above:
        holder, other = holder[step], other[step]
    value = holder.pop(key)
    holder.update(CHANGES[how](key, value))
    other.pop(key)
    return f"{'.'.join(map(str, path))} {how}", new, without


@pytest.mark.parametrize("seed", range(8))
def test_no_change_to_one_key_is_silently_another_row(seed):
    """Renamed, nested or as text: the same tokens, or a refusal. Null: as if it were not there."""
    rng = random.Random(seed)
    before = {}
    silent = []
    for _ in range(200):
        case = rng.choice(
            [c for c in CASES if c.of != "solutions with verdicts"]
        )  # whose columns have any name
        if case.of not in before:
            before[case.of] = tokens(json.loads(json.dumps(case.row)), case)
        what, row, without = changed(case.row, rng)
        wanted = tokens(without, case) if what.endswith("nulled") else before[case.of]
        after = tokens(row, case)
        silent += [
            (case.of, what, b, a)
            for b, a in zip(wanted, after, strict=True)
            if a not in (b, "refused:")
        ]
    assert not silent, [(of, what) for of, what, _, _ in silent]
