"""Argument checks of the package and their wording: name, what was wanted, what came, the likely fix."""

from __future__ import annotations

import torch
from torch import Tensor

# Types that can be computed with: those of eight bits and complex ones cannot be compared or summed.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBERS = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Dims:
    """The sizes of one call: each letter stands for one size, set by the caller or by the first tensor that shows it.

    ``Dims("Loss", C=20)`` then ``dims.check("text", text, "C D")`` raises, where it applies, ``Loss: text must have
    shape (C, D) = (20, D), got (19, 512)``. Sizes and devices only: nothing here waits for an accelerator.
    """

    def __init__(self, owner: str, **sizes: int) -> None:
        self.owner = owner
        self.sizes: dict[str, int] = dict(sizes)
        self.device: torch.device | None = None

    def check(self, name: str, tensor: object, letters: str, *, floating: bool = True, hint: str = "") -> None:
        """Check that ``tensor`` is a tensor of shape ``letters`` (such as ``"B C D"``) on the call's device."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.owner}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        wanted = letters.split()
        shape = tuple(tensor.shape)
        if len(shape) != len(wanted) or any(self.sizes.get(k, n) != n for k, n in zip(wanted, shape, strict=True)):
            sizes = ", ".join(str(self.sizes.get(k, k)) for k in wanted)
            known = f" = ({sizes})" if self.sizes.keys() & set(wanted) else ""
            message = f"{self.owner}: {name} must have shape ({', '.join(wanted)}){known}, got {shape}"
            raise ValueError(f"{message}; {hint}" if hint else message)
        if tensor.dtype not in (FLOATS if floating else NUMBERS):
            wanted_type = "a floating-point tensor" if floating else "a tensor of bools, integers or floats"
            raise TypeError(f"{self.owner}: {name} must be {wanted_type}, got {tensor.dtype}; call {name}.float()")
        if self.device is not None and tensor.device != self.device:
            raise ValueError(
                f"{self.owner}: {name} is on {tensor.device}, the other tensors are on {self.device}; "
                f"move it with {name}.to('{self.device}')"
            )
        self.device = tensor.device
        self.sizes.update(zip(wanted, shape, strict=True))

    def mask(self, name: str, mask: Tensor, letters: str, meaning: str = "") -> None:
        """Check a mask of shape ``letters``, and say in an error what True means."""
        self.check(name, mask, letters, floating=False)
        if mask.dtype != torch.bool:
            raise TypeError(f"{self.owner}: {name} must be bool{meaning}, got {mask.dtype}")

    def targets(self, targets: Tensor, letters: str, *, validate: bool, hint: str = "") -> Tensor:
        """Labels of shape ``letters`` in a type that has -1; with ``validate`` their values are checked too."""
        self.check("targets", targets, letters, floating=False, hint=hint)
        targets = signed(targets)
        return check_targets(self.owner, targets) if validate else targets

    def without_padding(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Tokens (B, N, D) with zeros under the padding: what lies there must not matter, not even NaN (0 * NaN is NaN)."""
        if padding is None:
            return tokens
        self.mask("key_padding_mask", padding, "B N", ", True at padding")
        return tokens.masked_fill(padding[..., None], 0.0)


def signed(labels: Tensor) -> Tensor:
    """uint8 labels as int8, by the same bits: what was written as -1 is 255 in uint8."""
    return labels.view(torch.int8) if labels.dtype == torch.uint8 else labels


_OVERFLOW = "; look for half-precision overflow before this point (validate=False skips this check)"


def check_finite(owner: str, name: str, tensor: Tensor, end: str = _OVERFLOW) -> None:
    """Raise where ``tensor`` holds NaN or infinity, with this end of the line.

    Waits for the device; skipped inside ``torch.compile``, and where there are no values.
    """
    if torch.compiler.is_compiling() or tensor.is_meta:
        return
    values = tensor.detach()
    # A sum is finite only where all of its terms are, and reads them once; one that overflows tells nothing.
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{owner}: {name} must be finite, got {bad} NaN or infinite of {tensor.numel()} values{end}")


def check_targets(owner: str, targets: Tensor, *, name: str = "targets", soft: bool = True) -> Tensor:
    """The labels, with what lies one rounding step outside [0, 1] moved to its end.

    Raises where a label is neither unknown (-1) nor in [0, 1], or, unless ``soft``, is between 0 and 1. Waits for the device;
    nothing is raised when compiling.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not _outside(targets, soft).any():  # the one wait where all is well
        return targets
    if targets.is_floating_point():
        inside = targets.clamp(0, 1)
        targets = torch.where((targets - inside).abs() <= torch.finfo(targets.dtype).eps, inside, targets)
    if not compiling and (bad := _outside(targets, soft)).any():
        value = targets[bad][0].item()
        wanted = "1 (present), 0 (absent), between (soft) or -1 (unknown)" if soft else "1 (present), 0 (absent) or -1 (unknown)"
        fix = "convert other encodings with trm_losses.labels"
        if value != value:
            fix = "trm_losses.labels.from_nan makes NaN unknown"
        elif 0 < value < 1:
            fix = "a soft label is neither present nor absent: threshold it first"
        raise ValueError(f"{owner}: {name} must be {wanted}, got {value}; {fix}")
    return targets


def _outside(targets: Tensor, soft: bool) -> Tensor:
    known = (targets >= 0) & (targets <= 1) if soft else (targets == 0) | (targets == 1)
    return ~(known | (targets == -1))


def check_estimates(owner: str, estimates: Tensor, *, validate: bool = True) -> Tensor:
    """Probabilities of unknown labels in float32, with -1 where there is none (given as NaN or -1).

    With ``validate`` their values are checked, which waits for the device; a rounding step outside of [0, 1] is taken to its end.
    """
    estimates = torch.where(estimates.isnan(), -1.0, estimates.detach().float())
    if not validate:
        return estimates
    check_finite(owner, "estimates", estimates)
    inside = estimates.clamp(0, 1)
    estimates = torch.where((estimates - inside).abs() <= torch.finfo(estimates.dtype).eps, inside, estimates)
    if bool((bad := _outside(estimates, soft=True)).any()):
        worst = float(estimates[bad][0])
        raise ValueError(f"{owner}: estimates must be probabilities, NaN or -1, got {worst:g}; take their sigmoid")
    return estimates


def check_scores(owner: str, scores: Tensor, targets: Tensor, *, probabilities: bool = False) -> Tensor:
    """The targets of what measures scores, once both are checked; with ``probabilities`` scores must lie from 0 to 1."""
    dims = Dims(owner)
    dims.check("scores", scores, "B C")
    if not scores.numel():
        raise ValueError(f"{owner}: scores must have shape (B, C) with B, C >= 1, got {tuple(scores.shape)}")
    targets = dims.targets(targets, "B C", validate=False)
    if bool(scores.isnan().any()):
        raise ValueError(f"{owner}: scores must not be NaN, got {int(scores.isnan().sum())} NaN of {scores.numel()}")
    if probabilities and bool((outside := (scores < 0) | (scores > 1)).any()):
        got = scores[outside][0].item()
        raise ValueError(f"{owner}: scores must be probabilities from 0 to 1, got {got:g}; give torch.sigmoid(scores) of logits")
    return check_targets(owner, targets, soft=False)


def check_ids(owner: str, ids: Tensor, num_samples: int | None = None, *, name: str = "ids") -> None:
    """Raise where ids are not int64, or not from 0 to ``num_samples`` - 1 where it is given (waits for the device then)."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{owner}: {name} must be int64, got {ids.dtype}")
    if num_samples is None or torch.compiler.is_compiling():
        return
    if bool(((ids < 0) | (ids >= num_samples)).any()):
        raise ValueError(f"{owner}: ids must be from 0 to num_samples - 1 = {num_samples - 1}, got {ids.min()} to {ids.max()}")


def check_number(
    owner: str,
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    strict: bool = False,
    whole: bool = False,
) -> None:
    """Raise where a setting lies outside [low, high], where with ``strict`` it is not above ``low``, or is not ``whole``."""
    too_low = low is not None and (value <= low if strict else value < low)
    if too_low or (high is not None and value > high) or value != value:
        left = "" if low is None else f"{'above' if strict else 'at least'} {low:g}"
        right = "" if high is None else f"at most {high:g}"
        raise ValueError(f"{owner}: {name} must be {' and '.join(filter(None, (left, right))) or 'a number'}, got {value!r}")
    if whole and value != int(value):
        raise ValueError(f"{owner}: {name} must be a whole number, got {value}")


def check_expected_positives(owner: str, value: float, num_classes: int) -> None:
    """Raise where a mean number of present classes is not above 0 and below the number of classes."""
    check_number(owner, "expected_positives", value, 0, strict=True)
    if value >= num_classes:
        raise ValueError(f"{owner}: expected_positives must be below num_classes = {num_classes}, got {value}")


def check_numbers(
    owner: str, low: float | None = None, high: float | None = None, /, *, strict: bool = False, **values: float
) -> None:
    """:func:`check_number` of several settings with the same ends, by their names."""
    for name, value in values.items():
        check_number(owner, name, value, low, high, strict=strict)


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise where an option word is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
