"""What decides a run's weights, as digests: code by its text, models by their weights."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from posttrain.files import content_digest
from posttrain.models.load import resolve_source

_SAMPLED = 256
_PLAIN = (str, int, float, bool, bytes, type(None))


def code_digest(value: Any) -> str:
    """12 hex digits of a function, or of an object with functions in it: equal as long as it says
    the same.

    Read are the source text (without comments and layout), what it closes over, the constants and
    functions of its own module that it names, defaults and fields. A function of posttrain or of
    another installed package is its dotted name.
    """
    content = "\n".join(_described(value, seen=set()))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


FRESH = (".lora_", ".modules_to_save.", "score.")
"""Parts of the names of weights that a run draws itself: its seed stands for them."""


def sampled_weights_digest(model: nn.Module, *, skip: tuple[str, ...] = ()) -> str:
    """12 hex digits of up to 256 evenly spaced values of every parameter: milliseconds, and any
    training changes them. Left out are names with a part in ``skip``."""
    named = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    return _digest_of_weights(
        {n: p for n, p in named.items() if not any(part in n for part in skip)}
    )


def _digest_of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(weights.items()):
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[::step].to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:12]


def _described(value: Any, *, seen: set[int]) -> Iterator[str]:
    """Lines that say what the value does."""
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif id(value) in seen:
        yield "again"
    else:
        seen.add(id(value))
        yield from _described_object(value, seen)


def _described_object(value: Any, seen: set[int]) -> Iterator[str]:
    parts = _parts(value)
    if parts is not None:
        for part in parts:
            yield from _described(part, seen=seen)
    elif isinstance(value, FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, nn.Module):
        yield sampled_weights_digest(value)
    elif isinstance(value, torch.Tensor):
        yield _digest_of_weights({"": value})
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, type) or (_is_installed(type(value)) and not _has_fields(value)):
        yield _name(value if isinstance(value, type) else type(value))
    else:
        yield from _of_instance(value, seen)


def _parts(value: Any) -> Sequence[Any] | None:
    """What a container, a bound method or a partial consists of; None for anything else."""
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, Mapping):
        return [part for key in sorted(value, key=repr) for part in (repr(key), value[key])]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return value if isinstance(value, list | tuple) else None


def _of_instance(value: Any, seen: set[int]) -> Iterator[str]:
    kind = type(value)
    yield _name(kind) if _is_installed(kind) else _source(kind) or _name(kind)
    fields = (
        {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if dataclasses.is_dataclass(value)
        else getattr(value, "__dict__", {})
    )
    yield from _described(fields, seen=seen)


def _of_function(function: FunctionType, seen: set[int]) -> Iterator[str]:
    if _is_installed(function) and not function.__closure__:
        yield _name(function)
        return
    yield _source(function) or repr(list(_of_code(function.__code__)))
    yield from _described((function.__defaults__, function.__kwdefaults__), seen=seen)
    for value in inspect.getclosurevars(function).nonlocals.values():
        yield from _described(value, seen=seen)
    for name in _names(function.__code__):
        found = function.__globals__.get(name)
        is_its_own = getattr(found, "__module__", None) == function.__module__
        if name in function.__globals__ and (is_its_own or isinstance(found, (*_PLAIN, tuple))):
            yield f"{name} ="
            yield from _described(found, seen=seen)


def _source(value: Any) -> str | None:
    """The syntax tree of a function's or class's text; None where there is none of its own (a
    lambda's is its whole line)."""
    if getattr(value, "__name__", "") == "<lambda>":
        return None
    try:
        return ast.dump(ast.parse(textwrap.dedent(inspect.getsource(value))))
    except (OSError, TypeError, SyntaxError):
        return None


def _of_code(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        else:
            yield repr(constant)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _has_fields(value: Any) -> bool:
    """One of posttrain's records, which may hold functions of the user's."""
    return dataclasses.is_dataclass(value) and type(value).__module__.startswith("posttrain.")


def _is_installed(value: Any) -> bool:
    """Whether the code comes from a package, which its version identifies."""
    module = str(getattr(value, "__module__", ""))
    if module.partition(".")[0] == "posttrain":
        return True
    try:
        file = inspect.getfile(value)
    except (OSError, TypeError):
        return module == "builtins"
    return "site-packages" in file or "dist-packages" in file


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def source_digest(name: str) -> str:
    """Of the weights of a model that a setting names; a hub id as it is."""
    folder = Path(resolve_source(name))
    return content_digest(folder, "*.safetensors") if folder.is_dir() else name
