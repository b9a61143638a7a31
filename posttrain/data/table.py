"""How groups lie on disk: one Arrow row per group, read back by index without copying the table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.data.tokenise import prompt_hash
from posttrain.types import Completion, Pair, PromptGroup


def schema() -> Any:
    """Columns of a tokenised source. ``pairs`` is null where all completions are compared,
    ``label`` -1, 0 or 1."""
    import pyarrow as pa

    number, ids = pa.int32(), pa.list_(pa.int32())
    sides = {"chosen": number, "rejected": number}
    pair = pa.struct(sides | {"margin": pa.float64(), "weight": pa.float64()})
    columns = {
        "prompt_ids": ids,
        "completion_ids": pa.list_(ids),
        "loss_mask": pa.list_(pa.list_(pa.uint8())),
        "pairs": pa.list_(pair),
        "label": pa.list_(pa.int8()),
        "file": number,
        "row": pa.int64(),
        "prompt_hash": pa.uint64(),
    }
    counts = ("num_tokens", "longest", "num_pairs", "num_labels")
    return pa.schema(columns | dict.fromkeys(counts, number))


def to_record(group: PromptGroup, file_numbers: Mapping[str, int]) -> dict[str, Any]:
    """A group as a row; ``num_tokens`` counts the prompt once, ``longest`` is the prompt with its
    longest completion."""
    return {
        "prompt_ids": group.prompt_ids,
        "completion_ids": [c.token_ids for c in group.completions],
        "loss_mask": [c.loss_mask.astype("u1") for c in group.completions],
        "pairs": None if group.pairs is None else [vars(pair) for pair in group.pairs],
        "label": [int(c.columns.get("label", 0)) for c in group.completions],
        "file": file_numbers[group.meta["file"]],
        "row": group.meta["row"],
        "prompt_hash": prompt_hash(group),
        "num_tokens": group.num_tokens_shared,
        "longest": len(group.prompt_ids) + max(len(c.token_ids) for c in group.completions),
        "num_pairs": len(group.trained_pairs),
        "num_labels": num_labels(group),
    }


def num_labels(group: PromptGroup) -> int:
    """Completions that are rated desirable or not."""
    return sum(bool(c.columns.get("label")) for c in group.completions)


def to_group(columns: Any, row: int, files: Sequence[str]) -> PromptGroup:
    """What ``to_record`` wrote, as it was."""

    def lists(name: str) -> list[Any]:
        return [value.values.to_numpy() for value in columns.column(name)[row].values]

    pairs = columns.column("pairs")[row].as_py()
    labels = columns.column("label")[row].as_py()
    return PromptGroup(
        prompt_ids=columns.column("prompt_ids")[row].values.to_numpy(),
        completions=[
            Completion(
                token_ids=ids, loss_mask=mask, columns={"label": label} if any(labels) else {}
            )
            for ids, mask, label in zip(
                lists("completion_ids"), lists("loss_mask"), labels, strict=True
            )
        ],
        pairs=None if pairs is None else [Pair(**pair) for pair in pairs],
        meta={
            "file": files[columns.column("file")[row].as_py()],
            "row": columns.column("row")[row].as_py(),
        },
    )


def sequence_key(group: PromptGroup, completion: Completion) -> bytes:
    """16 bytes that name a sequence and its trained tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for values, dtype in (
        (group.prompt_ids, "<i4"),
        (completion.token_ids, "<i4"),
        (completion.loss_mask, "u1"),
    ):
        array = np.asarray(values, dtype)
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.tobytes())
    for name, value in sorted(group.inputs.items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.digest()


def digest_of_groups(groups: Iterable[PromptGroup]) -> str:
    """16 hex digits of groups in their order: tokens, masks, labels and pairs."""
    content = hashlib.sha256()
    for group in groups:
        for completion in group.completions:
            content.update(sequence_key(group, completion))
            labels = {n: v for n, v in completion.columns.items() if isinstance(v, float)}
            content.update(repr(labels).encode())
        content.update(repr(group.pairs and list(group.pairs)).encode())
    return content.hexdigest()[:16]
