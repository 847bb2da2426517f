"""What pip gets: the files of the sdist and of the wheel, and what they ask for."""

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.helpers import ROOT
from tools import make_dist

MODULES = {path.relative_to(ROOT).as_posix() for name in ("trm_losses", "trm_pipeline") for path in (ROOT / name).rglob("*.py")}
OTHERS = {
    *("trm_losses/py.typed", "trm_pipeline/py.typed"),
    *("trm_pipeline/embedded/drawn-clip.json", "trm_pipeline/report/page.html.j2"),
    "trm_pipeline/folder/review/review.html.j2",
}


def opens_text(call):
    """A call reads or writes text in whatever encoding the machine has."""
    owner, name = (getattr(call.func, "value", None), getattr(call.func, "attr", getattr(call.func, "id", "")))
    if name not in ("open", "read_text", "write_text") or getattr(owner, "id", "") in ("Image", "os", "tarfile", "saved"):
        return False
    mode = [arg.value for arg in call.args[int(owner is None) :] if isinstance(arg, ast.Constant)]
    return not any(word.arg == "encoding" for word in call.keywords) and not (name == "open" and "b" in str(mode[:1]))


def test_every_text_file_is_opened_with_its_encoding():
    files = [
        path
        for folder in ("trm_losses", "trm_pipeline", "examples", "tools", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    assert len(files) > 100 and not found
    assert [opens_text(ast.parse(code, mode="eval").body) for code in ("open(p, 'w')", "p.open()", "p.open('rb')")] == [1, 1, 0]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist and the wheel."""
    for name in ("build", "setuptools"):
        if importlib.util.find_spec(name) is None or importlib.util.find_spec(name).origin is None:
            pytest.skip(f"building needs the package {name}; pip install build setuptools")
    from setuptools import __version__

    if int(__version__.split(".")[0]) < 77:
        pytest.skip(f"building needs setuptools of at least 77, here is {__version__}")
    folder = tmp_path_factory.mktemp("dist")
    make_dist.build(folder)
    return folder


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_every_requirement_names_its_oldest_version():
    """What ``make oldest`` installs, and so one version of a package that several lists name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    found = {line for text in lists for line in text.split()}
    matches = {line: re.fullmatch(r"([\w-]+)(>=[\d.]+(,<[\d.]+)?|==[\d.]+)", line) for line in found}
    assert len(found) > 20 and [line for line in found if not matches[line]] == []
    assert len({match[1] for match in matches.values()}) == len(found)


def test_wheel_holds_the_packages_and_nothing_else(built):
    names = set(zipfile.ZipFile(only(built, "*.whl")).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == MODULES | OTHERS | {f"trm_pipeline/embedded/{name}" for name in ("pretrain.log", "weights.safetensors")}
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def test_wheel_asks_for_torch_and_einops_alone(built):
    wheel = zipfile.ZipFile(only(built, "*.whl"))
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
    required = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(requirement.split(">")[0] for requirement in required) == ["einops", "torch"]
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra")}
    assert extras == {"backbones", "huggingface", "pipeline", "export", "tensorboard", "docs", "dev"}
    assert "License-Expression: MIT" in lines


def test_sdist_holds_readme_and_licence(built):
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert names >= MODULES | {"trm_losses/py.typed", "LICENSE", "README.md", "setup.cfg", "pyproject.toml"}
    assert names >= {"mkdocs.yml", "docs/method.md", "tests/conftest.py", "tools/make_dist.py", "examples/minimal_loop.py"}


def test_a_second_build_has_the_same_bytes_whatever_the_umask(built, tmp_path):
    """And the wheel stays small enough to be fetched without a thought."""
    before = os.umask(0o077)
    try:
        again = make_dist.build(tmp_path)
    finally:
        os.umask(before)
    for path in again:
        assert path.read_bytes() == (built / path.name).read_bytes(), path.name
    assert only(built, "*.whl").stat().st_size <= make_dist.MOST == 6_000_000


def test_an_index_would_take_both(built):
    pytest.importorskip("twine")
    files = [str(path) for path in built.iterdir()]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0 and len(files) == 2, done.stdout + done.stderr
