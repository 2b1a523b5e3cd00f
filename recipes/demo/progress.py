"""One line a training on the terminal: how far it is, two numbers of it, and the time it took."""

import sys
import time

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

WIDTH = 24


class Bar:
    """A progress bar in one line, rewritten in place on a terminal, printed once at the end elsewhere."""

    def __init__(self, name: str, total: int = 1):
        self.name, self.total, self.start = name, max(total, 1), time.perf_counter()

    def loss(self, done: int, total: int, loss: float) -> None:
        """Draw the bar with a loss beside it."""
        self.total = total
        self.show(done, f"loss {loss:.2f}")

    def show(self, done: int, note: str = "") -> None:
        """Draw the bar with `done` of its total and a `note`."""
        if done < self.total and not sys.stdout.isatty():
            return
        filled = WIDTH * done // self.total
        seconds = time.perf_counter() - self.start
        line = (
            f"  {self.name:<16}[{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{self.total}  {seconds:5.0f} s  {note}"
        )
        print("\r" + line[:118].ljust(118), end="\n" if done >= self.total else "", flush=True)


class Progress(TrainerCallback):
    """
    A [`Bar`] for a trainer, in place of the tables and dictionaries that trainers print.

    Args:
        name (`str`): the stage.
        metrics (`dict[str, str]`): logged metrics to show: name in the log, name on the screen.
    """

    def __init__(self, name: str, metrics: dict[str, str]):
        self.name, self.metrics, self.note = name, metrics, ""
        self.bar: Bar | None = None

    @classmethod
    def attach(cls, trainer: Trainer, name: str, metrics: dict[str, str]) -> None:
        """Give `trainer` this progress bar and take its own away."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(cls(name, metrics))

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = Bar(self.name, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{short} {logs[name]:.2f}" for name, short in self.metrics.items() if name in (logs or {})]
        self.note = "  ".join(shown) or self.note

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:  # the last one after its numbers were logged
            self.bar.show(state.global_step, self.note)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.show(state.max_steps, self.note)
