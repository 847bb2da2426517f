"""A folder of drawn images, for models that are not open_clip's."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trm_pipeline.drawn.scenes import TARGET, draw_scene

CLASSES = ["dog", "car", "cow"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 drawn images and their labels beside the folder."""
    root = tmp_path_factory.mktemp("photos")
    (root / "images").mkdir()
    lines = ["image," + ",".join(CLASSES)]
    for number in range(24):
        present = [name for place, name in enumerate(CLASSES) if (number >> place) & 1] or ["chair"]
        Image.fromarray(draw_scene(np.random.default_rng(number), TARGET, present).image).save(root / f"images/{number}.png")
        lines.append(f"{number}.png," + ",".join("1" if name in present else "0" for name in CLASSES))
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return root
