"""The host's side of the engine: starts zygotes, opens sandboxes, runs calls. One thread, callbacks, no coroutines.

Both doors stand on it: `sandbox.sandbox` with an asyncio loop, the command with a PollLoop. What comes from a sandbox is
read here as flat messages and frames, bounded, and never interpreted (decoding a value is the caller's, by the codec).
Must not know levels, and must not import anything of the sandbox's side but the channel.
"""

from __future__ import annotations

import _signal as signal
import errno
import marshal
import os
import select
import sys
from _collections import deque  # collections makes its classes by exec, for a millisecond
from time import CLOCK_REALTIME, clock_gettime_ns, monotonic, time

from sandbox import state
from sandbox.cgroups import leaf, place
from sandbox.engine import board, channel, spawn, sweep
from sandbox.engine import loop as loops
from sandbox.errors import (
    SHORT,
    PluginExecutionError,
    ResourceError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxInitializationError,
    SandboxKilledError,
)
from sandbox.ns import userids, workspace
from sandbox.recipe_data import differences

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable, Sequence
    from typing import Any

    from sandbox.engine.clock import Clock
    from sandbox.engine.loop import Loop, Timer
    from sandbox.recipe_data import Recipe
    from sandbox.violations import SandboxViolation

ZYGOTE_DIED = "the zygote has died: its sandboxes are gone; open new ones"
CLOSED = "the sandbox was closed"
WARDEN_DIED = "the sandbox's warden has died, and all of its calls with it: open a new sandbox"
VALUE_MODULES = ("sandbox.engine.codec", "mmap")  # what a zygote needs whose workers send values
SHUT_RDWR = 2
TEXT = 1000  # characters of what a worker says about itself
STRAYS = 1000
COUNTERS = "memory.events ", "pids.events "
FILE = "file"  # what stands for the number of a system call where the interpreter tells of a refused file
NAME = "name"  # and where it tells of a host's name that was asked for
FILE_ERRORS = {str(number): errno.errorcode[number] for number in (errno.EACCES, errno.EPERM, errno.EROFS)}
TOLD = FILE, NAME
NOTES = 6000  # about those that are read: of 256 different refusals 2 ** 23 each
COMING_UP = 16  # workers of one sandbox at once: more would only wait for its warden, which makes one after the other
REFUSALS = 10_000  # refused calls after which a plugin only burns our time and is ended
GRACE = 5.0  # seconds that a zygote has to kill a warden, or to leave, before it is killed itself
WHOLE_VALUE = channel.REPLY_VALUE.upper()  # of a frame
NONSENSE = "the sandbox's {} says what makes no sense, and its sandbox was ended: report this as a bug of psie"
# Of the messages that are understood here: what each must have. CHECKS, below, has what must be a number wherever it is.
OPERATION = "operation", "family", "kind", "address", "port", "allowed", "reason", "excess"
FIELDS: dict[str, tuple[str, ...]] = {
    "opened": ("granted",),
    "failed": (),
    "sealed": ("call",),
    "renewed": (),
    "ended": ("call", "cause", "used"),
    "violation": ("call", "nr", "arg0", "arg1", "arg2", "pid", "count", "offences"),
    "network": ("call", "pid", "count", *OPERATION),
    "cut_off": (),
    "ready": (),
    "closed": ("sandbox",),
}
WATCH_AFTER = 0.05  # seconds that a call must have run to be watched: of shorter ones the counters are read at their end

MENDS = {
    errno.ENOSPC: "close other sandboxes, or raise what is used up of user.max_*_namespaces: psie doctor says what, and how",
    errno.EAGAIN: "raise the process limit (ulimit -u), or close other sandboxes",
    errno.ENOMEM: "free memory, or lower max_memory_mb",
    errno.EPERM: "run psie doctor: it says what refuses this here (a sysctl, AppArmor, a container), and what mends it",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or close other sandboxes",
    errno.ENFILE: "raise fs.file-max (sysctl), or close what has many files open",
    errno.EROFS: "make it writable, or set XDG_RUNTIME_DIR and XDG_STATE_HOME to folders that are",
    errno.EDQUOT: "raise max_disk_usage_mb or max_inodes",
    errno.ENOENT: "check that the path exists",
    errno.EACCES: "make the path readable for the caller",
    errno.EINVAL: "run on Linux 6.1 or later",
    errno.ENOSYS: "run on Linux 6.1 or later",
}


def understood(data: bytes) -> tuple[str, dict[str, str]]:
    """(kind, fields) of a message of zygote, warden or supervisor, which has what is used of it, numbers where those belong.

    Raises channel.Malformed: its sender is not what it was, and nothing that it says counts.
    """
    kind, fields = channel.unpack(data)
    wanted = FIELDS.get(kind, ())
    if kind == "violation" and "operation" in fields:
        wanted += OPERATION
    lacking = [name for name in wanted if name not in fields]
    odd = [name for name in sorted(fields.keys() & CHECKS.keys()) if not CHECKS[name](fields[name])]
    if kind == "ended":
        odd += [name for name, text in fields.items() if name.startswith(COUNTERS) and not is_whole(text)]
    if lacking or odd:
        raise channel.Malformed(f"{kind[:TEXT]} lacks {lacking} or is wrong about {odd}")
    return kind, fields


def is_whole(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) <= 20


def is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 9 and int(text) <= most


def is_errno(text: str) -> bool:
    return is_number(text, 4095)  # MAX_ERRNO, linux/err.h


def is_status(text: str) -> bool:
    """A wait status of a process that has ended: wait(2)."""
    return is_number(text, 0xFFFF) and (os.WIFEXITED(int(text)) or os.WIFSIGNALED(int(text)))


def is_time(text: str) -> bool:
    """Seconds, as Python writes a float."""
    try:
        return text.isascii() and len(text) < 40 and 0 <= float(text) < 1e11
    except ValueError:
        return False


CHECKS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("call", "nr", "arg0", "arg1", "arg2", "pid", "count", "offences", "port", "used", "maxrss_kb"), is_whole),
    **dict.fromkeys(("links", "supervised", "connections", "rx_bytes", "rx_packets", "tx_bytes", "tx_packets"), is_whole),
    **dict.fromkeys(("time", "utime", "stime"), is_time),
    "errno": is_errno,
    "status": is_status,
}


def failed_line(fields: dict[str, str]) -> SandboxInitializationError:
    """The error for a "failed" message: it names the recipe's line, errno, path and mend."""
    number = int(fields.get("errno", "0"))
    state.distrust()
    mend = mend_of(number)
    if fields.get("line") == "zygote: preload":
        mend = "install it for the interpreter that runs psie, or leave it out of preload"
    return SandboxInitializationError(
        f"a sandbox could not be set up: {fields.get('text', '')}",
        line=fields.get("line", ""),
        errno=number or None,
        path=fields.get("path") or None,
        mend=mend,
    )


def mend_of(number: int) -> str:
    """What a caller can do about this errno in a set-up."""
    return MENDS.get(number, "run psie doctor: it says what this host lacks, and what mends it")


def hang_up(sock: _socket.socket) -> None:
    """Close for all who have it: a fork of the caller may hold a copy."""
    shut_down(sock)
    sock.close()


def shut_down(sock: _socket.socket) -> None:
    try:
        sock.shutdown(SHUT_RDWR)
    except OSError:
        pass  # the other end has gone already


def close_fds(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class Zygote:
    """A zygote process of ours. `recipe` decides its interpreter, template and outer user namespace."""

    def __init__(self, loop: Loop, pid: int, control: _socket.socket, *, is_warden: bool = False) -> None:
        """Take over a zygote that `sandbox.engine.spawn` has started; `is_warden`: of its one sandbox, as its settings say.

        Raises OSError, and then it is gone.
        """
        self.loop = loop
        self.pid = pid
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError:
            control.close()
            os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass  # SIGCHLD is ignored
            raise
        self.control = control
        self.control.setblocking(False)
        self.sandboxes: dict[str, Sandbox] = {}
        self.opened = 0
        self.recipes: dict[int, dict[str, Any]] = {}  # what it has learned, by number
        self.taught = 0  # numbers that were given
        self.error: SandboxException | None = None
        self.closed = False
        self.is_warden = is_warden
        self.swept = False  # whether stale workspaces were looked for
        self.leaves = -1  # fd of the folder with the cgroups of its sandboxes, once there is one
        self.handed_down: set[str] = set()  # controllers that those cgroups get
        self.scope = ""  # that folder, where the user's systemd has made it
        self.on_closed: Callable[[], None] | None = None
        self.on_idle: Callable[[Zygote], None] | None = None
        self._leaving: Timer | None = None
        loop.add_reader(self.control.fileno(), self._readable)

    def set_up(self, settings: dict[str, object]) -> None:
        """Send it what it prepares once: see spawn.settings. Sandboxes may be opened at once: they wait in the socket."""
        self._hand_over({}, settings)

    def teach(self, wire: dict[str, Any]) -> int:
        """The number under which the zygote knows this wire form of a recipe."""
        for number, known in self.recipes.items():
            if known is wire:
                return number
        self.taught += 1
        self._hand_over({"learn": self.taught}, wire)
        self.recipes[self.taught] = wire  # not before: of a number that it does not know it would die
        if len(self.recipes) > WIRES:  # each is a descriptor there
            oldest = next(iter(self.recipes))
            del self.recipes[oldest]
            self._instruct({"forget": oldest}, [])
        return self.taught

    def _hand_over(self, instruction: dict[str, object], value: dict[str, Any]) -> None:
        """An instruction with a value that may be larger than a message."""
        fd = channel.in_memory(value)
        try:
            self._instruct(instruction, [fd])
        finally:
            os.close(fd)

    def leaves_in(self, cgroup: dict[str, Any]) -> int:
        """An fd of the folder in which the leaves of its sandboxes are made. Raises OSError, ResourceError."""
        if self.leaves < 0 or not set(cgroup["controllers"]) <= self.handed_down:
            if cgroup["kind"] == "scope":
                from sandbox.cgroups import scope

                folder = self.scope = self.scope or scope.make(self.pid)
            else:
                folder = os.path.join(cgroup["folder"], place.FOLDER)
            self.forget_leaves()
            self.leaves = place.prepare(folder, cgroup["controllers"])
            self.handed_down = set(cgroup["controllers"])
            sweep.leaves(self.leaves)
        return os.dup(self.leaves)

    def forget_leaves(self) -> None:
        if self.leaves >= 0:
            os.close(self.leaves)
            self.leaves = -1

    def open(self, sandbox: Sandbox, instruction: dict[str, object], fds: Sequence[int]) -> None:
        self._instruct(instruction, fds)
        self.opened += 1
        self.sandboxes[sandbox.name] = sandbox

    def _instruct(self, instruction: dict[str, object], fds: Sequence[int]) -> None:
        """Send it; a zygote that is busy with its preloads is waited for.

        Raises ResourceError if it does not read for GRACE seconds. That it has died is read, with the reason, in the loop.
        """
        poll = select.poll()
        poll.register(self.control.fileno(), select.POLLOUT)
        while True:
            try:
                channel.instruct(self.control, instruction, fds)
            except BlockingIOError:
                if poll.poll(GRACE * 1000):
                    continue
                raise ResourceError("the zygote is too busy to open another sandbox: open fewer at once") from None
            except (BrokenPipeError, ConnectionResetError):
                return
            return

    def kill_warden(self, sandbox: str) -> None:
        """Have it kill the warden of this sandbox, one that does not answer; that all has gone is told as ever."""
        try:
            channel.instruct(self.control, {"kill": sandbox})
        except OSError:
            pass  # it does not read, or has died: the sandbox does not wait for long

    def kill(self, error: SandboxException) -> None:
        """It does not answer either: end it, and so all of its sandboxes, which are told as when it dies by itself."""
        if self.error is None:
            self.error = error
        self._signal(signal.SIGKILL)

    def wake(self) -> None:
        """We leave it to clean up: if it was stopped it goes on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        try:
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass  # somebody in this process waits for all children

    def has_ended(self) -> bool:
        """Whether the process has: its pidfd says so, also while others hold its sockets."""
        poll = select.poll()
        if self.pidfd >= 0:
            poll.register(self.pidfd, select.POLLIN)
        return self.pidfd < 0 or bool(poll.poll(0))

    def catch_up(self) -> None:
        """Read all that the zygote has said so far: why it died comes before that it died."""
        while not self.closed and self._readable():
            pass

    def _readable(self) -> bool:
        """Read one message; False when there is none now, or will be none."""
        try:
            data, fds, _ = channel.receive_bytes(self.control, channel.MESSAGE)
        except BlockingIOError:
            return False
        except channel.Malformed:
            data, fds = b"", []
        close_fds(fds)
        try:
            kind, fields = understood(data) if data else ("", {})
        except channel.Malformed:
            self.error, data = ResourceError(NONSENSE.format("zygote")), b""
        if not data:
            self._died()
            return False
        sandbox = self.sandboxes.get(fields.get("sandbox", ""))
        if kind == "failed" and sandbox is not None:
            sandbox.fail(failed_line(fields))
        elif kind == "failed":
            self.error = failed_line(fields)
        elif kind == "closed" and sandbox is not None:
            del self.sandboxes[sandbox.name]
            sandbox.left = fields.get("left", "")
            sandbox.gone()
            if not self.sandboxes and self.on_idle is not None:
                self.on_idle(self)
        return True

    def _died(self) -> None:
        if self.closed:
            return
        error = self.error or ResourceError(ZYGOTE_DIED)
        self.error = error
        self.close()
        for sandbox in list(self.sandboxes.values()):
            sandbox.fail(sandbox.killed() or error)
            sandbox.clean_up()
            sandbox.gone()
        self.sandboxes.clear()

    def close(self) -> None:
        """Close the control socket, upon which it ends all and leaves; then reap it."""
        if self.closed:
            return
        self.closed = True
        self.loop.remove_reader(self.control.fileno())
        hang_up(self.control)
        self.forget_leaves()
        self.loop.add_reader(self.pidfd, self._reap)
        self._leaving = self.loop.call_later(GRACE, self.kill, ResourceError(ZYGOTE_DIED))

    def _reap(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
        self.loop.remove_reader(self.pidfd)
        try:
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)  # by its number we would wait for another child that has it by now
        except ChildProcessError:
            pass  # somebody in this process waits for all children
        os.close(self.pidfd)
        self.pidfd = -1
        if self.on_closed is not None:
            self.on_closed()


class Granted:
    """A folder that the caller grants: open, as the caller sees it, and since when the sandbox has had it."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.begin()

    def begin(self) -> None:
        """What changes in the folder from now on the sandbox does not know. By the clock of file systems, in ns."""
        # Not the coarse clock: from Linux 6.13 on times of files may be finer than that (multigrain timestamps), so that what
        # was written just before would count as changed afterwards. Where they are coarse the two make no difference.
        self.since = clock_gettime_ns(CLOCK_REALTIME)

    def found(self) -> list[int]:
        """Device, inode, uid, gid and permission bits."""
        found = os.fstat(self.fd)
        return [found.st_dev, found.st_ino, found.st_uid, found.st_gid, found.st_mode & 0o7777]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Sandbox:
    """One open sandbox: its place in the ledger, its leaf, its hub to the warden."""

    def __init__(
        self,
        zygote: Zygote,
        recipe: Recipe,
        wire: dict[str, Any],
        name: str,
        resolved: dict[str, Any] | None = None,
        network: int | None = None,
        *,
        plugin: str = "",
        door: str = "library",
    ) -> None:
        """`resolved` is what sandbox.network.resolve says about the recipe's network access; `network` the namespace of
        others that it is to be in; `plugin` and `door` are what is told of it, see sandbox.engine.board."""
        self.zygote = zygote
        self.network = network
        self.resolved = resolved or {}
        self.loop = zygote.loop
        self.recipe = recipe
        self.name = name
        self.calls: dict[int, Call] = {}
        self.next_call = 1
        self.coming_up = 0  # of the calls those whose workers do not stand yet
        self._turns: deque[Callable[[], None]] = deque()  # who waits to make one
        # Instructions, while its warden has not read what came before, and the call whose clock goes with one.
        self._untold: deque[tuple[dict[str, object], Call | None]] = deque()
        self.workspace: int | None = None  # O_PATH fd
        self.owner: tuple[int, ...] = ()  # uid and gid of the plugin's files, as a zygote's user namespace has them
        self.granted: list[Granted] = []
        self.granted_kinds = ""  # what became of them, as the warden says
        self.on_network: Callable[[dict[str, str]], None] | None = None  # for each network operation of a call
        self.layers: int | None = None  # O_PATH fd of the folder with what the plugin has changed in them
        self.on_opened: Callable[[], None] | None = None
        self.on_renewed: Callable[[], None] | None = None
        self.cut: dict[str, int] = {}  # what became of its links and connections when it was cut off
        self.error: SandboxException | None = None
        self.is_gone = False
        self.left = ""  # what could not be removed
        self.closing = False
        self.on_gone: Callable[[], None] | None = None
        self._lifetime: Timer | None = None
        self._ends_at = float("inf")
        self._renewing: loops.Patience | None = None
        self._leaving: loops.Patience | None = None
        self._unanswered: ResourceError | None = None  # once its warden has to be killed
        self.slot = userids.claim(int(recipe.limits["memory_bytes"]), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        self.leaf: tuple[int, str] | None = None
        self.leaf_fd = -1  # of its cgroup, for a watch
        self.high_is_lifted = False  # memory.high of its cgroup
        self.folder: str | None = None
        self.line = board.Line(self._facts(door), plugin)
        try:
            self._open(wire)
        except BaseException:
            self.clean_up()
            raise

    def _open(self, wire: dict[str, Any]) -> None:
        pairs: list[tuple[_socket.socket, _socket.socket]] = []
        opened: list[int] = []
        ids = self._ids()
        self.owner = tuple(ids["owner"])
        instruction: dict[str, object] = {"sandbox": self.name, "memory": int(self.recipe.limits["memory_bytes"]), **ids}
        try:
            for _ in range(2):
                pairs.append(channel.pair())
            (self.hub, hub_inside), (self.violations, violations_inside) = pairs
            fds = {"hub": hub_inside.fileno(), "violations": violations_inside.fileno(), "lock": self.slot.fd}
            if self.recipe.cgroup is not None:
                parent, own = self._make_leaf()
                self.leaf_fd = own
                fds.update(cgroup_parent=parent, cgroup=own)
                instruction["cgroup"] = self.slot.name
            if self.network is not None:
                fds["network"] = self.network
            if self.recipe.workspace["kind"] == "folder":
                parent = self._make_folder(ids["owner"])
                opened.append(parent)
                fds["folder_parent"] = parent
                instruction["folder"] = self.slot.name
                instruction["folder_path"] = self.folder
            for folder in self.recipe.granted:
                self.granted.append(Granted(str(folder["path"])))
            facts = {"resolved": self.resolved, "granted": [folder.found() for folder in self.granted]}
            if any(facts.values()):  # which the zygote does not read: all sandboxes to come have its memory
                fds["own"] = channel.in_memory(facts)
                opened.append(fds["own"])
            instruction["recipe_number"] = self.zygote.teach(wire)
            instruction["fds"] = list(fds)
            self.hub.setblocking(False)
            self.violations.setblocking(False)
            self.loop.add_reader(self.hub.fileno(), self._hub_readable)
            self.loop.add_reader(self.violations.fileno(), self._violation_readable)
            self.zygote.open(self, instruction, list(fds.values()))
        except BaseException:
            for sock, _ in pairs:
                self.loop.remove_reader(sock.fileno())
                sock.close()
            raise
        finally:
            close_fds(opened)
            for _, inside in pairs:
                inside.close()

    def _facts(self, door: str) -> dict[str, object]:
        """What `psie ps` has of it from its beginning."""
        facts = {"id": self.name, "level": self.recipe.level, "door": door, "since": board.now(), "zygote": self.zygote.pid}
        slot = {"slot": self.slot.number, "lock": self.slot.fd, "place": self.slot.name}
        return {**facts, **slot, "memory": int(self.recipe.limits["memory_bytes"])}

    def _ids(self) -> dict[str, Any]:
        """Where the ids of this sandbox lie on the host, and what the plugin's id is inside."""
        wanted = self.recipe.ids
        if not wanted["allocated"]:
            if wanted["user_namespace"]:
                return {
                    "ids": {"setup": None, "plugin": [1000, 1000]},
                    "uid_map": "1000 0 1",
                    "gid_map": "1000 0 1",
                    "owner": [0, 0],
                }
            own = [0, 0] if self.recipe.outer_user_namespace else [os.getuid(), os.getgid()]
            return {"ids": {"setup": None, "plugin": own}, "owner": own}
        base = userids.id_region(userids.REGION) + userids.IDS_PER_SLOT * self.slot.number
        outside = wanted["outside"] if wanted["outside"] is not None else base + 1
        if wanted["user_namespace"]:
            id_map = f"0 {base} 1\n1000 {outside} 1"
            return {
                "ids": {"setup": [0, 0], "plugin": [1000, 1000]},
                "uid_map": id_map,
                "gid_map": id_map,
                "owner": [outside, outside],
            }
        return {"ids": {"setup": None, "plugin": [outside, outside]}, "owner": [outside, outside]}

    def _make_leaf(self) -> tuple[int, int]:
        """(fd of the parent, fd of the leaf). A leaf of the same slot is a dead sandbox's: the ledger says so."""
        assert self.recipe.cgroup is not None
        settings: dict[str, str] = self.recipe.cgroup["settings"]
        try:
            parent = self.zygote.leaves_in(self.recipe.cgroup)
            self.leaf = parent, self.slot.name
            return parent, leaf.make(*self.leaf, settings)
        except OSError as error:
            self.zygote.forget_leaves()
            if error.errno in SHORT:
                raise ResourceError(f"the sandbox's cgroup cannot be made ({error.strerror}): {mend_of(error.errno)}") from None
            state.distrust()
            raise SandboxInitializationError(
                f"the sandbox's cgroup cannot be made: {error.strerror}",
                line=f"cgroup: {error.filename or 'leaf'}",
                errno=error.errno,
                path=error.filename,
                mend="run psie doctor to see what this host lacks; what it said before is not believed any more",
            ) from None

    def open_workspace(self) -> int:
        """A descriptor of the workspace's root, for reading. Raises OSError before the sandbox is open, and at its end."""
        if self.workspace is None and self.folder is None:
            raise OSError(errno.ENOENT, "the sandbox is not open")
        path, place = (".", self.workspace) if self.folder is None else (self.folder + "/files", None)
        flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return workspace.readable(lambda how: os.open(path, flags | how, dir_fd=place), place)

    def _make_folder(self, owner: list[int]) -> int:
        """The workspace as a folder on disk; returns an fd of its parent."""
        work = os.path.join(state.folder("lib", writable=True), "work")
        os.makedirs(work, mode=0o711, exist_ok=True)
        if not self.zygote.swept:
            self.zygote.swept = True
            sweep.workspaces()
        parent = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        name = self.slot.name
        try:
            workspace.remove_folder(parent, name)
            self.folder = os.path.join(work, name)
            for path in (self.folder, self.folder + "/files"):
                os.mkdir(path, 0o700)
                if os.getuid() == 0:
                    os.chown(path, *owner)
        except BaseException:
            os.close(parent)
            raise
        return parent

    # -- its time --------------------------------------------------------------------------------------------------

    def begin_lifetime(self) -> None:
        """It is in use now, and closed when its lifetime is over, whatever its caller does meanwhile."""
        if not self.closing:
            self._ends_at = loops.monotonic() + self.lifetime
            self._lifetime = self.loop.call_later(self.lifetime, self._expire)

    @property
    def lifetime(self) -> float:
        """Seconds that it may be in use."""
        return float(self.recipe.monitoring["lifetime_minutes"]) * 60

    def seconds_left(self) -> float:
        """Of its lifetime."""
        return max(0.0, self._ends_at - loops.monotonic())

    def _expire(self) -> None:
        self.drain_violations()
        self.fail(self.lifetime_error())

    def lifetime_error(self) -> ResourceLimitExceededError:
        return ResourceLimitExceededError(
            f"the sandbox was open for its whole lifetime of {self.lifetime / 60:g} minutes and was closed: "
            "open a new one, or raise max_sandbox_lifetime_minutes",
            limit="lifetime",
            allowed=self.lifetime,
            used=self.lifetime,
        )

    def expect(self, what: str, after: float = 0.0) -> loops.Patience:
        """Something is to be done by psie's own parts: unless the result is cancelled in time, they are killed."""
        seconds = float(self.recipe.monitoring["watchdog_timeout_seconds"])
        return loops.Patience(self.loop, seconds, lambda: self._give_up(what, seconds), after)

    def _give_up(self, what: str, seconds: float) -> None:
        """Who is at fault shows by the zygote: if it works, it kills the warden, and if not, it is killed itself."""
        if self.is_gone or self._unanswered is not None:
            return
        silent = f"did not answer for {seconds:g} s (watchdog_timeout_seconds) when {what}, and was killed"
        self._unanswered = ResourceError(f"the sandbox's warden {silent}: open a new sandbox")
        error = ResourceError(f"the zygote {silent}: its sandboxes are gone; open new ones")
        if self.zygote.is_warden:
            self.zygote.kill(self._unanswered)
            return
        self.zygote.kill_warden(self.name)
        self.loop.call_later(GRACE, lambda: None if self.is_gone else self.zygote.kill(error))

    # -- calls -----------------------------------------------------------------------------------------------------

    def knows(self, name: str) -> tuple[bool, str]:
        """(whether a plugin may ask for a host of this name, why)"""
        name, access = name.removesuffix(".").lower(), self.recipe.network["access"]
        if name in ("localhost", self.recipe.hostname, os.uname().nodename.lower()):
            return True, "it is this machine"
        if access is None:
            return False, "the network is not permitted"
        if any(host == name for host, _ in access["blocked"]):
            return False, f"{name} is in blocked_hosts"
        if any(host in (name, "*") for host, _ in access["allowed"]):
            return True, f"{name} is allowed"
        return False, "it is not in allowed_hosts"

    def in_turn(self, start: Callable[[], None]) -> None:
        """Have `start` make a call as soon as few enough come up; in a sandbox that has ended it does so at once, and fails."""
        self._turns.append(start)
        self.next_turn()

    def next_turn(self) -> None:
        while self._turns and (self.closing or (self.coming_up < COMING_UP and self._has_room())):
            self._turns.popleft()()

    def _has_room(self) -> bool:
        """Whether the warden has read the most of what it was told, so that it can be told of a call; if not, we go on then."""
        poll = select.poll()
        poll.register(self.hub.fileno(), select.POLLOUT)
        if self._untold or not poll.poll(0):
            self.loop.add_writer(self.hub.fileno(), self._go_on)
            return False
        return True

    def _go_on(self) -> None:
        """The warden has read the most of what it was told."""
        self.loop.remove_writer(self.hub.fileno())
        while self._untold and not self.closing:
            instruction, call = self._untold.popleft()
            if not self._tell_of(call, instruction):
                self._untold.appendleft((instruction, call))
                self.loop.add_writer(self.hub.fileno(), self._go_on)
                return
        self.next_turn()

    def call(self, stdio: Sequence[int], *, tty: bool = False) -> Call:
        """Start a worker that waits for a job; `stdio` are three fds for its standard streams, which stay the caller's."""
        call = Call(self, self.next_call)
        self.next_call += 1
        self.calls[call.number] = call
        if self.error is not None or self.closing:
            call.fail(self.error or ResourceError(CLOSED))
        else:
            call.comes_up = True
            self.coming_up += 1
            times = {"seconds": self.recipe.limits["seconds"], "grace": self.recipe.monitoring["grace_seconds"]}
            fds = [call.inside.fileno(), *stdio]
            if not self._tell({"op": "call", "call": call.number, "tty": tty, **times}, fds):
                self.fail(ResourceError("the sandbox's warden does not read what it is told: open a new sandbox"))
            call.expect("a worker was to stand")
        call.inside.close()
        return call

    def _instruct(self, instruction: dict[str, object], call: Call | None = None) -> None:
        """Tell the warden, where it has not read what came before as soon as it has: of a thousand calls that are to end at
        once its socket holds a few hundred. In a sandbox that is at its end there is nobody to be told."""
        if self.closing:
            return
        if self._untold or not self._tell_of(call, instruction):
            self._untold.append((instruction, call))
            self.loop.add_writer(self.hub.fileno(), self._go_on)

    def _tell_of(self, call: Call | None, instruction: dict[str, object]) -> bool:
        """As `_tell`; with the clock of `call`, if one goes with it."""
        if call is None or call.clock is None:
            return self._tell(instruction)
        if not call.done and not self._tell(instruction, (call.clock.fd,)):
            return False
        call.stands()
        return True

    def _tell(self, instruction: dict[str, object], fds: Sequence[int] = ()) -> bool:
        """False where there is no room for it now."""
        try:
            channel.instruct(self.hub, instruction, fds)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                mend = mend_of(error.errno or 0)
                self.fail(ResourceError(f"the sandbox's warden could not be told what to do ({error.strerror}): {mend}"))
                return True
            while self.error is None and not self.closing and self._hub_readable():
                pass  # why it has gone may be unread still
            self.fail(ResourceError("the sandbox's warden has gone: open a new sandbox"))
        return True

    def _hub_readable(self) -> bool:
        """Read one message; False when there is none now, or will be none."""
        try:
            data, fds, _ = channel.receive_bytes(self.hub, channel.MESSAGE, 2)
        except BlockingIOError:
            return False
        except channel.Malformed:
            data, fds = b"", []
        if not data:
            self.zygote.catch_up()
            # A warden that is just being cloned holds the control socket too: that it is open says nothing.
            died = ZYGOTE_DIED if self.zygote.has_ended() else WARDEN_DIED
            self.fail(self.error or self.killed() or self.zygote.error or self._unanswered or ResourceError(died))
            return False
        try:
            kind, fields = understood(data)
        except channel.Malformed:
            close_fds(fds)
            self.fail(ResourceError(NONSENSE.format("warden")))
            return False
        call = self.calls.get(int(fields.get("call", "0")))
        if kind == "opened" and self.workspace is None:
            self.layers = fds.pop() if len(fds) > 1 else None
            self.workspace = fds.pop() if fds else None
            self.granted_kinds = fields["granted"]
            self.line.opened(int(fields.get("pid", "0")), self.recipe)
            if self.on_opened is not None:
                self.on_opened()
        elif kind == "renewed":
            for folder in self.granted:
                folder.begin()
            if self._renewing is not None:
                self._renewing.cancel()
            if self.on_renewed is not None:
                self.on_renewed()
        elif kind == "cut_off":
            self.cut |= {name: int(fields.get(name, "0")) for name in ("links", "supervised")}
        elif kind == "failed" and call is None:
            self.fail(failed_line(fields))
        elif kind == "failed" and call is not None:
            call.fail(failed_line(fields))
        elif kind == "sealed" and call is not None:
            call.sealed(fields)
        elif kind == "ended" and call is not None:
            del self.calls[call.number]
            call.ended(fields)
        close_fds(fds)
        return True

    def _violation_readable(self) -> None:
        try:
            data, fds, _ = channel.receive_bytes(self.violations, channel.MESSAGE)
            close_fds(fds)
        except BlockingIOError:
            return
        except channel.Malformed:
            data = b""
        if not data:
            self.loop.remove_reader(self.violations.fileno())
            return
        self._supervised(data)

    def _supervised(self, data: bytes) -> None:
        """One message of the supervisor."""
        try:
            kind, fields = understood(data)
        except channel.Malformed:
            self.fail(ResourceError(NONSENSE.format("supervisor")))
            return
        call = self.calls.get(int(fields.get("call", "0")))
        if kind == "cut_off":
            self.cut["connections"] = int(fields.get("connections", "0"))
        elif kind == "violation" and call is not None:
            call.violation(fields)
        elif kind == "network" and self.on_network is not None:
            self.on_network(fields)

    def drain_violations(self) -> None:
        """Read what the supervisor has said so far: it speaks before it answers, so nothing of an ended call is missing."""
        while self.violations.fileno() >= 0:
            try:
                data, fds, _ = channel.receive_bytes(self.violations, channel.MESSAGE)
            except (OSError, channel.Malformed):
                return
            close_fds(fds)
            if not data:
                return
            self._supervised(data)

    def killed(self) -> SandboxKilledError | None:
        """Whether somebody has ended it from outside: its warden does not live to tell."""
        by = self.line.mark()
        return SandboxKilledError(f"the sandbox was killed by {by}", by=by) if by else None

    def fail(self, error: SandboxException) -> None:
        """Nothing of it works any more; its calls end with `error`."""
        if self.error is None:
            self.error = error
        for call in list(self.calls.values()):
            call.fail(error)
        self.calls.clear()
        self.close()

    def close(self) -> None:
        """End every call and let the warden leave; `on_gone` tells when all of it has gone."""
        if self.closing:
            return
        self.closing = True
        self.line.tell(board.CLOSING)
        if self._lifetime is not None:
            self._lifetime.cancel()
        self._leaving = self.expect("it was to leave")
        for sock in (self.hub, self.violations):
            if sock.fileno() >= 0:
                self.loop.remove_reader(sock.fileno())
                self.loop.remove_writer(sock.fileno())
                hang_up(sock)
        self._untold.clear()
        for fd in (self.workspace, self.layers):
            if fd is not None:
                os.close(fd)
        self.workspace = self.layers = None
        for folder in self.granted:
            folder.close()
        self.next_turn()

    def cut_off(self) -> None:
        """Have its links taken down and every connection ended and refused from now on; `cut` tells when that has been done:
        then it has `links`, and `connections` if `supervised` is 1."""
        self.cut.clear()
        self._instruct({"op": "cut_off"})

    def renew(self, *, keep: bool) -> None:
        """Have granted folders attached anew, and what was changed in them forgotten unless `keep`; running calls end.

        `on_renewed` tells when that has been done.
        """
        self._instruct({"op": "renew", "keep": keep})
        self._renewing = self.expect("granted folders were to be attached anew")

    def gone(self) -> None:
        """The warden has seen the end of it or has died, and the zygote has removed leaf and folder."""
        if self.is_gone:
            return
        while not self.closing and self._hub_readable():
            pass  # what the warden has said last may be unread still
        self.is_gone = True
        if not self.closing and self.error is None:
            self.error = self.killed() or self._unanswered or ResourceError(WARDEN_DIED)
        self.close()
        if self._leaving is not None:
            self._leaving.cancel()
        self.line.forget()
        self.slot.release(for_all=True)
        self._close_leaf_fd()
        if self.leaf is not None:
            os.close(self.leaf[0])
            self.leaf = None
        for call in list(self.calls.values()):
            call.fail(self.error or ResourceError(CLOSED))
        if self.on_gone is not None:
            self.on_gone()

    def clean_up(self) -> None:
        """Remove leaf and folder ourselves: there is no zygote to do it."""
        for folder in self.granted:
            folder.close()
        try:
            self._remove_places()
        except OSError as error:
            self.left = f"{error.filename}: {error.strerror}"
        self.line.forget()
        self.slot.release()

    def lift_high(self) -> None:
        """Whoever is above memory.high, the warning threshold, stands still until somebody who watches lifts it: after its
        warning, or where nobody can watch."""
        if self.leaf_fd < 0 or self.high_is_lifted or "memory.high" not in (self.recipe.cgroup or {}).get("settings", {}):
            return
        try:
            leaf.write(self.leaf_fd, "memory.high", "max")
        except OSError:
            return  # it has gone, or there is no descriptor left: the watch is tried again
        self.high_is_lifted = True

    def _close_leaf_fd(self) -> None:
        if self.leaf_fd >= 0:
            os.close(self.leaf_fd)
            self.leaf_fd = -1

    def _remove_places(self) -> None:
        self._close_leaf_fd()
        try:
            if self.leaf is not None:
                try:
                    leaf.remove(*self.leaf)
                finally:
                    os.close(self.leaf[0])
                    self.leaf = None
        finally:
            if self.folder is not None:
                parent = os.open(os.path.dirname(self.folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    workspace.remove_folder(parent, os.path.basename(self.folder))
                finally:
                    os.close(parent)


class Answer:
    """What a session has said to one request: a complete reply, as a Call has it in the end."""

    def __init__(self, call: Call) -> None:
        self.sandbox = call.sandbox
        self.number = call.number
        self.source_file = call.source_file
        self.reply_kind = call.reply_kind
        self.reply = call.reply
        self.reply_complete = call.reply_complete
        self.passing = call.passing


class Call:
    """One call: from a worker that waits for a job to its reply and its end.

    `on_sealed(call)` when the worker stands, has been read back and is timed; `on_done(call)` when everything of it has gone:
    then `error` or `outcome`, `reply` and `violations` tell what happened.
    """

    def __init__(self, sandbox: Sandbox, number: int) -> None:
        self.sandbox = sandbox
        self.loop = sandbox.loop
        self.number = number
        self.job, self.inside = channel.pair()
        self.job.setblocking(False)
        self.read_back: dict[str, str] | None = None
        self.error: SandboxException | None = None
        self.outcome: dict[str, str] | None = None
        # Why the host itself ended it: output, result, violations, file_operations, recovery, cancelled
        self.cause = ""
        self.is_ending = False  # the warden has been told to end it
        self.comes_up = False
        self.recovered: SandboxViolation | None = None  # from which, where recovery is the cause
        self.file_operations = 0  # where that is the cause
        self.hidden = ""  # a folder in which nobody could count them, where that is
        self.reply_kind = b""
        self.reply: bytes | bytearray | memoryview = bytearray()
        self.reply_complete = False
        self.strays = 0  # frames that belong to no reply
        self.notes = 0  # about files and names
        self.wishes: dict[tuple[str, str], dict[str, str]] | None = None  # None: nobody has asked the worker to tell of them
        self.reply_limit = int(sandbox.recipe.limits["result_bytes"])
        self.reply_size = 0
        self.violations: dict[tuple[str, str], dict[str, str]] = {}
        # How many different ones may end a call, or have its changes not kept, and how many refusals they stand for. Files that
        # the interpreter was refused are none, nor names: harmless programs look where they may not, and go on.
        self.refused_calls = self.refused_imports = 0
        self.refusals = 0
        self.passing: dict[str, str] | None = None  # a refusal that is none of the plugin's making, unless it ends by it
        self.on_sealed: Callable[[Call], None] | None = None
        self.on_done: Callable[[Call], None] | None = None
        self.on_violation: Callable[[Call, dict[str, str]], None] | None = None
        self.on_reply: Callable[[Call], None] | None = None  # of a session: for each reply
        self.is_session = False
        seconds = float(sandbox.recipe.limits["seconds"])
        self.clock: Clock | None = None  # once the worker stands
        self.seconds = seconds + float(sandbox.recipe.monitoring["grace_seconds"])  # that a call may take
        self.due = float("inf")  # when what it does now is to have ended, monotonic
        self.has_job = False
        self.awaits = False  # a reply: what comes else is nobody's
        self.source_file = ""  # a file of the caller's own, of which the sandbox cannot show lines in a traceback
        self.done = False
        self._memory, self._memory_size = -1, 0  # fd of the file in which the value will be, if it is large; its bytes
        self._lent: list[int] = []  # fds of a session's large jobs: see sandbox.engine.channel
        self._waiting: loops.Patience | None = None  # for the warden
        self._left: bytes | None = None  # a frame that was read there and is to be read here
        self._is_deaf = False  # the worker has ended what it says there, or is not listened to any more
        self.is_lent = False  # the job's socket, to its caller's loop, which reads it and has to give it back: see `lend`

    def sealed(self, fields: dict[str, str]) -> None:
        try:
            different = differences(self.sandbox.recipe.protections, fields)
            if different:
                name, (wanted, seen) = next(iter(different.items()))
                raise SandboxInitializationError(
                    f"a protection does not hold in the running sandbox: {name} is {seen!r}, not {wanted!r}",
                    protection=name,
                    mend="report this as a bug of psie; nothing has run",
                )
        except SandboxInitializationError as error:
            self.kill("read-back")
            self.fail(error)
            return
        fields["granted"] = self.sandbox.granted_kinds
        self.read_back = fields
        from sandbox.engine.clock import Clock  # while a worker comes up the command has had time to import it

        try:
            self.clock = Clock(float(self.sandbox.recipe.limits["seconds"]))
        except OSError as error:
            self.kill("failed")
            self.fail(ResourceError(f"a call has no clock ({error.strerror}): {mend_of(error.errno or 0)}"))
            return
        self.sandbox._instruct({"op": "clock", "call": self.number}, self)

    def stands(self) -> None:
        """Its warden has been given its clock, so it can have a job: however soon we are stopped, its time is kept."""
        if self.done:
            return  # to tell that has shown that the warden has died
        if self._waiting is not None:
            self._waiting.cancel()
        self._has_come_up()
        if self.on_sealed is not None:
            self.on_sealed(self)

    def _has_come_up(self) -> None:
        """It stands, or never will: another one's turn."""
        if self.comes_up:
            self.comes_up = False
            self.sandbox.coming_up -= 1
            self.sandbox.next_turn()

    def send_job(self, instruction: dict[str, object], payload: bytes) -> None:
        """Let the worker begin, if it is there; now its time counts. Its reply is read here, unless the socket is lent."""
        if self.done:
            return
        self._begin_time()
        self._hand_over(instruction, payload)
        if not self.cause:
            self.expect("a call was to end", self.seconds)
            self.has_job = self.awaits = True
            self.sandbox.line.tell(board.RUNNING)
        if not self.is_lent:
            self._listen()

    def _begin_time(self) -> None:
        assert self.clock is not None
        self.clock.begin()
        self.due = monotonic() + float(self.sandbox.recipe.limits["seconds"])

    def lend(self) -> None:
        """Let the caller's loop look into the job's socket for the first frame of the reply, so that a value which is no more
        than that need not pass through ours. It closes nothing, and gives the socket back by `give_back`."""
        if not self.done and not self.is_lent and self.job.fileno() >= 0:
            self.loop.remove_reader(self.job.fileno())
            self.is_lent = True

    def give_back(self) -> None:
        """The job's socket is ours again, and what was read there and not taken."""
        self.is_lent = False
        if self.done:
            self._close_job()
        elif not self.reply_complete:
            self.listen_too()

    def listen_too(self) -> None:
        """Whoever has it lent need not have the time to."""
        self._read_left()
        self._listen()

    def take_value(self, frame: bytes, *, unless: bool) -> bool:
        """Take a frame that is the whole reply, and a value; every other one is left to us, and all `unless` that is False."""
        if unless or not self._is_value(frame):
            self._left = frame
            return False
        self.reply_kind, self.reply, self.reply_complete = channel.REPLY_VALUE, frame[1:], True
        self.reply_size = len(self.reply)
        return True

    def _is_value(self, frame: bytes) -> bool:
        is_heard = self.awaits and not self._is_deaf and self._memory < 0
        is_first = is_heard and not self.reply_kind and not self.strays and self._left is None
        return is_first and len(frame) > 1 and frame[:1] == WHOLE_VALUE and len(frame) - 1 <= self.reply_limit

    def _listen(self) -> None:
        if not self.done and self.job.fileno() >= 0:
            self.loop.add_reader(self.job.fileno(), self._job_readable)

    def begin_session(self, instruction: dict[str, object], payload: bytes) -> None:
        """Let the worker begin a session: it prepares itself, and serves requests until `end_session`.

        Its preparation and each request may take as long as a call. `on_reply(call)` when a reply is complete: take it by
        `next_reply`.
        """
        self.is_session = True
        self.sandbox._instruct({"op": "session", "call": self.number})
        self.send_job(instruction, payload)

    def request(self, instruction: dict[str, object], payload: bytes) -> None:
        """The session is to do this next; nothing if it has ended. What was asked before must have been answered."""
        if self.awaits and not self.done:
            self.kill("cancelled")  # its answer would be taken for that of this request
        elif not self.done and self.job.fileno() < 0:
            text = "the session's process has closed the socket that it is asked by, or sent too much there unasked"
            self.error = self.error or PluginExecutionError(text)
            self.kill("failed")
        elif not self.done:
            self._begin_time()
            self.expect("a call was to end", self.seconds)
            self.awaits = True
            self.sandbox.line.tell(board.RUNNING)
            self._hand_over(instruction, payload)

    def next_reply(self) -> Answer:
        """The reply that is complete; the next one may come."""
        assert self.clock is not None
        self.clock.rest()
        if self._waiting is not None:
            self._waiting.cancel()
        answer = Answer(self)
        self.awaits = False
        self.sandbox.line.tell(board.IDLE)
        self.reply_kind, self.reply, self.reply_complete, self.reply_size = b"", bytearray(), False, 0
        self._forget_memory()
        self.passing = None
        return answer

    def end_session(self) -> None:
        """There is no further request: it ends as a program does, for which it has as long as for one."""
        if not self.done:
            assert self.clock is not None
            self.clock.begin()
            self.expect("a call was to end", self.seconds)
            self._close_job()

    def _hand_over(self, instruction: dict[str, object], payload: bytes) -> None:
        """In one message what fits into one, and else in a memory file."""
        memory: list[int] = []
        try:
            message = channel.job(instruction, payload) if len(payload) <= channel.SMALL else b""
            if 0 < len(message) <= channel.SMALL:
                channel.send_bytes(self.job, message)
                return
            header = marshal.dumps(instruction)
            size = len(header) + len(payload)
            if self.is_session:
                self._lent.append(channel.shared(size, lent=True))
                channel.write(self._lent[-1], (header, payload))
            else:
                memory.append(channel.sealed((header, payload)))
            channel.send_bytes(self.job, channel.large_job(len(header), size), [*memory, *self._lent])
        except OSError as error:
            self._unsent(error)
        finally:
            close_fds(memory)

    def _unsent(self, error: OSError) -> None:
        """The worker has ended already, which is reported; or it would wait for a job that never comes."""
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            if self.error is None:
                self.error = ResourceError(
                    f"a sandbox could not be given its job ({error.strerror}): {mend_of(error.errno or 0)}"
                )
            self.kill("failed")

    def expect(self, what: str, after: float = 0.0) -> None:
        """The warden is to do this next; if it does not, the whole sandbox goes."""
        if self._waiting is not None:
            self._waiting.cancel()
        if not self.done:
            self._waiting = self.sandbox.expect(what, after)

    def _job_readable(self) -> None:
        self._read_left()
        if self.job.fileno() < 0:
            return
        try:
            data = channel.receive_frame(self.job)
        except BlockingIOError:
            return
        self._read(data)

    def _read(self, data: bytes) -> None:
        if data:
            self._frame(data[:1], data[1:])
        else:
            self._close_job()

    def _frame(self, kind: bytes, data: bytes) -> None:
        """One frame of the reply. What belongs to no reply is nobody's; who sends much of it is not listened to any more."""
        last, kind = kind.isupper(), kind.lower()
        if self._is_deaf or (kind == channel.NOTE and self._note(data)):
            return
        if kind == channel.REPLY_SIZE and self._give_memory(data):
            return
        known = kind in (channel.REPLY_VALUE, channel.REPLY_ERROR, channel.REPLY_UNFIT)
        if self.reply_complete or not self.awaits or not known or self.reply_kind not in (b"", kind) or not (data or last):
            self.strays += 1
            if self.strays > STRAYS:
                self._close_job()
            return
        self.reply_kind = kind
        if self._memory >= 0 and kind == channel.REPLY_VALUE:
            self._take_memory(data)
            data, last = b"", True
        self.reply_size += len(data)
        most = self.reply_limit if kind == channel.REPLY_VALUE else channel.REPLY_TEXT
        if self.reply_size > most:
            self.reply = bytearray()
            if not self.cause:
                self.kill("result")
            return
        if isinstance(self.reply, bytearray):
            self.reply += data
        self.reply_complete = last
        if last and self.on_reply is not None:
            self.on_reply(self)

    def _give_memory(self, data: bytes) -> bool:
        """The worker has a large value, and asks for memory to put it into. False where that makes no sense."""
        if len(data) != channel.SIZE.size or self.reply_kind or self._memory >= 0 or not self.awaits or self.done:
            return False
        (size,) = channel.SIZE.unpack(data)
        if size <= channel.FRAME:
            return False
        if size > self.reply_limit:
            self.reply_size = size
            if not self.cause:
                self.kill("result")
            return True
        try:
            self._memory = channel.shared(size + channel.ALIGNMENT, lent=self.is_session)
            self._memory_size = size
            channel.instruct(self.job, {}, [self._memory])
        except OSError as error:
            self._unsent(error)
        return True

    def _take_memory(self, place: bytes) -> None:
        """The value is in its memory, from `place` on, and nobody changes it any more; no value where that is not so."""
        from sandbox.ns import syscalls as sc

        try:
            if not self.is_session:
                channel.seal(self._memory)
            if len(place) == 1 and place[0] < channel.ALIGNMENT:
                take = channel.copied if self.is_session else sc.map_privately
                taken = take(self._memory, self._memory_size + channel.ALIGNMENT)
                self.reply = taken[place[0] : place[0] + self._memory_size]
                self.reply_size = self._memory_size
        except OSError:
            pass  # somebody in the sandbox has it mapped still
        self._forget_memory()

    def _forget_memory(self) -> None:
        if self._memory >= 0:
            (channel.take_back if self.is_session else os.close)(self._memory)
            self._memory = -1
        while self._lent:
            channel.take_back(self._lent.pop())

    def _note(self, data: bytes) -> bool:
        """What the interpreter has refused: a record like the kernel's, which the plugin could forge or leave out."""
        try:
            kind, fields = channel.unpack(data)
        except channel.Malformed:
            return False
        where = {"file": fields.get("file", "")[:TEXT], "line": fields.get("line", "")[:TEXT]}
        if kind == "asked":
            return self._name_note(fields, where)
        if kind == "wanted":
            return self._wish_note(fields, where)
        if kind == "refused" and "operation" in fields:
            return self._file_note(fields, where)
        module, which = fields.get("module", "")[:TEXT], fields.get("list")
        if kind != "refused" or not module or which not in ("allowed_modules", "blocked_modules"):
            return False
        known = self.violations.get((which, module))
        count = int(known["count"]) + 1 if known is not None else 1
        self.violation({"nr": which, "arg0": module, **where, "count": str(count), "call": str(self.number)})
        return True

    def _file_note(self, fields: dict[str, str], where: dict[str, str]) -> bool:
        operation, path, number = fields["operation"], fields.get("path", "")[:TEXT], fields.get("errno", "")
        count = fields.get("count", "")
        self.notes += 1
        fits = operation in channel.FILE_OPERATIONS and number in FILE_ERRORS and path
        if not fits or not is_number(count, 1 << 23) or self.notes > NOTES:
            return False
        what = {"operation": operation, "path": path, "errno": FILE_ERRORS[number]}
        self.violation({"nr": FILE, "arg0": " ".join(what.values()), **what, **where, "count": count, "call": str(self.number)})
        return True

    def _wish_note(self, fields: dict[str, str], where: dict[str, str]) -> bool:
        """A file that is not there for the plugin, as sandbox.engine.wishes tells it: the plugin's word."""
        what, path, count = fields.get("wish", ""), fields.get("path", "")[:TEXT], fields.get("count", "")
        self.notes += 1
        if self.wishes is None or what not in channel.WISHES or not path:
            return False
        if not is_number(count, 1 << 23) or self.notes > NOTES or len(self.wishes) >= STRAYS:
            return False
        self.wishes[what, path] = {"wish": what, "path": path, "count": count, **where}
        return True

    def _name_note(self, fields: dict[str, str], where: dict[str, str]) -> bool:
        host, port, count = fields.get("host", "")[:TEXT], fields.get("port", ""), fields.get("count", "")
        self.notes += 1
        if not host or self.notes > NOTES or not is_number(port, 65535) or not is_number(count, 1 << 23):
            return False
        allowed, reason = self.sandbox.knows(host)
        what = {"operation": "resolve", "address": host, "port": port, "reason": reason, "allowed": str(int(allowed))}
        if self.sandbox.on_network is not None:
            more = {"family": "", "kind": "", "pid": "0", "time": str(time()), "count": count, "call": str(self.number)}
            self.sandbox.on_network({**what, **more})
        if not allowed:
            self.violation({"nr": NAME, "arg0": f"{host}:{port}", **what, **where, "count": count, "call": str(self.number)})
        return True

    def _read_left(self) -> None:
        frame, self._left = self._left, None
        if frame is not None:
            self._read(frame)

    def _drain_job(self) -> None:
        self._read_left()
        while self.job.fileno() >= 0:
            try:
                data = channel.receive_frame(self.job)
            except BlockingIOError:
                return
            if not data:
                return
            self._frame(data[:1], data[1:])

    def _close_job(self) -> None:
        self._is_deaf = True  # what else it has sent is in the socket still while that is lent
        if self.job.fileno() >= 0:
            self.loop.remove_reader(self.job.fileno())
            (shut_down if self.is_lent else hang_up)(self.job)  # what is lent is closed when it is given back

    def violation(self, fields: dict[str, str]) -> None:
        if fields.get("passing") == "1":
            self.passing = fields
            return
        key = fields["nr"], fields["arg0"] if fields["nr"] in TOLD else where_to(fields) or fields["arg0"]
        known = self.violations.get(key)
        is_new = known is None
        self.violations[key] = fields
        if fields["nr"] not in TOLD:
            if "offences" in fields:
                self.refused_calls = int(fields["offences"])
            else:
                self.refused_imports += is_new
            self.refusals += int(fields["count"]) - (int(known["count"]) if known is not None else 0)
        if is_new and self.on_violation is not None:
            self.on_violation(self, fields)
        if self.refusals >= REFUSALS or self.offences > self.sandbox.recipe.monitoring["violation_threshold"]:
            self.kill("violations")

    @property
    def offences(self) -> int:
        """Different violations, of those that may end the call. (The supervisor counts its own: it stops answering.)"""
        return self.refused_calls + self.refused_imports

    @property
    def is_running(self) -> bool:
        """Whether it has been given a job, and has not ended."""
        return self.has_job and not self.done

    def is_overdue(self) -> bool:
        """Whether its time is over: then the warden has told it to end, or is about to."""
        return monotonic() >= self.due

    def kill(self, cause: str) -> None:
        """End everything of the call now; `on_done` tells when it has gone."""
        self.cause = self.cause or cause
        if not self.done and not self.sandbox.closing and not self.is_ending:
            self.is_ending = True  # once is enough: of a flood of reasons the warden would read all
            self.sandbox._instruct({"op": "kill", "call": self.number, "cause": cause})
            self.expect("a call was to end")

    def signal(self, number: int) -> None:
        """Send a signal to the worker."""
        if not self.done and not self.sandbox.closing:
            self.sandbox._instruct({"op": "signal", "call": self.number, "signal": number})

    def ended(self, fields: dict[str, str]) -> None:
        self.sandbox.calls[self.number] = self
        self.sandbox.drain_violations()
        self.sandbox.calls.pop(self.number, None)
        self._drain_job()
        self.outcome = fields
        self._finish()

    def fail(self, error: SandboxException) -> None:
        """It ends with `error`, or rather its own copy: others may end with the same one, and whoever raises it adds to it."""
        from copy import copy

        if self.error is None:
            self.error = copy(error)
        self._finish()

    def _finish(self) -> None:
        if self.done:
            return
        self.done = True
        self.sandbox.calls.pop(self.number, None)  # of one whose worker never was nothing more is told
        self._has_come_up()
        if self.has_job and not any(call.is_running for call in self.sandbox.calls.values()):
            self.sandbox.line.tell(board.IDLE)
        self._close_job()
        self._forget_memory()
        if self.clock is not None:
            self.clock.close()
        if self._waiting is not None:
            self._waiting.cancel()
        if self.on_done is not None:
            self.on_done(self)


def where_to(fields: dict[str, str]) -> str:
    """What a refused network operation was about; "" for another."""
    return " ".join(fields.get(name, "") for name in ("family", "kind", "address", "port")).strip()


_wires: dict[str, dict[str, Any]] = {}
WIRES = 64  # different recipes of a process that are kept in their wire form


def wire_form(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that warden, init and worker carry out, as an instruction, with compiled filter and request.

    Equal recipes have one and the same wire form, so that a zygote learns each only once.
    """
    key = repr(recipe)
    wire = _wires.get(key)
    if wire is None:
        if len(_wires) >= WIRES:
            _wires.clear()
        wire = _wires[key] = _wire_form(recipe)
    return wire


def _wire_form(recipe: Recipe) -> dict[str, Any]:
    from sandbox.seccomp import filter as seccomp_filter

    seccomp = recipe.seccomp
    program = seccomp_filter.cached_profile(
        str(seccomp["profile"]),
        allow_subprocess=bool(seccomp["allow_subprocess"]),
        allow_threads=bool(seccomp["allow_threads"]),
        sockets=bool(seccomp["sockets"]),
        allow_metadata=bool(seccomp["allow_metadata"]),
        allow_uncounted_memory=bool(seccomp["allow_uncounted_memory"]),
        allow_truncate=bool(seccomp["allow_truncate"]),
        allow_ioctls=bool(seccomp["allow_ioctls"]),
    )
    network = dict(recipe.network)
    if network["mode"] == "veth":
        network["request"] = link_request()
    return {
        "namespaces": list(recipe.namespaces),
        "sandbox_mounts": recipe.sandbox_mounts,
        "call_mounts": recipe.call_mounts,
        "workspace": recipe.workspace,
        "granted": recipe.granted,
        "ids_allocated": recipe.ids["allocated"],
        "network": network,
        "hostname": recipe.hostname,
        "environment": recipe.environment,
        "rlimits": recipe.rlimits,
        # Where no memory controller counts it, the warden does.
        "controllers": (recipe.cgroup or {}).get("controllers", []),
        "pids_max": int((recipe.cgroup or {}).get("settings", {}).get("pids.max", 0)),
        "memory_sampled": None if "memory" in (recipe.cgroup or {}).get("controllers", ()) else recipe.limits["memory_bytes"],
        "landlock": recipe.landlock,
        "violation_threshold": recipe.monitoring["violation_threshold"],
        "watches_refusals": recipe.monitoring["recording"] == "events",
        "seccomp": {"profile": seccomp["profile"], "bpf": program},
    }


def link_request() -> bytes:
    """The encoded request for a veth, from the cache or from the net helper."""
    cache = state.Cache("link")
    request = cache.read("veth")
    if request is None:
        import subprocess

        own_path = [spawn.ROOT, *sys.path]
        code = f"import sys; sys.path[:0] = {own_path!r}; from sandbox.engine.nethelper import main; main()"
        helper = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
        if helper.returncode:
            raise ResourceError(f"pyroute2 cannot encode a link: {helper.stderr.strip().splitlines()[-1:]}; reinstall pyroute2")
        request = bytes.fromhex(helper.stdout)
        cache.write("veth", request)
    return request
