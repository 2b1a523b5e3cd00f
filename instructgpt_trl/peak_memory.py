"""How much memory a process takes, measured while it runs, and how much there is."""

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakMemory", "system_memory", "traced_peak"]


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


def traced_peak(run: Callable[[], Any]) -> int:
    """The most bytes alive at once of what `run` makes, what it was given aside."""
    with _Live() as live:
        run()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes that operations inside it have made and that are still alive; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, made=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._note(tensor, made=True)
        return out

    def _note(self, tensor: Any, made: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


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
