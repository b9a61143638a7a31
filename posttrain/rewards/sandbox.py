"""Runs one model-written Python program where it can do no harm, as a program: ``python -I sandbox.py`` < job > result.

The program gets namespaces of its own (network: none; processes, mounts, IPC), a file system that holds the interpreter and an
empty folder only, limits on CPU time, memory, files and processes, and a wall-clock limit after which everything it started is
killed. Linux; where namespaces are not permitted nothing is run, and the result says so. No other code of this package is
imported here, so that the file works inside of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_NOBODY = 65534
OUTPUT_BYTES = 1 << 20
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin")


def _call(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(libc: Any, source: str, target: str, flags: int, kind: str | None = None) -> None:
    arguments = (source.encode(), target.encode(), kind.encode() if kind else None, flags, None)
    _call(libc.mount(*arguments), f"mount {target}")


def _unshare(libc: Any) -> None:
    """Namespaces of its own; as an ordinary user inside a user namespace."""
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWIPC | _NEWPID | _NEWNET
    if uid == 0 and libc.unshare(flags) == 0:
        return
    _call(libc.unshare(flags | _NEWUSER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _enter(libc: Any, root: Path) -> None:
    """Only the interpreter, read-only, and an empty folder /box are left of the file system."""
    _mount(libc, "none", "/", _MS_REC | _MS_PRIVATE)
    _mount(libc, "tmpfs", str(root), _MS_NOSUID, "tmpfs")
    for source in dict.fromkeys((*_SYSTEM, sys.base_prefix)):
        if not os.path.isdir(source) or any(source.startswith(s + "/") for s in _SYSTEM):
            continue
        target = root / source.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        _mount(libc, source, str(target), _MS_BIND | _MS_REC)
        _call(libc.mount(None, str(target).encode(), None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID, None), f"{target}")
    for folder in ("box", "tmp", "dev"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder).chmod(0o777)
    os.chroot(root)
    os.chdir("/box")


def _limit(job: dict[str, Any]) -> None:
    seconds, memory = int(job["timeout_s"]) + 1, int(job["memory_bytes"])
    limits = {
        resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: 1 << 24, resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: int(job["processes"]), resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def _program(job: dict[str, Any], libc: Any, stdin: int, output: int) -> None:
    """In the first process of the new namespaces: never returns."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for target, source in ((0, stdin), (1, output), (2, output)):
        os.dup2(source, target)
    os.closerange(3, 256)
    _limit(job)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/box", "LANG": "C.UTF-8", "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"}
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    os.execve(interpreter, [interpreter, "-I", "-c", job["program"]], environment)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """{"status": "exit", "code", "output"}, or {"status": "timeout"}, or {"status": "refused", "problem"}."""
    libc = ctypes.CDLL(None, use_errno=True)
    root = Path(tempfile.mkdtemp(prefix="posttrain-sandbox-"))
    stdin = tempfile.TemporaryFile()  # noqa: SIM115 - its descriptor is handed on
    stdin.write(job["stdin"].encode())
    stdin.seek(0)
    read, write = os.pipe()
    try:
        _unshare(libc)
        child = os.fork()  # is process 1 of the new namespace: when it ends, all that it started is killed
        if child == 0:
            try:
                _enter(libc, root)
                _program(job, libc, stdin.fileno(), write)
            except BaseException as error:  # noqa: BLE001 - told to the parent, then gone
                os.write(write, f"\0refused {error}".encode())
            finally:
                os._exit(127)
        os.close(write)
        return _wait(child, read, float(job["timeout_s"]))
    except OSError as error:
        return {"status": "refused", "problem": str(error)}
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _wait(child: int, read: int, timeout_s: float) -> dict[str, Any]:
    deadline, output, is_open = time.monotonic() + timeout_s, b"", True
    while is_open and time.monotonic() < deadline:
        if select.select([read], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            data = os.read(read, 1 << 16)
            is_open = bool(data)
            output = output if len(output) > OUTPUT_BYTES else output + data
    if is_open:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if output.startswith(b"\0refused"):
        return {"status": "refused", "problem": output[9:].decode(errors="replace")}
    if is_open:
        return {"status": "timeout"}
    too_long = len(output) > OUTPUT_BYTES
    text = output[:OUTPUT_BYTES].decode(errors="replace")
    return {"status": "exit", "code": os.waitstatus_to_exitcode(status), "output": text, "too_long": too_long}


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
