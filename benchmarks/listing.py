"""What it takes to list a data set: seconds and peak memory until every image and label is known, before any image is opened.

    python benchmarks/listing.py
    python benchmarks/listing.py --data coco --images 2000 --json runs/bench/listing.json

Data sets of their real numbers of images are written in their layouts, with random labels at the published mean and files without
content for images, into a temporary folder, which takes most of the time. Each is then listed in a process of its own: time
and peak memory are those of the listing, over what the imports take. COCO's objects are more than the real ones, with outlines
that make the file as long as the real one. Memory is counted in a way that Linux alone has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import repository  # noqa: F401

Row = dict[str, Any]


def blank(path: Path) -> None:
    """An image that is never opened."""
    path.touch()


class DataSet(NamedTuple):
    """Published numbers of a data set: images of each split, classes, labels an image; the names of its layout and its reader."""

    splits: dict[str, int]
    classes: int
    labels: float
    layout: str
    reader: str

    def write(self, root: Path, labels: dict[str, np.ndarray]) -> None:
        from tests.helpers import layouts

        write = getattr(layouts, f"write_{self.layout}")
        if self.layout == "cub":  # one table, which says of each image where it belongs
            table = np.concatenate(list(labels.values()))
            write(root, table, [row < len(labels["train"]) for row in range(len(table))], np.full(table.shape, 3), draw=blank)
            return
        # The real file of COCO has 605,000 objects for 241,000 labels in some 450 MB, most of which is outlines.
        write(root, labels, draw=blank, **({"copies": 3, "corners": 28} if self.layout == "coco" else {}))

    def read(self, root: Path, split: str) -> Any:
        module, name = self.reader.split(".")
        return getattr(import_module(f"trm_pipeline.data.{module}"), name)(root, split)


DATA = {
    "coco": DataSet({"train": 82783, "val": 40504}, 80, 2.9, "coco", "coco.COCO"),
    "vg200": DataSet({"train": 98249, "test": 10000}, 200, 10.0, "vg", "vg200.VG200"),
    "nus": DataSet({"train": 161789, "test": 107859}, 81, 1.9, "nus", "nus.NUS"),
    "cub": DataSet({"train": 5994, "test": 5794}, 312, 31.4, "cub", "cub.CUB"),
}


def memory(what: str) -> float:
    """What this process holds (``VmRSS``) or has held at most (``VmHWM``), in MB; Linux."""
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) / 1024


def listed(key: str, root: Path, split: str) -> Row:
    """One split, in a process of its own."""
    import trm_pipeline.data.label_files  # noqa: F401
    import trm_pipeline.data.voc  # noqa: F401
    from trm_losses.labels import hide_labels, known_fraction

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak of the imports is none of it
    before, started, used = memory("VmRSS"), time.perf_counter(), time.process_time()
    images = DATA[key].read(root, split)
    seconds, processor, most = time.perf_counter() - started, time.process_time() - used, memory("VmHWM")
    return {
        "data": key,
        "split": split,
        "images": len(images),
        "classes": images.targets.shape[1],
        "labels": float((images.targets == 1).sum(dim=1).float().mean()),
        "known": known_fraction(hide_labels(images.targets, 0.1)),
        "seconds": seconds,
        "processor_seconds": processor,
        "megabytes": most - before,
        "imports_megabytes": before,
    }


def measure(key: str, images: int | None, folder: Path) -> list[Row]:
    """Write a data set and list its splits."""
    data = DATA[key]
    generator = np.random.default_rng(0)
    labels = {
        split: (generator.random((min(count, images or count), data.classes)) < data.labels / data.classes).astype(np.int8)
        for split, count in data.splits.items()
    }
    data.write(folder / key, labels)
    rows = []
    for split in data.splits:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(listed, (key, folder / key, split)))
    return rows


def table(rows: Sequence[Row]) -> str:
    from trm_pipeline.report.markdown import markdown

    lines = [["data", "split", "images", "classes", "labels an image", "known at 10 %", "seconds", "of processor", "MB"]]
    for row in rows:
        cells = [row["data"], row["split"], f"{row['images']:,}", f"{row['classes']}"]
        cells += [f"{row['labels']:.2f}", f"{row['known']:.4f}", f"{row['seconds']:.1f}"]
        cells += [f"{row['processor_seconds']:.1f}", f"{row['megabytes']:.0f}"]
        lines.append(cells)
    return markdown(lines)


def main(typed: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), default=list(DATA))
    parser.add_argument("--images", type=int, help="at most as many of each split; default: the published numbers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(typed)
    rows: list[Row] = []
    for key in args.data:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(key, args.images, Path(folder))
    print(table(rows))
    if args.json:
        from trm_pipeline.files import write_json

        write_json(args.json, {"listing": rows})


if __name__ == "__main__":
    main()
