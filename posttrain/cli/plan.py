"""`posttrain plan`: the memory of a run before it starts, phase by phase, without loading its
weights."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.train import classes_of
from posttrain.resolve import find_shipped

if TYPE_CHECKING:
    from posttrain.plan.job import Job
    from posttrain.plan.trace import Device, Method
    from posttrain.training.sharding import Kind

METHODS = ("sft", "reward", "dpo", "rl")


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments; imports nothing heavy."""
    parser.epilog = (
        "Any other option is a setting of the run, e.g. --model.name DIR or "
        "--packing.max_tokens 4096."
    )
    add = parser.add_argument
    file = "settings of a run: a file, or a shipped name (dpo_smollm2)"
    add("config", metavar="CONFIG", help=file)
    add("--method", choices=METHODS, help="kind of run (default: found from the settings)")
    add("--devices", type=int, metavar="N", help="data-parallel processes (default: 1)")
    where = "default: cuda if it is here or --device-memory is given"
    add("--device", choices=("cpu", "cuda"), help=where)
    memory = "of one device, e.g. 80GB (default: this machine's)"
    add("--device-memory", metavar="SIZE", help=memory)
    stages = "ZeRO stages, e.g. 0,1,2,3 (3: FSDP2); default: all if N > 1"
    add("--zero", metavar="STAGES", help=stages)
    add("--deepspeed", action="store_true", help="stage 3 by DeepSpeed instead of FSDP2")
    add("--offload", choices=("optimizer",), help="optimizer state in host memory")
    questions = ("max-tokens", "min-devices", "cheapest-zero")
    add("--solve", choices=questions, help="ask the other way round")
    traced = "also trace every layer on one device, where the plan replays the first ones"
    add("--traced", action="store_true", help=traced)
    add("--json", action="store_true", help="print bytes of everything")


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan, or answers ``--solve``."""
    from posttrain.plan.price import memory_plan
    from posttrain.plan.report import gigabytes, listed, parse_bytes, show, to_json

    asked = arguments.device_memory
    limit: float | None = parse_bytes(asked) if asked else None
    with redirect_stdout(sys.stderr):  # libraries that announce themselves
        from posttrain.plan.check import device_bytes

        job, shortest = _job(arguments, is_elsewhere=limit is not None)
        devices, kinds = _devices_and_kinds(arguments)
        limit = device_bytes(job.device, processes=devices) if limit is None else limit
        if arguments.solve:
            answer = _solve(arguments, job, limit, devices, kinds)
        else:
            plans = [memory_plan(job.sharded(kind, devices)) for kind in kinds]
    if arguments.solve:
        print(answer)
        return
    traced = job.trace(every_layer=True).items if arguments.traced else {}
    if arguments.json:
        total = sum(traced.values())
        more = {"traced_bytes": total, "traced_bytes_by_category": traced} if traced else {}
        print(json.dumps([to_json(plan, limit) | more for plan in plans], indent=1))
        return
    show(plans, limit, shortest=shortest)
    if traced:
        replayed, total = job.trace().total, sum(traced.values())
        print(
            f"traced with every layer on one device, beside weights and gradients: "
            f"{gigabytes(total)} ({listed(traced)}); the plan says {gigabytes(replayed)} "
            f"({100 * (replayed / total - 1):+.1f} %)"
        )


def _devices_and_kinds(arguments: argparse.Namespace) -> tuple[int, list[Kind]]:
    devices = arguments.devices or 1
    third: Kind = "zero3" if arguments.deepspeed else "fsdp2"
    kinds: dict[str, Kind] = {"0": "whole", "1": "zero1", "2": "zero2", "3": third}
    is_open = devices > 1 or arguments.solve == "min-devices"
    stages = arguments.zero.split(",") if arguments.zero else list(kinds if is_open else "0")
    if devices < 1 or not set(stages) <= set(kinds):
        raise ValueError(
            "--devices must be >= 1 and --zero a list of ZeRO stages such as 0,1,2,3; got "
            f"{devices} and {arguments.zero!r}."
        )
    return devices, [kinds[stage] for stage in stages]


def _solve(
    arguments: argparse.Namespace, job: Job, limit: float | None, devices: int, kinds: list[Kind]
) -> str:
    from posttrain.plan import price
    from posttrain.plan.report import gigabytes
    from posttrain.plan.states import ZERO_STAGE

    if limit is None:
        raise ValueError("--solve needs the memory of a device: --device-memory 80GB.")
    if arguments.solve == "cheapest-zero":
        found = price.cheapest_zero(job, limit, num_devices=devices)
        answers: dict[str, Any] = {"stage": None if found is None else ZERO_STAGE[found]}
        is_enough = f"ZeRO-{answers['stage']} is enough"
        lines = [f"nothing fits: {price.advice(job, limit)}" if found is None else is_enough]
    else:
        if arguments.solve == "max-tokens":
            said, nothing = "--packing.max_tokens {}", "nothing fits"
            room = limit * (1 - price.SOLVER_MARGIN)
            numbers: list[int | None] = [
                price.max_tokens(job.sharded(kind, devices), room) for kind in kinds
            ]
        else:
            said, nothing = "{} devices", "no number of devices is enough"
            numbers = [price.min_devices(job, limit, sharding=kind) for kind in kinds]
        answers = {str(ZERO_STAGE[k]): n for k, n in zip(kinds, numbers, strict=True)}
        lines = [f"ZeRO-{s}: {said.format(n) if n else nothing}" for s, n in answers.items()]
    if arguments.json:
        return json.dumps(
            {"solve": arguments.solve, "limit_bytes": limit, "devices": devices, "answers": answers}
        )
    where = f"within {gigabytes(limit)} per device (GB = 1e9 bytes), {devices} x {job.device}:"
    return "\n".join([where, *lines])


def _job(arguments: argparse.Namespace, *, is_elsewhere: bool) -> tuple[Job, int]:
    """(the run on one device, tokens that its longest sequence may have)."""
    from dataclasses import replace

    import torch

    from posttrain.plan.job import job_of
    from posttrain.precision import PRECISIONS, resolve_precision

    arguments.config = str(find_shipped(arguments.config, "recipes/configs", "CONFIG"))
    method: Method = arguments.method or find_method(arguments.config, arguments.settings)
    config, trainer = _parse(method, arguments.config, arguments.settings)
    has_cuda = torch.cuda.is_available()
    device: Device = arguments.device or ("cuda" if has_cuda or is_elsewhere else "cpu")
    name = config.train.precision
    if device == "cpu" or has_cuda:
        precision = resolve_precision(None if name == "auto" else name, device)
    else:
        precision = PRECISIONS["bf16" if name == "auto" else name]
    is_rl = method == "rl"
    job = job_of(
        config,
        method,
        precision=precision,
        device=device,
        wants_reference=trainer.algorithm.needs_reference if is_rl else trainer.wants_reference,
        longest_prompt=_longest_prompt(config) if is_rl else None,
        reference_every=trainer.algorithm.reference_every if is_rl else 0,
    )
    if arguments.offload and device == "cpu":
        raise ValueError(
            "--offload optimizer moves its state from a GPU to the host; on a CPU "
            "there is nothing to move."
        )
    if arguments.offload:
        job = replace(job, offload=frozenset({arguments.offload}))
    longest = config.sampling.max_tokens if is_rl else config.data.max_length
    return job, max(64, longest)


def _longest_prompt(config: Any) -> int | None:
    """Tokens; None where the data is not on this machine, or the model has no tokenizer: its
    config.json is enough for a plan."""
    from posttrain.data.prompts import load_prompts
    from posttrain.models.load import load_tokenizer

    if not config.data.train or not all(Path(source).exists() for source in config.data.train):
        return None
    try:
        tokenizer = load_tokenizer(config.model)
    except FileNotFoundError:
        return None
    return max(len(p.ids) for p in load_prompts(config.data, config.data.train, tokenizer)[0])


def _parse(method: str, path: str, settings: list[str]) -> tuple[Any, Any]:
    """The settings as the recipe reads them, and its trainer, which checks them against each
    other."""
    from posttrain.training.config import parse_config

    is_distillation = method == "rl" and "teachers" in _said(path, settings)
    config_class, trainer_class = classes_of("distill" if is_distillation else method)
    words = ["--config", path, *settings]
    config = parse_config(config_class, words, description=f"settings of a {method} run")
    return config, trainer_class(config=config)


def find_method(path: str, settings: list[str]) -> Method:
    """The kind of run that settings are for: by keys that only one kind has, then by the loss, then
    by its options.

    Raises ValueError for a loss of one's own without another sign of its kind (then give
    ``--method``).
    """
    from dataclasses import fields

    from posttrain.trainers.dpo import DPOConfig
    from posttrain.trainers.rl import RLConfig

    said = _said(path, settings)
    if set(said) & ({f.name for f in fields(RLConfig)} - {f.name for f in fields(DPOConfig)}):
        return "rl"
    if "reference" in said:
        return "dpo"
    written = str(said.get("loss", ""))
    if re.search(r"[A-Za-z_]\w*\.[A-Za-z_]", written):
        raise ValueError(
            f"The loss {written!r} does not say which kind of run this is. Add "
            "--method sft, reward or dpo."
        )
    loss = written.split("*")[-1].split("+")[0].strip()
    options = {**said, **(said.get("loss_options") or {})}
    if loss == "bradley_terry" or {"centering", "margin_scale"} & set(options):
        return "reward"
    return "dpo" if loss not in ("", "sft") else "sft"


def _said(path: str, settings: list[str]) -> dict[str, Any]:
    """The settings by their first name: those of the file, and what the command line says."""
    import yaml

    said: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    for option, after in zip(settings, [*settings[1:], ""], strict=False):
        if option.startswith("--"):
            name, equals, value = option[2:].partition("=")
            said[name.split(".")[0]] = value if equals else after
    return said
