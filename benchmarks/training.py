"""Speed and memory of training, each beside a named baseline in the same run.

    python benchmarks/training.py                       # step, head and loader, CPU or CUDA
    python benchmarks/training.py --what step --networks se-r18 --width 0.5 --resolution 64
    python benchmarks/training.py --what head
    python benchmarks/training.py --what loader --data data/faces

step    one step of train.py against the same network run eagerly as the official trainer runs it:
        on a CPU in NCHW float32, on CUDA in NCHW with fp16 autocast and GradScaler; ours as it is,
        and compiled (with bf16 where the processor has it)
head    forward and backward of the margin head against the dense one-hot way and against a plain
        normalised linear layer with cross-entropy; time, and peak memory in a process of its own
loader  photos decoded and augmented by one process

The ways take turns, so that whatever else the machine does hits all; medians are printed, as
Markdown. The ways of a step run in processes of their own, since train.py sets up its process.
Legend of shapes: N batch, C identities, E embedding size.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

from own_process import OwnProcess, serve

import config
import data_gen
import manifest
import models
import train
import training_step
import utils
from arcface import ArcMarginHead
from images import write_jpeg

E = 512


@dataclass(frozen=True)
class Options:
    what: str = config.option(
        "all", "part of it", choices=("all", "step", "head", "loader", "memory", "turns")
    )
    networks: str = config.option("r18,r50", "of the step, with commas")
    width: float = config.option(1.0, "of the step's networks", above=0)
    resolution: int = config.option(112, "of the step's networks", low=16, high=112)
    batch_size: int = config.option(0, "of the step (0: 32 on a CPU, 256 on CUDA)", low=0)
    identities: int = config.option(85_164, "of the head", low=2)
    head_batch: int = config.option(128, "of the head", low=1)
    data: Path | None = config.option(None, "prepared set for the loader (default: drawn crops)")
    turns: int = config.option(5, "of each way", low=1)
    threads: int = config.option(2, "CPU threads", low=1)
    device: str = config.option("auto", "auto, cpu or cuda")
    way: str = config.option("", "for memory and turns, which this script calls for itself")


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    device = utils.pick_device(options.device)
    if options.what == "memory":
        print(peak_memory(options.way, options, device))
        return
    if options.what == "turns":
        take_turns(options, device)
        return
    print(f"{utils.hardware(device)}, torch {torch.__version__}, commit {utils.commit()}\n")
    if options.what in ("all", "step"):
        for network in options.networks.split(","):
            step(network, options, device)
    if options.what in ("all", "head"):
        head(options, device)
    if options.what in ("all", "loader"):
        loader(options)


def turns(ways: dict[str, Callable[[], object]], count: int, device: torch.device) -> dict:
    """Median seconds of each way, in turns after one to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(count + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


# --------------------------------------------------------------------------------------------------
# a step


def step(network: str, options: Options, device: torch.device) -> None:
    size = options.batch_size or (256 if device.type == "cuda" else 32)
    words = [__file__, "--what", "turns", "--networks", network, "--batch-size", str(size)]
    words += ["--threads", str(options.threads), "--device", device.type]
    words += ["--width", str(options.width), "--resolution", str(options.resolution)]
    workers = {name: OwnProcess([*words, "--way", name]) for name in STEPS}
    seconds = turns(workers, options.turns, torch.device("cpu"))
    peaks = {name: worker.close() for name, worker in workers.items()}
    print(
        f"| training step, {network}, width {options.width:g}, {options.resolution} px, "
        f"batch {size} | photos/s | ratio | GB at the peak |\n"
        "|---|---|---|---|"
    )
    base = seconds["official way"]
    for name, taken in seconds.items():
        rate = size * repeats(device) / taken
        print(f"| {name} | {rate:,.1f} | {base / taken:.2f} | {peaks[name]:.2f} |")
    print(flush=True)


def repeats(device: torch.device) -> int:
    """Steps a turn."""
    return 20 if device.type == "cuda" else 1


def take_turns(options: Options, device: torch.device) -> None:
    batch_size = options.batch_size
    crops = torch.randint(256, (batch_size, 112, 112, 3), dtype=torch.uint8)
    labels = torch.randint(1000, (batch_size,))
    batch = data_gen.Batch(crops, labels, torch.arange(batch_size))
    kind = config.TrainOptions(
        network=options.networks, width=options.width, resolution=options.resolution,
        batch_size=batch_size, compile=options.way == "train.py --compile",
    )  # fmt: skip
    run = STEPS[options.way](kind, batch, device)

    def turn() -> None:
        for _ in range(repeats(device)):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def peak() -> float:
        on_cuda = device.type == "cuda"
        return torch.cuda.max_memory_allocated() / 1e9 if on_cuda else resident("VmHWM") / 1e6

    serve(turn, peak)


def our_step(
    options: config.TrainOptions, batch: data_gen.Batch, device: torch.device
) -> Callable[[], object]:
    if device.type == "cpu":
        utils.keep_freed_memory()
    net = training_step.build(options, 1000, device, train.pick_amp(options, device))
    net.backbone.train()

    def run() -> None:
        entropy, _, _ = training_step.backward(net, batch, 0, options)
        norm = training_step.gradient_norm(net)
        _, _, norm_ok = training_step.agree(0, entropy, norm)
        training_step.update(net, norm, norm_ok, 0.01, options.clip_norm)

    return run


def official_step(
    options: config.TrainOptions, batch: data_gen.Batch, device: torch.device
) -> Callable[[], object]:
    """Float crops in NCHW, torch's own layers, clipping to 5, SGD; on CUDA fp16 and GradScaler."""
    backbone = training_step.new_backbone(options).to(device).train()
    for module in backbone.modules():
        for name, child in module.named_children():
            if isinstance(child, models.PReLU):
                setattr(module, name, nn.PReLU(child.num_parameters).to(device))
    head = DenseOneHot(1000).to(device)
    optimizer = torch.optim.SGD(
        [*backbone.parameters(), *head.parameters()], lr=0.01, momentum=0.9, weight_decay=5e-4
    )
    on_cuda = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_cuda)

    def run() -> None:
        inputs = batch.crops.to(device).permute(0, 3, 1, 2).contiguous().float()
        inputs.div_(127.5).sub_(1.0)  # (N, 3, 112, 112)
        labels = batch.labels.to(device)
        with torch.autocast(device.type, dtype=torch.float16, enabled=on_cuda):
            embeddings = backbone(inputs)  # (N, E)
        loss = head(embeddings.float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        scaler.step(optimizer)
        scaler.update()

    return run


STEPS = {"official way": official_step, "train.py": our_step, "train.py --compile": our_step}


# --------------------------------------------------------------------------------------------------
# the head


class Plain(nn.Module):
    """Normalised linear layer and cross-entropy: the least that a cosine classifier costs."""

    def __init__(self, num_identities: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_identities, E) * 0.01)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))  # (N, C)
        return F.cross_entropy(cosine * 64.0, labels)


class DenseOneHot(Plain):
    """The margin as early ArcFace repos write it: one_hot * phi + (1 - one_hot) * cosine."""

    def forward(self, x: Tensor, labels: Tensor, s: float = 64.0, m: float = 0.5) -> Tensor:
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))  # (N, C)
        sine = torch.sqrt((1.0 - cosine**2).clamp(0, 1))
        phi = cosine * math.cos(m) - sine * math.sin(m)
        phi = torch.where(cosine > math.cos(math.pi - m), phi, cosine - math.sin(math.pi - m) * m)
        one_hot = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1)  # (N, C)
        return F.cross_entropy((one_hot * phi + (1.0 - one_hot) * cosine) * s, labels)


class Ours(nn.Module):
    def __init__(self, num_identities: int):
        super().__init__()
        self.head = ArcMarginHead(E, num_identities)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits, _, _ = self.head(x, labels, return_angles=True)  # as train.py has it
        return F.cross_entropy(logits, labels)


HEADS = {"dense one-hot": DenseOneHot, "plain linear": Plain, "ArcMarginHead": Ours}


def one_pass(name: str, options: Options, device: torch.device) -> Callable[[], object]:
    head = HEADS[name](options.identities).to(device)
    x = torch.randn(options.head_batch, E, device=device, requires_grad=True)
    labels = torch.randint(options.identities, (options.head_batch,), device=device)

    def run() -> None:
        x.grad = None
        head.zero_grad()
        head(x, labels).backward()

    return run


def peak_memory(name: str, options: Options, device: torch.device) -> float:
    """MB that a pass adds at its peak to what lay there before: centres, and on a CPU torch."""
    run = one_pass(name, options, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1e3


def resident(what: str) -> int:
    """kB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])


def head(options: Options, device: torch.device) -> None:
    memory = {}
    for name in HEADS:
        command = [sys.executable, __file__, "--what", "memory", "--way", name]
        command += ["--identities", str(options.identities), "--threads", str(options.threads)]
        command += ["--head-batch", str(options.head_batch), "--device", device.type]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[name] = float(done.stdout)
    ways = {name: one_pass(name, options, device) for name in HEADS}
    seconds = turns(ways, options.turns, device)
    base, least = "dense one-hot", "plain linear"
    print(
        f"| head of {options.identities:,} identities, batch {options.head_batch} | ms | of dense "
        "| of plain | MB at the peak | of dense |\n|---|---|---|---|---|---|"
    )
    for name, taken in seconds.items():
        print(
            f"| {name} | {taken * 1e3:.1f} | {taken / seconds[base]:.2f} "
            f"| {taken / seconds[least]:.2f} | {memory[name]:,.0f} "
            f"| {memory[name] / memory[base]:.2f} |"
        )
    print(flush=True)


# --------------------------------------------------------------------------------------------------
# the loader


def loader(options: Options) -> None:
    """One process, as each of the loader's is: decode, augment, collate."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.data or drawn_set(Path(scratch))
        faces = data_gen.load_faces(folder)
        size = 64
        epochs = -(-40 * size // len(faces)) + 1
        print(f"| loader, one process, {len(faces):,} photos | photos/s |\n|---|---|")
        for kind in ("none", config.TrainOptions().augment, "strong"):
            rates = []
            for _ in range(options.turns):
                sampler = data_gen.RunSampler(len(faces), size, epochs, 0)
                found = data_gen.make_loader(faces, sampler, kind, 0, 0, False)
                start = time.perf_counter()
                for count, _ in enumerate(data_gen.batches(found), start=1):
                    if count == 40:
                        break
                rates.append(count * size / (time.perf_counter() - start))
            default = " (default)" if kind == config.TrainOptions().augment else ""
            print(f"| augment {kind}{default} | {statistics.median(rates):,.0f} |")
        print(flush=True)


def drawn_set(folder: Path, photos: int = 640) -> Path:
    """Crops of smooth noise: JPEGs of about the size that faces have."""
    rng = np.random.default_rng(0)
    rows = []
    (folder / "images").mkdir()
    for number in range(photos):
        coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 28, 28)))
        crop = F.interpolate(coarse, size=112, mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0)
        image = f"images/{number:04d}.jpg"
        write_jpeg(folder / image, crop.numpy().astype(np.uint8))
        rows.append(manifest.Row(f"{number:04d}.jpg", f"id{number % 64}", image, manifest.ALIGNED))
    lines = [manifest.csv_line(list(manifest.COLUMNS)), *(row.line() for row in rows)]
    (folder / manifest.NAME).write_text("".join(lines))
    return folder


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
