"""What a trained head is worth on the images held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN
from trm_losses.metrics import average_precision
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.model import LEAST, choose_threshold

__all__ = ["judge", "ranked", "table"]

_WAYS = {"global": "the image as a whole", "tokens": "its parts"}


def ranked(targets: Tensor) -> Tensor:
    """Labels of the classes alone that can be scored: with a present one and an absent one; the others are unknown."""
    fit = (targets == 1).any(dim=0) & (targets == 0).any(dim=0)
    return torch.where(fit, targets, float(UNKNOWN))


def judge(
    labels: Labels, held: Tensor, trained: Tensor, scores: Tensor, zero_shot: dict[str, Tensor], words: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """Thresholds and figures for the saved model, and the same for people."""
    truth = labels.targets[held]
    assumed = bool(held.any()) and not (truth == 0).any()
    judged = ranked(torch.where(truth == UNKNOWN, 0.0, truth) if assumed else truth)
    count = int((judged == 1).any(dim=0).sum())
    empty = torch.full((len(words),), float("nan"), dtype=torch.float64)
    ap = average_precision(scores[held], judged) if count else empty
    # The two ways a frozen model scores images by text alone; the better one is what training must beat.
    others = {name: average_precision(s[held], judged) if count else empty for name, s in zero_shot.items()}
    best = max(others, key=lambda name: float(others[name].nanmean().nan_to_num()))

    classes: dict[str, dict[str, Any]] = {}
    rows: list[tuple[str, ...]] = [("class", "present", "absent", "unknown", "held out", "AP", "zero-shot", "threshold")]
    for c, (name, word) in enumerate(words.items()):
        known = truth[:, c] != UNKNOWN
        threshold = choose_threshold(scores[held][known, c], truth[known, c]) if trained[c] else None
        source = "hold-out" if threshold is not None else "default: too few labels in the hold-out"
        source = source if trained[c] else "default: no label is present, scored by name alone"
        classes[name] = {
            "words": word,
            "trained": bool(trained[c]),
            "threshold": 0.5 if threshold is None else round(threshold, 6),
            "threshold_from": source,
        }
        counts = (str(int((labels.targets[~held][:, c] == value).sum())) for value in (1, 0, UNKNOWN))
        split = f"{int((truth[:, c] == 1).sum())}+{int((truth[:, c] == 0).sum())}"
        chosen = "0.50 *" if threshold is None else f"{threshold:.2f}  "
        rows.append((name, *counts, split, _per_cent(ap[c]), _per_cent(others[best][c]), chosen))
    lines = [f"\nLabels in training, in the hold-out (present+absent), average precision (%) there, thresholds:\n{table(rows)}"]
    if any(about["threshold_from"] != "hold-out" for about in classes.values()):
        lines.append(f"* not chosen: fewer than {LEAST} present or {LEAST} absent labels in the hold-out; 0.5 in its place")
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
