"""Each data set from its layout to a table: the scripts, with a dozen images and the model that ships with the project."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers import ROOT
from tests.helpers.layouts import draw_labels, nus_names, write_nus_cole, write_tiny
from tests.helpers.runs import Run, read_json
from trm_losses import TRMHead
from trm_losses.labels import hide_labels, keep_single_positive
from trm_pipeline.command import SOURCES
from trm_pipeline.config import presets
from trm_pipeline.data.base import Source
from trm_pipeline.data.voc import VOC, VOC_CLASSES, class_prompt_names
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.drawn.scenes import COLOURS
from trm_pipeline.run import arguments, experiment, prepare, prepared
from trm_pipeline.run.unseen import seen_part

DATA = [key for key in SOURCES if key not in ("voc", "features")]  # which have runs of their own


def source(key: str) -> Source:
    module: ModuleType = importlib.import_module(f"trm_pipeline.data.{key}")
    made: Source = module.SOURCE
    return made


@pytest.fixture
def roots(tmp_path: Path) -> Callable[[str], Path]:
    """A dozen images in the layout of a data set."""
    return lambda key: write_tiny(key, tmp_path / key)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A script with the small model, whose words stand in for the names of the classes."""

    def command(key: str, *arguments: str) -> list[dict[str, object]]:
        where = source(key)
        words = [f"{colour} {name}" for name in class_prompt_names() for colour in ("", *COLOURS)]
        words += [f"{first} and {second}" for first in class_prompt_names() for second in class_prompt_names()]
        names, preset = tmp_path / "names.txt", presets.PRESETS[where.preset]
        names.write_text("\n".join(word.strip() for word in words[: where.num_classes]), encoding="utf-8")
        splits = [f"{part}_split={getattr(preset, f'{part}_split')}" for part in ("train", "val", "test")]
        args = ["--preset", "embedded", "--class-names", str(names), "--epochs", "1", "--device", "cpu"]
        args += [] if "--methods" in arguments else ["--methods", "linear"]
        args += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out"), "--workers", "0"]
        experiment.main([*args, *arguments, "--set", *splits, "mirror=false"], where)
        return read_json(tmp_path / "out" / "results.json")

    return command


@pytest.mark.parametrize("key", DATA)
def test_a_dozen_images_become_a_row(
    key: str, run: Run, roots: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = run(key, "--data-root", str(roots(key)), "--known", "0.5", "--methods", "trm")
    assert row["method"] == "trm" and 0 < float(str(row["mAP"])) <= 100
    out = capsys.readouterr().out
    preset = presets.PRESETS[source(key).preset]
    assert f"{preset.train_split}: 12 images, {source(key).num_classes} classes, " in out and "images without any" in out
    assert f"averaged weights; {source(key).title}" in out
    names = (tmp_path / "names.txt").read_text(encoding="utf-8").split("\n")
    assert list(TRMHead.load(tmp_path / "out" / "trm-known0.5-seed1.pt").class_names) == names
    command = f"trm-losses reproduce {key} --preset embedded"
    assert any(command in page.read_text(encoding="utf-8") for page in (tmp_path / "out").glob("*.html"))


def test_settings_are_chosen_on_held_out_images(
    run: Run, roots: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = roots("nus")
    (root / "ImageList" / "TestImagelist.txt").unlink()  # which --tune never opens
    run("nus", "--data-root", str(root), "--known", "0.5", "--tune")
    out = capsys.readouterr().out
    assert "10 training images (fit), 2 test images (held-out)" in out and "on the held-out images" in out


def test_the_split_is_named_over_the_table(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_nus_cole(tmp_path / "nus", {"train": draw_labels(12, 81, 0.3), "test": draw_labels(12, 81, 0.3, seed=1)})
    run("nus", "--data-root", str(root), "--known", "0.5", "--split", "cole", "--drop-empty")
    assert "averaged weights; NUS-WIDE, cole split without empty images, embedded model" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["mask", "list"])
def test_published_labels_are_trained_on(
    kind: str,
    run: Run,
    roots: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []
    original = prepared.train
    monkeypatch.setattr(prepared, "train", lambda *a, **k: seen.append((a[2], k["single"])) or original(*a, **k))
    root = roots("nus")
    full = torch.from_numpy(draw_labels(12, 81, 0.3)).float()
    single = kind == "list"
    wanted = keep_single_positive(full) if single else hide_labels(full, 0.25)
    if single:
        names = [name.split("\\")[1] for name in nus_names("train", 12)]
        present = [" ".join(map(str, (row == 1).nonzero().flatten().tolist())) for row in wanted]
        lines = [f"{name},{classes}" for name, classes in zip(names, present, strict=True)]
        (path := tmp_path / "nus_train_singlelabel.txt").write_text("\n".join(lines), encoding="utf-8")
    else:
        torch.save((wanted >= 0).long()[:, None], path := tmp_path / "partial_label_0.25.pt")
    (row,) = run("nus", "--data-root", str(root), "--labels", str(path))
    share = float((wanted >= 0).float().mean())
    assert torch.equal(seen[0][0], wanted) and seen[0][1] == single
    assert row["known"] == ("single" if single else round(share, 4))
    out = capsys.readouterr().out
    assert f"{path.name}: {kind}, {100 * share:.2f}% of the labels known" in out and "\n  0001_2124494182: present " in out
    if not single:
        torch.save((wanted < 0).long()[:, None], path)
        with pytest.raises(SystemExit, match="holds a run with other settings: .*known_labels was"):
            run("nus", "--data-root", str(root), "--labels", str(path), "--resume")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--known", "0.5"], "--labels is one setting of known labels: leave --known out"),
        (["--seeds", "1", "2"], "leave --known out, and give one of --seeds"),
        (["--tune"], "--labels has the labels of the whole training split, of which --tune trains on a part"),
        (["--methods", "linear+hill", "--set", "hill.gamma=-1"], "HillLoss: gamma must be at least 0, got -1"),
    ],
)
def test_labels_and_what_contradicts_them(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        experiment.main(["--labels", str(tmp_path / "labels.txt"), "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match="--labels-encoding needs --labels"):
        experiment.main(["--labels-encoding", "mask", "--output", str(tmp_path / "out")])


def test_labels_of_voc_need_no_other_option(tmp_path: Path) -> None:
    root = write_drawn_voc(tmp_path, sizes={"train": 6, "val": 1, "test": 4}, workers=1)
    wanted = hide_labels(VOC(root, 2007, "train").targets, 0.5)
    lines = [",".join({1: "1", 0: "-1", -1: "0"}[int(value)] for value in row) for row in wanted.tolist()]
    (path := tmp_path / "train_proportion_0.5.txt").write_text("\n".join(lines), encoding="utf-8")
    typed = ["--data-root", str(root), "--preset", "embedded", "--labels", str(path), "--device", "cpu", "--cache", str(tmp_path)]
    data = prepare.prepare(arguments.parse([*typed, "--workers", "0"]))
    assert data.labels is not None and torch.equal(data.labels, wanted) and data.class_names == list(VOC_CLASSES)
    part = seen_part(data, 4)
    assert part.labels is not None and torch.equal(part.labels, wanted[:, :16]) and part.class_names == list(VOC_CLASSES[:16])
    path.write_text("\n".join(lines[:3]), encoding="utf-8")
    with pytest.raises(SystemExit, match="has 3 images and 20 classes, VOC2007 has 6 and 20; likely it is of another split"):
        experiment.main([*typed, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("key", [key for key in DATA if source(key).drawn_preset is None])
def test_without_data_the_script_says_where_they_are_had(key: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: --data-root is needed, .*https://"):
        experiment.main(["--output", str(tmp_path)], source(key))


@pytest.mark.parametrize("key", ["voc", *DATA])
def test_every_data_set_has_a_preset_and_names_of_its_own(key: str) -> None:
    where = source(key)
    options = arguments.parse(["--data-root", "somewhere"], where)
    assert options.preset.name == where.preset and where.key == key and options.output == Path("runs") / key
    assert pickle.loads(pickle.dumps(options)) == options, "processes of --jobs are given it"
    script = ROOT / "examples" / f"reproduce_{key}.py"
    assert not script.is_file() or f"reproduce_{key}.py" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["name", "model", "pretrained"])
def test_given_features_are_of_one_model(name: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"class_names": ["dog", "cat"], "logit_scale": 20.0}', encoding="utf-8")
    with pytest.raises(ValueError, match=f"--set {name} is for images that a run encodes"):
        arguments.parse([str(tmp_path), "--set", f"{name}=RN50"], source("given"))


def test_voc2012_of_single_positives(shared_data: Path) -> None:
    """Train against val, and settings chosen on a fifth of train."""
    for typed, sizes in (((), {"train": 70, "val": 30}), (("--tune",), {"fit": 56, "held-out": 14})):
        options = arguments.parse(["--data-root", str(shared_data), "--preset", "voc2012-rn101", *typed])
        sets = prepare.images_of(options)
        assert {split: len(images) for split, images in sets.items()} == sizes
        assert all(images.name == "VOC2012" for images in sets.values())


def test_class_names_have_to_be_as_many_as_classes(roots: Callable[[str], Path], tmp_path: Path) -> None:
    (path := tmp_path / "names.txt").write_text("dog\ncat\n", encoding="utf-8")
    names = ["--data-root", str(roots("nus")), "--class-names", str(path), "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="--class-names: .*names.txt must name 81 classes, got 2"):
        experiment.main(names, source("nus"))
    path.write_text("\n".join(["a", *map(str, range(79)), "a"]), encoding="utf-8")
    with pytest.raises(SystemExit, match="--class-names: .*names.txt must give each class a name of its own, got 'a' twice"):
        experiment.main(names, source("nus"))
