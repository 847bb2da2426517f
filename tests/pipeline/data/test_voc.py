"""The VOC reader on a tiny devkit written here and on real VOC2012 files."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from trm_pipeline.data.base import eval_transform, train_transform
from trm_pipeline.data.voc import VOC, VOC_CLASSES, class_prompt_names

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)

# image: its (width, height) and its objects (name, difficult), None for a missing tag
SCENES: dict[str, tuple[tuple[int, int], list[tuple[str, int | None]]]] = {
    "000005": ((40, 30), [("dog", 0), ("dog", 1), ("person", 0)]),
    "000007": ((20, 50), [("chair", 1), ("chair", 1)]),  # seen only as difficult: absent
    "000001": ((33, 33), [("tvmonitor", None)]),
    "000009": ((25, 25), []),
}
SPLITS = {"trainval": ["000005", "000007", "000001"], "test": ["000009", "000005"], "val": []}


def write_devkit(parent: Path) -> Path:
    folder = parent / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for image, (size, objects) in SCENES.items():
        mode, colour = ("CMYK", (9, 99, 9, 9)) if image == "000007" else ("RGB", (250, 10, 10))
        Image.new(mode, size, colour).save(folder / "JPEGImages" / f"{image}.jpg")
        root = ElementTree.Element("annotation")
        for name, difficult in objects:
            item = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(item, "name").text = name
            if difficult is not None:
                ElementTree.SubElement(item, "difficult").text = str(difficult)
            part = ElementTree.SubElement(item, "part")  # as in the person layout files: a name that is no class
            ElementTree.SubElement(part, "name").text = "head"
        ElementTree.ElementTree(root).write(folder / "Annotations" / f"{image}.xml")
    for split, images in SPLITS.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{image}\n" for image in images), encoding="utf-8")
        for name in VOC_CLASSES:
            lines = []
            for image in images:
                marks = [difficult for other, difficult in SCENES[image][1] if other == name]
                lines.append(f"{image} {-1 if not marks else 0 if all(marks) else 1:2d}\n")
            (folder / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """A VOC2007 folder below tmp_path/VOCdevkit."""
    return write_devkit(tmp_path)


def test_classes() -> None:
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(set(VOC_CLASSES))
    changed = {a: b for a, b in zip(VOC_CLASSES, class_prompt_names(), strict=True) if a != b}
    assert changed == {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


def test_tiny_devkit(devkit: Path) -> None:
    data = VOC(devkit.parent, 2007, "trainval")
    assert data.ids == ["000005", "000007", "000001"], "the order of the list, not of the names"
    assert data.targets.dtype == torch.float32 and data.targets.shape == (3, 20)
    present = [[VOC_CLASSES[c] for c in row.nonzero().flatten().tolist()] for row in data.targets]
    assert present == [["dog", "person"], [], ["tvmonitor"]]
    assert int(data.targets.sum()) == 3
    image, target, index = data[0]
    assert image.shape == (3, 30, 40) and image.dtype == torch.float32 and type(image) is torch.Tensor
    torch.testing.assert_close(image.mean(dim=(1, 2)), torch.tensor([250, 10, 10]) / 255, atol=0.02, rtol=0)
    assert torch.equal(target, data.targets[0]) and index == 0
    assert data[1][0].shape == (3, 50, 20), "three channels whatever the file holds"
    assert len(list(data)) == len(data) == 3


def test_root_is_the_devkit_or_its_parent(devkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = devkit.parents[1]
    expected = VOC(parent, "2007", "test")
    assert expected.ids == ["000009", "000005"] and not expected.targets[0].any(), "an image without objects"
    monkeypatch.chdir(devkit.parent)
    for root in (str(devkit.parent), parent, ".", ".."):
        assert torch.equal(VOC(root, 2007, "test").targets, expected.targets)


def test_a_devkit_of_another_name(devkit: Path) -> None:
    expected, renamed = VOC(devkit.parent).targets, devkit.parents[1] / "pascal"
    devkit.parent.rename(renamed)
    assert torch.equal(VOC(renamed).targets, expected)
    with pytest.raises(ValueError, match="--download unpacks into a folder VOCdevkit, got .*pascal; rename it"):
        VOC(renamed, 2012, "train", download=True)


def test_a_list_with_a_mark_of_encoding_and_blank_lines(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "val.txt").write_text("000005\n\n000007\n\n", encoding="utf-8-sig")
    assert VOC(devkit.parent, split="val").ids == ["000005", "000007"]


def test_download_goes_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(url: str, root: str, **_: object) -> None:
        calls.append((url, Path(root)))
        write_devkit(Path(root))

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", fetch)
    assert len(VOC(tmp_path / "VOCdevkit", split="test", download=True)) == 2
    assert len(VOC(tmp_path, split="test", download=True)) == 2
    assert len(calls) == 1, "what is there is not fetched again"
    assert "VOCtest_06-Nov-2007" in calls[0][0] and calls[0][1] == tmp_path


# --- transforms ---


def test_eval_transform() -> None:
    image = Image.linear_gradient("L").resize((60, 20)).convert("RGB")
    out = eval_transform((12, 16), mean=MEAN, std=STD)(image)
    assert out.shape == (3, 12, 16) and type(out) is torch.Tensor
    pixels = torch.from_numpy(np.array(image.resize((16, 12), Image.Resampling.BICUBIC))) / 255
    expected = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    torch.testing.assert_close(out, expected)


def test_train_transform() -> None:
    torch.manual_seed(0)
    image = Image.merge("RGB", [Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90), Image.radial_gradient("L")])
    transform = train_transform(24, mean=(0, 0, 0), std=(1, 1, 1))
    outs = torch.stack([transform(image) for _ in range(40)])
    assert outs.shape == (40, 3, 24, 24) and float(outs.min()) >= 0 and float(outs.max()) <= 1
    assert len({tuple(out.flatten().tolist()) for out in outs}) > 30, "every draw another view"
    kinds = [type(part).__name__ for part in transform.transforms]
    assert kinds[:3] == ["RandomResizedCrop", "RandomHorizontalFlip", "RandAugment"]
    plain = v2.Compose([part for part in transform.transforms if not isinstance(part, v2.RandAugment)])
    outs = torch.stack([plain(image) for _ in range(40)])
    # The second channel falls from left to right or, flipped, rises; the first never turns over.
    slopes = (outs[:, 1, :, 0] - outs[:, 1, :, -1]).mean(dim=1).sign()
    assert 8 < int((slopes > 0).sum()) < 32
    tall = (outs[:, 0, -1] - outs[:, 0, 0]).mean(dim=1)
    assert bool((tall > 0.5).all()), "at least half the area, so most of the height"


# --- bad input ---


def test_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"VOCdevkit/VOC2007 not found \(.* holds: pictures\); pass the VOCdevkit .* --download$"
    ):
        VOC(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds: nothing"):
        VOC(tmp_path / "pictures")
    with pytest.raises(FileNotFoundError, match="holds: no such folder"):
        VOC(tmp_path / "nowhere")


def test_missing_year_and_split(devkit: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"VOC2012 not found \(.* holds: VOC2007\)"):
        VOC(devkit.parent, 2012)
    with pytest.raises(ValueError, match="year must be 2007 or 2012, got 2010"):
        VOC(devkit.parent, 2010)
    with pytest.raises(FileNotFoundError, match=r"train.txt not found \(beside it: test.txt, trainval.txt, val.txt\)"):
        VOC(devkit.parent, split="train")
    with pytest.raises(ValueError, match="val.txt lists no image"):
        VOC(devkit.parent, split="val")


def test_a_list_names_an_image_once(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "val.txt").write_text("000005\n000007\n000005\n", encoding="utf-8")
    with pytest.raises(ValueError, match="val.txt must list an image once, got .*000005.jpg twice"):
        VOC(devkit.parent, split="val")


def test_missing_files(devkit: Path) -> None:
    (devkit / "JPEGImages" / "000007.jpg").rename(devkit / "away.jpg")
    with pytest.raises(FileNotFoundError, match="000007.jpg is missing, but .*trainval.txt asks for it"):
        VOC(devkit.parent)
    (devkit / "away.jpg").rename(devkit / "JPEGImages" / "000007.jpg")
    (devkit / "Annotations" / "000001.xml").unlink()
    with pytest.raises(FileNotFoundError, match="000001.xml is missing"):
        VOC(devkit.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object><name>zebra</name></object></annotation>", "names the class 'zebra', not one of .*; correct"),
        ("<annotation><object/></annotation>", "names the class '', not one of"),
        ("", "is not readable XML"),
        ("<annotation><object><name>dog</na", "is not readable XML"),
        ('<?xml version="1.0" encoding="none-such"?><annotation/>', "is not readable XML"),
        ("<html><body>404</body></html>", "must hold an <annotation>, got <html>; restore the file"),
    ],
    ids=["class", "no name", "empty", "cut", "encoding", "another page"],
)
def test_bad_annotations(devkit: Path, text: str, message: str) -> None:
    (devkit / "Annotations" / "000001.xml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"000001.xml {message}"):
        VOC(devkit.parent)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_an_image_cut_short_is_named(devkit: Path, share: float) -> None:
    path = devkit / "JPEGImages" / "000005.jpg"
    Image.effect_noise((64, 64), 99).convert("RGB").save(path)
    assert VOC(devkit.parent)[0][0].shape == (3, 64, 64)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"VOC: .*000005.jpg is not a readable image \(.*\); restore the file"):
        VOC(devkit.parent)[0]


# --- real files ---


def read_by_pattern(path: Path) -> set[str]:
    """Classes of the objects that are not difficult, read from the raw text."""
    present = set()
    for item in re.findall(r"<object>(.*?)</object>", path.read_text(encoding="utf-8"), flags=re.DOTALL):
        name = re.search(r"<name>(\w+)</name>", re.sub(r"<part>.*?</part>", "", item, flags=re.DOTALL))
        assert name is not None
        if "<difficult>1</difficult>" not in item:
            present.add(name.group(1))
    return present


@pytest.mark.parametrize(("split", "count"), [("train", 70), ("trainval", 100)])
def test_real_voc2012(shared_data: Path, split: str, count: int) -> None:
    devkit = shared_data / "VOCdevkit"
    data = VOC(devkit, 2012, split).with_transform(eval_transform(32, mean=MEAN, std=STD))
    folder = devkit / "VOC2012"
    assert data.ids == (folder / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8").split()
    assert len(data) == count and data.targets.shape == (count, 20)
    for image, target in zip(data.ids, data.targets, strict=True):
        present = {VOC_CLASSES[c] for c in target.nonzero().flatten().tolist()}
        assert present == read_by_pattern(folder / "Annotations" / f"{image}.xml"), image
    assert set(data.targets.flatten().tolist()) == {0.0, 1.0}
    image, target, index = data[count - 1]
    assert image.shape == (3, 32, 32) and bool(image.isfinite().all()) and float(image.std()) > 0.1
    assert torch.equal(target, data.targets[-1]) and index == count - 1
