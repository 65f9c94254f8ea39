"""R → P curves: what an operation that is not compute-bound reaches beside a GEMM, and what it takes from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nf.graphs.builtin import lane_of
from nf.models.operations import Operation
from nf.planning.interference import Curve, CurvePoint, curve
from nf.planning.nano_layer import COMPUTE
from nf.planning.profile import Profile
from nf.planning.svg import GREY, RESOURCE_COLOURS, document, dot, line, text

_SIZE, _LEFT, _TOP, _GAP, _FOOT = 380, 64, 56, 90, 60  # pixels


def curves_of(profile: Profile, operations: Sequence[Operation]) -> dict[str, Curve]:
    """Every measured point of each operation that runs beside GEMMs, dominated ones included."""
    gemms = [operation.name for operation in operations if lane_of(operation) == COMPUTE]
    others = [operation.name for operation in operations if lane_of(operation) != COMPUTE]
    found = {name: curve(profile, gemms, [name], dominated=True) for name in others}
    return {name: points for name, points in found.items() if points}


def curve_picture(curves: Mapping[str, Curve], title: str) -> str:
    """A panel per curve, as SVG."""
    parts = [text(10, 24, title, anchor="start", size=15)]
    for number, (name, points) in enumerate(curves.items()):
        parts += _panel(_LEFT + number * (_SIZE + _GAP), name, points)
    if not curves:
        parts.append(text(10, 48, "No two nano-operations were measured beside each other.", anchor="start"))
    width = _LEFT + max(1, len(curves)) * (_SIZE + _GAP)
    return document(width, _TOP + _SIZE + _FOOT, parts)


def _panel(left: float, name: str, points: Curve) -> list[str]:
    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * _SIZE, _TOP + (1 - y) * _SIZE

    parts = [line([at(0, 1), at(0, 0), at(1, 0)], GREY), line([at(0, 0), at(1, 1)], GREY, dashed=True)]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(tick, 0)
        parts.append(text(x, y + 16, f"{tick:g}", size=11))
        x, y = at(0, tick)
        parts.append(text(x - 8, y + 4, f"{tick:g}", anchor="end", size=11))
    x, y = at(0.5, 0)
    parts.append(text(x, y + 36, "taken from the GEMM, 1 − R"))
    x, y = at(0, 0.5)
    parts.append(text(x - 42, y, f"{name}, P", turn=-90))
    split = [point for point in points if point.sms != "all"]
    colours = RESOURCE_COLOURS
    parts.append(line([at(point.share, point.speed) for point in split], colours["memory"]))
    for point in points:
        x, y = at(point.share, point.speed)
        words = "co-resident" if point.sms == "all" else f"{point.sms} SMs"
        parts.append(dot(x, y, colours["network" if point.sms == "all" else "memory"], _told(point, words)))
        if point.sms == "all":
            parts.append(text(x - 7, y - 4, words, anchor="end", size=11))
        else:
            parts.append(text(x + 7, y + 4, words, anchor="start", size=11))
    return parts


def _told(point: CurvePoint, words: str) -> str:
    watts = f", {point.watts:.0f} W" if point.watts == point.watts else ""
    return f"{words}: R {point.kept:.2f}, P {point.speed:.2f}, spread {point.spread:.2f}{watts}"
