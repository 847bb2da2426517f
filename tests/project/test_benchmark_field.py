"""The study of the field: its cells on a tiny folder of features, its tables, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import read_json
from trm_pipeline.data import given
from trm_pipeline.run import experiment


@pytest.fixture
def field(benchmark_script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a study of a few cells."""
    script = benchmark_script("field")
    monkeypatch.setattr(script, "SEEDS", (4, 5))
    monkeypatch.setattr(script, "PSEUDO_SEEDS", (4, 5))
    monkeypatch.setattr(script, "LOCAL", ("text-pixel", "trm-region"))
    monkeypatch.setattr(script, "UNDER", ("text-pixel",))
    monkeypatch.setattr(script, "FEW", ("an",))
    monkeypatch.setattr(script, "STAGES", ("heads", "few"))
    monkeypatch.setattr(script, "SETTINGS", (script.Setting(0.4), script.Setting(0.4, 0.2)))
    monkeypatch.setattr(script, "DATA", {"photographs": script.Data(given.SOURCE, "Photographs")})
    return script


def test_an_interrupted_study_goes_on_and_its_rows_are_those_of_the_pipeline(
    field: Any, drawn_features: Path, tmp_path: Path
) -> None:
    store = tmp_path / "field.csv"
    typed = [str(drawn_features), "--store", str(store), "--stages", "heads", "few", "--set", "epochs=1", "batch_size=40"]
    with pytest.raises(SystemExit, match="goes on from here"):
        field.main([*typed, "--minutes", "0"])
    begun = field.read(store)
    assert len(begun) == 1
    field.main(typed)
    rows = field.read(store)
    assert rows[:1] == begun
    cells = [(row["method"], row["known"], row["wrong"], row["seed"]) for row in rows]
    regions = ("trm-region", "trm-no-pseudo", "trm")
    trained = ("global", "text-pixel", "text-pixel+global", *regions, "text-pixel+an", "text-pixel+an+global")
    assert sorted(cells) == sorted(
        [(method, 0.0, 0.0, 4) for method in ("zero-shot-global", "zero-shot-tokens", "training-free")]
        + [(method, 0.4, wrong, seed) for method in trained for wrong in (0.0, 0.2) for seed in (4, 5)]
    )
    for row in rows:  # the same again, by the settings that were chosen
        if row["seed"] == 5 and row["method"] in ("text-pixel+an", "text-pixel+an+global", *regions):
            cell = ["--methods", row["method"], "--seeds", "5", "--known", "0.4", "--wrong", str(row["wrong"])]
            settings = ["--set", "epochs=1", "batch_size=40", *row["chosen"].split()]
            experiment.main([str(drawn_features), "--output", str(tmp_path / "again"), *cell, *settings], given.SOURCE)
            (again,) = read_json(tmp_path / "again" / "results.json")
            assert again["mAP"] == pytest.approx(row["mAP"], abs=0.05)


def test_a_trial_does_not_join_the_study(field: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        field.main(["FEATURES", "--set", "epochs=1"])
    assert "give --store another file" in capsys.readouterr().err


def test_tables_hold_what_every_seed_has(field: Any, tmp_path: Path) -> None:
    def row(method: str, seed: int, value: float, wrong: float = 0.0) -> dict[str, Any]:
        return {"data": "photographs", "method": method, "known": 0.4, "wrong": wrong, "seed": seed, "mAP": value, "OF1": 1.0}

    means = {"trm": 60.0, "text-pixel": 50.0, "trm-no-pseudo": 59.0}
    whole = [row(name, seed, value + seed) for name, value in means.items() for seed in (4, 5)]
    moved = [row("trm", seed, 30.0, 0.2) for seed in (4, 5)]
    field.append(tmp_path / "field.csv", [*whole, *moved, row("text-pixel", 4, 10.0, 0.2)])
    text = field.page(field.read(tmp_path / "field.csv"))
    listed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    lines = {name: rest for name, *rest in reversed(listed)}  # of each name the first: mAP stands before OF1
    assert lines["trm"] == ["", "64.5 ± 0.7", "30.0 ± 0.0"]
    assert lines["40 %"] == ["text-pixel", "54.5 ± 0.7", "−10.0", "[−10.0, −10.0]"]
    assert lines["text-pixel"] == ["", "54.5 ± 0.7", ""]  # with a fifth wrong it has one seed alone
    assert "| 40 %    | 2       | +1.0  | [+1.0, +1.0]   | +0.0         | [+0.0, +0.0]   |" in text


def test_the_pages_show_what_is_stored(benchmark_script: Callable[[str], Any]) -> None:
    field = benchmark_script("field")
    rows = field.read(field.STORE)
    for path, tables in ((field.PAGE, field.page(rows)), (field.README, field.summary(rows))):
        text = path.read_text(encoding="utf-8")
        assert "| trm " in tables and field.with_tables(text, tables) == text
    keys = [tuple(row[name] for name in ("data", "method", "known", "wrong", "seed")) for row in rows]
    assert len(keys) == len(set(keys))  # no cell twice
