"""What the framework and the command keep of what they have run: rows of the history, quarantines with their evidence.

All use of the stored records that those two make is here. Host side. It must not know how a plugin is run.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Protocol

from sandbox.errors import ResourceError
from sandbox.recovery import evidence, in_force, private, spool
from sandbox.recovery.audit import AuditLog
from sandbox.recovery.granted import content
from sandbox.recovery.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from sandbox.files import FileEntry
    from sandbox.recovery.granted import GrantedChanges
    from sandbox.recovery.store import Quarantined, Statistics

CHANGES = 1000  # files that are kept of a plugin's changes
CHANGE_BYTES = 16 << 20  # of all of them
NAME_CHARACTERS = 100  # of an evidence folder, before what makes it one of its own


class Workspace(Protocol):
    """What Evidence reads files of: an EnhancedPluginSandbox, for one."""

    def list_files(self) -> list[FileEntry]: ...

    def read_file(self, path: str, *, max_bytes: int) -> bytes: ...


class Records:
    """The records in one folder; None for psie's own. Methods raise ResourceError where they cannot be kept. Any thread.

    `by`: who decides, "framework" or "command": also the door of its runs.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, by: str, on_trouble: Callable[[str], None] | None = None) -> None:
        self.by = by
        self.store = Store(folder, on_trouble=on_trouble)
        self.audit = AuditLog(self.store)

    def close(self) -> None:
        self.store.close()

    def add(self, **run: Any) -> None:
        """A run that has ended: what spool.append takes, but its door."""
        if spool.append(self.store.folder, door=self.by, **run):
            self.store.collect()

    def quarantine(
        self, plugin_id: str, sha256: str, reason: str, violations: Sequence[Mapping[str, Any]], found: Evidence
    ) -> None:
        """Quarantine a plugin, with evidence if that can be kept: without it the quarantine holds all the same."""
        path: str | None = None
        try:
            path = found.keep(plugin_id, violations, self.store.folder)
        except ResourceError as error:
            reason = f"{reason} (no evidence is kept: {error})"
        self.store.quarantine(plugin_id, sha256, reason, violations, self.by, path)
        self.audit.append("quarantine", plugin_id=plugin_id, sha256=sha256, reason=reason, by=self.by, evidence=path)

    def release(self, plugin_id: str) -> int:
        count = self.store.release(plugin_id, self.by)
        self.audit.append("quarantine-release", plugin_id=plugin_id, by=self.by, count=count)
        return count

    def is_quarantined(self, plugin_id: str, sha256: str, alone: Sequence[str]) -> Quarantined | None:
        """By its name, by its digest, or where it is one file by the digest of that, whatever its name: see in_force.find."""
        for each in self.store.quarantined():
            if in_force.find([{"plugin_id": each.plugin_id, "sha256": each.sha256}], plugin_id, sha256, alone) is not None:
                return each
        return None

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
        unique = f"{plain(name)}-{time.time_ns()}-{os.urandom(4).hex()}"
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

    def take_workspace(self, workspace: Workspace) -> None:
        """The files of its workspace; while they are read, the sandbox may come to its end."""
        for path, size in regular_files(workspace):
            if not self.left or len(self.changes) >= CHANGES:
                return
            if size <= self.left:
                try:
                    self.take(f"workspace/{path}", workspace.read_file(path, max_bytes=self.left))
                except OSError:
                    continue  # the plugin has made it unreadable


def regular_files(workspace: Workspace) -> Iterator[tuple[str, int]]:
    try:
        entries = workspace.list_files()
    except (OSError, RuntimeError):  # it has been closed: its lifetime, or its warden, has ended
        return
    for entry in entries:
        if entry.kind == "file":
            yield entry.path, entry.size


def plain(plugin_id: str) -> str:
    """The end of an id or a path, as part of the name of a folder."""
    name = "".join(
        each if each.isascii() and (each.isalnum() or each in "-_.") else "_" for each in os.path.basename(plugin_id)
    )
    return name[:NAME_CHARACTERS].lstrip(".") or "plugin"
