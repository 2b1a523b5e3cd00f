"""
Checkpoints that are whole or not there, and one run at a time in a folder of them.

A checkpoint is written under another name, flushed to disk and renamed: `checkpoint-N` is there with all it needs or
not at all. `checkpoint.json` in it has size and SHA-256 of every file, so that what was cut short or changed
afterwards is recognised, and what the run was: versions, settings, data.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from .data import InputError
from .models.folders import check_folder, loading, read_object
from .models.guards import RunStopped

logger = logging.get_logger(__name__)

__all__ = ["RunStopped", "check_checkpoint", "flaw", "last_checkpoint"]

MANIFEST, FORMAT = "checkpoint.json", 1
UNFINISHED = ".unfinished-checkpoint"
LOCK = "_training.lock"  # a name that Trainer does not push to the hub


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write `checkpoint.json`, with every file of the folder and `facts` in it, and flush all of it to disk."""
    files = {}
    for name, path in sorted(_files(folder).items()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"bytes": file.tell(), "sha256": digest}
            os.fsync(file.fileno())
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **facts, "files": files}, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush_folder(path)


def clear_unfinished(run: Path) -> None:
    """Remove what a save has left behind; a link there is removed and not followed."""
    if (run / UNFINISHED).is_symlink():
        (run / UNFINISHED).unlink()
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


def flaw(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, to be read by people; none if every file is as it was written."""
    folder = Path(folder)
    try:
        known = read_manifest(folder)
        sizes, digests = ({name: about[key] for name, about in known["files"].items()} for key in ("bytes", "sha256"))
        if not all(isinstance(known[name], dict) for name in ("versions", "data", "settings")) or not sizes:
            raise ValueError
        known["trainer"], known["processes"]  # noqa: B018  a KeyError, if it lacks them
        if known["format"] != FORMAT:
            return f"{MANIFEST} has format {str(known['format'])[:20]!r}, and this version reads {FORMAT}"
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
    others = {"best_global_step": int | None, "best_model_checkpoint": str | None, "train_batch_size": int | None}
    others |= {"best_metric": float | int | None, "logging_steps": float | int, "total_flos": float | int}
    entries = {"log_history": state["log_history"], "stateful_callbacks": list(state["stateful_callbacks"].values())}
    wrong = [name for name, kind in others.items() if name in state and not isinstance(state[name], kind)]
    wrong += [name for name, items in entries.items() if not all(isinstance(one, dict | list) for one in items)]
    if wrong:
        raise InputError(f"{file}: {wrong[0]} cannot be so; go on from another checkpoint")
    with loading(str(file)):
        TrainerState.load_from_json(str(file))


@contextmanager
def only_run(folder: str | os.PathLike) -> Iterator[None]:
    """
    Inside, no other run trains into the folder, in which two would replace and delete each other's checkpoints. The
    system forgets the lock of a run that is killed.

    Raises:
        [`InputError`]: another run does so now.
    """
    lock = FileLock(Path(folder) / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{folder}: another run is training into this folder; wait for its end, or give another output_dir"
        ) from None
    except OSError as error:  # not every file system knows locks
        logger.warning(f"{folder} cannot be locked against a second run ({error.strerror}); start none into it")
    try:
        yield
    finally:
        if lock.is_locked:  # not in a process that was forked from this one
            with suppress(OSError):  # Windows keeps files that are open
                os.unlink(Path(folder) / LOCK)
            lock.release()


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """
    transformers' `rotate_checkpoints`, which deletes where they stand: a run that is killed meanwhile would leave
    half a one.
    """
    found = sort_checkpoints(str(run), use_mtime=True)
    kept = {found[-1], str(Path(best))} if best else {found[-1]}
    too_many = len(found) - max(limit, len(kept)) if limit and limit > 0 else 0
    for folder in [folder for folder in found if folder not in kept][: max(too_many, 0)]:
        os.rename(folder, run / UNFINISHED / f"old-{Path(folder).name}")
    clear_unfinished(run)


def of_process(folder: Path, name: str, suffix: str, args: Any) -> Path:
    """A file that each process has its own of, as Trainer's own are named."""
    return folder / (f"{name}_{args.process_index}{suffix}" if args.world_size > 1 else f"{name}{suffix}")


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _files(folder: Path) -> dict[str, Path]:
    """All files below a folder but the manifest, by their names relative to it."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in paths.items() if name != MANIFEST}


def flush_folder(folder: Path) -> None:
    """So that new names in it are on disk too; Windows has no such call."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
