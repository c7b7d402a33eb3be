"""Control groups: found, limited, counted and swept, on folders laid out as the kernel lays them out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consilience.sandboxes import cgroups
from consilience.sandboxes.cgroups import Group, Hierarchy


def v2_tree(root: Path, controllers: str) -> Path:
    root.mkdir()
    (root / "cgroup.controllers").write_text(controllers)
    (root / "cgroup.subtree_control").write_text("")
    (root / "consilience-boxes").mkdir()
    (root / "consilience-boxes" / "cgroup.subtree_control").write_text("")
    membership = root.parent / "membership"
    membership.write_text("0::/user.slice\n")
    return membership


def test_version_two_is_used_where_it_has_both_controllers(tmp_path):
    root = tmp_path / "cgroup"
    where = cgroups.find_hierarchy(root, v2_tree(root, "cpu io memory pids\n"))
    base = root / "consilience-boxes"
    assert where == Hierarchy(2, base, base, base)
    for folder in (root, root / "consilience-boxes"):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu +memory +pids\n"


def test_version_two_without_the_controllers_says_so(tmp_path):
    root = tmp_path / "cgroup"
    assert "without the memory and pids" in str(cgroups.find_hierarchy(root, v2_tree(root, "hugetlb\n")))


def test_no_control_groups_at_all_is_a_reason_too(tmp_path):
    assert "No such file" in str(cgroups.find_hierarchy(tmp_path, tmp_path / "absent"))
    (tmp_path / "membership").write_text("0::/\n")
    assert "refuses a group" in str(cgroups.find_hierarchy(tmp_path, tmp_path / "membership"))


def test_version_one_prefers_the_own_group_and_falls_back_to_the_mount(tmp_path):
    for name in ("memory/own", "pids"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "membership").write_text("4:memory:/own\n8:pids:/hidden\n0::/\n")
    where = cgroups.find_hierarchy(tmp_path, tmp_path / "membership")
    assert where == Hierarchy(1, tmp_path / "memory/own", tmp_path / "pids")


def test_a_group_writes_its_limits_and_reads_its_counters(tmp_path):
    group = Group(Hierarchy(2, tmp_path, tmp_path), "box", memory_bytes=1000, processes=5)
    folder = tmp_path / "box"
    assert (folder / "memory.max").read_text() == "1000\n"
    assert (folder / "pids.max").read_text() == "7\n"
    assert group.counters() == {"oom": 0, "pids": 0}
    (folder / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    (folder / "pids.events").write_text("max 7\n")
    assert group.counters() == {"oom": 2, "pids": 7}
    assert group.folders == [folder]


def test_a_box_has_one_processor_where_there_is_such_a_controller(tmp_path):
    Group(Hierarchy(2, tmp_path, tmp_path, tmp_path), "box", memory_bytes=1000, processes=5)
    assert (tmp_path / "box/cpu.max").read_text() == "100000 100000\n"
    for name in "mpc":
        (tmp_path / name).mkdir()
    where = Hierarchy(1, tmp_path / "m", tmp_path / "p", tmp_path / "c")
    group = Group(where, "box", memory_bytes=1000, processes=5)
    assert (tmp_path / "c/box/cpu.cfs_quota_us").read_text() == "100000\n"
    assert group.folders == [tmp_path / name / "box" for name in "mpc"]
    files = sorted(file.name for file in (tmp_path / "c/box").iterdir())
    assert files == ["cpu.cfs_period_us", "cpu.cfs_quota_us"]


def test_version_one_without_a_quota_of_processors_does_without(tmp_path):
    for name in ("memory", "pids", "cpu"):
        (tmp_path / name).mkdir()
    (tmp_path / "membership").write_text("4:memory:/\n8:pids:/\n1:cpu:/\n")
    (tmp_path / "cpu").rmdir()
    where = cgroups.find_hierarchy(tmp_path, tmp_path / "membership")
    assert where == Hierarchy(1, tmp_path / "memory", tmp_path / "pids")


def test_version_one_limits_memory_and_swap_together(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "p").mkdir()
    group = Group(Hierarchy(1, tmp_path / "m", tmp_path / "p"), "box", memory_bytes=1000, processes=5)
    assert (tmp_path / "m/box/memory.limit_in_bytes").read_text() == "1000\n"
    (tmp_path / "m/box/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    assert group.counters()["oom"] == 4


def test_a_refused_group_leaves_nothing(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(OSError):
        Group(Hierarchy(1, tmp_path / "m", tmp_path / "absent"), "box", memory_bytes=1, processes=1)
    assert list((tmp_path / "m").iterdir()) == []


def test_the_sweep_removes_groups_of_the_dead_only(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [
        f"consilience-{dead.pid}-123-box",
        f"consilience-{os.getpid()}-1-box",
        cgroups.owner_prefix() + "box",
    ]
    for name in (*names, "somebody-else"):
        (tmp_path / name).mkdir()
    assert cgroups.sweep(Hierarchy(2, tmp_path, tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[2], "somebody-else"])
