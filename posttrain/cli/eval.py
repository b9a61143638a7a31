"""`posttrain eval`: held-out problems answered and verified; `posttrain prep difficulty`: the same,
written beside each row."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.rl.evaluate import Evaluation


_ROWS = "files of rows, or gym:NAME for reasoning-gym's NAME"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `eval`; imports nothing heavy."""
    add = parser.add_argument
    parser.description = (
        "Three modes. --task: answer problems and verify the answers. --pairs: which answer of a "
        "held-out pair the model prefers, against a reference. --harness: tasks of "
        "lm-evaluation-harness. The options of sampling and verifying are those of --task."
    )
    add("--out", metavar="FILE", help="--task: every answer, JSON lines; else the figures, JSON")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--task", nargs="+", metavar="ROWS", help=_ROWS)
    mode.add_argument("--pairs", nargs="+", metavar="FILE", help="rows with chosen and rejected")
    mode.add_argument("--harness", metavar="TASK[,TASK]", help="needs posttrain[harness]")
    add("--reference", metavar="MODEL", help="--pairs: compared with (default: an adapter's base)")
    add("--limit", type=int, metavar="N", help="--harness: the first N documents of each task")
    add("--include-path", metavar="DIR", help="--harness: folder with YAML tasks of your own")
    add("--pass-at-powers", action="store_true", help="pass@k for k = 2, 4, 8, ... below --samples")
    _declare_shared(parser, samples=1, temperature=0.0)


def declare_difficulty(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prep difficulty`."""
    add = parser.add_argument
    written = "the rows with pass_rate and difficulty (1 - pass_rate)"
    add("--out", required=True, metavar="FILE", help=written)
    add("--task", required=True, nargs="+", metavar="ROWS", help=_ROWS)
    left_out = "leave out problems that are right within N tries without reasoning (k1.5: 8)"
    add("--guess-tries", type=int, default=0, metavar="N", help=f"{left_out}; 0: none")
    suffix = "\n\nAnswer with the result only."
    add("--guess-suffix", default=suffix, help="put after the prompt for a guess")
    _declare_shared(parser, samples=10, temperature=1.0)


def _declare_shared(parser: argparse.ArgumentParser, *, samples: int, temperature: float) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="embedded model, folder or hub id")
    verifier = "what tells right from wrong (default: math_answer; gym: gym_answer)"
    add("--reward", default="math_answer", help=verifier)
    default = "(default: %(default)s)"
    add("--samples", type=int, default=samples, help=f"answers of each problem {default}")
    add("--temperature", type=float, default=temperature, help=f"0: greedy {default}")
    add("--top-p", type=float, default=1.0)
    add("--max-tokens", type=int, default=512, help=f"longest answer {default}")
    cut_off = "an answer that is cut off at --max-tokens is wrong, whatever it says"
    add("--must-end", action="store_true", help=cut_off)
    first = "only the first N; gym: how many (default: all; gym 200)"
    add("--problems", type=int, default=0, metavar="N", help=first)
    add("--template", default="chat", help="chat, r1-zero, plain, or a text file with {prompt}")
    add("--system", help="system message")
    add("--seed", type=int, default=0)
    rows = "completions that run at the same time"
    add("--max-rows", type=int, default=64, help=f"{rows} {default}")


def run(arguments: argparse.Namespace) -> None:
    """Prints a table of figures."""
    if not arguments.task:
        from posttrain.cli.eval_sets import run_harness, run_pairs

        return (run_pairs if arguments.pairs else run_harness)(arguments)
    from rich.console import Console
    from rich.table import Table

    evaluation = evaluate(arguments, _rows(arguments))
    metrics = evaluation.metrics(powers=arguments.pass_at_powers)
    answers = "1 answer" if arguments.samples == 1 else f"{arguments.samples} answers"
    print(f"{arguments.model}: {len(evaluation.groups)} problems, {answers} of each")
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    interval = metrics.pop("eval_pass@1_ci95")
    for name, value in metrics.items():
        is_share = "@" in name or name in ("eval_truncated", "eval_unscored")
        text = f"{value:.1%}" if is_share else f"{value:.3f}"
        text += f" ± {interval:.1%}" if name == "eval_pass@1" else ""
        table.add_row(name.removeprefix("eval_"), text)
    Console().print(table)
    if arguments.out:
        _write(arguments.out, evaluation.rows())


def run_difficulty(arguments: argparse.Namespace) -> None:
    """Pass rates beside the rows. Kimi k1.5, arXiv:2501.12599 section 2.1."""
    import statistics

    rows = _rows(arguments)
    evaluation = evaluate(arguments, rows)
    guessed: set[str] = set()
    if arguments.guess_tries:
        changed = {"samples": arguments.guess_tries, "max_tokens": 32}
        quick = argparse.Namespace(**{**vars(arguments), **changed})
        tried = evaluate(quick, rows, suffix=arguments.guess_suffix)
        guessed = {
            str(g.prompt.sample["_where"])
            for g, row in zip(tried.groups, tried.correct, strict=True)
            if any(row)
        }
    lines = []
    unjudged = 0
    for group, correct in zip(evaluation.groups, evaluation.correct, strict=True):
        known = [ok for ok in correct if ok is not None]
        unjudged += not known
        kept = dict(group.prompt.sample)
        if known and str(kept.pop("_where")) not in guessed:
            rate = statistics.fmean(known)
            lines.append({**kept, "pass_rate": rate, "difficulty": 1 - rate})
    _write(arguments.out, lines)
    print(
        f"{len(evaluation.groups)} problems, {len(guessed)} left out (a guess was right), "
        f"{unjudged} left out (no answer could be judged); wrote {len(lines)} to {arguments.out}"
    )


def _write(path: str, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
    Path(path).write_text(text, encoding="utf-8")


def evaluate(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], *, suffix: str = ""
) -> Evaluation:
    """Answers and judges the rows; ``suffix`` goes after each prompt."""
    import torch
    from accelerate import PartialState

    from posttrain.data.prompts import PromptConfig, prompts_from_rows
    from posttrain.models.load import ModelConfig, end_token_ids, load_model, load_tokenizer
    from posttrain.models.policy import Policy
    from posttrain.packing.plan import PackingConfig
    from posttrain.precision import default_precision, torch_dtype
    from posttrain.rewards.compose import Rewards, RewardsConfig
    from posttrain.rl.environment import SingleTurn
    from posttrain.rl.evaluate import EvaluationConfig, evaluate_prompts
    from posttrain.rl.rollouts import Collector
    from posttrain.rollout.engine import SamplingConfig
    from posttrain.rollout.local import LocalConfig, LocalEngine
    from posttrain.trainers.rl import report_prompts

    state = PartialState()
    is_gym = arguments.task[0].startswith("gym:")
    reward = "gym_answer" if is_gym and arguments.reward == "math_answer" else arguments.reward
    settings = EvaluationConfig(
        samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        prompts=0,
        correct_reward=reward,
    )
    rewards = Rewards(
        RewardsConfig(functions={reward: 1.0}, must_end=arguments.must_end, max_unscored=1.0)
    )
    source, device = ModelConfig(name=arguments.model), state.device
    tokenizer: Any = load_tokenizer(source)
    dtype = torch_dtype(default_precision(device.type).compute)
    model: Any = load_model(source, dtype=dtype).to(device)
    policy = Policy(model, PackingConfig(max_tokens=8192), device_type=device.type)
    engine = LocalEngine(
        policy,
        compute=dtype,
        stop_ids=end_token_ids(policy.base, tokenizer),
        config=LocalConfig(max_rows=arguments.max_rows),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
    )
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    room = positions - arguments.max_tokens if positions else 2**31
    template = PromptConfig(
        template=arguments.template, system=arguments.system, max_prompt_length=max(room, 1)
    )
    prompts, counts = prompts_from_rows(rows, tokenizer, template, suffix=suffix)
    if counts["too long"]:
        raise ValueError(
            f"{counts['too long']} of {counts['read']} problems have more than {room} tokens; the "
            f"model knows {positions} positions and --max-tokens is {arguments.max_tokens}. Lower "
            "it, or take these problems out: a score leaves none out silently."
        )
    report_prompts(counts, prompts, rewards)
    collector = Collector(
        accelerator=state,
        engine=engine,
        rewards=rewards,
        prompts=prompts,
        environment=SingleTurn(tokenizer, engine.stop_ids),
        sampling=SamplingConfig(max_tokens=arguments.max_tokens),
    )
    try:
        with torch.no_grad():
            return evaluate_prompts(collector, prompts, settings, seed=arguments.seed)
    finally:
        rewards.close()


def _rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from posttrain.data.readers import read_rows

    rows: list[dict[str, Any]] = []
    for source in arguments.task:
        if source.startswith("gym:"):
            import reasoning_gym

            name = source.removeprefix("gym:")
            size = arguments.problems or 200
            made = reasoning_gym.create_dataset(name, size=size, seed=arguments.seed)
            for i, entry in enumerate(made, start=1):
                rows.append({**entry, "task": name, "_where": f"{source}:{i}"})
        else:
            rows += [{**row.values, "_where": row.where} for row in read_rows(source)]
    return rows[: arguments.problems or None]
