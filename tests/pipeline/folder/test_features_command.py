"""The command features: what it writes, and what is left of it when a process, an image or the folder goes away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import ROOT
from tests.helpers.own_folder import CLASSES, write_table
from tests.helpers.runs import read_json
from trm_losses import _feature_files
from trm_losses.backbones import OpenClipBackbone
from trm_pipeline import command as cli
from trm_pipeline.config.presets import EMBEDDED
from trm_pipeline.data import given
from trm_pipeline.data.base import Place, eval_transform
from trm_pipeline.embedded import load_embedded
from trm_pipeline.features import encoding, unfinished
from trm_pipeline.folder.image_files import read_image

PLACE = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 5)


@pytest.fixture(scope="module")
def labels(images, tmp_path_factory):
    folder, rows = images
    return write_table(tmp_path_factory.mktemp("labels") / "labels.csv", rows, hidden=(0,))


@pytest.fixture(scope="module")
def whole(images, labels, tmp_path_factory):
    """What an undisturbed call writes."""
    output = tmp_path_factory.mktemp("whole") / "features"
    cli.main(["features", str(images[0]), str(labels), "--output", str(output), "--mirror", *PLACE])
    return output


def names(folder: Path, images: Path) -> list[str]:
    return [os.path.relpath(name, images) for name in (folder / "ids.txt").read_text(encoding="utf-8").splitlines()]


def rows(folder: Path, images: Path) -> dict[str, list[np.ndarray]]:
    """Everything that is written of an image, by its name; rows that went through in other batches differ in the last bit."""
    kinds = [np.load(path) for path in sorted(folder.glob("*.npy"))]
    ids = names(folder, images)
    assert {len(kind) for kind in kinds} == {len(ids)}
    return {name: [kind[row].astype(np.float32) for kind in kinds] for row, name in enumerate(ids)}


def assert_same(found: Path, wanted: Path, images: Path) -> None:
    assert {path.name for path in found.iterdir()} == {path.name for path in wanted.iterdir()}
    (own, other) = (rows(folder / "train", images) for folder in (found, wanted))
    assert own.keys() == other.keys()
    for name, kinds in other.items():
        for kind, values in zip(own[name], kinds, strict=True):
            np.testing.assert_allclose(kind, values, rtol=2e-3, atol=2e-3)
    assert sorted(path.name for path in (found / "train").iterdir()) == sorted(path.name for path in (wanted / "train").iterdir())
    assert read_json(found / "meta.json") == read_json(wanted / "meta.json")


def test_it_writes_what_the_model_gives_and_what_is_known(images, whole):
    folder, known = images
    meta = given.read_meta(whole)
    assert meta.class_names == CLASSES and meta.grid == (7, 7)  # as train has them
    found = rows(whole / "train", folder)
    assert set(found) == set(known) - {"cut.jpg", "empty.png"}
    tower = OpenClipBackbone(load_embedded()[0], name="embedded")
    transform = eval_transform(tower.image_size, mean=tower.image_mean, std=tower.image_std)
    for name in ("3.png", "λόφος/35.jpg"):  # the last one stands where a broken one stood
        pixels = transform(read_image(folder / name, tower.image_size))[None]
        views = [tower(pixels), tower(pixels.flip(3))]
        penultimate, mirrored, pooled, _, targets, tokens, turned = found[name]
        for own, wanted in (
            (tokens, views[0].tokens),
            (turned, views[1].tokens),
            (pooled, views[0].pooled),
            (penultimate, views[0].penultimate),
            (mirrored, views[1].penultimate),
        ):
            if wanted.ndim == 3:
                wanted = wanted.unflatten(1, (7, 2, 7, 2)).mean(dim=(2, 4)).flatten(1, 2)
            np.testing.assert_allclose(own, wanted[0].numpy(), rtol=2e-3, atol=2e-3)
        place = list(known).index(name)
        assert [-1 if (place + c) % 3 == 0 else value for c, value in enumerate(known[name])] == targets.tolist()
    lines = (whole / "train" / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(folder / name) for name in ("cut.jpg", "empty.png")]
    assert "truncated" in lines[0] and "the file is empty" in lines[1]
    read = given.read(Place(whole, whole), EMBEDDED, "train")
    assert Path(read.image_paths[0]).is_file()


def test_reproduce_reads_it(images, whole, tmp_path, capsys):
    output = shutil.copytree(whole, tmp_path / "features")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    some = tmp_path / "some"
    some.mkdir()
    for name in ("1.png", "2.png", "4.png"):
        shutil.copy(images[0] / name, some / name)
    table = write_table(tmp_path / "val.csv", {name: images[1][name] for name in ("1.png", "2.png", "4.png")})
    arguments = ["--output", str(output), "--classes", str(tmp_path / "names.txt"), "--split", "val", *PLACE]
    cli.main(["features", str(some), str(table), *arguments])
    chosen = ["--known", "0.5", "--methods", "zero-shot-tokens", "--output", str(tmp_path / "run"), "--device", "cpu"]
    cli.main(["reproduce", "features", str(output), *chosen])
    assert read_json(tmp_path / "run" / "results.json")
    capsys.readouterr()
    cli.main(["features", str(some), *arguments])
    assert "is there already and stays as it is" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from trm_pipeline import command
from trm_pipeline.features import encoding as features
features.KEPT, features.BATCH = -1.0, 5
original, count = features.Pace.add, [0]
def add(self, done):
    count[0] += 1
    if count[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, done)
features.Pace.add = add
command.main(sys.argv[1:])
"""


def test_a_killed_process_goes_on_where_it_stopped(images, labels, whole, tmp_path, capsys):
    output = tmp_path / "features"
    arguments = ["features", str(images[0]), str(labels), "--output", str(output), "--mirror", *PLACE]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (output / "train").exists()
    marks = unfinished.Unfinished(output / ".train.unfinished").marks()
    assert (marks == 1).sum() == 15 and (marks == 0).sum() == 2 * 38 - 15  # three batches of one view
    cli.main(arguments)
    assert "train: encoding 23 of 38 images\n" in capsys.readouterr().out
    assert_same(output, whole, images[0])


def test_an_image_that_changed_while_it_was_stopped_is_encoded_again(images, labels, tmp_path, capsys):
    folder, output = shutil.copytree(images[0], tmp_path / "images"), tmp_path / "features"
    arguments = ["features", str(folder), str(labels), "--output", str(output), *PLACE]
    cli.main([*arguments, "--part", "1/2"])
    shutil.copy(folder / "9.png", folder / "1.png")
    capsys.readouterr()
    cli.main(arguments)
    assert "train: encoding 20 of 38 images\n" in capsys.readouterr().out  # the other half, and this one
    found = rows(output / "train", folder)
    for own, other in zip(found["1.png"][:2], found["9.png"][:2], strict=True):  # penultimate and pooled
        np.testing.assert_allclose(own, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("step", [0, 1, 2, 6, 7])
def test_stopped_while_it_is_put_together(images, labels, whole, tmp_path, step, monkeypatch):
    """After each of six arrays is cut to the images that can be read, before labels are written, and before the name."""
    output = tmp_path / "features"
    arguments = ["features", str(images[0]), str(labels), "--output", str(output), "--mirror", *PLACE]
    if step == 0:
        monkeypatch.setattr(unfinished.Unfinished, "finish", lambda self, *rest: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 130
    else:
        calls: list[int] = []
        keep, close = _feature_files.RowFile.keep, unfinished.close_split

        def kept(self, rows):
            if len(calls) == step - 1:
                raise OSError("gone")
            calls.append(1)
            keep(self, rows)

        def closed(*rest):
            raise OSError("gone")

        monkeypatch.setattr(_feature_files.RowFile, "keep", kept)
        monkeypatch.setattr(unfinished, "close_split", closed)
        with pytest.raises(SystemExit, match="gone"):
            cli.main(arguments)
        monkeypatch.setattr(_feature_files.RowFile, "keep", keep)
        monkeypatch.setattr(unfinished, "close_split", close)
    monkeypatch.undo()
    cli.main(arguments)
    assert_same(output, whole, images[0])


def test_rows_can_be_cut_in_two_steps(tmp_path):
    """A file whose rows were moved, and whose end was not cut off, is cut by the next call."""
    file = _feature_files.RowFile(tmp_path / "a.npy", torch.float16, (6, 2))
    file.write(0, torch.arange(12).view(6, 2).float())
    file.keep([0, 5, 2, 4])
    before = np.load(tmp_path / "a.npy")
    file._file.truncate(_feature_files._HEAD + 24)
    file.keep([0, 5, 2, 4])
    assert before[:, 0].tolist() == [0, 10, 4, 8] and np.array_equal(np.load(tmp_path / "a.npy"), before)
    file.close()


def test_parts_side_by_side(images, labels, whole, tmp_path):
    output = tmp_path / "features"
    arguments = ["features", str(images[0]), str(labels), "--output", str(output), "--mirror", *PLACE]
    code = "import sys; from trm_pipeline.command import main; main(sys.argv[1:])"
    starts = [[sys.executable, "-c", code, *arguments, "--part", f"{k}/2"] for k in (1, 2)]
    running = [subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE) for start in starts]
    said = [process.communicate(timeout=300)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum("36 images; 2 left out" in one for one in said) == 1
    assert_same(output, whole, images[0])


def test_images_that_vanish_are_named_and_the_others_kept(images, labels, whole, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(images[0], tmp_path / "images")
    output = tmp_path / "features"
    arguments = ["features", str(folder), str(labels), "--output", str(output), "--mirror", *PLACE]
    original, calls = unfinished.Unfinished.write, []
    gone = {1: ["8.png"], 9: ["9.png", "λόφος/10.jpg"]}  # in the first view, and before the second

    def write(*rest):
        calls.append(1)
        for name in gone.get(len(calls), ()):
            (folder / name).unlink()
        return original(*rest)

    monkeypatch.setattr(unfinished.Unfinished, "write", write)
    cli.main(arguments)
    said = capsys.readouterr().out
    assert "33 images; 5 left out, see unreadable.txt" in said and "8.png: [Errno 2] No such file" in said
    found, wanted = rows(output / "train", folder), rows(whole / "train", images[0])
    assert set(found) == set(wanted) - {"8.png", "9.png", "λόφος/10.jpg"}
    for name, kinds in found.items():
        for kind, values in zip(kinds, wanted[name], strict=True):
            np.testing.assert_allclose(kind, values, rtol=2e-3, atol=2e-3)


def test_a_folder_that_goes_away_loses_nothing(images, labels, whole, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(images[0], tmp_path / "images")
    output = tmp_path / "features"
    arguments = ["features", str(folder), str(labels), "--output", str(output), "--mirror", *PLACE]
    original, calls = unfinished.Unfinished.write, []

    def write(*rest):
        calls.append(1)
        if len(calls) == 3:
            folder.rename(tmp_path / "elsewhere")
        return original(*rest)

    monkeypatch.setattr(unfinished.Unfinished, "write", write)
    with pytest.raises(SystemExit, match="is gone; what was encoded is kept: bring it back"):
        cli.main(arguments)
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(arguments)
    (tmp_path / "elsewhere").rename(folder)
    (folder / "0.png").unlink(missing_ok=True)
    Image.new("RGB", (9, 9)).save(folder / "new.png")  # without a row
    cli.main(arguments)
    (folder / "new.png").unlink()
    assert sorted(names(output / "train", folder)) == sorted(names(whole / "train", images[0]))
    assert "1 images without a row are left out" in capsys.readouterr().out


def test_a_column_split_makes_two_splits_and_classes_may_be_more(images, tmp_path):
    folder, known = images
    table = tmp_path / "lists.csv"
    side = {"1.png": "train", "2.png": "val", "4.png": "train"}
    table.write_text("".join(["image,labels,split\n", *(f"{n},dog;car,{s}\n" for n, s in side.items())]), encoding="utf-8")
    (tmp_path / "names.txt").write_text("person\ncar\ndog\nsheep\n", encoding="utf-8")
    output = tmp_path / "features"
    more = ["--classes", str(tmp_path / "names.txt"), "--expected-positives", "1.5", *PLACE]
    cli.main(["features", str(folder), str(table), "--output", str(output), *more])
    assert np.load(output / "train" / "targets.npy").tolist() == [[-1, 1, 1, -1]] * 2
    assert names(output / "val", folder) == ["2.png"] and np.load(output / "val" / "tokens0.npy").shape[:2] == (1, 49)
    meta = given.read_meta(output)
    assert meta.expected_positives == 1.5 and meta.grid == (7, 7)
    shutil.rmtree(output / "val")
    table.write_text(table.read_text(encoding="utf-8").replace("4.png,dog;car,train", "4.png,dog;car,val"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"1 of 2 images of val are in .*train already, such as .*4\.png; take them out"):
        cli.main(["features", str(folder), str(table), "--output", str(output), *more])
    # A third split, of another size: it does not belong here.
    test = ["features", str(folder / "λόφος"), "--output", str(output), "--split", "test"]
    with pytest.raises(SystemExit, match="was made with something else .token_pool was 2, now 1"):
        cli.main([*test, "--token-pool", "1", *more])
    (tmp_path / "names.txt").write_text("person\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="class_names must be what the other splits"):
        cli.main([*test, *more])


def test_what_was_begun_otherwise_is_not_gone_on_with(images, labels, tmp_path, capsys):
    output = tmp_path / "features"
    arguments = ["features", str(images[0]), str(labels), "--output", str(output), *PLACE]
    cli.main([*arguments, "--part", "1/2"])
    assert not (output / "train").exists() and "reproduce features" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"unfinished features of something else \(views was 1, now 2.*delete it"):
        cli.main([*arguments, "--mirror"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give a file of labels, or --classes FILE"),
        (["LABELS", "--part", "3/2"], "--part must be K/N with K from 1 to N, such as 1/4, got '3/2'"),
        (["LABELS", "--part", "0/2"], "got '0/2'"),
        (["LABELS", "--split", "dev"], "--split must be one of train, val, test, got 'dev'"),
        (["LABELS", "--token-pool", "3"], "--token-pool must divide the grid of tokens 14 x 14, got 3"),
        (["LABELS", "--token-pool", "0"], "--token-pool must be at least 1, got 0"),
        (["LABELS", "--expected-positives", "0"], "--expected-positives must be above 0, got 0"),
        (["LABELS", "--classes", "NAMES"], "NAMES.* must name all classes of .*, got none of 'car'"),
        (["LABELS", "--output", "INSIDE"], "lies in the image folder"),
        (["LABELS", "--output", "OTHER"], "no meta.json, so it is no features folder; write into another one"),
    ],
)
def test_errors_at_the_door(images, labels, tmp_path, arguments, said):
    (tmp_path / "NAMES").write_text("person\ndog\nsheep\n", encoding="utf-8")
    (tmp_path / "OTHER" / "photos").mkdir(parents=True)
    places = {"LABELS": labels, "NAMES": tmp_path / "NAMES", "INSIDE": images[0] / "features", "OTHER": tmp_path / "OTHER"}
    given_labels, rest = (arguments[:1], arguments[1:]) if arguments[:1] == ["LABELS"] else ([], arguments)
    words = [str(images[0]), *given_labels, "--output", str(tmp_path / "features"), *PLACE, *rest]
    with pytest.raises(SystemExit, match=said):
        cli.main(["features", *(str(places.get(word, word)) for word in words)])
    assert not (tmp_path / "features" / "train").exists()


def test_torchrun_is_refused(images, labels, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"got 2 of torchrun; start several.*--part 1/2"):
        cli.main(["features", str(images[0]), str(labels), "--output", str(tmp_path / "features"), *PLACE])
