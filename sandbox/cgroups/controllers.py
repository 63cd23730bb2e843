"""The v2 controllers as classes: what can be read of and written to one cgroup, each file as an attribute.

Built on cgroupspy's Controller, whose own are those of v1. Files are reached by an open folder, so that nothing can be
renamed or replaced under them; those that are read often stay open. Host side only: the engine's own processes use
sandbox.cgroups.leaf. Source: the kernel's cgroup-v2 document.
"""

from __future__ import annotations

import os

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import BaseFileInterface

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

READ_BYTES = 16384
SURELY_WHOLE = 3500  # bytes: the kernel gives about a page at a time, so what is shorter was all of it


class Folder:
    """An open cgroup, as cgroupspy's node."""

    def __init__(self, fd: int) -> None:
        """Takes over `fd`, an open cgroup folder; `close` closes it."""
        self.fd = fd
        self.files: dict[str | bytes, int] = {}  # open for reading

    @property
    def full_path(self) -> str:
        return f"/proc/self/fd/{self.fd}"

    def read(self, name: str | bytes) -> str:
        """Raises OSError: FileNotFoundError for a controller that is not there, ENODEV for a cgroup that has gone."""
        fd = self.files.get(name)
        if fd is None:
            fd = self.files[name] = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        data = os.pread(fd, READ_BYTES, 0)
        while len(data) > SURELY_WHOLE:
            more = os.pread(fd, READ_BYTES, len(data))
            if not more:
                break
            data += more
        return data.decode()

    def write(self, name: str, text: str) -> None:
        """Without O_CREAT: a file that is missing is ENOENT, not EACCES.

        O_NONBLOCK: for a memory limit below what is used it is not us who reclaim the memory (ignored by older kernels).
        """
        fd = os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def arm(self, name: str, trigger: str) -> int:
        """Write a PSI trigger; returns the fd on which poll(2) tells POLLPRI, until it is closed.

        Raises OSError where that is not allowed (a kernel before 6.5 without CAP_SYS_RESOURCE) or not counted.
        """
        fd = os.open(name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, trigger.encode() + b"\0")
        except OSError:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        for fd in (self.fd, *self.files.values()):
            os.close(fd)
        self.files.clear()


class Number(BaseFileInterface):  # type: ignore[misc]  # cgroupspy has no types
    """One whole number."""

    def sanitize_get(self, value: str) -> int:
        return int(value)


class Limit(BaseFileInterface):  # type: ignore[misc]
    """A number of bytes or tasks; None is "max", no limit."""

    def sanitize_get(self, value: str) -> int | None:
        return None if value.startswith("max") else int(value)

    def sanitize_set(self, value: int | None) -> str:
        return "max" if value is None else str(value)


class Flat(BaseFileInterface):  # type: ignore[misc]
    """Lines of a name and a number, as a dict."""

    readonly = True

    def sanitize_get(self, value: str) -> dict[str, int]:
        return {name: int(number) for name, number in [line.split(" ", 1) for line in value.splitlines()]}


class Nested(BaseFileInterface):  # type: ignore[misc]
    """Lines of a key and `name=number`s, as a dict of dicts of texts."""

    readonly = True

    def sanitize_get(self, value: str) -> dict[str, dict[str, str]]:
        found = {}
        for line in value.splitlines():
            key, *pairs = line.split()
            found[key] = dict([pair.split("=", 1) for pair in pairs if "=" in pair])
        return found


class Pids(BaseFileInterface):  # type: ignore[misc]
    """Process ids, one in a line."""

    readonly = True

    def sanitize_get(self, value: str) -> list[int]:
        return [int(pid) for pid in value.split()]


class V2Controller(Controller):  # type: ignore[misc]
    """What every cgroup has, and how its files are reached."""

    node: Folder
    events = Flat("cgroup.events")
    pids = Pids("cgroup.procs")

    def get_property(self, filename: Any) -> str:
        return self.node.read(filename)

    def set_property(self, filename: Any, value: object) -> None:
        self.node.write(os.fsdecode(filename), str(value))


class Memory(V2Controller):
    current = Number("memory.current", readonly=True)
    peak = Number("memory.peak", readonly=True)
    high = Limit("memory.high")
    max = Limit("memory.max")
    events = Flat("memory.events")
    pressure = Nested("memory.pressure", readonly=True)


class Cpu(V2Controller):
    stat = Flat("cpu.stat")
    pressure = Nested("cpu.pressure", readonly=True)


class Io(V2Controller):
    stat = Nested("io.stat")


class Tasks(V2Controller):
    """The pids controller."""

    current = Number("pids.current", readonly=True)
    max = Limit("pids.max")
    events = Flat("pids.events")
