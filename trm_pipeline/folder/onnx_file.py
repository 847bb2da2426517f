"""A trained model as one ONNX file: an image in, probabilities out, and everything between them inside."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import trm_losses
from trm_losses import TRMHead
from trm_losses.backbones._imports import said
from trm_pipeline.features.backbone import ImageTower
from trm_pipeline.features.cached import pool_tokens
from trm_pipeline.files import check_writable, replacing
from trm_pipeline.folder.encoded import transform_for
from trm_pipeline.folder.model import SavedModel
from trm_pipeline.folder.resize import pillow_is_tall_first, resized
from trm_pipeline.progress import without_logs

LARGEST = 2**31 - 1
"""Bytes that a file of ONNX can hold."""

TOLERANCE = 1e-3
"""Of probabilities of noise: a graph that is further from PyTorch is not the same model."""


_INT64 = 7  # ONNX's number of the type


class Exported(NamedTuple):
    """What was written: ONNX's operator set, and bytes; the largest difference from PyTorch, None if nothing could run it."""

    opset: int
    size: int
    difference: float | None


class _ImageToProbabilities(nn.Module):
    """Bytes (H, W, 3) of any height and width -> probabilities (C,), with the steps of training."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: ImageTower, head: TRMHead, token_pool: int) -> None:
        super().__init__()
        self.tower, self.head, self.token_pool = tower, head, token_pool
        self.tall_first = pillow_is_tall_first()
        self.register_buffer("mean", torch.tensor(tower.image_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(tower.image_std)[:, None, None])
        self.tables = nn.ParameterList(_resized_tables(tower)).requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        pixels = resized(image, self.tower.image_size, tall_first=self.tall_first)
        with _interpolating(iter(self.tables)):
            features = self.tower(((pixels.float() / 255 - self.mean) / self.std)[None])
        features = pool_tokens(features, self.token_pool)
        further = features.penultimate
        logits = self.head(_rounded(features.tokens), None if further is None else _rounded(further))
        return torch.sigmoid(logits)[0]


def _rounded(x: Tensor) -> Tensor:
    """As features are cached in training."""
    return x.half().float()


def check_export(path: Path) -> None:
    """What :func:`export_onnx` refuses whatever the model is."""
    if path.suffix.lower() != ".onnx":
        raise ValueError(f"--output must be a .onnx file, got {path}")
    check_writable(path.parent, "--output")
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"export needs the package {name}: pip install 'trm-losses[export]'") from error


def export_onnx(saved: SavedModel, head: TRMHead, tower: ImageTower, path: Path) -> Exported:
    """Write a model as one file, and compare it with PyTorch where onnxruntime is installed.

    Args:
        saved: what the model says of itself.
        head: of its classes.
        tower: the frozen model that ``saved`` names.
        path: a file that ends in ``.onnx``; one that is there is replaced.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: another suffix, an operation that ONNX does not have, more than 2 GiB, or a graph that gives other
            probabilities.
    """
    check_export(path)
    head, tower = (_on_cpu(module) for module in (head, tower))
    program = _program(_ImageToProbabilities(tower, head, saved.token_pool).eval(), saved.model)
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if weights > LARGEST:
        raise ValueError(
            f"a file of ONNX must be below 2 GiB, got {weights / 2**30:.1f} GiB of weights of {saved.model}; export a model "
            "with a smaller image tower"
        )
    opset: int = program.model.opset_imports[""]
    program.model.metadata_props.update(_about(saved, opset))
    program.model.doc_string = "image (H, W, 3) in bytes -> probabilities (C,) of class_names"
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)
        difference = _difference(saved, head, tower, temporary)
        if difference is not None and not difference < TOLERANCE:
            raise ValueError(
                f"the graph must give the probabilities of PyTorch, got a difference of {difference:.2g} on noise; this ONNX "
                f"cannot hold {saved.model}, and nothing was written"
            )
    return Exported(opset, path.stat().st_size, difference)


def _on_cpu(module: Any) -> Any:
    """The module itself, or a copy of one that is elsewhere."""
    elsewhere = any(value.device.type != "cpu" for value in module.state_dict().values())
    return copy.deepcopy(module).cpu() if elsewhere else module


def _about(saved: SavedModel, opset: int) -> dict[str, str]:
    """What stands in the file beside the graph, as JSON."""
    side = 2 * max(saved.image_size)  # see read_image
    about: dict[str, Any] = {
        "class_names": list(saved.classes),
        "thresholds": [one["threshold"] for one in saved.classes.values()],
        "draft": [side, side],
        "opset": opset,
        "model": {
            "made_by": f"trm_losses {trm_losses.__version__}",
            "name": saved.model,
            "pretrained": saved.pretrained,
            "weights": saved.weights,
            "image_size": saved.image_size,
            "token_pool": saved.token_pool,
            "templates": saved.templates,
            "classes": saved.classes,
        },
    }
    return {key: json.dumps(value) for key, value in about.items()}


def _program(model: nn.Module, name: str) -> Any:
    """The graph of a model, for images of any size."""
    dynamic = torch.export.Dim.DYNAMIC
    try:
        with torch.no_grad(), warnings.catch_warnings(), without_logs(logging.WARNING):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model,
                (torch.zeros(37, 53, 3, dtype=torch.uint8),),
                input_names=["image"],
                output_names=["probabilities"],
                dynamic_shapes={"image": {0: dynamic, 1: dynamic}},
                dynamo=True,
                verbose=False,
                custom_translation_table={torch.ops.aten._is_all_true.default: _is_all_true},
            )
    except Exception as error:  # every layer of the exporter has its own
        raise ValueError(f"{name} cannot be exported: {_reason(error)}") from error


def _is_all_true(mask: Any) -> Any:
    """What PyTorch's exporter has no counterpart for; the assertions of transformers are made of it."""
    op: Any = importlib.import_module("onnxscript").opset18
    return op.Equal(op.ReduceMin(op.Cast(mask, to=_INT64), keepdims=0), op.Constant(value_int=1))


def _reason(error: BaseException) -> str:
    """The operation that ONNX does not have, or else what the innermost error says."""
    found = re.search(r"No ONNX function found for .*?op='([\w.:]+)'", str(error), flags=re.DOTALL)
    if found:
        return f"ONNX has nothing for its operation {found[1]}"
    while error.__cause__ is not None:
        error = error.__cause__
    return said(error)


def _difference(saved: SavedModel, head: TRMHead, tower: ImageTower, path: Path) -> float | None:
    """The largest one between what a file says of noise and what PyTorch says of it; None without onnxruntime."""
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = runtime.InferenceSession(str(path))
    transform = transform_for(tower)
    draw, apart = np.random.default_rng(0), 0.0
    for height, width in ((60, 90), (700, 300), (1, 500)):
        image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        features = pool_tokens(tower(transform(Image.fromarray(image))[None]), saved.token_pool)
        further = features.penultimate
        wanted = head.predict(_rounded(features.tokens), None if further is None else _rounded(further))[0]
        (found,) = session.run(None, {"image": image})
        apart = max(apart, float((torch.from_numpy(found) - wanted).abs().max()))
    return apart


# Tables of positions are resized for each call. Runtimes do it less exactly than PyTorch, so it is done here, once.


@torch.no_grad()
def _resized_tables(tower: ImageTower) -> list[Tensor]:
    """What a tower interpolates on the way, in the order of the calls, if that is the same for every image."""
    found: list[list[Tensor]] = []
    for seed in (0, 1):
        images = torch.randn(1, 3, *tower.image_size, generator=torch.Generator().manual_seed(seed))
        with _interpolating(None) as seen:
            tower(images)
        found.append(seen)
    first, second = found
    same = len(first) == len(second) and all(map(torch.equal, first, second))
    return first if same else []


@contextlib.contextmanager
def _interpolating(tables: Iterator[Tensor] | None) -> Iterator[list[Tensor]]:
    """Calls of ``F.interpolate`` take the next table, if there is one; all results are kept in the list."""
    original: Callable[..., Tensor] = F.interpolate
    seen: list[Tensor] = []

    def taken(*args: Any, **options: Any) -> Tensor:
        found = None if tables is None else next(tables, None)
        seen.append(original(*args, **options) if found is None else found)
        return seen[-1]

    F.interpolate = taken
    try:
        yield seen
    finally:
        F.interpolate = original
