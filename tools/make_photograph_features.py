"""Features of real photographs that anybody can make again: a VOCdevkit, COCO, a list of image ids and an ImageNet tower.

    python tools/make_photograph_features.py VOCdevkit FEATURES --coco COCO \
        --train docs/assets/photographs-train.txt --val docs/assets/photographs-val.txt

No vision-language model is run on the images. The tower's own classifier is applied at each place of its last map, and the
probabilities of the ImageNet classes are averaged over text embeddings of their names:

    token_n = sum_k softmax_k(classifier(F_n)) e_k - mean,   text_c = e_c - mean

so that image and text share a space that nobody trained on these labels. ``penultimate`` is the map averaged over its places.
It is not CLIP; confusions are as real as the images. Labels are read from the annotations of the devkit, and of COCO for the
classes that it shares with VOC.

Text embeddings come from an open_clip model (``--clip NAME --clip-pretrained TAG``, which downloads), or from a file with a row
for each name: first the ImageNet classes, in their order, then the 20 VOC classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_losses import write_features
from trm_losses.backbones import load_open_clip
from trm_losses.backbones._imports import import_timm
from trm_pipeline.data.base import LabelledImages, eval_transform, lines_of
from trm_pipeline.data.coco import COCO, COCO_CLASSES
from trm_pipeline.data.voc import VOC, class_prompt_names
from trm_pipeline.progress import progress, say

TEMPLATE = "a photo of a {}."


class Tower(nn.Module):
    """A timm classifier that answers at every place, in a space of texts.

    Args:
        network: a convolutional model with a linear classifier behind an average.
        names: (K, D) unit embeddings of the names of its classes.
    """

    def __init__(self, network: Any, names: Tensor) -> None:
        super().__init__()
        classifier = network.get_classifier()
        if not isinstance(classifier, nn.Linear):
            raise ValueError(
                f"--model must end in a linear classifier, got {type(classifier).__name__}; try tf_efficientnet_lite2"
            )
        if classifier.out_features != len(names):
            raise ValueError(f"--names-text must have a row for each of {classifier.out_features} classes, got {len(names)}")
        self.network, self.classifier = network.eval(), classifier
        self.register_buffer("names", names)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Tokens (B, N, D), pooled (B, D), penultimate (B, W) and the grid (h, w) of images (B, 3, H, W)."""
        feature = self.network.forward_features(images)  # (B, W, h, w)
        if feature.ndim != 4:
            raise ValueError(f"--model must give a map (B, W, h, w), got {tuple(feature.shape)}; take a convolutional one")
        cells, penultimate = feature.flatten(2).transpose(1, 2), feature.mean(dim=(2, 3))
        names: Tensor = self.names  # type: ignore[assignment]
        tokens, pooled = (torch.softmax(self.classifier(x), dim=-1) @ names for x in (cells, penultimate))
        return tokens, pooled, penultimate, (feature.shape[2], feature.shape[3])


def name_texts(args: argparse.Namespace, imagenet: list[str]) -> tuple[Tensor, Tensor]:
    """Unit embeddings of the names of the tower's classes (K, D) and of the VOC classes (20, D), less the mean of the former."""
    names = [*imagenet, *class_prompt_names()]
    if args.names_text is not None:
        found = torch.from_numpy(np.load(args.names_text, allow_pickle=False)).float()
        if found.ndim != 2 or len(found) != len(names):
            wanted = f"({len(names)}, D): {len(imagenet)} ImageNet classes, then 20 of VOC"
            raise ValueError(f"--names-text must have shape {wanted}; got {tuple(found.shape)}")
    else:
        found = load_open_clip(args.clip, args.clip_pretrained).template_text(names, [TEMPLATE])
    found = F.normalize(found, dim=-1)
    found = found - found[: len(imagenet)].mean(dim=0)
    return found[: len(imagenet)], found[len(imagenet) :]


OTHER_NAMES = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
"""What COCO calls classes of VOC, where it is more than a blank."""


def open_images(args: argparse.Namespace, transform: Any) -> LabelledImages:
    """The images of the devkit, then those of COCO with the columns of VOC's classes."""
    images = VOC(args.devkit, args.year, args.source).with_transform(transform)
    name, ids = f"{args.source} of VOC{args.year}", [Path(path).stem for path in images.image_paths]
    paths, targets = [*images.image_paths], [images.targets]
    if args.coco is not None:
        column = {name.replace(" ", ""): c for c, name in enumerate(COCO_CLASSES)}
        columns = [column[OTHER_NAMES.get(name, name)] for name in images.class_names]
        for part in (COCO(args.coco, split) for split in ("train", "val")):
            paths += part.image_paths
            targets.append(part.targets[:, columns])
            ids += [f"coco{Path(path).stem[-12:]}" for path in part.image_paths]
        name += " and COCO 2014"
    return LabelledImages(name, images.class_names, paths, torch.cat(targets), ids=ids).with_transform(transform)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("devkit", type=Path, help="VOCdevkit, or the folder that holds it")
    p.add_argument("output", type=Path, metavar="FEATURES", help="folder to write")
    for split in ("train", "val", "test"):
        p.add_argument(
            f"--{split}", type=Path, metavar="FILE", help=f"ids of the {split} images, one a line, such as voc2012 2008_000002"
        )
    p.add_argument("--coco", type=Path, help="COCO 2014, where ids such as coco000000493652 are in a list")
    p.add_argument("--year", type=int, default=2012)
    p.add_argument("--source", default="trainval", help="image set of the devkit that holds all ids")
    p.add_argument("--model", default="tf_efficientnet_lite2", help="a timm model with a linear classifier of ImageNet")
    p.add_argument("--weights", type=Path, help="its weights; default: timm's own, which are downloaded")
    p.add_argument("--image-size", type=int, default=384)
    p.add_argument("--names-text", type=Path, metavar="FILE", help="text embeddings (K + 20, D) as .npy, in place of --clip")
    p.add_argument("--clip", default="ViT-B-32", help="open_clip model for the texts")
    p.add_argument("--clip-pretrained", default="openai")
    p.add_argument("--batch-size", type=int, default=32)
    args = p.parse_args(argv)
    chosen = {split: getattr(args, split) for split in ("train", "val", "test") if getattr(args, split)}
    if "train" not in chosen or len(chosen) < 2:
        raise SystemExit("error: --train, and --val or --test, must be files of image ids")
    try:
        _write(args, chosen)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


def _write(args: argparse.Namespace, chosen: dict[str, Path]) -> None:
    timm = import_timm()
    lists = {split: lines_of(path, f"--{split}", "wanted is a file with an id a line") for split, path in chosen.items()}
    lists = {split: [line.split()[-1] for line in lines] for split, lines in lists.items()}
    weights = {"checkpoint_path": str(args.weights)} if args.weights else {"pretrained": True}
    network = timm.create_model(args.model, **weights)
    described = timm.data.ImageNetInfo()
    imagenet = [described.index_to_description(i).split(",")[0] for i in range(described.num_classes())]
    names, text = name_texts(args, imagenet)
    tower = Tower(network, names)
    statistics = timm.data.resolve_data_config(model=network)
    transform = eval_transform(args.image_size, mean=statistics["mean"], std=statistics["std"])
    images = open_images(args, transform)
    places = {name: row for row, name in enumerate(images.ids)}
    for split, ids in lists.items():
        if missing := [name for name in ids if name not in places]:
            hint = "; give --coco" if missing[0].startswith("coco") and args.coco is None else ""
            raise ValueError(f"--{split}: {missing[0]} is not in {images.name} ({len(missing)} of {len(ids)} are not){hint}")
    for split, ids in lists.items():
        own = images.rows([places[name] for name in ids])
        views = [_batches(tower, own, args.batch_size, mirror=mirror) for mirror in (False, True)[: 1 + (split == "train")]]
        write_features(
            args.output,
            split,
            *views,
            targets=own.targets,
            class_names=own.class_names,
            text=text,
            logit_scale=20.0,
            ids=ids,
            expected_positives=1.5,
            description=f"photographs of {images.name}; tokens of {args.model} as means of text embeddings of ImageNet names",
        )
        say(f"{split}: {len(ids)} images")


def _batches(tower: Tower, images: Any, size: int, *, mirror: bool) -> Iterator[tuple[Any, ...]]:
    """What :func:`trm_losses.write_features` takes, batch by batch."""
    starts = progress(range(0, len(images), size), f"encoding {len(images)} images{', mirrored' * mirror}")
    for start in starts:
        pixels = torch.stack([images[i][0] for i in range(start, min(start + size, len(images)))])
        tokens, pooled, penultimate, grid = tower(pixels.flip(3) if mirror else pixels)
        yield tokens, pooled, grid, penultimate


if __name__ == "__main__":
    main()
