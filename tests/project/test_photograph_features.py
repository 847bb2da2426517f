"""The tool that makes features of photographs, on drawn ones: an ImageNet classifier with random weights, and random texts."""

import numpy as np
import pytest
import torch

from tests.helpers import layouts
from tests.helpers.runs import SIZES
from trm_pipeline.data import given
from trm_pipeline.data.coco import COCO_CLASSES
from trm_pipeline.data.voc import VOC
from trm_pipeline.drawn.devkit import write_drawn_voc

timm = pytest.importorskip("timm")

from tools import make_photograph_features as tool  # noqa: E402  (needs timm)

MODEL = "test_efficientnet"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = write_drawn_voc(tmp_path_factory.mktemp("photographs"), sizes=SIZES, workers=1)
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL).state_dict(), root / "weights.pth")
    np.save(root / "texts.npy", np.random.default_rng(0).normal(size=(1020, 16)).astype("f"))
    ids = [path.rpartition("/")[2].partition(".")[0] for path in VOC(root, 2007, "train").image_paths]
    (root / "train.txt").write_text("\n".join(ids[:7]), encoding="utf-8")
    (root / "val.txt").write_text("\n".join(ids[7:11][::-1]), encoding="utf-8")
    return root


def command(root, output, *more):
    own = ["--year", "2007", "--source", "train", "--model", MODEL, "--weights", str(root / "weights.pth"), "--image-size", "96"]
    lists = ["--train", str(root / "train.txt"), "--val", str(root / "val.txt"), "--names-text", str(root / "texts.npy")]
    tool.main([str(root), str(output), *own, *lists, *more])


def test_tokens_are_means_of_the_texts_of_names(drawn, tmp_path):
    command(drawn, tmp_path / "features")
    meta = given.read_meta(tmp_path / "features")
    targets = given.labels_of(tmp_path / "features", "val", meta)
    images = VOC(drawn, 2007, "train")
    ids = (drawn / "val.txt").read_text(encoding="utf-8").splitlines()
    rows = [next(i for i, path in enumerate(images.image_paths) if name in path) for name in ids]
    assert torch.equal(targets, images.targets[rows]) and meta.grid is not None
    texts = torch.from_numpy(np.load(drawn / "texts.npy"))
    texts = texts / texts.norm(dim=1, keepdim=True)
    texts = texts - texts[:1000].mean(dim=0)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "features" / "text.npy")), texts[1000:])
    # One image by hand: the classifier at each place of the map, and what is averaged over its answers.
    network = timm.create_model(MODEL, checkpoint_path=str(drawn / "weights.pth")).eval()
    statistics = timm.data.resolve_data_config(model=network)
    transform = tool.eval_transform(96, mean=statistics["mean"], std=statistics["std"])
    with torch.no_grad():
        feature = network.forward_features(VOC(drawn, 2007, "train").with_transform(transform)[rows[0]][0][None])
        place = torch.softmax(network.get_classifier()(feature[0, :, 0, 1]), dim=0) @ texts[:1000]
    folder = tmp_path / "features" / "val"
    found = np.load(folder / "tokens0.npy")[0, 1]
    np.testing.assert_allclose(found, place.numpy(), atol=2e-3)
    np.testing.assert_allclose(np.load(folder / "penultimate0.npy")[0], feature.mean(dim=(2, 3))[0].numpy(), atol=2e-3, rtol=2e-3)


def test_images_of_coco_have_the_labels_of_the_same_classes(drawn, tmp_path):
    labels = torch.zeros(6, 80)
    columns = {"airplane": 0, "dining table": 10, "tv": 19, "couch": 17, "motorcycle": 13, "potted plant": 15, "person": 14}
    for row, name in enumerate(["airplane", "dining table", "tv", "couch", "motorcycle", "zebra"]):
        labels[row, [COCO_CLASSES.index(name), COCO_CLASSES.index("person")]] = 1
    layouts.write_coco(tmp_path / "coco", {"train": labels.numpy(), "val": labels.numpy()})
    listed = [f"coco coco{name[-16:-4]}" for name in layouts.coco_names("train", 6)]
    first = (drawn / "train.txt").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "ids.txt").write_text("\n".join([*listed, f"voc2007 {first}"]), encoding="utf-8")
    more = ["--val", str(tmp_path / "ids.txt")]
    with pytest.raises(SystemExit, match=r"--val: coco\d{12} is not in train of VOC2007 \(6 of 7 are not\); give --coco"):
        command(drawn, tmp_path / "features", *more)
    command(drawn, tmp_path / "features", *more, "--coco", str(tmp_path / "coco"))
    targets = given.labels_of(tmp_path / "features", "val", given.read_meta(tmp_path / "features"))
    wanted = torch.zeros(6, 20)
    wanted[:, columns["person"]] = 1
    wanted[range(5), [columns[name] for name in ("airplane", "dining table", "tv", "couch", "motorcycle")]] = 1
    torch.testing.assert_close(targets, torch.cat([wanted, VOC(drawn, 2007, "train").targets[:1]]))


def test_what_does_not_fit_is_one_line(drawn, tmp_path):
    (tmp_path / "other.txt").write_text("2008_999999\n", encoding="utf-8")
    np.save(tmp_path / "short.npy", np.ones((20, 16), "f"))
    for more, said in (
        (["--val", str(tmp_path / "other.txt")], "--val: 2008_999999 is not in train of VOC2007"),
        (["--names-text", str(tmp_path / "short.npy")], r"--names-text must have shape \(1020, D\).*got \(20, 16\)"),
    ):
        with pytest.raises(SystemExit, match=said):
            command(drawn, tmp_path / "features", *more)
