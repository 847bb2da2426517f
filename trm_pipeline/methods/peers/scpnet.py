"""SCPNet: labels of an image's own weak view, and of the classes' graph, teach its strong view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_losses._precision import upcast
from trm_losses.baselines import SPLCLoss
from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.features.frozen import Encode
from trm_pipeline.methods.base import Method, Setting
from trm_pipeline.methods.wrapped import Wrapped


def class_graph(text: Tensor, *, kept: int, temperature: float) -> Tensor:
    r"""The prior graph R (C, C), rows summing to 1, from the cosines of the class texts (C, D).

    .. math:: R_{ck} = \mathrm{softmax}_{k \in \text{kept}_c}(A_{ck} / T), \qquad
        A_{cc} = 0.8,\ A_{ck} = 0.2\, \frac{\cos_{ck}}{\sum_{j \in \text{kept}_c,\, j \ne c} \cos_{cj}}

    The ``kept`` largest cosines of each row take part, its own among them. Where texts oppose each other a cosine counts as 0,
    which is ours: those of the published texts are all positive.
    """
    unit = F.normalize(text, dim=-1)
    cosines = (unit @ unit.T).clamp(min=0).fill_diagonal_(2.0)  # above every other
    neighbours = torch.zeros_like(cosines, dtype=torch.bool)
    neighbours.scatter_(1, cosines.topk(min(kept, len(text)), dim=1).indices, True)
    others = torch.where(neighbours, cosines, 0.0).fill_diagonal_(0.0)
    weights = 0.2 * others / others.sum(dim=1, keepdim=True).clamp(min=1e-12)
    weights.fill_diagonal_(0.8)
    return torch.where(neighbours, weights / temperature, -torch.inf).softmax(dim=1)


def strong_view(batch: Batch, drop: float) -> Batch:
    """The batch with a share of the tokens of each image left out at random, and as much of its pooled feature."""
    images, count, _ = batch.tokens.shape
    keep = max(1, round((1 - drop) * count))
    kept = torch.rand(images, count, device=batch.tokens.device).argsort(dim=1)[:, :keep]
    tokens = batch.tokens.gather(1, kept[..., None].expand(-1, -1, batch.tokens.shape[-1]))
    return batch._replace(tokens=tokens, pooled=F.dropout(batch.pooled, drop))


class SCPNet(Wrapped):
    r"""SPLC on an image as it comes, and what it says of itself and of neighbouring classes as targets of a strong view.

    .. math::
        L &= C\,\mathrm{mean}\,\mathrm{SPLC}(\ell, y) + \frac{\lambda_u}{B} \sum_b g_b \sum_c
            \big[ \mathrm{BCE}(\hat y_{bc}, p^s_{bc}) + \lambda\, \mathrm{BCE}(q_{bc}, p^s_{bc}) \big] \\
        \hat y &= 1 \text{ on } M^+ \text{ and where } c \in \text{top}_h(p^w_b),\ p^w_{bc} \ge \tau_c; \quad 0 \text{ else} \\
        q &= p^w R^\top, \qquad g_b = [\text{any class of top}_h \text{ passes}] \\
        \tau_c &= 0.95\, \frac{a_c}{2 - a_c}, \qquad
            a_c = \max\Big( \frac{n_c}{\max(\max_j n_j,\ hn - \sum_j n_j)}, \frac1C \Big), \quad n_c = \sum_i Y_{ic}

    :math:`p^w` is the teacher, without gradient, and Y are the last labels :math:`\hat y` of each image that passed. Published
    are sums over a batch; divided by B they have the size of a head's own loss.

    Reference: Ding et al., CVPR 2023. Ours: features are frozen, so the weak view is the image, mirrored or not, with the head
    as it trains, and the strong one lacks a share of its tokens; one weak view serves both terms; the head's texts stand in
    place of the published graph network over them; a known absent label is never in :math:`\hat y`; Y changes for images that
    passed alone.
    """

    labels: Tensor
    counts: Tensor
    graph: Tensor

    def __init__(self, inner: Method, setting: Setting) -> None:
        options = setting.preset.losses["scpnet"]
        super().__init__(inner)
        self.top, self.weight = int(options["top"]), options["weight"]
        self.balance, self.drop = options["balance"], options["drop"]
        self.epochs = setting.preset.epochs
        splc = setting.preset.losses["splc"]
        self.splc = SPLCLoss(threshold=splc["threshold"], margin=splc["margin"], gamma=splc["gamma"], start=1, reduction="sum")
        graph = class_graph(setting.text, kept=int(options["neighbours"]), temperature=options["temperature"])
        self.register_buffer("graph", graph)
        self.register_buffer("labels", torch.zeros(setting.num_samples, setting.num_classes, dtype=torch.bool))
        # n, kept beside Y: to count all images anew would take most of the time of a step.
        self.register_buffer("counts", torch.zeros(setting.num_classes, dtype=torch.int64))
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def accuracy(self) -> Tensor:
        """a (C,)."""
        samples, classes = self.labels.shape
        rest = (self.top * samples - self.counts.sum()).clamp(min=1)
        return (self.counts / torch.maximum(self.counts.max(), rest)).clamp(min=1 / classes)

    def consistency(self, weak: Tensor, strong: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The second term, divided by B; the labels of the images (B, C); and which images passed (B,)."""
        p, strong = torch.sigmoid(upcast(weak.detach())), upcast(strong)
        accuracy = self.accuracy()
        hard = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(min(self.top, p.shape[1]), dim=1).indices, True)
        hard = hard & (p >= 0.95 * accuracy / (2 - accuracy))
        passed = hard.any(dim=1)
        said = (hard & (targets != 0)) | (targets == 1)
        neighbours = p @ self.graph.to(p.dtype).T
        # BCE is linear in its target.
        entries = (1 + self.balance) * F.softplus(strong) - (said.to(p.dtype) + self.balance * neighbours) * strong
        total = (entries * passed[:, None]).sum()
        return self.weight * total / max(1, len(weak)), said, passed

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        heads = self.inner.heads(batch, text)
        supervised = sum(factor * self.splc(logits, targets) for factor, logits in heads) / max(1, len(targets))
        strong = self.inner.logits(strong_view(batch, self.drop), text)
        consistency, said, passed = self.consistency(heads[0][1], strong, targets)
        self._last = said, passed, batch.index.to(text.device)
        return {"splc": supervised, "consistency": consistency}

    def before_epoch(self, epoch: int, features: Features, targets: Tensor, average: Method, encode: Encode) -> None:
        super().before_epoch(epoch, features, targets, average, encode)
        self.splc.begin_epoch(epoch, self.epochs)

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        if self._last is not None:
            said, passed, ids = self._last
            before = self.labels[ids]
            after = self.labels[ids] = torch.where(passed[:, None], said, before)
            self.counts += after.sum(dim=0) - before.sum(dim=0)
            self._last = None
