"""The card of a model: what it knows, what it was trained on, how far it can be trusted, and what it is not for."""

from __future__ import annotations

import html
import os
import re

from torch import Tensor

from trm_losses import TRMHead
from trm_losses.labels import known_fraction
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.model import SavedModel
from trm_pipeline.report.markdown import markdown

FRONT = """---
library_name: trm-losses
pipeline_tag: image-classification
tags:
- multi-label
- missing-labels
---
"""


def model_card(saved: SavedModel, head: TRMHead, labels: Labels, held: Tensor) -> str:
    """Markdown with the front matter that model hubs read; the folder can be uploaded as it is.

    Args:
        saved, head: of the folder. labels: of the N images that could be read. held: (N,), those that training did not see.
    """
    family, colon, place = saved.model.partition(":")
    weights = _plain(f"{family}{colon}{_last(place)} {_last(saved.pretrained or '')}")
    parts = [
        FRONT,
        f"# {len(saved.classes)} classes on {weights}",
        f"A head for images with any number of these classes, on the frozen model {weights} (weights {saved.weights}), which "
        "does not lie here.",
        "```\npip install 'trm-losses[pipeline]'\ntrm-losses predict THIS_FOLDER IMAGES\n```",
        "## Data",
        f"{int((~held).sum())} images for training, {int(held.sum())} held out. Of {labels.targets.numel()} labels "
        f"{known_fraction(labels.targets):.0%} are known: {int((labels.targets == 1).sum())} present, "
        f"{int((labels.targets == 0).sum())} absent.",
        "## Figures",
        _figures(saved),
        _calibration(saved, head),
        markdown([("class", "words", "threshold", "where from", "promised on other images"), *_rows(saved)]),
        "## Not for",
        _not_for(saved),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(saved: SavedModel) -> str:
    scores = saved.scores
    if scores.get("mAP") is None:
        return "No label that was held out says how good it is."
    before = max(scores["zero_shot"].values())
    assumed = " What is not listed counts as absent here: it is too low where lists are not complete."
    return (
        f"mAP on {scores['images']} held-out images, over {scores['classes_scored']} classes: **{scores['mAP']:.1f} %**. The "
        f"frozen model has {before:.1f} % by the class names.{assumed * scores['unlisted_counted_as_absent']}"
    )


def _calibration(saved: SavedModel, head: TRMHead) -> str:
    if head.calibration is None:
        return "Scores are not calibrated: 0.7 does not mean 70 %."
    scale, shift = head.calibration.pooled.tolist()
    on = saved.scores["calibrated_on"]
    level = " Present labels alone tell no level: it is that of an assumed mean number of present classes an image."
    level *= saved.scores["level_assumed"]
    return f"Scores are calibrated on the {on}; all classes together: scale {scale:.2f}, shift {shift:.2f}.{level}"


def _rows(saved: SavedModel) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, about in saved.classes.items():
        told = about.get("promised")
        promise = "" if told is None else f"{told['metric']} {told['value']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
        rows.append((_plain(name), _plain(about["words"]), f"{about['threshold']:.3f}", about["threshold_from"], promise))
    return rows


def _last(place: str) -> str:
    """Of a path its last part, since folders are of the machine that trained; names of a hub stay whole."""
    return os.path.basename(os.path.normpath(place)) if os.path.isabs(place) or place[:1] in ("~", ".") else place


def _plain(text: str) -> str:
    """Text that is shown as it is: neither Markdown nor HTML, on one line."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _not_for(saved: SavedModel) -> str:
    unlearned = [name for name, about in saved.classes.items() if not about["trained"]]
    lines = [
        "Images unlike those above: figures, scores and thresholds hold for images of the same kind alone.",
        "Decisions about people, or any that nobody looks at again.",
        "Classes that are not listed, and what the frozen model may not be used for.",
    ]
    if unlearned:
        lines.append(f"Relying on {', '.join(map(_plain, unlearned))}: no present label was known, and names alone score them.")
    if saved.model == "embedded":
        lines.append("Photographs: the embedded model knows drawn scenes only.")
    return "\n".join(f"- {line}" for line in lines)
