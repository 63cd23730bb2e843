"""The command `psie`. One module per command group; click and all else that is heavy is imported inside the commands.

`psie run` is on a budget of milliseconds: its options are read here by a few lines that know the same table of options
as click does, and a zygote is started before anything else is imported. Whatever those lines do not understand goes to
click, which explains it.
"""

from __future__ import annotations

import _signal as signal
import errno
import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


def open_standard_streams() -> None:
    """/dev/null for each standard stream that the caller has closed: else the next thing we open takes its number, and a
    socket of ours would be handed to the plugin as its stdin; and what is for stderr would go to stdout."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, errors="backslashreplace"))


def leave(status: int) -> NoReturn:
    """Exit without tearing the interpreter down, which would cost 4 ms: everything of ours is closed already."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # nobody reads any more
    os._exit(status)


def main() -> None:
    """The console script. Exits with the plugin's status, or as the table of statuses in docs/command-line.md says."""
    open_standard_streams()
    gc.disable()  # nothing here lives long enough for a collection to pay
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        from sandbox.version import __version__

        sys.exit(written(lambda: print(f"psie {__version__}") or 0))
    if sys.flags.no_site:
        from sandbox.cli import late

        late.begin()
    if arguments[:1] == ["run"]:
        from sandbox.cli import options
        from sandbox.engine import spawn

        promised = spawn.promised()
        given = options.parse(arguments[1:], options.RUN)
        if given is not None:
            from sandbox.cli import run

            leave(guarded(lambda: run.run(given, promised)))
        if promised is not None:
            promised.leave()
    from sandbox.cli import app

    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as psie-python leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(written(lambda: guarded(lambda: app.main(arguments))))


def guarded(command: Callable[[], int]) -> int:
    """What nobody foresaw is a failure of psie's, and says so in one line; with PSIE_DEBUG it is a traceback."""
    try:
        return command()
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("PSIE_DEBUG"):
            raise
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:
            return lost(error)
        if isinstance(error, FileNotFoundError) and error.filename is None and is_nowhere():
            print(f"psie: {NOWHERE}", file=sys.stderr)
            return 125
        print(f"psie: internal error: {type(error).__name__}: {error}; PSIE_DEBUG=1 shows where", file=sys.stderr)
        return 125


FULL = (errno.ENOSPC, errno.EIO)  # where no file is named, it was stdout
NOWHERE = "the working directory is gone: cd to one that is there"


def is_nowhere() -> bool:
    """Whether the working directory has been removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def written(command: Callable[[], int]) -> int:
    """The status of `command`, when all of stdout has been written; 1, as click has it, if its reader has left; 125 where it
    cannot be written to."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        forget(1)
        return 1
    except OSError as error:
        return lost(error)
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            forget(2)


def lost(error: OSError) -> int:
    forget(1)
    print(f"psie: standard output cannot be written: {error.strerror}", file=sys.stderr)
    return 125


def forget(fd: int) -> None:
    """What is left for a stream that nobody takes goes nowhere: the interpreter's own flush would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), fd)
