"""A folder of one's own images: label files, split, thresholds, and the whole way from images to scores of others."""

import csv
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from PIL import Image

from trm_losses import TRMHead
from trm_losses.metrics import mean_average_precision
from trm_pipeline import methods
from trm_pipeline.drawn.scenes import TARGET, draw_scene
from trm_pipeline.folder import model as folder_model
from trm_pipeline.folder import outputs
from trm_pipeline.folder import pictures as folder_pictures
from trm_pipeline.folder import run as folder_run
from trm_pipeline.folder.hold_out import hold_out
from trm_pipeline.folder.image_files import FolderImages, find_images, read_image, to_bytes
from trm_pipeline.folder.labels import read_labels
from trm_pipeline.run import experiment
from trm_pipeline.training import loop as training

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ["a.jpg", "b.jpg", "sub/c.png", "sub/é 1.jpg"]


def read(tmp_path, text, *, name="labels.csv", images=IMAGES, **options):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_labels(path, images, **options)


# ---------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    "text",
    [
        "image,cat,dog\na.jpg,1,0\nb.jpg,,1\n",
        "\ufeffimage;cat;dog\r\na.jpg;1;0\r\nb.jpg;;1\r\n",
        "image\tcat\tdog\na.jpg\tYes\tNO\nb.jpg\t?\tTrue",
        '\n"image", "cat", dog \n"a.jpg", present ,absent\n\nb,nan,1.0\n,,\n',
        "file,cat,dog\n./a.jpg,true,false\nb.jpg,unknown,y\n",
        "image,cat,dog\ra.jpg,1,0\rb.jpg,None,1\r",
    ],
)
def test_tables_in_any_dress(text, tmp_path):
    labels = read(tmp_path, text)
    assert labels.files == ["a.jpg", "b.jpg"] and labels.class_names == ["cat", "dog"] and not labels.lists
    assert labels.targets.tolist() == [[1, 0], [-1, 1]]


@pytest.mark.parametrize(
    "text",
    ["image,labels\na.jpg,dog|cat\nb.jpg,\n", 'image,Tags\na.jpg,"dog, cat"\nb.jpg,', "image,label\na.jpg,cat;dog;\nb.jpg,\n"],
)
@pytest.mark.parametrize("absent", [False, True])
def test_lists_say_what_is_present(text, absent, tmp_path):
    labels = read(tmp_path, text, unlisted_absent=absent)
    assert labels.class_names == ["cat", "dog"] and labels.lists != absent
    assert labels.targets.tolist() == [[1, 1], [0, 0] if absent else [-1, -1]]


# What a column of lists says: the cells, the separator that is found, and the names of each cell.
LISTS = {
    "#": (["car#dog", "dog"], "#", ["car dog", "dog"]),
    "a trailing separator": (["car;", "dog;", ""], ";", ["car", "dog", ""]),
    "spaces, in many combinations": (
        ["car dog", "dog bus car", "dog", "bus", "car bus", "car"],
        " ",
        ["car dog", "dog bus car", "dog", "bus", "car bus", "car"],
    ),
    "numbers by spaces": (["16 0", "7 1", "5"], " ", ["16 0", "7 1", "5"]),
    "a comma within names": (["A, b|C", "A, b", "C"], "|", ["A,_b C", "A,_b", "C"]),
    "a comma within names that have parts in common": (
        ["A, b|C", "A, d|E, b", "E, d", "C"],
        "|",
        ["A,_b C", "A,_d E,_b", "E,_d", "C"],
    ),
    "spaces and # within names": (["C# x|go", "go", "C# x"], "|", ["C#_x go", "go", "C#_x"]),
    "quoted names": (["'A, b', 'C'", '"C"'], ",", ["A,_b C", "C"]),
    "names that hold spaces": (["polar bear", "zebra", "polar bear"], None, ["polar_bear", "zebra", "polar_bear"]),
    "JSON": (['["car", "dog \\u00e9"]', "[]", '["car"]'], None, ["car dog_é", "", "car"]),
    "Python": (["['car', 'dog']", "['A, b']", "('car',)"], None, ["car dog", "A,_b", "car"]),
    "numpy": (["['car' 'dog']", "['car']"], None, ["car dog", "car"]),
    "no quotes": (["[car, dog]", "[dog]"], ",", ["car dog", "dog"]),
    "Label Studio": (['{"choices": ["car", "dog"]}', "car"], None, ["car dog", "car"]),
    "other scripts": (["猫、犬", "犬"], "、", ["猫 犬", "犬"]),
}


def write_lists(cells, header="image_name,tags"):
    out = io.StringIO()
    csv.writer(out).writerows([header.split(","), *([f"{i}.jpg", cell] for i, cell in enumerate(cells))])
    return out.getvalue(), [f"{i}.jpg" for i in range(len(cells))]


@pytest.mark.parametrize("case", LISTS)
def test_the_separator_of_lists_belongs_to_the_file(case, tmp_path):
    cells, separator, names = LISTS[case]
    text, images = write_lists(cells)
    labels = read(tmp_path, text, images=images)
    found = [{labels.class_names[c] for c in (row == 1).nonzero().flatten()} for row in labels.targets]
    assert found == [{name.replace("_", " ") for name in row.split()} for row in names] and labels.separator == separator


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["car dog", "dog bus"], "line 2, column tags: 'car dog' may be one name or a list; say --separator ' ' if it is a list"),
        (["polar bear", "brown bear", "zebra"], "'polar bear' may be one name or a list"),
        (["car/dog", "dog"], "say --separator '/' if it is a list"),
        (["zebra", "Train, steam", "Train, steam"], "line 3, column tags: 'Train, steam' may be one name or a list"),
        (["cat,dog", "dog,bird", "cat|dog", "bird"], "may be separated by '|' or ','; say which it is with --separator"),
        (['["car", "dog"]', "car,dog"], "'car,dog' is no array such as those of other cells"),
        (['{"car": 1, "dog": 0}', "car"], "is no list of names"),
    ],
)
def test_what_may_be_a_list_or_a_name_is_asked(cells, said, tmp_path):
    text, images = write_lists(cells)
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path, text, images=images)


@pytest.mark.parametrize(("separator", "names"), [(" ", ["car", "dog"]), (";", ["car dog", "dog"]), ("::", ["car dog", "dog"])])
def test_a_separator_that_is_said_is_taken(separator, names, tmp_path):
    text, images = write_lists(["car dog", "dog"], "ImageID,Labels")
    assert read(tmp_path, text, images=images, separator=separator).class_names == names
    with pytest.raises(ValueError, match="--separator is for a column of lists"):
        read(tmp_path, "image,cat\na.jpg,1\n", separator=separator)


@pytest.mark.parametrize("header", ["filename,categories", "Id,Target", "ImageID,LabelName", "x,attribute_ids", "x,Tags"])
def test_headers_of_a_column_of_lists(header, tmp_path):
    assert read(tmp_path, f"{header}\na.jpg,cat|dog\n").class_names == ["cat", "dog"]


# ---------------------------------------------------------------------------------------------- the split of the file
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("image,cat,split,scene\na.jpg,1,Train,s\nb.jpg,0,hold_out,s\nsub/c.png,1,val,\n", "labels.csv"),
        ("image,SPLIT,scene,tags\na.jpg,training,s,cat|dog\nb.jpg,test,s,dog\nsub/c.png,Valid,,cat\n", "labels.csv"),
        (
            '{"image": "a.jpg", "labels": {"cat": 1}, "split": "train", "scene": "s"}\n'
            '{"image": "b.jpg", "labels": {"cat": 0}, "split": "Held out", "scene": "s"}\n'
            '{"image": "sub/c.png", "labels": {}, "split": "dev"}\n',
            "x.jsonl",
        ),
    ],
)
def test_a_file_says_which_images_are_held_out_and_which_belong_together(text, name, tmp_path):
    labels = read(tmp_path, text, name=name, group="scene")
    assert labels.held.tolist() == [False, True, True] and labels.files == ["a.jpg", "b.jpg", "sub/c.png"]
    assert labels.groups[0] == labels.groups[1] == "s" != labels.groups[2] and "split" not in labels.class_names
    assert read(tmp_path, text.replace("scene", "folder"), name=name, group="folder").groups == labels.groups
    if name == "x.jsonl":
        assert read(tmp_path, text, name=name, group="folder").groups == ["", "", "sub"]


@pytest.mark.parametrize(
    ("text", "group", "said"),
    [
        ("image,cat,split\na.jpg,1,3\n", None, "line 2, split: '3' is no side; wanted train, or one of val, test and hold-out"),
        ("image,cat,split\na.jpg,1,\n", None, "line 2, split: '' is no side"),
        ("image,cat\na.jpg,1\n", "scene", "--group must be folder or a column"),
        ("image,split\na.jpg,train\n", None, "the header must name a column for each class"),
        ("image,cat,scene\na.jpg,1,kitchen\n", None, "or name it with --group"),
    ],
)
def test_mistakes_of_the_split_are_told(text, group, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path, text, group=group)


def test_lines_of_json(tmp_path):
    lines = [{"image": "b.jpg", "labels": {"dog": 1, "cat": None}}, {"image": "a.jpg", "labels": {"cow": False, "dog": "?"}}]
    labels = read(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n", name="x.jsonl")
    assert labels.files == ["b.jpg", "a.jpg"] and labels.class_names == ["dog", "cat", "cow"] and not labels.lists
    assert labels.targets.tolist() == [[1, -1, -1], [-1, -1, 0]]
    labels = read(tmp_path, '\ufeff{"image": "b.jpg", "labels": ["dog", "cat"]}', name="x.jsonl")
    assert labels.class_names == ["cat", "dog"] and labels.lists and labels.targets.tolist() == [[1, 1]]


@pytest.mark.parametrize(("minus_one", "expected"), [("unknown", [1, 0, -1]), ("absent", [1, -1, 0])])
def test_minus_one_means_what_is_said(minus_one, expected, tmp_path):
    assert read(tmp_path, "image,x,y,z\na.jpg,1,0,-1\n", minus_one=minus_one).targets.tolist() == [expected]


@pytest.mark.parametrize("name", ["sub/c.png", "sub/c", "c.png", "c", "sub\\c.png", "./sub/c.png"])
def test_images_by_any_name_that_is_theirs_alone(name, tmp_path):
    assert read(tmp_path, f"image,cat\n{name},1\n").files == ["sub/c.png"]


def test_composed_and_decomposed_characters_are_one_name(tmp_path):
    assert read(tmp_path, "image,cat\nsub/e\u0301 1.jpg,1\n").files == ["sub/é 1.jpg"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,cat\na.jpg,1\nb.jpg,maybe\n", "labels.csv, line 3, column cat: 'maybe' is no label (present: 1 yes"),
        ("image,cat\na.jpg,2\n", "line 2, column cat: '2' is no label"),
        ("image,cat\na.jpg,-1\n", "say --minus-one unknown or --minus-one absent"),
        ("image,cat\nz.gif,1\n", "line 2: there is no image 'z.gif' in the folder; the folder holds a.jpg and 3 more"),
        ("image,cat\nA.JPG,1\n", "near it: a.jpg"),
        ("image,cat\na.png,1\n", "near it: a.jpg"),
        ("image,cat\na.jpg,1\nb.jpg,1\na,0\n", "line 4: a second row for a.jpg, which labels.csv, line 2 has"),
        ("image,cat\n,1\n", "line 2: the first column, the image, is blank"),
        ("image,cat\na.jpg,1,0\n", "line 2: 3 cells, but the header has 2"),
        ("image,labels\na.jpg,cat,dog\n", 'put the list in quotes, "cat,dog", or separate it by |'),
        ("image,cat,cat\na.jpg,1,1\n", "columns 2 and 3 are both named 'cat'"),
        ("image,cat,\na.jpg,1,1\n", "column 3 has no name"),
        ("image,cat,Cat\na.jpg,1,1\n", "'cat' and 'Cat' differ in case or spaces alone"),
        ("image,labels\na.jpg,cat\nb.jpg,CAT\n", "'CAT' and 'cat' differ in case"),
        ("a.jpg,1,0\nb.jpg,0,0\n", "the first line must be a header"),
        ("image\na.jpg\n", "the header must name a column of images and one for each class, got 'image' alone"),
        ("image,cat\n", "no row of labels"),
        ("image,labels\na.jpg,\n", "names no class"),
        ("image,label\na.jpg,1\nb.jpg,0\n", "a list must hold names of classes, got 0, 1; leave it blank"),
        ("image,labels\na.jpg,cat\nb.jpg,none\n", "a list must hold names of classes, got none; leave it blank"),
        ("", "is empty"),
        (b"image,caf\xe9\na.jpg,1\n", "line 1: not UTF-8"),
        ('image,cat\na.jpg,"1\n' + "b.jpg,1\n" * 20_000, "a quote that is never closed"),
    ],
)
def test_mistakes_of_a_table_are_told_with_their_place(text, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path, text)


def test_a_name_of_two_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'c' may be a/c.png or b/c.png; write its path"):
        read(tmp_path, "image,cat\nc,1\n", images=["a/c.png", "b/c.png"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"image": "a.jpg", "labels": {"cat": "perhaps"}}', "x.jsonl, line 1, class cat: 'perhaps' is no label"),
        ('{"image": "a.jpg", "labels": ["cat"]}\n{"image": ', "x.jsonl, line 2, column 11: not JSON"),
        ('[{"image": "a.jpg", "labels": ["cat"]}]', "wanted one object a line"),
        ('{"image": "a.jpg"}', "wanted one object a line"),
        ('{"image": "a.jpg", "labels": ["cat,dog", "cat", "dog"]}', "line 1: 'cat,dog' consists of other classes"),
        ('{"image": "a.jpg", "labels": [1]}', "a list of labels must hold names"),
        ('{"image": "a.jpg", "labels": ["cat"]}\n{"image": "b.jpg", "labels": {"cat": 1}}', "lists in some lines and objects"),
    ],
)
def test_mistakes_of_json_are_told_with_their_place(text, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path, text, name="x.jsonl")


def test_some_mistakes_are_shown_and_all_are_counted(tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, "image,cat\n" + "".join(f"none{i}.jpg,1\n" for i in range(9)) + "a.jpg,x\n")
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and "line 11, column cat" in lines[0] and lines[-1].strip() == "and 5 more mistakes"


def test_files_that_are_no_label_files(tmp_path):
    with pytest.raises(ValueError, match="save a spreadsheet as 'CSV UTF-8'"):
        read(tmp_path, "x", name="labels.xlsx")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_labels(tmp_path / "none.csv", IMAGES)


# ---------------------------------------------------------------------------------------------------------- images
def test_images_of_a_folder(tmp_path):
    for name in ("b.JPG", "a.png", "sub/ü/c.webp", ".hidden.jpg", ".cache/d.jpg", "notes.txt", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == ["a.png", "b.JPG", "sub/ü/c.webp"]
    with pytest.raises(ValueError, match="no image in .*; 1 left out, no image: notes.txt"):
        find_images(_empty(tmp_path))
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        find_images(tmp_path / "a.png")


def _empty(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").touch()
    return folder / "empty"


def test_links_are_followed_and_content_tells_what_is_an_image(tmp_path, capsys):
    store, photos = tmp_path / "store", tmp_path / "photos"
    for folder in (store / "deep", photos):
        folder.mkdir(parents=True)
    for path in (store / "a.png", store / "deep" / "b.JFIF", photos / "scan", photos / "c.dat"):
        Image.new("RGB", (4, 4)).save(path, "JPEG")
    for name in ("one", "two"):
        (photos / name).symlink_to(store)
    (store / "deep" / "up").symlink_to(store)  # in a circle
    (photos / "above").symlink_to(tmp_path)
    (photos / "self").symlink_to(photos / "self")
    (photos / "gone.png").symlink_to(tmp_path / "nothing.png")
    (photos / "labels.csv").write_text("image,cat\n", encoding="utf-8")
    (photos / "Thumbs.db").touch()
    os.mkfifo(photos / "pipe.png")
    own = ["a.png", "deep/b.JFIF"]
    assert find_images(photos) == ["c.dat", *(f"one/{name}" for name in own), "scan", *(f"two/{name}" for name in own)]
    assert capsys.readouterr().out.splitlines() == [
        "4 left out, no image: gone.png, labels.csv, pipe.png, self",
        "3 left out, a link to a folder that it lies in: above, one/deep/up, two/deep/up",
    ]


def test_every_kind_of_image_is_read_upright_in_rgb(tmp_path):
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(32, axis=0)  # dark on the left
    rgb = Image.fromarray(ramp).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("L").save(tmp_path / "gray.png")
    rgb.convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "float.tif")
    exif[0x010F] = "Maker"
    rgb.save(tmp_path / "turned broken.jpg", exif=exif)
    broken = bytearray((tmp_path / "turned broken.jpg").read_bytes())
    maker = broken.index(b"\x01\x0f\x00\x02")
    broken[maker + 2 : maker + 8] = b"\x00\x0b\x00\x00\x00\x01"  # a text that says it is a number
    (tmp_path / "turned broken.jpg").write_bytes(broken)
    for path in sorted(tmp_path.iterdir()):
        image = read_image(path, (16, 16))
        assert image.mode == "RGB" and image.size == (64, 32), path
        left, right = (np.asarray(image)[:, columns].mean() for columns in (slice(8), slice(-8, None)))
        if path.stem.startswith("turned"):
            left, right = right, left
        assert left < 40 and right > 215, path


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 2048, 4095], [0, 128, 255]),  # 12 bits in 16
        ([0, 500, 1000], [0, 125, 249]),  # at most 10
        ([0, 32768, 65535], [0, 128, 255]),
        ([7, 7, 7], [255, 255, 255]),
        ([0, 0, 0], [0, 0, 0]),
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 0.6, math.nan], [0, 153, 0]),
        ([0.0, math.inf, -math.inf], [0, 0, 0]),
        ([0.0, 0.75, 1.00001], [0, 191, 255]),
        ([0.0, 0.01, 0.015], [0, 163, 245]),
        ([0.0, 128.0, 255.0], [0, 128, 255]),
        ([-1000, 0, 1000], [0, 128, 255]),
        ([-9999, 0.5, 1.0], [0, 128, 255]),
        ([-3.4028235e38, 0.5, 1.0], [0, 128, 255]),
        ([0, 1000, 1023, 65535], [0, 249, 255, 255]),
    ],
)
def test_numbers_beyond_a_byte_are_seen(values, shown):
    assert to_bytes(np.array(values)).tolist() == shown


def test_an_image_without_a_number_is_named(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "nan.tif")
    data = FolderImages([tmp_path / "nan.tif", tmp_path / "gone.png"], (4, 4), None)
    assert data[0][0].isnan().all() and data.why_unreadable(0) == "no pixel is a finite number"
    assert "No such file" in data.why_unreadable(1)


def png16(path, values):
    """A PNG of 16 bits with two, three or four bands, which Pillow does not write."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    made = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(made))


def tiff16(path, values, order, compressed):
    """A TIFF of 16 bits and three bands, turned by 180 degrees."""
    data, kind = values.astype(f"{order}u2").tobytes(), 8 if compressed else 1
    data = zlib.compress(data) if compressed else data
    height, width, bands = values.shape
    tags = [
        (256, width),
        (257, height),
        (258, None),
        (259, kind),
        (262, 2),
        (273, None),
        (274, 3),
        (277, bands),
        (278, height),
        (279, len(data)),
    ]
    end = 8 + 2 + 12 * len(tags) + 4
    out = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    for tag, value in tags:
        out += struct.pack(f"{order}HHII", tag, *((3, bands, end) if tag == 258 else (4, 1, value or end + 6)))
    path.write_bytes(out + bytes(4) + struct.pack(f"{order}3H", 16, 16, 16) + data)


@pytest.mark.parametrize("kind", ["gray and alpha", "rgb", "rgba", "tiff <", "tiff >", "tiff < compressed", "tiff > compressed"])
def test_colors_of_12_bits_in_16_are_seen(kind, tmp_path):
    ramp = np.linspace(0, 4095, 64).round().astype(np.uint16)[None, :, None].repeat(8, axis=0)
    opaque = np.full_like(ramp, 65535)
    if kind.startswith("tiff"):
        tiff16(tmp_path / "x", ramp.repeat(3, axis=2)[:, ::-1], kind[5], "compressed" in kind)
    else:
        bands = {"gray and alpha": [ramp, opaque], "rgb": [ramp] * 3, "rgba": [ramp] * 3 + [opaque]}[kind]
        png16(tmp_path / "x", np.concatenate(bands, axis=2))
    image = np.asarray(read_image(tmp_path / "x", (16, 16)))
    assert np.abs(image - ramp.astype(float) * 255 / 4095).max() <= 0.51


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png", (16, 16))).min() == 255


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (3000, 2000)])
def test_tiny_and_huge_images(size, tmp_path):
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "x.jpg")
    image = read_image(tmp_path / "x.jpg", (224, 224))
    assert image.size == size if max(size) < 3000 or min(size) < 448 else 448 <= min(image.size) < 1000
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() < 6


# ------------------------------------------------------------------------------------------------------- hold-out
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("count", "classes", "known"), [(10, 4, 1.0), (40, 8, 0.4), (200, 6, 0.2), (30, 1, 0.5)])
def test_hold_out_shares_every_class(count, classes, known, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(count, classes, generator=generator) < 0.2).float()
    targets[torch.rand(count, classes, generator=generator) >= known] = -1
    held = hold_out(targets, 0.2, seed=seed)
    assert torch.equal(held, hold_out(targets, 0.2, seed=seed))
    assert not (held & (targets == -1).all(dim=1)).any()
    total = int((targets != -1).any(dim=1).sum())
    assert round(0.2 * total) - 1 <= held.sum() <= max(1, total // 2, round(0.2 * total))
    for c in range(classes):
        present = int((targets[:, c] == 1).sum())
        kept, out = (int((targets[part][:, c] == 1).sum()) for part in (~held, held))
        assert kept >= min(1, present)
        if count >= 40 and present >= 2:  # there is room enough
            assert 1 <= out <= max(2, 0.5 * present + 1)


@pytest.mark.parametrize("seed", range(8))
def test_hold_out_keeps_groups_together(seed):
    rng = np.random.default_rng(seed)
    groups = [f"scene {g}" for g in rng.integers(0, 20, 100)]
    of_scene = {name: (rng.random(4) < 0.4).astype(float) for name in sorted(set(groups))}
    targets = torch.tensor(np.array([np.where(rng.random(4) < 0.7, of_scene[name], -1) for name in groups]))
    held = hold_out(targets, 0.2, seed=seed, groups=groups).tolist()
    sides = {name: {side for side, other in zip(held, groups, strict=True) if other == name} for name in of_scene}
    assert all(len(side) == 1 for side in sides.values())
    assert 10 <= sum(held) <= 35
    for c in range(4):
        having = {groups[i] for i in range(100) if targets[i, c] == 1}
        assert len(having) < 4 or {True, False} == set().union(*(sides[name] for name in having))
    for names in (["all"] * 100, ["one", *["other"] * 99]):  # nothing that could be spared
        assert not hold_out(targets, 0.2, groups=names)[1:].any()


def test_hold_out_of_next_to_nothing():
    assert hold_out(torch.tensor([[1.0, 0.0]]), 0.2).tolist() == [False]
    assert hold_out(torch.full((5, 2), -1.0), 0.2).sum() == 0
    assert hold_out(torch.tensor([[1.0], [1.0], [0.0]]), 0.0).sum() == 0
    assert hold_out(torch.eye(3) * 2 - 1, 0.3).sum() == 0  # the only present label of a class is for training
    assert hold_out(torch.tensor([[1.0], [1.0], [0.0]]), 0.3).sum() == 1


# ------------------------------------------------------------------------------------------------------ thresholds
def ranked(word):
    """Scores and labels of images that are P (present) or N from the highest score to the lowest."""
    return np.linspace(0.95, 0.05, len(word)), np.array([letter == "P" for letter in word]).astype(int)


def drawn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 30)
    return np.round(rng.random(30) * 0.7 + 0.3 * labels, 1 if seed % 2 else 6), labels


# In the first of the words four thresholds are equally good, in the second the lowest is best, below every score.
@pytest.mark.parametrize(("scores", "labels"), [*map(drawn, range(8)), ranked("PPPNNPNNPNNP"), ranked("NNNNNPPPPPP")])
def test_thresholds_are_those_of_the_best_f1(scores, labels):
    distinct = sorted(set(scores.tolist()))
    tried = [distinct[0] / 2] + [(a + b) / 2 for a, b in itertools.pairwise(distinct)]
    best, chosen = -1.0, math.nan
    for threshold in tried:
        found = [s > threshold for s in scores]
        right = sum(1 for f, y in zip(found, labels, strict=True) if f and y)
        f1 = 2 * right / (sum(found) + labels.sum())
        if f1 > best + 1e-9 or (abs(f1 - best) <= 1e-9 and abs(threshold - 0.5) < abs(chosen - 0.5)):
            best, chosen = f1, threshold
    got = folder_model.choose_threshold(torch.tensor(scores), torch.tensor(labels))
    assert got == pytest.approx(chosen, abs=1e-6)


def test_no_threshold_from_few_labels():
    scores = torch.linspace(0, 1, 12)
    assert folder_model.choose_threshold(scores, (scores > 0.7).float(), least=5) is None  # four present
    assert folder_model.choose_threshold(scores, (scores > 0.3).float(), least=5) is None  # four absent
    assert folder_model.choose_threshold(scores, (scores > 0.5).float(), least=5) == pytest.approx(0.5)
    assert folder_model.choose_threshold(scores[:0], scores[:0]) is None


# ---------------------------------------------------------------------------------------------------------- sheets
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [3, 24])
def test_a_sheet_shows_the_highest_entries_of_images_and_classes_in_turn(count, seed):
    order = torch.randint(0, 30, (40, 6), generator=torch.Generator().manual_seed(seed)) / 30  # many are equal
    order[:, 5] = 0
    most, chosen = max(2, math.ceil(count / 5)), []
    for value, i, c in sorted((-float(order[i, c]), i, c) for i in range(40) for c in range(6)):
        own = sum(other == c for _, other in chosen)
        if -value >= 0.1 and len(chosen) < count and own < most and all(other != i for other, _ in chosen):
            chosen.append((i, c))
    assert outputs._varied(order, 0.1, count) == chosen


# ----------------------------------------------------------------------------------------------------- the whole way
CLASSES = ["person", "car", "dog", "sheep"]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """36 drawn scenes and their labels: two broken files, a folder below, a name in Greek, one image in gray."""
    folder = tmp_path_factory.mktemp("own") / "images"
    (folder / "λόφος").mkdir(parents=True)
    rows = {}
    for i in range(36):
        rng = np.random.default_rng([7, i])
        names = [name for name in CLASSES[:3] if rng.random() < 0.5] or ["cat"]
        scene = draw_scene(rng, TARGET, names)
        name = f"λόφος/{i}.jpg" if i % 5 == 0 else f"{i}.png"
        Image.fromarray(scene.image).convert("L" if i == 3 else "RGB").save(folder / name)
        found = {item.name for item in scene.objects}
        rows[name] = [int(c in found) if c != "sheep" else 0 for c in CLASSES]
    (folder / "cut.jpg").write_bytes((folder / "λόφος" / "0.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    rows |= {"cut.jpg": [1, 0, 0, 0], "empty.png": [0, 0, 0, 1]}
    return folder, rows


def write_table(path, rows, *, classes=CLASSES, hidden=()):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(["image", *classes])
        for i, (name, values) in enumerate(rows.items()):
            cells = ["" if (i + c) % 3 in hidden else value for c, value in enumerate(values)]
            csv.writer(file).writerow([name, *cells])
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return ["--cache", str(tmp_path_factory.mktemp("cache")), "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(images, cache, tmp_path_factory):
    """A finished training, and what it printed."""
    folder, rows = images
    base = tmp_path_factory.mktemp("trained")
    labels = write_table(base / "labels.csv", rows, hidden=(0,))
    command = [sys.executable, str(ROOT / "examples" / "train_folder.py"), "train", str(folder), str(labels)]
    done = subprocess.run([*command, "--output", str(base / "run"), *cache], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return base / "run", done.stdout


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_training_says_what_it_does(trained):
    run, printed = trained
    assert "38 images, 4 classes; 66% of 152 labels known" in printed
    assert "no label is present of sheep: nothing to learn from, scored by name alone" in printed
    assert "knows drawn scenes only. On photographs" in printed and "mean nothing for photographs" in printed
    assert "2 of 38 images cannot be read and are left out:" in printed
    assert "empty.png: the file is empty" in printed and "cut.jpg: image file is truncated" in printed
    assert "zero-shot, same model" in printed and "present labels in the hold-out this is a rough figure" in printed
    assert {path.name for path in run.iterdir()} == set(outputs.FILES)
    for name in ("doubtful.png", "contradicted.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 500 and np.asarray(picture.convert("L")).std() > 10


def test_the_split_is_written_and_the_figures_are_of_it(trained, images):
    run, printed = trained
    _, rows = images
    part = {row["image"]: row["part"] for row in read_csv(run / "split.csv")}
    assert len(part) == 36 and not {"cut.jpg", "empty.png"} & set(part)
    held = [name for name, where in part.items() if where == "hold-out"]
    assert 7 <= len(held) <= 18
    scores = {row["image"]: row for row in read_csv(run / "scores.csv")}
    assert {name: row["part"] for name, row in scores.items()} == part
    place = {name: i for i, name in enumerate(rows)}
    precisions = []
    for c, name in enumerate(CLASSES):
        known = [(float(scores[i][name]), rows[i][c]) for i in held if (place[i] + c) % 3]
        ranked = [y for _, y in sorted(known, reverse=True)]
        if 0 < sum(ranked) < len(ranked):
            hits = [sum(ranked[: k + 1]) / (k + 1) for k, y in enumerate(ranked) if y]
            precisions.append(sum(hits) / len(hits))
    figures = json.loads((run / "model.json").read_text(encoding="utf-8"))["scores"]
    assert figures["classes_scored"] == len(precisions) == 3 and figures["images"] == len(held)
    assert figures["mAP"] == pytest.approx(100 * sum(precisions) / 3, abs=0.01)
    assert f"trained                  {figures['mAP']:5.1f}" in printed


def test_thresholds_are_applied_as_they_are_written(trained):
    run, _ = trained
    classes = json.loads((run / "model.json").read_text(encoding="utf-8"))["classes"]
    assert list(classes) == CLASSES and not classes["sheep"]["trained"] and classes["sheep"]["threshold"] == 0.5
    assert {about["threshold_from"].split(":")[0] for about in classes.values()} <= {"hold-out", "default"}
    for row in read_csv(run / "scores.csv"):
        sure = {name for name in CLASSES if abs(float(row[name]) - classes[name]["threshold"]) > 1e-4}
        assert set(row["present"].split(";")) & sure == {n for n in sure if float(row[n]) > classes[n]["threshold"]}


def test_prediction_equals_the_scores_of_training(trained, images, tmp_path, capsys):
    run, _ = trained
    folder, _ = images
    folder_run.main(["predict", str(run), str(folder), "--output", str(tmp_path / "s.csv"), "--workers", "0", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "2 of 38 images cannot be read" in printed and "36 images" in printed
    before, after = ({row["image"]: row for row in read_csv(path)} for path in (run / "scores.csv", tmp_path / "s.csv"))
    assert list(after) == [name for name in find_images(folder) if name in before] and len(after) == 36
    for name, row in after.items():
        assert row["present"] == before[name]["present"]
        for c in CLASSES:
            assert float(row[c]) == pytest.approx(float(before[name][c]), abs=2e-4)
    one = ["predict", str(run / "model.json"), str(folder / "1.png"), "--output", str(tmp_path / "one.csv"), "--workers", "0"]
    folder_run.main([*one, "--device", "cpu"])
    (row,) = read_csv(tmp_path / "one.csv")
    assert row["image"] == "1.png" and float(row["car"]) == pytest.approx(float(before["1.png"]["car"]), abs=2e-4)


def test_prediction_refuses_another_backbone_and_folders_without_a_model(trained, images, tmp_path, monkeypatch):
    run, _ = trained
    arguments = [str(images[0]), "--output", str(tmp_path / "s.csv"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="no finished model at .*wanted the folder that 'train' wrote"):
        folder_run.main(["predict", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="--pretrained x is of another model"):
        folder_run.main(["predict", str(run), *arguments, "--pretrained", "x"])
    (tmp_path / "model.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="is not the model.json of a folder"):
        folder_run.main(["predict", str(tmp_path), *arguments])
    (tmp_path / "s.csv").write_text("image,cat\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="exists and was not written by predict"):
        folder_run.main(["predict", str(run), *arguments])
    (tmp_path / "s.csv").unlink()
    monkeypatch.setattr(folder_model, "weights_digest", lambda backbone: "another")
    with pytest.raises(SystemExit, match="with other weights than those of the embedded model here"):
        folder_run.main(["predict", str(run), *arguments])
    assert not (tmp_path / "s.csv").exists()


def test_a_tag_stays_a_tag(tmp_path, monkeypatch):
    """Whatever lies in the working directory; a path says that a file is meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laion400m_e32").write_bytes(b"weights")
    (tmp_path / "openai").mkdir()
    for tag in ("laion400m_e32", "openai"):
        assert folder_model.weights_file("ViT-B/32", tag) is None
    for name in ("./laion400m_e32", "own.pt"):
        (tmp_path / name).write_bytes(b"weights")
        assert folder_model.weights_file("ViT-B-32", name) == str(tmp_path / name)


def test_a_model_of_open_clip_from_a_weights_file(images, cache, tmp_path, capsys, monkeypatch):
    """Random weights: what is tested is the way there, and that another file is refused afterwards."""
    import open_clip

    vision = {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
    words = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": words})
    (tmp_path / "tiny-vit.json").write_text(config, encoding="utf-8")
    open_clip.add_model_config(tmp_path / "tiny-vit.json")
    torch.manual_seed(0)
    files = [tmp_path / name for name in ("w.pt", "other.pt")]
    for file in files:
        torch.save(open_clip.create_model("tiny-vit").state_dict(), file)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", {"openai": {}})
    fetch = folder_model.load_open_clip
    fetched = {"openai": str(files[0])}
    monkeypatch.setattr(folder_model, "load_open_clip", lambda name, source, **kw: fetch(name, fetched.get(source, source), **kw))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()  # and the tag is meant
    rows = dict(list(images[1].items())[:6])
    rows = {name: [*values, 0, 1] for name, values in rows.items()}
    labels = write_table(tmp_path / "labels.csv", rows, classes=[*CLASSES, "a_lap top", "ΔΙΑ"])
    model = ["--model", "tiny-vit", "--pretrained", "openai", "--image-size", "96", "--epochs", "1"]
    arguments = ["--output", str(tmp_path / "run"), *model, *cache, "--names", "ΔΙΑ=A lap top"]
    folder_run.main(["train", str(images[0]), str(labels), *arguments])
    said = capsys.readouterr().out.splitlines()
    assert not any("demonstration" in line for line in said)
    assert sum("the same for 4 ('a lap top') and 5 ('A lap top'); they cannot" in line for line in said) == 1
    saved = json.loads((tmp_path / "run" / "model.json").read_text(encoding="utf-8"))
    assert saved["pretrained"] == "openai" and saved["image_size"] == [96, 96]
    assert saved["classes"]["a_lap top"]["words"] == "a lap top"
    predict = ["predict", str(tmp_path / "run"), str(images[0] / "1.png"), "--output", str(tmp_path / "s.csv"), "--device", "cpu"]
    folder_run.main(predict)
    scores = {row["image"]: row for row in read_csv(tmp_path / "run" / "scores.csv")}
    assert float(read_csv(tmp_path / "s.csv")[0]["dog"]) == pytest.approx(float(scores["1.png"]["dog"]), abs=2e-4)
    folder_run.main([*predict, "--pretrained", "w.pt"])
    with pytest.raises(SystemExit, match="features of tiny-vit with other weights"):
        folder_run.main([*predict, "--pretrained", str(files[1])])


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(folder_model, "load_open_clip", fail)
    with pytest.raises(ValueError, match="could not be fetched .*no network.*--pretrained WEIGHTS.*ViT-B-32-quickgelu"):
        folder_model.open_backbone("ViT-B-32", "openai", None, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs --pretrained"):
        folder_model.open_backbone("ViT-B-32", None, None, torch.device("cpu"))


@pytest.mark.parametrize("classes", [3, 30])
def test_an_unknown_label_hardly_counts_as_absent(classes):
    """As much as 0.3 of a label of an image that has them all, however many classes there are to learn."""
    listed = torch.full((8, classes + 2), -1.0)
    listed[torch.arange(classes) % 8, torch.arange(classes)] = 1  # nothing is known of the last two
    preset = folder_run._preset(Namespace(epochs=None, expected_positives=None), listed)
    logits, targets = torch.zeros(8, classes, requires_grad=True), listed[:, :classes]
    sum(methods.weak_negatives(targets, preset.single_negative, (1.0, logits)).values()).backward()
    # Of an image with all labels each has 1 / B in the loss, whose slope at probability 0.5 is 0.5.
    torch.testing.assert_close(logits.grad, torch.where(targets == -1, 0.3 * 0.5 / 8, 0.0))


@pytest.mark.parametrize(
    ("rows", "classes", "options", "printed"),
    [
        ({"1.png": [1]}, ["person"], [], "No hold-out, so no figure says how good the model is."),
        ({"1.png": [1], "2.png": [0], "4.png": ["?"], "6.png": [1]}, ["person"], ["--hold-out", "0.5"], "1 classes; 75% of 4"),
        (
            {"1.png": ["car"], "2.png": ["dog|car"], "4.png": ["dog"], "6.png": [""], "7.png": ["car"], "8.png": ["dog"]},
            ["labels"],
            ["--hold-out", "0.4"],
            "is too low where lists",
        ),
        ({"1.png": [1, 0], "2.png": [0, 1]}, ["car", "dog"], ["--hold-out", "0", "--use-unlabelled"], "36 images without a row"),
        (
            {"1.png": [1, "train"], "2.png": [0, "train"], "4.png": [1, "val"], "6.png": [0, "test"], "7.png": [1, "test"]},
            ["car", "split"],
            [],
            "hold-out: 3 of 5 images, by the column split",
        ),
        (
            {"1.png": [1, "x"], "2.png": [0, "x"], "4.png": [1, "y"], "6.png": [0, "y"], "7.png": [1, "y"]},
            ["car", "scene"],
            ["--group", "scene"],
            "hold-out: 2 of 5 images, 1 of 2 groups by column scene",
        ),
        (
            {"1.png": [1], "2.png": [0], "λόφος/0.jpg": [1], "λόφος/5.jpg": [0], "4.png": [1]},
            ["car"],
            ["--group", "folder", "--use-unlabelled"],
            "hold-out: 8 of 36 images, 1 of 2 groups by folder",
        ),
        ({"1.png": [1, 0], "2.png": [0, 1]}, ["car", "Ding"], ["--names", "Ding=dog"], "36 images without a row are left out"),
    ],
)
def test_next_to_nothing_is_enough(rows, classes, options, printed, images, cache, tmp_path, capsys):
    labels = write_table(tmp_path / "labels.csv", rows, classes=classes)
    run = tmp_path / "run"
    folder_run.main(["train", str(images[0]), str(labels), "--output", str(run), "--epochs", "2", *options, *cache])
    assert printed in capsys.readouterr().out
    head = TRMHead.load(run / "head.pt")
    values = [float(row[name]) for row in read_csv(run / "scores.csv") for name in head.class_names]
    assert all(0 <= value <= 1 for value in values)


def test_prediction_on_names_that_are_not_utf8(trained, images, tmp_path, capsys):
    """They are escaped wherever they are written; a broken file of such a name is named."""
    photos = tmp_path / "photos"
    photos.mkdir()
    odd = os.fsdecode(b"caf\xe9")
    if sys.platform == "darwin":
        pytest.skip("its file names are UTF-8")
    for name, content in ((f"{odd}.png", (images[0] / "1.png").read_bytes()), (f"{odd}.jpg", b"")):
        (photos / name).write_bytes(content)
    command = ["predict", str(trained[0]), str(photos), "--output", str(tmp_path / f"{odd}.csv"), "--workers", "0"]
    folder_run.main([*command, "--device", "cpu"])
    assert "  caf\\udce9.jpg: the file is empty" in capsys.readouterr().out
    assert [row["image"] for row in read_csv(tmp_path / f"{odd}.csv")] == ["caf\\udce9.png"]
    entry = folder_pictures.Entry(f"{odd}.png", odd, "guess 0.50", 0.5, np.ones((2, 2)))
    folder_pictures.draw_entries(tmp_path / "sheet.png", "title", photos, [entry])


def ascii_output(monkeypatch):
    """Standard output of a machine whose encoding has next to nothing; what it got."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    return lambda: (sys.stdout.flush(), raw.getvalue().decode())[1]


SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "minimal_loop")  # takes no arguments


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_prints_into_any_encoding(script, monkeypatch, tmp_path):
    named = shutil.copy(ROOT / "examples" / f"{script}.py", tmp_path / "λόφος.py")  # which the help says
    printed = ascii_output(monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(named), "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(named), run_name="__main__")
    assert not caught.value.code and "\\u03bb" in printed()


def test_no_name_ends_a_run(images, cache, tmp_path, monkeypatch):
    """A class in another script, printed in ASCII, and a file whose name is not UTF-8, in every file that is written."""
    folder, run = tmp_path / "λόφος", tmp_path / "run"
    folder.mkdir()
    for i in (1, 2, 4, 6):
        shutil.copy(images[0] / f"{i}.png", folder)
    odd = os.fsdecode(b"caf\xe9.png")
    try:
        (folder / "1.png").rename(folder / odd)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    rows = {"caf\\udce9.png": [1, 1, 1], "2.png": [1, 0, 0], "4.png": [0, 1, ""], "6.png": [0, 0, 1]}
    labels = write_table(tmp_path / "labels.csv", rows, classes=["σκύλος", "car", "person"])
    printed = ascii_output(monkeypatch)
    folder_run.main(
        [
            "train",
            str(folder),
            str(labels),
            "--output",
            str(run),
            "--names",
            "σκύλος=dog",
            "--hold-out",
            "0",
            "--epochs",
            "1",
            *cache,
        ]
    )
    folder_run.main(["predict", str(run), str(folder), "--output", str(tmp_path / "s.csv"), "--workers", "0", "--device", "cpu"])
    assert "\\u03c3\\u03ba" in printed()
    for file in (run / "scores.csv", run / "split.csv", run / "contradicted.csv", tmp_path / "s.csv"):
        assert "caf\\udce9.png" in [row["image"] for row in read_csv(file)]


def test_a_class_without_a_present_label_is_scored_by_name(trained):
    """Its text is the frozen model's, its bias the mean of the others', and training saw no label of it."""
    run, _ = trained
    saved, head = folder_model.SavedModel.load(run)
    text, _ = folder_model.class_texts(saved.open(torch.device("cpu")), {name: name for name in CLASSES}, saved.templates)
    torch.testing.assert_close(head.text[3], text[3])
    assert float((head.text[:3] - text[:3]).abs().max()) > 1e-4
    bias = head.matching.bias.detach()
    assert float(bias[3]) == pytest.approx(float(bias[:3].mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--hold-out", "20"], "--hold-out must be a share from 0 to below 1, got 20"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--template", "a photo"], "--template must hold {}"),
        (["--names", "cow=bull"], "--names: wanted CLASS=WORDS with one of person, car"),
        (["--names", "car=laptop"], "knows drawn scenes alone, has no words for 1 of 4 classes: 'laptop'"),
        (["--expected-positives", "0"], "--expected-positives must be above 0"),
        (["--model", "RN50"], "--model RN50 needs --pretrained"),
        (["--pretrained", "openai"], "name it: --model"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
        (["--output", "IMAGES/run"], "lies in the image folder"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_door(change, said, images, cache, tmp_path):
    folder, rows = images
    labels = write_table(tmp_path / "labels.csv", rows)
    change = [str(folder / "run") if item == "IMAGES/run" else item for item in change]
    with pytest.raises(SystemExit) as caught:
        folder_run.main(["train", str(folder), str(labels), "--output", str(tmp_path / "run"), *cache, *change])
    assert str(caught.value).startswith("error: ") and said in str(caught.value)
    assert not (tmp_path / "run").exists() and not (folder / "run").exists()


def test_an_output_in_a_linked_folder_of_images_is_refused(images, cache, tmp_path):
    folder, rows = images
    (tmp_path / "linked").symlink_to(folder)
    labels = write_table(tmp_path / "labels.csv", {f"linked/{name}": row for name, row in rows.items()})
    with pytest.raises(SystemExit, match="lies in the image folder"):
        folder_run.main(["train", str(tmp_path), str(labels), "--output", str(folder / "run"), *cache])


def test_a_home_is_needed_for_the_cache_alone(images, tmp_path, monkeypatch, capsys):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    for main, words in ((folder_run.main, ["train", "--help"]), (experiment.main, ["--help"])):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0 and "~/.cache/trm_losses" in capsys.readouterr().out
    assert folder_run.parser().parse_args(["predict", "run", "photos"]).trained == Path("run")
    with pytest.raises(SystemExit):
        folder_run.parser().parse_args(["train", "photos", "labels.csv"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("argument --cache: there is no home folder for ~/.cache/trm_losses; give another folder")


@pytest.mark.parametrize("option", ["--output", "--cache"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(option, images, cache, tmp_path, monkeypatch):
    labels = write_table(tmp_path / "labels.csv", images[1])
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))
    (tmp_path / "locked").mkdir()
    folders = {"--output": str(tmp_path / "run"), "--cache": str(tmp_path / "cache"), option: str(tmp_path / "locked" / "new")}
    command = ["train", str(images[0]), str(labels), "--workers", "0", "--device", "cpu"]
    with pytest.raises(SystemExit, match=f"error: {option}: .* must be a folder that can be written into, .*locked is none"):
        folder_run.main([*command, *(word for pair in folders.items() for word in pair)])


def test_one_process_trains(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="train_folder.py must run in one process, got 2 of torchrun"):
        folder_run.main(["train", str(images[0]), str(write_table(tmp_path / "labels.csv", images[1])), "--device", "cpu"])


def test_a_split_leaves_nothing_to_group(images, cache, tmp_path):
    labels = write_table(tmp_path / "labels.csv", {"1.png": [1, "val"], "2.png": [1, "val"]}, classes=["car", "split"])
    command = ["train", str(images[0]), str(labels), "--output", str(tmp_path / "run"), *cache]
    for options, said in ((["--group", "folder"], "its column split already says"), ([], "no image is left to train on")):
        with pytest.raises(SystemExit, match=said):
            folder_run.main([*command, *options])


@pytest.mark.parametrize("value", [0, "?"])
def test_no_present_label_is_refused(value, images, cache, tmp_path):
    labels = write_table(tmp_path / "labels.csv", {"1.png": [value], "2.png": [value]}, classes=["car"])
    with pytest.raises(SystemExit, match="no label is present"):
        folder_run.main(["train", str(images[0]), str(labels), "--output", str(tmp_path / "run"), *cache])


@pytest.mark.parametrize("when", ["training", "writing"])
def test_an_interrupted_training_leaves_what_was_there(when, trained, images, cache, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for path in trained[0].iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((training, "take_step", stop) if when == "training" else (outputs, "draw_entries", stop)))
    labels = write_table(tmp_path / "labels.csv", {"1.png": [1, 0, 0, 0], "2.png": [0, 1, 0, 0]})
    with pytest.raises(SystemExit) as caught:
        folder_run.main(["train", str(images[0]), str(labels), "--output", str(run), "--epochs", "1", "--hold-out", "0", *cache])
    assert caught.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


# ------------------------------------------------------------------------------------------------------------- no label
def test_tags_need_the_names_of_classes_alone(images, cache, tmp_path, capsys):
    """Files that predict could have written, but for what is present; other images than those that cannot be read."""
    folder, rows = images
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES) + "\n\n", encoding="utf-8")
    folder_run.main(["tag", str(folder), "--classes", str(names), "--output", str(tmp_path / "tags"), *cache])
    said = capsys.readouterr().out
    assert "cut.jpg: image file is truncated" in said and "no threshold" in said
    assert sorted(path.name for path in (tmp_path / "tags").iterdir()) == ["scores.csv", "zero_shot.csv"]
    for name in ("scores.csv", "zero_shot.csv"):
        found = read_csv(tmp_path / "tags" / name)
        assert list(found[0]) == ["image", *CLASSES] and {row["image"] for row in found} == set(rows) - {"cut.jpg", "empty.png"}
        scores = torch.tensor([[float(row[name]) for name in CLASSES[:3]] for row in found])
        targets = torch.tensor([rows[row["image"]][:3] for row in found])
        assert mean_average_precision(scores, targets) > 0.7


@pytest.mark.parametrize(
    ("names", "change", "said"),
    [
        (None, [], "--classes: .* not found"),
        ("\n", [], "must hold different names of classes, one a line, got none"),
        ("cat\ncar\ncat\n", [], "got 'cat' twice"),
        ("cat\nlaptop\n", [], "has no words for 1 of 2 classes: 'laptop'"),
        ("cat\n", ["--workers", "-1"], "--workers must be at least 0"),
        ("cat\n", ["--template", "a photo"], "--template must hold {}"),
        ("cat\n", ["--names", "dog=cat"], "--names: wanted CLASS=WORDS"),
        ("cat\n", ["--output", "IMAGES/tags"], "lies in the image folder"),
    ],
)
def test_tags_that_cannot_be_given_are_refused(names, change, said, images, cache, tmp_path):
    path = tmp_path / "names.txt"
    if names is not None:
        path.write_text(names, encoding="utf-8")
    change = [str(images[0] / "tags") if item == "IMAGES/tags" else item for item in change]
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        folder_run.main(["tag", str(images[0]), "--classes", str(path), "--output", str(tmp_path / "tags"), *cache, *change])
    assert not (tmp_path / "tags").exists()


def test_the_page_names_every_option_and_its_commands_are_understood():
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    commands = folder_run.parser()._subparsers._group_actions[0].choices
    options = {o for p in commands.values() for action in p._actions for o in action.option_strings} - {"-h", "--help"}
    assert {option for option in options if f"`{option}" not in page} == set()
    lines = re.findall(r"^python examples/train_folder\.py (.*)$", page, flags=re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        folder_run.parser().parse_args(shlex.split(line))
