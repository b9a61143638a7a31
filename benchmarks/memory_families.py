"""Closed form against the trace for every decoder that transformers knows: SFT of four layers of
its default config, bf16.

    python benchmarks/memory_families.py   # about half an hour on one core; one line per family
    python benchmarks/memory_families.py --only gpt

No weights: the traced step runs on fake tensors. What has no defaults that build a model, or needs
a minute or more, is named at the end. A sum to read beside RESULTS.md: how many lie within 3, 5 and
10 % of the trace, and which do not.
"""

from __future__ import annotations

import argparse
import signal
from contextlib import suppress
from typing import Any

LAYERS = 4
TOKENS = 1024
LIMIT_SECONDS = 60


def configs(only: str) -> dict[str, Any]:
    """Model type -> config with four layers where it can be cut; without those that build no
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


def errors(config: Any) -> tuple[float, bool]:
    """(closed form / trace - 1, whether the plan calls layers estimated)."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.memory.plan import memory_plan
    from posttrain.packing.plan import PackingConfig
    from posttrain.precision import PRECISIONS
    from posttrain.tracing.trace import trace_step
    from posttrain.trainers.memory import job_of
    from posttrain.trainers.sft import SFTConfig

    settings, precision = SFTConfig(packing=PackingConfig(max_tokens=TOKENS)), PRECISIONS["bf16"]
    traced = trace_step(config, method="sft", packing=settings.packing, precision=precision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    job = job_of(
        settings, "sft", precision=precision, device="cpu", wants_reference=False, model=model
    )
    return memory_plan(job).live_bytes / traced.peak_bytes - 1, job.arch.has_estimated_layers


def timed_out(*_: Any) -> None:
    raise TimeoutError(f"more than {LIMIT_SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="families whose name contains this")
    signal.signal(signal.SIGALRM, timed_out)
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, config in configs(parser.parse_args().only).items():
        signal.alarm(LIMIT_SECONDS)
        try:
            found[name], estimated = errors(config)
            print(
                f"{name} {100 * found[name]:+.1f} %{' (estimated)' if estimated else ''}",
                flush=True,
            )
        except Exception as problem:  # listed below: one family must not end the survey
            failed[name] = (
                f"{type(problem).__name__}: "
                f"{str(problem).splitlines()[0][:80] if str(problem) else ''}"
            )
        finally:
            signal.alarm(0)
    within = {limit: sum(abs(e) <= limit / 100 for e in found.values()) for limit in (3, 5, 10)}
    print(f"\n{len(found)} families; within 3 %: {within[3]}, 5 %: {within[5]}, 10 %: {within[10]}")
    print(
        "over 5 %:",
        ", ".join(
            f"{n} {100 * e:+.1f}"
            for n, e in sorted(found.items(), key=lambda x: x[1])
            if abs(e) > 0.05
        ),
    )
    for name, problem in failed.items():
        print(f"not traced: {name} ({problem})")


if __name__ == "__main__":
    main()
