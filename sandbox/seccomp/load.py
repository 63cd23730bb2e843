"""Loads a finished system call filter into the calling thread, by seccomp(2).

Runs inside the sandbox, last of all set-up. It knows bytes only: not where they come from, what they refuse, or who
answers the notifications. Light imports only.
"""

from __future__ import annotations

from sandbox.ns import native
from sandbox.ns.syscalls import syscall

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 5

_INSTRUCTION_BYTES = 8


class _sock_fprog(native.Structure):
    """linux/filter.h"""

    _fields_ = (("len", native.c_ushort), ("filter", native.c_char_p))


def load_filter(bpf: bytes, *, new_listener: bool) -> int:
    """Put the calling thread, and all it will start, under the filter. Cannot be undone.

    Returns the listener's descriptor (close-on-exec), or -1 without `new_listener`. Whoever holds the listener can allow
    calls: send it out and close it before any foreign code runs.

    A notified call, once received, is interrupted by nothing but a deadly signal (WAIT_KILLABLE_RECV, Linux 5.19).

    Needs no_new_privs or CAP_SYS_ADMIN. Raises OSError: EACCES without either, EBUSY if the process has a listener
    already, EINVAL for a program that the kernel does not take. See seccomp(2), seccomp_unotify(2).
    """
    instructions, rest = divmod(len(bpf), _INSTRUCTION_BYTES)
    if rest or not instructions:
        raise ValueError(f"not a BPF program: {len(bpf)} bytes")
    program = _sock_fprog(instructions, bpf)
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV if new_listener else 0
    result = syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, native.byref(program), what="seccomp filter")
    return result if new_listener else -1
