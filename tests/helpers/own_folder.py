"""A folder of one's own images: its classes and its tables."""

import csv
import json
import re

CLASSES = ["person", "car", "dog", "sheep"]


def write_table(path, rows, *, classes=CLASSES, hidden=()):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(["image", *classes])
        for i, (name, values) in enumerate(rows.items()):
            cells = ["" if (i + c) % 3 in hidden else value for c, value in enumerate(values)]
            csv.writer(file).writerow([name, *cells])
    return path


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def questions_of(page):
    """The data of a page of questions."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(text)
