"""Tables as Markdown, and pages out of templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tabulate import tabulate


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The header, then the other lines, each cell as it is."""
    return str(tabulate(table[1:], table[0], tablefmt="github", disable_numparse=True))


def rendered(template: Path, **values: Any) -> str:
    """A page of HTML; values are escaped, and one that is missing is an error."""
    loader = FileSystemLoader(template.parent)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template.name).render(**values)
