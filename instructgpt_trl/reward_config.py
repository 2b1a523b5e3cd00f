"""Configuration of the reward-model stage: TRL's, with the paper's defaults."""

from dataclasses import dataclass, field

import trl
from transformers import SchedulerType

from ._trl import precision
from .config_checks import check_settings
from .data import InputError


@dataclass
class RewardConfig(trl.RewardConfig):
    r"""
    Configuration of [`RewardTrainer`]. Fields of TRL's `RewardConfig` keep their names and meaning; the ones below
    have another default, or mean something more. Source: InstructGPT 3.5 and C.2.

    Parameters:
        > Other defaults

        learning_rate (`float`, *optional*, defaults to `9e-6`):
            Peak learning rate of the 6B reward model; half or one and a half times of it made no difference [C.2].
        num_train_epochs (`float`, *optional*, defaults to `1`):
            Epochs; very sensitive to more, which overfit [C.2].
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine_with_min_lr"`):
            With `lr_scheduler_kwargs` left out it ends at 10 % of the peak, without warm-up [C.2].
        adam_beta2 (`float`, *optional*, defaults to `0.95`):
            Second beta of Adam; the first is 0.9 [C].
        restore_callback_states_from_checkpoint (`bool`, *optional*, defaults to `True`):
            A resumed run has the patience left that early stopping had.
        bf16 (`bool`, *optional*):
            If neither `bf16` nor `fp16` is set: bf16, fp16 or fp32 by what the device has.

        > New

        prefix_sharing (`str`, *optional*, defaults to `"auto"`):
            Encode a prompt once for all its completions: "auto" where the network gives the same scores so, which is
            checked at the start, and where it takes fewer operations; "on" refuses other networks; "off" encodes each
            completion behind a prompt of its own, as TRL does.
        alarms (`str`, *optional*, defaults to `"warn"`):
            What happens when a metric says that the run goes wrong ([`instructgpt_trl.alarms`]): "warn" says so once,
            with cause and setting to try, "stop" also ends the run behind that step, "none" looks at nothing.

        > Same default, more meaning

        per_device_train_batch_size (`int`, *optional*, defaults to `8`):
            Counts prompts, each with all its completions. The paper has 64 in all [C.2].
        max_length (`int` or `None`, *optional*, defaults to `1024`):
            Most tokens of a prompt and a completion together. A completion over it is taken out of its ranking, not
            the ranking out of the data. The paper's context is 2,048 tokens [C].
        center_rewards_coefficient (`float`, *optional*):
            Weight of the mean over prompts of the mean over untied pairs of (s_i + s_j)^2; not in the paper.
    """

    learning_rate: float = field(
        default=9e-6, metadata={"help": "Peak learning rate of AdamW (InstructGPT C.2, 6B reward model)."}
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Total number of training epochs (InstructGPT C.2; more overfits)."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine_with_min_lr",
        metadata={
            "help": "Learning rate schedule; the default ends at 10%% of the peak (InstructGPT C.2) unless "
            "lr_scheduler_kwargs says otherwise."
        },
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW (InstructGPT C)."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume with the states of callbacks too, early stopping's patience."}
    )

    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "Encode a prompt once for its completions: auto, on or off.",
            "choices": ["auto", "on", "off"],
        },
    )

    alarms: str = field(
        default="warn",
        metadata={"help": "When metrics go wrong: none, warn or stop.", "choices": ["none", "warn", "stop"]},
    )

    def __post_init__(self):
        check_settings(self, {})
        if self.prefix_sharing not in ("auto", "on", "off"):
            raise InputError(f"prefix_sharing={self.prefix_sharing!r}: expected 'auto', 'on' or 'off'")
        is_default = SchedulerType(self.lr_scheduler_type) == SchedulerType.COSINE_WITH_MIN_LR
        if is_default and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        precision(self)
        super().__post_init__()
