"""Pseudo-labels for unknown entries: a rule decides, :class:`PseudoLabeler` waits, ramps, weighs and caps."""

from .labeler import PseudoLabeler
from .prototype import PrototypeRule
from .rule import Decision, Evidence, PseudoLabels, Rule
from .teacher import TeacherRule

__all__ = ["Decision", "Evidence", "PrototypeRule", "PseudoLabeler", "PseudoLabels", "Rule", "TeacherRule"]
