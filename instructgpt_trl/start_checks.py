"""What every trainer refuses when a training begins: what would be found out at its first step, later, or never."""

from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import IntervalStrategy

from .data import InputError
from .models.guards import first_not_finite

SPEEDS = ("runtime", "samples_per_second", "steps_per_second")


class StartChecks:
    """The part of all three trainers that looks before the first step."""

    EVALUATION: tuple[str, ...] = ()  # names of what an evaluation may log, without `eval_`

    def _check_start(self) -> None:
        """
        Raises:
            [`InputError`]: no batch could be made, weights are NaN, or nobody logs `metric_for_best_model`.
        """
        self._check_best_metric()
        rows, batch = self.train_dataset, self.args.train_batch_size * self.args.world_size
        repeats = getattr(self, "num_generations", 1)  # of a prompt, in PPO
        if isinstance(rows, Dataset) and self.args.dataloader_drop_last and len(rows) * repeats < batch:
            raise InputError(
                f"dataloader_drop_last: train_dataset has {len(rows)} rows, fewer than a batch of {batch}, so that "
                f"nothing is left; lower per_device_train_batch_size or leave it out"
            )
        if name := first_not_finite(self._networks()):
            raise InputError(f"{name} is NaN or infinite before the first step; copy the model again")

    def _networks(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights that the training begins with."""
        return self.model.named_parameters()

    def _has_begun(self) -> bool:
        """Whether there was a micro-batch."""
        return self._counted[0] >= 0

    def _no_batch(self) -> str:
        return "train_dataset gave no batch, so that nothing was learned; give it rows"

    def _metrics_of_evaluation(self) -> tuple[str, ...] | None:
        """Without `eval_`; none where something of the user's may add to them."""
        added = [type(self), *map(type, self.callback_handler.callbacks)]
        own = all(one.__module__.split(".")[0] in ("transformers", "trl", __package__) for one in added)
        return (*self.EVALUATION, *SPEEDS) if own and self.compute_metrics is None else None

    def _check_best_metric(self) -> None:
        """What the parent finds out at the first evaluation."""
        best, metrics = self.args.metric_for_best_model, self._metrics_of_evaluation()
        if best is None or metrics is None or self.args.eval_strategy == IntervalStrategy.NO:
            return
        sets = [f"{name}_" for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else [""]
        known = [f"eval_{name}{metric}" for name in sets for metric in metrics]
        if f"eval_{best.removeprefix('eval_')}" not in known:
            raise InputError(
                f"metric_for_best_model={best!r}: no evaluation of this run logs it; expected one of "
                f"{', '.join(known[: -len(SPEEDS)])}"
            )
