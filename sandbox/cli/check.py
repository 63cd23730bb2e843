"""`psie check FILE`: what each level would refuse a plugin, by a guess from its text, or with --run by runs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, replace

from sandbox import host, recipe, static
from sandbox import learn as learning
from sandbox.cli import run as run_command
from sandbox.cli import settings, trial
from sandbox.cli.inputs import UsageError
from sandbox.cli.remembered import Remembered
from sandbox.cli.session import FAILED, guarded, say
from sandbox.cli.table import print_table
from sandbox.config import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2
from sandbox.errors import SandboxException
from sandbox.recipe import under
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.cli.trial import Result
    from sandbox.recipe_data import Recipe

OK, REFUSED, HIDDEN, ABSENT, UNKNOWN = "ok", "refused", "hidden", "absent", "not run"
UNSEEN = "-"  # in a run: it was not refused there, or never came that far
SETTINGS = {  # what allows it, by the kind of finding
    static.PROCESS: "--allow-subprocess, or allow_subprocess_execution and max_subprocess_count",
    static.NETWORK: "--allow-host HOST, or allow_network_access and allowed_hosts",
    static.LISTEN: "no setting allows it",
    static.NEVER: "no setting allows it",
    static.READ: "--ro PATH, or readable_paths",
    static.WRITE: "--rw FOLDER, or allowed_directories",
    static.LOCAL: "its working directory is a workspace that is empty at first: --ro PATH, and its whole path or --chdir DIR",
    static.VARIABLE: "--env NAME",
    static.MODULE: "allowed_modules or blocked_modules of the settings",
    static.SYNTAX: "mend it",
}


@dataclass
class Row:
    """One thing that at least one level refuses."""

    what: str
    place: str
    setting: str
    levels: dict[str, str] = field(default_factory=dict)


@dataclass
class Settings:
    config: IsolationConfig
    limits: PluginLimitsV2
    permissions: PluginPermissionsV2
    facts: host.HostFacts


def check(given: dict[str, Any]) -> int:
    """0: nothing is refused at the level that is asked about; 1: something is; 125."""
    return guarded(lambda: _check(given))


def _check(given: dict[str, Any]) -> int:
    path = run_command.plugin_path(given["file"])
    source = run_command.source_of(path)
    if given["args"] and not given["run"]:
        raise UsageError("arguments are for a run: give --run before them, or leave them out")
    if given["env"] and not given["run"]:
        raise UsageError("--env: a variable is for a run: give --run too, or leave it out")
    if given["run"] and given["config"] is not None and os.path.exists(given["config"]) and not os.path.isfile(given["config"]):
        raise UsageError(f"--config {given['config']}: it is read for each run: give a regular file")
    config, limits, permissions = settings.settings({"level": given["level"], "config": given["config"], "file": path})
    own = Settings(config, limits, permissions, host.facts())
    level = config.level.value
    if given["run"]:
        rows, ends = by_running(given, path, source, own)
    else:
        rows, ends = by_reading(path, source, own), {}
    works = {each.value: is_good(each.value, rows, ends) for each in IsolationLevel}
    if given["as_json"]:
        told = {"file": path, "method": "run" if given["run"] else "guess", "level": level, "works": works, "ended": ends}
        print(json.dumps({**told, "refused": [vars(row) for row in rows]}, indent=2))
    else:
        show(rows, ends, is_run=given["run"], name=os.path.basename(path), level=level)
    return 0 if works[level] else 1


def is_good(level: str, rows: list[Row], ends: dict[str, str]) -> bool:
    return all(row.levels.get(level, OK) == OK for row in rows) and ends.get(level, "status 0") == "status 0"


def show(rows: list[Row], ends: dict[str, str], *, is_run: bool, name: str, level: str) -> None:
    names = [each.value for each in IsolationLevel]
    if rows or ends:
        nothing = UNSEEN if is_run else OK
        table = [[*(row.levels.get(each, nothing) for each in names), row.what, row.place, row.setting] for row in rows]
        if ends:
            table.append([*(ends.get(each, UNKNOWN) for each in names), "how it ended", "", ""])
        print_table([*names, "what it does", "where", "what allows it"], table)
    sys.stdout.flush()
    if is_run:
        say("seen in one run at each level, of which nothing was kept; - may also be that it ended before it came that far")
    else:
        say(f"a guess from the text of {name}, of which nothing was run: --run tries it out")
    if not any(row.levels.get(level, OK) != OK for row in rows) and ends.get(level, "status 0") == "status 0":
        say(f"nothing that level {level} would refuse")


# -- from its text -----------------------------------------------------------------------------------------------------


def by_reading(path: str, source: bytes, own: Settings) -> list[Row]:
    files = run_command.siblings(path, source)
    sources = {**static.sources(files), files[0]: source}
    recipes = {each.value: compiled(own, each) for each in IsolationLevel}
    rows: list[Row] = []
    for finding in static.findings(sources):
        levels = {name: verdict(finding, own.permissions, made) for name, made in recipes.items()}
        if any(each != OK for each in levels.values()):
            what = f"{finding.what} ({finding.name})" if finding.name and finding.name not in finding.what else finding.what
            place = f"{os.path.basename(finding.file)}, line {finding.line}"
            setting = SETTINGS[finding.kind]
            if finding.kind == static.VARIABLE:
                setting = f"--env {finding.value}"
            rows.append(Row(escape_text(what, keep=""), escape_text(place, keep=""), escape_text(setting, keep=""), levels))
    return rows


def compiled(own: Settings, level: IsolationLevel) -> Recipe | None:
    """None where the settings cannot be had at this level."""
    try:
        return recipe.compile(replace(own.config, level=level), own.limits, own.permissions, own.facts, strict=False)
    except (SandboxException, ValueError):
        return None


def verdict(finding: static.Finding, permissions: PluginPermissionsV2, made: Recipe | None) -> str:
    kind = finding.kind
    if kind == static.PROCESS:
        return OK if permissions.allow_subprocess_execution else REFUSED
    if kind == static.NETWORK:
        return OK if permissions.allow_network_access and permissions.allowed_hosts else REFUSED
    if kind == static.MODULE:
        return OK if may_import(finding.value, permissions) else REFUSED
    if kind in (static.VARIABLE, static.LOCAL):
        return ABSENT
    if kind == static.READ:
        return OK if made is not None and is_shown(finding.value, made) else HIDDEN
    if kind == static.WRITE:
        return OK if made is not None and is_writable(finding.value, made) else REFUSED
    return REFUSED


def may_import(module: str, permissions: PluginPermissionsV2) -> bool:
    def listed(names: list[str]) -> bool:
        return any(f"{module}.".startswith(f"{name}.") for name in names)

    return not listed(permissions.blocked_modules) and (not permissions.allowed_modules or listed(permissions.allowed_modules))


def is_shown(path: str, made: Recipe) -> bool:
    """Whether a sandbox of this recipe shows the host's file of this name. Whether a plugin may read it is not asked."""
    if path.startswith("~") or not os.path.lexists(path):
        return False
    path = os.path.normpath(path)
    if "mnt" not in made.namespaces:
        return True
    if under(path, [target for _, target, _ in made.sandbox_mounts] + [folder["path"] for folder in made.granted]):
        return True
    lines = made.template["lines"] if made.template is not None else []
    for line in lines:
        if line[0] == "host_root" and not under(path, [f"/{name}" for name in line[1]] + list(recipe.hidden())):
            return True
        if line[0] in ("bind", "bind_optional") and under(path, [line[2]]):
            return True
        if line[0] == "file" and path == line[1]:
            return True
        if line[0] == "symlink" and under(path, [line[2]]):
            return is_shown(os.path.realpath(path), made) if os.path.realpath(path) != path else True
    return False


def is_writable(path: str, made: Recipe) -> bool:
    """Its own /tmp counts, though what it writes there is gone with it; folders that the host's may have are not in it."""
    path, granted = os.path.normpath(path), [folder["path"] for folder in made.granted]
    if made.landlock is None:
        return False
    if under(path, recipe.SCRATCH) and not under(path, granted) and os.path.dirname(path) not in recipe.SCRATCH:
        return False
    return under(path, [place for place, access in made.landlock["rules"] if access.startswith("write")])


# -- by running it -----------------------------------------------------------------------------------------------------


def by_running(given: dict[str, Any], path: str, source: bytes, own: Settings) -> tuple[list[Row], dict[str, str]]:
    """What it was refused at each level, and how it ended there."""
    files = run_command.siblings(path, source)
    plain = {"config": given["config"], "file": path}
    Remembered(plain, path, path, source, files[1:], say).refuse_quarantined()
    runner = trial.Runner(given["file"], given["args"], given["env"], trial.standard_input(), source)
    toml = None
    if given["config"] is not None:
        with open(given["config"], encoding="utf-8") as file:
            toml = file.read()
    rows: dict[tuple[str, str], Row] = {}
    ends: dict[str, str] = {}
    for level in IsolationLevel:
        if level is IsolationLevel.MINIMAL and own.permissions.allowed_directories:
            ends[level.value] = f"{UNKNOWN}: it writes to granted folders directly"
            continue
        result = runner.run(toml, level.value)
        ends[level.value] = ended(result)
        for what, place, setting in refused_in(result):
            row = rows.setdefault((what, setting), Row(what, place, setting))
            row.place = row.place or place
            row.levels[level.value] = HIDDEN if setting == SETTINGS[static.READ] else REFUSED
    return list(rows.values()), ends


def ended(result: Result) -> str:
    if result.failed:
        return f"{UNKNOWN}: {escape_text(result.failed, keep='')}"
    if result.status == FAILED:
        return f"status {FAILED}: {escape_text(result.reason, keep='')}"
    return f"status {result.status}"


def refused_in(result: Result) -> list[tuple[str, str, str]]:
    """(what, where, what allows it) of each kind of refusal."""
    found: list[tuple[str, str, str]] = []
    wishes = learning.seen_in(result, os.getcwd()).wishes
    written = {wish.value for wish in wishes if wish.kind == learning.WRITE and wish.word in learning.WORDS.values()}
    told = [
        each["explanation"] for each in result.violations if each["explanation"] and each["details"].get("path") not in written
    ]
    if result.explanation is not None and result.explanation not in told:
        told.append(result.explanation)
    for explanation in told:
        if explanation["refused"]:
            mend = explanation["flag"] or explanation["setting"] or "no setting allows it"
            found.append((explanation["reason"], place_of(explanation["file"], explanation["line"]), mend))
    for wish in wishes:
        if wish.kind == learning.READ and os.path.lexists(wish.value):
            what = f"reads {learning.short(wish.value)} ({wish.word})"
            found.append((what, place_of(escape_text(wish.file, keep=""), wish.line), SETTINGS[static.READ]))
        elif wish.kind == learning.WRITE and os.path.isdir(os.path.dirname(wish.value)):
            what = f"writes {learning.short(wish.value)} ({wish.word})"
            found.append((what, place_of(escape_text(wish.file, keep=""), wish.line), SETTINGS[static.WRITE]))
    return found


def place_of(file: str | None, line: int | None) -> str:
    if not file:
        return ""
    return os.path.basename(file) + (f", line {line}" if line is not None else "")
