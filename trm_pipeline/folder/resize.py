"""Pillow's bicubic resize as arithmetic on tensors, so that it can be part of an exported graph."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_ONE = 2.0**22  # Pillow's weights are whole numbers, and this is 1


def resized(pixels: Tensor, size: tuple[int, int], *, tall_first: bool) -> Tensor:
    """The bytes that ``Image.resize(..., BICUBIC)`` gives, each of them.

    Two passes of weighted sums, each rounded to bytes. In float64 the sums of whole numbers are exact.

    Args:
        pixels: (H, W, 3) bytes, of any H and W.
        size: (h, w) wanted.
        tall_first: whether the height comes first where it shrinks by far more than the width; see
            :func:`pillow_is_tall_first`.

    Returns:
        (3, h, w) whole numbers from 0 to 255 in float64.
    """
    (height, width), (h, w) = pixels.shape[:2], size
    x = pixels.permute(2, 0, 1).double()
    down, across = _weights(height, h, 1), _weights(width, w, 0)
    if not tall_first:
        return _across_first(x, down, across)
    tall = height - h > 2 * torch.sym_max(0, width - w)
    found: Tensor = torch.cond(tall, _down_first, _across_first, (x, down, across))
    return found


def _across_first(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _bytes(down @ _bytes(x @ across))


def _down_first(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _bytes(_bytes(down @ x) @ across)


def _bytes(sums: Tensor) -> Tensor:
    return (sums / _ONE + 0.5).floor().clamp(0, 255)


def _weights(old: int, new: int, axis: int) -> Tensor:
    """Weights in whole numbers, of old pixels along ``axis`` for new ones along the other of two.

    A cubic (a = -0.5) as wide as a new pixel, cut at the border and summing to 1. Made as they are multiplied: a transposed
    matrix would be fused with the product in an exported graph, which onnxruntime cannot do in float64 (1.20 to 1.24).
    """
    scale = torch.full((), old, dtype=torch.float64) / new  # a tensor: an exporter makes float32 of plain numbers
    wide = scale.clamp(min=1)
    centers = (torch.arange(new, dtype=torch.float64) + 0.5).unsqueeze(axis) * scale
    places = torch.arange(old, dtype=torch.float64).unsqueeze(1 - axis)
    first, end = ((centers + side * wide + 0.5).trunc() for side in (-2.0, 2.0))
    x = ((places - centers + 0.5) / wide).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where((places >= first) & (places < end), weight, 0.0)
    share = weight / weight.sum(dim=axis, keepdim=True) * _ONE
    return torch.where(share < 0, (share - 0.5).ceil(), (share + 0.5).floor())


def pillow_is_tall_first() -> bool:
    """Whether the Pillow here resizes tall images down before across, as from version 13 on."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
    wanted = torch.from_numpy(np.asarray(Image.fromarray(noise).resize((24, 24), Image.Resampling.BICUBIC)).copy())
    found = [resized(torch.from_numpy(noise), (24, 24), tall_first=first).permute(1, 2, 0) for first in (False, True)]
    apart = [float((own - wanted).abs().mean()) for own in found]
    return apart[1] < apart[0]
