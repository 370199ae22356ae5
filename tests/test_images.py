"""The one decoder. Run: python -m pytest tests/test_images.py"""

import os
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from images import UnreadableImage, decode_image, jpeg_bytes, kind_of, read_image, write_jpeg


@pytest.fixture
def picture() -> np.ndarray:
    """uint8 (48, 64, 3), smooth, so that JPEG keeps it."""
    y, x = np.mgrid[:48, :64]
    return np.stack([x * 3, y * 4, 255 - x * 2], axis=2).astype(np.uint8)


def reason(path) -> str:
    with pytest.raises(UnreadableImage) as error:
        read_image(path)
    return str(error.value)


def test_what_is_written_is_read_again(tmp_path, picture):
    write_jpeg(tmp_path / "a.jpg", picture)
    assert os.listdir(tmp_path) == ["a.jpg"]
    read = read_image(tmp_path / "a.jpg")
    assert read.dtype == np.uint8 and read.shape == picture.shape
    assert np.abs(read.astype(int) - picture).mean() < 2


def test_row1_row2_row3_unusable_files_are_named(tmp_path, picture):
    data = jpeg_bytes(picture)
    cases = {
        "empty.jpg": b"",
        "half.jpg": data[: len(data) // 2],
        "tail.jpg": data[:-50],
        "page.jpg": b"<html><body>404</body></html>",
        "header.jpg": data[:200],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    assert reason(tmp_path / "empty.jpg") == "empty file"
    assert reason(tmp_path / "half.jpg") == "truncated"
    assert reason(tmp_path / "tail.jpg") == "truncated"
    assert reason(tmp_path / "page.jpg") == "not an image"
    assert reason(tmp_path / "header.jpg")


def test_an_image_in_memory_is_read_as_a_file_is(tmp_path, picture):
    data = jpeg_bytes(picture)
    (tmp_path / "a.jpg").write_bytes(data)
    assert np.array_equal(decode_image(data), read_image(tmp_path / "a.jpg"))
    for bad, said in (
        (b"", "empty file"),
        (data[:-50], "truncated"),
        (b"<html>404</html>", "not an image"),
        (data, "too many pixels"),
    ):
        with pytest.raises(UnreadableImage, match=said):
            decode_image(bad, max_pixels=3000 if bad is data else 3072)
    assert decode_image(data, max_pixels=3072).shape == picture.shape


def test_row3_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait forever
    assert reason(tmp_path / "folder.jpg") == "not a regular file"
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert "no such file" in reason(tmp_path / "dangling.jpg")
    assert "symbolic links" in reason(tmp_path / "loop.jpg")


def test_row4_content_counts_and_not_the_name(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.jpg", "PNG")
    Image.fromarray(picture).save(tmp_path / "b.png", "WEBP", lossless=True)
    notes = Counter()
    assert np.array_equal(read_image(tmp_path / "a.jpg", notes=notes), picture)
    assert np.array_equal(read_image(tmp_path / "b.png", notes=notes), picture)
    assert notes == {"PNG inside, named otherwise": 1, "WEBP inside, named otherwise": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_row6_exif_orientation(tmp_path, picture, orientation):
    turned = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: picture.transpose(1, 0, 2)[:, ::-1],
        7: picture.transpose(1, 0, 2)[::-1, ::-1],
        8: picture.transpose(1, 0, 2)[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), turned)


def test_row6_invalid_exif_turns_nothing(tmp_path, picture):
    Image.fromarray(picture).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95
    )
    assert read_image(tmp_path / "a.jpg").shape == picture.shape


def test_row7_modes_become_rgb(tmp_path, picture):
    image = Image.fromarray(picture)
    for mode in ("L", "1", "P", "CMYK", "YCbCr", "LAB"):
        kind = "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG"
        image.convert(mode).save(tmp_path / f"{mode}.png", kind)
        read = read_image(tmp_path / f"{mode}.png")
        assert read.shape == picture.shape and read.dtype == np.uint8
        expected = image.convert(mode).convert("RGB")
        assert np.abs(read.astype(int) - np.asarray(expected)).mean() < 2
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - picture).mean() < 8


def test_row7_transparency_is_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    clear.save(tmp_path / "rgba.png")
    Image.new("LA", (32, 32), (10, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("rgba.png", "la.png", "p.png"):
        assert (read_image(tmp_path / name) == 255).all()


def test_row8_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert abs(read.mean() - 127.5) < 1
        assert np.array_equal(read[..., 0], values >> 8)


def test_row9_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        notes = Counter()
        assert read_image(tmp_path / name, notes=notes)[0, 0].tolist() == [255, 0, 0]
        assert notes["animated, first frame taken"] == 1


@pytest.mark.parametrize(
    ("size", "said"),
    [((1, 1), "too small"), ((15, 200), "too small"), ((20, 2000), "extreme aspect")],
)
def test_row10_odd_sizes_are_refused(tmp_path, size, said):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert said in reason(tmp_path / "a.png")


def test_reasons_of_one_kind_are_told_without_their_sizes(tmp_path):
    kinds = set()
    for size in ((1, 1), (15, 200), (9, 300)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        kinds.add(kind_of(reason(tmp_path / "a.png")))
    assert kinds == {"too small"}
    assert kind_of("too many pixels (10000x9000, --max-pixels 5)") == "too many pixels"
    assert kind_of("damaged: bad chunk (IDAT)") == "damaged"
    assert kind_of("no face") == "no face" and kind_of("") == ""


def test_a_damaged_tiff_says_nothing_on_stderr(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for compression in ("tiff_adobe_deflate", "jpeg"):
        path = tmp_path / f"{compression}.tif"
        Image.fromarray(noise).save(path, compression=compression)
        data = bytearray(path.read_bytes())
        if compression == "jpeg":
            data[-60:] = b""
        else:
            data[200:500] = bytes(300)
        path.write_bytes(data)
        assert "decoder error" in reason(path)
    assert capfd.readouterr().err == ""


def bomb(path, side: int) -> None:
    """A valid 1-bit PNG of side x side zeros, written without holding them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_row5_bombs_are_refused_before_decoding(tmp_path):
    code = """
import resource, sys
from images import UnreadableImage, read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_image(path)
    except UnreadableImage as error:
        assert "too many pixels" in str(error), error
    else:
        raise SystemExit(f"{path} was read")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
raise SystemExit(0 if grown < 200 else f"memory grew by {grown} MB")
"""
    paths = []
    for side in (10_000, 14_000, 40_000):  # 100, 196 and 1,600 million pixels
        paths.append(tmp_path / f"{side}.png")
        bomb(paths[-1], side)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_row11_file_names_of_every_kind(tmp_path, picture):
    for name in ("é ü 顔.jpg", "a b.jpg", "new\nline.jpg", "x" * 251 + ".jpg"):
        write_jpeg(tmp_path / name, picture)
        assert read_image(tmp_path / name).shape == picture.shape


def test_a_failed_write_leaves_nothing(tmp_path, picture):
    with pytest.raises(OSError):
        write_jpeg(tmp_path / ("x" * 300 + ".jpg"), picture)
    assert os.listdir(tmp_path) == []
