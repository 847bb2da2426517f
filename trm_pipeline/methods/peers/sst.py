"""SST: what classes tell of each other inside an image, and images of each other inside a class, become labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_losses.functional import asymmetric_loss
from trm_pipeline.features.cached import Batch
from trm_pipeline.methods.base import Method, Setting
from trm_pipeline.methods.peers._features import EPOCHS, OfClassFeatures, distances, known_mean


class SST(OfClassFeatures):
    r"""Structured semantic transfer on the class features :math:`f_{bc}` of a head.

    .. math::
        L &= C \big[ \mathrm{PBCE}(\ell, y) + \mathrm{PBCE}(\ell, y \cup [a \ge \theta])
            + \mathrm{PBCE}(\ell, y \cup [b \ge \theta]) + 10\, r\, L_\text{co} + 0.05\, r\, L_\text{dist} \big] \\
        a_{bc} &= \frac{\sum_d \Pi_{bcd}\, [y_{bd} = 1]}{\max(1, |M^+_b|)}, \quad \Pi_{bcd} = \sigma(o_{bcd}),\ \Pi_{bcc} = 1,
            \qquad b_{bc} = \frac1E \sum_e \cos(f_{bc}, m_{ce})

    PBCE is the mean cross-entropy over entries with a label; the second and the third begin after a quarter of the training.
    :math:`o_{bcd} = \mathrm{MLP}[W f_{bc}; W f_{bd}]`, c < d, learns from :math:`L_\text{co}`, the mean asymmetric loss
    (1, 2, 0.05) of whether both classes are labelled as present; a pair with an unknown label counts as no pair.
    :math:`m_c` are the last E = 100 features of known positives of the class; places not yet filled count as cosine 0.
    :math:`\theta` is 0.95 at first and falls by 0.025 each published epoch to 0.75; r grows from 0 to 1 in the first of the 20
    published epochs. :math:`L_\text{dist}`: :func:`~trm_pipeline.methods.peers._features.distances`.

    Reference: Chen et al., AAAI 2022. Ours: the head's class features stand in place of the semantic decoupling and the graph
    network, and the widths of the MLP. C brings the sum to the size of a head's own loss.
    """

    memory: Tensor
    place: Tensor

    def __init__(self, inner: Method, setting: Setting, *, width: int = 64) -> None:
        super().__init__(inner, setting)
        options = setting.preset.losses["sst"]
        self.threshold, self.fall, self.floor = options["threshold"], options["fall"], options["floor"]
        self.weight_pairs, self.weight_distance = options["weight_pairs"], options["weight_distance"]
        classes, dim = setting.text.shape
        self.narrow = nn.Linear(dim, width)
        self.pair = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
        self.register_buffer("memory", torch.zeros(classes, int(options["memory"]), dim))
        self.register_buffer("place", torch.zeros(classes, dtype=torch.int64))
        self._last: tuple[Tensor, Tensor] | None = None

    def theta(self) -> float:
        """The least score of a label."""
        return max(self.floor, self.threshold - self.fall * max(0, int(EPOCHS * self.share + 1e-9) - EPOCHS // 4))

    def pairs(self, features: Tensor) -> Tensor:
        """o (B, C, C), symmetric, with 0 on the diagonal."""
        narrow = self.narrow(features)
        classes = features.shape[1]
        first, second = torch.triu_indices(classes, classes, offset=1, device=features.device)
        found = self.pair(torch.cat([narrow[:, first], narrow[:, second]], dim=-1)).squeeze(-1)
        upper: Tensor = found.new_zeros(len(features), classes, classes).index_put(
            (torch.arange(len(features), device=features.device)[:, None], first[None], second[None]), found
        )
        return upper + upper.transpose(1, 2)

    def transferred(self, pairs: Tensor, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """a and b (B, C)."""
        present = (targets == 1).to(features.dtype)
        own = torch.eye(pairs.shape[1], dtype=torch.bool, device=pairs.device)
        related = torch.sigmoid(pairs).masked_fill(own, 1.0)
        inside = (related @ present[..., None]).squeeze(-1) / present.sum(dim=1, keepdim=True).clamp(min=1)
        memory = F.normalize(self.memory.to(features.dtype), dim=-1)
        across = torch.einsum("bcd,ced->bce", F.normalize(features, dim=-1), memory).mean(dim=-1)
        return inside, across

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        features = self.inner.class_features(batch, text)  # type: ignore[operator]
        logits = self.inner.classify(features, text)  # type: ignore[operator]
        pairs, classes = self.pairs(features), targets.shape[1]
        terms = {"pbce": classes * known_mean(logits, targets)}
        if self.started:
            with torch.no_grad():
                scores = self.transferred(pairs.detach().to(features.dtype), features, targets)
            for name, score in zip(("inside", "across"), scores, strict=True):
                found = (targets == -1) & (score >= self.theta())
                terms[name] = classes * known_mean(logits, targets.masked_fill(found, 1.0))
        present = (targets == 1).to(pairs.dtype)
        first, second = torch.triu_indices(classes, classes, offset=1, device=pairs.device)
        together = present[:, first] * present[:, second]
        related = asymmetric_loss(pairs[:, first, second], together, gamma_pos=1.0, gamma_neg=2.0, margin=0.05)
        terms["pairs"] = classes * self.weight_pairs * self.ramp * related
        terms["distance"] = classes * self.weight_distance * self.ramp * distances(features, targets)
        self._last = features.detach(), targets
        return terms

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        if self._last is None:
            return
        features, targets = self._last
        size = self.memory.shape[1]
        for c in range(targets.shape[1]):
            new = features[targets[:, c] == 1, c][-size:]
            places = (self.place[c] + torch.arange(len(new), device=new.device)) % size
            self.memory[c, places] = new.to(self.memory.dtype)
            self.place[c] = (self.place[c] + len(new)) % size
        self._last = None
