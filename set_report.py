"""What a prepared set is like, on one page: <set>/report.html, which needs no other file.

    python pre_process.py --out data/faces --report
    python pre_process.py --out data/faces --report --test-names people.txt

Counts per identity, rejected photos by reason, aligned samples with the template drawn over them,
scores and sizes, photos that stand under two identities, and identities of a test list.
"""

import html
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import align_faces
import config
from checkpoint import write_atomic
from duplicates import find_duplicates
from images import MAX_PIXELS, UnreadableImage, data_uri, jpeg_bytes, kind_of, read_image
from manifest import ALIGNED, EXCLUDED, REJECTED, UNDETECTED, Row
from overlap import find_overlap, read_names

NAME = "report.html"
SAMPLES = 24  # aligned faces that are shown, at random; and half as many of the least certain
_PER_REASON = 12  # thumbnails of rejected photos
_GROUPS = 30  # of photos under two identities
_THUMB = 96  # px
_SCORES = (0, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1)  # most faces score 0.99 and more


def write_report(
    out: Path,
    root: Path | None,
    rows: list[Row],
    test_names: Path | None,
    max_pixels: int = MAX_PIXELS,
) -> Path:
    """Write the page of the set `out`; `root` holds its photos, None where they are gone."""
    identities = Counter(row.identity for row in rows if row.status == ALIGNED)
    sections = [
        _counts(rows, identities),
        _per_identity(identities),
        _samples(out, rows),
        _distributions(rows),
        _rejected(root, rows, max_pixels),
        _excluded(rows),
        _duplicates(root, rows, max_pixels),
    ]
    if test_names is not None:
        sections.append(_overlap(sorted({row.identity for row in rows}), test_names))
    title = f"{config.canonical(out)}: {len(rows):,} photos"
    body = "\n".join(section for section in sections if section)
    write_atomic(out / NAME, _PAGE.format(title=_text(title), body=body).encode())
    return out / NAME


# --------------------------------------------------------------------------------------------------
# sections


def _counts(rows: list[Row], identities: Counter) -> str:
    status = Counter(row.status for row in rows)
    tiles = [("photos", len(rows)), ("aligned", status[ALIGNED]), ("identities", len(identities))]
    tiles += [(name, status[name]) for name in (UNDETECTED, REJECTED, EXCLUDED) if status[name]]
    tiles.append(("with several faces", sum(row.faces > 1 for row in rows)))
    cells = (f"<div><b>{count:,}</b><span>{name}</span></div>" for name, count in tiles)
    return f'<section class="tiles">{"".join(cells)}</section>'


def _per_identity(identities: Counter) -> str:
    if not identities:
        return ""
    counts = np.array(list(identities.values()))
    edges = 2 ** np.arange(int(np.log2(counts.max())) + 2)
    bars = [
        (f"{low}" if high - low == 1 else f"{low} to {high - 1}", inside)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if (inside := int(((counts >= low) & (counts < high)).sum())) or low < counts.max()
    ]
    most = ", ".join(f"{name} ({count:,})" for name, count in identities.most_common(5))
    said = (
        f"Median {np.median(counts):g}, mean {counts.mean():.1f}, most: {_text(most)}. "
        f"{int((counts == 1).sum()):,} identities have one photo."
    )
    return _section("Photos per identity", f"<p>{said}</p>{_bars(bars, 'photos', 'identities')}")


def _samples(out: Path, rows: list[Row]) -> str:
    aligned = [row for row in rows if row.status == ALIGNED]
    if not aligned:
        return ""
    chosen = np.random.default_rng(0).permutation(len(aligned))[:SAMPLES]
    faces = "".join(_face(out, aligned[index]) for index in sorted(chosen.tolist()))
    doubtful = sorted(aligned, key=lambda row: row.score or 0)[: SAMPLES // 2]
    worst = "".join(_face(out, row) for row in doubtful)
    said = "Rings: the template. Dots: the landmarks that were found, after the transform."
    return _section(
        "Aligned faces",
        f'<p>{said}</p><div class="grid">{faces}</div>'
        f'<h3>The lowest scores</h3><div class="grid">{worst}</div>',
    )


def _distributions(rows: list[Row]) -> str:
    found = [row for row in rows if row.box is not None]
    if not found:
        return ""
    scores = np.array([row.score for row in found])
    sides = np.array([min(row.box[2] - row.box[0], row.box[3] - row.box[1]) for row in found])
    photos = np.array([min(row.width, row.height) for row in found])
    parts = [
        ("Detection score", scores, np.array(_SCORES), 3, "score"),
        ("Shorter side of the face, px", sides, _octaves(sides), 0, "pixels"),
        ("Shorter side of the photo, px", photos, _octaves(photos), 0, "pixels"),
    ]
    charts = "".join(
        f"<div><h3>{title}</h3>{_bars(_histogram(values, edges, digits), what, 'photos')}</div>"
        for title, values, edges, digits, what in parts
    )
    said = "Of the photos in which a face was found."
    return _section("Scores and sizes", f'<p>{said}</p><div class="columns">{charts}</div>')


def _rejected(root: Path | None, rows: list[Row], max_pixels: int) -> str:
    by_reason: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.status in (REJECTED, UNDETECTED):
            by_reason[kind_of(row.reason)].append(row)
    if not by_reason:
        return _section("Rejected photos", "<p>None.</p>")
    undetected = any(row.status == UNDETECTED for row in rows)
    title = "Rejected and undetected photos" if undetected else "Rejected photos"
    parts = []
    for reason, group in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        share = f"{len(group):,} of {len(rows):,} photos"
        shown = "".join(_thumb(root, row, max_pixels) for row in group[:_PER_REASON])
        parts.append(f'<h3>{_text(reason)}: {share}</h3><div class="grid">{shown}</div>')
    return _section(title, "".join(parts))


def _excluded(rows: list[Row]) -> str:
    reasons = {row.identity: row.reason for row in rows if row.status == EXCLUDED}
    if not reasons:
        return ""
    photos = sum(row.status == EXCLUDED for row in rows)
    table = _table(("identity", "why"), sorted(reasons.items()))
    return _section(
        "Left out by name", f"<p>{len(reasons):,} identities, {photos:,} photos.</p>{table}"
    )


def _duplicates(root: Path | None, rows: list[Row], max_pixels: int) -> str:
    title = "Photos under two identities"
    if root is None:
        return _section(title, "<p>Not looked for: the photos are gone, only crops are left.</p>")
    groups = find_duplicates(rows, root, max_pixels)
    if not groups:
        return _section(title, "<p>None: no two identities share the bytes or pixels of one.</p>")
    shown = "".join(
        f'<div class="group"><span>{group.kind}</span><div>'
        + "".join(_thumb(root, row, max_pixels) for row in group.rows[:_PER_REASON])
        + "</div></div>"
        for group in groups[:_GROUPS]
    )
    more = f"<p>And {len(groups) - _GROUPS:,} more.</p>" if len(groups) > _GROUPS else ""
    people = len({row.identity for group in groups for row in group.rows})
    said = f"<p>{len(groups):,} photos, of {people:,} identities.</p>"
    return _section(title, f'{said}<div class="groups">{shown}</div>{more}')


def _overlap(identities: list[str], test_names: Path) -> str:
    title = f"Identities of {test_names.name}"
    found = find_overlap(identities, read_names(test_names))
    if not found:
        return _section(title, "<p>None has a name like one of the list.</p>")
    rows = [(name, twin, f"{ratio:.2f}") for name, (twin, ratio) in found.items()]
    said = (
        f"<p>{len(found):,} of {len(identities):,} identities, "
        f"{sum(ratio == 1 for _, ratio in found.values()):,} with the same name. "
        "Leave them out of a training set with <code>--exclude-names</code>.</p>"
    )
    table = _table(("identity", "name in the list", "likeness"), sorted(rows))
    return _section(title, said + table)


# --------------------------------------------------------------------------------------------------
# pieces


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _bars(bars: Sequence[tuple[str, int]], what: str, counted: str) -> str:
    """A histogram of lying bars: its text stays readable at any width."""
    most = max((count for _, count in bars), default=0) or 1
    lines = "".join(
        f'<tr><th scope="row">{_text(label)}</th>'
        f'<td><i style="width:max({100 * count / most:.1f}%,{min(count, 1)}px)"></i></td>'
        f"<td>{count:,}</td></tr>"
        for label, count in bars
    )
    head = f'<tr><th scope="col">{what}</th><td></td><th scope="col">{counted}</th></tr>'
    return f'<table class="bars">{head}{lines}</table>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'


def _octaves(values: np.ndarray) -> np.ndarray:
    """Edges a factor of the square root of 2 apart, rounded, around all values."""
    low = math.floor(2 * math.log2(max(float(values.min()), 1)))
    high = math.floor(2 * math.log2(max(float(values.max()), 1))) + 1
    return np.unique(np.round(2 ** (np.arange(low, high + 1) / 2)))


def _histogram(values: np.ndarray, edges: np.ndarray, digits: int) -> list[tuple[str, int]]:
    """Labelled counts between the edges; what lies beyond goes to the first and the last."""
    inside = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
    counts = np.bincount(inside, minlength=max(len(edges) - 1, 1)).tolist()
    ends = [*edges.tolist(), float(values.max())][: len(counts) + 1]
    pairs = list(zip(ends[:-1], ends[1:], counts, strict=True))
    first = next(index for index, pair in enumerate(pairs) if pair[2])
    return [(f"{low:.{digits}f} to {high:.{digits}f}", count) for low, high, count in pairs[first:]]


def _face(out: Path, row: Row) -> str:
    """A crop, the template as rings, the landmarks as dots."""
    try:
        picture = data_uri((out / row.image).read_bytes())
    except OSError:
        return _figure('<div class="none">lost</div>', row, "crop is lost")
    marks = "".join(
        f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in align_faces.TEMPLATE
    )
    found = row.landmarks is not None
    matrix = align_faces.similarity_transform(row.landmarks) if found else None
    if matrix is not None:
        points = align_faces.map_points(matrix, row.landmarks)  # (5, 2)
        marks += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.5"/>' for x, y in points)
    alt = f"aligned face of {row.identity} with the template over it"
    image = f'<img src="{picture}" alt="{_text(alt)}" width="112" height="112">'
    size = align_faces.CROP
    drawn = f'<svg viewBox="0 0 {size} {size}" aria-hidden="true">{marks}</svg>'
    return _figure(f'<div class="face">{image}{drawn}</div>', row, f"score {row.score or 0:.3f}")


def _thumb(root: Path | None, row: Row, max_pixels: int) -> str:
    """The photo itself, small; a grey field where it can't be read."""
    said = f"{row.width}x{row.height}" if row.width else ""
    try:
        if root is None:
            raise UnreadableImage("photo is gone")
        image = Image.fromarray(read_image(root / row.source, max_pixels))
    except UnreadableImage as error:
        return _figure(f'<div class="none">{_text(str(error))}</div>', row, said)
    image.thumbnail((_THUMB, _THUMB))
    picture = data_uri(jpeg_bytes(np.asarray(image), quality=80))
    alt = f"photo of {row.identity}, {row.status}: {row.reason or 'no fault'}"
    width, height = image.size
    image_tag = f'<img src="{picture}" alt="{_text(alt)}" width="{width}" height="{height}">'
    return _figure(image_tag, row, said)


def _figure(picture: str, row: Row, said: str) -> str:
    caption = _text(row.source) + (f"<br>{said}" if said else "")
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _text(text: str) -> str:
    """Escaped; bytes of a file name that are not UTF-8 become the replacement character."""
    whole = text.encode(errors="surrogateescape").decode(errors="replace")
    return html.escape(whole)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2024; --dim: #5f6b76; --paper: #ffffff;
  --field: #f1f4f6; --line: #d9dfe4; --bar: #3b78c3; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e7ebee; --dim: #9aa6b1; --paper: #14181c; --field: #1f252b;
    --line: #343c44; --bar: #6fa5e6; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1200px; padding: 24px 16px 64px; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 16px; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 40px 0 8px; padding-top: 16px;
  border-top: 1px solid var(--line); }}
h3 {{ font-size: 1rem; font-weight: 600; margin: 24px 0 8px; }}
p {{ margin: 0 0 12px; max-width: 70ch; color: var(--dim); overflow-wrap: anywhere; }}
code {{ white-space: nowrap; }}
.tiles {{ display: grid; gap: 8px; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); }}
.tiles div {{ padding: 12px; border-radius: 8px; background: var(--field); }}
.tiles b {{ display: block; font-size: 1.4rem; line-height: 1.2; }}
.tiles span {{ color: var(--dim); font-size: 0.875rem; }}
.grid {{ display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(112px, 44%), 1fr)); }}
.columns {{ display: grid; gap: 0 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }}
figure {{ margin: 0; }}
figure img {{ display: block; max-width: 112px; height: auto; border-radius: 4px; }}
figcaption {{ margin-top: 4px; color: var(--dim); font-size: 0.75rem; line-height: 1.35;
  overflow-wrap: anywhere; }}
.face {{ position: relative; width: 112px; }}
.face svg {{ position: absolute; inset: 0; width: 112px; height: 112px; fill: #ffd54a; }}
.face .ring {{ fill: none; stroke: #37e0ff; stroke-width: 1.2; }}
.none {{ display: grid; place-items: center; height: 96px; max-width: 112px; padding: 8px;
  text-align: center; border-radius: 4px; background: var(--field); color: var(--dim);
  font-size: 0.75rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; font-size: 0.875rem; }}
th {{ text-align: left; font-weight: 600; }}
td, th {{ padding: 2px 12px 2px 0; vertical-align: top; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
.bars {{ width: 100%; max-width: 640px; }}
.bars th, .bars td {{ white-space: nowrap; overflow-wrap: normal; }}
.bars th[scope=row] {{ font-weight: 400; width: 1%; }}
.bars td:nth-child(3), .bars th:nth-child(3) {{ width: 1%; text-align: right; padding-right: 0; }}
.bars th[scope=col] {{ color: var(--dim); font-weight: 400; }}
.bars i {{ display: block; height: 1em; margin-top: 0.25em; border-radius: 2px;
  background: var(--bar); }}
.groups {{ display: flex; flex-wrap: wrap; gap: 12px; }}
.group {{ padding: 8px 12px 12px; border-radius: 8px; background: var(--field); }}
.group > span {{ display: block; margin-bottom: 4px; font-size: 0.875rem; }}
.group > div {{ display: flex; flex-wrap: wrap; gap: 12px; }}
.group figure {{ width: 112px; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
