"""`psie selftest`: whether this host's sandboxes withstand the attacks that are safe to try here."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter

from sandbox.cli import endings, settings, words
from sandbox.cli.session import complain, say
from sandbox.cli.table import print_table
from sandbox.errors import SandboxException

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandbox.selftest.run import Result


def counted(results: Iterator[Result]) -> Iterator[Result]:
    """The same, with their number so far in a line on the terminal, if there is one: it takes a while."""
    is_shown = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
    for number, result in enumerate(results, 1):
        if is_shown:
            sys.stderr.write(f"\rpsie: {words.counted(number, 'attack')} tried ")
            sys.stderr.flush()
        yield result
    if is_shown:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


@endings.by_exception()
def run(level: str | None, names: tuple[str, ...], as_json: bool) -> int:
    """Print what came of each attack; 0 if none got through, 1 if one did, 125 if the test could not be made."""
    os.environ["PSIE_STANDING"] = "0"  # what stands ready is for a next caller, of whom there is none
    start = time.monotonic()
    try:
        chosen = settings.settings({"level": level or "strict", "config": None})[0].level
        from sandbox.selftest import run as selftest  # heavy

        results = list(counted(selftest.run(chosen, names)))
    except (SandboxException, ValueError, TypeError, OSError) as error:
        return complain(error)
    seconds = time.monotonic() - start
    counts = Counter(result.verdict for result in results)
    passed, failed = counts[selftest.PASS], counts[selftest.FAIL]
    who = "root" if os.getuid() == 0 else "a user without rights"
    if as_json:
        head = {"level": chosen.value, "user": who, "kernel": os.uname().release, "seconds": round(seconds, 1)}
        totals = {"passed": passed, "failed": failed, "not_applicable": counts[selftest.NOT_APPLICABLE]}
        print(json.dumps({**head, **totals, "attacks": [result.to_dict() for result in results]}, indent=2))
    else:
        rows = [[each.verdict, each.protection, each.attack, each.reason + "*" * each.recorded] for each in results]
        print_table(["verdict", "protection", "attack", "stopped by, or why (* recorded as a violation)"], rows)
        say(
            f"level {chosen.value} as {who}, Linux {os.uname().release}: {passed} stopped, {failed} NOT STOPPED, "
            f"{counts[selftest.NOT_APPLICABLE]} not applicable, in {seconds:.0f} s"
        )
    if not passed and not failed:
        say("no attack works on this host outside a sandbox: the self-test says nothing here")
        return 125
    return 1 if failed else 0
