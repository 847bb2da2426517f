"""What people answered, as labels."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from trm_losses.labels import UNKNOWN
from trm_pipeline.files import text_of
from trm_pipeline.folder.image_names import SHOWN, ImageNames, Mistakes, Row, clean, escaped
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.tables import csv_rows
from trm_pipeline.progress import say

_VALUES = {"present": 1.0, "absent": 0.0, "unsure": float(UNKNOWN)}
_COLUMNS = ("image", "class", "answer", "annotator", "confidence")


Answers: TypeAlias = dict[tuple[str, str], float]
"""A label of 1, 0 or -1 (unsure, or a tie) for each pair (file, class name)."""


class _Vote(NamedTuple):
    """One answer, and where it stands."""

    value: float
    confidence: float
    annotator: str
    where: str


def read_answers(paths: Sequence[Path], class_names: Sequence[str], images: Sequence[str]) -> Answers:
    """Answers out of files with the columns ``image,class,answer`` and, if need be, ``annotator`` and ``confidence``.

    An answer is present, absent or unsure. If somebody answers a question twice, the last row of the last file counts; rows
    without a name are all of one person. Annotators vote with their confidence (blank: 1). A tie is unknown. Who is unsure does
    not vote. It is told if annotators disagree, or files without a name do, which may be of several people.

    Args:
        paths: files that the review page saved, or others of the kind, the latest last.
        class_names: of the model. images: files of the folder, from :func:`.image_files.find_images`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: with file and line: a class of another model, an image that is not there, another word, a confidence that is
            not above 0 and at most 1, columns that are missing or unknown; the first few of them together.
    """
    names, classes, mistakes = ImageNames(images), {clean(name): name for name in class_names}, Mistakes()
    votes: dict[tuple[str, str], dict[tuple[str, int], _Vote]] = {}  # by annotator and, without a name, the file
    for n, path in enumerate(paths):
        for where, cells in _rows(path, mistakes):
            file, vote = names.find(Row(where, cells["image"]), mistakes), _vote(where, cells, mistakes)
            name = classes.get(clean(cells["class"]))
            if name is None:
                hint = nearest(cells["class"], classes) if len(mistakes.lines) < SHOWN else ""  # it takes its time
                mistakes.add(f"{where}, column class: {cells['class'].strip()!r} is no class of this model{hint}")
            if file is not None and name is not None and vote is not None:
                votes.setdefault((file, name), {})[vote.annotator, 0 if vote.annotator else n] = vote
    mistakes.tell()
    values, conflicts = {}, []
    for pair, own in votes.items():
        last = {vote.annotator: vote for vote in own.values()}
        values[pair] = voted((vote.value, vote.confidence) for vote in last.values())
        if any(vote.value not in (values[pair], UNKNOWN) for vote in own.values()):
            result = _word(values[pair]).replace("unsure", "unknown")
            told = ", ".join(f"{vote.annotator or 'no name'} {_word(vote.value)} ({vote.where})" for vote in own.values())
            conflicts.append(f"{pair[1]} in {escaped(pair[0])}: {told}; taken as {result}")
    if conflicts:
        more = f"\n  and {len(conflicts) - SHOWN} more" if len(conflicts) > SHOWN else ""
        lines = "\n  ".join(conflicts[:SHOWN])
        say(f"answers disagree about {len(conflicts)} of {len(values)} questions:\n  {lines}{more}")
    return values


def voted(votes: Iterable[tuple[float, float]]) -> float:
    """The label with most weight among votes (label, weight); unknown where weights are equal. Unknown does not vote."""
    weight = {1.0: 0.0, 0.0: 0.0, float(UNKNOWN): 0.0}
    for value, confidence in votes:
        weight[value] += confidence
    difference = weight[1.0] - weight[0.0]
    return float(UNKNOWN) if abs(difference) < 1e-9 else float(difference > 0)


def joined(labels: Labels, answers: Answers) -> Labels:
    """Labels with answers in their place; images without a row get one. How many labels change is said.

    Raises:
        ValueError: an answer about a class that the labels do not have.
    """
    files, rows = list(labels.files), {file: i for i, file in enumerate(labels.files)}
    columns = {name: c for c, name in enumerate(labels.class_names)}
    for file, name in answers:
        if name not in columns:
            raise ValueError(f"the answers are about {name!r}, and the labels have no such class{nearest(name, columns)}")
        if file not in rows:
            rows[file] = len(files)
            files.append(file)
    others = files[len(labels.files) :]
    by_folder = labels.groups == [posixpath.dirname(file) for file in labels.files]
    labels = labels.with_unknown(others, by_folder=by_folder)
    before, targets = labels.targets, labels.targets.clone()
    replaced = torch.full_like(before, torch.nan)
    for (file, name), value in answers.items():
        place = rows[file], columns[name]
        targets[place], replaced[place] = value, before[place]
    changed = targets != before
    parts = {
        "were unknown": changed & (before == UNKNOWN),
        "were the opposite": changed & (before != UNKNOWN) & (targets != UNKNOWN),
        "are unknown now": changed & (targets == UNKNOWN),
    }
    told = ", ".join(f"{int(mask.sum())} {word}" for word, mask in parts.items())
    more = f"; {len(others)} images had no row" if others else ""
    say(f"{len(answers)} answers change {int(changed.sum())} labels: {told}{more}")
    return labels._replace(targets=targets, replaced=replaced)


def nearest(name: str, class_names: Iterable[str]) -> str:
    """The class that may be meant, or some of them, as the end of a message."""
    known = list(class_names)
    near = get_close_matches(clean(name), known, n=1)
    return f"; the nearest is {near[0]!r}" if near else f"; they are {', '.join(known[:SHOWN])}{' …' * (len(known) > SHOWN)}"


def _word(value: float) -> str:
    return next(word for word, other in _VALUES.items() if other == value)


def _rows(path: Path, mistakes: Mistakes) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Cells of each row by column, and where the row stands."""
    header: list[str] = []
    for where, cells in csv_rows(text_of(path, "file of answers"), path.name):
        if not header:
            header = [clean(cell).lower() for cell in cells]
            _check_header(where, header)
        elif len(cells) != len(header):
            mistakes.add(f"{where}: {len(cells)} cells, but the header has {len(header)} ({', '.join(header)})")
        else:
            yield where, dict(zip(header, cells, strict=True))
    if not header:
        raise ValueError(f"{path.name} is empty; its first line must be a header such as {','.join(_COLUMNS[:3])}")


def _check_header(where: str, header: Sequence[str]) -> None:
    missing = [name for name in _COLUMNS[:3] if name not in header]
    unknown = [name for name in header if name not in _COLUMNS]
    if missing or unknown or len(set(header)) < len(header):
        raise ValueError(
            f"{where}: the columns must be {', '.join(_COLUMNS[:3])} and, if need be, {' and '.join(_COLUMNS[3:])}, each once; "
            f"got {', '.join(header)}"
        )


def _vote(where: str, cells: Mapping[str, str], mistakes: Mistakes) -> _Vote | None:
    value, given = _VALUES.get(cells["answer"].strip().lower()), cells.get("confidence", "").strip()
    if value is None:
        mistakes.add(f"{where}, column answer: {cells['answer'].strip()!r} is none of {', '.join(_VALUES)}")
    try:
        confidence = float(given.replace(",", ".") or 1)
    except ValueError:
        confidence = 0.0
    if not 0 < confidence <= 1:
        mistakes.add(f"{where}, column confidence: {given!r} must be a number above 0 and at most 1, or blank for 1")
        return None
    return None if value is None else _Vote(value, confidence, clean(cells.get("annotator", "")), where)
