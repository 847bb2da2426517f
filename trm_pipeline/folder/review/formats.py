"""Labels in files of other tools, and back.

What each form calls absent, since most of them know only what is present:

- ``csv``, ``jsonl``: the project's own table and JSON lines, which :func:`.labels.read_labels` reads.
- ``label-studio``: a second set of choices named ``absent``.
- ``coco``: ``neg_category_ids`` of an image, as in LVIS. An annotation needs no box: it says that its category is there.
- ``fiftyone``: the samples of an export with a field ``present`` and a field ``absent``, both Classifications.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN
from trm_pipeline.files import replacing, text_of
from trm_pipeline.folder.image_names import ImageNames, Mistakes, Row, clean, escaped, match_rows
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.review.answers import nearest, voted

Targets = dict[str, float]  # of one image, by class name


class _Content(NamedTuple):
    """Rows of a file with their targets, and its classes where it lists them."""

    rows: list[tuple[Row, Targets]]
    class_names: list[str] | None = None


class _Wrong(ValueError):
    """Something in a file: where, what is wanted there, and what was found."""

    def __init__(self, where: str, wanted: str, got: object) -> None:
        shown = json.dumps(got, default=str)
        super().__init__(f"{where}: wanted {wanted}, got {shown if len(shown) <= 60 else shown[:57] + '…'}")


def write_labels_as(form: str, path: Path, labels: Labels) -> None:
    """Write files, class names and targets, and the split into a form of the project's own; ``form`` is one of :data:`FORMS`."""
    rows = [
        (i, escaped(file), dict(zip(labels.class_names, own, strict=True)))
        for i, (file, own) in enumerate(zip(labels.files, labels.targets.tolist(), strict=True), start=1)
    ]
    held = () if labels.held is None else labels.held.tolist()
    sides = [{"split": "val" if own else "train"} for own in held] or [{}] * len(rows)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        if form == "csv":
            table = csv.writer(file)
            table.writerow(["image", *labels.class_names, *sides[0]])
            for (_, name, own), side in zip(rows, sides, strict=True):
                table.writerow([name, *("" if v == UNKNOWN else int(v) for v in own.values()), *side.values()])
        elif form == "jsonl":
            for (_, name, own), side in zip(rows, sides, strict=True):
                given = {key: None if v == UNKNOWN else int(v) for key, v in own.items()}
                file.write(json.dumps({"image": name, "labels": given, **side}, ensure_ascii=False) + "\n")
        else:
            write = {"label-studio": _to_label_studio, "coco": _to_coco, "fiftyone": _to_fiftyone}[form]
            json.dump(write(rows, labels.class_names), file, indent=1, ensure_ascii=False)


def read_labels_as(form: str, path: Path, images: Sequence[str], *, unlisted_absent: bool = False) -> Labels:
    """Labels out of a file of one of :data:`OTHERS`; classes are those that it lists or, if it lists none, that occur, sorted.

    Args:
        images: files of the folder, from :func:`.image_files.find_images`. Of a longer path or an address the end counts.
        unlisted_absent: what is not said to be present is absent, not unknown.

    Raises:
        FileNotFoundError: no such file.
        ValueError: in a line: the file, the place, what is wanted there and what was found.
    """
    try:
        value = json.loads(text_of(path, "label file"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    content = _READERS[form](value, path.name)
    if not content.rows:
        raise ValueError(f"{path.name} has no image")
    mistakes, names = Mistakes(), ImageNames(images)
    files = match_rows([Row(row.where, _tail(row.image, names)) for row, _ in content.rows], images, mistakes)
    mistakes.tell()
    class_names = content.class_names or sorted({name for _, own in content.rows for name in own})
    targets = _arranged(content.rows, class_names, path.name)
    if unlisted_absent:
        targets.clamp_(min=0.0)  # unknown is -1
    return Labels(files, class_names, targets, lists=not (targets == 0).any())


def _arranged(rows: Iterable[tuple[Row, Targets]], class_names: Sequence[str], file: str) -> Tensor:
    """Targets (N, C) in the order of the classes; others than these are refused."""
    places = list(map(clean, class_names))
    if not places:
        raise ValueError(f"{file} names no class")
    targets = []
    for row, own in rows:
        if wrong := sorted(own.keys() - set(places)):
            raise ValueError(f"{row.where}: {wrong[0]!r} is none of the {len(places)} classes{nearest(wrong[0], places)}")
        targets.append([own.get(name, float(UNKNOWN)) for name in places])
    return torch.tensor(targets)


def _tail(image: str, names: ImageNames) -> str:
    """The end of a path or an address that names a file of the folder, the longest; what was given where there is none."""
    paths = [image]
    if "://" in image or image.startswith("/data/"):
        parts = urlsplit(image)
        paths.append(parse_qs(parts.query).get("d", [unquote(parts.path)])[0])
    ends: list[str] = []
    for path in paths:
        pieces = path.replace("\\", "/").split("/")
        ends += ["/".join(pieces[n:]) for n in range(len(pieces))]
        ends.append(re.sub(r"^[0-9a-f]{8}-", "", pieces[-1]))  # Label Studio puts it before the name of an upload
    return next((end for end in ends if end and names.fits(end)), image)


def _targets(where: str, present: Iterable[str], absent: Iterable[str]) -> Targets:
    yes, no = set(map(clean, present)), set(map(clean, absent))
    if both := sorted(yes & no):
        raise _Wrong(where, "a class to be present or absent", f"{both[0]} as both")
    return {**dict.fromkeys(yes, 1.0), **dict.fromkeys(no, 0.0)}


def _get(value: Any, key: str, kind: type, where: str) -> Any:
    """An entry of an object, of one kind."""
    words = {list: "a list", dict: "an object", str: "a text", int: "a number"}
    if not isinstance(value, dict):
        raise _Wrong(where, "an object", value)
    if not isinstance(value.get(key), kind):
        raise _Wrong(where, f"{key!r} with {words[kind]}", value.get(key, value))
    return value[key]


_Rows = Sequence[tuple[int, str, Targets]]


def _named(own: Targets, value: float) -> list[str]:
    return [name for name, other in own.items() if other == value]


def _to_label_studio(rows: _Rows, _: Sequence[str]) -> object:
    def results(own: Targets) -> list[object]:
        kinds = (("present", _named(own, 1.0)), ("absent", _named(own, 0.0)))
        same = {"to_name": "image", "type": "choices"}
        return [{"from_name": kind, **same, "value": {"choices": names}} for kind, names in kinds if names]

    return [{"id": i, "data": {"image": name}, "annotations": [{"result": results(own)}]} for i, name, own in rows]


def _from_label_studio(value: Any, file: str) -> _Content:
    """Annotators of a task vote on each class; what was skipped does not count."""
    if not isinstance(value, list):
        raise _Wrong(file, "a list of tasks, the JSON export of Label Studio", value)
    rows = []
    for i, task in enumerate(value, start=1):
        where = f"{file}, task {i}"
        image = _get(_get(task, "data", dict, where), "image", str, f"{where}, data")
        votes: dict[str, list[tuple[float, float]]] = {}
        for n, annotation in enumerate(_get(task, "annotations", list, where), start=1):
            place = f"{where}, annotation {n}"
            given: dict[bool, list[str]] = {True: [], False: []}
            for result in _get(annotation, "result", list, place):
                if isinstance(result, dict) and result.get("type") == "choices":
                    names = _get(_get(result, "value", dict, place), "choices", list, place)
                    given[result.get("from_name") != "absent"] += _texts(names, place)
            if not annotation.get("was_cancelled"):
                for name, label in _targets(place, given[True], given[False]).items():
                    votes.setdefault(name, []).append((label, 1.0))
        rows.append((Row(where, image), {name: voted(own) for name, own in votes.items()}))
    return _Content(rows)


def _to_coco(rows: _Rows, class_names: Sequence[str]) -> object:
    ids = {name: c for c, name in enumerate(class_names, start=1)}
    pairs = [(i, ids[name]) for i, _, own in rows for name in _named(own, 1.0)]
    images = [{"id": i, "file_name": name, "neg_category_ids": [ids[c] for c in _named(own, 0.0)]} for i, name, own in rows]
    return {
        "images": images,
        "annotations": [{"id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(pairs, start=1)],
        "categories": [{"id": c, "name": name} for name, c in ids.items()],
    }


def _from_coco(value: Any, file: str) -> _Content:
    names: dict[int, str] = {}
    for n, category in enumerate(_get(value, "categories", list, file), start=1):
        where = f"{file}, category {n}"
        own, name = _get(category, "id", int, where), clean(_get(category, "name", str, where))
        if own in names or name in names.values():
            raise _Wrong(where, "an id and a name of its own", category)
        names[own] = name

    def name_of(category: Any, where: str) -> str:
        if category not in names:
            raise _Wrong(where, "the id of a category", category)
        return names[category]

    present: dict[int, list[str]] = {}
    images = _get(value, "images", list, file)
    for n, image in enumerate(images, start=1):
        present[_get(image, "id", int, f"{file}, image {n}")] = []
        if len(present) < n:
            raise _Wrong(f"{file}, image {n}", "an id of its own", image["id"])
    for n, annotation in enumerate(_get(value, "annotations", list, file), start=1):
        where = f"{file}, annotation {n}"
        if (own := _get(annotation, "image_id", int, where)) not in present:
            raise _Wrong(where, "the id of an image", own)
        present[own].append(name_of(_get(annotation, "category_id", int, where), where))
    rows = []
    for n, image in enumerate(images, start=1):
        where = f"{file}, image {n}"
        path = _get(image, "file_name" if "file_name" in image or "coco_url" not in image else "coco_url", str, where)
        absent = [name_of(c, f"{where}, neg_category_ids") for c in image.get("neg_category_ids") or ()]
        rows.append((Row(where, path), _targets(where, present[image["id"]], absent)))
    return _Content(rows, list(names.values()))


def _to_fiftyone(rows: _Rows, class_names: Sequence[str]) -> object:
    def field(names: Sequence[str]) -> object:
        return {"_cls": "Classifications", "classifications": [{"_cls": "Classification", "label": name} for name in names]}

    samples = [
        {"filepath": name, "tags": [], "present": field(_named(own, 1.0)), "absent": field(_named(own, 0.0))}
        for _, name, own in rows
    ]
    return {"info": {"classes": list(class_names)}, "samples": samples}


def _from_fiftyone(value: Any, file: str) -> _Content:
    """The field ``present`` or, if there is none, the only field of classifications beside ``absent``."""
    rows = []
    for n, sample in enumerate(value if isinstance(value, list) else _get(value, "samples", list, file), start=1):
        where = f"{file}, sample {n}"
        path = _get(sample, "filepath", str, where)
        labels: dict[str, list[str]] = {}
        for key, field in sample.items():
            if isinstance(field, dict) and field.get("_cls") in ("Classification", "Classifications"):
                at = f"{where}, {key}"
                own = [field] if field["_cls"] == "Classification" else _get(field, "classifications", list, at)
                labels[key] = [_get(c, "label", str, at) for c in own]
        absent = labels.pop("absent", [])
        if "present" not in labels and len(labels) > 1:
            raise _Wrong(where, "one field of classifications, or one that is called present", ", ".join(labels))
        present = labels["present"] if "present" in labels else next(iter(labels.values()), [])
        rows.append((Row(where, path), _targets(where, present, absent)))
    info = value.get("info") if isinstance(value, dict) else None
    classes = info.get("classes") if isinstance(info, dict) else None
    return _Content(rows, _texts(classes, f"{file}, info") if isinstance(classes, list) else None)


def _texts(values: Sequence[Any], where: str) -> list[str]:
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise _Wrong(where, "names of classes", wrong[0])
    return list(values)


_READERS = {"label-studio": _from_label_studio, "coco": _from_coco, "fiftyone": _from_fiftyone}
OTHERS = tuple(_READERS)
"""Forms of other tools."""

FORMS = ("csv", "jsonl", *OTHERS)
