"""Ratios as heat maps in SVG."""

from __future__ import annotations

from collections.abc import Sequence

from nf.planning.figures import Figure
from nf.planning.svg import RESOURCE_COLOURS, document, text

TOLERANCE = 0.05
"""A cell that differs by more from what the paper prints shows the paper's value too."""

EVEN = "#f7f5ef"

_CELL, _LETTER, _HEAD, _FOOT, _GAP = (66, 34), 7, 84, 34, 20  # pixels


def heat_maps(figures: Sequence[Figure]) -> str:
    """The figures below one another, as one SVG document."""
    heights = [_HEAD + _CELL[1] * len(figure.rows) + _FOOT for figure in figures]
    left = max(160, _LETTER * max(len(name) for figure in figures for name in figure.rows)) + 10
    width = left + _CELL[0] * max(len(figure.columns) for figure in figures) + _GAP
    height = sum(heights) + _GAP * (len(figures) - 1)
    parts: list[str] = []
    top = 0
    for figure, own in zip(figures, heights, strict=True):
        parts += [f"<g transform='translate(0 {top})'>", *_heat_map(figure, left), "</g>"]
        top += own + _GAP
    return document(width, height, parts)


def differs(value: float | None, printed: float | None) -> bool:
    """Whether a value is neither within TOLERANCE of the printed one nor rounds to it."""
    if value is None or printed is None:
        return value is not printed and printed is not None
    digits = 3 if printed != round(printed, 2) else 2
    return abs(value / printed - 1) > TOLERANCE and round(value, digits) != printed


def _heat_map(figure: Figure, left: int) -> list[str]:
    wide, high = _CELL
    parts = [text(10, 24, figure.title, anchor="start", size=15)]
    for column, name in enumerate(figure.columns):
        x = left + wide * (column + 0.5)
        words = name.split(" ", 1)
        for line, word in enumerate(words):
            parts.append(text(x, _HEAD - 8 - 14 * (len(words) - 1 - line), word, size=11))
    for row, name in enumerate(figure.rows):
        y = _HEAD + high * row
        parts.append(text(left - 8, y + high / 2 + 4, name, anchor="end"))
        for column, (value, printed) in enumerate(zip(figure.values[row], figure.printed[row], strict=True)):
            parts += _cell(left + wide * column, y, value, printed, figure.resource)
    note = f"Below 1 (yellow) compute is the scarcer resource, above 1 {figure.resource}."
    if any(
        differs(v, p) for vs, ps in zip(figure.values, figure.printed, strict=True) for v, p in zip(vs, ps, strict=True)
    ):
        note += " [ ]: as the paper prints it, where that is more than 5 % away."
    return [*parts, text(left, _HEAD + high * len(figure.rows) + 20, note, anchor="start", size=11)]


def _cell(x: float, y: float, value: float | None, printed: float | None, resource: str) -> list[str]:
    wide, high = _CELL
    fill = "#ffffff" if value is None else colour(value, resource)
    ink = "#ffffff" if value is not None and value > 5 else "#1a202c"
    middle, base = x + wide / 2 - 1, y + high / 2 + 3
    papers = printed is not None and differs(value, printed)
    parts = [
        f"<rect x='{x:g}' y='{y:g}' width='{wide - 2}' height='{high - 2}' rx='3' fill='{fill}'/>",
        text(middle, base - 5 * papers, "–" if value is None else f"{value:.2f}", fill=ink),
    ]
    return [*parts, text(middle, base + 8, f"[{printed:.2f}]", size=10, fill=ink)] if papers else parts


def colour(ratio: float, resource: str) -> str:
    """From compute's colour at 0 over pale at 1 to the resource's, even in ratio / (1 + ratio)."""
    share = ratio / (1 + ratio)
    first, middle, last = (
        bytes.fromhex(c[1:]) for c in (RESOURCE_COLOURS["compute"], EVEN, RESOURCE_COLOURS[resource])
    )
    low, high, along = (first, middle, 2 * share) if share < 0.5 else (middle, last, 2 * share - 1)
    return "#" + "".join(f"{round(a + (b - a) * along):02x}" for a, b in zip(low, high, strict=True))
