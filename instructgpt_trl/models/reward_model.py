"""Reward models: scores of texts, the bias that makes demonstrations score 0, and the parts that PPO takes."""

import copy
import json
import math
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._trl import get_config_model_id
from ..data import InputError, check_output_dir, encode_completion, encode_prompt
from ..data.formats import Text
from .loading import fit_vocabulary, is_adapter, load_tokenizer
from .reward_folder import (
    forget_reward_config,
    quantization_for,
    quantized_by,
    read_reward_config,
    write_reward_config,
)
from .reward_network import (
    HEAD_PREFIX,
    adapter_base,
    head_of,
    init_head,
    last_token_scores,
    load_adapter_state,
    load_reward_network,
    pool_by_length,
    pooled_forward,
    read_adapter,
    scalar_config,
)

__all__ = [
    "RewardModel",
    "RewardParts",
    "head_of",
    "init_head",
    "last_token_scores",
    "load_reward_network",
    "pool_by_length",
    "read_reward_config",
    "reward_parts",
    "scalar_config",
    "write_reward_config",
]


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
        self.model = model
        self.tokenizer = tokenizer
        self.bias = float(bias)
        self.calibrated = calibrated

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
            base=_base_name(self.model) if adapter else None,
            quantization=quantized_by(self.model),
        )

    @torch.no_grad()
    def _raw_scores(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], batch_size: int
    ) -> Tensor:
        """(N,) float64 scores on the CPU without the bias. Batches are even: sorted by length, longest first."""
        rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        if any(not row for row in rows):
            raise InputError("a prompt and its completion have no token at all; leave them out")
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        scores = torch.zeros(len(rows), dtype=torch.float64)
        with _scoring(self.model):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                input_ids, mask = _pad([rows[index] for index in batch], self.tokenizer.pad_token_id or 0)
                device = self.model.device
                outputs = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
                scores[batch] = outputs.logits.squeeze(-1).cpu().double()  # MPS has no float64
        return scores


def _pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask, (N, L) each."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    input_ids = torch.full(mask.shape, pad_id)
    input_ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return input_ids, mask


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


@dataclass
class RewardParts:
    """
    A reward model in the parts that PPO puts together, so that an adapter goes onto a base that is already there.

    Args:
        config (`PeftConfig`, *optional*): shape of the adapter for a causal base, without a head; `None` for a full
            model.
        state (`dict[str, Tensor]`, *optional*): its weights by their saved names, without the head.
        head_weight (`torch.Tensor` of shape `(1, H)`): the head, float32.
        bias (`float`): added to every score; the head's own bias, if it has one, included.
        base (`str`, *optional*): the adapter's base; `None` for a full model.
        tokenizer (`PreTrainedTokenizerBase`): the reward model's tokenizer.
        path (`str`, *optional*): folder it was read from.
        model (`PreTrainedModel` or `PeftModel`, *optional*): the network, if an object was given. Never changed.
    """

    config: PeftConfig | None
    state: dict[str, Tensor] | None
    head_weight: Tensor
    bias: float
    base: str | None
    tokenizer: PreTrainedTokenizerBase
    path: str | None = None
    model: PreTrainedModel | PeftModel | None = None

    def load_network(self, **kwargs: Any) -> PreTrainedModel | PeftModel:
        """
        The network on a base of its own, frozen and in eval mode: a full model, or a plain `PeftModel` with the
        adapter `default` and no head in it. Its head is `head_weight`, not the network's `score`. From an object, a
        copy of it.

        Args:
            kwargs: passed to `from_pretrained` of the base (`dtype`, `quantization_config`, ...).
        """
        if self.model is not None:
            network = copy.deepcopy(self.model)
            network = network.unload() if isinstance(network, PeftModel) else network
        else:
            saved = read_reward_config(self.path)
            quantization = quantization_for(self.path, saved, kwargs.pop("quantization_config", None))
            # seed: an adapter's base has no head, and none is needed
            name, seed = (self.path, None) if self.config is None else (self.base, 0)
            network = load_reward_network(name, quantization_config=quantization, seed=seed, **kwargs)
        if self.config is not None:
            fit_vocabulary(network, {key: tensor.shape for key, tensor in self.state.items()}, self.tokenizer)
            config = copy.deepcopy(self.config)
            config.task_type, config.base_model_name_or_path = None, network.name_or_path
            network = load_adapter_state(get_peft_model(network, config), self.state, self.path or "reward model")
        return network.requires_grad_(False).eval()


def reward_parts(source: "str | RewardModel | PreTrainedModel | PeftModel", **kwargs: Any) -> RewardParts:
    """
    Take a reward model apart, from its folder without loading a base, or from an object. `kwargs` go to
    `from_pretrained` of its tokenizer.

    Raises:
        [`InputError`]: the folder holds no reward model, or its head is missing.
    """
    if isinstance(source, RewardModel):
        return _parts_of_object(source)
    if not isinstance(source, str):
        name = get_config_model_id(source.config)
        if not name:
            raise InputError("the reward model was made in memory; pass RewardModel(model, tokenizer) instead")
        return _parts_of_object(RewardModel(source, load_tokenizer(name, **kwargs)))
    saved = read_reward_config(source)
    if not is_adapter(source):
        weight, head_bias = _read_head(source)
        return RewardParts(
            None, None, weight, saved["bias"] + head_bias, None, load_tokenizer(source, **kwargs), path=source
        )
    config, state = read_adapter(source)
    tokenizer = load_tokenizer(source, adapter_base(source), **kwargs)
    return _adapter_parts(config, state, saved["bias"], adapter_base(source), tokenizer, path=source)


def _parts_of_object(source: RewardModel) -> RewardParts:
    if not isinstance(source.model, PeftModel):
        head = head_of(source.model)
        head_bias = 0.0 if head.bias is None else head.bias.item()
        weight = head.weight.detach().cpu().float().clone()
        return RewardParts(None, None, weight, source.bias + head_bias, None, source.tokenizer, model=source.model)
    name = source.model.active_adapter
    state = get_peft_model_state_dict(source.model, adapter_name=name, save_embedding_layers=False)
    state = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
    config = source.model.peft_config[name]
    return _adapter_parts(config, state, source.bias, _base_name(source.model), source.tokenizer, model=source.model)


def _adapter_parts(
    config: PeftConfig,
    state: dict[str, Tensor],
    bias: float,
    base: str | None,
    tokenizer: PreTrainedTokenizerBase,
    **origin: Any,
) -> RewardParts:
    if f"{HEAD_PREFIX}weight" not in state:
        raise InputError(
            f"{origin.get('path', 'reward model')}: the weights of the reward head ('score') are missing from the "
            f"adapter; train it with RewardTrainer, or put 'score' into modules_to_save"
        )
    config = scalar_config(config)
    config.task_type = "CAUSAL_LM"
    config.modules_to_save = [name for name in config.modules_to_save if name != "score"] or None
    head = {key.removeprefix(HEAD_PREFIX): state.pop(key) for key in list(state) if key.startswith(HEAD_PREFIX)}
    bias += head["bias"].item() if "bias" in head else 0.0
    return RewardParts(config, state, head["weight"].float(), bias, base, tokenizer, **origin)


def _read_head(path: str) -> tuple[Tensor, float]:
    """Weight and bias of a full model's head, without loading the rest where the weights are safetensors."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {key: folder / name for key, name in places.items() if key.startswith("score.")}
    elif single.is_file():
        with safe_open(single, "pt") as weights:
            files = {key: single for key in weights.keys() if key.startswith("score.")}
    else:  # a hub id
        head = head_of(load_reward_network(path))
        return head.weight.detach().float(), 0.0 if head.bias is None else head.bias.item()
    if "score.weight" not in files:
        raise InputError(f"{path}: the weights of the reward head ('score') are missing; train it with RewardTrainer")
    tensors = {}
    for key, file in files.items():
        with safe_open(file, "pt") as weights:
            tensors[key] = weights.get_tensor(key).float()
    return tensors["score.weight"], tensors["score.bias"].item() if "score.bias" in tensors else 0.0


def _base_name(model: PeftModel) -> str | None:
    return model.peft_config[model.active_adapter].base_model_name_or_path
