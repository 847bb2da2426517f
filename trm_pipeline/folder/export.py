"""Write a trained model as one ONNX file."""

from __future__ import annotations

import time

from trm_pipeline.folder.model import DEMONSTRATION
from trm_pipeline.folder.onnx_file import check_export
from trm_pipeline.folder.options import ExportOptions
from trm_pipeline.folder.tagger import Tagger
from trm_pipeline.progress import say


def run_export(options: ExportOptions) -> None:
    """Everything ``export`` does."""
    started = time.perf_counter()
    check_export(options.output)
    tagger = Tagger.load(options.trained, pretrained=options.pretrained)
    if options.add:
        tagger = tagger.with_classes(options.add)
    if tagger.saved.model == "embedded":
        say(f"{DEMONSTRATION}\n")
    say(f"exporting {tagger.saved.model} with {len(tagger.class_names)} classes")
    written = tagger.export(options.output)
    checked = "not compared with PyTorch, since onnxruntime is not installed here"
    if written.difference is not None:
        checked = f"probabilities of noise differ from PyTorch by {written.difference:.1g} at most"
    seconds = time.perf_counter() - started
    say(
        f"{options.output}: {written.size / 1e6:.1f} MB, opset {written.opset}, {seconds:.0f} s\n{checked}\n"
        "  input   image (H, W, 3) in bytes, of any size\n"
        "  output  probabilities (C,); class_names and thresholds stand in the file (docs/deploy.md)"
    )
