"""``posttrain COMMAND ...``. Each command imports what it needs when it runs, so that ``posttrain
--help`` is instant.

A new command is a line in ``COMMANDS``: what ``--help`` says, a function that declares its
arguments, and one that runs it and raises ValueError or OSError for what the user can mend.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from posttrain.cli import chat, pipeline, plan, prep, report, sample, train
from posttrain.cli import eval as evaluation
from posttrain.resolve import did_you_mean

Declare = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], None]


def _declare_merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "a folder with adapter_config.json; or several models, which are averaged"
    add("models", nargs="+", metavar="ADAPTER_DIR|MODEL", help=what)
    add("--weights", nargs="+", type=float, default=[], help="of the models (default: equal)")
    add("--out", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    base = "embedded model, folder or hub id of the base (default: the one the adapter recorded)"
    add("--base", metavar="NAME_OR_DIR", help=base)
    dtype = "of the merged weights; the sum is in float32 (default: auto, the base's)"
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help=dtype)


def _run_merge(arguments: argparse.Namespace) -> None:
    from posttrain.models.merge import average_models, merge_adapter

    models, shared = arguments.models, {"out": arguments.out, "dtype": arguments.dtype}
    if len(models) > 1:
        if arguments.base:
            raise ValueError("--base is an adapter's; several models are averaged as they are.")
        folder = average_models(models, weights=arguments.weights, **shared)
    elif arguments.weights:
        raise ValueError(f"--weights is for several models; got one, {models[0]}.")
    else:
        folder = merge_adapter(models[0], base=arguments.base, **shared)
    print(f"Merged model: {folder}")


def _run_version(arguments: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("posttrain", "torch", "transformers", "accelerate", "peft", "datasets", "trl"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")


COMMANDS: dict[str, tuple[str, Declare, Run]] = {
    **{name: (text, train.declare, train.run) for name, (_, text) in train.TRAINERS.items()},
    "recipes": ("list or copy the shipped settings", train.declare_recipes, train.run_recipes),
    "prep": ("make training rows of raw preference data", prep.declare, prep.run),
    "plan": ("what a run's memory will be", plan.declare, plan.run),
    "eval": ("answer and verify held-out problems", evaluation.declare, evaluation.run),
    "report": ("a page of a run, of several, or of a pipeline", report.declare, report.run),
    "chat": ("talk to a model, or to two side by side", chat.declare, chat.run),
    "sample": ("draw and verify several answers of each problem", sample.declare, sample.run),
    "select": ("make training rows of sampled answers", sample.declare_select, sample.run_select),
    "pipeline": ("run whole recipes of stages", pipeline.declare, pipeline.run),
    "merge": (
        "make a plain model of a LoRA adapter, or the average of models",
        _declare_merge,
        _run_merge,
    ),
    "version": (
        "print the versions of posttrain and what it builds on",
        lambda _: None,
        _run_version,
    ),
}
TAKE_SETTINGS = ("plan", *train.TRAINERS)
"""Commands whose undeclared options are settings of a run: they come as ``arguments.settings``."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="posttrain", description="Post-training of language models."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (text, declare, _) in COMMANDS.items():
        has_own = name in train.TRAINERS  # the settings' help is another parser's
        more: dict[str, Any] = {"add_help": not has_own, "allow_abbrev": False}
        declare(subparsers.add_parser(name, help=text, description=text, **more))
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """A command line. Ends with code 2 and one line for a mistake."""
    parser = build_parser()
    arguments, others = parser.parse_known_args(argv)
    if arguments.command in TAKE_SETTINGS:
        arguments.settings = others
    elif others:
        known = {option for sub in _parsers(parser) for option in sub._option_string_actions}
        hint = did_you_mean(others[0], known)
        parser.error(f"unrecognized arguments: {' '.join(others)}.{hint}")
    return arguments


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _parsers(inner)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for what the user can mend, told in one line
    without a traceback.

    ``POSTTRAIN_TRACEBACK=1`` shows the traceback.
    """
    arguments = parse(argv)
    if arguments.command == "pipeline":
        arguments.parse = parse  # its stages are commands
    try:
        COMMANDS[arguments.command][2](arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("POSTTRAIN_TRACEBACK") == "1":
            raise
        print(f"posttrain {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
