"""Sentences of the README, the pages beside it and those of docs/ stay short: 16 words on average, 2 in 100 over 35, at most.

How a sentence is found:

- Left out are fenced and indented code, tables, headings, pictures, comments, displayed formulas and lines of tools (`:::`).
- A link counts as its text. Inline code and an inline formula count as one word each.
- A sentence ends with a full stop, a question mark or an exclamation mark before a blank, and with its paragraph.
- A list item, an admonition's title, and a paragraph before a list, a table or code end with their last line, full stop or not.
- Colons and semicolons end nothing.
- A word is whatever blanks surround, if it has a letter or a digit.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers import ROOT

PAGES = [*sorted(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"), *sorted((ROOT / "docs").rglob("*.md"))]
ITEM = re.compile(r"(?:[*+-]|\d+[.)])\s+")
SHORT_FORM = re.compile(r"(?:\b(?:al|e\.g|i\.e|cf|vs|Fig|Eq|Sec|approx))\.$")


def paragraphs(text: str) -> list[str]:
    """Prose of a Markdown page, a string for each paragraph or list item."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^([ \t]*)(`{3,}|~{3,}).*?^[ \t]*\2[ \t]*$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^[ \t]*\$\$.*?\$\$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    found, inside = [""], False  # inside: a list or an admonition, whose text may be indented
    for line in text.splitlines():
        bare, indent = line.strip(), len(line) - len(line.lstrip())
        if not bare:
            found.append("")
            continue
        inside = inside and (indent > 0 or found[-1] != "") or bool(ITEM.match(bare)) or bare.startswith(("!!! ", "??? ", "=== "))
        code = indent >= 4 and not inside and found[-1] == ""
        if code or bare.startswith(("|", "#", "![", "---", ":::")) or re.match(r"</?[a-z]+[ >]", bare):
            found.append("")
        elif bare.startswith(("!!! ", "??? ", "=== ")):
            found += [" ".join(re.findall(r'"(.*?)"', bare)), ""]
        elif ITEM.match(bare):
            found.append(ITEM.sub("", bare, count=1))
        else:
            found[-1] += " " + bare
    return [paragraph.strip() for paragraph in found if paragraph.strip()]


def plain(paragraph: str) -> str:
    """Without marks and the targets of links; code and formulas are a word each."""
    for pattern, instead in (
        (r"`+[^`]+`+", "code"),
        (r"\$[^$]+\$", "formula"),
        (r"!\[[^]]*\]\([^)]*\)", ""),
        (r"\[([^]]*)\](?:\([^)]*\)|\[[^]]*\])", r"\1"),
        (r"[*_]{2}|(?<!\w)[*_]|[*_](?!\w)", ""),
    ):
        paragraph = re.sub(pattern, instead, paragraph)
    return paragraph


def sentences(text: str) -> list[str]:
    found: list[str] = []
    for paragraph in map(plain, paragraphs(text)):
        start = 0
        for end in re.finditer(r"[.!?][)\"”]*(?=\s|$)", paragraph):
            sentence = paragraph[start : end.end()]
            if not SHORT_FORM.search(sentence) or end.end() == len(paragraph):
                found.append(sentence)
                start = end.end()
        found.append(paragraph[start:])
    words = (" ".join(word for word in sentence.split() if re.search(r"\w", word)) for sentence in found)
    return [sentence for sentence in words if sentence]


def lengths(text: str) -> list[int]:
    return [len(sentence.split()) for sentence in sentences(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).with_suffix("").as_posix())
def test_sentences_are_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    counted = lengths(text)
    longest = sorted(sentences(text), key=lambda sentence: -len(sentence.split()))[:5]
    assert sum(counted) <= 16 * len(counted), longest
    assert sum(count > 35 for count in counted) <= max(1, 0.02 * len(counted)), longest


def test_the_measure_counts_what_a_reader_reads() -> None:
    text = """# A heading of many words that nobody counts

One two three. Four `five six` $s e v e n$ [eight nine](ten.md), et al. (2020) ten: eleven; twelve!
The third sentence goes
over two lines

* an item without a stop
* an item of two. Its second.

      not code, for it belongs to the item

| a | table |
|---|---|

$$formula of its own$$

```python
code = 1. + 2.
```

    code by its indent. Too.

**Last** one? Yes.
"""
    assert lengths(text) == [3, 11, 7, 5, 4, 2, 8, 2, 1]


def test_the_measure_fails_long_sentences() -> None:
    page = "Short one. " + " ".join(["word"] * 40) + "."
    assert max(lengths(page)) == 40
    assert sum(lengths(page)) / 2 > 16
