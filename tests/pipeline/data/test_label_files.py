"""Published label files: every kind of them, which row is whose, and files that do not fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.layouts import draw_labels
from trm_losses.labels import hide_labels, keep_single_positive
from trm_pipeline.data.base import LabelledImages
from trm_pipeline.data.label_files import ENCODINGS, read_labels

N, C = 40, 12
FULL = torch.from_numpy(draw_labels(N, C, 0.3)).float()
PARTIAL = hide_labels(FULL, 0.5)  # 1, 0, -1 unknown
SINGLE = keep_single_positive(FULL)


@pytest.fixture
def images() -> LabelledImages:
    return LabelledImages("toys", [f"toy {c}" for c in range(C)], [f"/nowhere/a/{row:03d}.jpg" for row in range(N)], FULL.clone())


def ternary(labels: Tensor) -> np.ndarray:
    """1, -1 absent, 0 unknown, entry by entry."""
    return np.array([[{1: 1, 0: -1, -1: 0}[int(value)] for value in row] for row in labels.tolist()])


def write_list(path: Path, labels: Tensor, order: list[int]) -> Path:
    """Lines in an order of their own, some with a blank after the comma, the last without an end."""
    rows = ((row, [c for c in range(C) if labels[row, c] == 1]) for row in order)
    lines = [f"{row:03d}.jpg,{' ' * (row % 2)}{' '.join(map(str, present))}" for row, present in rows]
    return put(path, "\n".join(lines))


def put(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def save_npy(path: Path, table: np.ndarray) -> Path:
    np.save(path, table)
    return path


def save_pt(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


# --- every kind ---


def test_text_of_tai_dpt(tmp_path: Path, images: LabelledImages) -> None:
    lines = "".join(f"{','.join(map(str, row))}\n" for row in ternary(PARTIAL))
    path = put(tmp_path / "train_proportion_0.5.txt", lines)
    labels, lines = read_labels(path, images)
    assert labels.dtype == torch.float32 and torch.equal(labels, PARTIAL)
    known, present = float((PARTIAL >= 0).float().mean()), int((PARTIAL == 1).sum())
    said = f"train_proportion_0.5.txt: ternary, {100 * known:.2f}% of the labels known, {present} present; against the data set's"
    assert lines[0].startswith(said) and lines[0].endswith("none wrong")
    row = PARTIAL[1].tolist()
    here, gone = ([f"toy {c}" for c in range(C) if row[c] == value] for value in (1, 0))
    assert here and len(gone) <= 6 and lines[2] == f"  001: present {', '.join(here)}; absent {', '.join(gone)}"
    assert len(lines) == 4


@pytest.mark.parametrize("named", [True, False])
def test_arrays_of_cole(tmp_path: Path, images: LabelledImages, named: bool) -> None:
    """With names the rows may have any order, such as that of ids as strings."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist() if named else list(range(N))
    path = save_npy(tmp_path / "formatted_train_labels_obs.npy", ternary(SINGLE)[order].astype(np.float64))
    if named:
        np.save(tmp_path / "formatted_train_images.npy", np.array([f"train2014/{row:03d}.jpg" for row in order]))
    labels, lines = read_labels(path, images)
    assert torch.equal(labels, SINGLE) and "ternary" in lines[0]
    if named:  # as without empty images
        labels, lines = read_labels(path, images.rows([3, 1]))
        assert torch.equal(labels, SINGLE[[3, 1]]) and lines[0].endswith("; 38 rows of other images left out")
        np.save(tmp_path / "formatted_train_images.npy", np.array(["000.jpg"]))
        with pytest.raises(ValueError, match="formatted_train_images.npy must name the 40 rows of .*, got 1 names"):
            read_labels(path, images)


def test_arrays_in_another_order_are_noticed(tmp_path: Path, images: LabelledImages) -> None:
    path = save_npy(tmp_path / "formatted_train_labels_obs.npy", np.roll(ternary(PARTIAL), 1, axis=0))
    with pytest.raises(
        ValueError,
        match=r"contradicts the data set: \d+ of \d+ labels that it calls present are absent; .* order"
        r" \(keep formatted_\*_images.npy beside",
    ):
        read_labels(path, images)


def test_lists_of_scpnet(tmp_path: Path, images: LabelledImages) -> None:
    order = list(range(N))[::-1]
    for wanted in (SINGLE, torch.where(FULL == 1, 1.0, -1.0)):
        labels, lines = read_labels(write_list(tmp_path / "train.txt", wanted, order), images)
        assert torch.equal(labels, wanted) and "list" in lines[0] and "absent –" in lines[1]
    path = tmp_path / "train.txt"
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n", encoding="utf-8-sig")
    assert torch.equal(read_labels(path, images).labels, wanted)


@pytest.mark.parametrize("sizes", [1, 3])
def test_masks_of_dual_coop(tmp_path: Path, images: LabelledImages, sizes: int) -> None:
    mask = (PARTIAL >= 0).long()
    path = save_pt(tmp_path / "partial_label_0.50.pt", mask[:, None].repeat(1, sizes, 1))
    labels, lines = read_labels(path, images)
    assert torch.equal(labels, PARTIAL) and lines[0].endswith("present"), "nothing to compare: the labels are the data set's"
    # Where masks follow another order, each row belongs to the image it names.
    images.mask_rows = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    labels, _ = read_labels(path, images)
    for saved, row in enumerate(images.mask_rows.tolist()):
        for c in range(C):
            assert labels[row, c] == (FULL[row, c] if mask[saved, c] else -1)


def test_plain_matrices_have_to_be_explained(tmp_path: Path, images: LabelledImages) -> None:
    path = save_pt(tmp_path / "labels.pt", PARTIAL)
    with pytest.raises(ValueError, match=r"holds \[-1, 0, 1\], which can be several .* --labels-encoding ternary or direct$"):
        read_labels(path, images)
    assert torch.equal(read_labels(path, images, "direct").labels, PARTIAL)
    with pytest.raises(ValueError, match=r"read as ternary, contradicts the data set: .* or --labels-encoding is another one"):
        read_labels(path, images, "ternary")
    with pytest.raises(ValueError, match=r"holds \[-1, 0, 1\], and positive-only is made of \[0, 1\]"):
        read_labels(path, images, "positive-only")
    save_pt(path, torch.from_numpy(ternary(PARTIAL)))
    assert torch.equal(read_labels(path, images, "ternary").labels, PARTIAL)
    with pytest.raises(ValueError, match=r"read as direct, contradicts .*: \d+ of \d+ labels that are present it calls absent"):
        read_labels(path, images, "direct")


def test_matrices_of_zero_and_one_can_be_three_things(tmp_path: Path, images: LabelledImages) -> None:
    path = save_npy(tmp_path / "labels.npy", (SINGLE == 1).numpy())
    with pytest.raises(ValueError, match="give --labels-encoding ternary or positive-only or direct or mask"):
        read_labels(path, images)
    assert torch.equal(read_labels(path, images, "positive-only").labels, SINGLE)
    assert torch.equal(read_labels(path, images, "mask").labels, torch.where(SINGLE == 1, FULL, -1.0))
    text = tmp_path / "labels.txt"
    text.write_text("".join(f"{','.join(map(str, row))}\n" for row in (SINGLE == 1).int().tolist()), encoding="utf-8")
    with pytest.raises(ValueError, match="can be several encodings"):
        read_labels(text, images)


def test_labels_that_differ_a_little_are_counted(tmp_path: Path, images: LabelledImages) -> None:
    """Crowds, difficult objects: others may have read a few labels otherwise."""
    changed = PARTIAL.clone()
    row, column = ((PARTIAL == 0).nonzero())[0]
    changed[row, column] = 1
    _, lines = read_labels(save_pt(tmp_path / "labels.pt", changed), images, "direct")
    assert lines[0].endswith("against the data set's own labels: 1 wrongly present")


# --- files that do not fit ---


def changed(table: Any, place: Any, value: Any) -> Any:
    table[place] = value
    return table


def other_images(path: Path) -> Path:
    text = write_list(path / "train.txt", SINGLE, list(range(N))).read_text(encoding="utf-8")
    return put(path / "train.txt", text.replace("007.jpg", "zebra.jpg"))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path / "was-run"),)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: save_pt(p / "x.pt", torch.ones(N - 3, 1, C)), "has 37 images and 12 classes, toys has 40 and 12; likely"),
        (lambda p: save_npy(p / "formatted_train_labels_obs.npy", np.ones((N, C + 1))), "has 40 images and 13 classes"),
        (other_images, r"no row for 1 of 40 images, the first 007.jpg \(it has 000.jpg\); likely it is of another split"),
        (lambda p: put(p / "train.txt", "000.jpg,3 12\n"), "line 1 must be .* numbers from 0 to 11, got '000.jpg,3 12'"),
        (lambda p: write_list(p / "train.txt", SINGLE, [*range(N - 1), 0]), "must have one row for an image, got 000.jpg twice"),
        (lambda p: save_pt(p / "x.pt", changed(torch.ones(N, 3, C), (0, 1, 0), 0)), "hides other labels for each size"),
        (
            lambda p: save_npy(p / "x.npy", changed(np.ones((N, C)), (3, 5), np.nan)),
            "a matrix of 1, 0 and -1, got nan in row 3, col",
        ),
        (lambda p: save_pt(p / "x.pt", torch.ones(N)), r"must be a matrix of 1, 0 and -1, got shape \(40,\)"),
        (
            lambda p: save_pt(p / "x.pt", Evil(p)),
            "must be a tensor that loads without running code, and .* .UnpicklingError.; save",
        ),
        (lambda p: put(p / "x.npy", "junk"), r"x.npy must be an array of numpy's, and cannot be read \((?!.*pickle)"),
        (lambda p: put(p / "train.txt", "000.jpg\n"), "line 1 must be an image name, a comma and numbers .* got '000.jpg'"),
        (lambda p: save_pt(p / "x.pt", {"train": [1, 2]}), "must hold one tensor, got dict; class splits are no labels"),
        (lambda p: put(p / "cls_ids.pickle", "x"), "must be a .npy, .txt or .pt file, got '.pickle'"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, images: LabelledImages, write: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(write(tmp_path), images)
    assert not (tmp_path / "was-run").exists()


def test_encodings_that_do_not_fit_the_kind(tmp_path: Path, images: LabelledImages) -> None:
    with pytest.raises(ValueError, match="--labels-encoding mask does not fit .*: it is a list"):
        read_labels(write_list(tmp_path / "train.txt", SINGLE, list(range(N))), images, "mask")
    with pytest.raises(ValueError, match="--labels-encoding list does not fit .*: it is not a list"):
        read_labels(save_pt(tmp_path / "x.pt", PARTIAL), images, "list")
    with pytest.raises(FileNotFoundError, match="--labels: .*nothing.npy not found"):
        read_labels(tmp_path / "nothing.npy", images)
    assert len(ENCODINGS) == 5
