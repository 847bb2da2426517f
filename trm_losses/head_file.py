"""The file of a TRMHead: settings of its parts, names and state in one dict of tensors and plain values."""

from __future__ import annotations

import io
import os
import uuid
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .global_head import GlobalHead
from .matching import TextRegionMatchingLoss
from .regions import RegionPooler
from .training_free import GaussianDiscriminant

Head = TypeVar("Head", bound=nn.Module)

_FORMAT = "trm_losses.TRMHead/5"
_POOLER_SETTINGS = ("num_classes", "dim", "num_heads", "query_head", "assignment", "validate")
_MATCHING_SETTINGS = ("num_classes", "gamma_pos", "gamma_neg", "margin", "reduction", "validate")
_GLOBAL_SETTINGS = ("num_classes", "width", "spread", "shrinkage", "unknown_weight", "validate")
_CALIBRATION_SETTINGS = ("num_classes", "validate")
_PRIOR_SETTINGS = ("num_classes", "dim", "tokens_per_class", "scale", "shrinkage", "sharpness", "label_weight", "validate")


def write(
    path: str | os.PathLike[str],
    pooler: RegionPooler,
    matching: TextRegionMatchingLoss,
    global_head: GlobalHead | None,
    calibration: Calibration | None,
    *,
    told: dict[str, Any],
    state: dict[str, Tensor],
) -> None:
    """Write a head of these parts; a file that was there stays whole until the new one is."""
    prior = None if global_head is None else global_head.prior
    settings = {
        "format": _FORMAT,
        "pooler": {key: getattr(pooler, key) for key in _POOLER_SETTINGS},
        "mlp_width": pooler.mlp[1].out_features if pooler.query_head else 0,
        "dropout": pooler.dropout_rate,
        "query": pooler.query_kind,
        "matching": {key: getattr(matching, key) for key in _MATCHING_SETTINGS},
        "global_head": None if global_head is None else {key: getattr(global_head, key) for key in _GLOBAL_SETTINGS},
        "prior": None if prior is None else {key: getattr(prior, key) for key in _PRIOR_SETTINGS},
        "calibration": None if calibration is None else {key: getattr(calibration, key) for key in _CALIBRATION_SETTINGS},
        "told": told,
    }
    # A compiled part has keys of its own, which no other head would know.
    tensors = {key.replace("_orig_mod.", ""): value.cpu() for key, value in state.items()}
    content = io.BytesIO()  # not a file: on a full disk torch would hide the error behind one of its own
    torch.save({**_plain(settings), "state": tensors}, content)
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"  # of its own: others may write there too
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        error.filename = os.fspath(path)
        raise


def _plain(value: Any) -> Any:
    """Settings as Python has them: what numpy or torch made of one, :func:`read` would refuse."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value


def read(path: str | os.PathLike[str], kind: type[Head]) -> Head:
    """The head of this class that a file describes; no code in the file is run.

    Raises:
        ValueError: anything but a file of this layout, in one line. OSError: no file.
    """
    wanted = f"{kind.__name__}: {os.fspath(path)} must be a file written by save ({_FORMAT})"
    with open(path, "rb") as file:
        held = io.BytesIO(file.read())  # not the file: to torch one cut short is an invalid argument
    try:
        content = torch.load(held, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes may lead to
        raise ValueError(f"{wanted}, and cannot be read ({type(error).__name__}); save the head again") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{wanted}, got {found}; save the head again")
    try:
        with torch.device("cpu"):  # where the state is
            return _restored(content, kind)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{wanted}, got other contents ({type(error).__name__})") from error


def _restored(content: dict[str, Any], kind: type[Head]) -> Head:
    """The head that the contents of a file describe."""
    state, settings = content["state"], content["pooler"]
    pooler = RegionPooler(
        **settings,
        dropout=content["dropout"],
        query=content["query"],
        mlp_ratio=content["mlp_width"] / settings["dim"] if settings["query_head"] else 4.0,
        dtype=state["pooler.query_weight"].dtype,
    )
    matching = TextRegionMatchingLoss(**content["matching"], dtype=state["matching.bias"].dtype)
    whole = None
    if content["global_head"] is not None:
        prior = None if content["prior"] is None else GaussianDiscriminant(**content["prior"])
        whole = GlobalHead(**content["global_head"], prior=prior)
    calibration = None if content["calibration"] is None else Calibration(**content["calibration"])
    head = kind(pooler, matching, state["text"], global_head=whole, calibration=calibration, **content["told"])
    head.load_state_dict(state)
    return head
