"""Whether the image as a whole is of use to a folder: what its images say, when they are held out, decides."""

import pytest
import torch

from trm_pipeline.config.presets import EMBEDDED
from trm_pipeline.features.cached import Batch
from trm_pipeline.folder import learning

CLASSES, DIM = 3, 8


class Images:
    """Features in memory, of which some can be taken."""

    views = 1

    def __init__(self, tokens, penultimate):
        self.tokens, self.penultimate = tokens, penultimate

    def __len__(self):
        return len(self.tokens)

    def only(self, rows):
        return Images(self.tokens[rows], self.penultimate[rows])

    def batches(self, batch_size, generator=None, *, view=0, part=(0, 1)):
        for index in torch.arange(len(self)).split(batch_size):
            yield Batch(self.tokens[index], self.tokens[index, 0], index, self.penultimate[index])


def images(count, *, names, layer):
    """Tokens that point to the texts of present classes, or nowhere; penultimate features that tell classes, or nothing."""
    draw = torch.Generator().manual_seed(count)
    targets = (torch.rand(count, CLASSES, generator=draw) < 0.4).float()
    text = torch.eye(CLASSES, DIM)
    noise = torch.randn(count, 4, DIM, generator=draw)
    tokens = noise + (8 * (targets @ text)[:, None] if names else 0)
    told = torch.randn(count, 40, generator=draw)
    if layer:
        told[:, :CLASSES] = 8 * (targets - 0.5)
    return Images(tokens, told), targets, text


@pytest.mark.parametrize("expected", [None, 1.2])
def test_few_images_are_asked_whether_they_do_better_than_names(expected, capsys, monkeypatch):
    own, targets, text = images(60, names=False, layer=True)
    known = torch.where(targets == 1, 1.0, -1.0) if expected else targets
    assert learning.whole_is_of_use(own, known, text, EMBEDDED, expected, seed=0)
    assert "left out" not in "".join(capsys.readouterr())
    # The names tell all, and a prior that was made of too few images takes each class for another.
    own, targets, text = images(30, names=True, layer=False)
    known = torch.where(targets == 1, 1.0, -1.0) if expected else targets
    original = learning.fit_training_free
    monkeypatch.setattr(learning, "fit_training_free", lambda part, text, size: original(part, text.roll(1, 0), size))
    assert not learning.whole_is_of_use(own, known, text, EMBEDDED, expected, seed=0)
    assert "the image as a whole is left out; average precision (%)" in "".join(capsys.readouterr())


def test_many_images_are_not_asked(monkeypatch):
    own, targets, text = images(learning.ENOUGH, names=True, layer=False)
    monkeypatch.setattr(learning, "pooled_ap", None)
    assert learning.whole_is_of_use(own, targets, text, EMBEDDED, None, seed=0)
