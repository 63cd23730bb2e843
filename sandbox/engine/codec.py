"""The reply codec: turns what a plugin returned into bytes inside the sandbox, and those bytes into a value on the host.

`decode` reads hostile bytes. It builds values of a closed list of types, never imports a module, calls a function or makes
an instance that the bytes name, and is bounded in size, depth, number of values and time. `encode` runs beside the
plugin, so nothing here trusts it. Must not know about sandboxes, channels or limits in megabytes; must not import
anything heavy: modules of the rarer types are imported only when such a value is met.

The wire. A message is a head and six columns: `ops` (one byte per value), `counts` (u32: lengths), `ints` (i64), `floats`
(f64), `text` (UTF-8, lone surrogates allowed) and `raw`. A value is its op and what the op takes from the columns, so
`[1, 2.5, "ab"]` is ops `l*ifs`, counts `3 2`, ints `1`, floats `2.5`, text `ab`. The items of a container that are all
int, all float or all str are one slice of a column. The reason for columns is that they can be bounded *before* anything
is built: in a nested format such as MessagePack, 16 MB of one-byte empty lists are more than 1 GB of objects by the time
somebody can count them. Numbers are in the machine's byte order: both ends are on one machine.

What bounds the host's time:

* every value counts towards `max_nodes`, the slow kinds (paths, fractions, arrays, ...) several times;
* integers are read as binary (linear), fractions are short (their gcd is quadratic);
* the hashes of numbers, tuples and frozensets are not salted, so a hostile reply can choose colliding keys.
  `_Reader.check_keys` predicts what a hash table will cost before one is built, and refuses what would be slow.

What is merely large is not slow: a numpy array or bytes is one value, read by one copy, or by none: see `decode`.

Dict keys that are NaN stay separate keys, each one its own object, as they were; keys that are equal (1, 1.0 and True, or
0.0 and -0.0) cannot come from a dict, and a message that has them is refused.
"""

from __future__ import annotations

import sys
from struct import Struct, pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import date, datetime, time, timedelta, tzinfo
    from decimal import Context, Decimal
    from fractions import Fraction
    from pathlib import PurePath
    from typing import Any, NoReturn
    from uuid import UUID

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_NODES = 1_000_000

MAX_NAME = 1 << 10  # characters of a class's name, "module:qualname"
MAX_PATH = 32 << 10  # characters of a path: PATH_MAX is 4096, but pure paths are not bound by it
MAX_FRACTION_BITS = 16 << 10
MAX_EMPTY = 4096  # bytes of an item of an array that has none
MAX_DIMENSIONS = 32  # of an array, as numpy 1 has it

LARGE = 1 << 16  # bytes of a message from which on an array may stay in it

SLOW = 4  # what a value counts that takes the reader microseconds

_MAGIC = b"psi1"
_HEAD = len(_MAGIC) + 6 * 4
_U32_MAX = (1 << 32) - 1
_I64_MIN, _I64_MAX = -(1 << 63), (1 << 63) - 1

NONE, TRUE, FALSE, INT, BIGINT, FLOAT, COMPLEX = b"NTFiIfc"
STR, BYTES, BYTEARRAY = b"sbB"
LIST, TUPLE, DICT, SET, FROZENSET = b"ltdSZ"
DATETIME, DATE, TIME, TIMEDELTA = b"DamE"
DECIMAL, FRACTION, UUID_, PATH = b"xquP"
ENUM, DATACLASS = b"eC"
NDARRAY, NPSCALAR, NPSTR, NPBYTES = b"AnUV"
# After a container's op: how its items are written.
MIXED, INTS, FLOATS, STRS = b"*123"

# `ints` holds this in the place of a UTC offset for naive times.
_NAIVE = _I64_MIN

_PATHS = ("PosixPath", "PurePosixPath", "PureWindowsPath")


class CodecError(ValueError):
    """A value that cannot be sent (the message names the way to it), or a message that is malformed."""


class ReplyTooLarge(CodecError):
    """The reply has more bytes than allowed. `allowed` and `used` are bytes; `used` is a lower bound: encoding stops there."""

    def __init__(self, allowed: int, used: int) -> None:
        super().__init__(allowed, used)
        self.allowed = allowed
        self.used = used

    def __str__(self) -> str:
        return f"the reply has at least {self.used} bytes, allowed are {self.allowed}"


class _Frozen:
    """A record whose slots are set once. Not made by `dataclasses`: importing that costs more than this module."""

    __slots__: tuple[str, ...] = ()

    def __init__(self, *values: Any) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is read-only")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is read-only")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._values()))})"

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), self._values()


class EnumRecord(_Frozen):
    """An enum member whose class the host did not list. `type` is "module:qualname"."""

    __slots__ = ("type", "name", "value")  # noqa: RUF023 - the order of the arguments
    type: str
    name: str
    value: Any

    def __init__(self, type: str, name: str, value: Any) -> None:
        super().__init__(type, name, value)


class DataclassRecord(_Frozen):
    """A dataclass instance whose class the host did not list. `fields` maps names to values, in the order of declaration."""

    __slots__ = ("type", "fields")  # noqa: RUF023
    type: str
    fields: dict[str, Any]

    def __init__(self, type: str, fields: dict[str, Any]) -> None:
        super().__init__(type, fields)

    def __hash__(self) -> int:
        return hash((self.type, tuple(self.fields.items())))


def type_name(cls: type) -> str:
    """The name under which a class travels, and the key of `decode`'s `types`: "module:qualname"."""
    return f"{cls.__module__}:{cls.__qualname__}"


# --- Both ends ---------------------------------------------------------------------------------------------------------


def encode(value: object, *, max_depth: int = MAX_DEPTH, max_bytes: int = MAX_BYTES, max_nodes: int = MAX_NODES) -> bytes:
    """The bytes of a reply.

    Raises CodecError, with the way to the offending value as in `result["a"][3]: Socket`, and ReplyTooLarge.
    """
    scalar = _scalar_message(value) if max_bytes >= _HEAD + _LONGEST and max_nodes > 0 else None
    if scalar is not None:
        return scalar
    writer = _Writer(max_depth, min(max_bytes, _U32_MAX), max_nodes)
    try:
        writer.spend(1)
        writer.value(value, 0)
        return writer.message()
    except _Refused as refused:
        raise CodecError(f"{_path(refused)}: {refused.reason}") from None
    except (CodecError, MemoryError):
        raise
    except RecursionError:
        raise CodecError("result: nested too deep for the interpreter's stack") from None
    except Exception as error:  # a value may run code of its class while it is looked at
        raise CodecError(f"result: cannot be read ({type(error).__name__})") from error


def bulk_at(data: bytes) -> int:
    """Where in a message the data of its first array or bytes begins."""
    return len(data) - int.from_bytes(data[_HEAD - 4 : _HEAD], sys.byteorder)


def decode(
    data: bytes | bytearray | memoryview,
    *,
    max_bytes: int,
    max_depth: int = MAX_DEPTH,
    max_nodes: int = MAX_NODES,
    types: Mapping[str, type[Any]] | None = None,
) -> Any:
    """The value in hostile bytes.

    Where `data` is writable it is taken over: a large array may lie in it.

    `types` maps "module:qualname" (see `type_name`) to the enums and dataclasses that may be built; of a dataclass no
    method runs, so its fields are unchecked (one that is a dict key or in a set is hashed, by its own `__hash__`).
    Other enums and dataclasses become an EnumRecord or a DataclassRecord. Raises CodecError for every malformed message.
    """
    if len(data) > max_bytes:
        raise ReplyTooLarge(max_bytes, len(data))
    try:
        if len(data) <= _HEAD + _LONGEST and max_nodes > 0:
            scalar = _scalar_of(bytes(data))
            if scalar is not None:
                return scalar[0]
        reader = _Reader(data, max_depth, max_nodes, types or {})
        reader.spend(1)
        value = reader.value(0)
        reader.finish()
        return value
    except CodecError:
        raise
    except RecursionError:
        raise CodecError("malformed reply: nested too deep for the interpreter's stack") from None
    except Exception as error:  # whatever constructors of the closed list have to say about hostile arguments
        raise CodecError(f"malformed reply: {type(error).__name__}: {ascii(str(error))[:200]}") from None


# --- A small scalar alone ----------------------------------------------------------------------------------------------
# What most calls return. The message is the same; it is only put together, and taken apart, in one step.

_SHORT = 64  # characters of such a text
_LONGEST = 5 + 4 * _SHORT  # bytes of such a message behind its head
_CONSTANTS: dict[bytes, tuple[bool | None]] = {
    _MAGIC + pack("6I", 1, 0, 0, 0, 0, 0) + bytes((op,)): (value,) for op, value in ((NONE, None), (TRUE, True), (FALSE, False))
}
_CONSTANT_MESSAGES = {value: message for message, (value,) in _CONSTANTS.items()}
_INT_HEAD = _MAGIC + pack("6I", 1, 0, 8, 0, 0, 0) + bytes((INT,))
_FLOAT_HEAD = _MAGIC + pack("6I", 1, 0, 0, 8, 0, 0) + bytes((FLOAT,))
_INT_MESSAGE, _FLOAT_MESSAGE = Struct(f"={len(_INT_HEAD)}sq"), Struct(f"={len(_FLOAT_HEAD)}sd")
_STR_HEAD = Struct(f"={len(_MAGIC)}s6IcI")


def _scalar_message(value: Any) -> bytes | None:
    """The message of None, a bool, an int, a float or a short text; None for another value."""
    kind = type(value)
    if kind is int:
        return _INT_MESSAGE.pack(_INT_HEAD, value) if _I64_MIN <= value <= _I64_MAX else None
    if kind is str:
        if len(value) > _SHORT:
            return None
        text: bytes = value.encode("utf-8", "surrogatepass")
        return _STR_HEAD.pack(_MAGIC, 1, 4, 0, 0, len(text), 0, b"s", len(value)) + text
    if kind is float:
        return _FLOAT_MESSAGE.pack(_FLOAT_HEAD, value)
    return _CONSTANT_MESSAGES[value] if value is None or kind is bool else None


def _scalar_of(data: bytes) -> tuple[Any] | None:
    """(value,) of a message that is a scalar alone; None for every other one, well formed or not."""
    if data[: len(_INT_HEAD)] == _INT_HEAD and len(data) == _INT_MESSAGE.size:
        return (_INT_MESSAGE.unpack(data)[1],)
    if data[: len(_FLOAT_HEAD)] == _FLOAT_HEAD and len(data) == _FLOAT_MESSAGE.size:
        return (_FLOAT_MESSAGE.unpack(data)[1],)
    if len(data) >= _STR_HEAD.size and data[_HEAD] == STR:
        magic, *lengths, _, characters = _STR_HEAD.unpack_from(data)
        text = str(data[_STR_HEAD.size :], "utf-8", "surrogatepass")
        is_whole = lengths == [1, 4, 0, 0, len(data) - _STR_HEAD.size, 0] and characters == len(text)
        return (text,) if magic == _MAGIC and is_whole else None
    return _CONSTANTS.get(data)


class _Refused(Exception):
    """A value cannot be sent; each container on the way out adds its step to `steps`, innermost first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[str] = []


def _path(refused: _Refused) -> str:
    path = "result" + "".join(reversed(refused.steps))
    return path if len(path) <= 400 else f"{path[:200]} ... {path[-190:]}"


class _Writer:
    """The columns of a message while it is written."""

    def __init__(self, max_depth: int, max_bytes: int, max_nodes: int) -> None:
        self.max_depth = max_depth
        self.max_bytes = max_bytes
        self.max_nodes = max_nodes
        self.nodes = 0
        self.bulk = _HEAD  # lower bound of the bytes used: text and raw
        self.writers = dict(_WRITERS)
        self.ops = bytearray()
        self.counts: list[int] = []
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.text: list[str] = []
        self.raw: list[bytes | bytearray | memoryview] = []

    def value(self, value: Any, depth: int) -> None:
        writer = self.writers.get(type(value))
        if writer is None:
            writer = self.writers[type(value)] = _find_writer(type(value))
        writer(self, value, depth)

    def step(self, value: Any, depth: int, name: str) -> None:
        """A value that is reached by one named step."""
        try:
            self.value(value, depth)
        except _Refused as refused:
            refused.steps.append(name)
            raise

    def sequence(self, items: list[Any], depth: int, name: Callable[[int], str]) -> None:
        """The items of a container at this depth; `name` gives the step to the item of an index."""
        self.spend(len(items))
        self.counts.append(len(items))
        kinds = set(map(type, items))
        if len(kinds) == 1 and self._run(kinds.pop(), items):
            return
        self.ops.append(MIXED)
        index = 0
        try:
            for index, item in enumerate(items):  # noqa: B007 - the handler names it
                self.value(item, depth)
        except _Refused as refused:
            refused.steps.append(name(index))
            raise

    def _run(self, kind: type, items: list[Any]) -> bool:
        """Write items of one type as a slice of a column, where there is one for them."""
        if kind is int:
            if min(items) < _I64_MIN or max(items) > _I64_MAX:
                return False
            self.ints.extend(items)
            self.ops.append(INTS)
        elif kind is float:
            self.floats.extend(items)
            self.ops.append(FLOATS)
        elif kind is str:
            lengths = list(map(len, items))
            self.room(sum(lengths))
            self.bulk += sum(lengths)
            self.counts.extend(lengths)
            self.text.extend(items)
            self.ops.append(STRS)
        else:
            return False
        return True

    def string(self, value: str) -> None:
        self.room(len(value))
        self.bulk += len(value)
        self.counts.append(len(value))
        self.text.append(value)

    def blob(self, value: bytes | bytearray | memoryview) -> None:
        self.room(len(value))
        self.bulk += len(value)
        self.counts.append(len(value))
        self.raw.append(value)

    def room(self, size: int) -> None:
        """Stop before a value that is too large is copied."""
        if self.bulk + size > self.max_bytes:
            raise ReplyTooLarge(self.max_bytes, self.bulk + size)

    def spend(self, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > self.max_nodes:
            raise _Refused(f"more than {self.max_nodes} values (bytes or a numpy array count as one)")

    def deeper(self, depth: int) -> int:
        if depth >= self.max_depth:
            raise _Refused(f"nested deeper than the allowed depth of {self.max_depth}, or contains itself")
        return depth + 1

    def message(self) -> bytes:
        text = "".join(self.text).encode("utf-8", "surrogatepass")
        counts = pack(f"{len(self.counts)}I", *self.counts)
        ints = pack(f"{len(self.ints)}q", *self.ints)
        floats = pack(f"{len(self.floats)}d", *self.floats)
        columns = (self.ops, counts, ints, floats, text)
        lengths = (*map(len, columns), sum(map(len, self.raw)))
        used = _HEAD + sum(lengths)
        if used > self.max_bytes:
            raise ReplyTooLarge(self.max_bytes, used)
        return b"".join((_MAGIC, pack("6I", *lengths), *columns, *self.raw))


class _Column:
    """One column of a message while it is read. Reading past its end raises."""

    __slots__ = ("at", "items")

    def __init__(self, items: Any) -> None:
        self.items = items
        self.at = 0

    def one(self) -> int:
        """The next item."""
        item: int = self.items[self.at]
        self.at += 1
        return item

    def take(self, count: int) -> Any:
        """The next items, as a slice."""
        end = self.at + count
        if end > len(self.items):
            raise CodecError("malformed reply: a column is cut short")
        part = self.items[self.at : end]
        self.at = end
        return part


class _Reader:
    """The columns of a hostile message while it is read, and what reading it may still cost."""

    def __init__(
        self, data: bytes | bytearray | memoryview, max_depth: int, max_nodes: int, types: Mapping[str, type[Any]]
    ) -> None:
        view = memoryview(data).cast("B")
        self.size = len(view)
        if len(view) < _HEAD or view[: len(_MAGIC)] != _MAGIC:
            raise CodecError("malformed reply: no head")
        lengths = view[len(_MAGIC) : _HEAD].cast("I").tolist()
        if _HEAD + sum(lengths) != len(view):
            raise CodecError("malformed reply: the columns do not fill it")
        parts = []
        end = _HEAD
        for length in lengths:
            parts.append(view[end : end + length])
            end += length
        self.ops = iter(bytes(parts[0]))
        self.counts = _Column(parts[1].cast("I"))
        self.ints = _Column(parts[2].cast("q"))
        self.floats = _Column(parts[3].cast("d"))
        self.text = _Column(str(parts[4], "utf-8", "surrogatepass"))
        self.raw = _Column(parts[5])
        self.max_depth = max_depth
        self.max_nodes = max_nodes
        self.types = types
        self.nodes = 0
        # Comparing all values read so far with equal ones costs about `nodes + rivals`: see check_keys.
        self.rivals = 0
        self.comparisons = 0
        self.steps_left = MAX_STEPS

    def value(self, depth: int) -> Any:
        reader = _READERS.get(next(self.ops))
        if reader is None:
            raise CodecError("malformed reply: unknown op")
        return reader(self, depth)

    def sequence(self, depth: int) -> list[Any]:
        count = self.counts.one()
        self.spend(count)  # before anything is built
        mode = next(self.ops)
        items: list[Any]
        if mode == MIXED:
            items = [self.value(depth) for _ in range(count)]
        elif mode == INTS:
            items = self.ints.take(count).tolist()
        elif mode == FLOATS:
            items = self.floats.take(count).tolist()
        elif mode == STRS:
            items = [self.text.take(length) for length in self.counts.take(count)]
        else:
            raise CodecError("malformed reply: unknown kind of sequence")
        return items

    def string(self, longest: int) -> str:
        length = self.counts.one()
        if length > longest:
            raise CodecError("malformed reply: a name or number is too long")
        text: str = self.text.take(length)
        return text

    def blob(self) -> memoryview:
        view: memoryview = self.raw.take(self.counts.one())
        return view

    def spend(self, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > self.max_nodes:
            raise CodecError(f"the reply has more than {self.max_nodes} values")

    def deeper(self, depth: int) -> int:
        if depth >= self.max_depth:
            raise CodecError(f"the reply is nested deeper than the allowed depth of {self.max_depth}")
        return depth + 1

    def finish(self) -> None:
        columns = (self.counts, self.ints, self.floats, self.text, self.raw)
        if next(self.ops, None) is not None or any(column.at != len(column.items) for column in columns):
            raise CodecError("malformed reply: something is left over")

    def check_keys(self, keys: list[Any], since: int, *, is_set: bool) -> None:
        """Refuse keys that would make a slow hash table; `since` is `self.weight()` before they were read.

        Two ways to be slow. Keys with *equal* hashes are compared with each other, and comparing frozensets compares
        their members in the same way, so nested ones multiply: charge what comparing can cost at worst. Keys with
        *different* hashes can still walk over the same slots: count the steps, for tables where it can matter.
        """
        if len(keys) < 2 or _SALTED.issuperset(map(type, keys)):
            return
        hashes = list(map(hash, keys))
        ordered = sorted(hashes)  # sorting does not care for collisions
        if any(map(int.__eq__, ordered, ordered[1:])):
            extra = (self.weight() - since) * (_longest_run(ordered) - 1)
            self.rivals += extra
            self.comparisons += extra
            if self.comparisons > MAX_COMPARISONS:
                raise CodecError("the reply has too many keys with equal hashes")
        if len(hashes) > SMALL_TABLE:
            self.steps_left = _steps_left(hashes, self.steps_left, is_set=is_set)
            if self.steps_left < 0:
                raise CodecError("the reply has too many keys whose hashes collide")

    def weight(self) -> int:
        return self.nodes + self.rivals


# --- Hash tables -------------------------------------------------------------------------------------------------------

# Hashes that a sandbox cannot foresee, because they are salted (unless PYTHONHASHSEED=0 takes the salt away).
_SALTED: frozenset[type] = frozenset((str, bytes)) if sys.flags.hash_randomization else frozenset()

SMALL_TABLE = 4096  # up to here a table that is as bad as can be costs less than predicting it would
# Per message. A random key takes 0.7 steps on average, a float that differs from the others in its high bits only up to 8;
# a flood of 20,000 keys takes 50 million, and four times that for twice the keys.
MAX_STEPS = 4_000_000
MAX_COMPARISONS = 8_000_000


def _longest_run(ordered: list[int]) -> int:
    longest = run = 1
    for index in range(1, len(ordered)):
        run = run + 1 if ordered[index] == ordered[index - 1] else 1
        longest = max(longest, run)
    return longest


def _steps_left(hashes: list[int], steps_left: int, *, is_set: bool) -> int:
    """What is left after the steps that CPython takes to put keys with these hashes, in this order, into a dict or a set.

    A table grows by powers of two and is rebuilt each time, inside one call that cannot be interrupted. So each size
    that it passes through is tried with the keys that it can hold: 2/3 of its slots for a dict, 3/5 for a set
    (Objects/dictobject.c, Objects/setobject.c). Sets may skip a size, so for them the one after the last is tried too.
    """
    fill, slots = (3, 5) if is_set else (2, 3)
    walk = _walk_set if is_set else _walk_dict
    size = SMALL_TABLE
    held = hashes[:0]
    while len(held) < len(hashes) and steps_left >= 0:
        held = hashes[: size * fill // slots]
        steps_left = walk(held, size, steps_left)
        size *= 2
    return walk(hashes, size, steps_left) if is_set else steps_left


def _walk_dict(hashes: list[int], size: int, steps_left: int) -> int:
    mask = size - 1
    taken = bytearray(size)
    for key in hashes:
        slot = key & mask
        if taken[slot]:
            perturb = key & 0xFFFF_FFFF_FFFF_FFFF
            while taken[slot]:
                perturb >>= 5
                slot = (slot * 5 + perturb + 1) & mask
                steps_left -= 1
            if steps_left < 0:
                break
        taken[slot] = 1
    return steps_left


def _walk_set(hashes: list[int], size: int, steps_left: int) -> int:
    """Sets look at 9 slots more after each one (LINEAR_PROBES), unless that is past the table's end."""
    mask = size - 1
    taken = bytearray(size)
    for key in hashes:
        slot = key & mask
        if taken[slot]:
            perturb = key & 0xFFFF_FFFF_FFFF_FFFF
            while (free := taken.find(0, slot, slot + (10 if slot + 9 <= mask else 1))) < 0:
                perturb >>= 5
                slot = (slot * 5 + perturb + 1) & mask
                steps_left -= 1
            if steps_left < 0:
                break
            slot = free
        taken[slot] = 1
    return steps_left


# --- Scalars -----------------------------------------------------------------------------------------------------------


def _write_none(w: _Writer, value: None, depth: int) -> None:
    w.ops.append(NONE)


def _read_none(r: _Reader, depth: int) -> None:
    return None


def _write_bool(w: _Writer, value: bool, depth: int) -> None:
    w.ops.append(TRUE if value else FALSE)


def _read_true(r: _Reader, depth: int) -> bool:
    return True


def _read_false(r: _Reader, depth: int) -> bool:
    return False


def _write_int(w: _Writer, value: int, depth: int) -> None:
    if _I64_MIN <= value <= _I64_MAX:
        w.ops.append(INT)
        w.ints.append(value)
        return
    size = value.bit_length() // 8 + 1
    w.room(size)
    w.spend(size // 64)
    w.ops.append(BIGINT)
    w.blob(value.to_bytes(size, "little", signed=True))


def _read_int(r: _Reader, depth: int) -> int:
    return r.ints.one()


def _read_bigint(r: _Reader, depth: int) -> int:
    raw = r.blob()
    r.spend(len(raw) // 64)  # hashing and comparing it is not free
    return int.from_bytes(raw, "little", signed=True)


def _write_float(w: _Writer, value: float, depth: int) -> None:
    w.ops.append(FLOAT)
    w.floats.append(value)


def _read_float(r: _Reader, depth: int) -> float:
    return r.floats.one()


def _write_complex(w: _Writer, value: complex, depth: int) -> None:
    w.ops.append(COMPLEX)
    w.floats.append(value.real)
    w.floats.append(value.imag)


def _read_complex(r: _Reader, depth: int) -> complex:
    return complex(*r.floats.take(2))


def _write_str(w: _Writer, value: str, depth: int) -> None:
    w.ops.append(STR)
    w.string(value)


def _read_str(r: _Reader, depth: int) -> str:
    return r.string(_U32_MAX)


def _write_bytes(w: _Writer, value: bytes, depth: int) -> None:
    w.ops.append(BYTES)
    w.blob(value)


def _read_bytes(r: _Reader, depth: int) -> bytes:
    return bytes(r.blob())


def _write_bytearray(w: _Writer, value: bytearray, depth: int) -> None:
    w.ops.append(BYTEARRAY)
    w.blob(value)


def _read_bytearray(r: _Reader, depth: int) -> bytearray:
    return bytearray(r.blob())


# --- Containers --------------------------------------------------------------------------------------------------------


def _index_step(index: int) -> str:
    return f"[{index}]"


def _member_step(index: int) -> str:
    return "{...}"


def _key_step(key: object) -> str:
    if type(key) is str:
        return f'["{ascii(key[:40])[1:-1]}"]'
    if type(key) is bytes:
        return f"[{key[:40]!r}]"
    if key is None or type(key) in (bool, float) or (type(key) is int and key.bit_length() <= 64):
        return f"[{key!r}]"
    return f"[{type(key).__name__}(...)]"


def _write_list(w: _Writer, value: list[Any], depth: int) -> None:
    inner = w.deeper(depth)
    w.ops.append(LIST)
    w.sequence(value, inner, _index_step)


def _read_list(r: _Reader, depth: int) -> list[Any]:
    return r.sequence(r.deeper(depth))


def _write_tuple(w: _Writer, value: tuple[Any, ...], depth: int) -> None:
    inner = w.deeper(depth)
    w.ops.append(TUPLE)
    w.sequence(list(value), inner, _index_step)


def _read_tuple(r: _Reader, depth: int) -> tuple[Any, ...]:
    return tuple(r.sequence(r.deeper(depth)))


def _write_dict(w: _Writer, value: dict[Any, Any], depth: int) -> None:
    inner = w.deeper(depth)
    w.ops.append(DICT)
    keys = list(value)
    w.sequence(keys, inner, lambda index: f".keys()[{index}]")
    w.sequence(list(value.values()), inner, lambda index: _key_step(keys[index]))


def _read_dict(r: _Reader, depth: int) -> dict[Any, Any]:
    inner = r.deeper(depth)
    since = r.weight()
    keys = r.sequence(inner)
    r.check_keys(keys, since, is_set=False)
    result = dict(zip(keys, r.sequence(inner), strict=True))
    if len(result) != len(keys):
        raise CodecError("malformed reply: a dict has a key twice")
    return result


def _write_set(w: _Writer, value: set[Any], depth: int) -> None:
    inner = w.deeper(depth)
    w.ops.append(SET)
    w.sequence(list(value), inner, _member_step)


def _write_frozenset(w: _Writer, value: frozenset[Any], depth: int) -> None:
    inner = w.deeper(depth)
    w.ops.append(FROZENSET)
    w.sequence(list(value), inner, _member_step)


def _members(r: _Reader, depth: int) -> list[Any]:
    inner = r.deeper(depth)
    since = r.weight()
    members = r.sequence(inner)
    r.check_keys(members, since, is_set=True)
    return members


def _read_set(r: _Reader, depth: int) -> set[Any]:
    members = _members(r, depth)
    result = set(members)
    if len(result) != len(members):
        raise CodecError("malformed reply: a set has a member twice")
    return result


def _read_frozenset(r: _Reader, depth: int) -> frozenset[Any]:
    members = _members(r, depth)
    result = frozenset(members)
    if len(result) != len(members):
        raise CodecError("malformed reply: a frozenset has a member twice")
    return result


# --- Dates and times ---------------------------------------------------------------------------------------------------
# Time zones travel as their offset from UTC at that moment: a name would have the host open a file of that name.


def _write_offset(w: _Writer, value: datetime | time) -> None:
    from datetime import timedelta

    offset = value.utcoffset()
    if offset is not None:
        w.ints.append(offset // timedelta(microseconds=1))
    elif value.tzinfo is None:
        w.ints.append(_NAIVE)
    else:
        raise _Refused(f"{type(value).__name__} with a time zone that gives it no offset from UTC")


def _read_offset(r: _Reader) -> tzinfo | None:
    from datetime import timedelta, timezone

    offset = r.ints.one()
    return None if offset == _NAIVE else timezone(timedelta(microseconds=offset))


def _write_datetime(w: _Writer, value: datetime, depth: int) -> None:
    w.ops.append(DATETIME)
    w.ints.extend((value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond, value.fold))
    _write_offset(w, value)


def _read_datetime(r: _Reader, depth: int) -> datetime:
    from datetime import datetime

    year, month, day, hour, minute, second, microsecond, fold = r.ints.take(8)
    return datetime(year, month, day, hour, minute, second, microsecond, _read_offset(r), fold=fold)


def _write_date(w: _Writer, value: date, depth: int) -> None:
    w.ops.append(DATE)
    w.ints.extend((value.year, value.month, value.day))


def _read_date(r: _Reader, depth: int) -> date:
    from datetime import date

    return date(*r.ints.take(3))


def _write_time(w: _Writer, value: time, depth: int) -> None:
    w.ops.append(TIME)
    w.ints.extend((value.hour, value.minute, value.second, value.microsecond, value.fold))
    _write_offset(w, value)


def _read_time(r: _Reader, depth: int) -> time:
    from datetime import time

    hour, minute, second, microsecond, fold = r.ints.take(5)
    return time(hour, minute, second, microsecond, _read_offset(r), fold=fold)


def _write_timedelta(w: _Writer, value: timedelta, depth: int) -> None:
    w.ops.append(TIMEDELTA)
    w.ints.extend((value.days, value.seconds, value.microseconds))


def _read_timedelta(r: _Reader, depth: int) -> timedelta:
    from datetime import timedelta

    return timedelta(*r.ints.take(3))


# --- Numbers, ids, paths -----------------------------------------------------------------------------------------------


def _decimal_context() -> Context:
    """One that loses nothing and does not depend on the caller's."""
    from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context

    return Context(prec=MAX_PREC, Emin=MIN_EMIN, Emax=MAX_EMAX, capitals=1, clamp=0, traps=[])


def _write_decimal(w: _Writer, value: Decimal, depth: int) -> None:
    text = _decimal_context().to_sci_string(value)
    w.spend(SLOW + len(text) // 64)
    w.ops.append(DECIMAL)
    w.string(text)


def _read_decimal(r: _Reader, depth: int) -> Decimal:
    from decimal import Decimal

    text = r.string(_U32_MAX)
    r.spend(SLOW + len(text) // 64)
    context = _decimal_context()
    value = Decimal(text, context)
    if context.to_sci_string(value) != text:  # refuses signs, spaces, underscores and digits that `encode` never writes
        raise CodecError("malformed reply: not a decimal number")
    return value


def _write_fraction(w: _Writer, value: Fraction, depth: int) -> None:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_FRACTION_BITS:
        raise _Refused(f"Fraction of more than {MAX_FRACTION_BITS} bits")
    w.spend(SLOW)
    w.ops.append(FRACTION)
    _write_int(w, value.numerator, depth)
    _write_int(w, value.denominator, depth)


def _read_fraction(r: _Reader, depth: int) -> Fraction:
    from fractions import Fraction

    parts = []
    for _ in range(2):
        op = next(r.ops)
        if op not in (INT, BIGINT):
            raise CodecError("malformed reply: a fraction of something else than integers")
        part = r.ints.one() if op == INT else _read_bigint(r, depth)
        if part.bit_length() > MAX_FRACTION_BITS:
            raise CodecError("malformed reply: a fraction is too long")
        parts.append(part)
    r.spend(SLOW)
    value = Fraction(*parts)
    if [value.numerator, value.denominator] != parts:
        raise CodecError("malformed reply: a fraction is not in lowest terms")
    return value


def _write_uuid(w: _Writer, value: UUID, depth: int) -> None:
    w.spend(SLOW)
    w.ops.append(UUID_)
    w.raw.append(value.bytes)


def _read_uuid(r: _Reader, depth: int) -> UUID:
    from uuid import UUID

    r.spend(SLOW)
    return UUID(bytes=bytes(r.raw.take(16)))


def _write_path(w: _Writer, value: PurePath, depth: int) -> None:
    text = str(value)
    if len(text) > MAX_PATH:
        raise _Refused(f"path of more than {MAX_PATH} characters")
    w.spend(SLOW + text.count("/") + text.count("\\"))
    w.ops.append(PATH)
    w.counts.append(_PATHS.index(type(value).__name__))
    w.string(text)


def _read_path(r: _Reader, depth: int) -> PurePath:
    import pathlib

    kind = _PATHS[r.counts.one()]
    text = r.string(MAX_PATH)
    r.spend(SLOW + text.count("/") + text.count("\\"))
    path: PurePath = getattr(pathlib, kind)(text)
    return path


# --- Enums and dataclasses ---------------------------------------------------------------------------------------------


def _write_enum(w: _Writer, value: Any, depth: int) -> None:
    inner = w.deeper(depth)
    w.spend(SLOW)
    w.ops.append(ENUM)
    w.string(_sent_name(type(value)))
    if len(value._name_ or "") > MAX_NAME:
        raise _Refused(f"{type(value).__name__} with a name of more than {MAX_NAME} characters")
    w.string(value._name_ or "")
    w.step(value._value_, inner, ".value")


def _read_enum(r: _Reader, depth: int) -> Any:
    """A member found by name in a listed class. Unions of flags are not members, so they stay a record."""
    inner = r.deeper(depth)
    r.spend(SLOW)
    name_of_type = r.string(MAX_NAME)
    name = r.string(MAX_NAME)
    value = r.value(inner)
    listed = r.types.get(name_of_type)
    if listed is None:
        return EnumRecord(name_of_type, name, value)
    from enum import EnumMeta, Flag

    if not isinstance(listed, EnumMeta):
        raise CodecError(f"malformed reply: {name_of_type!a} is not an enum")
    member: Any = listed._member_map_.get(name)
    if member is None and issubclass(listed, Flag):
        return EnumRecord(name_of_type, name, value)
    if member is None:
        raise CodecError(f"malformed reply: not a member of {name_of_type!a}")
    try:
        is_same = type(member._value_) is type(value) and bool(member._value_ == value)
    except Exception:  # an array's truth value, or somebody else's __eq__
        is_same = False
    if is_same:
        return member
    if type(member._value_) in (int, str, bytes, bool):
        raise CodecError(f"malformed reply: not a member of {name_of_type!a}")
    return EnumRecord(name_of_type, name, value)  # NaN, or what holds a record here: it cannot be told


def _write_dataclass(w: _Writer, value: Any, depth: int) -> None:
    from dataclasses import fields  # is imported already: the class could not be one otherwise

    inner = w.deeper(depth)
    w.spend(SLOW)
    w.ops.append(DATACLASS)
    w.string(_sent_name(type(value)))
    names = [field.name for field in fields(value)]
    for name in getattr(value, "__dict__", {}).keys() - names:
        # It would be missed; but for what is cached, which is made again.
        known = getattr(type(value), name, None) if isinstance(name, str) else None
        if isinstance(name, str) and name[:2] != "__" and (not hasattr(known, "__get__") or callable(known)):
            raise _Refused(f"{type(value).__name__} has an attribute {ascii(name[:40])[1:-1]}, which is no field")
    try:
        values = [getattr(value, name) for name in names]
    except AttributeError as error:
        raise _Refused(f"{type(value).__name__} has a field without a value ({error})") from None
    w.sequence(names, inner, _index_step)
    w.sequence(values, inner, lambda index: f".{names[index]}")


def _read_dataclass(r: _Reader, depth: int) -> Any:
    inner = r.deeper(depth)
    r.spend(SLOW)
    name_of_type = r.string(MAX_NAME)
    names = r.sequence(inner)
    if not all(type(name) is str for name in names):
        raise CodecError("malformed reply: a field's name is not text")
    values = dict(zip(names, r.sequence(inner), strict=True))
    if len(values) != len(names):
        raise CodecError("malformed reply: a dataclass has a field twice")
    listed = r.types.get(name_of_type)
    if listed is None:
        return DataclassRecord(name_of_type, values)
    from dataclasses import fields, is_dataclass

    if not is_dataclass(listed):
        raise CodecError(f"malformed reply: {name_of_type!a} is not a dataclass")
    if {field.name for field in fields(listed)} != values.keys():
        raise CodecError(f"malformed reply: not the fields of {name_of_type!a}")
    if not _is_plain(listed, values):
        return DataclassRecord(name_of_type, values)
    result = object.__new__(listed)
    for name, value in values.items():
        object.__setattr__(result, name, value)
    return result


def _is_plain(cls: type, names: Mapping[str, object]) -> bool:
    """Whether an instance can be made and filled, and later be dropped, without running code of the class."""
    from types import MemberDescriptorType

    if hasattr(cls, "__del__") or _builtin_base(cls) is not None or issubclass(cls, BaseException):
        return False
    for name in names:
        attribute = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
        if hasattr(type(attribute), "__set__") and not isinstance(attribute, MemberDescriptorType):
            return False
    return True


def _sent_name(cls: type) -> str:
    name = type_name(cls)
    if len(name) > MAX_NAME:
        raise _Refused(f"class with a name of more than {MAX_NAME} characters")
    return name


# --- numpy -------------------------------------------------------------------------------------------------------------
# Never imported to write: whoever has an array has numpy. Imported to read only when there is an array to be read.


def _write_ndarray(w: _Writer, value: Any, depth: int) -> None:
    w.ops.append(NDARRAY)
    _write_buffer(w, value)


def _write_npscalar(w: _Writer, value: Any, depth: int) -> None:
    if isinstance(value, str):
        w.spend(SLOW)
        w.ops.append(NPSTR)
        w.string(str.__getitem__(value, slice(None)))  # its own str() drops zeros at the end
    elif isinstance(value, bytes):
        w.spend(SLOW)
        w.ops.append(NPBYTES)
        w.blob(bytes.__getitem__(value, slice(None)))
    else:
        w.ops.append(NPSCALAR)
        _write_buffer(w, sys.modules["numpy"].asarray(value))


def _write_buffer(w: _Writer, value: Any) -> None:
    dtype = value.dtype
    if not _is_sendable_dtype(dtype) or max(value.shape, default=0) > _U32_MAX:
        raise _Refused(f"numpy data of dtype {str(dtype)[:80]} cannot leave the sandbox")
    if value.ndim > MAX_DIMENSIONS:
        raise _Refused(f"numpy array of more than {MAX_DIMENSIONS} dimensions")
    if dtype.itemsize > max(value.nbytes, MAX_EMPTY):
        raise _Refused(f"numpy array of no items, each of more than {MAX_EMPTY} bytes")
    w.spend(SLOW)
    w.string(dtype.str)
    w.counts.append(value.ndim)
    w.counts.extend(value.shape)
    w.room(value.nbytes)
    flat = sys.modules["numpy"].ascontiguousarray(value).reshape(-1)
    w.blob(flat.view("u1").data if flat.size else b"")


def _is_sendable_dtype(dtype: Any) -> bool:
    """Booleans, numbers of at most 64 bits a part, dates, and fixed-width text: what is nothing but a buffer."""
    widest = {"b": 1, "i": 8, "u": 8, "f": 8, "c": 16, "m": 8, "M": 8, "S": _U32_MAX, "U": _U32_MAX}
    return bool(dtype.names is None and dtype.subdtype is None and 0 < dtype.itemsize <= widest.get(dtype.kind, 0))


def _read_buffer(r: _Reader) -> Any:
    text = r.string(32)
    r.spend(SLOW)
    # A byte order, a kind and a width, and for dates a unit in brackets: keep numpy's parser from anything else.
    if text[:1] not in ("<", ">", "|") or text[1:2] not in tuple("biufcmMSU") or not text[2:].partition("[")[0].isdecimal():
        raise CodecError("malformed reply: not a dtype")
    dimensions = r.counts.one()
    if dimensions > MAX_DIMENSIONS:  # before their product is made, which takes a time that is their square
        raise CodecError("malformed reply: an array has too many dimensions")
    shape = r.counts.take(dimensions).tolist()
    raw = r.blob()
    try:
        import numpy
    except ImportError:
        raise CodecError("the reply has numpy data, and numpy cannot be imported here") from None

    dtype: Any = numpy.dtype(text)
    if dtype.str != text or not _is_sendable_dtype(dtype):
        raise CodecError("malformed reply: not a dtype")
    size = 1
    for extent in shape:
        size *= extent
    if size * dtype.itemsize != len(raw) or dtype.itemsize > max(len(raw), MAX_EMPTY):
        raise CodecError("malformed reply: an array does not have the size of its shape")
    if not size:
        return numpy.empty(shape, dtype)
    flat: Any = numpy.frombuffer(raw, dtype)
    # numpy trusts its own buffers: a bool that is neither 0 nor 1, or text beyond Unicode, breaks it later on.
    if dtype.kind == "b" and flat.view("u1").max() > 1:
        raise CodecError("malformed reply: not an array of booleans")
    if dtype.kind == "U" and flat.view(f"{text[0]}u4").max() > sys.maxunicode:
        raise CodecError("malformed reply: not an array of text")
    stays = flat.flags.writeable and flat.flags.aligned and 2 * len(raw) >= r.size > LARGE  # else a part keeps all of it
    return flat.reshape(shape) if stays else flat.reshape(shape).copy()


def _read_ndarray(r: _Reader, depth: int) -> Any:
    return _read_buffer(r)


def _read_npscalar(r: _Reader, depth: int) -> Any:
    buffer = _read_buffer(r)
    if buffer.shape != () or buffer.dtype.kind in "SU":
        raise CodecError("malformed reply: not a numpy scalar")
    return buffer[()]


def _read_npstr(r: _Reader, depth: int) -> Any:
    text = r.string(_U32_MAX)
    r.spend(SLOW)
    import numpy

    return numpy.str_(text)


def _read_npbytes(r: _Reader, depth: int) -> Any:
    raw = bytes(r.blob())
    r.spend(SLOW)
    import numpy

    return numpy.bytes_(raw)


# --- Which type is written by what -------------------------------------------------------------------------------------


def _find_writer(cls: type) -> Callable[[_Writer, Any, int], None]:
    """The writer of a type that is not built in, found without importing anything. Raises _Refused if there is none."""
    package = str(cls.__module__).partition(".")[0]
    writer = _LATE_WRITERS.get((package, cls.__name__))
    if writer is not None and getattr(sys.modules.get(package), cls.__name__, None) is cls:
        return writer
    numpy = sys.modules.get("numpy")
    if cls is getattr(numpy, "ndarray", None):
        return _write_ndarray
    if package == "numpy" and issubclass(cls, getattr(numpy, "generic", ())):
        return _write_npscalar
    enum = sys.modules.get("enum")
    if issubclass(cls, getattr(enum, "Enum", ())):
        return _write_enum
    if hasattr(cls, "__dataclass_fields__") and _builtin_base(cls) is None:
        return _write_dataclass
    raise _Refused(_why_not(cls))


def _builtin_base(cls: type) -> type | None:
    """The type of the closed list that this class extends."""
    return next((base for base in cls.__mro__ if base in _WRITERS), None)


def _why_not(cls: type) -> str:
    name = f"{cls.__name__} ({cls.__module__}.{cls.__qualname__})"
    base = _builtin_base(cls)
    if base is None:
        return f"{name} cannot leave the sandbox"
    if base is tuple and hasattr(cls, "_fields"):
        return f"{name} is a named tuple: return tuple(value) or value._asdict()"
    return f"{name} extends {base.__name__}: return {base.__name__}(value)"


_WRITERS: dict[type, Callable[[_Writer, Any, int], None]] = {
    type(None): _write_none,
    bool: _write_bool,
    int: _write_int,
    float: _write_float,
    complex: _write_complex,
    str: _write_str,
    bytes: _write_bytes,
    bytearray: _write_bytearray,
    list: _write_list,
    tuple: _write_tuple,
    dict: _write_dict,
    set: _write_set,
    frozenset: _write_frozenset,
}

_LATE_WRITERS: dict[tuple[str, str], Callable[[_Writer, Any, int], None]] = {
    ("datetime", "datetime"): _write_datetime,
    ("datetime", "date"): _write_date,
    ("datetime", "time"): _write_time,
    ("datetime", "timedelta"): _write_timedelta,
    ("decimal", "Decimal"): _write_decimal,
    ("fractions", "Fraction"): _write_fraction,
    ("uuid", "UUID"): _write_uuid,
    **{("pathlib", name): _write_path for name in _PATHS},
}

_READERS: dict[int, Callable[[_Reader, int], Any]] = {
    NONE: _read_none,
    TRUE: _read_true,
    FALSE: _read_false,
    INT: _read_int,
    BIGINT: _read_bigint,
    FLOAT: _read_float,
    COMPLEX: _read_complex,
    STR: _read_str,
    BYTES: _read_bytes,
    BYTEARRAY: _read_bytearray,
    LIST: _read_list,
    TUPLE: _read_tuple,
    DICT: _read_dict,
    SET: _read_set,
    FROZENSET: _read_frozenset,
    DATETIME: _read_datetime,
    DATE: _read_date,
    TIME: _read_time,
    TIMEDELTA: _read_timedelta,
    DECIMAL: _read_decimal,
    FRACTION: _read_fraction,
    UUID_: _read_uuid,
    PATH: _read_path,
    ENUM: _read_enum,
    DATACLASS: _read_dataclass,
    NDARRAY: _read_ndarray,
    NPSCALAR: _read_npscalar,
    NPSTR: _read_npstr,
    NPBYTES: _read_npbytes,
}
