"""What the page of questions holds."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers.own_folder import questions_of
from tests.pipeline.folder.review.conftest import CLASSES, FILES
from trm_pipeline.folder.review.page import Question, write_review


def test_each_picture_is_there_once_and_small(folder, questions, tmp_path, capsys):
    path = tmp_path / "review.html"
    identity = write_review(path, questions, CLASSES, images=folder)
    data = questions_of(path)
    assert data["id"] == identity and data["classes"] == CLASSES
    names = [image[0] for image in data["images"]]
    assert names == ["a.jpg", FILES[1], "caf\\udce9.png", "</script>.png", "broken.jpg"]
    for _, content, width, height, reason in data["images"][:3]:
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert image.format == "JPEG" and image.size == (width, height) == (224, 224) and not reason
    assert [image[4] for image in data["images"][3:]][0] == "the file is not there"
    assert not data["images"][4][1] and data["images"][4][4]
    assert [q[:4] for q in data["questions"][:3]] == [[0, 0, 0.73, "absent"], [0, 1, 0.5, None], [1, 0, 0.1, "present"]]
    assert "2 pictures cannot be read" in capsys.readouterr().out


def test_maps_are_bytes_of_which_the_highest_is_255(folder, questions, tmp_path):
    write_review(path := tmp_path / "review.html", questions, CLASSES, images=folder)
    rows, columns, packed = questions_of(path)["questions"][0][4]
    cells = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(rows, columns)
    assert (cells == np.where(questions[0].heat > 0, 255, 0)).all()
    wide = np.full((10, 100), np.nan)
    wide[0, 0] = 2
    write_review(path, [Question("a.jpg", "dog", 0.5, wide)], CLASSES, images=folder)
    rows, columns, packed = questions_of(path)["questions"][0][4]
    assert (rows, columns) == (3, 32) and base64.b64decode(packed)[0] == 255


def test_names_are_escaped_and_nothing_is_fetched(folder, questions, tmp_path):
    write_review(path := tmp_path / "review.html", questions, CLASSES, images=folder, title='</title><b>"<i>')
    html = path.read_text(encoding="utf-8")
    assert html.count("</script>") == 2 and "<b>" not in html and "<i>" not in html and "<!--" not in html
    assert not re.findall(r"https?:|src=|<link|@import|url\(", html)


def test_the_id_is_that_of_the_questions(folder, questions, tmp_path):
    def identity(some, classes=CLASSES, **options):
        return write_review(tmp_path / "review.html", some, classes, images=folder, **options)

    first = identity(questions)
    assert first == identity(questions, title="another") == identity([q._replace(score=0.5) for q in questions])
    others = [questions[1:], questions[::-1], [questions[0]._replace(said=None), *questions[1:]]]
    assert len({first, identity(questions, CLASSES[::-1]), *map(identity, others)}) == 5


def test_pictures_become_smaller_until_they_fit(folder, questions, tmp_path, capsys):
    path = tmp_path / "review.html"
    write_review(path, questions, CLASSES, images=folder)
    whole = sum(len(image[1]) for image in questions_of(path)["images"])
    write_review(path, questions, CLASSES, images=folder, limit=0.6 * whole)
    images = questions_of(path)["images"]
    assert sum(len(image[1]) for image in images) <= 0.6 * whole and images[0][2:4] in ([176, 176], [128, 128], [96, 96])
    assert f"the pictures are at most {images[0][2]} pixels" in capsys.readouterr().out
    before = path.read_bytes()
    with pytest.raises(ValueError, match="ask about fewer images"):
        write_review(path, questions, CLASSES, images=folder, limit=1000)
    assert path.read_bytes() == before
