"""Pre-train the embedded model from scratch on captions of drawn scenes: draws them, trains, writes the weights and the log.

The loss is CLIP's, with one change: captions here are short and repeat within a batch, so an image's target is shared
evenly by all captions in the batch that read the same. While it trains, the token table is cut to the rows the captions
use (about a hundred of 49,408).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from gate import encode_captions, encode_images, mean_ap, read_split, run_gate, template_features
from numpy.typing import NDArray
from pretraining_captions import caption_words, draw_pretraining, scene_captions
from torch import Tensor, nn
from torch.nn import functional as F

from trm_pipeline.drawn.captions import TEMPLATES
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.embedded import WEIGHTS_FILE, build_model, load_embedded, save_weights
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.methods import ZERO_SHOT
from trm_pipeline.progress import escape_output

SHIFT = 8  # pixels a training image is moved at most


@dataclass(frozen=True)
class PretrainingRecipe:
    """Everything that determines the weights."""

    seed: int = 0
    scenes: int = 50_000
    captions_per_scene: int = 6
    batch: int = 64
    steps: int = 6_000
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.04  # share of the steps
    single_first: float = 0.9  # share of one-object scenes in a batch at the beginning …
    single_last: float = 0.75  # … and from the middle on
    clip_norm: float = 1.0


def _used_ids(captions: list[str], tokenizer: Callable[[list[str]], Tensor]) -> Tensor:
    """All token ids that captions, templates and class words use, sorted, so that the end of text stays the largest."""
    texts = captions + [t.format(word) for word in caption_words() for t in TEMPLATES]
    used: Tensor = torch.unique(tokenizer(sorted(set(texts))))
    return used


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, group: Tensor) -> Tensor:
    """CLIP's symmetric loss; ``group`` (B,) gives equal captions equal numbers, and a group shares its target evenly."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    same = (group[:, None] == group[None, :]).float()
    target = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


class Batches:
    """Random batches of augmented scenes and one caption each."""

    def __init__(
        self, recipe: PretrainingRecipe, images: NDArray[np.uint8], captions: NDArray[np.int64], single: NDArray[np.bool_]
    ) -> None:
        self.recipe, self.images, self.captions = recipe, images, captions
        self.pools = (np.flatnonzero(~single), np.flatnonzero(single))
        self.rng = np.random.default_rng([recipe.seed, 1])

    def draw(self, progress: float) -> tuple[Tensor, NDArray[np.int64]]:
        """Images (B, 3, 112, 112) in uint8 and the number of each one's caption, at a share ``progress`` of the run."""
        r, rng = self.recipe, self.rng
        fade = min(2.0 * progress, 1.0)
        share = (1.0 - fade) * r.single_first + fade * r.single_last
        kind = (rng.random(r.batch) < share).astype(int)
        index = np.array([self.pools[k][rng.integers(len(self.pools[k]))] for k in kind])
        batch = self.images[index]
        out = np.empty_like(batch)
        for at, image in enumerate(batch):
            if rng.random() < 0.5:
                image = image[:, ::-1]
            dy, dx = rng.integers(-SHIFT, SHIFT + 1, 2)
            # edge pixels are repeated, as if the scene went on
            rows = np.clip(np.arange(image.shape[0]) + dy, 0, image.shape[0] - 1)
            columns = np.clip(np.arange(image.shape[1]) + dx, 0, image.shape[1] - 1)
            out[at] = image[rows][:, columns]
        which = rng.integers(self.captions.shape[1], size=r.batch)
        return torch.from_numpy(out).permute(0, 3, 1, 2), self.captions[index, which]


def _draw(recipe: PretrainingRecipe) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_], list[str]]:
    """All scenes (N, 112, 112, 3), the numbers of their captions (N, K), who holds one object (N,), and the captions."""
    images, objects = draw_pretraining(recipe.scenes, seed=recipe.seed)
    texts = [scene_captions(recipe.seed, i, found, recipe.captions_per_scene) for i, found in enumerate(objects)]
    distinct = sorted({text for scene in texts for text in scene})
    number = {text: i for i, text in enumerate(distinct)}
    captions = np.array([[number[text] for text in scene] for scene in texts])
    return images, captions, np.array([len(found) == 1 for found in objects]), distinct


def _optimizer(model: nn.Module, recipe: PretrainingRecipe) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without decay on biases, norms and the scale; a linear warm-up, then a cosine to zero."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    warm = max(int(recipe.warmup * recipe.steps), 1)

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(recipe.steps - warm, 1)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def pretrain(
    recipe: PretrainingRecipe,
    *,
    cache: Path,
    weights: Path,
    log: Path,
    device: str = "cpu",
    threads: int | None = None,
    reports: int = 20,
) -> None:
    """Run the whole recipe and write the weights and the log of the run.

    Zero-shot mAP on the *validation* scenes is printed every now and then; the test scenes are never looked at.

    Args:
        recipe: What to do.
        cache: Folder for the drawn VOC, of which val is scored.
        weights: The safetensors file to write.
        log: The text file that gets every line printed.
        device: Where it trains; the weights differ a little from device to device.
        threads: torch's threads; its own choice by default.
        reports: How often val is scored, evenly over the run.
    """
    with log.open("w", encoding="utf-8") as stream:

        def say(line: str) -> None:
            print(line, flush=True)
            stream.write(line + "\n")
            stream.flush()

        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(recipe.seed)
        say(f"recipe {json.dumps(asdict(recipe))}")
        machine = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
        say(f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, {device}: {machine}")
        start = time.perf_counter()
        images, captions, single, distinct = _draw(recipe)
        say(f"{len(images)} scenes, {single.mean():.0%} of one object, drawn in {time.perf_counter() - start:.0f} s")
        say(f"{len(distinct)} distinct captions of {captions.size}")

        model, tokenizer = build_model()
        used = _used_ids(distinct, tokenizer)
        table = nn.Embedding(len(used), model.token_embedding.embedding_dim)
        table.weight.data.copy_(model.token_embedding.weight.data[used])
        model.token_embedding = table
        ids = torch.searchsorted(used, tokenizer(distinct)).to(device)
        lengths = (ids.argmax(dim=1) + 1).cpu().numpy()

        def template_ids(texts: list[str]) -> Tensor:
            return torch.searchsorted(used, tokenizer(texts)).to(device)

        visual = sum(p.numel() for p in model.visual.parameters())
        text_side = sum(p.numel() for p in model.parameters()) - visual
        say(f"{visual:,} visual and {text_side:,} text parameters, {len(used)} of {tokenizer.vocab_size} tokens used")

        devkit = write_drawn_voc(cache)
        val_images, val_labels = read_split(devkit, "val")
        model.to(device, memory_format=torch.channels_last)
        mean = torch.tensor(model.visual.image_mean, device=device).view(3, 1, 1)
        std = torch.tensor(model.visual.image_std, device=device).view(3, 1, 1)
        optimizer, scheduler = _optimizer(model, recipe)

        def score(step: int, loss: float) -> None:
            model.eval()
            seen_val, text = encode_images(model, val_images), template_features(model, template_ids)
            zero_shot = {name.removeprefix("zero-shot-"): scores(seen_val, text) for name, scores in ZERO_SHOT.items()}
            seconds, seen = time.perf_counter() - begun, step * recipe.batch
            say(
                f"step {step:5d}  {seen:7d} images  {seconds:5.0f} s  {seen / seconds:4.0f}/s  loss {loss:.3f}  "
                f"scale {model.logit_scale.exp().item():5.2f}  val zero-shot mAP: "
                + ", ".join(f"{name} {mean_ap(scores, val_labels):.1f}" for name, scores in zero_shot.items())
            )
            model.train()

        batches = Batches(recipe, images, captions, single)
        model.train()
        begun = time.perf_counter()
        average = torch.zeros(())
        for step in range(recipe.steps):
            pixels, numbers = batches.draw(step / recipe.steps)
            pixels = ((pixels.to(device).float() / 255.0 - mean) / std).contiguous(memory_format=torch.channels_last)
            group = torch.from_numpy(numbers).to(device)
            caption_ids = ids[group, : lengths[numbers].max()]
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                features = model.visual(pixels)
            text = encode_captions(model, caption_ids)
            loss = contrastive_loss(features.float(), text, model.logit_scale.exp(), group)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, math.log(100.0))
            average = loss.detach() if step == 0 else torch.lerp(average, loss.detach(), 0.02)
            if (step + 1) % max(recipe.steps // reports, 1) == 0 and step + 1 < recipe.steps:
                score(step + 1, average.item())
                save_weights(model, used, weights)  # a run that is cut off leaves something to look at
        save_weights(model, used, weights)
        score(recipe.steps, average.item())
        say(f"wrote {weights.name}, {weights.stat().st_size / 2**20:.2f} MiB; {time.perf_counter() - start:.0f} s in all")
        say(f"\nthe gate on val:\n{run_gate(*load_embedded(weights=weights), devkit)}")


def main() -> None:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for weights.safetensors and pretrain.log")
    parser.add_argument("--cache", type=folder_argument, default=CACHE, help="folder for the drawn VOC")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    for field in fields(PretrainingRecipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    recipe = PretrainingRecipe(**{field.name: getattr(args, field.name) for field in fields(PretrainingRecipe)})
    args.output.mkdir(parents=True, exist_ok=True)
    pretrain(
        recipe,
        cache=args.cache,
        weights=args.output / WEIGHTS_FILE.name,
        log=args.output / "pretrain.log",
        device=args.device,
        threads=args.threads,
    )


if __name__ == "__main__":
    main()
