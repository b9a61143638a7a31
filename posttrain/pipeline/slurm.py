"""Each stage as a Slurm job that starts after those that it needs."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.pipeline.run import Pipeline
from posttrain.pipeline.stages import Stage


def submit(
    pipeline: Pipeline, stages: Sequence[Stage], *, run: Sequence[str], options: Sequence[str]
) -> dict[str, str]:
    """{stage: job id}. ``run``: the command that runs a stage when its name is appended;
    ``options``: of sbatch, for all; a stage's own ``slurm:`` goes before them. Raises ValueError
    with what sbatch says."""
    jobs: dict[str, str] = {}
    pipeline.records.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        script = pipeline.records / f"{stage.name}.sbatch"
        script.write_text(job_script(stage, run, log=pipeline.log(stage)), encoding="utf-8")
        before = [jobs[name] for name in stage.needs if name in jobs]
        waits = [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"]
        command = ["sbatch", "--parsable", *options, *(waits if before else []), str(script)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError as error:
            raise ValueError("--executor slurm needs sbatch, which is not on the PATH.") from error
        except subprocess.CalledProcessError as error:
            submitted = f"; submitted before it: {jobs}" if jobs else ""
            message = f"sbatch refused stage {stage.name}: {error.stderr.strip()}{submitted}"
            raise ValueError(message) from error
        jobs[stage.name] = done.stdout.strip().partition(";")[0]
    return jobs


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
