"""A head that learns from labels by something else than its own loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trm_losses import PseudoLabels
from trm_losses.labels import UNKNOWN
from trm_pipeline.config.presets import Preset
from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.features.frozen import Encode
from trm_pipeline.methods.base import Method, Setting


class Wrapped(Method):
    """A method around another, whose texts, logits, start and own schedule stay as they are.

    What a subclass learns beside them does so at the head's highest rate, without weight decay.
    """

    def __init__(self, inner: Method) -> None:
        super().__init__()
        self.inner = inner

    @property
    def prompts(self) -> nn.Module:  # type: ignore[override]
        """Those of the head."""
        return self.inner.prompts

    def logits(self, batch: Batch, text: Tensor) -> Tensor:
        return self.inner.logits(batch, text)

    def calibrate(self, batch: Batch, text: Tensor, prior: float) -> None:
        self.inner.calibrate(batch, text, prior)

    def pseudo_labels(self) -> PseudoLabels | None:
        return self.inner.pseudo_labels()

    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        groups = self.inner.groups(preset)
        own = [parameter for name, parameter in self.named_parameters() if not name.startswith("inner.")]
        rate = max(group["lr"] for group in groups)
        return [*groups, *([{"params": own, "lr": rate, "weight_decay": 0.0}] if own else [])]

    def before_epoch(self, epoch: int, features: Features, targets: Tensor, average: Method, encode: Encode) -> None:
        if not isinstance(average, Wrapped):
            raise TypeError(f"the average must be a {type(self).__name__}, got {type(average).__name__}")
        self.inner.before_epoch(epoch, features, targets, average.inner, encode)

    def after_step(self) -> None:
        self.inner.after_step()


def unwrapped(method: Method) -> Method:
    """The head itself."""
    while isinstance(method, Wrapped):
        method = method.inner
    return method


def expected_positives(setting: Setting, targets: Tensor) -> float:
    """k, the mean number of present labels of an image: C times the share of present among known labels, or what is assumed."""
    known = int((targets != UNKNOWN).sum())
    present = int((targets == 1).sum())
    k = setting.preset.expected_positives if setting.single or not present else setting.num_classes * present / known
    if k is None:
        raise ValueError("expected_positives must be given where no label is known to be present: --set expected_positives=2")
    return k


def class_prior(setting: Setting, targets: Tensor) -> Tensor:
    """Share of images that show each class (C,): of its known labels, or with single positives of all of them, moved to k."""
    present = (targets == 1).sum(dim=0).float()
    if setting.single:
        return (expected_positives(setting, targets) * present / max(1, len(targets))).clamp(max=1)
    return present / (targets != UNKNOWN).sum(dim=0).clamp(min=1)
