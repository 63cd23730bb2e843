"""Which interpreters have immortal objects, and what has a finalizer; tests/integration/test_standing.py has the rest."""

from __future__ import annotations

import sys

from sandbox.engine import immortal

IS_ORDINARY = "t" not in sys.abiflags and not hasattr(sys, "gettotalrefcount")


def test_python_can_from_3_12_on() -> None:
    assert immortal.is_possible() == (sys.version_info >= (3, 12) and IS_ORDINARY)


def test_finalizers_are_found_without_asking_the_class() -> None:
    class Own(type):
        def __getattribute__(cls, name: str) -> object:
            raise RuntimeError("not to be asked")

    class Odd(metaclass=Own):
        pass

    class Finalized(metaclass=Own):
        def __del__(self) -> None:
            pass

    class Below(Finalized):
        pass

    assert [immortal.has_finalizer(kind) for kind in (Odd, Finalized, Below, type(sys.stdout), list)] == [
        *(False, True, True, True, False)
    ]
