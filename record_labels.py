"""The labels of a .rec, for millions of records: from its identity records, or from one pass.

    labels, damaged = read_labels(records, records.images())     # int32 (N,), and what is wrong

The pass reads the whole file, 100 GB for the largest sets, so its labels are kept beside it, as
train.labels.npz, and used again while size and time of .rec and .idx are the same.
"""

import os
import zipfile

import numpy as np

from checkpoint import write_atomic
from config import InputError
from recordio import BadRecord, RecordFile


def read_labels(
    records: RecordFile, numbers: np.ndarray, skip_bad: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """-> int32 (N,) labels of the photos, -1 where `skip_bad` passed one over; and the faults.

    With `skip_bad` all records are looked at. Raises InputError: without it, for the first fault.
    """
    labels = None if skip_bad else records.labels_by_range(len(numbers))
    if labels is None:
        labels = _scan(records, numbers)
    bad = numbers[labels < 0].tolist()
    damaged = tuple(_fault(records, number) for number in bad)
    if damaged and not skip_bad:
        raise InputError(f"{damaged[0]}; or leave out such records with --skip-bad ({len(bad):,})")
    return labels, damaged


def _scan(records: RecordFile, numbers: np.ndarray) -> np.ndarray:
    """The labels of all headers, from the file beside the set where that is still true."""
    cache = records.path.with_suffix(".labels.npz")
    files = [os.stat(records.path), os.stat(records.path.with_suffix(".idx"))]
    stamp = np.array([(file.st_size, file.st_mtime_ns) for file in files], dtype=np.int64)
    try:
        with np.load(cache, allow_pickle=False) as kept:
            if np.array_equal(kept["stamp"], stamp) and len(kept["labels"]) == len(numbers):
                return kept["labels"].astype(np.int32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # none yet, or a damaged one
    print(f"Reading the labels of {len(numbers):,} records, once", flush=True)
    labels, _ = records.scan(numbers)
    try:
        write_atomic(cache, lambda file: np.savez(file, stamp=stamp, labels=labels))
    except OSError as error:  # a read-only folder: the next run reads them again
        print(f"The labels are not kept: {cache}: {error.strerror}")
    return labels


def _fault(records: RecordFile, number: int) -> str:
    try:
        records.label(number)
    except BadRecord as error:
        return str(error)
    return f"{records.path}: record {number} was damaged when it was first read"
