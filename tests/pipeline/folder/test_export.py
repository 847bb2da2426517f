"""A model as one ONNX file: the lines of the page run it without torch, and its scores are those of predict."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import ROOT
from tests.helpers.tower_table import COLUMNS, TABLE, TOWERS, skip_if_torch_cannot_trace
from trm_losses import RegionPooler, TextRegionMatchingLoss, TRMHead
from trm_losses.backbones import ImageFeatures
from trm_pipeline import Tagger
from trm_pipeline import command as cli
from trm_pipeline.folder import onnx_file
from trm_pipeline.folder.model import SavedModel
from trm_pipeline.folder.onnx_file import export_onnx
from trm_pipeline.folder.resize import pillow_is_tall_first, resized

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

LINES = re.search(r"```py\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8"), flags=re.DOTALL)[1]  # type: ignore


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    cli.main(["export", str(trained[0]), "--output", str(path)])
    return path


@pytest.fixture(scope="module")
def varied(images, tmp_path_factory):
    """60 files of sizes from 20 to 1,500 pixels: gray, transparent, with few colors, turned, black and white, and others."""
    folder, draw = tmp_path_factory.mktemp("varied"), np.random.default_rng(0)
    names = [name for name in images[1] if name not in ("cut.jpg", "empty.png")]
    for i in range(60):
        width, height = np.exp(draw.uniform(3, 7.3, 2)).astype(int).tolist()
        with Image.open(images[0] / names[i % len(names)]) as scene:
            image = scene.convert("RGB").resize((width, height))
        options: dict[str, Any] = {}
        suffix = ("png", "png", "jpg", "gif", "jpg", "jpg", "png", "webp", "tif", "png")[i % 10]
        if i % 10 == 1:
            image.putalpha(Image.fromarray(draw.integers(0, 256, (height, width), dtype=np.uint8)))
        elif i % 10 == 4:
            options["exif"] = Image.Exif()
            options["exif"][274] = 1 + (i // 10 + 2) % 8
        elif i % 10 == 3:
            options["transparency"] = 7
        mode = {0: "L", 3: "P", 5: "CMYK", 6: "LA", 8: "1", 9: "P"}.get(i % 10)
        (image.convert(mode) if mode else image).save(folder / f"{i}.{suffix}", **options)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("tall", [True, False])
def test_images_are_resized_as_pillow_does(tall):
    draw, first = np.random.default_rng(0), pillow_is_tall_first()
    for _ in range(60):
        height, width, h, w = np.exp(draw.uniform(0, 5, 4)).astype(int).tolist()
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BICUBIC))
        found = resized(torch.from_numpy(pixels), (h, w), tall_first=tall).permute(1, 2, 0).numpy()
        if tall == first or height - h <= 2 * max(0, width - w):
            assert np.array_equal(found, wanted)
        else:
            assert np.abs(found - wanted).max() <= 40  # the order of the passes, on noise


def test_the_lines_of_the_page_need_no_torch(exported, trained, varied, tmp_path):
    assert len([line for line in LINES.splitlines() if line.strip()]) <= 15
    stub = tmp_path / "stub" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('torch must not be needed')", encoding="utf-8")
    command = [sys.executable, "-c", LINES, *map(str, varied)]
    environment = {**os.environ, "PYTHONPATH": str(stub.parent)}
    done = subprocess.run(command, cwd=exported.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        path, *scores = line.split("\t")
        found[path] = [float(score.partition("=")[2]) for score in scores]
        assert [score.partition("=")[0] for score in scores] == Tagger.load(trained[0]).class_names
    assert len(found) == 60
    for places, wanted in Tagger.load(trained[0]).stream(varied):
        for place, scores in zip(places.tolist(), wanted.tolist(), strict=True):
            assert found[str(varied[place])] == pytest.approx(scores, abs=1e-4), varied[place].name


def test_what_stands_in_the_file(exported, trained):
    session = onnxruntime.InferenceSession(str(exported))
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    saved = Tagger.load(trained[0]).saved
    assert about["class_names"] == list(saved.classes) and about["thresholds"] == pytest.approx(saved.thresholds.tolist())
    assert about["model"]["name"] == "embedded" and about["model"]["image_size"] == list(saved.image_size)
    model = onnx.load(exported)
    assert about["opset"] == model.opset_import[0].version
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    assert given.name == "image" and given.type == "tensor(uint8)" and out.name == "probabilities"
    assert given.shape[2] == 3 and not any(isinstance(size, int) for size in given.shape[:2])
    weights = sum(np.prod(tensor.dims) for tensor in model.graph.initializer)
    assert weights < 3e6 and exported.stat().st_size < 12e6  # no text tower, no word embeddings


def test_further_classes_go_along(trained, tmp_path, capsys):
    path = tmp_path / "wider.onnx"
    cli.main(["export", str(trained[0]), "--output", str(path), "--add", "cat"])
    said = capsys.readouterr().out
    assert re.search(r"wider.onnx: \d+\.\d MB, opset \d+", said) and "differ from PyTorch by" in said
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    (scores,) = onnxruntime.InferenceSession(str(path)).run(None, {"image": image})
    wanted = {tag.name: tag.probability for tag in Tagger.load(trained[0]).with_classes(["cat"])(Image.fromarray(image))}
    assert scores.tolist() == pytest.approx(list(map(wanted.get, [*Tagger.load(trained[0]).class_names, "cat"])), abs=1e-4)


def head(dim: int) -> tuple[SavedModel, TRMHead]:
    torch.manual_seed(0)
    names = ["cat", "dog", "car"]
    made = TRMHead(RegionPooler(3, dim, num_heads=2), TextRegionMatchingLoss(3), torch.randn(3, dim), names).eval()
    about = {name: {"words": name, "threshold": 0.5, "threshold_from": "default"} for name in names}
    return SavedModel("tiny", None, "", (32, 32), 1, (), about, {}), made


EXPORTED = ("open_clip: CLIP ViTs", "timm: ViTs", "Hugging Face: `Siglip2Model`")  # the others every night


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in EXPORTED else pytest.mark.nightly) for name in TOWERS])
def test_towers(name, tmp_path):
    """Not at their own size, so that tables of positions are resized, and not square."""
    skip_if_torch_cannot_trace(name)
    tower = TOWERS[name]()
    height, width = tower.image_size
    tower.image_size = (height + tower.stride, width + 2 * tower.stride)
    written = export_onnx(*head(tower.dim), tower, tmp_path / "model.onnx")
    assert written.difference < 2e-5 and written.size == (tmp_path / "model.onnx").stat().st_size
    assert TABLE[name][COLUMNS.index("exported")] == "yes"


class Tower(torch.nn.Module):
    """Tokens (B, 4, 6) by an operation that is given."""

    name, dim, image_size, image_mean, image_std = "tower", 6, (2, 2), (0.5,) * 3, (0.5,) * 3

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, images):
        tokens = self.call(images.flatten(2).transpose(1, 2)).repeat(1, 1, 2)
        return ImageFeatures(tokens, tokens.mean(dim=1), (2, 2))


def test_what_cannot_be_exported_is_one_line(tmp_path):
    path = tmp_path / "model.onnx"
    for call, said in (
        (
            lambda x: torch.linalg.pinv(x).transpose(1, 2),
            r"^tiny cannot be exported: ONNX has nothing for its operation aten\.\w+$",
        ),
        (lambda x: x if x.sum() > 0 else -x, r"^tiny cannot be exported: \w+: .{1,200}$"),
    ):
        with pytest.raises(ValueError) as caught:
            export_onnx(*head(6), Tower(call), path)
        assert re.search(said, str(caught.value)), str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    original = onnx_file._rounded
    monkeypatch.setattr(onnx_file, "_rounded", lambda x: original(x) + (0 if torch.compiler.is_compiling() else torch.arange(6)))
    with pytest.raises(ValueError, match="must give the probabilities of PyTorch, got a difference of"):
        export_onnx(*head(6), Tower(torch.exp), tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


def test_a_file_that_nothing_can_run_here_is_not_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export_onnx(*head(6), Tower(torch.exp), tmp_path / "model.onnx").difference is None


def test_errors_at_the_door(trained, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--output must be a .onnx file, got model.pt"):
        cli.main(["export", str(tmp_path / "not read yet"), "--output", "model.pt"])
    monkeypatch.setattr(onnx_file, "LARGEST", 10)
    with pytest.raises(ValueError, match="must be below 2 GiB, got 0.0 GiB of weights of tiny; export a model with a smaller"):
        export_onnx(*head(6), Tower(torch.exp), tmp_path / "model.onnx")
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SystemExit, match=rf"export needs the package {name}: pip install 'trm-losses\[export\]'"):
            cli.main(["export", str(trained[0]), "--output", str(tmp_path / "model.onnx")])
        monkeypatch.undo()
    assert not any(tmp_path.iterdir())
