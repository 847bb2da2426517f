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
    try:
        return importlib.import_module("transformers")
    except Exception as error:  # whatever it brings along may fail too
        raise ImportError(
            f"trm_losses.backbones needs transformers for Hugging Face models, whose import failed ({said(error)}). "
            'Install it with: pip install "trm-losses[huggingface]"'
        ) from error


def said(error: BaseException) -> str:
    """The kind of an error, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _import(name: str) -> Any:
    """Import a module that needs torchvision.

    open_clip and timm import torchvision at their top. A torchvision built for another torch (such as the usual CUDA wheel
    beside a CPU-only torch) fails with a ``RuntimeError`` ("operator torchvision::nms does not exist") on the first try and
    with other errors on the next, so every failure is caught here.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(
            f"trm_losses.backbones needs {name}, whose import failed ({type(error).__name__}: {error}). "
            f'Install it with: pip install "trm-losses[backbones]". {name} also needs a torchvision that '
            f"matches the installed torch {torch.__version__}: where the error above speaks of torchvision, "
            "install the torchvision build made for this torch, from the same package index as torch (a CUDA "
            "build of torchvision does not load beside a CPU-only torch)."
        ) from error
