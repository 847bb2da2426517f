"""What a method makes of unknown labels, and what its variants lack."""

import math
import types

import pytest
import torch

from tests.helpers.grid import in_memory
from trm_losses import Calibration, GaussianDiscriminant, GlobalHead
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.config.settings import override
from trm_pipeline.features import cached as features
from trm_pipeline.methods import grid
from trm_pipeline.methods.global_head import fit_global_head


@pytest.mark.parametrize("single", [False, True])
def test_the_labeller_is_told_what_single_positives_cannot_tell(single):
    text, estimates = torch.randn(20, 8), lambda: torch.rand(3, 20)
    preset = override(presets.EMBEDDED, ["pseudo_rule=teacher"])
    setting = methods.Setting(preset, text, None, 100.0, 10, single=single, num_samples=3, estimates=estimates)
    labeler = methods.METHODS["trm"](setting).objective.labeler
    assert labeler.expected_positives == (2.4 if single else None)


def test_the_level_of_few_classes_is_below_all_of_them():
    """Whatever a preset, or a folder of features, says that an image shows."""
    torch.manual_seed(0)
    tokens, targets = torch.randn(6, 3, 8), torch.where(torch.rand(6, 2) < 0.5, 1.0, -1.0)
    batch = features.Batch(tokens, tokens[:, 0], torch.arange(6))
    images = types.SimpleNamespace(views=1, batches=lambda *_, **__: iter([batch]))
    prior = GaussianDiscriminant(2, 8).fit([tokens], torch.randn(2, 8))
    head = fit_global_head(images, targets, prior, 6, penultimate=False, expected_positives=2.4)
    assert float(torch.sigmoid(head(tokens)).sum(dim=1).mean()) == pytest.approx(1.8, abs=1e-3)


def test_weak_negatives_follow_their_equation():
    torch.manual_seed(0)
    query, region = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True).unbind()
    targets = torch.randint(-1, 2, (5, 4)).double()
    expected = sum(
        factor * math.log(1 + math.exp(float(logits[b, c].detach())))
        for factor, logits in ((1.0, query), (0.5, region))
        for b in range(5)
        for c in range(4)
        if targets[b, c] == -1
    )
    terms = methods.weak_negatives(targets, 0.3, (1.0, query), (0.5, region))
    assert float(terms["weak_negative"].detach()) == pytest.approx(0.3 * 4 * expected / 5, rel=1e-9)  # 4 classes
    (gradient,) = torch.autograd.grad(terms["weak_negative"], query)
    assert ((gradient != 0) == (targets == -1)).all()
    assert methods.weak_negatives(targets, 0.0, (1.0, query)) == {}


@pytest.mark.parametrize("method", ["linear", "text-pixel", "trm-region", "trm-paper"])
def test_every_method_takes_unknown_labels_for_weak_negatives(method):
    torch.manual_seed(0)
    text = torch.randn(4, 8)
    setting = methods.Setting(presets.EMBEDDED, text, None, 100.0, 10, num_samples=3, estimates=lambda: torch.rand(3, 4))
    trained = methods.METHODS[method](setting)
    batch = features.Batch(torch.randn(3, 5, 8), torch.randn(3, 8), torch.arange(3))
    targets = torch.tensor([[1, -1, -1, -1], [-1, 1, -1, -1], [0, -1, -1, -1.0]])
    plain, weak = (trained.loss(batch, text, targets, weight) for weight in (0.0, 0.3))
    assert set(weak) - set(plain) == {"weak_negative"}
    assert float(weak["weak_negative"].detach()) > 0
    if method == "trm-paper":
        output = trained._last
        both = torch.nn.functional.softplus(output.logits) + torch.nn.functional.softplus(output.region_logits)
        torch.testing.assert_close(weak["weak_negative"], 0.3 * 4 / 3 * both[targets == -1].sum())


@pytest.mark.parametrize(
    ("method", "until", "steps"),
    [
        ("trm", "warmup", 20),
        ("trm-rule-teacher", "end", 20),
        ("trm-rule-teacher", "warmup", 4),
        ("trm-paper", "warmup", 4),
        ("trm-region", "warmup", 20),
        ("linear", "warmup", 20),
    ],
)
def test_weak_negatives_last_until_pseudo_labels_take_their_place(run, monkeypatch, method, until, steps):
    weights = []
    kind = methods.LinearProbe if method == "linear" else methods.TRM
    original = kind.loss
    monkeypatch.setattr(kind, "loss", lambda self, *a: weights.append(a[3]) or original(self, *a))
    settings = ["batch_size=4", f"single_negative_until={until}", "single_negative=0.2", "pseudo_warmup=0.2"]
    run("--methods", method, "--known", "single", "0.5", "--set", *settings)
    assert weights[:20] == [0.2] * steps + [0.0] * (20 - steps)
    assert weights[20:] == [0.0] * 20


def variant(name, text):
    preset = override(presets.EMBEDDED, [presets.VARIANTS[name]] if name in presets.VARIANTS else [])
    return grid.build_method("trm" if name in presets.VARIANTS else name, setting(preset, text))


def setting(preset, text):
    torch.manual_seed(0)
    tokens, penultimate = torch.randn(3, 5, 8), torch.randn(3, 6)
    prior = GaussianDiscriminant(4, 8).fit([tokens], text)
    targets = torch.tensor([[1, -1, 0, -1], [-1, 1, -1, 0], [0, -1, -1, -1.0]])
    width = 6 if preset.global_penultimate else None
    head = GlobalHead(4, width, prior if preset.global_prior else None).fit([(tokens, penultimate, targets)])
    estimates = lambda: torch.sigmoid(head(tokens, penultimate))  # noqa: E731
    return methods.Setting(preset, text, None, 100.0, 10, num_samples=3, global_head=lambda: head, estimates=estimates)


def test_variants_lack_the_part_that_their_names_say():
    torch.manual_seed(0)
    text = torch.randn(4, 8)
    batch = features.Batch(torch.randn(3, 5, 8), torch.randn(3, 8), torch.arange(3), torch.randn(3, 6))
    targets = torch.tensor([[1, -1, 0, -1], [-1, 1, -1, 0], [0, -1, -1, -1.0]])
    for name, terms in (
        ("trm", ()),
        ("trm-no-pseudo", ()),
        ("trm-rule-teacher", ("pseudo_query",)),
        ("trm-rule-prototype", ("pseudo_query",)),
        ("trm-contrast", ("contrast",)),
        ("trm-query-head", ("matching_region", "distillation")),
        ("trm-paper", ("pseudo_query", "matching_region", "pseudo_region", "distillation", "contrast")),
    ):
        made = variant(name, text)
        assert set(made.loss(batch, text, targets)) == {"matching_query", *terms}
        assert name == "trm-paper" or made.teaches == (terms[:1] != ("pseudo_query",) and name != "trm-no-pseudo")
    assert (variant("trm-no-prior", text).head.prior, variant("trm-no-penultimate", text).head.width) == (None, None)
    merged = variant("trm", text)
    expected = (merged.inner.logits(batch, text) + merged.head(batch.tokens, batch.penultimate)) / 2
    torch.testing.assert_close(merged.logits(batch, text), expected)
    without = variant("trm-no-region", text)
    without.loss(batch, text, targets)
    without = without.inner
    pooled = torch.nn.functional.normalize(batch.pooled, dim=-1)
    torch.testing.assert_close(without._last.features, pooled[:, None].expand(-1, 4, -1))
    other = batch._replace(tokens=torch.randn(3, 5, 8))
    torch.testing.assert_close(without.logits(batch, text), without.logits(other, text))


@pytest.mark.parametrize("known", ["some", "present alone", "all", "none"])
@pytest.mark.parametrize("teaches", [True, False])
def test_finish_calibrates_and_teaches_the_whole_image_by_both_views(known, teaches):
    """As :meth:`trm_losses.TRMHead.finish` does for a head of regions, here for any method and with the mean of the views."""
    torch.manual_seed(0)
    text, truth = torch.randn(4, 8), (torch.rand(40, 4) < 0.4).float()
    tokens, penultimate = torch.randn(2, 40, 5, 8), torch.randn(2, 40, 6) + truth.repeat(1, 2)[:, :6]
    hidden = {"some": torch.rand(40, 4) < 0.4, "present alone": truth == 0, "all": truth < 0, "none": truth >= 0}[known]
    targets = truth.masked_fill(hidden, -1.0)
    images = in_memory(tokens, tokens.mean(dim=2), penultimate)
    (first,) = images.batches(40)
    expected = 1.6 if known == "present alone" else None
    prior = GaussianDiscriminant(4, 8).fit([tokens[0]], text)

    def fitted(estimates=None):
        batch = (tokens[0], penultimate.mean(dim=0), targets, None, estimates)
        return GlobalHead(4, 6, prior).fit([batch], expected_positives=expected)

    preset = override(presets.EMBEDDED, ["expected_positives=1.6", f"pseudo_rule={'merged' if teaches else 'none'}"])
    single = known == "present alone"
    made = grid.build_method(
        "text-pixel+global", methods.Setting(preset, text, None, 100.0, 10, single=single, num_samples=40, global_head=fitted)
    )
    before = made.logits(first, text).detach()
    made.finish(images, targets, text, 16)
    got = made.logits(first, text).detach()
    if known == "none":
        torch.testing.assert_close(got, before)  # nothing is known to calibrate by
        return
    head, local = fitted(), made.inner.logits(first, text).detach()
    calibration = Calibration(4)

    def merged():
        logits = (local + head(tokens[0], penultimate[0])) / 2
        return calibration.fit(logits, targets, expected_positives=expected)(logits)

    wanted = merged()
    if teaches and known != "all":
        head = fitted(torch.sigmoid(wanted))
        assert (merged() - wanted).abs().max() > 1e-2
        wanted = merged()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert made.head.total == 40
