"""Known labels that are probably wrong, by models that have not seen them."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from trm_losses import TRMHead
from trm_losses.labels import UNKNOWN
from trm_pipeline.folder.learning import learn, present_alone, probabilities
from trm_pipeline.folder.opened import Opened, open_folder
from trm_pipeline.folder.options import SuspectsOptions
from trm_pipeline.folder.outputs import REVIEW_FILE, check_untrained, write_csv
from trm_pipeline.folder.review.ask import contradicted, doubted, opposed
from trm_pipeline.folder.review.page import write_review
from trm_pipeline.progress import say

LIST_FILE = "suspects.csv"


def run_suspects(options: SuspectsOptions) -> None:
    """Everything ``suspects`` does: a training for each fold of the images, which scores the labels of that fold."""
    started = time.perf_counter()
    if options.folds < 2:
        raise ValueError(f"--folds must be at least 2, got {options.folds}")
    check_untrained(options.output)
    opened = open_folder(options, folds=options.folds)
    labels, features = opened.labels, opened.frozen.features
    fold = _folds(labels.files if labels.groups is None else labels.groups, options.folds, options.seed)
    scores = torch.full_like(labels.targets, torch.nan)
    head = None
    for k in range(options.folds):
        held = fold == k
        trained = (labels.targets[~held] == 1).any(dim=0)
        if not held.any() or not trained.any():
            continue
        say(f"fold {k + 1} of {options.folds}: {int(held.sum())} images are held out")
        head = learn(options, opened.frozen, labels, held, trained)
        # A class without a present label outside the fold was not learned, and contradicts nothing.
        scores[held] = torch.where(trained, probabilities(head, features.only(held)), torch.nan)
    if head is None:
        raise ValueError("no fold leaves a present label to learn from; label more images, or give fewer --folds")
    _write(options, opened, scores, head, started)


def _folds(groups: list[str], count: int, seed: int) -> Tensor:
    """The fold (N,) of each image; those of a group share one."""
    place = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    order = torch.randperm(len(place), generator=torch.Generator().manual_seed(seed))
    return order[torch.tensor([place[name] for name in groups])] % count


def _write(options: SuspectsOptions, opened: Opened, scores: Tensor, head: TRMHead, started: float) -> None:
    """The whole list, and the page with the first of it."""
    labels = opened.labels
    targets, probability = labels.targets.numpy(), scores.numpy()  # whose single entries are read faster
    words = {1.0: "present", 0.0: "absent"}
    rows = (
        [labels.files[i], labels.class_names[c], words[float(targets[i, c])], f"{float(probability[i, c]):.4f}"]
        for i, c in doubted(labels.targets, scores)
    )
    write_csv(options.output / LIST_FILE, ["image", "class", "label", "score"], rows)
    questions = contradicted(labels, scores, head, opened.frozen.features, options.questions)
    if questions:
        title = f"Labels of {options.images.name} that may be wrong"
        write_review(options.output / REVIEW_FILE, questions, labels.class_names, images=options.images, title=title)
    known = labels.targets != UNKNOWN
    scored = int((known & scores.isfinite()).sum())
    told = f"\n{int(known.sum())} known labels; a model that has not seen them scored {scored}"
    if present_alone(options, labels, torch.ones(len(labels.files), dtype=torch.bool)):
        told += "\nstart at the top: no label tells the level of the scores, and those near 0.5 mean nothing"
    else:
        count = int(opposed(labels, scores).sum())
        told += f" and contradicts {count}"
        if 0 < len(questions) < count:
            told += f", the first {len(questions)} are on the page"
    say(told)
    say(f"\n{options.output} ({time.perf_counter() - started:.0f} s):")
    say(f"  {LIST_FILE:<13} known labels, the most doubtful first")
    if questions:
        say(f"  {REVIEW_FILE:<13} the first of them: open it in a browser, and train with the answers")
