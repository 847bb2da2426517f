"""A folder of one's own images: label files, split, thresholds, and the whole way from images to scores of others."""

import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import ROOT
from tests.helpers.own_folder import CLASSES, questions_of, read_csv, write_table
from tests.helpers.runs import read_json, typed
from trm_losses import TRMHead
from trm_pipeline import command as cli
from trm_pipeline import methods
from trm_pipeline.features import encoding, towers
from trm_pipeline.features.unfinished import Unfinished
from trm_pipeline.folder import learning, outputs
from trm_pipeline.folder import model as folder_model
from trm_pipeline.folder.image_files import find_images
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.review.answers import joined
from trm_pipeline.folder.train import _held
from trm_pipeline.run import experiment
from trm_pipeline.training import loop as training

BROKEN = ("cut.jpg", "empty.png")


def test_a_training_says_what_it_does(trained):
    run, printed = trained
    assert "38 images, 4 classes; 66% of 152 labels known" in printed
    assert "no label is present of sheep: nothing to learn from, scored by name alone" in printed
    assert "knows drawn scenes only. On photographs" in printed and "mean nothing for photographs" in printed
    assert "2 of 38 images cannot be read and are left out:" in printed
    assert "empty.png: the file is empty" in printed and "cut.jpg: image file is truncated" in printed
    assert "zero-shot, same model" in printed and "present labels in the hold-out this is a rough figure" in printed
    assert {path.name for path in run.iterdir()} == set(outputs.FILES)
    data = questions_of(run / "review.html")
    blank = sum(row[name] == "" for row in read_csv(run.parent / "labels.csv") for name in CLASSES if row["image"] not in BROKEN)
    assert data["classes"] == CLASSES and sum(question[3] is None for question in data["questions"]) == blank
    contradicted = [question for question in data["questions"] if question[3] is not None]
    assert contradicted and all((question[3] == "present") == (question[2] < 0.5) for question in contradicted)


def test_a_folder_that_goes_away_while_it_is_encoded_leaves_nothing_unreadable(images, tmp_path, monkeypatch):
    folder, rows = shutil.copytree(images[0], tmp_path / "images"), images[1]
    arguments = ["train", str(folder), str(write_table(tmp_path / "labels.csv", rows)), "--output", str(tmp_path / "run")]
    arguments += ["--cache", str(tmp_path / "cache"), "--workers", "0", "--device", "cpu", "--epochs", "1", "--no-choose"]
    monkeypatch.setattr(encoding, "BATCH", 12)
    write = Unfinished.write

    def away(*rest):
        if folder.exists():
            folder.rename(tmp_path / "elsewhere")
        return write(*rest)

    monkeypatch.setattr(Unfinished, "write", away)
    with pytest.raises(SystemExit, match=r"images is gone; what was encoded is kept: bring it back"):
        cli.main(arguments)
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(folder)
    cli.main(arguments)
    assert len(read_csv(tmp_path / "run" / "scores.csv")) == len(rows) - len(BROKEN)


def test_the_card_says_what_the_model_is(trained):
    run, _ = trained
    card, about = (run / "README.md").read_text(encoding="utf-8"), read_json(run / "model.json")
    assert card.startswith("---\nlibrary_name: trm-losses\n") and card.count("\n---\n") == 1
    assert f"**{about['scores']['mAP']:.1f} %**" in card and f"{about['scores']['images']} held out" in card
    for name, own in about["classes"].items():
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} ")]
        assert f"| {own['threshold']:.3f} " in line and own["threshold_from"] in line
    assert "Relying on sheep: no present label was known" in card and "knows drawn scenes only" in card
    assert ("Scores are calibrated" in card) == (TRMHead.load(run / "head.pt").calibration is not None)


def test_a_readme_of_somebody_else_is_not_replaced(images, cache, tmp_path):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    labels = write_table(tmp_path / "labels.csv", images[1])
    with pytest.raises(SystemExit, match="README.md is there and was not written by train"):
        cli.main(["train", str(images[0]), str(labels), "--output", str(tmp_path), *cache])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_the_split_is_written_and_the_figures_are_of_it(trained, images):
    run, printed = trained
    _, rows = images
    part = {row["image"]: row["part"] for row in read_csv(run / "split.csv")}
    assert len(part) == 36 and not {"cut.jpg", "empty.png"} & set(part)
    held = [name for name, where in part.items() if where == "hold-out"]
    assert 7 <= len(held) <= 18
    scores = {row["image"]: row for row in read_csv(run / "scores.csv")}
    assert {name: row["part"] for name, row in scores.items()} == part
    place = {name: i for i, name in enumerate(rows)}
    precisions = []
    for c, name in enumerate(CLASSES):
        known = [(float(scores[i][name]), rows[i][c]) for i in held if (place[i] + c) % 3]
        ranked = [y for _, y in sorted(known, reverse=True)]
        if 0 < sum(ranked) < len(ranked):
            hits = [sum(ranked[: k + 1]) / (k + 1) for k, y in enumerate(ranked) if y]
            precisions.append(sum(hits) / len(hits))
    figures = read_json(run / "model.json")["scores"]
    assert figures["classes_scored"] == len(precisions) == 3 and figures["images"] == len(held)
    assert figures["mAP"] == pytest.approx(100 * sum(precisions) / 3, abs=0.01)
    assert f"trained                  {figures['mAP']:5.1f}" in printed


def test_answers_change_nothing_of_the_hold_out():
    targets = torch.randint(-1, 2, (40, 3), generator=torch.Generator().manual_seed(0)).float()
    labels = Labels([f"{i}.png" for i in range(40)], CLASSES[:3], targets, lists=False)
    answers = {(f"{i}.png", name): float(i % 2) for i in range(50) for name in CLASSES[:3]}
    options, after = SimpleNamespace(hold_out=0.2, seed=0), joined(labels, answers)
    assert after.targets.min() == 0 and torch.equal(after.noted[:40], targets)
    assert _held(options, after).tolist() == _held(options, labels).tolist() + [False] * 10
    blank = labels._replace(targets=torch.full_like(targets, -1))  # of which answers alone say something
    assert _held(options, joined(blank, answers)).sum() == 10
    absent = labels._replace(targets=torch.cat([targets[:, :2], torch.zeros(40, 1)], dim=1))
    held = _held(options, absent)  # where somebody then finds all that is present of a class: some of it has to be learned from
    found = joined(absent, {(f"{i}.png", CLASSES[2]): 1.0 for i in held.nonzero().flatten().tolist()})
    assert (found.targets[~_held(options, found), 2] == 1).any()


def test_thresholds_are_applied_as_they_are_written(trained):
    run, _ = trained
    classes = read_json(run / "model.json")["classes"]
    assert list(classes) == CLASSES and not classes["sheep"]["trained"] and classes["sheep"]["threshold"] == 0.5
    sources = {about["threshold_from"].split(":")[0].split(",")[0] for about in classes.values()}
    assert "hold-out" in sources and sources <= {"hold-out", "default"}
    for about in classes.values():
        promised = about["promised"]
        assert (promised is None) == about["threshold_from"].startswith("default")
        assert promised is None or 0 <= promised["low"] <= promised["value"] <= promised["high"] <= 1
    for row in read_csv(run / "scores.csv"):
        sure = {name for name in CLASSES if abs(float(row[name]) - classes[name]["threshold"]) > 1e-4}
        assert set(row["present"].split(";")) & sure == {n for n in sure if float(row[n]) > classes[n]["threshold"]}


def test_prediction_equals_the_scores_of_training(trained, images, tmp_path, capsys):
    run, _ = trained
    folder, _ = images
    cli.main(["predict", str(run), str(folder), "--output", str(tmp_path / "s.csv"), "--workers", "0", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "2 of 38 images cannot be read" in printed and "36 images" in printed
    before, after = ({row["image"]: row for row in read_csv(path)} for path in (run / "scores.csv", tmp_path / "s.csv"))
    assert list(after) == [name for name in find_images(folder) if name in before] and len(after) == 36
    for name, row in after.items():
        assert row["present"] == before[name]["present"]
        for c in CLASSES:
            assert float(row[c]) == pytest.approx(float(before[name][c]), abs=2e-4)
    one = ["predict", str(run / "model.json"), str(folder / "1.png"), "--output", str(tmp_path / "one.csv"), "--workers", "0"]
    cli.main([*one, "--device", "cpu"])
    (row,) = read_csv(tmp_path / "one.csv")
    assert row["image"] == "1.png" and float(row["car"]) == pytest.approx(float(before["1.png"]["car"]), abs=2e-4)


def test_prediction_refuses_another_backbone_and_folders_without_a_model(trained, images, tmp_path, monkeypatch):
    run, _ = trained
    arguments = [str(images[0]), "--output", str(tmp_path / "s.csv"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="no finished model at .*wanted the folder that 'train' wrote"):
        cli.main(["predict", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="--pretrained x is of another model"):
        cli.main(["predict", str(run), *arguments, "--pretrained", "x"])
    (tmp_path / "model.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="is not the model.json of a folder"):
        cli.main(["predict", str(tmp_path), *arguments])
    (tmp_path / "s.csv").write_text("image,cat\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="exists and was not written by predict"):
        cli.main(["predict", str(run), *arguments])
    (tmp_path / "s.csv").unlink()
    monkeypatch.setattr(folder_model, "weights_digest", lambda backbone: "another")
    with pytest.raises(SystemExit, match="with other weights than those of the embedded model here"):
        cli.main(["predict", str(run), *arguments])
    assert not (tmp_path / "s.csv").exists()


def test_a_model_of_open_clip_from_a_weights_file(images, cache, tmp_path, capsys, monkeypatch):
    """Random weights: what is tested is the way there, and that another file is refused afterwards."""
    import open_clip

    vision = {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
    words = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": words})
    (tmp_path / "folder-vit.json").write_text(config, encoding="utf-8")
    open_clip.add_model_config(tmp_path / "folder-vit.json")
    torch.manual_seed(0)
    files = [tmp_path / name for name in ("w.pt", "other.pt")]
    for file in files:
        torch.save(open_clip.create_model("folder-vit").state_dict(), file)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "folder-vit", {"openai": {}})
    fetch = towers.load_open_clip
    fetched = {"openai": str(files[0])}
    monkeypatch.setattr(towers, "load_open_clip", lambda name, source, **kw: fetch(name, fetched.get(source, source), **kw))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()  # and the tag is meant
    rows = dict(list(images[1].items())[:6])
    rows = {name: [*values, 0, 1] for name, values in rows.items()}
    labels = write_table(tmp_path / "labels.csv", rows, classes=[*CLASSES, "a_lap top", "ΔΙΑ"])
    model = ["--model", "folder-vit", "--pretrained", "openai", "--image-size", "96", "--epochs", "1"]
    arguments = ["--output", str(tmp_path / "run"), *model, *cache, "--names", "ΔΙΑ=A lap top"]
    cli.main(["train", str(images[0]), str(labels), *arguments])
    said = capsys.readouterr().out.splitlines()
    assert not any("demonstration" in line for line in said)
    assert sum("the same for 4 ('a lap top') and 5 ('A lap top'); they cannot" in line for line in said) == 1
    saved = read_json(tmp_path / "run" / "model.json")
    assert saved["pretrained"] == "openai" and saved["image_size"] == [96, 96]
    assert saved["classes"]["a_lap top"]["words"] == "a lap top"
    predict = ["predict", str(tmp_path / "run"), str(images[0] / "1.png"), "--output", str(tmp_path / "s.csv"), "--device", "cpu"]
    cli.main(predict)
    scores = {row["image"]: row for row in read_csv(tmp_path / "run" / "scores.csv")}
    assert float(read_csv(tmp_path / "s.csv")[0]["dog"]) == pytest.approx(float(scores["1.png"]["dog"]), abs=2e-4)
    cli.main([*predict, "--pretrained", "w.pt"])
    with pytest.raises(SystemExit, match="features of folder-vit with other weights"):
        cli.main([*predict, "--pretrained", str(files[1])])


@pytest.mark.parametrize("classes", [3, 30])
def test_an_unknown_label_hardly_counts_as_absent(classes):
    """As much as 0.3 of a label of an image that has them all, however many classes there are to learn."""
    listed = torch.full((8, classes + 2), -1.0)
    listed[torch.arange(classes) % 8, torch.arange(classes)] = 1  # nothing is known of the last two
    preset = learning._preset(SimpleNamespace(epochs=None, expected_positives=None), listed)
    logits, targets = torch.zeros(8, classes, requires_grad=True), listed[:, :classes]
    sum(methods.weak_negatives(targets, preset.single_negative, (1.0, logits)).values()).backward()
    # Of an image with all labels each has 1 / B in the loss, whose slope at probability 0.5 is 0.5.
    torch.testing.assert_close(logits.grad, torch.where(targets == -1, 0.3 * 0.5 / 8, 0.0))


@pytest.mark.parametrize(
    ("rows", "classes", "options", "printed"),
    [
        ({"1.png": [1]}, ["person"], [], "No hold-out, so no figure says how good the model is."),
        ({"1.png": [1], "2.png": [0], "4.png": ["?"], "6.png": [1]}, ["person"], ["--hold-out", "0.5"], "1 classes; 75% of 4"),
        (
            {"1.png": ["car"], "2.png": ["dog|car"], "4.png": ["dog"], "6.png": [""], "7.png": ["car"], "8.png": ["dog"]},
            ["labels"],
            ["--hold-out", "0.4"],
            "is too low where lists",
        ),
        ({"1.png": [1, 0], "2.png": [0, 1]}, ["car", "dog"], ["--hold-out", "0", "--use-unlabelled"], "36 images without a row"),
        (
            {"1.png": [1, "train"], "2.png": [0, "train"], "4.png": [1, "val"], "6.png": [0, "test"], "7.png": [1, "test"]},
            ["car", "split"],
            [],
            "hold-out: 3 of 5 images, by the column split",
        ),
        (
            {"1.png": [1, "x"], "2.png": [0, "x"], "4.png": [1, "y"], "6.png": [0, "y"], "7.png": [1, "y"]},
            ["car", "scene"],
            ["--group", "scene"],
            "hold-out: 2 of 5 images, 1 of 2 groups by column scene",
        ),
        (
            {"1.png": [1], "2.png": [0], "λόφος/0.jpg": [1], "λόφος/5.jpg": [0], "4.png": [1]},
            ["car"],
            ["--group", "folder", "--use-unlabelled"],
            "hold-out: 8 of 36 images, 1 of 2 groups by folder",
        ),
        ({"1.png": [1, 0], "2.png": [0, 1]}, ["car", "Ding"], ["--names", "Ding=dog"], "36 images without a row are left out"),
    ],
)
def test_next_to_nothing_is_enough(rows, classes, options, printed, images, cache, tmp_path, capsys):
    labels = write_table(tmp_path / "labels.csv", rows, classes=classes)
    run = tmp_path / "run"
    (run / f".{os.getpid()}.tmp").mkdir(parents=True)  # of a process that was killed: in a container the next has its number
    cli.main(["train", str(images[0]), str(labels), "--output", str(run), "--epochs", "2", *options, *cache])
    told = capsys.readouterr().out
    assert printed in told
    assert ("is too low where lists" in (run / "README.md").read_text(encoding="utf-8")) == ("is too low where lists" in told)
    head = TRMHead.load(run / "head.pt")
    values = [float(row[name]) for row in read_csv(run / "scores.csv") for name in head.class_names]
    assert all(0 <= value <= 1 for value in values)


def test_prediction_on_names_that_are_not_utf8(trained, images, tmp_path, capsys):
    """They are escaped wherever they are written; a broken file of such a name is named."""
    photos = tmp_path / "photos"
    photos.mkdir()
    odd = os.fsdecode(b"caf\xe9")
    if sys.platform == "darwin":
        pytest.skip("its file names are UTF-8")
    for name, content in ((f"{odd}.png", (images[0] / "1.png").read_bytes()), (f"{odd}.jpg", b"")):
        (photos / name).write_bytes(content)
    command = ["predict", str(trained[0]), str(photos), "--output", str(tmp_path / f"{odd}.csv"), "--workers", "0"]
    cli.main([*command, "--device", "cpu"])
    assert "  caf\\udce9.jpg: the file is empty" in capsys.readouterr().out
    assert [row["image"] for row in read_csv(tmp_path / f"{odd}.csv")] == ["caf\\udce9.png"]


def ascii_output(monkeypatch):
    """Standard output of a machine whose encoding has next to nothing; what it got."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    return lambda: (sys.stdout.flush(), raw.getvalue().decode())[1]


SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "minimal_loop")  # takes no arguments


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_prints_into_any_encoding(script, monkeypatch, tmp_path):
    named = shutil.copy(ROOT / "examples" / f"{script}.py", tmp_path / "λόφος.py")  # which the help says
    printed = ascii_output(monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(named), "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(named), run_name="__main__")
    assert not caught.value.code and "\\u03bb" in printed()


def test_no_name_ends_a_run(images, cache, tmp_path, monkeypatch):
    """A class in another script, printed in ASCII, a class called as a column, and a file name that is not UTF-8."""
    folder, run = tmp_path / "λόφος", tmp_path / "run"
    folder.mkdir()
    for i in (1, 2, 4, 6):
        shutil.copy(images[0] / f"{i}.png", folder)
    odd = os.fsdecode(b"caf\xe9.png")
    try:
        (folder / "1.png").rename(folder / odd)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    rows = {"caf\\udce9.png": [1, 1, 1], "2.png": [1, 0, 0], "4.png": [0, 1, ""], "6.png": [0, 0, 1]}
    labels = write_table(tmp_path / "labels.csv", rows, classes=["σκύλος", "part", "person"])
    printed = ascii_output(monkeypatch)
    words = ["--names", "σκύλος=dog", "part=car", "--hold-out", "0", "--epochs", "1", *cache]
    cli.main(["train", str(folder), str(labels), "--output", str(run), *words])
    cli.main(["predict", str(run), str(folder), "--output", str(tmp_path / "s.csv"), "--workers", "0", "--device", "cpu"])
    assert "\\u03c3\\u03ba" in printed()
    for file in (run / "scores.csv", run / "split.csv", tmp_path / "s.csv"):
        assert "caf\\udce9.png" in [row["image"] for row in read_csv(file)]
        assert read_csv(file)[0].get("part", "training") == "training"


def test_a_class_without_a_present_label_is_scored_by_name(trained):
    """Its text is the frozen model's, its bias the mean of the others', and training saw no label of it."""
    run, _ = trained
    saved, head = folder_model.SavedModel.load(run)
    text, _ = folder_model.class_texts(saved.open(torch.device("cpu")), {name: name for name in CLASSES}, saved.templates)
    torch.testing.assert_close(head.text[3], text[3])
    assert float((head.text[:3] - text[:3]).abs().max()) > 1e-4
    bias = head.matching.bias.detach()
    assert float(bias[3]) == pytest.approx(float(bias[:3].mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--hold-out", "20"], "--hold-out must be a share from 0 to below 1, got 20"),
        (["--at-least", "90"], "--at-least must be a share above 0 and at most 1, got 90 (90 % is 0.9)"),
        (["--seed", "9" * 20], "--seed must be from 0 to 2**63 - 1, got 9999"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--template", "a photo"], "--template must hold {}"),
        (["--names", "cow=bull"], "--names: wanted CLASS=WORDS with one of person, car"),
        (["--names", "car=laptop"], "knows drawn scenes alone, has no words for 1 of 4 classes: 'laptop'"),
        (["--expected-positives", "0"], "--expected-positives must be above 0"),
        (["--model", "RN50"], "--model RN50 needs --pretrained"),
        (["--pretrained", "openai"], "leave it out, or give its --model"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
        (["--output", "IMAGES/run"], "lies in the image folder"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_door(change, said, images, cache, tmp_path):
    folder, rows = images
    labels = write_table(tmp_path / "labels.csv", rows)
    change = [str(folder / "run") if item == "IMAGES/run" else item for item in change]
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(folder), str(labels), "--output", str(tmp_path / "run"), *cache, *change])
    assert str(caught.value).startswith("error: ") and said in str(caught.value)
    assert not (tmp_path / "run").exists() and not (folder / "run").exists()


def test_an_output_in_a_linked_folder_of_images_is_refused(images, cache, tmp_path):
    folder, rows = images
    (tmp_path / "linked").symlink_to(folder)
    labels = write_table(tmp_path / "labels.csv", {f"linked/{name}": row for name, row in rows.items()})
    with pytest.raises(SystemExit, match="lies in the image folder"):
        cli.main(["train", str(tmp_path), str(labels), "--output", str(folder / "run"), *cache])


def test_a_home_is_needed_for_the_cache_alone(images, tmp_path, monkeypatch, capsys):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    for main, words in ((cli.main, ["train", "--help"]), (experiment.main, ["--help"])):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0 and "~/.cache/trm_losses" in capsys.readouterr().out
    assert cli.parser().parse_args(["predict", "run", "photos"]).trained == Path("run")
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["train", "photos", "labels.csv"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("argument --cache: there is no home folder for ~/.cache/trm_losses; give another folder")


@pytest.mark.parametrize("option", ["--output", "--cache"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(option, images, cache, tmp_path, monkeypatch):
    labels = write_table(tmp_path / "labels.csv", images[1])
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))
    (tmp_path / "locked").mkdir()
    folders = {"--output": str(tmp_path / "run"), "--cache": str(tmp_path / "cache"), option: str(tmp_path / "locked" / "new")}
    command = ["train", str(images[0]), str(labels), "--workers", "0", "--device", "cpu"]
    with pytest.raises(SystemExit, match=f"error: {option}: .* must be a folder that can be written into, .*locked is none"):
        cli.main([*command, *(word for pair in folders.items() for word in pair)])


def test_one_process_trains(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="a folder of images takes one process, got 2 of torchrun"):
        cli.main(["train", str(images[0]), str(write_table(tmp_path / "labels.csv", images[1])), "--device", "cpu"])


def test_a_split_leaves_nothing_to_group(images, cache, tmp_path):
    labels = write_table(tmp_path / "labels.csv", {"1.png": [1, "val"], "2.png": [1, "val"]}, classes=["car", "split"])
    command = ["train", str(images[0]), str(labels), "--output", str(tmp_path / "run"), *cache]
    for options, said in ((["--group", "folder"], "its column split already says"), ([], "no image is left to train on")):
        with pytest.raises(SystemExit, match=said):
            cli.main([*command, *options])


@pytest.mark.parametrize("value", [0, "?"])
def test_no_present_label_is_refused(value, images, cache, tmp_path):
    labels = write_table(tmp_path / "labels.csv", {"1.png": [value], "2.png": [value]}, classes=["car"])
    with pytest.raises(SystemExit, match="no label is present"):
        cli.main(["train", str(images[0]), str(labels), "--output", str(tmp_path / "run"), *cache])


@pytest.mark.parametrize("whole", [True, False])
def test_an_absent_answer_leaves_the_level_of_lists(whole, images, cache, tmp_path, monkeypatch):
    rows = {name: values[:3] for name, values in images[1].items() if name not in BROKEN}
    lists = {name: ["|".join(c for c, own in zip(CLASSES, values, strict=False) if own)] for name, values in rows.items()}
    labels, answers = write_table(tmp_path / "labels.csv", lists, classes=["labels"]), tmp_path / "answers.csv"
    name, values = next(item for item in rows.items() if 0 in item[1])
    answers.write_text(f"image,class,answer\n{name},{CLASSES[values.index(0)]},absent\n", encoding="utf-8")
    monkeypatch.setattr(learning, "whole_is_of_use", lambda *args: whole)
    command = ["train", str(images[0]), str(labels), str(answers), "--output", str(tmp_path / "run"), "--hold-out", "0"]
    cli.main([*command, "--epochs", "1", *cache])
    found = [sum(float(row[c]) for c in CLASSES[:3]) for row in read_csv(tmp_path / "run" / "scores.csv")]
    assert "tell no level" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    listed = [sum(values) for values in rows.values() if any(values)]
    assert sum(found) / len(found) == pytest.approx(sum(listed) / len(listed), rel=0.02)


def test_a_table_of_present_labels_with_few_absent_ones_is_asked_about(images, cache, tmp_path, capsys):
    labels = write_table(tmp_path / "labels.csv", {"1.png": [1, "", ""], "2.png": ["", 1, 0]}, classes=CLASSES[:3])
    command = ["train", str(images[0]), str(labels), *typed(output=tmp_path / "run", hold_out=0, epochs=1), *cache]
    cli.main(command)
    assert "if only present ones were noted, give --expected-positives" in capsys.readouterr().out
    cli.main([*command, "--expected-positives", "1.5"])
    printed = capsys.readouterr().out
    assert "1.5 present ones an image are assumed (--expected-positives); 1 known absences" in printed
    assert "give --expected-positives" not in printed
    write_table(labels, {"1.png": [1, 0, ""], "2.png": [0, 1, 0]}, classes=CLASSES[:3])
    cli.main([*command, "--expected-positives", "1.5"])
    assert "--expected-positives is not used: the absent labels tell" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["training", "writing"])
def test_an_interrupted_training_leaves_what_was_there(when, trained, images, cache, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for path in trained[0].iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((training, "take_step", stop) if when == "training" else (outputs, "write_review", stop)))
    labels = write_table(tmp_path / "labels.csv", {"1.png": [1, 0, 0, 0], "2.png": [0, 1, 0, 0]})
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(images[0]), str(labels), "--output", str(run), "--epochs", "1", "--hold-out", "0", *cache])
    assert caught.value.code == 130 and "encoded images are kept" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_the_page_names_every_option():
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    commands = dict(cli.parser()._subparsers._group_actions[0].choices)
    options = {o for p in commands.values() for action in p._actions for o in action.option_strings} - {"-h", "--help"}
    assert {option for option in options if f"`{option}" not in page and not option.startswith("--no-")} == set()
