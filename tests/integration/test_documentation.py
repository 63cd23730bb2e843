"""Every block of the README and of the documentation does what the page says: see tests/blocks.py for how pages are read.

Each page has a folder of its own, with the examples of the repository, and records of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blocks
import pytest
from blocks import Block

from . import cli_harness, harness

RUNNER = str(harness.HERE / "page_runner.py")
SECONDS = 60 * harness.PATIENCE  # for a command
AS_A_USER = (  # pages whose blocks are also run by a user without rights: see test_rootless.py
    "README", "first-steps", "command-line", "library", "files", "network", "limits", "plugin-folders", "recovery", "records",
)  # fmt: skip
pytestmark = pytest.mark.timeout(300 * harness.PATIENCE)


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, which tables need not break."""
    with tempfile.TemporaryDirectory(prefix="docs-") as place:
        yield Path(place)


def parameter(page: Path) -> Any:
    name = str(page.relative_to(blocks.ROOT))
    return pytest.param(page, id=name, marks=[pytest.mark.rootless] if page.stem in AS_A_USER else [])


@pytest.mark.parametrize("page", [parameter(page) for page in blocks.pages()])
def test_the_blocks_of_a_page(page: Path, folder: Path) -> None:
    wrong = failures(blocks.read(page), folder)
    assert not wrong, "\n\n".join(wrong)


def failures(page: list[Block], folder: Path) -> list[str]:
    """Run what is to be run of a page, and say what is not as shown."""
    steps = list(steps_of(page))
    if not any(step["kind"] != "file" for step, _ in steps):
        return []
    came = run([step for step, _ in steps], folder)
    assert len(came) == len(steps)
    return [wrong for (step, shown), result in zip(steps, came, strict=True) if (wrong := difference(step, shown, result))]


def steps_of(page: list[Block]) -> Iterator[tuple[dict[str, Any], tuple[str, ...] | None]]:
    """Each step for the runner, and what it has to print; None: the page does not say."""
    for block, following in zip(page, [*page[1:], None], strict=False):
        step = {"line": block.line, "file": str(blocks.ROOT / block.page), "place": block.place, "text": block.text}
        if block.reason:
            continue
        if block.is_file:
            yield {**step, "kind": "file", "title": block.title}, None
        elif block.language == "python":
            is_shown = following is not None and following.title == blocks.OUTPUT
            yield {**step, "kind": "python"}, tuple(following.text.rstrip("\n").split("\n")) if is_shown and following else None
        elif block.language == "sh":
            yield {**step, "kind": "command"}, ()
        elif block.language == "pycon":
            yield {**step, "kind": "doctest"}, None
        elif block.language == "console":
            for command in blocks.commands(block):
                place = f"{block.page}:{command.line}"
                yield {**step, "kind": "command", "line": command.line, "place": place, "text": command.text}, command.shown


def run(steps: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    place, records, home = folder / "page", folder / "records", folder / "home"
    for each in (place, records, home):
        each.mkdir(parents=True)
    folder.chmod(0o755)
    shutil.copytree(blocks.ROOT / "examples", place / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    caller = cli_harness.remembering(cli_harness.privileged("standard", place), records)
    programs = os.pathsep.join((os.path.dirname(caller.script), str(interpreter_in(folder / "bin"))))
    environment = {name: value for name, value in caller.environment.items() if name not in ("PYTHONSAFEPATH", "API_TOKEN")}
    caller = dataclasses.replace(
        caller, environment={**environment, "HOME": str(home), "PATH": f"{programs}{os.pathsep}{environment['PATH']}"}
    )
    result = folder / "result.json"
    done = subprocess.run(
        [*caller.prefix, RUNNER, str(result)],
        input=json.dumps({"steps": steps, "seconds": SECONDS}),
        env=caller.environment,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240 * harness.PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    came: list[dict[str, Any]] = json.loads(result.read_text())
    return came


def interpreter_in(place: Path) -> Path:
    """A folder with a `python` for the shell: a system's own is called python3 alone."""
    place.mkdir()
    for name in ("python", "python3"):
        (place / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (place / name).chmod(0o755)
    return place


def difference(step: dict[str, Any], shown: tuple[str, ...] | None, came: dict[str, Any]) -> str:
    """What is wrong with a step, "" if nothing is."""
    place = f"{step['place']}: {step['text'].strip() if step['kind'] == 'command' else step['kind']}"
    if came["error"]:
        return f"{place}\n{came['error']}"
    if shown and not blocks.is_as_shown(shown, came["output"]):
        return f"{place}\nshown:\n" + "\n".join(shown) + f"\ncame:\n{came['output']}"
    is_shown = any(line.strip() != "..." for line in shown or ())
    if step["kind"] == "command" and not is_shown and came["status"] != 0:
        return f"{place}\nstatus {came['status']}, and the page shows nothing of it:\n{came['output']}"
    if step["kind"] == "doctest" and not came["examples"]:
        return f"{place}\nthere is no example in it: begin a line with >>>"
    return ""


def test_files_of_the_system_stay_as_they_are(folder: Path) -> None:
    page = blocks.parse("page", f'```text title="{folder}/made"\nx\n```\n\n```console\n$ cat {str(folder)[1:]}/made\nx\n```')
    assert not failures(page, folder)
    assert not (folder / "made").exists()
    with pytest.raises(AssertionError, match="not in the page's folder"):
        run([{"kind": "file", "title": "../made", "text": "x", "place": "page:1"}], folder / "another")


WRONG = {
    "a python block that raises": "```python\nassert 1 + 1 == 3\n```",
    "a name that nobody has defined": "```python\nreformat('x')\n```",
    "another output of python": '```python\nprint("one")\n```\n\n```text title="output"\ntwo\n```',
    "another output of a command": "```console\n$ echo one\ntwo\n```",
    "less output than there is": "```console\n$ printf 'one\\ntwo\\n'\none\n```",
    "more output than there is": "```console\n$ echo one\none\ntwo\n...\n```",
    "a command that fails": "```console\n$ psie run nothing.py\n```",
    "a command that fails, and of which everything is left out": "```console\n$ false\n...\n```",
    "a command that nobody knows": "```console\n$ psie rum examples/hello.py\n```",
    "a script": "```sh\ntrue\nfalse\n```",
    "another doctest": "```pycon\n>>> 1 + 1\n3\n```",
    "an await that raises": "```python\nimport asyncio\nawait asyncio.sleep('x')\n```",
    "what is wrong in a hidden block": "<!-- setup:\nraise ValueError\n-->\n",
}
RIGHT = """
<!-- file words.txt:
one
-->

```python title="plugin.py"
found = 1
```

<!-- setup:
x = 1
-->

```python
import asyncio, plugin
await asyncio.sleep(0)
print(x + plugin.found, "and    more")
```

```text title="output"
... and more
```

```console
$ cd /
$ echo "from here"; exit 3
from here
$ echo $? \\
>    $PWD
3 /
$ seq 5
1
...
5
```

<!-- not run: there is no such command -->

```console
$ nobody-knows-this
```

```pycon
>>> x + 1
2
```
"""


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_in_a_block_is_seen(what: str, folder: Path) -> None:
    assert len(failures(blocks.parse("page", WRONG[what]), folder)) == 1


def test_what_a_page_may_hold(folder: Path) -> None:
    page = blocks.parse("page", RIGHT)
    assert [block.language for block in page] == ["text", "python", "python", "python", "text", "console", "console", "pycon"]
    assert not failures(page, folder)
