"""What PPO saves beside the policy, and how it goes on from there: average, value model, KL coefficient, rollout."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.utils import logging

from .checkpoints import of_process
from .data import InputError
from .models.folders import loading
from .models.guards import first_not_finite
from .models.roles import load_adapter_weights, load_parameters, save_parameters
from .resume import ExactResume

logger = logging.get_logger(__name__)

VALUE_FILE = "value_model.safetensors"
STATE_FILE = "ppo_state.json"
ROLLOUT = "rollout"  # file of a checkpoint inside a rollout


class PPOSaving(ExactResume):
    """
    The part of [`PPOTrainer`] that writes and reads folders.

    Overrides: `_save`, `_load_from_checkpoint`, `_load_best_model`, and of [`ExactResume`] `_datasets`, `_progress`,
    `_save_progress`, `_load_progress`.
    """

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """The policy at the root, its average in `ema/`, the value model and the KL coefficient beside them."""
        output_dir = output_dir or self.args.output_dir
        self._save_policy(output_dir)
        if self.ema is not None:
            with self.ema.applied():
                self._save_policy(os.path.join(output_dir, "ema"))
        save_parameters(self._value_parameters, os.path.join(output_dir, VALUE_FILE))
        Path(output_dir, STATE_FILE).write_text(json.dumps({"kl_coef": self.kl_coef}), encoding="utf-8")

    def _save_policy(self, output_dir: str) -> None:
        adapters = {"selected_adapters": ["default"]} if isinstance(self.model, PeftModel) else {}
        self.model.save_pretrained(output_dir, **adapters)
        self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.ema is not None:
            with loading(str(folder / "ema")):
                self._load_policy(folder / "ema")
                if name := first_not_finite(self._policy_parameters.items()):
                    raise ValueError(f"{name} is NaN or infinite; go on from another checkpoint")
            self.ema.copy_from_parameters()
        with loading(str(folder)):
            self._load_policy(folder)
        with loading(str(folder / VALUE_FILE)):
            load_parameters(self._value_parameters, str(folder / VALUE_FILE))
        with loading(str(folder / STATE_FILE)):
            self.kl_coef = float(json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["kl_coef"])
            if not 0 <= self.kl_coef < math.inf:
                raise ValueError(f"kl_coef={self.kl_coef}: expected a number from 0 on")
        if name := first_not_finite(self._trained().items()):
            raise InputError(f"{folder}: {name} is NaN or infinite; go on from another checkpoint")

    def _datasets(self) -> dict[str, Any]:
        stream = self._ptx_stream
        return {**super()._datasets(), **({} if stream is None else {"ptx_dataset": stream.blocks})}

    @property
    def _is_inside_rollout(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _progress(self) -> dict[str, Any]:
        return {**super()._progress(), "rows": {name: limit.rows for name, limit in self._limits.items()}}

    def _save_progress(self, folder: Path) -> None:
        """The rollout too, where some of it is still to be trained on."""
        super()._save_progress(folder)
        if self._is_inside_rollout:
            episodes = {name: tensor.contiguous() for name, tensor in self._episodes.items()}
            save_file({**episodes, "order": self._order}, of_process(folder, ROLLOUT, ".safetensors", self.args))

    def _load_progress(self, folder: Path) -> dict[str, Any]:
        progress = super()._load_progress(folder)
        for name, rows in progress.get("rows", {}).items():
            if not isinstance(rows, int) or rows < 1:
                raise ValueError(f"rows.{name}={rows!r}: expected a whole number from 1 on")
            self._limits[name].rows = min(rows, self._limits[name].rows)
        self._episodes = self._order = None
        file = of_process(folder, ROLLOUT, ".safetensors", self.args)
        episodes = load_file(file) if file.is_file() else {"order": ()}
        if len(episodes["order"]) == self.args.per_device_train_batch_size * self.args.steps_per_generation:
            self._order = episodes.pop("order")
            _check_rollout(episodes, self._order)
            self._episodes = {name: tensor.to(self.accelerator.device) for name, tensor in episodes.items()}
        return progress

    def _load_best_model(self) -> None:
        """All of that checkpoint, so that average and value model belong to the policy they are saved with."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_policy(self, folder: Path) -> None:
        if isinstance(self.model, PeftModel):
            load_adapter_weights(self.model, "default", load_file(folder / "adapter_model.safetensors"))
        else:
            super()._load_from_checkpoint(str(folder), self.model)


def _check_rollout(episodes: dict[str, torch.Tensor], order: torch.Tensor) -> None:
    """Raise `ValueError` unless a rollout's tensors fit each other."""
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError("the order of the rollout is none")
    shape = episodes["mask"].shape
    for name in ("logprobs", "values", "advantages", "returns"):
        if episodes[name].shape != shape or not episodes[name].is_floating_point():
            raise ValueError(f"{name} of the rollout does not fit its mask")
    if any(len(tensor) != len(order) for tensor in episodes.values()):
        raise ValueError("the rollout has too few rows")


class StepCallback(TrainerCallback):
    """Moves the average after each optimizer step, and goes on from a resumed step."""

    def __init__(self, trainer: PPOSaving):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._trainings += 1
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        if state.global_step % self.trainer._steps_per_update and self.trainer._episodes is None:
            logger.warning(
                f"step {state.global_step} is inside a rollout of {self.trainer._steps_per_update} steps, which is "
                f"not in the checkpoint or of another size: its completions are sampled anew"
            )
        if args.save_completions and self.trainer.is_world_process_zero():
            step = state.global_step
            self.trainer._files["train"].start(step)
            # An evaluation may come before the training, and comes before the checkpoint of its step
            self.trainer._files["eval"].start(step and step + 1, keep_baseline=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.ema is not None:
            self.trainer.ema.update()
