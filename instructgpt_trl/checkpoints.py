"""
Checkpoints that are whole or not there, and training that goes on from one as if it had never stopped.

A checkpoint is written under another name, flushed to disk and renamed: `checkpoint-N` is there with all it needs or
not at all. `checkpoint.json` in it has size and SHA-256 of every file, so that what was cut short or changed
afterwards is recognised, and what the run was: versions, settings, data.
"""

import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ._trl import preserved_rng
from .data import InputError, check_tokenizers
from .models.folders import check_folder, loading, read_object
from .models.guards import NotFinite, first_not_finite
from .models.loading import check_fit, load_tokenizer

logger = logging.get_logger(__name__)

__all__ = ["ExactResume", "check_checkpoint", "flaw", "last_checkpoint"]

MANIFEST = "checkpoint.json"
UNFINISHED = ".unfinished-checkpoint"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
_SAMPLED = 1000  # rows that a dataset is recognised by
# Settings without a say in what is learned: where to, how often, how shown
_PLACES = ("output_dir", "resume_from_checkpoint", "run_name", "disable_tqdm", "project", "report_to", "enable_jit")
_PLACES += ("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "dataloader_", "load_best_model", "trackio_")
_PLACES += ("restore_callback", "num_completions_to_print", "ignore_data_skip", "use_cpu")


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write `checkpoint.json`, with every file of the folder and `facts` in it, and flush all of it to disk."""
    files = {}
    for name, path in sorted(_files(folder).items()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"bytes": file.tell(), "sha256": digest}
            os.fsync(file.fileno())
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": 1, **facts, "files": files}, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush_folder(path)


def flaw(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, to be read by people; none if every file is as it was written."""
    folder = Path(folder)
    try:
        known = _manifest(folder)
        sizes, digests = ({name: about[key] for name, about in known["files"].items()} for key in ("bytes", "sha256"))
        if not all(isinstance(known[name], dict) for name in ("versions", "data", "settings")) or not sizes:
            raise ValueError
        known["trainer"], known["processes"]  # noqa: B018  a KeyError, if it lacks them
    except FileNotFoundError:
        return f"no {MANIFEST} is in it, so it was not finished, or another program wrote it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    there = _files(folder)  # no name from the file becomes a path
    for name, size in sizes.items():
        if name not in there:
            return f"{name} is missing"
        if there[name].stat().st_size != size:
            return f"{name} has {there[name].stat().st_size} bytes and had {size}"
    for name, digest in digests.items():
        with there[name].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{name} is not what was written; its SHA-256 is another"
    return None


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The last whole checkpoint in `output_dir`, if any. What is wrong with those behind it is a warning."""
    if not Path(output_dir).is_dir():
        return None
    for folder in reversed(sort_checkpoints(str(output_dir))):
        reason = flaw(folder)
        if reason is None:
            return folder
        logger.warning(f"{folder} is passed over: {reason}")
    return None


def check_checkpoint(folder: str | os.PathLike) -> str:
    """
    The folder, if it is a checkpoint that training can go on from.

    Raises:
        [`InputError`]: what is wrong with it, and the last one that is whole.
    """
    folder = os.fspath(folder)
    if not Path(folder, TRAINER_STATE_NAME).is_file():
        raise InputError(f"{folder}: no checkpoint, which has {TRAINER_STATE_NAME}; give a folder checkpoint-N")
    reason = flaw(folder)
    if reason is not None and Path(folder, MANIFEST).exists():
        whole = last_checkpoint(Path(folder).absolute().parent)
        instead = f"go on from {whole}" if whole else "no other checkpoint beside it is whole, so start anew"
        raise InputError(f"{folder}: {reason}; {instead}")
    if reason is not None:
        logger.warning(f"{folder}: {reason}; whether its files are as they were written is not checked")
    check_folder(folder)
    _check_state(Path(folder, TRAINER_STATE_NAME))
    if any(Path(folder).glob("global_step*")):  # DeepSpeed has files of its own
        return folder
    if not any(Path(folder).glob("*optimizer*")):
        raise InputError(
            f"{folder}: the optimizer's state is not in it (save_only_model), so that no run can go on from it; to "
            f"train on from its weights, give the folder as the model"
        )
    for name in ("scheduler", "rng_state"):
        if not any(Path(folder).glob(f"{name}*")):
            raise InputError(f"{folder}: {name} is missing, so that no run can go on from it exactly; use one before")
    return folder


def _check_state(file: Path) -> None:
    """Raise [`InputError`] unless it is the state of a training, which would begin anew where the step is missing."""
    state = read_object(file)
    types = {"global_step": int, "max_steps": int, "log_history": list, "stateful_callbacks": dict}
    for name, kind in types.items():
        value = state.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or kind is int and value < 0:
            raise InputError(f"{file}: {name}={str(value)[:40]!r} cannot be; go on from another checkpoint")
    with loading(str(file)):
        TrainerState.load_from_json(str(file))


class ExactResume:
    """
    What the trainers share: whole checkpoints, and `train(resume_from_checkpoint=...)` from the last of them (`True`)
    or a named one, refused if it is not whole or of another tokenizer. Other versions, settings or data are a warning.

    Overrides: `train`, `_run_epoch`, `_get_output_dir`, `_save_checkpoint`, `_load_from_checkpoint`,
    `_load_optimizer_and_scheduler`, `_load_rng_state`; calls `_push_from_checkpoint`.
    """

    _unfinished: str | None = None  # folder that a checkpoint is being written into
    _counted = (-1, 0)  # optimizer step, and micro-batches of it

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir, UNFINISHED), ignore_errors=True)
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
            check_fit(self.accelerator.unwrap_model(self.model), folder)
            with loading(folder):
                self._load_progress(Path(folder))
            with preserved_rng():  # read once before anything is written; set when the first step begins
                self._load_rng_state(folder)
        try:
            return super().train(folder, *args, **kwargs)
        except NotFinite as error:
            raise NotFinite(f"{error}; {self._keep_what_is_good()}") from error

    def _datasets(self) -> dict[str, Any]:
        return {"train_dataset": self.train_dataset}

    def _progress(self) -> dict[str, Any]:
        """Of each process, what the parent's checkpoint lacks."""
        return {"tokens": self._total_train_tokens}

    def _save_progress(self, folder: Path) -> None:
        text = json.dumps(self._progress())
        of_process(folder, "progress", ".json", self.args).write_text(text, encoding="utf-8")

    def _load_progress(self, folder: Path) -> dict[str, Any]:
        file = of_process(folder, "progress", ".json", self.args)
        progress = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._total_train_tokens = progress.get("tokens", 0)
        return progress

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The parent's counts the steps behind each one, so that a run which had ended would get one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        pushes, self.args.push_to_hub = self.args.push_to_hub, False  # behind the renaming
        for callback in self.callback_handler.callbacks:  # new since the checkpoint that this run goes on from
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, {})
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = str(run / UNFINISHED)
        try:
            super()._save_checkpoint(model, trial)
            self._save_progress(run / UNFINISHED / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish_checkpoint(run, name)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
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
        _flush_folder(run)
        _rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    # Going on

    def _facts(self) -> dict[str, Any]:
        settings = {name: value for name, value in self.args.to_dict().items() if not name.startswith(_PLACES)}
        return {
            "trainer": type(self).__name__,
            "step": self.state.global_step,
            "processes": self.args.world_size,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "data": self._data,
            "settings": json.loads(json.dumps(settings, default=str)),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with loading(f"the weights in {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(f"optimizer and scheduler in {checkpoint}"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(f"the random states in {checkpoint}"):
            super()._load_rng_state(checkpoint)

    def _check_run(self, folder: Path) -> None:
        if isinstance(self.processing_class, PreTrainedTokenizerBase) and any(folder.glob("*token*")):
            check_tokenizers(self.processing_class, load_tokenizer(str(folder)), ("this run", str(folder)))
        if not (folder / MANIFEST).is_file():
            return
        then, now = _manifest(folder), self._facts()
        for name in ("trainer", "processes", "settings", "versions", "data"):
            if not isinstance(then.get(name), type(now[name])):
                raise InputError(f"{folder / MANIFEST}: {name} is missing or no fact; go on from another checkpoint")
        if then["trainer"] != now["trainer"]:
            raise InputError(f"{folder}: a checkpoint of {then['trainer']}, not of {now['trainer']}; give its own")
        groups = {"settings": "settings", "versions": "versions", "data": "other rows in"}
        differences = [
            f"{words} {', '.join(_difference(key, then[key], now[key], name) for name in other)}"
            for key, words in groups.items()
            if (other := [name for name in now[key] if then[key].get(name) != now[key][name]])
        ]
        if then["processes"] != now["processes"]:
            differences.append(f"{now['processes']} processes and not {then['processes']}")
        if differences:
            logger.warning(f"{folder}: this is not exactly the run that was stopped: {'; '.join(differences)}")


def _rotate(run: Path, limit: int | None, best: str | None) -> None:
    """
    transformers' `rotate_checkpoints`, which deletes where they stand: a run that is killed meanwhile would leave
    half a one.
    """
    found = sort_checkpoints(str(run), use_mtime=True)
    kept = {found[-1], str(Path(best))} if best else {found[-1]}
    too_many = len(found) - max(limit, len(kept)) if limit and limit > 0 else 0
    for folder in [folder for folder in found if folder not in kept][: max(too_many, 0)]:
        os.rename(folder, run / UNFINISHED / f"old-{Path(folder).name}")
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


def _difference(key: str, then: dict[str, Any], now: dict[str, Any], name: str) -> str:
    return name if key == "data" else f"{name} {now[name]} and not {then.get(name)}"


def _digest(dataset: Any) -> str | None:
    """Of a dataset's number of rows, and of a thousand of them, evenly spread; none of a stream."""
    if not isinstance(dataset, Dataset):
        return None
    some = dataset.select(range(0, len(dataset), max(1, len(dataset) // _SAMPLED)))
    return hashlib.sha256(json.dumps([len(dataset), some[:]], default=str).encode()).hexdigest()


def of_process(folder: Path, name: str, suffix: str, args: Any) -> Path:
    """A file that each process has its own of, as Trainer's own are named."""
    return folder / (f"{name}_{args.process_index}{suffix}" if args.world_size > 1 else f"{name}{suffix}")


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _files(folder: Path) -> dict[str, Path]:
    """All files below a folder but the manifest, by their names relative to it."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in paths.items() if name != MANIFEST}


def _flush_folder(folder: Path) -> None:
    """So that new names in it are on disk too; Windows has no such call."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
