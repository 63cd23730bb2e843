"""Make the pictures of docs/images again, from a run of examples/busy.py: the report in a real browser, the terminal as SVG.

Wants Debian's `chromium` (apt-get install chromium), and makes smaller files where there is `pngquant`. `tools/screenshots.py
FOLDER` writes there instead; `--page FILE.html` takes pictures of that page, whole, at both widths, light and dark.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLUMNS = 104  # of the terminal
LIVE_AT = 3.2  # seconds after which the picture of the live line is taken
SETTINGS = """
[isolation]
resource_check_interval_seconds = 0.2
[limits]
max_subprocess_count = 8
"""


class Browser:
    """A headless Chromium, spoken to over pipes by the DevTools protocol (--remote-debugging-pipe: fd 3 in, fd 4 out)."""

    def __init__(self, program: str) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="psie-browser-", ignore_cleanup_errors=True)
        inside, self.writer = os.pipe()
        self.reader, outside = os.pipe()
        line = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        # The browser wants its ends as 3 and 4; they are moved up first, in case that they are these already.
        shell = f'exec 8<&{inside} 9>&{outside}; exec 3<&8 4>&9; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *line, f"--user-data-dir={self.profile.name}", "about:blank"],
            pass_fds=(inside, outside),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inside)
        os.close(outside)
        self.pending = b""
        self.number = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.writer)
        os.close(self.reader)
        self.profile.cleanup()

    def ask(self, method: str, **parameters: Any) -> Any:
        """The result of one command; what the browser tells meanwhile goes to `events`."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            data = os.read(self.reader, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self.pending += data
        said, _, self.pending = self.pending.partition(b"\0")
        message: dict[str, Any] = json.loads(said)
        if "id" not in message:
            self.events.append(message)
        return message

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Load the page at a width in CSS pixels, and wait until it stands."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def evaluate(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, file: Path, most: int | None = None) -> None:
        """Of the page as it stands, or of its first `most` pixels."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        height = min(size["height"], most or size["height"])
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height, "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip, optimizeForSpeed=False)
        file.write_bytes(base64.b64decode(shot["data"]))
        if shutil.which("pngquant"):
            subprocess.run(["pngquant", "--force", "--output", file, "--quality=70-100", file], check=True)


def browser() -> str | None:
    """The program, if one is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def run_on_terminal(folder: Path, arguments: list[str], *, at: float) -> tuple[str, str]:
    """(what the screen shows after `at` seconds, what it shows at the end) of `psie ARGUMENTS` in a folder."""
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve(psie(), ["psie", *arguments], {**os.environ, "TERM": "xterm-256color"})
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    seen, meanwhile, begun = b"", b"", time.monotonic()
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # EIO: it has ended
            break
        if time.monotonic() - begun < at:
            meanwhile = seen + data
        seen += data
    os.close(master)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"psie {' '.join(arguments)} has failed:\n{seen.decode()}")
    return screen(meanwhile), screen(seen)


def screen(written: bytes) -> str:
    """What a terminal shows of it: the live line is drawn behind what clears it."""
    text = re.sub(r"[^\n]*\r\x1b\[K", "", written.decode())
    return text.replace("\r\n", "\n")


def psie() -> str:
    return str(Path(sys.executable).with_name("psie"))


def draw_terminal(file: Path, shown: str) -> None:
    from rich.console import CONSOLE_SVG_FORMAT, Console  # type: ignore[attr-defined]
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True, color_system="standard")  # noqa: SIM115
    console.print(Text.from_ansi(shown))
    # No font from elsewhere.
    template = re.sub(r"@font-face \{\{.*?\n    \}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    file.write_text(
        console.export_svg(title="psie", code_format=template.replace("Fira Code", "DejaVu Sans Mono"), unique_id="psie")
    )


def make(images: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)
    program = browser()
    if program is None:
        raise SystemExit("there is no chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="plugins-") as place:
        folder = Path(place)
        shutil.copy(ROOT / "examples" / "busy.py", folder)
        (folder / "data").mkdir()
        (folder / "busy.toml").write_text(SETTINGS)
        line = "run busy.py --level strict --allow-subprocess --config busy.toml --rw data -v --report busy.html -- data"
        meanwhile, end = run_on_terminal(folder, line.split(), at=LIVE_AT)
        draw_terminal(images / "terminal.svg", f"$ psie {line}\n{end}")
        draw_terminal(images / "terminal-live.svg", f"$ psie {line}\n{meanwhile}")
        page = folder / "busy.html"
        with Browser(program) as shown:
            for name, width, dark, most in (
                ("report-1280", 1280, False, 1500),
                ("report-390", 390, False, 2200),
                ("report-dark", 1280, True, 1500),
            ):
                shown.open(page, width, dark=dark)
                shown.picture(images / f"{name}.png", most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=IMAGES)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.page is None:
        make(given.folder)
        return
    program = browser()
    if program is None:
        raise SystemExit("there is no chromium here: apt-get install chromium")
    with Browser(program) as shown:
        for width in (1280, 390):
            for dark in (False, True):
                shown.open(given.page, width, dark=dark)
                print(width, "dark" if dark else "light", "wide:", shown.evaluate("document.documentElement.scrollWidth"))
                shown.picture(given.folder / f"{given.page.stem}-{width}-{'dark' if dark else 'light'}.png")


if __name__ == "__main__":
    main()
