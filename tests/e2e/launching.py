"""Runs commands as a user would: `accelerate launch --config_file ...`, or the same without the
launcher and the imports."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from posttrain.cli.train import TRAINERS

REPO = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """One thread per process (libgomp spins), the repository importable, no hub."""
    keep = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_"))
    }
    path = os.pathsep.join([str(REPO), *filter(None, [keep.get("PYTHONPATH")])])
    return {
        **keep,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def target(script: str) -> list[str]:
    """A script of the repository, or what `posttrain sft` starts for the method sft."""
    is_method = script in TRAINERS
    return ["-m", "posttrain.cli.train", script] if is_method else [str(REPO / script)]


def launch_options(launch: str, script: str, *arguments: str) -> list[str]:
    """What comes after `accelerate launch`. ``launch``: a file of launch/, and options of the
    launcher after it."""
    file, *options = launch.split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--main_process_port", str(port)] if launch != "cpu.yaml" else []
    return [
        "--config_file",
        str(REPO / "launch" / file),
        *options,
        *several,
        *target(script),
        *arguments,
    ]


def command(launch: str, script: str, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launch_options(launch, script, *arguments),
    ]


def run(
    launch: str, script: str, *arguments: str, timeout_s: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(launch, script, *arguments),
        env=environment(**env),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def check(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def posttrain(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    full: Sequence[str] = [sys.executable, "-m", "posttrain.cli.main", *arguments]
    return subprocess.run(
        full, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=timeout_s
    )


class Server:
    """A process of warm.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(REPO / "tests" / "e2e" / "warm.py")],
            env=environment(),
            cwd=REPO,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(self._process.kill)

    def ask(self, request: dict[str, Any]) -> int | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


SERVERS: list[Server] = []
STARTED = itertools.count()


class Run:
    """Processes of a run that do not go through a launcher and have their imports already: a fork
    of a warm process each.

    Two such processes take turns: ranks, and a run and its continuation, differ in the hashes of
    strings and in addresses.
    """

    def __init__(self, parts: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        while len(SERVERS) < 2:
            SERVERS.append(Server())
        self._command = list(parts)
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = {name: str(Path(self._folder.name) / name) for name in ("stdout", "stderr")}
        for path in self._outputs.values():
            Path(path).touch()
        self._codes: dict[tuple[Server, int], int | None] = {}
        for env in environments:
            server = SERVERS[next(STARTED) % 2]
            pid = server.ask({"command": self._command, "env": env, **self._outputs})
            assert pid
            self._codes[server, pid] = None

    def poll(self) -> int | None:
        """None while a process runs; where one failed, the others are ended, as launchers do."""
        for (server, pid), code in self._codes.items():
            self._codes[server, pid] = server.ask({"poll": pid}) if code is None else code
        if any(self._codes.values()):
            self.kill()
        return None if None in self._codes.values() else max(self._codes.values(), key=abs)  # type: ignore[type-var]

    def kill(self) -> None:
        """SIGKILL to all processes and those that they started."""
        for server, pid in [key for key, code in self._codes.items() if code is None]:
            with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
                for victim in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
                    victim.kill()
            while self._codes[server, pid] is None:
                self._codes[server, pid] = server.ask({"poll": pid})

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        deadline = time.monotonic() + timeout_s
        try:
            while (code := self.poll()) is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(self._command, timeout_s)
                time.sleep(0.01)
            outputs = [Path(path).read_text() for path in self._outputs.values()]
        finally:
            self.kill()
            self._folder.cleanup()
        return subprocess.CompletedProcess(self._command, code, *outputs)


def start_warm(launch: str, script: str, *arguments: str) -> Run:
    """As `accelerate launch` would: with the environment that accelerate makes of the launch
    file."""
    from accelerate.commands import launch as accelerate

    options = launch_options(launch, script, *arguments)
    with mock.patch.dict(os.environ, environment(), clear=True):
        args, defaults, mixed_precision_given = accelerate._validate_launch_command(
            accelerate.launch_command_parser().parse_args(options)
        )
        num_processes = args.num_processes
        if args.use_deepspeed:
            fields = [
                *defaults.deepspeed_config,
                *(["mixed_precision"] if mixed_precision_given else []),
            ]
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
            env = accelerate.prepare_deepspeed_cmd_env(args)[1]
        elif num_processes > 1:
            env = accelerate.prepare_multi_gpu_env(args)
        else:
            env = accelerate.prepare_simple_launcher_cmd_env(args)[1]
    ranks = (
        [{}]
        if num_processes == 1
        else [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(args.main_process_port),
            }
            for rank in range(num_processes)
        ]
    )
    return Run([*target(script), *arguments], [{**env, **rank} for rank in ranks])


def run_warm(
    launch: str, script: str, *arguments: str, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    return start_warm(launch, script, *arguments).wait(timeout_s)


def posttrain_warm(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return Run(["-m", "posttrain.cli.main", *arguments], [environment()]).wait(timeout_s)
