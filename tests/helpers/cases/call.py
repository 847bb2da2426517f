"""Cases, built and called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.cases.case import Case
from tests.helpers.values import CLASSES, Inputs


def ids(value: Any) -> str:
    return str(value).replace(" ", "-")


def built(case: Case, classes: int = CLASSES, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return case.build(classes).to(dtype)


class Caller(nn.Module):
    """A case's call as a module, for ``functional_call`` and ``torch.compile``."""

    def __init__(self, case: Case, module: nn.Module) -> None:
        super().__init__()
        self.case, self.module = case, module

    def forward(self, inputs: Inputs) -> Any:
        return self.case.call(self.module, inputs)
