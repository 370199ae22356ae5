"""The page about a set. Run: python -m pytest tests/test_set_report.py"""

import base64
import io
import os
import re
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

    def make(rows, names=None, root=tmp_path / "raw") -> Page:
        path = set_report.write_report(tmp_path, root, rows, names)
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
        *("0.80 to 0.85 5", "0.85 to 0.90 2", "0.90 to 0.95 1", "45 to 64 8"),
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


def test_edges_hold_every_value():
    for values in ([0.0], [1.0], [7, 7, 7], [1, 2000.0], [100.0, 113.0]):
        values = np.array(values)
        bars = set_report._histogram(values, set_report._octaves(values), 0)
        assert sum(count for _, count in bars) == len(values)
