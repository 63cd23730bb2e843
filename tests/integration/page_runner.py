"""Runs the steps of one page of the documentation: as JSON from stdin, what came of each as JSON to the file that is named.

A process of its own, in the page's folder, because blocks are a program: they change what a process has. Must not know what a
page shows.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

SHELL = '(exit "$PAGE_STATUS")\n{}\nPAGE_STATUS=$?\npwd >"$PAGE_PLACE"\nexit $PAGE_STATUS\n'


class Page:
    """What one step leaves to the next: a namespace, an event loop, a folder, an exit status."""

    def __init__(self, runner: asyncio.Runner, seconds: float) -> None:
        self.runner = runner
        self.seconds = seconds
        self.module = sys.modules["__main__"] = types.ModuleType("__main__")
        self.place = Path.cwd()
        self.folder = str(self.place)
        self.status = 0

    def python(self, step: dict[str, Any]) -> dict[str, Any]:
        """Run a block; its lines are numbered as in the page, so that a traceback shows them."""
        said = io.StringIO()
        error = ""
        with contextlib.redirect_stdout(said):
            try:
                flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
                code = compile("\n" * (step["line"] - 1) + step["text"], step["file"], "exec", flags, dont_inherit=True)
                made = eval(code, self.module.__dict__)
                if inspect.iscoroutine(made):
                    self.runner.run(made)
            except BaseException:
                error = traceback.format_exc()
        return {"output": said.getvalue(), "error": error}

    def doctest(self, step: dict[str, Any]) -> dict[str, Any]:
        said = io.StringIO()
        test = doctest.DocTestParser().get_doctest(step["text"], self.module.__dict__, step["file"], step["file"], step["line"])
        test.globs = self.module.__dict__
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        runner.run(test, out=said.write, clear_globs=False)
        return {"output": "", "error": said.getvalue() if runner.failures else "", "examples": len(test.examples)}

    def command(self, step: dict[str, Any]) -> dict[str, Any]:
        with tempfile.NamedTemporaryFile("r") as place:
            done = subprocess.run(
                ["bash", "-c", SHELL.format(step["text"])],
                cwd=self.folder,
                env={**os.environ, "PAGE_STATUS": str(self.status), "PAGE_PLACE": place.name},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=self.seconds,
                check=False,
            )
            self.folder = place.read().rstrip("\n") or self.folder
        self.status = done.returncode
        return {"output": done.stdout.decode(errors="replace"), "status": done.returncode, "error": ""}

    def file(self, step: dict[str, Any]) -> dict[str, Any]:
        path = self.place / step["title"].lstrip("/")  # also one of /etc is there only for the page
        if ".." in path.parts:
            raise ValueError(f"{step['place']}: {step['title']} is not in the page's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(step["text"])
        return {"output": "", "error": ""}


def main() -> None:
    given = json.load(sys.stdin)
    sys.path.insert(0, os.getcwd())
    with asyncio.Runner() as runner:
        page = Page(runner, given["seconds"])
        done = [getattr(page, step["kind"])(step) for step in given["steps"]]
    Path(sys.argv[1]).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
