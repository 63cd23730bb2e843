"""Granted folders: no way out of them, and no way into them but for what is committed."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.selftest.attacks import ALL, NAMESPACED, ROOT, Scene, Where, attack, attempt, first_escape, place

BOUNDS = "granted folders: their bounds"
ASIDE = "granted folders: changes kept aside"


@contextmanager
def granted(where: Where, *, allow_deletion: bool = True) -> Iterator[Scene]:
    """A granted folder beside another, to which a link in it leads. Harm: the other one changes."""
    with tempfile.TemporaryDirectory(prefix="granted-", dir=place()) as name:
        folder, other = Path(name, "folder"), Path(name, "other")
        for path in (folder, other):
            path.mkdir()
            path.chmod(0o777)
            (path / "file").write_text("content")
            (path / "file").chmod(0o666)
        (folder / "link").symlink_to("../other")
        Path(name).chmod(0o777)

        def harm() -> str:
            found = sorted(os.listdir(other)), sorted(os.listdir(name)), (other / "file").stat().st_nlink
            unchanged = found == (["file"], ["folder", "other"], 1) and (other / "file").read_text() == "content"
            return "" if unchanged else f"the folder beside it is {found}"

        permissions = {"allowed_directories": [str(folder)], "allow_file_deletion": allow_deletion}
        yield Scene({"folder": str(folder), "other": str(other)}, harm, permissions)


@contextmanager
def with_layers(where: Where) -> Iterator[Scene]:
    """Where the lower layer may be reached past the overlay. Harm: the folder itself changes before anything is committed."""
    with granted(where) as scene:
        file = Path(scene.arguments["folder"], "file")
        place = "run/sandbox/0/lower/file"
        paths = [f"{start}{place}" for start in ("/", "/proc/self/root/", "/proc/1/root/", "/proc/self/cwd/../")]
        paths = paths if where.inside else [str(file)]
        before = sorted(os.listdir(file.parent)), file.stat().st_mtime_ns, file.stat().st_mode

        def harm() -> str:
            return (
                "" if before == (sorted(os.listdir(file.parent)), file.stat().st_mtime_ns, file.stat().st_mode) else "changed"
            )

        yield Scene({"folder": scene.arguments["folder"], "paths": paths}, harm, scene.permissions)


@attack(BOUNDS, ALL, scene=granted, refusals=("EXDEV", "ENOTDIR"))
def through_a_link(folder: str, other: str) -> str:
    import os

    return first_escape(
        {
            "write": lambda: os.open(f"{folder}/link/file", os.O_WRONLY),
            "make": lambda: os.open(f"{folder}/link/new", os.O_WRONLY | os.O_CREAT),
            "upward": lambda: os.open(f"{folder}/../other/file", os.O_WRONLY),
            "remove": lambda: os.unlink(f"{folder}/link/file"),
        }
    )


@attack(BOUNDS, ALL, scene=granted, refusals=("EXDEV",))
def rename_and_link_across(folder: str, other: str) -> str:
    import os

    return first_escape(
        {
            "out": lambda: os.rename(f"{folder}/file", f"{other}/taken"),
            "in": lambda: os.rename(f"{other}/file", f"{folder}/taken"),
            "link out": lambda: os.link(f"{folder}/file", f"{other}/linked"),
            "link in": lambda: os.link(f"{other}/file", f"{folder}/linked"),
        }
    )


@attack(BOUNDS, ALL, scene=granted, refusals=("EBUSY", "ENOTEMPTY"))
def replace_the_folder_itself(folder: str, other: str) -> str:
    """Or put something beside it: in the private /tmp it may, which shows nothing of what lies there on the host."""
    import os

    def put_beside() -> None:
        os.symlink("/etc", folder + "/../new")
        os.stat(other)

    return first_escape({"rename": lambda: os.rename(folder, folder + "-moved"), "beside": put_beside})


@attack(ASIDE, NAMESPACED, scene=with_layers)
def reach_the_lower_layer(folder: str, paths: list[str]) -> str:
    import os

    return first_escape({path: lambda path=path: os.open(path, os.O_WRONLY) for path in paths})  # type: ignore[misc]


@attack(ASIDE, NAMESPACED, scene=with_layers, refusals=("EOPNOTSUPP", "ENODATA"))
def forge_an_overlay_mark(folder: str, paths: list[str]) -> str:
    """Marks of the upper layer say what is hidden of the lower one, and where a file really lies."""
    import os

    def mark(name: str) -> None:
        os.setxattr(folder, name, b"y")
        os.removexattr(folder, name)

    names = ("user.overlay.opaque", "user.overlay.redirect") if os.getuid() else ("trusted.overlay.opaque",)
    return first_escape({name: lambda name=name: mark(name) for name in names})  # type: ignore[misc]


@attack(ASIDE, ALL if ROOT else NAMESPACED, scene=granted)
def set_user_id_file(folder: str, other: str) -> str:
    """Committed, it would run as the folder's owner for whoever starts it."""
    import os

    def make() -> int:
        os.chmod(f"{folder}/file", 0o4777)
        return os.stat(f"{folder}/file").st_mode & stat.S_ISUID

    return attempt(make)
