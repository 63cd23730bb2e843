"""psie: runs Python code that nobody has to trust.

The public names, imported when they are first used (PEP 562), so that `import sandbox` costs next to nothing. This
module must hold no code of its own beyond that.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
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
    from sandbox.errors import (
        CommitError,
        ManifestError,
        PluginError,
        PluginExecutionError,
        ResourceError,
        ResourceLimitExceededError,
        SandboxException,
        SandboxInitializationError,
        SandboxKilledError,
        SecurityViolationError,
    )
    from sandbox.executor import SandboxExecutor, sandboxed
    from sandbox.files import FileEntry
    from sandbox.monitor.files import FilesystemWatchdog
    from sandbox.monitor.network import NetworkIsolationManager
    from sandbox.monitor.resources import EnhancedResourceMonitor
    from sandbox.plugins.framework import EnhancedPluginFramework
    from sandbox.recovery.changes import FileChange
    from sandbox.recovery.manager import SandboxRecoveryManager
    from sandbox.sandbox import EnhancedPluginSandbox
    from sandbox.telemetry import SandboxTelemetry
    from sandbox.text import TerminalEscaper, escape_text
    from sandbox.version import __version__ as __version__
    from sandbox.violations import Explanation, SandboxViolation, SandboxViolationType

__all__ = [
    "CommitError",
    "ConfigError",
    "EnhancedPluginFramework",
    "EnhancedPluginSandbox",
    "EnhancedResourceMonitor",
    "Explanation",
    "FileChange",
    "FileEntry",
    "FilesystemWatchdog",
    "IsolationConfig",
    "IsolationLevel",
    "ManifestError",
    "NetworkIsolationManager",
    "PluginError",
    "PluginExecutionError",
    "PluginLimitsV2",
    "PluginPermissionsV2",
    "ResourceError",
    "ResourceLimitExceededError",
    "SandboxException",
    "SandboxExecutor",
    "SandboxInitializationError",
    "SandboxKilledError",
    "SandboxRecoveryManager",
    "SandboxTelemetry",
    "SandboxViolation",
    "SandboxViolationType",
    "SecurityLevel",
    "SecurityViolationError",
    "TerminalEscaper",
    "escape_text",
    "load_config",
    "log_level_from_env",
    "sandboxed",
]

_MODULES = {
    "__version__": "sandbox.version",
    "CommitError": "sandbox.errors",
    "ConfigError": "sandbox.config",
    "EnhancedPluginFramework": "sandbox.plugins.framework",
    "EnhancedPluginSandbox": "sandbox.sandbox",
    "EnhancedResourceMonitor": "sandbox.monitor.resources",
    "Explanation": "sandbox.violations",
    "FileChange": "sandbox.recovery.changes",
    "FileEntry": "sandbox.files",
    "FilesystemWatchdog": "sandbox.monitor.files",
    "IsolationConfig": "sandbox.config",
    "IsolationLevel": "sandbox.config",
    "ManifestError": "sandbox.errors",
    "NetworkIsolationManager": "sandbox.monitor.network",
    "PluginError": "sandbox.errors",
    "PluginExecutionError": "sandbox.errors",
    "PluginLimitsV2": "sandbox.config",
    "PluginPermissionsV2": "sandbox.config",
    "ResourceError": "sandbox.errors",
    "ResourceLimitExceededError": "sandbox.errors",
    "SandboxException": "sandbox.errors",
    "SandboxExecutor": "sandbox.executor",
    "SandboxInitializationError": "sandbox.errors",
    "SandboxKilledError": "sandbox.errors",
    "SandboxRecoveryManager": "sandbox.recovery.manager",
    "SandboxTelemetry": "sandbox.telemetry",
    "SandboxViolation": "sandbox.violations",
    "SandboxViolationType": "sandbox.violations",
    "SecurityLevel": "sandbox.config",
    "SecurityViolationError": "sandbox.errors",
    "TerminalEscaper": "sandbox.text",
    "escape_text": "sandbox.text",
    "load_config": "sandbox.config",
    "log_level_from_env": "sandbox.config",
    "sandboxed": "sandbox.executor",
}


if not TYPE_CHECKING:  # or a type checker would take any name for good

    def __getattr__(name: str) -> object:
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(__import__(module, fromlist=[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
