"""A run that is killed at random moments, again and again, ends in the results of the unbroken one."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import typed
from trm_losses import TRMHead
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.run import experiment

KILLS = int(os.environ.get("TRM_LOSSES_KILLS", "50"))
ARGUMENTS = typed(
    preset="embedded",
    methods=("trm", "trm-rule-teacher", "linear"),
    known=0.5,
    epochs=2,
    set="batch_size=8",
    device="cpu",
    workers=0,
)
SIZES = {"train": 48, "val": 8, "test": 32}
LEFT = ("results.json", "run.json", "pseudo/trm-rule-teacher-known0.5-seed1.json")


def _run(cache: Path, output: Path, said: Path) -> None:
    """Scenes and the command in a process of its own; what it says goes into a file."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    root = write_drawn_voc(cache, sizes=SIZES, workers=1)
    experiment.main([*typed(data_root=root, cache=cache, output=output), *ARGUMENTS, "--resume"])


@pytest.mark.nightly
def test_a_run_killed_at_random_moments_ends_in_the_results_of_the_unbroken_one(tmp_path: Path) -> None:
    """Drawing, encoding, epochs and the writing of results alike; the processes are forked where all is imported already."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["trm_pipeline.run.experiment"])
    chance, said = random.Random(0), tmp_path / "said.txt"

    def start(cache: Path, output: Path) -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=_run, args=(cache, output, said))
        process.start()
        return process

    unbroken = tmp_path / "unbroken"
    start(tmp_path / "scrap", tmp_path / "scrap").join()  # starts the server of the forks
    took = -time.monotonic()
    process = start(tmp_path / "cache", unbroken)
    process.join()
    took += time.monotonic()
    assert process.exitcode == 0, said.read_text(encoding="utf-8")

    kills = finished = 0
    while kills < KILLS:
        cache, output = tmp_path / f"cache{finished}", tmp_path / f"out{finished}"
        while True:
            process = start(cache, output)
            process.join(chance.uniform(0, took))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                if kills < KILLS:
                    continue
                process = start(cache, output)
                process.join()
            assert process.exitcode == 0, said.read_text(encoding="utf-8")
            break
        for name in LEFT:
            assert (output / name).read_bytes() == (unbroken / name).read_bytes(), name
        heads = [TRMHead.load(folder / "trm-known0.5-seed1.pt").state_dict() for folder in (output, unbroken)]
        assert all((value == heads[1][key]).all() for key, value in heads[0].items())
        assert not list((output / "checkpoints").iterdir()), "a checkpoint outlived its cell"
        finished += 1
    print(f"{kills} kills in {finished} runs of {took:.1f} s", file=sys.stderr)
    assert finished > 1
