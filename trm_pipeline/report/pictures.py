"""Pictures of results: mAP against known labels, saliency maps over images, pseudo-labels against the hidden truth."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import isotonic_regression
from torch import Tensor

from trm_losses import TRMHead
from trm_pipeline.features.cached import Batch
from trm_pipeline.methods import LABEL_FREE


def import_pyplot() -> Any:
    """Matplotlib's pyplot, which draws into files here, on whatever machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _looks(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and line of each method: gray and dotted without labels, else nine colours, from the tenth on in other lines."""
    gray = [method for method in methods if method in LABEL_FREE]
    looks = {method: {"color": ("0.3", "0.6", "0.45")[i % 3], "ls": ":"} for i, method in enumerate(gray)}
    for i, method in enumerate(method for method in methods if method not in looks):
        looks[method] = {"color": ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")[i % 9]}
        looks[method]["ls"] = ("-", "--", "-.")[i // 9 % 3]
    return looks


def _bands(values: Sequence[float]) -> list[tuple[float, float]]:
    """The range of values, or two where a gap of 8 and more than a quarter of the range would press the lines together."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    gap, split = max(((b - a, i + 1) for i, (a, b) in enumerate(zip(ordered, ordered[1:], strict=False))), default=(0.0, 0))
    groups = [ordered[:split], ordered[split:]] if gap > max(8.0, 0.25 * (high - low)) else [ordered]
    return [(group[0], group[-1]) for group in groups if group]


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved apart to at least ``gap``, as little as possible (least squares)."""
    share = gap * np.arange(len(places))  # with it taken off they need only ascend
    found: list[float] = (isotonic_regression(places - share).x + share).tolist() if places else []
    return found


def _name_ends(
    axes: Any, x: float, ends: Sequence[tuple[float, str]], looks: Mapping[str, Mapping[str, str]], *, beside: float, gap: float
) -> None:
    """Names stand beside the ends (value, method) of their lines at ``x``, moved apart where lines end close together."""
    ends = sorted(ends)
    for (value, method), place in zip(ends, _spread([value for value, _ in ends], gap), strict=True):
        color = looks[method]["color"]
        arrow = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)}
        style = {"color": color, "fontsize": 9, "va": "center", "annotation_clip": False}
        axes.annotate(method, (x, value), (x + beside, place), arrowprops=arrow, **style)


def draw_map_against_known(path: Path, rows: Sequence[Mapping[str, Any]], title: str, measure: str = "mAP (%)") -> None:
    """mAP against the share of known labels, a line for each method, bars of one deviation.

    Single-positive runs stand in a column of their own. Where the methods fall into two groups far apart, the axis is cut.
    """
    pyplot = import_pyplot()
    cells: dict[tuple[str, Any], list[float]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["known"]), []).append(row["mAP"])
    means = {key: statistics.fmean(values) for key, values in cells.items()}
    spread = {key: statistics.stdev(values) if len(values) > 1 else 0.0 for key, values in cells.items()}
    methods = list(dict.fromkeys(method for method, _ in cells))
    looks = _looks(methods)
    shares = sorted({known for _, known in cells if known != "single"})
    alone: list[Any] = ["single"] if any(known == "single" for _, known in cells) else []
    panels = [panel for panel in (shares, alone) if panel]
    widths = [3.8 if len(panel) > 1 else 1.0 for panel in panels]
    bands = _bands(list(means.values()))[::-1]
    sizes = [len({method for (method, _), mean in means.items() if low <= mean <= high}) for low, high in bands]
    heights = [max(1.5, 0.3 * size) for size in sizes]
    figure, grid = pyplot.subplots(
        len(bands),
        len(panels),
        figsize=(1.0 + sum(2.0 + wide for wide in widths), 1.2 + sum(heights)),
        height_ratios=heights,
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
    )
    for line, (low, high) in enumerate(bands):
        margin = 0.08 * (high - low) + max(spread[key] for key, mean in means.items() if low <= mean <= high)
        margin = max(margin, 1.0 - (high - low) / 2)  # at least two points high: a lone value needs no fine scale
        low, high = low - margin, high + margin
        last = line + 1 == len(bands)
        for column, panel in enumerate(panels):
            axes, single = grid[line, column], panel == ["single"]
            place = {known: 0.0 if single else 100 * known for known in panel}
            ends: list[tuple[float, str]] = []
            for method in methods:
                own = [known for known in panel if (method, known) in means]
                values, bars = ([figures[method, known] for known in own] for figures in (means, spread))
                axes.errorbar([place[known] for known in own], values, bars, marker="o", ms=4, capsize=3, lw=1.6, **looks[method])
                if values and low <= values[-1] <= high:
                    ends.append((values[-1], method))
            left, right = place[panel[0]], place[panel[-1]]
            span = right - left
            before, after, beside = (0.04 * span, 0.02 * span, 0.09 * span) if span else (1.0, 1.0, 1.4)
            _name_ends(axes, right, ends, looks, beside=beside, gap=(high - low) * 0.17 / heights[line])
            axes.set_ylim(low, high)
            axes.set_xlim(left - before, right + after)
            axes.set_xticks([*place.values()], [""] if single else [f"{x:g}" for x in place.values()])
            axes.tick_params(bottom=last, labelbottom=last, labelleft=column == 0)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines["bottom"].set_visible(last)
            if last:
                axes.set_xlabel("single positive" if single else "known labels (%)")
    figure.supylabel(measure + (", axis cut" if len(bands) > 1 else ""), fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1)
    pyplot.close(figure)


class SaliencyMaps(NamedTuple):
    """Where a trained head and the frozen model look in M images, on grids (h, w); arrays, so that it can be saved."""

    images: np.ndarray  # (M, H, W, 3) uint8
    class_names: np.ndarray  # (C,)
    present: np.ndarray  # (M, C) bool
    scores: np.ndarray  # (M, C)
    saliency: np.ndarray  # (M, C, h, w), sums to 1 over the grid
    zero_shot: np.ndarray  # (M, C, h, w), sums to 1 over the grid

    def save(self, path: Path) -> None:
        """Write one ``.npz`` file; :func:`trm_pipeline.report.page.make_report` draws every ``saliency*.npz`` of its folder."""
        np.savez_compressed(path, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> SaliencyMaps:
        """What :meth:`save` wrote."""
        with np.load(path) as arrays:
            return cls(**arrays)


def choose_images(targets: Tensor, count: int = 6, *, most_classes: int = 3) -> list[int]:
    """Rows of fully labelled targets (N, C) with two to ``most_classes`` classes that together show many classes."""
    chosen: list[int] = []
    seen = torch.zeros(targets.shape[1], dtype=torch.bool)
    present = targets == 1
    fits = (present.sum(dim=1) >= 2) & (present.sum(dim=1) <= most_classes)
    for _ in range(min(count, int(fits.sum()))):
        new = (present & ~seen).sum(dim=1).where(fits, -1)
        new[chosen] = -1
        chosen.append(int(new.argmax()))
        seen |= present[chosen[-1]]
    return chosen


@torch.no_grad()
def collect_saliency(
    head: TRMHead,
    batch: Batch,
    grid: tuple[int, int],
    images: Sequence[Image.Image],
    present: Tensor,
    text: Tensor,
    *,
    size: tuple[int, int],
) -> SaliencyMaps:
    """Region saliency of a trained head beside the softmax over tokens of the frozen model's cosines with its class texts.

    The softmax has the sharpness that attention starts from, so that the two differ by what was learned.

    Args:
        batch: features of M images, as the head was trained on. grid: (h, w) with h * w = N.
        images: M images of any size, shown at ``size`` (height, width). present: (M, C), 1 where a class is to be shown.
        text: (C, D) class texts of the frozen model.
    """
    head, tokens = head.to(text.device).eval(), batch.tokens
    saliency = head.pooler(tokens, head.text).saliency
    cosines = F.normalize(text, dim=-1) @ F.normalize(tokens, dim=-1).transpose(1, 2)  # (M, C, N)
    maps = (m.unflatten(2, grid).float().cpu().numpy() for m in (saliency, torch.softmax(8.0 * cosines, dim=2)))
    return SaliencyMaps(
        np.stack([np.asarray(image.convert("RGB").resize(size[::-1])) for image in images]),
        np.array(head.class_names),
        (present == 1).cpu().numpy(),
        torch.sigmoid(head(tokens, batch.penultimate)).cpu().numpy(),
        *maps,
    )


def draw_saliency(path: Path, maps: SaliencyMaps, *, most_classes: int = 3) -> None:
    """A row for each image: the image, then for each present class the region saliency and the frozen model's token map.

    The two maps of a class share one colour scale, from nothing to the larger of their maxima.
    """
    pyplot = import_pyplot()
    shown = [row.nonzero()[0][:most_classes] for row in maps.present]
    columns = 1 + 2 * max(map(len, shown))
    figure, grid = pyplot.subplots(
        len(shown), columns, figsize=(1.7 * columns, 1.95 * len(shown)), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_axis_off()
    height, width = maps.images.shape[1:3]
    for line, (image, classes) in enumerate(zip(maps.images, shown, strict=True)):
        grid[line, 0].imshow(image)
        grid[line, 0].set_title("image", fontsize=9)
        gray = image.mean(axis=2)
        for i, c in enumerate(classes):
            pair = (maps.saliency[line, c], maps.zero_shot[line, c])
            names = (f"{maps.class_names[c]}  {maps.scores[line, c]:.2f}", "zero-shot")
            for column, (values, name) in enumerate(zip(pair, names, strict=True), 1 + 2 * i):
                axes = grid[line, column]
                axes.imshow(gray, cmap="gray", vmin=-60, vmax=255)
                axes.imshow(
                    values,
                    cmap="inferno",
                    alpha=0.6,
                    vmin=0,
                    vmax=max(map(np.max, pair)),
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                    interpolation="bilinear",
                )
                axes.set_title(name, fontsize=9, fontweight="bold" if column % 2 else "normal")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_pseudo_quality(path: Path, traces: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Precision and recall of pseudo-labels against the hidden truth over the steps.

    ``traces`` maps the name of a run to its measurements: step, positive_precision, positive_recall, negative_precision,
    negative_recall (each None where nothing was decided). Runs that differ in the seed alone share a colour.
    """
    pyplot = import_pyplot()
    figure, grid = pyplot.subplots(2, 2, figsize=(9.5, 6.0), sharex=True, sharey=True, layout="constrained")
    groups = {name: re.sub(r"-seed\d+$", "", name) for name in traces}
    looks = _looks(list(dict.fromkeys(groups.values())))
    handles = {}
    for line, measure in enumerate(("precision", "recall")):
        grid[line, 0].set_ylabel(measure)
        for column, sign in enumerate(("positive", "negative")):
            axes = grid[line, column]
            for name, trace in traces.items():
                values = [point[f"{sign}_{measure}"] for point in trace]
                (handles[groups[name]],) = axes.plot(
                    [point["step"] for point in trace],
                    [float("nan") if value is None else value for value in values],
                    lw=1.5,
                    marker="o",
                    ms=2.5,
                    alpha=0.85,
                    **looks[groups[name]],
                )
            axes.set_ylim(-0.03, 1.03)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if line == 0:
                axes.set_title(f"pseudo-{sign}s", fontsize=11)
            else:
                axes.set_xlabel("step")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
