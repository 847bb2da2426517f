"""Frozen backbones: tokens in the joint space of a vision-language model, and prompts through its text tower.

:class:`OpenClipBackbone` wraps models of open_clip, :class:`TimmBackbone` image models of timm, :class:`HFBackbone`
models of transformers.

Optional: importing this package needs nothing beyond the core of ``trm_losses``. Loading or wrapping a model
needs ``pip install "trm-losses[backbones]"`` (open_clip, timm, torchvision) or ``"trm-losses[huggingface]"``
(transformers), imported at that moment.
"""

from __future__ import annotations

from ._frozen import ImageFeatures
from .huggingface import HFBackbone, load_hf
from .openclip import OpenClipBackbone, load_open_clip
from .timm_models import TimmBackbone

__all__ = ["HFBackbone", "ImageFeatures", "OpenClipBackbone", "TimmBackbone", "load_hf", "load_open_clip"]
