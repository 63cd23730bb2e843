"""The zygote: a clean, single-threaded Python that forks sandboxes, so that no call pays for starting an interpreter.

Executed once per (interpreter, preload, template) by `python -I -S -c`; serves one caller and dies with it. It holds the
template mount tree, clones a warden for each sandbox, and does the last cleaning when the caller has gone.
Rootless it is executed *inside* an outer user namespace: after a mere unshare(2) the kernel would keep the memory's old
user namespace and refuse the read-back of a worker.

Who dies when whom is killed:

============ ============================================ ===========================================================
killed       notices                                      dies
============ ============================================ ===========================================================
caller       zygote: pidfd; wardens: hub closes           wardens end their calls and leave, or are killed after GRACE;
                                                          the zygote removes cgroup leaves and folders, then exits
zygote       kernel: PDEATHSIG of warden                  wardens, and with them all below (next line); the caller
                                                          sees the control socket close and removes the leaves
warden       kernel: PDEATHSIG of supervisor and of init  supervisor, inits; the caller sees the hub close
supervisor   warden: pidfd of the supervisor (there is    warden kills every init, reports it, exits
             one once something has been refused)
init         kernel: end of the PID namespace; without    every process of the call; warden reports the end
             one PDEATHSIG of the worker and cgroup.kill
worker       init: waitid                                 init reports the status and exits, which ends the namespace
caller and   kernel, as above                             all processes; but the cgroup leaf and a workspace on disk stay
zygote                                                    until the next sandbox takes that place of the ledger
net helper   -                                            nothing: its message is cached, its namespace is held by a
                                                          socket of the zygote
============ ============================================ ===========================================================

Must not import anything heavy, and nothing of the host's side.
"""

from __future__ import annotations

import _signal as signal
import _socket
import builtins
import errno
import gc
import io
import os
import select
import sys

from sandbox.cgroups import leaf
from sandbox.engine import channel, forkhooks, warden
from sandbox.ns import mounts, network, workspace
from sandbox.ns import syscalls as sc

CONTROL = 3  # the socket to the caller
CALLER = 4  # a pidfd of the caller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Looked up once, here, where libseccomp's table can still be reached.
CALLS = (
    *("clone3", "pivot_root", "open_tree", "move_mount", "mount_setattr", "seccomp"),
    *("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"),
)
# Seconds that the wardens get to end by themselves when the caller has gone.
GRACE = 0.5


def prepare_interpreter(path: list[str], prefix: str, modules: list[str]) -> None:
    """What `site` would have done, without running any file that a .pth or sitecustomize names; then the preloads."""
    sys.path[:] = path
    sys.prefix = sys.exec_prefix = prefix
    import _sitebuiltins

    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    builtins.help = _sitebuiltins._Helper()
    forkhooks.begin()
    for module in modules:
        __import__(module)
    forkhooks.end()
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a preloaded module has started a thread: a process with threads cannot be forked safely")


def open_streams() -> None:
    """sys.stdin, stdout and stderr as a Python has them whose standard streams are pipes; workers inherit the objects.

    They are made on pipes, because a file object remembers whether its descriptor could seek.
    """
    saved = [os.dup(fd) for fd in (0, 1, 2)]
    reader, writer = os.pipe()
    for (name, mode, errors), fd, end in zip(
        (("stdin", "r", "surrogateescape"), ("stdout", "w", "surrogateescape"), ("stderr", "w", "backslashreplace")),
        (0, 1, 2),
        (reader, writer, writer),
        strict=True,
    ):
        os.dup2(end, fd)
        raw = open(fd, mode + "b", closefd=False)  # noqa: SIM115  (it lives as long as the process)
        stream = io.TextIOWrapper(raw, "utf-8", errors, line_buffering=fd == 2)
        stream.mode = mode  # type: ignore[misc]  # as CPython sets it at its start
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for fd, before in enumerate(saved):
        os.dup2(before, fd)
    for fd in (*saved, reader, writer):
        os.close(fd)


def set_environment(variables: dict[str, str]) -> None:
    """That of the workers to come. The preloads had their own, with one thread each."""
    os.environ.clear()
    os.environ.update(variables)


def freeze() -> None:
    """What exists now is never collected, and so never written to, in any child; a worker turns the collector on again.

    Without a collection first: the holes it would leave are pages that every child then writes to and copies.
    """
    gc.disable()
    gc.freeze()


def mount_namespace_of(pid: int) -> int | None:
    """An fd of the mount namespace of a child; None if the child has ended already."""
    try:
        return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def anonymous_memory() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Sandbox:
    """What the zygote keeps of one sandbox: its warden, and what has to be removed when all of it has gone."""

    def __init__(
        self,
        name: str,
        pid: int,
        pidfd: int,
        leaf: tuple[int, str] | None,
        folder: tuple[int, str] | None,
        mounts_fd: int | None,
    ) -> None:
        self.name = name
        self.pid = pid
        self.pidfd = pidfd
        self.leaf = leaf  # (fd of the parent cgroup, name)
        self.folder = folder  # (fd of the parent folder, name)
        self.mounts = mounts_fd  # held until the warden's end has been told: tearing it down takes a millisecond


class Zygote:
    def __init__(self) -> None:
        self.control = channel.from_fd(CONTROL)
        self.baseline = 0  # bytes of anonymous memory that every child shares with us at first
        self.recipes: dict[int, dict[str, Any]] = {}
        self.host_namespace: int | None = None
        self.link_socket: _socket.socket | None = None
        self.sandboxes: dict[int, Sandbox] = {}  # by the warden's pidfd
        self.poll = select.poll()

    def set_up(self, instruction: dict[str, Any]) -> None:
        try:
            prepare_interpreter(instruction["path"], instruction["prefix"], instruction["modules"])
        except Exception as error:
            raise mounts.LineFailed("zygote: preload", ValueError(f"{type(error).__name__}: {error}")) from None
        open_streams()
        set_environment(instruction["environment"])
        sc.resolve(*CALLS)
        # The memory keeps the outer user namespace as its owner; not dumpable, nobody of the same id may look into it.
        sc.prctl(sc.PR_SET_DUMPABLE, 0)
        if instruction["link"]:
            try:
                self.link_socket = network.helper_namespace()
            except OSError as error:
                raise mounts.LineFailed("zygote: network namespace of the link's outer end", error) from None
        template = instruction["template"]
        if template is not None:
            try:
                self.host_namespace = mounts.own_namespace()
            except OSError as error:
                raise mounts.LineFailed("zygote: mount namespace", error) from None
            mounts.build_template(template["lines"], pivot=template["pivot"])
        freeze()
        self.baseline = anonymous_memory()
        channel.send(self.control, "ready", {})

    def open(self, instruction: dict[str, Any], fds: list[int]) -> None:
        """Clone a warden; the fds are: hub, violations, slot lock or cgroup parent and leaf or folder, as `fds` names them."""
        given = dict(zip(instruction["fds"], fds, strict=True))
        recipe = self.recipes[instruction["recipe_number"]]
        own_pid = os.getpid()
        try:
            pid, pidfd = sc.clone3(sc.CLONE_NEWNS if instruction["mount_namespace"] else 0)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            self.report_failure(mounts.LineFailed("sandbox: clone of the warden", error), instruction["sandbox"])
            return
        if pid == 0:
            instruction.update(zygote=own_pid, baseline=self.baseline)
            warden.run(recipe, instruction, given, self.host_namespace, self.link_socket)
        leaf = (given.pop("cgroup_parent"), instruction["cgroup"]) if "cgroup_parent" in given else None
        folder = (given.pop("folder_parent"), instruction["folder"]) if "folder_parent" in given else None
        for fd in given.values():
            os.close(fd)
        mounts_fd = mount_namespace_of(pid) if instruction["mount_namespace"] else None
        self.sandboxes[pidfd] = Sandbox(instruction["sandbox"], pid, pidfd, leaf, folder, mounts_fd)
        self.poll.register(pidfd, select.POLLIN)

    def report_failure(self, failure: mounts.LineFailed, sandbox: str = "") -> None:
        fields = {"line": failure.line, "errno": failure.errno, "path": failure.path, "text": failure.text, "sandbox": sandbox}
        channel.send(self.control, "failed", fields)

    def reap(self, pid: int) -> None:
        """Reap the warden `pid`, and what a killed warden has left to us: we are a child subreaper."""
        os.waitpid(pid, 0)
        wardens = {sandbox.pid for sandbox in self.sandboxes.values()}
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid in wardens:
                return  # a warden's own turn comes with its pidfd
            os.waitpid(found.si_pid, 0)

    def buried(self, pidfd: int) -> None:
        """A warden has gone, and all below it: reap it and remove what was its."""
        sandbox = self.sandboxes.pop(pidfd)
        self.poll.unregister(pidfd)
        self.reap(sandbox.pid)
        os.close(pidfd)
        left = ""
        try:
            if sandbox.leaf:
                leaf.remove(*sandbox.leaf)
            if sandbox.folder:
                workspace.remove_folder(*sandbox.folder)
        except OSError as error:
            left = f"{error.filename or 'a folder or cgroup of the sandbox'}: {error.strerror}"
        for place in (sandbox.leaf, sandbox.folder):
            if place:
                os.close(place[0])
        try:
            channel.send(self.control, "closed", {"sandbox": sandbox.name, "left": left})
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise
        if sandbox.mounts is not None:
            os.close(sandbox.mounts)

    def serve(self) -> None:
        self.poll.register(CONTROL, select.POLLIN)
        self.poll.register(CALLER, select.POLLIN)
        while True:
            for fd, _ in self.poll.poll():
                if fd == CALLER:
                    return
                if fd == CONTROL:
                    instruction, fds = channel.receive_instruction(self.control)
                    if instruction is None:
                        return
                    if "learn" in instruction:
                        self.recipes[int(instruction["learn"])] = channel.from_memory(fds[0])  # type: ignore[assignment, call-overload]
                        gc.freeze()
                    else:
                        self.open(instruction, fds)
                elif fd in self.sandboxes:
                    self.buried(fd)

    def finish(self) -> None:
        """The caller has gone: the wardens see their hubs close; those that do not leave in time are killed."""
        self.poll.unregister(CONTROL)
        self.poll.unregister(CALLER)
        for round_ in range(2):
            while self.sandboxes:
                gone = self.poll.poll(GRACE * 1000)
                if not gone:
                    break
                for fd, _ in gone:
                    self.buried(fd)
            if round_ == 0:
                for pidfd in self.sandboxes:
                    sc.pidfd_send_signal(pidfd, signal.SIGKILL)


def main() -> None:
    """Never returns. Fds 3 and 4 are the control socket and the caller's pidfd; everything else is closed."""
    channel.keep_only([CONTROL, CALLER])
    for fd in (CONTROL, CALLER):
        os.set_inheritable(fd, False)
    os.setsid()
    os.umask(0o022)
    sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the caller's Ctrl-C is the caller's to handle
    zygote = Zygote()
    try:
        instruction, fds = channel.receive_instruction(zygote.control)
        if instruction is None:
            os._exit(0)
        try:
            zygote.set_up(channel.from_memory(fds[0]))  # type: ignore[arg-type]
        except mounts.LineFailed as failure:
            zygote.report_failure(failure)
            os._exit(1)
        zygote.serve()
        zygote.finish()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)
