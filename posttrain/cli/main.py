"""``posttrain COMMAND ...``. Each command imports what it needs when it runs, so that ``posttrain
--help`` is instant.

A new command is a function that declares its arguments, a function that runs it, and a line in
``COMMANDS``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.cli import eval as evaluation
from posttrain.cli import plan, prep


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand."""

    help: str
    """One line for ``posttrain --help``."""
    declare: Callable[[argparse.ArgumentParser], None]
    """Adds the arguments; imports nothing heavy."""
    run: Callable[[argparse.Namespace], None]
    """Does the work. Raises ValueError or OSError for what the user can mend."""
    takes_settings: bool = False
    """Options that it does not declare are settings of a run: they come as
    ``arguments.settings``."""


def _declare_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="folder with adapter_config.json")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write; must not exist, or be empty"
    )
    parser.add_argument(
        "--base",
        metavar="NAME_OR_DIR",
        help="embedded model, folder or hub id of the base model (default: the one the adapter "
        "recorded)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the merged weights; the sum is computed in float32 (default: auto, that of the "
        "base's checkpoint)",
    )


def _run_merge(arguments: argparse.Namespace) -> None:
    from posttrain.models.merge import merge_adapter

    folder = merge_adapter(
        arguments.adapter, out=arguments.out, base=arguments.base, dtype=arguments.dtype
    )
    print(f"Merged model: {folder}")


def _run_version(arguments: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("posttrain", "torch", "transformers", "accelerate", "peft", "datasets", "trl"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")


COMMANDS = {
    "prep": Command(
        help="make training rows of raw preference data", declare=prep.declare, run=prep.run
    ),
    "plan": Command(
        help="what a run's memory will be", declare=plan.declare, run=plan.run, takes_settings=True
    ),
    "eval": Command(
        help="answer and verify held-out problems", declare=evaluation.declare, run=evaluation.run
    ),
    "merge": Command(
        help="make a plain model of a LoRA adapter", declare=_declare_merge, run=_run_merge
    ),
    "version": Command(
        help="print the versions of posttrain and what it builds on",
        declare=lambda _: None,
        run=_run_version,
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="posttrain", description="Post-training of language models."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.declare(subparsers.add_parser(name, help=command.help, description=command.help))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what the user can mend, told in one line
    without a traceback.

    ``POSTTRAIN_TRACEBACK=1`` shows the traceback.
    """
    parser = build_parser()
    arguments, settings = parser.parse_known_args(argv)
    if COMMANDS[arguments.command].takes_settings:
        arguments.settings = settings
    elif settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    try:
        COMMANDS[arguments.command].run(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("POSTTRAIN_TRACEBACK") == "1":
            raise
        print(f"posttrain {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
