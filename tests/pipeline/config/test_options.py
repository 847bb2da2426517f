"""Options of the library through ``--set``: they reach their part, and a run with them gives a row."""

import inspect

import pytest
import torch

from tests.helpers.grid import batch
from trm_losses import TRMHead
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.config.settings import PARTS, override, part_options
from trm_pipeline.features import encoding, towers
from trm_pipeline.run import prepare

# Of each part one or two: a value that is not the default, with what else it needs after it, and the attribute of the objective
# where it ends up. All settings of a part are handed on together.
OPTIONS = [
    ("pooler.query=free", "pooler.query_kind"),
    ("pooler.num_heads=2", "pooler.num_heads"),
    ("matching.gamma_neg=0.5", "matching.gamma_neg"),
    ("distillation.temperature=2", "distillation.temperature"),
    ("contrast.anchor_threshold=0.5", "contrast.anchor_threshold"),
    ("objective.lambda_contrast=0.6", "lambda_contrast"),
    ("bank.momentum=0.5", "bank.momentum"),
    ("prototype.positive=0.7 pseudo_rule=prototype", "labeler.rule.positive"),
    ("labeler.weight_neg=0.7 pseudo_rule=teacher", "labeler.weight_neg"),
    ("labeler.cap=true pseudo_rule=teacher", "labeler.cap"),
]


WHOLE = ("pooler.query_head=true", "objective.lambda_contrast=0.3")  # parts that the default recipe leaves out


def built(*settings, name="trm", classes=4, dim=8, total=10):
    torch.manual_seed(0)
    preset = override(presets.EMBEDDED, settings)
    estimates = lambda: torch.rand(20, classes)  # noqa: E731
    setting = methods.Setting(preset, torch.randn(classes, dim), None, 100.0, total, num_samples=20, estimates=estimates)
    return methods.METHODS[name](setting)


def drawn():
    made = batch(6, 5, 8)
    return made._replace(index=made.index + 10)


TARGETS = torch.tensor([[1, -1, 0, 1], [1, 1, -1, 0], [0, 1, 1, -1], [-1, 0, 1, 1], [1, -1, -1, 1], [-1, 1, 1, 0.0]])


def found(method, path):
    for name in path.split("."):
        method = getattr(method, name)
    return method


@pytest.mark.parametrize(("settings", "path"), OPTIONS)
def test_an_option_reaches_its_part(settings, path):
    first, *others = settings.split()
    part, name = first.split("=")[0].split(".")
    value = getattr(override(presets.EMBEDDED, [first]), part)[name]
    whole = [*(setting for setting in WHOLE if setting.split("=")[0] not in first), *others]
    assert found(built(first, *whole).objective, path) == value != found(built(*whole).objective, path)


def test_options_without_an_attribute_of_their_own_reach_their_part():
    assert built("pooler.mlp_ratio=2", *WHOLE).objective.pooler.mlp[1].out_features == 16
    assert built("matching.scale=7").objective.matching.scale.item() == pytest.approx(7)
    assert built("pooler.attention_scale=3").objective.pooler.log_attention_scale.exp().item() == pytest.approx(3)
    assert built("pseudo_rule=prototype").objective.labeler.rule.temperature_text == 2 / 100
    for term, own in (("region_region", 1), ("region_text", 0.5), ("region_prototype", 1), ("text_prototype", 1)):
        assert built(f"contrast.{term}=0.25", *WHOLE).objective.contrast.alphas[term] == 0.25 * own


# Not settings: what a method decides, tensors and parts, and what no run has a use for.
APART = set(
    """
    num_classes num_samples dim device dtype distributed validate reduction init query_init bias pooler matching
    distillation contrast bank labeler rule prior width expected_positives warmup_steps ramp_steps
    """.split()
)


@pytest.mark.parametrize("part", PARTS)
def test_every_option_of_a_part_is_a_setting(part):
    """The library writes an option once; nothing in the pipeline has to be told of it."""
    wanted = set(inspect.signature(PARTS[part]).parameters) - APART
    assert wanted == set(part_options(part))
    group = part.replace("_", "-")
    with pytest.raises(ValueError, match=rf"--set: wanted {group}.NAME=VALUE with one of .*{min(wanted)}"):
        override(presets.EMBEDDED, [f"{group}.{min(wanted)}s=1"])


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name.startswith("trm")])
@pytest.mark.parametrize("more", [(), ("objective.lambda_pseudo=0", "pseudo_ramp=0.5")], ids=["lacks", "weighs nothing"])
def test_options_of_parts_that_a_method_lacks_do_no_harm(name, more):
    settings = ("objective.lambda_contrast=0", "contrast.temperature=0.2", "distillation.temperature=2")
    method = built(*settings, "pseudo_rule=prototype", *more, name=name)
    text = method.prompts()
    assert sum(method.loss(drawn(), text, TARGETS).values()).isfinite()
    method.after_step()
    assert method.logits(drawn(), text).shape == (6, 4)


def test_override_reads_values_by_type():
    preset = override(
        presets.EMBEDDED, ["lr=1e-2", "mirror=false", "pseudo_rule=prototype", "labeler.weight_neg=2", "pretrained=none"]
    )
    assert (preset.lr, preset.mirror, preset.pseudo_rule, preset.labeler) == (0.01, False, "prototype", {"weight_neg": 2.0})
    assert preset.pretrained is None and override(preset, ["labeler.weight_neg=none"]).labeler == {"weight_neg": None}


# What an option means to the method


@pytest.mark.parametrize("rule", ["teacher", "prototype"])
def test_settings_go_before_the_schedule_that_suits_the_rule(rule):
    suited, own = (
        built(f"pseudo_rule={rule}", *more, total=40).objective for more in ((), ("objective.lambda_pseudo=2", "pseudo_ramp=0.5"))
    )
    # What was known before training need not wait.
    assert (suited.labeler.warmup_steps, suited.labeler.ramp_steps) == ((0, 0) if rule == "teacher" else (4, 4))
    assert (suited.lambda_pseudo, own.lambda_pseudo) == (1.0, 2.0)
    assert (own.labeler.warmup_steps, own.labeler.ramp_steps) == (suited.labeler.warmup_steps, 20)


def test_unknown_labels_of_single_positives_count_as_absent_until_a_soft_rule_speaks():
    for rule, until, steps in (
        ("teacher", "none", 0),
        ("teacher", "end", 100),
        ("teacher", "warmup", 0),
        ("prototype", "none", 100),
        ("prototype", "end", 100),
        ("prototype", "warmup", 10),
    ):
        chosen = [f"pseudo_rule={rule}", f"single_negative_until={until}"]
        assert built(*chosen, total=100).weak_negative_steps(override(presets.EMBEDDED, chosen), 100) == steps
    for rule in ("merged", "none"):  # nobody says anything while the regions learn
        assert built(f"pseudo_rule={rule}", total=100).objective.labeler is None
        assert built(f"pseudo_rule={rule}", total=100).weak_negative_steps(presets.EMBEDDED, 100) == 100
    assert built("single_negative_until=warmup", name="trm-query").weak_negative_steps(presets.EMBEDDED, 100) == 100


@pytest.mark.parametrize("word", ["query", "region", "mean"])
def test_the_head_that_is_asked_for_scores(word):
    method = built(f"head={word}", "pooler.query_head=true").eval()
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
    "free": "pooler.query=free pooler.mlp_ratio=1 pooler.dropout=0 distillation.temperature=1",
    "others": "labeler.cap=false pseudo_rule=prototype contrast.region_text=0 prototype.temperature_text=0.05",
}


@pytest.mark.parametrize("name", TOGETHER)
def test_options_together_give_a_row_and_a_head(name, run, tmp_path):
    (row,) = run("--methods", "trm", "--set", "batch_size=8", *TOGETHER[name].split())
    head = TRMHead.load(tmp_path / "out" / "trm-known0.5-seed1.pt")
    assert 0 < row["mAP"] <= 100
    assert head.pooler.query_kind == override(presets.EMBEDDED, TOGETHER[name].split()).pooler.get("query", "tied")


def test_every_method_is_told_of_every_epoch(run, monkeypatch):
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
        ("pooler.query=both", "query must be one of"),
        ("head=both", "head must be 'query', 'region' or 'mean', got 'both'"),
        ("pseudo_rule=both", "pseudo_rule must be one of merged, teacher, prototype, none, got 'both'"),
        ("pseudo_rule=prototype prototype.positive=0.3", "PrototypeRule: positive must be at least 0.5"),
        ("value_path=true", "no value path to take"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_line(settings, message, run, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run("--methods", "zero-shot-global", "--set", *settings.split())
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_value_path_reaches_the_backbone_and_the_name_of_the_cache(monkeypatch, tmp_path):
    asked, backbone = [], prepare.load_backbone(presets.EMBEDDED, torch.device("cpu"))
    monkeypatch.setattr(towers, "load_open_clip", lambda *a, **k: asked.append(k["value_path"]) or backbone)
    for value in ("true", "false"):
        preset = override(presets.VOC2007_RN101, [f"value_path={value}"])
        prepare.load_backbone(preset, torch.device("cpu"))
    assert asked == [True, False]
    monkeypatch.setattr(encoding, "encode", lambda *a, **k: None)
    folders = []
    monkeypatch.setattr(encoding.CachedFeatures, "from_folder", lambda folder, *a: folders.append(folder) or [])
    for backbone.value_path in (False, True, False):
        encoding.cache_features(tmp_path, None, [], backbone, weights="a", token_pool=2, mirror=False, device=torch.device("cpu"))
    assert folders[0] == folders[2] != folders[1]
