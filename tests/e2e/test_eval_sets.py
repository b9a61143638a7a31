"""`posttrain eval --pairs` and `--harness`."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from posttrain.cli.eval import pair_figures
from tests.e2e.launching import check, posttrain_warm, run_warm
from tests.tiny import model_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(model_folder(folder / str(seed), seed=seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{a}+{a}", "chosen": str(2 * a), "rejected": "no"} for a in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def margins_by_hand(folder, path):
    """log p(chosen) - log p(rejected), one sequence at a time through the template, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def nats(prompt, answer):
        turn = [{"role": "user", "content": prompt}]
        before = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        head = tokenizer(before, add_special_tokens=False)["input_ids"]
        tail = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        logps = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        return sum(float(logps[len(head) + i - 1, t]) for i, t in enumerate(tail))

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [nats(r["prompt"], r["chosen"]) - nats(r["prompt"], r["rejected"]) for r in rows]


def test_pairs_are_those_of_a_loop_over_single_sequences(models, pairs):
    policy, ref = (margins_by_hand(folder, pairs) for folder in models)
    wanted = [a - b for a, b in zip(policy, ref, strict=True)]
    got = pair_figures(models[0], [str(pairs)], reference=models[1], dtype=torch.float64)
    assert got["accuracy"] == statistics.fmean(m > 0 for m in wanted)
    assert got["margin_nats"] == pytest.approx(statistics.fmean(wanted), abs=1e-8)
    interval = 1.96 * statistics.stdev(wanted) / math.sqrt(9)
    assert got["margin_nats_ci95"] == pytest.approx(interval, abs=1e-8)


def test_a_model_against_itself_has_margin_zero(models, pairs, tmp_path):
    out = tmp_path / "figures.json"
    arguments = ["--pairs", str(pairs), "--reference", models[0], "--out", str(out)]
    result = check(posttrain_warm("eval", models[0], *arguments))
    figures = json.loads(out.read_text())
    assert figures["margin_nats"] == 0 and figures["accuracy"] == 0 and figures["pairs"] == 9
    assert "9 pairs of 9 prompts" in result.stdout


def test_scores_of_a_reward_model_are_those_of_plain_transformers(models, pairs, tmp_path):
    """A trained head, and the whole text through AutoModelForSequenceClassification."""
    settings = ["--model.name", models[0], "--data.train", f"[{pairs}]", "--train.max_steps", "2"]
    run = ["--train.batch_size", "4", "--train.run_dir", str(tmp_path), "--train.name", "scores"]
    check(run_warm("cpu.yaml", "reward", *settings, *run, "--optimizer.lr", "1e-2"))
    final = tmp_path / "scores" / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(final)

    def score(prompt, answer):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return float(model(ids).logits[0, 0])

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    margins = [score(r["prompt"], r["chosen"]) - score(r["prompt"], r["rejected"]) for r in rows]
    got = pair_figures(str(tmp_path / "scores"), [str(pairs)], reference=None, dtype=torch.float64)
    assert got["margin_nats"] == pytest.approx(statistics.fmean(margins), abs=1e-6)
    assert got["accuracy"] == statistics.fmean(m > 0 for m in margins)


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
"""


def test_harness_tasks_of_ones_own(models, tmp_path):
    pytest.importorskip("lm_eval")
    data = tmp_path / "docs.jsonl"
    rows = [{"question": f"{a}=", "choices": [str(a), "no"], "gold": 0} for a in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = TASK.format(name="choose", data=data, kind="multiple_choice", target="gold")
    (tmp_path / "choose.yaml").write_text(choice + "doc_to_choice: choices\n")
    written = TASK.format(name="write", data=data, kind="generate_until", target="gold")
    options = (
        "generation_kwargs: {until: ['9'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "write.yaml").write_text(written + options)
    out = tmp_path / "out.json"
    arguments = ["--harness", "choose,write", "--include-path", str(tmp_path), "--limit", "3"]
    result = check(posttrain_warm("eval", models[0], *arguments, "--out", str(out)))
    figures = json.loads(out.read_text())
    assert figures["n-samples"]["choose"]["effective"] == 3
    assert set(figures["results"]) == {"choose", "write"} and "exact_match" in result.stdout
