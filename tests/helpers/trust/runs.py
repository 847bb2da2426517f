"""One part in one setting against float64 in one process: in half precision, compiled, saved and loaded, over ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.cases.case import Caller, through_file
from tests.helpers.ranks import Pool, spread
from tests.helpers.trust.parts import BATCH, EXACT, PARTS, PRECISIONS, Inputs, Part, Precision, Row, Setting
from tests.helpers.trust.peers import peers

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
    fresh = prepared(part, part.setting, precision)
    for x in fresh.state_dict().values():
        x.zero_()
    fresh.load_state_dict(through_file(module.state_dict()))
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


def joint(part: Part, module: nn.Module) -> nn.Module | None:
    """The part over all ranks; None where it has no such feature."""
    if part.ranks is not None:
        return part.ranks(module)
    able = any(hasattr(inner, "distributed") for inner in module.modules())
    return spread(module) if able and part.kind != "rows" else None


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
    over = joint(part, reloaded(part, module, precision) if saved else module)
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


# What is close enough ---------------------------------------------------------------------------------------------------------

# Largest errors (value, gradient) that pass. Values are computed in float32 from what half precision holds; a gradient is rounded
# to the precision of its tensor; what goes through matrix products in half precision is as far off as any layer.
_PASS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-4, 1e-2), torch.float16: (1e-4, 2e-3)}
_PASS_PRODUCTS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.4), torch.float16: (0.02, 0.05)}


def tolerance(part: Part, precision: Precision) -> tuple[float, float]:
    return (_PASS_PRODUCTS if part.products else _PASS)[precision.dtype]


def passed(row: Row, part: Part) -> bool:
    precision = next(p for p in PRECISIONS if str(p) == row["precision"])
    limits = tolerance(part, precision)
    return all(row[key] is None or row[key] <= limit for key, limit in zip(("value", "gradient"), limits, strict=True))
