"""The parts that are measured: how each is built and called, and the settings that it is measured at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import trm_losses as tl
from tests.helpers.cases.baselines import BASELINES, BaselineCase, call_baseline
from tests.helpers.cases.contrast import call_contrast
from tests.helpers.values import SAMPLES, Inputs, shaken
from trm_losses import functional as TF
from trm_losses.pseudo import PrototypeRule

Setting = dict[str, Any]
Row = dict[str, Any]

BATCH, WIDTH, TOKENS = 12, 16, 7


class Precision(NamedTuple):
    """Inputs and parameters of ``dtype``; or, under autocast, float32 parameters and inputs of ``dtype``."""

    dtype: torch.dtype
    autocast: bool = False

    def __str__(self) -> str:
        name = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return f"autocast {name}" if self.autocast else name


EXACT = Precision(torch.float64)
PRECISIONS = [
    Precision(torch.float32),
    Precision(torch.bfloat16),
    Precision(torch.float16),
    Precision(torch.bfloat16, autocast=True),
    Precision(torch.float16, autocast=True),
]


class Part(NamedTuple):
    """``call(module, inputs)`` gives a tensor; what is in ``shared`` belongs to all ranks, all else has a row for each sample."""

    name: str
    build: Callable[[Setting], nn.Module]
    inputs: Callable[[int, Setting], Inputs]
    call: Callable[[Any, Inputs], Tensor]
    learns: tuple[str, ...]
    grid: dict[str, tuple[Any, ...]]
    """The first of each are the setting of the cells other than precision; those take all combinations."""
    more: tuple[Setting, ...] = ()
    """Further settings, each the first with these changed."""
    shared: tuple[str, ...] = ("text", "prototypes")
    kind: Literal["loss", "rows", "state"] = "loss"
    """A mean over the batch, whose average over ranks is one process's; a result for each sample; what an update leaves."""
    products: bool = False
    """Half precision goes through matrix products of the part's own, as any layer's does."""
    ranks: Callable[[nn.Module], nn.Module] | None = None
    """How a part of others is told to work over ranks; ours have ``distributed``."""
    equation: Callable[[Any, Inputs], Tensor] | None = None
    """What float64 is to give, where a part of others computes in float32 whatever it gets."""

    @property
    def setting(self) -> Setting:
        return {key: values[0] for key, values in self.grid.items()}

    def settings(self) -> Iterator[Setting]:
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))
        yield from ({**self.setting, **changed} for changed in self.more)


def normal(*shape: int, seed: int, magnitude: float = 1.0) -> Tensor:
    """At most ``magnitude`` in size."""
    draws = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return magnitude * draws.clamp(-3, 3) / 3


def labels(batch: int, s: Setting, seed: int = 3) -> Tensor:
    """Present, absent, soft, and the setting's share of unknown ones."""
    g = torch.Generator().manual_seed(seed)
    hidden, drawn, soft = (torch.rand(batch, s["classes"], generator=g, dtype=torch.float64) for _ in range(3))
    y = (drawn < 0.2).double()
    y = torch.where(drawn > 0.9, soft, y)
    y[:, 0] = 1  # partners for the contrast on every rank
    return torch.where(hidden < s.get("unknown", 0.0), -1.0, y)


def regions(batch: int, s: Setting) -> Inputs:
    return {
        "regions": normal(batch, s["classes"], WIDTH, seed=1, magnitude=s["magnitude"]),
        "text": normal(s["classes"], WIDTH, seed=2),
        "targets": labels(batch, s),
    }


def contrasted(batch: int, s: Setting) -> Inputs:
    """With everything that the contrast takes."""
    return {
        **regions(batch, s),
        "weights": torch.rand(batch, s["classes"], generator=torch.Generator().manual_seed(4), dtype=torch.float64),
        "prototypes": normal(s["classes"], WIDTH, seed=5),
    }


def images(batch: int, s: Setting) -> Inputs:
    return {"features": normal(batch, WIDTH, seed=1, magnitude=s["magnitude"]), "targets": labels(batch, s)}


def two_logits(batch: int, s: Setting) -> Inputs:
    student, teacher = (normal(batch, s["classes"], seed=seed, magnitude=s["magnitude"]) for seed in (1, 2))
    return {"student": student, "teacher": teacher}


def logits(batch: int, s: Setting) -> Inputs:
    x = normal(batch, s["classes"], seed=1, magnitude=s["magnitude"])
    return {"logits": x, "targets": labels(batch, s), "ids": torch.arange(batch) % SAMPLES}


def tokens(batch: int, s: Setting) -> Inputs:
    return {
        "tokens": normal(batch, TOKENS, WIDTH, seed=1, magnitude=s["magnitude"]),
        "text": normal(s["classes"], WIDTH, seed=2),
        "targets": labels(batch, s),
    }


def pooler(s: Setting) -> tl.RegionPooler:
    torch.manual_seed(0)
    return shaken(tl.RegionPooler(s["classes"], WIDTH, num_heads=2), size=0.1)


def bank(s: Setting) -> tl.PrototypeBank:
    """Two updates old, so that all running means count."""
    made = tl.PrototypeBank(s["classes"], WIDTH, init=normal(s["classes"], WIDTH, seed=20))
    for seed in (21, 22):
        made.update(normal(3, s["classes"], WIDTH, seed=seed), torch.ones(3, s["classes"]))
    return made


def labeler(s: Setting) -> tl.PseudoLabeler:
    rule = PrototypeRule(s["classes"], positive=0.6, negative=0.4)
    made, prototypes = tl.PseudoLabeler(s["classes"], rule), bank(s)
    for seed in (31, 32):
        made.update(normal(30, s["classes"], WIDTH, seed=seed) + prototypes.visual, labels(30, s, seed), prototypes)
    return made


class Labels(nn.Module):
    """A labeller beside its bank."""

    def __init__(self, s: Setting) -> None:
        super().__init__()
        self.bank, self.labeler = bank(s), labeler(s)

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        pseudo = self.labeler(features, targets, self.bank)
        return torch.cat([pseudo.scores, pseudo.weights], dim=1)

    def update(self, features: Tensor, targets: Tensor) -> Tensor:
        self.labeler.update(features, targets, self.bank)
        return torch.cat([self.labeler.get_buffer(f"rule.similarity_{key}").flatten() for key in ("sum", "mass")])


def updated(module: tl.PrototypeBank, x: Inputs) -> Tensor:
    module.update(x["regions"], x["targets"], text=x["text"])
    return torch.stack([module.visual, module.text])


def objective(s: Setting) -> tl.TRMObjective:
    return tl.TRMObjective(
        pooler(s),
        tl.TextRegionMatchingLoss(s["classes"], scale=s["scale"]),
        distillation=tl.RegionDistillationLoss(),
        contrast=tl.MultimodalContrastiveLoss(temperature=s["temperature"]),
        bank=bank(s),
        labeler=labeler(s),
    )


def head(s: Setting) -> tl.TRMHead:
    names = [f"class {c}" for c in range(s["classes"])]
    return tl.TRMHead(pooler(s), tl.TextRegionMatchingLoss(s["classes"]), normal(s["classes"], WIDTH, seed=2), names)


def baseline(name: str, case: BaselineCase) -> Part:
    grid = {"classes": (20, 1), "magnitude": (1.0, 30.0, 1e4), "unknown": (0.5, 0.0, 1.0)}
    more = ({"classes": 20000},)
    return Part(name, lambda s: case.build(s["classes"]), logits, call_baseline, ("logits",), grid, more)


_FOCUS = ((1.0, 2.0, 0.05), (0.0, 0.0, 0.0), (0.5, 0.5, 0.05), (0.5, 0.3, 0.0), (4.0, 1.0, 0.05))
_REGIONS = {"classes": (20, 1), "magnitude": (1.0, 1e-3, 300.0), "unknown": (0.5, 0.0, 1.0)}


class Asymmetric(nn.Module):
    """``asymmetric_loss`` alone; weights with a gradient take the form in operators, others the one written out."""

    def __init__(self, s: Setting) -> None:
        super().__init__()
        self.s, self.distributed = s, False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        focus = dict(zip(("gamma_pos", "gamma_neg", "margin"), self.s["focus"], strict=True))
        weights = torch.ones(1, dtype=x.dtype, device=x.device, requires_grad=True) if self.s["plain"] else None
        return TF.asymmetric_loss(x, y, weights, **focus, group=dist.group.WORLD if self.distributed else None)


PARTS = [
    Part(
        "asymmetric loss",
        Asymmetric,
        logits,
        lambda m, x: m(x["logits"], x["targets"]),
        ("logits",),
        {"focus": _FOCUS, "plain": (False, True), "classes": (20, 1), "magnitude": (1.0, 30.0, 1e4), "unknown": (0.5, 0.0, 1.0)},
        more=tuple({"classes": 20000, "plain": plain, "magnitude": m} for plain in (False, True) for m in (1.0, 1e4)),
    ),
    Part(
        "matching",
        lambda s: tl.TextRegionMatchingLoss(s["classes"], scale=s["scale"]),
        regions,
        lambda m, x: m(x["regions"], x["text"], x["targets"]),
        ("regions", "text"),
        {**_REGIONS, "scale": (20.0, 1.0, 100.0)},
        more=({"classes": 20000},),
    ),
    Part(
        "distillation",
        lambda s: tl.RegionDistillationLoss(temperature=s["temperature"]),
        two_logits,
        lambda m, x: m(x["student"], x["teacher"]),
        ("student",),
        {"classes": (20, 1), "magnitude": (10.0, 1.0, 1e4), "temperature": (4.0, 1.0, 0.1, 0.01)},
        more=tuple({"classes": 20000, "temperature": t} for t in (4.0, 0.1)),
    ),
    *(
        Part(
            name,
            lambda s: tl.MultimodalContrastiveLoss(temperature=s["temperature"], temperature_region=s["temperature"]),
            inputs,
            call_contrast,
            ("regions", "text"),
            {**_REGIONS, "temperature": (0.07, 0.01, 1.0)},
        )
        for name, inputs in (("contrast", regions), ("contrast, weights and prototypes", contrasted))
    ),
    Part(
        "contrast of images",
        lambda s: tl.ImageContrastiveLoss(temperature=s["temperature"]),
        images,
        lambda m, x: m(x["features"], x["targets"]),
        ("features",),
        {**_REGIONS, "temperature": (0.1, 0.01, 1.0)},
    ),
    Part("prototype bank", bank, regions, updated, (), _REGIONS, kind="state"),
    Part("pseudo-labels", Labels, regions, lambda m, x: m(x["regions"], x["targets"]), (), _REGIONS, kind="rows"),
    Part("pseudo-labeller", Labels, regions, lambda m, x: m.update(x["regions"], x["targets"]), (), _REGIONS, kind="state"),
    Part(
        "pooler",
        pooler,
        tokens,
        lambda m, x: torch.cat([x.flatten(1) for x in m(x["tokens"], x["text"])], dim=1),
        ("tokens", "text"),
        {"classes": (20, 1), "magnitude": (1.0, 30.0)},
        kind="rows",
        products=True,
    ),
    Part(
        "head: tokens to logits",
        head,
        tokens,
        lambda m, x: m(x["tokens"]),
        ("tokens",),
        {"classes": (20, 1), "magnitude": (1.0, 30.0)},
        kind="rows",
        products=True,
    ),
    Part(
        "objective",
        objective,
        tokens,
        lambda m, x: m(x["tokens"], x["text"], x["targets"]).loss,
        ("tokens", "text"),
        {
            "classes": (20, 1),
            "magnitude": (1.0, 30.0),
            "unknown": (0.5, 0.0, 1.0),
            "scale": (20.0, 100.0),
            "temperature": (0.07, 0.01),
        },
        products=True,
    ),
    *(baseline(name, case) for name, case in BASELINES.items()),
]
