"""Frozen models without a text tower, beside class texts that are given: a timm model, and one that a user writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.own_folder import read_csv
from tests.helpers.runs import Run, read_json, typed
from trm_losses import TRMHead
from trm_losses.backbones import ImageFeatures, TimmBackbone
from trm_losses.metrics import evaluate
from trm_pipeline import command as cli
from trm_pipeline.data.base import eval_transform
from trm_pipeline.data.voc import VOC
from trm_pipeline.features import backbone as backbones
from trm_pipeline.features import towers
from trm_pipeline.run import experiment

WIDTH, SIDE = 64, 96  # of test_vit, with patches of 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a random model, and texts of the 20 classes."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), folder / "weights.pt")
    torch.save(torch.randn(20, WIDTH), folder / "texts.pt")
    return folder


@pytest.fixture
def run(devkit: Path, files: Path, tmp_path: Path) -> Run:
    def command(
        *words: str,
        model: str = "timm:test_vit",
        weights: Path | None = files / "weights.pt",
        texts: Path | None = files / "texts.pt",
    ) -> list[dict[str, Any]]:
        given = [["--pretrained", str(weights)] if weights else [], ["--class-texts", str(texts)] if texts else []]
        where = typed(data_root=devkit, cache=tmp_path / "cache", output=tmp_path / "out", device="cpu", known=0.5)
        size = typed(preset="embedded", model=model, image_size=SIDE, epochs=1)
        experiment.main([*where, *size, *given[0], *given[1], *words])
        return read_json(tmp_path / "out" / "results.json")

    return command


def by_hand(devkit: Path, files: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Features of the test images, by the calls of a user of the library, and the labels."""
    model = timm.create_model("test_vit", checkpoint_path=str(files / "weights.pt"))
    backbone = TimmBackbone(model, image_size=SIDE)
    images = VOC(devkit, 2007, "test").with_transform(eval_transform(SIDE, mean=backbone.image_mean, std=backbone.image_std))
    features = backbone(torch.stack([images[row][0] for row in range(len(images))]))
    tokens = F.avg_pool2d(features.tokens.mT.unflatten(2, features.grid), 2).flatten(2).mT  # the preset's token_pool
    assert features.penultimate is not None
    return {"tokens": tokens, "pooled": features.pooled, "penultimate": features.penultimate}, images.targets


def test_a_timm_model_runs_where_open_clip_does(
    run: Run, devkit: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["zero-shot-global", "linear", "dual-coop", "trm", "text-pixel+vlpl", "trm-region+scpnet"]
    rows = {row["method"]: row for row in run("--unseen", "2", "--methods", *methods)}
    assert set(rows) == set(methods) and "test_vit at 96 x 96" in capsys.readouterr().out

    features, targets = by_hand(devkit, files)
    (cached,) = (path for path in (tmp_path / "cache" / "features").iterdir() if not (path / "tokens1.npy").exists())
    for name, values in features.items():
        np.testing.assert_allclose(np.load(cached / f"{name}0.npy"), values.half().numpy(), rtol=2e-3, atol=2e-3)
    text = torch.load(files / "texts.pt")
    cosines = F.normalize(features["pooled"].half().float(), dim=1) @ F.normalize(text, dim=1).T
    assert rows["zero-shot-global"]["mAP"] == pytest.approx(evaluate(cosines, targets)["mAP"], abs=0.5)
    head = TRMHead.load(tmp_path / "out" / "trm-known0.5-seed1.pt")
    found = evaluate(torch.logit(head.predict(*(features[name].half().float() for name in ("tokens", "penultimate")))), targets)
    assert rows["trm"]["mAP"] == pytest.approx(found["mAP"], abs=0.5)
    assert list((tmp_path / "out" / "unseen").iterdir()), "the texts of the last classes are given too"


def test_other_texts_are_another_run_on_the_same_features(
    run: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--methods", "zero-shot-global")
    np.save(tmp_path / "texts.npy", torch.load(files / "texts.pt").flip(0).double().numpy())
    capsys.readouterr()
    with pytest.raises(SystemExit, match="--resume: .* holds a run with other settings: weights was"):
        run("--methods", "zero-shot-global", "--resume", texts=tmp_path / "texts.npy")
    assert "encoding" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["safetensors", "another classifier", "none"])
def test_weights_may_lack_the_classifier(kind: str, files: Path, tmp_path: Path) -> None:
    weights = torch.load(files / "weights.pt")
    if kind == "another classifier":
        weights |= {"head.weight": torch.zeros(7, WIDTH), "head.bias": torch.zeros(7)}
    elif kind == "none":
        del weights["head.weight"], weights["head.bias"]
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    save_file(weights, path) if kind == "safetensors" else torch.save({"state_dict": weights}, path)
    images = torch.rand(2, 3, SIDE, SIDE)
    model = TimmBackbone(timm.create_model("test_vit", checkpoint_path=str(files / "weights.pt")))
    opened = towers.open_tower("timm:test_vit", str(path), SIDE, CPU)
    for found, wanted in zip(opened(images), model(images), strict=True):
        assert found == wanted if isinstance(found, tuple) else torch.equal(found, wanted)


def test_without_a_file_the_weights_are_those_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    create = timm.create_model

    def made(name: str, **options: Any) -> Any:
        asked.append(options)
        return create(name, **{**options, "pretrained": False})

    monkeypatch.setattr(timm, "create_model", made)
    tower = towers.open_tower("timm:test_vit.r160_in1k", None, None, CPU)
    assert asked == [{"pretrained": True, "num_classes": 0}] and (tower.name, tower.dim) == ("test_vit.r160_in1k", WIDTH)
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match="timm:test_vit are not here and could not be fetched .*--pretrained WEIGHTS"):
        towers.open_tower("timm:test_vit", None, None, CPU)


@pytest.mark.parametrize(
    ("changes", "typed", "message"),
    [
        ({"texts": None}, [], r"timm:test_vit has no text tower: --class-texts must be .* of shape \(20, 64\), got none"),
        (
            {"model": "embedded", "weights": None},
            [],
            "--class-texts is for a model without a text tower, and --model embedded has",
        ),
        ({"model": "timm:tset_vit"}, [], "must be a model of timm, got 'tset_vit'; near it: test_vit"),
        (
            {"model": "timm:test_vit2"},
            [],
            r"weights of timm:test_vit2, and \d+ of \d+ entries do not fit: .*; name the model that",
        ),
        ({"weights": Path("gone.pt")}, [], "--pretrained must be a weights file of timm:test_vit, got 'gone.pt'"),
        (
            {"weights": "texts.pt"},
            [],
            r"texts.pt must be a safetensors file or a torch checkpoint of timm:test_vit, and cannot be",
        ),
        ({}, ["--set", "prompts=shared"], "prompts=shared needs a text tower, and given texts of timm:test_vit have none; give"),
        (
            {},
            ["--set", "value_path=true"],
            "value_path is for ViTs of open_clip, and --model timm:test_vit is none; leave it out",
        ),
        ({}, ["--image-size", "100"], "image size must be a multiple of the stride 16"),
        ({"texts": Path("gone.npy")}, [], "--class-texts: gone.npy not found"),
        ({"texts": "weights.pt"}, [], r"must hold one tensor of floats \(C, D\) = \(20, 64\), got a (Ordered)?[dD]ict"),
        (
            {"texts": torch.ones(19, WIDTH)},
            [],
            r"must have shape \(C, D\) = \(20, 64\), got \(19, 64\); give a row for each class in this order: aeroplane, bicycle",
        ),
        (
            {"texts": torch.ones(20, 32)},
            [],
            r"must have shape \(C, D\) = \(20, 64\), got \(20, 32\); --model timm:test_vit gives tokens of width 64: take texts",
        ),
        ({"texts": torch.ones(20, WIDTH, 1)}, [], r"must hold one tensor of floats .*, got torch.float32 \(20, 64, 1\)"),
        ({"texts": torch.ones(20, WIDTH, dtype=torch.int64)}, [], "must hold one tensor of floats .*, got torch.int64"),
        ({"texts": torch.eye(20, WIDTH) - torch.eye(20, WIDTH)}, [], "must have finite rows that are not 0, .* 'aeroplane'"),
        ({"texts": torch.eye(20, WIDTH) / 0.0}, [], "must have finite rows"),
        ({"texts": b"no tensor"}, [], "must be a .npy or .pt file of class texts .* and cannot be read as one"),
    ],
)
def test_what_does_not_fit_is_one_line(
    changes: dict[str, Any], typed: list[str], message: str, run: Callable[..., Any], files: Path, tmp_path: Path
) -> None:
    for key, value in changes.items():
        if isinstance(value, Tensor):
            torch.save(value, tmp_path / "given.pt")
        elif isinstance(value, bytes):
            (tmp_path / "given.pt").write_bytes(value)
        if isinstance(value, Tensor | bytes):
            changes = {**changes, key: tmp_path / "given.pt"}
        elif key != "model" and isinstance(value, str):
            changes = {**changes, key: files / value}
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run("--methods", "linear", *typed, **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists(), "nothing was encoded"


class Patches:
    """A tower of a user's own: no Module, and of nothing but what the protocol asks for. Tokens are means of patches."""

    name, dim, image_mean, image_std = "patches", 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, name: str, pretrained: str | None, image_size: towers.Size, device: torch.device) -> None:
        assert (name, pretrained, image_size, device) == ("means", None, SIDE, CPU)
        self.image_size = (SIDE, SIDE)

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        return (SIDE // 16, SIDE // 16)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def __call__(self, images: Tensor) -> ImageFeatures:
        tokens = F.avg_pool2d(images, 16).flatten(2).mT
        return ImageFeatures(tokens, tokens.mean(dim=1), self.grid(SIDE))


def test_a_further_family_is_a_function_and_a_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(towers.TOWERS, "patches", Patches)
    np.save(tmp_path / "colours.npy", np.random.default_rng(0).normal(size=(20, 3)))
    changes = {"model": "patches:means", "weights": None, "texts": tmp_path / "colours.npy"}
    rows = run("--methods", "zero-shot-tokens", "trm", "--set", "pooler.num_heads=1", **changes)
    assert {row["method"] for row in rows} == {"zero-shot-tokens", "trm"} and all(0 < row["mAP"] <= 100 for row in rows)

    monkeypatch.setattr(Patches, "logit_scale", 20.0, raising=False)
    monkeypatch.setattr(Patches, "template_text", lambda self, names, templates: torch.eye(20, 3) + 1, raising=False)
    tower = towers.open_tower("patches:means", None, SIDE, CPU)
    assert backbones.with_texts(tower, "patches:means", None, ["cat"], CPU) is tower, "its own text side is enough"


def test_given_texts_are_a_backbone_without_a_text_tower(files: Path) -> None:
    tower = towers.open_tower("timm:test_vit", str(files / "weights.pt"), SIDE, CPU)
    backbone = backbones.with_texts(tower, "timm:test_vit", files / "texts.pt", [f"class {c}" for c in range(20)], CPU)
    images = torch.rand(1, 3, SIDE, SIDE)
    assert torch.equal(backbone(images).tokens, tower(images).tokens) and backbone.grid(SIDE) == (6, 6)
    with pytest.raises(ValueError, match="texts are given of 20 classes, got 1 names"):
        backbone.template_text(["cat"], ["a photo of a {}."])
    with pytest.raises(ValueError, match="has no text tower that prompts could pass through"):
        backbone.embed_prompts(["cat."])
    with pytest.raises(TypeError, match="prompts must be texts"):
        backbone.encode_prompts([])


def test_a_folder_of_images_with_a_timm_model(
    files: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "texts.npy", np.random.default_rng(0).normal(size=(3, WIDTH)))
    model = ["--model", "timm:test_vit", "--pretrained", str(files / "weights.pt"), "--image-size", str(SIDE)]
    texts = ["--class-texts", str(tmp_path / "texts.npy")]
    rest = ["--epochs", "1", "--device", "cpu", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    train = ["train", str(photos / "images"), str(photos / "labels.csv"), *model, *rest]
    with pytest.raises(SystemExit, match="--names and --template are words for a text tower, and --model timm:test_vit has none"):
        cli.main([*train, *texts, "--template", "a {}."])
    cli.main([*train, *texts])
    assert "read in the order dog, car, cow" in capsys.readouterr().out
    saved = read_json(tmp_path / "run" / "model.json")
    assert (saved["model"], saved["templates"], saved["image_size"]) == ("timm:test_vit", [], [SIDE, SIDE])

    predict = ["predict", str(tmp_path / "run"), str(photos / "images"), *typed(output=tmp_path / "scores.csv", device="cpu")]
    cli.main(predict)  # without the texts, which the head has

    found, wanted = (
        {row["image"]: float(row["dog"]) for row in read_csv(folder / "scores.csv")} for folder in (tmp_path, tmp_path / "run")
    )
    assert found == pytest.approx(wanted, abs=2e-4)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="features of timm:test_vit with other weights"):
        cli.main([*predict, "--pretrained", str(tmp_path / "other.pt")])
