"""What several processes of one run have in common: rows, sums, weights. In one process everything is as it is."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from datasets import IterableDataset
from torch import Tensor

from .data import InputError
from .functional import whiten

UNTESTED = "INSTRUCTGPT_TRL_UNTESTED"


def check_launch(args: Any, eval_dataset: Any = None) -> None:
    """
    Refuse a way of starting several processes that would go wrong later, or that nobody has tried.

    Raises:
        [`InputError`]: the launcher's processes do not know of each other; DeepSpeed or FSDP; an evaluation set that
            is a stream, whose last rows would count twice.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > args.world_size:  # accelerate joins them for GPUs, and on a CPU if it is told that it is one
        raise InputError(
            f"{launched} processes were launched, and each would train alone into {args.output_dir}: set use_cpu to "
            f"true on a machine without GPUs, or launch one process"
        )
    streams = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if args.world_size > 1 and any(isinstance(stream, IterableDataset) for stream in streams):
        raise InputError(
            f"eval_dataset: a stream, whose last rows {args.world_size} processes would count twice; load it without "
            f"streaming"
        )
    kind = getattr(args.distributed_state, "distributed_type", None)
    if kind in ("DEEPSPEED", "FSDP") and os.environ.get(UNTESTED) != "1":
        raise InputError(
            f"{kind.value}: nobody has run this trainer under it; launch with accelerate launch --multi_gpu, whose "
            f"results are tested, or set {UNTESTED}=1 in the environment to try it"
        )


def of_all(accelerator: Accelerator, items: list[Any], training: bool) -> list[Any]:
    """The items of all processes, in their order; without those that an evaluation's last batch repeats."""
    if training or accelerator.num_processes == 1:
        return gather_object(items)
    return accelerator.gather_for_metrics(items, use_gather_object=True)


def sum_over_all(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Make each tensor the sum over all processes, in place."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def same_in_all(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Make each tensor that of the first process, in place."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            broadcast(tensor)


def whiten_over_all(accelerator: Accelerator, x: Tensor, mask: Tensor) -> Tensor:
    """[`whiten`] by the mean and variance of all processes' elements."""
    if accelerator.num_processes == 1:
        return whiten(x, mask)
    parts = gather_object([x[mask].cpu()])
    whole = torch.cat(parts)[None]
    own = whiten(whole, torch.ones_like(whole, dtype=torch.bool))[0].split([len(part) for part in parts])
    out = torch.zeros_like(x)
    out[mask] = own[accelerator.process_index].to(x)
    return out
