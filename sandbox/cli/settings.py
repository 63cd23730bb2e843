"""From the command's options, files and variables to limits, permissions and config: what holds, and where it comes from.

Imports what it takes to check settings: on the start path of `psie run` only where its recipe is not cached.
"""

from __future__ import annotations

import os
from shlex import quote

from sandbox.cli import beside, options
from sandbox.cli.inputs import UsageError
from sandbox.config import (
    ConfigError,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    from_environment,
    in_file,
    read_settings,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
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
        raise UsageError(f"{name} {text}: this is no number: give one, such as 50 or 0.5") from None


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


DEFAULT = "default"
KINDS = {"isolation": IsolationConfig, "limits": PluginLimitsV2, "permissions": PluginPermissionsV2}
Setting = tuple[str, str]  # table and key
_LETTERS = "abcdefghijklmnopqrstuvwxyz_"  # of keys


class Gathered:
    """The settings of a run, each with where it comes from.

    In this order, a later one wins: defaults, SANDBOX_* variables, [tool.psie] of the pyproject.toml beside the plugin, the
    psie.toml beside it, both if a person has accepted them; in place of these two the file of --config; options. A file beside
    the plugin that nobody has accepted comes before the options, and only makes less of what there is.

    Attributes:
        config, limits, permissions: the settings.
        origins: where each setting comes from that is not the default.
        notes: what a person should know of files that wanted more, a sentence each.
    """

    def __init__(self, given: dict[str, Any], found: Sequence[beside.Found]) -> None:
        self.origins: dict[Setting, str] = {}
        self.notes: list[str] = []
        self._values: dict[str, dict[str, Any]] = {table: {} for table in KINDS}
        for (table, key), (value, variable) in from_environment(os.environ).items():
            self._put(table, key, value, variable)
        name = ""
        if given.get("config") is not None:
            name, tables = read_settings(given["config"])
            self._put_all(name, tables)
        asking = []
        for file in found:
            if file.is_accepted:
                name = file.name
                self._put_all(name, file.tables())
            else:
                asking.append((file, file.tables()))
        self._build(name)
        for file, tables in asking:
            self._lessen(file.name, tables)
        self._options(given)
        for file, tables in asking:
            self._note(file, tables)

    def _put(self, table: str, key: str, value: Any, origin: str) -> None:
        self._values[table][key] = value
        self.origins[table, key] = origin

    def _put_all(self, name: str, tables: dict[str, dict[str, Any]]) -> None:
        for table, values in tables.items():
            for key, value in values.items():
                self._put(table, key, value, name)

    def _build(self, name: str) -> None:
        try:
            self.config = IsolationConfig(**self._values["isolation"])
            self.limits = PluginLimitsV2(**self._values["limits"])
            self.permissions = PluginPermissionsV2(**self._values["permissions"])
        except (TypeError, ValueError) as error:
            located = self.located(error)
            if located is not error:
                raise located from None
            if not name:
                raise
            raise in_file(name, error) from None

    def located(self, error: Exception) -> Exception:
        """An error about a setting that is wrong beside others, or on this host, with the file or option that has set it."""
        begin, _, rest = str(error).partition(".")
        key = rest[: len(rest) - len(rest.lstrip(_LETTERS))]
        for table, kind in KINDS.items():
            origin = self.origins.get((table, key), "")
            if begin == kind.__name__ and origin:
                said = rest.removeprefix(key) if origin.startswith("--") else f": [{table}] {rest}"
                return ConfigError(f"{origin}{said}")
        return error

    def objects(self) -> dict[str, Any]:
        return {"isolation": self.config, "limits": self.limits, "permissions": self.permissions}

    def _lessen(self, name: str, tables: dict[str, dict[str, Any]]) -> None:
        """By what a file asks for that nobody has accepted: as by a plugin's manifest."""
        from sandbox.plugins import effective
        from sandbox.plugins.manifest import Manifest

        before = {table: dict(vars(each)) for table, each in self.objects().items()}
        asked = Manifest(name, limits=tables["limits"], permissions=tables["permissions"], isolation=tables["isolation"])
        try:
            self.config, self.limits, self.permissions = effective.effective(asked, self.config, self.limits, self.permissions)
        except (TypeError, ValueError) as error:
            raise in_file(name, error) from None
        for table, each in self.objects().items():
            for key, value in vars(each).items():
                if value != before[table][key]:
                    self.origins[table, key] = f"{name}, not accepted: only less"

    def _note(self, file: beside.Found, tables: dict[str, dict[str, Any]]) -> None:
        from sandbox.plugins import effective

        objects = self.objects()
        more = [key for table, asked in tables.items() for key in effective.asks_for_more(objects[table], asked)]
        if more:
            self.notes.append(
                f"{file.name} asks for more than it gets ({', '.join(more)}), and nobody has accepted it: read it, then "
                f"psie trust {quote(file.path)}"
            )

    def _options(self, given: dict[str, Any]) -> None:
        if given.get("level") is not None:
            self._set("isolation", "level", level(given["level"]), "--level")
        for name in ("allow_degraded", "require_limits"):
            if given.get(name):
                self._set("isolation", name, True, f"--{name.replace('_', '-')}")
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
        if given.get("allow_subprocess"):
            self._set("permissions", "allow_subprocess_execution", True, "--allow-subprocess")
            bounds["max_subprocess_count"] = bounds.get("max_thread_count", self.limits.max_subprocess_count or SUBPROCESSES)
        if given.get("allow_host"):
            hosts = [*self.permissions.allowed_hosts, *(host(text) for text in given["allow_host"])]
            self._set("permissions", "allow_network_access", True, "--allow-host")
            self._set("permissions", "allowed_hosts", hosts, "--allow-host")
        if given.get("rw"):
            self._set("permissions", "allowed_directories", [*self.permissions.allowed_directories, *given["rw"]], "--rw")
        if given.get("allow_delete"):
            if not self.permissions.allowed_directories:
                raise UsageError("--allow-delete: there is no folder that it may change: give one by --rw DIR, or leave it out")
            self._set("permissions", "allow_file_deletion", True, "--allow-delete")
        if bounds:
            self.limits = bounded(self.limits, bounds)
            for name in bounds:
                without_number = name == "max_subprocess_count" and given.get("pids") is None
                self.origins["limits", name] = "--allow-subprocess" if without_number else _FLAG_OF[name]

    def _set(self, table: str, key: str, value: Any, origin: str) -> None:
        setattr(self.objects()[table], key, value)
        before = self.origins.get((table, key))
        adds = isinstance(value, list) and before not in (None, origin)
        self.origins[table, key] = f"{before}, {origin}" if adds else origin


def gathered(given: dict[str, Any]) -> Gathered:
    """Raises UsageError, ConfigError, ValueError or TypeError, each with one sentence; ResourceError as `beside.find`."""
    return Gathered(given, beside.find(given))


def settings(given: dict[str, Any]) -> tuple[IsolationConfig, PluginLimitsV2, PluginPermissionsV2]:
    """Raises what `gathered` raises."""
    all_of_it = gathered(given)
    return all_of_it.config, all_of_it.limits, all_of_it.permissions


_FLAG_OF = {
    "max_memory_mb": "--memory",
    "max_execution_time_seconds": "--timeout",
    "max_cpu_percent": "--cpu",
    "max_thread_count": "--pids",
    "max_subprocess_count": "--pids",
}


def bounded(limits: PluginLimitsV2, bounds: dict[str, Any]) -> PluginLimitsV2:
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
