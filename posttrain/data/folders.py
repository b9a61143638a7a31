"""Output folders that exist whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_filled(out: Path) -> None:
    """ValueError unless ``out`` does not exist, or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"Output folder {out} exists and is not empty; nothing is overwritten. "
            "Give another --out."
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place, by a rename, when the block ends; after
    an error it is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already unless something failed
