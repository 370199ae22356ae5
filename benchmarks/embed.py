"""How fast crops are embedded on a CPU, against the way of the official evaluation.

    python benchmarks/embed.py                                   # r50, 1,000 crops, 2 threads
    python benchmarks/embed.py --crops 100 --network se-r18      # a quick look

Both ways run the same network on the same drawn crops: `official` is the eager network, NCHW, in
batches of 10; `ours` is what lfw_eval.py runs, folded, channels-last. They take turns within each
of five rounds, so that what else the machine does meets both. Prints a Markdown row: photos/s of
each (median over rounds), and the median, smallest and largest ratio of a round.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import config
import folding
import models
import utils
from config import option


@dataclass(frozen=True)
class Options:
    network: str = option("r50", "backbone", choices=config.NETWORKS)
    crops: int = option(1000, "how many are embedded each way, over all rounds", low=50)
    threads: int = option(2, "CPU threads", low=1)
    batch_size: int = option(config.EvalOptions.batch_size, "of ours", low=1)
    official_batch: int = option(10, "of the official evaluation", low=1)
    rounds: int = option(5, "of both ways in turn", low=1)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = models.create(options.network)
    crops = np.random.default_rng(0).integers(0, 256, (20, 112, 112, 3), dtype=np.uint8)
    calibrate(network, crops)
    fast = folding.fold(network).to(memory_format=torch.channels_last)
    per_round = max(1, options.crops // options.rounds)
    batches = list(cut(per_round, options.batch_size))
    official = list(cut(per_round, options.official_batch))

    apart = difference(network, fast, crops)
    rates: dict[str, list[float]] = {"official": [], "ours": []}
    for number in range(options.rounds + 1):  # the first warms up
        for name, way, sizes in (("official", eager, official), ("ours", channels_last, batches)):
            model = network if name == "official" else fast
            sizes = sizes if number else sizes[:2]
            start = time.perf_counter()
            for size in sizes:
                way(model, np.resize(crops, (size, *crops.shape[1:])))
            if number:
                rates[name].append(sum(sizes) / (time.perf_counter() - start))
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [b / a for a, b in zip(rates["official"], rates["ours"], strict=True)]
    print(f"embeddings apart by {apart:.1e} of their length", file=sys.stderr)
    print("| network | crops | official, batch 10 | ours | ratio (smallest to largest) | on |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {options.network} | {per_round * options.rounds:,} "
        f"| {median['official']:.1f}/s | {median['ours']:.1f}/s "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {utils.hardware(torch.device('cpu'))}, torch {torch.__version__}, "
        f"commit {utils.commit()} |"
    )


@torch.no_grad()
def calibrate(network: torch.nn.Module, crops: np.ndarray) -> None:
    """Running statistics of a sane size: random ones let the activations grow out of float32."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(utils.to_batch(crops))
    network.eval()


def cut(total: int, size: int) -> Iterator[int]:
    for first in range(0, total, size):
        yield min(size, total - first)


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
