"""A function and its arguments, made ready to travel into a sandbox; and the classes that may come back.

cloudpickle sends functions by value. The caller's own modules go by value as well, because a sandbox does not see the
caller's files; the standard library and installed packages go by reference. Must not know sandboxes.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import pickle
import sys
import threading
import types
from collections import ChainMap
from collections.abc import Mapping
from operator import methodcaller

from sandbox.engine import channel
from sandbox.errors import PluginExecutionError
from sandbox.parcels import PLAIN, Parcel, is_by_reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, ClassVar, NoReturn

_lock = threading.Lock()
_by_value: set[str] = set()
_seen_modules: tuple[int, str] = 0, ""  # how many there were, and the last one
_registered: frozenset[str] = frozenset()  # what cloudpickle was told to send by value, by us and by others, since then
_parcels: dict[int, Parcel] = {}  # by the function's identity
KEPT, KEPT_BYTES = 128, 1 << 16  # parcels that are kept, and how large each may be


def _forget_parent() -> None:
    """In a fork: another thread of the parent's may have had the lock, and been in the middle of what it is for."""
    global _lock, _seen_modules
    _lock = threading.Lock()
    _seen_modules = 0, ""
    _parcels.clear()


os.register_at_fork(after_in_child=_forget_parent)


def _refuse_file(file: io.IOBase) -> NoReturn:
    raise pickle.PicklingError(f"an open file ({getattr(file, 'name', '?')!r}) cannot travel: pass its content or its path")


def _reduce_view(view: memoryview) -> tuple[Any, ...]:
    """With what it shows, of a buffer of its own, which may be written to if this may."""
    data = view.tobytes() if view.readonly else bytearray(view.tobytes())
    kind = view.format.lstrip("@=" + ("<" if sys.byteorder == "little" else ">!"))  # as ctypes has it
    if (kind == "B" and view.ndim == 1) or not data:  # cast() knows no shape with a 0
        return memoryview, (data,)
    try:
        memoryview(data).cast(kind, view.shape)  # type: ignore[call-overload]
    except (ValueError, TypeError):
        raise pickle.PicklingError(f"a memoryview of format {view.format!r} cannot travel: pass an array, or bytes") from None
    return methodcaller("cast", kind, view.shape), (memoryview(data),)


def _refuse_generator(generator: object) -> NoReturn:
    raise pickle.PicklingError("a generator cannot travel: pass a list")


def _reduce_cached(cached: Any) -> str | tuple[Any, ...]:
    """A function under functools.cache or lru_cache, without what it has kept so far; by its name where the sandbox has it."""
    if not travels_by_value(cached.__module__ or ""):
        return str(cached.__qualname__)
    known = cached.cache_parameters()
    about = {name: value for name, value in vars(cached).items() if name != "cache_parameters"}
    make, info = vars(functools)["_lru_cache_wrapper"], vars(functools)["_CacheInfo"]
    return make, (cached.__wrapped__, known["maxsize"], known["typed"], info), about


def _reduce_cached_property(known: functools.cached_property[Any]) -> tuple[Any, ...]:
    """Without its lock, which it has before Python 3.12."""
    return functools.cached_property, (known.func,), {"attrname": known.attrname, "__doc__": known.__doc__}


def _newest_module() -> tuple[int, str]:
    """How many there are, and which came last."""
    while True:
        try:
            return len(sys.modules), next(reversed(sys.modules))
        except RuntimeError:  # another thread imports just now
            continue


def register_own_modules(library_path: Sequence[str]) -> None:
    """Mark every module that is neither standard library nor an installed package to travel by value."""
    global _seen_modules, _registered
    seen = _newest_module()
    if seen == _seen_modules and not _parcels:
        return
    import cloudpickle

    if seen == _seen_modules and cloudpickle.list_registry_pickle_by_value() == _registered:
        return
    _parcels.clear()  # a function may know one of them by its package
    folders = tuple(folder.rstrip("/") + "/" for folder in library_path)
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if (
            name in _by_value
            or top in ("sandbox", "plugin_sandbox_isolation_enhanced", "__main__")
            or not isinstance(module, types.ModuleType)
        ):
            continue
        file = getattr(module, "__file__", None)
        places = [file] if isinstance(file, str) else namespace_folders(module)
        if places and not any(place.startswith(folders) for place in places):
            cloudpickle.register_pickle_by_value(module)
            _by_value.add(name)
    _seen_modules, _registered = seen, frozenset(cloudpickle.list_registry_pickle_by_value())


def namespace_folders(module: types.ModuleType) -> list[str]:
    """Those of a package without an __init__.py, which has no file of its own."""
    path: Any = getattr(module, "__path__", None)
    if type(path).__name__ != "_NamespacePath":
        return []
    try:
        return [os.path.join(each, "") for each in path if isinstance(each, str)]
    except KeyError:  # the package above it is in sys.modules no more
        return []


# How else objects travel, by their class: entries of a pickler's dispatch table.
travels_as: dict[type, Callable[[Any], str | tuple[Any, ...]]] = {}

_pickler: type | None = None


def _pickler_class() -> type:
    """cloudpickle's Pickler that refuses what it would copy or lose without a word; made once, cloudpickle is heavy."""
    global _pickler
    if _pickler is not None:
        return _pickler
    import cloudpickle

    reduce_by_fields = cloudpickle.Pickler.dispatch_table[types.CodeType]

    def reduce_code(code: types.CodeType) -> tuple[object, ...]:
        try:
            return channel.reduce_code(code)
        except ValueError:  # a constant that no compiler makes: see `channel.reduce_code` for the name of its file
            build, arguments = reduce_by_fields(code)
            place = next(i for i, argument in enumerate(arguments) if isinstance(argument, str))  # co_filename is the first
            return build, (*arguments[:place], code.co_filename, *arguments[place + 1 :])

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = ChainMap(
            {
                io.TextIOWrapper: _refuse_file,
                io.BufferedReader: _refuse_file,
                io.BufferedWriter: _refuse_file,
                io.BufferedRandom: _refuse_file,
                io.FileIO: _refuse_file,
                types.GeneratorType: _refuse_generator,
                memoryview: _reduce_view,
                types.CodeType: reduce_code,
                type(functools.cache(len)): _reduce_cached,
                functools.cached_property: _reduce_cached_property,
            },
            travels_as,
            cloudpickle.Pickler.dispatch_table,
        )

    _pickler = Pickler
    return Pickler


def _dumps(value: object) -> bytes:
    with io.BytesIO() as buffer:
        _pickler_class()(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        return buffer.getvalue()


def pack(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], library_path: Sequence[str]) -> bytes:
    """The pickled (function, args, kwargs). Raises PluginExecutionError that names the part that cannot travel."""
    with _lock:
        register_own_modules(library_path)
    try:
        return _dumps((function, args, kwargs))
    except Exception as error:
        part, reason = _blame(function, args, kwargs, error)
        raise PluginExecutionError(
            f"{part} cannot travel into the sandbox: {reason}",
            exception_type=type(error).__name__,
            exception_message=str(error),
        ) from None


def parcel(function: Callable[..., Any], library_path: Sequence[str]) -> Parcel:
    """What is known about a function; `sealed` gives it without arguments. Raises PluginExecutionError for a generator."""
    known = _parcels.get(id(function))
    if known is not None:
        with _lock:
            register_own_modules(
                library_path
            )  # which forgets all of them where another module is there, or another way to send
        if _parcels.get(id(function)) is known and known.is_of(function):
            return known
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        name = getattr(function, "__qualname__", function)
        raise PluginExecutionError(f"{name} is a generator: return a list instead", exception_type="TypeError")
    return Parcel(function, first_wish(function))


def sealed(parcel: Parcel, function: Callable[..., Any], library_path: Sequence[str]) -> bytes:
    """What `pack` gives for the parcel's function without arguments, or where it `stands_alone` what it gives itself.

    Raises PluginExecutionError.
    """
    if parcel.payload:
        return parcel.payload
    with _lock:
        register_own_modules(library_path)
        seen = _seen_modules
    may_be_kept = type(function) is types.FunctionType and parcel.watch(function, travels_by_value)
    payload = parcel.alone() if may_be_kept and not is_by_reference(function, travels_by_value) else b""
    parcel.stands_alone = bool(payload)
    payload = payload or pack(function, (), {}, library_path)
    if may_be_kept and len(payload) <= KEPT_BYTES and parcel.is_of(function):
        with _lock:
            if seen == _seen_modules:  # else what goes by reference may go by value by now
                parcel.payload = payload
                if len(_parcels) >= KEPT:
                    _parcels.clear()
                _parcels[id(function)] = parcel
    return payload


def travels_by_value(module: str) -> bool:
    """Whether what is in this module does, and the module itself."""
    import cloudpickle

    registered = cloudpickle.list_registry_pickle_by_value()
    parts = module.split(".")
    return parts[0] == "__main__" or any(".".join(parts[:end]) in registered for end in range(1, len(parts) + 1))


def is_plain(args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether marshal carries all of it, for which nothing has to be pickled, and it is little."""
    values = (*args, *kwargs, *kwargs.values())
    return PLAIN.issuperset(map(type, values)) and sum(map(_bytes_of, values)) <= channel.SMALL


def _bytes_of(value: Any) -> int:
    """About how many bytes a plain value takes to travel."""
    kind = type(value)
    return len(value) if kind is str or kind is bytes else value.bit_length() >> 3 if kind is int else 0


def first_wish(function: Callable[..., Any]) -> str:
    """What a function gets before its arguments, as the name of its first parameter says: "", "env" or "state"."""
    if type(function) is types.FunctionType and not function.__dict__:  # as the signature says, and in no time
        name = function.__code__.co_varnames[0] if function.__code__.co_argcount else ""
    else:
        name = _first_parameter(function)
    return name if name == "state" else "env" if name in ("env", "environment") else ""


def _first_parameter(function: Callable[..., Any]) -> str:
    """Its name, if it can be given by position."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return ""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return parameters[0].name if parameters and parameters[0].kind in positional else ""


def _blame(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> tuple[str, str]:
    name = getattr(function, "__qualname__", repr(function))
    parts: list[tuple[str, object]] = [(f"args[{i}]", value) for i, value in enumerate(args)]
    parts += [(f"kwargs[{key!r}]", value) for key, value in kwargs.items()]
    closure = getattr(function, "__closure__", None) or ()
    code = getattr(function, "__code__", None)
    if code is not None:
        names = zip(code.co_freevars, closure, strict=False)
        parts += [
            (f"the closure variable {free!r} of {name}()", cell.cell_contents) for free, cell in names if _is_filled(cell)
        ]
        own_globals = getattr(function, "__globals__", {})
        parts += [(f"the global {used!r} of {name}()", own_globals[used]) for used in code.co_names if used in own_globals]
    for part, value in parts:
        try:
            _dumps(value)
        except Exception as reason:
            return part, _first_line(reason)
    return f"the function {name}()", _first_line(error)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (empty cells raise)
    except ValueError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class PlainTypes(Mapping[str, type]):
    """The enums and dataclasses that a reply may come back as: those of the function's own module and of its arguments.

    They are looked for when a reply has one.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[object]) -> None:
        self._of = function, args
        self._known: dict[str, type] | None = None

    @property
    def _types(self) -> dict[str, type]:
        if self._known is None:
            self._known = plain_types(*self._of)
        return self._known

    def __getitem__(self, name: str) -> type:
        return self._types[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)


def plain_types(function: Callable[..., Any], args: Sequence[object]) -> dict[str, type]:
    from dataclasses import is_dataclass
    from enum import Enum

    names: dict[str, type] = {}
    module = sys.modules.get(getattr(function, "__module__", "") or "")
    candidates = [*vars(module).values()] if module is not None else []
    candidates += [*getattr(function, "__globals__", {}).values(), *(type(value) for value in args)]
    for cell in getattr(function, "__closure__", None) or ():
        if _is_filled(cell):
            candidates.append(cell.cell_contents)
    for candidate in candidates:
        if isinstance(candidate, type) and (issubclass(candidate, Enum) or is_dataclass(candidate)):
            names[f"{candidate.__module__}:{candidate.__qualname__}"] = candidate
    return names
