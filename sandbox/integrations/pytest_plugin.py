"""A pytest plugin, of the extra psie[pytest]: a test marked `@pytest.mark.sandbox(level="strict")` runs in a sandbox.

Fixtures are made where pytest runs, and their values travel as arguments; what the body asserts, skips and prints comes back.
What comes back is text of code that nobody has to trust: it is shown escaped, and decides nothing but this test's outcome.

Loaded at every start of pytest where psie is installed, so that it imports what sandboxes need when the first such test runs.
"""

from __future__ import annotations

import builtins
import inspect
from typing import TYPE_CHECKING, Any

import pytest
from _pytest._code.code import ReprFileLocation, TerminalRepr

from sandbox.text import escape_text

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from _pytest._io import TerminalWriter

    from sandbox.errors import PluginExecutionError
    from sandbox.sandbox import EnhancedPluginSandbox
    from sandbox.violations import SandboxViolation

MARK = "sandbox"
SETTINGS = ("level", "limits", "permissions", "config", "environment", "read_only", "violations")
# They act on the process that pytest runs in, which the body of such a test is not in.
OUTSIDE = frozenset(
    ("request", "caplog", "capsys", "capsysbinary", "capfd", "capfdbinary", "capteesys", "recwarn", "pytester", "testdir")
)
LINES = 200  # of the explanation of a comparison
HAS_RUN = pytest.StashKey[bool]()
WHAT_FAILED = pytest.StashKey["SandboxedRepr"]()


class SandboxTestError(Exception):
    """What a sandboxed test ended by, if that is no exception that Python itself has."""


class SandboxedRepr(TerminalRepr):
    """How a failure inside is shown: the traceback there, then what it was."""

    def __init__(self, lines: list[str], message: str, place: tuple[str, int]) -> None:
        self.lines = lines
        self.message = message
        self.reprcrash = ReprFileLocation(place[0], place[1], message.partition("\n")[0])

    def toterminal(self, tw: TerminalWriter) -> None:
        for each in self.lines:
            tw.line(each)
        for each in self.message.splitlines():
            tw.line(f"E   {each}", bold=True, red=True)
        tw.line("")
        self.reprcrash.toterminal(tw)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "sandbox(level=None, limits=None, permissions=None, config=None, environment=None, read_only=(), violations='fail'): "
        "run the body of this test in a psie sandbox; violations='allow' lets it run into protections",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run it inside, if it is marked."""
    mark = pyfuncitem.get_closest_marker(MARK)
    if mark is None:
        return None
    pyfuncitem.stash[HAS_RUN] = True
    if mark.args:
        pytest.fail(f"@pytest.mark.sandbox: give settings by name ({', '.join(SETTINGS)})", pytrace=False)
    function = pyfuncitem._getobj()  # type: ignore[no-untyped-call]  # what it was before others wrapped it, as plugins for asyncio do
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        pytest.fail("@pytest.mark.sandbox: this test is a generator, which pytest does not run", pytrace=False)
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    settings = settings_of(mark.kwargs)
    refuse_outside(arguments)
    verbosity = pyfuncitem.config.get_verbosity(pytest.Config.VERBOSITY_ASSERTIONS)
    run(pyfuncitem, settings, body_of(function, verbosity), function, arguments)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A marked test that did not run inside must not look as if it had: of a unittest.TestCase, or of another plugin's kind."""
    result = yield
    if item.get_closest_marker(MARK) is not None and not item.stash.get(HAS_RUN, False):
        pytest.fail(
            f"@pytest.mark.sandbox: a {type(item).__name__} cannot run in a sandbox, and has run outside: make it a plain test "
            "function or a method of a plain class",
            pytrace=False,
        )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, pytest.TestReport]:
    report: pytest.TestReport = yield
    if call.when == "call" and report.failed and WHAT_FAILED in item.stash and call.excinfo is not None:
        report.longrepr = item.stash[WHAT_FAILED]
    return report


# -- settings ------------------------------------------------------------------------------------------------------------


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of EnhancedPluginSandbox, and `violations`. Mistakes fail the test, with one sentence."""
    from dataclasses import replace

    from sandbox.config import IsolationConfig, PluginLimitsV2, PluginPermissionsV2, level_of
    from sandbox.sandbox import checked_environment

    unknown = sorted(set(given) - set(SETTINGS))
    if unknown:
        pytest.fail(f"@pytest.mark.sandbox: there is no setting {unknown[0]!r}: give {', '.join(SETTINGS)}", pytrace=False)
    violations = given.get("violations", "fail")
    if violations not in ("fail", "allow"):
        pytest.fail(f"@pytest.mark.sandbox: violations is {violations!r}: give 'fail' or 'allow'", pytrace=False)
    try:
        # The runs of tests are nobody's records, unless a config says so.
        config = given.get("config") or IsolationConfig(telemetry_enabled=False)
        if not isinstance(config, IsolationConfig):
            raise TypeError(f"config is a {type(config).__name__}: give an IsolationConfig")
        if given.get("level") is not None:
            config = replace(config, level=level_of("level", given["level"]))
        if "pytest" not in config.preload:
            config = replace(config, preload=(*config.preload, "pytest"))
        return {
            "config": config,
            "limits": made(PluginLimitsV2, given.get("limits")),
            "permissions": made(PluginPermissionsV2, given.get("permissions")),
            "environment": checked_environment(f"@pytest.mark.{MARK}", given.get("environment")),
            "read_only": tuple(given.get("read_only") or ()),
            "violations": violations,
        }
    except (ValueError, TypeError) as error:
        pytest.fail(f"@pytest.mark.sandbox: {error}", pytrace=False)


def made(kind: type[Any], given: Any) -> Any:
    """Settings as they are, or of a dict of them. Raises ValueError, TypeError."""
    if isinstance(given, kind):
        return given
    import difflib
    from dataclasses import fields

    if not isinstance(given, (dict, type(None))):
        raise TypeError(f"a {type(given).__name__} is no {kind.__name__}: give one, or a dict of its fields")
    names = [field.name for field in fields(kind)]
    unknown = next((name for name in given or () if name not in names), None)
    if unknown is not None:
        near = difflib.get_close_matches(str(unknown), names, 1)
        raise ValueError(f"{kind.__name__} has no {unknown!r}" + (f", did you mean {near[0]}?" if near else ""))
    return kind(**given) if isinstance(given, dict) else kind()


def refuse_outside(arguments: Mapping[str, object]) -> None:
    """Fixtures that cannot be of use inside, or cannot get there."""
    from sandbox import host, transport
    from sandbox.errors import PluginExecutionError

    for name, value in arguments.items():
        if name in OUTSIDE:
            pytest.fail(
                f"the fixture {name!r} acts on pytest's own process, and this test runs in a sandbox: leave it out, or use it "
                "in a fixture",
                pytrace=False,
            )
        reason = ""
        try:
            transport.pack(dict, (value,), {}, host.facts().path)
        except PluginExecutionError as error:
            reason = escape_text(error.exception_message or str(error), keep="").strip()
        if reason:
            pytest.fail(
                f"the value of the fixture {name!r} ({type(value).__name__}) cannot travel into the sandbox: {reason}",
                pytrace=False,
            )


# -- inside --------------------------------------------------------------------------------------------------------------


def body_of(function: Callable[..., Any], verbosity: int) -> Callable[..., Any]:
    """What is run inside: the test, with pytest's explanations of comparisons. Made in here, so that it travels by value."""
    most = LINES

    def explain() -> None:
        import itertools
        from inspect import signature

        from _pytest.assertion import util

        class Config:
            """As much of a pytest.Config as the explanations of older versions ask for."""

            def get_verbosity(self, kind: object = None) -> int:
                return verbosity

            def getoption(self, name: str, default: object = None) -> object:
                return verbosity if name == "verbose" else default

            def get_terminal_writer(self) -> Config:
                return self

            def _highlight(self, source: str, lexer: str = "") -> str:
                return source

        settings: dict[str, Any] = {"config": Config()}
        if "verbose" in signature(util.assertrepr_compare).parameters:
            plain = Config()._highlight
            settings = {"verbose": verbosity, "highlighter": plain, "assertion_text_diff_style": "ndiff"}

        def compare(operator: str, left: object, right: object) -> str | None:
            try:
                found: Any = util.assertrepr_compare(op=operator, left=left, right=right, **settings) or ()
                lines = list(itertools.islice(found, most))
            except Exception:  # another version may ask for more: then there is less to read
                return None
            return "\n~".join(line.replace("\n", "\\n") for line in lines).replace("%", "%%") if lines else None

        util._reprcompare = compare

    def body(test: Callable[..., Any], given: dict[str, Any]) -> None:
        explain()
        test(**given)

    async def awaited(test: Callable[..., Any], given: dict[str, Any]) -> None:
        explain()
        await test(**given)

    chosen = awaited if inspect.iscoroutinefunction(function) else body
    chosen.__qualname__ = getattr(function, "__qualname__", "test")  # which is the plugin's name in what is logged
    return chosen


# -- outside -------------------------------------------------------------------------------------------------------------


def run(
    item: pytest.Function,
    settings: dict[str, Any],
    body: Callable[..., Any],
    function: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    """In a sandbox of its own. Raises what becomes of the test."""
    import asyncio

    from sandbox.errors import PluginExecutionError, SandboxException
    from sandbox.sandbox import EnhancedPluginSandbox

    violations = settings.pop("violations")
    sandbox = EnhancedPluginSandbox(**settings)
    loop = asyncio.new_event_loop()  # that is not the thread's current one: other tests may have that
    try:
        loop.run_until_complete(in_sandbox(sandbox, body, function, arguments))
    except PluginExecutionError as error:
        ended(item, error)
    except (SandboxException, ValueError) as error:
        told(item, escape_text(str(error)), [])
        raise SandboxTestError(str(error)) from None
    finally:
        loop.close()
    # Not those that are a warning only: near a limit nothing was refused.
    seen = [each for each in sandbox.get_violations() if each.explanation is None or each.explanation.refused]
    if seen and violations == "fail":
        told(item, explained(seen), [])
        raise SandboxTestError(explained(seen))


async def in_sandbox(
    sandbox: EnhancedPluginSandbox, body: Callable[..., Any], function: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    async with sandbox:
        await sandbox.execute_plugin_safe(body, function, arguments)


def ended(item: pytest.Function, error: PluginExecutionError) -> None:
    """By an exception inside: skip, xfail, or the failure with what it says."""
    name = error.exception_type.rpartition(".")[2]
    message = escape_text(error.exception_message)
    if name == "Skipped":
        raise pytest.skip.Exception(message, _use_item_location=True)
    if name == "XFailed":
        pytest.xfail(message)
    if not error.exception_type:
        told(item, escape_text(str(error)), [])
        raise SandboxTestError(str(error)) from None
    frames = frames_of(error.traceback_text, str(item.path))
    told(item, f"{escape_text(name, keep='')}: {message}", frames)
    raise as_own(error.exception_type, message) from None


def as_own(name: str, message: str) -> Exception:
    """An exception of Python's own as itself, for xfail(raises=...); nothing is imported for what code from a sandbox says."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:
            pass  # it wants more than a text
    return SandboxTestError(f"{name}: {message}")


def frames_of(traceback_text: str, path: str) -> list[str]:
    """The lines of a traceback from the test on, without psie's and what raised it."""
    from sandbox.engine.outcome import with_source

    lines = escape_text(with_source(traceback_text, path)).splitlines()
    first = next((number for number, each in enumerate(lines) if each.startswith(f'  File "{path}"')), 0)
    kept = []
    for each in lines[first:]:
        if not each.startswith("  "):
            break
        kept.append(each)
    return kept


def told(item: pytest.Function, message: str, frames: list[str]) -> None:
    """Keep it for the report."""
    path, line = str(item.path), (item.location[1] or 0) + 1
    for each in frames:
        number = each.removeprefix(f'  File "{path}", line ').partition(",")[0]
        if number.isdecimal() and len(number) < 9:
            line = int(number)
    level = item.get_closest_marker(MARK)
    where = f" at level {level.kwargs['level']}" if level is not None and isinstance(level.kwargs.get("level"), str) else ""
    item.stash[WHAT_FAILED] = SandboxedRepr([f"in a sandbox{where}:", *frames], message, (path, line))


def explained(violations: list[SandboxViolation]) -> str:
    """What it ran into, each with what would allow it."""
    texts = []
    for violation in violations:
        explanation = violation.explanation
        texts.append(escape_text(violation.message, keep=""))
        if explanation is not None:
            texts.append("  " + escape_text(explanation.text(), keep=""))
    count = len(violations)
    return "\n".join([f"the test ran into {count} protection{'s' if count > 1 else ''}:", *texts])
