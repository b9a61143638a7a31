"""What the tests of checkpoints have in common."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.training.checkpoint import find_resumable, save_checkpoint


def write_files(folder: Path, *, size: int = 5000) -> None:
    (folder / "sub").mkdir()
    (folder / "weights.bin").write_bytes(random.randbytes(size))
    (folder / "sub" / "rank_0.json").write_text("{}")


def save(
    root: Path,
    step: int,
    write: Callable[[Path], None] = write_files,
    *,
    accelerator: Any = None,
    keep: int = 0,
) -> Path:
    return save_checkpoint(
        accelerator or OneProcess, root, step, write, state={"seen": step * 10}, keep=keep
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def resumable_step(root: Path) -> int | None:
    found = find_resumable(root)
    return found[1]["step"] if found else None


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


class OneProcess:
    """What checkpoints ask of an accelerator."""

    distributed_type, is_main_process, process_index, num_processes, scaler = "NO", True, 0, 1, None
    device = torch.device("cpu")

    @staticmethod
    def wait_for_everyone() -> None:
        pass

    @staticmethod
    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return tensor
