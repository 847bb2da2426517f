"""The one door through which open_clip, timm (and with them torchvision) and transformers come in."""

from __future__ import annotations

import importlib
from typing import Any

import torch


def import_open_clip() -> Any:
    """Return the module ``open_clip``, or raise an ``ImportError`` that says what to install."""
    return _import("open_clip")


def import_timm() -> Any:
    """Return the module ``timm``, or raise an ``ImportError`` that says what to install."""
    return _import("timm")


def import_transformers() -> Any:
    """Return the module ``transformers``, or raise an ``ImportError`` that says what to install."""
    return _import("transformers", "huggingface")


def said(error: BaseException) -> str:
    """The kind of an error, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _import(name: str, extra: str = "backbones") -> Any:
    """Import a module of an extra; open_clip and timm import torchvision at their top.

    A torchvision built for another torch (such as the usual CUDA wheel beside a CPU-only torch) fails with a ``RuntimeError``
    ("operator torchvision::nms does not exist") on the first try and with other errors on the next, so every failure is caught.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        also = (
            f". {name} also needs a torchvision that matches the installed torch {torch.__version__}: where the error above "
            "speaks of torchvision, install the torchvision build made for this torch, from the same package index as torch (a "
            "CUDA build of torchvision does not load beside a CPU-only torch)."
        )
        raise ImportError(
            f"trm_losses.backbones needs {name}, whose import failed ({said(error)}). "
            f'Install it with: pip install "trm-losses[{extra}]"{also if extra == "backbones" else ""}'
        ) from error
