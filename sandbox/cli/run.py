"""`psie run FILE`: run a file in a sandbox as `python FILE ARGS` would.

The order of the imports is part of the design: a zygote is started before anything else is imported.
"""

from __future__ import annotations

import os
import stat
import sys

from sandbox.engine import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FAILED = 125
SOURCE_BYTES = 64 << 20
ZIP_END = b"PK\x05\x06"  # of every archive; what is before one may be anything
TEXT_BYTES = 1 << 20  # of a module that are looked through for names


# Turns what cannot be part of a name in ASCII into spaces; re would cost 4 ms of imports.
NOT_NAMES = {code: " " for code in range(128) if not chr(code).isalnum() and code != ord("_")}


class Failed(Exception):
    """psie itself cannot do it: one sentence, status 125."""


def run(given: dict[str, Any], promised: spawn.Early | None = None) -> int:
    """Run it and return the exit status."""
    started = spawn_early(given["level"], promised)
    from sandbox.cli import session

    try:
        return session.run(given, started)
    except Failed as failure:
        return session.complain(failure)


def spawn_early(level: str | None, promised: spawn.Early | None = None) -> spawn.Early | None:
    """A zygote before the recipe is known: its one question is whether it needs an outer user namespace."""
    level = level or os.environ.get("SANDBOX_ISOLATION_LEVEL") or "standard"
    outer = os.getuid() != 0 and level.lower() != "minimal"
    if promised is not None:
        if promised.outer == outer:
            return promised
        promised.leave()
    try:
        return spawn.Early(*spawn.spawn_zygote(sys.executable, outer_user_namespace=outer), outer=outer)
    except OSError:
        return None  # tried again when there is a recipe, and then told


def plugin_path(file: str) -> str:
    """The absolute path of the plugin. Raises Failed for what is no readable file."""
    if not file:
        raise Failed("the name of the plugin is empty: give the path of a Python file")
    if file == "-":
        raise Failed("-: there is no such file: give /dev/stdin to run what comes on standard input")
    if not os.path.exists(file):
        from sandbox.cli.inputs import absent

        raise Failed(f"{file}: {absent(file, 'file')}")
    if os.path.isdir(file):
        raise Failed(f"{file} is a directory: give the Python file in it")
    return os.path.abspath(file)


def source_of(path: str) -> bytes:
    """The file's bytes: a regular file or a pipe of at most SOURCE_BYTES."""
    try:
        with open(path, "rb") as file:
            kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFIFO):
                raise Failed(f"{path} is no file: give a Python file")
            source = file.read(SOURCE_BYTES + 1)
    except OSError as error:
        raise Failed(f"{path} cannot be read ({error.strerror}): see to its rights, or give another file") from None
    if len(source) > SOURCE_BYTES:
        raise Failed(f"{path} is larger than {SOURCE_BYTES >> 20} MB: give a Python file")
    if b"\0" in source:
        raise Failed(f"{path} is {binary(source)}")
    return source


def binary(source: bytes) -> str:
    """What a file with a null byte is, which no Python source has, and the mend."""
    if ZIP_END in source:
        return "a zip archive: unpack it, and give the __main__.py that is in it"
    if source[2:4] == b"\r\n" and b"\0" in source[4:16]:  # PEP 552
        return "compiled Python: give the .py file that it was made from"
    if source[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "a text in UTF-16: save it as UTF-8"
    for beginning, kind in ((b"\x7fELF", "a compiled program (ELF)"), (b"%PDF-", "a PDF document")):
        if source.startswith(beginning):
            return f"{kind}: give a Python file"
    return "no text, because there is a null byte in it: give a Python file"


def siblings(path: str, source: bytes) -> list[str]:
    """The plugin's file and the modules and packages beside it that it names, or that those name in turn.

    A folder holds more than one plugin's business: what no text of the plugin mentions stays out of the sandbox, and so
    does what a symbolic link leads to: whoever wrote the plugin may have made it. A pipe lies nowhere.
    """
    own = os.path.realpath(path)
    if not os.path.exists(own):
        return []
    folder = os.path.dirname(own)
    found = [own]
    try:
        beside = {name.partition(".")[0]: name for name in sorted(os.listdir(folder))}
    except OSError:
        return found
    texts = [source]
    while texts:
        for word in set(texts.pop().decode("utf-8", "replace").translate(NOT_NAMES).split()):
            name = beside.pop(word, None)
            entry = os.path.join(folder, name) if name is not None else ""
            if not entry or entry in found:
                continue
            kind = stat.S_IFMT(os.lstat(entry).st_mode)
            if kind == stat.S_IFDIR and os.access(entry, os.R_OK | os.X_OK):
                modules = [inner for inner in sorted(os.listdir(entry)) if inner.endswith(".py")]
                found += [entry] if modules else []
                texts += [read_text(os.path.join(entry, inner)) for inner in modules]
            elif kind == stat.S_IFREG and entry.endswith((".py", ".so")):
                found.append(entry)
                texts += [read_text(entry)] if entry.endswith(".py") else []
    return found


def read_text(path: str, most: int = TEXT_BYTES) -> bytes:
    """The beginning of a regular file; nothing of what is none, or cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with open(fd, "rb") as file:
        return file.read(most) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
