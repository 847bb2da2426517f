"""Whether the image as a whole is of use to a folder: what its images say, when they are held out, decides."""

import pytest
import torch

from tests.helpers.grid import in_memory
from trm_pipeline.config.presets import EMBEDDED
from trm_pipeline.folder import learning

CLASSES, DIM = 3, 8


def images(count, *, names, layer):
    """Tokens that point to the texts of present classes, and penultimate features that tell them; 0: not at all."""
    draw = torch.Generator().manual_seed(count)
    targets = (torch.rand(count, CLASSES, generator=draw) < 0.4).float()
    text = torch.eye(CLASSES, DIM)
    noise = torch.randn(count, 4, DIM, generator=draw)
    tokens = noise + names * (targets @ text)[:, None]
    told = torch.randn(count, 40, generator=draw)
    told[:, :CLASSES] += layer * (targets - 0.5)
    return in_memory(tokens[None], tokens[None, :, 0], told[None]), targets, text


@pytest.mark.parametrize("expected", [None, 1.2])
def test_few_images_are_asked_whether_they_do_better_than_names(expected, capsys, monkeypatch):
    own, targets, text = images(60, names=0, layer=8)
    known = torch.where(targets == 1, 1.0, -1.0) if expected else targets
    assert learning.whole_is_of_use(own, known, text, EMBEDDED, expected, seed=0)
    assert "left out" not in "".join(capsys.readouterr())
    # The names tell all, and a prior that was made of too few images takes each class for another.
    own, targets, text = images(30, names=8, layer=0)
    known = torch.where(targets == 1, 1.0, -1.0) if expected else targets
    original = learning.fit_training_free
    monkeypatch.setattr(learning, "fit_training_free", lambda part, text, size: original(part, text.roll(1, 0), size))
    assert not learning.whole_is_of_use(own, known, text, EMBEDDED, expected, seed=0)
    assert "the image as a whole is left out; average precision (%)" in "".join(capsys.readouterr())


def test_a_view_that_is_worse_than_names_may_add_to_them():
    own, targets, text = images(60, names=1, layer=2)
    assert learning.whole_is_of_use(own, targets, text, EMBEDDED, None, seed=0)


def test_many_images_are_not_asked(monkeypatch):
    own, targets, text = images(learning.ENOUGH, names=8, layer=0)
    monkeypatch.setattr(learning, "pooled_ap", None)
    assert learning.whole_is_of_use(own, targets, text, EMBEDDED, None, seed=0)
