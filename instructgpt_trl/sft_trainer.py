"""The SFT stage: TRL's `SFTTrainer` with residual dropout, a pretraining mix, and a score to choose checkpoints by."""

import copy
import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.data.data_collator import DataCollator
from transformers.trainer_utils import EvalPrediction, TrainOutput

from . import alarms
from ._trl import get_config_model_id, lm_head_tiles, preserved_rng
from .data import InputError, check_output_dir, check_rows, check_tokenizers, pack_texts
from .data.demonstrations import IMAGES, check_demonstrations, columns_of, cut_report, mix
from .data.encoding import in_row, render
from .models.dropout import residual_dropout, residual_places
from .models.folders import load_whole, loading
from .models.guards import stop_unless_finite, stop_unless_gradients_finite
from .models.limits import freed_memory_reused
from .models.loading import (
    check_end,
    check_positions,
    check_vocabulary,
    context_length,
    float32_adapters,
    is_adapter,
    keep_gradients,
    load_policy,
    restored,
)
from .models.lora import check_named, fuse_lora, without_casts
from .processes import check_launch
from .sft_config import SFTConfig
from .sft_scores import Rows, ScoredEvaluation, as_reward_model, validation_prompts

if TYPE_CHECKING:
    from .models.reward_model import RewardModel

logger = get_logger(__name__)


class SFTTrainer(ScoredEvaluation, trl.SFTTrainer):
    r"""
    Supervised fine-tuning on demonstrations, as in InstructGPT 3.5, C.1 and C.3: TRL's [`~trl.SFTTrainer`], plus

    - residual dropout while training (`args.residual_dropout`), on architectures with and without their own;
    - pretraining text mixed in (`pretraining_dataset`, `args.pretraining_fraction`);
    - `eval_rm_score`, the mean reward-model score of greedy completions, at each evaluation (`reward_model`). Choose
      the checkpoint by it with `metric_for_best_model="eval_rm_score"` and `load_best_model_at_end=True`;
    - an adapter folder as `model`: its weights are trained on, its base is found from its config.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As the parent's, or an adapter folder.
        args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func, compute_metrics,
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config,
        peft_config, formatting_func:
            As the parent's.
        pretraining_dataset ([`~datasets.Dataset`], *optional*):
            Rows of kind `"pretraining"`. Packed into blocks of `args.max_length` tokens, of which as many are added to
            the training set as make `args.pretraining_fraction` of it; every token of a block counts in the loss.
        reward_model (`str` or [`RewardModel`], *optional*):
            Folder of a reward model, or any object with `score(prompts, completions) -> list[float]`.
        prompt_dataset ([`~datasets.Dataset`], *optional*):
            Rows of kind `"prompt"` that are completed and scored. Defaults to the prompts of `eval_dataset`. Several
            evaluation sets share one score; sets passed to `evaluate` get none.

    Neutral setting: `residual_dropout=0`, no `pretraining_dataset`, no `reward_model` equals the parent.

    Overrides: `__init__`, `train`, `training_step` (stops at NaN), `evaluate`, `evaluation_loop`,
    `_prepare_dataset`, and those of [`ExactResume`].

    Differs from TRL: rows over `max_length` are counted and named; the constructor leaves the caller's random number
    generators alone and `train` seeds; adapters on a quantised base stay float32; without a GPU the LM head works on
    smaller tiles of the vocabulary, which rounds differently beyond 512 words, as [`fuse_lora`] does.

    Raises:
        [`InputError`]: a wrong row or argument, before a model is loaded; an architecture that residual dropout is not
        known for.
    """

    EVALUATION = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")  # and the score, as below

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        pretraining_dataset: Dataset | None = None,
        reward_model: "str | RewardModel | None" = None,
        prompt_dataset: Rows | None = None,
    ):
        args = _as_sft_config(args, model)
        check_launch(args, eval_dataset)
        check_output_dir(args.output_dir)
        train_dataset = _checked(train_dataset, "train_dataset", args, formatting_func)
        eval_dataset = _checked(eval_dataset, "eval_dataset", args, formatting_func)
        if pretraining_dataset is not None and train_dataset is not None:
            _check_mix(pretraining_dataset, train_dataset, args)
        prompts = validation_prompts(reward_model, prompt_dataset, eval_dataset, args)
        from_adapter = isinstance(model, str) and is_adapter(model)
        if from_adapter and peft_config is not None:
            logger.warning(f"{model} is an adapter and keeps its own shape; peft_config is not used")
            peft_config = None

        with preserved_rng(), restored(args, "model_init_kwargs"):
            if isinstance(model, str):
                load = load_policy if from_adapter else _load
                model, own = load(model, **_model_init_kwargs(args, quantization_config))
                processing_class = own if processing_class is None else processing_class
                args.model_init_kwargs, quantization_config = None, None  # used; the parent would call them ignored
            as_it_is = not (args.eos_token or args.chat_template_path)  # which change it
            if isinstance(processing_class, PreTrainedTokenizerBase) and as_it_is:
                check_vocabulary(model, processing_class, "model")
                if train_dataset is not None and {"prompt", "completion"} <= columns_of(train_dataset):
                    check_end(processing_class, "model")
            self.reward_model = as_reward_model(reward_model)
            # Read by `_prepare_dataset`, which the parent's constructor calls
            self._mix_into = None if pretraining_dataset is None else train_dataset
            self._pretraining_dataset = pretraining_dataset
            self._block_length = None if pretraining_dataset is None else _block_length(model, args)
            with float32_adapters(model):
                super().__init__(
                    model=model,
                    args=args,
                    data_collator=data_collator,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    compute_loss_func=compute_loss_func,
                    compute_metrics=compute_metrics,
                    callbacks=callbacks,
                    optimizers=optimizers,
                    optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                    preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                    quantization_config=quantization_config,
                    peft_config=peft_config,
                    formatting_func=formatting_func,
                )
            self._pretraining_dataset = None
        if getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False):
            with float32_adapters(self.model):  # the parent casts a new adapter to bfloat16: back to float32
                pass
        self._watch(alarms.SFT)
        check_named(self.model)
        head = self.model.get_output_embeddings()
        if head is not None and not hasattr(head, "bias"):  # PEFT's wrapper of single tokens
            raise InputError("trainable_token_indices: TRL's loss does not read such an LM head; use modules_to_save")
        for name, rows in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            if isinstance(rows, Dataset) and "input_ids" in rows.column_names and not args.packing:
                check_positions(self.model, partial(_longest, rows), name, "max_length")
        keep_gradients(self.model)
        fuse_lora(self.model)
        if args.residual_dropout:
            residual_places(self.model)  # refuse an unknown architecture now, not in `train`
        if hasattr(self.reward_model, "score_ids"):  # takes this tokenizer's ids
            name = reward_model if isinstance(reward_model, str) else "the reward model"
            check_tokenizers(self._tokenizer, self.reward_model.tokenizer, ("the model", name))
        self._score_prompts = self._encode_prompts(prompts)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        # The constructor gave the caller's generators back, so the seed is set here, as the parent's constructor does
        set_seed(self.args.seed)
        with freed_memory_reused(), residual_dropout(self.model, self.args.residual_dropout):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        with lm_head_tiles(self.accelerator.device), without_casts(self.model):
            loss = super().training_step(*args, **kwargs)
        what = f"the loss of micro-batch {self._micro_batch()}"
        stop_unless_finite(loss, what, self.state.global_step, "look at the rows of this step")
        # The last micro-batch, before clipping; a gradient scaler skips steps of infinite gradients by itself
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            stop_unless_gradients_finite(self.model, self.state.global_step, "look at the rows of this step")
        return loss

    def _prepare_dataset(
        self,
        dataset: Rows,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Rows:
        try:
            return self._prepared(dataset, processing_class, args, packing, formatting_func, dataset_name)
        except TemplateError as error:  # of TRL's own rendering, which does not say where
            for index, row in enumerate(dataset):
                talk = row.get("messages") or [*(row.get("prompt") or []), *(row.get("completion") or [])]
                with in_row(f"{dataset_name}_dataset", index):
                    render(processing_class, talk)
            raise InputError(
                f"{dataset_name}_dataset: the chat template fails ({error}); correct chat_template in the tokenizer's "
                f"files"
            ) from error

    def _prepared(self, dataset, processing_class, args, packing, formatting_func, dataset_name) -> Rows:
        if isinstance(dataset, IterableDataset):  # cut while it is read
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # First without any cut, to report what the cut will do; the parent recognises encoded rows and only cuts them
        uncut = copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        encoded = super()._prepare_dataset(dataset, processing_class, uncut, False, formatting_func, dataset_name)
        report = cut_report(encoded, _kept(args, packing), drops_masked=not packing)
        if report is not None:
            logger.warning(f"{dataset_name} dataset, max_length={args.max_length}: {report}")
        prepared = super()._prepare_dataset(encoded, processing_class, args, packing, None, dataset_name)
        if len(prepared) == 0:
            raise InputError(
                f"{dataset_name} dataset: no row has a completion token within max_length={args.max_length}; raise it"
            )
        if dataset is not self._mix_into:
            return prepared
        self._mix_into = None  # the training set comes first; the same rows may be the evaluation set too
        return self._mixed(prepared, args)

    def _mixed(self, demonstrations: Dataset, args: SFTConfig) -> Dataset:
        """The prepared demonstrations and the pretraining blocks; in that order, unless `args.shuffle_dataset`."""
        blocks = pack_texts(self._pretraining_dataset, self._tokenizer, self._block_length)
        mixed = mix(demonstrations, blocks, args.pretraining_fraction)
        count = len(mixed) - len(demonstrations)
        is_whole = 0 < count <= len(blocks) or args.pretraining_fraction == 0
        logger.log(
            logging.INFO if is_whole else logging.WARNING,
            f"{count} pretraining blocks of {self._block_length} tokens mixed into {len(demonstrations)} examples "
            f"(pretraining_fraction={args.pretraining_fraction}), from {len(blocks)} different blocks",
        )
        return mixed.shuffle(seed=args.seed) if args.shuffle_dataset else mixed


def _as_sft_config(args: TrainingArguments | None, model: str | PreTrainedModel) -> SFTConfig:
    """`args` as ours: made from the model's name if there are none, and from a parent's kind, as the parent does."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return SFTConfig(f"{name.rstrip('/').split('/')[-1]}-SFT")
    if isinstance(args, SFTConfig):
        return args
    return SFTConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init})


def _checked(
    dataset: Rows | dict[str, Rows] | None, name: str, args: SFTConfig, formatting_func: Callable[[dict], str] | None
) -> Any:
    """`dataset`, or each of several, with wrong rows refused; another type is the parent's to refuse."""
    if isinstance(dataset, dict):
        return {key: _checked(rows, f"{name}['{key}']", args, formatting_func) for key, rows in dataset.items()}
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    is_callers = formatting_func is not None or (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
    return dataset if is_callers else check_demonstrations(dataset, name, args.dataset_text_field)


def _check_mix(pretraining_dataset: Dataset, train_dataset: Rows | None, args: SFTConfig) -> None:
    for name, dataset in (("pretraining_dataset", pretraining_dataset), ("train_dataset", train_dataset)):
        if not isinstance(dataset, Dataset):
            raise InputError(
                f"{name}: mixing in pretraining text needs to know the number of rows, which {type(dataset).__name__} "
                f"does not tell; load a Dataset, without streaming"
            )
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset") or IMAGES & columns_of(train_dataset):
        raise InputError(
            "pretraining_dataset: nothing can be mixed into rows that are not prepared before training (images, or "
            "skip_prepare_dataset=True); leave it out"
        )
    check_rows(pretraining_dataset, "pretraining", "pretraining_dataset")


def _model_init_kwargs(args: SFTConfig, quantization_config: BitsAndBytesConfig | None) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`, as the parent makes them."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None  # "auto" fails there
    return kwargs


def _load(name: str, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """A full model and its tokenizer or processor, as the parent loads them, but refused where a file is broken."""
    model, _ = load_whole(name, f"model '{name}'", **kwargs)
    if not model.can_generate():
        raise InputError(f"model '{name}': a {type(model).__name__}, which generates nothing; give a language model")
    hub = {key: kwargs[key] for key in ("trust_remote_code", "revision") if key in kwargs}
    with loading(f"the tokenizer in {name}"):
        return model, AutoProcessor.from_pretrained(name, **hub)


def _block_length(model: PreTrainedModel, args: SFTConfig) -> int:
    """Tokens of a pretraining block: `max_length`, at most the model's context."""
    limits = [limit for limit in (args.max_length, context_length(model.config)) if limit is not None]
    if not limits:
        raise InputError("pretraining_dataset: max_length=None, and the model's config has no limit; set max_length")
    return min(limits)


def _longest(rows: Dataset) -> int:
    return max(map(len, rows["input_ids"]))


def _kept(args: SFTConfig, packing: bool) -> slice | None:
    """What the parent keeps of a row; `None` if all of it: packing splits rows, except by strategy "bfd"."""
    if args.max_length is None or (packing and args.packing_strategy != "bfd"):
        return None
    return slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)
