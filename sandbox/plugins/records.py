"""What the framework keeps of its loads: rows of the history, lines of the audit, quarantines with their evidence.

All use of the stored records that the framework makes is here. Host side. It must not know how a plugin is run.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from sandbox.errors import ResourceError
from sandbox.recovery import evidence, private
from sandbox.recovery.audit import AuditLog
from sandbox.recovery.granted import content
from sandbox.recovery.store import Run, Store
from sandbox.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from sandbox.recovery.granted import GrantedChanges
    from sandbox.recovery.store import Quarantined, Statistics
    from sandbox.sandbox import EnhancedPluginSandbox

DOOR = BY = "framework"
CHANGES = 1000  # files that are kept of a plugin's changes
CHANGE_BYTES = 16 << 20  # of all of them


class Records:
    """The records in one folder; None for psie's own. Methods raise ResourceError where they cannot be kept. Any thread."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.store = Store(folder)
        self.audit = AuditLog(self.store)

    def close(self) -> None:
        self.store.close()

    def add(self, run: Run) -> None:
        """One load that has ended."""
        self.store.add_runs([run])
        self.audit.append(
            "run",
            plugin_id=run.plugin_id,
            sha256=run.sha256,
            level=run.level,
            outcome=run.outcome,
            reason=run.reason,
            sandbox_id=run.sandbox_id,
            door=run.door,
        )

    def quarantine(
        self, plugin_id: str, sha256: str, reason: str, violations: Sequence[Mapping[str, Any]], found: Evidence
    ) -> None:
        """Quarantine a plugin, with evidence if that can be kept: without it the quarantine holds all the same."""
        path: str | None = None
        try:
            path = found.keep(plugin_id, violations, self.store.folder)
        except ResourceError as error:
            reason = f"{reason} (no evidence is kept: {error})"
        self.store.quarantine(plugin_id, sha256, reason, violations, BY, path)
        self.audit.append("quarantine", plugin_id=plugin_id, sha256=sha256, reason=reason, by=BY, evidence=path)

    def release(self, plugin_id: str) -> int:
        count = self.store.release(plugin_id, BY)
        self.audit.append("quarantine-release", plugin_id=plugin_id, by=BY, count=count)
        return count

    def is_quarantined(self, plugin_id: str, sha256: str | None) -> Quarantined | None:
        return self.store.is_quarantined(plugin_id, sha256)

    def quarantined(self) -> list[dict[str, Any]]:
        return [each.to_dict() for each in self.store.quarantined()]

    def history(self, plugin_id: str, limit: int) -> list[dict[str, Any]]:
        return [each.to_dict() for each in self.store.runs(plugin_id, limit=limit)]

    def statistics(self) -> dict[str, Statistics]:
        return self.store.statistics()


class Evidence:
    """What a plugin has left, collected while its sandbox is open."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, bytes]] = []
        self.left = CHANGE_BYTES
        self.samples: list[dict[str, Any]] = []
        self.recipe: dict[str, Any] = {}
        self.output_tail = b""

    def parts(self) -> dict[str, Any]:
        return {
            "changes": self.changes,
            "samples": self.samples,
            "recipe": self.recipe,
            "output_tail": self.output_tail,
        }

    def keep(self, name: str, violations: Sequence[Any], folder: str | None = None) -> str:
        """Keep it in a bundle of its own in the state folder; returns its path. Raises ResourceError."""
        place = os.path.join(folder if folder is not None else private.default_folder(), evidence.FOLDER)
        unique = f"{name}-{time.time_ns()}-{os.urandom(4).hex()}"
        return os.fspath(evidence.bundle(place, unique, violations=violations, **self.parts()))

    def take(self, path: str, data: bytes) -> None:
        if len(self.changes) < CHANGES:
            kept = data[: self.left]
            self.left -= len(kept)
            self.changes.append((path, kept))

    def take_granted(self, granted: GrantedChanges) -> None:
        """What it has changed in granted folders, before that is discarded."""
        for folder in granted.folders:
            try:
                differences = folder.differences
            except OSError:
                continue  # the plugin has made it unreadable
            for difference in differences:
                if difference.upper is not None and self.left:
                    found = content(folder.upper, difference, old=False)
                    self.take(os.path.join(folder.path, difference.path), found or b"")

    def take_workspace(self, sandbox: EnhancedPluginSandbox) -> None:
        """The files of its workspace; while they are read, the sandbox may come to its end."""
        for path, size in regular_files(sandbox):
            if not self.left or len(self.changes) >= CHANGES:
                return
            if size <= self.left:
                try:
                    self.take(f"workspace/{path}", sandbox.read_file(path, max_bytes=self.left))
                except OSError:
                    continue  # the plugin has made it unreadable


def regular_files(sandbox: EnhancedPluginSandbox) -> Iterator[tuple[str, int]]:
    try:
        entries = sandbox.list_files()
    except (OSError, RuntimeError):  # it has been closed: its lifetime, or its warden, has ended
        return
    for entry in entries:
        if entry.kind == "file":
            yield entry.path, entry.size


def run_of(**fields: Any) -> Run:
    return Run(door=DOOR, version=__version__, **fields)
