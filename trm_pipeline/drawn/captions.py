"""What drawn things are called: classes, their kinds, prompts."""

from __future__ import annotations

from collections.abc import Mapping

from trm_pipeline.drawn.scenes import ALL_CLASSES

CLASS_WORDS: Mapping[str, str] = {
    **{name: name for name in ALL_CLASSES},
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
SUPERCLASSES: Mapping[str, tuple[str, ...]] = {
    "animal": ("bird", "cat", "cow", "dog", "horse", "sheep", "fish"),
    "vehicle": ("aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train"),
    "furniture": ("chair", "diningtable", "sofa"),
    "household object": ("bottle", "tvmonitor", "umbrella", "clock", "ladder"),
    "plant": ("pottedplant", "tree", "mushroom", "flower"),
    "shape": ("star", "cross", "ring", "arrow", "heart", "moon"),
    "figure": ("person",),
    "thing": ("house", "cloud", "flag"),
}
TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a drawing of a {}.",
    "a picture of a {}.",
    "a sketch of a {}.",
    "an image of a {}.",
    "there is a {} in the scene.",
    "a {}.",
)
