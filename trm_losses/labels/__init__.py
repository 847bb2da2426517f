"""Partial labels: the one encoding of this package, conversions into it, and the usual ways to hide labels.

A label matrix has shape (B, C): one row an image, one column a class. An entry is 1 (present), 0 (absent), a
value between them (soft), or :data:`UNKNOWN` = -1 (nobody said). Public label files use other codes, among
them the opposite one, so they are converted once, where they are read.

Every function returns a new tensor on the device and in the dtype of its input. ``bool`` and ``uint8`` cannot
hold -1 and come back as ``int8``. In ``uint8``, where -1 is written as 255, 255 is read as -1, here and in every loss.
"""

from .encoding import UNKNOWN, class_weights, from_nan, from_positive_only, from_ternary, known_fraction, sample_classes
from .hiding import hide_labels, keep_single_positive, move_positives

__all__ = [
    "UNKNOWN",
    "class_weights",
    "from_nan",
    "from_positive_only",
    "from_ternary",
    "hide_labels",
    "keep_single_positive",
    "known_fraction",
    "move_positives",
    "sample_classes",
]
