"""How many rows a pass takes at a time: fewer, once they do not fit into memory."""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)

T = TypeVar("T")


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
