"""Numbers for people: three digits, thousands apart, ranges with one dash."""

from openvision.hardware import Range


def number(value: float) -> str:
    """About three digits: 0.0123, 1.23, 12.3, 123, 12,346."""
    if value == 0:
        return "0"
    digits = 2
    size = abs(value)
    while size >= 10 and digits > 0:
        size, digits = size / 10, digits - 1
    while size < 1 and digits < 6:
        size, digits = size * 10, digits + 1
    return f"{value:,.{digits}f}"


def span(values: Range) -> str:
    """Both ends, as in 1.2-3.4, or one number where they read alike."""
    low, high = (_short(value) for value in values)
    return low if low == high else f"{low}-{high}"


def percent(values: Range) -> str:
    """Shares of 1 as in 20-36 %."""
    low, high = (f"{100 * value:.0f}" for value in values)
    return f"{low} %" if low == high else f"{low}-{high} %"


def count(value: float) -> str:
    """12.8B, 525M, 97.5k, 120."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # What rounds to 1,000 of a unit is 1 of the next.
        if value >= 0.9995 * size:
            return f"{number(max(value / size, 1.0))}{unit}"
    return f"{value:,.0f}"


def _short(value: float) -> str:
    """Two or three digits: the ends of a range pretend to no more. Large ones with k, M or B."""
    if value >= 10_000:
        for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:,.1f}{unit}" if value < 100 * size else f"{value / size:,.0f}{unit}"
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
