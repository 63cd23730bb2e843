"""What a caller may say, and what is answered to nonsense."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import sandbox.config
from sandbox.config import (
    ConfigError,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    SecurityLevel,
    load_config,
    log_level_from_env,
)

CLASSES: dict[str, Callable[..., Any]] = {
    "PluginLimitsV2": PluginLimitsV2,
    "PluginPermissionsV2": PluginPermissionsV2,
    "IsolationConfig": IsolationConfig,
}


@pytest.mark.parametrize(
    ("cls", "checks"),
    [
        (PluginLimitsV2, sandbox.config._LIMITS),
        (PluginPermissionsV2, sandbox.config._PERMISSIONS),
        (IsolationConfig, sandbox.config._ISOLATION),
    ],
)
def test_every_field_is_checked(cls: type[Any], checks: dict[str, object]) -> None:
    names = [item.name for item in dataclasses.fields(cls)]
    assert names == list(checks)
    for name in names:
        with pytest.raises((TypeError, ValueError), match=rf"^{cls.__name__}\.{name} is <object .*: give "):
            cls(**{name: object()})


def test_derived_thresholds() -> None:
    limits = PluginLimitsV2(max_memory_mb=64, max_execution_time_seconds=10, max_cpu_percent=100)
    assert limits.memory_warning_threshold_mb == 48.0
    assert limits.execution_warning_threshold_seconds == 8.0
    assert limits.cpu_warning_threshold_percent == 80.0
    assert PluginLimitsV2(memory_warning_threshold_mb=128).memory_warning_threshold_mb == 128.0
    lower = dataclasses.replace(limits, max_memory_mb=32, memory_warning_threshold_mb=None)  # type: ignore[arg-type]
    assert lower.memory_warning_threshold_mb == 24.0


def test_whole_numbers_become_floats_so_that_equal_configurations_are_equal() -> None:
    assert repr(PluginLimitsV2(max_memory_mb=128, max_execution_time_seconds=30)) == repr(PluginLimitsV2())
    assert type(IsolationConfig(resource_check_interval_seconds=2).resource_check_interval_seconds) is float


BAD: list[tuple[str, str, object, type[Exception], str]] = [
    ("PluginLimitsV2", "max_memory_mb", -5, ValueError, "is -5: give a number of megabytes from 8 to "),
    ("PluginLimitsV2", "max_memory_mb", 7.9, ValueError, "from 8 to "),
    ("PluginLimitsV2", "max_memory_mb", 10**400, ValueError, "from 8 to "),
    ("PluginLimitsV2", "max_memory_mb", 10**5000, ValueError, "is <int>: give a number"),
    ("PluginLimitsV2", "max_memory_mb", float("nan"), ValueError, "is nan: give a number"),
    ("PluginLimitsV2", "max_memory_mb", float("inf"), ValueError, "is inf: give a number"),
    ("PluginLimitsV2", "max_memory_mb", True, TypeError, r"is True \(bool\): give a number"),
    ("PluginLimitsV2", "max_memory_mb", "128", TypeError, r"is '128' \(str\): give a number"),
    ("PluginLimitsV2", "max_memory_mb", None, TypeError, "is None: give a number"),
    ("PluginLimitsV2", "max_execution_time_seconds", 0, ValueError, "is 0: give a number of seconds from 0.001 to "),
    ("PluginLimitsV2", "max_cpu_percent", 0, ValueError, "percent of one CPU from 1 to "),
    ("PluginLimitsV2", "max_disk_usage_mb", 0, ValueError, "from 0.01 to "),
    ("PluginLimitsV2", "max_file_operations", -1, ValueError, "give a whole number from 0 to "),
    ("PluginLimitsV2", "max_file_operations", 3.0, TypeError, r"is 3.0 \(float\): give a whole number"),
    ("PluginLimitsV2", "max_thread_count", 0, ValueError, "from 1 to "),
    ("PluginLimitsV2", "max_open_files", False, TypeError, "give a whole number from 8 to "),
    ("PluginLimitsV2", "memory_warning_threshold_mb", 0, ValueError, "from 0.001 to "),
    (
        "PluginLimitsV2",
        "memory_warning_threshold_mb",
        129,
        ValueError,
        "is 129.0: give at most max_memory_mb, which is 128, or",
    ),
    ("PluginLimitsV2", "execution_warning_threshold_seconds", 31, ValueError, "at most max_execution_time_seconds"),
    ("PluginLimitsV2", "cpu_warning_threshold_percent", 51, ValueError, "at most max_cpu_percent"),
    ("PluginPermissionsV2", "allow_file_access", 1, TypeError, r"is 1 \(int\): give True or False"),
    ("PluginPermissionsV2", "allowed_directories", "/data", TypeError, "give a list of absolute paths"),
    ("PluginPermissionsV2", "security_level", "high", TypeError, r"give SecurityLevel.HIGH, or SecurityLevel\(\"high\"\)"),
    ("PluginPermissionsV2", "security_level", IsolationLevel.MAXIMUM, TypeError, "give one of SecurityLevel.LOW, "),
    ("PluginPermissionsV2", "sandbox_user", 1000, TypeError, "give the name of a user"),
    ("PluginPermissionsV2", "sandbox_user", "", ValueError, "give the name of a user"),
    (
        "IsolationConfig",
        "level",
        "strict",
        TypeError,
        r"give IsolationLevel.STRICT, or IsolationLevel\(\"strict\"\) for a text",
    ),
    ("IsolationConfig", "level", " Strict", TypeError, "give IsolationLevel.STRICT"),
    ("IsolationConfig", "level", "hard", TypeError, "give one of IsolationLevel.MINIMAL, IsolationLevel.STANDARD, "),
    ("IsolationConfig", "level", None, TypeError, "give one of IsolationLevel"),
    ("IsolationConfig", "resource_check_interval_seconds", 0.05, ValueError, "from 0.1 to 60"),
    ("IsolationConfig", "resource_check_interval_seconds", 61, ValueError, "from 0.1 to 60"),
    ("IsolationConfig", "violation_threshold", 0, ValueError, "from 1 to 10"),
    ("IsolationConfig", "violation_threshold", 11, ValueError, "from 1 to 10"),
    ("IsolationConfig", "watchdog_timeout_seconds", 4, ValueError, "from 5 to 300"),
    ("IsolationConfig", "watchdog_timeout_seconds", 301, ValueError, "from 5 to 300"),
    ("IsolationConfig", "max_sandbox_lifetime_minutes", 0, ValueError, "from 1 to 1440"),
    ("IsolationConfig", "max_sandbox_lifetime_minutes", 1441, ValueError, "from 1 to 1440"),
    ("IsolationConfig", "preload", "numpy", TypeError, "give a list of module names"),
    ("IsolationConfig", "preload", ["num py"], ValueError, "give a dotted module name"),
]


@pytest.mark.parametrize(("cls", "name", "value", "kind", "message"), BAD, ids=range(len(BAD)))
def test_nonsense_is_refused(cls: str, name: str, value: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^{cls}\.{name}.* is .*{message.removeprefix('is ')}") as caught:
        CLASSES[cls](**{name: value})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "item", "kind"),
    [
        ("allowed_directories", "data", ValueError),
        ("allowed_directories", "~/data", ValueError),
        ("blocked_directories", "/a\0b", ValueError),
        ("allowed_directories", b"/data", TypeError),
        ("readable_paths", "data", ValueError),
        ("blocked_directories", "", ValueError),
        ("allowed_ports", 0, ValueError),
        ("allowed_ports", 65536, ValueError),
        ("allowed_ports", "80", TypeError),
        ("allowed_ports", True, TypeError),
        ("allowed_hosts", 3, TypeError),
        ("allowed_hosts", "", ValueError),
        ("blocked_hosts", "https://example.com", ValueError),
        ("allowed_hosts", "example.com:0", ValueError),
        ("allowed_hosts", "example.com:65536", ValueError),
        ("allowed_hosts", "example.com:", ValueError),
        ("allowed_hosts", "example.com/24", ValueError),
        ("allowed_hosts", "10.0.0.0/33", ValueError),
        ("allowed_hosts", "10.1.0.0/8", ValueError),
        ("allowed_hosts", "user@example.com", ValueError),
        ("allowed_hosts", "fe80::1%eth0", ValueError),
        ("allowed_hosts", "2130706433", ValueError),
        ("allowed_hosts", "0177.0.0.1", ValueError),
        ("allowed_hosts", "0x7f.1", ValueError),
        ("allowed_hosts", "127.1", ValueError),
        ("allowed_hosts", "*.example.com", ValueError),
        ("allowed_hosts", "[::1", ValueError),
        ("allowed_hosts", "a\0b", ValueError),
        ("allowed_modules", "os.*", ValueError),
        ("blocked_modules", "", ValueError),
        ("blocked_modules", 1, TypeError),
    ],
)
def test_a_wrong_item_is_named_by_its_place(name: str, item: object, kind: type[Exception]) -> None:
    good: dict[str, object] = {"ports": 80, "hosts": "example.com", "modules": "os.path"}
    good |= {"directories": "/srv", "paths": "/srv"}
    with pytest.raises(kind, match=rf"^PluginPermissionsV2\.{name}\[1\] is .*: give "):
        CLASSES["PluginPermissionsV2"](**{name: [good[name.partition("_")[2]], item]})


def test_good_lists() -> None:
    directories = ["/srv/data"]
    permissions = PluginPermissionsV2(
        allowed_directories=directories,
        blocked_directories=[Path("/srv/data/secret")],  # type: ignore[list-item]
        allowed_hosts=("example.com", "10.0.0.1", "::1", "müller.de", "*"),  # type: ignore[arg-type]
        allowed_ports=[1, 65535],
        allowed_modules=["json", "os.path"],
        sandbox_user="nobody",
    )
    directories.append("/etc")
    assert permissions.allowed_directories == ["/srv/data"]
    assert permissions.blocked_directories == ["/srv/data/secret"]
    assert permissions.allowed_hosts == ["example.com", "10.0.0.1", "::1", "xn--mller-kva.de", "*"]
    assert IsolationConfig(preload=["numpy"]).preload == ("numpy",)  # type: ignore[arg-type]


def test_defaults_are_not_shared() -> None:
    PluginPermissionsV2().allowed_ports.append(22)
    assert PluginPermissionsV2().allowed_ports == [80, 443]


def test_only_isolation_config_is_positional() -> None:
    assert IsolationConfig(IsolationLevel.STRICT, False).enable_process_isolation is False
    for cls in ("PluginLimitsV2", "PluginPermissionsV2"):
        with pytest.raises(TypeError):
            CLASSES[cls](True)


def test_assigned_fields_can_be_checked_again() -> None:
    limits = PluginLimitsV2()
    limits.max_memory_mb = -1
    with pytest.raises(ValueError, match=r"PluginLimitsV2\.max_memory_mb is -1: "):
        limits.validate()


# Environment


def test_nothing_in_the_environment_means_the_defaults() -> None:
    assert IsolationConfig.from_env({}) == IsolationConfig()
    assert IsolationConfig.from_env({"SANDBOX_ISOLATION_LEVEL": " "}) == IsolationConfig()
    assert PluginLimitsV2.from_env({}) == PluginLimitsV2()


def test_the_environment_is_read() -> None:
    config = IsolationConfig.from_env(
        {
            "SANDBOX_ISOLATION_LEVEL": "Strict",
            "SANDBOX_MONITORING_ENABLED": "no",
            "SANDBOX_TELEMETRY_ENABLED": "0",
            "SANDBOX_RESOURCE_CHECK_INTERVAL": "0.5",
            "SANDBOX_VIOLATION_THRESHOLD": "5",
            "SANDBOX_AUTO_RECOVERY": "OFF",
            "SANDBOX_QUARANTINE_ENABLED": "false",
        }
    )
    assert config == IsolationConfig(
        level=IsolationLevel.STRICT,
        enable_real_time_monitoring=False,
        telemetry_enabled=False,
        resource_check_interval_seconds=0.5,
        violation_threshold=5,
        auto_recovery_enabled=False,
        quarantine_on_violation=False,
    )
    limits = PluginLimitsV2.from_env({"SANDBOX_DEFAULT_MEMORY_MB": "64", "SANDBOX_DEFAULT_TIMEOUT_SECONDS": "2.5"})
    assert limits == PluginLimitsV2(max_memory_mb=64, max_execution_time_seconds=2.5)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_ISOLATION_LEVEL", "maximum")
    monkeypatch.setenv("SANDBOX_DEFAULT_MEMORY_MB", "99")
    monkeypatch.setenv("SANDBOX_LOG_LEVEL", "debug")
    assert IsolationConfig.from_env().level is IsolationLevel.MAXIMUM
    assert PluginLimitsV2.from_env().max_memory_mb == 99
    assert log_level_from_env() == "DEBUG"


@pytest.mark.parametrize(
    ("variable", "text", "mend"),
    [
        ("SANDBOX_ISOLATION_LEVEL", "strickt", "give one of minimal, standard, strict, maximum, did you mean strict?"),
        ("SANDBOX_MONITORING_ENABLED", "maybe", "give true or false"),
        ("SANDBOX_TELEMETRY_ENABLED", "2", "give true or false"),
        ("SANDBOX_AUTO_RECOVERY", "x", "give true or false"),
        ("SANDBOX_QUARANTINE_ENABLED", "x", "give true or false"),
        ("SANDBOX_RESOURCE_CHECK_INTERVAL", "fast", "give a number of seconds from 0.1 to 60"),
        ("SANDBOX_RESOURCE_CHECK_INTERVAL", "nan", "give a number of seconds from 0.1 to 60"),
        ("SANDBOX_VIOLATION_THRESHOLD", "2.5", "give a whole number of violations from 1 to 10"),
        ("SANDBOX_VIOLATION_THRESHOLD", "9" * 5000, "give a whole number of violations from 1 to 10"),
        ("SANDBOX_DEFAULT_MEMORY_MB", "128M", "give a number of megabytes from 8 to 1,000,000,000: Python alone needs 8"),
        ("SANDBOX_DEFAULT_MEMORY_MB", "1", "give a number of megabytes from 8 to 1,000,000,000: Python alone needs 8"),
        ("SANDBOX_DEFAULT_TIMEOUT_SECONDS", "-1", "give a number of seconds from 0.001 to 31,536,000"),
        ("SANDBOX_LOG_LEVEL", "warn", "give one of DEBUG, INFO, WARNING, ERROR, CRITICAL, did you mean WARNING?"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str, mend: str) -> None:
    def read_all() -> None:
        IsolationConfig.from_env({variable: text})
        PluginLimitsV2.from_env({variable: text})
        log_level_from_env({variable: text})

    with pytest.raises(ConfigError) as caught:
        read_all()
    message = str(caught.value)
    assert message.startswith(f"{variable} is ")
    assert message.endswith(f": {mend}")
    assert "(str)" not in message


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("SANDBOX_ISOLATON_LEVEL", "SANDBOX_ISOLATION_LEVEL"),
        ("SANDBOX_MEMORY_MB", "SANDBOX_DEFAULT_MEMORY_MB"),
        ("SANDBOX_DEFAULT_TIMEOUT", "SANDBOX_DEFAULT_TIMEOUT_SECONDS"),
        ("SANDBOX_isolation_level\x1b", "SANDBOX_ISOLATION_LEVEL"),
    ],
)
def test_a_misspelt_variable_is_refused(variable: str, meant: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.touch()
    for read in (IsolationConfig.from_env, PluginLimitsV2.from_env, lambda environ: load_config(path, environ)):
        with pytest.raises(ConfigError, match=f"is no variable of psie's: write {meant} if you mean that, or") as caught:
            read({variable: "strict", "SANDBOX_AUTO_RECOVERY": "1"})
        assert "\x1b" not in str(caught.value)


def test_variables_of_other_programs_are_theirs() -> None:
    others = dict.fromkeys(("SANDBOX_ID", "SANDBOX_ENV", "SANDBOX_MOUNTS", "SANDBOX_URL", "SANDBOX", "SANDBOX_"), "x")
    assert IsolationConfig.from_env({**others, "SANDBOX_ISOLATON_LEVEL": " "}) == IsolationConfig()


def test_log_level() -> None:
    assert log_level_from_env({}) == "WARNING"
    assert log_level_from_env({"SANDBOX_LOG_LEVEL": "Info"}) == "INFO"


# Files


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write_file(content: str | bytes) -> Path:
        path = tmp_path / "psie.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


Write = Callable[[str | bytes], Path]


def test_a_file_is_read(write: Write) -> None:
    path = write(
        """
        [isolation]
        level = "strict"
        violation_threshold = 5
        preload = ["json"]
        [limits]
        max_memory_mb = 256
        [permissions]
        allowed_directories = ["/srv"]
        security_level = "high"
        """
    )
    expected = (
        IsolationConfig(IsolationLevel.STRICT, violation_threshold=5, preload=("json",)),
        PluginLimitsV2(max_memory_mb=256),
        PluginPermissionsV2(allowed_directories=["/srv"], security_level=SecurityLevel.HIGH),
    )
    assert load_config(path) == expected
    assert load_config(str(path)) == expected


@pytest.mark.parametrize("content", ["", "[limits]\n", b"\xef\xbb\xbf[isolation]\r\n"])
def test_what_is_left_out_has_its_default(write: Write, content: str | bytes) -> None:
    assert load_config(write(content)) == (IsolationConfig(), PluginLimitsV2(), PluginPermissionsV2())


def test_every_field_can_stand_in_a_file(write: Write) -> None:
    objects: tuple[Any, ...] = (
        IsolationConfig(),
        PluginLimitsV2(max_io_mb_per_second=5.0),
        PluginPermissionsV2(sandbox_user="nobody"),
    )
    lines = []
    for table, item in zip(("isolation", "limits", "permissions"), objects, strict=True):
        lines.append(f"[{table}]")
        for field in dataclasses.fields(item):
            value = getattr(item, field.name)
            value = value.value if isinstance(value, Enum) else list(value) if isinstance(value, tuple) else value
            lines.append(f"{field.name} = {str(value).lower() if isinstance(value, bool) else repr(value)}")
    assert load_config(write("\n".join(lines))) == objects


def test_variables_count_where_the_file_says_nothing(write: Write) -> None:
    path = write('[isolation]\nlevel = "strict"\n[limits]\nmax_memory_mb = 32')
    environ = {
        "SANDBOX_ISOLATION_LEVEL": "minimal",
        "SANDBOX_VIOLATION_THRESHOLD": "7",
        "SANDBOX_DEFAULT_MEMORY_MB": "64",
        "SANDBOX_DEFAULT_TIMEOUT_SECONDS": "5",
    }
    isolation, limits, _ = load_config(path, environ)
    assert (isolation.level, isolation.violation_threshold) == (IsolationLevel.STRICT, 7)
    assert (limits.max_memory_mb, limits.memory_warning_threshold_mb, limits.max_execution_time_seconds) == (32, 24, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[limit]\nx=1", ": unknown table [limit]: did you mean limits?"),
        ("[zzz]", ": unknown table [zzz]: known are isolation, limits, permissions"),
        ("[limits]\nmax_memory = 1", ": unknown key max_memory in [limits]: did you mean max_memory_mb?"),
        ("[limits]\nlevel = 1", ": unknown key level in [limits]: put it into [isolation]"),
        ("level = 'strict'", ": unknown key level outside of a table: put it into [isolation]"),
        ("colour = 1", ": unknown key colour outside of a table: put keys into [isolation], [limits] or [permissions]"),
        ('[limits]\n"a\\u001b" = 1', ": unknown key 'a\\x1b' in [limits]: known are max_memory_mb, "),
        ("limits = 3", ": limits is 3: make it a table, [limits]"),
        ("[limits]\nmax_memory_mb = -5", ": [limits] max_memory_mb is -5: give a number of megabytes from 8 to "),
        ("[limits]\nmax_memory_mb = '1'", ": [limits] max_memory_mb is '1' (str): give a number of megabytes from 8 to "),
        ("[limits]\nmax_memory_mb = 1979-05-27", ": [limits] max_memory_mb is datetime.date(1979, 5, 27) (date): give "),
        ("[limits]\nmemory_warning_threshold_mb = 500", ": [limits] memory_warning_threshold_mb is 500.0: give at most "),
        (
            "[permissions]\nallowed_ports = [80, 0]",
            ": [permissions] allowed_ports[1] is 0: give a whole number from 1 to 65535",
        ),
        (
            "[isolation]\nlevel = 'stritc'",
            ": [isolation] level is 'stritc': give one of minimal, standard, strict, maximum, did you mean strict?",
        ),
        ("[isolation]\nlevel = 3", ": [isolation] level is 3: give one of minimal, "),
        ("[limits]\nx = ", " is not valid TOML: "),
        ("x = " + "9" * 5000, " is not valid TOML: "),
        ("x = " + "[" * 100_000, " is not valid TOML: nested too deeply"),
        (b"[limits]\n# gr\xfc\xdfe", " is not UTF-8 (line 2, byte 13): save it as UTF-8"),
        (b"#" * 1_048_577, " is larger than 1 MB: "),
    ],
    ids=range(20),
)
def test_a_wrong_file_is_refused(write: Write, content: str | bytes, message: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert str(caught.value).isprintable()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: there is no such file: check the path"):
        load_config(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match="is a directory: give the TOML file in it"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        load_config(f"{sys.executable}/x")
    with pytest.raises(ConfigError, match=r"a\\x00b cannot be a file name"):
        load_config("a\0b")
    with pytest.raises(ConfigError, match=r"a\\x1bb: there is no such file"):
        load_config("a\x1bb")
    with pytest.raises(TypeError, match="takes a str or Path"):
        load_config(os.fsencode(tmp_path))  # type: ignore[arg-type]


def test_import_stays_light() -> None:
    """Beside what `dataclasses` itself imports: with some Python 3.13 that is `typing`."""
    heavy = {"typing", "pathlib", "json", "datetime", "tomllib", "difflib", "logging", "socket", "asyncio"}
    code = "import dataclasses, sys; before = set(sys.modules); import sandbox.config; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(done.stdout.split())
