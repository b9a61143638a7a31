import json

import pytest

from posttrain.data import Row, detect_format, normalise

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def row(**values):
    return Row(file="d.jsonl", row_number=7, values=values)


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
                {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
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
    "sharegpt: with role and content": ({"conversations": [USER, ANSWER]}, [USER, ANSWER], [False, True]),
    "prompt_completion: strings": ({"prompt": "2+2?", "completion": "4"}, [USER, ANSWER], [False, True]),
    "prompt_completion: messages, no turn of the prompt is trained": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        [USER, ANSWER, USER, ANSWER],
        [False, False, False, True],
    ),
    "alpaca": ({"instruction": "2+2?", "input": "", "output": "4"}, [USER, ANSWER], [False, True]),
    "alpaca: with everything": (
        {"instruction": "Add", "input": "2 2", "output": "4", "system": "Be brief", "history": [["2+2?", "4"]]},
        [{"role": "system", "content": "Be brief"}, USER, ANSWER, {"role": "user", "content": "Add\n\n2 2"}, ANSWER],
        [False, False, True, False, True],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_format_is_detected_and_becomes_messages(case):
    values, messages, trained = CASES[case]
    r = row(**values)
    format = detect_format(r)
    assert format == case.partition(":")[0]
    conversation = normalise(r, format)
    assert conversation.messages == messages
    assert conversation.trained == trained


def test_two_strings_keep_their_text_for_tokenizers_without_template():
    assert normalise(row(prompt="a", completion="b"), "prompt_completion").text == ("a", "b")
    assert normalise(row(messages=[USER, ANSWER]), "messages").text is None


def test_a_tools_column_is_kept_also_as_json_text():
    tools = [{"type": "function", "function": {"name": "add"}}]
    for value in (tools, json.dumps(tools)):
        assert normalise(row(messages=[USER, ANSWER], tools=value), "messages").tools == tools


def test_columns_rename_before_detection():
    r = row(question="2+2?", answer="4", messages="unrelated")
    columns = {"prompt": "question", "completion": "answer"}
    assert detect_format(r, columns) == "prompt_completion"
    assert normalise(r, "prompt_completion", columns).messages == [USER, ANSWER]
    with pytest.raises(
        ValueError, match=r"d\.jsonl:7: --data\.columns names \['reply'\].*has \['answer', 'messages', 'question'\]"
    ):
        detect_format(r, {"prompt": "question", "completion": "reply"})


def test_detection_explains_itself_when_nothing_fits():
    with pytest.raises(ValueError) as error:
        detect_format(row(question="a", answer="b"))
    text = str(error.value)
    assert text.startswith("d.jsonl:7: no known format has the columns ['answer', 'question']")
    for part in (
        "messages: messages",
        "sharegpt: conversations",
        "prompt_completion: prompt, completion",
        "alpaca: instruction, output",
        "--data.format",
        "--data.columns",
    ):
        assert part in text


def test_detection_refuses_to_guess_between_two_formats():
    r = row(messages=[USER, ANSWER], prompt="a", completion="b")
    with pytest.raises(ValueError, match="fit several formats: messages, prompt_completion. Choose with --data.format"):
        detect_format(r)
    assert normalise(r, "prompt_completion").messages[0]["content"] == "a"  # the override


EMPTY = {"role": "assistant", "content": " \n"}
BAD_ROWS = {
    "no assistant": ("messages", {"messages": [USER]}, r"no assistant turn, so nothing to train; roles are \['user'\]"),
    "no assistant in the completion": (
        "prompt_completion",
        {"prompt": [USER, ANSWER], "completion": [USER]},
        "no assistant turn in the completion",
    ),
    "empty assistant": ("messages", {"messages": [USER, ANSWER, USER, EMPTY]}, "an assistant turn is empty"),
    "empty output": ("alpaca", {"instruction": "a", "output": ""}, "an assistant turn is empty"),
    "assistant first": ("messages", {"messages": [ANSWER, USER, ANSWER]}, "starts with an assistant turn"),
    "unknown role": (
        "messages",
        {"messages": [{"role": "narrator", "content": "x"}]},
        "unknown role 'narrator'; known are system, .* Rename it",
    ),
    "no role": ("messages", {"messages": [{"content": "x"}]}, "unknown role None"),
    "no list": ("messages", {"messages": "hello"}, "messages must be a non-empty list of messages; got 'hello'"),
    "empty list": ("sharegpt", {"conversations": []}, "conversations must be a non-empty list"),
    "message is text": (
        "messages",
        {"messages": ["hello"]},
        "a message is an object with role and content; got 'hello'",
    ),
    "content is a number": (
        "alpaca",
        {"instruction": "a", "output": 4},
        "content of the assistant message must be text.*got 4",
    ),
    "content is an image": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]},
        "content of the user message must be text.*Images",
    ),
    "half a surrogate pair": ("alpaca", {"instruction": "a", "output": "x\ud83d"}, "half of a surrogate pair"),
    "columns missing": (
        "prompt_completion",
        {"prompt": "a", "answer": "b"},
        r"needs prompt, completion; this row lacks completion and has \['answer', 'prompt'\]",
    ),
    "null column": ("prompt_completion", {"prompt": "a", "completion": None}, "this row lacks completion"),
    "mixed kinds": (
        "prompt_completion",
        {"prompt": "a", "completion": [ANSWER]},
        "two strings or two lists of messages; got str and list",
    ),
    "bad weight": (
        "messages",
        {"messages": [USER, ANSWER | {"weight": 0.5}]},
        r"weight is 0 \(context\) or 1 \(trained\); got 0.5",
    ),
    "all weights 0": ("messages", {"messages": [USER, ANSWER | {"weight": 0}]}, "every assistant message has weight 0"),
    "bad history": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": ["x"]},
        "history is a list of .* pairs; got 'x'",
    ),
    "bad tools": (
        "messages",
        {"messages": [USER, ANSWER], "tools": "add"},
        "tools must be a list of JSON schemas; got 'add'",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_with_what_is_wrong(case):
    format, values, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=r"^d\.jsonl:7: .*" + message):
        normalise(row(**values), format)
