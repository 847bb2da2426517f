"""The field's losses under every head of the examples: names, numbers, schedules, state."""

import dataclasses
import math

import pytest
import torch

from tests.helpers.grid import CLASSES, DIM, EPOCHS, IMAGES, TOKENS, held, labels, preset, setting, train
from trm_losses import baselines
from trm_pipeline import files as checkpoint
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.config.losses import LOSSES, MADE_BY
from trm_pipeline.config.settings import override
from trm_pipeline.features import cached as features
from trm_pipeline.methods import global_head, grid, wrapped
from trm_pipeline.methods.global_head import of_grid
from trm_pipeline.run import arguments, prepared

# What the papers give for VOC, by hand: k is 4 x 11 / 27 below.
PUBLISHED = {
    "an": lambda y, k, s: baselines.AssumeNegativeLoss(),
    "an-ls": lambda y, k, s: baselines.AssumeNegativeLoss(smoothing=0.1),
    "wan": lambda y, k, s: baselines.WeakAssumeNegativeLoss(),
    "epr": lambda y, k, s: baselines.EPRLoss(k),
    "role": lambda y, k, s: baselines.ROLELoss(y, k),
    "em": lambda y, k, s: baselines.EMLoss(alpha=0.2),
    "em-apl": lambda y, k, s: baselines.EMAPLLoss(*y.shape, alpha=0.2, beta=0.02, label_share=0.9, warmup=5),
    "ll-r": lambda y, k, s: baselines.LargeLoss(scheme="reject", delta=0.002),
    "ll-ct": lambda y, k, s: baselines.LargeLoss(scheme="correct", delta=0.002),
    "ll-cp": lambda y, k, s: baselines.LargeLoss(
        scheme="correct_permanently", delta=0.001, num_samples=y.shape[0], num_classes=y.shape[1]
    ),
    "splc": lambda y, k, s: baselines.SPLCLoss(threshold=0.6, margin=1.0, gamma=2.0, reduction="mean"),
    "hill": lambda y, k, s: baselines.HillLoss(strength=1.5, margin=1.0, gamma=2.0, reduction="mean"),
    "partial-bce": lambda y, k, s: baselines.PartialBCELoss(alpha=-4.45, beta=5.45, gamma=1.0),
    "pasl-ignore": lambda y, k, s: baselines.PartialASLLoss(
        y.shape[1], policy="ignore", gamma_pos=0, gamma_neg=1, gamma_unknown=4, reduction="mean"
    ),
    "pasl-negative": lambda y, k, s: baselines.PartialASLLoss(
        y.shape[1], policy="negative", gamma_pos=0, gamma_neg=1, gamma_unknown=4, reduction="mean"
    ),
    "pasl-selective": lambda y, k, s: baselines.PartialASLLoss(
        y.shape[1],
        policy="selective",
        gamma_pos=0,
        gamma_neg=1,
        gamma_unknown=4,
        prior=prior(y),
        prior_threshold=0.5,
        likely=5,
        reduction="mean",
    ),
    "vlpl": lambda y, k, s: baselines.VLPLLoss(s, alpha=0.2, beta=0.7, temperature=0.1, threshold=0.3),
    "gr": lambda y, k, s: baselines.GRLoss(
        slope=(0, 2), offset=(-2, -2), center=(0.5, 0.8), width=(2, 0.5), q_present=0.01, q_absent=1
    ),
    "gpr": lambda y, k, s: baselines.GPRLoss(
        (s / 0.1).softmax(dim=1),
        k,
        threshold=0.5,
        negative_share=0.2,
        weights=(0.4, 0.7),
        confidence=0.9,
        weight_expected=0.05,
        q_present=0.01,
        q_absent=1,
    ),
    "gce": lambda y, k, s: baselines.GCELoss(q=0.7),
}
# A loss whose published numbers are its own needs no line above.
PUBLISHED |= {loss: lambda y, k, s, loss=loss: MADE_BY[loss]() for loss in MADE_BY if loss not in PUBLISHED}


def prior(targets):
    columns = targets.T.tolist()
    return torch.tensor([column.count(1) / max(1, column.count(1) + column.count(0)) for column in columns])


def first_batch():
    return next(held(1).batches(6, torch.Generator().manual_seed(0)))


def expected(targets):
    return CLASSES * float((targets == 1).sum()) / float((targets >= 0).sum())


def test_the_table_has_every_loss_of_the_package():
    assert set(PUBLISHED) | set(grid.PEERS) == set(LOSSES)
    made = {type(make(labels(), 1.0, torch.rand(IMAGES, CLASSES))) for make in PUBLISHED.values()}
    assert {cls.__name__ for cls in made} == set(baselines.__all__)
    assert len(grid.GRID) == 5 * len(PUBLISHED) + 5 + 2 + 2


# Every loss on logits of one kind and of two, and two losses under the other heads.
OWN = [(name, *name.split("+", 1)) for name in grid.GRID if name.partition("+")[2] in PUBLISHED]
OWN = [name for name, head, loss in OWN if head in ("linear", "trm-query") or loss in ("an", "role")]


@pytest.mark.parametrize("name", OWN)
def test_a_loss_is_the_published_one_on_the_logits_of_its_head(name):
    """Before its schedule begins and after; the head learns from it."""
    head, _, loss = name.partition("+")
    chosen = setting()
    method, batch = grid.build_method(name, chosen), first_batch()
    targets, text = chosen.targets[batch.index], method.prompts()
    torch.manual_seed(0)
    by_hand = PUBLISHED[loss](chosen.targets, expected(chosen.targets), chosen.similarities())
    if loss == "role":
        by_hand.load_state_dict(method.labels.state_dict())
    for epoch in (0, 3):
        method.train()
        for part in (method.labels, by_hand):
            for some in held(1).batches(6):
                part.update(torch.ones(6, CLASSES), chosen.targets[some.index], ids=some.index)
            part.begin_epoch(epoch, EPOCHS)
        heads = [method.logits(batch, text)]
        if head == "trm-query":
            regions = method.inner.objective.pooler(batch.tokens, text)
            heads.append(method.inner.classify(regions.region, text))
        value = sum(CLASSES * by_hand(logits, targets, ids=batch.index) for logits in heads)
        terms = method.loss(batch, text, targets)
        torch.testing.assert_close(terms[loss], value)
        sum(terms.values()).backward()
        gradients = [p.grad for p in method.inner.parameters() if p.grad is not None]
        assert all(bool(g.isfinite().all()) for g in gradients) and any(bool(g.any()) for g in gradients)
        assert set(terms) == {loss}  # TRM-ML's own terms are not the head's


@pytest.mark.parametrize("loss", PUBLISHED)
def test_weak_negatives_join_losses_of_known_labels_alone(loss):
    chosen = setting(single=True)
    batch = first_batch()
    method = grid.build_method(f"linear+{loss}", chosen)
    terms = method.loss(batch, method.prompts(), chosen.targets[batch.index], 0.3)
    assert ("weak_negative" in terms) == (loss in ("partial-bce", "pasl-ignore", "gce"))


def test_an_unknown_label_weighs_as_much_as_a_known_one():
    """At weight 1 partial ASL without focusing and with weak negatives is AN."""
    chosen = setting(single=True, losses={**LOSSES, "pasl-ignore": {"gamma_pos": 0.0, "gamma_neg": 0.0, "margin": 0.0}})
    batch = first_batch()
    values = []
    for name, weight in (("pasl-ignore", 1.0), ("an", 1.0)):
        method = grid.build_method(f"text-pixel+{name}", chosen)
        values.append(sum(method.loss(batch, method.prompts(), chosen.targets[batch.index], weight).values()))
    plain = grid.build_method("text-pixel", chosen)
    values.append(sum(plain.loss(batch, plain.prompts(), chosen.targets[batch.index], 1.0).values()))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[2], CLASSES * values[1])  # whose own mean is over the known entries


def test_names_say_head_and_loss():
    """Two pluses end the name of a head."""
    names = {"trm": ("trm", ""), "linear+an-ls": ("linear", "an-ls"), "linear+role+global": ("linear", "role+global")}
    names |= {"dual-coop++": ("dual-coop++", ""), "dual-coop+++global": ("dual-coop++", "global")}
    assert {name: global_head.parts_of(name) for name in names} == names
    assert [name for name in names if of_grid(name)] == ["linear+an-ls", "linear+role+global"]
    assert type(grid.build_method("dual-coop++", setting())) is methods.DualCoOpPlus
    assert grid.choose_methods(["dual-coop++", "dual-coop+++global"]) == ["dual-coop++", "dual-coop+++global"]
    assert set(names) <= set(grid.NAMES)


def test_a_head_keeps_its_start_rates_and_texts():
    chosen = setting()
    for name in ("linear", "text-pixel", "trm-query"):
        plain, swapped = grid.build_method(name, setting()), grid.build_method(f"{name}+role", setting())
        assert all(torch.equal(value, swapped.inner.state_dict()[key]) for key, value in plain.state_dict().items())
        assert swapped.prompts is swapped.inner.prompts
        rates = [group["lr"] for group in plain.groups(chosen.preset)]
        assert [group["lr"] for group in swapped.groups(chosen.preset)] == [*rates, pytest.approx(10 * max(rates))]
        faster = grid.build_method(f"{name}+role", setting(losses={"role": {"rate": 3.0}}))
        changed = [*rates, 3 * max(rates)]
        assert [group["lr"] for group in faster.groups(chosen.preset)] == pytest.approx(changed)
        (theta,) = swapped.groups(chosen.preset)[-1]["params"]
        assert theta is swapped.labels.estimates
        for method in (plain, swapped):
            method.calibrate(first_batch(), method.prompts(), 0.2)
        torch.testing.assert_close(*(m.logits(first_batch(), m.prompts()) for m in (plain, swapped)))


@pytest.mark.parametrize("name", ["trm-query+an", "linear+scpnet", "text-pixel+sst", "trm-region+sarb"])
def test_a_head_goes_on_with_what_it_does_between_steps(name, monkeypatch):
    chosen = setting()
    method, average = (grid.build_method(name, chosen) for _ in range(2))
    calls = []
    monkeypatch.setattr(method.inner, "before_epoch", lambda epoch, *rest: calls.append((epoch, rest[2])))
    monkeypatch.setattr(method.inner, "after_step", lambda: calls.append("step"))
    method.before_epoch(1, held(1), chosen.targets, average, lambda text: text)
    batch = first_batch()
    method.loss(batch, method.prompts(), chosen.targets[batch.index])
    method.after_step()
    assert calls == [(1, average.inner), "step"]
    with pytest.raises(TypeError, match="average must be"):
        method.before_epoch(1, held(1), chosen.targets, average.inner, lambda text: text)


def test_the_number_of_positives_is_what_the_labels_tell_or_what_is_assumed():
    targets = labels()
    assert wrapped.expected_positives(setting(targets=targets), targets) == pytest.approx(expected(targets))
    single = labels(single=True)
    assert wrapped.expected_positives(setting(single=True, expected_positives=1.7), single) == 1.7
    unknown = torch.full((IMAGES, CLASSES), -1.0)
    assert wrapped.expected_positives(setting(targets=unknown, expected_positives=1.7), unknown) == 1.7
    with pytest.raises(ValueError, match="--set expected_positives=2"):
        wrapped.expected_positives(setting(targets=unknown, expected_positives=None), unknown)


def test_the_prior_of_a_class_is_that_of_its_known_labels():
    targets = labels()
    targets[:, 2] = -1
    torch.testing.assert_close(wrapped.class_prior(setting(targets=targets), targets), prior(targets))
    single = labels(single=True)
    assert float(wrapped.class_prior(setting(single=True, expected_positives=1.5), single).sum()) == pytest.approx(1.5)


def test_the_teacher_is_as_sharp_as_its_scale_asks_for():
    """0.01 is published for CLIP, whose scale is 100; the scale is 10 here."""
    chosen = setting()
    method = grid.build_method("linear+vlpl", chosen)
    torch.testing.assert_close(method.labels.scores, (chosen.similarities() / 0.1).softmax(dim=1))


def test_cells_share_the_cosines_of_the_training_images(monkeypatch):
    """Found once, and a cell cannot tell whether it is the one that found them."""
    passes = []

    def batches(*given, **named):
        passes.append(torch.rand(()))  # as a loader draws the seed of its processes
        return original(*given, **named)

    loaded = held(1)
    original = loaded.batches
    monkeypatch.setattr(loaded, "batches", batches)
    names = [part.name for part in dataclasses.fields(prepared.Prepared) if part.default_factory is dataclasses.MISSING]
    known = {"preset": preset(), "features": loaded, "targets": labels().clamp(min=0), "text": torch.randn(CLASSES, DIM)}
    data = prepared.Prepared(**{**dict.fromkeys(names), **known, "logit_scale": 10.0})
    cell = prepared.Cell("linear+vlpl", 0.5, 1)
    starts = []
    for _ in range(2):
        method, _ = prepared.build(data, cell, method=cell.method, preset=data.preset)
        starts.append((method.labels.scores, torch.get_rng_state()))
    assert len(passes) == 1
    assert all(torch.equal(*pair) for pair in zip(*starts, strict=True))
    batch = next(held(1).batches(IMAGES))
    torch.testing.assert_close(starts[0][0], (methods.zero_shot_tokens(batch, data.text) / 0.1).softmax(dim=1))
    fewer = dataclasses.replace(data, text=data.text[1:])
    assert fewer.similarities("zero-shot-tokens").shape == (IMAGES, CLASSES - 1)


@pytest.mark.parametrize(("epochs", "start"), [(10, 1), (31, 1), (50, 2), (62, 2), (80, 3)])
def test_corrections_begin_at_their_share_of_the_training(epochs, start):
    method = grid.build_method("linear+splc", setting(epochs=epochs))
    for epoch in range(epochs):
        method.labels.begin_epoch(epoch, epochs)
        assert bool(method.labels.correcting) == (epoch >= start)


def trained(name, path, *, stop=None, single=False, amp=False, **changes):
    """A training on tiny features; the trained method and its average."""
    chosen = setting(single=single, **changes)
    method, kept = grid.build_method(name, chosen), checkpoint.Checkpoint(path, {})
    original = checkpoint.Checkpoint.save

    def save(self, state):
        original(self, state)
        if state["epoch"] == stop:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", save)
        found = train(method, chosen, label=name, checkpoint=kept, amp=amp)
    return method, found.method


# A loss without state, those whose state moves under a training, and the peers; test_state.py goes on with every loss.
CELLS = ["linear+an", "linear+pasl-ignore", "trm-query+role", "trm-query+ll-cp", "trm-region+em-apl", "positive-coop"]

CELLS += [f"{head}+{peer}" for peer, (_, heads) in grid.PEERS.items() for head in heads]


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_trains_and_goes_on_bit_for_bit(name, tmp_path, capsys):
    changes = {"pooler": {"dropout": 0.1, "num_heads": 2}, "batch_size": 6}
    if name.endswith("ll-cp"):
        changes["losses"] = {**LOSSES, "ll-cp": {"delta": 0.1, "published_epochs": 10}}
    start = grid.build_method(name, setting(**changes))
    whole = trained(name, tmp_path / "a", **changes)
    with pytest.raises(KeyboardInterrupt):
        trained(name, tmp_path / "b", stop=3, **changes)
    for first, second in zip(whole, trained(name, tmp_path / "b", **changes), strict=True):
        assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    moved = {key for key, value in whole[0].state_dict().items() if not torch.equal(value, start.state_dict()[key])}
    assert any("inner" in key or name == "positive-coop" for key in moved)
    assert all(bool(value.isfinite().all()) for value in whole[0].state_dict().values())
    state = {
        "role": "labels.estimates",
        "ll-cp": "labels.flipped",
        "em-apl": "labels.labelled",
        "scpnet": "labels",
        "sst": "memory",
        "sarb": "prototypes",
        "pasl-ignore": "labels.prior",
    }
    assert state.get(name.partition("+")[2], next(iter(moved))) in moved


def test_soft_labels_reach_their_share_by_the_end(tmp_path):
    method, _ = trained("linear+em-apl", tmp_path / "a", epochs=10)
    unknown = (labels() == -1).sum(dim=0)
    made = method.labels.labelled.sum(dim=0)
    assert made.tolist() == [5 * math.floor(0.9 * int(n) / 5 + 1e-6) for n in unknown]


def test_single_positives_train_too(tmp_path):
    for name in ("linear+epr", "text-image+pasl-selective", "trm-region+wan", "text-pixel+scpnet", "text-pixel+sst"):
        trained(name, tmp_path / name, single=True, epochs=2)


@pytest.mark.parametrize("name", ["linear+role", "text-pixel+sst", "trm-region+sarb", "trm-query+scpnet", "positive-coop"])
def test_mixed_precision_trains_close_to_the_full_one(name, tmp_path):
    means = []
    for amp in (False, True):
        _, average = trained(name, tmp_path / str(amp), amp=amp, epochs=2)
        batch = first_batch()
        with torch.no_grad():
            means.append(average.logits(batch, average.prompts()))
    assert not torch.equal(*means)
    torch.testing.assert_close(*means, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["text-pixel+sst", "trm-region+sarb", "linear+scpnet", "linear+wan", "linear+em-apl"])
@pytest.mark.parametrize("label", [-1.0, 0.0, 1.0])
def test_one_class_one_image_and_one_kind_of_label(name, label):
    targets = torch.full((1, 1), label)
    chosen = methods.Setting(preset(expected_positives=0.5), torch.ones(1, DIM), None, 10.0, 5, num_samples=1, targets=targets)
    method = grid.build_method(name, chosen)
    batch = features.Batch(torch.randn(1, TOKENS, DIM), torch.randn(1, DIM), torch.zeros(1, dtype=torch.int64))
    for part in ("step", "found"):
        if hasattr(method, part):
            getattr(method, part).fill_(3)
    terms = method.loss(batch, method.prompts(), targets)
    sum(terms.values()).backward()
    method.after_step()
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


# A loss that is not part of the package


def test_a_loss_of_ones_own_joins_under_every_head(monkeypatch):
    for name in ("LOSSES", "MADE_BY", "GRID", "NAMES", "KNOWN_ALONE"):  # what is added goes when the test ends
        copied = type(getattr(grid, name))(getattr(grid, name))
        monkeypatch.setattr(grid, name, copied)

    class Mine(baselines.GCELoss):
        pass

    grid.add_loss("mine", Mine, q=0.3)
    grid.add_loss("mine", Mine, known_alone=True, q=0.4)  # as a cell of a notebook that is run again
    assert grid.choose_methods(["*+mine", "linear+mine+global"]) == [
        *(f"{head}+mine" for head in grid.HEADS),
        "linear+mine+global",
    ]
    settings = override(dataclasses.replace(presets.EMBEDDED, losses=grid.LOSSES), ["mine.q=0.9"])
    for losses, q in ((grid.LOSSES, 0.4), (settings.losses, 0.9)):
        mine, published = (
            grid.build_method(name, setting(losses={**losses, "gce": {"q": q}})) for name in ("text-pixel+mine", "text-pixel+gce")
        )
        assert type(mine.labels) is Mine and mine.labels.distributed is True
        batch = first_batch()
        targets = setting().targets[batch.index]
        value, wanted = (method.loss(batch, method.prompts(), targets, 0.7) for method in (mine, published))
        torch.testing.assert_close([*value.values()], [*wanted.values()])
        assert [*value] == ["mine", "weak_negative"]
    for wrong in ("gce", "my_loss", "a+b", ""):
        with pytest.raises(ValueError, match="add_loss: name must be letters, digits and dashes"):
            grid.add_loss(wrong, Mine)


# Names and numbers on the command line


def test_patterns_stand_for_methods():
    assert grid.choose_methods(["trm", "linear+role", "trm"]) == ["trm", "linear+role"]
    assert grid.choose_methods(["linear+pasl-*"]) == [f"linear+pasl-{policy}" for policy in ("ignore", "negative", "selective")]
    assert grid.choose_methods(["*+role"]) == [f"{head}+role" for head in grid.HEADS]
    assert grid.choose_methods(["linear"], grid=True) == ["linear", *grid.HEADS[1:], "positive-coop", *grid.GRID]
    assert not [name for name in arguments.DEFAULT_METHODS if of_grid(name) or name == "positive-coop"]
    for wrong in ("linear+nothing", "text-image+sst", "nothing", "trm+role", "x*"):
        with pytest.raises(ValueError, match="HEAD\\+LOSS"):
            grid.choose_methods([wrong])


def test_numbers_of_a_loss_are_settings():
    changed = override(presets.EMBEDDED, ["ll-r.delta=0.004", "pasl-selective.likely=3", "lr=1e-2"])
    assert changed.losses["ll-r"]["delta"] == 0.004 and changed.losses["pasl-selective"]["likely"] == 3 and changed.lr == 0.01
    assert LOSSES["ll-r"]["delta"] == 0.002 == presets.EMBEDDED.losses["ll-r"]["delta"]
    assert override(presets.EMBEDDED, []) == presets.EMBEDDED
    method = grid.build_method("linear+ll-r", setting(losses=changed.losses))
    assert method.labels.delta == 0.004
    for wrong, message in (
        ("ll-r.speed=3", "wanted ll-r.NAME=VALUE with one of delta, published_epochs; got"),
        ("dropout=0.1", "likely pooler.dropout is meant"),
        ("what.delta=3", "or GROUP.NAME=VALUE with a group of .*em-apl"),
        ("pasl-selective.likely=many", "must be of type int"),
        ("role.rate=-3", "role.rate must be above 0"),
        ("role.rate=inf", "role.rate must be above 0"),
        ("losses=3", "NAME=VALUE"),
    ):
        with pytest.raises(ValueError, match=message):
            override(presets.EMBEDDED, [wrong])
