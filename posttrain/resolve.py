"""From the names that users write to what they name."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
