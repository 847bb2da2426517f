"""Pseudo-labels for unknown entries: a rule decides, :class:`PseudoLabeler` waits, ramps, weighs and caps."""

from .labeler import PseudoLabeler
from .neighbour import NeighbourRule
from .prototype import PrototypeRule
from .quantiles import Quantiles
from .rule import Decision, Evidence, PseudoLabels, Rule
from .thresholds import Thresholds

__all__ = [
    "Decision",
    "Evidence",
    "NeighbourRule",
    "PrototypeRule",
    "PseudoLabeler",
    "PseudoLabels",
    "Quantiles",
    "Rule",
    "Thresholds",
]
