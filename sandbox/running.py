"""The sandboxes that run now, whoever's process owns them: list them, look into one, end one. For `psie ps` and its kin.

Who has a sandbox is not asked but seen: a process that has a board (sandbox.engine.board), and of whose descriptor the kernel
says that it holds the sandbox's lock in the ledger (sandbox.ns.userids, proc_pid_fdinfo(5)). Nothing that a plugin can do makes
such a process, and one that was killed is none. Processes are held by pidfds from the first look on, so that none is mistaken
for another that has got its number. What another user's process tells is that user's word: it is bounded, is only shown, and
never leads to a process that is not that user's. Host side only.
"""

from __future__ import annotations

import _signal as signal
import dataclasses
import errno
import marshal
import os
import select
import stat
from contextlib import contextmanager, suppress
from time import monotonic

from sandbox.cgroups import leaf, place
from sandbox.engine import board, channel
from sandbox.errors import ResourceError
from sandbox.monitor.sources import CgroupSource, ProcessSource
from sandbox.ns import processes, userids
from sandbox.recipe_data import Recipe, confirm, differences
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from sandbox.monitor.sources import Reading
    from sandbox.recipe_data import Protection

KEEP_TRYING = 10.0  # seconds in which what was killed must have gone
SHORT = 0.02  # seconds between two looks
ENDING = 0.3  # in which what has no owner any more has gone
TICKS = os.sysconf("SC_CLK_TCK")
LINK = f"/memfd:{board.NAME} (deleted)"
LOCKS = "locks"  # what the ledger calls its file
HOLDS, DIFFERS, SET_UP, UNSEEN = "holds", "differs", "as set up", "not seen"


class NotRunning(ResourceError):
    """There is no such sandbox, or more than one that could be meant."""


@dataclasses.dataclass(frozen=True)
class RunningSandbox:
    """One sandbox at one moment. `plugin` and `sandbox_id` are not escaped.

    Attributes:
        id: psie's own, 16 hexadecimal digits.
        sandbox_id: the name that its caller has given it; "" for none.
        plugin: what it runs, or has run last: a path, the name of a function, a plugin id; "" before it has run anything.
        level: minimal, standard, strict or maximum.
        state: standing by (made ahead, nobody's yet), open (nothing has run in it), running, idle (between calls), closing.
        door: command, library, executor or plugin folder.
        since: nanoseconds from the host's start to its own.
        age_seconds: since then.
        owner_pid: of the process whose sandbox it is.
        uid: the user whose process that is.
        memory_limit: bytes.
    """

    id: str
    sandbox_id: str
    plugin: str
    level: str
    state: str
    door: str
    since: int
    age_seconds: float
    owner_pid: int
    uid: int
    memory_limit: int
    zygote_pid: int
    warden_pid: int
    warden_told: int = dataclasses.field(repr=False)
    place: str = dataclasses.field(repr=False)
    line: int = dataclasses.field(repr=False)
    recipe_at: str = dataclasses.field(repr=False)

    def processes(self) -> list[int]:
        """The plugin's, by their numbers; psie's own are not among them."""
        return [pid for init in self._inits() for pid in processes.tree(init)[1:]] + self._daemons()

    def reading(self) -> Reading | None:
        """What its processes use now, see sandbox.monitor.sources; None where there are none."""
        source = self.source()
        try:
            return source.read() if self.processes() else None
        finally:
            source.close()

    def source(self) -> CgroupSource | ProcessSource:
        """Where numbers come from: its cgroup where that counts memory, else its processes."""
        fd = self.leaf()
        if fd >= 0:
            cgroup = CgroupSource(fd)
            if cgroup.has("memory"):
                return cgroup
            cgroup.close()
        return ProcessSource(self.processes)

    def leaf(self) -> int:
        """An fd of its cgroup; -1 where it has none of its own."""
        for init in self._inits():
            with suppress(OSError):
                path = place.own_path(init)
                head, name = os.path.split(path)
                if name.startswith("call-"):
                    path, name = head, os.path.basename(head)
                if name == self.place and ".." not in path:
                    return os.open(place.mount_point() + path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return -1

    def _inits(self) -> list[int]:
        """The first process of each call: children of the warden that have some of their own, as the supervisor has not."""
        return [pid for pid in processes.children(self.warden_pid) if processes.children(pid)] if self.warden_pid else []

    def _daemons(self) -> list[int]:
        """Without a PID namespace: what has left its parents, and is the warden's now. Its cgroup knows it."""
        fd = self.leaf() if self.level == "minimal" else -1
        if fd < 0:
            return []
        source = CgroupSource(fd)
        try:
            known = {pid for init in self._inits() for pid in processes.tree(init)}
            return [pid for pid in source.pids() if pid not in known]
        finally:
            source.close()

    def worker(self) -> tuple[int, int] | None:
        """(init, worker) of a call; None where there is none now. The worker is the first that init has started."""
        for init in self._inits():
            found = processes.children(init)
            with suppress(OSError):
                return init, min(found, key=started)
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with what is used now: memory_bytes and cpu_seconds (None where nobody counts), processes."""
        reading = self.reading()
        names = ("id", "sandbox_id", "plugin", "level", "state", "door", "age_seconds", "owner_pid", "uid", "memory_limit")
        used = {
            "memory_bytes": reading.memory if reading is not None else 0,
            "cpu_seconds": reading.cpu_usec / 1e6 if reading is not None and reading.cpu_usec is not None else None,
            "processes": len(self.processes()),
        }
        return {**{name: getattr(self, name) for name in names}, **used}


class Owner:
    """A process that has a board, held by a pidfd."""

    def __init__(self, pid: int, pidfd: int, board_fd: int, uid: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.board = board_fd  # opened for reading
        self.uid = uid

    def is_alive(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def has_board(self, number: int) -> bool:
        """Whether that is a board, of the process that is called so in its own PID namespace."""
        found, head = os.fstat(self.board), os.pread(self.board, 24, 0)
        is_own = found.st_uid == self.uid and not found.st_nlink and stat.S_ISREG(found.st_mode)
        return is_own and head == board.MAGIC + number.to_bytes(8, "little")

    def lines(self) -> list[tuple[int, bytes]]:
        """(number, content) of each that is in use."""
        head = os.pread(self.board, board.HEAD, 0)
        count = min(int.from_bytes(head[24:32], "little"), board.LINES)
        content = os.pread(self.board, count * board.LINE, board.HEAD)
        lines = [content[start : start + board.LINE] for start in range(0, len(content), board.LINE)]
        return [(number, line) for number, line in enumerate(lines) if line[0]]

    def sandboxes(self) -> list[RunningSandbox]:
        found = []
        for number, line in self.lines():
            with suppress(channel.Malformed, ValueError, KeyError, IndexError, OSError):
                sandbox = self._sandbox(number, line)
                if sandbox is not None:
                    found.append(sandbox)
        return found if self.is_alive() else []

    def _sandbox(self, number: int, line: bytes) -> RunningSandbox | None:
        """What a line says, if the kernel says that the owner has that place of the ledger."""
        size = int.from_bytes(line[board.FACTS : board.FACTS + board.SIZE], "little")
        _, facts = channel.unpack(line[board.FACTS + board.SIZE :][:size])
        since = whole(facts["since"])
        if not self.holds(whole(facts["slot"]), whole(facts["lock"])) or not is_id(facts["id"]):
            return None
        return RunningSandbox(
            id=facts["id"],
            sandbox_id=facts["name"],
            plugin=board.text_at(line, board.PLUGIN),
            level=facts["level"][:20],
            state=board.STATES[line[0]],
            door=facts["door"][:20],
            since=since,
            age_seconds=max(0.0, (board.now() - since) / 1e9),
            owner_pid=self.pid,
            uid=self.uid,
            memory_limit=whole(facts["memory"]),
            zygote_pid=whole(facts["zygote"]),
            warden_pid=whole(facts["warden"]),
            warden_told=whole(facts["told"]),
            place=facts["place"],
            line=number,
            recipe_at=facts["recipe"],
        )

    def holds(self, slot: int, fd: int) -> bool:
        """Whether its descriptor `fd` is of a ledger's locks, and has the one of this slot."""
        found = os.stat(f"/proc/{self.pid}/fd/{fd}")
        if found.st_uid != self.uid or os.path.basename(os.readlink(f"/proc/{self.pid}/fd/{fd}")) != LOCKS:
            return False
        for line in processes.read(f"/proc/{self.pid}/fdinfo/{fd}").split("\n"):
            words = line.split()
            if words[:1] == ["lock:"] and words[2:5] == ["OFDLCK", "ADVISORY", "WRITE"] and words[-2:] == [str(slot)] * 2:
                return True
        return False

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.board)


def whole(text: str) -> int:
    """A number that is no more than the kernel's are. Raises ValueError."""
    if not text.isascii() or not text.isdecimal() or len(text) > 19:
        raise ValueError("no whole number")
    return int(text)


def is_id(text: str) -> bool:
    return len(text) == 16 and not set(text) - set("0123456789abcdef")


def started(pid: int) -> int:
    """When a process has, in the kernel's ticks since the host's start. Raises OSError."""
    return int(processes.read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])


def parent(pid: int) -> int:
    return int(processes.read(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])


def names_of(pid: int) -> list[int]:
    """Its numbers in the PID namespaces from ours to its own. Raises OSError."""
    lines = processes.read(f"/proc/{pid}/status").split("\n")
    return next(([int(word) for word in line.split()[1:]] for line in lines if line.startswith("NSpid:")), [pid])


def uids(pid: int) -> set[int]:
    """Real, effective, saved and file system user id."""
    lines = processes.read(f"/proc/{pid}/status").split("\n")
    return {int(word) for line in lines if line.startswith("Uid:") for word in line.split()[1:]}


# -- owners ----------------------------------------------------------------------------------------------------------------


class Look:
    """One look at all processes that we may look at: `with Look() as look`."""

    def __init__(self) -> None:
        self.owners: list[Owner] = []
        self.elsewhere = 0  # owners in other PID namespaces, whose numbers are not ours

    def __enter__(self) -> Look:
        own = os.geteuid()
        for name in os.listdir("/proc"):
            if name.isdecimal():
                with suppress(OSError, ValueError):
                    uid = os.stat(f"/proc/{name}").st_uid
                    if own in (0, uid):
                        self._look_at(int(name), uid)
        return self

    def __exit__(self, *_: object) -> None:
        for owner in self.owners:
            owner.close()

    def _look_at(self, pid: int, uid: int) -> None:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == LINK:
                    self._open(pid, name, uid)

    def _open(self, pid: int, name: str, uid: int) -> None:
        """An owner, if that is a board of this process's own: a fork of an owner has its parent's too. Raises OSError."""
        pidfd = os.pidfd_open(pid)
        try:
            fd = os.open(f"/proc/{pid}/fd/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            os.close(pidfd)
            raise
        owner = Owner(pid, pidfd, fd, uid)
        numbers = names_of(pid)
        if not owner.has_board(numbers[-1]) or any(each.pid == pid for each in self.owners):
            owner.close()
        elif len(numbers) == 1:
            self.owners.append(owner)
        else:
            self.elsewhere += bool(owner.sandboxes())
            owner.close()

    def sandboxes(self) -> list[RunningSandbox]:
        """All of them, the oldest first."""
        found = [sandbox for owner in self.owners for sandbox in owner.sandboxes()]
        return sorted(found, key=lambda sandbox: (sandbox.since, sandbox.id))

    def not_shown(self) -> list[str]:
        """What may run besides, in sentences."""
        said = []
        if os.geteuid() != 0:
            said.append("sandboxes of other users are not shown: root sees them")
        if self.elsewhere:
            said.append(f"sandboxes of {self.elsewhere} processes in containers are not shown: run psie ps there")
        elif count := unseen():
            said.append(f"of {count} more sandboxes of this user the owner cannot be looked at: see them as root")
        return said


def unseen() -> int:
    """How many sandboxes have a place in our ledger, and none whom we may look at has told of them. What is just beginning or
    ending is not meant: those are asked for twice."""
    hidden: set[str] = set()
    for is_last in (False, True):
        try:
            places = userids.living()
        except (OSError, ResourceError):
            return 0  # nobody can say
        with Look() as look:
            places -= {each.place for each in look.sandboxes()}
        hidden = places & hidden if is_last else places
        if hidden and not is_last:
            select.select([], [], [], ENDING)
    return len(hidden)


def list_running() -> list[RunningSandbox]:
    """The sandboxes that run now, the oldest first: this user's, for root those of all users."""
    with Look() as look:
        return look.sandboxes()


def find(name: str) -> RunningSandbox:
    """The one with this id, or whose id alone begins so, or the only one whose caller calls it so. Raises NotRunning."""
    return chosen(list_running(), name)


def chosen(sandboxes: Sequence[RunningSandbox], name: str) -> RunningSandbox:
    """The one of these that `name` means, as `find` says."""
    shown = escape_text(name[:100], keep="")
    if name:
        for found in (
            [each for each in sandboxes if each.id == name],
            [each for each in sandboxes if each.id.startswith(name)],
            [each for each in sandboxes if each.sandbox_id == name],
        ):
            if len(found) == 1:
                return found[0]
            if found:
                raise NotRunning(f"{shown} may be {len(found)} sandboxes: give more of the id, as psie ps shows it")
    raise NotRunning(f"{shown}: no such sandbox runs: see psie ps")


# -- an end from outside ---------------------------------------------------------------------------------------------------


def kill(name: str) -> RunningSandbox:
    """End the sandbox that `name` means (see `find`), whoever's process owns it, and wait until it has gone.

    Its caller sees a SandboxKilledError, and its row says so. Returns what it was. Raises NotRunning; ResourceError if it could
    not be ended; PermissionError if it is not ours.
    """
    with Look() as look:
        sandbox = chosen(look.sandboxes(), name)
        end(next(owner for owner in look.owners if owner.pid == sandbox.owner_pid), sandbox)
        return sandbox


def end(owner: Owner, sandbox: RunningSandbox) -> None:
    """Leave word who did it, and kill the warden: everything of the sandbox goes with it, and its owner cleans up.

    A warden serves one sandbox after the other. It is stopped before the last look whether it still has this one: as long as
    the owner's line says so, it has, and stopped it cannot get another.
    """
    until = monotonic() + KEEP_TRYING
    while sandbox.state != board.STATES[board.CLOSING]:
        if sandbox.warden_pid:
            with warden_of(owner, sandbox) as pidfd:
                if pidfd is not None and _killed(owner, sandbox, pidfd):
                    break
        current = again(owner, sandbox)  # it is being opened, or has gone
        if current is None:
            return
        if monotonic() > until:
            raise ResourceError(
                f"the sandbox {sandbox.id} has no warden that could be seen: end its owner, {sandbox.owner_pid}"
            )
        select.select([], [], [], SHORT)
        sandbox = current
    while again(owner, sandbox) is not None:
        if monotonic() > until:
            raise ResourceError(
                f"the sandbox {sandbox.id} was killed, but its owner, process {sandbox.owner_pid}, has not cleaned up yet: "
                "see whether that is stopped"
            )
        select.select([], [], [], SHORT)


def _killed(owner: Owner, sandbox: RunningSandbox, pidfd: int) -> bool:
    """Whether it was still this sandbox's warden, and is dead now."""
    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    is_dead = False
    try:
        current = again(owner, sandbox)
        if current is not None and current.warden_pid == sandbox.warden_pid and current.state != board.STATES[board.CLOSING]:
            leave_word(owner, sandbox)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            is_dead = True
    finally:
        if not is_dead:
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    return is_dead


def again(owner: Owner, sandbox: RunningSandbox) -> RunningSandbox | None:
    """The same as it is now; None where it has gone."""
    try:
        return next((each for each in owner.sandboxes() if each.id == sandbox.id and each.line == sandbox.line), None)
    except OSError:
        return None


@contextmanager
def warden_of(owner: Owner, sandbox: RunningSandbox) -> Iterator[int | None]:
    """A pidfd of its warden; None if the process of that number cannot be it. It is the owner's zygote, or a child of that, of
    the owner's user, and older than what the owner says of it: a later one may have got its number."""
    pidfd = None
    try:
        with suppress(OSError, ValueError, IndexError):
            pidfd = os.pidfd_open(sandbox.warden_pid)
            zygote = sandbox.warden_pid if sandbox.warden_pid == sandbox.zygote_pid else parent(sandbox.warden_pid)
            is_below = zygote == sandbox.zygote_pid and parent(zygote) == owner.pid
            is_later = started(sandbox.warden_pid) > sandbox.warden_told * TICKS // 10**9
            if not is_below or is_later or uids(sandbox.warden_pid) != {owner.uid}:
                os.close(pidfd)
                pidfd = None
        yield pidfd
    finally:
        if pidfd is not None:
            os.close(pidfd)


def leave_word(owner: Owner, sandbox: RunningSandbox) -> None:
    """On its line, where its owner looks when the warden has died."""
    import pwd

    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    data = f"{name} (psie kill)".encode()[: board.LINE - board.MARK - board.SIZE]
    fd = os.open(f"/proc/self/fd/{owner.board}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, len(data).to_bytes(board.SIZE, "little") + data, board.HEAD + board.LINE * sandbox.line + board.MARK)
    finally:
        os.close(fd)


# -- what holds one --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seen:
    """One protection of a running sandbox, read back now.

    Attributes:
        protection: with what was seen in its `detail`.
        now: holds, differs (from the recipe), not seen (no process runs), or as set up (cannot be read from outside: what was
            seen when the worker was sealed holds, since nothing loosens it).
    """

    protection: Protection
    now: str

    def to_dict(self) -> dict[str, str]:
        return {**self.protection.to_dict(), "now": self.now}


class Inspection:
    """A sandbox's effective recipe, and what the kernel says of a process of it now.

    Attributes:
        sandbox, recipe: what it is.
        read_back: by the names of the read-back; {} where no process runs in it.
        cgroup: the limits that its cgroup has now, by file.
        protections: a Seen for each line of the recipe.
    """

    def __init__(self, sandbox: RunningSandbox, recipe: Recipe, seen: dict[str, str], cgroup: dict[str, str]) -> None:
        self.sandbox = sandbox
        self.recipe = recipe
        self.read_back = seen
        self.cgroup = cgroup
        self.protections = [self._seen(each) for each in recipe.protections]

    def _seen(self, protection: Protection) -> Seen:
        expected = protection.expected
        if not expected:
            return Seen(protection, SET_UP)
        if not self.read_back:
            return Seen(protection, UNSEEN)
        different = differences((protection,), self.read_back)
        if different:
            said = ", ".join(f"{name}={value}, not {wanted}" for name, (wanted, value) in different.items())
            return Seen(protection.replace(detail=f"{protection.detail}; seen: {said}".lstrip("; ")), DIFFERS)
        (confirmed,) = confirm((protection,), self.read_back)
        return Seen(confirmed, HOLDS)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sandbox": self.sandbox.to_dict(),
            "recipe": self.recipe.to_dict(),
            "read_back": self.read_back,
            "cgroup": self.cgroup,
            "protections": [each.to_dict() for each in self.protections],
        }


def inspect(name: str) -> Inspection:
    """Look into the sandbox that `name` means (see `find`). Raises NotRunning; ResourceError where that cannot be done."""
    with Look() as look:
        sandbox = chosen(look.sandboxes(), name)
        owner = next(owner for owner in look.owners if owner.pid == sandbox.owner_pid)
        recipe = recipe_of(owner, sandbox)
        seen: dict[str, str] = {}
        found = sandbox.worker()
        if found is not None:
            try:
                seen = processes.read_back(found[1], found[0], links(sandbox, recipe))
            except ProcessLookupError:
                seen = {}  # it has just ended
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH):
                    raise ResourceError(f"{error.filename}: {error.strerror}: run psie inspect as root") from None
        return Inspection(sandbox, recipe, seen, limits(sandbox, recipe))


def recipe_of(owner: Owner, sandbox: RunningSandbox) -> Recipe:
    """As its owner has it. Another user's is not read: it would be code to us (see marshal)."""
    if owner.uid != os.geteuid():
        raise ResourceError(f"the sandbox {sandbox.id} is another user's (uid {owner.uid}): run psie inspect as that user")
    try:
        offset, size = map(whole, sandbox.recipe_at.split())
        recipe: Recipe = Recipe.from_dict(marshal.loads(os.pread(owner.board, min(size, board.RECIPES_BYTES), offset)))
    except (ValueError, TypeError, EOFError, KeyError):
        raise ResourceError(
            f"the recipe of {sandbox.id} cannot be read: it is being opened, or is another version's: try again"
        ) from None
    return recipe


def links(sandbox: RunningSandbox, recipe: Recipe) -> dict[str, str]:
    """Of the namespaces in which its workers must not be: its warden's, or where that shares a network its zygote's."""
    places = {name: sandbox.zygote_pid if name == "net" else sandbox.warden_pid for name in recipe.namespaces}
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name, pid in places.items()}


def limits(sandbox: RunningSandbox, recipe: Recipe) -> dict[str, str]:
    """What the files of its cgroup say now, of those that the recipe sets."""
    fd = sandbox.leaf() if recipe.cgroup is not None else -1
    if fd < 0:
        return {}
    try:
        return {name: leaf.read(fd, name).strip() for name in (recipe.cgroup or {})["settings"]}
    finally:
        os.close(fd)
