"""Plugins that the tests send into sandboxes. They travel by value and must not know the tests.

No assertions here: what a plugin finds out it returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import sys
import time
from typing import Any

NOTE = "a global of the module"


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


def give_back(value: Any) -> Any:
    return value


def keywords(first: int, *rest: int, **named: str) -> tuple[int, tuple[int, ...], dict[str, str]]:
    return first, rest, named


def with_env(env: dict[str, Any], word: str = "") -> dict[str, Any]:
    return {**env, "word": word}


def with_environment(environment: dict[str, Any]) -> list[str]:
    return sorted(environment)


def with_other_name(environ: int) -> int:
    return environ


def write_where_it_says(env: dict[str, Any]) -> list[str]:
    for folder in ("temp_directory", "data_directory", "logs_directory"):
        with open(os.path.join(env[folder], folder), "w") as file:
            file.write(folder)
    return sorted(os.listdir(env["data_directory"]))


async def awaited(value: int) -> int:
    import asyncio

    await asyncio.sleep(0)
    return (await asyncio.gather(asyncio.sleep(0, value), asyncio.sleep(0, 1)))[0]


def speak(count: int) -> str:
    for number in range(count):
        print("out", number)
        print("err", number, file=sys.stderr)
    os.write(1, b"bare \xff\n")
    return NOTE


def save(name: str, text: str) -> list[str]:
    with open(name, "w") as file:
        file.write(text)
    return sorted(os.listdir())


def load(name: str) -> str:
    with open(name) as file:
        return file.read()


def meet(own: str, count: int) -> int:
    """Return when `count` calls are here at once."""
    with open(f"here-{own}", "w"):
        pass
    while len([name for name in os.listdir() if name.startswith("here-")]) < count:
        time.sleep(0.005)
    return os.getpid()


def signal_and_sleep(name: str = "started", seconds: float = 60.0) -> None:
    with open(name, "w"):
        pass
    time.sleep(seconds)


def be_refused_and_sleep() -> None:
    """Start the supervisor: nobody has one before something was refused."""
    with contextlib.suppress(PermissionError):
        os.chroot("/")
    signal_and_sleep()


def is_settled() -> bool:
    """Whether this is a fork of a zygote that has made all immortal: sandbox.engine.immortal."""
    return sys.getrefcount(os.path.join) >= 1 << 31


def loaded(module: str) -> bool:
    return module in sys.modules


def variables() -> dict[str, str]:
    return dict(os.environ)


def fail(text: str) -> None:
    raise ValueError(text)


def connect_out() -> str:
    """To a host that nobody has: 192.0.2.0/24 is for documentation (RFC 5737)."""
    import socket

    try:
        with socket.socket() as one:
            one.connect(("192.0.2.1", 9))
    except OSError as error:
        return type(error).__name__
    return "open"


def identity() -> dict[str, Any]:
    names = ("user", "mnt", "pid", "ipc", "uts", "cgroup", "net")
    namespaces = {name: os.readlink(f"/proc/self/ns/{name}") for name in names} if os.path.exists("/proc/self") else {}
    return {"uid": os.getuid(), "pid": os.getpid(), "namespaces": namespaces, "proc": os.listdir("/proc")}


def my_plugin_function() -> int:
    return 42


def my_plugin() -> str:
    return "done"


def surroundings() -> dict[str, Any]:
    """What of the kernel's a plugin sees: its /proc, and whether it can write beside its workspace."""
    try:
        with open("/etc/owned", "w"):
            written = True
    except OSError:
        written = False
    try:
        proc = sorted(os.listdir("/proc"))
    except OSError:
        proc = []
    return {"uid": os.getuid(), "pid": os.getpid(), "proc": proc, "written": written}


def large_after_a_while(size: int) -> bytes:
    """Says that it runs, and returns what needs memory of the caller's half a second later."""
    import time

    open("ready", "w").close()
    time.sleep(0.5)
    return bytes(size)
