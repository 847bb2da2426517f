"""The wording of refusals: owner, name, what was wanted, what came, the likely fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trm_losses._checks import Dims, check_choice, check_finite, check_ids, check_number, check_targets


def message(function: Any, *arguments: Any, error: type[Exception] = ValueError, **settings: Any) -> str:
    with pytest.raises(error) as caught:
        function(*arguments, **settings)
    return str(caught.value)


def test_sizes_come_from_the_caller_and_from_earlier_tensors() -> None:
    dims = Dims("Loss", C=20)
    assert message(dims.check, "text", torch.ones(19, 512), "C D") == (
        "Loss: text must have shape (C, D) = (20, D), got (19, 512)"
    )
    dims.check("text", torch.ones(20, 512), "C D")
    assert message(dims.check, "regions", torch.ones(2, 20, 768), "B C D", hint="same width") == (
        "Loss: regions must have shape (B, C, D) = (B, 20, 512), got (2, 20, 768); same width"
    )
    dims.check("regions", torch.ones(2, 20, 512), "B C D")
    assert dims.sizes == {"C": 20, "D": 512, "B": 2}
    assert message(dims.check, "weights", torch.ones(20), "B C") == ("Loss: weights must have shape (B, C) = (2, 20), got (20,)")


def test_what_is_no_float_tensor() -> None:
    dims = Dims("Loss")
    assert message(dims.check, "x", [1.0], "B", error=TypeError) == "Loss: x must be a torch.Tensor, got list"
    assert message(dims.check, "x", torch.ones(2, dtype=torch.int8), "B", error=TypeError) == (
        "Loss: x must be a floating-point tensor, got torch.int8; call x.float()"
    )
    dims.check("x", torch.ones(2, dtype=torch.int8), "B", floating=False)


def test_devices_must_agree() -> None:
    dims = Dims("Loss")
    dims.check("x", torch.ones(2), "B")
    assert message(dims.check, "y", torch.ones(2, device="meta"), "B") == (
        "Loss: y is on meta, the other tensors are on cpu; move it with y.to('cpu')"
    )


def test_finite() -> None:
    check_finite("Loss", "x", torch.ones(2))
    text = message(check_finite, "Loss", "x", torch.tensor([1.0, float("nan"), -float("inf")]))
    assert text.startswith("Loss: x must be finite, got 2 NaN or infinite of 3 values") and "validate=False" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_finds_any_value_and_takes_any_size(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for values in ([], [most] * 5, [-most] * 5, [most, -most, 0.0]):
        check_finite("Loss", "x", torch.tensor(values, dtype=dtype))
    for bad in ([float("nan")], [float("inf")], [-float("inf")], [float("inf"), -float("inf")]):
        for place in (0, 17, 130):
            x = torch.full((131 + len(bad),), most / 200, dtype=dtype)
            x[place : place + len(bad)] = torch.tensor(bad)
            assert f"got {len(bad)} NaN or infinite of" in message(check_finite, "Loss", "x", x)


@pytest.mark.parametrize("value", [2.0, -0.5, -2.0, 1.01, float("nan"), float("inf")])
def test_targets(value: float) -> None:
    check_targets("Loss", torch.tensor([[1.0, 0.0, -1.0, 0.3]]))
    check_targets("Loss", torch.tensor([[1, 0, -1]]))
    check_targets("Loss", torch.tensor([[True, False]]))
    text = message(check_targets, "Loss", torch.tensor([[1.0, value]], dtype=torch.float64))
    assert text.startswith("Loss: targets must be 1 (present), 0 (absent), between (soft) or -1 (unknown), got")
    assert f"got {value};" in text and "trm_losses.labels" in text


def test_missing_labels_of_pandas_are_led_to_their_converter() -> None:
    assert message(check_targets, "Loss", torch.tensor([float("nan")])).endswith("trm_losses.labels.from_nan makes NaN unknown")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_rounding_outside_is_the_end(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    found = check_targets("Loss", torch.tensor([1 + step, -step, 1.0, 0.0, 0.5, -1.0], dtype=dtype))
    assert found.tolist() == [1, 0, 1, 0, 0.5, -1]
    for value in (1 + 2 * step, -2 * step, -1 + step, -1 - 2 * step):
        text = message(check_targets, "Loss", torch.tensor([value], dtype=dtype))
        assert float(text.partition("got ")[2].partition(";")[0]) == value, "enough digits to tell it from a label"


def test_numbers_and_words() -> None:
    check_number("Loss", "k", 1, 0)
    check_number("Loss", "k", 0, 0, 1)
    check_number("Loss", "k", 5)
    assert message(check_number, "Loss", "k", -1, 0) == "Loss: k must be at least 0, got -1"
    assert message(check_number, "Loss", "k", 2, 0, 1) == "Loss: k must be at least 0 and at most 1, got 2"
    assert message(check_number, "Loss", "k", 0, 0, strict=True) == "Loss: k must be above 0, got 0"
    assert message(check_number, "Loss", "k", 3, None, 1) == "Loss: k must be at most 1, got 3"
    assert "got nan" in message(check_number, "Loss", "k", float("nan"), 0)
    check_choice("Loss", "mode", "a", ("a", "b"))
    assert message(check_choice, "Loss", "mode", "c", ("a", "b")) == "Loss: mode must be one of 'a', 'b', got 'c'"


def test_nothing_waits_inside_a_compiled_graph() -> None:
    """Labels are read as outside of one: 255 of uint8 as unknown, a rounding above 1 as 1."""
    torch._dynamo.reset()

    def function(x: torch.Tensor) -> torch.Tensor:
        check_finite("Loss", "x", x)
        return Dims("Loss").targets(x, "B", validate=True) + 1

    run = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = run(torch.tensor([float("nan"), 7.0, 1.0000001]))
    assert torch.isnan(found[0]) and found[1:].tolist() == [8, 2]
    assert run(torch.tensor([1, 0, 255], dtype=torch.uint8)).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="x must be finite"):
        function(torch.tensor([float("nan")]))


def test_ids() -> None:
    check_ids("Loss", torch.tensor([0, 2, 2]), 3)
    check_ids("Loss", torch.tensor([-1, 7]))  # of which nothing is looked up
    assert message(check_ids, "Loss", torch.ones(2), error=TypeError) == "Loss: ids must be int64, got torch.float32"
    assert message(check_ids, "Loss", torch.tensor([1, 3]), 3) == "Loss: ids must be from 0 to num_samples - 1 = 2, got 1 to 3"
    assert message(check_ids, "Loss", torch.tensor([-1, 1]), 3) == "Loss: ids must be from 0 to num_samples - 1 = 2, got -1 to 1"
