"""What plugins do to files: the records of it, the limit on it, and what was refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    IsolationConfig,
    IsolationLevel,
    PluginExecutionError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxViolation,
    SandboxViolationType,
    SecurityViolationError,
)
from sandbox.engine import channel, client
from sandbox.engine.recording import Recorder

from . import harness, plugins

rootless = pytest.mark.rootless
NAMESPACED = [level for level in IsolationLevel if level is not IsolationLevel.MINIMAL]
TWO = pytest.mark.parametrize("level", [IsolationLevel.MINIMAL, IsolationLevel.STRICT], ids=lambda level: level.value)
namespaced = pytest.mark.parametrize("level", NAMESPACED, ids=lambda level: level.value)
LONG = 0.15  # seconds: a call that is watched


def make(names: list[bytes], seconds: float = 0.0) -> None:
    """Files in the current folder; after a rest of `seconds`, which has them written while somebody watches."""
    import time

    time.sleep(seconds)
    for name in names:
        with open(name, "w") as file:
            file.write("x")
    time.sleep(seconds / 3)


def operations(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(record["operation"], record["path"]) for record in records]


def workspace(level: IsolationLevel, paths: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same with paths relative to the workspace, which at level minimal lies somewhere on disk."""
    if level is not IsolationLevel.MINIMAL:
        assert all(path.startswith("/workspace/") for _, path in paths)
        return [(operation, path.removeprefix("/workspace/")) for operation, path in paths]
    return [(operation, path.partition("/files/")[2]) for operation, path in paths]


@rootless
@pytest.mark.parametrize("seconds", [0.0, LONG], ids=["short", "long"])
def test_operations_are_counted_and_recorded(level: IsolationLevel, seconds: float) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            assert sandbox.get_file_operations() == []
            await sandbox.execute_plugin_safe(plugins.my_plugin_function)
            assert sandbox.get_telemetry().file_operations_count == 0
            await sandbox.execute_plugin_safe(make, [b"one", b"two"], seconds)
            records = sandbox.get_file_operations()
            seen = workspace(level, operations(records))
            assert [each for each in seen if each[0] == "create"] == [("create", "one"), ("create", "two")]
            assert set(seen) <= {("create", "one"), ("create", "two"), ("modify", "one"), ("modify", "two")}
            assert sandbox.get_telemetry().file_operations_count == len(records)
            await sandbox.execute_plugin_safe(os.unlink, "one")
            assert workspace(level, operations(sandbox.get_file_operations()[len(records) :])) == [("delete", "one")]
            assert set(records[0]) == {"timestamp", "operation", "path", "is_directory", "size"}
        assert sandbox.get_telemetry().file_operations_count == len(records) + 1

    asyncio.run(main())


@TWO
@pytest.mark.parametrize("seconds", [0.0, LONG], ids=["short", "long"])
def test_hostile_names_are_escaped(level: IsolationLevel, seconds: float) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            await sandbox.execute_plugin_safe(make, [b"new\nline", b"\xff\xfe", b"\x1b[31m"], seconds)
            seen = workspace(level, operations(sandbox.get_file_operations()))
        assert {path for _, path in seen} == {"new\\nline", "\\udcff\\udcfe", "\\x1b[31m"}

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [0.0, LONG], ids=["short", "long"])
def test_who_passes_the_limit_is_stopped(level: IsolationLevel, seconds: float) -> None:
    told: list[SandboxViolation] = []

    class Handler:
        def on_violation_detected(self, violation: SandboxViolation) -> None:
            told.append(violation)

    async def main() -> None:
        limits = {"max_file_operations": 20}
        async with harness.open_sandbox(level, limits=limits, monitoring_handler=Handler()) as sandbox:
            await sandbox.execute_plugin_safe(make, [b"some"], seconds)
            with pytest.raises(ResourceLimitExceededError, match="file operations") as caught:
                await sandbox.execute_plugin_safe(make, [b"%d" % number for number in range(21)], seconds)
            assert caught.value.limit == "file_operations"
            assert caught.value.allowed == 20
            assert caught.value.used == 21
            await sandbox.execute_plugin_safe(make, [b"more"], seconds)
        assert [violation.type for violation in told] == [SandboxViolationType.RESOURCE_EXCEEDED]
        counted = {"limit": "file_operations", "allowed": 20, "used": 21, "source": "watchdog"}
        assert told[0].details == {**counted, "sandbox_id": sandbox.sandbox_id}
        assert sandbox.get_violations() == told

    asyncio.run(main())


def endless() -> None:
    number = 0
    while True:
        number += 1
        with open(f"file-{number % 10}", "w"):
            pass


@TWO
def test_a_flood_is_stopped_soon(level: IsolationLevel) -> None:
    with pytest.raises(ResourceLimitExceededError) as caught:
        harness.call(level, endless)
    assert caught.value.limit == "file_operations"


def write_often(paths: list[str]) -> None:
    """Much more often than is permitted, and not one file so often that the kernel makes one event of it."""
    for _ in range(2000):
        for path in paths:
            with open(path, "w") as file:
                file.write("x")


def hard_links() -> None:
    """Each file has a second name for a while."""
    import os
    import time

    paths = [f"file-{number}" for number in range(7)]
    for path in paths:
        open(path, "w").close()
        os.link(path, path + "-second")
    time.sleep(0.15)
    for path in paths:
        os.unlink(path + "-second")
    time.sleep(0.15)
    write_often(paths)


def exchanges() -> None:
    """Each file has changed places with one in another folder."""
    import ctypes
    import os
    import time

    os.mkdir("folder")
    time.sleep(0.1)
    for number in range(4):
        for path in (f"folder/{number}", f"other-{number}"):
            open(path, "w").close()
    time.sleep(0.1)
    for number in range(4):
        paths = f"folder/{number}".encode(), f"other-{number}".encode()
        assert ctypes.CDLL(None).renameat2(-100, paths[0], -100, paths[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    time.sleep(0.1)
    write_often([f"folder/{number}" for number in range(4)])


def deeper(levels: int, name: str) -> None:
    """In a folder below so many others."""
    import os
    import time

    for _ in range(levels):
        os.mkdir(name)
        os.chdir(name)
    time.sleep(0.2)
    write_often([str(number) for number in range(7)])


def closed(mode: int) -> None:
    """In a folder that the caller may not look into either, where it has no rights of root's."""
    import os
    import time

    os.mkdir("folder", mode)
    os.chdir("folder")
    time.sleep(0.2)
    write_often([str(number) for number in range(7)])


HIDING: dict[str, Callable[[], None]] = {
    "hard links": hard_links,
    "exchanges": exchanges,
    "a path of 4,250 bytes": functools.partial(deeper, 17, "x" * 249),
    "a path of 1,280 characters, of 4 bytes each": functools.partial(deeper, 20, "\N{GRINNING FACE}" * 63),
    "300 levels": functools.partial(deeper, 300, "x"),
    "a folder that cannot be read": functools.partial(closed, 0o300),
}


@pytest.mark.long
@rootless
@TWO
@pytest.mark.parametrize("way", HIDING)
def test_nobody_hides_operations_from_the_limit(level: IsolationLevel, way: str) -> None:
    async def main() -> None:
        limits = {"max_file_operations": 400}
        async with harness.open_sandbox(level, limits=limits) as sandbox:
            with pytest.raises(ResourceLimitExceededError) as caught:
                await sandbox.execute_plugin_safe(HIDING[way])
            assert caught.value.limit == "file_operations"
            assert await sandbox.execute_plugin_safe(os.getpid)
        assert sandbox.get_telemetry().cleanup_successful

    with harness.nothing_left():
        asyncio.run(main())


@rootless
@pytest.mark.parametrize("level", [IsolationLevel.STANDARD, IsolationLevel.STRICT], ids=lambda level: level.value)
@pytest.mark.parametrize("seconds", [0.0, LONG], ids=["short", "long"])
@pytest.mark.parametrize("mode", [0o400, 0o300, 0], ids=oct)
def test_a_folder_that_lets_nobody_in_breaks_nothing(level: IsolationLevel, seconds: float, mode: int) -> None:
    def make_closed(mode: int, seconds: float) -> None:
        import os
        import time

        time.sleep(seconds)
        os.mkdir("folder")
        open("folder/file", "w").close()
        os.chmod("folder", mode)
        time.sleep(seconds)

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            with contextlib.suppress(ResourceLimitExceededError):  # for hiding, if it was not watched in time
                await sandbox.execute_plugin_safe(make_closed, mode, seconds)
            names = {entry.path for entry in sandbox.list_files()}
            assert names in ({"folder"}, {"folder", "folder/file"})
            assert await sandbox.execute_plugin_safe(os.getpid)
        assert sandbox.get_telemetry().cleanup_successful

    with harness.nothing_left():
        asyncio.run(main())


@TWO
def test_of_calls_at_once_each_has_its_share(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, limits={"max_file_operations": 100}) as sandbox:
            names = [[b"%d-%d" % (call, number) for number in range(20)] for call in range(4)]
            await asyncio.gather(*(sandbox.execute_plugin_safe(make, each, LONG) for each in names))
            made = [record["path"] for record in sandbox.get_file_operations() if record["operation"] == "create"]
            assert len(made) == len(set(made)) == 80

    asyncio.run(main())


@TWO
def test_what_the_host_writes_is_nobodys(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            sandbox.write_file("before", "x")
            await sandbox.execute_plugin_safe(plugins.my_plugin_function)
            sandbox.write_file("folder/between", "x")
            await sandbox.execute_plugin_safe(plugins.my_plugin_function)
            running = asyncio.ensure_future(sandbox.execute_plugin_safe(make, [b"own"], LONG))
            await asyncio.sleep(LONG / 2)
            for number in range(5):
                sandbox.write_file("folder/between", "y" * number)
                sandbox.write_file("other/during", "y" * number)
            await running
            seen = workspace(level, operations(sandbox.get_file_operations()))
        assert {path for _, path in seen} == {"own"}

    asyncio.run(main())


@TWO
@pytest.mark.parametrize("seconds", [0.0, LONG], ids=["short", "long"])
def test_among_many_files(level: IsolationLevel, seconds: float) -> None:
    """After a short call many are looked at only where something is new or gone."""

    async def main() -> None:
        limits = {"max_file_operations": 10_000}
        async with harness.open_sandbox(level, limits=limits) as sandbox:
            await sandbox.execute_plugin_safe(make, [b"%d" % number for number in range(300)])
            before = len(sandbox.get_file_operations())
            assert before >= 300
            await sandbox.execute_plugin_safe(plugins.my_plugin_function)
            await sandbox.execute_plugin_safe(make, [b"another"], seconds)
            seen = workspace(level, operations(sandbox.get_file_operations()[before:]))
            assert seen[0] == ("create", "another")

    asyncio.run(main())


def test_the_switches(level: IsolationLevel) -> None:
    def of(**config: Any) -> tuple[int, int]:
        async def main() -> tuple[int, int]:
            degraded = {"allow_degraded": True} if level in (IsolationLevel.STRICT, IsolationLevel.MAXIMUM) else {}
            async with harness.open_sandbox(level, config={**degraded, **config}) as sandbox:
                await sandbox.execute_plugin_safe(make, [b"one"], LONG)
                return sandbox.get_telemetry().file_operations_count, len(sandbox.get_file_operations())

        return asyncio.run(main())

    assert of(enable_filesystem_isolation=False) == (0, 0)
    assert of(enable_real_time_monitoring=False) == (1, 1)
    count, kept = of(telemetry_enabled=False)
    assert (count > 0, kept) == (True, 0)
    assert IsolationConfig().enable_real_time_monitoring


def work(folder: str, seconds: float) -> None:
    import os
    import shutil
    import time

    time.sleep(seconds)
    with open(f"{folder}/text", "a") as file:
        file.write("more\n")
    os.chmod(f"{folder}/mode", 0o600)
    os.rename(f"{folder}/sub/old", f"{folder}/sub/new")
    shutil.rmtree(f"{folder}/gone")
    os.makedirs(f"{folder}/made")
    with open(f"{folder}/made/file", "w") as file:
        file.write("made\n")
    time.sleep(seconds / 3)


@rootless
@namespaced
@pytest.mark.parametrize("seconds", [0.0, LONG], ids=["short", "long"])
def test_granted_folders(level: IsolationLevel, seconds: float, tmp_path: Path) -> None:
    folder = tmp_path / "granted"
    for name in ("sub", "gone"):
        (folder / name).mkdir(parents=True)
    for name in ("text", "mode", "sub/old", "gone/file"):
        (folder / name).write_text(f"{name}\n")
    if harness.ROOT:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 4321, 4322)
        for above in (tmp_path, *tmp_path.parents[:2]):
            above.chmod(0o711)

    async def main() -> None:
        permissions = {"allowed_directories": [str(folder)], "allow_file_deletion": True}
        async with harness.open_sandbox(level, permissions=permissions) as sandbox:
            await sandbox.execute_plugin_safe(work, str(folder), seconds)
            records = sandbox.get_file_operations()
            assert all(record["path"].startswith(f"{folder}/") for record in records)
            seen = {(operation, path.removeprefix(f"{folder}/")) for operation, path in operations(records)}
            assert {("modify", "text"), ("attributes", "mode"), ("create", "made"), ("create", "made/file")} <= seen
            assert ("delete", "gone") in seen
            assert {("delete", "sub/old"), ("create", "sub/new")} <= seen or ("move", "sub/new") in seen
            assert not {path for _, path in seen} & {"sub", ""}, "what the overlay does for itself is not the plugin's"
            await sandbox.discard_changes()
            before = len(records)
            await sandbox.execute_plugin_safe(plugins.my_plugin_function)
            assert len(sandbox.get_file_operations()) == before, "neither is that it was discarded"
            await sandbox.execute_plugin_safe(work, str(folder), seconds)
            assert len(sandbox.get_file_operations()) >= before + 5

    asyncio.run(main())


@rootless
def test_without_a_descriptor_for_a_granted_folder_none_is_lost_and_the_next_call_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "granted"
    folder.mkdir()

    def refuse(fd: int) -> int:
        raise OSError(24, "Too many open files")

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STRICT, permissions={"allowed_directories": [str(folder)]}) as sandbox:
            own = sandbox._sandbox
            assert own is not None

            def attempt() -> int:
                before = len(os.listdir("/proc/self/fd"))
                recorder = Recorder(own)
                with monkeypatch.context() as patched:
                    patched.setattr(os, "dup", refuse)
                    recorder.open()
                assert len(recorder.trees) == 1
                recorder.open()  # as the next call does
                assert len(recorder.trees) == 2
                recorder.close(look=False)
                return len(os.listdir("/proc/self/fd")) - before

            assert sandbox._in_engine(attempt) == 0

    asyncio.run(main())


# -- refusals ----------------------------------------------------------------------------------------------------------


def caught() -> int:
    """Writes outside, and goes on; returns the line number of the first attempt."""
    import contextlib
    import os
    import sys

    line = sys._getframe().f_lineno
    with contextlib.suppress(OSError):
        open("/usr/lib/own\x1b[31m", "w")  # noqa: SIM115
    with contextlib.suppress(OSError):
        os.mkdir("/usr/lib/own")
    for _ in range(4):
        with contextlib.suppress(OSError):
            os.remove(os.__file__)
    with contextlib.suppress(OSError):
        open("/usr/lib/missing/own", "w")  # noqa: SIM115
    with contextlib.suppress(OSError):
        open("own", "w").close()
    return line


def uncaught() -> None:
    open("/usr/lib/own", "w")  # noqa: SIM115


def wrapped() -> None:
    try:
        uncaught()
    except OSError as error:
        raise ValueError("it did not work") from error


def only_a_library() -> str:
    """What a library tries and goes without is no matter of the plugin's."""
    import tempfile

    tempfile.tempdir = None
    tempfile._candidate_tempdir_list = lambda: ["/usr/lib", "/tmp", "."]  # type: ignore[attr-defined]
    return tempfile.gettempdir()


def own_modes() -> str:
    """A file of the plugin's own that its mode keeps it from."""
    import os

    with open("closed", "w"):
        pass
    os.chmod("closed", 0)
    try:
        open("closed").close()
    except PermissionError as error:
        return type(error).__name__
    return "open"


def refusals(level: IsolationLevel, function: Any, **settings: Any) -> tuple[list[SandboxViolation], Any]:
    """The violations, and what came back or was raised."""

    async def main() -> tuple[list[SandboxViolation], Any]:
        async with harness.open_sandbox(level, **settings) as sandbox:
            try:
                result = await sandbox.execute_plugin_safe(function)
            except SandboxException as error:
                result = error
            return sandbox.get_violations(), result

    return asyncio.run(main())


@rootless
def test_a_caught_refusal_is_told_with_its_line(level: IsolationLevel) -> None:
    violations, line = refusals(level, caught)
    assert {violation.type for violation in violations} == {SandboxViolationType.FILESYSTEM_VIOLATION}
    told = [violation.details for violation in violations]
    assert [(each["operation"], each["path"], each["count"]) for each in told] == [
        ("open", "/usr/lib/own\\x1b[31m", 1),
        ("mkdir", "/usr/lib/own", 1),
        ("unlink", os.__file__, 4),
    ]
    assert {each["errno"] for each in told} <= {"EACCES", "EROFS"}
    assert {(each["file"], each["source"]) for each in told} == {(__file__, "interpreter")}
    assert told[0]["line"] == line + 2
    assert f"{__file__}, line {line + 2}" in violations[0].message


def test_an_uncaught_refusal_ends_by_it(level: IsolationLevel) -> None:
    violations, error = refusals(level, uncaught)
    assert isinstance(error, SecurityViolationError)
    assert error.violations == violations
    assert [(each.details["path"], each.details["count"]) for each in violations] == [("/usr/lib/own", 1)]
    assert violations[0].details["line"] == uncaught.__code__.co_firstlineno + 1


@TWO
def test_a_refusal_behind_another_exception_is_told(level: IsolationLevel) -> None:
    violations, error = refusals(level, wrapped)
    assert isinstance(error, PluginExecutionError)
    assert error.exception_type == "ValueError"
    assert [(each.details["path"], each.details["count"]) for each in violations] == [("/usr/lib/own", 1)]


@TWO
def test_a_function_without_code_of_the_plugins(level: IsolationLevel) -> None:
    violations, error = refusals(level, functools.partial(os.rmdir, "/usr/lib"))
    assert isinstance(error, SecurityViolationError)
    assert [(each.details["operation"], each.details["file"], each.details["line"]) for each in violations] == [
        ("rmdir", "", 0)
    ]


@TWO
@pytest.mark.parametrize("function", [only_a_library, own_modes])
def test_what_is_no_refusal_of_the_plugin(level: IsolationLevel, function: Any) -> None:
    violations, _ = refusals(level, function)
    assert violations == []


def many_refusals() -> str:
    import contextlib

    for number in range(20):
        with contextlib.suppress(OSError):
            open(f"/usr/lib/own-{number}", "w")  # noqa: SIM115
    return "went on"


@TWO
def test_harmless_attempts_do_not_pass_the_threshold(level: IsolationLevel) -> None:
    violations, result = refusals(level, many_refusals)
    assert result == "went on"
    assert len(violations) == 20


@TWO
def test_without_monitoring_only_what_ends_a_call_is_told(level: IsolationLevel) -> None:
    config = {"enable_real_time_monitoring": False}
    assert refusals(level, many_refusals, config=config) == ([], "went on")
    violations, error = refusals(level, uncaught, config=config)
    assert isinstance(error, SecurityViolationError)
    assert len(violations) == 1


def forge(frames: list[bytes]) -> str:
    """Sends frames on the job's socket, which is the plugin's for the taking."""
    import os
    import stat

    for fd in range(3, 50):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            for frame in frames:
                os.write(fd, frame)
        except OSError:
            continue
    return "sent"


def note(**fields: object) -> bytes:
    return channel.NOTE.upper() + channel.pack("refused", fields)


@TWO
def test_forged_notes_are_bounded_and_escaped(level: IsolationLevel) -> None:
    good: dict[str, object] = {"path": "/x\x1b[2J", "operation": "open", "errno": 13, "file": "\x1b", "line": "1\n", "count": 3}
    bad = [
        note(**{**good, "operation": "forge"}),
        note(**{**good, "errno": 2}),
        note(**{**good, "count": "-1"}),
        note(**{**good, "count": "9" * 50}),
        note(**{**good, "path": ""}),
        note(operation="open"),
        channel.NOTE.upper() + b"\xff\xff",
    ]
    violations, result = refusals(level, functools.partial(forge, [*bad, note(**{**good, "path": "/x\x1b[2J" + "y" * 5000})]))
    assert result == "sent"
    assert len(violations) == 1
    details = violations[0].details
    assert (details["count"], details["line"], details["file"]) == (3, None, "\\x1b")
    assert details["path"].startswith("/x\\x1b[2J")
    assert len(details["path"]) < 1100
    assert "\x1b" not in violations[0].message


@TWO
def test_a_flood_of_forged_notes_is_not_listened_to(level: IsolationLevel) -> None:
    frames = [
        note(path=f"/{number}", operation="open", errno=13, file="", line=0, count=1) for number in range(client.NOTES + 2000)
    ]
    violations, error = refusals(level, functools.partial(forge, frames), limits={"max_memory_mb": 256})
    assert isinstance(error, PluginExecutionError)
    assert len(violations) == client.NOTES


def forbidden_files() -> list[str]:
    import os
    import stat

    answers = []
    with open("file", "w"):
        pass
    attempts: list[tuple[Any, ...]] = [
        (os.chmod, "file", 0o4755),
        (os.mknod, "device", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        (os.chmod, "file", 0o2755),
    ]
    for action, *arguments in attempts:
        try:
            action(*arguments)
            answers.append("done")
        except OSError as error:
            answers.append(type(error).__name__)
    return answers


@rootless
def test_what_the_kernel_refuses_of_files_is_told_by_it(level: IsolationLevel) -> None:
    """A copying program may want set-group-ID: that is refused without a word."""
    violations, answers = refusals(level, forbidden_files)
    assert "done" not in answers
    told = {(violation.type, violation.details["source"]) for violation in violations}
    assert told == {(SandboxViolationType.FILESYSTEM_VIOLATION, "kernel")}
    names = {violation.details["syscall"].replace("at2", "").replace("at", "") for violation in violations}
    own_modes = level is IsolationLevel.MINIMAL and not harness.ROOT  # there no mode may be changed at all
    assert names == ({"mknod"} if own_modes else {"chmod", "mknod"})


def silenced() -> str:
    """A plugin that takes the record away has nothing from it but that."""
    import sys

    monitoring = getattr(sys, "monitoring", None)
    if monitoring is not None:
        for tool in range(6):
            monitoring.free_tool_id(tool)

    def disturb(event: str, args: Any) -> None:
        if event == "open":
            raise KeyError(event)

    sys.addaudithook(disturb)
    try:
        open("/usr/lib/own", "w").close()
    except (KeyError, OSError) as error:
        return type(error).__name__
    return "written"


def test_who_silences_the_record_gains_nothing(level: IsolationLevel) -> None:
    _, result = refusals(level, silenced)
    assert result in ("KeyError", "PermissionError", "OSError")
