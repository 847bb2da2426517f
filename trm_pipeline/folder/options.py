"""What the commands for one's own images are asked for; fields are the arguments of :mod:`.arguments` by their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Metric: TypeAlias = Literal["f1", "precision", "recall", "cost"]
"""What thresholds are chosen by."""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where it runs."""

    device: str
    workers: int


@dataclass(frozen=True, kw_only=True)
class CacheOptions(PlaceOptions):
    """And where features are kept."""

    cache: Path


@dataclass(frozen=True, kw_only=True)
class TowerOptions(PlaceOptions):
    """The frozen model, and words for classes."""

    model: str
    pretrained: str | None
    class_texts: Path | None
    image_size: int | None
    templates: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(TowerOptions, CacheOptions):
    """The frozen model, and where its features are kept."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """A file of labels, files of answers after it, and how the first is read."""

    images: Path
    labels: tuple[Path, ...]
    form: str | None
    minus_one: str | None
    separator: str | None
    unlisted: str


@dataclass(frozen=True, kw_only=True)
class LearnOptions(EncodeOptions, LabelOptions):
    """What every training is asked for."""

    output: Path
    group: str | None
    seed: int
    expected_positives: float | None
    epochs: int | None
    choose: bool
    questions: int


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LearnOptions):
    """Of ``train``."""

    hold_out: float
    use_unlabelled: bool
    metric: Metric
    at_least: float


@dataclass(frozen=True, kw_only=True)
class SuspectsOptions(LearnOptions):
    """Of ``suspects``."""

    folds: int


@dataclass(frozen=True, kw_only=True)
class TagOptions(EncodeOptions):
    """Of ``tag``."""

    images: Path
    classes: Path
    output: Path
    expected_positives: float


@dataclass(frozen=True, kw_only=True)
class PredictOptions(PlaceOptions):
    """Of ``predict``."""

    trained: Path
    images: Path
    output: Path
    add: tuple[str, ...]
    pretrained: str | None


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Of ``export``."""

    trained: Path
    output: Path
    add: tuple[str, ...]
    pretrained: str | None


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(TowerOptions, LabelOptions):
    """Of ``features``; without a file of labels all are unknown."""

    output: Path
    classes: Path | None
    split: str | None
    part: str | None
    mirror: bool
    token_pool: int | None
    expected_positives: float | None


@dataclass(frozen=True, kw_only=True)
class ReviewOptions(CacheOptions, LabelOptions):
    """Of ``review``; without a file of labels nothing is known."""

    trained: Path
    pretrained: str | None
    output: Path
    questions: int


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(LabelOptions):
    """Of ``convert``."""

    to: str
    output: Path
