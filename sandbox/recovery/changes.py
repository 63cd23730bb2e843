"""What a plugin has changed in a granted folder: what lies in the upper layer of its overlay, compared with the folder.

Host side. The upper layer is a plugin's work: nothing in it is followed, and nothing is opened but folders and regular
files, each from the descriptor of the one above. Where there is no overlay the plugin has worked on a copy, which is
compared in the same way. Must not change anything. Source: the kernel's overlayfs document.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass

from sandbox.ns import syscalls as sc
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

DEPTH = 100  # folders in folders; a descriptor or two is held for each
PATH_BYTES = 3800  # below PATH_MAX, with room for a stage
BLOCK = 1 << 20
DIFF_BYTES = 4 << 20  # of a file: what is larger is not shown line by line
DIFF_WORK = 4_000_000  # lines that are looked at for a diff, many of them many times
HOLES = 1 << 30  # bytes: a plugin makes larger ones for nothing, and whoever reads them pays
OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")
ORIGIN = ("trusted.overlay.origin", "user.overlay.origin")
RESERVED = ".psie-"  # how names begin that commits use for a while

ADDED, MODIFIED, DELETED, METADATA = "added", "modified", "deleted", "metadata"


@dataclass(frozen=True)
class FileChange:
    """One change in a granted folder.

    Attributes:
        kind: "added", "modified" (content, or what a symbolic link leads to), "deleted" (with all below it) or "metadata"
            (the permission bits alone).
        path: the absolute path on the host; bytes that are no UTF-8 are as os.fsdecode gives them. Names are the plugin's:
            escape them before a person sees them.
        size: bytes of what is there now; None for "deleted".
        sha256: of a regular file's content, in hexadecimal; None for all else, and for what would take too long: files whose
            holes (of all changes together) are larger than 1 GiB.
        problem: why it cannot be committed; "" if it can.
    """

    kind: str
    path: str
    size: int | None = None
    sha256: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Difference:
    """One change as found: its path below the folder, and the two sides of it (lstat; None where nothing is)."""

    kind: str
    path: str
    upper: os.stat_result | None
    lower: os.stat_result | None
    problem: str
    origin: bool = False  # whether it was copied up from a file that was there


class Comparison:
    """An upper layer and the folder below it. `hides` where the upper layer stands for the whole folder: it is a copy."""

    def __init__(self, upper: int, lower: int, *, hides: bool, allow_deletion: bool) -> None:
        """`upper` and `lower` are open folders (not O_PATH), and stay the caller's."""
        self.upper = upper
        self.lower = lower
        self.hides = hides
        self.allow_deletion = allow_deletion
        self.owner = os.fstat(lower).st_uid if os.geteuid() == 0 else None  # whose files alone the plugin's are

    def differences(self) -> list[Difference]:
        """All of them, folders before what is in them, a deletion before what stands in its place."""
        return list(self._compare(self.upper, self.lower, "", self.hides, 0))

    def _compare(self, upper: int, lower: int | None, prefix: str, hides: bool, depth: int) -> Iterator[Difference]:
        names = sorted(os.listdir(upper))
        for name in names:
            yield from self._one(upper, lower, name, prefix, hides, depth)
        if hides and lower is not None:
            for name in sorted(set(os.listdir(lower)) - set(names)):
                if not (depth == 0 and name.startswith(RESERVED)):
                    yield self._deleted(prefix + name, lstat(lower, name))

    def _one(self, upper: int, lower: int | None, name: str, prefix: str, hides: bool, depth: int) -> Iterator[Difference]:
        path = prefix + name
        new = lstat(upper, name)
        if new is None:
            return  # a call runs, and has removed it
        old = lstat(lower, name) if lower is not None else None
        if len(os.fsencode(path)) > PATH_BYTES:
            yield Difference(METADATA if old is not None else ADDED, path, new, old, "its path is too long")
            return
        yield from self._compared(upper, lower, name, path, new, old, hides, depth)

    def _compared(
        self,
        upper: int,
        lower: int | None,
        name: str,
        path: str,
        new: os.stat_result,
        old: os.stat_result | None,
        hides: bool,
        depth: int,
    ) -> Iterator[Difference]:
        if stat.S_ISCHR(new.st_mode) and new.st_rdev == 0:  # a whiteout
            if old is not None:
                yield self._deleted(path, old)
            return
        if not stat.S_ISDIR(new.st_mode):
            if old is not None and stat.S_ISDIR(old.st_mode):
                yield self._deleted(path, old)
                old = None
            try:
                kind, problem = self._kind(upper, lower, name, new, old), self._problem(upper, name, path, new)
                origin = has_origin(upper, name, new)
            except FileNotFoundError:
                return
            except PermissionError:  # of the plugin's making, unless the caller may not read its own folder
                kind, problem, origin = MODIFIED if old is not None else ADDED, UNREADABLE, False
            if kind:
                yield Difference(kind, path, new, old, problem or self._foreign(old), origin)
            return
        if old is not None and not stat.S_ISDIR(old.st_mode):
            yield self._deleted(path, old)
            old = None
        closed = "it lies too deep" if depth >= DEPTH else "" if is_open(upper, name) else UNREADABLE
        if old is None or stat.S_IMODE(old.st_mode) != stat.S_IMODE(new.st_mode):
            problem = closed or self._problem(upper, name, path, new) or self._foreign(old)
            yield Difference(METADATA if old is not None else ADDED, path, new, old, problem)
        elif closed:
            yield Difference(METADATA, path, new, old, closed)
        if closed:
            return
        try:
            inner = open_folder(upper, name)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            try:
                below = open_folder(lower, name) if old is not None and lower is not None else None
            except OSError as error:
                yield Difference(METADATA, path, new, old, f"the folder itself cannot be compared: {error.strerror}")
                return
            try:
                yield from self._compare(inner, below, path + "/", hides or is_opaque(inner), depth + 1)
            finally:
                if below is not None:
                    os.close(below)
        finally:
            os.close(inner)

    def _deleted(self, path: str, old: os.stat_result | None) -> Difference:
        problem = self._foreign(old) if self.allow_deletion else "deleting is not permitted (allow_file_deletion)"
        if path.startswith(RESERVED):  # the stage of a commit that is unfinished
            problem = OWN_NAME
        return Difference(DELETED, path, None, old, problem)

    def _foreign(self, old: os.stat_result | None) -> str:
        """As root a file of another user is not the folder's owner's to change, whatever a copy lets the plugin do."""
        return FOREIGN if old is not None and self.owner not in (None, old.st_uid) else ""

    def _kind(self, upper: int, lower: int | None, name: str, new: os.stat_result, old: os.stat_result | None) -> str:
        if old is None or lower is None:
            return ADDED
        if stat.S_IFMT(new.st_mode) != stat.S_IFMT(old.st_mode):
            return MODIFIED
        if stat.S_ISLNK(new.st_mode):
            return MODIFIED if os.readlink(name, dir_fd=upper) != os.readlink(name, dir_fd=lower) else ""
        if not stat.S_ISREG(new.st_mode):
            return MODIFIED
        if new.st_size != old.st_size or not is_same(upper, lower, name):
            return MODIFIED
        return METADATA if stat.S_IMODE(new.st_mode) != stat.S_IMODE(old.st_mode) else ""

    def _problem(self, upper: int, name: str, path: str, new: os.stat_result) -> str:
        if path.startswith(RESERVED):
            return OWN_NAME
        if stat.S_ISLNK(new.st_mode):
            target = os.readlink(name, dir_fd=upper)
            if leads_out(path, target) or self._leads_through_a_link(path, target):
                return "it is a symbolic link that leads out of the folder, or through another link"
            return ""
        if not stat.S_ISREG(new.st_mode) and not stat.S_ISDIR(new.st_mode):
            return f"it is a {TYPES.get(stat.S_IFMT(new.st_mode), 'special file')}"
        return ""

    def _leads_through_a_link(self, path: str, target: str) -> bool:
        """Whether a name on the way to `target` is a link itself, which could lead anywhere."""
        way = os.path.dirname(os.path.normpath(os.path.join(os.path.dirname(path), target)))
        return way != "" and any(may_pass_a_link(side, way) for side in (self.upper, self.lower))


OWN_NAME = f"names that begin with {RESERVED} are psie's own"
FOREIGN = "it belongs to another user than the folder"
UNREADABLE = "it cannot be read: its mode does not let its owner"
TYPES = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def leads_out(path: str, target: str) -> bool:
    """Whether a link at `path` to `target` leads out of the folder that `path` is relative to, by its words alone.

    A ".." behind a name leads nobody knows where: the name may be a link.
    """
    if target.startswith("/"):
        return True
    parts = [part for part in target.split("/") if part not in ("", ".")]
    upward = 0
    while upward < len(parts) and parts[upward] == "..":
        upward += 1
    return upward > path.count("/") or ".." in parts[upward:]


def may_pass_a_link(folder: int, way: str) -> bool:
    """Whether a name of `way` is a link, or none knows: in one system call, for a plugin may make targets long."""
    try:
        os.close(sc.open_beneath(folder, way, os.O_PATH))
    except (FileNotFoundError, NotADirectoryError):
        return False  # what is behind the name that is missing cannot be there
    except OSError:
        return True
    return False


def open_folder(folder: int, name: str) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def open_file(folder: int, name: str) -> int:
    """A regular file, and nothing else: what blocks or acts when it is opened is refused. Raises OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IsADirectoryError(21, "not a regular file", name)
    return fd


def is_open(folder: int, name: str) -> bool:
    """Whether we may look into a folder."""
    try:
        fd = open_folder(folder, name)
    except PermissionError:
        return False
    except OSError:
        return True  # it has gone meanwhile: nothing is missed
    try:
        os.stat(".", dir_fd=fd)  # reading is one right, going in another
    except PermissionError:
        return False
    finally:
        os.close(fd)
    return True


def lstat(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def digest(folder: int, name: str) -> str:
    """SHA-256 of a regular file's content."""
    fd = open_file(folder, name)
    try:
        hashed = hashlib.sha256()
        while block := os.read(fd, BLOCK):
            hashed.update(block)
        return hashed.hexdigest()
    finally:
        os.close(fd)


def is_same(upper: int, lower: int, name: str) -> bool:
    """Whether two regular files of the same size have the same content. Where both have a hole nothing is read."""
    sides = [open_file(upper, name)]
    try:
        sides.append(open_file(lower, name))
        position = 0
        while True:
            position = min(next_data(fd, position) for fd in sides)
            one, other = (os.pread(fd, BLOCK, position) for fd in sides)
            if one != other or not one:
                return one == other
            position += len(one)
    finally:
        for fd in sides:
            os.close(fd)


def next_data(fd: int, position: int) -> int:
    """Where content is next that is no hole; the end if there is none."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return os.fstat(fd).st_size


def is_opaque(folder: int) -> bool:
    """Whether the open folder of an upper layer hides the one below it."""
    return any(attribute(folder, name) == b"y" for name in OPAQUE)


def has_origin(folder: int, name: str, found: os.stat_result) -> bool:
    if not stat.S_ISREG(found.st_mode):
        return False
    fd = open_file(folder, name)
    try:
        return any(attribute(fd, name) is not None for name in ORIGIN)
    finally:
        os.close(fd)


def attribute(fd: int, name: str) -> bytes | None:
    try:
        return os.getxattr(fd, name)
    except OSError:
        return None


def unified(old: bytes | None, new: bytes | None, path: str) -> str:
    """A unified diff of two contents (None: no file); one line where they are no text. The path is escaped."""
    path = escape_text(path, keep="")
    if any(side is not None and (b"\0" in side or len(side) > DIFF_BYTES) for side in (old, new)):
        return f"Binary files a{path} and b{path} differ\n"
    sides = [re.findall(r"[^\n]*\n|[^\n]+", (side or b"").decode("utf-8", "surrogateescape")) for side in (old, new)]
    before, after = ("/dev/null" if side is None else letter + path for letter, side in (("a", old), ("b", new)))
    lines = unified_lines(sides[0], sides[1], before, after)
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


class Steps(difflib.SequenceMatcher[str]):
    """From one side to the other, as difflib has it, whose time is without a bound: it is not asked about what is the same
    before and behind, and where the rest takes too long all of it is put in place of all that was there."""

    def __init__(self, old: list[str], new: list[str]) -> None:
        head = common(old, new)
        tail = common(old[head:][::-1], new[head:][::-1])
        a, b = (side[head : len(side) - tail] for side in (old, new))
        super().__init__(None, a, b)
        self.old, self.size = a, len(b)
        self.times = Counter(b)
        self.left = DIFF_WORK
        try:
            inner = [(str(tag), i, j, k, m) for tag, i, j, k, m in super().get_opcodes()]
        except OverflowError:
            inner = [("replace", 0, len(a), 0, len(b))]
        self.steps = [("equal", 0, head, 0, head)] if head else []
        self.steps += [(tag, i + head, j + head, k + head, m + head) for tag, i, j, k, m in inner]
        if tail:
            self.steps.append(("equal", len(old) - tail, len(old), len(new) - tail, len(new)))

    def find_longest_match(self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None) -> Any:
        """Looks at each line of one side, and for each of them at all equal ones of the other, unless there are too many."""
        end, many = len(self.old) if ahi is None else ahi, self.size // 100 + 1 if self.size >= 200 else self.size
        counts = (self.times[line] for line in self.old[alo:end])
        self.left -= sum(1 + count for count in counts if count <= many)
        if self.left < 0:
            raise OverflowError
        return super().find_longest_match(alo, end, blo, bhi)

    def get_opcodes(self) -> Any:
        return self.steps


def unified_lines(old: list[str], new: list[str], before: str, after: str) -> Iterator[str]:
    """As difflib.unified_diff."""
    if old == new:
        return
    yield from (f"--- {before}\n", f"+++ {after}\n")
    for group in Steps(old, new).get_grouped_opcodes():
        (_, a_first, _, b_first, _), (_, _, a_last, _, b_last) = group[0], group[-1]
        yield f"@@ -{span(a_first, a_last - a_first)} +{span(b_first, b_last - b_first)} @@\n"
        for tag, a_from, a_to, b_from, b_to in group:
            if tag == "equal":
                yield from (" " + line for line in old[a_from:a_to])
            else:
                yield from ("-" + line for line in old[a_from:a_to])
                yield from ("+" + line for line in new[b_from:b_to])


def common(one: list[str], other: list[str]) -> int:
    """How many lines are the same at the beginning."""
    most = min(len(one), len(other))
    return next((number for number in range(most) if one[number] != other[number]), most)


def span(first: int, count: int) -> str:
    """Lines in the head of a hunk, as diff(1) writes them."""
    return f"{first + 1}" if count == 1 else f"{first + 1 if count else first},{count}"
