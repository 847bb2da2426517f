"""Progress that is a bar on a terminal and plain lines everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

__all__ = ["progress", "say"]

T = TypeVar("T")


def progress(items: Iterable[T], description: str, *, total: int | None = None) -> tqdm[T]:
    """Iterate with a bar on a terminal; elsewhere one line at the start says what is under way."""
    on_terminal = sys.stderr.isatty()
    if not on_terminal and description:
        say(description)
    return tqdm(items, description, total=total, leave=False, disable=not on_terminal, dynamic_ncols=True)


def say(line: str) -> None:
    """A line that does not tear a bar apart, seen at once even through a pipe."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
