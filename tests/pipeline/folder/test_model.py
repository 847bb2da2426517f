"""The frozen models that are opened."""

import pytest
import torch

from trm_pipeline.features import towers
from trm_pipeline.folder import model as folder_model


def test_a_tag_stays_a_tag(tmp_path, monkeypatch):
    """Whatever lies in the working directory; a path says that a file is meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laion400m_e32").write_bytes(b"weights")
    (tmp_path / "openai").mkdir()
    for tag in ("laion400m_e32", "openai"):
        assert folder_model.weights_file("ViT-B/32", tag) is None
    for name in ("./laion400m_e32", "own.pt"):
        (tmp_path / name).write_bytes(b"weights")
        assert folder_model.weights_file("ViT-B-32", name) == str(tmp_path / name)


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(towers, "load_open_clip", fail)
    with pytest.raises(ValueError, match="could not be fetched .*no network.*--pretrained WEIGHTS.*ViT-B-32-quickgelu"):
        folder_model.open_backbone("ViT-B-32", "openai", None, torch.device("cpu"))
    monkeypatch.setattr(towers, "load_embedded", fail)
    with pytest.raises(RuntimeError, match="^no network$"):  # it is shipped: whatever fails, it is no download
        folder_model.open_backbone("embedded", None, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs --pretrained"):
        folder_model.open_backbone("ViT-B-32", None, None, torch.device("cpu"))
