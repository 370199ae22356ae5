"""From photos to crops: pre_process.py's way against the plain loop of facenet-pytorch, in turns.

    python benchmarks/detect.py --src path/to/lfw-deepfunneled.tgz --photos 1000

The plain loop: MTCNN(keep_all=True).detect(photo, landmarks=True), the same choice of a face, the
same warp and file, photo after photo with torch's default number of threads. Both read from disk
and write to disk; starting Python and loading torch are in neither time, starting the workers is in
ours. A round is half of the plain loop, all of ours, the other half. Also told: how many of the
plain loop's boxes ours has, and where the time goes in one process.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import align_faces
import archives
import crop_faces
import detect_faces
import images
import mtcnn
import pre_process
import pyramid
import utils
from config import PreProcessOptions

# What is timed by itself, and the name of its share.
STAGES = [
    (crop_faces, "read_image", "reading JPEG"),
    (pyramid, "sum_table", "tables of sums"),
    (pyramid.Canvas, "draw", "drawing canvases"),
    (mtcnn, "propose", "PNet"),
    (pyramid, "crop_boxes", "resampling crops"),
    (mtcnn, "refine", "RNet and ONet"),
    (align_faces, "warp", "warping"),
    (crop_faces, "write_crop", "writing JPEG"),
    (crop_faces.Worker, "process", "boxes, suppression and the rest"),
    (torch.nn.functional, "conv2d", "convolutions"),
    (torch.nn.functional, "prelu", "PReLU"),
    (mtcnn, "_pool", "max-pooling"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--src", type=Path, required=True, help="folder or archive of photos")
    parser.add_argument("--photos", type=int, default=1000, help="evenly spaced among all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=-1, help="of ours; -1: one a core")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, scratch = options.src, Path(folder)
        if archives.is_archive(root):
            archives.unpack(root, scratch / "source")
            root = archives.strip_wrapper(scratch / "source")
        photos = pre_process.list_photos(root).photos
        photos = photos[:: max(1, len(photos) // options.photos)][: options.photos]
        for name in {os.path.dirname(photo.image) for photo in photos}:
            (scratch / "plain" / name).mkdir(parents=True)
        settings = dataclasses.replace(PreProcessOptions(), workers=options.workers)
        compare(root, photos, scratch, settings, options.rounds)


def compare(root, photos, scratch: Path, settings: PreProcessOptions, rounds: int) -> None:
    from facenet_pytorch import MTCNN

    # In a process of its own, which forks: this one has threads as soon as it has computed.
    context = multiprocessing.get_context("spawn")
    ours = ProcessPoolExecutor(1, context)
    plain, seconds, found = MTCNN(keep_all=True), [0.0, 0.0], []
    plain.detect(images.read_image(root / photos[0].source), landmarks=True)
    with ours:
        ours.submit(process, root, photos[:8], scratch / "warm", settings).result()
        for number in range(rounds):
            half = len(photos) // 2
            start = time.perf_counter()
            found = plain_loop(plain, root, photos[:half], scratch / "plain")
            seconds[0] += time.perf_counter() - start
            seconds[1] += ours.submit(
                process, root, photos, scratch / str(number), settings
            ).result()
            start = time.perf_counter()
            found += plain_loop(plain, root, photos[half:], scratch / "plain")
            seconds[0] += time.perf_counter() - start
            loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
            print(f"round {number + 1} of {rounds}; load of the machine {loads}", flush=True)
        shares = ours.submit(profile, root, photos[:200], scratch / "profile", settings).result()
        matched = ours.submit(match, root, photos, settings, found).result()
    rates = [rounds * len(photos) / taken for taken in seconds]
    print("\n| photos | plain loop | ours | times as fast | boxes matched | hardware |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {len(photos):,} of {root.name} | {rates[0]:.1f} photos/s, {torch.get_num_threads()} "
        f"threads | {rates[1]:.1f} photos/s | {rates[1] / rates[0]:.2f} | {matched} "
        f"| {utils.hardware(torch.device('cpu'))}, torch {torch.__version__} |\n"
    )
    print(shares)


def plain_loop(mtcnn, root: Path, photos, out: Path) -> list[tuple]:
    found = []
    for photo in photos:
        image = images.read_image(root / photo.source)
        boxes, scores, landmarks = mtcnn.detect(image, landmarks=True)
        found.append(([], []) if boxes is None else (boxes, landmarks))
        if boxes is None:
            continue
        faces = detect_faces.Faces(boxes, scores, landmarks)
        points = landmarks[detect_faces.central_face(faces, *image.shape[1::-1])]
        matrix = align_faces.similarity_transform(points)
        if matrix is not None:
            images.write_jpeg(out / photo.image, align_faces.warp(image, matrix))
    return found


def process(root: Path, photos, out: Path, settings: PreProcessOptions) -> float:
    """Ours -> seconds."""
    torch.set_num_threads(1)
    out.mkdir()
    start = time.perf_counter()
    done = sum(map(len, crop_faces.run(photos, root, out, settings, torch.device("cpu"))))
    assert done == len(photos)
    return time.perf_counter() - start


def match(root: Path, photos, settings: PreProcessOptions, found: list[tuple]) -> str:
    """How many of the plain loop's boxes have one of ours at IoU > 0.9, landmarks within 1 px."""
    detector = detect_faces.FaceDetector(
        settings.min_face_size, settings.thresholds, settings.factor
    )
    total = matched = ours = 0
    for photo, (boxes, landmarks) in zip(photos, found, strict=True):
        faces = detector.detect([images.read_image(root / photo.source)])[0]
        ours += len(faces)
        for box, points in zip(boxes, landmarks, strict=True):
            total += 1
            size = np.minimum(faces.boxes[:, 2:], box[2:]) - np.maximum(faces.boxes[:, :2], box[:2])
            shared = size.clip(0).prod(axis=1)
            areas = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(axis=1)
            iou = shared / (areas + (box[2:] - box[:2]).prod() - shared)
            near = np.abs(faces.landmarks - points).max(axis=(1, 2)) < 1
            matched += bool(((iou > 0.9) & near).any())
    return f"{matched:,} of {total:,} ({matched / max(total, 1):.2%}); ours: {ours:,}"


def profile(root: Path, photos, out: Path, settings: PreProcessOptions) -> str:
    """Milliseconds a photo in one process, each stage without those inside it."""
    torch.set_num_threads(1)
    (out / crop_faces.PARTS).mkdir(parents=True)
    worker = crop_faces.Worker(root, out, settings, "cpu")
    worker.process(photos)  # files and shapes become known
    taken: dict[str, float] = collections.defaultdict(float)
    inside: list[float] = []

    def timed(function: Callable, label: str) -> Callable:
        def call(*arguments, **named):
            inside.append(0.0)
            start = time.perf_counter()
            result = function(*arguments, **named)
            spent = time.perf_counter() - start
            taken[label] += spent - inside.pop()
            if inside:
                inside[-1] += spent
            return result

        return call

    for place, name, label in STAGES:
        setattr(place, name, timed(getattr(place, name), label))
    worker.process(photos)
    total = sum(taken.values())
    lines = ["| where one process spends its time | ms a photo | share |", "|---|---|---|"]
    for label, spent in sorted(taken.items(), key=lambda item: -item[1]):
        lines.append(f"| {label} | {spent / len(photos) * 1e3:.2f} | {spent / total:.0%} |")
    lines.append(f"| all | {total / len(photos) * 1e3:.2f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
