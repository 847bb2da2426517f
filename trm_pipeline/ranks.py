"""Several processes of one run, started by torchrun: who is who, what each of them takes and what is done once.

Every function also does its work where there is one process, as nothing or next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.progress import without_bars, without_words

T = TypeVar("T")

# Ranks do equal work between two messages, so that one which is waited for longer than this is taken for dead. Where one
# process alone encodes a data set the others wait as long as it takes.
TIMEOUT = timedelta(seconds=60)
_PATIENCE = timedelta(days=7)

_patient: dist.ProcessGroup | None = None


def launched() -> int:
    """How many processes torchrun has started; 1 without it, whatever a scheduler may have left in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def check_device(device: str) -> None:
    """It can be used here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def start(device: str) -> str:
    """Join the other processes, where there are any; the device of this one."""
    global _patient
    if launched() == 1:
        return device
    local = int(os.environ["LOCAL_RANK"])
    if torch.device(device).type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun --nproc-per-node must be at most {torch.cuda.device_count()}, the GPUs here; got more; or give "
                "--device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    _patient = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]  # of all ranks, this one too
    if not first():
        without_bars()
        without_words()
    return device


def stop() -> None:
    """Leave the others, at the end of a run."""
    if world() > 1:
        dist.destroy_process_group()


def rank() -> int:
    """The place of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """This process is the one that logs and writes."""
    return rank() == 0


def group() -> dist.ProcessGroup | None:
    """For the functions of the library, whose modules take ``distributed=True``."""
    return dist.group.WORLD if world() > 1 else None


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process does what is inside, and the others after it, when they find it in the cache."""
    if not first():
        dist.barrier(group=_patient)
    yield
    if first() and world() > 1:
        dist.barrier(group=_patient)


def batches(features: Features, batch_size: int, generator: torch.Generator | None = None, *, view: int = 0) -> Iterator[Batch]:
    """This rank's part of each batch, which may be empty where a last batch is small."""
    if world() == 1:
        return features.batches(batch_size, generator, view=view)
    return features.batches(batch_size, generator, view=view, part=(rank(), world()))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of each gradient over ranks, in one message; what has none on any rank keeps none."""
    if world() == 1:
        return
    learning = [p for p in parameters if p.requires_grad]
    if not learning:
        return
    has = learning[0].new_tensor([float(p.grad is not None) for p in learning])
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    flat = torch.cat([has, *(part.flatten() for part in parts)])
    dist.all_reduce(flat)
    has, *means = (flat / world()).split([len(learning), *(p.numel() for p in learning)])
    for p, there, mean in zip(learning, has.tolist(), means, strict=True):
        p.grad = mean.view_as(p) if there else None


def total(value: Tensor) -> Tensor:
    """The sum over ranks, of a value on the device that they train on."""
    if world() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def gather(value: T) -> list[T]:
    """What each rank holds, in their order."""
    if world() == 1:
        return [value]
    found: list[T | None] = [None] * world()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def from_first(value: T) -> T:
    """What the first rank holds."""
    if world() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def lost(error: Exception) -> bool:
    """The error is of a message to another rank that did not arrive."""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
