"""What a process tells of its sandboxes: `sandbox.running` reads it from outside, for `psie ps`, `top`, `kill` and `inspect`.

One memory file per process, with a line for each sandbox and the text of each recipe. The library has it mapped, so that to
tell of a sandbox, or of a call, costs no system call. Nobody but its owner's user, and root, can open it: that takes the right
to trace the owner (proc_pid_fd(5), ptrace(2)), which no sandbox has. Where it cannot be had nothing is told, and all else
works. Must be light: it is on the start path of the command. Source: memfd_create(2).
"""

from __future__ import annotations

import marshal
import os
from time import clock_gettime_ns

from sandbox.engine import channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap

    from sandbox.recipe_data import Recipe

NAME = "psie sandboxes"
MAGIC = b"psie board 1\0\0\0\0"
CLOCK_BOOTTIME = 7  # linux/time.h: what the start times of processes are told by
# States: of a line that nobody uses, and of a sandbox
FREE, STANDING, OPEN, RUNNING, IDLE, CLOSING = range(6)
STATES = ("free", "standing by", "open", "running", "idle", "closing")

HEAD = 4096  # bytes before the first line: magic, pid, number of lines ever used
LINE = 1024  # bytes of a line: state, plugin, facts, mark, each text after its size
LINES = 4096
PLUGIN, FACTS, MARK = 2, 256, 960  # where in a line
SIZE = 2  # bytes of a size
RECIPES = HEAD + LINE * LINES  # where they begin
RECIPES_BYTES = 16 << 20  # that are told at most
NAME_LENGTH = 60  # characters of the name that its caller has given it


class Board:
    """This process's. Raises OSError."""

    def __init__(self) -> None:
        self.fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.memory: mmap.mmap | None = None
        self.free: list[int] = []
        self.count = 0
        self.end = RECIPES
        self.recipes: dict[int, tuple[Recipe, str]] = {}  # by identity
        self.write(0, MAGIC + os.getpid().to_bytes(8, "little"))

    def map(self) -> None:
        """From now on telling is writing to memory. It is sealed before: memory that is cut off would kill whoever writes."""
        if self.memory is None:
            import fcntl
            import mmap

            os.ftruncate(self.fd, RECIPES)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            self.memory = mmap.mmap(self.fd, RECIPES)

    def write(self, offset: int, data: bytes) -> None:
        if self.memory is not None:
            self.memory[offset : offset + len(data)] = data
        else:
            os.pwrite(self.fd, data, offset)

    def take(self) -> int:
        """The number of a free line; -1 where there is none."""
        if self.free:
            return self.free.pop()
        if self.count == LINES:
            return -1
        self.count += 1
        self.write(len(MAGIC) + 8, self.count.to_bytes(8, "little"))
        return self.count - 1

    def recipe(self, recipe: Recipe) -> str:
        """Where its text is, as "offset size"; "" where there is no more room."""
        known = self.recipes.get(id(recipe))
        if known is None:
            text = marshal.dumps(recipe.to_dict())
            if self.end + len(text) > RECIPES + RECIPES_BYTES:
                return ""
            os.pwrite(self.fd, text, self.end)
            known = self.recipes[id(recipe)] = recipe, f"{self.end} {len(text)}"
            self.end += len(text)
        return known[1]


class Line:
    """What is told of one sandbox. It never fails."""

    def __init__(self, facts: dict[str, object], plugin: str = "") -> None:
        self.state = OPEN
        self.plugin = ""
        self.facts = {
            **facts,
            "name": "",
            "warden": 0,
            "told": 0,
            "recipe": "",
        }  # all that there will be: two threads change them
        self.board = own()
        self.number = self.board.take() if self.board is not None else -1
        self.offset = HEAD + LINE * self.number
        self._write(MARK, b"\0\0")
        self.is_about(plugin)
        self.know()
        self.tell(OPEN)

    def _write(self, where: int, data: bytes) -> None:
        if self.number >= 0 and self.board is not None:
            try:
                self.board.write(self.offset + where, data)
            except OSError:  # without memory; the library's is there already
                self.number = -1

    def know(self, **facts: object) -> None:
        """Change some facts, or none."""
        self.facts |= facts
        data = channel.pack("sandbox", self.facts)
        if len(data) <= MARK - FACTS - SIZE:
            self._write(FACTS, len(data).to_bytes(SIZE, "little") + data)

    def opened(self, warden: int, recipe: Recipe) -> None:
        """It has a warden; `recipe` is what it was made by."""
        try:
            text = self.board.recipe(recipe) if self.board is not None else ""
        except (OSError, ValueError):
            text = ""
        self.know(warden=warden, told=now(), recipe=text)

    def is_about(self, plugin: str) -> None:
        """What it runs now. Of a long path the end tells the most."""
        if plugin != self.plugin or not plugin:
            self.plugin = plugin
            data = plugin.encode("utf-8", "backslashreplace")[-(FACTS - PLUGIN - SIZE) :]
            self._write(PLUGIN, len(data).to_bytes(SIZE, "little") + data)

    def tell(self, state: int) -> None:
        if self.state != CLOSING:
            self.state = state
            self._write(0, state.to_bytes(1, "little"))

    def mark(self) -> str:
        """Who has ended it from outside, as sandbox.running.kill writes it; "" where nobody has."""
        if self.number < 0 or self.board is None:
            return ""
        try:
            data = os.pread(self.board.fd, LINE - MARK, self.offset + MARK)
        except OSError:
            return ""
        return text_at(data, 0)

    def forget(self) -> None:
        """It has gone: the line is another's."""
        if self.number >= 0 and self.board is not None:
            self._write(0, b"\0")
            self.board.free.append(self.number)
        self.number = -1


def text_at(line: bytes, where: int) -> str:
    """A text of a line."""
    size = int.from_bytes(line[where : where + SIZE], "little")
    return line[where + SIZE : where + SIZE + size].decode("utf-8", "replace")


def now() -> int:
    """Nanoseconds since the host has started."""
    return clock_gettime_ns(CLOCK_BOOTTIME)


_board: Board | None = None


def own() -> Board | None:
    """The one of this process; None where it cannot be had."""
    global _board
    if _board is None:
        try:
            _board = Board()
        except OSError:
            return None  # no memory, or no descriptor
    return _board


def use_memory() -> None:
    """For a process that opens many sandboxes."""
    board = own()
    if board is not None:
        try:
            board.map()
        except (OSError, ValueError):
            return  # then each word is a system call


def _forget_parents() -> None:
    """In a fork: the sandboxes are the parent's, and so is what is told of them."""
    global _board
    _board = None


os.register_at_fork(after_in_child=_forget_parents)
