"""Images of a folder: which they are, and how each kind is read."""

import math
import os

import numpy as np
import pytest
from PIL import Image

from trm_pipeline.folder.image_files import FolderImages, find_images, read_image, to_bytes, why_unreadable


def test_images_of_a_folder(tmp_path):
    for name in ("b.JPG", "a.png", "sub/ü/c.webp", ".hidden.jpg", ".cache/d.jpg", "notes.txt", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == ["a.png", "b.JPG", "sub/ü/c.webp"]
    with pytest.raises(ValueError, match="no image in .*; 1 left out, no image: notes.txt"):
        find_images(_empty(tmp_path))
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        find_images(tmp_path / "a.png")


def _empty(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").touch()
    return folder / "empty"


def test_links_are_followed_and_content_tells_what_is_an_image(tmp_path, capsys):
    store, photos = tmp_path / "store", tmp_path / "photos"
    for folder in (store / "deep", photos):
        folder.mkdir(parents=True)
    for path in (store / "a.png", store / "deep" / "b.JFIF", photos / "scan", photos / "c.dat"):
        Image.new("RGB", (4, 4)).save(path, "JPEG")
    for name in ("one", "two"):
        (photos / name).symlink_to(store)
    (store / "deep" / "up").symlink_to(store)  # in a circle
    (photos / "above").symlink_to(tmp_path)
    (photos / "self").symlink_to(photos / "self")
    (photos / "gone.png").symlink_to(tmp_path / "nothing.png")
    (photos / "labels.csv").write_text("image,cat\n", encoding="utf-8")
    (photos / "Thumbs.db").touch()
    os.mkfifo(photos / "pipe.png")
    own = ["a.png", "deep/b.JFIF"]
    assert find_images(photos) == ["c.dat", *(f"one/{name}" for name in own), "scan", *(f"two/{name}" for name in own)]
    assert capsys.readouterr().out.splitlines() == [
        "4 left out, no image: gone.png, labels.csv, pipe.png, self",
        "3 left out, a link to a folder that it lies in: above, one/deep/up, two/deep/up",
    ]


def test_every_kind_of_image_is_read_upright_in_rgb(tmp_path):
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(32, axis=0)  # dark on the left
    rgb = Image.fromarray(ramp).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("L").save(tmp_path / "gray.png")
    rgb.convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "float.tif")
    exif[0x010F] = "Maker"
    rgb.save(tmp_path / "turned broken.jpg", exif=exif)
    broken = bytearray((tmp_path / "turned broken.jpg").read_bytes())
    maker = broken.index(b"\x01\x0f\x00\x02")
    broken[maker + 2 : maker + 8] = b"\x00\x0b\x00\x00\x00\x01"  # a text that says it is a number
    (tmp_path / "turned broken.jpg").write_bytes(broken)
    for path in sorted(tmp_path.iterdir()):
        image = read_image(path, (16, 16))
        assert image.mode == "RGB" and image.size == (64, 32), path
        left, right = (np.asarray(image)[:, columns].mean() for columns in (slice(8), slice(-8, None)))
        if path.stem.startswith("turned"):
            left, right = right, left
        assert left < 40 and right > 215, path


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 2048, 4095], [0, 128, 255]),  # 12 bits in 16
        ([0, 500, 1000], [0, 125, 249]),  # at most 10
        ([0, 32768, 65535], [0, 128, 255]),
        ([7, 7, 7], [255, 255, 255]),
        ([0, 0, 0], [0, 0, 0]),
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 0.6, math.nan], [0, 153, 0]),
        ([0.0, math.inf, -math.inf], [0, 0, 0]),
        ([0.0, 0.75, 1.00001], [0, 191, 255]),
        ([0.0, 0.01, 0.015], [0, 163, 245]),
        ([0.0, 128.0, 255.0], [0, 128, 255]),
        ([-1000, 0, 1000], [0, 128, 255]),
        ([-9999, 0.5, 1.0], [0, 128, 255]),
        ([-3.4028235e38, 0.5, 1.0], [0, 128, 255]),
        ([0, 1000, 1023, 65535], [0, 249, 255, 255]),
    ],
)
def test_numbers_beyond_a_byte_are_seen(values, shown):
    assert to_bytes(np.array(values)).tolist() == shown


def test_an_image_without_a_number_is_named(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "nan.tif")
    data = FolderImages([tmp_path / "nan.tif", tmp_path / "gone.png"], (4, 4), None)
    assert data[0][0].isnan().all() and why_unreadable(data.paths[0]) == "no pixel is a finite number"
    assert "No such file" in why_unreadable(data.paths[1])


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png", (16, 16))).min() == 255


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (3000, 2000)])
def test_tiny_and_huge_images(size, tmp_path):
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "x.jpg")
    image = read_image(tmp_path / "x.jpg", (224, 224))
    assert image.size == size if max(size) < 3000 or min(size) < 448 else 448 <= min(image.size) < 1000
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() < 6
