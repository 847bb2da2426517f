"""Presets and the settings of the command line."""

from trm_pipeline.config import presets
from trm_pipeline.config.settings import override


def test_override_reads_values_by_type():
    preset = override(
        presets.EMBEDDED, ["lr=1e-2", "mirror=false", "pseudo_rule=prototype", "labeler.weight_neg=2", "pretrained=none"]
    )
    assert (preset.lr, preset.mirror, preset.pseudo_rule, preset.labeler) == (0.01, False, "prototype", {"weight_neg": 2.0})
    assert preset.pretrained is None and override(preset, ["labeler.weight_neg=none"]).labeler == {"weight_neg": None}
