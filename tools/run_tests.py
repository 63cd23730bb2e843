"""Run all tests in three pytest processes side by side; arguments are for all. The exit status is 0 if all succeed.

What the first one writes is seen at once, what the others write when they have ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack

COMMAND = (sys.executable, "-m", "pytest")
SEEN, *OTHERS = ("library", "rootless", "rest")  # see tests/conftest.py


def main() -> int:
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in OTHERS]
        others = [
            subprocess.Popen(
                [*COMMAND, f"--part={part}", *sys.argv[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            for part, output in zip(OTHERS, outputs, strict=True)
        ]
        statuses = []
        try:
            statuses.append(subprocess.run([*COMMAND, f"--part={SEEN}", *sys.argv[1:]], check=False).returncode)
        finally:
            for other, output in zip(others, outputs, strict=True):
                statuses.append(other.wait())
                output.seek(0)
                sys.stdout.buffer.write(output.read())
                sys.stdout.flush()
    came = (f"{part} {'passed' if not status else 'FAILED'}" for part, status in zip((SEEN, *OTHERS), statuses, strict=True))
    print("\n" + ", ".join(came))
    return max(statuses)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
