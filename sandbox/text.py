"""Makes untrusted text safe to show on a terminal: names, messages, tracebacks and a plugin's own output.

`escape_text` is for text in hand, `TerminalEscaper` for a stream of bytes. Both leave ordinary text as it is and turn
whatever could drive a terminal, hide itself or reorder its neighbours into a visible escape such as ``\\x1b``.

This module knows nothing of sandboxes, logs or files, and imports nothing: it is loaded at every start.
"""

from __future__ import annotations

# Invisible, but letters or marks to Unicode, so that str.isprintable() lets them pass: combining grapheme joiner, the
# Hangul fillers, two Khmer vowels, the Mongolian variation selectors.
_HIDDEN = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
# Spaces other than U+0020: harmless, though str.isprintable() says no. U+3000 is the space of Chinese and Japanese text.
_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
# An emoji that is newer than this Python's Unicode tables is not printable to it.
_EMOJI_FIRST, _EMOJI_LAST = 0x1F000, 0x1FAFF

_SHORT = {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"}
_CACHE_ENTRIES = 4096  # a hostile text that runs through all of Unicode must not fill the memory


def _escape(code: int) -> str:
    if code in _SHORT:
        return _SHORT[code]
    if code < 0x100:
        return f"\\x{code:02x}"
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\U{code:08x}"


class _Table(dict[int, str]):
    """A table for str.translate that fills itself; it never holds more than `_CACHE_ENTRIES` characters."""

    def __init__(self, keep: str) -> None:
        super().__init__()
        self._keep = frozenset(keep)

    def __missing__(self, code: int) -> str:
        char = chr(code)
        shown = char if self._is_kept(char, code) else _escape(code)
        if len(self) >= _CACHE_ENTRIES:
            self.clear()
        self[code] = shown
        return shown

    def _is_kept(self, char: str, code: int) -> bool:
        if char in self._keep or char in _SPACES:
            return True
        if _EMOJI_FIRST <= code <= _EMOJI_LAST:
            return True
        return char.isprintable() and char not in _HIDDEN


class _StreamTable(_Table):
    """For text decoded with "surrogateescape": shows such a surrogate as the byte that it stands for."""

    def __missing__(self, code: int) -> str:
        if not 0xDC80 <= code <= 0xDCFF:
            return super().__missing__(code)
        self[code] = shown = _escape(code - 0xDC00)
        return shown


_KEEP = "\n\t"
_tables: dict[str, _Table] = {_KEEP: _Table(_KEEP), "": _Table("")}


def escape_text(text: str, keep: str = _KEEP) -> str:
    """Return `text` with everything unsafe for a terminal turned into visible escapes.

    Escaped are: C0 and C1 controls and DEL; bidirectional marks, embeddings, overrides and isolates; zero-width and other
    format characters; line and paragraph separators; lone surrogates; private-use and unassigned characters. Printable
    text stays, whatever its script. So an emoji that is glued together by zero-width joiners shows its parts.
    Backslashes stay single: the result is for reading, it cannot be turned back.

    Args:
        text: any str.
        keep: control characters to leave alone; `keep=""` gives a single line.

    Raises:
        TypeError: `text` is not a str.
    """
    if not isinstance(text, str):
        raise TypeError(f"escape_text takes a str, not {type(text).__name__}: decode or str() it first")
    if text.isascii() and text.isprintable():
        return text
    table = _tables.get(keep)
    if table is None:
        table = _Table(keep)
    return text.translate(table)


_SAFE_ASCII = bytes(range(0x20, 0x7F)) + b"\n\t"


class TerminalEscaper:
    """Escapes a stream of bytes on its way to a terminal; the result is UTF-8.

    UTF-8 is decoded across the borders of the chunks; bytes that are not UTF-8 show as ``\\xNN``. Line feed and tab stay.
    A carriage return stays where a line feed follows it. Alone it would let later text overwrite what stands on the line
    already, so it becomes a line feed: a progress bar then prints one line for each of its steps.

    Plain ASCII runs at about the speed of a copy.
    """

    def __init__(self) -> None:
        import codecs

        # A byte that is not UTF-8 becomes a lone surrogate, which no valid byte can: far faster than "backslashreplace".
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._in_character = False  # the decoder holds the beginning of a character
        self._held_return = False  # the last chunk ended in a carriage return: what follows decides

    def feed(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take the next bytes of the stream and return what may be shown now.

        An unfinished character (at most 3 bytes) or a carriage return at the end is held back until the next call.

        Raises:
            TypeError: `data` is not bytes-like.
        """
        if not isinstance(data, bytes):
            if not isinstance(data, (bytearray, memoryview)):
                raise TypeError(f"TerminalEscaper.feed takes bytes, not {type(data).__name__}: encode it first")
            data = bytes(data)
        if not data:
            return b""
        if self._in_character:
            return self._through_decoder(data, final=False)
        unsafe = data.translate(None, _SAFE_ASCII)
        if not unsafe:
            if self._held_return:
                self._held_return = False
                return (b"\r" if data[0] == 0x0A else b"\n") + data
            return data
        if data.isascii():
            return self._escape_ascii(data, unsafe)
        return self._through_decoder(data, final=False)

    def flush(self) -> bytes:
        """End the stream and return what was held back. The escaper can then take another stream."""
        shown = self._through_decoder(b"", final=True)
        self._decoder.reset()
        return shown

    def _escape_ascii(self, data: bytes, unsafe: bytes) -> bytes:
        if 0x0D in unsafe or self._held_return:
            data = self._returns(data.decode("ascii"), final=False).encode("ascii")
        for code in set(unsafe):
            if code != 0x0D:
                data = data.replace(bytes((code,)), _escape(code).encode("ascii"))
        return data

    def _through_decoder(self, data: bytes, *, final: bool) -> bytes:
        text = self._decoder.decode(data, final)
        self._in_character = bool(self._decoder.getstate()[0])
        text = self._returns(text, final=final)
        if not _is_plain(text):
            text = text.translate(_stream_table)
        return text.encode("utf-8")

    def _returns(self, text: str, *, final: bool) -> str:
        """Hold a return at the end back, give an earlier held one its turn, make lone ones line feeds."""
        if self._held_return and (text or final):
            text = "\r" + text
            self._held_return = False
        if text.count("\r") == text.count("\r\n"):
            return text
        if text.endswith("\r") and not final:
            self._held_return = True
            text = text[:-1]
        # What is not a pair is alone. U+FFFF is no character and cannot be mistaken: it is itself never shown.
        if "\uffff" in text:
            text = text.replace("\uffff", _escape(0xFFFF))
        return text.replace("\r\n", "\uffff").replace("\r", "\n").replace("\uffff", "\r\n")


_stream_table = _StreamTable("\n\t\r")


def _is_plain(text: str) -> bool:
    """Whether nothing in a decoded chunk needs an escape; several times as fast as to translate it."""
    for char in "\n\t\r\u3000":
        text = text.replace(char, "")
    return text.isprintable() and not any(char in text for char in _HIDDEN)
