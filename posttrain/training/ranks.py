"""What processes tell each other: Python values, over all ranks of a run."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def of_all_ranks(accelerator: Any, value: T) -> list[T]:
    """[rank] the value that each process gives, on every process: a collective where there are
    several."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def of_main_rank(accelerator: Any, value: T) -> T:
    """The main process's value, on every process: a collective where there are several."""
    values = [value]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(values, from_process=0)
    return values[0]
