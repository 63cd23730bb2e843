"""Landlock: the calling thread gives up the file system, TCP and signals, but for what its rules name.

Runs inside the sandbox, after no_new_privs and before the filter. It carries out rules; which rules a sandbox needs is
not its business. Light imports only.

What each version of the kernel's interface ("ABI") can restrict, and what therefore stays open below it:

    ABI  Linux  adds
    1    5.13   reading, writing, executing and making files; moving a file to another folder is always refused
    2    5.19   moves and links between folders (REFER) can be allowed
    3    6.2    truncating. Below: truncate(2) works on any file that the user id may write
    4    6.7    TCP bind and connect. Below: the network is not restricted here at all
    5    6.10   ioctl on devices. Below: any device that can be opened can be driven
    6    6.12   abstract sockets and signals leaving the sandbox. Below: both are left to namespaces or seccomp
    7    6.15   control of audit records

Never restricted: UDP and other sockets, chdir, stat, chmod, chown, extended attributes, flock, what is open already.

Source: linux/landlock.h, landlock(7), Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import _struct as struct  # struct.py adds nothing but a file
import errno
import os
import stat

from sandbox.ns.syscalls import syscall

LANDLOCK_CREATE_RULESET_VERSION = 1 << 0
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_RESTRICT_SELF_LOG_SAME_EXEC_OFF = 1 << 0
LANDLOCK_RESTRICT_SELF_LOG_SUBDOMAINS_OFF = 1 << 2
# Of what the rules refuse, and of what those refuse that a plugin gives itself beyond them.
_LOG_OFF = LANDLOCK_RESTRICT_SELF_LOG_SAME_EXEC_OFF | LANDLOCK_RESTRICT_SELF_LOG_SUBDOMAINS_OFF

LANDLOCK_ACCESS_FS_EXECUTE = 1 << 0
LANDLOCK_ACCESS_FS_WRITE_FILE = 1 << 1
LANDLOCK_ACCESS_FS_READ_FILE = 1 << 2
LANDLOCK_ACCESS_FS_READ_DIR = 1 << 3
LANDLOCK_ACCESS_FS_REMOVE_DIR = 1 << 4
LANDLOCK_ACCESS_FS_REMOVE_FILE = 1 << 5
LANDLOCK_ACCESS_FS_MAKE_CHAR = 1 << 6
LANDLOCK_ACCESS_FS_MAKE_DIR = 1 << 7
LANDLOCK_ACCESS_FS_MAKE_REG = 1 << 8
LANDLOCK_ACCESS_FS_MAKE_SOCK = 1 << 9
LANDLOCK_ACCESS_FS_MAKE_FIFO = 1 << 10
LANDLOCK_ACCESS_FS_MAKE_BLOCK = 1 << 11
LANDLOCK_ACCESS_FS_MAKE_SYM = 1 << 12
LANDLOCK_ACCESS_FS_REFER = 1 << 13
LANDLOCK_ACCESS_FS_TRUNCATE = 1 << 14
LANDLOCK_ACCESS_FS_IOCTL_DEV = 1 << 15

LANDLOCK_ACCESS_NET_BIND_TCP = 1 << 0
LANDLOCK_ACCESS_NET_CONNECT_TCP = 1 << 1

LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
LANDLOCK_SCOPE_SIGNAL = 1 << 1

NEWEST_ABI = 7

# The rights that mean something on a file; the kernel takes no others in a rule on one.
_FILE_RIGHTS = (
    LANDLOCK_ACCESS_FS_EXECUTE
    | LANDLOCK_ACCESS_FS_WRITE_FILE
    | LANDLOCK_ACCESS_FS_READ_FILE
    | LANDLOCK_ACCESS_FS_TRUNCATE
    | LANDLOCK_ACCESS_FS_IOCTL_DEV
)
_READ = LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR
_DEVICE_NODES = LANDLOCK_ACCESS_FS_MAKE_CHAR | LANDLOCK_ACCESS_FS_MAKE_BLOCK
_ALL = 2 * LANDLOCK_ACCESS_FS_IOCTL_DEV - 1

RIGHTS = {
    # Read and run files, list folders.
    "read": _READ,
    # List folders, nothing else.
    "list": LANDLOCK_ACCESS_FS_READ_DIR,
    # Read files, neither run them nor list folders.
    "read_file": LANDLOCK_ACCESS_FS_READ_FILE,
    # Read, write and drive, but make and remove nothing: for device files.
    "write_file": (
        LANDLOCK_ACCESS_FS_READ_FILE
        | LANDLOCK_ACCESS_FS_WRITE_FILE
        | LANDLOCK_ACCESS_FS_TRUNCATE
        | LANDLOCK_ACCESS_FS_IOCTL_DEV
    ),
    # Everything, in the whole hierarchy, except to make device nodes, which no sandbox has a reason to.
    "write": _ALL & ~_DEVICE_NODES,
}


def abi() -> int:
    """The kernel's Landlock ABI; 0 without Landlock (not built in, not switched on, or filtered away)."""
    try:
        return syscall("landlock_create_ruleset", None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def handled_access_fs(abi: int) -> int:
    """The file system rights that exist in `abi`; all of them are taken away where no rule gives them back."""
    if abi >= 5:
        return _ALL
    if abi >= 3:
        return LANDLOCK_ACCESS_FS_IOCTL_DEV - 1
    return LANDLOCK_ACCESS_FS_TRUNCATE - 1 if abi == 2 else LANDLOCK_ACCESS_FS_REFER - 1


def restrict(rules: list[list[str]], *, abi: int, deny_network: bool, scopes: bool) -> None:
    """Take everything away from the calling thread, and all it will start, but for `rules`: [path, key of RIGHTS] each.

    A rule holds for a folder and all below it, or for one file (with the rights that a file can have). `abi` is the
    version to use, at most the kernel's; newer ones than NEWEST_ABI count as that. `deny_network` refuses TCP from ABI 4,
    `scopes` abstract sockets and signals to processes outside from ABI 6; below, neither does anything.

    Needs no_new_privs. Raises OSError, with the path as filename, for a path that cannot be opened, ValueError for an ABI
    below 1, KeyError for unknown rights. Symbolic links in a path are followed, and a rule is about what they lead to.
    """
    if abi < 1:
        raise ValueError("this kernel has no Landlock")
    handled = handled_access_fs(abi)
    net = LANDLOCK_ACCESS_NET_BIND_TCP | LANDLOCK_ACCESS_NET_CONNECT_TCP if deny_network else 0
    scoped = LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL if scopes else 0
    # struct landlock_ruleset_attr grew: older kernels refuse fields that they do not know
    fields = [handled, *([net] if abi >= 4 else []), *([scoped] if abi >= 6 else [])]
    attr = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = syscall("landlock_create_ruleset", attr, len(attr), 0, what="Landlock ruleset")
    try:
        for path, rights in rules:
            _allow(ruleset, path, RIGHTS[rights] & handled)
        # Refusals are not worth a line each in the host's audit log: the code is hostile and could flood it.
        flags = _LOG_OFF if abi >= 7 else 0
        syscall("landlock_restrict_self", ruleset, flags, what="Landlock ruleset")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(beneath).st_mode):
            access &= _FILE_RIGHTS
        attr = struct.pack("=Qi", access, beneath)  # struct landlock_path_beneath_attr, packed
        syscall("landlock_add_rule", ruleset, LANDLOCK_RULE_PATH_BENEATH, attr, 0, what=path)
    finally:
        os.close(beneath)
