"""The card of a model."""

import os
import re

import torch

from trm_losses import Calibration, RegionPooler, TextRegionMatchingLoss, TRMHead
from trm_pipeline.folder.card import model_card
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.model import SavedModel


def card(names, model="embedded", pretrained=None, **scores):
    """Of classes that nothing was learned of."""
    head = TRMHead(RegionPooler(len(names), 8), TextRegionMatchingLoss(len(names)), torch.ones(len(names), 8), names)
    head.calibration = Calibration(len(names)) if scores else None
    classes = {name: {"words": name, "trained": False, "threshold": 0.5, "threshold_from": "default"} for name in names}
    saved = SavedModel(model, pretrained, "", (64, 64), 1, (), classes, scores)
    return model_card(saved, head, Labels(["a.png"], names, torch.ones(1, len(names)), lists=False), torch.zeros(1).bool())


def test_names_of_classes_are_neither_markdown_nor_html():
    shown = {
        "<b>&": "&lt;b&gt;&amp;",
        "`c` *s* _x_": r"\`c\` \*s\* \_x\_",
        "a|b\\": r"a\|b" + r"\\",
        "[two](l)\nlines": r"\[two\](l) lines",
    }
    told = card(list(shown))
    assert f"Relying on {', '.join(shown.values())}: no present label" in told
    for words in shown.values():
        assert re.search(rf"^\| {re.escape(words)} +\| {re.escape(words)} +\|", told, re.MULTILINE)


def test_the_level_of_lists_is_assumed():
    told = [card(["cat"], calibrated_on="held-out labels", level_assumed=alone) for alone in (False, True)]
    assert ["tell no level" in text for text in told] == [False, True]


def test_folders_of_the_machine_that_trained_are_not_told():
    folder = os.path.abspath("secret")
    told = card(["cat"], f"hf:{folder}/clip/") + card(["cat"], "ViT-B-32", f"{folder}/w.pt") + card(["cat"], "hf:org/clip")
    assert "secret" not in told
    for weights in ("hf:clip", "ViT-B-32 w.pt", "hf:org/clip"):
        assert f"# 1 classes on {weights}\n" in told and f"the frozen model {weights} (" in told
