"""Train a backbone with a margin head on a prepared folder; CUDA or CPU.

    python train.py                                      # what `pre_process.py` prepared by default
    python train.py --data data/faces --network se-r18 --width 0.25 --epochs 2 --name first
    python train.py --data data/faces --recipe small-cpu             # 2 CPU cores
    python train.py --data data/casia --recipe casia-r50             # one GPU
    python train.py --data data/faces --name first --resume          # go on where it stopped
    tensorboard --logdir runs

Reads <data>/manifest.csv and the crops that it names. Writes runs/<name>/:
    best.safetensors   the weights with the best validation accuracy, for lfw_eval.py
    last.pt            all that --resume needs; previous.pt is the one before
    config.json        the options and what ran; result.json once the run is finished
    events...          TensorBoard
Validation uses identities held out of the training set, or the pairs given by --val-pairs.

Legend of shapes: N batch, C identities, E embedding size.
"""

import config

if __name__ == "__main__":
    # Before torch is imported, so that --help and a wrong option answer at once.
    OPTIONS = config.parse(config.TrainOptions, __doc__)

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

import checkpoint
import data_gen
import models
import protocol
import utils
from arcface import ArcMarginHead, cosface_head, focal_loss
from config import InputError, TrainOptions

# What may differ between a run and its continuation: not what is computed, but where and how it is
# watched. (Another device or number of threads rounds differently, so the last bits may differ.)
FREE = (
    "resume",
    "runs",
    "workers",
    "timeout",
    "log_every",
    "save_every",
    "device",
    "threads",
    "recipe",
)


def main(options: TrainOptions) -> int:
    # ---- settings
    options = with_defaults(options)
    check_options(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = utils.pick_device(options.device)
    amp = pick_amp(options.amp, device)
    run = options.runs / options.name
    if open_run(run, options) == "finished":
        return 0

    # ---- data
    faces = data_gen.load_faces(options.data, options.min_images, options.skip_bad)
    print(
        f"{len(faces):,} photos of {len(faces.identities):,} identities in {options.data}"
        + (f" ({faces.left_out:,} others have no face, or too few)" if faces.left_out else "")
    )
    if faces.damaged:
        print(f"WARNING: {len(faces.damaged):,} damaged records are left out: {faces.damaged[0]}")
    faces, validation = make_validation(faces, options)
    check_size(faces, options)
    print(f"validation: {validation.what}" if validation else "no validation")

    run.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock(run), Stop() as stop:
        if faces.damaged:
            lines = "".join(f"{line}\n" for line in faces.damaged)
            checkpoint.write_atomic(run / "skipped.txt", lines.encode())
        return train(run, options, faces, validation, device, amp, stop)


def train(
    run: Path,
    options: TrainOptions,
    faces: data_gen.FaceSet,
    validation: "Validation | None",
    device: torch.device,
    amp: torch.dtype | None,
    stop: "Stop",
) -> int:
    """The run from its first or next step to its end -> exit code."""
    # ---- model and head
    torch.manual_seed(options.seed)
    backbone = models.create(
        options.network, options.embedding_size, options.dropout, options.width
    )
    head = make_head(options, len(faces.identities))
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    backbone = backbone.to(device, memory_format=memory_format)
    head = head.to(device)
    size = models.count_parameters(backbone) / 1e6
    print(
        f"{options.network} width {options.width:g}: {size:.2f} M parameters, "
        f"{utils.hardware(device)}, {amp or 'fp32'}"
    )

    # ---- optimizer
    optimizer = make_optimizer(backbone, head, options)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    # ---- resume
    step, best = 0, -1.0
    photos = faces.digest()  # once: it reads all names, millions in a large set
    if (run / checkpoint.LAST).exists() or (run / checkpoint.PREVIOUS).exists():
        saved, warnings = checkpoint.load_checkpoint(run)
        for warning in warnings:
            print(f"WARNING: {warning}", file=sys.stderr)
        check_classes(saved, faces, photos, run)
        step, best = restore(saved, backbone, head, optimizer, scaler, device)
        print(f"going on from step {step}")
    sampler = data_gen.RunSampler(
        len(faces), options.batch_size, options.epochs, options.seed, step
    )
    loader = data_gen.make_loader(
        faces, sampler, options.augment, options.workers, options.timeout, device.type == "cuda"
    )
    write_config(run, options, faces, device, amp)
    # What a killed run logged after its last checkpoint is logged again: one value a step.
    writer = SummaryWriter(str(run), purge_step=step + 1)
    if not step:
        writer.add_text("options", options_table(options), 0)

    def save() -> None:
        writer.flush()  # the curves reach as far as the checkpoint
        checkpoint.save_checkpoint(
            run,
            {
                "format": 1,
                "step": step,
                "best": best,
                "backbone": backbone.state_dict(),
                "head": head.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
                "identities": faces.identities,
                "photos": photos,
                "options": plain(options),
            },
        )

    # ---- loop
    log = Log(writer, options, sampler, step)
    backbone.train()
    for batch in log.timed(data_gen.batches(loader)):
        if step == sampler.start:
            writer.add_image("augmented", face_grid(batch.crops), step)
        rate = learning_rate(step, sampler.steps, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        labels = batch.labels.to(device, non_blocking=True)  # (N,)
        inputs = utils.to_batch(batch.crops, device)  # (N, 3, 112, 112)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            embeddings = backbone(inputs)  # (N, E)
        logits, own, other = head(embeddings, labels, return_angles=True)  # (N, C), (N,), (N,)
        loss = focal_loss(logits, labels, options.focal_gamma).mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = clip_gradient(backbone, head, options.clip_norm)
        check_finite(loss, norm, scaler, step, rate, batch, faces)
        scaler.step(optimizer)
        scaler.update()
        step += 1
        log.step(step, loss, own, other, norm, rate, len(labels))

        ended = step % sampler.steps_per_epoch == 0
        if ended and (validation or step == sampler.steps):
            accuracy = validation.accuracy(backbone, device) if validation else math.nan
            log.validation(step, accuracy)
            if not accuracy <= best:  # better, or there is none to compare
                best = max(best, accuracy) if validation else best
                save_best(run, backbone, options, faces, accuracy)
        if ended or step % options.save_every == 0 or stop.code:
            save()
        if stop.code and step < sampler.steps:
            writer.close()
            print(f"stopped at step {step}; --resume goes on from there")
            return stop.code

    # ---- end
    writer.close()
    result = {"steps": step, "validation": best if validation else None}
    checkpoint.write_json(run / "result.json", result)
    said = f"best validation accuracy {best:.2%}, " if validation else ""
    print(f"{run} is finished: {said}{step} steps; next: python lfw_eval.py --model {run}")
    return 0


# --------------------------------------------------------------------------------------------------
# settings


def with_defaults(options: TrainOptions) -> TrainOptions:
    """Fill in what depends on the machine and on which data there is."""
    data, resume = options.data, options.resume
    if data is None and config.RAW.exists():
        data = config.DATA / "faces"
    folder = data.parent if data and data.suffix == ".rec" else data
    name = options.name or options.recipe or (folder.resolve().name if folder else "demo")
    if data is None:
        print("No --data and no data/raw: using the embedded synthetic faces (data/synthetic).")
        data = config.SYNTHETIC / "train"
        # `make demo` is one command: it goes on where it stopped.
        resume = resume or (name == "demo" and (options.runs / name / checkpoint.LAST).exists())
    workers = options.workers
    if workers < 0:
        on_cuda = utils.pick_device(options.device).type == "cuda"
        workers = min(8, torch.multiprocessing.cpu_count()) if on_cuda else 1
    return replace(options, data=data, name=name, resume=resume, workers=workers)


def check_options(options: TrainOptions) -> None:
    """Refuse what would be ignored."""
    default = TrainOptions()
    for flag, name, heads in (
        ("--m1", "m1", ("combined",)),
        ("--m3", "m3", ("combined", "cosface")),
        ("--easy-margin", "easy_margin", ("combined", "arcface")),
    ):
        if getattr(options, name) != getattr(default, name) and options.head not in heads:
            raise InputError(
                f"{flag} is not of --head {options.head}: it takes {' or '.join(heads)}"
            )
    if (options.val_pairs is None) != (options.val_data is None):
        raise InputError("--val-pairs needs --val-data, the prepared folder that they name")
    if "/" in options.name or options.name in (".", ".."):
        raise InputError(f"--name {options.name} is no name of a folder: use --runs for the place")


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision; bf16 needs no loss scaling, fp16 is for older cards."""
    if name == "off" or (name == "auto" and device.type == "cpu"):
        return None
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16 needs CUDA: on a CPU use --amp bf16 or --amp off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[name]


def plain(options: TrainOptions) -> dict[str, object]:
    """Options as JSON and a weights-only checkpoint can hold them."""

    def plainly(value: object) -> object:
        if isinstance(value, Path):
            return config.canonical(value)
        return list(value) if isinstance(value, tuple) else value

    return {key: plainly(value) for key, value in dataclasses.asdict(options).items()}


def open_run(run: Path, options: TrainOptions) -> str:
    """-> "new", "unfinished" or "finished". Raises InputError: the folder holds another run."""
    path = run / "config.json"
    if not path.exists():
        if options.resume:
            raise InputError(f"{run} holds no run to resume: check --name, or leave out --resume")
        return "new"
    old = json.loads(path.read_text())["options"]
    new = plain(options)
    changed = [key for key in new if key not in FREE and old.get(key) != new[key]]
    if changed:
        said = ", ".join(f"{key} {old.get(key)}, now {new[key]}" for key in changed[:5])
        raise InputError(
            f"{run} was trained with other options ({said}): repeat those (config.json), or choose "
            "another --name"
        )
    if (run / "result.json").exists():
        print(f"{run} is finished with these options; nothing to do")
        return "finished"
    if not (run / checkpoint.LAST).exists() and not (run / checkpoint.PREVIOUS).exists():
        return "new"  # stopped before its first checkpoint
    if not options.resume:
        raise InputError(f"{run} is unfinished: add --resume to go on, or choose another --name")
    return "unfinished"


def write_config(
    run: Path,
    options: TrainOptions,
    faces: data_gen.FaceSet,
    device: torch.device,
    amp: torch.dtype | None,
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    what_ran = {
        "options": plain(options),
        "commit": utils.commit(),
        "torch": torch.__version__,
        "hardware": utils.hardware(device),
        "precision": str(amp or torch.float32),
        "photos": len(faces),
        "identities": len(faces.identities),
    }
    checkpoint.write_json(run / "config.json", what_ran)
    for key, value in sorted(plain(options).items()):
        print(f"  {key:15} {value}")
    print(f"  commit {what_ran['commit']}, torch {torch.__version__}, run {run}")


def options_table(options: TrainOptions) -> str:
    rows = [f"| {key} | {value} |" for key, value in sorted(plain(options).items())]
    return "\n".join(["| option | value |", "|---|---|", *rows])


# --------------------------------------------------------------------------------------------------
# data


def check_size(faces: data_gen.FaceSet, options: TrainOptions) -> None:
    if len(faces) < options.batch_size:
        raise InputError(
            f"{options.data} leaves {len(faces)} photos to train on, fewer than one batch of "
            f"{options.batch_size}: lower --batch-size or add photos"
        )


class Validation:
    """Crops and pairs that are scored after each epoch."""

    def __init__(
        self,
        photos: int,
        read: Callable[[int], np.ndarray],
        pairs: np.ndarray,
        same: np.ndarray,
        fold: np.ndarray,
        what: str,
    ):
        self.photos, self.read = photos, read  # index -> uint8 (112, 112, 3)
        self.pairs, self.same, self.fold, self.what = pairs, same, fold, what

    def accuracy(self, backbone: nn.Module, device: torch.device, size: int = 64) -> float:
        """Share of pairs told right, the threshold chosen on the other folds."""
        backbone.eval()
        embeddings = []
        for start in range(0, self.photos, size):
            crops = [self.read(index) for index in range(start, min(start + size, self.photos))]
            embeddings.append(utils.embed(backbone, np.stack(crops)))
        backbone.train()
        table = np.concatenate(embeddings)  # (P, E)
        if not np.isfinite(table).all():
            raise InputError("the network gives embeddings that are not finite: lower --lr")
        angles = protocol.theta(table[self.pairs[:, 0]], table[self.pairs[:, 1]])
        return protocol.kfold_accuracy(angles, self.same, self.fold).mean


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
        what = f"{len(pairs):,} pairs of {options.val_pairs}"
        both = np.stack([left, right], axis=1)  # (P, 2)

        def read(index: int) -> np.ndarray:
            return data_gen.read_crop(photos[index].crop)

        return faces, Validation(len(photos), read, both, pairs.same, pairs.fold, what)
    rest, held_out = data_gen.hold_out(faces, options.val_identities, options.seed)
    if held_out is None:
        return faces, None
    pairs, same = data_gen.make_pairs(held_out, options.seed)
    if len(pairs) < 40:  # ten folds of a few pairs; a figure from fewer would say nothing
        return faces, None
    fold = np.random.default_rng(0).permutation(len(pairs)) % 10
    what = (
        f"{len(pairs):,} pairs of {len(held_out):,} photos of "
        f"{len(held_out.identities)} held-out identities"
    )
    return rest, Validation(len(held_out), held_out.read, pairs, same, fold, what)


def face_grid(crops: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 112, 112, 3) -> one picture, uint8 (3, H, W), of the first 32."""
    return make_grid(crops[:32].permute(0, 3, 1, 2), nrow=8, padding=2)


# --------------------------------------------------------------------------------------------------
# head, optimizer, schedule


def make_head(options: TrainOptions, num_identities: int) -> ArcMarginHead:
    size = options.embedding_size
    if options.head == "cosface":
        return cosface_head(size, num_identities, options.s, options.m3)
    combined = options.head == "combined"
    return ArcMarginHead(
        size,
        num_identities,
        s=options.s,
        m=options.m,
        m1=options.m1 if combined else 1.0,
        m3=options.m3 if combined else 0.0,
        easy_margin=options.easy_margin,
    )


def make_optimizer(
    backbone: nn.Module, head: nn.Module, options: TrainOptions
) -> torch.optim.Optimizer:
    """SGD; weight decay on matrices and kernels alone, not on BN, biases and PReLU slopes."""
    trained = [
        parameter
        for module in (backbone, head)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """The rate of step 0 .. steps-1: linear warm-up, then the schedule over what is left.

    Scaled with the batch (Goyal et al. 2017): `lr` is meant for `lr_batch` photos.
    """
    peak = options.lr * (options.batch_size / options.lr_batch if options.lr_batch else 1.0)
    warmup = round(options.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)  # 0 .. 1
    if options.schedule == "step":
        return peak * 0.1 ** sum(step / steps >= milestone for milestone in options.milestones)
    if options.schedule == "poly":  # power 2, as the official trainer
        return peak * (1 - done) ** 2
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradient(backbone: nn.Module, head: nn.Module, limit: float) -> torch.Tensor:
    """Scale the gradient down to the norm `limit` (0: leave it) -> its norm before."""
    parameters = [*backbone.parameters(), *head.parameters()]
    return nn.utils.clip_grad_norm_(parameters, limit or math.inf)


def check_finite(
    loss: torch.Tensor,
    norm: torch.Tensor,
    scaler: torch.amp.GradScaler,
    step: int,
    rate: float,
    batch: data_gen.Batch,
    faces: data_gen.FaceSet,
) -> None:
    """Stop before an update that would ruin the weights. With fp16 the scaler skips overflows.

    note: reading the norm is a CPU-GPU sync point.
    """
    if math.isfinite(norm) or (scaler.is_enabled() and math.isfinite(loss)):
        return
    photos = ", ".join(faces.name(index) for index in batch.indices[:4].tolist())
    raise InputError(
        f"loss {loss.item():g} and gradient norm {norm.item():g} at step {step}, learning rate "
        f"{rate:g}, photos {photos}, ...: the update was "
        "not made; train with a lower --lr under another --name"
    )


# --------------------------------------------------------------------------------------------------
# checkpoints


def check_classes(saved: dict, faces: data_gen.FaceSet, photos: str, run: Path) -> None:
    """A class number must mean the same identity as before, and an index the same photo."""
    if saved["identities"] != faces.identities or saved["photos"] != photos:
        raise InputError(
            f"{run} was trained on {len(saved['identities'])} identities, and the data now give "
            f"{len(faces.identities)}, or other photos: restore them, or choose another --name"
        )


def restore(
    saved: dict,
    backbone: nn.Module,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> tuple[int, float]:
    """Put a checkpoint back -> step and best validation accuracy."""
    backbone.load_state_dict(saved["backbone"])
    head.load_state_dict(saved["head"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"])
    if device.type == "cuda" and saved["rng_cuda"]:
        torch.cuda.set_rng_state_all(saved["rng_cuda"])
    return saved["step"], saved["best"]


def save_best(
    run: Path,
    backbone: nn.Module,
    options: TrainOptions,
    faces: data_gen.FaceSet,
    accuracy: float,
) -> None:
    """The weights with all that a user of them must know."""
    metadata = {
        "network": options.network,
        "width": repr(options.width),
        "embedding_size": str(options.embedding_size),
        "input": "112x112 RGB, (x - 127.5) / 127.5",
        "identities": str(len(faces.identities)),
        "photos": str(len(faces)),
        "validation_accuracy": f"{accuracy:.6f}",
        "commit": utils.commit(),
    }
    checkpoint.save_weights(run / checkpoint.BEST, backbone.state_dict(), metadata)


class Stop:
    """SIGTERM and Ctrl-C end the run after the step, with a checkpoint; a second one at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> "Stop":
        self.code = 0
        self.before = [signal.signal(number, self._ask) for number in self.SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        signal.signal(number, signal.SIG_DFL)


# --------------------------------------------------------------------------------------------------
# what a person sees


class Log:
    """Console and TensorBoard: means over an interval, and the share of time spent waiting."""

    def __init__(
        self, writer: SummaryWriter, options: TrainOptions, sampler: data_gen.RunSampler, step: int
    ):
        self.writer, self.every, self.sampler = writer, options.log_every, sampler
        self.start, self.first = time.perf_counter(), step
        self._clear()

    def _clear(self) -> None:
        self.seconds = self.waited = 0.0
        self.photos = 0
        self.losses: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []
        self.other: list[torch.Tensor] = []

    def timed(self, batches):
        """The same batches; the time that they are waited for is counted."""
        iterator = iter(batches)
        while True:
            self.step_start = time.perf_counter()  # a step ends in `step`: validation is not in it
            batch = next(iterator, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - self.step_start
            yield batch

    def step(self, step, loss, own, other, norm, rate, photos) -> None:
        self.seconds += time.perf_counter() - self.step_start
        self.photos += photos
        self.losses.append(loss.detach())  # read at the end of the interval: no sync a step
        self.own.append(own)
        self.other.append(other)
        if step % self.every and step != self.sampler.steps:
            return
        own, other = torch.cat(self.own), torch.cat(self.other)  # (K,) degrees
        values = {
            "train/loss": torch.stack(self.losses).mean().item(),
            "train/accuracy": (own < other).float().mean().item(),
            "train/learning_rate": rate,
            "train/gradient_norm": float(norm),
            "speed/photos_per_second": self.photos / self.seconds,
            "speed/waiting_for_data": self.waited / self.seconds,
        }
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.add_histogram("theta/own", own, step)
        self.writer.add_histogram("theta/nearest_other", other, step)
        left = (time.perf_counter() - self.start) / (step - self.first)
        left = int(left * (self.sampler.steps - step))
        print(
            f"step {step:6}/{self.sampler.steps}  epoch {step / self.sampler.steps_per_epoch:6.2f}"
            f"  loss {values['train/loss']:7.3f}  acc {values['train/accuracy']:6.1%}"
            f"  theta {own.mean():5.1f} / {other.mean():5.1f}  lr {rate:.4f}"
            f"  grad {float(norm):6.2f}  {self.photos / self.seconds:6.1f} photos/s"
            f"  wait {self.waited / self.seconds:5.1%}  left {left // 60}:{left % 60:02d}",
            flush=True,
        )
        self._clear()

    def validation(self, step: int, accuracy: float) -> None:
        if math.isfinite(accuracy):
            self.writer.add_scalar("validation/accuracy", accuracy, step)
            print(f"validation accuracy {accuracy:.2%} after step {step}", flush=True)


if __name__ == "__main__":
    config.run(main, OPTIONS)
