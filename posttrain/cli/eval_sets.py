"""`posttrain eval --pairs` and `--harness`: figures on held-out comparisons, and on tasks of
lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.files import whole_file

if TYPE_CHECKING:
    import torch


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
    from posttrain.models.reference import adapters_off, has_adapters
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
        with whole_file(Path(path)) as file:
            file.write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")
