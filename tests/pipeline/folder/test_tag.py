"""Scores of a folder by the names of classes, without any label."""

import pytest
import torch

from tests.helpers.own_folder import CLASSES, read_csv
from trm_losses.metrics import mean_average_precision
from trm_pipeline import command as cli


def test_tags_need_the_names_of_classes_alone(images, cache, tmp_path, capsys):
    """A model that predict takes; other images than those that cannot be read."""
    folder, rows = images
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES) + "\n\n", encoding="utf-8-sig")
    cli.main(["tag", str(folder), "--classes", str(names), "--output", str(tmp_path / "tags"), *cache])
    said = capsys.readouterr().out
    assert "cut.jpg: image file is truncated" in said and "Their level is assumed" in said
    assert sorted(path.name for path in (tmp_path / "tags").iterdir()) == ["head.pt", "model.json", "scores.csv"]
    found = read_csv(tmp_path / "tags" / "scores.csv")
    assert list(found[0]) == ["image", "present", *CLASSES] and {row["image"] for row in found} == set(rows) - {
        "cut.jpg",
        "empty.png",
    }
    scores = torch.tensor([[float(row[name]) for name in CLASSES] for row in found])
    targets = torch.tensor([rows[row["image"]] for row in found])
    assert mean_average_precision(scores[:, :3], targets[:, :3]) > 0.7
    assert 0.05 < scores.mean() < 0.5  # of four classes one is assumed present
    cli.main(["predict", str(tmp_path / "tags"), str(folder / "1.png"), "--output", str(tmp_path / "s.csv"), "--device", "cpu"])
    (row,) = read_csv(tmp_path / "s.csv")
    before = next(other for other in found if other["image"] == "1.png")
    assert [float(row[name]) for name in CLASSES] == pytest.approx([float(before[name]) for name in CLASSES], abs=2e-4)


@pytest.mark.parametrize(
    ("names", "change", "said"),
    [
        (None, [], "--classes: .* not found"),
        ("\n", [], "must hold different names of classes, one a line, got none"),
        ("cat\ncar\ncat\n", [], "got 'cat' twice"),
        ("cat\ncaf\udce9\n", [], "names.txt, line 2: not UTF-8; save it as UTF-8"),
        ("cat\nlaptop\n", [], "has no words for 1 of 2 classes: 'laptop'"),
        ("cat\n", ["--workers", "-1"], "--workers must be at least 0"),
        ("cat\n", ["--template", "a photo"], "--template must hold {}"),
        ("cat\n", ["--names", "dog=cat"], "--names: wanted CLASS=WORDS"),
        ("cat\n", ["--output", "IMAGES/tags"], "lies in the image folder"),
        ("cat\n", ["--expected-positives", "2"], "--expected-positives must be above 0 and at most the number of classes, 1"),
    ],
)
def test_tags_that_cannot_be_given_are_refused(names, change, said, images, cache, tmp_path):
    path = tmp_path / "names.txt"
    if names is not None:
        path.write_text(names, encoding="utf-8", errors="surrogateescape")
    change = [str(images[0] / "tags") if item == "IMAGES/tags" else item for item in change]
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        cli.main(["tag", str(images[0]), "--classes", str(path), "--output", str(tmp_path / "tags"), *cache, *change])
    assert not (tmp_path / "tags").exists()


def test_a_trained_model_is_not_tagged_over(trained, images, cache, tmp_path):
    (tmp_path / "names.txt").write_text("cat\n", encoding="utf-8")
    before = (trained[0] / "model.json").read_bytes()
    with pytest.raises(SystemExit, match="^error: --output: .* holds a trained model"):
        cli.main(["tag", str(images[0]), "--classes", str(tmp_path / "names.txt"), "--output", str(trained[0]), *cache])
    assert before == (trained[0] / "model.json").read_bytes()
