"""The command trm-losses: a folder to try it on, data sets by name, and what it says where the pipeline is not installed."""

import builtins
import itertools
import sys

import pytest

import trm_pipeline
from tests.helpers.own_folder import read_csv
from trm_pipeline import command
from trm_pipeline.folder import demo
from trm_pipeline.run import experiment


def test_a_demo_is_a_folder_with_gaps_in_its_labels(tmp_path, capsys):
    command.main(["demo", str(tmp_path / "demo"), "--images", "8"])
    known, truth = (read_csv(tmp_path / "demo" / f"{name}.csv") for name in ("labels", "truth"))
    files = sorted(path.name for path in (tmp_path / "demo" / "photos").iterdir())
    assert [row["image"] for row in known] == [row["image"] for row in truth] == files and len(files) == 8
    assert len(list((tmp_path / "demo" / "new").iterdir())) == demo.NEW
    cells = [(row[name], whole[name]) for row, whole in zip(known, truth, strict=True) for name in demo.CLASSES]
    assert all(own in ("", whole) for own, whole in cells) and {whole for _, whole in cells} == {"0", "1"}
    assert 0.2 < sum(own == "" for own, _ in cells) / len(cells) < 0.8
    assert "trm-losses train" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="must be empty or not there"):
        command.main(["demo", str(tmp_path / "demo")])
    with pytest.raises(SystemExit, match="--images must be at least 2"):
        command.main(["demo", str(tmp_path / "other"), "--images", "1"])


def test_an_interrupted_demo_leaves_nothing(tmp_path, monkeypatch, capsys):
    def scene(rng, *_):
        if next(count) == 3:
            raise KeyboardInterrupt
        return draw_scene(rng, *_)

    count, draw_scene = itertools.count(), demo.draw_scene
    monkeypatch.setattr(demo, "draw_scene", scene)
    with pytest.raises(SystemExit):
        command.main(["demo", str(tmp_path)])
    assert capsys.readouterr().err.endswith("nothing was written\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", command.SOURCES)
def test_data_sets_go_by_name(data, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment, "main", lambda *args, **kwargs: seen.append((args, kwargs)))
    command.main(["reproduce", data, "--known", "0.1"])
    ((arguments, source), named) = seen[0]
    assert arguments == ["--known", "0.1"] and named == {"prog": f"trm-losses reproduce {data}"}
    assert source.key == data


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'timm'", name="timm"), r"timm is missing; .*pip install 'trm-losses\[pipeline\]'"),
        (KeyboardInterrupt(), "^130$"),
    ],
)
def test_what_ends_the_imports_is_told_in_a_line(error, said, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "trm_pipeline.command":
            raise error
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "trm_pipeline.command")
    with pytest.raises(SystemExit, match=said):
        trm_pipeline.main()
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = trm_pipeline.Nothing


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed.", SystemExit, "^error: .* --workers 0"),
        ("CUDA error", RuntimeError, "^CUDA error$"),
    ],
)
def test_a_killed_reader_of_images_is_told_in_a_line(said, kind, told, monkeypatch):
    def killed(options):
        raise RuntimeError(said)

    monkeypatch.setitem(command.COMMANDS, "export", (command.ExportOptions, killed))
    with pytest.raises(kind, match=told):
        command.main(["export", "run", "--output", "model.onnx"])
