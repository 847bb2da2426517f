"""Causal blocks, run on no more tokens than reach the features, under the names that open_clip gives their parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PARTS = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}

KeysValues = tuple[Tensor, Tensor]
"""Keys and values (H, P, d) of tokens that all classes share, in one block."""


def is_known(open_clip: Any, transformer: Any) -> bool:
    """Whether the forward of these blocks is the one written here: open_clip's default block, as it was built.

    Norms, MLP and layer scale are called as the modules that they are, so only what is passed by matters.
    """
    if type(transformer) is not open_clip.transformer.Transformer or transformer.grad_checkpointing:
        return False
    if nn.modules.module._has_any_global_hook():
        return False
    for block in transformer.resblocks:
        if type(block) is not open_clip.transformer.ResidualAttentionBlock:
            return False
        if {name for name, _ in block.named_children()} != _PARTS or type(block.attn) is not nn.MultiheadAttention:
            return False
        attn = block.attn
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or attn.dropout:
            return False
        if any(is_touched(module) for module in (block, attn, attn.out_proj)):
            return False
    return not is_touched(transformer)


def is_causal(mask: Tensor | None) -> bool:
    """Whether a mask adds minus infinity where a later token would be seen, and nothing elsewhere."""
    if mask is None or not mask.is_floating_point():
        return False
    return torch.equal(mask, torch.full_like(mask, -math.inf).triu(1))


def is_touched(module: nn.Module) -> bool:
    """Whether hooks or another forward hang on a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or not vars(module).keys().isdisjoint({"forward", "attention"})


def end_states(blocks: Sequence[Any], first: Tensor, x: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """States (C, W) after the last block of the tokens ``ends`` (C,) of x (C, L, W), which follow the tokens first (P, W).

    No token sees a later one: what all classes begin with is the same whatever follows, and what comes after an end reaches
    no feature. All tokens stand in one matrix, and attention alone lays them out by class, padded to the longest. On a CPU
    nothing after an end is in the matrix; elsewhere the padding costs less than to wait for the number of tokens.
    """
    packed = _packs(x)
    if packed:
        x = x[:, : int(ends.max()) + 1]
    classes, length, width = x.shape
    x = x.flatten(0, 1)
    cells = last = torch.arange(classes, device=x.device) * length + ends
    if packed:
        real = torch.arange(length) <= ends[:, None]
        cells, last = real.flatten().nonzero().squeeze(1), real.sum(dim=1).cumsum(dim=0) - 1
        x = x.index_select(0, cells)
    parts = [len(first), len(x)]
    x = torch.cat([first, x])

    def lay(rows: Tensor) -> Tensor:
        if packed:
            rows = rows.new_zeros(classes * length, rows.shape[1]).index_put((cells,), rows)  # index_copy would keep rows
        return rows.view(classes, length, rows.shape[1])

    early, late = mask[: len(first), : len(first)], mask[:length, :length]  # the same among any tokens that follow each other
    for block in blocks[:-1]:
        attn = block.attn
        shared, own = torch.split(_project(attn, block.ln_1(x)), parts)
        q, k, v = _heads(attn, shared.clone()[None])  # a view would keep all rows
        seen, keys = _attend(q, k, v, early)[0], (k[:, 0], v[:, 0])
        q, k, v = _heads(attn, lay(own))
        own_seen = _attend(q, k, v, late, keys).flatten(0, 1)
        x = _finish(block, x, torch.cat([seen, own_seen.index_select(0, cells) if packed else own_seen]))
    # Of the last block only the ends matter: they look at all tokens once more.
    block, last = blocks[-1], len(first) + last
    attn, normed = block.attn, block.ln_1(x)
    shared, own = torch.split(_project(attn, normed, slice(width, None)), parts)
    k, v = _heads(attn, shared.clone()[None])
    keys = k[:, 0], v[:, 0]
    k, v = _heads(attn, lay(own))
    (q,) = _heads(attn, _project(attn, normed[last], slice(width))[:, None])
    return _finish(block, x[last], _attend(q, k, v, late[ends][:, None], keys)[:, 0])


def _packs(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _project(attn: nn.MultiheadAttention, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """Queries, keys and values side by side, or those that ``rows`` of the projection give."""
    return F.linear(x, attn.in_proj_weight[rows], None if attn.in_proj_bias is None else attn.in_proj_bias[rows])


def _heads(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, ...]:
    """Take what stands side by side in x (C, L, k W) apart, each part (H, C, L, d)."""
    parts = x.shape[2] // attn.embed_dim
    return x.view(*x.shape[:2], parts, attn.num_heads, attn.head_dim).permute(2, 3, 0, 1, 4).unbind()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, shared: KeysValues | None = None) -> Tensor:
    """Attention (C, I, W) of q (H, C, I, d) to the shared keys and to those of its own class (H, C, J, d).

    One softmax over both. The shared keys are multiplied once and not copied for every class. Such copies are most of what
    a kernel for the whole of it would have to keep. The two parts of the scores are small.
    """
    q = q.contiguous() * q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1)
    scores = scores + mask.to(scores.dtype)
    if shared is None:
        return (scores.softmax(dim=-1) @ v).permute(1, 2, 0, 3).flatten(2)
    keys, values = shared
    first = (q.flatten(1, 2) @ keys.transpose(-2, -1)).view(*q.shape[:3], keys.shape[1])
    weights = torch.cat([first, scores], dim=-1).softmax(dim=-1)
    first, own = torch.split(weights, [first.shape[-1], scores.shape[-1]], dim=-1)
    seen = own @ v + (first.flatten(1, 2) @ values).view(q.shape)
    return seen.permute(1, 2, 0, 3).flatten(2)


def _finish(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """What follows attention in a block."""
    x = x + block.ls_1(F.linear(attended, block.attn.out_proj.weight, block.attn.out_proj.bias))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x
