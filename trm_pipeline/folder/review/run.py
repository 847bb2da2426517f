"""Ask about a folder of images with a trained model."""

from __future__ import annotations

import time

import torch

from trm_losses.labels import UNKNOWN
from trm_pipeline.files import check_writable
from trm_pipeline.folder.encoded import features_of
from trm_pipeline.folder.image_files import find_images
from trm_pipeline.folder.known import read_known
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.learning import probabilities
from trm_pipeline.folder.options import ReviewOptions
from trm_pipeline.folder.review.ask import contradicted, open_questions
from trm_pipeline.folder.review.page import write_review
from trm_pipeline.folder.tagger import Tagger
from trm_pipeline.progress import say


def run_review(options: ReviewOptions) -> None:
    """Everything ``review`` does."""
    started = time.perf_counter()
    if options.questions < 1:
        raise ValueError(f"--questions must be at least 1, got {options.questions}")
    if options.output.suffix.lower() != ".html":
        raise ValueError(f"--output must be an .html file, got {options.output}")
    check_writable(options.output.parent, "--output")
    tagger = Tagger.load(options.trained, device=options.device, pretrained=options.pretrained)
    images = find_images(options.images)
    labels = _labels(options, images, tagger.class_names)
    tower, saved = tagger.tower, tagger.saved
    features = features_of(tower, saved.weights, saved.token_pool, options.images, labels.files, options, mirror=False)
    labels = labels.only(features.places)
    scores = probabilities(tagger.head, features)
    questions = contradicted(labels, scores, tagger.head, features, options.questions // 4)
    questions += open_questions(labels, scores, tagger.head, features, options.questions - len(questions))
    if not questions:
        raise ValueError("nothing is worth asking: every label is known or was answered, and the model contradicts no other")
    write_review(options.output, questions, labels.class_names, images=options.images, title=f"Labels of {options.images.name}")
    say(f"{options.output}: {len(questions)} questions, {time.perf_counter() - started:.0f} s; open it in a browser")


def _labels(options: ReviewOptions, images: list[str], class_names: list[str]) -> Labels:
    """What is known of all images, in the order of the model's classes; without a file of labels nothing is."""
    targets = torch.full((len(images), len(class_names)), float(UNKNOWN))
    replaced = torch.full_like(targets, torch.nan)
    if options.labels:
        known = read_known(options, images)
        if missing := [name for name in known.class_names if name not in class_names]:
            raise ValueError(f"{options.labels[0].name} has the class {missing[0]!r}, which {options.trained} does not know")
        places = {file: i for i, file in enumerate(images)}
        rows = torch.tensor([places[file] for file in known.files])
        cells = rows[:, None], torch.tensor([class_names.index(name) for name in known.class_names])
        targets[cells] = known.targets
        if known.replaced is not None:
            replaced[cells] = known.replaced
    return Labels(list(images), list(class_names), targets, lists=False, replaced=replaced)
