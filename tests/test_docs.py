"""What the docs refer to is there, what they say in tables is what the code says, and what is not run can be read.

What is run of them is in tests/integration/test_documentation.py.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import blocks
import click
import pytest
import yaml
from blocks import Block

import sandbox
from sandbox import load_config
from sandbox.cli import app
from sandbox.config import TABLES
from sandbox.errors import ManifestError
from sandbox.plugins import manifest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = [str(path.relative_to(ROOT)) for path in blocks.pages()]
RUN = ("python", "pycon", "console", "sh")  # by tests/integration/test_documentation.py
DOCKERFILE = ("FROM", "RUN", "CMD", "LABEL", "EXPOSE", "ENV", "ADD", "COPY", "ENTRYPOINT", "VOLUME", "USER", "WORKDIR", "ARG")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def test_every_promise_names_tests_that_exist() -> None:
    """As a function, or as an attack that is registered under that name in a test or a family of the self-test."""
    text = (ROOT / "docs" / "threat-model.md").read_text()
    named = re.findall(r"`(\w+)::(\w+)`", text)
    named.remove(("module", "test"))
    named.remove(("module", "attack"))
    assert len(named) > 50
    sources: dict[str, str] = {}
    for path in (*TESTS.rglob("test_*.py"), *(ROOT / "sandbox" / "selftest").glob("*.py")):
        sources[path.stem] = sources.get(path.stem, "") + path.read_text()
    missing = [
        f"{file}::{name}" for file, name in named if not re.search(rf'\bdef {name}\(|name="{name}"', sources.get(file, ""))
    ]
    assert not missing
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert all("::" in row for row in rows)


def test_every_table_is_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "tools" / "docs_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"run: python tools/docs_tables.py\n{done.stdout}{done.stderr}"


def test_tables_are_made_anew() -> None:
    """What stands between the marks is replaced, every table is on a page, and a mark that is not closed is a mistake."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        tables = importlib.import_module("docs_tables")
    finally:
        sys.path.pop(0)
    mark = "<!-- made by tools/docs_tables.py: call-options -->\n"
    made = tables.filled(f"{mark}wrong\n<!-- end: call-options -->\n")
    assert "| `--arg JSON` |" in made
    assert "wrong" not in made
    assert tables.filled(made) == made == tables.filled(f"{mark}<!-- end: call-options -->\n")
    with pytest.raises(ValueError, match="not closed"):
        tables.filled(mark)
    texts = "".join((ROOT / page).read_text() for page in PAGES)
    assert [name for name in tables.TABLES if f"{mark.split(':')[0]}: {name} -->" not in texts] == []


def test_every_error_has_a_section() -> None:
    """The base class is what they all are."""
    text = (ROOT / "docs" / "errors.md").read_text()
    headings = " ".join(re.findall(r"^### (.*)$", text, re.MULTILINE))
    values = {name: getattr(sandbox, name) for name in sandbox.__all__}
    names = {name for name, value in values.items() if isinstance(value, type) and issubclass(value, Exception)}
    assert [name for name in sorted(names - {"SandboxException"}) if name not in headings] == []


def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"^::: sandbox\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(sandbox.__all__)


# -- blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_block_can_be_read(page: str, tmp_path: Path) -> None:
    wrong = [f"{block.place}: {said}" for block in blocks.read(ROOT / page) if (said := unreadable(block, tmp_path))]
    assert not wrong, "\n".join(wrong)


def unreadable(block: Block, folder: Path) -> str:
    """What is wrong with a block, beside what running it shows; "" if nothing is."""
    if block.language not in KINDS:
        return f"a block in {block.language or 'no language'}: give one of {', '.join(KINDS)}"
    if block.reason and block.language not in RUN:
        return "only what is run can be left out"
    try:
        KINDS[block.language](block, folder)
    except (ValueError, SyntaxError, yaml.YAMLError, configparser.Error, ManifestError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def python(block: Block, _: Path) -> None:
    compile(block.text, block.place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def toml(block: Block, folder: Path) -> None:
    """A file of settings, a manifest where its name or its keys say so, or something else in TOML."""
    document = tomllib.loads(block.text)
    if block.title.endswith("plugin.toml") or "entry_point" in document:
        manifest.parse("docs", "plugin.toml", block.text.encode())
    elif document.keys() <= TABLES.keys():
        path = folder / "psie.toml"
        path.write_text(block.text)
        load_config(path)


def script(block: Block, _: Path) -> None:
    done = subprocess.run(["sh", "-n"], input=block.text, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ValueError(done.stderr)


def yaml_file(block: Block, _: Path) -> None:
    """With the keys that a workflow of GitHub's, or an object of Kubernetes's, cannot do without."""
    for document in yaml.safe_load_all(block.text):
        if "jobs" in document:
            if not ("on" in document or True in document):  # YAML 1.1 reads `on` as a boolean
                raise ValueError("a workflow says when it runs: on")
            for name, job in document["jobs"].items():
                if "uses" not in job and not ("runs-on" in job and job["steps"]):
                    raise ValueError(f"job {name} has no runs-on or no steps")
                if any(("uses" in step) == ("run" in step) for step in job.get("steps", [])):
                    raise ValueError(f"a step of job {name} has not one of uses and run")
        if "apiVersion" in document and not (document["kind"] and document["metadata"]["name"]):
            raise ValueError("an object has a kind and a name")


def ini(block: Block, _: Path) -> None:
    """A unit of systemd: settings may be given several times."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.read_string(block.text)
    if not parser.sections():
        raise ValueError("there is no section")


def dockerfile(block: Block, _: Path) -> None:
    lines = re.sub(r"\\\n", "", block.text).splitlines()
    unknown = [line for line in lines if line and not line.startswith("#") and line.split()[0] not in DOCKERFILE]
    if unknown or not any(line.startswith("FROM ") for line in lines):
        raise ValueError(f"no instruction: {unknown}")


KINDS: dict[str, Callable[[Block, Path], object]] = {
    "python": python,
    "console": lambda block, _: blocks.commands(block),
    "sh": script,
    "toml": toml,
    "json": lambda block, _: json.loads(block.text),
    "yaml": yaml_file,
    "ini": ini,
    "dockerfile": dockerfile,
    # Any text will do, as far as this module goes.
    **dict.fromkeys(("pycon", "text", "diff", "markdown"), lambda block, _: None),
}
UNREADABLE = {
    "no language": "```\nx\n```",
    "another language": "```perl\nx\n```",
    "python": "```python\ndef\n```",
    "python that is not run": "<!-- not run: why -->\n```python\ndef\n```",
    "a script": "```sh\nif\n```",
    "toml": "```toml\nx\n```",
    "settings": "```toml\n[limits]\nmax_memory = 1\n```",
    "a manifest": '```toml title="plugin.toml"\nversion = 1\n```',
    "json": "```json\n{\n```",
    "yaml": "```yaml\na: [\n```",
    "a workflow": "```yaml\non: push\njobs: {a: {runs-on: x, steps: [{name: x}]}}\n```",
    "a unit": "```ini\nx = 1\n```",
    "a dockerfile": "```dockerfile\nFROM x\nRUM y\n```",
    "a console block": "```console\nno prompt\n```",
    "text that is left out": "<!-- not run: why -->\n```text\nx\n```",
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_seen(what: str, tmp_path: Path) -> None:
    (block,) = blocks.parse("page", UNREADABLE[what])
    assert unreadable(block, tmp_path)


@pytest.mark.parametrize("text", ["```python\nx = 1\n", "<!-- not run: why -->\ntext\n", "<!-- not run: why -->\n"])
def test_pages_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="page"):
        blocks.parse("page", text)


def left_out() -> Iterator[tuple[Block, str]]:
    """Each command of a block that is not run."""
    for page in blocks.pages():
        for block in blocks.read(page):
            if block.reason and block.language == "console":
                yield from ((block, command.text) for command in blocks.commands(block))


def test_what_is_not_run_has_a_reason_to() -> None:
    """Blocks that only call psie can be run; the others are listed (pytest -rP shows them)."""
    by_block: dict[str, list[str]] = {}
    for block, command in left_out():
        by_block.setdefault(f"{block.place}: {block.reason}", []).append(command)
    for reason, commands in by_block.items():
        print(reason, *commands, sep="\n    $ ")
    assert by_block
    assert [reason for reason, commands in by_block.items() if all(each.startswith("psie ") for each in commands)] == []


def test_every_command_and_option_that_is_named_exists() -> None:
    """Also in sentences, and in blocks that are not run."""
    assert [f"{page}: {said}" for page in PAGES for said in unknown((ROOT / page).read_text())] == []
    for wrong in ("`psie rum FILE`", "$ psie run --levle strict plugin.py", "`psie plugins lits DIR`", "$ sudo psie gc --all"):
        assert len(unknown(wrong)) == 1


def unknown(text: str) -> list[str]:
    """The commands of psie that it names, and that are none, or have an option that is none."""
    found = []
    for inline, typed in re.findall(r"`psie ([^`]+)`|^\$ (?:sudo )?psie (.*)", text, re.MULTILINE):
        words = (inline or typed).split(" -- ")[0].split()
        command: click.Command = app.group
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        names = {name for each in command.params for name in each.opts} | {"--help"}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        if given - names or (isinstance(command, click.Group) and words and not given):
            found.append(inline or typed)
    return found


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Of pages that are not among those that mkdocs looks at."""
    wrong = []
    for target in LINK.findall((ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        place = ROOT / path if path else ROOT / page
        if not target.startswith("https://") and not (place.exists() and (not anchor or anchor in anchors(place))):
            wrong.append(target)
    assert not wrong


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached() -> None:
    """By mkdocs.yml's nav, and from there by no page that is gone. mkdocs holds the rest: `make docs`."""
    nav = [f"docs/{page}" for page in leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])]
    assert sorted(nav) == sorted(page for page in PAGES if page.startswith("docs/"))


def leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, (list, dict)):
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(each)
