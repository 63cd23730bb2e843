"""Fork handlers of preloaded modules: put off, not lost."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os, sys
from sandbox.engine import forkhooks
forkhooks.begin()
import threading
seen = []
os.register_at_fork(before=lambda: seen.append("before"), after_in_child=lambda: seen.append("child"))
forkhooks.end()
pid = os.fork()
if pid == 0:
    os._exit(len(seen))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a handler ran that was to wait"
forkhooks.make_up()
assert seen == ["child"], seen
pid = os.fork()
if pid == 0:
    os._exit(len(seen))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3, "a fork of the plugin's runs before and child"
print("ok")
"""


def test_handlers_wait_for_the_job_and_then_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert (done.stdout, done.stderr) == ("ok\n", "")
