"""Which images of a folder are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN


def hold_out(targets: Tensor, share: float, *, seed: int = 0, groups: Sequence[str] | None = None) -> Tensor:
    """Which images are kept from training, to score on: a share of them, of each class too as far as that can be.

    Of every present and every absent label with n known entries, round(share · n) are wanted, at least one where n ≥ 2; a
    present one always stays for training. The label that is rarest is served first, by an image at random; where images are
    few, by one of some that serves most others with it, and more than the share is taken to have a present label of each class,
    at most half of all. Images of which nothing is known stay for training; more of them at the end change nothing of
    the draw. With groups all of this is said of whole groups.

    Args:
        targets: (N, C) of 1, 0, -1. share: from 0 to below 1. seed: of the order among equals.
        groups: what each of the N images belongs to; those of one group stay together. Default: each by itself.

    Returns:
        (N,) bool.

    Reference: after the iterative stratification of Sechidis et al. 2011; the rules for rare classes are our choice.
    """
    known = (targets != UNKNOWN).any(dim=1)
    total = int(known.sum())
    if share <= 0 or total < 2:
        return torch.zeros(len(targets), dtype=torch.bool)
    names = range(len(targets)) if groups is None else groups
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    group = torch.tensor([place[name] for name in names])
    drawn = int(group[known].max()) + 1
    order = torch.randperm(drawn, generator=torch.Generator().manual_seed(seed))
    rank = torch.cat([order.argsort(), torch.arange(drawn, len(place))])[group].numpy()
    taken = np.zeros(len(place), dtype=bool)
    images = np.bincount(rank, known.numpy(), len(place)).astype(int)  # with a known label, of each group
    labels = torch.cat([targets == 1, targets == 0], dim=1).int()
    counted = torch.zeros(len(place), labels.shape[1], dtype=torch.int)  # known labels of each group
    has = counted.index_add_(0, torch.from_numpy(rank), labels).numpy()
    present = np.arange(has.shape[1]) < targets.shape[1]
    counts = has.sum(axis=0)
    wanted = np.minimum(np.rint(share * counts).clip(min=1), counts - 1)
    size, most = max(1, round(share * total)), max(1, round(share * total), total // 2)
    need, left, count = wanted.copy(), counts.copy(), 0
    rarest = sorted(range(len(counts)), key=counts.tolist().__getitem__)
    free = {label: has[:, label].nonzero()[0] for label in rarest} | {-1: images.nonzero()[0]}  # -1: of any label
    choice = max(1, 256 // len(free[-1]))

    def spare(label: int) -> int | None:
        """The next free group, or of a few the one with most labels that are needed; none with the last present of a class."""
        rows = free[label][:1024]
        rows = rows[~taken[rows]]
        if len(rows) < 256:
            rows = free[label] = free[label][~taken[free[label]]]
        rows = rows[:256]
        rows = rows[(images[rows] <= most - count) & ~(present & (has[rows] > 0) & (left <= has[rows])).any(axis=1)]
        fit = images[rows] <= size - count
        rows = (rows[fit] if fit.any() else rows)[:choice]
        gain = np.minimum(has[rows], need.clip(min=0)).sum(axis=1) / images[rows]
        return int(rows[gain.argmax()]) if len(rows) else None

    while count < most:
        # Beyond the share only for classes that have no present label there yet.
        asking = (need > 0) & (present & (need == wanted) if count >= size else True)
        chosen = None
        for label in rarest if asking.any() else ():
            if asking[label]:
                if (chosen := spare(label)) is not None:
                    break
                need[label] = 0  # what cannot be spared now cannot be later
        if chosen is None and count < size:
            chosen = spare(-1)
        if chosen is None:
            break
        taken[chosen] = True
        count += images[chosen]
        need -= has[chosen]
        left -= has[chosen]
    return torch.from_numpy(taken[rank])
