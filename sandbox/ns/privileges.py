"""Giving privileges away, for good: ids, capabilities, securebits, no_new_privs, rlimits.

Runs in a sandbox's init, before anything foreign. Uses the C part of python-prctl, without the objects that its Python part
makes of each capability, which takes a millisecond; the ambient set is by prctl(2) directly, which it does not know.
Sources: capabilities(7), prctl(2), setrlimit(2).
"""

from __future__ import annotations

import _signal as signal
import errno
import os
import resource

from sandbox.ns import syscalls as sc

try:
    import _prctl
except ImportError as import_error:  # absent, or built against headers with a newer capability than this kernel's
    raise ImportError(
        f"python-prctl cannot be loaded ({import_error}): install gcc, python3-dev and libcap-dev, then "
        "pip install --force-reinstall --no-binary :all: python-prctl"
    ) from None

ALL_CAPS = list(range(_prctl.CAP_LAST_CAP + 1))


def die_with_parent() -> None:
    """SIGKILL when the parent dies. A change of ids clears it, so call it again after one (prctl(2), PR_SET_PDEATHSIG)."""
    _prctl.prctl(_prctl.PR_SET_PDEATHSIG, signal.SIGKILL)


def become(uid: int, gid: int, may_keep_groups: bool) -> None:
    """Take on the ids for good, without supplementary groups.

    `may_keep_groups`: rootless, setgroups(2) is denied in the outer user namespace, and the caller's own groups stay.
    """
    try:
        os.setgroups([])
    except PermissionError:
        if not may_keep_groups:
            raise
    sc.prctl(sc.PR_SET_KEEPCAPS, 1)  # the capabilities go later, in one step, when nothing needs them any more
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


STACK = 8 << 20  # of a program where nobody says: _STK_LIM, linux/resource.h


def set_rlimits(lines: list[list[object]]) -> None:
    """Lines are (name as in setrlimit(2), value); soft and hard limit alike, so that nothing can be raised again. But programs
    take the soft limit of stacks for the size of each thread's: that stays.

    Raises OSError with the name as filename.
    """
    for name, value in lines:
        limit = int(value)  # type: ignore[call-overload]
        which = getattr(resource, str(name))
        # At the soft limit of CPU time the kernel sends SIGXCPU, which says why; at the hard one SIGKILL.
        after = 1 if name == "RLIMIT_CPU" else 0
        soft, hard = resource.getrlimit(which)
        if hard != resource.RLIM_INFINITY:  # the caller's own may be lower: then that holds
            limit = min(limit, max(hard - after, min(hard, 1)))
        most = limit + after if hard == resource.RLIM_INFINITY else min(limit + after, hard)
        if name == "RLIMIT_STACK":
            limit = min(limit, soft if soft != resource.RLIM_INFINITY else STACK)
        try:
            resource.setrlimit(which, (limit, most))
        except ValueError:  # Python's word for EPERM
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(name)) from None


def empty_bounding_set() -> None:
    """No program that is executed later can gain a capability, and root's id means nothing (capabilities(7)).

    Without CAP_SETPCAP (rootless, no user namespace) this is moot: no_new_privs forbids the gain.
    """
    own = [_prctl.CAP_SETPCAP]
    if not _prctl.get_caps([], own, [])[_prctl.CAP_PERMITTED][_prctl.CAP_SETPCAP]:
        return
    _prctl.set_caps(own, [], [], [], [], [])
    for capability in ALL_CAPS:
        _prctl.prctl(_prctl.PR_CAPBSET_DROP, capability)
    _prctl.prctl(
        _prctl.PR_SET_SECUREBITS,
        _prctl.SECBIT_NOROOT
        | _prctl.SECBIT_NOROOT_LOCKED
        | _prctl.SECBIT_NO_SETUID_FIXUP
        | _prctl.SECBIT_NO_SETUID_FIXUP_LOCKED
        | _prctl.SECBIT_KEEP_CAPS_LOCKED,
    )


def no_new_privs() -> None:
    _prctl.prctl(_prctl.PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl.set_caps([], [], [], ALL_CAPS, ALL_CAPS, ALL_CAPS)  # to set in each set: none; to clear: all
