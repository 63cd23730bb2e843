"""Processes below a process, from /proc: no look at all the others of a host, whose number is not ours.

Must be light: the zygote and the warden use it. Source: proc_tid_children(5).
"""

from __future__ import annotations

import os


def children(pid: int) -> list[int]:
    """Child processes of all threads of `pid`; none where it has ended."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            found += map(int, read(f"/proc/{pid}/task/{task}/children").split())
        except OSError:
            continue  # this thread has just ended: its children are another one's now
    return found


def tree(pid: int) -> list[int]:
    """`pid` and its descendants; none where it has ended. Daemons that have left it are not among them."""
    found = [pid] if os.path.exists(f"/proc/{pid}") else []
    for each in found:
        found += children(each)
    return found


def read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)
