"""Settings of [`PPOTrainer`]: TRL's `RLOOConfig` with the paper's values and the fields that PPO-ptx needs."""

import math
from dataclasses import dataclass, field
from numbers import Real

from trl import RLOOConfig

from ._trl import precision
from .config_checks import check_settings
from .data import InputError
from .ranges import ABOVE_0, COUNT, FROM_0, SHARE, Range

CLIP = Range(0, open=(0,), infinite=True)
OWN = {
    **dict.fromkeys(("gamma", "lam", "ema_decay"), SHARE),
    **dict.fromkeys(("beta", "vf_coef", "ptx_coef", "value_learning_rate"), FROM_0),
    **dict.fromkeys(("cliprange_value", "epsilon"), CLIP),
    **dict.fromkeys(("ptx_ratio", "kl_horizon", "max_prompt_length", "generation_micro_batch_size"), COUNT),
    "warmup_updates": Range(0, 2**31, whole=True),
    "ptx_max_length": Range(2, whole=True),
    "missing_eos_score": Range(),
    "kl_target": ABOVE_0,
}


@dataclass
class PPOConfig(RLOOConfig):
    r"""
    Configuration of [`PPOTrainer`]. Fields of `RLOOConfig` keep their names and meaning (`router_aux_loss_coef` has
    none here: there is no balancing loss of experts); the ones below are new or have another default. Sources: [P] the
    InstructGPT paper, [L] openai/lm-human-preferences, [N+] vwxyzjn/summarize_from_feedback_details.

    Batches are counted as in TRL: `per_device_train_batch_size` episodes a micro-batch, `gradient_accumulation_steps`
    micro-batches a minibatch (one optimizer step), `steps_per_generation` micro-batches a batch (one rollout),
    `num_iterations` inner epochs over it. The paper's 512 episodes in minibatches of 64 are 8, 8 and 64.

    Parameters:
        max_prompt_length (`int`, *optional*, defaults to `1024`):
            Longest prompt in tokens; longer ones are dropped and reported [P C].
        value_learning_rate (`float`, *optional*, defaults to `9e-6`):
            Peak learning rate of the value model [P C.4].
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Factor of the value loss [L, N+].
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            Clip range of the value function [L, N+].
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount a token; 1 is no discount [P C.4]. (The paper's gamma, the pretraining factor, is `ptx_coef`.)
        lam (`float`, *optional*, defaults to `0.95`):
            GAE lambda [L].
        ptx_coef (`float`, *optional*, defaults to `27.8`):
            Factor of the pretraining gradient, the paper's gamma [P C.4, Eq. 2]. No effect without a `ptx_dataset`.
        ptx_ratio (`int`, *optional*, defaults to `8`):
            Pretraining examples an episode [P C.4].
        ptx_max_length (`int` or `None`, *optional*):
            Tokens a pretraining example. `None` is `max_prompt_length + max_completion_length`, at the paper's values
            its context of 2,048, and never more than the model's context.
        warmup_updates (`int`, *optional*, defaults to `10`):
            Updates (rollouts) over which both learning rates rise linearly from a tenth to their peak [P C.4]. Used
            with the default `lr_scheduler_type="constant"`; with another scheduler it must be 0.
        ema_decay (`float`, *optional*, defaults to `0.992`):
            Decay of the moving average of the policy weights, taken each optimizer step and saved in `ema/` [P C.4].
            0 is off.
        missing_eos_score (`float` or `None`, *optional*):
            Score that replaces the reward of a completion without EOS; `None` is off. [L] and [N+] use -1.
        kl_target (`float` or `None`, *optional*):
            Adapt `beta` so that `objective/kl` stays near this many nats [L]; `None` keeps it fixed [P C.4].
        kl_horizon (`int`, *optional*, defaults to `10000`):
            Episodes over which an adaptive `beta` reacts [L].
        generation_micro_batch_size (`int` or `None`, *optional*):
            Completions sampled at a time; `None` samples a rollout at once. Fewer need less memory for the key-value
            cache and more time.
        save_completions (`bool`, *optional*, defaults to `True`):
            Append every completion with its score and KL to `completions.jsonl` in the output folder, those of
            evaluations to `eval_completions.jsonl`.
        alarms (`str`, *optional*, defaults to `"warn"`):
            What happens when a metric says that the run goes wrong ([`instructgpt_trl.alarms`]): "warn" says so once,
            with cause and setting to try, "stop" also ends the run behind that step, "none" looks at nothing.

    Changed defaults: `beta=0.02` [P], `num_generations=1` [P], `max_completion_length=1024` [P],
    `learning_rate=8.05e-6` (the highest that was stable without pretraining gradients [P C.4]),
    `lr_scheduler_type="constant"` [P], `adam_beta2=0.95` [P], `adam_epsilon=1e-5` [L, N+],
    `normalize_advantages=True` [L], `disable_dropout=True`, `restore_callback_states_from_checkpoint=True`, and bf16,
    fp16 or fp32 by what the device has.
    """

    beta: float = field(default=0.02, metadata={"help": "KL coefficient, per token, in nats."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions a prompt."})
    max_completion_length: int | None = field(default=1024, metadata={"help": "Longest completion in tokens."})
    learning_rate: float = field(default=8.05e-6, metadata={"help": "Peak learning rate of the policy."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's beta2."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Adam's epsilon."})
    normalize_advantages: bool = field(default=True, metadata={"help": "Whiten the advantages over a batch."})
    disable_dropout: bool = field(default=True, metadata={"help": "No dropout in any pass, LoRA's included."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume with the states of callbacks too, early stopping's patience."}
    )

    max_prompt_length: int | None = field(default=1024, metadata={"help": "Longest prompt in tokens."})
    value_learning_rate: float = field(default=9e-6, metadata={"help": "Peak learning rate of the value model."})
    vf_coef: float = field(default=0.1, metadata={"help": "Factor of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value function."})
    gamma: float = field(default=1.0, metadata={"help": "Discount a token."})
    lam: float = field(default=0.95, metadata={"help": "GAE lambda."})
    ptx_coef: float = field(default=27.8, metadata={"help": "Factor of the pretraining gradient (paper: gamma)."})
    ptx_ratio: int = field(default=8, metadata={"help": "Pretraining examples an episode."})
    ptx_max_length: int | None = field(default=None, metadata={"help": "Tokens a pretraining example."})
    warmup_updates: int = field(default=10, metadata={"help": "Updates of learning-rate warm-up from a tenth."})
    ema_decay: float = field(default=0.992, metadata={"help": "Decay of the policy's moving average; 0 is off."})
    missing_eos_score: float | None = field(default=None, metadata={"help": "Score of a completion without EOS."})
    kl_target: float | None = field(default=None, metadata={"help": "Target KL of an adaptive beta, in nats."})
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which an adaptive beta reacts."})
    generation_micro_batch_size: int | None = field(default=None, metadata={"help": "Completions sampled at a time."})
    save_completions: bool = field(default=True, metadata={"help": "Write completions.jsonl, eval_completions.jsonl."})
    alarms: str = field(
        default="warn",
        metadata={"help": "When metrics go wrong: none, warn or stop.", "choices": ["none", "warn", "stop"]},
    )

    def __post_init__(self):
        check_settings(self, OWN)
        self.temperature = float(self.temperature)  # transformers refuses a whole number
        precision(self)
        try:
            super().__post_init__()
        except ValueError as error:
            # The parent's last check asks for two completions a prompt, which only RLOO's baseline needs
            if self.num_generations != 1 or not str(error).startswith("RLOO requires at least 2 generations"):
                raise
        self._check_ranges()
        self._check_neutral_sampling()

    def _check_ranges(self) -> None:
        if self.kl_target is not None and not self.beta > 0:
            raise InputError(
                f"kl_target={self.kl_target} with beta={self.beta}: expected a beta above 0, which adapts; leave "
                f"kl_target out to keep it fixed"
            )
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise InputError(
                f"steps_per_generation={self.steps_per_generation}: expected a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}, so that a batch is whole minibatches"
            )
        weights, span = self.reward_weights, self.reward_clip_range
        if weights is not None and not (all(map(_is_finite, weights)) and any(weights)):
            raise InputError(f"reward_weights={weights}: expected numbers that are not all 0; correct it")
        if span is not None and not (len(span) == 2 and all(map(_is_finite, span)) and span[0] < span[1]):
            raise InputError(f"reward_clip_range={list(span)}: expected two numbers, the smaller first; correct it")
        if self.epsilon_high is not None and self.epsilon_high != self.epsilon:
            raise InputError("epsilon_high: PPO clips on both sides alike; remove it and set epsilon")
        if self.sync_ref_model:
            raise InputError("sync_ref_model: the reference of PPO is the frozen SFT model; set it to false")
        if self.neftune_noise_alpha is not None:
            raise InputError("neftune_noise_alpha: noise makes old and new log-probs those of two policies; remove it")
        if self.warmup_updates and self.lr_scheduler_type != "constant":
            raise InputError(
                f"lr_scheduler_type={self.lr_scheduler_type!s} has its own warm-up; set warmup_updates to 0 with it"
            )

    def _check_neutral_sampling(self) -> None:
        """Log-probs are those of the policy's own distribution, so sampling must not cut it (trl#235)."""
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
        set_ = {name: getattr(self, name) for name in neutral} | (self.generation_kwargs or {})
        allowed = {"temperature", "max_new_tokens", "max_length", "cache_implementation", "use_cache", "do_sample"}
        for name in ("max_new_tokens", "max_length"):
            if set_.get(name) not in (None, self.max_completion_length):
                raise InputError(f"generation_kwargs['{name}']: set max_completion_length; remove it")
        for name, value in set_.items():
            if name in neutral and value not in (neutral[name], None) and not (name == "min_p" and value == 0):
                raise InputError(
                    f"{name}={value}: PPO samples from the policy's own distribution; leave {name} at {neutral[name]}"
                )
            if name not in neutral and name not in allowed and value not in (None, 0, False):
                raise InputError(
                    f"generation_kwargs['{name}']={value}: PPO samples from the policy's own distribution, which this "
                    f"may change; remove it"
                )
        if (self.generation_kwargs or {}).get("do_sample", True) is not True:
            raise InputError("generation_kwargs['do_sample']: PPO needs sampling; leave it out")
        if "temperature" in (self.generation_kwargs or {}):
            raise InputError(
                "generation_kwargs['temperature']: set temperature itself, so that log-probs agree with it"
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
