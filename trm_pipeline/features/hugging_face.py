"""Towers of transformers: ``--model hf:FOLDER`` or ``--model hf:ID``."""

from __future__ import annotations

import os

import torch

from trm_losses.backbones import HFBackbone, load_hf


def open_hf(name: str, pretrained: str | None, image_size: int | tuple[int, int] | None, device: torch.device) -> HFBackbone:
    """A model with its tokenizer out of a folder that ``save_pretrained`` wrote, or by its id on the hub.

    Args:
        name: the folder or the id.
        pretrained: a folder to read in its place, where the model lies now; None: ``name`` itself.
        image_size: side or (height, width); None: the model's own.
        device: where the model goes.

    Raises:
        ValueError: neither a folder nor an id that can be fetched, another family, or weights that are not those of the model.
    """
    if not name:
        raise ValueError("--model hf:FOLDER must name a folder of a model or its id on the hub, got nothing behind hf:")
    if pretrained is not None and not os.path.isdir(pretrained):
        raise ValueError(
            f"--pretrained must be the folder where hf:{name} lies now, got {pretrained!r}; leave it out to read {name} itself"
        )
    return load_hf(pretrained or name, image_size=image_size, device=device)
