"""Captions of the scenes that the embedded model is pre-trained on: coarse, and sometimes wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trm_pipeline.drawn.captions import CLASS_WORDS, SUPERCLASSES, TEMPLATES
from trm_pipeline.drawn.scenes import COLOURS, PRETRAINING, STREAMS, DrawnObject, pretraining_scene
from trm_pipeline.drawn.writing import in_parallel

_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "aeroplane": ("airplane", "plane"),
    "bicycle": ("bike",),
    "boat": ("ship",),
    "bottle": ("flask",),
    "bus": ("coach",),
    "car": ("automobile",),
    "cat": ("kitten",),
    "chair": ("seat",),
    "cow": ("cattle",),
    "diningtable": ("table",),
    "dog": ("puppy",),
    "horse": ("pony",),
    "motorbike": ("motorcycle",),
    "person": ("human", "man", "woman"),
    "pottedplant": ("plant", "houseplant"),
    "sheep": ("lamb",),
    "sofa": ("couch",),
    "train": ("locomotive",),
    "tvmonitor": ("television", "screen"),
    "house": ("building",),
    "clock": ("watch",),
}
_CONFUSABLE: tuple[tuple[str, ...], ...] = (
    ("cat", "dog", "horse", "cow", "sheep"),
    ("bicycle", "motorbike"),
    ("bus", "car", "train"),
    ("chair", "sofa", "diningtable"),
    ("aeroplane", "bird"),
    ("boat", "fish"),
    ("bottle", "tvmonitor", "clock"),
    ("pottedplant", "flower", "tree", "mushroom"),
    ("star", "cross", "arrow"),
    ("ring", "moon", "heart", "cloud"),
    ("house", "ladder", "flag"),
    ("person", "umbrella"),
)
_SUPER_OF = {name: word for word, names in SUPERCLASSES.items() for name in names}
_RIVALS_OF = {name: [n for n in group if n != name] for group in _CONFUSABLE for name in group}


def _word(rng: np.random.Generator, name: str) -> str:
    """What a careless annotator calls an object: often too coarse, sometimes wrong."""
    draw = rng.random()
    if draw < 0.20:
        return _SUPER_OF[name]
    if draw < 0.34:
        name = _RIVALS_OF[name][rng.integers(len(_RIVALS_OF[name]))]
    if name in _SYNONYMS and rng.random() < 0.25:
        return _SYNONYMS[name][rng.integers(len(_SYNONYMS[name]))]
    return CLASS_WORDS[name]


def caption(rng: np.random.Generator, objects: Sequence[DrawnObject]) -> str:
    """A coarse and noisy caption of a pre-training scene.

    One object in two scenes is left out when there are two, one caption in fourteen names nothing at all, colours come in
    two out of five phrases and are sometimes wrong.
    """
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    if rng.random() < 0.07:
        return template.format("thing")
    chosen = [objects[i] for i in rng.permutation(len(objects))]
    if len(chosen) > 1 and rng.random() < 0.5:
        chosen = chosen[:1]
    phrases = []
    for item in chosen:
        phrase = _word(rng, item.name)
        colour = item.colour
        if colour is not None and rng.random() < 0.4 / 0.8:
            if rng.random() < 0.1:
                colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
            phrase = f"{colour} {phrase}"
        phrases.append(phrase)
    return template.format(" and a ".join(phrases))


def scene_captions(seed: int, index: int, objects: Sequence[DrawnObject], count: int) -> list[str]:
    """``count`` captions of the pre-training scene number ``index``."""
    rng = np.random.default_rng([seed, STREAMS["pretraining"], index, 1])
    return [caption(rng, objects) for _ in range(count)]


def caption_words() -> list[str]:
    """Every word or phrase a caption can be built from, for the vocabulary of the embedded model."""
    words = [*CLASS_WORDS.values(), *COLOURS, *SUPERCLASSES, "thing", "and a"]
    return words + [word for group in _SYNONYMS.values() for word in group]


def _pretraining_chunk(indices: range, *, seed: int) -> tuple[NDArray[np.uint8], list[tuple[DrawnObject, ...]]]:
    scenes = [pretraining_scene(seed, index) for index in indices]
    return np.stack([scene.image for scene in scenes]), [scene.objects for scene in scenes]


def draw_pretraining(
    count: int, *, seed: int, workers: int | None = None
) -> tuple[NDArray[np.uint8], list[tuple[DrawnObject, ...]]]:
    """Draw ``count`` pre-training scenes in parallel: images (count, 112, 112, 3) in uint8 and their objects."""
    images = np.empty((count, PRETRAINING.size, PRETRAINING.size, 3), dtype=np.uint8)
    objects: list[tuple[DrawnObject, ...]] = []
    for part, found in in_parallel(partial(_pretraining_chunk, seed=seed), count, workers):
        images[len(objects) : len(objects) + len(part)] = part
        objects += found
    return images, objects
