"""The things the drawn data set can draw: 20 VOC classes and 16 others, as parts in a unit square.

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

Every glyph takes a generator and varies its own proportions, so two horses are never the same horse.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Part = tuple[str, Points]
Glyph = Callable[[np.random.Generator], list[Part]]

GLYPHS: dict[str, Glyph] = {}


def _glyph(function: Glyph) -> Glyph:
    GLYPHS[function.__name__.strip("_")] = function
    return function


# ---------------------------------------------------------------------------------------------------- primitives
def _poly(role: str, *xy: float) -> Part:
    return role, np.asarray(xy, dtype=np.float64).reshape(-1, 2)


def _rect(role: str, x0: float, y0: float, x1: float, y1: float) -> Part:
    return _poly(role, x0, y0, x1, y0, x1, y1, x0, y1)


def _ellipse(role: str, cx: float, cy: float, rx: float, ry: float | None = None, *, turn: float = 0.0, n: int = 16) -> Part:
    """An ellipse of ``n`` corners, turned by ``turn`` radians."""
    angle = np.linspace(0.0, 2.0 * np.pi, n, endpoint=False)
    x, y = rx * np.cos(angle), (rx if ry is None else ry) * np.sin(angle)
    cos, sin = np.cos(turn), np.sin(turn)
    return role, np.stack([cx + cos * x - sin * y, cy + sin * x + cos * y], axis=1)


def _arc(role: str, cx: float, cy: float, outer: float, inner: float, start: float = 0.0, stop: float = 2.0 * np.pi) -> Part:
    """A thick arc, or a ring when it goes all the way round."""
    angle = np.linspace(start, stop, 19)
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return role, np.concatenate([outer * ray, inner * ray[::-1]]) + (cx, cy)


def _line(role: str, x0: float, y0: float, x1: float, y1: float, width: float = 0.08) -> Part:
    """A bar from one point to another."""
    dx, dy = x1 - x0, y1 - y0
    scale = 0.5 * width / max(float(np.hypot(dx, dy)), 1e-6)
    nx, ny = -dy * scale, dx * scale
    return _poly(role, x0 + nx, y0 + ny, x1 + nx, y1 + ny, x1 - nx, y1 - ny, x0 - nx, y0 - ny)


def _bumpy(role: str, cx: float, cy: float, rx: float, ry: float, bumps: int, depth: float) -> Part:
    """An ellipse with a scalloped edge: wool, foliage, clouds."""
    angle = np.linspace(0.0, 2.0 * np.pi, 6 * bumps, endpoint=False)
    radius = 1.0 + depth * np.abs(np.sin(0.5 * bumps * angle))
    return role, np.stack([cx + rx * radius * np.cos(angle), cy + ry * radius * np.sin(angle)], axis=1)


def _wheel(cx: float, cy: float, r: float) -> list[Part]:
    return [_ellipse("k", cx, cy, r, n=14), _ellipse("l", cx, cy, 0.45 * r, n=8)]


# ------------------------------------------------------------------------------------------------------ vehicles
@_glyph
def _aeroplane(r: np.random.Generator) -> list[Part]:
    sweep, span, thick = r.uniform(0.15, 0.45), r.uniform(0.65, 0.95), r.uniform(0.1, 0.16)
    parts = [
        _poly("d", 0.2, -0.05, -0.15, -0.05, -0.15 - sweep, -span, 0.02 - sweep, -span),
        _poly("d", 0.2, 0.05, -0.15, 0.05, -0.15 - sweep, span, 0.02 - sweep, span),
        _poly("a", -0.62, 0, -0.8, 0, -0.98, -0.34, -0.82, -0.34),
        _poly("a", -0.62, 0, -0.8, 0, -0.98, 0.34, -0.82, 0.34),
        _ellipse("b", 0.0, 0.0, 0.97, thick, n=20),
        _ellipse("w", 0.76, 0.0, 0.09, 0.6 * thick, n=8),
    ]
    return parts + [_ellipse("k", x, 0.0, 0.03, n=6) for x in np.arange(-0.4, 0.5, 0.2)]


@_glyph
def _bicycle(r: np.random.Generator) -> list[Part]:
    wheel, gap = r.uniform(0.36, 0.44), r.uniform(0.5, 0.58)
    width = r.uniform(0.06, 0.1)
    seat, bars, hub = (-0.25, -0.42), (0.36, -0.5), (-0.05, 0.35)
    parts = [_arc("k", x, 0.38, wheel, wheel - 0.09) for x in (-gap, gap)]
    parts += [_line("k", -gap, 0.38 - wheel, -gap, 0.38 + wheel, 0.03), _line("k", gap, 0.38 - wheel, gap, 0.38 + wheel, 0.03)]
    frame = [(-gap, 0.38, *hub), (-gap, 0.38, *seat), (*seat, *hub), (*seat, 0.32, -0.3), (*hub, 0.32, -0.3), (gap, 0.38, *bars)]
    parts += [_line("b", *segment, width) for segment in frame]
    return parts + [
        _ellipse("d", seat[0], seat[1] - 0.05, 0.17, 0.06, n=8),
        _line("k", bars[0] - 0.18, bars[1] - 0.06, bars[0] + 0.1, bars[1], 0.08),
        _ellipse("a", hub[0], hub[1], 0.09, n=8),
    ]


@_glyph
def _boat(r: np.random.Generator) -> list[Part]:
    deep = r.uniform(0.3, 0.42)
    hull = _poly("b", -0.95, 0.35, 0.98, 0.35, 0.65, 0.35 + deep, -0.7, 0.35 + deep)
    stripe = _poly("a", -0.95, 0.35, 0.98, 0.35, 0.9, 0.45, -0.88, 0.45)
    if r.random() < 0.65:
        mast = r.uniform(-0.15, 0.1)
        return [
            _line("n", mast, -0.95, mast, 0.38, 0.07),
            _poly("w", mast + 0.06, -0.9, mast + 0.06, 0.2, mast + r.uniform(0.6, 0.8), 0.2),
            _poly("l", mast - 0.06, -0.7, mast - 0.06, 0.2, mast - r.uniform(0.4, 0.6), 0.2),
            hull,
            stripe,
        ]
    return [
        _rect("l", -0.5, -0.08, 0.4, 0.35),
        *(_rect("w", x, 0.02, x + 0.16, 0.18) for x in (-0.42, -0.15, 0.12)),
        _poly("d", -0.25, -0.08, -0.2, -0.5, 0.02, -0.5, 0.05, -0.08),
        _rect("a", -0.22, -0.42, 0.03, -0.3),
        hull,
        stripe,
    ]


@_glyph
def _bus(r: np.random.Generator) -> list[Part]:
    top, n = -r.uniform(0.5, 0.62), int(r.integers(4, 6))
    step = 1.45 / n
    parts = [_poly("b", -0.9, top, 0.88, top, 0.97, top + 0.12, 0.97, 0.42, -0.97, 0.42, -0.97, top + 0.1)]
    parts += [_rect("w", -0.88 + i * step, top + 0.14, -0.88 + (i + 0.8) * step, top + 0.46) for i in range(n)]
    return parts + [
        _rect("l", 0.62, top + 0.14, 0.88, 0.36),
        _rect("a", -0.97, 0.1, 0.6, 0.2),
        *_wheel(-0.55, 0.45, 0.19),
        *_wheel(0.45, 0.45, 0.19),
    ]


@_glyph
def _car(r: np.random.Generator) -> list[Part]:
    roof, nose = -r.uniform(0.36, 0.5), r.uniform(0.42, 0.6)
    return [
        _poly("d", -0.62, -0.02, -0.4, roof, 0.22, roof, nose, -0.02),
        _poly("w", -0.48, -0.04, -0.34, roof + 0.08, -0.08, roof + 0.08, -0.08, -0.04),
        _poly("w", 0.0, -0.04, 0.0, roof + 0.08, 0.18, roof + 0.08, nose - 0.14, -0.04),
        _poly("b", -0.97, 0.02, -0.9, -0.05, 0.6, -0.05, 0.95, 0.08, 0.98, 0.35, -0.97, 0.35),
        _ellipse("a", 0.88, 0.14, 0.07, n=8),
        *_wheel(-0.55, 0.37, 0.22),
        *_wheel(0.55, 0.37, 0.22),
    ]


@_glyph
def _motorbike(r: np.random.Generator) -> list[Part]:
    wheel = r.uniform(0.31, 0.37)
    return [
        *(part for x in (-0.6, 0.6) for part in (_ellipse("k", x, 0.4, wheel), _ellipse("w", x, 0.4, 0.5 * wheel, n=10))),
        _line("d", 0.6, 0.4, 0.36, -0.42, 0.12),
        _line("d", -0.6, 0.4, -0.1, 0.2, 0.12),
        _poly("k", -0.3, 0.02, 0.25, 0.02, 0.2, 0.42, -0.22, 0.42),
        _poly("b", -0.15, -0.08, 0.02, -0.3, 0.36, -0.24, 0.32, 0.08, -0.12, 0.08),
        _poly("n", -0.85, -0.22, -0.1, -0.12, -0.12, 0.08, -0.6, 0.04),
        _line("k", 0.18, -0.5, 0.46, -0.42, 0.1),
        _ellipse("a", 0.5, -0.26, 0.11, n=8),
        _line("l", -0.2, 0.45, -0.9, 0.5, 0.1),
    ]


@_glyph
def _train(r: np.random.Generator) -> list[Part]:
    if r.random() < 0.5:  # an old engine with boiler, cab and chimney
        return [
            _rect("k", -0.98, 0.62, 0.98, 0.7),
            _rect("d", -0.9, -0.55, -0.32, 0.32),
            _rect("a", -0.97, -0.66, -0.25, -0.52),
            _rect("w", -0.78, -0.38, -0.46, -0.08),
            _rect("b", -0.32, -0.2, 0.75, 0.32),
            _poly("d", 0.42, -0.2, 0.36, -0.66, 0.68, -0.66, 0.6, -0.2),
            _ellipse("l", 0.02, -0.22, 0.13, 0.12, n=10),
            _poly("a", 0.75, 0.32, 0.98, 0.6, 0.55, 0.6, 0.55, 0.32),
            *(_ellipse("k", x, 0.42, 0.2, n=12) for x in (-0.65, -0.2, 0.25)),
            _line("l", -0.65, 0.42, 0.25, 0.42, 0.06),
        ]
    parts = [  # a long railcar with a slanted nose
        _rect("k", -0.99, 0.42, 0.99, 0.48),
        _poly("b", -0.98, -0.3, 0.55, -0.3, 0.98, 0.1, 0.98, 0.26, -0.98, 0.26),
        _rect("a", -0.98, 0.08, 0.8, 0.15),
        _poly("w", 0.42, -0.22, 0.55, -0.22, 0.78, 0.02, 0.42, 0.02),
    ]
    parts += [_rect("w", x, -0.2, x + 0.15, 0.0) for x in (-0.88, -0.64, -0.4, -0.16, 0.08)]
    return parts + [_ellipse("k", x, 0.33, 0.1, n=10) for x in (-0.8, -0.56, -0.08, 0.16, 0.6, 0.82)]


# ------------------------------------------------------------------------------------------------------- animals
def _four_legs(
    r: np.random.Generator, body: tuple[float, float, float, float], length: float, thick: float, role: str = "d"
) -> list[Part]:
    """Legs under a body given as centre and radii; the stride differs from animal to animal."""
    cx, cy, rx, ry = body
    foot = cy + ry + length
    parts = []
    for at in (-0.78, -0.45, 0.45, 0.78):
        x, lean = cx + at * rx, r.uniform(-0.1, 0.1)
        parts.append(_line(role, x, cy + 0.3 * ry, x + lean, foot, thick))
    return parts


@_glyph
def _bird(r: np.random.Generator) -> list[Part]:
    lift = r.uniform(-0.6, 0.1)
    return [
        _line("k", -0.05, 0.3, -0.1, 0.8, 0.05),
        _line("k", 0.12, 0.3, 0.1, 0.8, 0.05),
        _poly("d", -0.4, 0.0, -0.98, -0.12, -0.95, 0.22, -0.4, 0.25),
        _ellipse("b", 0.0, 0.1, 0.55, 0.33, turn=-0.25),
        _ellipse("b", 0.48, -0.3, 0.25),
        _poly("a", 0.68, -0.38, 0.99, -0.25, 0.68, -0.18),
        _ellipse("k", 0.55, -0.36, 0.05, n=8),
        _poly("l", 0.22, 0.0, -0.3, 0.22, -0.62, lift),
    ]


@_glyph
def _cat(r: np.random.Generator) -> list[Part]:
    head = (0.28, -0.38)
    return [
        _arc("d", -0.62, 0.1, 0.34, 0.2, np.pi * 0.55, np.pi * (1.5 + r.uniform(-0.1, 0.3))),
        _ellipse("b", -0.08, 0.32, 0.5, 0.5),
        _ellipse("l", 0.12, 0.42, 0.22, 0.36),
        _line("b", 0.08, 0.3, 0.1, 0.88, 0.17),
        _line("b", 0.32, 0.3, 0.34, 0.88, 0.17),
        _ellipse("d", -0.35, 0.76, 0.32, 0.14),
        _poly("b", head[0] - 0.36, head[1] - 0.05, head[0] - 0.34, head[1] - 0.58, head[0] - 0.02, head[1] - 0.25),
        _poly("b", head[0] + 0.36, head[1] - 0.05, head[0] + 0.34, head[1] - 0.58, head[0] + 0.02, head[1] - 0.25),
        _ellipse("b", *head, 0.37, 0.32),
        _ellipse("g", head[0] - 0.15, head[1] - 0.05, 0.07, n=8),
        _ellipse("g", head[0] + 0.15, head[1] - 0.05, 0.07, n=8),
        _poly("a", head[0] - 0.05, head[1] + 0.08, head[0] + 0.05, head[1] + 0.08, head[0], head[1] + 0.15),
        _line("k", head[0] - 0.45, head[1] + 0.08, head[0] - 0.12, head[1] + 0.12, 0.03),
        _line("k", head[0] + 0.45, head[1] + 0.08, head[0] + 0.12, head[1] + 0.12, 0.03),
    ]


@_glyph
def _cow(r: np.random.Generator) -> list[Part]:
    body = (-0.12, -0.05, 0.68, 0.34)
    spots = [
        _ellipse("k", r.uniform(-0.55, 0.2), r.uniform(-0.2, 0.1), r.uniform(0.1, 0.18), r.uniform(0.08, 0.14), n=9)
        for _ in range(3)
    ]
    return [
        _line("k", -0.76, -0.25, -0.92, 0.35, 0.06),
        *_four_legs(r, body, 0.42, 0.14),
        _ellipse("s", -0.3, 0.3, 0.16, 0.14, n=10),
        _poly("b", -0.78, -0.34, 0.5, -0.36, 0.56, 0.2, 0.4, 0.3, -0.62, 0.3, -0.8, 0.15),
        *spots,
        _poly("l", 0.5, -0.52, 0.66, -0.5, 0.56, -0.8),
        _poly("l", 0.78, -0.5, 0.94, -0.52, 0.96, -0.82),
        _ellipse("d", 0.45, -0.4, 0.14, 0.07, n=8),
        _poly("b", 0.52, -0.55, 0.92, -0.55, 0.9, -0.12, 0.58, -0.12),
        _ellipse("s", 0.75, -0.1, 0.19, 0.12, n=10),
        _ellipse("k", 0.63, -0.38, 0.05, n=6),
        _ellipse("k", 0.82, -0.38, 0.05, n=6),
    ]


@_glyph
def _dog(r: np.random.Generator) -> list[Part]:
    body = (-0.15, 0.05, 0.52, 0.24)
    tail = r.uniform(-0.6, -0.25)
    return [
        _line("d", -0.6, -0.05, -0.92, tail, 0.11),
        *_four_legs(r, body, 0.5, 0.14, "b"),
        _ellipse("b", *body),
        _poly("b", 0.1, 0.05, 0.38, -0.5, 0.65, -0.3, 0.42, 0.22),
        _ellipse("b", 0.5, -0.45, 0.27, 0.23),
        _ellipse("l", 0.78, -0.36, 0.21, 0.13, n=10),
        _ellipse("k", 0.95, -0.42, 0.07, n=8),
        _ellipse("d", 0.33, -0.34, 0.12, 0.29, turn=0.25, n=10),
        _ellipse("k", 0.58, -0.53, 0.05, n=6),
        _line("a", 0.22, -0.06, 0.55, -0.12, 0.1),
    ]


@_glyph
def _horse(r: np.random.Generator) -> list[Part]:
    body = (-0.15, 0.0, 0.52, 0.25)
    rear = r.uniform(-0.05, 0.1)
    return [
        _poly("k", -0.62, -0.15, -0.92, 0.1, -0.9, 0.55, -0.76, 0.2),
        *_four_legs(r, body, 0.68, 0.11),
        _ellipse("b", *body),
        _poly("b", 0.05, -0.1, 0.42, -0.86 + rear, 0.68, -0.75 + rear, 0.36, 0.14),
        _poly("b", 0.42, -0.92 + rear, 0.6, -0.92 + rear, 0.95, -0.5 + rear, 0.84, -0.36 + rear, 0.5, -0.58 + rear),
        _poly("k", 0.42, -0.96 + rear, 0.3, -0.8 + rear, -0.02, -0.15, 0.14, -0.12, 0.46, -0.75 + rear),
        _poly("b", 0.44, -0.88 + rear, 0.46, -1.05 + rear, 0.56, -0.88 + rear),
        _ellipse("k", 0.6, -0.74 + rear, 0.04, n=6),
    ]


@_glyph
def _sheep(r: np.random.Generator) -> list[Part]:
    body = (-0.1, 0.0, 0.6, 0.4)
    return [
        *_four_legs(r, body, 0.32, 0.13, "k"),
        _bumpy("w", *body, bumps=int(r.integers(9, 13)), depth=0.2),
        _ellipse("k", 0.48, -0.2, 0.1, 0.18, turn=0.9, n=8),
        _ellipse("k", 0.64, -0.1, 0.2, 0.27, turn=-0.35),
        _bumpy("w", 0.56, -0.36, 0.18, 0.11, bumps=5, depth=0.25),
        _ellipse("w", 0.66, -0.16, 0.05, n=6),
    ]


@_glyph
def _person(r: np.random.Generator) -> list[Part]:
    left, right, step = r.uniform(-0.3, 0.8), r.uniform(-0.3, 0.8), r.uniform(0.08, 0.28)
    parts = [
        _line("d", -0.1, 0.25, -step, 0.95, 0.17),
        _line("d", 0.1, 0.25, step, 0.95, 0.17),
        _line("s", -0.22, -0.36, -0.5, -0.36 + 0.55 * left, 0.12),
        _line("s", 0.22, -0.36, 0.5, -0.36 + 0.55 * right, 0.12),
    ]
    if r.random() < 0.35:
        parts.append(_poly("b", -0.2, -0.45, 0.2, -0.45, 0.38, 0.45, -0.38, 0.45))
    else:
        parts.append(_poly("b", -0.28, -0.45, 0.28, -0.45, 0.2, 0.3, -0.2, 0.3))
    hair = [_ellipse("k", 0.0, -0.76, 0.22, 0.2)] if r.random() < 0.6 else [_ellipse("n", 0.0, -0.66, 0.25, 0.3)]
    return parts + hair + [_rect("s", -0.07, -0.55, 0.07, -0.42), _ellipse("s", 0.0, -0.66, 0.18, 0.2)]


# ----------------------------------------------------------------------------------------------- things in rooms
@_glyph
def _bottle(r: np.random.Generator) -> list[Part]:
    wide, neck, shoulder = r.uniform(0.24, 0.34), r.uniform(0.08, 0.12), r.uniform(-0.45, -0.2)
    return [
        _poly(
            "b",
            -wide,
            0.95,
            -wide,
            shoulder + 0.2,
            -neck,
            shoulder - 0.1,
            -neck,
            -0.85,
            neck,
            -0.85,
            neck,
            shoulder - 0.1,
            wide,
            shoulder + 0.2,
            wide,
            0.95,
        ),
        _rect("a", -neck - 0.04, -0.98, neck + 0.04, -0.82),
        _rect("w", -wide, 0.1, wide, 0.58),
        _rect("d", -0.5 * wide, 0.24, 0.5 * wide, 0.42),
    ]


@_glyph
def _chair(r: np.random.Generator) -> list[Part]:
    back, seat = -r.uniform(0.8, 0.97), r.uniform(0.05, 0.2)
    return [
        _line("d", -0.2, seat, -0.2, 0.8, 0.09),
        _line("d", 0.55, seat - 0.12, 0.55, 0.72, 0.09),
        _line("b", -0.45, back, -0.42, 0.95, 0.11),
        _line("b", 0.05, back + 0.08, 0.05, seat, 0.11),
        *(_line("l", -0.43, y, 0.05, y + 0.06, 0.12) for y in np.linspace(back + 0.12, seat - 0.3, int(r.integers(2, 4)))),
        _poly("b", -0.48, seat, 0.1, seat - 0.16, 0.66, seat - 0.06, 0.2, seat + 0.14, -0.48, seat + 0.12),
        _line("b", 0.3, seat, 0.3, 0.95, 0.1),
    ]


@_glyph
def _diningtable(r: np.random.Generator) -> list[Part]:
    top = -r.uniform(0.15, 0.35)
    legs = [_line("n", x, top, x * 0.97, y, 0.1) for x, y in ((-0.8, 0.75), (0.8, 0.75), (-0.5, 0.5), (0.5, 0.5))]
    if r.random() < 0.5:
        surface = [_ellipse("b", 0.0, top, 0.98, 0.25, n=20)]
    else:
        surface = [
            _poly("b", -0.7, top - 0.22, 0.7, top - 0.22, 0.98, top + 0.16, -0.98, top + 0.16),
            _rect("d", -0.98, top + 0.16, 0.98, top + 0.26),
        ]
    plates = [_ellipse("w", x, top - 0.02, 0.2, 0.08, n=12) for x in (-0.42, 0.4)]
    return legs + surface + plates + [_rect("a", -0.07, top - 0.3, 0.07, top)]


@_glyph
def _pottedplant(r: np.random.Generator) -> list[Part]:
    parts: list[Part] = []
    for angle in np.linspace(-1.15, 1.15, int(r.integers(5, 8))) + r.uniform(-0.1, 0.1):
        reach = r.uniform(0.5, 0.62)
        x, y = reach * np.sin(angle), 0.2 - reach * np.cos(angle) * 1.1
        parts.append(_ellipse("g", x, y, 0.13, 0.42, turn=angle, n=12))
    return parts + [_poly("b", -0.4, 0.28, 0.4, 0.28, 0.28, 0.95, -0.28, 0.95), _rect("d", -0.46, 0.16, 0.46, 0.34)]


@_glyph
def _sofa(r: np.random.Generator) -> list[Part]:
    back, n = -r.uniform(0.4, 0.55), int(r.integers(2, 4))
    edges = np.linspace(-0.68, 0.68, n + 1)
    return [
        *(_rect("n", x, 0.4, x + 0.12, 0.58) for x in (-0.85, 0.73)),
        _poly("d", -0.78, 0.1, -0.72, back, 0.72, back, 0.78, 0.1),
        *(_rect("b", a + 0.02, back + 0.1, b - 0.02, 0.08) for a, b in zip(edges[:-1], edges[1:], strict=True)),
        *(_rect("l", a, 0.05, b, 0.24) for a, b in zip(edges[:-1], edges[1:], strict=True)),
        _rect("b", -0.7, 0.22, 0.7, 0.45),
        _ellipse("a", r.uniform(-0.5, 0.5), -0.05, 0.14, n=4),
        _poly("b", -0.98, -0.12, -0.68, -0.12, -0.66, 0.45, -0.96, 0.45),
        _poly("b", 0.98, -0.12, 0.68, -0.12, 0.66, 0.45, 0.96, 0.45),
    ]


@_glyph
def _tvmonitor(r: np.random.Generator) -> list[Part]:
    low = r.uniform(0.35, 0.5)
    parts = [
        _rect("d", -0.1, low, 0.1, 0.7),
        _ellipse("d", 0.0, 0.72, 0.45, 0.1, n=12),
        _rect("b", -0.92, -0.75, 0.92, low),
        _rect("w", -0.8, -0.64, 0.8, low - 0.12),
        _poly("l", -0.7, low - 0.2, -0.3, -0.56, -0.05, -0.56, -0.45, low - 0.2),
    ]
    if r.random() < 0.4:
        parts += [_line("k", 0.0, -0.75, -0.35, -1.0, 0.05), _line("k", 0.0, -0.75, 0.35, -1.0, 0.05)]
    return parts


# ------------------------------------------------------------------------------------- the other sixteen classes
def _rays(n: int, outer: float, inner: float) -> list[float]:
    angle = np.arange(2 * n) * np.pi / n - 0.5 * np.pi
    radius = np.where(np.arange(2 * n) % 2 == 0, outer, inner)
    return [float(v) for v in np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()]


@_glyph
def _star(r: np.random.Generator) -> list[Part]:
    n = int(r.integers(5, 7))
    return [_poly("b", *_rays(n, 0.97, r.uniform(0.36, 0.48))), _poly("l", *_rays(n, 0.45, 0.2))]


@_glyph
def _cross(r: np.random.Generator) -> list[Part]:
    w = r.uniform(0.2, 0.3)
    return [
        _poly("b", -w, -0.95, w, -0.95, w, -w, 0.95, -w, 0.95, w, w, w, w, 0.95, -w, 0.95, -w, w, -0.95, w, -0.95, -w, -w, -w)
    ]


@_glyph
def _ring(r: np.random.Generator) -> list[Part]:
    inner = r.uniform(0.5, 0.65)
    return [_arc("b", 0, 0, 0.95, inner), _arc("l", 0, 0, 0.82, inner + 0.1)]


@_glyph
def _arrow(r: np.random.Generator) -> list[Part]:
    w, head = r.uniform(0.12, 0.2), r.uniform(0.1, 0.3)
    return [_poly("b", -0.95, -w, head, -w, head, -0.5, 0.98, 0, head, 0.5, head, w, -0.95, w)]


@_glyph
def _tree(r: np.random.Generator) -> list[Part]:
    trunk = _rect("n", -0.12, 0.2, 0.12, 0.97)
    if r.random() < 0.5:
        return [trunk, _bumpy("g", 0.0, -0.3, 0.55, 0.5, bumps=9, depth=0.2)]
    return [
        trunk,
        *(_poly("g", -0.62 + 0.12 * i, 0.45 - 0.4 * i, 0.62 - 0.12 * i, 0.45 - 0.4 * i, 0, -0.25 - 0.36 * i) for i in range(3)),
    ]


@_glyph
def _house(r: np.random.Generator) -> list[Part]:
    eave = r.uniform(-0.25, -0.05)
    return [
        _rect("a", 0.35, -0.8, 0.52, eave),
        _rect("b", -0.72, eave, 0.72, 0.9),
        _poly("d", -0.92, eave, 0, -0.92, 0.92, eave),
        _rect("n", -0.16, 0.3, 0.16, 0.9),
        _rect("w", -0.58, 0.1, -0.28, 0.42),
        _rect("w", 0.28, 0.1, 0.58, 0.42),
    ]


@_glyph
def _mushroom(r: np.random.Generator) -> list[Part]:
    stem, angle = r.uniform(0.16, 0.26), np.linspace(np.pi, 2 * np.pi, 13)
    cap = np.stack([0.9 * np.cos(angle), 0.1 + 0.85 * np.sin(angle)], axis=1)
    return [_rect("l", -stem, 0.05, stem, 0.9), ("b", cap)] + [
        _ellipse("w", x, y, 0.11, n=9) for x, y in ((-0.45, -0.2), (0.0, -0.48), (0.42, -0.15))
    ]


@_glyph
def _umbrella(r: np.random.Generator) -> list[Part]:
    angle = np.linspace(np.pi, 2 * np.pi, 13)
    edge = np.array([[0.96, 0.0], [0.64, -0.12], [0.32, 0.0], [0.0, -0.12], [-0.32, 0.0], [-0.64, -0.12]])
    canopy = np.concatenate([np.stack([0.96 * np.cos(angle), 0.85 * np.sin(angle)], axis=1), edge])
    return [
        _line("k", 0, -0.95, 0, 0.75, 0.07),
        _arc("k", 0.13, 0.75, 0.17, 0.1, 0.0, np.pi),
        ("b", canopy),
        _poly("l", 0, -0.84, 0.32, 0.0, 0.0, -0.12, -0.32, 0.0),
    ]


@_glyph
def _fish(r: np.random.Generator) -> list[Part]:
    ry = r.uniform(0.32, 0.45)
    return [
        _poly("d", -0.5, 0, -0.97, -0.4, -0.85, 0, -0.97, 0.4),
        _poly("a", -0.2, -ry * 0.8, 0.2, -ry * 0.9, -0.15, -ry - 0.25),
        _ellipse("b", 0.15, 0, 0.75, ry, n=18),
        _ellipse("w", 0.6, -0.1, 0.1, n=9),
        _ellipse("k", 0.62, -0.1, 0.05, n=6),
        _arc("d", 0.25, 0.0, 0.28, 0.2, -0.9, 0.9),
    ]


@_glyph
def _moon(r: np.random.Generator) -> list[Part]:
    turn = r.uniform(-0.5, 0.5)
    outer, inner = np.linspace(-2.2, 2.2, 18), np.linspace(1.75, -1.75, 14)
    points = np.concatenate(
        [
            np.stack([-0.9 * np.cos(outer), 0.9 * np.sin(outer)], axis=1),
            np.stack([0.45 - 0.8 * np.cos(inner), 0.74 * np.sin(inner)], axis=1),
        ]
    )
    cos, sin = np.cos(turn), np.sin(turn)
    return [("b", points @ np.array([[cos, sin], [-sin, cos]]))]


@_glyph
def _heart(r: np.random.Generator) -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 26, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [
        ("b", np.stack([x / 17.0, -y * r.uniform(0.9, 1.1) / 17.0], axis=1)),
        _ellipse("l", -0.42, -0.35, 0.12, 0.2, turn=0.5, n=8),
    ]


@_glyph
def _cloud(r: np.random.Generator) -> list[Part]:
    outline = _bumpy("l", 0.0, 0.0, 0.82, 0.42, bumps=int(r.integers(6, 9)), depth=0.25)
    return [outline, _ellipse("w", -0.2, -0.1, 0.4, 0.22)]


@_glyph
def _flower(r: np.random.Generator) -> list[Part]:
    n = int(r.integers(5, 8))
    petals = [
        _ellipse("b", 0.4 * np.cos(a), -0.35 + 0.4 * np.sin(a), 0.3, 0.17, turn=float(a), n=10)
        for a in np.arange(n) * 2 * np.pi / n
    ]
    return [
        _line("g", 0, -0.2, 0, 0.97, 0.09),
        _ellipse("g", 0.24, 0.6, 0.27, 0.1, turn=-0.5, n=10),
        *petals,
        _ellipse("a", 0, -0.35, 0.2, n=12),
    ]


@_glyph
def _clock(r: np.random.Generator) -> list[Part]:
    hands = r.uniform(0, 2 * np.pi, 2)
    ticks = [
        _line("k", 0.6 * np.cos(a), 0.6 * np.sin(a), 0.72 * np.cos(a), 0.72 * np.sin(a), 0.07) for a in np.arange(4) * np.pi / 2
    ]
    return [
        _ellipse("b", 0, 0, 0.95, n=22),
        _ellipse("w", 0, 0, 0.78, n=20),
        *ticks,
        _line("k", 0, 0, 0.6 * np.cos(hands[0]), 0.6 * np.sin(hands[0]), 0.07),
        _line("k", 0, 0, 0.4 * np.cos(hands[1]), 0.4 * np.sin(hands[1]), 0.1),
    ]


@_glyph
def _ladder(r: np.random.Generator) -> list[Part]:
    top = r.uniform(0.22, 0.34)
    rungs = [_line("l", -0.4, y, 0.4, y, 0.08) for y in np.linspace(-0.75, 0.75, int(r.integers(5, 7)))]
    return rungs + [_line("b", -top - 0.05, -0.97, -0.42, 0.97, 0.11), _line("b", top + 0.05, -0.97, 0.42, 0.97, 0.11)]


@_glyph
def _flag(r: np.random.Generator) -> list[Part]:
    low = r.uniform(0.0, 0.2)
    y = np.linspace(-0.85, low, 4)
    bands = [
        _poly(role, -0.6, a, 0.1, a + 0.1, 0.85, a, 0.85, b, 0.1, b + 0.1, -0.6, b)
        for role, a, b in zip("bwa", y[:-1], y[1:], strict=True)
    ]
    return [_line("n", -0.65, -0.97, -0.65, 0.97, 0.1), *bands]
