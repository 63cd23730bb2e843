"""What becomes of the changes in `--rw` folders when a run is over: shown, asked about, committed or left.

Heavy imports (rich) only where something is shown. What is shown goes to stderr, like all that psie itself says.
"""

from __future__ import annotations

import os
import select

from sandbox.errors import CommitError, ResourceLimitExceededError
from sandbox.recovery.changes import ADDED, DELETED, METADATA
from sandbox.recovery.granted import GrantedChanges, deletion_violation
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from rich.tree import Tree

    from sandbox.engine.client import Sandbox
    from sandbox.recovery.changes import FileChange
    from sandbox.violations import SandboxViolation

MARKS = {ADDED: ("+", "green"), DELETED: ("-", "red"), METADATA: ("m", "cyan")}
MODIFIED_MARK = ("~", "yellow")
LINES, LINES_OF_ONE, COLUMNS = 5000, 500, 2000  # of a diff that are shown: a plugin may write millions


class Settled:
    """How it went: the changes, whether they are in the folders now, what to say about it, and what went wrong."""

    def __init__(self, found: list[FileChange], *, allow_deletion: bool) -> None:
        self.found = found
        self.is_committed = False
        self.said = ""
        self.error: CommitError | ResourceLimitExceededError | None = None
        self.allow_deletion = allow_deletion

    def violations(self) -> list[SandboxViolation]:
        """What was deleted without permission."""
        deleted = [change.path for change in self.found if change.kind == DELETED and not self.allow_deletion]
        return [deletion_violation(path) for path in deleted]


def settle(
    sandbox: Sandbox, failure: Callable[[], str], commit: Callable[[GrantedChanges], None], *, dry_run: bool, ask: bool
) -> Settled:
    """`commit` the changes of a run that has ended well; `failure()` is why another has not, which may change meanwhile."""
    with GrantedChanges(sandbox) as granted:
        settled = Settled(granted.found(), allow_deletion=bool(sandbox.recipe.monitoring["allow_file_deletion"]))
        count = f"{len(settled.found)} change{'' if len(settled.found) == 1 else 's'}"
        if (dry_run or ask) and settled.found:
            show(granted, settled.found)
        if dry_run:
            settled.said = f"dry run: {count}, none was committed"
        elif settled.found:
            try:
                if not failure() and ask and not agreed(count, sandbox):
                    settled.said = f"{count} not committed: you said no"
                elif failure():
                    settled.said = f"{count} not committed: {failure()}"
                else:
                    commit(granted)
                    settled.is_committed = True
                    if failure():
                        settled.said = f"{count} committed all the same: that had begun"
            except (CommitError, ResourceLimitExceededError) as error:
                settled.error = error
    return settled


def agreed(count: str, sandbox: Sandbox) -> bool:
    """Ask on the terminal. No answer is a no; raises ResourceLimitExceededError if none comes in the sandbox's lifetime."""
    with open("/dev/tty", "r+b", buffering=0) as terminal:
        terminal.write(f"psie: commit {count}? [y/N] ".encode())
        select.select([terminal], [], [], sandbox.seconds_left())
        if not sandbox.seconds_left():
            terminal.write(b"\n")
            raise sandbox.lifetime_error()
        return terminal.readline().strip().lower() in (b"y", b"yes")


def show(granted: GrantedChanges, found: list[FileChange]) -> None:
    """A tree for each folder, then the files line by line."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for folder in granted.folders:
        of_folder = [change for change in found if change.path.startswith(os.path.join(folder.path, ""))]
        if of_folder:
            console.print(tree(folder.path, of_folder))
    left = LINES
    paths = list(dict.fromkeys(change.path for change in found))
    for number, path in enumerate(paths):
        if left <= 0:
            console.print(
                Text(f"... {len(paths) - number} more files, the first of them {escape_text(path, keep='')}", style="bold")
            )
            break
        lines = granted.diff(path).removesuffix("\n").split("\n")  # what else ends lines is shown, not obeyed
        shown = lines[: min(LINES_OF_ONE, left)]
        for line in shown:
            console.print(Text(escape_text(line[:COLUMNS], keep="\t"), style=style_of(line)))
        left -= len(shown)
        if len(shown) < len(lines):
            console.print(Text(f"... {len(lines) - len(shown)} more lines of {escape_text(path, keep='')}", style="bold"))


def tree(folder: str, found: list[FileChange]) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(escape_text(folder, keep=""), style="bold"))
    branches: dict[str, Any] = {"": root}
    for change in found:
        path = os.path.relpath(change.path, folder)
        mark, colour = MARKS.get(change.kind, MODIFIED_MARK)
        line = Text(f"{mark} {escape_text(os.path.basename(path), keep='')}", style=colour)
        if change.problem:
            line.append(f"  cannot be committed: {change.problem}", style="bold red")
        branches[path] = branch(branches, os.path.dirname(path)).add(line)
    return root


def branch(branches: dict[str, Any], path: str) -> Any:
    """The tree's node for a folder that has not changed itself."""
    if path not in branches:
        from rich.text import Text

        branches[path] = branch(branches, os.path.dirname(path)).add(Text(escape_text(os.path.basename(path), keep="")))
    return branches[path]


def style_of(line: str) -> str:
    if line.startswith(("---", "+++")):
        return "bold"
    return {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
