"""The training loop: an ordinary PyTorch loop around any :class:`Method`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import record_function

from trm_losses.metrics import evaluate
from trm_pipeline import ranks
from trm_pipeline.config.presets import Preset
from trm_pipeline.features.cached import Features
from trm_pipeline.features.frozen import Encode
from trm_pipeline.files import Checkpoint
from trm_pipeline.methods import Method
from trm_pipeline.methods.base import score
from trm_pipeline.progress import curves, progress, say
from trm_pipeline.training.pseudo_trace import Point, PseudoTrace


class Trained(NamedTuple):
    """A run's averaged method at its last epoch, its scores on the test images, how long training took, and how right its
    pseudo-labels were on the way (empty where it makes none)."""

    method: Method
    metrics: dict[str, float]
    seconds: float
    trace: list[Point]


def take_step(
    loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, parameters: Iterable[nn.Parameter], norm: float
) -> bool:
    """Backward, average over ranks, clip, step; whether it was taken: a scaler skips it where a gradient overflowed."""
    parameters = list(parameters)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    ranks.average_gradients(parameters)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, norm)
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


def train(
    method: Method,
    features: Features,
    targets: Tensor,
    test_features: Features | None,
    test_targets: Tensor,
    *,
    encode: Encode,
    preset: Preset,
    seed: int,
    device: torch.device,
    label: str,
    single: bool = False,
    truth: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    amp: bool = False,
    log: Path | None = None,
    finish: bool = True,
) -> Trained:
    """Train on partial labels (N, C), -1 where unknown, and score the averaged weights on the test images.

    Of several ranks each takes its part of every batch of ``preset.batch_size`` images, and the first one writes. The main
    figures are those of the last epoch; the best epoch on the test images is a side figure, since choosing an
    epoch by it would be using the test labels.

    Args:
        single: the labels are single positives: of unknown labels and of the share of present ones, the preset's
            assumptions take the place of what the known labels would tell.
        test_features, test_targets: None: nothing is scored, and there are no metrics.
        truth: the labels (N, C) before any were hidden, for the trace of pseudo-labels and nothing else.
        checkpoint: where to keep the state after each epoch; a state that is there is gone on from.
        amp: autocast the trained part, to float16 with a scaler on cuda and to bfloat16 elsewhere. Scores for the table
            are always computed in full precision.
        log: folder for TensorBoard.
        finish: whether :meth:`Method.finish` follows the last epoch.
    """
    method.to(device)
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(features) // preset.batch_size)
    total = steps * preset.epochs
    optimizer = torch.optim.AdamW(method.groups(preset))
    # A warm-up of one step is none, and torch would divide by its length less one.
    warmup = 0.0 if preset.warmup_share * total == 1 else preset.warmup_share
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=total, pct_start=warmup
    )
    on_cuda = device.type == "cuda"
    autocast = partial(torch.autocast, device.type, torch.float16 if on_cuda else torch.bfloat16, enabled=amp)
    scaler = torch.amp.GradScaler(device.type, enabled=amp and on_cuda)
    trace = None if truth is None else PseudoTrace(truth)
    weak_until = method.weak_negative_steps(preset, total)

    state = None if checkpoint is None else checkpoint.load()
    share = _present_share(targets, preset, single)
    if state is None and share is not None:
        first = next(iter(features.batches(4 * preset.batch_size, torch.Generator().manual_seed(seed))))
        with torch.no_grad():
            method.calibrate(first, encode(method.prompts()), min(max(share, 1e-4), 1 - 1e-4))
    if ranks.rank():
        torch.manual_seed(seed + (ranks.rank() << 32))  # a dropout of its own; all began with the same weights
    decay = min(preset.ema_per_epoch ** (1 / steps), 0.9998)
    average = AveragedModel(method, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged = cast(Method, average.module)
    parts: dict[str, Any] = {"method": method, "average": average, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}

    done, best, seconds, metrics, shown = 0, 0.0, 0.0, {}, ""
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, best, seconds, metrics, shown = (state[key] for key in ("epoch", "best", "seconds", "metrics", "shown"))
        if trace is not None:
            trace.points = state["trace"]
        generator.set_state(state["generator"])
        _set_random_state(state["random"][ranks.rank()], device)

    # What an interrupted epoch wrote is dropped.
    writer = curves()(log, purge_step=done + 1) if log is not None and ranks.first() else None
    bar = progress(range(done, preset.epochs), "")
    bar.set_description(label)
    for epoch in bar:
        started = time.perf_counter()
        method.before_epoch(epoch, features, targets, averaged, encode)
        method.train()
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(ranks.batches(features, preset.batch_size, generator), start=1):
            step = epoch * steps + number
            known = targets[batch.index].to(device)
            weak = preset.single_negative if single and step <= weak_until else 0.0
            with autocast():
                with record_function("text"):
                    text = encode(method.prompts())
                with record_function("loss"):
                    terms = method.loss(batch, text, known, weak)
                    loss = torch.stack(list(terms.values())).sum()
            pseudo = method.pseudo_labels()
            if trace is not None and pseudo is not None:
                trace.add(pseudo, known, batch.index)
                if 4 * number // steps > 4 * (number - 1) // steps:  # a quarter of the epoch ends here
                    trace.point(step)
            with record_function("backward and optimizer"):
                taken = take_step(loss, optimizer, scaler, method.parameters(), preset.clip_norm)
            if taken:
                schedule.step()
                with record_function("average"):
                    average.update_parameters(method)
                with record_function("update"):
                    method.after_step()
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in terms.items()}
        seconds += time.perf_counter() - started
        averaged.eval()
        with torch.no_grad():
            text = encode(averaged.prompts())
            if finish and epoch == preset.epochs - 1:
                averaged.finish(features, targets, text, preset.batch_size)
        if test_features is not None:
            logits = score(partial(averaged.logits, text=text), test_features, preset.batch_size)
            metrics = evaluate(logits, test_targets, threshold=0.0)
            best = max(best, metrics["mAP"])
        means = {name: float(ranks.total(value)) / steps / ranks.world() for name, value in sums.items()}
        shown = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        bar.set_postfix_str(shown, refresh=False)
        if writer is not None:
            for name, value in means.items():
                writer.add_scalar(f"loss/{name}", value, epoch + 1)
            if metrics:
                writer.add_scalar("test/mAP", metrics["mAP"], epoch + 1)
        random = ranks.gather(_random_state(device))
        if checkpoint is not None and ranks.first():
            checkpoint.save(
                {
                    **{name: part.state_dict() for name, part in parts.items()},
                    "generator": generator.get_state(),
                    "random": random,
                    "epoch": epoch + 1,
                    "best": best,
                    "seconds": seconds,
                    "metrics": metrics,
                    "shown": shown,
                    "trace": [] if trace is None else trace.points,
                }
            )
    if writer is not None:
        writer.close()
    averaged.eval()
    if metrics and not math.isnan(metrics["mAP"]):  # no class could be ranked
        say(f"{label}: mAP {metrics['mAP']:.1f}  OF1 {metrics['OF1']:.1f}  {seconds:.0f} s  (last epoch: {shown})")
    return Trained(averaged, {**metrics, "best_epoch_mAP": best}, seconds, [] if trace is None else trace.points)


def _present_share(targets: Tensor, preset: Preset, single: bool) -> float | None:
    """Share of present labels that the biases start from: of the known ones, or assumed; None where nothing is known."""
    if single:
        return None if preset.expected_positives is None else preset.expected_positives / targets.shape[1]
    known = targets >= 0
    return float((targets == 1).sum() / known.sum()) if known.any() else None


def _random_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's own generators, which a dropout would draw from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
