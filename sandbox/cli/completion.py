"""What a shell completes: `psie completion SHELL` prints the script, which asks psie at each tab (click's shell completion).

At a tab nothing is run and nothing is changed: names of levels, of files, of plugins in a folder by their file names, and of
quarantines as they stand in psie's file.
"""

from __future__ import annotations

import os
import re

import click
from click.shell_completion import CompletionItem, get_completion_class

from sandbox.cli import options

VARIABLE = "_PSIE_COMPLETE"
PLAIN = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_.@:/+-]*")  # what no shell takes for anything but a word


def script(shell: str) -> int:
    from sandbox.cli.app import group

    kind = get_completion_class(shell)
    assert kind is not None  # one of those that the command knows
    print(kind(group, {}, "psie", VARIABLE).source())
    return 0


def prepare(group: click.Group, name: str = "") -> None:
    """Give each parameter of the commands what a shell completes it with, by how the help shows it."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            prepare(command, str(command.name))
        for parameter in command.params:
            shown = (parameter.metavar or parameter.name or "").upper().strip("[].")
            kind = f"{name} ID" if shown == "ID" else shown
            if kind in KINDS:
                vars(parameter)["shell_complete"] = KINDS[kind]


def levels(ctx: click.Context, begun: str) -> list[CompletionItem]:
    return [CompletionItem(level) for level in options.LEVELS if level.startswith(begun)]


def files(ctx: click.Context, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="file")]


def folders(ctx: click.Context, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="dir")]


def plugins(ctx: click.Context, begun: str) -> list[CompletionItem]:
    """Of the folder that stands before: its entries that may be plugins, which are not looked into."""
    folder = str(ctx.params.get("folder") or "")
    try:
        entries = sorted(os.listdir(folder)) if folder else []
    except OSError:
        entries = []
    is_folder = {entry: os.path.isdir(os.path.join(folder, entry)) for entry in entries}
    return words([entry.removesuffix(".py") for entry in entries if entry.endswith(".py") or is_folder[entry]], begun)


def quarantined(ctx: click.Context, begun: str) -> list[CompletionItem]:
    from sandbox.errors import ResourceError
    from sandbox.recovery import in_force, private

    try:
        found = in_force.read(private.default_folder()) or []
    except (ResourceError, OSError):
        found = []
    return words(sorted({str(each["plugin_id"]) for each in found}), begun)


def words(names: list[str], begun: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(begun) and PLAIN.fullmatch(name)]


KINDS = {
    "LEVEL": levels,
    **dict.fromkeys(("FILE", "FILE.TOML", "PATH", "OUT.JSON", "OUT.HTML", "FILE:FUNCTION", "TARGET"), files),
    **dict.fromkeys(("DIR", "FOLDER"), folders),
    "plugins ID": plugins,
    "quarantine ID": quarantined,
}
