"""What a model trained on one's own images is kept as: a head, and beside it what else scoring needs to know."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trm_losses import TRMHead
from trm_pipeline.config.presets import VOC2007_RN101
from trm_pipeline.drawn.captions import TEMPLATES
from trm_pipeline.features.backbone import Backbone, GivenTexts, ImageTower
from trm_pipeline.features.encoding import weights_digest
from trm_pipeline.features.towers import open_tower
from trm_pipeline.files import write_json
from trm_pipeline.progress import warnings_said

FORMAT = "trm_losses.folder/2"
MODEL_FILE, HEAD_FILE = "model.json", "head.pt"
CLIP = "--model ViT-B-32 --pretrained openai"
DEMONSTRATION = (
    "NOTE  The embedded model knows drawn scenes only. On photographs all that follows is a demonstration of the steps, and its\n"
    f"      scores mean nothing; for photographs give {CLIP} (about 350 MB, fetched once)."
)
FROM_HOLD_OUT = "hold-out"
"""Where a threshold is from that was chosen."""


@dataclass(frozen=True)
class SavedModel:
    """The settings that scores depend on, with a threshold for each class.

    ``weights`` is the digest of the frozen model; ``classes`` maps names to ``words`` for prompts, ``threshold`` and where it is
    from, ``trained`` (False: scored by name alone).
    """

    model: str
    pretrained: str | None
    weights: str
    image_size: tuple[int, int]
    token_pool: int
    templates: tuple[str, ...]
    classes: dict[str, dict[str, Any]]
    scores: dict[str, Any]  # of the hold-out, for people

    @functools.cached_property
    def thresholds(self) -> Tensor:
        """(C,)."""
        return torch.tensor([about["threshold"] for about in self.classes.values()])

    def with_classes(self, names: Sequence[str]) -> SavedModel:
        """With further classes that are known by name alone."""
        new = {"trained": False, "threshold": 0.5, "threshold_from": "default: added by name"}
        return dataclasses.replace(self, classes={**self.classes, **{name: {"words": name, **new} for name in names}})

    def save(self, folder: Path) -> None:
        """Write ``model.json``."""
        write_json(folder / MODEL_FILE, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> tuple[SavedModel, TRMHead]:
        """Settings and head out of the folder that training wrote, or of the ``model.json`` in it."""
        file = path / MODEL_FILE if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no finished model at {path}: wanted the folder that 'train' wrote, with its {MODEL_FILE}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError
            saved = cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{file} is not the {MODEL_FILE} of a folder that 'train' wrote ({FORMAT})") from None
        height, width = saved.image_size
        saved = dataclasses.replace(saved, image_size=(height, width), templates=tuple(saved.templates))
        head = TRMHead.load(file.with_name(HEAD_FILE))
        if head.class_names != list(saved.classes):
            raise ValueError(f"{file} and {HEAD_FILE} beside it name other classes; they are of two trainings: train again")
        return saved, head

    def open(self, device: torch.device, pretrained: str | None = None) -> ImageTower:
        """The frozen model for images that the head was trained on; ``pretrained`` where its weights lie elsewhere now."""
        size = self.image_size if self.model == "embedded" else None
        backbone = open_tower(self.model, pretrained or self.pretrained, size, device)
        backbone.image_size = self.image_size
        if weights_digest(backbone) != self.weights:
            raise ValueError(
                f"the head was trained on features of {self.model} with other weights than those of "
                f"{pretrained or self.pretrained or f'the {self.model} model here'}, and scores would mean nothing; give the "
                "weights it was trained with (--pretrained), or train again"
            )
        return backbone


def class_texts(backbone: Backbone, words: Mapping[str, str], templates: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Texts (C, D) of classes by the words for them, and the templates; where none are given those that suit the model."""
    if isinstance(backbone, GivenTexts):
        return backbone.template_text(list(words), ()), ()
    embedded = backbone.name == "embedded"
    chosen = tuple(templates or (TEMPLATES if embedded else VOC2007_RN101.templates))
    unknown: list[str] = []
    if embedded:
        unknown = [word for word in words.values() if backbone.tokenizer.unknown_pieces(word)]  # type: ignore[attr-defined]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (" …" if len(unknown) > 5 else "")
        raise ValueError(
            f"the embedded model, which knows drawn scenes alone, has no words for {len(unknown)} of {len(words)} classes: "
            f"{shown}\n"
            f"A CLIP model reads any name: train with {CLIP} (about 350 MB, fetched once).\n"
            "Or choose words that this model knows: --names 'diningtable=dining table', or as the name of a class that is added"
        )
    with warnings_said():
        return backbone.template_text(list(words.values()), chosen), chosen
