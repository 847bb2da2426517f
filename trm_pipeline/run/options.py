"""What a run is asked for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trm_pipeline.config.presets import HELD_OUT, Known, Preset
from trm_pipeline.data.base import Place, Source
from trm_pipeline.data.label_files import ENCODINGS
from trm_pipeline.features.cached import cores
from trm_pipeline.options import device, option

DEFAULT_KNOWN: tuple[Known, ...] = (0.1, 0.5, 0.9)


def known_argument(text: str) -> Known:
    """A value of ``--known``."""
    if text == "single":
        return "single"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be shares of known labels such as 0.1, or 'single'; got {text!r}") from None


def _flag(help: str) -> Any:
    return option(help, default=False, action="store_true")


def _several(help: str, **told: Any) -> Any:
    return option(help, nargs="+", action="extend", **told)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The command line, read and checked; it travels into the processes of ``--jobs``.

    ``known``, ``methods`` and ``seeds`` are spelled out; ``known`` is empty with a file of labels.
    """

    source: Source
    place: Place
    preset: Preset
    methods: tuple[str, ...]
    typed: tuple[str, ...]
    class_names: Path | None = option(
        "other names of the classes for prompts, one a line in the order of the columns", metavar="FILE"
    )
    class_texts: Path | None = option(
        "texts (C, D) of a model without a text tower (.npy, .pt): a row a class in the order of the columns", metavar="FILE"
    )
    workers: int = option(
        "processes that read and transform images, where they are not cached; 0: none beside this one; results do not depend on "
        "it",
        default=min(8, cores()),
    )
    labels: Path | None = option(
        "published partial labels of the training images (.npy, .txt, .pt) in place of --known", metavar="FILE"
    )
    labels_encoding: str | None = option("what --labels holds, where the file itself does not tell", choices=ENCODINGS)
    known: tuple[Known, ...] = _several(
        "shares of known labels, up to 1; 0: none at all; 'single': one present label an image, nothing else; default: "
        f"{' '.join(map(str, DEFAULT_KNOWN))}",
        type=known_argument,
        metavar="SHARE",
    )
    ablation: bool = _flag("also trm without one part each, and with each other rule for pseudo-labels")
    ablation_known: tuple[Known, ...] | None = _several("default: all of --known", type=known_argument, metavar="SHARE")
    unseen: int = option(
        "also trm trained without the last N classes, by the settings as they are, and all scored by their names",
        default=0,
        metavar="N",
    )
    seeds: tuple[int, ...] = _several("of training; seed s hides labels with seed s - 1; default: 1", type=int)
    wrong: float = option(
        "after labels are hidden, this share of the known present ones moves to classes that the image does not show",
        default=0.0,
        metavar="SHARE",
    )
    output: Path = option("folder for results, heads and the picture", default=Path("runs"))
    resume: bool = _flag("go on with the interrupted run in --output; the results are those of an unbroken one")
    jobs: int = option(
        "methods trained at a time, each in a process with its share of the cores; results do not depend on it but for the last "
        "digits, which depend on the number of threads",
        default=1,
    )
    amp: bool = _flag("mixed precision: float16 on cuda, bfloat16 elsewhere")
    deterministic: bool = _flag("the same bits again on an accelerator, a little slower")
    tensorboard: bool = _flag("curves of losses and test mAP (needs the tensorboard package)")
    device: str = option(default=device)
    tune: bool = _flag("score on the val split and train on the train split: for choosing settings")
    choose: bool = _flag(
        "for each cell, rates, and the head of whole images and its share, are chosen by known labels that are held out; each "
        "method is trained six times then in place of once"
    )

    @property
    def splits(self) -> tuple[str, str]:
        """What is trained on and what is scored."""
        preset = self.preset
        if self.tune:
            return ("fit" if preset.val_split == HELD_OUT else "train"), preset.val_split
        return preset.train_split, preset.test_split
