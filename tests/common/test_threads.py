"""Threads and processes on a CPU: who decides, what a container allows, and what the environment says."""

from __future__ import annotations

import os

import pytest

from llava.common import machine, threads
from llava.common.threads import SMALL_MODEL, processes_for, threads_for, wait_passively, wait_policy

GIB = 1 << 30


@pytest.mark.parametrize(
    "parameters, asked, named, expected",
    [
        (SMALL_MODEL, None, None, 1),
        (SMALL_MODEL + 1, None, None, None),
        (None, None, None, None),
        (1, 3, None, 3),
        (1, None, "2", 2),
        (SMALL_MODEL + 1, None, "2,1", 2),
        (1, 4, "2", 4),
        (1, None, "", 1),
        (1, None, "many", 1),  # as OpenMP ignores it
        (1, None, "0", 1),
    ],
)
def test_threads_asked_for_then_named_then_by_size(monkeypatch, parameters, asked, named, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    assert threads_for(parameters, asked) == expected


@pytest.mark.parametrize(
    "parameters, free, expected",
    [
        (0, 100 * GIB, 8),
        (0, 3 * GIB, 3),
        (0, 0, 1),
        (0, None, 8),  # nothing says how much is free
        (GIB // 64, 5 * GIB, 4),  # 16 Mi parameters: 1/16 GiB of weights beside each GiB
        (SMALL_MODEL + 1, 100 * GIB, 1),
        (None, 100 * GIB, 1),
    ],
)
def test_processes_are_as_many_as_cores_and_memory_allow(monkeypatch, parameters, free, expected):
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(threads, "available_memory", lambda: free)
    assert processes_for(parameters) == expected


def test_the_wait_policy_of_the_user_stands(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert wait_policy() == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == wait_policy() == "ACTIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    "limit, expected",
    [("max 100000", 16), ("200000 100000", 2), ("50000 100000", 1), ("9000000 100000", 16), (None, 16)],
)
def test_cores_within_the_quota_of_a_container(monkeypatch, tmp_path, limit, expected):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert machine.cores() == expected


def test_memory_within_the_limit_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = machine.available_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert abs(machine.available_memory() - whole) < GIB, "no limit"
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.available_memory() == 300
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert machine.available_memory() == 450, "cached files can be dropped"
