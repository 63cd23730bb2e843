"""The options of `psie run` and `psie call`, written down once: click shows and checks them, `parse` reads them fast.

Must not import click: it costs more than starting a sandbox.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

FLAG, VALUE, MANY = "flag", "value", "many"

LEVELS = ("minimal", "standard", "strict", "maximum")

# (name, kind, placeholder, help)
SHARED: tuple[tuple[str, str, str, str], ...] = (
    ("--level", VALUE, "LEVEL", "minimal, standard, strict or maximum (default: standard, or SANDBOX_ISOLATION_LEVEL)."),
    ("--memory", VALUE, "SIZE", "Memory, as 128M or 1G (default: 128M)."),
    ("--timeout", VALUE, "SECONDS", "Wall-clock time (default: 30)."),
    ("--cpu", VALUE, "PERCENT", "CPU rate in percent of one CPU (default: 50)."),
    ("--pids", VALUE, "N", "Threads; with --allow-subprocess also processes that may exist at once (default: 4)."),
    ("--ro", MANY, "PATH", "A file or folder that the plugin may read, at its real path. Repeatable."),
    (
        "--chdir",
        VALUE,
        "DIR",
        "Where it starts: in what --ro or --rw shows, or on the way to that (default: an empty workspace).",
    ),
    ("--env", MANY, "NAME[=VALUE]", "An environment variable, or one of yours to pass on. Repeatable."),
    ("--allow-host", MANY, "HOST[:PORT]", "It may connect there by TCP; without PORT to 80 and 443. Repeatable."),
    ("--allow-subprocess", FLAG, "", "The plugin may start processes."),
    ("--allow-degraded", FLAG, "", "Run also where an isolation of the level cannot be had."),
    ("--require-limits", FLAG, "", "Refuse to run where the kernel cannot enforce a resource limit."),
    ("--config", VALUE, "FILE.toml", "Settings: tables [isolation], [limits], [permissions]."),
    ("--result-file", VALUE, "OUT.json", "Write status, protections, violations and telemetry there."),
    ("--report", VALUE, "OUT.html", "Write all of that there as a page for a browser, with its course over time."),
    ("--summary", FLAG, "", "Say at the end, in at most five lines, what was enforced and what was used."),
    (
        "--quiet",
        FLAG,
        "",
        "No warning about protections that are substituted here, no word about what was refused, no live line.",
    ),
)
RUN = (
    *SHARED,
    (
        "--rw",
        MANY,
        "DIR",
        "A folder that it may change; kept if it ends with status 0, nothing refused. Repeatable.",
    ),
    ("--allow-delete", FLAG, "", "It may also delete files in --rw folders."),
    ("--dry-run", FLAG, "", "Show what it would change in --rw folders, and keep nothing of it."),
    ("--ask", FLAG, "", "Show what it has changed in --rw folders, and ask whether to keep it."),
    ("--raw", FLAG, "", "Do not escape what goes to a terminal: the plugin can then drive it."),
)
CALL = (
    *SHARED,
    ("--arg", MANY, "JSON", "A positional argument. Repeatable."),
    ("--kwarg", MANY, "NAME=JSON", "A keyword argument. Repeatable."),
)
SHORT = {"-q": "--quiet", "-v": "--summary"}


def key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def defaults(table: Sequence[tuple[str, str, str, str]]) -> dict[str, Any]:
    empty: dict[str, Any] = {FLAG: False, VALUE: None, MANY: ()}
    return {key(name): empty[kind] for name, kind, _, _ in table}


def parse(arguments: Sequence[str], table: Sequence[tuple[str, str, str, str]]) -> dict[str, Any] | None:
    """The options with `file` and `args`; None for anything that needs an explanation (--help, a mistake)."""
    kinds = {name: kind for name, kind, _, _ in table}
    given = defaults(table)
    positional: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional += rest
            break
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        name, has_value, value = word.partition("=")
        name = SHORT.get(name, name)
        kind = kinds.get(name)
        if kind == FLAG and not has_value:
            given[key(name)] = True
            continue
        if kind is None or kind == FLAG:
            return None
        if not has_value:
            if not rest:
                return None
            value = rest.pop(0)
        given[key(name)] = value if kind == VALUE else (*given[key(name)], value)
    if not positional:
        return None
    return {**given, "file": positional[0], "args": tuple(positional[1:])}
