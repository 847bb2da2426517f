"""What the drawn data must show before methods are compared on it: the gate.

Four numbers on val, in mAP: zero-shot with the global feature; a linear probe on pooled features and a head on tokens,
both trained with all labels of train; and the same head trained with a tenth of the labels. Labels must have something
to teach (probe over zero-shot), regions must matter (tokens over probe), and missing labels must hurt (all over 10 %).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from trm_losses.metrics import mean_average_precision
from trm_pipeline.data.base import LabelledImages
from trm_pipeline.data.voc import VOC
from trm_pipeline.drawn.captions import TEMPLATES
from trm_pipeline.embedded import CLASS_NAMES
from trm_pipeline.features.cached import Batch
from trm_pipeline.methods import zero_shot_global, zero_shot_tokens


def read_split(devkit: Path, split: str) -> tuple[NDArray[np.uint8], Tensor]:
    """Images (N, H, W, 3) in uint8 and labels (N, 20) of a split of the drawn VOC."""
    return read_images(VOC(devkit, 2007, split))


def read_images(data: LabelledImages) -> tuple[NDArray[np.uint8], Tensor]:
    """Images (N, H, W, 3) in uint8 and labels (N, C)."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in data.image_paths]), data.targets


@torch.inference_mode()
def encode_images(model: Any, images: NDArray[np.uint8], *, batch: int = 50) -> Batch:
    """Images (N, 224, 224, 3) in uint8: tokens (N, 49, D), averaged 2x2, their mean, and what is before the projection (N, C)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.visual.image_mean, model.visual.image_std))
    weight = model.visual.head.proj.weight
    mean, std = mean.to(weight.device), std.to(weight.device)
    tokens, penultimate = [], []
    for at in range(0, len(images), batch):
        pixels = torch.from_numpy(images[at : at + batch]).permute(0, 3, 1, 2).to(weight.device).float() / 255.0
        pixels = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
        features = model.visual.trunk.forward_features(pixels)
        penultimate.append(features.mean(dim=(2, 3)).cpu())
        tokens.append((F.avg_pool2d(features, 2).flatten(2).transpose(1, 2) @ weight.T).cpu())
    joined = torch.cat(tokens)
    return Batch(joined, joined.mean(dim=1), torch.arange(len(images)), torch.cat(penultimate))


def encode_captions(model: Any, ids: Tensor) -> Tensor:
    """Features (T, D) of captions cropped to the longest of them; open_clip's own forward wants the whole context."""
    length = ids.shape[1]
    x = model.token_embedding(ids) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(ids)), ids.argmax(dim=1)]
    return torch.as_tensor(x @ model.text_projection)


@torch.no_grad()
def template_features(model: Any, tokenizer: Callable[[list[str]], Tensor], names: Sequence[str] = CLASS_NAMES) -> Tensor:
    """Unit text features (C, D): per template, averaged, normalised."""
    texts = [template.format(name) for name in names for template in TEMPLATES]
    each = F.normalize(encode_captions(model, tokenizer(texts)), dim=-1)
    return F.normalize(each.view(len(names), len(TEMPLATES), -1).mean(dim=1), dim=-1).cpu()


def mean_ap(scores: Tensor, labels: Tensor) -> float:
    """Mean average precision of scores (N, 20) in per cent."""
    return 100.0 * float(mean_average_precision(scores, labels))


# ---------------------------------------------------------------------------------------------------- trained heads
def _fit_logistic(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Logistic regression of labels (N, C) on features (N, D), to the end: weights (C, D) and biases (C,)."""
    weight = torch.zeros(y.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight.T + bias, y) + l2 * weight.square().sum() / y.shape[1]
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def linear_probe(x: Tensor, y: Tensor, x_val: Tensor, *, folds: int = 4) -> tuple[Tensor, float]:
    """Scores (M, C) of a fully labelled probe on standardised features, and its L2, chosen by cross-validation in train."""
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x, x_val = (x - mean) / std, (x_val - mean) / std
    fold = torch.arange(len(x)) % folds
    best, best_ap = 0.0, -1.0
    for l2 in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        held_out = torch.empty_like(y)
        for k in range(folds):
            weight, bias = _fit_logistic(x[fold != k], y[fold != k], l2)
            held_out[fold == k] = x[fold == k] @ weight.T + bias
        if (ap := mean_ap(held_out, y)) > best_ap:
            best, best_ap = l2, ap
    weight, bias = _fit_logistic(x, y, best)
    return x_val @ weight.T + bias, best


class TextPixelHead(nn.Module):
    r"""A head on tokens: every class looks, with its own text vector, for the tokens that look like it.

    .. math:: z_c = s \sum_n \operatorname{softmax}_n(\kappa\, v_n \cdot t_c)\; v_n \cdot t_c - \beta_c

    with unit tokens :math:`v_n`, text vectors :math:`t_c` that start as the template text and are tuned, and learned
    :math:`\kappa`, :math:`s` and :math:`\beta_c`.

    Args:
        text: Unit text features (C, D) to start from.
    """

    def __init__(self, text: Tensor) -> None:
        super().__init__()
        self.text = nn.Parameter(text.clone())
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.bias = nn.Parameter(torch.zeros(len(text)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, C) of unit tokens (B, N, D)."""
        match = tokens @ self.text.T
        region = ((self.sharpness * match).softmax(dim=1) * match).sum(dim=1)
        return self.scale * region - self.bias


def token_head(
    tokens: Tensor, labels: Tensor, known: Tensor, text: Tensor, val_tokens: Tensor, *, epochs: int = 16, batch: int = 64
) -> Tensor:
    """Scores (M, C) of a text-pixel head trained on the labels (N, C) that ``known`` marks; tokens have unit length."""
    torch.manual_seed(0)
    head = TextPixelHead(text)
    with torch.no_grad():  # start calibrated: what an average image scores is as likely as the class is frequent
        rate = ((labels * known).sum(dim=0) + 1.0) / (known.sum(dim=0) + 2.0)
        head.bias.copy_(head(tokens).mean(dim=0) - torch.logit(rate))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-4)
    rounds = max(1, len(tokens) // batch)  # of an epoch
    steps = epochs * rounds
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for step in range(steps):
        if step % rounds == 0:
            order = torch.randperm(len(tokens))
        rows = order[step % rounds * batch :][:batch]
        terms = F.binary_cross_entropy_with_logits(head(tokens[rows]), labels[rows], reduction="none")
        loss = (terms * known[rows]).sum() / known[rows].sum().clamp_min(1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return torch.as_tensor(head(val_tokens))


# ------------------------------------------------------------------------------------------------------------ gate
@dataclass(frozen=True)
class Gate:
    """The figures of the gate: mAP on val in per cent."""

    zero_shot: float
    zero_shot_tokens: float
    probes: Mapping[str, float]
    tokens_all: float
    tokens_tenth: float

    @property
    def probe(self) -> float:
        """The best of the linear probes."""
        return max(self.probes.values())

    def of_zero_shot(self) -> list[tuple[str, bool]]:
        """What zero-shot scores must leave to teach."""
        return [
            (f"zero-shot {self.zero_shot:.1f} lies in 45 to 65", 45.0 <= self.zero_shot <= 65.0),
            (f"probe is {self.probe - self.zero_shot:.1f} over zero-shot, at least 20", self.probe - self.zero_shot >= 20.0),
        ]

    def checks(self) -> list[tuple[str, bool]]:
        """What must hold, in words, and whether it does."""
        return [
            *self.of_zero_shot(),
            (f"tokens are {self.tokens_all - self.probe:.1f} over the probe, at least 5", self.tokens_all - self.probe >= 5.0),
            (
                f"10 % labels are {self.tokens_all - self.tokens_tenth:.1f} under all labels, at least 6",
                self.tokens_all - self.tokens_tenth >= 6.0,
            ),
        ]

    @property
    def holds(self) -> bool:
        """Whether all of it holds."""
        return all(passed for _, passed in self.checks())

    def __str__(self) -> str:
        rows = [("zero-shot, global feature", self.zero_shot), ("zero-shot, softmax over tokens", self.zero_shot_tokens)]
        rows += [(f"linear probe, all labels, {name}", value) for name, value in self.probes.items()]
        rows += [("text-pixel head, all labels", self.tokens_all), ("text-pixel head, 10 % of labels", self.tokens_tenth)]
        lines = [f"{name:<52}{value:6.1f}" for name, value in rows]
        return "\n".join(lines + [f"[{'pass' if passed else 'FAIL'}] {text}" for text, passed in self.checks()])


@dataclass(frozen=True)
class PhraseGate(Gate):
    """The gate of the drawn scenes of many classes, of which zero-shot scores say less."""

    chance: float

    def of_zero_shot(self) -> list[tuple[str, bool]]:
        """What tuning must add to zero-shot scores."""
        return [
            (f"zero-shot {self.zero_shot:.1f} is at least twice chance, {self.chance:.1f}", self.zero_shot >= 2 * self.chance),
            (
                f"tuned tokens are {self.tokens_all - self.zero_shot:.1f} over zero-shot, at least 10",
                self.tokens_all - self.zero_shot >= 10.0,
            ),
            (
                f"tuned tokens are {self.tokens_all - self.zero_shot_tokens:.1f} over those of zero-shot, at least 2",
                self.tokens_all - self.zero_shot_tokens >= 2.0,
            ),
        ]


def run_gate(model: Any, tokenizer: Callable[[list[str]], Tensor], devkit: Path) -> Gate:
    """Train the gate's heads on train and score them on val."""
    train, val = (VOC(devkit, 2007, split) for split in ("train", "val"))
    return Gate(**_figures(model, train, val, template_features(model, tokenizer)))


def run_phrase_gate(
    model: Any, tokenizer: Callable[[list[str]], Tensor], train: LabelledImages, val: LabelledImages
) -> PhraseGate:
    """Train the gate's heads on the images of ``train`` and score them on ``val``."""
    figures = _figures(model, train, val, template_features(model, tokenizer, train.prompt_names()))
    return PhraseGate(**figures, chance=100.0 * float((val.targets == 1).float().mean()))


def _figures(model: Any, train: LabelledImages, val: LabelledImages, text: Tensor) -> dict[str, Any]:
    """The fields of :class:`Gate`."""
    (x, y), (x_val, y_val) = (
        (encode_images(model, images), labels) for images, labels in (read_images(data) for data in (train, val))
    )
    assert x.penultimate is not None and x_val.penultimate is not None
    probes = {}
    for name, seen, other in (
        ("joint", x.pooled, x_val.pooled),
        ("joint, unit", F.normalize(x.pooled, dim=-1), F.normalize(x_val.pooled, dim=-1)),
        ("penultimate", x.penultimate, x_val.penultimate),
    ):
        scores, l2 = linear_probe(seen, y, other)
        probes[f"{name} (L2 {l2:g})"] = mean_ap(scores, y_val)

    unit, unit_val = F.normalize(x.tokens, dim=-1), F.normalize(x_val.tokens, dim=-1)
    tenth = torch.from_numpy(np.random.default_rng(0).random(y.shape) < 0.1).float()
    return {
        "zero_shot": mean_ap(zero_shot_global(x_val, text), y_val),
        "zero_shot_tokens": mean_ap(zero_shot_tokens(x_val, text), y_val),
        "probes": probes,
        "tokens_all": mean_ap(token_head(unit, y, torch.ones_like(y), text, unit_val), y_val),
        "tokens_tenth": mean_ap(token_head(unit, y, tenth, text, unit_val), y_val),
    }
