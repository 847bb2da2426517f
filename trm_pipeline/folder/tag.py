"""Score a folder of images by the names of classes, without any label, and keep what did as a model."""

from __future__ import annotations

import shlex
import time

import torch

from trm_losses import GlobalHead, RegionPooler, TextRegionMatchingLoss, TRMHead
from trm_losses.labels import UNKNOWN
from trm_pipeline.folder.encoded import Encoded, check_encoding, check_output, encode, read_names, words_of
from trm_pipeline.folder.image_files import find_images
from trm_pipeline.folder.judgement import table
from trm_pipeline.folder.learning import probabilities
from trm_pipeline.folder.model import HEAD_FILE, MODEL_FILE
from trm_pipeline.folder.options import TagOptions
from trm_pipeline.folder.outputs import check_untrained, score_columns, score_row, write_csv
from trm_pipeline.methods import fit_training_free
from trm_pipeline.progress import say

_FILES = {
    MODEL_FILE: "the model, for predict",
    HEAD_FILE: "its weights: the classifier that these images made",
    "scores.csv": "scores of all images",
}


def run_tag(options: TagOptions) -> None:
    """Everything ``tag`` does."""
    started = time.perf_counter()
    check_encoding(options, options.output)
    names = read_names(options.classes)
    if not 0 < options.expected_positives <= len(names):
        raise ValueError(
            f"--expected-positives must be above 0 and at most the number of classes, {len(names)}; "
            f"got {options.expected_positives:g}"
        )
    images = find_images(options.images)
    check_output(options.output, options.images, images)
    check_untrained(options.output)
    words = words_of(names, options.names)
    frozen = encode(options, options.images, images, names, words)
    files = [images[i] for i in frozen.features.places.tolist()]
    head = _head(frozen, names, options.expected_positives)
    scores = probabilities(head, frozen.features)
    nobody = {"trained": False, "threshold": 0.5, "threshold_from": "default: no label was known"}
    saved = frozen.saved(classes={name: {"words": word, **nobody} for name, word in words.items()}, scores={})
    options.output.mkdir(parents=True, exist_ok=True)
    rows = (score_row(saved, file, row) for file, row in zip(files, scores, strict=True))
    write_csv(options.output / "scores.csv", ["image", "present", *score_columns(saved)], rows)
    (options.output / MODEL_FILE).unlink(missing_ok=True)  # of an earlier call: with another head it would be another model
    head.save(options.output / HEAD_FILE)
    saved.save(options.output)
    assert head.global_head is not None and head.global_head.prior is not None
    counts = head.global_head.prior.count
    lines = [("class", "tokens", "highest", "image")]
    for name, count, value, at in zip(names, counts.tolist(), *(x.tolist() for x in scores.max(dim=0)), strict=True):
        lines.append((name, str(count) if count else "0 *", f"{value:.2f}", files[at]))
    say(f"\nTokens that stand for each class, and the image with the highest score:\n{table(lines)}")
    if not counts.all():
        say("* no token of these images points to the class first: it is scored by its text")
    say(f"\n{options.output} ({time.perf_counter() - started:.0f} s):")
    say("\n".join(f"  {name:<17} {about}" for name, about in _FILES.items()))
    say(
        "Scores rank the images of a class. Their level is assumed: no label says from which score on a class is present.\n"
        f"It is that of {options.expected_positives:g} present classes an image (--expected-positives). Label some and train."
    )
    say(f"score other images: trm-losses predict {shlex.quote(str(options.output))} IMAGES")


def _head(frozen: Encoded, names: list[str], expected_positives: float) -> TRMHead:
    """Logits of the training-free classifier, which these images make; the regions say where a class was looked for."""
    text, features = frozen.text.to(frozen.features.device), frozen.features
    classes, dim = text.shape
    prior = fit_training_free(features, text, 50)
    whole = GlobalHead(classes, prior=prior, device=text.device)
    unknown = torch.full((50, classes), float(UNKNOWN), device=text.device)
    batches = ((batch.tokens, None, unknown[: len(batch.index)]) for batch in features.batches(50))
    whole.fit(batches, expected_positives=min(expected_positives, classes / 2))
    pooler = RegionPooler(classes, dim, num_heads=1, query_head=False, device=text.device)
    matching = TextRegionMatchingLoss(classes, device=text.device)
    return TRMHead(pooler, matching, text, names, head="region", global_head=whole, rate=1.0).eval()
