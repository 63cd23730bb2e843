"""What a plugin gets: what the host allows, made less by what its manifest asks for.

A manifest can only ask. The host's settings, given by the caller, are the most that a plugin gets, and hold wherever the
manifest says nothing. RULES tells for each field how the two combine:

    HOST       the host's, whatever the manifest says: it is none of the plugin's business
    SMALLER    the smaller number; None is no limit
    BOTH       True if both are: a permission
    EITHER     True if one is: a protection
    STRICTER   the later of an enum
    UNION      all that either one blocks
    COMMON     the host's entries that the manifest asks for as well
    HOSTS      the manifest's entries that the host's list allows, with their ports
    MODULES    the manifest's that the host's list allows; the host's where that leaves none, as an empty list allows all

A directory counts only as the host itself names it: what a folder within it is can change between check and use.

Host side. It must not know where the host's settings come from.
"""

from __future__ import annotations

import os
from dataclasses import fields

from sandbox import network
from sandbox.config import WARNINGS, IsolationConfig, PluginLimitsV2, PluginPermissionsV2
from sandbox.engine.access import Network, is_public, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from enum import Enum
    from typing import Any

    from sandbox.plugins.manifest import Manifest

    Rule = Callable[[Any, Any], Any]


def HOST(host: Any, asked: Any) -> Any:
    return host


def SMALLER(host: float | None, asked: float | None) -> float | None:
    return min((value for value in (host, asked) if value is not None), default=None)


def BOTH(host: bool, asked: bool) -> bool:
    return host and asked


def EITHER(host: bool, asked: bool) -> bool:
    return host or asked


def STRICTER(host: Enum, asked: Enum) -> Enum:
    return max(host, asked, key=list(type(host)).index)


def UNION(host: list[Any], asked: list[Any]) -> list[Any]:
    return list(dict.fromkeys([*host, *asked]))


def COMMON(host: list[Any], asked: list[Any]) -> list[Any]:
    wanted = {_plain(entry) for entry in asked}
    return [entry for entry in host if _plain(entry) in wanted]


def _plain(entry: Any) -> Any:
    return os.path.normpath(entry) if isinstance(entry, str) else entry


def MODULES(host: list[str], asked: list[str]) -> list[str]:
    if not host or not asked:
        return host or asked
    return [name for name in asked if any(f"{name}.".startswith(f"{allowed}.") for allowed in host)] or host


def HOSTS(host: PluginPermissionsV2, asked: list[str]) -> list[str]:
    return [entry for entry in asked if any(_covers(allowed, entry, host.allowed_ports) for allowed in host.allowed_hosts)]


def _covers(allowed: str, asked: str, ports: list[int]) -> bool:
    """Whether what an entry of the manifest reaches is among what one of the host's reaches. An entry without a port is for
    all of allowed_ports, of which the plugin has no more than the host."""
    (place, port), (wanted, wanted_port) = network.split(allowed), network.split(asked)
    if not (port == wanted_port or (not port and wanted_port in ports)):
        return False
    if place == wanted:
        return True
    if network.is_name(wanted):
        return place == "*"  # what the name leads to is looked at when a sandbox opens, as for "*"
    if wanted == "*" or network.is_name(place):
        return False
    if place == "*":  # every public host; what is listed by its address may be a private one
        return "/" not in wanted and is_public(parse(wanted))
    outer, inner = Network(place), Network(wanted)
    return (
        outer.family == inner.family
        and outer.shift >= inner.shift
        and inner.prefix >> (outer.shift - inner.shift) == outer.prefix
    )


RULES: dict[type[Any], dict[str, Rule]] = {
    PluginLimitsV2: {
        "max_memory_mb": SMALLER,
        "memory_warning_threshold_mb": SMALLER,
        "max_execution_time_seconds": SMALLER,
        "execution_warning_threshold_seconds": SMALLER,
        "max_cpu_percent": SMALLER,
        "cpu_warning_threshold_percent": SMALLER,
        "max_file_operations": SMALLER,
        "max_file_size_mb": SMALLER,
        "max_network_requests": SMALLER,
        "max_disk_usage_mb": SMALLER,
        "max_subprocess_count": SMALLER,
        "max_thread_count": SMALLER,
        "max_open_files": SMALLER,
        "max_inodes": SMALLER,
        "max_io_mb_per_second": SMALLER,
        "max_output_mb": SMALLER,
        "max_result_mb": SMALLER,
    },
    PluginPermissionsV2: {
        "allow_file_access": BOTH,
        "allowed_directories": COMMON,
        "blocked_directories": UNION,
        "allow_file_creation": BOTH,
        "allow_file_deletion": BOTH,
        "max_file_size_mb": SMALLER,
        "allow_network_access": BOTH,
        "allowed_hosts": HOSTS,
        "blocked_hosts": UNION,
        "allowed_ports": COMMON,
        "allowed_modules": MODULES,
        "blocked_modules": UNION,
        "allow_subprocess_execution": BOTH,
        "allow_thread_creation": BOTH,
        "allow_environment_variables": BOTH,
        "security_level": STRICTER,
        "require_code_signing": EITHER,
        "sandbox_user": HOST,
        "readable_paths": COMMON,
    },
    IsolationConfig: {
        "level": STRICTER,
        "enable_process_isolation": EITHER,
        "enable_network_isolation": EITHER,
        "enable_filesystem_isolation": EITHER,
        "enable_real_time_monitoring": EITHER,
        "auto_recovery_enabled": HOST,
        "violation_threshold": SMALLER,
        "quarantine_on_violation": HOST,
        "telemetry_enabled": HOST,
        "watchdog_timeout_seconds": SMALLER,
        "resource_check_interval_seconds": SMALLER,
        "max_sandbox_lifetime_minutes": SMALLER,
        "allow_degraded": BOTH,
        "require_limits": EITHER,
        "preload": HOST,
    },
}


def effective(
    manifest: Manifest, config: IsolationConfig, limits: PluginLimitsV2, permissions: PluginPermissionsV2
) -> tuple[IsolationConfig, PluginLimitsV2, PluginPermissionsV2]:
    """The settings that a plugin with this manifest is run with: never more than the host's, which are left as they are.

    Where the manifest asks for a lower limit and no warning threshold, the threshold is lowered with the limit.
    """
    asked_limits = dict(manifest.limits)
    if asked_limits:
        derived = PluginLimitsV2(**asked_limits)
        for threshold, limit, _ in WARNINGS:
            if limit in asked_limits:
                asked_limits[threshold] = getattr(derived, threshold)
    least = PluginLimitsV2(**_combined(limits, asked_limits))
    allowed = PluginPermissionsV2(**_combined(permissions, manifest.permissions))
    if "max_subprocess_count" in asked_limits and least.max_subprocess_count == 0:
        allowed.allow_subprocess_execution = False  # to ask for none is no contradiction
    return IsolationConfig(**_combined(config, manifest.isolation)), least, allowed


def asks_for_more(host: Any, asked: Mapping[str, Any]) -> list[str]:
    """The fields of what is asked for that the host's settings do not give in full."""
    more = []
    for name, value in asked.items():
        rule = RULES[type(host)][name]
        given = rule(host if rule is HOSTS else getattr(host, name), value)
        is_less = set(given) != set(value) if isinstance(value, list) else given != value
        if is_less and rule is not UNION:
            more.append(name)
    return more


def retry_memory(manifest: Manifest, limits: PluginLimitsV2) -> float:
    """The memory in MB that a plugin may have for a second try, never more than the host's limit; 0: there is none."""
    return min(manifest.retry_memory_mb or 0.0, limits.max_memory_mb)


def _combined(host: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    values = {field.name: getattr(host, field.name) for field in fields(host)}
    for name, value in asked.items():
        rule = RULES[type(host)][name]
        values[name] = rule(host if rule is HOSTS else values[name], value)
    return values
