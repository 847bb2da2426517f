"""Classes that training never saw a label of, scored by their names alone."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import torch

from trm_losses import PromptEmbeddings
from trm_losses.metrics import mean_average_precision
from trm_pipeline import ranks
from trm_pipeline.files import write_json
from trm_pipeline.methods import zero_shot_tokens
from trm_pipeline.methods.base import score
from trm_pipeline.methods.global_head import trm_head
from trm_pipeline.report.markdown import markdown
from trm_pipeline.report.rows import heading
from trm_pipeline.run.cells import checkpoint_path, train_with_checkpoint
from trm_pipeline.run.options import RunOptions
from trm_pipeline.run.prepared import Cell, Prepared


def seen_part(data: Prepared, unseen: int) -> Prepared:
    """The data as if the last ``unseen`` classes did not exist."""
    names = data.names
    if names is not None:
        names = PromptEmbeddings(names.embeddings[:-unseen], names.eot[:-unseen])
    return dataclasses.replace(
        data,
        heads={},
        text=data.text[:-unseen],
        names=names,
        targets=data.targets[:, :-unseen],
        test_targets=data.test_targets[:, :-unseen],
        class_names=data.class_names[:-unseen],
        labels=None if data.labels is None else data.labels[:, :-unseen],
    )


def unseen_row(data: Prepared, cell: Cell, options: RunOptions) -> dict[str, Any]:
    """Train without the last ``--unseen`` classes, then score all of them; mAP of both parts beside token zero-shot.

    The new classes join the trained head by name: their texts are those of the frozen model, their bias is the mean of the
    trained ones.
    """
    cell = cell._replace(method=f"{cell.method}-unseen{options.unseen}")
    path = options.output / "unseen" / f"{cell.name}.json"
    if not ranks.from_first(path.exists()):  # else it is of the run that is resumed
        row: dict[str, Any] = _train_and_score(data, cell, options)
        if not ranks.first():
            return row
        write_json(path, row)
    checkpoint_path(options.output, cell).unlink(missing_ok=True)
    row = json.loads(path.read_text(encoding="utf-8"))
    return row


def _train_and_score(data: Prepared, cell: Cell, options: RunOptions) -> dict[str, Any]:
    trained = train_with_checkpoint(seen_part(data, options.unseen), cell, options, method="trm", preset=data.preset)
    with torch.no_grad():
        text = data.encode(trained.method.prompts())
    head = trm_head(trained.method, text, data.class_names[: -options.unseen])
    assert head is not None
    head = head.with_classes(torch.cat([text, data.text[-options.unseen :]]), data.class_names).eval()
    row: dict[str, Any] = {"known": cell.known, "seed": cell.seed, "unseen": data.class_names[-options.unseen :]}
    for name, logits in (
        ("trm", lambda batch: head(batch.tokens, batch.penultimate)),
        ("zero-shot-tokens", partial(zero_shot_tokens, text=data.text)),
    ):
        scores = score(logits, data.test_features, data.preset.batch_size)
        for part, columns in (("seen", slice(None, -options.unseen)), ("unseen", slice(-options.unseen, None))):
            precision = mean_average_precision(scores[:, columns], data.test_targets[:, columns])
            row[f"{name} {part}"] = round(100 * float(precision), 3)
    return row


def unseen_table(rows: list[dict[str, Any]]) -> str:
    """mAP on seen and unseen classes, a line for each setting and seed."""
    keys = [key for key in rows[0] if key not in ("known", "seed", "unseen")]
    lines = [[heading(rows, row["known"]), str(row["seed"]), *(f"{row[key]:.1f}" for key in keys)] for row in rows]
    return markdown([["known", "seed", *keys], *lines])
