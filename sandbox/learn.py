"""From what a plugin was seen to want to the smallest settings that allow it: what `psie learn` grants, refuses and writes.

Only data comes in (results of runs, as sandbox.cli.trial has them) and only data goes out; of the system nothing but paths is
looked at. What a run tells of files is the plugin's own word: it can only ever be a wish, which `Consent` grants or does not.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from dataclasses import dataclass, field, replace
from functools import lru_cache

from sandbox import network
from sandbox.config import PluginPermissionsV2
from sandbox.engine.access import is_public, parse
from sandbox.plugins.effective import HOSTS
from sandbox.recipe import SCRATCH, SYSTEM, WORKSPACE, under, ungrantable, unshowable
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from sandbox.cli.trial import Result

READ, WRITE, DELETE, PROCESS, HOST, LIMIT = "read", "write", "delete", "process", "host", "limit"
WEB = (80, 443)  # where an allowed host may be connected to if no port is said
KERNEL, PLUGIN, RESOLVER = "the kernel", "the plugin", "this host's resolver"  # whose word it is
SUBPROCESSES = 16  # at once, until fewer are known to do
FEWER = (2, 4, 8)
MANY_FILES = 5  # of one folder, from which on the folder is granted
PATH = 400  # characters: a longer name is not written into a file for people
LISTED = 50  # refused wishes that are written into a file
SCANNED = 5000  # entries of a folder that are looked through for secrets

# What learning gives a plugin at most, and at first. What it needs is measured and written down with headroom.
LEARNING: dict[str, float] = {
    "max_file_operations": 100_000,
    "max_network_requests": 100,
    "max_output_mb": 64,
    "max_open_files": 50,
    "max_thread_count": 4,
    "max_disk_usage_mb": 100,
    "max_file_size_mb": 10,
}
CEILINGS: dict[str, float] = {
    "max_file_operations": 1_000_000,
    "max_network_requests": 1000,
    "max_output_mb": 64,
    "max_open_files": 1024,
    "max_thread_count": 64,
    "max_disk_usage_mb": 2048,
    "max_file_size_mb": 1024,
    "max_inodes": 1_000_000,
    "max_subprocess_count": 64,
}
OPTIONS = {"max_memory_mb": "--memory", "max_execution_time_seconds": "--timeout"}  # of psie learn, for its ceilings
# Files that are on every machine, and nobody's own.
PUBLIC = ("/usr/share", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/share", "/usr/include", "/usr/libexec")
SEARCHED = ("/usr/local/bin", "/usr/bin", "/bin")  # PATH of a plugin
PROGRAMS = ("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin")
OWN_PLACES = (WORKSPACE, *SCRATCH)  # a sandbox has its own
# Below a home: what must not be read by anybody who does not have to.
SECRETS = (
    *(".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".netrc", ".pgpass", ".git-credentials", ".npmrc", ".pypirc"),
    *(".password-store", ".mozilla", ".thunderbird", ".vault-token", ".my.cnf", ".bash_history", ".zsh_history"),
    *(".python_history", ".config/gcloud", ".config/gh", ".config/google-chrome", ".config/chromium", ".config/rclone"),
    *(".local/share/keyrings", ".local/state/psie", ".cargo/credentials.toml", ".config/pip/pip.conf", ".terraform.d"),
)
SECRETS_OF_THE_SYSTEM = (
    *("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/sudoers", "/etc/sudoers.d", "/etc/ssl/private"),
    *("/etc/ssh", "/var/lib/psie", "/var/lib/docker", "/var/lib/containerd", "/run/secrets", "/etc/krb5.keytab"),
)
SOCKETS = ("docker.sock", "containerd.sock", "podman.sock", "crio.sock")
SECRET_NAMES = (".env", ".netrc", ".pgpass", ".git-credentials", ".htpasswd", "credentials", "credentials.json", ".vault-token")
SECRET_BEGINNINGS = ("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", ".env.")
SECRET_ENDINGS = (".pem", ".key", ".p12", ".pfx", ".kdbx", ".keytab", ".jks")

WORDS = {
    "read": "opened for reading",
    "list": "listed",
    "look": "looked for",
    "write": "opened for writing",
    "make": "made",
    "delete": "deleted or moved",
    "program": "run as a program",
    "named": "named on the command line of a program",
}
WRITING = ("chmod", "chown", "link", "mkdir", "rename", "rmdir", "setxattr", "symlink", "truncate", "unlink", "utime")


@dataclass(frozen=True)
class Wish:
    """One thing that the plugin wanted and did not get.

    `value` is a path, a host, or the name of a field with `amount`; `word` says how it was wanted, `seen` whose word that is,
    `file` and `line` where in the plugin it was, if the interpreter knew.
    """

    kind: str
    value: str
    word: str
    count: int = 1
    file: str = ""
    line: int | None = None
    seen: str = PLUGIN
    amount: float = 0.0


@dataclass
class Seen:
    """What one run tells: what was wanted, what no setting allows, what a person should know."""

    wishes: list[Wish] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def seen_in(result: Result, folder: str) -> Seen:
    """What a run wanted and did not get. `folder`: the caller's own, which relative names may have meant."""
    seen = Seen()
    for wish in result.wishes:
        _from_wish(wish, folder, seen)
    for name, address in result.leads:
        seen.wishes.append(Wish(HOST, address, f"{name} leads there", seen=RESOLVER))
    written = {wish.value for wish in seen.wishes if wish.kind == WRITE}
    for violation in result.violations:
        _from_violation(violation, written, seen)
    if result.explanation is not None:
        _from_limit(result.explanation, seen)
    for kind, path, _ in result.changes:
        if kind == "deleted":
            seen.wishes.append(Wish(DELETE, path, "deleted", seen=KERNEL))
    return seen


def _from_wish(told: Mapping[str, str], folder: str, seen: Seen) -> None:
    path, word = told["path"], told["wish"]
    if word == "program" and "/" not in path:
        path = which(path)
        if not path:
            return
    if not path.startswith("/"):
        meant = os.path.join(folder, path)
        if os.path.lexists(meant) and len(path) <= PATH:
            seen.hints.append(
                f"{path} is looked for in the plugin's working directory, which is its workspace: if your {meant} was meant, "
                "have it use that name, or show it in a run that starts in its folder (psie run --ro, --chdir)"
            )
        return
    kind = WRITE if word in ("write", "make", "delete") else READ
    line = int(told["line"]) if told["line"].isdecimal() and len(told["line"]) < 9 else None
    seen.wishes.append(Wish(kind, path, WORDS[word], int(told["count"]), told["file"], line))


def which(program: str) -> str:
    """Where a plugin's PATH leads to on this host; "" where there is no such program."""
    places = (os.path.join(folder, program) for folder in SEARCHED)
    return next((os.path.realpath(place) for place in places if os.access(place, os.X_OK) and os.path.isfile(place)), "")


def _from_violation(violation: Mapping[str, Any], written: set[str], seen: Seen) -> None:
    details, explanation = violation["details"], violation["explanation"] or {}
    if not explanation.get("refused"):
        return
    setting = (explanation.get("setting") or "").partition(".")[2]
    where: dict[str, Any] = {
        "count": int(details.get("count", 1)),
        "file": explanation.get("file") or "",
        "line": explanation.get("line"),
    }
    whose = KERNEL if details.get("source") == "kernel" else PLUGIN
    if setting == "allow_subprocess_execution":
        seen.wishes.append(Wish(PROCESS, "", "new processes", seen=whose, **where))
    elif setting in ("allow_network_access", "allowed_hosts", "blocked_hosts"):
        if details.get("address"):
            port = details.get("port") or 0
            if details["operation"] == "resolve" and port in WEB:
                port = 0
            seen.wishes.append(Wish(HOST, network.join(details["address"], port), "connections", seen=whose, **where))
        else:
            seen.hints.append("it wanted a socket; where to is not known at this level without root: try --level strict")
    elif setting.startswith("max_"):
        _from_limit(explanation, seen)
    elif setting == "allow_file_deletion":
        seen.wishes.append(Wish(DELETE, str(details.get("path", "")), "deleted", seen=KERNEL, **where))
    elif setting == "allowed_directories":
        path = str(details["path"])
        if details["operation"] in WRITING and path not in written:
            seen.wishes.append(Wish(WRITE, path, details["operation"], **where))
        elif details["errno"] == "EACCES" and path not in written and os.path.exists(path):
            seen.impossible.append(
                f"{path} can be read by its owner alone, and a plugin has another id: chmod it, or name its folder in "
                "allowed_directories"
            )
    elif not setting:
        seen.impossible.append(f"{explanation['reason']}: no setting allows it")


def _from_limit(explanation: Mapping[str, Any], seen: Seen) -> None:
    """Of a limit that was passed: the setting with what is proposed in its place."""
    if ".max_" not in (explanation.get("setting") or "") or not explanation.get("toml"):
        return
    for table in tomllib.loads(explanation["toml"]).values():
        for name, value in table.items():
            if name.startswith("max_"):
                seen.wishes.append(Wish(LIMIT, name, "passed", seen=KERNEL, amount=value))


# -- what may be granted -----------------------------------------------------------------------------------------------


def homes() -> list[str]:
    """Homes of the people of this host, and of the caller."""
    found = {"/root", os.path.expanduser("~")}
    try:
        found |= {os.path.join("/home", name) for name in os.listdir("/home")}
    except OSError:
        pass
    return sorted(path for path in found if path.startswith("/") and path != "/")


def secret(path: str) -> str:
    """Why this is not for plugins; "" for what is no known secret. `path` is a real one, without links."""
    name = os.path.basename(path)
    if under(path, PUBLIC):
        return ""
    if name in SOCKETS:
        return "whoever can use a container engine's socket is root"
    if under(path, SECRETS_OF_THE_SYSTEM):
        return "it is a secret of this system"
    if any(under(path, [os.path.join(home, each) for each in SECRETS]) for home in homes()):
        return "it is where a person keeps keys, passwords or histories"
    parts = path.strip("/").split("/")
    if any(
        part in SECRET_NAMES or part in (".ssh", ".gnupg") or part.startswith(SECRET_BEGINNINGS) for part in parts
    ) or name.lower().endswith(SECRET_ENDINGS):
        return "by its name it holds a key or a password"
    return ""


@lru_cache(maxsize=256)
def secret_within(folder: str, *, is_named: bool = False) -> str:
    """Why a whole folder is not for plugins: what lies in it; "" if nothing is known to. Of a large one that a person has
    named it is enough that nothing is found among what is looked through."""
    if folder in homes() or folder in ("/", "/home"):
        return "its folder is a whole home"
    for known in (*SECRETS_OF_THE_SYSTEM, *(os.path.join(home, each) for home in homes() for each in SECRETS)):
        if under(known, (folder,)) and os.path.lexists(known):
            return f"{known} lies in it"
    looked = 0
    for place, names, files in os.walk(folder):
        for each in (*names, *files):
            looked += 1
            if looked > SCANNED:
                return "" if is_named else f"it has more than {SCANNED} entries, too many to be looked through for secrets"
            if secret(os.path.join(place, each)):
                return f"{os.path.join(place, each)} lies in it, and by its name it holds a key or a password"
    return ""


@dataclass
class Consent:
    """What the person has allowed while it is learned.

    Attributes:
        named: absolute paths that the person has named, as the plugin's arguments or otherwise.
        files: every other file as well, if it is no secret.
        hosts: where it may connect to.
        network: every public host as well.
        processes: whether it may start programs.
        ask: is asked about what none of these allows: a sentence, answered by True or False.
    """

    named: list[str] = field(default_factory=list)
    files: bool = False
    hosts: list[str] = field(default_factory=list)
    network: bool = False
    processes: bool = True
    ask: Callable[[str], bool] | None = None

    def lists(self, host: str) -> bool:
        """Whether `hosts` has it."""
        return bool(HOSTS(PluginPermissionsV2(allow_network_access=True, allowed_hosts=self.hosts), [host]))

    def host(self, host: str) -> str:
        """Why it may not connect there; "" if it may."""
        if self.lists(host):
            return ""
        is_private = not is_public_host(host)
        if self.network and not is_private:
            return ""
        if self._agrees(f"connect to {host}{', a private address' if is_private else ''}"):
            return ""
        return f"allow it by --allow-host {host}" + ("" if is_private else ", or all public ones by --allow-network")

    def read(self, path: str) -> str:
        if under(path, self.named) or under(path, (*PUBLIC, *PROGRAMS)) or self.files or self._agrees(f"read {path}"):
            return ""
        return "you have not named it: --allow-file PATH allows it and what is below it, --allow-files all but secrets"

    def write(self, folder: str) -> str:
        is_named = under(folder, self.named) or folder in [os.path.dirname(path) for path in self.named]
        if (
            is_named
            or self.files
            or self._agrees(f"change files in {folder} (what it changes while it is learned is not kept)")
        ):
            return ""
        return "you have not named it: --allow-file PATH allows it and what is below it, --allow-files all but secrets"

    def process(self) -> str:
        return "" if self.processes else "--no-subprocess"

    def _agrees(self, what: str) -> bool:
        return self.ask is not None and self.ask(what)


def is_public_host(host: str) -> bool:
    """Of an address whether it is; of a name: it counts for its public addresses alone."""
    place, _ = network.split(host)
    if network.is_name(place):
        return place.lower() != "localhost"
    return place != "*" and "/" not in place and is_public(parse(place))


@dataclass
class Grant:
    """One entry of the settings, and all that has asked for it."""

    kind: str
    value: str = ""
    wishes: list[Wish] = field(default_factory=list)

    def reason(self, plugin: str) -> str:
        """In one line, for a comment."""
        counts: dict[str, int] = {}
        for wish in self.wishes:
            counts[wish.word] = counts.get(wish.word, 0) + wish.count
        told = [word if count == 1 else f"{word} {count} times" for word, count in counts.items()]
        paths = sorted({wish.value for wish in self.wishes if wish.kind in (READ, WRITE) and wish.value != self.value})
        if paths:
            told.append(f"{len(paths)} path{'' if len(paths) == 1 else 's'} in it, first {short(paths[0])}")
        where = next((wish for wish in self.wishes if wish.file), None)
        if where is not None:
            name = os.path.basename(where.file) if where.file == plugin else short(where.file)
            told.append(f"first {name}" + (f", line {where.line}" if where.line is not None else ""))
        whose = next((each for each in (KERNEL, RESOLVER) if any(wish.seen == each for wish in self.wishes)), PLUGIN)
        told.append("seen by the kernel" if whose == KERNEL else f"{whose}'s word")
        return escape_text("; ".join(told), keep="")

    def title(self) -> str:
        """What it allows, in words."""
        return {
            READ: f"read {self.value}",
            WRITE: f"change files in {self.value}",
            DELETE: "delete files in folders that it may change",
            PROCESS: "start programs",
            HOST: f"connect to {self.value}",
        }[self.kind]

    def warning(self) -> str:
        """What a person should think of before keeping it; "" where that is nothing."""
        if self.kind == WRITE:
            return "what it changes there is kept whenever it ends well"
        if self.kind == DELETE:
            return "files that were there before can be lost"
        if self.kind == PROCESS:
            return "any program that its sandbox shows: what it may do, they may do"
        if self.kind == HOST and not is_public_host(self.value):
            return "this is a private address: of this machine, or of a network that is closed to others"
        return ""


@dataclass
class Policy:
    """Settings under way.

    Attributes:
        level: of isolation, by its name.
        plugin: path of the plugin.
        ceilings: of limits that the person has set for learning: the most that is tried.
        grants: by kind and value.
        refused: what was wanted and not granted, and why.
        raised: limits beyond what a plugin has without being asked for.
        subprocesses: as many at once.
    """

    level: str
    plugin: str
    ceilings: dict[str, float]
    grants: dict[tuple[str, str], Grant] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    raised: dict[str, float] = field(default_factory=dict)
    subprocesses: int = SUBPROCESSES

    def without(self, key: tuple[str, str]) -> Policy:
        return replace(self, grants={each: grant for each, grant in self.grants.items() if each != key})

    def values(self, kind: str) -> list[str]:
        return sorted(value for each, value in self.grants if each == kind)

    # -- taking wishes in ------------------------------------------------------------------------------------------------

    def take(self, seen: Seen, consent: Consent) -> bool:
        """Grant what may be granted. Whether something is new."""
        before = self._state()
        for wish in seen.wishes:
            getattr(self, f"_{wish.kind}")(wish, consent)
        self._gather()
        return self._state() != before

    def _state(self) -> object:
        return set(self.grants), dict(self.raised)

    def _grant(self, kind: str, value: str, wish: Wish) -> None:
        """Of what is granted already the wishes are kept once."""
        grant = self.grants.setdefault((kind, value), Grant(kind, value))
        known = [each for each in grant.wishes if (each.word, each.value) == (wish.word, wish.value)]
        if not known:
            grant.wishes.append(wish)

    def _refuse(self, what: str, why: str) -> None:
        self.refused.setdefault(escape_text(what, keep=""), escape_text(why, keep=""))

    def _read(self, wish: Wish, consent: Consent) -> None:
        path = os.path.normpath(wish.value)
        if not os.path.lexists(path):
            return  # not here either: it would have gone on without
        if self._on_the_way(path, wish, consent):
            return
        what = f"read {short(path)}"
        if under(path, PROGRAMS) and (PROCESS, "") not in self.grants:
            if not consent.process():  # strict shows such programs to whoever may start some
                self._grant(PROCESS, "", wish)
            return
        why = unwritable_name(path) or secret(os.path.realpath(path)) or unshowable(path)
        if not why and not os.access(path, os.R_OK):
            why = "you may not read it yourself"
        place = self._named_around(path, consent)
        if not why and place == path and os.path.isdir(path):
            why = secret_within(path, is_named=path in consent.named)
        why = why or consent.read(path)
        if why:
            self._refuse(what, why)
        elif not any(under(place, (other,)) for kind, other in self.grants if kind in (READ, WRITE) and other != place):
            self._grant(READ, place, wish)

    def _on_the_way(self, path: str, wish: Wish, consent: Consent) -> bool:
        """Whether it is a folder above what the person has named, which is granted then: that shows the way to it."""
        below = [named for named in consent.named if named != path and under(named, (path,)) and os.path.isdir(path)]
        for named in below:
            if os.path.lexists(named):
                self._read(replace(wish, value=named), consent)
            elif wish.word == WORDS["make"]:
                self._write(replace(wish, kind=WRITE, value=named, word=WORDS["write"]), consent)
        return bool(below)

    @staticmethod
    def _named_around(path: str, consent: Consent) -> str:
        """The folder that the person has named and that it lies in, if it holds no secrets; else itself."""
        for named in consent.named:
            if under(path, (named,)) and path != named and os.path.isdir(named) and not secret_within(named, is_named=True):
                return named if not unshowable(named) else path
        return path

    def _write(self, wish: Wish, consent: Consent) -> None:
        path = os.path.normpath(wish.value)
        if wish.word == WORDS["make"] and os.path.isdir(path):
            self._read(replace(wish, kind=READ), consent)  # os.makedirs: where it sees the folder it leaves it as it is
            return
        folder = os.path.dirname(path)
        around = next((value for value in self.values(WRITE) if under(folder, (value,))), None)
        if around is not None:
            self._grant(WRITE, around, wish)
            return
        if under(path, OWN_PLACES) and not os.path.lexists(folder):
            return  # a folder that it has made in its own /tmp
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        what = f"write {short(path)}"
        why = unwritable_name(path) or secret(os.path.realpath(path)) or ungrantable(folder)
        if not why and under(folder, SYSTEM):
            why = "its folder is the system's own"
        if not why and not os.access(folder, os.W_OK | os.X_OK):
            why = "you may not write there yourself"
        why = why or secret_within(folder, is_named=under(folder, consent.named)) or consent.write(folder)
        if why:
            self._refuse(what, why)
        else:
            self._grant(WRITE, folder, wish)

    def _delete(self, wish: Wish, consent: Consent) -> None:
        self._grant(DELETE, "", wish)

    def _process(self, wish: Wish, consent: Consent) -> None:
        why = consent.process()
        if why:
            self._refuse("start programs", why)
        else:
            self._grant(PROCESS, "", wish)

    def _host(self, wish: Wish, consent: Consent) -> None:
        try:
            place, port = network.split(wish.value)
        except ValueError:
            self._refuse(f"connect to {short(wish.value)}", "it is no name or address of a host")
            return
        host = network.join(place, port)
        if not port and not consent.lists(host):  # the person may have named one port of those that it stands for
            named = [each for each in (network.join(place, number) for number in WEB) if consent.lists(each)]
            for each in named:
                self._grant(HOST, each, wish)
            if named:
                return
        why = consent.host(host)
        if why:
            self._refuse(f"connect to {host}", why)
        else:
            self._grant(HOST, host, wish)

    def _limit(self, wish: Wish, consent: Consent) -> None:
        most = self.ceilings.get(wish.value, CEILINGS.get(wish.value, 0.0))
        now = self.raised.get(wish.value, self.ceilings.get(wish.value, LEARNING.get(wish.value, 0.0)))
        if wish.value == "max_subprocess_count":
            now = self.subprocesses
        value = min(wish.amount, most)
        if value <= now:
            flag = OPTIONS.get(wish.value)
            self._refuse(f"more {wish.value}", f"learning gives at most {most:g}" + (f"; {flag} changes that" if flag else ""))
        elif wish.value == "max_subprocess_count":
            self.subprocesses = int(value)
            self.raised[wish.value] = value
        else:
            self.raised[wish.value] = value

    def _gather(self) -> None:
        """Of many files of one folder make the folder; leave out what another grant shows; outermost folders only."""
        files = [value for value in self.values(READ) if not os.path.isdir(value)]
        for folder in sorted({os.path.dirname(path) for path in files}):
            inside = [path for path in files if os.path.dirname(path) == folder]
            if len(inside) >= MANY_FILES and not unshowable(folder) and not secret_within(folder) and not under(folder, SYSTEM):
                self._swallow(READ, folder, inside)
        for kind in (READ, WRITE):
            for value in self.values(kind):
                inside = [other for other in self.values(kind) if other != value and under(other, (value,))]
                if inside:
                    self._swallow(kind, value, inside)
        for value in self.values(WRITE):
            for path in [path for path in self.values(READ) if under(path, (value,))]:
                del self.grants[READ, path]

    def _swallow(self, kind: str, value: str, inside: Iterable[str]) -> None:
        for other in inside:
            grant = self.grants.pop((kind, other), None)
            for wish in grant.wishes if grant is not None else ():
                self._grant(kind, value, wish)

    # -- settings --------------------------------------------------------------------------------------------------------

    def permissions(self) -> dict[str, object]:
        """The fields of [permissions] that are not their defaults."""
        found: dict[str, object] = {}
        for name, kind in (("readable_paths", READ), ("allowed_directories", WRITE), ("allowed_hosts", HOST)):
            if self.values(kind):
                found[name] = self.values(kind)
        for name, kind in (
            ("allow_network_access", HOST),
            ("allow_subprocess_execution", PROCESS),
            ("allow_file_deletion", DELETE),
        ):
            if self.values(kind):
                found[name] = True
        if "max_file_size_mb" in self.raised:
            found["max_file_size_mb"] = self.raised["max_file_size_mb"]
        return found

    def learning_limits(self) -> dict[str, float]:
        found = {**LEARNING, **self.ceilings, **self.raised}
        if self.values(PROCESS):
            found["max_subprocess_count"] = self.subprocesses
        return found

    def learning(self) -> str:
        """A file for a run that learns: wide limits, and no more than is granted so far."""
        isolation = {"level": self.level, "violation_threshold": 10, "quarantine_on_violation": False}
        tables: dict[str, dict[str, Any]] = {
            "isolation": isolation,
            "limits": self.learning_limits(),
            "permissions": self.permissions(),
        }
        lines: list[str] = []
        for table, values in tables.items():
            lines += [f"[{table}]", *(f"{name} = {toml(value)}" for name, value in values.items())]
        return "\n".join(lines) + "\n"

    def warnings(self) -> list[str]:
        """What a person should think of before keeping it."""
        told = [f"it may {grant.title()}: {grant.warning()}" for grant in self.ordered() if grant.warning()]
        if self.values(HOST) and (self.values(READ) or self.values(WRITE)):
            told.append("it can send what it may read to the hosts that it may connect to")
        return told

    def ordered(self) -> list[Grant]:
        kinds = (READ, WRITE, DELETE, PROCESS, HOST)
        return sorted(self.grants.values(), key=lambda grant: (kinds.index(grant.kind), grant.value))


# -- limits ------------------------------------------------------------------------------------------------------------


@dataclass
class Peaks:
    """The most that any run has used."""

    memory_mb: float = 0.0
    seconds: float = 0.0
    output_bytes: int = 0
    file_operations: int = 0
    network_requests: int = 0

    def add(self, result: Result) -> None:
        for name in vars(self):
            setattr(self, name, max(getattr(self, name), getattr(result, name)))


def limits_for(policy: Policy, peaks: Peaks) -> dict[str, tuple[float, str]]:
    """Of each limit that is written: its value, and the rule in words."""
    output = peaks.output_bytes / (1 << 20)
    found: dict[str, tuple[float, str]] = {
        "max_memory_mb": (
            max(32, stepped(2 * peaks.memory_mb, 16)),
            f"{peaks.memory_mb:.1f} MB at the most: twice that, in steps of 16, at least 32",
        ),
        "max_execution_time_seconds": (
            max(5, math.ceil(3 * peaks.seconds)),
            f"{peaks.seconds:.2f} s at the most: three times that, at least 5",
        ),
        "max_output_mb": (max(1, math.ceil(4 * output)), f"{output:.2f} MB at the most: four times that, at least 1"),
        "max_file_operations": (
            max(100, stepped(2 * peaks.file_operations, 100)),
            f"{peaks.file_operations} at the most: twice that, in steps of 100, at least 100",
        ),
    }
    if policy.values(HOST):
        found["max_network_requests"] = (
            max(4, 2 * peaks.network_requests),
            f"{peaks.network_requests} connections at the most: twice that, at least 4",
        )
    if policy.values(PROCESS):
        found["max_subprocess_count"] = (
            policy.subprocesses,
            "at once: the fewest of 2, 4, 8, 16 ... with which it did the same",
        )
    for name, value in policy.raised.items():
        if name not in found and name != "max_file_size_mb":
            found[name] = (value, "a run passed the limit before: twice that limit")
    if "max_file_size_mb" in policy.raised and policy.raised["max_file_size_mb"] > 50:
        found["max_file_size_mb"] = (policy.raised["max_file_size_mb"], "the smaller one of this and the permission holds")
    return found


def stepped(value: float, step: int) -> int:
    return math.ceil(value / step) * step


# -- the file ----------------------------------------------------------------------------------------------------------


def render(
    policy: Policy, limits: Mapping[str, tuple[float, str]], runs: int, arguments: Sequence[str], unsure: str = ""
) -> str:
    """The text of a psie.toml: every grant with why it is there, and as comments what was wanted and not granted."""
    name = os.path.basename(policy.plugin)
    lines = [
        comment(
            f"Settings for {name}, as psie learn found them in {runs} runs"
            + (f" with {shown(arguments)}." if arguments else ".")
        ),
        "# They hold for each plugin in this folder.",
        "# They allow what it was seen to use there. Ways through it that it did not take may need more.",
        '# "The plugin\'s word": told by its own interpreter, so it may be made up. Delete what you do not want it to have.',
    ]
    if unsure:
        lines.append(comment(unsure))
    lines += ["", "[isolation]", f"level = {toml(policy.level)}", "", "[limits]"]
    for field_name, (value, rule) in limits.items():
        lines += [comment(rule), f"{field_name} = {toml(value)}"]
    lines += ["", "[permissions]"]
    lines += _permission_lines(policy)
    if policy.refused:
        lines += ["", "# Wanted, and not granted:"]
        lines += [comment(f"- {what}: {why}") for what, why in list(policy.refused.items())[:LISTED]]
        if len(policy.refused) > LISTED:
            lines.append(comment(f"- and {len(policy.refused) - LISTED} more"))
    return "\n".join(lines) + "\n"


def _permission_lines(policy: Policy) -> list[str]:
    lines: list[str] = []
    for field_name, kind in (("readable_paths", READ), ("allowed_directories", WRITE)):
        if policy.values(kind):
            lines += [f"{field_name} = [", *_entries(policy, kind), "]"]
    for field_name, kind in (("allow_file_deletion", DELETE), ("allow_subprocess_execution", PROCESS)):
        if policy.values(kind):
            lines += [*_why(policy, policy.grants[kind, ""]), f"{field_name} = true"]
    if policy.values(HOST):
        if policy.values(READ) or policy.values(WRITE):
            lines.append("# WARNING: it can send what it may read to these hosts.")
        lines += ["allow_network_access = true", "allowed_hosts = [", *_entries(policy, HOST), "]"]
    if "max_file_size_mb" in policy.raised:
        lines += [
            "# a run passed the limit before: twice that limit",
            f"max_file_size_mb = {toml(policy.raised['max_file_size_mb'])}",
        ]
    return lines


def _entries(policy: Policy, kind: str) -> list[str]:
    lines: list[str] = []
    for value in policy.values(kind):
        lines += [f"    {line}" for line in (*_why(policy, policy.grants[kind, value]), f"{toml(value)},")]
    return lines


def _why(policy: Policy, grant: Grant) -> list[str]:
    lines = [comment(grant.reason(policy.plugin))]
    if grant.warning():
        lines.append(comment(f"WARNING: {grant.warning()}."))
    return lines


def comment(text: str) -> str:
    """One line of a TOML file that is a comment, whatever stands in `text`."""
    return f"# {escape_text(text, keep='')}"


def toml(value: object) -> str:
    """A value as TOML has it: text, a number, a switch, or a list of them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    if not isinstance(value, str):
        raise TypeError(f"{value!r} cannot be written as TOML: give text, a number, a switch or a list")
    return '"' + "".join(_character(each) for each in value) + '"'


def _character(character: str) -> str:
    """In a basic string (toml.io, "String"): what could end it, or its line, is escaped."""
    if character in ('"', "\\"):
        return f"\\{character}"
    code = ord(character)
    if 0xD800 <= code <= 0xDFFF:
        raise ValueError("a name that is no Unicode text cannot be written as TOML")
    if character.isprintable():
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def unwritable_name(path: str) -> str:
    """Why a path is not written into a file that people read; "" if it may be."""
    if len(path) > PATH:
        return f"its name is longer than {PATH} characters"
    if not path.isprintable() or escape_text(path, keep="") != path:
        return "its name has characters that cannot be shown"
    return ""


def short(text: str) -> str:
    """The end of it, which tells most of a path; escaped."""
    return escape_text(text if len(text) <= 120 else f"...{text[-117:]}", keep="")


def shown(arguments: Sequence[str]) -> str:
    text = " ".join(json.dumps(each) if " " in each or not each else each for each in arguments)
    return escape_text(text if len(text) <= 200 else f"{text[:197]}...", keep="")
