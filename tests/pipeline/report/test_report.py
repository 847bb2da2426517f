"""Tables, pictures and the page of the examples, on made-up rows and tiny data."""

import base64
import gc
import html
import importlib.metadata
import json
import math
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import ROOT
from tools import make_saliency_picture
from trm_losses import RegionPooler, TextRegionMatchingLoss, TRMHead
from trm_pipeline import files as checkpoint
from trm_pipeline import methods, progress
from trm_pipeline.config import presets
from trm_pipeline.data.voc import VOC_CLASSES, class_prompt_names
from trm_pipeline.features.cached import Batch, pool_tokens
from trm_pipeline.methods import grid
from trm_pipeline.report import page as report
from trm_pipeline.report import pictures, tables
from trm_pipeline.report import rows as results
from trm_pipeline.report import statistics as statistics_of_seeds
from trm_pipeline.report.markdown import markdown
from trm_pipeline.run import prepare
from trm_pipeline.training import cost


def row(method, known, seed, value, **more):
    figures = dict.fromkeys(("mAP", "mAP_interpolated", "OF1", "CF1", "CF1_per_class", "best_epoch_mAP"), value)
    return {"method": method, "known": known, "seed": seed, **figures, "expected_positives": None, **more}


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_single_positive_stands_last_under_what_it_assumes():
    rows = [row("a", "single", 1, 30.0, expected_positives=2.5), row("a", 0.5, 1, 20.0), row("a", 0.1, 1, 10.0)]
    assert tables.mean_table(rows)[0] == ["method", "10%", "50%", "single (k=2.5)"]
    assert tables.mean_table(rows)[1] == ["a", "10.0", "20.0", "30.0"]


def test_nine_shares_are_averaged_a_seed_at_a_time():
    values = {(k, seed): 10 * k + seed**2 * (1 + k % 3) for k in range(1, 10) for seed in (1, 2, 3)}
    rows = [row("a", k / 10, seed, value) for (k, seed), value in values.items()]
    rows += [row("b", k / 10, 1, 7.0) for k in range(1, 9)] + [row("a", "single", 1, 1.0)]
    table = tables.mean_table(rows)
    assert table[0][9:] == ["90%", "mean 10–90%", "single"]
    means = [sum(values[k, seed] for k in range(1, 10)) / 9 for seed in (1, 2, 3)]
    assert table[1][10] == f"{statistics.fmean(means):.1f} ± {statistics.stdev(means):.1f}"
    assert table[2][10] == ""  # b lacks a share
    assert "mean" not in str(tables.mean_table([r for r in rows if r["known"] != 0.4]))


def test_ablation_is_paired_by_seed():
    rows = [row("trm", 0.1, seed, value) for seed, value in ((1, 50.0), (2, 60.0), (3, 70.0))]
    rows += [row("trm-no-prior", 0.1, seed, value) for seed, value in ((1, 49.0), (2, 58.0), (4, 0.0))]
    rows += [row("trm-rule-prototype", 0.1, 3, 70.02), row("trm", 0.9, 1, 80.0), row("linear", 0.1, 1, 5.0)]
    table = tables.ablation_table(rows)
    # A share without any variant has no column; seed 4 has nothing to be compared with.
    assert table[0] == ["variant", "10%"]
    assert table[1:] == [["trm", "60.0 ± 10.0"], ["trm-no-prior", "−1.5 ± 0.7"], ["trm-rule-prototype", "+0.0"]]
    assert {r["method"] for r in results.main_rows(rows)} == {"trm", "linear"}
    assert results.ablation_rows([r for r in rows if r["method"] != "trm"]) == []


def png_size(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("known", [[0.1], ["single"], [0.1, 0.9], [0.1, 0.5, "single"]])
@pytest.mark.parametrize("count", [1, 12])
def test_the_curve_is_drawn_for_any_settings(known, count, tmp_path, recwarn):
    rows = [
        row(f"method-{i}", share, seed, (40.0 if i % 3 else 80.0) + i + seed * 0.3)
        for i in range(count)
        for share in known
        for seed in (1, 2)
    ]
    pictures.draw_map_against_known(tmp_path / "a.png", rows, "title")
    width, height = png_size(tmp_path / "a.png")
    assert width > 300 and height > 300
    assert not [warning for warning in recwarn if "layout" in str(warning.message)]


def test_an_axis_is_cut_only_where_methods_stand_far_apart():
    assert pictures._bands([80.0, 82.0, 85.0]) == [(80.0, 85.0)]
    assert pictures._bands([46.0, 80.0, 60.0, 85.0]) == [(46.0, 60.0), (80.0, 85.0)]
    assert pictures._bands([5.0]) == [(5.0, 5.0)]


def test_names_are_moved_apart_and_no_further_than_they_must():
    generator = np.random.default_rng(0)
    for _ in range(20):
        places = sorted(generator.uniform(0, 10, size=8).tolist())
        moved = np.array(pictures._spread(places, 0.7))
        assert (np.diff(moved) >= 0.7 - 1e-9).all()
        cost = ((moved - places) ** 2).sum()
        for _ in range(200):  # no other admissible arrangement nearby is better
            other = moved + generator.normal(0, 0.05, size=8)
            if (np.diff(other) >= 0.7).all():
                assert ((other - places) ** 2).sum() >= cost - 1e-9
    assert pictures._spread([1.0, 5.0], 0.7) == [1.0, 5.0]


def trace(start=0):
    keys = ("positive_precision", "positive_recall", "negative_precision", "negative_recall")
    return [{"step": 4 * i, **dict.fromkeys(keys, None if i < 3 else 0.1 * i), "decided": max(0, i - start)} for i in range(8)]


def test_pseudo_labels_are_drawn_with_gaps(tmp_path):
    pictures.draw_pseudo_quality(tmp_path / "p.png", {"trm-known0.1-seed1": trace(), "trm-known0.1-seed2": trace(3)})
    assert png_size(tmp_path / "p.png")[0] > 600


def test_traces_are_drawn_by_method_and_variants_beside_the_whole(tmp_path):
    names = ["trm-known0.1-seed1", "trm-known0.1-seed2", "trm-single-seed1", "trm-paper-known0.1-seed1"]
    variants = ["trm-no-prior-known0.1-seed1", "trm-rule-prototype-known0.1-seed1", "trm-rule-prototype-single-seed1"]
    for name in (*names, *variants):
        (tmp_path / f"{name}.json").write_text(json.dumps(trace()), encoding="utf-8")
    (tmp_path / "trm-known0.5-seed1.json").write_text("[]", encoding="utf-8")  # nothing was measured
    assert {key: set(group) for key, group in report._trace_groups(tmp_path).items()} == {
        "trm": set(names[:3]),
        "trm-paper": {names[3]},
        "variants-known0.1": {*names[:2], *variants[:2]},
        "variants-single": {names[2], variants[2]},
    }
    for file in tmp_path.iterdir():
        file.rename(file.with_name(file.name.replace("-seed", "-wrong0.2-seed")))
    groups = report._trace_groups(tmp_path)
    assert set(groups) == {"trm", "trm-paper", "variants-known0.1-wrong0.2", "variants-single-wrong0.2"}
    assert len(groups["variants-known0.1-wrong0.2"]) == 4


def test_chosen_images_show_many_classes():
    targets = torch.zeros(6, 6)
    for image, present in enumerate([[0], [0, 1], [0, 1], [2, 3, 4, 5], [2, 3], [1, 4]]):
        targets[image, present] = 1
    assert pictures.choose_images(targets, 3) == [1, 4, 5]
    assert len(set(pictures.choose_images(targets, 9))) == 4  # one class, or more than three, is not shown
    assert pictures.choose_images(targets, 1, most_classes=4) == [3]
    assert pictures.choose_images(torch.zeros(2, 3)) == []


@pytest.fixture(scope="module")
def maps():
    torch.manual_seed(0)
    backbone = prepare.load_backbone(presets.EMBEDDED, torch.device("cpu"))
    text = backbone.template_text(class_prompt_names(), presets.EMBEDDED.templates)
    head = TRMHead(RegionPooler(20, backbone.dim), TextRegionMatchingLoss(20), text, list(VOC_CLASSES))
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)) for i in range(3)]
    present = torch.zeros(3, 20)
    present[0, 4] = present[1, [0, 1, 2, 3]] = present[2, [5, 19]] = 1
    seen = torch.stack([prepare.eval_transform(224, mean=backbone.image_mean, std=backbone.image_std)(i) for i in images])
    tokens, pooled, grid, _ = pool_tokens(backbone(seen), 2)
    batch = Batch(tokens, pooled, torch.arange(3))
    return pictures.collect_saliency(head, batch, grid, images, present, text, size=(224, 224)), backbone, text, images


def test_maps_of_a_fresh_head_are_those_of_zero_shot(maps):
    """Attention starts as the softmax over tokens of cosines with the class text, in every head of its width."""
    collected, backbone, text, images = maps
    assert collected.images.shape == (3, 224, 224, 3) and collected.images.dtype == np.uint8
    assert collected.saliency.shape == collected.zero_shot.shape == (3, 20, 7, 7)
    for part in (collected.saliency, collected.zero_shot):
        np.testing.assert_allclose(part.sum(axis=(2, 3)), 1, rtol=1e-4)
    # The map of one image and class by loops: tokens in row-major order, averaged over 2 x 2.
    image = prepare.eval_transform(224, mean=backbone.image_mean, std=backbone.image_std)(images[1])
    tokens = backbone(image[None]).tokens[0].double().unflatten(0, (14, 14))
    direction = (text[3] / text[3].norm()).double()
    weights = np.zeros((7, 7))
    for y in range(7):
        for x in range(7):
            token = sum(tokens[2 * y + i, 2 * x + j] for i in (0, 1) for j in (0, 1)) / 4
            weights[y, x] = np.exp(8.0 * float(token @ direction / token.norm()))
    np.testing.assert_allclose(collected.zero_shot[1, 3], weights / weights.sum(), rtol=1e-3)
    correlation = np.corrcoef(collected.saliency[1, 3].ravel(), collected.zero_shot[1, 3].ravel())[0, 1]
    assert correlation > 0.7
    assert (collected.present.sum(axis=1) == [1, 4, 2]).all() and ((collected.scores > 0) & (collected.scores < 1)).all()


def test_saliency_survives_a_file_and_is_drawn(maps, tmp_path):
    maps[0].save(tmp_path / "m.npz")
    again = pictures.SaliencyMaps.load(tmp_path / "m.npz")
    assert all((a == b).all() for a, b in zip(again, maps[0], strict=True))
    pictures.draw_saliency(tmp_path / "a.png", again)
    wide = png_size(tmp_path / "a.png")
    pictures.draw_saliency(tmp_path / "b.png", again, most_classes=1)
    assert png_size(tmp_path / "b.png")[0] < wide[0]


def test_the_picture_of_the_readme_is_drawn_from_the_folder_of_a_run(maps, tmp_path):
    picture = tmp_path / "picture.jpg"
    with pytest.raises(SystemExit, match=r"no saliency-\*\.npz in .*run reproduce_voc\.py"):
        make_saliency_picture.main([str(tmp_path)])
    maps[0].save(tmp_path / "saliency-trm.npz")
    sizes = []
    for count in ("2", "3"):
        make_saliency_picture.main([str(tmp_path), "--images", count, "--output", str(picture)])
        sizes.append(Image.open(picture).size)
    (wide, two), (same, three) = sizes
    assert same == wide and three > 1.4 * two and picture.stat().st_size < 150_000


class _Page(HTMLParser):
    """Collects the tags, the sources of pictures and the text of table cells; every tag must be closed in order."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.cells = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells.append(data)


def output_folder(path):
    rows = [row(m, k, s, v + s) for m, v in (("text-pixel", 81.0), ("trm", 83.0)) for k in (0.1, "single") for s in (1, 2)]
    rows += [row("trm-no-prior", 0.1, s, 82.5 + s) for s in (1, 2)]
    checkpoint.write_json(path / "results.json", rows)
    (path / "run.json").write_text(json.dumps({"seeds": [1, 2], "preset": {"name": "embedded"}}), encoding="utf-8")
    (path / "pseudo").mkdir()
    (path / "pseudo" / "trm-known0.1-seed1.json").write_text(json.dumps(trace()), encoding="utf-8")
    (path / "pseudo" / "trm-known0.9-seed1.json").write_text("[]", encoding="utf-8")
    return path


def test_the_page_holds_everything_and_needs_nothing(tmp_path, maps):
    folder = output_folder(tmp_path)
    maps[0].save(folder / "saliency-trm.npz")
    given = {"command": "reproduce_voc.py --set 'a<b'", "data": "drawn scenes", "notes": ["Not photographs."]}
    text = report.make_report(folder, **given).read_text(encoding="utf-8")
    page = _Page(text)
    names = ("map_against_known", "saliency-trm", "pseudo_labels-trm")
    assert len(page.sources) == 3
    for source, name in zip(page.sources, names, strict=True):
        kind, data = source.split(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data) == (folder / f"{name}.png").read_bytes()
    assert not re.search(r"https?://|url\(|<script|<link", text)
    assert given["command"] in html.unescape(text) and given["command"] not in text and "drawn scenes" in text
    assert "<p>Not photographs.</p>" in text
    assert f"torch {importlib.metadata.version('torch')}" in text
    assert page.tags.count("table") == 4  # mAP, OF1, ablation, differences
    assert {"84.5 ± 0.7", "82.5 ± 0.7", "−0.5 ± 0.0"} <= set(page.cells)
    assert "<b>84.5 ± 0.7</b>" in text and "<b>82.5" not in text
    assert '"name": "embedded"' in html.unescape(text)


def test_the_page_is_the_same_when_made_again(tmp_path):
    folder = output_folder(tmp_path)
    first = report.make_report(folder, command="reproduce_voc.py", data="drawn scenes", notes=["A note."]).read_bytes()
    assert report.make_report(folder).read_bytes() == first
    assert report.make_report(folder, command="another").read_bytes() != first
    assert not list(folder.glob("*.tmp"))


def test_a_page_of_results_alone(tmp_path):
    checkpoint.write_json(tmp_path / "results.json", [row("zero-shot-global", 0.1, 1, 46.0, OF1=None)])
    page = _Page(report.make_report(tmp_path).read_text(encoding="utf-8"))
    assert page.tags.count("table") == 1 and len(page.sources) == 1
    checkpoint.write_json(tmp_path / "results.json", [row("linear", 0.1, seed, math.nan) for seed in (1, 2)])
    assert not _Page(report.make_report(tmp_path).read_text(encoding="utf-8")).sources, "there is nothing to draw"


def test_the_script_makes_the_page(tmp_path):
    folder = output_folder(tmp_path)
    script = [sys.executable, str(ROOT / "examples" / "make_report.py")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([*script, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.html") and (folder / "report.html").is_file()
    failed = subprocess.run([*script, str(tmp_path / "none")], capture_output=True, text=True, env=environment)
    assert failed.returncode == 1 and "--output" in failed.stderr and "Traceback" not in failed.stderr


def test_every_method_has_a_look_of_its_own():
    of_a_head = ["linear", *(name for name in grid.GRID if name.startswith("linear+"))]
    for names in ([*methods.LABEL_FREE, *methods.METHODS], of_a_head):
        looks = pictures._looks(names)
        assert len({tuple(look.values()) for look in looks.values()}) == len(names)


# What a few seeds tell


def test_sign_flips_are_counted():
    assert statistics_of_seeds.sign_flip_p([1.0, 2.0, 0.5]) == 0.25  # three seeds say no more
    assert statistics_of_seeds.sign_flip_p([0.1] * 5) == 2 / 32  # equal sums, whatever their last digits
    assert statistics_of_seeds.sign_flip_p([0.0, 0.0]) == 1.0
    values = [1.3, -0.4, 0.9, 2.2, -0.1]
    reached = 0
    for pattern in range(32):
        total = sum(-value if pattern >> i & 1 else value for i, value in enumerate(values))
        reached += abs(total) >= abs(sum(values)) - 1e-9
    assert statistics_of_seeds.sign_flip_p(values) == reached / 32


def test_a_paired_difference_has_the_interval_of_t():
    found = statistics_of_seeds.paired([1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert found[:4] == (3, 2.0, pytest.approx(2 - half, abs=1e-4), pytest.approx(2 + half, abs=1e-4))
    assert found.t_p == pytest.approx(0.0741799, abs=1e-6) and found.flip_p == 0.25
    same = statistics_of_seeds.paired([0.5, 0.5])
    assert (same.low, same.high, same.t_p) == (0.5, 0.5, 0.0) and statistics_of_seeds.paired([0.0, 0.0]).t_p == 1.0
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        statistics_of_seeds.paired([1.0])


def grid_rows():
    values = {"trm": 80.0, "linear": 50.0, "linear+role": 52.0, "text-pixel+role": 70.0, "text-pixel": 71.0}
    rows = [row(m, k, s, v + s * (1 + len(m) % 2)) for m, v in values.items() for k in (0.1, "single") for s in (1, 2)]
    rows += [row("linear+em", 0.1, 1, 40.0), row("zero-shot-global", 0.1, 1, 46.0), row("zero-shot-global", 0.1, 2, 46.0)]
    return rows


def test_differences_are_paired_by_seed_with_what_they_belong_to():
    whole = [row(name, 0.1, s, 81.0 + s) for name in ("linear+global", "text-pixel+role+global") for s in (1, 2)]
    whole += [row("text-pixel+global", 0.1, s, 80.0) for s in (1, 2)]
    table = tables.difference_table([*grid_rows(), *whole])
    assert {tuple(line[:2]) for line in table[1:]} == {
        ("linear", "trm"),
        ("linear+role", "linear"),
        ("text-pixel", "trm"),
        ("text-pixel+role", "text-pixel"),
        ("linear+global", "trm"),
        ("text-pixel+global", "trm"),
        ("text-pixel+role+global", "text-pixel+global"),
    }
    # -31 and -32: -31.5 ± 12.7062 * 0.5, and t = 63 has the tails (2 / pi) atan(1 / 63).
    line = ["linear", "trm", "10%", "2", "−31.5", "[−37.9, −25.1]", "0.010", "0.500"]
    assert line in table and not [line for line in table if line[0] == "linear+em"]  # of which there is one seed


def test_the_grid_stands_as_losses_by_heads():
    (heading, lines), (single, _) = tables.grid_tables(grid_rows())
    assert (heading, single) == ("10%", "single")
    assert lines[0] == ["loss", "linear", "text-pixel"]
    assert [line[0] for line in lines[1:]] == ["its own", "role", "em"] and lines[3] == ["em", "40.0", ""]
    assert {r["method"] for r in results.main_rows(grid_rows())} == {"trm", "linear", "text-pixel", "zero-shot-global"}


def test_what_comes_closest_to_trm_stands_by_itself():
    """Of all but what is a part of it."""
    parts = [row(method, 0.1, 1, 81.9) for method in ("trm-query", "trm-rule-prototype")]
    rows = [*grid_rows(), *parts, row("trm-query+em", 0.1, 1, 82.5)]
    lines = tables.closest_table(rows, count=4)
    assert lines[0] == ["known", "method", "mAP", "less trm", "95% interval"]
    assert lines[1:5] == [
        ["10%", "trm-query+em", "82.5", "+0.5", ""],
        ["10%", "text-pixel+role", "73.0 ± 1.4", "−10.0", "[−10.0, −10.0]"],
        ["10%", "text-pixel", "72.5 ± 0.7", "−10.5", "[−16.9, −4.1]"],
        ["10%", "linear+role", "55.0 ± 1.4", "−28.0", "[−28.0, −28.0]"],
    ]
    assert [line[:2] for line in lines[5:7]] == [["single", "text-pixel+role"], ["single", "text-pixel"]] and len(lines) == 9


def test_the_page_shows_grid_differences_and_costs_and_markdown_says_the_same(tmp_path):
    checkpoint.write_json(tmp_path / "results.json", grid_rows())
    times = [
        {
            **{key: r[key] for key in ("method", "known", "seed")},
            "seconds": 3.0 + r["seed"],
            "peak_mib": 900.0 + r["seed"],
            "parameters": 12345,
        }
        for r in grid_rows()
    ]
    checkpoint.write_json(tmp_path / "times.json", times)
    text = report.make_report(tmp_path, command="x").read_text(encoding="utf-8")
    page = _Page(text)
    for heading in ("Results", "Losses under heads", "Differences", "Pictures", "Cost"):
        assert f"<h2>{heading}</h2>" in text
    assert "cannot go below 0.5 with so few seeds" in text
    assert {"12,345", "902", "4.5 ± 0.6"} <= set(page.cells)
    assert (tmp_path / "map_against_known-linear.png").is_file() and len(page.sources) == 3
    plain = (tmp_path / "report.md").read_text(encoding="utf-8")
    for table in (tables.closest_table(grid_rows()), tables.difference_table(grid_rows()), tables.cost_table(times)):
        assert markdown(table) in plain
    assert "](map_against_known-linear.png)" in plain and str(tmp_path) not in plain
    # Other times change the table of costs and nothing else.
    checkpoint.write_json(tmp_path / "times.json", [{**line, "seconds": 9.0} for line in times])
    again = report.make_report(tmp_path).read_text(encoding="utf-8")
    assert again != text and again.partition("<h2>Cost</h2>")[0] == text.partition("<h2>Cost</h2>")[0]


def test_a_sweep_tells_how_far_it_is(monkeypatch, capsys):
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    sweep = progress.Sweep(1000, 4)
    sweep.add("linear, 10%, seed 1", 47.83, 9.6)
    sweep.add("linear+role, 10%, seed 1", 51.0, 20.0)
    lines = cells(capsys.readouterr().out)
    assert lines[0] == ["cells", "method, share, seed", "mAP", "seconds", "gone", "left"]
    assert lines[1] == ["5/1000", "linear, 10%, seed 1", "47.8", "10", "00:10", "2:45:50"]
    assert lines[2] == ["6/1000", "linear+role, 10%, seed 1", "51.0", "20", "00:30", "4:08:30"]


def test_the_peak_of_memory_is_of_what_was_watched(monkeypatch, tmp_path):
    gc.collect()  # what is freed later would make room for the block
    read = cost.watch_memory(torch.device("cpu"))
    before = read()
    if before is None:
        pytest.skip("this system does not tell the peak")
    block = torch.ones(2**26)  # 256 MiB
    assert read() >= before + 192
    del block
    assert cost.watch_memory(torch.device("cpu"))() < before + 48
    monkeypatch.setattr(cost, "_PROC", tmp_path / "none")
    assert cost.watch_memory(torch.device("cpu"))() is None


def test_trained_parameters_are_those_that_move():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert cost.trained_parameters(layer) == 6
