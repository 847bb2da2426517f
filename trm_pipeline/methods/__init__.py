"""What is compared: zero-shot CLIP, linear probes, tuned prompts and TRM-ML, on the same features and labels."""

from collections.abc import Callable

from trm_pipeline.methods.base import Method, Setting, weak_negatives
from trm_pipeline.methods.global_head import merged
from trm_pipeline.methods.linear import LinearProbe
from trm_pipeline.methods.peers.positive_coop import PositiveCoOp
from trm_pipeline.methods.prompts import DualCoOp, DualCoOpPlus, TextImage, TextPixel
from trm_pipeline.methods.training_free import TRAINING_FREE, fit_training_free
from trm_pipeline.methods.trm import TRM
from trm_pipeline.methods.zero_shot import ZERO_SHOT, zero_shot_global, zero_shot_tokens

__all__ = [
    "LABEL_FREE",
    "METHODS",
    "TRM",
    "ZERO_SHOT",
    "LinearProbe",
    "Method",
    "Setting",
    "fit_training_free",
    "weak_negatives",
    "zero_shot_global",
    "zero_shot_tokens",
]

LABEL_FREE = (*ZERO_SHOT, TRAINING_FREE)
"""Methods that learn nothing of labels, and so are the same in every setting."""

METHODS: dict[str, Callable[[Setting], Method]] = {
    "linear": LinearProbe,
    "text-image": TextImage,
    "dual-coop": DualCoOp,
    "dual-coop++": DualCoOpPlus,
    "text-pixel": TextPixel,
    "positive-coop": PositiveCoOp,
    "trm-region": lambda setting: TRM(setting, query_head=False, pseudo_labels=False),
    "trm-query": lambda setting: TRM(setting, query_head=True, pseudo_labels=False),
    "trm-paper": lambda setting: TRM(setting, query_head=True, pseudo_labels=True, recipe="paper"),
    "trm": lambda setting: merged(TRM(setting, pseudo_labels=True), setting),
}
