"""Write drawn scenes in the layout of VOC2007, CUB-200-2011 or VG-200, and count their labels; with --gate, check on images that
are held out that they can tell methods apart."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from trm_pipeline.config.presets import HELD_OUT
from trm_pipeline.data.base import LabelledImages, held_out
from trm_pipeline.data.cub import CUB
from trm_pipeline.data.vg200 import VG200
from trm_pipeline.data.voc import VOC
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.drawn.phrases import write_drawn_phrases
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.progress import escape_output
from trm_pipeline.run.prepare import counts

READERS: dict[str, Callable[[Path, str], LabelledImages]] = {
    "voc": lambda folder, split: VOC(folder, 2007, split),
    "cub": CUB,
    "vg200": VG200,
}


def tail(images: LabelledImages) -> str:
    """How many images the classes are in, from the most to the least frequent."""
    number = (images.targets == 1).sum(dim=0)
    name = images.prompt_names()[int(number.argmax())]
    return (
        f"images of a class: most {int(number.max())} ({name}), median {int(number.median())}, least {int(number.min())}; "
        f"{int((number < 10).sum())} classes in fewer than 10, {int((number == 0).sum())} in none"
    )


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("layout", choices=tuple(READERS))
    parser.add_argument("--root", type=folder_argument, default=CACHE, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that draw; all cores by default")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", type=int, help=f"images in {split}; the set's own number by default; val: of voc alone")
    parser.add_argument("--gate", action="store_true", help="print the gate: of voc on val, else on a fifth of train")
    parser.add_argument("--weights", type=Path, help="other weights for the gate; the shipped ones by default")
    args = parser.parse_args()

    splits = ("train", "val", "test") if args.layout == "voc" else ("train", "test")
    sizes = {split: size for split in ("train", "val", "test") if (size := getattr(args, split)) is not None}
    if args.val is not None and "val" not in splits:
        parser.error(f"--val is for voc alone: {args.layout} has train and test")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    start = time.perf_counter()
    try:
        if args.layout == "voc":
            folder = write_drawn_voc(args.root, seed=args.seed, sizes=sizes, workers=args.workers)
        else:
            folder = write_drawn_phrases(args.layout, args.root, seed=args.seed, sizes=sizes, workers=args.workers)
    except ValueError as error:
        parser.error(str(error))
    print(f"{folder} ({time.perf_counter() - start:.0f} s)")
    read = READERS[args.layout]
    for split in splits:
        images = read(folder, split)
        print(f"{counts(split, images)}\n  {tail(images)}")
    if not args.gate:
        return 0

    from gate import Gate, run_gate, run_phrase_gate

    from trm_pipeline.embedded import load_embedded

    start = time.perf_counter()
    model, tokenizer = load_embedded(weights=args.weights)
    if args.layout == "voc":
        gate: Gate = run_gate(model, tokenizer, folder)
    else:
        train = read(folder, "train")
        rows = held_out(len(train))
        gate = run_phrase_gate(model, tokenizer, train.rows(rows["fit"]), train.rows(rows[HELD_OUT]))
    print(f"{gate}\n({time.perf_counter() - start:.0f} s)")
    return 0 if gate.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
