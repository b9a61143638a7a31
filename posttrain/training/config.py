"""One run's settings from dataclasses, YAML and dotted command-line overrides, through
jsonargparse.

Each settings class lives beside the code it configures; this module has what the loop itself needs
and the parser. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

from posttrain.resolve import TRL_OPTIONS, did_you_mean, import_name, settings
from posttrain.types import Loss, as_loss

C = TypeVar("C")


class UserFacingError(RuntimeError):
    """A run stopped on purpose; the message says why and what to do."""


@settings
class TrainConfig:
    """Length, cadence and place of a run."""

    run_dir: str = "runs"
    """Folder that holds the run folders."""
    name: str = "sft"
    """Name of the run; its files are in <run_dir>/<name>/."""
    batch_size: int = 32
    """Groups (prompts) per optimizer step, over all ranks; how they are split into micro-batches
    changes nothing."""
    max_steps: int = 0
    """Optimizer steps; 0 means num_epochs."""
    num_epochs: float = 1.0
    """Passes over the training data when max_steps is 0."""
    seed: int = 0
    """Seeds model initialisation, dropout and the order of the data."""
    precision: Literal["auto", "fp32", "bf16", "bf16-pure", "fp16"] = "auto"
    """auto: bf16 (fp32 master weights) where the device is good at it, else fp32."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between held-out evaluations; 0: only at the start and the end."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    save_total_limit: int = 2
    """Checkpoints kept (the newest); 0 keeps all."""
    resume: Literal["auto", "never", "restart"] = "auto"
    """auto: continue from the newest valid checkpoint of the run folder, if it is of this very run;
    never: refuse a folder that has one; restart: move what is there to <name>.old-1 first."""
    best_metric: str = ""
    """A held-out figure (eval_loss, rewards_eval/accuracies); the weights with the best one are
    kept in <run_dir>/<name>/best. Lower is better where the name ends in loss. Empty: none."""
    trackers: list[str] = field(default_factory=list)
    """Experiment trackers beside metrics.jsonl, through accelerate. Tested: tensorboard, wandb."""
    self_check: bool = True
    """Compare two groups through the packed forward with the model's own forward before the first
    step, and step down to the model's own forward where they differ. Without the check nothing
    steps down."""
    force: bool = False
    """Start although the predicted memory is more than there is."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"train.batch_size is a number of groups >= 1; got {self.batch_size}.")
        for name, value in vars(self).items():
            if not isinstance(value, str | list) and name != "seed" and value < 0:
                raise ValueError(f"train.{name} must be >= 0; got {value}.")
        if not re.fullmatch(r"\w[\w.=,+-]*", self.name):
            raise ValueError(
                f"train.name is a folder name (letters, digits, . _ - = , +); got {self.name!r}."
            )

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.run_dir) / self.name

    def num_steps(self, num_groups: int) -> int:
        """Optimizer steps of the run: every group at least ``num_epochs`` times (the last step runs
        into the next epoch)."""
        if self.max_steps:
            return self.max_steps
        if self.batch_size > num_groups:
            raise ValueError(
                f"train.batch_size={self.batch_size} is more than the {num_groups} groups of the "
                "data: every step would repeat rows. Lower it, or set --train.max_steps."
            )
        return math.ceil(num_groups * self.num_epochs / self.batch_size)


def parse_config(
    config_class: type[C], arguments: Sequence[str] | None = None, *, description: str
) -> C:
    """The resolved, validated settings from one option per field, ``--config FILE.yaml`` and
    ``--print_config``; on a mistake one clear line to stderr and exit code 2."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, default_env=False)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of the options below; options given after it win",
    )
    parser.add_class_arguments(config_class, as_group=False)
    try:
        values = parser.instantiate(parser.parse_args(arguments and list(arguments)))
        return config_class(**{f.name: values[f.name] for f in dataclasses.fields(config_class)})  # type: ignore[arg-type]
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        message = str(error)
    print(f"error: {message}{_suggestion(parser, message)}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Mistakes of the user (ValueError, OSError and what the loop raises on purpose) end in one
    line and exit code 2.

    ``POSTTRAIN_TRACEBACK=1`` shows where it was raised.
    """
    try:
        yield
    except (ValueError, OSError, UserFacingError) as error:
        if os.environ.get("POSTTRAIN_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _suggestion(parser: Any, message: str) -> str:
    """' Did you mean --x.y?' for an unknown option or YAML key."""
    found = re.search(r"unrecognized arguments: --([\w.]+)", message) or re.search(
        r"(?:Group '([\w.]+)' )?(?:does not accept|No such|not expected|Unknown).*?'([\w.]+)'",
        message,
    )
    if found is None:
        return ""
    skipped = ("help", "config", "print_config")
    known = sorted(f"--{a.dest}" for a in parser._actions if a.dest not in skipped)
    name = ".".join(filter(None, found.groups()))
    name = TRL_OPTIONS.get(name.rpartition(".")[2], name)
    return did_you_mean(f"--{name}", known, cutoff=0.5) or " See --help for all options."


def to_dict(config: Any) -> dict[str, Any]:
    """Nested settings in declaration order; only what YAML and JSON have, so tuples as lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def set_options(
    config: Any, names: Sequence[str], further: dict[str, float | int | bool | str]
) -> dict[str, Any]:
    """``further`` options, and the fields of ``names`` that are not None. ValueError for an option
    given in both ways."""
    fields = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if twice := sorted(fields.keys() & further.keys()):
        raise ValueError(
            f"{twice[0]} is set twice, as --{twice[0]} and among the further options; set one."
        )
    return {**further, **fields}


def choose_loss(config: Any, given: Callable[..., Any] | None, *, home: str, default: str) -> Loss:
    """The loss given in Python, else ``config.loss``; both at once are an error. With the options
    of the settings."""
    if given is None:
        return resolve_loss(config.loss, config.options, home=home)
    if config.loss != default:
        raise ValueError(
            f"The loss is given in Python, so --loss {config.loss} would be ignored. Change the "
            "function, or leave it out (`posttrain sft|dpo|reward` take --loss)."
        )
    return as_loss(given).with_options(**config.options)


def resolve_loss(path: str, options: dict[str, Any], *, home: str = "posttrain.losses.sft") -> Loss:
    """A loss by name, or a weighted sum such as ``dpo + 0.2*nll_chosen``, with keyword options.

    A name is ``package.module.function``, or a function of the module ``home``. An option goes to
    every term that has it; an option that none has is an error, never ignored. The losses'
    declarations are kept.
    """
    terms = []
    for term in path.split("+"):
        weight, star, name = term.rpartition("*")
        try:
            factor = float(weight) if star else 1.0
        except ValueError as error:
            raise ValueError(
                f"--loss is a name, or a sum such as 'dpo + 0.2*nll_chosen'; got {path!r}."
            ) from error
        terms.append((factor, as_loss(_import_function(name.strip(), home))))
    known = sorted(set().union(*(loss.accepts for _, loss in terms)))
    for option in sorted(options.keys() - known):
        hint = did_you_mean(option, known)
        raise ValueError(f"{path} has no option {option!r}; it has {known or 'none'}.{hint}")
    bound = [
        (factor, loss.with_options(**{k: v for k, v in options.items() if k in loss.accepts}))
        for factor, loss in terms
    ]
    if len(bound) == 1 and bound[0][0] == 1.0:
        return bound[0][1]
    from posttrain.losses.reduce import weighted_sum

    return weighted_sum(bound)


def _import_function(name: str, home: str) -> Callable[..., Any]:
    wanted = f"--loss is a function of {home}, or the dotted path of one"
    return import_name(name if "." in name else f"{home}.{name}", wanted=wanted)
