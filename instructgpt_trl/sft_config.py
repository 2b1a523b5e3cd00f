"""Configuration of the SFT stage: TRL's, with the paper's defaults and three new fields."""

from dataclasses import dataclass, field

import trl
from transformers import SchedulerType

from ._trl import precision
from .config_checks import check_settings
from .ranges import BELOW_1, COUNT

OWN = {"residual_dropout": BELOW_1, "pretraining_fraction": BELOW_1, "rm_score_max_new_tokens": COUNT}


@dataclass
class SFTConfig(trl.SFTConfig):
    r"""
    Configuration of [`SFTTrainer`]. Fields of TRL's `SFTConfig` keep their names and meaning; the ones below are new
    or have another default. Source: InstructGPT 3.5, C.1 and C.3.

    Parameters:
        > New

        residual_dropout (`float`, *optional*, defaults to `0.2`):
            Probability of dropping from what each attention and feed-forward block adds to the residual stream, while
            training [3.5, C.1]. Sets the architecture's own residual dropout, or adds one where it has none. `0`
            leaves the model as it is, its own dropout included. The paper's value is for GPT-3; a model that was
            pretrained without dropout may not stand it (SmolLM2-135M-Instruct, 24 demonstrations, three seeds: 2.2
            nats a token become 2.3 to 2.4 in training mode at 0.01, 10.6 to 12.0 at 0.2), so compare the training loss
            with `eval_loss`.
        pretraining_fraction (`float`, *optional*, defaults to `0.1`):
            Share of pretraining blocks among all training examples [C.3]. Used only with a `pretraining_dataset`; `0`
            mixes nothing in.
        rm_score_max_new_tokens (`int`, *optional*, defaults to `128`):
            Longest completion, in tokens, that is generated to be scored by a `reward_model` at each evaluation. The
            paper's demonstrations have 38 to 88 tokens on average [A.2, Table 8]. Used only with a `reward_model`.
        alarms (`str`, *optional*, defaults to `"warn"`):
            What happens when a metric says that the run goes wrong ([`instructgpt_trl.alarms`]): "warn" says so once,
            with cause and setting to try, "stop" also ends the run behind that step, "none" looks at nothing.

        > Other defaults

        learning_rate (`float`, *optional*, defaults to `9.65e-6`):
            Peak learning rate of the 1.3B and 6B models [C.1].
        num_train_epochs (`float`, *optional*, defaults to `16`):
            Epochs [3.5, C.1]. The checkpoint is then chosen by reward-model score, see [`SFTTrainer`].
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine_with_min_lr"`):
            With `lr_scheduler_kwargs` left out it ends at 10 % of the peak, without warm-up [C.1].
        adam_beta2 (`float`, *optional*, defaults to `0.95`):
            Second beta of Adam; the first is 0.9 [C].
        restore_callback_states_from_checkpoint (`bool`, *optional*, defaults to `True`):
            A resumed run has the patience left that early stopping had.
        bf16 (`bool`, *optional*):
            If neither `bf16` nor `fp16` is set: bf16, fp16 or fp32 by what the device has.

    Raises:
        [`InputError`]: a field outside its range.
    """

    residual_dropout: float = field(
        default=0.2,
        metadata={
            "help": "Probability of dropping from what each attention and feed-forward block adds to the residual "
            "stream, while training (InstructGPT 3.5, C.1). 0 leaves the model as it is."
        },
    )
    pretraining_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of pretraining blocks among all training examples (InstructGPT C.3). Used only with a "
            "pretraining dataset."
        },
    )
    rm_score_max_new_tokens: int = field(
        default=128,
        metadata={
            "help": "Longest completion, in tokens, that is generated to be scored at each evaluation. Used only with "
            "a reward model."
        },
    )

    alarms: str = field(
        default="warn",
        metadata={"help": "When metrics go wrong: none, warn or stop.", "choices": ["none", "warn", "stop"]},
    )

    learning_rate: float = field(
        default=9.65e-6, metadata={"help": "Peak learning rate of AdamW (InstructGPT C.1, 1.3B and 6B)."}
    )
    num_train_epochs: float = field(
        default=16.0, metadata={"help": "Total number of training epochs (InstructGPT 3.5, C.1)."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine_with_min_lr",
        metadata={
            "help": "Learning rate schedule; the default ends at 10%% of the peak (InstructGPT C.1) unless "
            "lr_scheduler_kwargs says otherwise."
        },
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW (InstructGPT C)."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume with the states of callbacks too, early stopping's patience."}
    )

    def __post_init__(self):
        check_settings(self, OWN)
        is_default = SchedulerType(self.lr_scheduler_type) == SchedulerType.COSINE_WITH_MIN_LR
        if is_default and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        precision(self)
        super().__post_init__()
