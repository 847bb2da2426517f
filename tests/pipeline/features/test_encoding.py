"""Features that are encoded once: when they are read again, and what a stopped process leaves to the next."""

import contextlib
import os
import shutil

import numpy as np
import pytest
import torch

from tests.helpers.grid import Means
from trm_pipeline.data.base import eval_transform
from trm_pipeline.data.voc import VOC
from trm_pipeline.features import cached as features
from trm_pipeline.features import encoding


def test_what_is_cached_is_what_is_encoded(devkit, backbone, tmp_path, monkeypatch):
    images = VOC(devkit, 2007, "test").with_transform(eval_transform(224, mean=backbone.image_mean, std=backbone.image_std))
    images.image_paths, images.targets, images.ids = images.image_paths[:3], images.targets[:3], images.ids[:3]
    options = {"token_pool": 2, "device": torch.device("cpu"), "workers": 0}
    monkeypatch.setattr(encoding, "BATCH", 2)
    cached = encoding.cache_features(tmp_path, images, images.image_paths, backbone, weights="a", mirror=True, **options)
    for view in (0, 1):
        live = next(features.LiveFeatures(images, backbone, mirror=bool(view), **options).batches(3))
        found = next(cached.batches(3, view=view))
        for kind in ("tokens", "pooled", "penultimate"):
            torch.testing.assert_close(getattr(found, kind), getattr(live, kind).half().float(), rtol=1e-2, atol=1e-3)


class Counted(torch.utils.data.Dataset):
    """Images of one color each, the number of the image; it counts what is read, and image ``bad`` ends the process."""

    def __init__(self, bad=-1, count=5):
        self.bad, self.count, self.read = bad, count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.bad:
            raise KeyboardInterrupt
        self.read.append(index)
        return torch.full((3, 8, 16), float(index)), torch.zeros(1), index


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """What caches images, five by default, two at a time, in two views by default."""
    files = [tmp_path / str(place) for place in range(6)]
    for file in files:
        file.touch()
    monkeypatch.setattr(encoding, "BATCH", 2)
    settings = {"weights": "a", "token_pool": 1, "device": torch.device("cpu"), "workers": 0}

    def made(images, mirror=True, tower=None, **changes):
        paths = list(map(str, files[: len(images)]))
        given = {**settings, "mirror": mirror, **changes}
        return encoding.cache_features(tmp_path / "cache", images, paths, tower or Means(), **given)

    return made


def assert_whole(cached):
    for kind in (cached.tokens, cached.pooled):
        assert all(kind[view][..., 0].flatten().tolist() == [*range(5)] for view in (0, 1))


class Quarters(Means):
    """Four tokens."""

    def grid(self, size):
        return 2, 2

    def __call__(self, pixels):
        tokens = torch.nn.functional.avg_pool2d(pixels, (4, 8)).flatten(2).mT
        return super().__call__(pixels)._replace(tokens=tokens, grid=(2, 2))


@pytest.mark.parametrize(
    ("own", "changes"),
    [
        ({}, {"weights": "b"}),
        ({}, {"token_pool": 2}),
        ({"name": "other"}, {}),
        ({"image_size": (16, 8)}, {}),
        ({"image_mean": (1.0,) * 3}, {}),
        ({"image_std": (2.0,) * 3}, {}),
        ({"value_path": True}, {}),
    ],
    ids=str,
)
def test_a_stale_cache_is_never_read(own, changes, cache, tmp_path):
    other, tower = Counted(), Quarters()
    cache(Counted(), tower=Quarters())
    vars(tower).update(own)
    assert cache(other, tower=tower, **changes).tokens[0].shape[1] == (1 if "token_pool" in changes else 4)
    assert other.read == [*range(5)] * 2 and len(list((tmp_path / "cache").iterdir())) == 2


def test_what_was_encoded_before_a_stop_is_not_encoded_again(cache, tmp_path):
    stopped = Counted(bad=3)
    with pytest.raises(KeyboardInterrupt):
        cache(stopped)
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.endswith(".unfinished") and stopped.read == [0, 1, 2]
    again = Counted()
    assert_whole(cache(again))
    assert again.read == [2, 3, 4, *range(5)]  # the batch of image 2 was not written
    (whole,) = (tmp_path / "cache").iterdir()
    assert sorted(path.suffix for path in whole.iterdir()) == [".json", *[".npy"] * 6]
    assert_whole(cache(Counted(bad=0)))  # nothing is read


@pytest.mark.parametrize("place", [2, 4])
def test_another_process_may_be_quicker(cache, place):
    """It gives the cache its name while this one encodes its first batches, or its last."""
    other = Counted()

    class Slow(Counted):
        def __getitem__(self, index):
            if index == place and not other.read:
                cache(other)
            return super().__getitem__(index)

    slow = Slow()
    assert_whole(cache(slow))
    assert other.read


@pytest.mark.parametrize("bad", [-1, 3])
def test_what_is_cached_of_a_file_is_not_encoded_again_in_another_list(cache, tmp_path, bad):
    """One image more, one that has changed, and another view; of a cache that is finished, or was stopped."""
    with contextlib.suppress(KeyboardInterrupt):
        cache(Counted(bad), mirror=False)
    (tmp_path / "1").write_bytes(b"another")
    more = Counted(count=6)
    assert cache(more).tokens[1][:, 0, 0].tolist() == [*range(6)]
    assert more.read == ([1, 5] if bad < 0 else [1, 2, 3, 4, 5]) + [*range(6)]


def test_an_image_that_cannot_be_read_is_tried_again(cache):
    class Broken(Counted):
        def __getitem__(self, index):
            pixels, *rest = super().__getitem__(index)
            return (pixels * float("nan") if index == 2 else pixels), *rest

    assert np.isnan(cache(Broken()).pooled[0]).any(axis=1).tolist() == [False, False, True, False, False]
    again = Counted()
    assert_whole(cache(again))
    assert again.read == [2, 2]
    assert_whole(cache(Counted(bad=0)))


def test_what_a_killed_process_of_the_same_number_left_behind_is_in_nobodys_way(cache, tmp_path):
    """In a container every run may have the number of the one before."""
    cache(Counted())
    (whole,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(whole)
    left = whole.with_name(f".{whole.name}.{os.getpid()}")
    left.mkdir()
    (left / "tokens0.npy").write_bytes(b"half")
    assert_whole(cache(Counted()))
    assert (left / "tokens0.npy").read_bytes() == b"half"


def test_features_of_another_number_of_images_are_refused(cache, tmp_path):
    cache(Counted())
    for path in (tmp_path / "cache").glob("*/*.npy"):
        np.save(path, np.load(path)[:2])
    with pytest.raises(ValueError, match="must hold the features of 5 images, got 2; delete it"):
        cache(Counted())


def test_an_array_that_is_gone_is_no_array_of_zeros(cache, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(Counted(bad=3))
    next((tmp_path / "cache").glob("*/pooled1.npy")).unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold pooled1.npy, which is gone; delete the folder"):
        cache(Counted())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}"])
@pytest.mark.parametrize("name", ["tokens0.npy", "made_with.json"])
def test_a_damaged_cache_is_not_taken_from(cache, tmp_path, name, content):
    cache(Counted())
    next((tmp_path / "cache").glob(f"*/{name}")).write_bytes(content)
    more = Counted(count=6)
    assert cache(more).tokens[0][:, 0, 0].tolist() == [*range(6)] and more.read == [*range(6)] * 2


def test_a_cache_of_another_shape_is_not_taken_from(cache, tmp_path):
    cache(Counted())
    path = next((tmp_path / "cache").glob("*/tokens1.npy"))
    np.save(path, np.zeros((5, 3, 2), np.float16))
    assert cache(Counted(count=6)).tokens[1][:, 0, 0].tolist() == [*range(6)]
