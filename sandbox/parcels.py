"""Functions that are ready to travel into a sandbox, and those that were ready before and have not changed since.

To pickle a function takes longer than all else that its caller does for a small call. One whose pickled form can be told to be
the same is pickled once: everything that went into that form is still the very same object, and cannot change itself. Must
not know sandboxes.
"""

from __future__ import annotations

import inspect
import sys
import types
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

PLAIN = frozenset((int, str, bytes, float, bool, type(None)))  # what marshal carries, and cannot change
MOST = 256  # things that one of those may depend on
OF_MODULE = ("__name__", "__package__", "__path__", "__file__")  # globals that travel with every function
ATTRIBUTES = ("__code__", "__defaults__", "__name__", "__qualname__", "__module__", "__doc__")
MISSING = object()


class Parcel:
    """What is known about a function that travels.

    Attributes:
        payload: its pickled form, where that is kept.
        wish: what it gets before its arguments, see sandbox.transport.first_wish.
        name: its qualified name.
        file: where its code lies, "" where that cannot be told.
        is_coroutine: whether what it returns is to be awaited.
    """

    def __init__(self, function: Callable[..., Any], wish: str) -> None:
        self.payload = b""
        self.wish = wish
        self.name: str = getattr(function, "__qualname__", type(function).__name__)
        self.file: str = getattr(getattr(function, "__code__", None), "co_filename", "")
        self.is_coroutine = inspect.iscoroutinefunction(function)
        self._function: weakref.ref[Callable[..., Any]] | None = None
        self._globals: list[tuple[dict[str, Any], str, object]] = []
        self._attributes: list[tuple[types.FunctionType, str, object]] = []
        self._annotations: list[tuple[types.FunctionType, dict[str, object]]] = []

    def watch(self, function: types.FunctionType, by_value: Callable[[str], bool]) -> bool:
        """Take down what its pickled form depends on, before it is made; False where that may change by itself, or cannot be
        told.

        Args:
            by_value: tells of a module's name whether what is in it travels by value.
        """
        if not self._depend(function, by_value):
            return False
        self._function = weakref.ref(function)
        return True

    def is_of(self, function: object) -> bool:
        """Whether it is this function's, and all that it depends on is as it was."""
        if self._function is None or self._function() is not function:
            return False
        for holder, name, value in self._globals:
            if holder.get(name, MISSING) is not value:
                return False
        for each, name, value in self._attributes:
            if getattr(each, name) is not value:
                return False
        return all(is_bare(each) and each.__annotations__ == annotations for each, annotations in self._annotations)

    def _depend(self, function: types.FunctionType, by_value: Callable[[str], bool]) -> bool:
        waiting, seen = [function], {function}
        while waiting:
            each = waiting.pop()
            if not is_bare(each) or not all(map(is_name, each.__annotations__.values())) or len(self._globals) > MOST:
                return False
            self._attributes += [(each, name, getattr(each, name)) for name in ATTRIBUTES]
            self._annotations.append((each, dict(each.__annotations__)))
            if not all(is_constant(getattr(each, name)) for name in ATTRIBUTES if name != "__code__"):
                return False
            for name in (*OF_MODULE, *names_in(each.__code__)):
                value = each.__globals__.get(name, MISSING)
                if not (is_constant(value) or is_by_reference(value, by_value)):
                    if not isinstance(value, types.FunctionType):
                        return False
                    if value not in seen:
                        seen.add(value)
                        waiting.append(value)
                self._globals.append((each.__globals__, name, value))
        return True


def is_bare(function: types.FunctionType) -> bool:
    """Whether it has nothing that could change but what is looked at: see ATTRIBUTES."""
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
