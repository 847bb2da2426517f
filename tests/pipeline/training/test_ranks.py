"""The pipeline under torchrun: two processes follow one, every image is scored once, the first one writes."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import ROOT
from tests.helpers.grid import Means, save_arrays
from tests.helpers.ranks import Pool
from tests.helpers.runs import read_json, typed
from tests.helpers.values import labels, normal
from trm_losses import PseudoLabels
from trm_pipeline import files as checkpoint
from trm_pipeline import methods, ranks
from trm_pipeline.config import presets
from trm_pipeline.config.losses import LOSSES
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.features import cached as features
from trm_pipeline.methods import fit_training_free, grid
from trm_pipeline.methods.base import score
from trm_pipeline.methods.global_head import fit_global_head
from trm_pipeline.run import arguments, cells, experiment, prepared
from trm_pipeline.training import loop as training
from trm_pipeline.training import pseudo_trace

COMMAND = ROOT / "examples" / "reproduce_voc.py"
IMAGES, TEST, CLASSES, WIDTH, TOKENS = 50, 23, 5, 8, 6
SIZES = {"train": 40, "val": 30, "test": 31}
PROTOTYPES = {"pseudo_rule": "prototype", "prototype": {"positive": 0.6, "negative": 0.4}}
MERGED = "trm, merged with the whole image"
# The quick suite takes the first four; "single" stands for single positives.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {"single": True}),
    "trm": ("trm", {"pseudo_rule": "teacher"}),
    "trm, prototypes": ("trm", PROTOTYPES),
    "text-pixel+role": ("text-pixel+role", {}),
    "trm, single positives": ("trm", {**PROTOTYPES, "single": True}),
    MERGED: ("trm", {}),
    **{name: (name, {}) for name in methods.METHODS if name not in ("linear", "trm")},
    **{f"text-pixel+{loss}": (f"text-pixel+{loss}", {}) for loss in LOSSES if loss not in grid.PEERS},
    "trm-query+role": ("trm-query+role", {"single": True}),
}


class Given:
    """Features out of tensors in float64, in batches as those of a cache are."""

    views = 1

    def __init__(self, images: int, seed: int) -> None:
        self.tokens, self.pooled = normal(images, TOKENS, WIDTH, seed=seed), normal(images, WIDTH, seed=seed + 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, *, view: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[features.Batch]:
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for batch in order.split(batch_size):
            index = features.own_part(batch, part)
            yield features.Batch(self.tokens[index], self.pooled[index], index)


def trained(rank: int | None, run: str, folder: str | None = None, stop: bool = False, dropout: float = 0.0) -> dict[str, Any]:
    """52 steps in float64: thirteen batches of four images an epoch, of which the last has two."""
    method, changes = RUNS[run]
    single = changes.get("single", False)
    settings = {
        "epochs": 4,
        "batch_size": 4,
        "pooler": {"dropout": dropout, "num_heads": 2},
        "prompts": "residual",
        "mirror": False,
    }
    settings |= {"pseudo_warmup": 0.2, "pseudo_ramp": 0.2, **changes}
    settings.pop("single", None)
    preset = dataclasses.replace(presets.EMBEDDED, **settings)
    train, test = Given(IMAGES, 1), Given(TEST, 3)
    text = F.normalize(normal(CLASSES, WIDTH, seed=5), dim=-1)
    truth, test_truth = (labels(n, CLASSES, seed=n, soft=False).clamp(min=0) for n in (IMAGES, TEST))
    known = torch.where(torch.rand(truth.shape, generator=torch.Generator().manual_seed(8)) < 0.4, truth, -1.0)
    if single:
        known[known == 0] = -1
    torch.manual_seed(9)
    steps = preset.epochs * -(-IMAGES // preset.batch_size)
    setting = methods.Setting(preset, text.float(), None, 100.0, steps, single=single, num_samples=IMAGES, targets=known)
    setting.similarities = lambda: score(partial(methods.zero_shot_tokens, text=text), train, preset.batch_size)
    setting.estimates = lambda: labels(IMAGES, CLASSES, seed=10, soft=True).clamp(min=0)
    if run == MERGED:
        prior = fit_training_free(train, text, 4)
        setting.global_head = lambda: fit_global_head(train, known, prior, 4, penultimate=False, expected_positives=None)
    built = grid.build_method(method, setting).double()
    if stop:
        original = built.before_epoch

        def before_epoch(epoch: int, *rest: Any) -> None:
            if epoch == 2:
                raise KeyboardInterrupt
            original(epoch, *rest)

        built.before_epoch = before_epoch
    kept = None if folder is None else checkpoint.Checkpoint(Path(folder) / f"{method}.pt", {})
    try:
        result = training.train(
            built,
            train,
            known,
            test,
            test_truth,
            encode=lambda prompts: prompts,
            preset=preset,
            seed=1,
            device=torch.device("cpu"),
            label=method,
            single=single,
            truth=truth,
            checkpoint=kept,
        )
    except KeyboardInterrupt:
        return {}
    return {"state": result.method.state_dict(), "metrics": result.metrics, "trace": result.trace}


def same(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Weights and prototypes bit for bit between ranks, and those of one process to 1e-6; scores and counts too."""
    for key, value in one["state"].items():
        assert all(torch.equal(found[0]["state"][key], other["state"][key]) for other in found[1:]), key
        torch.testing.assert_close(found[0]["state"][key], value, rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    for rank in found:
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-3) and rank["trace"] == one["trace"]


NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in list(RUNS)[4:] if name != MERGED]


@pytest.mark.parametrize("run", [*list(RUNS)[:4], *NIGHTLY])
def test_two_processes_follow_one(pools: Callable[[int], Pool], run: str) -> None:
    same(pools(2).run(trained, run), one := trained(None, run))
    assert bool(one["trace"]) == (run in ("trm", "trm-paper") or run.startswith("trm, "))


def test_two_processes_finish_as_one(pools: Callable[[int], Pool]) -> None:
    """The whole image is taught by the scores of all images; its fit ends as near to the minimum as single precision finds it."""
    found, one = pools(2).run(trained, MERGED), trained(None, MERGED)
    assert one["state"]["finished"] and one["state"]["head.total"] == IMAGES
    for key, value in one["state"].items():
        assert torch.equal(found[0]["state"][key], found[1]["state"][key]), key
        torch.testing.assert_close(found[0]["state"][key], value, rtol=2e-2, atol=2e-2, msg=lambda m, key=key: f"{key}: {m}")
    assert found[0]["metrics"] == found[1]["metrics"] == pytest.approx(one["metrics"], abs=1)


@pytest.mark.nightly
@pytest.mark.parametrize("run", ["linear", "trm", "trm, prototypes"])
def test_four_processes_follow_one(pools: Callable[[int], Pool], run: str) -> None:
    """Of which two have nothing of the last batch."""
    same(pools(4).run(trained, run), trained(None, run))


def test_a_resumed_run_is_the_unbroken_one(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    """Bit for bit, each rank with the dropout of its own."""
    pool, folder = pools(2), str(tmp_path)
    unbroken = pool.run(trained, "trm, prototypes", None, False, 0.2)
    assert pool.run(trained, "trm, prototypes", folder, True, 0.2) == [{}, {}]
    resumed = pool.run(trained, "trm, prototypes", folder, False, 0.2)
    for a, b in zip(unbroken, resumed, strict=True):
        assert all(torch.equal(value, b["state"][key]) for key, value in a["state"].items())
        assert a["metrics"] == b["metrics"] and a["trace"] == b["trace"]


def traced(rank: int) -> list[pseudo_trace.Point]:
    """Two images of four each, where tensors on a CPU cannot be added up over ranks, as with NCCL."""
    truth, unknown = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), torch.full((2, 2), -1.0)
    said = torch.tensor([[0.9, 0.9], [0.8, -1.0]])
    trace, index = pseudo_trace.PseudoTrace(truth), torch.arange(4).view(2, 2)[rank]
    trace.add(PseudoLabels(said, torch.ones(2, 2), said), unknown, index)
    original = dist.all_reduce
    dist.all_reduce = None
    try:
        trace.point(1)
    finally:
        dist.all_reduce = original
    return trace.points


def test_pseudo_labels_of_all_ranks_are_counted(pools: Callable[[int], Pool]) -> None:
    point = {"step": 1, "positive_precision": 0.5, "positive_recall": 0.75, "negative_precision": None, "negative_recall": 0.0}
    assert pools(2).run(traced) == 2 * [[{**point, "decided": 6}]]


def helpers(rank: int) -> dict[str, Any]:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank:
        parameters[1].grad = torch.tensor([4.0, 6.0])
    ranks.average_gradients(parameters)
    seeds = torch.Generator().manual_seed(0)
    return {
        "who": (ranks.rank(), ranks.world(), ranks.first(), ranks.group() is not None),
        "gradients": [p.grad if p.grad is None else p.grad.tolist() for p in parameters],
        "gathered": (ranks.gather(rank + 5), ranks.from_first(rank + 5), ranks.total(torch.tensor(rank + 5)).item()),
        "index": [batch.index for batch in ranks.batches(Given(TEST, 3), 4, seeds)],
        "scores": score(lambda batch: batch.pooled, Given(TEST, 3), 4),
    }


def test_each_rank_takes_its_part(pools: Callable[[int], Pool]) -> None:
    answers = pools(2).run(helpers)
    order = torch.randperm(TEST, generator=torch.Generator().manual_seed(0)).split(4)
    for step, batch in enumerate(order):
        assert torch.equal(torch.cat([answer["index"][step] for answer in answers]), batch)
    for rank, answer in enumerate(answers):
        assert answer["who"] == (rank, 2, rank == 0, True)
        assert answer["gradients"] == [[1.5, 3.0], [2.0, 3.0], None]
        assert answer["gathered"] == ([5, 6], 5, 11)
        assert torch.equal(answer["scores"], Given(TEST, 3).pooled.float())  # every image once, in order


def test_one_process_needs_no_other() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    ranks.average_gradients([weight])
    assert (ranks.rank(), ranks.world(), ranks.first(), ranks.group(), weight.grad) == (0, 1, True, None, None)
    assert ranks.gather(3) == [3] and ranks.from_first(3) == 3 and ranks.start("cpu") == "cpu"
    with ranks.first_before_others():
        assert [len(batch.index) for batch in ranks.batches(Given(5, 3), 4)] == [4, 1]


def test_jobs_are_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="--jobs must be 1 under torchrun, .*; got 2"):
        experiment.main(["--jobs", "2", "--device", "cpu", "--output", str(tmp_path)])


@pytest.mark.parametrize("chosen", [["--methods", "linear", "linear+scpnet"], ["--grid"]])
def test_peers_of_one_process_are_refused_under_torchrun(chosen: list[str], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match=r"--methods: linear\+scpnet is trained by one process, not under torchrun"):
        experiment.main([*chosen, "--device", "cpu", "--output", str(tmp_path)])


def test_a_cell_ends_alike_on_ranks_that_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    method = torch.nn.Linear(3, 2)
    monkeypatch.setattr(cells, "train_with_checkpoint", lambda *_, **__: training.Trained(method, {"mAP": 51.25}, 7.0, []))
    monkeypatch.setattr(ranks, "first", lambda: False)
    data = types.SimpleNamespace(device=torch.device("cpu"), preset=presets.EMBEDDED)
    finished = cells.run_cell(data, prepared.Cell("linear", 0.5, 1), arguments.parse([]))  # type: ignore[arg-type]
    assert (finished.row["mAP"], finished.seconds, finished.parameters) == (51.25, 7.0, 8)


# The parts of batches, as features are read


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawn_voc(tmp_path_factory.mktemp("ranks"), sizes=SIZES, workers=1)


class Images(torch.utils.data.Dataset[tuple[Tensor, Tensor, int]]):
    """Pictures that show their number."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return torch.full((3, 4, 4), float(index)) + torch.rand(3, 4, 4), torch.zeros(2), index


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kind", ["cached", "live"])
def test_parts_make_up_the_batches(kind: str, seed: int | None, tmp_path: Path) -> None:
    """Whatever the number of ranks: the same images, transformations and draws; of nine by four the last batch has one."""
    if kind == "cached":
        sizes = {"tokens": (2, 3), "pooled": (3,), "penultimate": (5,)}
        one = {name: np.arange(9 * math.prod(size)).reshape(9, *size) for name, size in sizes.items()}
        save_arrays(tmp_path, **{name: [array, 10 + array] for name, array in one.items()})
        read: Any = features.CachedFeatures.from_folder(tmp_path, 2, torch.device("cpu"))
    else:
        read = features.LiveFeatures(Images(), Means(), token_pool=1, device=torch.device("cpu"), workers=0)

    def epoch(rank: int, world: int) -> tuple[list[features.Batch], Tensor]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        torch.manual_seed(0)
        found = list(read.batches(4, generator, part=(rank, world)))
        return found, torch.zeros(0) if generator is None else generator.get_state()

    whole, after = epoch(0, 1)
    assert [len(batch.index) for batch in whole] == [4, 4, 1]
    for world in (2, 3, 4):
        parts = [epoch(rank, world) for rank in range(world)]
        assert all(torch.equal(state, after) for _, state in parts)
        for step, batch in enumerate(whole):
            joined = [torch.cat(values) for values in zip(*(part[step] for part, _ in parts), strict=True)]
            assert torch.equal(joined[2], batch.index)
            torch.testing.assert_close(joined[:2], [batch.tokens, batch.pooled])


# The command


# The first rank stops behind its first checkpoint of trm until the test has looked: a quick run would be over by then.
HELD = """
import os, sys, time
from pathlib import Path
from trm_pipeline.files import Checkpoint
from trm_pipeline.run import experiment

folder = Path(sys.argv.pop(1))
(folder / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
save = Checkpoint.save

def held(self, state):
    save(self, state)
    if self.path.name.startswith("trm-k"):
        (folder / "held").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)

Checkpoint.save = held
experiment.main()
"""


def launch(drawn: Path, output: Path, *arguments: str, script: tuple[Path, ...] = (COMMAND,)) -> subprocess.Popen[str]:
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", *typed(nproc_per_node=2), *map(str, script)]
    options = typed(data_root=drawn, preset="embedded", device="cpu", cache=output.parent / "cache", output=output, known=0.5)
    command, environment = [*ranks, *options, *arguments], {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


ARGUMENTS = ("--methods", "zero-shot-tokens", "linear", "trm", "--epochs", "8", "--set", "batch_size=13", "pooler.dropout=0")


@pytest.fixture(scope="session")
def unbroken(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    out, error = (process := launch(drawn, output, *ARGUMENTS, "--unseen", "4")).communicate(timeout=400)
    assert process.returncode == 0, error
    return output, out


@pytest.mark.nightly
def test_torchrun_gives_the_table_of_one_process(unbroken: tuple[Path, str], drawn: Path, tmp_path: Path) -> None:
    """Each line is said and each file written once; rows are those of one process but for rounding."""
    output, out = unbroken
    assert sum(line.startswith("trm, 50%, seed 1: mAP") for line in out.splitlines()) == 1
    assert out.count("mAP (%) on the test") == 1
    assert (output / "report.html").is_file() and (output / "trm-known0.5-seed1.pt").is_file()
    options = typed(data_root=drawn, preset="embedded", device="cpu", cache=output.parent / "cache", output=tmp_path, known=0.5)
    experiment.main([*options, *ARGUMENTS, "--unseen", "4"])
    for name in ("results.json", "unseen/trm-unseen4-known0.5-seed1.json"):
        two, one = (read_json(folder / name) for folder in (output, tmp_path))
        two, one = ((value if isinstance(value, list) else [value]) for value in (two, one))
        for a, b in zip(two, one, strict=True):
            assert a.keys() == b.keys()
            for key, value in b.items():
                assert a[key] == (pytest.approx(value, abs=0.3) if isinstance(value, float) else value), key


@pytest.mark.nightly
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_run(
    how: signal.Signals, unbroken: tuple[Path, str], drawn: Path, tmp_path: Path
) -> None:
    """With a message; what was done goes on from its checkpoint, to the results of the unbroken run."""
    (tmp_path / "cache").symlink_to(unbroken[0].parent / "cache")
    (tmp_path / "held.py").write_text(HELD, encoding="utf-8")
    process = launch(drawn, tmp_path / "out", *ARGUMENTS, "--unseen", "4", script=(tmp_path / "held.py", tmp_path))
    while not (tmp_path / "held").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.kill(int((tmp_path / "rank1").read_text(encoding="utf-8")), how)
    (tmp_path / "go").touch()
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in error if how == signal.SIGKILL else "--resume goes on from here" in error
    _, error = (resumed := launch(drawn, tmp_path / "out", *ARGUMENTS, "--unseen", "4", "--resume")).communicate(timeout=400)
    assert resumed.returncode == 0, error
    assert (tmp_path / "out" / "results.json").read_bytes() == (unbroken[0] / "results.json").read_bytes()
