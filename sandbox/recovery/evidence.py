"""Evidence: one folder with all that is known of a run that went wrong, for a person to look at later.

It is whole or not there: made below a temporary name, which a lock says is in use, and renamed. What is in it may be hostile:
names of files are only ever data in an index. Must not know how any of it was found. Source: rename(2), flock(2), syncfs(2).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sandbox import files
from sandbox.errors import ResourceError
from sandbox.ns import syscalls as sc
from sandbox.ns import workspace
from sandbox.recovery import private
from sandbox.recovery.commit import sync, sync_folder
from sandbox.violations import to_plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "evidence"  # in psie's own folder, where `psie gc` looks
TOTAL_BYTES = 64 << 20
PART_BYTES = 8 << 20  # of each of violations, samples, recipe, output, index and SHA256SUMS
CHANGES = 10_000
NAME_BYTES = 200
UNFINISHED = ".unfinished"
MAX_AGE_DAYS = 90.0
MAX_BYTES = 1 << 30
YOUNG = 3600.0  # seconds: its quarantine may still be on its way into the store


def bundle(
    folder: str | os.PathLike[str],
    name: str,
    *,
    changes: Sequence[tuple[str, bytes]],
    violations: Sequence[Any],
    samples: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    output_tail: bytes,
) -> Path:
    """Make the evidence folder `name` (mode 0700) in `folder`, which is made if it is missing; returns its path.

    It holds violations.json, samples.json, recipe.json, output.txt, changes/index.json, the contents of `changes` (path,
    content) as changes/0, changes/1 ..., and SHA256SUMS for `sha256sum -c`. Of what is too long for 64 MB in all the first
    is kept, of the output the last, and the files say what was left out; the index has every size and hash.

    Raises:
        ValueError: `name` is no plain name.
        ResourceError: there is such a folder already, all of them have MAX_BYTES, or it cannot be written.
    """
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(os.fsencode(name)) > NAME_BYTES:
        raise ValueError(f"bundle: {name[:NAME_BYTES]!r} is no plain name: give one without separators or a dot at the start")
    place = os.path.abspath(os.fspath(folder))
    path = os.path.join(place, name)
    try:
        with private.folder(place) as parent, _unfinished(parent, place) as inside:
            _check_room(parent, place)
            parts = {
                "violations.json": _listed(violations),
                "samples.json": _listed(samples),
                "recipe.json": _whole(recipe),
                "output.txt": output_tail[-PART_BYTES:],
            }
            contents, parts["changes/index.json"] = _indexed(
                changes, TOTAL_BYTES - 2 * PART_BYTES - sum(map(len, parts.values()))
            )
            parts |= contents
            sums = [f"{hashlib.sha256(data).hexdigest()}  {file}\n" for file, data in parts.items()]
            parts["SHA256SUMS"] = "".join(sums).encode()
            os.mkdir("changes", 0o700, dir_fd=inside)
            for file, data in parts.items():
                _write(inside, file, data)
            sync(inside)
            sc.rename(parent, UNFINISHED, parent, name, sc.RENAME_NOREPLACE)
        sync_folder(place)
    except FileExistsError:
        raise ResourceError(f"{path} is there already: give another name, or remove it") from None
    except OSError as error:
        raise ResourceError(f"{path} cannot be written ({error.strerror}): see to the disk and its rights") from None
    return Path(path)


def _check_room(parent: int, place: str) -> None:
    """Hostile plugins shall not fill the disk with what is kept of them. Raises ResourceError."""
    if sum(size for _, _, size in _bundles(parent)) >= MAX_BYTES:
        raise ResourceError(
            f"{place} holds {MAX_BYTES >> 20} MB already: psie gc removes what is old; look into quarantines, and release them"
        )


def remove_unfinished(folder: str | os.PathLike[str]) -> bool:
    """Remove what a killed `bundle` has left in `folder`; whether there was something. Raises ResourceError."""
    place = os.path.abspath(os.fspath(folder))
    if not os.path.isdir(os.path.join(place, UNFINISHED)):
        return False
    with private.folder(place) as parent, _unfinished(parent, place):
        return True


def trim(
    folder: str | os.PathLike[str],
    keep: Iterable[str],
    *,
    max_age_days: float = MAX_AGE_DAYS,
    max_bytes: int = MAX_BYTES,
) -> int:
    """Remove evidence that is older, and of the rest the oldest until all have at most `max_bytes`; returns how many.

    Never those at the paths `keep`, by their names, and none of the last hour. Each goes as a whole. Raises ResourceError.
    """
    place = os.path.abspath(os.fspath(folder))
    if not os.path.isdir(place):
        return 0
    kept = {os.path.basename(path) for path in keep}
    now, count = time.time(), 0
    try:
        with private.folder(place) as parent:
            found = sorted(_bundles(parent))
            total = sum(size for _, _, size in found)
            for changed, name, size in found:
                is_old = changed < now - max_age_days * 86400
                if (is_old or total > max_bytes) and changed < now - YOUNG and name not in kept:
                    with _unfinished(parent, place) as inside:
                        os.rename(name, name, src_dir_fd=parent, dst_dir_fd=inside)
                    total -= size
                    count += 1
    except OSError as error:
        raise ResourceError(
            f"{place}: old evidence cannot be removed ({error.strerror}): see to the disk and its rights"
        ) from None
    return count


def _bundles(parent: int) -> Iterator[tuple[float, str, int]]:
    """(when it was made, name, bytes) of each."""
    for name in os.listdir(parent):
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            if not name.startswith("."):
                yield os.fstat(fd).st_mtime, name, sum(entry.size for entry in files.walk(fd, ""))
        finally:
            os.close(fd)


@contextmanager
def _unfinished(parent: int, place: str) -> Iterator[int]:
    """The temporary folder, empty, ours alone; gone afterwards, unless it was renamed."""
    while True:
        try:
            os.mkdir(UNFINISHED, 0o700, dir_fd=parent)
        except FileExistsError:
            pass
        try:
            fd = os.open(UNFINISHED, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            continue
        try:
            with private.locked(fd, fcntl.LOCK_EX, os.path.join(place, UNFINISHED)):
                if not private.is_at(parent, UNFINISHED, fd):  # whoever had it has finished
                    continue
                for inner in workspace.unlink_files(fd):
                    workspace.remove_folder(fd, inner)
                try:
                    yield fd
                finally:
                    if private.is_at(parent, UNFINISHED, fd):
                        workspace.remove_folder(parent, UNFINISHED)
            return
        finally:
            os.close(fd)


def _write(folder: int, name: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
        file.write(data)


def _indexed(changes: Sequence[tuple[str, bytes]], room: int) -> tuple[dict[str, bytes], bytes]:
    """The contents that there is room for, by their place in the bundle, and the index of all."""
    kept: dict[str, bytes] = {}
    entries = []
    for number, (path, content) in enumerate(changes[:CHANGES]):
        is_kept = len(content) <= room
        if is_kept:
            room -= len(content)
            kept[f"changes/{number}"] = content
        digest = hashlib.sha256(content).hexdigest()
        entries.append({"number": number, "path": path, "size": len(content), "sha256": digest, "is_kept": is_kept})
    return kept, _listed(entries, len(changes))


def _listed(items: Iterable[Any], count: int | None = None) -> bytes:
    """As JSON: {"items": those that there is room for, "left_out": how many more there are}."""
    items = list(items)
    count = len(items) if count is None else count
    texts: list[str] = []
    left = PART_BYTES
    for item in items:
        text = json.dumps(to_plain(item))
        left -= len(text) + 2
        if left < 0:
            break
        texts.append(text)
    joined = ",\n".join(texts)
    return f'{{"items": [\n{joined}\n], "left_out": {count - len(texts)}}}\n'.encode()


def _whole(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(to_plain(dict(value)), indent=1)
    return text.encode() + b"\n" if len(text) <= PART_BYTES else b'{"left_out": "too long"}\n'
