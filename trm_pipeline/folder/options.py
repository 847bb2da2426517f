"""What the commands for one's own images are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["PredictOptions", "TagOptions", "TowerOptions", "TrainOptions"]


@dataclass(frozen=True, kw_only=True)
class TowerOptions:
    """The frozen model, words for classes, and where it runs; fields are the arguments of :mod:`.arguments` by their names."""

    model: str
    pretrained: str | None
    class_texts: Path | None
    image_size: int | None
    templates: tuple[str, ...]
    names: tuple[str, ...]
    cache: Path
    device: str
    workers: int


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TowerOptions):
    """Of ``train``."""

    images: Path
    labels: Path
    output: Path
    hold_out: float
    group: str | None
    seed: int
    minus_one: str | None
    separator: str | None
    unlisted: str
    expected_positives: float | None
    use_unlabelled: bool
    epochs: int | None
    choose: bool


@dataclass(frozen=True, kw_only=True)
class TagOptions(TowerOptions):
    """Of ``tag``."""

    images: Path
    classes: Path
    output: Path
    expected_positives: float


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Of ``predict``."""

    trained: Path
    images: Path
    output: Path
    add: tuple[str, ...]
    pretrained: str | None
    device: str
    workers: int
