"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The header, then the other lines, each cell as it is."""
    return str(tabulate(table[1:], table[0], tablefmt="github", disable_numparse=True))
