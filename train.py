"""Train a backbone with a margin head on a prepared folder; CUDA or CPU.

    python train.py                                      # what `pre_process.py` prepared by default
    python train.py --data data/faces --network se-r18 --width 0.25 --epochs 2 --name first
    python train.py --data data/faces --recipe cpu                   # 2 CPU cores
    python train.py --data data/casia --recipe casia-r50             # one GPU
    python train.py --data data/faces --name first --resume          # go on where it stopped
    python train.py --data data/faces --network r50 --init backbone.pth --lr 0.01  # fine-tune it
    torchrun --nproc-per-node 8 train.py --data data/ms1m --recipe ms1m-r100      # eight GPUs
    torchrun --nproc-per-node 2 --max-restarts 3 train.py --data data/faces --device cpu
    tensorboard --logdir runs

Reads <data>/manifest.csv and the crops that it names. Writes runs/<name>/:
    best.safetensors   the weights with the best validation accuracy, for lfw_eval.py
    last.pt            all that --resume needs; previous.pt is the one before; head-*.pt: parts
                       of a sharded head, which belong to them
    config.json        the options and what ran; result.json once the run is finished
    events...          TensorBoard; curves.png shows them once the run is finished
Validation uses identities held out of the training set, or the pairs given by --val-pairs.

Under torchrun the ranks share each batch of --batch-size photos and the validation. DDP takes the
mean of their gradients; batch norm uses the photos of its own rank and pass, and the first rank's
running statistics are kept. A sharded head is spread over the ranks, each saves its part, and the
run's folder must be one that all machines see. A run may go on with another number of ranks: the
order of the photos stays, while dropout, batch norm and the sampled centres follow the ranks.

Legend of shapes: N photos of a rank and pass, C identities, E embedding size.
"""

import config

if __name__ == "__main__":
    # Before torch is imported, so that --help and a wrong option answer at once.
    OPTIONS = config.parse(config.TrainOptions, __doc__)

import json
import math
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
import data_gen
import distributed
import job
import models
import training_state
import utils
from arcface import focal, validate_labels
from config import InputError, TrainOptions
from training_log import Curves, Log, Stop, face_grid
from training_step import (
    Net,
    agree,
    backward,
    build,
    check_finite,
    explained,
    gradient_norm,
    head_memory,
    learning_rate,
    update,
)
from validation import Score, Validation, make_validation

# What may differ between a run and its continuation: not what is computed, but where and how it is
# watched. (Another device or number of threads rounds differently, so the last bits may differ.)
FREE = (
    "resume",
    "name",
    "runs",
    "workers",
    "timeout",
    "log_every",
    "save_every",
    "device",
    "threads",
    "recipe",
    "tensorboard",
    "checkpointing",
    "compile",
)

AMPS = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}


def main(options: TrainOptions) -> int:
    # ---- settings
    device = distributed.join(options.device)
    options = with_defaults(options)
    check_options(options, distributed.ranks())
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        utils.keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    run = options.runs / options.name
    amp = pick_amp(with_precision_of(run, options), device)
    options = replace(options, amp=AMPS[amp])
    state = open_run(run, options)
    if state == "finished":
        return 0
    if state == "new" and options.init:
        training_state.initial_weights(options)  # refused now, before the data are read

    # ---- data
    if job.local_rank():
        distributed.barrier()  # the first of a machine may have to read all labels of a .rec once
    faces = data_gen.load_faces(options.data, options.min_images, options.skip_bad)
    if not job.local_rank():
        distributed.barrier()
    distributed.say(
        f"{len(faces):,} photos of {len(faces.identities):,} identities in {options.data}"
        + (f" ({faces.left_out:,} others have no face, or too few)" if faces.left_out else "")
    )
    if faces.damaged and distributed.rank() == 0:
        print(
            f"WARNING: {len(faces.damaged):,} damaged records are left out, see skipped.txt: "
            f"{faces.damaged[0]}",
            file=sys.stderr,
        )
    faces, validation = make_validation(faces, options)
    check_data(faces, options)
    said = f"validation: {len(validation.pairs):,} pairs of {validation.what}" if validation else ""
    distributed.say(said or "no validation")

    distributed.barrier()  # every rank has looked at the folder before the first one writes
    first = distributed.rank() == 0
    if first:
        run.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock(run) if first else nullcontext(), Stop() as stop:
        if first and faces.damaged:
            lines = "".join(f"{line}\n" for line in faces.damaged)
            checkpoint.write_atomic(run / "skipped.txt", lines.encode())
        try:
            code = train(run, options, faces, validation, device, amp, stop)
        except (RuntimeError, EOFError, ConnectionError) as error:
            told = explained(error, options, device)
            if told is error:
                raise
            raise told from error
    distributed.leave()
    return code


def train(
    run: Path,
    options: TrainOptions,
    faces: data_gen.FaceSet,
    validation: Validation | None,
    device: torch.device,
    amp: torch.dtype | None,
    stop: Stop,
) -> int:
    """The run from its first or next step to its end -> exit code."""
    # ---- model, head, optimizer
    net = build(options, len(faces.identities), device, amp)
    print_what_runs(net, options, len(faces.identities))

    # ---- resume
    step, best = 0, -1.0
    photos = faces.digest()  # once: it reads all names, millions in a large set
    if checkpoint.exists(run):
        saved = training_state.load(run)
        training_state.check_classes(saved, faces, photos, run)
        training_state.restore(saved, net, run)
        step, best = saved["step"], saved["best"]
        distributed.say(f"going on from step {step}")
    elif options.init:
        state, net.origin = training_state.initial_weights(options)
        net.backbone.load_state_dict(state)
        distributed.say(f"backbone from {options.init}, the head is new")
    sampler = data_gen.RunSampler(
        len(faces), options.batch_size, options.epochs, options.seed, step,
        distributed.rank(), distributed.ranks(),
    )  # fmt: skip
    loader = data_gen.make_loader(
        faces, sampler, options.augment, options.workers, options.timeout, device.type == "cuda"
    )
    write_config(run, options, faces, device, amp)
    curves = Curves(run, options.tensorboard, step)
    if not step:
        curves.write("text", "options", options_table(options), 0)

    # ---- loop
    log = Log(curves, options.log_every, sampler, step)
    net.backbone.train()
    for batch in log.timed(data_gen.batches(loader)):
        if step == sampler.start:
            curves.write("image", "augmented", face_grid(batch.crops), step)
        rate = learning_rate(step, sampler.steps, options)
        entropy, own, other = backward(net, batch, step, options)  # (N,), then degrees (N,)
        norm = gradient_norm(net)
        code, loss_ok, norm_ok = agree(stop.code, entropy, norm)
        check_finite(net, loss_ok, norm_ok, step, rate, norm, entropy, batch, faces)
        update(net, norm, norm_ok, rate, options.clip_norm)
        step += 1
        log.step(step, focal(entropy, options.focal_gamma).mean(), own, other, norm.item(), rate)

        ended = step % sampler.steps_per_epoch == 0
        if ended and (validation or step == sampler.steps):
            best = validate(run, net, validation, options, faces, log, step, best)
        if ended or step % options.save_every == 0 or code:
            curves.flush()  # they reach as far as the checkpoint
            training_state.save(run, net, faces, photos, options, sampler, step, best)
        if code and step < sampler.steps:
            curves.close()
            distributed.say(f"stopped at step {step}; --resume goes on from there")
            return code

    # ---- end
    curves.close()
    if distributed.rank() == 0:
        result = {"steps": step, "validation": best if validation else None}
        checkpoint.write_json(run / "result.json", result)
        draw_curves(run)
    said = f"best validation accuracy {best:.2%}, " if validation else ""
    next_ = f"python lfw_eval.py --model {shlex.quote(str(run))}"
    distributed.say(f"{run} is finished: {said}{step} steps; next: {next_}")
    return 0


def draw_curves(run: Path) -> None:
    import training_curves  # loads matplotlib: seconds, which no other rank needs

    training_curves.draw_at_end(run)


def validate(
    run: Path,
    net: Net,
    validation: Validation | None,
    options: TrainOptions,
    faces: data_gen.FaceSet,
    log: Log,
    step: int,
    best: float,
) -> float:
    """Score the network, keep its weights if it is the best so far -> the best accuracy."""
    nothing = Score(math.nan, None, None, 0)
    score = validation.score(net.backbone, net.device) if validation else nothing
    log.validation(step, score.accuracy)
    if score.accuracy <= best:  # false for NaN: with nothing to compare, the last one counts
        return best
    training_state.save_best(run, net, options, faces, score, validation.what if validation else "")
    return score.accuracy if validation else best


# --------------------------------------------------------------------------------------------------
# settings


def with_defaults(options: TrainOptions) -> TrainOptions:
    """Fill in what depends on the machine and on which data there is."""
    data, resume = options.data, options.resume
    if data is None and config.RAW.exists():
        data = config.DATA / "faces"
    folder = data.parent if data and data.suffix == ".rec" else data
    name = options.name or options.recipe or (folder.resolve().name if folder else "demo")
    begun = checkpoint.exists(options.runs / name)
    if data is None:
        distributed.say("No --data and no data/raw: using the embedded faces (data/synthetic).")
        data = config.SYNTHETIC / "train"
        resume = resume or (name == "demo" and begun)  # `make demo` goes on where it stopped
    if distributed.restarted():
        resume = resume or begun  # torchrun repeats the same command after it lost a rank
    workers = options.workers
    if workers < 0:
        on_cuda = utils.pick_device(options.device).type == "cuda"
        cores = torch.multiprocessing.cpu_count() // job.local_ranks()
        workers = max(1, min(8, cores)) if on_cuda else 1
    return replace(options, data=data, name=name, resume=resume, workers=workers)


def check_options(options: TrainOptions, ranks: int) -> None:
    """Refuse what would be ignored, and what can't be shared out."""
    default = TrainOptions()
    for flag, value, wanted, others in (
        ("m1", options.margin, ("combined",), "--margin"),
        ("m3", options.margin, ("combined", "cosface"), "--margin"),
        ("easy_margin", options.margin, ("combined", "arcface"), "--margin"),
        ("sample_rate", options.head, ("sharded",), "--head"),
    ):
        if getattr(options, flag) != getattr(default, flag) and value not in wanted:
            raise InputError(
                f"--{flag.replace('_', '-')} is not of {others} {value}: "
                f"it takes {' or '.join(wanted)}"
            )
    if (options.val_pairs is None) != (options.val_data is None):
        raise InputError("--val-pairs needs --val-data, the prepared folder that they name")
    if "/" in options.name or options.name in (".", ".."):
        raise InputError(f"--name {options.name} is no name of a folder: use --runs for the place")
    passes = ranks * options.accumulate
    if options.batch_size % passes or options.batch_size // passes < 2:
        raise InputError(
            f"--batch-size {options.batch_size} is to be split over {ranks} x {options.accumulate} "
            f"ranks and passes: name a multiple of {passes}, at least {2 * passes}"
        )
    if options.resolution % 16:
        raise InputError(f"--resolution {options.resolution} is no multiple of 16: 48, 64, 80, ...")
    if options.compile and options.checkpointing:
        raise InputError(
            "--compile and --checkpointing do not go together: say --no-compile, or leave out "
            "--checkpointing"
        )
    if options.compile and not utils.has_compiler():
        raise InputError(
            "--compile needs a C++ compiler (such as g++): install one, or say --no-compile, which "
            "is slower"
        )


def pick_amp(options: TrainOptions, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision; bf16 needs no loss scaling, fp16 is for older cards.

    A CPU gains by bf16 where it multiplies it itself and the conversions are compiled away: twice
    the speed then, none or less otherwise.
    """
    name = options.amp
    if name == "auto" and device.type == "cpu":
        name = "bf16" if options.compile and utils.multiplies_bf16() else "off"
    if name == "off":
        return None
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise InputError(
            "--amp fp16 needs CUDA: on a CPU use --amp bf16 or --amp off (a run that began in fp16 "
            "goes on with CUDA alone: choose another --name)"
        )
    return next(kind for kind, called in AMPS.items() if called == name)


def with_precision_of(run: Path, options: TrainOptions) -> TrainOptions:
    """`auto` is what the run began with: it may go on without --compile, or on another device."""
    if options.amp != "auto":
        return options
    named = {str(kind or torch.float32): name for kind, name in AMPS.items()}
    return replace(options, amp=named.get(said_before(run, "precision"), "auto"))


def open_run(run: Path, options: TrainOptions) -> str:
    """-> "new", "unfinished" or "finished". Raises InputError: the folder holds another run."""
    begun = checkpoint.exists(run)
    if not (run / "config.json").exists() and not begun:
        if options.resume:
            raise InputError(f"{run} holds no run to resume: check --name, or leave out --resume")
        return "new"
    old = options_of(run, begun)
    new = config.plain(options)
    changed = changes(old, new)
    if changed:
        said = ", ".join(f"{key} {was}, now {new[key]}" for key, was in list(changed.items())[:5])
        raise InputError(
            f"{run} was trained with other options ({said}): repeat those (config.json), or choose "
            "another --name"
        )
    if (run / "result.json").exists():
        distributed.say(f"{run} is finished with these options; nothing to do")
        return "finished"
    if not begun:
        return "new"  # stopped before its first checkpoint
    if not options.resume:
        raise InputError(f"{run} is unfinished: add --resume to go on, or choose another --name")
    return "unfinished"


def changes(old: dict[str, object], new: dict[str, object]) -> dict[str, object]:
    """What a run was started with, where it is not the same now and must be.

    An option that is newer than the run had its default; `--amp auto` is what the run has.
    """
    old = {**config.plain(TrainOptions()), **old}
    if "auto" in (old["amp"], new["amp"]):
        old["amp"] = new["amp"]
    return {key: old[key] for key in new if key not in FREE and old[key] != new[key]}


def options_of(run: Path, begun: bool) -> dict[str, object]:
    """What a run was started with, if need be from its checkpoint."""
    try:
        return config.read_run(run)
    except InputError as error:
        if not begun:
            raise
        saved = training_state.load(run)
        distributed.say(f"WARNING: {error}; its options are taken from the checkpoint")
        return saved["options"]


def write_config(
    run: Path,
    options: TrainOptions,
    faces: data_gen.FaceSet,
    device: torch.device,
    amp: torch.dtype | None,
) -> None:
    if distributed.rank():
        return
    what_ran = {
        "options": config.plain(options),
        "commit": commits(run),
        "torch": torch.__version__,
        "hardware": utils.hardware(device),
        "ranks": distributed.ranks(),
        "precision": str(amp or torch.float32),
        "photos": len(faces),
        "identities": len(faces.identities),
    }
    checkpoint.write_json(run / "config.json", what_ran)
    for key, value in sorted(config.plain(options).items()):
        print(f"  {key:15} {value}")
    print(f"  commit {what_ran['commit']}, torch {torch.__version__}, run {run}")


def commits(run: Path) -> str:
    """This one, after those that trained the run so far."""
    earlier = (
        said_before(run, "commit") if checkpoint.exists(run) else ""
    )  # else it trained nothing
    return ", ".join(dict.fromkeys([*filter(None, earlier.split(", ")), utils.commit()]))


def said_before(run: Path, key: str) -> str:
    """What config.json says beside the options; empty where there is none, or a damaged one."""
    try:
        return str(json.loads((run / "config.json").read_text())[key])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def options_table(options: TrainOptions) -> str:
    rows = [f"| {key} | {value} |" for key, value in sorted(config.plain(options).items())]
    return "\n".join(["| option | value |", "|---|---|", *rows])


# --------------------------------------------------------------------------------------------------
# data


def check_data(faces: data_gen.FaceSet, options: TrainOptions) -> None:
    if len(faces) < options.batch_size:
        raise InputError(
            f"{options.data} leaves {len(faces)} photos to train on, fewer than one batch of "
            f"{options.batch_size}: lower --batch-size or add photos"
        )
    if len(faces.identities) < distributed.ranks():
        raise InputError(
            f"{options.data} has {len(faces.identities)} identities, fewer than "
            f"{distributed.ranks()} ranks: start fewer"
        )
    try:
        validate_labels(torch.from_numpy(faces.labels), len(faces.identities))
    except ValueError as error:
        raise InputError(f"{options.data}: {error}; prepare it again") from error


def print_what_runs(net: Net, options: TrainOptions, num_identities: int) -> None:
    ranks = distributed.ranks()
    size = models.count_parameters(net.backbone) / 1e6
    distributed.say(
        f"{options.network} width {options.width:g}: {size:.2f} M parameters, "
        f"{utils.hardware(net.device)}, {net.amp or 'fp32'}"
        + (f", {ranks} ranks of {options.batch_size // ranks} photos a step" if ranks > 1 else "")
    )
    memory = head_memory(options, num_identities, ranks)
    total, there = sum(memory.values()), utils.total_memory(net.device)
    if net.device.type == "cpu":
        there //= job.local_ranks()  # they share it
    parts = ", ".join(f"{name} {bytes_ / 1e6:,.0f} MB" for name, bytes_ in memory.items())
    distributed.say(f"{options.head} head of {num_identities:,} identities, a rank: {parts}")
    if total > there and distributed.rank() == 0:
        print(
            f"WARNING: the head needs {total / 1e9:.1f} GB and the device has {there / 1e9:.1f} "
            "GB: use --head sharded on more ranks, a --sample-rate below 1, or --accumulate",
            file=sys.stderr,
        )


if __name__ == "__main__":
    config.run(main, OPTIONS)
