"""Models from a name: a full model, or an adapter folder on the base that it names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .._trl import create_model_from_path
from ..data import InputError


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with an adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def same_base(first: str | None, second: str | None) -> bool:
    """Whether two names mean one base: the same folder after resolving, or the same hub id."""
    if not first or not second:
        return False
    paths = [Path(name) for name in (first, second)]
    if all(path.exists() for path in paths):
        return paths[0].resolve() == paths[1].resolve()
    return first == second


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence in tokens; `None` if the config has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(path: str, base: str | None = None, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `path`, else that of its `base`."""
    has_own = not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(path if has_own or base is None else base, **kwargs)


def load_policy(path: str, **model_init_kwargs) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """
    A causal language model and its tokenizer from a full model (folder or hub id) or from an adapter folder, whose
    base is found from the adapter's config and whose weights are trained on.

    Args:
        path (`str`): folder or hub id.
        model_init_kwargs: passed to `from_pretrained` of the base; float32 unless `dtype` says otherwise.

    Raises:
        [`InputError`]: the folder holds neither, or the adapter's base cannot be found.
    """
    adapter = is_adapter(path)
    base = PeftConfig.from_pretrained(path).base_model_name_or_path if adapter else path
    if Path(path).is_dir() and not adapter and not (Path(path) / "config.json").is_file():
        raise InputError(
            f"{path}: neither config.json nor adapter_config.json is in it; expected a model or an adapter"
        )
    try:
        model = create_model_from_path(base, AutoModelForCausalLM, **model_init_kwargs)
    except OSError as error:
        reason = str(error).split("\n")[0]
        where = f"base model '{base}' of the adapter {path}" if adapter else f"model '{path}'"
        raise InputError(f"{where} cannot be loaded: {reason}") from None
    if adapter:
        model = PeftModel.from_pretrained(model, path, is_trainable=True)
    kwargs = {key: model_init_kwargs[key] for key in ("trust_remote_code",) if key in model_init_kwargs}
    return model, load_tokenizer(path, base, **kwargs)


@contextmanager
def float32_adapters(model: nn.Module) -> Iterator[None]:
    """
    Keep loaded adapters float32 while a parent's constructor runs: on a quantised base TRL casts what requires a
    gradient to bfloat16, and the reference, which does not, then differs from the policy (KL 3.6e-4 at step 0).
    """
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
