"""The pipeline of the examples from end to end: a few drawn scenes, the model that ships with the project."""

import json
import shutil

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("safetensors")

from trm_pipeline import cells, experiment, features, methods, presets, report
from trm_pipeline.data.drawn import write_drawn_voc
from trm_pipeline.data.voc import VOC, eval_transform

from trm_losses import TRMHead, TRMObjective
from trm_losses.labels import hide_labels
from trm_losses.metrics import mean_average_precision

SIZES = {"train": 40, "val": 30, "test": 30}
COLUMNS = {
    "method", "known", "seed", "mAP", "mAP_interpolated", "OF1", "CF1", "CF1_per_class", "best_epoch_mAP", "expected_positives",
}  # fmt: skip


@pytest.fixture(scope="session")
def devkit(tmp_path_factory):
    return write_drawn_voc(tmp_path_factory.mktemp("drawn"), sizes=SIZES, workers=1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(devkit, cache, tmp_path):
    """The command with a small data set; returns its rows."""

    def command(*arguments, output=tmp_path / "out"):
        known = [] if "--known" in arguments else ["--known", "0.5"]
        args = ["--data-root", str(devkit), "--preset", "embedded", "--epochs", "2", "--cache", str(cache), *known]
        device = [] if "--device" in arguments else ["--device", "cpu"]
        experiment.main([*args, *device, "--output", str(output), *arguments])
        return json.loads((output / "results.json").read_text())

    return command


@pytest.fixture(scope="session")
def backbone():
    return experiment.load_backbone(presets.EMBEDDED, torch.device("cpu"))


def test_every_method_gives_a_row_for_every_share_and_seed(run, tmp_path, capsys):
    rows = run("--known", "0.1", "1", "--seeds", "1", "2")
    assert {(row["method"], row["known"], row["seed"]) for row in rows} == {
        (method, known, seed) for method in experiment.DEFAULT_METHODS for known in (0.1, 1.0) for seed in (1, 2)
    }
    assert len(rows) == len(experiment.DEFAULT_METHODS) * 4
    for row in rows:
        assert set(row) == COLUMNS
        assert 0 < row["mAP"] <= row["mAP_interpolated"] <= 100 and row["best_epoch_mAP"] >= row["mAP"] - 1e-3
        assert (row["OF1"] is None) == row["method"].startswith("zero-shot")
    table = capsys.readouterr().out
    assert "| method" in table and "| trm " in table and "±" in table
    assert (tmp_path / "out" / "map_against_known.png").stat().st_size > 10_000


def test_the_saved_head_scores_like_the_run(run, tmp_path, devkit, backbone):
    rows = run("--methods", "trm", "--known", "0.5")
    head = TRMHead.load(tmp_path / "out" / "trm-known0.5-seed1.pt")
    plain = eval_transform(224, mean=backbone.image_mean, std=backbone.image_std)
    images = VOC(devkit, 2007, "test", transform=plain)
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    scores = torch.cat([head.predict(batch.tokens) for batch in live.batches(16)])
    assert head.class_names[14] == "person"
    # The run read tokens in half precision.
    assert 100 * float(mean_average_precision(scores, images.targets)) == pytest.approx(rows[0]["mAP"], abs=0.5)


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
                tmp_path / "cache", images, images.image_paths, backbone, weights=weights, token_pool=pool, mirror=False,
                device=torch.device("cpu"),
            )  # fmt: skip
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


def test_regions_beat_the_global_feature_before_training(tmp_path_factory, backbone):
    """At step 0 the region head must already be clearly above global zero-shot, or attention starts in the wrong place."""
    root = write_drawn_voc(tmp_path_factory.mktemp("gate"), sizes={"train": 1, "val": 200, "test": 1}, workers=1)
    images = VOC(root, 2007, "val", transform=eval_transform(224, mean=backbone.image_mean, std=backbone.image_std))
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    text = backbone.template_text(
        experiment.class_prompt_names(presets.EMBEDDED.split_words), presets.EMBEDDED.templates
    )
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


def test_learned_contexts_through_the_text_tower(run):
    (row,) = run("--methods", "trm", "--set", "prompts=shared", "num_context=4")
    assert row["mAP"] > 0


def test_augmentation_encodes_in_the_loop(run, capsys):
    (row,) = run("--methods", "text-pixel", "--epochs", "1", "--set", "augment=true")
    assert row["mAP"] > 0


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
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--set", "batch_size=0"], "batch_size must be at least 1"),
        (["--device", "nothing"], "cannot be used here"),
        (["--set", "test_split=train"], "must be different splits"),
        (["--set", "epochs=many"], "must be of type int"),
        (["--data-root", "/nowhere/at/all"], "not found"),
        (["--set", "token_pool=3"], "token_pool must divide"),
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
    preset = presets.override(
        presets.EMBEDDED, ["lr=1e-2", "mirror=false", "pseudo_rule=logit", "threshold_pos=2", "pretrained=none"]
    )
    assert (preset.lr, preset.mirror, preset.pseudo_rule, preset.threshold_pos) == (0.01, False, "logit", 2.0)
    assert preset.pretrained is None and presets.override(preset, ["threshold_pos=none"]).threshold_pos is None


def test_table_shows_mean_and_deviation():
    rows = [
        {"method": "a", "known": 0.1, "seed": 1, "mAP": 10.0},
        {"method": "a", "known": 0.1, "seed": 2, "mAP": 14.0},
        {"method": "b", "known": 0.5, "seed": 1, "mAP": 50.0},
    ]
    lines = report.markdown_table(rows).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["method", "10%", "50%"]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["a", "12.0 ± 2.8", ""]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["b", "", "50.0"]


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
