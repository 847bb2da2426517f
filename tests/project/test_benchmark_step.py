"""The benchmark of a whole step: both sides compute the same, step after step, and so does ours taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.runs import read_json

TERMS = ["contrast", "distillation", "matching_query", "matching_region", "pseudo_query", "pseudo_region"]


@pytest.fixture
def step(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("open_clip")
    return benchmark_script("step")


@pytest.fixture
def backbone(step: ModuleType) -> Any:
    made = step.small_model(step.TOWERS["tiny"])
    made.model.double()
    return made


def test_both_sides_agree_step_after_step(step: ModuleType, backbone: Any) -> None:
    """Values and gradients in float64, and the statistics too: Adam makes steps of what float32 rounds in them."""
    model, tokens, targets = step.build(step.SIZES["tiny"], backbone)
    for module in model.objective.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.double()
    pseudo = model.objective(tokens, backbone.encode_prompts(model.prompts()), targets).pseudo
    unknown = targets == -1
    for found in (pseudo.targets > 0, pseudo.targets == 0, unknown & (pseudo.targets == -1), (targets == 1), (targets == 0)):
        assert found.any()  # every kind of entry takes part
    sides = model.copy(), model.copy()
    for count in range(3):
        results = []
        for side, once in zip(sides, (step.our_step, step.usual_step), strict=True):
            torch.manual_seed(count)  # the same dropout
            results.append(once(side, tokens, targets))
        ours, theirs = results
        assert len(ours) == len(theirs) == len(TERMS) + len(model.parameters())
        for got, wanted in zip(ours, theirs, strict=True):
            assert got.dtype == torch.float64 and wanted.abs().max() > 0
            assert (got - wanted).abs().max() <= 1e-8 * wanted.abs().max()
        states = [side.objective.state_dict() for side in sides]
        for key, got in states[0].items():
            torch.testing.assert_close(got, states[1][key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    before, after = model.objective.bank.visual, sides[0].objective.bank.visual
    assert not torch.equal(before, after) and not torch.equal(model.prompts.context, sides[0].prompts.context)


@pytest.mark.parametrize("side", ["OURS", "USUAL"])
def test_a_step_in_parts_is_the_step(step: ModuleType, backbone: Any, side: str) -> None:
    model, tokens, targets = step.build(step.SIZES["tiny"], backbone)
    whole, apart, done = model.copy(), model.copy(), getattr(step, side)
    torch.manual_seed(0)
    wanted = done.step(whole, tokens, targets)
    torch.manual_seed(0)
    seconds, got = step.in_parts(done, apart, tokens, targets)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(apart.objective.state_dict(), whole.objective.state_dict(), rtol=1e-6, atol=1e-9)
    assert not apart.objective.contrast._forward_hooks and not apart.objective.labeler._forward_pre_hooks
    assert set(seconds) == {
        *("text tower", "pooler", "matching and distillation", "contrast", "bank and labeller", "optimiser")
    } and all(value > 0 for value in seconds.values())


def test_time_inside_another_part_is_counted_once(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[int] = iter([0, 10, 13, 20, 24, 100])
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(times))
    clock, module = step.Clock(), torch.nn.Identity()
    hooks = clock.hook(module, "inner")
    with clock.part("outer"):
        module(torch.zeros(1))
        module(torch.zeros(1))
    for hook in hooks:
        hook.remove()
    assert clock.seconds == {"inner": 3 + 4, "outer": 100 - 7}


def test_what_a_part_holds_is_not_counted_to_the_part_around_it(step: ModuleType) -> None:
    clock, kept = step.Clock(), []

    def work() -> None:
        with clock.part("outer"):
            kept.append(torch.zeros(1 << 18))
            with clock.part("inner"):
                kept.append(torch.zeros(1 << 19))
                torch.zeros(1 << 18)
        with clock.part("outer"):
            kept.append(torch.zeros(1 << 18))
            del kept[0]

    assert {name: round(held / 2**20, 2) for name, held in step.held_by_part(work).items()} == {"outer": 2, "inner": 3}


def test_figures(step: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    typed = ["--sizes", "tiny", "--rounds", "2", "--warmup", "0", "--threads", str(torch.get_num_threads()), "--json", str(file)]
    step.main(typed)
    figures = read_json(file)
    (row,) = figures["pairs"]
    assert row["difference"] < 2e-3 and row["time_ratio"] > 0 and row["memory_ratio"] > 0 and row["peak_mib"] > 0
    assert abs(sum(part["share"] for part in figures["parts"]) - 1) < 1e-9 and len(figures["parts"]) == 6
    assert all(part["time_ratio"] > 0 and part["peer_seconds"] > 0 for part in figures["parts"])
    assert all(part["peak_mib"] > 0 and part["peer_peak_mib"] > 0 for part in figures["parts"] if part["part"] != "optimiser")
    usual = step.usual_contrast
    monkeypatch.setattr(step, "usual_contrast", lambda *given: 1.01 * usual(*given))
    file.unlink()
    with pytest.raises(SystemExit, match="research code differ by .* not timed"):
        step.main(typed)
    assert not file.exists()
