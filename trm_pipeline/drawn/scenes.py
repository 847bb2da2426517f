"""The drawn VOC: scenes of simple drawn objects.

Two kinds of scenes come from here. *Target scenes* are the data set a method is trained and tested on: 224 px, one to five
mostly small objects, mostly inked line art, in context groups (a street, a farm, a room), with unlabelled things between
them. *Pre-training scenes* are what the embedded vision-language model learned from: 112 px, one or two large objects,
mostly filled shapes, with coarse and noisy captions. The gap between the two is on purpose. With captions that name the
classes in the very style of the target scenes, a zero-shot classifier already knows all that labels could teach; with
objects as large as the image, a pooled feature is enough and regions are worth nothing.

Every scene has its own generator, seeded by (seed, kind of scene, index), so neither the order nor the number of worker
processes changes a single pixel, and scenes for pre-training can never coincide with target scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from trm_pipeline.drawn.glyphs import GLYPHS
from trm_pipeline.drawn.shapes import Points

VOC_CLASSES: tuple[str, ...] = tuple(
    (
        "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person, "
        "pottedplant, sheep, sofa, train, tvmonitor"
    ).split(", ")
)
"""The classes of PASCAL VOC in alphabetical order: column c of every label matrix is ``VOC_CLASSES[c]``."""

RECIPE_VERSION = 1  # raise it whenever a change of the code, here or in the glyphs, moves a pixel or a label
DEFAULT_SIZES: Mapping[str, int] = {"train": 2000, "val": 500, "test": 1000}
# The second word of every generator's seed. Pre-training has its own, so its scenes are disjoint from all splits.
STREAMS = {"train": 0, "val": 1, "test": 2, "pretraining": 3}
OTHER_CLASSES: tuple[str, ...] = tuple(name for name in GLYPHS if name not in VOC_CLASSES)
ALL_CLASSES: tuple[str, ...] = VOC_CLASSES + OTHER_CLASSES
# Images a class has in trainval of VOC2007: the class prior before it is flattened.
_VOC_COUNTS = (238, 243, 330, 181, 244, 186, 713, 337, 445, 141, 200, 421, 287, 245, 2008, 245, 96, 229, 261, 256)
_CONTEXTS: tuple[tuple[str, ...], ...] = (
    ("bicycle", "bus", "car", "motorbike", "person", "train"),
    ("bottle", "cat", "chair", "diningtable", "person", "pottedplant", "sofa", "tvmonitor"),
    ("bird", "cow", "dog", "horse", "person", "sheep"),
    ("aeroplane", "bird", "boat", "person", "train"),
)
Colour = tuple[int, int, int]
AnyColour = Sequence[float] | NDArray[np.float64]
COLOURS: Mapping[str, Colour] = {
    "red": (205, 45, 40),
    "orange": (235, 135, 35),
    "yellow": (235, 210, 60),
    "green": (60, 150, 70),
    "blue": (50, 95, 200),
    "purple": (130, 65, 165),
    "pink": (235, 140, 175),
    "brown": (130, 85, 50),
    "gray": (135, 135, 140),
    "black": (50, 50, 55),
}
_SKIN: tuple[Colour, ...] = ((240, 205, 175), (215, 165, 125), (160, 110, 75), (105, 70, 50))
STYLES: tuple[str, ...] = (
    "filled",  # parts in their colours, no outline
    "faint",  # parts hardly darker than the paper, in ink outline
    "shaded",  # every part in a shade of its own, in ink outline
    "wire",  # ink outline alone: everything behind shows through
    "silhouette",  # all parts in one colour: only the shape is left
)


@dataclass(frozen=True)
class SceneRecipe:
    """How one kind of scene is drawn. Sides are shares of the image side."""

    size: int
    styles: tuple[float, float, float, float, float]  # how often each of STYLES is used
    single_side: tuple[float, float]
    multi_side: tuple[float, float]
    difficulty: float  # scales clutter, warp, turn, blur and noise
    difficult_below: float = 0.75  # an object of which less can be seen than this share is marked *difficult*


PRETRAINING = SceneRecipe(
    size=112, styles=(0.75, 0.12, 0.13, 0.0, 0.0), single_side=(0.30, 0.80), multi_side=(0.26, 0.58), difficulty=0.5
)
# The wide range of sizes is what makes regions matter: in a mean over the image the largest object drowns the others.
TARGET = SceneRecipe(
    size=224, styles=(0.05, 0.40, 0.40, 0.10, 0.05), single_side=(0.14, 0.55), multi_side=(0.13, 0.45), difficulty=0.9
)
TARGET_COUNTS = (0.12, 0.26, 0.28, 0.20, 0.14)  # one to five objects
TARGET_DISTRACTORS = 1.1  # unlabelled things of the other classes, on average
TARGET_POWER = 0.8  # flattens the class prior of VOC, so that rare classes have enough images in 500


@dataclass(frozen=True)
class DrawnObject:
    """One object of a scene; ``box`` is (xmin, ymin, xmax, ymax) in pixels, end-exclusive and inside the image."""

    name: str
    colour: str | None
    box: tuple[int, int, int, int]
    truncated: bool
    difficult: bool


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3) in uint8 and what was drawn in it, from back to front."""

    image: NDArray[np.uint8]
    objects: tuple[DrawnObject, ...]


def _jitter(rng: np.random.Generator, colour: AnyColour, spread: float = 14.0) -> Colour:
    r, g, b = np.clip(np.asarray(colour) + rng.normal(0.0, spread, 3), 0, 255).astype(int)
    return int(r), int(g), int(b)


def _mix(first: AnyColour, second: AnyColour, share: float) -> tuple[float, ...]:
    return tuple((1.0 - share) * x + share * y for x, y in zip(first, second, strict=True))


def _palette(rng: np.random.Generator, main: Colour) -> dict[str, Colour]:
    """The colour of every role of a glyph whose body has the colour ``main``."""
    accent = tuple(COLOURS.values())[rng.integers(len(COLOURS))]
    return {
        "b": main,
        "d": _jitter(rng, _mix(main, (0, 0, 0), 0.4), 6.0),
        "l": _jitter(rng, _mix(main, (255, 255, 255), 0.5), 6.0),
        "a": _jitter(rng, accent),
        "k": _jitter(rng, (40, 40, 45), 8.0),
        "w": _jitter(rng, (225, 235, 245), 8.0),
        "s": _jitter(rng, _SKIN[rng.integers(len(_SKIN))], 8.0),
        "g": _jitter(rng, (65, 145, 65)),
        "n": _jitter(rng, (120, 80, 50)),
    }


def _pose(rng: np.random.Generator, points: Points, side: float, difficulty: float) -> Points:
    """Turn, shear, stretch, mirror and bend a glyph, and scale it so that its longer side is ``side`` pixels."""
    turn, shear = rng.normal(0.0, 0.22 * difficulty), rng.normal(0.0, 0.12 * difficulty)
    stretch = np.exp(rng.normal(0.0, 0.12 * difficulty))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    cos, sin = np.cos(turn), np.sin(turn)
    frame = np.array([[cos, -sin], [sin, cos]]) @ np.array([[mirror * stretch, shear], [0.0, 1.0 / stretch]])
    phase, bend = rng.uniform(0.0, 2.0 * np.pi, 2), 0.05 * difficulty
    points = points @ frame.T
    points = points + bend * np.sin(3.0 * points[:, ::-1] + phase)
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - 0.5 * (low + high)) * (side / float((high - low).max())))


def _paint(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    parts: Sequence[tuple[str, Points]],
    main: Colour,
    style: str,
    paper: Colour,
    ink_width: int,
) -> None:
    palette = _palette(rng, main)
    ink = _jitter(rng, (35, 35, 45), 14.0)
    for role, points in parts:
        corners = [(float(x), float(y)) for x, y in points]
        if style == "filled":
            draw.polygon(corners, fill=palette[role])
        elif style == "faint":
            faint = _jitter(rng, _mix(palette[role], paper, rng.uniform(0.7, 0.95)), 4.0)
            draw.polygon(corners, fill=faint, outline=ink, width=ink_width)
        elif style == "shaded":
            shade = _jitter(rng, _mix(main, rng.uniform(20.0, 250.0, 3), rng.uniform(0.25, 0.9)), 10.0)
            draw.polygon(corners, fill=shade, outline=ink, width=ink_width)
        elif style == "wire":
            draw.line([*corners, corners[0]], fill=palette["d"], width=ink_width)
        else:
            draw.polygon(corners, fill=main)


def _background(rng: np.random.Generator, size: int, difficulty: float) -> tuple[Image.Image, Colour]:
    """A dull two-colour slope with odd shapes on it, and the colour of the paper."""
    colours = [rng.uniform(110.0, 250.0, 3) for _ in range(2)]
    grey = rng.uniform(0.2, 0.8)  # mostly dull, so that objects stand out
    first, second = (_mix(colour, (colour.mean(),) * 3, grey) for colour in colours)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    line = np.linspace(-0.7, 0.7, 8)
    slope = np.clip(0.5 + np.cos(angle) * line[:, None] + np.sin(angle) * line[None, :], 0.0, 1.0)[..., None]
    coarse = (slope * np.asarray(first) + (1.0 - slope) * np.asarray(second)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR)
    paper = _jitter(rng, _mix(first, second, 0.5), 0.0)
    _clutter(ImageDraw.Draw(image), rng, size, int(rng.poisson(10.0 * difficulty)), paper, 0.4)
    return image, paper


def _clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, count: int, paper: Colour, strength: float) -> None:
    """Meaningless shapes: bars, triangles, blobs and scrawls, blended into the paper by ``strength`` at most."""
    for _ in range(count):
        colour = _jitter(rng, _mix(paper, rng.uniform(0.0, 255.0, 3), rng.uniform(0.3, 1.0) * strength * 1.5), 5.0)
        x, y = rng.uniform(0.0, size, 2)
        reach = size * rng.uniform(0.04, 0.2)
        kind = rng.integers(4)
        if kind == 0:
            dx, dy = rng.normal(0.0, 2.0 * reach, 2)
            draw.line([x, y, x + dx, y + dy], fill=colour, width=max(1, int(rng.uniform(0.005, 0.03) * size)))
        elif kind == 1:
            corners = rng.normal(0.0, reach, (int(rng.integers(3, 6)), 2)) + (x, y)
            draw.polygon([(float(a), float(b)) for a, b in corners], fill=colour)
        elif kind == 2:
            w, h = reach * rng.uniform(0.3, 1.0, 2)
            draw.ellipse([x - w, y - h, x + w, y + h], fill=colour)
        else:
            walk = np.cumsum(rng.normal(0.0, 0.35 * reach, (8, 2)), axis=0) + (x, y)
            draw.line([(float(a), float(b)) for a, b in walk], fill=colour, width=max(1, size // 112))


def _overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection of two boxes as a share of the smaller one."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return float(width * height / min(areas))


def _place(
    rng: np.random.Generator, half: NDArray[np.float64], canvas: int, boxes: Sequence[Sequence[float]]
) -> tuple[NDArray[np.float64], tuple[float, ...]] | None:
    """Centre and box of an object of so many pixels to either side; None where a dozen tries find no room beside the others."""
    allowed = 0.35 if rng.random() < 0.92 else 0.7  # now and then one thing nearly hides another
    for _ in range(12):
        centre = rng.uniform(0.8 * half, canvas - 0.8 * half)  # up to a tenth of the object may stick out of the image
        box = (*(centre - half), *(centre + half))
        if all(_overlap(box, other) <= allowed for other in boxes):
            return centre, box
    return None


def draw_scene(
    rng: np.random.Generator,
    recipe: SceneRecipe,
    names: Sequence[str],
    distractors: Sequence[str] = (),
    *,
    colours: Sequence[str | None] | None = None,
) -> Scene:
    """Draw a scene of the named objects.

    An object that finds no room after a dozen tries is left out, the first never is. ``distractors`` are drawn in the
    same way and among the others, but do not appear in :attr:`Scene.objects`. With ``colours``, one for each name, an
    object shows the colour it is given: a glyph without a body is drawn as a silhouette, one without a colour as a faint
    line drawing. Without them colours are random and a style may hide them.
    """
    scale = 2  # everything is drawn at twice the size and averaged down: cheap anti-aliasing
    canvas = recipe.size * scale
    image, paper = _background(rng, canvas, recipe.difficulty)
    draw = ImageDraw.Draw(image)
    owners = Image.new("L", (canvas // 8, canvas // 8), 0)  # who is on top where, to tell how much of each can be seen
    owner_draw = ImageDraw.Draw(owners)

    everything = [*names, *distractors]
    low, high = recipe.single_side if len(everything) == 1 else recipe.multi_side
    boxes: list[tuple[float, ...]] = []
    drawn: list[tuple[str, str | None, int]] = []  # a distractor has no name
    for at in (0, *(1 + rng.permutation(len(everything) - 1))):
        parts, labelled = GLYPHS[everything[at]](rng), at < len(names)
        side = rng.uniform(low, high) * canvas
        posed = _pose(rng, np.concatenate([points for _, points in parts]), side, recipe.difficulty)
        placed = _place(rng, 0.5 * (posed.max(axis=0) - posed.min(axis=0)), canvas, boxes)
        if placed is None:
            continue
        centre, box = placed
        boxes.append(box)
        colour: str | None = None
        main = _jitter(rng, rng.uniform(30.0, 230.0, 3), 0.0)
        if colours is not None:
            colour = colours[at] if labelled else None
        elif rng.random() < 0.8:
            colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
        if colour is not None:
            main = _jitter(rng, COLOURS[colour])
        style = STYLES[rng.choice(len(STYLES), p=recipe.styles)]
        if colours is not None and colour is None:
            style = "faint"
        elif colours is not None and all(role != "b" for role, _ in parts):
            style = "silhouette"
        cuts = np.cumsum([len(points) for _, points in parts])[:-1]
        moved = [(role, points) for (role, _), points in zip(parts, np.split(posed + centre, cuts), strict=True)]
        _paint(draw, rng, moved, main, style, paper, int(rng.integers(2, 4)))
        owner = len(boxes)
        for _, points in moved:
            owner_draw.polygon([(float(x) / 8, float(y) / 8) for x, y in points], fill=owner)
        area = int((np.asarray(owners) == owner).sum())
        drawn.append((everything[at] if labelled else "", colour, area))

    _clutter(draw, rng, canvas, int(rng.poisson(3.0 * recipe.difficulty)), paper, 0.6)
    image = image.reduce(scale)
    if rng.random() < recipe.difficulty:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.9 * recipe.difficulty))))
    noise = rng.normal(0.0, 12.0 * recipe.difficulty * rng.random(), (recipe.size, recipe.size, 1))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)

    visible, objects = np.asarray(owners), []
    for owner, ((name, colour, area), box) in enumerate(zip(drawn, boxes, strict=True), start=1):
        if name:
            edges = [round(v / scale) for v in box]
            left, top, right, bottom = (min(max(v, 0), recipe.size) for v in edges)
            shown = int((visible == owner).sum()) / max(area, 1)
            inside = (left, top, right, bottom)
            objects.append(DrawnObject(name, colour, inside, [*inside] != edges, shown < recipe.difficult_below))
    return Scene(pixels, tuple(objects))


def _prior(power: float) -> NDArray[np.float64]:
    weights = np.asarray(_VOC_COUNTS, dtype=np.float64) ** power
    return np.asarray(weights / weights.sum())


def target_scene(seed: int, split: str, index: int) -> Scene:
    """The target scene number ``index`` of a split: one to five objects that go together, and things between them."""
    rng = np.random.default_rng([seed, STREAMS[split], index])
    count = 1 + int(rng.choice(5, p=TARGET_COUNTS))
    weights = _prior(TARGET_POWER)
    context = _CONTEXTS[rng.integers(len(_CONTEXTS))]
    weights = weights * np.array([6.0 if name in context else 1.0 for name in VOC_CLASSES])
    names = rng.choice(VOC_CLASSES, count, p=weights / weights.sum())
    distractors = rng.choice(OTHER_CLASSES, rng.poisson(TARGET_DISTRACTORS))
    return draw_scene(rng, TARGET, [str(n) for n in names], [str(n) for n in distractors])


def pretraining_scene(seed: int, index: int) -> Scene:
    """The pre-training scene number ``index``: one or two objects out of all 36 classes."""
    rng = np.random.default_rng([seed, STREAMS["pretraining"], index])
    weights = np.concatenate([0.68 * _prior(0.35), np.full(len(OTHER_CLASSES), 0.32 / len(OTHER_CLASSES))])
    names = rng.choice(ALL_CLASSES, 1 if rng.random() < 0.62 else 2, p=weights)
    return draw_scene(rng, PRETRAINING, [str(n) for n in names])
