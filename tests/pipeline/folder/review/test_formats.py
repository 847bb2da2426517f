"""Labels in files of other tools: out and in again, and as these tools write them."""

import json
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trm_pipeline.folder.image_names import clean
from trm_pipeline.folder.labels import Labels, read_labels
from trm_pipeline.folder.review.formats import FORMS, OTHERS, read_labels_as, write_labels_as

IMAGES = ["a.jpg", "b.jpg", "sub/c.png", "sub/λ 1.png", "caf\udce9.png", 'quo"te, <b>.png', "100%25.jpg", "per#son?.jpg"]
# A name starts with a letter that begins no word for a label, and has what separates columns nowhere.
NAMES = st.text(st.sampled_from("abé猫 '\",<&/|_-{}"), max_size=8).map(lambda text: clean(f"x{text}"))


@st.composite
def some_labels(draw):
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique_by=lambda name: "".join(name.casefold().split())))
    files = draw(st.lists(st.sampled_from(IMAGES), min_size=1, unique=True))
    values = st.lists(st.sampled_from([1.0, 0.0, -1.0]), min_size=len(names), max_size=len(names))
    held = draw(st.none() | st.lists(st.booleans(), min_size=len(files), max_size=len(files)).map(torch.tensor))
    return Labels(files, names, torch.tensor([draw(values) for _ in files]), lists=False, held=held)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("forms")


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(labels=some_labels())
def test_out_and_in_again_is_the_same(form, place, labels):
    path = place / f"labels.{'json' if form in OTHERS else form}"
    write_labels_as(form, path, labels)
    columns = list(range(len(labels.class_names)))
    if form == "label-studio":  # it lists no classes
        columns = [c for c in columns if (labels.targets[:, c] != -1).any()]
        columns.sort(key=lambda c: labels.class_names[c])
        assume(columns)
    found = read_labels_as(form, path, IMAGES) if form in OTHERS else read_labels(path, IMAGES)
    assert (found.files, found.class_names) == (labels.files, [labels.class_names[c] for c in columns])
    assert torch.equal(found.targets, labels.targets[:, columns])
    if form not in OTHERS:
        assert labels.held is found.held is None or torch.equal(found.held, labels.held)


def read(tmp_path, form, value, **options):
    path = tmp_path / "labels.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return read_labels_as(form, path, IMAGES, **options)


def choices(*names, of="choice"):
    return {"from_name": of, "to_name": "image", "type": "choices", "value": {"choices": list(names)}}


def task(image, *results, **more):
    return {"data": {"image": image}, "annotations": [{"result": result, **more} for result in results]}


def test_annotators_of_label_studio_vote(tmp_path):
    tasks = [
        task("a.jpg", [choices("cat", "dog")], [choices("cat")], [choices("dog", of="absent")]),
        task("b.jpg", [choices("cat"), {"type": "rectanglelabels", "value": {}}]),
        task("sub/c.png", [choices("cat")], was_cancelled=True),
    ]
    labels = read(tmp_path, "label-studio", tasks)
    assert labels.class_names == ["cat", "dog"] and labels.targets.tolist() == [[1, -1], [1, -1], [-1, -1]] and labels.lists
    labels = read(tmp_path, "label-studio", tasks, unlisted_absent=True)
    assert labels.targets.tolist() == [[1, 0], [1, 0], [0, 0]] and not labels.lists


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("/data/local-files/?d=photos/sub/c.png", "sub/c.png"),
        ("/data/upload/3/01ab23cd-a.jpg", "a.jpg"),
        ("https://example.org/x/sub/%CE%BB%201.png?size=1", "sub/λ 1.png"),
        ("s3://bucket/b.jpg", "b.jpg"),
        ("C:\\photos\\sub\\c.png", "sub/c.png"),
    ],
)
def test_addresses_name_files_by_their_end(image, file, tmp_path):
    assert read(tmp_path, "label-studio", [task(image, [choices("cat")])]).files == [file]


def test_boxes_say_that_their_category_is_there(tmp_path):
    value = {
        "images": [{"id": 7, "file_name": "a.jpg", "neg_category_ids": [3]}, {"id": 9, "coco_url": "http://x.org/t/b.jpg"}],
        "annotations": [{"id": n, "image_id": 7, "category_id": 18, "bbox": [0, 0, 1, 1]} for n in range(3)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    }
    labels = read(tmp_path, "coco", value)
    assert labels.files == ["a.jpg", "b.jpg"] and labels.class_names == ["dog", "car"] and not labels.lists
    assert labels.targets.tolist() == [[1, 0], [-1, -1]]


def test_fields_of_fiftyone(tmp_path):
    def field(*names):
        return {"_cls": "Classifications", "classifications": [{"_cls": "Classification", "label": name} for name in names]}

    samples = [
        {"filepath": "/home/x/data/a.jpg", "tags": ["train"], "ground_truth": field("dog"), "absent": field("cat")},
        {
            "filepath": "b.jpg",
            "tags": [],
            "ground_truth": {"_cls": "Classification", "label": "cat"},
            "boxes": {"_cls": "Detections"},
        },
        {"filepath": "sub/c.png", "present": field("cat"), "model": field("dog")},
    ]
    for value in (samples, {"samples": samples}):
        labels = read(tmp_path, "fiftyone", value)
        assert labels.files == ["a.jpg", "b.jpg", "sub/c.png"] and labels.class_names == ["cat", "dog"]
        assert labels.targets.tolist() == [[0, 1], [1, -1], [1, -1]]
    with pytest.raises(ValueError, match="sample 1: wanted one field of classifications, or one that is called present, got "):
        read(tmp_path, "fiftyone", [{"filepath": "a.jpg", "one": field("cat"), "two": field("cat")}])


CATEGORIES = [{"id": 1, "name": "cat"}]
AN_IMAGE = {"id": 1, "file_name": "a.jpg"}


@pytest.mark.parametrize(
    ("form", "value", "message"),
    [
        ("coco", "{", "labels.json, line 1, column 2: not JSON"),
        ("coco", [], "labels.json: wanted an object, got []"),
        ("coco", {"images": 3, "categories": []}, "labels.json: wanted 'images' with a list, got 3"),
        ("coco", {"categories": [{"id": "1", "name": "cat"}]}, "category 1: wanted 'id' with a number, got \"1\""),
        ("coco", {"categories": CATEGORIES * 2}, "category 2: wanted an id and a name of its own, got {"),
        ("coco", {"categories": CATEGORIES, "images": [AN_IMAGE] * 2}, "image 2: wanted an id of its own, got 1"),
        ("coco", {"categories": CATEGORIES, "images": [], "annotations": []}, "labels.json has no image"),
        (
            "coco",
            {"categories": CATEGORIES, "images": [AN_IMAGE], "annotations": [{"image_id": 2, "category_id": 1}]},
            "annotation 1: wanted the id of an image, got 2",
        ),
        (
            "coco",
            {"categories": CATEGORIES, "images": [AN_IMAGE | {"neg_category_ids": [5]}], "annotations": []},
            "image 1, neg_category_ids: wanted the id of a category, got 5",
        ),
        ("label-studio", {"tasks": []}, "wanted a list of tasks, the JSON export of Label Studio, got {"),
        ("label-studio", [{"image": "a.jpg"}], "task 1: wanted 'data' with an object, got {"),
        ("label-studio", [task("z.jpg", [choices("cat")])], "task 1: there is no image 'z.jpg' in the folder"),
        ("label-studio", [task("a.jpg", [choices(3)])], "task 1, annotation 1: wanted names of classes, got 3"),
        (
            "label-studio",
            [task("a.jpg", [choices("cat"), choices("cat", of="absent")])],
            'annotation 1: wanted a class to be present or absent, got "cat as both"',
        ),
        ("label-studio", [task("a.jpg", [])], "labels.json names no class"),
        ("fiftyone", {"samples": [{"tags": []}]}, "sample 1: wanted 'filepath' with a text, got {"),
    ],
)
def test_bad_files_are_told_in_a_line(form, value, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path, form, value)
    assert "\n" not in str(error.value)


def test_classes_and_files_that_are_not_there(tmp_path):
    label = {"_cls": "Classification", "label": "cats"}
    value = {"info": {"classes": ["cat", "dog"]}, "samples": [{"filepath": "a.jpg", "present": label}]}
    with pytest.raises(ValueError, match=re.escape("sample 1: 'cats' is none of the 2 classes; the nearest is 'cat'")):
        read(tmp_path, "fiftyone", value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_labels_as("coco", tmp_path / "none.json", IMAGES)
