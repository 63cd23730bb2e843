"""docs/syscalls.md from the profiles' data files: what each does with every system call, and why.

    python tools/syscall_table.py >docs/syscalls.md

The reasons are the comments in the data files, so that there is one place to change. tests/test_seccomp.py holds that the
file is what this prints.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from sandbox.seccomp import filter as profiles  # noqa: E402

WORDS = {"refuse": "EPERM", "notify": "EPERM, recorded", "absent": "ENOSYS"}
INTRODUCTION = """# System calls

<!-- Made by tools/syscall_table.py from sandbox/seccomp/*.toml: change those. -->

What the three profiles do with each system call. Levels minimal and standard have the denylist, strict the allowlist, maximum
the tight one; `security_level` can ask for a stricter one. A call that stands nowhere here answers ENOSYS at every level: a
newer kernel's calls are refused until somebody has decided on them. *recorded* calls are violations. A call of a foreign ABI
(int 0x80, x32) kills the process. *by argument*: it depends on what is asked for, see [below](#by-argument).
"""


@dataclass(frozen=True)
class Group:
    """A group of names in a table of a data file, and the comment above it."""

    table: str
    name: str
    why: str


def groups(profile: str) -> dict[tuple[str, str], Group]:
    """By table and name."""
    found, table, comment = {}, "", []
    with open(profiles._data_path(profile), encoding="utf-8") as file:
        for line in file:
            if line.startswith("#"):
                comment.append(line.lstrip("# ").rstrip())
                continue
            head, group = re.match(r"\[(\w+)\]", line), re.match(r"(\w+) = \[", line)
            table = head.group(1) if head else table
            if group and table != "constants":
                found[table, group.group(1)] = Group(table, group.group(1), " ".join(comment))
            if not head:
                comment = []
    return found


def rules(profile: str) -> Iterator[tuple[list[str], str]]:
    """(system calls, why) of each rule that has a comment, which holds for those that follow it as well."""
    comment: list[str] = []
    with open(profiles._data_path(profile), encoding="utf-8") as file:
        text = file.read()
    for block in re.split(r"\n\n+", text):
        lines = block.splitlines()
        if any(line.startswith("[[rule]]") for line in lines):
            comment = [line.lstrip("# ") for line in lines if line.startswith("# ")] or comment
            names = re.search(r"syscalls = \[(.*?)\]", block, re.DOTALL)
            assert names is not None
            yield re.findall(r'"(\w+)"', names.group(1)), " ".join(comment)
        elif lines and all(line.startswith("#") for line in lines):
            comment = [line.lstrip("# ") for line in lines if not line.endswith("---")]


def decision(profile: profiles._Profile, name: str) -> str:
    """In words."""
    for kind, action in profiles._LISTS.items():
        if profile.actions.get(name) == action:
            return WORDS[kind]
    if name not in profile.allow:
        return "ENOSYS"
    return "by argument" if any(name in rule["syscalls"] for rule in profile.rules) else "yes"


def lines() -> Iterator[str]:
    yield INTRODUCTION
    read = {name: profiles._Profile(name) for name in profiles.PROFILES}
    data = {name: profiles._raw(name) for name in profiles.PROFILES}
    seen: set[str] = set()
    for profile in ("denylist", "allowlist"):
        for (table, name), group in groups(profile).items():
            names = [call for call in data[profile].get(table, {}).get(name, []) if call not in seen]
            if not names:
                continue
            seen.update(names)
            yield f"\n## {name.replace('_', ' ')}\n"
            if group.why:
                yield f"{group.why}\n"
            yield f"| system call | {' | '.join(read)} |"
            yield f"| --- |{' --- |' * len(read)}"
            for call in names:
                yield f"| {call} | {' | '.join(decision(each, call) for each in read.values())} |"
    yield "\n## By argument\n"
    for profile in profiles.PROFILES:
        yield f"\n### {profile}\n"
        for why, calls in merged(profile):
            yield f"- {', '.join(f'`{call}`' for call in calls)}: {why}"


def merged(profile: str) -> list[tuple[str, list[str]]]:
    """The rules of one comment are one point."""
    found: dict[str, list[str]] = {}
    for calls, why in rules(profile):
        known = found.setdefault(why, [])
        known += [call for call in calls if call not in known]
    return list(found.items())


if __name__ == "__main__":
    print("\n".join(lines()))
