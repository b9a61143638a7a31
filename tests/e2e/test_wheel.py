"""The wheel by itself: installed where the repository is not, it trains with shipped settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.e2e.launching import REPO, environment
from tests.e2e.test_commands import ROWS, settings
from tests.tiny import model_folder

MORE = ["--data.prompt_column", "prompt", "--optimizer.warmup_steps", "0"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel alone; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(REPO)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, str(wheel)], check=True)
    return folder, wheel, python


def test_the_wheel_has_the_recipes_and_no_tests(installed):
    names = zipfile.ZipFile(installed[1]).namelist()
    for name in ("recipes/rl.py", "recipes/configs/sft_smollm2.yaml", "launch/cpu.yaml"):
        assert f"posttrain/{name}" in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "recipes", "shared"))]


@pytest.mark.parametrize("method, config", [("sft", "sft_smollm2"), ("rl", "grpo_smollm2")])
def test_it_trains_from_shipped_settings(installed, method, config):
    folder, _, python = installed
    model_folder(folder / "model")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    here = sysconfig.get_paths()["purelib"]  # without what its .pth files add: the repository
    env = {**environment(), "PYTHONPATH": here}
    command = [
        *[str(python), "-m", "posttrain.cli.main", method, "--config", config],
        *settings(folder, folder / "runs", method),
        *["--data.eval", "[]", *(MORE if method == "rl" else [])],
    ]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (folder / "runs" / method / "final" / "model.safetensors").exists()
    assert str(REPO) not in done.stdout.split("accelerate launch", 1)[1].splitlines()[0]
    assert os.fspath(folder) in done.stdout
