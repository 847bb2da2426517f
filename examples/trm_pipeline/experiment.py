"""One command's work: data, features, every method at every share and seed, results, table and picture."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from trm_losses.backbones import OpenClipBackbone, load_open_clip
from trm_losses.labels import hide_labels, known_fraction
from trm_losses.metrics import evaluate

from .data.drawn import write_drawn_voc
from .data.voc import VOC, VOC_CLASSES, class_prompt_names, eval_transform, train_transform
from .embedded import load_embedded
from .features import CachedFeatures, Features, LiveFeatures, cache_features, weights_digest
from .methods import METHODS, TRM, ZERO_SHOT, Setting
from .presets import EMBEDDED, PRESETS, VOC2007_RN101, Preset, override
from .progress import say
from .report import Row, draw_map_against_known, markdown_table, write_results
from .training import score, train

__all__ = ["main", "parser", "run"]

DEFAULT_METHODS = (*ZERO_SHOT, *METHODS)


def parser() -> argparse.ArgumentParser:
    """The command line of ``reproduce_voc.py``."""
    p = argparse.ArgumentParser(
        description="TRM-ML and its peers on PASCAL VOC with missing labels. Without any argument: drawn VOC scenes and "
        "the small model that ships with the project, no download, some minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data-root", type=Path, help="VOCdevkit or the folder that holds it; none: the drawn VOC")
    p.add_argument("--download", action="store_true", help="fetch VOC into --data-root where it is missing")
    p.add_argument("--preset", choices=tuple(PRESETS), help="default: embedded without --data-root, else voc2007-rn101")
    p.add_argument("--model", help="an open_clip model name, or 'embedded'")
    p.add_argument("--pretrained", help="an open_clip tag such as 'openai', or a weights file")
    p.add_argument("--image-size", type=int, help="side of the square images, a multiple of the model's stride")
    p.add_argument("--known", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="shares of known labels, above 0 to 1")
    p.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), choices=DEFAULT_METHODS, metavar="METHOD",
                   help=f"any of {', '.join(DEFAULT_METHODS)}")  # fmt: skip
    p.add_argument("--seeds", type=int, nargs="+", default=[1], help="of training; seed s hides labels with seed s - 1")
    p.add_argument("--epochs", type=int, help="default: the preset's")
    p.add_argument("--output", type=Path, default=Path("runs/voc"), help="folder for results, heads and the picture")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--tune", action="store_true",
                   help="score on the val split and train on the train split: for choosing settings")  # fmt: skip
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings of the preset")
    p.add_argument("--cache", type=Path, default=Path("~/.cache/trm_losses").expanduser(),
                   help="folder for drawn scenes and frozen features")  # fmt: skip
    return p


def choose_preset(args: argparse.Namespace) -> Preset:
    """The preset the arguments ask for, with what they change."""
    default = EMBEDDED if args.data_root is None else VOC2007_RN101
    preset = PRESETS[args.preset] if args.preset else default
    if args.model not in (None, preset.model):
        preset = dataclasses.replace(preset, pretrained=None)  # the preset's weights are of its own model
    changes = {name: getattr(args, name) for name in ("model", "pretrained", "image_size", "epochs")}
    preset = dataclasses.replace(preset, **{key: value for key, value in changes.items() if value is not None})
    return override(preset, args.set)


def check_arguments(args: argparse.Namespace, preset: Preset) -> None:
    """Refuse at the door what would otherwise end a run late, or do something else than was asked for."""
    for share in args.known:
        if not 0 < share <= 1:
            raise ValueError(f"--known must be shares above 0 and at most 1, got {share:g} (10 % is 0.1)")
    for name, values in (("--seeds", args.seeds), ("epochs", [preset.epochs]), ("batch_size", [preset.batch_size])):
        if min(values) < 1:
            raise ValueError(f"{name} must be at least 1, got {min(values)}")
    if args.download and args.data_root is None:
        raise ValueError("--download needs --data-root, the folder to put VOC into")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error


def load_backbone(preset: Preset, device: torch.device) -> OpenClipBackbone:
    """The frozen model a preset names."""
    if preset.model == "embedded":
        model, tokenizer = load_embedded()
        backbone = OpenClipBackbone(model, tokenizer=tokenizer, name="embedded", image_size=preset.image_size)
        return backbone.to(device)
    if preset.pretrained is None:
        raise ValueError(f"--model {preset.model} needs --pretrained: a tag of open_clip such as 'openai', or a weights file")
    return load_open_clip(preset.model, preset.pretrained, image_size=preset.image_size, device=device)


def run(args: argparse.Namespace) -> list[Row]:
    """Everything the command does; returns the rows it wrote."""
    started = time.perf_counter()
    preset = choose_preset(args)
    train_split, test_split = ("train", preset.val_split) if args.tune else (preset.train_split, preset.test_split)
    check_arguments(args, preset)
    if train_split == test_split:
        raise ValueError(f"training and test images must be different splits, got {train_split!r} for both")
    shares, seeds, chosen = (list(dict.fromkeys(values)) for values in (args.known, args.seeds, args.methods))
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    root = args.data_root
    if root is None:
        root = write_drawn_voc(args.cache)

    backbone = load_backbone(preset, device)
    channels = {"mean": backbone.image_mean, "std": backbone.image_std}
    plain = eval_transform(preset.image_size, **channels)
    sets = {
        split: VOC(root, preset.year, split, transform=plain, download=args.download) for split in (train_split, test_split)
    }
    say(
        f"{len(sets[train_split])} training images ({train_split}), {len(sets[test_split])} test images ({test_split}), "
        f"{backbone.name} at {backbone.image_size[0]} x {backbone.image_size[1]}"
    )

    digest = weights_digest(backbone)

    def cached(split: str, *, mirror: bool) -> CachedFeatures:
        return cache_features(
            args.cache / "features",
            sets[split],
            sets[split].image_paths,
            backbone,
            weights=digest,
            token_pool=preset.token_pool,
            mirror=mirror,
            device=device,
        )

    features: Features
    if preset.augment:
        random = train_transform(preset.image_size, rand_augment=True, **channels)
        augmented = VOC(root, preset.year, train_split, transform=random)
        features = LiveFeatures(augmented, backbone, token_pool=preset.token_pool, device=device)
    else:
        features = cached(train_split, mirror=preset.mirror)
    test_features = cached(test_split, mirror=False)
    full_targets, test_targets = sets[train_split].targets, sets[test_split].targets

    names = class_prompt_names(preset.split_words)
    text = backbone.template_text(names, preset.templates)
    embedded_names = None
    if preset.prompts in ("shared", "csc"):
        embedded_names = backbone.embed_prompts([f"{name}." for name in names])
    total_steps = preset.epochs * -(-len(features) // preset.batch_size)
    setting = Setting(preset, text, embedded_names, backbone.logit_scale, total_steps)

    rows: list[Row] = []

    def keep(method: str, known: float, seed: int, metrics: Mapping[str, float | None], seconds: float) -> None:
        figures = {key: None if value is None else round(value, 3) for key, value in metrics.items()}
        rows.append({"method": method, "known": known, "seed": seed, **figures, "seconds": round(seconds, 2)})
        write_results(args.output / "results.json", rows)

    for method in (m for m in chosen if m in ZERO_SHOT):
        pause = time.perf_counter()
        logits = score(partial(ZERO_SHOT[method], text=text), test_features, preset.batch_size)
        metrics: dict[str, float | None] = dict(evaluate(logits, test_targets))
        # A cosine ranks images, but has no level above which a class counts as present.
        metrics |= dict.fromkeys(("OF1", "CF1", "CF1_per_class"), None)
        metrics["best_epoch_mAP"] = metrics["mAP"]
        say(f"{method}: mAP {metrics['mAP']:.1f}")
        for known in shares:
            for seed in seeds:
                keep(method, known, seed, metrics, time.perf_counter() - pause)
    for seed in seeds:
        for known in shares:
            targets = hide_labels(full_targets, known, seed=seed - 1)
            say(f"seed {seed}, {known_fraction(targets):.1%} of the labels known, {int((targets == 1).sum())} positives")
            for method in (m for m in chosen if m in METHODS):
                torch.manual_seed(seed)
                trained = train(
                    METHODS[method](setting),
                    features,
                    targets,
                    test_features,
                    test_targets,
                    encode=backbone.encode_prompts,
                    preset=preset,
                    seed=seed,
                    device=device,
                    label=f"{method}, {100 * known:g}%, seed {seed}",
                )
                keep(method, known, seed, trained.metrics, trained.seconds)
                if isinstance(trained.method, TRM):
                    with torch.no_grad():
                        final_text = backbone.encode_prompts(trained.method.prompts())
                    trained.method.head(final_text, list(VOC_CLASSES)).save(
                        args.output / f"{method}-known{known:g}-seed{seed}.pt"
                    )
    data = f"{'drawn scenes' if args.data_root is None else f'VOC{preset.year}'}, {backbone.name} model"
    say(f"\nmAP (%) on the {test_split} images, last epoch of the averaged weights; {data}:\n{markdown_table(rows)}")
    draw_map_against_known(args.output / "map_against_known.png", rows, f"Missing labels: {data}")
    say(f"\n{args.output / 'results.json'}, {args.output / 'map_against_known.png'}; {time.perf_counter() - started:.0f} s")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; errors of data, names and settings are one line without a traceback."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
