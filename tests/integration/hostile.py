"""Plugins that behave as badly as they can. They travel by value; what they find out they return or print.

Whatever they take from the machine is bounded here as well, so that a limit that does not hold costs a test, not the host.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

MB = 1 << 20
MOST_MEMORY = 768 * MB
MOST_TASKS = 200


def generator() -> Iterator[int]:
    yield 1


def return_a_socket() -> Any:
    import socket

    where = next(fd for fd in range(64) if is_socket(fd))
    return {"a": [0, 1, 2, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, os.dup(where))]}


def return_bytes(count: int) -> bytes:
    return bytes(count)


def return_nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def return_itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def return_function() -> Any:
    return {"f": return_function}


def exit_at_once(status: int) -> None:
    print("before the end", flush=True)
    os._exit(status)


def system_exit(code: Any) -> None:
    raise SystemExit(code)


def signal_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def abort() -> None:
    os.abort()


def read_null() -> None:
    import ctypes

    ctypes.string_at(0)


def overflow_the_stack() -> None:
    sys.setrecursionlimit(1 << 30)

    class Deep:
        def __repr__(self) -> str:
            return repr(self)

    repr(Deep())


def close_every_fd() -> str:
    os.closerange(0, 1024)
    return "said into nothing"


def is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False


def write_to_every_fd(*frames: bytes) -> str:
    """Everything that can be written to gets the frames, each by a write of its own."""
    for fd in range(64):
        for frame in frames:
            with contextlib.suppress(OSError):
                os.write(fd, frame)
    return "after the garbage"


def forge(*frames: bytes) -> str:
    """Write frames to the job's socket, and return all the same."""
    for fd in range(3, 64):
        if is_socket(fd):
            for frame in frames:
                os.write(fd, frame)
    return "the honest value"


def flood_the_job_socket(frame: bytes) -> None:
    while True:
        for fd in range(3, 64):
            if is_socket(fd):
                os.write(fd, frame)


def flood_when_told(frame: bytes) -> None:
    open("started", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.005)
    flood_the_job_socket(frame)


def leave_a_daemon() -> str:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for fd in range(3):
                os.close(fd)
            with open("daemon", "w") as file:
                file.write(str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    while not os.path.exists("daemon"):
        time.sleep(0.005)
    return "done"


def leave_a_daemon_that_holds_everything() -> str:
    """With the streams and the job's socket still open in it."""
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    return "done"


def print_much(count: int) -> None:
    piece = b"x" * MB
    for _ in range(count // MB):
        os.write(1, piece)


def take_memory_at_once() -> int:
    return len(bytearray(MOST_MEMORY))


def take_memory_bit_by_bit() -> int:
    taken = [bytearray(MB) for _ in range(MOST_MEMORY // MB)]
    return len(taken)


def take_shared_memory() -> int:
    import mmap

    memory = mmap.mmap(-1, MOST_MEMORY)
    for place in range(0, MOST_MEMORY, 4096):
        memory[place] = 1
    return len(memory)


def fork_bomb() -> None:
    for _ in range(MOST_TASKS):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)


def stubborn_fork_bomb() -> None:
    """Never gives up, and neither do its children."""
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.001)


def thread_bomb() -> int:
    done = threading.Event()
    for _ in range(MOST_TASKS):
        threading.Thread(target=done.wait, daemon=True).start()
    return threading.active_count()


def run_a_program() -> str:
    import subprocess

    return subprocess.run(["/bin/true"], check=True).args[0]  # type: ignore[no-any-return]


def fill_the_disk(most: int) -> int:
    piece = bytes(MB)
    for number in range(most // MB):
        with open(f"file-{number}", "wb") as file:
            file.write(piece)
    return most


def fill_with_files(most: int) -> int:
    for number in range(most):
        with open(f"empty-{number}", "w"):
            pass
    return most


def write_one_file(size: int) -> int:
    with open("large", "wb") as file:
        for _ in range(size // MB):
            file.write(bytes(MB))
    return size


def truncate_one_file(size: int) -> int:
    with open("sparse", "wb") as file:
        file.truncate(size)
    return size


def open_many_files(count: int) -> int:
    held = [open("/dev/null") for _ in range(count)]  # noqa: SIM115  (that is the point)
    return len(held)


def spin() -> None:
    while True:
        pass


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def ignore_signals() -> None:
    """Tells itself to stop, and does not listen."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
        os.kill(os.getpid(), number)
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


async def sleep_for_ever() -> None:
    import asyncio

    await asyncio.Event().wait()


def thread_that_does_not_end() -> str:
    threading.Thread(target=time.sleep, args=(600,)).start()
    return "done"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def raise_mute() -> None:
    raise Mute


def raise_huge() -> None:
    raise ValueError("x" * (32 * MB))


def raise_escapes() -> None:
    raise ValueError("\x1b]0;owned\x07\x1b[2J\u202eevil\r\n\x00end")


def raise_a_named_escape() -> None:
    raise type("\x1b[31mRed\n", (Exception,), {})("text")


def raise_a_chain() -> None:
    error: BaseException | None = None
    for number in range(10_000):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    assert error is not None
    raise error


def raise_group() -> None:
    raise BaseExceptionGroup("many", [ValueError(number) for number in range(10_000)])


def raise_lying_errno() -> None:
    error = OSError("not really")
    error.errno = 10**400
    raise error


def interrupt() -> None:
    raise KeyboardInterrupt


def break_python() -> str:
    """Takes from the worker what it needs to answer."""
    import builtins

    for name in ("str", "type", "isinstance", "len", "BaseException", "__import__"):
        setattr(builtins, name, None)
    sys.stdout = sys.stderr = None
    sys.modules.clear()
    return "broken"


def many_violations() -> int:
    import socket

    count = 0
    for family in range(1, 20):
        try:
            socket.socket(family, socket.SOCK_DGRAM)
        except OSError:
            count += 1
    time.sleep(30)
    return count


def unhandled_violation() -> None:
    import socket

    socket.create_connection(("192.0.2.1", 9))
