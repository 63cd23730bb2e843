"""`psie audit verify`: whether the audit is whole and as it was written."""

from __future__ import annotations

import json
from dataclasses import asdict

from sandbox.cli import records
from sandbox.recovery import audit
from sandbox.recovery.store import Store

WHY = {
    "json": "it is no line of an audit",
    "hash": "it is not what was written",
    "seq": "lines before it are missing, or it is out of its place",
    "previous": "the line before it is another one than was written",
    "missing end": "the lines from here on are missing",
}


def verify(as_json: bool) -> int:
    """0: whole; 1: broken."""

    def show(store: Store) -> int:
        found = audit.verify(store.folder)
        if as_json:
            print(json.dumps(asdict(found), indent=2))
        elif found.ok:
            torn = (
                f"; {found.torn} bytes of a line that was not finished follow, and are cut off before the next"
                if found.torn
                else ""
            )
            print(f"the audit is whole: {found.lines} lines{torn}")
        else:
            print(f"the audit is broken at line {found.line} of {store.folder}/{found.file}: {WHY[found.why or '']}")
        return 0 if found.ok else 1

    return records.with_store(show)
