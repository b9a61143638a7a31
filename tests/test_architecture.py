"""The shape of the package: dependencies point one way, no cycles, files and functions that fit a
screen or two, light imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.code_size import code_size

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "posttrain"
LAYERS = [
    {"resolve"},
    {"types", "precision", "files", "blocks"},
    {"losses", "data", "packing"},
    {"models"},
    {"rollout", "rewards"},
    {"training"},
    {"rl"},
    {"plan"},
    {"trainers"},
    {"pipeline", "report"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def area(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path, *, runtime_only: bool = False) -> set[str]:
    """Dotted names of what a file imports; with ``runtime_only`` without what only type checkers
    see."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if runtime_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import from posttrain by its full name"
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    mine = area(path)
    if mine == "__init__":
        return
    assert mine in LEVEL, f"{path}: a new part of the package needs a layer in this test"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "posttrain" and len(parts) > 1 and parts[1] in LEVEL:
            other = parts[1]
            assert other == mine or LEVEL[other] < LEVEL[mine], (
                f"{path} imports {name}: {mine} must not know {other}"
            )


def test_there_are_no_import_cycles():
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in FILES
    }
    edges = {
        m: {n for n in imports(p, runtime_only=True) if n in modules and n != m}
        for m, p in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for other in edges[module]:
                visit(other, [*trail, module])
            done.add(module)

    for module in modules:
        visit(module, [])


def test_the_code_does_not_grow_without_a_word():
    """At most what the last entry of the log beside says. More code is an entry with what it buys;
    less is welcome there, too."""
    log = (ROOT / "tests" / "code_size.md").read_text()
    sizes = [
        int(line.split("|")[1].replace(",", ""))
        for line in log.splitlines()
        if re.match(r"\| [0-9,]+ \|", line)
    ]
    assert code_size(PACKAGE) <= sizes[-1], "see tests/code_size.md"


def test_the_measure_of_code_counts_no_words_and_no_width(tmp_path):
    text = '''"""Docstring."""

# a comment
def f(a, b):
    """Another,
    of two lines."""
    text = """kept
    as code"""
    return [a, b, text, "{}"]  # fmt: skip
'''
    (tmp_path / "a.py").write_text(text.replace("{}", "x"))
    assert code_size(tmp_path) == 4
    (tmp_path / "a.py").write_text(text.replace("{}", "x" * 90))
    assert code_size(tmp_path) > 4, "a line of more than 100 columns is several"


def test_records_and_precision_import_torch_only_for_type_checkers():
    for name in ("types.py", "precision.py"):
        tree = ast.parse((PACKAGE / name).read_text())
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not any("torch" in ast.unparse(n) for n in top), name


@pytest.mark.parametrize(
    "module",
    ["posttrain", "posttrain.types", "posttrain.precision", "posttrain.data", "posttrain.cli.main"],
)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit(' '.join(m for m in ('torch', 'transformers', 'datasets') if m in sys.modules) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, f"{module} loads {result.stderr}"


def test_nothing_says_how_or_where_it_was_made():
    """No path of one machine, and nothing but posttrain's own words."""
    tracked = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    for name in tracked:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".sh")
            or path.name == "Makefile"
        ):
            text = path.read_text()
            for banned in ("/wor" + "k/", "/ro" + "ot/", "/hom" + "e/"):
                assert banned not in text, f"{name} has a path of one machine: {banned}"
