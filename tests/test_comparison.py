"""benchmarks/comparison.py: an attack that a peer does not stop is found not to be stopped, and the page has its table."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import comparison
from benchmarks.comparison import BROKEN, NOT_STOPPED, STOPPED, Peer
from sandbox.selftest import attacks
from sandbox.selftest.attacks import REGISTRY, Attack

PAGE = Path(__file__).resolve().parent.parent / "docs" / "comparison.md"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """After `tmp_path`, which is not to lie in it."""
    with attacks.scratch() as folder:
        yield folder


def named(name: str) -> Attack:
    return next(one for one in REGISTRY if one.name == name)


def test_every_attack_has_a_class_and_every_class_attacks() -> None:
    assert {comparison.class_of(one) for one in comparison.chosen()} == set(comparison.CLASSES)


without_python = pytest.mark.skipif(not Path(comparison.PYTHON).exists(), reason=f"no {comparison.PYTHON}")


@without_python
def test_what_isolates_nothing_stops_nothing(scratch: Path, tmp_path: Path) -> None:
    plain = Peer("nothing", "0", comparison.plain)
    for name in ("write_outside", "rarely_needed_calls", "socket_udp"):
        verdict, reason = comparison.try_peer(plain, named(name), scratch, str(tmp_path))
        assert verdict == NOT_STOPPED, (name, reason)


@without_python
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap")
def test_bubblewrap_hides_files_and_leaves_sockets(scratch: Path, tmp_path: Path) -> None:
    peer = next(peer for peer in comparison.available() if peer.name == "bubblewrap")
    verdict, reason = comparison.try_peer(peer, named("write_outside"), scratch, str(tmp_path))
    assert (verdict, reason) == (STOPPED, "ENOENT")
    assert comparison.try_peer(peer, named("socket_udp"), scratch, str(tmp_path))[0] == NOT_STOPPED


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("stopped: EPERM", STOPPED),
        ("escaped: 3", NOT_STOPPED),
        ("escaped by open: 3", NOT_STOPPED),
        ("ended: status -31 ", STOPPED),
        ("failed: Traceback\nMemoryError", STOPPED),
        ("failed: Traceback\nOSError: [Errno 24] Too many open files", STOPPED),
        ("failed: Traceback\nModuleNotFoundError: No module named 'x'", BROKEN),
        ("failed: ", BROKEN),
    ],
)
def test_verdicts(answer: str, verdict: str) -> None:
    assert comparison.judged(answer)[0] == verdict


def test_the_page_has_the_table_with_no_class_left_out() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (?:\d+ of \d+ \| ?)+$", PAGE.read_text(), re.M)
    assert rows == [*comparison.CLASSES, "all"]
