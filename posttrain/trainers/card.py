"""The README.md beside trained weights, and the way to the hub."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from posttrain.files import replace_text
from posttrain.resolve import flat
from posttrain.training.config import to_dict
from posttrain.training.loop import TrainResult
from posttrain.training.metrics import read_metrics
from posttrain.types import is_held_out

_LIBRARIES = ("posttrain", "torch", "transformers", "peft", "datasets")


def write_card(trainer: Any, result: TrainResult) -> None:
    """Writes README.md into the run's ``final``: base model, method, data, held-out figures before
    and after, settings that are not the defaults, versions."""
    config = trainer.config
    base = config.model.name if trainer.is_named else getattr(trainer.model, "name_or_path", "")
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
        *_table("Held out", ("", "before", "after"), before_and_after(result.folder)[1]),
        *_table("Settings that are not the defaults", ("setting", "value"), changed.items()),
        *_table("Versions", ("package", "version"), [(n, version(n)) for n in _LIBRARIES]),
    ]
    replace_text(result.final / "README.md", "\n".join(lines))


def _changed(config: Any) -> dict[str, Any]:
    now, default = dict(flat(to_dict(config))), dict(flat(to_dict(type(config)())))
    ignored = ("train.run_dir", "train.name", "train.trackers")
    return {k: v for k, v in now.items() if v != default.get(k) and k not in ignored}


def before_and_after(run: Path) -> tuple[int, list[tuple[str, str, str]]]:
    """(steps between them, [(name, before, after)]) of the first and the last held-out figures of a
    run; nothing where there are not two."""
    lines = [m for m in read_metrics(run / "metrics.jsonl") if any(map(is_held_out, m))]
    if len(lines) < 2:
        return 0, []
    before, after = lines[0], lines[-1]
    rows = [(n, _figure(before.get(n)), _figure(after[n])) for n in after if is_held_out(n)]
    return after["step"] - before["step"], rows


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
