"""Lists of face pairs, and the verification numbers computed from their angles.

Everything here is numpy on plain arrays: nothing knows of networks, images or folders.

    pairs = read_pairs("pairs.txt")                      # N pairs, with the fold of each
    angles = theta(embeddings[i], embeddings[j])         # (N,) degrees
    folds = kfold_accuracy(angles, pairs.same, pairs.fold)

Two conventions hold throughout:
- an angle is in degrees, 0 (equal) to 180 (opposite), and a pair is called genuine when its angle
  is smaller than the threshold;
- the caller brings finite angles with both kinds among them; ValueError says so when it does not.

Legend of shapes: N pairs, E embedding size, K folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import InputError

FOLDS = 10
LABELS = {
    **dict.fromkeys(("1", "same", "genuine", "true"), True),
    **dict.fromkeys(("0", "-1", "different", "impostor", "false"), False),
}

# --- lists of pairs -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pairs:
    """N pairs of photos in the order of their file.

    `left` and `right` name photos by their path below the source folder, '/' between folders; the
    suffix may be absent, as in LFW's lists. `line` is where the pair stands in the file (from 1).
    `folds_from` says where the folds come from, in words for the report.
    """

    path: Path
    left: list[str]
    right: list[str]
    same: np.ndarray  # (N,) bool
    fold: np.ndarray  # (N,) int, 0 .. K-1
    line: np.ndarray  # (N,) int
    folds_from: str

    def __len__(self) -> int:
        return len(self.left)

    def where(self, pair: int) -> str:
        """`file:line` of one pair, for a message."""
        return f"{self.path}:{self.line[pair]}"


def read_pairs(path: str | Path) -> Pairs:
    """Read a list of pairs: LFW's format or one pair a line.

    LFW (http://vis-www.cs.umass.edu/lfw/README.txt): a first line `10<TAB>300` (folds, pairs per
    fold and kind; `500` alone is one fold), then `name n m` for a genuine and `name n name m` for
    an impostor pair. The number of columns tells the kind and the count so far tells the fold, so
    a file that lists all genuine pairs first reads the same as one that goes fold by fold.

    Otherwise: `path<TAB>path<TAB>label`, the label 1/0, same/different or genuine/impostor, with a
    fourth column for the fold if there is one. `#` opens a comment line.

    Where a file gives no folds (View 1's list is one single fold), each kind is cut into ten
    contiguous parts, fewer where there are fewer pairs; `folds_from` says so.

    Raises InputError, naming file and line, for whatever cannot be read as N pairs.
    """
    path = Path(path)
    rows = _read_rows(path)
    if not rows:
        raise InputError(
            f"{path}: no pairs in this file; python lfw_eval.py --help tells the two formats"
        )
    official = len(rows[0][1]) <= 2 and all(_is_count(cell) for cell in rows[0][1])
    return _read_official(path, rows) if official else _read_listed(path, rows)


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that say something, as (line number, cells)."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such pairs file; name one with --pairs") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file, so not a list of pairs") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if "\0" in text:
        raise InputError(f"{path}: not a text file, so not a list of pairs")
    if text.lstrip()[:1] == "<":
        raise InputError(f"{path}: a web page, not a list of pairs; fetch it again")
    rows = []
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        line = line.rstrip()
        # A comment has no tab: a path may begin with # too, and no pair is left out silently.
        if line and not (line.lstrip().startswith("#") and "\t" not in line):
            # A line with tabs may hold blanks inside a path; one without is split at blanks.
            cells = line.split("\t") if "\t" in line else line.split()
            rows.append((number, [cell.strip() for cell in cells]))
    return rows


def _is_count(cell: str) -> bool:
    return cell.isascii() and cell.isdigit() and len(cell) < 10 and int(cell) > 0


def _read_official(path: Path, rows: list[tuple[int, list[str]]]) -> Pairs:
    header, *body = rows
    folds, per_fold = (1, *map(int, header[1]))[-2:]
    left, right, same, lines = [], [], [], []
    for number, cells in body:
        where = f"{path}:{number}"
        if len(cells) == 3:
            name_a, a, b = cells
            name_b = name_a
        elif len(cells) == 4:
            name_a, a, name_b, b = cells
            if name_a == name_b:
                raise InputError(f"{where}: an impostor pair (four columns) of one name, {name_a}")
        else:
            raise InputError(
                f"{where}: {len(cells)} columns; 'name n m' or 'name n name m' was expected"
            )
        for name, cell in ((name_a, a), (name_b, b)):
            if not name:
                raise InputError(f"{where}: an empty name")
            if not _is_count(cell):
                raise InputError(f"{where}: '{cell}' is not a photo number of {name}")
        left.append(f"{name_a}/{name_a}_{int(a):04d}")
        right.append(f"{name_b}/{name_b}_{int(b):04d}")
        _check_photos(where, left[-1], right[-1])
        same.append(len(cells) == 3)
        lines.append(number)

    same = np.array(same, dtype=bool)  # (N,)
    for kind, found in (("genuine", int(same.sum())), ("impostor", int((~same).sum()))):
        if found != folds * per_fold:
            raise InputError(
                f"{path}:{header[0]}: this line promises {folds} x {per_fold} {kind} pairs, "
                f"{found} are listed; correct it or fetch the file again"
            )
    if folds == 1:
        fold, folds_from = _cut_folds(path, same)
    else:
        rank = np.where(same, np.cumsum(same), np.cumsum(~same)) - 1  # (N,) place within its kind
        fold, folds_from = rank // per_fold, f"{folds} folds as listed"
    return Pairs(path, left, right, same, fold, np.array(lines), folds_from)


def _read_listed(path: Path, rows: list[tuple[int, list[str]]]) -> Pairs:
    columns = len(rows[0][1])
    left, right, same, fold, lines = [], [], [], [], []
    seen: dict[frozenset[str], tuple[int, bool]] = {}
    for number, cells in rows:
        where = f"{path}:{number}"
        if len(cells) not in (3, 4):
            raise InputError(
                f"{where}: {len(cells)} columns; 'path<TAB>path<TAB>label' was expected, "
                "or a first line such as '10<TAB>300' for LFW's format"
            )
        if len(cells) != columns:
            raise InputError(
                f"{where}: {len(cells)} columns, {columns} in the lines above; "
                "give a fold to every pair or to none"
            )
        label = LABELS.get(cells[2].lower())
        if label is None:
            raise InputError(
                f"{where}: unknown label '{cells[2]}'; 1 (same person) or 0 was expected, "
                "and LFW's format needs a first line such as '10<TAB>300'"
            )
        if columns == 4 and not (cells[3].isascii() and cells[3].isdigit() and len(cells[3]) < 10):
            raise InputError(f"{where}: '{cells[3]}' is not the number of a fold")
        left.append(_clean(cells[0]))
        right.append(_clean(cells[1]))
        _check_photos(where, left[-1], right[-1])
        pair = frozenset((left[-1], right[-1]))
        before, answer = seen.setdefault(pair, (number, label))
        if answer != label:
            raise InputError(f"{where}: the pair of line {before} with the other label")
        same.append(label)
        fold.append(int(cells[3]) if columns == 4 else 0)
        lines.append(number)

    same = np.array(same, dtype=bool)  # (N,)
    for kind, found in (("genuine", same.any()), ("impostor", (~same).any())):
        if not found:
            raise InputError(f"{path}: no {kind} pair in this file, so nothing to tell apart")
    names, fold = np.unique(fold, return_inverse=True)  # (K,), (N,)
    if len(names) > 1:
        folds_from = f"{len(names)} folds as listed"
        for number, name in enumerate(names):
            others = same[fold != number]
            if others.all() or not others.any():
                raise InputError(
                    f"{path}: beside fold {name} there are pairs of one kind only, so no threshold "
                    "can be chosen: give every fold pairs of both kinds"
                )
    else:
        fold, folds_from = _cut_folds(path, same, "one" if columns == 4 else "none")
    return Pairs(path, left, right, same, fold, np.array(lines), folds_from)


def _check_photos(where: str, left: str, right: str) -> None:
    if not (left and right):
        raise InputError(f"{where}: an empty path; a pair needs two photos")
    if left == right:
        raise InputError(f"{where}: the same photo twice ({left}); a pair needs two photos")


def _clean(path: str) -> str:
    return path.replace("\\", "/").removeprefix("./")


def _cut_folds(path: Path, same: np.ndarray, named: str = "none") -> tuple[np.ndarray, str]:
    """Ten contiguous folds, each with its share of both kinds. Contiguous as in LFW, where the
    pairs of one person lie together: a random cut would put them on both sides."""
    folds = min(FOLDS, int(same.sum()), int((~same).sum()))
    if folds < 2:
        raise InputError(f"{path}: needs at least two genuine and two impostor pairs")
    fold = np.zeros(len(same), dtype=int)
    for kind in (same, ~same):
        fold[kind] = np.arange(kind.sum()) * folds // kind.sum()
    return fold, f"{folds} folds cut from the list, which names {named}"


# --- angles and accuracy --------------------------------------------------------------------------


def theta(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Angles between the rows of two (N, E) arrays, in degrees, float64 (N,).

    2 atan2(|u - v|, |u + v|) of the unit vectors: exact to the last digits everywhere, where
    arccos of the dot product loses half of them near 0 and 180 (Kahan, 'How futile are mindless
    assessments of roundoff', section 12). Raises ValueError for a row that is zero or not finite.
    """
    u, v = (np.asarray(rows, dtype=np.float64) for rows in (left, right))  # (N, E) each
    if not (np.isfinite(u).all() and np.isfinite(v).all()):
        raise ValueError("an embedding is not finite, so it has no angle")
    norm_u, norm_v = (np.linalg.norm(rows, axis=1, keepdims=True) for rows in (u, v))  # (N, 1)
    if not (norm_u.all() and norm_v.all()):
        raise ValueError("an embedding is zero, so it has no angle")
    u, v = u / norm_u, v / norm_v
    apart = np.arctan2(np.linalg.norm(u - v, axis=1), np.linalg.norm(u + v, axis=1))
    return np.degrees(2 * apart)  # (N,)


@dataclass(frozen=True, eq=False)
class Folds:
    """Accuracy and threshold (degrees) of each of K folds."""

    accuracy: np.ndarray  # (K,)
    threshold: np.ndarray  # (K,)

    @property
    def mean(self) -> float:
        return float(self.accuracy.mean())

    @property
    def std(self) -> float:
        """Over folds, with K - 1 in the denominator as LFW defines it. (numpy's default divides
        by K: many published '+-' are that figure, 0.95 of this one at ten folds.)"""
        return float(self.accuracy.std(ddof=1))

    @property
    def standard_error(self) -> float:
        """LFW's standard error of the mean accuracy, std / sqrt(K)."""
        return self.std / len(self.accuracy) ** 0.5


def kfold_accuracy(angles: np.ndarray, same: np.ndarray, fold: np.ndarray) -> Folds:
    """Accuracy on each fold at the threshold that is best on all the others (LFW, View 2)."""
    angles, same = _checked(angles, same, both_kinds=False)
    fold = np.asarray(fold)
    names = np.unique(fold)
    if len(names) < 2:
        raise ValueError("one fold only: there is no other fold to choose a threshold on")
    accuracy, threshold = [], []
    for name in names:
        held_out = fold == name
        cut = best_threshold(angles[~held_out], same[~held_out])
        accuracy.append(np.mean((angles[held_out] < cut) == same[held_out]))
        threshold.append(cut)
    return Folds(np.array(accuracy), np.array(threshold))


def best_threshold(angles: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the most pairs right, by exact search.

    Between two neighbouring angles every threshold decides alike, so the midpoints (and half a
    degree outside either end) are all that need trying. Where several are equally good the median
    one is taken, the lower of two: an optimum itself, and away from the rim of the good range.
    """
    angles, same = _checked(angles, same, both_kinds=False)
    distinct, place = np.unique(angles, return_inverse=True)  # (D,), (N,)
    genuine = np.bincount(place[same], minlength=len(distinct))  # (D,) pairs at each angle
    impostor = np.bincount(place[~same], minlength=len(distinct))  # (D,)
    # Threshold number d has the d smallest angles below it.
    accepted = np.concatenate([[0], np.cumsum(genuine)])  # (D + 1,) genuine called genuine
    rejected = impostor.sum() - np.concatenate([[0], np.cumsum(impostor)])  # (D + 1,)
    right = accepted + rejected
    best = np.flatnonzero(right == right.max())
    edges = np.concatenate([[distinct[0] - 1], distinct, [distinct[-1] + 1]])  # (D + 2,)
    pick = best[(len(best) - 1) // 2]
    below, above = edges[pick], edges[pick + 1]
    middle = (below + above) / 2
    # Two angles one rounding step apart have no number between them; `above` still splits them.
    return float(middle if middle > below else above)


def tuned_accuracy(angles: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """Accuracy and threshold when the threshold is chosen on the tested pairs themselves.

    Not an honest score: it is here because older published numbers were made this way, and is to
    be labelled as such wherever it is shown.
    """
    cut = best_threshold(angles, same)
    return float(np.mean((np.asarray(angles) < cut) == np.asarray(same))), cut


# --- curves ---------------------------------------------------------------------------------------


def roc(angles: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR, (D + 1,) each, with the D distinct angles accepted one after another.

    From (0, 0) to (1, 1). Equal angles are accepted together, so a tie is one slanted step.
    """
    angles, same = _checked(angles, same)
    distinct, place = np.unique(angles, return_inverse=True)
    rates = []
    for kind in (~same, same):
        accepted = np.cumsum(np.bincount(place[kind], minlength=len(distinct)))
        rates.append(np.concatenate([[0.0], accepted / kind.sum()]))
    return rates[0], rates[1]  # (D + 1,) each


def auc(angles: np.ndarray, same: np.ndarray) -> float:
    """Area under the ROC curve: how often a genuine pair is closer than an impostor pair."""
    far, tar = roc(angles, same)
    return float(np.trapezoid(tar, far))


def eer(angles: np.ndarray, same: np.ndarray) -> float:
    """Equal error rate: where the ROC curve, joined by straight lines, meets FAR = 1 - TAR."""
    return eer_of_curve(*roc(angles, same))


def eer_of_curve(far: np.ndarray, tar: np.ndarray) -> float:
    """The same of a curve as `roc` gives it, (D + 1,) both."""
    surplus = far - (1 - tar)  # from -1 to 1, never falling
    after = int(np.argmax(surplus >= 0))
    step = -surplus[after - 1] / (surplus[after] - surplus[after - 1])
    return float(far[after - 1] + step * (far[after] - far[after - 1]))


def tar_at_far(angles: np.ndarray, same: np.ndarray, far: float) -> float | None:
    """TAR where the ROC curve, joined by straight lines, has this FAR (its highest one there).

    None where one single impostor pair is already more than that FAR: nothing was measured there.
    """
    angles, same = _checked(angles, same)
    if not is_measurable(far, int((~same).sum())):
        return None
    # np.interp takes the last of several points with the same FAR, which is the highest.
    return float(np.interp(far, *roc(angles, same)))


def is_measurable(far: float, impostors: int) -> bool:
    """Whether so many impostor pairs can show a FAR: one of them must not be more than that."""
    return far * impostors >= 1 - 1e-9


def threshold_at_far(impostors: np.ndarray, far: float) -> float:
    """The highest threshold in degrees below which at most that share of the impostor angles lies.

    (N,) degrees, any order. Raises ValueError where one pair is already more than that share.
    """
    if not is_measurable(far, len(impostors)):
        raise ValueError(f"{len(impostors)} impostor pairs can't show a FAR of {far}")
    accepted = min(int(far * len(impostors) + 1e-9), len(impostors) - 1)
    return float(np.partition(np.asarray(impostors, dtype=np.float64), accepted)[accepted])


def d_prime(angles: np.ndarray, same: np.ndarray) -> float | None:
    """Distance of the two mean angles in units of their pooled spread; None without a spread."""
    angles, same = _checked(angles, same)
    genuine, impostor = angles[same], angles[~same]
    if not np.ptp(genuine) and not np.ptp(impostor):  # rounding leaves a variance even then
        return None
    spread = np.sqrt((genuine.var() + impostor.var()) / 2)
    return float((impostor.mean() - genuine.mean()) / spread)


def _checked(
    angles: np.ndarray, same: np.ndarray, both_kinds: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    angles, same = np.asarray(angles, dtype=np.float64), np.asarray(same, dtype=bool)
    if angles.ndim != 1 or angles.shape != same.shape or not len(angles):
        raise ValueError(f"angles {angles.shape} and labels {same.shape}: one of each per pair")
    if not np.isfinite(angles).all():
        raise ValueError("an angle is not finite")
    if both_kinds and (same.all() or not same.any()):
        raise ValueError("both genuine and impostor pairs are needed")
    return angles, same
