"""How far chance may have moved a number: intervals by bootstrap, and McNemar's test.

    intervals = bootstrap(angles, same, fold)            # {"accuracy": (low, high), ...}
    test = mcnemar(right_a, right_b)                      # do two models differ on the same pairs?

Legend of shapes: N pairs, D distinct angles, K folds. Angles and labels as in protocol.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.stats

SEED = 0
LEVEL = 0.95
FAR = 1e-3  # whose TAR gets an interval
EXACT_BELOW = 25  # discordant pairs, under which chi-squared is no longer close (McNemar 1947)
CHUNK = 1 << 22  # resampled pairs in memory at once


def bootstrap(
    angles: np.ndarray, same: np.ndarray, fold: np.ndarray, resamples: int = 1000, seed: int = SEED
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals (Efron 1979) of accuracy, auc, eer, and tar where FAR allows it.

    Pairs are drawn with replacement among those of their fold and kind, so that each resample has
    the protocol's make-up; thresholds are chosen anew in each. Pairs that share a photo count as
    independent: with many such, the truth is a little wider. Nothing where a fold has a single pair
    of a kind.
    """
    strata = np.unique(np.stack([fold, same]), axis=1, return_counts=True)[1]
    if strata.min() < 2:
        return {}  # a pair that is alone of its fold and kind is in each resample: no spread to see
    order = np.argsort(angles, kind="stable")
    angles, same = np.asarray(angles)[order], np.asarray(same, dtype=bool)[order]
    fold = np.unique(fold, return_inverse=True)[1][order]  # (N,) 0 .. K-1
    ends = np.flatnonzero(np.append(np.diff(angles) > 0, True))  # (D,) last of each equal run
    found: dict[str, list[float]] = {"accuracy": [], "auc": [], "eer": [], "tar": []}
    accepted = np.concatenate([[0], ends + 1])  # (D + 1,) pairs below threshold number d
    folds = _folds(angles, same, fold, accepted)
    for counts in resampled(same, fold, resamples, np.random.default_rng(seed)):
        found["accuracy"].append(_accuracy(counts, same, angles[ends], accepted, folds))
        far, tar = _roc(counts, same, ends)
        found["auc"].append(float(np.trapezoid(tar, far)))
        found["eer"].append(_eer(far, tar))
        found["tar"].append(float(np.interp(FAR, far, tar)))
    if FAR * (~same).sum() < 1 - 1e-9:
        del found["tar"]  # as protocol.tar_at_far: nothing was measured there
    tail = (1 - LEVEL) / 2
    return {
        name: tuple(np.quantile(values, [tail, 1 - tail]).tolist())
        for name, values in found.items()
        if values
    }


def resampled(
    same: np.ndarray, fold: np.ndarray, resamples: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """How often each pair was drawn, int32 (N,), `resamples` times."""
    strata = [np.flatnonzero((fold == k) & (same == kind)) for k in np.unique(fold)
              for kind in (True, False)]  # fmt: skip
    size = max(1, CHUNK // len(same))
    for first in range(0, resamples, size):
        rows = min(size, resamples - first)
        counts = np.zeros((rows, len(same)), dtype=np.int32)
        for members in strata:
            n = len(members)
            drawn = rng.integers(n, size=(rows, n)) if n else np.zeros((rows, 0), dtype=int)
            cells = (drawn + n * np.arange(rows)[:, None]).ravel()
            counts[:, members] = np.bincount(cells, minlength=rows * n).reshape(rows, n)
        yield from counts


class _Fold(NamedTuple):
    """What stays the same in every resample."""

    members: np.ndarray  # (M,) pairs of the fold, in the order of their angles
    angles: np.ndarray  # (M,) theirs
    below: np.ndarray  # (D + 1,) how many of them threshold number d accepts
    impostors: int


def _folds(
    angles: np.ndarray, same: np.ndarray, fold: np.ndarray, accepted: np.ndarray
) -> list[_Fold]:
    return [
        _Fold(m, angles[m], np.searchsorted(m, accepted), int((~same[m]).sum()))
        for m in (np.flatnonzero(fold == k) for k in range(fold.max() + 1))
    ]


def _accuracy(
    counts: np.ndarray,
    same: np.ndarray,
    distinct: np.ndarray,
    accepted: np.ndarray,
    folds: list[_Fold],
) -> float:
    """protocol.kfold_accuracy of pairs in the order of their angles, each `counts` times.

    Threshold number d accepts the d smallest of the `distinct` angles. Against one that accepts
    none, it is right about each genuine pair below it more, and about each impostor pair below it
    less: its gain. Both are kept as sums over all pairs less those of the fold.
    """
    signed = np.where(same, counts, -counts)
    gain, drawn = _from_zero(signed)[accepted], _from_zero(counts)[accepted]  # (D + 1,) both
    right = []
    for members, angles, below, impostors in folds:
        own = _from_zero(signed[members])  # (M + 1,)
        others = gain - own[below]
        best = np.flatnonzero(others == others.max())
        # As the protocol does: only where a drawn angle of another fold comes before, and midway
        # to the next such. Counted there alone: over all D it would take as long as the rest.
        taken = _from_zero(counts[members])  # (M + 1,)
        here, before = (drawn[at] - taken[below[at]] for at in (best, best - 1))
        best = best[(best == 0) | (here > before)]
        pick = after = int(best[(len(best) - 1) // 2])
        while after < len(drawn) and drawn[after] - taken[below[after]] == (
            drawn[pick] - taken[below[pick]]
        ):
            after += 1
        low = distinct[pick - 1] if pick else distinct[after - 1] - 1
        high = distinct[after - 1] if after < len(drawn) else low + 1
        middle = (low + high) / 2
        passed = np.searchsorted(angles, middle if middle > low else high)
        right.append((own[passed] + impostors) / len(members))
    return float(np.mean(right))


def _from_zero(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum(values, out=sums[1:])
    return sums


def _roc(counts: np.ndarray, same: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rates = []
    for kind in (~same, same):
        accepted = np.cumsum(np.where(kind, counts, 0))[ends]
        rates.append(np.concatenate([[0.0], accepted / accepted[-1]]))
    return rates[0], rates[1]  # (D + 1,) each


def _eer(far: np.ndarray, tar: np.ndarray) -> float:
    surplus = far - (1 - tar)
    after = int(np.argmax(surplus >= 0))
    step = -surplus[after - 1] / (surplus[after] - surplus[after - 1])
    return float(far[after - 1] + step * (far[after] - far[after - 1]))


# --- two models on the same pairs -----------------------------------------------------------------


@dataclass(frozen=True)
class McNemar:
    """Pairs that only one of two models judged rightly, and how likely chance alone does that."""

    only_a: int
    only_b: int
    p: float
    method: str  # "exact", or "chi2" with continuity correction


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> McNemar:
    """McNemar's test (1947; the correction is Edwards' of 1948), two-sided. bool (N,) both."""
    only_a = int(np.sum(right_a & ~right_b))
    only_b = int(np.sum(right_b & ~right_a))
    discordant = only_a + only_b
    if discordant < EXACT_BELOW:
        p = scipy.stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
        return McNemar(only_a, only_b, float(p), "exact")
    statistic = (abs(only_a - only_b) - 1) ** 2 / discordant
    if only_a == only_b:  # the correction would step past zero
        statistic = 0.0
    return McNemar(only_a, only_b, float(scipy.stats.chi2.sf(statistic, 1)), "chi2")


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) adjustment for having made so many tests at once."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = worst
    return adjusted
