"""Plugins are read once, bounded, and hashed from what is kept; what is no plain file is refused; discovery hides nothing."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.errors import PluginError
from sandbox.plugins import files
from sandbox.plugins.discovery import discover
from sandbox.plugins.files import PluginFiles, digest, is_id

SECONDS = 20


def read(folder: Path, plugin_id: str) -> PluginFiles:
    opened = files.open_folder(folder)
    try:
        return files.read(opened, plugin_id)
    finally:
        os.close(opened)


def refused(folder: Path, plugin_id: str) -> str:
    with pytest.raises(PluginError) as caught:
        read(folder, plugin_id)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 500
    return said


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder plugin, "it", with files in folders."""
    folder = tmp_path / "it"
    (folder / "lib" / "deep").mkdir(parents=True)
    (folder / "main.py").write_text("def main(): return 1\n")
    (folder / "lib" / "__init__.py").write_bytes(b"")
    (folder / "lib" / "deep" / "ü b.bin").write_bytes(bytes(range(256)))
    (folder / "-n").write_text("a name like an option")
    return folder


# Reading


def test_a_folder_is_read_as_it_is(plugin: Path) -> None:
    (plugin / "plugin.toml").write_text('name = "It"')
    (plugin / "plugin.sig").write_bytes(b"signature")
    (plugin / "__pycache__").mkdir()
    (plugin / "__pycache__" / "main.cpython-311.pyc").write_bytes(b"x")
    (plugin / ".git").mkdir()
    (plugin / "lib" / ".hidden").symlink_to("/etc/passwd")
    found = read(plugin.parent, "it")
    assert dict(found.files) == {
        "main.py": b"def main(): return 1\n",
        "lib/__init__.py": b"",
        "lib/deep/ü b.bin": bytes(range(256)),
        "-n": b"a name like an option",
    }
    assert (found.id, found.main) == ("it", "main.py")
    assert found.manifest == ("it/plugin.toml", b'name = "It"')
    assert found.signature == b"signature"


def test_a_file_is_read_with_what_lies_beside_it(tmp_path: Path) -> None:
    for name in ("it.py", "it.json", "it.sig", "other.py", "plugin.toml"):
        (tmp_path / name).write_text(name)
    found = read(tmp_path, "it")
    assert dict(found.files) == {"it.py": b"it.py"}
    assert (found.main, found.manifest, found.signature) == ("it.py", ("it.json", b"it.json"), b"it.sig")


def test_manifest_and_signature_of_a_folder_may_lie_beside_it(plugin: Path) -> None:
    (plugin.parent / "it.toml").write_text("")
    (plugin.parent / "it.sig").write_text("s")
    found = read(plugin.parent, "it")
    assert (found.manifest, found.signature) == (("it.toml", b""), b"s")
    (plugin / "plugin.json").write_text("{}")
    assert refused(plugin.parent, "it") == "it/plugin.json is there beside it.toml: keep one of them"
    (plugin / "plugin.json").unlink()
    (plugin / "plugin.sig").write_text("s")
    assert "it/plugin.sig is there beside it.sig" in refused(plugin.parent, "it")


def test_a_package_without_main(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "__init__.py").write_text("")
    assert read(tmp_path, "it").main == "__init__.py"


# The digest


def test_the_digest_can_be_worked_out_by_hand(plugin: Path) -> None:
    (plugin / "plugin.toml").write_text("")
    (plugin / "plugin.sig").write_text("")
    (plugin / "lib" / "plugin.toml").write_text("one of the plugin's own")
    (plugin / ".hidden").write_text("")
    (plugin / "__pycache__").mkdir()
    (plugin / "__pycache__" / "x.pyc").write_text("")
    (plugin.parent / "alone.py").write_text("x = 1\n")
    assert files.__doc__ is not None
    by_file, by_folder = files.__doc__.partition("    sha256sum ID.py")[1:], files.__doc__.partition("    cd ID && ")[1:]
    commands = {"alone": "".join(by_file).split("\n    cd")[0].replace("ID", "alone")}
    commands["it"] = "".join(by_folder).split("\n\n")[0].replace("cd ID", "cd it")
    for plugin_id, command in commands.items():
        done = subprocess.run(["sh", "-c", command], cwd=plugin.parent, capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == read(plugin.parent, plugin_id).sha256, command


def test_the_digest_depends_on_names_and_contents() -> None:
    seen = [
        {"main.py": b"a"},
        {"main.py": b"b"},
        {"__init__.py": b"a"},
        {"main.py": b"a", "x": b""},
        {"main.py": b"a", "x/y": b""},
        {"main.py": b"", "x": b"a"},
    ]
    assert len({digest(each) for each in seen}) == len(seen)
    assert digest({"a": b"1", "b": b"2"}) == digest({"b": b"2", "a": b"1"})


# What is refused


HOSTILE = [
    *("", ".", "..", "../it", "/etc/passwd", "it/", "it/main", ".it", "it.py", "a b", "it\n", "it\0", "-it", "ïd", "it\\"),
    *("\udc80", "a" * 101, "a" * 100_000, "\u202eit", "*", "~", "$HOME"),
]


@pytest.mark.parametrize("plugin_id", HOSTILE, ids=range(len(HOSTILE)))
def test_an_id_is_a_plain_name(plugin: Path, plugin_id: str) -> None:
    assert not is_id(plugin_id)
    assert "is no plugin id: give letters" in refused(plugin.parent, plugin_id)


@pytest.mark.parametrize("plugin_id", ["a", "A-1_b", "1", "_", "a" * 100])
def test_plain_ids(plugin_id: str) -> None:
    assert is_id(plugin_id)


def make_socket(path: Path) -> None:
    with contextmanager(_bound)(path):
        pass


def _bound(path: Path) -> Iterator[None]:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
            yield
    finally:
        os.chdir(here)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "link to a file": (lambda path: path.symlink_to("/etc/passwd"), "is a symbolic link"),
    "link to a file of its own": (lambda path: path.symlink_to("main.py"), "is a symbolic link"),
    "link to a folder": (lambda path: path.symlink_to("/etc"), "is a symbolic link"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
    "FIFO": (os.mkfifo, "is no regular file"),
    "socket": (make_socket, "is no regular file"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["x.py", "lib/x", "plugin.toml", "plugin.sig"])
def test_only_regular_files_make_a_plugin(plugin: Path, kind: str, name: str) -> None:
    make, reason = NO_FILES[kind]
    make(plugin / name)
    assert refused(plugin.parent, "it").startswith(f"it/{name} {reason}")


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["it.py", "it.toml", "it.sig"])
def test_only_a_regular_file_is_a_plugin(tmp_path: Path, kind: str, name: str) -> None:
    make, reason = NO_FILES[kind]
    (tmp_path / "main.py").write_text("")
    if name != "it.py":
        (tmp_path / "it.py").write_text("")
    make(tmp_path / name)
    assert refused(tmp_path, "it").startswith(f"{name} {reason}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_not_opened(plugin: Path) -> None:
    os.mknod(plugin / "x.py", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    assert refused(plugin.parent, "it").startswith("it/x.py is no regular file")


def test_a_link_to_a_plugin_is_none(plugin: Path) -> None:
    (plugin.parent / "link").symlink_to("it")
    assert refused(plugin.parent, "link").startswith("link is a symbolic link")


@pytest.mark.parametrize("name", [b"line\nfeed", b"\xff", b"esc\x1b[2J", b"back\\slash", "\u202e".encode()], ids=range(5))
def test_names_that_would_not_hash_or_show_as_they_are(plugin: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(plugin / "lib") + b"/" + name)).write_text("")
    assert "has a name that cannot be shown or hashed safely" in refused(plugin.parent, "it")


def test_two_of_one_id(plugin: Path) -> None:
    (plugin.parent / "it.py").write_text("")
    said = "it is the id of both it.py and it/: rename or remove one of them"
    assert refused(plugin.parent, "it") == said
    assert [(found.id, str(found.error)) for found in discover(plugin.parent)] == [("it", said)]


def test_what_is_not_there(plugin: Path) -> None:
    assert "there is neither no.py nor no/ with a main.py" in refused(plugin.parent, "no")
    (plugin / "main.py").unlink()
    (plugin / "plugin.toml").write_text("")
    assert refused(plugin.parent, "it") == "it/ has neither main.py nor __init__.py: add one"
    with pytest.raises(PluginError, match=r"gone cannot be opened as a plugin folder \(No such file"):
        discover(plugin.parent / "gone")
    with pytest.raises(PluginError, match=r"a\\x00b cannot be opened as a plugin folder"):
        discover("a\0b")


# Bounds


def test_bounds_are_met_exactly(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(plugin.parent, "it")
    size = sum(map(len, whole.files.values()))
    monkeypatch.setattr(files, "MOST_BYTES", size)
    monkeypatch.setattr(files, "MOST_FILES", len(whole.files))
    monkeypatch.setattr(files, "MOST_DEPTH", 2)
    assert read(plugin.parent, "it") == whole
    monkeypatch.setattr(files, "MOST_BYTES", size - 1)
    assert "makes the plugin larger than" in refused(plugin.parent, "it")
    monkeypatch.setattr(files, "MOST_BYTES", size)
    monkeypatch.setattr(files, "MOST_FILES", len(whole.files) - 1)
    assert "is one of more than 3 files" in refused(plugin.parent, "it")
    monkeypatch.setattr(files, "MOST_FILES", len(whole.files))
    monkeypatch.setattr(files, "MOST_DEPTH", 1)
    assert refused(plugin.parent, "it").startswith("it/lib/deep lies deeper than 1 folders")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.with_name(f".{path.name}").touch()])
def test_folders_and_hidden_names_are_counted_too(plugin: Path, make: Callable[[Path], None]) -> None:
    for number in range(files.MOST_FILES + 1):
        make(plugin / f"n{number}")
    assert f"is one of more than {files.MOST_FILES:,} " in refused(plugin.parent, "it")


def test_a_huge_hole_is_not_read(plugin: Path) -> None:
    with open(plugin / "hole", "wb") as file:
        file.truncate(1 << 40)
    assert refused(plugin.parent, "it") == "it/hole makes the plugin larger than 64 MB: make it smaller"


# Swaps


@contextmanager
def swapping(swap: Callable[[], None]) -> Iterator[None]:
    """`swap` again and again in a thread."""
    over = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not over.is_set():
                swap()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(SECONDS)
    assert not failures


@pytest.mark.parametrize("target", ["file", "folder"])
def test_what_is_hashed_is_what_is_kept(plugin: Path, tmp_path: Path, target: str) -> None:
    """A file or folder of the plugin turns into a link out of it, into other content, and back."""
    secret = tmp_path / "outside"
    secret.mkdir()
    (secret / "main.py").write_text("secret")
    (secret / "x.py").write_text("secret")
    place = plugin / "main.py" if target == "file" else plugin / "sub"
    spare = tmp_path / "spare"
    contents = [b"one", b"two" * 1000]

    def swap() -> None:
        for content in contents:
            if target == "file":
                spare.write_bytes(content)
                os.rename(spare, place)
                os.symlink(secret / "main.py", spare)
                os.rename(spare, place)
            else:
                place.mkdir()
                (place / "x.py").write_bytes(content)
                os.rename(place, spare)
                os.symlink(secret, place)
                os.unlink(place)
                (spare / "x.py").unlink()
                spare.rmdir()

    whole = {content[:size] for content in contents for size in (0, len(content))}
    kept: set[bytes] = set()
    reasons: set[str] = set()
    rounds = 0
    with swapping(swap):
        while rounds < 300 or not (kept & whole - {b""} and reasons):  # until both have been met
            rounds += 1
            try:
                found = read(plugin.parent, "it")
            except PluginError as error:
                reasons.add(str(error).partition(" ")[2])
                continue
            assert found.sha256 == digest(found.files)
            kept |= set(found.files.values())
    assert kept <= whole | {b"def main(): return 1\n", b"", bytes(range(256)), b"a name like an option"}
    met = (
        "is a symbolic link",
        "has gone",
        "lies in another file system",
        "is no regular file",
    )  # the last where a link was seen
    assert all(reason.startswith(met) for reason in reasons), reasons


# Discovery


def test_a_broken_plugin_hides_no_other(plugin: Path) -> None:
    folder = plugin.parent
    (folder / "good.py").write_text("this need not be Python")
    (folder / "good.toml").write_text('name = "Good"\nversion = "1"')
    (folder / "bad.py").write_text("")
    (folder / "bad.json").write_text("{")
    (folder / "link.py").symlink_to("good.py")
    (folder / "folder link").symlink_to("it")
    (folder / "odd name.py").write_text("")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b.py")).write_text("")
    (folder / "empty").mkdir()
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "plugin.toml").write_text("")
    for name in (".hidden.py", "README.md", "good.sig"):
        (folder / name).write_text("")
    (folder / "__pycache__").mkdir()
    found = {each.id: each for each in discover(folder)}
    assert list(found) == sorted(found)
    assert set(found) == {"good", "bad", "link", "folder link", "odd name", "\udcff\x1b", "unfinished", "it"}
    assert [each.id for each in found.values() if each.error is None] == ["good", "it"]
    assert all((each.error is None) != (each.manifest is None) for each in found.values())
    assert all(str(each.error).isprintable() for each in found.values())
    good = found["good"]
    assert good.manifest is not None
    assert (good.path, good.manifest.name, good.manifest.version) == (str(folder / "good.py"), "Good", "1")
    assert "symbolic link" in str(found["link"].error)
    assert str(found["bad"].error).startswith("bad.json, line 1: this is not valid JSON")


def test_the_sha256_of_a_file_is_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "it.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    line = f"{hashlib.sha256((tmp_path / 'it.py').read_bytes()).hexdigest()}  it.py\n"
    assert read(tmp_path, "it").sha256 == hashlib.sha256(line.encode()).hexdigest()
