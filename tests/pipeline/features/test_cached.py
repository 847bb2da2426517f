"""Features of images, encoded in the loop or once and kept."""

import os
import shutil
import signal
import types

import numpy as np
import pytest
import torch

from tests.helpers.grid import save_arrays
from trm_losses.backbones import ImageFeatures
from trm_pipeline.data.base import eval_transform, train_transform
from trm_pipeline.data.voc import VOC
from trm_pipeline.features import cached as features


@pytest.mark.parametrize("given", [None, torch.zeros(2, 6), torch.zeros(2, 3, 6)])
def test_a_tower_without_tokens_is_refused(given):
    """One of somebody's own that gives pooled features alone, or fewer tokens than its grid has places."""

    class Own:
        name, dim, image_size = "own", 6, (8, 16)

        def grid(self, size):
            return 1, 2

        def __call__(self, images):
            pooled = torch.zeros(2, 6)
            return pooled if given is None else ImageFeatures(given, pooled, (1, 2))

    images = [(torch.zeros(3, 8, 16), torch.zeros(1), place) for place in range(2)]
    live = features.LiveFeatures(images, Own(), token_pool=1, device=torch.device("cpu"), workers=0)
    with pytest.raises(ValueError, match=r"own must give ImageFeatures with tokens \(B, N, D\) = \(2, 2, 6\), one for each"):
        next(live.batches(2))


def test_tokens_average_to_the_pooled_feature(devkit, backbone):
    images = VOC(devkit, 2007, "val").with_transform(eval_transform(224, mean=backbone.image_mean, std=backbone.image_std))
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    batch = next(live.batches(4))
    assert batch.tokens.shape[1] == live.num_tokens == 49
    torch.testing.assert_close(batch.tokens.mean(dim=1), batch.pooled, rtol=1e-3, atol=1e-3)
    assert batch.penultimate.shape == (4, live.width)
    torch.testing.assert_close(backbone.model.visual.head(batch.penultimate), batch.pooled, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("free", "expected"), [(64, 0), (6 * 30 - 1, 1), (6 * 30, 2), (10**4, 8)])
def test_workers_fit_into_shared_memory(free, expected, tmp_path, monkeypatch, capsys):
    """Two batches of 30 under way for each, and two more; which is what Docker's 64 have not."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    features._say_once.cache_clear()
    assert [features.fitting_workers(8, 30, tmp_path) for _ in range(2)] == [expected] * 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (expected < 8) and all("--workers 8; " in line and "--shm-size" in line for line in lines)
    assert features.fitting_workers(8, 30, tmp_path / "none") == 8


class Deadly(torch.utils.data.Dataset):
    """Ends the process that reads it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_ended_is_one_line(backbone):
    live = features.LiveFeatures(Deadly(), backbone, token_pool=2, device=torch.device("cpu"), workers=1)
    with pytest.raises(ValueError, match=r"^a process that reads images was ended .*--workers 0; .*--shm-size=2g\)$"):
        next(live.batches(2))


def test_mirrored_views_are_drawn_in_training_only(tmp_path):
    save_arrays(tmp_path, tokens=[np.full((50, 2, 3), v) for v in (0, 1)], pooled=[np.full((50, 3), v) for v in (0, 1)])
    cached = features.CachedFeatures.from_folder(tmp_path, 2, torch.device("cpu"))
    assert all(batch.tokens.sum() == 0 for batch in cached.batches(8))
    drawn = list(cached.batches(8, torch.Generator().manual_seed(0)))
    index = torch.cat([batch.index for batch in drawn])
    assert index.tolist() != sorted(index.tolist()) and sorted(index.tolist()) == list(range(50))
    views = torch.cat([batch.tokens[:, 0, 0] for batch in drawn])
    assert 10 < views.sum() < 40
    assert torch.equal(views, torch.cat([batch.pooled[:, 0] for batch in drawn]))


@pytest.mark.parametrize("further", [True, False])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_cached_rows_are_those_of_their_images(tmp_path, views, further):
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=(views, 11, *shape)).astype(np.float16)
        for name, shape in (("tokens", (2, 3)), ("pooled", (3,)), ("penultimate", (5,)))[: 3 if further else 2]
    }
    save_arrays(tmp_path, **arrays)
    cached = features.CachedFeatures.from_folder(tmp_path, views, torch.device("cpu"))
    seeded = torch.Generator().manual_seed(3)
    order = torch.randperm(11, generator=seeded).tolist()
    drawn = torch.randint(views, (11,), generator=seeded).tolist()  # view of each image, not of each place in the order
    for found, images, chosen in (
        (list(cached.batches(4, torch.Generator().manual_seed(3))), order, drawn),
        (list(cached.batches(4, view=views - 1)), range(11), [views - 1] * 11),
    ):
        assert [len(batch.index) for batch in found] == [4, 4, 3]
        for name, array in arrays.items():
            rows = torch.cat([getattr(batch, name) for batch in found])
            assert rows.dtype == torch.float32
            for row, image in zip(rows, images, strict=True):
                assert row.tolist() == array[chosen[image], image].astype(np.float32).tolist()
        assert torch.cat([batch.index for batch in found]).tolist() == list(images)
        assert all((batch.penultimate is not None) == further for batch in found)


def test_live_features_show_every_image_once_in_an_order_of_the_seed(devkit, backbone):
    random = train_transform(224, mean=backbone.image_mean, std=backbone.image_std)
    images = VOC(devkit, 2007, "val").with_transform(random)

    def epochs(seed, workers):
        live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=workers)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(workers)  # which nothing may depend on
        parts = [list(live.batches(8, generator)) for _ in range(2)]
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(workers)))
        return [tuple(torch.cat(part) for part in zip(*batches, strict=True)) for batches in parts]

    first, again, other = epochs(0, workers=2), epochs(0, workers=0), epochs(1, workers=0)
    for (tokens, pooled, index, further), (tokens_again, pooled_again, index_again, further_again) in zip(
        first, again, strict=True
    ):
        assert sorted(index.tolist()) == list(range(30)) != index.tolist()
        assert torch.equal(index, index_again)
        torch.testing.assert_close((tokens, pooled, further), (tokens_again, pooled_again, further_again))
    orders = [index.tolist() for _, _, index, _ in (*first, *other)]
    assert all(orders.count(order) == 1 for order in orders)
    same = [tokens[index.argsort()] for tokens, _, index, _ in first]
    assert not torch.isclose(*same).flatten(1).all(dim=1).any()  # no image is transformed twice in one way
