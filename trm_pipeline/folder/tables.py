"""The rows of tables that people saved."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator


def csv_rows(text: str, file: str) -> Iterator[tuple[str, list[str]]]:
    """Where each row starts, and its cells; blank rows are left out.

    What makes most columns of the first row separates them, or what a line ``sep=;`` before it says, as Excel reads it.
    """
    first = next((line for line in text.splitlines() if line.strip()), "")
    if said := re.fullmatch(r"sep=([,;|\t])\s*", first, re.IGNORECASE):
        text, delimiter = text.replace(first, "", 1), said[1]
    else:
        delimiter = max(",;\t", key=lambda d: len(next(csv.reader([first], delimiter=d))))  # the comma where they are equal
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, skipinitialspace=True)
    start = 1
    try:
        for cells in reader:
            where, start = f"{file}, line {start}", reader.line_num + 1
            if any(map(str.strip, cells)):
                yield where, cells
    except csv.Error as error:
        raise ValueError(f"{file}, line {start}: {error}; a quote that is never closed, perhaps") from None
