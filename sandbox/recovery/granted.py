"""The granted folders of an open sandbox: what has been changed in them, and the commit of it.

Host side. Works on descriptors of its own, so that it does not matter when the sandbox goes. Must not know how a sandbox is
talked to: its owner says when no call runs, and renews it afterwards.
"""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime

from sandbox import explanations
from sandbox.errors import CommitError
from sandbox.ns import workspace
from sandbox.recovery import changes, commit
from sandbox.recovery.changes import ADDED, DELETED, Comparison, Difference, FileChange
from sandbox.text import escape_text
from sandbox.violations import SandboxViolation, SandboxViolationType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from sandbox.engine.client import Sandbox


class GrantedChanges:
    """A context manager: descriptors of the folders and of their upper layers, compared once, when that is first needed."""

    def __init__(self, sandbox: Sandbox) -> None:
        """Takes descriptors of `sandbox`, which must be open. Raises OSError."""
        self.folders: list[commit.Folder] = []
        allow_deletion = bool(sandbox.recipe.monitoring["allow_file_deletion"])
        kinds = sandbox.granted_kinds.split(",")
        try:
            for number, granted in enumerate(sandbox.granted):
                if sandbox.layers is None or kinds[number] not in ("overlay", "copy"):
                    continue
                lower = os.dup(granted.fd)
                try:
                    upper = workspace.open_upper(sandbox.layers, number)
                except OSError:
                    os.close(lower)
                    raise
                comparison = Comparison(upper, lower, hides=kinds[number] == "copy", allow_deletion=allow_deletion)
                self.folders.append(commit.Folder(granted.path, lower, upper, comparison, granted.since))
        except OSError:
            self.close()
            raise

    def __enter__(self) -> GrantedChanges:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for folder in self.folders:
            folder.close()
        self.folders.clear()

    def found(self) -> list[FileChange]:
        """Every change, folder by folder and there by path."""
        return described(self.folders)

    def diff(self, path: str) -> str:
        """A unified diff of one changed file. Raises ValueError where nothing has changed."""
        for folder in self.folders:
            found = [each for each in folder.differences if os.path.join(folder.path, each.path) == path]
            if found:  # two where one thing has taken the place of another
                sides = (content(folder.lower, found[0], old=True), content(folder.upper, found[-1], old=False))
                return changes.unified(*sides, path)
        raise ValueError(f"diff: nothing has changed at {path!r}: give the path of one of the changes")

    def commit(self, paths: Iterable[str] | None = None) -> list[FileChange]:
        """Commit all changes, or those at and below `paths`; returns them.

        Raises CommitError, and then nothing has changed; ValueError for a path where nothing has.
        """
        if paths is None:
            chosen = self.folders
        else:
            wanted = list(paths)
            found = [os.path.join(folder.path, each.path) for folder in self.folders for each in folder.differences]
            for path in wanted:
                if not any(is_below(each, path) for each in found):
                    raise ValueError(f"commit_changes: nothing has changed at {path!r}: give paths of changes, or folders")
            chosen = [folder.narrowed(selected(folder, wanted)) for folder in self.folders]
        told = described(chosen)
        with commit.told(self.folders):
            for folder in self.folders:
                commit.check_unchanged(folder)
        commit.commit([folder for folder in chosen if folder.differences])
        return told


def is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def selected(folder: commit.Folder, paths: list[str]) -> list[Difference]:
    """The differences at and below `paths`, and the new folders that these lie in."""
    chosen = [
        each for each in folder.differences if any(is_below(os.path.join(folder.path, each.path), path) for path in paths)
    ]
    above = {os.path.dirname(each.path) for each in chosen}
    for path in list(above):
        while path:
            above.add(path)
            path = os.path.dirname(path)
    wanted = {id(each) for each in chosen}
    wanted |= {id(each) for each in folder.differences if each.path in above and each.kind in (ADDED, DELETED)}
    return [each for each in folder.differences if id(each) in wanted]


def described(folders: Iterable[commit.Folder]) -> list[FileChange]:
    told: list[FileChange] = []
    holes = 0
    for folder in folders:
        for difference in folder.differences:
            found, path = difference.upper, os.path.join(folder.path, difference.path)
            if found is None:
                told.append(FileChange(difference.kind, path, problem=difference.problem))
                continue
            holes += max(0, found.st_size - found.st_blocks * 512)
            sha256 = digest(folder, difference) if holes <= changes.HOLES else None
            told.append(FileChange(difference.kind, path, found.st_size, sha256, difference.problem))
    return told


def digest(folder: commit.Folder, difference: Difference) -> str | None:
    try:
        with commit.parent(folder.upper, difference.path) as (above, name):
            return changes.digest(above, name)
    except OSError:
        return None  # no regular file, or one that cannot be read, as its problem says


def content(folder: int, difference: Difference, *, old: bool) -> bytes | None:
    """What a diff shows of one side: of a regular file its content, of a link what it leads to, of a folder nothing."""
    found = difference.lower if old else difference.upper
    if found is None or stat.S_ISDIR(found.st_mode):
        return None
    try:
        with commit.parent(folder, difference.path) as (above, name):
            if stat.S_ISLNK(found.st_mode):
                return os.fsencode(os.readlink(name, dir_fd=above))
            fd = changes.open_file(above, name)
            with open(fd, "rb") as file:
                return file.read(changes.DIFF_BYTES + 1)
    except OSError:
        return b"\0"  # not to be shown line by line


def refuse_direct() -> None:
    raise CommitError(
        "level minimal has no mount namespace, so granted folders were written directly: there is nothing to commit or discard"
    )


def deletion_violation(path: str) -> SandboxViolation:
    text = f"{escape_text(path, keep='')} was deleted in a granted folder: deleting is not permitted (allow_file_deletion)"
    details = {"operation": "delete", "path": path, "source": "overlay"}
    kind, explanation = SandboxViolationType.FILESYSTEM_VIOLATION, explanations.explain("deletion")
    return SandboxViolation(kind, text, datetime.now(UTC), "warning", details, explanation=explanation)
