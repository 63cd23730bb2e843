"""Where attacks are tried without a sandbox: a plain process, which forks one child for each, and ends with its caller.

What does not succeed there says nothing when it fails inside.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sandbox import transport
from sandbox.host import facts
from sandbox.selftest.attacks import ROOT, SECONDS, SECRET, Attack, Where

_SERVER = """
import os, pickle, signal, struct, sys, tempfile, traceback
sys.path[:] = {path!r}
import cloudpickle, subprocess  # a child that has given up its ids may not reach the interpreter
from sandbox.ns.privileges import die_with_parent
die_with_parent()
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on the terminal is its caller's to answer, who then closes the pipe
own = os.getpid()
held = sys.argv[1]  # this text lies in the memory of every child, as a caller's secrets do
while True:
    head = sys.stdin.buffer.read(12)
    if not head:
        break
    size, uid = struct.unpack("=Qi", head)
    payload = sys.stdin.buffer.read(size)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        if os.getppid() != own:
            os._exit(1)  # it died before the line above
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, {seconds})
        folder = tempfile.mkdtemp()
        os.chmod(folder, 0o777)
        os.chdir(folder)
        if uid >= 0:
            os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
            die_with_parent()
        try:
            function, arguments, keywords = pickle.loads(payload)
            text = function(*arguments, **keywords)
        except BaseException:
            text = "failed: " + traceback.format_exc()
        os.write(writer, (folder + "\\0" + text)[:60000].encode())
        os._exit(0)
    os.close(writer)
    data = b""
    while piece := os.read(reader, 65536):
        data += piece
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    data = data or b"\\0failed: ended by wait status %d" % status
    sys.stdout.buffer.write(struct.pack("=Q", len(data)) + data)
    sys.stdout.buffer.flush()
"""


class Outside:
    """A plain process of the caller's: nothing of psie protects anything there."""

    def __init__(self) -> None:
        # What a careless caller's children inherit:
        self.file = tempfile.NamedTemporaryFile("w+", prefix="psie-escape-")  # noqa: SIM115 - as long as the process
        self.file.write(SECRET)
        self.file.flush()
        os.set_inheritable(self.file.fileno(), True)
        os.environ["PSIE_ESCAPE_SECRET"] = SECRET
        code = _SERVER.format(path=sys.path, seconds=SECONDS)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, SECRET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
        )
        self.seen: dict[str, str] = {}

    def run(self, one: Attack, folder: Path) -> str:
        """The answer of the attack outside: "escaped: ...", "stopped: ...", or "failed: ..." if it is broken there.

        The scene's look at the harm counts as well. Asked once per attack.
        """
        if one.name not in self.seen:
            with one.scene(Where(inside=False, folder=folder)) as scene:
                answer = self._ask(one, scene.arguments)
                harm = scene.harm()
            self.seen[one.name] = f"escaped: {harm}" if harm else answer
        return self.seen[one.name]

    def _ask(self, one: Attack, arguments: dict[str, Any]) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        payload = transport.pack(one.function, (), arguments, facts().path)
        uid = one.outside_uid if ROOT and one.outside_uid is not None else -1
        self.process.stdin.write(struct.pack("=Qi", len(payload), uid) + payload)
        self.process.stdin.flush()
        (size,) = struct.unpack("=Q", self.process.stdout.read(8))
        folder, _, answer = self.process.stdout.read(size).decode("utf-8", "replace").partition("\0")
        if folder:
            subprocess.run(["rm", "-rf", "--", folder], check=False)
        return answer

    def close(self) -> None:
        self.process.communicate()
        self.file.close()
        os.environ.pop("PSIE_ESCAPE_SECRET", None)
