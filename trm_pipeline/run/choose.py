"""Settings chosen by known labels that were held out: no user with few labels has a val set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_losses.labels import UNKNOWN
from trm_pipeline import ranks
from trm_pipeline.config.losses import CANDIDATES
from trm_pipeline.config.presets import VARIANTS, Preset
from trm_pipeline.config.settings import override
from trm_pipeline.features.cached import Features
from trm_pipeline.files import read_json, tensor_digest, write_json
from trm_pipeline.methods.base import Method, score
from trm_pipeline.methods.global_head import FITTED, GLOBAL, Merged, global_logits, parts_of
from trm_pipeline.progress import say
from trm_pipeline.run.prepared import Cell, Prepared, known_labels, train_cell

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the learning rate of a method, of trm that of texts and levels: a training each. Losses of others then try numbers."""

LAYERS = tuple((shrinkage, spread) for shrinkage in (1.0, 0.1) for spread in (0.7, 1.5, 3.0))
"""Of the global head: a fit each, which asks the prior nothing new."""

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


def named(logits: Tensor) -> Tensor:
    """Log-chance (N, C) of each class to be the label of its image, if one of the present classes is named at random.

    Single positives tell this, not presence: of an image with many classes each is named less often. It is for scores whose level
    is right, such as those of global heads.
    """
    return torch.log_softmax(F.logsigmoid(logits.double()), dim=1)


def precisions(logits: Tensor, asked: Tensor) -> Tensor:
    """Precision (%) at each present entry (P,) that was held out, in one ranking of all entries, whatever their class.

    Of equal scores all count as ranked at the last of them, and NaN ranks last.
    """
    known = asked != UNKNOWN
    scores, present = logits[known].double().nan_to_num(nan=-torch.inf), asked[known] == 1
    order = scores.argsort(descending=True)
    _, equal = torch.unique_consecutive(scores[order], return_counts=True)
    last = (equal.cumsum(0) - 1).repeat_interleave(equal)
    found = torch.empty_like(scores)
    found[order] = 100 * present[order].cumsum(0)[last].double() / (last + 1)
    return found[present]


def percentiles(logits: Tensor, asked: Tensor) -> Tensor:
    """Share (%) of held-out images that score below each present entry (P,) in its class; of equal ones half, and NaN is last.

    It is for single positives. Its mean is the area under the ROC curve of named images against all. Present labels that nobody
    named draw it towards one half by one factor, whatever the candidate, which is not so of precision (Menon et al., "Learning
    from Corrupted Binary Labels", 2015). The levels of classes do not tell: a method that reads unknown labels as absent learns
    how often each class is named, and would rank well by that alone.
    """
    images = (asked != UNKNOWN).any(dim=1)
    scores = logits[images].double().nan_to_num(nan=-torch.inf).T.contiguous()
    order = scores.sort(dim=1).values
    both = torch.searchsorted(order, scores) + torch.searchsorted(order, scores, right=True)
    return (50 * both.double() / scores.shape[1]).T[asked[images] == 1]


def pooled_ap(logits: Tensor, asked: Tensor) -> float:
    """Average precision (%) over all entries that were held out, as if they were of one class; 0 without a present one.

    Of few labels it ranks candidates where the mean over classes has nothing to say of most classes, and the log loss asks about
    the level of probabilities and not about order.
    """
    return _mean(precisions(logits, asked))


def _mean(found: Tensor) -> float:
    return float(found.mean()) if len(found) else 0.0


def clearest(candidates: Mapping[str, Tensor]) -> str:
    """The candidate that gains most over the first, less one standard error of its gain; the first if none gains as much.

    Few labels rank candidates badly, and the best of a list is often the luckiest. So it has to be better than the settings as
    they are by more than what chance does to the difference. It is the one-standard-error rule of Breiman et al. (1984), here of
    paired differences.

    Args:
        candidates: :func:`precisions` (P,) of each at the same entries; the first is of the settings as they are.
    """
    default = next(iter(candidates.values()))
    return max(candidates, key=lambda name: _sure(candidates[name] - default))


def _sure(gain: Tensor) -> float:
    """Mean (P,) less its standard error; 0 of fewer than two, which have none."""
    return float(gain.mean() - gain.std() / len(gain) ** 0.5) if len(gain) > 1 else 0.0


class Chosen(NamedTuple):
    """Settings for the command line, the best of each list, and what everything that was tried scored (%)."""

    changes: list[str]
    scores: dict[str, float]


def choose(data: Prepared, cell: Cell, preset: Preset, path: Path) -> Preset:
    """The preset with what :func:`search` finds, and a file that says what each candidate scored.

    Every method has the same lists, of which the global head's are left out where there is none. What an earlier run chose is
    read again.
    """
    if not ranks.from_first(path.is_file()):
        found = search(data, cell, preset)
        if ranks.first():
            write_json(path, found._asdict())
    ranks.from_first(None)  # the file is there
    changes = read_json(path)["changes"]
    say(f"{cell.label}: {' '.join(changes) or 'as it is'}")
    return override(preset, changes)


def search(data: Prepared, cell: Cell, preset: Preset) -> Chosen:
    """What suits a method best of the lists above, each in turn with what the lists before it gave.

    A list changes nothing if none of it is clearly better than the settings as they are.
    """
    method = "trm" if cell.method in VARIANTS else cell.method
    single = cell.known == "single"
    held = hold_out(known_labels(data, cell), single=single, seed=cell.seed)
    return _Search(data, cell._replace(method=method), preset, held).found()


class _Search:
    """The lists of one method, by the labels that were held out."""

    def __init__(self, data: Prepared, cell: Cell, preset: Preset, held: HeldOut) -> None:
        self.data, self.cell, self.preset = data.with_labels(held.kept), cell, preset
        self.kept, self.asked = held
        self.changes: list[str] = []
        self.scores: dict[str, float] = {}

    def found(self) -> Chosen:
        """All lists that the method has."""
        method = self.cell.method
        whole = self._layer() if method in FITTED or method == "trm" or method.endswith(GLOBAL) else None
        if method not in FITTED:
            factors = [f"lr_factor={factor:g}" for factor in dict.fromkeys((self.preset.lr_factor, *FACTORS))]
            logits = self._best({factor: self._logits([factor]) for factor in factors})
            loss = parts_of(method.removesuffix(GLOBAL))[1]
            if own := CANDIDATES.get(loss, ()):
                names = [" ".join(f"{loss}.{name}={value:g}" for name, value in numbers.items()) for numbers in own]
                logits = self._best({"": logits, **{name: self._logits(name.split()) for name in names}})
            if whole is not None:
                rates = dict.fromkeys((self.preset.merge_rate, *RATES))
                self._best({f"merge_rate={rate:g}": (1 - rate) * logits + rate * whole for rate in rates})
        return Chosen(self.changes, self.scores)

    def _best(self, candidates: dict[str, Tensor], *, level: bool = False) -> Tensor:
        """The logits (N, C) of the candidate that clearly ranks best what was held out; its settings join the changes.

        The first is of the settings as they are. With single positives :func:`percentiles` rank, or where the level of the logits
        is right, :func:`precisions` of the chance to be named.
        """
        single = self.cell.known == "single"
        ranked = percentiles if single and not level else precisions
        found = {name: ranked(named(x) if single and level else x, self.asked) for name, x in candidates.items()}
        self.scores |= {name: _mean(values) for name, values in found.items() if name}
        name = clearest(found)
        self.changes += name.split()
        return candidates[name]

    def _layer(self) -> Tensor | None:
        """Logits of the head of whole images; None if there is nothing for it to read."""
        prior = False if self.cell.method == "linear-penultimate" else None
        single = self.cell.known == "single"
        key = tensor_digest(self.kept), tensor_digest(self.asked), single, prior, repr(self.preset)
        if key not in self.data.layers:  # one is kept: the methods of a setting and a seed follow each other
            found: dict[str, Tensor] = {}
            names = [f"global-head.shrinkage={shrinkage:g} global-head.spread={spread:g}" for shrinkage, spread in LAYERS]
            for name in ("", *names):
                tried = override(self.preset, name.split())
                head = self.data.global_head(self.kept, tried, single=single, prior=prior)
                if head is not None:
                    scores = None if head.prior is None else self.data.similarities("training-free")
                    found[name] = global_logits(head, self.data.features, self.preset.batch_size, scores)
            self.data.layers.clear()
            self.data.layers[key] = found
        return self._best(self.data.layers[key], level=True) if self.data.layers[key] else None

    def _logits(self, changes: list[str]) -> Tensor:
        """Logits of the method without the whole image, trained with these settings; nothing is scored on the way."""
        preset = override(self.preset, [*self.changes, *changes])
        label = f"choosing for {self.cell.label}"
        method = train_cell(self.data, self.cell, preset, method=self.cell.method, label=label, scored=False, finish=False).method
        local = method.inner if isinstance(method, Merged) else method
        return logits_of(self.data, local, self.data.features)


def logits_of(data: Prepared, method: Method, features: Features) -> Tensor:
    """Logits (N, C) of a trained method."""
    with torch.no_grad():
        text = data.encode(method.prompts())
        return score(lambda batch: method.logits(batch, text), features, data.preset.batch_size)
