"""Models of open_clip by tag and by file."""

import pytest
import torch

from trm_pipeline.features import towers


def test_a_tag_stays_a_tag(tmp_path, monkeypatch):
    """Whatever lies in the working directory; a path says that a file is meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laion400m_e32").write_bytes(b"weights")
    (tmp_path / "openai").mkdir()
    for tag in ("laion400m_e32", "openai"):
        assert towers.weights_file("ViT-B/32", tag) is None
    for name in ("./laion400m_e32", "own.pt"):
        (tmp_path / name).write_bytes(b"weights")
        assert towers.weights_file("ViT-B-32", name) == str(tmp_path / name)


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(towers, "load_open_clip", fail)
    with pytest.raises(ValueError, match="could not be fetched .*no network.*--pretrained WEIGHTS.*ViT-B-32-quickgelu"):
        towers.open_tower("ViT-B-32", "openai", None, torch.device("cpu"))
    monkeypatch.setattr(towers, "load_embedded", fail)
    with pytest.raises(RuntimeError, match="^no network$"):  # it is shipped: whatever fails, it is no download
        towers.open_tower("embedded", None, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs --pretrained"):
        towers.open_tower("ViT-B-32", None, None, torch.device("cpu"))
