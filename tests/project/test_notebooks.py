"""The notebooks of ``examples/notebooks`` run from the first cell to the last, compute what they say, and hold no output."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.project.test_site import needs_mkdocs

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def found_in(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *asked: str) -> list[Any]:
    """Run a notebook in a folder of its own, and what the expressions are worth in the end."""
    for package in ("open_clip", "safetensors", "matplotlib", "ipykernel"):
        pytest.importorskip(package)
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    import matplotlib

    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
    monkeypatch.setenv("HOME", str(folder))  # caches of features
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    book = nbformat.read(ROOT / "examples" / "notebooks" / f"{name}.ipynb", as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(f"import json; print(json.dumps([{', '.join(asked)}]))"))
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=1200, kernel_name="python3", resources=resources).execute()
    return json.loads(book.cells[-1].outputs[0].text)


def test_unknown_labels_of_the_image_get_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach, terms, mass, gaps, right = found_in(
        "five_parts",
        tmp_path,
        monkeypatch,
        "reach.tolist()",
        "sorted(output.terms)",
        "maps.sum(dim=(1, 2)).tolist()",
        "[(values[same].mean() - values[~same].mean()).item() for values in cosines.values()]",
        "right",
    )
    assert [size > 0 for size in reach] == [False, False, True, True, False, False]
    assert terms == [*("contrast", "distillation", "matching_query", "matching_region", "pseudo_query", "pseudo_region")]
    assert mass == pytest.approx([1.0] * 6, abs=1e-5)
    assert gaps[1] > gaps[0] > 0 and right > 0.7


def test_answers_join_the_labels_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, before, after, first, second = found_in(
        "folder_with_gaps",
        tmp_path,
        monkeypatch,
        "len(answers)",
        "before",
        "after",
        *(f"json.loads(Path('{folder}/model.json').read_text())" for folder in ("first", "second")),
    )
    assert answers == 60 and first != second
    assert min(before, after) > 70  # chance is some 25
    assert len((tmp_path / "new.csv").read_text(encoding="utf-8").splitlines()) == 13


def test_a_loss_of_ones_own_stands_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, zero = found_in("own_loss", tmp_path, monkeypatch, "found", "zero")
    assert set(found) == {head + loss for head in ("linear", "text-pixel") for loss in ("", "+an", "+focal")}
    assert zero == pytest.approx(found["linear+an"], abs=0.11)  # without focusing it is AN
    assert zero != found["linear+focal"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_output_and_says_why(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len(cells(path)) - len(code) >= 5 and max(len(cell["source"]) for cell in code) <= 25
    assert cells(path)[0]["source"][0].startswith("# ")


def test_notebooks_may_lie_in_one_folder() -> None:
    drawn = [folder for path in NOTEBOOKS for folder in re.findall(r"demo (\w+)", path.read_text(encoding="utf-8"))]
    assert len(drawn) == len(set(drawn)) == 2


@needs_mkdocs
def test_the_site_has_all_three_as_prose_and_code() -> None:
    from tools.site_pages import PAGES, notebook

    assert len(NOTEBOOKS) == 3 and {path.relative_to(ROOT).as_posix() for path in NOTEBOOKS} <= set(PAGES)
    both = [{"cell_type": "markdown", "source": ["# A\n", "b"]}, {"cell_type": "code", "source": ["x = 1\n", "x"]}]
    title, note, code = notebook("a.ipynb", json.dumps({"cells": both})).split("\n\n")
    assert title == "# A\nb" and "`a.ipynb`" in note and code == "```python\nx = 1\nx\n```\n"
