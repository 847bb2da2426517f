"""Prompt tuning through a frozen text tower: time and peak memory against every token of every class, paired in one run.

    python benchmarks/prompts.py --rounds 5 --only "text tower, shared"

The tower is open_clip's own, of RN101's size (12 layers, width 512, 8 heads, 77 tokens) with random weights; names have one
to four tokens. The peer is the plain way: contexts put into whole prompts, all 77 tokens of every class through the tower's
own modules. Texts and gradients are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from losses import Pair, arguments, report
from torch import Tensor

from trm_losses import PromptLearner
from trm_losses.backbones import OpenClipBackbone
from trm_losses.backbones._imports import import_open_clip

RN101_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}


class Setting(NamedTuple):
    """Contexts of one kind before so many names, and the chunk sizes to pass them through the tower with."""

    mode: Literal["shared", "csc"]
    classes: int
    chunks: tuple[int | None, ...] = (None,)
    num_context: int = 16


SETTINGS = (Setting("shared", 20), Setting("shared", 80, (None, 16)), Setting("csc", 20))


def small_model(text: dict[str, int]) -> OpenClipBackbone:
    """This text tower beside an image tower that hardly exists."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    return OpenClipBackbone(import_open_clip().CLIP(512, vision, text))


def whole_names(backbone: OpenClipBackbone, classes: int) -> Tensor:
    """Ids (C, L) of start, one to four words, full stop and end, then padding."""
    vocabulary = int(backbone.model.vocab_size)
    ids = torch.zeros(classes, backbone.context_length, dtype=torch.long)
    for c in range(classes):
        words = 1 + torch.randint(vocabulary - 3, (1 + c % 4,))
        ids[c, : len(words) + 3] = torch.tensor([vocabulary - 2, *words, 1, vocabulary - 1])
    return ids


def every_token(model: Any, prompts: PromptLearner, names: Tensor) -> Tensor:
    """All tokens through the model's own modules; names (C, L, W) are whole prompts without contexts."""
    context = prompts.context.expand(len(names), *prompts.context.shape[-2:])
    x = torch.cat([names[:, :1], context, names[:, 1:]], dim=1)[:, : names.shape[1]]
    x = model.ln_final(model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask))
    text: Tensor = x[torch.arange(len(x)), prompts.eot] @ model.text_projection
    return text


def pairs(backbone: OpenClipBackbone, setting: Setting) -> list[Pair]:
    """Text and gradient of the contexts, a pair for each way through the tower."""
    torch.manual_seed(0)
    embedded = backbone.embed_prompts(whole_names(backbone, setting.classes))
    prompts = PromptLearner(setting.mode, names=embedded, num_context=setting.num_context, context_length=backbone.context_length)
    weights = torch.randn(setting.classes, backbone.dim)

    def learned(text: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> tuple[Tensor, Tensor]:
            found = text()
            (gradient,) = torch.autograd.grad((found * weights).sum(), prompts.context)
            return found.detach(), gradient

        return run

    def ours(chunk: int | None) -> Callable[[], Tensor]:
        return lambda: backbone.encode_prompts(prompts(), chunk_size=chunk)

    kind = {"shared": "shared contexts", "csc": "a context for each class"}[setting.mode]
    peer = learned(lambda: every_token(backbone.model, prompts, embedded.embeddings))
    found = []
    for chunk in setting.chunks:
        name = f"text tower, {kind} {setting.classes} classes{'' if chunk is None else f', chunks of {chunk}'}"
        found.append(Pair(name, learned(ours(chunk)), peer, "all 77 tokens of every class", 1e-3))
    return found


def main(typed: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3, warmup=0)  # the comparison before has warmed up
    args = parser.parse_args(typed)
    torch.set_num_threads(args.threads)
    backbone = small_model(RN101_TEXT)
    report((pair for setting in SETTINGS for pair in pairs(backbone, setting)), args)


if __name__ == "__main__":
    main()
