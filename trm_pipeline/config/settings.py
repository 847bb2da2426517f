"""Settings from the command line: ``--set epochs=20 pooler.dropout=0.3 text-pixel.lr=1e-2 ll-r.delta=0.004``.

A name alone is a field of the preset. PART.NAME is an argument of a part of the library, read by the type that its constructor
gives it; METHOD.NAME a number of a peer; LOSS.NAME a number of one of its losses, under every head.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trm_losses import (
    GaussianDiscriminant,
    GlobalHead,
    MultimodalContrastiveLoss,
    PrototypeBank,
    PseudoLabeler,
    RegionDistillationLoss,
    RegionPooler,
    TextRegionMatchingLoss,
    TRMObjective,
)
from trm_losses.pseudo import PrototypeRule
from trm_pipeline.config.presets import Preset

PARTS: dict[str, Callable[..., Any]] = {
    "pooler": RegionPooler,
    "matching": TextRegionMatchingLoss,
    "distillation": RegionDistillationLoss,
    "contrast": MultimodalContrastiveLoss,
    "bank": PrototypeBank,
    "labeler": PseudoLabeler,
    "objective": TRMObjective,
    "prototype": PrototypeRule,
    "training_free": GaussianDiscriminant,
    "global_head": GlobalHead,
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
    "expected_positives",
    "warmup_steps",
    "ramp_steps",
    "bias",
    "width",
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
    """The preset with other settings, each read as its own type.

    Raises:
        ValueError: a name that is none, or a value of another type, with the names that there are.
    """
    groups = (*PARTS, *PEERS, "losses")
    changes: dict[str, Any] = {name: copy.deepcopy(getattr(preset, name)) for name in groups}
    fields = {field.name: str(field.type) for field in dataclasses.fields(Preset) if field.name not in changes}
    options = _options(preset)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        group, dot, option = name.partition(".")
        if not equals or name not in fields and option not in options.get(group, {}):
            raise ValueError(f"--set: {_wanted(name, fields, options)}; got {assignment!r}")
        if not dot:
            changes[name] = _read(name, value, fields[name])
            continue
        found = _read(name, value, options[group][option])
        if group not in preset.losses:
            changes[group.replace("-", "_")][option] = found
            continue
        if option == "rate" and not 0 < found < math.inf:
            raise ValueError(f"--set: {name} must be above 0, a factor of the head's learning rate; got {value}")
        changes["losses"][group][option] = found
    return dataclasses.replace(preset, **changes)


def _options(preset: Preset) -> dict[str, dict[str, str]]:
    """The groups of settings, and in each the names with their types."""
    return {
        **{part.replace("_", "-"): part_options(part) for part in PARTS},
        **{peer.replace("_", "-"): dict.fromkeys(getattr(preset, peer), "float") for peer in PEERS},
        **{loss: {name: type(value).__name__ for name, value in numbers.items()} for loss, numbers in preset.losses.items()},
    }


def _wanted(name: str, fields: Iterable[str], options: Mapping[str, Iterable[str]]) -> str:
    """What could have been meant by a name that is no setting."""
    group, dot, _ = name.partition(".")
    if dot and group in options:
        return f"wanted {group}.NAME=VALUE with one of {', '.join(options[group])}"
    likely = [f"{other}.{name}" for other, names in options.items() if name in names]
    hint = f"likely {' or '.join(likely)} is meant; " if likely else ""
    return f"{hint}wanted NAME=VALUE with one of {', '.join(fields)}, or GROUP.NAME=VALUE with a group of {', '.join(options)}"


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
