"""Keeping within memory: fewer rows a pass once they do not fit, and freed memory given back."""

import ctypes
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)

T = TypeVar("T")


def give_back_freed_memory(device: torch.device) -> bool:
    """
    On a CPU under Linux, make the allocator return tensors of 128 KiB and more to the system when they are freed. As
    soon as large ones come and go, glibc keeps blocks of up to 32 MiB for itself instead, full of holes: a PPO update
    of a 30M model (LoRA, 8 x 128 tokens) then held 882 MiB for 245 MiB of tensors, and 310 so. It is for the whole
    process, and stays. Returns whether there was such an allocator.

    Source: mallopt(3), M_MMAP_THRESHOLD, and its dynamic adjustment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type != "cpu" or mallopt is None:
        return False
    m_mmap_threshold = -3
    return mallopt(m_mmap_threshold, 128 * 1024) == 1


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
