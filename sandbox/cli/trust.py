"""`psie trust`: a person accepts the settings that lie beside a plugin, as they are now."""

from __future__ import annotations

import os

from sandbox import trusted
from sandbox.cli import beside
from sandbox.cli.inputs import UsageError
from sandbox.cli.session import complain, say
from sandbox.errors import SandboxException
from sandbox.text import escape_text


def trust(files: tuple[str, ...], as_list: bool, forget: bool) -> int:
    """0; one sentence and 125 for what cannot be done: then nothing is."""
    try:
        if as_list:
            if files or forget:
                raise UsageError("--list takes no file, and no --forget")
            return listed()
        if not files:
            raise UsageError(f"give the psie.toml or pyproject.toml that is to count{' no more' if forget else ', or --list'}")
        if forget:
            for file in files:
                known = trusted.forget(os.path.abspath(file))
                say(f"{file} {'counts no more' if known else 'was not accepted: nothing to forget'}")
            return 0
        found = [read(file) for file in files]
        asked = [wishes(each) for each in found]
        for each, wanted in zip(found, asked, strict=True):
            trusted.accept(each.path, each.content)
            say(f"{each.path} counts from now on, until it is changed; it sets {wanted}")
        return 0
    except (SandboxException, ValueError) as error:
        return complain(error)


def read(file: str) -> beside.Found:
    """Raises UsageError for what is no file of settings that would be looked for."""
    path = os.path.abspath(file)
    if os.path.basename(path) not in (beside.OWN, beside.PROJECT):
        raise UsageError(f"{file}: only {beside.OWN} and {beside.PROJECT} count beside a plugin: name others by --config")
    content = beside.read(path)
    if content is None:
        is_there = os.path.lexists(path)
        raise UsageError(f"{file}: {'this is no regular file' if is_there else 'there is no such file'}: check the path")
    found = beside.Found(path, content)
    if not found.says_something():
        raise UsageError(f"{file} has no table [tool.psie]: there is nothing to accept")
    return found


def wishes(found: beside.Found) -> str:
    """What it sets, in a line. Raises ConfigError."""
    lines = [
        f"{key} = {getattr(value, 'value', value)!r}" for values in found.tables().values() for key, value in values.items()
    ]
    return escape_text(", ".join(lines), keep="") or "nothing"


def listed() -> int:
    every = trusted.accepted()
    if not every:
        print("no file of settings was accepted")
        return 0
    from sandbox.cli.table import print_table

    print_table(["state", "file"], [[state(each), each.path] for each in every])
    return 0


def state(each: trusted.Accepted) -> str:
    try:
        content = beside.read(each.path)
    except ValueError:
        content = None
    if content is None:
        return "gone"
    return "accepted" if trusted.is_accepted(each.path, content) else "changed since"
