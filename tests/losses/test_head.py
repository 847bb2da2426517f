"""TRMHead: what goes into its file comes out again, and its parameter groups."""

from __future__ import annotations

import copy
import io
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import oracles
from tests.helpers.values import normal, shaken
from trm_losses import (
    Calibration,
    GaussianDiscriminant,
    GlobalHead,
    PromptLearner,
    RegionPooler,
    TextRegionMatchingLoss,
    TRMHead,
    param_groups,
)

NAMES = ["aeroplane", "bicycle", "bird"]
TEXT = normal(3, 8, dtype=torch.float32)
TOKENS = normal(2, 6, 8, seed=1, dtype=torch.float32)


def head(which: Any = "query", matching: dict[str, Any] | None = None, **pooler: Any) -> TRMHead:
    torch.manual_seed(0)
    parts = RegionPooler(3, 8, **pooler), TextRegionMatchingLoss(3, **(matching or {}))
    return shaken(TRMHead(*parts, TEXT, NAMES, head=which)).eval()  # type: ignore[return-value]


SAVED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("query", {}, {}),
    ("region", {"num_heads": 2}, {}),
    ("mean", {}, {"gamma_neg": 1.0, "margin": 0.0}),
    ("mean", {"query": "free"}, {"gamma_pos": 0.5}),
    ("query", {"query_head": False}, {}),
    ("query", {"assignment": "transport"}, {}),
    ("mean", {"mlp_ratio": 15 / 8, "validate": False}, {"validate": False}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which, pooler, matching", SAVED, ids=lambda value: str(value).replace(" ", ""))
def test_round_trip(tmp_path: Path, which: str, pooler: dict[str, Any], matching: dict[str, Any], dtype: torch.dtype) -> None:
    saved = head(which, matching, **pooler).to(dtype)
    saved.save(tmp_path / "head.pt")
    loaded = TRMHead.load(tmp_path / "head.pt")
    torch.testing.assert_close(loaded(TOKENS.to(dtype)), saved(TOKENS.to(dtype)))
    assert loaded.class_names == NAMES and loaded.head == which and not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["head.pt"]  # nothing half-written stays
    for part in ("pooler", "matching"):
        ours, theirs = getattr(saved, part), getattr(loaded, part)
        for key in ("query_kind", "query_head", "num_heads", "assignment", "gamma_pos", "gamma_neg", "margin", "validate"):
            assert getattr(ours, key, None) == getattr(theirs, key, None)


def test_names_that_no_head_takes_are_not_saved(tmp_path: Path) -> None:
    made = head()
    made.class_names = ["x"]
    with pytest.raises(ValueError, match="class_names must be 3 different names, got 1"):
        made.save(tmp_path / "head.pt")
    assert not (tmp_path / "head.pt").exists()


def test_two_may_save_to_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them just before the other puts its file in place."""
    replace, path = os.replace, tmp_path / "head.pt"

    def meanwhile(*paths: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        head("mean").save(path)
        replace(*paths)

    monkeypatch.setattr(os, "replace", meanwhile)
    head("region").save(path)
    assert TRMHead.load(path).head == "region" and list(tmp_path.iterdir()) == [path]


def test_a_file_holds_plain_values_whatever_the_settings_were(tmp_path: Path) -> None:
    """Scalars of numpy and torch, and the keys of a compiled pooler."""
    pooler, matching = RegionPooler(np.int64(3), 8), TextRegionMatchingLoss(3, gamma_neg=np.float32(1))
    compiled: Any = torch.compile(pooler, backend="eager")
    names: Any = list(np.array(NAMES))
    rate: Any = torch.tensor(0.25)
    saved = TRMHead(compiled, matching, TEXT, names, rate=rate).eval()
    for made in (saved, saved.with_classes(TEXT[:2], NAMES[:2])):
        made.save(tmp_path / "head.pt")
        loaded = TRMHead.load(tmp_path / "head.pt")
        assert (loaded.class_names, loaded.rate) == (made.class_names, 0.25)
        torch.testing.assert_close(loaded(TOKENS), made(TOKENS))


OTHERS = normal(2, 8, seed=3, dtype=torch.float32)


@pytest.mark.parametrize("which", ["query", "region", "mean"])
def test_unseen_names_are_scored_and_seen_ones_keep_their_scores(which: Any) -> None:
    made = head(which)
    text = torch.cat([OTHERS[1:], TEXT, OTHERS[:1]])
    wider = made.with_classes(text, ["kite", *NAMES, "yak"])
    assert wider.class_names == ["kite", *NAMES, "yak"] and wider.head == which and not wider.training
    scores = wider(TOKENS)
    torch.testing.assert_close(scores[:, 1:4], made(TOKENS))
    regions = wider.pooler(TOKENS, text)
    for column, row in ((0, 1), (4, 0)):  # of an unseen name: its own texts, and the mean of the trained biases
        expected = []
        for part in (regions.query, regions.region):
            logits = oracles.matching_logits(
                part[:, column : column + 1],
                OTHERS[row : row + 1],
                float(made.matching.scale.detach()),
                [sum(made.matching.bias.tolist()) / 3],
            )
            expected.append(torch.tensor(logits[:, 0], dtype=torch.float32))
        expected.append((expected[0] + expected[1]) / 2)
        torch.testing.assert_close(scores[:, column], expected[["query", "region", "mean"].index(which)])
    only = wider.with_classes(text[:1], ["kite"])
    torch.testing.assert_close(only(TOKENS), scores[:, :1])


@pytest.mark.parametrize("query", ["tied", "free"])
def test_another_order_of_the_names_is_another_order_of_the_scores(query: Any) -> None:
    """And fewer names are fewer scores; where every name is known, queries of their own are no hindrance."""
    made = head("mean", query=query)
    for order in ([2, 0, 1], [1]):
        turned = made.with_classes(TEXT[order], [NAMES[i] for i in order])
        torch.testing.assert_close(turned(TOKENS), made(TOKENS)[:, order])


def test_a_head_for_other_classes_is_of_its_own_and_can_be_saved(tmp_path: Path) -> None:
    made = head().train()
    made.matching.bias.requires_grad_(False)
    made.pooler.eval()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    wider = made.with_classes(torch.cat([TEXT, OTHERS]), [*NAMES, "kite", "yak"])
    assert wider.training and not wider.pooler.training and not wider.matching.bias.requires_grad
    assert not {p.data_ptr() for p in wider.state_dict().values()} & {p.data_ptr() for p in made.state_dict().values()}
    with torch.no_grad():
        for p in wider.parameters():
            p.add_(1.0)
    assert all(torch.equal(made.state_dict()[key], value) for key, value in before.items())
    wider.eval().save(tmp_path / "head.pt")
    torch.testing.assert_close(TRMHead.load(tmp_path / "head.pt")(TOKENS), wider(TOKENS))


@pytest.mark.parametrize(
    "query, rows, names, message",
    [
        ("tied", 3, ["bird", "kite"], r"text must have shape \(C, D\) = \(2, 8\), got \(3, 8\)"),
        ("tied", 2, ["kite", "kite"], r"class_names must be 2 different names, got 2 \(1 different\)"),
        ("free", 3, ["bird", "kite", "yak"], "class_names must be among the trained ones .*, got 'kite', 'yak'; train with q"),
    ],
    ids=["rows", "twice", "free"],
)
def test_other_classes_that_do_not_fit(query: Any, rows: int, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^TRMHead: {message}"):
        head(query=query).with_classes(TEXT[:rows], names)


def test_round_trip_of_a_hidden_width_that_a_ratio_hits_only_by_rounding(tmp_path: Path) -> None:
    """15 / 11 * 11 is below 15 in floating point."""
    saved = TRMHead(RegionPooler(3, 11, num_heads=1, mlp_ratio=15 / 11), TextRegionMatchingLoss(3), torch.ones(3, 11), NAMES)
    saved.save(tmp_path / "head.pt")
    assert TRMHead.load(tmp_path / "head.pt").pooler.mlp[1].out_features == 15


@pytest.mark.parametrize("which", ["query", "region", "mean"])
@pytest.mark.parametrize(
    "pooler", [{"num_heads": 2}, {"query": "free"}, {"query_head": False}, {"assignment": "transport"}], ids=str
)
def test_classes_in_chunks_have_the_same_logits(which: Any, pooler: dict[str, Any]) -> None:
    made, tokens = head(which, **pooler).double(), TOKENS.double().requires_grad_()
    for chunk in (1, 2, 3):
        with torch.no_grad():
            torch.testing.assert_close(made(tokens, chunk=chunk), made(tokens), rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(made.predict(tokens, chunk=chunk), torch.sigmoid(made(tokens)), rtol=1e-10, atol=1e-11)
        grads = [torch.autograd.grad(made(tokens, chunk=size).square().sum(), tokens)[0] for size in (chunk, None)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)


def test_many_classes_are_scored_in_chunks_unless_told_or_trained() -> None:
    """Regions of 9,000 classes are never held at once; those of few are, as before."""
    many, text = 9000, normal(9000, 64, dtype=torch.float32)
    made = TRMHead(RegionPooler(many, 64), TextRegionMatchingLoss(many), text, [str(c) for c in range(many)])
    widths: list[int] = []
    made.pooler.mlp.register_forward_hook(lambda *args: widths.append(args[2].shape[1]))
    tokens = normal(16, 4, 64, seed=1, dtype=torch.float32)
    with torch.no_grad():
        chunked = made.eval()(tokens)
        assert len(widths) > 1 and sum(widths) == many and max(widths) < many / 2
        widths.clear()
        made(tokens[:, :, :], chunk=many)
        made(tokens[:2])
    assert widths == [many, many]
    widths.clear()
    torch.testing.assert_close(made(tokens), chunked, rtol=1e-5, atol=1e-5)
    assert widths == [many]
    with pytest.raises(ValueError, match="TRMHead: chunk must be at least 1, got 0"):
        made(tokens, chunk=0)


@pytest.mark.parametrize("which", ["query", "region", "mean"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_padded_image_has_the_logits_that_it_has_alone(which: Any, chunk: int | None) -> None:
    """Whatever lies under the padding."""
    text, tokens = normal(60, 32, dtype=torch.float32), normal(2, 5, 32, seed=1)
    parts = RegionPooler(60, 32), TextRegionMatchingLoss(60)
    made = shaken(TRMHead(*parts, text, [str(c) for c in range(60)], head=which)).double()
    alone = torch.cat([made(tokens[:1, :3], chunk=chunk), made(tokens[1:], chunk=chunk)])
    tokens[0, 3:], mask = torch.nan, torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    torch.testing.assert_close(made(tokens, key_padding_mask=mask, chunk=chunk), alone)
    torch.testing.assert_close(made.predict(tokens, key_padding_mask=mask, chunk=chunk), torch.sigmoid(alone))


@pytest.mark.parametrize("which, views", [("region", None), ("mean", None), ("query", "both"), ("calibrated", "both")])
def test_exports_with_any_number_of_images(which: Any, views: str | None) -> None:
    """Saved and read again; the mean of both scores is here of free queries and padded tokens."""
    made = merged(views) if views else head(which, query="free" if which == "mean" else "tied")
    if which == "calibrated":
        made = calibrated(views)
    extra = {"penultimate": lambda n: normal(n, 4, seed=6, dtype=torch.float32)} if views else {}
    if which == "mean":
        extra = {"key_padding_mask": lambda n: torch.arange(n * 6).view(n, 6) % 4 == 3}

    def given(n: int) -> dict[str, Tensor]:
        return {"tokens": normal(n, 6, 8, seed=5, dtype=torch.float32), **{key: make(n) for key, make in extra.items()}}

    shapes, file = dict.fromkeys(given(2), {0: torch.export.Dim("batch")}), io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(made, (), given(2), dynamic_shapes=shapes), file)
        file.seek(0)
        program = torch.export.load(file).module()
        for n in (1, 9):
            torch.testing.assert_close(program(**given(n)), made(**given(n)))


def test_a_head_of_regions_alone_computes_no_mlp() -> None:
    made, called = head("region"), []
    made.pooler.mlp.register_forward_hook(lambda *_: called.append(1))
    made(TOKENS)
    made(TOKENS, chunk=1)
    assert not called


@pytest.mark.parametrize("training", [True, False])
def test_predict_is_without_dropout_and_gradient_and_leaves_the_mode(training: bool) -> None:
    made, calls = head().train(training), []
    made.pooler.register_forward_hook(lambda *_: calls.append(1))  # the pooler is called as a module
    assert made.pooler.dropout.p == 0.0
    made.pooler.dropout.p = 0.5
    scores = made.predict(TOKENS)
    assert not scores.requires_grad and calls == [1]
    torch.testing.assert_close(scores, made.predict(TOKENS))
    torch.testing.assert_close(scores, torch.sigmoid(made.eval()(TOKENS)))
    made.train(training)
    made.predict(TOKENS)
    assert made.training == made.pooler.training == made.pooler.dropout.training == training
    with pytest.raises(ValueError, match="tokens must have shape"):
        made.predict(TOKENS[0])
    assert made.training == training
    made.pooler.eval()  # a part that was frozen stays so
    made.predict(TOKENS)
    assert made.training == made.matching.training == training and not made.pooler.training


FOREIGN: dict[str, tuple[Any, str]] = {
    "older": ({"format": "trm_losses.TRMHead/4"}, "trm_losses.TRMHead/4; save the head again$"),
    "state": ({"weight": TEXT}, "None; save the head again$"),
    "tensor": (TEXT, "Tensor; save the head again$"),
    "list": ([1, 2], "list; save the head again$"),
    "text": (b"hello", ""),
    "cut off": (b"PK\x03\x04 cut off", ""),
}


@pytest.mark.parametrize("content, got", FOREIGN.values(), ids=FOREIGN)
def test_file_of_something_else(tmp_path: Path, content: Any, got: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "x.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"^TRMHead: .*x.pt must be a file written by save .*{got}"):
        TRMHead.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"class_names": NAMES[:2]}, r"class_names must be 3 different names, got 2 \(2 different\)"),
        ({"class_names": ["cat", "cat", "dog"]}, r"class_names must be 3 different names, got 3 \(2 different\)"),
        ({"text": torch.ones(4, 8)}, r"text must have shape \(C, D\) = \(3, 8\), got \(4, 8\)"),
        ({"matching": TextRegionMatchingLoss(4)}, "matching must have the pooler's num_classes = 3, got 4"),
        ({"head": "both"}, "head must be one of 'query', 'region', 'mean', got 'both'"),
        ({"rate": 1.5}, "rate must be at least 0 and at most 1, got 1.5"),
        ({"global_head": GlobalHead(4, 2)}, "global_head must have the pooler's num_classes = 3, got 4"),
        ({"calibration": Calibration(4)}, "calibration must have the pooler's num_classes = 3, got 4"),
    ],
    ids=["few", "twice", "text", "matching", "head", "rate", "global head", "calibration"],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "pooler": RegionPooler(3, 8),
        "matching": TextRegionMatchingLoss(3),
        "text": TEXT,
        "class_names": NAMES,
    }
    with pytest.raises(ValueError, match=f"^TRMHead: {message}"):
        TRMHead(**{**given, **change})


# With logits of the image as a whole --------------------------------------------------------------------------------------

PENULTIMATE = normal(2, 4, seed=4, dtype=torch.float32)
VIEWS = ("both", "prior", "penultimate")
PRIOR: Any = {"tokens_per_class": 9, "scale": 5.0, "shrinkage": 0.2, "sharpness": 3.0, "label_weight": 2.0}


def global_head(views: str = "both", classes: int = 3) -> GlobalHead:
    x, f, y = normal(30, 5, 8, seed=6), normal(30, 4, seed=7), torch.arange(30 * classes).view(30, classes) % 7 % 3 - 1
    prior = None if views == "penultimate" else GaussianDiscriminant(classes, 8, **PRIOR).fit([x], normal(classes, 8))
    settings: Any = {"shrinkage": 0.4, "spread": 2.0, "unknown_weight": 0.7}
    return GlobalHead(classes, None if views == "prior" else 4, prior, **settings).fit([(x, f, y)])


def merged(views: str = "both", rate: float = 0.3, which: Any = "query", **pooler: Any) -> TRMHead:
    plain = head(which, **pooler)
    return TRMHead(plain.pooler, plain.matching, TEXT, NAMES, head=which, global_head=global_head(views), rate=rate).eval()


@pytest.mark.parametrize("which", ["query", "region", "mean"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("views", VIEWS)
def test_the_share_of_the_global_logits_is_the_rate(views: str, rate: float, which: Any) -> None:
    """With padding and in chunks of classes, too."""
    made, mask = merged(views, rate, which), torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
    for masks in ({}, {"key_padding_mask": mask}):
        local, whole = head(which)(TOKENS, **masks), global_head(views)(TOKENS, PENULTIMATE, **masks)
        assert not torch.allclose(local, whole, atol=0.1)
        expected = (1 - rate) * local + rate * whole
        torch.testing.assert_close(made(TOKENS, PENULTIMATE, **masks), expected)
        torch.testing.assert_close(made(TOKENS, PENULTIMATE, chunk=2, **masks), expected)
        torch.testing.assert_close(made.predict(TOKENS, PENULTIMATE, **masks), torch.sigmoid(expected))
    if views == "prior":
        torch.testing.assert_close(made(TOKENS), made(TOKENS, PENULTIMATE))
    torch.testing.assert_close(TRMHead(made.pooler, made.matching, TEXT, NAMES, global_head=made.global_head).rate, 0.5)


@pytest.mark.parametrize("views", VIEWS)
def test_round_trip_with_a_global_head(tmp_path: Path, views: str) -> None:
    saved = merged(views)
    saved.save(tmp_path / "head.pt")
    loaded = TRMHead.load(tmp_path / "head.pt")
    torch.testing.assert_close(loaded(TOKENS, PENULTIMATE), saved(TOKENS, PENULTIMATE))
    one, two = loaded.global_head, saved.global_head
    assert one is not None and two is not None and loaded.rate == 0.3 and (one.prior is None) == (two.prior is None)
    for key in ("num_classes", "width", "spread", "shrinkage", "unknown_weight", "validate", "total", "prior"):
        assert repr(getattr(one, key)) == repr(getattr(two, key))
    assert one.prior is None or {key: getattr(one.prior, key) for key in PRIOR} == PRIOR


@pytest.mark.parametrize("views", VIEWS)
def test_other_classes_of_a_global_head(views: str) -> None:
    """Those that stay keep their logits; a new one has its prior, if there is one."""
    made, order = merged(views), [2, 0]
    turned = made.with_classes(TEXT[order], [NAMES[i] for i in order])
    torch.testing.assert_close(turned(TOKENS, PENULTIMATE), made(TOKENS, PENULTIMATE)[:, order])
    text, names = torch.cat([TEXT, OTHERS[:1]]), [*NAMES, "kite"]
    if views == "penultimate":
        with pytest.raises(
            ValueError, match="TRMHead: class_names must be among the trained ones where the global head has no prior"
        ):
            made.with_classes(text, names)
        return
    wider = made.with_classes(text, names)
    assert wider.rate == 0.3 and made.global_head is not None and made.global_head.num_classes == 3
    torch.testing.assert_close(wider(TOKENS, PENULTIMATE)[:, :3], made(TOKENS, PENULTIMATE))
    whole = made.global_head.with_classes([0, 1, 2, None], text=text)(TOKENS, PENULTIMATE)
    local = head().with_classes(text, names)(TOKENS)
    torch.testing.assert_close(wider(TOKENS, PENULTIMATE), 0.7 * local + 0.3 * whole)


def test_a_global_head_is_not_trained_and_stays_in_single_precision() -> None:
    made = merged()
    assert {id(p) for p in made.parameters()} == {id(p) for part in (made.pooler, made.matching) for p in part.parameters()}
    expected = made(TOKENS, PENULTIMATE)
    for dtype in (torch.float64, torch.float16):
        other = merged().to(dtype)
        assert {b.dtype for b in other.global_head.buffers()} <= {torch.float32, torch.int64}  # type: ignore[union-attr]
        got = other(TOKENS.to(dtype), PENULTIMATE.to(dtype))
        assert got.dtype == head().to(dtype)(TOKENS.to(dtype)).dtype
        torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)


# Once training is over ------------------------------------------------------------------------------------------------------


def labelled(single: bool) -> list[tuple[Any, ...]]:
    """Batches of training images; of one there is padding."""
    known = torch.rand(40, 3, generator=torch.Generator().manual_seed(3)) < 0.6
    y = torch.where(known, (normal(40, 3, seed=8) > 0).float(), -1.0)
    y = torch.where(y == 1, 1.0, -1.0) if single else y
    x, f = normal(40, 6, 8, seed=6, dtype=torch.float32), normal(40, 4, seed=7, dtype=torch.float32)
    mask = torch.arange(6).expand(5, 6) >= 5
    return [*zip(x[5:].split(15), f[5:].split(15), y[5:].split(15), strict=True), (x[:5], f[:5], y[:5], mask)]


def scores(made: Any, batches: list[tuple[Any, ...]]) -> list[Tensor]:
    with torch.no_grad():
        return [made(x, f, key_padding_mask=(*mask, None)[0]) for x, f, _, *mask in batches]


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("views", VIEWS)
def test_finish_teaches_the_global_head_by_both_views(views: str, single: bool) -> None:
    """Step by step: calibrated scores of both stand for the unknown labels, and the scores are calibrated again."""
    batches, expected = labelled(single), 1.2 if single else None
    y, untaught = torch.cat([batch[2] for batch in batches]), merged(views)
    estimates = torch.sigmoid(Calibration(3).fit(z := torch.cat(scores(untaught, batches)), y, expected_positives=expected)(z))
    told = [(x, f, t, (*mask, None)[0]) for x, f, t, *mask in batches]
    sizes = [len(batch[0]) for batch in batches]
    taught = merged(views)
    assert taught.global_head is not None
    taught.global_head.fit(
        [(*batch, part) for batch, part in zip(told, estimates.split(sizes), strict=True)], expected_positives=expected
    )
    again = Calibration(3).fit(torch.cat(scores(taught, batches)), y, expected_positives=expected)

    made = merged(views).train()
    made.calibration = Calibration(3)
    made.calibration.shift.fill_(7.0)  # of an earlier call, which must not matter
    assert made.finish(batches, expected_positives=expected) is made and made.training
    torch.testing.assert_close(made.eval()(TOKENS, PENULTIMATE), again(taught(TOKENS, PENULTIMATE)), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(taught(TOKENS, PENULTIMATE), untaught(TOKENS, PENULTIMATE), atol=1e-2)


def test_finish_without_two_views_calibrates_alone() -> None:
    batches = labelled(False)
    y = torch.cat([batch[2] for batch in batches])
    for made in (head(), merged(rate=0.0), merged(rate=1.0)):
        if made.global_head is None:
            batches = [(x, None, *rest) for x, _, *rest in labelled(False)]
        whole = copy.deepcopy(made.global_head)
        expected = Calibration(3).fit(torch.cat(scores(made, batches)), y)
        found = made.finish(batches)
        assert found.calibration is not None
        torch.testing.assert_close(found.calibration.state_dict(), expected.state_dict())
        assert whole is None or (found.global_head is not None and whole.weight.equal(found.global_head.weight))
        batches = labelled(False)


def test_what_inference_mode_made_can_be_trained_and_takes_a_state() -> None:
    made = merged()
    with torch.inference_mode():
        made.finish(labelled(False))
        other = made.with_classes(TEXT[:2], NAMES[:2])
        assert merged().finish(labelled(False)).calibration is not None  # one that was built here
    for part in (made, other):
        part.load_state_dict(part.state_dict())
        part(TOKENS, PENULTIMATE).sum().backward()


def test_finish_reads_its_batches_once_and_holds_the_tokens_of_one() -> None:
    read: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[tuple[Any, ...]]:
        for x, *rest in labelled(False):
            assert sum(tokens() is not None for tokens in read) <= 1
            tokens = x.clone()
            read.append(weakref.ref(tokens))
            yield (tokens, *rest)
            del tokens

    made = merged().finish(batches())
    assert len(read) == 4
    torch.testing.assert_close(made.state_dict(), merged().finish(labelled(False)).state_dict())


def test_finish_is_refused_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trm_losses.head.resolve_group", lambda distributed: object() if distributed else None)
    made = merged()
    assert made.global_head is not None
    made.global_head.distributed = True
    with pytest.raises(ValueError, match="TRMHead: finish must see all images in one process, got several; use a head with"):
        made.finish(labelled(False))


def test_finish_takes_what_training_takes() -> None:
    """Soft labels do not calibrate, integers are labels too, and where all is known nobody is taught."""
    soft = [(x, f, torch.where(y == 1, 0.75, y.double()), *mask) for x, f, y, *mask in labelled(False)]
    with pytest.raises(ValueError, match="Calibration: targets must hold known present labels"):
        merged().finish(soft)
    whole = merged().finish([(x, f, y.to(torch.int8), *mask) for x, f, y, *mask in labelled(False)])
    torch.testing.assert_close(whole.state_dict(), merged().finish(labelled(False)).state_dict())
    known = merged().finish([(x, f, y.clamp(min=0), *mask) for x, f, y, *mask in labelled(False)])
    assert known.global_head is not None and known.global_head.weight.equal(global_head().weight)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: [], ValueError, "TRMHead: batches must hold at least one image, got none; a generator is read once"),
    (lambda: [(TOKENS, PENULTIMATE)], ValueError, "TRMHead: batches must be .*, got 2 parts"),
    (lambda: [(TOKENS, PENULTIMATE, *[torch.ones(2, 3)] * 3)], ValueError, "TRMHead: batches must be .*, got 5 parts"),
    (lambda: [(TOKENS, PENULTIMATE, None)], TypeError, "TRMHead: targets must be a torch.Tensor, got NoneType"),
    (lambda: [(TOKENS, PENULTIMATE, torch.full((2, 3), 2))], ValueError, "TRMHead: targets must be 1 .*, got 2"),
    (lambda: labelled(True), ValueError, "Calibration: targets must hold known absent labels"),
    (lambda: [(x, f * torch.nan, y) for x, f, y, *_ in labelled(False)], ValueError, "GlobalHead: penultimate must be finite"),
]


@pytest.mark.parametrize(
    "batches, error, message", REFUSED, ids=["none", "two parts", "five parts", "no labels", "labels", "single", "NaN"]
)
def test_a_refused_finish_says_why_and_changes_nothing(batches: Any, error: type[Exception], message: str) -> None:
    made = merged()
    made.calibration = Calibration(3)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(error, match=f"^{message}"):
        made.finish(batches())
    torch.testing.assert_close(made.state_dict(), before)


def test_a_finish_that_is_broken_off_leaves_the_head_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    made = merged()
    before, calibrate, calls = copy.deepcopy(made.state_dict()), TRMHead._calibrate, []

    def broken(self: TRMHead, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calibrate(self, *rest)

    monkeypatch.setattr(TRMHead, "_calibrate", broken)
    with pytest.raises(KeyboardInterrupt):
        made.finish(labelled(False))
    torch.testing.assert_close(made.state_dict(), before)
    assert made.calibration is None


# With a calibration ---------------------------------------------------------------------------------------------------------


def calibrated(views: str | None = None, classes: int = 3) -> TRMHead:
    """The same head with scales and shifts of its own for each class."""
    made = head() if views is None else merged(views)
    logits = 2 * normal(60, classes, seed=8)
    made.calibration = Calibration(classes).fit(logits, (logits + normal(60, classes, seed=9) > normal(classes)).long())
    return made


@pytest.mark.parametrize("views", [None, "both"])
def test_scores_are_the_calibrated_ones(views: str | None) -> None:
    """Those of the merged logits; in chunks of classes, and by predict, too."""
    made, given = calibrated(views), (TOKENS, PENULTIMATE)[: 2 if views else 1]
    plain, calibration = (head() if views is None else merged(views)), made.calibration
    assert calibration is not None and len(set(calibration.scale.tolist())) == 3
    expected = plain(*given) * calibration.scale + calibration.shift
    assert not torch.allclose(expected, plain(*given), atol=0.1)
    torch.testing.assert_close(made(*given), expected)
    torch.testing.assert_close(made(*given, chunk=2), expected)
    torch.testing.assert_close(made.predict(*given), expected.sigmoid())


def test_round_trip_with_a_calibration(tmp_path: Path) -> None:
    for saved in (calibrated(), calibrated("both")):
        one = saved.calibration
        assert one is not None
        one.validate = False
        saved.save(tmp_path / "head.pt")
        loaded = TRMHead.load(tmp_path / "head.pt")
        torch.testing.assert_close(loaded(TOKENS, PENULTIMATE), saved(TOKENS, PENULTIMATE), rtol=0, atol=0)
        two = loaded.calibration
        assert two is not None and torch.equal(two.pooled, one.pooled) and not two.validate
    head().save(tmp_path / "head.pt")
    assert TRMHead.load(tmp_path / "head.pt").calibration is None


def test_the_state_of_a_finished_head_needs_a_calibration() -> None:
    state, made = calibrated().state_dict(), head()
    with pytest.raises(
        RuntimeError, match=r"^TRMHead: calibration must be there .*, got None; give calibration=Calibration\(3\)"
    ):
        made.load_state_dict(state)
    made.load_state_dict(state, strict=False)
    made.calibration = Calibration(3)
    made.load_state_dict(state)


def test_other_classes_of_a_calibration() -> None:
    """Known names keep their numbers, new ones have the pooled ones; the head that it came from keeps its own."""
    made, text = calibrated(), torch.cat([TEXT[[2, 0]], OTHERS[:1]])
    wider = made.with_classes(text, [NAMES[2], NAMES[0], "kite"])
    torch.testing.assert_close(wider(TOKENS)[:, :2], made(TOKENS)[:, [2, 0]])
    scale, shift = made.calibration.pooled  # type: ignore[union-attr]
    plain = head().with_classes(text, [NAMES[2], NAMES[0], "kite"])(TOKENS)
    torch.testing.assert_close(wider(TOKENS)[:, 2], plain[:, 2] * scale + shift)
    assert made.calibration is not None and made.calibration.num_classes == 3


def test_a_calibrated_head_keeps_its_precision_and_compiles() -> None:
    for dtype in (torch.float64, torch.float16):
        made, plain = calibrated().to(dtype), head().to(dtype)
        assert made(TOKENS.to(dtype)).dtype == plain(TOKENS.to(dtype)).dtype
        assert made.calibration is not None and made.calibration.scale.dtype == torch.float32
    made = calibrated()
    torch._dynamo.reset()
    with torch.no_grad():
        whole = torch.compile(made, fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(TOKENS), made(TOKENS))
    torch.testing.assert_close(torch.compile(made.predict, fullgraph=True, backend="eager")(TOKENS), made.predict(TOKENS))


@pytest.mark.parametrize("kind", ["tied", "free"])
def test_param_groups_cover_everything_once(kind: Any) -> None:
    made = head(query=kind)
    made.pooler.key_weight.requires_grad_(False)
    decayed, rest = param_groups(made, weight_decay=0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0) and "lr" not in decayed
    names = {id(p): name for name, p in made.named_parameters()}
    named = [{names[id(p)] for p in group["params"]} for group in (decayed, rest)]
    matrices = {"query_weight", "value_weight", "output.weight", "mlp.1.weight", "mlp.4.weight"}
    assert named[0] == {f"pooler.{name}" for name in matrices | ({"query"} if kind == "free" else set())}
    assert named[0] | named[1] == {name for name, p in made.named_parameters() if p.requires_grad}
    assert not named[0] & named[1] and sum(len(g["params"]) for g in (decayed, rest)) == len(named[0] | named[1])
    assert {"matching.log_scale", "matching.bias", "pooler.log_attention_scale", "pooler.mlp.0.weight"} <= named[1]
    torch.optim.AdamW(param_groups(made, lr=0.1))


def test_param_groups_of_several_modules() -> None:
    made, prompts = head(), PromptLearner("residual", text=TEXT)
    groups = param_groups(made, prompts, made.pooler, lr=0.5)
    assert [g["lr"] for g in groups] == [0.5, 0.5] and [g["weight_decay"] for g in groups] == [1e-2, 0.0]
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) and id(prompts.delta) in ids
    assert param_groups(PromptLearner("fixed", text=TEXT)) == []
    assert len(param_groups(prompts)) == 1
