"""Labels and answers of a folder, written as another tool reads them."""

from __future__ import annotations

from trm_losses.labels import known_fraction
from trm_pipeline.folder.image_files import find_images
from trm_pipeline.folder.known import read_known
from trm_pipeline.folder.options import ConvertOptions
from trm_pipeline.folder.review.formats import OTHERS, write_labels_as
from trm_pipeline.progress import say


def run_convert(options: ConvertOptions) -> None:
    """Everything ``convert`` does."""
    if options.output.exists():
        raise ValueError(f"--output {options.output} is there already, and nothing is replaced; give another name")
    labels = read_known(options, find_images(options.images))
    write_labels_as(options.to, options.output, labels)
    if labels.held is not None and options.to in OTHERS:
        say(f"the column split was left out: --to {options.to} has no place for it, csv and jsonl have")
    known = f"{known_fraction(labels.targets):.0%} of {labels.targets.numel()} labels known"
    say(f"{options.output}: {len(labels.files)} images, {len(labels.class_names)} classes, {known}")
