"""Mount trees, line by line: carries out the mount lines of a recipe, in the zygote, in a warden and in an init.

A line is a list: an operation's name and its arguments (see OPERATIONS). Must not know levels: the recipe decided.

The three stages are: the *template* (once per zygote: a root assembled from bind mounts, then pivot_root(2)); the
*sandbox* lines (once per warden: workspace and the caller's folders); the *call* lines (once per init: /proc, /tmp and
what else no two calls may share). Sources: mount_namespaces(7), mount_setattr(2), open_tree(2) in linux/mount.h.
"""

from __future__ import annotations

import errno
import os
import stat
from _codecs import escape_decode

from sandbox.ns import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# An empty directory of the host that is never a source of a bind: the new root is put together on top of it.
STAGING = "/sys"

ATTRIBUTES = {
    "ro": sc.MOUNT_ATTR_RDONLY,
    "nosuid": sc.MOUNT_ATTR_NOSUID,
    "nodev": sc.MOUNT_ATTR_NODEV,
    "noexec": sc.MOUNT_ATTR_NOEXEC,
}


class LineFailed(Exception):
    """The first line of a recipe that could not be carried out: which one, errno, path, the kernel's words."""

    def __init__(self, line: str, error: OSError | ValueError) -> None:
        self.line = line
        self.errno = getattr(error, "errno", None) or 0
        self.path = str(getattr(error, "filename", None) or "")
        self.text = getattr(error, "strerror", None) or str(error)
        super().__init__(f"{line}: {self.text} {self.path}")


def make_point(root: str, path: str, *, directory: bool) -> str:
    """Make sure that something can be mounted at `path` below `root`; the folders on the way are open to everyone."""
    target = root + path
    name = make_folders(root, path)
    if directory:
        if name:
            make_folder(target)
    elif not os.path.lexists(target):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    return target


def make_folders(root: str, path: str) -> str:
    """Make the folders on the way to `path` below `root`; returns its last part."""
    current = root
    *parts, name = path.strip("/").split("/")
    for part in parts:
        current += "/" + part
        make_folder(current)
    return name


def make_folder(path: str) -> None:
    """Make it if it is missing. Sandboxes of one template share the file system that it is in: another one may be faster."""
    if not os.path.isdir(path):
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            pass


def attributes_of(flags: str) -> int:
    return sum(ATTRIBUTES[flag] for flag in flags.split(",") if flag)


def take(source: str, flags: str, *, recursive: bool = True, at: int | None = None) -> int:
    """A detached copy of the mount at `source`, of all below it if `recursive`, with `flags` set on every mount of it.

    With `at`, an open fd, it is that which is copied, and `source` only its name.
    """
    how = sc.OPEN_TREE_CLONE | (sc.AT_RECURSIVE if recursive else 0)
    tree = sc.open_tree(source, how) if at is None else sc.open_tree("", how | sc.AT_EMPTY_PATH, at)
    attributes = attributes_of(flags)
    if attributes:
        try:
            sc.mount_setattr(tree, attributes, recursive=recursive, what=source)
        except OSError:
            os.close(tree)
            raise
    return tree


def take_without_links(source: str, flags: str, *, recursive: bool) -> int:
    """As `take`, of a path that had no symbolic link on it when it was looked at: whoever has put one there since leads us to
    what the plugin was not to see."""
    fd = sc.open_without_links(source)
    try:
        return take(source, flags, recursive=recursive, at=fd)
    finally:
        os.close(fd)


def put(tree: int, root: str, path: str) -> None:
    """Attach a detached tree at `path` below `root`, making the mount point where there is none."""
    try:
        directory = stat.S_ISDIR(os.fstat(tree).st_mode)
        sc.move_mount(tree, make_point(root, path, directory=directory))
    finally:
        os.close(tree)


def bind(root: str, source: str, target: str, flags: str) -> None:
    put(take(source, flags), root, target)


def bind_optional(root: str, source: str, target: str, flags: str) -> None:
    """A bind of something that not every host has; what the host refuses to share is left out as well."""
    try:
        bind(root, source, target, flags)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
            raise


def tmpfs(root: str, target: str, flags: str, options: str, keep: list[str]) -> None:
    """A new tmpfs at `target`; the trees at the paths in `keep`, which lie below it, stay visible through it."""
    mount_flags = sum(
        {"ro": sc.MS_RDONLY, "nosuid": sc.MS_NOSUID, "nodev": sc.MS_NODEV, "noexec": sc.MS_NOEXEC}[flag]
        for flag in flags.split(",")
        if flag
    )
    kept: list[tuple[str, int]] = []
    try:
        for path in keep:
            if os.path.lexists(root + path):
                kept.append((path, take(root + path, "")))
        sc.mount("tmpfs", make_point(root, target, directory=True), "tmpfs", mount_flags, options)
        while kept:
            path, tree = kept.pop(0)
            put(tree, root, path)
    finally:
        for _, tree in kept:  # a warden serves others, and would keep them for as long as it lives
            os.close(tree)


def scratch(root: str, target: str, options: str, places: dict[str, list[str]]) -> None:
    """One tmpfs at `target` whose folders appear at `places` (path -> what must stay visible below it): one size for all.

    `target` itself may be among the places, for what must stay visible there.
    """
    kept = [(path, take(root + path, "")) for keep in places.values() for path in keep if os.path.lexists(root + path)]
    sc.mount("tmpfs", make_point(root, target, directory=True), "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, options)
    for path in places:
        if path == target:
            continue
        folder = f"{root}{target}/{path.strip('/').replace('/', '-')}"
        os.mkdir(folder, 0o700)
        os.chmod(folder, 0o1777)
        sc.mount(folder, make_point(root, path, directory=True), None, sc.MS_BIND)
    for path, tree in kept:
        put(tree, root, path)


def host_root(root: str, skip: list[str], flags: str) -> None:
    """Bind everything that lies in the host's / except the names in `skip`; symbolic links are copied."""
    for name in sorted(os.listdir("/")):
        path = "/" + name
        if name in skip:
            continue
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        else:
            bind_optional(root, path, path, flags)
    for path, mounted in automounts(root):
        tmpfs(root, path, "nosuid,nodev", "mode=755,size=64k,nr_inodes=4096", mounted)
        readonly(root, path)


def automounts(root: str) -> list[tuple[str, list[str]]]:
    """Folders below `root` that an automounter serves, and what is mounted in them (proc_pid_mountinfo(5)), as paths below it.

    Whoever looks up a name there asks that program, which is the host's and may look for a host of that name.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        lines = [line.split() for line in file]
    points = {line[0]: os.fsdecode(escape_decode(line[4])[0]).removeprefix(root) for line in lines}
    found = []
    for line in lines:
        path = points[line[0]]
        if line[line.index(b"-") + 1] == b"autofs" and escape_decode(line[4])[0].startswith(os.fsencode(root) + b"/"):
            inside = [points[other[0]] for other in lines if other[1] == line[0]]
            if path not in inside:  # else it is behind what it has mounted
                found.append((path, inside))
    return sorted(found)


def directory(root: str, path: str, mode: int) -> None:
    os.chmod(make_point(root, path, directory=True), mode)


def own_folder(root: str, path: str, uid: int, gid: int) -> None:
    os.mkdir(root + path, 0o700)
    os.chown(root + path, uid, gid)


def symlink(root: str, target: str, path: str) -> None:
    make_point(root, os.path.dirname(path), directory=True)
    if not os.path.lexists(root + path):
        os.symlink(target, root + path)


def file(root: str, path: str, text: str, mode: int = 0o444) -> None:
    make_folders(root, path)
    fd = os.open(root + path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        data = text.encode()
        while data:
            data = data[os.write(fd, data) :]
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def cover(root: str, files: dict[str, str]) -> None:
    """Put read-only files of these contents over those at `files`, in this mount namespace only; absent ones stay absent."""
    place = root + "/run"
    sc.mount("tmpfs", place, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC, "mode=755,size=1m,nr_inodes=16")
    trees: list[tuple[str, int]] = []
    try:
        try:
            for number, (path, text) in enumerate(files.items()):
                file(place, f"/{number}", text)
                trees.append((path, take(f"{place}/{number}", "ro,nosuid,nodev,noexec", recursive=False)))
        finally:
            sc.umount(place)  # what is taken of it stays
        while trees:
            path, tree = trees.pop(0)
            if os.path.isfile(root + path):
                put(tree, root, os.path.realpath(root + path).removeprefix(root))  # which may be a link into /run
            else:
                os.close(tree)
    finally:
        for _, tree in trees:  # as those of `tmpfs`
            os.close(tree)


def proc(root: str, options: str) -> str | None:
    """A fresh /proc of this PID namespace; where the host's is masked and the kernel refuses it, none at all.

    The kernel lets a user namespace mount proc only beside a fully visible one (mount_too_revealing() in
    fs/namespace.c). An empty /proc is stronger than a masked one.
    """
    target = root + "/proc"
    try:
        sc.mount("proc", target, "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC, options or None)
    except PermissionError:
        no_proc(root)
        return "no /proc"
    return None


def no_proc(root: str) -> None:
    tmpfs(root, "/proc", "ro,nosuid,nodev,noexec", "size=4k,nr_inodes=2,mode=555", [])


def mask(root: str, path: str) -> None:
    """Put nothing over `path`: an empty read-only folder over a folder, /dev/null over a file; absent is fine."""
    target = root + path
    if not os.path.lexists(target):
        return
    if os.path.isdir(target):
        tmpfs(root, path, "ro,nosuid,nodev,noexec", "size=4k,nr_inodes=2,mode=555", [])
    else:
        sc.mount(root + "/dev/null", target, None, sc.MS_BIND)


def readonly(root: str, path: str) -> None:
    """Make the one mount at `path` read-only in this mount namespace (not the ones below it)."""
    flags = sc.MS_BIND | sc.MS_REMOUNT | sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NODEV
    sc.mount("none", root + path, None, flags)


OPERATIONS = {
    "bind": bind,
    "bind_optional": bind_optional,
    "cover": cover,
    "directory": directory,
    "file": file,
    "host_root": host_root,
    "mask": mask,
    "no_proc": no_proc,
    "own_folder": own_folder,
    "proc": proc,
    "readonly": readonly,
    "scratch": scratch,
    "symlink": symlink,
    "tmpfs": tmpfs,
}


def carry_out(root: str, lines: list[list[object]], stage: str) -> list[str]:
    """Carry out mount lines below `root`; returns what was substituted on the way.

    Raises LineFailed for the first line that fails. An unknown operation is a line that fails.
    """
    notes = []
    for line in lines:
        name, *arguments = line
        try:
            operation = OPERATIONS.get(str(name))
            if operation is None:
                raise ValueError("unknown operation")
            note = operation(root, *arguments)  # type: ignore[operator]
        except (OSError, ValueError, TypeError) as error:
            shown = " ".join(str(argument) for argument in arguments if isinstance(argument, str) and "\n" not in argument)
            raise LineFailed(f"{stage}: {name} {shown}".strip(), error) from None  # type: ignore[arg-type]
        if note:
            notes.append(note)
    return notes


def own_namespace() -> int:
    """Leave the caller's mount namespace for a copy that follows it but never changes it; returns an fd to that copy.

    Later the warden reaches the caller's folders through this fd (setns(2)), as the caller sees them.
    """
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount("none", "/", None, sc.MS_REC | sc.MS_SLAVE)
    return current_namespace()


def current_namespace() -> int:
    """An fd of the mount namespace that we are in."""
    return os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def copy_of(template: int) -> None:
    """Leave our mount namespace for a new copy of `template`."""
    sc.setns(template, sc.CLONE_NEWNS)
    sc.unshare(sc.CLONE_NEWNS)


def build_template(lines: list[list[object]], *, pivot: bool) -> None:
    """Make this process's mount tree the template: in a further namespace of its own, private, with a new root."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount("none", "/", None, sc.MS_REC | sc.MS_PRIVATE)
    if not pivot:
        carry_out("", lines, "template")
        return
    sc.mount("tmpfs", STAGING, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "mode=755,size=4m,nr_inodes=4096")
    carry_out(STAGING, lines, "template")
    # The old /proc comes along: a new one may be mounted only beside it, and every call covers it with its own.
    put(sc.open_tree("/proc", sc.OPEN_TREE_CLONE | sc.AT_RECURSIVE), STAGING, "/proc")
    os.chdir(STAGING)
    sc.pivot_root(".", ".")
    sc.umount(".")
    os.chdir("/")


def open_ways(paths: list[str]) -> list[str]:
    """What is missing on the way to mount points of one sandbox is made in tmpfs of its own, which are returned.

    The root of a template is one file system for all of its sandboxes: what is made there stays, and others would find the
    names of folders that are no business of theirs. Only what lies in / itself has to be made there.
    """
    ways = []
    for path in paths:
        deepest, missing = path, ""
        while not os.path.lexists(deepest):
            deepest, missing = os.path.dirname(deepest), deepest
        try:
            if not missing or os.lstat(deepest).st_dev != os.lstat("/").st_dev:
                continue  # it is there, or another file system's
            if deepest == "/":
                if missing == path:
                    continue
                os.mkdir(missing, 0o755)
                deepest = missing
            kept = [os.path.join(deepest, name) for name in os.listdir(deepest)]
            tmpfs("", deepest, "nosuid,nodev", "mode=755,size=1m,nr_inodes=8192", kept)
            ways.append(deepest)
        except OSError as error:
            raise LineFailed(f"sandbox: way to {path}", error) from None
    return ways


def take_from(host_namespace: int, binds: list[tuple[str, str]], *, recursive: bool = True) -> list[int]:
    """Detached copies of the caller's folders (source, flags), by a visit to the caller's mount namespace."""
    trees: list[int] = []

    def take_all() -> None:
        for source, flags in binds:
            try:
                trees.append(take_without_links(source, flags, recursive=recursive))
            except OSError as error:
                for tree in trees:
                    os.close(tree)
                raise LineFailed(f"sandbox: bind {source}", error) from None

    visit(host_namespace, take_all)
    return trees


def visit(host_namespace: int | None, action: Callable[[], object]) -> None:
    """Do it in the caller's mount namespace; None: that is where we are."""
    if host_namespace is None:
        action()
        return
    here = current_namespace()
    try:
        sc.setns(host_namespace, sc.CLONE_NEWNS)
        try:
            action()
        finally:
            sc.setns(here, sc.CLONE_NEWNS)
    finally:
        os.close(here)


def attach_from(host_namespace: int, binds: list[tuple[str, str, str]]) -> None:
    """Attach the caller's folders (source, target, flags) in this mount namespace."""
    trees = take_from(host_namespace, [(source, flags) for source, _, flags in binds])
    try:
        for source, target, _ in binds:
            try:
                put(trees.pop(0), "", target)
            except OSError as error:
                raise LineFailed(f"sandbox: bind {source}", error) from None
    finally:
        for tree in trees:  # the warden serves others, and would keep them for as long as it lives
            os.close(tree)
