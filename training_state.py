"""What a run saves and takes up again: checkpoints of all ranks, and the best weights.

    save(run, net, faces, photos, options, sampler, step, best)
    saved = load(run); check_classes(saved, ...); restore(saved, net, run)

Legend of shapes: R ranks.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import config
import data_gen
import distributed
import foreign_weights
import utils
from config import InputError, TrainOptions
from photo_folders import one_line
from sharded_head import ShardedHead
from training_step import Net, new_backbone, seed_of_rank
from validation import Score

FORMAT = 2  # of a checkpoint
_LONGEST = 500  # letters about where weights are from: a chain of fine-tunings grows


def save(
    run: Path,
    net: Net,
    faces: data_gen.FaceSet,
    photos: str,
    options: TrainOptions,
    sampler: data_gen.RunSampler,
    step: int,
    best: float,
) -> None:
    """The first rank writes last.pt; before it, each its part of a sharded head."""
    rng, rng_cuda = gather_rows(torch.get_rng_state()), torch.zeros(0)
    if net.device.type == "cuda":
        rng_cuda = gather_rows(torch.cuda.get_rng_state(net.device))
    optimizer = net.optimizer.state_dict()
    parts: dict[str, str] = {}
    if net.sharded:
        index = optimizer["param_groups"][-1]["params"][0]
        momentum = optimizer["state"].pop(index, {}).get("momentum_buffer")
        parts = save_parts(run, net.head, momentum, step)
    if distributed.rank() == 0:
        state = {
            "format": FORMAT,
            "step": step,
            "epoch": step // sampler.steps_per_epoch,
            "batch": step % sampler.steps_per_epoch,  # of the epoch
            "best": best,
            "backbone": net.backbone.state_dict(),
            "head": {} if net.sharded else net.head.state_dict(),
            "parts": parts,
            "optimizer": optimizer,
            "scaler": net.scaler.state_dict(),
            "overflows": [net.overflows, net.all_overflows],
            "rng": rng,
            "rng_cuda": rng_cuda,
            "identities": faces.identities,
            "photos": photos,
            "origin": net.origin,
            "options": config.plain(options),
        }
        checkpoint.save_checkpoint(run, state)
    distributed.barrier()


def save_parts(run: Path, head: ShardedHead, momentum: Tensor | None, step: int) -> dict[str, str]:
    """Each rank's centres and momentum in a file of their own -> names and sha256 of all files."""
    state = {"start": head.start, "weight": head.weight.detach(), "momentum": momentum}
    rank, ranks = distributed.rank(), distributed.ranks()
    _, digest = checkpoint.save_part(run, step, rank, ranks, state)
    bytes_ = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)  # (32,)
    return {
        checkpoint.part_name(step, number, ranks): bytes(row.tolist()).hex()
        for number, row in enumerate(gather_rows(bytes_))
    }


def gather_rows(row: Tensor) -> Tensor:
    """One row of each rank, on the CPU -> (R, ...), there too."""
    return distributed.gather(row[None].to(distributed.device())).cpu()


def load(run: Path) -> dict:
    """The newest good checkpoint: the first rank finds it, the others take the same."""
    choice = torch.zeros(2, dtype=torch.int64)  # place in the names, step
    names = (checkpoint.LAST, checkpoint.PREVIOUS)
    if not distributed.rank():
        saved, warnings = checkpoint.load_checkpoint(run)
        for warning in warnings:
            print(f"WARNING: {warning}", file=sys.stderr)
        damaged = not (run / checkpoint.LAST).exists()  # load_checkpoint has put it aside
        choice = torch.tensor([int(damaged), saved["step"]])
    place, step = distributed.max_(choice.to(distributed.device())).tolist()
    if distributed.rank():
        saved, _ = checkpoint.load_checkpoint(run, (names[place],), parts=False)
        if saved["step"] != step:
            raise InputError(
                f"{run / names[place]} is of step {saved['step']} on rank {distributed.rank()} and "
                f"of step {step} on the first: let all machines see the same --runs",
                local=True,
            )
    if saved.get("format") != FORMAT:
        raise InputError(
            f"{run / checkpoint.LAST} is of format {saved.get('format')}, and this code reads "
            f"{FORMAT}: finish the run with the commit in its config.json, or choose another --name"
        )
    return saved


def check_classes(saved: dict, faces: data_gen.FaceSet, photos: str, run: Path) -> None:
    """A class number must mean the same identity as before, and an index the same photo."""
    if saved["identities"] != faces.identities or saved["photos"] != photos:
        raise InputError(
            f"{run} was trained on {len(saved['identities'])} identities, and the data now give "
            f"{len(faces.identities)}, or other photos: restore them, or choose another --name"
        )


def restore(saved: dict, net: Net, run: Path) -> None:
    """Put a checkpoint back. With another number of ranks, random states start anew."""
    checkpoint.load_state(net.backbone, saved["backbone"], run / checkpoint.LAST)
    optimizer = saved["optimizer"]
    if net.sharded:
        momentum = load_centres(run, saved["parts"], net.head)
        if momentum is not None:
            index = optimizer["param_groups"][-1]["params"][0]
            optimizer["state"][index] = {"momentum_buffer": momentum}
    else:
        checkpoint.load_state(net.head, saved["head"], run / checkpoint.LAST)
    net.optimizer.load_state_dict(optimizer)
    if saved["scaler"] and net.scaler.is_enabled():  # it was on a card, and is
        net.scaler.load_state_dict(saved["scaler"])
    net.overflows, net.all_overflows = saved["overflows"]
    init = saved["options"].get("init") or ""
    net.origin = saved.get("origin", shortened(Path(init)) if init else "")  # absent in older ones
    ranks, rank = len(saved["rng"]), distributed.rank()
    if ranks != distributed.ranks():
        distributed.say(
            f"saved by {ranks} ranks, going on with {distributed.ranks()}: the photos come in the "
            "same order, but dropout, batch norm and sampled centres will differ"
        )
        torch.manual_seed(seed_of_rank(saved["step"]))
        return
    torch.set_rng_state(saved["rng"][rank].clone())  # a view of a larger tensor crashes it
    if net.device.type == "cuda" and len(saved["rng_cuda"]):
        torch.cuda.set_rng_state(saved["rng_cuda"][rank].clone(), net.device)


def initial_weights(options: TrainOptions) -> tuple[dict[str, Tensor], str]:
    """The backbone that --init names, for a run that has no checkpoint yet, and where it is from.

    Raises InputError: no weights to train, or of another network, width or embedding size.
    """
    file = utils.model_file(options.init)
    if file.suffix == ".onnx":
        raise InputError(
            f"--init {file}: an .onnx holds a graph, no weights to train; name a run folder, a "
            ".safetensors, .pth or .pt"
        )
    state, metadata = utils.read_weights(file, otherwise=options.network)
    with torch.device("meta"):  # shapes alone
        network = new_backbone(options)
    fix = f"--init takes its --network and sizes ({utils.described(metadata)})"
    if file.suffix in foreign_weights.SUFFIXES and not foreign_weights.told_by(state):
        fix = "name weights whose keys are those of our networks"
    checkpoint.check_state(network, state, file, fix)
    told = origin(file, metadata)
    return state, config.of_drawn_faces(told) if config.knows_drawn_faces(file.parent) else told


def origin(file: Path, metadata: dict[str, str]) -> str:
    """A file of weights and what went into it before: all of their data and licences count."""
    said = shortened(file)
    for key, how in (("init", "started from"), ("source", "made from")):
        earlier = metadata.get(key, "")
        if earlier and earlier != one_line(file.name):
            said += f", {how} {one_line(earlier)}"
    return said[:_LONGEST]


def shortened(path: Path) -> str:
    """Its last two parts: where somebody keeps it is nobody's business."""
    return one_line("/".join(Path(config.canonical(path)).parts[-2:]))


def load_centres(run: Path, parts: dict[str, str], head: ShardedHead) -> Tensor | None:
    """This rank's centres from the parts that hold them -> their momentum, if there is any yet."""
    momentum = None
    covered = 0
    for name in parts:
        part = checkpoint.load_part(run, name)
        first = max(head.start, part["start"])
        last = min(head.stop, part["start"] + len(part["weight"]))
        if first >= last:
            continue
        here, there = (slice(first - at, last - at) for at in (head.start, part["start"]))
        with torch.no_grad():
            head.weight[here] = part["weight"][there].to(head.weight.device)
        if part["momentum"] is not None:
            momentum = torch.zeros_like(head.weight) if momentum is None else momentum
            momentum[here] = part["momentum"][there].to(momentum.device)
        covered += last - first
    if covered != head.stop - head.start:
        raise InputError(
            f"{run}: its parts {', '.join(parts)} do not hold all identities", local=True
        )
    return momentum


def save_best(
    run: Path,
    net: Net,
    options: TrainOptions,
    faces: data_gen.FaceSet,
    score: Score,
    validated_on: str,
) -> None:
    """The weights with all that a user of them must know."""
    if distributed.rank():
        return
    metadata = {
        "network": options.network,
        "width": repr(options.width),
        "embedding_size": str(options.embedding_size),
        "resolution": str(options.resolution),
        "input": foreign_weights.INPUT,
        "identities": str(len(faces.identities)),
        "photos": str(len(faces)),
        "validation_accuracy": f"{score.accuracy:.6f}",
        "commit": utils.commit(),
    }
    if net.origin:  # other data have gone into them, too
        metadata["init"] = net.origin
    if score.threshold is not None:  # what verify.py decides by
        metadata |= {
            "threshold_degrees": f"{score.threshold:.4f}",
            "threshold_far": f"{score.far:g}",
            "threshold_impostor_pairs": str(score.impostors),
            "threshold_tar": f"{score.tar:.4f}",
            "threshold_from": validated_on,
        }
    checkpoint.save_weights(run / checkpoint.BEST, net.backbone.state_dict(), metadata)
