"""The command ``trm-losses``: everything for one's own images, and the tables of the paper's data sets."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trm_pipeline.folder.convert import run_convert
from trm_pipeline.folder.demo import run_demo
from trm_pipeline.folder.export import run_export
from trm_pipeline.folder.features import run_features
from trm_pipeline.folder.options import (
    ConvertOptions,
    ExportOptions,
    FeaturesOptions,
    PredictOptions,
    ReviewOptions,
    SuspectsOptions,
    TagOptions,
    TrainOptions,
)
from trm_pipeline.folder.predict import run_predict
from trm_pipeline.folder.review.run import run_review
from trm_pipeline.folder.suspects import run_suspects
from trm_pipeline.folder.tag import run_tag
from trm_pipeline.folder.train import run_train
from trm_pipeline.options import add_options, values_of
from trm_pipeline.progress import escape_output
from trm_pipeline.run import experiment

SOURCES = {"voc": "voc", "coco": "coco", "vg200": "vg200", "nus": "nus", "cub": "cub", "features": "given"}
"""Data sets of ``reproduce``, with the modules that know them."""

COMMANDS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "train": (TrainOptions, run_train),
    "tag": (TagOptions, run_tag),
    "predict": (PredictOptions, run_predict),
    "export": (ExportOptions, run_export),
    "features": (FeaturesOptions, run_features),
    "review": (ReviewOptions, run_review),
    "suspects": (SuspectsOptions, run_suspects),
    "convert": (ConvertOptions, run_convert),
}
"""What each command for one's own images is asked for, and what does it."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Multi-label image recognition with missing labels, on frozen vision-language models."
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="Draw a small folder of images and its label file, to try the others on.")
    demo.add_argument("folder", type=Path, nargs="?", default=Path("demo"), help="where to, default: %(default)s")
    demo.add_argument("--images", type=int, default=240, metavar="N", help="with labels, default: %(default)s")
    for name, (kind, _) in COMMANDS.items():
        shown = {"help": kind.__doc__, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
        add_options(commands.add_parser(name, **shown), kind)
    reproduce = commands.add_parser(
        "reproduce", help="Compare TRM-ML and its peers on a data set; 'reproduce voc --help' says more.", add_help=False
    )
    reproduce.add_argument("data", choices=tuple(SOURCES))
    reproduce.add_argument("arguments", nargs=argparse.REMAINDER)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; errors of data, names and settings are some lines without a traceback."""
    escape_output()
    args = parser().parse_args(argv)
    if args.command == "reproduce":
        source = importlib.import_module(f"trm_pipeline.data.{SOURCES[args.data]}").SOURCE
        experiment.main(args.arguments, source, prog=f"trm-losses reproduce {args.data}")
        return
    try:
        if args.command == "demo":
            run_demo(args.folder, args.images)
        else:
            kind, run = COMMANDS[args.command]
            run(kind(**values_of(args, kind)))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except RuntimeError as error:  # torch raises it wherever the program is when a process ends
        if "DataLoader worker (pid" not in str(error):
            raise
        why = "a process that reads images was ended, for want of memory most likely"
        raise SystemExit(f"error: {why}; give fewer --workers, or --workers 0 ({error})") from error
    except KeyboardInterrupt:
        kept = " (encoded images are kept for the next start)" if "cache" in args else ""
        print(f"interrupted; nothing was written{kept}", file=sys.stderr)
        raise SystemExit(130) from None
