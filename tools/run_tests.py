"""Run all tests in two pytest processes side by side; arguments are for both. The exit status is 0 if both succeed.

What the one writes is seen at once, what the other writes when it has ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

COMMAND = (sys.executable, "-m", "pytest")


def main() -> int:
    with tempfile.TemporaryFile() as output:
        rest = subprocess.Popen(
            [*COMMAND, "--half=rest", *sys.argv[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            library = subprocess.run([*COMMAND, "--half=library", *sys.argv[1:]], check=False).returncode
        finally:
            status = rest.wait()
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    print(f"\nthe two halves: {'passed' if not library else 'FAILED'} and {'passed' if not status else 'FAILED'}")
    return library or status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
