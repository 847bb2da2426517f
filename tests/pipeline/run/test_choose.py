"""Settings chosen by known labels that were held out."""

import pytest
import torch

from tests.helpers.runs import read_json
from trm_losses.labels import keep_single_positive
from trm_pipeline.config import losses
from trm_pipeline.config.presets import EMBEDDED
from trm_pipeline.config.settings import override
from trm_pipeline.methods import global_head
from trm_pipeline.run import choose


def truth(images=400, classes=10):
    return (torch.rand(images, classes, generator=torch.Generator().manual_seed(0)) < 0.2).float()


def test_every_loss_has_numbers_of_its_own_to_choose_from():
    """With the five rates at most eight candidates."""
    for loss, numbers in losses.CANDIDATES.items():
        assert 0 < len(numbers) <= 3 and len({tuple(sorted(own.items())) for own in numbers}) == len(numbers)
        for own in numbers:
            assert set(own) <= set(losses.LOSSES[loss]) and own != {name: losses.LOSSES[loss][name] for name in own}
            assert (
                override(EMBEDDED, [f"{loss}.{name}={value}" for name, value in own.items()]).losses[loss].items() >= own.items()
            )


@pytest.mark.parametrize("single", [False, True])
def test_what_is_held_out_is_known_and_no_longer_trained_on(single):
    full = truth()
    known = keep_single_positive(full, seed=0) if single else torch.where(torch.rand(full.shape) < 0.5, full, -1.0)
    held = choose.hold_out(known, single=single, seed=3)
    asked = held.asked >= 0
    assert (held.kept[asked] == -1).all() and torch.equal(held.kept[~asked], known[~asked])
    if single:
        rows = asked.any(dim=1)
        assert asked[rows].all() and torch.equal(held.asked[rows] == 1, known[rows] == 1)  # what is unknown counts as absent
        assert rows.float().mean() == pytest.approx(choose.SHARE, abs=0.07)
    else:
        assert torch.equal(held.asked[asked], known[asked])
        assert asked.sum() / (known >= 0).sum() == pytest.approx(choose.SHARE, abs=0.05)
    assert torch.equal(choose.hold_out(known, single=single, seed=3).kept, held.kept)
    assert not torch.equal(choose.hold_out(known, single=single, seed=4).kept, held.kept)


def test_precisions_are_those_of_one_ranking_of_all_entries():
    """Against a loop over the entries: the share of present ones among those that score at least as high."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (7, 5), generator=draw).float()  # with ties
    logits[0, 0] = torch.nan
    asked = torch.randint(-1, 2, (7, 5), generator=draw).float()
    asked[0, 0] = 1
    entries = [
        (float("-inf") if z != z else z, y)
        for z, y in zip(logits.flatten().tolist(), asked.flatten().tolist(), strict=True)
        if y >= 0
    ]
    wanted = []
    for score, label in entries:
        above = [y for z, y in entries if z >= score]
        wanted += [100 * sum(above) / len(above)] * (label == 1)
    assert choose.precisions(logits, asked).tolist() == pytest.approx(wanted)
    assert choose.pooled_ap(logits, asked) == pytest.approx(sum(wanted) / len(wanted))
    assert choose.pooled_ap(logits, 0 * asked) == choose.pooled_ap(logits, 0 * asked - 1) == 0


def test_global_heads_are_ranked_by_the_chance_to_be_named():
    """Of four present classes each is named less often than the only one, however sure all of them are."""
    logits = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = choose.named(logits)
    for row, chances in zip(logits.double().tolist(), found.exp().tolist(), strict=True):
        present = [1 / (1 + 2.718281828459045**-z) for z in row]
        assert chances == pytest.approx([p / sum(present) for p in present])
    crowded, alone = torch.full((1, 4), 3.0), torch.tensor([[2.0, -9.0, -9.0, -9.0]])
    first = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    logits, asked = torch.cat([crowded, alone]), torch.cat([first, first])
    assert choose.pooled_ap(choose.named(logits), asked) > choose.pooled_ap(logits, asked)
    assert choose.named(torch.full((1, 4), -1e4)).isfinite().all()


def test_trained_methods_are_ranked_by_the_order_of_images_in_a_class():
    """Against a loop over pairs of images. What others say of images that were not held out does not matter, nor the level."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (30, 4), generator=draw).float()  # with ties
    logits[3, 1] = torch.nan
    asked = torch.full((30, 4), -1.0)
    asked[:12] = 0
    asked[torch.arange(12), torch.randint(3, (12,), generator=draw)] = 1  # the last class is never named
    asked[3] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    wanted = []
    for row, column in (asked == 1).nonzero().tolist():
        own = [float("-inf") if z != z else z for z in logits[:12, column].tolist()]
        wanted.append(100 * sum((z < own[row]) + 0.5 * (z == own[row]) for z in own) / 12)
    found = choose.percentiles(logits, asked)
    assert found.tolist() == pytest.approx(wanted)
    moved = logits * torch.tensor([2.0, 0.5, 1.0, 9.0]) + torch.tensor([5.0, -7.0, 0.0, 1.0])
    torch.testing.assert_close(choose.percentiles(moved, asked), found)
    assert len(choose.percentiles(logits, torch.zeros(30, 4))) == len(choose.percentiles(logits[:0], asked[:0])) == 0


def test_a_candidate_has_to_gain_more_than_one_standard_error():
    """Gains of 3 ± 1, 4 ± 4 and 1 ± 0 over four entries: means less standard errors are 2, 0 and 1."""
    default = torch.tensor([50.0, 60.0, 70.0, 80.0], dtype=torch.float64)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64) * 3**0.5  # of which the standard error of the mean is 1
    found = {"as it is": default, "sure": default + 3 + noise, "lucky": default + 4 + 4 * noise, "small": default + 1}
    assert choose.clearest(found) == "sure"
    assert choose.clearest({name: values for name, values in found.items() if name != "sure"}) == "small"
    assert choose.clearest({"as it is": default, "lucky": default + 4 + 5 * noise}) == "as it is"
    assert choose.clearest({name: values[:1] for name, values in found.items()}) == "as it is"  # one entry tells nothing
    assert choose.clearest({name: values[:0] for name, values in found.items()}) == "as it is"


def test_single_positives_have_measures_of_their_own(run, monkeypatch):
    """Of trained methods the place in a class, of global heads the chance to be named; elsewhere neither."""
    monkeypatch.setattr(choose, "FACTORS", (1.0,))
    monkeypatch.setattr(choose, "LAYERS", ((1.0, 3.0),))
    used = []
    for name in ("percentiles", "named"):
        own = getattr(choose, name)
        monkeypatch.setattr(choose, name, lambda *given, name=name, own=own: used.append(name) or own(*given))
    for method, known, wanted in (("linear", "single", "percentiles"), ("global", "single", "named"), ("trm", "0.5", None)):
        used.clear()
        run("--choose", "--methods", method, "--known", known)
        assert set(used) == {wanted} - {None}


def test_the_best_of_each_list_is_trained_on_everything(run, tmp_path, monkeypatch):
    """A layer, a factor and a share of each method; what an earlier run chose is not chosen again."""
    monkeypatch.setattr(choose, "FACTORS", (1.0, 1e-6))
    monkeypatch.setattr(choose, "LAYERS", ((1.0, 3.0), (1.0, 1e-4)))
    monkeypatch.setattr(choose, "CANDIDATES", {"hill": ({"strength": 3.0},)})
    monkeypatch.setattr(choose, "clearest", lambda found: max(found, key=lambda name: float(found[name].mean())))  # on few labels
    fits = []
    original = global_head.fit_global_head
    monkeypatch.setattr("trm_pipeline.run.prepared.fit_global_head", lambda *a, **k: fits.append(a[1]) or original(*a, **k))
    typed = ("--choose", "--methods", "linear", "linear+hill", "global", "trm", "--known", "0.5", "single")
    typed += ("--set", "global-head.spread=0.0001")  # a bad start, which the list mends
    rows = run(*typed)
    assert [(row["method"], row["known"]) for row in rows] == [
        (m, k) for k in (0.5, "single") for m in ("linear", "linear+hill", "global", "trm")
    ]
    for cell, kinds in (
        ("linear-known0.5", ["lr_factor"]),
        ("linear+hill-known0.5", ["lr_factor"]),
        ("global-known0.5", ["global-head.shrinkage", "global-head.spread"]),
        ("trm-known0.5", ["global-head.shrinkage", "global-head.spread", "lr_factor", "merge_rate"]),
    ):
        found = read_json(tmp_path / "out" / "chosen" / f"{cell}-seed1.json")
        own = [name for name in found["scores"] if name.startswith("hill")]
        assert len(own) == ("hill" in cell)
        better = [name for name in own if found["scores"][name] > max(v for n, v in found["scores"].items() if n not in own)]
        assert [change for change in found["changes"] if change in own] == better
        assert [change.split("=")[0] for change in found["changes"] if change not in own] == kinds
        for kind in {kind.split(".")[0] for kind in kinds}:  # the best of its list
            best = max((name for name in found["scores"] if name.startswith(kind)), key=found["scores"].get)
            assert set(best.split()) <= set(found["changes"])
    # Candidates are fitted to fewer labels than what comes of them, in both settings.
    assert len({int((targets >= 0).sum()) for targets in fits}) == 4
    monkeypatch.setattr(choose, "search", None)
    (tmp_path / "out" / "results.json").unlink()
    assert run(*typed, "--resume") == rows  # what was chosen is read again
    with pytest.raises(TypeError, match="NoneType"):
        run(*typed)
