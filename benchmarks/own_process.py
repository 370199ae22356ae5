"""One way of a benchmark in a process of its own, which takes a turn when it is called.

For ways that set up their process (threads, memory): the other way must not profit from it.
"""

import subprocess
import sys
from collections.abc import Callable


class OwnProcess:
    """Runs `python <words>`, whose script calls `serve`. Raises SystemExit where it ends early."""

    def __init__(self, words: list[str]):
        self.process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def __call__(self) -> None:
        print("go", file=self.process.stdin, flush=True)
        if self.process.stdout.readline() != "done\n":
            raise SystemExit("a way of the benchmark ended: see its error above")

    def close(self) -> float:
        """End it -> the number that it gives at last."""
        self.process.stdin.close()
        return float(self.process.stdout.readline())


def serve(turn: Callable[[], object], at_last: Callable[[], float]) -> None:
    """The other side: a turn for each line that comes in."""
    for _ in sys.stdin:
        turn()
        print("done", flush=True)
    print(at_last())
