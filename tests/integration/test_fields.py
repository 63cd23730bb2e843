"""Every field of every settings class does something: it changes the recipe, or it is refused with a reason.

A field that nobody has put into the tables here fails the tests: so nothing is ever promised by a name alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sandbox import (
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    SandboxInitializationError,
    SecurityLevel,
    host,
    recipe,
)

from . import harness


@pytest.fixture
def nothing_left() -> None:
    """Nothing is opened here."""


CLASSES: dict[str, type] = {"limits": PluginLimitsV2, "permissions": PluginPermissionsV2, "config": IsolationConfig}


CONTROLLERS = ("memory", "pids", "cpu")


@dataclasses.dataclass(frozen=True)
class Change:
    """One field set to something else, where it must show, and what else has to be set for it to matter.

    `shows` names parts of the recipe of which at least one must change. `refused` is what the text of a refusal must
    hold; with it and with `shows` either will do. `controllers` says what the host is to look like.
    """

    value: object
    shows: tuple[str, ...] = ()
    refused: str = ""
    level: IsolationLevel = IsolationLevel.STANDARD
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    permissions: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    controllers: tuple[str, ...] = CONTROLLERS


FORKS: dict[str, Any] = {"permissions": {"allow_subprocess_execution": True}, "limits": {"max_subprocess_count": 1}}
NETWORK = {"allow_network_access": True}
STRICT = IsolationLevel.STRICT

LIMITS = {
    "max_memory_mb": Change(256, ("cgroup",)),
    "memory_warning_threshold_mb": Change(64, ("cgroup",)),
    "max_execution_time_seconds": Change(5, ("limits",)),
    "execution_warning_threshold_seconds": Change(5, ("monitoring",)),
    "max_cpu_percent": Change(80, ("cgroup",)),
    "cpu_warning_threshold_percent": Change(10, ("monitoring",)),
    "max_file_operations": Change(7, ("monitoring",)),
    "max_file_size_mb": Change(5, ("rlimits",)),
    "max_network_requests": Change(7, ("network",)),
    "max_disk_usage_mb": Change(50, ("workspace",)),
    "max_subprocess_count": Change(5, ("cgroup",), **FORKS),
    "max_thread_count": Change(9, ("cgroup",)),
    "max_open_files": Change(99, ("rlimits",)),
    "max_inodes": Change(99, ("workspace",)),
    "max_io_mb_per_second": Change(5.0, ("cgroup",)),
    "max_output_mb": Change(3, ("limits",)),
    "max_result_mb": Change(3, ("limits",)),
}

PERMISSIONS = {
    "allow_file_access": Change(False, ("landlock",)),
    "allowed_directories": Change(["/usr/share"], ("granted",)),
    "blocked_directories": Change(["/usr/share"], ("call_mounts",)),
    "allow_file_creation": Change(False, ("landlock",)),
    "allow_file_deletion": Change(True, ("monitoring",)),
    "max_file_size_mb": Change(5, ("rlimits",)),
    "allow_network_access": Change(True, ("network",)),
    "allowed_hosts": Change(["localhost"], ("network",), permissions=NETWORK),
    "blocked_hosts": Change(["localhost"], ("network",), permissions=NETWORK),
    "allowed_ports": Change([8080], ("network",), permissions=NETWORK),
    "allowed_modules": Change(["json"], ("modules",)),
    "blocked_modules": Change(["json"], ("modules",)),
    "allow_subprocess_execution": Change(True, ("seccomp",), limits={"max_subprocess_count": 1}),
    "allow_thread_creation": Change(False, ("seccomp",)),
    "allow_environment_variables": Change(False, ("environment",)),
    "security_level": Change(SecurityLevel.HIGH, ("seccomp",)),
    "require_code_signing": Change(True, ("monitoring",), "require_code_signing"),
    "readable_paths": Change(["/srv"], ("sandbox_mounts",), level=STRICT),
    "sandbox_user": Change("nobody", ("ids",), "" if harness.ROOT else "only root can run as another user"),
}

CONFIG = {
    "level": Change(STRICT, ("namespaces",)),
    "enable_process_isolation": Change(False, ("namespaces",)),
    "enable_network_isolation": Change(False, ("namespaces",), level=STRICT, config={"allow_degraded": True}),
    "enable_filesystem_isolation": Change(False, ("namespaces",)),
    "enable_real_time_monitoring": Change(False, ("monitoring",)),
    "auto_recovery_enabled": Change(False, ("monitoring",)),
    "violation_threshold": Change(5, ("monitoring",)),
    "quarantine_on_violation": Change(False, ("monitoring",)),
    "telemetry_enabled": Change(False, ("monitoring",)),
    "watchdog_timeout_seconds": Change(10, ("monitoring",)),
    "resource_check_interval_seconds": Change(0.5, ("monitoring",)),
    "max_sandbox_lifetime_minutes": Change(5, ("monitoring",)),
    "require_limits": Change(True, (), "no memory controller.*require_limits", controllers=()),
    "preload": Change(("json",), ("preload",)),
}
# This one undoes a refusal, so it is tested the other way round.
UNDOES = {"allow_degraded": Change(True, level=STRICT, config={"enable_process_isolation": False})}

TABLES: dict[str, dict[str, Change]] = {"limits": LIMITS, "permissions": PERMISSIONS, "config": CONFIG}
EVERY = [(kind, name) for kind, table in TABLES.items() for name in table]


def compiled(change: Change, kind: str = "", name: str = "") -> dict[str, object]:
    """The recipe for the change's surroundings, with the field itself set if it is named."""
    given = {which: dict(getattr(change, which)) for which in CLASSES}
    given["config"].setdefault("level", change.level)
    if kind:
        given[kind][name] = change.value
    facts = dataclasses.replace(
        host.facts(),
        controllers=change.controllers,
        io_controller=bool(change.controllers),
        cgroup_kind="root",
        cgroup_folder="/sys/fs/cgroup",
    )
    limits, permissions, config = (CLASSES[which](**given[which]) for which in CLASSES)
    return recipe.compile(config, limits, permissions, facts).to_dict()


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tables_know_every_field(kind: str) -> None:
    known = set(TABLES[kind]) | (set(UNDOES) if kind == "config" else set())
    assert known == {field.name for field in dataclasses.fields(CLASSES[kind])}


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_tables_change_every_field(kind: str, name: str) -> None:
    change = TABLES[kind][name]
    given = dict(getattr(change, kind))
    assert getattr(CLASSES[kind](**given), name) != getattr(CLASSES[kind](**{**given, name: change.value}), name)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_field_changes_the_recipe_or_is_refused(kind: str, name: str) -> None:
    change = TABLES[kind][name]
    before = compiled(change)
    if change.refused:
        try:
            after = compiled(change, kind, name)
        except (ValueError, SandboxInitializationError) as error:
            with pytest.raises(type(error), match=change.refused):
                raise
            return
        assert change.shows, f"{name} is neither refused nor shown"
    else:
        after = compiled(change, kind, name)
    changed = {part for part in before if before[part] != after[part]}
    assert changed & set(change.shows), f"{name} changes {sorted(changed) or 'nothing'}, not {change.shows}"


def test_allow_degraded_undoes_a_refusal() -> None:
    (change,) = UNDOES.values()
    with pytest.raises(SandboxInitializationError, match=r"PID namespace.*enable_process_isolation.*allow_degraded"):
        compiled(change)
    degraded = compiled(change, "config", "allow_degraded")
    states = {item["name"]: item["state"] for item in degraded["protections"]}  # type: ignore[attr-defined]
    assert states["PID namespace"] == "substituted"


@pytest.mark.parametrize("level", [IsolationLevel.STRICT, IsolationLevel.MAXIMUM])
@pytest.mark.parametrize("switch", ["enable_process_isolation", "enable_network_isolation", "enable_filesystem_isolation"])
def test_strict_levels_refuse_to_be_weakened(level: IsolationLevel, switch: str) -> None:
    change = Change(False, level=level)
    with pytest.raises(SandboxInitializationError, match=rf"{switch}.*allow_degraded"):
        compiled(change, "config", switch)


def test_each_limit_has_a_substitute_or_is_said_to_be_missing() -> None:
    """Without controllers the same limits are there by other means, or the report says that they are not."""
    throttled = {"max_io_mb_per_second": 5.0}
    with_all, without = (compiled(Change(0, limits=throttled, controllers=each)) for each in (CONTROLLERS, ()))
    states = {item["name"]: item["state"] for item in without["protections"]}  # type: ignore[attr-defined]
    for name in ("memory", "processes and threads", "CPU"):
        assert states[name] == "substituted"
    assert states["disk throughput"] == "missing"
    names = [[line[0] for line in made["rlimits"]] for made in (with_all, without)]  # type: ignore[attr-defined]
    assert set(names[1]) - set(names[0]) == {"RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_CPU", "RLIMIT_NPROC"}


@pytest.mark.parametrize(
    ("here", "mend"),
    [
        ({"root": True, "cgroup_v1": ("memory",), "cgroup_kind": "root"}, "psie doctor shows how"),
        ({"root": True}, "--cgroupns=private"),
        ({"root": False}, "systemd-run --user --scope --property=Delegate=yes"),
        ({"root": False, "cgroup_kind": "scope"}, "systemctl edit user@.service"),
    ],
)
def test_the_way_to_controllers_is_that_of_the_place(here: dict[str, Any], mend: str) -> None:
    facts = dataclasses.replace(host.facts(), **{"controllers": (), "cgroup_v1": (), "cgroup_kind": "", **here})
    config = IsolationConfig(level=STRICT, require_limits=True, allow_degraded=True)
    with pytest.raises(SandboxInitializationError) as caught:
        recipe.compile(config, PluginLimitsV2(), PluginPermissionsV2(), facts)
    assert mend in str(caught.value)
    assert mend in (caught.value.mend or "")


@pytest.mark.parametrize("level", [IsolationLevel.MINIMAL, IsolationLevel.STANDARD])
@pytest.mark.parametrize("lacks", [{"landlock_abi": 0, "user_namespaces": "switched off"}, {}], ids=["host", "settings"])
def test_a_view_that_nothing_restricts_is_not_said_to_be_enforced(level: IsolationLevel, lacks: dict[str, Any]) -> None:
    facts = dataclasses.replace(host.ideal(), **lacks)
    config = IsolationConfig(level=level, enable_filesystem_isolation=bool(lacks))
    made = recipe.compile(config, PluginLimitsV2(), PluginPermissionsV2(), facts)
    assert {each.name: each.state for each in made.protections}["view of the files"] == "missing"
