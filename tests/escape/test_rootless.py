"""All attacks once more, without root."""

from __future__ import annotations

import pytest

from escape import rootless


@pytest.mark.timeout(rootless.SECONDS + 20)
def test_attacks_as_an_unprivileged_user() -> None:
    session = rootless.current()
    if session is None:
        pytest.skip("this session has no root to give up: it is the rootless one")
    if session.process is None:
        pytest.skip(f"no interpreter that an unprivileged id can run with what the tests need: {session.reason[-300:]}")
    status, output = session.result()
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR", "E  ", f"{session.repository}/"))]
    assert status == 0, "\n".join(failed) or output[-3000:]
