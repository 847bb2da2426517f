"""The losses of others that are installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.trust.parts import WIDTH, Inputs, Part, Setting, logits, normal
from trm_losses import functional as TF


def peers() -> list[Part]:
    """The losses of others that are installed, each against itself in float64."""
    found: list[Part] = []
    with contextlib.suppress(ImportError):
        from timm.loss import AsymmetricLossMultiLabel

        def hard(m: Any, x: Inputs) -> Tensor:
            return m(x["logits"], (x["targets"] == 1).to(x["logits"].dtype))  # type: ignore[no-any-return]

        def equation(m: Any, x: Inputs) -> Tensor:
            y, focus = (x["targets"] == 1).double(), {"gamma_pos": m.gamma_pos, "gamma_neg": m.gamma_neg, "margin": m.clip}
            return TF.asymmetric_loss(x["logits"], y, **focus, reduction="sum") / len(y)

        for name, size in (("logits up to 10", (1.0, 10.0)), ("logits up to 10,000", (30.0, 1e4))):
            grid = {"classes": (20, 1), "magnitude": size}
            learns, build = ("logits",), (lambda s: AsymmetricLossMultiLabel())
            found.append(Part(f"timm AsymmetricLossMultiLabel, {name}", build, logits, hard, learns, grid, equation=equation))
    with contextlib.suppress(ImportError):
        from pytorch_metric_learning.losses import SupConLoss
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

        def one_label(batch: int, s: Setting) -> Inputs:
            return {"features": normal(batch, WIDTH, seed=1, magnitude=s["magnitude"]), "own": torch.arange(batch) % 2}

        found.append(
            Part(
                "pytorch-metric-learning SupConLoss",
                lambda s: SupConLoss(temperature=s["temperature"]),
                one_label,
                lambda m, x: m(x["features"], x["own"]),
                ("features",),
                {"classes": (1,), "magnitude": (1.0, 1e-3, 300.0), "temperature": (0.1, 0.01, 1.0)},
                ranks=DistributedLossWrapper,
            )
        )
    with contextlib.suppress(ImportError):
        from open_clip import ClipLoss

        def pairs(batch: int, s: Setting) -> Inputs:
            image, text = (F.normalize(normal(batch, WIDTH, seed=seed), dim=-1) for seed in (1, 2))
            return {"image": image, "text of it": text}

        def clip(**modes: bool) -> Callable[[nn.Module], nn.Module]:
            return lambda m: ClipLoss(**modes, rank=dist.get_rank(), world_size=dist.get_world_size())

        for name, modes in (
            ("open_clip ClipLoss", {}),
            ("open_clip ClipLoss, local_loss, gather_with_grad", {"local_loss": True, "gather_with_grad": True}),
        ):
            found.append(
                Part(
                    name,
                    lambda s: ClipLoss(),
                    pairs,
                    lambda m, x: m(x["image"], x["text of it"], 1 / 0.07),
                    ("image", "text of it"),
                    {"classes": (1,)},
                    shared=(),
                    ranks=clip(**modes),
                )
            )
    return found
