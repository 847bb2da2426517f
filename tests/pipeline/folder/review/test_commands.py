"""Suspects, questions about other images, answers that train again, and files for other tools."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.own_folder import questions_of, read_csv, write_table
from trm_pipeline import command
from trm_pipeline.drawn.scenes import TARGET, draw_scene
from trm_pipeline.folder.suspects import _folds

CLASSES = ["car", "dog", "horse"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """40 drawn scenes with all labels, and the same with one wrong."""
    base = tmp_path_factory.mktemp("scenes")
    (base / "photos").mkdir()
    rows = {}
    for i in range(40):
        rng = np.random.default_rng([11, i])
        scene = draw_scene(rng, TARGET, [name for name in CLASSES if rng.random() < 0.4] or ["cat"])
        Image.fromarray(scene.image).save(base / "photos" / f"{i}.png")
        rows[f"{i}.png"] = [int(name in {item.name for item in scene.objects}) for name in CLASSES]
    write_table(base / "labels.csv", rows, classes=CLASSES)
    return base, rows


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return ["--cache", str(tmp_path_factory.mktemp("cache")), "--workers", "0", "--device", "cpu"]


def test_suspects_are_scored_by_models_that_have_not_seen_them(scenes, rest, tmp_path, capsys):
    base, rows = scenes
    wrong = {name: list(row) for name, row in rows.items()}
    moved = [name for name, row in rows.items() if row[2] == 1][:2]
    for name in moved:
        wrong[name][2] = 0
    labels = write_table(tmp_path / "labels.csv", wrong, classes=CLASSES)
    out = tmp_path / "suspects"
    run = ["suspects", str(base / "photos"), str(labels), "--output", str(out), "--folds", "2", "--epochs", "1", *rest]
    command.main(run)
    assert "fold 2 of 2: 20 images are held out" in capsys.readouterr().out
    found = read_csv(out / "suspects.csv")
    assert len(found) == 120
    against = [abs((row["label"] == "present") - float(row["score"])) for row in found]
    assert all(a >= b - 1.1e-4 for a, b in zip(against, against[1:], strict=False))
    places = [i for i, row in enumerate(found) if row["image"] in moved and row["class"] == "horse"]
    assert len(places) == 2 and max(places) < 40  # of 120, from a model that knows these scenes
    page, count = questions_of(out / "review.html"), sum(value > 0.5 for value in against)
    assert len(page["questions"]) == count > 1 and page["questions"][0][3] in ("present", "absent")
    command.main([*run, "--questions", "1"])
    assert f" and contradicts {count}, the first 1 are on the page\n" in capsys.readouterr().out


def test_suspects_are_not_counted_where_no_label_tells_the_level(scenes, rest, tmp_path, capsys):
    base, rows = scenes
    present = {name: [value or "" for value in row] for name, row in rows.items()}
    labels = write_table(tmp_path / "labels.csv", present, classes=CLASSES)
    out = ["--output", str(tmp_path / "suspects"), "--folds", "2", "--epochs", "1"]
    command.main(["suspects", str(base / "photos"), str(labels), *out, *rest])
    told = capsys.readouterr().out
    assert "\nstart at the top: " in told and "contradicts" not in told


def test_a_trained_model_keeps_its_page(scenes, rest, tmp_path):
    base, _ = scenes
    (tmp_path / "README.md").touch()
    with pytest.raises(SystemExit, match="^error: --output: .* holds a trained model"):
        command.main(["suspects", str(base / "photos"), str(base / "labels.csv"), "--output", str(tmp_path), *rest])


def test_images_of_a_group_share_a_fold():
    groups = [f"scene {i // 4}" for i in range(40)]
    fold = _folds(groups, 3, seed=0)
    assert all(len(set(fold[i : i + 4].tolist())) == 1 for i in range(0, 40, 4))
    assert sorted(fold.unique().tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--folds", "1"], "--folds must be at least 2, got 1"),
        (["--folds", "41"], "--folds must be at most the number of images, 40, got 41"),
        (["--folds", "2", "--group", "folder"], "--folds must be at most the number of groups, 1, got 2"),
        (["--questions", "-1"], "--questions must be at least 0"),
        (["--form", "coco", "--separator", ";"], "are for tables and lists, not for --form coco"),
    ],
)
def test_suspects_that_cannot_be_found_are_refused(change, said, scenes, rest, tmp_path):
    base, _ = scenes
    run = ["suspects", str(base / "photos"), str(base / "labels.csv"), "--output", str(tmp_path / "out"), *rest, *change]
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        command.main(run)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model(scenes, rest, tmp_path_factory):
    base, _ = scenes
    names = base / "names.txt"
    names.write_text("\n".join(CLASSES), encoding="utf-8")
    out = tmp_path_factory.mktemp("model") / "tags"
    command.main(["tag", str(base / "photos"), "--classes", str(names), "--output", str(out), *rest])
    return out


def test_a_model_asks_about_what_is_not_known(scenes, model, rest, tmp_path):
    base, rows = scenes
    page = tmp_path / "review.html"
    review = ["review", str(model), str(base / "photos")]
    command.main([*review, "--output", str(page), "--questions", "30", *rest])
    found = questions_of(page)
    assert found["classes"] == CLASSES and len(found["questions"]) == 30
    assert all(question[3] is None and 0 < question[2] < 1 for question in found["questions"])
    known = {name: [value, "", ""] for name, value in ((name, row[0]) for name, row in rows.items())}
    labels = write_table(tmp_path / "labels.csv", known, classes=CLASSES)
    command.main([*review, str(labels), "--output", str(page), "--questions", "100", *rest])
    found = questions_of(page)["questions"]
    assert {question[1] for question in found if question[3] is None} == {1, 2}
    assert all(question[1] == 0 for question in found if question[3] is not None)
    other = write_table(tmp_path / "other.csv", {"1.png": [1]}, classes=["boat"])
    for wrong, said in (
        ([str(other)], "other.csv has the class 'boat', which .* does not know"),
        ([str(base / "labels.csv"), "--questions", "0"], "--questions must be at least 1"),
        (["--output", str(tmp_path / "page.txt")], "--output must be an .html file"),
    ):
        with pytest.raises(SystemExit, match=said):
            command.main([*review, *wrong, *([] if "--output" in wrong else ["--output", str(page)]), *rest])


def test_what_was_answered_is_not_asked_again(scenes, model, rest, tmp_path):
    base, rows = scenes
    wrong = {name: [1 - row[0], "", ""] for name, row in rows.items()}
    labels = write_table(tmp_path / "labels.csv", wrong, classes=CLASSES)
    answers, page = tmp_path / "answers.csv", tmp_path / "review.html"
    review = ["review", str(model), str(base / "photos"), str(labels)]
    asked = []
    for known in ([], [str(answers)]):
        command.main([*review, *known, "--output", str(page), "--questions", "20", *rest])
        found = questions_of(page)
        asked.append({(found["images"][i][0], CLASSES[c]): said for i, c, _, said, _ in found["questions"]})
        told = "".join(f"{file},{name},{said or 'unsure'}\n" for (file, name), said in asked[0].items())
        answers.write_text(f"image,class,answer\n{told}", encoding="utf-8")
    assert len(asked[0]) == len(asked[1]) == 20 and all({None} < set(page.values()) for page in asked)
    assert not asked[0].keys() & asked[1].keys()


def test_a_table_is_known_by_its_suffix_alone(capsys):
    with pytest.raises(SystemExit):
        command.main(["convert", "photos", "labels.txt", "--form", "jsonl", "--to", "csv", "--output", "labels.csv"])
    assert "--form: invalid choice: 'jsonl'" in capsys.readouterr().err


def test_a_split_that_a_form_has_no_place_for_is_said(scenes, tmp_path, capsys):
    table = write_table(tmp_path / "split.csv", {"1.png": [1, "val"]}, classes=["car", "split"])
    command.main(["convert", str(scenes[0] / "photos"), str(table), "--to", "coco", "--output", str(tmp_path / "coco.json")])
    assert "the column split was left out" in capsys.readouterr().out


def test_answers_take_the_place_of_labels(scenes, rest, tmp_path, capsys):
    base, rows = scenes
    first = next(name for name, row in rows.items() if row[1] == 0)
    answers = tmp_path / "answers.csv"
    answers.write_text(f"image,class,answer,annotator\n{first},dog,present,me\n", encoding="utf-8")
    known = [str(base / "photos"), str(base / "labels.csv"), str(answers)]
    command.main(["convert", *known, "--to", "csv", "--output", str(tmp_path / "all.csv")])
    assert "1 answers change 1 labels: 0 were unknown, 1 were the opposite" in capsys.readouterr().out
    found = {row["image"]: [int(row[name]) for name in CLASSES] for row in read_csv(tmp_path / "all.csv")}
    assert found == {**rows, first: [rows[first][0], 1, rows[first][2]]}
    command.main(["train", *known, "--output", str(tmp_path / "run"), "--epochs", "1", "--no-choose", *rest])
    assert "1 answers change 1 labels" in capsys.readouterr().out
    coco = tmp_path / "all.json"
    command.main(["convert", *known, "--to", "coco", "--output", str(coco)])
    again = ["convert", str(base / "photos"), str(coco), "--form", "coco", "--to", "csv", "--output", str(tmp_path / "b.csv")]
    command.main(again)
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()
    with pytest.raises(SystemExit, match="b.csv is there already, and nothing is replaced"):
        command.main(["convert", *known, "--to", "csv", "--output", str(tmp_path / "b.csv")])
    with pytest.raises(SystemExit, match="no class of this model|no such class"):
        answers.write_text(f"image,class,answer\n{first},boat,present\n", encoding="utf-8")
        command.main(["convert", *known, "--to", "csv", "--output", str(tmp_path / "c.csv")])
