"""Where the time and the memory of a training step go: the loop's and the method's parts under torch's profiler.

The parts are watched from outside, by functions that stand in for theirs while a training is profiled, so that neither the
loop nor a part knows of it.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile, record_function

from trm_losses import (
    MultimodalContrastiveLoss,
    PromptLearner,
    PrototypeBank,
    PseudoLabeler,
    RegionDistillationLoss,
    RegionPooler,
    TextRegionMatchingLoss,
)
from trm_losses.backbones import OpenClipBackbone
from trm_losses.baselines._baseline import Baseline

from . import training
from .checkpoint import Checkpoint
from .features import Batch, Features
from .methods import LinearProbe, Method, PromptPeer
from .progress import say
from .pseudo_trace import PseudoTrace
from .wrapped import unwrapped

__all__ = ["Part", "parts_of", "profiled", "recorded"]

STEPS, SKIPPED = 10, 2
"""How many steps are profiled, and how many before them are not counted."""

_F = TypeVar("_F", bound=Callable[..., Any])

_STEP, _BACKWARD, _REST = "step", "backward", "rest"
_NAMES = (
    "reading", "image tower", "text", "pooling", "matching", "distillation", "contrast", "labeller", "bank", "optimiser",
    "average", "trace", _REST,
)  # fmt: skip


class Part(NamedTuple):
    """A part's share of a step: milliseconds of the host and of an accelerator, forward and backward, and MiB.

    What is kept is what is there after its forward pass and was not before; the peak is the most that was held while it ran,
    beyond what was held when the step began.
    """

    host: tuple[float, float]
    device: tuple[float, float]
    kept: float
    peak: float


def recorded(part: str, function: _F) -> _F:
    """The function as a range of the profiler's."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def parts_of(events: Iterable[Any], device: str = "cpu") -> tuple[int, dict[str, Part]]:
    """The number of steps among a profiler's events, and what each part has of one of them.

    An operation belongs to the innermost part that it was called in; one of the backward pass to the part whose operation
    it differentiates, which autograd's numbers tell.

    Args:
        events: of Kineto, those of one training from before its first range of a step on.
        device: the kind whose memory counts, and whose kernels do where it is not the CPU.
    """
    events = list(events)
    host: defaultdict[tuple[str, bool], float] = defaultdict(float)
    on_device: defaultdict[tuple[str, bool], float] = defaultdict(float)
    kept: defaultdict[str, int] = defaultdict(int)
    peak: defaultdict[str, int] = defaultdict(int)
    open_ranges: defaultdict[int, list[tuple[int, str | None, bool]]] = defaultdict(list)  # of each thread: end, part, backward
    differentiated: dict[tuple[int, int], str] = {}  # thread and autograd's number of an operation
    launched: dict[int, tuple[str, bool]] = {}
    steps = held = at_start = 0
    on_host = [event for event in events if event.device_type().name == "CPU" or event.name() == "[memory]"]
    for event in sorted(on_host, key=lambda event: (event.start_ns(), -event.duration_ns())):
        name, start, length = event.name(), event.start_ns(), event.duration_ns()
        ranges = open_ranges[event.start_thread_id()]
        while ranges and ranges[-1][0] <= start:
            ranges.pop()
        _, outer, backward = ranges[-1] if ranges else (0, None, False)
        if name == "[memory]":
            if event.device_type().name.lower() == device:
                held += event.nbytes()
                if outer is not None:
                    peak[outer] = max(peak[outer], held - at_start)
                    kept[outer] += 0 if backward else event.nbytes()
            continue
        part = outer
        if name == _STEP:
            part, steps, at_start = _REST, steps + 1, held
            host[_REST, False] += length
        elif name == _BACKWARD:
            backward = True
        elif name.startswith("autograd::engine::evaluate_function"):
            part, backward = differentiated.get((event.fwd_thread_id(), event.sequence_nr()), outer), True
        elif outer is not None and name in _NAMES:
            part = name
        elif outer is not None and name.startswith("Optimizer."):
            part = "optimiser"
        elif outer is not None and not backward and event.sequence_nr() >= 0:
            # The last of several with one number: the one that the number was given to.
            differentiated[event.start_thread_id(), event.sequence_nr()] = outer
        if part is not None and not event.linked_correlation_id():  # one that is linked is a call of the device's driver
            launched[event.correlation_id()] = part, backward
        if part is not None and outer is not None:
            host[part, backward] += length
            host[outer, ranges[-1][2]] -= length
        ranges.append((start + length, part, backward))
    for event in events:
        name, at = event.name(), launched.get(event.linked_correlation_id())
        shown_range = name in (_STEP, _BACKWARD, *_NAMES) or name.startswith("Optimizer.")
        if event.device_type().name.lower() == device != "cpu" and at is not None and not shown_range:
            on_device[at] += event.duration_ns()
    scale = 1e-6 / max(steps, 1)
    return steps, {
        name: Part(
            (host[name, False] * scale, host[name, True] * scale),
            (on_device[name, False] * scale, on_device[name, True] * scale),
            kept[name] / max(steps, 1) / 2**20,
            peak[name] / 2**20,
        )
        for name in _NAMES
        if any(abs(host[name, backward]) > 0 for backward in (False, True))
    }


class _Watch:
    """What a profiled training is measured by; ``begin_epoch`` and ``batches`` tell it where the training is."""

    def __init__(self, last_epoch: int, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler = profile(activities=activities, profile_memory=True)
        self.last_epoch, self.device = last_epoch, device
        self.epoch = -1
        self.running = False
        self.events: list[Any] = []
        self.seconds: list[float] = []  # of each step without the profiler
        self.between: dict[str, list[float]] = {}  # seconds of each call of what is done between steps

    def begin_epoch(self, original: Callable[..., None]) -> Callable[..., None]:
        """In place of a method's ``before_epoch``."""

        @wraps(original)
        def before_epoch(method: Method, epoch: int, *rest: Any) -> None:
            self.timed("before the epoch", original)(method, epoch, *rest)
            self.epoch = epoch

        return before_epoch

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, and the seconds it takes, under ``name``."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.between.setdefault(name, []).append(time.perf_counter() - started)
            return result

        return call

    def batches(self, original: Callable[..., Iterator[Batch]]) -> Callable[..., Iterator[Batch]]:
        """In place of the features' ``batches``: a step lasts from one batch that is asked for to the next."""

        @wraps(original)
        def batches(
            features: Features, batch_size: int, generator: torch.Generator | None = None, **options: Any
        ) -> Iterator[Batch]:
            source = original(features, batch_size, generator, **options)
            if generator is None or self.epoch < 0:  # of scoring and the like, or before training
                yield from source
                return
            count = -(-len(features) // batch_size)
            first = min(SKIPPED, count - 1) if self.epoch == self.last_epoch else count
            for number in range(count):
                if number == 0 and first < count:
                    self.start()
                if number == first + STEPS:
                    self.stop()
                started, running = time.perf_counter(), self.running
                with record_function(_STEP) if running and number >= first else nullcontext():
                    with record_function("reading"):
                        batch = next(source)
                    yield batch
                if not running and number > 0:
                    self.seconds.append(time.perf_counter() - started)
            self.stop()

        return batches

    def start(self) -> None:
        """From here on the profiler runs."""
        self.profiler.start()
        self.running = True

    def stop(self) -> None:
        """The profiler ends where it runs."""
        if self.running:
            self.running = False
            self.profiler.stop()
            self.events = self.profiler.profiler.kineto_results.events()  # type: ignore[union-attr]

    def table(self, label: str) -> str:
        """What was measured, for people."""
        steps, parts = parts_of(self.events, self.device.type)
        on_device = self.device.type != "cpu"
        total = sum(sum(part.host) for part in parts.values())
        alone = f", {1e3 * statistics.median(self.seconds[-2 * STEPS :]):.1f} ms without" if self.seconds else ""
        whole = sum(sum(part.device if on_device else part.host) for part in parts.values())
        head = ["part", "forward ms", "backward ms", "share", *(["host ms"] if on_device else []), "kept MiB", "peak MiB"]
        rows = [head, ["---"] * len(head)]
        for name, part in parts.items():
            forward, backward = part.device if on_device else part.host
            share = f"{100 * (forward + backward) / whole:.0f}%" if whole else ""
            rows.append([name, f"{forward:.2f}", f"{backward:.2f}", share, *([f"{sum(part.host):.2f}"] if on_device else []),
                         f"{part.kept:.1f}", f"{part.peak:.1f}"])  # fmt: skip
        between = ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in self.between.items())
        return "\n".join(
            [
                f"{label}: a step takes {total:.1f} ms under the profiler (mean of {steps} in the last epoch){alone}; "
                f"highest memory {max((part.peak for part in parts.values()), default=0.0):.1f} MiB.",
                "",
                *(f"| {' | '.join(row)} |" for row in rows),
                "",
                f"Between the steps of an epoch: {between}.",
            ]
        )


@contextmanager
def profiled(method: Method, features: Features, *, epochs: int, device: torch.device, label: str, path: Path) -> Iterator[None]:
    """Profile the training of this method on these features inside; then say the table, and write it to ``path``.

    Steps of the last epoch are measured, when pseudo-labels and prototypes take part in full; all others are timed alone.
    """
    watch = _Watch(epochs - 1, device)
    head = unwrapped(method)
    parts: list[tuple[str, Any, str]] = [
        ("image tower", OpenClipBackbone, "forward"),
        ("text", PromptLearner, "forward"),
        *(("pooling", RegionPooler, name) for name in ("forward", "prepare", "map_classes", "entries")),
        *([("pooling", type(head), "cosines")] if isinstance(head, PromptPeer) else []),
        ("pooling", LinearProbe, "logits"),
        *(("matching", TextRegionMatchingLoss, name) for name in ("logits", "loss")),
        ("matching", Baseline, "forward"),
        ("distillation", RegionDistillationLoss, "forward"),
        ("contrast", MultimodalContrastiveLoss, "forward"),
        *(("labeller", PseudoLabeler, name) for name in ("forward", "similarities", "update")),
        ("bank", PrototypeBank, "update"),
        (_BACKWARD, torch.Tensor, "backward"),
        ("optimiser", torch.nn.utils, "clip_grad_norm_"),
        ("average", AveragedModel, "update_parameters"),
        ("trace", PseudoTrace, "add"),
    ]
    with ExitStack() as stack:
        stack.callback(watch.stop)
        for part, owner, name in parts:
            stack.enter_context(_standing_in(owner, name, partial(recorded, part)))
        for words, owner, name in (
            ("scores of the test images", training, "score"),
            ("metrics", training, "evaluate"),
            ("checkpoint", Checkpoint, "save"),
        ):
            stack.enter_context(_standing_in(owner, name, partial(watch.timed, words)))
        stack.enter_context(_standing_in(type(method), "before_epoch", watch.begin_epoch))
        stack.enter_context(_standing_in(type(features), "batches", watch.batches))
        yield
    if not watch.events:  # all epochs were in the checkpoint that was gone on from
        return
    table = watch.table(label)
    say(f"\n{table}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{table}\n", encoding="utf-8")


@contextmanager
def _standing_in(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """What ``make`` makes of a function of a class or module, in its place."""
    inherited = name not in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
