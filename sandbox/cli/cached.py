"""Recipes of earlier runs: compiling one costs 35 ms of imports, which a run with the same options need not pay again.

An entry is a recipe with its wire form and the limits that it is for, kept under a key of everything that compile() looks at:
the options and variables, the host and its namespaces, and psie's own files; it counts while the folders of
installed packages are what they were. When a set-up fails, all entries are
dropped.
"""

from __future__ import annotations

import marshal
import os

from sandbox import state
from sandbox.cli import beside, late
from sandbox.recipe_data import Recipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

# Options that compile() never sees.
NOT_SETTINGS = (
    "file",
    "target",
    "args",
    "chdir",
    "env",
    "result_file",
    "report",
    "quiet",
    "raw",
    "summary",
    "arg",
    "kwarg",
    "ro",
    "dry_run",
    "ask",
)
ENTRIES = 256  # kept at once
SOURCES = (
    *("recipe.py", "recipe_data.py", "config.py", "network.py", "host.py"),
    *("engine/client.py", "engine/zygote.py", "seccomp/filter.py"),
)


def recipe_for(
    given: dict[str, Any], read_only: Sequence[str]
) -> tuple[Recipe, dict[str, Any], dict[str, Any], dict[str, int], list[str]]:
    """(recipe, wire form, limits by name, numbers of system calls, notes) for these options; see `settings.Gathered` for notes.
    Raises what compiling it raises."""
    found = beside.find(given)
    files = given.get("config") is not None or bool(found)
    key = repr(_key(given, read_only)).encode()
    cache = state.Cache("recipes")
    name = state.checksum(key).hex()
    stored = cache.read(name)
    if stored is not None and not files:  # they may block folders, whose links have to be followed anew
        try:
            kept_key, packages, data, wire, asked, calls = marshal.loads(stored)
            if kept_key == key and packages == stamps([path for path, *_ in packages]):
                return Recipe.from_dict(data), wire, asked, calls, []
        except (ValueError, TypeError, EOFError, KeyError):
            cache.remove(name)
    late.make_up()
    packages = stamps(late.places())
    from sandbox import host, recipe
    from sandbox.cli import settings
    from sandbox.engine import client

    gathered = settings.Gathered(given, found)
    limits = gathered.limits
    try:
        compiled = recipe.compile(gathered.config, limits, gathered.permissions, host.facts(), read_only=read_only)
    except ValueError as error:
        raise gathered.located(error) from None
    wire = client.wire_form(compiled)
    asked, calls = dict(vars(limits)), system_calls()
    if not files:
        cache.trim(ENTRIES)
        cache.write(name, marshal.dumps((key, packages, compiled.to_dict(), wire, asked, calls)))
    return compiled, wire, asked, calls, gathered.notes


def system_calls() -> dict[str, int]:
    """The numbers of those that a zygote looks up; none where it will have to say why that cannot be done."""
    try:
        from sandbox.engine import zygote
        from sandbox.ns import syscalls

        return syscalls.resolved(*zygote.CALLS)
    except (OSError, ImportError):
        return {}


def _key(given: dict[str, Any], read_only: Sequence[str]) -> list[object]:
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    options = sorted((name, value) for name, value in given.items() if name not in NOT_SETTINGS)
    chosen = {name for name in os.environ if name.startswith("SANDBOX_")} | {*late.VARIABLES}
    variables = [(name, os.environ.get(name)) for name in sorted(chosen)]
    files = [os.path.join(own, source) for source in SOURCES]
    files += [os.path.join(own, "seccomp", profile + ".toml") for profile in ("denylist", "allowlist", "tight")]
    resolver = os.path.realpath("/etc/resolv.conf") if given.get("allow_host") else ""  # there is one in the sandbox, too
    return [state.host_key(), options, variables, stamps(files), list(read_only), resolver]


def stamps(paths: Sequence[str]) -> list[tuple[object, ...]]:
    """What tells that a file or a folder is what it was: (path, ...) for each."""
    told: list[tuple[object, ...]] = []
    for path in paths:
        try:
            found = os.stat(path)
            told.append((path, found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError:
            told.append((path, None))
    return told
