"""How large an exported model is, how long it takes to write, and how long an image takes in it, on one core.

    python benchmarks/export.py
    python benchmarks/export.py --only embedded RN50

Published architectures with random weights, which have the sizes of trained ones, and a head of 20 classes. The image has the
500 x 375 pixels of VOC, and is resized by the graph. Seconds are those of the processor, the median for an image.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch

from trm_losses import RegionPooler, TextRegionMatchingLoss, TRMHead
from trm_losses.backbones import HFBackbone, OpenClipBackbone, TimmBackbone, load_open_clip
from trm_pipeline.embedded import CLASS_NAMES, load_embedded
from trm_pipeline.folder.encoded import usual_pool
from trm_pipeline.folder.model import SavedModel
from trm_pipeline.folder.onnx_file import export_onnx
from trm_pipeline.report.markdown import markdown

ROUNDS = 5


class Row(NamedTuple):
    """A file: megabytes, seconds to write it, seconds for an image, and its largest difference from PyTorch."""

    model: str
    megabytes: float
    writing: float
    image: float
    difference: float


def dinov2() -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "patch_size": 14,
        "image_size": 224,
    }
    return HFBackbone(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)))


def siglip() -> Any:
    import transformers

    return HFBackbone(transformers.SiglipModel(transformers.SiglipConfig()))


MODELS: dict[str, Callable[[], Any]] = {
    "embedded": lambda: OpenClipBackbone(load_embedded()[0]),
    "RN50": lambda: load_open_clip("RN50"),
    "ViT-B-32": lambda: load_open_clip("ViT-B-32"),
    "timm:convnext_tiny": lambda: TimmBackbone("convnext_tiny"),
    "timm:vit_small_patch16_224": lambda: TimmBackbone("vit_small_patch16_224"),
    "hf: DINOv2 small": dinov2,
    "hf: SigLIP base": siglip,
}


def measured(name: str, folder: Path) -> Row:
    """Write one model and run it."""
    torch.manual_seed(0)
    tower, names = MODELS[name](), list(CLASS_NAMES)
    head = TRMHead(RegionPooler(20, tower.dim), TextRegionMatchingLoss(20), torch.randn(20, tower.dim), names).eval()
    about = {word: {"words": word, "threshold": 0.5, "threshold_from": "default"} for word in names}
    saved = SavedModel(name, None, "", tower.image_size, usual_pool(tower), (), about, {})
    start = time.process_time()
    written = export_onnx(saved, head, tower, folder / "model.onnx")
    writing = time.process_time() - start
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    taken = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        session.run(None, {"image": image})
        taken.append(time.process_time() - start)
    assert written.difference is not None
    return Row(name, written.size / 1e6, writing, statistics.median(taken[1:]), written.difference)


def rows(names: Iterable[str]) -> Iterator[Row]:
    """A model after the other, each in a folder that goes again."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield measured(name, Path(folder))


def table(found: Iterable[Row]) -> str:
    """Of Markdown."""
    cells = [
        (row.model, f"{row.megabytes:.0f}", f"{row.writing:.0f}", f"{row.image:.2f}", f"{row.difference:.0e}") for row in found
    ]
    return markdown([("model", "MB", "seconds to write", "seconds an image", "difference"), *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=list(MODELS), metavar="MODEL")
    torch.set_num_threads(1)
    print(table(rows(parser.parse_args().only)))


if __name__ == "__main__":
    main()
