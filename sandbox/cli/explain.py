"""`psie explain` and `psie levels`: what a level means, here and at its best. Both are generated from the recipes."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import Enum
from typing import Any

from sandbox import host, recipe
from sandbox.cli import run as run_command
from sandbox.cli import settings
from sandbox.cli.session import complain, say
from sandbox.cli.table import print_table
from sandbox.config import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2
from sandbox.errors import SandboxException
from sandbox.recipe_data import ENFORCED
from sandbox.text import escape_text


def explain(level: str | None, config: str | None, as_json: bool, sources: bool, file: str | None) -> int:
    """Print the recipe of one level or of all; 0 also where a level cannot be had: the text says so."""
    given = {"level": level, "config": config, "file": file}
    if sources:
        return tell_sources(given, as_json)
    try:
        if file is not None:
            given["file"] = run_command.plugin_path(file)
        base, limits, permissions = settings.settings(given)
        is_one = level is not None or config is not None or file is not None
        levels = [base.level] if is_one else list(IsolationLevel)
        facts = host.facts()
        recipes = [recipe.compile(replace(base, level=each), limits, permissions, facts, strict=False) for each in levels]
        refusals = [refusal(replace(base, level=each), limits, permissions, facts) for each in levels]
    except (run_command.Failed, SandboxException, ValueError, TypeError, OSError) as error:
        return complain(error)
    if as_json:
        data = [{**each.to_dict(), "refused": refused} for each, refused in zip(recipes, refusals, strict=True)]
        print(json.dumps(data[0] if is_one else data, indent=2))
        return 0
    who = "root" if facts.root else f"user {facts.uid}"
    for each, refused in zip(recipes, refusals, strict=True):
        print(f"level {each.level} as {who}, Linux {facts.kernel}")
        rows = [[p.state, p.name, p.mechanism, p.detail] for p in each.protections]
        print_table(["state", "protection", "mechanism", "detail"], rows)
        for protection in each.weakened:
            if protection.mend:
                print(f"  {protection.name}: to have it enforced, {escape_text(protection.mend, keep='')}")
        if refused:
            print(f"  this level is refused here: {refused}")
        print()
    return 0


def tell_sources(given: dict[str, Any], as_json: bool) -> int:
    """Every setting that a run of `file` would have with these options, and where it comes from."""
    try:
        if given["file"] is not None:
            given["file"] = run_command.plugin_path(given["file"])
        gathered = settings.gathered(given)
    except (run_command.Failed, SandboxException, ValueError, TypeError, OSError) as error:
        return complain(error)
    told = [
        {"table": table, "setting": key, "value": plain(value), "source": gathered.origins.get((table, key), settings.DEFAULT)}
        for table, each in gathered.objects().items()
        for key, value in vars(each).items()
    ]
    if as_json:
        print(json.dumps({"settings": told, "notes": gathered.notes}, indent=2))
        return 0
    for table in gathered.objects():
        rows = [[each["setting"], shown(each["value"]), each["source"]] for each in told if each["table"] == table]
        print_table([table, "value", "from"], rows)
        print()
    for note in gathered.notes:
        say(note)
    return 0


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else list(value) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    return "-" if value is None else json.dumps(value) if isinstance(value, (list, bool)) else str(value)


def refusal(config: IsolationConfig, limits: PluginLimitsV2, permissions: PluginPermissionsV2, facts: host.HostFacts) -> str:
    try:
        recipe.compile(config, limits, permissions, facts)
    except SandboxException as error:
        return str(error)
    return ""


def levels() -> int:
    """The levels table: what each level promises on a host that can do everything."""
    compiled = [
        recipe.compile(IsolationConfig(level=level), PluginLimitsV2(), PluginPermissionsV2(), host.ideal())
        for level in IsolationLevel
    ]
    names: dict[str, str] = {}
    table: list[dict[str, str]] = []
    for each in compiled:
        column: dict[str, str] = {}
        for protection in each.protections:
            key = "seccomp" if protection.name.startswith("seccomp ") else protection.name
            names.setdefault(key, key)
            shown = protection.detail if key == "view of the files" else protection.mechanism
            column[key] = (
                protection.name.removeprefix("seccomp ") if key == "seccomp" else shown if protection.state == ENFORCED else "-"
            )
        table.append(column)
    wanted = [name for name in names if name not in ("file operations", "network requests", "reach of the interpreter")]
    rows = [[name, *(column.get(name, "-") for column in table)] for name in wanted]
    print_table(["protection", *(each.level for each in compiled)], rows)
    return 0
