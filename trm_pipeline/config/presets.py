"""What a run is made of. The presets stand side by side, so that what differs can be seen.

Any field can be set from the command line: ``--set lr=1e-4 epochs=20``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from trm_pipeline.drawn.captions import TEMPLATES

__all__ = [
    "EMBEDDED",
    "HELD_OUT",
    "LOSSES",
    "PRESETS",
    "PSEUDO_RULES",
    "SCHEDULES",
    "VARIANTS",
    "VOC2007_RN101",
    "Known",
    "Preset",
    "Schedule",
    "override",
    "pseudo_schedule",
]

HELD_OUT = "held-out"
"""The val split of a data set that has none of its own: a part of its training images."""

Known = float | Literal["single"]
"""Share of known labels, or one present label of each image and nothing else."""

# Losses of other methods, by the names of the grid: what was published, for VOC where it depends on the data.
LOSSES: dict[str, dict[str, float]] = {
    "an": {},
    "an-ls": {"smoothing": 0.1},
    "wan": {},
    "epr": {},  # k: from the known labels, or expected_positives
    "role": {"rate": 10.0},  # k likewise; of the labels' learning rate, in rates of the head
    "em": {"alpha": 0.2},
    "em-apl": {"alpha": 0.2, "beta": 0.02, "label_share": 0.9, "warmup": 5, "published_epochs": 10},
    "ll-r": {"delta": 0.002, "published_epochs": 10},
    "ll-ct": {"delta": 0.002, "published_epochs": 10},
    "ll-cp": {"delta": 0.001, "published_epochs": 10},
    "splc": {"threshold": 0.6, "margin": 1.0, "gamma": 2.0, "start": 1 / 31},  # share of the training before it corrects
    "hill": {"strength": 1.5, "margin": 1.0, "gamma": 2.0},
    "partial-bce": {"alpha": -4.45, "beta": 5.45, "gamma": 1.0},
    # Of the three published settings the one for labels that are missing at random.
    "pasl-ignore": {"gamma_pos": 0.0, "gamma_neg": 1.0, "margin": 0.0},
    "pasl-negative": {"gamma_pos": 0.0, "gamma_neg": 1.0, "gamma_unknown": 4.0, "margin": 0.0},
    "pasl-selective": {
        "gamma_pos": 0.0,
        "gamma_neg": 1.0,
        "gamma_unknown": 4.0,
        "margin": 0.0,
        "prior_threshold": 0.5,
        "likely": 5,
    },
    "vlpl": {"alpha": 0.2, "beta": 0.7, "temperature": 0.01, "threshold": 0.3, "negative_share": 0.0},
    # Methods that are more than a loss. SCPNet reads splc too; the share of tokens that its strong view lacks is ours.
    "scpnet": {"top": 5, "weight": 0.125, "balance": 2.0, "temperature": 0.3, "neighbours": 20, "drop": 0.5},
    "sst": {"threshold": 0.95, "fall": 0.025, "floor": 0.75, "memory": 100, "weight_pairs": 10.0, "weight_distance": 0.05},
    "sarb": {"alpha": 0.5, "beta": 0.5, "prototypes": 10, "weight_distance": 0.05},
}

# What the losses take on the drawn VOC: of ten settings of each the best one on the val images (benchmarks/choose_losses.py).
TUNED: dict[str, dict[str, float]] = {
    "linear+an": {"lr_factor": 0.3},
    "linear+an-ls": {"smoothing": 0.05},
    "*+an-ls": {"smoothing": 0.001},
    "linear+wan": {"lr_factor": 0.5},
    "linear+role": {},
    "*+role": {"rate": 300.0, "lr_factor": 0.3},
    "*+em": {"alpha": 0.003},
    "linear+em-apl": {"alpha": 0.003, "lr_factor": 0.3},
    "*+em-apl": {"alpha": 0.01, "beta": 0.4},
    "linear+ll-r": {"delta": 0.02},
    "*+ll-r": {"delta": 0.04},
    "linear+ll-ct": {"delta": 0.0005, "lr_factor": 0.3},
    "*+ll-ct": {"delta": 0.01},
    "linear+ll-cp": {"lr_factor": 0.3},
    "*+ll-cp": {"delta": 0.01},
    "*+splc": {"gamma": 0.0},
    "linear+hill": {"strength": 1.2},
    "*+hill": {"strength": 1.0},
    "linear+partial-bce": {"alpha": -1.0, "beta": 2.0},
    "*+partial-bce": {"gamma": 0.5},
    "linear+pasl-ignore": {"gamma_neg": 0.0, "lr_factor": 0.3},
    "*+pasl-ignore": {"gamma_neg": 0.0},
    "linear+pasl-negative": {"gamma_unknown": 0.0, "gamma_neg": 0.0, "lr_factor": 0.3},
    "*+pasl-negative": {"gamma_unknown": 0.0, "gamma_neg": 0.0},
    "linear+pasl-selective": {},
    "*+pasl-selective": {"gamma_neg": 0.0},
    "linear+vlpl": {"alpha": 0.01, "threshold": 0.2},
    "*+vlpl": {"alpha": 0.003},
    "*+scpnet": {"weight": 0.01, "drop": 0.1},
    "*+sarb": {"alpha": 0.9, "beta": 0.9},
}
TUNED_SINGLE: dict[str, dict[str, float]] = {
    "linear+an-ls": {"lr_factor": 3.0},
    "*+an-ls": {"smoothing": 0.001},
    "linear+wan": {},
    "*+wan": {"lr_factor": 0.2},
    "*+epr": {"lr_factor": 0.3},
    "linear+role": {"rate": 300.0, "lr_factor": 3.0},
    "*+role": {"rate": 300.0, "lr_factor": 0.3},
    "linear+em": {"lr_factor": 0.3},
    "*+em": {"alpha": 0.01, "lr_factor": 0.1},
    "linear+em-apl": {"lr_factor": 0.3},
    "*+em-apl": {"alpha": 0.01, "beta": 0.4, "lr_factor": 0.1},
    "linear+ll-r": {"delta": 0.0005},
    "*+ll-r": {"delta": 0.01},
    "linear+ll-ct": {"delta": 0.0005},
    "*+ll-ct": {"delta": 0.01},
    "linear+ll-cp": {"delta": 0.0003},
    "*+ll-cp": {"delta": 0.01},
    "*+splc": {"gamma": 0.0, "threshold": 0.9},
    "linear+hill": {"strength": 2.0},
    "*+hill": {"gamma": 0.0},
    "linear+partial-bce": {"alpha": -1.0, "beta": 2.0},
    "*+partial-bce": {"alpha": 0.0, "beta": 1.0},
    "*+pasl-negative": {"gamma_unknown": 0.0, "gamma_neg": 0.0},
    "*+pasl-selective": {"likely": 2},
    "linear+vlpl": {"lr_factor": 0.3},
    "*+vlpl": {"alpha": 0.1, "lr_factor": 0.1},
    "*+scpnet": {"weight": 0.01, "drop": 0.1},
    "*+sst": {"weight_pairs": 1.0, "lr_factor": 0.3},
    "*+sarb": {"alpha": 0.8, "beta": 0.8, "lr_factor": 0.3},
}


@dataclass(frozen=True)
class Preset:
    """Settings of data, backbone, schedule, method and peers."""

    name: str
    # Data and backbone
    model: str
    pretrained: str | None
    image_size: int
    year: int
    train_split: str
    val_split: str
    test_split: str
    templates: tuple[str, ...]
    split_words: bool  # "dining table" instead of "diningtable" in prompts
    augment: bool  # random crops with the tower in the loop; False: tokens are computed once and cached
    mirror: bool  # cache the mirrored images as well, one of both is drawn at each visit
    token_pool: int  # tokens averaged over squares of this side
    # Schedule, the same for every method
    epochs: int
    batch_size: int
    warmup_share: float = 0.2  # of OneCycle
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    ema_per_epoch: float = 0.82  # share of the old average that is left after an epoch; at most 0.9998 a step
    # Backbone
    value_path: bool = False  # tokens of a ViT's last block by its value path alone
    # Text
    prompts: str = "shared"  # fixed, residual, shared, csc
    num_context: int = 16
    # Text-region matching
    lr: float = 1e-4
    text_lr: float = 1e-4
    gamma_pos: float = 1.0
    gamma_neg: float = 2.0
    margin: float = 0.05
    scale: float = 20.0
    head: str = "query"  # whose logits are scored: query, region, mean
    # Regions
    num_heads: int = 4
    query: str = "tied"  # or free
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    attention_scale: float = 8.0
    region_learning: bool = True  # False: the pooled image feature is the region of every class
    lambda_region: float = 1.0
    # Distillation
    lambda_distillation: float = 1.0
    distillation_temperature: float = 4.0
    # Contrast
    lambda_contrast: float = 0.1
    contrast_temperature: float = 0.07
    contrast_temperature_region: float = 0.1
    contrast_anchor_threshold: float = 0.9
    contrast_region_region: float = 1.0
    contrast_region_text: float = 1.0
    contrast_region_prototype: float = 1.0
    contrast_text_prototype: float = 1.0
    anchor_score: float = 0.9  # least score of a pseudo-positive that becomes an anchor
    # Pseudo-labels (of the methods that have them); None: what suits the rule, see SCHEDULES
    pseudo_rule: str = "prototype"
    lambda_pseudo: float | None = None
    pseudo_per: str | None = None  # "entry", or "known": as much weight as a known label
    pseudo_warmup: float | None = None  # shares of all steps
    pseudo_ramp: float | None = None
    quantile_pos: float = 0.6
    neighbours: int = 20
    neighbour_temperature: float = 0.05
    neighbour_steps: int = 1
    threshold_pos: float = 0.8
    threshold_neg: float = 0.1
    weight_pos: float = 1.0
    weight_neg: float | None = None  # none: 1 by neighbours, 0.5 otherwise
    temperature_visual: float = 0.07
    temperature_text: float | None = None  # none: 2 / the frozen model's logit scale
    statistics_momentum: float = 0.99
    cap: bool | None = None  # only the surest pseudo-positives of an image; none: unless by neighbours
    # Prototypes
    prototype_momentum: float = 0.99
    prototype_text_momentum: float = 0.99
    bank_confidence: float = 0.8  # least probability of a known positive that enters, after the warm-up
    bank_pseudo_score: float = 0.9  # least score of a pseudo-positive that enters
    # Single positive labels: one present label of each image is known and nothing else
    expected_positives: float | None = None  # present labels of an image, for the bias start and the cap of pseudo-labels
    single_negative: float = 1.0  # weight of "absent" at unknown entries, in that of a known label; Cole's WAN has 1 / (C - 1)
    single_negative_until: str | None = None  # "warmup" of pseudo-labels, where a method has them, or "end"; none: as the rule
    # Peers
    linear_lr: float = 1e-3
    text_pixel_lr: float = 1e-2
    text_image_lr: float = 1e-3
    text_image_scale: float = 20.0
    dual_coop_lr: float = 3e-3
    dual_coop_scale: float = 20.0
    losses: dict[str, dict[str, float]] = field(default_factory=lambda: LOSSES)  # LOSS.NAME=VALUE on the command line
    tuned: dict[str, dict[str, float]] = field(default_factory=dict)  # what a method changes of them, see loss_options
    tuned_single: dict[str, dict[str, float]] = field(default_factory=dict)  # the same with single positives

    def loss_options(self, head: str, loss: str, *, single: bool) -> dict[str, float]:
        """Numbers of one of :data:`LOSSES` under a head, and ``lr_factor``, times which the head's own rates are.

        ``tuned`` has them by ``HEAD+LOSS``, or by ``*+LOSS`` for the heads that are not named.
        """
        tuned = self.tuned_single if single else self.tuned
        changes = tuned.get(f"{head}+{loss}", tuned.get(f"*+{loss}", {}))
        return {"lr_factor": 1.0, **self.losses[loss], **changes}


EMBEDDED = Preset(
    name="embedded",
    model="embedded",
    pretrained=None,
    image_size=224,
    year=2007,
    train_split="train",
    val_split="val",
    test_split="test",
    templates=TEMPLATES,
    split_words=True,
    augment=False,
    mirror=True,
    token_pool=2,
    epochs=10,
    batch_size=64,
    prompts="residual",
    lr=3e-4,
    text_lr=1e-3,
    # Chosen on val at 10 and 50 % and with single positives: the rule against thresholds on prototypes and quantiles
    # (benchmarks/pseudo_labels.py), its schedule, and the contrast: more of it helps where few labels are known, hurts at 50 %.
    pseudo_rule="neighbour",
    neighbour_steps=3,
    lambda_contrast=0.3,
    expected_positives=2.4,  # an assumption about the scenes, not read from the labels of a run
    gamma_pos=0.0,
    gamma_neg=0.0,
    margin=0.0,
    linear_lr=1e-1,
    text_pixel_lr=3e-3,
    # Chosen by the mean of mAP on val at 10 and 50 % known labels, seed 1. text-image: lr 1e-3, 3e-3, 1e-2, 3e-2, 1e-1 by scale
    # 10, 20, 40; dual-coop: lr 3e-4, 1e-3, 3e-3, 1e-2, 3e-2 by scale 10, 20, and by negative texts that start opposite to the
    # positive ones (kept) or at the mean of all classes (0.2 less).
    text_image_lr=1e-3,
    text_image_scale=20.0,
    dual_coop_lr=3e-3,
    dual_coop_scale=10.0,
    tuned=TUNED,
    tuned_single=TUNED_SINGLE,
)
# The drawn scenes of many classes, with the settings of the drawn VOC; like the real data they have no val split.
# A quarter of the width in the MLP of the regions, which would take most of the time with so many classes.
EMBEDDED_CUB = dataclasses.replace(
    EMBEDDED, name="embedded-cub", val_split=HELD_OUT, epochs=6, batch_size=32, mlp_ratio=1.0, expected_positives=30.0
)
EMBEDDED_VG200 = dataclasses.replace(
    EMBEDDED, name="embedded-vg200", val_split=HELD_OUT, epochs=6, batch_size=32, mlp_ratio=1.0, expected_positives=9.0
)

VOC2007_RN101 = Preset(
    name="voc2007-rn101",
    model="RN101",
    pretrained="openai",
    image_size=448,
    year=2007,
    train_split="trainval",
    val_split="val",
    test_split="test",
    templates=(
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of one {}.",
        "a cropped photo of a {}.",
        "a photo of a large {}.",
        "a photo of a small {}.",
        "there is a {} in the scene.",
        "this is a {} in the scene.",
    ),
    split_words=True,
    augment=True,
    mirror=False,
    token_pool=1,
    epochs=50,
    batch_size=64,
    prompts="shared",
    expected_positives=1.5,  # an assumption: about what is known of VOC, not read from the labels of a run
)

# The settings below are those of VOC2007 by analogy; nobody has run them. What is known of a data set stands beside it: its
# mean number of labels as published (an assumption of single positives), its splits. None has a val split of its own.
VOC2012_RN101 = dataclasses.replace(
    VOC2007_RN101, name="voc2012-rn101", year=2012, train_split="train", val_split=HELD_OUT, test_split="val"
)  # of single positives: Cole, SCPNet
COCO2014_RN101 = dataclasses.replace(
    VOC2007_RN101, name="coco2014-rn101", train_split="train", val_split=HELD_OUT, test_split="val", expected_positives=2.9
)
VG200_RN101 = dataclasses.replace(
    VOC2007_RN101, name="vg200-rn101", train_split="train", val_split=HELD_OUT, test_split="test", expected_positives=10.0
)
NUS_RN101 = dataclasses.replace(
    VOC2007_RN101, name="nus-rn101", train_split="train", val_split=HELD_OUT, test_split="test", expected_positives=1.9
)  # 2.4 in the split of SCPNet
CUB200_RN101 = dataclasses.replace(
    VOC2007_RN101, name="cub200-rn101", train_split="train", val_split=HELD_OUT, test_split="test", expected_positives=31.4
)

PRESETS = {
    preset.name: preset
    for preset in (
        EMBEDDED,
        EMBEDDED_CUB,
        EMBEDDED_VG200,
        VOC2007_RN101,
        VOC2012_RN101,
        COCO2014_RN101,
        VG200_RN101,
        NUS_RN101,
        CUB200_RN101,
    )
}


class Schedule(NamedTuple):
    """Weight of pseudo-labels in the loss, what it is relative to, the shares of all steps before and while it grows, and how
    long unknown labels of single positives count as absent beside them."""

    lambda_pseudo: float
    pseudo_per: str
    pseudo_warmup: float
    pseudo_ramp: float
    single_negative_until: str


# Labels from thresholds cover part of the entries; neighbours tell something of every unknown one.
_BY_THRESHOLD = Schedule(lambda_pseudo=1.0, pseudo_per="entry", pseudo_warmup=0.1, pseudo_ramp=0.1, single_negative_until="end")
SCHEDULES = {
    **dict.fromkeys(("prototype", "quantile"), _BY_THRESHOLD),
    "neighbour": Schedule(
        lambda_pseudo=0.5, pseudo_per="known", pseudo_warmup=0.2, pseudo_ramp=0.05, single_negative_until="warmup"
    ),
}

PSEUDO_RULES = tuple(SCHEDULES)


def pseudo_schedule(preset: Preset) -> Schedule:
    """What suits the preset's rule, and what the preset says itself."""
    if preset.pseudo_rule not in SCHEDULES:
        raise ValueError(f"pseudo_rule must be one of {', '.join(SCHEDULES)}, got {preset.pseudo_rule!r}")
    own = {name: value for name in Schedule._fields if (value := getattr(preset, name)) is not None}
    return SCHEDULES[preset.pseudo_rule]._replace(**own)


VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "trm-no-region": ("trm", {"region_learning": False}),
    "trm-no-distillation": ("trm", {"lambda_distillation": 0.0}),
    "trm-no-pseudo": ("trm-query", {}),
    "trm-no-contrast": ("trm", {"lambda_contrast": 0.0}),
    **{f"trm-rule-{rule}": ("trm", {"pseudo_rule": rule}) for rule in PSEUDO_RULES},
}
"""Ablations: the method a variant is, and what it changes in the preset."""


def override(preset: Preset, assignments: Sequence[str]) -> Preset:
    """The preset with ``NAME=VALUE`` settings from the command line, each read as the field's own type.

    ``LOSS.NAME=VALUE`` sets a number of one of its :data:`LOSSES`, under every head.
    """
    by_loss = {name: copy.deepcopy(getattr(preset, name)) for name in ("losses", "tuned", "tuned_single")}
    fields = {field.name: str(field.type) for field in dataclasses.fields(Preset) if field.name not in by_loss}
    changes: dict[str, object] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        loss, dot, option = name.partition(".")
        if dot:
            _set_option(by_loss["losses"], loss, option, value)
            for method, options in (*by_loss["tuned"].items(), *by_loss["tuned_single"].items()):
                if method.partition("+")[2] == loss:
                    options.pop(option, None)
            continue
        if not equals or name not in fields:
            raise ValueError(f"--set: wanted NAME=VALUE with one of {', '.join(fields)}; got {assignment!r}")
        kind = fields[name]
        try:
            if "None" in kind and value.lower() == "none":
                changes[name] = None
            elif kind.startswith("bool"):
                changes[name] = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            elif kind.startswith("int"):
                changes[name] = int(value)
            elif kind.startswith("float"):
                changes[name] = float(value)
            elif kind.startswith("tuple"):
                changes[name] = tuple(value.split("|"))
            else:
                changes[name] = value
        except (KeyError, ValueError):
            raise ValueError(f"--set: {name} must be of type {kind}, got {value!r}") from None
    return dataclasses.replace(preset, **by_loss, **changes)  # type: ignore[arg-type]


def _set_option(losses: dict[str, dict[str, float]], loss: str, option: str, value: str) -> None:
    if loss not in losses or option not in (*losses[loss], "lr_factor"):
        options = [f"{name}.{key}" for name, keys in losses.items() for key in dict.fromkeys((*keys, "lr_factor"))]
        raise ValueError(f"--set: wanted LOSS.NAME=VALUE with one of {', '.join(options)}; got {loss}.{option}")
    kind = type(losses[loss].get(option, 1.0))
    try:
        losses[loss][option] = number = kind(value)
    except ValueError:
        raise ValueError(f"--set: {loss}.{option} must be of type {kind.__name__}, got {value!r}") from None
    if option in ("lr_factor", "rate") and not 0 < number < math.inf:
        raise ValueError(f"--set: {loss}.{option} must be above 0, a factor of the head's learning rate; got {value}")
