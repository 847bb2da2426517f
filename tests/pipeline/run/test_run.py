"""The pipeline of the examples from end to end: a few drawn scenes, the model that ships with the project."""

import dataclasses

import pytest
import torch

from tests.helpers.runs import COLUMNS, read_json
from trm_losses import TRMHead
from trm_losses.labels import hide_labels, keep_single_positive, move_positives
from trm_losses.metrics import mean_average_precision
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.config.losses import MADE_BY
from trm_pipeline.data.base import eval_transform
from trm_pipeline.data.voc import VOC, class_prompt_names
from trm_pipeline.features import cached as features
from trm_pipeline.methods import grid
from trm_pipeline.run import arguments, experiment, prepared, results


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
        assert (row["OF1"] is None) == (row["method"] in methods.LABEL_FREE)
    table = capsys.readouterr().out
    assert "| method" in table and "| trm " in table and "±" in table
    assert (tmp_path / "out" / "map_against_known.png").stat().st_size > 10_000


def test_saved_heads_score_like_the_run(run, tmp_path, devkit, backbone):
    heads = ("trm", "trm-query+splc", "trm-region+sarb")
    rows = run("--methods", *heads, "linear+splc", "--known", "0.5", "--set", "batch_size=8")
    assert {path.name for path in (tmp_path / "out").glob("*.pt")} == {f"{name}-known0.5-seed1.pt" for name in heads}
    plain = eval_transform(224, mean=backbone.image_mean, std=backbone.image_std)
    images = VOC(devkit, 2007, "test").with_transform(plain)
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    seen = [(batch.tokens, batch.penultimate) for batch in live.batches(16)]
    for name, row in zip(heads, rows, strict=False):
        head = TRMHead.load(tmp_path / "out" / f"{name}-known0.5-seed1.pt")
        assert head.class_names[14] == "person" and row["method"] == name
        # The run read tokens in half precision.
        found = float(mean_average_precision(torch.cat([head.predict(*parts) for parts in seen]), images.targets))
        assert 100 * found == pytest.approx(row["mAP"], abs=0.5)


def test_losses_are_taught_by_the_teacher_that_was_asked_for(run, monkeypatch):
    seen, found = [], []
    loss, prepare = MADE_BY["vlpl"], experiment.prepare
    monkeypatch.setitem(MADE_BY, "vlpl", lambda similarities, **options: seen.append(similarities) or loss(similarities))
    monkeypatch.setattr(experiment, "prepare", lambda options: found.append(prepare(options)) or found[0])
    run("--methods", "text-pixel+vlpl", "--set", "teacher=training-free")
    (data,) = found
    tokens = torch.cat([batch.tokens for batch in data.features.batches(100)])
    torch.testing.assert_close(seen[-1], data.training_free(tokens))
    assert not torch.allclose(seen[-1], data.similarities("zero-shot-tokens"), atol=1e-2)


def test_features_are_encoded_once(run, cache, capsys):
    run("--methods", "zero-shot-global")
    capsys.readouterr()
    run("--methods", "zero-shot-tokens")
    assert "encoding" not in capsys.readouterr().out
    assert not [path for path in (cache / "features").iterdir() if path.name.startswith(".")]


def test_augmentation_encodes_in_the_loop(run, capsys):
    """What is fitted, and not trained, sees the images as they are."""
    methods = "--methods", "global", "linear-penultimate", "text-pixel", "--epochs", "1"
    augmented, plain = (run(*methods, "--set", f"augment={value}") for value in ("true", "false"))
    assert [row["mAP"] for row in augmented[:2]] == [row["mAP"] for row in plain[:2]] and augmented[2]["mAP"] > 0


def test_tune_never_touches_the_test_images(run, tmp_path, capsys):
    for typed, scored, other in ((["--tune"], "val", "test"), ([], "test", "val")):
        run("--methods", "zero-shot-global", *typed)
        assert "(train)" in (out := capsys.readouterr().out) and f"({scored})" in out and f"({other})" not in out
        page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        assert f"mAP (%) on the {scored} images by share" in page and f"the {other} images" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--known", "10"], "10 % is 0.1"),
        (["--known", "0.1", "0.10000001"], "shares that differ in six digits"),
        (["--known", "1e-7", "--methods", "linear"], r"--known 1e-07 leaves no label known of \d+ in training; give"),
        (["--model", "RN50"], "needs --pretrained"),
        (["--image-size", "100"], "multiple of the stride"),
        (["--set", "speed=3"], "NAME=VALUE"),
        (["--methods", "linear+what"], "HEAD.LOSS with a head of linear"),
        (["--methods", "linear+ll-r", "--set", "ll-r.delta=3"], "delta must"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--set", "batch_size=0"], "batch_size must be at least 1"),
        (["--device", "nothing"], "cannot be used here"),
        (["--set", "test_split=train"], "must be different splits"),
        (["--set", "batch_size=many"], "must be of type int"),
        (["--set", "lr=1", "epochs=3"], "--epochs and --set epochs are the same setting"),
        (["--data-root", "/nowhere/at/all"], "not found"),
        (["--set", "token_pool=3"], "token_pool must divide"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--workers", "-1"], "workers must be at least 0"),
        (["--known", "0.5", "--ablation-known", "0.1"], "must be among --known"),
        (["--known", "single", "--set", "expected_positives=none"], "needs expected_positives"),
        (["--unseen", "19"], "must leave two classes"),
        (["--wrong", "20"], "--wrong must be a share from 0 to 1, got 20"),
        (["--unseen", "2", "--set", "pooler.query=free"], "queries that come from text"),
        (["--set", "single_negative_until=never"], "must be 'end' or 'warmup'"),
        (["--set", "teacher=nobody"], "teacher must be one of zero-shot-global, zero-shot-tokens, training-free, got 'nobody'"),
    ],
)
def test_bad_input_is_one_clear_line(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run("--methods", "zero-shot-global", *arguments)


@pytest.mark.parametrize("name", ["lr", "text_lr", "lr_factor", "weight_decay", "clip_norm", "single_negative", "linear.lr"])
@pytest.mark.parametrize("value", ["-1", "inf", "nan"])
def test_numbers_of_the_preset_are_checked_at_the_door(name, value):
    with pytest.raises(ValueError, match=f"^--set: {name} must be .*, got {value}"):
        arguments.parse(["--set", f"{name}={value}"])


@pytest.mark.parametrize(
    "setting",
    "ema_per_epoch=2 pseudo_ramp=-1 pseudo_warmup=1.1 warmup_share=1 merge_rate=2 expected_positives=0 expected_positives=20 "
    "dual-coop.sharpness=0".split(),
)
def test_shares_and_counts_have_both_bounds(setting):
    with pytest.raises(ValueError, match=f"^--set: {setting.split('=')[0]} must be "):
        arguments.parse(["--known", "single", "--set", setting])


def test_what_is_given_twice_is_taken_together():
    pairs = {"known": "0.1 0.5", "ablation-known": "0.1 0.5", "seeds": "1 2", "methods": "trm linear", "set": "lr=1 epochs=3"}
    once = [word for name, pair in pairs.items() for word in (f"--{name}", *pair.split())]
    twice = [word for name, pair in pairs.items() for value in pair.split() for word in (f"--{name}", value)]
    assert arguments.parse(twice) == dataclasses.replace(arguments.parse(once), typed=tuple(twice))


def test_download_needs_a_place(tmp_path):
    with pytest.raises(SystemExit, match="--download needs --data-root"):
        experiment.main(["--download", "--cache", str(tmp_path), "--output", str(tmp_path)])


def test_weights_of_another_model_are_refused(run, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {"visual.conv1.weight": torch.zeros(3, 3)}}, path)
    with pytest.raises(SystemExit, match="other.pt"):
        run("--methods", "zero-shot-global", "--model", "RN50", "--pretrained", str(path))


# Single positive labels


def test_single_positives_know_one_present_label_of_each_image(run, devkit, monkeypatch, capsys):
    seen = []
    original = prepared.train
    monkeypatch.setattr(prepared, "train", lambda *a, **k: seen.append((a[2], k["single"])) or original(*a, **k))
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


# Wrong labels


def test_a_share_of_the_known_positives_is_wrong_for_every_method(run, devkit, tmp_path, monkeypatch, capsys):
    """The same labels for all of them; files, rows and the record of the run tell it."""
    seen = []
    original = prepared.train
    monkeypatch.setattr(prepared, "train", lambda *a, **k: seen.append((a[2], k["truth"])) or original(*a, **k))
    fitted = prepared.Prepared.global_head
    monkeypatch.setattr(prepared.Prepared, "global_head", lambda s, y, *a, **k: seen.append((y, None)) or fitted(s, y, *a, **k))
    settings = ("--methods", "zero-shot-global", "linear", "trm", "global", "--known", "0.5", "single", "--wrong", "0.25")
    rows = run(*settings)
    full = VOC(devkit, 2007, "train").targets
    left = hide_labels(full, 0.5, seed=0), keep_single_positive(full, seed=0)
    wanted = [move_positives(labels, full, 0.25, seed=0) for labels in left]
    assert all(any(torch.equal(found, labels) for found, _ in seen) for labels in wanted)
    assert all(any(torch.equal(found, labels) for labels in wanted) for found, _ in seen)
    assert all(truth is None or torch.equal(truth, full) for _, truth in seen)
    assert {row["wrong"] for row in rows} == {0.25} and len(rows) == 8
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.pt")} == {f"trm-{known}-wrong0.25-seed1.pt" for known in ("known0.5", "single")}
    assert "25% of the known present labels are wrong" in capsys.readouterr().out
    assert "25% of the known present labels are wrong" in (out / "report.md").read_text(encoding="utf-8")
    before = (out / "results.json").read_bytes()
    seen.clear()
    run(*settings, "--resume")
    assert (out / "results.json").read_bytes() == before and not seen
    for other in ([], ["--wrong", "0.5"]):
        with pytest.raises(SystemExit, match="--resume: .* holds a run with other settings: .*wrong"):
            run(*settings[:-2], *other, "--resume")


def test_labels_out_of_a_file_are_not_made_wrong():
    with pytest.raises(ValueError, match="--wrong moves labels that a run has hidden itself; leave it or --labels out"):
        arguments.parse(["--wrong", "0.1", "--labels", "labels.npy"])


def test_a_run_without_wrong_labels_says_nothing_of_them(run, tmp_path):
    (row,) = run("--methods", "linear", "--wrong", "0")
    assert "wrong" not in row and "wrong" not in read_json(tmp_path / "out" / "run.json")
    assert prepared.Cell("linear", 0.5, 1).name == "linear-known0.5-seed1"
    assert prepared.Cell("linear", "single", 2, 0.1).label == "linear, single, 10% wrong, seed 2"


# Other methods' losses


def test_a_pattern_of_the_grid_runs_like_any_method(run, tmp_path, capsys):
    settings = ("--methods", "linear", "linear+ll-c?", "trm-region+vlpl", "--known", "0.5", "single", "--set", "ll-ct.delta=0.01")
    rows = run(*settings, "batch_size=16")
    names = ["linear", "linear+ll-ct", "linear+ll-cp", "trm-region+vlpl"]
    assert [(row["method"], row["known"]) for row in rows] == [(name, known) for known in (0.5, "single") for name in names]
    out = tmp_path / "out"
    assert read_json(out / "run.json")["preset"]["losses"]["ll-ct"]["delta"] == 0.01
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


def test_variants_are_planned_with_what_they_are_set_against():
    cells = results.plan(arguments.parse(["--methods", "linear", "--ablation", "--known", "0.1", "--seeds", "1"]))
    assert [cell.method for cell in cells][:2] == ["linear", "trm"] and len(cells) == 2 + len(presets.VARIANTS)


# Ablations


def test_ablations_stand_beside_the_methods(run):
    settings = ("--known", "0.5", "single", "--ablation", "--ablation-known", "single", "--set", "batch_size=4", "lr=1e-2")
    rows = run("--methods", "trm", *settings)
    variants = list(presets.VARIANTS)
    assert [(row["method"], row["known"]) for row in rows] == [
        ("trm", 0.5),
        ("trm", "single"),
        *((variant, "single") for variant in variants),
    ]
    assert len({row["mAP"] for row in rows[1:]}) > 3


# Classes without a label


@pytest.mark.skipif(not hasattr(TRMHead, "with_classes"), reason="heads for other classes are not there yet")
def test_unseen_classes_are_scored_by_name(run, tmp_path, devkit, backbone, monkeypatch):
    seen = []
    original = prepared.train
    monkeypatch.setattr(prepared, "train", lambda *a, **k: seen.append(a) or original(*a, **k))
    settings = ("--methods", "zero-shot-tokens", "--known", "single", "0.5", "--unseen", "4")
    run(*settings)
    labels = VOC(devkit, 2007, "train").targets[:, :-4]
    assert torch.equal(seen[0][2], keep_single_positive(labels, seed=0)) and torch.equal(seen[1][2], hide_labels(labels, 0.5))
    files = [tmp_path / "out" / "unseen" / f"trm-unseen4-{setting}-seed1.json" for setting in ("single", "known0.5")]
    rows = [read_json(file) for file in files]
    assert [row["known"] for row in rows] == ["single", 0.5] and rows[0]["unseen"] == ["sheep", "sofa", "train", "tvmonitor"]
    plain = eval_transform(224, mean=backbone.image_mean, std=backbone.image_std)
    images = VOC(devkit, 2007, "test").with_transform(plain)
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    text = backbone.template_text(class_prompt_names(), presets.EMBEDDED.templates)
    scores = torch.cat([methods.zero_shot_tokens(batch, text) for batch in live.batches(16)])
    for part, columns in (("seen", slice(0, 16)), ("unseen", slice(16, 20))):
        expected = 100 * float(mean_average_precision(scores[:, columns], images.targets[:, columns]))
        assert rows[0][f"zero-shot-tokens {part}"] == pytest.approx(expected, abs=0.5)
        assert rows[0][f"trm {part}"] > 30
    monkeypatch.setattr(prepared, "train", None)
    run(*settings, "--resume")
