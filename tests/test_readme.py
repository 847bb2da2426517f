"""The README's snippet and the minimal loop run as they stand."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_snippet_runs_and_is_short():
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(snippet.strip().splitlines()) <= 15
    scope: dict = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert set(scope["output"].terms) >= {"matching_query", "matching_region", "distillation", "contrast"}
    assert scope["objective"].labeler.step == 3


def test_minimal_loop_finds_the_hidden_labels(capsys):
    runpy.run_path(str(ROOT / "examples" / "minimal_loop.py"))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert int(re.search(r"(\d+)%$", last).group(1)) >= 90
