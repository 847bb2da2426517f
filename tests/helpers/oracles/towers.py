"""The forward passes of image towers, by hand from their parameters."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


def cubic_row(source: int, target: int, index: int) -> list[float]:
    """Weights of the source cells for one target cell: antialiased cubic convolution with a = -1/2, half-pixel centres."""
    scale = source / target
    stretch = max(scale, 1.0)
    centre = (index + 0.5) * scale
    weights = []
    for j in range(source):
        t = abs((j + 0.5 - centre) / stretch)
        if t < 1:
            weights.append(1.5 * t**3 - 2.5 * t**2 + 1)
        elif t < 2:
            weights.append(-0.5 * t**3 + 2.5 * t**2 - 4 * t + 2)
        else:
            weights.append(0.0)
    total = sum(weights)
    return [w / total for w in weights]


def table_oracle(table: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The first entry as it is; every other cell a weighted sum of the native cells."""
    cells = table[1:].double().reshape(*native, -1)
    out = [table[0].double()]
    for i in range(grid[0]):
        rows = cubic_row(native[0], grid[0], i)
        for j in range(grid[1]):
            columns = cubic_row(native[1], grid[1], j)
            cell = torch.zeros_like(out[0])
            for a, wa in enumerate(rows):
                for b, wb in enumerate(columns):
                    if wa * wb != 0:
                        cell += wa * wb * cells[a, b]
            out.append(cell)
    return torch.stack(out)


def attention_oracle(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Queries (M, W), keys and values (N, W): softmax of scaled products, head by head."""
    width = q.shape[1] // heads
    out = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        out.append(scores.softmax(dim=1) @ v[:, part])
    return torch.cat(out, dim=1)


def norm_oracle(x: Tensor, norm: Any) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def linear(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.double().T + layer.bias.double()


def scaled(x: Tensor, scale: Any) -> Tensor:
    """A layer scale, or the identity in its place."""
    return x if isinstance(scale, nn.Identity) else x * scale.gamma.double()


def resnet_oracle(visual: Any, feature: Tensor, native: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, pooled and penultimate feature of one last map (C', h, w)."""
    pool = copy.deepcopy(visual.attnpool).double()
    _, height, width = feature.shape
    tokens = [linear(linear(feature[:, i, j], pool.v_proj), pool.c_proj) for i in range(height) for j in range(width)]
    cells = [feature[:, i, j] for i in range(height) for j in range(width)]
    cells = [sum(cells) / len(cells), *cells]
    table = table_oracle(pool.positional_embedding, (native, native), (height, width))
    x = torch.stack([cell + position for cell, position in zip(cells, table, strict=True)])
    q, k, v = (linear(x, layer) for layer in (pool.q_proj, pool.k_proj, pool.v_proj))
    pooled = linear(attention_oracle(q[:1], k, v, pool.num_heads), pool.c_proj)[0]
    return torch.stack(tokens), pooled, cells[0]


def vit_oracle(visual: Any, image: Tensor, value_path: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, pooled and penultimate feature of one image (3, H, W), by hand from the parameters."""
    step = visual.patch_size[0]
    grid = (image.shape[1] // step, image.shape[2] // step)
    kernel = visual.conv1.weight.double()
    x = [visual.class_embedding.double()]
    for i in range(grid[0]):
        for j in range(grid[1]):
            patch = image[:, i * step : (i + 1) * step, j * step : (j + 1) * step].double()
            x.append((kernel * patch).sum(dim=(1, 2, 3)))
    states = torch.stack(x) + table_oracle(visual.positional_embedding, visual.grid_size, grid)
    states = norm_oracle(states, visual.ln_pre)
    for block in visual.transformer.resblocks:
        normed = norm_oracle(states, block.ln_1)
        qkv = normed @ block.attn.in_proj_weight.double().T + block.attn.in_proj_bias.double()
        q, k, v = qkv.chunk(3, dim=1)
        after = []
        for mixed in (attention_oracle(q, k, v, block.attn.num_heads), v):
            x = states + scaled(linear(mixed, block.attn.out_proj), block.ls_1)
            hidden = linear(norm_oracle(x, block.ln_2), block.mlp.c_fc)
            after.append(x + scaled(linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), block.mlp.c_proj), block.ls_2))
        states, alone = after
    projection = visual.proj.double()
    patches = norm_oracle(states[1:], visual.ln_post)
    if visual.final_ln_after_pool:
        before = states[0] if visual.pool_type == "tok" else states[1:].mean(dim=0)
        penultimate = norm_oracle(before, visual.ln_post)
    elif visual.pool_type == "tok":
        penultimate = norm_oracle(states[0], visual.ln_post)
    else:
        penultimate = patches.mean(dim=0)
    tokens = norm_oracle(alone[1:], visual.ln_post) if value_path else patches
    return tokens @ projection, penultimate @ projection, penultimate
