"""Score a folder of images, or one image, with a trained model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from trm_pipeline.files import check_writable
from trm_pipeline.folder.encoded import say_unreadable
from trm_pipeline.folder.image_files import find_images
from trm_pipeline.folder.judgement import table
from trm_pipeline.folder.model import DEMONSTRATION
from trm_pipeline.folder.options import PredictOptions
from trm_pipeline.folder.outputs import score_columns, score_row, write_csv
from trm_pipeline.folder.tagger import Tagger
from trm_pipeline.progress import progress, say


def run_predict(options: PredictOptions) -> None:
    """Everything ``predict`` does: images pass through one batch after the other, and rows are written as they come."""
    started = time.perf_counter()
    if options.output.suffix.lower() != ".csv":
        raise ValueError(f"--output must be a .csv file, got {options.output}")
    check_writable(options.output.parent, "--output")
    if options.output.exists() and not options.output.read_bytes().startswith(b"image,present,"):
        raise ValueError(f"--output {options.output} exists and was not written by predict; give another name")
    tagger = Tagger.load(options.trained, device=options.device, pretrained=options.pretrained)
    if options.add:
        tagger = tagger.with_classes(options.add)
    if tagger.saved.model == "embedded":
        say(f"{DEMONSTRATION}\n")
    one = options.images.is_file()
    folder, files = (options.images.parent, [options.images.name]) if one else (options.images, find_images(options.images))
    found = _Found(tagger, folder, files, options.workers if len(files) > 64 else 0)
    write_csv(options.output, ["image", "present", *score_columns(tagger.saved)], found.rows())
    rows = [("class", "images", "highest", "threshold")]
    chosen = True
    for c, (name, about) in enumerate(tagger.saved.classes.items()):
        own = not about["threshold_from"].startswith("default")
        chosen &= own
        threshold = f"{about['threshold']:.2f}{'  ' if own else ' *'}"
        rows.append((name, str(int(found.counts[c])), f"{found.highest[c]:.2f}", threshold))
    say(f"\nImages in which each class is found:\n{table(rows)}")
    if not chosen:
        say("* not chosen: nothing in the hold-out tells it")
    say(f"\n{options.output}: {len(files) - len(found.broken)} images, {time.perf_counter() - started:.0f} s")


class _Found:
    """Rows of scores, and what they add up to once all have passed."""

    def __init__(self, tagger: Tagger, folder: Path, files: Sequence[str], workers: int) -> None:
        self.tagger, self.folder, self.files, self.workers = tagger, folder, files, workers
        self.counts = torch.zeros(len(tagger.class_names), dtype=torch.int64)
        self.highest = torch.zeros(len(tagger.class_names))
        self.broken: list[int] = []

    def rows(self) -> Iterator[list[str]]:
        """A row for each image that can be read."""
        paths = [self.folder / file for file in self.files]
        batches, saved = self.tagger.stream(paths, workers=self.workers), self.tagger.saved
        for places, scores in progress(batches, f"scoring {len(paths)} images", total=-(-len(paths) // 50)):
            fine = scores.isfinite().all(dim=1)
            self.broken += places[~fine].tolist()
            for place, row in zip(places[fine].tolist(), scores[fine], strict=True):
                self.counts += row > saved.thresholds
                self.highest = torch.maximum(self.highest, row)
                yield score_row(saved, self.files[place], row)
        say_unreadable(self.folder, self.broken, self.files)  # if it is all of them, no file is written
