"""Numbers as people read them: durations, sizes, counts. Must not know what is measured."""

from __future__ import annotations

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30


def number(value: float) -> str:
    """Three digits that count, thousands set apart: 0.25, 2.1, 49.9, 128, 1,024."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return (f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}").rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """1.8 ms, 20 ms, 2.15 s, 41.3 s, 10 min 05 s, 1 h 02 min."""
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{number(milliseconds)} ms"
    if seconds < 59.95:
        return f"{number(seconds)} s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min" if minutes else f"{hours:,} h"


def size(count: float) -> str:
    """Bytes: 1 byte, 512 bytes, 3.2 KB, 1.5 MB; of 2**10, 2**20 and 2**30."""
    for unit, name in ((GB, "GB"), (MB, "MB"), (KB, "KB")):
        if count >= unit:
            return f"{number(count / unit)} {name}"
    return counted(int(count), "byte")


def counted(count: int, one: str, many: str = "") -> str:
    """1 process, 2 processes."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
