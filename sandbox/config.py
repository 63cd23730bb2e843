"""What a caller says: isolation level, limits, permissions; in code, in environment variables or in a TOML file.

This module checks that what was said makes sense in itself. It must not know what a level means, what this host can do,
or how anything is enforced: `sandbox.recipe` does. It is loaded at every start, so it imports little.

Units: 1 MB is 2**20 bytes. A percentage of CPU is of one CPU: 200 are two whole CPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, NoReturn

    Check = Callable[[str, object], object]


class ConfigError(ValueError):
    """A configuration file or an environment variable is wrong; the message is one sentence that names it."""


class IsolationLevel(Enum):
    """How much isolation a sandbox has; from the first to the last it grows."""

    MINIMAL = "minimal"
    STANDARD = "standard"
    STRICT = "strict"
    MAXIMUM = "maximum"


class SecurityLevel(Enum):
    """How tight the system call filter is at least: HIGH asks for the allowlist, MAXIMUM for the tight one."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    MAXIMUM = "maximum"


# Checks: check(where, value) returns the value to store, or raises with one sentence: where, what, the mend.


def _refuse(where: str, value: object, mend: str, kind: type[Exception] = ValueError) -> NoReturn:
    named = f"{show(value)} ({type(value).__name__})" if kind is TypeError and value is not None else show(value)
    raise kind(f"{where} is {named}: {mend}")


def level_of(where: str, value: object) -> IsolationLevel:
    """The level that is meant by one, or by its name. Raises ValueError."""
    names = [each.value for each in IsolationLevel]
    if not isinstance(value, IsolationLevel) and value not in names:
        _refuse(where, value, f"give {', '.join(names)}, or an IsolationLevel")
    return IsolationLevel(value)


def show(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # somebody else's __repr__, or an int of more digits than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(low: float, high: float, what: str, why: str = "") -> Check:
    mend = f"give a number{what} from {low:,} to {high:,}{why}"

    def check(where: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _refuse(where, value, mend, TypeError)
        if not low <= value <= high:  # also nan
            _refuse(where, value, mend)
        return float(value)  # 128 and 128.0 are one configuration, and must give one recipe

    return check


def _derived(check: Check) -> Check:
    return lambda where, value: None if value is None else check(where, value)


def _whole(low: int, high: int, what: str = "") -> Check:
    mend = f"give a whole number{what} from {low} to {high}"

    def check(where: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            _refuse(where, value, mend, TypeError)
        if not low <= value <= high:
            _refuse(where, value, mend)
        return int(value)

    return check


def _switch(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        _refuse(where, value, "give True or False", TypeError)
    return value


def _member(kind: type[Enum]) -> Check:
    def check(where: str, value: object) -> Enum:
        if isinstance(value, kind):
            return value
        name = kind.__name__
        for member in kind:
            if isinstance(value, str) and value.strip().lower() == member.value:
                _refuse(where, value, f'give {name}.{member.name}, or {name}("{member.value}") for a text', TypeError)
        _refuse(where, value, "give one of " + ", ".join(f"{name}.{member.name}" for member in kind), TypeError)

    return check


def _items(check: Check, what: str) -> Callable[[str, object], list[Any]]:
    def check_all(where: str, value: object) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            _refuse(where, value, f"give a list of {what}", TypeError)
        return [check(f"{where}[{index}]", item) for index, item in enumerate(value)]

    return check_all


def _directory(where: str, value: object, what: str = "a directory") -> str:
    mend = f"give an absolute path of {what}"
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str):
        _refuse(where, value, mend + " as a str or Path", TypeError)
    if not path.startswith("/"):
        _refuse(where, value, mend + ', one that begins with "/"')
    if "\0" in path:
        _refuse(where, value, mend + " without a NUL character")
    return path


def _path(where: str, value: object) -> str:
    return _directory(where, value, "a file or directory")


def _host(where: str, value: object) -> str:
    from sandbox import network

    if not isinstance(value, str):
        _refuse(where, value, 'give a host name, an IP address, a network such as 10.0.0.0/8, or "*"', TypeError)
    try:
        return network.join(*network.split(value))
    except ValueError as error:
        _refuse(where, value, str(error))


def _module(where: str, value: object) -> str:
    mend = 'give a dotted module name, such as "json" or "os.path"'
    if not isinstance(value, str):
        _refuse(where, value, mend, TypeError)
    if not all(part.isidentifier() for part in value.split(".")):
        _refuse(where, value, mend)
    return value


def _user(where: str, value: object) -> str | None:
    mend = "give the name of a user of this host, or None"
    if value is None:
        return None
    if not isinstance(value, str):
        _refuse(where, value, mend, TypeError)
    if not value or not value.isprintable() or any(char in ":/ " for char in value):
        _refuse(where, value, mend)
    return value


def _preload(where: str, value: object) -> tuple[str, ...]:
    return tuple(_items(_module, "module names")(where, value))


_MB = 1_000_000_000  # far beyond any host, and in bytes still within 63 bits
_COUNT = 1_000_000_000
_TASKS = 4_194_304  # PID_MAX_LIMIT of a 64-bit kernel
_YEAR = 31_536_000
_CPUS = 8192  # the most a kernel can be built for
_DERIVED: Any = None

_LIMITS: dict[str, Check] = {
    "max_memory_mb": _number(8, _MB, " of megabytes", ": Python alone needs 8"),
    "memory_warning_threshold_mb": _derived(_number(0.001, _MB, " of megabytes")),
    "max_execution_time_seconds": _number(0.001, _YEAR, " of seconds"),
    "execution_warning_threshold_seconds": _derived(_number(0.0001, _YEAR, " of seconds")),
    "max_cpu_percent": _number(1, 100 * _CPUS, " of percent of one CPU"),
    "cpu_warning_threshold_percent": _derived(_number(0.001, 100 * _CPUS, " of percent of one CPU")),
    "max_file_operations": _whole(0, _COUNT),
    "max_file_size_mb": _number(0, _MB, " of megabytes"),
    "max_network_requests": _whole(0, _COUNT),
    "max_disk_usage_mb": _number(0.01, _MB, " of megabytes"),
    "max_subprocess_count": _whole(0, _TASKS),
    "max_thread_count": _whole(1, _TASKS),
    "max_open_files": _whole(8, 1_048_576),
    "max_inodes": _whole(16, _COUNT),
    "max_io_mb_per_second": _derived(_number(0.01, _MB, " of megabytes a second")),
    "max_output_mb": _number(0, _MB, " of megabytes"),
    "max_result_mb": _number(0.001, _MB, " of megabytes"),
}

WARNINGS = (  # threshold, limit, share of the limit it is when nobody says, as percent
    ("memory_warning_threshold_mb", "max_memory_mb", 75),
    ("execution_warning_threshold_seconds", "max_execution_time_seconds", 80),
    ("cpu_warning_threshold_percent", "max_cpu_percent", 80),
)

_directories = _items(_directory, "absolute paths")
_paths = _items(_path, "absolute paths")
_hosts = _items(_host, "host names, IP addresses or networks")
_modules = _items(_module, "module names")

_PERMISSIONS: dict[str, Check] = {
    "allow_file_access": _switch,
    "allowed_directories": _directories,
    "blocked_directories": _directories,
    "allow_file_creation": _switch,
    "allow_file_deletion": _switch,
    "max_file_size_mb": _number(0, _MB, " of megabytes"),
    "allow_network_access": _switch,
    "allowed_hosts": _hosts,
    "blocked_hosts": _hosts,
    "allowed_ports": _items(_whole(1, 65535), "port numbers from 1 to 65535"),
    "allowed_modules": _modules,
    "blocked_modules": _modules,
    "allow_subprocess_execution": _switch,
    "allow_thread_creation": _switch,
    "allow_environment_variables": _switch,
    "security_level": _member(SecurityLevel),
    "require_code_signing": _switch,
    "sandbox_user": _user,
    "readable_paths": _paths,
}

_ISOLATION: dict[str, Check] = {
    "level": _member(IsolationLevel),
    "enable_process_isolation": _switch,
    "enable_network_isolation": _switch,
    "enable_filesystem_isolation": _switch,
    "enable_real_time_monitoring": _switch,
    "auto_recovery_enabled": _switch,
    "violation_threshold": _whole(1, 10, " of violations"),
    "quarantine_on_violation": _switch,
    "telemetry_enabled": _switch,
    "watchdog_timeout_seconds": _whole(5, 300, " of seconds"),
    "resource_check_interval_seconds": _number(0.1, 60, " of seconds"),
    "max_sandbox_lifetime_minutes": _whole(1, 1440, " of minutes"),
    "allow_degraded": _switch,
    "require_limits": _switch,
    "preload": _preload,
}


@dataclass(kw_only=True)
class PluginLimitsV2:
    """Resource limits of a sandbox. All arguments are keywords; whole numbers are taken for float fields.

    Attributes:
        max_memory_mb: memory, in MB, 8 or more: Python alone needs that much.
        memory_warning_threshold_mb: from where on to warn, above 0 and at most the limit; None: 75 % of it.
        max_execution_time_seconds: wall clock time of one call, in seconds, 0.001 to a year.
        execution_warning_threshold_seconds: likewise; None: 80 %.
        max_cpu_percent: CPU time, in percent of one CPU, 1 or more.
        cpu_warning_threshold_percent: likewise; None: 80 %.
        max_file_operations: how many file operations, 0 or more.
        max_file_size_mb: size of one file, in MB, 0 or more; the permissions have such a limit too, the smaller one holds.
        max_network_requests: how many network requests, 0 or more.
        max_disk_usage_mb: size of the workspace, in MB, 0.01 or more.
        max_subprocess_count: how many processes beside the plugin's own at a time, 0 or more.
        max_thread_count: how many threads at a time, the main one counted, 1 or more.
        max_open_files: open file descriptors of a process, 8 to 1048576; Python and the engine need some of them.
        max_inodes: files and directories in the workspace, 16 or more.
        max_io_mb_per_second: what may be read from each disk, and written to it, in MB a second, 0.01 or more; None: no limit.
        max_output_mb: standard output and error together, in MB, 0 or more.
        max_result_mb: encoded result of one call, in MB, 0.001 or more.

    A threshold is worked out once, so `dataclasses.replace` with a lower limit wants a new threshold too (None will do).

    Raises:
        TypeError, ValueError: a field has the wrong type, lies outside its range, or is a threshold above its limit.
    """

    max_memory_mb: float = 128.0
    memory_warning_threshold_mb: float = _DERIVED
    max_execution_time_seconds: float = 30.0
    execution_warning_threshold_seconds: float = _DERIVED
    max_cpu_percent: float = 50.0
    cpu_warning_threshold_percent: float = _DERIVED
    max_file_operations: int = 1000
    max_file_size_mb: float = 50.0
    max_network_requests: int = 10
    max_disk_usage_mb: float = 100.0
    max_subprocess_count: int = 0
    max_thread_count: int = 4
    max_open_files: int = 50
    max_inodes: int = 10_000
    max_io_mb_per_second: float | None = None
    max_output_mb: float = 16.0
    max_result_mb: float = 16.0

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all fields again, as the constructor did; for objects whose fields were assigned since.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        _check_fields(self, "PluginLimitsV2", _LIMITS)
        for threshold, limit, percent in WARNINGS:
            most = getattr(self, limit)
            if getattr(self, threshold) is None:
                setattr(self, threshold, most * percent / 100)
            elif getattr(self, threshold) > most:
                mend = f"give at most {limit}, which is {most:g}, or leave it out for {percent} % of that"
                _refuse(f"PluginLimitsV2.{threshold}", getattr(self, threshold), mend)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> PluginLimitsV2:
        """The defaults, changed by SANDBOX_DEFAULT_MEMORY_MB and SANDBOX_DEFAULT_TIMEOUT_SECONDS.

        A variable that is unset or empty changes nothing. `environ` is `os.environ` if None.

        Raises:
            ConfigError: a value is wrong; the message names the variable.
        """
        return cls(**_from_env(_LIMITS_VARIABLES, environ))


@dataclass(kw_only=True)
class PluginPermissionsV2:
    """What a plugin may do. All arguments are keywords; lists are copied.

    Attributes:
        allow_file_access: whether granted directories are there at all.
        allowed_directories: directories granted to the plugin, as absolute paths (str or Path; kept as str).
        blocked_directories: directories hidden from it, likewise.
        allow_file_creation: whether granted directories can be written to.
        allow_file_deletion: whether files that were in a granted directory before can be deleted.
        max_file_size_mb: size of one file, in MB of 2**20 bytes, 0 or more; the smaller one of this and the limits' holds.
        allow_network_access: whether it may make TCP connections, to allowed hosts at allowed ports; nothing else, and none in.
        allowed_hosts: where to: names, IP addresses and networks (10.0.0.0/8), each with ":port" behind it or for all of
            allowed_ports (IPv6 in brackets then); empty means nowhere, "*" every public host. A name counts for the
            addresses that it has when a sandbox opens, but not for private ones or this machine's: list those themselves.
        blocked_hosts: where it may not even so, likewise; a name without any address then opens no sandbox.
        allowed_ports: ports of the allowed hosts that come without one, each 1 to 65535.
        allowed_modules: the only modules the plugin may import itself; empty means all. A convenience, no protection.
        blocked_modules: modules the plugin may not import itself. A convenience, no protection.
        allow_subprocess_execution: whether it may start programs.
        allow_thread_creation: whether it may start threads.
        allow_environment_variables: whether it gets the clean, listed set of environment variables, never the caller's.
        security_level: how tight the system call filter is at least.
        require_code_signing: whether a plugin must be signed by a trusted key. Only a plugin of a plugin folder can be, so
            only EnhancedPluginFramework takes it.
        sandbox_user: name of the host user whose id the plugin runs as; without root only oneself.
        readable_paths: files and directories that it may read and nothing else, as absolute paths, beside what its level
            shows; what their owner alone may read stays so where the plugin has another id.

    Raises:
        TypeError, ValueError: a field has the wrong type or a value without sense.
    """

    allow_file_access: bool = True
    allowed_directories: list[str] = field(default_factory=list)
    blocked_directories: list[str] = field(default_factory=list)
    allow_file_creation: bool = True
    allow_file_deletion: bool = False
    max_file_size_mb: float = 10.0
    allow_network_access: bool = False
    allowed_hosts: list[str] = field(default_factory=list)
    blocked_hosts: list[str] = field(default_factory=list)
    allowed_ports: list[int] = field(default_factory=lambda: [80, 443])
    allowed_modules: list[str] = field(default_factory=list)
    blocked_modules: list[str] = field(default_factory=list)
    allow_subprocess_execution: bool = False
    allow_thread_creation: bool = True
    allow_environment_variables: bool = True
    security_level: SecurityLevel = SecurityLevel.MEDIUM
    require_code_signing: bool = False
    sandbox_user: str | None = None
    readable_paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all fields again, as the constructor did; for objects whose fields were assigned since.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        _check_fields(self, "PluginPermissionsV2", _PERMISSIONS)


@dataclass
class IsolationConfig:
    """Isolation settings of a sandbox.

    Attributes:
        level: the isolation level.
        enable_process_isolation: whether it has PID, IPC and UTS namespaces.
        enable_network_isolation: whether it has a network of its own rather than the host's.
        enable_filesystem_isolation: whether it has its own view of the files.
        enable_real_time_monitoring: whether samples are taken; the limits hold without them.
        auto_recovery_enabled: whether a violation is recovered from without asking.
        violation_threshold: how many different violations a call may have, 1 to 10. The one that reaches it is escalated; a
            further one has no answer, and the call is killed.
        quarantine_on_violation: whether a plugin beyond the threshold is quarantined.
        telemetry_enabled: whether telemetry is stored.
        watchdog_timeout_seconds: how long psie waits for its own parts, in seconds, 5 to 300: for a worker to stand (with
            the start of its zygote, and its preloads), for a call to end once its time is over or it is killed, for granted
            folders to be attached anew, for a closed sandbox to leave. After that the sandbox's warden is killed, or if its
            zygote does not answer for 5 more seconds that, with all of its sandboxes; calls end with a ResourceError. A
            plugin is not waited for: its time is max_execution_time_seconds. A plugin framework waits as long for a place
            among the sandboxes of this user.
        resource_check_interval_seconds: time between two samples, in seconds, 0.1 to 60.
        max_sandbox_lifetime_minutes: how long a sandbox may stay open, in minutes, 1 to 1440. Then running and later calls
            end with a ResourceLimitExceededError (limit "lifetime"), all of the sandbox goes, and changes that were not
            committed with it; records stay. Setting the clock changes nothing, nor does a caller that is blocked; for one
            that is stopped it is as soon as that goes on. Time in which the machine is suspended does not count.
        allow_degraded: whether an isolation that cannot be had is replaced by a weaker one and reported, not refused.
        require_limits: whether a limit that the kernel cannot enforce here is refused, not replaced and reported.
        preload: modules that are imported once and then shared by all sandboxes; kept as a tuple.

    Raises:
        TypeError, ValueError: a field has the wrong type or lies outside its range.
    """

    level: IsolationLevel = IsolationLevel.STANDARD
    enable_process_isolation: bool = True
    enable_network_isolation: bool = True
    enable_filesystem_isolation: bool = True
    enable_real_time_monitoring: bool = True
    auto_recovery_enabled: bool = True
    violation_threshold: int = 3
    quarantine_on_violation: bool = True
    telemetry_enabled: bool = True
    watchdog_timeout_seconds: int = 30
    resource_check_interval_seconds: float = 1.0
    max_sandbox_lifetime_minutes: int = 60
    allow_degraded: bool = False
    require_limits: bool = False
    preload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all fields again, as the constructor did; for objects whose fields were assigned since.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        _check_fields(self, "IsolationConfig", _ISOLATION)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> IsolationConfig:
        """The defaults, changed by environment variables.

        SANDBOX_ISOLATION_LEVEL (minimal, standard, strict, maximum), SANDBOX_MONITORING_ENABLED, SANDBOX_TELEMETRY_ENABLED,
        SANDBOX_AUTO_RECOVERY, SANDBOX_QUARANTINE_ENABLED (true or false, yes or no, on or off, 1 or 0),
        SANDBOX_RESOURCE_CHECK_INTERVAL (seconds), SANDBOX_VIOLATION_THRESHOLD. Upper or lower case does not matter; a variable
        that is unset or empty changes nothing. `environ` is `os.environ` if None.

        Raises:
            ConfigError: a value is wrong, or a name is nearly that of one of them; the message names the variable.
        """
        return cls(**_from_env(_ISOLATION_VARIABLES, environ))


def _check_fields(target: object, class_name: str, checks: Mapping[str, Check]) -> None:
    for name, check in checks.items():
        setattr(target, name, check(f"{class_name}.{name}", getattr(target, name)))


# From the environment. A parser turns the text into what the check of the field takes.


def _parse_switch(where: str, text: str) -> bool:
    word = text.lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    _refuse(where, text, "give true or false")


def _parse_number(where: str, text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text  # and let the check say what it takes


def _parse_whole(where: str, text: str) -> object:
    try:
        return int(text)
    except ValueError:
        return text


def _parse_level(where: str, text: str) -> Enum:
    return _member_of(where, text, IsolationLevel)


def _member_of(where: str, value: object, kind: type[Enum]) -> Enum:
    """The member that a text in a file or variable means."""
    names: list[str] = [member.value for member in kind]
    if isinstance(value, str) and value.strip().lower() in names:
        return kind(value.strip().lower())
    _refuse(where, value, f"give one of {', '.join(names)}{_near(value, names)}")


_ISOLATION_VARIABLES: dict[str, tuple[str, Callable[[str, str], object], Check]] = {
    "SANDBOX_ISOLATION_LEVEL": ("level", _parse_level, _ISOLATION["level"]),
    "SANDBOX_MONITORING_ENABLED": ("enable_real_time_monitoring", _parse_switch, _switch),
    "SANDBOX_TELEMETRY_ENABLED": ("telemetry_enabled", _parse_switch, _switch),
    "SANDBOX_RESOURCE_CHECK_INTERVAL": (
        "resource_check_interval_seconds",
        _parse_number,
        _ISOLATION["resource_check_interval_seconds"],
    ),
    "SANDBOX_VIOLATION_THRESHOLD": ("violation_threshold", _parse_whole, _ISOLATION["violation_threshold"]),
    "SANDBOX_AUTO_RECOVERY": ("auto_recovery_enabled", _parse_switch, _switch),
    "SANDBOX_QUARANTINE_ENABLED": ("quarantine_on_violation", _parse_switch, _switch),
}
_LIMITS_VARIABLES: dict[str, tuple[str, Callable[[str, str], object], Check]] = {
    "SANDBOX_DEFAULT_MEMORY_MB": ("max_memory_mb", _parse_number, _LIMITS["max_memory_mb"]),
    "SANDBOX_DEFAULT_TIMEOUT_SECONDS": (
        "max_execution_time_seconds",
        _parse_number,
        _LIMITS["max_execution_time_seconds"],
    ),
}

PREFIX = "SANDBOX_"
VARIABLES = {"isolation": _ISOLATION_VARIABLES, "limits": _LIMITS_VARIABLES}  # by table


def _from_env(
    variables: Mapping[str, tuple[str, Callable[[str, str], object], Check]], environ: Mapping[str, str] | None
) -> dict[str, Any]:
    environ = os.environ if environ is None else environ
    _refuse_misspelt(environ)
    values: dict[str, Any] = {}
    for variable, (name, parse, check) in variables.items():
        text = environ.get(variable, "").strip()
        if not text:
            continue
        try:
            parsed = parse(variable, text)
            if isinstance(parsed, str):
                _refuse(variable, text, _mend_of(check, variable))
            values[name] = check(variable, parsed)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from None
    return values


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    """A variable whose name is nearly one of ours; others with this beginning may be for other programs."""
    own = ["SANDBOX_LOG_LEVEL", *(variable for variables in VARIABLES.values() for variable in variables)]
    ends = [variable.removeprefix(PREFIX) for variable in own]
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in own and environ[variable].strip():
            import difflib

            for near in difflib.get_close_matches(variable.removeprefix(PREFIX)[:80].upper(), ends, 1):
                raise ConfigError(
                    f"{plain_key(variable)} is no variable of psie's: write {PREFIX}{near} if you mean that, or unset it"
                )


def _mend_of(check: Check, where: str) -> str:
    """What a check of a number tells to someone who gave none."""
    try:
        check(where, None)
    except TypeError as error:
        return str(error).partition(": ")[2]
    raise AssertionError(f"the check of {where} takes None")


_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def log_level_from_env(environ: Mapping[str, str] | None = None) -> str:
    """The name of the log level that SANDBOX_LOG_LEVEL asks for, as the module `logging` writes it; WARNING if unset.

    Upper or lower case does not matter. `environ` is `os.environ` if None.

    Raises:
        ConfigError: there is no such level.
    """
    text = (os.environ if environ is None else environ).get("SANDBOX_LOG_LEVEL", "").strip()
    if not text:
        return "WARNING"
    if text.upper() not in _LOG_LEVELS:
        _refuse(
            "SANDBOX_LOG_LEVEL", text, f"give one of {', '.join(_LOG_LEVELS)}{_near(text.upper(), _LOG_LEVELS)}", ConfigError
        )
    return text.upper()


# From a file.

MAX_FILE_BYTES = 1_048_576
TABLES: dict[str, dict[str, Check]] = {"isolation": _ISOLATION, "limits": _LIMITS, "permissions": _PERMISSIONS}
_ENUMS: dict[str, type[Enum]] = {"level": IsolationLevel, "security_level": SecurityLevel}


def load_config(
    path: str | os.PathLike[str], environ: Mapping[str, str] | None = None
) -> tuple[IsolationConfig, PluginLimitsV2, PluginPermissionsV2]:
    """Read a TOML file with the tables [isolation], [limits] and [permissions].

    Their keys are the fields of `IsolationConfig`, `PluginLimitsV2` and `PluginPermissionsV2`; levels are their lower case
    names. Whatever is left out has its default.

    Args:
        path: the file: UTF-8, at most 1 MB.
        environ: where the file says nothing, the SANDBOX_* variables in here count, e.g. `os.environ`; None: no variables.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or holds something unknown or wrong; one sentence that names file
            and key.
    """
    name, tables = read_settings(path)
    if environ is not None:
        for (table, key), (value, _) in from_environment(environ).items():
            tables[table].setdefault(key, value)
    try:
        return (
            IsolationConfig(**tables["isolation"]),
            PluginLimitsV2(**tables["limits"]),
            PluginPermissionsV2(**tables["permissions"]),
        )
    except (TypeError, ValueError) as error:
        raise in_file(name, error) from None


def in_file(name: str, error: Exception) -> ConfigError:
    """What is wrong with fields together, such as a threshold above its limit, with the names that they have in a file."""
    text = str(error)
    for table, kind in (("isolation", IsolationConfig), ("limits", PluginLimitsV2), ("permissions", PluginPermissionsV2)):
        text = text.replace(f"{kind.__name__}.", f"[{table}] ")
    return ConfigError(f"{name}: {text}")


def read_settings(path: str | os.PathLike[str]) -> tuple[str, dict[str, dict[str, Any]]]:
    """How messages name the file, and what it says as `tables_of` gives it. Raises ConfigError."""
    name, data = _read_file(path)
    return name, tables_of(name, parse_toml(name, decoded(name, data)))


def tables_of(name: str, document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a document says: checked values by key, for each of the tables. Raises ConfigError, which begins with `name`."""
    for key, value in document.items():
        if key not in TABLES:
            _refuse_key(name, key, value)
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: {key} is {show(value)}: make it a table, [{key}]")
    return {table: read_table(name, table, document) for table in TABLES}


def from_environment(environ: Mapping[str, str]) -> dict[tuple[str, str], tuple[Any, str]]:
    """What the SANDBOX_* variables say: the value and its variable by table and key. Raises ConfigError."""
    told: dict[tuple[str, str], tuple[Any, str]] = {}
    for table, variables in VARIABLES.items():
        names = {key: variable for variable, (key, _, _) in variables.items()}
        for key, value in _from_env(variables, environ).items():
            told[table, key] = value, names[key]
    return told


def _read_file(path: str | os.PathLike[str]) -> tuple[str, bytes]:
    from sandbox.text import escape_text

    given = os.fspath(path)
    if not isinstance(given, str):
        raise TypeError(f"load_config takes a str or Path, not {show(given)}: decode it with os.fsdecode")
    if not given:
        raise ConfigError("the name of the settings file is empty: give the path of a TOML file")
    name = escape_text(given, keep="")
    try:
        with open(given, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file: check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{name} is a directory: give the TOML file in it") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL, or a surrogate that no file name can have
        raise ConfigError(f"{name} cannot be a file name: {error}") from None
    return name, data


def decoded(name: str, data: bytes) -> str:
    """The text of a configuration file. Raises ConfigError for too much of it, or another encoding than UTF-8."""
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{name} is larger than 1 MB: a configuration is a few lines")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name} is not UTF-8 (line {line}, byte {error.start}): save it as UTF-8") from None


def parse_toml(name: str, text: str) -> dict[str, Any]:
    """Raises ConfigError, with the line as tomllib says it, for what is no TOML."""
    import tomllib

    from sandbox.text import escape_text

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else escape_text(str(error), keep="")
        raise ConfigError(f"{name} is not valid TOML: {reason}") from None


def read_table(name: str, table: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """What `document` says in `table`, checked key by key; `name` begins the sentence of the ConfigError."""
    checks = TABLES[table]
    values: dict[str, Any] = {}
    for key, value in document.get(table, {}).items():
        if key not in checks:
            _refuse_key(name, key, value, table)
        where = f"{name}: [{table}] {key}"
        try:
            values[key] = checks[key](where, _member_of(where, value, _ENUMS[key]) if key in _ENUMS else value)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from None
    return values


def _refuse_key(name: str, key: str, value: object, table: str | None = None) -> NoReturn:
    """Refuse an unknown table or key with the nearest known one, or with the table where the key belongs."""
    if table is None and isinstance(value, dict):
        raise ConfigError(f"{name}: unknown table [{plain_key(key)}]: {known(key, TABLES)}")
    what = f"{name}: unknown key {plain_key(key)}" + (f" in [{table}]" if table else " outside of a table")
    for other, checks in TABLES.items():
        if key in checks:
            raise ConfigError(f"{what}: put it into [{other}]")
    if table is None:
        raise ConfigError(f"{what}: put keys into [isolation], [limits] or [permissions]")
    raise ConfigError(f"{what}: {known(key, TABLES[table])}")


def plain_key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() and len(key) <= 80 else show(key)


def known(word: str, names: Iterable[str]) -> str:
    names = list(names)
    return _near(word, names).lstrip(", ") or f"known are {', '.join(names)}"


def _near(word: object, names: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, list(names), n=1) if isinstance(word, str) and len(word) <= 80 else []
    return f", did you mean {near[0]}?" if near else ""
