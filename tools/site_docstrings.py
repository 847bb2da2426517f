"""Docstrings for the site: reStructuredText, as they are written, to the Markdown that the site renders."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^( *)\.\. math::(.*\n(?:\1 +.*\n?|\n)*)", re.MULTILINE)
_OWN_SECTION = re.compile(r"^(Shape|Reference):\n((?:    .*\n?|\n)+)", re.MULTILINE)
_TITLE = '<span class="doc-section-title">{}:</span>'


def markdown(text: str) -> str:
    """The text of a docstring, without its first indent, in Markdown."""
    text = _BLOCK.sub(_block, text)
    text = _MATH.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    text = _ROLE.sub(r"`\1`", text)
    text = re.sub(r"^::$\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\S)::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = _OWN_SECTION.sub(lambda found: f"{_TITLE.format(found[1])}\n{textwrap.dedent(found[2])}", text)
    return re.sub(r"^(Shape|Reference):(?= )", lambda found: _TITLE.format(found[1]), text, flags=re.MULTILINE)


def _block(found: re.Match[str]) -> str:
    indent, formula = found[1], " ".join(found[2].split())
    if "&" in formula or r"\\" in formula:
        formula = rf"\begin{{align*}}{formula}\end{{align*}}"
    return f"{indent}$${formula}$$\n\n"


class Docstrings(griffe.Extension):
    """Rewrites every docstring once its object is known."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Once for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
