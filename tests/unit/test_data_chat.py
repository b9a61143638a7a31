import pytest

from posttrain.data import (
    ChatEncoder,
    check_stop_trained,
    encode_conversation,
    highlight_sample,
    set_chat_template,
    stop_token_ids,
)
from posttrain.types import Completion, PromptGroup
from tests.unit.data_tokenizers import (
    ALTERNATING,
    CHATML,
    FORGETS_THINKING,
    INST,
    MARKED_WITH_END,
    MARKED_WITH_HEADER,
    MARKED_WITHOUT_END,
    NO_END,
    NO_GENERATION_PROMPT,
    byte_level,
    metaspace,
    trained_text,
    whole_text,
)


def talk(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


TALKS = {
    "one turn": talk("hello", "the answer is four"),
    "three turns": talk("hello", "yes", "question", "no", "question", "five"),
    "emoji at the ends": talk("👩‍🚀", "👩‍🚀 ü 👩‍🚀", "é", "日本語"),
    "white space at the ends": talk("hello\n", "\n\nyes \n", " no", "  five\n\n"),
    "system": [{"role": "system", "content": "Be brief"}, *talk("hello", "yes")],
    "two answers in a row": [*talk("hello", "yes"), {"role": "assistant", "content": "no"}],
    "last turn is the user's": talk("hello", "yes", "question"),
    "the answer stands in the question": talk("say four", "four", "four again", "four"),
}


@pytest.mark.parametrize(
    "template", [CHATML, MARKED_WITH_END, MARKED_WITHOUT_END, MARKED_WITH_HEADER]
)
@pytest.mark.parametrize("name", TALKS)
def test_trained_text_is_the_assistant_contents_and_their_end_of_turn_tokens(name, template):
    tokenizer, messages = byte_level(template), TALKS[name]
    group = encode_conversation(messages, tokenizer)
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert trained_text(group, tokenizer) == "".join(answers)
    assert whole_text(group, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
    served = tokenizer.apply_chat_template(
        messages[: [m["role"] for m in messages].index("assistant")],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(group.prompt_ids) == served
    assert group.completions[0].loss_mask[0] == 1


def test_without_a_token_across_a_border_the_ids_are_those_of_the_whole_text():
    tokenizer = byte_level()
    for name in ("one turn", "three turns", "emoji at the ends", "system"):
        group = encode_conversation(TALKS[name], tokenizer)
        whole = tokenizer.apply_chat_template(TALKS[name], return_dict=False)
        assert [*group.prompt_ids, *group.completions[0].token_ids] == whole


def test_markers_agree_with_transformers_mask_where_that_is_right():
    tokenizer = byte_level(MARKED_WITH_END)
    messages = TALKS["three turns"]
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    group = encode_conversation(messages, tokenizer)
    ours = [0] * len(group.prompt_ids) + list(group.completions[0].loss_mask)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    after_end = [
        a == 1 and t == newline
        for a, t in zip(theirs["assistant_masks"], theirs["input_ids"], strict=True)
    ]
    assert sum(after_end) == 3  # their marker holds the line break after each end of turn
    assert ours == [
        0 if x else a for a, x in zip(theirs["assistant_masks"], after_end, strict=True)
    ]


def test_a_marked_span_that_ends_in_a_character_of_several_tokens_is_trained_to_its_last_byte():
    tokenizer = byte_level(MARKED_WITHOUT_END)
    messages = talk("hello", "👩‍🚀")
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    group = encode_conversation(messages, tokenizer)
    assert (
        sum(theirs["assistant_masks"]) < group.num_trained - 1
    )  # why transformers' mask is not used
    assert trained_text(group, tokenizer) == "👩‍🚀<|im_end|>"


def test_flags_choose_the_trained_turns_and_the_first_untrained_one_joins_the_prompt():
    tokenizer, messages = byte_level(), TALKS["three turns"]
    group = encode_conversation(
        messages, tokenizer, trained=[False, False, False, True, False, True]
    )
    assert trained_text(group, tokenizer) == "no<|im_end|>five<|im_end|>"
    assert "yes<|im_end|>" in tokenizer.decode(group.prompt_ids)


def test_a_tokenizer_that_adds_a_space_to_every_text():
    tokenizer = metaspace()
    messages = talk("the question", "hello", "no", "five")
    group = encode_conversation(messages, tokenizer)
    ids = [*group.prompt_ids, *group.completions[0].token_ids]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(group.prompt_ids) == tokenizer.apply_chat_template(messages[:1], return_dict=False)
    assert trained_text(group, tokenizer) == "hello</s> five</s>"


def test_a_token_across_the_border_that_cannot_be_split_is_an_error():
    template = INST.replace("' [/INST]'", "' ans'").replace(
        "' ' + m['content']", "m['content']"
    )  # "ans" + "wer"
    with pytest.raises(ValueError, match="a token lies across the border of an assistant turn"):
        encode_conversation(talk("the", "wer is four"), metaspace(template))


def test_tool_turns_are_context():
    tokenizer = byte_level()
    messages = [
        *talk("hello", "yes"),
        {"role": "tool", "content": "five"},
        {"role": "assistant", "content": "no"},
    ]
    assert (
        trained_text(encode_conversation(messages, tokenizer), tokenizer)
        == "yes<|im_end|>no<|im_end|>"
    )


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "llama3", "gemma", "gptoss", "phi3", "deepseek_r1_distill"]
)
def test_templates_that_trl_knows_train_no_header(name):
    import re
    from pathlib import Path

    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = byte_level(template)
    special = set(re.findall(r"<[|｜][^<>\s'\"{}]*[|｜]>|<(?:start|end)_of_turn>", template))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    encoder = ChatEncoder(tokenizer)
    assert encoder.mask_from == "trl"
    text = trained_text(encoder.encode(talk("hello", "yes", "question", "five")), tokenizer)
    before = {"qwen3": "<think>\n\n</think>\n\n", "gptoss": "<|channel|>final<|message|>"}.get(
        name, ""
    )
    ends = {
        "llama3": ("<|eot_id|>",) * 2,
        "gemma": ("<end_of_turn>",) * 2,
        "gptoss": ("<|end|>", "<|return|>"),
        "phi3": ("<|end|>", "<|end|><|im_end|>"),
        "deepseek_r1_distill": ("<｜end▁of▁sentence｜>",) * 2,
    }.get(name, ("<|im_end|>",) * 2)
    assert text == f"{before}yes{ends[0]}{before}five{ends[1]}"


def test_a_thought_that_does_not_begin_as_the_prompt_gives_it_is_trained_with_its_tag():
    """DeepSeek's template opens ``<think>\\n``: what follows exactly that is given; another
    beginning is the row's own."""
    from pathlib import Path

    import trl

    tokenizer = byte_level(
        (Path(trl.__file__).parent / "chat_templates" / "deepseek_r1_distill.jinja").read_text()
    )
    tokenizer.add_special_tokens(
        {
            "eos_token": "<｜end▁of▁sentence｜>",
            "additional_special_tokens": ["<｜Assistant｜>", "<think>"],
        }
    )
    for said, wanted in (
        ("<think>x</think>4", "<think>x</think>4"),
        ("<think>\nx</think>4", "x</think>4"),
        ("4", "4"),
    ):
        assert (
            trained_text(encode_conversation(talk("hello", said), tokenizer), tokenizer)
            == f"{wanted}<｜end▁of▁sentence｜>"
        )


NO_ROLES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Human: ' + m['content'] + '\n\n### Assistant: ' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LIFT = [
    {
        "type": "function",
        "function": {
            "name": "lift",
            "description": "goes up",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_role_that_the_template_does_not_write_is_an_error_in_training_and_in_prompts(role):
    from posttrain.data.prompts import PromptConfig, prompts_from_rows

    tokenizer = byte_level(NO_ROLES)
    aside = {"role": role, "content": "in capitals"}
    lost = f"all that the {role} message says; would be lost: 'in capitals'"
    with pytest.raises(ValueError, match=lost):
        encode_conversation(
            [*talk("hello", "yes")[:1], aside, {"role": "assistant", "content": "yes"}], tokenizer
        )
    with pytest.raises(ValueError, match=f"row 1: .*{lost}"):
        prompts_from_rows(
            [{"prompt": [aside, {"role": "user", "content": "hello"}]}], tokenizer, PromptConfig()
        )
    assert encode_conversation(talk("hello", "yes"), tokenizer)


def test_tools_that_the_template_does_not_write_are_an_error_and_results_as_json_are_written():
    from posttrain.data.prompts import PromptConfig, prompts_from_rows

    tokenizer = byte_level(NO_ROLES)
    with pytest.raises(ValueError, match="writes nothing of the row's 1 tools"):
        encode_conversation(talk("hello", "yes"), tokenizer, tools=LIFT)
    with pytest.raises(
        ValueError, match="row 1: the chat template writes nothing of the row's 1 tools"
    ):
        prompts_from_rows([{"prompt": "hello", "tools": LIFT}], tokenizer, PromptConfig())
    as_json = byte_level(CHATML.replace("message['content']", "(message['content'] | tojson)"))
    result = {"role": "tool", "content": 'floor "3"\nä'}
    assert encode_conversation(
        [*talk("hello", "yes"), result, {"role": "assistant", "content": "no"}], as_json
    )


def test_reasoning_that_the_template_deletes_from_earlier_turns_is_an_error_and_kept_in_the_last():
    tokenizer = byte_level(FORGETS_THINKING)
    one = talk("hello", "<think>x</think>yes")
    assert (
        trained_text(encode_conversation(one, tokenizer), tokenizer)
        == "<think>x</think>yes<|im_end|>"
    )
    meta = {"file": "d.jsonl", "row": 9}
    with pytest.raises(
        ValueError,
        match=r"^d\.jsonl:9: the loss mask cannot be derived exactly.*end of message 2 .*--data\.chat_template",
    ):
        encode_conversation(one + talk("question", "five"), tokenizer, meta=meta)


META = {"file": "d.jsonl", "row": 9}
THINK_LOST = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
BAD = {
    "header would be trained": (
        NO_GENERATION_PROMPT,
        talk("hello", "yes"),
        r"ignores add_generation_prompt, so the header '<\|im_start\|>assistant\\n'",
    ),
    "generation prompt opens what the row lacks": (
        CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"),
        talk("hello", "yes"),
        "the generation prompt of the chat template is not how it begins message 2 .*{% generation %} markers",
    ),
    "text is lost": (
        THINK_LOST,
        talk("hello", "<think>secret</think>yes"),
        "does not render all that the assistant message says; would be lost: '<think>secret",
    ),
    "a repeated answer is lost": (
        CHATML.replace("message['content'] +", "(message['content'] if loop.index < 4 else '') +"),
        talk("hello", "yes", "question", "yes"),
        "would be lost: 'yes'",
    ),
    "reasoning field is lost": (
        CHATML,
        [talk("hello")[0], {"role": "assistant", "content": "yes", "reasoning_content": "because"}],
        "would be lost: 'because'",
    ),
    "tool call is lost": (
        CHATML,
        [
            talk("hello")[0],
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]},
        ],
        "would be lost: 'add'",
    ),
    "template refuses": (
        ALTERNATING,
        [{"role": "system", "content": "x"}, *talk("hello", "yes")],
        r"refuses the roles \['system', 'user', 'assistant'\]: System role not supported",
    ),
    "stop token in the text": (
        CHATML,
        talk("hello", "yes<|im_end|>"),
        r"contains '<\|im_end\|>', the token that ends a turn",
    ),
    "no template": (
        None,
        talk("hello", "yes"),
        "needs a chat template, and this tokenizer has none. Set --data.chat_template",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_exact_is_an_error_that_names_the_row(case):
    template, messages, message = BAD[case]
    with pytest.raises(ValueError, match=r"^d\.jsonl:9: .*" + message):
        encode_conversation(messages, byte_level(template), meta=META)


def test_markers_that_do_not_match_the_turns_cannot_tell_which_to_train():
    other_role = MARKED_WITH_END.replace("== 'assistant'", "== 'bot'")
    with pytest.raises(
        ValueError, match=r"^d\.jsonl:9: the template marks 0 generated spans for 1 assistant turns"
    ):
        encode_conversation(talk("a", "yes"), byte_level(other_role), meta=META)
    twice = MARKED_WITH_END.replace(
        "{% generation %}", "{% generation %}{{ 'x' }}{% endgeneration %}{% generation %}"
    )
    messages, tokenizer = talk("a", "yes", "b", "no"), byte_level(twice)
    assert (
        trained_text(encode_conversation(messages, tokenizer), tokenizer)
        == "xyes<|im_end|>xno<|im_end|>"
    )
    with pytest.raises(ValueError, match="marks 4 generated spans for 2 assistant turns"):
        encode_conversation(messages, tokenizer, trained=[False, False, False, True])


def test_stop_tokens_are_eos_and_the_end_of_turn():
    assert stop_token_ids(byte_level(CHATML)) == [2]
    assert stop_token_ids(byte_level(CHATML, eos="<|endoftext|>")) == [0, 2]
    assert stop_token_ids(byte_level(NO_END, eos="<|endoftext|>")) == [0]
    assert stop_token_ids(byte_level(None, eos=None)) == []
    assert stop_token_ids(metaspace(INST)) == [4]
    says_nothing = CHATML.replace("message['content']", "''")
    assert stop_token_ids(byte_level(says_nothing, eos="<|endoftext|>")) == [0]


def test_a_run_whose_template_ends_no_turn_is_refused():
    tokenizer = byte_level(NO_END, eos="<|endoftext|>")
    groups = [encode_conversation(talk("hello", "yes"), tokenizer) for _ in range(3)]
    with pytest.raises(
        ValueError,
        match=r"No stop token is ever trained: none of the 3 samples has one of the ids \[0\]",
    ):
        check_stop_trained(groups, stop_token_ids(tokenizer))


def test_a_stop_token_outside_the_mask_does_not_count():
    masked = PromptGroup(
        prompt_ids=[2], completions=[Completion(token_ids=[9, 2], loss_mask=[1, 0])]
    )
    trained = PromptGroup(
        prompt_ids=[5], completions=[Completion(token_ids=[9, 2], loss_mask=[0, 1])]
    )
    with pytest.raises(ValueError, match="none of the 1 samples"):
        check_stop_trained([masked], [2])
    check_stop_trained([masked, trained], [2])


def test_raw_text_is_prompt_completion_and_eos():
    for bos in (False, True):
        tokenizer = byte_level(None, bos=bos)
        group = ChatEncoder(tokenizer).encode_text("hello\n", "\nyes")
        assert tokenizer.decode(group.prompt_ids) == ("<s>" if bos else "") + "hello\n"
        assert trained_text(group, tokenizer) == "\nyes<|im_end|>"
        assert group.num_trained == len(group.completions[0].token_ids)
    assert list(ChatEncoder(byte_level(None, bos=True)).encode_text("", "yes").prompt_ids) == [3]
    with pytest.raises(ValueError, match="the prompt is empty and the tokenizer adds no BOS"):
        ChatEncoder(byte_level(None)).encode_text("", "yes")
    with pytest.raises(ValueError, match="has no EOS token"):
        ChatEncoder(byte_level(None, eos=None)).encode_text("a", "yes")


def test_highlighting_colours_exactly_the_trained_text_and_shows_every_character():
    tokenizer, messages = byte_level(), TALKS["emoji at the ends"]
    text = highlight_sample(encode_conversation(messages, tokenizer), tokenizer)
    assert text.plain == tokenizer.apply_chat_template(messages, tokenize=False)
    green = [text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style)]
    assert green == ["👩‍🚀 ü 👩‍🚀<|im_end|>", "日本語<|im_end|>"]


def test_highlighting_a_character_split_by_the_mask_loses_nothing():
    tokenizer = byte_level()
    ids = tokenizer("a👩b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    group = PromptGroup(
        prompt_ids=ids[:3], completions=[Completion(token_ids=ids[3:], loss_mask=[1, 1, 1])]
    )
    text = highlight_sample(group, tokenizer)
    assert text.plain == "a👩b"
    assert [text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style)] == ["👩b"]


def test_a_template_file_replaces_the_tokenizers(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(MARKED_WITH_END)
    tokenizer = byte_level(None)
    set_chat_template(tokenizer, path)
    assert (
        trained_text(encode_conversation(talk("hello", "yes"), tokenizer), tokenizer)
        == "yes<|im_end|>"
    )
    with pytest.raises(ValueError, match="none.jinja: cannot be read"):
        set_chat_template(tokenizer, tmp_path / "none.jinja")
    path.write_text("chatml")
    with pytest.raises(ValueError, match="no chat template"):
        set_chat_template(tokenizer, path)
