"""Regions of some entries, and similarities of some classes, in place of regions of all: the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.contrast import call_contrast
from tests.helpers.cases.labeler import filled_labeler
from tests.helpers.values import CLASSES, TOKENS, WIDTH, labels, normal, shaken, with_prototypes
from trm_losses import functional as TF


def entries(regions: Tensor, mask: Tensor) -> TF.Entries:
    """Entry by entry, in the order of images and classes."""
    places = [(b, c) for b in range(len(mask)) for c in range(mask.shape[1]) if mask[b, c]]
    row, own = (torch.tensor([place[i] for place in places], dtype=torch.int64) for i in (0, 1))
    features = torch.stack([regions[place] for place in places]) if places else regions.flatten(0, 1)[:0]
    return TF.Entries(features, row, own)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("mask", ["some", "all", "none"])
@pytest.mark.parametrize("assignment", ["softmax", "transport"])
def test_pooler_gives_the_regions_of_a_mask(assignment: Any, mask: str, tokens: int) -> None:
    pooler = shaken(tl.RegionPooler(9, WIDTH, num_heads=2, assignment=assignment)).double()
    chosen = {"some": labels(4, 9, soft=False) == 1, "all": torch.ones(4, 9).bool(), "none": torch.zeros(4, 9).bool()}[mask]
    chosen[2] = mask == "all"
    padding = torch.zeros(4, tokens, dtype=torch.bool)
    padding[1, 1:] = True
    results = []
    for alone in (True, False):
        v, t = normal(4, tokens, WIDTH, seed=2).requires_grad_(), normal(9, WIDTH, seed=1).requires_grad_()
        prepared = pooler.prepare(v, t, key_padding_mask=padding)
        regions = entries(pooler.pool(prepared).query, chosen)
        given = pooler.entries(prepared, chosen) if alone else regions
        assert torch.equal(given.row, regions.row) and torch.equal(given.own, regions.own) and given.features.requires_grad
        pooler.zero_grad()
        given.features.pow(3).sum().backward()
        gradients = (torch.zeros(()) if p.grad is None else p.grad for p in (t, *pooler.parameters()))
        results.append([given.features, v.grad, *gradients])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e if e.ndim else e.expand_as(a), rtol=1e-10, atol=1e-12, check_dtype=e.ndim > 0)


def test_without_an_anchor_contrast_of_entries_is_zero_and_on_the_graph() -> None:
    x = with_prototypes(4, CLASSES)
    x["targets"] = torch.full_like(x["targets"], -1.0)
    regions = x["regions"].requires_grad_()
    module = tl.MultimodalContrastiveLoss(text_prototype=0.0)  # which asks for no anchor
    loss = call_contrast(module, {**x, "regions": entries(regions, x["targets"] == 1)})
    loss.backward()
    assert loss == 0 and regions.grad is not None and torch.count_nonzero(regions.grad) == 0


@pytest.mark.parametrize("settings", [{}, {"positive": 0.6, "negative": 0.4}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_labeler_reads_similarities_of_chunks(settings: dict[str, Any], size: int) -> None:
    """Also of classes never seen."""
    bank = tl.PrototypeBank(CLASSES, WIDTH, init=normal(CLASSES, WIDTH, seed=20))
    for step in range(3):
        y = labels(6, CLASSES, seed=step)
        y[:, 3] = -1
        bank.update(normal(6, CLASSES, WIDTH, seed=step), y)
    assert bank.seen.any() and not bank.seen.all()
    labeler, x, y = filled_labeler(**settings).double(), normal(6, CLASSES, WIDTH, seed=9), labels(6, CLASSES, seed=9)
    parts = [labeler.similarities(x[:, c : c + size], bank, first=c) for c in range(0, CLASSES, size)]
    joined = TF.Similarities(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
    for a, e in zip(labeler(joined, y, bank), labeler(x, y, bank), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"PseudoLabeler: intra_visual must have shape \(B, C\) = \(B, 5\), got \(6, 4\)"):
        labeler(TF.Similarities(*(s[:, 1:] for s in joined)), y, bank)
    with pytest.raises(ValueError, match="PseudoLabeler: regions must be finite, got 30 NaN or infinite of 30 values"):
        labeler(joined._replace(inter_text=joined.inter_text * float("nan")), y, bank)


def test_matching_takes_no_entries() -> None:
    y, text = labels(2, CLASSES), normal(CLASSES, WIDTH)
    with pytest.raises(TypeError, match="^TextRegionMatchingLoss: regions must be a torch.Tensor, got Entries$"):
        tl.TextRegionMatchingLoss(CLASSES).logits(entries(normal(2, CLASSES, WIDTH), y == 1), text)  # type: ignore[arg-type]


def test_refuses_entries_that_are_not_there() -> None:
    regions, y = normal(4, CLASSES, WIDTH), labels(4, CLASSES, soft=False)
    some = entries(regions, y == 1)
    fewer = TF.Entries(*(part[1:] for part in some))
    contrast, bank = tl.MultimodalContrastiveLoss(), filled_bank()
    missing = "regions must hold every entry that is read, got {} and {} missing; pool them with RegionPooler.entries"
    for call, owner, held, lacking in (
        (lambda: contrast(fewer, normal(CLASSES, WIDTH), y), "MultimodalContrastiveLoss", len(fewer.own), 1),
        (lambda: bank.update(fewer, y), "PrototypeBank", len(fewer.own), 1),
    ):
        with pytest.raises(ValueError, match=f"{owner}: {missing.format(held, lacking)}"):
            call()
    with pytest.raises(ValueError, match=r"PrototypeBank: regions.own must have shape \(n\) = \(\d+\), got \(1,\)"):
        bank.update(some._replace(own=some.own[:1]), y)
    with pytest.raises(ValueError, match=r"PrototypeBank: regions.features must have shape \(n, D\) = \(n, 8\), got"):
        bank.update(some._replace(features=some.features[:, 1:]), y)
    prepared = tl.RegionPooler(CLASSES, WIDTH).prepare(normal(4, TOKENS, WIDTH), normal(CLASSES, WIDTH))
    with pytest.raises(ValueError, match=r"RegionPooler: mask must have shape \(B, C\) = \(4, 5\), got \(3, 5\)"):
        tl.RegionPooler(CLASSES, WIDTH).entries(prepared, y[1:] == 1)


def test_refuses_entries_out_of_order() -> None:
    y = torch.tensor([[1.0, 0, 1], [0, 1, -1]])
    held = TF.Entries(normal(3, WIDTH), torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]))
    for order in ([1, 0, 2], [0, 0, 1, 2]):
        with pytest.raises(ValueError, match="regions must stand in the order of their rows and classes, each entry once"):
            tl.MultimodalContrastiveLoss()(TF.Entries(*(part[order] for part in held)), normal(3, WIDTH, seed=1), y)


def test_chunks_are_computed_again_from_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint restores the random state of the devices of the tensors that it is given, so it must be given some."""
    given = []

    def spy(function: Any, *args: Any, **options: Any) -> Any:
        given.extend(arg for part in args for arg in (part if isinstance(part, tuple) else (part,)))
        return function(*args)

    monkeypatch.setattr("trm_losses.regions.checkpoint", spy)
    pooler = tl.RegionPooler(5, WIDTH, num_heads=1)
    pooler.map_classes(lambda r, c: {"query": r.query}, pooler.prepare(normal(2, 6, WIDTH).float(), normal(5, WIDTH).float()), 2)
    assert any(isinstance(arg, torch.Tensor) for arg in given)
