"""Landlock, on the running kernel: every thing is shown to work first, then to be refused under the rules.

Each attempt runs in a child. Older ABIs are tried by asking the kernel for less than it has.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sandbox.ns.syscalls import prctl
from sandbox.seccomp import landlock

PR_SET_NO_NEW_PRIVS = 38
KERNEL_ABI = landlock.abi()
pytestmark = pytest.mark.skipif(KERNEL_ABI == 0, reason="this kernel has no Landlock")
abis = pytest.mark.parametrize("abi", range(1, min(KERNEL_ABI, landlock.NEWEST_ABI) + 1))


def needs(abi: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(abi > KERNEL_ABI, reason=f"needs Landlock ABI {abi}, the kernel has {KERNEL_ABI}")


def in_child(action: Callable[[], Any], rules: list[list[str]] | None = None, **options: Any) -> Any:
    """The value of `action`, run in a child under `rules` (None: unrestricted)."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                if rules is not None:
                    prctl(PR_SET_NO_NEW_PRIVS, 1)
                    landlock.restrict(rules, **{"abi": KERNEL_ABI, "deny_network": False, "scopes": False, **options})
                text = json.dumps({"value": action()})
            except BaseException:
                text = json.dumps({"error": traceback.format_exc()})
            theirs.sendall(text.encode())
        finally:
            os._exit(0)
    theirs.close()
    with ours, ours.makefile() as stream:
        reply = json.loads(stream.read())
    os.waitpid(pid, 0)
    assert "error" not in reply, reply["error"]
    return reply["value"]


def attempt(action: Callable[[], object]) -> str:
    """ "ok" or the name of the errno."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


class Tree:
    """Three folders with a file each: one to read, one to write, one that no rule names."""

    def __init__(self, base: Path) -> None:
        self.readable, self.writable, self.hidden = base / "readable", base / "writable", base / "hidden"
        for folder in (self.readable, self.writable, self.hidden):
            folder.mkdir()
            (folder / "file").write_text(folder.name)
            (folder / "sub").mkdir()
            script = folder / "script"
            script.write_text("#!/bin/true\n")
            script.chmod(0o755)
        self.rules = [[str(self.readable), "read"], [str(self.writable), "write"]]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def uses(folder: Path) -> dict[str, str]:
    """Try everything in a folder, and leave it as it was."""
    file = folder / "file"

    def rename_and_link(path: Path) -> None:
        os.rename(file, path)
        os.link(path, file)

    def make_and_remove(make: Callable[[Path], object], remove: Callable[[Path], object] = os.unlink) -> Callable[[], None]:
        def both() -> None:
            make(folder / "new")
            remove(folder / "new")

        return both

    return {
        "read": attempt(lambda: os.close(os.open(file, os.O_RDONLY))),
        "list": attempt(lambda: os.listdir(folder)),
        "write": attempt(lambda: os.close(os.open(file, os.O_WRONLY | os.O_APPEND))),
        "create": attempt(make_and_remove(lambda path: os.close(os.open(path, os.O_WRONLY | os.O_CREAT)))),
        "mkdir": attempt(make_and_remove(os.mkdir, os.rmdir)),
        "symlink": attempt(make_and_remove(lambda path: os.symlink("file", path))),
        "fifo": attempt(make_and_remove(os.mkfifo)),
        "rename": attempt(make_and_remove(rename_and_link)),
    }


CHANGES = ("write", "create", "mkdir", "symlink", "fifo", "rename")


@abis
def test_reads_and_writes_follow_the_rules(tree: Tree, abi: int) -> None:
    def all_uses() -> list[dict[str, str]]:
        return [uses(folder) for folder in (tree.readable, tree.writable, tree.hidden)]

    assert {answer for folder in in_child(all_uses) for answer in folder.values()} == {"ok"}
    readable, writable, hidden = in_child(all_uses, tree.rules, abi=abi)
    assert set(writable.values()) == {"ok"}
    assert readable["read"] == readable["list"] == "ok"
    assert {readable[change] for change in CHANGES} == {"EACCES"}
    assert set(hidden.values()) == {"EACCES"}


def runs(script: Path) -> str:
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(script, [str(script)])
        finally:
            os._exit(99)
    return "ok" if os.waitpid(pid, 0)[1] == 0 else "refused"


@abis
def test_execution_follows_the_rules(tree: Tree, abi: int) -> None:
    def run_all() -> list[str]:
        return [runs(folder / "script") for folder in (tree.readable, tree.writable, tree.hidden)]

    assert in_child(run_all) == ["ok"] * 3
    system = [["/", "read_file"], ["/usr", "read"], ["/bin", "read"], ["/lib", "read"]]
    assert in_child(run_all, [*tree.rules, *system], abi=abi) == ["ok", "ok", "refused"]


@abis
def test_a_rule_on_a_file_holds_for_the_file(tree: Tree, abi: int) -> None:
    rules = [[str(tree.hidden / "file"), "write"], [str(tree.readable / "file"), "read"], ["/dev/null", "write_file"]]

    def look() -> dict[str, str]:
        return {
            "write": attempt(lambda: os.close(os.open(tree.hidden / "file", os.O_RDWR))),
            "list": attempt(lambda: os.listdir(tree.hidden)),
            "unlink": attempt(lambda: os.unlink(tree.hidden / "file")),
            "sibling": attempt(lambda: os.close(os.open(tree.hidden / "script", os.O_RDONLY))),
            "read": attempt(lambda: os.close(os.open(tree.readable / "file", os.O_RDONLY))),
            "overwrite": attempt(lambda: os.close(os.open(tree.readable / "file", os.O_WRONLY))),
            "device": attempt(lambda: os.close(os.open("/dev/null", os.O_RDWR))),
        }

    assert in_child(look, rules, abi=abi) == {
        "write": "ok",
        "list": "EACCES",
        "unlink": "EACCES",
        "sibling": "EACCES",
        "read": "ok",
        "overwrite": "EACCES",
        "device": "ok",
    }


@abis
def test_read_file_neither_lists_nor_runs(tree: Tree, abi: int) -> None:
    def look() -> list[str]:
        return [
            attempt(lambda: os.close(os.open(tree.readable / "file", os.O_RDONLY))),
            attempt(lambda: os.listdir(tree.readable)),
            attempt(lambda: os.execv(tree.readable / "script", ["script"])),
        ]

    assert in_child(look, [[str(tree.readable), "read_file"]], abi=abi) == ["ok", "EACCES", "EACCES"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_no_rule_lets_device_nodes_be_made(tree: Tree) -> None:
    def make() -> list[str]:
        path = tree.writable / "device"
        answer = attempt(lambda: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)))
        if answer == "ok":
            path.unlink()
        return [answer, attempt(lambda: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 0)))]

    if in_child(make)[0] != "ok":
        pytest.skip("device nodes cannot be made here anyway")
    (tree.writable / "device").unlink()
    assert in_child(make, tree.rules) == ["EACCES", "EACCES"]


def test_symbolic_links_lead_nowhere_new(tree: Tree) -> None:
    (tree.writable / "way-out").symlink_to(tree.hidden / "file")

    def follow() -> list[str]:
        path = tree.writable / "way-out"
        return [attempt(path.read_bytes), attempt(lambda: os.close(os.open(path, os.O_WRONLY)))]

    assert in_child(follow) == ["ok", "ok"]
    assert in_child(follow, tree.rules) == ["EACCES", "EACCES"]


@abis
def test_moving_between_folders_needs_abi_2(tree: Tree, abi: int) -> None:
    def move() -> list[str]:
        there, back = tree.writable / "sub" / "file", tree.writable / "file"
        answers = [attempt(lambda: os.rename(back, there))]
        if answers == ["ok"]:
            os.rename(there, back)
        answers.append(attempt(lambda: os.link(tree.readable / "file", tree.writable / "link")))
        return answers

    assert in_child(move) == ["ok", "ok"]
    (tree.writable / "link").unlink()
    # Never a link that would make a file writable: out of a folder that is only readable it is always refused.
    assert in_child(move, tree.rules, abi=abi) == ["ok" if abi >= 2 else "EXDEV", "EXDEV"]


@abis
def test_truncating_is_refused_from_abi_3(tree: Tree, abi: int) -> None:
    def truncate() -> list[str]:
        paths = [folder / "file" for folder in (tree.writable, tree.readable)]
        return [attempt(partial(os.truncate, path, 3)) for path in paths]

    assert in_child(truncate) == ["ok", "ok"]
    assert in_child(truncate, tree.rules, abi=abi) == ["ok", "EACCES" if abi >= 3 else "ok"]


@abis
def test_tcp_is_refused_from_abi_4(tree: Tree, abi: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def connect() -> list[str]:
            with socket.socket() as one, socket.socket() as other:
                return [attempt(lambda: one.connect(server.getsockname())), attempt(lambda: other.bind(("127.0.0.1", 0)))]

        assert in_child(connect) == ["ok", "ok"]
        assert in_child(connect, tree.rules, abi=abi) == ["ok", "ok"]
        expected = ["EACCES", "EACCES"] if abi >= 4 else ["ok", "ok"]
        assert in_child(connect, tree.rules, abi=abi, deny_network=True) == expected


@abis
def test_device_ioctls_are_refused_from_abi_5(tree: Tree, abi: int) -> None:
    leader, terminal = os.openpty()
    name = os.ttyname(terminal)

    def ask(rights: str) -> str:
        def drive() -> str:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOCTTY)
            return attempt(lambda: fcntl.ioctl(descriptor, 0x540F if os.getsid(0) < 0 else 0x5401, bytes(60)))  # TCGETS

        return str(in_child(drive, [[name, rights]], abi=abi))

    assert ask("read_file") == ("EACCES" if abi >= 5 else "ok")
    assert ask("write_file") == "ok"
    os.close(leader)
    os.close(terminal)


@abis
def test_signals_and_abstract_sockets_stay_inside_from_abi_6(tree: Tree, abi: int) -> None:
    victim = os.getpid()
    address = f"\0psie-test-{victim}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()

        def reach_out() -> dict[str, str]:
            with socket.socket(socket.AF_UNIX) as client:
                answers = {
                    "signal": attempt(lambda: os.kill(victim, 0)),
                    "abstract": attempt(lambda: client.connect(address)),
                }
            child = os.fork()
            if child == 0:
                signal.pause()
            answers["own child"] = attempt(lambda: os.kill(child, signal.SIGKILL))
            os.waitpid(child, 0)
            answers["oneself"] = attempt(lambda: os.kill(os.getpid(), 0))
            return answers

        everything = {"signal": "ok", "abstract": "ok", "own child": "ok", "oneself": "ok"}
        assert in_child(reach_out) == everything
        assert in_child(reach_out, tree.rules, abi=abi) == everything
        inside = in_child(reach_out, tree.rules, abi=abi, scopes=True)
        assert inside == (everything if abi < 6 else {**everything, "signal": "EPERM", "abstract": "EPERM"})


@pytest.mark.parametrize(("abi", "flags"), [(6, 0), (7, 1 | 4)])
def test_refusals_are_no_lines_of_the_hosts_audit_log(
    abi: int, flags: int, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ABI 7 on each would be one; those of domains that a plugin makes for itself as well. (Read from what is asked for:
    whether there are any is a setting of the whole machine.)"""
    asked: list[tuple[object, ...]] = []

    def record(name: str, *arguments: object, what: str = "") -> int:
        asked.append((name, *arguments))
        return os.open("/", os.O_PATH) if name == "landlock_create_ruleset" else 0

    monkeypatch.setattr(landlock, "syscall", record)
    landlock.restrict([[str(tree.readable), "read"]], abi=abi, deny_network=False, scopes=False)
    assert [arguments[1] for name, *arguments in asked if name == "landlock_restrict_self"] == [flags]


def test_newer_abis_count_as_the_newest_known(tree: Tree) -> None:
    assert landlock.handled_access_fs(99) == landlock.handled_access_fs(landlock.NEWEST_ABI)
    assert [landlock.handled_access_fs(abi).bit_count() for abi in range(1, 8)] == [13, 14, 15, 15, 16, 16, 16]


def test_every_right_exists_in_some_abi() -> None:
    newest = landlock.handled_access_fs(landlock.NEWEST_ABI)
    assert all(rights | newest == newest for rights in landlock.RIGHTS.values())


def test_a_missing_path_is_named(tree: Tree) -> None:
    missing = str(tree.hidden / "missing")

    def restrict() -> list[Any]:
        try:
            landlock.restrict([*tree.rules, [missing, "read"]], abi=KERNEL_ABI, deny_network=False, scopes=False)
        except OSError as error:
            return [error.errno, error.filename, (tree.hidden / "file").read_text()]
        return []

    assert in_child(restrict) == [errno.ENOENT, missing, "hidden"]  # and nothing was restricted half-way


def test_without_no_new_privs_the_kernel_refuses(tree: Tree) -> None:
    def restrict() -> str:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)  # CAP_SYS_ADMIN would do as well
        return attempt(lambda: landlock.restrict([["/", "read"]], abi=KERNEL_ABI, deny_network=True, scopes=True))

    assert in_child(restrict) == "EPERM"


def test_mistakes_are_errors(tree: Tree) -> None:
    with pytest.raises(ValueError, match="no Landlock"):
        landlock.restrict([], abi=0, deny_network=False, scopes=False)
    with pytest.raises(KeyError):
        landlock.restrict([[str(tree.readable), "raed"]], abi=KERNEL_ABI, deny_network=False, scopes=False)


def test_no_descriptor_stays_open(tree: Tree) -> None:
    def count() -> bool:
        before = os.listdir("/proc/self/fd")
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict([*tree.rules, ["/proc", "read"]], abi=KERNEL_ABI, deny_network=True, scopes=True)
        return len(os.listdir("/proc/self/fd")) == len(before)

    assert in_child(count) is True
