"""How drawn data sets come to the disk: by several processes, once, and as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from trm_pipeline.files import check_writable, making_folder

T = TypeVar("T")


def in_parallel(work: Callable[[range], T], count: int, workers: int | None, chunk: int = 100) -> Iterator[T]:
    """``work`` over ranges of at most ``chunk`` indices, in order, in ``workers`` processes (default: all cores)."""
    ranges = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    workers = min(workers or os.cpu_count() or 1, len(ranges))
    if workers <= 1:
        yield from map(work, ranges)
        return
    with get_context("fork" if os.name == "posix" else "spawn").Pool(workers) as pool:
        yield from pool.imap(work, ranges)


def write_once(root: str | os.PathLike[str], name: str, stamp: Mapping[str, object], write: Callable[[Path], None]) -> Path:
    """The folder of a data set below ``root``, named after its ``stamp``, and written by ``write`` unless it is there."""
    stamp = json.loads(json.dumps(stamp))  # as it will be read back: no tuples
    digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:12]
    final = Path(root) / f"{name}-{digest}"
    if _has_stamp(final, stamp):
        return final
    check_writable(final.parent, "--cache")
    with making_folder(final, lambda: _has_stamp(final, stamp)) as scratch:
        write(scratch)
        (scratch / "stamp.json").write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        if final.exists() and not _has_stamp(final, stamp):
            shutil.rmtree(final)
    return final


def _has_stamp(folder: Path, stamp: Mapping[str, object]) -> bool:
    try:
        return bool(json.loads((folder / "stamp.json").read_text(encoding="utf-8")) == stamp)
    except (OSError, json.JSONDecodeError):
        return False
