"""What the calls of an open sandbox do to its files: in the workspace, and in the upper layers of granted folders.

For the library and for the command, on the loop that the sandbox is on. A call that has run for client.WATCH_AFTER seconds
is watched by inotify(7); what a shorter one has done is found by a look at its end, which finds no more than the difference.
Light: what only a watch needs is imported by it. Must not know who shows the records.
"""

from __future__ import annotations

import os

from sandbox.monitor.tree import HIDDEN, FileTree
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandbox.engine.client import Call, Sandbox
    from sandbox.violations import SandboxViolation

RECORDS = 10_000  # kept, where telemetry is; further ones are only counted
FEW = 100  # files that are looked at after every call; among more only where something shows that there is something new
WATCHES = 2000  # of one tree, of those that all programs of the caller's user share; behind them looks tell
LAYERS = ("overlay", "copy")
PLACE = 200  # characters of a folder's path that are told


class Recorded:
    """One call. What is done while several run is put to the account of all of them alike: nobody can tell whose it was."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.operations = 0.0
        self.is_over = False  # it has passed the limit
        self.is_ending = False


class Recorder:
    """Counts and keeps the file operations of one sandbox, and ends the calls that pass max_file_operations.

    `records` are as FilesystemWatchdog's, with paths as the plugin has them; `on_violation` is told of each call that is over
    the limit, or hides from the count what it goes on doing. What happens while no call runs is recorded, but is no call's.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.limit = int(sandbox.recipe.monitoring["max_file_operations"])
        self.most = RECORDS if sandbox.recipe.monitoring["telemetry"] else 0
        self.count = 0
        self.records: list[dict[str, Any]] = []
        self.on_violation: Callable[[SandboxViolation], None] | None = None
        self.running: list[Recorded] = []
        self.trees: list[FileTree] = []  # the workspace first
        self.is_whole = False  # nothing is missing among them
        self.seen: object = None  # what showed at the last look

    def begin(self, call: Call) -> Recorded:
        """Of a call that is about to be sent its job."""
        self.open()
        run = Recorded(call)
        self.running.append(run)
        return run

    def watch(self) -> None:
        """A call has run for a while. Where the host has no inotify instance left, a look at its end has to do."""
        if not self.running or self._is_listening():
            return
        from sandbox.monitor.files import FileWatch

        for number, tree in enumerate(self.trees):
            if not isinstance(tree, FileWatch):
                loop = self.sandbox.loop
                watch = FileWatch(loop, tree.root, tree.on_operation, tree.lower, each_file=True, most=WATCHES)
                watch.top, watch.size, watch.own = tree.top, tree.size, tree.own
                self.trees[number] = tree = watch
            try:
                tree.listen(report=True)
            except OSError:
                continue

    def is_quiet(self) -> bool:
        """Whether `catch_up` would find nothing, as far as that can be told in no time."""
        return not self._is_listening() and sum(tree.size - 1 for tree in self.trees) == 0 and self._showing() == self.seen

    def catch_up(self) -> None:
        """What calls have done until now counts; they go on."""
        if self._is_listening():
            for tree in self.trees:
                tree.catch_up()
        else:
            self._look(report=not any(run.is_over for run in self.running))

    def end(self, run: Recorded) -> None:
        """The call has ended: what it did until then counts. After the last one it is quiet."""
        is_last, report = len(self.running) == 1, not run.is_over
        run.is_ending = True
        try:
            if not is_last:
                for tree in self.trees:
                    tree.catch_up()
            elif not self._is_listening():
                self._look(report=report)
            else:
                for tree in self.trees:
                    (tree.quiet if tree.is_listening else tree.look)(report=report)
                self.seen = self._showing()
        finally:
            self.running.remove(run)

    def close(self, *, look: bool) -> None:
        """With a last `look`, as long as all of the sandbox is there. A call that begins later opens all anew."""
        if look and self.trees:
            self._look(everything=True)
        for tree in self.trees:
            tree.close(look=False)
        self.trees.clear()
        self.is_whole = False

    # -- what the host does itself -----------------------------------------------------------------------------------

    def host_writes(self, path: str) -> None:
        """A file of the workspace is about to be written by the caller: that is no operation of a plugin's."""
        if self.trees:
            self.trees[0].own += with_folders(path)

    def host_has_written(self, path: str) -> None:
        if self.trees:
            tree, self.seen = self.trees[0], None
            tree.catch_up()
            for each in with_folders(path):
                tree.know(each)
                if each in tree.own:
                    tree.own.remove(each)

    # -- what is seen ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """See what there is before the first call, which does it otherwise."""
        if not self.is_whole:
            self._open()

    def _open(self) -> None:
        sandbox = self.sandbox
        kinds = sandbox.granted_kinds.split(",") if sandbox.layers is not None else []
        layers = [number for number, kind in enumerate(kinds) if kind in LAYERS]
        try:
            if not self.trees:
                root = sandbox.open_workspace()
                self._add(str(sandbox.recipe.workspace["path"]).replace("{folder}", sandbox.folder or ""), root)
            for number in layers[len(self.trees) - 1 :]:
                self._add_layer(number, kinds[number])
        except OSError:
            return  # a sandbox at its end, or a caller without descriptors: the next call opens what is missing
        self.is_whole = True
        self.seen = self._showing()

    def _add_layer(self, number: int, kind: str) -> None:
        """What the plugin has changed in a granted folder."""
        from sandbox.ns import workspace

        granted, layers = self.sandbox.granted[number], self.sandbox.layers
        assert layers is not None
        root = workspace.open_upper(layers, number)
        try:
            lower = os.dup(granted.fd) if kind == "overlay" else None
        except OSError:
            os.close(root)
            raise
        self._add(granted.path, root, lower)

    def _add(self, place: str, root: int, lower: int | None = None) -> None:
        place = escape_text(place, keep="")

        def operation(record: dict[str, Any]) -> None:
            for name in ("path", "from"):
                if name in record:
                    record[name] = f"{place}/{record[name]}" if record[name] else place
            self._operation(record)

        tree = FileTree(root, operation, lower)
        self.trees.append(tree)
        tree.look(report=False)

    def _is_listening(self) -> bool:
        return any(tree.is_listening for tree in self.trees)

    def _look(self, *, report: bool = True, everything: bool = False) -> None:
        """Many files are looked at only where something has been made or removed since: changes of what was there are then
        seen at the next look. Where there were none nothing else can be new."""
        showing = self._showing()
        files = sum(tree.size - 1 for tree in self.trees)
        if everything or showing != self.seen or 0 < files <= FEW:
            for tree in self.trees:
                tree.look(report=report)
            self.seen = showing

    def _showing(self) -> object:
        """What is different where something in the workspace is new or gone; of a folder on disk its top tells alone."""
        top = [os.fstat(tree.root).st_mtime_ns for tree in self.trees]
        if self.sandbox.folder is not None or not self.trees:
            return top
        found = os.fstatvfs(self.trees[0].root)
        return top, found.f_ffree, found.f_bfree

    def _operation(self, record: dict[str, Any]) -> None:
        self.count += 1
        if len(self.records) < self.most:
            self.records.append(record)
        running = list(self.running)
        for run in running:
            run.operations += 1 / len(running)
            if record["operation"] == HIDDEN and not run.is_ending:
                run.call.hidden = record["path"]
            if (run.operations > self.limit or run.call.hidden) and not run.is_over:
                run.is_over = True
                self._exceeded(run)

    def _exceeded(self, run: Recorded) -> None:
        run.call.file_operations = int(run.operations)
        run.call.kill("file_operations")
        if self.on_violation is not None:
            self.on_violation(exceeded(run.call.file_operations, self.limit, run.call.hidden))


def with_folders(path: str) -> list[str]:
    """It and the folders that it lies in, below the root."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def exceeded(used: int, allowed: int, hidden: str = "") -> SandboxViolation:
    """`hidden`: the folder below which nobody can count, escaped."""
    from datetime import UTC, datetime

    from sandbox import explanations
    from sandbox.violations import SandboxViolation, SandboxViolationType

    text = f"file operations: {used} in one call, {allowed} are allowed (max_file_operations)"
    if hidden:
        text = f"file operations: {hidden[:PLACE]} cannot be looked into, so nobody counts what is done below it"
    details = {"limit": "file_operations", "allowed": allowed, "used": used, "source": "watchdog"}
    return SandboxViolation(
        SandboxViolationType.RESOURCE_EXCEEDED,
        text,
        datetime.now(UTC),
        "critical",
        details,
        explanation=explanations.limited("file_operations", allowed) if not hidden else None,
    )
