"""Settings chosen by known labels that were held out: no user with few labels has a val set."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN
from trm_losses.metrics import average_precision
from trm_pipeline import ranks
from trm_pipeline.config.presets import VARIANTS, Preset
from trm_pipeline.config.settings import override
from trm_pipeline.features.cached import Batch
from trm_pipeline.files import read_json, write_json
from trm_pipeline.methods.base import Method, score
from trm_pipeline.methods.global_head import FITTED, Merged
from trm_pipeline.progress import say
from trm_pipeline.run.prepared import Cell, Prepared, build, known_labels
from trm_pipeline.training.loop import train

__all__ = ["FACTORS", "LAYERS", "RATES", "HeldOut", "choose", "hold_out", "pooled_ap"]

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the learning rate of a method, of trm that of the texts: a training each."""

LAYERS = tuple((shrinkage, spread) for shrinkage in (1.0, 0.1) for spread in (0.7, 1.5, 3.0))
"""Of the global head: a fit each, which takes a second where a training takes several."""

RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of global logits: nothing is trained for them."""

SHARE = 0.2  # of what is known


class HeldOut(NamedTuple):
    """Labels (N, C) to train on, and to score with: known ones that were taken out, -1 elsewhere."""

    kept: Tensor
    asked: Tensor


def hold_out(targets: Tensor, *, single: bool, seed: int) -> HeldOut:
    """A fifth of the known entries; with single positives all entries of a fifth of the images, where unknown means absent.

    A present label alone cannot be ranked: with single positives what is not known is taken for absent, most of which it is.
    """
    draw = torch.Generator().manual_seed(seed)
    if single:
        images = torch.rand(len(targets), 1, generator=draw) < SHARE
        asked = torch.where(images, (targets == 1).to(targets.dtype), float(UNKNOWN))
        return HeldOut(torch.where(images, float(UNKNOWN), targets), asked)
    taken = (torch.rand(targets.shape, generator=draw) < SHARE) & (targets != UNKNOWN)
    return HeldOut(torch.where(taken, float(UNKNOWN), targets), torch.where(taken, targets, float(UNKNOWN)))


def pooled_ap(logits: Tensor, asked: Tensor) -> float:
    """Average precision (%) over all entries that were held out, as if they were of one class; 0 without a present one.

    Of few labels it ranks candidates where the mean over classes has nothing to say of most classes, and the log loss asks about
    the level of probabilities and not about order.
    """
    known = asked != UNKNOWN
    if not known.any():
        return 0.0
    found = average_precision(logits[known][:, None], asked[known][:, None])
    return 100 * float(torch.nan_to_num(found)[0])


def choose(data: Prepared, cell: Cell, preset: Preset, path: Path) -> Preset:
    """The preset with what suits a method best of the lists above, and a file that says what each candidate scored.

    Every method has the same lists, of which the global head's are left out where there is none. What an earlier run chose is
    read again.
    """
    method = VARIANTS.get(cell.method, (cell.method, ()))[0]
    if not ranks.from_first(path.is_file()):
        known = known_labels(data, cell)
        single = cell.known == "single"
        held = hold_out(known, single=single, seed=cell.seed)
        scores: dict[str, float] = {}
        changes = _choose(_with_labels(data, held.kept), cell, method, preset, held.asked, single, scores)
        if ranks.first():
            write_json(path, {"changes": changes, "scores": scores})
    ranks.from_first(None)  # the file is there
    found: dict[str, Any] = read_json(path)
    say(f"{cell.label}: {' '.join(found['changes']) or 'nothing to choose'}")
    return override(preset, found["changes"])


def _with_labels(data: Prepared, labels: Tensor) -> Prepared:
    """The data with these known labels, and what was found without any."""
    found = dataclasses.replace(data, labels=labels)
    vars(found)["training_free"] = data.training_free
    return found


def _choose(
    data: Prepared, cell: Cell, method: str, preset: Preset, asked: Tensor, single: bool, scores: dict[str, float]
) -> list[str]:
    """Settings for the command line, the best of each list in turn; what was tried goes into ``scores``."""
    size = preset.batch_size

    def best(candidates: dict[str, float]) -> str:
        scores.update(candidates)
        return max(candidates, key=lambda name: candidates[name])

    changes: list[str] = []
    whole = None
    if method in FITTED or method == "trm" or method.endswith("+global"):
        found: dict[str, Tensor] = {}
        for shrinkage, spread in LAYERS:
            name = f"global-head.shrinkage={shrinkage:g} global-head.spread={spread:g}"
            prior = None if method != "linear-penultimate" else False
            tried = override(preset, name.split())
            head = data.global_head(data.labels, tried, single=single, prior=prior)  # type: ignore[arg-type]
            if head is None:
                break
            found[name] = score(lambda batch, head=head: head(batch.tokens, batch.penultimate), data.features, size)  # type: ignore[misc]
        if found:
            name = best({name: pooled_ap(logits, asked) for name, logits in found.items()})
            changes, whole = name.split(), found[name]
    if method in FITTED:
        return changes
    logits: dict[str, Tensor] = {}
    for factor in FACTORS:
        tried = override(preset, [*changes, f"lr_factor={factor:g}"])
        trained = _trained(data, cell, method, tried, single=single)
        local = trained.inner if isinstance(trained, Merged) else trained
        with torch.no_grad():
            text = data.encode(local.prompts())
        logits[f"lr_factor={factor:g}"] = score(partial(_logits, local.logits, text), data.features, size)
    name = best({name: pooled_ap(values, asked) for name, values in logits.items()})
    changes.append(name)
    if whole is not None:
        mixed = {f"merge_rate={rate:g}": (1 - rate) * logits[name] + rate * whole for rate in RATES}
        changes.append(best({rate: pooled_ap(values, asked) for rate, values in mixed.items()}))
    return changes


def _trained(data: Prepared, cell: Cell, method: str, preset: Preset, *, single: bool) -> Method:
    """The averaged method, with nothing scored on the way."""
    built, targets = build(data, cell, method=method, preset=preset)
    trained = train(
        built,
        data.features,
        targets,
        None,
        data.test_targets,
        encode=data.encode,
        preset=preset,
        seed=cell.seed,
        device=data.device,
        label=f"choosing for {cell.label}",
        single=single,
    )
    return trained.method


@torch.no_grad()
def _logits(logits: Any, text: Tensor, batch: Batch) -> Tensor:
    found: Tensor = logits(batch, text)
    return found
