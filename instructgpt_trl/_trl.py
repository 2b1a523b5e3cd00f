"""
The only door to what is not public in TRL, transformers and PEFT, and the list of every parent method that is
overridden or called privately.

tests/test_contract.py holds a hash of the source of each. When one changes, the test names the method to read again.
"""

import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from peft.tuners.lora.layer import LoraVariant
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_callable_name,
    get_config_model_id,
    is_async_callable,
)

__all__ = [
    "OVERRIDDEN",
    "LoraVariant",
    "add_fused_lm_head",
    "cache_with_room",
    "create_model_from_path",
    "disable_dropout_in_model",
    "disable_gradient_checkpointing",
    "get_callable_name",
    "get_config_model_id",
    "is_async_callable",
    "kernels_of_a_gpu",
    "lm_head_tiles",
    "one_tile_read",
    "precision",
    "preserved_rng",
    "sampled_by_cdf",
]

RESUME = (
    "_run_epoch",
    "_get_output_dir",
    "_save_checkpoint",
    "_push_from_checkpoint",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
)  # by `ExactResume`, in all three

# (class, method): overridden in our subclass, or called although it is private
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "SFTConfig": ("__post_init__",),
    "SFTTrainer": (
        "__init__",
        "train",
        "training_step",
        "evaluate",
        "evaluation_loop",
        "_prepare_dataset",
        *RESUME,
    ),
    "RewardConfig": ("__post_init__",),
    "RewardTrainer": (
        "__init__",
        "train",
        "training_step",
        "evaluate",
        "_prepare_dataset",
        "_set_signature_columns_if_needed",
        "compute_loss",
        "log",
        "_save",
        *RESUME,
    ),
    "RLOOConfig": ("__post_init__",),
    "RLOOTrainer": (
        "__init__",
        "train",
        "evaluate",
        "log",
        "training_step",
        "prediction_step",
        "create_optimizer",
        "create_scheduler",
        "_get_train_sampler",
        "_tokenize_prompts",
        "_generate_single_turn",
        "_generate",
        "_calculate_rewards",
        "_prepare_inputs",
        "_clip_grad_norm",
        "_save",
        "_load_best_model",
        *RESUME,
    ),
    "VLLMGeneration": ("_iter_named_params", "sync_weights", "generate"),
}


def precision(config) -> None:
    """
    Choose bf16, fp16 or fp32 for `config` by what the device computes natively, if the user chose neither: bf16 on
    CUDA from compute capability 8.0, fp16 below it (T4, V100), fp32 on Apple MPS and on a CPU. Call it before the
    parent's `__post_init__`, which otherwise turns bf16 on everywhere (and raises without a GPU). Without a GPU there
    is no memory to pin either, and torch warns of it at every epoch.
    """
    if not torch.cuda.is_available():
        config.dataloader_pin_memory = False
    if config.bf16 is not None or config.fp16:
        return
    cuda = torch.cuda.is_available() and not config.use_cpu
    config.bf16 = cuda and torch.cuda.get_device_capability()[0] >= 8
    config.fp16 = cuda and not config.bf16


@contextmanager
def lm_head_tiles(device: torch.device) -> Iterator[None]:
    """
    Inside, the fused head works on tiles of 512 words of the vocabulary where it has no Triton kernel, not on TRL's
    32,768: there it makes half a dozen float32 copies of a tile, 800 MB for 1,000 tokens. Small ones stay in a CPU's
    cache: with 512 words it takes half the time of 2,048, for 1,000 and for 3,000 tokens.
    """
    name = "_CHUNKED_LOGPROB_CHUNK_SIZE"
    before = getattr(trl.trainer.utils, name)
    try:
        if device.type not in ("cuda", "xpu") and not _as_on_a_gpu:
            setattr(trl.trainer.utils, name, 512)
        yield
    finally:
        setattr(trl.trainer.utils, name, before)


@contextmanager
def sampled_by_cdf() -> Iterator[None]:
    """
    Inside, `torch.multinomial` draws one number a row of what `softmax` gave where their sum passes a uniform number,
    on a CPU. Otherwise it draws an exponential for every word of the vocabulary: with SmolLM2's 49,152 and 16 rows 20
    of the 110 ms of a decoding step, and now 1.4.
    """
    multinomial = torch.multinomial

    def draw(input: torch.Tensor, num_samples: int, *args, **kwargs) -> torch.Tensor:  # torch's own names
        if (num_samples, input.device.type, input.dim(), args, kwargs) == (1, "cpu", 2, (), {}):
            if (total := input.sum(1)).isfinite().all() and (total > 0).all():  # else torch says what is wrong
                points = torch.rand(len(input), dtype=torch.float64)
                return torch.stack([passed(row, point) for row, point in zip(input, points, strict=True)])
        return multinomial(input, num_samples, *args, **kwargs)

    def passed(row: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        sums = row.to(torch.float64, copy=True).cumsum_(0)
        return torch.searchsorted(sums, point[None] * sums[-1], right=True).clamp_(max=len(row) - 1)

    torch.multinomial = draw
    try:
        yield
    finally:
        torch.multinomial = multinomial


ROOM = 32  # tokens


@contextmanager
def cache_with_room() -> Iterator[None]:
    """
    Inside, keys and values of a layer of `DynamicCache` are views of tensors as long as the next multiple of `ROOM`,
    into which those of a decoding step are written; otherwise all are copied at every step.
    """
    update = DynamicLayer.update

    def appended(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        *heads, tokens, size = new.shape
        before = old.size(-2) if old.numel() else 0
        after = before + tokens
        if not before or old.stride(-3) < after * size:  # no room behind the tokens of a head
            room = new.new_empty(*heads, math.ceil(after / ROOM) * ROOM, size)
            if before:
                room[..., :before, :] = old
            old = room
        whole = old.as_strided((*heads, after, size), old.stride())
        whole[..., before:, :] = new
        return whole

    def append(self: DynamicLayer, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = appended(self.keys, key_states), appended(self.values, value_states)
        return self.keys, self.values

    DynamicLayer.update = append
    try:
        yield
    finally:
        DynamicLayer.update = update


_as_on_a_gpu = False


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """
    Inside, tensors on a CPU are made as on a GPU, and no numbers, for predictions of memory: there a kernel of the
    fused head works on a tile in place, and dropout keeps which elements it dropped as a byte each.
    """
    global _as_on_a_gpu
    dropout = F.dropout
    try:
        _as_on_a_gpu, F.dropout = True, _fused_dropout
        with _tiles_read_by(lambda read: lambda *args, **kwargs: None):
            yield
    finally:
        _as_on_a_gpu, F.dropout = False, dropout


@contextmanager
def one_tile_read() -> Iterator[None]:
    """
    Inside, a pass of the fused head without a Triton kernel reads its first tile only, for predictions of memory: the
    others, a hundred with SmolLM2's vocabulary, would take as much one after the other.
    """

    def first(read: Callable) -> Callable:
        signature = inspect.signature(read)

        def read_first(*args: Any, **kwargs: Any) -> None:
            if signature.bind(*args, **kwargs).arguments["vocab_start"] == 0:
                read(*args, **kwargs)

        return read_first

    with _tiles_read_by(first):
        yield


@contextmanager
def _tiles_read_by(change: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, the fused head's functions of a tile, for devices without Triton, are what `change` makes of them."""
    kernels, names = trl.kernels.chunked_logprob, ("_forward_tile", "_backward_tile")
    before = {name: getattr(kernels, name) for name in names}
    try:
        for name, read in before.items():
            setattr(kernels, name, change(read))
        yield
    finally:
        for name, read in before.items():
            setattr(kernels, name, read)


def _fused_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p > 0 else x


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the random number generators of Python, NumPy and torch as they were: seeds set inside stay inside."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
