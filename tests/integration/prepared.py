"""Programs on hosts that lack something: in namespaces of their own, prepared by a piece of shell."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import harness


def run(
    argv: Sequence[str], prepare: str, *, unshare: Sequence[str], env: Mapping[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run it in the namespaces that unshare(1) makes with these options, where `prepare` has been run with all rights.

    In a new user namespace every id is mapped to itself.
    """
    inner = f"{prepare}\nexec {shlex.join(argv)}"
    process = subprocess.Popen(
        ["unshare", *unshare, "--", "/bin/sh", "-ec", f"read go\nexec /bin/sh -ec {shlex.quote(inner)}"],
        env=env,
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            if "--user" in unshare:
                map_every_id(process.pid)
            out, err = process.communicate("go\n", timeout=60 * harness.PATIENCE)
        finally:
            process.kill()
    return subprocess.CompletedProcess(list(argv), process.returncode, out, err)


def map_every_id(pid: int) -> None:
    """To itself, in the user namespace that `pid` is about to make."""
    own = os.readlink("/proc/self/ns/user")
    assert harness.wait_until(lambda: os.readlink(f"/proc/{pid}/ns/user") != own)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text("0 0 4294967295")
