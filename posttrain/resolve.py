"""From the names that users write to what they name."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import (
    Any,
    Literal,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

C = TypeVar("C")

_OF_TRL = {
    "model.name": "model_name_or_path",
    "train.run_dir": "output_dir",
    "train.name": "run_name",
    "train.batch_size": "per_device_train_batch_size gradient_accumulation_steps",
    "train.num_epochs": "num_train_epochs",
    "train.precision": "bf16 fp16",
    "train.log_every": "logging_steps logging_strategy",
    "train.trackers": "report_to",
    "train.eval_every": "eval_steps eval_strategy",
    "train.save_every": "save_steps save_strategy",
    "train.best_metric": "load_best_model_at_end metric_for_best_model",
    "optimizer.lr": "learning_rate",
    "optimizer.schedule": "lr_scheduler_type",
    "optimizer.name": "optim",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "packing.max_tokens": "per_device_eval_batch_size auto_find_batch_size",
    "rollout.group_size": "num_generations",
    "rollout.updates": "generation_batch_size steps_per_generation",
    "rollout.epochs": "num_iterations",
    "sampling.max_tokens": "max_completion_length max_new_tokens",
    "reference.sync_every": "sync_ref_model ref_model_sync_steps",
    "vllm.url": "vllm_server_base_url vllm_server_host vllm_server_port",
}
TRL_OPTIONS = {name: ours for ours, names in _OF_TRL.items() for name in names.split()}
"""The setting that replaces an option of TRL or transformers, for those whose name is not near."""


def import_name(path: str, *, wanted: str) -> Any:
    """Import ``package.module.name``, also from the folder that the run was started in. Raises
    ValueError, which says what is ``wanted``."""
    if os.getcwd() not in sys.path:  # only the folder of a script itself is on the path
        sys.path.append(os.getcwd())
    module, _, name = path.rpartition(".")
    hint = ""
    try:
        found = importlib.import_module(module)
        hint = did_you_mean(name, vars(found))
        return getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{wanted}; got {path!r} ({error}).{hint}") from error


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The end of an error message: `` Did you mean x?``, or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]}?" if near else ""


def check_options(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for an option that is not known: it lists those that are."""
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{owner} has no option {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}."
            f"{did_you_mean(unknown[0], known)}"
        )


def check_rules(section: str, config: Any, *rules: str) -> None:
    """ValueError for the first rule, such as "0 < top_p <= 1", that does not hold: it says what the
    settings are that it names."""
    values = vars(config)
    for rule in rules:
        if not eval(rule, {}, dict(values)):  # the rules are ours
            named = [name for name in re.findall("[a-z_]+", rule) if name in values]
            got = ", ".join(f"{name}={values[name]!r}" for name in named)
            raise ValueError(f"{section} needs {rule}; got {got}.")


def shipped(folder: str) -> Path:
    """Where ``recipes/configs`` or ``launch`` lies: in the package, or in a checkout beside it."""
    package = Path(__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def find_shipped(name: str, folder: str, option: str) -> Path:
    """A file as it is, or the shipped one of that name. ValueError lists those that there are."""
    path = Path(name)
    if path.is_file():
        return path
    known = {p.stem: p for p in sorted(shipped(folder).glob("*.yaml"))}
    if path.parent.as_posix() in (".", folder) and path.name.removesuffix(".yaml") in known:
        return known[path.name.removesuffix(".yaml")]
    raise ValueError(
        f"{option} is a file, or one of {', '.join(known)}; got {name!r}."
        f"{did_you_mean(name, known)}"
    )


def among(name: str, known: Iterable[str]) -> str:
    """The end of an error message about a name that is none of those known."""
    names = list(known)
    return f"known: {', '.join(names) or 'none'}.{did_you_mean(name, names)}"


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def settings(cls: type[C]) -> type[C]:
    """A frozen keyword-only dataclass. TypeError for an unknown keyword names the nearest field,
    also of its groups, or the one that replaces an option of TRL; ValueError for a value that is
    none of a Literal's lists them."""
    hints = get_type_hints(cls)  # jsonargparse would import what only type checkers need
    cls.__annotations__ = {name: hints[name] for name in cls.__annotations__}
    cls = dataclass(frozen=True, kw_only=True)(cls)
    plain = cls.__init__

    @wraps(plain)
    def checked(self: C, *values: Any, **given: Any) -> None:
        unknown = given.keys() - {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if unknown:
            spelled = dict(_spelled(cls))
            lines = [_no_such_field(cls, n, spelled) for n in given if n in unknown]
            page = "docs/from_trl.md lists the options of TRL with their names here."
            raise TypeError("\n".join([*lines, page]))
        for name, value in given.items():
            known = get_args(hints[name]) if get_origin(hints[name]) is Literal else (value,)
            if value not in known:
                listed = ", ".join(map(str, known))
                raise ValueError(f"{cls.__name__}.{name} is one of {listed}; got {value!r}.")
        plain(self, *values, **given)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


def _spelled(cls: Any) -> Iterator[tuple[str, str]]:
    """The fields of a settings class as ``beta``, those of its groups also as Python has them:
    ``optimizer.lr``, ``optimizer=OptimizerConfig(lr=...)``."""
    for f in fields(cls):
        yield f.name, f.name
        group = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(group):
            for path, text in _spelled(group):
                inner = text if "=" in text else f"{text}=..."
                yield f"{f.name}.{path}", f"{f.name}={type(group).__name__}({inner})"


def _no_such_field(cls: type, name: str, spelled: dict[str, str]) -> str:
    paths = {path.rpartition(".")[2]: path for path in reversed(spelled)}  # the first of a name
    near = difflib.get_close_matches(name, paths, n=1)
    path = TRL_OPTIONS.get(name) or (paths[near[0]] if near else "")
    python = spelled.get(path, path)
    hint = f" Did you mean {path}{f', as in {python}' if python != path else ''}?" if path else ""
    return f"{cls.__name__} has no field {name!r}.{hint}"


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(optimizer.lr, value) of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            yield before + name, value
