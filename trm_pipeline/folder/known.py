"""What is known of a folder's images: a file of labels, and answers to questions after it."""

from __future__ import annotations

from collections.abc import Sequence

from trm_pipeline.folder.labels import Labels, read_labels
from trm_pipeline.folder.options import LabelOptions
from trm_pipeline.folder.review.answers import joined, read_answers
from trm_pipeline.folder.review.formats import read_labels_as


def read_known(options: LabelOptions, images: Sequence[str], *, group: str | None = None) -> Labels:
    """Labels of the images out of the first file, with the answers of the others in their place.

    Args:
        images: files of the folder. group: a column of the first file, or "folder", see :func:`read_labels`.

    Raises:
        FileNotFoundError, ValueError: as the readers have it.
    """
    first, *answers = options.labels
    if options.separator == "":
        raise ValueError("--separator must be what stands between names, got nothing; give ' ' for spaces")
    if options.form is None:
        labels = read_labels(
            first,
            images,
            minus_one=options.minus_one,
            unlisted_absent=options.unlisted == "absent",
            separator=options.separator,
            group=group,
        )
    else:
        if options.minus_one or options.separator or group:
            raise ValueError(f"--minus-one, --separator and --group are for tables and lists, not for --form {options.form}")
        labels = read_labels_as(options.form, first, images, unlisted_absent=options.unlisted == "absent")
    return joined(labels, read_answers(answers, labels.class_names, images)) if answers else labels
