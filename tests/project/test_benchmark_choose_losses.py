"""The settings that the numbers of other losses were chosen from."""

import itertools

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("safetensors")

from tests.helpers.grid import setting
from trm_pipeline.config import presets
from trm_pipeline.config.losses import LOSSES
from trm_pipeline.methods import grid


@pytest.fixture
def choose_losses(benchmark_script):
    return benchmark_script("choose_losses")


def test_every_loss_has_as_many_settings_to_choose_from_and_the_published_one_among_them(choose_losses):
    assert set(choose_losses.CANDIDATES) == set(LOSSES)
    for loss, settings in choose_losses.CANDIDATES.items():
        assert settings[0] == {} and len(settings) == choose_losses.BUDGET
        whole = [{"lr_factor": 1.0, **LOSSES[loss], **numbers} for numbers in settings]
        assert all(whole.count(numbers) == 1 and list(numbers) == list(whole[0]) for numbers in whole), loss
        for numbers in whole:
            grid.build_method(f"text-pixel+{loss}", setting(losses={**LOSSES, loss: numbers}))


def test_a_round_sets_all_numbers_of_a_loss_and_none_that_another_reads(choose_losses, monkeypatch, tmp_path, capsys):
    """Whatever the preset has by now; a method reads its own candidate or, SCPNet of SPLC, what stands in the preset."""
    seen = []

    def run(options):
        seen.append((options.preset, list(options.methods)))
        return [{"method": name, "known": known, "mAP": len(seen)} for name in options.methods for known in (0.1, 0.5, "single")]

    monkeypatch.setattr(choose_losses.experiment, "run", run)
    with pytest.raises(SystemExit):
        choose_losses.main(["--output", str(tmp_path), "--losses", "scpnet", "splc"])
    assert "scpnet reads the numbers of splc" in capsys.readouterr().err and not seen
    for chosen in ([], ["--losses", "scpnet"], ["--losses", "sst", "sarb"]):
        seen.clear()
        choose_losses.main(["--output", str(tmp_path), *chosen])
        assert len(seen) == choose_losses.BUDGET
        for number, (found, names) in enumerate(seen):
            for (head, loss), single in itertools.product((name.split("+") for name in names), (False, True)):
                wanted = {"lr_factor": 1.0, **LOSSES[loss], **choose_losses.CANDIDATES[loss][number]}
                assert found.loss_options(head, loss, single=single) == wanted
                if loss == "scpnet":
                    own = presets.EMBEDDED.loss_options(head, "splc", single=single)
                    assert found.loss_options(head, "splc", single=single) == own
        said = capsys.readouterr().out  # the last round is the best one
        assert all(f'"*+{loss}": {choose_losses.CANDIDATES[loss][-1]},' in said for loss in {n.split("+")[1] for n in names})


def test_what_the_preset_has_is_among_them(choose_losses):
    for tuned in (presets.EMBEDDED.tuned, presets.EMBEDDED.tuned_single):
        for method, numbers in tuned.items():
            assert numbers in choose_losses.CANDIDATES[method.partition("+")[2]]


def test_the_best_setting_is_told_for_the_heads_that_share_it(choose_losses):
    up, first, last = [float(n) for n in range(10)], [9.0, *[0.0] * 9], [0.0] * 9 + [9.0]
    found = {
        "linear+em": up,
        "text-pixel+em": up,
        "linear+an": first,
        "text-pixel+an": last,
        "linear+epr": last,
        "text-pixel+epr": first,
        "linear+wan": first,
        "text-pixel+wan": first,
    }
    best = {loss: settings[9] for loss, settings in choose_losses.CANDIDATES.items()}
    assert choose_losses.chosen(found) == {"*+em": best["em"], "linear+an": {}, "*+an": best["an"], "linear+epr": best["epr"]}
    cells = [("a", 0.1, 1.0), ("a", 0.5, 2.0), ("a", "single", 7.0), ("b", 0.1, 9.0)]
    rows = [dict(zip(("method", "known", "mAP"), cell, strict=True)) for cell in cells]
    assert choose_losses.scores([rows, rows[1:]], "a", (0.1, 0.5)) == [1.5, 2.0]
