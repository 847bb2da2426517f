"""The field's own losses for missing labels, in one notation and with one signature, to be swapped in a loop.

::

    for epoch in range(epochs):
        loss.begin_epoch(epoch, epochs)
        for images, targets, ids in loader:
            logits = model(images)
            value = loss(logits, targets, ids=ids)
            ...                                         # backward, step
            loss.update(logits, targets, ids=ids)

``begin_epoch`` and ``update`` do nothing if a method has no schedule and no state. ``ids`` are the places of the images in
the training set, and are read if a method keeps something for each of them. Labels: 1 present, 0 absent, -1 unknown, values
between are soft. Unless a class says otherwise a mean runs over all B * C entries, as it does in the published codes; an
entry that gives nothing counts there too. Logarithms are taken from logits; most of the published codes take log(p + 1e-5),
which stops the gradient of what is confidently wrong. Where a method was published for positive labels alone, known absent
labels take the term of binary cross-entropy; each class says what is ours. ``distributed`` joins the batch of all ranks:
for means and sums over it, for what is expected of it and ranked in it, and for what ``update`` keeps. ``validate`` checks
label values and ids, and looks for NaN; that waits for the device. All refuse by name: a ValueError for shapes, devices and
values, a TypeError for what is no tensor or not floating point.
"""

from __future__ import annotations

from .assume_negative import AssumeNegativeLoss
from .em import EMLoss
from .em_apl import EMAPLLoss
from .epr import EPRLoss
from .gce import GCELoss
from .gr import GPRLoss, GRLoss
from .hill import HillLoss
from .large_loss import LargeLoss
from .partial_asl import PartialASLLoss
from .partial_bce import PartialBCELoss
from .role import ROLELoss
from .splc import SPLCLoss
from .vlpl import VLPLLoss
from .weak_assume_negative import WeakAssumeNegativeLoss

__all__ = [
    "AssumeNegativeLoss",
    "EMAPLLoss",
    "EMLoss",
    "EPRLoss",
    "GCELoss",
    "GPRLoss",
    "GRLoss",
    "HillLoss",
    "LargeLoss",
    "PartialASLLoss",
    "PartialBCELoss",
    "ROLELoss",
    "SPLCLoss",
    "VLPLLoss",
    "WeakAssumeNegativeLoss",
]
