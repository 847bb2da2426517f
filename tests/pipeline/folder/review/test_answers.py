"""Answers that people gave, read and put over labels."""

import re

import pytest
import torch

from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.review.answers import joined, read_answers

CLASSES = ["cat", "dog", "garden chair"]
IMAGES = ["a.jpg", "b.jpg", "sub/c.png", "caf\udce9.png"]
HEADER = "image,class,answer,annotator,confidence\n"


def read(tmp_path, *texts):
    paths = [tmp_path / f"answers{i}.csv" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_answers(paths, CLASSES, IMAGES)


@pytest.mark.parametrize(
    "text",
    [
        "image,class,answer\na.jpg,cat,present\nc.png,dog,absent\nsub/c,garden chair,unsure\n",
        "\ufeffImage;Class;Answer\r\na.jpg;cat;Present\r\nc.png;dog;ABSENT\r\nsub/c;garden chair; unsure\r\n;;\r\n",
        'class\timage\tanswer\tannotator\n"cat"\ta.jpg\tpresent\tpat\ndog\tsub\\c.png\tabsent\tpat\ngarden chair\tc\tunsure\t\n',
    ],
)
def test_tables_in_any_dress(text, tmp_path):
    wanted = {("a.jpg", "cat"): 1, ("sub/c.png", "dog"): 0, ("sub/c.png", "garden chair"): -1}
    assert read(tmp_path, text) == wanted


def test_a_name_that_is_no_text(tmp_path):
    assert read(tmp_path, "image,class,answer\ncaf\\udce9.png,cat,present\n") == {(IMAGES[3], "cat"): 1}


def test_the_last_row_of_the_last_file_counts(tmp_path, capsys):
    first = "image,class,answer\na.jpg,cat,present\na.jpg,cat,absent\nb.jpg,dog,present\n"
    assert read(tmp_path, first) == {("a.jpg", "cat"): 0, ("b.jpg", "dog"): 1}
    assert not capsys.readouterr().out
    second = "image,class,answer\na.jpg,cat,unsure\n"
    assert read(tmp_path, first, second) == {("a.jpg", "cat"): -1, ("b.jpg", "dog"): 1}
    told = "cat in a.jpg: no name absent (answers0.csv, line 3), no name unsure (answers1.csv, line 2); taken as unknown"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "value", "told"),
    [
        (["present,pat,", "absent,sam,0.5"], 1, "taken as present"),
        (["present,pat,0.4", "absent,sam,0.5"], 0, "taken as absent"),
        (["present,pat,0.3", "absent,sam,.1", "absent,kim,0.2"], -1, "taken as unknown"),
        (["present,pat,", "absent,sam,", "absent,sam,", "absent,,"], 0, "no name absent"),
        (["present,pat,", "unsure,sam,"], 1, None),
        (["unsure,pat,", "unsure,sam,"], -1, None),
        (["absent,pat,", "absent,pat,0.5", "present,pat,0.1"], 1, None),
    ],
)
def test_annotators_vote_with_their_confidence(rows, value, told, tmp_path, capsys):
    found = read(tmp_path, HEADER, HEADER + "".join(f"a.jpg,cat,{row}\n" for row in rows))
    assert found == {("a.jpg", "cat"): value}
    printed = capsys.readouterr().out
    if told:
        assert all(text in printed for text in (told, "pat present (answers1.csv, line 2)", "disagree about 1 of 1 questions"))
    else:
        assert not printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "answers0.csv is empty; its first line must be a header such as image,class,answer"),
        ("image,answer\na.jpg,present\n", "line 1: the columns must be image, class, answer and, if need be,"),
        ("image,class,answer,note\n", "annotator and confidence, each once; got image, class, answer, note"),
        (HEADER + "a.jpg,cat,present\n", "line 2: 3 cells, but the header has 5"),
        (HEADER + "a.jpg,cats,present,,\n", "line 2, column class: 'cats' is no class of this model; the nearest is 'cat'"),
        (HEADER + "a.jpg,zzz,present,,\n", "is no class of this model; they are cat, dog, garden chair"),
        (HEADER + "a.jpeg,cat,present,,\n", "line 2: there is no image 'a.jpeg' in the folder; near it: a.jpg"),
        (HEADER + '"a.jpg",cat,"pre\nsent",,\nx,cat,yes,,\n', "line 2, column answer: 'pre\\nsent' is none of present, absent,"),
        (HEADER + '"a.jpg",cat,"pre\nsent",,\nx,cat,yes,,\n', "line 4, column answer: 'yes' is none of"),
        *(
            (HEADER + f"a.jpg,cat,present,,{c}\n", f"line 2, column confidence: '{c}' must be")
            for c in ("0", "-1", "1.1", "nan", "x")
        ),
        (HEADER + 'a.jpg,cat,"present,,\n', "line 2: 3 cells"),
        (b"image,class,answer\n\xff,cat,present\n", "answers0.csv, line 2: not UTF-8"),
    ],
)
def test_mistakes_are_told_with_their_place(text, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, text)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_answers([tmp_path / "none.csv"], CLASSES, IMAGES)


def labels(**more):
    return Labels(["a.jpg", "b.jpg"], ["cat", "dog"], torch.tensor([[1.0, -1], [0, 0]]), lists=False, **more)


def test_answers_win_over_labels(capsys):
    before = labels(held=torch.tensor([True, False]), groups=["one", "two"])
    values = {
        ("a.jpg", "cat"): 0.0,
        ("a.jpg", "dog"): 1.0,
        ("b.jpg", "cat"): -1.0,
        ("b.jpg", "dog"): 0.0,
        ("sub/c.png", "dog"): 1.0,
    }
    after = joined(before, values)
    assert after.files == ["a.jpg", "b.jpg", "sub/c.png"] and after.class_names == ["cat", "dog"]
    assert after.targets.tolist() == [[0, 1], [-1, 0], [-1, 1]]
    assert after.held.tolist() == [True, False, False] and after.groups == ["one", "two", "sub/c.png"]
    assert before.targets.tolist() == [[1, -1], [0, 0]], "what was given stays as it was"
    told = "5 answers change 4 labels: 2 were unknown, 1 were the opposite, 1 are unknown now; 1 images had no row"
    assert told in capsys.readouterr().out


def test_new_images_belong_to_their_folder_where_all_do():
    after = joined(labels(groups=["", ""]), {("sub/c.png", "dog"): 1.0})
    assert after.groups == ["", "", "sub"] and after.held is None


def test_an_answer_about_a_class_without_labels():
    with pytest.raises(ValueError, match="the answers are about 'dogs', and the labels have no such class; the nearest is 'dog'"):
        joined(labels(), {("a.jpg", "dogs"): 1.0})
