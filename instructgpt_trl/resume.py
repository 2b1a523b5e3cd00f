"""Training that goes on from a checkpoint as if it had never stopped, in all three stages."""

import hashlib
import json
import os
import platform
import shutil
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ._trl import preserved_rng
from .alarms import Alarm, AlarmCallback
from .checkpoints import (
    MANIFEST,
    UNFINISHED,
    check_checkpoint,
    clear_unfinished,
    flush_folder,
    last_checkpoint,
    of_process,
    only_run,
    read_manifest,
    rotate,
    seal,
)
from .data import InputError, check_tokenizers
from .models.folders import loading
from .models.guards import NotFinite, first_not_finite
from .models.loading import check_fit, load_tokenizer, restored
from .start_checks import StartChecks

logger = logging.get_logger(__name__)

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
_SAMPLED = 1000  # rows that a dataset is recognised by
# Settings without a say in what is learned: where to, how often, how shown
_PLACES = ("output_dir", "resume_from_checkpoint", "run_name", "disable_tqdm", "project", "report_to", "enable_jit")
_PLACES += ("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "load_best_model", "trackio_", "use_cpu")
_PLACES += ("restore_callback", "num_completions_to_print", "dataloader_num", "dataloader_p")
# Settings with which a run goes on, but not exactly
_INEXACT = {
    "ignore_data_skip": (True, "which begins the epoch anew"),
    "dataloader_persistent_workers": (True, "whose workers draw one seed for all epochs"),
    "train_sampling_strategy": ("group_by_length", "whose order is drawn from the generators of training"),
}
_SEEN = 8  # elements of a frozen weight that a base is recognised by


class ExactResume(StartChecks):
    """
    What the trainers share: whole checkpoints, and `train(resume_from_checkpoint=...)` from the last of them (`True`)
    or a named one, refused if it is not whole or of another tokenizer. Other versions, settings or data are a warning.

    Overrides: `train`, `_run_epoch`, `_get_output_dir`, `_save_checkpoint`, `_load_from_checkpoint`,
    `_load_optimizer_and_scheduler`, `_load_rng_state`; calls `_push_from_checkpoint`.
    """

    _unfinished: str | None = None  # folder that a checkpoint is being written into
    _counted = (-1, 0)  # optimizer step, and micro-batches of it
    # Of a stream: passes begun in the run that it goes on from, those begun in all, and the step of the last beginning
    _passes_before, _passes, _pass_begun = 0, 0, 0
    _from: str | None = None  # checkpoint that this run goes on from, until its state is read

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._check_start()
        lock = only_run(self.args.output_dir) if self.args.should_save else nullcontext()
        with lock, restored(self.args, "eval_on_start"):
            folder = self._go_on_from(resume_from_checkpoint)
            if folder is not None:  # the evaluation was done, and has cost its patience
                self.args.eval_on_start = False
            try:
                output = super().train(folder, *args, **kwargs)
                if self.state.global_step == 0 and not self._has_begun():
                    raise InputError(self._no_batch())
                self._stop_unless_weights_finite()
                return output
            except NotFinite as error:
                raise NotFinite(f"{error}; {self._keep_what_is_good()}") from error

    def _watch(self, alarms: tuple[Alarm, ...]) -> None:
        self._alarms = AlarmCallback(alarms, getattr(self.args, "alarms", "warn"))  # TRL's own configs have no level
        self.add_callback(self._alarms)

    def _go_on_from(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to start from, if any, checked, with what the parent does not read from it."""
        if self.args.should_save:
            clear_unfinished(Path(self.args.output_dir))
        self._passes_before, self._passes, self._pass_begun, self._from = 0, 0, 0, None
        self._alarms.begun = 0
        self._data = {name: _digest(dataset) for name, dataset in self._datasets().items()}
        folder = None
        if resume_from_checkpoint is True:
            folder = last_checkpoint(self.args.output_dir)
            if folder is None:
                raise InputError(f"no whole checkpoint is in {self.args.output_dir}; start without resuming")
        elif resume_from_checkpoint:
            folder = resume_from_checkpoint
        if folder is not None:
            folder = check_checkpoint(folder)
            self._check_run(Path(folder))
            inexact = [name for name, (value, _) in _INEXACT.items() if getattr(self.args, name) == value]
            if inexact:
                why = "; ".join(f"{name}={_INEXACT[name][0]}, {_INEXACT[name][1]}" for name in inexact)
                logger.warning(f"{folder}: this run does not go on exactly as it would have: {why}")
            check_fit(self.accelerator.unwrap_model(self.model), folder)
            with loading(folder):
                self._load_progress(Path(folder))
            with preserved_rng():  # read once before anything is written; set when the first step begins
                self._load_rng_state(folder)
        self._from = folder
        return folder

    def _datasets(self) -> dict[str, Any]:
        return {"train_dataset": self.train_dataset}

    def _progress(self) -> dict[str, Any]:
        """Of each process, what the parent's checkpoint lacks."""
        stream = isinstance(self.train_dataset, IterableDataset)
        passes = {"stream_passes": self._passes, "stream_begun": self._pass_begun} if stream else {}
        return {"tokens": self._total_train_tokens, "logs_done_with": self._alarms.begun, **passes}

    def _save_progress(self, folder: Path) -> None:
        text = json.dumps(self._progress())
        of_process(folder, "progress", ".json", self.args).write_text(text, encoding="utf-8")

    def _load_progress(self, folder: Path) -> dict[str, Any]:
        file = of_process(folder, "progress", ".json", self.args)
        progress = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._total_train_tokens = int(progress.get("tokens", 0))
        self._passes_before = self._passes = int(progress.get("stream_passes", 0))
        self._pass_begun = int(progress.get("stream_begun", 0))
        self._alarms.begun = int(progress.get("logs_done_with", 0))
        return progress

    def _run_epoch(self, **kwargs: Any) -> None:
        """
        The parent's counts the steps behind each one, so that a run which had ended would get one more; and it takes
        all steps of a stream, whose length nobody knows, for those of its first pass.
        """
        self._find_best()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if isinstance(self.train_dataset, IterableDataset):
            before = max(self._passes_before - 1, 0)  # the last one goes on
            if self._passes_before and kwargs["epoch"] == kwargs["epochs_trained"]:
                if not self.args.ignore_data_skip:
                    steps = self.state.global_step - self._pass_begun
                    kwargs["steps_trained_in_current_epoch"] = steps * self.args.gradient_accumulation_steps
            else:
                self._passes, self._pass_begun = self._passes + 1, self.state.global_step
            kwargs["epoch"] += before
            kwargs["epochs_trained"] += before
        self._begin_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _begin_epoch(self, epoch: int) -> None:
        """Before the rows of an epoch are drawn."""

    def _find_best(self) -> None:
        """The best checkpoint so far by its number, beside those of this run: the path in a file is not followed."""
        folder, self._from = self._from, None
        if folder is None or self.state.best_model_checkpoint is None:
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        places = [Path(self.args.output_dir, name), Path(folder).absolute().with_name(name)]
        self.state.best_model_checkpoint = next((str(place) for place in places if place.is_dir()), None)

    def _keep_what_is_good(self) -> str:
        """The weights before a step that failed, as a checkpoint; where they are, in words."""
        whole = last_checkpoint(self.args.output_dir)
        there = f"the last checkpoint is {whole}" if whole else "there is no checkpoint"
        step = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if whole == str(step) or self.args.save_strategy == "no" or self.state.global_step == 0:
            return there
        if self.accelerator.num_processes > 1:  # which may not have failed all together
            return there
        if name := first_not_finite(self._trained().items()):
            return f"{name} is not finite either, so nothing was saved; {there}"
        self._save_checkpoint(self.model, None)
        return f"the weights before this step are in {step}"

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _micro_batch(self) -> int:
        """Number of this call of `training_step` in its optimizer step, from 0."""
        step, number = self._counted
        self._counted = (self.state.global_step, number + 1 if step == self.state.global_step else 0)
        return self._counted[1]

    # Writing

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _stop_unless_weights_finite(self) -> None:
        """An optimizer's own state, or its settings, can spoil weights behind finite gradients."""
        if name := first_not_finite(self._trained().items()):
            step = self.state.global_step
            raise NotFinite(f"step {step}: {name} is NaN or infinite, so the run stops: lower learning_rate")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._stop_unless_weights_finite()
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        pushes, self.args.push_to_hub = self.args.push_to_hub, False  # behind the renaming
        for callback in self.callback_handler.callbacks:  # new since the checkpoint that this run goes on from
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, {})
        if self.args.should_save:
            clear_unfinished(run)
        self.accelerator.wait_for_everyone()
        self._unfinished = str(run / UNFINISHED)
        try:
            super()._save_checkpoint(model, trial)
            self._save_progress(run / UNFINISHED / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish_checkpoint(run, name)
        except (OSError, SafetensorError, RuntimeError) as error:
            clear_unfinished(run)
            raise InputError(
                f"step {self.state.global_step}: the checkpoint could not be written to {run} "
                f"({' '.join(str(error).split())[:200]}; {shutil.disk_usage(run).free / 1e6:,.0f} MB are free there); "
                f"the checkpoints before are whole: make room and resume from the last"
            ) from error
        finally:
            self._unfinished, self.args.push_to_hub = None, pushes
        self.accelerator.wait_for_everyone()
        if pushes:
            self._push_from_checkpoint(str(run / name))

    def _finish_checkpoint(self, run: Path, name: str) -> None:
        folder = run / UNFINISHED / name
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.name == name or best.is_dir()):  # the parent looks beside this one
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        seal(folder, self._facts())
        if (run / name).exists():  # of an earlier run, or not whole
            os.rename(run / name, run / UNFINISHED / "replaced")
        os.rename(folder, run / name)
        flush_folder(run)
        rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    # Going on

    def _facts(self) -> dict[str, Any]:
        settings = {name: value for name, value in self.args.to_dict().items() if not name.startswith(_PLACES)}
        return {
            "trainer": type(self).__name__,
            "step": self.state.global_step,
            "processes": self.args.world_size,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "data": self._data,
            "model": self._model_facts(),
            "settings": json.loads(json.dumps(settings, default=str)),
        }

    def _model_facts(self) -> dict[str, Any]:
        """The adapter's config, and a digest of some elements of all frozen weights: the base, other roles."""
        config = getattr(self.model, "peft_config", {}).get("default")
        # The module that a copy is trained in place of is not used
        own = [(name, p) for name, p in self.model.named_parameters() if ".original_module." not in name]
        frozen = [(name, p) for name, p in own if not p.requires_grad]
        seen = hashlib.sha256()
        for name, parameter in frozen:
            seen.update(f"{name} {parameter.detach().flatten()[:_SEEN].tolist()}".encode())
        adapter = {} if config is None else {key: _plain(value) for key, value in config.to_dict().items()}
        adapter.pop("base_model_name_or_path", None)  # a base that was moved is the same
        return {"frozen weights": seen.hexdigest() if frozen else None, **adapter}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with loading(f"the weights in {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            if name := first_not_finite(self._trained().items()):
                raise InputError(f"{resume_from_checkpoint}: {name} is NaN or infinite; go on from another checkpoint")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(f"optimizer and scheduler in {checkpoint}"):
            settings = set() if self.optimizer is None else {*self.optimizer.param_groups[0]}
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and self.optimizer is not None:
                _check_moments(self.optimizer, settings)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(f"the random states in {checkpoint}"):
            super()._load_rng_state(checkpoint)

    def _check_run(self, folder: Path) -> None:
        if isinstance(self.processing_class, PreTrainedTokenizerBase) and any(folder.glob("*token*")):
            check_tokenizers(self.processing_class, load_tokenizer(str(folder)), ("this run", str(folder)))
        if not (folder / MANIFEST).is_file():
            return
        then, now = read_manifest(folder), self._facts()
        for name in ("trainer", "processes", "settings", "versions", "data"):
            if not isinstance(then.get(name), type(now[name])):
                raise InputError(f"{folder / MANIFEST}: {name} is missing or no fact; go on from another checkpoint")
        if then["trainer"] != now["trainer"]:
            raise InputError(f"{folder}: a checkpoint of {then['trainer']}, not of {now['trainer']}; give its own")
        if not isinstance(then.get("model"), dict):
            then["model"] = now["model"]
        groups = {"settings": "settings", "versions": "versions", "data": "other rows in", "model": "the model's"}
        differences = [
            f"{words} {', '.join(_difference(key, then[key], now[key], name) for name in other)}"
            for key, words in groups.items()
            if (other := [name for name in now[key] if then[key].get(name) != now[key][name]])
        ]
        if then["processes"] != now["processes"]:
            differences.append(f"{now['processes']} processes and not {then['processes']}")
        if differences:
            logger.warning(f"{folder}: this is not exactly the run that was stopped: {'; '.join(differences)}")


def _plain(value: Any) -> Any:
    """As JSON has it; sets in an order."""
    return sorted(map(str, value)) if isinstance(value, set) else json.loads(json.dumps(value, default=str))


def _check_moments(optimizer: torch.optim.Optimizer, settings: set[str]) -> None:
    """Raise `ValueError` unless a state is of this optimizer, and of its weights' shapes: it would write past them."""
    inner = getattr(optimizer, "optimizer", optimizer)
    missing = sorted(settings - inner.param_groups[0].keys())  # of those before it was loaded
    if missing:
        raise ValueError(f"of another optimizer than {type(inner).__name__}, which has {missing[0]}; set its optim")
    for parameter, state in inner.state.items():
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
            moment = state.get(name)
            if isinstance(moment, torch.Tensor) and moment.is_floating_point() and moment.shape != parameter.shape:
                raise ValueError(f"{name} has the shape {list(moment.shape)} for a weight of {list(parameter.shape)}")


def _difference(key: str, then: dict[str, Any], now: dict[str, Any], name: str) -> str:
    short = key == "data" or name == "frozen weights"
    return name if short else f"{name} {now[name]} and not {then.get(name)}"


def _digest(dataset: Any) -> str | None:
    """Of a dataset's number of rows, and of a thousand of them, evenly spread; none of a stream."""
    if isinstance(dataset, tuple):  # columns of token ids
        return hashlib.sha256(json.dumps(dataset).encode()).hexdigest()
    if not isinstance(dataset, Dataset):
        return None
    some = dataset.select(range(0, len(dataset), max(1, len(dataset) // _SAMPLED)))
    return hashlib.sha256(json.dumps([len(dataset), some[:]], default=str).encode()).hexdigest()
