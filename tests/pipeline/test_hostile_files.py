"""Broken and malicious files, a full disk: one clear line, and what was there stays."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trm_losses as tl
from tests.helpers import ROOT
from tests.helpers.cases.objective import head
from tests.helpers.grid import save_arrays
from trm_losses import TRMHead
from trm_losses._feature_files import RowFile
from trm_pipeline import files as checkpoint
from trm_pipeline.features import cached as features
from trm_pipeline.files import Checkpoint, write_json
from trm_pipeline.run import experiment, results


class Payload:
    """Unpickled with code allowed, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and "weights_only" not in text, text
    return text


def save_head(path: Path) -> None:
    head(2).save(path)


def save_checkpoint(path: Path) -> None:
    Checkpoint(path, {"labels": "a"}).save({"epoch": 1, "method": head(2).state_dict()})


def load_checkpoint(path: Path) -> Any:
    return Checkpoint(path, {"labels": "a"}).load()


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "head": (save_head, TRMHead.load),
    "checkpoint": (save_checkpoint, load_checkpoint),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    save, load = KINDS[kind]
    path = tmp_path / "file.pt"
    save(path)
    whole = path.read_bytes()
    load(path)
    for length in (0, 1, 3, 4, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 23, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="file.pt must be a .*cannot be read") as caught:
            load(path)
        one_sentence(caught.value)
    assert path.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", ["pickle", "torch", "beside the rest"])
def test_code_in_a_file_is_never_run(kind: str, wrapped: str, tmp_path: Path) -> None:
    save, load = KINDS[kind]
    path, made = tmp_path / "file.pt", tmp_path / "made by the payload"
    if wrapped == "pickle":
        path.write_bytes(pickle.dumps(Payload(made), protocol=2))
    else:
        save(path)
        content = torch.load(path, weights_only=True)
        torch.save({**content, "more": Payload(made)} if wrapped == "beside the rest" else Payload(made), path)
    with pytest.raises(ValueError, match="file.pt must be a .*cannot be read") as caught:
        load(path)
    one_sentence(caught.value)
    assert not made.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert made.exists()  # so it would have


@pytest.mark.parametrize("change", ["setting", "missing", "shape", "type"])
def test_a_head_file_of_other_contents_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_head(path)
    content = torch.load(path, weights_only=True)
    if change == "setting":
        content["pooler"]["colour"] = "red"
    elif change == "missing":
        del content["state"]["matching.bias"]
    elif change == "shape":
        content["state"]["pooler.query_weight"] = torch.ones(3)
    else:
        content["told"]["class_names"] = 3
    torch.save(content, path)
    with pytest.raises(ValueError, match="TRMHead: .*file.pt must be a file written by save .*, got other contents") as caught:
        TRMHead.load(path)
    one_sentence(caught.value)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cell.pt"
    torch.save({"made_with": json.dumps({"labels": "a"}), "epoch": 1}, path)
    with pytest.raises(ValueError, match="cell.pt is of version 0, this program of 2; start without --resume"):
        load_checkpoint(path)


# Features -----------------------------------------------------------------------------------------------------------------


def write_features(folder: Path) -> None:
    folder.mkdir()
    save_arrays(folder, tokens=np.ones((2, 5, 4, 3)), pooled=np.ones((2, 5, 3)), penultimate=np.ones((2, 5, 6)))


@pytest.mark.parametrize("name", ["tokens0.npy", "pooled0.npy", "penultimate1.npy"])
@pytest.mark.parametrize("how", ["cut", "empty", "missing", "type", "rank", "count", "width", "pickle", "objects"])
def test_a_broken_cache_of_features_is_refused(name: str, how: str, tmp_path: Path) -> None:
    folder, made = tmp_path / "cache", tmp_path / "made by the payload"
    write_features(folder)
    features.CachedFeatures.from_folder(folder, 2, torch.device("cpu"))
    path = folder / name
    array = np.load(path)
    if how in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 0 if how == "empty" else -7])
    elif how == "missing":
        path.unlink()
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Payload(made), protocol=2))
    else:
        objects = np.empty(1, object)
        objects[0] = Payload(made)
        other = {"type": array.astype(np.float32), "rank": array[0], "count": array[:4], "width": array[..., :2]}
        np.save(path, other.get(how, objects), allow_pickle=True)
    with pytest.raises(ValueError, match=r"cache.* must .*delete") as caught:
        features.CachedFeatures.from_folder(folder, 2, torch.device("cpu"))
    one_sentence(caught.value)
    assert not made.exists()


# A full disk --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode
    except OSError:
        mounted = 1
    if mounted:
        pytest.skip("may mount nothing here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


SAVES: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "head": (save_head, lambda path: tl.TRMHead(*big_parts()).save(path)),
    "checkpoint": (save_checkpoint, lambda path: Checkpoint(path, {}).save({"tensor": torch.zeros(100_000)})),
    "JSON": (lambda path: write_json(path, [1]), lambda path: write_json(path, "x" * 100_000)),
}


def big_parts() -> tuple[Any, ...]:
    return tl.RegionPooler(2, 128), tl.TextRegionMatchingLoss(2), torch.ones(2, 128), ["a", "b"]


@pytest.mark.parametrize("kind", SAVES)
def test_a_full_disk_leaves_the_file_before_and_says_which(kind: str, tiny: Path) -> None:
    small, large = SAVES[kind]
    path = tiny / "file"
    small(path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left on device: '.*tiny/file'"):
        large(path)
    assert path.read_bytes() == before and [p.name for p in tiny.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", SAVES)
def test_a_write_that_fails_leaves_the_file_before(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = SAVES[kind]
    path = tmp_path / "file"
    small(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device: '.*file'"):
        large(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_cache_that_does_not_fit_is_an_error_and_no_killed_process(tiny: Path) -> None:
    """A map is made without its room: the first page that is written to would end the process by a signal."""
    with pytest.raises(OSError, match=r"No space left on device: '.*tokens0.npy'"):
        RowFile(tiny / "tokens0.npy", torch.float16, (100, 20, 100))


# Images and annotations ---------------------------------------------------------------------------------------------------


def test_a_broken_image_ends_a_run_in_one_line_whoever_read_it(devkit: Path, tmp_path: Path) -> None:
    root = shutil.copytree(devkit, tmp_path / "VOCdevkit")
    first = (root / "VOC2007" / "ImageSets" / "Main" / "train.txt").read_text(encoding="utf-8").split()[0]
    path = root / "VOC2007" / "JPEGImages" / f"{first}.jpg"
    path.write_bytes(path.read_bytes()[:500])
    arguments = ["--data-root", str(root), "--preset", "embedded", "--device", "cpu"]
    for workers in ("0", "1"):
        with pytest.raises(SystemExit, match=r"^error: VOC: .*.jpg is not a readable image .*; restore the file$"):
            experiment.main([*arguments, "--workers", workers, "--cache", str(tmp_path / "c"), "--output", str(tmp_path / "o")])


@pytest.mark.parametrize("name", ["run.json", "results.json", "times.json"])
def test_a_broken_record_of_a_run_is_one_clear_line(name: str, tmp_path: Path) -> None:
    run = results.Results(tmp_path, [])
    run.start({"a": 1}, resume=False)
    (tmp_path / name).write_text('{"a": ', encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} must be JSON that a run wrote, and cannot be read .*; start the run afresh"):
        run.start({"a": 1}, resume=True)
    assert checkpoint.read_json(ROOT / "tests" / "project" / "public_names.json")
