"""One command's work: data, features, every method in every setting and with every seed, results, table and picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from trm_losses import TRMHead
from trm_losses.backbones import OpenClipBackbone, load_open_clip

from . import ranks
from .cells import Cell, Finished, Prepared, checkpoint_path, run_cells, use_deterministic_algorithms
from .checkpoint import differences, tensor_digest, write_json
from .data.drawn import write_drawn_voc
from .data.voc import VOC, VOC_CLASSES, class_prompt_names, eval_transform, train_transform
from .embedded import load_embedded
from .features import CachedFeatures, Features, LiveFeatures, cache_features, cores, weights_digest
from .methods import METHODS, ZERO_SHOT, Setting
from .pictures import choose_images, collect_saliency
from .presets import EMBEDDED, PRESETS, VARIANTS, VOC2007_RN101, Known, Preset, override
from .progress import Scalars, say
from .report import Row, ablation_rows, ablation_table, main_rows, make_report, markdown_table
from .unseen import unseen_row, unseen_table

__all__ = ["main", "parser", "run"]

DEFAULT_METHODS = (*ZERO_SHOT, *METHODS)


def known_argument(text: str) -> Known:
    """A value of ``--known``."""
    if text == "single":
        return "single"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be shares of known labels such as 0.1, or 'single'; got {text!r}") from None


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
    p.add_argument("--known", type=known_argument, nargs="+", default=[0.1, 0.5, 0.9], metavar="SHARE",
                   help="shares of known labels, above 0 to 1; 'single': one present label an image, nothing else")  # fmt: skip
    p.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), choices=(*DEFAULT_METHODS, *VARIANTS),
                   metavar="METHOD", help=f"any of {', '.join((*DEFAULT_METHODS, *VARIANTS))}")  # fmt: skip
    p.add_argument("--ablation", action="store_true",
                   help="also trm without one part each, and with each other rule for pseudo-labels")  # fmt: skip
    p.add_argument("--ablation-known", type=known_argument, nargs="+", metavar="SHARE", help="default: all of --known")
    p.add_argument("--unseen", type=int, default=0, metavar="N",
                   help="also trm trained without the last N classes of the alphabet, and all scored by their names")  # fmt: skip
    p.add_argument("--seeds", type=int, nargs="+", default=[1], help="of training; seed s hides labels with seed s - 1")
    p.add_argument("--epochs", type=int, help="default: the preset's")
    p.add_argument("--output", type=Path, default=Path("runs/voc"), help="folder for results, heads and the picture")
    p.add_argument("--resume", action="store_true",
                   help="go on with the interrupted run in --output; the results are those of an unbroken one")  # fmt: skip
    p.add_argument("--jobs", type=int, default=1,
                   help="methods trained at a time, each in a process with its share of the cores; results do not depend on "
                   "it but for the last digits, which depend on the number of threads")  # fmt: skip
    p.add_argument("--workers", type=int, default=min(8, cores()),
                   help="processes that read and transform images, where they are not cached; 0: none beside this one; results "
                   "do not depend on it")  # fmt: skip
    p.add_argument("--amp", action="store_true", help="mixed precision: float16 on cuda, bfloat16 elsewhere")
    p.add_argument("--deterministic", action="store_true", help="the same bits again on an accelerator, a little slower")
    p.add_argument("--tensorboard", action="store_true", help="curves of losses and test mAP (needs the tensorboard package)")
    p.add_argument("--profile", action="store_true",
                   help="also where a step's time and memory go, measured in the last epoch of each training")  # fmt: skip
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


def chosen_splits(args: argparse.Namespace, preset: Preset) -> tuple[str, str]:
    """What is trained on and what is scored."""
    return ("train", preset.val_split) if args.tune else (preset.train_split, preset.test_split)


def check_arguments(args: argparse.Namespace, preset: Preset) -> None:
    """Refuse at the door what would otherwise end a run late, or do something else than was asked for."""
    for share in args.known:
        if not isinstance(share, str) and not 0 < share <= 1:
            raise ValueError(f"--known must be shares above 0 and at most 1, got {share:g} (10 % is 0.1)")
    if missing := [share for share in args.ablation_known or () if share not in args.known]:
        raise ValueError(f"--ablation-known must be among --known, where trm itself is trained; got {missing[0]}")
    for name, value, least in (
        ("--seeds", min(args.seeds), 1),
        ("--jobs", args.jobs, 1),
        ("--workers", args.workers, 0),
        ("epochs", preset.epochs, 1),
        ("batch_size", preset.batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if args.jobs > 1 and ranks.launched() > 1:
        raise ValueError(f"--jobs must be 1 under torchrun, whose processes train each cell together; got {args.jobs}")
    if not 0 <= args.unseen < len(VOC_CLASSES) - 1:
        raise ValueError(f"--unseen must leave two classes of {len(VOC_CLASSES)} to train on, got {args.unseen}")
    if args.unseen and preset.query == "free":
        raise ValueError("--unseen needs queries that come from text; give --set query=tied")
    if args.unseen and not preset.region_learning:
        raise ValueError("--unseen needs regions of the classes; give --set region_learning=true")
    if preset.ema_vote and preset.pseudo_rule in ("logit", "neighbour"):
        raise ValueError(f"ema_vote needs pseudo_rule=prototype or quantile, got {preset.pseudo_rule!r}")
    if args.unseen and preset.match_form != "single":
        raise ValueError("--unseen needs a matching with nothing learned for each class; give --set match_form=single")
    if "single" in args.known and preset.expected_positives is None:
        raise ValueError(
            "--known single needs expected_positives, the mean number of present labels of an image, which single "
            "positives cannot tell; give --set expected_positives=2"
        )
    # Words and numbers of the method are its parts' own to check; here with any texts, before anything is computed.
    any_text = torch.ones(2, max(1, preset.num_heads))
    for single in {known == "single" for known in args.known}:
        setting = Setting(dataclasses.replace(preset, prompts="fixed"), any_text, None, 100.0, preset.epochs, single=single)
        METHODS["trm"](setting)
    if preset.single_negative_until not in ("end", "warmup"):
        raise ValueError(f"single_negative_until must be 'end' or 'warmup', got {preset.single_negative_until!r}")
    splits = chosen_splits(args, preset)
    if splits[0] == splits[1]:
        raise ValueError(f"training and test images must be different splits, got {splits[0]!r} for both")
    if args.tensorboard:
        Scalars.check()
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
        backbone = OpenClipBackbone(
            model, tokenizer=tokenizer, name="embedded", image_size=preset.image_size, value_path=preset.value_path
        )
        return backbone.to(device)
    if preset.pretrained is None:
        raise ValueError(f"--model {preset.model} needs --pretrained: a tag of open_clip such as 'openai', or a weights file")
    return load_open_clip(
        preset.model, preset.pretrained, image_size=preset.image_size, value_path=preset.value_path, device=device
    )


def prepare(args: argparse.Namespace) -> Prepared:
    """Data, frozen model and features, each computed where it is not there yet."""
    preset, device = choose_preset(args), torch.device(args.device)
    train_split, test_split = chosen_splits(args, preset)
    root = args.data_root
    if root is None:
        root = write_drawn_voc(args.cache)
    backbone = load_backbone(preset, device)
    channels = {"mean": backbone.image_mean, "std": backbone.image_std}
    plain = eval_transform(preset.image_size, **channels)
    sets = {
        split: VOC(root, preset.year, split, transform=plain, download=args.download) for split in (train_split, test_split)
    }
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
            workers=args.workers,
        )

    features: Features
    if preset.augment:
        random = train_transform(preset.image_size, rand_augment=True, **channels)
        augmented = VOC(root, preset.year, train_split, transform=random)
        features = LiveFeatures(augmented, backbone, token_pool=preset.token_pool, device=device, workers=args.workers)
    else:
        features = cached(train_split, mirror=preset.mirror)
    names = class_prompt_names(preset.split_words)
    embedded_names = None
    if preset.prompts in ("shared", "csc"):
        embedded_names = backbone.embed_prompts([f"{name}." for name in names])
    return Prepared(
        preset=preset,
        device=device,
        weights=digest,
        features=features,
        targets=sets[train_split].targets,
        test_features=cached(test_split, mirror=False),
        test_targets=sets[test_split].targets,
        text=backbone.template_text(names, preset.templates),
        names=embedded_names,
        logit_scale=backbone.logit_scale,
        encode=backbone.encode_prompts,
        backbone=backbone,
        test_paths=sets[test_split].image_paths,
        description=f"{len(sets[train_split])} training images ({train_split}), {len(sets[test_split])} test images "
        f"({test_split}), {backbone.name} at {backbone.image_size[0]} x {backbone.image_size[1]}",
    )


def plan(args: argparse.Namespace, preset: Preset) -> list[Cell]:
    """All cells of the run, in the order of their rows."""
    settings, seeds, chosen = (list(dict.fromkeys(values)) for values in (args.known, args.seeds, args.methods))
    cells = [Cell(m, known, seed) for m in chosen if m in ZERO_SHOT for known in settings for seed in seeds]
    # A variant that changes nothing, such as the rule that trm has anyway, is trm itself.
    ablation = [
        name
        for name, (method, changes) in VARIANTS.items()
        if args.ablation and (method != "trm" or dataclasses.replace(preset, **changes) != preset)  # type: ignore[arg-type]
    ]
    for seed in seeds:
        for known in settings:
            trained = [m for m in chosen if m not in ZERO_SHOT]
            if known in (args.ablation_known or settings):
                trained += ablation
            cells += [Cell(method, known, seed) for method in dict.fromkeys(trained)]
    return cells


class Results:
    """``results.json``, which equal runs write byte by byte alike, and ``times.json``, in the order of the cells.

    A cell counts as finished when its row is in ``results.json``; that is written last, and its checkpoint removed after.
    """

    def __init__(self, output: Path, cells: Sequence[Cell]) -> None:
        self.output, self.cells = output, cells
        self.rows: dict[Cell, Row] = {}
        self.seconds: dict[Cell, float] = {}

    def start(self, settings: dict[str, object], *, resume: bool) -> None:
        """Go on with what an interrupted run of the same settings left, or begin afresh."""
        if not ranks.first():
            return
        record = self.output / "run.json"
        if resume and record.exists():
            found = json.loads(record.read_text())
            if changed := differences(json.loads(json.dumps(settings)), found):
                raise ValueError(
                    f"--resume: {self.output} holds a run with other settings: {'; '.join(changed)}. Give those, or another "
                    "--output, or start afresh without --resume"
                )
            for name, column, into in (("times.json", "seconds", self.seconds), ("results.json", None, self.rows)):
                path = self.output / name
                for row in json.loads(path.read_text()) if path.exists() else []:
                    into[Cell(row["method"], row["known"], row["seed"])] = row[column] if column else row
            for cell in self.rows:
                checkpoint_path(self.output, cell).unlink(missing_ok=True)
            return
        # Without the record nothing that is still there can be taken for a part of another run.
        made = ("checkpoints/*.pt*", "pseudo/*.json", "unseen/*.json", "profile/*.md", "saliency*.npz")
        for pattern in ("run.json", "results.json", "times.json", *made):
            for path in self.output.glob(pattern):
                path.unlink(missing_ok=True)
        write_json(record, settings)

    def add(self, finished: Finished) -> None:
        """Write the row of a cell."""
        self.rows[finished.cell], self.seconds[finished.cell] = finished.row, finished.seconds
        if not ranks.first():
            return
        times = [{**cell._asdict(), "seconds": self.seconds[cell]} for cell in self.cells if cell in self.seconds]
        write_json(self.output / "times.json", times)
        write_json(self.output / "results.json", self.ordered())
        checkpoint_path(self.output, finished.cell).unlink(missing_ok=True)

    def ordered(self) -> list[Row]:
        """The rows so far."""
        return [self.rows[cell] for cell in self.cells if cell in self.rows]


def run(args: argparse.Namespace) -> list[Row]:
    """Everything the command does; returns the rows it wrote."""
    started = time.perf_counter()
    preset = choose_preset(args)
    check_arguments(args, preset)
    if args.deterministic:
        use_deterministic_algorithms()
    args.device = ranks.start(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    with ranks.first_before_others():
        data = prepare(args)
    say(data.description)

    cells = plan(args, preset)
    results = Results(args.output, cells)
    results.start(
        {
            "known": args.known,
            "methods": args.methods,
            "seeds": args.seeds,
            "ablation": args.ablation,
            "ablation_known": args.ablation_known,
            "unseen": args.unseen,
            "tune": args.tune,
            "amp": args.amp,
            "deterministic": args.deterministic,
            "device": data.device.type,
            "preset": dataclasses.asdict(preset),
            "weights": data.weights,
            "labels": [tensor_digest(data.targets), tensor_digest(data.test_targets)],
        },
        resume=args.resume,
    )
    todo = ranks.from_first([cell for cell in cells if cell not in results.rows])
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} rows are there already")
    with closing(run_cells(data, todo, args, prepare)) as finished:
        for cell in finished:
            results.add(cell)

    rows = results.ordered()
    apart = dict.fromkeys(cell._replace(method="trm") for cell in cells if args.unseen)
    unseen = [unseen_row(data, cell, args) for cell in apart]
    if not ranks.first():
        return rows
    where = f"{'drawn scenes' if args.data_root is None else f'VOC{preset.year}'}, {data.backbone.name} model"
    notes = [f"mAP (%) on the {chosen_splits(args, preset)[1]} images, last epoch of the averaged weights; {where}."]
    say(f"\n{notes[0]}\n{markdown_table(main_rows(rows))}")
    if variants := ablation_rows(rows):
        say(f"\nDifference to trm on the same seeds:\n{ablation_table(variants)}")
    if unseen:
        say(f"\nmAP (%) with {', '.join(unseen[0]['unseen'])} never labelled in training:\n{unseen_table(unseen)}")
    look_at_images(data, cells, args.output)
    page = make_report(args.output, command=shlex.join(["reproduce_voc.py", *args.typed]), data=where, notes=notes)
    say(f"\n{args.output / 'results.json'}, {page}; {time.perf_counter() - started:.0f} s")
    return rows


def look_at_images(data: Prepared, cells: Sequence[Cell], output: Path) -> None:
    """Saliency maps of the first trained trm head over some test images, for the page."""
    heads = [path for cell in cells if cell.method == "trm" and (path := output / f"{cell.name}.pt").is_file()]
    chosen = choose_images(data.test_targets)
    if not heads or not chosen:
        return
    images = [Image.open(data.test_paths[i]) for i in chosen]
    maps = collect_saliency(
        TRMHead.load(heads[0]),
        data.backbone,
        images,
        data.test_targets[chosen],
        data.text,
        token_pool=data.preset.token_pool,
        sharpness=data.preset.attention_scale,
    )
    maps.save(output / f"saliency-{heads[0].stem}.npz")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; errors of data, names and settings are one line without a traceback."""
    args = parser().parse_args(argv)
    args.typed = list(sys.argv[1:] if argv is None else argv)
    try:
        run(args)
        ranks.stop()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except BrokenExecutor as error:
        raise SystemExit(
            "error: a process of --jobs was ended from outside, perhaps for want of memory; the same command with --resume "
            "and fewer jobs goes on from here"
        ) from error
    except RuntimeError as error:
        if not ranks.lost(error):
            raise
        raise SystemExit(
            f"error: another process than {ranks.rank()} of {ranks.world()} has ended or does not answer; the same command with "
            "--resume goes on from here"
        ) from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command with --resume goes on from here") from None
