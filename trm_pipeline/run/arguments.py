"""The command line of a run, and the settings that it asks for."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from trm_losses import GaussianDiscriminant, GlobalHead
from trm_losses._checks import check_expected_positives, check_number
from trm_pipeline import ranks
from trm_pipeline.config import settings
from trm_pipeline.config.losses import LOSSES
from trm_pipeline.config.presets import PRESETS, Known, Preset
from trm_pipeline.data import voc
from trm_pipeline.data.base import Place, Source
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.methods import LABEL_FREE, Setting
from trm_pipeline.methods.global_head import GLOBAL, of_grid, parts_of
from trm_pipeline.methods.grid import HEADS, NAMES, PEERS, build_method, choose_methods
from trm_pipeline.options import add_options, values_of
from trm_pipeline.progress import curves
from trm_pipeline.run.options import DEFAULT_KNOWN, RunOptions

_OF_MODEL = ("name", "model", "pretrained", "image_size", "token_pool", "value_path", "num_context")
OF_IMAGES = (*_OF_MODEL, "year", "templates", "augment", "mirror")
"""Settings of how images and words are encoded, and what they are called together."""

ABOVE_0 = ("clip_norm", "expected_positives", "scale", "sharpness")
BOUNDS: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys((*ABOVE_0, "lr", "text_lr", "lr_factor", "weight_decay", "single_negative"), (0, None)),
    **dict.fromkeys(("ema_per_epoch", "pseudo_warmup", "pseudo_ramp", "merge_rate"), (0, 1)),
    "warmup_share": (0, 0.99),
}
"""Between what numbers of the preset and of its peers must lie, by the last part of their names."""

DEFAULT_METHODS = (
    *LABEL_FREE,
    "linear",
    "linear-penultimate",
    "global",
    "text-image",
    "text-pixel",
    "dual-coop",
    "dual-coop+global",
    "trm-region",
    "trm-paper",
    "trm",
)


def _own(source: Source) -> argparse.ArgumentParser:
    """The arguments that a data set has for itself."""
    own = argparse.ArgumentParser(add_help=False)
    source.add_arguments(own)
    return own


def parser(source: Source = voc.SOURCE, prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of ``reproduce_voc.py`` and its siblings; ``prog`` is what it is called, by default the script."""
    drawn = (
        "Without any argument: drawn scenes and the small model that ships with the project, no download, some minutes "
        "on two cores."
    )
    p = argparse.ArgumentParser(
        prog=prog,
        description=f"TRM-ML and its peers on {source.title} with missing labels. {drawn * bool(source.drawn_preset)}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[_own(source)],
    )
    encoded: tuple[str, ...] = ()
    if source.given is None:
        p.add_argument("--data-root", type=Path, help=source.layout.replace("%", "%%"))
        p.add_argument("--model", help="an open_clip model name, 'embedded', timm:NAME with --class-texts, or hf:FOLDER")
        p.add_argument(
            "--pretrained", help="an open_clip tag such as 'openai', or a weights file; of timm default: its own weights"
        )
        p.add_argument("--image-size", type=int, help="side of the square images, a multiple of the model's stride")
        p.add_argument("--cache", type=folder_argument, default=CACHE, help="folder for drawn scenes and frozen features")
    else:
        encoded = ("class_names", "class_texts", "workers")  # what is for images
        p.add_argument("data_root", type=Path, metavar="FEATURES", help=source.layout)
        p.set_defaults(class_names=None, class_texts=None, model=None, pretrained=None, image_size=None, workers=0, cache=Path())
    add_options(p, RunOptions, without=encoded)
    p.set_defaults(output=Path("runs") / source.key)
    p.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"default: {f'{source.drawn_preset} without --data-root, else ' * bool(source.drawn_preset)}{source.preset}",
    )
    p.add_argument(
        "--methods",
        nargs="+",
        action="extend",
        metavar="METHOD",
        help=f"default: {' '.join(DEFAULT_METHODS)}, of which --known 0 takes {' '.join(LABEL_FREE)}; any of "
        f"{', '.join(name for name in NAMES if not parts_of(name)[1])}; a head with another method's loss, "
        f"such as linear+role (heads {', '.join(HEADS)}; losses {', '.join(LOSSES)}); or a pattern such as "
        "'linear+*'",
    )
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change settings of the preset")
    p.add_argument("--epochs", type=int, help="default: the preset's")
    p.add_argument(
        "--grid",
        action="store_true",
        help=f"also the {len(HEADS)} heads with their own loss and with each of the {len(LOSSES)} others",
    )
    return p


def parse(typed: Sequence[str], source: Source = voc.SOURCE, prog: str | None = None) -> RunOptions:
    """The command line, read and checked.

    Raises:
        ValueError, OSError: what would otherwise end a run late, or do something else than was asked for.
    """
    args = parser(source, prog).parse_args(typed)
    own = vars(_own(source).parse_args([]))
    place = Place(args.data_root, args.cache, {name: getattr(args, name) for name in own})
    known = args.known or ([] if args.labels else DEFAULT_KNOWN)
    told = values_of(args, RunOptions)
    told |= {"preset": _preset(args, source, place), "known": tuple(known), "seeds": tuple(args.seeds or [1])}
    methods = args.methods or (LABEL_FREE if set(known) == {0} and not args.grid else DEFAULT_METHODS)
    told |= {"methods": tuple(choose_methods(methods, grid=args.grid))}
    options = RunOptions(source=source, place=place, typed=tuple(typed), **told)
    check_options(options)
    return options


def _preset(args: argparse.Namespace, source: Source, place: Place) -> Preset:
    """The preset the arguments ask for, with what they change."""
    drawn = source.drawn_preset if place.root is None else None
    preset = PRESETS[args.preset or drawn or source.preset]
    preset = dataclasses.replace(preset, **source.settings(place))
    if args.model not in (None, preset.model):
        preset = dataclasses.replace(preset, pretrained=None)  # the preset's weights are of its own model
    options = {name: getattr(args, name) for name in ("model", "pretrained", "image_size", "epochs")}
    changes = {name: value for name, value in options.items() if value is not None}
    preset = dataclasses.replace(preset, **changes)
    if twice := [name for name in changes if any(setting.startswith(f"{name}=") for setting in args.set)]:
        raise ValueError(f"--{twice[0].replace('_', '-')} and --set {twice[0]} are the same setting; leave one out")
    made = settings.override(preset, args.set)
    if source.given is not None and (unread := [name for name in OF_IMAGES if getattr(made, name) != getattr(preset, name)]):
        raise ValueError(f"--set {unread[0]} is for images that a run encodes, and given features are encoded; leave it out")
    return made


def check_options(options: RunOptions) -> None:
    """Refuse at the door what would otherwise end a run late, or do something else than was asked for."""
    preset, known, place = options.preset, options.known, options.place
    if place.root is None and options.source.drawn_preset is None:
        raise ValueError(f"--data-root is needed, {options.source.layout}")
    if options.labels and (known or len(set(options.seeds)) > 1):
        raise ValueError("--labels is one setting of known labels: leave --known out, and give one of --seeds")
    if options.labels and options.tune:
        raise ValueError("--labels has the labels of the whole training split, of which --tune trains on a part; leave one out")
    if not 0 <= options.wrong <= 1:
        raise ValueError(f"--wrong must be a share from 0 to 1, got {options.wrong:g} (10 % is 0.1)")
    if options.labels and options.wrong:
        raise ValueError("--wrong moves labels that a run has hidden itself; leave it or --labels out")
    if options.labels_encoding and not options.labels:
        raise ValueError("--labels-encoding needs --labels, the file it is about")
    shares = dict.fromkeys(share for share in known if not isinstance(share, str))
    if outside := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"--known must be shares from 0 to 1, got {outside[0]:g} (10 % is 0.1)")
    if len({f"{share:g}" for share in shares}) < len(shares):
        raise ValueError(f"--known must be shares that differ in six digits, the names of files; got {sorted(shares)}")
    trained = [name for name in options.methods if name not in LABEL_FREE]
    trained += ["trm (--ablation)"] * options.ablation + ["trm (--unseen)"] * bool(options.unseen)
    if 0 in known and trained:
        raise ValueError(f"--known 0 leaves no label, and {trained[0]} needs some; methods without are {', '.join(LABEL_FREE)}")
    if missing := [share for share in options.ablation_known or () if share not in known]:
        raise ValueError(f"--ablation-known must be among --known, where trm itself is trained; got {missing[0]}")
    for name, value, least in (
        ("--seeds", min(options.seeds), 1),
        ("--jobs", options.jobs, 1),
        ("--workers", options.workers, 0),
        ("epochs", preset.epochs, 1),
        ("batch_size", preset.batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if options.jobs > 1 and ranks.launched() > 1:
        raise ValueError(f"--jobs must be 1 under torchrun, whose processes train each cell together; got {options.jobs}")
    losses = {name: parts_of(name.removesuffix(GLOBAL))[1] for name in options.methods if of_grid(name)}
    if ranks.launched() > 1 and (alone := [name for name, loss in losses.items() if loss in PEERS]):
        raise ValueError(f"--methods: {alone[0]} is trained by one process, not under torchrun")
    if options.source.num_classes is not None:
        check_unseen(options.unseen, options.source.num_classes)
    if options.unseen and preset.pooler.get("query") == "free":
        raise ValueError("--unseen needs queries that come from text; give --set pooler.query=tied")
    if options.unseen and not preset.region_learning:
        raise ValueError("--unseen needs regions of the classes; give --set region_learning=true")
    check_single(known, preset, options.source.num_classes)
    check_bounds(preset)
    for single in {share == "single" for share in known} or {False}:  # a file of labels says later of which kind it is
        _build_parts(preset, losses.values(), single=single)
    if (until := preset.single_negative_until) not in ("end", "warmup", None):
        raise ValueError(f"single_negative_until must be 'end' or 'warmup', got {until!r}")
    if preset.teacher not in LABEL_FREE:
        raise ValueError(f"teacher must be one of {', '.join(LABEL_FREE)}, got {preset.teacher!r}")
    if len(set(options.splits)) == 1:
        raise ValueError(f"training and test images must be different splits, got {options.splits[0]!r} for both")
    if options.tensorboard:
        curves()
    if place.own.get("download") and place.root is None:
        raise ValueError("--download needs --data-root, the folder to put VOC into")
    ranks.check_device(options.device)


def _build_parts(preset: Preset, losses: Iterable[str], *, single: bool) -> None:
    """Other words and numbers of the method are its parts' own to check: here with any texts, before anything is computed."""
    any_text = torch.ones(2, max(1, preset.pooler.get("num_heads", 4)))
    GaussianDiscriminant(2, 2, **preset.training_free)
    GlobalHead(2, 2, **preset.global_head)
    setting = Setting(dataclasses.replace(preset, prompts="fixed"), any_text, None, 100.0, preset.epochs, single=single)
    setting.targets = torch.ones(2, 2)
    setting.similarities = setting.estimates = lambda: torch.ones(2, 2)
    for name in ("trm", *(f"text-pixel+{loss}" for loss in dict.fromkeys(losses))):
        build_method(name, setting)


def check_bounds(preset: Preset) -> None:
    """Numbers of the schedule and of the peers lie within their bounds."""
    peers = {
        f"{peer.replace('_', '-')}.{name}": value for peer in settings.PEERS for name, value in getattr(preset, peer).items()
    }
    for name, value in {**vars(preset), **peers}.items():
        if value is not None and (bounds := BOUNDS.get(kind := name.rpartition(".")[2])):
            check_number("--set", name, value, *bounds, strict=kind in ABOVE_0)
            if math.isinf(value):
                raise ValueError(f"--set: {name} must be finite, got {value}")


def check_unseen(unseen: int, classes: int) -> None:
    """Some classes are left to train on."""
    if not 0 <= unseen < max(1, classes - 1):
        raise ValueError(f"--unseen must leave two classes of {classes} to train on, got {unseen}")


def check_single(known: Sequence[Known], preset: Preset, classes: int | None = None) -> None:
    """Single positives need an assumption, also where a file of labels turns out to be of that kind."""
    if "single" not in known:
        return
    if preset.expected_positives is None:
        raise ValueError(
            "--known single needs expected_positives, the mean number of present labels of an image, which single "
            "positives cannot tell; give --set expected_positives=2"
        )
    if classes is not None:
        check_expected_positives("--set", preset.expected_positives, classes)
