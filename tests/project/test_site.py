"""The site: every public name has a place in the reference, nothing is fetched, and what is written for GitHub reads the same."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

PINNED = json.loads((ROOT / "tests" / "project" / "public_names.json").read_text(encoding="utf-8"))
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
PACKAGES = ("mkdocs", "material", "mkdocstrings", "griffe", "latex2mathml", "ziamath", "fontTools")
LACKING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(bool(LACKING), reason=f"building the site needs {', '.join(LACKING)}: pip install .[docs]")


def directives() -> list[str]:
    found = [name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)]
    parts = [(name, *name.rpartition(".")[::2]) for name in found]
    return [
        whole
        for name, module, last in parts
        for whole in ([f"{module}.{own}" for own in fnmatch.filter(public(module), last)] if "*" in last else [name])
    ]


def public(module: str) -> list[str]:
    names: list[str] = importlib.import_module(module).__all__
    return names


def place(name: str) -> object:
    """The object of a full name; a plain value is its name."""
    module, _, last = name.rpartition(".")
    found = importlib.import_module(name) if name in PINNED else getattr(importlib.import_module(module), last)
    return found if callable(found) or hasattr(found, "__all__") else last


def test_every_public_name_has_a_place_in_the_reference() -> None:
    """Once, even if two modules have it."""
    found = [place(name) for name in directives()]
    wanted = [place(f"{module}.{name}") for module in PINNED for name in public(module)]
    assert [name for name in wanted if name not in found] == []
    assert len(found) == len({id(thing) if callable(thing) else repr(thing) for thing in found})


def test_files_named_to_contributors_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = [name for name in re.findall(r"`([\w./]+\.(?:py|json|md)|[\w/]+/)`", text) if "/" in name and "NAME" not in name]
    assert len(named) > 20 and [name for name in named if not (ROOT / name).exists()] == []


def test_workflows_run_the_oldest_and_the_newest_python() -> None:
    folder = ROOT / ".github" / "workflows"
    if not folder.is_dir():
        pytest.skip("workflows belong to a checkout; here is none")
    config = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    versions = re.findall(r"Programming Language :: Python :: (3\.\d+)", config)
    assert f"python_requires = >={versions[0]}" in config
    text = (folder / "tests.yml").read_text(encoding="utf-8")
    for job, version in (("newest", versions[-1]), ("oldest", versions[0])):
        (part,) = re.findall(rf"^  {job}:$(.*?)(?=^  \w+:$|\Z)", text, re.DOTALL | re.MULTILINE)
        assert f'python-version: "{version}"' in part
    assert f'python: ["{versions[0]}", "{versions[-1]}"]' in text
    targets = {
        target for path in folder.glob("*.yml") for target in re.findall(r"make ([\w-]+)", path.read_text(encoding="utf-8"))
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(targets) > 5 and [target for target in targets if f"\n{target}:" not in makefile] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The built pages; a proxy that is not there stands where the network would be."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder


@needs_mkdocs
def test_it_builds_strictly_and_asks_nobody(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > 60 and "howto/own_loop.html" in pages
    elsewhere = r'\bsrc="(?:https?:)?//|<link\b(?![^>]*canonical)[^>]*\bhref="(?:https?:)?//'
    fetched = re.compile(rf"<(?:script|img|iframe|source)\b[^>]*{elsewhere}")
    assert [name for name, page in pages.items() if fetched.search(page)] == []
    assert [name for name, page in pages.items() if 'class="mermaid"' in page] == []  # which the theme would fetch
    styles = [path for path in site.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//", path.read_text(encoding="utf-8"))]
    assert not styles and 20_000 < (site / "assets" / "formulas.woff").stat().st_size < 200_000


@needs_mkdocs
def test_its_reference_has_every_name_and_no_unread_markup(site: Path) -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html")}
    ids = {found for page in pages.values() for found in re.findall(r'id="([\w.]+)"', page)}
    assert [name for name in directives() if name not in ids] == []
    for name, page in pages.items():
        said = re.sub(r"<details class=\"mkdocstrings-source\">.*?</details>|<pre\b.*?</pre>", "", page, flags=re.DOTALL)
        unread = re.findall(
            r":(?:class|func|meth|math|mod|data|attr):`|\.\. math::|\$\$|>>>|\\(?:frac|sum|mathrm)\b|arithmatex", said
        )
        assert not unread, name
    assert pages["parts.html"].count("<math") > 10


@needs_mkdocs
def test_formulas_of_pages_are_drawn(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    assert page.count("<math") > 30 and "arithmatex" not in page and r"\mathrm" not in page
    linked = re.findall(r'<a [^>]*href="reference/\w+.html#trm_losses[\w.]*"[^>]*><code>(\w+)</code>', page)
    assert {"Rule", "ImageContrastiveLoss"} <= set(linked)


@needs_mkdocs
def test_what_github_reads_as_a_list_is_one() -> None:
    from tools.site_pages import parts, sane_lists

    assert sane_lists("text\n* one\n  more\n\n  ```python\n  x = 1\n  ```\n\nend\n") == (
        "text\n\n* one\n    more\n\n    ```python\n    x = 1\n    ```\n\nend\n"
    )
    assert sane_lists("```\n* no list\n  here\n```\n") == "```\n* no list\n  here\n```\n"
    assert parts(r"a=b,\quad c=\frac{d\quad e}{f},\qquad g") == [r"a=b,\quad", r" c=\frac{d\quad e}{f},\qquad", " g"]


@needs_mkdocs
def test_docstrings_become_markdown() -> None:
    from tools.site_docstrings import markdown

    text = "Sum.\n\n.. math:: a + b\n    + c\n\nSee :class:`~x.Y` and :math:`\\tau`::\n\n    code\n\n"
    made = markdown(f"{text}Example:\n    >>> 1\n\nShape:\n    (B,)\n")
    title = '<span class="doc-section-title">Shape:</span>'
    assert made == f"Sum.\n\n$$a + b + c$$\n\nSee `x.Y` and $\\tau$:\n\n    code\n\nExamples:\n    >>> 1\n\n{title}\n(B,)\n"
