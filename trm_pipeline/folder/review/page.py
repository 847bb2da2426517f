"""The page on which a person says whether a class is in a picture: one file, no server, no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from trm_pipeline.files import replacing
from trm_pipeline.folder.image_files import read_image, why_unreadable
from trm_pipeline.folder.image_names import SHOWN, escaped
from trm_pipeline.progress import progress, say
from trm_pipeline.report.markdown import rendered

_SIDES = (320, 240, 176, 128, 96)  # pixels of a picture's longer side, the first that fits the limit
_HEAT = 32  # cells of a map's longer side at most


class Question(NamedTuple):
    """Is the class in the picture?

    Args:
        file: the image, relative to the folder of images.
        class_name: one of the page's classes.
        score: the calibrated probability that it is there.
        heat: where the model looked, (h, w), not negative; None shows nothing.
        said: "present" or "absent", if the page is about a label that is known and doubted.
    """

    file: str
    class_name: str
    score: float
    heat: np.ndarray | None = None
    said: str | None = None


class _Picture(NamedTuple):
    """A small JPEG with its width and height, or the reason why there is none."""

    content: bytes
    width: int
    height: int
    reason: str = ""


def write_review(
    path: Path,
    questions: Sequence[Question],
    class_names: Sequence[str],
    *,
    images: Path,
    title: str = "Is it in the picture?",
    limit: float = 60e6,
) -> str:
    """Write the page, and return its id.

    The page keeps answers in the browser under the id, which is the same for the same questions in the same order. It saves
    them as ``answers.csv``, which :func:`.answers.read_answers` reads.

    Args:
        path: the page, such as ``review.html``.
        questions: in the order in which they are asked; at least one, each pair once.
        class_names: of the model; the filter lists those that are asked about, in this order.
        images: the folder. A picture that cannot be read is replaced by the reason.
        title: of the page.
        limit: bytes that all pictures together may take on the page; they become smaller until they fit.

    Raises:
        ValueError: pictures that do not fit at their smallest.
    """
    places = {name: c for c, name in enumerate(class_names)}
    files = {file: i for i, file in enumerate(dict.fromkeys(question.file for question in questions))}
    pictures = _fitting([_picture(images, file) for file in progress(files, f"pictures of {len(files)} images")], limit)
    if lost := [escaped(file) for file, picture in zip(files, pictures, strict=True) if picture.reason]:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        say(f"{len(lost)} pictures cannot be read, and the page says so: {', '.join(lost[:SHOWN])}{more}")
    asked = [[escaped(q.file), escaped(q.class_name), q.said] for q in questions]
    names = [escaped(name) for name in class_names]
    identity = hashlib.blake2b(json.dumps([names, asked]).encode(), digest_size=12).hexdigest()
    data = {
        "id": identity,
        "classes": names,
        "images": [
            [escaped(file), base64.b64encode(p.content).decode(), p.width, p.height, escaped(p.reason)]
            for file, p in zip(files, pictures, strict=True)
        ],
        "questions": [
            [files[q.file], places[q.class_name], round(float(q.score), 4), q.said, None if q.heat is None else _heat(q.heat)]
            for q in questions
        ],
    }
    template = Path(__file__).with_name("review.html.j2")
    html = rendered(template, title=escaped(title), data=_script_json(data))
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return identity


def _script_json(value: object) -> str:
    """JSON in plain ASCII that no parser of HTML finds an end or a comment in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _picture(folder: Path, file: str) -> _Picture:
    try:
        return _encoded(read_image(folder / file, (_SIDES[0], _SIDES[0])), _SIDES[0])
    except FileNotFoundError:
        return _Picture(b"", 4, 3, "the file is not there")
    except Exception:  # decoders raise what they like
        return _Picture(b"", 4, 3, why_unreadable(folder / file))


def _encoded(image: Image.Image, side: int) -> _Picture:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return _Picture(content.getvalue(), *image.size)


def _fitting(pictures: list[_Picture], limit: float) -> list[_Picture]:
    """The same, at a size at which all of them fit on the page."""
    for side in _SIDES:
        pictures = [_smaller(picture, side) for picture in pictures]
        size = sum(math.ceil(len(picture.content) / 3) * 4 for picture in pictures)
        if size <= limit:
            if side < _SIDES[0]:
                say(f"the pictures are at most {side} pixels wide and high, so that {len(pictures)} fit on a page")
            return pictures
    raise ValueError(
        f"{len(pictures)} pictures take {size / 1e6:.0f} MB at {_SIDES[-1]} pixels, and a page may hold {limit / 1e6:.0f} MB; "
        "ask about fewer images"
    )


def _smaller(picture: _Picture, side: int) -> _Picture:
    if picture.reason or max(picture.width, picture.height) <= side:
        return picture
    return _encoded(Image.open(io.BytesIO(picture.content)), side)


def _heat(values: np.ndarray) -> list[Any]:
    """A map as h, w and bytes in base64, of which the highest is 255."""
    heat = np.nan_to_num(values.astype(np.float32), posinf=0.0).clip(0)
    if max(heat.shape) > _HEAT:
        height, width = (max(1, round(n * _HEAT / max(heat.shape))) for n in heat.shape)
        heat = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.BOX))
    scaled = (heat * (255 / (float(heat.max()) or 1.0))).round().astype(np.uint8)
    return [*scaled.shape, base64.b64encode(scaled.tobytes()).decode()]
