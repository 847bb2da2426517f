"""What a choice costs: candidates are ranked by what was held out and scored as the pipeline scores them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import read_json
from trm_pipeline.data import given
from trm_pipeline.run import experiment


def test_a_choice_stands_beside_the_best_of_its_list(
    benchmark_script: Callable[[str], Any], drawn_features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = benchmark_script("choosing")
    assert benchmark.Candidates([1.0, 3.0, 2.0], [10.0, 20.0, 30.0], 20.0).correlation == pytest.approx(0.5)
    with pytest.raises(SystemExit):
        benchmark.main(["--features", str(drawn_features), "--methods", "zero-shot-global"])
    small = ["--known", "0.4", "--set", "epochs=1", "batch_size=40"]
    benchmark.main(["--features", str(drawn_features), "--methods", "linear", "--seeds", "5", *small])
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert row[:3] == ["photographs", "40 %", "linear"]
    as_it_is, chosen, best, less = map(float, row[3:7])
    assert max(as_it_is, chosen) <= best and less == pytest.approx(chosen - best, abs=0.11)
    output = tmp_path / "run"
    experiment.main([str(drawn_features), "--methods", "linear", "--seeds", "5", "--output", str(output), *small], given.SOURCE)
    assert read_json(output / "results.json")[0]["mAP"] == pytest.approx(as_it_is, abs=0.06)
