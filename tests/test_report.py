"""report.html, parsed and in a browser. Run: python -m pytest tests/test_report.py

The last tests open it in a headless Chromium (apt-get install chromium); skipped where none is.
"""

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import embeddings
import gallery
import lfw_eval
import report
import scores
import verification_set
from images import read_image
from verification_set import Photo, VerificationSet

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
RUN = {
    "date": "2026-11-24T12:00:00+00:00", "commit": "abc1234+", "hardware": "2 threads",
    "torch": "2.14.1", "photos_embedded": 24, "photos_per_second": 40.5,
    "command": ["lfw_eval.py", "--data", "a set"],
}  # fmt: skip


@pytest.fixture(scope="module")
def page(lfw_like, tmp_path_factory) -> Path:
    """A report of lfw_like, with a pair that is listed as mislabelled."""
    out = tmp_path_factory.mktemp("report")
    errata = out / "errata.txt"
    numbers = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))
    errata.write_text("".join(f"1\tPerson_{i}\t{a}\t{b}\n" for i in range(6) for a, b in numbers))
    options = config.EvalOptions(
        data=lfw_like, pairs=lfw_like / "pairs.txt", model=(lfw_like.parent / "run",),
        device="cpu", threads=1, bootstrap=50, out=out,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification_set, "ERRATA", errata)
        lfw_eval.main(options)
    return out / "report.html"


class Parsed(HTMLParser):
    """The page's elements; open and close must match."""

    VOID = ("meta", "link", "img", "br", "wbr", "input", "path", "use", "rect", "line")

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def parsed(page) -> Parsed:
    return Parsed(page.read_text())


def test_one_file_that_asks_for_nothing(page, parsed):
    text = page.read_text()
    assert not parsed.all("script") and "javascript:" not in text
    assert not re.search(r"url\((?!#)|@import", text)  # a # is a clip path inside an svg
    for tag, attributes in parsed.elements:
        for key in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if key in attributes and tag != "link":
                assert attributes[key].startswith(("data:image/jpeg;base64,", "#")), (tag, key)
    policy = next(a["content"] for a in parsed.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_accessible_by_its_structure(parsed):
    assert parsed.all("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    visible = [a["id"] for tag, a in parsed.elements if "id" in a and tag in ("section", "main")]
    assert len(visible) == len(set(visible))
    for link in parsed.all("a"):
        assert link["href"].removeprefix("#") in ids
    assert parsed.all("a")[0] == {"class": "skip", "href": "#content"}
    assert all(image["alt"] for image in parsed.all("img")) and parsed.all("img")
    assert all(cell.get("scope") in ("row", "col") for cell in parsed.all("th"))
    assert [svg["role"] for svg in parsed.all("svg")] == ["img", "img"]
    assert all("%" in svg["aria-label"] for svg in parsed.all("svg"))
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and set(levels[1:]) == {2}
    assert len(parsed.all("details")) == len(parsed.all("summary")) == 4


def test_every_wrong_pair_is_there_the_worst_first(page, lfw_like):
    tests = verification_set.load(lfw_like, lfw_like / "pairs.txt")
    text = page.read_text()
    result = json.loads((page.parent / "eval.json").read_text())
    errors = result["errors"]
    wrong = round((1 - result["accuracy"]["mean"]) * len(tests))
    assert errors["false_positives"] + errors["false_negatives"] == wrong > 0
    for name, count, side in (
        ("false-positives", errors["false_positives"], "below"),
        ("false-negatives", errors["false_negatives"], "above"),
    ):
        part = text[text.index(f'<section id="{name}"') :]
        part = part[: part.index("</section>")]
        distances = [float(d) for d in re.findall(rf"([\d.]+)° {side} the threshold", part)]
        assert len(distances) == part.count('<li class="pair">') == count > 0
        assert distances == sorted(distances, reverse=True)
        assert part.count("<img") == 4 * count  # two originals, two crops
    part = text[text.index('<section id="nearest"') :]
    distances = [float(d) for d in re.findall(r"([\d.]+)° (?:below|above) the", part)]
    assert len(distances) == gallery.NEAREST and distances == sorted(distances)
    assert "judged rightly" in part and re.search(r"Person_<wbr>\d_<wbr>000\d", part)


def test_row_38_mislabelled_pairs_are_marked_and_count_all_the_same(page):
    text = page.read_text()
    part = text[text.index('<section id="false-negatives"') : text.index('<section id="nearest"')]
    assert part.count("list this pair's label as wrong") == part.count('<li class="pair">')
    result = json.loads((page.parent / "eval.json").read_text())
    assert result["pairs"]["scored"] == 80
    assert result["errors"]["of_mislabelled"] == result["errors"]["false_negatives"]
    positives = text[text.index('<section id="false-positives"') :].split("</section>")[0]
    assert "label as wrong" not in positives


def test_the_header_says_model_data_protocol_date_and_commit(page):
    text = page.read_text()
    head = text[: text.index('<section id="curves"')]
    run = json.loads((page.parent / "run.json").read_text())
    for said in ("<h1>run on faces</h1>", "pairs.txt", "10 folds as listed", run["date"],
                 run["commit"], run["hardware"], "40 genuine and 40 impostor", "n/a"):  # fmt: skip
        assert said in head, said
    assert "TAR at FAR 1e-1" in head and "tuned on the test pairs" in head


def test_the_pictures_are_the_photos_with_their_frame(lfw_like, page):
    text = page.read_text()
    uris = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"[^>]*alt="([^"]+)"', text)
    assert uris
    for content, alt in uris[:8]:
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            shown = np.asarray(image).astype(float)
        name, kind = alt.split(", the ")
        person = name.rpartition("_")[0]
        if kind == "aligned crop":
            truth = read_image(lfw_like / "images" / person / f"{name}.jpg").astype(float)
            assert shown.shape == (112, 112, 3) and np.abs(shown - truth).mean() < 8
        else:
            assert shown.shape == (141, 160, 3)  # of 152 x 172
            raw = Image.fromarray(read_image(lfw_like.parent / "raw" / person / f"{name}.jpg"))
            apart = np.abs(shown - np.asarray(raw.resize((160, 141), Image.Resampling.LANCZOS)))
            edge = max(apart[row, 45:95].mean() for row in range(44, 50))  # box starts at y = 50
            assert apart[60:110, 45:95].mean() < 12  # inside, the photo itself
            assert (edge > 25) == ("Person_0_0001" not in name)  # no face was found in that one


# --- what may be missing or hostile ---------------------------------------------------------------


def made(tmp_path: Path, photos: list[Photo], wrong: int, n: int = 40) -> tuple:
    """A set of n pairs of these photos, whose first `wrong` genuine ones are judged wrongly."""
    same, fold = np.arange(n) % 2 == 0, np.arange(n) // (n // 2)
    tests = VerificationSet(
        "set", tmp_path / "pairs.txt", photos, ["00"] * len(photos), np.zeros(n, dtype=int),
        np.ones(n, dtype=int), same, fold, "2 folds", np.zeros(n, dtype=bool), "they are gone",
    )  # fmt: skip
    (tmp_path / "pairs.txt").write_text("x")
    angles = np.where(same, 50.0, 90.0) + np.arange(n) / 1e5
    genuine = np.flatnonzero(same)
    angles[genuine[np.linspace(0, len(genuine) - 1, wrong).astype(int)]] += 70
    embedded = embeddings.Embedded(np.eye(2), "ab" * 32, torch.device("cpu"), 0, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protocol.theta", lambda *_: angles)
        judged = scores.score("net", tmp_path, tests, embedded, True, 5)
    return tests, judged


def photo(name: str, seed: int, **more) -> Photo:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (14, 14, 3), dtype=np.uint8)
    Image.fromarray(np.kron(noise, np.ones((8, 8, 1), dtype=np.uint8))).save(buffer, "PNG")
    return Photo(name, name, buffer.getvalue(), **more)


def test_names_are_text_never_markup(tmp_path):
    evil = '<script>alert("1")</script>&amp;'
    tests, judged = made(tmp_path, [photo(evil, 0, undetected=True), photo("b'\"", 1)], 1)
    judged = dataclasses.replace(
        judged, result={**judged.result, "model": {"name": evil, "sha256": "0"}}
    )
    report.write(tmp_path / "r.html", tests, judged, {**RUN, "command": [evil]}, "<svg/>", "<svg/>")
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    Parsed(text)


def test_without_originals_the_crops_stand_alone_and_it_is_said(tmp_path):
    tests, judged = made(tmp_path, [photo("a", 0), photo("b", 1)], 3)
    report.write(tmp_path / "r.html", tests, judged, RUN, "<svg/>", "<svg/>")
    text = (tmp_path / "r.html").read_text()
    assert "Only aligned crops are shown: they are gone." in text
    assert "the original photo" not in text and text.count("aligned crop") > 6
    assert "None" in text  # no photo was undetected, no false positive


def test_a_single_original_that_cannot_be_read_is_said_in_its_place(tmp_path):
    photos = [photo("a", 0, original=tmp_path / "gone.jpg"), photo("b", 1)]
    tests, judged = made(tmp_path, photos, 1)
    tests = dataclasses.replace(tests, no_originals="")
    report.write(tmp_path / "r.html", tests, judged, RUN, "<svg/>", "<svg/>")
    assert "the original photo can't be read" in (tmp_path / "r.html").read_text()


def test_a_thousand_wrong_pairs_stay_a_page_that_opens(tmp_path):
    """All of them are shown, in smaller pictures, and a long gallery starts closed."""
    photos = [
        photo("a", 0, original=tmp_path / "a.png"),
        photo("b", 1, original=tmp_path / "a.png"),
    ]
    noise = np.random.default_rng(0).integers(0, 255, (25, 25, 3), dtype=np.uint8)
    Image.fromarray(np.kron(noise, np.ones((10, 10, 1), dtype=np.uint8))).save(tmp_path / "a.png")
    tests, judged = made(tmp_path, photos, 1000, 4000)
    shown = gallery.Gallery(tests, judged)
    assert len(shown.false_negatives) == (~judged.right).sum() == 1000
    pair = shown.false_negatives[0]
    for picture in (pair.left.crop, pair.left.original, pair.right.crop, pair.right.original):
        assert max(picture.width, picture.height) == 96
    report.write(tmp_path / "r.html", tests, judged, RUN, "<svg/>", "<svg/>")
    assert (tmp_path / "r.html").read_text().count("<details open>") < 4


def test_colours_of_text_have_contrast_in_light_and_dark():
    """WCAG AA: 4.5 to 1 for text."""
    style = (config.ROOT / "templates" / "base.html").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part))
                   for part in style.split("@media (prefers-color-scheme: dark)")[:2])  # fmt: skip

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    pairs = [(text, ground) for text in ("ink", "muted", "genuine") for ground in ("page", "card")]
    pairs += [("bad", "bad-page"), ("note", "note-page")]
    for colours in (light, dark):
        for text, ground in pairs:
            low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    flags = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update",
             "--disable-sync")  # fmt: skip
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=list(flags))
        yield running
        running.close()


def opened(browser, page: Path, width: int, scheme: str = "light"):
    """The page in a window of that width, and what it complained about or asked for."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url[:60])
           if not request.url.startswith(("data:", page.as_uri())) else None)  # fmt: skip
    tab.goto(page.as_uri())
    return tab, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 800, 1600])
def test_in_chromium_nothing_is_wrong_and_nothing_sticks_out(browser, page, width, scheme):
    tab, said = opened(browser, page, width, scheme)
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert tab.evaluate(broken) == 0
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
    for plot in tab.query_selector_all("figure svg"):
        box = plot.bounding_box()
        assert box["width"] > 250 and box["height"] > 150
    tab.context.close()


def test_in_chromium_the_keyboard_reaches_everything(browser, page):
    tab, _ = opened(browser, page, 1200)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0  # seen now
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.closest('main') !== null")
    reached = set()
    for _ in range(60):
        reached.add(tab.evaluate("document.activeElement.tagName"))
        if tab.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
        tab.keyboard.press("Tab")
    assert "SUMMARY" in reached
    is_open = "document.activeElement.parentElement.open"
    before = tab.evaluate(is_open)
    tab.keyboard.press("Enter")
    assert tab.evaluate(is_open) is not before
    tab.context.close()
