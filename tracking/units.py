"""Numbers as people read them: three significant digits and a unit."""

from __future__ import annotations

import math

MISSING = "–"


def number(value: float | None) -> str:
    """
    >>> number(21.3456), number(0.012345), number(5213.4), number(7.0), number(None), number(float("nan"))
    ('21.3', '0.0123', '5,213', '7.00', '–', 'nan')
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-4:
        return f"{value:.2e}"
    digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(float(f"{value:.2e}")))))
    return f"{value:,.{digits}f}"


def scaled(value: float | None, step: float, units: list[str]) -> str:
    """`value` in the largest of the units, each `step` times the one before, in which it is at least 1."""
    if value is None or not math.isfinite(value):
        return number(value)
    i = 0
    while abs(float(f"{value:.2e}")) >= step and i < len(units) - 1:
        value, i = value / step, i + 1
    return f"{value:.0f} {units[0]}" if i == 0 else f"{number(value)} {units[i]}"


def size(n_bytes: float | None) -> str:
    """
    >>> size(812), size(99_800_000), size(1_210_000_000)
    ('812 B', '99.8 MB', '1.21 GB')
    """
    return scaled(n_bytes, 1000, ["B", "kB", "MB", "GB", "TB"])


def parameters(count: float | None) -> str:
    """
    >>> parameters(134_515_008)
    '135 M'
    """
    return scaled(count, 1000, ["", "k", "M", "B", "T"]).strip()


def duration(seconds: float | None) -> str:
    """
    >>> duration(0.0123), duration(12.34), duration(185), duration(7980)
    ('12.3 ms', '12.3 s', '3 min 05 s', '2 h 13 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return number(seconds)
    if 0 < seconds < 0.1:
        return f"{number(seconds * 1000)} ms"
    if seconds < 99.95:
        return f"{number(seconds)} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def percent(fraction: float | None, signed: bool = False) -> str:
    """
    >>> percent(0.4123), percent(0.123, signed=True), percent(-0.0049, signed=True), percent(18.3, signed=True)
    ('41.2 %', '+12.3 %', '−0.5 %', '+1,830 %')
    >>> percent(-0.0001, signed=True), percent(312_386.8, signed=True)
    ('±0.0 %', '×312,388')
    """
    if fraction is None or not math.isfinite(fraction):
        return number(fraction)
    if signed and fraction >= 99:
        return f"×{number(1 + fraction)}"
    value = 100 * fraction
    if signed and abs(value) < 0.05:
        return "±0.0 %"
    string = f"{value:{'+' if signed else ''},.{1 if abs(value) < 99.95 else 0}f} %"
    return string.replace("-", "−")


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """
    >>> interval(21.3, 20.2, 22.5), interval(21.3, None, None)
    ('21.3 (20.2–22.5)', '21.3')
    """
    if value is None or low is None or high is None:
        return number(value)
    return f"{number(value)} ({number(low)}–{number(high)})"


def protocol(windows: int, length: int) -> str:
    """How perplexity is measured, in words; the first token of a window is read and not predicted.

    >>> protocol(8, 512)
    '8 windows of 512 tokens, no overlap, no context carried over: 4,088 tokens predicted'
    """
    predicted = windows * (length - 1)
    return f"{windows:,} windows of {length:,} tokens, no overlap, no context carried over: {predicted:,} tokens predicted"
