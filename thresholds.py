"""The angle below which two faces are taken for one person, and what is known of it.

threshold = pick(None, load_backbone("runs/first"), file)    # None: the model carries none
print(decision(38.6, threshold), threshold)
"""

from pathlib import Path
from typing import NamedTuple

import torch

import config
from config import InputError
from photo_folders import one_line

LONGEST = 200  # letters that a model may say of where it comes from


class Threshold(NamedTuple):
    degrees: float
    far: float | None  # None: the user's, whose rate is not known
    impostor_pairs: int | None
    taken_on: str = ""  # whose pairs these are
    started_from: str = ""  # the weights before a fine-tuning
    tar: float | None = None  # share of the genuine pairs that it accepts; None: not known

    def __str__(self) -> str:
        return "; ".join(self.parts())

    def parts(self) -> list[str]:
        """For one line, or for several where there is less room."""
        if self.far is None:
            return [f"threshold {self.degrees:.2f}°, as named", "its false accept rate is unknown"]
        whose = f" of {self.taken_on}" if self.taken_on else ""
        genuine = "" if self.tar is None else f" and {100 * self.tar:.0f} in 100 genuine ones"
        accepts = f"accepts 1 in {1 / self.far:,.0f} impostor pairs{genuine}"
        parts = [
            f"threshold {self.degrees:.2f}° {accepts}",
            f"taken on {self.impostor_pairs:,} impostor pairs{whose}",
        ]
        if config.has_seen_photos(self.started_from):
            parts.append(
                f"the weights that it started from ({self.started_from}) may have seen these people"
            )
        return parts


def pick(named: float | None, network: torch.nn.Module, file: Path) -> Threshold | None:
    """The user's, in degrees, else the model's, else None.

    Raises InputError: what the model carries is no threshold.
    """
    if named is not None:
        return Threshold(named, None, None)
    kept = {key: value for key, value in network.metadata.items() if key.startswith("threshold_")}
    if not kept:
        return None
    try:
        degrees, far = float(kept["threshold_degrees"]), float(kept["threshold_far"])
        if not (0 < degrees < 180 and 0 < far < 1):
            raise ValueError(f"{degrees}° at {far}")
        tar = float(kept["threshold_tar"]) if "threshold_tar" in kept else None
        if tar is not None and not 0 <= tar <= 1:
            raise ValueError(f"accepts {tar} of the genuine pairs")
        about = (
            one_line(network.metadata.get(key, ""))[:LONGEST] for key in ("threshold_from", "init")
        )
        return Threshold(degrees, far, int(kept["threshold_impostor_pairs"]), *about, tar)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{file} carries a threshold that is none ({error}): name one with --threshold"
        ) from error


def decision(angle: float, threshold: Threshold) -> str:
    return "the same person" if angle < threshold.degrees else "different people"


def lines(threshold: Threshold | None) -> list[str]:
    if threshold is not None:
        return [str(threshold)]
    return [
        "no decision: the model carries no threshold; train.py stores one that it takes on "
        "held-out people, or name one with --threshold, such as that of lfw_eval.py's report"
    ]
