"""Pictures as SVG, written as text: no plotting library, and nothing to install."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

FONT = "font-family='system-ui, sans-serif'"
INK, GREY = "#1a202c", "#a0aec0"
RESOURCE_COLOURS = {"compute": "#f2c14e", "memory": "#2f855a", "network": "#2b6cb0"}


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """One SVG document on a white ground."""
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:g}' height='{height:g}' "
        f"viewBox='0 0 {width:g} {height:g}' {FONT} font-size='12'>"
    )
    return "\n".join([head, "<rect width='100%' height='100%' fill='white'/>", *parts, "</svg>"]) + "\n"


def text(
    x: float, y: float, words: str, *, anchor: str = "middle", size: int = 12, fill: str = INK, turn: int = 0
) -> str:
    """``turn``: degrees, clockwise around its own place."""
    turned = f" transform='rotate({turn} {x:g} {y:g})'" if turn else ""
    return (
        f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' font-size='{size}' fill='{fill}'{turned}>"
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, fill: str, *, title: str = "", opacity: float = 1.0) -> str:
    """A rectangle; ``title`` is shown while the mouse rests on it."""
    faint = f" fill-opacity='{opacity:g}'" if opacity < 1 else ""
    told = f"<title>{escape(title)}</title>" if title else ""
    return (
        f"<rect x='{x:.4g}' y='{y:g}' width='{width:.4g}' height='{height:g}' rx='2' fill='{fill}'{faint}>{told}</rect>"
    )


def line(points: Sequence[tuple[float, float]], colour: str, *, width: float = 1.5, dashed: bool = False) -> str:
    """Straight from point to point."""
    dashes = " stroke-dasharray='4 3'" if dashed else ""
    places = " ".join(f"{x:.5g},{y:.5g}" for x, y in points)
    return f"<polyline points='{places}' fill='none' stroke='{colour}' stroke-width='{width:g}'{dashes}/>"


def dot(x: float, y: float, colour: str, title: str) -> str:
    return f"<circle cx='{x:.5g}' cy='{y:.5g}' r='3.5' fill='{colour}'><title>{escape(title)}</title></circle>"
