"""PositiveCoOp: DualCoOp whose texts of absence are free vectors that no text tower has seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trm_losses import param_groups
from trm_pipeline.config.presets import Preset
from trm_pipeline.features.cached import Batch
from trm_pipeline.methods.base import Setting
from trm_pipeline.methods.prompts import PromptPeer, pair_cosines


class PositiveCoOp(PromptPeer):
    r"""DualCoOp with prompts for presence alone.

    .. math:: z_{bc} = \sum_n \mathrm{softmax}_n(\kappa\, \hat V_{bn} \cdot \hat t^+_c)\,
        \hat V_{bn} \cdot (\hat t^+_c - \hat t^-_c), \qquad t^+_c = \mathrm{text}_c + E_c, \quad t^-_c = F_c

    E and F are free and learn at the rate of ``dual_coop``, the prompts at a hundredth of it.

    Reference: Rawlekar et al., WACV 2025; F starts from N(0, 1) as published. That E starts from 0 is ours: from N(0, 1) it is
    longer than the text, and the start would know nothing of the classes. So are learned scale and sharpness, and the bias.
    """

    def __init__(self, setting: Setting) -> None:
        preset = setting.preset
        super().__init__(setting, setting.prompts(preset.prompts), preset.dual_coop)
        self.offset = nn.Parameter(torch.zeros_like(setting.text))
        self.absent = nn.Parameter(torch.randn_like(setting.text))

    def cosines(self, batch: Batch, text: Tensor) -> Tensor:
        return pair_cosines(batch, torch.cat([text + self.offset, self.absent]), self.log_sharpness.exp())

    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        lr = preset.lr_factor * self.lr
        prompts = param_groups(self.prompts, lr=0.01 * lr, weight_decay=0.0)
        taken = {id(parameter) for group in prompts for parameter in group["params"]}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in taken]
        return [*prompts, {"params": rest, "lr": lr, "weight_decay": 0.0}]
