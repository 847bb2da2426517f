"""One cell of a run's table: a method in a setting with a seed, in this process or in several beside each other."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from trm_losses.labels import known_fraction
from trm_losses.metrics import evaluate
from trm_pipeline import ranks
from trm_pipeline.config.presets import VARIANTS, Preset
from trm_pipeline.config.settings import override
from trm_pipeline.features.cached import cores
from trm_pipeline.files import Checkpoint, tensor_digest, write_json
from trm_pipeline.methods import LABEL_FREE
from trm_pipeline.methods.base import score
from trm_pipeline.methods.global_head import FITTED, global_logits, trm_head
from trm_pipeline.progress import escape_output, say, without_bars
from trm_pipeline.report.rows import Row
from trm_pipeline.run.choose import choose
from trm_pipeline.run.options import RunOptions
from trm_pipeline.run.prepared import Cell, Prepared, known_labels, train_cell
from trm_pipeline.training.cost import trained_parameters, watch_memory
from trm_pipeline.training.loop import Trained


class Finished(NamedTuple):
    """A cell with its row of the table, the seconds its training took, the peak of memory (see
    :func:`~trm_pipeline.training.cost.watch_memory`) and the number of trained parameters."""

    cell: Cell
    row: Row
    seconds: float
    peak_mib: float | None = None
    parameters: int = 0

    @property
    def cost(self) -> dict[str, float | None]:
        """A line of ``times.json``, beside the cell."""
        return {"seconds": self.seconds, "peak_mib": self.peak_mib, "parameters": self.parameters}


def checkpoint_path(output: Path, cell: Cell) -> Path:
    """Where a cell in progress keeps its state."""
    return output / "checkpoints" / f"{cell.name}.pt"


def run_cell(data: Prepared, cell: Cell, options: RunOptions) -> Finished:
    """Train and score a cell; whatever else it leaves behind is on disk before it counts as finished."""
    single = cell.known == "single"
    metrics: Mapping[str, float | None]
    peak, parameters = None, 0
    if cell.method in LABEL_FREE:
        metrics, seconds = _label_free(data, cell.method)
    elif cell.method in FITTED:
        metrics, seconds = _fitted(data, cell, options)
    else:
        read_peak = watch_memory(data.device)
        metrics, seconds, parameters = _trained(data, cell, options)
        peak = read_peak()
    figures = {key: None if value is None else round(value, 3) for key, value in metrics.items()}
    expected = data.preset.expected_positives if single else None
    expected = expected and min(expected, float(len(data.class_names)))  # what a preset assumes may be more than there are
    row: Row = {**cell.record, **figures, "expected_positives": expected}
    return Finished(cell, row, round(seconds, 2), None if peak is None else round(peak, 1), parameters)


def _label_free(data: Prepared, method: str) -> tuple[dict[str, float | None], float]:
    """Metrics of a classifier that learns nothing of labels, and so is the same in every setting, and its seconds."""
    if method not in data.label_free:
        started = time.perf_counter()
        logits = score(data.label_free_scores(method), data.test_features, data.preset.batch_size)
        metrics: dict[str, float | None] = dict(evaluate(logits, data.test_targets, threshold=0.0))
        # A cosine ranks images, but has no level above which a class counts as present.
        metrics |= dict.fromkeys(("OF1", "CF1", "CF1_per_class"), None)
        metrics["best_epoch_mAP"] = metrics["mAP"]
        say(f"{method}: mAP {metrics['mAP']:.1f}")
        data.label_free[method] = metrics, time.perf_counter() - started
    return data.label_free[method]


def _preset(data: Prepared, cell: Cell, options: RunOptions) -> Preset:
    """That of the run, with what a variant changes and with what known labels chose."""
    preset = override(data.preset, [VARIANTS[cell.method]]) if cell.method in VARIANTS else data.preset
    return choose(data, cell, preset, options.output / "chosen" / f"{cell.name}.json") if options.choose else preset


def _fitted(data: Prepared, cell: Cell, options: RunOptions) -> tuple[dict[str, float], float]:
    """Metrics of a head of whole images alone, and the seconds of its fit."""
    started = time.perf_counter()
    targets = known_labels(data, cell)
    preset = _preset(data, cell, options)
    prior = preset.global_prior and cell.method == "global"
    head = data.global_head(targets, preset, single=cell.known == "single", prior=prior)
    if head is None:
        raise ValueError(
            f"{cell.method} needs penultimate features, and labels that are known to be absent; leave it out of --methods"
        )
    seconds = time.perf_counter() - started
    logits = global_logits(head, data.test_features, data.preset.batch_size)
    metrics = evaluate(logits, data.test_targets, threshold=0.0)
    say(f"{cell.label}: mAP {metrics['mAP']:.1f}  OF1 {metrics['OF1']:.1f}  {seconds:.0f} s")
    return {**metrics, "best_epoch_mAP": metrics["mAP"]}, seconds


def _trained(data: Prepared, cell: Cell, options: RunOptions) -> tuple[dict[str, float], float, int]:
    """Metrics of a trained method, the seconds of training, and how many parameters it trained."""
    method = "trm" if cell.method in VARIANTS else cell.method
    preset = _preset(data, cell, options)
    trained = train_with_checkpoint(data, cell, options, method=method, preset=preset)
    if not ranks.first():
        return trained.metrics, trained.seconds, trained_parameters(trained.method)
    # A head is given tokens, not the pooled feature that a method without region learning is trained on.
    if cell.method not in VARIANTS and preset.region_learning:
        with torch.no_grad():
            head = trm_head(trained.method, data.encode(trained.method.prompts()), data.class_names)
        if head is not None:
            head.save(options.output / f"{cell.name}.pt")
    if trained.trace:
        write_json(options.output / "pseudo" / f"{cell.name}.json", trained.trace)
    return trained.metrics, trained.seconds, trained_parameters(trained.method)


def train_with_checkpoint(data: Prepared, cell: Cell, options: RunOptions, *, method: str, preset: Preset) -> Trained:
    """A cell trained from its checkpoint where there is one, with what the options of the run say of it."""
    made_with = {
        "cell": cell.name,
        "preset": dataclasses.asdict(preset),
        "labels": tensor_digest(known_labels(data, cell)),
        "weights": data.weights,
        "amp": options.amp,
        **({"ranks": ranks.world()} if ranks.world() > 1 else {}),  # each keeps a random state of its own
    }
    return train_cell(
        data,
        cell,
        preset,
        method=method,
        truth=data.targets,
        checkpoint=Checkpoint(checkpoint_path(options.output, cell), made_with),
        amp=options.amp,
        log=options.output / "tensorboard" / cell.name if options.tensorboard else None,
    )


def run_cells(
    data: Prepared, cells: Sequence[Cell], options: RunOptions, prepare: Callable[[RunOptions], Prepared]
) -> Generator[Finished, None, None]:
    """Cells as they are finished: one after the other, or ``--jobs`` at a time in processes of their own."""
    apart = [cell for cell in cells if options.jobs > 1 and cell.method not in LABEL_FREE]
    announced = None
    for cell in (cell for cell in cells if cell not in apart):
        if cell.method not in LABEL_FREE and announced != (announced := (cell.known, cell.seed)):
            targets = known_labels(data, cell)
            known, positives = known_fraction(targets), int((targets == 1).sum())
            say(f"seed {cell.seed}, {known:.1%} of the labels known, {positives} positives")
        yield run_cell(data, cell, options)
    if apart:
        yield from _in_processes(apart, options, prepare)


def _in_processes(
    cells: Sequence[Cell], options: RunOptions, prepare: Callable[[RunOptions], Prepared]
) -> Generator[Finished, None, None]:
    """Cells in the order in which they end; whatever ends this iterator early ends its processes too."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, _start_worker, (options, prepare)) as pool:
        try:
            for future in as_completed([pool.submit(_work, cell) for cell in cells]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_worker: tuple[Prepared, RunOptions] | None = None


def _start_worker(options: RunOptions, prepare: Callable[[RunOptions], Prepared]) -> None:
    """What a process needs for its cells: features are mapped from the cache that the parent has filled."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // options.jobs)))
    if options.deterministic:
        use_deterministic_algorithms()
    escape_output()
    without_bars()
    _worker = prepare(options), options


def _work(cell: Cell) -> Finished:
    assert _worker is not None
    data, options = _worker
    return run_cell(data, cell, options)


def end_with_parent() -> None:
    """A killed parent cannot end its workers, and they must not write beside the run that resumes it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def use_deterministic_algorithms() -> None:
    """Equal runs give equal bits on an accelerator too, at some cost in speed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
