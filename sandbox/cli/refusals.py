"""What `psie run` and `psie call` say at the end about what was refused: a few lines on stderr, equal ones together.

Imported only where there is something to say. Must not know what allows what: the records bring their explanations.
"""

from __future__ import annotations

from dataclasses import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandbox.errors import SandboxException
    from sandbox.violations import Explanation, SandboxViolation

MOST = 5  # kinds that are shown


def lines(violations: Sequence[SandboxViolation], error: SandboxException | None) -> list[str]:
    """A line for each kind of refusal and passed limit, in the order in which they came; warnings are left out.

    Of what is refused again and again each doubling is told, not each time.
    """
    counts: dict[Explanation, int] = {}  # by the explanation without its place
    places: dict[Explanation, Explanation] = {}
    for violation in violations:
        if violation.explanation is not None and violation.explanation.refused:
            kind = replace(violation.explanation, file=None, line=None)
            counts[kind] = counts.get(kind, 0) + int(violation.details.get("count", 1))
            if violation.explanation.file or kind not in places:
                places[kind] = violation.explanation
    limit: Explanation | None = getattr(error, "explanation", None)  # one that ended the plugin need not have a record
    if limit is not None:
        kind = replace(limit, file=None, line=None)
        counts.setdefault(kind, 1)
        places.setdefault(kind, limit)
    told = [
        places[kind].text() if count == 1 else f"at least {count} times: {places[kind].text()}"
        for kind, count in counts.items()
    ]
    left = len(told) - MOST
    if left > 0:
        told[MOST:] = [f"and {left} more {'kind' if left == 1 else 'kinds'}: see --result-file"]
    return told
