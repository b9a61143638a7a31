"""Rewards: numbers of the papers, right and wrong answers, functions by name and weight."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest

from posttrain.rewards import CompletionText, reward
from posttrain.rewards.answers import math_answer, numeric_answer
from posttrain.rewards.code import code_tests
from posttrain.rewards.compose import BUILT_IN, Rewards, RewardsConfig, by_name
from posttrain.rewards.text import (
    cosine_length,
    k15_length,
    language_consistency,
    overlong_penalty,
    repetition_penalty,
    think_answer_format,
)
from posttrain.rl.samples import rollout_metrics
from posttrain.rl.trajectory import Trajectory
from tests.unit.completion_texts import texts

HERE = "tests.reward_functions"


@pytest.mark.parametrize(
    ("lengths", "right", "wanted"),
    [
        ((100, 200, 300), (1, 1, 0), (0.5, 0, -0.5)),
        ((100, 200, 300), (0, 1, 1), (0, 0, -0.5)),
        ((100, 150, 300, 500), (1, 0, 0, 1), (0.5, 0, 0, -0.5)),
        ((70, 70), (1, 0), (0, 0)),
    ],
)
def test_k15_length_reward(lengths, right, wanted):
    completions = [CompletionText("x", num_tokens=n) for n in lengths]
    assert k15_length(completions, {}, {"right": [float(r) for r in right]}) == pytest.approx(
        wanted
    )


@pytest.mark.parametrize(
    ("length", "wanted"), [(16384, 0), (18432, -0.5), (20480, -1), (20481, -1), (5, 0)]
)
def test_dapo_overlong(length, wanted):
    assert (
        overlong_penalty(
            CompletionText("x", num_tokens=length), {}, max_tokens=20480, cache_tokens=4096
        )
        == wanted
    )


def test_cosine_and_repetition():
    completions = [CompletionText("x", num_tokens=n) for n in (0, 50, 50, 100)]
    assert cosine_length(
        completions, {}, {"r": [1.0, 1.0, 0.0, 1.0]}, max_tokens=100
    ) == pytest.approx([1.0, 0.75, -0.75, -1.0])
    assert repetition_penalty("a b c d", {}) == 0 and repetition_penalty(
        "a a a a a", {}
    ) == pytest.approx(-2 / 3)


def test_language_consistency():
    eighteen = " ".join(["word"] * 18 + ["слово", "мир"])
    assert language_consistency(f"<think>{eighteen}</think> 12 3", {}) == pytest.approx(0.9)
    assert language_consistency("你好 hello", {"language": "zh"}) == pytest.approx(2 / 3)
    assert language_consistency("123 + 4", {}) == 1.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("слово word</think> слово слово", 0.5),  # <think> stands in the prompt
        ("<think>слово word", 0.5),
        ("<think>слово</think> word word", 0),
        ("<think>слово</think>word</think>", 0.5),
        ("<answer>слово</answer>", 0),
        ("<answer> word </answer>", 1),
        ("<think></think>", 1),
    ],
)
def test_language_consistency_reads_the_chain_of_thought_without_its_tags(text, wanted):
    assert language_consistency(text, {}) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>a</think> <answer>b</answer>", 1),
        ("<think>\na\n</think>\n<answer>\nb\n</answer>\n", 1),
        ("<think>a</think><answer>b</answer> and more", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a<think></think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<THINK>a</THINK><answer>b</answer>", 0),
        ("b", 0),
    ],
)
def test_format(text, wanted):
    assert think_answer_format(text, {}) == wanted
    assert think_answer_format(text.removeprefix("<think>"), {}, opened=True) == (
        wanted if text.startswith("<think>") else 0
    )


ANSWERS = [
    ("math_answer", r"So it is $\boxed{\frac{1}{2}}$.", {"answer": "0.5"}, 1),
    ("math_answer", "<answer>72</answer>", {"answer": "Natalia sold 48/2 = 24 clips.\n#### 72"}, 1),
    ("math_answer", "<answer>73</answer>", {"answer": "#### 72"}, 0),
    ("math_answer", "<answer>72</answer><answer>73</answer>", {"answer": "72"}, 0),
    ("math_answer", "no idea", {"answer": "72"}, 0),
    ("math_answer", r"$x = 3, y = 4$ so $\boxed{7}$", {"answer": "7"}, 1),
    ("numeric_answer", "it costs $1,234.50 in all", {"answer": "1234.5"}, 1),
    ("numeric_answer", "three quarters, 3/4", {"answer": "0.75"}, 1),
    (
        "numeric_answer",
        "the answer is ７",
        {"answer": "7"},
        0,
    ),  # a full-width digit is not a number
    ("numeric_answer", "1/0", {"answer": "0"}, 0),
    ("numeric_answer", "12", {"answer": "twelve"}, None),
    ("exact_answer", "<think>hm</think><answer> Paris </answer>", {"answer": "Paris"}, 1),
    ("exact_answer", "paris", {"answer": "Paris"}, 0),
    ("choice_answer", "I think (A) is wrong, so the answer is (C).", {"answer": "C"}, 1),
    ("choice_answer", "b", {"answer": "B"}, 1),
    ("choice_answer", "A, B, C and D", {"answer": "D"}, 0),
    ("choice_answer", "x", {"answer": "none"}, None),
    ("choice_answer", "Answer: C", {"answer": "C"}, 1),
    ("choice_answer", "First (A), but in the end it is **C**.", {"answer": "C"}, 1),
    ("choice_answer", "**Answer:** D", {"answer": "C"}, 0),
    (
        "gym_answer",
        "c b a",
        {"task": "word_sequence_reversal", "answer": "c, b, a", "metadata": {}},
        0,
    ),
    (
        "gym_answer",
        "c, b, a",
        {"task": "word_sequence_reversal", "answer": "c, b, a", "metadata": {}},
        1,
    ),
]


def test_answers_in_worker_processes(rewards_of):
    names = dict.fromkeys(name for name, *_ in ANSWERS)
    rewards = rewards_of(
        RewardsConfig(
            by_task={n: {n: 1.0} for n in names},
            task_column="reward",
            timeout_s=30,
            max_unscored=1.0,
        )
    )
    groups = [({**sample, "reward": name}, texts(text)) for name, text, sample, _ in ANSWERS]
    for (name, text, _, wanted), (scored,) in zip(ANSWERS, rewards.score(groups), strict=True):
        assert scored.reward == wanted, (name, text, scored)


def test_functions_that_fail_are_named_and_scored_none(rewards_of, caplog):
    broken = {
        f"{HERE}.{name}": 1.0 for name in ("hangs", "raises", "is_nan", "eats_memory", "dies")
    }
    rewards = rewards_of(
        RewardsConfig(functions={**broken, f"{HERE}.chatters": 1.0}, timeout_s=2, max_unscored=1.0)
    )
    ((scored,),) = rewards.score(
        [({"name": "n1", "plus": 0.5, "_where": "rows.jsonl:7"}, texts("abc"))]
    )
    assert scored.reward is None and scored.parts[f"{HERE}.chatters"] == 3.5
    wanted = {
        "hangs": "longer than 2 s",
        "raises": "KeyError",
        "is_nan": "nan",
        "eats_memory": "out of memory",
        "dies": "died",
    }
    for name, text in wanted.items():
        assert scored.parts[f"{HERE}.{name}"] is None
        assert any(p.startswith(f"{HERE}.{name}: ") and text in p for p in scored.problems), (
            scored.problems
        )
    assert "rows.jsonl:7" in caplog.text


def test_every_kind_of_function_is_composed_with_its_weight(rewards_of):
    @reward(grouped=True)
    def length_of_group(completions, sample, scores):
        return [float(len(completions)) + (s or 0) for s in scores[f"{HERE}.batched"]]

    rewards = rewards_of(
        RewardsConfig(
            functions={f"{HERE}.batched": 0.5, f"{HERE}.asynchronous": 1.0},
            by_task={"long": {f"{HERE}.chatters": 0.1}},
            max_unscored=1.0,
        ),
        given={"group": (length_of_group, 2.0), "inline": (lambda c, s: 0.25, 4.0)},
    )
    plain, long = rewards.score(
        [({}, texts("ab", "bad")), ({"task": "long", "plus": 7}, texts("abc"))]
    )
    assert plain[0].reward == pytest.approx(0.5 * 2 + 2.0 + 2 * (2 + 2) + 4 * 0.25)
    assert plain[1].reward is None and "asynchronous: raised ValueError" in plain[1].problems[0]
    assert long[0].reward == pytest.approx(0.5 * 3 + 2.0 + 0.1 * 10 + 2 * (1 + 3) + 1)


def test_functions_of_several_completions_may_be_partials_with_arguments_of_their_own(rewards_of):
    def scaled(factor, completions, *rest):
        return [factor * len(c) for c in completions]

    def forgetful(factor, completions, *rest):
        return [1.0]

    given = {
        "batched": (reward(batched=True)(partial(scaled, 2.0)), 1.0),
        "grouped": (reward(grouped=True)(partial(scaled, 10.0)), 1.0),
    }
    (scored,) = rewards_of(RewardsConfig(), given=given).score([({}, texts("ab", "abc"))])
    assert [s.reward for s in scored] == [24.0, 36.0]
    given = {"batched": (reward(batched=True)(partial(forgetful, "a")), 1.0)}
    rewards = rewards_of(RewardsConfig(max_unscored=1.0), given=given)
    (scored,) = rewards.score([({}, texts("ab", "abc"))])
    assert all("returned 1 values for 2 completions" in s.problems[0] for s in scored)


def test_a_weight_can_start_later_and_is_logged_before(rewards_of):
    config = RewardsConfig(
        functions={f"{HERE}.batched": 1.0, "k15_length": 1.0}, first_iteration={"k15_length": 3}
    )
    rewards = rewards_of(config)
    group = [({}, texts("a", "b b b"))]
    before, after = rewards.score(group, iteration=2)[0], rewards.score(group, iteration=3)[0]
    assert [s.reward for s in before] == [1.0, 5.0] and [s.parts["k15_length"] for s in before] == [
        0.5,
        -0.5,
    ]
    assert [s.reward for s in after] == [1.5, 4.5]


def test_mistakes_in_the_settings():
    with pytest.raises(ValueError, match="math_answer, numeric_answer"):
        Rewards(RewardsConfig(functions={"no_such": 1.0}))
    with pytest.raises(ValueError, match="which rewards.functions and rewards.by_task do not use"):
        RewardsConfig(functions={"math_answer": 1.0}, options={"exact_answer": {}})
    with pytest.raises(ValueError, match="no option .colum.; it has column"):
        Rewards(
            RewardsConfig(functions={"exact_answer": 1.0}, options={"exact_answer": {"colum": "x"}})
        )
    with pytest.raises(ValueError, match="There is no reward"):
        Rewards(RewardsConfig())
    with pytest.raises(ValueError, match="concurrency"):
        RewardsConfig(functions={"math_answer": 1.0}, concurrency=0)
    assert all(path.startswith("posttrain.rewards.") for path in BUILT_IN.values())


def test_a_declaration_is_a_decorator_that_leaves_the_function_as_it_is():
    @reward(on_timeout=0.0, verifies=True)
    def f(completion, sample):
        return 1.0

    assert f("x", {}) == 1.0 and f.__name__ == "f"
    assert reward.of(f) == reward(on_timeout=0.0, verifies=True)
    assert reward.of(lambda c, s: 1.0) == reward()
    with pytest.raises(ValueError, match="batched or grouped"):
        reward(batched=True, grouped=True)


def test_an_attribute_set_by_hand_is_refused_and_not_ignored():
    def f(completions, samples):
        return [1.0 for _ in completions]

    f.batched = True
    with pytest.raises(
        ValueError, match=r"'f' has an attribute 'batched'.*@reward\(batched=\.\.\.\)"
    ):
        Rewards(RewardsConfig(), given={"f": (f, 1.0)})


def test_two_functions_of_one_name_are_refused():
    from posttrain.trainers.rl import RLTrainer

    def first(completion, sample):
        return 1.0

    assert by_name({first: 2.0}) == {"first": (first, 2.0)}
    with pytest.raises(ValueError, match="Two rewards have the name '<lambda>'"):
        RLTrainer(
            train_dataset=[{"prompt": "x"}], rewards={lambda c, s: 1.0: 1.0, lambda c, s: 0.0: 1.0}
        )
    with pytest.raises(ValueError, match="Two rewards have the name 'exact_answer'"):
        Rewards(
            RewardsConfig(functions={"exact_answer": 1.0}), given={"exact_answer": (first, 1.0)}
        )


ADD = "```python\ndef add(a, b):\n    return a + b\n```"
METHOD = "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```"
ECHO = "```python\nimport sys\nprint(int(sys.stdin.read()) * 2)\n```"


@pytest.mark.parametrize(
    ("completion", "tests", "wanted"),
    [
        (ADD, ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"], 1),
        (ADD, ["assert add(1, 2) == 4"], 0),
        (ECHO, [{"stdin": "21\n", "stdout": "42\n"}], 1),
        (ECHO, json.dumps([{"stdin": "21", "stdout": "42"}, {"stdin": "1", "stdout": "3"}]), 0),
        ("no code at all", ["assert True"], 0),
        ("```bash\npip install x\n```\nNow:\n" + ADD, ["assert add(1, 2) == 3"], 1),
        (ADD.replace("python", "Python3") + "\n```text\n3\n```", ["assert add(1, 2) == 3"], 1),
        (ADD, [], None),
        (
            ADD + "\nIt prints\n```\n3\n```\n",
            ["assert add(1, 2) == 3"],
            1,
        ),  # an output block is not the program
        (ADD.replace("```", "~~~"), ["assert add(1, 2) == 3"], 1),
        (ADD.replace("python", ""), ["assert add(1, 2) == 3"], 1),
        (
            ECHO.replace("print", "print('debug', file=sys.stderr)\nprint"),
            [{"stdin": "21\n", "stdout": "42\n"}],
            1,
        ),
        (
            ECHO.replace("print", "import warnings\nwarnings.warn('old')\nprint"),
            [{"stdin": "21", "stdout": "42"}],
            1,
        ),
        (ECHO, [{"input": "21", "output": "42", "type": "stdin_stdout"}], 1),
        (ECHO, {"inputs": ["21", "1"], "outputs": ["42", "2"]}, 1),
        (ECHO, json.dumps({"inputs": ["21", "1"], "outputs": ["42", "3"]}), 0),
        (ECHO, {"input": ["4"], "output": ["8"]}, 1),
        (ECHO, [{"stdin": ["21"], "stdout": ["42"]}], 1),
        (ADD, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}, 1),
        (ADD, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, 1),
        (ADD, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [4]}, 0),
        (ADD, [{"input": "1\n2", "output": "3", "fn_name": "add"}], 1),
        (METHOD, [{"input": [1, 2], "output": 3, "fn_name": "add", "type": "function_call"}], 1),
    ],
)
def test_code(completion, tests, wanted):
    assert code_tests(completion, {"tests": tests}) == wanted


def test_a_learned_reward_model_scores_as_plain_transformers(tmp_path, rewards_of):
    import torch
    from transformers import AutoModelForSequenceClassification

    from posttrain.models.heads import load_reward_model
    from posttrain.models.load import ModelConfig, load_tokenizer, save_model
    from tests.tiny import model_folder

    source = ModelConfig(name=str(model_folder(tmp_path / "base")))
    tokenizer = load_tokenizer(source)
    save_model(
        load_reward_model(source, tokenizer, dtype=torch.float32), tokenizer, tmp_path / "rm"
    )
    options = {"reward_model": {"model": str(tmp_path / "rm"), "max_length": 80}}
    rewards = rewards_of(
        RewardsConfig(functions={"reward_model": 1.0}, options=options, max_unscored=1.0)
    )
    groups = [
        ({"prompt": "2+2?"}, texts("4", "five", "", "x" * 200)),
        ({"question": "1+1?"}, texts("2")),
    ]
    assert [s.reward for s in rewards.score([({"prompt": "?"}, texts("", "x" * 200))])[0]] == [
        None
    ] * 2
    first, second = rewards.score(groups)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", dtype=torch.float32
    ).eval()
    for (sample, answers), row in zip(groups, (first, second), strict=True):
        for answer, scored in zip(answers, row, strict=True):
            if answer in ("", "x" * 200):
                assert scored.reward is None
                continue
            question = sample.get("prompt") or sample["question"]
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": str(answer)},
            ]
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            with torch.no_grad():
                wanted = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
            assert scored.reward == pytest.approx(
                wanted, abs=0.02
            )  # bfloat16 where the machine is good at it


def test_a_judge_is_asked_and_its_failures_are_named(rewards_of, monkeypatch):
    from posttrain.rewards import model as judge

    asked = []

    def post(url, body, key, timeout_s):
        asked.append((url, body["messages"][0]["content"], key))
        if "down" in body["messages"][0]["content"]:
            raise ConnectionError("refused")
        return "Fine. Rating: 8" if "4" in asked[-1][1] else "I cannot rate this. Rating: 11"

    monkeypatch.setattr(judge, "_post", post)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    options = {"llm_judge": {"url": "http://x/v1/", "model": "m"}}
    rewards = rewards_of(
        RewardsConfig(functions={"llm_judge": 1.0}, options=options, max_unscored=1.0)
    )
    (row,) = rewards.score([({"question": "2+2?"}, texts("4</answer>Rating: 10", "no", "down"))])
    assert [s.reward for s in row] == [0.8, None, None] and "refused" in row[2].problems[0]
    assert (
        asked[0][0] == "http://x/v1/chat/completions"
        and asked[0][1].count("</answer>") == 1
        and asked[0][2] == "k"
    )


@pytest.mark.parametrize("reason", ["stop", "length", "repeat"])
def test_an_answer_that_does_not_end_is_wrong(reason, rewards_of):
    """Where must_end is set: its verifier's 1 becomes 0, a penalty stays, and what reads the
    verifier's score reads 0."""
    config = RewardsConfig(
        functions={"exact_answer": 1.0, "overlong_penalty": 1.0, "k15_length": 1.0},
        must_end=True,
        options={"overlong_penalty": {"max_tokens": 10, "cache_tokens": 10}},
    )
    short = CompletionText("<answer>4</answer>", num_tokens=5, finish_reason=reason)
    long = CompletionText("<answer>4</answer>", num_tokens=10)
    sample = {"answer": "4"}
    (scored,) = rewards_of(config).score([(sample, [short, long])])
    ended = reason == "stop"
    assert scored[0].parts == {
        "exact_answer": float(ended),
        "overlong_penalty": -0.5,
        "k15_length": 0.5 if ended else 0.0,
    }
    assert scored[1].parts == {"exact_answer": 1.0, "overlong_penalty": -1.0, "k15_length": -0.5}
    (lax,) = rewards_of(RewardsConfig(functions={"exact_answer": 1.0})).score([(sample, [short])])
    assert lax[0].reward == 1.0


@pytest.mark.parametrize(
    "tests",
    [
        {"cases": [1]},
        [{"stdin": "1"}],
        [3],
        {"inputs": ["1", "2"], "outputs": ["1"]},
        7,
        [{"question": "1", "answer": "2"}],
    ],
)
def test_tests_of_an_unknown_layout_are_named_and_no_zero(tests):
    with pytest.raises(ValueError, match="column 'tests'"):
        code_tests(ADD, {"tests": tests})


def test_special_tokens_are_part_of_what_a_verifier_reads():
    """<think> is a special token of many tokenizers; only what ends a completion, and padding, is
    taken off."""
    from posttrain.data.prompts import Prompt
    from posttrain.rl.trajectory import SingleTurn, Trajectory
    from tests.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]}
    )
    environment = SingleTurn(tokenizer)
    prompts = [
        Prompt(ids=tuple(tokenizer(ids)["input_ids"]), sample={})
        for ids in ("2+2?", "2+2?<think>\n", "<think> is a tag")
    ]
    said = "<think>two and two</think><answer>4</answer>"
    ids = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    trajectory = Trajectory(seed=0, token_ids=ids, logps=[0.0] * len(ids), finish_reason="stop")
    text = environment.text(trajectory, prompts[0])
    assert text == said and text.num_tokens == len(ids) and think_answer_format(text, {}) == 1.0
    assert [environment.text(trajectory, p).in_thought for p in prompts] == [False, True, False]


def test_a_thought_that_the_prompt_began_and_that_is_cut_off_is_no_answer():
    import pickle

    sample = {"answer": "4"}
    cut = CompletionText(r"maybe \boxed{4}, no", in_thought=True, finish_reason="length")
    assert pickle.loads(pickle.dumps(cut)).in_thought, "as it goes to a worker"
    for verifier in (math_answer, numeric_answer):
        assert verifier(cut, sample) == 0.0 and verifier(cut, sample, in_thought=True) == 1.0
        assert verifier(CompletionText(r"maybe 5</think>\boxed{4}", in_thought=True), sample) == 1.0
        assert verifier(CompletionText(r"\boxed{4}"), sample) == 1.0


def test_answers_that_no_verifier_can_read_are_named(rewards_of):
    rewards = rewards_of(
        RewardsConfig(
            functions={"math_answer": 1.0, "choice_answer": 1.0, "think_answer_format": 1.0}
        )
    )
    samples = [
        {"_where": f"f:{i}", "answer": a}
        for i, a in enumerate(["4", r"\oint \mapsto \heartsuit", "C", r"11\sqrt2"])
    ]
    found = rewards.unreadable(samples)
    assert [place.split(": ")[0] for place in found["math_answer"]] == [
        "f:1"
    ] and "think_answer_format" not in found
    assert [place.split(": ")[0] for place in found["choice_answer"]] == ["f:0", "f:1", "f:3"]
    missing = rewards.unreadable([{"_where": "f:9"}])["math_answer"][0]
    assert missing.startswith("f:9: ") and "no column 'answer'" in missing


def test_right_is_a_named_reward_and_not_the_first_one(rewards_of):
    def longest(completion, sample):
        return float(len(completion))

    def shortest(completion, sample):
        return -float(len(completion))

    config = RewardsConfig(functions={"think_answer_format": 0.5, "exact_answer": 1.0})
    rewards = rewards_of(config, given={"longest": (longest, 0.1)})
    ((right, wrong),) = rewards.score([({"answer": "4"}, texts("4", "12345"))])
    assert rewards.verifier({}) == "exact_answer" and (right.verdict, wrong.verdict) == (1.0, 0.0)
    named = rewards_of(config, given={"longest": (longest, 0.1)}, correct_reward="longest")
    assert (
        named.score([({"answer": "4"}, texts("4"))])[0][0].verdict == 1.0
        and named.verifier({}) == "longest"
    )
    several = rewards_of(
        RewardsConfig(), given={"longest": (longest, 1.0), "shortest": (shortest, 1.0)}
    )
    assert several.verifier({}) is None and several.score([({}, texts("4"))])[0][0].verdict is None
    with pytest.raises(
        ValueError,
        match="an evaluation needs to know which of the rewards longest, shortest.*--evaluation.correct_reward longest",
    ):
        several.needs_verifier({}, "an evaluation")
    with pytest.raises(ValueError, match="evaluation.correct_reward is one of the rewards longest"):
        Rewards(RewardsConfig(), given={"longest": (longest, 1.0)}, correct_reward="exact")


def test_votes_are_counted_by_the_tasks_own_verifier(rewards_of):
    """Two ways to write a wrong answer are one answer, and win over the right one."""
    from posttrain.rl.evaluate import majority_is_right

    rewards = rewards_of(RewardsConfig(functions={"math_answer": 1.0}))
    said = texts(
        r"\boxed{\frac{1}{2}}",
        r"\boxed{0.5}",
        r"\boxed{x^2+2x+1}",
        r"\boxed{(x+1)^2}",
        r"\boxed{7}",
        "",
    )
    assert [
        kind == rewards.alike({"answer": "7"}, said)[0]
        for kind in rewards.alike({"answer": "7"}, said)
    ] == [
        True,
        True,
        *[False] * 4,
    ]
    kinds = rewards.alike({"answer": "7"}, said)
    assert kinds[2] == kinds[3] != kinds[0] and len(set(kinds)) == 4
    assert majority_is_right(kinds[:2] + kinds[4:5], [False, False, True]) == 0.0
    choices = rewards_of(RewardsConfig(functions={"choice_answer": 1.0}))
    letters = choices.alike(
        {"answer": "A"}, texts("The answer is B.", r"\boxed{\text{B}}", "**B**", "(C)")
    )
    assert letters[0] == letters[1] == letters[2] != letters[3]


def test_partial_credit_is_no_right_answer():
    """Three of five tests passed: 0.6 is in the mean of the reward, and in no accuracy."""
    drawn = [
        Trajectory(
            seed=0, reward=v, verdict=v, token_ids=[1], finish_reason="stop", parts={"tests": v}
        )
        for v in (0.0, 0.6, 1.0, None)
    ]
    group = SimpleNamespace(trajectories=drawn, has_signal=lambda: True)
    metrics = rollout_metrics([group], cost=1.0)
    assert metrics["reward"] == metrics["reward/tests"] == pytest.approx(1.6 / 3)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    answers = [CompletionText("x" * n, num_tokens=n) for n in (1, 2, 3)]
    bonus = k15_length(answers, {}, {"tests": [0.6, 1.0, 1.0]})
    assert bonus == [0.0, 0.0, -0.5], "the shortest is not right, so it gets no bonus"
