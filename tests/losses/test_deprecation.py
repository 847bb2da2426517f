"""Names on their way out warn, go on working, and are otherwise what they were."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import Tensor, nn

from trm_losses._deprecation import deprecated

old = deprecated(since="0.2", removed_in="0.3", use="new")
SAYS = r"is deprecated since 0\.2 and goes in 0\.3; use new$"


@old
def double(x: Tensor, *, times: int = 2) -> Tensor:
    """Twice as much."""
    return times * x


@old
class Doubled(nn.Module):
    """Twice as much, as a module."""

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return self.times * x


def test_a_function_warns_at_the_line_that_calls_it() -> None:
    with pytest.warns(DeprecationWarning, match="^double " + SAYS) as caught:
        assert double(torch.ones(()), times=3) == 3
    assert [warning.filename for warning in caught] == [__file__]
    assert double.__name__ == "double" and double.__doc__ == "Twice as much."
    assert list(inspect.signature(double).parameters) == ["x", "times"]


def test_a_class_warns_when_an_object_is_made_and_not_when_it_is_used() -> None:
    with pytest.warns(DeprecationWarning, match="^Doubled " + SAYS) as caught:
        made = Doubled(times=5)
    assert [warning.filename for warning in caught] == [__file__]
    assert isinstance(made, Doubled) and list(inspect.signature(Doubled).parameters) == ["times"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy(made)(torch.ones(())) == 5


def test_an_heir_warns_too() -> None:
    class Heir(Doubled):
        pass

    with pytest.warns(DeprecationWarning, match="^Doubled "):
        Heir()


def test_compiled_code_stays_one_graph() -> None:
    whole = torch.compile(lambda x: double(x), fullgraph=True, backend="eager")
    assert whole(torch.ones(())) == 2
