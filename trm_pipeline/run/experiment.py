"""One command's work: data, features, every method in every setting and with every seed, results, table and picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from trm_losses import TRMHead
from trm_losses.backbones import OpenClipBackbone, load_open_clip
from trm_losses.labels import known_fraction
from trm_pipeline import ranks
from trm_pipeline.config.presets import LOSSES, PRESETS, VARIANTS, Known, Preset, override, pseudo_schedule
from trm_pipeline.data import voc
from trm_pipeline.data.base import HELD_OUT, LabelledImages, Source, eval_transform, held_out, lines_of, train_transform
from trm_pipeline.data.label_files import ENCODINGS, read_labels
from trm_pipeline.embedded import load_embedded
from trm_pipeline.features.cached import CachedFeatures, Features, LiveFeatures, cache_features, cores, weights_digest
from trm_pipeline.features.frozen import Frozen
from trm_pipeline.files import CACHE, check_writable, differences, folder_argument, read_json, tensor_digest, write_json
from trm_pipeline.methods import METHODS, ZERO_SHOT, Setting
from trm_pipeline.methods.grid import HEADS, NAMES, PEERS, build_method, choose_methods
from trm_pipeline.progress import Scalars, Sweep, escape_output, say, warnings_said
from trm_pipeline.report.page import Row, ablation_rows, ablation_table, grid_tables, main_rows, make_report, markdown_table
from trm_pipeline.report.pictures import choose_images, collect_saliency
from trm_pipeline.run.cells import Cell, Finished, Prepared, checkpoint_path, run_cells, use_deterministic_algorithms
from trm_pipeline.run.unseen import unseen_row, unseen_table

__all__ = ["main", "parser", "run"]

DEFAULT_METHODS = (*ZERO_SHOT, *METHODS)
DEFAULT_KNOWN: tuple[Known, ...] = (0.1, 0.5, 0.9)


def known_argument(text: str) -> Known:
    """A value of ``--known``."""
    if text == "single":
        return "single"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be shares of known labels such as 0.1, or 'single'; got {text!r}") from None


def parser(source: Source = voc.SOURCE) -> argparse.ArgumentParser:
    """The command line of ``reproduce_voc.py`` and its siblings."""
    drawn = (
        "Without any argument: drawn scenes and the small model that ships with the project, no download, some minutes "
        "on two cores."
    )
    p = argparse.ArgumentParser(
        description=f"TRM-ML and its peers on {source.title} with missing labels. {drawn * bool(source.drawn_preset)}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.set_defaults(source=source)
    if source.given is None:
        p.add_argument("--data-root", type=Path, help=source.layout.replace("%", "%%"))
        p.add_argument(
            "--class-names",
            type=Path,
            metavar="FILE",
            help="other names of the classes for prompts, one a line in the order of the columns",
        )
        p.add_argument("--model", help="an open_clip model name, or 'embedded'")
        p.add_argument("--pretrained", help="an open_clip tag such as 'openai', or a weights file")
        p.add_argument("--image-size", type=int, help="side of the square images, a multiple of the model's stride")
        p.add_argument(
            "--workers",
            type=int,
            default=min(8, cores()),
            help="processes that read and transform images, where they are not cached; 0: none beside this one; "
            "results do not depend on it",
        )
        p.add_argument("--cache", type=folder_argument, default=CACHE, help="folder for drawn scenes and frozen features")
    else:
        p.add_argument("data_root", type=Path, metavar="FEATURES", help=source.layout)
        p.set_defaults(class_names=None, model=None, pretrained=None, image_size=None, workers=0)
    source.add_arguments(p)
    p.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="published partial labels of the training images (.npy, .txt, .pt) in place of --known",
    )
    p.add_argument("--labels-encoding", choices=ENCODINGS, help="what --labels holds, where the file itself does not tell")
    p.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"default: {f'{source.drawn_preset} without --data-root, else ' * bool(source.drawn_preset)}{source.preset}",
    )
    p.add_argument(
        "--known",
        type=known_argument,
        nargs="+",
        metavar="SHARE",
        help="shares of known labels, above 0 to 1; 'single': one present label an image, nothing else; default: "
        f"{' '.join(map(str, DEFAULT_KNOWN))}",
    )
    p.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT_METHODS),
        metavar="METHOD",
        help=f"any of {', '.join(name for name in NAMES if '+' not in name)}; a head with another method's loss, "
        f"such as linear+role (heads {', '.join(HEADS)}; losses {', '.join(LOSSES)}); or a pattern such as "
        "'linear+*'",
    )
    p.add_argument(
        "--grid",
        action="store_true",
        help=f"also the {len(HEADS)} heads with their own loss and with each of the {len(LOSSES)} others",
    )
    p.add_argument(
        "--ablation", action="store_true", help="also trm without one part each, and with each other rule for pseudo-labels"
    )
    p.add_argument("--ablation-known", type=known_argument, nargs="+", metavar="SHARE", help="default: all of --known")
    p.add_argument(
        "--unseen",
        type=int,
        default=0,
        metavar="N",
        help="also trm trained without the last N classes, and all scored by their names",
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[1], help="of training; seed s hides labels with seed s - 1")
    p.add_argument("--epochs", type=int, help="default: the preset's")
    p.add_argument("--output", type=Path, default=Path("runs") / source.key, help="folder for results, heads and the picture")
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --output; the results are those of an unbroken one",
    )
    p.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="methods trained at a time, each in a process with its share of the cores; results do not depend on "
        "it but for the last digits, which depend on the number of threads",
    )
    p.add_argument("--amp", action="store_true", help="mixed precision: float16 on cuda, bfloat16 elsewhere")
    p.add_argument("--deterministic", action="store_true", help="the same bits again on an accelerator, a little slower")
    p.add_argument("--tensorboard", action="store_true", help="curves of losses and test mAP (needs the tensorboard package)")
    p.add_argument(
        "--profile", action="store_true", help="also a table of torch's profiler, of ten steps in the last epoch of each training"
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--tune", action="store_true", help="score on the val split and train on the train split: for choosing settings"
    )
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings of the preset")
    return p


def choose_preset(args: argparse.Namespace) -> Preset:
    """The preset the arguments ask for, with what they change."""
    drawn = args.source.drawn_preset if args.data_root is None else None
    preset = PRESETS[args.preset or drawn or args.source.preset]
    preset = dataclasses.replace(preset, **args.source.settings(args))
    if args.model not in (None, preset.model):
        preset = dataclasses.replace(preset, pretrained=None)  # the preset's weights are of its own model
    changes = {name: getattr(args, name) for name in ("model", "pretrained", "image_size", "epochs")}
    preset = dataclasses.replace(preset, **{key: value for key, value in changes.items() if value is not None})
    return override(preset, args.set)


def chosen_splits(args: argparse.Namespace, preset: Preset) -> tuple[str, str]:
    """What is trained on and what is scored."""
    if args.tune:
        return ("fit" if preset.val_split == HELD_OUT else "train"), preset.val_split
    return preset.train_split, preset.test_split


def chosen_known(args: argparse.Namespace) -> list[Known]:
    """The settings asked for; with a file of labels there are none but its own."""
    if args.known is None:
        return [] if args.labels else list(DEFAULT_KNOWN)
    return list(args.known)


def check_arguments(args: argparse.Namespace, preset: Preset) -> None:
    """Refuse at the door what would otherwise end a run late, or do something else than was asked for."""
    known = chosen_known(args)
    if args.data_root is None and args.source.drawn_preset is None:
        raise ValueError(f"--data-root is needed, {args.source.layout}")
    if args.labels and (args.known is not None or len(set(args.seeds)) > 1):
        raise ValueError("--labels is one setting of known labels: leave --known out, and give one of --seeds")
    if args.labels and args.tune:
        raise ValueError("--labels has the labels of the whole training split, of which --tune trains on a part; leave one out")
    if args.labels_encoding and not args.labels:
        raise ValueError("--labels-encoding needs --labels, the file it is about")
    for share in known:
        if not isinstance(share, str) and not 0 < share <= 1:
            raise ValueError(f"--known must be shares above 0 and at most 1, got {share:g} (10 % is 0.1)")
    if missing := [share for share in args.ablation_known or () if share not in known]:
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
    chosen = choose_methods(args.methods, grid=args.grid)
    if ranks.launched() > 1 and (alone := [name for name in chosen if name.partition("+")[2] in PEERS]):
        raise ValueError(f"--methods: {alone[0]} is trained by one process, not under torchrun")
    if args.source.num_classes is not None:
        check_unseen(args, args.source.num_classes)
    if args.unseen and preset.query == "free":
        raise ValueError("--unseen needs queries that come from text; give --set query=tied")
    if args.unseen and not preset.region_learning:
        raise ValueError("--unseen needs regions of the classes; give --set region_learning=true")
    check_single(known, preset)
    # Words and numbers of the method are its parts' own to check; here with any texts, before anything is computed.
    any_text = torch.ones(2, max(1, preset.num_heads))
    for single in {share == "single" for share in known} or {False}:  # a file of labels says later of which kind it is
        setting = Setting(dataclasses.replace(preset, prompts="fixed"), any_text, None, 100.0, preset.epochs, single=single)
        METHODS["trm"](setting)
        setting.targets, setting.similarities = torch.ones(2, 2), lambda: torch.ones(2, 2)
        for loss in dict.fromkeys(name.partition("+")[2] for name in chosen if "+" in name):
            build_method(f"text-pixel+{loss}", setting)
    if (until := pseudo_schedule(preset).single_negative_until) not in ("end", "warmup"):
        raise ValueError(f"single_negative_until must be 'end' or 'warmup', got {until!r}")
    splits = chosen_splits(args, preset)
    if splits[0] == splits[1]:
        raise ValueError(f"training and test images must be different splits, got {splits[0]!r} for both")
    if args.tensorboard:
        Scalars.check()
    if getattr(args, "download", False) and args.data_root is None:
        raise ValueError("--download needs --data-root, the folder to put VOC into")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error


def check_unseen(args: argparse.Namespace, classes: int) -> None:
    """Some classes are left to train on."""
    if not 0 <= args.unseen < max(1, classes - 1):
        raise ValueError(f"--unseen must leave two classes of {classes} to train on, got {args.unseen}")


def check_single(known: Sequence[Known], preset: Preset) -> None:
    """Single positives need an assumption, also where a file of labels turns out to be of that kind."""
    if "single" in known and preset.expected_positives is None:
        raise ValueError(
            "--known single needs expected_positives, the mean number of present labels of an image, which single "
            "positives cannot tell; give --set expected_positives=2"
        )


def load_backbone(preset: Preset, device: torch.device) -> OpenClipBackbone:
    """The frozen model a preset names."""
    if preset.model == "embedded":
        model, tokenizer = load_embedded()
        backbone = OpenClipBackbone(
            model, tokenizer=tokenizer, name="embedded", image_size=preset.image_size, value_path=preset.value_path
        )
        return backbone.to(device)
    if preset.pretrained is None and ":" not in preset.model:
        raise ValueError(f"--model {preset.model} needs --pretrained: a tag of open_clip such as 'openai', or a weights file")
    return load_open_clip(
        preset.model, preset.pretrained, image_size=preset.image_size, value_path=preset.value_path, device=device
    )


def prepare(args: argparse.Namespace) -> Prepared:
    """Data, frozen model and features, each computed where it is not there yet."""
    preset = choose_preset(args)
    train_split, test_split = chosen_splits(args, preset)
    sets = open_splits(args, preset)
    train, test = sets[train_split], sets[test_split]
    check_unseen(args, len(train.class_names))
    names = prompt_names(args, preset, train)
    if args.class_names:
        train.class_names = tuple(names)
    published = None if args.labels is None else read_labels(args.labels, train, args.labels_encoding)
    frozen = args.source.given(args, preset, train_split, test_split) if args.source.given else encoded(args, preset, sets, names)
    return Prepared(
        **vars(frozen),
        preset=preset,
        device=torch.device(args.device),
        targets=train.targets,
        test_targets=test.targets,
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


def encoded(args: argparse.Namespace, preset: Preset, sets: Mapping[str, LabelledImages], names: Sequence[str]) -> Frozen:
    """What the preset's open_clip model gives."""
    device = torch.device(args.device)
    train_split, test_split = chosen_splits(args, preset)
    backbone = load_backbone(preset, device)
    channels = {"mean": backbone.image_mean, "std": backbone.image_std}
    plain = eval_transform(preset.image_size, **channels)
    digest = weights_digest(backbone)

    def cached(split: str, *, mirror: bool) -> CachedFeatures:
        return cache_features(
            args.cache / "features",
            sets[split].with_transform(plain),
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
        augmented = sets[train_split].with_transform(random)
        features = LiveFeatures(augmented, backbone, token_pool=preset.token_pool, device=device, workers=args.workers)
    else:
        features = cached(train_split, mirror=preset.mirror)
    embedded_names = None
    with warnings_said():
        text = backbone.template_text(names, preset.templates)
    if preset.prompts in ("shared", "csc"):
        embedded_names = backbone.embed_prompts(backbone.tokenize([f"{name}." for name in names]))
    height, width = backbone.grid(backbone.image_size)
    return Frozen(
        model=f"{backbone.name} model",
        detail=f"{backbone.name} at {backbone.image_size[0]} x {backbone.image_size[1]}",
        weights=digest,
        features=features,
        test_features=cached(test_split, mirror=False),
        text=text,
        logit_scale=backbone.logit_scale,
        names=embedded_names,
        encode=backbone.encode_prompts,
        image_size=backbone.image_size,
        grid=(height // preset.token_pool, width // preset.token_pool),
    )


def open_splits(args: argparse.Namespace, preset: Preset) -> dict[str, LabelledImages]:
    """The images trained on and those scored, by split."""
    chosen = chosen_splits(args, preset)
    if HELD_OUT in chosen:
        whole = args.source.read(args, preset, preset.train_split)
        return {name: whole.rows(rows) for name, rows in held_out(len(whole)).items()}
    return {split: args.source.read(args, preset, split) for split in chosen}


def prompt_names(args: argparse.Namespace, preset: Preset, images: LabelledImages) -> list[str]:
    """Names of the classes as prompts have them."""
    if args.class_names is None:
        return images.prompt_names(preset.split_words)
    names = lines_of(args.class_names, "--class-names", "wanted is a file with a name a line")
    if len(names) != len(images.class_names):
        raise ValueError(f"--class-names: {args.class_names} must name {len(images.class_names)} classes, got {len(names)}")
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise ValueError(f"--class-names: {args.class_names} must give each class a name of its own, got {twice[0]!r} twice")
    return names


def counts(split: str, images: LabelledImages) -> str:
    """What there is in a split, counted."""
    present = (images.targets == 1).sum(dim=1)
    said = f"{split}: {len(images)} images, {len(images.class_names)} classes, {present.float().mean():.2f} labels an image"
    known = (images.targets >= 0).float().mean()
    return f"{said}, {int((present == 0).sum())} images without any" + (f", {known:.1%} of the labels known" if known < 1 else "")


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
        self.costs: dict[Cell, dict[str, float | None]] = {}

    def start(self, settings: dict[str, object], *, resume: bool) -> None:
        """Go on with what an interrupted run of the same settings left, or begin afresh."""
        if not ranks.first():
            return
        record = self.output / "run.json"
        if resume and record.exists():
            found = read_json(record)
            if changed := differences(json.loads(json.dumps(settings)), found):
                raise ValueError(
                    f"--resume: {self.output} holds a run with other settings: {'; '.join(changed)}. Give those, or another "
                    "--output, or start afresh without --resume"
                )
            for name, into in (("times.json", self.costs), ("results.json", self.rows)):
                path = self.output / name
                for row in read_json(path) if path.exists() else []:
                    cell = Cell(row["method"], row["known"], row["seed"])
                    into[cell] = row if into is self.rows else {key: row[key] for key in row if key not in Cell._fields}
            for cell in self.rows:
                checkpoint_path(self.output, cell).unlink(missing_ok=True)
            return
        # Without the record nothing that is still there can be taken for a part of another run.
        made = ("checkpoints/*.pt*", "pseudo/*.json", "unseen/*.json", "profile/*.txt", "saliency*.npz")
        for pattern in ("run.json", "results.json", "times.json", *made):
            for path in self.output.glob(pattern):
                path.unlink(missing_ok=True)
        write_json(record, settings)

    def add(self, finished: Finished) -> None:
        """Write the row of a cell."""
        self.rows[finished.cell], self.costs[finished.cell] = finished.row, finished.cost
        if not ranks.first():
            return
        times = [{**cell._asdict(), **self.costs[cell]} for cell in self.cells if cell in self.costs]
        write_json(self.output / "times.json", times)
        write_json(self.output / "results.json", self.ordered())
        checkpoint_path(self.output, finished.cell).unlink(missing_ok=True)

    def ordered(self) -> list[Row]:
        """The rows so far."""
        return [self.rows[cell] for cell in self.cells if cell in self.rows]


def run(args: argparse.Namespace) -> list[Row]:
    """Everything the command does; returns the rows it wrote."""
    started = time.perf_counter()
    args.methods = choose_methods(args.methods, grid=args.grid)
    preset = choose_preset(args)
    check_arguments(args, preset)
    args.known = chosen_known(args)
    if args.deterministic:
        use_deterministic_algorithms()
    args.device = ranks.start(args.device)
    check_writable(args.output, "--output")
    args.output.mkdir(parents=True, exist_ok=True)
    with ranks.first_before_others():
        data = prepare(args)
    say(data.description)
    if data.labels is not None:
        # Without a known absence a file of labels is one of single positives, or of several.
        args.known = [round(known_fraction(data.labels), 4) if bool((data.labels == 0).any()) else "single"]
        check_single(args.known, preset)

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
            "known_labels": None if data.labels is None else tensor_digest(data.labels),
        },
        resume=args.resume,
    )
    todo = ranks.from_first([cell for cell in cells if cell not in results.rows])
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} rows are there already")
    sweep = Sweep(len(cells), len(cells) - len(todo))
    with closing(run_cells(data, todo, args, prepare)) as finished:
        for cell in finished:
            results.add(cell)
            sweep.add(cell.cell.label, cell.row["mAP"], cell.seconds)

    rows = results.ordered()
    apart = dict.fromkeys(cell._replace(method="trm") for cell in cells if args.unseen)
    unseen = [unseen_row(data, cell, args) for cell in apart]
    if not ranks.first():
        return rows
    where = f"{data.name}, {data.model}"
    notes = [f"mAP (%) on the {chosen_splits(args, preset)[1]} images, last epoch of the averaged weights; {where}."]
    say(f"\n{notes[0]}")
    if main := main_rows(rows):
        say(markdown_table(main))
    for heading, table in grid_tables(rows):
        say(f"\n{heading}:\n{table}")
    if variants := ablation_rows(rows):
        say(f"\nDifference to trm on the same seeds:\n{ablation_table(variants)}")
    if unseen:
        say(f"\nmAP (%) with {', '.join(unseen[0]['unseen'])} never labelled in training:\n{unseen_table(unseen)}")
    look_at_images(data, cells, args.output)
    page = make_report(args.output, command=shlex.join([f"reproduce_{args.source.key}.py", *args.typed]), data=where, notes=notes)
    say(f"\n{args.output / 'results.json'}, {page}; {time.perf_counter() - started:.0f} s")
    return rows


def look_at_images(data: Prepared, cells: Sequence[Cell], output: Path) -> None:
    """Saliency maps of the first trained trm head over some test images, for the page."""
    heads = [path for cell in cells if cell.method == "trm" and (path := output / f"{cell.name}.pt").is_file()]
    chosen = choose_images(data.test_targets)
    if not heads or not chosen or data.grid is None or not all(Path(data.test_paths[i]).is_file() for i in chosen):
        return
    maps = collect_saliency(
        TRMHead.load(heads[0]),
        data.test_features.rows(torch.tensor(chosen)),
        data.grid,
        [Image.open(data.test_paths[i]) for i in chosen],
        data.test_targets[chosen],
        data.text,
        size=data.image_size,
        sharpness=data.preset.attention_scale,
    )
    maps.save(output / f"saliency-{heads[0].stem}.npz")


def main(argv: Sequence[str] | None = None, source: Source = voc.SOURCE) -> None:
    """Entry point; errors of data, names and settings are one line without a traceback."""
    escape_output()
    args = parser(source).parse_args(argv)
    args.typed = list(sys.argv[1:] if argv is None else argv)
    try:
        run(args)
        ranks.stop()
    except (ValueError, OSError, ImportError) as error:
        # One that comes from a process that reads images brings its traceback along; the error itself is the last line.
        line = str(error).strip().splitlines()[-1:] if str(error).startswith("Caught ") else [str(error)]
        raise SystemExit(f"error: {''.join(line).removeprefix(f'{type(error).__name__}: ')}") from error
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
