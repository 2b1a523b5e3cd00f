"""SFT's evaluations by a reward model: greedy completions of validation prompts and their mean score [3.5, C.1]."""

import math
import os
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.trainer_utils import EvalLoopOutput
from trl.models import unwrap_model_for_generation

from ._trl import lm_head_tiles, preserved_rng
from .data import InputError, check_rows, encode_prompt
from .data.demonstrations import columns_of
from .data.formats import by_prompt, split_by_length
from .data.rows import Text
from .models.completions import greedy_completions
from .models.guards import RunStopped
from .models.loading import context_length
from .processes import check_launch
from .resume import ExactResume
from .sft_config import SFTConfig

logger = get_logger(__name__)

Rows = Dataset | IterableDataset


class ScoredEvaluation(ExactResume):
    """
    The part of [`SFTTrainer`] that scores. Overrides: `evaluate`, `evaluation_loop`, and of [`ExactResume`]
    `_check_best_metric`.
    """

    reward_model: Any = None
    _score_name: str | None = None  # metric of the evaluation that is going on
    _score_prompts: tuple | list = ()

    def _check_best_metric(self) -> None:
        if (self.args.metric_for_best_model or "").removeprefix("eval_") != "rm_score":  # one for all evaluation sets
            super()._check_best_metric()

    def evaluate(
        self,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        check_launch(self.args, eval_dataset)
        # With several evaluation sets the parent calls this method again for each, by name: they share one score.
        # Sets passed in by the caller are not the validation prompts, so they get none.
        if self.reward_model is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._score_name = f"{metric_key_prefix}_rm_score"
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._score_name = None

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        with lm_head_tiles(self.accelerator.device):
            output = super().evaluation_loop(*args, **kwargs)
        if self._score_name is not None:
            name, self._score_name = self._score_name, None
            output.metrics[name] = self._rm_score()
        return output

    def _encode_prompts(self, prompts: list[Text]) -> list[tuple[Text, list[int]]]:
        """Prompts with their token ids, without those that leave no room for a completion in the model's context."""
        encoded = [(prompt, encode_prompt(self._tokenizer, prompt)) for prompt in prompts]
        context = context_length(self.model.config)
        limit = None if context is None else context - self.args.rm_score_max_new_tokens
        lengths = [len(ids) for _, ids in encoded]
        keep, report = split_by_length(lengths, limit, "validation prompts", by_prompt(prompts))
        if report is not None:
            logger.warning(report)
        if prompts and not keep:
            raise InputError(f"{report}: none is left; lower rm_score_max_new_tokens or give shorter prompts")
        return [encoded[index] for index in keep]

    def _rm_score(self) -> float:
        """Mean reward-model score of greedy completions of the validation prompts. Source: InstructGPT 3.5, C.1."""
        mine = self._score_prompts[self.accelerator.process_index :: self.accelerator.num_processes]
        size, longest = self.args.per_device_eval_batch_size, self.args.rm_score_max_new_tokens
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        is_hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        scores: list[float] = []
        unwrapped = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with preserved_rng(), unwrapped as model:
            for batch in tqdm(batches, desc="Reward-model score", disable=is_hidden, leave=False):
                talk = not all(isinstance(prompt, str) for prompt, _ in batch)
                completions = greedy_completions(model, self._tokenizer, [ids for _, ids in batch], longest, talk)
                scores += self._scores(batch, completions)
        scores = gather_object(scores)
        mean = sum(scores) / len(scores)
        if not math.isfinite(mean):
            raise RunStopped(
                f"step {self.state.global_step}: the mean reward-model score is {mean}, so the run stops: look at the "
                f"reward model, and at the checkpoints before"
            )
        return mean

    def _scores(self, prompts: list[tuple[Text, list[int]]], completions: list[list[int]]) -> list[float]:
        """Of token ids as they are, as in PPO; an object that knows texts only gets texts."""
        if hasattr(self.reward_model, "score_ids"):
            return self.reward_model.score_ids([ids for _, ids in prompts], completions).tolist()
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        asked = [prompt for prompt, _ in prompts]
        return self.reward_model.score(asked, [_like(*pair) for pair in zip(asked, texts, strict=True)])


def validation_prompts(
    reward_model: Any, prompt_dataset: Rows | None, eval_dataset: Rows | dict[str, Rows] | None, args: SFTConfig
) -> list[Text]:
    """The prompts to complete and score at each evaluation; none without a reward model."""
    if reward_model is None:
        if prompt_dataset is not None:
            raise InputError("prompt_dataset: nothing scores it; give a reward_model, or leave it out")
        if (args.metric_for_best_model or "").removeprefix("eval_") == "rm_score":
            raise InputError("metric_for_best_model='eval_rm_score': nothing computes it; give a reward_model")
        return []
    if eval_dataset is None:
        raise InputError(
            f"reward_model: its score is part of an evaluation, and there is none (eval_strategy="
            f"'{args.eval_strategy.value}', no eval_dataset); set eval_strategy to 'epoch' and give an eval_dataset"
        )
    sources = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    if prompt_dataset is not None:
        sources = {"prompt_dataset": prompt_dataset}
    for name, rows in sources.items():
        if "prompt" not in columns_of(rows):
            raise InputError(f"{name}: no column 'prompt' to complete and score; give a prompt_dataset that has it")
    return [row["prompt"] for name, rows in sources.items() for row in check_rows(rows, "prompt", name)]


def as_reward_model(reward_model: Any) -> Any:
    """A folder's reward model; another object is taken as one."""
    if not isinstance(reward_model, str | os.PathLike):
        return reward_model
    from .models.reward_model import RewardModel

    return RewardModel.from_pretrained(str(reward_model))


def _like(prompt: Text, text: str) -> Text:
    """A completion in its prompt's form."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
