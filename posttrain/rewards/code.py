"""Reward for code: the share of tests that a Python program passes, run in a sandbox
(``sandbox.py``)."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.rewards import reward, time_left
from posttrain.rewards.answers import judged_text

_SANDBOX = Path(__file__).with_name("sandbox.py")
_KEPT_S, _KEPT = 0.5, 0.1
"""Of the time left, what a test may not take: for starting the sandbox and for the answer, on a
busy machine too."""


class SandboxRefused(RuntimeError):
    """This machine does not permit the namespaces that the sandbox needs; nothing was run."""


@reward(verifies=True, on_timeout=0.0)
def code_tests(
    completion: str,
    sample: Mapping[str, Any],
    *,
    column: str = "tests",
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    processes: int = 16,
    partial: bool = False,
) -> float | None:
    """1 if the program passes every test of ``sample[column]``, else 0; ``partial``: the share that
    it passes.

    The program is the last block fenced as Python, else the last one without a language
    (``program_of``), else the ``<answer>`` block, else the text. Tests (``tests_of``) are inputs
    and outputs (stdout compared line by line, trailing white space aside; stderr is not looked at),
    calls of a function with their results, or Python statements that raise where it is wrong
    (``assert add(1, 2) == 3``), run after the program.

    ``timeout_s`` holds for each test, ``memory_mb`` (10^6 bytes) for each of a test's processes and
    for its files together. All tests share the time of one call (``rewards.timeout_s``), in their
    order; those that no time is left for are not run and count as failed, so set it to at least
    tests x ``timeout_s``. None without tests. Only the standard library can be imported. A program
    that shares a process with assertions could fake their success if it knew the harness (an object
    that equals everything; a search for the harness in memory); stdin and stdout tests do not have
    that weakness.
    """
    tests, program = tests_of(sample, column), program_of(completion)
    if not tests or program is None:
        return 0.0 if tests else None
    passed = 0
    for test in tests:
        seconds = min(timeout_s, (1 - _KEPT) * time_left() - _KEPT_S)
        limits = {"timeout_s": seconds, "memory_bytes": memory_mb * 10**6, "processes": processes}
        ok = seconds > 0 and _passes(program, test, limits)
        if not ok and not partial:
            return 0.0
        passed += ok
    return passed / len(tests)


Test = str | dict[str, Any]
"""Python statements, or {"stdin", "stdout"}."""


def tests_of(sample: Mapping[str, Any], column: str) -> list[Test]:
    """The tests of a row in one layout. Empty where there are none; ValueError for a layout that is
    not known.

    Read are lists of statements or of ``{stdin|input, stdout|output}`` (TACO, LiveCodeBench,
    KodCode), ``{inputs, outputs}`` (APPS, CodeContests has ``{input, output}`` lists), each with
    ``fn_name`` for calls, and all of these as JSON text. A list of output lines is joined.
    """
    given = sample.get(column)
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        given = json.loads(given)
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        given = _paired(given, column)
    given = given or []
    if not isinstance(given, list | tuple):
        raise ValueError(
            f"tests in column {column!r} are a list or {{inputs, outputs}}; got "
            f"{type(given).__name__}."
        )
    return [_test(test, column) for test in given]


def _paired(given: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    for before, after in (("inputs", "outputs"), ("input", "output"), ("stdin", "stdout")):
        if before not in given or after not in given:
            continue
        inputs, outputs = given[before], given[after]
        if isinstance(inputs, str) or isinstance(outputs, str):
            inputs, outputs = [inputs], [outputs]
        if len(inputs) != len(outputs):
            raise ValueError(
                f"column {column!r} has {len(inputs)} {before} and {len(outputs)} "
                f"{after}; each needs its own."
            )
        name = given.get("fn_name")
        pairs = zip(inputs, outputs, strict=True)
        return [{"input": i, "output": o, "fn_name": name} for i, o in pairs]
    raise ValueError(
        f"tests in column {column!r} have the keys {sorted(given)}; known are inputs "
        "and outputs, with fn_name."
    )


def _test(test: Any, column: str) -> Test:
    if isinstance(test, str):
        return test
    keys = sorted(test) if isinstance(test, Mapping) else type(test).__name__
    result = next((name for name in ("stdout", "output") if name in keys), None)
    if result is None or isinstance(keys, str):
        raise ValueError(
            f"a test in column {column!r} is Python statements, or has stdin and stdout (or input "
            f"and output, with fn_name for a call); got {keys}."
        )
    given = test.get("stdin", test.get("input", []))
    if test.get("fn_name"):
        return _call(str(test["fn_name"]), given, test[result])
    return {"stdin": _joined(given), "stdout": _joined(test[result])}


def _joined(value: Any) -> str:
    """Lines as one text; None is no text."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return "" if value is None else str(value)


def _call(name: str, arguments: Any, result: Any) -> str:
    """Statements that call a function, or the method of a class Solution. Arguments are a list, or
    text with one JSON value a line. APPS writes a result as [result] too."""
    if not isinstance(arguments, list):
        values = [json.loads(line) for line in str(arguments).splitlines() if line.strip()]
        if isinstance(arguments, str) and isinstance(result, str):
            result = json.loads(result)
        arguments = values
    return f"""_has = 'Solution' in globals() and hasattr(Solution, {name!r})
_got = (getattr(Solution(), {name!r}) if _has else {name})(*{arguments!r})
_got = list(_got) if isinstance(_got, tuple) else _got
_wanted = {result!r}
assert _got == _wanted or (isinstance(_wanted, list) and [_got] == _wanted)"""


_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)([^\n`]*)\n(.*?)^[ \t]*\1[ \t]*$", flags=re.DOTALL | re.MULTILINE
)


def program_of(completion: str) -> str | None:
    """The last block that is fenced (with ``` or ~~~) as Python; without such a one the last of no
    language, but for a block that shows output; without a block what ``judged_text`` gives."""
    text = judged_text(completion)
    if text is None:
        return None
    fenced = text if "```" in text or "~~~" in text else completion
    blocks = [(m[2].lower().split()[:1], m[3]) for m in _FENCE.finditer(fenced)]
    named = [body for language, body in blocks if language in (["py"], ["python"], ["python3"])]
    return (named or [body for language, body in blocks if not language] or [text])[-1]


def _passes(program: str, test: Test, limits: Mapping[str, Any]) -> bool:
    if isinstance(test, str):
        mark = secrets.token_hex(16)  # printed after program and test: an early exit prints none
        program = f"{program}\n\n{test}\n\nprint({mark!r})\n"
        result = run_sandboxed(program, stdin="", **limits)
        return result.get("code") == 0 and result["output"].rstrip().endswith(mark)
    result = run_sandboxed(program, stdin=test["stdin"], **limits)
    passed = result.get("code") == 0 and not result["too_long"]
    return passed and lines(result["output"]) == lines(test["stdout"])


def lines(text: str) -> list[str]:
    """What is compared: white space at the end of a line and of the text does not count."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run_sandboxed(program: str, *, stdin: str, timeout_s: float, **limits: Any) -> dict[str, Any]:
    """What ``sandbox.run`` tells of a program; ``limits``: memory_bytes and processes. Raises
    SandboxRefused where no sandbox can be made."""
    task = {"program": program, "stdin": stdin, "parent": os.getpid()}
    job = {**task, "timeout_s": timeout_s, **limits}
    done = subprocess.run(
        [sys.executable, "-I", str(_SANDBOX)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=timeout_s + 30,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the sandbox itself failed: {done.stderr[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    if result["status"] == "refused":
        raise SandboxRefused(
            f"Model-written code is not run on this machine: {result['problem']}. The sandbox "
            "needs Linux namespaces (run as root, or with unprivileged user namespaces)."
        )
    return result
