"""Train on a folder of one's own images, score what was held out, keep the model; and score another folder with it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import posixpath
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trm_losses import TRMHead
from trm_losses.labels import UNKNOWN, known_fraction
from trm_losses.pseudo import NeighbourRule
from trm_pipeline import ranks
from trm_pipeline.config.presets import EMBEDDED, Preset
from trm_pipeline.data.voc import eval_transform
from trm_pipeline.features.backbone import Backbone, with_texts
from trm_pipeline.features.cached import Features, LiveFeatures, cache_features, cores, weights_digest
from trm_pipeline.files import CACHE, check_writable, folder_argument
from trm_pipeline.folder.hold_out import hold_out
from trm_pipeline.folder.image_files import FolderImages, find_images
from trm_pipeline.folder.judgement import judge, ranked, table
from trm_pipeline.folder.labels import Labels, read_labels
from trm_pipeline.folder.model import DEMONSTRATION, SavedModel, class_texts, open_backbone, weights_file
from trm_pipeline.folder.outputs import FILES, write, write_scores
from trm_pipeline.folder.part import Part
from trm_pipeline.methods import TRM, ZERO_SHOT, Setting
from trm_pipeline.progress import escape_output, say
from trm_pipeline.training.loop import score, train

__all__ = ["ENOUGH", "STEPS", "main", "parser", "run_predict", "run_train"]

STEPS = 30  # of training at least, however few the images are
ENOUGH = 320  # images from which on learning is as fast as in the preset; below it is slower, down to a tenth


def parser() -> argparse.ArgumentParser:
    """The command line of ``train_folder.py``."""
    p = argparse.ArgumentParser(description="TRM-ML on a folder of your own images and one file of labels.")
    commands = p.add_subparsers(dest="command", required=True, metavar="train | predict")
    common = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    t = commands.add_parser("train", help="train, score a hold-out, and keep the model", **common)  # type: ignore[arg-type]
    t.add_argument("images", type=Path, help="folder of images, with any folders below it")
    t.add_argument("labels", type=Path, help="CSV or JSON-lines file: a column for each class, or image,labels with lists")
    t.add_argument("--output", type=Path, default=Path("runs/folder"), help="folder for the model, scores and pictures")
    t.add_argument(
        "--model",
        default="embedded",
        help="an open_clip model such as ViT-B-32; 'embedded': no download, drawn scenes alone; or timm:NAME with --class-texts",
    )
    t.add_argument(
        "--pretrained",
        help="a tag of open_clip such as 'openai', which downloads once, or a weights file; of timm default: its own weights",
    )
    t.add_argument(
        "--class-texts",
        type=Path,
        metavar="FILE",
        help="texts (C, D) of a model without a text tower (.npy, .pt): a row a class, in the order of the label file",
    )
    t.add_argument("--image-size", type=int, help="side of the square images; default: the model's own")
    t.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        dest="templates",
        help="prompt such as 'a satellite image of a {}.'; more than one is averaged",
    )
    t.add_argument("--names", nargs="+", default=[], metavar="CLASS=WORDS", help="words for class names that are no words")
    t.add_argument(
        "--hold-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="images kept from training to score on; 0: none, for a last training once you are content",
    )
    t.add_argument("--group", metavar="COLUMN", help="keep images together in the hold-out: by a column of LABELS, or 'folder'")
    t.add_argument("--seed", type=int, default=0, help="of the hold-out and of training")
    t.add_argument("--minus-one", choices=("unknown", "absent"), help="what -1 means; with 'absent' 0 is unknown")
    t.add_argument("--separator", metavar="TEXT", help="of lists: what stands between names; default: found in the file")
    t.add_argument("--unlisted", choices=("unknown", "absent"), default="unknown", help="of lists: what is not in them")
    t.add_argument(
        "--expected-positives",
        type=float,
        metavar="K",
        help="mean number of present classes, where no label is known to be absent; default: as listed",
    )
    t.add_argument("--use-unlabelled", action="store_true", help="images without a row take part in training, all unknown")
    t.add_argument("--epochs", type=int, help=f"default: {EMBEDDED.epochs}, more where that is less than {STEPS} steps")

    q = commands.add_parser("predict", help="score a folder of images with a trained model", **common)  # type: ignore[arg-type]
    q.add_argument("trained", type=Path, metavar="model", help="the folder that train wrote")
    q.add_argument("images", type=Path, help="folder of images, or one image")
    q.add_argument("--output", type=Path, default=Path("scores.csv"), help="CSV file to write")
    q.add_argument("--pretrained", help="where the weights of the frozen model lie now, if not where they were in training")
    for command in (t, q):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--workers", type=int, default=min(8, cores()), help="processes that read images")
    t.add_argument("--cache", type=folder_argument, default=CACHE, help="folder for frozen features")
    return p


def run_train(args: argparse.Namespace) -> None:
    """Everything ``train`` does; the files of an earlier run stay until all new ones are there."""
    started = time.perf_counter()
    _check_train(args)
    images = find_images(args.images)
    _check_output(args.output, args.images, images)
    labels = read_labels(
        args.labels,
        images,
        minus_one=args.minus_one,
        unlisted_absent=args.unlisted == "absent",
        separator=args.separator,
        group=args.group,
    )
    if labels.held is not None and args.group is not None:
        raise ValueError(f"--group cannot be used with {args.labels.name}: its column split already says what is held out")
    if not (labels.targets == 1).any():
        raise ValueError(
            f"{args.labels.name}: no label is present, of {labels.targets.numel()} ({known_fraction(labels.targets):.0%} known): "
            "nothing to learn from"
        )
    words = _words(labels.class_names, args.names)
    labels = _unlabelled(labels, images, use=args.use_unlabelled, folders=args.group == "folder")
    say(_about(labels))
    device = torch.device(args.device)
    file = weights_file(args.model, args.pretrained)
    if args.model == "embedded":
        say(f"\n{DEMONSTRATION}\n")
    else:
        fetched = file is None and not args.model.startswith("local-dir:")
        say(f"model {args.model} {args.pretrained or ''}{', fetched where it is not here yet' if fetched else ''}")
    tower = open_backbone(args.model, args.pretrained, args.image_size, device)
    backbone = with_texts(tower, args.model, args.class_texts, labels.class_names, device)
    if args.class_texts is not None:
        if args.templates or args.names:
            raise ValueError(
                f"--names and --template are words for a text tower, and --model {args.model} has none; leave them out"
            )
        say(f"class texts of {args.class_texts}, read in the order {', '.join(labels.class_names)}")
    text, templates = class_texts(backbone, words, args.templates)
    height, width = backbone.grid(backbone.image_size)
    pool = 2 if height >= 14 and width >= 14 and height % 2 == width % 2 == 0 else 1
    digest = weights_digest(backbone)

    transform = eval_transform(backbone.image_size, mean=backbone.image_mean, std=backbone.image_std)
    paths = [args.images / file for file in labels.files]
    data = FolderImages(paths, backbone.image_size, transform)
    cached = cache_features(
        args.cache / "folder-features",
        data,
        list(map(str, paths)),
        backbone,
        weights=digest,
        token_pool=pool,
        mirror=True,
        device=device,
        workers=args.workers if len(paths) > 64 else 0,
    )
    whole = _readable(data, torch.from_numpy(cached.pooled[0]), labels.files)
    features, labels = Part(cached, whole, (height // pool, width // pool)), _only(labels, whole)
    if not (labels.targets == 1).any():
        raise ValueError("no label is present in the images that can be read: nothing to learn from")

    held = _held(args, labels)
    trained = (labels.targets[~held] == 1).any(dim=0)  # classes
    if none := [name for name, own in zip(labels.class_names, trained.tolist(), strict=True) if not own]:
        shown = ", ".join(none[:5]) + (" …" if len(none) > 5 else "")
        say(f"no label is present of {shown}: nothing to learn from, scored by name alone (zero-shot)")
    preset = _preset(args, labels.targets[~held])
    method, estimates = _fit(args, preset, backbone, features, labels.targets, held, trained, text)
    head = _head(method, backbone, labels.class_names, trained, text)
    scores = _scores(head, features)
    zero_shot = {
        name.removeprefix("zero-shot-"): score(lambda b, f=f: f(b, text), features, 64)  # type: ignore[misc]
        for name, f in ZERO_SHOT.items()
    }
    about, lines = judge(labels, held, trained, scores, zero_shot, words)
    model = args.model  # as it is found from other folders, too
    if model.startswith("local-dir:"):
        model = f"local-dir:{os.path.abspath(model.removeprefix('local-dir:'))}"
    saved = SavedModel(model, file or args.pretrained, digest, backbone.image_size, pool, templates, **about)
    say(f"writing scores and pictures of {len(labels.files)} images")
    written = write(args, labels, held, head, saved, scores, estimates, features)
    say(lines)
    if args.model == "embedded":
        say("Once more: with the embedded model these figures mean nothing for photographs.")
    say(f"\n{args.output} ({time.perf_counter() - started:.0f} s):")
    say("\n".join(f"  {name:<17} {FILES[name]}" for name in FILES if name in written))
    say(f"score other images: python examples/train_folder.py predict {shlex.quote(str(args.output))} IMAGES")


def _check_train(args: argparse.Namespace) -> None:
    if ranks.launched() > 1:
        raise ValueError(f"train_folder.py must run in one process, got {ranks.launched()} of torchrun; start it with python")
    if not 0 <= args.hold_out < 1:
        raise ValueError(f"--hold-out must be a share from 0 to below 1, got {args.hold_out:g} (20 % is 0.2)")
    sizes = (("--epochs", args.epochs, 1), ("--workers", args.workers, 0), ("--image-size", args.image_size, 1))
    for name, value, least in sizes:
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if args.expected_positives is not None and args.expected_positives <= 0:
        raise ValueError(f"--expected-positives must be above 0, got {args.expected_positives:g}")
    if args.separator == "":
        raise ValueError("--separator must be what stands between names, got nothing; give ' ' for spaces")
    for template in args.templates or ():
        if "{}" not in template:
            raise ValueError(f"--template must hold {{}} for the class name, got {template!r}")
    check_writable(args.output, "--output")
    _check_device(args.device)


def _check_output(output: Path, folder: Path, images: Sequence[str]) -> None:
    """It is no folder of images, nor lies in one, also by way of links."""
    place = Path(os.path.realpath(output))
    for inside in {folder, *((folder / image).parent for image in images)}:
        if place.is_relative_to(os.path.realpath(inside)):
            raise ValueError(f"--output {output} lies in the image folder; its pictures would be images of the next training")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _words(class_names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """What each class is called in prompts: its name, with spaces for underscores, or other words."""
    words = {name: name.replace("_", " ") for name in class_names}
    for item in given:
        name, _, word = item.partition("=")
        if name not in words or not word.strip():
            raise ValueError(f"--names: wanted CLASS=WORDS with one of {', '.join(class_names[:10])}; got {item!r}")
        words[name] = word.strip()
    return words


def _unlabelled(labels: Labels, images: Sequence[str], *, use: bool, folders: bool) -> Labels:
    """With the images that have no row, where they are wanted; either way it is said how many they are.

    Where ``folders`` are groups these images belong to some too; else each is a group by itself.
    """
    listed = set(labels.files)
    others = [file for file in images if file not in listed]
    if others and use:
        say(f"{len(others)} images without a row take part with all labels unknown")
        rows = torch.full((len(others), len(labels.class_names)), float(UNKNOWN))
        held = None if labels.held is None else torch.cat([labels.held, torch.zeros(len(others), dtype=torch.bool)])
        own = [posixpath.dirname(file) if folders else file for file in others]
        groups = None if labels.groups is None else labels.groups + own
        return labels._replace(files=labels.files + others, targets=torch.cat([labels.targets, rows]), held=held, groups=groups)
    if others:
        say(f"{len(others)} images without a row are left out, such as {others[0]} (--use-unlabelled: train on guesses for them)")
    return labels


def _about(labels: Labels) -> str:
    present, absent = int((labels.targets == 1).sum()), int((labels.targets == 0).sum())
    known = f"{known_fraction(labels.targets):.0%} of {labels.targets.numel()} labels known"
    line = f"{len(labels.files)} images, {len(labels.class_names)} classes; {known}: {present} present, {absent} absent"
    if labels.separator is not None:
        line += f"\nnames in lists are separated by {labels.separator!r} (--separator, if that is wrong)"
    if labels.lists:
        line += "\nwhat a list does not name counts as unknown (--unlisted absent, if the lists are complete)"
    return line


def _readable(data: FolderImages, pooled: Tensor, files: Sequence[str]) -> Tensor:
    """The images whose features are finite; the others are named."""
    broken = (~pooled.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        say(f"{len(broken)} of {len(files)} images cannot be read and are left out:")
        for index in broken[:10]:
            say(f"  {files[index]}: {data.why_unreadable(index)}")
        if len(broken) > 10:
            say(f"  and {len(broken) - 10} more")
    if len(broken) == len(files):
        raise ValueError("none of the images can be read")
    return pooled.isfinite().all(dim=1).nonzero().flatten()


def _only(labels: Labels, rows: Tensor) -> Labels:
    return labels._replace(
        files=[labels.files[i] for i in rows.tolist()],
        targets=labels.targets[rows],
        held=None if labels.held is None else labels.held[rows],
        groups=None if labels.groups is None else [labels.groups[i] for i in rows.tolist()],
    )


def _held(args: argparse.Namespace, labels: Labels) -> Tensor:
    """Which images are held out (N,); by which rule is said."""
    if args.hold_out == 0:
        return torch.zeros(len(labels.files), dtype=torch.bool)
    if labels.held is not None:
        held, rule = labels.held, "by the column split"
    elif labels.groups is None:
        held = hold_out(labels.targets, args.hold_out, seed=args.seed)
        rule = "image by image (if some show the same scene, keep them together with --group or a column split)"
    else:
        held = hold_out(labels.targets, args.hold_out, seed=args.seed, groups=labels.groups)
        sides = [len({group for group, own in zip(labels.groups, held.tolist(), strict=True) if own == side}) for side in (0, 1)]
        rule = f"{sides[1]} of {sum(sides)} groups by {'folder' if args.group == 'folder' else f'column {args.group}'}"
    say(f"hold-out: {int(held.sum())} of {len(held)} images, {rule}")
    if held.all():
        raise ValueError("no image is left to train on: the column split holds out all of them")
    return held


def _preset(args: argparse.Namespace, targets: Tensor) -> Preset:
    """Those of the embedded model; a few images are learned from more slowly, or they would undo what the model knows.

    Measured on drawn scenes with the embedded model, mAP on 250 others: of 8 images with all labels 75 instead of 70 (zero-shot
    82), of 32 80 instead of 76, of 120 81.6 instead of 82.3; more steps than this made all of them worse. Where nothing is known
    to be absent no threshold but 0.5 can be told, and unknown labels count little as absent ones: 64 images with one label each
    gave 78.9 and an OF1 of 69, with the preset's own weight 71.8 and 49.
    """
    steps = -(-len(targets) // EMBEDDED.batch_size)
    epochs = args.epochs or max(EMBEDDED.epochs, -(-STEPS // steps))
    listed = (targets == 1).sum(dim=1).float()
    expected = args.expected_positives or float(listed[listed > 0].mean())
    slower = min(1.0, max(0.1, len(targets) / ENOUGH))
    learned = int((targets == 1).any(dim=0).sum())  # classes
    return dataclasses.replace(
        EMBEDDED,
        name="folder",
        epochs=epochs,
        lr=slower * EMBEDDED.lr,
        text_lr=slower * EMBEDDED.text_lr,
        expected_positives=min(expected, 0.9 * targets.shape[1]),
        single_negative=0.3 / learned,
        single_negative_until="end",
    )


def _fit(
    args: argparse.Namespace,
    preset: Preset,
    backbone: Backbone,
    features: Part,
    targets: Tensor,
    held: Tensor,
    trained: Tensor,
    text: Tensor,
) -> tuple[TRM, Tensor]:
    """The averaged method, trained on the classes that have a present label, and its pseudo-labels (N, C), -1 where none."""
    known, test = targets[~held][:, trained], targets[held][:, trained]
    single = not (known == 0).any()
    if single:
        assumed = f"{preset.expected_positives:.1f} present ones an image are assumed (--expected-positives)"
        say(f"no label is known to be absent: {assumed}")
    own, others = features.only(~held), features.only(held)
    label = f"training on {len(own)} images, {preset.epochs} epochs"
    if not held.any():
        others, test, label = own, known, f"{label} (figures of the training images themselves)"
    torch.manual_seed(args.seed)
    steps = preset.epochs * -(-len(own) // preset.batch_size)
    setting = Setting(preset, text[trained], None, backbone.logit_scale, steps, single=single, num_samples=len(own))
    method = TRM(setting, query_head=True, pseudo_labels=True)
    result = train(
        method,
        own,
        known,
        others,
        ranked(test),
        encode=backbone.encode_prompts,
        preset=preset,
        seed=args.seed,
        device=torch.device(args.device),
        label=label,
        single=single,
    )
    assert isinstance(result.method, TRM) and method.objective.labeler is not None
    rule = method.objective.labeler.rule
    assert isinstance(rule, NeighbourRule)
    estimates = torch.full_like(targets, float(UNKNOWN))
    found = rule.estimates.cpu()
    estimates[(~held).nonzero(), trained.nonzero()[:, 0]] = torch.where(known == UNKNOWN, found, float(UNKNOWN))
    return result.method, estimates


def _head(method: TRM, backbone: Backbone, names: list[str], trained: Tensor, text: Tensor) -> TRMHead:
    """The head of all classes; those without a present label join by name."""
    with torch.no_grad():
        learned = backbone.encode_prompts(method.prompts())
    chosen = [name for name, own in zip(names, trained.tolist(), strict=True) if own]
    head = method.head(learned, chosen).eval()
    if len(chosen) == len(names):
        return head
    texts = text.clone()
    texts[trained] = learned
    return head.with_classes(texts, names).eval()


@torch.no_grad()
def _scores(head: TRMHead, features: Features) -> Tensor:
    """Probabilities (N, C)."""
    return torch.cat([head.predict(batch.tokens).float().cpu() for batch in features.batches(64)])


def run_predict(args: argparse.Namespace) -> None:
    """Everything ``predict`` does."""
    started = time.perf_counter()
    saved, head = SavedModel.load(args.trained)
    _check_device(args.device)
    if args.output.suffix.lower() != ".csv":
        raise ValueError(f"--output must be a .csv file, got {args.output}")
    check_writable(args.output.parent, "--output")
    if args.output.exists() and not args.output.read_bytes().startswith(b"image,present,"):
        raise ValueError(f"--output {args.output} exists and was not written by predict; give another name")
    folder, files = args.images, [args.images.name]
    if args.images.is_file():
        folder = args.images.parent
    else:
        files = find_images(args.images)
    device = torch.device(args.device)
    if saved.model == "embedded":
        say(f"{DEMONSTRATION}\n")
    backbone = saved.open(device, args.pretrained)
    transform = eval_transform(backbone.image_size, mean=backbone.image_mean, std=backbone.image_std)
    data = FolderImages([folder / file for file in files], backbone.image_size, transform)
    live = LiveFeatures(
        data, backbone, token_pool=saved.token_pool, device=device, workers=args.workers if len(files) > 64 else 0
    )
    say(f"scoring {len(files)} images")
    head.to(device)
    scores, pooled = [], []
    for batch in live.batches(50):
        fine = batch.pooled.isfinite().all(dim=1)
        tokens = batch.tokens.half().float()  # as they are cached in training
        scores.append(head.predict(torch.where(fine[:, None, None], tokens, 0.0)).cpu())
        pooled.append(batch.pooled.cpu())
    whole = _readable(data, torch.cat(pooled), files)
    files, found = [files[i] for i in whole.tolist()], torch.cat(scores)[whole]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_scores(args.output, saved, files, found)
    rows = [("class", "images", "highest", "threshold")]
    for c, (name, about) in enumerate(saved.classes.items()):
        mark = "  " if about["threshold_from"] == "hold-out" else " *"
        threshold = f"{about['threshold']:.2f}{mark}"
        rows.append((name, str(int((found[:, c] > about["threshold"]).sum())), f"{float(found[:, c].max()):.2f}", threshold))
    say(f"\nImages in which each class is found:\n{table(rows)}")
    if any(about["threshold_from"] != "hold-out" for about in saved.classes.values()):
        say("* not chosen on a hold-out, which had too few labels")
    say(f"\n{args.output}: {len(files)} images, {time.perf_counter() - started:.0f} s")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; errors of data, names and settings are some lines without a traceback."""
    escape_output()
    args = parser().parse_args(argv)
    try:
        (run_train if args.command == "train" else run_predict)(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
