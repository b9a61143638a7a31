"""The plan's replay against a trace of every layer, for every decoder that transformers knows: SFT
of a few layers of its default config, bf16.

    python benchmarks/memory_families.py   # one line per family
    python benchmarks/memory_families.py --only gpt

No weights: the step runs on fake tensors. What has no defaults that build a model, or needs a
minute or more, is named at the end. A sum to read beside RESULTS.md: how many lie within 0.1, 1 and
3 % of the trace of every layer, and which do not.
"""

from __future__ import annotations

import argparse
import logging
from contextlib import suppress
from typing import Any

LAYERS = 8
TOKENS = 128


def configs(only: str) -> dict[str, Any]:
    """Model type -> config with a few layers where it can be cut; without those that build no
    model."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    found: dict[str, Any] = {}
    for kind in {c.model_type: c for c in MODEL_FOR_CAUSAL_LM_MAPPING}.values():
        if only not in kind.model_type:
            continue
        for arguments in ({"num_hidden_layers": LAYERS}, {}):
            with suppress(Exception), torch.device("meta"):
                config = kind(**arguments)
                AutoModelForCausalLM.from_config(config)
                found[kind.model_type] = config
                break
    return found


def error(config: Any) -> float:
    """Replayed / traced - 1, of what lies beside weights and gradients."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.packing.plan import PackingConfig
    from posttrain.plan.job import job_of
    from posttrain.precision import PRECISIONS
    from posttrain.trainers.sft import SFTConfig

    settings = SFTConfig(packing=PackingConfig(max_tokens=TOKENS))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    job = job_of(
        settings,
        "sft",
        precision=PRECISIONS["bf16"],
        device="cpu",
        wants_reference=False,
        model=model,
    )
    replayed, traced = (sum(job.trace(every_layer=e).items.values()) for e in (False, True))
    return replayed / traced - 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="families whose name contains this")
    logging.disable(logging.WARNING)
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, config in configs(parser.parse_args().only).items():
        try:
            found[name] = error(config)
            print(f"{name} {100 * found[name]:+.2f} %", flush=True)
        except Exception as problem:  # listed below: one family must not end the survey
            text = str(problem).partition("\n")[0][:100]
            failed[name] = f"{type(problem).__name__}: {text}"
    within = {limit: sum(abs(e) <= limit / 100 for e in found.values()) for limit in (0.1, 1, 3)}
    print(f"\n{len(found)} families; " + ", ".join(f"within {k} %: {n}" for k, n in within.items()))
    over = sorted((e, name) for name, e in found.items() if abs(e) > 0.01)
    print("over 1 %:", ", ".join(f"{name} {100 * e:+.1f}" for e, name in over))
    for name, problem in failed.items():
        print(f"not traced: {name} ({problem})")


if __name__ == "__main__":
    main()
