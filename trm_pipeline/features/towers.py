"""Image towers by name: ``--model FAMILY:NAME``. A further family is a function, and a line in :data:`TOWERS`."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trm_losses.backbones import OpenClipBackbone, TimmBackbone, load_hf, load_open_clip
from trm_losses.backbones._imports import import_open_clip, import_timm, said
from trm_pipeline.embedded import load_embedded
from trm_pipeline.features.backbone import ImageTower
from trm_pipeline.progress import without_logs

Size = int | tuple[int, int] | None


def open_timm(name: str, pretrained: str | None, image_size: Size, device: torch.device) -> ImageTower:
    """A model of timm without its classifier, with the weights of a file or, without one, with timm's own.

    Raises:
        ValueError: timm has no such model, its own weights cannot be fetched, or the file is not one of weights of this model.
    """
    timm = import_timm()
    if ":" not in name and not timm.is_model(name):  # "hf-hub:..." names no architecture
        near = ", ".join(difflib.get_close_matches(name, timm.list_models())) or "timm.list_models() names all"
        raise ValueError(f"--model timm:NAME must be a model of timm, got {name!r}; near it: {near}")
    if pretrained is not None and not os.path.isfile(pretrained):
        raise ValueError(
            f"--pretrained must be a weights file of timm:{name}, got {pretrained!r}; without it timm's own are fetched"
        )
    try:
        with without_logs(logging.ERROR):  # every try of a download, several times over
            network = timm.create_model(name, pretrained=pretrained is None, num_classes=0)
    except Exception as error:
        raise _not_fetched(f"timm:{name}", error) from error
    if pretrained is not None:
        _load(timm, network, name, pretrained)
    tower = TimmBackbone(network, image_size=image_size)
    tower.name = name
    return tower.to(device)


def _not_fetched(what: str, error: Exception, also: str = "") -> ValueError:
    return ValueError(
        f"the weights of {what} are not here and could not be fetched ({said(error)}). They are downloaded once, which takes a "
        "network and a folder to keep them in (HF_HOME); or fetch the file elsewhere and give its path: --pretrained "
        f"WEIGHTS.safetensors{also}"
    )


def _load(timm: Any, network: Any, name: str, path: str) -> None:
    """The weights of a file but for those of a classifier, of which tokens know nothing."""
    try:
        weights: dict[str, Tensor] = timm.models.load_state_dict(path)
        classifier = network.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
        own = network.state_dict()
        weights = {key: value for key, value in weights.items() if key in own or not key.startswith(heads)}
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
    except Exception as error:  # whatever bytes may lead to
        raise ValueError(
            f"--pretrained: {path} must be a safetensors file or a torch checkpoint of timm:{name}, and cannot be read as "
            f"weights ({said(error)})"
        ) from error
    wanted = {key: tuple(value.shape) for key, value in own.items()}
    if bad := [key for key in {**wanted, **shapes} if shapes.get(key) != wanted.get(key)]:
        key = bad[0]
        raise ValueError(
            f"--pretrained: {path} must hold the weights of timm:{name}, and {len(bad)} of {len(wanted)} entries do not fit: "
            f"{key} must be {wanted.get(key, 'left out')}, got {shapes.get(key, 'none')}; name the model that they were made for"
        )
    network.load_state_dict(weights)


def open_hf(name: str, pretrained: str | None, image_size: Size, device: torch.device) -> ImageTower:
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


TOWERS: dict[str, Callable[[str, str | None, Size, torch.device], ImageTower]] = {"hf": open_hf, "timm": open_timm}
"""A function for each family: from the name behind ``FAMILY:``, ``--pretrained``, image size and device to a frozen tower.

What it gives may have a text side too, see :class:`~trm_pipeline.features.backbone.Backbone`; if not, or if its ``has_text`` is
False, the class texts are given.
"""


def open_tower(
    model: str, pretrained: str | None, image_size: Size, device: torch.device, *, value_path: bool = False
) -> ImageTower:
    """The embedded model, ``FAMILY:NAME`` of :data:`TOWERS`, or a model of open_clip with a tag or a file of weights.

    Raises:
        ValueError: weights that are missing, of another model or cannot be fetched, or ``value_path`` of a model without one.
    """
    family, colon, name = model.partition(":")
    if colon and family in TOWERS:
        if value_path:
            raise ValueError(f"value_path is for ViTs of open_clip, and --model {model} is none; leave it out")
        return TOWERS[family](name, pretrained, image_size, device)
    if model == "embedded":
        if pretrained is not None:
            raise ValueError(f"--pretrained {pretrained} is of another model than embedded; leave it out, or give its --model")
        network, tokenizer = load_embedded()
        made = OpenClipBackbone(network, tokenizer=tokenizer, name=model, image_size=image_size, value_path=value_path)
        return made.to(device)
    if pretrained is None and not colon:
        raise ValueError(f"--model {model} needs --pretrained: a tag of open_clip such as 'openai', or a weights file")
    try:
        with without_logs(logging.ERROR):  # every try of a download, several times over
            return load_open_clip(model, pretrained, image_size=image_size, value_path=value_path, device=device)
    except Exception as error:
        if str(error).startswith(("load_", "OpenClipBackbone", "trm_losses")) or weights_file(model, pretrained):
            raise
        also = f" (with OpenAI weights: --model {model}-quickgelu)" * (pretrained == "openai")
        raise _not_fetched(f"{model} {pretrained or ''}".strip(), error, also) from error


def weights_file(model: str, pretrained: str | None) -> str | None:
    """The path of weights, a file or a folder; none if it is a tag of open_clip, whatever lies under its name here."""
    if pretrained is None or import_open_clip().get_pretrained_cfg(model.replace("/", "-"), pretrained):
        return None
    there = os.path.isfile(pretrained) or (model.startswith("hf:") and os.path.isdir(pretrained))
    return os.path.abspath(pretrained) if there else None


def folder_of(model: str) -> str | None:
    """The folder in the name of a model, ``local-dir:FOLDER`` or ``hf:FOLDER``; none if it is another model, or an id."""
    family, _, place = model.partition(":")
    return place if family == "local-dir" or (family == "hf" and os.path.isdir(place)) else None


def found_anywhere(model: str) -> str:
    """The name of a model with the folder that it may hold made absolute, so that it is found from other folders, too."""
    place = folder_of(model)
    return model if place is None else f"{model.partition(':')[0]}:{os.path.abspath(place)}"
