"""Rows as public data sets have them (columns and nesting only; the words are ours), and what must
come of each.

``docs/data.md`` shows this table: ``python -m tests.layouts`` writes it there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row, and the sample, the prompt for RL, or the refusal that it must become."""

    of: str
    """Data sets that are so."""
    row: Mapping[str, Any]
    layout: str = ""
    prompt: tuple[str, ...] = ("user: Q",)
    """``role: content``, with the names of what else a message has."""
    answers: tuple[str, ...] = ()
    """Best first; equal ranks in one text, with `` = `` between; unrated ones last, in brackets."""
    rl: tuple[str, ...] = ()
    """The prompt for RL where that is all, and after it the answer."""
    refused: str = ""
    """Part of the reason."""
    carry: tuple[str, ...] = ()
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)


def user(text: str) -> dict[str, str]:
    """{role, content}."""
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    """The assistant's."""
    return {"role": "assistant", "content": text, **more}


Q, GOOD, BAD = user("Q"), says("good"), says("bad")
TOOL = {"name": "lift", "description": "goes up", "parameters": {"floor": {"type": "int"}}}
SHARED = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Q\n\nAssistant:"
TURNS = ("user: Hi", "assistant: Hello", "user: Q")
PAIR = ("good", "bad")

CASES = [
    # demonstrations
    Case(
        of="Tulu 3 SFT mixture, no_robots",
        row={"id": "a1", "messages": [Q, GOOD], "source": "x"},
        layout="messages",
        answers=("good",),
    ),
    Case(
        of="ShareGPT",
        row={
            "id": "a",
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
        },
        layout="messages",
        answers=("good",),
    ),
    Case(
        of="OpenHermes 2.5",
        row={
            "conversations": [
                {"from": "system", "value": "S", "weight": None},
                {"from": "human", "value": "Q", "weight": None},
                {"from": "gpt", "value": "good", "weight": 1.0},
            ],
            "system_prompt": None,
            "skip_prompt_formatting": False,
            "category": "c",
            "source": "x",
        },
        layout="messages",
        prompt=("system: S", "user: Q"),
        answers=("good",),
    ),
    Case(
        of="SlimOrca with weights",
        row={
            "conversations": [
                {"from": "human", "value": "Hi", "weight": 0},
                {"from": "gpt", "value": "Hello", "weight": 0},
                {"from": "human", "value": "Q", "weight": 0},
                {"from": "gpt", "value": "good", "weight": 1},
            ]
        },
        layout="messages",
        prompt=("user: Hi", "assistant: Hello (weight)", "user: Q"),
        answers=("good",),
    ),
    Case(
        of="messages with train flags",
        row={"messages": [user("Hi"), says("Hello", train=False), Q, says("good", train=True)]},
        layout="messages",
        prompt=("user: Hi", "assistant: Hello (weight)", "user: Q"),
        answers=("good",),
    ),
    Case(
        of="messages with masks",
        row={"messages": [Q, says("good", mask=1)]},
        refused="the key 'mask'",
    ),
    Case(
        of="Bespoke-Stratos, OpenThoughts",
        row={
            "system": "S",
            "conversations": [
                {"from": "user", "value": "Q"},
                {"from": "assistant", "value": "good"},
            ],
        },
        layout="messages",
        prompt=("system: S", "user: Q"),
        answers=("good",),
    ),
    Case(
        of="LMSYS-chat-1M",
        row={
            "conversation_id": "c",
            "model": "m",
            "conversation": [Q, GOOD],
            "turn": 1,
            "language": "English",
            "openai_moderation": [{"flagged": False}],
            "redacted": False,
        },
        layout="messages",
        answers=("good",),
    ),
    Case(
        of="WildChat",
        row={
            "conversation_hash": "h",
            "model": "m",
            "timestamp": "t",
            "conversation": [
                {
                    **Q,
                    "country": "X",
                    "hashed_ip": "1",
                    "language": "English",
                    "redacted": False,
                    "toxic": False,
                    "turn_identifier": 7,
                    "header": {"a": "b"},
                    "state": None,
                    "timestamp": None,
                },
                {
                    **GOOD,
                    "country": None,
                    "hashed_ip": None,
                    "language": "English",
                    "redacted": False,
                    "toxic": False,
                    "turn_identifier": 7,
                    "timestamp": "t",
                },
            ],
            "turn": 1,
            "language": "English",
            "toxic": False,
            "redacted": False,
            "country": "X",
            "hashed_ip": "1",
        },
        layout="messages",
        answers=("good",),
    ),
    Case(
        of="Capybara",
        row={
            "source": "x",
            "conversation": [{"input": "Hi", "output": "Hello"}, {"input": "Q", "output": "good"}],
        },
        layout="messages",
        prompt=TURNS,
        answers=("good",),
    ),
    Case(
        of="Magpie",
        row={
            "uuid": "u",
            "instruction": "Q",
            "response": "good",
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
            "gen_input_configs": {"t": 1},
            "intent": "i",
            "difficulty": "easy",
            "input_quality": "good",
            "instruct_reward": 1.5,
            "language": "EN",
        },
        layout="messages",
        answers=("good",),
    ),
    Case(
        of="NuminaMath-CoT",
        row={"source": "x", "problem": "Q", "solution": "good", "messages": [Q, GOOD]},
        layout="messages",
        answers=("good",),
    ),
    Case(
        of="OpenR1-Math",
        row={
            "problem": "Q",
            "solution": "so 4",
            "answer": "4",
            "problem_type": "Algebra",
            "uuid": "u",
            "generations": ["good", "bad"],
            "correctness_math_verify": [True, False],
            "is_reasoning_complete": [True, True],
            "messages": [Q, GOOD],
        },
        refused="nothing reads",
    ),
    Case(
        of="OpenR1-Math, with --format ranked and what it does not read carried",
        row={
            "problem": "Q",
            "solution": "so 4",
            "answer": "4",
            "uuid": "u",
            "generations": ["bad", "good"],
            "correctness_math_verify": [False, True],
            "is_reasoning_complete": [True, True],
            "messages": [Q, BAD],
        },
        format="ranked",
        carry=("is_reasoning_complete",),
        layout="ranked",
        answers=PAIR,
    ),
    Case(
        of="conversations with their result",
        row={"messages": [Q, says("so it is 4")], "answer": "4"},
        layout="messages",
        answers=("so it is 4",),
        rl=("user: Q", "4"),
    ),
    Case(
        of="conversations with another result",
        row={"messages": [Q, says("so it is 4")], "answer": "5"},
        refused="nothing reads answer",
    ),
    Case(
        of="AM-DeepSeek-R1-Distilled",
        row={"messages": [{**Q, "info": {"source": "x"}}, {**GOOD, "info": {"think": "t"}}]},
        layout="messages",
        answers=("good",),
    ),
    Case(
        of="messages as JSON text (CSV)",
        row={"messages": json.dumps([Q, GOOD], indent=2)},
        layout="messages",
        answers=("good",),
    ),
    Case(of="messages as Python's repr", row={"messages": str([Q, GOOD])}, refused="Python's repr"),
    Case(
        of="OpenAI parts",
        row={"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, GOOD]},
        layout="messages",
        answers=("good",),
    ),
    Case(
        of="pictures (LLaVA)",
        row={
            "images": ["a.png"],
            "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, GOOD],
        },
        refused="Images",
    ),
    Case(
        of="Alpaca",
        row={
            "instruction": "Q",
            "input": "I",
            "output": "good",
            "text": "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\ngood",
        },
        layout="prompt_completion",
        prompt=("user: Q\n\nI",),
        answers=("good",),
    ),
    Case(
        of="Alpaca with history (LLaMA-Factory)",
        row={
            "instruction": "Q",
            "input": "",
            "output": "good",
            "system": "S",
            "history": [["Hi", "Hello"]],
        },
        layout="prompt_completion",
        prompt=("system: S", *TURNS),
        answers=("good",),
    ),
    Case(
        of="Dolly",
        row={"instruction": "Q", "context": "I", "response": "good", "category": "closed_qa"},
        layout="prompt_completion",
        prompt=("user: Q\n\nI",),
        answers=("good",),
    ),
    Case(
        of="OpenOrca",
        row={"id": "o", "system_prompt": "S", "question": "Q", "response": "good"},
        layout="prompt_completion",
        prompt=("system: S", "user: Q"),
        answers=("good",),
    ),
    Case(
        of="TRL prompt-completion",
        row={"prompt": [user("Hi"), says("Hello"), Q], "completion": [GOOD]},
        layout="prompt_completion",
        prompt=("user: Hi", "assistant: Hello (weight)", "user: Q"),
        answers=("good",),
    ),
    Case(
        of="UltraInteract SFT",
        row={
            "task": "Coding",
            "dataset": "x",
            "instruction": "Q",
            "response": "good",
            "id": "1",
            "parent_id": "0",
        },
        layout="prompt_completion",
        answers=("good",),
    ),
    Case(
        of="Nemotron post-training",
        row={
            "input": [Q],
            "output": "good",
            "category": "math",
            "license": "l",
            "generator": "g",
            "version": "v1",
            "system_prompt": "S",
            "reasoning": "on",
        },
        refused="nothing reads reasoning",
    ),
    Case(
        of="xLAM, APIGen calls",
        row={
            "id": 1,
            "query": "Q",
            "answers": json.dumps([{"name": "lift", "arguments": {"floor": 3}}]),
            "tools": json.dumps([TOOL]),
        },
        layout="prompt_completion",
        answers=(
            '[{"type": "function", "function": {"name": "lift", "arguments": {"floor": 3}}}] with 1 tool',
        ),
    ),
    Case(
        of="Hermes function calling, APIGen-MT",
        row={
            "id": "i",
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "lift", "arguments": {"floor": 3}}'},
                {"from": "observation", "value": "at 3"},
                {"from": "gpt", "value": "good"},
            ],
        },
        layout="messages",
        prompt=("user: Q", "assistant:  (tool_calls)", "tool: at 3"),
        answers=("good with 1 tool",),
    ),
    Case(
        of="OpenAI calls, arguments as text",
        row={
            "messages": [
                Q,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "lift", "arguments": '{"floor": 3}'},
                        }
                    ],
                },
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
        layout="messages",
        answers=(
            '[{"id": "c1", "type": "function", "function": {"name": "lift", "arguments": {"floor": 3}}}] with 1 tool',
        ),
    ),
    Case(
        of="ToolACE",
        row={
            "system": "S [lift]",
            "conversations": [
                {"from": "user", "value": "Q"},
                {"from": "assistant", "value": "[lift(floor=3)]"},
                {"from": "tool", "value": "at 3"},
                {"from": "assistant", "value": "good"},
            ],
        },
        layout="messages",
        prompt=("system: S [lift]", "user: Q", "assistant: [lift(floor=3)]", "tool: at 3"),
        answers=("good",),
    ),
    Case(
        of="Glaive v2",
        row={"system": "SYSTEM: S", "chat": "USER: Q\n\nASSISTANT: good <|endoftext|>"},
        refused="unknown format",
    ),
    # pairs
    Case(
        of="Anthropic HH",
        row={"chosen": f"{SHARED} good", "rejected": f"{SHARED} bad"},
        layout="pairs",
        prompt=TURNS,
        answers=PAIR,
    ),
    Case(
        of="full-hh-rlhf",
        row={"prompt": SHARED, "response": " good", "chosen": " good", "rejected": " bad"},
        layout="pairs",
        prompt=TURNS,
        answers=PAIR,
    ),
    Case(
        of="UltraFeedback binarized",
        row={
            "prompt": "Q",
            "prompt_id": "p",
            "chosen": [Q, GOOD],
            "rejected": [Q, BAD],
            "messages": [Q, GOOD],
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="UltraFeedback binarized, the other way round",
        row={
            "prompt": "Q",
            "chosen": [Q, GOOD],
            "rejected": [Q, BAD],
            "score_chosen": 2.0,
            "score_rejected": 9.0,
        },
        refused="which of them is better",
    ),
    Case(
        of="Tulu 3 preference mixture, Skywork",
        row={
            "id": "a",
            "prompt": "Q",
            "chosen": [Q, GOOD],
            "rejected": [Q, BAD],
            "chosen_rating": 4.0,
            "rejected_rating": 1.0,
            "chosen_model": "m",
            "rejected_model": "n",
            "source": "x",
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="Intel orca-dpo",
        row={"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"},
        layout="pairs",
        prompt=("system: S", "user: Q"),
        answers=PAIR,
    ),
    Case(
        of="Alpaca pairs (LLaMA-Factory)",
        row={"instruction": "Q", "input": "I", "chosen": "good", "rejected": "bad"},
        layout="pairs",
        prompt=("user: Q\n\nI",),
        answers=PAIR,
    ),
    Case(
        of="ShareGPT pairs (LLaMA-Factory)",
        row={
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="UltraInteract pairs",
        row={
            "task": "Coding",
            "dataset": "x",
            "trajectory": [{"from": "user", "value": "Q"}],
            "chosen": "good",
            "rejected": "bad",
            "id": "1",
            "parent_id": "0",
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="RewardBench",
        row={
            "prompt": "Q",
            "chosen": "good",
            "chosen_model": "m",
            "rejected": "bad",
            "rejected_model": "n",
            "subset": "s",
            "id": 3,
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="StackExchange paired",
        row={
            "qid": 1,
            "question": "Q",
            "date": "d",
            "metadata": ["x"],
            "response_j": "good",
            "response_k": "bad",
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="SHP",
        row={
            "post_id": "p",
            "domain": "d",
            "upvote_ratio": 0.9,
            "history": "Q",
            "c_root_id_A": "a",
            "c_root_id_B": "b",
            "created_at_utc_A": 1,
            "created_at_utc_B": 2,
            "score_A": 3,
            "score_B": 9,
            "human_ref_A": "bad",
            "human_ref_B": "good",
            "labels": 0,
            "seconds_difference": 1.0,
            "score_ratio": 3.0,
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="PKU-SafeRLHF",
        row={
            "prompt": "Q",
            "prompt_source": "x",
            "response_0": "bad",
            "response_1": "good",
            "is_response_0_safe": False,
            "is_response_1_safe": True,
            "response_0_sha256": "h",
            "better_response_id": 1,
            "safer_response_id": 1,
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="PKU-SafeRLHF, helpful or safe",
        row={
            "prompt": "Q",
            "response_0": "bad",
            "response_1": "good",
            "better_response_id": 0,
            "safer_response_id": 1,
        },
        refused="better_response_id, safer_response_id disagree",
    ),
    Case(
        of="PKU-SafeRLHF, the safer one chosen",
        row={
            "prompt": "Q",
            "response_0": "bad",
            "response_1": "good",
            "better_response_id": 0,
            "safer_response_id": 1,
        },
        carry=("better_response_id",),
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="HelpSteer2 preference",
        row={
            "split": "train",
            "prompt": "Q",
            "response_1": "bad",
            "response_2": "good",
            "preference_strength": 2,
            "preference_statement": "2 is better",
            "preference_elaboration": "e",
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="HelpSteer3",
        row={
            "domain": "code",
            "language": "python",
            "context": [Q],
            "response1": "good",
            "response2": "bad",
            "overall_preference": -1,
            "individual_preference": [{"score": -1}],
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="alpaca_farm",
        row={
            "instruction": "Q",
            "input": "",
            "output_1": "bad",
            "output_2": "good",
            "preference": 2,
            "raw_preference": 2.0,
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="Chatbot Arena",
        row={
            "question_id": "q",
            "model_a": "m",
            "model_b": "n",
            "winner": "model_b",
            "judge": "j",
            "conversation_a": [Q, BAD],
            "conversation_b": [Q, GOOD],
            "turn": 1,
            "anony": True,
            "language": "English",
            "tstamp": 1.0,
            "toxic_chat_tag": {"a": False},
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="Chatbot Arena, a tie",
        row={
            "model_a": "m",
            "model_b": "n",
            "winner": "tie (bothbad)",
            "conversation_a": [Q, BAD],
            "conversation_b": [Q, GOOD],
        },
        layout="pairs",
        answers=("bad = good",),
    ),
    Case(
        of="arena-human-preference-55k",
        row={
            "id": 1,
            "model_a": "m",
            "model_b": "n",
            "prompt": '["Q"]',
            "response_a": '["good"]',
            "response_b": '["bad"]',
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        layout="pairs",
        answers=PAIR,
    ),
    Case(
        of="arena-human-preference-140k",
        row={
            "id": "i",
            "winner": "both_bad",
            "conversation_a": [Q, GOOD],
            "conversation_b": [Q, BAD],
            "evaluation_session_id": "e",
            "evaluation_order": 1,
            "is_code": False,
        },
        layout="pairs",
        answers=("good = bad",),
    ),
    Case(
        of="computer use, corrected",
        row={
            "instruction": "Q",
            "state": "<screen>",
            "wrong_action": "bad",
            "corrected_action": "good",
        },
        layout="pairs",
        prompt=("user: Q\n\n<screen>",),
        answers=PAIR,
    ),
    # several answers
    Case(
        of="UltraFeedback",
        row={
            "source": "x",
            "instruction": "Q",
            "models": ["m", "n"],
            "correct_answers": [],
            "completions": [
                {
                    "model": "m",
                    "response": "bad",
                    "overall_score": 2.0,
                    "fine-grained_score": 3.0,
                    "critique": "c",
                    "principle": "p",
                    "custom_system_prompt": "s",
                    "annotations": {"honesty": {"Rating": "2"}},
                },
                {"model": "n", "response": "good", "overall_score": 8.5},
            ],
        },
        layout="ranked",
        answers=PAIR,
    ),
    Case(
        of="Nectar",
        row={
            "prompt": SHARED,
            "answers": [
                {"answer": "bad", "model": "m", "rank": 2.0},
                {"answer": "good", "model": "n", "rank": 1.0},
            ],
            "turns": 1,
            "num_responses": 7,
            "source": ["x"],
            "good_natured": True,
        },
        layout="ranked",
        prompt=TURNS,
        answers=PAIR,
    ),
    Case(
        of="distilabel",
        row={
            "instruction": "Q",
            "generations": ["bad", "good", "new"],
            "ratings": [1.0, 5.0, None],
            "model_names": ["m", "n", "o"],
        },
        layout="ranked",
        answers=("good", "bad", "[new]"),
    ),
    Case(
        of="what `posttrain prep pairs --layout groups` writes",
        row={
            "prompt": [Q],
            "completions": [[GOOD], [BAD]],
            "ranks": [0, 1],
            "scores": [2.0, 1.0],
            "source": "x",
            "row": 1,
            "prompt_id": "p",
        },
        layout="ranked",
        answers=PAIR,
    ),
    Case(
        of="a list of answers, and no more",
        row={"prompt": "Q", "completions": ["good", "bad"]},
        refused="nothing says which",
    ),
    Case(
        of="a list of answers, best first by --format ranked",
        row={"prompt": "Q", "completions": ["good", "bad"]},
        format="ranked",
        layout="ranked",
        answers=PAIR,
    ),
    Case(
        of="solutions with verdicts",
        row={
            "question": "Q",
            "m1": {"is_correct": False, "solution": "bad"},
            "m2": {"is_correct": True, "solution": "good"},
        },
        layout="ranked",
        answers=PAIR,
    ),
    Case(
        of="PRM800K in TRL's form",
        row={"prompt": "Q", "completions": ["step", "step"], "labels": [True, False]},
        refused="stepwise supervision",
    ),
    Case(
        of="PRM800K",
        row={
            "labeler": "l",
            "timestamp": "t",
            "question": {"problem": "Q", "ground_truth_answer": "4"},
            "label": {"steps": [{"rating": 1}]},
        },
        refused="unknown format",
    ),
    Case(
        of="Math-Shepherd",
        row={
            "input": "Q Step 1: 1+1=2 \u043a\u0438",
            "label": "Q Step 1: 1+1=2 +",
            "task": "GSM8K",
        },
        refused="unknown format",
    ),
    # single answers
    Case(
        of="KTO-mix",
        row={"prompt": [Q], "completion": [BAD], "label": False},
        layout="labelled",
        answers=("bad",),
    ),
    Case(
        of="conversations with a label",
        row={"messages": [Q, GOOD], "label": True},
        layout="labelled",
        answers=("good",),
    ),
    Case(
        of="HelpSteer2",
        row={
            "prompt": "Q",
            "response": "good",
            "helpfulness": 4,
            "correctness": 4,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 2,
        },
        layout="rated",
        answers=("good",),
    ),
    Case(
        of="OASST messages",
        row={"message_id": "a", "parent_id": None, "text": "Q", "role": "prompter", "rank": None},
        refused="unknown format",
    ),
    # problems for RL
    Case(
        of="GSM8K",
        row={"question": "Q", "answer": "2+2 = 4\n#### 4"},
        layout="prompt_completion",
        answers=("2+2 = 4\n#### 4",),
        rl=("user: Q", "2+2 = 4\n#### 4"),
    ),
    Case(
        of="MATH",
        row={"problem": "Q", "level": "Level 1", "type": "Algebra", "solution": "so $\\boxed{4}$"},
        layout="prompt_completion",
        answers=("so $\\boxed{4}$",),
        rl=("user: Q", None),
    ),
    Case(
        of="DeepScaleR",
        row={"problem": "Q", "answer": "4", "solution": "so 4"},
        refused="nothing reads solution",
        rl=("user: Q", "4"),
    ),
    Case(
        of="Big-Math",
        row={
            "problem": "Q",
            "answer": "4",
            "source": "x",
            "domain": ["Algebra"],
            "llama8b_solve_rate": 0.5,
        },
        layout="prompt_completion",
        answers=("4",),
        rl=("user: Q", "4"),
    ),
    Case(
        of="DAPO-17k, verl",
        row={
            "data_source": "x",
            "prompt": [Q],
            "ability": "MATH",
            "reward_model": {"ground_truth": "4", "style": "rule"},
            "extra_info": {"index": 1},
        },
        refused="unknown format",
        rl=("user: Q", "4"),
    ),
    Case(
        of="APPS, TACO",
        row={
            "problem_id": 1,
            "question": "Q",
            "solutions": json.dumps(["print(4)"]),
            "input_output": json.dumps({"inputs": ["2"], "outputs": ["4"]}),
            "difficulty": "introductory",
            "url": "u",
            "starter_code": "def f(x):",
        },
        refused="unknown format",
        rl=("user: Q\n\ndef f(x):", None),
    ),
    Case(
        of="CodeContests",
        row={
            "name": "n",
            "description": "Q",
            "public_tests": {"input": ["2"], "output": ["4"]},
            "difficulty": 7,
            "solutions": {"language": [3], "solution": ["print(4)"]},
            "time_limit": {"seconds": 2},
        },
        refused="unknown format",
        rl=("user: Q", None),
    ),
    Case(
        of="KodCode",
        row={
            "style": "instruct",
            "question_id": "k",
            "question": "Q",
            "solution": "def f(): ...",
            "test_code": "assert f() == 4",
            "gpt_difficulty": "easy",
        },
        refused="nothing reads test_code",
        rl=("user: Q", None),
    ),
    Case(
        of="conversations as problems",
        row={"messages": [Q, GOOD]},
        layout="messages",
        answers=("good",),
        rl=("user: Q", "good"),
    ),
]


def _cell(text: str) -> str:
    return "`" + text.replace("\n", "⏎").replace("|", "\\|") + "`"


def outcome(case: Case) -> str:
    """What comes of it, for the documentation."""
    if case.refused:
        told = f"refused: ...{case.refused}..."
    else:
        told = f"{case.layout}: {' '.join(_cell(p) for p in case.prompt)} → {' > '.join(_cell(a) for a in case.answers)}"
    if case.rl:
        told += f"; for RL {_cell(case.rl[0])}" + (
            f", answer {_cell(case.rl[1])}" if case.rl[1] else ""
        )
    return told


def table() -> str:
    """The rows as Markdown."""
    lines = ["| data set | columns | what comes of it |", "|---|---|---|"]
    for case in CASES:
        given = "".join(f", carry {name}" for name in case.carry) + (
            f", format {case.format}" if case.format != "auto" else ""
        )
        lines.append(f"| {case.of} | {', '.join(case.row)}{given} | {outcome(case)} |")
    return "\n".join(lines)


def write() -> None:
    """Puts the table between its marks in docs/data.md."""
    path = Path(__file__).parents[1] / "docs" / "data.md"
    before, _, rest = path.read_text().partition("<!-- layouts -->\n")
    _, _, after = rest.partition("<!-- /layouts -->")
    path.write_text(f"{before}<!-- layouts -->\n{table()}\n<!-- /layouts -->{after}")


if __name__ == "__main__":
    write()
