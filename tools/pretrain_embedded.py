"""Pre-train the embedded model from scratch: draws its scenes, trains, writes the weights and the log."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from pretraining import PretrainingRecipe, pretrain

from trm_pipeline.embedded import WEIGHTS_FILE
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.progress import escape_output


def main() -> None:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=WEIGHTS_FILE.parent, help="folder for weights.safetensors and pretrain.log"
    )
    parser.add_argument("--cache", type=folder_argument, default=CACHE, help="folder for the drawn VOC")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    for field in fields(PretrainingRecipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    recipe = PretrainingRecipe(**{field.name: getattr(args, field.name) for field in fields(PretrainingRecipe)})
    args.output.mkdir(parents=True, exist_ok=True)
    pretrain(
        recipe,
        cache=args.cache,
        weights=args.output / WEIGHTS_FILE.name,
        log=args.output / "pretrain.log",
        device=args.device,
        threads=args.threads,
    )


if __name__ == "__main__":
    main()
