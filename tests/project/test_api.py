"""Public names are pinned; importing the package pulls in torch and einops and nothing else."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PINNED = json.loads((Path(__file__).parent / "public_names.json").read_text(encoding="utf-8"))


def unreleased() -> str:
    """What the changelog says of the version to come."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return text.partition("## [Unreleased]\n")[2].partition("\n## [")[0].strip()


@pytest.mark.parametrize("module", PINNED)
def test_public_names(module: str) -> None:
    """A name that goes changes this file and the changelog; one that comes joins the file with the version it comes in."""
    owner = importlib.import_module(module)
    assert set(PINNED[module]) <= set(owner.__all__)
    assert sorted(owner.__all__) == PINNED[module] or unreleased()
    assert all(hasattr(owner, name) for name in owner.__all__)
    assert len(set(owner.__all__)) == len(owner.__all__)


def test_every_public_name_is_documented() -> None:
    for module in PINNED:
        owner = importlib.import_module(module)
        for name in owner.__all__:
            thing = getattr(owner, name)
            assert not callable(thing) or name in ("Reduction",) or thing.__doc__, name


BARE = """
import shutil, sys, tempfile
absent = "open_clip timm torchvision transformers safetensors sklearn numpy tqdm PIL matplotlib".split()
sys.modules.update(dict.fromkeys(absent))  # importing one of these now fails
import torch, torch.distributed.nn.functional
before = set(sys.modules)
import trm_losses
text = torch.eye(4)
for recipe in ("default", "paper"):
    objective = trm_losses.TRMObjective.from_text(text, total_steps=10, recipe=recipe)
    output = objective(torch.ones(2, 3, 4), text, torch.ones(2, 4))
    objective.update(output)
folder = tempfile.mkdtemp()
batch = torch.ones(2, 3, 4), torch.ones(2, 4)
trm_losses.write_features(folder, "train", [batch], targets=torch.ones(2, 4), class_names="abcd", text=text, logit_scale=1.0)
shutil.rmtree(folder)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_bare_environment_is_enough() -> None:
    """Without any of the extras, and without numpy, a step runs; the import brings in torch and einops alone."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", BARE], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    third_party = set(run.stdout.split()) - set(sys.stdlib_module_names)
    assert "trm_losses" in third_party and third_party <= {"trm_losses", "einops", "torch"}
