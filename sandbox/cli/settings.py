"""From the command's options to limits, permissions and config: flags before file before environment before defaults.

Imports what it takes to check settings: on the start path of `psie run` only where its recipe is not cached.
"""

from __future__ import annotations

import os

from sandbox.cli import options
from sandbox.cli.inputs import UsageError
from sandbox.config import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, load_config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SUBPROCESSES = 16  # with --allow-subprocess and no --pids
_UNITS = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024}


def level(text: str) -> IsolationLevel:
    if text.lower() in options.LEVELS:
        return IsolationLevel(text.lower())
    import difflib

    near = difflib.get_close_matches(text.lower(), options.LEVELS, 1)
    raise UsageError(
        f"--level {text}: there is no such level{f', did you mean {near[0]}' if near else ''}: give {', '.join(options.LEVELS)}"
    )


def number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{name} {text}: this is no number") from None


def megabytes(text: str) -> float:
    """128M, 1G, 512K, or a bare number of megabytes."""
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    if unit not in _UNITS:
        raise UsageError(f"--memory {text}: the unit is K, M or G, as in 128M")
    return number("--memory", text[:-1] if unit else text) * _UNITS[unit]


def host(text: str) -> str:
    from sandbox import network

    try:
        return network.join(*network.split(text))
    except ValueError as error:
        raise UsageError(f"--allow-host {text}: {error}") from None


def settings(given: dict[str, Any]) -> tuple[IsolationConfig, PluginLimitsV2, PluginPermissionsV2]:
    """Raises UsageError, ConfigError, ValueError or TypeError, each with one sentence."""
    if given.get("config"):
        config, limits, permissions = load_config(given["config"], os.environ)
    else:
        config, limits, permissions = IsolationConfig.from_env(), PluginLimitsV2.from_env(), PluginPermissionsV2()
    changes: dict[str, Any] = {}
    if given.get("level") is not None:
        changes["level"] = level(given["level"])
    for name in ("allow_degraded", "require_limits"):
        if given.get(name):
            changes[name] = True
    for name, value in changes.items():
        setattr(config, name, value)
    subprocess = bool(given.get("allow_subprocess"))
    bounds: dict[str, Any] = {}
    if given.get("memory") is not None:
        bounds["max_memory_mb"] = megabytes(given["memory"])
    if given.get("timeout") is not None:
        bounds["max_execution_time_seconds"] = number("--timeout", given["timeout"])
    if given.get("cpu") is not None:
        bounds["max_cpu_percent"] = number("--cpu", given["cpu"])
    if given.get("pids") is not None:
        if not given["pids"].removeprefix("-").isdecimal():
            raise UsageError(f"--pids {given['pids']}: give a whole number")
        bounds["max_thread_count"] = int(given["pids"])
    if subprocess:
        permissions.allow_subprocess_execution = True
        bounds["max_subprocess_count"] = bounds.get("max_thread_count", limits.max_subprocess_count or SUBPROCESSES)
    if given.get("allow_host"):
        permissions.allow_network_access = True
        permissions.allowed_hosts = [*permissions.allowed_hosts, *(host(text) for text in given["allow_host"])]
    if given.get("rw"):
        permissions.allowed_directories = [*permissions.allowed_directories, *given["rw"]]
    if given.get("allow_delete"):
        permissions.allow_file_deletion = True
    if bounds:
        limits = _bounded(limits, bounds)
    return config, limits, permissions


_FLAG_OF = {
    "max_memory_mb": "--memory",
    "max_execution_time_seconds": "--timeout",
    "max_cpu_percent": "--cpu",
    "max_thread_count": "--pids",
    "max_subprocess_count": "--pids",
}


def _bounded(limits: PluginLimitsV2, bounds: dict[str, Any]) -> PluginLimitsV2:
    """`limits` with `bounds` in place; thresholds follow their new maximum."""
    from dataclasses import fields

    values = {field.name: getattr(limits, field.name) for field in fields(limits)}
    for maximum, threshold in (
        ("max_memory_mb", "memory_warning_threshold_mb"),
        ("max_execution_time_seconds", "execution_warning_threshold_seconds"),
        ("max_cpu_percent", "cpu_warning_threshold_percent"),
    ):
        if maximum in bounds:
            del values[threshold]
    values.update(bounds)
    try:
        return PluginLimitsV2(**values)
    except (ValueError, TypeError) as error:
        for name, flag in _FLAG_OF.items():
            if name in str(error) and name in bounds:
                raise UsageError(str(error).replace(f"PluginLimitsV2.{name}", flag)) from None
        raise
