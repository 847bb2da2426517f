"""TRMHead: what goes into its file comes out again, and its parameter groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import normal, shaken

from trm_losses import PromptLearner, RegionPooler, TextRegionMatchingLoss, TRMHead, param_groups

NAMES = ["aeroplane", "bicycle", "bird"]
TEXT = normal(3, 8, dtype=torch.float32)
TOKENS = normal(2, 6, 8, seed=1, dtype=torch.float32)


def head(which: Any = "query", matching: dict[str, Any] | None = None, **pooler: Any) -> TRMHead:
    torch.manual_seed(0)
    parts = RegionPooler(3, 8, **pooler), TextRegionMatchingLoss(3, **(matching or {}))
    made = shaken(TRMHead(*parts, TEXT, NAMES, head=which))
    return made.eval()  # type: ignore[return-value]


SAVED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("query", {}, {}),
    ("region", {"num_heads": 2}, {"normalize_regions": True}),
    ("mean", {"key_norm": "layer", "normalize_tokens": False}, {"gamma_neg": 1.0, "margin": 0.0}),
    ("query", {"query": "free"}, {"detach_focus": True}),
    ("query", {"query_head": False}, {}),
    ("mean", {"mlp_ratio": 15 / 8, "validate": False}, {"validate": False}),
]


@pytest.mark.parametrize("which, pooler, matching", SAVED, ids=lambda value: str(value).replace(" ", ""))
def test_round_trip(tmp_path: Path, which: str, pooler: dict[str, Any], matching: dict[str, Any]) -> None:
    saved = head(which, matching, **pooler)
    saved.save(tmp_path / "head.pt")
    loaded = TRMHead.load(tmp_path / "head.pt")
    assert torch.equal(loaded(TOKENS), saved(TOKENS))
    assert loaded.class_names == NAMES and loaded.head == which and not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["head.pt"]  # nothing half-written stays
    for part in ("pooler", "matching"):
        ours, theirs = getattr(saved, part), getattr(loaded, part)
        for key in ("num_heads", "key_norm", "normalize_tokens", "gamma_neg", "margin", "detach_focus", "validate"):
            assert getattr(ours, key, None) == getattr(theirs, key, None)


def test_round_trip_keeps_double_precision(tmp_path: Path) -> None:
    saved = head().double()
    saved.save(tmp_path / "head.pt")
    loaded = TRMHead.load(tmp_path / "head.pt")
    assert loaded(TOKENS.double()).dtype == torch.float64 and torch.equal(loaded(TOKENS.double()), saved(TOKENS.double()))


def test_round_trip_of_a_hidden_width_that_a_ratio_hits_only_by_rounding(tmp_path: Path) -> None:
    """15 / 11 * 11 is below 15 in floating point."""
    saved = TRMHead(RegionPooler(3, 11, num_heads=1, mlp_ratio=15 / 11), TextRegionMatchingLoss(3), torch.ones(3, 11), NAMES)
    saved.save(tmp_path / "head.pt")
    assert TRMHead.load(tmp_path / "head.pt").pooler.mlp[1].out_features == 15


def test_heads() -> None:
    query, region, mean = (head(which)(TOKENS) for which in ("query", "region", "mean"))
    assert not torch.allclose(query, region)
    torch.testing.assert_close(mean, (query + region) / 2)
    made = head()
    regions = made.pooler(TOKENS, TEXT)
    assert torch.equal(query, made.matching.logits(regions.query, TEXT))
    assert torch.equal(region, made.matching.logits(regions.region, TEXT))


@pytest.mark.parametrize("training", [True, False])
def test_predict_is_without_dropout_and_gradient_and_leaves_the_mode(training: bool) -> None:
    made = head().train(training)
    assert made.pooler.dropout.p == 0.0
    made.pooler.dropout.p = 0.5
    scores = made.predict(TOKENS)
    assert torch.equal(scores, made.predict(TOKENS)) and not scores.requires_grad
    assert torch.equal(scores, torch.sigmoid(made.eval()(TOKENS)))
    made.train(training)
    made.predict(TOKENS)
    assert made.training == made.pooler.training == made.pooler.dropout.training == training
    with pytest.raises(ValueError, match="tokens must have shape"):
        made.predict(TOKENS[0])
    assert made.training == training
    made.pooler.eval()  # a part that was frozen stays so
    made.predict(TOKENS)
    assert made.training == made.matching.training == training and not made.pooler.training


@pytest.mark.parametrize(
    "content, got",
    [({"format": "another"}, "got another"), ({"weight": TEXT}, "got None"), (TEXT, "got Tensor"), ([1, 2], "got list")],
    ids=["another", "state", "tensor", "list"],
)
def test_file_of_something_else(tmp_path: Path, content: Any, got: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"TRMHead: .*x.pt must be a file written by save .*{got}"):
        TRMHead.load(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut off"])
def test_file_of_no_tensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="TRMHead: .*x.pt must be a file written by save"):
        TRMHead.load(tmp_path / "x.pt")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TRMHead.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"class_names": NAMES[:2]}, r"class_names must be 3 different names, got 2 \(2 different\)"),
        ({"class_names": ["cat", "cat", "dog"]}, r"class_names must be 3 different names, got 3 \(2 different\)"),
        ({"text": torch.ones(4, 8)}, r"text must have shape \(C, D\) = \(3, 8\), got \(4, 8\)"),
        ({"matching": TextRegionMatchingLoss(4)}, "matching must have the pooler's num_classes = 3, got 4"),
        ({"head": "both"}, "head must be one of 'query', 'region', 'mean', got 'both'"),
    ],
    ids=["few", "twice", "text", "matching", "head"],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "pooler": RegionPooler(3, 8), "matching": TextRegionMatchingLoss(3), "text": TEXT, "class_names": NAMES
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^TRMHead: {message}"):
        TRMHead(**{**given, **change})


@pytest.mark.parametrize("kind", ["tied", "free"])
def test_param_groups_cover_everything_once(kind: Any) -> None:
    made = head(query=kind)
    made.pooler.key_weight.requires_grad_(False)
    decayed, rest = made.param_groups(weight_decay=0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0) and "lr" not in decayed
    names = {id(p): name for name, p in made.named_parameters()}
    named = [{names[id(p)] for p in group["params"]} for group in (decayed, rest)]
    matrices = {"query_weight", "value_weight", "output.weight", "mlp.1.weight", "mlp.4.weight"}
    assert named[0] == {f"pooler.{name}" for name in matrices | ({"query"} if kind == "free" else set())}
    assert named[0] | named[1] == {name for name, p in made.named_parameters() if p.requires_grad}
    assert not named[0] & named[1] and sum(len(g["params"]) for g in (decayed, rest)) == len(named[0] | named[1])
    assert {"matching.log_scale", "matching.bias", "pooler.log_attention_scale", "pooler.mlp.0.weight"} <= named[1]
    torch.optim.AdamW(made.param_groups(lr=0.1))


def test_param_groups_of_several_modules() -> None:
    made, prompts = head(), PromptLearner("residual", text=TEXT)
    groups = param_groups(made, prompts, made.pooler, lr=0.5)
    assert [g["lr"] for g in groups] == [0.5, 0.5] and [g["weight_decay"] for g in groups] == [1e-2, 0.0]
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) and id(prompts.delta) in ids
    assert param_groups(PromptLearner("fixed", text=TEXT)) == []
    assert len(param_groups(prompts)) == 1
