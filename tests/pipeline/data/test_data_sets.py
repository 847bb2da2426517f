"""The readers of COCO, VG-200, NUS-WIDE and CUB on small data sets in their layouts, with the odd cases of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.layouts import (
    COCO_IDS,
    coco_names,
    cub_attribute,
    draw_labels,
    nus_names,
    write_coco,
    write_cub,
    write_nus,
    write_nus_cole,
    write_nus_scpnet,
    write_tiny,
    write_vg,
)
from tests.helpers.runs import read_json
from trm_pipeline.config.presets import HELD_OUT
from trm_pipeline.data import nus
from trm_pipeline.data.base import LabelledImages, held_out
from trm_pipeline.data.coco import COCO, COCO_CLASSES
from trm_pipeline.data.cub import CUB, attribute_phrase
from trm_pipeline.data.nus import NUS, NUS_CLASSES
from trm_pipeline.data.vg200 import VG200
from trm_pipeline.run.arguments import parse
from trm_pipeline.run.prepare import counts


def same(found: LabelledImages, labels: NDArray[np.int8], names: list[str]) -> None:
    """Images and labels, row by row; every image opens."""
    assert [Path(path).name for path in found.image_paths] == [Path(name.replace("\\", "/")).name for name in names]
    assert found.ids == [Path(path).stem for path in found.image_paths]
    assert found.targets.dtype == torch.float32 and found.targets.tolist() == labels.tolist()
    assert len(found) == len(names) and len(found.class_names) == labels.shape[1]
    for row in range(len(found)):
        image, target, index = found[row]
        assert image.shape == (3, 20, 24) and torch.equal(target, found.targets[row]) and index == row


# --- COCO ---


@pytest.fixture
def coco_labels() -> NDArray[np.int8]:
    labels = draw_labels(7, 80, 0.05)
    labels[2], labels[3, 5] = 0, 2  # another image without objects, and a crowd
    labels[4] = 0
    labels[4, [7, 70]] = 2  # nothing but crowds
    return labels


@pytest.fixture
def coco(tmp_path: Path, coco_labels: NDArray[np.int8]) -> Path:
    return write_coco(tmp_path / "coco", {"train": coco_labels, "val": coco_labels[1:3]})


def test_coco_has_every_image_in_the_order_of_the_list(coco: Path, coco_labels: NDArray[np.int8]) -> None:
    data = COCO(coco)
    same(data, coco_labels > 0, coco_names("train", 7))
    assert data.class_names == COCO_CLASSES == tuple(data.prompt_names()) and data.name == "MS-COCO 2014"
    assert len(set(COCO_CLASSES)) == len(COCO_IDS) == 80 and max(COCO_IDS) == 90
    same(COCO(coco, "val"), coco_labels[1:3] > 0, coco_names("val", 2))


def test_coco_annotated_only_and_crowds(coco: Path, coco_labels: NDArray[np.int8]) -> None:
    """A crowd is an annotation, also where it does not count as a label."""
    annotated = [row for row in range(7) if coco_labels[row].any()]
    assert annotated == [1, 3, 4, 5, 6]
    names = [coco_names("train", 7)[row] for row in annotated]
    data = COCO(coco, annotated_only=True)
    same(data, coco_labels[annotated] > 0, names)
    assert data.mask_rows is not None and data.mask_rows.tolist() == [4, 3, 2, 1, 0], "objects are listed from the last image on"
    assert data.name == "MS-COCO 2014 annotated images"
    same(COCO(coco, annotated_only=True, crowd=False), coco_labels[annotated] == 1, names)


def test_coco_of_two_files_put_together(coco: Path, coco_labels: NDArray[np.int8]) -> None:
    """Each counted its annotations from 1, and both list some of the images and all categories."""
    path = coco / "annotations" / "instances_train2014.json"
    whole = read_json(path)
    for number, item in enumerate(whole["annotations"]):
        item["id"] = 1 + number % (len(whole["annotations"]) // 2)
    whole["images"] += whole["images"][2:4]
    whole["categories"] *= 2
    path.write_text(json.dumps(whole), encoding="utf-8")
    same(COCO(coco), coco_labels > 0, coco_names("train", 7))


def test_coco_names_are_those_of_real_files(shared_data: Path) -> None:
    names = np.load(shared_data / "clip_text" / "vitb32_text.npz", allow_pickle=False)["coco80_names"]
    assert [str(name).replace("_", " ") for name in names] == list(COCO_CLASSES)


def test_coco_says_what_is_wrong(coco: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"instances_train2014.json not found \(.* holds: .*cocodataset.org"):
        COCO(coco / "annotations")
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        COCO(coco, "test")
    path = coco / "annotations" / "instances_train2014.json"
    text = path.read_text(encoding="utf-8")

    def changed(old: str, new: str, message: str) -> None:
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            COCO(coco)
        path.write_text(text, encoding="utf-8")

    changed('"zebra"', '"okapi"', "80 categories of COCO, got 'okapi' where 'zebra' belongs")
    changed(
        '"id": 90, "name": "toothbrush"',
        '"id": 1, "name": "toothbrush"',
        "one of its categories for each id, got 'toothbrush' and 'person' for 1; give those of the second file",
    )
    changed('"annotations"', '"captions"', "has no annotations; take the instances file")
    changed("}", "", "instances_train2014.json must be JSON, and cannot be read")
    changed('"file_name"', '"name"', "must have file_name and id for each of its images, got {'id': ")
    changed('"category_id"', '"category"', "must have category_id and image_id for each of its annotations, got")
    image = int(coco_names("train", 7)[1][-16:-4])
    changed(f'"image_id": {image},', '"image_id": 0,', "has an object of image 0, which it does not list")
    changed('"category_id": ', '"category_id": 9', "has an object of category 9[0-9]+, which it does not list")
    first, second = coco_names("train", 7)[:2]
    ids = [int(name[-16:-4]) for name in (first, second)]
    said = f"one of its images for each id, got '{first}' and '{second}' for {ids[0]}; give those of the second file"
    changed(f'"id": {ids[1]}}}', f'"id": {ids[0]}}}', said)
    changed(f'"{second}"', f'"{first}"', f"instances_train2014.json must list an image once, got .*{first} twice")
    (coco / "train2014" / coco_names("train", 7)[3]).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train2014.*\.jpg is missing, but .*instances_train2014.json asks for it; unpack"
    ):
        COCO(coco)
    (coco / "train2014").rename(coco / "train")
    with pytest.raises(
        FileNotFoundError, match="and 6 more is missing, .*coco holds: annotations, train, val2014; put the images"
    ):
        COCO(coco)


# --- VG-200 ---


@pytest.fixture
def vg(tmp_path: Path) -> Path:
    return write_vg(tmp_path / "vg200", {"train": draw_labels(5, 200, 0.05), "test": draw_labels(3, 200, 0.05, seed=1)})


def test_vg_reads_lists_and_both_image_folders(vg: Path) -> None:
    for split, count, seed, first in (("train", 5, 0, 2300000), ("test", 3, 1, 2299999)):
        data = VG200(vg, split)
        same(data, draw_labels(count, 200, 0.05, seed), [f"{first - 7 * row}.jpg" for row in range(count)])
    with pytest.raises(ValueError, match="numbers alone; put the 200 names.*or give them with --class-names"):
        data.prompt_names()
    (vg / "vg_category_200.txt").write_text("\n".join(f"thing {column}" for column in range(200)), encoding="utf-8")
    assert VG200(vg, "test").prompt_names()[199] == "thing 199"
    (vg / "vg_category_200.txt").write_text("\n".join(["tree", *map(str, range(198)), "tree"]), encoding="utf-8")
    with pytest.raises(ValueError, match="class_names must be different, got 'tree' 2 times"):
        VG200(vg)
    (vg / "vg_category_200.txt").write_text("\n".join(f"thing {column}" for column in range(200)), encoding="utf-8")
    (vg / "vg").mkdir()  # the lists may lie in a folder of their own
    for path in (*vg.glob("*.txt"), *vg.glob("*.json")):
        path.rename(vg / "vg" / path.name)
    assert VG200(vg, "test").targets.equal(data.targets)


def test_vg_says_what_is_wrong(vg: Path) -> None:
    index = vg / "vg_category_200_labels_index.json"
    labels = read_json(index)
    index.write_text('{"2300000.jpg": [3], ' + json.dumps(labels)[1:], encoding="utf-8")
    with pytest.raises(ValueError, match="must have the labels of 2300000.jpg once, got them twice"):
        VG200(vg)
    index.write_text(json.dumps({**labels, "2300000.jpg": [3, 200]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes \[3, 200\], wanted are numbers from 0 to 199; take the index of 200"):
        VG200(vg)
    for classes in (5, ["3"]):
        index.write_text(json.dumps({**labels, "2300000.jpg": classes}), encoding="utf-8")
        with pytest.raises(ValueError, match="gives 2300000.jpg the classes .*, wanted are numbers from 0 to 199"):
            VG200(vg)
    del labels["2300000.jpg"]
    index.write_text(json.dumps(labels), encoding="utf-8")
    with pytest.raises(ValueError, match="no labels of 2300000.jpg, which .*train_list_500.txt names"):
        VG200(vg)
    index.write_text("5", encoding="utf-8")
    with pytest.raises(ValueError, match="labels_index.json must be an object of lists by image, got int"):
        VG200(vg)
    index.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="labels_index.json must be JSON, and cannot be read"):
        VG200(vg)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="labels_index.json not found .*HCP-MLR-PL, without which"):
        VG200(vg)
    (vg / "train_list_500.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lists no image"):
        VG200(vg)
    (vg / "train_list_500.txt").unlink()
    with pytest.raises(FileNotFoundError, match="train_list_500.txt not found .*data.zip"):
        VG200(vg)


# --- NUS-WIDE ---


def test_nus_official(tmp_path: Path) -> None:
    labels = {"train": draw_labels(6, 81, 0.03), "test": draw_labels(4, 81, 0.03, seed=2)}
    labels["train"][4], labels["train"][5, 3] = 0, 1
    root = write_nus(tmp_path / "nus", labels)
    for split, table in labels.items():
        data = NUS(root, split)
        same(data, table, nus_names(split, len(table)))
        assert data.name == "NUS-WIDE, official split"
    kept = [row for row in range(6) if labels["train"][row].any()]
    assert kept == [1, 2, 3, 5]
    data = NUS(root, drop_empty=True)
    same(data, labels["train"][kept], [nus_names("train", 6)[row] for row in kept])
    assert data.name == "NUS-WIDE, official split without empty images"
    Path(data.image_paths[0]).unlink()
    with pytest.raises(FileNotFoundError, match="is missing, .*; images whose links are dead have to be had from someone"):
        NUS(root)
    assert len(set(NUS_CLASSES)) == 81 and list(NUS_CLASSES) == sorted(NUS_CLASSES)


@pytest.mark.parametrize("arguments, expected", [([], 1.9), (["--split", "scpnet"], 2.4), (["--drop-empty"], 2.4)])
def test_nus_without_empty_images_has_more_labels_each(arguments: list[str], expected: float) -> None:
    typed = ["--data-root", "nus", "--known", "single", *arguments]
    assert parse(typed, nus.SOURCE).preset.expected_positives == expected


def test_nus_official_says_what_is_wrong(tmp_path: Path) -> None:
    root = write_nus(tmp_path / "nus", {"train": draw_labels(4, 81, 0.03)})
    path = root / "Groundtruth" / "TrainTestLabels" / "Labels_zebra_Train.txt"
    for lines, message in (
        ("010", "each of 4 images of TrainImagelist.txt, got 3 labels"),
        ("0120", "got another character"),
        ("01-0", "got another character"),
    ):
        path.write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            NUS(root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="Labels_zebra_Train.txt not found; wanted is Flickr"):
        NUS(root)
    with pytest.raises(FileNotFoundError, match="TestImagelist.txt not found .*holds: TrainImagelist.txt"):
        NUS(root, "test")
    for variant, wanted in (("cole", "formatted_train_images.npy"), ("scpnet", "nus_train_full.txt")):
        with pytest.raises(FileNotFoundError, match=f"{wanted} not found"):
            NUS(root, variant=variant)
    with pytest.raises(ValueError, match="variant must be one of official, cole, scpnet, got 'mine'"):
        NUS(root, variant="mine")


def test_nus_of_cole(tmp_path: Path) -> None:
    labels = {"train": draw_labels(5, 81, 0.03), "test": draw_labels(3, 81, 0.03, seed=1)}
    root = write_nus_cole(tmp_path / "nus", labels)
    for split, table in labels.items():
        same(NUS(root, split, variant="cole"), table, [f"{split}{row}_4f3e.jpg" for row in range(len(table))])
    names = np.load(listing := root / "formatted_train_images.npy")
    np.save(listing, names.astype(bytes))
    same(NUS(root, variant="cole"), labels["train"], names.tolist())
    np.save(root / "formatted_train_labels.npy", 0 * labels["train"])
    with pytest.raises(ValueError, match="lists no image with a label"):
        NUS(root, variant="cole", drop_empty=True)
    np.save(root / "formatted_train_labels.npy", labels["train"][:4])
    with pytest.raises(ValueError, match=r"labels.npy must have shape \(5, 81\), got \(4, 81\)"):
        NUS(root, variant="cole")
    np.save(listing, names.astype(object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"images.npy must be an array of numpy's, and cannot be read \((?!.*pickle)"):
        NUS(root, variant="cole")


def test_nus_of_scpnet(tmp_path: Path) -> None:
    labels = {"train": draw_labels(5, 81, 0.03), "test": draw_labels(3, 81, 0.03, seed=1)}
    root = write_nus_scpnet(tmp_path / "nus", labels)
    for split, table in labels.items():
        same(NUS(root, split, variant="scpnet"), table, [f"{9 * row}_{split}_m.jpg" for row in range(len(table))])
    (root / "nuswide_labels.txt").write_text("\n".join(reversed(NUS_CLASSES)), encoding="utf-8")
    data = NUS(root, variant="scpnet")
    assert data.prompt_names()[0] == "zebra" and data.name == "NUS-WIDE, scpnet split", "their own order of the numbers"
    (root / "nuswide_labels.txt").write_text("\n".join(["okapi", *NUS_CLASSES[:-1]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must name the 81 concepts, got 81 names, not the same: \['okapi', 'zebra'\]"):
        NUS(root, variant="scpnet")
    (root / "nuswide_labels.txt").unlink()
    (root / "nus_val.txt").write_text("a_m.jpg,3 81", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 must be an image name, a comma and numbers from 0 to 80, got 'a_m.jpg,3 81'"):
        NUS(root, "test", variant="scpnet")


# --- CUB ---

TRAIN = [True, False, True, True, False]


@pytest.fixture
def cub(tmp_path: Path) -> tuple[Path, NDArray[np.int8], NDArray[np.int64]]:
    labels, certainty = draw_labels(5, 312, 0.1), np.random.default_rng(3).integers(1, 5, (5, 312))
    return write_cub(tmp_path, labels, TRAIN, certainty), labels, certainty


def test_cub_has_the_official_split_and_the_flag(cub: tuple[Path, NDArray[np.int8], NDArray[np.int64]]) -> None:
    root, labels, certainty = cub
    for split in ("train", "test"):
        rows = [row for row in range(5) if TRAIN[row] == (split == "train")]
        for folder in (root, root / "CUB_200_2011"):
            data = CUB(folder, split)
            same(data, labels[rows], [f"Bird_{row}.jpg" for row in rows])
        wanted = np.where(certainty >= 3, labels, -1)
        some = CUB(root, split, min_certainty=3)
        same(some, wanted[rows], [f"Bird_{row}.jpg" for row in rows])
        assert some.name.endswith("certainty 3 and more") and (wanted == -1).any()
    assert data.class_names[17] == cub_attribute(17)
    assert data.prompt_names()[17] == "bird whose part 2 color is shade 1 (light)"
    assert attribute_phrase("has_bill_shape::curved_(up_or_down)") == "bird whose bill shape is curved (up or down)"
    assert attribute_phrase("red_dining_table") == "red dining table"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 313 0 3 1.5", "attribute must be from 1 to 312, got 313"),
        ("6 1 0 3 1.5", "image must be from 1 to 5, got 6"),
        ("1 1 2 3 1.5", "presence must be from 0 to 1, got 2"),
        ("1 1 0", "must have image, attribute, presence and certainty in each line"),
        ("1 1 yes 3 1.5", "must have image, attribute, presence and certainty in each line"),
        ("1 2 0 3 1.5", "has no line for 1 labels, the first attribute 1 of image 1"),
        ("5 7 0 3 1.5\n1 1 0 3 1.5", "one line for a label, got several for attribute 7 of image 5"),
    ],
)
def test_cub_refuses_lines_it_cannot_read(cub: tuple[Path, NDArray[np.int8], NDArray[np.int64]], line: str, message: str) -> None:
    path = cub[0] / "CUB_200_2011" / "attributes" / "image_attribute_labels.txt"
    first, rest = path.read_text(encoding="utf-8").split("\n", 1)
    assert first.startswith("1 1 ")
    path.write_text(f"{line}\n{rest}", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        CUB(cub[0])


def test_cub_says_what_is_missing(cub: tuple[Path, NDArray[np.int8], NDArray[np.int64]]) -> None:
    root = cub[0]
    with pytest.raises(FileNotFoundError, match=r"images.txt not found \(.*wanted is CUB_200_2011 or the folder that holds it"):
        CUB(root / "CUB_200_2011" / "images")
    listing = root / "CUB_200_2011" / "images.txt"
    with listing.open("a", encoding="utf-8") as file:
        file.write("2 001.Bird_0/Bird_0.jpg\n")
    with pytest.raises(ValueError, match="one line for number 2, got '002.Bird_1/Bird_1.jpg' and '001.Bird_0/Bird_0.jpg'"):
        CUB(root)
    listing.write_text("".join(listing.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    attributes = (root / "attributes.txt").read_text(encoding="utf-8").splitlines()
    (root / "attributes.txt").write_text("\n".join(attributes[::-1]), encoding="utf-8")
    assert CUB(root).class_names[17] == cub_attribute(17), "an attribute has its number, not its line"
    for lines, message in (
        (["1"], "attributes.txt must have a number and what it stands for in each line, got '1'"),
        (["313 x", *attributes[1:]], "attributes.txt must number its lines from 1 to 312, and has no 1"),
        ([*attributes[:1], "313 x", *attributes[2:9], "314 x", *attributes[10:]], "1 to 312, and has no 2;"),
    ):
        (root / "attributes.txt").write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            CUB(root)
    (root / "attributes.txt").unlink()
    with pytest.raises(FileNotFoundError, match="attributes.txt not found"):
        CUB(root)
    (root / "CUB_200_2011" / "train_test_split.txt").write_text("1 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="says nothing about image 2"):
        CUB(root)
    (root / "CUB_200_2011" / "attributes" / "image_attribute_labels.txt").unlink()
    (root / "CUB_200_2011" / "train_test_split.txt").write_text("".join(f"{row + 1} 1\n" for row in range(5)), encoding="utf-8")
    with pytest.raises(ValueError, match="puts no image into test"):
        CUB(root, "test")
    with pytest.raises(FileNotFoundError, match="image_attribute_labels.txt not found"):
        CUB(root)


# --- what all of them share ---


@pytest.mark.parametrize(("key", "read"), [("coco", COCO), ("vg200", VG200), ("nus", NUS), ("cub", CUB)])
def test_marks_of_encoding_and_blank_lines_change_nothing(
    key: str, read: Callable[[Path], LabelledImages], tmp_path: Path
) -> None:
    before = read(root := write_tiny(key, tmp_path))
    for path in (*root.rglob("*.txt"), *root.rglob("*.json")):
        path.write_text("\n".join([path.read_text(encoding="utf-8"), "", ""]), encoding="utf-8-sig")
    after = read(root)
    assert (after.ids, after.class_names) == (before.ids, before.class_names) and torch.equal(after.targets, before.targets)


def test_the_most_frequent_classes_are_said() -> None:
    targets = torch.tensor([[0.0, 1, -1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    said = counts("train", LabelledImages("toys", ["cat", "sky", "sun", "zebra"], [f"{row}.jpg" for row in range(4)], targets))
    assert said.endswith("; most frequent: sky 100%, sun 50%, cat 25%")


def test_held_out_images_are_those_of_coles_split() -> None:
    assert held_out(10)[HELD_OUT] == [3, 7]
    for count, fit, first in ((5717, 4574, [5, 6, 11, 15, 22]), (82081, 65665, [3, 4, 34, 37, 48]), (5994, 4795, None)):
        parts = held_out(count)
        assert len(parts["fit"]) == fit and sorted(parts["fit"] + parts[HELD_OUT]) == list(range(count))
        assert first is None or parts[HELD_OUT][:5] == first


def test_a_list_names_an_image_once(tmp_path: Path) -> None:
    """A list put together from two of them would count it twice, also with other labels, and on both sides of the hold-out."""
    labels = {"train": draw_labels(4, 200, 0.03)}
    cub = write_cub(tmp_path / "cub", draw_labels(4, 312, 0.1), [True] * 4, np.full((4, 312), 3))
    listed = "".join(f"{row + 1} 001.Bird_0/Bird_0.jpg\n" for row in range(4))
    (cub / "CUB_200_2011" / "images.txt").write_text(listed, encoding="utf-8")
    vg = write_vg(tmp_path / "vg", labels)
    nus = write_nus_scpnet(tmp_path / "nus", {"train": labels["train"][:, :81]})
    for listing in (vg / "train_list_500.txt", nus / "nus_train_full.txt"):
        lines = listing.read_text(encoding="utf-8").splitlines()
        listing.write_text("\n".join([*lines, lines[1]]), encoding="utf-8")
    for read in (lambda: VG200(vg), lambda: NUS(nus, variant="scpnet"), lambda: CUB(cub)):
        with pytest.raises(ValueError, match=r"must list an image once, got .*\.jpg twice"):
            read()


def test_some_rows_of_a_data_set(vg: Path) -> None:
    whole = VG200(vg)
    part = whole.rows([3, 1]).with_transform(lambda image: torch.tensor(image.size))
    assert part.ids == [whole.ids[3], whole.ids[1]] and torch.equal(part.targets, whole.targets[[3, 1]])
    assert part[1][0].tolist() == [24, 20] and part.image_paths[0] == whole.image_paths[3]
    assert len(whole) == 5 and whole[3][0].shape == (3, 20, 24), "the whole is as it was"
