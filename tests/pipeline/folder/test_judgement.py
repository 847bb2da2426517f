"""Thresholds, figures and calibration by the images held out."""

import numpy as np
import pytest
import torch

from trm_losses import RegionPooler, TextRegionMatchingLoss, TRMHead
from trm_pipeline.features.cached import CachedFeatures
from trm_pipeline.folder.judgement import CALIBRATED, judge
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.learning import calibrate


def judged(present, absent, *, noted=False):
    """Of two classes, the second with no label of its own but one present; ``noted`` is said of the hold-out."""
    targets = torch.full((present + absent + 1, 2), -1.0)
    targets[:present, 0], targets[present:-1, 0], targets[-1, 1] = 1, 0, 1
    scores = (targets == 1).double().clamp(0.2, 0.8)
    labels = Labels([f"{i}.png" for i in range(len(targets))], ["cat", "dog"], targets, lists=noted)
    held, words = torch.ones(len(targets), dtype=torch.bool), {"cat": "cat", "dog": "dog"}
    about, lines = judge(labels, held, torch.ones(2).bool(), scores, {"tokens": scores, "global": scores}, words, noted=noted)
    return [(own["threshold_from"], own["promised"] is None) for own in about["classes"].values()], about["scores"], lines


@pytest.mark.parametrize(
    ("present", "absent", "own", "together"),
    [(59, 1, False, False), (8, 8, True, False), (59, 4, False, False), (CALIBRATED, CALIBRATED, True, True)],
)
def test_a_threshold_takes_enough_labels_of_both_kinds(present, absent, own, together):
    found, _, lines = judged(present, absent)
    few = ("default: too few labels in the hold-out", True)
    assert found == [("hold-out", False) if own else few, ("hold-out, all classes together", False) if together else few]
    assert ("* 0.5: fewer than 5" in lines) != together


def test_where_present_labels_were_listed_absences_choose_no_threshold():
    found, figures, lines = judged(CALIBRATED, CALIBRATED, noted=True)
    assert found == [("default: present labels alone were listed", True)] * 2
    assert figures["unlisted_counted_as_absent"] and "counts as absent" in lines


def test_as_many_present_classes_as_there_are_still_calibrate():
    """A level below all classes is needed, and lists of a few classes may name nearly all."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, 4, 8, generator=draw).numpy().astype(np.float16)
    features = CachedFeatures([tokens], [tokens.mean(axis=1)], [], torch.device("cpu"))
    head = TRMHead(RegionPooler(3, 8), TextRegionMatchingLoss(3), torch.randn(3, 8, generator=draw), list("abc")).eval()
    targets = torch.full((20, 3), -1.0)
    targets[:, 0] = 1.0
    assert calibrate(head, features, targets, expected_positives=3.0) and head.calibration is not None
