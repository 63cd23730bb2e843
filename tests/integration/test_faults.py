"""Every system call of the set-up fails once, as does what the host gives: the error is clear, nothing is left, all goes on.

The calls fail inside zygote, warden, init and worker (see faults.py), and in the caller's own process by patched functions.
A table of faults and outcomes is printed after the run. With PSIE_TEST_EVERY_FAULT=1 not a choice but every call of every
set-up fails with every errno in turn, which takes minutes.
"""

from __future__ import annotations

import _socket
import asyncio
import contextlib
import errno
import fcntl
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    EnhancedPluginSandbox,
    IsolationConfig,
    IsolationLevel,
    PluginExecutionError,
    PluginLimitsV2,
    PluginPermissionsV2,
    ResourceError,
    SandboxException,
    SandboxInitializationError,
    host,
    recipe,
    state,
)
from sandbox.engine import channel, service, zygote
from sandbox.engine.client import COMING_UP
from sandbox.engine.zygote import IDLE_WARDENS
from sandbox.ns import mounts, userids
from sandbox.ns import syscalls as sc

from . import faults, harness, plugins

pytestmark = pytest.mark.long
rootless = pytest.mark.rootless
EVERY = os.environ.get("PSIE_TEST_EVERY_FAULT") == "1"
long = pytest.mark.timeout(1800 if EVERY else 60 * harness.PATIENCE)
BOUND = 5.0 * harness.PATIENCE  # seconds in which a caller knows what became of its sandbox
SOME = (IsolationLevel.MINIMAL, IsolationLevel.STANDARD, IsolationLevel.MAXIMUM)  # STRICT makes no call that these do not
PLACES = 3  # calls of one name in one set-up that fail, unless EVERY

GENERAL = (errno.EPERM, errno.ENOSYS, errno.ENOMEM)
DESCRIPTORS = (*GENERAL, errno.EMFILE)
PROCESSES = (*GENERAL, errno.EMFILE, errno.EAGAIN, errno.ENOSPC)
# The system calls of a set-up, and what each may fail with.
CALLS: dict[str, tuple[int, ...]] = {
    "capset": GENERAL,
    "chdir": GENERAL,
    "clone": (errno.EPERM, errno.ENOMEM, errno.EAGAIN),  # fork(2)
    "clone3": PROCESSES,
    "dup3": (errno.EPERM, errno.EMFILE),
    "epoll_ctl": (errno.ENOMEM, errno.ENOSPC),
    "fchmodat": GENERAL,
    "fchownat": GENERAL,
    "fcntl": (errno.EPERM, errno.EMFILE),
    "landlock_add_rule": GENERAL,
    "landlock_create_ruleset": DESCRIPTORS,
    "landlock_restrict_self": GENERAL,
    "memfd_create": DESCRIPTORS,
    "mkdirat": (*GENERAL, errno.ENOSPC),
    "mount": (*GENERAL, errno.EINVAL),
    "mount_setattr": GENERAL,
    "move_mount": GENERAL,
    "open_tree": DESCRIPTORS,
    "openat": DESCRIPTORS,
    "pidfd_open": DESCRIPTORS,
    "pipe2": (errno.EPERM, errno.EMFILE),
    "pivot_root": GENERAL,
    "prctl": GENERAL,
    "prlimit64": GENERAL,
    "seccomp": DESCRIPTORS,
    "sendmsg": (errno.EPERM, errno.ENOMEM, errno.EMFILE),
    "sendto": (errno.EPERM, errno.ENOMEM),  # netlink: the link of MAXIMUM
    "setgroups": GENERAL,
    "sethostname": GENERAL,
    "setns": GENERAL,
    "setresgid": GENERAL,
    "setresuid": GENERAL,
    "setsockopt": (errno.EPERM, errno.ENOMEM),
    "socket": DESCRIPTORS,
    "socketpair": DESCRIPTORS,
    "umount2": GENERAL,
    "unshare": (*GENERAL, errno.ENOSPC),
    "write": (errno.EPERM, errno.ENOMEM, errno.ENOSPC),  # id maps, files of cgroups
}
# Only here a failure may be met by something weaker, which the protections then say: which, and by what calls.
SUBSTITUTES = {
    "granted folders": {"mount", "mount_setattr", "openat", "open_tree", "clone3", "unshare", "write", "fcntl", "mkdirat"},
    "own /proc": {"mount"},
}
# Of init and worker alone; without these nothing of a sandbox may stand: a failure is never passed over. (A user's own groups
# may stay. What wardens call may have failed for one that stands ready, which is then replaced, or tries again.)
PROTECTING = {
    *("capset", "clone", "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "prlimit64"),
    *("seccomp", "sethostname", "setresgid", "setresuid"),
    *(("setgroups",) if harness.ROOT else ()),
}
# The way to the caller is what fails: it learns that the sandbox has gone, and no more.
WORDLESS = {"sendmsg", "write", "fcntl"}


@pytest.fixture(scope="module")
def injector() -> Iterator[faults.Injector]:
    with tempfile.TemporaryDirectory(prefix="psie-faults-") as name:  # pytest's folders nobody else may walk through
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "granted").mkdir()
        made = faults.Injector(folder)
        yield made
        made.close()


@pytest.fixture
def engine(injector: faults.Injector) -> Iterator[faults.Injector]:
    """Zygotes with the injector: of the same kind as others, so that it is loaded for one test only."""
    with injector.loaded():
        yield injector


async def use(level: IsolationLevel, injector: faults.Injector, stands: float = 0.0, **settings: Any) -> EnhancedPluginSandbox:
    """A sandbox with everything in it; faults happen while it is opened and `stands` (seconds), not while the plugin runs."""
    permissions = {"allowed_directories": [str(injector.library.parent / "granted")]}
    try:
        async with asyncio.timeout(BOUND), harness.open_sandbox(level, permissions=permissions, **settings) as sandbox:
            await asyncio.sleep(stands)
            injector.rest()
            assert await sandbox.execute_plugin_safe(faults.plugin, 1) == 1
            return sandbox
    finally:
        injector.rest()


def states(sandbox: EnhancedPluginSandbox) -> dict[str, str]:
    return {protection.name: protection.state for protection in sandbox.protections}


def choose(count: int, errors: tuple[int, ...]) -> list[tuple[int, int]]:
    """(which of `count` calls, errno): each errno once at least, and calls from the first to the last."""
    if EVERY:
        return [(place, error) for place in range(count) for error in errors]
    if count == 0:
        return []
    places = sorted({round(step * (count - 1) / max(1, PLACES - 1)) for step in range(PLACES)})
    chosen = [(places[number % len(places)], error) for number, error in enumerate(errors)]
    more = [(place, errors[number % len(errors)]) for number, place in enumerate(places)]
    return list(dict.fromkeys(chosen + more))


def outcome(
    level: IsolationLevel,
    injector: faults.Injector,
    fault: tuple[str, int, int],
    usual: dict[str, str],
    *,
    starts: bool = False,
) -> str:
    """What became of a sandbox for which a system call failed, `starts` if in a zygote's start; asserts what must hold."""
    call, error, place = fault
    what = f"{call} number {place} with {errno.errorcode[error]} at {level.value}"
    others = [errno.ENOTRECOVERABLE] if starts and call == "sendmsg" else []  # a helper of the zygote could not say more
    ran = injector.ran
    injector.fail(call, error, place)
    try:
        sandbox = asyncio.run(use(level, injector))
    except (SandboxInitializationError, ResourceError) as caught:
        return refused(what, caught, (error, *others), plugin_ran=injector.ran != ran, wordless=starts or call in WORDLESS)
    if not injector.hits:
        return "not met"
    different = {name for name, now in states(sandbox).items() if now != usual[name]}
    for name in different:
        assert call in SUBSTITUTES.get(name, ()), f"{what}: {name} is {states(sandbox)[name]}"
        assert states(sandbox)[name] == "substituted", f"{what}: {name}"
    assert different or starts or call not in PROTECTING, f"{what}: it was passed over"
    return "substituted" if different else "harmless"


def refused(what: str, caught: SandboxException, errors: tuple[int, ...], *, plugin_ran: bool, wordless: bool) -> str:
    """Asserts that a refusal came before any plugin, and says what failed, why, and what to do."""
    assert not plugin_ran, f"{what}: a plugin has run in what was not set up: {caught}"
    if isinstance(caught, SandboxInitializationError):
        assert caught.line, f"{what}: no line: {caught}"
        assert caught.mend, f"{what}: no mend: {caught}"
        assert caught.errno in errors, f"{what}: another errno: {caught}"
    else:
        assert wordless, f"{what}: no reason is given: {caught}"
        assert "open a new" in str(caught) or "open new" in str(caught), f"{what}: no mend: {caught}"
    return "refused"


def try_all(level: IsolationLevel, injector: faults.Injector, call: str, before: Callable[[], None] = lambda: None) -> None:
    """Fail `call` in set-up after set-up, each followed by one in which nothing fails."""
    usual = states(asyncio.run(use(level, injector)))
    before()
    injector.count_anew()
    asyncio.run(use(level, injector))
    chosen = choose(injector.count(call), CALLS[call])
    for place, error in chosen:
        before()
        came = outcome(level, injector, (call, error, place), usual)
        faults.TABLE.add(call, errno.errorcode[error], came)
        assert states(asyncio.run(use(level, injector))) == usual
    if not chosen:
        pytest.skip("there is none")


def held() -> dict[int, list[str]]:
    """What zygotes and idle wardens have open; nothing of those that a user without rights may not look into.

    Without mount namespaces of the past, which a warden keeps until it has nothing else to do, and id maps, of which it keeps
    one for each place of the ledger that it has met: each is bounded by a rule of its own.
    """
    found = harness.roles(os.getpid())
    places = {}
    for pid in found["zygote"] + found["idle"]:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            open_ = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            places[pid] = [target for target in open_ if not target.startswith(("mnt:", "user:"))]
    return places


def descriptors_of_the_engine() -> int:
    """The most that one of the zygotes or idle wardens has open, but for two for each warden that a zygote has."""
    every = harness.engine_processes()
    parents = [process.parent for process in every.values()]
    return max((len(open_) - 2 * parents.count(pid) for pid, open_ in held().items()), default=0)


@rootless
@long
@pytest.mark.parametrize(
    "level", [IsolationLevel.MINIMAL, IsolationLevel.STANDARD, IsolationLevel.MAXIMUM], ids=lambda level: level.value
)
def test_a_call_of_a_sandboxs_set_up_fails(engine: faults.Injector, level: IsolationLevel) -> None:
    """In warden, init and worker; the zygote lives through all of it, and no process of it collects descriptors."""
    for _ in range(2 * IDLE_WARDENS):
        asyncio.run(use(level, engine))
    time.sleep(0.1)  # what wardens keep for a while they have let go then
    usual = descriptors_of_the_engine()
    zygotes = harness.roles(os.getpid())["zygote"]
    for call in CALLS:
        try:
            with harness.nothing_left():
                try_all(level, engine, call)
        except pytest.skip.Exception:
            continue
    if not EVERY:  # so many sandboxes are more than one zygote gives
        assert set(zygotes) <= set(harness.roles(os.getpid())["zygote"])
    assert harness.wait_until(lambda: descriptors_of_the_engine() <= usual + 2), (usual, held())


@rootless
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOSPC], ids=["ENOMEM", "ENOSPC"])
def test_a_zygote_that_cannot_hear_a_warden_lives(engine: faults.Injector, error: int) -> None:
    """A warden that was given a sandbox is that sandbox's and no other's, or else nobody's: what is its own is closed once."""
    asyncio.run(use(IsolationLevel.STANDARD, engine))
    zygotes = harness.roles(os.getpid())["zygote"]
    with harness.nothing_left():
        for _ in range(4):
            for place in range(3):
                engine.fail("epoll_ctl", error, place)
                with contextlib.suppress(SandboxInitializationError, ResourceError):
                    asyncio.run(use(IsolationLevel.STANDARD, engine))
                assert asyncio.run(several_at_once()) == [0, 1, 2]
    assert harness.roles(os.getpid())["zygote"] == zygotes


def test_a_zygote_whose_caller_has_gone_goes_on_to_clean_up() -> None:
    """Its caller may go while it is told why a sandbox could not be opened: what is that sandbox's is still to be removed."""
    made = zygote.Zygote.__new__(zygote.Zygote)
    made.control, caller = channel.pair()
    caller.close()
    made.report_failure(mounts.LineFailed("sandbox: clone of the warden", OSError(errno.ENOMEM, "none")), "its name")
    made.control.close()


def test_a_zygote_that_cannot_be_a_warden_says_why_and_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of a command, without a descriptor left: what is its sandbox's is removed all the same."""
    (tmp_path / "work" / "files").mkdir(parents=True)
    made = zygote.Zygote.__new__(zygote.Zygote)
    made.control, caller = channel.pair()
    made.single, made.recipes = True, {}
    before = len(os.listdir("/proc/self/fd"))
    names = ["hub", "lock", "folder_parent"]
    instruction = {"sandbox": "its name", "recipe_number": 1, "folder": "work", "fds": names}
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in names]

    def refuse(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "dup", refuse)
        made.open(instruction, fds)
    told = [channel.receive_bytes(caller, channel.MESSAGE)[0] for _ in range(2)]
    made.control.close()
    caller.close()
    assert b"second descriptor of its lock" in told[0]
    assert b"its name" in told[1]
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before - 2


async def several_at_once() -> list[int]:
    async def call(value: int) -> int:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            return int(await sandbox.execute_plugin_safe(plugins.give_back, value))

    return await asyncio.gather(*(call(value) for value in range(3)))


@rootless
@pytest.mark.parametrize("call", ["socketpair", "clone3"])
def test_a_call_whose_worker_never_was_is_forgotten(engine: faults.Injector, call: str) -> None:
    """A sandbox may be open for hours, and its warden go on when the host lacked something for a moment."""

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
            opened = sandbox._sandbox
            assert opened is not None
            for _ in range(COMING_UP + 1):  # or there would be no turn left
                engine.fail(call, errno.EAGAIN)
                with pytest.raises(SandboxInitializationError, match="call: "):
                    await sandbox.execute_plugin_safe(plugins.give_back, 1)
            engine.rest()
            await harness.wait_for(lambda: not opened.calls)
            assert opened.coming_up == 0
            assert await sandbox.execute_plugin_safe(plugins.give_back, 2) == 2

    with harness.nothing_left():
        asyncio.run(main())


@rootless
def test_what_a_worker_does_while_it_waits_may_fail(engine: faults.Injector, level: IsolationLevel) -> None:
    """It rehearses a call, and the call goes well all the same."""
    wait = 0.2 * harness.PATIENCE
    asyncio.run(use(level, engine))  # starts the zygote
    engine.count_anew()
    asyncio.run(use(level, engine, wait))
    engine.fail("chdir", errno.ENOMEM, engine.count("chdir") - 1)  # the last, which is the rehearsal's
    asyncio.run(use(level, engine, wait))
    assert engine.hits == 1


@rootless
def test_a_warden_that_serves_many_collects_no_descriptors(level: IsolationLevel) -> None:
    """Not for files that it covers either, which sandboxes with a network permission have."""
    permissions = {"allow_network_access": True, "allowed_hosts": ["localhost"]}

    def few() -> bool:
        return descriptors_of_the_engine() <= usual

    harness.call(level, plugins.give_back, 1, permissions=permissions)
    time.sleep(0.1)
    usual = descriptors_of_the_engine() + 2
    for _ in range(3 * IDLE_WARDENS):
        harness.call(level, plugins.give_back, 1, permissions=permissions)
    # What it holds for a while it lets go when it has rested, or with the next sandbox.
    assert harness.wait_until(few, 1.0), (usual, descriptors_of_the_engine())


@rootless
@long
def test_a_call_of_a_zygotes_start_fails(engine: faults.Injector) -> None:
    """Each time in a new zygote, from its first instruction on, with the command that puts it into its user namespace."""
    level = IsolationLevel.MAXIMUM
    engine.count_anew()
    usual = states(asyncio.run(use(level, engine)))
    whole = {call: engine.count(call) for call in CALLS}
    engine.count_anew()
    asyncio.run(use(level, engine))
    counts = {call: whole[call] - engine.count(call) for call in CALLS}  # the rest is the sandbox's
    for call, errors in CALLS.items():
        for place, error in choose(counts[call], errors)[: None if EVERY else 3]:
            service.shut_down()
            came = outcome(level, engine, (call, error, place), usual, starts=True)
            faults.TABLE.add(f"{call} (zygote)", errno.errorcode[error], came)
        service.shut_down()
    assert states(asyncio.run(use(level, engine))) == usual


def tried(level: IsolationLevel, function: Callable[[int], int], armed: Callable[[], None], rest: Callable[[], None]) -> str:
    """What became of a call where something fails while it runs, or while its sandbox is closed."""

    async def main() -> str:
        async with asyncio.timeout(BOUND), harness.open_sandbox(level) as sandbox:
            armed()
            try:
                assert await sandbox.execute_plugin_safe(function, 1) == 1
                return "harmless"
            except SandboxException as error:
                return type(error).__name__

    try:
        return asyncio.run(main())
    finally:
        rest()


@rootless
@long
@pytest.mark.parametrize("level", SOME, ids=lambda level: level.value)
def test_a_call_fails_while_a_plugin_runs_or_ends(engine: faults.Injector, level: IsolationLevel) -> None:
    for call, errors in CALLS.items():
        with harness.nothing_left():
            tried(level, faults.refused_plugin, engine.count_anew, engine.rest)
            for place, error in choose(engine.count(call), errors):
                armed = partial(engine.fail, call, error, place)
                came = tried(level, faults.refused_plugin, armed, engine.rest)
                faults.TABLE.add(f"{call} (call)", errno.errorcode[error], came)
                assert tried(level, faults.refused_plugin, lambda: None, engine.rest) == "harmless"


HOST_CALLS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "dup": (os, "dup", DESCRIPTORS),
    "fcntl": (fcntl, "fcntl", (errno.EMFILE, errno.EBADF)),
    "memfd_create": (os, "memfd_create", DESCRIPTORS),
    "mkdir": (os, "mkdir", (*GENERAL, errno.ENOSPC, errno.EROFS)),
    "open": (os, "open", (*DESCRIPTORS, errno.EROFS, errno.EACCES)),
    "pidfd_open": (os, "pidfd_open", DESCRIPTORS),
    "pipe2": (os, "pipe2", (errno.EMFILE, errno.ENFILE)),
    "posix_spawn": (os, "posix_spawn", (errno.EAGAIN, errno.ENOMEM, errno.EPERM)),
    "pwrite": (os, "pwrite", (errno.ENOSPC, errno.EIO)),
    "sendmsg": (channel, "send_bytes", (errno.ENOBUFS, errno.EPERM)),
    "socketpair": (_socket, "socketpair", DESCRIPTORS),
    "timerfd_create": (sc, "timerfd_create", DESCRIPTORS),
    "write": (os, "write", (errno.ENOSPC, errno.EPERM, errno.EBUSY)),
}


@rootless
@long
@pytest.mark.parametrize("level", [SOME[0], SOME[-1]], ids=lambda level: level.value)
@pytest.mark.parametrize("call", HOST_CALLS)
def test_a_call_of_the_callers_side_fails(level: IsolationLevel, call: str) -> None:
    """In the engine's thread, from the start of a zygote to the end of a sandbox."""
    module, name, errors = HOST_CALLS[call]
    fault = faults.HostFault(module, name)

    async def main() -> str:
        async with asyncio.timeout(BOUND), harness.open_sandbox(level) as sandbox:
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
        return "harmless"

    def attempt() -> str:
        service.shut_down()
        try:
            return asyncio.run(main())
        except SandboxException as caught:
            return said(caught)
        finally:
            fault.rest()

    with fault.installed():
        fault.fail(0, 1 << 30)
        assert attempt() == "harmless"
        count = fault.count
        for place, error in choose(count, errors):
            fault.fail(error, place)
            came = attempt()
            faults.TABLE.add(f"{call} (caller)", errno.errorcode[error], came)
            assert attempt() == "harmless"


# -- what the host does not give -----------------------------------------------------------------------------------------


async def try_once(level: IsolationLevel, **settings: Any) -> str:
    try:
        async with asyncio.timeout(BOUND), harness.open_sandbox(level, **settings) as sandbox:
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
    except (SandboxInitializationError, ResourceError) as error:
        return said(error)
    return "harmless"


def said(error: SandboxException) -> str:
    """Asserts that it is a sentence that names what failed."""
    text = str(error)
    assert text, repr(error)
    assert "\n" not in text, text
    assert "Traceback" not in text, text
    if isinstance(error, SandboxInitializationError):
        assert error.line or error.protection, text
        assert error.mend, text
        assert error.errno or error.protection, text
    return "refused"


@rootless
@long
@pytest.mark.parametrize("zygote", ["new", "old"])
def test_the_caller_has_no_more_descriptors(level: IsolationLevel, zygote: str) -> None:
    """With every number of free ones from none to enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> list[str]:
        assert await try_once(level) == "harmless"  # what is imported and cached on the way is so now
        came = []
        for free in range(40):
            if zygote == "new":
                service.shut_down()
            taken = {int(name) for name in os.listdir("/proc/self/fd")}
            limit = [fd for fd in range(len(taken) + free + 1) if fd not in taken][free]
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                came.append(await try_once(level))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            if zygote == "new":
                service.shut_down()  # it has inherited the limit
            assert await try_once(level) == "harmless"
            if came[-4:] == ["harmless"] * 4:
                return came
        return came

    came = asyncio.run(main())
    for each in came:
        faults.TABLE.add("no more descriptors", f"{zygote} zygote", each)
    assert came[0] == "refused"
    assert came[-1] == "harmless"


@rootless
def test_no_more_processes(level: IsolationLevel) -> None:
    """RLIMIT_NPROC of the caller; root is not bound by it, but by the kernel's own refusal, which is as good here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    fault = faults.HostFault(os, "posix_spawn")
    with fault.installed():
        service.shut_down()
        if harness.ROOT:
            fault.fail(errno.EAGAIN, 0)
        else:
            resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
        try:
            came = asyncio.run(try_once(level))
        finally:
            resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    faults.TABLE.add("no more processes", "RLIMIT_NPROC" if not harness.ROOT else "EAGAIN", came)
    assert came == "refused"
    assert asyncio.run(try_once(level)) == "harmless"


@pytest.mark.usefixtures("as_root")
def test_no_more_host_ids(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(userids, "_regions", {})
        patch.setattr(userids, "_ranges", lambda path: [(0, 1 << 32)])  # all subordinate ids of somebody
        with pytest.raises(ResourceError, match=r"maps no .* host ids that nobody uses"):
            harness.call(level, plugins.give_back, 1)
    faults.TABLE.add("no more host ids", "subordinate ids", "refused")
    assert harness.call(level, plugins.give_back, 1) == 1


@pytest.fixture(params=["full", "read-only"])
def bad_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A folder for psie's state that takes no more: a tmpfs of one page, as root; or one without rights."""
    place = tmp_path / "state"
    place.mkdir(mode=0o711)
    if harness.ROOT:
        sc.mount("tmpfs", str(place), "tmpfs", 0, "size=4k,mode=711")
        if request.param == "full":
            (place / "filler").write_bytes(bytes(4096))
        else:
            sc.mount("none", str(place), None, sc.MS_REMOUNT | sc.MS_RDONLY)
        try:
            yield request.param, place
        finally:
            sc.umount(str(place))
    elif request.param == "full":
        pytest.skip("needs root to mount a small disk")
    else:
        place.chmod(0o500)
        yield request.param, place
        place.chmod(0o711)


@rootless
def test_a_state_folder_that_takes_nothing(
    level: IsolationLevel, bad_folder: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, place = bad_folder
    for kind in ("run", "lib", "cache"):
        folders = {name: str(place) if name == kind else state.folder(name) for name in ("run", "lib", "cache")}
        with monkeypatch.context() as patch:
            patch.setattr(state, "folder", lambda kind, folders=folders, **_: folders[kind])
            service.shut_down()
            came = asyncio.run(try_once(level))
        faults.TABLE.add(f"a {how} disk", kind, came)
        assert came == ("refused" if kind == "run" or (kind == "lib" and has_folder(level)) else "harmless"), kind
        assert asyncio.run(try_once(level)) == "harmless"


def has_folder(level: IsolationLevel) -> bool:
    """Whether its workspace lies on disk."""
    settings = PluginLimitsV2(), PluginPermissionsV2()
    compiled = recipe.compile(IsolationConfig(level=level), *settings, host.facts())
    return str(compiled.workspace["kind"]) == "folder"


# -- killed at any moment --------------------------------------------------------------------------------------------------


@rootless
@long
@pytest.mark.parametrize("victim", ["zygote", "warden", "supervisor", "init", "worker"])
def test_a_part_is_killed_at_any_moment(level: IsolationLevel, victim: str) -> None:
    """From the first moment of the set-up on; test_life.py kills them at chosen ones."""
    dice, killed = random.Random(f"{level.value} {victim}"), list[int]()

    def kill(after: float) -> None:
        time.sleep(after)
        found = harness.roles(os.getpid())
        pids = found["idle"] if victim == "warden" and not found["warden"] else found[victim]
        if victim == "zygote":  # the process in which attacks are tried outside looks like one
            pids = [each.pid for each in reversed(list(service.service().zygotes.values())) if not each.has_ended()]
        for pid in pids[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    async def main(function: Callable[[], object]) -> str:
        killer = asyncio.create_task(asyncio.to_thread(kill, dice.random() * 0.03))
        try:
            async with asyncio.timeout(BOUND), harness.open_sandbox(level) as sandbox:
                return str(await sandbox.execute_plugin_safe(function))
        except PluginExecutionError as error:  # a plugin whose process is killed has not ended by itself
            return type(error).__name__
        except (ResourceError, SandboxInitializationError) as error:
            said(error)
            return type(error).__name__
        finally:
            await killer

    function = hostile_pause if victim == "supervisor" else pause
    for _ in range(3):
        came = asyncio.run(main(function))
        faults.TABLE.add("killed at any moment", victim, "harmless" if came == "1" else came)
    # One that is dying, or that nobody has reaped yet, could be given to the next sandbox.
    assert harness.wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in killed))
    assert asyncio.run(try_once(level)) == "harmless"


def pause() -> int:
    import time

    time.sleep(0.03)
    return 1


def hostile_pause() -> int:
    import contextlib
    import os
    import time

    for _ in range(3):
        with contextlib.suppress(OSError):
            os.chroot("/")
        time.sleep(0.01)
    return 1
