"""What a person sees of a run: lines on the console, curves in TensorBoard, signals obeyed.

Under torchrun each rank counts, and the first one shows the figures of all.
Legend: K photos of an interval between two lines.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

import data_gen
import distributed


class Curves:
    """TensorBoard's event file. Where it can't be written, the run says so once and goes on."""

    def __init__(self, run: Path, wanted: bool, step: int):
        self.run, self.writer = run, None
        if wanted and distributed.rank() == 0:
            # What a killed run wrote after its last checkpoint comes again: one value a step.
            self._try(lambda: self._open(step))

    def _open(self, step: int) -> None:
        self.writer = SummaryWriter(str(self.run), purge_step=step + 1)

    def _try(self, write) -> None:
        try:
            write()
        except (OSError, ValueError) as error:  # ValueError: its file was closed under it
            self.writer = None
            print(
                f"WARNING: {self.run}: TensorBoard's file can't be written ({error}); the run goes "
                "on without curves, the console has the figures",
                file=sys.stderr,
            )

    def write(self, kind: str, name: str, value: object, step: int) -> None:
        """`kind` is scalar, histogram, image or text."""
        if self.writer is not None:
            self._try(lambda: getattr(self.writer, f"add_{kind}")(name, value, step))

    def flush(self) -> None:
        if self.writer is not None:
            self._try(self.writer.flush)

    def close(self) -> None:
        if self.writer is not None:
            self._try(self.writer.close)


class Log:
    """Means over an interval, the share of time spent waiting for data, and what is left."""

    def __init__(self, curves: Curves, every: int, sampler: data_gen.RunSampler, step: int):
        self.curves, self.every, self.sampler = curves, every, sampler
        self.start, self.first = time.perf_counter(), step
        self._clear()

    def _clear(self) -> None:
        self.seconds = self.waited = 0.0
        self.steps = 0
        self.losses: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []
        self.other: list[torch.Tensor] = []

    def timed(self, batches: Iterable[data_gen.Batch]) -> Iterator[data_gen.Batch]:
        """The same batches; the time that they are waited for is counted."""
        iterator = iter(batches)
        while True:
            self.step_start = time.perf_counter()  # a step ends in `step`: validation is not in it
            batch = next(iterator, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - self.step_start
            yield batch

    def step(
        self,
        step: int,
        loss: torch.Tensor,
        own: torch.Tensor,
        other: torch.Tensor,
        norm: float,
        rate: float,
    ) -> None:
        self.seconds += time.perf_counter() - self.step_start
        self.steps += 1
        self.losses.append(loss)  # read at the end of the interval: no sync a step
        self.own.append(own)
        self.other.append(other)
        if step % self.every and step != self.sampler.steps:
            return
        own = distributed.gather(torch.cat(self.own))  # (K,) degrees
        other = distributed.gather(torch.cat(self.other))  # (K,)
        loss = distributed.sum_(torch.stack(self.losses).mean()) / distributed.ranks()
        self._show(step, loss.item(), own, other, norm, rate)
        self._clear()

    def _show(self, step, loss, own, other, norm, rate) -> None:
        values = {
            "train/loss": loss,
            "train/accuracy": (own < other).float().mean().item(),
            "train/learning_rate": rate,
            "train/gradient_norm": norm,
            "speed/photos_per_second": self.steps * self.sampler.batch_size / self.seconds,
            "speed/waiting_for_data": self.waited / self.seconds,
        }
        for name, value in values.items():
            self.curves.write("scalar", name, value, step)
        self.curves.write("histogram", "theta/own", own, step)
        self.curves.write("histogram", "theta/nearest_other", other, step)
        left = (time.perf_counter() - self.start) / (step - self.first)
        left = int(left * (self.sampler.steps - step))
        distributed.say(
            f"step {step:6}/{self.sampler.steps}  epoch {step / self.sampler.steps_per_epoch:6.2f}"
            f"  loss {loss:7.3f}  acc {values['train/accuracy']:6.1%}"
            f"  theta {own.mean():5.1f} / {other.mean():5.1f}  lr {rate:.4f}"
            f"  grad {norm:6.2f}  {values['speed/photos_per_second']:6.1f} photos/s"
            f"  wait {values['speed/waiting_for_data']:5.1%}  left {left // 60}:{left % 60:02d}"
        )

    def validation(self, step: int, accuracy: float) -> None:
        if math.isfinite(accuracy):
            self.curves.write("scalar", "validation/accuracy", accuracy, step)
            distributed.say(f"validation accuracy {accuracy:.2%} after step {step}")


def face_grid(crops: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 112, 112, 3) -> one picture, uint8 (3, H, W), of the first 32."""
    return make_grid(crops[:32].permute(0, 3, 1, 2), nrow=8, padding=2)


class Stop:
    """SIGTERM and Ctrl-C end the run after the step, with a checkpoint; a second one at once.

    torchrun sends SIGTERM again to ranks that got a signal beside it: there, what comes within five
    seconds is the same request.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    SAME = 5.0  # seconds

    def __enter__(self) -> "Stop":
        self.code = 0
        self.before = [signal.signal(number, self._ask) for number in self.SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.code)
        if not again:
            self.code, self.asked = 128 + number, time.monotonic()
        elif time.monotonic() - self.asked < self.SAME:
            return
        if again or "TORCHELASTIC_RUN_ID" not in os.environ:
            for either in self.SIGNALS:
                signal.signal(either, signal.SIG_DFL)
        if again:
            signal.raise_signal(number)
