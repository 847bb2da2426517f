"""Progress that is a bar on a terminal and plain lines everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import RLock
from typing import TypeVar

from tqdm import tqdm

__all__ = ["Scalars", "progress", "say", "without_bars", "without_words"]

T = TypeVar("T")

_bars = True
_words = True


def without_bars() -> None:
    """No bars from here on: those of several processes would tear each other apart."""
    global _bars
    _bars = False
    tqdm.set_lock(RLock())  # its own would be shared between processes, and left behind where one is ended


def without_words() -> None:
    """No lines either: another process says them."""
    global _words
    _words = False


def progress(items: Iterable[T], description: str, *, total: int | None = None) -> tqdm[T]:
    """Iterate with a bar on a terminal; elsewhere one line at the start says what is under way."""
    bar = _bars and sys.stderr.isatty()
    if not bar and description:
        say(description)
    return tqdm(items, description, total=total, leave=False, disable=not bar, dynamic_ncols=True)


def say(line: str) -> None:
    """A line that does not tear a bar apart, seen at once even through a pipe."""
    if _words:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class Scalars:
    """Curves for TensorBoard, which is asked for by whoever wants them and needs its own package.

    Args:
        folder: of one run.
        done: epochs before this start; what an interrupted epoch wrote after them is dropped.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=done + 1)

    @staticmethod
    def check() -> None:
        """Raise where TensorBoard is not installed."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError("--tensorboard needs the tensorboard package: pip install tensorboard") from error

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Everything is on disk after this."""
        self._writer.close()
