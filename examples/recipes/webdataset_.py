"""Images and labels out of tar shards (``pip install webdataset``): ``python examples/recipes/webdataset_.py``."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from pictures import BATCH, NAMES, drawn, train
from torch import Tensor

from trm_losses.labels import UNKNOWN

SHARDS = 4  # at least one for each worker, and over ranks for each worker of each


def write(folder: Path) -> list[str]:
    """Shards of ``00012.png`` beside ``00012.json``, which names the classes with a known label: ``{"cat": 1, "car": 0}``."""
    paths = [str(folder / f"train-{shard:03}.tar") for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        with wds.TarWriter(path) as tar:
            for place, (image, known) in list(enumerate(drawn()))[shard::SHARDS]:
                tar.write({"__key__": f"{place:05}", "png": image, "json": known})
    return paths


def targets_of(known: dict[str, int]) -> Tensor:
    """Labels (C,) in the order of the classes; -1 of a class that is not named."""
    return torch.tensor([float(known.get(name, UNKNOWN)) for name in NAMES])


def loader(paths: list[str], workers: int) -> Any:
    """Batches of images (B, 3, H, W) and targets (B, C), shuffled; every image once, by one of the workers."""
    data = wds.WebDataset(paths, shardshuffle=len(paths), nodesplitter=wds.split_by_node).shuffle(1000)
    data = data.decode("torchrgb").map_dict(json=targets_of).to_tuple("png", "json")
    return wds.WebLoader(data, batch_size=None, num_workers=workers).batched(BATCH)  # here, where images of all workers arrive


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = train(loader(write(Path(folder)), workers=2))
    print(f"loss: {losses[0]:.3f} at the first of {len(losses)} steps, {losses[-1]:.3f} at the last")
