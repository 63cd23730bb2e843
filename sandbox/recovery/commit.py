"""Changes of granted folders, put into the folders: all of them or none, whatever is killed when.

What is to come is copied into a stage, a folder of ours in each granted folder (so that renames are enough later). Then a
journal is written that names every step; from then on the commit counts as made. Each step is one rename or chmod, can be
seen to be done by inode numbers, and can be undone: after a crash `recover` carries the rest out, or, where that fails,
undoes the whole. Before a stage is removed the journal says that nothing in it is needed. It lies in our own state folder,
which nobody else may write, and its author holds a lock on it for as long as it lives.

Host side. Everything in a granted folder is reached from its descriptor by openat2(2), without links and other file
systems on the way. Sources: rename(2), openat2(2), flock(2), syncfs(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import stat
import time
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property

from sandbox import state
from sandbox.errors import CommitError, ResourceError
from sandbox.ns import syscalls as sc
from sandbox.ns import workspace
from sandbox.recovery import changes, private
from sandbox.recovery.changes import ADDED, DELETED, METADATA, RESERVED, Comparison, Difference
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, NoReturn

VERSION = 1
# What a journal says of the stages: they are to be removed (nothing was done yet, or all of it), or put into place.
CLEAR, APPLY = "clear", "apply"
MODES = 0o777  # what a committed file can have: no set-user-ID, set-group-ID or sticky bit
CAPABILITIES = "security.capability"  # of a program, and not of what a plugin has made of it: capabilities(7)


class Unfinished(OSError):
    """A step failed, and another could not be undone: journal and stages stay for `recover`."""


class Folder:
    """One granted folder with what is to be committed: two open folders, which `close` closes."""

    def __init__(self, path: str, lower: int, upper: int, comparison: Comparison, since: int) -> None:
        """`since`: nanoseconds of CLOCK_REALTIME; what has changed in the folder after it is a conflict."""
        self.path = path
        self.lower = lower
        self.upper = upper
        self.since = since
        self.comparison = comparison

    @cached_property
    def differences(self) -> Sequence[Difference]:
        return self.comparison.differences()

    def narrowed(self, differences: Sequence[Difference]) -> Folder:
        """The same folder, with less to commit; not to be closed."""
        other = copy(self)
        other.differences = differences
        return other

    def close(self) -> None:
        os.close(self.lower)
        os.close(self.upper)


def commit(folders: Sequence[Folder]) -> None:
    """Make the differences of all `folders` real. Raises CommitError, and then nothing has changed."""
    for folder in folders:
        for difference in folder.differences:
            if difference.problem:
                refuse(os.path.join(folder.path, difference.path), difference.problem)
    identity = os.urandom(8).hex()
    with told(folders), locked(folders):
        for folder in folders:
            check_place(folder)
            check_unchanged(folder)
        journal = Journal(identity)
        opened = [(folder.path, folder.lower) for folder in folders]
        try:
            journal.write(CLEAR, opened, [])
            try:
                steps = [Stage(folder, identity).fill() for folder in folders]
                for folder in folders:
                    check_unchanged(folder, with_listings=False)  # once more: copying takes its time
                journal.write(APPLY, opened, steps)
                carry_out([(folder.lower, of_folder) for folder, of_folder in zip(folders, steps, strict=True)], identity)
            except Unfinished:
                raise  # what lies in the stages is needed still
            except BaseException:
                journal.clear(opened)
                raise
            journal.clear(opened)
        except Unfinished as error:
            path = escape_text(os.fsdecode(error.filename or folders[0].path), keep="")
            text = f"the commit stopped half-way at {path} ({error.strerror}): mend that, then psie gc finishes or undoes it"
            raise CommitError(text, paths=[path]) from None
        finally:
            journal.close()


@contextmanager
def told(folders: Sequence[Folder]) -> Iterator[None]:
    """What the kernel says no to, as a CommitError."""
    try:
        yield
    except OSError as error:
        where = escape_text(os.fsdecode(error.filename or folders[0].path), keep="")
        raise CommitError(f"the changes were not committed: {where}: {error.strerror}", paths=[where]) from None


def check_place(folder: Folder) -> None:
    """Raises CommitError if another folder, or none, is where the granted one was."""
    own = os.fstat(folder.lower)
    try:
        found = os.stat(folder.path, follow_symlinks=False)
    except OSError:
        refuse(folder.path, "it has been removed since the sandbox was opened")
    if (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino):
        refuse(folder.path, "something else has been put in its place since the sandbox was opened")


def check_unchanged(folder: Folder, *, with_listings: bool = True) -> None:
    """Raises CommitError if what differs has been changed in the folder itself since the sandbox was opened.

    Without `with_listings` when there is a stage: making it has changed the folder's.
    """
    removed = {difference.path for difference in folder.differences if difference.kind == DELETED}
    for difference in folder.differences:
        path = os.path.join(folder.path, difference.path)
        if difference.path in removed and difference.kind != DELETED:
            continue  # it stands in the place of what is removed
        now = current(folder.lower, difference.path)
        if now is None and difference.lower is None:
            if with_listings and difference.origin and listing_changed(folder, difference.path):
                refuse(path, "it has been removed since the sandbox was opened")
        elif now is None or difference.lower is None or now.st_ino != difference.lower.st_ino:
            refuse(path, "it has come or gone since the sandbox was opened")
        elif is_mounted(folder.lower, difference.path):
            refuse(path, "it lies in another file system than the folder")
        elif has_changed(folder, difference, now):
            refuse(path, "it has been changed since the sandbox was opened")


def is_mounted(folder: int, path: str) -> bool:
    """Whether another file system begins there. Device numbers do not tell: an overlay has several."""
    try:
        os.close(sc.open_beneath(folder, path, os.O_PATH | os.O_NOFOLLOW))
    except OSError as error:
        return error.errno == errno.EXDEV
    return False


def has_changed(folder: Folder, difference: Difference, now: os.stat_result) -> bool:
    if difference.kind == DELETED:
        owner = os.fstat(folder.lower).st_uid if os.geteuid() == 0 else None
        return newest(folder.lower, difference.path, now, owner) > folder.since
    if stat.S_ISDIR(now.st_mode):  # its bits are all that is committed
        return difference.lower is not None and now.st_mode != difference.lower.st_mode
    return now.st_ctime_ns > folder.since


def listing_changed(folder: Folder, path: str) -> bool:
    """Whether something has come or gone in the folder around `path`.

    What was copied up from a file and has none below it was moved by the plugin, or the file was removed under it.
    """
    found = current(folder.lower, os.path.dirname(path)) if "/" in path else os.fstat(folder.lower)
    return found is None or found.st_ctime_ns > folder.since


def refuse(path: str, why: str) -> NoReturn:
    shown = escape_text(path, keep="")
    raise CommitError(f"{shown} cannot be committed, so nothing was: {why}", paths=[path])


def newest(folder: int, path: str, found: os.stat_result, owner: int | None) -> int:
    """The last change of a file, or of a folder and anything in it: what has come there may be older, or an empty folder.

    Raises CommitError for what is not `owner`'s, if there is one.
    """
    if owner not in (None, found.st_uid):
        refuse(path, changes.FOREIGN)
    last = found.st_ctime_ns
    if not stat.S_ISDIR(found.st_mode):
        return last
    inner = sc.open_beneath(folder, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(inner):
            last = max(last, newest(inner, name, os.stat(name, dir_fd=inner, follow_symlinks=False), owner))
    finally:
        os.close(inner)
    return last


@contextmanager
def locked(folders: Sequence[Folder]) -> Iterator[None]:
    """One commit of a folder at a time: the next one waits, up to private.PATIENCE."""
    held: list[int] = []
    since = time.monotonic()
    try:
        for folder in sorted(folders, key=lambda each: each.path):
            held.append(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder.lower))
            while not private.try_lock(held[-1], fcntl.LOCK_EX):
                try:
                    private.pause(since, private.PATIENCE, folder.path)
                except ResourceError:
                    refuse(folder.path, "another commit goes on there: try again")
        yield
    finally:
        for fd in held:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a fork of another thread may have it open
            os.close(fd)


# -- the journal ---------------------------------------------------------------------------------------------------------


class Journal:
    """One commit in the state folder, by its number. Locked as long as its author lives."""

    def __init__(self, identity: str) -> None:
        self.folder = os.path.join(state.folder("lib"), "commits")
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self.identity = identity
        self.held: list[int] = []

    def write(self, phase: str, folders: Sequence[tuple[str, int]], steps: Sequence[Sequence[Step]]) -> None:
        """On disk when this returns; the one before is replaced as a whole."""
        content = {
            "version": VERSION,
            "phase": phase,
            "folders": [
                {"path": path, "inode": os.fstat(fd).st_ino, "steps": [step.to_dict() for step in of_folder]}
                for (path, fd), of_folder in zip(folders, steps or [[] for _ in folders], strict=True)
            ],
        }
        fd = os.open(self._path(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self.held.append(fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with open(fd, "wb", closefd=False) as file:
            file.write(json.dumps(content).encode())
        os.fsync(fd)
        os.rename(self._path(".new"), self._path())
        sync_folder(self.folder)

    def clear(self, folders: Sequence[tuple[str, int]]) -> None:
        """It is over, one way or the other: remove the stages, and the journal last."""
        try:
            self.write(CLEAR, folders, [])
        except OSError:
            os.unlink(self._path())  # the disk is full: better a stage that stays than a commit that comes back
        for _, fd in folders:
            workspace.remove_folder(fd, RESERVED + self.identity)
        with suppress(FileNotFoundError):
            os.unlink(self._path())

    def close(self) -> None:
        for fd in self.held:
            os.close(fd)
        self.held.clear()

    def _path(self, suffix: str = "") -> str:
        return os.path.join(self.folder, self.identity + suffix)


class Step:
    """One rename or chmod in a granted folder, as plain data.

    kind "put": what is staged as `name` goes to `path`; what was there, if `replaces`, goes to the stage. "remove": what is
    at `path` goes to the stage as `name`. "mode": `path` gets `mode` instead of `before`. `inode` is that of the staged, of
    the removed, or of the changed file; `before` that of the replaced one.
    """

    FIELDS = ("kind", "path", "name", "inode", "replaces", "mode", "before")

    def __init__(
        self, kind: str, path: str, inode: int, *, name: str = "", replaces: bool = False, mode: int = 0, before: int = 0
    ) -> None:
        self.kind = kind
        self.path = path
        self.inode = inode
        self.name = name
        self.replaces = replaces
        self.mode = mode
        self.before = before

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.FIELDS}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Step:
        return cls(**{name: fields[name] for name in cls.FIELDS})

    def is_done(self, folder: int, stage: int) -> bool:
        found = look_at(folder, self.path)
        if self.kind == "put":
            return found is not None and found.st_ino == self.inode
        if self.kind == "remove":
            return changes.lstat(stage, self.name) is not None
        return found is not None and found.st_ino == self.inode and stat.S_IMODE(found.st_mode) == self.mode

    def do(self, folder: int, stage: int) -> None:
        if self.is_done(folder, stage):
            return
        with parent(folder, self.path) as (above, name):
            if self.kind == "put":
                sc.rename(stage, self.name, above, name, sc.RENAME_EXCHANGE if self.replaces else sc.RENAME_NOREPLACE)
            elif self.kind == "remove":
                sc.rename(above, name, stage, self.name, sc.RENAME_NOREPLACE)
            else:
                self._chmod(above, name, self.mode)
        expected = self.inode if self.kind == "remove" else self.before if self.replaces else 0
        taken = changes.lstat(stage, self.name) if expected else None
        if taken is not None and taken.st_ino != expected:
            raise OSError(errno.ESTALE, "somebody has replaced it at this moment", self.path)

    def undo(self, folder: int, stage: int) -> None:
        if not self.is_done(folder, stage):
            return
        with parent(folder, self.path) as (above, name):
            if self.kind == "put" and self.replaces:
                sc.rename(stage, self.name, above, name, sc.RENAME_EXCHANGE)
            elif self.kind == "put":
                sc.rename(above, name, stage, self.name, sc.RENAME_NOREPLACE)
            elif self.kind == "remove":
                sc.rename(stage, self.name, above, name, sc.RENAME_NOREPLACE)
            else:
                self._chmod(above, name, self.before)

    def try_to_undo(self, folder: int, stage: int) -> OSError | None:
        try:
            self.undo(folder, stage)
        except OSError as error:
            return error
        return None

    def _chmod(self, above: int, name: str, mode: int) -> None:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        try:
            if os.fstat(fd).st_ino != self.inode:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.path)
            os.chmod(f"/proc/self/fd/{fd}", mode)
        finally:
            os.close(fd)


def carry_out(pairs: Sequence[tuple[int, Sequence[Step]]], identity: str) -> None:
    """Every step of every folder; where one fails, all that were done are undone and the failure is raised.

    Raises Unfinished where that is not possible either.
    """
    try:
        for folder, steps in pairs:
            with opened_stage(folder, identity) as stage:
                for step in steps:
                    step.do(folder, stage)
            sync(folder)
    except BaseException:
        failed: OSError | None = None
        for folder, steps in pairs:
            try:
                with opened_stage(folder, identity) as stage:
                    for step in reversed(steps):
                        failed = step.try_to_undo(folder, stage) or failed
            except OSError as error:
                failed = error
        if failed is not None:
            raise Unfinished(failed.errno, failed.strerror, failed.filename) from None
        raise


# -- the stage -----------------------------------------------------------------------------------------------------------


class Stage:
    """Copies what is to come into `.psie-ID` of the granted folder, and says in which steps it gets to its place."""

    def __init__(self, folder: Folder, identity: str) -> None:
        self.folder = folder
        self.owner = os.fstat(folder.lower)
        self.name = RESERVED + identity
        os.mkdir(self.name, 0o700, dir_fd=folder.lower)
        self.fd = open_stage(folder.lower, identity)
        self.staged: dict[str, str] = {}  # path of a new folder -> where it lies in the stage
        self.steps: list[Step] = []
        self.modes: list[tuple[str, int]] = []  # of new folders inside new ones, given when nothing is put into them any more
        self.opening: list[Step] = []  # modes that let its owner write: before all else
        self.closing: list[Step] = []  # other modes: after all else

    def fill(self) -> list[Step]:
        try:
            self._try_exchange()
            for difference in self.folder.differences:
                self._stage(difference)
            for place, mode in reversed(self.modes):
                os.chmod(place, mode, dir_fd=self.fd)
            sync(self.fd)
        finally:
            os.close(self.fd)
        return [*self.opening, *self.steps, *reversed(self.closing)]

    def _try_exchange(self) -> None:
        """Not every file system can; better now than in the middle."""
        for name in ("a", "b"):
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.fd))
        try:
            sc.rename(self.fd, "a", self.fd, "b", sc.RENAME_EXCHANGE)
        except OSError as error:
            raise OSError(error.errno, "this file system cannot exchange two files", self.folder.path) from None
        for name in ("a", "b"):
            os.unlink(name, dir_fd=self.fd)

    def _stage(self, difference: Difference) -> None:
        path, new, old = difference.path, difference.upper, difference.lower
        place = str(len(self.steps))
        if difference.kind == DELETED:
            assert old is not None
            self.steps.append(Step("remove", path, old.st_ino, name=place))
            return
        assert new is not None
        mode = stat.S_IMODE(new.st_mode) & MODES
        # A file of several names is put there anew: else those that lie elsewhere would have its mode as well.
        is_shared = old is not None and stat.S_ISREG(old.st_mode) and old.st_nlink > 1
        if difference.kind == METADATA and not is_shared:
            assert old is not None
            before = stat.S_IMODE(old.st_mode)
            kept = before & ~MODES if stat.S_ISDIR(old.st_mode) else 0  # who may write a program may not make it anybody's
            step = Step("mode", path, old.st_ino, mode=mode | kept, before=before)
            (self.opening if mode & stat.S_IWUSR else self.closing).append(step)
            return
        above = self.staged.get(os.path.dirname(path))
        inside = above is not None
        place = f"{above}/{os.path.basename(path)}" if inside else place
        if stat.S_ISDIR(new.st_mode):
            os.mkdir(place, 0o700, dir_fd=self.fd)
            self.staged[path] = place
            if inside:
                self.modes.append((place, mode))
        elif stat.S_ISLNK(new.st_mode):
            with parent(self.folder.upper, path) as (folder, name):
                os.symlink(os.readlink(name, dir_fd=folder), place, dir_fd=self.fd)
        else:
            replaced = old is not None and stat.S_ISREG(old.st_mode)
            self._copy(path, place, mode, keep_attributes=replaced)
        if os.getuid() == 0:
            owner = old or self.owner
            os.chown(place, owner.st_uid, owner.st_gid, dir_fd=self.fd, follow_symlinks=False)
        if not inside:
            inode = os.stat(place, dir_fd=self.fd, follow_symlinks=False).st_ino
            before = old.st_ino if old is not None and difference.kind != ADDED else 0
            self.steps.append(Step("put", path, inode, name=place, replaces=difference.kind != ADDED, before=before))
            if stat.S_ISDIR(new.st_mode):  # only a folder that its owner may write to can be moved
                self.closing.append(Step("mode", path, inode, mode=mode, before=0o700))

    def _copy(self, path: str, place: str, mode: int, *, keep_attributes: bool) -> None:
        """Content, holes as holes; and of the file that it replaces the extended attributes (access lists, labels), as far as a
        write would have left them."""
        with parent(self.folder.upper, path) as (folder, name):
            source = changes.open_file(folder, name)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(place, flags, 0o600, dir_fd=self.fd)
            try:
                copy_content(source, target)
                if keep_attributes:
                    copy_attributes(self.folder.lower, path, target)
                os.fchmod(target, mode)
            finally:
                os.close(target)
        finally:
            os.close(source)


def copy_content(source: int, target: int) -> None:
    size, position = os.fstat(source).st_size, 0
    while position < size:
        start = changes.next_data(source, position)
        if start >= size:
            break  # a hole to the end
        position = os.lseek(source, start, os.SEEK_HOLE)
        while start < position:
            block = os.pread(source, min(changes.BLOCK, position - start), start)
            if not block:
                break
            start += os.pwrite(target, block, start)
    os.ftruncate(target, size)


def copy_attributes(folder: int, path: str, target: int) -> None:
    source = sc.open_beneath(folder, path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name in os.listxattr(source):
            if name == CAPABILITIES:
                continue
            with suppress(OSError):  # a label that only the system may give
                os.setxattr(target, name, os.getxattr(source, name))
    finally:
        os.close(source)


@contextmanager
def parent(folder: int, path: str) -> Iterator[tuple[int, str]]:
    """The open folder that `path` lies in, and its name there."""
    above, _, name = path.rpartition("/")
    fd = sc.open_beneath(folder, above, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd, name
    finally:
        os.close(fd)


def look_at(folder: int, path: str) -> os.stat_result | None:
    """What is at `path` now; None for nothing, or for a way there that is none. Raises OSError."""
    try:
        with parent(folder, path) as (above, name):
            return os.stat(name, dir_fd=above, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return None


def current(folder: int, path: str) -> os.stat_result | None:
    """The same, before anything is done. Raises CommitError."""
    try:
        return look_at(folder, path)
    except OSError as error:
        raise CommitError(f"{escape_text(path, keep='')} cannot be looked at: {error.strerror}", paths=[path]) from None


def open_stage(folder: int, identity: str) -> int:
    """Ours, and no other that the granted folder's owner has put in its place: names in it are used without a second look."""
    name = RESERVED + identity
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700:
        os.close(fd)
        raise OSError(errno.ESTALE, "somebody has replaced it", name)
    return fd


@contextmanager
def opened_stage(folder: int, identity: str) -> Iterator[int]:
    fd = open_stage(folder, identity)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(fd: int) -> None:
    """syncfs(2)"""
    if ctypes.CDLL(None, use_errno=True).syncfs(fd) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# -- after a crash ---------------------------------------------------------------------------------------------------------


def journals() -> list[str]:
    """The journals that there are, of commits under way and of those that have not come to their end."""
    folder = os.path.join(state.folder("lib"), "commits")
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))] if os.path.isdir(folder) else []


def recover() -> list[str]:
    """Finish or undo the commits of this user whose authors have died; returns a line for each."""
    told = []
    for path in journals():
        line = _recover(path)
        if line:
            told.append(line)
    return told


def _recover(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""  # its author lives
        if not os.path.exists(path) or os.stat(path).st_ino != os.fstat(fd).st_ino:
            return ""  # it was replaced or finished at this moment
        if path.endswith(".new"):  # it never counted
            if not os.path.exists(path.removesuffix(".new")):
                os.unlink(path)
            return ""
        with open(fd, "rb", closefd=False) as file:
            content = file.read()
        try:
            return _finish(path, json.loads(content))
        except (ValueError, KeyError, TypeError):
            return f"{escape_text(path, keep='')} is damaged: look for {RESERVED}* in your folders, then remove it"
    finally:
        os.close(fd)


def _finish(path: str, content: dict[str, Any]) -> str:
    shown = ", ".join(escape_text(folder["path"], keep="") for folder in content["folders"])
    if content["version"] != VERSION:
        return f"the commit to {shown} was begun by another version of psie, which has to finish it"
    journal = Journal(os.path.basename(path))
    opened: list[int] = []
    there: list[tuple[str, int]] = []
    said, gone = "cleared away", ""
    try:
        for folder in content["folders"]:
            try:
                opened.append(os.open(folder["path"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                # The device may have another number after a boot; that it is the same folder the stage in it tells as well.
                if os.fstat(opened[-1]).st_ino != folder["inode"]:
                    raise FileNotFoundError(errno.ENOENT, "another folder has its name", folder["path"])
            except (FileNotFoundError, NotADirectoryError):
                if content["phase"] == APPLY:
                    raise
                gone = f": where one has been moved to, {RESERVED}{journal.identity} is still in it, which you may remove"
            else:
                there.append((folder["path"], opened[-1]))
        if content["phase"] == APPLY:
            steps = [[Step.from_dict(fields) for fields in folder["steps"]] for folder in content["folders"]]
            try:
                carry_out(list(zip(opened, steps, strict=True)), journal.identity)
                said = "finished"
            except Unfinished:
                raise
            except OSError:
                said = "undone"
        journal.clear(there)
    except (FileNotFoundError, NotADirectoryError) as error:
        mend = f"put the folder back, or remove {escape_text(path, keep='')}, and {RESERVED}{journal.identity} in the folder"
        return f"the commit to {shown} is still unfinished: {error.strerror}; {mend}"
    except OSError as error:
        return f"the commit to {shown} is still unfinished: {error.strerror}"
    finally:
        journal.close()
        for fd in opened:
            os.close(fd)
    return f"the commit to {shown} was {said}{gone}"
