"""Polygons that glyphs are made of.

A glyph is a list of parts ``(role, points)``. ``points`` is a float array (n, 2) of a closed polygon with x to the right
and y down, roughly inside [-1, 1]; ``role`` says what the part is, so that a drawing style can choose its colour:

======  =============================================
``b``   body, the object's main colour
``d``   the same colour, darker
``l``   the same colour, lighter
``a``   an accent in a second colour
``k``   nearly black (wheels, eyes, thin rods)
``w``   nearly white or pale blue (windows, screens)
``s``   skin
``g``   green (leaves)
``n``   brown (wood, earth)
======  =============================================
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Part = tuple[str, Points]


def poly(role: str, *xy: float) -> Part:
    return role, np.asarray(xy, dtype=np.float64).reshape(-1, 2)


def rect(role: str, x0: float, y0: float, x1: float, y1: float) -> Part:
    return poly(role, x0, y0, x1, y0, x1, y1, x0, y1)


def ellipse(role: str, cx: float, cy: float, rx: float, ry: float | None = None, *, turn: float = 0.0, n: int = 16) -> Part:
    """An ellipse of ``n`` corners, turned by ``turn`` radians."""
    angle = np.linspace(0.0, 2.0 * np.pi, n, endpoint=False)
    x, y = rx * np.cos(angle), (rx if ry is None else ry) * np.sin(angle)
    cos, sin = np.cos(turn), np.sin(turn)
    return role, np.stack([cx + cos * x - sin * y, cy + sin * x + cos * y], axis=1)


def arc(role: str, cx: float, cy: float, outer: float, inner: float, start: float = 0.0, stop: float = 2.0 * np.pi) -> Part:
    """A thick arc, or a ring when it goes all the way round."""
    angle = np.linspace(start, stop, 19)
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return role, np.concatenate([outer * ray, inner * ray[::-1]]) + (cx, cy)


def line(role: str, x0: float, y0: float, x1: float, y1: float, width: float = 0.08) -> Part:
    """A bar from one point to another."""
    dx, dy = x1 - x0, y1 - y0
    scale = 0.5 * width / max(float(np.hypot(dx, dy)), 1e-6)
    nx, ny = -dy * scale, dx * scale
    return poly(role, x0 + nx, y0 + ny, x1 + nx, y1 + ny, x1 - nx, y1 - ny, x0 - nx, y0 - ny)


def bumpy(role: str, cx: float, cy: float, rx: float, ry: float, bumps: int, depth: float) -> Part:
    """An ellipse with a scalloped edge: wool, foliage, clouds."""
    angle = np.linspace(0.0, 2.0 * np.pi, 6 * bumps, endpoint=False)
    radius = 1.0 + depth * np.abs(np.sin(0.5 * bumps * angle))
    return role, np.stack([cx + rx * radius * np.cos(angle), cy + ry * radius * np.sin(angle)], axis=1)


def wheel(cx: float, cy: float, r: float) -> list[Part]:
    return [ellipse("k", cx, cy, r, n=14), ellipse("l", cx, cy, 0.45 * r, n=8)]
