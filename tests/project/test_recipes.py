"""The recipes: what two processes train is what one trains."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import ROOT
from tests.helpers.ranks import Pool

RECIPES = ROOT / "examples" / "recipes"


def recipe(name: str) -> Any:
    """A script as a module; its neighbours stand beside it, as for Python when it runs one."""
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPES))


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the parts of FSDP2."""
    return {key: x.full_tensor() if hasattr(x, "full_tensor") else x.clone() for key, x in state.items()}


def trained(rank: int, name: str) -> dict[str, Tensor]:
    return whole(recipe(name).train().state_dict())


def in_one_process() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The ordinary loop over the joined batches: state before and after."""
    tokens = recipe("tokens")
    data, text = tokens.drawn()
    objective = tokens.built(text)
    start = whole(objective.state_dict())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for images in tokens.batches():
        output = objective(data[images][0], text, data[images][1])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.update(output)
    return start, whole(objective.state_dict())


def check(ranks: list[dict[str, Tensor]]) -> None:
    start, one = in_one_process()
    for state in ranks:
        assert set(state) == set(one)
        for key, value in one.items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    moved = {key: float((value.double() - start[key].double()).abs().max()) for key, value in one.items()}
    assert sum(change > 5e-3 for change in moved.values()) > 10, moved  # against which the tolerance is small


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(pools: Callable[[int], Pool], name: str) -> None:
    check(pools(2).run(trained, name))


SAVES = """
import os, runpy, sys, torch
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import tokens
made, original = [], tokens.built
tokens.built = lambda text: made.append(original(text)) or made[-1]
runpy.run_path(sys.argv[1], run_name="__main__")
state = {key: x.full_tensor() if hasattr(x, "full_tensor") else x for key, x in made[0].state_dict().items()}
torch.save(state, f"{sys.argv[2]}/{os.environ['RANK']}.pt")
"""


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["ddp", "fabric", "accelerate_"])
def test_the_command_of_a_recipe(name: str, tmp_path: Path) -> None:
    """Under torchrun, as it stands in the script's first line; the state of each process is kept when the script is through."""
    package = {"fabric": "lightning", "accelerate_": "accelerate"}.get(name, "torch")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    (tmp_path / "run.py").write_text(SAVES, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "run.py"),
        str(RECIPES / f"{name}.py"),
        str(tmp_path),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    check([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)])


def test_lightning_trains_as_a_plain_loop() -> None:
    check([trained(0, "lightning_module")])


def test_the_last_block_learns_and_nothing_before_it() -> None:
    module = recipe("last_block")
    torch.manual_seed(0)
    module.drawn()
    start = module.Tower().state_dict()
    tower, losses = module.train()
    changed = {
        name.split(".")[0] + name.split(".")[1]
        for name, value in tower.state_dict().items()
        if not torch.equal(value, start[name])
    }
    assert changed == {"blocks2"}
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
