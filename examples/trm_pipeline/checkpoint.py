"""Files that are there as a whole or not at all, and the state of a training run in one of them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Checkpoint", "differences", "tensor_digest", "write_json"]


def write_json(path: Path, value: object) -> None:
    """JSON, replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's shape, type and values."""
    content = tensor.detach().cpu().contiguous()
    name = f"{tuple(content.shape)} {content.dtype}".encode()
    return hashlib.blake2b(name + content.view(torch.uint8).numpy().tobytes(), digest_size=12).hexdigest()


def differences(wanted: object, found: object, name: str = "") -> list[str]:
    """What two JSON-like values differ in, as ``name: found, now wanted``."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        keys = dict.fromkeys([*wanted, *found])
        return [line for key in keys for line in differences(wanted.get(key), found.get(key), str(key))]
    wanted, found = json.dumps(wanted), json.dumps(found)
    return [] if wanted == found else [f"{name} was {found}, now {wanted}"]


@dataclass(frozen=True)
class Checkpoint:
    """Where the state of a run in progress is kept, and what it was made with: preset, labels, weights."""

    path: Path
    made_with: dict[str, Any]

    def save(self, state: Mapping[str, Any]) -> None:
        """Write tensors and plain values; the file of the epoch before stays until this one is complete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        torch.save({"made_with": json.dumps(self.made_with), **state}, temporary)
        os.replace(temporary, self.path)

    def load(self) -> dict[str, Any] | None:
        """The state to go on from; None where there is none."""
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            found = json.loads(state.pop("made_with"))
        except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
            raise ValueError(f"{self.path} must be a checkpoint of this run, and cannot be read; delete it ({error})") from error
        if changed := differences(json.loads(json.dumps(self.made_with)), found):
            raise ValueError(f"{self.path} is of another run ({'; '.join(changed)}); start without --resume")
        return state

    def remove(self) -> None:
        """The run is finished."""
        self.path.unlink(missing_ok=True)
