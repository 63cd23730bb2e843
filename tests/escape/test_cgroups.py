"""Attacks on control groups: to leave one's own, to lift its limits, to end the neighbours'."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from escape.kit import carry_out, matrix
from sandbox.cgroups import leaf, place
from sandbox.config import IsolationLevel
from sandbox.host import facts
from sandbox.selftest.attacks import MINIMAL, NAMESPACED, SECONDS, Attack, Scene, Where, attack, first_escape
from sandbox.selftest.outside import Outside

LEAF = "4094"  # a place of the ledger that no sandbox of a test gets


@contextmanager
def neighbour(where: Where) -> Iterator[Scene]:
    """A cgroup of the caller's with a process in it. Harm: the process has died."""
    folder = Path(facts().cgroup_folder or "/nowhere", place.FOLDER)
    with subprocess.Popen(["sleep", str(6 * SECONDS)]) as victim:
        if facts().cgroup_kind not in ("root", "delegated"):
            yield Scene({"leaf": str(folder / LEAF)})
        else:
            parent = place.prepare(str(folder), [])
            own = leaf.make(parent, LEAF, {})
            leaf.write(own, "cgroup.procs", str(victim.pid))
            yield Scene({"leaf": str(folder / LEAF)}, lambda: "" if victim.poll() is None else "the neighbour was killed")
            leaf.remove(parent, LEAF)
            os.close(own)
            os.close(parent)
        victim.kill()


@attack("cgroup leaf", NAMESPACED, scene=neighbour, name="end_a_neighbour_by_its_cgroup")
@attack("writes only to the workspace", (MINIMAL,), scene=neighbour, name="end_a_neighbour_by_its_cgroup_on_the_host")
def end_a_neighbour(leaf: str) -> str:
    """By cgroup.kill, cgroup.freeze, or by taking its place away."""
    import os

    def write(name: str, text: str) -> None:
        fd = os.open(f"{leaf}/{name}", os.O_WRONLY)
        os.write(fd, text.encode())

    return first_escape(
        {
            "freeze": lambda: write("cgroup.freeze", "0"),
            "kill": lambda: write("cgroup.kill", "1"),
            "make": lambda: os.mkdir(f"{leaf}/inner"),
        }
    )


@attack("cgroup leaf", NAMESPACED, scene=neighbour, name="leave_the_cgroup")
@attack("writes only to the workspace", (MINIMAL,), scene=neighbour, name="leave_the_cgroup_on_the_host")
def leave_the_cgroup(leaf: str) -> str:
    """Into another one, which has no limits; and by lifting those of one's own, wherever it can be found."""
    import os

    def write(path: str, text: str) -> None:
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, text.encode())

    def own() -> str:
        with open("/proc/self/cgroup") as file:
            path = next(line for line in file if line.startswith("0::")).strip()[3:]
        trees = [tree for tree in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup") if os.path.exists(tree + path)]
        return (trees or ["/sys/fs/cgroup"])[0] + path

    return first_escape(
        {
            "move": lambda: write(f"{leaf}/cgroup.procs", str(os.getpid())),
            "move to the top": lambda: write(f"{leaf}/../../cgroup.procs", str(os.getpid())),
            "memory.max": lambda: write(own() + "/memory.max", "max"),
            "pids.max": lambda: write(own() + "/pids.max", "max"),
            "cpu.max": lambda: write(own() + "/cpu.max", "max"),
            "thaw": lambda: write(own() + "/cgroup.freeze", "0"),
        }
    )


@matrix(__name__)
def test_attack(one: Attack, level: IsolationLevel, outside: Outside, tmp_path: Path) -> None:
    carry_out(one, level, outside, tmp_path)


@pytest.mark.skipif(facts().cgroup_kind not in ("root", "delegated"), reason="a scope has nothing beside its own leaves")
def test_a_leaf_is_not_the_plugins(tmp_path: Path) -> None:
    """Whoever owns a cgroup's files can lift its limits: they stay root's, or the caller's."""
    parent = place.prepare(os.path.join(facts().cgroup_folder, place.FOLDER), [])
    own = leaf.make(parent, LEAF, {})
    try:
        for name in os.listdir(own):
            assert os.stat(name, dir_fd=own).st_uid == os.getuid()
    finally:
        os.close(own)
        leaf.remove(parent, LEAF)
        os.close(parent)
