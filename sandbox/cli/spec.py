"""`psie spec`: a recipe as the config.json of an OCI runtime, or as a bundle that `crun run -b DIR NAME` runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile

from sandbox import host, recipe
from sandbox.cli import settings
from sandbox.cli.inputs import UsageError
from sandbox.cli.run import Failed, plugin_path, source_of
from sandbox.cli.session import complain
from sandbox.errors import SandboxException
from sandbox.spec import Spec, spec_of
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def spec(file: str | None, args: Sequence[str], level: str | None, config: str | None, bundle: str | None) -> int:
    """Print it, or make the bundle; what an OCI runtime cannot do goes to stderr."""
    try:
        isolation, limits, permissions = settings.settings({"level": level, "config": config, "file": file})
        facts = host.facts()
        compiled = recipe.compile(isolation, limits, permissions, facts)
        plugin = None
        if file is not None:
            path = plugin_path(file)
            plugin = os.path.basename(path), source_of(path)
        made = spec_of(compiled, facts, args, plugin)
        if bundle is not None:
            make_bundle(made, bundle)
    except (Failed, SandboxException, ValueError, TypeError, OSError) as error:
        return complain(error)
    if bundle is None:
        print(text_of(made))
    for sentence in made.lost:
        print(f"psie: not in an OCI container: {escape_text(sentence, keep='')}", file=sys.stderr)
    gate = recipe.unwalkable(os.path.join(os.path.abspath(bundle), "rootfs")) if bundle is not None and facts.root else None
    if gate is not None:
        closed = escape_text(gate, keep="")
        print(
            f"psie: {closed} is closed to the container's ids, which newer versions of crun mind: chmod +x it, or make the "
            "bundle elsewhere",
            file=sys.stderr,
        )
    if bundle is None and file is not None:
        print("psie: its root file system and FILE are in a bundle alone: make one with --bundle DIR", file=sys.stderr)
    return 0


def text_of(made: Spec) -> str:
    """With each rule of the filter on a line of its own: spread out they would be thousands."""
    linux = made.config["linux"]
    mark = "the rules of the filter"
    bare = {**made.config, "linux": {**linux, "seccomp": {**linux["seccomp"], "syscalls": [mark]}}}
    before, _, after = json.dumps(bare, indent=2).partition(json.dumps(mark))
    between = "," + before[before.rindex("\n") :]
    return before + between.join(json.dumps(rule) for rule in linux["seccomp"]["syscalls"]) + after


def make_bundle(made: Spec, folder: str) -> None:
    """All of it or nothing: it is put together beside its place. Raises UsageError, OSError."""
    if not folder:
        raise UsageError("--bundle is empty: give the name of a new folder, or leave it out")
    target = os.path.abspath(folder)
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.path.islink(target) and not os.listdir(target)):
        raise UsageError(f"--bundle {folder}: there is something already: give the name of a new folder")
    if not os.path.isdir(os.path.dirname(target)):
        raise UsageError(f"--bundle {folder}: there is no folder {os.path.dirname(target)}: make it first")
    try:
        building = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}-", dir=os.path.dirname(target))
    except OSError as error:
        raise UsageError(f"--bundle {folder}: this cannot be made ({error.strerror}): give a folder in one of yours") from None
    try:
        os.chmod(building, 0o755)  # its root is another id's too
        fill(made, os.path.join(building, "rootfs"))
        with open(os.path.join(building, "config.json"), "w", encoding="utf-8") as document:
            document.write(text_of(made) + "\n")
        os.rename(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def fill(made: Spec, root: str) -> None:
    """The root file system: what is no mount, and a place for each mount."""
    os.mkdir(root)
    os.chmod(root, 0o755)
    for path, is_folder in sorted(made.points.items()):
        if is_folder:
            place(root, path)
        else:
            write(root, path, b"")
    for path, mode in made.folders.items():
        os.chmod(place(root, path), mode)
    for path, content in made.files.items():
        write(root, path, content)
    for path, target in made.links.items():
        where = os.path.join(place(root, os.path.dirname(path)), os.path.basename(path))
        if not os.path.lexists(where):
            os.symlink(target, where)


def place(root: str, path: str) -> str:
    """A folder below `root`, made with all on its way. Raises ValueError where a link is on it: that would lead out."""
    current = root
    for part in path.strip("/").split("/"):
        if part:
            current = os.path.join(current, part)
            if os.path.islink(current):
                raise ValueError(f"the root file system has a link at {current.removeprefix(root)}, on the way to {path}")
            if not os.path.isdir(current):
                os.mkdir(current)
                os.chmod(current, 0o755)
    return current


def write(root: str, path: str, content: bytes) -> None:
    where = os.path.join(place(root, os.path.dirname(path)), os.path.basename(path))
    with open(where, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o644)) as file:
        file.write(content)
    os.chmod(where, 0o644)
