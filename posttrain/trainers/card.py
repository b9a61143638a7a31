"""The README.md beside trained weights, and the way to the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from posttrain.files import whole_file
from posttrain.training.config import flat_settings, to_dict
from posttrain.training.loop import TrainResult
from posttrain.training.metrics import is_held_out, read_metrics

_LIBRARIES = ("posttrain", "torch", "transformers", "peft", "datasets")


def write_card(trainer: Any, result: TrainResult) -> None:
    """Writes README.md into the run's ``final``: base model, method, data, held-out figures before
    and after, settings that are not the defaults, versions."""
    config = trainer.config
    base = config.model.name if trainer.is_named else getattr(trainer.model, "name_or_path", "")
    held_out = [
        {k: v for k, v in line.items() if is_held_out(k)}
        for line in read_metrics(result.folder / "metrics.jsonl")
        if any(map(is_held_out, line))
    ]
    method = trainer.method
    has_adapters = (result.final / "adapter_config.json").exists()
    head = {
        "library_name": "peft" if has_adapters else "transformers",
        "base_model": base or None,
        "datasets": [s for s in config.data.train if "/" in s and not Path(s).exists()] or None,
        "tags": ["posttrain", method.partition(" ")[0].lower()],
    }
    front = yaml.safe_dump({k: v for k, v in head.items() if v is not None}, sort_keys=False)
    changed = _changed(config)
    lines = [
        f"---\n{front}---\n",
        f"# {config.train.name}\n",
        f"{base or 'A model'} after {result.step} steps of {method} with "
        "[posttrain](https://pypi.org/project/posttrain).\n",
        *_table("Held out", ("", "before", "after"), _before_and_after(held_out)),
        *_table("Settings that are not the defaults", ("setting", "value"), changed.items()),
        *_table("Versions", ("package", "version"), [(n, version(n)) for n in _LIBRARIES]),
    ]
    with whole_file(result.final / "README.md") as file:
        file.write_text("\n".join(lines), encoding="utf-8")


def _changed(config: Any) -> dict[str, Any]:
    now, default = flat_settings(to_dict(config)), flat_settings(to_dict(type(config)()))
    ignored = ("train.run_dir", "train.name", "train.trackers")
    return {k: v for k, v in now.items() if v != default.get(k) and k not in ignored}


def _before_and_after(held_out: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    if len(held_out) < 2:
        return []
    before, after = held_out[0], held_out[-1]
    return [(name, _figure(before.get(name)), _figure(after[name])) for name in after]


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)


def _table(title: str, header: tuple[str, ...], rows: Any) -> list[str]:
    """A section in Markdown; nothing without rows."""
    rows = list(rows)
    if not rows:
        return []
    lines = [header, ("---",) * len(header), *rows]
    table = ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in lines]
    return [f"## {title}\n", *table, ""]


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Creates the repository where there is none, and uploads the folder; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload with posttrain")
    return f"{api.endpoint}/{repo_id}"
