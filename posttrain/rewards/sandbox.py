"""Runs one model-written Python program where it can do no harm, as a program: ``python -I
sandbox.py`` < job > result.

The program gets namespaces of its own (network: none; processes, mounts, IPC), a file system that
holds the interpreter and an empty folder only, limits on CPU time, memory, files and processes, and
a wall-clock limit after which everything it started is killed. Its parent is a process of ours, the
first of its process namespace: all is killed when that one ends, or this program. Linux; where
namespaces are not permitted nothing is run, and the result says so. Imports no other code of this
package.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_MS_RDONLY, _MS_NOSUID, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_USERS = range(61184, 65520)
"""User ids for programs, those of systemd's DynamicUser: processes of one sandbox do not count
towards another's limit."""
OUTPUT_BYTES = 1 << 20
FILES = 4096
"""Most files of a program; together with their folders they hold at most ``memory_bytes``."""
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
_ROOT = Path("/proc")
"""Where the program's file system is mounted, in a mount namespace of its own: a folder that is
there already, not needed any more, so that nothing is left to clean up when this process is
killed."""
_START = """import os, site
site.setquit()
with os.fdopen({fd}, encoding="utf-8", errors="surrogatepass") as file:
    code = compile(file.read(), "<program>", "exec")
del os, site, file
exec(globals().pop("code"))"""
"""The program comes on a descriptor: an argument may have no NUL and at most 128 KiB, and a file
could name an encoding. Without the packages of ``site``, but with its ``exit`` and ``quit``."""


def _call(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str | None, target: str, flags: int, kind: str = "", options: str = "") -> None:
    text = [None if not s else s.encode() for s in (source, target, kind, options)]
    _call(_LIBC.mount(text[0], text[1], text[2], flags, text[3]), f"mount {target}")


def _unshare() -> None:
    """Namespaces of its own; as an ordinary user inside a user namespace."""
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWIPC | _NEWPID | _NEWNET
    if uid == 0 and _LIBC.unshare(flags) == 0:
        return
    _call(_LIBC.unshare(flags | _NEWUSER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _enter(memory_bytes: int) -> None:
    """Only the interpreter, read-only, and an empty folder /box are left of the file system."""
    # out of memory ends this process first; no memory that outlives a process
    settings = {"self/oom_score_adj": "1000", "sys/kernel/shmmni": "0", "sys/kernel/msgmni": "0"}
    for name, value in settings.items():
        with contextlib.suppress(OSError):
            Path("/proc", name).write_text(value)
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    size = f"size={memory_bytes},nr_inodes={FILES},mode=755"
    _mount("tmpfs", str(_ROOT), _MS_NOSUID, "tmpfs", size)
    read_only = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID
    for source in dict.fromkeys((*_SYSTEM, sys.base_prefix)):
        if not os.path.isdir(source) or any(source.startswith(s + "/") for s in _SYSTEM):
            continue
        target = _ROOT / source.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        _mount(source, str(target), _MS_BIND | _MS_REC)
        _mount(None, str(target), read_only)
    for folder in ("box", "tmp", "dev"):
        (_ROOT / folder).mkdir(exist_ok=True)
        (_ROOT / folder).chmod(0o777)
    os.chroot(_ROOT)
    os.chdir("/box")


def _limit(job: dict[str, Any]) -> None:
    seconds, memory = int(job["timeout_s"]) + 1, int(job["memory_bytes"])
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 1 << 24,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: int(job["processes"]),
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]  # of a container, say: only root could raise it
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (least, least))


def _in_memory(text: str) -> int:
    """Descriptor of a file in memory that holds the text."""
    fd = os.memfd_create("text")
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _program(job: dict[str, Any], output: int, errors: int, user: int) -> None:
    """Becomes the program. Every descriptor but 0, 1, 2 and the program's text closes on exec."""
    source, stdin = _in_memory(job["program"]), _in_memory(job["stdin"])
    for target, fd in ((0, stdin), (1, output), (2, errors)):
        os.dup2(fd, target)
    os.set_inheritable(source, True)
    _limit(job)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/box",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",
    }
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    os.execve(interpreter, [interpreter, "-I", "-S", "-c", _START.format(fd=source)], environment)


def _first_process(job: dict[str, Any], output: int, errors: int, report: int, user: int) -> None:
    """Process 1 of the new namespaces: starts the program and tells how it ended. Never returns.

    The report goes through a pipe that the program does not have: a line {"refused": why} or
    {"code": exit code}, or both where the program could not be started.
    """
    message: dict[str, Any]
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        poll = select.poll()
        poll.register(report, 0)
        if poll.poll(0):  # nobody reads: the parent died before the line above
            os._exit(1)
        # a program's kill(0, ...) reaches a whole process group, outside of its namespace too
        os.setsid()
        _enter(int(job["memory_bytes"]))
        program = os.fork()
        if program == 0:
            # comes back only by an exception, told below: no program has run
            _program(job, output, errors, user)
        ended = 0
        while ended != program:  # as process 1 it gets what others leave behind, too
            ended, status = os.wait()
        message = {"code": os.waitstatus_to_exitcode(status)}
    except BaseException as error:  # noqa: BLE001 - told to the parent, then gone
        message = {"refused": str(error)[:500]}
    with contextlib.suppress(OSError):
        os.write(report, json.dumps(message).encode() + b"\n")
    os._exit(0)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """{"status": "exit", "code", "output", "errors", "too_long"}, or {"status": "timeout"}, or
    {"status": "refused", "problem"}.

    ``errors``: its stderr. ``too_long``: it wrote more than OUTPUT_BYTES to one of them and was
    killed then. ``job["parent"]``: process whose death ends this one.
    """
    if not sys.platform.startswith("linux"):
        return {"status": "refused", "problem": f"{sys.platform} has no namespaces"}
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != job["parent"]:
        os._exit(1)
    output, errors, report = os.pipe(), os.pipe(), os.pipe()
    user = _USERS[os.getpid() % len(_USERS)]
    try:
        _unshare()
        child = os.fork()
    except OSError as error:
        return {"status": "refused", "problem": str(error)}
    if child == 0:
        for pipe in (output, errors, report):
            os.close(pipe[0])
        _first_process(job, output[1], errors[1], report[1], user)
    for pipe in (output, errors, report):
        os.close(pipe[1])
    return _wait(child, output[0], errors[0], report[0], float(job["timeout_s"]))


def _wait(child: int, output: int, errors: int, report: int, timeout_s: float) -> dict[str, Any]:
    """Reads until the first process is gone, the time is up, or too much is written; whatever is
    left then is killed."""
    deadline, is_late = time.monotonic() + timeout_s, False
    texts = {output: b"", errors: b"", report: b""}
    waiting = [*texts]
    while report in waiting and not is_late and max(map(len, texts.values())) <= OUTPUT_BYTES:
        for fd in select.select(waiting, [], [], max(deadline - time.monotonic(), 0.0))[0]:
            _read(fd, texts, waiting)
        is_late = report in waiting and time.monotonic() >= deadline
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told: dict[str, Any] = {}
    for line in texts[report].splitlines():
        told |= json.loads(line)
    if "refused" in told:
        return {"status": "refused", "problem": told["refused"]}
    if is_late:
        return {"status": "timeout"}
    for fd in (output, errors):
        while fd in waiting and len(texts[fd]) <= OUTPUT_BYTES:  # nobody is left who writes
            _read(fd, texts, waiting)
    code = told.get("code", -int(signal.SIGKILL))
    written, said = (texts[fd][:OUTPUT_BYTES].decode(errors="replace") for fd in (output, errors))
    too_long = max(map(len, texts.values())) > OUTPUT_BYTES
    return {"status": "exit", "code": code, "output": written, "errors": said, "too_long": too_long}


def _read(fd: int, texts: dict[int, bytes], waiting: list[int]) -> None:
    data = os.read(fd, 1 << 16)
    texts[fd] = (texts[fd] + data)[: OUTPUT_BYTES + 1]
    if not data:
        waiting.remove(fd)


if __name__ == "__main__":
    os.closerange(3, 256)
    json.dump(run(json.load(sys.stdin)), sys.stdout)
