"""An ONNX network behind the interface of ours: of others, or one that export_onnx.py wrote.

OnnxBackbone(Path("net.onnx"), mean=127, std=128)(batch)   # utils.load_backbone makes it

Needs onnxruntime, on the CPU. Legend of shapes: N crops, E embedding size.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from config import InputError


class OnnxBackbone(torch.nn.Module):
    """An ONNX network behind the interface of ours; a graph of fixed batch 1 is run in a loop."""

    def __init__(self, file: Path, mean: float = 127.5, std: float = 127.5):
        super().__init__()
        self.file = file
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{file} needs onnxruntime: pip install onnxruntime") from error
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(
                str(file), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises a dozen kinds, none of them public
            line = str(error).splitlines()[0][:120]
            raise InputError(
                f"{file} is not an ONNX network ({line}): name another file"
            ) from error
        self.input = self.session.get_inputs()[0]
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        if self.input.type != "tensor(float)":
            raise InputError(f"{file} takes {self.input.type}, not float32: name another file")
        shape = self.input.shape
        if len(shape) != 4 or shape[1] != 3 or shape[2:] != [112, 112]:
            raise InputError(f"{file} takes {shape}, not (N, 3, 112, 112) faces: name another file")
        mean, std = self._normalisation(mean, std)
        self.scale, self.shift = 127.5 / std, (127.5 - mean) / std

    def _normalisation(self, mean: float, std: float) -> tuple[float, float]:
        """What the file says itself, as export_onnx.py writes it; else what was given."""
        said = [self.metadata.get(key) for key in ("input_mean", "input_std")]
        if None in said:
            if (mean, std) == (127.5, 127.5):
                print(
                    f"{self.file} does not name its normalisation: (x - 127.5) / 127.5 is taken; "
                    "--input-mean and --input-std name another",
                    file=sys.stderr,
                )
            return mean, std
        try:
            mean, std = float(said[0]), float(said[1])
            if not (abs(mean) < 1e6 and 0 < std < 1e6):
                raise ValueError
        except ValueError:
            raise InputError(
                f"{self.file} names no usable input_mean and input_std ({' and '.join(said)}): "
                "export it anew"
            ) from None
        return mean, std

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        pixels = (batch * self.scale + self.shift).cpu().numpy()  # (N, 3, 112, 112)
        fixed = self.input.shape[0]
        size = fixed if isinstance(fixed, int) and fixed > 0 else len(pixels)
        return torch.from_numpy(
            np.concatenate([self._run(part, size) for part in _parts(pixels, size)])
        )

    def _run(self, part: np.ndarray, size: int) -> np.ndarray:
        missing = size - len(part)  # of the last part, where the graph's batch is fixed above 1
        padded = np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else part
        try:
            found = self.session.run(None, {self.input.name: padded})[0]  # (size, E)
        except Exception as error:  # onnxruntime raises a dozen kinds, none of them public
            line = str(error).splitlines()[0][:120]
            raise InputError(f"{self.file} fails on a batch of {size} ({line})") from error
        if found.ndim != 2 or len(found) != size:
            raise InputError(
                f"{self.file} gives {found.shape} for {size} crops, not ({size}, E): "
                "name a network whose first output is the embedding"
            )
        return found[: len(part)]


def _parts(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[start : start + size] for start in range(0, len(array), size)]
