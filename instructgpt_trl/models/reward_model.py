"""Reward models: scores of texts, the bias that makes demonstrations score 0, and the parts that PPO takes."""

import math
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import InputError, check_output_dir, encode_completion, encode_prompt
from ..data.rankings import DataCollatorForRanking
from ..data.rows import Text
from .loading import is_adapter, load_tokenizer
from .lora import fuse_lora
from .reward_folder import (
    forget_reward_config,
    quantization_for,
    quantized_by,
    read_reward_config,
    write_reward_config,
)
from .reward_network import (
    adapter_base,
    load_reward_network,
    pool_by_length,
    pooled_forward,
)
from .sharing import attention_length, network_inputs, why_not_shared


class RewardModel:
    """
    A trained reward model: scores of prompts with completions, higher is better.

        score = head(last hidden state) + bias

    Args:
        model (`PreTrainedModel` or `PeftModel`): sequence classification model with one label; is made to pool by
            length in place, see [`pool_by_length`].
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        bias (`float`, *optional*, defaults to `0.0`): added to every score, here and nowhere else.
        calibrated (`bool`, *optional*, defaults to `False`): whether the bias comes from demonstrations.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        bias: float = 0.0,
        calibrated: bool = False,
    ):
        pool_by_length(model)
        fuse_lora(model)
        self.model = model
        self.tokenizer = tokenizer
        self.bias = float(bias)
        self.calibrated = calibrated
        self._shares: bool | None = None

    @classmethod
    def from_pretrained(cls, path: str, quantization_config: Any = None, **kwargs: Any) -> "RewardModel":
        """
        Load what `RewardTrainer.save_model` or [`RewardModel.save_pretrained`] wrote, or a sequence classification
        model of others, whose bias is then 0.

        Args:
            path (`str`): folder, or hub id of a full model.
            quantization_config (`BitsAndBytesConfig` or `False`, *optional*): an adapter trained on a quantised base
                is put on the same again; `False` asks for the base in full precision.
            kwargs: passed to `from_pretrained` of the base; float32 unless `dtype` says otherwise.

        Raises:
            [`InputError`]: no model there, or one without its head.
        """
        saved = read_reward_config(path)
        hub = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
        tokenizer = load_tokenizer(path, adapter_base(path) if is_adapter(path) else None, **hub)
        quantization = quantization_for(path, saved, quantization_config)
        network = load_reward_network(path, tokenizer, quantization, **kwargs)
        return cls(network.eval(), tokenizer, saved["bias"], saved["calibrated"])

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], batch_size: int = 8) -> list[float]:
        """
        Scores, bias included, of texts or conversations.

        Args:
            prompts, completions (`list` of the same length): strings or conversations, as in demonstrations.
            batch_size (`int`, *optional*, defaults to `8`): completions a forward pass.

        Raises:
            [`InputError`]: the lists do not match.
        """
        return self.score_ids(*self.encode(prompts, completions), batch_size).tolist()

    def score_ids(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], batch_size: int = 8
    ) -> Tensor:
        """
        Scores, bias included, of token ids, without encoding them again: `torch.Tensor` of shape `(N,)`, float32, on
        the CPU, in the order given. The network is in eval mode meanwhile, and outside a trainer's autocast.
        """
        return (self._raw_scores(prompt_ids, completion_ids, batch_size) + self.bias).float()

    def encode(self, prompts: Sequence[Text], completions: Sequence[Text]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of prompts and of completions, as reward-model training and PPO see them."""
        for name, texts in (("prompts", prompts), ("completions", completions)):
            if isinstance(texts, str):
                raise InputError(f"{name}: expected a list of texts, got one string; put it into a list")
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts but {len(completions)} completions; give as many of each")
        prompt_ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        pairs = zip(prompts, completions, strict=True)
        return prompt_ids, [encode_completion(self.tokenizer, prompt, completion) for prompt, completion in pairs]

    def calibrate(self, prompts: Sequence[Text], completions: Sequence[Text], batch_size: int = 8) -> float:
        """
        Set the bias so that these, usually the labelers' demonstrations, score 0 on average.

        Returns:
            `float`: their mean under the old bias.

        Raises:
            [`InputError`]: there are none, or a score is not finite.

        Source: Ouyang et al. 2022, appendix C.2 ("normalize the reward model using a bias").

        Differs from TRL: `RewardTrainer` has no bias.
        """
        return self.calibrate_ids(*self.encode(prompts, completions), batch_size)

    def calibrate_ids(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], batch_size: int = 8
    ) -> float:
        """[`RewardModel.calibrate`] for token ids."""
        if not len(prompt_ids):
            raise InputError("no demonstrations to calibrate with; expected at least one")
        raw = self._raw_scores(prompt_ids, completion_ids, batch_size).mean().item()
        if not math.isfinite(raw):
            raise InputError(
                f"the mean score of the demonstrations is {raw}; the network has diverged, lower its rate"
            )
        old = raw + self.bias
        self.bias, self.calibrated = -raw, True
        return old

    def why_not_shared(self) -> str | None:
        """Why the completions of a prompt cannot be scored behind one copy of it, `None` if they can."""
        with _scoring(self.model):
            return why_not_shared(self.model)

    def save_pretrained(self, path: str) -> None:
        """Write weights, tokenizer and `reward_model.json` into a folder. Raises [`InputError`] if it cannot."""
        check_output_dir(path)
        forget_reward_config(path)
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        self.write_config(path)

    def write_config(self, path: str) -> None:
        """Write only `reward_model.json`, beside weights that are complete."""
        adapter = isinstance(self.model, PeftModel)
        write_reward_config(
            path,
            bias=self.bias,
            calibrated=self.calibrated,
            kind="adapter" if adapter else "full",
            base=base_name(self.model) if adapter else None,
            quantization=quantized_by(self.model),
        )

    @torch.no_grad()
    def _raw_scores(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], batch_size: int
    ) -> Tensor:
        """
        (N,) float64 scores on the CPU without the bias. Batches are even: sorted by length, longest first. Completions
        of one prompt stand behind one copy of it, where the network can do that.
        """
        if any(not [*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)):
            raise InputError("a prompt and its completion have no token at all; leave them out")
        scores = torch.zeros(len(prompt_ids), dtype=torch.float64)
        collator = DataCollatorForRanking(self.tokenizer.pad_token_id or 0)
        with _scoring(self.model):
            for rows in _batches(prompt_ids, completion_ids, batch_size):
                shared = any(len(row["ranks"]) > 1 for row in rows) and all(
                    all(row["completions_ids"]) for row in rows
                )
                collator.attention_length = self._attention_length() if shared else None
                batch = collator(rows)
                index = batch["ranks"]
                batch = {name: x.to(self.model.device) for name, x in batch.items() if isinstance(x, Tensor)}
                scores[index] = (
                    self.model(**network_inputs(self.model, batch), use_cache=False).logits[:, 0].cpu().double()
                )
        return scores

    def _attention_length(self) -> float | None:
        """For a collator: `None` where prompts cannot be shared, which is found out once."""
        if self._shares is None:
            self._shares = why_not_shared(self.model) is None
        return attention_length(self.model) if self._shares else None


def _batches(
    prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Rows of an encoded ranking with `batch_size` completions in all, whose ranks are the places of these."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompt_ids):
        places.setdefault(tuple(prompt), []).append(place)

    def length(place: int) -> int:
        return len(prompt_ids[place]) + len(completion_ids[place])

    groups = [sorted(group, key=length, reverse=True) for group in places.values()]
    order = [place for group in sorted(groups, key=lambda group: length(group[0]), reverse=True) for place in group]
    for start in range(0, len(order), batch_size):
        rows: dict[tuple[int, ...], dict[str, Any]] = {}
        for place in order[start : start + batch_size]:
            new = {"prompt_ids": prompt_ids[place], "completions_ids": [], "ranks": [], "shortened": 0}
            row = rows.setdefault(tuple(prompt_ids[place]), new)
            row["completions_ids"].append(completion_ids[place])
            row["ranks"].append(place)
        yield list(rows.values())


@contextmanager
def _scoring(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Eval mode, and without the autocast that a trainer wraps around forward: a saved model must score the same."""
    training, wrapped = model.training, model.__dict__.get("forward")
    model.eval()
    plain = type(model).forward if isinstance(model, PeftModel) else pooled_forward
    model.forward = types.MethodType(plain, model)
    try:
        yield
    finally:
        if wrapped is None:
            del model.forward
        else:
            model.forward = wrapped
        model.train(training)


def base_name(model: PeftModel) -> str | None:
    return model.peft_config[model.active_adapter].base_model_name_or_path
