"""What a reward may cost: time and memory limits, processes that die, rows that cannot be
scored."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from posttrain.rewards import CompletionText, compose, reward, run
from posttrain.rewards.code import run_sandboxed
from posttrain.rewards.compose import RewardError, RewardsConfig
from posttrain.rewards.run import WorkerPool
from tests.unit.completion_texts import texts

HERE = "tests.reward_functions"
MB = 10**6


def sandboxed(program: str, *, timeout_s: float = 10.0, memory_bytes: int = 500 * MB) -> dict:
    return run_sandboxed(
        textwrap.dedent(program),
        stdin="",
        timeout_s=timeout_s,
        memory_bytes=memory_bytes,
        processes=16,
    )


def test_the_sandbox_hides_the_host(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    result = sandboxed(
        f"""
        import os
        print(os.path.exists({str(secret)!r}), os.path.exists('/etc/passwd'), os.path.exists('/proc/1'), sorted(os.environ))
        print(os.getcwd(), os.listdir('/box'), os.getuid() != 0)
        for fd in range(3, 64):
            try:
                print(os.fstat(fd))
            except OSError:
                pass
        open('/box/file', 'w').write('x')
        """
    )
    wanted = "False False False ['HOME', 'LANG', 'LD_LIBRARY_PATH', 'PATH']\n/box [] True\n"
    assert result == {
        "status": "exit",
        "code": 0,
        "output": wanted,
        "errors": "",
        "too_long": False,
    }


def test_files_of_the_sandbox_are_limited_in_size_and_number():
    fill = """
    written = 0
    try:
        for i in range(100):
            with open(f'f{i}', 'wb', buffering=0) as file:
                written += file.write(bytes(10**7))
    except OSError as error:
        print(written // 10**6, error.errno)
    """
    written, number = sandboxed(fill, memory_bytes=150 * MB)["output"].split()
    assert 100 <= int(written) <= 150 and number == "28"  # no space left
    many = "import os\nfor i in range(10_000):\n    os.close(os.open(f'f{i}', os.O_CREAT))"
    assert "No space left" in sandboxed(many)["errors"]


def test_no_memory_outlives_its_process():
    before = Path("/proc/sys/kernel/shmmni").read_text()
    result = sandboxed(
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nprint(c.shmget(0, 4096, 0o1777), ctypes.get_errno())"
    )
    assert result["output"] == "-1 28\n"
    assert Path("/proc/sys/kernel/shmmni").read_text() == before


def test_a_program_that_closes_its_output_is_killed_in_time():
    began = time.monotonic()
    result = sandboxed("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)", timeout_s=1.0)
    assert result == {"status": "timeout"} and time.monotonic() - began < 10


def test_what_a_program_leaves_behind_ends_with_it():
    began = time.monotonic()
    result = sandboxed(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint('done')"
    )
    assert result["code"] == 0 and result["output"] == "done\n" and time.monotonic() - began < 9


def test_only_the_sandbox_itself_can_refuse():
    forged = """
    import os
    os.write(1, b'\\0refused by myself')
    for fd in range(3, 64):
        try:
            os.write(fd, b'{"refused": "by myself"}\\n')
        except OSError:
            pass
    """
    assert sandboxed(forged)["status"] == "exit"
    assert sandboxed("print('\\0refused by myself', end='')")["output"] == "\0refused by myself"


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("x = 'a\0b'", 1),
        ("x = '\ud800'", 1),
        ("\ud800", 1),
        ("print(7)\n" + "#" * 300_000, 0),
        ("# coding: utf-7\nprint(7)", 0),
    ],
    ids=["nul", "surrogate", "bare surrogate", "long", "coding"],
)
def test_any_text_can_be_a_program(program, code):
    result = sandboxed(program)
    assert (
        result["status"] == "exit"
        and result["code"] == code
        and (code or result["output"] == "7\n")
    )


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_killed_worker_leaves_no_sandbox_and_no_program():
    program = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(1000)"  # asks to outlive its parent
    call = f"run_sandboxed({program!r}, stdin='', timeout_s=1000, memory_bytes=10**9, processes=16)"
    code = f"from posttrain.rewards.code import run_sandboxed; {call}"
    worker = subprocess.Popen([sys.executable, "-c", code])
    assert until(lambda: len(descendants(worker.pid)) == 3), (
        "the sandbox, its first process, the program"
    )
    started = descendants(worker.pid)
    time.sleep(0.5)
    assert all(map(is_alive, started))
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert until(lambda: not any(map(is_alive, started)))


def test_many_slow_tests_share_the_time_of_a_call(rewards_of):
    config = RewardsConfig(
        functions={"code_tests": 1.0},
        timeout_s=5.0,
        options={"code_tests": {"partial": True, "timeout_s": 3.0}},
    )
    slow = "```python\nimport time\ntime.sleep(0.9)\nprint(42)\n```"
    ((scored,),) = rewards_of(config).score(
        [({"tests": [{"stdin": "", "stdout": "42"}] * 10}, texts(slow))]
    )
    assert 0 < scored.reward < 0.6 and not scored.problems


def test_one_slow_completion_does_not_take_the_others_along(rewards_of):
    rewards = rewards_of(
        RewardsConfig(functions={f"{HERE}.sleeps_for_bad_ones": 1.0}, timeout_s=1.0, workers=2)
    )
    (row,) = rewards.score([({}, texts("a", "bad", "b", "c", "d"))])
    assert [s.reward for s in row] == [1.0, None, 1.0, 1.0, 1.0]


def test_a_crash_is_tried_again_in_a_fresh_worker(rewards_of, tmp_path):
    rewards = rewards_of(
        RewardsConfig(
            functions={f"{HERE}.dies_once": 1.0, f"{HERE}.dies_and_is_wrong": 1.0}, workers=1
        )
    )
    ((scored,),) = rewards.score([({"mark": str(tmp_path / "mark")}, texts("a"))])
    assert scored.parts == {f"{HERE}.dies_once": 1.0, f"{HERE}.dies_and_is_wrong": 0.0}
    assert [p.partition(": ")[0] for p in scored.problems] == [f"{HERE}.dies_and_is_wrong"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [("import os; os._exit(1)", "died"), ("import time; time.sleep(60)", "no worker")],
)
def test_a_worker_that_cannot_start_is_no_wrong_answer(source, problem, tmp_path, monkeypatch):
    (tmp_path / "does_not_load.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run, "START_SECONDS", 2.0)
    workers = WorkerPool(size=1, timeout_s=5.0)
    (outcome,) = workers.run("does_not_load.f", [({}, CompletionText(""))], {})
    workers.close()
    assert problem in outcome.problem and outcome.value is None and not outcome.exhausted


def test_what_a_function_imports_does_not_count(rewards_of, tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(2)")
    (tmp_path / "reward_of_slow.py").write_text(
        "from posttrain import reward\n@reward(imports=('slow_to_import',))\ndef f(completion, sample):\n    import slow_to_import\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = rewards_of(RewardsConfig(functions={"reward_of_slow.f": 1.0}, timeout_s=1.0))
    assert rewards.score([({}, texts("a"))])[0][0].reward == 1.0


@pytest.mark.parametrize("kind", [{"grouped": True}, {"batched": True}, {}])
def test_functions_of_this_process_have_a_time_limit(kind, rewards_of, monkeypatch):
    monkeypatch.setattr(compose, "START_SECONDS", 0.1)

    @reward(**kind, on_timeout=-1.0)
    def function(*arguments):
        time.sleep(60)

    rewards = rewards_of(RewardsConfig(timeout_s=0.5), given={"hangs": (function, 1.0)})
    began = time.monotonic()
    (row,) = rewards.score([({}, texts("a", "b"))])
    assert [s.reward for s in row] == [-1.0, -1.0] and "longer than" in row[0].problems[0]
    assert time.monotonic() - began < 10


def test_calls_in_threads_wait_for_no_hanging_one(rewards_of):
    config = RewardsConfig(timeout_s=0.5, concurrency=2, max_unscored=1.0)
    rewards = rewards_of(
        config, given={"f": (lambda c, s: time.sleep(60) if c == "bad" else 1.0, 1.0)}
    )
    (row,) = rewards.score([({}, texts("bad", "bad", "bad", "a", "b", "c"))])
    assert [s.reward for s in row] == [None] * 3 + [1.0] * 3


def test_a_hanging_call_does_not_keep_the_interpreter(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import asyncio, time
        from posttrain.rewards import CompletionText
        from posttrain.rewards.compose import Rewards, RewardsConfig
        async def in_a_thread(c, s):
            await asyncio.to_thread(time.sleep, 100)
        given = {"hangs": (lambda c, s: time.sleep(100), 1.0), "async": (in_a_thread, 1.0)}
        rewards = Rewards(RewardsConfig(timeout_s=0.3), given=given)
        print(rewards.score([({}, [CompletionText("a")])])[0][0].reward)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "None\n", done.stderr


def test_an_async_call_has_its_time_from_its_start(rewards_of):
    running, most = [0], [0]

    def blocking():
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.4)
        running[0] -= 1
        return 1.0

    async def in_a_thread(completion, sample):
        return await asyncio.to_thread(blocking)

    rewards = rewards_of(
        RewardsConfig(timeout_s=2.0, concurrency=10), given={"f": (in_a_thread, 1.0)}
    )
    began = time.monotonic()
    (row,) = rewards.score([({}, texts(*"abcde" * 20))])
    took = time.monotonic() - began
    assert [s.reward for s in row] == [1.0] * 100
    assert (
        most[0] <= 10 and 4.0 <= took < 8.0
    )  # in tens: neither all at once nor as many as the machine has cores


def test_an_async_call_that_blocks_the_loop_is_given_up(rewards_of):
    async def blocks(completion, sample):
        time.sleep(60)

    rewards = rewards_of(RewardsConfig(timeout_s=0.3), given={"f": (blocks, 1.0)})
    (row,) = rewards.score([({}, texts("a", "b"))])
    assert [s.reward for s in row] == [None, None] and "longer than" in row[1].problems[0]


def test_threads_keep_the_cuda_device_of_the_caller(rewards_of, monkeypatch):
    import torch

    used = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert (
        rewards_of(RewardsConfig(), given={"f": (lambda c, s: 1.0, 1.0)})
        .score([({}, texts("a"))])[0][0]
        .reward
        == 1.0
    )
    assert used == [3]


def test_max_unscored_is_a_share_of_an_iteration(rewards_of):
    given = {"f": (lambda c, s: s["value"], 1.0)}
    good, bad = (
        ({"value": 1.0}, texts("a", "b")),
        ({"value": None, "_where": "rows:1"}, texts("a", "b")),
    )
    rewards = rewards_of(RewardsConfig(max_unscored=0.39), given=given)
    rewards.score([bad], iteration=0)  # one row that cannot be read, in a small round
    rewards.score([bad, good, good, good], iteration=0)
    rewards.score([bad, good, good], iteration=0)
    assert rewards.score([good], iteration=0)[0][0].reward == 1.0
    with pytest.raises(
        RewardError, match=r"8 of 20 completions could not be scored .*rows:1: a reward gave None"
    ):
        rewards.score([bad], iteration=0)
    rewards = rewards_of(RewardsConfig(max_unscored=0.4), given=given)
    rewards.score([good] * 100, iteration=0)
    with pytest.raises(RewardError, match="8 of 16"):  # the next iteration counts alone
        rewards.score([bad] * 4 + [good] * 4, iteration=1)
    rewards = rewards_of(RewardsConfig(max_unscored=0.4), given=given)
    with pytest.raises(RewardError, match="16 of 16"):  # small iterations are counted together
        for iteration in range(8):
            rewards.score([bad], iteration=iteration)
