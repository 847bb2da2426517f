"""Imports point downward in both packages: no circle, and no room knows one above it."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.helpers import ROOT

# From the ground up. A room imports from itself and from those before it.
ROOMS = {
    "trm_losses": [
        "_deprecation",
        "_checks",
        "_fused",
        "_precision",
        "_distributed",
        "_state",
        "_entries",
        "labels",
        "metrics",
        "calibration",
        "thresholds",
        "functional",
        "regions",
        "prompts",
        "matching",
        "distillation",
        "contrast",
        "image_contrast",
        "prototypes",
        "_token_stream",
        "training_free",
        "global_head",
        "pseudo",
        "objective",
        "chunked",
        "head_file",
        "head",
        "_feature_files",
        "features",
        "baselines",
        "backbones",
    ],
    "trm_pipeline": [
        "progress",
        "files",
        "drawn",
        "config",
        "embedded",
        "features",
        "ranks",
        "data",
        "methods",
        "training",
        "report",
        "run",
        "folder",
        "command",
    ],
}


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


@pytest.mark.parametrize("package", ROOMS)
def test_no_circle(package):
    modules = graph(package)
    assert len(modules) > 40 and sum(map(len, modules.values())) > 80
    TopologicalSorter(modules).prepare()  # raises if there is one


@pytest.mark.parametrize("package", ROOMS)
def test_no_room_knows_one_above_it(package):
    order = {name: level for level, name in enumerate(ROOMS[package])}
    modules = {module: found for module, found in graph(package).items() if room(module) != "__init__"}
    assert {room(module) for module in modules} == set(order), "each room has its place in the order"
    upward = [
        f"{module} imports {other}"
        for module, found in modules.items()
        for other in found
        if room(other) != "__init__" and order[room(other)] > order[room(module)]
    ]
    assert not upward


def test_the_library_never_imports_the_pipeline():
    assert not [name for path in (ROOT / "trm_losses").rglob("*.py") for name in imports(path, "trm_pipeline")]
