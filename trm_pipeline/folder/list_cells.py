"""Cells that list names. What separates the names belongs to the file, so it is found once, over all cells of the column."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

_SURE = ";|\t\n；"  # hardly ever part of a name
_LIKELY = ",#$、，،"
_DOUBTFUL = " /&+:"  # more often part of a name
_QUOTED = r""""([^"]*)"|'([^']*)'"""
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


class _Doubt(ValueError):
    """Of a cell (the second argument), with what there is to say about it."""


def split_cells(cells: Sequence[str], separator: str | None, places: Sequence[str]) -> tuple[list[list[str]], str | None]:
    """The names in each cell, and what separates them; None where each cell is one name, or all are arrays.

    Arrays are read as JSON or Python write them, with or without quotes. A character that never stands between names is
    part of a name.

    Args:
        separator: what the user says it is. places: where each cell stands, for errors.

    Raises:
        ValueError: it cannot be told, and the user is asked for ``--separator``.
    """
    count = Counter(text for cell in cells if (text := cell.strip()))
    arrays: dict[str, list[str]] = {}
    plain: dict[str, str] = {}  # what is left to split
    bare = all(_bracketed(text) for text in count)
    try:
        for text in count:
            names = _array(text) if _bracketed(text) else None
            if names is None:
                plain[text] = text[1:-1].strip() if bare else text
            else:
                arrays[text] = names
        if separator is None and not arrays:
            separator = _separator({plain[text]: number for text, number in count.items() if text in plain})
        elif separator is None:
            for text in plain:
                if any(len(_parts(text, s)) > 1 for s in _SURE + _LIKELY):
                    raise _Doubt("is no array such as those of other cells; write all lists alike", text)
    except _Doubt as doubt:
        what, text = doubt.args
        where = next(place for cell, place in zip(cells, places, strict=True) if text in (cell.strip(), plain.get(cell.strip())))
        raise ValueError(f"{where}: {text!r} {what}") from None
    found = {text: _parts(inner, separator) for text, inner in plain.items()} | arrays
    return [list(found.get(cell.strip(), ())) for cell in cells], separator


def combined(names: Iterable[str], separator: str | None = None) -> str | None:
    """A name that consists of other ones, with something between them that separates lists elsewhere: most likely a list."""
    known = set(names)
    for name in names:
        for other in _SURE + _LIKELY:
            parts = _parts(name, other) if other != separator else []
            if len(parts) > 1 and known.issuperset(parts):
                return name
    return None


def _separator(count: dict[str, int]) -> str | None:
    """What separates names in cells that occur so often, or None: each is one name."""
    texts = list(count)
    candidates = [s for s in _SURE + _LIKELY if _several(texts, s)]
    if not candidates:
        ends = [s for s in _SURE + "," if any(text.endswith(s) for text in texts)]
        return ends[0] if ends else _doubtful(texts)  # a list of one may end in it too
    classes = {s: {name for text in texts for name in _parts(text, s)} for s in candidates}
    fits = [s for s in candidates if combined(classes[s], s) is None]
    best = min(fits, key=lambda s: len(classes[s]), default=None)
    if best is None or best != fits[0]:
        text = _several(texts, candidates[0])[0]
        raise _Doubt(f"may be separated by {' or '.join(map(repr, candidates))}; say which it is with --separator", text)
    several = _several(texts, best)
    if best in _LIKELY and not _reused(texts, best) and (often := [text for text in several if count[text] > 1]):
        raise _Doubt(_ask(best), often[0])
    return best


def _doubtful(texts: Sequence[str]) -> str | None:
    """Nothing that usually separates names is there: lists by spaces, names that hold spaces, or who knows."""
    for s in _DOUBTFUL:
        several = _several(texts, s)
        if not several:
            continue
        words = {word for text in texts for word in _parts(text, s)}
        numbered = all(any(map(str.isdigit, word)) for word in words)
        # Every word is also a label by itself, in so many combinations: names are not like that.
        alone = words.issubset(texts) and len(several) >= len(words)
        if s == " " and (numbered or alone):
            return s
        if _reused(texts, s):
            raise _Doubt(_ask(s), several[0])
    return None


def _ask(separator: str) -> str:
    return f"may be one name or a list; say --separator {separator!r} if it is a list, --separator ';' if each cell is one name"


def _several(texts: Sequence[str], separator: str) -> list[str]:
    return [text for text in texts if len(_parts(text, separator)) > 1]


def _reused(texts: Sequence[str], separator: str) -> bool:
    """A part of one cell occurs in another one."""
    parts = [part for text in texts for part in set(_parts(text, separator))]
    return len(set(parts)) < len(parts)


def _parts(text: str, separator: str | None) -> list[str]:
    """Names without the quotes around them; what stands between quotes is not split."""
    between = "$^" if separator is None else re.escape(separator) if separator.strip() or separator in "\t\n" else r"\s+"
    if '"' not in text and "'" not in text:
        if separator is None or between != r"\s+" and separator not in text:
            return [text] if text else []
        return [name for part in re.split(between, text) if (name := part.strip())]
    if re.fullmatch(rf"\s*(?:{_QUOTED})(?:\s*(?:{between})\s*(?:{_QUOTED}))*\s*(?:{between})?\s*", text):
        return [name for a, b in re.findall(_QUOTED, text) if (name := (a or b).strip())]
    parts = (part.strip() for part in re.split(between, text))
    return [name for part in parts if (name := part[1:-1].strip() if re.fullmatch(_QUOTED, part) else part)]


def _bracketed(text: str) -> bool:
    return _BRACKETS.get(text[0]) == text[-1]


def _array(text: str) -> list[str] | None:
    """Names of an array as JSON, Python or numpy write it; None where nothing is quoted."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        inner = text[1:-1].strip()
        if not inner:
            return []
        if re.fullmatch(rf"(?:{_QUOTED})(?:[\s,;]+(?:{_QUOTED}))*\s*,?", inner):
            return [name for a, b in re.findall(_QUOTED, inner) if (name := (a or b).strip())]
        return None
    if not content:
        return []
    if isinstance(content, dict):  # {"choices": [...]}, as annotation tools write it
        content = next(iter(content.values())) if len(content) == 1 else content
    if not isinstance(content, list) or not all(isinstance(name, str | int) for name in content):
        raise _Doubt('is no list of names such as ["cat", "dog"]', text)
    return [name for item in content if (name := str(item).strip())]
