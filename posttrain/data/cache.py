"""Tokenised sources on disk: one folder per key, complete or not there.

The key is the sha256 of what decides the tokens: the content of the files, the tokenizer, the
template, and the options ``format, columns, carry, max_length, overlong`` (and ``split`` for the
hub). Nothing of the optimisation is in it, nor seed, weights or eval_fraction, which choose among
rows. A folder holds ``tokens.arrow`` and ``manifest.json``, is written under a temporary name and
renamed: of two processes that write the same key, the first to finish wins and both read its
result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.chat import ChatEncoder
from posttrain.data.config import DataConfig
from posttrain.data.readers import HubSource, load_hub
from posttrain.files import file_digest, whole_folder, write_json

ENCODING_VERSION = 4
"""Raise when the same rows would become different tokens or another file layout."""

TOKENS, MANIFEST = "tokens.arrow", "manifest.json"


def cache_root(configured: str | None) -> Path:
    """What is configured, else $POSTTRAIN_CACHE, else ``posttrain`` in $XDG_CACHE_HOME or
    ~/.cache."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = configured or os.environ.get("POSTTRAIN_CACHE") or user_cache / "posttrain"
    return Path(chosen).expanduser()


def cache_folder(config: DataConfig) -> Path:
    """``data`` in ``cache_root(data.cache_dir)``."""
    return cache_root(config.cache_dir) / "data"


def cache_key(
    source: Sequence[Path] | HubSource,
    tokenizer: str,
    encoder: ChatEncoder,
    config: DataConfig,
    purpose: str,
) -> str:
    """32 hex digits; equal keys mean equal tokens. ``tokenizer``: its digest."""
    if isinstance(source, HubSource):
        loaded = load_hub(source, split=config.split)
        content = [f"{source.name}:{source.config}[{config.split}] {loaded._fingerprint}"]
    else:  # with the suffix: the same bytes read as CSV are other rows
        content = [f"{''.join(p.suffixes[-2:]).lower()} {file_digest(p)}" for p in source]
    chosen = ("format", "columns", "max_length", "overlong")
    options = {name: getattr(config, name) for name in chosen}
    options |= {"purpose": purpose, "carry": sorted(config.carry)}
    decisive = [ENCODING_VERSION, content, tokenizer, encoder.template, encoder.mask_from, options]
    return _digest(decisive)[:32]


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of vocabulary, merges and special tokens. Padding and truncation, which calls leave
    behind, are left out."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = {"vocab": tokenizer.get_vocab(), "init": repr(tokenizer)}
    else:
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    versions = [transformers.__version__, tokenizers.__version__]
    return _digest([state, tokenizer.special_tokens_map, *versions])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None if there is none, or its tokens have not the size it
    states."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        size_bytes = (folder / TOKENS).stat().st_size
    except (OSError, json.JSONDecodeError):
        return None
    return manifest if manifest.get("tokens_bytes") == size_bytes else None


def publish(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Fills ``folder`` atomically. ``write(tokens_path)`` writes the tokens and returns the
    manifest's entries.

    Returns the manifest of what lies in ``folder`` afterwards: another process's if that was there
    first.
    """
    try:
        with whole_folder(folder) as temporary:
            manifest = write(temporary / TOKENS)
            manifest["tokens_bytes"] = (temporary / TOKENS).stat().st_size
            write_json(temporary / MANIFEST, manifest)
            if folder.exists() and read_manifest(folder) is None:  # damaged
                shutil.rmtree(folder, ignore_errors=True)
        return manifest
    except OSError as error:
        if (there := read_manifest(folder)) is not None:
            return there
        raise OSError(
            error.errno,
            f"{folder.parent}: cannot write tokenised data here: {error}. Free space, or set "
            "--data.cache_dir or POSTTRAIN_CACHE.",
        ) from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
