"""Functions that are ready to travel into a sandbox, and those that were ready before and have not changed since.

To pickle a function takes longer than all else that its caller does for a small call. One whose pickled form can be told to be
the same is pickled once: everything that went into that form is still the very same object, and cannot change itself. Must
not know sandboxes.
"""

from __future__ import annotations

import inspect
import marshal
import sys
import types
import weakref
from operator import is_

from sandbox.engine import channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

PLAIN = frozenset((int, str, bytes, float, bool, type(None)))  # what marshal carries, and cannot change
MOST = 256  # things that one of those may depend on
OF_MODULE = ("__name__", "__package__", "__path__", "__file__")  # globals that travel with every function
MISSING = object()


def is_async(function: Callable[..., Any]) -> bool:
    """Whether what it returns is to be awaited: of an object its class tells."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class Parcel:
    """What is known about a function that travels.

    Attributes:
        payload: the form in which it travels, where that is kept: pickled, or if it `stands_alone` as `alone` has it.
        stands_alone: whether nothing else of its module travels with it.
        wish: what it gets before its arguments, see sandbox.transport.first_wish.
        name: its qualified name.
        file: where its code lies, "" where that cannot be told.
        is_coroutine: whether what it returns is to be awaited.
    """

    def __init__(self, function: Callable[..., Any], wish: str) -> None:
        self.payload = b""
        self.stands_alone = False
        self.wish = wish
        self.name: str = getattr(function, "__qualname__", type(function).__name__)
        self.file: str = getattr(getattr(function, "__code__", None), "co_filename", "")
        self.is_coroutine = is_async(function)
        self._functions: list[Watched] = []  # itself first

    def watch(self, function: types.FunctionType, by_value: Callable[[str], bool]) -> bool:
        """Take down what its pickled form depends on, before it is made; False where that may change by itself, or cannot be
        told.

        Args:
            by_value: tells of a module's name whether what is in it travels by value.
        """
        waiting, seen, looked_at = [function], {function}, 0
        while waiting:
            watched = Watched(waiting.pop())
            for _, value in watched.globals:
                if is_constant(value) or is_by_reference(value, by_value):
                    continue
                if not isinstance(value, types.FunctionType):
                    return False
                if value not in seen:
                    seen.add(value)
                    waiting.append(value)
            looked_at += len(watched.globals)
            if looked_at > MOST or not watched.is_constant():
                return False
            watched.hold_loosely()
            self._functions.append(watched)
        return True

    def alone(self) -> bytes:
        """The form of a function that is watched and knows nothing of its module, which takes no pickle to read: see
        sandbox.engine.worker.alone. b"" for others."""
        (watched, *others) = self._functions
        if others or any(value is not MISSING and name not in OF_MODULE for name, value in watched.globals):
            return b""
        if any(type(note) is not str for note in watched.notes.values()):
            return b""
        known = {name: value for name, value in watched.globals if value is not MISSING}
        form: tuple[Any, ...] = (*watched.attributes, watched.notes, known)
        try:
            return marshal.dumps(form, channel.PLAIN)
        except ValueError:  # code may hold any constant, if it was not compiled
            return b""

    def is_of(self, function: object) -> bool:
        """Whether it is this function's, and all that it depends on is as it was."""
        return (
            bool(self._functions)
            and self._functions[0].function() is function
            and all(watched.is_as_it_was() for watched in self._functions)
        )


class Watched:
    """One function of those that travel by value with a parcel, as it was; nothing is kept for longer by that."""

    def __init__(self, function: types.FunctionType) -> None:
        self.function = weakref.ref(function)
        self.attributes = attributes_of(function)
        self.notes = dict(function.__annotations__)
        self.is_bare = is_bare(function)
        names = dict.fromkeys((*OF_MODULE, *names_in(function.__code__)))
        self.globals: list[tuple[str, object]] = [(name, function.__globals__.get(name, MISSING)) for name in names]

    def is_constant(self) -> bool:
        return self.is_bare and all(map(is_constant, self.attributes[1:])) and all(map(is_name, self.notes.values()))

    def hold_loosely(self) -> None:
        """Of other functions, which know all of their modules, only that they are the same."""
        self.globals = [
            (name, weakref.ref(value) if isinstance(value, types.FunctionType) else value) for name, value in self.globals
        ]

    def is_as_it_was(self) -> bool:
        function = self.function()
        if function is None or not is_bare(function) or function.__annotations__ != self.notes:
            return False
        if not are_same(attributes_of(function), self.attributes):
            return False
        found = function.__globals__
        for name, known in self.globals:
            value = found.get(name, MISSING)
            if value is not known and not (type(known) is weakref.ref and known() is value):
                return False
        return True


def attributes_of(function: types.FunctionType) -> tuple[object, ...]:
    """What travels of it, its code first."""
    f = function
    return f.__code__, f.__defaults__, f.__name__, f.__qualname__, f.__module__, f.__doc__


def are_same(these: tuple[object, ...], those: tuple[object, ...]) -> bool:
    """Each the very same object."""
    return all(map(is_, these, those))


def is_bare(function: types.FunctionType) -> bool:
    """Whether there is nothing that could change but its attributes and annotations."""
    return (
        function.__closure__ is None
        and function.__kwdefaults__ is None
        and not function.__dict__
        and not getattr(function, "__type_params__", ())
    )


def is_name(annotation: object) -> bool:
    """Of a type of Python's own, or as text."""
    return type(annotation) is str or (type(annotation) is type and annotation.__module__ == "builtins")


def is_constant(value: object) -> bool:
    if type(value) is tuple:
        return all(map(is_constant, value))
    return value is MISSING or type(value) in PLAIN


def is_by_reference(value: object, by_value: Callable[[str], bool]) -> bool:
    """Whether only its name travels: a module, or a class or function of one."""
    if isinstance(value, types.ModuleType):
        return sys.modules.get(value.__name__) is value and not by_value(value.__name__)
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) or not isinstance(name, str):
        return False
    if not isinstance(module, str) or by_value(module):
        return False
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def names_in(code: types.CodeType) -> Iterator[str]:
    """All names that it may look up in its globals, and more."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)
