"""The drawn scenes in the layout of VOC."""

import torch

from tests.helpers.runs import SIZES
from trm_pipeline.data.voc import VOC
from trm_pipeline.drawn.devkit import write_drawn_voc


def test_drawn_voc_is_deterministic_whatever_the_workers(tmp_path, devkit):
    again = write_drawn_voc(tmp_path, sizes=SIZES, workers=2)
    for split in SIZES:
        first, second = (VOC(root, 2007, split) for root in (devkit, again))
        assert len(first) == SIZES[split] and first.ids == second.ids
        assert torch.equal(first.targets, second.targets)
        assert torch.equal(first[0][0], second[0][0]) and first[0][0].shape == (3, 224, 224)
        for name, column in zip(first.class_names, first.targets.T.tolist(), strict=True):  # 1 present, 0 difficult alone, -1
            rows = (again / "VOC2007" / "ImageSets" / "Main" / f"{name}_{split}.txt").read_text(encoding="utf-8").splitlines()
            said = {row.split()[0]: row.split()[1] for row in rows}
            assert said.keys() == set(first.ids) and [said[image] == "1" for image in first.ids] == [y == 1 for y in column]
    other = write_drawn_voc(tmp_path, sizes=SIZES, seed=1, workers=1)
    assert not torch.equal(VOC(other, 2007, "train").targets, VOC(devkit, 2007, "train").targets)


def test_a_half_written_data_set_is_never_used(tmp_path):
    first = write_drawn_voc(tmp_path, sizes={"train": 2, "val": 1, "test": 1}, workers=1)
    (first.parent / "stamp.json").unlink()
    (first / "VOC2007" / "ImageSets" / "Main" / "train.txt").unlink()
    second = write_drawn_voc(tmp_path, sizes={"train": 2, "val": 1, "test": 1}, workers=1)
    assert second == first and len(VOC(second, 2007, "train")) == 2
