"""A folder of drawn scenes as a user would have it, and a training on it."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT
from tests.helpers.own_folder import CLASSES, write_table
from trm_pipeline.drawn.scenes import TARGET, draw_scene


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """36 drawn scenes and their labels: two broken files, a folder below, a name in Greek, one image in gray."""
    folder = tmp_path_factory.mktemp("own") / "images"
    (folder / "λόφος").mkdir(parents=True)
    rows = {}
    for i in range(36):
        rng = np.random.default_rng([7, i])
        names = [name for name in CLASSES[:3] if rng.random() < 0.5] or ["cat"]
        scene = draw_scene(rng, TARGET, names)
        name = f"λόφος/{i}.jpg" if i % 5 == 0 else f"{i}.png"
        Image.fromarray(scene.image).convert("L" if i == 3 else "RGB").save(folder / name)
        found = {item.name for item in scene.objects}
        rows[name] = [int(c in found) if c != "sheep" else 0 for c in CLASSES]
    (folder / "cut.jpg").write_bytes((folder / "λόφος" / "0.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    rows |= {"cut.jpg": [1, 0, 0, 0], "empty.png": [0, 0, 0, 1]}
    return folder, rows


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return ["--cache", str(tmp_path_factory.mktemp("cache")), "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(images, cache, tmp_path_factory):
    """A finished training, and what it printed."""
    folder, rows = images
    base = tmp_path_factory.mktemp("trained")
    labels = write_table(base / "labels.csv", rows, hidden=(0,))
    command = [sys.executable, str(ROOT / "examples" / "train_folder.py"), "train", str(folder), str(labels)]
    done = subprocess.run(
        [*command, "--output", str(base / "run"), "--hold-out", "0.5", *cache], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return base / "run", done.stdout
