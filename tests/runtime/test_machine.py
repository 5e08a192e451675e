"""Tests of what is known about the machine: memory, its limits, and several GPUs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import psutil
import pytest

from gptj8.runtime import machine
from gptj8.runtime.errors import UserError

GIB = 1 << 30


def write_cgroup(folder, limit, usage, cache=0, version=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        2: ("memory.max", "memory.current"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    }
    for name, value in zip(names[version], (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{key} {cache}\nother 7\n")


@pytest.fixture
def headroom(tmp_path):
    def read(membership):
        (tmp_path / "membership").write_text(membership)
        folders = machine._cgroups(tmp_path / "membership", tmp_path / "sys")
        return [left for folder in folders if (left := machine._headroom(folder)) is not None]

    return read


def test_the_limit_of_an_ancestor_counts(tmp_path, headroom):
    """Slurm limits the job, and the process is in a step below it."""
    root = tmp_path / "sys"
    write_cgroup(root / "slurm" / "job_7", 4 * GIB, GIB)
    write_cgroup(root / "slurm" / "job_7" / "step_0", "max", GIB)
    assert headroom("0::/slurm/job_7/step_0\n") == [3 * GIB]


def test_reclaimable_cache_is_available(tmp_path, headroom):
    write_cgroup(tmp_path / "sys" / "user.slice", 4 * GIB, 4 * GIB, cache=GIB)
    assert headroom("0::/user.slice\n") == [GIB]


def test_version_1_has_a_hierarchy_of_its_own_for_memory(tmp_path, headroom):
    folder = tmp_path / "sys" / "memory" / "job"
    write_cgroup(folder, 2 * GIB, GIB, cache=1000, version=1)
    (tmp_path / "sys" / "cpu").mkdir()
    assert headroom("5:cpu,cpuacct:/elsewhere\n4:memory:/job\n0::/\n") == [GIB + 1000]


def test_in_a_container_the_root_is_used_if_the_path_is_the_hosts(tmp_path, headroom):
    write_cgroup(tmp_path / "sys", 3 * GIB, GIB)
    assert headroom("0::/docker/0123\n") == [2 * GIB]


def test_no_limit_and_no_cgroups(tmp_path, headroom):
    write_cgroup(tmp_path / "sys", "max", GIB)
    assert headroom("0::/\n") == []
    assert list(machine._cgroups(tmp_path / "missing", tmp_path / "nowhere")) == []


def test_memory_is_that_of_psutil(monkeypatch):
    me = psutil.Process().memory_info()
    assert machine.resident_bytes() == pytest.approx(me.rss, rel=0.1)
    assert 0 < machine.own_bytes() < machine.resident_bytes()
    assert machine.available_bytes("cpu") > machine.resident_bytes()
    assert machine.peak_memory_gib() * GIB >= me.rss * 0.9


def test_a_system_that_reports_nothing(monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    monkeypatch.setattr(psutil.Process, "memory_info", fail)
    assert machine.resident_bytes() == machine.own_bytes() == 0
    assert machine.memory_gib() > 0  # the peak
    with pytest.raises(UserError, match="does not report free memory"):
        machine.available_bytes("cpu")


def test_memory_is_that_of_all_gpus(monkeypatch):
    """A model that is too large for one GPU is spread over all of them."""
    resets = []
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 3,
        memory_allocated=lambda device: (device + 1) * GIB,
        max_memory_allocated=lambda device: (device + 2) * GIB,
        reset_peak_memory_stats=resets.append,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert machine.memory_gib() == 6
    assert machine.peak_memory_gib() == 9
    machine.reset_peak_memory()
    assert resets == [0, 1, 2]
