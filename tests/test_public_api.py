"""Every class, field, default, value and signature that the API reference promises, under both module names."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import subprocess
import sys
import typing
from types import ModuleType

import pytest

MODULES = ("sandbox", "plugin_sandbox_isolation_enhanced")
REQUIRED = dataclasses.MISSING

ENUMS: dict[str, dict[str, str]] = {
    "IsolationLevel": {"MINIMAL": "minimal", "STANDARD": "standard", "STRICT": "strict", "MAXIMUM": "maximum"},
    "SecurityLevel": {"LOW": "low", "MEDIUM": "medium", "HIGH": "high", "MAXIMUM": "maximum"},
    "SandboxViolationType": {
        "RESOURCE_EXCEEDED": "resource_exceeded",
        "FILESYSTEM_VIOLATION": "filesystem_violation",
        "NETWORK_VIOLATION": "network_violation",
        "EXECUTION_TIMEOUT": "execution_timeout",
        "PERMISSION_DENIED": "permission_denied",
        "SECURITY_BREACH": "security_breach",
    },
}

# In order; an enum is written as "Class.MEMBER".
FIELDS: dict[str, dict[str, object]] = {
    "IsolationConfig": {
        "level": "IsolationLevel.STANDARD",
        "enable_process_isolation": True,
        "enable_network_isolation": True,
        "enable_filesystem_isolation": True,
        "enable_real_time_monitoring": True,
        "auto_recovery_enabled": True,
        "violation_threshold": 3,
        "quarantine_on_violation": True,
        "telemetry_enabled": True,
        "watchdog_timeout_seconds": 30,
        "resource_check_interval_seconds": 1.0,
        "max_sandbox_lifetime_minutes": 60,
        "allow_degraded": False,
        "require_limits": False,
        "preload": (),
    },
    "PluginLimitsV2": {
        "max_memory_mb": 128.0,
        "memory_warning_threshold_mb": 96.0,
        "max_execution_time_seconds": 30.0,
        "execution_warning_threshold_seconds": 24.0,
        "max_cpu_percent": 50.0,
        "cpu_warning_threshold_percent": 40.0,
        "max_file_operations": 1000,
        "max_file_size_mb": 50.0,
        "max_network_requests": 10,
        "max_disk_usage_mb": 100.0,
        "max_subprocess_count": 0,
        "max_thread_count": 4,
        "max_open_files": 50,
        "max_inodes": 10_000,
        "max_io_mb_per_second": None,
        "max_output_mb": 16.0,
        "max_result_mb": 16.0,
    },
    "PluginPermissionsV2": {
        "allow_file_access": True,
        "allowed_directories": [],
        "blocked_directories": [],
        "allow_file_creation": True,
        "allow_file_deletion": False,
        "max_file_size_mb": 10.0,
        "allow_network_access": False,
        "allowed_hosts": [],
        "blocked_hosts": [],
        "allowed_ports": [80, 443],
        "allowed_modules": [],
        "blocked_modules": [],
        "allow_subprocess_execution": False,
        "allow_thread_creation": True,
        "allow_environment_variables": True,
        "security_level": "SecurityLevel.MEDIUM",
        "require_code_signing": False,
        "sandbox_user": None,
        "readable_paths": [],
    },
    "SandboxTelemetry": {
        "sandbox_id": REQUIRED,
        "plugin_id": REQUIRED,
        "start_time": REQUIRED,
        "end_time": None,
        "peak_memory_mb": 0.0,
        "peak_cpu_percent": 0.0,
        "file_operations_count": 0,
        "network_operations_count": 0,
        "violations": [],
        "resource_samples": [],
        "process_hierarchy": [],
        "exit_code": None,
        "exit_reason": "",
        "cleanup_successful": False,
        "link_counters": {},
    },
    "SandboxViolation": {
        "type": REQUIRED,
        "message": REQUIRED,
        "timestamp": REQUIRED,
        "severity": "warning",
        "details": {},
        "resolved": False,
        "auto_recovery_attempted": False,
        "explanation": None,  # beyond the reference, like all that follows its own
    },
}

EXCEPTIONS = {
    "SandboxInitializationError": {"protection", "line", "errno", "path", "mend"},
    "ResourceError": set(),
    "PluginExecutionError": {"exception_type", "exception_message", "traceback_text", "exit_code", "signal"},
    "SecurityViolationError": {"violations", "explanation"},
    "ResourceLimitExceededError": {"limit", "allowed", "used", "explanation"},
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


@pytest.mark.parametrize("name", ENUMS)
def test_enums(module: ModuleType, name: str) -> None:
    cls = getattr(module, name)
    assert issubclass(cls, enum.Enum)
    assert {member.name: member.value for member in cls} == ENUMS[name]


def default_of(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@pytest.mark.parametrize("name", FIELDS)
def test_fields_and_defaults(module: ModuleType, name: str) -> None:
    cls = getattr(module, name)
    expected = FIELDS[name]
    assert [field.name for field in dataclasses.fields(cls)] == list(expected)
    required = [field.name for field in dataclasses.fields(cls) if default_of(field) is REQUIRED]
    assert required == [key for key, value in expected.items() if value is REQUIRED]
    instance = None if required else cls()
    for field in dataclasses.fields(cls):
        value = default_of(field) if instance is None else getattr(instance, field.name)
        value = str(value) if isinstance(value, enum.Enum) else value
        assert value == expected[field.name], field.name
        assert type(value) is type(expected[field.name]), field.name


@pytest.mark.parametrize("name", FIELDS)
def test_signatures(module: ModuleType, name: str) -> None:
    keyword_only = name in ("PluginLimitsV2", "PluginPermissionsV2")
    kind = inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(getattr(module, name)).parameters
    assert list(parameters) == list(FIELDS[name])
    assert {parameter.kind for parameter in parameters.values()} == {kind}


@pytest.mark.parametrize("name", FIELDS)
def test_type_hints_can_be_read(module: ModuleType, name: str) -> None:
    assert list(typing.get_type_hints(getattr(module, name))) == list(FIELDS[name])


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exceptions(module: ModuleType, name: str) -> None:
    cls = getattr(module, name)
    assert cls.__bases__ == (module.SandboxException,)
    assert set(vars(cls("message"))) == EXCEPTIONS[name]
    assert module.SandboxException.__bases__ == (Exception,)


def test_enhanced_plugin_sandbox(module: ModuleType) -> None:
    parameters = list(inspect.signature(module.EnhancedPluginSandbox).parameters.values())
    assert [item.name for item in parameters[:4]] == ["limits", "permissions", "config", "sandbox_id"]
    assert [item.default for item in parameters[:4]] == [inspect.Parameter.empty] * 3 + [None]
    assert {item.kind for item in parameters[:4]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert all(item.default is not item.empty for item in parameters[4:])
    parameters = list(inspect.signature(module.EnhancedPluginSandbox.execute_plugin_safe).parameters.values())
    assert [str(item.replace(annotation=item.empty)) for item in parameters] == ["self", "plugin_function", "*args", "**kwargs"]
    assert parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def test_sandbox_recovery_manager(module: ModuleType) -> None:
    cls = module.SandboxRecoveryManager
    parameters = list(inspect.signature(cls).parameters.values())
    assert [(item.name, item.default, item.kind) for item in parameters] == [
        ("config", None, inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ("state_folder", None, inspect.Parameter.KEYWORD_ONLY),
    ]
    assert list(inspect.signature(cls.auto_recovery_violation).parameters) == ["self", "violation"]
    assert inspect.iscoroutinefunction(cls.auto_recovery_violation)
    assert list(inspect.signature(cls.quarantine_plugin).parameters) == ["self", "plugin_id", "reason"]
    assert list(inspect.signature(cls.get_recovery_history).parameters) == ["self"]
    assert cls().get_recovery_history() == []


def test_enhanced_plugin_framework(module: ModuleType) -> None:
    cls = module.EnhancedPluginFramework
    parameters = list(inspect.signature(cls).parameters.values())
    assert [(item.name, item.default) for item in parameters[:2]] == [("plugin_dir", inspect.Parameter.empty), ("config", None)]
    assert {item.kind for item in parameters[:2]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {(item.kind, item.default) for item in parameters[2:]} == {(inspect.Parameter.KEYWORD_ONLY, None)}
    assert list(inspect.signature(cls.load_plugin_enhanced).parameters) == ["self", "plugin_id", "config"]
    assert inspect.iscoroutinefunction(cls.load_plugin_enhanced)
    assert list(inspect.signature(cls.get_framework_telemetry).parameters) == ["self"]


def test_enhanced_resource_monitor(module: ModuleType) -> None:
    cls = module.EnhancedResourceMonitor
    assert list(inspect.signature(cls).parameters) == ["limits", "config"]
    (process_id,) = list(inspect.signature(cls.start_monitoring).parameters.values())[1:]
    assert (process_id.name, process_id.default) == ("process_id", None)
    for name in ("stop_monitoring", "get_current_stats", "check_violations"):
        assert list(inspect.signature(getattr(cls, name)).parameters) == ["self"]


def test_all_is_complete_and_the_same_objects() -> None:
    package, other = map(importlib.import_module, MODULES)
    promised = {
        *ENUMS,
        *FIELDS,
        *EXCEPTIONS,
        "SandboxRecoveryManager",
        "EnhancedPluginFramework",
        "EnhancedResourceMonitor",
        "SandboxException",
        "EnhancedPluginSandbox",
        "load_config",
    }
    assert promised <= set(package.__all__)
    assert other.__all__ == package.__all__
    assert set(package.__all__) <= set(dir(package))
    assert set(dir(other)) == set(package.__all__)
    assert set(package._MODULES) == {*package.__all__, "__version__"}
    for name in package.__all__:
        if name != "EnhancedPluginSandbox":
            assert getattr(other, name) is getattr(package, name)


def test_version() -> None:
    package = importlib.import_module("sandbox")
    assert package.__version__ == importlib.import_module("sandbox.version").__version__


def test_unknown_names_are_refused(module: ModuleType) -> None:
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'Sandbox'"):
        _ = module.Sandbox
    with pytest.raises(ImportError):
        exec(f"from {module.__name__} import Sandbox")


@pytest.mark.parametrize("name", MODULES)
def test_star_import(name: str) -> None:
    names: dict[str, object] = {}
    exec(f"from {name} import *", names)
    del names["__builtins__"]
    assert sorted(names) == sorted(importlib.import_module(name).__all__)


def test_import_costs_nothing() -> None:
    code = f"import sys; before = set(sys.modules); import {MODULES[1]}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - {"__future__"} == set(MODULES)
