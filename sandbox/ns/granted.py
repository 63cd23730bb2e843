"""Granted folders: the caller's own, attached where the plugin sees them, so that what it writes is kept aside.

In a warden. Each is the lower layer of an overlay whose upper layer lies in the sandbox's tmpfs, beside the workspace and
under its limits. As root the lower layer is bound with an id map: its owner's files are the plugin's, those of others are
what they are to anybody. Where a file system refuses that, the plugin gets a copy. Must not know what becomes of changes.
Sources: the kernel's overlayfs document, mount_setattr(2), mount_namespaces(7).
"""

from __future__ import annotations

import _signal as signal
import errno
import os
import stat

from sandbox.ns import mounts, privileges, workspace
from sandbox.ns import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PLACE = "/run/sandbox"  # of the tmpfs, in the warden; every call has a tmpfs of its own over /run
OVERLAY, COPY, READ, DIRECT = "overlay", "copy", "read", "direct"
OPTIONS = "redirect_dir=nofollow,metacopy=off,index=off,xino=off"
# What a file system answers that can be no lower layer, or have no id map.
UNFIT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EREMOTE, errno.ELOOP, errno.ESTALE)
DEPTH = 100

_id_maps: dict[tuple[int, int, int, int], int] = {}  # a warden serves many sandboxes, mostly with the same ids
ID_MAPS = 16  # kept at once


class Granted:
    """The granted folders of one sandbox, as the recipe and the caller name them, in the order of the recipe."""

    def __init__(
        self, folders: list[dict[str, Any]], found: list[list[int]], owner: list[int], *, is_root: bool, is_shared: bool
    ) -> None:
        """`found`: device, inode, uid, gid and mode of each, as the caller sees it; `owner`: uid and gid of the plugin.

        `is_shared`: calls have no mount namespace of their own, so that ours must not be that of other wardens.
        """
        self.folders = folders
        self.found = found
        self.owner = owner
        self.is_root = is_root
        self.is_shared = is_shared
        self.kinds: list[str] = []
        self.before: int | None = None  # mount namespace

    def attach(self, host_namespace: int) -> None:
        """Raises mounts.LineFailed."""
        if self.is_shared:
            self.before = mounts.current_namespace()
            sc.unshare(sc.CLONE_NEWNS)
        trees = mounts.take_from(host_namespace, [(folder["path"], "") for folder in self.folders], recursive=False)
        try:
            for number, tree in enumerate(trees):
                try:
                    self.kinds.append(self._attach(tree, number))
                except OSError as error:
                    raise mounts.LineFailed(f"sandbox: granted folder {self.folders[number]['path']}", error) from None
        finally:
            for tree in trees:
                os.close(tree)

    def detach(self) -> None:
        """Go back to where we were before `attach`, if that was another mount namespace."""
        if self.before is not None:
            sc.setns(self.before, sc.CLONE_NEWNS)
            os.close(self.before)
            self.before = None

    def _attach(self, tree: int, number: int) -> str:
        """Returns the kind that it has become."""
        path, kind = str(self.folders[number]["path"]), str(self.folders[number]["kind"])
        seen = os.fstat(tree)
        if [seen.st_dev, seen.st_ino] != self.found[number][:2]:
            raise OSError(errno.ESTALE, "it was replaced while the sandbox was opened", path)
        if kind not in (READ, DIRECT):
            return self._attach_layers(tree, number)
        self._set(tree, number, "ro" if kind == READ else "")
        mounts.put(os.dup(tree), "", path)
        return kind

    def renew(self, *, keep: bool) -> None:
        """Attach the overlays anew, because the folders have changed; what the plugin has changed goes unless `keep`.

        No call may be running. Raises mounts.LineFailed.
        """
        for number, kind in enumerate(self.kinds):
            if kind == OVERLAY or (kind == COPY and not keep):
                try:
                    sc.umount(self.folders[number]["path"])
                    if not keep:
                        self._remove(number)
                        self._make(number)
                    (self._overlay if kind == OVERLAY else self._copy)(number)
                except OSError as error:
                    raise mounts.LineFailed(f"sandbox: granted folder {self.folders[number]['path']}", error) from None

    def _remove(self, number: int) -> None:
        place = os.open(f"{PLACE}/{number}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in ("upper", "work"):
                workspace.remove_folder(place, name)
        finally:
            os.close(place)

    def _set(self, tree: int, number: int, flags: str) -> None:
        """Mount attributes; as root with the id map, without which a plugin of another id could do nothing there."""
        attributes, namespace = mounts.attributes_of("nosuid,nodev" + (f",{flags}" if flags else "")), 0
        if self.is_root:
            namespace = id_map(*self.found[number][2:4], *self.owner)
            attributes |= sc.MOUNT_ATTR_IDMAP
        path = self.folders[number]["path"]
        sc.mount_setattr(tree, attributes, recursive=False, what=path, user_namespace=namespace)

    def _attach_layers(self, tree: int, number: int) -> str:
        """Returns what it has become: an overlay or a copy."""
        os.mkdir(f"{PLACE}/{number}", 0o711)
        os.mkdir(f"{PLACE}/{number}/lower", 0o711)
        self._make(number)
        kind = str(self.folders[number]["kind"])
        try:
            if kind == OVERLAY:
                self._set(tree, number, "ro")
        except OSError as error:
            if error.errno not in UNFIT:
                raise
            kind = COPY
        sc.move_mount(tree, f"{PLACE}/{number}/lower")
        if kind == OVERLAY:
            try:
                self._overlay(number)
            except OSError as error:
                if error.errno not in UNFIT:
                    raise
                kind = COPY
        if kind == COPY:
            self._copy(number)
        return kind

    def _make(self, number: int) -> None:
        """Empty upper and work folders; the upper one is what the plugin sees as the folder itself."""
        upper = f"{PLACE}/{number}/upper"
        for name in ("upper", "work"):
            os.mkdir(f"{PLACE}/{number}/{name}", 0o700)
        if self.is_root:
            os.chown(upper, *self.owner)
        os.chmod(upper, self.found[number][4])

    def _overlay(self, number: int) -> None:
        place, path = f"{PLACE}/{number}", self.folders[number]["path"]
        options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work,{OPTIONS}"
        options += "" if self.is_root else ",userxattr"
        sc.mount("overlay", mounts.make_point("", path, directory=True), "overlay", sc.MS_NOSUID | sc.MS_NODEV, options)

    def _copy(self, number: int) -> None:
        place, path = f"{PLACE}/{number}", self.folders[number]["path"]
        try:
            self._copy_folder(f"{place}/lower", f"{place}/upper", self.found[number][2], 0)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            text = "it cannot be part of an overlay, and a copy of it is larger than the disk limit"
            raise OSError(errno.EDQUOT, text, path) from None
        sc.mount(f"{place}/upper", mounts.make_point("", path, directory=True), None, sc.MS_BIND)

    def _copy_folder(self, source: str, target: str, owner: int, depth: int) -> None:
        """Folders, files and links; nothing else means anything in a copy. Nobody changes these trees meanwhile but the
        folder's owner, and nothing is followed."""
        if depth > DEPTH:
            raise OSError(errno.ELOOP, "folders lie in folders too deep to copy", source)
        for name in os.listdir(source):
            one, other = f"{source}/{name}", f"{target}/{name}"
            found = os.lstat(one)
            if stat.S_ISDIR(found.st_mode):
                os.mkdir(other, 0o700)
                self._copy_folder(one, other, owner, depth + 1)
            elif stat.S_ISLNK(found.st_mode):
                os.symlink(os.readlink(one), other)
            elif stat.S_ISREG(found.st_mode):
                copy_file(one, other)
            else:
                continue
            if self.is_root and found.st_uid == owner:
                os.chown(other, *self.owner, follow_symlinks=False)
            if not stat.S_ISLNK(found.st_mode):
                os.chmod(other, stat.S_IMODE(found.st_mode) & 0o777)


def copy_file(source: str, target: str) -> None:
    fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            while os.sendfile(made, fd, None, 1 << 24):
                pass
        finally:
            os.close(made)
    finally:
        os.close(fd)


def id_map(uid: int, gid: int, to_uid: int, to_gid: int) -> int:
    """A user namespace, as an fd: what is `uid` and `gid` in a file is `to_uid` and `to_gid` through it, all else is nobody."""
    key = (uid, gid, to_uid, to_gid)
    if key not in _id_maps:
        while len(_id_maps) >= ID_MAPS:
            os.close(_id_maps.pop(next(iter(_id_maps))))
        here = os.getpid()
        pid, pidfd = sc.clone3(sc.CLONE_NEWUSER)
        if pid == 0:
            privileges.die_with_parent()
            while os.getppid() == here:  # else it has died before the line above
                signal.pause()
            os._exit(0)
        try:
            for name, inside, outside in (("uid_map", uid, to_uid), ("gid_map", gid, to_gid)):
                with open(f"/proc/{pid}/{name}", "wb", 0) as file:
                    file.write(f"{inside} {outside} 1".encode())
            _id_maps[key] = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            sc.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            os.waitpid(pid, 0)
    return _id_maps[key]
