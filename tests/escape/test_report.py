"""The report: a page that the host writes, and a person opens, full of what a plugin has said. It must stay the host's page.

What is tried is first shown to work where it is pasted into a page as it is. Where a Chromium is installed it is the judge too.
"""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sandbox.cli import report
from tools import screenshots

ROOT = Path(__file__).parents[2]
OWNED = "document.title='owned'"
# What gets a script to run, or the reader to another place, if it is believed to be markup.
TRIES = (
    f"<script>{OWNED}</script>",
    f"</title></style></dd><img src=x onerror={OWNED}>",
    f"<svg onload={OWNED}>",
    f"'\" autofocus onfocus={OWNED} x='",
    '<meta http-equiv=refresh content="0;url=https://example.invalid/">',
    "<style>*{background:url(https://example.invalid/)}</style>",
    "<base href=//example.invalid>",
    "javascript:" + OWNED,
    "&lt;script&gt;",
    "\u202eevil\u2066\u200b\x1b]0;x\x07\x00\r",
)
FORBIDDEN = ("script", "img", "base", "link", "iframe", "form", "object", "embed")
HIDING = set("\x00\x07\x1b\r\u200b\u202e\u2066")

# The texts come by its argument; each is said everywhere where a plugin can say something: names of files, of processes and of
# hosts, an exception with its traceback, output.
PLUGIN = """
    import ctypes, json, os, socket, sys, time
    tries = json.load(open(sys.argv[1]))
    for number, text in enumerate(tries):
        for name in (text.replace("/", "\\u2215").replace("\\0", ""),):
            try:
                open(name or "x", "w").write("x")
            except OSError:
                pass
        try:
            open("/etc/" + text.replace("\\0", ""), "w")
        except OSError:
            pass
        try:
            socket.getaddrinfo(text.replace("\\0", "")[:60], 80)
        except (OSError, UnicodeError):
            pass
        print(text)
    ctypes.CDLL(None).prctl(15, tries[0].encode())
    time.sleep(0.4)
    raise ValueError("".join(tries))
"""


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    @property
    def evil(self) -> list[Any]:
        """Elements and attributes that run, load or lead elsewhere."""
        names = [tag for tag, _ in self.found if tag in FORBIDDEN]
        handlers = [
            name for _, attrs in self.found for name in attrs if name.startswith("on") or name in ("href", "src", "style")
        ]
        refresh = [attrs for tag, attrs in self.found if tag == "meta" and attrs.get("http-equiv") == "refresh"]
        return names + handlers + refresh


def psie(folder: Path, *words: str, status: int) -> str:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "SANDBOX_QUARANTINE_ENABLED": "0", "PYTHONPATH": path}
    line = [sys.executable, "-m", "sandbox.cli", "run", *words]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done
    return done.stderr


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Of a plugin that says all that."""
    (tmp_path / "tries.json").write_text(json.dumps(TRIES))
    plugin = tmp_path / f"{html.unescape('&lt;')}b onclick=alert(1)>.py"
    plugin.write_text(textwrap.dedent(PLUGIN))
    (tmp_path / "settings.toml").write_text("[isolation]\nresource_check_interval_seconds = 0.1\nviolation_threshold = 10\n")
    words = [
        "-q",
        "--level",
        "strict",
        "--config",
        "settings.toml",
        "--ro",
        str(tmp_path / "tries.json"),
        "--allow-host",
        "192.0.2.1",
    ]
    psie(
        tmp_path,
        *words,
        "--report",
        "out.html",
        "--result-file",
        "out.json",
        plugin.name,
        str(tmp_path / "tries.json"),
        status=1,
    )
    return tmp_path / "out.html"


def test_nothing_that_a_plugin_says_is_markup(page: Path) -> None:
    result = (page.parent / "out.json").read_text()
    said = json.loads(result)
    assert len(said["file_operations"]) >= len(TRIES) - 1, "it has got its texts into the report"
    assert "<script>" in result
    assert "onerror" in result
    control = Elements(f"<p>{''.join(TRIES)}</p>")
    assert {"script", "img", "base", "onload"} <= set(map(str, control.evil)), "pasted as it is, it would"
    shown = page.read_text()
    assert "&lt;script&gt;" in shown
    assert not Elements(shown).evil
    assert not set(shown) & HIDING


def test_even_as_data_of_any_kind(page: Path) -> None:
    """Whatever text stands anywhere in the data: also what no plugin can reach today."""
    data = json.loads((page.parent / "out.json").read_text())
    poison = "".join(TRIES)

    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poisoned(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        is_free = isinstance(value, str) and key not in ("timestamp", "start_time", "end_time", "began", "state")
        return poison if is_free else value

    shown = report.page(poisoned(data))
    assert shown.count("&lt;script&gt;") > 100
    assert not Elements(shown).evil
    assert not set(shown) & HIDING


def requests(events: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(addresses that were asked for, those that the policy forbade)"""
    asked = {each["requestId"]: each["request"]["url"] for each in told(events, "Network.requestWillBeSent")}
    failed = told(events, "Network.loadingFailed")
    refused = {each["requestId"] for each in failed if each.get("blockedReason") == "csp"}
    return [url for key, url in asked.items() if key not in refused], [url for key, url in asked.items() if key in refused]


def told(events: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [event["params"] for event in events if event["method"] == method]


@pytest.mark.skipif(screenshots.browser() is None, reason="there is no Chromium here")
def test_a_browser_runs_nothing_of_it(page: Path) -> None:
    program = screenshots.browser()
    assert program is not None
    control = page.with_name("control.html")
    control.write_text(f"<!DOCTYPE html><title>control</title><p>{TRIES[0]}{TRIES[2]}</p>")
    with screenshots.Browser(program) as browser:
        browser.open(control, 800)
        assert browser.evaluate("document.title") == "owned", "pasted as it is, it runs"
        # The policy alone would stop it, too.
        text = page.read_text()
        unescaped = page.with_name("unescaped.html")
        scripts = "".join(each for each in TRIES if "refresh" not in each)  # no policy forbids that one
        unescaped.write_text(text.replace("<main>", f"<main>{scripts}", 1))
        for shown, evil in ((unescaped, True), (page, False)):
            browser.open(shown, 800)
            assert browser.evaluate("document.title").startswith("psie: ")
            assert bool(browser.evaluate("document.querySelectorAll('main script').length")) == evil
            got, refused = requests(browser.events)
            assert got == [shown.resolve().as_uri()], "nothing else is loaded"
            assert bool(refused) == evil
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


REDIRECT = """
    import os, sys
    os.chdir(sys.argv[1])
    os.rename("sub", "old")
    os.symlink(sys.argv[2], "sub")
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """In which a plugin's id can walk, too."""
    with tempfile.TemporaryDirectory(prefix="psie-report-") as place:
        os.chmod(place, 0o755)
        yield Path(place)


def test_a_plugin_does_not_choose_where_it_is_written(open_folder: Path) -> None:
    """It makes the folder of the report, in one that it may change, a link to another one of the caller's. At level minimal it
    does that at once; elsewhere what leads out of a folder is not committed."""
    granted, other = open_folder / "granted", open_folder / "other"
    for folder in (granted, other):
        folder.mkdir()
    (open_folder / "plugin.py").write_text(textwrap.dedent(REDIRECT))
    words = ["-q", "--level", "minimal", "--rw", str(granted), "--allow-delete", "plugin.py", "--", str(granted), str(other)]
    for name, option in (("control", ""), ("report", "--report"), ("result", "--result-file")):
        (granted / "sub").mkdir()
        target = granted / "sub" / name
        psie(open_folder, *([option, str(target)] if option else []), *words, status=0)
        assert (granted / "sub").is_symlink()
        if not option:
            target.write_text("who goes by the name")
            assert os.listdir(other) == [name], "would write there"
            (other / name).unlink()
        else:
            assert os.listdir(other) == []
            assert os.listdir(granted / "old") == [name], "in the folder that was meant"
            (granted / "old" / name).unlink()
        (granted / "sub").unlink()
        (granted / "old").rmdir()
