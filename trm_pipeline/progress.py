"""Progress that is a bar on a terminal and plain lines everywhere else."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from threading import RLock
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

_bars = True
_words = True
_clock = tqdm.format_interval


def escape_output() -> None:
    """Characters that standard output cannot encode are escaped, as they are in errors: a name must not end a run."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def without_bars() -> None:
    """No bars from here on: those of several processes would tear each other apart."""
    global _bars
    _bars = False
    tqdm.set_lock(RLock())  # its own would be shared between processes, and left behind where one is ended


def without_words() -> None:
    """No lines either: another process says them."""
    global _words
    _words = False


@contextmanager
def warnings_said() -> Iterator[None]:
    """Warnings are lines like any other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for line in dict.fromkeys(str(warning.message) for warning in caught):
        say(line)


@contextmanager
def without_logs(level: int) -> Iterator[None]:
    """What libraries log up to this level is not shown."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def progress(items: Iterable[T], description: str, *, total: int | None = None) -> tqdm[T]:
    """Iterate with a bar on a terminal; elsewhere one line at the start says what is under way."""
    bar = _bars and sys.stderr.isatty()
    if not bar and description:
        say(description)
    return tqdm(items, description, total=total, leave=False, disable=not bar, dynamic_ncols=True)


class Pace:
    """A line now and then where there is no bar: how many are done, how fast, and how long the others may take.

    Args:
        total: of this run.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = self.told = time.monotonic()

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.told < 60 or (_bars and sys.stderr.isatty()):
            return
        self.told, gone = now, now - self.started
        left = gone / self.done * (self.total - self.done)
        say(f"{self.done} of {self.total}, {self.done / gone:.1f} a second, {_clock(left)} left")


def say(line: str) -> None:
    """A line that does not tear a bar apart, seen at once even through a pipe."""
    if _words:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class Sweep:
    """A table that gets a line as each cell of a run ends: how many have, and how long the others may take.

    Args:
        total: cells of the run. done: those that an interrupted run left.
    """

    _line = "| {:>9} | {:<44} | {:>5} | {:>7} | {:>8} | {:>8} |"

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.before, self.done = total, done, done
        self.started = time.monotonic()

    def add(self, label: str, value: float, seconds: float) -> None:
        """The line of a cell; what is left is told from the mean of the cells of this run."""
        if self.done == self.before:
            say(self._line.format("cells", "method, share, seed", "mAP", "seconds", "gone", "left"))
        self.done += 1
        gone = time.monotonic() - self.started
        left = gone / (self.done - self.before) * (self.total - self.done)
        say(self._line.format(f"{self.done}/{self.total}", label, f"{value:.1f}", f"{seconds:.0f}", *map(_clock, (gone, left))))


def curves() -> Any:
    """TensorBoard's writer, a package of its own."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs the tensorboard package: pip install tensorboard") from error
    return SummaryWriter
