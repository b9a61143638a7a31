"""`posttrain sft|dpo|reward|rl|distill`: makes the `accelerate launch` command, shows and runs it.

The processes that it starts run this module: ``-m posttrain.cli.train METHOD SETTINGS...``.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from posttrain.resolve import find_shipped, shipped

TRAINERS = {
    "sft": ("SFT", "supervised fine-tuning"),
    "dpo": ("DPO", "preference optimisation: DPO and its relatives"),
    "reward": ("Reward", "train a reward model"),
    "rl": ("RL", "reinforcement learning: GRPO and its relatives, Kimi k1.5"),
    "distill": ("Distill", "on-policy distillation"),
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Options of the launch; all others are settings of the run."""
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="all settings")
    add("--config", action="append", default=[], metavar="FILE|NAME", help="settings; may repeat")
    add(
        "--launch", metavar="FILE|NAME", help="configuration of accelerate (default: cpu, gpu, ddp)"
    )
    add("--processes", type=int, metavar="N", help="number of processes (default: the launch's)")


def run(arguments: argparse.Namespace) -> None:
    """Prints the command and becomes it."""
    if arguments.help:
        show_help(arguments.command)
        return
    devices = num_gpus()
    default = "cpu" if devices == 0 else "gpu" if devices == 1 else "ddp"
    processes = arguments.processes or (devices if devices > 1 and not arguments.launch else None)
    launch = find_shipped(arguments.launch or default, "launch", "--launch")
    if devices == 0:
        _share_cores(launch, processes)
    command = [
        "accelerate",
        "launch",
        "--quiet",  # else a message of ours is followed by a trace of the launcher
        "--config_file",
        str(launch),
        *(["--num_processes", str(processes)] if processes else []),
        *several_machines(processes or devices or 1),
        "-m",
        "posttrain.cli.train",
        arguments.command,
    ]
    for name in arguments.config:
        command += ["--config", str(find_shipped(name, "recipes/configs", "--config"))]
    command += arguments.settings
    print(f"$ {shlex.join(command)}", flush=True)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    os.execv(sys.executable, launcher)


def _share_cores(launch: Path, processes: int | None) -> None:
    """As many threads as accelerate would choose, and warn of, unless the user chose."""
    import psutil
    import yaml

    count = processes or yaml.safe_load(launch.read_text(encoding="utf-8")).get("num_processes", 1)
    threads = (psutil.cpu_count(logical=False) or 1) // int(count)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


def several_machines(processes: int) -> list[str]:
    """Options of the launcher for a command that `srun` starts on each of several nodes, with
    ``processes`` on each; none elsewhere."""
    env = os.environ
    nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes == 1 or "SLURM_PROCID" not in env or "SLURM_LAUNCH_NODE_IPADDR" not in env:
        return []
    options = {
        "--num_machines": nodes,
        "--machine_rank": env["SLURM_PROCID"],
        "--main_process_ip": env["SLURM_LAUNCH_NODE_IPADDR"],
        "--main_process_port": 20000 + int(env["SLURM_JOB_ID"]) % 20000,
        "--num_processes": nodes * processes,
    }
    return [word for name, value in options.items() for word in (name, str(value))]


def num_gpus() -> int:
    """Without importing torch: what CUDA_VISIBLE_DEVICES names, else the driver's devices."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([d for d in chosen.split(",") if d.strip() and d.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def show_help(method: str) -> None:
    """The launch's options, then every setting with its default."""
    print(
        f"usage: posttrain {method} [--config FILE|NAME] [--launch FILE|NAME] [--processes N] "
        f"[--SETTING VALUE ...]\n\nconfigs: {', '.join(_names('recipes/configs'))}\n"
        f"launches: {', '.join(_names('launch'))}\n"
    )
    main(method, ["--help"])


def _names(folder: str) -> list[str]:
    return sorted(p.stem for p in shipped(folder).glob("*.yaml"))


def declare_recipes(parser: argparse.ArgumentParser) -> None:
    """Arguments of `posttrain recipes`."""
    parser.add_argument("--copy", metavar="DIR", help="copy recipes/ and launch/ into this folder")


def run_recipes(arguments: argparse.Namespace) -> None:
    """Lists what is shipped with the first line of each file, or copies it."""
    if arguments.copy:
        out = Path(arguments.copy)
        for folder in ("recipes", "launch"):
            if (out / folder).exists():
                raise ValueError(f"{out / folder} exists; nothing is overwritten. Name another.")
        for folder in ("recipes", "launch"):
            shutil.copytree(
                shipped(folder), out / folder, ignore=shutil.ignore_patterns("__pycache__")
            )
        print(f"copied: {out / 'recipes'}, {out / 'launch'}")
        return
    for title, folder in (
        ("--config", "recipes/configs"),
        ("--launch", "launch"),
        ("pipeline run", "recipes/pipelines"),
    ):
        print(title)
        for path in sorted(shipped(folder).glob("*.yaml")):
            first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
            print(f"  {path.stem:20} {first}")


def classes_of(method: str) -> tuple[Any, Any]:
    """Its settings and its trainer."""
    import posttrain

    name, _ = TRAINERS[method]
    return getattr(posttrain, f"{name}Config"), getattr(posttrain, f"{name}Trainer")


def main(method: str, arguments: list[str]) -> None:
    """One process of a run."""
    from transformers.utils.logging import disable_progress_bar

    from posttrain.training.config import one_line_errors, parse_config
    from posttrain.training.launch import leave_processes

    # importing peft imports bitsandbytes, which misses a kernel on CPUs that only QLoRA would use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bar()
    config_class, trainer_class = classes_of(method)
    config = parse_config(config_class, arguments, description=TRAINERS[method][1])
    with one_line_errors():
        trainer_class(config=config).train()
    leave_processes()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
