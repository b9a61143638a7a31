"""Reward for code: the share of tests that a Python program passes, run in a sandbox (``sandbox.py``)."""

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

from posttrain.rewards.answers import judged_text
from posttrain.rewards.completion import time_left

_SANDBOX = Path(__file__).with_name("sandbox.py")
_KEPT_S, _KEPT = 0.5, 0.1
"""Of the time left, what a test may not take: for starting the sandbox and for the answer, on a busy machine too."""


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
    add(1, 2) == 3``), run after the program. ``timeout_s`` holds for each test, ``memory_mb`` (10^6 bytes) for each of a test's
    processes and for its files together. All tests share the time of one call (``rewards.timeout_s``), in their order; those
    that no time is left for are not run and count as failed, so set it to at least tests x ``timeout_s``. None without tests.
    Only the standard library can be imported. A program that shares a process with assertions could fake their success if it knew
    the harness (an object that equals everything; a search for the harness in memory); stdin and stdout tests do not have that
    weakness.
    """
    tests = sample.get(column)
    tests = json.loads(tests) if isinstance(tests, str) else tests
    if not tests:
        return None
    program = program_of(completion)
    if program is None:
        return 0.0
    passed = 0
    for test in tests:
        seconds = min(timeout_s, (1 - _KEPT) * time_left() - _KEPT_S)
        limits = {"timeout_s": seconds, "memory_bytes": memory_mb * 10**6, "processes": processes}
        ok = seconds > 0 and _passes(program, test, limits)
        if not ok and not partial:
            return 0.0
        passed += ok
    return passed / len(tests)


code_tests.on_timeout = 0.0  # type: ignore[attr-defined]


def program_of(completion: str) -> str | None:
    """The last fenced block of Python or of no language, else what ``judged_text`` gives."""
    blocks = re.findall(r"```([^\n`]*)\n(.*?)```", completion, flags=re.DOTALL)
    programs = [text for language, text in blocks if language.strip().lower() in ("", "py", "python", "python3")]
    return programs[-1] if programs else judged_text(completion)


def _passes(program: str, test: Any, limits: Mapping[str, Any]) -> bool:
    if isinstance(test, str):
        mark = secrets.token_hex(16)  # printed by what runs after the program and its test: an early exit does not print it
        source = f"{program}\n\n{test}\n\nprint({mark!r})\n"
        result = run_sandboxed(source, stdin="", **limits)
        return result["status"] == "exit" and result["code"] == 0 and result["output"].rstrip().endswith(mark)
    result = run_sandboxed(program, stdin=str(test.get("stdin") or ""), **limits)
    if result["status"] != "exit" or result["code"] != 0 or result["too_long"]:
        return False
    return lines(result["output"]) == lines(str(test["stdout"]))


def lines(text: str) -> list[str]:
    """What is compared: white space at the end of a line and of the text does not count."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run_sandboxed(program: str, *, stdin: str, timeout_s: float, memory_bytes: int, processes: int) -> dict[str, Any]:
    """What ``sandbox.run`` tells of a program. Raises SandboxRefused where no sandbox can be made."""
    limits = {"timeout_s": timeout_s, "memory_bytes": memory_bytes, "processes": processes}
    job = {"program": program, "stdin": stdin, "parent": os.getpid(), **limits}
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
