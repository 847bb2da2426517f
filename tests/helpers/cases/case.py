"""One case of a Module: how to build and call it, its oracle, its pure twin, and the inputs it must refuse."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.values import CLASSES, Inputs, Result


@dataclass
class Case:
    """``build(classes)`` and ``inputs(batch, classes)`` in float64; ``call`` gives a tensor or a tuple of tensors. ``smooth``: no
    gradient to what ``learns`` is stopped, so that gradcheck agrees. ``decides``: a rounding may turn a decision over, and with
    it the value; ``nan``: it may say NaN; ``pure``: it looks at no values."""

    name: str
    build: Callable[[int], Any]
    inputs: Callable[[int, int], Inputs]
    call: Callable[[Any, Inputs], Result]
    owner: str
    state: tuple[str, ...] = ()
    oracle: Callable[[Any, Inputs], Any] | None = None
    twin: Callable[[Any, Inputs], Result] | None = None
    learns: tuple[str, ...] = ()
    smooth: bool = True
    decides: bool = False
    nan: bool = False
    pure: bool = False
    wrong: dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]] = field(default_factory=dict)
    is_loss: bool = False
    compiles: bool = True
    finite: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name


def change(name: str, function: Callable[[Tensor], Any]) -> Callable[[Inputs], Inputs]:
    """The inputs with one of them changed; skipped parts stay."""
    return lambda inputs: {**inputs, name: function(inputs[name])}


def refused(**letters: str) -> dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]]:
    """What every tensor argument must refuse by name: another size, another rank, integers, another device, no tensor."""
    table: dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]] = {}
    for name, shape in letters.items():
        wanted = shape.replace(" ", ", ")
        last = len(shape.split()) - 1
        table[f"{name}: size"] = (
            change(name, lambda x, d=last: torch.cat([x, x.narrow(d, 0, 1)], dim=d)),
            ValueError,
            r"must have shape \(.*\) = \(.*\), got \(",  # of this one, or of the next that no longer fits it
        )
        table[f"{name}: rank"] = (change(name, lambda x: x[None]), ValueError, rf"{name} must have shape \({wanted},?\)")
        table[f"{name}: list"] = (change(name, lambda x: x.tolist()), TypeError, f"{name} must be a torch.Tensor, got list")
        table[f"{name}: device"] = (change(name, lambda x: x.to("meta")), ValueError, "is on .*, the other tensors are on")
    return table


def integers(*names: str) -> dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]]:
    return {
        f"{name}: integer": (
            change(name, lambda x: x.to(torch.int64)),
            TypeError,
            rf"{name} must be a floating-point tensor, got torch.int64",
        )
        for name in names
    }


def encodings(name: str = "targets") -> dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]]:
    """Label values that the encoding does not have."""

    def put(value: float) -> Callable[[Tensor], Tensor]:
        def function(y: Tensor) -> Tensor:
            y = y.clone()
            y[0, 0] = value
            return y

        return function

    return {
        f"{name}: {value}": (change(name, put(value)), ValueError, rf"{name} must be 1 \(present\).*, got {value:g}")
        for value in (2.0, -0.5, -2.0, float("nan"))
    }


def ids(value: Any) -> str:
    return str(value).replace(" ", "-")


def built(case: Case, classes: int = CLASSES, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return case.build(classes).to(dtype)


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """Nothing but tensors and plain values is in it, or ``weights_only`` would refuse."""
    file = io.BytesIO()
    torch.save(state, file)
    read: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return read


class Caller(nn.Module):
    """The call of a case, or of whatever has one, as a module, for ``functional_call`` and ``torch.compile``."""

    def __init__(self, case: Any, module: nn.Module) -> None:
        super().__init__()
        self.case, self.module = case, module

    def forward(self, inputs: Inputs) -> Any:
        return self.case.call(self.module, inputs)
