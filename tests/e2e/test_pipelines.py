"""The shipped pipelines from an empty folder to their last stage, in the size `tiny`: also when they
are killed again and again."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from posttrain.cli.main import build_parser
from posttrain.cli.pipeline import check
from posttrain.cli.train import TRAINERS
from posttrain.pipeline.run import Pipeline
from posttrain.pipeline.stages import read_stages
from tests.e2e.launching import REPO, Run, environment, start_warm

NAMES = ("rlhf", "r1", "k15")
KILLS = 10


class Killed(Exception):
    """In place of the end of this process."""


class Warm:
    """Runs a stage's command without the imports; ``kills`` of them are ended with SIGKILL at random
    moments."""

    def __init__(self, *, kills: int = 0, seed: int = 0) -> None:
        self.kills, self._random = kills, random.Random(seed)

    def __call__(self, command, log: Path, mark: str, tell) -> int:
        run = self._start(command, mark)
        deadline = time.monotonic() + self._random.uniform(0.1, 3.0)
        while run.poll() is None:
            if self.kills and time.monotonic() > deadline:
                run.kill()
                self.kills -= 1
                raise Killed
            time.sleep(0.02)
        done = run.wait(1)
        log.write_text(f"{done.stdout}\n{done.stderr}")
        return done.returncode

    @staticmethod
    def _start(command, mark: str) -> Run:
        env = environment(POSTTRAIN_STAGE=mark)
        if command[0] == "python":
            return Run(command[1:], [env])
        if command[1] in TRAINERS:
            parts = command[1:]
            at = parts.index("--launch") if "--launch" in parts else len(parts)
            launch = f"{(parts[at + 1 : at + 2] or ['cpu'])[0]}.yaml"
            return start_warm(launch, *parts[:at], *parts[at + 2 :])
        return Run(["-m", "posttrain.cli.main", *command[1:]], [env])


def pipeline(name: str, root: Path, execute=None, size: str = "tiny", **variables) -> Pipeline:
    path = REPO / "recipes/pipelines" / f"{name}.yaml"
    stages = read_stages(path, root=root, size=size, variables=variables)
    return Pipeline(stages, root=root, name=name, execute=execute)


def models(p: Pipeline) -> dict[str, bytes]:
    found = {}
    for stage in p.stages:
        if "model" in stage.outputs and stage.command != "python":
            (file,) = stage.outputs["model"].glob("*.safetensors")
            found[stage.name] = file.read_bytes()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_from_an_empty_folder_and_killed_ten_times_to_the_same_models(name, tmp_path):
    whole = pipeline(name, tmp_path / "whole", Warm())
    for stage in whole.stages:
        check(stage, whole, build_parser().parse_args)
    whole.run_all(whole.stages, jobs=1)
    described = json.loads((whole.root / "pipeline.json").read_text())["stages"]
    assert {stage["state"] for stage in described} == {"done"}
    scores = [s["figures"] for s in described if s["name"].startswith("eval_")]
    assert scores and all(0 <= s["accuracy"] <= 1 and s["mean_tokens"] > 0 for s in scores)

    execute = Warm(kills=KILLS, seed=sum(map(ord, name)))
    killed = pipeline(name, tmp_path / "killed", execute)
    while any(killed.verdict(s).state != "done" for s in killed.stages):
        try:
            killed.run_all(killed.stages, jobs=1)
        except Killed:
            pass
    assert execute.kills == 0
    assert models(killed) == models(whole)
