"""The drawn scenes of many classes: what is drawn, what it is called, and the layouts it is written in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import gate
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.runs import read_json
from trm_pipeline.data import cub, vg200
from trm_pipeline.data.base import LabelledImages
from trm_pipeline.drawn import captions
from trm_pipeline.drawn import phrases as drawn_phrases
from trm_pipeline.drawn import scenes as drawn
from trm_pipeline.drawn.phrases import class_phrases, phrase_scene, phrases_of, write_drawn_phrases
from trm_pipeline.run import arguments, experiment

SIZES = {"train": 7, "test": 4}
SOURCES = {"cub": cub.SOURCE, "vg200": vg200.SOURCE}
READERS: Mapping[str, type[LabelledImages]] = {"cub": cub.CUB, "vg200": vg200.VG200}
KINDS = ("animal", "vehicle", "furniture", "household object", "plant", "shape")


@pytest.mark.parametrize(
    ("name", "colour", "expected"),
    [
        ("car", "red", {"car", "vehicle", "red car", "red vehicle", "red thing"}),
        ("car", None, {"car", "vehicle"}),
        ("diningtable", "pink", {"dining table", "furniture", "pink dining table", "pink furniture", "pink thing"}),
        ("person", "blue", {"person", "blue person", "blue thing"}),
        ("cloud", None, {"cloud"}),
    ],
)
def test_an_object_has_all_its_names(name: str, colour: str | None, expected: set[str]) -> None:
    phrases = list(phrases_of(name, colour))
    assert set(phrases) == expected and len(phrases) == len(expected)


def test_classes_are_counted_by_what_they_are() -> None:
    nouns, colours = set(captions.CLASS_WORDS.values()), set(drawn.COLOURS)
    for key, kinds, coloured in (("cub", 6, 200), ("vg200", 0, 164)):
        phrases = class_phrases(key)
        parts = [phrase.split(" ", 1) for phrase in phrases if phrase.split(" ")[0] in colours]
        assert len(set(phrases)) == len(phrases) == SOURCES[key].num_classes
        assert nouns <= set(phrases) and len(set(phrases) & set(KINDS)) == kinds
        assert sum(word in nouns for _, word in parts) == coloured
        assert sum(word in KINDS for _, word in parts) == 10 * kinds
        assert sum(word == "thing" for _, word in parts) == (10 if kinds else 0)


@pytest.mark.parametrize("key", SOURCES)
def test_coloured_nouns_are_the_most_frequent_ones(key: str) -> None:
    made, names = drawn_phrases.PHRASE_SETS[key], drawn.ALL_CLASSES
    rank = np.random.default_rng(made.streams["train"]).permutation(36)
    often: dict[str, float] = {}
    for kind in KINDS:
        weights = {
            name: (1 + rank[i]) ** -made.noun_power * (4 if name in captions.SUPERCLASSES[kind] else 1)
            for i, name in enumerate(names)
        }
        for name in names:
            for at, colour in enumerate(drawn.COLOURS):
                phrase = f"{colour} {captions.CLASS_WORDS[name]}"
                often[phrase] = often.get(phrase, 0.0) + weights[name] / sum(weights.values()) * (1 + at) ** -made.colour_power
    chosen = set(class_phrases(key)) & set(often)
    assert min(often[phrase] for phrase in chosen) >= max(often[phrase] for phrase in set(often) - chosen) - 1e-9


@pytest.mark.parametrize(("key", "least", "most"), [("cub", 26, 33), ("vg200", 7.5, 10)])
def test_labels_of_an_image_and_their_tail(key: str, least: float, most: float) -> None:
    phrases = class_phrases(key)
    count, images = dict.fromkeys(phrases, 0), 100
    for index in range(images):
        objects = phrase_scene(key, 0, "train", index).objects
        for phrase in {p for item in objects if not item.difficult for p in phrases_of(item.name, item.colour)} & set(phrases):
            count[phrase] += 1
    numbers = sorted(count.values())
    assert least < sum(numbers) / images < most
    assert numbers[-1] > 50 and numbers[len(numbers) // 2] < 6  # the head is in most images, half the classes in few


@pytest.mark.parametrize("name", drawn.ALL_CLASSES)
def test_an_object_shows_its_colour(name: str) -> None:
    """The same scene in two colours: how far its box moves from the one to the other, as a share of the way."""
    moved = []
    for seed in range(4):
        pair = [
            drawn.draw_scene(np.random.default_rng(seed), drawn_phrases.SCENES, [name], colours=[colour])
            for colour in ("red", "blue")
        ]
        (left, top, right, bottom), way = pair[0].objects[0].box, np.subtract(drawn.COLOURS["red"], drawn.COLOURS["blue"])
        assert [scene.objects[0].colour for scene in pair] == ["red", "blue"]
        red, blue = (scene.image[top:bottom, left:right].reshape(-1, 3).mean(axis=0) for scene in pair)
        moved.append((red - blue) @ way / (way @ way))
    assert min(moved) > 0.04 and np.mean(moved) > 0.08  # a frame of a bicycle is thin


def test_scenes_without_given_colours_are_those_of_version_1() -> None:
    """The drawn VOC, and what the embedded model was trained on: figures of before colours could be given."""
    assert drawn.RECIPE_VERSION == 1
    for scene, objects, mean in (
        (
            drawn.target_scene(0, "train", 1),
            [("person", "blue", (169, 30, 216, 131)), ("car", "yellow", (24, 8, 106, 45)), ("bus", None, (17, 66, 92, 135))],
            (150.52, 163.65, 186.60),
        ),
        (
            drawn.target_scene(0, "test", 1),
            [
                ("pottedplant", "yellow", (126, 87, 159, 125)),
                ("chair", None, (161, 142, 208, 189)),
                ("car", "red", (139, 69, 181, 94)),
            ],
            (154.80, 148.33, 173.59),
        ),
        (drawn.pretraining_scene(0, 1), [("mushroom", "green", (68, 65, 112, 104))], (151.13, 158.99, 159.05)),
    ):
        assert [(item.name, item.colour, item.box) for item in scene.objects] == objects
        assert scene.image.mean(axis=(0, 1)) == pytest.approx(mean, abs=0.2)  # not to the bit: of any Pillow


def test_an_object_without_a_colour_is_a_line_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    styles = []
    original = drawn._paint
    monkeypatch.setattr(drawn, "_paint", lambda *args: styles.append(args[4]) or original(*args))
    for seed in range(5):
        colours = [None, "red", "red"]
        drawn.draw_scene(np.random.default_rng(seed), drawn_phrases.SCENES, ["car", "tree", "bus"], colours=colours)
    assert styles.count("faint") == 5 and set(styles) == {"faint", "filled", "silhouette"} and len(styles) > 12


@pytest.mark.parametrize("key", SOURCES)
def test_the_layout_is_read_back(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # much is hidden, so that there are labels which only a hidden object gives
    monkeypatch.setattr(drawn_phrases, "SCENES", dataclasses.replace(drawn_phrases.SCENES, difficult_below=0.999))
    root, phrases = write_drawn_phrases(key, tmp_path, sizes=SIZES, workers=1), class_phrases(key)
    hidden = 0
    for split, size in SIZES.items():
        data = READERS[key](root, split)
        certain = cub.CUB(root, split, min_certainty=3).targets if key == "cub" else None
        assert len(data) == size and data.prompt_names() == list(phrases)
        for row in range(size):
            scene = phrase_scene(key, 0, split, row)
            pixels = np.asarray(Image.open(data.image_paths[row])).astype(float)
            assert np.abs(pixels - scene.image).mean() < 12
            for column, phrase in enumerate(phrases):
                shown = {item.difficult for item in scene.objects if phrase in phrases_of(item.name, item.colour)}
                assert data.targets[row, column] == float(False in shown)
                if certain is not None:
                    assert certain[row, column] == (-1.0 if shown == {True} else float(bool(shown)))
                hidden += shown == {True}
    assert hidden > 0


def test_scenes_depend_on_their_seed_and_number_alone(tmp_path: Path) -> None:
    def read(folder: str, workers: int = 1, seed: int = 0, train: int = 7) -> dict[str, bytes]:
        root = write_drawn_phrases("vg200", tmp_path / folder, sizes={"train": train, "test": 30}, workers=workers, seed=seed)
        data = {split: vg200.VG200(root, split) for split in ("train", "test")}
        assert [len(images) for images in data.values()] == [train, 30]
        return {f"{s} {i}": Path(path).read_bytes() for s, images in data.items() for i, path in enumerate(images.image_paths)}

    first = read("a")
    assert read("b", workers=2) == first
    assert first.items() <= read("c", train=9).items()
    other = read("d", seed=1)
    assert all(other[name] != first[name] for name in first) and len(set(first.values())) == len(first)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key must be one of cub, vg200, got 'voc'"):
        write_drawn_phrases("voc", tmp_path)
    for sizes in ({"val": 3}, {"train": 0}):
        with pytest.raises(ValueError, match="sizes must be positive for train and test, got {" + repr(next(iter(sizes)))):
            write_drawn_phrases("cub", tmp_path, sizes=sizes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "name"), [("cub", "drawn attributes"), ("vg200", "drawn scenes of 200 classes")])
def test_the_script_runs_without_any_data(
    key: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = dataclasses.replace(drawn_phrases.PHRASE_SETS[key], sizes={"train": 10, "test": 6})
    monkeypatch.setattr(drawn_phrases, "PHRASE_SETS", {key: made})
    where = SOURCES[key]
    typed = ["--methods", "text-pixel", "--known", "0.5", "--device", "cpu", "--workers", "0", "--tune", "--epochs", "1"]
    typed += ["--cache", str(tmp_path), "--output", str(tmp_path / "out"), "--set", "mirror=false"]
    assert arguments.parse(typed, where).preset.name == where.drawn_preset == f"embedded-{key}"
    experiment.main(typed, where)
    out = capsys.readouterr().out
    assert f"{name}: 8 training images (fit), 2 test images (held-out), embedded at 224 x 224" in out
    assert f"fit: 8 images, {where.num_classes} classes, " in out
    (row,) = read_json(tmp_path / "out" / "results.json")
    assert 0 < row["mAP"] <= 100


def test_the_gate_says_what_fails() -> None:
    good = {"zero_shot": 20.0, "zero_shot_tokens": 35.0, "probes": {"a": 30.0}, "tokens_all": 40.0, "tokens_tenth": 33.0}
    assert gate.PhraseGate(**good, chance=9.0).holds
    for change in (
        {"chance": 11.0},
        {"zero_shot": 31.0},
        {"zero_shot_tokens": 39.5},
        {"probes": {"a": 30.0, "b": 36.0}},
        {"tokens_tenth": 35.0},
    ):
        bad = gate.PhraseGate(**{"chance": 9.0, **good, **change})
        assert not bad.holds and len(re.findall("FAIL", str(bad))) == 1, change


def test_the_gate_takes_any_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "linear_probe", lambda x, y, x_val: (x_val @ torch.zeros(x.shape[1], y.shape[1]), 0.0))
    from trm_pipeline.embedded import load_embedded

    train = vg200.VG200(write_drawn_phrases("vg200", tmp_path, sizes={"train": 100, "test": 1}, workers=1))
    found = gate.run_phrase_gate(*load_embedded(), train.rows(range(80)), train.rows(range(80, 100)))
    present = int((train.targets[80:] == 1).sum())
    assert found.chance == pytest.approx(100 * present / (20 * 200), rel=1e-6)
    assert found.zero_shot > 2 * found.chance and found.zero_shot_tokens > found.zero_shot
