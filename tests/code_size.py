"""How much code a package has, by a measure that wide lines cannot meet.

    python -m tests.code_size [FOLDER]

Lines after formatting at 100 columns, without blank lines, comments and docstrings; by folder, and
in all.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def code_size(folder: Path) -> int:
    """Lines of code of all Python files below ``folder``."""
    return sum(by_folder(folder).values())


def by_folder(folder: Path) -> Counter[str]:
    """The same by the first folder below, or by file."""
    ruff = Path(sys.executable).with_name("ruff")
    sizes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.rglob("*.py"):
            target = Path(copy) / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(re.sub("# fmt: (skip|off|on)", "", path.read_text()))
        subprocess.run(
            [ruff, "format", "-q", "--isolated", "--line-length", "100", copy], check=True
        )
        for path in Path(copy).rglob("*.py"):
            sizes[path.relative_to(copy).parts[0]] += _lines_of_code(path.read_text())
    return sizes


def _lines_of_code(text: str) -> int:
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else ():
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                documented.update(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


if __name__ == "__main__":
    sizes = by_folder(Path(sys.argv[1] if len(sys.argv) > 1 else "posttrain"))
    for name, size in sizes.most_common():
        print(f"{size:6,} {name}")
    print(f"{sum(sizes.values()):6,} lines of code at 100 columns")
