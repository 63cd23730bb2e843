"""The blocks of the documentation, and whether what is shown is what came.

A page is read into steps, in its order:

- a block with `title="NAME"` behind its language is a file of that name, which later steps find in the page's folder, also
  where the name begins with a slash;
- a `python` block is run; all of a page have one namespace, and may await; what a block `text title="output"` right behind it
  shows is what it has to print;
- a `pycon` block is run as a doctest in the same namespace;
- in a `console` block each line that begins with `$ ` is a command, and the lines below it are what it has to print, on stdout
  and stderr; if there are none, or nothing but `...`, it has to succeed;
- an `sh` block is a script, which has to succeed;
- other languages are only parsed (tests/test_docs.py).

In what is shown, a line `...` stands for any lines, `...` inside a line for any text, and spaces count as one. Comments give
what a reader need not see: `<!-- setup: CODE -->` is a python block, `<!-- file NAME: TEXT -->` a file, and
`<!-- not run: REASON -->` says why the block behind it is not run.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = "output"  # the title of a block with what the one before it prints
ALWAYS_SAID = (
    "psie: weaker than on a host with everything"  # by hosts that cannot enforce all limits: shown or not, it is no difference
)
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<language>[\w+-]*)(?P<info>.*)$")
TITLE = re.compile(r'title="([^"]+)"')
COMMENT = re.compile(r"^ *<!--\s*(?P<word>setup|not run|file (?P<name>[\w./-]+)):(?P<text>.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of a page; `line` is that of its first line of text, `reason` why it is not run."""

    page: str
    line: int
    language: str
    title: str
    text: str
    reason: str = ""

    @property
    def is_file(self) -> bool:
        return bool(self.title) and self.title != OUTPUT

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """Of a console block: what is typed, and the lines shown below it."""

    line: int
    text: str
    shown: tuple[str, ...]


def pages() -> list[Path]:
    """The README and all pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(path: Path) -> list[Block]:
    page = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return parse(page, path.read_text(encoding="utf-8"))


def parse(page: str, text: str) -> list[Block]:
    """Raises ValueError for a block that does not end, and a reason that belongs to none."""
    found: list[Block] = []
    lines = text.split("\n")
    at, reason = 0, ""
    while at < len(lines):
        fence = FENCE.match(lines[at])
        comment = COMMENT.match("\n".join(lines[at : at + 200])) if "<!--" in lines[at] else None
        if fence:
            end = next((i for i in range(at + 1, len(lines)) if lines[i].strip() == fence["marks"]), None)
            if end is None:
                raise ValueError(f"{page}:{at + 1}: this block does not end")
            title = TITLE.search(fence["info"])
            body = textwrap.dedent("\n".join(lines[at + 1 : end]))
            found.append(Block(page, at + 2, fence["language"], title[1] if title else "", f"{body}\n", reason))
            at, reason = end, ""
        elif comment:
            words = textwrap.dedent(comment["text"].rstrip(" ")).strip("\n")
            if comment["word"] == "not run":
                reason = words.strip()
            else:
                title_of_it = comment["name"] or ""
                found.append(Block(page, at + 1, "text" if title_of_it else "python", title_of_it, f"{words.strip(chr(10))}\n"))
            at += comment[0].count("\n")
        elif reason and lines[at].strip():
            raise ValueError(f"{page}:{at + 1}: no block follows the comment `not run: {reason}`")
        at += 1
    if reason:
        raise ValueError(f"{page}: no block follows the comment `not run: {reason}`")
    return found


def commands(block: Block) -> list[Command]:
    """Raises ValueError for a block whose first line is no command."""
    found: list[tuple[int, list[str], list[str]]] = []
    for number, line in enumerate(block.text.rstrip("\n").split("\n"), block.line):
        if found and found[-1][1][-1].endswith("\\") and not found[-1][2]:
            found[-1][1].append(line.removeprefix("> "))
        elif line.startswith("$ "):
            found.append((number, [line[2:]], []))
        elif found:
            found[-1][2].append(line)
        else:
            raise ValueError(f"{block.place}: a console block begins with a command: $ COMMAND")
    return [Command(number, "\n".join(typed), tuple(trimmed(shown))) for number, typed, shown in found]


def trimmed(lines: list[str]) -> list[str]:
    """Without the empty lines that separate one command from the next."""
    return "\n".join(lines).strip("\n").split("\n") if any(line.strip() for line in lines) else []


def is_as_shown(shown: tuple[str, ...], came: str) -> bool:
    """Whether the output is what the page shows."""
    if not any(ALWAYS_SAID in line for line in shown):
        came = "\n".join(line for line in came.split("\n") if not line.startswith(ALWAYS_SAID))
    wanted = "".join(".*" if line.strip() == "..." else f"{pattern(line)}\n" for line in shown)
    got = "".join(f"{' '.join(line.split())}\n" for line in came.strip("\n").split("\n"))
    return re.fullmatch(wanted, got, re.DOTALL) is not None


def pattern(line: str) -> str:
    return r"[^\n]*".join(re.escape(part) for part in " ".join(line.split()).split("..."))
