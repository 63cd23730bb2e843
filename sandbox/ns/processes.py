"""Processes below a process, and what the kernel says that holds one, from /proc: no look at all the others of a host, whose
number is not ours.

Must be light: the zygote and the warden use it. Source: proc_tid_children(5), proc_pid_stat(5).
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

STANDING = ("T", "t", "Z", "X")  # states of a thread that is stopped, traced, or has ended
STATUS_LINES = (
    *("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "NSpid"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
)


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


def is_stopped(pid: int) -> bool:
    """Whether nothing of it runs: each of its threads, which may live longer than the first, was stopped or has ended."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return True
    return all(_state(f"/proc/{pid}/task/{thread}/stat") in STANDING for thread in threads)


def _state(path: str) -> str:
    try:
        return read(path).rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def read(path: str) -> str:
    """The content of a file of /proc, of which the kernel gives about a page at a time. A process's name there may be no text,
    and have whatever else ends a line than the line feed, which the kernel writes as \\n: split by that alone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 65536):
            pieces.append(piece)
        return b"".join(pieces).decode(errors="replace")
    finally:
        os.close(fd)


def read_back(pid: int, init: int, namespaces: Mapping[str, str]) -> dict[str, str]:
    """What the kernel says about a worker (proc_pid_status(5), proc_pid_ns(5), proc_pid_limits(5)).

    `namespaces` are links of those in which it must not be, by name. Raises OSError; ProcessLookupError where `pid` is no child
    of `init` any more: the worker has ended, its number may be another's.
    """
    fields = {}
    for line in read(f"/proc/{pid}/status").split("\n"):
        name, _, value = line.partition(":")
        if name in STATUS_LINES:
            fields[name] = value.strip()
        elif name == "PPid" and int(value) != init:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f"/proc/{pid}")
    for name, others in namespaces.items():
        own = os.readlink(f"/proc/{pid}/ns/{name}") != others
        fields["ns/" + name] = "own" if own else "shared"
    if "user" in namespaces:
        fields["uid_map"] = " ".join(read(f"/proc/{pid}/uid_map").split())
    fields["init"] = str(init)
    fields["cgroup"] = read(f"/proc/{pid}/cgroup").strip().replace("\n", " ")
    for line in read(f"/proc/{pid}/limits").splitlines()[1:]:
        fields["limit/" + line[:26].strip()] = line[26:47].strip()
    return fields
