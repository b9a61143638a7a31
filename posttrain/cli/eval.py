"""`posttrain eval`: held-out problems answered and verified; `posttrain prep difficulty`: the same,
written beside each row."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.files import replace_text, write_json, write_json_lines

if TYPE_CHECKING:
    import torch

    from posttrain.data.prompts import Prompt
    from posttrain.rewards.compose import Rewards
    from posttrain.rl.evaluate import Evaluation


_ROWS = "files of rows, or gym:NAME for reasoning-gym's NAME"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `eval`; imports nothing heavy."""
    add = parser.add_argument
    parser.description = (
        "Four modes. --task: answer problems and verify the answers. --pairs: which answer of a "
        "held-out pair the model prefers, against a reference. --harness: tasks of "
        "lm-evaluation-harness. --rescore: judge stored answers again. The options of sampling and "
        "verifying are those of --task."
    )
    add("model", nargs="?", metavar="MODEL", help="embedded model, folder or hub id")
    add("--figures", metavar="FILE", help="the figures, JSON")
    stored = "answers that eval or sample wrote, or a run's rollouts; needs no MODEL"
    add("--rescore", nargs="+", metavar="FILE", help=stored)
    add("--out", metavar="FILE", help="--task: every answer, JSON lines; else the figures, JSON")
    add("--task", nargs="+", metavar="ROWS", help=f"{_ROWS}; --rescore: the answers' problems")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--pairs", nargs="+", metavar="FILE", help="rows with chosen and rejected")
    mode.add_argument("--harness", metavar="TASK[,TASK]", help="needs posttrain[harness]")
    add("--reference", metavar="MODEL", help="--pairs: compared with (default: an adapter's base)")
    add("--limit", type=int, metavar="N", help="--harness: the first N documents of each task")
    add("--include-path", metavar="DIR", help="--harness: folder with YAML tasks of your own")
    add("--pass-at-powers", action="store_true", help="pass@k for k = 2, 4, 8, ... below --samples")
    declare_shared(parser, samples=1, temperature=0.0)


def declare_difficulty(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prep difficulty`."""
    add = parser.add_argument
    written = "the rows with pass_rate and difficulty (1 - pass_rate)"
    add("model", metavar="MODEL", help="embedded model, folder or hub id")
    add("--out", required=True, metavar="FILE", help=written)
    add("--task", required=True, nargs="+", metavar="ROWS", help=_ROWS)
    left_out = "leave out problems that are right within N tries without reasoning (k1.5: 8)"
    add("--guess-tries", type=int, default=0, metavar="N", help=f"{left_out}; 0: none")
    add("--max-pass-rate", type=float, default=1.0, metavar="X", help="leave out easier problems")
    add("--min-pass-rate", type=float, default=0.0, metavar="X", help="leave out harder ones")
    suffix = "\n\nAnswer with the result only."
    add("--guess-suffix", default=suffix, help="put after the prompt for a guess")
    declare_shared(parser, samples=10, temperature=1.0)


def declare_shared(parser: argparse.ArgumentParser, *, samples: int, temperature: float) -> None:
    add = parser.add_argument
    verifier = "what tells right from wrong (default: math_answer; gym: gym_answer)"
    add("--reward", default="math_answer", help=verifier)
    add("--also", nargs="+", default=[], metavar="REWARD", help="rewards measured beside it")
    options = """of rewards, as JSON: '{"reward_model": {"model": "runs/rm/final"}}'"""
    add("--reward-options", type=json.loads, default={}, metavar="JSON", help=options)
    default = "(default: %(default)s)"
    add("--samples", type=int, default=samples, help=f"answers of each problem {default}")
    add("--temperature", type=float, default=temperature, help=f"0: greedy {default}")
    add("--top-p", type=float, default=1.0)
    add("--max-tokens", type=int, default=512, help=f"longest answer {default}")
    ends = "texts that end an answer, beside the model's stop tokens"
    add("--stop-strings", nargs="+", default=[], metavar="TEXT", help=ends)
    cut_off = "an answer that is cut off at --max-tokens is wrong, whatever it says"
    add("--must-end", action="store_true", help=cut_off)
    first = "only the first N; gym: how many (default: all; gym 200)"
    add("--problems", type=int, default=0, metavar="N", help=first)
    add("--template", default="chat", help="chat, r1-zero, plain, or a text file with {prompt}")
    add("--system", help="system message")
    add("--seed", type=int, default=0)
    rows = "completions that run at the same time"
    add("--max-rows", type=int, default=64, help=f"{rows} {default}")
    add("--vllm", metavar="URL", help="draw by this server (launch/vllm.sh), not in this process")


def run(arguments: argparse.Namespace) -> None:
    """Prints a table of figures."""
    check_mode(arguments)
    if arguments.pairs or arguments.harness:
        return (run_pairs if arguments.pairs else run_harness)(arguments)
    if arguments.rescore:
        evaluation, what = _rescored(arguments), ", ".join(arguments.rescore)
    else:
        evaluation, what = evaluate(arguments, read_tasks(arguments)), arguments.model
    report(evaluation, what, arguments)


def check_mode(arguments: argparse.Namespace) -> None:
    """ValueError where it is not said what is evaluated, or on what."""
    if not (arguments.task or arguments.pairs or arguments.harness or arguments.rescore):
        raise ValueError("Evaluated on what? Give --task, --pairs, --harness or --rescore.")
    if not arguments.rescore and not arguments.model:
        raise ValueError("Which model? Write `posttrain eval MODEL ...`.")


def _rescored(arguments: argparse.Namespace) -> Evaluation:
    from posttrain.rl.samples import rescore

    problems = {r["_where"]: r for r in stream_tasks(arguments)} if arguments.task else {}
    rewards, _ = verifiers(arguments)
    with closing(rewards):
        return rescore(arguments.rescore, rewards, problems)


def report(evaluation: Evaluation, what: str, arguments: argparse.Namespace) -> None:
    """Prints the figures; writes them and the answers where asked to."""
    metrics = evaluation.metrics(powers=arguments.pass_at_powers)
    if arguments.reward == "reward_model":  # a score says nothing of right and wrong
        metrics = {name: value for name, value in metrics.items() if "@" not in name}
    each = {len(row) for row in evaluation.correct}
    answers = "1 answer" if each == {1} else f"{'-'.join(map(str, sorted(each)))} answers"
    print(f"{what}: {len(evaluation.groups)} problems, {answers} of each")
    if arguments.figures:
        write_json(Path(arguments.figures), {"problems": len(evaluation.groups), **metrics})
    interval = metrics.pop("eval_pass@1_ci95", 0.0)
    for name, value in metrics.items():
        is_share = "@" in name or name in ("eval_truncated", "eval_unscored")
        text = f"{value:.1%}" if is_share else f"{value:.3f}"
        text += f" ± {interval:.1%}" if name == "eval_pass@1" else ""
        print(f"  {name.removeprefix('eval_'):24} {text:>15}")
    if arguments.out:
        write_json_lines(Path(arguments.out), evaluation.rows())


def run_difficulty(arguments: argparse.Namespace) -> None:
    """Pass rates beside the rows. Kimi k1.5, arXiv:2501.12599 section 2.1."""
    rows = read_tasks(arguments)
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
    unjudged = outside = 0
    for group, correct in zip(evaluation.groups, evaluation.correct, strict=True):
        known = [ok for ok in correct if ok is not None]
        unjudged += not known
        kept = dict(group.prompt.sample)
        if known and str(kept.pop("_where")) not in guessed:
            rate = statistics.fmean(known)
            if not arguments.min_pass_rate <= rate <= arguments.max_pass_rate:
                outside += 1
                continue
            lines.append({**kept, "pass_rate": rate, "difficulty": 1 - rate})
    write_json_lines(Path(arguments.out), lines)
    print(
        f"{len(evaluation.groups)} problems, {len(guessed)} left out (a guess was right), "
        f"{unjudged} left out (no answer could be judged), {outside} left out (too easy or too "
        f"hard); wrote {len(lines)} to {arguments.out}"
    )


def evaluate(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], *, suffix: str = ""
) -> Evaluation:
    """Answers and judges the rows; ``suffix`` goes after each prompt."""
    from posttrain.rl.rollouts import report_prompts

    with closing(Answering(arguments)) as answer:
        prompts, counts = answer.prompts(rows, suffix=suffix)
        report_prompts(counts, prompts, answer.rewards)
        return answer(prompts, seed=arguments.seed)


class Answering:
    """A model with its engine and rewards, as the command line says: ``answer(prompts)``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from accelerate import PartialState

        from posttrain.models.merge import load_here
        from posttrain.models.policy import Policy
        from posttrain.packing.plan import PackingConfig
        from posttrain.precision import default_precision

        self._arguments, self._state = arguments, PartialState()
        self.rewards, self._reward = verifiers(arguments)
        self._ends = ExitStack()
        self._ends.enter_context(closing(self.rewards))
        model, self._tokenizer, device = load_here(arguments.model)
        packing = PackingConfig(max_tokens=8192)
        self._policy = Policy(model, packing, device_type=device.type)
        self._engine = self._make_engine(default_precision(device.type).compute)

    def close(self) -> None:
        """Ends the rewards' workers; deletes what a server was handed."""
        self._ends.close()

    def _make_engine(self, compute: str) -> Any:
        from posttrain.precision import torch_dtype
        from posttrain.rollout.local import LocalConfig, local_engine
        from posttrain.rollout.vllm import VLLMConfig, vllm_engine

        arguments, shared = self._arguments, (self._policy, self._tokenizer)
        if not arguments.vllm:
            config = LocalConfig(max_rows=arguments.max_rows)
            return local_engine(*shared, config, compute=torch_dtype(compute))
        handed = tempfile.TemporaryDirectory(prefix="posttrain_weights_")
        engine = vllm_engine(
            *shared,
            VLLMConfig(url=arguments.vllm, concurrency=arguments.max_rows),
            self._state,
            compute=compute,
            weights_dir=Path(self._ends.enter_context(handed)),
        )
        engine.refresh(0)
        return engine

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], *, suffix: str = "", skip_long: bool = False
    ) -> tuple[list[Prompt], dict[str, Any]]:
        """Encoded rows and counts. ValueError for rows that are too long, unless they are
        skipped."""
        from posttrain.data.prompts import PromptConfig, prompts_from_rows

        arguments, config = self._arguments, self._policy.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        room = positions - arguments.max_tokens if positions else 2**31
        if room < 1:
            raise ValueError(
                f"The model knows {positions} positions, and an answer may have "
                f"{arguments.max_tokens}: no room is left for a prompt. Lower --max-tokens."
            )
        template = PromptConfig(
            template=arguments.template, system=arguments.system, max_prompt_length=room
        )
        prompts, counts = prompts_from_rows(
            rows, self._tokenizer, template, suffix=suffix, may_be_none=skip_long
        )
        if counts["too long"] and not skip_long:
            raise ValueError(
                f"{counts['too long']} of {counts['read']} problems have more than {room} tokens; "
                f"the model knows {positions} positions and --max-tokens is "
                f"{arguments.max_tokens}. Lower it, or take these problems out: a score leaves "
                "none out silently."
            )
        return prompts, counts

    def __call__(self, prompts: Sequence[Prompt], *, seed: int) -> Evaluation:
        """Draws and judges."""
        import torch

        from posttrain.rl.evaluate import EvaluationConfig, evaluate_prompts
        from posttrain.rl.rollouts import Collector
        from posttrain.rl.trajectory import SingleTurn
        from posttrain.rollout.engine import SamplingConfig

        arguments = self._arguments
        settings = EvaluationConfig(
            samples=arguments.samples,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            prompts=0,
            correct_reward=self._reward,
        )
        collector = Collector(
            accelerator=self._state,
            engine=self._engine,
            rewards=self.rewards,
            environment=SingleTurn(self._tokenizer, self._engine.stop_ids),
            sampling=SamplingConfig(
                max_tokens=arguments.max_tokens, stop_strings=arguments.stop_strings
            ),
        )
        with torch.no_grad():
            return evaluate_prompts(collector, prompts, settings, seed=seed)


def verifiers(arguments: argparse.Namespace) -> tuple[Rewards, str]:
    """The rewards, and the name of the one that tells right from wrong."""
    from posttrain.rewards.compose import Rewards, RewardsConfig

    is_gym = bool(arguments.task) and arguments.task[0].startswith("gym:")
    reward = "gym_answer" if is_gym and arguments.reward == "math_answer" else arguments.reward
    config = RewardsConfig(
        functions={reward: 1.0, **dict.fromkeys(arguments.also, 0.0)},
        options=arguments.reward_options,
        must_end=arguments.must_end,
        max_unscored=1.0,
    )
    return Rewards(config, correct_reward=reward), reward


def read_tasks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of --task."""
    return list(islice(stream_tasks(arguments), arguments.problems or None))


def stream_tasks(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of --task as they are read."""
    from posttrain.data.readers import read_rows

    for source in arguments.task:
        if source.startswith("gym:"):
            import reasoning_gym

            name = source.removeprefix("gym:")
            size = arguments.problems or 200
            made = reasoning_gym.create_dataset(name, size=size, seed=arguments.seed)
            for i, entry in enumerate(made, start=1):
                yield {**entry, "task": name, "_where": f"{source}:{i}"}
        else:
            for row in read_rows(source):
                yield {**row.values, "_where": row.where}


def run_pairs(arguments: argparse.Namespace) -> None:
    """Prints accuracy and margin of the implicit reward."""
    from accelerate import PartialState

    from posttrain.precision import default_precision, torch_dtype

    dtype = torch_dtype(default_precision(PartialState().device.type).compute)
    figures = pair_figures(
        arguments.model, arguments.pairs, reference=arguments.reference, dtype=dtype
    )
    print(f"{arguments.model}: {figures['pairs']} pairs of {figures['prompts']} prompts")
    print(f"accuracy {figures['accuracy']:.1%} ± {figures['accuracy_ci95']:.1%}")
    print(f"margin {figures['margin_nats']:.3f} ± {figures['margin_nats_ci95']:.3f} nats")
    if not figures["has_reference"] and not figures["is_reward_model"]:
        print("No reference: log-probs of the model alone. Give --reference to compare with one.")
    _write(arguments, figures)


def pair_figures(
    model: str, files: list[str], *, reference: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Accuracy and margin of log pi(y|x) - log pi_ref(y|x) between chosen and rejected answers
    (Rafailov et al. 2023, arXiv:2305.18290 eq. 5 with beta 1), each with half its 95 % interval.

    A prompt with several pairs counts once, as their mean. The reference of an adapter is its base
    unless ``reference`` names another; a plain model without one is measured by log pi alone. Of a
    reward model the scores are compared.
    """
    from accelerate import Accelerator

    from posttrain.data import DataConfig, load_groups
    from posttrain.models.heads import is_reward_model, load_scorer
    from posttrain.models.merge import load_to_answer
    from posttrain.models.policy import adapters_off, has_adapters
    from posttrain.rl.evaluate import half_width

    accelerator = Accelerator(mixed_precision="no")
    is_scorer = is_reward_model(model)
    if is_scorer and reference is not None:
        raise ValueError(
            f"{model} is a reward model: its scores need no --reference. Leave it out."
        )
    trained, tokenizer = (load_scorer if is_scorer else load_to_answer)(model, dtype=dtype)
    config = DataConfig(train=files, overlong="drop")
    purpose: Any = "reward" if is_scorer else "preference"
    groups = load_groups(config, tokenizer, purpose=purpose).train
    if not any(g.trained_pairs for g in groups):
        raise ValueError(f"{', '.join(files)} has no pairs: --pairs wants chosen and rejected.")
    policy_nats = _completion_logps(trained, groups, accelerator)
    ref_nats: dict[tuple[int, int], float] = {}
    if reference is not None:
        ref_nats = _completion_logps(load_to_answer(reference, dtype=dtype)[0], groups, accelerator)
    elif has_adapters(trained):
        with adapters_off(trained):
            ref_nats = _completion_logps(trained, groups, accelerator)
    reward = {ref: value - ref_nats.get(ref, 0.0) for ref, value in policy_nats.items()}
    margins = [
        [reward[i, p.chosen] - reward[i, p.rejected] for p in group.trained_pairs]
        for i, group in enumerate(groups)
        if group.trained_pairs
    ]
    shares = [statistics.fmean(m > 0 for m in of_prompt) for of_prompt in margins]
    means = [statistics.fmean(of_prompt) for of_prompt in margins]
    spread = statistics.stdev(means) if len(means) > 1 else math.nan
    return {
        "accuracy": statistics.fmean(shares),
        "accuracy_ci95": half_width(shares),
        "margin_nats": statistics.fmean(means),
        "margin_nats_ci95": 1.96 * spread / math.sqrt(len(means)),
        "pairs": sum(map(len, margins)),
        "prompts": len(margins),
        "has_reference": bool(ref_nats),
        "is_reward_model": is_scorer,
    }


def _completion_logps(model: Any, groups: Any, accelerator: Any) -> dict[tuple[int, int], float]:
    from posttrain.models.heads import Scorer
    from posttrain.models.policy import Policy
    from posttrain.packing.plan import PackingConfig
    from posttrain.training.forward import ForwardPlan, forward_values

    device = accelerator.device
    packing = PackingConfig(max_tokens=8192)
    kind = Scorer if hasattr(model, "score") else Policy
    policy = kind(model.to(device), packing, device_type=device.type).eval()
    plan = ForwardPlan(
        accelerator=accelerator,
        mode=policy.forward_mode.mode,
        max_tokens=packing.max_tokens,
        length_limit=policy.forward_mode.length_limit,
    )
    (values,) = forward_values(plan, list(groups), [lambda _, batch: policy(batch, ())])
    return {ref: float(forward.logps_T.double().sum()) for ref, forward in values.items()}


def run_harness(arguments: argparse.Namespace) -> None:
    """Prints the figures of the tasks as lm-evaluation-harness computes them."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ValueError(
            f"--harness needs lm-evaluation-harness ({error}): pip install 'posttrain[harness]'."
        ) from error
    from posttrain.models.merge import load_here

    model, tokenizer, _ = load_here(arguments.model)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    results = simple_evaluate(
        model=wrapped,
        tasks=arguments.harness.split(","),
        limit=arguments.limit,
        task_manager=TaskManager(include_path=arguments.include_path),
        random_seed=arguments.seed,
    )
    print(make_table(results))
    _write(arguments, {k: results[k] for k in ("results", "versions", "n-samples")})


def _write(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    for path in filter(None, (arguments.out, arguments.figures)):
        replace_text(Path(path), json.dumps(figures, indent=1, default=str) + "\n")
