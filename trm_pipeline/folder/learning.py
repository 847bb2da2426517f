"""What is learned from the images of a folder and the known part of their labels."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from trm_losses import Calibration, GlobalHead, TRMHead
from trm_losses.labels import UNKNOWN
from trm_pipeline.config.presets import EMBEDDED, Preset
from trm_pipeline.config.settings import override
from trm_pipeline.features.cached import CachedFeatures, Features
from trm_pipeline.folder.encoded import Encoded
from trm_pipeline.folder.judgement import CALIBRATED, ranked
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.options import STEPS, LearnOptions
from trm_pipeline.methods import fit_training_free, zero_shot_tokens
from trm_pipeline.methods.base import score
from trm_pipeline.methods.global_head import fit_global_head, trm_head
from trm_pipeline.progress import say
from trm_pipeline.run.choose import pooled_ap, search
from trm_pipeline.run.prepared import Cell, Prepared, train_cell

CHOOSABLE = 100
"""Present labels from which on a fifth of them can tell settings apart."""

DRAWS = 5
"""Of images that are held out to judge whether the image as a whole is of use, where they are few."""

ENOUGH = 320
"""Images from which on learning is as fast as in the preset; below it is slower, down to a tenth."""


def learn(options: LearnOptions, frozen: Encoded, labels: Labels, held: Tensor, trained: Tensor) -> TRMHead:
    """Train on the images that are not held out, and on the classes that have a present label there.

    Args:
        frozen: what the frozen model gives, of the images that can be read.
        labels: of the same N images. held: (N,), what training does not see.
        trained: (C,), classes with a present label in training; the others join the head by their texts.

    Returns:
        A head of all classes, in eval mode.
    """
    class_names, targets = labels.class_names, labels.targets
    known = targets[~held][:, trained]
    single = present_alone(options, labels, ~held) or not (known == 0).any()
    preset = _preset(options, targets[~held])
    if single:
        assumed = f"{preset.expected_positives:.1f} present ones an image are assumed (--expected-positives)"
        absent = int((targets[~held] == 0).sum())
        told = f"; {absent} known absences teach the classes, and set no level" if absent else ""
        say(f"present labels were listed: {assumed}{told}")
    elif options.expected_positives is not None:
        say("--expected-positives is not used: the absent labels tell how many are present")
    chosen = [name for name, own in zip(class_names, trained.tolist(), strict=True) if own]
    own = frozen.features.only(~held)
    data = _prepared(options, preset, frozen, chosen, targets[:, trained], held, trained)
    expected = preset.expected_positives if single else None
    if not whole_is_of_use(own, known, data.text, preset, expected, options.seed):
        preset = dataclasses.replace(preset, global_prior=False, global_penultimate=False)
    cell = Cell("trm", "single" if single else 1.0, options.seed)
    if options.choose:
        preset = _chosen(data, cell, preset)

    label = f"training on {len(own)} images, {preset.epochs} epochs"
    if not held.any():
        label = f"{label} (figures of the training images themselves)"
    method = train_cell(data, cell, preset, method="trm", label=label).method
    with torch.no_grad():
        learned = data.encode(method.prompts())
    head = trm_head(method, learned, chosen)
    assert head is not None
    if head.calibration is None:  # regions alone
        calibrate(head.eval(), own, known, expected)
    if len(chosen) < len(class_names):
        texts = frozen.text.clone()
        texts[trained] = learned
        head = head.with_classes(texts, class_names)
    return head.eval()


def present_alone(options: LearnOptions, labels: Labels, rows: Tensor) -> bool:
    """Whether of some images what is present was noted, and nothing else; absences that answers add change nothing of that.

    Questions are asked where the model doubts, so answers are no fair draw of all labels, and tell no level.
    """
    targets = labels.targets[rows]
    present, absent, unknown = (int((targets == label).sum()) for label in (1, 0, UNKNOWN))
    said = labels.lists or options.expected_positives is not None and present > absent
    return not absent or said and unknown > 0


def calibrate(head: TRMHead, features: Features, targets: Tensor, expected_positives: float | None) -> bool:
    """Make scores of the head probabilities, by labels (N, C) of images that training has not seen; whether there are enough.

    If there are not, the head keeps what it has of its training images. ``expected_positives`` takes the place of all absent
    labels.
    """
    if expected_positives is not None:
        targets = targets.masked_fill(targets == 0, float(UNKNOWN))
    present, absent = int((targets == 1).sum()), int((targets == 0).sum())
    if present < CALIBRATED or (expected_positives is None and absent < CALIBRATED):
        return False
    classes = len(head.class_names)
    if expected_positives is not None:
        expected_positives = min(expected_positives, 0.9 * classes)
    head.calibration = None
    fitted = Calibration(len(head.class_names), device=head.text.device)
    head.calibration = fitted.fit(_logits(head, features), targets, expected_positives=expected_positives)
    return True


def _preset(options: LearnOptions, targets: Tensor) -> Preset:
    """Those of the embedded model; a few images are learned from more slowly, or they would undo what the model knows.

    Measured on drawn scenes with the embedded model, mAP on others, mean of three draws: of 8 images with all labels 80.5 instead
    of 69.9 (zero-shot 82), of 32 79.1 instead of 74.8, of 120 80.7 instead of 80.9. Where present labels alone were noted no
    threshold but 0.5 can be told, and unknown labels count little as absent ones: the preset's own weight cost 7 points.
    """
    steps = -(-len(targets) // EMBEDDED.batch_size)
    epochs = options.epochs or max(EMBEDDED.epochs, -(-STEPS // steps))
    expected = options.expected_positives or listed(targets)
    slower = min(1.0, max(0.1, len(targets) / ENOUGH))
    learned = int((targets == 1).any(dim=0).sum())  # classes
    return dataclasses.replace(
        EMBEDDED,
        name="folder",
        global_head={},
        epochs=epochs,
        lr=slower * EMBEDDED.lr,
        text_lr=slower * EMBEDDED.text_lr,
        expected_positives=min(expected, 0.9 * learned),
        single_negative=0.3 / learned,
        single_negative_until="end",
    )


def listed(targets: Tensor) -> float:
    """Mean number of present labels of the images that have any."""
    counts = (targets == 1).sum(dim=1).float()
    return float(counts[counts > 0].mean())


def _prepared(
    options: LearnOptions, preset: Preset, frozen: Encoded, class_names: list[str], targets: Tensor, held: Tensor, trained: Tensor
) -> Prepared:
    """The images as those of a run whose known labels are given; without a hold-out it is the training images that are scored."""
    backbone, features, known = frozen.backbone, frozen.features, targets[~held]
    scored = held if held.any() else ~held
    return Prepared(
        model=options.model,
        detail="",
        weights=frozen.weights,
        features=features.only(~held),
        test_features=features.only(scored),
        text=frozen.text[trained],
        logit_scale=backbone.logit_scale,
        encode=backbone.encode_prompts,
        image_size=backbone.image_size,
        grid=features.grid,
        preset=preset,
        device=torch.device(options.device),
        targets=known,
        test_targets=ranked(targets[scored]),
        test_paths=[],
        name="folder",
        class_names=class_names,
        description="",
        labels=known,
    )


def _chosen(data: Prepared, cell: Cell, preset: Preset) -> Preset:
    """With the settings that rank best a fifth of the known labels, which are held out for it.

    Of few images they are not asked: labels of images that training sees do not tell whether it undoes what the model knows. On
    192 drawn scenes with 190 present labels what they chose was 0.3 to 0.8 points below the settings as they are.
    """
    present = int((data.targets == 1).sum())
    if present < CHOOSABLE or len(data.targets) < ENOUGH:
        got = f"{present} present labels of {len(data.targets)} images"
        say(f"settings stay as they are: {got} are too few to choose by ({CHOOSABLE} of {ENOUGH} are enough)")
        return preset
    say("choosing rates and shares by a fifth of the known labels: five trainings more (--no-choose: none)")
    found = search(data, cell, preset)
    say(f"chosen: {' '.join(found.changes)}")
    return override(preset, found.changes)


def whole_is_of_use(own: CachedFeatures, known: Tensor, text: Tensor, preset: Preset, expected: float | None, seed: int) -> bool:
    """Whether the head of whole images adds to what the class names say of images that are held out from it, if they are few.

    Its prior is made of the images themselves, and of a few of them it is worse than the class names: on drawn scenes of 8
    images 59 mAP where zero-shot has 79, of 120 images 75. What counts is the sum of both, since it gets a share in the
    scores: judged by itself it was often left out where that cost 2 to 4 points.
    """
    size = preset.batch_size
    if len(own) >= ENOUGH:
        return True

    def fitted(part: CachedFeatures, targets: Tensor) -> GlobalHead | None:
        prior = fit_training_free(part, text, size)
        return fit_global_head(part, targets, prior, size, penultimate=True, expected_positives=expected)

    found: dict[str, list[float]] = {"both together": [], "class names": []}
    names = _standard(score(lambda batch: zero_shot_tokens(batch, text), own, size))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS):
        asked = torch.rand(len(own), generator=draw) < 0.2
        if not (known[asked] == 1).any() or not (known[~asked] == 1).any():
            continue
        head = fitted(own.only(~asked), known[~asked])
        if head is None:
            continue
        whole = _standard(score(lambda batch, head=head: head(batch.tokens, batch.penultimate), own, size))  # type: ignore[misc]
        # Where present labels alone were noted, what is not counts as absent.
        labels = known[asked].clamp(min=0) if expected is not None else known[asked]
        found["both together"].append(pooled_ap((whole + names)[asked], labels))
        found["class names"].append(pooled_ap(names[asked], labels))
    if sum(found["both together"]) > sum(found["class names"]):
        return True
    shown = ", ".join(f"{word} {sum(values) / len(values):.0f}" for word, values in found.items() if values)
    why = f"average precision (%) on training images held out from it: {shown}" if shown else "too few labels to judge it by"
    say(f"the image as a whole is left out; {why}")
    return False


def _standard(scores: Tensor) -> Tensor:
    """Scores (N, C) of mean 0 and deviation 1 in each class."""
    apart = scores - scores.mean(dim=0)
    return apart / apart.square().mean(dim=0).sqrt().clamp(min=1e-6)


def probabilities(head: TRMHead, features: Features) -> Tensor:
    """Probabilities (N, C)."""
    return torch.sigmoid(_logits(head, features))


def _logits(head: TRMHead, features: Features) -> Tensor:
    """Logits (N, C) of a head in eval mode."""
    return score(lambda batch: head(batch.tokens, batch.penultimate), features, 64)
