"""Keeping within memory: fewer rows a pass once they do not fit, and freed memory kept until it is short."""

import ctypes
import os
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

# malloc.h, and the largest of the second by its manual
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_THRESHOLD = -1, -3, 32 << 20
_OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def freed_memory_reused(interval: float = 0.1) -> Iterator[None]:
    """
    Inside, the CPU's allocator keeps tensors of up to 32 MiB when they are freed, for the next ones. Once less than a
    quarter of the memory ([`system_memory`]) is available, it returns those of 128 KiB and more to the system instead,
    and what it kept before as soon as that is free. It looks every `interval` seconds, and once memory was short gives
    back every ten of them.

    New memory is slow. A PPO update of a 135M model (LoRA, float32, 16 x 192 tokens) takes 49 to 54 s with glibc's own
    settings, of which the system needs 8 to 9 s of two cores, and 41 to 45 s with kept memory, and the system 1 to 2
    (one run of each, on a machine whose speed varies as much). Blocks that are kept get holes: with glibc's own
    settings, which keep them too but give the top back, an update with gradient checkpointing took 7.2 GB and 67 s,
    with all given back 1.7 GB and 127 s. So they are kept while there is memory to spare. What the environment sets
    ([`_OF_THE_USER`]) stays until memory is short.

    At the end what was kept goes back. The thresholds are then those at which glibc's own adjustment ends, 32 and
    64 MiB, or where memory was short 128 KiB, for the rest of the process. Not to be nested; forked processes keep as
    their parent does, and do not look. Elsewhere than under Linux with glibc nothing happens.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; malloc_trim(3).
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "malloc_trim"):  # glibc's alone
        yield
        return
    short, stop = threading.Event(), threading.Event()

    def look() -> None:
        available, total = system_memory()
        if available < total / 4:
            short.set()
            for threshold in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
                library.mallopt(threshold, 128 * 1024)
            library.malloc_trim(0)

    def watch() -> None:
        while not stop.wait(interval * (10 if short.is_set() else 1)):
            if short.is_set():
                library.malloc_trim(0)  # what was alive when memory became short
            else:
                look()

    look()
    keeps = not short.is_set() and not any(name in os.environ for name in _OF_THE_USER)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    if keeps:
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if keeps and not short.is_set():
            library.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        library.malloc_trim(0)


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
