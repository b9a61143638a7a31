"""From the names that users write to what they name."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
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
