"""Models of transformers in the pipeline: trained on a folder of drawn images, opened again, and compared on the drawn VOC."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.hf_towers import WORDS, config, tiny_hf, tokenizer, transformers
from tests.helpers.own_folder import read_csv
from tests.helpers.runs import read_json, typed
from tests.helpers.towers import stir
from trm_losses.backbones import HFBackbone
from trm_pipeline import command
from trm_pipeline.embedded import CLASS_NAMES
from trm_pipeline.features import towers
from trm_pipeline.features.encoding import weights_digest
from trm_pipeline.run import experiment

CPU = torch.device("cpu")
PROCESSOR = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "image_processor_type": "CLIPImageProcessor"}'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP that reads the words of VOC, and a DINOv2 with texts of three classes."""
    root = tmp_path_factory.mktemp("hf")
    made = config("clip")
    made.text_config.max_position_embeddings = 32
    torch.manual_seed(0)
    stir(transformers.CLIPModel(made)).save_pretrained(root / "clip")
    words = [*WORDS, *(word for name in CLASS_NAMES for word in name.split() if word not in WORDS)]
    tokenizer(99, words=words, length=32).save_pretrained(root / "clip")
    (root / "clip" / "preprocessor_config.json").write_text(PROCESSOR, encoding="utf-8")
    tiny_hf("dinov2").save_pretrained(root / "dino")
    np.save(root / "texts.npy", np.random.default_rng(0).normal(size=(3, 32)))
    return root


def scores(path: Path) -> dict[str, float]:
    return {row["image"]: float(row["dog"]) for row in read_csv(path)}


def train(photos: Path, out: Path, *words: str) -> None:
    rest = typed(epochs=1, device="cpu", cache=out / "cache", output=out / "run", workers=0)
    command.main(["train", str(photos / "images"), str(photos / "labels.csv"), *rest, *words])


def test_train_and_predict(
    folders: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of the classes are read; the model is found again from another folder, and told from one with other weights."""
    place = tmp_path / "models" / "clip"
    shutil.copytree(folders / "clip", place)
    monkeypatch.chdir(place.parent)
    train(photos, tmp_path, "--model", "hf:clip", "--template", "a photo of a {}.")
    said = capsys.readouterr().out
    assert "model hf:clip" in said and "fetched" not in said
    about = read_json(tmp_path / "run" / "model.json")
    assert (about["model"], about["pretrained"], about["image_size"]) == (f"hf:{place}", None, [32, 32])
    tower = towers.open_tower(f"hf:{place}", None, None, CPU)
    assert isinstance(tower, HFBackbone) and tower.image_std == (0.25, 0.25, 0.25)
    assert about["weights"] == weights_digest(tower)
    monkeypatch.chdir(tmp_path)

    images = photos / "images"
    predict = ["predict", str(tmp_path / "run"), str(images), *typed(output=tmp_path / "s.csv", device="cpu", workers=0)]
    command.main(predict)
    assert scores(tmp_path / "s.csv") == pytest.approx(scores(tmp_path / "run" / "scores.csv"), abs=2e-4)

    moved = place.rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match=rf"error: load_hf: {place} must be a folder, or the id of a model on the hub"):
        command.main(predict)
    command.main([*predict, "--pretrained", "elsewhere"])
    assert scores(tmp_path / "s.csv") == pytest.approx(scores(tmp_path / "run" / "scores.csv"), abs=2e-4)
    torch.manual_seed(1)
    transformers.CLIPModel(config("clip")).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="error: the head was trained on features of hf:.* with other weights than those of"):
        command.main([*predict, "--pretrained", str(tmp_path / "other")])
    settings = moved / "config.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace("quick_gelu", "gelu"), encoding="utf-8")
    with pytest.raises(SystemExit, match="with other weights"):  # the same ones, with another activation
        command.main([*predict, "--pretrained", str(moved)])


def test_images_alone_with_texts_that_are_given(folders: Path, photos: Path, tmp_path: Path) -> None:
    model = ["--model", f"hf:{folders / 'dino'}"]
    train(photos, tmp_path, *model, "--class-texts", str(folders / "texts.npy"))
    assert read_json(tmp_path / "run" / "model.json")["templates"] == []


def compare(devkit: Path, out: Path, model: str, *words: str) -> list[dict[str, Any]]:
    where = typed(data_root=devkit, cache=out / "cache", output=out / "out", device="cpu", known=0.5)
    experiment.main([*where, *typed(preset="embedded", model=model, image_size=64, epochs=1), *words])
    return read_json(out / "out" / "results.json")  # type: ignore[no-any-return]


@pytest.mark.parametrize("prompts", ["residual", "shared"])
def test_reproduce_with_a_text_tower(prompts: str, devkit: Path, folders: Path, tmp_path: Path) -> None:
    rows = compare(
        devkit, tmp_path, f"hf:{folders / 'clip'}", "--set", f"prompts={prompts}", "--methods", "zero-shot-global", "trm"
    )
    assert {row["method"] for row in rows} == {"zero-shot-global", "trm"} and all(0 < row["mAP"] <= 100 for row in rows)


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("hf:", [], "--model hf:FOLDER must name a folder of a model or its id on the hub, got nothing behind hf:"),
        ("hf:{}/gone", [], "load_hf: .*gone must be a folder, or the id of a model on the hub that can be fetched"),
        ("hf:{}", [], "load_hf: .* must hold the config.json of a model"),
        (
            "hf:{}/clip",
            ["--pretrained", "x.pt"],
            "--pretrained must be the folder where hf:.*clip lies now, got 'x.pt'; leave it",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    model: str, words: list[str], message: str, devkit: Path, folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        compare(devkit, tmp_path, model.format(folders), "--methods", "linear", *words)
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists(), "nothing was encoded"
