"""`psie ps`, `psie top`, `psie kill` and `psie inspect`: the sandboxes that run now, see sandbox.running."""

from __future__ import annotations

import json
import os
import pwd
import select
import signal
import sys
import termios
import tty
from contextlib import contextmanager, suppress
from time import monotonic

from sandbox import running
from sandbox.cli.inputs import UsageError
from sandbox.cli.session import complain, say
from sandbox.cli.table import print_table, table_of
from sandbox.cli.words import counted, duration, size
from sandbox.errors import SandboxException
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from rich.table import Table

    from sandbox.monitor.sources import CgroupSource, ProcessSource, Reading
    from sandbox.running import Inspection, RunningSandbox

HEAD = ("id", "plugin", "level", "state", "age", "owner", "memory", "processes")
RATES = ("CPU %", "memory/s")
NONE = "no sandbox runs"
PLUGIN_LENGTH = 40  # characters of a plugin's name in a table; of a path the end tells the most
SHORTEST, LONGEST = 0.1, 86400  # seconds between two looks
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def listed(*, as_json: bool) -> int:
    """`psie ps`."""
    with running.Look() as look:
        found = look.sandboxes()
        hidden = look.not_shown()
    if as_json:
        print(json.dumps({"sandboxes": [safe(each.to_dict()) for each in found], "not_shown": hidden}, indent=2))
        return 0
    if found:
        print_table(HEAD, [row(each, each.reading()) for each in found])
    else:
        print(NONE)
    for sentence in hidden:
        say(sentence)
    return 0


def safe(told: dict[str, Any]) -> dict[str, Any]:
    """Texts as `escape_text` shows them: JSON on a terminal is read by people too."""
    return {name: escape_text(value, keep="") if isinstance(value, str) else value for name, value in told.items()}


def row(sandbox: RunningSandbox, reading: Reading | None) -> list[str]:
    """Its cells, for HEAD."""
    plugin = sandbox.plugin or sandbox.sandbox_id
    plugin = plugin if len(plugin) <= PLUGIN_LENGTH else "..." + plugin[3 - PLUGIN_LENGTH :]
    owner = f"{sandbox.owner_pid} {user(sandbox.uid)}"
    used = reading.memory if reading is not None else 0
    memory = f"{size(used) if used is not None else '?'} of {size(sandbox.memory_limit)}"
    facts = [sandbox.id, plugin, sandbox.level, sandbox.state, duration(sandbox.age_seconds), owner]
    return [*facts, memory, str(len(sandbox.processes()))]


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# -- top -------------------------------------------------------------------------------------------------------------------


class Course:
    """The sandboxes from one look to the next."""

    def __init__(self) -> None:
        self.sources: dict[str, CgroupSource | ProcessSource] = {}
        self.before: dict[str, Reading] = {}

    def rows(self) -> list[list[str]]:
        """Those that run now, with what they use more than at the last look."""
        found = running.list_running()
        readings: dict[str, Reading] = {}
        rows = []
        for each in found:
            if each.processes() and each.id not in self.sources:
                self.sources[each.id] = each.source()
            reading = self.sources[each.id].read() if each.id in self.sources else None
            if reading is not None:
                readings[each.id] = reading
            rows.append([*row(each, reading), *rates(self.before.get(each.id), reading)])
        for gone in self.sources.keys() - {each.id for each in found}:
            self.sources.pop(gone).close()
        self.before = readings
        return rows

    def table(self) -> Table:
        return table_of((*HEAD, *RATES), self.rows())

    def close(self) -> None:
        for source in self.sources.values():
            source.close()


def rates(before: Reading | None, now: Reading | None) -> list[str]:
    """Per cent of one CPU, and by how much memory has grown in a second; "" where that is not known yet."""
    if before is None or now is None or now.when <= before.when:
        return ["", ""]
    seconds = now.when - before.when
    cpu = "" if None in (now.cpu_usec, before.cpu_usec) else f"{max(0, now.cpu_usec - before.cpu_usec) / seconds / 1e4:.0f}"  # type: ignore[operator]
    if now.memory is None or before.memory is None:
        return [cpu, ""]
    more = (now.memory - before.memory) / seconds
    return [cpu, f"{'-' if more < 0 else '+'}{size(abs(round(more)))}" if round(more) else "0"]


def top(*, seconds: float, once: bool) -> int:
    """`psie top`."""
    if not SHORTEST <= seconds <= LONGEST:
        return complain(UsageError(f"-n {seconds:g}: give a number of seconds from {SHORTEST} to {LONGEST:,}"))
    course = Course()
    try:
        if once or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
            course.rows()
            select.select([], [], [], min(seconds, 1.0))  # rates want two looks
            rows = course.rows()
            if rows:
                print_table((*HEAD, *RATES), rows)
            else:
                print(NONE)
            return 0
        return watch(course, seconds)
    finally:
        course.close()


def watch(course: Course, seconds: float) -> int:
    """On a terminal, until somebody ends it."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    def shown() -> Group:
        table = course.table()
        about = counted(table.row_count, "sandbox", "sandboxes")
        return Group(Text(f"psie top: {about}, every {seconds:g} s; q ends", style="bold"), table)

    with endings() as ends, Live(shown(), console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        while not ends(seconds):
            live.update(shown(), refresh=True)
    return 0


def pressed() -> bytes:
    try:
        return os.read(0, 100)
    except OSError:  # EIO: the terminal has gone
        return b""


@contextmanager
def endings() -> Iterator[Callable[[float], bool]]:
    """A function that waits for so many seconds; True at once if somebody wants an end: q, Ctrl-C, SIGTERM, a closed terminal.

    Signals interrupt nothing, wherever they come: the screen is given back as it was.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    known = {number: signal.getsignal(number) for number in ENDS}
    before = termios.tcgetattr(0) if os.isatty(0) else None
    watched = [reader, *([0] if before is not None else [])]

    def told(number: int, frame: object) -> None:
        with suppress(BlockingIOError):  # it has been told often enough
            os.write(writer, b"\0")

    def ends(seconds: float) -> bool:
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0:
            heard = select.select(watched, [], [], left)[0]
            if reader in heard:
                return True
            if heard:
                data = pressed()
                if not data or b"q" in data.lower():
                    return True
        return False

    try:
        for number in ENDS:
            signal.signal(number, told)
        if before is not None:
            tty.setcbreak(0)
        yield ends
    finally:
        if before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
        for number, handler in known.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


# -- kill and inspect ------------------------------------------------------------------------------------------------------


def kill(*, ids: Sequence[str], is_all: bool) -> int:
    """`psie kill`: 0 if all have gone; one sentence for each that has not, and 125."""
    if is_all == bool(ids):
        return complain(UsageError("psie kill: give ids as psie ps shows them, or --all"))
    # All at once are this user's alone: root names those of others.
    names = [each.id for each in running.list_running() if each.uid == os.geteuid()] if is_all else ids
    status = 0
    for name in dict.fromkeys(names):
        try:
            killed = running.kill(name)
            about = f" ({escape_text(killed.plugin, keep='')})" if killed.plugin else ""
            print(f"killed {killed.id}{about}")
        except running.NotRunning as error:
            if not is_all:  # else it has come to its own end
                status = complain(error)
        except (SandboxException, OSError) as error:
            status = complain(error)
    if is_all and not names:
        print(NONE)
    return status


def inspect(*, name: str, as_json: bool) -> int:
    """`psie inspect`: 1 if a protection is not what the recipe says."""
    try:
        found = running.inspect(name)
    except SandboxException as error:
        return complain(error)
    differs = any(each.now == running.DIFFERS for each in found.protections)
    if as_json:
        told = found.to_dict()
        print(json.dumps({**told, "sandbox": safe(told["sandbox"])}, indent=2))
        return int(differs)
    sandbox = found.sandbox
    print_table(HEAD, [row(sandbox, sandbox.reading())])
    print()
    print_table(("recipe", ""), facts(found))
    print()
    rows = [[each.now, each.protection.name, each.protection.mechanism, each.protection.detail] for each in found.protections]
    print_table(("now", "protection", "mechanism", "detail"), rows)
    if not found.read_back:
        say("no process runs in it now: what only a process shows was not read back")
    return int(differs)


def facts(found: Inspection) -> list[list[str]]:
    """The recipe by its parts, and what the kernel says of ids and cgroup."""
    recipe = found.recipe
    mounts = [*(recipe.template or {}).get("lines", []), *recipe.sandbox_mounts, *recipe.call_mounts]
    lines = [
        ["namespaces", ", ".join(recipe.namespaces) or "none"],
        *(["mount", " ".join(str(word) for word in line if isinstance(word, (str, int)))] for line in mounts),
        ["workspace", f"{recipe.workspace['kind']} {recipe.workspace['path']}"],
        *([f"granted ({folder['kind']})", folder["path"]] for folder in recipe.granted),
        ["network", str(recipe.network["mode"])],
        ["seccomp", str(recipe.seccomp["profile"])],
        [
            "Landlock",
            f"ABI {recipe.landlock['abi']}, {counted(len(recipe.landlock['rules']), 'rule')}" if recipe.landlock else "none",
        ],
        *(["rlimit", f"{name} {value}"] for name, value in recipe.rlimits),
        *([f"cgroup {name}", f"{value} now" if value else "not there"] for name, value in found.cgroup.items()),
    ]
    seen = ("Uid", "Gid", "uid_map", "cgroup")
    return lines + [[f"{name} now", " ".join(found.read_back[name].split())] for name in seen if name in found.read_back]
