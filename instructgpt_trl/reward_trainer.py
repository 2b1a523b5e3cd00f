"""Reward-model stage: TRL's RewardTrainer with K-way rankings, a head of known scale, and a bias."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from . import alarms
from ._trl import preserved_rng
from .data import InputError, check_output_dir, check_rows
from .data.formats import by_prompt, split_by_length
from .data.rankings import DataCollatorForRanking, check_rankings, prepare_rankings
from .functional import _untied_pairs, ranking_loss
from .models.folders import adapter_base
from .models.guards import stop_unless_finite, stop_unless_gradients_finite
from .models.limits import freed_memory_reused
from .models.loading import (
    check_positions,
    check_vocabulary,
    float32_adapters,
    is_adapter,
    keep_gradients,
    load_tokenizer,
    restored,
)
from .models.lora import check_named, fuse_lora, without_casts
from .models.reward_examples import COUNT, RewardExamples
from .models.reward_folder import forget_reward_config, quantized_by, read_reward_config
from .models.reward_model import RewardModel
from .models.reward_network import head_of, load_reward_network, pool_by_length, scalar_config
from .models.sharing import attention_length, network_inputs
from .processes import check_launch
from .resume import ExactResume
from .reward_config import RewardConfig
from .reward_metrics import STATS, metrics_of, prompt_stats

logger = logging.getLogger(__name__)


class RewardTrainer(ExactResume, trl.RewardTrainer):
    """
    Trainer of reward models on K-way rankings [InstructGPT 3.5, C.2].

    All completions of a prompt go through one forward pass, and all untied pairs of them into one loss term; a batch
    counts prompts. The scalar is read at the last real token by the attention mask. After training, a bias is set
    that makes demonstrations score 0 on average; [`RewardModel`] applies it, the training does not see it.

    The completions of a prompt stand behind one copy of it where the network can do that and it takes fewer operations
    (`prefix_sharing`); scores and gradients are those of sequences of their own.

    **Neutral setting**: with two completions a prompt, no ties, `prefix_sharing="off"` and a model object (whose head
    is kept), parameters equal TRL's after any number of steps, if `chosen` and `rejected` encode alike joined and
    apart.

    Overrides of TRL's `RewardTrainer`: `_prepare_dataset` (rankings), `_set_signature_columns_if_needed`,
    `compute_loss`, `training_step` (stops at NaN), `log` (metrics over all pairs since the last
    log, not means of batch means), `train` (seeds; sets the bias at the end), `_save` (`reward_model.json` beside the
    weights), and those of [`ExactResume`].

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            - a causal language model, folder or hub id: gets a new head, see [`init_head`];
            - a reward model folder, full or adapter: trained on, head kept;
            - the folder of an SFT adapter: a copy of it is trained on under a new head, on its own base. The adapter's
              own config counts then, not `peft_config`;
            - a sequence classification model with one label, as in TRL: its head is kept.
        train_dataset, eval_dataset:
            Rows of kind ranking, or of kind `chosen`/`rejected`, as in TRL, text or conversations.
        demonstration_dataset (`Dataset`, *optional*):
            Rows of kind demonstration, which score 0 on average after `train()`. Without it the bias stays what it
            was, 0 for a new model.
        peft_config (`PeftConfig`, *optional*):
            As in TRL. A copy of it is made to train and save the head, whatever it says.
        args and the others:
            As in TRL.

    Refuses, with [`InputError`] and before a model is loaded: a wrong row, a column `margin`, an output folder that
    cannot be written. After loading: a frozen head, a reward model without its head, no ranking within `max_length`.

    Metrics: TRL's names. `loss` and `eval_loss`, mean over batches of the mean over prompts, in nats; `accuracy` and
    `margin` over all untied pairs (an equal score counts one half), `prompt_accuracy` the mean over prompts of a
    prompt's own; `min_reward`, `mean_reward`, `max_reward`, `score_std` over all completions, before the bias;
    `tied_pairs`, `shortened_rows` counts; `num_tokens`. All but the last since the last log, over all processes.
    """

    EVALUATION = ("loss", "accuracy", "prompt_accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    EVALUATION += ("score_std", "tied_pairs", "shortened_rows", "num_tokens")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        demonstration_dataset: Dataset | IterableDataset | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
            args = RewardConfig(f"{Path(name).name}-Reward")
        check_launch(args, eval_dataset)
        check_output_dir(args.output_dir)
        train_dataset, eval_dataset = _check_early(train_dataset, eval_dataset)
        _keep_batches_whole(args, eval_dataset)
        if demonstration_dataset is not None:
            demonstration_dataset = check_rows(demonstration_dataset, "demonstration", "demonstration_dataset")
        bias, calibrated = 0.0, False
        self._window: dict[str, list[Tensor]] = {"train": [], "eval": []}

        with preserved_rng(), restored(args, "model_init_kwargs"):
            if isinstance(model, str):
                saved = read_reward_config(model)
                bias, calibrated = saved["bias"], saved["calibrated"]
                if peft_config is not None and is_adapter(model):
                    logger.warning(f"{model} is an adapter and keeps its own shape; peft_config is not used")
                    peft_config = None
                processing_class = processing_class or _tokenizer_of(model, args)
                model = _load(model, processing_class, args, quantization_config)
                args.model_init_kwargs, quantization_config = None, None  # used; the parent would call them ignored
            if processing_class is not None and not (args.eos_token or args.chat_template_path):
                check_vocabulary(model, processing_class, "model")
            pool_by_length(model)
            head = {name: tensor.detach().clone() for name, tensor in head_of(model).state_dict().items()}
            with float32_adapters(model):
                super().__init__(
                    model,
                    args=args,
                    data_collator=data_collator,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    compute_metrics=compute_metrics,
                    callbacks=callbacks,
                    optimizers=optimizers,
                    optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                    preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                    quantization_config=quantization_config,
                    peft_config=scalar_config(peft_config) if isinstance(peft_config, PeftConfig) else peft_config,
                )
        self._watch(alarms.REWARD)
        check_named(self.model)
        for name, rows in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            if isinstance(rows, Dataset):
                check_positions(self.model, partial(_longest, rows), name, "max_length")
        keep_gradients(self.model)
        fuse_lora(self.model)
        _keep_float32(self.model, head)
        if not all(parameter.requires_grad for parameter in head_of(self.model).parameters()):
            raise InputError(
                "the reward head ('score') is frozen, so it would keep its random weights; put 'score' into the "
                "adapter's modules_to_save, or pass the model without an adapter and a peft_config"
            )
        self._reward_model = RewardModel(self.model, self.processing_class, bias, calibrated)
        if data_collator is None:
            self.data_collator = DataCollatorForRanking(
                self.processing_class.pad_token_id, args.pad_to_multiple_of, self._attention_length()
            )
        self._demonstrations = None
        if demonstration_dataset is not None:
            self._demonstrations = self._encode_demonstrations(demonstration_dataset)

    @property
    def reward_model(self) -> RewardModel:
        """The network in training with its bias, as a [`RewardModel`]. It is not a copy."""
        self._reward_model.model = self.accelerator.unwrap_model(self.model)
        return self._reward_model

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """TRL's training, seeded, and then the bias from the demonstrations."""
        set_seed(self.args.seed)
        self._reward_model.calibrated = False
        with freed_memory_reused():
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self._demonstrations is not None:
            mean = self.reward_model.calibrate_ids(*self._demonstrations, self.args.per_device_eval_batch_size)
            logger.info(f"demonstrations scored {mean:.6f} on average; the bias is now {self.reward_model.bias:.6f}")
        return result

    def evaluate(self, eval_dataset: Any = None, *args, **kwargs) -> dict[str, float]:
        check_launch(self.args, eval_dataset)
        _keep_batches_whole(self.args, eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # Data

    def _attention_length(self) -> float | None:
        """For the collator: none where prompts are not shared."""
        prefix_sharing = getattr(self.args, "prefix_sharing", "off")  # TRL's config has no such field
        if prefix_sharing == "off":
            return None
        reason = self._reward_model.why_not_shared()
        if reason is None:
            return attention_length(self.model)
        if prefix_sharing == "on":
            raise InputError(f"prefix_sharing='on' is not possible with this model, {reason}; use 'auto' or 'off'")
        logger.warning(f"each completion is encoded behind a prompt of its own (prefix_sharing): {reason}")
        return None

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        source = f"{dataset_name}_dataset" if dataset_name in ("train", "eval") else f"eval_dataset['{dataset_name}']"
        with args.main_process_first(desc=f"preparing {source}"):
            return prepare_rankings(
                check_rankings(dataset, source), processing_class, args.max_length, source, args.dataset_num_proc
            )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "completions_ids", "ranks", "shortened"]

    # Loss and metrics

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        with without_casts(self.model):
            loss = super().training_step(*args, **kwargs)
        what = f"the loss of micro-batch {self._micro_batch()}"
        stop_unless_finite(loss, what, self.state.global_step, "look at the rows of this step")
        # The last micro-batch, before clipping; a gradient scaler skips steps of infinite gradients by itself
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            stop_unless_gradients_finite(self.model, self.state.global_step, "look at the rows of this step")
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Ranking loss of a batch of prompts: one forward for all completions, see [`ranking_loss`]."""
        ranks, sizes = inputs["ranks"], inputs["group_sizes"]
        batch = network_inputs(self.accelerator.unwrap_model(model), inputs)
        # A cache is of no use here and not compatible with gradient checkpointing
        outputs = model(**batch, use_cache=False)
        scores = outputs.logits.squeeze(-1)
        loss = ranking_loss(scores, ranks, sizes)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * _centering(scores, ranks, sizes)
        stats = prompt_stats(scores.detach(), ranks, sizes, inputs["tokens"], inputs["shortened"])
        # In the rows' order, of which the last may be there twice in an evaluation
        self._note(stats[inputs["places"].argsort()] if "places" in inputs else stats)
        return (loss, outputs) if return_outputs else loss

    def _note(self, stats: Tensor) -> None:
        """Keep a batch's numbers until the next log, from all processes."""
        mode = "train" if self.model.training else "eval"
        # In evaluation the last batch may repeat prompts to come out even; those do not count
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        stats = gather(stats)
        self._window[mode].append(stats)
        if mode == "train":
            self._total_train_tokens += int(stats[:, STATS.index("tokens")].sum().item()) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._window[mode]:
            # "eval_", or "eval_NAME_" with a dictionary of evaluation datasets, where TRL's names collide
            timed = [name.removesuffix("runtime") for name in logs if name.endswith("_runtime")]
            prefix = "" if mode == "train" else timed[0] if timed else "eval_"
            metrics = metrics_of(torch.cat(self._window[mode]).cpu().double())
            logs.update({f"{prefix}{name}": value for name, value in metrics.items()})
            self._window[mode].clear()
        super().log(logs, start_time)

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            check_output_dir(output_dir)
            forget_reward_config(output_dir)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.reward_model.write_config(output_dir)
            self._write_examples(output_dir)

    def _write_examples(self, output_dir: str) -> None:
        """Ten demonstrations with their scores, else completions of the rankings, see `models/reward_examples.py`."""
        if self._demonstrations is not None:
            prompts, completions = (ids[:COUNT] for ids in self._demonstrations)
        elif isinstance(self.train_dataset, Dataset) and "completions_ids" in self.train_dataset.column_names:
            rows = list(self.train_dataset.select(range(min(COUNT, len(self.train_dataset)))))
            prompts, completions = [row["prompt_ids"] for row in rows], [row["completions_ids"][0] for row in rows]
        else:
            return
        model = self.reward_model.model
        exact = quantized_by(model) is None and all(p.dtype == torch.float32 for p in model.parameters())
        scores = self.reward_model.score_ids(prompts, completions).tolist()
        RewardExamples(prompts, completions, scores, exact).write(output_dir)

    def _datasets(self) -> dict[str, Any]:
        own = {} if self._demonstrations is None else {"demonstration_dataset": self._demonstrations}
        return {**super()._datasets(), **own}

    def _encode_demonstrations(self, dataset: Dataset | IterableDataset) -> tuple[list[list[int]], list[list[int]]]:
        rows = list(dataset)
        prompts, completions = self._reward_model.encode(
            [row["prompt"] for row in rows], [row["completion"] for row in rows]
        )
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        names = by_prompt([row["prompt"] for row in rows])
        kept, report = split_by_length(lengths, self.args.max_length, "demonstrations", names)
        if not kept:
            raise InputError(
                f"demonstration_dataset: none of its {len(rows)} rows is within max_length={self.args.max_length}; "
                f"raise it"
            )
        if report is not None and self.is_world_process_zero():
            logger.warning(f"demonstration_dataset: {report}")
        return [prompts[index] for index in kept], [completions[index] for index in kept]


def _check_early(train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """Check what is there in full, before a model is loaded. Streams are checked while they are read."""

    if train_dataset is None:
        raise InputError("train_dataset is missing; expected rows with the columns prompt, completions, ranks")

    def check(dataset: Any, source: str) -> Any:
        return check_rankings(dataset, source) if isinstance(dataset, Dataset) else dataset

    if isinstance(eval_dataset, dict):
        eval_dataset = {name: check(rows, f"eval_dataset['{name}']") for name, rows in eval_dataset.items()}
    return check(train_dataset, "train_dataset"), check(eval_dataset, "eval_dataset")


def _longest(rankings: Dataset) -> int:
    """Tokens of a prompt and its longest completion."""
    return max(len(row["prompt_ids"]) + max(map(len, row["completions_ids"])) for row in rankings)


def _keep_batches_whole(args: RewardConfig, eval_dataset: Any) -> None:
    """
    accelerate cuts each tensor of a stream's batch at as many rows as the first one has; of shared prompts and their
    ranks there are not as many. TRL says so for a stream that is trained on, and here it is said for the others.
    """
    streams = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if any(isinstance(rows, IterableDataset) for rows in streams):
        args.accelerator_config.dispatch_batches = False


def _tokenizer_of(path: str, args: RewardConfig) -> PreTrainedTokenizerBase:
    revision = (args.model_init_kwargs or {}).get("revision")
    hub = {"trust_remote_code": args.trust_remote_code} | ({"revision": revision} if revision else {})
    return load_tokenizer(path, adapter_base(path) if is_adapter(path) else None, **hub)


def _load(
    path: str, tokenizer: PreTrainedTokenizerBase, args: RewardConfig, quantization: BitsAndBytesConfig | None
) -> PreTrainedModel | PeftModel:
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization is not None and "quantization_config" in kwargs:
        raise InputError("quantization_config is given twice, to the trainer and in model_init_kwargs; give it once")
    quantization = kwargs.pop("quantization_config", quantization)
    kwargs.pop("num_labels", None)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # as in TRL: "auto" fails under a launcher
    return load_reward_network(path, tokenizer, quantization, seed=args.seed, trainable=True, **kwargs)


def _keep_float32(model: PreTrainedModel | PeftModel, head: dict[str, Tensor]) -> None:
    """
    Undo TRL's cast to bfloat16 of what is trained on a quantised base: at 9e-6 a bfloat16 weight of 0.04 never moves.
    The adapter is new there, so nothing is lost but its head, which comes back from `head`.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    head_of(model).load_state_dict(head)


def _centering(scores: Tensor, ranks: Tensor, group_sizes: list[int]) -> Tensor:
    """Mean over prompts of the mean over untied pairs of (s_i + s_j)^2; TRL's term at K = 2."""
    better, worse, group = _untied_pairs(ranks, group_sizes)
    pairs = torch.bincount(group, minlength=len(group_sizes))
    return ((scores[better] + scores[worse]) ** 2 / pairs[group]).sum() / (pairs > 0).sum().clamp(min=1)
