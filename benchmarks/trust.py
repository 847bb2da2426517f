"""How far every part is from one process in float64: precisions, compiled code, ranks, saved and loaded; and others' losses.

    python benchmarks/trust.py --json runs/trust/trust.json
    python benchmarks/trust.py --only contrast --without compiled ranks

Every cell is a run: the same rounded inputs and parameters go through the part in the cell's setting and, as they are, through
the part in float64 in one process. A value's error is relative to the larger of 1 and itself, a gradient's to its largest
entry. Ranks are processes joined by gloo, which hold unequal shares of the batch. What a part has no feature for is "-".
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tables import table
from torch import Tensor, nn

import trm_losses as tl
from trm_losses import baselines
from trm_losses import functional as TF
from trm_losses.pseudo import PrototypeRule, Thresholds

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from _ddp import Pool  # noqa: E402

Inputs = dict[str, Tensor]
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


def call_contrast(module: Any, x: Inputs) -> Tensor:
    options = {key: x[key] for key in ("weights", "prototypes") if key in x}
    return module(x["regions"], x["text"], x["targets"], **options)  # type: ignore[no-any-return]


def images(batch: int, s: Setting) -> Inputs:
    return {"features": normal(batch, WIDTH, seed=1, magnitude=s["magnitude"]), "targets": labels(batch, s)}


def two_logits(batch: int, s: Setting) -> Inputs:
    student, teacher = (normal(batch, s["classes"], seed=seed, magnitude=s["magnitude"]) for seed in (1, 2))
    return {"student": student, "teacher": teacher}


def logits(batch: int, s: Setting) -> Inputs:
    x = normal(batch, s["classes"], seed=1, magnitude=s["magnitude"])
    return {"logits": x, "targets": labels(batch, s), "ids": torch.arange(batch)}


def tokens(batch: int, s: Setting) -> Inputs:
    return {
        "tokens": normal(batch, TOKENS, WIDTH, seed=1, magnitude=s["magnitude"]),
        "text": normal(s["classes"], WIDTH, seed=2),
        "targets": labels(batch, s),
    }


def shaken(module: nn.Module) -> nn.Module:
    """Parameters off their start, so that no zero or identity hides a term; without dropout."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return module


def pooler(s: Setting) -> tl.RegionPooler:
    torch.manual_seed(0)
    return shaken(tl.RegionPooler(s["classes"], WIDTH, num_heads=2, dropout=0.0))  # type: ignore[return-value]


def bank(s: Setting) -> tl.PrototypeBank:
    """Two updates old, so that all running means count."""
    made = tl.PrototypeBank(s["classes"], WIDTH, init=normal(s["classes"], WIDTH, seed=20))
    for seed in (21, 22):
        made.update(normal(3, s["classes"], WIDTH, seed=seed), torch.ones(3, s["classes"]))
    return made


def labeler(s: Setting) -> tl.PseudoLabeler:
    rule = PrototypeRule(s["classes"], Thresholds(0.6, 0.4))
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


def baseline(name: str, build: Callable[[Setting], nn.Module]) -> Part:
    def begun(s: Setting) -> nn.Module:
        module = build(s)
        module.begin_epoch(1, 10)  # type: ignore[operator]
        x = logits(BATCH, {**s, "magnitude": 2.0})
        module.update(x["logits"].float(), torch.full_like(x["targets"], -1.0), ids=x["ids"])  # type: ignore[operator]
        module.begin_epoch(9, 10)  # type: ignore[operator]
        return module

    grid = {"classes": (20, 1), "magnitude": (1.0, 30.0, 1e4), "unknown": (0.5, 0.0, 1.0)}
    more = ({"classes": 20000},)
    return Part(name, begun, logits, lambda m, x: m(x["logits"], x["targets"], ids=x["ids"]), ("logits",), grid, more)


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
    Part(
        "contrast",
        lambda s: tl.MultimodalContrastiveLoss(temperature=s["temperature"], temperature_region=s["temperature"]),
        regions,
        call_contrast,
        ("regions", "text"),
        {**_REGIONS, "temperature": (0.07, 0.01, 1.0)},
    ),
    Part(
        "contrast, weights and prototypes",
        lambda s: tl.MultimodalContrastiveLoss(temperature=s["temperature"], temperature_region=s["temperature"]),
        contrasted,
        call_contrast,
        ("regions", "text"),
        {**_REGIONS, "temperature": (0.07, 0.01, 1.0)},
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
    baseline("assume negative", lambda s: baselines.AssumeNegativeLoss(smoothing=0.1)),
    baseline("weak assume negative", lambda s: baselines.WeakAssumeNegativeLoss()),
    baseline("EM", lambda s: baselines.EMLoss()),
    baseline("EM+APL", lambda s: baselines.EMAPLLoss(BATCH, s["classes"], label_share=0.5)),
    baseline("EPR", lambda s: baselines.EPRLoss(1.5)),
    baseline("ROLE", lambda s: baselines.ROLELoss(labels(BATCH, s, 65), 1.5, generator=torch.Generator().manual_seed(66))),
    baseline("large loss", lambda s: baselines.LargeLoss(scheme="correct", delta=0.01)),
    baseline("partial BCE", lambda s: baselines.PartialBCELoss()),
    baseline("partial ASL", lambda s: baselines.PartialASLLoss(s["classes"], margin=0.05, reduction="mean")),
    baseline("SPLC", lambda s: baselines.SPLCLoss(reduction="mean")),
    baseline("Hill", lambda s: baselines.HillLoss(reduction="mean")),
    baseline("VLPL", lambda s: baselines.VLPLLoss(0.03 * normal(BATCH, s["classes"], seed=67))),
]


def peers() -> list[Part]:
    """The losses of others that are installed, each against itself in float64."""
    found: list[Part] = []
    with contextlib.suppress(ImportError):
        from timm.loss import AsymmetricLossMultiLabel

        def hard(m: Any, x: Inputs) -> Tensor:
            return m(x["logits"], (x["targets"] == 1).to(x["logits"].dtype))  # type: ignore[no-any-return]

        def equation(m: Any, x: Inputs) -> Tensor:
            y, focus = (x["targets"] == 1).double(), {"gamma_pos": m.gamma_pos, "gamma_neg": m.gamma_neg, "margin": m.clip}
            return TF.asymmetric_loss(x["logits"], y, **focus, reduction="sum") / len(y)

        for name, size in (("logits up to 10", (1.0, 10.0)), ("logits up to 10,000", (30.0, 1e4))):
            grid = {"classes": (20, 1), "magnitude": size}
            learns, build = ("logits",), (lambda s: AsymmetricLossMultiLabel())
            found.append(Part(f"timm AsymmetricLossMultiLabel, {name}", build, logits, hard, learns, grid, equation=equation))
    with contextlib.suppress(ImportError):
        from pytorch_metric_learning.losses import SupConLoss
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

        def one_label(batch: int, s: Setting) -> Inputs:
            return {"features": normal(batch, WIDTH, seed=1, magnitude=s["magnitude"]), "own": torch.arange(batch) % 2}

        found.append(
            Part(
                "pytorch-metric-learning SupConLoss",
                lambda s: SupConLoss(temperature=s["temperature"]),
                one_label,
                lambda m, x: m(x["features"], x["own"]),
                ("features",),
                {"classes": (1,), "magnitude": (1.0, 1e-3, 300.0), "temperature": (0.1, 0.01, 1.0)},
                ranks=DistributedLossWrapper,
            )
        )
    with contextlib.suppress(ImportError):
        from open_clip import ClipLoss

        def pairs(batch: int, s: Setting) -> Inputs:
            image, text = (F.normalize(normal(batch, WIDTH, seed=seed), dim=-1) for seed in (1, 2))
            return {"image": image, "text of it": text}

        def clip(**modes: bool) -> Callable[[nn.Module], nn.Module]:
            return lambda m: ClipLoss(**modes, rank=dist.get_rank(), world_size=dist.get_world_size())

        for name, modes in (
            ("open_clip ClipLoss", {}),
            ("open_clip ClipLoss, local_loss, gather_with_grad", {"local_loss": True, "gather_with_grad": True}),
        ):
            found.append(
                Part(
                    name,
                    lambda s: ClipLoss(),
                    pairs,
                    lambda m, x: m(x["image"], x["text of it"], 1 / 0.07),
                    ("image", "text of it"),
                    {"classes": (1,)},
                    shared=(),
                    ranks=clip(**modes),
                )
            )
    return found


# One run ----------------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a part gave, in float64: a value, and gradients by name, without the scale they were computed at."""

    value: Tensor
    gradients: dict[str, Tensor]


def rounded(inputs: Inputs, precision: Precision) -> Inputs:
    keep = ("targets",)
    return {key: x.to(precision.dtype) if x.is_floating_point() and key not in keep else x for key, x in inputs.items()}


def prepared(part: Part, setting: Setting, precision: Precision) -> nn.Module:
    module = part.build(setting)
    return module.float() if precision.autocast else module.to(precision.dtype)


def run(
    part: Part,
    module: nn.Module,
    inputs: Inputs,
    precision: Precision,
    scale: float = 1.0,
    call: Callable[..., Any] | None = None,
) -> Run:
    """A forward and a backward pass, the latter outside of autocast and scaled, as a GradScaler does it."""
    inputs = {key: x.clone().requires_grad_(key in part.learns) for key, x in inputs.items()}
    kind = next(iter(inputs.values())).device.type
    with torch.autocast(kind, precision.dtype if precision.autocast else torch.bfloat16, enabled=precision.autocast):
        value = (call or part.call)(module, inputs)
    gradients = {}
    if part.learns:
        wanted = {key: inputs[key] for key in part.learns} | {k: p for k, p in module.named_parameters() if p.requires_grad}
        total = value if value.ndim == 0 else (value * weighing(value)).sum()
        scaled = total * torch.tensor(scale, dtype=torch.promote_types(total.dtype, torch.float32), device=total.device)
        found = torch.autograd.grad(scaled, list(wanted.values()), allow_unused=True)
        gradients = {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(wanted.items(), found, strict=True)}
    return Run(value.detach().cpu().double(), {key: g.cpu().double() / scale for key, g in gradients.items()})


def weighing(value: Tensor) -> Tensor:
    """Different factors of the entries of what is no scalar; the same for a sample whatever the batch."""
    return torch.linspace(0.5, 1.5, value[0].numel(), dtype=value.dtype, device=value.device).view_as(value[0])


def exact(part: Part, module: nn.Module, inputs: Inputs) -> Run:
    """One process, float64, the same rounded numbers; the module is left alone."""
    return run(part, copy.deepcopy(module).double(), rounded(inputs, EXACT), EXACT, call=part.equation)


def scaler(reference: Run, precision: Precision) -> float:
    """The power of two that a GradScaler begins with: gradients stay below a thousand, and a loss in fp16 can take it."""
    largest = max((float(g.abs().max()) for g in reference.gradients.values() if g.numel()), default=0.0)
    if precision.dtype != torch.float16 or largest < 1e-30:
        return 1.0
    return 2.0 ** min(math.floor(math.log2(1000 / largest)), 15)


def settled(part: Part, module: nn.Module, inputs: Inputs, precision: Precision, reference: Run) -> Run:
    """A run at the scale where a GradScaler ends, which halves it as long as a gradient is infinite."""
    scale = scaler(reference, precision)
    actual = run(part, module, inputs, precision, scale)
    while scale > 1 and not all(torch.isfinite(g).all() for g in actual.gradients.values()):
        scale /= 2
        actual = run(part, module, inputs, precision, scale)
    return actual


def errors(actual: Run, reference: Run) -> tuple[float, float]:
    """Of value and gradient; infinite where one is not finite."""
    value, expected = actual.value, reference.value
    if not torch.isfinite(value).all():
        return math.inf, math.inf
    of_value = float((value - expected).abs().max()) / max(1.0, float(expected.abs().max())) if value.numel() else 0.0
    of_gradient = 0.0
    for key, e in reference.gradients.items():
        a = actual.gradients[key]
        if not torch.isfinite(a).all():
            return of_value, math.inf
        if e.numel():
            of_gradient = max(of_gradient, float((a - e).abs().max()) / max(1e-9, float(e.abs().max())))
    return of_value, of_gradient


# The cells --------------------------------------------------------------------------------------------------------------------


ORDINARY = {"mode": "eager", "ranks": 1, "saved": False, "device": "cpu"}


def cell(part: Part, precision: Precision, found: Iterable[tuple[Setting, float, float]], **where: Any) -> Row:
    """The worst of what was found, and at which setting."""
    found = list(found)
    row: Row = {"part": part.name, "precision": str(precision), **ORDINARY, **where}
    for index, key in ((1, "value"), (2, "gradient")):
        worst = max(found, key=lambda item: item[index])
        row |= {key: worst[index], f"{key} at": worst[0]}
    return row | {"settings": len(found), "failed": ""} | ({} if part.learns else {"gradient": None})


def failed(part: Part, precision: Precision, error: BaseException | str, **where: Any) -> Row:
    """A cell that gave no result."""
    said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    row = {"part": part.name, "precision": str(precision), **ORDINARY, **where}
    return row | {"value": math.inf, "gradient": math.inf, "failed": said[:400]}


def in_precision(part: Part, precision: Precision, settings: Iterable[Setting], device: str = "cpu") -> Row:
    """One process, eager, over all the settings."""
    found = []
    for setting in settings:
        inputs, module = rounded(part.inputs(BATCH, setting), precision), prepared(part, setting, precision)
        reference = exact(part, module, inputs)
        moved = {key: x.to(device) for key, x in inputs.items()}
        actual = settled(part, module.to(device), moved, precision, reference)
        found.append((setting, *errors(actual, reference)))
    return cell(part, precision, found, device=device)


class Caller(nn.Module):
    """A part's call as a module, for ``torch.compile``."""

    def __init__(self, part: Part, module: nn.Module) -> None:
        super().__init__()
        self.call, self.module = part.call, module

    def forward(self, inputs: Inputs) -> Tensor:
        return self.call(self.module, inputs)


def compiled(part: Part, precision: Precision, backend: str) -> Row:
    """One graph for three batch sizes: fullgraph, dynamic, and an error where it would be compiled anew."""
    torch._dynamo.reset()
    module = prepared(part, part.setting, precision)
    whole = torch.compile(Caller(part, module), fullgraph=True, dynamic=True, backend=backend)
    found = []
    for batch in (8, 3, 5):
        inputs = rounded(part.inputs(batch, part.setting), precision)
        reference = exact(part, module, inputs)
        with torch._dynamo.config.patch(error_on_recompile=batch != 8):
            actual = run(part, module, inputs, precision, scaler(reference, precision), call=lambda m, x: whole(x))
        found.append(({**part.setting, "batch": batch}, *errors(actual, reference)))
    return cell(part, precision, found, mode=backend)


def reloaded(part: Part, module: nn.Module, precision: Precision) -> nn.Module:
    """A fresh module with the state of this one, by way of a file that is read with weights_only."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = prepared(part, part.setting, precision)
    for x in fresh.state_dict().values():
        x.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def saved_and_loaded(part: Part, precision: Precision) -> Row | None:
    """None where there is no state."""
    module, inputs = prepared(part, part.setting, precision), rounded(part.inputs(BATCH, part.setting), precision)
    if not module.state_dict():
        return None
    reference = exact(part, module, inputs)
    actual = run(part, reloaded(part, module, precision), inputs, precision, scaler(reference, precision))
    return cell(part, precision, [(part.setting, *errors(actual, reference))], saved=True)


# Ranks ------------------------------------------------------------------------------------------------------------------------


def named(name: str) -> Part:
    return next(part for parts in (lambda: PARTS, peers) for part in parts() if part.name == name)


def spread(part: Part, module: nn.Module) -> nn.Module | None:
    """The part over all ranks; None where it has no such feature."""
    if part.ranks is not None:
        return part.ranks(module)
    able = [inner for inner in module.modules() if hasattr(inner, "distributed")]
    for inner in able:
        inner.distributed = True  # type: ignore[assignment]
    return module if able and part.kind != "rows" else None


def shares(part: Part, world: int) -> list[int]:
    """Rows of each rank: unequal for ours, equal for others, which ask for that."""
    rest = BATCH // world - (part.ranks is None)
    return [BATCH - (world - 1) * rest] + [rest] * (world - 1)


def on_rank(rank: int, name: str, precision: Precision, scale: float, mode: str, saved: bool) -> Run | None:
    """This rank's rows of the batch through the part."""
    part = named(name)
    inputs = rounded(part.inputs(BATCH, part.setting), precision)
    rows = shares(part, dist.get_world_size())
    own = {key: x if key in part.shared else x.split(rows)[rank] for key, x in inputs.items()}
    module = prepared(part, part.setting, precision)
    over = spread(part, reloaded(part, module, precision) if saved else module)
    if over is None or (saved and not module.state_dict()):
        return None
    call = None
    if mode != "eager":
        torch._dynamo.reset()
        # What gathers rows of ranks asks how many there are, where the graph breaks.
        whole = torch.compile(Caller(part, over), fullgraph="contrast" not in part.name, backend=mode)
        call = lambda m, x: whole(x)  # noqa: E731
    return run(part, over, own, precision, scale, call=call)


def joined(part: Part, runs: Sequence[Run]) -> Run:
    """What DistributedDataParallel makes of the ranks: the mean of what they share, and each rank's own rows."""
    if part.kind == "state":  # the same on every rank
        return runs[0]
    gradients = {}
    for key in runs[0].gradients:
        each = [r.gradients[key] for r in runs]
        own = key in part.learns and key not in part.shared
        gradients[key] = torch.cat(each) / len(runs) if own else torch.stack(each).mean(dim=0)
    return Run(torch.stack([r.value for r in runs]).mean(dim=0), gradients)


def over_ranks(part: Part, precision: Precision, pool: Pool, mode: str = "eager", saved: bool = False) -> Row | None:
    """None where the part has no such feature."""
    inputs, module = rounded(part.inputs(BATCH, part.setting), precision), prepared(part, part.setting, precision)
    reference = exact(part, module, inputs)
    runs = pool.run(on_rank, part.name, precision, scaler(reference, precision), mode, saved)
    if runs[0] is None:
        return None
    found = [(part.setting, *errors(joined(part, runs), reference))]
    return cell(part, precision, found, mode=mode, ranks=pool.world, saved=saved)


# The table --------------------------------------------------------------------------------------------------------------------

# Largest errors (value, gradient) that pass. Values are computed in float32 from what half precision holds; a gradient is rounded
# to the precision of its tensor; what goes through matrix products in half precision is as far off as any layer.
_PASS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-4, 1e-2), torch.float16: (1e-4, 2e-3)}
_PASS_PRODUCTS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.4), torch.float16: (0.02, 0.05)}


def tolerance(part: Part, precision: Precision) -> tuple[float, float]:
    return (_PASS_PRODUCTS if part.products else _PASS)[precision.dtype]


# All parts are compiled by aot_eager, which traces and differentiates the graphs and runs them as they are; these by inductor as
# well, which needs a C++ compiler, and under autocast, and over two ranks.
_FURTHER = ("asymmetric loss", "matching", "contrast")


def measured(parts: Sequence[Part], without: Sequence[str], worlds: Sequence[int]) -> Iterator[Row]:
    """All cells, as they come."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for part in parts:
        for device, precision in itertools.product(devices, PRECISIONS if "grid" not in without else ()):
            over_grid = partial(in_precision, settings=list(part.settings()), device=device)
            yield attempt(part, precision, over_grid, device=device)
        for precision in PRECISIONS if "saved" not in without else ():
            yield attempt(part, precision, saved_and_loaded, saved=True)
        if "compiled" not in without:
            for precision in (PRECISIONS[0], *(PRECISIONS[3:4] if part.name in _FURTHER else ())):
                yield attempt(part, precision, partial(compiled, backend="aot_eager"), mode="aot_eager")
            if part.name in _FURTHER:
                yield attempt(part, PRECISIONS[0], partial(compiled, backend="inductor"), mode="inductor")
    for world in worlds if "ranks" not in without else ():
        pool: Pool | None = None
        for part, precision, mode, saved in rank_cells(parts, world):
            pool = pool or Pool(world)
            row = attempt(
                part, precision, partial(over_ranks, pool=pool, mode=mode, saved=saved), ranks=world, mode=mode, saved=saved
            )
            if row["failed"]:  # an error on one rank has ended the pool
                pool = None
            yield row
        if pool is not None:
            pool.close()


def rank_cells(parts: Sequence[Part], world: int) -> Iterator[tuple[Part, Precision, str, bool]]:
    for part in parts:
        for precision in PRECISIONS:
            yield part, precision, "eager", False
        if world == 2:
            yield part, PRECISIONS[0], "eager", True
            if part.name in _FURTHER:
                yield part, PRECISIONS[0], "aot_eager", False


def attempt(part: Part, precision: Precision, measure: Callable[[Part, Precision], Row | None], **where: Any) -> Row:
    """A cell; without figures where the part has no such feature, and with the error where it ended in one."""
    try:
        row = measure(part, precision)
    except Exception as error:  # of any library: the table says so
        return failed(part, precision, error, **where)
    return row or {**failed(part, precision, "", **where), "value": None, "gradient": None}


def column(precisions: Sequence[Precision], **where: Any) -> Callable[[Row], bool]:
    """Whether a cell belongs into a column of the table: of one of these precisions, and ordinary in all but ``where``."""
    names, wanted = {str(p) for p in precisions}, {**ORDINARY, **where}
    return lambda row: row["precision"] in names and all(row[key] == value for key, value in wanted.items())


_COMPILERS = ("aot_eager", "inductor")
COLUMNS: dict[str, list[Callable[[Row], bool]]] = {
    **{str(p): [column([p])] for p in PRECISIONS},
    "compiled": [column(PRECISIONS[:1], mode=mode) for mode in _COMPILERS],
    "compiled, autocast bf16": [column(PRECISIONS[3:4], mode="aot_eager")],
    **{f"{n} ranks": [column(PRECISIONS[:1], ranks=n)] for n in (2, 3, 4)},
    "ranks, half": [column(PRECISIONS[1:], ranks=n) for n in (2, 3, 4)],
    "2 ranks, compiled": [column(PRECISIONS, ranks=2, mode="aot_eager")],
    "saved, loaded": [column(PRECISIONS[:1], saved=True), column(PRECISIONS[:1], ranks=2, saved=True)],
    "cuda": [column(PRECISIONS, device="cuda")],
}


def figure(rows: Sequence[Row], parts: dict[str, Part]) -> str:
    """The worst value and gradient of some cells; bold where one does not pass."""
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return "-"
    if any(row["failed"] for row in rows):
        return "**fails**"
    passes = all(passed(row, parts[row["part"]]) for row in rows)
    worst = [max((row[key] for row in rows if row[key] is not None), default=None) for key in ("value", "gradient")]
    text = " / ".join(short(x) for x in worst if x is not None)
    return text if passes else f"**{text}**"


def passed(row: Row, part: Part) -> bool:
    precision = next(p for p in PRECISIONS if str(p) == row["precision"])
    limits = tolerance(part, precision)
    return all(row[key] is None or row[key] <= limit for key, limit in zip(("value", "gradient"), limits, strict=True))


def short(error: float) -> str:
    return "0" if error == 0 else "inf" if math.isinf(error) else f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e")


def markdown(rows: Sequence[Row], parts: Sequence[Part]) -> str:
    found = {part.name: part for part in parts}

    def chosen(name: str, part: str | None = None) -> list[Row]:
        return [row for row in rows if part in (None, row["part"]) and any(belongs(row) for belongs in COLUMNS[name])]

    there = [name for name in COLUMNS if chosen(name)]
    lines = [[part.name, *(figure(chosen(name, part.name), found) for name in there)] for part in parts]
    return table(["part", *there], lines)


def main(typed: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts whose name contains one of these")
    parser.add_argument("--without", nargs="*", default=[], choices=["grid", "saved", "compiled", "ranks", "peers"])
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all cells here, and the table beside it as .md")
    args = parser.parse_args(typed)
    torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    others = [] if "peers" in args.without else peers()
    ours, others = (
        [part for part in parts if not args.only or any(word in part.name for word in args.only)] for parts in (PARTS, others)
    )
    rows = []
    for row in measured([*ours, *others], args.without, args.ranks):
        rows.append(row)
        if row["value"] is not None:
            where = ", ".join(f"{row[key]}" for key in ("precision", *ORDINARY))
            said = row["failed"][:120] or f"value {row['value']:.1e}, gradient {row['gradient'] or 0:.1e}"
            print(f"{row['part']}, {where}: {said}", flush=True)
    made = "\n".join(markdown(rows, parts) for parts in (ours, others) if parts)
    print(f"\n{made}")
    seconds = time.perf_counter() - begun
    print(f"{len(rows)} cells in {seconds:.0f} s")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        names = ("torch", "timm", "open_clip_torch", "pytorch-metric-learning")
        versions = {name: version(name) for name in names}
        about = {"seconds": seconds, "python": platform.python_version(), "machine": platform.machine(), "versions": versions}
        args.json.write_text(json.dumps({"about": about, "cells": rows}, indent=1, default=str), encoding="utf-8")
        args.json.with_suffix(".md").write_text(made, encoding="utf-8")


def version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


if __name__ == "__main__":
    main()
