"""Signatures: what a trusted key has signed counts, exactly as it was signed, and nothing else does."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from sandbox.errors import ManifestError, PluginError
from sandbox.plugins import files, manifest, signing
from sandbox.plugins.files import PluginFiles, digest
from sandbox.plugins.signing import Signature, check, check_sha256, make_key, sign, text_of, write_signature

NOBODY = 65534
UNFIT = "no trusted key has signed it as it is"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


class Place:
    """A plugin folder with one signed plugin, "it", its key, and a folder where that is trusted."""

    def __init__(self, folder: Path) -> None:
        self.plugins, self.trusted, self.key = folder / "plugins", folder / "trusted", folder / "author"
        (self.plugins / "it").mkdir(parents=True)
        self.trusted.mkdir(mode=0o755)
        self.write("main.py", "def main(): return 1\n")
        self.write("plugin.toml", 'version = "1.0"\n')
        self.public = make_key(self.key)
        self.trust("author", self.public)
        self.sign()

    def write(self, name: str, text: str) -> None:
        (self.plugins / "it" / name).write_text(text)

    def trust(self, name: str, content: str | bytes) -> Path:
        path = self.trusted / f"{name}.pub"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(0o644)
        return path

    def read(self, plugin_id: str = "it") -> PluginFiles:
        folder = files.open_folder(self.plugins)
        try:
            return files.read(folder, plugin_id)
        finally:
            os.close(folder)

    def sign(self, plugin_id: str = "it") -> str:
        plugin = self.read(plugin_id)
        return write_signature(self.plugins, plugin, sign(plugin, self.key))

    def check(self, plugin_id: str = "it") -> Signature:
        return check(self.read(plugin_id), self.trusted)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# Signed as it is


def test_what_is_signed_counts(place: Place) -> None:
    assert place.check() == Signature("author", True)
    place.trust("another", base64.b64encode(bytes(range(32))))
    assert place.check() == Signature("author", True)


def test_the_signed_text_is_as_documented(place: Place) -> None:
    plugin = place.read()
    assert plugin.manifest is not None
    lines = text_of(plugin).decode().splitlines()
    digest_of_manifest = hashlib.sha256(plugin.manifest[1]).hexdigest()
    assert lines == [
        "psie plugin signature 1",
        "id: it",
        "version: 1.0",
        f"manifest: {digest_of_manifest}",
        f"files: {digest(plugin.files)}",
    ]
    (place.plugins / "it" / "plugin.toml").unlink()
    assert text_of(place.read()).decode().splitlines()[2:4] == ["version: ", "manifest: none"]


def test_openssl_agrees(place: Place, tmp_path: Path) -> None:
    """The signature is plain Ed25519 over that text."""
    plugin = place.read()
    assert plugin.signature is not None
    (tmp_path / "text").write_bytes(text_of(plugin))
    (tmp_path / "signature").write_bytes(base64.b64decode(plugin.signature))
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-inkey", str(place.key), "-in", "text", "-sigfile", "signature"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_a_key_in_pem_is_trusted_as_well(place: Place) -> None:
    key = signing._private_key(str(place.key)).public_key()
    place.trust("author", key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert place.check() == Signature("author", True)


def test_the_default_folder_is_in_the_state_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.state.folder", lambda kind: str(place.trusted.parent / kind))
    found = check(place.read())
    assert not found.ok
    assert "lib/trusted-keys is to be the folder of trusted keys, but No such file or directory: make it" in found.reason
    (place.trusted.parent / "lib").mkdir()
    place.trusted.rename(place.trusted.parent / "lib" / "trusted-keys")
    assert check(place.read()) == Signature("author", True)


# Changed since, or another's


def add_file(place: Place) -> None:
    place.write("json.py", "# in front of the library's")


def remove_manifest(place: Place) -> None:
    (place.plugins / "it" / "plugin.toml").unlink()


def manifest_of_another_kind(place: Place) -> None:
    remove_manifest(place)
    place.write("plugin.json", '{"version": "1.0"}')


CHANGES: list[Callable[[Place], object]] = [
    lambda place: place.write("main.py", "def main(): return 2\n"),
    lambda place: place.write("main.py", "def main(): return 1\n\n"),
    lambda place: place.write("plugin.toml", 'version = "1.0"\n# a comment\n'),
    lambda place: place.write("plugin.toml", 'version = "1.0"\n[limits]\nmax_memory_mb = 64\n'),
    lambda place: place.write("plugin.toml", 'version = "1.1"\n'),
    add_file,
    remove_manifest,
    manifest_of_another_kind,
    lambda place: (place.plugins / "it" / "main.py").rename(place.plugins / "it" / "__init__.py"),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_any_change_undoes_it_and_signing_again_mends_it(place: Place, change: Callable[[Place], object]) -> None:
    change(place)
    found = place.check()
    assert (found.ok, found.key) == (False, None)
    assert found.reason.startswith(UNFIT)
    place.sign()
    assert place.check().ok


def test_the_signature_of_another_plugin(place: Place) -> None:
    """The same files and manifest under another id."""
    shutil.copytree(place.plugins / "it", place.plugins / "other")
    assert place.read("other").sha256 == place.read().sha256
    assert place.check("other").reason.startswith(UNFIT)


def test_the_signature_of_an_older_version(place: Place) -> None:
    old = (place.plugins / "it" / "plugin.sig").read_bytes()
    place.write("plugin.toml", 'version = "2.0"\n')
    place.sign()
    assert place.check().ok
    (place.plugins / "it" / "plugin.sig").write_bytes(old)
    assert place.check().reason.startswith(UNFIT)


def test_a_file_moved_into_another_by_name_is_a_change(place: Place) -> None:
    place.write("a", "1")
    place.write("b", "2")
    place.sign()
    place.write("a", "2")
    place.write("b", "1")
    assert place.check().reason.startswith(UNFIT)


def test_an_unknown_key(place: Place) -> None:
    (place.trusted / "author.pub").unlink()
    assert place.check().reason.startswith(UNFIT)
    place.trust("other", make_key(place.key.with_name("other")))
    assert place.check().reason.startswith(UNFIT)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"A" * 88, b"AAAA" * 100, base64.b64encode(bytes(64)), b"\xff\0", b"A" * 10_000]
)
def test_a_signature_that_is_none(place: Place, content: bytes) -> None:
    (place.plugins / "it" / "plugin.sig").write_bytes(content)
    found = place.check()
    assert not found.ok
    assert found.reason.startswith((UNFIT, "its signature is not 64 bytes in base64"))


def test_every_flipped_bit_is_seen(place: Place) -> None:
    plugin = place.read()
    assert plugin.signature is not None
    good = base64.b64decode(plugin.signature)
    for index in range(len(good) * 8):
        bad = bytearray(good)
        bad[index // 8] ^= 1 << index % 8
        assert not check(dataclasses.replace(plugin, signature=base64.b64encode(bad)), place.trusted).ok
    assert check(plugin, place.trusted).ok


def test_no_signature(place: Place) -> None:
    (place.plugins / "it" / "plugin.sig").unlink()
    assert place.check() == Signature(None, False, "it is not signed: sign it with psie plugins sign")


def test_a_wrong_manifest_is_neither_signed_nor_checked(place: Place) -> None:
    place.write("plugin.toml", "version = 1")
    with pytest.raises(ManifestError, match="line 1: version is 1"):
        place.sign()
    with pytest.raises(ManifestError, match="line 1: version is 1"):
        place.check()


# Keys that cannot be trusted


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_can_change(place: Place, mode: int) -> None:
    place.trusted.chmod(mode)
    assert "trusted can be changed by others, so no key is trusted there: chmod go-w it" in place.check().reason
    assert not place.check().ok


@pytest.mark.parametrize("mode", [0o775, 0o777])
def test_a_folder_above_that_others_can_change(place: Place, tmp_path: Path, mode: int) -> None:
    inner = tmp_path / "open" / "inner"
    inner.mkdir(parents=True)
    shutil.copytree(place.trusted, inner / "trusted")
    assert check(place.read(), inner / "trusted").ok
    (tmp_path / "open").chmod(mode)
    assert "open can be changed by others" in check(place.read(), inner / "trusted").reason
    (tmp_path / "open").chmod(0o1777)  # as /tmp: nobody else can rename what is in it
    assert check(place.read(), inner / "trusted").ok
    (tmp_path / "link").symlink_to(inner)  # what a link leads to is looked at, not what is above the link
    assert check(place.read(), tmp_path / "link" / "trusted").ok
    (tmp_path / "open").chmod(mode)
    assert not check(place.read(), tmp_path / "link" / "trusted").ok


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_key_that_others_can_change(place: Place, mode: int) -> None:
    (place.trusted / "author.pub").chmod(mode)
    found = place.check()
    assert not found.ok
    assert "author.pub can be changed by others, so no key is trusted there" in found.reason


@needs_root
def test_what_belongs_to_another_user(place: Place) -> None:
    os.chown(place.trusted / "author.pub", NOBODY, NOBODY)
    assert "author.pub belongs to another user" in place.check().reason
    os.chown(place.trusted / "author.pub", 0, 0)
    assert place.check().ok
    os.chown(place.trusted, NOBODY, NOBODY)
    assert "trusted belongs to another user" in place.check().reason
    os.chown(place.trusted, 0, 0)
    os.chown(place.trusted.parent, NOBODY, NOBODY)
    assert "belongs to another user" in place.check().reason


def pem_of_another_kind(place: Place) -> None:
    key = X25519PrivateKey.generate().public_key()
    place.trust("author", key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def replace(make: Callable[[Path], object]) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.trusted / "author.pub"
        path.rename(place.trusted / "moved")
        make(path)

    return change


BAD_KEYS: list[tuple[Callable[[Place], object], str]] = [
    (lambda place: place.trust("author", b""), "is no Ed25519 public key"),
    (lambda place: place.trust("author", b"ssh-ed25519 AAAA"), "is no Ed25519 public key"),
    (lambda place: place.trust("author", base64.b64encode(bytes(31))), "is no Ed25519 public key"),
    (
        lambda place: place.trust("author", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
        "is no Ed25519 public key",
    ),
    (lambda place: place.trust("author", place.key.read_bytes()), "is no Ed25519 public key"),
    (pem_of_another_kind, "is no Ed25519 public key"),
    (replace(lambda path: path.symlink_to("moved")), "is a symbolic link"),
    (replace(os.mkfifo), "is no regular file"),
    (replace(lambda path: path.mkdir()), "is no regular file"),
    (replace(lambda path: (path.with_name("moved")).rename(path.with_name("a\x1bb.pub"))), "a\\x1bb.pub has no plain name"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_KEYS, ids=range(len(BAD_KEYS)))
def test_a_bad_key_is_passed_over_and_told(place: Place, change: Callable[[Place], object], reason: str) -> None:
    change(place)
    found = place.check()
    assert not found.ok
    assert reason in found.reason
    assert found.reason.isprintable()
    place.trust("good", place.public)
    assert place.check() == Signature("good", True)


def test_only_names_that_end_in_pub_are_keys(place: Place) -> None:
    (place.trusted / "author.pub").rename(place.trusted / "author.txt")
    assert place.check().reason.startswith(UNFIT)


# Making keys and signing


def test_a_new_key_is_the_makers_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        public = make_key(tmp_path / "key")
    finally:
        os.umask(old)
    found = (tmp_path / "key").stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_nlink == 1
    assert len(base64.b64decode(public)) == 32
    assert signing._private_key(str(tmp_path / "key")).public_key().public_bytes_raw() == base64.b64decode(public)
    assert os.listdir(tmp_path) == ["key"]


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("old"), lambda path: path.symlink_to("nowhere"), lambda path: path.mkdir()]
)
def test_a_key_is_never_overwritten(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "key")
    before = os.lstat(tmp_path / "key")
    with pytest.raises(PluginError, match="key is there already: give another name"):
        make_key(tmp_path / "key")
    assert os.lstat(tmp_path / "key") == before
    assert os.listdir(tmp_path) == ["key"]


@pytest.mark.parametrize("path", ["gone/key", "file/key", "a\0b", ""])
def test_where_no_key_can_be(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginError) as caught:
        make_key(path)
    assert str(caught.value).isprintable()
    assert os.listdir(tmp_path) == ["file"]


def pem(key: Ed25519PrivateKey | X25519PrivateKey, password: bytes | None = None) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        pem(X25519PrivateKey.generate()),
        pem(Ed25519PrivateKey.generate(), b"password"),
        b"-----BEGIN PRIVATE KEY-----",
    ],
    ids=range(5),
)
def test_a_private_key_that_is_none(place: Place, content: bytes) -> None:
    place.key.write_bytes(content)
    with pytest.raises(PluginError, match="is no Ed25519 private key in a PEM file without a password"):
        place.sign()
    assert place.check().ok


def test_a_private_key_that_others_can_read(place: Place) -> None:
    for mode in (0o640, 0o604, 0o660):
        place.key.chmod(mode)
        with pytest.raises(PluginError, match="can be read by others, so it is no secret: chmod 600 it"):
            place.sign()
    place.key.unlink()
    with pytest.raises(PluginError, match=r"author cannot be read \(No such file or directory\): check the path"):
        place.sign()
    os.mkfifo(place.key, 0o600)
    with pytest.raises(PluginError, match="is no Ed25519 private key"):
        place.sign()


def test_where_a_signature_is_put(place: Place) -> None:
    assert place.sign() == "it/plugin.sig"
    (place.plugins / "alone.py").write_text("")
    assert place.sign("alone") == "alone.sig"
    assert place.check("alone").ok
    (place.plugins / "it" / "plugin.sig").rename(place.plugins / "it.sig")
    assert place.sign() == "it.sig"
    assert place.check().ok
    assert not (place.plugins / "it" / "plugin.sig").exists()


def test_a_signature_is_not_written_through_a_link(place: Place, tmp_path: Path) -> None:
    """Between reading and signing the plugin puts a link in its place."""
    plugin = place.read()
    victim = tmp_path / "victim"
    victim.write_text("victim")
    (place.plugins / "it" / "plugin.sig").unlink()
    (place.plugins / "it" / "plugin.sig").symlink_to(victim)
    write_signature(place.plugins, plugin, sign(plugin, place.key))
    assert victim.read_text() == "victim"
    assert place.check().ok
    (place.plugins / "it").rename(tmp_path / "moved")
    (place.plugins / "it").symlink_to(tmp_path / "moved")
    with pytest.raises(PluginError, match="is a symbolic link"):
        write_signature(place.plugins, plugin, b"")


SIGNER = """
import os, sys
from sandbox.plugins import files, signing
folder = files.open_folder(sys.argv[1])
plugin = files.read(folder, "it")
print("ready", flush=True)
while True:
    signing.write_signature(sys.argv[1], plugin, signing.sign(plugin, sys.argv[2]))
"""


def test_whoever_is_killed_while_signing_leaves_nothing_half_done(place: Place) -> None:
    names = {"it/main.py", "it/plugin.toml", "it/plugin.sig"}
    for round_ in range(15):
        command = [sys.executable, "-c", SIGNER, str(place.plugins), str(place.key)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            os.sched_yield()
            for _ in range(round_ * 20):
                (place.plugins / "it").stat()
            process.send_signal(signal.SIGKILL)
        left = {str(path.relative_to(place.plugins)) for path in place.plugins.rglob("*") if not path.is_dir()}
        assert left in (names, names - {"it/plugin.sig"})
        assert place.check().ok or "it/plugin.sig" not in left


# Digests in the manifest


def with_digests(contents: dict[str, bytes], digests: dict[str, str]) -> tuple[PluginFiles, manifest.Manifest]:
    return PluginFiles("it", contents, digest(contents)), manifest.Manifest("it", sha256=digests)


def test_digests_in_the_manifest_are_held_against_the_files() -> None:
    contents = {"main.py": b"a", "lib/x": b"b"}
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    check_sha256(*with_digests(contents, digests))
    check_sha256(*with_digests(contents, {}))
    with pytest.raises(PluginError, match=r"^lib/x is not the file whose sha256 is in the manifest: "):
        check_sha256(*with_digests({**contents, "lib/x": b"c"}, digests))
    with pytest.raises(PluginError, match=r"^json\.py has no sha256 in the manifest: remove the file"):
        check_sha256(*with_digests({**contents, "json.py": b""}, digests))
    with pytest.raises(PluginError, match=r"^lib/x has a sha256 in the manifest but is not in the plugin"):
        check_sha256(*with_digests({"main.py": b"a"}, digests))
    with pytest.raises(PluginError, match=r"^\.\./main\.py\\x1b has a sha256"):
        check_sha256(*with_digests(contents, {**digests, "../main.py\x1b": digests["main.py"]}))


def test_the_package_of_keys_is_imported_only_where_keys_are() -> None:
    code = "import sys; import sandbox.plugins.signing, sandbox.plugins.discovery; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
