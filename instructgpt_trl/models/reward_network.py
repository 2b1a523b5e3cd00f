"""
The network of a reward model: a causal backbone and a scalar head, read at the last true position.

It is transformers' `*ForSequenceClassification` with one label, so that what is saved loads anywhere. Only the forward
differs: transformers takes the last token that is not the pad token, which is one too early where pad and EOS are the
same; here the position comes from the attention mask.

Shapes: N sequences, L their padded length, H hidden size.
"""

import copy
import inspect
import logging
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import is_bitsandbytes_available

from ..data import InputError
from .folders import adapter_base, check_folder, check_weights, load_whole, loading, read_adapter_config
from .loading import does_not_fit, fit_vocabulary, is_adapter, keep_gradients
from .reward_folder import CONFIG_NAME

logger = logging.getLogger(__name__)

ADAPTER_PREFIX = "base_model.model."
HEAD_PREFIX = ADAPTER_PREFIX + "score."


def last_token_scores(hidden: Tensor, attention_mask: Tensor, head: nn.Module) -> Tensor:
    """
    Score of each sequence: the head's output at the row's last true position, whatever tokens stand there, on
    whichever side the padding is.

        score = head(hidden[last]),  last = max { t : attention_mask_t }

    The head runs outside autocast in its own precision, float32 unless someone cast it.

    Args:
        hidden (`torch.Tensor` of shape `(N, L, H)`): last hidden states.
        attention_mask (`torch.Tensor` of shape `(N, L)`): 1 or True where a token counts.
        head (`nn.Module`): H to 1, a linear layer or PEFT's wrapper of one.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32 (float64 if the head is).

    Source: summarize-from-feedback and summarize_from_feedback_details read the last real token, by position.

    Differs from TRL: transformers' forward, which TRL uses, looks for the last id that is not the pad id.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask.long()).amax(1).to(hidden.device)
    return _head_scores(hidden[torch.arange(len(last), device=hidden.device), last], head)


def _head_scores(pooled: Tensor, head: nn.Module) -> Tensor:
    """(N,) scores of (N, H) hidden states, outside autocast and in the head's own precision."""
    weight = head.weight
    with torch.autocast(weight.device.type, enabled=False):
        scores = head(pooled.to(weight.device, weight.dtype)).squeeze(-1)
    return scores if scores.dtype == torch.float64 else scores.float()


def pool_by_length(model: PreTrainedModel | PeftModel) -> None:
    """
    Make `model(input_ids=..., attention_mask=...)` read its score by attention mask, see [`last_token_scores`], and
    its positions too. Once is enough; a second call does nothing. The head becomes float32.

    The model's `forward` is replaced, not its class, so PEFT, DDP, autocast and gradient checkpointing see an ordinary
    forward, and a saved model is an ordinary `*ForSequenceClassification`.

    Args:
        model: a sequence classification model with one label and a head named `score`, or a `PeftModel` of one.

    Raises:
        [`InputError`]: the model has no such head.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if head_of(base).out_features != 1:
        raise InputError(f"the model's head gives {head_of(base).out_features} numbers; a reward model needs one")
    if getattr(base, "pools_by_length", False):
        return
    for parameter in base.score.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    base.forward = types.MethodType(pooled_forward, base)
    base.pools_by_length = True


def pooled_forward(
    self: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    labels: None = None,
    return_dict: bool | None = None,
    ends: Tensor | None = None,
    **kwargs: Any,
) -> SequenceClassifierOutputWithPast:
    """
    The forward of a `*ForSequenceClassification` model with one label, see [`pool_by_length`]. For completions that
    share rows, `ends` (N,) are indices into the flattened positions, and the scores are those there.
    """
    if labels is not None:
        raise ValueError("a reward network has no labels; compute the loss from its logits")
    backbone = getattr(self, self.base_model_prefix)
    if attention_mask is None:
        given = input_ids if input_ids is not None else inputs_embeds
        attention_mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        if position_ids is None:  # left padding would otherwise move learned positions
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        kwargs["position_ids"] = position_ids
    outputs = backbone(
        input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
    )
    if ends is None:
        scores = last_token_scores(outputs.last_hidden_state, attention_mask, self.score)
    else:
        scores = _head_scores(outputs.last_hidden_state.flatten(0, 1)[ends], self.score)
    result = SequenceClassifierOutputWithPast(
        logits=scores[:, None],
        past_key_values=outputs.get("past_key_values"),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )
    return result.to_tuple() if return_dict is False else result


def head_of(model: PreTrainedModel | PeftModel) -> nn.Linear:
    """The head in use: the active adapter's own copy where PEFT saves one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = getattr(base, "score", None)
    copies = getattr(head, "modules_to_save", None)
    if copies is not None and head.active_adapters and head.active_adapters[0] in copies:
        head = copies[head.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{type(base).__name__} has no linear head named 'score'; use a decoder that transformers can load with "
            f"AutoModelForSequenceClassification"
        )
    return head


def init_head(model: PreTrainedModel | PeftModel, seed: int) -> None:
    """
    Initialise the head in place, in float32, from a generator of its own.

        weight ~ N(0, 1 / (H + 1)),  a standard deviation of 1 / sqrt(H + 1);  bias = 0 if there is one

    Source: lm-human-preferences, summarize-from-feedback and summarize_from_feedback_details; the paper is silent.

    Differs from TRL: transformers' default for a linear layer, `initializer_range` (usually 0.02), whatever H is.
    """
    head = head_of(model).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = torch.empty(head.weight.shape).normal_(0, 1 / math.sqrt(head.in_features + 1), generator=generator)
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()


def load_reward_network(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_config: Any = None,
    seed: int | None = None,
    trainable: bool = False,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """
    Load a scalar network that pools by length, float32 unless `dtype` says otherwise, from

    - a reward model: a full one, or an adapter on the base that its adapter_config.json names;
    - with a `seed`, also a causal language model, which gets a new head, or an adapter of one (the SFT model), which
      is continued under a new head.

    Args:
        path (`str`): folder, or hub id of a full model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the adapter's, which may have more tokens than its base, see
            [`fit_vocabulary`].
        quantization_config (`BitsAndBytesConfig`, *optional*): quantises the backbone, never the head.
        seed (`int`, *optional*): seed of a new head; without it, a missing head is an error.
        trainable (`bool`): whether an adapter is to be trained on.
        kwargs: passed to `from_pretrained` of the base.

    Raises:
        [`InputError`]: there is no model, a reward model without its head, weights that do not fit, bitsandbytes asked
        for but absent.
    """
    adapter = is_adapter(path)
    base = adapter_base(path) if adapter else path
    model, has_head = _load_base(base, path, quantization_config, kwargs)
    keep_gradients(model)
    is_reward = (Path(path) / CONFIG_NAME).is_file()
    if adapter:
        config, state = read_adapter(path)
        is_reward = is_reward or config.task_type == "SEQ_CLS"
        has_head = any(key.startswith(HEAD_PREFIX) for key in state)
    else:
        is_reward = is_reward or "SequenceClassification" in _architecture(model)
    if not has_head:
        if is_reward or seed is None:
            raise InputError(
                f"{path}: the weights of the reward head ('score') are missing; a head is never made up: train one "
                f"with RewardTrainer, and if a trainer of others saved this, put 'score' into its modules_to_save"
            )
        init_head(model, seed)
    pool_by_length(model)
    if adapter:
        fit_vocabulary(model, {key: tensor.shape for key, tensor in state.items()}, tokenizer)
        model = _attach(model, config, state, path, trainable)
    return model


def read_adapter(path: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter's config and weights under their saved names. Reads safetensors only, never a pickle."""
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{path}: no adapter_model.safetensors in it; save the adapter with PEFT's save_pretrained")
    check_weights(file)
    return read_adapter_config(path), load_file(file)


def scalar_config(config: PeftConfig, trainable: bool = True) -> PeftConfig:
    """A copy of a PEFT config for a network with a head: the head is trained and saved, there is no LM head."""
    config = copy.deepcopy(config)
    config.task_type = "SEQ_CLS"
    config.inference_mode = not trainable
    if hasattr(config, "modules_to_save"):
        kept = [name for name in config.modules_to_save or [] if name not in ("lm_head", "classifier", "score")]
        config.modules_to_save = [*kept, "score"]
    targets = getattr(config, "target_modules", None)
    if targets is not None and not isinstance(targets, str):
        config.target_modules = {name for name in targets if name != "lm_head"}
    return config


def _attach(
    model: PreTrainedModel, config: PeftConfig, state: dict[str, Tensor], path: str, trainable: bool
) -> PeftModel:
    """Put a saved adapter onto its base; every weight must find its place."""
    state = dict(state)
    left = [key for key in state if key.startswith(f"{ADAPTER_PREFIX}lm_head.")]
    if left:
        logger.warning(f"{path}: {len(left)} weights of the LM head left out; a reward model has none")
    for key in left:
        del state[key]
    if not any(key.startswith(HEAD_PREFIX) for key in state):
        state |= {HEAD_PREFIX + name: tensor.detach() for name, tensor in model.score.state_dict().items()}
    network = get_peft_model(model, scalar_config(config, trainable))
    return load_adapter_state(network, state, path)


def load_adapter_state(network: PeftModel, state: dict[str, Tensor], path: str) -> PeftModel:
    """Load weights into the adapter `default`. Raises [`InputError`] if one is missing, left over or misshapen."""
    try:
        result = set_peft_model_state_dict(network, state)
    except (KeyError, RuntimeError) as error:
        raise does_not_fit(path, error) from None
    wrong = [key for key in result.missing_keys if ".default" in key] + list(result.unexpected_keys)
    if wrong:
        raise InputError(f"{path}: the adapter does not fit its base: {len(wrong)} weights differ, first {wrong[0]}")
    return network


def _load_base(base: str, path: str, quantization: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, bool]:
    """A network with a head, and whether the head's weights came from `base`."""
    what = f"model '{base}'" if base == path else f"base model '{base}' of the adapter {path}"
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise InputError(f"{what}: neither config.json nor adapter_config.json is in it; expected a model")
    if quantization is not None:
        kwargs = {**kwargs, "quantization_config": _keep_head(quantization)}
    if Path(base).is_dir():
        check_folder(base)
    with loading(what):
        hub = {key: kwargs[key] for key in ("revision", "trust_remote_code", "token", "cache_dir") if key in kwargs}
        config = AutoConfig.from_pretrained(base, **{"trust_remote_code": False, **hub})
        if "SequenceClassification" in _architecture(config) and config.num_labels != 1:
            raise InputError(f"{what}: its head gives {config.num_labels} numbers; a reward model needs one")
    with _quiet():  # a new head and an unused LM head are no surprise
        model, no_head = load_whole(base, what, AutoModelForSequenceClassification, num_labels=1, **kwargs)
    return model, not no_head


def _keep_head(quantization: Any) -> Any:
    """A copy of a quantisation config that leaves the head in full precision."""
    if type(quantization).__name__ == "BitsAndBytesConfig" and not is_bitsandbytes_available():
        raise InputError(
            "quantization_config asks for bitsandbytes, which is not installed; pip install 'instructgpt-trl[quant]', "
            "or leave quantization_config out"
        )
    quantization = copy.deepcopy(quantization)
    if hasattr(quantization, "llm_int8_skip_modules"):
        quantization.llm_int8_skip_modules = sorted({*(quantization.llm_int8_skip_modules or []), "score"})
    return quantization


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on loading; setting the logger's level instead makes it check a sharding plan."""
    log = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def _architecture(model_or_config: Any) -> str:
    """Class names in a config, as saved."""
    return " ".join(getattr(model_or_config, "config", model_or_config).architectures or [])
