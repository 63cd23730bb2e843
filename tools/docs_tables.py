"""The tables of README.md and docs/ that the code knows: levels from the recipes, options and commands, errors, refusals, and
of docs/speed.json.

    python tools/docs_tables.py            # writes them anew, between the marks of each page
    python tools/docs_tables.py --check    # only says which pages are not as they would be, by its status too

A page has `<!-- made by tools/docs_tables.py: NAME -->` above and `<!-- end: NAME -->` below a table. tests/test_docs.py holds
that every table is what this prints.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(ROOT))

import click  # noqa: E402

import sandbox  # noqa: E402
from benchmarks import results  # noqa: E402
from sandbox import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, config, host, recipe  # noqa: E402
from sandbox.cli import app, options  # noqa: E402
from sandbox.cli.settings import KINDS  # noqa: E402
from sandbox.errors import SandboxInitializationError  # noqa: E402
from sandbox.explanations import RULES, Rule  # noqa: E402
from sandbox.host import HostFacts  # noqa: E402
from sandbox.plugins import effective  # noqa: E402
from sandbox.recipe_data import ENFORCED, Protection, Recipe  # noqa: E402

MARK = re.compile(r"(<!-- made by tools/docs_tables\.py: (?P<name>[\w-]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)
NAMESPACES = [f"{name} namespace" for name in ("user", "mount", "PID", "IPC", "UTS", "cgroup")]
OWN_PLACES = ("own /proc", "private /tmp, /var/tmp, /dev/shm, minimal /dev", "workspace")
ALLOWED = PluginPermissionsV2(allow_network_access=True, allowed_hosts=["*"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


# -- levels --------------------------------------------------------------------------------------------------------------


def compiled(level: IsolationLevel, facts: HostFacts, *, permissions: PluginPermissionsV2 | None = None) -> Recipe:
    return recipe.compile(IsolationConfig(level=level), PluginLimitsV2(), permissions or PluginPermissionsV2(), facts)


def protections(level: IsolationLevel) -> dict[str, Protection]:
    """Of a level on a host that can do everything, to a plugin that may connect, by name."""
    found = compiled(level, host.ideal(), permissions=ALLOWED).protections
    return {("seccomp" if each.name.startswith("seccomp ") else each.name): each for each in found}


def has(*names: str) -> Callable[[dict[str, Protection]], str]:
    """A cell that says yes where all of these are enforced."""

    def cell(given: dict[str, Protection]) -> str:
        return "yes" if all(name in given and given[name].state == ENFORCED for name in names) else "-"

    return cell


def network_cell(given: dict[str, Protection]) -> str:
    own = f"; a network of its own: {given['network'].detail}" if "network" in given else ""
    return f"TCP to allowed hosts{own}" if has("network access")(given) == "yes" else "-"


SHORT: dict[str, Callable[[dict[str, Protection]], str]] = {
    "own process, clean environment, no_new_privs, no capabilities": has("own process", "no_new_privs", "no capabilities"),
    "not root's id (as root: an id that nobody else has)": has("unprivileged id"),
    "Landlock: writes only to the workspace and granted folders": has("writes only to the workspace"),
    "cgroup v2: memory, processes, CPU": has("cgroup leaf", "memory", "processes and threads", "CPU"),
    "seccomp": lambda given: given["seccomp"].name.removeprefix("seccomp "),
    "user, mount, PID, IPC, UTS, cgroup namespaces": has(*NAMESPACES),
    "files": lambda given: given["view of the files"].detail,
    "/tmp, /dev/shm and /proc of its own, disk limit": has(*OWN_PLACES),
    "network": network_cell,
}  # fmt: skip


def levels() -> str:
    """The short table: what each level is, and what it does where an isolation cannot be had."""
    given = {level: protections(level) for level in IsolationLevel}
    rows = [[title, *(cell(given[level]) for level in IsolationLevel)] for title, cell in SHORT.items()]
    poor = replace(host.ideal(), user_namespaces="they are switched off")
    last = ["an isolation that cannot be had", *("refused" if refusal(level, poor) else "substituted, said" for level in given)]
    return table(["", *(level.value for level in IsolationLevel)], [*rows, last])


def refusal(level: IsolationLevel, facts: HostFacts) -> str:
    try:
        compiled(level, facts)
    except SandboxInitializationError as error:
        return error.protection or str(error)
    return ""


def promises() -> str:
    """Every protection, with its mechanism at each level."""
    given = {level: protections(level) for level in IsolationLevel}
    names = dict.fromkeys(name for found in given.values() for name in found if name != "reach of the interpreter")  # by host
    rows = [[name, *(mechanism(given[level].get(name)) for level in IsolationLevel)] for name in names]
    return table(["protection", *(level.value for level in IsolationLevel)], rows)


def mechanism(protection: Protection | None) -> str:
    if protection is None or protection.state != ENFORCED:
        return "-"
    return protection.name.removeprefix("seccomp ") if protection.name.startswith("seccomp ") else protection.mechanism


POORER: dict[str, dict[str, object]] = {
    "no user namespaces": {"user_namespaces": "they are switched off"},
    "no fresh /proc (a container that masks its own)": {"fresh_proc": "it is masked"},
    "no Landlock": {"landlock_abi": 0},
    "no controllers in cgroup v2": {"controllers": ()},
    "no cgroup v2": {"cgroup": None, "cgroup_kind": None, "cgroup_folder": None, "controllers": ()},
}


def poorer() -> str:
    """What each level does on a host that lacks something."""
    rows = []
    for what, facts in POORER.items():
        poor = replace(host.ideal(), **facts)  # type: ignore[arg-type]
        rows.append([what, *(made_of(level, poor) for level in IsolationLevel)])
    return table(["the host has", *(level.value for level in IsolationLevel)], rows)


def made_of(level: IsolationLevel, facts: HostFacts) -> str:
    refused = refusal(level, facts)
    if refused:
        return f"refused: {refused}"
    always = {each.name for each in compiled(level, host.ideal()).protections if each.state != ENFORCED}
    weaker = [each for each in compiled(level, facts).protections if each.state != ENFORCED and each.name not in always]
    return "; ".join(f"{each.name}: {each.mechanism or each.state}" for each in weaker) or "the same"


# -- the command ---------------------------------------------------------------------------------------------------------


def options_table(given: Sequence[tuple[str, str, str, str]]) -> str:
    short = {long: name for name, long in options.SHORT.items()}
    rows = []
    for name, _, placeholder, text in given:
        names = [f"{each} {placeholder}".strip() for each in (short.get(name), name) if each]
        rows.append([", ".join(f"`{each}`" for each in names), text])
    return table(["option", "what it says"], rows)


def commands() -> str:
    """Every command with the first sentence of its help."""
    rows = [[f"`psie {' '.join(words)}`", summary(command)] for words, command in walk((), app.group)]
    return table(["command", "what it does"], rows)


def walk(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from walk((*words, name), each)
    else:
        arguments = [each.make_metavar(click.Context(command)) for each in command.params if isinstance(each, click.Argument)]
        yield (*words, *arguments), command


def summary(command: click.Command) -> str:
    return " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())


# -- errors --------------------------------------------------------------------------------------------------------------


def errors() -> str:
    """The classes with what they are derived from, when they are raised, and their attributes."""
    found = [value for name in sandbox.__all__ if is_error(value := getattr(sandbox, name))]
    rows = [[f"`{each.__name__}`", f"`{each.__mro__[1].__name__}`", sentence(each), attributes(each)] for each in found]
    return table(["error", "is a", "when", "attributes"], rows)


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def sentence(error: type) -> str:
    return " ".join((error.__doc__ or "").split("\n\n")[0].split())


def attributes(error: type) -> str:
    text = inspect.cleandoc(error.__doc__ or "").partition("Attributes:\n")[2]
    return ", ".join(f"`{name}`" for name in re.findall(r"^    (\w+):", text, re.MULTILINE))


def refusals() -> str:
    """What the explanation of a refusal says, and what allows it."""
    rows = [[rule.protection, rule.reason.replace("{}", "..."), allowing(rule)] for rule in RULES.values()]
    return table(["protection", "reason", "what allows it"], rows)


def allowing(rule: Rule) -> str:
    if not rule.settings:
        return f"nothing{': ' + rule.note if rule.note else ''}"
    flag = f"`{rule.flag.replace('{}', '...')}`" if rule.flag else ""
    settings = " and ".join(f"`{table}.{name}`" for table, name, _ in rule.settings)
    return ", or ".join(each for each in (flag, settings) if each) + (f"; {rule.note}" if rule.note else "")


def settings() -> str:
    """Every setting: its default, its variable, and what a file that nobody has accepted can make of it."""
    variables = from_variables()
    rows = []
    for table_name, kind in KINDS.items():
        for each in fields(kind):
            value = getattr(kind(), each.name)
            shown = value.value if isinstance(value, Enum) else list(value) if isinstance(value, tuple) else value
            default = "-" if shown is None else str(shown).lower() if isinstance(shown, bool) else str(shown)
            rule = LESS[effective.RULES[kind][each.name]]
            rows.append([f"[{table_name}]", f"`{each.name}`", default, variables.get((table_name, each.name), ""), rule])
    return table(["table", "setting", "default", "variable", "not accepted"], rows)


def from_variables() -> dict[tuple[str, str], str]:
    return {(name, key): f"`{variable}`" for name, known in config.VARIABLES.items() for variable, (key, _, _) in known.items()}


LESS: dict[Callable[..., object], str] = {
    effective.HOST: "nothing",
    effective.SMALLER: "less",
    effective.BOTH: "no",
    effective.EITHER: "yes",
    effective.STRICTER: "stricter",
    effective.UNION: "more",
    effective.COMMON: "fewer",
    effective.HOSTS: "fewer",
    effective.MODULES: "fewer",
}


# -- speed ---------------------------------------------------------------------------------------------------------------

SPEED = ROOT / "docs" / "speed.json"  # of `make bench ARGS=--publish`
PEERS = {  # by the first word of their names
    "bubblewrap": "bubblewrap + python3",
    "nsjail": "nsjail + python3",
    "crun": "crun + python3",
    "sandlock": "sandlock",
    "ProcessPoolExecutor(2)": "a warm process pool, no isolation",
    "python3": "python3, no isolation",
}
SHOWN = ("call", "session", "throughput", "start", "run", "numpy", "memory")


def measured() -> dict[str, dict[str, Any]]:
    """The measures of the run that the documentation shows, by name."""
    return {each["name"]: each for each in json.loads(SPEED.read_text())["measures"]}


def speed() -> str:
    """psie beside each peer: medians, and how many times as good psie is."""
    found = [each for name, each in measured().items() if name in SHOWN]
    words = {contender.partition(" ")[0] for each in found for contender in each["medians"]}
    peers = [word for word in PEERS if word in words]
    rows = []
    for each in sorted(found, key=lambda each: SHOWN.index(each["name"])):
        medians, unit = each["medians"], each["unit"]
        ours = each["ours"].removeprefix("psie, ").removeprefix("psie run, ")
        value = medians[each["ours"]]
        shown = []
        for word in peers:
            other = next((median for name, median in medians.items() if median and name.partition(" ")[0] == word), None)
            times = (value / other if unit == "a second" else other / value) if other else 0
            shown.append(f"{results.number(other)} ({results.number(times)})" if other else "-")
        rows.append([f"{each['title']} ({unit}); {ours}", results.number(value), *shown])
    return table(["", "psie", *(PEERS[word] for word in peers)], rows)


def aims() -> str:
    """What is wanted of the measures, and whether it is so."""
    rows = []
    for each in measured().values():
        for wanted in each["wanted"]:
            value = "-" if wanted["value"] is None else results.number(wanted["value"])
            asked = f"{wanted['relation']} {results.number(wanted['bound'])} {wanted['unit']}"
            floor = results.number(wanted["floor"]) if wanted.get("floor") is not None else ""  # not in results of old
            met = {"met": "yes", "MISSED": "no"}.get(wanted["verdict"], "not measured")
            rows.append([wanted["what"], asked, value, met, floor])
    return table(["what", "wanted", "measured", "met", "the floor"], rows)


def measured_where() -> str:
    """Where and when it was measured."""
    about = json.loads(SPEED.read_text())["about"]
    machine = f"Linux {about['kernel']} ({about['machine']}), Python {about['python']}, {about['cpus']} CPUs"
    return (
        f"Measured on {about['date'][:10]} by `make bench ARGS=--publish`, as {about['who']}: psie {about['psie']}, {machine}. "
        "Medians of one run, in which all take turns."
    )


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "levels": levels,
    "promises": promises,
    "poorer": poorer,
    "commands": commands,
    "run-options": lambda: options_table(options.RUN),
    "call-options": lambda: options_table([each for each in options.CALL if each not in options.SHARED]),
    "errors": errors,
    "refusals": refusals,
    "speed": lambda: f"{speed()}\n\n{measured_where()}",
    "aims": aims,
}


def filled(text: str) -> str:
    """The text of a page, with its tables as they are now.

    Raises KeyError for a table that nobody makes, ValueError for a mark without its end.
    """
    if len(MARK.findall(text)) != text.count("<!-- made by tools/docs_tables.py"):
        raise ValueError("a table is not closed by its mark: <!-- end: NAME -->")
    return MARK.sub(lambda mark: f"{mark[1]}\n{TABLES[mark['name']]()}\n\n{mark[3]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(arguments: list[str]) -> int:
    """With --check nothing is written; then, and else for a page that was changed, its name is printed."""
    stale = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = filled(text)
        if made != text:
            stale += 1
            print(page.relative_to(ROOT))
            if "--check" not in arguments:
                page.write_text(made, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
