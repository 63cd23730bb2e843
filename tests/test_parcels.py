"""A function travels as it is when it is called: what was pickled before is taken only where nothing can have changed."""

from __future__ import annotations

import cmath
import colorsys
import math
import pickle
import sys
import types
import xml
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import transport
from sandbox.engine import worker
from sandbox.errors import PluginExecutionError

REPOSITORY = Path(__file__).parents[1]
PATH = [folder for folder in sys.path if folder and Path(folder).resolve() not in (REPOSITORY, REPOSITORY / "tests")]
NUMBER = 1


def plain(value: int) -> int:
    return value + NUMBER


def scaled(value: float, by: float = 2.0) -> float:
    return math.sqrt(value) * by


def knows_nothing(value: int, more: int = 2) -> list[int]:
    """With a docstring."""

    def inner() -> int:
        return value + more

    return [inner() for _ in range(2)]


def knows_builtins(value: str) -> int:
    return len(value)


SECRET = secret = "a text that nobody asked for"


def asks_an_attribute(value: Any) -> object:
    return value.secret


def calls_another(value: int) -> int:
    return helper(value) + 1


def helper(value: int) -> int:
    return value * NUMBER


def calls_itself(value: int) -> int:
    return value * calls_itself(value - 1) if value else 1


def in_a_comprehension(values: list[int]) -> list[int]:
    return [each + NUMBER for each in values]


LISTED = [1]
CLASS = type("Class", (), {"value": 1})


def knows_a_list() -> list[int]:
    return LISTED


def knows_a_class() -> int:
    return int(CLASS.value)  # type: ignore[attr-defined]


def knows_a_package() -> object:
    return xml.dom  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test changes here with `monkeypatch` is undone before the next one; so is what is kept."""
    transport.pack(plain, (), {}, PATH)  # which imports what it needs
    transport._parcels.clear()
    yield
    transport._parcels.clear()


def sent(function: Callable[..., Any]) -> bytes:
    return transport.sealed(transport.parcel(function, PATH), function, PATH)


def is_kept(function: Callable[..., Any]) -> bool:
    sent(function)
    return bool(transport.parcel(function, PATH).payload)


def arrived(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a sandbox would have it."""
    payload = sent(function)
    if transport.parcel(function, PATH).stands_alone:
        return worker.alone(payload)
    unpacked, args, kwargs = pickle.loads(payload)
    assert (args, kwargs) == ((), {})
    return unpacked  # type: ignore[no-any-return]


@pytest.mark.parametrize("function", [plain, scaled, calls_another, calls_itself, in_a_comprehension])
def test_what_cannot_change_is_pickled_once(function: Callable[..., Any]) -> None:
    assert is_kept(function)
    assert sent(function) is sent(function)
    parcel = transport.parcel(function, PATH)
    assert parcel.payload == transport.pack(function, (), {}, PATH)
    assert parcel.name == function.__qualname__


@pytest.mark.parametrize("function", [knows_nothing, knows_builtins, asks_an_attribute])
def test_a_function_alone_is_the_same_as_pickled(function: Callable[..., Any]) -> None:
    """It need not be unpickled, which takes longer."""
    there = arrived(function)
    assert transport.parcel(function, PATH).stands_alone is (function is not asks_an_attribute)
    pickled = pickle.loads(transport.pack(function, (), {}, PATH))[0]
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__", "__annotations__"):
        assert getattr(there, name) == getattr(pickled, name) == getattr(function, name)
    assert there.__dict__ == pickled.__dict__ == {}
    assert there.__code__ == pickled.__code__ == function.__code__
    assert there.__code__.co_filename == pickled.__code__.co_filename == __file__
    assert there.__globals__.keys() == pickled.__globals__.keys() == {"__builtins__", "__file__", "__name__", "__package__"}
    assert SECRET not in str({**there.__globals__, "__builtins__": {}})


def test_a_function_alone_does_what_it_did() -> None:
    assert arrived(knows_nothing)(1) == [3, 3]
    assert arrived(knows_builtins)("abc") == 3


def test_a_function_of_the_library_goes_by_its_name() -> None:
    assert arrived(colorsys.rgb_to_yiq) is colorsys.rgb_to_yiq
    assert not transport.parcel(colorsys.rgb_to_yiq, PATH).stands_alone


def test_a_global_that_is_another_now(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrived(plain)(1) == 2
    monkeypatch.setitem(globals(), "NUMBER", 10)
    assert arrived(plain)(1) == 11
    assert arrived(in_a_comprehension)([1]) == [11]
    assert arrived(calls_another)(2) == 21
    monkeypatch.setitem(globals(), "NUMBER", 100)
    assert arrived(in_a_comprehension)([1]) == [101]
    assert arrived(calls_another)(2) == 201


def test_a_global_that_was_a_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    def longest(values: str) -> int:
        return len(values)

    assert is_kept(longest)
    monkeypatch.setitem(globals(), "len", 7)
    with pytest.raises(TypeError):
        arrived(longest)("ab")


def test_a_helper_that_is_another_now(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrived(calls_another)(2) == 3
    monkeypatch.setitem(globals(), "helper", lambda value: 50)
    assert arrived(calls_another)(2) == 51


def test_a_helper_whose_code_is_another_now(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrived(calls_another)(2) == 3
    monkeypatch.setattr(helper, "__code__", (lambda value: 60).__code__)
    assert arrived(calls_another)(2) == 61


def test_other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrived(scaled)(4.0) == 4.0
    monkeypatch.setattr(scaled, "__defaults__", (3.0,))
    assert arrived(scaled)(4.0) == 6.0
    monkeypatch.setattr(scaled, "__defaults__", ([1.0],))
    assert not is_kept(scaled)


def test_another_module_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrived(scaled)(4.0) == 4.0
    monkeypatch.setitem(globals(), "math", cmath)
    assert arrived(scaled)(-4.0) == 4j


def test_other_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_kept(plain)
    monkeypatch.setitem(plain.__annotations__, "value", "float")
    assert arrived(plain).__annotations__["value"] == "float"
    monkeypatch.setitem(plain.__annotations__, "value", CLASS)
    assert not is_kept(plain)


def test_an_attribute_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_kept(plain)
    monkeypatch.setattr(plain, "mark", [1], raising=False)
    assert arrived(plain).mark == [1]  # type: ignore[attr-defined]
    plain.mark.append(2)  # type: ignore[attr-defined]
    assert arrived(plain).mark == [1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("function", [knows_a_list, knows_a_class])
def test_what_may_change_by_itself_is_pickled_each_time(function: Callable[..., Any]) -> None:
    assert not is_kept(function)


def test_a_list_and_a_class_travel_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived(knows_a_list)
    LISTED.append(2)
    assert arrived(knows_a_list)() == [1, 2]
    LISTED.pop()


def test_closures_and_what_is_no_plain_function_are_pickled_each_time() -> None:
    number = 1

    def closure() -> int:
        return number

    assert not is_kept(closure)
    assert arrived(closure)() == 1
    number = 2
    assert arrived(closure)() == 2
    others: tuple[Any, ...] = (LISTED.append, "".join, CLASS, print)
    for other in others:
        assert not is_kept(other)


def test_a_package_of_which_more_is_imported_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """cloudpickle sends along which of its modules a function may mean."""
    for name in [name for name in sys.modules if name.startswith("xml.dom")]:
        monkeypatch.delitem(sys.modules, name)
    before = sent(knows_a_package)
    __import__("xml.dom")
    assert b"xml.dom" not in before
    assert b"xml.dom" in sent(knows_a_package)


def test_one_that_has_gone_and_another_in_its_place() -> None:
    """An identity says nothing once its object has gone."""
    made: dict[str, Any] = {}
    exec("def first(): return 1", made)
    sent(made["first"])
    place = id(made["first"])
    parcel = transport._parcels[place]
    del made["first"]
    assert not parcel.is_of(plain)
    transport._parcels[id(plain)] = parcel
    assert arrived(plain)(1) == 2


def test_few_are_kept() -> None:
    kept = [types.FunctionType(plain.__code__, {"NUMBER": number}) for number in range(3 * transport.KEPT)]
    for number, function in enumerate(kept):
        assert arrived(function)(1) == 1 + number
    assert len(transport._parcels) <= transport.KEPT


def test_a_generator_is_refused() -> None:
    def generator() -> Iterator[int]:
        yield 1

    with pytest.raises(PluginExecutionError, match="is a generator"):
        transport.parcel(generator, PATH)


def test_what_is_told_to_go_by_value_later_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cloudpickle

    (tmp_path / "psie_library.py").write_text("def helper(): return 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    library = __import__("psie_library")
    path = [str(tmp_path), *PATH]
    function = eval("lambda: library.helper()", {"library": library, "__name__": "__main__"})
    try:
        first = transport.sealed(transport.parcel(function, path), function, path)
        assert b"psie_library" in first
        assert transport.sealed(transport.parcel(function, path), function, path) is first
        cloudpickle.register_pickle_by_value(library)
        by_value = transport.sealed(transport.parcel(function, path), function, path)
        del sys.modules["psie_library"]
        monkeypatch.undo()
        assert pickle.loads(by_value)[0]() == 5
    finally:
        cloudpickle.unregister_pickle_by_value(library)


def test_code_that_no_compiler_has_made_travels_all_the_same() -> None:
    def function() -> object:
        return "constant"

    function.__code__ = function.__code__.replace(co_consts=(None, print))
    assert pickle.loads(transport.sealed(transport.parcel(function, PATH), function, PATH))[0]() is print
