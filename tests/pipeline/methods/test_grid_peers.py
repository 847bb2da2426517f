"""SCPNet, SST, SARB and PositiveCoOp of the examples, value and gradient, against slow loops written from their equations."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.helpers.grid import batch as drawn
from tests.helpers.oracles.baselines import bce, slope, splc
from tests.helpers.oracles.numbers import array, cosine, sigmoid
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.config.losses import LOSSES
from trm_pipeline.methods import grid
from trm_pipeline.methods.peers import _features, sarb, scpnet

IMAGES, CLASSES, DIM = 6, 4, 5


def setting(**changes):
    torch.manual_seed(0)
    fixed = {"epochs": 20, "batch_size": IMAGES, "pooler": {"dropout": 0.0, "num_heads": 1}}  # as published
    preset = dataclasses.replace(presets.EMBEDDED, **{**fixed, **changes})
    targets = torch.randint(-1, 2, (IMAGES, CLASSES)).float()
    return methods.Setting(preset, torch.randn(CLASSES, DIM), None, 10.0, 20, num_samples=IMAGES, targets=targets)


def batch(seed=1):
    return drawn(IMAGES, 7, DIM, seed)


def double(*shape, seed=2):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=draw).requires_grad_()


def unknown_everywhere():
    return torch.full((IMAGES, CLASSES), -1.0, dtype=torch.float64)


def some_targets(seed=3):
    return torch.randint(-1, 2, (IMAGES, CLASSES), generator=torch.Generator().manual_seed(seed)).double()


def mostly_present():
    """So many pairs of positives that no other pair is left to chance."""
    targets = torch.ones(IMAGES, CLASSES, dtype=torch.float64)
    targets[0, 1], targets[2, 3], targets[4, 0] = -1, -1, -1
    targets[1, 1], targets[3, 1], targets[5, 2] = 0, 0, 0
    return targets


def agree(value, inputs, function):
    """Value and gradient by each of the inputs; ``function`` takes arrays."""
    arrays = [array(x.detach()) for x in inputs]
    assert float(value.detach()) == pytest.approx(function(*arrays), rel=1e-9, abs=1e-12)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    for i, gradient in enumerate(gradients):
        expected = slope(lambda x, i=i: function(*arrays[:i], x, *arrays[i + 1 :]), arrays[i])
        found = np.zeros_like(expected) if gradient is None else array(gradient)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


# SCPNet


def slow_graph(text, kept, temperature):
    count = len(text)
    graph = np.zeros((count, count))
    for c in range(count):
        cosines = [max(0.0, cosine(text[c], text[k])) for k in range(count)]
        others = sorted((k for k in range(count) if k != c), key=lambda k: -cosines[k])[: kept - 1]
        total = sum(cosines[k] for k in others)
        weights = {k: 0.2 * cosines[k] / total if total else 0.0 for k in others} | {c: 0.8}
        scale = sum(math.exp(value / temperature) for value in weights.values())
        for k, value in weights.items():
            graph[c, k] = math.exp(value / temperature) / scale
    return graph


@pytest.mark.parametrize("kept", [1, 3, 9])
def test_the_graph_of_classes_follows_its_equation(kept):
    text = double(6, 3).detach() + 0.8
    graph = scpnet.class_graph(text, kept=kept, temperature=0.3)
    np.testing.assert_allclose(array(graph), slow_graph(array(text), min(kept, 6), 0.3), rtol=1e-9)
    torch.testing.assert_close(scpnet.class_graph(-text[:1], kept=kept, temperature=0.3), torch.ones(1, 1, dtype=torch.float64))


def slow_consistency(weak, strong, y, stored, graph, top, balance, weight):
    count, classes = weak.shape
    n = [sum(row[c] for row in stored) for c in range(classes)]
    total, labels, passed = 0.0, np.zeros(weak.shape), []
    for b in range(count):
        p = [sigmoid(v) for v in weak[b]]
        chosen = sorted(range(classes), key=lambda c: -p[c])[:top]
        hard = set()
        for c in chosen:
            a = max(n[c] / max(max(n), top * len(stored) - sum(n)), 1 / classes)
            if p[c] >= 0.95 * a / (2 - a):
                hard.add(c)
        passed.append(bool(hard))
        for c in range(classes):
            labels[b, c] = y[b, c] == 1 or (c in hard and y[b, c] != 0)
            q = sum(p[k] * graph[c, k] for k in range(classes))
            if hard:
                total += bce(labels[b, c], strong[b, c]) + balance * bce(q, strong[b, c])
    return weight * total / count, labels, passed


@pytest.mark.parametrize("filled", [False, True])
def test_consistency_follows_its_equation(filled):
    method = grid.build_method(
        "linear+scpnet",
        setting(
            losses={
                **LOSSES,
                "scpnet": {"top": 2, "weight": 0.125, "balance": 2.0, "temperature": 0.3, "neighbours": 3, "drop": 0.5},
            }
        ),
    )
    if filled:
        method.labels[:] = True
        method.labels[:2, 1] = False
        method.counts = method.labels.sum(dim=0)
    weak, strong, y = double(IMAGES, CLASSES), double(IMAGES, CLASSES, seed=5), some_targets()
    value, labels, passed = method.consistency(weak, strong, y)
    held, graph, stored = array(weak.detach()), array(method.graph), array(method.labels.double())
    expected = slow_consistency(held, array(strong.detach()), array(y), stored, graph, 2, 2.0, 0.125)
    assert (array(labels.double()) == expected[1]).all() and passed.tolist() == expected[2]
    assert (not all(passed)) == filled
    agree(value, [weak, strong], lambda _, s: slow_consistency(held, s, array(y), stored, graph, 2, 2.0, 0.125)[0])


def test_labels_are_kept_of_images_that_passed():
    chosen = setting()
    method = grid.build_method("text-pixel+scpnet", chosen)
    method.labels[2, 3] = method.counts[3] = True
    terms = method.loss(batch(), method.prompts(), chosen.targets)
    assert set(terms) == {"splc", "consistency"}
    said, passed, _ = method._last
    passed[2], passed[0] = False, True
    method.after_step()
    assert torch.equal(method.labels[0], said[0]) and method.labels[2].tolist() == [False, False, False, True]
    assert torch.equal(method.counts, method.labels.sum(dim=0))
    # A step that was skipped leaves none behind.
    method.after_step()


def test_splc_of_all_logits_is_the_first_term():
    chosen = setting()
    method = grid.build_method("linear+scpnet", chosen)
    method.splc.begin_epoch(1, 20)
    logits = array(method.logits(batch(), method.prompts()).detach())
    expected = splc(logits, array(chosen.targets), logits, 0.6, 1.0, 2.0, True)
    terms = method.loss(batch(), method.prompts(), chosen.targets)
    assert terms["splc"].item() == pytest.approx(expected / IMAGES, rel=1e-5)


def test_a_strong_view_lacks_tokens_and_parts_of_the_pooled_feature():
    torch.manual_seed(0)
    whole = batch()
    strong = scpnet.strong_view(whole, 0.4)
    assert strong.tokens.shape == (IMAGES, 4, DIM) and torch.equal(strong.index, whole.index)
    for own, tokens in zip(strong.tokens.tolist(), whole.tokens.tolist(), strict=True):
        assert all(token in tokens for token in own) and len({tuple(token) for token in own}) == 4
    kept = strong.pooled != 0
    torch.testing.assert_close(strong.pooled[kept], whole.pooled[kept] / 0.6)
    assert scpnet.strong_view(whole, 1.0).tokens.shape[1] == 1


# What SST and SARB share


def slow_pbce(logits, y):
    terms = [bce(y[i], logits[i]) for i in np.ndindex(*logits.shape) if y[i] >= 0]
    return sum(terms) / max(1, len(terms))


def test_the_mean_over_known_entries_reaches_soft_targets():
    logits, soft = double(IMAGES, CLASSES), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y = some_targets()
    value = _features.known_mean(logits, torch.where(y == 0, soft, y))
    agree(value, [logits, soft], lambda x, q: slow_pbce(x, np.where(array(y) == 0, q, array(y))))
    nothing = _features.known_mean(logits, unknown_everywhere())
    nothing.backward()
    assert nothing.item() == 0 and logits.grad.abs().sum() == 0


def slow_distances(f, y):
    near, mixed, none = [], [], []
    for c in range(f.shape[1]):
        for i in range(len(f)):
            for j in range(i + 1, len(f)):
                if y[i, c] < 0 or y[j, c] < 0:
                    continue
                similarity = cosine(f[i, c], f[j, c])
                if y[i, c] == y[j, c] == 1:
                    near.append(1 - similarity)
                else:
                    (none if y[i, c] == y[j, c] else mixed).append(1 + similarity)
    return near, mixed, none


def test_distances_are_of_pairs_of_images():
    f, y = double(IMAGES, CLASSES, DIM), mostly_present()
    near, mixed, none = slow_distances(array(f.detach()), array(y))
    assert near and len(mixed) <= 3 * len(near) and len(none) <= 3 * len(near)  # nothing is drawn

    def function(x):
        values = sum(slow_distances(x, array(y)), [])
        return sum(values) / len(values)

    agree(_features.distances(f, y), [f], function)
    for nothing in (unknown_everywhere(), torch.ones(IMAGES, CLASSES, dtype=torch.float64)):
        rows = f[:1] if nothing.min() > 0 else f
        assert _features.distances(rows, nothing[: len(rows)]).item() == 0
    assert torch.autograd.grad(_features.distances(f, unknown_everywhere()), f)[0].abs().sum() == 0


def test_of_many_pairs_the_closest_and_some_others_are_taken():
    f, y = double(IMAGES, 1, DIM).detach(), torch.zeros(IMAGES, 1, dtype=torch.float64)
    y[:2] = 1
    near, mixed, none = slow_distances(array(f), array(y))  # 1, 8 and 6
    torch.manual_seed(0)
    found = {float(_features.distances(f, y)) for _ in range(200)}
    possible = set()
    rest = [sorted(kind)[:-1] for kind in (mixed, none)]
    for a in range(7):
        for b in range(a):
            for c in range(5):
                for d in range(c):
                    drawn = rest[0][a] + rest[0][b] + rest[1][c] + rest[1][d]
                    possible.add(round((sum(near) + max(mixed) + max(none) + drawn) / 7, 9))
    assert {round(value, 9) for value in found} <= possible and len(found) > 50


# SST


def sst_method(**changes):
    chosen = setting(**changes)
    method = grid.build_method("text-pixel+sst", chosen).double()
    method.requires_grad_(False)
    draw = torch.Generator().manual_seed(4)
    method.memory[:, :7] = torch.randn(CLASSES, 7, DIM, dtype=torch.float64, generator=draw)
    return method, chosen


def slow_pair(method, a, b):
    narrow, first, second = method.narrow, method.pair[0], method.pair[2]
    row = [array(narrow.weight.detach()) @ x + array(narrow.bias.detach()) for x in (a, b)]
    hidden = array(first.weight.detach()) @ np.concatenate(row) + array(first.bias.detach())
    return float((array(second.weight.detach()) @ np.maximum(hidden, 0) + array(second.bias.detach()))[0])


def test_scores_of_classes_and_memory_follow_their_equations():
    method, _ = sst_method()
    f, y = double(IMAGES, CLASSES, DIM).detach(), some_targets()
    pairs = method.pairs(f)
    inside, across = method.transferred(pairs, f, y)
    values, memory = array(f), array(method.memory)
    for b in range(IMAGES):
        positives = [d for d in range(CLASSES) if y[b, d] == 1]
        for c in range(CLASSES):
            total = 0.0
            for d in positives:
                low, high = sorted((c, d))
                total += 1.0 if c == d else sigmoid(slow_pair(method, values[b, low], values[b, high]))
            assert float(inside[b, c]) == pytest.approx(total / max(1, len(positives)), rel=1e-9)
            cosines = [cosine(values[b, c], m) if np.abs(m).sum() else 0.0 for m in memory[c]]
            assert float(across[b, c]) == pytest.approx(sum(cosines) / 100, rel=1e-9)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 1.0])
def test_the_loss_of_sst_follows_its_equation(share):
    method, _ = sst_method(losses={**LOSSES, "sst": {**LOSSES["sst"], "threshold": 0.4, "floor": 0.1}})
    method.total_steps = 100
    method.step.fill_(round(100 * share))
    f, logits, y = double(IMAGES, CLASSES, DIM), double(IMAGES, CLASSES, seed=6), mostly_present()
    method.inner.class_features, method.inner.classify = (lambda *_: f), (lambda *_: logits)
    theta = max(0.1, 0.4 - 0.025 * max(0, math.floor(20 * share) - 5))
    assert method.theta() == pytest.approx(theta)
    with torch.no_grad():
        scores = method.transferred(method.pairs(f), f, y)
    found = [(array(y) == -1) & (array(score) >= theta) for score in scores]
    ramp = min(1.0, 20 * share)

    def function(x, z):
        total = slow_pbce(z, array(y))
        if share >= 0.25:
            total += sum(slow_pbce(z, np.where(new, 1.0, array(y))) for new in found)
        related = []
        for b in range(IMAGES):
            for c in range(CLASSES):
                for d in range(c + 1, CLASSES):
                    o = slow_pair(method, x[b, c], x[b, d])
                    p = sigmoid(o)
                    if y[b, c] == y[b, d] == 1:
                        related.append((1 - p) * -math.log(p))
                    else:
                        q = max(p - 0.05, 0.0)
                        related.append(q**2 * -math.log(1 - q))
        pairs = sum(slow_distances(x, array(y)), [])
        return CLASSES * (total + 10 * ramp * sum(related) / len(related) + 0.05 * ramp * sum(pairs) / len(pairs))

    terms = method.loss(batch(), torch.zeros(CLASSES, DIM), y)
    assert ({"inside", "across"} <= set(terms)) == (share >= 0.25)
    agree(sum(terms.values()), [f, logits], function)
    if share == 0.5:
        assert any(new.any() for new in found)


def test_the_threshold_falls_to_its_floor_at_its_share():
    method, _ = sst_method()
    thetas = []
    for epoch in range(20):
        method.step.fill_(epoch)  # 20 steps, one an epoch
        thetas.append(round(method.theta(), 6))
    assert thetas == [0.95] * 6 + [0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775] + [0.75] * 7


def test_memory_keeps_the_last_features_of_known_positives():
    chosen = setting(losses={**LOSSES, "sst": {**LOSSES["sst"], "memory": 4}})
    method = grid.build_method("text-pixel+sst", chosen)
    expected = [[] for _ in range(CLASSES)]
    for seed in range(3):
        y = some_targets(seed).float()
        method.loss(batch(seed), method.prompts(), y)
        f = method.inner.class_features(batch(seed), method.prompts()).detach()
        method.after_step()
        for c in range(CLASSES):
            expected[c] += [f[b, c] for b in range(IMAGES) if y[b, c] == 1]
    for c in range(CLASSES):
        kept = {tuple(row) for row in method.memory[c].tolist() if any(row)}
        assert kept == {tuple(row.tolist()) for row in expected[c][-4:]}


# SARB


@pytest.mark.parametrize("name, share", [("alpha", 0.7), ("beta", 0.2)], ids=["images", "prototypes"])
def test_blends_follow_their_equation(name, share):
    """With the image at the other end of the batch, or with the sixth prototype of one class of each image."""
    method = grid.build_method("text-pixel+sarb", setting()).double()
    with torch.no_grad():
        getattr(method, name).fill_(share)
        method.prototypes.copy_(double(*method.prototypes.shape, seed=11))
        method.found[:] = torch.tensor([True, True, False, True])
    f, y, w = double(IMAGES, CLASSES, DIM), some_targets(), double(IMAGES, CLASSES, DIM, seed=9).detach()
    classes = torch.tensor([1, 0, 2, 3, 1, 0])
    if name == "beta":
        y[0], y[2] = -1, -1
    blend, soft = method.images(f, y) if name == "alpha" else method.with_prototypes(f, y, classes, 6)
    weights, prototypes = array(w), array(method.prototypes)

    def function(x, share):
        total = 0.0
        for b in range(IMAGES):
            for c in range(CLASSES):
                if name == "alpha":
                    mixed, other = y[IMAGES - 1 - b, c] == 1, x[IMAGES - 1 - b, c]
                else:
                    mixed, other = c == classes[b] and c != 2, prototypes[c, 6]
                mixed = mixed and y[b, c] == -1
                feature = share * x[b, c] + (1 - share) * other if mixed else x[b, c]
                total += float((feature * weights[b, c]).sum()) + (b + 1) * (1 - share if mixed else float(y[b, c]))
        return float(total)

    rows = torch.arange(1, IMAGES + 1, dtype=torch.float64)[:, None]
    agree((blend * w).sum() + (soft * rows).sum(), [f, getattr(method, name)], function)
    assert ((soft > 0) & (soft < 1)).any()


def test_shares_of_a_blend_come_back_from_the_ends():
    method = grid.build_method("text-pixel+sarb", setting())
    method.found[:] = True
    optimizer = torch.optim.SGD([method.alpha, method.beta], lr=1.0)
    f, y = double(IMAGES, CLASSES, DIM).detach().float(), torch.full((IMAGES, CLASSES), -1.0)
    y[0] = 1  # the last image is blended with the first
    classes = torch.zeros(IMAGES, dtype=torch.int64)
    for direction, ends in ((5.0, (1, 0)), (-0.05, None)):
        optimizer.zero_grad()
        # Each term falls as the target does, or as it rises: targets are 1 - alpha and 1 - beta.
        loss = direction * (method.images(f, y)[1][-1].sum() - method.with_prototypes(f, y, classes, 0)[1][1:, 0].sum())
        loss.backward()
        optimizer.step()
        method.after_step()
        shares = method.alpha.item(), method.beta.item()
        assert shares == ends if ends else 0 < shares[0] < 1 and 0 < shares[1] < 1
    chosen = {**LOSSES, "sarb": {**LOSSES["sarb"], "beta": 1.5}}
    with pytest.raises(ValueError, match="sarb.beta must be a share from 0 to 1, got 1.5"):
        grid.build_method("text-pixel+sarb", setting(losses=chosen))


def test_blending_begins_with_its_prototypes_and_finds_them_three_times(monkeypatch):
    chosen = setting()
    method = grid.build_method("text-pixel+sarb", chosen)
    average = copy.deepcopy(method)
    calls, original = [], sarb.k_means
    monkeypatch.setattr(sarb, "k_means", lambda points, count: calls.append(len(points)) or original(points, count))

    class Held:
        def batches(self, batch_size):
            yield batch()

    positives = [int(n) for n in (chosen.targets == 1).sum(dim=0) if n]
    for epoch in range(20):
        before = len(calls)
        method.before_epoch(epoch, Held(), chosen.targets, average, lambda text: text)
        assert calls[before:] == (positives if epoch in (5, 10, 15) else [])
        method.train()
        terms = method.loss(batch(), method.prompts(), chosen.targets)
        assert set(terms) == {"pbce", "distance"} | ({"images", "prototypes"} if epoch >= 5 else set())
        method.after_step()
    assert method.found.tolist() == (chosen.targets == 1).any(dim=0).tolist()


def test_a_random_unknown_class_is_blended_and_no_other(monkeypatch):
    torch.manual_seed(0)
    method = grid.build_method("text-pixel+sarb", setting())
    method.step.fill_(10)
    drawn = []
    original = method.with_prototypes
    monkeypatch.setattr(method, "with_prototypes", lambda f, y, *which: drawn.append(which) or original(f, y, *which))
    y = some_targets().float()
    y[0] = torch.tensor([0, -1, 1, -1.0])
    for _ in range(60):
        method.loss(batch(), method.prompts(), y)
    assert {int(classes[0]) for classes, _ in drawn} == {1, 3} and {j for _, j in drawn} == set(range(10))


def test_centres_are_means_of_their_own_points():
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(40, 3, generator=draw) + 8 * torch.randint(3, (40, 1), generator=draw)
    centres = sarb.k_means(points, 3)
    own = ((points[:, None] - centres) ** 2).sum(dim=-1).argmin(dim=1)
    for k in range(3):
        torch.testing.assert_close(points[own == k].mean(dim=0), centres[k])
    assert sorted(torch.bincount(own).tolist()) == sorted(torch.bincount((points.mean(dim=1) / 8).round().long()).tolist())
    few = sarb.k_means(points[:2], 5)
    assert {tuple(row) for row in few.tolist()} == {tuple(row) for row in points[:2].tolist()}
    assert sarb.k_means(points[:1].expand(4, -1), 3).isfinite().all()


# Heads, and PositiveCoOp


@pytest.mark.parametrize("head", ["text-pixel", "trm-region"])
def test_logits_of_class_features_are_those_of_the_head(head):
    method = methods.METHODS[head](setting())
    b, text = batch(), method.prompts()
    method.calibrate(b, text, 0.3)
    method.eval()
    torch.testing.assert_close(method.classify(method.class_features(b, text), text), method.logits(b, text))


def test_positive_prompts_stand_against_free_vectors():
    chosen = setting(dual_coop={"lr": 0.5, "scale": 10.0, "sharpness": 8.0})
    method = grid.build_method("positive-coop", chosen)
    assert method.offset.abs().sum() == 0 and 0.5 < method.absent.std() < 1.5
    method.double()
    with torch.no_grad():
        method.offset.normal_()
    b, w = batch(), double(IMAGES, CLASSES).detach()
    b, text = b._replace(tokens=b.tokens.double()), method.prompts().detach()
    tokens, weights, kappa = array(b.tokens), array(w), math.exp(float(method.log_sharpness.detach()))

    def function(offset, away):
        total, rows = 0.0, array(text) + offset
        for i in range(IMAGES):
            for c in range(CLASSES):
                votes = [math.exp(kappa * cosine(token, rows[c])) for token in tokens[i]]
                terms = [v * (cosine(x, rows[c]) - cosine(x, away[c])) for v, x in zip(votes, tokens[i], strict=True)]
                total += weights[i, c] * sum(terms) / sum(votes)
        return total

    agree((method.cosines(b, text) * w).sum(), [method.offset, method.absent], function)
    groups = method.groups(chosen.preset)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert set(rates) == {id(p) for p in method.parameters()} and {rates[id(method.offset)], rates[id(method.absent)]} == {0.5}
    assert {rates[id(p)] for p in method.prompts.parameters()} == {0.005}
