"""The caches and folders on the host: what others could have written is not believed, and no damage is an error.

Folders are real ones, made in a mount namespace of the test's own as root or as another user: nothing of this machine's
own caches is read or written.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import state
from sandbox.ns import syscalls as sc

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts, and becomes another user")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the caches."""
    folder = tmp_path / "cache"
    folder.mkdir(0o700)
    monkeypatch.setattr(state, "folder", lambda kind: str(folder))
    return folder


# The cache ------------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(here: Path) -> None:
    cache = state.Cache("kind")
    contents = {"empty": b"", "text": b"text\n" * 3, "every byte": bytes(range(256)) * 100}
    for name, content in contents.items():
        assert cache.read(name) is None
        cache.write(name, content)
    assert {name: state.Cache("kind").read(name) for name in contents} == contents
    assert {stat.S_IMODE(file.stat().st_mode) for file in here.iterdir()} == {0o600}
    assert len(list(here.iterdir())) == 3
    cache.write("text", b"new")
    assert cache.read("text") == b"new"


def test_kinds_and_names_and_keys_are_apart(here: Path) -> None:
    cache = state.Cache("kind")
    cache.write("a", b"content", b"key")
    assert cache.read("a", b"key") == b"content"
    assert cache.read("a") is cache.read("a", b"ke") is cache.read("a", b"key\n") is cache.read("b", b"key") is None
    assert state.Cache("other").read("a", b"key") is None
    cache.write("a", b"second", b"another")  # one name, two keys: the last one stays
    assert (cache.read("a", b"key"), cache.read("a", b"another")) == (None, b"second")
    cache.write("a", b"end", b"key\nmore")  # where the key ends is part of the file
    assert cache.read("a", b"key") is None


def test_another_version_starts_anew(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = state.Cache("kind")
    cache.write("a", b"content")
    monkeypatch.setattr(state, "__version__", "9.9")
    assert cache.read("a") is None
    monkeypatch.undo()


def test_removing_and_clearing(here: Path) -> None:
    cache, other = state.Cache("kind"), state.Cache("other")
    for name in ("a", "b", "c"):
        cache.write(name, b"x")
        other.write(name, b"y")
    cache.remove("a")
    cache.remove("never there")
    assert [cache.read(name) for name in ("a", "b", "c")] == [None, b"x", b"x"]
    cache.clear()
    assert [cache.read(name) for name in ("a", "b", "c")] == [None] * 3
    assert [other.read(name) for name in ("a", "b", "c")] == [b"y"] * 3
    cache.write("a", b"again")
    assert cache.read("a") == b"again"


def _flip_a_bit(place: int) -> Callable[[Path], object]:
    def spoil(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)

    return spoil


def _replace_by_link(file: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


def _replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _replace_by_socket(file: Path) -> None:
    file.unlink()
    os.mknod(file, stat.S_IFSOCK | 0o600)


SPOILERS: dict[str, Callable[[Path], object]] = {
    "first bit": _flip_a_bit(0),
    "bit of the key": _flip_a_bit(30),
    "last bit": _flip_a_bit(-1),
    "link": _replace_by_link,
    "fifo": _replace_by_fifo,
    "socket": _replace_by_socket,
    "writable by the group": lambda file: file.chmod(0o620),
    "writable by all": lambda file: file.chmod(0o602),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "larger than any": lambda file: os.truncate(file, state.CACHE_FILE_BYTES + 1),
    "another's content": lambda file: file.write_bytes(file.with_name("kind-b").read_bytes()),
    "unfinished": lambda file: file.rename(file.with_name("kind-a.new")).write_bytes(b"half"),
    "a fifo for the new one": lambda file: _replace_by_fifo(file.rename(file.with_name("kind-a.new"))),
}
if os.geteuid() == 0:  # only root gives files away
    SPOILERS["of another user"] = lambda file: os.chown(file, NOBODY, -1)


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_spoilt_file_is_ignored_and_replaced(here: Path, spoil: Callable[[Path], object]) -> None:
    cache = state.Cache("kind")
    content = b"content of a file\n" * 10
    cache.write("a", content, b"the key of it")
    cache.write("b", content, b"the key of it")
    file = here / "kind-a"
    assert cache.read("a", b"the key of it") == content
    spoil(file)
    open_files = len(os.listdir("/proc/self/fd"))
    assert cache.read("a", b"the key of it") is None
    cache.write("a", content, b"the key of it")
    assert cache.read("a", b"the key of it") == content
    assert stat.S_ISREG(file.lstat().st_mode)
    assert stat.S_IMODE(file.lstat().st_mode) == 0o600
    assert file.lstat().st_uid == os.getuid()
    assert not (here / "kind-a.new").exists()
    assert len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize("name", ["kind-a", "kind-a.new"])
def test_a_folder_in_the_place_of_a_file_is_no_error(here: Path, name: str) -> None:
    (here / name).mkdir()
    cache = state.Cache("kind")
    open_files = len(os.listdir("/proc/self/fd"))
    cache.write("a", b"content")
    assert cache.read("a") is None
    cache.remove("a")
    cache.clear()
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_folder_that_others_can_write_is_not_used(here: Path) -> None:
    cache = state.Cache("kind")
    cache.write("a", b"content")
    for mode in (0o770, 0o707, 0o777, 0o1777):
        here.chmod(mode)
        cache.write("b", b"content")
        cache.remove("a")
        cache.clear()
        assert cache.read("a") is None
        assert [file.name for file in here.iterdir()] == ["kind-a"]
    here.chmod(0o755)
    assert cache.read("a") == b"content"


def test_a_link_to_a_folder_is_not_used(here: Path, tmp_path: Path) -> None:
    cache = state.Cache("kind")
    cache.write("a", b"content")
    here.rename(tmp_path / "moved")
    here.symlink_to("moved")
    assert cache.read("a") is None
    cache.write("b", b"content")
    assert [file.name for file in here.iterdir()] == ["kind-a"]


@needs_root
def test_a_folder_of_another_user_is_not_used(here: Path) -> None:
    cache = state.Cache("kind")
    cache.write("a", b"content")
    os.chown(here, NOBODY, -1)
    assert cache.read("a") is None
    cache.write("b", b"content")
    assert [file.name for file in here.iterdir()] == ["kind-a"]


def _all_of(cache: state.Cache) -> list[bytes | None]:
    cache.write("a", b"content")
    found = cache.read("a")
    cache.remove("a")
    cache.clear()
    return [found, cache.read("b")]


def test_a_folder_that_is_gone_is_no_error(here: Path) -> None:
    cache = state.Cache("kind")
    here.rmdir()
    assert _all_of(cache) == [None, None]
    here.write_text("a file in its place")
    assert _all_of(cache) == [None, None]


def test_no_folder_at_all_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: str) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(state, "folder", refuse)
    assert _all_of(state.Cache("kind")) == [None, None]


def test_a_killed_writer_leaves_nothing_that_stays(here: Path) -> None:
    """Readers and writers at once, and writers killed at any moment: whoever reads gets whole files."""
    sizes = range(30_000, 90_000, 6_000)
    writers = []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    for size in sizes:
                        state.Cache("kind").write("a", bytes([number]) * size)
            finally:
                os._exit(1)
        writers.append(pid)
    cache = state.Cache("kind")
    seen: set[int] = set()
    reads = 0
    while reads < 500 or not seen:
        content = cache.read("a")
        reads += 1
        if content is not None:
            assert len(set(content)) == 1
            assert len(content) in sizes
            seen.add(content[0])
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert {file.name for file in here.iterdir()} <= {"kind-a", "kind-a.new"}
    cache.write("a", b"after")
    assert cache.read("a") == b"after"
    assert [file.name for file in here.iterdir()] == ["kind-a"]


# The folders ----------------------------------------------------------------------------------------------------------


def isolated(action: Callable[[], Any], uid: int) -> Any:
    """What `action` returns (as JSON) in a child with empty /tmp, /run, /var/cache and /var/lib of its own, as `uid`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sc.unshare(sc.CLONE_NEWNS)
            sc.mount("none", "/", None, sc.MS_REC | sc.MS_PRIVATE)
            for target in ("/tmp", "/run", "/var/cache", "/var/lib"):
                sc.mount("tmpfs", target, "tmpfs", 0, "mode=1777" if target == "/tmp" else "mode=755")
            os.environ.clear()
            home = "/tmp/home"
            os.mkdir(home)
            os.chown(home, uid, uid)
            os.environ["HOME"] = home
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.umask(0o022)
            os.chdir(home)
            text = json.dumps(action())
        except BaseException:
            text = json.dumps({"error": traceback.format_exc()})
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        reply = json.loads(file.read())
    os.waitpid(pid, 0)
    assert not (isinstance(reply, dict) and "error" in reply), reply["error"]
    return reply


@needs_root
def test_records_count_also_while_the_disk_is_read_only() -> None:
    """As after an error of it, for which ext4 has errors=remount-ro: what is quarantined stays so."""

    def before_and_after() -> list[str]:
        os.chmod("/var/lib", 0o755)
        found = [state.folder("lib")]
        subprocess.run(["mount", "-o", "remount,ro", "/var/lib"], check=True)
        with pytest.raises(OSError, match="Read-only"):
            Path(found[0], "new").touch()
        return [*found, state.folder("lib")]

    assert isolated(before_and_after, 0) == ["/var/lib/psie"] * 2


@needs_root
def test_records_of_a_user_count_too_while_their_disk_is_read_only() -> None:
    def before_and_after() -> list[str]:
        found = [state.folder("lib")]
        os.chmod("/tmp/home/.local/state", 0o500)
        found += [state.folder("lib"), state.folder("cache")]
        os.chmod("/tmp/home/.local/state", 0o700)
        return found

    assert isolated(before_and_after, NOBODY) == ["/tmp/home/.local/state/psie"] * 2 + ["/tmp/home/.cache/psie"]


def folders() -> dict[str, str]:
    return {kind: state.folder(kind) for kind in ("run", "cache", "lib")}


def owner_and_mode(path: str) -> list[object]:
    found = os.lstat(path)
    return [found.st_uid, oct(stat.S_IMODE(found.st_mode))]


def refusal(kind: str) -> str:
    try:
        return f"no refusal: {state.folder(kind)}"
    except PermissionError as error:
        return str(error)


@needs_root
def test_folders_of_root() -> None:
    def action() -> list[Any]:
        for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
            os.environ[name] = "/tmp/home"  # a user's, kept by sudo
        made = folders()
        return [made, [owner_and_mode(path) for path in made.values()], folders() == made]

    made, owners, again = isolated(action, 0)
    assert made == {"run": "/run/psie", "cache": "/var/cache/psie", "lib": "/var/lib/psie"}
    assert owners == [[0, "0o711"]] * 3
    assert again is True


@needs_root
def test_folders_of_a_user() -> None:
    def action() -> list[Any]:
        plain = folders()
        for kind, name in (("run", "XDG_RUNTIME_DIR"), ("cache", "XDG_CACHE_HOME"), ("lib", "XDG_STATE_HOME")):
            os.environ[name] = f"/tmp/home/deep/{kind}"
        return [plain, folders(), [owner_and_mode(path) for path in (*plain.values(), *folders().values())]]

    plain, chosen, owners = isolated(action, NOBODY)
    assert plain == {
        "run": f"/tmp/psie-{NOBODY}-run",
        "cache": "/tmp/home/.cache/psie",
        "lib": "/tmp/home/.local/state/psie",
    }
    assert chosen == {kind: f"/tmp/home/deep/{kind}/psie" for kind in plain}
    assert owners == [[NOBODY, "0o711"]] * 6


@needs_root
@pytest.mark.parametrize(
    "base", ["", "relative", "./relative/deep", "/var/cache", "/nowhere/at/all", "/tmp/home/file", "/tmp/home/read-only"]
)
def test_bases_that_cannot_be_used(base: str) -> None:
    def action() -> dict[str, str]:
        Path("file").write_text("")
        os.mkdir("read-only", 0o500)
        os.environ["HOME"] = "/nowhere"
        os.environ["XDG_CACHE_HOME"] = base
        signal.alarm(10)
        return {"cache": state.folder("cache")}

    assert isolated(action, NOBODY) == {"cache": f"/tmp/psie-{NOBODY}-cache"}


@needs_root
@pytest.mark.parametrize("place", ["folder", "link", "dangling link"])
def test_a_folder_of_another_user_is_refused_with_the_mend(place: str) -> None:
    """Everybody can make names in /tmp: whoever was there first must not own our state."""

    def prepare_and_try() -> list[Any]:
        path = f"/tmp/psie-{NOBODY}-run"
        if place == "folder":
            os.mkdir(path, 0o777)
            os.chmod(path, 0o777)
        else:
            os.symlink("/var/cache" if place == "link" else "/var/cache/made", path)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return [refusal("run"), os.path.exists("/var/cache/made")]

    message, made = isolated(prepare_and_try, 0)
    assert message.startswith(f"/tmp/psie-{NOBODY}-run belongs to another user: remove it, or set XDG_RUNTIME_DIR")
    assert made is False


@needs_root
def test_a_cache_folder_of_another_user_is_only_no_cache() -> None:
    def action() -> list[Any]:
        os.mkdir(f"/tmp/psie-{NOBODY}-cache", 0o777)
        os.chmod(f"/tmp/psie-{NOBODY}-cache", 0o777)
        os.environ["HOME"] = "/nowhere"
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return [refusal("cache"), _all_of(state.Cache("kind")), os.listdir(f"/tmp/psie-{NOBODY}-cache")]

    message, cached, files = isolated(action, 0)
    assert "belongs to another user" in message
    assert (cached, files) == ([None, None], [])


@needs_root
def test_a_folder_that_others_could_write_is_closed_to_them() -> None:
    def action() -> list[Any]:
        path = state.folder("lib")
        os.chmod(path, 0o777)
        return [state.folder("lib") == path, *owner_and_mode(path)]

    assert isolated(action, NOBODY) == [True, NOBODY, "0o711"]


@needs_root
def test_a_read_only_cache_is_read_and_never_an_error() -> None:
    def action() -> list[Any]:
        cache = state.Cache("kind")
        cache.write("a", b"content")
        os.chmod(cache.folder or "", 0o500)
        cache = state.Cache("kind")
        cache.write("a", b"new")
        cache.write("b", b"new")
        cache.remove("a")
        cache.clear()
        return [cache.read("a") == b"content", cache.read("b")]

    assert isolated(action, NOBODY) == [True, None]


@needs_root
def test_a_read_only_disk_is_no_error() -> None:
    def action() -> list[Any]:
        os.environ["HOME"] = "/var/cache"
        os.environ.pop("XDG_CACHE_HOME", None)
        for folder in ("/var/cache", "/tmp"):
            sc.mount("tmpfs", folder, "tmpfs", sc.MS_RDONLY, None)
        return _all_of(state.Cache("kind"))

    assert isolated(action, 0) == [None, None]


@needs_root
def test_a_full_disk_is_no_error() -> None:
    def action() -> list[Any]:
        sc.mount("tmpfs", "/var/cache", "tmpfs", 0, "size=64k,mode=755")
        cache = state.Cache("kind")
        cache.write("a", b"content")
        cache.write("a", bytes(200_000))
        cache.write("b", bytes(200_000))
        return [cache.read("a") == b"content", cache.read("b")]

    assert isolated(action, 0) == [True, None]


def test_the_module_is_light() -> None:
    """It is on the start path of the command, and of every hit of the cache of filters."""
    heavy = "ctypes tomllib hashlib re enum typing subprocess functools contextlib tempfile json pathlib"
    code = f"import sys\nfrom sandbox import state\nprint(*set({heavy!r}.split()) & set(sys.modules))"
    command = [sys.executable, "-S", "-c", code]
    run = subprocess.run(command, capture_output=True, check=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.stdout.split() == []
