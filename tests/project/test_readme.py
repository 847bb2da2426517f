"""The snippets of the README and of docs/ run as they stand, and so does the minimal loop; links of the pages lead somewhere."""

import importlib
import os
import re
import runpy
import shlex

import pytest
import torch

from tests.helpers import ROOT

# Those of docs/reference hold no snippets but the docstrings', which run with them.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
    *sorted((ROOT / "docs" / "reference").glob("*.md")),
]


def snippets(page):
    found = re.findall(r"^( *)```python\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def run(page, snippet, scope):
    torch.manual_seed(0)
    exec(compile(snippet, page.name, "exec"), scope)


def test_snippet_runs_and_is_short():
    snippet = snippets(PAGES[0])[0]
    assert len(snippet.strip().splitlines()) <= 18
    scope: dict = {}
    run(PAGES[0], snippet, scope)
    assert set(scope["output"].terms) == {"matching_query"} and scope["head"].calibration is not None
    assert scope["scores"].shape == (8, 20)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_snippets_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """In one scope, as a reader would type them; what they write lands in a folder of its own."""
    found = snippets(page)
    if any("trm_losses.backbones" in snippet or "trm_pipeline" in snippet for snippet in found):
        pytest.importorskip("open_clip")
        pytest.importorskip("timm")
    if any("import transformers" in snippet or "from transformers" in snippet for snippet in found):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for snippet in found:
        run(page, snippet, scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert os.path.exists(page.parent / link), link


def test_commands_of_the_pages_are_understood(tmp_path, monkeypatch):
    """Also their settings and combinations; nothing is run."""
    pytest.importorskip("open_clip")
    pytest.importorskip("safetensors")
    from trm_pipeline.command import SOURCES
    from trm_pipeline.run import arguments

    (tmp_path / "FEATURES").mkdir()
    (tmp_path / "FEATURES" / "meta.json").write_text('{"class_names": ["cat", "dog"], "logit_scale": 100}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()]
    form = r"(?:\S*python examples/reproduce_|trm-losses reproduce )(\w+)(?:\.py)?([^`]*)"
    commands = [found.groups() for line in lines if (found := re.match(form, line))]
    assert len(commands) >= 5 and {key for key, _ in commands} == set(SOURCES)
    for key, command in commands:
        source = importlib.import_module(f"trm_pipeline.data.{SOURCES[key]}").SOURCE
        typed = [word for word in shlex.split(command) if word != "--tensorboard"]  # which asks for its package
        arguments.parse(typed, source)


def test_commands_for_ones_own_images_are_understood():
    """Those of fenced code, by the parser alone; nothing is run."""
    pytest.importorskip("open_clip")
    pytest.importorskip("safetensors")
    from trm_pipeline.command import COMMANDS, parser

    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line.partition(" #")[0])[1:] for line in lines if line.startswith("trm-losses ")]
    assert {words[0] for words in commands} == {*COMMANDS, "demo", "reproduce"}
    for words in commands:
        parser().parse_args(words)


def test_pages_of_the_pipeline_name_every_argument():
    pytest.importorskip("open_clip")
    pytest.importorskip("safetensors")
    from trm_pipeline.command import SOURCES
    from trm_pipeline.run import arguments

    page = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("pipeline.md", "datasets.md"))
    sources = [importlib.import_module(f"trm_pipeline.data.{module}").SOURCE for module in SOURCES.values()]
    actions = [action for source in sources for action in arguments.parser(source)._actions]
    options = {option for action in actions for option in action.option_strings} - {"-h", "--help"}
    assert {option for option in options if f"`{option}" not in page} == set()
    assert {method for method in arguments.DEFAULT_METHODS if f"`{method}`" not in page} == set()


def test_minimal_loop_finds_the_hidden_labels(capsys):
    runpy.run_path(str(ROOT / "examples" / "minimal_loop.py"))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert int(re.search(r"(\d+)%$", last).group(1)) >= 90
