"""Write the drawn VOC; with --gate, check on val that it can tell methods apart."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.drawn.scenes import DEFAULT_SIZES
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.progress import escape_output


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", type=folder_argument, default=CACHE, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that draw; all cores by default")
    for split, size in DEFAULT_SIZES.items():
        parser.add_argument(f"--{split}", type=int, default=size, help=f"images in {split}")
    parser.add_argument("--gate", action="store_true", help="print the gate on val")
    parser.add_argument("--weights", type=Path, help="other weights for the gate; the shipped ones by default")
    args = parser.parse_args()

    sizes = {split: getattr(args, split) for split in DEFAULT_SIZES}
    start = time.perf_counter()
    devkit = write_drawn_voc(args.root, seed=args.seed, sizes=sizes, workers=args.workers)
    print(f"{devkit} ({sum(sizes.values())} images, {time.perf_counter() - start:.0f} s)")
    if not args.gate:
        return 0

    from gate import run_gate

    from trm_pipeline.embedded import load_embedded

    start = time.perf_counter()
    gate = run_gate(*load_embedded(weights=args.weights), devkit)
    print(f"{gate}\n({time.perf_counter() - start:.0f} s)")
    return 0 if gate.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
