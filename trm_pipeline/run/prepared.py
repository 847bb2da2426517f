"""A cell of a run's table, what all cells share, and the training of one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_losses import GaussianDiscriminant, GlobalHead
from trm_losses.labels import UNKNOWN, hide_labels, keep_single_positive, move_positives
from trm_pipeline.config.presets import Known, Preset
from trm_pipeline.features.cached import Batch
from trm_pipeline.features.frozen import Frozen
from trm_pipeline.files import tensor_digest
from trm_pipeline.methods import ZERO_SHOT, Method, Setting, fit_training_free
from trm_pipeline.methods.base import score
from trm_pipeline.methods.global_head import fit_global_head, global_logits
from trm_pipeline.methods.grid import build_method
from trm_pipeline.training.loop import Trained, train


class Cell(NamedTuple):
    """A method (or a variant of one) in a setting with a seed; ``wrong`` is the share of present labels that are moved."""

    method: str
    known: Known
    seed: int
    wrong: float = 0.0

    @property
    def name(self) -> str:
        """For files."""
        setting = self.known if isinstance(self.known, str) else f"known{self.known:g}"
        return f"{self.method}-{setting}{f'-wrong{self.wrong:g}' if self.wrong else ''}-seed{self.seed}"

    @property
    def record(self) -> dict[str, Any]:
        """For rows: the fields, ``wrong`` only if there is any."""
        return {key: value for key, value in self._asdict().items() if key != "wrong" or value}

    @property
    def label(self) -> str:
        """For people."""
        setting = self.known if isinstance(self.known, str) else f"{100 * self.known:g}%"
        return f"{self.method}, {setting}{f', {100 * self.wrong:g}% wrong' if self.wrong else ''}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Prepared(Frozen):
    """What all cells of a run share: the frozen model's part, and the labels of both splits."""

    preset: Preset
    device: torch.device
    targets: Tensor
    test_targets: Tensor  # unknown as a whole in a class that cannot be ranked
    test_paths: list[str]  # image files
    name: str  # of the data set and its split
    class_names: list[str]
    description: str
    labels: Tensor | None = None  # known labels out of a file, in place of those that a setting and a seed leave
    heads: dict[tuple[Any, ...], GlobalHead | None] = field(default_factory=dict)  # of whole images, once fitted
    layers: dict[tuple[Any, ...], dict[str, Tensor]] = field(default_factory=dict)  # logits of such heads, to choose among
    taught: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # similarities, by teacher and texts
    label_free: dict[str, tuple[dict[str, float | None], float]] = field(default_factory=dict)  # metrics and seconds, once found

    @cached_property
    def training_free(self) -> GaussianDiscriminant:
        """The classifier without labels, fitted where it is first asked for."""
        return fit_training_free(self.features, self.text, self.preset.batch_size, **self.preset.training_free)

    def similarities(self, teacher: str) -> Tensor:
        """Cosines (N, C) of the training images with the classes, of one of TEACHERS; found where they are first asked for."""
        key = teacher, tensor_digest(self.text)  # of other classes they are others
        if key not in self.taught:
            with torch.random.fork_rng(devices=()):  # a loader draws a seed: a cell must not tell whether it is the first to ask
                self.taught[key] = score(self.label_free_scores(teacher), self.features, self.preset.batch_size)
        return self.taught[key]

    def label_free_scores(self, method: str) -> Callable[[Batch], Tensor]:
        """Scores (B, C) of a batch, by a method that learns nothing of labels."""
        if method in ZERO_SHOT:
            return lambda batch: ZERO_SHOT[method](batch, self.text)
        return lambda batch: self.training_free(batch.tokens)

    def with_labels(self, labels: Tensor) -> Prepared:
        """The same with these known labels (N, C), and with what was found without any."""
        found = dataclasses.replace(self, labels=labels)
        vars(found)["training_free"] = self.training_free
        return found

    def global_head(self, targets: Tensor, preset: Preset, *, single: bool, prior: bool | None = None) -> GlobalHead | None:
        """The head of whole images, fitted to labels (N, C); None where there is nothing for it to read."""
        prior = preset.global_prior if prior is None else prior
        expected = preset.expected_positives if single else None
        key = tensor_digest(targets), prior, preset.global_penultimate, expected, tuple(sorted(preset.global_head.items()))
        if key not in self.heads:
            # Two are kept: methods with the same labels follow each other, each with a part of them and then with all.
            for old in [*self.heads][:-1]:
                del self.heads[old]
            self.heads[key] = fit_global_head(
                self.features,
                targets,
                self.training_free if prior else None,
                preset.batch_size,
                penultimate=preset.global_penultimate,
                expected_positives=expected,
                scores=self.similarities("training-free") if prior else None,
                **preset.global_head,
            )
        return self.heads[key]


def known_labels(data: Prepared, cell: Cell) -> Tensor:
    """What a cell leaves of the labels (N, C): seed s hides and moves them with seed s - 1; a file of labels is as it is."""
    if data.labels is not None:
        return data.labels
    seed = cell.seed - 1
    if isinstance(cell.known, str):
        left = keep_single_positive(data.targets, seed=seed)
    else:
        left = hide_labels(data.targets, cell.known, seed=seed)
    if cell.known and not (left != UNKNOWN).any():
        there = int((data.targets != UNKNOWN).sum())
        raise ValueError(f"--known {cell.known} leaves no label known of {there} in training; give more labels, or another share")
    return move_positives(left, data.targets, cell.wrong, seed=seed) if cell.wrong else left


def build(data: Prepared, cell: Cell, *, method: str, preset: Preset) -> tuple[Method, Tensor]:
    """A method at its start, and what a cell's setting and seed leave of the labels."""
    targets = known_labels(data, cell)
    steps = preset.epochs * -(-len(data.features) // preset.batch_size)
    torch.manual_seed(cell.seed)
    single, samples = cell.known == "single", len(data.features)

    @functools.cache
    def global_head() -> GlobalHead | None:
        return data.global_head(targets, preset, single=single)

    def estimates() -> Tensor | None:
        head = global_head()
        return None if head is None else torch.sigmoid(global_logits(head, data.features, preset.batch_size))

    setting = Setting(
        preset,
        data.text,
        data.names,
        data.logit_scale,
        steps,
        single=single,
        num_samples=samples,
        targets=targets,
        similarities=lambda: data.similarities(preset.teacher),
        global_head=global_head,
        estimates=estimates,
    )
    return build_method(method, setting), targets


def train_cell(
    data: Prepared, cell: Cell, preset: Preset, *, method: str, label: str | None = None, scored: bool = True, **more: Any
) -> Trained:
    """Train a method on what a cell's setting and seed leave of the labels; ``more`` are arguments of :func:`.train`.

    Args:
        label: default: the cell's own.
        scored: whether the test images are scored on the way.
    """
    built, targets = build(data, cell, method=method, preset=preset)
    return train(
        built,
        data.features,
        targets,
        data.test_features if scored else None,
        data.test_targets,
        encode=data.encode,
        preset=preset,
        seed=cell.seed,
        device=data.device,
        label=label or cell.label,
        single=cell.known == "single",
        **more,
    )
