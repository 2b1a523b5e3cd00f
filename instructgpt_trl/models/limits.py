"""Keeping within memory: fewer rows a pass once they do not fit, and freed memory given back once it is short."""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

from ..peak_memory import system_memory

logger = logging.get_logger(__name__)

T = TypeVar("T")

_M_MMAP_THRESHOLD = -3  # malloc.h


@contextmanager
def freed_memory_given_back(interval: float = 0.1) -> Iterator[None]:
    """
    Inside, once less than half of the memory ([`system_memory`]) is available, the CPU's allocator returns tensors of
    128 KiB and more to the system when they are freed, and what it kept before. It looks every `interval` seconds.

    As soon as large tensors come and go, glibc keeps blocks of up to 32 MiB for itself instead, full of holes: a PPO
    update of a 135M model (LoRA, 16 x 192 tokens, gradient checkpointing) took 7.2 GB then and 67 s, and 1.7 GB and
    127 s without, since all memory is new each time. So it is done when it is needed, for the whole process, and
    stays. Elsewhere than under Linux with glibc nothing happens.

    Source: mallopt(3), M_MMAP_THRESHOLD, and its dynamic adjustment; malloc_trim(3).
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "malloc_trim"):  # glibc's alone
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(interval):
            available, total = system_memory()
            if available < total / 2:
                library.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
                library.malloc_trim(0)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class RowLimit:
    """
    A number of rows that is halved at each out-of-memory error, and stays so.

    Args:
        rows (`int`): rows at first.
        what (`str`): what takes them, as in "a training pass".
    """

    def __init__(self, rows: int, what: str):
        self.rows, self.what = rows, what

    def run(self, attempt: Callable[[int], T], there: int | None = None) -> T:
        """
        `attempt(rows)`, again with half the rows after each out-of-memory error of a GPU or a CPU. Whatever `attempt`
        had begun, it must begin anew. Of the rows that are `there`, no more are asked for.

        Raises:
            RuntimeError: out of memory with one row too, or any other error of `attempt`.
        """
        while True:
            rows = self.rows if there is None else min(self.rows, there)
            try:
                return attempt(rows)
            except RuntimeError as error:
                if rows == 1 or not should_reduce_batch_size(error):
                    raise
            # Outside the `except`, whose traceback would keep the failed pass's tensors
            clear_device_cache(garbage_collection=True)
            logger.warning(f"Out of memory: {self.what} takes {rows // 2} rows at a time now, not {rows}")
            self.rows = rows // 2
