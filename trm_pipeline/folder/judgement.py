"""What a trained head is worth on the images held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trm_losses import Thresholds, choose_thresholds
from trm_losses.labels import UNKNOWN
from trm_losses.metrics import average_precision
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.model import FROM_HOLD_OUT
from trm_pipeline.folder.options import Metric

CALIBRATED = 20
"""Known labels of each kind in the hold-out from which on scores are calibrated, and all classes together have a threshold."""

_TITLE = "\nLabels in training, in the hold-out (present+absent), average precision (%) there, thresholds and what they promise:"
_METRICS = {"f1": "F1", "precision": "precision", "recall": "recall", "cost": "cost"}

_WAYS = {"global": "the image as a whole", "tokens": "its parts"}


def ranked(targets: Tensor) -> Tensor:
    """Labels of the classes alone that can be scored: with a present one and an absent one; the others are unknown."""
    fit = (targets == 1).any(dim=0) & (targets == 0).any(dim=0)
    return torch.where(fit, targets, float(UNKNOWN))


def judge(
    labels: Labels,
    held: Tensor,
    trained: Tensor,
    scores: Tensor,
    zero_shot: dict[str, Tensor],
    words: dict[str, str],
    *,
    noted: bool,
    metric: Metric = "f1",
    at_least: float = 0.9,
) -> tuple[dict[str, Any], str]:
    """Thresholds and figures for the saved model, and the same for people.

    Args:
        labels: of N images. held: (N,), those held out. trained: (C,), classes with a present label in training.
        scores: (N, C), calibrated probabilities. zero_shot: scores (N, C) of the frozen model by the two ways it has.
        words: for each class. noted: present labels alone were, in the hold-out: what is not counts as absent for mAP, and no
            threshold can be chosen. metric, at_least: what thresholds are chosen by, see :func:`trm_losses.choose_thresholds`.
    """
    truth = labels.targets[held]
    assumed = bool(held.any()) and noted
    judged = ranked(torch.where(truth == UNKNOWN, 0.0, truth) if assumed else truth)
    count = int((judged == 1).any(dim=0).sum())

    def precisions(of: Tensor) -> Tensor:
        return average_precision(of[held], judged) if count else torch.full((len(words),), torch.nan, dtype=torch.float64)

    ap, others = precisions(scores), {name: precisions(own) for name, own in zero_shot.items()}
    # Of the two ways a frozen model scores images by text alone the better one is what training must beat.
    best = max(others, key=lambda name: float(others[name].nanmean().nan_to_num()))

    least = min(int((truth == label).sum()) for label in (1, 0))
    found = None if noted or not least else choose_thresholds(scores[held], truth, metric=metric, at_least=at_least)
    why = "present labels alone were listed" if assumed else "too few labels in the hold-out"
    classes: dict[str, dict[str, Any]] = {}
    header = ("class", "present", "absent", "unknown", "held out", "AP", "zero-shot", "threshold", f"{_METRICS[metric]} (90 %)")
    rows: list[tuple[str, ...]] = [header]
    in_training, in_hold_out = _counts(labels.targets[~held]), _counts(truth)
    for c, (name, word) in enumerate(words.items()):
        own = found if trained[c] and found is not None and (found.chosen[c] or least >= CALIBRATED) else None
        reason = why if trained[c] else "no label is present, scored by name alone"
        about = classes[name] = {"words": word, "trained": bool(trained[c]), **_threshold(own, c, metric, reason)}
        split = f"{in_hold_out[c][0]}+{in_hold_out[c][1]}"
        threshold = f"{about['threshold']:.2f} {' ' if about['threshold_from'] == FROM_HOLD_OUT else '*'}"
        told = "–" if own is None else f"{100 * own.value[c]:.0f} ({100 * own.low[c]:.0f}–{100 * own.high[c]:.0f})"
        rows.append((name, *map(str, in_training[c]), split, _per_cent(ap[c]), _per_cent(others[best][c]), threshold, told))
    lines = [_TITLE, table(rows)]
    if assumed:
        lines.append("* 0.5: no threshold can be chosen where present labels alone were listed")
    elif any(about["threshold_from"] != FROM_HOLD_OUT for about in classes.values()):
        few = "fewer than 5 present or 5 absent labels in the hold-out"
        together = f"* of all classes together, or 0.5 by name alone: {few}"
        lines.append(together if least >= CALIBRATED else f"* 0.5: {few}, and fewer than {CALIBRATED} of a kind in all")
    figures: dict[str, Any] = {"images": int(held.sum()), "classes_scored": count, "mAP": None, "zero_shot": None}
    if not held.any():
        lines.append("No hold-out, so no figure says how good the model is.")
    elif not count:
        lines.append("No mAP: no class has both a present and an absent label in the hold-out; more known labels would help.")
    else:
        figures |= {"mAP": round(100 * float(ap.nanmean()), 3), "unlisted_counted_as_absent": assumed}
        figures["zero_shot"] = {name: round(100 * float(value.nanmean()), 3) for name, value in others.items()}
        lines.append(_verdict(figures, best, int((judged == 1).sum()), len(words)))
    return {"classes": classes, "scores": figures}, "\n".join(lines)


def _threshold(found: Thresholds | None, c: int, metric: Metric, why: str) -> dict[str, Any]:
    """The threshold of a class, what it promises, and where it is from: ``why`` it is 0.5 if none was found."""
    if found is None:
        return {"threshold": 0.5, "promised": None, "threshold_from": f"default: {why}"}
    value, low, high = (round(float(x[c]), 4) for x in (found.value, found.low, found.high))
    return {
        "threshold": round(float(found.threshold[c]), 6),
        "promised": {"metric": metric, "value": value, "low": low, "high": high},
        "threshold_from": FROM_HOLD_OUT if found.chosen[c] else "hold-out, all classes together",
    }


def _counts(targets: Tensor) -> list[tuple[int, ...]]:
    """Of each class: the present labels, the absent ones, the unknown ones."""
    table = targets.numpy()  # torch would sum a copy of the booleans as integers of 8 bytes
    return list(zip(*((table == value).sum(axis=0).tolist() for value in (1, 0, UNKNOWN)), strict=True))


def _verdict(figures: dict[str, Any], best: str, positives: int, classes: int) -> str:
    """mAP beside zero-shot, and what it is worth."""
    trained, before = figures["mAP"], figures["zero_shot"]
    other = next(name for name in before if name != best)
    lines = [
        f"mAP (%) on {figures['images']} held-out images, over {figures['classes_scored']} of {classes} classes, those with "
        "present and absent labels there:",
        f"  trained                  {trained:5.1f}",
        f"  zero-shot, same model    {before[best]:5.1f}   (by {_WAYS[best]}; {before[other]:.1f} by {_WAYS[other]})",
    ]
    gain = trained - before[best]
    if gain <= 0:
        lines.append("Training gained nothing here: by the class names alone the frozen model ranks these images no worse.")
    if figures["unlisted_counted_as_absent"]:
        lines.append("For this figure alone what is not listed counts as absent: it is too low where lists are not complete.")
    if positives < 50:
        lines.append(f"With {positives} present labels in the hold-out this is a rough figure; another --seed will give another.")
    return "\n".join(lines)


def _per_cent(value: Tensor) -> str:
    return "–" if bool(value.isnan()) else f"{100 * float(value):.1f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = widths[0]
    return "\n".join(
        "  ".join((row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))).rstrip()
        for row in rows
    )
