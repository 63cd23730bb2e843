"""Write man/psie.1, the manual page: synopsis and commands are those that click knows, the rest stands here.

python tools/man_page.py            writes it
python tools/man_page.py --check    says whether it is the one of these commands; status 1 if not
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandbox.cli import app
from sandbox.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

DATE = "2026-11-28"  # of the text below; a page that changes by the day could not be compared
PAGE = Path(__file__).resolve().parent.parent / "man" / "psie.1"

DESCRIPTION = """\
psie runs Python code that nobody has to trust: plugins, user scripts, machine-written code. A sandbox is made of Linux
namespaces, cgroup v2, seccomp and Landlock, as root or rootless. What the host cannot enforce is substituted and named at the
levels minimal and standard, and refused at strict and maximum: see `psie explain`.

The working directory of a plugin is a private, empty workspace, the only place that it may write to but for the folders that
--rw names; it reaches no host that --allow-host does not name. At the levels strict and maximum it sees none of your files but
those that an option names. Ctrl-C reaches the plugin, a second one kills the sandbox."""

STATUSES = (
    ("the plugin's own", "It ended by itself; 1 after an uncaught exception, as with python."),
    ("124", "It ran longer than --timeout."),
    ("125", "psie itself failed, the command line is wrong, or the file is quarantined."),
    ("126", "A security violation ended it."),
    ("137", "Out of memory, or killed by SIGKILL."),
    ("143", "A person has ended it with psie kill."),
    ("128 + n", "Killed by signal n (153: too much output, 152: too much CPU time)."),
)
VARIABLES = (
    ("SANDBOX_ISOLATION_LEVEL", "The level where --level is not given. Other settings have such variables too: see the guide."),
    ("PSIE_STANDING", "0: no sandboxes stand by for the next call."),
    ("PSIE_MAX_SANDBOXES, PSIE_MAX_MEMORY_MB", "Bounds of all open sandboxes of a user together."),
    ("PSIE_DEBUG", "If set, an internal error shows its traceback."),
)
FILES = (
    ("/var/lib/psie, ~/.local/state/psie", "Of root and of others: runs, quarantine, evidence, audit, trusted-keys/NAME.pub."),
    ("/var/cache/psie, ~/.cache/psie", "Recipes and compiled filters. May be removed at any time."),
    (
        "/run/psie, $XDG_RUNTIME_DIR/psie",
        "What open sandboxes have taken: ids and places. Not to be removed while one is open.",
    ),
)
EXAMPLES = (
    ("psie run plugin.py --level strict --memory 256M --timeout 10 --ro /data/input -- its own arguments", "Run a script."),
    ("psie call plugin.py:main --arg 21", "Call one function; print what it returns as JSON."),
    ("psie run fetch.py --allow-host example.com:443", "Let it connect to one host."),
    ("psie selftest --level strict", "Try to break out of it, on this host."),
)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that is no group, with its words, in the order of the help."""
    for name, command in group.commands.items():
        words = (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, words)
        elif not command.hidden:
            yield words, command


def page() -> str:
    """The whole page, in man(7)'s macros."""
    lines = [
        f'.TH PSIE 1 "{DATE}" "psie {__version__}" "User Commands"',
        ".SH NAME",
        r"psie \- run Python code that nobody has to trust, in a sandbox",
        ".SH SYNOPSIS",
    ]
    for words, command in commands(app.group):
        lines += [".SY psie", escaped(f"{' '.join(words)} {usage(command)}".rstrip()), ".YS"]
    lines += [".SH DESCRIPTION", *paragraphs(DESCRIPTION), ".SH COMMANDS"]
    for words, command in commands(app.group):
        lines += [f".SS psie {escaped(' '.join(words))}", *paragraphs(command.help or "")]
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                lines += option(parameter)
    lines += [".SH OPTIONS", *term(r"\fB\-\-version\fR", "Print the version.")]
    lines += term(r"\fB\-h\fR, \fB\-\-help\fR", "Of psie and of every command: print what it does and its options.")
    lines += [".SH EXIT STATUS", *(line for name, text in STATUSES for line in term(escaped(name), text))]
    lines += [".SH ENVIRONMENT", *(line for name, text in VARIABLES for line in term(escaped(name), text))]
    lines += [".SH FILES", *(line for name, text in FILES for line in term(escaped(name), text))]
    lines += [".SH EXAMPLES", *(line for name, text in EXAMPLES for line in term(rf"\fB{escaped(name)}\fR", text))]
    lines += [".SH SEE ALSO", ".BR bwrap (1),", ".BR unshare (1),", ".BR namespaces (7),", ".BR cgroups (7),"]
    lines += [".BR seccomp (2),", ".BR landlock (7)"]
    return "\n".join(lines) + "\n"


def usage(command: click.Command) -> str:
    pieces = [piece for piece in command.collect_usage_pieces(click.Context(command)) if piece != command.options_metavar]
    has_options = any(isinstance(parameter, click.Option) for parameter in command.params)
    return " ".join([*(["[options]"] if has_options else []), *pieces])


def option(one: click.Option) -> list[str]:
    placeholder = "" if one.is_flag or one.count else rf" \fI{escaped(one.make_metavar(click.Context(app.group)))}\fR"
    names = ", ".join(rf"\fB{escaped(name)}\fR" for name in sorted(one.opts, key=len))
    return term(names + placeholder, one.help or "")


def term(name: str, text: str) -> list[str]:
    return [".TP", name, *filled(text)]


def paragraphs(text: str) -> list[str]:
    """Of plain text, parted by empty lines; `a word` is bold."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        found += [".PP", *filled(paragraph)]
    return found[1:]  # behind a heading there is one already


def filled(text: str) -> list[str]:
    """As lines of the page; `a word` is bold."""
    lines = textwrap.wrap(" ".join(text.split()), 76, break_long_words=False, break_on_hyphens=False)
    bold = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", "\n".join(map(escaped, lines)))
    return bold.splitlines()


def escaped(text: str) -> str:
    """For roff: no character of the text is an instruction."""
    safe = text.replace("\\", r"\e").replace("-", r"\-").replace("~", r"\(ti").replace("^", r"\(ha")
    return rf"\&{safe}" if safe.startswith((".", "'")) else safe


def main() -> int:
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text() == text:
            return 0
        print("man/psie.1 is not of these commands: python tools/man_page.py writes it", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
