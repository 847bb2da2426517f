"""Label files of one's own: tables, lists and JSON in any dress, and mistakes that are told with their place."""

import csv
import io
import json
import re

import pytest

from trm_pipeline.folder.labels import read_labels

IMAGES = ["a.jpg", "b.jpg", "sub/c.png", "sub/é 1.jpg"]


def read(tmp_path, text, *, name="labels.csv", images=IMAGES, **options):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_labels(path, images, **options)


@pytest.mark.parametrize(
    "text",
    [
        "image,cat,dog\na.jpg,1,0\nb.jpg,,1\n",
        "\ufeffimage;cat;dog\r\na.jpg;1;0\r\nb.jpg;;1\r\n",
        "image\tcat\tdog\na.jpg\tYes\tNO\nb.jpg\t?\tTrue",
        '\n"image", "cat", dog \n"a.jpg", present ,absent\n\nb,nan,1.0\n,,\n',
        "file,cat,dog\n./a.jpg,true,false\nb.jpg,unknown,y\n",
        "image,cat,dog\ra.jpg,1,0\rb.jpg,None,1\r",
        "sep=|\r\nimage|cat|dog\r\na.jpg|1|0\r\nb.jpg||1\r\n",
    ],
)
def test_tables_in_any_dress(text, tmp_path):
    labels = read(tmp_path, text)
    assert labels.files == ["a.jpg", "b.jpg"] and labels.class_names == ["cat", "dog"] and not labels.lists
    assert labels.targets.tolist() == [[1, 0], [-1, 1]]


@pytest.mark.parametrize(
    "text",
    ["image,labels\na.jpg,dog|cat\nb.jpg,\n", 'image,Tags\na.jpg,"dog, cat"\nb.jpg,', "image,label\na.jpg,cat;dog;\nb.jpg,\n"],
)
@pytest.mark.parametrize("absent", [False, True])
def test_lists_say_what_is_present(text, absent, tmp_path):
    labels = read(tmp_path, text, unlisted_absent=absent)
    assert labels.class_names == ["cat", "dog"] and labels.lists != absent
    assert labels.targets.tolist() == [[1, 1], [0, 0] if absent else [-1, -1]]


# What a column of lists says: the cells, the separator that is found, and the names of each cell.
LISTS = {
    "#": (["car#dog", "dog"], "#", ["car dog", "dog"]),
    "a trailing separator": (["car;", "dog;", ""], ";", ["car", "dog", ""]),
    "spaces, in many combinations": (
        ["car dog", "dog bus car", "dog", "bus", "car bus", "car"],
        " ",
        ["car dog", "dog bus car", "dog", "bus", "car bus", "car"],
    ),
    "numbers by spaces": (["16 0", "7 1", "5"], " ", ["16 0", "7 1", "5"]),
    "a comma within names": (["A, b|C", "A, b", "C"], "|", ["A,_b C", "A,_b", "C"]),
    "a comma within names that have parts in common": (
        ["A, b|C", "A, d|E, b", "E, d", "C"],
        "|",
        ["A,_b C", "A,_d E,_b", "E,_d", "C"],
    ),
    "spaces and # within names": (["C# x|go", "go", "C# x"], "|", ["C#_x go", "go", "C#_x"]),
    "quoted names": (["'A, b', 'C'", '"C"'], ",", ["A,_b C", "C"]),
    "names that hold spaces": (["polar bear", "zebra", "polar bear"], None, ["polar_bear", "zebra", "polar_bear"]),
    "JSON": (['["car", "dog \\u00e9"]', "[]", '["car"]'], None, ["car dog_é", "", "car"]),
    "Python": (["['car', 'dog']", "['A, b']", "('car',)"], None, ["car dog", "A,_b", "car"]),
    "numpy": (["['car' 'dog']", "['car']"], None, ["car dog", "car"]),
    "no quotes": (["[car, dog]", "[dog]"], ",", ["car dog", "dog"]),
    "Label Studio": (['{"choices": ["car", "dog"]}', "car"], None, ["car dog", "car"]),
    "other scripts": (["猫、犬", "犬"], "、", ["猫 犬", "犬"]),
}


def write_lists(cells, header="image_name,tags"):
    out = io.StringIO()
    csv.writer(out).writerows([header.split(","), *([f"{i}.jpg", cell] for i, cell in enumerate(cells))])
    return out.getvalue(), [f"{i}.jpg" for i in range(len(cells))]


@pytest.mark.parametrize("case", LISTS)
def test_the_separator_of_lists_belongs_to_the_file(case, tmp_path):
    cells, separator, names = LISTS[case]
    text, images = write_lists(cells)
    labels = read(tmp_path, text, images=images)
    found = [{labels.class_names[c] for c in (row == 1).nonzero().flatten()} for row in labels.targets]
    assert found == [{name.replace("_", " ") for name in row.split()} for row in names] and labels.separator == separator


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["car dog", "dog bus"], "line 2, column tags: 'car dog' may be one name or a list; say --separator ' ' if it is a list"),
        (["polar bear", "brown bear", "zebra"], "'polar bear' may be one name or a list"),
        (["car/dog", "dog"], "say --separator '/' if it is a list"),
        (["zebra", "Train, steam", "Train, steam"], "line 3, column tags: 'Train, steam' may be one name or a list"),
        (["cat,dog", "dog,bird", "cat|dog", "bird"], "may be separated by '|' or ','; say which it is with --separator"),
        (['["car", "dog"]', "car,dog"], "'car,dog' is no array such as those of other cells"),
        (['{"car": 1, "dog": 0}', "car"], "is no list of names"),
    ],
)
def test_what_may_be_a_list_or_a_name_is_asked(cells, said, tmp_path):
    text, images = write_lists(cells)
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path, text, images=images)


@pytest.mark.parametrize(("separator", "names"), [(" ", ["car", "dog"]), (";", ["car dog", "dog"]), ("::", ["car dog", "dog"])])
def test_a_separator_that_is_said_is_taken(separator, names, tmp_path):
    text, images = write_lists(["car dog", "dog"], "ImageID,Labels")
    assert read(tmp_path, text, images=images, separator=separator).class_names == names
    with pytest.raises(ValueError, match="--separator is for a column of lists"):
        read(tmp_path, "image,cat\na.jpg,1\n", separator=separator)


@pytest.mark.parametrize("header", ["filename,categories", "Id,Target", "ImageID,LabelName", "x,attribute_ids", "x,Tags"])
def test_headers_of_a_column_of_lists(header, tmp_path):
    assert read(tmp_path, f"{header}\na.jpg,cat|dog\n").class_names == ["cat", "dog"]


# ---------------------------------------------------------------------------------------------- the split of the file
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("image,cat,split,scene\na.jpg,1,Train,s\nb.jpg,0,hold_out,s\nsub/c.png,1,val,\n", "labels.csv"),
        ("image,SPLIT,scene,tags\na.jpg,training,s,cat|dog\nb.jpg,test,s,dog\nsub/c.png,Valid,,cat\n", "labels.csv"),
        (
            '{"image": "a.jpg", "labels": {"cat": 1}, "split": "train", "scene": "s"}\n'
            '{"image": "b.jpg", "labels": {"cat": 0}, "split": "Held out", "scene": "s"}\n'
            '{"image": "sub/c.png", "labels": {}, "split": "dev"}\n',
            "x.jsonl",
        ),
    ],
)
def test_a_file_says_which_images_are_held_out_and_which_belong_together(text, name, tmp_path):
    labels = read(tmp_path, text, name=name, group="scene")
    assert labels.held.tolist() == [False, True, True] and labels.files == ["a.jpg", "b.jpg", "sub/c.png"]
    assert labels.groups[0] == labels.groups[1] == "s" != labels.groups[2] and "split" not in labels.class_names
    assert read(tmp_path, text.replace("scene", "folder"), name=name, group="folder").groups == labels.groups
    if name == "x.jsonl":
        assert read(tmp_path, text, name=name, group="folder").groups == ["", "", "sub"]


@pytest.mark.parametrize(
    ("text", "group", "said"),
    [
        ("image,cat,split\na.jpg,1,3\n", None, "line 2, split: '3' is no side; wanted train, or one of val, test and hold-out"),
        ("image,cat,split\na.jpg,1,\n", None, "line 2, split: '' is no side"),
        ("image,cat\na.jpg,1\n", "scene", "--group must be folder or a column"),
        ("image,split\na.jpg,train\n", None, "the header must name a column for each class"),
        ("image,cat,scene\na.jpg,1,kitchen\n", None, "train takes it as --group"),
    ],
)
def test_mistakes_of_the_split_are_told(text, group, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path, text, group=group)


def test_lines_of_json(tmp_path):
    lines = [{"image": "b.jpg", "labels": {"dog": 1, "cat": None}}, {"image": "a.jpg", "labels": {"cow": False, "dog": "?"}}]
    labels = read(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n", name="x.jsonl")
    assert labels.files == ["b.jpg", "a.jpg"] and labels.class_names == ["dog", "cat", "cow"] and not labels.lists
    assert labels.targets.tolist() == [[1, -1, -1], [-1, -1, 0]]
    labels = read(tmp_path, '\ufeff{"image": "b.jpg", "labels": ["dog", "cat"]}', name="x.jsonl")
    assert labels.class_names == ["cat", "dog"] and labels.lists and labels.targets.tolist() == [[1, 1]]


@pytest.mark.parametrize(("minus_one", "expected"), [("unknown", [1, 0, -1]), ("absent", [1, -1, 0])])
def test_minus_one_means_what_is_said(minus_one, expected, tmp_path):
    assert read(tmp_path, "image,x,y,z\na.jpg,1,0,-1\n", minus_one=minus_one).targets.tolist() == [expected]


@pytest.mark.parametrize("name", ["sub/c.png", "sub/c", "c.png", "c", "sub\\c.png", "./sub/c.png"])
def test_images_by_any_name_that_is_theirs_alone(name, tmp_path):
    assert read(tmp_path, f"image,cat\n{name},1\n").files == ["sub/c.png"]


def test_composed_and_decomposed_characters_are_one_name(tmp_path):
    assert read(tmp_path, "image,cat\nsub/e\u0301 1.jpg,1\n").files == ["sub/é 1.jpg"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,cat\na.jpg,1\nb.jpg,maybe\n", "labels.csv, line 3, column cat: 'maybe' is no label (present: 1 yes"),
        ("image,cat\na.jpg,2\n", "line 2, column cat: '2' is no label"),
        ("image,cat\na.jpg,-1\n", "say --minus-one unknown or --minus-one absent"),
        ("image,cat\nz.gif,1\n", "line 2: there is no image 'z.gif' in the folder; the folder holds a.jpg and 3 more"),
        ("image,cat\nA.JPG,1\n", "near it: a.jpg"),
        ("image,cat\na.png,1\n", "near it: a.jpg"),
        ("image,cat\na.jpg,1\nb.jpg,1\na,0\n", "line 4: a second row for a.jpg, which labels.csv, line 2 has"),
        ("image,cat\n,1\n", "line 2: the first column, the image, is blank"),
        ("image,cat\na.jpg,1,0\n", "line 2: 3 cells, but the header has 2"),
        ("image,labels\na.jpg,cat,dog\n", 'put the list in quotes, "cat,dog", or separate it by |'),
        ("image,labels,width\na.jpg,cat;dog,640\n", "if it lists what is present, take out the other columns: width"),
        ("image,cat,cat\na.jpg,1,1\n", "columns 2 and 3 are both named 'cat'"),
        ("image,cat,\na.jpg,1,1\n", "column 3 has no name"),
        ("image,cat,Cat\na.jpg,1,1\n", "'cat' and 'Cat' differ in case or spaces alone"),
        ("image,labels\na.jpg,cat\nb.jpg,CAT\n", "'CAT' and 'cat' differ in case"),
        ("a.jpg,1,0\nb.jpg,0,0\n", "the first line must be a header"),
        ("image\na.jpg\n", "the header must name a column of images and one for each class, got 'image' alone"),
        ("image,cat\n", "no row of labels"),
        ("image,labels\na.jpg,\n", "names no class"),
        ("image,label\na.jpg,1\nb.jpg,0\n", "a list must hold names of classes, got 0, 1; leave it blank"),
        ("image,labels\na.jpg,cat\nb.jpg,none\n", "a list must hold names of classes, got none; leave it blank"),
        ("", "is empty"),
        (b"image,caf\xe9\na.jpg,1\n", "line 1: not UTF-8"),
        ('image,cat\na.jpg,"1\n' + "b.jpg,1\n" * 20_000, "a quote that is never closed"),
    ],
)
def test_mistakes_of_a_table_are_told_with_their_place(text, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path, text)


def test_a_name_of_two_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'c' may be a/c.png or b/c.png; write its path"):
        read(tmp_path, "image,cat\nc,1\n", images=["a/c.png", "b/c.png"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"image": "a.jpg", "labels": {"cat": "perhaps"}}', "x.jsonl, line 1, class cat: 'perhaps' is no label"),
        ('{"image": "a.jpg", "labels": ["cat"]}\n{"image": ', "x.jsonl, line 2, column 11: not JSON"),
        ('[{"image": "a.jpg", "labels": ["cat"]}]', "wanted one object a line"),
        ('{"image": "a.jpg"}', "wanted one object a line"),
        ('{"image": "a.jpg", "labels": {"cat": 1, "cat ": 0}}', "x.jsonl, line 1: 'cat' stands in one object twice"),
        ('{"image": "a.jpg", "labels": ["cat,dog", "cat", "dog"]}', "line 1: 'cat,dog' consists of other classes"),
        ('{"image": "a.jpg", "labels": [1]}', "a list of labels must hold names"),
        ('{"image": "a.jpg", "labels": ["cat"]}\n{"image": "b.jpg", "labels": {"cat": 1}}', "lists in some lines and objects"),
    ],
)
def test_mistakes_of_json_are_told_with_their_place(text, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path, text, name="x.jsonl")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", [{"images": [], "annotations": []}, [{"data": {"image": "a.jpg"}}]])
def test_a_document_of_another_tool_is_known_as_one(value, indent, tmp_path):
    with pytest.raises(ValueError, match="labels.json is one JSON document: of Label Studio, COCO or FiftyOne.* --form"):
        read(tmp_path, json.dumps(value, indent=indent), name="labels.json")


@pytest.mark.parametrize("text", ["image,cat\na.jpg,1\n", '{"image": "a.jpg", "labels": {"cat": 1}}'])
def test_nothing_is_unlisted_where_there_are_no_lists(text, tmp_path):
    with pytest.raises(ValueError, match="--unlisted absent is for lists of what is present"):
        read(tmp_path, text, name="labels.json" if text[0] == "{" else "labels.csv", unlisted_absent=True)


def test_some_mistakes_are_shown_and_all_are_counted(tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, "image,cat\n" + "".join(f"none{i}.jpg,1\n" for i in range(9)) + "a.jpg,x\n")
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and "line 11, column cat" in lines[0] and lines[-1].strip() == "and 5 more mistakes"


def test_files_that_are_no_label_files(tmp_path):
    with pytest.raises(ValueError, match="save a spreadsheet as 'CSV UTF-8'"):
        read(tmp_path, "x", name="labels.xlsx")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_labels(tmp_path / "none.csv", IMAGES)
