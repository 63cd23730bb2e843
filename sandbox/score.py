"""How exposed a plugin's sandbox leaves its host: 0 (nothing that psie can close is open) to 10, as systemd-analyze(1)
rates the units of a system.

The judgement is in one table, CHECKS: what is looked at, how much it weighs, how open it is from 0 to 1, and what would
close it. It is a comparison between settings, no measure of safety. Must not know how anything is enforced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.recipe_data import ENFORCED, SUBSTITUTED, Protection, Recipe
from sandbox.violations import to_plain

MOST = 10.0


@dataclass(frozen=True)
class Finding:
    """One line of a rating.

    Attributes:
        name: what was looked at.
        weight: how much it counts.
        open: how open it is, 0 to 1.
        points: what it adds to the whole, of 10.
        seen: what was found.
        mend: what would make it less; "" where nothing does.
    """

    name: str
    weight: float
    open: float
    points: float
    seen: str
    mend: str

    def to_dict(self) -> dict[str, Any]:
        return {name: to_plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Rating:
    """`exposure`, 0 to 10, and the findings that it is made of, the worst first."""

    level: str
    exposure: float
    findings: tuple[Finding, ...]

    @property
    def word(self) -> str:
        """In a word."""
        return next(
            word for least, word in ((6, "open"), (4, "exposed"), (2, "guarded"), (0, "tight")) if self.exposure >= least
        )

    def best_mends(self, count: int = 3) -> list[Finding]:
        """Those whose mend would take most off."""
        return [finding for finding in self.findings if finding.mend and finding.points][:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"level": self.level, "exposure": self.exposure, "word": self.word, "findings": findings}


@dataclass(frozen=True)
class Looked:
    """A recipe with its protections: as compiled, or as read back from a running sandbox."""

    recipe: Recipe
    protections: dict[str, Protection]

    def state(self, name: str) -> tuple[float, str, str]:
        """(how open, what was seen, mend) of one protection: a substitute counts for half."""
        found = self.protections.get(name)
        if found is None:
            return 1.0, "not part of this level", ""
        openness = {ENFORCED: 0.0, SUBSTITUTED: 0.5}.get(found.state, 1.0)
        return openness, f"{found.state}: {found.mechanism}", found.mend


Check = Callable[[Looked], tuple[float, str, str]]


def protection(name: str, mend: str = "") -> Check:
    """A protection that is enforced, substituted, missing, or none of this level's."""

    def look(looked: Looked) -> tuple[float, str, str]:
        openness, seen, own = looked.state(name)
        return openness, seen, (own or mend) if openness else ""

    return look


def system_calls(looked: Looked) -> tuple[float, str, str]:
    profile = str(looked.recipe.seccomp["profile"])
    openness = {"denylist": 0.7, "allowlist": 0.3, "tight": 0.1}[profile]
    mends = {
        "denylist": "level strict, or security_level = HIGH",
        "allowlist": "level maximum, or security_level = MAXIMUM",
    }
    return openness, f"the profile {profile}", mends.get(profile, "")


def files_seen(looked: Looked) -> tuple[float, str, str]:
    openness = {"minimal": 1.0, "standard": 0.6, "strict": 0.2, "maximum": 0.1}[looked.recipe.level]
    mend = {"minimal": "level standard hides homes, /run and /var", "standard": "level strict shows the interpreter alone"}
    found = looked.protections.get("view of the files")
    return openness, found.detail if found is not None else "", mend.get(looked.recipe.level, "")


def folders_written(looked: Looked) -> tuple[float, str, str]:
    folders = [folder for folder in looked.recipe.granted if folder["kind"] != "read"]
    if not folders:
        return 0.0, "none but its workspace", ""
    if any(folder["kind"] == "direct" for folder in folders):
        return 1.0, f"{len(folders)} of the host's, directly", "level standard keeps changes apart until they are committed"
    return (
        min(1.0, 0.3 + 0.1 * len(folders)),
        f"{len(folders)} of the host's, once committed",
        "grant fewer, or for reading alone",
    )


def destinations(looked: Looked) -> tuple[float, str, str]:
    access = looked.recipe.network["access"]
    if access is None or not access["allowed"]:
        return 0.0, "none", ""
    hosts = [host for host, _ in access["allowed"]]
    if "*" in hosts:
        return 1.0, "every public host", "name the hosts that it needs instead of *"
    if any("/" in host for host in hosts):
        return 0.7, f"{len(hosts)} hosts and networks", "name single hosts instead of networks"
    return min(0.6, 0.3 + 0.05 * len(hosts)), f"{len(hosts)} hosts", "name fewer, each with its port"


def network_namespace(looked: Looked) -> tuple[float, str, str]:
    if "net" in looked.recipe.namespaces:
        return 0.0, f"a namespace of its own ({looked.recipe.network['mode']})", ""
    return 0.5, "the host's, in which it can have no socket but by the supervisor", "level strict"


def processes(looked: Looked) -> tuple[float, str, str]:
    if not looked.recipe.seccomp["allow_subprocess"]:
        return 0.0, "refused", ""
    return 1.0, f"{looked.recipe.limits['subprocesses']:g} at a time", "leave out allow_subprocess_execution"


def who(looked: Looked) -> tuple[float, str, str]:
    ids = looked.recipe.ids
    if ids["allocated"] and ids["outside"] is None:
        return 0.0, "an id that nobody else has", ""
    if ids["outside"] is not None:
        return 0.4, f"the host's user {ids['outside']}", "leave out sandbox_user"
    mend = "run psie as root: then each sandbox has an id of its own"
    return (0.3, "the caller's id, in a user namespace", mend) if ids["user_namespace"] else (0.7, "the caller's own id", mend)


LEVEL = "level standard"
CHECKS: tuple[tuple[str, float, Check], ...] = (
    ("system calls", 20, system_calls),
    ("files that it sees", 20, files_seen),
    ("files that it can change", 12, folders_written),
    ("hosts that it can reach", 18, destinations),
    ("the host's network", 8, network_namespace),
    ("whose id it has", 12, who),
    ("no_new_privs", 10, protection("no_new_privs")),
    ("capabilities", 10, protection("no capabilities")),
    ("writes by Landlock", 10, protection("writes only to the workspace")),
    ("signals and abstract sockets", 4, protection("no signals or abstract sockets out")),
    ("other programs", 6, processes),
    ("user namespace", 5, protection("user namespace", LEVEL)),
    ("mount namespace", 8, protection("mount namespace", LEVEL)),
    ("PID namespace", 8, protection("PID namespace", LEVEL)),
    ("IPC namespace", 3, protection("IPC namespace", LEVEL)),
    ("UTS namespace", 1, protection("UTS namespace", LEVEL)),
    ("cgroup namespace", 1, protection("cgroup namespace", LEVEL)),
    ("/proc", 5, protection("own /proc", LEVEL)),
    ("scratch folders", 3, protection("private /tmp, /var/tmp, /dev/shm, minimal /dev", LEVEL)),
    ("end of all its processes", 4, protection("cgroup leaf")),
    ("memory", 6, protection("memory")),
    ("processes and threads", 5, protection("processes and threads")),
    ("CPU", 4, protection("CPU")),
    ("disk", 3, protection("workspace", LEVEL)),
)


def rate(recipe: Recipe, protections: Sequence[Protection] | None = None) -> Rating:
    """Rate a recipe; with `protections` as a running sandbox has them (EnhancedPluginSandbox.protections)."""
    known = recipe.protections if protections is None else protections
    looked = Looked(recipe, {each.name: each for each in known})
    whole = sum(weight for _, weight, _ in CHECKS)
    findings = []
    for name, weight, check in CHECKS:
        openness, seen, mend = check(looked)
        findings.append(Finding(name, weight, openness, round(MOST * weight * openness / whole, 2), seen, mend))
    findings.sort(key=lambda finding: -finding.points)
    exposure = MOST * sum(each.weight * each.open for each in findings) / whole
    return Rating(recipe.level, round(exposure, 1), tuple(findings))
