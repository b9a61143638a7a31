"""Runs a command of the documentation in a folder, small: two optimizer steps on four rows, sixteen
tokens a completion, eight held-out problems, and in this process what the launcher would start.

    python tests/run_small.py FOLDER posttrain|accelerate|python ARGUMENTS...
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.cli.main import main
from posttrain.packing.plan import PackingConfig
from posttrain.rewards.compose import RewardsConfig
from posttrain.rl.evaluate import EvaluationConfig
from posttrain.rollout.engine import SamplingConfig
from posttrain.training.config import TrainConfig
from posttrain.training.optimizer import OptimizerConfig


def limit(config_class: Any, **most: int) -> None:
    """Values above ``most`` become it when the settings are built; so does 0 where it means all."""
    check: Callable[[Any], None] = config_class.__post_init__

    def checked(config: Any) -> None:
        check(config)
        for name, value in most.items():
            given = getattr(config, name)
            is_all = given == 0 and name in ("max_steps", "prompts")
            object.__setattr__(config, name, value if is_all else min(given, value))

    config_class.__post_init__ = checked


def launched(_: str, command: Sequence[str]) -> None:
    """What `accelerate launch` starts, as one process."""
    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args(command[command.index("launch") + 1 :])
    assert Path(arguments.config_file).is_file(), f"no launch file {arguments.config_file}"
    script = [arguments.training_script, *arguments.training_script_args]
    python(["-m", *script] if arguments.module else script)


def python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    folder, program, *rest = sys.argv[1:]
    os.chdir(folder)
    sys.path[0] = os.getcwd()
    limit(TrainConfig, max_steps=2, batch_size=4)
    limit(OptimizerConfig, warmup_steps=1)
    limit(PackingConfig, max_tokens=600)  # the plan traces every segment of a full row
    limit(RewardsConfig, workers=1)
    limit(SamplingConfig, max_tokens=16)
    limit(EvaluationConfig, prompts=8)
    os.execv = launched  # type: ignore[assignment]
    if program == "accelerate":
        launched("", rest)
    elif program == "posttrain":
        sys.exit(main(rest))
    else:
        python(rest)
