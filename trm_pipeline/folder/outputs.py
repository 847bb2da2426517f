"""What a training leaves in its folder."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from trm_losses import TRMHead
from trm_pipeline.files import replacing, scratch_in
from trm_pipeline.folder.card import model_card
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.model import HEAD_FILE, MODEL_FILE, SavedModel
from trm_pipeline.folder.review.page import Question, write_review

CARD_FILE, REVIEW_FILE = "README.md", "review.html"

FILES = {
    MODEL_FILE: "the model: classes, thresholds, templates, what it was trained on",
    HEAD_FILE: "the model: its trained weights",
    CARD_FILE: "the model's card: data, figures, thresholds, what it is not for",
    "scores.csv": "scores of all images, those of training too",
    "split.csv": "which images were held out",
    REVIEW_FILE: "labels that are worth asking about: open it in a browser, and train again with the answers",
}
"""What ``train`` writes."""


def check_untrained(output: Path) -> None:
    """Refuse the folder of a training, whose files other commands would replace."""
    if (output / CARD_FILE).is_file():
        raise ValueError(f"--output: {output} holds a trained model (or another {CARD_FILE}); give another folder")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file, replaced as a whole; each row is written as it comes."""
    # A file may have a name that is not UTF-8, and what is written here has taken its time.
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def score_columns(saved: SavedModel) -> list[str]:
    """A column for each class; one that is called as another column is told apart, in all tables of scores alike."""
    columns: list[str] = []
    for name in saved.classes:
        column = name
        while column in ("image", "part", "present") or column != name and column in saved.classes:
            column = f"class {column}"
        columns.append(column)
    return columns


def score_row(saved: SavedModel, file: str, scores: Tensor) -> list[str]:
    """Of an image: its file, what is found present, and the score (C,) of every class."""
    found = [name for name, yes in zip(saved.classes, (scores > saved.thresholds).tolist(), strict=True) if yes]
    # A name may hold the separator, and an array is the other form of lists that label files have.
    array = any(";" in name for name in saved.classes)
    return [
        file,
        json.dumps(found, ensure_ascii=False) if array else ";".join(found),
        *(f"{value:.4f}" for value in scores.tolist()),
    ]


def write(
    output: Path,
    images: Path,
    labels: Labels,
    held: Tensor,
    head: TRMHead,
    saved: SavedModel,
    scores: Tensor,
    questions: Sequence[Question],
) -> list[str]:
    """All files in a folder of their own first, then in their places, the one that makes it a model last; their names."""
    with scratch_in(output) as made:
        part = ["hold-out" if own else "training" for own in held.tolist()]
        write_csv(made / "split.csv", ["image", "part"], zip(labels.files, part, strict=True))
        scored = zip(labels.files, part, scores, strict=True)
        rows = ((file, own, *score_row(saved, file, row)[1:]) for file, own, row in scored)
        write_csv(made / "scores.csv", ["image", "part", "present", *score_columns(saved)], rows)
        if questions:
            write_review(made / REVIEW_FILE, questions, labels.class_names, images=images, title=f"Labels of {images.name}")
        (made / CARD_FILE).write_text(model_card(saved, head, labels, held), encoding="utf-8")
        head.save(made / HEAD_FILE)
        saved.save(made)
        names = sorted((file.name for file in made.iterdir()), key=lambda name: name == MODEL_FILE)
        for name in FILES:  # of an earlier run
            (output / name).unlink(missing_ok=True)
        for name in names:
            os.replace(made / name, output / name)
        return names
