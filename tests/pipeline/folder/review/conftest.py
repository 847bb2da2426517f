"""A folder of drawn scenes with names that are hard to write, and questions about them."""

import os

import numpy as np
import pytest
from PIL import Image

from trm_pipeline.drawn.scenes import TARGET, draw_scene
from trm_pipeline.folder.review.page import Question

CLASSES = ["dog", '</script><script>alert("1")</script>', "it's a “café”, 猫 & <!-- co", "cow"]
FILES = ["a.jpg", "sub/λόφος 1.png", os.fsdecode(b"caf\xe9.png"), "</script>.png", "broken.jpg", "gone.jpg"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("review") / "images"
    (folder / "sub").mkdir(parents=True)
    for i, file in enumerate(FILES[:3]):
        Image.fromarray(draw_scene(np.random.default_rng(i), TARGET, ["dog"]).image).save(folder / file)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:500])
    return folder


@pytest.fixture(scope="session")
def questions():
    """Some with a map, some about a label; the file of one has a slash in it, which no folder holds."""
    heat = np.zeros((7, 5), np.float32)
    heat[2:4, 1:3] = 0.2
    return [
        Question("a.jpg", CLASSES[0], 0.73, heat, "absent"),
        Question("a.jpg", CLASSES[1], 0.5, heat),
        Question(FILES[1], CLASSES[0], 0.1, None, "present"),
        Question(FILES[2], CLASSES[2], 0.999, heat),
        Question(FILES[3], CLASSES[1], 0.25),
        Question("broken.jpg", CLASSES[0], 0.5),
    ]
