"""`psie doctor`: what this host can do, level by level, and what mends the rest; with --fix it mends what is safe to mend."""

from __future__ import annotations

import json
import os
import select
import subprocess
from typing import Any

from sandbox import doctor
from sandbox.causes import Mend
from sandbox.cli import endings
from sandbox.cli.session import FAILED, complain, say
from sandbox.cli.table import print_table
from sandbox.errors import SandboxException
from sandbox.text import escape_text

PATIENCE = 300.0  # seconds that an answer is waited for
COMMAND_SECONDS = 600.0  # that one command of a mend may take: a package has to be fetched


@endings.by_exception()
def run(as_json: bool, fix: bool, yes: bool) -> int:
    """0 if all levels are to be had as promised, 1 if something is missing, 125 for a wrong command line."""
    if yes and not fix:
        say("--yes answers what --fix asks: give --fix too, or leave it out")
        return FAILED
    if fix and as_json:
        say("--fix talks to a person and --json to a program: leave one of them out")
        return FAILED
    if fix and not yes and not has_terminal():
        say("--fix asks before each change, and there is no terminal: run it on one, or add --yes")
        return FAILED
    try:
        found, other = doctor.report()
    except (SandboxException, OSError) as error:
        return complain(error)
    if as_json:
        print(json.dumps(doctor.to_dict(found, other), indent=2))
        return 0 if found.healthy else 1
    show(found, other)
    if fix:
        try:
            found = mend(found, ask=not yes)
        except (SandboxException, OSError) as error:
            return complain(error)
    return 0 if found.healthy else 1


def has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


# -- what is shown -----------------------------------------------------------------------------------------------------------


def show(found: doctor.Diagnosis, other: doctor.Other | None) -> None:
    data = found.to_dict()
    show_one(data, f"as {found.who}, Linux {found.kernel}", as_root=found.uid == 0)
    if found.would_gain:
        gain = "; ".join(found.would_gain)
        put(f"Root would also have enforced, unless something confines it (not tried: only root can): {gain}")
        print()
    if other is not None:
        told = other.to_dict()
        if other.not_tried is not None:
            put(f"as user {other.user} ({other.why}), not tried: {other.not_tried.text}")
            for command in told["mends"]:
                put(f"      {command}")
            print()
        else:
            show_one(told, f"as user {other.user} ({other.why}), really tried", as_root=True, known=data)
    say(found.summary())
    count = len(fixes(found))
    if count:
        say(f"psie doctor --fix shows and, after a yes, applies what is safe: {count} of these")


def show_one(data: dict[str, Any], title: str, *, as_root: bool, known: dict[str, Any] | None = None) -> None:
    """One user's levels and checks. What `known` has told already, commands and all, is only named."""
    put(title)
    rows = [[each["state"], each["level"], "yes" if each["opened"] else "no", what_is(each)] for each in data["levels"]]
    print_table(["state", "level", "opened", "what is not as promised"], rows)
    print()
    print_table(
        ["state", "check", "what it is for"], [[each["state"], each["name"], each["purpose"]] for each in data["checks"]]
    )
    print()
    told = {each["cause"] for each in known["checks"]} if known is not None else set()
    for each in data["checks"]:
        if not each["cause"]:
            continue
        hit = ", ".join(f"{level} {state}" for level, state in each["levels"].items() if state != doctor.OK)
        put(f"{each['name']}: {each['cause']}{f' [{hit}]' if hit else ''}")
        if each["cause"] in told:
            put("  see above")
            continue
        for mend in each["mends"]:
            put(f"  {mend['what']}{':' if mend['safe'] else '; ' + mend['against'] + ', so --fix leaves it to you:'}")
            for command in mend["commands"]:
                put(f"      {command}")
    print()


def what_is(level: dict[str, Any]) -> str:
    weak = ", ".join(f"{each['name']} {each['state']}" for each in level["lacking"])
    return "; ".join(part for part in (level["reason"], weak) if part)


def put(text: str) -> None:
    print(escape_text(text, keep=""))


# -- mending -----------------------------------------------------------------------------------------------------------------


def fixes(found: doctor.Diagnosis) -> list[Mend]:
    """What is safe, once each. Of this user alone: what another one's process says is shown, but never run by root."""
    return list(dict.fromkeys(found.safe_mends()))


def mend(found: doctor.Diagnosis, *, ask: bool) -> doctor.Diagnosis:
    """Apply what is agreed to, look again, and say what has changed."""
    chosen = fixes(found)
    if not chosen:
        say("nothing here is safe to be applied: what is shown above is for you to decide")
        return found
    as_root = found.uid == 0
    done = [apply(each, as_root=as_root) for each in chosen if agreed(each, as_root=as_root, ask=ask)]
    if not done:
        say("nothing was changed")
        return found
    again = doctor.diagnose()
    changes = changed(found, again)
    for line in changes:
        say(line)
    if not changes:
        say("looked again: nothing has changed by that")
    say(again.summary())
    return again


def agreed(one: Mend, *, as_root: bool, ask: bool) -> bool:
    """Show it, and ask on the terminal. No answer is a no."""
    put(f"This {one.what}:")
    for command in one.shown(as_root=as_root):
        put(f"      {command}")
    if not ask:
        return True
    with open("/dev/tty", "r+b", buffering=0) as terminal:
        terminal.write(b"psie: apply it? [y/N] ")
        ready, _, _ = select.select([terminal], [], [], PATIENCE)
        return bool(ready) and terminal.readline().strip().lower() in (b"y", b"yes")


def apply(one: Mend, *, as_root: bool) -> bool:
    """Run its commands in turn, up to the first that fails; says which did."""
    for command in one.commands:
        assert not isinstance(command, str)  # such a mend is never safe
        argv = [*(["sudo"] if command.root and not as_root else []), *command.argv]
        lines = "".join(line + "\n" for line in command.lines)
        try:
            done = subprocess.run(
                argv,
                input=lines,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
            status, output = done.returncode, done.stdout
        except (OSError, subprocess.SubprocessError) as error:
            status, output = 1, str(error)
        if status:
            say(f"{command.shell(as_root=as_root)}: failed: {output.strip()[-500:] or f'status {status}'}")
            return False
        say(f"done: {command.shell(as_root=as_root)}")
    return True


def changed(before: doctor.Diagnosis, after: doctor.Diagnosis) -> list[str]:
    levels = [
        f"level {new.level}: {old.state} before, {new.state} now"
        for old, new in zip(before.levels, after.levels, strict=True)
        if (old.state, old.opened) != (new.state, new.opened)
    ]
    causes = {each.name: each.cause.text for each in before.findings if each.cause is not None}
    now = {each.name: each.cause.text for each in after.findings if each.cause is not None}
    gone = [f"{name}: mended" for name in causes if name not in now]
    return [*levels, *gone, *(f"{name}: {text}" for name, text in now.items() if causes.get(name) != text)]
