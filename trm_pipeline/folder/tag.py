"""Score a folder of images by the names of classes, without any label."""

from __future__ import annotations

import argparse
import time

import torch

from trm_pipeline import ranks
from trm_pipeline.data.base import lines_of
from trm_pipeline.folder.encoded import check_encoding, check_output, encode, words_of
from trm_pipeline.folder.image_files import find_images
from trm_pipeline.folder.judgement import table
from trm_pipeline.folder.outputs import write_csv
from trm_pipeline.methods import fit_training_free, zero_shot_tokens
from trm_pipeline.methods.base import score
from trm_pipeline.progress import say

__all__ = ["run_tag"]

_FILES = {
    "scores.csv": "scores of all images by the training-free classifier, which these images themselves made",
    "zero_shot.csv": "the same by the class texts alone",
}


def run_tag(args: argparse.Namespace) -> None:
    """Everything ``tag`` does."""
    started = time.perf_counter()
    if ranks.launched() > 1:
        raise ValueError(f"train_folder.py must run in one process, got {ranks.launched()} of torchrun; start it with python")
    check_encoding(args)
    names = lines_of(args.classes, "--classes", "wanted is a file with a name a line")
    if not names or len(set(names)) < len(names):
        got = f"{max(names, key=names.count)!r} twice" if names else "none"
        raise ValueError(f"--classes: {args.classes} must hold different names of classes, one a line, got {got}")
    images = find_images(args.images)
    check_output(args.output, args.images, images)
    frozen = encode(args, images, names, words_of(names, args.names))
    files = [images[i] for i in frozen.readable.tolist()]
    text = frozen.text.to(args.device)
    classifier = fit_training_free(frozen.features, text, 50)
    with torch.no_grad():
        scores = score(lambda batch: classifier(batch.tokens), frozen.features, 50)
        zero_shot = score(lambda batch: zero_shot_tokens(batch, text), frozen.features, 50)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, values in zip(_FILES, (scores, zero_shot), strict=True):
        rows = ([file, *(f"{value:.4f}" for value in row)] for file, row in zip(files, values.tolist(), strict=True))
        write_csv(args.output / name, ["image", *names], rows)
    lines = [("class", "tokens", "highest", "image")]
    for name, count, value, at in zip(names, classifier.count.tolist(), *(x.tolist() for x in scores.max(dim=0)), strict=True):
        lines.append((name, str(count) if count else "0 *", f"{value:.2f}", files[at]))
    say(f"\nTokens that stand for each class, and the image with the highest score:\n{table(lines)}")
    if not classifier.count.all():
        say("* no token of these images points to the class first: it is scored by its text")
    say(f"\n{args.output} ({time.perf_counter() - started:.0f} s):")
    say("\n".join(f"  {name:<17} {about}" for name, about in _FILES.items()))
    say(
        "Scores rank the images of a class. No label says from which score on it is present, so there is no threshold and no\n"
        "model for predict: label some images and train, or tag the new images together with these."
    )
