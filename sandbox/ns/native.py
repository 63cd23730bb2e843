"""Those few of ctypes' names that setting up a sandbox takes, made as ctypes makes them, of the C module that it stands on.

The package ctypes makes dozens of types and closures when it is imported, for a millisecond at each start of `psie run`, and
for pages that each process has to copy. The types here are our own: a plugin that imports ctypes has others. Must not know what
is called with them. Source: ctypes/__init__.py.
"""

from __future__ import annotations

from _ctypes import (
    FUNCFLAG_CDECL,
    FUNCFLAG_PYTHONAPI,
    FUNCFLAG_USE_ERRNO,
    CFuncPtr,
    Structure,
    _SimpleCData,
    addressof,
    byref,
    dlopen,
    get_errno,
    sizeof,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import c_char_p, c_int, c_long, c_uint64, c_ulong, c_ushort, py_object
    from typing import Any
else:

    class c_int(_SimpleCData):
        _type_ = "i"

    class c_long(_SimpleCData):
        _type_ = "l"

    class c_ulong(_SimpleCData):
        _type_ = "L"

    class c_uint64(_SimpleCData):
        _type_ = "Q"

    class c_ushort(_SimpleCData):
        _type_ = "H"

    class c_char_p(_SimpleCData):
        _type_ = "z"

    class py_object(_SimpleCData):
        _type_ = "O"


__all__ = [
    "Program",
    "Structure",
    "addressof",
    "byref",
    "c_char_p",
    "c_int",
    "c_long",
    "c_uint64",
    "c_ulong",
    "c_ushort",
    "get_errno",
    "py_object",
    "sizeof",
]


class Function(CFuncPtr):
    """Called with the GIL held: a thread of the caller can never be half-way through Python code in a child."""

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI | FUNCFLAG_USE_ERRNO
    _restype_ = c_int


class WaitingFunction(Function):
    """Called without the GIL, for what other threads need not wait for."""

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO


class Program:
    """The functions of all that this process has loaded at its start: of the C library, and of the interpreter."""

    def __init__(self) -> None:
        self._handle = dlopen(None, 0)  # type: ignore[arg-type]  # dlopen(3): the program itself

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError for one that there is not."""
        function = Function((name, self))  # type: ignore[arg-type]  # all that it needs is the handle
        setattr(self, name, function)
        return function

    def waiting(self, name: str) -> WaitingFunction:
        return WaitingFunction((name, self))  # type: ignore[arg-type]
