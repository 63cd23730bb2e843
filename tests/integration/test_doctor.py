"""`psie doctor` on hosts that lack something, made by the kernel's own means: it names the cause, the levels and the mend.

The mends are applied where that can be done in namespaces that go with the test.
"""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox import doctor
from sandbox.cgroups import place

from . import harness, prepared
from .unprivileged import User

ROOT = pytest.mark.usefixtures("as_root")
LEVELS = ("minimal", "standard", "strict", "maximum")


def command(who: str, user: User, *arguments: str) -> tuple[list[str], dict[str, str], Path]:
    """(argv, environment, folder) of `psie doctor` as root or as the user."""
    rootless = who == "rootless"
    own = {"PYTHONPATH": os.pathsep.join(filter(None, [str(user.repository), user.path]))}
    program = [user.interpreter if rootless else sys.executable, "-m", "sandbox.cli", "doctor", *arguments]
    environment = {**user.environment(), **own} if rootless else {**os.environ, "PYTHONPATH": str(harness.REPOSITORY)}
    return (user.command(*program) if rootless else program), environment, user.repository


def run(
    who: str, user: User, prepare: str, *arguments: str, unshare: tuple[str, ...] = ("--mount",), **more: str
) -> subprocess.CompletedProcess[str]:
    """Run it in the namespaces that `unshare` makes, where `prepare`, a piece of shell, has been run with all rights."""
    argv, environment, folder = command(who, user, *arguments)
    return prepared.run(argv, prepare, unshare=unshare, env={**environment, **more}, cwd=folder)


def told(who: str, user: User, prepare: str, **more: Any) -> dict[str, Any]:
    """What it says as JSON, where something is missing."""
    done = run(who, user, prepare, "--json", **more)
    assert done.returncode == 1, (done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["uid"] == (user.uid if who == "rootless" else 0)
    return found


def check(found: dict[str, Any], name: str) -> dict[str, Any]:
    one: dict[str, Any] = next(each for each in found["checks"] if each["name"] == name)
    return one


def commands(one: dict[str, Any]) -> str:
    return "\n".join(line for mend in one["mends"] for line in mend["commands"])


def states(found: dict[str, Any]) -> dict[str, str]:
    return {each["level"]: each["state"] for each in found["levels"]}


# -- user namespaces -----------------------------------------------------------------------------------------------------


@ROOT
@pytest.mark.parametrize("who", ["root", "rootless"])
def test_no_user_namespaces(who: str, user: User) -> None:
    found = told(who, user, "echo 0 > /proc/sys/user/max_user_namespaces", unshare=("--user",))
    one = check(found, "user namespaces")
    assert one["cause"] == "user.max_user_namespaces is 0: nobody may make one"
    assert one["state"] == "refused"
    assert one["levels"]["strict"] == one["levels"]["maximum"] == "refused"
    assert one["levels"]["minimal"] == "ok"
    sudo = "sudo " if who == "rootless" else ""
    assert f"{sudo}sysctl -w user.max_user_namespaces=" in commands(one)
    assert one["mends"][0]["safe"]
    assert states(found)["strict"] == "refused"
    assert "user.max_user_namespaces is 0" in found["summary"]


@pytest.mark.long
@ROOT
@pytest.mark.parametrize("name", ["mnt", "pid", "ipc", "uts", "cgroup", "net"])
def test_each_other_kind_of_namespace(name: str, user: User) -> None:
    found = told("rootless", user, f"echo 0 > /proc/sys/user/max_{name}_namespaces", unshare=("--user",))
    one = check(found, "user namespaces")
    assert one["cause"].startswith(f"user.max_{name}_namespaces is 0")
    assert f"sysctl -w user.max_{name}_namespaces=" in commands(one)


@ROOT
def test_mount_namespaces_that_are_used_up(user: User) -> None:
    """There are enough for a probe, and too few for a sandbox: only opening one shows it."""
    found = told("root", user, "echo 3 > /proc/sys/user/max_mnt_namespaces", unshare=("--user",))
    one = check(found, "user namespaces")
    assert "user.max_mnt_namespaces is 3, and used up" in one["cause"]
    assert "sysctl -w user.max_mnt_namespaces=" in commands(one)
    assert one["state"] == "refused"
    assert states(found)["maximum"] == "refused"
    assert not any(level["opened"] for level in found["levels"] if level["state"] == "refused")


FILTER = """
import os, sys
import pyseccomp as s
refuse = s.SyscallFilter(s.ALLOW)
for name in ("unshare", "mount", "setns", "umount2", "pivot_root", "open_tree", "move_mount", "mount_setattr"):
    refuse.add_rule(s.ERRNO(1), name)
refuse.add_rule(s.ERRNO(1), "clone", s.Arg(0, s.MASKED_EQ, 0x10000000, 0x10000000))
refuse.add_rule(s.ERRNO(38), "clone3")
if "landlock" in sys.argv[1]:
    refuse.add_rule(s.ERRNO(1), "landlock_create_ruleset")
if "quiet" in sys.argv[1]:
    refuse = s.SyscallFilter(s.ALLOW)
    refuse.add_rule(s.ERRNO(1), "unshare")
if "partial" in sys.argv[1]:
    refuse = s.SyscallFilter(s.ALLOW)
    refuse.add_rule(s.ERRNO(1), "sethostname")
refuse.load()
os.execv(sys.argv[2], sys.argv[2:])
"""


def filtered(script: Path, kind: str) -> dict[str, Any]:
    """What the doctor says below such a filter, as in a container."""
    argv = [sys.executable, str(script), kind, sys.executable, "-m", "sandbox.cli", "doctor", "--json"]
    path = os.pathsep.join(filter(None, [str(harness.REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "container": "podman"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60 * harness.PATIENCE, check=False)
    assert done.returncode == 1, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", ["docker", "landlock", "quiet"])
def test_a_container_s_filter(kind: str, tmp_path: Path) -> None:
    """As Docker's: EPERM for namespaces and mounts, ENOSYS for clone3; or one that refuses unshare(2) alone."""
    script = tmp_path / "filter.py"
    script.write_text(FILTER)
    found = filtered(script, kind)
    one = check(found, "user namespaces")
    assert "a seccomp filter on this process refuses to make namespaces" in one["cause"]
    assert "podman run --security-opt seccomp=unconfined" in commands(one)
    assert not any(mend["safe"] for mend in one["mends"])
    assert states(found)["strict"] == "refused"
    system = check(found, "kernel")
    assert (system["state"] == "ok") == (kind == "quiet")
    if kind != "quiet":
        assert "clone3 cannot be called here: a seccomp filter" in system["cause"]
        assert set(states(found).values()) == {"refused"}
    if kind == "landlock":
        assert "a seccomp filter on this process refuses Landlock" in check(found, "Landlock")["cause"]


def test_a_filter_that_lets_namespaces_be_made_and_refuses_what_is_done_in_them(tmp_path: Path) -> None:
    """As Podman's: sethostname(2) takes a capability there that the container does not have."""
    script = tmp_path / "filter.py"
    script.write_text(FILTER)
    found = filtered(script, "partial")
    one = check(found, "opening a sandbox")
    assert "line call: hostname: " in one["cause"]
    assert "most likely the seccomp filter that is on this process" in one["cause"]
    assert "psie doctor" not in one["cause"] + found["summary"]
    assert commands(one) == "podman run --security-opt seccomp=unconfined IMAGE"
    assert states(found)["minimal"] != "refused"
    assert {states(found)[level] for level in LEVELS[1:]} == {"refused"}


@ROOT
def test_root_of_a_container() -> None:
    """Without CAP_SYS_ADMIN it can mount nothing, and psie does not make it a user: what is root's is not the plugin's."""
    path = os.pathsep.join(filter(None, [str(harness.REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "container": "docker"}
    argv = [
        "setpriv",
        "--bounding-set=-sys_admin",
        "--inh-caps=-sys_admin",
        sys.executable,
        "-m",
        "sandbox.cli",
        "doctor",
        "--json",
    ]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60 * harness.PATIENCE, check=False)
    found = json.loads(done.stdout)
    assert states(found)["strict"] == states(found)["maximum"] == "refused"
    one = next(each for each in found["checks"] if each["name"] == "opening a sandbox")
    assert "this root has no CAP_SYS_ADMIN, as in containers" in one["cause"]
    assert commands(one).startswith("docker run --user 1000 ")


# -- mounts --------------------------------------------------------------------------------------------------------------


@ROOT
@pytest.mark.parametrize("who", ["root", "rootless"])
def test_a_masked_proc(who: str, user: User) -> None:
    prepare = 'empty=$(mktemp -p /dev/shm)\nmount --bind "$empty" /proc/timer_list\nrm "$empty"\nmount -t tmpfs none /run'
    found = told(who, user, prepare + "\ntouch /run/.containerenv")
    one = check(found, "own /proc")
    assert "/proc/timer_list" in one["cause"]
    assert one["levels"] == {"minimal": "ok", "standard": "weaker", "strict": "weaker", "maximum": "weaker"}
    assert commands(one) == "podman run --security-opt unmask=ALL IMAGE"


@ROOT
def test_folders_of_psie_that_are_noexec(user: User) -> None:
    state = user.home / "noexec"
    state.mkdir(exist_ok=True)
    os.chown(state, user.uid, user.uid)
    prepare = f"mount -t tmpfs -o noexec,mode=777,uid={user.uid} none {state}"
    found = told("rootless", user, prepare, XDG_STATE_HOME=str(state))
    one = check(found, "exec in psie's folders")
    assert str(state) in one["cause"]
    assert one["state"] == "note"
    assert "XDG_STATE_HOME" in commands(one)


@ROOT
def test_a_state_folder_that_is_another_user_s(user: User) -> None:
    prepare = f"mount --bind {user.home} /mnt\nmount -t tmpfs -o mode=1777 none /tmp\n"
    prepare += f"mkdir -p {user.home}\nmount --bind /mnt {user.home}\n"  # psie itself may be in there
    prepare += f"mkdir /tmp/psie-{user.uid}-lib\nmkdir /tmp/psie-{user.uid}-run"
    found = told("rootless", user, prepare, HOME="/nowhere", XDG_RUNTIME_DIR="")
    one = check(found, "state folders")
    assert f"/tmp/psie-{user.uid}-run belongs to another user" in one["cause"]
    assert "XDG_RUNTIME_DIR" in commands(one)
    assert one["state"] == "refused"


@ROOT
def test_without_libseccomp(user: User) -> None:
    prepare = "for file in $(ldconfig -p | sed -n 's/.*libseccomp.so.2.* => //p'); do mount --bind /dev/null $file; done"
    found = told("root", user, prepare)
    one = check(found, "libseccomp")
    assert "libseccomp.so.2 is missing" in one["cause"]
    assert set(states(found).values()) == {"refused"}
    assert one["mends"][0]["safe"] or "install" in commands(one)


# -- cgroups -------------------------------------------------------------------------------------------------------------


@ROOT
def test_a_cgroup_tree_that_is_read_only(user: User) -> None:
    found = told("root", user, f"mount -o remount,bind,ro {place.mount_point()}")
    one = check(found, "cgroup v2")
    assert one["state"] == "weaker"
    if not set(place.legacy()) & {"memory", "pids", "cpu"}:
        assert "cannot be written" in one["cause"]
        assert "--cgroupns=private" in commands(one)
    else:
        assert "hybrid" in one["cause"]


@ROOT
def test_no_cgroup_tree(user: User) -> None:
    found = told("root", user, "mount -t tmpfs none /sys/fs/cgroup")
    one = check(found, "cgroup v2")
    assert "no cgroup v2 tree is mounted" in one["cause"]
    assert commands(one)
    assert "cgroup leaf" in str(found["levels"])


# -- limits of the process -------------------------------------------------------------------------------------------------


@ROOT
def test_too_few_descriptors(user: User) -> None:
    found = told("rootless", user, "ulimit -n 40")
    one = check(found, "rlimits")
    assert "RLIMIT_NOFILE is 40" in one["cause"]
    assert "/etc/security/limits.d/" in commands(one)


@ROOT
def test_too_few_processes(user: User) -> None:
    assert harness.wait_until(lambda: doctor.processes(user.uid)[1] == 0)  # what the last test has started has ended
    found = told("rootless", user, "prlimit --pid $$ --nproc=2:2")
    one = check(found, "rlimits")
    assert "RLIMIT_NPROC is 2, and user" in one["cause"]
    assert "nproc" in commands(one)
    assert one["state"] == "refused"


# -- who asks ----------------------------------------------------------------------------------------------------------------


@ROOT
def test_root_is_told_what_a_user_gets(user: User) -> None:
    """Really tried, as the user who became root; or said why not, where that user cannot reach the interpreter."""
    program = [user.interpreter, "-m", "sandbox.cli", "doctor", "--json"]
    environment = {**user.environment(), "HOME": "/root", "SUDO_UID": str(user.uid)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(user.repository), user.path]))
    done = subprocess.run(
        program, env=environment, cwd="/", capture_output=True, text=True, timeout=60 * harness.PATIENCE, check=False
    )
    found = json.loads(done.stdout)
    other = found["unprivileged"]
    assert other["uid"] == user.uid
    assert other["chosen"] == "the user who called sudo"
    assert [each["level"] for each in other["levels"]] == list(LEVELS)
    assert all(level["opened"] for level in other["levels"] if level["state"] != "refused")
    assert other["root_would_also_enforce"] or other["healthy"]
    assert found["uid"] == 0


@ROOT
def test_a_user_who_cannot_reach_psie_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(closed / "python"))
    monkeypatch.delenv("SUDO_UID", raising=False)
    other = doctor.ask_another()
    assert other.uid == doctor.NOBODY
    assert other.found is None
    assert other.not_tried is not None
    assert "is closed to it" in other.not_tried.text
    (mend,) = other.to_dict()["mends"]
    assert Path(mend.split()[-1], "pyproject.toml").exists() or mend.endswith(" psie")  # pip finds psie there


def test_the_verdict_agrees_with_what_opens() -> None:
    """On whatever host this is: each level was opened, or is refused with a reason and a finding that says why."""
    found = doctor.diagnose()
    assert [each.level for each in found.levels] == list(LEVELS)
    for level in found.levels:
        assert level.opened == (level.state != doctor.REFUSED), level
        assert bool(level.reason) == (level.state == doctor.REFUSED)
        assert bool(level.lacking) >= (level.state == doctor.WEAKER)
        told_by = [each for each in found.missing if each.levels[level.level] != doctor.OK]
        assert bool(told_by) == (level.state != doctor.OK)
    assert all(each.cause is not None for each in found.missing)


def test_what_no_check_accounts_for_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """No level opens, for a reason that is no lack of the host's."""
    monkeypatch.setenv("PSIE_MAX_MEMORY_MB", "1")
    found = doctor.diagnose()
    assert not any(level.opened for level in found.levels)
    told_by = next(each for each in found.missing if each.name == "opening a sandbox")
    assert told_by.cause is not None
    assert "PSIE_MAX_MEMORY_MB" in told_by.cause.text
    assert told_by.state == doctor.REFUSED


# -- mending -----------------------------------------------------------------------------------------------------------------

LOW = "echo 0 > /proc/sys/user/max_user_namespaces\nmount -t tmpfs none /etc/sysctl.d"


@ROOT
def test_fix_mends_and_says_what_has_changed(user: User) -> None:
    show = "\n{ " + shlex.join([sys.executable, "-m", "sandbox.cli", "doctor", "--fix", "--yes"])
    after = "; } || true\ncat /etc/sysctl.d/60-psie-max_user_namespaces.conf /proc/sys/user/max_user_namespaces >&2\n"
    done = run("root", user, LOW + show + after, "--json", unshare=("--user", "--mount"))
    first, found = done.stdout[: done.stdout.rindex("\n{\n")], json.loads(done.stdout[done.stdout.rindex("\n{\n") :])
    assert "user.max_user_namespaces is 0" in first
    assert "psie: done: sysctl -w user.max_user_namespaces=" in done.stderr
    assert "psie: level strict: refused before" in done.stderr
    assert "psie: user namespaces: mended" in done.stderr
    lines = done.stderr.splitlines()
    stored = next(each for each in lines if each.startswith("user.max_user_namespaces = "))
    assert stored.split()[-1] == lines[lines.index(stored) + 1] != "0"
    assert check(found, "user namespaces")["state"] == "ok"
    assert states(found)["strict"] != "refused"


@ROOT
def test_fix_says_which_command_has_failed(user: User) -> None:
    prepare = LOW + "\nmount -o remount,ro /etc/sysctl.d"
    done = run("root", user, prepare, "--fix", "--yes", unshare=("--user", "--mount"))
    assert done.returncode == 1
    assert "failed: " in done.stderr
    assert "Read-only file system" in done.stderr
    assert "psie: looked again: nothing has changed by that" in done.stderr, done.stderr
    assert "done: sysctl" not in done.stderr


@ROOT
@pytest.mark.parametrize("answer", ["n", "y"])
def test_fix_asks(answer: str, user: User) -> None:
    """On a terminal; anything but a yes is a no."""
    argv, environment, folder = command("root", user, "--fix")
    inner = f"{LOW}\n{shlex.join(argv)} || true\ncat /proc/sys/user/max_user_namespaces; ls /etc/sysctl.d"
    script = f"read go\nexec unshare --mount /bin/sh -ec {shlex.quote(inner)}"
    child, master = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe("unshare", ["unshare", "--user", "/bin/sh", "-ec", script], environment)
    prepared.map_every_id(child)
    os.write(master, b"go\n")
    shown = b""
    try:
        while b"apply it? [y/N]" not in shown:
            shown += os.read(master, 4096)
        os.write(master, answer.encode() + b"\n")
        while data := os.read(master, 4096):
            shown += data
    except OSError:  # EIO: all has ended
        pass
    finally:
        os.close(master)
        os.waitpid(child, 0)
    text = shown.decode()
    assert ("nothing was changed" in text) == (answer == "n"), text
    assert ("60-psie-max_user_namespaces.conf" in text.splitlines()[-1]) == (answer == "y"), text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--yes"], "--fix"), (["--fix", "--json", "--yes"], "--json"), (["--fix"], "terminal"), (["--level", "x"], "--level")],
)
def test_a_wrong_command_line(arguments: list[str], word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sandbox.cli", "doctor", *arguments],
        cwd=harness.REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 125
    assert word in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
