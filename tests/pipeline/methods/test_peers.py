"""Peers of TRM-ML in the examples, against slow loops written from their equations."""

import math

import pytest
import torch

from tests.helpers import grid
from tests.helpers.oracles.numbers import cosine, softmax
from trm_losses import TRMObjective
from trm_losses.metrics import mean_average_precision
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.config.settings import override
from trm_pipeline.data.base import eval_transform
from trm_pipeline.data.voc import VOC, class_prompt_names
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.features import cached as features
from trm_pipeline.methods import prompts

PEERS = ("text-image", "dual-coop", "dual-coop++", "text-pixel")
NUMBERS = {name: name.removesuffix("++") for name in PEERS}  # whose settings a method reads


@pytest.fixture(scope="module")
def names(backbone):
    return backbone.embed_prompts([f"{name}." for name in class_prompt_names()])


def setting(*changes, classes=4, dim=6, text=None, names=None):
    torch.manual_seed(0)
    text = torch.randn(classes, dim) if text is None else text
    return methods.Setting(override(presets.EMBEDDED, changes), text, names, 10.0, 10)


def batch(images=5):
    return grid.batch(images, 7, 6)


def moved(method):
    """The method with every parameter off its start."""
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return method


def slow_logits(name, method, b, text):
    """(B, C) by loops over plain numbers."""
    scale, bias = float(method.matching.scale.detach().double()), method.matching.bias.double().tolist()
    tokens, pooled, rows = b.tokens.double().tolist(), b.pooled.double().tolist(), text.detach().double().tolist()
    logits = torch.zeros(len(pooled), len(bias), dtype=torch.float64)
    for i in range(len(pooled)):
        for c in range(len(bias)):
            if name == "text-image":
                z = cosine(pooled[i], rows[c])
            else:
                kappa = math.exp(float(method.log_sharpness.detach()))
                guide = rows[2 * len(bias) + c] if name == "dual-coop++" else rows[c]
                weights = [math.exp(kappa * cosine(token, guide)) for token in tokens[i]]
                z = 0.0
                for weight, token in zip(weights, tokens[i], strict=True):
                    against = cosine(token, rows[len(bias) + c]) if name.startswith("dual-coop") else 0.0
                    favour = 1.0
                    if name == "dual-coop++":
                        against *= math.exp(float(method.log_ratio.detach()))
                        own = [cosine(token, row) for row in rows[: len(bias)]]
                        favour += softmax([200 * m * max(own) for m in own])[c]
                    z += weight / sum(weights) * (favour * cosine(token, rows[c]) - against)
            logits[i, c] = scale * z - bias[c]
    return logits


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_a_slow_loop(name):
    method = moved(methods.METHODS[name](setting()))
    b, text = batch(), method.prompts()
    torch.testing.assert_close(method.logits(b, text).double(), slow_logits(name, method, b, text), rtol=1e-4, atol=1e-4)


def test_dual_coop_is_what_is_left_of_its_successor_without_evidence_and_competition(monkeypatch):
    """In value, and in the gradient of what both have."""
    plain, more = (moved(methods.METHODS[name](setting())) for name in ("dual-coop", "dual-coop++"))
    more.load_state_dict({**more.state_dict(), **plain.state_dict(), "log_ratio": torch.zeros(())})
    b, positive = batch(), plain.prompts()
    text = torch.cat([positive, positive[:4]])
    assert not torch.allclose(more.logits(b, text), plain.logits(b, positive))
    monkeypatch.setattr(prompts, "winner_takes_all", torch.ones_like)
    values = more.logits(b, text), plain.logits(b, positive)
    torch.testing.assert_close(*values)
    grads = [
        torch.autograd.grad(x.square().sum(), [m.matching.bias, m.log_sharpness])
        for x, m in zip(values, (more, plain), strict=True)
    ]
    torch.testing.assert_close(*grads)


def test_the_winner_of_a_token_counts_twice():
    m = torch.tensor([[[0.9, 0.1, -0.9], [0.3, 0.3, 0.0]]])
    torch.testing.assert_close(prompts.winner_takes_all(m), torch.tensor([[[2.0, 1.0, 1.0], [1.5, 1.5, 1.0]]]), atol=1e-6, rtol=0)
    assert prompts.winner_takes_all(torch.rand(2, 3, 1)).eq(2).all()


@pytest.mark.parametrize("name", PEERS)
def test_loss_is_the_mean_cross_entropy_over_known_entries_times_the_classes(name):
    method = moved(methods.METHODS[name](setting()))
    b, text = batch(), method.prompts()
    targets = torch.randint(-1, 2, (5, 4), generator=torch.Generator().manual_seed(2)).float()
    logits, terms = slow_logits(name, method, b, text), []
    for i, c in (targets >= 0).nonzero().tolist():
        terms.append(math.log1p(math.exp(-logits[i, c] if targets[i, c] == 1 else logits[i, c])))
    (loss,) = method.loss(b, text, targets).values()
    assert loss.item() == pytest.approx(4 * sum(terms) / len(terms), rel=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_unknown_entries_give_no_gradient(name):
    method = moved(methods.METHODS[name](setting()))
    b = batch()
    text = method.prompts().detach().requires_grad_()
    tokens, pooled = b.tokens.requires_grad_(), b.pooled.requires_grad_()
    targets = torch.ones(5, 4)
    targets[1], targets[:, 2] = -1, -1  # nothing is known of image 1, nor of class 2
    sum(method.loss(b, text, targets).values()).backward()
    used = pooled if name == "text-image" else tokens
    assert used.grad[1].abs().sum() == 0 and used.grad[0].abs().sum() > 0
    grad = text.grad.unflatten(0, (-1, 4)).abs().sum(dim=(0, 2))
    assert (grad[2] == 0 or name == "dual-coop++") and (grad[[0, 1, 3]] > 0).all()  # where classes compete for tokens
    assert method.matching.bias.grad[2] == 0 and (method.matching.bias.grad[[0, 1, 3]] != 0).all()
    # A batch without any label is an ordinary batch.
    (loss,) = method.loss(b, text, torch.full((5, 4), -1.0)).values()
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("prior", [0.05, 0.6])
def test_calibrated_start_has_the_prior_as_its_mean_probability(name, prior):
    method = methods.METHODS[name](setting())
    b = batch()
    method.calibrate(b, method.prompts(), prior)
    assert torch.sigmoid(method.logits(b, method.prompts())).mean().item() == pytest.approx(prior, abs=1e-3)


@pytest.mark.parametrize("name", PEERS)
def test_every_parameter_is_trained_at_the_rate_of_the_preset(name):
    chosen = setting(f"{NUMBERS[name]}.lr=0.123", f"{NUMBERS[name]}.scale=7")
    method = methods.METHODS[name](chosen)
    groups = method.groups(chosen.preset)
    assert {group["lr"] for group in groups} == {0.123} and {group["weight_decay"] for group in groups} == {0.0}
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in method.parameters()}
    assert method.matching.scale.item() == pytest.approx(7.0)


def test_one_class_and_one_image():
    for name in PEERS:
        method = methods.METHODS[name](setting(classes=1))
        b = batch(images=1)
        method.calibrate(b, method.prompts(), 0.3)
        assert method.logits(b, method.prompts()).shape == (1, 1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, backbone):
    root = write_drawn_voc(tmp_path_factory.mktemp("scenes"), sizes={"train": 1, "val": 100, "test": 1}, workers=1)
    images = VOC(root, 2007, "val").with_transform(eval_transform(224, mean=backbone.image_mean, std=backbone.image_std))
    live = features.LiveFeatures(images, backbone, token_pool=2, device=torch.device("cpu"), workers=0)
    parts = list(live.batches(50))
    tokens, pooled = (torch.cat([getattr(part, key) for part in parts]) for key in ("tokens", "pooled"))
    return features.Batch(tokens, pooled, torch.arange(len(images))), images.targets


def mean_ap(logits, targets):
    return 100 * float(mean_average_precision(logits, targets))


def test_text_vectors_start_as_zero_shot_and_regions_above_it(scenes, backbone):
    """DualCoOp as well: its two texts must not start almost equal, where their difference would be chance."""
    b, targets = scenes
    text = backbone.template_text(class_prompt_names(), presets.EMBEDDED.templates)
    start = setting(text=text)
    with torch.no_grad():
        maps = {name: mean_ap((method := methods.METHODS[name](start)).logits(b, method.prompts()), targets) for name in PEERS}
        objective = TRMObjective.from_text(text, total_steps=1)
        regions = objective.matching.logits(objective.pooler(b.tokens, text).region, text)
    tokens, pooled = mean_ap(methods.zero_shot_tokens(b, text), targets), mean_ap(methods.zero_shot_global(b, text), targets)
    assert tokens > pooled + 10 and mean_ap(regions, targets) > pooled + 10
    assert maps["dual-coop"] >= tokens - 0.01 and maps["text-pixel"] >= tokens - 0.01
    assert maps["text-image"] == pytest.approx(pooled, abs=0.01)


@pytest.mark.parametrize("mode", ["shared", "csc"])
def test_dual_contexts_do_not_start_at_chance(mode, scenes, backbone, names):
    b, targets = scenes
    start = setting(f"prompts={mode}", "num_context=4", text=torch.zeros(20, backbone.dim), names=names)
    method = methods.METHODS["dual-coop"](start)
    prompts = method.prompts()
    with torch.no_grad():
        text = backbone.encode_prompts(prompts)
        # Each half is what its own learner gives, whatever was padded to put them side by side.
        torch.testing.assert_close(text[:20], backbone.encode_prompts(method.prompts.positive()), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text[20:], backbone.encode_prompts(method.prompts.negative()), rtol=1e-4, atol=1e-5)
        assert mean_ap(method.logits(b, text), targets) > 2.5 * 100 * float(targets.mean())
    grown = {name for name, _ in method.prompts.named_parameters()}
    assert grown == {"positive.context", "negative.context"}
    third = methods.METHODS["dual-coop++"](start)
    with torch.no_grad():
        text = backbone.encode_prompts(third.prompts())
        assert text.shape[0] == 60 and third.logits(b, text).shape == targets.shape
        torch.testing.assert_close(text[40:], backbone.encode_prompts(third.prompts.evidence()), rtol=1e-4, atol=1e-5)
    assert method.prompts.positive.context.shape[:-1] == ((4,) if mode == "shared" else (20, 4))
    assert torch.pdist(text[20:40]).min() > 0.01  # a class has a negative text of its own
