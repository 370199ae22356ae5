"""The page about a set. Run: python -m pytest tests/test_set_report.py"""

import base64
import io
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import align_faces
import set_report
from images import write_jpeg
from manifest import ALIGNED, EXCLUDED, REJECTED, Row

VOID = {"meta", "img", "br", "circle"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects text and images."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.words, self.images, self.addresses = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.addresses += [named[key] for key in ("src", "href") if key in named]
        if tag == "img":
            self.images.append(named)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def page(tmp_path):
    """-> a function that makes the page of rows."""

    def make(rows, names=None, root=tmp_path / "raw", **more) -> Page:
        path = set_report.write_report(tmp_path, root, rows, names, **more)
        return Page(path.read_text(encoding="utf-8"))

    return make


def make_rows(tmp_path) -> list[Row]:
    rows = []
    for person, photos in (("ann_lee", 1), ("bob", 2), ("eve", 5)):
        for number in range(photos):
            source = f"{person}/{number}.jpg"
            image = np.full((112, 112, 3), 40 * number, np.uint8)
            for path in (tmp_path / "raw" / source, tmp_path / "images" / source):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_jpeg(path, image)
            box = np.array([10, 10, 60 + number, 90.0])
            landmarks = align_faces.TEMPLATE * 0.5 + number
            rows.append(Row(source, person, f"images/{source}", ALIGNED, "", 112, 112, 1,
                            0.8 + 0.03 * number, box, landmarks))  # fmt: skip
    return rows


def test_the_page_says_what_the_set_is_like(tmp_path, page):
    rows = make_rows(tmp_path)
    write_jpeg(tmp_path / "raw/eve/wall.jpg", np.full((60, 90, 3), 200, np.uint8))
    rows.append(Row("eve/wall.jpg", "eve", "", REJECTED, "no face", 90, 60))
    rows.append(Row("eve/<b>&\udcff.jpg", "eve", "", REJECTED, "truncated"))
    rows.append(Row("zed/1.jpg", "zed", "", EXCLUDED, "named like Zed in people.txt"))
    (tmp_path / "people.txt").write_text("Ann Lee\nSomebody Else\n")
    made = page(rows, tmp_path / "people.txt")
    for words in (
        *("11 photos", "8 aligned", "3 identities", "2 rejected", "1 excluded"),
        *("1 1 2 to 3 1 4 to 7 1", "Median 2, mean 2.7, most: eve (5), bob (2), ann_lee (1)"),
        *("no face: 1 of 11 photos", "truncated: 1 of 11 photos", "eve/<b>&\ufffd.jpg"),
        *("0.800 to 0.900 7", "0.900 to 0.950 1", "45 to 64 8"),
        *("1 identities, 1 photos.", "zed named like Zed in people.txt"),
        *("1 of 4 identities, 1 with the same name", "ann_lee Ann Lee 1.00"),
    ):
        assert words in made.text, words
    assert made.text.count("same bytes") == 2  # the grey photos 0 and 1 of the three and of two
    crops = [named for named in made.images if named["alt"].startswith("aligned face of")]
    assert len(crops) == 8 + 8  # all of them, and those of the lowest scores


def test_the_page_needs_nothing_else_and_shows_pictures(tmp_path, page):
    made = page(make_rows(tmp_path))
    assert made.addresses and all(address.startswith("data:image/jpeg;base64,")
                                  for address in made.addresses)  # fmt: skip
    text = (tmp_path / "report.html").read_text()
    assert "http" not in text and "url(" not in text and "prefers-color-scheme" in text
    for named in made.images:
        assert named["alt"]
        image = Image.open(io.BytesIO(base64.b64decode(named["src"].split(",")[1])))
        assert image.size == (int(named["width"]), int(named["height"]))
    # The rings lie on the template, and the dots where the landmarks come to lie: upon it, here.
    rings = re.findall(r'class="ring" cx="([\d.]+)" cy="([\d.]+)"', text)[:5]
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)[:5]
    assert np.abs(np.array(rings, float) - align_faces.TEMPLATE).max() < 0.06
    assert np.abs(np.array(dots, float) - align_faces.TEMPLATE).max() < 0.06


def test_the_same_set_gives_the_same_page(tmp_path, page):
    rows = make_rows(tmp_path)
    page(rows)
    first = (tmp_path / "report.html").read_bytes()
    page(rows)
    assert (tmp_path / "report.html").read_bytes() == first


def test_photos_and_crops_that_are_gone(tmp_path, page):
    rows = make_rows(tmp_path)
    os.remove(tmp_path / "images/bob/1.jpg")
    rows.append(Row("eve/9.jpg", "eve", "", REJECTED, "no face", 90, 60))
    made = page(rows, root=None)
    assert "Not looked for: the photos are gone" in made.text
    assert "crop is lost" in made.text and "photo is gone" in made.text


def test_rejected_photos_are_grouped_by_kind_and_not_by_size(tmp_path, page):
    rows = make_rows(tmp_path)
    for number, said in enumerate(
        ("too small (9x12)", "too small (15x15)", "damaged: a", "damaged: b")
    ):
        rows.append(Row(f"eve/r{number}.jpg", "eve", "", REJECTED, said))
    made = page(rows)
    assert "too small: 2 of 12 photos" in made.text and "damaged: 2 of 12 photos" in made.text
    assert made.text.count(" of 12 photos") == 2


def test_the_limit_of_pixels_is_the_options(tmp_path, page):
    rows = make_rows(tmp_path)
    rows.append(Row("eve/wide.jpg", "eve", "", REJECTED, "no face", 120, 100))
    write_jpeg(tmp_path / "raw/eve/wide.jpg", np.full((100, 120, 3), 9, np.uint8))
    assert "too many pixels" not in page(rows, max_pixels=12544).text
    made = page(rows, max_pixels=11999)
    assert "too many pixels (120x100, --max-pixels 11999)" in made.text


def test_scores_near_one_are_told_apart(tmp_path, page):
    rows = [replace(row, score=score) for row, score in zip(
        make_rows(tmp_path), (0.6, 0.75, 0.96, 0.985, 0.992, 0.997, 0.9995, 1.0), strict=True
    )]  # fmt: skip
    text = page(rows).text
    for bar in (
        *("0.000 to 0.700 1", "0.700 to 0.800 1", "0.800 to 0.900 0", "0.950 to 0.980 1"),
        *("0.980 to 0.990 1", "0.990 to 0.995 1", "0.995 to 0.999 1", "0.999 to 1.000 2"),
    ):
        assert bar in text, bar


def test_narrow_screens_break_no_word(tmp_path, page):
    """By the browser itself, where playwright and one are installed."""
    browsers = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("needs chromium")
    rows = [
        replace(row, identity=row.source, score=1.0) for row in make_rows(tmp_path)
    ]  # label "1"
    (tmp_path / "people.txt").write_text("\n".join(row.identity for row in rows))
    page(rows, tmp_path / "people.txt")
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 390, "height": 800})
        view.goto((tmp_path / "report.html").as_uri())
        lines = view.evaluate(
            "[...document.querySelectorAll('.bars th, code')].map(e => {"
            "const range = document.createRange(); range.selectNodeContents(e);"
            "return [e.textContent, new Set([...range.getClientRects()].map(r => r.top)).size]})"
        )
        width = view.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert ["photos", 1] in lines and ["--exclude-names", 1] in lines
    assert all(count == 1 for _, count in lines) and width == 390


def test_edges_hold_every_value():
    for values in ([0.0], [1.0], [7, 7, 7], [1, 2000.0], [100.0, 113.0]):
        values = np.array(values)
        bars = set_report._histogram(values, set_report._octaves(values), 0)
        assert sum(count for _, count in bars) == len(values)
