"""The command `psie`. One module per command group; click and all else that is heavy is imported inside the commands.

`psie run` is on a budget of milliseconds: its options are read here by a few lines that know the same table of options
as click does, and a zygote is started before anything else is imported. Whatever those lines do not understand goes to
click, which explains it.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


def open_standard_fds() -> None:
    """/dev/null for each standard stream that the caller has closed: else the next thing we open takes its number, and a
    socket of ours would be handed to the plugin as its stdin."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


def leave(status: int) -> NoReturn:
    """Exit without tearing the interpreter down, which would cost 4 ms: everything of ours is closed already."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by the caller
                stream.flush()
        except (OSError, ValueError):
            continue  # nobody reads any more
    os._exit(status)


def main() -> None:
    """The console script. Exits with the plugin's status, or as the table of statuses in docs/command-line.md says."""
    open_standard_fds()
    gc.disable()  # nothing here lives long enough for a collection to pay
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        from sandbox.version import __version__

        print(f"psie {__version__}")
        return
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

    if sys.stdout is None:  # closed by the caller: 1 is /dev/null now
        sys.stdout = os.fdopen(1, "w")
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
        print(f"psie: internal error: {type(error).__name__}: {error}; PSIE_DEBUG=1 shows where", file=sys.stderr)
        return 125


def written(command: Callable[[], int]) -> int:
    """The status of `command`, when all of stdout has been written; 1, as click has it, if its reader has left."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)  # for the interpreter's own flush
        return 1
