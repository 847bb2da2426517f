"""Prompt tuning through a frozen text tower: time and peak memory against every token of every class, paired in one run.

    python benchmarks/prompts.py --rounds 5 --only csc

The tower is open_clip's own, of RN101's size (12 layers, width 512, 8 heads, 77 tokens) with random weights; names have one
to four tokens. The peer is the plain way: contexts put into whole prompts, all 77 tokens of every class through the tower's
own modules. Texts and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from losses import backward, peak_memory
from torch import Tensor

from trm_losses import PromptLearner
from trm_losses.backbones import OpenClipBackbone
from trm_losses.backbones._imports import import_open_clip

RN101_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}


class Setting(NamedTuple):
    """Contexts of one kind before so many names, and the chunk sizes to pass them through the tower with."""

    mode: Literal["shared", "csc"]
    classes: int
    chunks: tuple[int | None, ...] = (None,)
    num_context: int = 16


SETTINGS = (Setting("shared", 20), Setting("shared", 80, (None, 16)), Setting("csc", 20))


def small_model(text: dict[str, int]) -> OpenClipBackbone:
    """This text tower beside an image tower that hardly exists."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    return OpenClipBackbone(import_open_clip().CLIP(512, vision, text))


def whole_names(backbone: OpenClipBackbone, classes: int) -> Tensor:
    """Ids (C, L) of start, one to four words, full stop and end, then padding."""
    vocabulary = int(backbone.model.vocab_size)
    ids = torch.zeros(classes, backbone.context_length, dtype=torch.long)
    for c in range(classes):
        words = 1 + torch.randint(vocabulary - 3, (1 + c % 4,))
        ids[c, : len(words) + 3] = torch.tensor([vocabulary - 2, *words, 1, vocabulary - 1])
    return ids


def every_token(model: Any, prompts: PromptLearner, names: Tensor) -> Tensor:
    """All tokens through the model's own modules; names (C, L, W) are whole prompts without contexts."""
    context = prompts.context.expand(len(names), *prompts.context.shape[-2:])
    x = torch.cat([names[:, :1], context, names[:, 1:]], dim=1)[:, : names.shape[1]]
    x = model.ln_final(model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask))
    text: Tensor = x[torch.arange(len(x)), prompts.eot] @ model.text_projection
    return text


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def run(backbone: OpenClipBackbone, setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Rows of figures, one for each way through the tower; every round times all of them."""
    torch.manual_seed(0)
    embedded = backbone.embed_prompts(whole_names(backbone, setting.classes))
    prompts = PromptLearner(setting.mode, names=embedded, num_context=setting.num_context, context_length=backbone.context_length)
    weights = torch.randn(setting.classes, backbone.dim)

    def ours(chunk_size: int | None) -> Callable[[], Tensor]:
        return lambda: backbone.encode_prompts(prompts(), chunk_size=chunk_size)

    texts = [lambda: every_token(backbone.model, prompts, embedded.embeddings), *map(ours, setting.chunks)]
    wanted = texts[0]()
    (slope,) = torch.autograd.grad((wanted * weights).sum(), prompts.context)
    errors = []
    for text in texts[1:]:
        got = text()
        (own,) = torch.autograd.grad((got * weights).sum(), prompts.context)
        errors.append(max(distance(got, wanted), distance(own, slope)))
        if errors[-1] > 1e-3:
            raise RuntimeError(f"{setting}: text or gradient is off by {errors[-1]:.2g} of the largest value")
    del wanted, got

    def learned(text: Callable[[], Tensor]) -> Callable[[], object]:
        return backward(lambda: (text() * weights).sum(), prompts.context)

    works = list(map(learned, texts))
    seconds: list[list[float]] = [[] for _ in works]
    for index in range(rounds):
        order = range(len(works))
        for i in order if index % 2 else reversed(order):
            start = time.perf_counter()
            works[i]()
            seconds[i].append(time.perf_counter() - start)
    peaks = [peak_memory(work) for work in works]

    rows: list[dict[str, Any]] = []
    for chunk_size, error, times, peak in zip(setting.chunks, errors, seconds[1:], peaks[1:], strict=True):
        ratios = [a / b for a, b in zip(times, seconds[0], strict=True)]
        rows.append(
            {
                "mode": setting.mode,
                "classes": setting.classes,
                "chunk_size": chunk_size,
                "relative_error": error,
                "milliseconds": 1e3 * statistics.median(times),
                "time_ratio": statistics.median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
                "memory_ratio": peak / peaks[0],
                "peak_mib": peak / 2**20,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("shared", "csc"), help="contexts of this kind alone")
    parser.add_argument("--classes", type=int, nargs="*", help="these numbers of classes alone")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    backbone = small_model(RN101_TEXT)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.threads} thread(s), {args.rounds} rounds")
    print(f"{'contexts':8} {'classes':>7} {'chunk':>6} {'ms':>8}  time / peer (range)      memory / peer  error")
    figures = []
    for setting in SETTINGS:
        if args.only not in (None, setting.mode) or (args.classes and setting.classes not in args.classes):
            continue
        for row in run(backbone, setting, args.rounds):
            figures.append(row)
            low, high = row["time_ratio_range"]
            print(
                f"{row['mode']:8} {row['classes']:7} {row['chunk_size'] or 'all':>6} {row['milliseconds']:8.1f}"
                f"  {row['time_ratio']:.3f} ({low:.3f}-{high:.3f}){row['memory_ratio']:16.3f}  {row['relative_error']:.1e}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "threads": args.threads, "prompts": figures}, file, indent=1)


if __name__ == "__main__":
    main()
