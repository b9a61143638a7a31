"""What a run reports: metrics.jsonl, a progress bar, trackers; model FLOPs and their fraction of a
measured matmul peak."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from posttrain.models.policy import base_model
from posttrain.packing.batch import Layout

TIMING_KEYS = (
    "step_s",
    "tokens_per_s",
    "tflops_per_s",
    "peak_fraction",
    "rollout_s",
    "reward_s",
    "prepare_s",
    "rollout_tokens_per_s",
    "scores_per_s",
    "update_s",
    "update_tokens_per_s",
)
"""Metrics that differ between two identical runs; everything else must be equal."""


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Multiply-add counts of a model, 2 FLOPs each: matmul weights inside the layers, the head, and
    attention width."""

    layer_weights: int
    trainable_layer_weights: int
    head_weights: int
    trainable_head_weights: int
    attention_width: int
    """Sum over layers of heads * head_dim."""

    def step(self, layout: Layout, *, num_trained: int) -> float:
        """Model FLOPs of forward and backward of one row: 2 per weight and token forward, 2 for the
        gradient of the input, 2 for the gradient of a trainable weight; attention 4 per width,
        query and visible key, three times. Recomputation is not counted: it is the work the model
        needs, not the work done (Chowdhery et al. 2022, arXiv:2204.02311 appendix B).
        """
        tokens = sum(layout.lengths)
        pairs = sum(
            n * layout.length_with_prefix(i) - n * (n - 1) // 2
            for i, n in enumerate(layout.lengths)
        )
        layers = (4 * self.layer_weights + 2 * self.trainable_layer_weights) * tokens
        head = (4 * self.head_weights + 2 * self.trainable_head_weights) * num_trained
        return float(layers + head + 3 * 4 * self.attention_width * pairs)


def model_flops(model: nn.Module) -> ModelFlops:
    """Counts of a transformers (or PEFT) causal language model or sequence classifier;
    mixture-of-experts weights by the share that is active."""
    base = base_model(model)
    config = base.config.get_text_config()
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings() or base.score
    head_weight = getattr(head, "base_layer", head).weight
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    layers = {True: 0.0, False: 0.0}  # by whether they are trained
    for name, p in base.named_parameters():
        if p.ndim >= 2 and p is not embedding and p is not head_weight:
            layers[p.requires_grad] += p.numel() * (active if ".experts." in name else 1.0)
    heads = getattr(config, "num_attention_heads", 0)  # none in a state-space model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    return ModelFlops(
        layer_weights=int(sum(layers.values())),
        trainable_layer_weights=int(layers[True]),
        head_weights=head_weight.numel(),
        trainable_head_weights=head_weight.numel() * head_weight.requires_grad,
        attention_width=config.num_hidden_layers * heads * head_dim,
    )


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul on this device with the threads of this process: the roof that
    `peak_fraction` refers to."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).to(dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.1).median


class MetricsLog:
    """Appends to metrics.jsonl and to the trackers; shows a bar on a terminal, and a line every few
    seconds where nobody watches. Main process only."""

    def __init__(
        self,
        path: Path,
        *,
        num_steps: int,
        start: int,
        accelerator: Any,
        log_every: int,
        shown: Sequence[str],
    ) -> None:
        from rich import progress
        from rich.console import Console

        self._accelerator, self._num_steps, self._shown = accelerator, num_steps, shown
        self._every = max(log_every, 1)
        self._is_main: bool = accelerator.is_main_process
        self._console, self._last_line = Console(quiet=not self._is_main), 0.0
        # a dumb terminal cannot move its cursor; a notebook shows the bar without being a terminal
        console = self._console
        self._has_bar = (console.is_terminal and not console.is_dumb_terminal) or console.is_jupyter
        self._bar = progress.Progress(
            "training",
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            "{task.fields[now]}",
            progress.TimeRemainingColumn(),
            console=self._console,
            disable=not (self._is_main and self._has_bar),
        )
        self._task = self._bar.add_task("", total=num_steps, completed=start, now="")
        self._bar.start()
        self._file = path.open("a", encoding="utf-8") if self._is_main else None

    def step(self, step: int, values: dict[str, Any]) -> None:
        """One optimizer step done; ``values`` is what metrics.jsonl gets, in this order."""
        if step % self._every == 0 or step == self._num_steps:
            self._write({"step": step, **values})
        now = _words({name: values[name] for name in self._shown if name in values})
        self._bar.update(self._task, completed=step, now=now)
        is_due = time.monotonic() - self._last_line > 10 or step == self._num_steps
        if is_due and not self._has_bar:
            self._last_line = time.monotonic()
            self._say(f"step {step}/{self._num_steps}  {now}")

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Held-out metrics after ``step`` steps."""
        self._write({"step": step, **values})
        self._say(f"step {step}: {_words(values)}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _write(self, values: dict[str, Any]) -> None:
        if self._file is not None:
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in values.items()
            }
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
        self._accelerator.log(numbers, step=values["step"])

    def close(self) -> None:
        """Ends the bar and closes the file."""
        self._bar.stop()
        if self._file is not None:
            self._file.close()


def _words(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in values.items()
    )


def read_metrics(path: Path, *, drop: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without the given keys."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]
