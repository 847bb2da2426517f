"""The command line for one's own images."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from trm_pipeline.config.presets import EMBEDDED
from trm_pipeline.features.cached import cores
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.folder.learning import STEPS
from trm_pipeline.folder.options import Metric
from trm_pipeline.folder.review.formats import FORMS, OTHERS

Commands = Any  # what add_subparsers returns, a class of argparse's own
Options = TypeVar("Options")


def options_of(args: argparse.Namespace, kind: type[Options]) -> Options:
    """A command line that was read, as the options of its command."""
    told = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})


def add_commands(commands: Commands) -> None:
    """All commands for one's own images."""
    common = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    train = commands.add_parser("train", help="train on images and a label file, score a hold-out, keep the model", **common)
    tag = commands.add_parser("tag", help="score images by the names of classes, without any label", **common)
    predict = commands.add_parser("predict", help="score images with a model of train or tag", **common)
    export = commands.add_parser("export", help="a model of train or tag as one ONNX file, from image to probabilities", **common)
    features = commands.add_parser("features", help="write what a frozen model makes of images, for reproduce features", **common)
    review = commands.add_parser("review", help="a page of questions about images, with a model of train or tag", **common)
    suspects = commands.add_parser("suspects", help="known labels that are probably wrong, as a list and a page", **common)
    convert = commands.add_parser("convert", help="labels and answers in a file for another tool", **common)
    for command in (train, suspects):
        _labels(command, "+")
        _learning(command)
    _train(train)
    _suspects(suspects)
    _tag(tag)
    _predict(predict)
    _export(export)
    for command in (predict, export):
        further = "further classes, by their names alone"
        command.add_argument("--add", nargs="+", action="extend", default=[], metavar="NAME", help=further)
    _features(features)
    _review(review)
    _labels(convert, "+")
    convert.add_argument("--to", choices=FORMS, required=True, help="what the other tool reads")
    convert.add_argument("--output", type=Path, required=True, help="the file to write")
    for command in (train, suspects, tag, features):
        _tower(command)
    for command in (train, suspects, tag, review):
        command.add_argument("--cache", type=folder_argument, default=CACHE, help="folder for frozen features")
    for command in (train, suspects, tag, predict, review, features):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--workers", type=int, default=min(8, cores()), help="processes that read images")


def _labels(p: argparse.ArgumentParser, count: str) -> None:
    """A folder of images, and what is known of them."""
    p.add_argument("images", type=Path, help="folder of images, with any folders below it")
    p.add_argument(
        "labels",
        type=Path,
        nargs=count,
        help="CSV or JSON-lines file: a column for each class, or image,labels with lists; after it files of answers",
    )
    p.add_argument("--form", choices=OTHERS, help="the tool that wrote LABELS; default: CSV or JSON lines, as its suffix says")
    p.add_argument("--minus-one", choices=("unknown", "absent"), help="what -1 means; with 'absent' 0 is unknown")
    p.add_argument("--separator", metavar="TEXT", help="of lists: what stands between names; default: found in the file")
    p.add_argument("--unlisted", choices=("unknown", "absent"), default="unknown", help="of lists: what is not in them")


def _learning(p: argparse.ArgumentParser) -> None:
    p.add_argument("--group", metavar="COLUMN", help="keep images together in the hold-out: by a column of LABELS, or 'folder'")
    p.add_argument("--seed", type=int, default=0, help="of the hold-out and of training")
    p.add_argument(
        "--expected-positives",
        type=float,
        metavar="K",
        help="mean number of present classes, where only those were noted; default: as listed, of lists and where none is absent",
    )
    p.add_argument("--epochs", type=int, help=f"default: {EMBEDDED.epochs}, more where that is less than {STEPS} steps")
    p.add_argument("--questions", type=int, default=200, metavar="N", help="on the page review.html, at most; 0: no page")
    p.set_defaults(choose=False)


def _train(p: argparse.ArgumentParser) -> None:
    p.add_argument("--output", type=Path, default=Path("runs/folder"), help="folder for the model, scores and questions")
    p.add_argument(
        "--hold-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="images kept from training to score on; 0: none, for a last training once you are content",
    )
    p.add_argument(
        "--metric",
        choices=get_args(Metric),
        default="f1",
        help="what thresholds are chosen by: the best F1, precision or recall of --at-least, or the least cost",
    )
    p.add_argument("--at-least", type=float, default=0.9, metavar="SHARE", help="precision or recall that thresholds should have")
    p.add_argument("--use-unlabelled", action="store_true", help="images without a row take part in training, all unknown")
    p.add_argument(
        "--choose",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="choose rates and shares by a fifth of the known labels, if these are enough: five trainings more",
    )


def _suspects(p: argparse.ArgumentParser) -> None:
    p.add_argument("--output", type=Path, default=Path("runs/suspects"), help="folder for the list and the page")
    p.add_argument("--folds", type=int, default=5, metavar="K", help="parts of the images, each scored by a model of the others")


def _trained(p: argparse.ArgumentParser) -> None:
    """A model, and its frozen one."""
    p.add_argument("trained", type=Path, metavar="model", help="the folder that train or tag wrote")
    p.add_argument("--pretrained", help="where the weights of the frozen model lie now, if not where they were in training")


def _review(p: argparse.ArgumentParser) -> None:
    _trained(p)
    _labels(p, "*")
    p.add_argument("--output", type=Path, default=Path("review.html"), help="the page to write")
    p.add_argument("--questions", type=int, default=200, metavar="N", help="at most")


def _tag(p: argparse.ArgumentParser) -> None:
    p.add_argument("images", type=Path, help="folder of images, with any folders below it")
    p.add_argument("--classes", type=Path, required=True, metavar="FILE", help="names of the classes, one a line")
    p.add_argument("--output", type=Path, default=Path("runs/tags"), help="folder for the model and the scores")
    p.add_argument(
        "--expected-positives",
        type=float,
        default=1.0,
        metavar="K",
        help="mean number of present classes of an image: the level of the probabilities, which no label tells",
    )


def _predict(p: argparse.ArgumentParser) -> None:
    _trained(p)
    p.add_argument("images", type=Path, help="folder of images, or one image")
    p.add_argument("--output", type=Path, default=Path("scores.csv"), help="CSV file to write")


def _export(p: argparse.ArgumentParser) -> None:
    _trained(p)
    p.add_argument("--output", type=Path, default=Path("model.onnx"), help="the .onnx file to write")


def _features(p: argparse.ArgumentParser) -> None:
    _labels(p, "*")
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="features folder, for reproduce features")
    p.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line; default: those of LABELS")
    p.add_argument(
        "--split", metavar="NAME", help="train, val or test; default: as a column split of LABELS says (train and val), or train"
    )
    p.add_argument("--part", metavar="K/N", help="encode the K-th of N parts of the images, beside processes that do the others")
    p.add_argument("--mirror", action="store_true", help="a second view of every image, mirrored")
    p.add_argument(
        "--token-pool",
        type=int,
        metavar="N",
        help="mean of N x N tokens in place of each of them; default: 2 on even grids of 14 x 14 and more, as in train, else 1",
    )
    p.add_argument("--expected-positives", type=float, metavar="K", help="mean number of present classes of an image, if known")


def _tower(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        default="embedded",
        help="an open_clip model such as ViT-B-32; 'embedded': no download, drawn scenes alone; hf:FOLDER or hf:ID of a hub, "
        "a model of transformers; timm:NAME with --class-texts",
    )
    p.add_argument(
        "--pretrained",
        help="a tag of open_clip such as 'openai', which downloads once, or a weights file; of timm default: its own weights",
    )
    p.add_argument(
        "--class-texts",
        type=Path,
        metavar="FILE",
        help="texts (C, D) of a model without a text tower (.npy, .pt): a row a class, in the order of LABELS or --classes",
    )
    p.add_argument("--image-size", type=int, help="side of the square images; default: the model's own")
    p.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="TEXT",
        dest="templates",
        help="prompt such as 'a satellite image of a {}.'; more than one is averaged",
    )
    names = "words for class names that are no words"
    p.add_argument("--names", nargs="+", action="extend", default=[], metavar="CLASS=WORDS", help=names)
