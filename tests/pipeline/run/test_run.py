"""The pipeline of the examples from end to end: a few drawn scenes, the model that ships with the project."""

import contextlib
import functools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("safetensors")

from trm_losses import PseudoLabels, TRMHead, TRMObjective
from trm_losses.labels import hide_labels, keep_single_positive
from trm_losses.metrics import mean_average_precision
from trm_pipeline import files as checkpoint
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.config.settings import override
from trm_pipeline.data.voc import VOC, class_prompt_names, eval_transform, train_transform
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.embedded import load_embedded
from trm_pipeline.features import cached as features
from trm_pipeline.methods import grid
from trm_pipeline.report import tables
from trm_pipeline.run import arguments, cells, experiment, prepare, results
from trm_pipeline.training import loop as training
from trm_pipeline.training.pseudo_trace import PseudoTrace

SIZES = {"train": 40, "val": 30, "test": 30}
COLUMNS = {
    "method",
    "known",
    "seed",
    "mAP",
    "mAP_interpolated",
    "OF1",
    "CF1",
    "CF1_per_class",
    "best_epoch_mAP",
    "expected_positives",
}


@pytest.fixture(scope="session")
def devkit(tmp_path_factory):
    return write_drawn_voc(tmp_path_factory.mktemp("drawn"), sizes=SIZES, workers=1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@functools.cache
def embedded():
    return load_embedded()


@pytest.fixture
def run(devkit, cache, tmp_path, monkeypatch):
    """The command with a small data set and a model that is built once; returns its rows."""
    monkeypatch.setattr(prepare, "load_embedded", embedded)

    def command(*arguments, output=tmp_path / "out"):
        known = [] if "--known" in arguments else ["--known", "0.5"]
        args = ["--data-root", str(devkit), "--preset", "embedded", "--epochs", "2", "--cache", str(cache), *known]
        device = [] if "--device" in arguments else ["--device", "cpu"]
        experiment.main([*args, *device, "--output", str(output), *arguments])
        return json.loads((output / "results.json").read_text(encoding="utf-8"))

    return command


@pytest.fixture(scope="session")
def backbone():
    return prepare.load_backbone(presets.EMBEDDED, torch.device("cpu"))


@pytest.mark.pictures
def test_every_method_gives_a_row_for_every_share_and_seed(run, tmp_path, capsys):
    rows = run("--known", "0.1", "1", "--seeds", "1", "2")
    assert {(row["method"], row["known"], row["seed"]) for row in rows} == {
        (method, known, seed) for method in arguments.DEFAULT_METHODS for known in (0.1, 1.0) for seed in (1, 2)
    }
    assert len(rows) == len(arguments.DEFAULT_METHODS) * 4
    for row in rows:
        assert set(row) == COLUMNS
        assert 0 < row["mAP"] <= row["mAP_interpolated"] <= 100 and row["best_epoch_mAP"] >= row["mAP"] - 1e-3
        assert (row["OF1"] is None) == row["method"].startswith("zero-shot")
    table = capsys.readouterr().out
    assert "| method" in table and "| trm " in table and "±" in table
    assert (tmp_path / "out" / "map_against_known.png").stat().st_size > 10_000


def test_saved_heads_score_like_the_run(run, tmp_path, devkit, backbone):
    heads = ("trm", "trm-query+splc", "trm-region+sarb")
    rows = run("--methods", *heads, "linear+splc", "--known", "0.5", "--set", "batch_size=8")
    assert {path.name for path in (tmp_path / "out").glob("*.pt")} == {f"{name}-known0.5-seed1.pt" for name in heads}
    plain = eval_transform(224, mean=backbone.image_mean, std=backbone.image_std)
    images = VOC(devkit, 2007, "test", transform=plain)
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    tokens = torch.cat([batch.tokens for batch in live.batches(16)])
    for name, row in zip(heads, rows, strict=False):
        head = TRMHead.load(tmp_path / "out" / f"{name}-known0.5-seed1.pt")
        assert head.class_names[14] == "person" and row["method"] == name
        # The run read tokens in half precision.
        found = float(mean_average_precision(head.predict(tokens), images.targets))
        assert 100 * found == pytest.approx(row["mAP"], abs=0.5)


def test_the_same_command_gives_the_same_rows(run, tmp_path):
    first = run("--methods", "trm", "text-pixel", output=tmp_path / "a")
    second = run("--methods", "trm", "text-pixel", output=tmp_path / "b")
    assert first == second
    assert (tmp_path / "a" / "results.json").read_bytes() == (tmp_path / "b" / "results.json").read_bytes()


def test_features_are_encoded_once(run, cache, capsys):
    run("--methods", "zero-shot-global")
    capsys.readouterr()
    run("--methods", "zero-shot-tokens")
    assert "encoding" not in capsys.readouterr().out
    assert not [path for path in (cache / "features").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("change", ["weights", "size", "pool", "image"])
def test_a_stale_cache_is_never_read(change, devkit, backbone, tmp_path):
    shutil.copytree(devkit, tmp_path / "VOCdevkit")
    images = VOC(tmp_path, 2007, "test", transform=eval_transform(224, mean=(0, 0, 0), std=(1, 1, 1)))
    images.image_paths = images.image_paths[:4]
    images.targets = images.targets[:4]
    images.ids = images.ids[:4]

    def encode(weights="a", pool=2, size=(224, 224)):
        backbone.image_size = size
        images.transform = eval_transform(size, mean=(0, 0, 0), std=(1, 1, 1))
        try:
            return features.cache_features(
                tmp_path / "cache",
                images,
                images.image_paths,
                backbone,
                weights=weights,
                token_pool=pool,
                mirror=False,
                device=torch.device("cpu"),
            )
        finally:
            backbone.image_size = (224, 224)

    encode()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    if change == "weights":
        encode(weights="b")
    elif change == "size":
        assert encode(size=(192, 192)).tokens[0].shape[1] == 36
    elif change == "pool":
        assert encode(pool=1).tokens[0].shape[1] == 196
    else:
        before = encode().tokens[0][0].copy()
        shutil.copy(images.image_paths[1], images.image_paths[0])
        after = encode().tokens[0]
        assert (before != after[0]).any() and (after[0] == after[1]).all()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_weights_digest_sees_a_changed_weight(backbone):
    before = features.weights_digest(backbone)
    parameter = next(backbone.parameters())
    with torch.no_grad():
        parameter[0] += 1
        changed = features.weights_digest(backbone)
        parameter[0] -= 1
    assert changed != before


def test_tokens_average_to_the_pooled_feature(devkit, backbone):
    images = VOC(devkit, 2007, "val", transform=eval_transform(224, mean=backbone.image_mean, std=backbone.image_std))
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    batch = next(live.batches(4))
    assert batch.tokens.shape[1] == live.num_tokens == 49
    torch.testing.assert_close(batch.tokens.mean(dim=1), batch.pooled, rtol=1e-3, atol=1e-3)


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


def test_regions_beat_the_global_feature_before_training(tmp_path_factory, backbone):
    """At step 0 the region head must already be clearly above global zero-shot, or attention starts in the wrong place."""
    root = write_drawn_voc(tmp_path_factory.mktemp("gate"), sizes={"train": 1, "val": 200, "test": 1}, workers=1)
    images = VOC(root, 2007, "val", transform=eval_transform(224, mean=backbone.image_mean, std=backbone.image_std))
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    text = backbone.template_text(class_prompt_names(presets.EMBEDDED.split_words), presets.EMBEDDED.templates)
    objective = TRMObjective.from_text(text, total_steps=1)
    with torch.no_grad():
        parts = [
            (methods.zero_shot_global(batch, text), objective.matching.logits(objective.pooler(batch.tokens, text).region, text))
            for batch in live.batches(50)
        ]
    globally, regions = (
        100 * float(mean_average_precision(torch.cat(logits), images.targets)) for logits in zip(*parts, strict=True)
    )
    assert regions >= globally + 10


def test_mirrored_views_are_drawn_in_training_only(tmp_path):
    import numpy as np

    for view in (0, 1):
        np.save(tmp_path / f"tokens{view}.npy", np.full((50, 2, 3), view, dtype=np.float16))
        np.save(tmp_path / f"pooled{view}.npy", np.full((50, 3), view, dtype=np.float16))
    cached = features.CachedFeatures(tmp_path, 2, torch.device("cpu"))
    assert all(batch.tokens.sum() == 0 for batch in cached.batches(8))
    drawn = list(cached.batches(8, torch.Generator().manual_seed(0)))
    index = torch.cat([batch.index for batch in drawn])
    assert index.tolist() != sorted(index.tolist()) and sorted(index.tolist()) == list(range(50))
    views = torch.cat([batch.tokens[:, 0, 0] for batch in drawn])
    assert 10 < views.sum() < 40
    assert torch.equal(views, torch.cat([batch.pooled[:, 0] for batch in drawn]))


@pytest.mark.parametrize("views", [1, 2, 3])
def test_cached_rows_are_those_of_their_images(tmp_path, views):
    import numpy as np

    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=(views, 11, *shape)).astype(np.float16)
        for name, shape in (("tokens", (2, 3)), ("pooled", (3,)))
    }
    for name, array in arrays.items():
        for view in range(views):
            np.save(tmp_path / f"{name}{view}.npy", array[view])
    cached = features.CachedFeatures(tmp_path, views, torch.device("cpu"))
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


def test_learned_contexts_through_the_text_tower(run):
    (row,) = run("--methods", "trm", "--set", "prompts=shared", "num_context=4")
    assert row["mAP"] > 0


def test_augmentation_encodes_in_the_loop(run, capsys):
    (row,) = run("--methods", "text-pixel", "--epochs", "1", "--set", "augment=true")
    assert row["mAP"] > 0


def test_live_features_show_every_image_once_in_an_order_of_the_seed(devkit, backbone):
    random = train_transform(224, mean=backbone.image_mean, std=backbone.image_std, rand_augment=True)
    images = VOC(devkit, 2007, "val", transform=random)

    def epochs(seed, workers):
        live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=workers)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(workers)  # which nothing may depend on
        parts = [list(live.batches(8, generator)) for _ in range(2)]
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(workers)))
        return [tuple(torch.cat(part) for part in zip(*batches, strict=True)) for batches in parts]

    first, again, other = epochs(0, workers=2), epochs(0, workers=0), epochs(1, workers=0)
    for (tokens, pooled, index), (tokens_again, pooled_again, index_again) in zip(first, again, strict=True):
        assert sorted(index.tolist()) == list(range(30)) != index.tolist()
        assert torch.equal(index, index_again)
        torch.testing.assert_close((tokens, pooled), (tokens_again, pooled_again))
    orders = [index.tolist() for *_, index in (*first, *other)]
    assert all(orders.count(order) == 1 for order in orders)
    same = [tokens[index.argsort()] for tokens, _, index in first]
    assert not torch.isclose(*same).flatten(1).all(dim=1).any()  # no image is transformed twice in one way


def test_tune_never_touches_the_test_images(run, capsys):
    run("--methods", "zero-shot-global", "--tune")
    assert "(train)" in (out := capsys.readouterr().out) and "(val)" in out and "(test)" not in out


def test_seed_one_hides_labels_by_the_published_procedure(devkit, run, monkeypatch):
    seen = []
    original = cells.hide_labels
    monkeypatch.setattr(cells, "hide_labels", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    run("--methods", "linear", "--known", "0.1")
    full = VOC(devkit, 2007, "train").targets
    assert torch.equal(seen[0], hide_labels(full, 0.1, seed=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--known", "10"], "10 % is 0.1"),
        (["--model", "RN50"], "needs --pretrained"),
        (["--image-size", "100"], "multiple of the stride"),
        (["--set", "speed=3"], "NAME=VALUE"),
        (["--methods", "linear+what"], "HEAD.LOSS with a head of linear"),
        (["--methods", "linear+ll-r", "--set", "ll-r.delta=3"], "delta must"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--set", "batch_size=0"], "batch_size must be at least 1"),
        (["--device", "nothing"], "cannot be used here"),
        (["--set", "test_split=train"], "must be different splits"),
        (["--set", "epochs=many"], "must be of type int"),
        (["--data-root", "/nowhere/at/all"], "not found"),
        (["--set", "token_pool=3"], "token_pool must divide"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--workers", "-1"], "workers must be at least 0"),
        (["--known", "0.5", "--ablation-known", "0.1"], "must be among --known"),
        (["--known", "single", "--set", "expected_positives=none"], "needs expected_positives"),
        (["--unseen", "19"], "must leave two classes"),
        (["--unseen", "2", "--set", "pooler.query=free"], "queries that come from text"),
        (["--set", "single_negative_until=never"], "must be 'end' or 'warmup'"),
    ],
)
def test_bad_input_is_one_clear_line(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run("--methods", "zero-shot-global", *arguments)


def test_download_needs_a_place(tmp_path):
    with pytest.raises(SystemExit, match="--download needs --data-root"):
        experiment.main(["--download", "--cache", str(tmp_path), "--output", str(tmp_path)])


def test_weights_of_another_model_are_refused(run, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {"visual.conv1.weight": torch.zeros(3, 3)}}, path)
    with pytest.raises(SystemExit, match="other.pt"):
        run("--methods", "zero-shot-global", "--model", "RN50", "--pretrained", str(path))


def test_override_reads_values_by_type():
    preset = override(
        presets.EMBEDDED, ["lr=1e-2", "mirror=false", "pseudo_rule=quantile", "labeler.weight_neg=2", "pretrained=none"]
    )
    assert (preset.lr, preset.mirror, preset.pseudo_rule, preset.labeler) == (0.01, False, "quantile", {"weight_neg": 2.0})
    assert preset.pretrained is None and override(preset, ["labeler.weight_neg=none"]).labeler == {"weight_neg": None}


def test_table_shows_mean_and_deviation():
    rows = [
        {"method": "a", "known": 0.1, "seed": 1, "mAP": 10.0},
        {"method": "a", "known": 0.1, "seed": 2, "mAP": 14.0},
        {"method": "b", "known": 0.5, "seed": 1, "mAP": 50.0},
    ]
    assert tables.mean_table(rows) == [["method", "10%", "50%"], ["a", "12.0 ± 2.8", ""], ["b", "", "50.0"]]


def test_drawn_voc_is_deterministic_whatever_the_workers(tmp_path, devkit):
    again = write_drawn_voc(tmp_path, sizes=SIZES, workers=2)
    for split in SIZES:
        first, second = (VOC(root, 2007, split, cross_check=True) for root in (devkit, again))
        assert len(first) == SIZES[split] and first.ids == second.ids
        assert torch.equal(first.targets, second.targets)
        assert torch.equal(first[0][0], second[0][0]) and first[0][0].shape == (3, 224, 224)
    other = write_drawn_voc(tmp_path, sizes=SIZES, seed=1, workers=1)
    assert not torch.equal(VOC(other, 2007, "train").targets, VOC(devkit, 2007, "train").targets)


def test_a_half_written_data_set_is_never_used(tmp_path):
    first = write_drawn_voc(tmp_path, sizes={"train": 2, "val": 1, "test": 1}, workers=1)
    (first.parent / "stamp.json").unlink()
    (first / "VOC2007" / "ImageSets" / "Main" / "train.txt").unlink()
    second = write_drawn_voc(tmp_path, sizes={"train": 2, "val": 1, "test": 1}, workers=1)
    assert second == first and len(VOC(second, 2007, "train")) == 2


# Single positive labels


def test_single_positives_know_one_present_label_of_each_image(run, devkit, monkeypatch, capsys):
    seen = []
    original = cells.train
    monkeypatch.setattr(cells, "train", lambda *a, **k: seen.append((a[2], k["single"])) or original(*a, **k))
    rows = run("--methods", "linear", "zero-shot-global", "--known", "0.5", "single", "--seeds", "3")
    full = VOC(devkit, 2007, "train").targets
    assert torch.equal(seen[0][0], hide_labels(full, 0.5, seed=2)) and not seen[0][1]
    assert torch.equal(seen[1][0], keep_single_positive(full, seed=2)) and seen[1][1]
    assert [(row["known"], row["expected_positives"]) for row in rows] == 2 * [(0.5, None), ("single", 2.4)]
    assert "| 50%" in (out := capsys.readouterr().out) and "| single (k=2.4) " in out


def test_single_positives_start_from_the_assumed_share(run, monkeypatch):
    priors = []
    original = methods.LinearProbe.calibrate
    monkeypatch.setattr(methods.LinearProbe, "calibrate", lambda self, *a: priors.append(a[2]) or original(self, *a))
    run("--methods", "linear", "--known", "single", "--set", "expected_positives=4")
    assert priors == [4 / 20]


@pytest.mark.parametrize("single", [False, True])
def test_the_labeller_is_told_what_single_positives_cannot_tell(single):
    setting = methods.Setting(presets.EMBEDDED, torch.randn(20, 8), None, 100.0, 10, single=single, num_samples=3)
    labeler = methods.METHODS["trm"](setting).objective.labeler
    assert labeler.expected_positives == (2.4 if single else None)


def test_weak_negatives_follow_their_equation():
    torch.manual_seed(0)
    query, region = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True).unbind()
    targets = torch.randint(-1, 2, (5, 4)).double()
    expected = sum(
        factor * math.log(1 + math.exp(float(logits[b, c].detach())))
        for factor, logits in ((1.0, query), (0.5, region))
        for b in range(5)
        for c in range(4)
        if targets[b, c] == -1
    )
    terms = methods.weak_negatives(targets, 0.3, (1.0, query), (0.5, region))
    assert float(terms["weak_negative"].detach()) == pytest.approx(0.3 * 4 * expected / 5, rel=1e-9)  # 4 classes
    (gradient,) = torch.autograd.grad(terms["weak_negative"], query)
    assert ((gradient != 0) == (targets == -1)).all()
    assert methods.weak_negatives(targets, 0.0, (1.0, query)) == {}


@pytest.mark.parametrize("method", ["linear", "linear-assume-negative", "text-pixel", "trm-region", "trm"])
def test_every_method_takes_unknown_labels_for_weak_negatives(method):
    torch.manual_seed(0)
    text = torch.randn(4, 8)
    trained = methods.METHODS[method](methods.Setting(presets.EMBEDDED, text, None, 100.0, 10, num_samples=3))
    batch = features.Batch(torch.randn(3, 5, 8), torch.randn(3, 8), torch.arange(3))
    targets = torch.tensor([[1, -1, -1, -1], [-1, 1, -1, -1], [0, -1, -1, -1.0]])
    plain, weak = (trained.loss(batch, text, targets, weight) for weight in (0.0, 0.3))
    assert set(weak) - set(plain) == {"weak_negative"}
    assert (float(weak["weak_negative"].detach()) == 0) == (method == "linear-assume-negative")
    if method == "trm":
        output = trained._last
        both = torch.nn.functional.softplus(output.logits) + torch.nn.functional.softplus(output.region_logits)
        torch.testing.assert_close(weak["weak_negative"], 0.3 * 4 / 3 * both[targets == -1].sum())


@pytest.mark.parametrize(
    ("method", "until", "steps"),
    [
        ("trm-region-pseudo", "end", 20),
        ("trm-region-pseudo", "warmup", 4),
        ("trm-region", "warmup", 20),
        ("linear", "warmup", 20),
    ],
)
def test_weak_negatives_last_until_pseudo_labels_take_their_place(run, monkeypatch, method, until, steps):
    weights = []
    kind = methods.LinearProbe if method == "linear" else methods.TRM
    original = kind.loss
    monkeypatch.setattr(kind, "loss", lambda self, *a: weights.append(a[3]) or original(self, *a))
    run(
        "--methods",
        method,
        "--known",
        "single",
        "0.5",
        "--set",
        "batch_size=4",
        f"single_negative_until={until}",
        "single_negative=0.2",
        "pseudo_warmup=0.2",
    )
    assert weights[:20] == [0.2] * steps + [0.0] * (20 - steps)
    assert weights[20:] == [0.0] * 20


# Other methods' losses


def test_a_pattern_of_the_grid_runs_like_any_method(run, tmp_path, capsys):
    settings = ("--methods", "linear", "linear+ll-c?", "trm-region+vlpl", "--known", "0.5", "single", "--set", "ll-ct.delta=0.01")
    rows = run(*settings, "batch_size=16")
    names = ["linear", "linear+ll-ct", "linear+ll-cp", "trm-region+vlpl"]
    assert [(row["method"], row["known"]) for row in rows] == [(name, known) for known in (0.5, "single") for name in names]
    out = tmp_path / "out"
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["preset"]["losses"]["ll-ct"]["delta"] == 0.01
    assert " 8/8 |" in (said := capsys.readouterr().out) and "| its own " in said
    pictures = {"map_against_known.png", "map_against_known-linear.png", "map_against_known-trm-region.png"}
    heads = {f"trm-region+vlpl-{known}-seed1.pt" for known in ("known0.5", "single")}
    assert {path.name for path in out.glob("*.p*")} == pictures | heads
    before = (out / "results.json").read_bytes()
    run(*settings, "batch_size=16", "--resume")
    assert (out / "results.json").read_bytes() == before


def test_the_grid_is_planned_whole():
    cells = results.plan(arguments.parse(["--methods", "trm", "--grid", "--known", "0.1", "--seeds", "1"]))
    assert [cell.method for cell in cells] == ["trm", *grid.HEADS, "positive-coop", *grid.GRID]


# Ablations


def test_ablations_stand_beside_the_methods(run):
    settings = ("--known", "0.5", "single", "--ablation", "--ablation-known", "single", "--set", "batch_size=4", "lr=1e-2")
    rows = run("--methods", "trm", *settings)
    parts, rules = ("region", "distillation", "pseudo", "contrast"), ("prototype", "quantile")
    variants = [*(f"trm-no-{part}" for part in parts), *(f"trm-rule-{rule}" for rule in rules)]
    assert [(row["method"], row["known"]) for row in rows] == [
        ("trm", 0.5),
        ("trm", "single"),
        *((variant, "single") for variant in variants),
    ]
    assert len({row["mAP"] for row in rows[1:]}) > 3


def test_there_is_a_variant_for_each_rule():
    for rule in presets.PSEUDO_RULES:
        method, changes = presets.VARIANTS[f"trm-rule-{rule}"]
        assert method == "trm" and override(presets.EMBEDDED, changes).pseudo_rule == rule


def variant(name, text):
    method, changes = presets.VARIANTS[name]
    preset = override(presets.EMBEDDED, changes)
    return methods.METHODS[method](methods.Setting(preset, text, None, 100.0, 10, num_samples=3))


def test_variants_lack_the_part_that_their_names_say():
    torch.manual_seed(0)
    text = torch.randn(4, 8)
    batch = features.Batch(torch.randn(3, 5, 8), torch.randn(3, 8), torch.arange(3))
    targets = torch.tensor([[1, -1, 0, -1], [-1, 1, -1, 0], [0, -1, -1, -1.0]])
    everything = set(variant("trm-rule-prototype", text).loss(batch, text, targets))
    for part, missing in (
        ("distillation", {"distillation"}),
        ("contrast", {"contrast"}),
        ("pseudo", {"pseudo_query", "pseudo_region"}),
    ):
        assert everything - set(variant(f"trm-no-{part}", text).loss(batch, text, targets)) == missing
    without = variant("trm-no-region", text)
    without.loss(batch, text, targets)
    pooled = torch.nn.functional.normalize(batch.pooled, dim=-1)
    torch.testing.assert_close(without._last.features, pooled[:, None].expand(-1, 4, -1))
    other = batch._replace(tokens=torch.randn(3, 5, 8))
    torch.testing.assert_close(without.logits(batch, text), without.logits(other, text))


# How right pseudo-labels are


def test_pseudo_labels_are_counted_as_loops_count_them():
    torch.manual_seed(0)
    truth = torch.randint(-1, 2, (12, 5)).float()
    trace = PseudoTrace(truth)
    counts = {"pos": [0, 0, 0], "neg": [0, 0, 0]}
    for index in torch.randperm(12).split(4):
        targets = torch.where(torch.rand(4, 5) < 0.3, truth[index], -1.0)
        labels = torch.where(targets == -1, torch.tensor([-1.0, 0.0, 0.7])[torch.randint(3, (4, 5))], -1.0)
        trace.add(PseudoLabels(labels, torch.ones(4, 5), torch.ones(4, 5)), targets, index)
        for row, i in enumerate(index.tolist()):
            for c in range(5):
                if targets[row, c] != -1 or truth[i, c] == -1:
                    continue
                label, true = float(labels[row, c]), float(truth[i, c])
                for key, said, is_true in (("pos", label > 0, true == 1), ("neg", label == 0, true == 0)):
                    counts[key][0] += said and is_true
                    counts[key][1] += said
                    counts[key][2] += is_true
    trace.point(7)
    trace.point(8)
    first, empty = trace.points
    assert first == {
        "step": 7,
        "positive_precision": pytest.approx(counts["pos"][0] / counts["pos"][1], abs=1e-4),
        "positive_recall": pytest.approx(counts["pos"][0] / counts["pos"][2], abs=1e-4),
        "negative_precision": pytest.approx(counts["neg"][0] / counts["neg"][1], abs=1e-4),
        "negative_recall": pytest.approx(counts["neg"][0] / counts["neg"][2], abs=1e-4),
        "decided": counts["pos"][1] + counts["neg"][1],
    }
    assert empty == {**dict.fromkeys(first, None), "step": 8, "decided": 0}


def test_a_run_leaves_the_trace_of_its_pseudo_labels(run, tmp_path):
    run("--methods", "trm", "linear", "--set", "batch_size=4", "pseudo_warmup=0")
    (path,) = (tmp_path / "out" / "pseudo").iterdir()
    points = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "trm-known0.5-seed1.json"
    assert [point["step"] for point in points] == [3, 5, 8, 10, 13, 15, 18, 20]
    assert points[-1]["decided"] > 0


def test_the_hidden_truth_changes_nothing_but_the_trace(run, tmp_path, monkeypatch):
    settings = ("--methods", "trm", "--set", "batch_size=8", "pseudo_warmup=0")
    first = run(*settings, output=tmp_path / "a")
    original = cells.train
    monkeypatch.setattr(cells, "train", lambda *a, truth, **k: original(*a, truth=1 - truth, **k))
    assert run(*settings, output=tmp_path / "b") == first
    traces = [json.loads((tmp_path / name / "pseudo" / "trm-known0.5-seed1.json").read_text(encoding="utf-8")) for name in "ab"]
    assert traces[0] != traces[1]


# Interrupted runs

SMALL = ("--methods", "trm", "linear", "--known", "0.5", "single", "--epochs", "3", "--set", "batch_size=16")


def die_at(moment, arguments):
    """The command, in a process of its own that is killed in the middle of something."""
    calls = 0

    def after(calls_before, original, last_words=lambda *a: None):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > calls_before:
                last_words(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapped

    if moment == "in an epoch":
        methods.TRM.after_step = after(4, methods.TRM.after_step)
    elif moment == "between a cell and its row":
        results.Results.add = after(1, results.Results.add)
    elif moment == "between two cells":
        results.checkpoint_path = after(0, results.checkpoint_path)
    elif moment == "writing a checkpoint":
        Path.write_bytes = after(2, Path.write_bytes, lambda path, content: path.write_text("half", encoding="utf-8"))
    elif moment == "writing the results":
        replace, writing = os.replace, after(1, os.replace)
        os.replace = lambda source, path: (writing if str(path).endswith("results.json") else replace)(source, path)
    experiment.main(arguments)


def in_a_group(arguments, said):
    """The command as a shell starts it: head of a group of processes, ended by Ctrl-C; its errors go into a file."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which one started in the background lacks
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    experiment.main(arguments)


@pytest.fixture(scope="module")
def command(devkit, cache):
    """Arguments of the small run for a process of its own; all of them, and this one, have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ["--data-root", str(devkit), "--preset", "embedded", "--cache", str(cache), "--device", "cpu", *SMALL]
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def forked():
    """Starts a function in a process that has imported all there is: a fork of a server without threads."""
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join(map(str, (root, root / "tools", root / "tests")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip", "test_pipeline"])
    with pytest.MonkeyPatch.context() as patch:  # for the server, which lives on
        for name, value in {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    """The folder of the small run that nothing interrupts."""
    output = tmp_path_factory.mktemp("unbroken")
    experiment.main([*command, "--output", str(output)])
    return output


def assert_same_run(first, second):
    assert (first / "results.json").read_bytes() == (second / "results.json").read_bytes()
    assert not list((first / "checkpoints").glob("*.pt"))
    for path in (second / "pseudo").iterdir():
        assert (first / "pseudo" / path.name).read_bytes() == path.read_bytes()
    for path in second.glob("*.pt"):
        heads = [TRMHead.load(folder / path.name).state_dict() for folder in (first, second)]
        assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())


@pytest.mark.parametrize(
    "moment", ["in an epoch", "between a cell and its row", "between two cells", "writing a checkpoint", "writing the results"]
)
def test_a_killed_run_goes_on_to_the_same_results(moment, command, forked, unbroken, tmp_path):
    arguments = [*command, "--output", str(tmp_path / "out")]
    killed = forked(die_at, moment, arguments)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    finished = tmp_path / "out" / "results.json"
    assert not finished.exists() or len(json.loads(finished.read_text(encoding="utf-8"))) < 4
    experiment.main([*arguments, "--resume"])
    assert_same_run(tmp_path / "out", unbroken)


def test_a_checkpoint_is_gone_on_from_at_its_epoch(command, unbroken, tmp_path, monkeypatch):
    arguments = [*command, "--output", str(tmp_path)]
    original, epochs = checkpoint.Checkpoint.save, []

    def interrupted(self, state):
        epochs.append(state["epoch"])
        original(self, state)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", interrupted)
    with pytest.raises(SystemExit, match="--resume goes on"):
        experiment.main(arguments)
    experiment.main([*arguments, "--resume"])
    assert epochs == [1, 2, 3, *3 * [1, 2, 3]]
    assert_same_run(tmp_path, unbroken)


def test_a_finished_run_has_nothing_to_resume(command, unbroken, monkeypatch, capsys):
    before = (unbroken / "results.json").read_bytes(), (unbroken / "times.json").read_bytes()
    monkeypatch.setattr(cells, "train", None)
    experiment.main([*command, "--output", str(unbroken), "--resume"])
    assert before == ((unbroken / "results.json").read_bytes(), (unbroken / "times.json").read_bytes())
    assert "4 of 4 rows are there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "lr=1"], "lr was 0.0003, now 1.0"),
        (["--seeds", "2"], r"seeds was \[1\], now \[2\]"),
        (["--amp"], "amp was false, now true"),
    ],
)
def test_resume_refuses_other_settings_by_name(command, unbroken, change, message):
    before = (unbroken / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=message):
        experiment.main([*command, "--output", str(unbroken), "--resume", *change])
    assert before == (unbroken / "results.json").read_bytes()


def test_a_checkpoint_of_other_labels_is_refused(tmp_path):
    path = tmp_path / "cell.pt"
    checkpoint.Checkpoint(path, {"labels": "a"}).save({"epoch": 1})
    assert checkpoint.Checkpoint(path, {"labels": "a"}).load() == {"epoch": 1}
    with pytest.raises(ValueError, match='labels was "a", now "b"'):
        checkpoint.Checkpoint(path, {"labels": "b"}).load()
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.Checkpoint(path, {"labels": "a"}).load()


def test_without_resume_a_folder_is_begun_afresh(run, tmp_path):
    run("--methods", "trm", "linear")
    (tmp_path / "out" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "out" / "checkpoints" / "linear-known0.5-seed1.pt").write_bytes(b"of another run")
    rows = run("--methods", "linear")
    assert [row["method"] for row in rows] == ["linear"]
    assert run("--methods", "linear", "--resume", output=tmp_path / "nothing yet") == rows
    assert not list((tmp_path / "out" / "pseudo").iterdir())
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["methods"] == ["linear"]


def test_seconds_stand_beside_the_results(unbroken):
    rows, times = (json.loads((unbroken / name).read_text(encoding="utf-8")) for name in ("results.json", "times.json"))
    keys = ("method", "known", "seed")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in times]
    assert all(set(row) == COLUMNS for row in rows)
    assert all(set(row) == {*keys, "seconds", "peak_mib", "parameters"} for row in times)
    assert all(row["seconds"] > 0 and row["parameters"] > 0 for row in times)


# Several processes


def test_jobs_change_nothing_but_the_time(command, unbroken, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    experiment.main([*command, "--output", str(tmp_path), "--jobs", "2"])
    assert_same_run(tmp_path, unbroken)
    out = capfd.readouterr().out
    assert sum(line.startswith(("trm, ", "linear, ")) for line in out.splitlines()) == 4


def workers_of(pid):
    """Processes below one, by id."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    below = {pid}
    for _ in range(3):
        rows = (line.split() for line in found.splitlines())
        below |= {int(child) for child, parent, stat in rows if int(parent) in below and not stat.startswith("Z")}
    return below - {pid}


def alive(pids):
    found = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    running = {int(line.split()[0]) for line in found.splitlines() if not line.split()[1].startswith("Z")}
    return running & set(pids)


@pytest.mark.skipif(shutil.which("ps") is None, reason="looks for processes with ps")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_run_is_the_end_of_its_processes(how, command, forked, tmp_path):
    said = tmp_path / "said.txt"
    process = forked(in_a_group, [*command, "--output", str(tmp_path / "out"), "--jobs", "2", "--epochs", "1000"], said)
    try:
        limit = time.monotonic() + 120
        while len(list((tmp_path / "out").glob("checkpoints/*.pt"))) < 2:
            assert process.is_alive() and time.monotonic() < limit
            time.sleep(0.1)
        workers = workers_of(process.pid)
        assert len(workers) >= 2
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does: to all of them
            process.join(60)
            assert "--resume goes on from here" in said.read_text(encoding="utf-8").splitlines()[-1]
        else:
            process.kill()
            process.join()
        limit = time.monotonic() + 20
        while alive(workers) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not alive(workers)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_killed_process_ends_the_run_with_one_clear_line(run, monkeypatch):
    def broken(*_):
        raise BrokenProcessPool("abruptly")
        yield

    monkeypatch.setattr(cells, "_in_processes", broken)
    with pytest.raises(SystemExit, match="--resume and fewer jobs"):
        run("--methods", "linear", "--jobs", "2")


# Switches


def test_mixed_precision_is_close_and_not_equal(run, tmp_path):
    states = []
    for name, amp in (("full", []), ("mixed", ["--amp"])):
        run("--methods", "trm", "--set", "batch_size=8", *amp, output=tmp_path / name)
        states.append(TRMHead.load(tmp_path / name / "trm-known0.5-seed1.pt").state_dict())
    weights = [state["matching.bias"] for state in states]
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_whose_gradient_overflows_is_not_taken(overflow):
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100 if overflow else 4.0)
    taken = training.take_step((1e10 * weight).sum(), optimizer, scaler, [weight], 0.5)
    assert taken is not overflow
    assert float(weight.detach()) == (2.0 if overflow else 1.5)


def test_a_skipped_step_moves_neither_average_nor_prototypes(run, monkeypatch):
    monkeypatch.setattr(training, "take_step", lambda *a: False)
    calls = []
    monkeypatch.setattr(methods.TRM, "after_step", lambda self: calls.append(1))
    monkeypatch.setattr(training.AveragedModel, "update_parameters", lambda self, model: calls.append(1))
    run("--methods", "trm")
    assert not calls


def test_deterministic_algorithms_are_asked_for(run, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    run("--methods", "zero-shot-global")
    assert asked == [] and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    run("--methods", "zero-shot-global", "--deterministic")
    assert asked == [True] and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_deterministic_runs_write_the_same_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for output in (tmp_path / "a", tmp_path / "b"):
            run("--methods", "trm", "linear", "--deterministic", output=output)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("results.json", "run.json", "pseudo/trm-known0.5-seed1.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tensorboard_gets_losses_and_scores(run, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.run = folder.name
            written.append((self.run, "purge", purge_step))

        def add_scalar(self, name, value, step):
            written.append((self.run, name, step))

        def close(self):
            written.append((self.run, "close", 0))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    run("--methods", "text-pixel", "--tensorboard")
    name = "text-pixel-known0.5-seed1"
    points = [(name, curve, epoch) for epoch in (1, 2) for curve in ("loss/matching", "test/mAP")]
    assert written == [(name, "purge", 1), *points, (name, "close", 0)]


def test_tensorboard_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        run("--methods", "text-pixel", "--tensorboard")
    assert not (tmp_path / "out").exists()


# Where a step's time goes


def test_a_profile_changes_nothing_and_names_the_parts_of_a_step(run, tmp_path):
    settings = ("--methods", "trm", "zero-shot-global", "--set", "batch_size=8", "pseudo_warmup=0")
    assert run(*settings, "--profile", output=tmp_path / "a") == run(*settings, output=tmp_path / "b")
    assert not (tmp_path / "b" / "profile").exists()
    (path,) = (tmp_path / "a" / "profile").iterdir()
    table = path.read_text(encoding="utf-8")
    assert path.name == "trm-known0.5-seed1.txt"
    assert all(f" {part} " in table for part in ("text", "loss", "backward and optimizer", "average", "update"))


# Classes without a label


@pytest.mark.skipif(not hasattr(TRMHead, "with_classes"), reason="heads for other classes are not there yet")
def test_unseen_classes_are_scored_by_name(run, tmp_path, devkit, backbone, monkeypatch):
    seen = []
    original = cells.train
    monkeypatch.setattr(cells, "train", lambda *a, **k: seen.append(a) or original(*a, **k))
    settings = ("--methods", "zero-shot-tokens", "--known", "single", "0.5", "--unseen", "4")
    run(*settings)
    labels = VOC(devkit, 2007, "train").targets[:, :-4]
    assert torch.equal(seen[0][2], keep_single_positive(labels, seed=0)) and torch.equal(seen[1][2], hide_labels(labels, 0.5))
    files = [tmp_path / "out" / "unseen" / f"trm-unseen4-{setting}-seed1.json" for setting in ("single", "known0.5")]
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert [row["known"] for row in rows] == ["single", 0.5] and rows[0]["unseen"] == ["sheep", "sofa", "train", "tvmonitor"]
    plain = eval_transform(224, mean=backbone.image_mean, std=backbone.image_std)
    images = VOC(devkit, 2007, "test", transform=plain)
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    text = backbone.template_text(class_prompt_names(True), presets.EMBEDDED.templates)
    scores = torch.cat([methods.zero_shot_tokens(batch, text) for batch in live.batches(16)])
    for part, columns in (("seen", slice(0, 16)), ("unseen", slice(16, 20))):
        expected = 100 * float(mean_average_precision(scores[:, columns], images.targets[:, columns]))
        assert rows[0][f"zero-shot-tokens {part}"] == pytest.approx(expected, abs=0.5)
        assert rows[0][f"trm {part}"] > 30
    monkeypatch.setattr(cells, "train", None)
    run(*settings, "--resume")
