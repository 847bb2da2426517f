"""A trained model as one object."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.own_folder import CLASSES, read_csv
from trm_pipeline import Tagger
from trm_pipeline import command as cli


@pytest.fixture(scope="module")
def tagger(trained):
    return Tagger.load(trained[0])


def test_one_image_is_scored_as_in_training(tagger, trained, images):
    scores = {row["image"]: row for row in read_csv(trained[0] / "scores.csv")}
    tags = tagger(images[0] / "1.png")
    assert [tag.probability for tag in tags] == sorted((tag.probability for tag in tags), reverse=True)
    assert sorted(tag.name for tag in tags) == sorted(CLASSES) == sorted(tagger.class_names)
    for tag in tags:
        assert tag.probability == pytest.approx(float(scores["1.png"][tag.name]), abs=2e-4)
        assert tag.where.shape == (7, 7) and tag.where.sum() == pytest.approx(1, abs=1e-3)
    assert ";".join(sorted(tag.name for tag in tags if tag.present)) == ";".join(sorted(scores["1.png"]["present"].split(";")))
    with Image.open(images[0] / "1.png") as picture:
        again = tagger(picture.convert("RGBA"))
    assert [tag.name for tag in again] == [tag.name for tag in tags]
    assert [tag.probability for tag in again] == pytest.approx([tag.probability for tag in tags], abs=1e-5)


def test_an_image_of_pillow_is_shown_as_its_file_is(tagger, tmp_path):
    """Turned as a camera says, and gray of 16 bits scaled."""
    exif = Image.Exif()
    exif[0x0112] = 6
    shade = np.linspace(0, 4095, 60 * 90).reshape(60, 90)
    Image.fromarray((shade / 16).astype(np.uint8)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(shade.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("turned.png", "deep.png"):
        wanted = {tag.name: tag.probability for tag in tagger(tmp_path / name)}
        with Image.open(tmp_path / name) as picture:
            assert {tag.name: tag.probability for tag in tagger(picture)} == pytest.approx(wanted, abs=1e-6)


def test_an_array_is_no_image(tagger):
    with pytest.raises(TypeError, match=r"a path or an image of Pillow's, got ndarray; Image\.fromarray"):
        tagger(np.zeros((8, 8, 3), np.uint8))


def test_what_cannot_be_read_is_marked_in_a_stream_and_an_error_alone(tagger, images):
    paths = [images[0] / name for name in ("1.png", "cut.jpg", "2.png")]
    (places, scores), (last, more) = tagger.stream(paths, batch_size=2)
    assert places.tolist() == [0, 1] and last.tolist() == [2]
    assert scores[0].isfinite().all() and scores[1].isnan().all() and more.isfinite().all()
    with pytest.raises(OSError, match="truncated"):
        tagger(images[0] / "cut.jpg")


def test_a_stream_takes_paths_of_any_kind_and_nothing_else(tagger, images):
    path = images[0] / "1.png"
    ((places, scores),) = tagger.stream(file for file in (path, str(path)))
    assert places.tolist() == [0, 1] and torch.equal(scores[0], scores[1])
    for paths, got in ((str(path), "str"), (path, r"\w*Path"), ([path, Image.new("RGB", (8, 8))], "Image")):
        with pytest.raises(TypeError, match=f"must be a list of paths, got {got};"):
            next(tagger.stream(paths))


def test_further_classes_by_name(tagger, trained, images, tmp_path):
    wider = tagger.with_classes(["cat", "boat"])
    before, after = ({tag.name: tag for tag in found(images[0] / "1.png")} for found in (tagger, wider))
    assert set(after) == {*CLASSES, "cat", "boat"} and len(tagger.class_names) == len(CLASSES)
    for name in CLASSES:
        assert after[name].probability == pytest.approx(before[name].probability, abs=1e-5)
    command = ["predict", str(trained[0]), str(images[0] / "1.png"), "--device", "cpu", "--add", "cat", "boat"]
    cli.main([*command, "--output", str(tmp_path / "s.csv")])
    (row,) = read_csv(tmp_path / "s.csv")
    assert float(row["cat"]) == pytest.approx(after["cat"].probability, abs=2e-4)
    refused = {
        "bird": "a list of names",
        ("", "cat"): "none of them blank",
        ("dog",): "'dog' twice",
        ("cat", "cat"): "'cat' twice",
    }
    advice = "(?s)has no words for 1 of 1 .*or as the name of a class that is added"
    for names, said in {**refused, ("laptop",): advice}.items():
        with pytest.raises(ValueError, match=said):
            tagger.with_classes(names)


def test_an_image_tower_cannot_read_further_names(tagger):
    blind = Tagger(tagger.saved, tagger.head, torch.nn.Identity(), torch.device("cpu"))
    with pytest.raises(ValueError, match="embedded has no text tower to read them"):
        blind.with_classes(["cat"])
