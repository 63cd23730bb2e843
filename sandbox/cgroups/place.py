"""Where the cgroups of sandboxes lie: found, made, and given controllers from the top down.

Three kinds of place, each with a folder in which the leaves are (cgroups(7), the kernel's cgroup-v2 document):

* root: `psie` in the v2 tree itself, made once per boot and kept; unified (/sys/fs/cgroup) or hybrid (.../unified).
* delegated: `psie` beside the cgroup that the caller is in, where an ancestor of it was handed to the caller's user.
* scope: one that the user's systemd makes for each zygote (see sandbox.cgroups.scope); the zygote is moved there.

No cgroup that has controllers for its children may have processes of its own, so the caller's is never used itself.
Must be light: it is on the start path of the command.
"""

from __future__ import annotations

import os

UNIFIED = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
WANTED = ("memory", "pids", "cpu", "io")
ENABLED = ("memory", "pids", "cpu")  # where they are not yet; io, which costs others something, only for a limit
FOLDER = "psie"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def mount_point() -> str:
    """Where the v2 tree is mounted; "" where there is none."""
    return next((path for path in UNIFIED if os.path.exists(path + "/cgroup.controllers")), "")


def own_path(pid: int | str = "self") -> str:
    """The v2 cgroup of a process, as a path below the mount point. Raises OSError; "" where it is in none."""
    with open(f"/proc/{pid}/cgroup") as file:
        return next((line.rstrip("\n")[3:] for line in file if line.startswith("0::")), "")


def legacy() -> tuple[str, ...]:
    """The controllers that v1 hierarchies have here."""
    with open("/proc/self/cgroup") as file:
        named = [line.split(":", 2)[1] for line in file]
    return tuple(sorted(name for names in named for name in names.split(",") if name and "=" not in name))


def find() -> tuple[str, str, tuple[str, ...]]:
    """(kind, folder, controllers) of the place for this process's user; kind is "" where there is none.

    For root and delegated places `folder` is where `psie` is to be made, and what can be handed down to it is enabled on
    the way. For a scope it is the user manager's own cgroup, and the controllers are those that it was given.
    """
    tree = mount_point()
    if not tree:
        return "", "", ()
    if os.getuid() == 0 and may_make(tree):
        return "root", tree, hand_down([tree])
    path = own_path()
    above = ancestors(tree, os.path.dirname(path))
    writable = [folder for folder in above if may_make(folder)]
    if writable:
        return "delegated", writable[0], hand_down(reversed(writable))
    manager = f"{tree}/user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service"
    if os.path.exists(f"/run/user/{os.getuid()}/bus") and may_make(manager):
        return "scope", manager, tuple(name for name in WANTED if name in words(manager + "/cgroup.controllers"))
    return "", "", ()


def ancestors(tree: str, path: str) -> list[str]:
    """The folders from `path` (below `tree`) up to the tree's own, the nearest first."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return ["/".join([tree, *parts[:count]]) for count in range(len(parts), -1, -1)]


def may_make(folder: str) -> bool:
    """Whether we may make cgroups in `folder`, give them controllers and start processes in them (delegation)."""
    return all(os.access(folder + name, os.W_OK) for name in ("", "/cgroup.procs", "/cgroup.subtree_control"))


def hand_down(folders: Iterable[str], wanted: Iterable[str] = ENABLED) -> tuple[str, ...]:
    """Enable what is wanted in each of `folders`, from the top down; what the children of the last one have then."""
    enabled: list[str] = []
    for folder in folders:
        enabled = words(folder + "/cgroup.subtree_control")
        for name in wanted:
            if name in words(folder + "/cgroup.controllers") and name not in enabled:
                try:
                    write(folder + "/cgroup.subtree_control", "+" + name)
                except OSError:
                    continue  # EBUSY: it has processes of its own. The controller is then not there, and is reported so
                enabled.append(name)
    return tuple(name for name in WANTED if name in enabled)


def prepare(folder: str, controllers: list[str]) -> int:
    """Make `folder` if it is missing, give its children the controllers; returns an fd of it.

    Raises OSError that says what the kernel refuses: ENOENT for a controller that is not there (any more).
    """
    try:
        os.mkdir(folder, 0o755)
    except FileExistsError:
        pass
    missing = set(controllers) - set(words(folder + "/cgroup.subtree_control"))
    if missing and not missing <= set(words(folder + "/cgroup.controllers")):
        hand_down([os.path.dirname(folder)], missing)  # new ones, or somebody has taken them away since they were seen
    if missing:
        write(folder + "/cgroup.subtree_control", " ".join("+" + name for name in sorted(missing)))
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def words(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return []


def write(path: str, text: str) -> None:
    """Without O_CREAT: a file that is missing is ENOENT, not EACCES."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
