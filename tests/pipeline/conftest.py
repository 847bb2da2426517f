"""A few drawn scenes, the model that ships with the project, and the command on them."""

import functools

import pytest
import torch

from tests.helpers.runs import SIZES, read_json, typed
from trm_pipeline.config import presets
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.embedded import load_embedded
from trm_pipeline.features import towers
from trm_pipeline.run import experiment, prepare


@pytest.fixture(scope="session")
def devkit(tmp_path_factory):
    return write_drawn_voc(tmp_path_factory.mktemp("drawn"), sizes=SIZES, workers=1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@functools.cache
def embedded():
    return load_embedded()


@pytest.fixture
def run(devkit, cache, tmp_path, monkeypatch):
    """The command with a small data set and a model that is built once; returns its rows."""
    monkeypatch.setattr(towers, "load_embedded", embedded)

    def command(*arguments, output=tmp_path / "out"):
        unless_said = {"--known": "0.5", "--device": "cpu"}
        more = [word for option in unless_said.items() if option[0] not in arguments for word in option]
        experiment.main([*typed(data_root=devkit, preset="embedded", epochs=2, cache=cache, output=output), *more, *arguments])
        return read_json(output / "results.json")

    return command


@pytest.fixture(scope="session")
def backbone():
    return prepare.load_backbone(presets.EMBEDDED, torch.device("cpu"))
