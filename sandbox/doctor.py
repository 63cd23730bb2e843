"""What this host can do, level by level, for whoever asks, and what keeps it from doing more, each with what mends it.

The verdict on a level comes from its recipe, compiled for this host, next to the one for a host that can do everything; and
the last word from a sandbox of that level that was really opened and read back. Why something is missing is looked for in
sandbox.causes. What no cause is known for is told all the same, in the recipe's own words. Changes nothing that opening a
sandbox does not change.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import json
import os
import pwd
import resource
import select
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sandbox import host, recipe, state
from sandbox.causes import BEFORE, CHECKS, YOURS, Cause, Check, Files, Mend, Seen, unopened
from sandbox.cgroups import place
from sandbox.config import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2
from sandbox.errors import SandboxException, SandboxInitializationError
from sandbox.recipe_data import ENFORCED, Protection
from sandbox.version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

OK, WEAKER, REFUSED, NOTE = "ok", "weaker", "refused", "note"  # of a level or a check; a note is no level's business
SECONDS = 120.0  # that the look of another user may take
ANSWER_BYTES = 1 << 20  # of it
NOBODY = 65534
NO_ID = 2**32 - 1  # to setresuid(2) this says that nothing is to be changed
# The Python packages that the engine cannot do without, by the names they are imported by.
PACKAGES = {
    "_prctl": "python-prctl",
    "cgroupspy": "cgroupspy",
    "cloudpickle": "cloudpickle",
    "inotify_simple": "inotify-simple",
    "jeepney": "jeepney",
    "psutil": "psutil",
    "pyroute2": "pyroute2",
}


@dataclass(frozen=True)
class LevelVerdict:
    """What one level is here.

    Attributes:
        state: ok (as promised), weaker (something is substituted or missing, and said so) or refused.
        opened: whether a sandbox of it was opened, and what it showed agreed with its recipe.
        reason: why it is refused, or could not be opened.
        blocked: the protection that is the reason, if it is one.
        lacking: the protections that a host that can do everything would enforce.
    """

    level: str
    state: str
    opened: bool
    reason: str
    blocked: str
    lacking: tuple[Protection, ...]

    def to_dict(self) -> dict[str, Any]:
        lacking = [protection.to_dict() for protection in self.lacking]
        return {"level": self.level, "state": self.state, "opened": self.opened, "reason": self.reason, "lacking": lacking}


@dataclass(frozen=True)
class Finding:
    """What a check came to. `levels`: the state of each as far as it depends on this; `cause` is None if all is well."""

    name: str
    purpose: str
    levels: dict[str, str]
    cause: Cause | None = None

    @property
    def state(self) -> str:
        if self.cause is None:
            return OK
        return next((state for state in (REFUSED, WEAKER) if state in self.levels.values()), NOTE)

    def to_dict(self, *, as_root: bool) -> dict[str, Any]:
        mends = self.cause.mends if self.cause is not None else ()
        return {
            "name": self.name,
            "purpose": self.purpose,
            "state": self.state,
            "levels": self.levels,
            "cause": self.cause.text if self.cause is not None else "",
            "mends": [
                {"what": each.what, "commands": each.shown(as_root=as_root), "safe": each.safe, "against": each.against}
                for each in mends
            ],
        }


@dataclass(frozen=True)
class Diagnosis:
    """All of it for one user. `would_gain`: protections that root would have enforced besides, as far as a user can know."""

    uid: int
    user: str
    kernel: str
    levels: tuple[LevelVerdict, ...]
    findings: tuple[Finding, ...]
    would_gain: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        return "root" if self.uid == 0 else f"user {self.user}"

    @property
    def healthy(self) -> bool:
        return all(level.state == OK and level.opened for level in self.levels)

    @property
    def missing(self) -> list[Finding]:
        """What is not well, the worst first."""
        order = [REFUSED, WEAKER, NOTE]
        return sorted((each for each in self.findings if each.state != OK), key=lambda each: order.index(each.state))

    def safe_mends(self) -> list[Mend]:
        return [mend for finding in self.missing if finding.cause for mend in finding.cause.mends if mend.safe]

    def summary(self) -> str:
        """One sentence: what to do first."""
        if self.healthy:
            return f"every level is to be had as promised, as {self.who}"
        words = {each.level: each.state for each in self.levels}
        same = len(set(words.values())) == 1
        bad = f"every level {self.levels[0].state}" if same else ", ".join(f"{level} {word}" for level, word in words.items())
        worst = next((each for each in self.missing if each.cause is not None and each.state != NOTE), None)
        if worst is None or worst.cause is None:
            return f"{bad}, as {self.who}"
        fixed = "; psie doctor --fix does that" if any(mend.safe for mend in worst.cause.mends) else ""
        return f"{bad}, as {self.who}; first see to {worst.name}: {worst.cause.text}{fixed}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "user": self.user,
            "uid": self.uid,
            "kernel": self.kernel,
            "healthy": self.healthy,
            "summary": self.summary(),
            "levels": [each.to_dict() for each in self.levels],
            "checks": [each.to_dict(as_root=self.uid == 0) for each in self.findings],
            "root_would_also_enforce": list(self.would_gain),
        }


def diagnose(files: Files | None = None) -> Diagnosis:
    """Probe, compile, open a sandbox of each level, and look for the causes of what is missing. Takes about a second.

    What was believed about this host before is forgotten. Raises nothing that a host could be the reason of. Not
    for a running event loop: it opens sandboxes in loops of its own.
    """
    seen = Seen(os.getuid(), user_name(os.getuid()), files or Files(), environ=os.environ, executable=sys.executable)
    seen = replace(seen, script=script_beside(sys.executable), no_library=missing_library(), packages=tuple(broken_packages()))
    seen = replace(seen, folders=tuple(state_folders()), descriptors=descriptors(), processes=processes(seen.uid))
    if seen.no_library or seen.packages:
        return blind(seen, seen.no_library or f"the Python package {seen.packages[0][0]} cannot be used")
    try:
        return look(seen)
    except (OSError, RuntimeError) as error:  # not even a child, a thread or a descriptor to look with
        known = SandboxInitializationError(
            f"this host cannot be probed: {error}", errno=getattr(error, "errno", None) or errno.EAGAIN
        )
        return blind(replace(seen, trials=(known,)), str(known))


def look(seen: Seen) -> Diagnosis:
    state.distrust()
    facts = host.facts()
    step, number = namespace_steps() if facts.user_namespaces else ("", 0)
    seen = replace(seen, facts=facts, step=step, error=number, landlock_errno=landlock_errno(), inotify=inotify_errno())
    levels, trials = verdicts(facts)
    seen = replace(seen, trials=trials)
    findings = list(findings_of(seen, (*BEFORE, *CHECKS), levels))
    findings += rest(seen, levels, findings)
    gain = () if seen.is_root else root_would_gain(facts)
    return Diagnosis(seen.uid, seen.user, facts.kernel, levels, tuple(findings), gain)


def blind(seen: Seen, reason: str) -> Diagnosis:
    """Where nothing can be probed: no level is to be had, and only what has to be there before is looked at."""
    levels = tuple(LevelVerdict(level.value, REFUSED, False, reason, "", ()) for level in IsolationLevel)
    findings = list(findings_of(seen, BEFORE, levels))
    return Diagnosis(seen.uid, seen.user, os.uname().release, levels, (*findings, *rest(seen, levels, findings)))


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def script_beside(executable: str) -> str:
    path = os.path.join(os.path.dirname(executable), "psie")
    return path if os.access(path, os.X_OK) else ""


# -- levels ----------------------------------------------------------------------------------------------------------------


def verdicts(facts: host.HostFacts) -> tuple[tuple[LevelVerdict, ...], tuple[SandboxInitializationError, ...]]:
    """Of each level, and the errors of those that could not be opened."""
    standing, os.environ["PSIE_STANDING"] = os.environ.get("PSIE_STANDING"), "0"  # no next caller will want one
    try:
        with tempfile.TemporaryDirectory(prefix="psie-doctor-") as folder:
            found = [verdict(level, facts, os.path.realpath(folder)) for level in IsolationLevel]
    finally:
        if standing is None:
            del os.environ["PSIE_STANDING"]
        else:
            os.environ["PSIE_STANDING"] = standing
    return tuple(each for each, _ in found), tuple(error for _, error in found if error is not None)


def verdict(
    level: IsolationLevel, facts: host.HostFacts, folder: str
) -> tuple[LevelVerdict, SandboxInitializationError | None]:
    """`folder` is granted in the recipe, to see what granted folders become; what is opened does without."""
    config, permissions = IsolationConfig(level=level), PluginPermissionsV2(allowed_directories=[folder])
    compiled = partial(recipe.compile, config, PluginLimitsV2(), permissions)
    promised = {
        each.name for each in compiled(best(facts), strict=False).weakened
    }  # what it has nowhere is no fault of this host
    weakened = [each.replace(detail=each.detail.replace(folder, "each")) for each in compiled(facts, strict=False).weakened]
    lacking = tuple(each for each in weakened if each.name not in promised)
    try:
        compiled(facts)
    except SandboxInitializationError as error:
        return LevelVerdict(level.value, REFUSED, False, str(error), error.protection or "", lacking), None
    try:
        shown = asyncio.run(opened(config))
    except SandboxException as error:
        known = error if isinstance(error, SandboxInitializationError) else None
        blocked = (known.protection or "") if known is not None else ""
        return LevelVerdict(level.value, REFUSED, False, without_us(str(error)), blocked, lacking), known
    weak = tuple(each for each in shown if each.state != ENFORCED and each.by_host and each.name not in promised)
    weak += tuple(each for each in lacking if each.name == "granted folders")
    return LevelVerdict(level.value, WEAKER if weak else OK, True, "", "", weak), None


def without_us(reason: str) -> str:
    """Without the advice to ask the doctor: who reads this has done so."""
    return reason.partition("; run psie doctor")[0]


def best(facts: host.HostFacts) -> host.HostFacts:
    """A host that can do everything, for this user."""
    ideal = host.ideal()
    return ideal if facts.root else replace(ideal, root=False, cgroup_kind="delegated")


async def opened(config: IsolationConfig) -> tuple[Protection, ...]:
    """The protections of a sandbox as they were read back from it while it ran something."""
    from sandbox.sandbox import EnhancedPluginSandbox

    async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), config) as sandbox:
        sandbox._is_recorded = False  # it is nobody's run
        await sandbox.execute_plugin_safe(os.getpid)
        return tuple(sandbox.protections)


def root_would_gain(facts: host.HostFacts) -> tuple[str, ...]:
    """What root would have enforced that this user has not, told from what a user can see; nobody has tried it."""
    controllers = tuple(name for name in ("memory", "pids", "cpu") if name in place.words(facts.cgroup + "/cgroup.controllers"))
    tree = facts.cgroup and not os.statvfs(facts.cgroup).f_flag & os.ST_RDONLY
    changes: dict[str, Any] = {"cgroup_kind": "root", "cgroup_folder": facts.cgroup, "controllers": controllers} if tree else {}
    root = replace(facts, root=True, uid=0, gid=0, **changes)
    gained: dict[str, list[str]] = {}
    for level in IsolationLevel:
        compiled = partial(recipe.compile, IsolationConfig(level=level), PluginLimitsV2(), PluginPermissionsV2(), strict=False)
        weak = {each.name for each in compiled(facts).weakened} - {each.name for each in compiled(root).weakened}
        for name in sorted(weak):
            gained.setdefault(name, []).append(level.value)
    return tuple(f"{name} ({', '.join(levels)})" for name, levels in gained.items())


# -- findings --------------------------------------------------------------------------------------------------------------


def findings_of(seen: Seen, checks: tuple[Check, ...], levels: tuple[LevelVerdict, ...]) -> Iterator[Finding]:
    for check in checks:
        cause = check.find(seen)
        states = {level.level: OK if cause is None else level_state(level, check.protections) for level in levels}
        if cause is not None and cause.opening:
            states |= {level.level: REFUSED for level in levels if level.state == REFUSED and not level.blocked}
        yield Finding(check.name, check.purpose, states, cause)


def level_state(level: LevelVerdict, protections: tuple[str, ...]) -> str:
    if level.blocked and level.blocked in protections:
        return REFUSED
    return WEAKER if any(each.name in protections for each in level.lacking) else OK


def rest(seen: Seen, levels: tuple[LevelVerdict, ...], findings: list[Finding]) -> list[Finding]:
    """What is lacking and no finding with a cause accounts for: in the recipe's words, or those of the failure."""
    names = {check.name: check.protections for check in CHECKS}
    known = {name for finding in findings if finding.cause is not None for name in names.get(finding.name, ())}
    others = {each.name: each for level in levels for each in level.lacking if each.name not in known}
    found = list(findings)
    for name, protection in others.items():
        states = {level.level: level_state(level, (name,)) for level in levels}
        mends = (Mend("enforces it", (protection.mend,), YOURS),) if protection.mend else ()
        found.append(Finding(name, "a protection of these levels", states, Cause(protection.detail, mends)))
    unexplained = [level for level in levels if level.reason and all(each.levels[level.level] != REFUSED for each in found)]
    for reason in dict.fromkeys(level.reason for level in unexplained):
        states = {level.level: REFUSED if level.reason == reason else OK for level in levels}
        found.append(Finding("opening a sandbox", "the last word on a level", states, unopened(seen, reason)))
    return found[len(findings) :]


# -- what is looked at -------------------------------------------------------------------------------------------------------


def missing_library() -> str:
    from sandbox.ns import syscalls as sc

    try:
        sc.number("clone3")
    except OSError as error:
        return str(error)
    return ""


def broken_packages() -> Iterator[tuple[str, str]]:
    """(package, what its import says) of those that are missing or, built against other headers, do not load."""
    for name, package in PACKAGES.items():
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken package does
            yield package, f"{type(error).__name__}: {error}"


def errno_of(action: Callable[[], object]) -> int:
    """0 if `action` succeeds in a child, else the errno that it fails with."""

    def attempt() -> None:
        try:
            action()
        except OSError as error:
            raise OSError(error.errno, str(error.errno)) from None

    text = host.in_child(attempt)
    return int(text) if text.isdecimal() else errno.EIO if text else 0


def namespace_steps() -> tuple[str, int]:
    """The first step on the way to a sandbox's namespaces that fails, and its errno; ("", 0) if each of them works alone."""
    from sandbox.ns import syscalls as sc

    def inside(flag: int) -> None:
        host._enter_user_namespace(0)
        sc.unshare(flag)

    def mount() -> None:
        host._enter_user_namespace(sc.CLONE_NEWNS)
        sc.mount("none", "/", None, sc.MS_REC | sc.MS_PRIVATE)
        sc.mount("tmpfs", "/sys", "tmpfs", sc.MS_NOSUID)

    flags = {"mnt": sc.CLONE_NEWNS, "pid": sc.CLONE_NEWPID, "ipc": sc.CLONE_NEWIPC, "uts": sc.CLONE_NEWUTS}
    flags |= {"cgroup": sc.CLONE_NEWCGROUP, "net": sc.CLONE_NEWNET}
    steps: dict[str, Callable[[], None]] = {
        "a user namespace": lambda: sc.unshare(sc.CLONE_NEWUSER),
        "the id map of a user namespace": lambda: host._enter_user_namespace(0),
        **{f"a {name} namespace in it": partial(inside, flag) for name, flag in flags.items()},
        "a user namespace in it": lambda: inside(sc.CLONE_NEWUSER),
        "a mount in it": mount,
    }
    for name, action in steps.items():
        if number := errno_of(action):
            return name, number
    return "", 0


def landlock_errno() -> int:
    from sandbox.ns import syscalls as sc
    from sandbox.seccomp import landlock

    return errno_of(lambda: sc.syscall("landlock_create_ruleset", None, 0, landlock.LANDLOCK_CREATE_RULESET_VERSION))


def inotify_errno() -> int:
    from inotify_simple import INotify

    return errno_of(lambda: INotify().close())


def state_folders() -> Iterator[tuple[str, str, str]]:
    """(kind, path, why it cannot be used) of each: files are made in it as psie would."""
    for kind in ("run", "cache", "lib"):
        path = kind
        try:
            path = state.folder(kind)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"\n")
        except OSError as error:
            yield kind, error.filename or path, error.strerror or str(error)
        else:
            yield kind, path, ""


def is_noexec(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)


def descriptors() -> tuple[int, int]:
    """RLIMIT_NOFILE's hard limit (-1: none), and what the engine and a plugin with the default limits want."""
    from sandbox.plugins.framework import SANDBOX_FDS

    return resource.getrlimit(resource.RLIMIT_NOFILE)[1], PluginLimitsV2().max_open_files + SANDBOX_FDS


def processes(uid: int) -> tuple[int, int]:
    """RLIMIT_NPROC's soft limit (-1: none), and how many tasks this user has, as far as /proc shows them."""
    tasks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if entry.stat().st_uid == uid:
                    tasks += sum(1 for _ in (entry / "task").iterdir())
            except OSError:
                continue  # it has ended
    return resource.getrlimit(resource.RLIMIT_NPROC)[0], tasks


# -- another user ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Other:
    """What an unprivileged user gets, as its own `psie doctor` says; or why it could not be asked."""

    uid: int
    user: str
    why: str
    found: dict[str, Any] | None
    not_tried: Cause | None = None

    def to_dict(self) -> dict[str, Any]:
        head = {"user": self.user, "uid": self.uid, "chosen": self.why}
        if self.found is not None:
            return {**self.found, **head}
        assert self.not_tried is not None
        mends = [command for mend in self.not_tried.mends for command in mend.shown(as_root=True)]
        return {**head, "not_tried": self.not_tried.text, "mends": mends}


def ask_another() -> Other:
    """Run `psie doctor` as the user who has become root by sudo, else as nobody, with folders that are removed after it."""
    sudo = os.environ.get("SUDO_UID", "")
    known = sudo.isdecimal() and 0 < int(sudo) < NO_ID
    uid, why = (int(sudo), "the user who called sudo") if known else (NOBODY, "an id without rights")
    name = user_name(uid)
    try:
        gid, home = pwd.getpwuid(uid).pw_gid, pwd.getpwuid(uid).pw_dir
    except KeyError:
        gid, home = uid, "/"
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    closed = closed_to(
        uid, gid, [sys.executable, os.path.realpath(sys.executable), os.__file__, package + "/sandbox/doctor.py"]
    )
    if closed:
        advice = f"python3 -m venv /opt/psie && /opt/psie/bin/pip install {shlex.quote(installed_from())}"
        mends = (Mend("installs psie where every user can read it", (advice,), YOURS),)
        text = f"user {name} cannot use this psie: {closed} is closed to it"
        return Other(uid, name, why, None, Cause(text, mends))
    with tempfile.TemporaryDirectory(prefix="psie-doctor-user-") as folder:
        os.chown(folder, uid, gid)
        environ = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": home, "TMPDIR": folder}
        environ |= dict.fromkeys(("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME"), folder)
        environ["PYTHONPATH"] = os.pathsep.join(path for path in dict.fromkeys([package, *sys.path]) if path)
        command = [sys.executable, "-m", "sandbox.cli", "doctor", "--json"]
        try:
            return Other(
                uid, name, why, understood(answer(command, user=uid, group=gid, extra_groups=[], env=environ, cwd="/"))
            )
        except (OSError, ValueError) as error:
            return Other(uid, name, why, None, Cause(f"psie does not run as user {name}: {error or type(error).__name__}"))


def installed_from() -> str:
    """What pip installed psie from, for pip to install it again: a folder, a file or an address; else its name."""
    from importlib import metadata

    try:
        told = json.loads(metadata.distribution("psie").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return "psie"
    url = str(told.get("url") or "psie")
    return unquote(urlsplit(url).path) if url.startswith("file:///") else url


def answer(command: list[str], **options: Any) -> bytes:
    """What it prints, in ANSWER_BYTES and SECONDS at most: a user can do to its processes what it likes. Raises ValueError."""
    data, end = b"", time.monotonic() + SECONDS
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=null, stdout=subprocess.PIPE, stderr=null, start_new_session=True, **options
    ) as process:
        assert process.stdout is not None
        try:
            while True:
                ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
                if not ready:
                    raise ValueError(f"it has not answered in {SECONDS:g} s")
                more = os.read(process.stdout.fileno(), ANSWER_BYTES)
                data += more
                if len(data) > ANSWER_BYTES:
                    raise ValueError("its answer has no end")
                if not more:
                    return data
        finally:
            process.kill()


def understood(data: bytes) -> dict[str, Any]:
    """Another user's diagnosis, taken apart and put together again: nothing in it is more than text. Raises ValueError."""
    try:
        found = json.loads(data)
        levels = [
            {
                **{name: text(each[name]) for name in ("level", "state", "reason")},
                "opened": each["opened"] is True,
                "lacking": [
                    {name: text(one[name]) for name in ("name", "state", "mechanism", "detail")} for one in each["lacking"]
                ],
            }
            for each in found["levels"]
        ]
        checks = [
            {
                **{name: text(each[name]) for name in ("name", "purpose", "state", "cause")},
                "levels": {text(level): text(state) for level, state in each["levels"].items()},
                "mends": [
                    {
                        "what": text(mend["what"]),
                        "against": text(mend["against"]),
                        "safe": mend["safe"] is True,
                        "commands": [text(line) for line in mend["commands"]],
                    }
                    for mend in each["mends"]
                ],
            }
            for each in found["checks"]
        ]
        gain = [text(each) for each in found["root_would_also_enforce"]]
        return {
            **{name: text(found[name]) for name in ("kernel", "summary")},
            "healthy": found["healthy"] is True,
            "levels": levels,
            "checks": checks,
            "root_would_also_enforce": gain,
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"what it says is no diagnosis ({error!r})") from None


def text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} for a text")
    return value


def closed_to(uid: int, gid: int, paths: list[str]) -> str:
    """The first of these, or of the folders on the way, that the user cannot read or walk; "" if it can use them all."""
    for path in paths:
        for step in [*reversed(Path(path).parents), Path(path)]:
            found = step.stat()
            shift = 6 if found.st_uid == uid else 3 if found.st_gid == gid else 0
            wanted = 0o1 if step != Path(path) else 0o4
            if not found.st_mode >> shift & wanted:
                return str(step)
    return ""


def report() -> tuple[Diagnosis, Other | None]:
    """For this user; as root also what a user without rights gets, really tried."""
    found = diagnose()
    return found, ask_another() if found.uid == 0 else None


def to_dict(found: Diagnosis, other: Other | None) -> dict[str, Any]:
    """As JSON: `unprivileged` is null where we are no root."""
    return {"psie": __version__, **found.to_dict(), "unprivileged": other.to_dict() if other is not None else None}
