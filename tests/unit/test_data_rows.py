import json

import pytest

from posttrain.data import DataConfig, Row, groups_from_rows, read_sample
from posttrain.data.chat import ChatEncoder
from posttrain.data.tokenise import RowEncoder
from tests.tiny import byte_tokenizer

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def trained(sample):
    messages = [*sample.prompt, *sample.answers[0].messages]
    return [m["role"] == "assistant" and m.get("weight") != 0 for m in messages]


def messages_of(sample):
    return [
        {k: v for k, v in m.items() if k != "weight"}
        for m in (*sample.prompt, *sample.answers[0].messages)
    ]


def encode(values, format="auto", tokenizer=None, **options):
    """The row's group, read as `sft` reads it."""
    config = DataConfig(format=format, **options)
    return RowEncoder(encoder=ChatEncoder(tokenizer or byte_tokenizer()), config=config)(
        Row(file="d.jsonl", row_number=7, values=values)
    )


CASES = {
    "messages": ({"messages": [USER, ANSWER]}, [USER, ANSWER], [False, True]),
    "messages: as JSON text, as CSV holds them": (
        {"messages": json.dumps([USER, ANSWER])},
        [USER, ANSWER],
        [False, True],
    ),
    "messages: text parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}],
                },
                ANSWER,
            ]
        },
        [USER, ANSWER],
        [False, True],
    ),
    "messages: null fields, as Parquet fills them": (
        {"messages": [USER | {"tool_calls": None}, ANSWER | {"name": None}]},
        [USER, ANSWER],
        [False, True],
    ),
    "messages: weight 0": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]},
        [USER, ANSWER, USER, ANSWER],
        [False, False, False, True],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief"},
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "4"},
                {"from": "observation", "value": "ok"},
                {"from": "Assistant", "value": "done"},
            ]
        },
        [
            {"role": "system", "content": "Be brief"},
            USER,
            ANSWER,
            {"role": "tool", "content": "ok"},
            {"role": "assistant", "content": "done"},
        ],
        [False, False, True, False, True],
    ),
    "sharegpt: with role and content": (
        {"conversations": [USER, ANSWER]},
        [USER, ANSWER],
        [False, True],
    ),
    "prompt_completion: strings": (
        {"prompt": "2+2?", "completion": "4"},
        [USER, ANSWER],
        [False, True],
    ),
    "prompt_completion: messages, no turn of the prompt is trained": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        [USER, ANSWER, USER, ANSWER],
        [False, False, False, True],
    ),
    "alpaca": ({"instruction": "2+2?", "input": "", "output": "4"}, [USER, ANSWER], [False, True]),
    "alpaca: with everything": (
        {
            "instruction": "Add",
            "input": "2 2",
            "output": "4",
            "system": "Be brief",
            "history": [["2+2?", "4"]],
        },
        [
            {"role": "system", "content": "Be brief"},
            USER,
            ANSWER,
            {"role": "user", "content": "Add\n\n2 2"},
            ANSWER,
        ],
        [False, False, True, False, True],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_format_is_detected_and_becomes_messages(case):
    values, messages, flags = CASES[case]
    sample = read_sample(values)
    assert sample.layout == {"sharegpt": "messages", "alpaca": "prompt_completion"}.get(
        n := case.partition(":")[0], n
    )
    assert messages_of(sample) == messages and trained(sample) == flags
    assert encode(values).group is not None


def test_two_strings_keep_their_text_for_tokenizers_without_template():
    assert (
        read_sample({"prompt": "a", "completion": "b"}).is_text
        and not read_sample({"messages": [USER, ANSWER]}).is_text
    )
    assert not read_sample({"prompt": "a", "completion": "b", "system": "s"}).is_text


def test_a_tools_column_is_kept_also_as_json_text_and_flat_schemas_are_wrapped():
    tools = [{"type": "function", "function": {"name": "add"}}]
    for value in (
        tools,
        json.dumps(tools, indent=4),
        [json.dumps(tools[0])],
        [{"name": "add"}],
        {"name": "add"},
    ):
        assert read_sample({"messages": [USER, ANSWER], "tools": value}).tools == tools
    assert read_sample({"messages": [USER, ANSWER], "tools": "[]"}).tools is None


def test_rows_of_parquet_are_those_of_json_lines(tmp_path):
    """Arrow gives every object of a table the keys of all others, as nulls, at every depth."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from posttrain.data.readers import read_file

    def call(name, **arguments):
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": name, "arguments": arguments}}
            ],
        }

    def tool(name, **properties):
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "function",
            "function": {"name": name, "description": name, "parameters": schema},
        }

    rows = [
        {
            "messages": [USER, call("lift", floor=3, speed={"unit": "m/s"})],
            "tools": [tool("lift", floor={"type": "integer"})],
        },
        {
            "messages": [USER, call("boil", cups=4)],
            "tools": [tool("boil", cups={"type": "integer", "minimum": 1}), tool("lift")],
        },
        {"messages": [USER, {**ANSWER, "tool_calls": []}], "tools": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = [
        [read_sample(r.values) for r in read_file(tmp_path / f"rows.{end}")]
        for end in ("parquet", "jsonl")
    ]
    plain = [[(s.prompt, s.answers, s.tools) for s in side] for side in samples]
    assert plain[0] == plain[1]
    assert plain[0][0][1][0].messages[0]["tool_calls"][0]["function"]["arguments"] == {
        "floor": 3,
        "speed": {"unit": "m/s"},
    }
    assert "tool_calls" not in plain[0][2][1][0].messages[0] and plain[0][2][2] is None


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss", "loss_mask"])
def test_flags_of_messages_say_what_is_trained(key):
    for no, yes in ((0, 1), (False, True), (0.0, 1.0)):
        messages = [USER, {**ANSWER, key: no}, USER, {**ANSWER, key: yes}]
        assert trained(read_sample({"messages": messages})) == [False, False, False, True]
        messages[0] = {**USER, key: yes}
        with pytest.raises(
            ValueError, match=f"user message says {key}.*only assistant messages are trained"
        ):
            read_sample({"messages": messages})
    messages = [USER, {**ANSWER, "masked": True}, USER, {**ANSWER, "masked": False}]
    assert trained(read_sample({"messages": messages})) == [False, False, False, True]


def test_columns_rename_before_detection():
    row = {"question": "2+2?", "answer": "4", "messages": "unrelated"}
    columns = {"prompt": "question", "completion": "answer"}
    assert messages_of(read_sample(row, columns=columns, carry=["messages"])) == [USER, ANSWER]
    with pytest.raises(ValueError, match="nothing reads messages"):
        read_sample(row, columns=columns)
    with pytest.raises(
        ValueError,
        match=r"--data\.columns names \['reply'\].*has \['answer', 'messages', 'question'\]",
    ):
        read_sample(row, columns={"prompt": "question", "completion": "reply"})
    with pytest.raises(ValueError, match=r"in the place of \['prompt'\]"):
        read_sample({**row, "prompt": "x"}, columns=columns)


def test_detection_explains_itself_when_nothing_fits():
    with pytest.raises(ValueError) as error:
        read_sample({"ask": "a", "reply": "b"})
    text = str(error.value)
    assert text.startswith("unknown format: the columns ['ask', 'reply'] fit no layout")
    for part in (
        "messages: messages",
        "conversations",
        "prompt_completion: a prompt",
        "chosen, rejected",
        "--data.columns",
    ):
        assert part in text


def test_what_is_known_to_change_nothing_is_carried_and_all_else_refused_by_name():
    row = {"messages": [{**USER, "timestamp": "t"}, ANSWER], "id": 3, "source": "x", "note": "n"}
    with pytest.raises(
        ValueError, match=r"nothing reads note in a row read as messages.*--data\.carry '\[note\]'"
    ):
        read_sample(row)
    assert read_sample(row, carry=["note"]).columns == {
        "messages": "used",
        "messages.timestamp": "carried",
        "id": "carried",
        "source": "carried",
        "note": "carried",
    }
    assert read_sample(row, carry=["*"]).columns["note"] == "carried"
    with pytest.raises(ValueError, match="nothing reads the key 'mood' in messages"):
        read_sample({"messages": [{**USER, "mood": "good"}, ANSWER]})
    assert (
        read_sample({"messages": [{**USER, "mood": "good"}, ANSWER]}, carry=["mood"]).columns[
            "messages.mood"
        ]
        == "carried"
    )
    assert read_sample({"messages": [USER, ANSWER], "system": "S"}, carry=["system"]).prompt == [
        USER
    ], "carried, so not read"


def test_another_layout_of_the_same_row_is_carried_where_it_says_the_same_or_the_format_is_set():
    row = {"messages": [USER, ANSWER], "prompt": "2+2?", "completion": "4"}
    assert read_sample(row).layout == "messages" and read_sample(row).columns["prompt"] == "carried"
    with pytest.raises(ValueError, match="nothing reads completion"):
        read_sample({**row, "completion": "5"})
    chosen = read_sample({**row, "completion": "5"}, format="prompt_completion")
    assert messages_of(chosen)[1]["content"] == "5" and chosen.columns["messages"] == "carried"


EMPTY = {"role": "assistant", "content": " \n"}
BAD_ROWS = {
    "no assistant": (
        "messages",
        {"messages": [USER]},
        r"no assistant turn, so nothing to train; roles are \['user'\]",
    ),
    "no assistant in the completion": (
        "prompt_completion",
        {"prompt": [USER], "completion": [USER, USER]},
        "no assistant turn",
    ),
    "empty assistant": (
        "messages",
        {"messages": [USER, ANSWER, USER, EMPTY]},
        "an assistant turn is empty",
    ),
    "empty output": ("alpaca", {"instruction": "a", "output": " "}, "an assistant turn is empty"),
    "assistant first": (
        "messages",
        {"messages": [ANSWER, USER, ANSWER]},
        "starts with an assistant turn",
    ),
    "unknown role": (
        "messages",
        {"messages": [{"role": "narrator", "content": "x"}]},
        "unknown role 'narrator'; known are system, .* Rename it",
    ),
    "no role": ("messages", {"messages": [{"content": "x"}]}, "unknown role None"),
    "no list": (
        "messages",
        {"messages": "hello"},
        "messages written as text must be JSON; got 'hello'",
    ),
    "empty list": (
        "sharegpt",
        {"conversations": []},
        r"lacks one of messages, conversations.*it has \[\]",
    ),
    "message is text": (
        "messages",
        {"messages": ["hello"]},
        "a message is an object with role and content; got 'hello'",
    ),
    "content is a number": (
        "alpaca",
        {"instruction": "a", "output": 4},
        "all texts or all lists of messages; got int",
    ),
    "content is an image": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]},
        "content of the user message must be text.*Images",
    ),
    "half a surrogate pair": (
        "alpaca",
        {"instruction": "a", "output": "x\ud83d"},
        "half of a surrogate pair",
    ),
    "columns missing": (
        "prompt_completion",
        {"prompt": "a", "reply": "b"},
        r"this row lacks an answer \(completion, .*; it has \['prompt', 'reply'\]",
    ),
    "null column": (
        "prompt_completion",
        {"prompt": "a", "completion": None},
        "this row lacks an answer",
    ),
    "an object as an answer": (
        "prompt_completion",
        {"prompt": "a", "completion": {"text": "b"}},
        "all texts or all lists",
    ),
    "the prompt goes on": (
        "prompt_completion",
        {"prompt": [USER, ANSWER], "completion": "x"},
        "the prompt ends with an assistant turn",
    ),
    "two roles": (
        "messages",
        {"messages": [{**USER, "from": "gpt"}, ANSWER]},
        "unknown role .user and gpt",
    ),
    "system that is no text": (
        "messages",
        {"messages": [USER, ANSWER], "system": ["S"]},
        "a system column holds a text",
    ),
    "two systems": (
        "messages",
        {"messages": [{"role": "system", "content": "T"}, USER, ANSWER], "system": "S"},
        "two system messages",
    ),
    "python's repr": ("messages", {"messages": str([USER, ANSWER])}, "must be JSON.*Python's repr"),
    "python's repr in a prompt": (
        "prompt_completion",
        {"prompt": str([USER]), "completion": "4"},
        "must be JSON.*Python's repr",
    ),
    "calls of a user": (
        "messages",
        {"messages": [{**USER, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER]},
        "only the assistant calls",
    ),
    "a call without a name": (
        "messages",
        {"messages": [USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}]},
        "a function with a name",
    ),
    "arguments that are no object": (
        "messages",
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "are an object",
    ),
    "arguments cut short": (
        "messages",
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"a": '}]}]},
        "must be JSON",
    ),
    "a mask that says either": (
        "messages",
        {"messages": [USER, {**ANSWER, "mask": 1}]},
        "nothing reads the key 'mask'",
    ),
    "pictures": (
        "messages",
        {"messages": [USER, ANSWER], "images": ["a.png"]},
        "nothing reads images",
    ),
    "bad weight": (
        "messages",
        {"messages": [USER, ANSWER | {"weight": 0.5}]},
        r"weight of a message is 0 or 1 \(false or true\); got 0.5",
    ),
    "all weights 0": (
        "messages",
        {"messages": [USER, ANSWER | {"weight": 0}]},
        "every assistant message has weight 0",
    ),
    "bad history": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": ["x"]},
        r"history is a list of .* pairs; got \['x'\]",
    ),
    "bad tools": (
        "messages",
        {"messages": [USER, ANSWER], "tools": "add"},
        "tools written as text must be JSON; got 'add'",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_with_what_is_wrong(case):
    format, values, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=r"^d\.jsonl:7: .*" + message):
        encode(values, format)


def test_rows_in_memory_name_their_row():
    with pytest.raises(ValueError, match="<memory>:2: unknown format"):
        groups_from_rows([{"messages": [USER, ANSWER]}, {"x": 1}], byte_tokenizer())


def chat(*turns):
    return {"messages": list(turns)}


def calls(*given, **more):
    return chat(USER, {"role": "assistant", "content": "", "tool_calls": list(given), **more})


# Rows that say two things, or something that no one reads: what was silently taken before
REFUSED = [
    ({**chat(USER, ANSWER), "text": "a document that matters"}, "nothing reads text"),
    ({"prompt": "Q", "response": "A", "observation": "too easy"}, "nothing reads observation"),
    ({"task": "Translate to French", "input": "hello", "output": "bonjour"}, "nothing reads task"),
    ({"knowledge": "The moon is far", "question": "Q", "answer": "A"}, "nothing reads knowledge"),
    (
        {"custom_system_prompt": "S", "prompt": "Q", "completion": "A"},
        "nothing reads custom_system_prompt",
    ),
    ({"title": "Fix my code", "question": "see title", "answer": "ok"}, "nothing reads title"),
    ({"prompt": "Q", "completion": "g", "correctness": False}, "nothing reads correctness"),
    (
        {
            "prompt": "Q",
            "response_a": "x",
            "response_b": "y",
            "winner": "a",
            "score_a": 1,
            "score_b": 9,
        },
        "the verdict and scores contradict",
    ),
    (
        {
            "prompt": "Q",
            "response_a": "x",
            "response_b": "y",
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 1,
        },
        "one of winner_model_a",
    ),
    (
        {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": -2},
        "margin says how much better chosen is",
    ),
    (
        {
            "prompt": "Q",
            "completions": [{"text": "a", "score": 1}, {"text": "b", "score": 9}],
            "scores": [9, 1],
        },
        "differs from what the answers say",
    ),
    (
        {"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1], "is_correct": [False, True]},
        "the order and is_correct contradict",
    ),
    (
        {"prompt": "Q", "completions": ["a", "b"], "scores": [1, 0], "is_correct": [False, True]},
        "the scores and is_correct contradict",
    ),
    (
        {"messages": [USER, ANSWER], "conversations": [USER, {**ANSWER, "weight": 0}]},
        "nothing reads conversations",
    ),
    (
        {"prompt": "Q", "chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "bad"},
        "one answer is a whole dialogue",
    ),
    (chat(USER, {**ANSWER, "train": False, "weight": 1}), "assistant message.s flags contradict"),
    ({"conversation": [{"input": "Q", "output": "A", "mood": "x"}]}, "the key 'mood'"),
    (
        calls({"type": "function", "function": {"name": "f"}, "arguments": {"x": 1}}),
        "one arguments",
    ),
    (calls({"name": "f", "arguments": {"y": 2}, "parameters": {"x": 1}}), "one arguments"),
    (calls({"name": "g", "function": {"name": "f", "arguments": {}}}), "one arguments"),
    (calls({"name": "f", "arguments": 0}), "are an object"),
    (
        calls({"name": "f", "arguments": {}}, function_call={"name": "g", "arguments": "{}"}),
        "both tool_calls and function_call",
    ),
    (
        chat(
            USER,
            {
                "from": "function_call",
                "value": "{}",
                "tool_calls": [{"name": "g", "arguments": {}}],
            },
        ),
        "leave one of them out",
    ),
    (
        {**chat(USER, ANSWER), "tools": [{"function": {"name": "f"}, "name": "g"}]},
        "JSON schemas with a name",
    ),
    ({**chat(USER, ANSWER), "tools": 5}, "tools must be a list of objects; got 5"),
    (
        {**chat(USER, ANSWER), "tools": [{"name": "f", "description": "cut \ud83d"}]},
        "half of a surrogate pair",
    ),
    (
        {"prompt": "Q", "completion": "c", "label": "positive"},
        r"If it is no verdict: .*--data.carry '\[label\]'",
    ),
    ({"prompt": "Q", "response": "c", "score": 10**400}, "score must be a finite number"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_a_row_that_says_two_things_or_something_that_no_one_reads_is_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        read_sample(row)


@pytest.mark.parametrize(
    "text",
    [
        '{"role": "assistant", "content": "hi"}',
        '{"from": "Boston", "to": "NYC"}',
        '[{"value": 1, "label": "x"}]',
        "[{'role': 'user'}] it is",
    ],
)
def test_texts_about_json_stay_texts(text):
    for row in (
        {"prompt": text, "completion": text},
        {"prompt": text, "chosen": text, "rejected": "no"},
        chat(USER, {**ANSWER, "content": text}),
    ):
        assert text in [m["content"] for a in read_sample(row).answers for m in a.messages]
    result = '[{"type": "text", "text": "42"}]'
    assert (
        read_sample(chat(USER, ANSWER, {"role": "tool", "content": result}, ANSWER)).prompt[-1][
            "content"
        ]
        == result
    )


def test_what_pandas_gives_is_read():
    import numpy as np
    import pandas as pd

    row = {
        "messages": np.array([USER, ANSWER], dtype=object),
        "tags": np.array(["a", "b"]),
        "idx": np.int64(3),
        "source": pd.NA,
    }
    with pytest.raises(ValueError, match="not a row"):
        read_sample(row)
    sample = read_sample({**row, "source": None})
    assert messages_of(sample) == [USER, ANSWER] and sample.columns["tags"] == "carried"
    assert (
        read_sample({"prompt": "q", "completion": "a", "label": np.True_}).answers[0].label is True
    )
    arguments = {"name": "f", "arguments": {"x": np.array([1, 2]), "n": None}}
    call = read_sample(calls(arguments)).answers[0].messages[0]["tool_calls"][0]
    assert call["function"]["arguments"] == {"x": [1, 2]}


@pytest.mark.parametrize("value", [None, "x", 5, [1]])
def test_what_is_no_row_is_named(value):
    with pytest.raises(ValueError, match="<memory>:1: a row is an object with columns"):
        groups_from_rows([value], byte_tokenizer())
