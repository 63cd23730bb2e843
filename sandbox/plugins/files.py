"""The files of a plugin: read once, bounded, and hashed from the very bytes that are kept.

So nothing can be swapped between check and run.

A plugin folder holds plugins: `<id>.py`, or `<id>/` with `main.py` or `__init__.py`. Its manifest is `<id>.toml` or
`<id>.json` beside it, or `plugin.toml` or `plugin.json` in it; its signature is `<id>.sig` beside it or `plugin.sig` in it.
Everything is opened beneath the plugin folder, without links and other file systems on the way. `__pycache__` and what begins
with a dot is no part of a plugin.

The digest of a plugin is that of the lines "<sha256 of a file>  <its path>" of all its files but manifest and signature,
sorted. By hand, for a file and for a folder:

    sha256sum ID.py | sha256sum
    cd ID && find . \\( -name '.?*' -o -name __pycache__ \\) -prune -o -type f ! -path ./plugin.toml ! -path ./plugin.json \\
        ! -path ./plugin.sig -printf '%P\\0' | xargs -0 sha256sum -- | LC_ALL=C sort | sha256sum

Host side. It must not know what a manifest or a signature says. Source: openat2(2).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass

from sandbox.errors import PluginError
from sandbox.ns import syscalls as sc
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO, NoReturn

MOST_BYTES = 64 << 20  # of all files of a plugin
MOST_FILES = 2000  # and likewise most folders, and most names that are left out
MOST_DEPTH = 16  # folders in each other
ID_CHARACTERS = 100
MANIFEST_BYTES = (1 << 20) + 1  # one more than a manifest may have: whoever reads it says so
SIGNATURE_BYTES = 4096

MAIN_FILES = ("main.py", "__init__.py")
MANIFESTS = ("plugin.toml", "plugin.json")
SIGNATURE = "plugin.sig"
FILE, FOLDER = "file", "folder"

NO_MAIN = "has neither main.py nor __init__.py: add one"
NO_FILE = "is no regular file: take it out of the plugin"
_REASONS = {
    errno.ELOOP: "is a symbolic link, or lies behind one: put the file itself there",
    errno.EXDEV: "lies in another file system, or was moved away while it was read: put the file itself there",
    errno.ENOENT: "has gone while it was read: try again",
}


@dataclass(frozen=True)
class PluginFiles:
    """A plugin as it was read. Whoever runs it runs these bytes.

    Attributes:
        id: its id.
        files: content by path, relative to the plugin: "main.py", "lib/data.json"; of a file plugin "<id>.py" alone.
        sha256: digest of all of `files`, in hex; the module says how to work it out by hand.
        manifest: (name beneath the plugin folder, content), if there is one.
        signature: content of the signature file, if there is one.
    """

    id: str
    files: Mapping[str, bytes]
    sha256: str
    manifest: tuple[str, bytes] | None = None
    signature: bytes | None = None

    @property
    def main(self) -> str:
        """The file that is run: "<id>.py", "main.py" or "__init__.py"."""
        return next(name for name in (*MAIN_FILES, f"{self.id}.py") if name in self.files)


def digest(files: Mapping[str, bytes]) -> str:
    """The digest of a plugin with these files, in hex."""
    lines = sorted(f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_id(text: str) -> bool:
    """Whether it is a plain name: ASCII letters, digits, "_" and "-", the first not "-", at most ID_CHARACTERS."""
    plain = text.isascii() and text.replace("_", "a").replace("-", "a").isalnum()
    return plain and not text.startswith("-") and len(text) <= ID_CHARACTERS


def open_folder(plugin_dir: str | os.PathLike[str]) -> int:
    """An fd of a plugin folder; its own path may lead through links. Raises PluginError."""
    try:
        return os.open(plugin_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = getattr(error, "strerror", None) or str(error)
        refuse(os.fspath(plugin_dir), f"cannot be opened as a plugin folder ({reason}): check the path")


def read(folder: int, plugin_id: str) -> PluginFiles:
    """Read a plugin beneath the open plugin folder. Raises PluginError, one sentence that says which file is wrong and why."""
    kind = kind_of(folder, plugin_id)
    reader = _Reader()
    if kind == FILE:
        name = f"{plugin_id}.py"
        reader.files[name] = reader.content(folder, name, name)
    else:
        fd = opened(folder, plugin_id, plugin_id, os.O_DIRECTORY)
        try:
            reader.walk(fd, plugin_id)
        finally:
            os.close(fd)
    manifest = _beside(folder, plugin_id, reader, MANIFESTS, (".toml", ".json"), MANIFEST_BYTES)
    signature = _beside(folder, plugin_id, reader, (SIGNATURE,), (".sig",), SIGNATURE_BYTES)
    if kind == FOLDER and not any(name in reader.files for name in MAIN_FILES):
        refuse(f"{plugin_id}/", NO_MAIN)
    return PluginFiles(plugin_id, reader.files, digest(reader.files), manifest, signature[1] if signature else None)


def read_manifest(folder: int, plugin_id: str) -> tuple[str, bytes] | None:
    """(name, content) of a plugin's manifest alone. Raises PluginError."""
    reader = _Reader()
    if kind_of(folder, plugin_id) == FOLDER:
        for name in MANIFESTS:
            path = f"{plugin_id}/{name}"
            if exists(folder, path):
                reader.files[name] = _content(folder, path, path, MANIFEST_BYTES)
    return _beside(folder, plugin_id, reader, MANIFESTS, (".toml", ".json"), MANIFEST_BYTES)


def kind_of(folder: int, plugin_id: str) -> str:
    """FILE or FOLDER. Raises PluginError where there is no such plugin, or two of one id."""
    if not is_id(plugin_id):
        refuse(plugin_id, "is no plugin id: give letters, digits, _ and -, at most 100 and no - at the beginning")
    has_file, has_folder = exists(folder, f"{plugin_id}.py"), is_folder_plugin(folder, plugin_id)
    if has_file and has_folder:
        refuse(plugin_id, f"is the id of both {plugin_id}.py and {plugin_id}/: rename or remove one of them")
    if not has_file and not has_folder:
        refuse(plugin_id, f"is no plugin of this folder: there is neither {plugin_id}.py nor {plugin_id}/ with a main.py")
    path, wanted = (f"{plugin_id}.py", stat.S_IFREG) if has_file else (plugin_id, stat.S_IFDIR)
    try:
        found = stat.S_IFMT(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError as error:
        _refuse_error(path, error)
    if found != wanted:
        refuse(path, _REASONS[errno.ELOOP] if found == stat.S_IFLNK else NO_FILE)
    if has_folder and not any(exists(folder, f"{plugin_id}/{name}") for name in MAIN_FILES):
        refuse(f"{plugin_id}/", NO_MAIN)
    return FILE if has_file else FOLDER


def is_folder_plugin(folder: int, name: str) -> bool:
    """Whether the folder `name` is meant as a plugin: it has a main file, a manifest or a signature. A link to one is, too,
    so that it can be refused with a reason rather than passed over."""
    return any(exists(folder, f"{name}/{inner}") for inner in (*MAIN_FILES, *MANIFESTS, SIGNATURE))


def exists(folder: int, path: str) -> bool:
    """Whether there is something at `path`, be it a link that leads nowhere. Decides on names only, never on contents."""
    try:
        os.stat(path, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def refuse(path: str, reason: str) -> NoReturn:
    """Raise PluginError. `path` may be hostile."""
    shown = path if len(path) <= ID_CHARACTERS * 2 else f"{path[: ID_CHARACTERS * 2]}..."
    raise PluginError(f"{escape_text(shown, keep='')} {reason}", path=path)


class _Reader:
    """The files of one plugin, and how much of what is allowed they have taken."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.left = MOST_BYTES
        self.counts: Counter[str] = Counter()

    def content(self, folder: int, name: str, shown: str) -> bytes:
        content = _content(folder, name, shown, self.left + 1)
        if len(content) > self.left:
            refuse(shown, f"makes the plugin larger than {MOST_BYTES >> 20} MB: make it smaller")
        self.left -= len(content)
        return content

    def walk(self, folder: int, shown: str, above: str = "", depth: int = 0) -> None:
        """Read all that lies in an open folder of the plugin."""
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self.take(folder, entry, f"{shown}/{entry.name}", above, depth)
        except OSError as error:
            _refuse_error(shown, error)

    def take(self, folder: int, entry: os.DirEntry[str], shown: str, above: str, depth: int) -> None:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            self.count("hidden names", shown)
            return
        if not entry.name.isprintable() or "\\" in entry.name:
            refuse(shown, "has a name that cannot be shown or hashed safely: give it one of printable characters without \\")
        if entry.is_dir(follow_symlinks=False):
            self.count("folders", shown)
            if depth == MOST_DEPTH:
                refuse(shown, f"lies deeper than {MOST_DEPTH} folders: make the plugin flatter")
            fd = opened(folder, entry.name, shown, os.O_DIRECTORY)
            try:
                self.walk(fd, shown, f"{above}{entry.name}/", depth + 1)
            finally:
                os.close(fd)
        else:
            self.count("files", shown)
            self.files[above + entry.name] = self.content(folder, entry.name, shown)

    def count(self, what: str, shown: str) -> None:
        self.counts[what] += 1
        if self.counts[what] > MOST_FILES:
            refuse(shown, f"is one of more than {MOST_FILES:,} {what} in the plugin: take out what it does not need")


def _beside(
    folder: int, plugin_id: str, reader: _Reader, inner: tuple[str, ...], endings: tuple[str, ...], most: int
) -> tuple[str, bytes] | None:
    """The one manifest or signature of a plugin; what of them lies in it has been read, and is taken out of its files."""
    found = [(f"{plugin_id}/{name}", reader.files.pop(name)) for name in inner if name in reader.files]
    for name in (plugin_id + ending for ending in endings):
        if exists(folder, name):
            found.append((name, _content(folder, name, name, most)))
    if len(found) > 1:
        refuse(found[0][0], f"is there beside {found[1][0]}: keep one of them")
    return (found[0][0], found[0][1][:most]) if found else None


def _content(folder: int, name: str, shown: str, most: int) -> bytes:
    """At most `most` bytes of a regular file."""
    try:
        kind = stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError as error:
        _refuse_error(shown, error)
    if kind not in (stat.S_IFREG, stat.S_IFLNK):  # opening a device can do things already
        refuse(shown, NO_FILE)
    with opened_file(folder, name, shown) as file:
        try:
            return file.read(most)
        except OSError as error:
            _refuse_error(shown, error)


def opened_file(folder: int, name: str, shown: str) -> BinaryIO:
    """Open a regular file for reading beneath an open folder. Raises PluginError about `shown`."""
    fd = opened(folder, name, shown, os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        refuse(shown, NO_FILE)
    return open(fd, "rb")


def opened(folder: int, name: str, shown: str, flags: int) -> int:
    """Open whatever it is for reading beneath an open folder. Raises PluginError about `shown`."""
    try:
        return sc.open_beneath(folder, name, os.O_RDONLY | flags)
    except OSError as error:
        _refuse_error(shown, error)


def _refuse_error(shown: str, error: OSError) -> NoReturn:
    refuse(shown, _REASONS.get(error.errno or 0, f"cannot be read: {error.strerror}"))
