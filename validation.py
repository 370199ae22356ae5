"""The validation of a run: held-out identities, or given pairs such as LFW's View 1.

    faces, validation = make_validation(faces, options)      # the photos left to train on
    score = validation.score(backbone, device)               # k-fold accuracy, a threshold

Never LFW's View 2: that is the test. Legend of shapes: P crops, E embedding size.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import data_gen
import distributed
import protocol
import utils
from config import InputError, TrainOptions
from photo_folders import one_line

# False accept rates at which a threshold is taken: the first one that ten impostor pairs show. A
# stricter one than 1e-3 turns most genuine pairs away from a network that has seen few people.
_FARS = (1e-3, 1e-2, 1e-1)
_CROWD = 2000  # photos of held-out people, all of whose impostor pairs are looked at: 2 million


class Score(NamedTuple):
    accuracy: float  # share of pairs told right, the threshold chosen on the other folds
    threshold: float | None  # degrees; below it two photos are taken for one person
    far: float | None  # share of the impostor pairs below the threshold
    impostors: int  # pairs that it was taken on
    tar: float | None = None  # share of the genuine pairs below it


class Validation:
    """Crops and pairs that are scored after each epoch."""

    def __init__(
        self,
        photos: int,
        embedding_size: int,
        read: Callable[[int], np.ndarray],
        pairs: np.ndarray,
        same: np.ndarray,
        fold: np.ndarray,
        what: str,
        labels: np.ndarray | None = None,
    ):
        self.labels = labels  # (P,) of held-out people, where the photos are known as theirs
        self.photos, self.embedding_size = photos, embedding_size
        self.read = read  # index -> uint8 (112, 112, 3)
        self.pairs, self.same, self.fold = pairs, same, fold
        self.what = what  # whose pairs they are, without a path: it stands in published weights

    def score(self, backbone: nn.Module, device: torch.device, size: int = 64) -> Score:
        """The ranks share the crops; each gets the figures."""
        distributed.copy_buffers(backbone)
        most = -(-self.photos // distributed.ranks())  # of a rank, the last ones have fewer
        mine = range(self.photos)[distributed.rank() * most :][:most]
        table = torch.zeros(most, self.embedding_size, device=device)  # of a rank, maybe unused
        backbone.eval()
        for start in range(0, len(mine), size):
            try:
                crops = [self.read(index) for index in mine[start : start + size]]
            except InputError as error:  # of this rank's share: the others don't meet it
                raise InputError(str(error), local=True) from error
            part = torch.from_numpy(utils.embed(backbone, np.stack(crops)))
            table[start : start + len(part)] = part.to(device)
        backbone.train()
        table = distributed.gather(table)[: self.photos].cpu().numpy()  # (P, E)
        if not np.isfinite(table).all() or not table.any(axis=1).all():
            raise InputError("the network gives embeddings that are no directions: lower --lr")
        angles = protocol.theta(table[self.pairs[:, 0]], table[self.pairs[:, 1]])
        accuracy = protocol.kfold_accuracy(angles, self.same, self.fold).mean
        impostors = angles[~self.same] if self.labels is None else crowd(table, self.labels)
        for far in _FARS:
            if far * len(impostors) >= 10:
                threshold = protocol.threshold_at_far(impostors, far)
                tar = float((angles[self.same] < threshold).mean())
                return Score(accuracy, threshold, far, len(impostors), tar)
        return Score(accuracy, None, None, len(impostors))


def crowd(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Embeddings (P, E) and their identities -> angles of all impostor pairs, (N,) degrees.

    Of _CROWD photos spread over the set, where there are more.
    """
    pick = np.unique(np.linspace(0, len(table) - 1, _CROWD).astype(np.int64))
    unit = table[pick] / np.linalg.norm(table[pick], axis=1, keepdims=True)  # (Q, E)
    first, second = np.triu_indices(len(pick), k=1)
    other = labels[pick][first] != labels[pick][second]
    cosine = (unit @ unit.T)[first[other], second[other]]  # (N,)
    # No need for protocol.theta: its precision matters near 0 and 180, no impostor's angle.
    return np.degrees(np.arccos(cosine.clip(-1, 1).astype(np.float64)))


def make_validation(
    faces: data_gen.FaceSet, options: TrainOptions
) -> tuple[data_gen.FaceSet, Validation | None]:
    """-> the photos to train on, and the validation."""
    if options.val_pairs is not None:
        pairs = protocol.read_pairs(options.val_pairs)
        if len(pairs) == 6000 and pairs.left[0] == "Abel_Pacheco/Abel_Pacheco_0001":
            raise InputError(
                f"{options.val_pairs} is LFW's View 2, the test itself: validate on View 1, "
                "pairsDevTest.txt"
            )
        photos, left, right = data_gen.find_photos(pairs, options.val_data)
        what = one_line(options.val_pairs.name)
        both = np.stack([left, right], axis=1)  # (P, 2)

        def read(index: int) -> np.ndarray:
            return data_gen.read_crop(photos[index].crop)

        return faces, Validation(
            len(photos), options.embedding_size, read, both, pairs.same, pairs.fold, what
        )
    rest, held_out = data_gen.hold_out(faces, options.val_identities, options.seed)
    if held_out is None:
        return faces, None
    pairs, same = data_gen.make_pairs(held_out, options.seed)
    if len(pairs) < 40:  # ten folds of a few pairs; a figure from fewer would say nothing
        return faces, None
    fold = np.random.default_rng(0).permutation(len(pairs)) % 10
    what = f"{len(held_out):,} photos of {len(held_out.identities):,} held-out identities"
    return rest, Validation(
        len(held_out), options.embedding_size, held_out.read, pairs, same, fold, what,
        held_out.labels,
    )  # fmt: skip
