"""Hosts that lack something: a /proc with covered parts, as containers have it, and no user namespaces.

Each level refuses with protection, reason and mend, or substitutes and says so; what works, works.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from sandbox.cgroups import place

from . import harness, prepared
from .unprivileged import User

pytestmark = pytest.mark.usefixtures("as_root")

WHO = ["root", "rootless"]
HIGH = ["strict", "maximum"]


def probe(who: str, user: User, unshare: str, prepare: str, *switches: str) -> dict[str, Any]:
    """What `probe.py` tells, as root or as the user, in the namespaces that `unshare` makes.

    `prepare` is a piece of shell that runs with all rights in them, before the id is the user's. In a new user
    namespace every id is mapped to itself.
    """
    rootless = who == "rootless"
    python, repository = (user.interpreter, user.repository) if rootless else (sys.executable, harness.REPOSITORY)
    path = os.pathsep.join(filter(None, [str(repository), str(repository / "tests"), user.path if rootless else ""]))
    program = [python, str(repository / "tests" / "integration" / "probe.py"), *switches]
    environment = {**(user.environment() if rootless else os.environ), "PYTHONPATH": path}
    argv = user.command(*program) if rootless else program
    done = prepared.run(argv, prepare, unshare=(unshare,), env=environment, cwd=repository)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["uid"] == (user.uid if rootless else 0)
    assert found["left"] == {}
    return found


def check_error(told: dict[str, Any], protection: str, *words: str) -> None:
    """A refusal that names the protection, the reason and the mend."""
    assert told.get("error") == "SandboxInitializationError", told
    assert told["protection"] == protection
    assert told["mend"]
    assert told["mend"] in told["text"]
    for word in (protection, *words):
        assert word in told["text"]


# -- a /proc with a covered part ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=WHO)
def masked(request: pytest.FixtureRequest, user: User) -> dict[str, Any]:
    """Every level where one file of /proc is covered, so that the kernel lets no user namespace mount a fresh one."""
    prepare = 'empty=$(mktemp -p /dev/shm)\nmount --bind "$empty" /proc/timer_list\nrm "$empty"'
    found = probe(request.param, user, "--mount", prepare)
    levels: dict[str, Any] = found["levels"]
    return levels


@pytest.mark.parametrize("name", ["standard", *HIGH])
def test_with_a_masked_proc_a_sandbox_has_none(masked: dict[str, Any], name: str) -> None:
    told = masked[name]
    assert "error" not in told, told
    assert told["seen"]["proc"] == []
    assert told["seen"]["pid"] == 2
    assert not told["seen"]["written"]
    protection = told["protections"]["own /proc"]
    assert protection["state"] == "substituted"
    assert protection["mechanism"] == "no /proc at all"
    assert "stronger" in protection["detail"]
    assert protection["mend"]


def test_with_a_masked_proc_minimal_works_as_ever(masked: dict[str, Any]) -> None:
    told = masked["minimal"]
    assert "error" not in told, told
    assert not told["seen"]["written"]
    assert "own /proc" not in told["protections"]


# -- no user namespaces ------------------------------------------------------------------------------------------------

CLOSED = "echo 0 > /proc/sys/user/max_user_namespaces"


@pytest.fixture(scope="module", params=WHO)
def closed(request: pytest.FixtureRequest, user: User) -> dict[str, Any]:
    """Every level where user.max_user_namespaces is 0."""
    levels: dict[str, Any] = probe(request.param, user, "--user", CLOSED)["levels"]
    return levels


@pytest.fixture(scope="module", params=WHO)
def closed_degraded(request: pytest.FixtureRequest, user: User) -> dict[str, Any]:
    """The same with allow_degraded=True."""
    levels: dict[str, Any] = probe(request.param, user, "--user", CLOSED, "allow_degraded")["levels"]
    return levels


@pytest.mark.parametrize("name", HIGH)
def test_without_user_namespaces_high_levels_refuse(closed: dict[str, Any], name: str) -> None:
    check_error(closed[name], "user namespace", name, "user.max_user_namespaces is 0", "allow_degraded")


def test_without_user_namespaces_minimal_works(closed: dict[str, Any]) -> None:
    told = closed["minimal"]
    assert "error" not in told, told
    assert told["seen"]["uid"] != 0
    assert not told["seen"]["written"]


def check_substituted(told: dict[str, Any]) -> None:
    assert "error" not in told, told
    assert told["seen"]["uid"] != 0
    assert not told["seen"]["written"]
    for name in ("user", "mount", "PID", "IPC", "UTS", "cgroup"):
        protection = told["protections"][f"{name} namespace"]
        assert protection["state"] in ("substituted", "missing")
        assert "max_user_namespaces" in protection["detail"]
        assert protection["mend"]
    assert told["protections"]["workspace"]["state"] == "substituted"
    assert "own /proc" not in told["protections"]


def test_without_user_namespaces_standard_substitutes_and_says_so(closed: dict[str, Any]) -> None:
    check_substituted(closed["standard"])


@pytest.mark.parametrize("name", ["standard", *HIGH])
def test_without_user_namespaces_degraded_levels_say_so(closed_degraded: dict[str, Any], name: str) -> None:
    check_substituted(closed_degraded[name])


# -- a cgroup tree that cannot be written --------------------------------------------------------------------------------


def test_with_a_read_only_cgroup_tree_limits_are_substituted(user: User) -> None:
    tree = place.mount_point()
    levels = probe("root", user, "--mount", f"mount -o remount,bind,ro {tree}")["levels"]
    for name, told in levels.items():
        assert "error" not in told, told
        assert told["protections"]["cgroup leaf"]["state"] == ("missing" if name == "minimal" else "substituted")
        for limit in ("memory", "processes and threads", "CPU"):
            assert told["protections"][limit]["state"] == "substituted"
        assert "mounted read-write" in told["protections"]["cgroup leaf"]["mend"]


# -- few mount namespaces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", range(2, 8))
def test_with_few_mount_namespaces_a_level_works_or_names_the_line(most: int, user: User) -> None:
    """Wherever on the way the last one is used up: by the zygote, the warden or init."""
    levels = probe("root", user, "--user", f"echo {most} > /proc/sys/user/max_mnt_namespaces")["levels"]
    for told in levels.values():
        if "error" in told:
            assert told["error"] == "SandboxInitializationError", told
            assert told["line"] or told["protection"] == "user namespace", told
            assert "user.max_" in told["text"]
    assert most > 2 or "error" in levels["maximum"]
    assert most < 7 or "error" not in levels["minimal"]


# -- no limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", WHO)
def test_limits_that_are_required_and_not_there(who: str, user: User) -> None:
    """Rootless there is no cgroup tree that we may write; as root it depends on the host."""
    found = probe(who, user, "--mount", "true", "require_limits")["levels"]
    for told in found.values():
        if "error" in told:
            check_error(told, told["protection"], "require_limits")
            assert told["protection"] in ("cgroup leaf", "memory", "processes and threads", "CPU")
        else:
            assert who == "root"
            assert all(told["protections"][name]["state"] == "enforced" for name in ("memory", "CPU"))
