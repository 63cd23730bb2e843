"""PID 1 of a call: carries out the recipe from inside, line by line, forks the worker, reaps, ends.

The order is fixed: (cgroup and namespaces at clone, id maps by the warden) - mounts, root, /proc - link, hostname -
change of ids - pdeathsig - rlimits - bounding set, securebits - no_new_privs - Landlock - capabilities to nothing -
fork of the worker. Each step depends on those before it: see `set_up`. Must not import anything heavy.
"""

from __future__ import annotations

import _socket
import os
import resource
import sys

from sandbox.engine import channel, worker
from sandbox.ns import mounts, network, privileges
from sandbox.ns import syscalls as sc
from sandbox.seccomp import landlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn


def step(line: str, action: Callable[..., object], *arguments: object) -> None:
    try:
        action(*arguments)
    except (OSError, ValueError) as error:
        raise mounts.LineFailed(line, error) from None


def expect(report: _socket.socket, name: str) -> None:
    """Wait for the warden's word; without it nothing may start."""
    instruction, _ = channel.receive_instruction(report, 0)
    if instruction is None or not instruction.get(name):
        os._exit(1)


def set_up(recipe: dict[str, Any], ids: dict[str, Any], report: _socket.socket) -> list[str]:
    """Everything between clone3 and the fork of the worker; returns what was substituted. Raises mounts.LineFailed."""
    namespaces = recipe["namespaces"]
    notes = []
    may_keep_groups = not recipe["ids_allocated"]
    if ids["setup"] is not None:
        step("call: ids of the set-up", privileges.become, *ids["setup"], may_keep_groups)
    if "mnt" in namespaces:
        notes = mounts.carry_out("", recipe["call_mounts"], "call")
    if "net" in namespaces and not ids["shares_network"]:
        step("call: loopback up", network.set_up, "lo")
        if recipe["network"]["mode"] == "veth":
            expect(report, "linked")
    if "uts" in namespaces:
        step("call: hostname", _socket.sethostname, recipe["hostname"])
    step("call: change of ids", privileges.become, *ids["plugin"], may_keep_groups)
    step("call: not dumpable", sc.prctl, sc.PR_SET_DUMPABLE, 0)
    if "pid" not in namespaces:
        step("call: subreaper", sc.prctl, sc.PR_SET_CHILD_SUBREAPER, 1)
    step("call: pdeathsig", privileges.die_with_parent)
    if channel.hung_up(report):
        os._exit(1)  # the warden died before the line above
    step("call: rlimits", privileges.set_rlimits, [line for line in recipe["rlimits"] if line[0] not in worker.OWN_RLIMITS])
    step("call: bounding set and securebits", privileges.empty_bounding_set)
    step("call: no_new_privs", privileges.no_new_privs)
    step("call: control of the self-probe", open_probe, recipe)
    rules = recipe["landlock"]
    if rules is not None:
        step(
            "call: Landlock",
            lambda: landlock.restrict(
                rules["rules"], abi=rules["abi"], deny_network=rules["deny_network"], scopes=rules["scopes"]
            ),
        )
    step("call: capabilities to nothing", privileges.drop_capabilities)
    return notes


def open_probe(recipe: dict[str, Any]) -> None:
    """Show that Landlock alone will stop the worker's self-probe: now, without it, the same write is possible."""
    path = recipe["landlock"]["probe"] if recipe["landlock"] is not None else None
    if path is not None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        os.chmod(path, 0o666)


def run(
    recipe: dict[str, Any], ids: dict[str, Any], report: _socket.socket, lock: int, fds: list[int], *, tty: bool
) -> NoReturn:
    """The life of an init, in the child of the warden's clone3. `fds`: job, stdin, stdout, stderr.

    `lock` is the sandbox's place in the ledger: it must not be free before the last process of the sandbox has gone.
    """
    try:
        try:
            step("call: pdeathsig", privileges.die_with_parent)
            channel.keep_only([report.fileno(), lock, *fds])
            expect(report, "go")
            notes = set_up(recipe, ids, report)
            pid = fork_worker()
        except mounts.LineFailed as failure:
            worker.tell_failed(report, failure)
            os._exit(1)
        if pid == 0:
            worker.run(recipe, ids, report, fds, notes, tty=tty)
        for fd in fds:
            os.close(fd)
        for fd in (0, 1, 2):
            os.close(fd)
        watch(pid, report, has_link=recipe["network"]["mode"] == "veth" and not ids["shares_network"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def fork_worker() -> int:
    try:
        return sc.fork()
    except OSError as error:
        raise mounts.LineFailed("call: fork of the worker", error) from None


def watch(pid: int, report: _socket.socket, *, has_link: bool) -> NoReturn:
    """Reap all that ends; the worker's end is the call's end, and is reported.

    It sleeps in one system call, because each page that Python writes to here is a page more per sandbox.
    """
    while True:
        ended, status, usage = os.wait4(-1, 0)
        if ended == pid:
            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            fields = {
                "status": status,
                "maxrss_kb": usage.ru_maxrss,
                "utime": round(children.ru_utime, 6),
                "stime": round(children.ru_stime, 6),
            }
            channel.send(report, "ended", {**fields, **(network.counters() if has_link else {})})
            os._exit(0)
