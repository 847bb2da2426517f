"""Tables and contact sheets of a folder."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trm_losses import TRMHead
from trm_losses.labels import UNKNOWN
from trm_pipeline.files import replacing
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.model import HEAD_FILE, MODEL_FILE, SavedModel
from trm_pipeline.folder.part import Part
from trm_pipeline.folder.pictures import Entry, draw_entries

__all__ = ["FILES", "SHEET", "score_row", "write", "write_csv"]

FILES = {
    MODEL_FILE: "the model: classes, thresholds, templates, what it was trained on",
    HEAD_FILE: "the model: its trained weights",
    "scores.csv": "scores of all images, those of training too",
    "split.csv": "which images were held out",
    "doubtful.png": "unknown labels that training was least sure of: to look at, and to label next",
    "doubtful.csv": "the same as a list",
    "contradicted.png": "known labels that the model contradicts most: to check",
    "contradicted.csv": "the same as a list",
}
SHEET = 24  # entries on a contact sheet


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file, replaced as a whole."""
    # A file may have a name that is not UTF-8, and what is written here has taken its time.
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def score_row(saved: SavedModel, file: str, scores: Tensor) -> list[str]:
    """Of an image: its file, what is found present, and the score (C,) of every class."""
    found = (scores > saved.thresholds).tolist()
    present = ";".join(name for name, yes in zip(saved.classes, found, strict=True) if yes)
    return [file, present, *(f"{value:.4f}" for value in scores.tolist())]


def write(
    output: Path,
    images: Path,
    labels: Labels,
    held: Tensor,
    head: TRMHead,
    saved: SavedModel,
    scores: Tensor,
    estimates: Tensor,
    features: Part,
) -> list[str]:
    """All files in a folder of their own first, then in their places, the one that makes it a model last; their names."""
    output.mkdir(parents=True, exist_ok=True)
    made = output / f".{os.getpid()}.tmp"
    made.mkdir()
    try:
        part = ["hold-out" if own else "training" for own in held.tolist()]
        write_csv(made / "split.csv", ["image", "part"], zip(labels.files, part, strict=True))
        scored = zip(labels.files, part, scores, strict=True)
        rows = ((file, own, *score_row(saved, file, row)[1:]) for file, own, row in scored)
        write_csv(made / "scores.csv", ["image", "part", "present", *saved.classes], rows)
        _write_pictures(made, images, labels, held, head, scores, estimates, features)
        head.save(made / HEAD_FILE)
        saved.save(made)
        names = sorted((file.name for file in made.iterdir()), key=lambda name: name == MODEL_FILE)
        for name in FILES:  # of an earlier run
            (output / name).unlink(missing_ok=True)
        for name in names:
            os.replace(made / name, output / name)
        return names
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_pictures(
    folder: Path, images: Path, labels: Labels, held: Tensor, head: TRMHead, scores: Tensor, estimates: Tensor, features: Part
) -> None:
    """The pseudo-labels nearest to one half, and the known labels of the hold-out that scores contradict most."""
    doubt = torch.where(estimates >= 0, 0.5 - (estimates - 0.5).abs(), -1.0)
    known = (labels.targets != UNKNOWN) & (held if held.any() else ~held)[:, None]
    against = torch.where(known, (scores - labels.targets).abs(), -1.0)
    sheets = (
        ("doubtful", doubt, 0.1, "Unknown labels the training was least sure of: is the class there?", "guess"),
        ("contradicted", against, 0.25, "Known labels that the model contradicts most: whose slip is it?", "label"),
    )
    for name, order, least, title, word in sheets:
        chosen = _varied(order, least, SHEET)
        if not chosen:
            continue
        entries = []
        for i, c in chosen:
            value = float(estimates[i, c]) if word == "guess" else float(labels.targets[i, c])
            said = f"guess {value:.2f}" if word == "guess" else f"labelled {'present' if value else 'absent'}"
            saliency = _saliency(head, features.only(torch.tensor([i])))[c]
            entries.append(Entry(labels.files[i], labels.class_names[c], said, float(scores[i, c]), saliency.numpy()))
        draw_entries(folder / f"{name}.png", title, images, entries)
        rows = [[e.file, e.class_name, e.said, f"{e.score:.4f}"] for e in entries]
        write_csv(folder / f"{name}.csv", ["image", "class", word, "score"], rows)


@torch.no_grad()
def _saliency(head: TRMHead, image: Part) -> Tensor:
    """(C, h, w) over the tokens of a single image."""
    batch = next(iter(image.batches(1)))
    return head.pooler(batch.tokens, head.text).saliency[0].unflatten(1, image.grid).float().cpu()  # type: ignore[no-any-return]


def _varied(order: Tensor, least: float, count: int) -> list[tuple[int, int]]:
    """The highest entries (N, C) from ``least`` on; first one an image and few a class, so that they show different things."""
    most = max(2, -(-count // max(1, int((order >= least).any(dim=0).sum()))))
    order, classes = order.clone(), [0] * order.shape[1]
    first: list[tuple[int, int]] = []
    while len(first) < count:  # one look at all for each that is shown: sorting millions takes time and memory
        i, c = divmod(int(order.argmax()), order.shape[1])
        if not order[i, c] >= least:
            break
        first.append((i, c))
        classes[c] += 1
        order[i] = -torch.inf
        if classes[c] == most:
            order[:, c] = -torch.inf
    return first
