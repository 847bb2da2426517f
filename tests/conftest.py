"""What all tests share: the number of threads, what is left out, blank pictures, and real files where they are present."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT
from tests.helpers.browser import NO_BROWSER
from tests.helpers.ranks import Pool

PICTURES = {"trm_pipeline.report.page": ("draw_map_against_known", "draw_pseudo_quality", "draw_saliency")}

LACKING = [name for name in ("open_clip", "torchvision", "timm", "safetensors", "matplotlib") if find_spec(name) is None]
collect_ignore = ["helpers", *(("pipeline", "losses/backbones") if LACKING else ())]

if "OMP_NUM_THREADS" not in os.environ:  # workers share the cores, with the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_report_header() -> str | None:
    return f"the pipeline and the backbones are left out: {', '.join(LACKING)} is not installed" if LACKING else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A page that no browser has opened is not tested, and that is easily overlooked among the skips."""
    if any(NO_BROWSER in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(NO_BROWSER, yellow=True)


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """Processes joined by gloo, started when they are first asked for: two, or four for jobs of three and four."""
    started: dict[int, Pool] = {}

    def pool(world: int) -> Pool:
        size = 2 if world == 2 else 4
        if size not in started:
            started[size] = Pool(size)
        return started[size]

    yield pool
    for each in started.values():
        each.close()


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of a run are one pixel, but in tests marked ``pictures``: drawing takes most of the time of a small run."""
    if request.node.get_closest_marker("pictures"):
        return

    def blank(path: Path, *_: Any) -> None:
        from PIL import Image

        Image.new("RGB", (1, 1)).save(path)

    for module, names in PICTURES.items():
        for name in names if module in sys.modules else ():
            monkeypatch.setattr(sys.modules[module], name, blank)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data: TRM_LOSSES_TEST_DATA, or shared/data beside the checkout; skips where there is none."""
    folder = Path(os.environ.get("TRM_LOSSES_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set TRM_LOSSES_TEST_DATA")
    return folder
