"""What all cells of a run share: data, frozen model and features, each computed if it is not there yet."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from trm_losses.labels import UNKNOWN
from trm_pipeline.config.presets import HELD_OUT, Preset
from trm_pipeline.data.base import LabelledImages, eval_transform, held_out, lines_of, train_transform
from trm_pipeline.data.label_files import read_labels
from trm_pipeline.features.backbone import Backbone, GivenTexts, needs_text_tower, with_texts
from trm_pipeline.features.cached import CachedFeatures, Features, LiveFeatures
from trm_pipeline.features.encoding import cache_features, weights_digest
from trm_pipeline.features.frozen import Frozen
from trm_pipeline.features.towers import open_tower
from trm_pipeline.files import tensor_digest
from trm_pipeline.progress import warnings_said
from trm_pipeline.run.arguments import check_unseen
from trm_pipeline.run.options import RunOptions
from trm_pipeline.run.prepared import Prepared


def load_backbone(
    preset: Preset, device: torch.device, class_texts: Path | None = None, class_names: Sequence[str] = ()
) -> Backbone:
    """The frozen model a preset names, with the texts of the classes in a file if it has no text tower."""
    tower = open_tower(preset.model, preset.pretrained, preset.image_size, device, value_path=preset.value_path)
    backbone = with_texts(tower, preset.model, class_texts, class_names, device)
    if isinstance(backbone, GivenTexts):
        needs_text_tower(preset.prompts, f"given texts of {preset.model}")
    return backbone


def prepare(options: RunOptions) -> Prepared:
    """Data, frozen model and features, each computed where it is not there yet."""
    preset, device = options.preset, torch.device(options.device)
    train_split, test_split = options.splits
    sets = images_of(options)
    train, test = sets[train_split], sets[test_split]
    # Present labels alone are in the best order by any scores: a class without an absent one tells nothing.
    test_targets = torch.where((test.targets == 0).any(dim=0), test.targets, UNKNOWN)
    if not (test_targets == 1).any():
        present, absent = (int((test.targets == label).sum()) for label in (1, 0))
        raise ValueError(
            f"{test.name}: the {test_split} images are scored, and must have a class with both present and absent labels; got "
            f"{present} present and {absent} absent ones in all. Label more of them, with 0 where a class is known to be absent"
        )
    check_unseen(options.unseen, len(train.class_names))
    for part in test_targets.tensor_split([-options.unseen], dim=1) if options.unseen else ():
        if not (part == 1).any():
            raise ValueError(
                f"--unseen {options.unseen}: classes seen and unseen are scored apart, and {part.shape[1]} on one side have no "
                f"class with both present and absent labels in the {test_split} images; give another number"
            )
    names = prompt_names(options, train)
    if options.class_names:
        train.class_names = test.class_names = tuple(names)
    published = None if options.labels is None else read_labels(options.labels, train, options.labels_encoding)
    given = options.source.given
    frozen = encoded(options, sets, names) if given is None else given(options.place.folder, preset, options.splits, device)
    return Prepared(
        **vars(frozen),
        preset=preset,
        device=device,
        targets=train.targets,
        test_targets=test_targets,
        test_paths=test.image_paths,
        name=test.name,
        class_names=list(train.class_names),
        description="\n".join(
            [
                f"{test.name}: {len(train)} training images ({train_split}), {len(test)} test images ({test_split}), "
                f"{frozen.detail}",
                *(counts(split, sets[split]) for split in (train_split, test_split)),
                *(() if published is None else published.lines),
            ]
        ),
        labels=None if published is None else published.labels,
    )


def encoded(options: RunOptions, sets: Mapping[str, LabelledImages], names: Sequence[str]) -> Frozen:
    """What the preset's model gives."""
    preset, device = options.preset, torch.device(options.device)
    train_split, test_split = options.splits
    backbone = load_backbone(preset, device, options.class_texts, names)
    channels = {"mean": backbone.image_mean, "std": backbone.image_std}
    plain = eval_transform(preset.image_size, **channels)
    digest = weights_digest(backbone)

    def cached(split: str, *, mirror: bool) -> CachedFeatures:
        return cache_features(
            options.place.cache / "features",
            sets[split].with_transform(plain),
            sets[split].image_paths,
            backbone,
            weights=digest,
            token_pool=preset.token_pool,
            mirror=mirror,
            device=device,
            workers=options.workers,
        )

    features: Features = cached(train_split, mirror=preset.mirror)
    if preset.augment:
        augmented = sets[train_split].with_transform(train_transform(preset.image_size, **channels))
        features = LiveFeatures(
            augmented, backbone, token_pool=preset.token_pool, device=device, workers=options.workers, plain=features
        )
    embedded_names = None
    with warnings_said():
        text = backbone.template_text(names, preset.templates)
    if preset.prompts in ("shared", "csc"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes with the same text: they were named above
            embedded_names = backbone.embed_prompts([f"{name}." for name in names])
    height, width = backbone.grid(backbone.image_size)
    return Frozen(
        model=f"{backbone.name} model",
        detail=f"{backbone.name} at {backbone.image_size[0]} x {backbone.image_size[1]}",
        weights=f"{digest} {tensor_digest(text)}" if isinstance(backbone, GivenTexts) else digest,
        features=features,
        test_features=cached(test_split, mirror=False),
        text=text,
        logit_scale=backbone.logit_scale,
        names=embedded_names,
        encode=backbone.encode_prompts,
        image_size=backbone.image_size,
        grid=(height // preset.token_pool, width // preset.token_pool),
    )


def images_of(options: RunOptions) -> dict[str, LabelledImages]:
    """The images trained on and those scored, by split."""
    if HELD_OUT in options.splits:
        whole = options.source.read(options.place, options.preset, options.preset.train_split)
        return {name: whole.rows(rows) for name, rows in held_out(len(whole)).items()}
    return {split: options.source.read(options.place, options.preset, split) for split in options.splits}


def prompt_names(options: RunOptions, images: LabelledImages) -> list[str]:
    """Names of the classes as prompts have them."""
    if options.class_names is None:
        return images.prompt_names()
    names = lines_of(options.class_names, "--class-names", "wanted is a file with a name a line")
    if len(names) != len(images.class_names):
        raise ValueError(f"--class-names: {options.class_names} must name {len(images.class_names)} classes, got {len(names)}")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"--class-names: {options.class_names} must give each class a name of its own, got {twice[0]!r} twice")
    return names


def counts(split: str, images: LabelledImages) -> str:
    """What there is in a split, counted; the most frequent classes tell whether names and columns are in one order."""
    present = (images.targets == 1).sum(dim=1)
    said = f"{split}: {len(images)} images, {len(images.class_names)} classes, {present.float().mean():.2f} labels an image"
    known = (images.targets >= 0).float().mean()
    said += f", {int((present == 0).sum())} images without any" + (f", {known:.1%} of the labels known" if known < 1 else "")
    shares, most = (images.targets == 1).float().mean(dim=0).topk(min(3, len(images.class_names)))
    frequent = (f"{images.class_names[column]} {share:.0%}" for share, column in zip(shares.tolist(), most.tolist(), strict=True))
    return f"{said}; most frequent: {', '.join(frequent)}"
