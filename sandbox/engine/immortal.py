"""What a zygote has when it forks is not counted any more: immortal objects (PEP 683), which Python has from 3.12 on.

Who takes a reference to an object writes to its page, and a forked process copies each page that it writes to. Those pages are
two fifths of the memory of a warden, an init and a worker, and of what the kernel does to make and to end them. Nothing is lost
by it but that a plugin cannot have an object of a preloaded module freed; one that has a finalizer is left as it is.
Must not import anything heavy.
"""

from __future__ import annotations

import gc
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

COUNTED = 1 << 31  # an object that is counted has fewer references


def is_possible() -> bool:
    """Whether this interpreter has immortal objects, counts under the GIL, and where CPython does (object.h)."""
    is_debug = hasattr(sys, "gettotalrefcount")  # which checks that strings are immortal by its own ways
    if sys.version_info < (3, 12) or "t" in sys.abiflags or is_debug:
        return False
    from ctypes import c_uint32

    value = object()
    references = sys.getrefcount(value)
    found = c_uint32.from_address(id(value)).value
    return sys.getrefcount(None) >= COUNTED and found in (references, references - 1)  # with the call's own, or without it


def has_finalizer(kind: type) -> bool:
    """Without running code of its metaclass's."""
    mro, names = type.__dict__["__mro__"].__get__, type.__dict__["__dict__"].__get__
    return any("__del__" in names(base) for base in mro(kind))


def steps(size: int = 4000) -> Iterator[None]:
    """Make everything immortal that is there, with a look at so many objects at a step, which takes half a millisecond. The
    collector is to be off."""
    from ctypes import c_uint32

    at, references, referents, is_tracked = c_uint32.from_address, sys.getrefcount, gc.get_referents, gc.is_tracked
    code = type(steps.__code__)
    never = at(id(None)).value
    finalized: dict[int, bool] = {}  # by the id of a class, which need not have a hash

    def is_lasting(value: object) -> bool:
        kind = type(value)
        if id(kind) not in finalized:
            finalized[id(kind)] = has_finalizer(kind)
        return not finalized[id(kind)]

    gc.unfreeze()
    containers = gc.get_objects()
    gc.freeze()
    left = 0
    for container in containers:
        found = [*referents(container), container]
        while found:
            left -= 1
            if left < 0:
                yield
                left = size
            each = found.pop()
            is_own = each is not container
            if references(each) >= COUNTED or (is_own and is_tracked(each)):  # a container has, or had, its own turn
                continue
            if is_lasting(each):
                at(id(each)).value = never
            if type(each) is code:  # which does not tell the collector what it has
                found += each.co_consts, each.co_names, each.co_varnames, each.co_cellvars, each.co_freevars
                found += each.co_name, each.co_qualname, each.co_filename
            if is_own:
                found += referents(each)
    # Code keeps the tuples that it was asked for, and a worker's first collection would write to each.
    del containers, container, found
    gc.freeze()
