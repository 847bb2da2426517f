"""The recipes: what two processes train is what one trains, and what goes in and out of a training is whole."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import ROOT
from tests.helpers.ranks import Pool
from trm_losses.backbones import HFBackbone

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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += map(str, (tmp_path / "run.py", RECIPES / f"{name}.py", tmp_path))
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


def test_lora_moves_the_tower_and_not_its_weights() -> None:
    """The loss falls below that of the head alone on the same batches; what is merged is a backbone with the same tokens."""
    module = recipe("lora")
    start = module.clip().state_dict()
    model, losses = module.train()
    base = {key.replace("base_model.model.", "").replace(".base_layer", ""): x for key, x in model.state_dict().items()}
    assert all(torch.equal(base.pop(key), value) for key, value in start.items())
    moved = {key for key, x in base.items() if "lora_B" in key and x.abs().max() > 1e-3}  # they start at zero
    assert len(moved) == 4 and all("vision_model" in key and "lora_" in key for key in base)
    assert sum(losses[-3:]) < 0.6 * sum(module.train(rank=0)[1][-3:])
    images = torch.randn(2, 3, module.SIDE, module.SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, before = module.tokens_of(model, images), module.tokens_of(module.clip(), images)
    got = torch.nn.functional.normalize(HFBackbone(model.merge_and_unload())(images).tokens, dim=-1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - before).abs().max() > 0.05


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["webdataset_", pytest.param("datasets_", marks=pytest.mark.nightly)])
def test_every_image_comes_once_with_its_labels(name: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loader gives in an epoch is what was drawn, in another order in the next; a label that is missing is -1."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "datasets_":
        pytest.importorskip("datasets")
    module, pictures = recipe(name), recipe("pictures")
    wanted = {}
    for image, known in pictures.drawn():
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        wanted[pixels.numpy().tobytes()] = [known.get(class_name, -1) for class_name in pictures.NAMES]
    assert len(wanted) == pictures.IMAGES and {-1, 0, 1} == {label for labels in wanted.values() for label in labels}
    torch.manual_seed(0)
    random.seed(0)
    loader, orders = module.loader(module.write(tmp_path), workers), []
    for _ in range(2):
        seen = []
        for images, targets in loader:
            assert len(images) == pictures.BATCH and images.dtype == targets.dtype == torch.float32
            pixels = (255 * images).round().to(torch.uint8)
            seen += [(image.numpy().tobytes(), row) for image, row in zip(pixels, targets.tolist(), strict=True)]
        assert len(seen) == pictures.IMAGES and dict(seen) == wanted
        orders.append([key for key, _ in seen])
    assert orders[0] != orders[1]


def wandb_history(path: Path) -> list[dict[str, float]]:
    """The steps in a file of an offline run: a log of LevelDB's kind, records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, kept, found = path.read_bytes(), 7, b"", []
    while place < len(data):
        if place % 2**15 > 2**15 - 7:
            place += -place % 2**15
        _, length, kind = struct.unpack_from("<IHB", data, place)
        kept, place = kept + data[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(kept).history.item
            found.append({item.nested_key[0]: json.loads(item.value_json) for item in items})
            kept = b""
    return [step for step in found if step]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_keeps_the_figures_of_the_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("WANDB_SILENT", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(key, "true")
    package, module = pytest.importorskip(name), recipe("loggers")
    told: list[dict[str, float]] = []
    with getattr(module, f"{name}_log")(tmp_path) as log:

        def both(figures: dict[str, float], step: int) -> None:
            assert step == len(told)
            told.append(figures)
            log(figures, step)

        module.train(both)
    found: list[dict[str, float]] = [{} for _ in told]
    if name == "wandb":
        package.teardown()  # ends its process
        (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        found = [{key: step[key] for key in told[0]} for step in wandb_history(path)]
    else:
        for path in tmp_path.glob("mlruns/*/*/metrics/*"):
            for line in path.read_text(encoding="utf-8").splitlines():
                _, value, step = line.split()[:3]
                found[int(step)][path.name] = float(value)
    assert len(told) == recipe("tokens").STEPS and {"loss", "matching_query", "contrast"} <= set(told[0])
    assert found == told
