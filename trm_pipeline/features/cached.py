"""Image features in batches: from files on disk, or through the frozen tower in the loop."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, default_collate

from trm_losses.backbones import ImageFeatures
from trm_pipeline.features.backbone import ImageTower
from trm_pipeline.progress import say

T = TypeVar("T")


def cores() -> int:
    """How many of the machine's this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Batch(NamedTuple):
    """Features of some images and where these stand in their data set: (B, N, D), (B, D), (B,), and (B, W) if there are any."""

    tokens: Tensor
    pooled: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, as the plain word for it
    penultimate: Tensor | None = None


class Features(Protocol):
    """What methods learn from and are tested on, whatever it is read from."""

    def __len__(self) -> int:
        """Images."""

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, *, view: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Batches in a random order drawn from ``generator``, or in the data set's order without one, of one view then.

        Of each batch only the part of a rank, by its number and that of all; the order does not depend on it.
        """

    @property
    def views(self) -> int:
        """How many there are of every image."""


def pool_tokens(features: ImageFeatures, side: int) -> ImageFeatures:
    """Tokens averaged over squares of ``side`` tokens."""
    if side == 1:
        return features
    tokens, pooled, (height, width), penultimate = features
    if height % side or width % side:
        raise ValueError(f"token_pool must divide the token grid {height} x {width}, got {side}")
    grid = tokens.transpose(1, 2).unflatten(2, (height, width))
    tokens = F.avg_pool2d(grid.float(), side).flatten(2).transpose(1, 2)
    return ImageFeatures(tokens, pooled, (height // side, width // side), penultimate)


def own_part(batch: Tensor, part: tuple[int, int]) -> Tensor:
    """The rows of a batch that are a rank's."""
    rank, world = part
    return batch.tensor_split(world)[rank]


class CachedFeatures:
    """Features computed once, read from half-precision files; with several views of an image one is drawn a visit.

    ``places`` (n,) are the rows of the images in the files, and ``grid`` (h, w) is that of the tokens, where somebody said it.
    """

    grid: tuple[int, int] | None = None

    def __init__(
        self, tokens: list[np.ndarray], pooled: list[np.ndarray], penultimate: list[np.ndarray], device: torch.device
    ) -> None:
        self.tokens, self.pooled, self.penultimate, self.device = tokens, pooled, penultimate, device
        self.places = torch.arange(len(tokens[0]))

    @classmethod
    def from_folder(cls, folder: Path, views: int, device: torch.device) -> CachedFeatures:
        """A folder of the cache."""
        fix = f"delete {folder}"
        count, tokens, dim = mapped(folder / "tokens0.npy", "n", "N", "D", fix=fix).shape
        kinds = {"tokens": (tokens, dim), "pooled": (dim,), "penultimate": ()}
        if (path := folder / "penultimate0.npy").exists():
            kinds["penultimate"] = mapped(path, count, "W", fix=fix).shape[1:]
        found = [
            [mapped(folder / f"{kind}{view}.npy", count, *shape, fix=fix) for view in range(views if shape else 0)]
            for kind, shape in kinds.items()
        ]
        if wrong := {str(array.dtype) for arrays in found for array in arrays} - {"float16"}:
            raise ValueError(f"{folder} must hold arrays of float16, got {wrong.pop()}; {fix}")
        return cls(found[0], found[1], found[2], device)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def views(self) -> int:
        """See :class:`Features`."""
        return len(self.tokens)

    def only(self, rows: Tensor) -> CachedFeatures:
        """Some of these images, a mask (n,) or numbers, as if there were no others."""
        some = copy.copy(self)
        some.places = self.places[rows]
        return some

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, *, view: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """See :class:`Features`."""
        count = len(self)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        drawn = torch.full((count,), view)
        if generator is not None and self.views > 1:
            drawn = torch.randint(self.views, (count,), generator=generator)
        for index in (own_part(batch, part) for batch in order.split(batch_size)):
            kinds = [arrays for arrays in (self.tokens, self.pooled, self.penultimate) if arrays]
            parts = [drawn_rows(arrays, drawn[index], self.places[index]).to(self.device) for arrays in kinds]
            yield Batch(parts[0], parts[1], index, *parts[2:])


def mapped(path: Path, *shape: int | str, fix: str = "write it again") -> np.ndarray:
    """A map of an array of this shape; a letter stands for any size. Nothing can be written back, and objects are refused."""
    try:
        array = np.lib.format.open_memmap(path, mode="c")
    except Exception as error:  # whatever bytes may lead to
        raise ValueError(f"{path} must be an array of numpy's, and cannot be read ({error}); {fix}") from error
    if array.ndim != len(shape) or not all(isinstance(s, str) or s == n for n, s in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{path} must have shape ({', '.join(map(str, shape))}), got {array.shape}; {fix}")
    return array


def drawn_rows(views: list[np.ndarray], drawn: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B,), each of the view drawn for it, in single precision."""
    rows = np.empty((len(index), *views[0].shape[1:]), views[0].dtype)
    for view, array in enumerate(views):
        own = (drawn == view).numpy()
        rows[own] = array[index.numpy()[own]]
    return torch.from_numpy(rows).float()


class _Drawn(Dataset[tuple[Tensor, Tensor, int]]):
    """Images whose random transformations have seeds of their own, so that they do not depend on the process they happen in."""

    def __init__(self, images: Dataset[tuple[Tensor, Tensor, int]], seeds: Tensor) -> None:
        self.images, self.seeds = images, seeds

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(self.seeds[index]))
            return self.images[index]


class _OwnPart:
    """Of each batch of a sampler the indices that are a rank's."""

    def __init__(self, sampler: BatchSampler, part: tuple[int, int]) -> None:
        self.sampler, self.part = sampler, part

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            yield own_part(torch.tensor(batch), self.part).tolist()


def _collate(items: list[tuple[Tensor, Tensor, int]]) -> Any:
    """A batch; of no image, where a rank has none of a small last batch, nothing but its index."""
    return default_collate(items) if items else (None, None, torch.zeros(0, dtype=torch.int64))


class LiveFeatures:
    """Features of freshly transformed images, encoded batch by batch, while ``workers`` processes read the next ones.

    Which transformations are drawn depends on the generator alone, not on how many processes there are. Passes without one read
    ``plain``: what is fitted to all images, and scores them, sees them as they are. The processes end with the epoch: what takes
    long at the start of one is its first batches, which would have to be waited for anyway.

    Args:
        images: of (pixels, target, index).
        backbone: what encodes them.
        token_pool: how many tokens in either direction are averaged.
        device: where it runs.
        mirror: whether the images are mirrored.
        workers: processes.
        plain: features of the same images without random transformations; None: these have none.
    """

    def __init__(
        self,
        images: Dataset[tuple[Tensor, Tensor, int]],
        backbone: ImageTower,
        *,
        token_pool: int,
        device: torch.device,
        mirror: bool = False,
        workers: int = 2,
        plain: Features | None = None,
    ) -> None:
        self.images, self.backbone, self.token_pool = images, backbone, token_pool
        self.device, self.mirror, self.workers, self.plain = device, mirror, workers, plain

    @property
    def num_tokens(self) -> int:
        """N of an image of the backbone's size, after pooling."""
        height, width = self.backbone.grid(self.backbone.image_size)
        return (height // self.token_pool) * (width // self.token_pool)

    @functools.cached_property
    def width(self) -> int | None:
        """W of penultimate features; None if the backbone gives none."""
        one = self._encoded(torch.zeros(1, 3, *self.backbone.image_size, device=self.device)).penultimate
        return None if one is None else one.shape[1]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of a row of each kind that there is."""
        shapes = {"tokens": [self.num_tokens, self.backbone.dim], "pooled": [self.backbone.dim]}
        return shapes if self.width is None else {**shapes, "penultimate": [self.width]}

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> ImageFeatures:
        """What the tower gives, which may be somebody's own.

        Raises:
            ValueError: it gives no tokens, or not one for each place of its grid.
        """
        found: Any = self.backbone(pixels)
        tokens, (height, width) = getattr(found, "tokens", None), self.backbone.grid(self.backbone.image_size)
        wanted = len(pixels), height * width, self.backbone.dim
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else None
        if got != wanted:
            raise ValueError(
                f"the tower {self.backbone.name} must give ImageFeatures with tokens (B, N, D) = {wanted}, one for each place "
                f"of its grid {height} x {width}, got {got or 'none'}; a tower without tokens cannot be used here"
            )
        features: ImageFeatures = found
        return features

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    @property
    def views(self) -> int:
        """See :class:`Features`; those of ``plain``, since a random transformation shows another one at each visit."""
        return 1 if self.plain is None else self.plain.views

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, *, view: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """See :class:`Features`."""
        if generator is None and self.plain is not None:
            yield from self.plain.batches(batch_size, view=view, part=part)
            return
        seeds = torch.Generator().manual_seed(0) if generator is None else generator
        images = _Drawn(self.images, torch.randint(2**62, (len(self),), generator=seeds))
        order = SequentialSampler(images) if generator is None else RandomSampler(images, generator=generator)
        height, width = self.backbone.image_size
        loader = DataLoader(
            images,
            batch_sampler=_OwnPart(BatchSampler(order, batch_size, drop_last=False), part),
            collate_fn=_collate,
            generator=generator,
            num_workers=fitting_workers(self.workers, 12 * height * width * min(batch_size, len(self))),
            pin_memory=self.device.type == "cuda",
        )
        for pixels, _, index in _alive(loader):
            if not len(index):
                nothing = torch.zeros(0, self.num_tokens, self.backbone.dim, device=self.device)
                yield Batch(nothing, nothing[:, 0], index, None if self.width is None else nothing.new_zeros(0, self.width))
                continue
            pixels = pixels.flip(3) if self.mirror else pixels
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                encoded = self._encoded(pixels.to(self.device, non_blocking=True))
            features = pool_tokens(encoded, self.token_pool)
            further = None if features.penultimate is None else features.penultimate.float()
            yield Batch(features.tokens.float(), features.pooled.float(), index, further)


def fitting_workers(workers: int, batch: int, shared: Path = Path("/dev/shm")) -> int:
    """As many of the workers as there is shared memory for, which batches of that many bytes pass through.

    Each has two batches under way; two more are in use. A container of Docker has 64 MB, if it is not told otherwise.
    """
    if not workers or not shared.is_dir():
        return workers
    fit = max(0, min(workers, (shutil.disk_usage(shared).free // max(1, batch) - 2) // 2))
    if fit < workers:
        _say_once(
            f"{shared} has not the room for --workers {workers}; {fit or 'no'} workers read the images (docker run --shm-size=2g "
            "makes room)"
        )
    return fit


@functools.cache
def _say_once(line: str) -> None:
    say(line)


def _alive(loader: Iterable[T]) -> Iterator[T]:
    """The batches of a loader, or a line if one of its processes was ended from outside."""
    try:
        yield from loader
    except RuntimeError as error:
        said = str(error)
        if not any(words in said for words in ("DataLoader worker (pid", "shared memory", "No space left")):
            raise
        raise ValueError(
            f"a process that reads images was ended ({said.strip().splitlines()[-1]}), for want of memory most likely; give "
            "fewer --workers, or --workers 0; in a container /dev/shm may be too small (docker run --shm-size=2g)"
        ) from error
