"""Pages for the site: pages outside docs/ join it, links lead to them, lists are read as GitHub reads them, formulas are MathML.

MkDocs calls the functions whose names begin with ``on_``.
"""

from __future__ import annotations

import ast
import fnmatch
import html
import importlib.util
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fontTools import subset
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

# Pages that stand outside docs/ and have a place in the navigation.
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
    **{f"examples/notebooks/{name}.ipynb": f"notebooks/{name}.md" for name in ("five_parts", "folder_with_gaps", "own_loss")},
}
_LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()([^)\s:]+)\)")
_LANGUAGES = {".py": "python", ".json": "json", ".cfg": "ini", ".toml": "toml", ".yml": "yaml"}
_FENCE = re.compile(r"^\s*(```+|~~~+)")
_ITEM = re.compile(r"^([*-]|\d+\.) +")
_drawn: set[str] = set()  # the characters of all formulas
_ITALIC = (*range(0x1D434, 0x1D468), *range(0x1D6E2, 0x1D71C), 0x210E)  # what a single letter of a formula is drawn as
_SPACES = (
    (r"<mo>(max|min)</mo>", r"<mi>\1</mi>"),
    (r"(<mi>(?:log|exp|max|min|cos|tr)</mi>)(?=<m(?:i|n|frac|sub|sup|over|subsup)>)", r'\1<mspace width="0.17em" />'),
    (r"(<msub><mi>(?:max|min)</mi>(?:(?!<msub>).)*?</msub>)", r'\1<mspace width="0.17em" />'),
    (r"(?<=<mo>&#x0003D;</mo>)<mo>&#x02212;</mo>", '<mo form="prefix" lspace="0" rspace="0">−</mo>'),  # a sign, not a difference
    (r"<mo>(?:/|&#x0002F;)</mo>", '<mo lspace="0" rspace="0">/</mo>'),
    (r"<mo>&#x0005E;</mo>", '<mo stretchy="false" class="hat">ˆ</mo>'),
)
_HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"


def own_path(uri: str) -> str:
    """The path below the repository of a page of the site."""
    outside = {page: path for path, page in PAGES.items()}
    if uri in outside:
        return outside[uri]
    return uri.removeprefix("source/").removesuffix(".md") if uri.startswith("source/") else f"docs/{uri}"


def _uri(path: str) -> str:
    """The page of the site that shows a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _targets(path: str, text: str) -> Iterator[str]:
    """The files and folders below the repository that a page links to."""
    for found in _LINK.finditer(text):
        link = found[2].partition("#")[0]
        if link:
            yield posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _shown(path: str) -> str:
    """A page in Markdown that shows a file or folder of the repository."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(child.name for child in place.iterdir() if child.suffix in _LANGUAGES)
        return f"{_HIDDEN}# {path}\n\n" + "\n".join(f"- [{name}]({posixpath.basename(path)}/{name})" for name in names)
    text = place.read_text(encoding="utf-8")
    if place.suffix == ".ipynb":
        return notebook(path, text)
    return text if place.suffix == ".md" else f"{_HIDDEN}# {path}\n\n````{_LANGUAGES.get(place.suffix, 'text')}\n{text}\n````\n"


def notebook(path: str, text: str) -> str:
    """A notebook in Markdown: its prose and its code."""
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    title, *parts = (f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells)
    note = f"This page is the notebook `{path}`. Run it to see what comes out."
    return "\n\n".join([title, note, *parts]) + "\n"


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Pages that stand outside docs/, and whatever files of the repository a page links to."""
    waiting = [*PAGES, *(own_path(file.src_uri) for file in files.documentation_pages())]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).exists():
            continue
        seen.add(path)
        inside = path.startswith("docs/")
        text = (ROOT / path).read_text(encoding="utf-8") if inside and path.endswith(".md") else "" if inside else _shown(path)
        if not inside:
            files.append(File.generated(config, _uri(path), content=text))
        if (ROOT / path).is_dir() and not inside:
            waiting += [f"{path}/{child.name}" for child in (ROOT / path).iterdir() if child.suffix in _LANGUAGES]
        elif path.endswith((".md", ".ipynb")):
            waiting += _targets(path, text)
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links to files of the repository become links to their pages; ``::: module.*`` stands for public names of a module."""
    uri = page.file.src_uri
    path, folder = own_path(uri), posixpath.dirname(uri)

    def link(found: re.Match[str]) -> str:
        target, mark, anchor = found[2].partition("#")
        if not target:
            return found[0]
        to = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not (ROOT / to).exists():
            return found[0]
        return f"{found[1]}{posixpath.relpath(_uri(to), folder or '.')}{mark}{anchor})"

    if uri.startswith("source/") and not path.endswith(".md") and not (ROOT / path).is_dir():
        return markdown
    markdown = re.sub(r"^::: (\S+)\.(\S*\*\S*)$", _matching, markdown, flags=re.MULTILINE)
    return sane_lists("\n".join(_LINK.sub(link, line) if code is None else line for line, code in _lines(markdown)))


def _matching(found: re.Match[str]) -> str:
    """A directive for each public name of a module that fits a pattern."""
    return "\n\n".join(f"::: {found[1]}.{name}" for name in fnmatch.filter(public_names(found[1]), found[2]))


def public_names(module: str) -> list[str]:
    """``__all__`` of a module, which is not imported."""
    place = ROOT / module.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    (value,) = re.findall(r"^__all__ = (\[.*?\])$", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    names: list[str] = ast.literal_eval(value)
    return names


def _lines(text: str) -> Iterator[tuple[str, str | None]]:
    """Each line, and the fence of the code that it stands in."""
    fence = None
    for line in text.splitlines():
        found = _FENCE.match(line)
        if fence is None and found:
            fence = found[1]
            yield line, fence
        elif found and fence is not None and line.strip() == fence:
            yield line, fence
            fence = None
        else:
            yield line, fence


def sane_lists(text: str) -> str:
    """Lists as GitHub reads them: indented by the width of their mark, and without a blank line before the first item."""
    out: list[str] = []
    width, before = 0, ""
    for line, fence in _lines(text):
        item = _ITEM.match(line) if fence is None else None
        if item:
            if not width and before.strip():
                out.append("")
            width = len(item[0])
        elif width and line.strip() and not line.startswith(" "):
            ends_paragraph = not before.strip() or line.startswith(("#", "|", "```"))
            width = 0 if ends_paragraph else width
        elif width and line.startswith(" " * width):
            line = "    " + line[width:]
        out.append(line)
        before = line
    return "\n".join(out) + "\n"


def mathml(latex: str, *, block: bool = False) -> str:
    """A formula as MathML, with the spaces that the converter leaves to whoever draws it."""
    made = convert(latex, display="block" if block else "inline")
    for pattern, better in _SPACES:
        made = re.sub(pattern, better, made)
    _drawn.update(html.unescape(re.sub("<.*?>", "", made)))
    return made


def parts(latex: str) -> list[str]:
    """A formula cut at its wide spaces, so that it can go on in another line where the page is narrow."""
    cuts, depth = [0], 0
    for found in re.finditer(r"\\(?:begin|left)\b|\\(?:end|right)\b|\\[{}]|[{}]|\\q?quad\b", latex):
        word = found[0]
        depth += (word in ("{", r"\begin", r"\left")) - (word in ("}", r"\end", r"\right"))
        if depth == 0 and word.endswith("quad"):
            cuts.append(found.end())
    return [latex[start:end] for start, end in zip(cuts, [*cuts[1:], None], strict=True)]


def linked_names() -> dict[str, str]:
    """Public names, as text mentions them, and the objects of the reference."""
    pinned = json.loads((ROOT / "tests/project/public_names.json").read_text(encoding="utf-8"))
    names = {}
    for module in pinned:
        for name in public_names(module):
            if name.startswith("__") or (module == "trm_losses" and name in ("PseudoLabeler", "PseudoLabels")):
                continue
            full = f"{module}.{name}"
            names[full] = names[full.removeprefix("trm_losses.")] = full
            if name not in ("functional", "labels", "metrics", "evaluate", "param_groups"):  # words of other meanings too
                names[name] = full
    return names


NAMES = linked_names()


def on_page_content(content: str, page: Any, **kwargs: Any) -> str:
    """Formulas become MathML; public names in code type lead to the reference."""
    content = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: _formula(html.unescape(found[2]), found[1] == "div"),
        content,
        flags=re.DOTALL,
    )
    if page.file.src_uri.startswith(("source/", "project/changelog")):
        return content
    return re.sub(r"<(a|h\d|pre|autoref)\b.*?</\1>|<code>([\w.]+)</code>", _named, content, flags=re.DOTALL)


def _formula(latex: str, block: bool) -> str:
    if not block:
        return mathml(latex.strip())
    made = "".join(mathml(part.strip(), block=True) for part in parts(latex) if part.strip())
    return f'<div class="formula" data-search-exclude>{made}</div>'


def _named(found: re.Match[str]) -> str:
    name = NAMES.get(found[2] or "")
    return f'<autoref identifier="{name}" optional>{found[0]}</autoref>' if name else found[0]


def on_post_build(config: Any, **kwargs: Any) -> None:
    """The font of the formulas, STIX Two Math: what formulas use of it, with its tables for setting them."""
    package = importlib.util.find_spec("ziamath")
    if package is None or package.origin is None:
        raise RuntimeError("the font of the formulas comes with the package ziamath: pip install ziamath")
    file = Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    options = subset.Options(layout_features=["ssty"], flavor="woff", notdef_outline=True)
    font = subset.load_font(str(file), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[*map(ord, sorted(_drawn)), *_ITALIC])
    subsetter.subset(font)
    subset.save_font(font, str(Path(config.site_dir) / "assets" / "formulas.woff"), options)
