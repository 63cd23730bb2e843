"""EnhancedPluginFramework: runs the plugins of a plugin folder, each in a sandbox of its own, and remembers how that went.

A load reads a plugin once, checks what was read (quarantine, manifest, digests, signature), stages those very bytes and runs
them. Nothing that a plugin does, or is, raises: it is told in the result. Must not know how anything is enforced or stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import shlex
import weakref
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from time import monotonic, time
from typing import TYPE_CHECKING

from sandbox import host
from sandbox.config import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2
from sandbox.engine import service
from sandbox.errors import (
    CommitError,
    PluginError,
    PluginExecutionError,
    ResourceError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxInitializationError,
    SandboxKilledError,
    SecurityViolationError,
)
from sandbox.ns.userids import NoPlaceError, bounds
from sandbox.plugins import discovery, files, manifest, signing, stage
from sandbox.plugins.effective import effective, retry_memory
from sandbox.plugins.files import PluginFiles
from sandbox.recipe import under
from sandbox.recipe_data import ENFORCED, MISSING, SUBSTITUTED
from sandbox.recovery.records import Evidence, Records
from sandbox.sandbox import EnhancedPluginSandbox
from sandbox.session import PluginSession
from sandbox.telemetry import SandboxTelemetry
from sandbox.text import escape_text
from sandbox.violations import to_plain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any

    from sandbox.plugins.discovery import Found
    from sandbox.plugins.manifest import Manifest
    from sandbox.plugins.stage import Staged

MB = 1 << 20
OK, ERROR, LIMIT, VIOLATION, REFUSED, QUARANTINED = "ok", "error", "limit", "violation", "refused", "quarantined"
SANDBOX_FDS = 16  # descriptors that an open sandbox takes of its caller's
RETRY_SECONDS = 0.05  # between two looks whether other processes' sandboxes have left a place
KEPT_KINDS = ("overlay", "copy")  # of granted folders, whose changes wait for a commit
PROBE = {"probe.py": b"def main():\n    return 'here'\n"}


class Refused(PluginError):
    """A plugin that is not run: it is quarantined, or not signed by a trusted key."""

    def __init__(self, message: str, outcome: str = REFUSED) -> None:
        super().__init__(message)
        self.outcome = outcome


@dataclass
class Load:
    """One load of a plugin, from its beginning to what came of it.

    Attributes:
        plugin_id: which plugin; a wrong one is what the caller gave.
        config, limits, permissions: what it is run with, once its manifest is known.
        sandbox_id: "" where there was none.
        sha256: digest of the plugin; "" where it could not be read.
        outcome: ok, error, limit, violation, refused or quarantined (it was, so it was refused).
        result: what the plugin returned.
        error: why it has not succeeded: one sentence, safe for a terminal; None if it has.
        quarantined: why it has been quarantined for this load; "" if it has not.
        recovery: what was done about violations, as SandboxRecoveryManager.get_recovery_history has it, and a second try with
            more memory (the action "retry").
        limit: which limit has ended it; "" for none.
        telemetry: of its sandbox.
        seconds: from the call to the end of the sandbox.
        start_ms: from the call to the plugin's first line, waiting for a place left out.
    """

    plugin_id: str
    config: IsolationConfig
    limits: PluginLimitsV2
    permissions: PluginPermissionsV2
    telemetry: SandboxTelemetry
    sandbox_id: str = ""
    sha256: str = ""
    outcome: str = OK
    result: Any = None
    error: str | None = None
    quarantined: str = ""
    recovery: list[dict[str, Any]] = field(default_factory=list)
    limit: str = ""
    seconds: float = 0.0
    start_ms: float = 0.0
    evidence: Evidence = field(default_factory=Evidence)

    def failed(self, outcome: str, error: BaseException) -> None:
        text = str(error) or f"it was ended by {type(error).__name__}"
        self.outcome, self.error, self.result = outcome, text.splitlines()[0], None

    @property
    def violations(self) -> list[dict[str, Any]]:
        return [violation.to_dict() for violation in self.telemetry.violations]

    def to_dict(self) -> dict[str, Any]:
        """What `load_plugin_enhanced` returns."""
        return {
            "plugin_id": self.plugin_id,
            "sandbox_id": self.sandbox_id,
            "success": self.outcome == OK,
            "result": self.result,
            "error": self.error,
            "telemetry": self.telemetry.to_dict(),
            "violations": self.violations,
            "recovery": self.recovery,
            "performance_metrics": {
                "seconds": self.seconds,
                "start_ms": self.start_ms,
                "peak_memory_mb": self.telemetry.peak_memory_mb,
                "peak_cpu_percent": self.telemetry.peak_cpu_percent,
                "file_operations": self.telemetry.file_operations_count,
                "network_operations": self.telemetry.network_operations_count,
            },
        }


@dataclass(frozen=True)
class Ready:
    """A plugin that was checked and staged."""

    plugin: PluginFiles
    manifest: Manifest
    staged: Staged

    def job(self) -> tuple[bytes, dict[str, object]]:
        """What EnhancedPluginSandbox.execute_file takes."""
        path = manifest.module_file(self.plugin, self.manifest.module)
        assert path is not None  # manifest.of has looked
        is_folder = self.plugin.main != f"{self.plugin.id}.py"
        folder = os.path.join(self.staged.root, self.plugin.id) if is_folder else self.staged.root
        module = self.manifest.module or os.path.splitext(path)[0]
        if module == "__init__":
            module = self.plugin.id
        return self.plugin.files[path], {
            "path": os.path.join(folder, path),
            "folder": folder,
            "module": module,
            "functions": list(self.manifest.functions),
        }


class EnhancedPluginFramework:
    """Enhanced plugin framework with integrated sandbox isolation.

    Args:
        plugin_dir: the folder of plugins, see sandbox.plugins.files.
        config: level and switches. With `limits` and `permissions` the most that a plugin gets: its manifest can only ask for
            less, see sandbox.plugins.effective.
        limits: resource limits.
        permissions: what plugins may do. Changes in allowed_directories are committed when a plugin has succeeded.
        state_folder: where history, audit, quarantine and evidence are kept; None: psie's own.
        trusted_keys: the folder of keys for require_code_signing; None: `trusted-keys` in psie's own state folder.

    From STANDARD up a plugin does not see the plugin folder, only its own files as they were read. At MINIMAL, where the view
    is the host's, it can read what its id can.

    Raises:
        TypeError: a setting is none.
        ValueError: `plugin_dir` is no folder.
        ResourceError: the stored records cannot be used, or PSIE_MAX_SANDBOXES or PSIE_MAX_MEMORY_MB is no number.
    """

    def __init__(
        self,
        plugin_dir: str,
        config: IsolationConfig | None = None,
        *,
        limits: PluginLimitsV2 | None = None,
        permissions: PluginPermissionsV2 | None = None,
        state_folder: str | os.PathLike[str] | None = None,
        trusted_keys: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(plugin_dir, (str, os.PathLike)):
            raise TypeError(f"EnhancedPluginFramework: plugin_dir is a {type(plugin_dir).__name__}: give the path of a folder")
        self.plugin_dir = os.fspath(plugin_dir)
        self.config = _setting("config", config, IsolationConfig)
        self.limits = _setting("limits", limits, PluginLimitsV2)
        self.permissions = _setting("permissions", permissions, PluginPermissionsV2)
        self.trusted_keys = trusted_keys
        try:
            os.close(files.open_folder(self.plugin_dir))
        except PluginError as error:
            raise ValueError(str(error)) from None
        self._most = self._count_places()
        self._records = Records(state_folder, "framework")
        self._open: Counter[str] = Counter()  # loads that have a sandbox, by level
        self._places: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()

    def close(self) -> None:
        """Close the stored records; a later use opens them again."""
        self._records.close()

    # -- plugins -----------------------------------------------------------------------------------------------------

    def discover_plugins(self) -> list[Found]:
        """All plugins of the folder, by id; a broken one has an `error`. Raises PluginError where the folder has gone."""
        return discovery.discover(self.plugin_dir)

    async def load_plugin_enhanced(self, plugin_id: str, config: IsolationConfig | None = None) -> dict[str, Any]:
        """Load and execute a plugin with enhanced isolation.

        Any number of loads may run at once; they wait for places, see PSIE_MAX_SANDBOXES and PSIE_MAX_MEMORY_MB. Cancelling
        kills the plugin.

        Args:
            plugin_id: which plugin of the folder.
            config: instead of the framework's own.

        Returns:
            plugin_id, sandbox_id, success, result, error (one sentence, or None), telemetry and violations as their to_dict()
            gives them, recovery (steps as SandboxRecoveryManager.get_recovery_history has them), and performance_metrics:
            seconds and start_ms, peak_memory_mb (of 2**20 bytes), peak_cpu_percent (of one CPU), file_operations,
            network_operations.

        A plugin that was ended for want of memory is run once more if its manifest has more for this case ([recovery]) and
        auto_recovery_enabled is True; what is returned is of the second try, `recovery` of both.

        Raises:
            TypeError: an argument is of another type. For what a plugin is or does nothing is raised.
        """
        return (await self.load(plugin_id, config)).to_dict()

    @asynccontextmanager
    async def open_plugin(
        self, plugin_id: str, config: IsolationConfig | None = None, *, max_calls: int | None = None
    ) -> AsyncIterator[PluginSession]:
        """A plugin whose module is loaded once and which is then asked often.

        `async with framework.open_plugin("id") as plugin: await plugin.call("function", ...)`.

        What its module keeps is there at the next call. A process that crashed, or that a limit ended, is replaced at the next
        call, and so is one that has served max_calls. It holds one of the framework's places all the time; when it is closed
        changes in allowed directories are committed, unless a violation ended it or its user raised, and its row is recorded.

        Raises:
            TypeError: an argument is of another type.
            PluginError: it cannot be loaded, or is quarantined.
            SandboxException: as EnhancedPluginSandbox; SandboxInitializationError, if a sandbox for it cannot be had.
        """
        if not isinstance(plugin_id, str):
            raise TypeError(f"open_plugin: plugin_id is a {type(plugin_id).__name__}: give the id of a plugin")
        chosen = self.config if config is None else _setting("config", config, IsolationConfig)
        load = Load(plugin_id, chosen, self.limits, self.permissions, SandboxTelemetry("", plugin_id, _now()))
        async with self._place():
            started, since = monotonic(), time()
            failure: Exception | None = None  # of whoever uses it: the plugin is judged all the same
            try:
                ready = await _staged(lambda: self._prepare(load))
                try:
                    async with self._sandbox_of(load, ready, started) as sandbox:
                        session = PluginSession(sandbox, plugin_id, *ready.job(), max_calls=max_calls)
                        try:
                            async with session:
                                yield session
                        except Exception as error:
                            failure = error
                        ended_by = session._ended_by or (failure if isinstance(failure, SandboxException) else None)
                        if ended_by is not None:
                            self._blame(load, ready, ended_by)
                        if failure is None:
                            try:
                                await self._settle_granted(load, sandbox)
                            except RuntimeError:  # the sandbox has come to its end meanwhile, and its changes with it
                                if ended_by is not None:
                                    raise ended_by from None
                                raise
                finally:
                    await asyncio.to_thread(ready.staged.release)
                if failure is not None:
                    raise failure
            except Refused as error:
                load.failed(error.outcome, error)
                raise PluginError(f"{plugin_id}: {error}") from None
            except (PluginError, SandboxInitializationError) as error:
                load.failed(REFUSED, error)
                raise
            except BaseException as error:
                if load.error is None:  # else that is what it ended by
                    load.failed(ERROR, error)
                raise
            finally:
                load.seconds = monotonic() - started
                await self._record(load, since)

    async def load(self, plugin_id: str, config: IsolationConfig | None = None) -> Load:
        """As `load_plugin_enhanced`, with what came of it as one record."""
        if not isinstance(plugin_id, str):
            raise TypeError(f"load_plugin_enhanced: plugin_id is a {type(plugin_id).__name__}: give the id of a plugin")
        chosen = self.config if config is None else _setting("config", config, IsolationConfig)
        begun = _now()
        load = Load(plugin_id, chosen, self.limits, self.permissions, SandboxTelemetry("", plugin_id, begun))
        async with self._place():
            started, since = monotonic(), time()
            try:
                await self._attempt(load, started)
            except Refused as error:
                load.failed(error.outcome, error)
            except (PluginError, SandboxInitializationError) as error:
                load.failed(REFUSED, error)
            except ResourceError as error:
                load.failed(ERROR, error)
            except Exception as error:  # a mistake of psie's own: what others have loaded is told all the same
                load.failed(ERROR, RuntimeError(f"internal error: {type(error).__name__}: {error}"))
            except BaseException as error:
                load.failed(ERROR, error)
                raise
            finally:
                load.seconds = monotonic() - started
                await self._record(load, since)
        return load

    async def _attempt(self, load: Load, started: float) -> None:
        ready = await _staged(lambda: self._prepare(load))
        try:
            await self._run(load, ready, started)
            more = retry_memory(ready.manifest, self.limits)
            if load.limit == "memory" and load.config.auto_recovery_enabled and more > load.limits.max_memory_mb:
                await self._retry(load, ready, more)
        finally:
            await asyncio.to_thread(ready.staged.release)

    async def _retry(self, load: Load, ready: Ready, memory_mb: float) -> None:
        """Once more, in a fresh sandbox with as much memory as the manifest asks for in this case."""
        before = {"max_memory_mb": load.limits.max_memory_mb, "ended_by": load.error}
        load.limits = replace(load.limits, max_memory_mb=memory_mb, memory_warning_threshold_mb=None)  # type: ignore[arg-type]
        load.outcome, load.error, load.limit, load.evidence = OK, None, "", Evidence()
        step = {"timestamp": _now().isoformat(), "violation": None, "action": "retry", "before": before}
        await self._run(load, ready, monotonic())
        after = {"max_memory_mb": memory_mb, "ended_by": load.error}
        load.recovery.append({**step, "sandbox_id": load.sandbox_id, "after": after, "success": load.outcome == OK, "note": ""})

    def _prepare(self, load: Load) -> Ready:
        """Read, check and stage. Raises PluginError, ResourceError."""
        folder = files.open_folder(self.plugin_dir)
        try:
            plugin = files.read(folder, load.plugin_id)
        finally:
            os.close(folder)
        load.sha256 = plugin.sha256
        alone = [hashlib.sha256(source).hexdigest() for source in plugin.files.values()] if len(plugin.files) == 1 else []
        found = self._records.is_quarantined(plugin.id, plugin.sha256, alone)
        if found is not None:
            which = "" if found.plugin_id == plugin.id else f" as {escape_text(found.plugin_id, keep='')}, which it equals"
            mend = f"psie quarantine release {shlex.quote(found.plugin_id)}"
            raise Refused(f"it is quarantined{which} ({found.reason}): look into it, then {mend}", QUARANTINED)
        said = manifest.of(plugin)
        load.config, load.limits, load.permissions = effective(said, load.config, self.limits, self.permissions)
        signing.check_sha256(plugin, said)
        if load.permissions.require_code_signing:
            signature = signing.check(plugin, self.trusted_keys)
            if not signature.ok:
                raise Refused(f"require_code_signing is set, but {signature.reason}")
        return Ready(plugin, said, stage.shelf().take(plugin))

    async def _run(self, load: Load, ready: Ready, started: float) -> None:
        """Raises ResourceError, SandboxInitializationError."""
        async with self._sandbox_of(load, ready, started) as sandbox:
            await self._call(load, ready, sandbox)

    @asynccontextmanager
    async def _sandbox_of(self, load: Load, ready: Ready, started: float) -> AsyncIterator[EnhancedPluginSandbox]:
        """The plugin's sandbox; at its end is decided whether the plugin is quarantined."""
        sandbox = await self._opened(load, ready)
        load.sandbox_id, load.telemetry = sandbox.sandbox_id, sandbox.get_telemetry()
        load.telemetry.plugin_id = load.plugin_id
        sandbox._on_taint = load.evidence.take_granted
        level = load.config.level.value
        self._open[level] += 1
        try:
            load.start_ms = (monotonic() - started) * 1000
            yield sandbox
            reason = self._reason_for_quarantine(load, sandbox)
            if reason:
                load.quarantined = reason
                load.evidence.samples = list(load.telemetry.resource_samples)
                load.evidence.recipe = sandbox.recipe.to_dict() if sandbox.recipe is not None else {}
                load.evidence.output_tail = sandbox.output_tail
                await asyncio.to_thread(load.evidence.take_workspace, sandbox)
        finally:
            self._open[level] -= 1
            await sandbox.cleanup_sandbox()
            load.recovery += sandbox.get_recovery_history()

    async def _call(self, load: Load, ready: Ready, sandbox: EnhancedPluginSandbox) -> None:
        source, job = ready.job()
        try:
            load.result = await sandbox.execute_file(load.plugin_id, source, job)
            try:
                await self._settle_granted(load, sandbox)
            except RuntimeError as error:  # the sandbox has come to its end meanwhile
                load.failed(ERROR, error)
        except (
            SecurityViolationError,
            ResourceLimitExceededError,
            PluginExecutionError,
            CommitError,
            SandboxKilledError,
        ) as error:
            self._blame(load, ready, error)

    def _blame(self, load: Load, ready: Ready, error: BaseException) -> None:
        """This is what its run ended by."""
        if isinstance(error, ResourceLimitExceededError):
            load.limit = error.limit
        load.failed(VIOLATION if isinstance(error, SecurityViolationError) else LIMIT if load.limit else ERROR, error)
        if load.error is not None:
            load.error = load.error.replace(f"{ready.staged.root}/", "")  # where that is, is nobody's business

    async def _settle_granted(self, load: Load, sandbox: EnhancedPluginSandbox) -> None:
        if sandbox.recipe is not None and any(folder["kind"] in KEPT_KINDS for folder in sandbox.recipe.granted):
            await self._settle(load, sandbox)

    async def _settle(self, load: Load, sandbox: EnhancedPluginSandbox) -> None:
        """Commit what a plugin has changed in granted folders; what it is quarantined for is evidence instead."""
        if load.outcome != VIOLATION:  # a limit or a crash may have ended a process of a session, whose user went on
            await sandbox.commit_changes()
            return
        with suppress(RuntimeError), sandbox._granted() as granted:  # RuntimeError: it has come to its end meanwhile
            await asyncio.to_thread(load.evidence.take_granted, granted)

    async def _opened(self, load: Load, ready: Ready) -> EnhancedPluginSandbox:
        """An open sandbox that sees the plugin; other processes' sandboxes are waited for."""
        end = monotonic() + load.config.watchdog_timeout_seconds
        while True:
            sandbox = self._sandbox(load, ready)
            try:
                return await sandbox.__aenter__()
            except NoPlaceError:
                if monotonic() > end:
                    raise
            except ValueError as error:  # the manifest's settings contradict each other
                raise Refused(str(error)) from None
            await asyncio.sleep(RETRY_SECONDS)

    def _sandbox(self, load: Load, ready: Ready) -> EnhancedPluginSandbox:
        permissions = replace(load.permissions, require_code_signing=False)  # that has been seen to
        hidden = os.path.realpath(self.plugin_dir)
        if load.config.level is not IsolationLevel.MINIMAL and not self._needs(hidden, permissions):
            permissions.blocked_directories = [*permissions.blocked_directories, hidden]
        sandbox = EnhancedPluginSandbox(load.limits, permissions, load.config, read_only=(ready.staged.root,))
        sandbox._door = "plugin folder"
        sandbox._is_recorded = False  # the load is
        sandbox._returns_early = False  # and what it did in all of its call decides about quarantine
        return sandbox

    @staticmethod
    def _needs(folder: str, permissions: PluginPermissionsV2) -> bool:
        """Whether something lies in the plugin folder that a sandbox has to see."""
        facts = host.facts()
        interpreter = (facts.executable, facts.prefix, facts.base_prefix, facts.stdlib, *facts.path)
        return any(
            under(path, (folder,)) for path in (*interpreter, *permissions.allowed_directories, *permissions.readable_paths)
        )

    @staticmethod
    def _reason_for_quarantine(load: Load, sandbox: EnhancedPluginSandbox) -> str:
        """More violations than the threshold: of those that the kernel tells, which no harmless plugin has."""
        return str(load.error) if load.config.quarantine_on_violation and sandbox._was_beyond else ""

    async def _record(self, load: Load, since: float) -> None:
        """Where it cannot be stored, the load has not succeeded: nobody would know of it."""
        try:
            await asyncio.to_thread(self._store, load, since)
        except ResourceError as error:
            text = f"{load.error or 'it ran'}, but that could not be recorded: {error}"
            load.failed(ERROR if load.outcome == OK else load.outcome, ResourceError(text))

    def _store(self, load: Load, since: float) -> None:
        if load.quarantined:
            self._records.quarantine(load.plugin_id, load.sha256, load.quarantined, load.violations, load.evidence)
        if not load.config.telemetry_enabled:
            return
        self._records.add(
            started=since,
            plugin_id=load.plugin_id,
            sha256=load.sha256,
            level=load.config.level.value,
            outcome=REFUSED if load.outcome == QUARANTINED else load.outcome,
            limits=to_plain(asdict(load.limits)),
            seconds=load.seconds,
            peak_memory_mb=load.telemetry.peak_memory_mb,
            peak_cpu_percent=load.telemetry.peak_cpu_percent,
            exit_code=load.telemetry.exit_code,
            reason=load.error or "returned",
            violations=load.violations,
            sandbox_id=load.sandbox_id,
        )

    # -- places ------------------------------------------------------------------------------------------------------

    def _place(self) -> asyncio.Semaphore:
        """A place among the sandboxes that this process can have open at once; one semaphore for each event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._places:
            self._places[loop] = asyncio.Semaphore(self._most)
        return self._places[loop]

    def _count_places(self) -> int:
        most, memory = bounds(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = int(self.limits.max_memory_mb * MB)
        return max(1, min(most, memory // wanted, descriptors // 2 // SANDBOX_FDS))

    # -- what is known -----------------------------------------------------------------------------------------------

    def get_quarantined_plugins(self) -> list[dict[str, Any]]:
        """The quarantines in force, newest first: plugin_id, sha256, reason, violations, since (Unix time), by, evidence."""
        return self._records.quarantined()

    def release_plugin(self, plugin_id: str) -> int:
        """End the quarantine of a plugin; returns how many there were of it. Raises ValueError if there is none."""
        return self._records.release(plugin_id)

    def get_plugin_performance_history(self, plugin_id: str, limit: int = 100) -> list[dict[str, Any]]:
        """The last loads of a plugin, newest first, as sandbox.recovery.store.Run.to_dict gives them."""
        return self._records.history(plugin_id, limit)

    def get_framework_telemetry(self) -> dict[str, Any]:
        """Framework metrics, of all runs that are stored.

        Returns:
            runs, outcomes and violations (counts by name), success_rate (0 to 1; None without runs), plugins (by id: runs,
            outcomes, violations, and seconds and peak_memory_mb with p50, p95 and p99), quarantined (how many plugins),
            sandboxes_open (of this framework, by level) and pool (what stands ready in this process: ready, recipes, zygotes).
        """
        plugins = self._records.statistics()
        outcomes: Counter[str] = Counter()
        violations: Counter[str] = Counter()
        for each in plugins.values():
            outcomes.update(each.outcomes)
            violations.update(each.violations)
        runs = sum(each.runs for each in plugins.values())
        return {
            "runs": runs,
            "outcomes": dict(outcomes),
            "success_rate": outcomes[OK] / runs if runs else None,
            "violations": dict(violations),
            "plugins": {plugin_id: asdict(each) for plugin_id, each in plugins.items()},
            "quarantined": len({each["plugin_id"] for each in self._records.quarantined()}),
            "sandboxes_open": {level: count for level, count in self._open.items() if count},
            "pool": service.status(),
        }

    async def health_check_sandboxes(self) -> dict[str, Any]:
        """Run a plugin of the framework's own at the config's level; nothing of it is stored.

        Returns:
            ok, seconds, error (None, or one sentence), and protections: names by state (enforced, substituted, missing), as
            read back from the running sandbox.
        """
        plugin = PluginFiles("probe", PROBE, files.digest(PROBE))
        load = Load(plugin.id, self.config, self.limits, self.permissions, SandboxTelemetry("", plugin.id, _now()))
        protections: dict[str, list[str]] = {ENFORCED: [], SUBSTITUTED: [], MISSING: []}
        async with self._place():
            started = monotonic()
            try:
                ready = await _staged(lambda: Ready(plugin, manifest.of(plugin), stage.shelf().take(plugin)))
                try:
                    sandbox = await self._opened(load, ready)
                    try:
                        for protection in sandbox.protections:
                            protections[protection.state].append(protection.name)
                        await self._call(load, ready, sandbox)
                    finally:
                        await sandbox.cleanup_sandbox()
                finally:
                    await asyncio.to_thread(ready.staged.release)
            except SandboxException as error:
                load.failed(ERROR, error)
        return {
            "ok": load.outcome == OK and load.result == "here",
            "seconds": monotonic() - started,
            "error": load.error,
            "protections": protections,
        }


async def _staged(prepare: Callable[[], Ready]) -> Ready:
    """What `prepare` returns, in a thread; what was staged for a caller that is cancelled meanwhile is let go."""
    task = asyncio.ensure_future(asyncio.to_thread(prepare))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if task.exception() is None:
            task.result().staged.release()
        raise


def _setting(name: str, value: Any, kind: type[Any]) -> Any:
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise TypeError(f"EnhancedPluginFramework: {name} is a {type(value).__name__}: give a {kind.__name__}")
    return value


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)
