"""The reply codec: every type comes back as it was; hostile bytes end in CodecError, soon, and run nothing."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import random
import socket
import subprocess
import sys
import time as clock
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from struct import pack
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from sandbox.engine import codec
from sandbox.engine.codec import CodecError, DataclassRecord, EnumRecord, ReplyTooLarge

MAX_BYTES = 16 << 20
# What "a few seconds" means below; each of these floods would take minutes, or more, if it were not refused.
SOON = 10.0
MERSENNE = (1 << 61) - 1  # sys.hash_info.modulus: numbers that differ by it have equal hashes


class Colour(enum.Enum):
    RED = "r"
    BLUE = ("b", 2)
    CRIMSON = "r"  # an alias


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenPoint:
    x: int
    y: int


NamedPoint = namedtuple("NamedPoint", "x y")
LISTED: dict[str, type] = {codec.type_name(cls): cls for cls in (Colour, Size, Access, Point, FrozenPoint)}


def decode(data: bytes, **options: Any) -> Any:
    return codec.decode(data, max_bytes=MAX_BYTES, **options)


def round_trip(value: Any, **options: Any) -> Any:
    return decode(codec.encode(value), **options)


def forge(
    ops: bytes,
    counts: Iterable[int] = (),
    ints: Iterable[int] = (),
    floats: Iterable[float] = (),
    text: str | bytes = b"",
    raw: bytes = b"",
) -> bytes:
    """A message of the given columns."""
    counts, ints, floats = list(counts), list(ints), list(floats)
    columns = (
        ops,
        pack(f"{len(counts)}I", *counts),
        pack(f"{len(ints)}q", *ints),
        pack(f"{len(floats)}d", *floats),
        text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text,
        raw,
    )
    return b"psi1" + pack("6I", *map(len, columns)) + b"".join(columns)


def refused_soon(data: bytes, words: str, **options: Any) -> None:
    start = clock.thread_time()
    with pytest.raises(CodecError, match=words):
        decode(data, **options)
    assert clock.thread_time() - start < SOON


def assert_same(left: Any, right: Any) -> None:
    """Equal, of the same types at every depth, in the same order, signs of zeros included."""
    assert type(left) is type(right)
    if isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, dict):
        assert_same(list(left.items()), list(right.items()))
    elif isinstance(left, float):
        assert math.isnan(left) == math.isnan(right)
        assert math.isnan(left) or (left, math.copysign(1, left)) == (right, math.copysign(1, right))
    else:
        assert left == right
        assert repr(left) == repr(right) or isinstance(left, set | frozenset)


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    (1 << 63) - 1,
    -(1 << 63),
    1 << 63,
    -(1 << 63) - 1,
    1 << 64,
    7**5000,
    -(7**5000),
    0.0,
    -0.0,
    1.5,
    5e-324,
    math.inf,
    -math.inf,
    math.nan,
    complex(1, -0.0),
    "",
    "text",
    "ü €  \U0001f600 \0",
    "\ud800",
    "\ud83d\ude00",  # two lone surrogates, not one character
    "a\udcffb",
    b"",
    b"\x00\xff",
    bytearray(b"ab"),
    [],
    (),
    {},
    set(),
    frozenset(),
    [1, 2, 3],
    [1, 2.0, True, None],
    [1, 1 << 70],
    [True, False],
    [1.0, -0.0],
    ["a", "", "üü", "\udfff"],
    (1, (2, (3,))),
    {"b": 1, "a": [2], "c": {}},
    {1: "a", "1": "b", (1, "x"): None, None: 0, b"k": 1, 2.5: 2, frozenset((1, 2)): 3},
    {1, "a", (2, 3), frozenset((4,))},
    frozenset((frozenset((1, -1)), frozenset((1, -2)))),
    [[[]], [{}], [()]],
    datetime(2024, 2, 29, 23, 59, 59, 999999),
    datetime(2024, 10, 27, 2, 30, fold=1),
    datetime(2024, 1, 1, tzinfo=UTC),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=-5, minutes=-30))),
    datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=23, minutes=59, seconds=59, microseconds=7))),
    datetime.max,
    date(1, 1, 1),
    date.max,
    time(1, 2, 3, 4),
    time(1, fold=1, tzinfo=timezone(timedelta(minutes=45))),
    timedelta(days=-3, microseconds=1),
    timedelta.max,
    timedelta.min,
    Decimal("1.10"),
    Decimal("-0E+3"),
    Decimal("1E+999999"),
    Decimal("1E-9999999"),
    Decimal("Infinity"),
    Decimal("NaN"),
    Decimal("-NaN123"),
    Decimal("sNaN"),
    Decimal("1" * 5000),
    Fraction(-3, 7),
    Fraction(7**2000, 5**2000),
    UUID("12345678-1234-5678-1234-567812345678"),
    Path("/a/b"),
    Path("."),
    PurePosixPath("a/\udcff"),
    PureWindowsPath(r"C:\x\y"),
    PureWindowsPath(r"\\host\share\x"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:40].encode("ascii", "replace").decode())
def test_round_trip(value: Any) -> None:
    back = round_trip(value)
    if isinstance(value, Decimal) and value.is_nan():  # unequal to itself
        assert (type(back), str(back)) == (Decimal, str(value))
    else:
        assert_same(back, value)
        # in company and as a key, where it can be one
        assert_same(round_trip([value, None, value]), [value, None, value])
        if type(value).__hash__ is not None:
            assert_same(round_trip({value: 1, "other": 2}), {value: 1, "other": 2})


def test_all_values_at_once() -> None:
    assert_same(
        round_trip([v for v in VALUES if not isinstance(v, Decimal)]), [v for v in VALUES if not isinstance(v, Decimal)]
    )


def test_order_of_dicts_is_kept() -> None:
    keys = [f"k{i}" for i in range(1000)]
    random.Random(0).shuffle(keys)
    assert list(round_trip(dict.fromkeys(keys))) == keys


def test_decimals_do_not_depend_on_the_context() -> None:
    with localcontext() as context:
        context.prec, context.capitals = 3, 0
        value = Decimal("1.2345E+50")
        assert str(round_trip(value)) == str(value)


def test_named_zones_come_back_as_offsets() -> None:
    class Zone(tzinfo):
        def utcoffset(self, moment: datetime | None) -> timedelta:
            return timedelta(hours=2)

        def dst(self, moment: datetime | None) -> None: ...

        def tzname(self, moment: datetime | None) -> str:
            return "/etc/shadow"

    assert_same(round_trip(datetime(2024, 7, 1, tzinfo=Zone())), datetime(2024, 7, 1, tzinfo=timezone(timedelta(hours=2))))
    with pytest.raises(CodecError, match=r"^result\[0\]: time with a time zone that gives it no offset"):
        codec.encode([time(1, tzinfo=ZoneInfo("Europe/Berlin"))])


def test_nan_keys_stay_apart_and_equal_keys_are_refused() -> None:
    back = round_trip({float("nan"): 1, float("nan"): 2})
    assert [(math.isnan(key), value) for key, value in back.items()] == [(True, 1), (True, 2)]
    assert len(round_trip({float("nan"), float("nan")})) == 2
    for ops, numbers, decimals in [
        (b"d*if*NN", [1], [1.0]),
        (b"d*Ti*NN", [1], []),
        (b"d2*NN", [], [0.0, -0.0]),
        (b"d1*NN", [1, 1], []),
    ]:
        with pytest.raises(CodecError, match="key twice"):
            decode(forge(ops, [2, 2], numbers, decimals))
    for ops in (b"S1", b"Z1"):
        with pytest.raises(CodecError, match="member twice"):
            decode(forge(ops, [2], [5, 5]))


# --- numpy


ARRAYS: list[np.ndarray[Any, Any]] = [
    np.arange(6, dtype=dtype).reshape(2, 3)
    for dtype in ("i1", "i2", "<i4", ">i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ">f8", "c8", "c16")
] + [
    np.array([True, False]),
    np.array(3.5),
    np.zeros((0, 3)),
    np.zeros((2, 0, 5), "i4"),
    np.array([], "U3"),
    np.array([math.nan, math.inf, -0.0]),
    np.array(["2024-01-01", "NaT"], "M8[D]"),
    np.array([1, 2], "m8[ns]"),
    np.array([1, 2], "m8[25us]"),
    np.array([1, 2], "m8"),
    np.array(["a", "\U0010ffff", ""]),
    np.array(["ab"], ">U2"),
    np.array([b"ab", b""]),
    np.arange(12).reshape(3, 4).T,
    np.arange(12)[::-3],
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.broadcast_to(np.arange(3), (2, 3)),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_arrays(array: np.ndarray[Any, Any]) -> None:
    back = round_trip({"a": array})["a"]
    assert type(back) is np.ndarray
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable
    assert back.flags.owndata


SCALARS: list[Any] = [
    np.dtype(code).type(1) for code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "?")
]
SCALARS += [
    np.datetime64("2024-01-01T01:02:03.004"),
    np.timedelta64(5, "h"),
    np.str_("a\udcff\0"),
    np.bytes_(b"b\0"),
    np.str_(""),
]


@pytest.mark.parametrize("scalar", SCALARS, ids=repr)
def test_numpy_scalars(scalar: Any) -> None:
    back = round_trip([scalar])[0]
    assert type(back) is type(scalar)
    assert back.dtype == scalar.dtype
    if isinstance(scalar, str | bytes):  # numpy's own comparison forgets zeros at the end
        assert back[:] == scalar[:]
    else:
        assert back == scalar
        assert round_trip({scalar: 1}) == {scalar: 1}


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]),
        np.zeros(2, dtype=[("a", "i4")]),
        np.zeros(2, "V8"),
        np.zeros(2, np.longdouble),
        np.zeros(2, np.clongdouble),
        np.array(["a"], np.dtypes.StringDType()),
        np.ma.masked_array([1, 2]),
        np.zeros(2, dtype=[("a", "i4")])[0],
        np.longdouble(1),
    ],
    ids=lambda array: f"{type(array).__name__}-{array.dtype}",
)
def test_other_numpy_data_is_refused(array: Any) -> None:
    with pytest.raises(CodecError, match=r'^result\["a"\]: .*cannot leave the sandbox'):
        codec.encode({"a": array})


def test_large_arrays_take_no_time_per_element() -> None:
    array = np.arange(12_000_000, dtype="u1")
    start = clock.thread_time()
    back = codec.decode(codec.encode(array), max_bytes=MAX_BYTES)
    assert clock.thread_time() - start < 1
    assert np.array_equal(back, array)


def array_message(dtype: str, shape: list[int], raw: bytes, op: bytes = b"A") -> bytes:
    return forge(op, [len(dtype), len(shape), *shape, len(raw)], text=dtype, raw=raw)


def test_the_forged_array_is_otherwise_well_formed() -> None:
    assert decode(array_message("<i4", [1], bytes(4))).tolist() == [0]


@pytest.mark.parametrize(
    ("dtype", "shape", "raw"),
    [
        ("|O", [1], bytes(8)),
        ("<O8", [1], bytes(8)),
        ("|V8", [1], bytes(8)),
        ("i4", [1], bytes(4)),
        ("<i4,<i4", [1], bytes(8)),
        ("<i4[", [1], bytes(4)),
        ("|i4", [1], bytes(4)),
        ("<f16", [1], bytes(16)),
        ("<i3", [3], bytes(9)),
        ("<U0", [9], b""),
        ("|S0", [1 << 31], b""),
        ("<U1000000", [0], b""),
        ("<M8[x]", [1], bytes(8)),
        ("<M8[ns]ab", [1], bytes(8)),
        ("<i4", [2], bytes(4)),
        ("<i4", [0], bytes(4)),
        ("<i4", [1 << 31, 1 << 31, 1 << 31], bytes(4)),
        ("<i4", [0, 1 << 31, 1 << 31, 1 << 31], b""),
        ("<i4", [1] * 33, bytes(4)),
        ("|b1", [2], b"\x01\x02"),
        ("<U1", [1], b"\xff\xff\xff\xff"),
        (">U1", [1], b"\x00\x11\x00\x00"),
        ("", [1], b""),
        ("<", [1], b""),
        ("<٣", [1], b""),
    ],
)
def test_forged_arrays(dtype: str, shape: list[int], raw: bytes) -> None:
    for op in (b"A", b"n"):
        with pytest.raises(CodecError):
            decode(array_message(dtype, shape, raw, op))


def test_a_forged_scalar_with_a_shape() -> None:
    with pytest.raises(CodecError, match="scalar"):
        decode(array_message("<i4", [1], bytes(4), b"n"))


# --- Enums and dataclasses


@pytest.mark.parametrize("member", [Colour.RED, Colour.BLUE, Colour.CRIMSON, Size.LARGE, Access.WRITE])
def test_enums(member: enum.Enum) -> None:
    assert round_trip([member], types=LISTED)[0] is member
    record = round_trip({member: member})
    assert list(record.items()) == [(EnumRecord(codec.type_name(type(member)), member.name, member.value),) * 2]


def test_a_union_of_flags_stays_a_record() -> None:
    record = round_trip(Access.READ | Access.WRITE, types=LISTED)
    assert (type(record), record.value) == (EnumRecord, 3)


def test_dataclasses() -> None:
    value = [Point(1, Point([2], None)), FrozenPoint(1, 2)]
    assert round_trip(value, types=LISTED) == value
    name = codec.type_name(Point)
    assert name == f"{__name__}:Point"
    inner = DataclassRecord(name, {"x": [2], "y": None})
    assert round_trip(value)[0] == DataclassRecord(name, {"x": 1, "y": inner})
    keys = {FrozenPoint(1, 2): "a", FrozenPoint(2, 1): "b"}
    assert round_trip(keys, types=LISTED) == keys
    assert [key.fields for key in round_trip(keys)] == [{"x": 1, "y": 2}, {"x": 2, "y": 1}]


def test_a_listed_dataclass_runs_no_code() -> None:
    ran = []

    @dataclasses.dataclass
    class Loud:
        x: int

        def __new__(cls, *args: object) -> Loud:
            ran.append("new")
            return object.__new__(cls)

        def __post_init__(self) -> None:
            ran.append("post_init")

        def __setattr__(self, name: str, value: object) -> None:
            ran.append("setattr")
            object.__setattr__(self, name, value)

    data = codec.encode(Loud(1))
    assert ran == ["new", "setattr", "post_init"]
    ran.clear()
    back = decode(data, types={codec.type_name(Loud): Loud})
    assert (type(back), back.x, ran) == (Loud, 1, [])


@dataclasses.dataclass
class WithDel:
    x: int

    def __del__(self) -> None: ...


@dataclasses.dataclass
class WithSetter:
    x: int


def _fail(*_: object) -> None:
    raise AssertionError("a setter ran")


setattr(WithSetter, "x", property(lambda self: 5, lambda self, value: None))  # noqa: B010
WITH_SETTER = WithSetter(5)
setattr(WithSetter, "x", property(lambda self: 5, _fail))  # noqa: B010


@pytest.mark.parametrize("value", [WithDel(5), WITH_SETTER], ids=["del", "setter"])
def test_classes_that_would_run_code_stay_records(value: Any) -> None:
    name = codec.type_name(type(value))
    assert round_trip(value, types={name: type(value)}) == DataclassRecord(name, {"x": 5})


def record_message(op: bytes, name: str, *rest: str, tail: bytes = b"", ints: Iterable[int] = ()) -> bytes:
    return forge(op + tail, [len(name), *map(len, rest)], ints, text=name + "".join(rest))


@pytest.mark.parametrize(
    "data",
    [
        record_message(b"e", codec.type_name(Size), "LARGE", tail=b"i", ints=[1]),
        record_message(b"e", codec.type_name(Size), "LARGE", tail=b"T"),
        record_message(b"e", codec.type_name(Size), "__class__", tail=b"i", ints=[1]),
        record_message(b"e", codec.type_name(Size), "HUGE", tail=b"i", ints=[1]),
        record_message(b"e", codec.type_name(Point), "x", tail=b"i", ints=[1]),
    ],
)
def test_forged_enums(data: bytes) -> None:
    with pytest.raises(CodecError, match=r"not (a member of|an enum)"):
        decode(data, types=LISTED)


def dataclass_message(name: str, fields: list[str]) -> bytes:
    counts = [len(name), len(fields), *map(len, fields), len(fields)]
    return forge(b"C3*" + b"N" * len(fields), counts, text=name + "".join(fields))


@pytest.mark.parametrize("fields", [["x"], ["x", "y", "z"], ["x", "__class__"], ["x", "x"], ["x", "__dict__"], []])
def test_forged_dataclasses(fields: list[str]) -> None:
    name = codec.type_name(Point)
    assert decode(dataclass_message(name, ["x", "y"]), types=LISTED) == Point(None, None)
    with pytest.raises(CodecError):
        decode(dataclass_message(name, fields), types=LISTED)
    with pytest.raises(CodecError, match="is not a dataclass"):
        decode(dataclass_message(codec.type_name(Size), fields[:1]), types=LISTED)


def test_names_on_the_wire_are_only_names() -> None:
    before = set(sys.modules)
    assert decode(record_message(b"e", "antigravity:x", "y", tail=b"N")) == EnumRecord("antigravity:x", "y", None)
    assert decode(dataclass_message("os:system", ["x"])) == DataclassRecord("os:system", {"x": None})
    assert set(sys.modules) == before


def test_records_are_frozen_and_copyable() -> None:
    import copy
    import pickle

    for record in (EnumRecord("m:E", "A", [1]), DataclassRecord("m:D", {"x": 1})):
        with pytest.raises(AttributeError, match="read-only"):
            record.type = "other"
        with pytest.raises(AttributeError, match="read-only"):
            del record.type
        assert copy.deepcopy(record) == record
        assert pickle.loads(pickle.dumps(record)) == record
    assert repr(EnumRecord("m:E", "A", 1)) == "EnumRecord('m:E', 'A', 1)"
    assert EnumRecord("m:E", "A", 1) != EnumRecord("m:E", "A", 2)


# --- What cannot be sent


class StrangeList(list[int]): ...


class StrangeStr(str): ...


@dataclasses.dataclass
class DictPoint(dict[str, int]):
    x: int


@dataclasses.dataclass
class Unset:
    x: int = dataclasses.field(init=False)


@dataclasses.dataclass
class Computed:
    x: int

    def __post_init__(self) -> None:
        self.double = 2 * self.x


@dataclasses.dataclass
class Hiding:
    x: int

    def __post_init__(self) -> None:
        vars(self)["double"] = 2 * self.x

    def double(self) -> int:
        return 0


@dataclasses.dataclass
class Cached:
    x: int

    @functools.cached_property
    def double(self) -> int:
        return 2 * self.x


NAMES = {f"NAME_{number}": 1 << number for number in range(300)}
ManyFlags: Any = enum.Flag("ManyFlags", NAMES)  # type: ignore[misc]


class OddValues(enum.Enum):
    NAN = math.nan
    POINT = Point(1, 2)


def test_what_is_cached_is_no_part_of_a_value() -> None:
    value = Cached(3)
    assert value.double == 6
    back = round_trip(value, types={codec.type_name(Cached): Cached})
    assert back == value
    assert vars(back) == {"x": 3}


class ArrayValue(enum.Enum):
    ARRAY = np.zeros(3)


@pytest.mark.parametrize("member", [*OddValues, *ArrayValue], ids=str)
def test_a_member_that_cannot_be_told_from_a_forged_one_stays_a_record(member: enum.Enum) -> None:
    back = round_trip(member, types={codec.type_name(type(member)): type(member)})
    assert type(back) is EnumRecord
    assert back.name == member.name


def test_the_error_names_the_way_to_the_value() -> None:
    with socket.socket() as plug, pytest.raises(CodecError) as caught:
        codec.encode({"a": [1, 2, 3, plug]})
    assert str(caught.value) == 'result["a"][3]: socket (socket.socket) cannot leave the sandbox'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), "result: object"),
        ((1, {2: object()}), "result[1][2]: object"),
        ({(1, 2): object()}, "result[tuple(...)]: object"),
        ({b"k": object()}, "result[b'k']: object"),
        ({'q"\n': object()}, 'result["q"\\n"]: object'),
        ({print: 1}, "result.keys()[0]: builtin_function_or_method"),
        ({("a", print)}, "result{...}[1]: builtin_function_or_method"),
        (Point([1], object()), "result.y: object"),
        (Unset(), "result: Unset has a field without a value"),
        ([StrangeList()], "result[0]: StrangeList (tests.test_codec.StrangeList) extends list: return list(value)"),
        ([StrangeStr()], "result[0]: StrangeStr"),
        (OrderedDict(), "result: OrderedDict (collections.OrderedDict) extends dict: return dict(value)"),
        (DictPoint(1), "result: DictPoint"),
        (NamedPoint(1, 2), "result: NamedPoint (tests.test_codec.NamedPoint) is a named tuple: return tuple(value)"),
        (enum.Enum("Odd", {"A": print}).A, "result.value: builtin_function_or_method"),  # type: ignore[attr-defined]
        (memoryview(b""), "result: memoryview"),
        ((i for i in [1]), "result: generator"),
        (Point, "result: type"),
        (Fraction(1, 1 << 20_000), "result: Fraction of more than"),
        (PurePosixPath("a" * 40_000), "result: path of more than"),
        (Computed(2), "result: Computed has an attribute double, which is no field"),
        (Hiding(2), "result: Hiding has an attribute double, which is no field"),
        (np.array([], dtype="U2000"), "result: numpy array of no items, each of more than 4096 bytes"),
        (ManyFlags((1 << 300) - 1), "result: ManyFlags with a name of more than 1024 characters"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_refused_values(value: Any, text: str) -> None:
    with pytest.raises(CodecError) as caught:
        codec.encode(value)
    assert str(caught.value).replace(__name__, "tests.test_codec").startswith(text)


def nested(depth: int, wrap: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    value: Any = None
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap",
    [lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: frozenset((v,)), lambda v: Point(v)],
    ids=["list", "tuple", "dict", "frozenset", "dataclass"],
)
def test_depth(wrap: Callable[[Any], Any]) -> None:
    assert round_trip(nested(64, wrap), types=LISTED) == nested(64, wrap)
    with pytest.raises(CodecError, match="depth"):
        codec.encode(nested(65, wrap))
    with pytest.raises(CodecError, match="depth"):
        decode(codec.encode(nested(65, wrap), max_depth=65))


def test_depth_bombs() -> None:
    bomb = nested(10_000)
    with pytest.raises(CodecError, match="depth") as caught:
        codec.encode(bomb)
    assert len(str(caught.value)) < 600
    with pytest.raises(CodecError, match="deep"):
        codec.encode(bomb, max_depth=1 << 30)
    message = forge(b"l*" * 100_000 + b"N", [1] * 100_000)
    with pytest.raises(CodecError, match="depth"):
        decode(message)
    with pytest.raises(CodecError, match="deep"):
        decode(message, max_depth=1 << 30)


def test_cycles_end_in_the_depth_error() -> None:
    ring: list[Any] = []
    ring.append({"again": ring})
    point = Point(1)
    point.y = point
    for value in (ring, point):
        with pytest.raises(CodecError, match="contains itself"):
            codec.encode(value)


@pytest.mark.parametrize(
    "value",
    [
        b"x" * 5000,
        bytearray(5000),
        "x" * 5000,
        "€" * 2000,
        ["x" * 1000] * 5,
        1 << 40_000,
        list(range(1000)),
        [0.5] * 1000,
        np.zeros(1000),
        [None] * 5000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_too_large(value: Any) -> None:
    with pytest.raises(ReplyTooLarge) as caught:
        codec.encode(value, max_bytes=4096)
    assert caught.value.allowed == 4096
    assert caught.value.used > 4096
    data = codec.encode(value)
    assert caught.value.used <= len(data)
    assert np.array_equal(codec.decode(data, max_bytes=len(data)), value)
    with pytest.raises(ReplyTooLarge):
        codec.decode(data, max_bytes=len(data) - 1)
    assert codec.encode(value, max_bytes=len(data)) == data


def test_too_many_values() -> None:
    for value in (list(range(101)), [[None]] * 51, {str(i): i for i in range(51)}):
        with pytest.raises(CodecError, match="more than 100 values"):
            codec.encode(value, max_nodes=100)
        with pytest.raises(CodecError, match="more than 100 values"):
            decode(codec.encode(value), max_nodes=100)
    assert round_trip(list(range(99)), max_nodes=100) == list(range(99))


MANY: list[Any] = [*VALUES, *SCALARS, *ARRAYS, *Colour, Point(1), FrozenPoint(1, 2)]


@pytest.mark.parametrize("value", MANY, ids=lambda value: type(value).__name__)
def test_both_ends_count_alike(value: Any) -> None:
    """So that a reply that is too much is refused inside, where the way to the value can be named."""
    data = codec.encode(value)
    least = next(nodes for nodes in range(1, 2000) if _fits(value, nodes))
    decode(data, max_nodes=least)
    with pytest.raises(CodecError, match="more than"):
        decode(data, max_nodes=least - 1)


def _fits(value: Any, nodes: int) -> bool:
    try:
        codec.encode(value, max_nodes=nodes)
    except CodecError:
        return False
    return True


def test_a_class_that_fails_while_it_is_looked_at() -> None:
    @dataclasses.dataclass
    class Trap:
        x: int

        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError("mine")

    with pytest.raises(CodecError, match="RuntimeError"):
        codec.encode(Trap(1))


# --- Malformed messages


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"psi1",
        b"psi2" + forge(b"N")[4:],
        forge(b"N")[:-1],
        forge(b"N") + b"\0",
        b"psi1" + b"\xff" * 24,
        forge(b""),
        forge(b"NN"),
        forge(b"N", [1]),
        forge(b"N", [], [1]),
        forge(b"N", text="x"),
        forge(b"N", raw=b"x"),
        forge(b"N", floats=[1]),
        forge(b"?"),
        forge(b"\0"),
        forge(b"i"),
        forge(b"f"),
        forge(b"c", floats=[1]),
        forge(b"s", [2], text="x"),
        forge(b"s", [1], text=b"\xff"),
        forge(b"s", [4], text="\U0001f600"),
        forge(b"b", [2], raw=b"x"),
        forge(b"B"),
        forge(b"I", [5], raw=b"1234"),
        forge(b"l"),
        forge(b"l", [1]),
        forge(b"l*", [1]),
        forge(b"l9", [1]),
        forge(b"l1", [2], [1]),
        forge(b"l2", [2], floats=[1]),
        forge(b"l3", [2, 1], text="a"),
        forge(b"l3", [2, 1, 2], text="ab"),
        forge(b"l3", [2, 2, (1 << 32) - 1], text="ab"),
        forge(b"d11", [1, 2], [1, 2, 3]),
        forge(b"d11", [2, 1], [1, 2, 3]),
        forge(b"d*l11", [1, 0, 1], [1]),
        forge(b"S*l1", [1, 0]),
        forge(b"Z*d11", [1, 0, 0]),
        forge(b"D", [], [2024, 1, 1, 0, 0, 0, 0, 0]),
        forge(b"D", [], [2024, 13, 1, 0, 0, 0, 0, 0, -(1 << 63)]),
        forge(b"D", [], [2024, 1, 1, 0, 0, 0, 0, 2, -(1 << 63)]),
        forge(b"D", [], [1 << 40, 1, 1, 0, 0, 0, 0, 0, -(1 << 63)]),
        forge(b"D", [], [2024, 1, 1, 0, 0, 0, 0, 0, 86_400_000_000]),
        forge(b"D", [], [2024, 1, 1, 0, 0, 0, 0, 0, (1 << 63) - 1]),
        forge(b"a", [], [2023, 2, 29]),
        forge(b"m", [], [24, 0, 0, 0, 0, -(1 << 63)]),
        forge(b"E", [], [1 << 62, 0, 0]),
        *(
            forge(b"x", [len(text)], text=text)
            for text in ("", "x", " 1", "1_0", "+1", "0x1", "\u0663", "1e5", "1E+99999999999999999999", "nan", "1\0")
        ),
        forge(b"qii", [], [2, 4]),
        forge(b"qii", [], [1, 0]),
        forge(b"qii", [], [1, -2]),
        forge(b"qif", [], [1], [2.0]),
        forge(b"qqii", [], [1, 2]),
        forge(b"qiI", [4096], [1], raw=b"\x01" * 4096),
        forge(b"u", raw=bytes(15)),
        forge(b"P", [3, 1], text="a"),
        forge(b"P", [0, 40_000], text="a" * 40_000),
        forge(b"e", [2000, 1], text="a" * 2001),
        forge(b"e", [1, 1], text="ab"),
        forge(b"C1*N", [1, 1, 1], [1], text="a"),
        forge(b"C3*", [1, 1, 1, 0], text="ab"),
        forge(b"U", [2], text="a"),
        forge(b"V", [2], raw=b"a"),
    ],
    ids=lambda data: repr(data[28:44]),
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(CodecError) as caught:
        decode(data)
    assert ("unknown op" in str(caught.value)) == (data[28:29] in (b"?", b"\0") and len(data) == 29)


def test_messages_quote_hostile_text_as_ascii() -> None:
    with pytest.raises(CodecError) as caught:
        decode(record_message(b"e", "\x1b[2J\u202e", "x", tail=b"N"), types={"\x1b[2J\u202e": int})
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


def plain(value: Any) -> bool:
    """Whether a value is made of the closed list only."""
    if isinstance(value, dict):
        return type(value) is dict and plain(list(value)) and plain(list(value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return type(value) in (list, tuple, set, frozenset) and all(map(plain, value))
    if isinstance(value, EnumRecord):
        return plain([value.type, value.name, value.value])
    if isinstance(value, DataclassRecord):
        return plain([value.type, value.fields])
    if isinstance(value, np.ndarray):
        return type(value) is np.ndarray and not value.dtype.hasobject
    atoms = (bool, int, float, complex, str, bytes, bytearray, datetime, date, time, timedelta, Decimal, Fraction, UUID)
    paths = (PosixPath, PurePosixPath, PureWindowsPath)
    return value is None or type(value) in atoms + paths or isinstance(value, np.generic)


def test_fuzz_random_bytes() -> None:
    dice = random.Random(1)
    for _ in range(3000):
        with pytest.raises(CodecError):
            decode(dice.randbytes(dice.randrange(100)))


def test_fuzz_random_columns() -> None:
    """Well-formed heads, known ops, plausible numbers: this reaches the constructors."""
    dice = random.Random(2)
    ops = bytes(codec._READERS) + b"*123" * 4 + b"ltdSZ" * 2
    numbers = [0, 1, 2, 3, 5, 2024, -1, 1 << 62, -(1 << 63), codec._NAIVE]
    texts = ["<i4", "|b1", "1.5", "NaN", "sNaN", "x", "/", "C:\\", "<U1", "\ud800", "<M8[s]", codec.type_name(Point)]
    accepted = 0
    for _ in range(3000):
        # All columns but the ops are as long as anyone asks for, so use the reader: `decode` would refuse the rest.
        reader = codec._Reader(
            forge(
                bytes(dice.choices(ops, k=dice.randrange(1, 30))),
                [dice.choice((0, 1, 1, 2, 2, 3, 4, 8, 1 << 31)) for _ in range(200)],
                [dice.choice(numbers) for _ in range(200)],
                [dice.choice((0.0, 1.5, math.nan, math.inf)) for _ in range(50)],
                "".join(dice.choices(texts, k=80)),
                dice.randbytes(300),
            ),
            64,
            10_000,
            LISTED,
        )
        try:
            value = reader.value(0)
        except (CodecError, ValueError, TypeError, OverflowError, IndexError, ArithmeticError, StopIteration):
            continue
        accepted += 1
        assert plain(value) or isinstance(value, Point | FrozenPoint | enum.Enum)
    assert accepted > 250


def test_fuzz_mutations() -> None:
    dice = random.Random(3)
    originals = [codec.encode(value) for value in MANY] + [codec.encode([v, {"k": v}, (v,)]) for v in MANY]
    refused = accepted = 0
    for _ in range(15_000):
        data = bytearray(dice.choice(originals))
        for _ in range(dice.choice((1, 1, 1, 2, 4))):
            where = dice.randrange(len(data))
            match dice.randrange(5):
                case 0:
                    data[where] = dice.randrange(256)
                case 1:
                    data[where] ^= 1 << dice.randrange(8)
                case 2:
                    data[where : where + dice.randrange(9)] = b""
                case 3:
                    data[where:where] = dice.randbytes(dice.randrange(1, 9))
                case _:
                    data[where : where + 4] = dice.choice((b"\xff" * 4, bytes(4), b"\x01\0\0\0"))
            if not data:
                break
        try:
            value = decode(bytes(data), max_nodes=100_000)
        except CodecError:
            refused += 1
        else:
            accepted += 1
            assert plain(value)
    assert refused > 3000
    assert accepted > 1000


def test_truncations() -> None:
    data = codec.encode([1, "a", {"k": [b"x", 2.5]}, Decimal(1), Path("a")])
    for end in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:end])


# --- Time and memory


def test_claimed_sizes_cost_nothing() -> None:
    for ops in (b"l*", b"l1", b"l2", b"l3", b"S*", b"d*"):
        refused_soon(forge(ops, [(1 << 32) - 1]), "malformed", max_nodes=1 << 40)
        refused_soon(forge(ops, [(1 << 32) - 1]), "more than 1000000 values")


def test_many_empty_containers_are_refused_before_they_are_built() -> None:
    many = 2_000_000
    refused_soon(forge(b"l*" + b"l1" * many, [many] + [0] * many), "more than 1000000 values")


@pytest.mark.long
@pytest.mark.parametrize(
    ("ops", "counts", "ints", "text", "raw"),
    [
        (b"d11", [0, 0], [], "", b""),
        (b"Z1", [0], [], "", b""),
        (b"D", [], [2024, 1, 1, 0, 0, 0, 0, 0, 0], "", b""),
        (b"E", [], [1, 1, 1], "", b""),
        (b"x", [3], [], "1.5", b""),
        (b"qii", [], [1, 3], "", b""),
        (b"qII", [2000, 2000], [], "", b"\x01" * 3999 + b"\x03"),
        (b"u", [], [], "", bytes(16)),
        (b"P", [0, 1], [], "a", b""),
        (b"P", [0, 30_000], [], "a/" * 15_000, b""),
        (b"P", [2, 30_000], [], "a\\" * 15_000, b""),
        (b"eN", [1, 1], [], "ab", b""),
        (b"C33", [1, 0, 0], [], "a", b""),
        (b"A", [3, 1, 1, 4], [], "<U1", b"a\0\0\0"),
        (b"U", [1], [], "a", b""),
        (b"s", [100], [], "\ud800" * 100, b""),
        (b"x", [20_000], [], "1" * 20_000, b""),
        (b"I", [100], [], "", b"\x01" * 100),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, bytes) else "",
)
def test_a_full_message_of_one_kind(ops: bytes, counts: list[int], ints: list[int], text: str, raw: bytes) -> None:
    """16 MB, or a million values, of anything is read or refused soon.

    Tried with an eighth of that, in an eighth of the time; and four times as much must not take sixteen times as long.
    """
    one = len(forge(ops, counts, ints, text=text, raw=raw)) - 28
    nodes = codec.MAX_NODES // 8

    def spent(many: int) -> float:
        data = forge(b"l*" + ops * many, [many, *(counts * many)], ints * many, text=text * many, raw=raw * many)
        start = clock.thread_time()
        try:
            value = decode(data, max_nodes=nodes)
        except CodecError as error:
            assert "more than" in str(error) or "lowest terms" in str(error)  # noqa: PT017 - both ways are fine
        else:
            assert len(value) == many
        return clock.thread_time() - start

    many = min(MAX_BYTES // 8 // one - 10, nodes - nodes // 100)
    attempts = ((spent(many // 4), spent(many)) for _ in range(3))  # what else the machine does can make one of them slow
    assert any(whole < min(SOON / 8, max(SOON / 20, 8 * quarter)) for quarter, whole in attempts)


def walkers(size: int, *, is_set: bool) -> list[int]:
    """Integers that CPython puts into a table of `size` slots in quadratic time.

    The first half takes the start of the orbit i -> 5 i + 1, which every probe sequence follows once the high bits of its
    hash are used up. The others are searched for: their first probes hit what is taken, the last of them on that orbit,
    and from there each has to walk past all that is left of it.
    """
    window = 10 if is_set else 1  # LINEAR_PROBES + 1
    taken = np.zeros(size + window, bool)
    orbit = [0]
    while taken.sum() < size * 0.48:
        taken[orbit[-1] : orbit[-1] + window] = True
        orbit.append((orbit[-1] * 5 + 1) % size)
    taken[size:] = False
    full = np.logical_and.reduce([taken[near : size + near] for near in range(window)])
    early = np.zeros(size, bool)
    early[orbit[: len(orbit) // 2]] = True
    others = np.arange(size, size << (10 if is_set else 4))
    place, perturb = others % size, others
    while True:
        hits = full[place]
        others, place, perturb = others[hits], place[hits], perturb[hits] >> 5
        if not perturb.any():
            break
        place = (place * 5 + perturb + 1) % size
    others = others[early[place]]
    first: list[int] = np.flatnonzero(taken).tolist()
    return first + others[: size * (58 if is_set else 65) // 100 - len(first)].tolist()  # type: ignore[no-any-return]


def cpu_time(call: Callable[[], object]) -> float:
    start = clock.thread_time()
    call()
    return clock.thread_time() - start


@pytest.mark.parametrize("is_set", [False, True], ids=["dict", "set"])
def test_a_real_flood_is_refused(is_set: bool) -> None:
    keys = walkers(1 << 13, is_set=is_set)
    build: Callable[[list[int]], object] = set if is_set else dict.fromkeys
    flood = min(cpu_time(lambda: build(keys)) for _ in range(5))
    assert flood > 10 * min(cpu_time(lambda: build(list(range(len(keys))))) for _ in range(5))
    count = len(keys)
    ops, counts = (b"S1", [count]) if is_set else (b"d1*" + b"N" * count, [count] * 2)
    refused_soon(forge(b"l*" + ops * 20, [20, *counts * 20], keys * 20), "hashes collide")
    # the same as tuples' members is no flood: their hashes are mixed
    assert len(round_trip(dict.fromkeys((key, 0) for key in keys))) == len(keys)


def test_equal_hashes_are_refused() -> None:
    keys = [7 + i * MERSENNE for i in range(20_000)]
    assert len({hash(key) for key in keys}) == 1
    raw = b"".join(key.to_bytes(12, "little") for key in keys)
    for ops in (b"S*", b"Z*"):
        refused_soon(forge(ops + b"I" * 20_000, [20_000] + [12] * 20_000, raw=raw), "equal hashes")
    as_keys = b"d*" + b"I" * 20_000 + b"1"
    refused_soon(forge(as_keys, [20_000] + [12] * 20_000 + [20_000], range(20_000), raw=raw), "equal hashes")


def test_many_small_containers_of_equal_hashes_are_refused() -> None:
    one = b"".join((7 + i * MERSENNE).to_bytes(12, "little") for i in range(1000))
    refused_soon(forge(b"l*" + (b"S*" + b"I" * 1000) * 80, [80] + ([1000] + [12] * 1000) * 80, raw=one * 80), "equal hashes")


def test_nested_frozensets_that_compare_for_ever_are_refused() -> None:
    depth = 18
    leaves = 1 << depth
    ops, counts = b"I", [12]
    for _ in range(depth):
        ops, counts = b"Z*" + ops * 2, [2] + counts * 2
    raw = b"".join((7 + i * MERSENNE).to_bytes(12, "little") for i in range(leaves))
    refused_soon(forge(ops, counts, raw=raw), "equal hashes")


def random_ints(seed: int, count: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.getrandbits(62) for _ in range(count)]


def shifted(shift: int) -> list[int]:
    return [i << shift for i in range(5_000)]


LEGITIMATE: dict[str, Callable[[], list[Any]]] = {
    "range": lambda: list(range(25_000)),
    "backwards": lambda: list(range(25_000, 0, -1)),
    "negative": lambda: list(range(-12_500, 12_500)),
    "random": lambda: random_ints(5, 25_000),
    **{f"shifted by {shift}": partial(shifted, shift) for shift in range(1, 49)},
    "decimal steps": lambda: [i * 1000 for i in range(25_000)],
    "powers of two": lambda: [1 << i for i in range(1500)],
    "float powers": lambda: [2.0**i for i in range(-1000, 1000)],
    "halves": lambda: [i / 2 for i in range(25_000)],
    "1/1024": lambda: [i / 1024 for i in range(25_000)],
    "1/2**40": lambda: [i / 2**40 for i in range(25_000)],
    "tenths": lambda: [i / 10 for i in range(25_000)],
    "grid": lambda: [(x, y, z) for x in range(-13, 13) for y in range(-13, 13) for z in range(-13, 13)],
    "edges": lambda: [frozenset((i, i + 1)) for i in range(-5_000, 5_000)],
    "strings": lambda: [str(i) for i in range(25_000)],
    "decimals": lambda: [Decimal(i) / 100 for i in range(12_500)],
    "fractions": lambda: [Fraction(i, 1009) for i in range(12_500)],
    "ids": lambda: [UUID(int=i << 64) for i in range(12_500)],
    "days": lambda: [date(2000, 1, 1) + timedelta(days=i) for i in range(5_000)],
    "spans": lambda: [timedelta(seconds=i) for i in range(12_500)],
    "aware": lambda: [datetime(2000, 1, 1, tzinfo=UTC) + timedelta(minutes=i) for i in range(12_500)],
    "members": lambda: list(np.arange(7_500)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LEGITIMATE)
def test_large_honest_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of a quarter of the size that matters here, with a quarter of the steps allowed."""
    monkeypatch.setattr(codec, "MAX_STEPS", codec.MAX_STEPS // 4)
    keys = LEGITIMATE[name]()
    back = round_trip(dict.fromkeys(keys))
    assert list(back) == keys
    members = set(keys)
    assert round_trip(members) == members


def test_big_integers() -> None:
    value = -(1 << (8 * 8_000_000)) + 12345
    start = clock.thread_time()
    assert round_trip(value) == value
    assert clock.thread_time() - start < SOON


# --- What is imported


def run_clean(code: str, *flags: str) -> str:
    prepare = "import os, sys; sys.path.insert(0, os.getcwd())\n"
    result = subprocess.run([sys.executable, *flags, "-c", prepare + code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_the_module_imports_next_to_nothing() -> None:
    loaded = run_clean("before = set(sys.modules)\nimport sandbox.engine.codec\nprint(*set(sys.modules) - before)", "-I", "-S")
    ours = {"sandbox", "sandbox.engine", "sandbox.engine.codec"}
    assert {name for name in loaded.split() if not name.startswith("sandbox")} <= {"struct", "_struct", "__future__"}
    assert ours <= set(loaded.split())


def test_numpy_is_imported_only_for_numpy_data() -> None:
    code = """
from sandbox.engine import codec
value = [1, "a", {"k": 2.5}, codec.decode(codec.encode((1, b"x")), max_bytes=1000)]
assert codec.decode(codec.encode(value), max_bytes=1000) == value
print("numpy" in sys.modules, "dataclasses" in sys.modules, "decimal" in sys.modules)
codec.decode(bytes.fromhex(sys.argv[1] if len(sys.argv) > 1 else "ARRAY"), max_bytes=1000)
print("numpy" in sys.modules)
""".replace("ARRAY", codec.encode(np.zeros(2)).hex())
    assert run_clean(code) == "False False False\nTrue"


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**63 - 1,
        -(2**63),
        2**63,
        0.0,
        -0.0,
        1.5,
        float("inf"),
        "",
        "a",
        "\ud800é",
        "x" * 64,
        "y" * 65,
    ],
)
def test_the_message_of_a_scalar_alone_is_that_of_any_value(value: Any) -> None:
    """However it is put together: `max_bytes` that leaves no room for the short way takes the long one."""
    data = codec.encode(value)
    assert data == codec.encode(value, max_bytes=max(len(data), 29))
    read = decode(data)
    assert (type(read), repr(read)) == (type(value), repr(value))
    for cut in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:cut])
    with pytest.raises(CodecError):
        decode(data + b"\0")
    for place in range(28):  # the head says how long the columns are
        with pytest.raises(CodecError):
            decode(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])
