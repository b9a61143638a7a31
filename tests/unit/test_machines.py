"""What a machine may lack: instructions, a C library, /proc, namespaces, a high limit. Each has a
way around it."""

from __future__ import annotations

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from posttrain.plan import check
from posttrain.rewards import sandbox
from posttrain.rollout import local
from posttrain.rollout.local import SamplingLinear
from posttrain.training import launch

BF16 = torch.bfloat16


@pytest.fixture
def without_blocked_products(monkeypatch):
    """oneDNN on a CPU with neither AVX-512 nor avx_ne_convert: the operator exists and raises."""

    def refuses(*arguments):
        raise RuntimeError(
            "mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw"
        )

    monkeypatch.setattr(local, "_reorder", refuses)
    local.blocked_products_work.cache_clear()
    yield
    monkeypatch.undo()
    local.blocked_products_work.cache_clear()


def test_sampling_in_bfloat16_needs_no_operator_of_onednn(without_blocked_products):
    """The plain path gives the same numbers as the blocked one: an exact product, rounded once."""
    assert not local.blocked_products_work()
    torch.manual_seed(0)
    base, x = nn.Linear(33, 100), torch.randn(70, 33)
    layer = SamplingLinear(base, BF16)
    layer.take(base.weight)
    exact = x.to(BF16).double() @ base.weight.to(BF16).double().T + base.bias.to(BF16).double()
    assert bool(((layer(x).double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all())


@pytest.mark.skipif(not local.blocked_products_work(), reason="this CPU has only the plain path")
def test_both_paths_give_the_same_numbers(request):
    torch.manual_seed(0)
    base, x = nn.Linear(64, 48), torch.randn(9, 64)
    layer = SamplingLinear(base, BF16)
    layer.take(base.weight)
    blocked = layer(x)
    request.getfixturevalue("without_blocked_products")
    plain = SamplingLinear(base, BF16)
    plain.take(base.weight)
    assert not plain._blocked and bool(
        ((plain(x) - blocked).abs() <= 2**-7 * blocked.abs() + 1e-3).all()
    )


def test_another_result_of_the_operator_is_not_trusted(monkeypatch):
    monkeypatch.setattr(local, "_reorder", lambda weight: weight)
    monkeypatch.setattr(
        local, "_blocked_linear", lambda x, weight, bias: torch.zeros(2, 64, dtype=BF16)
    )
    local.blocked_products_work.cache_clear()
    try:
        assert not local.blocked_products_work()
    finally:
        local.blocked_products_work.cache_clear()


@pytest.mark.parametrize("lacks", ["another C library", "one without mallopt"])
def test_without_glibc_nothing_is_told_to_its_heap(lacks, monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        if lacks == "another C library":
            raise OSError("libc.so.6: cannot open shared object file")
        return object()

    monkeypatch.setattr(launch, "ctypes", SimpleNamespace(CDLL=load))
    launch.keep_freed_memory()
    assert asked == ["libc.so.6"]


def test_holes_between_blocks_go_back_once_they_have_grown():
    """1 GB of blocks of 4 MiB is freed but for small ones between them."""
    script = """
import psutil, torch
from posttrain.training.launch import FreedMemory, keep_freed_memory
keep_freed_memory()
freed = FreedMemory()
for _ in range(3):
    freed.check()
rss = lambda: psutil.Process().memory_info().rss
before, large, small = rss(), [], []
for _ in range(250):
    large.append(torch.ones(2**20))
    small.append(torch.ones(2**10))
del large
held = rss()
assert held - before > 9e8, (before, held)
freed.check()
assert rss() - before < 1e8, (before, held, rss())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_limit_of_a_cgroup_of_version_1_counts(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("123456789\n")
    assert check.available_bytes(cgroup=tmp_path) == 123456789
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert check.available_bytes(cgroup=tmp_path) > 123456789


def test_a_lower_limit_of_the_container_is_kept():
    """Workers and programs are limited to what is allowed; asking for more would end every worker
    before its first answer."""
    script = """
import resource, sys
from unittest import mock
limit = 3 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from posttrain.rewards import run, sandbox
real = resource.setrlimit

def as_an_ordinary_user(name, pair):  # root may raise a hard limit
    if pair[1] > resource.getrlimit(name)[1] >= 0:
        raise ValueError("not allowed to raise maximum limit")
    real(name, pair)

with mock.patch.object(resource, "setrlimit", as_an_ordinary_user):
    run.limit_this_process()
    sandbox._limit({"timeout_s": 5, "memory_bytes": 8 * 2**30, "processes": 4})
print(resource.getrlimit(resource.RLIMIT_AS)[0] == limit, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "40"], done.stderr


def test_a_system_without_namespaces_refuses_and_gives_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert sandbox.run({"parent": 1}) == {
        "status": "refused",
        "problem": "darwin has no namespaces",
    }


def test_a_worker_without_a_memory_limit_still_works(monkeypatch):
    """macOS refuses RLIMIT_AS and has no prctl."""
    from posttrain.rewards import run

    tried = []

    def refuses(name, pair):
        tried.append(name)
        if name == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(run.sys, "platform", "darwin")
    monkeypatch.setattr(run.resource, "setrlimit", refuses)
    run.limit_this_process()
    assert tried == [resource.RLIMIT_AS, resource.RLIMIT_CORE]
