"""Recipe and Protection as plain data: what `sandbox.recipe.compile` makes and everything after it carries out.

A module of its own, and no dataclasses, because the command line takes recipes from a cache and cannot afford to import
what it takes to compile one. Must not know what a level means.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

ENFORCED = "enforced"
SUBSTITUTED = "substituted"
MISSING = "missing"
# The processes of a call that are not the plugin's: init. The worker is the first of the plugin's own.
OWN_PROCESSES = 1


class Frozen:
    """Named fields that are set once; equality, repr and conversion to plain data go by them."""

    FIELDS: tuple[str, ...] = ()

    def __init__(self, **values: Any) -> None:
        if set(values) != set(self.FIELDS):
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(self.FIELDS)}")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: make another with replace()")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in self.FIELDS)})"


class Protection(Frozen):
    """One line of a recipe: what is promised, what does it, and what became of it.

    Attributes:
        name: of the protection.
        state: enforced, substituted (by the weaker mechanism that is named) or missing.
        mechanism: what does it.
        detail: a number, a reason, what was seen.
        mend: what would make it enforced; "" if it is.
        expected: names of the read-back (see sandbox.engine.warden) to the values that a running worker must show.
        by_host: False if this version has it nowhere, on no host.
    """

    FIELDS = ("name", "state", "mechanism", "detail", "mend", "expected", "by_host")
    name: str
    state: str
    mechanism: str
    detail: str
    mend: str
    expected: dict[str, str]
    by_host: bool

    def __init__(
        self,
        name: str,
        state: str,
        mechanism: str,
        detail: str = "",
        mend: str = "",
        expected: dict[str, str] | None = None,
        by_host: bool = True,
    ) -> None:
        super().__init__(
            name=name, state=state, mechanism=mechanism, detail=detail, mend=mend, expected=expected or {}, by_host=by_host
        )

    def replace(self, **changes: Any) -> Protection:
        return Protection(**{**self.__dict__, **changes})

    def to_dict(self) -> dict[str, str]:
        shown = {"name": self.name, "state": self.state, "mechanism": self.mechanism, "detail": self.detail}
        return {**shown, "mend": self.mend} if self.mend else shown


class Recipe(Frozen):
    """What a level becomes on one host, for some limits and permissions. Plain data all through; see sandbox.recipe."""

    FIELDS = (
        *("level", "namespaces", "outer_user_namespace", "template", "sandbox_mounts", "call_mounts", "workspace", "granted"),
        *("network", "hostname", "ids", "rlimits", "landlock", "seccomp", "cgroup", "environment", "limits"),
        *("interpreter", "preload", "modules", "monitoring", "protections"),
    )
    level: str
    namespaces: tuple[str, ...]
    outer_user_namespace: bool
    template: dict[str, Any] | None  # lines and pivot: see sandbox.ns.mounts
    sandbox_mounts: list[list[str]]  # source, target, flags
    call_mounts: list[list[Any]]
    workspace: dict[str, Any]  # kind, path, bytes, inodes
    granted: list[dict[str, str]]  # path, and kind: overlay, copy, read or direct (see sandbox.ns.granted)
    network: dict[str, Any]  # mode (host, loopback or veth), sockets, access (see sandbox.engine.access), looks, max_requests
    hostname: str
    ids: dict[str, Any]  # user_namespace, allocated, outside
    rlimits: list[list[Any]]  # name as in setrlimit(2), value
    landlock: dict[str, Any] | None  # abi, rules, deny_network, scopes, probe
    seccomp: dict[str, Any]  # profile, and by name each of sandbox.seccomp.filter.FEATURES
    cgroup: dict[str, Any] | None  # tree, controllers, settings
    environment: dict[str, str]
    limits: dict[str, float]
    interpreter: dict[str, Any]  # executable, prefix, path
    preload: tuple[str, ...]
    modules: dict[str, list[str]]  # allowed, blocked
    monitoring: dict[str, Any]
    protections: tuple[Protection, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        return cls(**{**data, "protections": tuple(Protection(**each) for each in data["protections"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` makes an equal recipe of it."""
        return {**self.__dict__, "protections": [dict(protection.__dict__) for protection in self.protections]}

    @property
    def weakened(self) -> list[Protection]:
        """Protections that this host cannot enforce as the level says."""
        return [protection for protection in self.protections if protection.state != ENFORCED and protection.by_host]


# -- read-back -----------------------------------------------------------------------------------------------------------


def differences(protections: tuple[Protection, ...], seen: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Where a running worker is not what its recipe says: {name: (expected, seen)}. What was not seen differs."""
    expected = {name: value for protection in protections for name, value in protection.expected.items()}
    if expected.items() <= seen.items():  # as it nearly always is
        return {}
    return {name: (value, seen.get(name, "nothing")) for name, value in expected.items() if not _holds(name, value, seen)}


def _holds(name: str, value: str, seen: Mapping[str, str]) -> bool:
    """Of an rlimit less is as good: the caller's own may be lower, and none can be raised again."""
    found = seen.get(name, "")
    if name.startswith("limit/") and found.isdecimal() and value.isdecimal():
        return int(found) <= int(value)
    return found == value and name in seen


def confirm(protections: tuple[Protection, ...], seen: Mapping[str, str]) -> tuple[Protection, ...]:
    """The protections of a recipe as the running worker showed them. Call it when `differences` has found none."""
    confirmed = []
    for protection in protections:
        detail = protection.detail
        if protection.expected:
            shown = ", ".join(f"{name}={seen[name]}" for name in protection.expected)
            protection = protection.replace(detail=f"{detail}; seen: {shown}".lstrip("; "))
        elif protection.name == "writes only to the workspace" and seen.get("probe", "none") != "none":
            protection = protection.replace(detail=f"{detail}; a write elsewhere answered {seen['probe']}".lstrip("; "))
        elif protection.name == "own /proc" and "no /proc" in seen.get("notes", "") and protection.state == ENFORCED:
            reason = "a fresh one cannot be mounted here: none is stronger"
            protection = protection.replace(state=SUBSTITUTED, mechanism="no /proc at all", detail=reason)
        elif protection.name == "granted folders" and "copy" in seen.get("granted", "") and protection.state == ENFORCED:
            reason = f"{detail}; the file system of a folder cannot be a layer of an overlay"
            protection = protection.replace(state=SUBSTITUTED, mechanism="a copy within the disk limit", detail=reason)
        elif protection.name == "network" and seen.get("shares_network"):
            reason = f"{detail}; shared with the other sandboxes of its NetworkIsolationManager"
            protection = protection.replace(mechanism="a network namespace that is not the host's", detail=reason)
        confirmed.append(protection)
    return tuple(confirmed)
