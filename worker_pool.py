"""Several processes on one machine, each with the same tools at hand, and chunks of work for them.

    worker_pool.warm_up()                                  # at the very start: it takes seconds
    for result in spread(work, chunks, 4, prepare, arguments): ...  # in the order in which they end

Processes are forked from a server that has imported torch and has not computed: they start at once,
where a fresh process imports for four seconds, and no lock or thread of this process is copied
into them, as would be by a fork of its own (OpenCV's threads then hang).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver

import config

_PRELOAD = ["torch", "cv2", "facenet_pytorch.models.mtcnn", "PIL.Image"]
_TUNABLES = "GLIBC_TUNABLES"  # large pages: the networks' layers are megabytes, 4 % quicker so
_LOOK_SECONDS = 0.5  # how often a worker looks whether the run is over


def workers(asked: int) -> int:
    """-1: one a core that this process may use, divided among the ranks on this machine."""
    if asked >= 0:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def warm_up() -> None:
    """Start the server, which imports meanwhile. Not needed: the first `spread` does it too."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    known = os.environ.get(_TUNABLES)
    os.environ[_TUNABLES] = ":".join(filter(None, [known, "glibc.malloc.hugetlb=1"]))
    try:
        forkserver.ensure_running()
    finally:
        if known is None:
            del os.environ[_TUNABLES]
        else:
            os.environ[_TUNABLES] = known


def spread(
    work: Callable, chunks: Iterable, count: int, prepare: Callable, arguments: tuple
) -> Iterator:
    """`work(chunk)` in `count` processes, each of which has called `prepare(*arguments)` before."""
    warm_up()
    context = multiprocessing.get_context("forkserver")
    stop = context.Event()
    pool = ProcessPoolExecutor(count, context, _start, (stop, prepare, arguments))
    try:
        yield from _in_flight(pool, work, chunks, 2 * count)
        pool.shutdown()  # a worker that is still starting would miss what this process takes along
    except BrokenProcessPool as error:
        raise SystemExit(
            config.complain("a worker process died (out of memory?); run again to go on", 1)
        ) from error
    except BaseException:  # Ctrl-C, or a full disk: the work that is under way is not waited for
        stop.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_flight(pool: ProcessPoolExecutor, work: Callable, chunks: Iterable, most: int) -> Iterator:
    """Keep `most` chunks submitted, so that memory does not grow with their number."""
    waiting: set[Future] = set()
    for chunk in chunks:
        waiting.add(pool.submit(work, chunk))
        if len(waiting) >= most:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
    while waiting:
        ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in ready)


def _start(stop, prepare: Callable, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(stop, os.getppid()), daemon=True).start()
    prepare(*arguments)


def _end_with_parent(stop, server: int) -> None:
    """A worker whose run was killed would wait for work forever; the server goes with the run."""
    while not stop.wait(_LOOK_SECONDS) and os.getppid() == server:
        pass
    os._exit(1)
