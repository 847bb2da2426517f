"""What the commands for one's own images are asked for: a class each, whose fields are its arguments on the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from trm_pipeline.config.presets import EMBEDDED
from trm_pipeline.features.cached import cores
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.folder.review.formats import FORMS, OTHERS
from trm_pipeline.options import device, option, place, texts

Metric: TypeAlias = Literal["f1", "precision", "recall", "cost"]
"""What thresholds are chosen by."""

STEPS = 30
"""Of training at least, however few the images are."""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where it runs."""

    device: str = option(default=device)
    workers: int = option("processes that read images", default=min(8, cores()))


@dataclass(frozen=True, kw_only=True)
class CacheOptions(PlaceOptions):
    """And where features are kept."""

    cache: Path = option("folder for frozen features", default=CACHE, type=folder_argument)


@dataclass(frozen=True, kw_only=True)
class TowerOptions(PlaceOptions):
    """The frozen model, and words for classes."""

    model: str = option(
        "an open_clip model such as ViT-B-32; 'embedded': no download, drawn scenes alone; hf:FOLDER or hf:ID of a hub, "
        "a model of transformers; timm:NAME with --class-texts",
        default="embedded",
    )
    pretrained: str | None = option(
        "a tag of open_clip such as 'openai', which downloads once, or a weights file; of timm default: its own weights"
    )
    class_texts: Path | None = option(
        "texts (C, D) of a model without a text tower (.npy, .pt): a row a class, in the order of LABELS or --classes",
        metavar="FILE",
    )
    image_size: int | None = option("side of the square images; default: the model's own")
    templates: tuple[str, ...] = option(
        "prompt such as 'a satellite image of a {}.'; more than one is averaged",
        default=(),
        name="template",
        action="append",
        metavar="TEXT",
    )
    names: tuple[str, ...] = texts("words for class names that are no words", metavar="CLASS=WORDS")


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(TowerOptions, CacheOptions):
    """The frozen model, and where its features are kept."""


_LABELS = "CSV or JSON-lines file: a column for each class, or image,labels with lists; after it files of answers"


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """A file of labels, files of answers after it, and how the first is read."""

    images: Path = place("folder of images, with any folders below it")
    labels: tuple[Path, ...] = place(_LABELS, type=Path, nargs="+")
    form: str | None = option("the tool that wrote LABELS; default: CSV or JSON lines, as its suffix says", choices=OTHERS)
    minus_one: str | None = option("what -1 means; with 'absent' 0 is unknown", choices=("unknown", "absent"))
    separator: str | None = option("of lists: what stands between names; default: found in the file", metavar="TEXT")
    unlisted: str = option("of lists: what is not in them", default="unknown", choices=("unknown", "absent"))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and its frozen one."""

    trained: Path = place("the folder that train or tag wrote", metavar="model")
    pretrained: str | None = option("where the weights of the frozen model lie now, if not where they were in training")


@dataclass(frozen=True, kw_only=True)
class LearnOptions(EncodeOptions, LabelOptions):
    """What every training is asked for."""

    output: Path
    group: str | None = option("keep images together in the hold-out: by a column of LABELS, or 'folder'", metavar="COLUMN")
    seed: int = option("of the hold-out and of training", default=0)
    expected_positives: float | None = option(
        "mean number of present classes, where only those were noted; default: as listed, of lists and where none is absent",
        metavar="K",
    )
    epochs: int | None = option(f"default: {EMBEDDED.epochs}, more where that is less than {STEPS} steps")
    questions: int = option("on the page review.html, at most; 0: no page", default=200, metavar="N")
    choose: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LearnOptions):
    """Train on images and a label file, score a hold-out, keep the model."""

    output: Path = option("folder for the model, scores and questions", default=Path("runs/folder"))
    hold_out: float = option(
        "images kept from training to score on; 0: none, for a last training once you are content", default=0.2, metavar="SHARE"
    )
    metric: Metric = option(
        "what thresholds are chosen by: the best F1, precision or recall of --at-least, or the least cost",
        default="f1",
        choices=get_args(Metric),
    )
    at_least: float = option("precision or recall that thresholds should have", default=0.9, metavar="SHARE")
    use_unlabelled: bool = option("images without a row take part in training, all unknown", default=False, action="store_true")
    choose: bool = option(
        "choose rates and shares by a fifth of the known labels, if these are enough: five trainings more",
        default=True,
        action=argparse.BooleanOptionalAction,
    )


@dataclass(frozen=True, kw_only=True)
class TagOptions(EncodeOptions):
    """Score images by the names of classes, without any label."""

    images: Path = place("folder of images, with any folders below it")
    classes: Path = option("names of the classes, one a line", metavar="FILE", required=True)
    output: Path = option("folder for the model and the scores", default=Path("runs/tags"))
    expected_positives: float = option(
        "mean number of present classes of an image: the level of the probabilities, which no label tells",
        default=1.0,
        metavar="K",
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(PlaceOptions, ModelOptions):
    """Score images with a model of train or tag."""

    images: Path = place("folder of images, or one image")
    output: Path = option("CSV file to write", default=Path("scores.csv"))
    add: tuple[str, ...] = texts("further classes, by their names alone", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelOptions):
    """Write a model of train or tag as one ONNX file, from image to probabilities."""

    output: Path = option("the .onnx file to write", default=Path("model.onnx"))
    add: tuple[str, ...] = texts("further classes, by their names alone", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(TowerOptions, LabelOptions):
    """Write what a frozen model makes of images, for reproduce features."""

    labels: tuple[Path, ...] = place(_LABELS, type=Path, nargs="*")  # without one all labels are unknown
    output: Path = option("features folder, for reproduce features", metavar="FOLDER", required=True)
    classes: Path | None = option("names of the classes, one a line; default: those of LABELS", metavar="FILE")
    split: str | None = option(
        "train, val or test; default: as a column split of LABELS says (train and val), or train", metavar="NAME"
    )
    part: str | None = option("encode the K-th of N parts of the images, beside processes that do the others", metavar="K/N")
    mirror: bool = option("a second view of every image, mirrored", default=False, action="store_true")
    token_pool: int | None = option(
        "mean of N x N tokens in place of each of them; default: 2 on even grids of 14 x 14 and more, as in train, else 1",
        metavar="N",
    )
    expected_positives: float | None = option("mean number of present classes of an image, if known", metavar="K")


@dataclass(frozen=True, kw_only=True)
class ReviewOptions(LabelOptions, CacheOptions, ModelOptions):
    """Make a page of questions about images, with a model of train or tag."""

    labels: tuple[Path, ...] = place(_LABELS, type=Path, nargs="*")  # without one nothing is known
    output: Path = option("the page to write", default=Path("review.html"))
    questions: int = option("at most", default=200, metavar="N")


@dataclass(frozen=True, kw_only=True)
class SuspectsOptions(LearnOptions):
    """List known labels that are probably wrong, and make a page of them."""

    output: Path = option("folder for the list and the page", default=Path("runs/suspects"))
    folds: int = option("parts of the images, each scored by a model of the others", default=5, metavar="K")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(LabelOptions):
    """Write labels and answers in a file for another tool."""

    to: str = option("what the other tool reads", choices=FORMS, required=True)
    output: Path = option("the file to write", required=True)
