"""Settings from the command line: ``--set epochs=20 pooler.dropout=0.3 text-pixel.lr=1e-2 ll-r.delta=0.004``.

A name alone is a field of the preset. PART.NAME is an argument of a part of the library, read by the type that its constructor
gives it; METHOD.NAME a number of a peer; LOSS.NAME a number of one of its losses, under every head.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from trm_losses import (
    MultimodalContrastiveLoss,
    PrototypeBank,
    PseudoLabeler,
    RegionDistillationLoss,
    RegionPooler,
    TextRegionMatchingLoss,
    TRMObjective,
)
from trm_losses.pseudo import NeighbourRule, PrototypeRule, Quantiles, Thresholds
from trm_pipeline.config.presets import Preset

__all__ = ["PARTS", "override", "part_options"]

PARTS: dict[str, Callable[..., Any]] = {
    "pooler": RegionPooler,
    "matching": TextRegionMatchingLoss,
    "distillation": RegionDistillationLoss,
    "contrast": MultimodalContrastiveLoss,
    "bank": PrototypeBank,
    "labeler": PseudoLabeler,
    "objective": TRMObjective,
    "neighbour": NeighbourRule,
    "prototype": PrototypeRule,
    "thresholds": Thresholds,
    "quantiles": Quantiles,
}
"""Fields of the preset that hold what a part of the library takes."""

PEERS = ("linear", "text_image", "text_pixel", "dual_coop")

# Sizes, and what a method decides by itself.
_APART = {
    "num_classes",
    "num_samples",
    "dim",
    "validate",
    "reduction",
    "query_head",
    "expected_positives",
    "warmup_steps",
    "ramp_steps",
    "bias",
}


def part_options(part: str) -> dict[str, str]:
    """What can be set of a part of the library, with the types."""
    parameters = inspect.signature(PARTS[part]).parameters.values()
    plain = ("int", "float", "bool", "str", "Literal")
    return {
        parameter.name: str(parameter.annotation)
        for parameter in parameters
        if parameter.name not in _APART and str(parameter.annotation).startswith(plain)
    }


def override(preset: Preset, assignments: Sequence[str]) -> Preset:
    """The preset with other settings, each read as its own type."""
    groups = (*PARTS, *PEERS, "losses", "tuned", "tuned_single")
    changes: dict[str, Any] = {name: copy.deepcopy(getattr(preset, name)) for name in groups}
    fields = {field.name: str(field.type) for field in dataclasses.fields(Preset) if field.name not in changes}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        group, dot, option = name.partition(".")
        peer = group.replace("-", "_")
        if not equals or not (dot or name in fields):
            raise ValueError(f"--set: wanted NAME=VALUE with one of {', '.join(_names(preset, fields))}; got {assignment!r}")
        if not dot:
            changes[name] = _read(name, value, fields[name])
        elif group in PARTS and option in (kinds := part_options(group)):
            changes[group][option] = _read(name, value, kinds[option])
        elif peer in PEERS and option in changes[peer]:
            changes[peer][option] = _read(name, value, "float")
        elif group in preset.losses and option in (*preset.losses[group], "lr_factor"):
            kind = type(preset.losses[group].get(option, 1.0)).__name__
            changes["losses"][group][option] = number = _read(name, value, kind)
            if option in ("lr_factor", "rate") and not 0 < number < math.inf:
                raise ValueError(f"--set: {name} must be above 0, a factor of the head's learning rate; got {value}")
            for method, options in (*changes["tuned"].items(), *changes["tuned_single"].items()):
                if method.partition("+")[2] == group:
                    options.pop(option, None)
        else:
            raise ValueError(f"--set: wanted GROUP.NAME=VALUE with one of {', '.join(_dotted(preset))}; got {assignment!r}")
    return dataclasses.replace(preset, **changes)


def _dotted(preset: Preset) -> list[str]:
    """All names of two parts."""
    return [
        *(f"{part}.{name}" for part in PARTS for name in part_options(part)),
        *(f"{peer.replace('_', '-')}.{name}" for peer in PEERS for name in getattr(preset, peer)),
        *(f"{loss}.{name}" for loss, options in preset.losses.items() for name in dict.fromkeys((*options, "lr_factor"))),
    ]


def _names(preset: Preset, fields: dict[str, str]) -> list[str]:
    return [*fields, *_dotted(preset)]


def _read(name: str, value: str, kind: str) -> Any:
    """A value of the type that an annotation names."""
    try:
        if "None" in kind and value.lower() == "none":
            return None
        if kind.startswith("bool"):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind.startswith("int"):
            return int(value)
        if kind.startswith("float"):
            return float(value)
        return tuple(value.split("|")) if kind.startswith("tuple") else value
    except (KeyError, ValueError):
        raise ValueError(f"--set: {name} must be of type {kind}, got {value!r}") from None
