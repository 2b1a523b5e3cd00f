"""PPO with a learned reward model, a value model and pretraining gradients, on TRL's online trainer."""

import copy
import os
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging
from trl import RLOOTrainer

from . import alarms
from ._trl import add_fused_lm_head, get_config_model_id, preserved_rng
from .data import InputError, check_output_dir, check_rows, check_tokenizers
from .data.completions import CompletionsFile
from .data.episodes import Episodes, by_length
from .data.pretraining import PretrainingStream
from .data.prompt_datasets import check_prompts, drop_long_prompts, longest_prompt
from .functional import gae, token_rewards
from .models.ema import EMA
from .models.guards import stop_unless_finite
from .models.limits import RowLimit, freed_memory_reused
from .models.loading import (
    check_end,
    check_positions,
    check_vocabulary,
    context_length,
    float32_adapters,
    fold_last_position,
    load_policy,
    load_tokenizer,
    restored,
    warn_beyond_context,
)
from .models.lora import check_named, check_start
from .models.reward_examples import read_examples
from .models.reward_parts import reward_parts
from .models.rewards import ModelReward, all_rewards, finite_reward, is_model
from .models.role_building import build_roles
from .models.roles import Role, disable_dropout
from .ppo_checks import (
    check_arguments,
    check_batches,
    check_evaluation,
    check_first_kl,
    check_generation,
    check_process,
    check_template,
    too_small,
)
from .ppo_config import PPOConfig
from .ppo_metrics import RolloutLog
from .ppo_sampling import PPOSampling
from .ppo_saving import PPOSaving, StepCallback
from .ppo_update import PPOUpdate
from .processes import check_launch, same_in_all, whiten_over_all

logger = logging.get_logger(__name__)

# Of `model_init_kwargs`, what a reward model on a base of its own does not get; its quantisation is in its folder
_OF_THE_POLICY = ("revision", "code_revision", "subfolder", "variant", "gguf_file", "quantization_config")
COMPLETIONS_FILES = {"train": "completions.jsonl", "eval": "eval_completions.jsonl"}


class PPOTrainer(PPOUpdate, PPOSampling, RolloutLog, PPOSaving, RLOOTrainer):
    """
    Trainer for PPO and PPO-ptx as in InstructGPT [P 3.5, C.4, Eq. 2].

    Everything up to the sampled completions is TRL's `RLOOTrainer`: generation, chat templates, reward functions,
    logs. What differs: the reward model sees token ids and not text; the KL penalty is a reward of every token; a
    value model, started from the reward model, gives advantages by GAE; policy and value losses are clipped token by
    token; and in each minibatch the policy's, the value model's and the pretraining gradients are computed in
    consecutive backward passes into the same buffers.

    Args (those of `RLOOTrainer`, and):
        reward_model (`str`, `RewardModel`, `PreTrainedModel`, or a list of these, *optional*):
            What `RewardTrainer.save_model` wrote, or the loaded object. Trained on the policy's base as an adapter, it
            becomes an adapter of that base and nothing is loaded twice. The value model starts from the first one.
        reward_funcs:
            As in TRL. Strings and models among them are read as reward models. All are summed by
            `args.reward_weights`: first what `reward_model` holds, then these, in their order. Without any reward
            model the value model starts from the policy with a head of zeros.
        ptx_dataset (`Dataset`, *optional*):
            Rows of kind "pretraining" for the pretraining gradient. Without it this is PPO, whatever `ptx_coef` is.

    Neutral setting: `ptx_coef=0` (or no `ptx_dataset`) is plain PPO, bit for bit.

    Overrides: `__init__`, `train`, `evaluate`, `log`, `training_step`, `prediction_step`, `create_optimizer`,
    `create_scheduler`, and of the private methods `_get_train_sampler`, `_tokenize_prompts`,
    `_generate_single_turn`, `_prepare_inputs`, `_clip_grad_norm`, `_save`, `_load_from_checkpoint`,
    `_load_best_model`, and those of [`ExactResume`]; calls `_generate` and `_calculate_rewards`. With vLLM its
    `VLLMGeneration._iter_named_params` too.

    Several processes (`accelerate launch --num_processes N`) share each minibatch: every one samples by its own seed
    and adds its part of the gradients, of means over the tokens of all; whitening, metrics and `completions.jsonl`
    are of all.

    Refuses: images, an optimizer from outside, sampling that cuts the policy's distribution, DeepSpeed and FSDP.
    """

    _tag_names = ["trl", "ppo", "instructgpt-trl"]
    _name = "PPO"
    _paper = {
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
        "citation": "@inproceedings{ouyang2022training,\n"
        "    title = {Training language models to follow instructions with human feedback},\n"
        "    author = {Long Ouyang and others},\n"
        "    year = 2022,\n"
        "    booktitle = {Advances in Neural Information Processing Systems 35},\n"
        "}",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        reward_model: Any = None,
        ptx_dataset: Dataset | None = None,
    ):
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        rewards = all_rewards(reward_funcs, reward_model)
        check_arguments(model, args, rewards, train_dataset, processing_class, optimizers)
        args = args or PPOConfig(f"{_name_of(model)}-PPO")
        check_launch(args, eval_dataset)
        check_process(args, len(rewards))
        check_evaluation(args, eval_dataset)
        train_dataset = check_prompts(train_dataset, "train_dataset")
        eval_dataset = _each(eval_dataset, check_prompts)
        if ptx_dataset is not None:
            ptx_dataset = check_rows(ptx_dataset, "pretraining", "ptx_dataset")
            if not isinstance(ptx_dataset, Dataset):
                raise InputError("ptx_dataset: its texts are cut into blocks first; load it without streaming")
        check_output_dir(args.output_dir)

        with preserved_rng(), restored(args, "beta", "model_init_kwargs"):
            set_seed(args.seed)
            kwargs = _init_kwargs(args, quantization_config)
            if isinstance(model, str):
                model, tokenizer = load_policy(model, **kwargs)
                processing_class = processing_class or tokenizer
                args.model_init_kwargs, quantization_config = None, None  # used up
            processing_class = processing_class or load_tokenizer(get_config_model_id(model.config))
            check_end(processing_class, "the policy")
            check_vocabulary(model, processing_class, "the policy")
            new_adapter = copy.deepcopy(peft_config)  # PEFT fills it in
            if isinstance(model, PeftModel) and peft_config is not None:
                logger.warning("The policy continues its own adapter; peft_config shapes the value adapter only")
                new_adapter = None
            hub = {"trust_remote_code": args.trust_remote_code}
            parts = [reward_parts(reward, **hub) for reward in rewards if is_model(reward)]
            for index, part in enumerate(parts):
                check_tokenizers(
                    processing_class, part.tokenizer, ("the policy", part.path or f"reward model {index}")
                )
            own = model.peft_config.values() if isinstance(model, PeftModel) else ()
            for config in (peft_config, *own, *(part.config for part in parts)):
                check_start(config)
            check_generation(args, model)
            check_template(args, processing_class, train_dataset)
            warn_beyond_context(model.config, args.max_prompt_length, args.max_completion_length)
            template = args.chat_template_kwargs or {}
            self._short = partial(
                drop_long_prompts, tokenizer=processing_class, limit=args.max_prompt_length, **template
            )
            train_dataset = self._short(train_dataset, "train_dataset")
            eval_dataset = _each(eval_dataset, self._short)
            check_batches(args, train_dataset)
            for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
                if isinstance(rows, Dataset):
                    longest = partial(longest_prompt, rows, processing_class, args.max_completion_length, **template)
                    what = f"{name} and max_completion_length={args.max_completion_length}"
                    check_positions(model, longest, what, "it, or max_prompt_length")

            beta, args.beta = args.beta, 0.0  # the parent would load its reference from disk; ours copies the policy
            with float32_adapters(model):
                super().__init__(
                    model,
                    [ModelReward(self) if is_model(reward) else finite_reward(reward, self) for reward in rewards],
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    reward_processing_classes=reward_processing_classes,
                    callbacks=callbacks,
                    optimizers=optimizers,
                    quantization_config=quantization_config,
                    peft_config=new_adapter,
                )
            self.beta = beta
            check_named(self.model)
            self._stop_at_turn_end()
            names = self.reward_func_names
            seen = [names[:i].count(name) for i, name in enumerate(names)]
            self.reward_func_names = [f"{name}_{n}" if n else name for name, n in zip(names, seen, strict=True)]
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True):
                function.__name__ = name
            for name in _OF_THE_POLICY:
                kwargs.pop(name, None)
            self._set_up_roles(parts, peft_config, kwargs)
            if self.use_vllm:
                self._set_up_vllm()
            self._set_up_state(ptx_dataset)

    # Set-up

    def _set_up_roles(self, parts: list, peft_config: PeftConfig | None, kwargs: dict[str, Any]) -> None:
        has_reference = self.beta != 0
        self.roles = build_roles(self.model, parts, peft_config, self.temperature, has_reference, **kwargs)
        fold_last_position(self.roles.policy.model)
        from_models = [function for function in self.reward_funcs if isinstance(function, ModelReward)]
        for function, role in zip(from_models, self.roles.rewards, strict=True):
            function.role = role
        self._reward_paths = [part.path for part in parts]
        for role in self.roles:
            if role.network is not self.model and not getattr(role.model, "is_quantized", False):
                role.network.to(self.accelerator.device)
            if role.head is not None:
                role.head.to(self.accelerator.device)
            if self.args.disable_dropout:
                disable_dropout(role.network)
            role.autocast = self.accelerator.autocast
        value = self.roles.value.network
        if value is not self.model and self.args.gradient_checkpointing:
            value.activation_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
            if isinstance(value, PeftModel):
                value.enable_input_require_grads()
        self._policy_parameters = {k: p for k, p in self.roles.policy.parameters().items() if p.requires_grad}
        self._value_parameters = {k: p for k, p in self.roles.value.parameters().items() if p.requires_grad}
        # The parent has seeded each process otherwise
        same_in_all(self.accelerator, [parameter.data for parameter in self._trained().values()])

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        roles = {"policy": self._policy_parameters, "value": self._value_parameters}
        return {f"{role}.{name}": parameter for role, own in roles.items() for name, parameter in own.items()}

    def _set_up_state(self, ptx_dataset: Dataset | None) -> None:
        args = self.args
        self.kl_coef = self.beta
        self._trainings = 0
        self.ema = EMA(self._policy_parameters, args.ema_decay) if args.ema_decay else None
        self._episodes: Episodes | None = None
        self._order: torch.Tensor | None = None
        self._sums: dict[str, float] = defaultdict(float)
        at_once = max(args.generation_batch_size, args.per_device_eval_batch_size)
        self._limits = {
            "generate": RowLimit(args.generation_micro_batch_size or at_once, "sampling"),
            "train": RowLimit(args.per_device_train_batch_size, "a training pass"),
            "eval": RowLimit(args.per_device_eval_batch_size, "an evaluation pass"),
        }
        self._begun = 0  # rows at a time that this minibatch's gradients were begun with
        self._minibatch_tokens: torch.Tensor | None = None  # in all processes
        self._policy_part: dict[str, torch.Tensor | None] = {}  # of the gradient that has the pretraining part too
        # (2, tokens) returns and values of each completion since the last log
        self._tokens: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._evaluated = ""  # name of the evaluation set, where there are several
        folder = Path(args.output_dir)
        self._files = {mode: CompletionsFile(folder / name) for mode, name in COMPLETIONS_FILES.items()}
        self._ptx_stream = None
        if ptx_dataset is not None and args.ptx_coef:
            model = self.roles.policy.model
            context = context_length(model.config)
            length = args.ptx_max_length or (args.max_prompt_length or 1024) + args.max_completion_length
            length = min(length, context or length)
            self._ptx_stream = PretrainingStream(ptx_dataset, self._tokenizer, length, args.seed)
            # The policy's fused head divides by the sampling temperature; the language-model loss must not
            self._ptx_model = copy.copy(model)
            add_fused_lm_head(self._ptx_model, temperature=1.0)
        self.add_callback(StepCallback(self))
        self._watch(alarms.PPO)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One optimizer, two rates: `learning_rate` for the policy, `value_learning_rate` for the value model."""
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = (
                (self._policy_parameters, self.args.learning_rate),
                (self._value_parameters, self.args.value_learning_rate),
            )
            groups = []
            for parameters, rate in rates:
                for decayed in (True, False):  # as in Trainer: biases and norms are not decayed
                    group = [p for p in parameters.values() if (p.dim() >= 2) == decayed]
                    decay = self.args.weight_decay if decayed else 0.0
                    groups.append({"params": group, "lr": rate, "weight_decay": decay})
            self.optimizer = cls([group for group in groups if group["params"]], **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Constant after a linear rise from a tenth over the first `warmup_updates` rollouts [P C.4]."""
        if self.lr_scheduler is None and self.args.warmup_updates and self.args.lr_scheduler_type == "constant":
            steps = self.args.warmup_updates * self._steps_per_update
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: min(1.0, 0.1 + 0.9 * step / steps))
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    _sampler = None  # none of a stream

    def _get_train_sampler(self, dataset=None):
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _begin_epoch(self, epoch: int) -> None:
        """An epoch's order depends on seed and epoch alone, so that a resumed run finds it."""
        if self.shuffle_dataset and self._sampler is not None:
            self._sampler.generator.manual_seed(self.args.seed + epoch)

    @property
    def _steps_per_update(self) -> int:
        return self.num_iterations * self.args.steps_per_generation // self.args.gradient_accumulation_steps

    @property
    def _spends_memory(self) -> bool:
        """Whether memory is given for time: without gradient checkpointing, on a CPU, where it was measured."""
        return not self.args.gradient_checkpointing and self.accelerator.device.type == "cpu"

    @property
    def _keeps_two_graphs(self) -> bool:
        """Whether the value model's graph is kept beside the policy's: where they are those of a whole rollout."""
        count = self.args.per_device_train_batch_size * self.args.steps_per_generation
        return self._spends_memory and self._limits["train"].rows >= count

    @property
    def _is_at_start(self) -> bool:
        """Whether nothing has been trained yet."""
        return self._trainings == 1 and self.model.training and self.state.global_step == 0 == self._step

    @torch.no_grad()
    def _check_rewards(self) -> None:
        """Pitfall 7: reward models on this base give their own examples the scores that they were saved with."""
        from_models = [function for function in self.reward_funcs if isinstance(function, ModelReward)]
        for part, function in zip(self._reward_paths, from_models, strict=True):
            examples = read_examples(part) if part else None
            if examples is not None:
                exact = not (self.args.bf16 or self.args.fp16) and all(
                    p.dtype == torch.float32 for p in function.role.network.parameters()
                )
                examples.check(function(examples.prompt_ids, examples.completion_ids), exact, part)

    def train(self, *args, **kwargs):
        """As the parent's, from the seed of the config, whatever ran before, once start-up checks have passed."""
        self._check_rewards()
        self._last_loaded_step = -1  # what vLLM has is of another training, or of its end
        set_seed(self.args.seed, device_specific=True)
        with freed_memory_reused():
            return super().train(*args, **kwargs)

    def _check_start(self) -> None:
        super()._check_start()
        for file in self._files.values() if self.args.save_completions else ():
            if file.path.exists():
                file.read()

    def _networks(self) -> Iterator[tuple[str, torch.Tensor]]:
        for network in {id(role.network): role.network for role in self.roles}.values():
            yield from network.named_parameters()
        for role in self.roles:
            yield from () if role.head is None else role.head.named_parameters(prefix="score")

    def _has_begun(self) -> bool:
        return self._step > 0

    def _no_batch(self) -> str:
        return too_small(self.args, "fewer prompts")  # of a stream, not known before

    # Rollout: the algorithm's table of contents

    @torch.no_grad()
    def rollout(self, inputs: list[dict[str, Any]]) -> Episodes:
        """
        Sample a completion for each prompt and work out what its update needs.

        Returns:
            the episodes (see `data/episodes.py`) with `logprobs`, `values`, `advantages`, `returns`, each (B, T).
        """
        episodes, rows = self._sample(inputs)
        scores, score_parts = self._scores(rows, episodes)
        reference = self.roles.reference
        ref_logprobs = self.run_role(reference, "logprobs", episodes)[0] if reference else None
        keep = self.args.disable_dropout  # with dropout on, a second pass is another one
        (values,) = self.run_role(self.roles.value, "values", episodes, keep and self._keeps_two_graphs)
        # Last, since it leaves a graph
        logprobs, entropies = self.run_role(self.roles.policy, "logprobs", episodes, keep)
        ref_logprobs = logprobs if ref_logprobs is None else ref_logprobs
        rewards = token_rewards(scores, logprobs, ref_logprobs, episodes["mask"], self.kl_coef)
        advantages, returns = gae(rewards, values, episodes["mask"], self.args.gamma, self.args.lam)
        kl = torch.where(episodes["mask"], logprobs - ref_logprobs, 0.0).sum(1)
        kl[~episodes["mask"].any(1)] = torch.nan  # nothing of it counts
        if self._is_at_start and self.args.disable_dropout:
            check_first_kl(kl)
        self._log_rollout(episodes, rows, entropies, kl, scores, score_parts, values, returns, advantages)
        self._adapt_kl_coef(kl)
        if self.args.normalize_advantages:
            advantages = whiten_over_all(self.accelerator, advantages, episodes["mask"])
        return {**episodes, "logprobs": logprobs, "values": values, "advantages": advantages, "returns": returns}

    def run_role(self, role: Role, method: str, episodes: Episodes, keep: bool = False) -> list[torch.Tensor]:
        """
        One of a role's methods on all episodes, in the micro-batches that they are trained in. While training, `keep`
        keeps the graph of the first one, whose forward pass is not done a second time then.
        """
        training, count = self.model.training, len(episodes["mask"])
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        batches = self._by_length(episodes, torch.arange(count)).split(size)

        def evaluate(rows: int) -> list[torch.Tensor]:
            passes = [some for batch in batches for some in batch.split(rows)]
            if len(passes) > 1:  # after an out-of-memory error, perhaps: one graph at a time
                self.roles.value.kept = None
            return role.evaluate(getattr(role, method), episodes, passes, keep and training)

        return self._limits["train" if training else "eval"].run(evaluate, count)

    def _by_length(self, episodes: Episodes, rows: torch.Tensor) -> torch.Tensor:
        """The same minibatches, inside of which the rows of a micro-batch are nearly of one length."""
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return by_length(episodes, rows, size)

    def _scores(self, rows: list[dict[str, Any]], episodes: Episodes) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (B,) scores, and (B, F) before they were weighted and summed. A row without any score is masked out, its score
        NaN, which no sum sees and `log` leaves out of means.
        """
        columns = [[row[name] for row in rows] for name in ("prompt", "completion", "completion_ids")]
        parts = self._calculate_rewards(rows, *columns)  # of all processes
        parts = parts[self.accelerator.process_index * len(rows) :][: len(rows)]
        unscored = torch.isnan(parts).all(1)
        scores = (parts * self.reward_weights.to(parts.device)).nansum(1)
        if self.reward_clip_range:
            scores = scores.clamp(*self.reward_clip_range)
        if self.args.missing_eos_score is not None:
            scores = torch.where(episodes["ended"], scores, self.args.missing_eos_score)
        episodes["mask"] = episodes["mask"] & ~unscored[:, None]
        return scores.masked_fill(unscored, torch.nan), parts

    # Update

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> Episodes:
        """
        The episodes to train on: a new rollout once the old one is used up, else the one in the buffer. The first
        inner epoch takes the minibatches in the order of the rollout, each later one in a new random order.
        """
        steps = self.args.steps_per_generation
        if self._episodes is None or self._step % (steps * self.num_iterations) == 0:
            self._episodes = self.rollout(generation_batch)
            self._order = self._by_length(self._episodes, torch.arange(len(self._episodes["mask"])))
        elif self._step % steps == 0:
            generator = torch.Generator().manual_seed(self.args.seed + self._step)
            order = torch.randperm(len(self._episodes["mask"]), generator=generator)
            self._order = self._by_length(self._episodes, order)
        return self._episodes

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As the parent's, on completions sampled from the config's seed each time; the caller's generators go on."""
        check_launch(self.args, eval_dataset)
        with preserved_rng():
            set_seed(self.args.seed, device_specific=True)
            self._evaluated = metric_key_prefix.removeprefix("eval").removeprefix("_")
            if not isinstance(eval_dataset, str):
                eval_dataset = _each(_each(eval_dataset, check_prompts), self._short)
            try:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            finally:
                self._last_loaded_step = -1  # whatever was evaluated, it need not be what comes next

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple[None, None, None]:
        """Evaluation is a rollout: its scores, KL and lengths are the metrics."""
        self.rollout(inputs)
        return None, None, None

    # Text to ids

    # Numbers

    def _adapt_kl_coef(self, kl: torch.Tensor) -> None:
        """[L] AdaptiveKLController: raise `beta` while the KL is over its target, lower it while it is under."""
        if self.args.kl_target is None or not self.model.training:
            return
        kl = torch.cat(gather_object([kl.cpu()]))
        kl = kl[~kl.isnan()]
        if len(kl):
            error = max(-0.2, min(0.2, kl.mean().item() / self.args.kl_target - 1))
            self.kl_coef *= 1 + error * len(kl) / self.args.kl_horizon

    def stop_unless_finite(self, tensor: torch.Tensor, what: str) -> None:
        """As the function of this name, with the step, and what to look at."""
        stop_unless_finite(tensor, what, self.state.global_step, "look at completions.jsonl")


def _name_of(model: Any) -> str:
    return (model if isinstance(model, str) else get_config_model_id(model.config)).rstrip("/").split("/")[-1]


def _each(dataset: Any, apply) -> Any:
    """`apply(rows, name)` to an evaluation dataset, or to each of a dictionary of them, if there is one."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: apply(rows, f"eval_dataset['{name}']") for name, rows in dataset.items()}
    return apply(dataset, "eval_dataset")


def _init_kwargs(args: PPOConfig, quantization_config) -> dict[str, Any]:
    """What a base is loaded with: the config's, the trainer's quantisation, and on a GPU that one GPU."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.device.type == "cuda":  # TRL's default, "auto", would spread it over all of them
        kwargs.setdefault("device_map", {"": args.device})
    return kwargs
