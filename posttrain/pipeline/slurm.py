"""Each stage as a Slurm job that starts after those that it needs."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.files import whole_file, write_json
from posttrain.pipeline.run import Pipeline
from posttrain.pipeline.stages import Stage

_JOBS = "jobs.json"


def submit(
    pipeline: Pipeline,
    stages: Sequence[Stage],
    *,
    run: Sequence[str],
    options: Sequence[str],
    queued: Mapping[str, str],
) -> dict[str, str]:
    """{stage: job id}. ``run``: the command that runs a stage when its name is appended;
    ``options``: of sbatch, for all; a stage's own ``slurm:`` goes before them; ``queued``: jobs
    that others wait for. Raises ValueError with what sbatch says."""
    jobs: dict[str, str] = {}
    pipeline.records.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        script = pipeline.records / f"{stage.name}.sbatch"
        script.write_text(job_script(stage, run, log=pipeline.log(stage)), encoding="utf-8")
        known = {**queued, **jobs}
        before = [known[name] for name in stage.needs if name in known]
        waits = [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"]
        command = ["sbatch", "--parsable", *options, *(waits if before else []), str(script)]
        submitted = f"; submitted before it: {jobs}" if jobs else ""
        said = _said(command, f"sbatch refused stage {stage.name}", submitted)
        jobs[stage.name] = said.strip().partition(";")[0]
        with whole_file(pipeline.records / _JOBS) as file:
            write_json(file, {**known, **jobs})
    return jobs


def queued_jobs(pipeline: Pipeline) -> dict[str, str]:
    """{stage: id} of the jobs that were submitted before and have not ended."""
    file = pipeline.records / _JOBS
    if not file.exists():
        return {}
    command = ["squeue", "--me", "--noheader", "--format=%i"]
    there = set(_said(command, "squeue does not say what waits").split())
    return {name: job for name, job in json.loads(file.read_bytes()).items() if job in there}


def _said(command: Sequence[str], failed: str, more: str = "") -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        missing = f"--executor slurm needs {command[0]}, which is not on the PATH."
        raise ValueError(missing) from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{failed}: {error.stderr.strip()}{more}") from error


def job_script(stage: Stage, run: Sequence[str], *, log: Path) -> str:
    """The batch script: sbatch's options as comments, then the command. Slurm puts a job whose node
    failed into the queue again; the stage goes on."""
    options: Mapping[str, object] = {
        "job-name": stage.name,
        "output": log.with_suffix(".slurm.log"),
        "open-mode": "append",
        "requeue": True,
        **stage.slurm,
    }
    given = {k: v for k, v in options.items() if v is not None and v is not False}
    lines = [
        f"#SBATCH --{k}" if v is True else f"#SBATCH --{k}={shlex.quote(str(v))}"
        for k, v in given.items()
    ]
    return "\n".join(["#!/bin/bash", *lines, "", shlex.join([*run, stage.name]), ""])
