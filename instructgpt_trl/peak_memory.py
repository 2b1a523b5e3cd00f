"""How much memory a process takes, measured while it runs, and how much there is."""

import threading
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["PeakMemory", "system_memory"]


class PeakMemory:
    """
    The most memory that a process takes inside a `with`, beyond what it took before: on a GPU what torch reserved, on
    a CPU what is resident, looked at every `interval` seconds.

    Args:
        anonymous (`bool`): on a CPU count only what is not a file's: without weights that were read as they are and
            never changed, which the system keeps as pages of their file.
        interval (`float`): seconds.

    Attributes:
        bytes (`int`): the peak so far.
    """

    def __init__(self, anonymous: bool = False, interval: float = 0.01):
        self.bytes, self._anonymous, self._interval = 0, anonymous, interval
        self._stop, self._process = threading.Event(), psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._before = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._now() - self._before)

    def _now(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_reserved()
        memory = self._process.memory_info()
        return memory.rss - (getattr(memory, "shared", 0) if self._anonymous else 0)


def system_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """
    Bytes available and in all: the system's, or a container's limit (cgroup v2) where that leaves less. What a
    container has read from files is available, as with `psutil.virtual_memory`.
    """
    memory = psutil.virtual_memory()
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        available = limit - used + int(files["inactive_file"])
    except (OSError, ValueError, KeyError):  # none, or "max"
        return memory.available, memory.total
    return min((memory.available, memory.total), (available, limit))
