"""The image as a whole beside the regions: a fitted head, alone or merged with any trained method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trm_losses import Calibration, GaussianDiscriminant, GlobalHead, TRMHead
from trm_losses.labels import UNKNOWN
from trm_pipeline import ranks
from trm_pipeline.config.presets import Preset
from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.methods.base import Method, Setting, score
from trm_pipeline.methods.trm import TRM
from trm_pipeline.methods.wrapped import Wrapped, unwrapped
from trm_pipeline.progress import say

GLOBAL = "+global"
"""What a method's name ends with if its logits are merged with those of the whole image."""

FITTED = ("linear-penultimate", "global")
"""Heads of the whole image alone: the layer on penultimate features, and with the prior."""


def parts_of(method: str) -> tuple[str, str]:
    """What stands before the first plus of a method's name, and what behind it; two of them end the name of a head."""
    start = method.find("++") + 2 if "++" in method else 0
    place = method.find("+", start)
    return (method, "") if place < 0 else (method[:place], method[place + 1 :])


def merged_name(local: str) -> str:
    """The method that a head alone becomes once it is merged with the image as a whole."""
    return "trm" if local == "trm-region" else f"{local}{GLOBAL}"


def of_grid(method: str) -> bool:
    """A head with another method's loss."""
    return bool(parts_of(method.removesuffix(GLOBAL))[1])


def fit_global_head(
    features: Features,
    targets: Tensor,
    prior: GaussianDiscriminant | None,
    batch_size: int,
    *,
    penultimate: bool,
    expected_positives: float | None,
    scores: Tensor | None = None,
    **options: Any,
) -> GlobalHead | None:
    """Fitted to training images with labels (N, C), of several views by the mean of their penultimate features.

    Args:
        features, targets: of the training images.
        prior: None: there is none.
        batch_size: images that are read at a time.
        penultimate: whether penultimate features are read, if they are there.
        expected_positives: present labels of an image, if these alone were noted, which sets the level whatever absences are
            known; None: labels are hidden at random. Of few classes at most nine in ten are taken to be present.
        scores: (N, C) of the prior, if they are at hand: a pass over all tokens less.
        options: of the constructor.

    Returns:
        None if there is neither a prior nor penultimate features, or if no absent label is known and nothing is expected: there
        is no level to learn.
    """
    known = targets[targets != UNKNOWN]
    if expected_positives is None and 0 < len(known) < targets.numel() and bool((known == 1).all()):
        say("no label is known to be absent: the image as a whole is left out")
        return None
    if expected_positives is not None:
        expected_positives = min(expected_positives, 0.9 * targets.shape[1])
    with torch.random.fork_rng(devices=()):
        first = next(iter(features.batches(1)))
        width = None if first.penultimate is None or not penultimate else first.penultimate.shape[1]
        if width is None and prior is None:
            return None
        head = GlobalHead(targets.shape[1], width, prior, distributed=True, device=first.tokens.device, **options)
        return _fit(head, features, targets, batch_size, expected_positives, scores)


def _fit(
    head: GlobalHead,
    features: Features,
    targets: Tensor,
    batch_size: int,
    expected_positives: float | None,
    scores: Tensor | None,
    estimates: Tensor | None = None,
) -> GlobalHead:
    """The head fitted to images with labels (N, C), and where there are any with estimates (N, C) of the unknown ones."""

    def stream() -> Iterator[tuple[Tensor | None, ...]]:
        views = range(features.views if head.width is not None else 1)
        for seen in zip(*(ranks.batches(features, batch_size, view=view) for view in views), strict=True):
            tokens, index = seen[0].tokens, seen[0].index
            if len(index):
                found = [batch.penultimate for batch in seen if batch.penultimate is not None]
                penultimate = torch.stack(found).mean(dim=0) if found else None
                told = None if estimates is None else estimates[index].to(tokens.device)
                shown = tokens if scores is None else scores[index].to(tokens.device)
                yield shown, penultimate, targets[index].to(tokens.device), None, told

    return head.fit(stream(), expected_positives=expected_positives)


def global_logits(head: GlobalHead, features: Features, batch_size: int, scores: Tensor | None = None) -> Tensor:
    """Logits (N, C) of images; ``scores`` (N, C) are the prior's, if they are at hand."""

    def logits(batch: Batch) -> Tensor:
        found: Tensor = head(batch.tokens if scores is None else scores[batch.index].to(batch.tokens), batch.penultimate)
        return found

    with torch.random.fork_rng(devices=()):  # a loader draws a seed, and a cell must not tell what came before it
        return score(logits, features, batch_size)


class Merged(Wrapped):
    r"""A method whose logits are merged with those of a head of the whole image.

    .. math:: \ell = (1 - r)\, \ell^{local} + r\, \ell^{global}

    It learns as it would without: the two see different things, and make their mistakes apart.

    Args:
        inner, head: the two. rate: r.
        expected_positives: present labels of an image, if these alone were noted. Absences that are known beside them are no fair
            draw: they teach the head, and do not calibrate.
        teaches: whether :meth:`finish` teaches the head of the whole image.
    """

    finished: Tensor

    def __init__(
        self, inner: Method, head: GlobalHead, rate: float, *, expected_positives: float | None = None, teaches: bool = True
    ) -> None:
        super().__init__(inner)
        self.head, self.rate = head, rate
        self.expected_positives, self.teaches = expected_positives, teaches
        self.calibration = Calibration(head.num_classes)
        self.register_buffer("finished", torch.zeros((), dtype=torch.bool))  # whether the calibration was fitted

    def logits(self, batch: Batch, text: Tensor) -> Tensor:
        whole: Tensor = self.head(batch.tokens, batch.penultimate)
        calibrated: Tensor = self.calibration((1 - self.rate) * self.inner.logits(batch, text) + self.rate * whole)
        return calibrated

    def finish(self, features: Features, targets: Tensor, text: Tensor, batch_size: int) -> None:
        """Make the scores probabilities by the known labels, and teach the head of the whole image what they say of the others.

        Each view errs in its own way, so the two together know more of an unknown label than the head does. Estimates that are
        not calibrated are too near to one half to teach anything.
        """
        expected = self.expected_positives
        fair = (targets == 1) | ((targets == 0) & (expected is None))
        sure = torch.where(fair, targets, float(UNKNOWN))  # a soft label does not calibrate
        present, absent = (bool((sure == label).any()) for label in (1, 0))
        if not present or not absent and (expected is None or expected >= self.head.num_classes):
            return

        def seen(batch: Batch) -> Tensor:
            """Logits of both views, and the scores of the prior: what takes all tokens is computed once."""
            scores = batch.tokens if self.head.prior is None else self.head.prior(batch.tokens)
            logits = [self.inner.logits(batch, text), self.head(scores, batch.penultimate)]
            return torch.cat(logits if self.head.prior is None else [*logits, scores], dim=1)

        with torch.random.fork_rng(devices=()):
            parts = score(seen, features, batch_size).split(self.head.num_classes, dim=1)  # on the CPU, as the labels
        local, whole, scores = (*parts, None)[:3]

        def calibrated(whole: Tensor) -> Tensor:
            logits = (1 - self.rate) * local + self.rate * whole
            found: Tensor = self.calibration.fit(logits, sure, expected_positives=expected)(logits.to(text.device))
            return found

        estimates = torch.sigmoid(calibrated(whole))
        if self.teaches and 0 < self.rate < 1 and bool((targets == UNKNOWN).any()):
            with torch.random.fork_rng(devices=()):
                _fit(self.head, features, targets, batch_size, expected, scores, estimates)
            calibrated(global_logits(self.head, features, batch_size, scores))
        self.finished.fill_(True)

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        return self.inner.loss(batch, text, targets, weak_negative)

    def heads(self, batch: Batch, text: Tensor) -> list[tuple[float, Tensor]]:
        return self.inner.heads(batch, text)

    def weak_negative_steps(self, preset: Preset, total: int) -> int:
        return self.inner.weak_negative_steps(preset, total)


def merged(method: Method, setting: Setting) -> Method:
    """The method with the whole image beside it; as it is where there is neither a prior nor a penultimate feature."""
    whole = None if setting.global_head is None else setting.global_head()
    if whole is None:
        return method
    teaches = setting.preset.pseudo_rule == "merged"
    return Merged(method, whole, setting.preset.merge_rate, expected_positives=setting.expected_positives, teaches=teaches)


def trm_head(method: Method, text: Tensor, class_names: list[str]) -> TRMHead | None:
    """What inference needs of a trained TRM, merged or not; None of another method."""
    whole: dict[str, Any] = {}
    if isinstance(method, Merged):
        calibration = method.calibration if method.finished else None
        whole = {"global_head": method.head, "rate": method.rate, "calibration": calibration}
    inner = unwrapped(method)
    return inner.head(text, class_names, **whole) if isinstance(inner, TRM) else None
