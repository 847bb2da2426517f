"""A pool of processes joined by gloo, started once; no mock of torch.distributed."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

TIMEOUT = 240.0  # seconds for a job; only a hang takes that long

M = TypeVar("M", bound=nn.Module)
_groups: dict[int, dist.ProcessGroup] = {}


def group_of(world: int) -> Any:
    """What a job of the first ``world`` processes gives for ``distributed``."""
    return True if world == dist.get_world_size() else _groups[world]


def spread(module: M, distributed: Any = True) -> M:
    """All in it that knows of ranks works over these. What it was filled with before is the same on every rank."""
    for part in module.modules():
        if hasattr(part, "distributed"):
            part.distributed = distributed
    return module


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for size in range(2, world):
        _groups[size] = dist.new_group(list(range(size)))
    pipe.send_bytes(pickle.dumps(("ready", None)))
    while True:
        function, arguments = pickle.loads(pipe.recv_bytes())
        try:
            answer = ("result", function(rank, *arguments))
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


class Pool:
    """``run(job, *arguments)`` calls ``job(rank, *arguments)`` in every process, or in the first ``world`` ones, and gives the
    results in rank order."""

    def __init__(self, world: int = 2) -> None:
        context = mp.get_context("spawn")
        self.world = world
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, os.path.join(self.folder.name, "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._receive()

    def _receive(self, world: int | None = None) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self.pipes[:world]):
            if not pipe.poll(TIMEOUT):
                self.kill()
                raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT:.0f} s: its ranks wait for each other")
            kind, value = pickle.loads(pipe.recv_bytes())
            if kind == "error":
                self.kill()  # the other ranks may wait for this one
                raise RuntimeError(f"rank {rank}:\n{value}")
            answers.append(value)
        return answers

    def run(self, job: Callable[..., Any], *arguments: Any, world: int | None = None) -> list[Any]:
        for pipe in self.pipes[:world]:
            pipe.send_bytes(pickle.dumps((job, arguments)))
        return self._receive(world)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        self.kill()  # they keep nothing that would have to be put away
        for process in self.processes:
            process.join(30)
        self.folder.cleanup()
