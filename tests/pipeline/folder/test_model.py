"""Thresholds of a model, and the models that are opened."""

import itertools
import math

import numpy as np
import pytest
import torch

from trm_pipeline.folder import model as folder_model


def ranked(word):
    """Scores and labels of images that are P (present) or N from the highest score to the lowest."""
    return np.linspace(0.95, 0.05, len(word)), np.array([letter == "P" for letter in word]).astype(int)


def drawn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 30)
    return np.round(rng.random(30) * 0.7 + 0.3 * labels, 1 if seed % 2 else 6), labels


# In the first of the words four thresholds are equally good, in the second the lowest is best, below every score.
@pytest.mark.parametrize(("scores", "labels"), [*map(drawn, range(8)), ranked("PPPNNPNNPNNP"), ranked("NNNNNPPPPPP")])
def test_thresholds_are_those_of_the_best_f1(scores, labels):
    distinct = sorted(set(scores.tolist()))
    tried = [distinct[0] / 2] + [(a + b) / 2 for a, b in itertools.pairwise(distinct)]
    best, chosen = -1.0, math.nan
    for threshold in tried:
        found = [s > threshold for s in scores]
        right = sum(1 for f, y in zip(found, labels, strict=True) if f and y)
        f1 = 2 * right / (sum(found) + labels.sum())
        if f1 > best + 1e-9 or (abs(f1 - best) <= 1e-9 and abs(threshold - 0.5) < abs(chosen - 0.5)):
            best, chosen = f1, threshold
    got = folder_model.choose_threshold(torch.tensor(scores), torch.tensor(labels))
    assert got == pytest.approx(chosen, abs=1e-6)


def test_no_threshold_from_few_labels():
    scores = torch.linspace(0, 1, 12)
    assert folder_model.choose_threshold(scores, (scores > 0.7).float(), least=5) is None  # four present
    assert folder_model.choose_threshold(scores, (scores > 0.3).float(), least=5) is None  # four absent
    assert folder_model.choose_threshold(scores, (scores > 0.5).float(), least=5) == pytest.approx(0.5)
    assert folder_model.choose_threshold(scores[:0], scores[:0]) is None


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

    monkeypatch.setattr(folder_model, "load_open_clip", fail)
    with pytest.raises(ValueError, match="could not be fetched .*no network.*--pretrained WEIGHTS.*ViT-B-32-quickgelu"):
        folder_model.open_backbone("ViT-B-32", "openai", None, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs --pretrained"):
        folder_model.open_backbone("ViT-B-32", None, None, torch.device("cpu"))
