"""The training loop: an ordinary PyTorch loop around any :class:`Method`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trm_losses import PromptEmbeddings
from trm_losses.metrics import evaluate, mean_average_precision

from .features import Batch, Features
from .methods import Method
from .presets import Preset
from .progress import progress, say

__all__ = ["Trained", "score", "train"]

Encode = Callable[[Tensor | PromptEmbeddings], Tensor]


class Trained(NamedTuple):
    """A run's averaged method at its last epoch, its scores on the test images, and how long training took."""

    method: Method
    metrics: dict[str, float]
    seconds: float


@torch.no_grad()
def score(logits: Callable[[Batch], Tensor], features: Features, batch_size: int) -> Tensor:
    """Logits (N, C) of all images in the data set's order."""
    parts = [(batch.index, logits(batch).float().cpu()) for batch in features.batches(batch_size)]
    order = torch.cat([index for index, _ in parts])
    return torch.cat([part for _, part in parts])[order.argsort()]


def train(
    method: Method,
    features: Features,
    targets: Tensor,
    test_features: Features,
    test_targets: Tensor,
    *,
    encode: Encode,
    preset: Preset,
    seed: int,
    device: torch.device,
    label: str,
) -> Trained:
    """Train on partial labels (N, C), -1 where unknown, and score the averaged weights on the test images.

    The main figures are those of the last epoch; the best epoch on the test images is a side figure, since choosing an
    epoch by it would be using the test labels.
    """
    started = time.perf_counter()
    method.to(device)
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(features) // preset.batch_size)
    optimizer = torch.optim.AdamW(method.groups(preset))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps * preset.epochs,
        pct_start=preset.warmup_share,
    )

    known = targets >= 0
    if known.any():
        prior = float((targets == 1).sum() / known.sum())
        first = next(iter(features.batches(4 * preset.batch_size, torch.Generator().manual_seed(seed))))
        with torch.no_grad():
            method.calibrate(first, encode(method.prompts()), min(max(prior, 0.01), 0.99))
    decay = min(preset.ema_per_epoch ** (1 / steps), 0.9998)
    average = AveragedModel(method, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged: Method = average.module

    best, testing = 0.0, 0.0
    bar = progress(range(preset.epochs), "")
    bar.set_description(label)
    for _ in bar:
        method.train()
        for batch in features.batches(preset.batch_size, generator):
            terms = method.loss(batch, encode(method.prompts()), targets[batch.index].to(device))
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), preset.clip_norm)
            optimizer.step()
            schedule.step()
            average.update_parameters(method)
            method.after_step()
        pause = time.perf_counter()
        averaged.eval()
        with torch.no_grad():
            text = encode(averaged.prompts())
        logits = score(partial(averaged.logits, text=text), test_features, preset.batch_size)
        best = max(best, 100 * float(mean_average_precision(logits, test_targets)))
        bar.set_postfix({name: f"{float(value.detach()):.3f}" for name, value in terms.items()}, refresh=False)
        testing += time.perf_counter() - pause
    metrics = {**evaluate(logits, test_targets), "best_epoch_mAP": best}
    seconds = time.perf_counter() - started - testing
    shown = " ".join(f"{name} {float(value.detach()):.3f}" for name, value in terms.items())
    say(f"{label}: mAP {metrics['mAP']:.1f}  OF1 {metrics['OF1']:.1f}  {seconds:.0f} s  (last step: {shown})")
    return Trained(averaged, metrics, seconds)
