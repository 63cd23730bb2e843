"""Terminal safety of text and of byte streams."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from sandbox.text import TerminalEscaper, escape_text

HOSTILE = [
    ("\x1b[31m", "\\x1b[31m"),
    ("\x00\x07\x08\x7f", "\\x00\\x07\\x08\\x7f"),
    ("\x80\x9b\x9f", "\\x80\\x9b\\x9f"),
    ("a\rb", "a\\rb"),
    ("\u200b\u200c\u200d\u2060\ufeff\u00ad", "\\u200b\\u200c\\u200d\\u2060\\ufeff\\xad"),
    ("\u2028\u2029", "\\u2028\\u2029"),
    ("\ud800\udfff", "\\ud800\\udfff"),
    ("\U000e0041", "\\U000e0041"),
    ("\u3164\u115f\u034f", "\\u3164\\u115f\\u034f"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_unsafe_text_becomes_visible(text: str, shown: str) -> None:
    assert escape_text(text) == shown


@pytest.mark.parametrize("code", [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C])
def test_bidi_controls_become_visible(code: int) -> None:
    assert escape_text(f"a{chr(code)}b") == f"a\\u{code:04x}b"


@pytest.mark.parametrize(
    "text", ["", "plain", "Grüße", "漢字　かな", "שלום عربى", "👍🏽 ❤️ 🇩🇪", "a\u00a0b", "e\u0301", "\\x1b", "a\n\tb"]
)
def test_ordinary_text_stays(text: str) -> None:
    assert escape_text(text) == text


def test_emoji_newer_than_python_stays() -> None:
    assert escape_text("\U0001faff") == "\U0001faff"


def test_keep_says_which_controls_stay() -> None:
    assert escape_text("a\n\tb\r", keep="") == "a\\n\\tb\\r"
    assert escape_text("a\n\tb\r", keep="\n") == "a\n\\tb\\r"
    assert escape_text("a\n\tb\r\x1b", keep="\n\t\r") == "a\n\tb\r\\x1b"


def test_result_is_stable_and_encodable() -> None:
    every = "".join(map(chr, range(0x110000)))
    shown = escape_text(every)
    shown.encode("utf-8")
    assert escape_text(shown) == shown


def test_not_text_is_refused() -> None:
    with pytest.raises(TypeError, match="escape_text takes a str, not bytes"):
        escape_text(b"x")  # type: ignore[arg-type]


def stream(*chunks: bytes) -> bytes:
    escaper = TerminalEscaper()
    return b"".join(map(escaper.feed, chunks)) + escaper.flush()


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"", b""),
        (b"plain\n\ttext", b"plain\n\ttext"),
        (b"\x1b]0;title\x07", b"\\x1b]0;title\\x07"),
        ("Grüße 漢字　👍\n".encode(), "Grüße 漢字　👍\n".encode()),
        ("ü\x1b[2J".encode(), "ü\\x1b[2J".encode()),
        (b"\xff\xfe\x80", b"\\xff\\xfe\\x80"),
        (b"\xed\xa0\x80", b"\\xed\\xa0\\x80"),  # a surrogate is no UTF-8
        (b"\xc0\xaf", b"\\xc0\\xaf"),  # nor is an overlong form
        ("\u009b1m".encode(), b"\\x9b1m"),
        ("a\u202eb".encode(), b"a\\u202eb"),
        ("a\uffffb\r\n".encode(), b"a\\uffffb\r\n"),
        (b"dos\r\ntext\r\n", b"dos\r\ntext\r\n"),
        (b"10%\r20%\r", b"10%\n20%\n"),
        (b"\r\r\n", b"\n\r\n"),
        ("ü\r\nü\rü\x1b".encode(), "ü\r\nü\nü\\x1b".encode()),
        (b"cut \xe2\x82", b"cut \\xe2\\x82"),
    ],
)
def test_stream(data: bytes, shown: bytes) -> None:
    assert stream(data) == shown
    assert stream(*(data[i : i + 1] for i in range(len(data)))) == shown


def test_chunk_borders_do_not_matter() -> None:
    rng = random.Random(1)
    alphabet = [
        b"a",
        b"\r",
        b"\n",
        b"\r\n",
        b"\x1b",
        b"\xff",
        b"\xe2\x82",
        "ü€👍\u202e".encode(),
        b"\t",
        b"\x80",
        "\uffff".encode(),
    ]
    for _ in range(500):
        data = b"".join(rng.choices(alphabet, k=30))
        cuts = sorted(rng.sample(range(len(data)), 6))
        chunks = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert stream(*chunks) == stream(data)
        shown = stream(data).decode("utf-8")
        assert escape_text(shown, keep="\n\t\r") == shown
        assert shown.count("\r") == shown.count("\r\n")


def test_character_is_shown_as_soon_as_it_is_whole() -> None:
    escaper = TerminalEscaper()
    assert escaper.feed(b"a\xe2") == b"a"
    assert escaper.feed(b"\x82") == b""
    assert escaper.feed(b"\xacb") == "€b".encode()
    assert escaper.feed(b"c\r") == b"c"
    assert escaper.feed(b"\n") == b"\r\n"
    assert escaper.flush() == b""


def test_escaper_can_be_used_again_after_flush() -> None:
    escaper = TerminalEscaper()
    escaper.feed(b"\xe2\x82")
    assert escaper.flush() == b"\\xe2\\x82"
    assert escaper.feed("ü".encode()) == "ü".encode()
    assert escaper.flush() == b""


def test_other_bytes_types() -> None:
    escaper = TerminalEscaper()
    assert escaper.feed(bytearray(b"a\x1b")) == b"a\\x1b"
    assert escaper.feed(memoryview(b"b")) == b"b"
    with pytest.raises(TypeError, match="takes bytes, not str"):
        escaper.feed("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chunk", "times", "most_seconds"),
    [(b"a line of plain text, as most output is\n" * 1600, 1024, 1.0), (random.Random(2).randbytes(1 << 16), 128, 4.0)],
    ids=["64 MB of text", "8 MB of noise"],
)
def test_speed(chunk: bytes, times: int, most_seconds: float) -> None:
    escaper = TerminalEscaper()
    began = time.thread_time()
    for _ in range(times):
        escaper.feed(chunk)
    assert time.thread_time() - began < most_seconds


def test_import_loads_nothing_else() -> None:
    code = "import sys; import sandbox; before = set(sys.modules); import sandbox.text; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sandbox.text"]
