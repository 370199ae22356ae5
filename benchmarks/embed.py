"""How fast crops are embedded on a CPU, against the way of the official evaluation.

    python benchmarks/embed.py                                   # r50, 1,000 crops, 2 threads
    python benchmarks/embed.py --crops 100 --network se-r18      # a quick look

Both ways run the same network on the same drawn crops: `official` is the eager network, NCHW, in
batches of 10; `ours` is what lfw_eval.py runs: folded, channels-last, freed memory kept. Each has a
process of its own, and they take turns, so that what else the machine does meets both. Prints a
Markdown row of five rounds: photos/s of each (median), and the median, smallest and largest ratio.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

from own_process import OwnProcess, serve

import config
import folding
import models
import utils
from config import option


@dataclass(frozen=True)
class Options:
    network: str = option("r50", "backbone", choices=config.NETWORKS)
    crops: int = option(1000, "how many are embedded each way, over all rounds", low=20)
    threads: int = option(2, "CPU threads", low=1)
    batch_size: int = option(60, "of ours, and how many crops a turn takes", low=1)
    official_batch: int = option(10, "of the official evaluation", low=1)
    rounds: int = option(5, "of both ways in turn", low=1)
    way: str = option("", "the one to run, for which this script calls itself")


def main(options: Options) -> None:
    if options.way:
        take_turns(options)
        return
    words = [__file__, "--network", options.network, "--threads", str(options.threads)]
    words += ["--batch-size", str(options.batch_size)]
    words += ["--official-batch", str(options.official_batch)]
    ways = {name: OwnProcess([*words, "--way", name]) for name in ("official", "ours")}
    for way in ways.values():
        way()  # warms up
    turns = max(1, options.crops // options.rounds // options.batch_size)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        seconds = dict.fromkeys(ways, 0.0)
        for turn in range(turns):
            for name in sorted(ways, reverse=bool(turn % 2)):  # neither is always the first
                start = time.perf_counter()
                ways[name]()
                seconds[name] += time.perf_counter() - start
        for name in ways:
            rates[name].append(turns * options.batch_size / seconds[name])
    apart = max(way.close() for way in ways.values())
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [b / a for a, b in zip(rates["official"], rates["ours"], strict=True)]
    print(f"embeddings apart by {apart:.1e} of their length", file=sys.stderr)
    print("| network | crops | official, batch 10 | ours | ratio (smallest to largest) | on |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {options.network} | {options.rounds * turns * options.batch_size:,} "
        f"| {median['official']:.1f}/s | {median['ours']:.1f}/s "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {utils.hardware(torch.device('cpu'))}, torch {torch.__version__}, "
        f"commit {utils.commit()} |"
    )


def take_turns(options: Options) -> None:
    """One way, in its process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.way == "ours":
        utils.keep_freed_memory()  # as lfw_eval.py does
    network = models.create(options.network)
    crops = np.random.default_rng(0).integers(0, 256, (20, 112, 112, 3), dtype=np.uint8)
    calibrate(network, crops)
    fast = folding.fold(network).to(memory_format=torch.channels_last)
    crops = np.resize(crops, (options.batch_size, *crops.shape[1:]))  # of one turn
    ways = {
        "official": lambda: [eager(network, part) for part in cut(crops, options.official_batch)],
        "ours": lambda: channels_last(fast, crops),
    }
    serve(ways[options.way], lambda: difference(network, fast, crops[:20]))


@torch.no_grad()
def calibrate(network: torch.nn.Module, crops: np.ndarray) -> None:
    """Running statistics of a sane size: random ones let the activations grow out of float32."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(utils.to_batch(crops))
    network.eval()


def cut(crops: np.ndarray, size: int) -> list[np.ndarray]:
    return [crops[first : first + size] for first in range(0, len(crops), size)]


@torch.no_grad()
def eager(network: torch.nn.Module, crops: np.ndarray) -> np.ndarray:
    """As the official verification.py: a contiguous NCHW batch through the network as trained."""
    batch = utils.to_batch(crops).contiguous(memory_format=torch.contiguous_format)
    return network(batch).numpy()


def channels_last(network: torch.nn.Module, crops: np.ndarray) -> np.ndarray:
    return utils.embed(network, crops, flip=False)


def difference(network: torch.nn.Module, fast: torch.nn.Module, crops: np.ndarray) -> float:
    one, other = eager(network, crops), channels_last(fast, crops)
    norms = np.linalg.norm(one, axis=1)
    return float((np.linalg.norm(one - other, axis=1) / norms).max())


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
