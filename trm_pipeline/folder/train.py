"""Train on a folder of one's own images, score what was held out, and keep the model."""

from __future__ import annotations

import posixpath
import shlex
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN, known_fraction
from trm_pipeline import ranks
from trm_pipeline.folder.encoded import check_encoding, check_output, encode, words_of
from trm_pipeline.folder.hold_out import hold_out
from trm_pipeline.folder.image_files import find_images
from trm_pipeline.folder.judgement import judge
from trm_pipeline.folder.labels import Labels, read_labels
from trm_pipeline.folder.learning import learn, probabilities
from trm_pipeline.folder.options import TrainOptions
from trm_pipeline.folder.outputs import FILES, write
from trm_pipeline.methods import ZERO_SHOT
from trm_pipeline.methods.base import score
from trm_pipeline.progress import say

__all__ = ["run_train"]


def run_train(options: TrainOptions) -> None:
    """Everything ``train`` does; the files of an earlier run stay until all new ones are there."""
    started = time.perf_counter()
    _check(options)
    images = find_images(options.images)
    check_output(options.output, options.images, images)
    labels = _labels(options, images)
    words = words_of(labels.class_names, options.names)
    labels = _unlabelled(labels, images, use=options.use_unlabelled, folders=options.group == "folder")
    say(_about(labels))
    frozen = encode(options, options.images, labels.files, labels.class_names, words)
    features, labels = frozen.features, _only(labels, frozen.readable)
    if not (labels.targets == 1).any():
        raise ValueError("no label is present in the images that can be read: nothing to learn from")

    held = _held(options, labels)
    trained = (labels.targets[~held] == 1).any(dim=0)  # classes
    if none := [name for name, own in zip(labels.class_names, trained.tolist(), strict=True) if not own]:
        shown = ", ".join(none[:5]) + (" …" if len(none) > 5 else "")
        say(f"no label is present of {shown}: nothing to learn from, scored by name alone (zero-shot)")
    head, estimates = learn(options, frozen, labels.class_names, labels.targets, held, trained)
    scores = probabilities(head, features)
    zero_shot = {
        name.removeprefix("zero-shot-"): score(lambda b, f=f: f(b, frozen.text), features, 64)  # type: ignore[misc]
        for name, f in ZERO_SHOT.items()
    }
    about, lines = judge(labels, held, trained, scores, zero_shot, words)
    saved = frozen.saved(**about)
    say(f"writing scores and pictures of {len(labels.files)} images")
    written = write(options.output, options.images, labels, held, head, saved, scores, estimates, features)
    say(lines)
    if options.model == "embedded":
        say("Once more: with the embedded model these figures mean nothing for photographs.")
    say(f"\n{options.output} ({time.perf_counter() - started:.0f} s):")
    say("\n".join(f"  {name:<17} {FILES[name]}" for name in FILES if name in written))
    say(f"score other images: trm-losses predict {shlex.quote(str(options.output))} IMAGES")


def _check(options: TrainOptions) -> None:
    if ranks.launched() > 1:
        raise ValueError(f"train must run in one process, got {ranks.launched()} of torchrun; start it without")
    if not 0 <= options.hold_out < 1:
        raise ValueError(f"--hold-out must be a share from 0 to below 1, got {options.hold_out:g} (20 % is 0.2)")
    if options.epochs is not None and options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {options.epochs}")
    if options.expected_positives is not None and options.expected_positives <= 0:
        raise ValueError(f"--expected-positives must be above 0, got {options.expected_positives:g}")
    if options.separator == "":
        raise ValueError("--separator must be what stands between names, got nothing; give ' ' for spaces")
    check_encoding(options, options.output)


def _labels(options: TrainOptions, images: Sequence[str]) -> Labels:
    """What the label file says of the images."""
    labels = read_labels(
        options.labels,
        images,
        minus_one=options.minus_one,
        unlisted_absent=options.unlisted == "absent",
        separator=options.separator,
        group=options.group,
    )
    if labels.held is not None and options.group is not None:
        raise ValueError(f"--group cannot be used with {options.labels.name}: its column split already says what is held out")
    if not (labels.targets == 1).any():
        raise ValueError(
            f"{options.labels.name}: no label is present, of {labels.targets.numel()} ({known_fraction(labels.targets):.0%} "
            "known): nothing to learn from"
        )
    return labels


def _unlabelled(labels: Labels, images: Sequence[str], *, use: bool, folders: bool) -> Labels:
    """With the images that have no row, where they are wanted; either way it is said how many they are.

    Where ``folders`` are groups these images belong to some too; else each is a group by itself.
    """
    listed = set(labels.files)
    others = [file for file in images if file not in listed]
    if others and use:
        say(f"{len(others)} images without a row take part with all labels unknown")
        rows = torch.full((len(others), len(labels.class_names)), float(UNKNOWN))
        held = None if labels.held is None else torch.cat([labels.held, torch.zeros(len(others), dtype=torch.bool)])
        own = [posixpath.dirname(file) if folders else file for file in others]
        groups = None if labels.groups is None else labels.groups + own
        return labels._replace(files=labels.files + others, targets=torch.cat([labels.targets, rows]), held=held, groups=groups)
    if others:
        say(f"{len(others)} images without a row are left out, such as {others[0]} (--use-unlabelled: train on guesses for them)")
    return labels


def _about(labels: Labels) -> str:
    present, absent = int((labels.targets == 1).sum()), int((labels.targets == 0).sum())
    known = f"{known_fraction(labels.targets):.0%} of {labels.targets.numel()} labels known"
    line = f"{len(labels.files)} images, {len(labels.class_names)} classes; {known}: {present} present, {absent} absent"
    if labels.separator is not None:
        line += f"\nnames in lists are separated by {labels.separator!r} (--separator, if that is wrong)"
    if labels.lists:
        line += "\nwhat a list does not name counts as unknown (--unlisted absent, if the lists are complete)"
    return line


def _only(labels: Labels, rows: Tensor) -> Labels:
    return labels._replace(
        files=[labels.files[i] for i in rows.tolist()],
        targets=labels.targets[rows],
        held=None if labels.held is None else labels.held[rows],
        groups=None if labels.groups is None else [labels.groups[i] for i in rows.tolist()],
    )


def _held(options: TrainOptions, labels: Labels) -> Tensor:
    """Which images are held out (N,); by which rule is said."""
    if options.hold_out == 0:
        return torch.zeros(len(labels.files), dtype=torch.bool)
    if labels.held is not None:
        held, rule = labels.held, "by the column split"
    elif labels.groups is None:
        held = hold_out(labels.targets, options.hold_out, seed=options.seed)
        rule = "image by image (if some show the same scene, keep them together with --group or a column split)"
    else:
        held = hold_out(labels.targets, options.hold_out, seed=options.seed, groups=labels.groups)
        sides = [len({group for group, own in zip(labels.groups, held.tolist(), strict=True) if own == side}) for side in (0, 1)]
        rule = f"{sides[1]} of {sum(sides)} groups by {'folder' if options.group == 'folder' else f'column {options.group}'}"
    say(f"hold-out: {int(held.sum())} of {len(held)} images, {rule}")
    if held.all():
        raise ValueError("no image is left to train on: the column split holds out all of them")
    return held
