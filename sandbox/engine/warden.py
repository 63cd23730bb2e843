"""The warden: one process per open sandbox, between the zygote and the calls. It serves sandboxes of one recipe, one by one.

It holds the sandbox's mount namespace with the workspace and the caller's folders attached, clones an init for each
call, writes its id maps, reads the protections back from outside, keeps the wall clock, and kills. It never runs foreign
code and never reads foreign memory or notifications: that is the supervisor's. Must not import anything heavy.
"""

from __future__ import annotations

import _signal as signal
import _socket
import errno
import os
import select
import sys
from itertools import islice
from time import monotonic

from sandbox.cgroups import leaf
from sandbox.engine import channel, init
from sandbox.engine.clock import Clock
from sandbox.ns import granted, mounts, network, privileges, processes, workspace
from sandbox.ns import syscalls as sc
from sandbox.ns.processes import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

NAMESPACES = {
    "user": sc.CLONE_NEWUSER,
    "mnt": sc.CLONE_NEWNS,
    "pid": sc.CLONE_NEWPID,
    "ipc": sc.CLONE_NEWIPC,
    "uts": sc.CLONE_NEWUTS,
    "cgroup": sc.CLONE_NEWCGROUP,
    "net": sc.CLONE_NEWNET,
}
SUPERVISOR = "sandbox.engine.supervisor"


# A mount namespace takes a millisecond to be torn down, which whoever closes it last waits for: we do it when nobody waits
# for us, after a rest of so many milliseconds, or when there are so many.
REST_MS = 20
KEPT = 16
RETRY_SECONDS = 0.001
LOCK_BYTES = 192  # struct file_lock, linux/filelock.h
LOCKS = 5_000  # of one call, which are too many in any case
LISTED = 2 * LOCKS  # of all that there are
LOCKS_REST = 20  # times what it has taken to count them, until those of calls that have few are counted again
LONGEST_REST = 1.0  # seconds of that
INODE_BYTES = 1024  # of a file in a tmpfs, without what is in it: struct shmem_inode_info and struct dentry
MAPPING_BYTES = 300  # struct vm_area_struct and its share of the tree that it is in
LINE_BYTES = 256  # of what is told of a mapping; a name can be as long as 4 KB, and so many take seconds to be told
MAPPINGS = 65_530  # of all processes of a call together: as many as the kernel lets one have (vm.max_map_count)
LONGEST_MS = 1 << 30  # of one wait: poll(2) takes an int, and a call may have a year
PAGE = os.sysconf("SC_PAGE_SIZE")
SAMPLE_SECONDS = 0.1  # between looks at what running calls hold that no memory controller counts


class Call:
    """One call: its init, the socket to it, and when it has to be over."""

    def __init__(self, number: int, pid: int, pidfd: int, report: _socket.socket) -> None:
        self.number = number
        self.pid = pid
        self.pidfd = pidfd
        self.report = report
        self.listener: int | None = None  # of the worker's filter, until the supervisor has it
        self.mounts: int | None = None  # init's mount namespace, held until its end has been told
        self.worker: int | None = None  # a pidfd
        self.deadline: float | None = None
        self.clock: Clock | None = None  # once its worker stands
        self.seconds = 0.0  # that it, or of a session each of its calls, may take
        self.grace = 0.0  # seconds from SIGTERM at the deadline to SIGKILL; 0: SIGKILL at once
        self.warned = 0.0  # when SIGTERM was sent
        self.cause = "exit"
        self.used = 0  # bytes of memory, where that is the cause
        self.locks = 0  # of files that it held when they were counted last
        self.counted: dict[str, int] = {}  # events of the cgroup before it began
        self.result: dict[str, str] = {}


class Warden:
    def __init__(
        self,
        recipe: dict[str, Any],
        instruction: dict[str, Any],
        fds: dict[str, int],
        link_socket: _socket.socket | None,
        kept: list[int],
    ) -> None:
        self.kept = kept
        self.recipe = recipe
        self.instruction = instruction
        self.fds = fds
        self.hub = channel.from_fd(fds["hub"])
        self.link_socket = link_socket
        self.calls: dict[int, Call] = {}  # by pidfd
        self.reports: dict[int, Call] = {}  # by the report socket's fd
        self.listeners: dict[int, Call] = {}  # by the listener's fd, while no supervisor has it
        self.clocks: dict[int, Call] = {}  # by its fd
        self.poll = select.poll()
        self.reaped: dict[int, int] = {}  # wait statuses of children that were reaped before their turn
        self.supervisor: tuple[int, int, _socket.socket] | None = None  # pid, pidfd, socket
        self.tasks_for = 1  # calls that pids.max allows for
        self.sample_at = 0.0  # when memory is looked at next
        self.locks_at = 0.0  # before which locks are not
        self.host_namespace: int | None = None
        self.is_cut_off = False  # from the network, for the rest of the sandbox's life
        self.granted = granted.Granted(
            recipe["granted"],
            instruction["granted"],
            instruction["owner"],
            is_root=bool(recipe["ids_allocated"]),
            is_shared="mnt" not in recipe["namespaces"],
        )
        self.shares_network = "network" in fds
        self.own_namespaces = {name: os.readlink("/proc/self/ns/" + name) for name in recipe["namespaces"]}

    def report_failure(self, failure: mounts.LineFailed, call: int = 0) -> None:
        fields = {"line": failure.line, "errno": failure.errno, "path": failure.path, "text": failure.text, "call": call}
        channel.send(self.hub, "failed", fields)

    def set_up(self, host_namespace: int | None) -> None:
        """Attach what the whole sandbox shares: the workspace and the caller's folders."""
        wanted = self.recipe["workspace"]
        self.host_namespace = host_namespace
        if self.instruction["resolved"] and "mnt" in self.recipe["namespaces"]:
            mounts.carry_out("", [["cover", self.instruction["resolved"]["files"]]], "sandbox")
        ways = []
        if "mnt" in self.recipe["namespaces"]:
            attached = [str(target) for _, target, _ in self.recipe["sandbox_mounts"]]
            ways = mounts.open_ways(attached + [str(folder["path"]) for folder in self.recipe["granted"]])
        if host_namespace is not None and self.recipe["sandbox_mounts"]:
            mounts.attach_from(host_namespace, self.recipe["sandbox_mounts"])
        folders = []
        if wanted["kind"] == "tmpfs":
            uid, gid = self.instruction["owner"]
            limits = f"size={wanted['bytes']},nr_inodes={wanted['inodes']}"
            lines: list[list[object]] = []
            if self.recipe["granted"]:
                lines.append(["tmpfs", granted.PLACE, "nosuid,nodev", f"mode=711,{limits}", []])
                lines.append(["own_folder", granted.PLACE + "/workspace", uid, gid])
                lines.append(["bind", granted.PLACE + "/workspace", wanted["path"], ""])
            else:
                lines.append(["tmpfs", wanted["path"], "nosuid,nodev", f"mode=700,uid={uid},gid={gid},{limits}", []])
            mounts.carry_out("", lines, "sandbox")
            folders.append(wanted["path"])
        if self.recipe["granted"] and host_namespace is not None:
            self.granted.attach(host_namespace)
            folders += [granted.PLACE] if wanted["kind"] == "tmpfs" else []
        for way in ways:
            mounts.readonly("", way)
        fds = [os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for folder in folders]
        channel.send(self.hub, "opened", {"granted": ",".join(self.granted.kinds), "pid": os.getpid()}, fds)
        for fd in fds:
            os.close(fd)

    def join_network(self) -> None:
        """Go to the network namespace that this sandbox shares with others; the supervisor stays in the host's.

        There is no way back, so this warden's first sandbox there is its last.
        """
        try:
            self.start_supervisor()
            sc.setns(self.fds["network"], sc.CLONE_NEWNET)
        except OSError as error:
            raise mounts.LineFailed("sandbox: network of others", error) from None

    def renew(self, *, keep: bool) -> None:
        """The granted folders have changed, or what was changed in them is to be forgotten. A call that stands by goes."""
        for call in self.calls.values():
            self.kill(call, "killed")
        for call in list(self.calls.values()):
            self.ended(call)
        self.granted.renew(keep=keep)
        channel.send(self.hub, "renewed", {})

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(self, instruction: dict[str, Any], fds: list[int]) -> None:
        number = int(instruction["call"])
        shares = self.shares_network
        flags = sum(NAMESPACES[name] for name in self.recipe["namespaces"] if not (shares and name == "net"))
        try:
            report, inside = channel.pair()
        except OSError as error:
            close_all(fds)
            self.report_failure(mounts.LineFailed("call: socket to init", error), number)
            return
        cgroup = self.fds.get("cgroup")
        own = cgroup
        try:
            self.allow_tasks(len(self.calls) + 1)
            if own is not None and "pid" not in self.recipe["namespaces"]:
                cgroup = leaf.make(own, f"call-{number}", {})  # what a PID namespace does otherwise: end all of the call
            pid, pidfd = sc.clone3(flags, cgroup)
        except OSError as error:
            for fd in (*fds, report.detach(), inside.detach()):
                os.close(fd)
            if own is not None and cgroup != own and cgroup is not None:
                os.close(cgroup)
                leaf.remove(own, f"call-{number}")
            self.report_failure(mounts.LineFailed("call: clone3 with " + ", ".join(self.recipe["namespaces"]), error), number)
            return
        if pid == 0:
            init.run(
                self.recipe,
                {**self.instruction["ids"], "calls": len(self.calls) + 1, "shares_network": shares},
                inside,
                self.fds["lock"],
                fds,
                tty=bool(instruction["tty"]),
            )
        for fd in (*fds, inside.detach()):
            os.close(fd)
        if cgroup is not None and cgroup != own:
            os.close(cgroup)
        call = Call(number, pid, pidfd, report)
        call.seconds, call.grace = instruction["seconds"], instruction["grace"]
        if "mnt" in self.recipe["namespaces"]:
            # While we hold it, init need not wait until it has been torn down.
            try:
                call.mounts = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                call.mounts = None  # it has ended already
        self.calls[pidfd] = call
        self.reports[report.fileno()] = call
        self.poll.register(pidfd, select.POLLIN)
        self.poll.register(report.fileno(), select.POLLIN)
        try:
            call.counted = self.counters()
            report.setsockopt(_socket.SOL_SOCKET, channel.SO_PASSCRED, 1)
            self.bless(call)
        except (OSError, ValueError) as error:
            self.drain(call)
            if call.cause != "failed":  # else init has ended over a line of its own, and this only follows from that
                self.report_failure(mounts.LineFailed("call: id maps and link", error), number)
            self.kill(call, "failed")
        # While a worker comes up there is time: where each of its sockets is the supervisor's, and where it could write to the
        # host's own folders before there is a supervisor.
        if self.recipe["network"]["access"] is not None or "mnt" not in self.recipe["namespaces"]:
            self.learn_to_supervise()

    def learn_to_supervise(self) -> None:
        """Where our zygote has put that off: most plugins are refused nothing. In a sandbox psie's files are not to be seen."""
        if SUPERVISOR not in sys.modules:
            mounts.visit(self.host_namespace, lambda: __import__(SUPERVISOR))

    def bless(self, call: Call) -> None:
        """What only a parent can do for its child: the id maps, and the link's inner end."""
        if "user" in self.recipe["namespaces"]:
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{call.pid}/{name}", "wb", 0) as file:
                    file.write(self.instruction[name].encode())
        channel.instruct(call.report, {"go": True})
        if self.link_socket is not None and not self.shares_network:
            network.add_link(self.link_socket, self.recipe["network"]["request"], call.pid)
            channel.instruct(call.report, {"linked": True})

    def cut_off(self) -> None:
        """No call of this sandbox reaches anything any more: its own links go down, and the supervisor refuses all."""
        self.is_cut_off = True
        links = 0
        if "net" in self.recipe["namespaces"] and not self.shares_network:
            links = sum(self.links_down(call.pid) for call in self.calls.values())
        if self.supervisor is not None:
            below = [pid for pid in processes.children(os.getpid()) if pid != self.supervisor[0]]  # inits, and who left them
            try:
                channel.instruct(self.supervisor[2], {"cut_off": below})
            except OSError:
                pass  # it has just died, which is noticed by its pidfd
        channel.send(self.hub, "cut_off", {"links": links, "supervised": int(self.supervisor is not None)})

    def links_down(self, call: int) -> int:
        """Take the links of a call's network namespace down, from a process that goes there; returns how many those are."""
        pid, pidfd = sc.clone3(0)
        if pid == 0:
            try:
                sc.setns(os.open(f"/proc/{call}/ns/net", os.O_RDONLY | os.O_CLOEXEC), sc.CLONE_NEWNET)
                os._exit(sum(network.set_down(name) for name in ("lo", network.INNER)))
            except OSError:
                os._exit(0)  # the call has just ended
            finally:
                os._exit(0)
        os.close(pidfd)
        return os.waitstatus_to_exitcode(self.reap(pid))

    def start_supervisor(self) -> None:
        here, there = channel.pair()
        own_pid = os.getpid()
        pid, pidfd = sc.clone3(0)
        if pid == 0:
            self.supervise(there, own_pid)
        there.close()
        self.supervisor = pid, pidfd, here
        self.poll.register(pidfd, select.POLLIN)

    def supervise(self, there: _socket.socket, own_pid: int) -> NoReturn:
        """The supervisor's life, in our child."""
        try:
            self.learn_to_supervise()
            supervisor, resolved = sys.modules[SUPERVISOR], self.instruction["resolved"]
            supervisor.run(there, self.fds["violations"], own_pid, self.recipe, resolved, is_cut_off=self.is_cut_off)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(1)  # which the warden sees, and ends the sandbox

    def listens(self, call: Call, fds: list[int]) -> None:
        """Keep the worker's listener until something is refused for the first time. We look no further than at poll(2)."""
        (call.listener,) = fds
        self.listeners[call.listener] = call
        self.poll.register(call.listener, select.POLLIN)

    def refused(self, call: Call) -> None:
        """A refused call waits to be answered: pass the listener on to the supervisor, which reads and answers it."""
        if self.supervisor is None:
            try:
                self.start_supervisor()
            except OSError:
                self.kill(call, "supervisor")
                self.let_go(call)
                return
        assert self.supervisor is not None
        assert call.listener is not None
        try:
            channel.instruct(self.supervisor[2], {"call": call.number}, [call.listener])
        except OSError:
            pass  # it has just died, which is noticed by its pidfd
        self.let_go(call)

    def let_go(self, call: Call) -> None:
        """Close our end of the worker's listener."""
        if call.listener is not None:
            self.poll.unregister(call.listener)
            del self.listeners[call.listener]
            os.close(call.listener)
            call.listener = None

    def sealed(self, call: Call, fields: dict[str, str], pid: int) -> None:
        """The worker stands: read back what holds it, and tell the caller."""
        worker = None
        try:
            worker = os.pidfd_open(pid)
            fields.update(processes.read_back(pid, call.pid, self.own_namespaces))
        except OSError as error:
            if worker is not None:
                os.close(worker)  # perhaps another's by now, and not ours to kill
            self.report_failure(mounts.LineFailed("call: read-back of the protections", error), call.number)
            self.kill(call, "failed")
            return
        call.worker = worker
        channel.send(self.hub, "sealed", {"call": call.number, **fields})

    def kill(self, call: Call, cause: str) -> None:
        call.cause = cause
        call.result.setdefault("maxrss_kb", str(peak_of(processes.tree(call.pid)[1:])))  # its init will not tell it any more
        sc.pidfd_send_signal(call.pidfd, signal.SIGKILL)
        if call.worker is not None:
            sc.pidfd_send_signal(call.worker, signal.SIGKILL)

    def ended(self, call: Call) -> None:
        """Init has gone, and with it everything of the call."""
        self.drain(call)
        if call.cause == "timeout" and call.deadline is not None and call.clock is not None:
            began = call.clock.began()
            if began is None or began > call.warned:  # what was told to end has answered, and this is of what came after it
                call.cause = "exit"
        status = self.reap(call.pid)
        self.poll.unregister(call.pidfd)
        del self.calls[call.pidfd]
        if self.reports.pop(call.report.fileno(), None):
            self.poll.unregister(call.report.fileno())
        os.close(call.pidfd)
        self.let_go(call)
        call.report.close()
        if call.worker is not None:
            sc.pidfd_send_signal(call.worker, signal.SIGKILL)
            os.close(call.worker)
        if call.clock is not None:
            self.poll.unregister(call.clock.fd)
            del self.clocks[call.clock.fd]
            call.clock.close()
        if "cgroup" in self.fds and "pid" not in self.recipe["namespaces"]:
            leaf.remove(self.fds["cgroup"], f"call-{call.number}")
            self.reap_orphans()
        if call.cause == "exit" and self.supervisor is not None and has_ended(self.supervisor[1]):
            call.cause = "supervisor"  # what the worker did of late nobody has recorded, nor answered
        if not call.result and call.cause == "exit":
            call.cause = "killed"
            call.result = {"status": str(status)}
        self.blame(call)
        self.allow_tasks(len(self.calls))
        channel.send(self.hub, "ended", {"call": call.number, "cause": call.cause, "used": call.used, **call.result})
        if call.mounts is not None:
            self.kept.append(call.mounts)

    def counters(self) -> dict[str, int]:
        return leaf.counters(self.fds["cgroup"]) if "cgroup" in self.fds and self.recipe["controllers"] else {}

    def allow_tasks(self, calls: int) -> None:
        """pids.max is for all calls of the sandbox together: so many run now."""
        calls = max(1, calls)
        if self.recipe["pids_max"] and calls != self.tasks_for:
            self.tasks_for = calls
            leaf.write(self.fds["cgroup"], "pids.max", str(calls * self.recipe["pids_max"]))

    def blame(self, call: Call) -> None:
        """What the kernel has counted in the sandbox's cgroup while the call ran; a kill for want of memory is its cause."""
        counted = {name: value - call.counted.get(name, 0) for name, value in self.counters().items()}
        call.result.update({name: str(value) for name, value in counted.items() if value})
        killed = os.WIFSIGNALED(int(call.result.get("status", "0")))
        if killed and call.cause in ("exit", "killed") and counted.get("memory.events oom_kill"):
            call.cause = "memory"
            call.used = int(leaf.read(self.fds["cgroup"], "memory.peak") or self.instruction["memory"])

    def reap(self, pid: int) -> int:
        """The wait status of `pid`; orphans that were left to us (we are a child subreaper) are reaped on the way."""
        while pid not in self.reaped:
            orphan, status = os.waitpid(-1, 0)
            self.reaped[orphan] = status
        status = self.reaped.pop(pid)
        own = {call.pid for call in self.calls.values()} | ({self.supervisor[0]} if self.supervisor else set())
        self.reaped = {known: known_status for known, known_status in self.reaped.items() if known in own}
        return status

    def reap_orphans(self) -> None:
        """Without a PID namespace what the worker left behind has been killed by now: free its ids' task count."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self.reaped[pid] = status
        except ChildProcessError:
            return

    def memory_of(self, call: Call, limit: int) -> int:
        """Bytes of memory that the call's processes hold beyond what they share with the zygote (proc_pid_status(5)).

        Anonymous memory, also where it was swapped out, page tables, files in the scratch and workspace tmpfs as such, and the
        larger of what is in them and mapped shared memory. Tables can be without memory: for the one page of zeroes that is
        behind all that was only read. So can mappings, each of which is memory of the kernel's: fork(2) copies all of them.
        """
        anonymous = inherited = others = shared = spanned = 0
        baseline: int = self.instruction["baseline"]
        pids = processes.tree(call.pid)[1:]
        for pid in pids:
            for line in memory_lines(pid, "status", "RssAnon:"):
                name, _, value = line.partition(":")
                if name == "RssAnon":
                    own = int(value.split()[0]) * 1024
                    anonymous += max(0, own - baseline)
                    inherited += min(own, baseline)
                elif name in ("VmPTE", "VmSwap"):
                    others += int(value.split()[0]) * 1024
                elif name == "RssShmem":
                    shared += int(value.split()[0]) * 1024
                elif name == "VmSize":
                    spanned += int(value.split()[0]) * 1024
        files = 0
        if self.recipe["workspace"]["kind"] == "tmpfs":
            for path in (f"/proc/{call.pid}/root/run", self.recipe["workspace"]["path"]):
                try:
                    used = os.statvfs(path)
                except OSError:
                    continue
                files += (used.f_blocks - used.f_bfree) * used.f_frsize
                others += (used.f_files - used.f_ffree) * INODE_BYTES
        held = anonymous + others + max(shared, files)
        if held <= limit < held + inherited - baseline:  # each may have given that back, or begun anew by execve(2)
            held += max(0, sum(proportion_of(pid) for pid in pids) - baseline - anonymous)
        if len(pids) > 1 and spanned >= MAPPINGS * PAGE:  # else there are not so many: to list them takes a time
            mappings = mappings_of(pids, MAPPINGS)
            held += MAPPING_BYTES * mappings + (limit if mappings >= MAPPINGS else 0)
        return held

    def sample(self) -> None:
        """Kill the calls that hold more memory than they may. Of what a memory controller counts it takes care itself; locks of
        files it does not count (file_lock_cache, fs/locks.c)."""
        limit: int | None = self.recipe["memory_sampled"]
        allowed = int(self.instruction["memory"])
        running = [call for call in self.calls.values() if call.deadline is not None]
        if running and monotonic() >= self.locks_at:
            self.count_locks(running)
        for call in running:
            used = LOCK_BYTES * call.locks + (allowed if call.locks >= LOCKS else 0)
            used += self.memory_of(call, limit) if limit is not None else 0
            if used > allowed:
                call.used = used
                self.kill(call, "memory")

    def count_locks(self, calls: list[Call]) -> None:
        """How long that takes is up to all who have any, on this host: the longer, the later it is done again, unless it is up
        to these."""
        begun = monotonic()
        holders = list(holders_of_locks())
        for call in calls:
            is_of_interest = self.recipe["memory_sampled"] is not None or len(holders) >= LOCKS
            call.locks = locks_of(processes.tree(call.pid)[1:], holders) if is_of_interest else 0
        ended = monotonic()
        have_few = all(call.locks < LOCKS // 10 for call in calls)
        self.locks_at = ended + (min(LONGEST_REST, LOCKS_REST * (ended - begun)) if have_few else 0.0)

    def drain(self, call: Call) -> None:
        call.report.setblocking(False)
        try:
            while self.heard(call):
                pass
        except BlockingIOError:
            pass

    def heard(self, call: Call) -> bool:
        """One message from init or worker; False when there will be no more."""
        try:
            data, fds, pid = channel.receive_bytes(call.report, channel.MESSAGE, 1)
            if not data:
                return False
            kind, fields = channel.unpack(data)
        except channel.Malformed:
            self.kill(call, "killed")
            return False
        if kind == "listener":
            self.listens(call, fds)
        elif kind == "sealed":
            self.sealed(call, fields, pid)
        elif kind == "failed":
            channel.send(self.hub, "failed", {**fields, "call": call.number})
            call.cause = "failed"
        elif kind == "ended":
            call.result = fields
        return True

    # -- the loop ------------------------------------------------------------------------------------------------

    def find(self, number: int) -> Call | None:
        return next((call for call in self.calls.values() if call.number == number), None)

    def instructed(self) -> bool:
        """One instruction of the caller; False when it has gone."""
        instruction, fds = channel.receive_instruction(self.hub, 8)
        if instruction is None:
            return False
        operation = instruction["op"]
        if operation == "call":
            self.call(instruction, fds)
            return True
        if operation == "renew":
            self.renew(keep=bool(instruction["keep"]))
            return True
        if operation == "cut_off":
            self.cut_off()
            return True
        call = self.find(int(instruction["call"]))  # type: ignore[call-overload]
        if call is None:
            close_all(fds)
            return True  # it has ended meanwhile
        if operation == "kill":
            self.kill(call, str(instruction["cause"]))
        elif operation == "clock":
            call.clock = Clock(call.seconds, fds[0])
            self.clocks[fds[0]] = call
            self.poll.register(fds[0], select.POLLIN)
        elif operation == "session":
            self.begin_clock(call, monotonic())
        elif operation == "signal" and call.worker is not None:
            sc.pidfd_send_signal(call.worker, int(instruction["signal"]))  # type: ignore[call-overload]
        return True

    def clock_told(self, call: Call) -> None:
        """A call has lasted until the first look: from now on it is to end in time, and its memory is looked at."""
        assert call.clock is not None
        began = call.clock.began() if call.clock.has_struck() else None
        if began is not None:
            self.begin_clock(call, began)

    def begin_clock(self, call: Call, began: float) -> None:
        if all(other.deadline is None for other in self.calls.values()):
            self.sample_at = began + SAMPLE_SECONDS
        if call.cause != "timeout":
            call.deadline = began + call.seconds

    def overdue(self, call: Call, now: float) -> None:
        """Its time is over: whoever handles SIGTERM may tidy up for a moment. A session's call may have begun later."""
        began = call.clock.began() if call.clock is not None else None
        is_warned = call.cause == "timeout"
        if not is_warned or began is None or began > call.warned:  # else it is still what was told to end
            call.cause = "exit" if is_warned else call.cause
            due = (now if began is None else began) + call.seconds
            if due > now:
                call.deadline = due
                return
            is_warned = False
        if call.grace and not is_warned and call.worker is not None:
            call.cause, call.deadline, call.warned = "timeout", now + call.grace, now
            sc.pidfd_send_signal(call.worker, signal.SIGTERM)
        else:
            call.deadline = None
            self.kill(call, "timeout")

    def wait_ms(self) -> int | None:
        deadlines = [call.deadline for call in self.calls.values() if call.deadline is not None]
        if not deadlines:
            return REST_MS if self.kept else None
        deadlines.append(self.sample_at)
        return min(int(1000 * max(0.0, min(deadlines) - monotonic())) + 1, LONGEST_MS)

    def serve(self) -> None:
        hub = self.hub.fileno()
        self.poll.register(hub, select.POLLIN)
        while True:
            events = self.poll.poll(self.wait_ms())
            if not events or len(self.kept) > KEPT:
                close_all(self.kept)
            for fd, event in events:
                if fd == hub or fd in self.calls:
                    if fd != hub:
                        self.ended(self.calls[fd])
                    elif not self.instructed():
                        return
                    break  # the rest may be of descriptors that are closed now, and others' by the next event: it is told again
                if fd in self.reports:
                    if not event & select.POLLIN or not self.heard(self.reports[fd]):
                        self.poll.unregister(fd)  # init is on its way out; its pidfd tells when it has gone
                        del self.reports[fd]
                elif fd in self.clocks:
                    self.clock_told(self.clocks[fd])
                elif fd in self.listeners:
                    if event & select.POLLIN:
                        self.refused(self.listeners[fd])
                    else:
                        self.let_go(self.listeners[fd])  # every process under the filter has gone
                elif self.supervisor and fd == self.supervisor[1]:
                    self.supervisor_died()
                    return
            now = monotonic()
            if now >= self.sample_at:
                self.sample()
                ended = monotonic()
                self.sample_at = ended + max(SAMPLE_SECONDS, ended - now)  # never more than half of our time
                now = ended
            for call in list(self.calls.values()):
                if call.deadline is not None and call.deadline <= now:
                    self.overdue(call, now)

    def supervisor_died(self) -> None:
        """Fail closed: without a supervisor nobody records what is refused, so nothing may run."""
        for call in list(self.calls.values()):
            self.kill(call, "supervisor")
            self.ended(call)

    def finish(self) -> None:
        """End every call and the supervisor, see all of them gone, and let go of everything that was the sandbox's."""
        for call in self.calls.values():
            self.kill(call, "killed")
        end_children()
        for call in self.calls.values():
            self.let_go(call)
            call.report.close()
            for fd in (call.pidfd, call.worker):
                if fd is not None:
                    os.close(fd)
            if call.clock is not None:
                call.clock.close()
            if call.mounts is not None:
                self.kept.append(call.mounts)
        if self.supervisor is not None:
            os.close(self.supervisor[1])
            self.supervisor[2].close()
        self.granted.detach()
        self.hub.close()
        for name in self.fds.keys() - {"hub"}:
            os.close(self.fds[name])


def memory_lines(pid: int, file: str, wanted: str) -> list[str]:
    """What the kernel says in a file about a process's memory, which it says of each thread that has not ended. The first may
    have, while others go on. `wanted`: how a line begins that is there then."""
    for thread in sorted(names_in(f"/proc/{pid}/task"), key=lambda thread: thread != str(pid)):
        try:
            lines = read(f"/proc/{pid}/task/{thread}/{file}").split("\n")
        except OSError:
            continue
        if any(line.startswith(wanted) for line in lines):
            return lines
    return []


def proportion_of(pid: int) -> int:
    """Bytes of a process's anonymous memory, each page by the number of those that share it (proc_pid_smaps(5)): exact, but all
    of its memory has to be looked at for it."""
    lines = [line for line in memory_lines(pid, "smaps_rollup", "Pss_Anon:") if line.startswith("Pss_Anon:")]
    return sum(int(line.split()[1]) * 1024 for line in lines)


def mappings_of(pids: list[int], most: int) -> int:
    """How many mappings these have together (proc_pid_maps(5)), `most` at most; those with long names count as several."""
    found = 0
    for pid in pids:
        for thread in names_in(f"/proc/{pid}/task"):
            own = lines_in(f"/proc/{pid}/task/{thread}/maps", most - found)
            found += own
            if own:
                break  # else this thread has ended, and others may go on
    return found


def lines_in(path: str, most: int) -> int:
    """How many lines a file of /proc has, `most` at most, each LINE_BYTES long or as many of them as it is; none where its
    process has just ended, nor where nobody may look: without root at level minimal, which without controllers has one process
    only."""
    found = 0
    try:
        with open(path, "rb", 0) as file:
            while found < most and (piece := file.read(1 << 16)):
                found += max(piece.count(b"\n"), len(piece) // LINE_BYTES)
    except OSError:
        pass
    return min(found, most)


def names_in(folder: str) -> list[str]:
    """None where its process has just ended."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def holders_of_locks(most: int = LISTED) -> Iterator[str]:
    """The pid of who holds it, of each lock of a file that there is (proc_locks(5)). Of so many at most: to list them takes the
    kernel a time that is their square."""
    try:
        with open("/proc/locks") as file:
            for line in islice(file, most):
                fields = line.split()
                yield fields[5 if fields[1] == "->" else 4]
    except OSError:
        return  # there is no such file here


def locks_of(pids: list[int], holders: list[str]) -> int:
    """How many locks of files these hold, LOCKS at most. Where there are so many in all that not all of theirs may be listed,
    those are told of with the descriptor by which they are held as well (proc_pid_fdinfo(5)): but not of files that are closed,
    and only mapped still. Whoever has many mappings, or cannot be looked at, is looked for further down the list."""
    wanted = {str(pid) for pid in pids}
    listed = sum(holder in wanted for holder in holders)
    if listed < LOCKS and len(holders) >= LISTED:
        told = 0
        try:
            for pid in pids:
                told += locks_of_descriptors(pid, LOCKS - told)
            is_all = told >= LOCKS or mappings_of(pids, LOCKS) < LOCKS
        except PermissionError:  # without root nobody may look at that, of one that is not dumpable
            is_all = False
        if not is_all:
            listed = sum(1 for _ in islice((holder for holder in holders_of_locks(5 * LISTED) if holder in wanted), LOCKS))
        listed = max(listed, told)
    return min(listed, LOCKS)


def locks_of_descriptors(pid: int, most: int) -> int:
    """Of files alone: what else is told with a descriptor, as the entries of an epoll, can be as long as somebody likes. The
    threads of a process have the same ones; the first may have ended, and then has none. Raises PermissionError."""
    held = 0
    for thread in names_in(f"/proc/{pid}/task"):
        try:
            fds = os.listdir(f"/proc/{pid}/task/{thread}/fd")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for fd in fds:
            if held >= most:
                return most
            try:
                if os.readlink(f"/proc/{pid}/task/{thread}/fd/{fd}").startswith("/"):
                    held += read(f"/proc/{pid}/task/{thread}/fdinfo/{fd}").count("\nlock:")
            except PermissionError:
                raise
            except OSError:
                continue  # it was closed meanwhile
        if fds:
            break
    return min(held, most)


def peak_of(pids: list[int]) -> int:
    """The most memory that one of these has had (proc_pid_status(5)), in kB, as ru_maxrss."""
    lines = [line for pid in pids for line in memory_lines(pid, "status", "RssAnon:") if line.startswith("VmHWM:")]
    return max([int(line.split()[1]) for line in lines], default=0)


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def end_children() -> None:
    """Kill all that is left below us, and reap it."""
    try:
        while True:
            found = processes.children(os.getpid())
            for pid in found:
                os.kill(pid, signal.SIGKILL)
            if not os.waitpid(-1, 0 if found else os.WNOHANG)[0]:
                select.select([], [], [], RETRY_SECONDS)  # /proc could not be read just now
    except ChildProcessError:
        return


def close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def serve_sandbox(
    recipe: dict[str, Any],
    instruction: dict[str, Any],
    fds: dict[str, int],
    host_namespace: int | None,
    link_socket: _socket.socket | None,
    kept: list[int],
    unprepared: mounts.LineFailed | None,
) -> None:
    """One sandbox from its opening to its end. That the caller has gone meanwhile is an end as well."""
    own: Any = channel.from_memory(fds.pop("own")) if "own" in fds else {"resolved": {}, "granted": []}
    instruction |= own
    if "folder_path" in instruction:
        recipe = workspace.place(recipe, instruction["folder_path"])
    warden = Warden(recipe, instruction, fds, link_socket, kept)
    try:
        try:
            if unprepared is not None:
                raise unprepared
            try:
                warden.set_up(host_namespace)
            except OSError as error:
                # It may have left us in a mount namespace that is not ours: this warden gets no other sandbox.
                warden.report_failure(mounts.LineFailed("sandbox: workspace and granted folders", error))
                raise
            if warden.shares_network:
                warden.join_network()
            warden.serve()
        except mounts.LineFailed as failure:
            warden.report_failure(failure)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            raise
    warden.finish()


def prepare(template: int | None) -> mounts.LineFailed | None:
    """Take a fresh copy of the template; a failure is for the sandbox to tell that needs it."""
    if template is not None:
        try:
            mounts.copy_of(template)
        except OSError as error:
            return mounts.LineFailed("sandbox: mount namespace", error)
    return None


def next_task(tasks: _socket.socket, kept: list[int]) -> tuple[dict[str, Any] | None, list[int]]:
    """The zygote's next instruction; while none comes, mount namespaces of the past are let go."""
    poll = select.poll()
    poll.register(tasks.fileno(), select.POLLIN)
    if kept and (len(kept) > KEPT or not poll.poll(REST_MS)):
        close_all(kept)
    return channel.receive_instruction(tasks)


def run(
    nest: int,
    shared: int,
    zygote: int,
    baseline: int,
    template: int | None,
    host_namespace: int | None,
    link_socket: _socket.socket | None,
) -> NoReturn:
    """The life of a warden, in the child of the zygote's clone3. Any error that is not a sandbox's ends it: fail closed.

    Until it has its own descriptors those are the zygote's: `nest` is its socket for tasks, from `shared` on none is for it.
    """
    try:
        sc.unshare_descriptors(shared)
        tasks = channel.from_fd(nest)
        privileges.die_with_parent()
        if os.getppid() != zygote:
            os._exit(1)  # the zygote died before the line above
        # The zygote's own ends are none of ours: the caller must be seen to go.
        keep = [fd for fd in (template, host_namespace, link_socket.fileno() if link_socket else None) if fd is not None]
        channel.keep_only([nest, *keep])
        channel.send(tasks, "up", {})
        sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)
        kept: list[int] = []
        recipe: dict[str, Any] = {}
        while True:
            unprepared = prepare(template)
            instruction, fds = next_task(tasks, kept)
            while instruction is not None and "learn" in instruction:
                recipe = channel.from_memory(fds[0])  # type: ignore[assignment]
                instruction, fds = next_task(tasks, kept)
            if instruction is None:
                os._exit(0)
            instruction["baseline"] = baseline
            given = dict(zip(instruction["fds"], fds, strict=True))
            if unprepared is not None:
                unprepared = prepare(template)  # what failed when nobody wanted it yet may be had now
            serve_sandbox(recipe, instruction, given, host_namespace, link_socket, kept, unprepared)
            if "network" in given:
                os._exit(0)
            if template is not None:
                kept.append(mounts.current_namespace())
            channel.send(tasks, "free", {})
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)
