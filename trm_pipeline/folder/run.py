"""Train on a folder of one's own images, score what was held out, keep the model; and score another folder with it."""

from __future__ import annotations

import argparse
import dataclasses
import posixpath
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trm_losses import GlobalHead, TRMHead
from trm_losses.labels import UNKNOWN, known_fraction
from trm_pipeline import ranks
from trm_pipeline.config.presets import EMBEDDED, Preset
from trm_pipeline.data.voc import eval_transform
from trm_pipeline.features.backbone import Backbone
from trm_pipeline.features.cached import Features, LiveFeatures, cores
from trm_pipeline.features.towers import found_anywhere
from trm_pipeline.files import CACHE, check_writable, folder_argument
from trm_pipeline.folder.encoded import check_device, check_encoding, check_output, encode, readable, words_of
from trm_pipeline.folder.hold_out import hold_out
from trm_pipeline.folder.image_files import FolderImages, find_images
from trm_pipeline.folder.judgement import judge, ranked, table
from trm_pipeline.folder.labels import Labels, read_labels
from trm_pipeline.folder.model import DEMONSTRATION, SavedModel
from trm_pipeline.folder.outputs import FILES, write, write_scores
from trm_pipeline.folder.part import Part
from trm_pipeline.folder.tag import run_tag
from trm_pipeline.methods import METHODS, ZERO_SHOT, Method, Setting, fit_training_free, zero_shot_tokens
from trm_pipeline.methods.base import score
from trm_pipeline.methods.global_head import estimated, fit_global_head, trm_head
from trm_pipeline.progress import escape_output, say
from trm_pipeline.run.choose import pooled_ap
from trm_pipeline.training.loop import train

__all__ = ["ENOUGH", "STEPS", "main", "parser", "run_predict", "run_train"]

DRAWS = 5  # of images that are held out to judge whether the image as a whole is of use, where they are few
STEPS = 30  # of training at least, however few the images are
ENOUGH = 320  # images from which on learning is as fast as in the preset; below it is slower, down to a tenth


def parser() -> argparse.ArgumentParser:
    """The command line of ``train_folder.py``."""
    p = argparse.ArgumentParser(description="TRM-ML on a folder of your own images and one file of labels, or without any.")
    commands = p.add_subparsers(dest="command", required=True, metavar="train | predict | tag")
    common = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    t = commands.add_parser("train", help="train, score a hold-out, and keep the model", **common)  # type: ignore[arg-type]
    t.add_argument("images", type=Path, help="folder of images, with any folders below it")
    t.add_argument("labels", type=Path, help="CSV or JSON-lines file: a column for each class, or image,labels with lists")
    t.add_argument("--output", type=Path, default=Path("runs/folder"), help="folder for the model, scores and pictures")
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
    g = commands.add_parser("tag", help="score a folder of images by the names of classes, without any label", **common)  # type: ignore[arg-type]
    g.add_argument("images", type=Path, help="folder of images, with any folders below it")
    g.add_argument("--classes", type=Path, required=True, metavar="FILE", help="names of the classes, one a line")
    g.add_argument("--output", type=Path, default=Path("runs/tags"), help="folder for the scores")

    for command in (t, g):
        command.add_argument(
            "--model",
            default="embedded",
            help="an open_clip model such as ViT-B-32; 'embedded': no download, drawn scenes alone; hf:FOLDER or hf:ID of a hub, "
            "a model of transformers; timm:NAME with --class-texts",
        )
        command.add_argument(
            "--pretrained",
            help="a tag of open_clip such as 'openai', which downloads once, or a weights file; of timm default: its own weights",
        )
        command.add_argument(
            "--class-texts",
            type=Path,
            metavar="FILE",
            help="texts (C, D) of a model without a text tower (.npy, .pt): a row a class, in the order of LABELS or --classes",
        )
        command.add_argument("--image-size", type=int, help="side of the square images; default: the model's own")
        command.add_argument(
            "--template",
            action="append",
            metavar="TEXT",
            dest="templates",
            help="prompt such as 'a satellite image of a {}.'; more than one is averaged",
        )
        command.add_argument(
            "--names", nargs="+", default=[], metavar="CLASS=WORDS", help="words for class names that are no words"
        )
        command.add_argument("--cache", type=folder_argument, default=CACHE, help="folder for frozen features")
    for command in (t, q, g):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--workers", type=int, default=min(8, cores()), help="processes that read images")
    return p


def run_train(args: argparse.Namespace) -> None:
    """Everything ``train`` does; the files of an earlier run stay until all new ones are there."""
    started = time.perf_counter()
    _check_train(args)
    images = find_images(args.images)
    check_output(args.output, args.images, images)
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
    words = words_of(labels.class_names, args.names)
    labels = _unlabelled(labels, images, use=args.use_unlabelled, folders=args.group == "folder")
    say(_about(labels))
    frozen = encode(args, labels.files, labels.class_names, words)
    features, labels = frozen.features, _only(labels, frozen.readable)
    if not (labels.targets == 1).any():
        raise ValueError("no label is present in the images that can be read: nothing to learn from")

    held = _held(args, labels)
    trained = (labels.targets[~held] == 1).any(dim=0)  # classes
    if none := [name for name, own in zip(labels.class_names, trained.tolist(), strict=True) if not own]:
        shown = ", ".join(none[:5]) + (" …" if len(none) > 5 else "")
        say(f"no label is present of {shown}: nothing to learn from, scored by name alone (zero-shot)")
    preset = _preset(args, labels.targets[~held])
    method, estimates = _fit(args, preset, frozen.backbone, features, labels.targets, held, trained, frozen.text)
    head = _head(method, frozen.backbone, labels.class_names, trained, frozen.text)
    scores = _scores(head, features)
    zero_shot = {
        name.removeprefix("zero-shot-"): score(lambda b, f=f: f(b, frozen.text), features, 64)  # type: ignore[misc]
        for name, f in ZERO_SHOT.items()
    }
    about, lines = judge(labels, held, trained, scores, zero_shot, words)
    saved = SavedModel(
        found_anywhere(args.model),
        frozen.file or args.pretrained,
        frozen.weights,
        frozen.backbone.image_size,
        frozen.token_pool,
        frozen.templates,
        **about,
    )
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
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {args.epochs}")
    if args.expected_positives is not None and args.expected_positives <= 0:
        raise ValueError(f"--expected-positives must be above 0, got {args.expected_positives:g}")
    if args.separator == "":
        raise ValueError("--separator must be what stands between names, got nothing; give ' ' for spaces")
    check_encoding(args)


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
        global_head={},
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
) -> tuple[Method, Tensor]:
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
    expected = preset.expected_positives if single else None
    whole = _whole(own, known, text[trained], preset, expected, args.seed)
    found = None if whole is None else estimated(whole, own, preset.batch_size, expected)
    setting = Setting(
        preset,
        text[trained],
        None,
        backbone.logit_scale,
        steps,
        single=single,
        num_samples=len(own),
        global_head=lambda: whole,
        estimates=lambda: found,
    )
    method = METHODS["trm"](setting)
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
    if found is None:  # nobody taught it: what it makes of unknown labels itself
        with torch.no_grad():
            learned = backbone.encode_prompts(result.method.prompts())
        found = torch.sigmoid(score(partial(result.method.logits, text=learned), own, preset.batch_size))
    estimates = torch.full_like(targets, float(UNKNOWN))
    estimates[(~held).nonzero(), trained.nonzero()[:, 0]] = torch.where(known == UNKNOWN, found, float(UNKNOWN))
    return result.method, estimates


def _whole(own: Part, known: Tensor, text: Tensor, preset: Preset, expected: float | None, seed: int) -> GlobalHead | None:
    """The head of whole images; None if these are few, and it ranks those that are held out from it worse than the names do.

    Its prior is made of the images themselves, and of a few of them it is worse than the class names: on drawn scenes of 8
    images 59 mAP where zero-shot has 79, of 120 images 75. It then neither teaches nor has a share in the scores.
    """

    def fitted(part: Part, targets: Tensor) -> GlobalHead:
        prior = fit_training_free(part, text, preset.batch_size)
        made = fit_global_head(part, targets, prior, preset.batch_size, penultimate=True, expected_positives=expected)
        assert made is not None
        return made

    if len(own) >= ENOUGH:
        return fitted(own, known)
    found: dict[str, list[float]] = {"whole images": [], "class names": []}
    names = _standard(score(lambda batch: zero_shot_tokens(batch, text), own, preset.batch_size))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS):
        asked = torch.rand(len(own), generator=draw) < 0.2
        if not (known[asked] == 1).any() or not (known[~asked] == 1).any():
            continue
        head = fitted(own.only(~asked), known[~asked])
        whole = _standard(score(lambda batch, head=head: head(batch.tokens, batch.penultimate), own, preset.batch_size))  # type: ignore[misc]
        # Without a known absence what is not listed counts as absent.
        labels = known[asked].clamp(min=0) if expected is not None else known[asked]
        found["whole images"].append(pooled_ap(whole[asked], labels))
        found["class names"].append(pooled_ap(names[asked], labels))
    if sum(found["whole images"]) > sum(found["class names"]):
        return fitted(own, known)
    shown = ", ".join(f"{word} {sum(values) / max(1, len(values)):.0f}" for word, values in found.items())
    say(f"the image as a whole is left out; average precision (%) on training images held out from it: {shown}")
    return None


def _standard(scores: Tensor) -> Tensor:
    """Of mean 0 and deviation 1 in each class: how often a class is present must not tell, which the names cannot know."""
    apart = scores - scores.mean(dim=0)
    return apart / apart.square().mean(dim=0).sqrt().clamp(min=1e-6)


def _head(method: Method, backbone: Backbone, names: list[str], trained: Tensor, text: Tensor) -> TRMHead:
    """The head of all classes; those without a present label join by name."""
    with torch.no_grad():
        learned = backbone.encode_prompts(method.prompts())
    chosen = [name for name, own in zip(names, trained.tolist(), strict=True) if own]
    head = trm_head(method, learned, chosen)
    assert head is not None
    if len(chosen) == len(names):
        return head.eval()
    texts = text.clone()
    texts[trained] = learned
    return head.with_classes(texts, names).eval()


@torch.no_grad()
def _scores(head: TRMHead, features: Features) -> Tensor:
    """Probabilities (N, C)."""
    return torch.cat([head.predict(batch.tokens, batch.penultimate).float().cpu() for batch in features.batches(64)])


def run_predict(args: argparse.Namespace) -> None:
    """Everything ``predict`` does."""
    started = time.perf_counter()
    saved, head = SavedModel.load(args.trained)
    check_device(args.device)
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
        # Rounded as they are cached in training; zeros for an image that cannot be read.
        tokens = torch.where(fine[:, None, None], batch.tokens.half().float(), 0.0)
        further = None if batch.penultimate is None else torch.where(fine[:, None], batch.penultimate.half().float(), 0.0)
        scores.append(head.predict(tokens, further).cpu())
        pooled.append(batch.pooled.cpu())
    whole = readable(data, torch.cat(pooled), files)
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
        {"train": run_train, "predict": run_predict, "tag": run_tag}[args.command](args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
