"""Draws the README's picture of saliency maps: ``python tools/make_saliency_picture.py runs/voc`` after ``make reproduce``.

It shows the first images of the run's page, and two classes of each.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from trm_pipeline.report.pictures import SaliencyMaps, draw_saliency

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> None:
    """Draw from the saliency maps of a run's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="the folder of reproduce_voc.py")
    parser.add_argument("--images", type=int, default=3, help="rows, default: %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "saliency.jpg")
    args = parser.parse_args(argv)
    found = sorted(args.run.glob("saliency-*.npz"))
    if not found:
        raise SystemExit(f"error: no saliency-*.npz in {args.run}; run reproduce_voc.py with --methods trm first")
    maps = SaliencyMaps.load(found[0])
    chosen = SaliencyMaps(*(values if values is maps.class_names else values[: args.images] for values in maps))
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "saliency.png"
        draw_saliency(drawn, chosen, most_classes=2)
        Image.open(drawn).convert("RGB").save(args.output, quality=82, optimize=True)
    print(f"{args.output}  {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
