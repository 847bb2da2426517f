"""SARB: class features of one image, or of a class's prototypes, are blended into those whose label is unknown."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.features.frozen import Encode
from trm_pipeline.methods.base import Method, Setting
from trm_pipeline.methods.peers._features import OfClassFeatures, distances, known_mean


def k_means(points: Tensor, count: int) -> Tensor:
    """Centres (count, D) of points (n, D) by 20 of Lloyd's rounds from spread-out points; those of fewer come round again."""
    first = [0]
    nearest = torch.cdist(points, points[:1]).squeeze(1)
    for _ in range(1, min(count, len(points))):
        first.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.cdist(points, points[first[-1:]]).squeeze(1))
    centres = points[first].clone()
    for _ in range(20):
        own = torch.cdist(points, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add(0, own, points)
        counts = torch.bincount(own, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres[torch.arange(count, device=points.device) % len(centres)]


class SARB(OfClassFeatures):
    r"""Semantic-aware representation blending on the class features :math:`f_{bc}` of a head.

    .. math::
        L &= C \big[ \mathrm{PBCE}(\ell, y) + 0.05\, r\, L_\text{dist} + \mathrm{PBCE}(\tilde\ell^1, \tilde y^1)
            + \mathrm{PBCE}(\tilde\ell^2, \tilde y^2) \big] \\
        \tilde f^1_{bc} &= \alpha f_{bc} + (1 - \alpha) f_{b'c}, \quad \tilde y^1_{bc} = 1 - \alpha \quad
            \text{where } y_{bc} = -1,\ y_{b'c} = 1, \qquad b' = B - 1 - b \\
        \tilde f^2_{bc} &= \beta f_{bc} + (1 - \beta)\, \pi_{cj}, \quad \tilde y^2_{bc} = 1 - \beta \quad
            \text{at one unknown class of each image, drawn at random}

    and both as they are elsewhere. :math:`\alpha, \beta` are learned from 0.5, and put back to the nearer end of [0, 1] where a
    step leaves it; gradients reach them through features and targets. :math:`\pi_c` are ten k-means centres of the features of
    known positives of the class, found anew after a quarter, a half and three quarters of the training; j is drawn for a batch.
    The blends begin after a quarter.

    Reference: Pu et al., AAAI 2022. Ours: the head's class features stand in place of the semantic decoupling and the graph
    network; an image without an unknown label, or a class without a known positive, is left as it is. C brings the sum to the
    size of a head's own loss.
    """

    prototypes: Tensor
    found: Tensor
    rounds: Tensor

    def __init__(self, inner: Method, setting: Setting) -> None:
        super().__init__(inner, setting)
        options = setting.preset.losses["sarb"]
        classes, dim = setting.text.shape
        for name in ("alpha", "beta"):
            if not 0 <= options[name] <= 1:
                raise ValueError(f"sarb.{name} must be a share from 0 to 1, got {options[name]:g}")
        self.weight_distance, self.batch_size = options["weight_distance"], setting.preset.batch_size
        self.alpha = nn.Parameter(torch.tensor(float(options["alpha"])))
        self.beta = nn.Parameter(torch.tensor(float(options["beta"])))
        self.register_buffer("prototypes", torch.zeros(classes, int(options["prototypes"]), dim))
        self.register_buffer("found", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64))

    def images(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, D) and targets (B, C), blended with the image at the same place from the end."""
        blended = (targets == -1) & (targets.flip(0) == 1)
        mixed = self.alpha * features + (1 - self.alpha) * features.flip(0)
        return torch.where(blended[..., None], mixed, features), torch.where(blended, 1 - self.alpha, targets)

    def with_prototypes(self, features: Tensor, targets: Tensor, classes: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """The same with centre ``which`` of one class of each image (B,), where its label is unknown and the class has any."""
        chosen = torch.zeros_like(targets, dtype=torch.bool).scatter(1, classes[:, None], True)
        blended = chosen & (targets == -1) & self.found
        mixed = self.beta * features + (1 - self.beta) * self.prototypes[:, which].to(features.dtype)
        return torch.where(blended[..., None], mixed, features), torch.where(blended, 1 - self.beta, targets)

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        features = self.inner.class_features(batch, text)  # type: ignore[operator]
        classes = targets.shape[1]
        terms = {
            "pbce": classes * known_mean(self.inner.classify(features, text), targets),  # type: ignore[operator]
            "distance": classes * self.weight_distance * self.ramp * distances(features, targets),
        }
        if self.started:
            drawn = torch.rand(targets.shape, device=targets.device).masked_fill(targets != -1, -1.0).argmax(dim=1)
            which = int(torch.randint(self.prototypes.shape[1], ()))
            for name, (blend, labels) in (
                ("images", self.images(features, targets)),
                ("prototypes", self.with_prototypes(features, targets, drawn, which)),
            ):
                terms[name] = classes * known_mean(self.inner.classify(blend, text), labels)  # type: ignore[operator]
        return terms

    @torch.no_grad()
    def before_epoch(self, epoch: int, features: Features, targets: Tensor, average: Method, encode: Encode) -> None:
        super().before_epoch(epoch, features, targets, average, encode)
        due = min(3, int(4 * self.share + 1e-9))
        if int(self.rounds) < due:
            self.rounds.fill_(due)
            self._find(features, targets, encode)

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        for share in (self.alpha, self.beta):  # clamped in the blends alone, one that is outside would have no gradient back
            share.clamp_(0, 1)

    def _find(self, features: Features, targets: Tensor, encode: Encode) -> None:
        """The centres, as the head sees the training images now."""
        self.eval()  # the training loop sets the mode again
        text = encode(self.prompts())
        kept: list[list[Tensor]] = [[] for _ in range(targets.shape[1])]
        for batch in features.batches(self.batch_size):
            seen = self.inner.class_features(batch, text)  # type: ignore[operator]
            for c, present in enumerate((targets[batch.index] == 1).T):
                kept[c].append(seen[present.to(seen.device), c])
        for c, parts in enumerate(kept):
            points = torch.cat(parts)
            if len(points):
                self.prototypes[c] = k_means(points.float(), self.prototypes.shape[1])
                self.found[c] = True
