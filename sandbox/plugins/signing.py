"""Signatures of plugins: Ed25519 over all that a plugin is, by a key that the host's owner trusts.

What is signed is a text of five lines:

    psie plugin signature 1
    id: ID
    version: the manifest's, or nothing
    manifest: SHA-256 of the manifest's bytes, or "none"
    files: the plugin's digest, see files.py

The signature file holds the 64 bytes in base64. A trusted key is a file NAME.pub in the folder of trusted keys, 32 bytes in
base64 or PEM; file, folder and every folder above must be ours or root's, and nobody else may be able to change them, as
sshd(8) wants it with StrictModes. An older version of a plugin has a signature that fits: who must not run it takes the
trust from its key, or quarantines it.

Host side. The package `cryptography` is imported inside the functions, as most runs need none of it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from dataclasses import dataclass

from sandbox import state
from sandbox.errors import PluginError
from sandbox.plugins import files, manifest
from sandbox.plugins.files import FOLDER, PluginFiles, refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_BYTES = 64  # RFC 8032
KEY_FILE_BYTES = 4096
KEY_FOLDER = "trusted-keys"
NO_PUBLIC_KEY = "is no Ed25519 public key: give 32 bytes in base64, or PEM"
NO_PRIVATE_KEY = "is no Ed25519 private key in a PEM file without a password: make one with psie plugins keygen"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Signature:
    """What a check has found.

    Attributes:
        key: name of the trusted key that made the signature; None if none did.
        ok: whether the plugin is signed by a trusted key.
        reason: why not, in a sentence that is safe for a terminal; "" if it is.
    """

    key: str | None
    ok: bool
    reason: str = ""


def check(plugin: PluginFiles, trusted_folder: str | os.PathLike[str] | None = None) -> Signature:
    """Whether a trusted key has signed exactly this plugin.

    Args:
        plugin: as it was read, and will be run.
        trusted_folder: the folder of trusted keys; None: `trusted-keys` in psie's state folder.

    Raises:
        ManifestError: its manifest is wrong.
    """
    if plugin.signature is None:
        return Signature(None, False, "it is not signed: sign it with psie plugins sign")
    try:
        signature = base64.b64decode(plugin.signature.strip(), validate=True)
    except ValueError:
        signature = b""
    if len(signature) != SIGNATURE_BYTES:
        return Signature(None, False, f"its signature is not {SIGNATURE_BYTES} bytes in base64: sign it again")
    statement = text_of(plugin)
    passed_over: list[str] = []
    try:
        for name, key in trusted_keys(trusted_folder, passed_over):
            if _verifies(key, signature, statement):
                return Signature(name, True)
    except PluginError as error:
        return Signature(None, False, str(error))
    reason = "no trusted key has signed it as it is: it was changed after signing, or its key is not trusted"
    return Signature(None, False, "; ".join([reason, *passed_over]))


def check_sha256(plugin: PluginFiles, said: manifest.Manifest) -> None:
    """Hold the digests in the manifest, if there are any, against the files. Raises PluginError for the first that differs."""
    if not said.sha256:
        return
    for path in sorted({*said.sha256, *plugin.files}):
        if path not in plugin.files:
            refuse(path, "has a sha256 in the manifest but is not in the plugin: put it back, or take it out of the table")
        if path not in said.sha256:
            refuse(path, "has no sha256 in the manifest: remove the file, or add it to the table, which must name every file")
        if hashlib.sha256(plugin.files[path]).hexdigest() != said.sha256[path]:
            refuse(path, "is not the file whose sha256 is in the manifest: restore it, or write its new one there")


def text_of(plugin: PluginFiles) -> bytes:
    """What is signed. Raises ManifestError."""
    version = manifest.of(plugin).version
    digest = hashlib.sha256(plugin.manifest[1]).hexdigest() if plugin.manifest is not None else "none"
    lines = (
        "psie plugin signature 1",
        f"id: {plugin.id}",
        f"version: {version}",
        f"manifest: {digest}",
        f"files: {plugin.sha256}",
    )
    return "".join(f"{line}\n" for line in lines).encode()


def sign(plugin: PluginFiles, private_key_path: str | os.PathLike[str]) -> bytes:
    """The content of a signature file for `plugin`, by the Ed25519 key in a PEM file that nobody else can read.

    Raises:
        PluginError: the key cannot be used, or a ManifestError: the plugin's manifest is wrong.
    """
    statement = text_of(plugin)
    return base64.b64encode(_private_key(os.fspath(private_key_path)).sign(statement)) + b"\n"


def write_signature(plugin_dir: str | os.PathLike[str], plugin: PluginFiles, signature: bytes) -> str:
    """Put a signature where `files.read` looks for it, instead of an older one; returns its path beneath the plugin folder.

    Whatever is killed when, there is the old one, none, or the new one. Raises PluginError.
    """
    folder = files.open_folder(plugin_dir)
    try:
        is_folder = files.kind_of(folder, plugin.id) == FOLDER
        beside, inner = f"{plugin.id}.sig", f"{plugin.id}/{files.SIGNATURE}"
        path = inner if is_folder and not files.exists(folder, beside) else beside
        place = files.opened(folder, plugin.id, plugin.id, os.O_DIRECTORY) if path == inner else os.dup(folder)
        try:
            name = os.path.basename(path)
            if files.exists(place, name):
                os.unlink(name, dir_fd=place)
            _appear(place, name, signature, 0o644)
        except OSError as error:
            refuse(path, f"cannot be written: {error.strerror}")
        finally:
            os.close(place)
    finally:
        os.close(folder)
    return path


def make_key(path: str | os.PathLike[str]) -> str:
    """Make a private key at `path`, PEM, mode 0600; returns the public one, as a NAME.pub file of trusted keys holds it.

    Raises:
        PluginError: there is such a file already, or it cannot be made.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    if not os.fspath(path):
        refuse("the key's path", "is empty: give a name for the file")
    above, name = os.path.split(os.path.abspath(path))
    try:
        folder = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _appear(folder, name, pem, 0o600)
        finally:
            os.close(folder)
    except FileExistsError:
        refuse(os.fspath(path), "is there already: give another name, a key is never overwritten")
    except (OSError, ValueError) as error:
        refuse(
            os.fspath(path), f"cannot be made ({getattr(error, 'strerror', None) or error}): give a file in a folder of yours"
        )
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def _appear(folder: int, name: str, content: bytes, mode: int) -> None:
    """Make a file that is there with all its content or not at all. FileExistsError where there is one. open(2), O_TMPFILE."""
    fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(fd, mode)
        os.fsync(fd)
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder, follow_symlinks=True)


def trusted_keys(
    trusted_folder: str | os.PathLike[str] | None, passed_over: list[str]
) -> Iterator[tuple[str, Ed25519PublicKey]]:
    """(name, key) of each key that can be trusted; why another one cannot goes into `passed_over`.

    Raises PluginError where the folder itself cannot be trusted.
    """
    try:
        path = os.path.realpath(os.path.join(state.folder("lib"), KEY_FOLDER) if trusted_folder is None else trusted_folder)
    except OSError as error:
        raise PluginError(f"no key is trusted: {error}") from None
    above = path
    while (parent := os.path.dirname(above)) != above:
        above = parent
        if os.path.exists(above):
            _check_guarded(os.stat(above), above, sticky_is_fine=True)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        refuse(path, f"is to be the folder of trusted keys, but {error.strerror}: make it, and put NAME.pub files into it")
    try:
        _check_guarded(os.fstat(folder), path)
        for file in sorted(os.listdir(folder)):
            name, dot, ending = file.rpartition(".")
            if ending != "pub" or not dot:
                continue
            try:
                yield name, _public_key(folder, file, os.path.join(path, file))
            except PluginError as error:
                passed_over.append(str(error))
    finally:
        os.close(folder)


def _check_guarded(found: os.stat_result, path: str, *, sticky_is_fine: bool = False) -> None:
    """Raise PluginError for what others can change."""
    if found.st_uid not in (0, os.geteuid()):
        refuse(path, "belongs to another user, so no key is trusted there: chown it to root or yourself")
    if found.st_mode & OTHERS_WRITE and not (sticky_is_fine and found.st_mode & stat.S_ISVTX):
        refuse(path, "can be changed by others, so no key is trusted there: chmod go-w it")


def _public_key(folder: int, file: str, path: str) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if not files.is_id(file.removesuffix(".pub")):
        refuse(path, "has no plain name: name a key with letters, digits, _ and -")
    with files.opened_file(folder, file, path) as opened:
        _check_guarded(os.fstat(opened.fileno()), path)
        content = opened.read(KEY_FILE_BYTES).strip()
    try:
        if not content.startswith(b"-----"):
            return Ed25519PublicKey.from_public_bytes(base64.b64decode(content, validate=True))
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        refuse(path, NO_PUBLIC_KEY)
    if not isinstance(key, Ed25519PublicKey):
        refuse(path, NO_PUBLIC_KEY)
    return key


def _private_key(path: str) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                refuse(path, NO_PRIVATE_KEY)
            if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                refuse(path, "can be read by others, so it is no secret: chmod 600 it, or make a new key")
            content = os.read(fd, KEY_FILE_BYTES)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read ({getattr(error, 'strerror', None) or error}): check the path, and your rights to it")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a password
        refuse(path, NO_PRIVATE_KEY)
    if not isinstance(key, Ed25519PrivateKey):
        refuse(path, NO_PRIVATE_KEY)
    return key


def _verifies(key: Ed25519PublicKey, signature: bytes, statement: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, statement)
    except InvalidSignature:
        return False
    return True
