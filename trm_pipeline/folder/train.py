"""Train on a folder of one's own images, score what was held out, and keep the model."""

from __future__ import annotations

import shlex
import time
from functools import partial

import torch
from torch import Tensor

from trm_pipeline.folder.card import FRONT
from trm_pipeline.folder.hold_out import hold_out
from trm_pipeline.folder.judgement import CALIBRATED, judge
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.learning import calibrate, learn, listed, present_alone, probabilities
from trm_pipeline.folder.opened import open_folder
from trm_pipeline.folder.options import TrainOptions
from trm_pipeline.folder.outputs import CARD_FILE, FILES, write
from trm_pipeline.folder.review.ask import contradicted, open_questions
from trm_pipeline.methods import ZERO_SHOT
from trm_pipeline.methods.base import score
from trm_pipeline.progress import say


def run_train(options: TrainOptions) -> None:
    """Everything ``train`` does; the files of an earlier run stay until all new ones are there."""
    started = time.perf_counter()
    if not 0 <= options.hold_out < 1:
        raise ValueError(f"--hold-out must be a share from 0 to below 1, got {options.hold_out:g} (20 % is 0.2)")
    if not 0 < options.at_least <= 1:
        raise ValueError(f"--at-least must be a share above 0 and at most 1, got {options.at_least:g} (90 % is 0.9)")
    card = options.output / CARD_FILE
    if card.is_file() and not card.read_bytes().startswith(FRONT.encode()):
        raise ValueError(f"--output: {card} is there and was not written by train, which would replace it; give another folder")
    labels, words, frozen = open_folder(options, use_unlabelled=options.use_unlabelled)
    features = frozen.features
    held = _held(options, labels)
    trained = (labels.targets[~held] == 1).any(dim=0)  # classes
    if not trained.any():
        raise ValueError(
            "no label is present in the images to train on; label more of them, or hold fewer out (--hold-out, split)"
        )
    if none := [name for name, own in zip(labels.class_names, trained.tolist(), strict=True) if not own]:
        shown = ", ".join(none[:5]) + (" …" if len(none) > 5 else "")
        say(f"no label is present of {shown}: nothing to learn from, scored by name alone (zero-shot)")
    head = learn(options, frozen, labels, held, trained)
    noted = present_alone(options, labels, held)
    expected = (options.expected_positives or listed(labels.targets[~held])) if noted else None
    calibrated_on = None if head.calibration is None else "training images"
    if held.any() and calibrate(head, features.only(held), labels.targets[held], expected):
        calibrated_on = "held-out labels"
    elif held.any():
        few = f"fewer than {CALIBRATED} present {'' if noted else 'or absent '}labels in the hold-out"
        say(f"scores are {'not calibrated' if calibrated_on is None else f'calibrated on the {calibrated_on}'}: {few}")
    scores = probabilities(head, features)
    zero_shot = {
        name.removeprefix("zero-shot-"): score(lambda b, f=f: f(b, frozen.text), features, 64)  # type: ignore[misc]
        for name, f in ZERO_SHOT.items()
    }
    about, lines = judge(
        labels, held, trained, scores, zero_shot, words, noted=noted, metric=options.metric, at_least=options.at_least
    )
    level = present_alone(options, labels, held if calibrated_on == "held-out labels" else ~held)
    about["scores"] |= {"calibrated_on": calibrated_on, "level_assumed": level}
    saved = frozen.saved(**about)
    # What training has seen it does not contradict.
    slips = labels._replace(targets=torch.where(held[:, None], labels.targets, -1.0)) if held.any() else labels
    questions = contradicted(slips, scores, head, features, options.questions // 4)
    questions += open_questions(labels, scores, head, features, options.questions - len(questions))
    say(f"writing scores of {len(labels.files)} images and {len(questions)} questions")
    written = write(options.output, options.images, labels, held, head, saved, scores, questions)
    say(lines)
    if options.model == "embedded":
        say("Once more: with the embedded model these figures mean nothing for photographs.")
    say(f"\n{options.output} ({time.perf_counter() - started:.0f} s):")
    say("\n".join(f"  {name:<12} {FILES[name]}" for name in FILES if name in written))
    say(f"score other images: trm-losses predict {shlex.quote(str(options.output))} IMAGES")


def _held(options: TrainOptions, labels: Labels) -> Tensor:
    """Which images are held out (N,); by which rule is said."""
    if options.hold_out == 0:
        return torch.zeros(len(labels.files), dtype=torch.bool)
    if labels.held is not None:
        held, rule = labels.held, "by the column split"
    else:
        draw = partial(hold_out, share=options.hold_out, seed=options.seed, groups=labels.groups)
        held = draw(labels.noted)  # before answers, so that figures are of the same images after each round of them
        present = labels.targets == 1
        if not held.any() or (present.any(dim=0) & ~present[~held].any(dim=0)).any():  # nothing held out, or all that a class has
            held = draw(labels.targets)
        rule = "image by image (if some show the same scene, keep them together with --group or a column split)"
        if labels.groups is not None:
            pairs = set(zip(labels.groups, held.tolist(), strict=True))  # a group lies on one side
            by = "folder" if options.group == "folder" else f"column {options.group}"
            rule = f"{sum(side for _, side in pairs)} of {len(pairs)} groups by {by}"
    say(f"hold-out: {int(held.sum())} of {len(held)} images, {rule}")
    if held.all():
        raise ValueError("no image is left to train on: the column split holds out all of them")
    return held
