"""Every command and every Python block of README.md, CONTRIBUTING.md and docs/ is run, every option,
file and link that they name exists.

A page is run from top to bottom in one folder. A ```python block is a script of its own; one that
begins with a comment such as `# my_losses.py` (`# mine.yaml`) is also a file of that name. A block
without a language, or with `sh`, holds commands, or none. `<!-- not run: REASON -->` before a block
leaves it out. Models are tiny, runs have two steps (``tests/run_small.py``).
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain
from posttrain import Loss, Rollout, as_loss
from posttrain.cli.main import COMMANDS, build_parser
from posttrain.cli.train import TRAINERS
from posttrain.models.embedded import EMBEDDED
from posttrain.rl.algorithms import ALGORITHMS
from tests.e2e.launching import REPO, Run, environment
from tests.tiny import model_folder

PAGES = {p.relative_to(REPO).as_posix(): p.read_text() for p in sorted(REPO.glob("docs/*.md"))}
for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
    PAGES[name] = (REPO / name).read_text() if (REPO / name).exists() else ""
RUN = ("posttrain", "accelerate", "python")
CHECKED = ("make", "pip", "git", "cd", "source", "launch/vllm.sh", "ruff", "mypy")
NOT_RUN = "<!-- not run: "
FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", flags=re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    is_run: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command; empty where the block holds none."""
        if self.language not in ("", "sh"):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        split = [shlex.split(line, comments=True) for line in lines if is_command(line)]
        without_variables = [
            [w for w in words if not re.match(r"[A-Z_0-9]+=", w)] for words in split
        ]
        others = [line for line in lines if line.strip() and not is_command(line)]
        comments = all(line.lstrip().startswith("#") for line in others)
        assert not split or comments, f"{self}: commands and other lines {others} in one block"
        assert split or self.language != "sh", f"{self}: no command"
        return [part for words in without_variables for part in split_at(words, "&&")]


def is_command(line: str) -> bool:
    words = [w for w in line.split() if not re.match(r"[A-Z_0-9]+=", w)]
    return bool(words) and (words[0] in (*RUN, *CHECKED) or words[0].startswith(".venv"))


def split_at(words: list[str], mark: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def blocks_of(page: str) -> Iterator[Block]:
    text = PAGES[page]
    for found in FENCE.finditer(text):
        before = text[: found.start()].rstrip("\n").rpartition("\n")[2]
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, found[1], found[2], not before.startswith(NOT_RUN))


def is_run(words: list[str]) -> bool:
    """All but what takes minutes: the demo, benchmarks, tests."""
    is_long = words[0] == "python" and words[1].startswith(("benchmarks/", "recipes/demo.py", "-m"))
    return words[0] in RUN and not is_long


WITH_SOMETHING_TO_RUN = [
    page
    for page in PAGES
    if any(
        b.is_run and (b.language == "python" or any(is_run(c) for c in b.commands))
        for b in blocks_of(page)
    )
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache in which the embedded models are tiny, and the names of folders in the pages."""
    root = tmp_path_factory.mktemp("cache")
    for name, model in EMBEDDED.items():
        version = f"{model.requirement.split('==')[1]}-r{model.revision}"
        folder = model_folder(root / "models" / f"{name}-{version}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return root


def rows_of(**columns: Any) -> str:
    """40 rows as JSON lines; a column is a function of the row's number."""
    rows = [{name: value(i) for name, value in columns.items()} for i in range(40)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(i: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer}]


FILES = {
    "my.jsonl": rows_of(prompt=lambda i: f"say {i}", completion=str),
    "problems.jsonl": rows_of(question=lambda i: f"What is {i} + 1?", answer=lambda i: str(i + 1)),
    "raw.jsonl": rows_of(chosen=lambda i: chat(i, str(i)), rejected=lambda i: chat(i, "no")),
    "labels.jsonl": rows_of(
        prompt=lambda i: f"say {i}", completion=str, label=lambda i: i % 2 == 0
    ),
    "preferences.csv": "prompt,chosen,rejected\n" + "".join(f"say {i},{i},no\n" for i in range(40)),
}
"""What users have before they begin; the models are `my_model`, `student` and `teacher`."""


def small(folder: Path, cache: Path, words: list[str], *, timeout_s: float = 100) -> str:
    """Runs a command of a page; returns what it printed."""
    script = str(REPO / "tests" / "run_small.py")
    env = environment(POSTTRAIN_CACHE=str(cache), CUDA_VISIBLE_DEVICES="")
    result = Run([script, str(folder), *words], [env]).wait(timeout_s)
    assert result.returncode == 0, (
        f"{shlex.join(words)}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    )
    return result.stdout


def prepare(folder: Path, cache: Path) -> None:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name in ("recipes", "launch"):
        (folder / name).symlink_to(REPO / name)
    (model,) = (cache / "models").iterdir()
    for name in ("my_model", "student", "teacher"):
        (folder / name).symlink_to(model)


@pytest.mark.parametrize("page", WITH_SOMETHING_TO_RUN)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, cache):
    prepare(tmp_path, cache)
    for number, block in enumerate(blocks_of(page)):
        if not block.is_run:
            continue
        if named := re.match(r"# (\w+\.yaml)\n", block.text):
            (tmp_path / named[1]).write_text(block.text)
        if block.language == "python":
            named = re.match(r"# (\w+\.py)\n", block.text)
            path = tmp_path / (named[1] if named else f"block_{number}.py")
            path.write_text(block.text)
            small(tmp_path, cache, ["python", path.name])
        for words in block.commands:
            if is_run(words):
                small(tmp_path, cache, words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_not_run_name_what_exists(page):
    made = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), flags=re.M))
    for block in blocks_of(page):
        if block.language == "python":
            compile(block.text, str(block), "exec")
        for words in block.commands:
            program, *rest = words
            if program == "make":
                assert set(rest) <= made, f"{block}: make {rest}; the Makefile has {made}"
            elif program == "python":
                path = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
                named = any(f"# {path}\n" in b.text for b in blocks_of(page))
                is_tool = rest[:2] in (["-m", "pytest"], ["-m", "venv"], ["-m", "pip"])
                assert is_tool or named or (REPO / path).is_file(), f"{block}: no {path}"
            elif program == "posttrain":
                assert rest[0] in COMMANDS or rest[0] == "--help", f"{block}: posttrain {rest[0]}"
            elif program.startswith("launch/"):
                assert (REPO / program).is_file(), f"{block}: no {program}"


def all_parsers(parser: Any) -> Iterator[Any]:
    yield parser
    for action in parser._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from all_parsers(inner)


def settings_of_runs() -> Iterator[Any]:
    """The settings' options of every method."""
    from jsonargparse import ArgumentParser

    for name, _ in TRAINERS.values():
        parser = ArgumentParser(default_env=False)
        parser.add_class_arguments(getattr(posttrain, f"{name}Config"), as_group=False)
        yield from parser._actions


@pytest.fixture(scope="module")
def options():
    """Of all commands, recipes and benchmarks, and of accelerate."""
    from accelerate.commands.launch import launch_command_parser

    known = {"--config", "--print_config", "--help", "--launch", "--processes"}
    for parser in (*all_parsers(build_parser()), launch_command_parser()):
        known.update(o for action in parser._actions for o in action.option_strings)
    for folder in ("recipes", "benchmarks"):
        for path in (REPO / folder).glob("*.py"):
            known.update(re.findall(r'"(--[\w-]+)"', path.read_text()))
    known.update(re.findall(r"(?<!\S)--[\w-]+", (REPO / "launch" / "vllm.sh").read_text()))
    known.update(o for action in settings_of_runs() for o in action.option_strings)
    return known


@pytest.fixture(scope="module")
def mappings():
    """Options that are a mapping, whose keys are the user's."""
    return {
        o
        for action in settings_of_runs()
        for o in action.option_strings
        if "dict" in str(getattr(action, "_typehint", ""))
    }


def options_of_losses() -> set[str]:
    known = {"weight"}
    for home in ("preference", "policy", "reward", "sft"):
        for value in vars(importlib.import_module(f"posttrain.losses.{home}")).values():
            if isinstance(value, Loss) or str(getattr(value, "__module__", "")).endswith(home):
                known |= as_loss(value).accepts if callable(value) else set()
    for algorithm in ALGORITHMS.values():
        known |= {*vars(algorithm), *algorithm.loss_options, *algorithm.advantage_options}
    text = "".join(b.text for page in PAGES for b in blocks_of(page) if b.language == "python")
    return known | set(re.findall(r"\b(\w+)(?:: \w+)? ?= ?", text))


OTHERS = ("--no-deps", "--index-url", "--extra-index-url", "--editable", "--constraint")
"""pip's options."""


@pytest.mark.parametrize("page", PAGES)
def test_every_option_exists(page, options, mappings):
    of_losses = options_of_losses()
    text = re.sub(r"^```(python|text|yaml|json)\n.*?^```$", "", PAGES[page], flags=re.M | re.S)
    groups = {o.split(".")[0].removeprefix("--") for o in options if "." in o}
    written = set(re.findall(r"(?<![\w-])(--[A-Za-z][\w-]*(?:\.\w+)*)", text))
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text):
        if name.split(".")[0] in groups and not name.endswith(".py"):
            written.add(f"--{name}")
    for option in sorted(written):
        group, _, key = option.rpartition(".")
        in_mapping = group in mappings and (
            key in of_losses
            or key.isupper()
            or group not in ("--loss_options", "--algorithm_options")
        )
        assert option in options or in_mapping or option in OTHERS, f"{page}: no option {option}"


@pytest.mark.parametrize("page", PAGES)
def test_extras_commands_and_files_exist(page):
    text = PAGES[page]
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    for names in re.findall(r"posttrain\[([\w,-]+)\]", text):
        assert set(names.split(",")) <= set(project["optional-dependencies"])
    for command in re.findall(r"`posttrain ([a-z]+)", text):
        assert command in COMMANDS, f"posttrain {command}"
    for path in re.findall(r"`((?:recipes|launch|tests|benchmarks|docs|posttrain)/[\w./]+)`", text):
        assert (REPO / path).exists(), path


def anchors(text: str) -> set[str]:
    """What a heading is linked by."""
    titles = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", text), flags=re.M)
    return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(FENCE, "", PAGES[page])):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+://", target):
            continue
        found = (REPO / page).parent / path if path else REPO / page
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(found.read_text()), f"{page}: {target}"


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_every_algorithm_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/algorithms.md"], flags=re.M)
    assert set(rows) >= set(ALGORITHMS)


def test_every_page_of_docs_is_linked_from_the_readme():
    for page in PAGES:
        if page.startswith("docs/"):
            assert f"({page})" in PAGES["README.md"], page


def test_the_snippets_of_algorithms_give_what_they_say():
    made: dict[str, Any] = {}
    for block in blocks_of("docs/algorithms.md"):
        if block.language == "python" and "Trainer(" not in block.text:
            exec(compile(block.text, str(block), "exec"), made)
    assert made["best_of_group"]([[0.5, 2.0, None]]) == [[0.0, 1.0, None]]
    assert made["MINE"].needs_reference and not made["GREEDY"].needs_reference
    logps, reference = np.array([-1.0, -2.0]), np.array([-1.5, -2.0])
    rollout = Rollout(reward=1.0, logps=logps, reference_logps=reference)
    ((shaped,),) = made["MINE"].credit.columns([[rollout]])
    assert shaped["advantage"].tolist() == pytest.approx([0.995, 1.0])
    calm = made["calm"]
    assert isinstance(calm, Loss) and calm.outputs == ("entropy",) and not calm.reference
    assert calm.with_options(weight=0.5).options == {"weight": 0.5}
    with pytest.raises(ValueError, match="has no option 'wait'; it has weight"):
        calm.with_options(wait=1)
