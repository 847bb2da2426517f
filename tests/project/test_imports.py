"""Imports point downward in both packages: no circle, and no room knows one above it."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def rooms_of(package):
    """The rooms in the first column of a package's table, from the ground up."""
    part = re.search(rf"^## {package}$(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)/?`", row)]


PACKAGES = ("trm_losses", "trm_pipeline")


def imports(path, package):
    """The modules of its package that a file imports, wherever the import stands in it."""
    own = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == package)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*own[: len(own) - node.level], *filter(None, [node.module])]) if node.level else node.module
            if base.partition(".")[0] == package:
                yield from (f"{base}.{alias.name}" for alias in node.names)


def graph(package):
    """The modules that each module imports."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}
    known = {name.removesuffix(".__init__"): name for name in paths}
    found = {}
    for name, path in paths.items():
        parents = (known.get(found, known.get(found.rpartition(".")[0])) for found in imports(path, package))
        found[name] = {parent for parent in parents if parent not in (None, name)}
    return found


def room(module):
    return module.split(".")[1]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package):
    modules = graph(package)
    assert len(modules) > 40 and sum(map(len, modules.values())) > 80
    TopologicalSorter(modules).prepare()  # raises if there is one


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_knows_one_above_it_on_the_page_of_the_architecture(package):
    order = {name: level for level, name in enumerate(rooms_of(package))}
    modules = {module: found for module, found in graph(package).items() if room(module) != "__init__"}
    assert {room(module) for module in modules} == set(order), "each room has its place on the page"
    upward = [
        f"{module} imports {other}"
        for module, found in modules.items()
        for other in found
        if room(other) != "__init__" and order[room(other)] > order[room(module)]
    ]
    assert not upward


def test_the_library_never_imports_the_pipeline():
    assert not [name for path in (ROOT / "trm_losses").rglob("*.py") for name in imports(path, "trm_pipeline")]
