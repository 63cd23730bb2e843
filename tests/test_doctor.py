"""The causes that psie doctor tells apart: what it says of hosts whose files are not here (Ubuntu's, Debian's, older kernels').

The files are data for what reads them, laid out below a folder; what a host really does is tried in tests/integration.
"""

from __future__ import annotations

import errno
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox import causes, doctor, host
from sandbox.causes import Cause, Command, Files, Mend, Seen
from sandbox.cli import doctor as command
from sandbox.errors import SandboxInitializationError

USER = 1000


def seen(
    root: Path, files: dict[str, str] | None = None, *, uid: int = USER, facts: dict[str, Any] | None = None, **more: Any
) -> Seen:
    """A host that can do everything, for a user, but for what is given."""
    for name, text in (files or {}).items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    ideal = {"root": uid == 0, "uid": uid, "gid": uid, "cgroup_kind": "delegated", "cgroup_v1": (), "kernel": "6.12.1"}
    known = replace(host.ideal(), **{**ideal, **(facts or {})})
    return Seen(uid, "alice" if uid else "root", Files(str(root)), facts=known, environ={}, **more)


def commands(cause: Cause, *, as_root: bool = False) -> list[str]:
    return [line for mend in cause.mends for line in mend.shown(as_root=as_root)]


def found(cause: Cause | None) -> Cause:
    assert cause is not None
    return cause


@pytest.mark.parametrize("check", [*causes.BEFORE, *causes.CHECKS], ids=lambda check: str(check.name))
def test_nothing_is_said_of_a_host_that_can_do_everything(check: causes.Check, tmp_path: Path) -> None:
    files = {"/usr/bin/unshare": "", "/usr/bin/nsenter": ""}
    assert check.find(seen(tmp_path, files, descriptors=(1024, 66))) is None


def test_a_check_names_protections_that_there_are() -> None:
    """Those of recipes, and those that refusals are about; a renamed one would make a check lose its levels."""
    sources = "".join(path.read_text() for path in Path(doctor.__file__).parent.glob("recipe*.py"))
    for check in causes.CHECKS:
        for name in check.protections:
            assert f'"{name}"' in sources, name


# -- user namespaces -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, Any] = {"step": "a user namespace", "error": errno.EPERM}


def test_debian_s_switch(tmp_path: Path) -> None:
    cause = found(causes.user_namespaces(seen(tmp_path, {"/proc/sys/kernel/unprivileged_userns_clone": "0\n"}, **REFUSED)))
    assert "kernel.unprivileged_userns_clone is 0" in cause.text
    assert commands(cause)[-1] == "sudo sysctl -w kernel.unprivileged_userns_clone=1"
    assert not cause.mends[0].safe


def test_ubuntu_s_restriction(tmp_path: Path) -> None:
    """A profile first, the switch for all last; none is ever applied by --fix."""
    files = {"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"}
    given: dict[str, Any] = {"script": "/opt/my psie/bin/psie", "executable": "/opt/python"}
    cause = found(causes.user_namespaces(seen(tmp_path, files, step="a mount in it", error=errno.EACCES, **given)))
    assert "apparmor_restrict_unprivileged_userns is 1" in cause.text
    shown = commands(cause)
    assert 'profile psie "/opt/my psie/bin/psie" flags=(unconfined) {' in shown[0]
    assert shown[1] == "sudo apparmor_parser -r /etc/apparmor.d/psie"
    assert 'profile psie-python "/opt/python"' in shown[2]
    assert shown[-1] == "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    assert not any(mend.safe for mend in cause.mends)


def test_switches_for_users_do_not_concern_root(tmp_path: Path) -> None:
    files = {"/proc/sys/kernel/unprivileged_userns_clone": "0", "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"}
    cause = found(causes.user_namespaces(seen(tmp_path, files, uid=0, **REFUSED)))
    assert "does not say why" in cause.text


@pytest.mark.parametrize(
    ("files", "environ", "command"),
    [
        ({"/.dockerenv": ""}, {}, "docker run --security-opt seccomp=unconfined"),
        ({"/run/.containerenv": ""}, {}, "podman run --security-opt seccomp=unconfined"),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "seccompProfile: {type: Unconfined}"),
    ],
)
def test_the_container_that_we_are_in(tmp_path: Path, files: dict[str, str], environ: dict[str, str], command: str) -> None:
    status = {"/proc/self/status": "NoNewPrivs:\t0\nSeccomp:\t2\n"}
    host_of = replace(seen(tmp_path, {**files, **status}, **REFUSED), environ=environ)
    cause = found(causes.user_namespaces(host_of))
    assert "seccomp filter" in cause.text
    assert len(cause.mends) == 1
    assert command in commands(cause)[0]
    assert not cause.mends[0].safe


def test_a_container_of_no_known_kind_is_told_all(tmp_path: Path) -> None:
    cause = found(causes.user_namespaces(seen(tmp_path, {"/proc/self/status": "Seccomp:\t2\n"}, **REFUSED)))
    assert len(cause.mends) == len(causes.CONTAINERS)


def test_an_apparmor_profile_and_a_chroot(tmp_path: Path) -> None:
    confined = seen(tmp_path / "a", {"/proc/self/attr/apparmor/current": "docker-default (enforce)\n"}, **REFUSED)
    assert "docker-default" in found(causes.user_namespaces(confined)).text
    assert "docker run --security-opt apparmor=unconfined IMAGE" in commands(found(causes.user_namespaces(confined)))
    mounts = {"/proc/self/mountinfo": "22 1 0:20 / /proc rw - proc proc rw\n"}
    assert "chroot" in found(causes.user_namespaces(seen(tmp_path / "b", mounts, **REFUSED))).text


def test_a_kernel_without_user_namespaces(tmp_path: Path) -> None:
    cause = found(causes.user_namespaces(seen(tmp_path, step="a user namespace", error=errno.EINVAL)))
    assert "CONFIG_USER_NS" in cause.text


def test_namespaces_that_are_used_up_are_doubled(tmp_path: Path) -> None:
    files = {"/proc/sys/user/max_net_namespaces": "100", "/proc/sys/kernel/threads-max": "120"}
    cause = found(causes.user_namespaces(seen(tmp_path, files, step="a net namespace in it", error=errno.ENOSPC)))
    assert "user.max_net_namespaces is 100, and used up" in cause.text
    assert commands(cause)[-1] == "sudo sysctl -w user.max_net_namespaces=200"
    assert cause.mends[0].safe


# -- kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [(), ("landlock_restrict_self",)])
def test_an_old_kernel(tmp_path: Path, missing: tuple[str, ...]) -> None:
    cause = found(causes.kernel(seen(tmp_path, facts={"kernel": "5.15.0-101-generic", "missing_syscalls": missing})))
    assert "5.15.0-101-generic is older than 6.1" in cause.text
    assert cause.opening == bool(missing)


@pytest.mark.parametrize(("abi", "lacks"), [(2, "truncate"), (3, "TCP"), (5, "scopes")])
def test_what_an_older_landlock_lacks(tmp_path: Path, abi: int, lacks: str) -> None:
    cause = found(causes.landlock(seen(tmp_path, facts={"landlock_abi": abi, "kernel": "6.1.0"})))
    assert lacks in cause.text
    assert ("truncate" in cause.text) == (abi < 3)
    assert "6.12" in commands(cause)[0]


def test_landlock_that_is_not_switched_on(tmp_path: Path) -> None:
    """What is active stays so: a list without it would switch AppArmor off."""
    off: dict[str, Any] = {"facts": {"landlock_abi": 0}, "landlock_errno": errno.EOPNOTSUPP}
    cause = found(causes.landlock(seen(tmp_path / "a", {"/sys/kernel/security/lsm": "lockdown,capability,apparmor"}, **off)))
    assert "not switched on" in cause.text
    assert "lsm=landlock,lockdown,capability,apparmor" in commands(cause)[1]
    assert cause.mends[0].against == causes.REBOOT
    configured = {"/boot/config-6.12.1": 'CONFIG_SECURITY_LANDLOCK=y\nCONFIG_LSM="yama,apparmor"\n'}
    assert "lsm=landlock,yama,apparmor" in commands(found(causes.landlock(seen(tmp_path / "b", configured, **off))))[1]
    unknown = commands(found(causes.landlock(seen(tmp_path / "c", **off))))
    assert len(unknown) == 1
    assert "grub" not in unknown[0]


def test_landlock_that_is_not_built_in(tmp_path: Path) -> None:
    cause = found(causes.landlock(seen(tmp_path, facts={"landlock_abi": 0}, landlock_errno=errno.ENOSYS)))
    assert "built without Landlock" in cause.text


def test_seccomp_without_notifications(tmp_path: Path) -> None:
    files = {"/proc/sys/kernel/seccomp/actions_avail": "kill_process trap errno"}
    cause = found(causes.notifications(seen(tmp_path / "a", files, facts={"seccomp_notify": False})))
    assert "no user notifications" in cause.text
    assert "cannot be read" in found(causes.notifications(seen(tmp_path / "b", facts={"seccomp_notify": False}))).text


def test_overlayfs(tmp_path: Path) -> None:
    no = {"overlay": "No such device"}
    cause = found(causes.overlay(seen(tmp_path, {"/proc/filesystems": "nodev\tproc\n"}, facts=no)))
    assert commands(cause)[0] == "sudo modprobe overlay"
    assert cause.mends[0].safe
    old = {"overlay": "Invalid argument", "kernel": "6.1.0"}
    cause = found(causes.overlay(seen(tmp_path, {"/proc/filesystems": "nodev\toverlay\n"}, facts=old)))
    assert "before Linux 6.6" in cause.text


# -- cgroups -------------------------------------------------------------------------------------------------------------

SYSTEMD = {"/run/systemd/system/x": ""}
NONE: dict[str, Any] = {"cgroup_kind": "", "cgroup_folder": "", "controllers": ()}


def test_hybrid_cgroups(tmp_path: Path) -> None:
    facts = {**NONE, "cgroup_v1": ("memory", "pids")}
    cause = found(causes.cgroups(seen(tmp_path, SYSTEMD, facts=facts)))
    assert "hybrid: memory, pids in version 1" in cause.text
    assert any("systemd.unified_cgroup_hierarchy=1" in line for line in commands(cause))
    assert cause.mends[0].against == causes.REBOOT


@pytest.mark.parametrize(
    ("files", "word", "command"),
    [
        ({}, "no systemd session", "sudo loginctl enable-linger alice"),
        ({f"/run/user/{USER}/systemd": ""}, "has no bus", "sudo apt-get install --yes dbus-user-session"),
        ({f"/run/user/{USER}/bus": ""}, "may write", f"sudo systemctl start user@{USER}.service"),
    ],
)
def test_a_user_without_delegation(tmp_path: Path, files: dict[str, str], word: str, command: str) -> None:
    more = {**SYSTEMD, "/etc/os-release": "ID=ubuntu\nID_LIKE=debian\n"}
    cause = found(causes.cgroups(seen(tmp_path, {**more, **files}, facts=NONE)))
    assert word in cause.text
    assert commands(cause) == [command]
    assert cause.mends[0].safe


def test_a_scope_without_a_controller(tmp_path: Path) -> None:
    facts = {"cgroup_kind": "scope", "controllers": ("memory", "pids")}
    cause = found(causes.cgroups(seen(tmp_path, SYSTEMD, facts=facts)))
    assert cause.text.endswith("has no controller cpu")
    assert any("Delegate=cpu" in line and "user@.service.d" in line for line in commands(cause))


def test_root_of_a_tree_with_processes(tmp_path: Path) -> None:
    files = {"/sys/fs/cgroup/cgroup.controllers": "cpu memory pids"}
    facts = {"cgroup_kind": "root", "controllers": ()}
    cause = found(causes.cgroups(seen(tmp_path, files, uid=0, facts=facts)))
    assert "processes of its own" in cause.text


# -- mends -----------------------------------------------------------------------------------------------------------------


def test_a_command_is_what_a_shell_makes_of_it(tmp_path: Path) -> None:
    """As it is shown it does what --fix does, whatever is in it."""
    place = tmp_path / "it's a file"
    command = Command(("tee", str(place)), ("it's $HOME", "100 % of `it`"))
    subprocess.run(["/bin/sh", "-ec", command.shell(as_root=True)], check=True, capture_output=True)
    assert place.read_text() == "it's $HOME\n100 % of `it`\n"
    assert "| sudo tee" in command.shell(as_root=False)


def test_only_programs_with_nothing_against_them_are_safe() -> None:
    """A text is for the reader's shell: what is applied is a program and its arguments, with no shell between."""
    program = Command(("true",))
    assert Mend("x", (program,)).safe
    assert not Mend("x", (program, "do this")).safe
    assert not Mend("x", (program,), causes.REBOOT).safe


def test_a_failure_names_the_doctor() -> None:
    from sandbox.engine import client

    for number in (errno.ENOSPC, errno.EPERM, 0):
        assert "psie doctor" in str(SandboxInitializationError("no", mend=client.mend_of(number)))


# -- what another user's process says ------------------------------------------------------------------------------------------


def test_an_answer_with_no_end_is_not_read_to_the_end() -> None:
    with pytest.raises(ValueError, match="has no end"):
        doctor.answer(["cat", "/dev/zero"])


def test_who_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.1)
    with pytest.raises(ValueError, match="has not answered"):
        doctor.answer(["sleep", "1000"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"levels": 1}',
        b'{"levels": [{"level": []}]}',
        b'{"levels": [], "checks": [[]]}',
        b"\xff",
        b"[" * 99_999,
    ],
)
def test_an_answer_that_is_none(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"no diagnosis|char|decode"):
        doctor.understood(data)


def test_an_answer_is_understood_as_it_was_said() -> None:
    level = doctor.LevelVerdict("strict", doctor.REFUSED, False, "why", "Landlock", ())
    cause = Cause("no \x1b[31mred", (Mend("mends", (Command(("true",)), "or this")),))
    finding = doctor.Finding("Landlock", "writing", {"strict": doctor.REFUSED}, cause)
    said = doctor.Diagnosis(USER, "alice", "6.12", (level,), (finding,), ("cgroup leaf (strict)",)).to_dict()
    again = doctor.understood(json.dumps(said).encode())
    assert {**said, **again} == said


def test_an_answer_cannot_drive_root_s_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """What a user's own process says is shown to root: with every text of it hostile, all that comes out is text."""
    evil = "\x1b]0;owned\x07\x1b[2J\rroot# \n"
    mend = {"what": evil, "against": evil, "safe": False, "commands": [evil]}
    lacking = {"name": evil, "state": evil, "mechanism": evil, "detail": evil}
    levels = [{"level": evil, "state": evil, "reason": evil, "opened": False, "lacking": [lacking]}]
    checks = [{"name": evil, "purpose": evil, "state": evil, "cause": evil, "levels": {evil: evil}, "mends": [mend]}]
    said = {
        "kernel": evil,
        "summary": evil,
        "healthy": False,
        "levels": levels,
        "checks": checks,
        "root_would_also_enforce": [evil],
    }
    command.show_one(doctor.understood(json.dumps(said).encode()), "as user alice", as_root=True)
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert not {"\x1b", "\x07", "\r"} & set(shown)
    assert not any(line.startswith("root#") for line in shown.splitlines())
