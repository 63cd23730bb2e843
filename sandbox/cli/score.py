"""`psie score`: how exposed each level leaves this host, and what would change that most."""

from __future__ import annotations

import json
from dataclasses import replace

from sandbox import host, recipe, score
from sandbox.cli import settings
from sandbox.cli.session import complain
from sandbox.cli.table import print_table
from sandbox.config import IsolationLevel
from sandbox.errors import SandboxException
from sandbox.text import escape_text


def rate(level: str | None, config: str | None, as_json: bool) -> int:
    """Print the ratings; 0 also for a level that is refused here: it is rated as what could be had."""
    try:
        base, limits, permissions = settings.settings({"level": level, "config": config})
        levels = [base.level] if level is not None or config is not None else list(IsolationLevel)
        facts = host.facts()
        recipes = [recipe.compile(replace(base, level=each), limits, permissions, facts, strict=False) for each in levels]
    except (SandboxException, ValueError, TypeError, OSError) as error:
        return complain(error)
    ratings = [score.rate(each) for each in recipes]
    if as_json:
        data = [rating.to_dict() for rating in ratings]
        print(json.dumps(data[0] if len(data) == 1 else data, indent=2))
        return 0
    for rating in ratings:
        print(f"level {rating.level}: exposure {rating.exposure:.1f} of 10, {rating.word}")
        if len(ratings) == 1:
            rows = [[f"{each.points:.2f}", each.name, each.seen] for each in rating.findings]
            print_table(["points", "what", "seen"], rows)
        for finding in rating.best_mends():
            print(f"  -{finding.points:.1f} at most, {finding.name}: {escape_text(finding.mend, keep='')}")
    return 0
