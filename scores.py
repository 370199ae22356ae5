"""The numbers of one model on one verification set: eval.json, and how people read them.

Everything in `measure` is a function of angles and labels alone, and rounded so that the last
digits of a sum do not show: the same embeddings give the same bytes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data_gen
import protocol
import significance
from checkpoint import sha256
from embeddings import Embedded
from verification_set import VerificationSet, is_packed, printable

FARS = {"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4}
QUANTILES = {"q01": 0.01, "q05": 0.05, "median": 0.5, "q95": 0.95, "q99": 0.99}


@dataclass(frozen=True, eq=False)
class Scores:
    """One model's angles, how each pair was judged, and eval.json."""

    name: str
    out: Path  # folder of its report
    angles: np.ndarray  # (N,) degrees
    thresholds: np.ndarray  # (N,) degrees, of the pair's fold
    right: np.ndarray  # (N,) bool
    result: dict


def score(
    name: str, out: Path, tests: VerificationSet, embedded: Embedded, flip: bool, resamples: int
) -> Scores:
    angles = protocol.theta(embedded.rows[tests.left], embedded.rows[tests.right])  # (N,)
    folds = protocol.kfold_accuracy(angles, tests.same, tests.fold)
    thresholds = folds.threshold[tests.fold]  # (N,) the one that judged each pair
    right = (angles < thresholds) == tests.same  # (N,)
    result = {
        "model": {"name": name, "sha256": embedded.model_hash},
        "data": describe(tests),
        "flip": flip,
        **measure(angles, tests.same, tests.fold, folds, resamples),
    }
    result["pairs"] |= {"listed": len(tests), "folds": tests.folds_from}
    result["errors"] = {
        "false_positives": int((~right & ~tests.same).sum()),
        "false_negatives": int((~right & tests.same).sum()),
        "of_mislabelled": int((~right & tests.mislabelled).sum()),
    }
    return Scores(name, out, angles, thresholds, right, result)


def describe(tests: VerificationSet) -> dict:
    """What was compared, so that another run can be held against this one."""
    return {
        "set": printable(tests.name),
        "pairs": printable(tests.pairs_file.name),
        "pairs_sha256": sha256(tests.pairs_file),
        "crops_sha256": hashlib.sha256("".join(tests.hashes).encode()).hexdigest(),
        "photos": len(tests.photos),
        "undetected": [printable(photo.name) for photo in tests.photos if photo.undetected],
        "pairs_listed_as_mislabelled": int(tests.mislabelled.sum()),
        "pairs_of_one_picture": int((tests.left == tests.right).sum()),  # may be so in a .bin
    }


def measure(
    angles: np.ndarray, same: np.ndarray, fold: np.ndarray, folds: protocol.Folds, resamples: int
) -> dict:
    tuned, tuned_threshold = protocol.tuned_accuracy(angles, same)
    return {
        "pairs": {
            "scored": len(angles),
            "genuine": int(same.sum()),
            "impostor": int((~same).sum()),
        },
        "accuracy": {
            "mean": rate(folds.mean),
            "std": rate(folds.std),
            "standard_error": rate(folds.standard_error),
            "per_fold": [rate(value) for value in folds.accuracy],
            "threshold_degrees_per_fold": [degrees(value) for value in folds.threshold],
        },
        "threshold_tuned_on_test_pairs": {
            "accuracy": rate(tuned),
            "threshold_degrees": degrees(tuned_threshold),
        },
        "auc": rate(protocol.auc(angles, same)),
        "eer": rate(protocol.eer(angles, same)),
        "tar_at_far": {
            name: rate(protocol.tar_at_far(angles, same, far)) for name, far in FARS.items()
        },
        "d_prime": rate(protocol.d_prime(angles, same)),
        "theta_degrees": {
            "genuine": statistics(angles[same]),
            "impostor": statistics(angles[~same]),
        },
        "confidence_95": {
            "resamples": resamples,
            "seed": significance.SEED,
            **{
                name: [rate(value) for value in interval]
                for name, interval in significance.bootstrap(angles, same, fold, resamples).items()
            },
        },
    }


def statistics(angles: np.ndarray) -> dict[str, float]:
    named = {"mean": angles.mean(), "sigma": angles.std(), "min": angles.min(), "max": angles.max()}
    named |= {name: np.quantile(angles, share) for name, share in QUANTILES.items()}
    return {name: degrees(value) for name, value in named.items()}


def rate(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)


def degrees(value: float) -> float:
    return round(float(value), 4)


def pair_rows(tests: VerificationSet, scores: Scores) -> list[list[object]]:
    """A row a pair, in the order of their list, below one that names the columns."""
    names = [printable(photo.name) for photo in tests.photos]
    head = ["left", "right", "fold", "same", "theta_degrees", "threshold_degrees", "judged_right"]
    rows = [
        [names[left], names[right], fold, int(same), f"{theta:.6f}", f"{threshold:.6f}", int(ok)]
        for left, right, fold, same, theta, threshold, ok in zip(
            tests.left, tests.right, tests.fold, tests.same, scores.angles, scores.thresholds,
            scores.right, strict=True,
        )
    ]  # fmt: skip
    return [head, *rows]


# --- for people -----------------------------------------------------------------------------------


def percent(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"


def interval(result: dict, name: str, digits: int = 2) -> str:
    """`99.01 to 99.42 %`, or nothing where no resample was drawn or nothing was measured."""
    ends = result["confidence_95"].get(name)
    return f"{100 * ends[0]:.{digits}f} to {100 * ends[1]:.{digits}f} %" if ends else ""


def title(result: dict) -> str:
    accuracy = result["accuracy"]
    return (
        f"{result['model']['name']} on {result['data']['set']}: "
        f"{percent(accuracy['mean'])} ± {100 * accuracy['std']:.2f}"
    )


def summary(scores: Scores) -> dict[str, str]:
    """What the console says, in its order."""
    result = scores.result
    pairs, accuracy, theta = result["pairs"], result["accuracy"], result["theta_degrees"]
    cuts, tuned = accuracy["threshold_degrees_per_fold"], result["threshold_tuned_on_test_pairs"]
    undetected, errors = result["data"]["undetected"], result["errors"]
    names = ", ".join(data_gen.without_suffix(name) for name in undetected[:5])
    more = f" and {len(undetected) - 5} more (eval.json)" if len(undetected) > 5 else ""
    faces = "all with a detected face"
    if undetected:
        faces = f"{len(undetected)} with fixed landmarks (undetected): {names}{more}"
    elif is_packed(Path(result["data"]["pairs"])):
        faces = "aligned by whoever made the file"
    bounds = interval(result, "accuracy")
    marked = result["data"]["pairs_listed_as_mislabelled"]
    twins = result["data"]["pairs_of_one_picture"]
    return {
        "model": f"{scores.name}, sha256 {result['model']['sha256'][:12]}, "
        + ("crop + mirror image" if result["flip"] else "one crop"),
        "pairs": f"{pairs['scored']} of {pairs['listed']} pairs scored "
        f"({pairs['genuine']} genuine, {pairs['impostor']} impostor; {pairs['folds']})"
        + (f"; {twins} hold the same picture twice" if twins else ""),
        "photos": f"{result['data']['photos']} of {result['data']['set']}, " + faces,
        "accuracy": f"{percent(accuracy['mean'])} ± {100 * accuracy['std']:.2f} over "
        f"{len(cuts)} folds, standard error {100 * accuracy['standard_error']:.2f}"
        + (f", 95 % interval {bounds}" if bounds else ""),
        "threshold": f"{np.mean(cuts):.2f}° ({min(cuts):.2f}° to {max(cuts):.2f}° over the folds)",
        "tuned": f"{percent(tuned['accuracy'])} with the threshold chosen on the test pairs "
        f"({tuned['threshold_degrees']:.2f}°; for comparison with older papers only)",
        "AUC": percent(result["auc"], 3),
        "EER": percent(result["eer"]),
        **{
            f"TAR@FAR={far}": percent(tar) if tar is not None else "n/a (too few impostor pairs)"
            for far, tar in result["tar_at_far"].items()
        },
        "d'": "n/a (no spread)" if result["d_prime"] is None else f"{result['d_prime']:.2f}",
        "theta": ", ".join(
            f"{kind} {theta[kind]['mean']:.1f}° ± {theta[kind]['sigma']:.1f}°" for kind in theta
        ),
        "wrong": f"{errors['false_positives']} false positives, "
        f"{errors['false_negatives']} false negatives"
        + (f", {errors['of_mislabelled']} of them among the {marked} pairs that LFW's authors "
           "list as mislabelled" if marked else ""),
        "report": printable(str(scores.out / "report.html")),
    }  # fmt: skip
