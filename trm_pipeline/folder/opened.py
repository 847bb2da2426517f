"""Images and labels of a folder, read, checked and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trm_losses.labels import known_fraction
from trm_pipeline.folder.encoded import Encoded, check_encoding, check_output, encode, words_of
from trm_pipeline.folder.image_files import find_images
from trm_pipeline.folder.known import read_known
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.options import LearnOptions
from trm_pipeline.progress import say


class Opened(NamedTuple):
    """Labels of the images that can be read, what each class is called in prompts, and what the frozen model gives."""

    labels: Labels
    words: dict[str, str]
    frozen: Encoded


def open_folder(options: LearnOptions, *, use_unlabelled: bool = False, folds: int = 0) -> Opened:
    """Read what is known of the images, say so, and encode them.

    Raises:
        ValueError: a present label is nowhere, more ``folds`` than images (or groups), and everything that the readers refuse.
    """
    if options.epochs is not None and options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {options.epochs}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    if options.expected_positives is not None and options.expected_positives <= 0:
        raise ValueError(f"--expected-positives must be above 0, got {options.expected_positives:g}")
    if options.questions < 0:
        raise ValueError(f"--questions must be at least 0, got {options.questions}")
    check_encoding(options, options.output)
    images = find_images(options.images)
    check_output(options.output, options.images, images)
    labels = read_known(options, images, group=options.group)
    if not (labels.targets == 1).any():
        raise ValueError(
            f"{options.labels[0].name}: no label is present, of {labels.targets.numel()} "
            f"({known_fraction(labels.targets):.0%} known): nothing to learn from"
        )
    if labels.held is not None and options.group is not None:
        raise ValueError(f"--group cannot be used with {options.labels[0].name}: its column split already says what is held out")
    if folds > (most := len(set(labels.groups or labels.files))):
        raise ValueError(f"--folds must be at most the number of {'groups' if labels.groups else 'images'}, {most}, got {folds}")
    words = words_of(labels.class_names, options.names)
    labels = _unlabelled(labels, images, use=use_unlabelled, folders=options.group == "folder")
    say(_about(labels, options.expected_positives))
    frozen = encode(options, options.images, labels.files, labels.class_names, words)
    labels = labels.only(frozen.features.places)
    if not (labels.targets == 1).any():
        raise ValueError("no label is present in the images that can be read: nothing to learn from")
    return Opened(labels, words, frozen)


def _unlabelled(labels: Labels, images: Sequence[str], *, use: bool, folders: bool) -> Labels:
    """With the images that have no row, where they are wanted; either way it is said how many they are.

    Where ``folders`` are groups these images belong to some too; else each is a group by itself.
    """
    listed = set(labels.files)
    others = [file for file in images if file not in listed]
    if others and use:
        say(f"{len(others)} images without a row take part with all labels unknown")
        return labels.with_unknown(others, by_folder=folders)
    if others:
        say(f"{len(others)} images without a row are left out, such as {others[0]} (train takes them with --use-unlabelled)")
    return labels


def _about(labels: Labels, expected_positives: float | None) -> str:
    present, absent = int((labels.targets == 1).sum()), int((labels.targets == 0).sum())
    known = f"{known_fraction(labels.targets):.0%} of {labels.targets.numel()} labels known"
    line = f"{len(labels.files)} images, {len(labels.class_names)} classes; {known}: {present} present, {absent} absent"
    if labels.separator is not None:
        line += f"\nnames in lists are separated by {labels.separator!r} (--separator, if that is wrong)"
    if labels.lists:
        line += "\nwhat a list does not name counts as unknown (--unlisted absent, if the lists are complete)"
    elif present > absent > 0 and len(labels.class_names) > 2 and expected_positives is None and labels.targets.min() < 0:
        line += "\nunknown labels are taken to be missing at random; if only present ones were noted, give --expected-positives"
    return line
