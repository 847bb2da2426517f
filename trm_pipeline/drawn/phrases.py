"""Drawn data sets with many classes, written in the layouts of CUB-200-2011 and of VG-200.

The scenes are those of :mod:`.drawn` with more objects, each in one of ten colours or in none, and the classes are phrases
that the embedded model has read in captions: "car", "vehicle", "red car", "red vehicle", "red thing". Two sets are made so:

* ``cub``: 312 attributes, about thirty of them present in an image. One object has up to five, so classes overlap: all
  nouns, the kinds of things that several nouns share, each kind and "thing" in each colour, and the most frequent nouns
  in a colour.
* ``vg200``: 200 classes with a long tail, all nouns and the most frequent nouns in a colour. Nouns and colours both have
  a steep prior, so the rarest class has a handful of training images.

Things of one kind go together in a scene. An object of which too little can be seen does not make its classes present;
in CUB's layout the label says that it was guessed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trm_pipeline.drawn.captions import CLASS_WORDS, SUPERCLASSES
from trm_pipeline.drawn.scenes import ALL_CLASSES, COLOURS, RECIPE_VERSION, Scene, SceneRecipe, draw_scene
from trm_pipeline.drawn.writing import in_parallel, write_once

VERSION = 1  # raise it whenever a change of the code here moves a pixel or a label
SCENES = SceneRecipe(
    size=224,
    styles=(0.7, 0.0, 0.0, 0.0, 0.3),  # of objects with a colour: those that show it
    single_side=(0.20, 0.40),
    multi_side=(0.13, 0.34),
    difficulty=0.9,
)


@dataclass(frozen=True)
class PhraseSet:
    """What one of the data sets is drawn from.

    Args:
        sizes: images of each split.
        streams: the second word of the seed of each split's generators, apart from those of all other drawn scenes.
        classes: how many.
        kinds: whether kinds of things, also in a colour, and colours of any thing are classes too.
        objects: least and most objects of a scene.
        noun_power: the k-th noun has weight k to minus this power.
        colour_power: the same of colours.
        uncoloured: share of objects without a colour.
        together: how much likelier nouns of the scene's own kind are.
    """

    sizes: Mapping[str, int]
    streams: Mapping[str, int]
    classes: int
    kinds: bool
    objects: tuple[int, int]
    noun_power: float
    colour_power: float
    uncoloured: float
    together: float = 4.0


PHRASE_SETS: Mapping[str, PhraseSet] = {
    "cub": PhraseSet(
        sizes={"train": 750, "test": 400},
        streams={"train": 4, "test": 5},
        classes=312,
        kinds=True,
        objects=(7, 11),
        noun_power=0.4,
        colour_power=0.4,
        uncoloured=0.1,
    ),
    "vg200": PhraseSet(
        sizes={"train": 1000, "test": 500},
        streams={"train": 6, "test": 7},
        classes=200,
        kinds=False,
        objects=(4, 8),
        noun_power=0.9,
        colour_power=0.9,
        uncoloured=0.15,
    ),
}
# Words that several nouns share. A person is the only figure, and "thing" is said of everything.
_KINDS = {word: names for word, names in SUPERCLASSES.items() if len(names) > 1 and word != "thing"}
_KIND_OF = {name: word for word, names in _KINDS.items() for name in names}


def phrases_of(name: str, colour: str | None) -> Iterator[str]:
    """Everything that an object is called, classes or not."""
    words = [CLASS_WORDS[name], *([_KIND_OF[name]] if name in _KIND_OF else [])]
    yield from words
    if colour is not None:
        yield from (f"{colour} {word}" for word in (*words, "thing"))


@cache
def _priors(key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities of nouns (kinds, nouns), for scenes of each kind, and of colours (colours,)."""
    made = PHRASE_SETS[key]
    rank = np.random.default_rng(made.streams["train"]).permutation(len(ALL_CLASSES))  # else those of VOC were the head
    weights = (1.0 + rank) ** -made.noun_power
    scenes = np.stack([weights * np.where(np.isin(ALL_CLASSES, names), made.together, 1.0) for names in _KINDS.values()])
    colours = np.arange(1.0, 1 + len(COLOURS)) ** -made.colour_power
    return scenes / scenes.sum(axis=1, keepdims=True), colours / colours.sum()


@cache
def class_phrases(key: str) -> tuple[str, ...]:
    """The classes of a set, in the order of its columns."""
    made = PHRASE_SETS[key]
    phrases = [CLASS_WORDS[name] for name in ALL_CLASSES]
    if made.kinds:
        phrases += [*_KINDS, *(f"{colour} {word}" for word in (*_KINDS, "thing") for colour in COLOURS)]
    nouns, colours = _priors(key)
    often = np.outer(nouns.mean(axis=0), colours).round(12).ravel()
    pairs = [f"{colour} {CLASS_WORDS[name]}" for name in ALL_CLASSES for colour in COLOURS]
    phrases += [pairs[at] for at in np.argsort(-often, kind="stable")]
    return tuple(phrases[: made.classes])


def phrase_scene(key: str, seed: int, split: str, index: int) -> Scene:
    """The scene number ``index`` of a split of a set."""
    made = PHRASE_SETS[key]
    rng = np.random.default_rng([seed, made.streams[split], index])
    nouns, colours = _priors(key)
    count = int(rng.integers(made.objects[0], made.objects[1] + 1))
    names = rng.choice(ALL_CLASSES, count, p=nouns[rng.integers(len(nouns))])
    given = [str(word) if rng.random() >= made.uncoloured else None for word in rng.choice(list(COLOURS), count, p=colours)]
    return draw_scene(rng, SCENES, [str(name) for name in names], colours=given)


# ------------------------------------------------------------------------------------------------------------ layouts
def _write_images(indices: range, *, key: str, seed: int, split: str, paths: Sequence[Path]) -> NDArray[np.int8]:
    """Write the scenes of a range; labels (N, C): 1 present, 0 absent, -1 where all that shows it can hardly be seen."""
    columns = {phrase: column for column, phrase in enumerate(class_phrases(key))}
    labels = np.zeros((len(indices), len(columns)), dtype=np.int8)
    for row, index in enumerate(indices):
        scene = phrase_scene(key, seed, split, index)
        Image.fromarray(scene.image).save(paths[index], quality=92)
        for item in sorted(scene.objects, key=lambda item: not item.difficult):
            seen = [columns[phrase] for phrase in phrases_of(item.name, item.colour) if phrase in columns]
            labels[row, seen] = -1 if item.difficult else 1
    return labels


def _write_cub(folder: Path, images: Mapping[str, Sequence[Path]], labels: Mapping[str, NDArray[np.int8]]) -> None:
    names = [path.relative_to(folder / "images").as_posix() for paths in images.values() for path in paths]
    table = np.concatenate([labels[split] for split in images])
    train = [int(split == "train") for split, paths in images.items() for _ in paths]
    (folder / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)), encoding="utf-8")
    (folder / "train_test_split.txt").write_text("".join(f"{i} {flag}\n" for i, flag in enumerate(train, 1)), encoding="utf-8")
    (folder / "attributes").mkdir()
    phrases = (phrase.replace(" ", "_") for phrase in class_phrases("cub"))
    lines = "".join(f"{c} {phrase}\n" for c, phrase in enumerate(phrases, 1))
    (folder / "attributes" / "attributes.txt").write_text(lines, encoding="utf-8")
    with (folder / "attributes" / "image_attribute_labels.txt").open("w", encoding="utf-8") as file:
        for i, row in enumerate(table.tolist(), 1):
            file.writelines(f"{i} {c} {int(label == 1)} {2 if label == -1 else 4} 0\n" for c, label in enumerate(row, 1))


def _write_vg(folder: Path, images: Mapping[str, Sequence[Path]], labels: Mapping[str, NDArray[np.int8]]) -> None:
    index: dict[str, list[int]] = {}
    for split, paths in images.items():
        (folder / f"{split}_list_500.txt").write_text("".join(f"{path.name}\n" for path in paths), encoding="utf-8")
        index |= {path.name: np.flatnonzero(row == 1).tolist() for path, row in zip(paths, labels[split], strict=True)}
    (folder / "vg_category_200_labels_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "vg_category_200.txt").write_text("".join(f"{phrase}\n" for phrase in class_phrases("vg200")), encoding="utf-8")


# Folder of the images, their names, and who writes the lists
_LAYOUTS = {"cub": ("images/drawn", "{:06d}.jpg", _write_cub), "vg200": ("VG_100K", "{}.jpg", _write_vg)}


def _write(folder: Path, *, key: str, seed: int, sizes: Mapping[str, int], workers: int | None) -> None:
    where, name, write_lists = _LAYOUTS[key]
    (folder / where).mkdir(parents=True)
    images, labels, first = {}, {}, 1
    for split, size in sizes.items():
        images[split] = [folder / where / name.format(first + index) for index in range(size)]
        work = partial(_write_images, key=key, seed=seed, split=split, paths=images[split])
        labels[split] = np.concatenate(list(in_parallel(work, size, workers, chunk=25)))
        first += size
    write_lists(folder, images, labels)


def write_drawn_phrases(
    key: str, root: str | os.PathLike[str], *, seed: int = 0, sizes: Mapping[str, int] | None = None, workers: int | None = None
) -> Path:
    """Write a set below ``root`` unless it is there already, and return the folder that its reader takes.

    Like :func:`.drawn.write_drawn_voc` it lies in a folder named after all that determines it, and is never half there.

    Args:
        key: ``cub`` or ``vg200``.
        root: A folder for caches; made if missing.
        seed: Seed of all scenes.
        sizes: Images in ``train`` and ``test``; missing ones keep the set's own.
        workers: Processes that draw; all cores by default. The result does not depend on it.

    Raises:
        ValueError: If there is no such set, or a size is not positive or names no split.
    """
    if key not in PHRASE_SETS:
        raise ValueError(f"write_drawn_phrases: key must be one of {', '.join(PHRASE_SETS)}, got {key!r}")
    made = PHRASE_SETS[key]
    wanted = {**made.sizes, **(sizes or {})}
    if set(wanted) != set(made.sizes) or min(wanted.values()) < 1:
        raise ValueError(f"write_drawn_phrases: sizes must be positive for train and test, got {dict(sizes or {})}")
    recipe = {**asdict(SCENES), **asdict(made), "sizes": wanted}
    stamp = {"version": [RECIPE_VERSION, VERSION], "recipe": recipe, "seed": seed}
    return write_once(root, f"drawn-{key}", stamp, partial(_write, key=key, seed=seed, sizes=wanted, workers=workers))
