"""Each method whole on one screen: the scripts of ``examples/four_methods`` learn what can be learned, and stay short."""

from __future__ import annotations

import functools
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("open_clip")
pytest.importorskip("safetensors")

from tests.helpers import ROOT
from trm_losses import write_features
from trm_losses.metrics import mean_average_precision
from trm_pipeline.data import voc
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.run import splits

SCRIPTS = sorted((ROOT / "examples" / "four_methods").glob("*.py"))
CLASSES, WIDTH = 5, 16
SHOWN, NOISE = torch.randn(2, CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
SHOWN = normalize(SHOWN, dim=1)  # what a class looks like
TEXT = normalize(SHOWN + 0.2 * NOISE, dim=1)  # what the frozen model takes it for


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels; tokens, of which one or two show each present class; and their mean."""
    random = torch.Generator().manual_seed(seed)
    targets = (torch.rand(count, CLASSES, generator=random) < 0.3).float()
    tokens = 0.15 * torch.randn(count, 9, WIDTH, generator=random)
    for row, column in targets.nonzero().tolist():
        tokens[row, torch.randint(9, (2,), generator=random)] += SHOWN[column]
    return targets, tokens, tokens.mean(dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given") / "features"
    for seed, (split, count) in enumerate({"train": 128, "val": 40, "test": 80}.items()):
        targets, tokens, pooled = drawn(count, seed)
        views = [[(tokens, pooled)], [(tokens.flip(1), pooled)]][: 1 + (split == "train")]
        names = [f"class {c}" for c in range(CLASSES)]
        write_features(root, split, *views, targets=targets, class_names=names, text=TEXT, logit_scale=100.0)
    return root


def said(script: Path, *typed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", [str(script), *typed, "--device", "cpu"])
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out.strip().splitlines()


def test_there_are_four() -> None:
    assert [path.stem for path in SCRIPTS] == ["dual_coop", "linear", "trm_ml", "zero_shot"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_beats_chance(
    script: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learns = script.stem != "zero_shot"
    lines = said(
        script, str(folder), *(["--known", "0.5", "--epochs", "5"] if learns else []), capsys=capsys, monkeypatch=monkeypatch
    )
    targets, random = drawn(80, 2)[0], torch.Generator().manual_seed(0)
    chance = [mean_average_precision(torch.rand(80, CLASSES, generator=random), targets) for _ in range(20)]
    found = [float(match[1]) for line in lines if (match := re.search(r"mAP (\d+\.\d)$", line))]
    assert len(found) == (5 if learns else 2) and found[-1] > 100 * float(max(chance)) + 20, (found, chance)
    if learns:
        assert re.match(r"128 images, (4[5-9]|5[0-5])\.\d% of the labels known", lines[0])


@pytest.mark.parametrize(("script", "row"), [("linear", 0), ("dual_coop", 1), ("trm_ml --lr 3e-3 --text-lr 1e-2", 1)])
def test_a_script_learns_more_than_the_frozen_model_knows(
    script: str, row: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same features: pooled ones, or tokens."""
    name, *rates = script.split()  # two steps an epoch ask for higher ones
    path, typed = SCRIPTS[0].with_stem(name), ["--known", "0.5", "--epochs", "30", *rates]
    frozen = said(SCRIPTS[-1], str(folder), capsys=capsys, monkeypatch=monkeypatch)[row]
    trained = said(path, str(folder), *typed, capsys=capsys, monkeypatch=monkeypatch)[-1]
    assert float(trained.rpartition(" ")[2]) > float(frozen.rpartition(" ")[2]) + 1, (trained, frozen)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_fits_on_a_screen_and_stands_alone(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110 and "sys.path" not in text
    found = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert found <= {"argparse", "pathlib", "typing", "torch", "trm_losses", "trm_pipeline"}
    assert set(re.findall(r"^from (trm_pipeline\S*)", text, re.MULTILINE)) == {"trm_pipeline.run.splits"}, "the reader alone"


def test_the_reader_gives_what_was_written(folder: Path) -> None:
    train, test = splits.open_splits(folder)
    assert (len(train.features), len(test.features), train.features.views, test.features.views) == (128, 80, 2, 1)
    for split, seed in ((train, 0), (test, 2)):
        targets, tokens, pooled = drawn(len(split.targets), seed)
        batches = list(split.features.batches(50))
        torch.testing.assert_close(torch.cat([batch.tokens for batch in batches]), tokens.half().float(), rtol=0, atol=0)
        torch.testing.assert_close(torch.cat([batch.pooled for batch in batches]), pooled.half().float(), rtol=0, atol=0)
        assert torch.equal(split.targets, targets) and torch.equal(split.text, TEXT) and len(split.class_names) == CLASSES
    with pytest.raises(FileNotFoundError, match="meta.json not found"):
        splits.open_splits(folder / "train")


def test_without_a_folder_it_is_the_drawn_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(write_drawn_voc, sizes={"train": 6, "val": 2, "test": 4}, workers=1)
    monkeypatch.setattr(voc, "write_drawn_voc", small)
    train, test = splits.open_splits(None, cache=tmp_path)
    assert (train.features.views, test.features.views) == (2, 1)
    assert train.targets.shape == (6, 20) and test.targets.shape == (4, 20) and train.class_names[14] == "person"
    (batch,) = test.features.batches(64)
    assert batch.tokens.shape == (4, 49, train.text.shape[1]) and batch.pooled.shape == (4, train.text.shape[1])
