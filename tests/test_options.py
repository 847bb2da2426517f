"""Every option of the library through ``--set``: it reaches its part, and a run with it gives a row."""

import dataclasses
import inspect

import numpy as np
import oracles
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("safetensors")

from test_pipeline import cache, devkit, run  # noqa: F401

from trm_losses import (
    MultimodalContrastiveLoss,
    PrototypeBank,
    PseudoLabeler,
    RegionDistillationLoss,
    RegionPooler,
    TextRegionMatchingLoss,
    TRMHead,
    TRMObjective,
)
from trm_losses.pseudo import NeighbourRule, PrototypeRule, Quantiles, Thresholds
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.features import cached as features
from trm_pipeline.run import prepare

# A value that is not the default, with what else it needs after it, and the attribute of the objective where it ends up.
OPTIONS = [
    ("query=free", "pooler.query_kind"),
    ("dropout=0.3", "pooler.dropout_rate"),
    ("num_heads=2", "pooler.num_heads"),
    ("gamma_pos=0.5", "matching.gamma_pos"),
    ("gamma_neg=0.5", "matching.gamma_neg"),
    ("margin=0.2", "matching.margin"),
    ("distillation_temperature=2", "distillation.temperature"),
    ("contrast_temperature=0.2", "contrast.temperature"),
    ("contrast_temperature_region=0.2", "contrast.temperature_region"),
    ("contrast_anchor_threshold=0.5", "contrast.anchor_threshold"),
    ("lambda_region=0.3", "lambda_region"),
    ("lambda_pseudo=0.3", "lambda_pseudo"),
    ("lambda_distillation=0.3", "lambda_distillation"),
    ("lambda_contrast=0.6", "lambda_contrast"),
    ("anchor_score=0.7", "anchor_score"),
    ("bank_confidence=0.7", "bank_confidence"),
    ("bank_pseudo_score=0.7", "bank_pseudo_score"),
    ("prototype_momentum=0.5", "bank.momentum"),
    ("prototype_text_momentum=0.5", "bank.text_momentum"),
    ("threshold_pos=0.7 pseudo_rule=prototype", "labeler.rule.decider.positive"),
    ("threshold_neg=0.2 pseudo_rule=prototype", "labeler.rule.decider.negative"),
    ("quantile_pos=0.5 pseudo_rule=quantile", "labeler.rule.decider.share"),
    ("neighbours=3", "labeler.rule.neighbours"),
    ("neighbour_temperature=0.2", "labeler.rule.temperature"),
    ("neighbour_steps=2", "labeler.rule.steps"),
    ("pseudo_per=entry", "pseudo_per"),
    ("weight_pos=0.7", "labeler.weight_pos"),
    ("weight_neg=0.7", "labeler.weight_neg"),
    ("temperature_visual=0.2 pseudo_rule=prototype", "labeler.rule.temperature_visual"),
    ("temperature_text=0.2 pseudo_rule=prototype", "labeler.rule.temperature_text"),
    ("statistics_momentum=0.5 pseudo_rule=prototype", "labeler.rule.momentum"),
    ("statistics_momentum=0.5 pseudo_rule=quantile", "labeler.rule.decider.momentum"),
    ("cap=true", "labeler.cap"),
]


def built(*settings, name="trm", classes=4, dim=8, total=10):
    torch.manual_seed(0)
    preset = presets.override(presets.EMBEDDED, settings)
    return methods.METHODS[name](methods.Setting(preset, torch.randn(classes, dim), None, 100.0, total, num_samples=20))


def drawn(images=6, tokens=5, dim=8):
    generator = torch.Generator().manual_seed(1)
    tokens, pooled = (torch.randn(images, *shape, generator=generator) for shape in ((tokens, dim), (dim,)))
    return features.Batch(tokens, pooled, torch.arange(images) + 10)


TARGETS = torch.tensor([[1, -1, 0, 1], [1, 1, -1, 0], [0, 1, 1, -1], [-1, 0, 1, 1], [1, -1, -1, 1], [-1, 1, 1, 0.0]])


def found(method, path):
    for name in path.split("."):
        method = getattr(method, name)
    return method


@pytest.mark.parametrize(("settings", "path"), OPTIONS)
def test_an_option_reaches_its_part(settings, path):
    settings = settings.split()
    name = settings[0].split("=")[0]
    value = getattr(presets.override(presets.EMBEDDED, settings), name)
    assert found(built(*settings).objective, path) == value != getattr(presets.EMBEDDED, name)


def test_options_without_an_attribute_of_their_own_reach_their_part():
    assert built("mlp_ratio=2").objective.pooler.mlp[1].out_features == 16
    assert built("scale=7").objective.matching.scale.item() == pytest.approx(7)
    assert built("attention_scale=3").objective.pooler.log_attention_scale.exp().item() == pytest.approx(3)
    assert built("pseudo_rule=prototype").objective.labeler.rule.temperature_text == 2 / 100
    for term, own in (("region_region", 1), ("region_text", 0.5), ("region_prototype", 1), ("text_prototype", 1)):
        assert built(f"contrast_{term}=0.25").objective.contrast.alphas[term] == 0.25 * own


# Settings of the library that the preset has under another name, or has its own start for.
NAMES = {
    RegionPooler: {},
    TextRegionMatchingLoss: {},
    RegionDistillationLoss: {"temperature": "distillation_temperature"},
    MultimodalContrastiveLoss: {},
    PrototypeBank: {"momentum": "prototype_momentum", "text_momentum": "prototype_text_momentum"},
    PseudoLabeler: {},
    PrototypeRule: {"momentum": "statistics_momentum"},
    Thresholds: {"positive": "threshold_pos", "negative": "threshold_neg"},
    Quantiles: {"share": "quantile_pos", "momentum": "statistics_momentum"},
    NeighbourRule: {"temperature": "neighbour_temperature", "steps": "neighbour_steps"},
    TRMObjective: {},
}
# Not settings: sizes, tensors and parts, and what no run on one device has a use for.
APART = {
    "num_classes",
    "dim",
    "device",
    "dtype",
    "distributed",
    "validate",
    "reduction",
    "init",
    "query_init",
    "query_head",
    "bias",
    "pooler",
    "matching",
    "distillation",
    "contrast",
    "bank",
    "labeler",
    "warmup_steps",
    "ramp_steps",
    "num_samples",
    "class_chunk",
    "rule",
    "decider",
}


@pytest.mark.parametrize("part", NAMES)
def test_every_option_of_a_part_is_a_setting_with_its_default(part):
    fields = {field.name: field.default for field in dataclasses.fields(presets.Preset)}
    for name, parameter in inspect.signature(part).parameters.items():
        if name in APART:
            continue
        mine = NAMES[part].get(name, f"contrast_{name}" if part is MultimodalContrastiveLoss else name)
        assert mine in fields, f"{part.__name__}.{name}"
        # The first follows the model, the second is assumed, the next two follow the rule, the last is the field's usual step.
        if mine not in ("temperature_text", "expected_positives", "lambda_pseudo", "pseudo_per", "neighbour_steps"):
            assert fields[mine] == parameter.default, f"{part.__name__}.{name}"


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name.startswith("trm")])
def test_options_of_parts_that_a_method_lacks_do_no_harm(name):
    settings = ("lambda_contrast=0",)
    method = built(*settings, "pseudo_rule=prototype", name=name)
    text = method.prompts()
    assert sum(method.loss(drawn(), text, TARGETS).values()).isfinite()
    method.after_step()
    method.before_epoch(1, Several(drawn()), TARGETS, method, lambda prompts: prompts)
    assert method.logits(drawn(), text).shape == (6, 4)


# What an option means to the method


class Several:
    """Features of one batch, in batches of the size asked for; a second view is the batch with tokens of another length."""

    views = 2

    def __init__(self, batch):
        self.batch, self.asked = batch._replace(index=torch.arange(len(batch.index))), []

    def __len__(self):
        return len(self.batch.index)

    def batches(self, batch_size, generator=None, *, view=0):
        self.asked.append((batch_size, generator))
        for rows in torch.arange(len(self)).flip(0).split(batch_size):
            batch = features.Batch(*(part[rows] for part in self.batch))
            yield batch._replace(tokens=batch.tokens.roll(1, -1)) if view else batch


def test_neighbours_are_asked_by_the_averaged_weights_over_all_views():
    method, average = built("batch_size=4", "pseudo_warmup=0"), built("batch_size=4")
    torch.nn.init.normal_(average.objective.pooler.mlp[-1].weight, std=0.3)
    several, texts = Several(drawn()), []

    def encode(prompts):
        texts.append(prompts)
        return prompts

    method.objective.labeler = PseudoLabeler(4, NeighbourRule(4, 6, steps=1))
    method.before_epoch(0, several, TARGETS, average, encode)
    z, logits = [], []
    with torch.no_grad():
        for tokens in (several.batch.tokens, several.batch.tokens.roll(1, -1)):
            regions = average.objective.pooler(tokens, texts[0])
            z.append(regions.region)
            logits.append(average.objective.matching.logits(regions.query, texts[0]))
    probability = torch.sigmoid((logits[0] + logits[1]) / 2)
    said = torch.where(TARGETS == -1, probability, TARGETS)
    expected = oracles.neighbour_scores((z[0] + z[1]) / 2, said, 20, 0.05)
    np.testing.assert_allclose(method.objective.labeler.rule.estimates, expected, atol=1e-5)
    assert len(several.asked) == 2
    late = built("pseudo_warmup=0.25", "epochs=10", total=100)  # in the third epoch, from which estimates must be there
    for epoch, asked in ((0, 2), (1, 2), (2, 4), (3, 6)):
        late.objective.labeler = PseudoLabeler(4, NeighbourRule(4, 6))
        late.before_epoch(epoch, several, TARGETS, average, encode)
        assert len(several.asked) == asked
    several.asked = several.asked[:2]
    assert len(several.asked) == 2


@pytest.mark.parametrize("rule", presets.PSEUDO_RULES)
def test_each_rule_has_its_schedule_and_settings_go_first(rule):
    suited = presets.SCHEDULES[rule]
    assert presets.pseudo_schedule(presets.override(presets.EMBEDDED, [f"pseudo_rule={rule}"])) == suited
    own = presets.override(presets.EMBEDDED, [f"pseudo_rule={rule}", "lambda_pseudo=0", "pseudo_ramp=0.5"])
    assert presets.pseudo_schedule(own) == suited._replace(lambda_pseudo=0.0, pseudo_ramp=0.5)
    objective = methods.METHODS["trm"](methods.Setting(own, torch.randn(4, 8), None, 100.0, 40)).objective
    assert (objective.lambda_pseudo, objective.pseudo_per) == (0.0, suited.pseudo_per)
    assert (objective.labeler.warmup_steps, objective.labeler.ramp_steps) == (round(40 * suited.pseudo_warmup), 20)


@pytest.mark.parametrize("word", ["query", "region", "mean"])
def test_the_head_that_is_asked_for_scores(word):
    method = built(f"head={word}").eval()
    torch.nn.init.normal_(method.objective.pooler.mlp[-1].weight, std=0.3)
    text, batch = method.prompts(), drawn()
    output = method.objective(batch.tokens, text, TARGETS, ids=batch.index)
    query, region = output.logits, output.region_logits
    assert not torch.allclose(query, region)
    expected = {"query": query, "region": region, "mean": (query + region) / 2}[word]
    torch.testing.assert_close(method.logits(batch, text), expected)
    head = method.head(text, list("abcd"))
    assert head.head == word
    torch.testing.assert_close(head(batch.tokens), expected)
    method.calibrate(batch, text, 0.3)
    if word != "mean":
        assert torch.sigmoid(method.logits(batch, text)).mean().item() == pytest.approx(0.3, abs=1e-3)


def test_a_rule_without_a_training_set_to_see_asks_nothing():
    method = built("pseudo_rule=prototype")
    for epoch in range(10):
        method.before_epoch(epoch, None, TARGETS, None, None)


# From the command line

TOGETHER = {
    "mean of heads": "head=mean pseudo_warmup=0.4",
    "through the text tower": "prompts=shared num_context=2 head=region",
    "free": "query=free mlp_ratio=1 dropout=0 distillation_temperature=1",
    "others": "cap=false pseudo_rule=prototype contrast_region_text=0 temperature_text=0.05",
}


@pytest.mark.parametrize("name", TOGETHER)
def test_options_together_give_a_row_and_a_head(name, run, tmp_path):  # noqa: F811
    (row,) = run("--methods", "trm", "--set", "batch_size=8", *TOGETHER[name].split())
    head = TRMHead.load(tmp_path / "out" / "trm-known0.5-seed1.pt")
    assert 0 < row["mAP"] <= 100
    assert head.pooler.query_kind == presets.override(presets.EMBEDDED, TOGETHER[name].split()).query


def test_every_method_is_told_of_every_epoch(run, monkeypatch):  # noqa: F811
    told = []

    def before_epoch(self, epoch, features, targets, average, encode):
        assert len(features) == len(targets) and type(average) is type(self) and average is not self
        told.append((type(self).__name__, epoch, tuple(encode(self.prompts()).shape[:1])))

    monkeypatch.setattr(methods.Method, "before_epoch", before_epoch)
    run("--methods", "linear", "dual-coop")
    assert told == [("LinearProbe", 0, (20,)), ("LinearProbe", 1, (20,)), ("DualCoOp", 0, (40,)), ("DualCoOp", 1, (40,))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("query=both", "query must be one of"),
        ("head=both", "head must be 'query', 'region' or 'mean', got 'both'"),
        ("pseudo_rule=prototype threshold_pos=0.3", "Thresholds: positive must be at least 0.5"),
        ("value_path=true", "no value path to take"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_line(settings, message, run, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match=message):
        run("--methods", "zero-shot-global", "--set", *settings.split())
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_value_path_reaches_the_backbone_and_the_name_of_the_cache(monkeypatch, tmp_path):
    asked, backbone = [], prepare.load_backbone(presets.EMBEDDED, torch.device("cpu"))
    monkeypatch.setattr(prepare, "load_open_clip", lambda *a, **k: asked.append(k["value_path"]) or backbone)
    for value in ("true", "false"):
        preset = presets.override(presets.VOC2007_RN101, [f"value_path={value}"])
        prepare.load_backbone(preset, torch.device("cpu"))
    assert asked == [True, False]
    monkeypatch.setattr(features, "_write_view", lambda *a: None)
    folders = []
    monkeypatch.setattr(features, "CachedFeatures", lambda folder, *a: folders.append(folder) or [])
    for backbone.value_path in (False, True, False):
        features.cache_features(tmp_path, None, [], backbone, weights="a", token_pool=2, mirror=False, device=torch.device("cpu"))
    assert folders[0] == folders[2] != folders[1]
