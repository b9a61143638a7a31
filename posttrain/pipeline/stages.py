"""A pipeline file into stages: variables and outputs put in, and what decides each stage's result.

A stage is one of posttrain's commands or a Python script. It names outputs of the stages before it
as ``${stage.output}``, and variables as ``${name}``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from posttrain.files import content_digest
from posttrain.resolve import among, find_shipped, flat

TRAINERS = ("sft", "dpo", "reward", "rl", "distill")
OUT_OPTIONS: dict[str, dict[str, str]] = {
    "merge": {"--out": "model"},
    "sample": {"--out": "samples", "--figures": "figures.json"},
    "select": {"--out": "rows.jsonl", "--figures": "figures.json"},
    "eval": {"--out": "answers.jsonl", "--figures": "figures.json"},
    "prep pairs": {"--out": "rows"},
    "prep sft": {"--out": "rows"},
    "prep difficulty": {"--out": "rows.jsonl"},
    "prep tests": {"--out": "rows.jsonl"},
}
"""How each command is told where to write in its stage's folder. A trainer's folder is its run's;
a script gets ``${out}``."""
OUTPUTS: dict[str, dict[str, str]] = {
    **dict.fromkeys(TRAINERS, {"model": "final", "best": "best", "run": ""}),
    **{name: {Path(o).stem: o for o in out.values()} for name, out in OUT_OPTIONS.items()},
    **dict.fromkeys(("prep pairs", "prep sft"), {"train": "rows/train", "test": "rows/test"}),
}
"""What each command leaves there, by the name that other stages use."""
_KEYS = "run config settings launch processes outputs needs only slurm".split()
_NAME = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command with everything put in."""

    name: str
    words: list[str]
    """The command and its arguments: ["eval", "runs/r1/cold_start/final"]."""
    settings: dict[str, Any]
    """A trainer's settings; options of any other command."""
    launch: str = ""
    processes: int = 0
    slurm: dict[str, Any] = field(default_factory=dict)
    """Options of sbatch."""
    folder: Path
    outputs: dict[str, Path]
    needs: list[str]
    """Stages whose outputs it reads."""
    decides: dict[str, Any]
    """Everything that its result depends on, flat: a change of any of it makes another stage."""

    @property
    def command(self) -> str:
        """Of posttrain, or ``python``."""
        return command_of(self.words)

    @property
    def identity(self) -> str:
        """16 hex digits of ``decides``."""
        return sha256(json.dumps(self.decides, sort_keys=True).encode()).hexdigest()[:16]


def command_of(words: Sequence[str]) -> str:
    """ "prep pairs" of ["prep", "pairs", "raw.jsonl"]."""
    return " ".join(words[:2]) if words[:1] == ["prep"] else "".join(words[:1])


def read_stages(
    path: Path, *, root: Path, size: str = "", quick: bool = False, variables: Mapping[str, Any]
) -> list[Stage]:
    """The stages of a file for one of its sizes, in an order in which they can run. ``root``: the
    folder that gets a folder for each; ``variables`` go before the file's. Raises ValueError with
    what is wrong and where."""
    text = read_yaml(path)
    if not isinstance(text.get("stages"), dict):
        raise ValueError(
            f"{path} is no pipeline: it needs `stages:`, a mapping of names to stages."
        )
    _refuse_unknown(text, ["variables", "sizes", "settings", "stages"], where=str(path))
    values = {"here": str(path.parent), **text.get("variables", {})}
    values |= _of_size(text.get("sizes", {}), size, quick, path)
    if unknown := sorted(variables.keys() - values.keys()):
        raise ValueError(f"{path} has no variable {unknown[0]!r}; {among(unknown[0], values)}")
    values |= variables
    named = text["stages"]
    for name, raw in named.items():
        _refuse_unknown(raw, _KEYS, where=f"{path}, stage {name}")
        for key in ("config", "needs", "only"):
            if not isinstance(raw.get(key, []), list):
                raise ValueError(f"{path}, stage {name}: {key} is a list; got {raw[key]!r}.")
    file = _File(values=values, named=named, shared=text.get("settings", {}), root=root)
    for name, raw in named.items():
        if size in raw.get("only", [size]):
            file.done[name] = file.stage(name, raw)
    return list(file.done.values())


def _of_size(sizes: Mapping[str, Any], size: str, quick: bool, path: Path) -> dict[str, Any]:
    if bool(sizes) != bool(size) or size not in (sizes or [size]):
        known = f"the sizes {', '.join(sizes)}: name one with --size" if sizes else "no sizes"
        raise ValueError(f"{path} has {known}; got {f'--size {size}' if size else 'none'}.")
    chosen = dict(sizes.get(size) or {})
    faster = chosen.pop("quick", None)
    if quick and faster is None:
        raise ValueError(f"{path}: size {size!r} has no `quick:`. Leave out --quick.")
    return chosen | (faster if quick else {})


def _refuse_unknown(given: Any, known: Sequence[str], *, where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where} is a mapping with the keys {', '.join(known)}; got {given!r}.")
    for key in given.keys() - set(known):
        raise ValueError(f"{where} has an unknown key {key!r}; {among(str(key), known)}")


@dataclass
class _File:
    """Puts values into the stages one after another, and notes which stages they are of."""

    values: Mapping[str, Any]
    named: Mapping[str, Any]
    shared: Mapping[str, Any]
    root: Path
    done: dict[str, Stage] = field(default_factory=dict)
    digest: Callable[[Path], str] = field(default_factory=lambda: cache(content_digest))
    """Of a file, once for all stages."""

    def stage(self, name: str, raw: Mapping[str, Any]) -> Stage:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"A stage's name is letters, digits and _; got {name!r}.")
        self.name = name
        self.needs: dict[str, None] = {}
        self._open: set[str] = set()
        folder = self.root / self.name
        run = raw.get("run")
        if not isinstance(run, str) or not run.strip():
            raise ValueError(
                f"Stage {self.name} needs `run:`, a command such as 'sft'; got {run!r}."
            )
        words = [str(self._put_in(word)) for word in shlex.split(run)]
        command = command_of(words)
        if command not in OUTPUTS and command != "python":
            known = among(command, [*OUTPUTS, "python"])
            raise ValueError(f"Stage {self.name} runs {command!r}, which is no command; {known}")
        settings: dict[str, Any] = {}
        for file in raw.get("config", []):
            shared = self.shared[file] if file in self.shared else self._read(file)
            settings = merged(settings, self._put_in(shared))
        settings = merged(settings, self._put_in(raw.get("settings") or {}))
        taken = {option.removeprefix("--") for option in OUT_OPTIONS.get(command, {})}
        if own := sorted(taken & settings.keys()):
            raise ValueError(f"Stage {self.name}: {own[0]} is the pipeline's to set. Leave it out.")
        outputs = OUTPUTS.get(command) or self._put_in(raw.get("outputs") or {})
        for name in raw.get("needs", []):
            self._stage(name)
        return Stage(
            name=self.name,
            words=words,
            settings=settings,
            launch=str(self._put_in(raw.get("launch", ""))),
            processes=int(self._put_in(raw.get("processes", 0))),
            slurm=self._put_in(raw.get("slurm") or {}),
            folder=folder,
            outputs={key: folder / place for key, place in outputs.items()},
            needs=list(self.needs),
            decides=self._decides(words, settings, outputs),
        )

    def _read(self, file: str) -> dict[str, Any]:
        blocks = f" (blocks of settings: {', '.join(self.shared) or 'none'})"
        where = f"Stage {self.name}: config{blocks}"
        return read_yaml(find_shipped(str(self._put_in(file)), "recipes/configs", where))

    def _put_in(self, value: Any) -> Any:
        """The value with every ``${...}`` in it replaced. A text that is nothing else becomes what
        it names, of whatever type."""
        if isinstance(value, Mapping):
            return {self._put_in(k): self._put_in(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._put_in(v) for v in value]
        if not isinstance(value, str):
            return value
        if whole := _NAME.fullmatch(value):
            return self._named(whole[1])
        return _NAME.sub(lambda found: str(self._named(found[1])), value)

    def _named(self, name: str) -> Any:
        if name == "out":
            return str(self.root / self.name)
        if name in self.values:
            if name in self._open:
                raise ValueError(f"{self.values['here']}: the variable {name} names itself.")
            self._open.add(name)
            value = self._put_in(self.values[name])
            self._open.remove(name)
            return value
        stage, dot, output = name.partition(".")
        if not dot:
            known = among(name, ["out", *self.values, *self.done])
            raise ValueError(f"Stage {self.name}: there is no variable ${{{name}}}; {known}")
        needed = self._stage(stage)
        outputs = needed.outputs
        is_kept = needed.settings.get("train", {}).get("best_metric")
        if output == "best" and needed.command in TRAINERS and not is_kept:
            raise ValueError(
                f"Stage {self.name}: ${{{name}}} is there only if {stage} sets train.best_metric."
            )
        if output not in outputs:
            known = among(output, outputs)
            raise ValueError(f"Stage {self.name}: ${{{name}}} is no output of {stage}; {known}")
        return str(outputs[output])

    def _stage(self, name: str) -> Stage:
        if name not in self.done:
            why = "is not before it" if name in self.named else "is not there"
            known = among(name, self.done)
            raise ValueError(
                f"Stage {self.name} needs stage {name!r}, which {why} (in this size); {known}"
            )
        self.needs[name] = None
        return self.done[name]

    def _decides(
        self, words: list[str], settings: dict[str, Any], outputs: Mapping[str, str]
    ) -> dict[str, Any]:
        """Flat. Where stages' outputs lie decides nothing, what they are does; of a file its
        content does."""
        inside, here = f"{self.root}/", f"{self.values['here']}/"
        named = {"run": shlex.join(words), **{f"settings.{k}": v for k, v in flat(settings)}}
        text = json.dumps(named, ensure_ascii=False).replace(inside, "").replace(here, "")
        arguments = words[len(command_of(words).split()) :]
        found = {path for word in texts([arguments, settings]) if (path := _file(word)) is not None}
        files = {
            str(path).removeprefix(here): self.digest(path)
            for path in sorted(found)
            if not str(path).startswith(inside)
        }
        return {
            **json.loads(text),
            **({} if outputs is OUTPUTS.get(command_of(words)) else {"outputs": dict(outputs)}),
            **{f"the content of {name}": digest for name, digest in files.items()},
            **{f"stage {name}": self.done[name].identity for name in self.needs},
            "version of posttrain": version("posttrain"),
        }


def texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings; of keys the dotted ones, which may be functions of a
    file."""
    if isinstance(value, Mapping):
        value = [*(key for key in value if "." in str(key)), *value.values()]
    if isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str):
        yield value


def _file(text: str) -> Path | None:
    """The file or folder that a setting names, or the module of ``module.function`` in this
    folder."""
    if not text.strip() or "\n" in text or len(text) > 1000:
        return None
    if os.path.exists(text):
        return Path(text)
    parts = text.split(".")[:-1]
    if parts and all(map(str.isidentifier, parts)):
        module = Path(*parts).with_suffix(".py")
        return module if module.is_file() else None
    return None


def merged(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """``then`` over ``first``, mappings key by key; None takes a key out."""
    result = dict(first)
    for key, value in then.items():
        before = result.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            result[key] = merged(before, value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of settings. ValueError where it is none, or a key stands twice."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no settings: it is a mapping of names; got {value!r}.")
    return value


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
