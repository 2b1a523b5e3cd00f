"""What settings may be, one by one. The parents take most of their numbers as they come, negative ones and NaN too."""

import inspect
import json
import math
from collections.abc import Mapping
from enum import Enum
from numbers import Real
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import IntervalStrategy, SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from .data import InputError
from .ranges import ABOVE_0, BELOW_1, COUNT, FROM_0, SEED, Range, check_ranges, shown

# Fields of transformers and TRL. `None` is allowed where it is the default
RANGES: dict[str, Range] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), COUNT
    ),
    **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("dataset_num_proc", "ddp_timeout", "max_length", "num_iterations"), COUNT),
    **dict.fromkeys(("num_generations", "num_generations_eval", "generation_batch_size"), COUNT),
    "num_completions_to_print": Range(0, whole=True),
    **dict.fromkeys(("steps_per_generation", "max_completion_length"), COUNT),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "eval_delay"), FROM_0),
    **dict.fromkeys(("center_rewards_coefficient", "router_aux_loss_coef", "eval_steps"), FROM_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), BELOW_1),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps"), ABOVE_0),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "warmup_steps": Range(0, 2**31),
    "temperature": Range(1e-4),
    "max_steps": Range(-1, open=(0,), whole=True),
    "max_grad_norm": Range(0, infinite=True),
    "neftune_noise_alpha": FROM_0,
    "save_total_limit": Range(0, whole=True),
    "dataloader_num_workers": Range(0, whole=True),
}
CHOICES: dict[str, type[Enum]] = {
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
}
STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")  # of rows
ALARM_LEVELS = ("none", "warn", "stop")
# Objects, or their JSON text, which the parents know by its first character
OBJECTS = (
    "lr_scheduler_kwargs",
    "model_init_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
)
OBJECTS += ("generation_kwargs", "chat_template_kwargs", "dataset_kwargs", "transformers_continuous_batching_config")
# Objects with keys that are known: the parameters of what gets them
KEYS = {
    "accelerator_config": {*inspect.signature(AcceleratorConfig).parameters},
    "gradient_checkpointing_kwargs": {*inspect.signature(checkpoint).parameters, "preserve_rng_state"}
    - {"function", "args", "kwargs"},
}


def check_settings(config: Any, own: Mapping[str, Range]) -> None:
    """
    Refuse a setting that would mean nothing, before anything reads it.

    Args:
        config: a dataclass, as it was given.
        own: the ranges of its fields besides those of `RANGES`.

    Raises:
        [`InputError`]: the field, its value and what was expected.
    """
    check_ranges(config, {**RANGES, **own})
    if config.output_dir is not None and not str(config.output_dir).strip():
        raise InputError(f"output_dir={config.output_dir!r}: expected the name of a folder; correct it")
    multiple = getattr(config, "pad_to_multiple_of", None)  # a word, too
    if isinstance(multiple, Real) and multiple not in COUNT:
        raise InputError(f"pad_to_multiple_of={multiple}: expected {COUNT} or none; correct it")
    if getattr(config, "activation_offloading", False) and not torch.accelerator.is_available():
        raise InputError("activation_offloading: there is no GPU to take activations from; leave it out")
    for name, kind in CHOICES.items():
        value = getattr(config, name)
        if value not in list(kind):
            words = ", ".join(repr(choice.value) for choice in kind)
            quotes = "; in YAML write it in quotes" if isinstance(value, bool) else ""
            raise InputError(f"{name}={shown(value)}: expected one of {words}{quotes}")
    if config.train_sampling_strategy not in STRATEGIES:
        words = ", ".join(map(repr, STRATEGIES))
        raise InputError(f"train_sampling_strategy={shown(config.train_sampling_strategy)}: expected one of {words}")
    if config.alarms not in ALARM_LEVELS:
        raise InputError(f"alarms={config.alarms!r}: expected {', '.join(map(repr, ALARM_LEVELS))}")
    for name in OBJECTS:
        value = getattr(config, name, None)
        if value is not None and _as_object(value) is None:
            raise InputError(f"{name}={shown(value)}: expected an object, as in '{{\"key\": 1}}'; correct it")
    for name, known in KEYS.items():
        for key in _as_object(getattr(config, name)) or ():
            if key not in known:
                raise InputError(f"{name}: {shown(key)} is none of {', '.join(sorted(known))}; correct it")
    _check_compilation(config)
    _check_schedule(config)


def _check_compilation(config: Any) -> None:
    """What `torch.compile` would refuse at the first step, or accelerate when it is made."""
    backend, mode = config.torch_compile_backend, config.torch_compile_mode
    if backend is not None and str(backend).upper() not in list(DynamoBackend):
        words = ", ".join(repr(choice.value.lower()) for choice in DynamoBackend)
        raise InputError(f"torch_compile_backend={shown(backend)}: expected one of {words}; correct it")
    if mode is not None:
        try:
            torch.compile(torch.nn.Identity(), mode=mode)
        except RuntimeError as error:
            raise InputError(f"torch_compile_mode={shown(mode)}: {error}; correct it") from None


def _check_schedule(config: Any) -> None:
    """Raise [`InputError`] if `lr_scheduler_kwargs` has a key or a value that the schedule does not take."""
    given = _as_object(config.lr_scheduler_kwargs) or {}
    schedule = SchedulerType(config.lr_scheduler_type)
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[schedule]).parameters.values()
    own = {one.name for one in parameters} - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    unknown = sorted(set(given) - own, key=str)
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in parameters):
        takes = f"takes {', '.join(sorted(own))}" if own else "takes none"
        raise InputError(
            f"lr_scheduler_kwargs: {shown(str(unknown[0]))}, and the schedule {schedule.value} {takes}; correct it"
        )
    if not given and schedule != SchedulerType.WARMUP_STABLE_DECAY:  # which has no defaults
        return
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = []
    try:
        made = get_scheduler(schedule, optimizer, 1, 4, scheduler_specific_kwargs=dict(given))
        while len(rates) < 4 and isinstance(made, LambdaLR):  # the others look at metrics
            optimizer.step()
            made.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
    except Exception as error:  # of any type, as the value is
        raise InputError(
            f"lr_scheduler_kwargs={shown(given)}: there is no schedule {schedule.value} with it ({error}); correct it"
        ) from None
    if not all(0 <= rate < math.inf for rate in rates):
        raise InputError(
            f"lr_scheduler_kwargs={shown(given)}: the schedule {schedule.value} has learning rates below 0 or none "
            f"with it; correct it"
        )


def _as_object(value: Any) -> Mapping | None:
    """An object, or that of its JSON text; none of anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.startswith("{") else None
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None
