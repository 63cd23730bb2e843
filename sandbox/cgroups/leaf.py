"""One cgroup of a sandbox, by file descriptors: made, killed as one, removed.

Must be light: the zygote and the warden use it. Which limits a leaf gets is the recipe's business. Source: the kernel's
cgroup-v2 document.
"""

from __future__ import annotations

import os
import select

# How often and how long (ms) to wait for a killed cgroup to become empty: at most 5 s in all.
ROUNDS = 50
ROUND_MS = 100
OPTIONAL = ("memory.swap.max",)  # not there where the kernel accounts no swap


def make(parent: int, name: str, settings: dict[str, str]) -> int:
    """Make the cgroup `name` below the open cgroup `parent`, write its settings, return an fd of it.

    A cgroup of that name is a dead sandbox's (the ledger gave its place to us) and is removed first.
    """
    remove(parent, name)
    os.mkdir(name, 0o755, dir_fd=parent)
    leaf = open_folder(parent, name)
    try:
        for setting, value in settings.items():
            try:
                for line in value.splitlines():  # io.max takes one disk at a time
                    write(leaf, setting, line)
            except FileNotFoundError:
                if setting not in OPTIONAL:
                    raise
    except OSError:
        os.close(leaf)
        raise
    return leaf


def open_folder(parent: int, name: str) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)


def write(leaf: int, setting: str, value: str) -> None:
    """Without O_CREAT: a missing controller is ENOENT."""
    fd = os.open(setting, os.O_WRONLY | os.O_CLOEXEC, dir_fd=leaf)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def read(leaf: int, name: str) -> str:
    """The content of one file, "" where the controller is not there."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=leaf)
    except FileNotFoundError:
        return ""
    try:
        return os.read(fd, 4096).decode()
    finally:
        os.close(fd)


def counters(leaf: int) -> dict[str, int]:
    """What the kernel has counted: `memory.events oom_kill`, `pids.events max` and the like, by file and name."""
    found = {}
    for name in ("memory.events", "pids.events"):
        for line in read(leaf, name).splitlines():
            key, _, value = line.partition(" ")
            found[f"{name} {key}"] = int(value)
    return found


def kill(leaf: int) -> None:
    """SIGKILL to everything in the cgroup and below it, and wait until it is empty."""
    write(leaf, "cgroup.kill", "1")
    events = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=leaf)
    try:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        for _ in range(ROUNDS):
            if b"populated 1" not in os.pread(events, 4096, 0):
                break
            poll.poll(ROUND_MS)
    finally:
        os.close(events)


def remove(parent: int, name: str) -> None:
    """Kill what still lives in the cgroup `name` and below it, and remove them; a missing one is fine."""
    try:
        leaf = open_folder(parent, name)
    except FileNotFoundError:
        return
    try:
        kill(leaf)
        for child in os.scandir(leaf):
            if child.is_dir(follow_symlinks=False):
                os.rmdir(child.name, dir_fd=leaf)
    finally:
        os.close(leaf)
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return  # somebody else was faster
