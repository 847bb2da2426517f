"""A few drawn scenes, the model that ships with the project, and the command on them."""

import functools
import json

import pytest
import torch

from tests.helpers.runs import SIZES


@pytest.fixture(scope="session")
def devkit(tmp_path_factory):
    from trm_pipeline.drawn.devkit import write_drawn_voc

    return write_drawn_voc(tmp_path_factory.mktemp("drawn"), sizes=SIZES, workers=1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@functools.cache
def embedded():
    from trm_pipeline.embedded import load_embedded

    return load_embedded()


@pytest.fixture
def run(devkit, cache, tmp_path, monkeypatch):
    """The command with a small data set and a model that is built once; returns its rows."""
    from trm_pipeline.run import experiment, prepare

    monkeypatch.setattr(prepare, "load_embedded", embedded)

    def command(*arguments, output=tmp_path / "out"):
        known = [] if "--known" in arguments else ["--known", "0.5"]
        args = ["--data-root", str(devkit), "--preset", "embedded", "--epochs", "2", "--cache", str(cache), *known]
        device = [] if "--device" in arguments else ["--device", "cpu"]
        experiment.main([*args, *device, "--output", str(output), *arguments])
        return json.loads((output / "results.json").read_text(encoding="utf-8"))

    return command


@pytest.fixture(scope="session")
def backbone():
    from trm_pipeline.config import presets
    from trm_pipeline.run import prepare

    return prepare.load_backbone(presets.EMBEDDED, torch.device("cpu"))
