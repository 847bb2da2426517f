"""Backbones out of files, tags and names, and what is said where one of them, or a package, is not there."""

from __future__ import annotations

import copy
import importlib.abc
import io
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

import trm_losses.backbones
from tests.helpers import ROOT
from tests.helpers.towers import RESNET, TEXT, VIT, assert_near, images, stir, tiny
from tests.losses.backbones.conftest import FAMILIES
from trm_losses.backbones import OpenClipBackbone, TimmBackbone, load_open_clip


@pytest.mark.parametrize("name", FAMILIES)
def test_files_of_every_family(tiny_names: Path, name: str) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(0)
    model = stir(open_clip.create_model(name))
    state = model.state_dict()
    torch.save(state, tiny_names / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tiny_names / "trained.pt")
    save_file(state, tiny_names / "weights.safetensors")
    x = images(64, 64)
    ids = torch.arange(24).reshape(2, 12) % 100
    with torch.no_grad():
        wanted = model.encode_text(ids)
    for file in ("plain.pt", "trained.pt", "weights.safetensors"):
        torch.manual_seed(1)
        backbone = load_open_clip(name, tiny_names / file)
        loaded = backbone.model.state_dict()
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
        assert_near(backbone.encode_text(ids), wanted)
        assert_near(backbone.encode_prompts(backbone.embed_prompts(ids)), wanted)
        assert (backbone.logit_bias is not None) == (name == "tiny-sig")
        assert backbone(x).tokens.shape[0] == 1 and backbone.name == name and backbone.context_length == 12
    assert load_open_clip(name, str(tiny_names / "plain.pt"), image_size=96).image_size == (96, 96)


def test_a_tokenizer_that_does_not_load_is_named_where_it_is_needed(tiny_names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tokenizer must be given for a vocabulary of 100"):
        load_open_clip("tiny-sig").tokenize(["a cat"])  # not CLIP's ids, which this table does not have

    def offline(name: str) -> None:
        raise OSError(f"cannot reach the tokenizer of {name}")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    backbone = copy.deepcopy(load_open_clip("tiny-sig"))
    assert backbone.encode_text(torch.full((2, 12), 1)).shape == (2, 32)
    with pytest.raises(ValueError, match=r"the tokenizer of tiny-sig did not load \(OSError: cannot .*\); give texts as ids"):
        backbone.embed_prompts(["a cat"])


@pytest.mark.filterwarnings("ignore")  # TorchScript announces its end; the files that are out there remain
def test_load_torchscript_archive(tiny_names: Path) -> None:
    model = tiny(VIT).half().eval()
    path = tiny_names / "archive.pt"
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, path)
    with pytest.raises(ValueError, match="with both towers, got RecursiveScriptModule; .* built without jit"):
        OpenClipBackbone(scripted)
    backbone = load_open_clip("tiny-vit", path)
    assert all(torch.equal(v, model.state_dict()[k].float()) for k, v in backbone.model.state_dict().items())
    with pytest.raises(ValueError, match=r"archive\.pt are not those of tiny-resnet: .*missing"):
        load_open_clip("tiny-resnet", path)


def test_load_with_the_value_path(tiny_names: Path) -> None:
    torch.save(tiny(VIT).state_dict(), tiny_names / "value.pt")
    got = load_open_clip("tiny-vit", tiny_names / "value.pt", value_path=True)(images(32, 32))
    assert_near(got.tokens, OpenClipBackbone(tiny(VIT), value_path=True)(images(32, 32)).tokens)


def test_load_folder(tiny_names: Path) -> None:
    folder = tiny_names / "folder"
    folder.mkdir()
    model = tiny(VIT)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="pretrained must be None, got 'openai'; 'local-dir:.*' brings its own weights"):
        load_open_clip(f"local-dir:{folder}", "openai")
    backbone = load_open_clip(f"local-dir:{folder}")
    assert torch.equal(backbone.model.visual.proj, model.state_dict()["visual.proj"])
    assert backbone.image_mean == (0.1, 0.2, 0.3) and backbone.tokenize(["a"]).shape == (1, 12)


@pytest.mark.parametrize("quick", [False, True])
def test_a_tag_brings_its_activation(tiny_names: Path, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    torch.save(tiny(VIT).state_dict(), tiny_names / "tag.pt")
    tag = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "quick_gelu": quick}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", {"tag": tag})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tiny_names / "tag.pt"))
    backbone = load_open_clip("tiny-vit", "tag")
    for tower in (backbone.model.transformer, backbone.model.visual.transformer):
        assert isinstance(tower.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU if quick else nn.GELU)
    assert backbone.image_mean == (0.5,) * 3 and backbone.image_std == (0.25,) * 3


def test_a_file_takes_the_statistics_that_all_tags_have(tiny_names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tiny(VIT).state_dict(), tiny_names / "statistics.pt")
    half, third = {"mean": (0.5,) * 3, "std": (0.25,) * 3}, {"mean": (0.3,) * 3, "std": (0.25,) * 3}
    for tags, mean, std in (
        ({"a": half, "b": half}, (0.5,) * 3, (0.25,) * 3),
        ({"a": half, "b": third}, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
    ):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", tags)
        backbone = load_open_clip("tiny-vit", tiny_names / "statistics.pt")
        assert (backbone.image_mean, backbone.image_std) == (mean, std)
    told = load_open_clip("tiny-vit", tiny_names / "statistics.pt", image_mean=[0, 0, 0], image_std=[1, 1, 1])
    assert (told.image_mean, told.image_std) == ((0, 0, 0), (1, 1, 1))


def test_a_file_of_another_model_is_refused(tiny_names: Path) -> None:
    other = tiny_names / "other.pt"
    torch.save(tiny({**VIT, "width": 48}).state_dict(), other)
    with pytest.raises(ValueError) as caught:
        load_open_clip("tiny-vit", other)
    message = str(caught.value)
    assert str(other) in message and "not those of tiny-vit" in message
    assert "first visual.class_embedding: (48,) in the file, (32,) in the model" in message

    torch.save(tiny(RESNET).state_dict(), other)
    with pytest.raises(ValueError, match=r"not those of tiny-vit: .* missing \(first visual\.\w+.*unknown \(first visual\."):
        load_open_clip("tiny-vit", other)

    torch.save(tiny(VIT, text={"width": 64}).state_dict(), other)
    with pytest.raises(ValueError, match=r"positional_embedding: \(12, 64\) in the file, \(12, 32\) in the model"):
        load_open_clip("tiny-vit", other)


def test_what_is_no_weights_file_is_refused(tiny_names: Path) -> None:
    for name, content in (("a.txt", b"hello"), ("b.safetensors", b"hello"), ("c.pt", b"")):
        (tiny_names / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"load_open_clip: .*{name} cannot be read as weights .* of tiny-vit"):
            load_open_clip("tiny-vit", str(tiny_names / name))
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    (tiny_names / "d.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"d\.pt cannot be read as weights"):
        load_open_clip("tiny-vit", str(tiny_names / "d.pt"))


def test_names_that_are_not_there(tiny_names: Path) -> None:
    with pytest.raises(ValueError, match=r"model must be one of open_clip's, got 'RN5O'; near it: .*RN50"):
        load_open_clip("RN5O")
    with pytest.raises(ValueError, match=r"got '~'; near it: open_clip.list_models\(\) names all"):
        load_open_clip("~")
    with pytest.raises(ValueError, match=r"existing weights file or a tag of ViT-B-32 \(openai, .*got 'nowhere.pt'"):
        load_open_clip("ViT-B/32", "nowhere.pt")
    with pytest.raises(ValueError, match=r"tag of tiny-vit \(none\), got ''"):
        load_open_clip("tiny-vit", "")


# Imports


class BrokenTorchvision(importlib.abc.MetaPathFinder):
    """open_clip and timm as they are beside a torchvision that was built for another torch."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname in ("open_clip", "timm"):
            raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_import_error_says_why_and_what_to_install(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    model = tiny(VIT)
    for name in ("open_clip", "timm"):
        if broken:
            monkeypatch.delitem(sys.modules, name)
        else:
            monkeypatch.setitem(sys.modules, name, None)
    if broken:
        monkeypatch.setattr(sys, "meta_path", [BrokenTorchvision(), *sys.meta_path])
    for call, name in (
        (lambda: load_open_clip("RN50"), "open_clip"),
        (lambda: OpenClipBackbone(model), "open_clip"),
        (lambda: TimmBackbone("test_vit"), "timm"),
    ):
        with pytest.raises(ImportError, match=f"trm_losses.backbones needs {name}, whose import failed") as caught:
            call()
        message = str(caught.value)
        assert 'pip install "trm-losses[backbones]"' in message
        assert f"torchvision that matches the installed torch {torch.__version__}" in message
        assert ("RuntimeError: operator torchvision::nms does not exist" in message) == broken
        assert ("ModuleNotFoundError" in message) != broken


def test_the_package_imports_without_open_clip() -> None:
    code = (
        "import sys\n"
        "for name in ('open_clip', 'timm', 'torchvision', 'transformers'): sys.modules[name] = None\n"
        "import trm_losses.backbones as b\n"
        "print(*b.__all__)"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == sorted(trm_losses.backbones.__all__)
