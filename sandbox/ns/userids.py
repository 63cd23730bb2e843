"""The ledger: which sandboxes of this host user are alive, which host ids and how much memory they claim.

One file that all psie processes of a host user share (as root /run/psie/ledger). A sandbox holds a byte of it by an
open-file-description lock, whose fd its warden and inits inherit: the kernel frees the slot when the last of them has
gone, whatever was killed. As root slot n stands for host ids that no other sandbox has (see id_region).
Whoever is alive has a record of what it claims; what was killed may have left one. So a claim that the records have room
for is granted without a look at each lock, which costs the more the more there are.
Host side only. Source: fcntl(2) "Open file description locks", subuid(5), systemd's UIDS-GIDS document.
"""

from __future__ import annotations

import _struct as struct  # struct.py adds nothing but a file
import fcntl
import os
import select

from sandbox import state
from sandbox.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeVar

    T = TypeVar("T")

# Clear of subordinate ids (100000 up), of systemd-nspawn (524288-1879048191) and of the last ids before 2^31.
PREFERRED = (1879048192, 2147352575)
IDS_PER_SLOT = 2  # the owner of the set-up, and the plugin
MAX_SANDBOXES = 256  # unless PSIE_MAX_SANDBOXES says otherwise
SLOTS = 4096  # there is no room for more

REGION = IDS_PER_SLOT * (SLOTS + 1)

_RECORD = struct.Struct("=Q")  # bytes of memory claimed; record 0 holds the high-water mark of slots
_MUTEX = 1 << 40  # offset of the byte that serialises changes
MUTEX_TRIES = 200
MUTEX_WAIT = 0.005  # seconds


def _lock(fd: int, kind: int, start: int) -> bool:
    request = struct.pack("hhqqiq", kind, os.SEEK_SET, start, 1, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _lock_mutex(fd: int) -> None:
    """Bounded, so that nobody who gets hold of the lock can stop a caller for good."""
    for _ in range(MUTEX_TRIES):
        if _lock(fd, fcntl.F_WRLCK, _MUTEX):
            return
        select.select([], [], [], MUTEX_WAIT)
    raise ResourceError("the ledger of sandboxes is locked by another process: look for a stopped psie, or try again")


class NoPlaceError(ResourceError):
    """A bound on open sandboxes or their memory is reached: there will be a place when some have gone."""


class Slot:
    """One living sandbox's place in the ledger. `fd` keeps it; hand it to every process that belongs to the sandbox."""

    def __init__(self, number: int, fd: int) -> None:
        self.number = number
        self.fd = fd
        self.name = f"{_identity(fd)}-{number}"  # of its cgroup and its folder

    def release(self, *, for_all: bool = False) -> None:
        """Let go of it; `for_all` who have the fd, which a fork of the caller may, because all of the sandbox has gone."""
        if self.fd >= 0:
            try:
                if for_all:
                    _forget(self.fd, self.number)
                    _lock(self.fd, fcntl.F_UNLCK, self.number)
            except OSError:
                pass  # then it is free when the last who has the fd closes it
            os.close(self.fd)
            self.fd = -1


def claim(memory: int, total_memory: int) -> Slot:
    """A free slot for a sandbox of `memory` bytes.

    The bounds are PSIE_MAX_SANDBOXES (256) and PSIE_MAX_MEMORY_MB (the host's memory), over all sandboxes of this user.
    Raises NoPlaceError if either would be passed.
    """
    most, allowed = bounds(total_memory)
    fd, slot = _alone(lambda locks, ledger: _choose(locks, ledger, memory, most, allowed))
    return Slot(slot, fd)


def _alone(work: Callable[[int, int], T]) -> tuple[int, T]:
    """The descriptor of the locks, and what came of `work(locks, ledger)`, during which nobody else changes them.

    Unlocked explicitly: a fork of another thread may have a copy of the descriptor, and would keep the lock.
    """
    folder = state.folder("run")
    fd = _open_locks(folder)
    try:
        _lock_mutex(fd)
        try:
            ledger = _open_ledger(folder)
            try:
                found = work(fd, ledger)
            finally:
                os.close(ledger)
        finally:
            _lock(fd, fcntl.F_UNLCK, _MUTEX)
    except BaseException:
        os.close(fd)
        raise
    return fd, found


def bounds(total_memory: int) -> tuple[int, int]:
    """How many sandboxes of this user may be open, and how many bytes of memory they may claim. Raises ResourceError."""
    most = min(_setting("PSIE_MAX_SANDBOXES", MAX_SANDBOXES), SLOTS)
    return most, _setting("PSIE_MAX_MEMORY_MB", total_memory >> 20) << 20


def living() -> set[str]:
    """The names of all sandboxes that have a place in our ledger now, by a look at each lock. Raises ResourceError, OSError."""
    fd, claims = _alone(lambda locks, ledger: _living(locks, _read(ledger)))
    try:
        return {f"{_identity(fd)}-{number}" for number, claim in enumerate(claims) if claim}
    finally:
        os.close(fd)


def hold(name: str) -> Slot | None:
    """The slot that a leftover is named after if no sandbox has it, for as long as that is removed; nothing is claimed.

    None too for what another ledger's sandbox has made: processes with different /run can share a cgroup tree.
    """
    fd = _open_locks()
    identity, _, number = name.rpartition("-")
    try:
        is_ours = identity == _identity(fd) and number.isdecimal() and 0 < int(number) <= SLOTS
        if is_ours and _lock(fd, fcntl.F_WRLCK, int(number)):
            return Slot(int(number), fd)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def name_of(number: int) -> str:
    """The name of what a sandbox with the slot `number` of our ledger makes."""
    slot = Slot(number, _open_locks())
    slot.release()
    return slot.name


def _identity(locks: int) -> str:
    """Of a ledger, among all those that are in use on a host."""
    found = os.fstat(locks)
    return f"{found.st_dev:x}-{found.st_ino:x}"


def _open_locks(folder: str = "") -> int:
    """Nobody may open the locks for reading: at level minimal without root a plugin has the caller's id and could, and a
    read lock would stop everyone else."""
    path = os.path.join(folder or state.folder("run"), "locks")
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o200)


def _open_ledger(folder: str = "") -> int:
    path = os.path.join(folder or state.folder("run"), "ledger")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _forget(fd: int, number: int) -> None:
    """Nobody lives in the slot that `fd` has locked: its record goes."""
    try:
        if not os.path.samestat(os.stat(os.path.join(state.folder("run"), "locks")), os.fstat(fd)):
            return  # it is another ledger's: XDG_RUNTIME_DIR has changed
        ledger = _open_ledger()
        try:
            os.pwrite(ledger, _RECORD.pack(0), number * _RECORD.size)
        finally:
            os.close(ledger)
    except OSError:
        return  # it counts until somebody looks who lives


def _choose(fd: int, ledger: int, memory: int, most: int, allowed: int) -> int:
    """Lock a free slot and record it."""
    claims = _read(ledger)
    number = _take(fd, claims) if _refusal(claims, memory, most, allowed) is None else None
    if number is None:
        claims = _living(fd, claims)
        refusal = _refusal(claims, memory, most, allowed)
        if refusal is not None:
            raise NoPlaceError(refusal)
        number = _take(fd, claims)
        if number is None:
            raise NoPlaceError("every place for a sandbox is taken: wait for psie gc, or close some")
        os.pwrite(ledger, struct.pack(f"={len(claims)}Q", len(claims) - 1, *claims[1:]), 0)
    os.pwrite(ledger, _RECORD.pack(memory), number * _RECORD.size)
    if number >= len(claims):
        os.pwrite(ledger, _RECORD.pack(number), 0)
    return number


def _read(ledger: int) -> list[int]:
    """What each slot is recorded with, up to the high-water mark, in the place of which there is a 0."""
    head = os.pread(ledger, _RECORD.size, 0)
    high = min(_RECORD.unpack(head)[0], SLOTS) if len(head) == _RECORD.size else 0
    content = os.pread(ledger, high * _RECORD.size, _RECORD.size)
    return [0, *struct.unpack_from(f"={len(content) // _RECORD.size}Q", content)]


def _living(fd: int, claims: list[int]) -> list[int]:
    """Of these claims, those of sandboxes that are alive, by a look at each lock."""
    living = [0]
    for number, claim in enumerate(claims):
        if claim and not _lock(fd, fcntl.F_WRLCK, number):
            living += [0] * (number - len(living))
            living.append(claim)
        elif claim:
            _lock(fd, fcntl.F_UNLCK, number)
    return living


def _refusal(claims: list[int], memory: int, most: int, allowed: int) -> str | None:
    """Which bound one more sandbox would pass, and what helps."""
    count, claimed = len(claims) - claims.count(0), sum(claims)
    if count >= most:
        return f"{count} sandboxes of this user are open already: close some, or set PSIE_MAX_SANDBOXES above {most}"
    if claimed + memory > allowed:
        return (
            f"the open sandboxes of this user claim {claimed >> 20} MB and this one wants {memory >> 20} MB "
            f"of {allowed >> 20} MB: close some, lower max_memory_mb, or set PSIE_MAX_MEMORY_MB"
        )
    return None


def _take(fd: int, claims: list[int]) -> int | None:
    """Lock the first slot without a claim. Who removes a leftover holds its slot meanwhile."""
    number = 0
    while number < SLOTS:
        try:
            number = claims.index(0, number + 1)
        except ValueError:
            number = max(number + 1, len(claims))
        if number <= SLOTS and _lock(fd, fcntl.F_WRLCK, number):
            return number
    return None


def _setting(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ResourceError(f"the environment variable {name} is {text!r}: give a whole number above 0")
    return int(text)


# -- host ids ------------------------------------------------------------------------------------------------------------


def _ranges(path: str) -> list[tuple[int, int]]:
    """(first, last) of every `name:start:length` in a table; lines that say nothing of the kind count for nothing."""
    try:
        with open(path) as file:
            rows = [line.strip().split(":") for line in file]
    except FileNotFoundError:
        return []
    return [
        (int(row[1]), int(row[1]) + int(row[2]) - 1)
        for row in rows
        if len(row) == 3 and row[1].isdecimal() and row[2].isdecimal()
    ]


_regions: dict[int, int] = {}  # found before: neither passwd nor subuid is read for every sandbox


def id_region(need: int) -> int:
    """The first of `need` host ids that are ours to give away: mapped here, not in /etc/subuid or subgid, no user's.

    Raises ResourceError where this user namespace has no such ids (a container with a short id map).
    """
    if need in _regions:
        return _regions[need]
    with open("/proc/self/uid_map") as file:
        rows = [line.split() for line in file]
    mapped = [(int(inside), int(inside) + int(length) - 1) for inside, _, length in rows]
    taken = [*_ranges("/etc/subuid"), *_ranges("/etc/subgid")]
    # In a container with few ids: the last ones below 60000, where users are and systemd's own ranges begin above.
    for start in (PREFERRED[0], 60000 - need):
        last = start + need - 1
        inside = any(low <= start and last <= high for low, high in mapped)
        if inside and not _overlaps(start, last, taken) and not _is_user(start, last):
            _regions[need] = start
            return start
    raise ResourceError(
        f"this user namespace maps no {need} host ids that nobody uses: map more ids into the container, or run psie as a user"
    )


def _overlaps(start: int, last: int, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(start <= high and low <= last for low, high in ranges)


def _is_user(start: int, last: int) -> bool:
    """Whether /etc/passwd has a user in the range (65534, nobody, must not be a sandbox's either)."""
    ids = [65534]
    with open("/etc/passwd") as file:
        for line in file:
            fields = line.split(":")
            if len(fields) > 2 and fields[2].isdecimal():
                ids.append(int(fields[2]))
    return any(start <= uid <= last for uid in ids)
