"""Images and labels by Hugging Face's datasets (``pip install datasets``): ``python examples/recipes/datasets_.py``."""

import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from pictures import BATCH, NAMES, drawn, train
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

from trm_losses.labels import UNKNOWN


def write(folder: Path) -> str:
    """A Parquet file with the images, and for each class a column in which null is a label that nobody gave."""
    columns: dict[str, list[Any]] = {"image": [image for image, _ in drawn()]}
    columns |= {name: [known.get(name) for _, known in drawn()] for name in NAMES}
    kinds = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("int8") for name in NAMES}})
    path = folder / "train.parquet"
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(path)
    return str(path)


def batch_of(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) from 0 to 1 and targets (B, C) of some rows."""
    targets = [[float(UNKNOWN if row[name] is None else row[name]) for name in NAMES] for row in rows]
    return torch.stack([to_tensor(row["image"]) for row in rows]), torch.tensor(targets)


def loader(path: str, workers: int) -> Any:
    """Batches, shuffled; rows stay on the disk until one of the workers reads them."""
    data: Any = datasets.Dataset.from_parquet(path, cache_dir=str(Path(path).parent / "cache"))
    return DataLoader(data, BATCH, shuffle=True, num_workers=workers, collate_fn=batch_of)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = train(loader(write(Path(folder)), workers=2))
    print(f"loss: {losses[0]:.3f} at the first of {len(losses)} steps, {losses[-1]:.3f} at the last")
