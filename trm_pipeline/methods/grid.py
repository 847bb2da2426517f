"""Losses of the field under heads of the pipeline: each pair is a method of its own, named ``head+loss``."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trm_losses.baselines import ROLELoss
from trm_pipeline.config.losses import LOSSES, MADE_BY
from trm_pipeline.config.presets import VARIANTS, Preset
from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.features.frozen import Encode
from trm_pipeline.methods import LABEL_FREE, METHODS, Method, Setting, weak_negatives
from trm_pipeline.methods.global_head import FITTED, GLOBAL, Merged, merged, parts_of
from trm_pipeline.methods.peers.sarb import SARB
from trm_pipeline.methods.peers.scpnet import SCPNet
from trm_pipeline.methods.peers.sst import SST
from trm_pipeline.methods.wrapped import Wrapped, class_prior, expected_positives

Numbers = dict[str, float]

HEADS = ("linear", "text-image", "text-pixel", "trm-region", "trm-query")
"""Methods of which each loss of labels can be had."""


class WithLoss(Wrapped):
    r"""A head whose loss of known labels gives way to one of :mod:`trm_losses.baselines`.

    .. math:: L = \sum_h f_h\, C\, L_\text{mean}(\ell^h, y)

    :math:`L_\text{mean}` runs over all B * C entries, as published, and C times that, the sum over the classes of an image, has
    the size of the head's own loss where all labels are known; h are the logits that the head trains, with their factors f.
    Losses that were published as sums are divided by the images of the batch, which is the same. What the loss keeps of the
    training images is of the first logits. TRM-ML's contrast and distillation stay out: their weights suit its own loss, and
    beside one that is small where few labels are known they would rule.

    Args:
        weak: whether :func:`~trm_pipeline.methods.base.weak_negatives` of single positives join, for a loss that says nothing of
            unknown labels; with another they would say it twice.
        rate: of what the loss itself learns, in the highest of those.
    """

    def __init__(self, inner: Method, name: str, loss: Any, epochs: int, *, weak: bool, rate: float = 1.0) -> None:
        super().__init__(inner)
        self.name, self.labels, self.epochs, self.weak, self.rate = name, loss, epochs, weak, rate
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        heads = self.inner.heads(batch, text)
        ids = batch.index.to(text.device)
        classes = targets.shape[1]
        total = sum(factor * classes * self.labels(logits, targets, ids=ids) for factor, logits in heads)
        self._last = heads[0][1].detach(), targets, ids
        # Of a mean over all entries a known one has its share of B * C, not of the B that are known.
        weight = weak_negative / classes if self.weak else 0.0
        return {self.name: total, **weak_negatives(targets, weight, *heads)}

    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        groups = super().groups(preset)
        if isinstance(self.labels, ROLELoss):  # the last group, at the head's rate
            groups[-1]["lr"] *= self.rate
        return groups

    def before_epoch(self, epoch: int, features: Features, targets: Tensor, average: Method, encode: Encode) -> None:
        super().before_epoch(epoch, features, targets, average, encode)
        self.labels.begin_epoch(epoch, self.epochs)

    def after_step(self) -> None:
        super().after_step()
        if self._last is not None:
            logits, targets, ids = self._last
            self.labels.update(logits, targets, ids=ids)
            self._last = None


def _splc(setting: Setting, targets: Tensor, numbers: Numbers) -> dict[str, Any]:
    """It starts with the first epoch, counted from 0, that begins at the published share of the training or after it."""
    return {"start": math.ceil(numbers["start"] * setting.preset.epochs - 1e-9), "reduction": "mean"}


def _partial_asl(setting: Setting, policy: str) -> dict[str, Any]:
    return {"num_classes": setting.num_classes, "policy": policy, "reduction": "mean"}


def _similarities(setting: Setting, temperature: float) -> tuple[Tensor, float]:
    """The frozen model's, and the temperature that is published for CLIP, as sharp for a model of another logit scale."""
    assert setting.similarities is not None
    return setting.similarities(), 100 * temperature / setting.logit_scale


def _vlpl(setting: Setting, targets: Tensor, numbers: Numbers) -> dict[str, Any]:
    similarities, temperature = _similarities(setting, numbers["temperature"])
    return {"similarities": similarities, "temperature": temperature}


def _gpr(setting: Setting, targets: Tensor, numbers: Numbers) -> dict[str, Any]:
    similarities, temperature = _similarities(setting, numbers.pop("temperature"))
    return {
        "scores": (similarities / temperature).softmax(dim=1),
        "expected_positives": expected_positives(setting, targets),
        "weights": (numbers.pop("weight_low"), numbers.pop("weight_high")),
        **_pairs(numbers),
    }


def _pairs(numbers: Numbers) -> dict[str, Any]:
    """Numbers NAME_start and NAME_end as one pair each."""
    starts = [name.removesuffix("_start") for name in numbers if name.endswith("_start")]
    return {name: (numbers.pop(f"{name}_start"), numbers.pop(f"{name}_end")) for name in starts}


def _kept(setting: Setting, targets: Tensor) -> dict[str, Any]:
    """Sizes of what is kept of the training images."""
    return {"num_samples": len(targets), "num_classes": setting.num_classes}


_FURTHER: dict[str, Callable[[Setting, Tensor, Numbers], dict[str, Any]]] = {
    "epr": lambda setting, targets, _: {"expected_positives": expected_positives(setting, targets)},
    "role": lambda setting, targets, _: {"targets": targets, "expected_positives": expected_positives(setting, targets)},
    "em-apl": lambda setting, targets, _: _kept(setting, targets),
    "ll-r": lambda *_: {"scheme": "reject"},
    "ll-ct": lambda *_: {"scheme": "correct"},
    "ll-cp": lambda setting, targets, _: {"scheme": "correct_permanently", **_kept(setting, targets)},
    "splc": _splc,
    "hill": lambda *_: {"reduction": "mean"},
    "pasl-ignore": lambda setting, *_: _partial_asl(setting, "ignore"),
    "pasl-negative": lambda setting, *_: _partial_asl(setting, "negative"),
    "pasl-selective": lambda setting, targets, _: {**_partial_asl(setting, "selective"), "prior": class_prior(setting, targets)},
    "vlpl": _vlpl,
    "gr": lambda setting, targets, numbers: _pairs(numbers),
    "gpr": _gpr,
}
"""What the constructor of a loss takes beside its numbers, or in place of some, which are taken out of them."""

_PUBLISHED = tuple(LOSSES)
KNOWN_ALONE = {"partial-bce", "pasl-ignore", "gce"}
"""Losses that say nothing of unknown labels: of single positives these count as absent beside them."""


PEERS: dict[str, tuple[Callable[[Method, Setting], Method], Sequence[str]]] = {
    "scpnet": (SCPNet, HEADS),
    "sst": (SST, ("text-pixel", "trm-region")),
    "sarb": (SARB, ("text-pixel", "trm-region")),
}

"""Methods that change more than the loss, and the heads that have what they change; one process trains them."""

GRID = [f"{head}+{loss}" for head in HEADS for loss in LOSSES if loss in MADE_BY or head in PEERS[loss][1]]
"""Every head with every loss but its own, which the head's name alone stands for."""

TRAINED = (*METHODS, *GRID)

NAMES = [*LABEL_FREE, *FITTED, *TRAINED, *VARIANTS, *(f"{name}{GLOBAL}" for name in TRAINED if name not in ("trm", "trm-region"))]
"""All that ``--methods`` knows; ``trm`` is the region head merged with the image as a whole."""


def add_loss(name: str, loss: Callable[..., Any], *, known_alone: bool = False, **numbers: float) -> None:
    """A loss of one's own under every head, as ``HEAD+name``; ``--set name.NUMBER=VALUE`` changes its numbers.

    It is there for this process alone. A script calls it before ``main``, outside of ``if __name__ == "__main__"``, so that the
    processes of ``--jobs`` have it too. A second call with the same name takes the place of the first.

    Args:
        name: letters, digits and dashes.
        loss: a class with the signature of :mod:`trm_losses.baselines`; it is called with the numbers and ``distributed=True``.
        known_alone: it says nothing of unknown labels, so that those of single positives count as absent beside it.
        numbers: its arguments.

    Raises:
        ValueError: a loss of the comparison has this name, or a name has other characters.
    """
    if name in _PUBLISHED or not re.fullmatch(r"[A-Za-z0-9-]+", name):
        raise ValueError(
            f"add_loss: name must be letters, digits and dashes, and none of {', '.join(_PUBLISHED)}; got {name!r}, "
            f"likely {re.sub('[^A-Za-z0-9-]+', '-', f'my-{name}')!r} will do"
        )
    if name not in LOSSES:
        pairs = [f"{head}+{name}" for head in HEADS]
        GRID.extend(pairs)
        NAMES.extend([*pairs, *(pair + GLOBAL for pair in pairs)])
    LOSSES[name], MADE_BY[name] = numbers, loss
    if known_alone:
        KNOWN_ALONE.add(name)


def build_method(name: str, setting: Setting) -> Method:
    """A method at its start."""
    if name.endswith(GLOBAL):
        local = name.removesuffix(GLOBAL)
        method = merged(build_method(local, setting), setting)
        if not isinstance(method, Merged):
            raise ValueError(f"{name} needs a prior or penultimate features, and there are none; take {local}")
        return method
    head, loss = parts_of(name)
    inner = METHODS[head](setting)
    if not loss:
        return inner
    if loss in PEERS:
        return PEERS[loss][0](inner, setting)
    assert setting.targets is not None
    numbers = dict(setting.preset.losses[loss])
    rates = {"rate": numbers.pop("rate")} if "rate" in numbers else {}
    further = _FURTHER[loss](setting, setting.targets, numbers) if loss in _FURTHER else {}
    made = MADE_BY[loss](**{**numbers, **further}, distributed=True)
    return WithLoss(inner, loss, made, setting.preset.epochs, weak=loss in KNOWN_ALONE, **rates)


def choose_methods(patterns: Sequence[str], *, grid: bool = False) -> list[str]:
    """The methods that names and patterns such as ``linear+*`` mean, each once; with ``grid`` also all heads and pairs."""
    chosen: list[str] = []
    for pattern in patterns:
        # "linear+*" means losses: what is merged with the whole image is asked for by name.
        names = [name for name in NAMES if name.endswith(GLOBAL) == pattern.endswith(GLOBAL)]
        found = [pattern] if pattern in NAMES else fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(
                f"--methods: {pattern!r} is none of {', '.join(name for name in NAMES if not parts_of(name)[1])}, nor HEAD+LOSS "
                f"with a head of {', '.join(HEADS)} and a loss of {', '.join(LOSSES)}"
            )
        chosen += found
    return list(dict.fromkeys([*chosen, *((*HEADS, "positive-coop", *GRID) if grid else ())]))
