"""What a training leaves in its folder."""

import torch

from tests.helpers.own_folder import read_csv
from trm_pipeline.folder.list_cells import split_cells
from trm_pipeline.folder.model import SavedModel
from trm_pipeline.folder.outputs import score_columns, score_row, write_csv


def test_scores_are_read_back_whatever_the_classes_are_called(tmp_path):
    """Present classes as label files are read, too."""
    names = ["semi;colon", 'a "b"', "part", "class part"]
    saved = SavedModel("embedded", None, "", (64, 64), 1, (), {name: {"threshold": 0.5} for name in names}, {})
    row = score_row(saved, "a.png", torch.tensor([0.9, 0.8, 0.1, 0.2]))
    write_csv(tmp_path / "s.csv", ["image", "present", *score_columns(saved)], [row])
    (read,) = read_csv(tmp_path / "s.csv")
    assert split_cells([read.pop("present")], None, [""]) == ([names[:2]], None)
    assert read == {
        "image": "a.png",
        names[0]: "0.9000",
        names[1]: "0.8000",
        "class class part": "0.1000",
        "class part": "0.2000",
    }
