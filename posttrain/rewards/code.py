"""Reward for code: the share of tests that a Python program passes, run in a sandbox (``sandbox.py``)."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.rewards.answers import judged_text

_SANDBOX = Path(__file__).with_name("sandbox.py")


class SandboxRefused(RuntimeError):
    """This machine does not permit the namespaces that the sandbox needs; nothing was run."""


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
    """1 if the program passes every test of ``sample[column]``, else 0; ``partial``: the share that it passes.

    The program is the last ``` block, else the ``<answer>`` block, else the text. Tests are ``{"stdin": ..., "stdout": ...}``
    (output compared line by line, trailing white space aside) or Python statements that raise where it is wrong (``assert
    add(1, 2) == 3``), run after the program. ``timeout_s`` and ``memory_mb`` (10^6 bytes) hold for each test. None without tests.
    Only the standard library can be imported. A program that shares a process with assertions could fake their success if it knew
    the harness; stdin and stdout tests do not have that weakness.
    """
    tests = sample.get(column)
    tests = json.loads(tests) if isinstance(tests, str) else tests
    if not tests:
        return None
    program = program_of(completion)
    if program is None:
        return 0.0
    limits = {"timeout_s": timeout_s, "memory_bytes": memory_mb * 10**6, "processes": processes}
    passed = 0
    for test in tests:
        ok = _passes(program, test, limits)
        if not ok and not partial:
            return 0.0
        passed += ok
    return passed / len(tests)


code_tests.isolated = True  # type: ignore[attr-defined]
code_tests.on_timeout = 0.0  # type: ignore[attr-defined]


def program_of(completion: str) -> str | None:
    """The last fenced block, else what ``judged_text`` gives."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", completion, flags=re.DOTALL)
    return blocks[-1] if blocks else judged_text(completion)


def _passes(program: str, test: Any, limits: Mapping[str, Any]) -> bool:
    if isinstance(test, str):
        mark = secrets.token_hex(16)  # printed by what runs after the program and its test: an early exit does not print it
        source = f"{program}\n\n{test}\n\nprint({mark!r})\n"
        result = run_sandboxed(source, stdin="", **limits)
        return result["status"] == "exit" and result["code"] == 0 and result["output"].rstrip().endswith(mark)
    result = run_sandboxed(program, stdin=str(test.get("stdin") or ""), **limits)
    if result["status"] != "exit" or result["code"] != 0 or result["too_long"]:
        return False
    return _lines(result["output"]) == _lines(str(test["stdout"]))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run_sandboxed(program: str, *, stdin: str, timeout_s: float, memory_bytes: int, processes: int) -> dict[str, Any]:
    """What ``sandbox.run`` tells of a program. Raises SandboxRefused where no sandbox can be made."""
    job = {"program": program, "stdin": stdin, "timeout_s": timeout_s, "memory_bytes": memory_bytes, "processes": processes}
    done = subprocess.run(
        [sys.executable, "-I", str(_SANDBOX)], input=json.dumps(job), capture_output=True, text=True, timeout=timeout_s + 30
    )
    if done.returncode != 0:
        raise RuntimeError(f"the sandbox itself failed: {done.stderr[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    if result["status"] == "refused":
        raise SandboxRefused(
            f"Model-written code is not run on this machine: {result['problem']}. The sandbox needs Linux namespaces (run as "
            "root, or with unprivileged user namespaces)."
        )
    return result
