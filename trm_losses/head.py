"""TRMHead: what inference needs, and no more: pooler, matching, class texts and names."""

from __future__ import annotations

import os
import pickle
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._checks import Dims, check_choice
from .region_pooler import RegionPooler, Regions
from .text_region_matching import TextRegionMatchingLoss

__all__ = ["TRMHead", "param_groups"]

_FORMAT = "trm_losses.TRMHead/1"
_POOLER_SETTINGS = ("num_classes", "dim", "num_heads", "query_head", "normalize_tokens", "key_norm", "validate")
_MATCHING_SETTINGS = (
    "num_classes", "gamma_pos", "gamma_neg", "margin", "detach_focus", "normalize_regions", "reduction", "validate",
)  # fmt: skip


def param_groups(*modules: nn.Module, lr: float | None = None, weight_decay: float = 1e-2) -> list[dict[str, Any]]:
    """Trainable parameters of modules in two groups for an optimiser: matrices with weight decay, the rest without.

    Scales, biases and norms are the rest: whatever has fewer than two dimensions.

    Args:
        modules: a module given twice counts once.
        lr: learning rate of both groups; the optimiser's own where it is not given.
        weight_decay: of the matrices.
    """
    seen: dict[int, nn.Parameter] = {}
    for module in modules:
        seen.update({id(p): p for p in module.parameters() if p.requires_grad})
    groups: list[dict[str, Any]] = [
        {"params": [p for p in seen.values() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in seen.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return groups if lr is None else [{**group, "lr": lr} for group in groups]


class TRMHead(nn.Module):
    """Scores of classes from image tokens: a trained pooler and matching with the texts they were trained to.

    Args:
        pooler, matching: trained, or fresh ones to train with a loss of your own.
        text: (C, D) class texts.
        class_names: C names, in the order of the classes.
        head: which logits: ``"query"``, ``"region"`` or the ``"mean"`` of both.

    Shape:
        tokens (B, N, D) -> logits or scores (B, C).

    Example:
        >>> import torch
        >>> head = TRMHead(RegionPooler(2, 8), TextRegionMatchingLoss(2), torch.randn(2, 8), ["cat", "dog"])
        >>> head.predict(torch.randn(4, 49, 8)).shape
        torch.Size([4, 2])

    Reference: which head scores at test time is not known of TRM-ML; the query head is our default.
    """

    text: Tensor

    def __init__(
        self,
        pooler: RegionPooler,
        matching: TextRegionMatchingLoss,
        text: Tensor,
        class_names: list[str] | tuple[str, ...],
        *,
        head: Literal["query", "region", "mean"] = "query",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_choice(name, "head", head, ("query", "region", "mean"))
        Dims(name, C=pooler.num_classes, D=pooler.dim).check("text", text, "C D")
        if matching.num_classes != pooler.num_classes:
            raise ValueError(
                f"{name}: matching must have the pooler's num_classes = {pooler.num_classes}, got {matching.num_classes}"
            )
        class_names = list(class_names)
        if len(class_names) != pooler.num_classes or len(set(class_names)) != len(class_names):
            raise ValueError(
                f"{name}: class_names must be {pooler.num_classes} different names, got {len(class_names)} "
                f"({len(set(class_names))} different)"
            )
        self.pooler, self.matching, self.class_names, self.head = pooler, matching, class_names, head
        self.register_buffer("text", text.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, C)."""
        regions: Regions = self.pooler(tokens, self.text)
        if self.head == "mean":
            query, region = (self.matching.logits(r, self.text) for r in (regions.query, regions.region))
            return 0.5 * (query + region)
        return self.matching.logits(regions.query if self.head == "query" else regions.region, self.text)

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Probabilities (B, C), in eval mode whatever mode the module is in."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return torch.sigmoid(self(tokens))
        finally:
            for module, training in modes:
                module.training = training

    def param_groups(self, *, lr: float | None = None, weight_decay: float = 1e-2) -> list[dict[str, Any]]:
        """For an optimiser: matrices with weight decay; scale, bias and norms without."""
        return param_groups(self, lr=lr, weight_decay=weight_decay)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything :meth:`load` needs into one file (tensors and plain values, no code); not ``distributed``."""
        temporary = f"{os.fspath(path)}.tmp"
        torch.save(
            {
                "format": _FORMAT,
                "pooler": {key: getattr(self.pooler, key) for key in _POOLER_SETTINGS},
                "mlp_width": self.pooler.mlp[1].out_features if self.pooler.query_head else 0,
                "dropout": self.pooler.dropout_rate,
                "free_query": self.pooler.query is not None,
                "matching": {key: getattr(self.matching, key) for key in _MATCHING_SETTINGS},
                "class_names": self.class_names,
                "head": self.head,
                "state": {key: value.cpu() for key, value in self.state_dict().items()},
            },
            temporary,
        )
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> TRMHead:
        """The head that :meth:`save` wrote, in eval mode."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{cls.__name__}: {os.fspath(path)} must be a file written by save ({_FORMAT}), got no such file: {error}"
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{cls.__name__}: {os.fspath(path)} must be a file written by save ({_FORMAT}), got {found}")
        state = content["state"]
        settings = content["pooler"]
        pooler = RegionPooler(
            **settings,
            dropout=content["dropout"],
            query="free" if content["free_query"] else "tied",
            mlp_ratio=content["mlp_width"] / settings["dim"] if settings["query_head"] else 4.0,
            dtype=state["pooler.query_weight"].dtype,
        )
        matching = TextRegionMatchingLoss(**content["matching"], dtype=state["matching.bias"].dtype)
        head = cls(pooler, matching, state["text"], content["class_names"], head=content["head"])
        head.load_state_dict(state)
        return head.to(device).eval()

    def extra_repr(self) -> str:
        return f"classes={len(self.class_names)}, head={self.head!r}"
