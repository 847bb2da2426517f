"""The things the drawn data set can draw: 20 VOC classes and 16 others, in the parts of :mod:`trm_pipeline.drawn.shapes`.

Every glyph takes a generator and varies its own proportions, so two horses are never the same horse.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trm_pipeline.drawn.shapes import Part, arc, bumpy, ellipse, line, poly, rect, wheel

Glyph = Callable[[np.random.Generator], list[Part]]


# ------------------------------------------------------------------------------------------------------ vehicles
def _aeroplane(r: np.random.Generator) -> list[Part]:
    sweep, span, thick = r.uniform(0.15, 0.45), r.uniform(0.65, 0.95), r.uniform(0.1, 0.16)
    parts = [
        poly("d", 0.2, -0.05, -0.15, -0.05, -0.15 - sweep, -span, 0.02 - sweep, -span),
        poly("d", 0.2, 0.05, -0.15, 0.05, -0.15 - sweep, span, 0.02 - sweep, span),
        poly("a", -0.62, 0, -0.8, 0, -0.98, -0.34, -0.82, -0.34),
        poly("a", -0.62, 0, -0.8, 0, -0.98, 0.34, -0.82, 0.34),
        ellipse("b", 0.0, 0.0, 0.97, thick, n=20),
        ellipse("w", 0.76, 0.0, 0.09, 0.6 * thick, n=8),
    ]
    return parts + [ellipse("k", x, 0.0, 0.03, n=6) for x in np.arange(-0.4, 0.5, 0.2)]


def _bicycle(r: np.random.Generator) -> list[Part]:
    wheel, gap = r.uniform(0.36, 0.44), r.uniform(0.5, 0.58)
    width = r.uniform(0.06, 0.1)
    seat, bars, hub = (-0.25, -0.42), (0.36, -0.5), (-0.05, 0.35)
    parts = [arc("k", x, 0.38, wheel, wheel - 0.09) for x in (-gap, gap)]
    parts += [line("k", -gap, 0.38 - wheel, -gap, 0.38 + wheel, 0.03), line("k", gap, 0.38 - wheel, gap, 0.38 + wheel, 0.03)]
    frame = [(-gap, 0.38, *hub), (-gap, 0.38, *seat), (*seat, *hub), (*seat, 0.32, -0.3), (*hub, 0.32, -0.3), (gap, 0.38, *bars)]
    parts += [line("b", *segment, width) for segment in frame]
    return parts + [
        ellipse("d", seat[0], seat[1] - 0.05, 0.17, 0.06, n=8),
        line("k", bars[0] - 0.18, bars[1] - 0.06, bars[0] + 0.1, bars[1], 0.08),
        ellipse("a", hub[0], hub[1], 0.09, n=8),
    ]


def _boat(r: np.random.Generator) -> list[Part]:
    deep = r.uniform(0.3, 0.42)
    hull = poly("b", -0.95, 0.35, 0.98, 0.35, 0.65, 0.35 + deep, -0.7, 0.35 + deep)
    stripe = poly("a", -0.95, 0.35, 0.98, 0.35, 0.9, 0.45, -0.88, 0.45)
    if r.random() < 0.65:
        mast = r.uniform(-0.15, 0.1)
        return [
            line("n", mast, -0.95, mast, 0.38, 0.07),
            poly("w", mast + 0.06, -0.9, mast + 0.06, 0.2, mast + r.uniform(0.6, 0.8), 0.2),
            poly("l", mast - 0.06, -0.7, mast - 0.06, 0.2, mast - r.uniform(0.4, 0.6), 0.2),
            hull,
            stripe,
        ]
    return [
        rect("l", -0.5, -0.08, 0.4, 0.35),
        *(rect("w", x, 0.02, x + 0.16, 0.18) for x in (-0.42, -0.15, 0.12)),
        poly("d", -0.25, -0.08, -0.2, -0.5, 0.02, -0.5, 0.05, -0.08),
        rect("a", -0.22, -0.42, 0.03, -0.3),
        hull,
        stripe,
    ]


def _bus(r: np.random.Generator) -> list[Part]:
    top, n = -r.uniform(0.5, 0.62), int(r.integers(4, 6))
    step = 1.45 / n
    parts = [poly("b", -0.9, top, 0.88, top, 0.97, top + 0.12, 0.97, 0.42, -0.97, 0.42, -0.97, top + 0.1)]
    parts += [rect("w", -0.88 + i * step, top + 0.14, -0.88 + (i + 0.8) * step, top + 0.46) for i in range(n)]
    return parts + [
        rect("l", 0.62, top + 0.14, 0.88, 0.36),
        rect("a", -0.97, 0.1, 0.6, 0.2),
        *wheel(-0.55, 0.45, 0.19),
        *wheel(0.45, 0.45, 0.19),
    ]


def _car(r: np.random.Generator) -> list[Part]:
    roof, nose = -r.uniform(0.36, 0.5), r.uniform(0.42, 0.6)
    return [
        poly("d", -0.62, -0.02, -0.4, roof, 0.22, roof, nose, -0.02),
        poly("w", -0.48, -0.04, -0.34, roof + 0.08, -0.08, roof + 0.08, -0.08, -0.04),
        poly("w", 0.0, -0.04, 0.0, roof + 0.08, 0.18, roof + 0.08, nose - 0.14, -0.04),
        poly("b", -0.97, 0.02, -0.9, -0.05, 0.6, -0.05, 0.95, 0.08, 0.98, 0.35, -0.97, 0.35),
        ellipse("a", 0.88, 0.14, 0.07, n=8),
        *wheel(-0.55, 0.37, 0.22),
        *wheel(0.55, 0.37, 0.22),
    ]


def _motorbike(r: np.random.Generator) -> list[Part]:
    wheel = r.uniform(0.31, 0.37)
    return [
        *(part for x in (-0.6, 0.6) for part in (ellipse("k", x, 0.4, wheel), ellipse("w", x, 0.4, 0.5 * wheel, n=10))),
        line("d", 0.6, 0.4, 0.36, -0.42, 0.12),
        line("d", -0.6, 0.4, -0.1, 0.2, 0.12),
        poly("k", -0.3, 0.02, 0.25, 0.02, 0.2, 0.42, -0.22, 0.42),
        poly("b", -0.15, -0.08, 0.02, -0.3, 0.36, -0.24, 0.32, 0.08, -0.12, 0.08),
        poly("n", -0.85, -0.22, -0.1, -0.12, -0.12, 0.08, -0.6, 0.04),
        line("k", 0.18, -0.5, 0.46, -0.42, 0.1),
        ellipse("a", 0.5, -0.26, 0.11, n=8),
        line("l", -0.2, 0.45, -0.9, 0.5, 0.1),
    ]


def _train(r: np.random.Generator) -> list[Part]:
    if r.random() < 0.5:  # an old engine with boiler, cab and chimney
        return [
            rect("k", -0.98, 0.62, 0.98, 0.7),
            rect("d", -0.9, -0.55, -0.32, 0.32),
            rect("a", -0.97, -0.66, -0.25, -0.52),
            rect("w", -0.78, -0.38, -0.46, -0.08),
            rect("b", -0.32, -0.2, 0.75, 0.32),
            poly("d", 0.42, -0.2, 0.36, -0.66, 0.68, -0.66, 0.6, -0.2),
            ellipse("l", 0.02, -0.22, 0.13, 0.12, n=10),
            poly("a", 0.75, 0.32, 0.98, 0.6, 0.55, 0.6, 0.55, 0.32),
            *(ellipse("k", x, 0.42, 0.2, n=12) for x in (-0.65, -0.2, 0.25)),
            line("l", -0.65, 0.42, 0.25, 0.42, 0.06),
        ]
    parts = [  # a long railcar with a slanted nose
        rect("k", -0.99, 0.42, 0.99, 0.48),
        poly("b", -0.98, -0.3, 0.55, -0.3, 0.98, 0.1, 0.98, 0.26, -0.98, 0.26),
        rect("a", -0.98, 0.08, 0.8, 0.15),
        poly("w", 0.42, -0.22, 0.55, -0.22, 0.78, 0.02, 0.42, 0.02),
    ]
    parts += [rect("w", x, -0.2, x + 0.15, 0.0) for x in (-0.88, -0.64, -0.4, -0.16, 0.08)]
    return parts + [ellipse("k", x, 0.33, 0.1, n=10) for x in (-0.8, -0.56, -0.08, 0.16, 0.6, 0.82)]


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
        parts.append(line(role, x, cy + 0.3 * ry, x + lean, foot, thick))
    return parts


def _bird(r: np.random.Generator) -> list[Part]:
    lift = r.uniform(-0.6, 0.1)
    return [
        line("k", -0.05, 0.3, -0.1, 0.8, 0.05),
        line("k", 0.12, 0.3, 0.1, 0.8, 0.05),
        poly("d", -0.4, 0.0, -0.98, -0.12, -0.95, 0.22, -0.4, 0.25),
        ellipse("b", 0.0, 0.1, 0.55, 0.33, turn=-0.25),
        ellipse("b", 0.48, -0.3, 0.25),
        poly("a", 0.68, -0.38, 0.99, -0.25, 0.68, -0.18),
        ellipse("k", 0.55, -0.36, 0.05, n=8),
        poly("l", 0.22, 0.0, -0.3, 0.22, -0.62, lift),
    ]


def _cat(r: np.random.Generator) -> list[Part]:
    head = (0.28, -0.38)
    return [
        arc("d", -0.62, 0.1, 0.34, 0.2, np.pi * 0.55, np.pi * (1.5 + r.uniform(-0.1, 0.3))),
        ellipse("b", -0.08, 0.32, 0.5, 0.5),
        ellipse("l", 0.12, 0.42, 0.22, 0.36),
        line("b", 0.08, 0.3, 0.1, 0.88, 0.17),
        line("b", 0.32, 0.3, 0.34, 0.88, 0.17),
        ellipse("d", -0.35, 0.76, 0.32, 0.14),
        poly("b", head[0] - 0.36, head[1] - 0.05, head[0] - 0.34, head[1] - 0.58, head[0] - 0.02, head[1] - 0.25),
        poly("b", head[0] + 0.36, head[1] - 0.05, head[0] + 0.34, head[1] - 0.58, head[0] + 0.02, head[1] - 0.25),
        ellipse("b", *head, 0.37, 0.32),
        ellipse("g", head[0] - 0.15, head[1] - 0.05, 0.07, n=8),
        ellipse("g", head[0] + 0.15, head[1] - 0.05, 0.07, n=8),
        poly("a", head[0] - 0.05, head[1] + 0.08, head[0] + 0.05, head[1] + 0.08, head[0], head[1] + 0.15),
        line("k", head[0] - 0.45, head[1] + 0.08, head[0] - 0.12, head[1] + 0.12, 0.03),
        line("k", head[0] + 0.45, head[1] + 0.08, head[0] + 0.12, head[1] + 0.12, 0.03),
    ]


def _cow(r: np.random.Generator) -> list[Part]:
    body = (-0.12, -0.05, 0.68, 0.34)
    spots = [
        ellipse("k", r.uniform(-0.55, 0.2), r.uniform(-0.2, 0.1), r.uniform(0.1, 0.18), r.uniform(0.08, 0.14), n=9)
        for _ in range(3)
    ]
    return [
        line("k", -0.76, -0.25, -0.92, 0.35, 0.06),
        *_four_legs(r, body, 0.42, 0.14),
        ellipse("s", -0.3, 0.3, 0.16, 0.14, n=10),
        poly("b", -0.78, -0.34, 0.5, -0.36, 0.56, 0.2, 0.4, 0.3, -0.62, 0.3, -0.8, 0.15),
        *spots,
        poly("l", 0.5, -0.52, 0.66, -0.5, 0.56, -0.8),
        poly("l", 0.78, -0.5, 0.94, -0.52, 0.96, -0.82),
        ellipse("d", 0.45, -0.4, 0.14, 0.07, n=8),
        poly("b", 0.52, -0.55, 0.92, -0.55, 0.9, -0.12, 0.58, -0.12),
        ellipse("s", 0.75, -0.1, 0.19, 0.12, n=10),
        ellipse("k", 0.63, -0.38, 0.05, n=6),
        ellipse("k", 0.82, -0.38, 0.05, n=6),
    ]


def _dog(r: np.random.Generator) -> list[Part]:
    body = (-0.15, 0.05, 0.52, 0.24)
    tail = r.uniform(-0.6, -0.25)
    return [
        line("d", -0.6, -0.05, -0.92, tail, 0.11),
        *_four_legs(r, body, 0.5, 0.14, "b"),
        ellipse("b", *body),
        poly("b", 0.1, 0.05, 0.38, -0.5, 0.65, -0.3, 0.42, 0.22),
        ellipse("b", 0.5, -0.45, 0.27, 0.23),
        ellipse("l", 0.78, -0.36, 0.21, 0.13, n=10),
        ellipse("k", 0.95, -0.42, 0.07, n=8),
        ellipse("d", 0.33, -0.34, 0.12, 0.29, turn=0.25, n=10),
        ellipse("k", 0.58, -0.53, 0.05, n=6),
        line("a", 0.22, -0.06, 0.55, -0.12, 0.1),
    ]


def _horse(r: np.random.Generator) -> list[Part]:
    body = (-0.15, 0.0, 0.52, 0.25)
    rear = r.uniform(-0.05, 0.1)
    return [
        poly("k", -0.62, -0.15, -0.92, 0.1, -0.9, 0.55, -0.76, 0.2),
        *_four_legs(r, body, 0.68, 0.11),
        ellipse("b", *body),
        poly("b", 0.05, -0.1, 0.42, -0.86 + rear, 0.68, -0.75 + rear, 0.36, 0.14),
        poly("b", 0.42, -0.92 + rear, 0.6, -0.92 + rear, 0.95, -0.5 + rear, 0.84, -0.36 + rear, 0.5, -0.58 + rear),
        poly("k", 0.42, -0.96 + rear, 0.3, -0.8 + rear, -0.02, -0.15, 0.14, -0.12, 0.46, -0.75 + rear),
        poly("b", 0.44, -0.88 + rear, 0.46, -1.05 + rear, 0.56, -0.88 + rear),
        ellipse("k", 0.6, -0.74 + rear, 0.04, n=6),
    ]


def _sheep(r: np.random.Generator) -> list[Part]:
    body = (-0.1, 0.0, 0.6, 0.4)
    return [
        *_four_legs(r, body, 0.32, 0.13, "k"),
        bumpy("w", *body, bumps=int(r.integers(9, 13)), depth=0.2),
        ellipse("k", 0.48, -0.2, 0.1, 0.18, turn=0.9, n=8),
        ellipse("k", 0.64, -0.1, 0.2, 0.27, turn=-0.35),
        bumpy("w", 0.56, -0.36, 0.18, 0.11, bumps=5, depth=0.25),
        ellipse("w", 0.66, -0.16, 0.05, n=6),
    ]


def _person(r: np.random.Generator) -> list[Part]:
    left, right, step = r.uniform(-0.3, 0.8), r.uniform(-0.3, 0.8), r.uniform(0.08, 0.28)
    parts = [
        line("d", -0.1, 0.25, -step, 0.95, 0.17),
        line("d", 0.1, 0.25, step, 0.95, 0.17),
        line("s", -0.22, -0.36, -0.5, -0.36 + 0.55 * left, 0.12),
        line("s", 0.22, -0.36, 0.5, -0.36 + 0.55 * right, 0.12),
    ]
    if r.random() < 0.35:
        parts.append(poly("b", -0.2, -0.45, 0.2, -0.45, 0.38, 0.45, -0.38, 0.45))
    else:
        parts.append(poly("b", -0.28, -0.45, 0.28, -0.45, 0.2, 0.3, -0.2, 0.3))
    hair = [ellipse("k", 0.0, -0.76, 0.22, 0.2)] if r.random() < 0.6 else [ellipse("n", 0.0, -0.66, 0.25, 0.3)]
    return parts + hair + [rect("s", -0.07, -0.55, 0.07, -0.42), ellipse("s", 0.0, -0.66, 0.18, 0.2)]


# ----------------------------------------------------------------------------------------------- things in rooms
def _bottle(r: np.random.Generator) -> list[Part]:
    wide, neck, shoulder = r.uniform(0.24, 0.34), r.uniform(0.08, 0.12), r.uniform(-0.45, -0.2)
    side = [(wide, 0.95), (wide, shoulder + 0.2), (neck, shoulder - 0.1), (neck, -0.85)]
    return [
        ("b", np.array([(-x, y) for x, y in side] + side[::-1])),
        rect("a", -neck - 0.04, -0.98, neck + 0.04, -0.82),
        rect("w", -wide, 0.1, wide, 0.58),
        rect("d", -0.5 * wide, 0.24, 0.5 * wide, 0.42),
    ]


def _chair(r: np.random.Generator) -> list[Part]:
    back, seat = -r.uniform(0.8, 0.97), r.uniform(0.05, 0.2)
    return [
        line("d", -0.2, seat, -0.2, 0.8, 0.09),
        line("d", 0.55, seat - 0.12, 0.55, 0.72, 0.09),
        line("b", -0.45, back, -0.42, 0.95, 0.11),
        line("b", 0.05, back + 0.08, 0.05, seat, 0.11),
        *(line("l", -0.43, y, 0.05, y + 0.06, 0.12) for y in np.linspace(back + 0.12, seat - 0.3, int(r.integers(2, 4)))),
        poly("b", -0.48, seat, 0.1, seat - 0.16, 0.66, seat - 0.06, 0.2, seat + 0.14, -0.48, seat + 0.12),
        line("b", 0.3, seat, 0.3, 0.95, 0.1),
    ]


def _diningtable(r: np.random.Generator) -> list[Part]:
    top = -r.uniform(0.15, 0.35)
    legs = [line("n", x, top, x * 0.97, y, 0.1) for x, y in ((-0.8, 0.75), (0.8, 0.75), (-0.5, 0.5), (0.5, 0.5))]
    if r.random() < 0.5:
        surface = [ellipse("b", 0.0, top, 0.98, 0.25, n=20)]
    else:
        surface = [
            poly("b", -0.7, top - 0.22, 0.7, top - 0.22, 0.98, top + 0.16, -0.98, top + 0.16),
            rect("d", -0.98, top + 0.16, 0.98, top + 0.26),
        ]
    plates = [ellipse("w", x, top - 0.02, 0.2, 0.08, n=12) for x in (-0.42, 0.4)]
    return legs + surface + plates + [rect("a", -0.07, top - 0.3, 0.07, top)]


def _pottedplant(r: np.random.Generator) -> list[Part]:
    parts: list[Part] = []
    for angle in np.linspace(-1.15, 1.15, int(r.integers(5, 8))) + r.uniform(-0.1, 0.1):
        reach = r.uniform(0.5, 0.62)
        x, y = reach * np.sin(angle), 0.2 - reach * np.cos(angle) * 1.1
        parts.append(ellipse("g", x, y, 0.13, 0.42, turn=angle, n=12))
    return parts + [poly("b", -0.4, 0.28, 0.4, 0.28, 0.28, 0.95, -0.28, 0.95), rect("d", -0.46, 0.16, 0.46, 0.34)]


def _sofa(r: np.random.Generator) -> list[Part]:
    back, n = -r.uniform(0.4, 0.55), int(r.integers(2, 4))
    edges = np.linspace(-0.68, 0.68, n + 1)
    return [
        *(rect("n", x, 0.4, x + 0.12, 0.58) for x in (-0.85, 0.73)),
        poly("d", -0.78, 0.1, -0.72, back, 0.72, back, 0.78, 0.1),
        *(rect("b", a + 0.02, back + 0.1, b - 0.02, 0.08) for a, b in zip(edges[:-1], edges[1:], strict=True)),
        *(rect("l", a, 0.05, b, 0.24) for a, b in zip(edges[:-1], edges[1:], strict=True)),
        rect("b", -0.7, 0.22, 0.7, 0.45),
        ellipse("a", r.uniform(-0.5, 0.5), -0.05, 0.14, n=4),
        poly("b", -0.98, -0.12, -0.68, -0.12, -0.66, 0.45, -0.96, 0.45),
        poly("b", 0.98, -0.12, 0.68, -0.12, 0.66, 0.45, 0.96, 0.45),
    ]


def _tvmonitor(r: np.random.Generator) -> list[Part]:
    low = r.uniform(0.35, 0.5)
    parts = [
        rect("d", -0.1, low, 0.1, 0.7),
        ellipse("d", 0.0, 0.72, 0.45, 0.1, n=12),
        rect("b", -0.92, -0.75, 0.92, low),
        rect("w", -0.8, -0.64, 0.8, low - 0.12),
        poly("l", -0.7, low - 0.2, -0.3, -0.56, -0.05, -0.56, -0.45, low - 0.2),
    ]
    if r.random() < 0.4:
        parts += [line("k", 0.0, -0.75, -0.35, -1.0, 0.05), line("k", 0.0, -0.75, 0.35, -1.0, 0.05)]
    return parts


# ------------------------------------------------------------------------------------- the other sixteen classes
def _rays(n: int, outer: float, inner: float) -> list[float]:
    angle = np.arange(2 * n) * np.pi / n - 0.5 * np.pi
    radius = np.where(np.arange(2 * n) % 2 == 0, outer, inner)
    return [float(v) for v in np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()]


def _star(r: np.random.Generator) -> list[Part]:
    n = int(r.integers(5, 7))
    return [poly("b", *_rays(n, 0.97, r.uniform(0.36, 0.48))), poly("l", *_rays(n, 0.45, 0.2))]


def _cross(r: np.random.Generator) -> list[Part]:
    w = r.uniform(0.2, 0.3)
    return [poly("b", -w, -0.95, w, -0.95, w, -w, 0.95, -w, 0.95, w, w, w, w, 0.95, -w, 0.95, -w, w, -0.95, w, -0.95, -w, -w, -w)]


def _ring(r: np.random.Generator) -> list[Part]:
    inner = r.uniform(0.5, 0.65)
    return [arc("b", 0, 0, 0.95, inner), arc("l", 0, 0, 0.82, inner + 0.1)]


def _arrow(r: np.random.Generator) -> list[Part]:
    w, head = r.uniform(0.12, 0.2), r.uniform(0.1, 0.3)
    return [poly("b", -0.95, -w, head, -w, head, -0.5, 0.98, 0, head, 0.5, head, w, -0.95, w)]


def _tree(r: np.random.Generator) -> list[Part]:
    trunk = rect("n", -0.12, 0.2, 0.12, 0.97)
    if r.random() < 0.5:
        return [trunk, bumpy("g", 0.0, -0.3, 0.55, 0.5, bumps=9, depth=0.2)]
    return [
        trunk,
        *(poly("g", -0.62 + 0.12 * i, 0.45 - 0.4 * i, 0.62 - 0.12 * i, 0.45 - 0.4 * i, 0, -0.25 - 0.36 * i) for i in range(3)),
    ]


def _house(r: np.random.Generator) -> list[Part]:
    eave = r.uniform(-0.25, -0.05)
    return [
        rect("a", 0.35, -0.8, 0.52, eave),
        rect("b", -0.72, eave, 0.72, 0.9),
        poly("d", -0.92, eave, 0, -0.92, 0.92, eave),
        rect("n", -0.16, 0.3, 0.16, 0.9),
        rect("w", -0.58, 0.1, -0.28, 0.42),
        rect("w", 0.28, 0.1, 0.58, 0.42),
    ]


def _mushroom(r: np.random.Generator) -> list[Part]:
    stem, angle = r.uniform(0.16, 0.26), np.linspace(np.pi, 2 * np.pi, 13)
    cap = np.stack([0.9 * np.cos(angle), 0.1 + 0.85 * np.sin(angle)], axis=1)
    return [rect("l", -stem, 0.05, stem, 0.9), ("b", cap)] + [
        ellipse("w", x, y, 0.11, n=9) for x, y in ((-0.45, -0.2), (0.0, -0.48), (0.42, -0.15))
    ]


def _umbrella(r: np.random.Generator) -> list[Part]:
    angle = np.linspace(np.pi, 2 * np.pi, 13)
    edge = np.array([[0.96, 0.0], [0.64, -0.12], [0.32, 0.0], [0.0, -0.12], [-0.32, 0.0], [-0.64, -0.12]])
    canopy = np.concatenate([np.stack([0.96 * np.cos(angle), 0.85 * np.sin(angle)], axis=1), edge])
    return [
        line("k", 0, -0.95, 0, 0.75, 0.07),
        arc("k", 0.13, 0.75, 0.17, 0.1, 0.0, np.pi),
        ("b", canopy),
        poly("l", 0, -0.84, 0.32, 0.0, 0.0, -0.12, -0.32, 0.0),
    ]


def _fish(r: np.random.Generator) -> list[Part]:
    ry = r.uniform(0.32, 0.45)
    return [
        poly("d", -0.5, 0, -0.97, -0.4, -0.85, 0, -0.97, 0.4),
        poly("a", -0.2, -ry * 0.8, 0.2, -ry * 0.9, -0.15, -ry - 0.25),
        ellipse("b", 0.15, 0, 0.75, ry, n=18),
        ellipse("w", 0.6, -0.1, 0.1, n=9),
        ellipse("k", 0.62, -0.1, 0.05, n=6),
        arc("d", 0.25, 0.0, 0.28, 0.2, -0.9, 0.9),
    ]


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


def _heart(r: np.random.Generator) -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 26, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [
        ("b", np.stack([x / 17.0, -y * r.uniform(0.9, 1.1) / 17.0], axis=1)),
        ellipse("l", -0.42, -0.35, 0.12, 0.2, turn=0.5, n=8),
    ]


def _cloud(r: np.random.Generator) -> list[Part]:
    outline = bumpy("l", 0.0, 0.0, 0.82, 0.42, bumps=int(r.integers(6, 9)), depth=0.25)
    return [outline, ellipse("w", -0.2, -0.1, 0.4, 0.22)]


def _flower(r: np.random.Generator) -> list[Part]:
    n = int(r.integers(5, 8))
    petals = [
        ellipse("b", 0.4 * np.cos(a), -0.35 + 0.4 * np.sin(a), 0.3, 0.17, turn=float(a), n=10)
        for a in np.arange(n) * 2 * np.pi / n
    ]
    return [
        line("g", 0, -0.2, 0, 0.97, 0.09),
        ellipse("g", 0.24, 0.6, 0.27, 0.1, turn=-0.5, n=10),
        *petals,
        ellipse("a", 0, -0.35, 0.2, n=12),
    ]


def _clock(r: np.random.Generator) -> list[Part]:
    hands = r.uniform(0, 2 * np.pi, 2)
    ticks = [
        line("k", 0.6 * np.cos(a), 0.6 * np.sin(a), 0.72 * np.cos(a), 0.72 * np.sin(a), 0.07) for a in np.arange(4) * np.pi / 2
    ]
    return [
        ellipse("b", 0, 0, 0.95, n=22),
        ellipse("w", 0, 0, 0.78, n=20),
        *ticks,
        line("k", 0, 0, 0.6 * np.cos(hands[0]), 0.6 * np.sin(hands[0]), 0.07),
        line("k", 0, 0, 0.4 * np.cos(hands[1]), 0.4 * np.sin(hands[1]), 0.1),
    ]


def _ladder(r: np.random.Generator) -> list[Part]:
    top = r.uniform(0.22, 0.34)
    rungs = [line("l", -0.4, y, 0.4, y, 0.08) for y in np.linspace(-0.75, 0.75, int(r.integers(5, 7)))]
    return rungs + [line("b", -top - 0.05, -0.97, -0.42, 0.97, 0.11), line("b", top + 0.05, -0.97, 0.42, 0.97, 0.11)]


def _flag(r: np.random.Generator) -> list[Part]:
    low = r.uniform(0.0, 0.2)
    y = np.linspace(-0.85, low, 4)
    bands = [
        poly(role, -0.6, a, 0.1, a + 0.1, 0.85, a, 0.85, b, 0.1, b + 0.1, -0.6, b)
        for role, a, b in zip("bwa", y[:-1], y[1:], strict=True)
    ]
    return [line("n", -0.65, -0.97, -0.65, 0.97, 0.1), *bands]


_VEHICLES = (_aeroplane, _bicycle, _boat, _bus, _car, _motorbike, _train)
_ANIMALS = (_bird, _cat, _cow, _dog, _horse, _sheep, _person)
_THINGS = (_bottle, _chair, _diningtable, _pottedplant, _sofa, _tvmonitor)
_SIGNS = (_star, _cross, _ring, _arrow, _tree, _house, _mushroom, _umbrella)
_OTHERS = (_fish, _moon, _heart, _cloud, _flower, _clock, _ladder, _flag)

GLYPHS: dict[str, Glyph] = {glyph.__name__.strip("_"): glyph for glyph in (*_VEHICLES, *_ANIMALS, *_THINGS, *_SIGNS, *_OTHERS)}
