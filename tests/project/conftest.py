"""The scripts of benchmarks/, imported to be tested."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers import ROOT
from trm_losses import write_features


@pytest.fixture(scope="session")
def benchmark_script() -> Iterator[Callable[[str], ModuleType]]:
    """A script of benchmarks/ by name; it finds what lies beside it, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="session")
def drawn_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens near the texts of what is present, in three splits."""
    classes, width = 4, 8
    root = tmp_path_factory.mktemp("features")
    text = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    for seed, (split, count) in enumerate((("train", 120), ("val", 40), ("test", 40))):
        draw = torch.Generator().manual_seed(seed)
        targets = (torch.rand(count, classes, generator=draw) < 0.4).float()
        tokens = 0.7 * targets[:, None] @ text + torch.randn(count, 6, width, generator=draw)
        names = [f"class {c}" for c in range(classes)]
        batches = [(tokens, tokens.mean(dim=1))]
        write_features(
            root, split, batches, targets=targets, class_names=names, text=text, logit_scale=20, expected_positives=1.6
        )
    return root
