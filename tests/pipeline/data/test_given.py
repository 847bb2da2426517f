"""Features of an encoder of one's own: what the library writes, and the comparison on them."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.runs import Run, read_json
from trm_losses import GaussianDiscriminant, TRMHead, write_features
from trm_losses.backbones import ImageFeatures
from trm_losses.metrics import evaluate
from trm_pipeline.config.presets import EMBEDDED
from trm_pipeline.data import given
from trm_pipeline.methods import LABEL_FREE
from trm_pipeline.report.pictures import SaliencyMaps
from trm_pipeline.run import arguments, experiment

NAMES, WIDTH, GRID = ["cat", "dog", "old car", "tree"], 8, (2, 3)
TEXT = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, and tokens and pooled features that lie near the texts of what is present."""
    random = torch.Generator().manual_seed(seed)
    targets = (torch.rand(count, 4, generator=random) < 0.4).float()
    tokens = 0.5 * targets[:, None] @ TEXT + torch.randn(count, 6, WIDTH, generator=random)
    return targets, tokens, tokens.mean(dim=1)


def write(root: Path, split: str, count: int, seed: int, **changes: Any) -> None:
    targets, tokens, pooled = drawn(count, seed)
    seen = (tokens, tokens.flip(1)) if split == "train" else (tokens,)
    views = [zip(view.split(5), pooled.split(5), strict=True) for view in seen]
    settings: dict[str, Any] = {"class_names": NAMES, "text": TEXT, "logit_scale": 20.0, "grid": GRID, "expected_positives": 1.6}
    write_features(root, split, *views, targets=targets, **{**settings, **changes})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given") / "drawn"
    for seed, (split, count) in enumerate({"train": 23, "val": 12, "test": 9}.items()):
        write(root, split, count, seed)
    return root


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "drawn"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def command(root: Path, *arguments: str) -> list[dict[str, Any]]:
        typed = [str(root), "--device", "cpu", "--output", str(tmp_path / "out"), "--epochs", "2", *arguments]
        experiment.main(typed, given.SOURCE)
        return read_json(tmp_path / "out" / "results.json")

    return command


# What is written ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numpy_reads_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    sizes, arrays = (3, 1, 0, 2), {}
    for view in range(2):
        for name, shape in (("tokens", (6, 6, WIDTH)), ("pooled", (6, WIDTH)), ("penultimate", (6, 11))):
            arrays[f"{name}{view}"] = torch.randn(*shape, generator=random)
    kinds = ("tokens", "pooled", "penultimate")
    views = [zip(*(arrays[f"{kind}{view}"].split(sizes) for kind in kinds), strict=True) for view in range(2)]
    targets = torch.randint(-1, 2, (6, 4), generator=random)
    ids = [f"photo {row} é" for row in range(6)]
    given = targets.to(torch.uint8)  # where -1 is 255
    write_features(tmp_path, "train", *views, targets=given, class_names=NAMES, text=TEXT, logit_scale=7, ids=ids, dtype=dtype)
    files = {path.stem: np.load(path, allow_pickle=False) for path in (tmp_path / "train").glob("*.npy")}
    assert set(files) == {*arrays, "targets"}
    for name, values in arrays.items():
        np.testing.assert_array_equal(files[name], values.numpy().astype({torch.float16: "f2", torch.float32: "f4"}[dtype]))
    np.testing.assert_array_equal(files["targets"], targets.numpy())
    np.testing.assert_array_equal(np.load(tmp_path / "text.npy"), TEXT.numpy())
    assert read_json(tmp_path / "meta.json") == {"class_names": NAMES, "logit_scale": 7.0}
    assert (tmp_path / "train" / "ids.txt").read_text(encoding="utf-8").splitlines() == ids


@pytest.mark.parametrize("further", [True, False])
def test_what_a_backbone_gives_is_a_batch(tmp_path: Path, further: bool) -> None:
    targets, tokens, pooled = drawn(5, 0)
    penultimate = (torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),) if further else ()
    batches = [ImageFeatures(tokens, pooled, GRID, *penultimate)]
    write_features(tmp_path, "val", batches, targets=targets, class_names=NAMES, text=TEXT, logit_scale=20.0)
    # The same numbers in another order in memory, and no grid.
    turned = [(tokens.mT.contiguous().mT, *(x.T.contiguous().T for x in (pooled, *penultimate)))]
    write_features(tmp_path, "test", turned, targets=targets, class_names=NAMES, text=TEXT, logit_scale=20.0)
    assert read_json(tmp_path / "meta.json")["grid"] == [2, 3], "that of the split before"
    names = [*(["penultimate0.npy"] if further else []), "pooled0.npy", "targets.npy", "tokens0.npy"]
    assert sorted(path.name for path in (tmp_path / "val").iterdir()) == names
    for name in names:
        np.testing.assert_array_equal(np.load(tmp_path / "test" / name), np.load(tmp_path / "val" / name))
    for x in penultimate:
        np.testing.assert_array_equal(np.load(tmp_path / "val" / "penultimate0.npy"), x.half().numpy())


def test_batches_of_different_kinds_are_refused(tmp_path: Path) -> None:
    targets, tokens, pooled = drawn(5, 0)
    batches = [ImageFeatures(tokens[:3], pooled[:3], GRID, pooled[:3]), ImageFeatures(tokens[3:], pooled[3:], GRID)]
    with pytest.raises(ValueError, match=r"a batch must be \(tokens, pooled\) or \(tokens, pooled, penultimate\), got 2"):
        write_features(tmp_path, "val", batches, targets=targets, class_names=NAMES, text=TEXT, logit_scale=20.0)


def _changed(name: str, index: tuple[int, ...], value: float) -> Callable[[], Iterator[tuple[Tensor, ...]]]:
    def batches() -> Iterator[tuple[Tensor, ...]]:
        parts = dict(zip(("targets", "tokens", "pooled"), drawn(5, 0), strict=True))
        parts[name][index] = value
        yield parts["tokens"][:3], parts["pooled"][:3]
        yield parts["tokens"][3:], parts["pooled"][3:]

    return batches


def _cut(*parts: Callable[[Tensor], Tensor]) -> Callable[[], Iterator[tuple[Tensor, ...]]]:
    def batches() -> Iterator[tuple[Tensor, ...]]:
        _, tokens, pooled = drawn(5, 0)
        yield tokens[:3], pooled[:3]
        yield parts[0](tokens[3:]), *(part(pooled[3:]) for part in parts[1:])

    return batches


def _broken() -> Iterator[tuple[Tensor, ...]]:
    yield from _cut(lambda x: x, lambda x: x)()
    raise ValueError("the encoder stops")


@pytest.mark.parametrize(
    ("batches", "changes", "message"),
    [
        (_changed("tokens", (4, 0, 0), float("nan")), {}, "tokens must be finite, got 1 NaN or infinite of 96 values from"),
        (_changed("pooled", (0, 0), 1e6), {}, "pooled must be finite, got 1 .* from image 0 on in float16"),
        (_cut(lambda x: x[:, :4], lambda x: x), {}, r"tokens must have shape \(B, N, D\) = \(B, 6, 8\), got \(2, 4, 8\)"),
        (_cut(lambda x: x, lambda x: x[:, :4]), {}, r"pooled must have shape \(B, D\) = \(2, 8\), got \(2, 4\)"),
        (_cut(lambda x: x), {}, r"a batch must be \(tokens, pooled\) or \(tokens, pooled, penultimate\), got 1"),
        (_cut(lambda x: x, lambda x: x, lambda x: x), {}, "a batch must be .*, got 3"),
        (_cut(lambda x: x[:1], lambda x: x[:1]), {}, "view 0 must have the 5 images of the targets, got 4"),
        (_broken, {}, "the encoder stops"),
        (None, {"targets": torch.full((5, 4), 0.5)}, r"targets must be 1 \(present\), 0 \(absent\) or -1 \(unknown\), got 0.5"),
        (None, {"targets": torch.ones(5, 3)}, r"targets must have shape \(n, C\) = \(n, 4\), got \(5, 3\)"),
        (None, {"class_names": ["cat", "dog", "cat", "tree"]}, "class_names must be different names, got"),
        (None, {"text": TEXT[:3]}, r"text must have shape \(C, D\) = \(4, D\), got \(3, 8\)"),
        (None, {"text": TEXT[:, :4]}, r"tokens must have shape \(B, N, D\) = \(B, N, 4\), got \(3, 6, 8\)"),
        (None, {"text": TEXT * float("inf")}, "text must be finite, got 32 NaN or infinite of 32"),
        (None, {"logit_scale": 0.0}, "logit_scale must be above 0"),
        (None, {"grid": (2, 2)}, r"grid must be \(h, w\) with h \* w = 6 tokens, got \(2, 2\)"),
        (None, {"ids": ["a", "b"]}, "ids must be 5 names of one line each, got 2"),
        (None, {"dtype": torch.int8}, "dtype must be torch.float16 or torch.float32"),
        (None, {"split": "../train"}, "split must be a name such as 'train'"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    batches: Callable[[], Iterator[Any]] | None, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {"split": "train", "targets": drawn(5, 0)[0], "class_names": NAMES, "text": TEXT, "logit_scale": 20.0, **changes}
    with pytest.raises(ValueError, match=message):
        write_features(tmp_path / "made", settings.pop("split"), (batches or _cut(lambda x: x, lambda x: x))(), **settings)
    assert not (tmp_path / "made").exists() or list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("train", {}, "split 'train' must be new"),
        ("more", {"class_names": NAMES[::-1]}, "class_names must be what the other splits"),
        ("more", {"text": 2 * TEXT}, "text must be what the other splits"),
        ("more", {"expected_positives": None}, "expected_positives must be what the other splits"),
    ],
)
def test_another_split_is_refused_before_anything_is_encoded(
    split: str, changes: dict[str, Any], message: str, folder: Path
) -> None:
    def unasked() -> Iterator[Any]:
        pytest.fail("a batch was asked for")
        yield

    before = sorted(path.name for path in folder.rglob("*"))
    settings = {"class_names": NAMES, "text": TEXT, "logit_scale": 20.0, "expected_positives": 1.6, **changes}
    with pytest.raises((ValueError, FileExistsError), match=message):
        write_features(folder, split, unasked(), targets=torch.ones(5, 4), **settings)  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.rglob("*")) == before


# The comparison -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_method_runs_and_a_trained_head_scores_tokens(
    run: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "test")
    np.save(folder / "val" / "tokens0.npy", np.load(folder / "val" / "tokens0.npy").astype(np.float32))  # either will do
    methods = ["zero-shot-tokens", "linear", "dual-coop", "positive-coop", "trm", "text-pixel+vlpl", "trm-region+scpnet"]
    typed = ["--known", "0.5", "single", "--ablation", "--unseen", "1", "--methods", *methods]
    rows = run(folder, *typed)
    assert {(row["method"], row["known"]) for row in rows} >= {(method, known) for method in methods for known in (0.5, "single")}
    assert {row["expected_positives"] for row in rows if row["known"] == "single"} == {1.6}
    out = capsys.readouterr().out
    assert "23 training images (train), 12 test images (val), given features, 6 tokens of width 8, 2 views of the training" in out
    assert "mAP (%) on the val images" in out and "drawn, given features." in out

    head = TRMHead.load(tmp_path / "out" / "trm-known0.5-seed1.pt")
    assert list(head.class_names) == NAMES
    targets, tokens, _ = drawn(12, 1)
    (row,) = (row for row in rows if row["method"] == "trm" and row["known"] == 0.5)
    metrics = evaluate(torch.logit(head.predict(tokens.half().float())), targets)
    assert row["mAP"] == pytest.approx(metrics["mAP"], abs=1e-3) and row["OF1"] == pytest.approx(metrics["OF1"], abs=1e-3)
    assert not list((tmp_path / "out").glob("saliency*")), "there are no images"
    assert "trm-losses reproduce features" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    before = (tmp_path / "out" / "results.json").read_bytes()
    (tmp_path / "out" / "results.json").write_text(json.dumps(rows[:-3]), encoding="utf-8")
    run(folder, *typed, "--resume")
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    np.save(folder / "train" / "pooled1.npy", np.load(folder / "train" / "pooled0.npy")[::-1])
    with pytest.raises(SystemExit, match="--resume: .* holds a run with other settings: weights was"):
        run(folder, *typed, "--resume")


def test_a_test_split_is_scored_and_tune_scores_val(run: Run, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_text = torch.nn.functional.normalize(TEXT, dim=1)
    for typed, count, seed, split in ((["--tune"], 12, 1, "val"), ([], 9, 2, "test")):
        (row,) = run(written, "--known", "0.5", "--methods", "zero-shot-global", *typed)
        targets, _, pooled = drawn(count, seed)
        cosines = torch.nn.functional.normalize(pooled.half().float(), dim=1) @ from_text.T
        assert row["mAP"] == pytest.approx(evaluate(cosines, targets)["mAP"], abs=1e-3)
        assert f"mAP (%) on the {split} images" in capsys.readouterr().out


def test_classes_that_cannot_be_ranked_are_not_scored(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, values = np.load(path := folder / "test" / "targets.npy"), []
    for hidden in (full[:, :2] == 0, full[:, :2] >= 0):  # absences of two classes, then all that is known of them
        table = full.copy()
        table[:, :2][hidden] = -1
        np.save(path, table)
        values.append([row["mAP"] for row in run(folder, "--methods", "zero-shot-global", "trm", "--known", "0.5")])
        assert "test images over 2 of 4 classes" in capsys.readouterr().out
    assert values[0] == values[1]
    for table in (np.where(full == 0, -1, full), 0 * full, 0 * full - 1):
        np.save(path, table)
        with pytest.raises(SystemExit, match="drawn: the test images are scored, and must have a class with both"):
            run(folder, "--methods", "zero-shot-global")


def test_no_image_is_said_to_have_more_labels_than_classes(run: Run, written: Path) -> None:
    typed = ("--methods", "zero-shot-global", "--known", "single", "--set", "expected_positives=9")
    assert [row["expected_positives"] for row in run(written, *typed)] == [len(NAMES)]


def test_known_labels_may_come_from_a_file(run: Run, written: Path, tmp_path: Path) -> None:
    labels = drawn(23, 0)[0].numpy().astype(np.int8)
    labels[:, 1] = -1
    np.save(tmp_path / "labels.npy", labels)
    typed = ["--labels", str(tmp_path / "labels.npy"), "--labels-encoding", "direct", "--methods", "linear"]
    assert [row["known"] for row in run(written, *typed)] == [0.75]
    typed = [str(written), "--known", "0.5"]
    options = arguments.parse(typed, given.SOURCE)
    assert pickle.loads(pickle.dumps(options)) == options, "processes of --jobs are given it"


def test_saliency_is_drawn_over_images_that_the_ids_lead_to(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "drawn"
    for seed, (split, count) in enumerate({"train": 23, "val": 12}.items()):
        write(root, split, count, seed, ids=[f"images/{split}{row}.png" for row in range(count)])
    (root / "images").mkdir()
    for row in range(12):
        Image.new("RGB", (10, 10), (20 * row, 0, 0)).save(root / "images" / f"val{row}.png")
    run(root, "--known", "0.5", "--methods", "trm")
    maps = SaliencyMaps.load(tmp_path / "out" / "saliency-trm-known0.5-seed1.npz")
    targets, tokens, _ = drawn(12, 1)
    rows = [int(image[0, 0, 0]) // 20 for image in maps.images]  # told by their color
    assert maps.images.shape[1:] == (224, 336, 3) and maps.saliency.shape[2:] == GRID
    assert len(rows) > 1 and np.array_equal(maps.present, targets[rows].bool().numpy())
    head = TRMHead.load(tmp_path / "out" / "trm-known0.5-seed1.pt")
    wanted = head.eval().pooler(tokens[rows].half().float(), head.text).saliency.detach().unflatten(2, GRID)
    np.testing.assert_allclose(maps.saliency, wanted, rtol=1e-4)


def test_penultimate_features_are_read_where_there_are_some(tmp_path: Path) -> None:
    random, root = torch.Generator().manual_seed(5), tmp_path / "drawn"
    targets, tokens, pooled = drawn(6, 0)
    settings: dict[str, Any] = {"class_names": NAMES, "text": TEXT, "logit_scale": 20.0, "targets": targets}
    further = torch.randn(2, 6, 7, generator=random)
    write_features(root, "train", *([(tokens, pooled, view)] for view in further), **settings)
    write_features(root, "val", [(tokens, pooled)], **settings)

    def opened(split: str) -> given.CachedFeatures:
        meta = given.read_meta(root)
        return given.open_split(root / split, WIDTH, meta, torch.device("cpu"), hashlib.blake2b(), first=False)

    for view in (0, 1):
        batches = list(opened("train").batches(4, view=view))
        torch.testing.assert_close(torch.cat([b.penultimate for b in batches]), further[view].half().float())  # type: ignore[misc]
    assert next(opened("val").batches(4)).penultimate is None
    path = root / "train" / "penultimate1.npy"
    whole = np.load(path)
    for spoiled, message in (
        (_put(whole.copy(), (2, 3), np.nan), "penultimate1.npy must be finite, got NaN or infinity in row 2"),
        (whole[:, :4], r"penultimate1.npy must have shape \(6, 7\), got \(6, 4\)"),
        (whole.astype(np.float64), "penultimate1.npy must be of float16 or float32, got float64"),
    ):
        np.save(path, spoiled)
        with pytest.raises(ValueError, match=message):
            opened("train")
    path.unlink()
    with pytest.raises(
        ValueError, match="penultimate features must be of one width in both splits, got 7 in train and none in val"
    ):
        np.save(path, whole)
        given.given(root, EMBEDDED, ("train", "val"), torch.device("cpu"))
    (first := path.with_name("penultimate0.npy")).rename(root / "aside")
    with pytest.raises(ValueError, match="penultimate1.npy must stand beside those of earlier views"):
        opened("train")
    (root / "aside").rename(first)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="penultimate1.npy not found"):
        opened("train")


def _meta(**changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        found = read_json(root / "meta.json")
        (root / "meta.json").write_text(json.dumps({**found, **changes}), encoding="utf-8")

    return change


def _array(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda root: np.save(root / name, change(np.load(root / name)))


def _put(array: Any, index: Any, value: float) -> Any:
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "meta.json not found .*no such folder.*write_features"),
        (lambda root: (root / "meta.json").unlink(), "meta.json not found .* holds: test, text.npy, train, val.; FEATURES is"),
        (lambda root: (root / "meta.json").write_text("{", encoding="utf-8"), "meta.json must be JSON"),
        (lambda root: (root / "meta.json").write_text("[]", encoding="utf-8"), "meta.json must be a JSON object, got list"),
        (_meta(class_names=NAMES[:3]), r"targets.npy must have shape \(n, 3\), got \(23, 4\)"),
        (_meta(class_names=["cat", "dog", "cat", "tree"]), "class_names must be different, got 'cat' 2 times"),
        (_meta(class_names="cat"), "class_names must be a list of names"),
        (_meta(logit_scale=None), "logit_scale must be above 0, 100 for CLIP, got None"),
        (_meta(grid=[2, 2]), r"tokens0.npy must have shape \(23, 4, 8\), got \(23, 6, 8\)"),
        (_meta(grid=6), r"grid must be \[height, width\]"),
        (_meta(expected_positives=-1), "expected_positives must be above 0"),
        (lambda root: (root / "text.npy").unlink(), "text.npy not found"),
        (_array("text.npy", lambda a: a[:3]), r"text.npy must have shape \(4, D\), got \(3, 8\)"),
        (_array("text.npy", lambda a: a[:, :4]), r"tokens0.npy must have shape \(23, 6, 4\), got \(23, 6, 8\)"),
        (lambda root: shutil.rmtree(root / "train"), r"has no split 'train' \(it has: test, val\)"),
        (lambda root: [shutil.rmtree(root / split) for split in ("val", "test")], r"has no split 'val' \(it has: train\)"),
        (lambda root: [shutil.rmtree(root / name) for name in ("train", "val", "test")], r"no split 'train' \(it has: none\)"),
        (lambda root: (root / "train" / "pooled1.npy").unlink(), "train/pooled1.npy not found"),
        (lambda root: (root / "test" / "targets.npy").unlink(), "test/targets.npy not found"),
        (lambda root: (root / "train" / "tokens1.npy").write_bytes(b"no"), "tokens1.npy must be an array of numpy's"),
        (_array("train/tokens1.npy", lambda a: a[:, :4]), r"tokens1.npy must have shape \(23, 6, 8\), got \(23, 4, 8\)"),
        (_array("test/tokens0.npy", lambda a: a[..., :4]), r"test/tokens0.npy must have shape \(9, 6, 8\), got \(9, 6, 4\)"),
        (_array("test/pooled0.npy", lambda a: a[:5]), r"test/pooled0.npy must have shape \(9, 8\), got \(5, 8\)"),
        (_array("train/tokens0.npy", lambda a: a.astype(np.float64)), "tokens0.npy must be of float16 or float32, got float64"),
        (_array("train/tokens1.npy", lambda a: _put(a, (7, 2, 3), np.nan)), "train/tokens1.npy must be finite, .* in row 7"),
        (_array("test/pooled0.npy", lambda a: _put(a, (2, 3), np.inf)), "test/pooled0.npy must be finite, .* in row 2"),
        (_array("train/targets.npy", lambda a: _put(a, (2, 3), 2)), r"targets.npy must hold 1 .*, got 2; see trm_losses.labels"),
        (_array("train/targets.npy", lambda a: a * 0.5), r"targets.npy must hold 1 .*, got 0.5"),
        (lambda root: np.save(root / "test" / "penultimate0.npy", np.ones((8, 5))), r"penultimate0.npy must have shape \(9, W\)"),
        (
            lambda root: (root / "test" / "ids.txt").write_text("a\nb\n", encoding="utf-8"),
            "ids.txt must name 9 images, one a line, got 2",
        ),
        (lambda root: (root / "test" / "ids.txt").write_bytes(b"caf\xe9\n" * 9), "test/ids.txt, line 1: not UTF-8"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(spoil: Callable[[Path], object], message: str, run: Run, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run(folder, "--known", "0.5", "--methods", "linear")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "voc2007-rn101"], "prompts=shared needs a text tower, and given features have none; give --set prompts"),
        (["--set", "test_split=tset"], r"has no split 'tset' \(it has: test, train, val\)"),
        (["--set", "test_split=train"], "training and test images must be different splits, got 'train' for both"),
        (["--set", "augment=true"], "--set augment is for images that a run encodes, and given features are encoded"),
        (["--unseen", "3"], "--unseen must leave two classes of 4 to train on, got 3"),
    ],
)
def test_settings_that_given_features_cannot_have(arguments: list[str], message: str, run: Run, written: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        run(written, "--known", "0.5", "--methods", "linear", *arguments)


# Without a label ----------------------------------------------------------------------------------------------------------


def test_a_table_without_any_label(run: Run, written: Path, tmp_path: Path) -> None:
    """The methods that learn nothing of labels, by themselves; training-free is the library's, on the first view of train."""
    rows = run(written, "--known", "0")
    assert [(row["method"], row["known"]) for row in rows] == [(method, 0) for method in LABEL_FREE]
    (_, tokens, _), (targets, test, _) = (drawn(count, seed) for count, seed in ((23, 0), (9, 2)))
    classifier = GaussianDiscriminant(4, WIDTH).fit([tokens.half().float()], TEXT)
    wanted = evaluate(classifier(test.half().float()), targets, threshold=0.0)["mAP"]
    assert rows[-1]["mAP"] == pytest.approx(wanted, abs=0.01) and rows[-1]["OF1"] is None
    assert "training-free" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    both = run(written, "--known", "0", "0.5", "single", "--seeds", "1", "2", "--methods", "training-free")
    assert len({row["mAP"] for row in (*both, rows[-1])}) == 1, "it learns nothing of labels"
    (other,) = run(written, "--known", "0", "--methods", "training-free", "--set", "training-free.tokens_per_class=2")
    assert other["mAP"] != rows[-1]["mAP"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--methods", "linear"], "linear"),
        (["--methods", "training-free", "text-pixel+splc"], r"text-pixel\+splc"),
        (["--grid"], "linear"),
        (["--known", "0", "0.5"], "linear"),
        (["--ablation"], r"trm \(--ablation\)"),
        (["--unseen", "1"], r"trm \(--unseen\)"),
    ],
)
def test_what_needs_labels_is_refused_where_there_are_none(arguments: list[str], name: str, run: Run, written: Path) -> None:
    with pytest.raises(SystemExit, match=f"^error: --known 0 leaves no label, and {name} needs some;"):
        run(written, "--known", "0", *arguments)


def test_photographs(run: Run, shared_data: Path) -> None:
    if not (root := shared_data / "photographs").is_dir():
        pytest.skip(f"no photographs in {shared_data}")
    rows = run(root, "--known", "0", "--methods", "zero-shot-tokens", "training-free")
    assert [row["mAP"] for row in rows] == pytest.approx([75.7, 79.8], abs=0.05)  # as measured where these features were made
