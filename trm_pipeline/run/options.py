"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trm_pipeline.config.presets import HELD_OUT, Known, Preset
from trm_pipeline.data.base import Place, Source


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The command line, read and checked; it travels into the processes of ``--jobs``.

    Fields are the arguments of :func:`trm_pipeline.run.arguments.parser` by their names, but for ``preset``, which holds what
    they change of it, and ``methods`` and ``known``, which are spelled out; ``known`` is empty with a file of labels.
    """

    source: Source
    place: Place
    preset: Preset
    known: tuple[Known, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    wrong: float
    ablation: bool
    ablation_known: tuple[Known, ...] | None
    unseen: int
    tune: bool
    choose: bool
    labels: Path | None
    labels_encoding: str | None
    class_names: Path | None
    class_texts: Path | None
    output: Path
    resume: bool
    jobs: int
    workers: int
    device: str
    amp: bool
    deterministic: bool
    tensorboard: bool
    typed: tuple[str, ...]

    @property
    def splits(self) -> tuple[str, str]:
        """What is trained on and what is scored."""
        preset = self.preset
        if self.tune:
            return ("fit" if preset.val_split == HELD_OUT else "train"), preset.val_split
        return preset.train_split, preset.test_split
