"""Models from a name: a full model, or an adapter folder on the base that it names."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import NoMatchingPeftModuleError, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .._trl import preserved_rng
from ..data import InputError
from .folders import adapter_base, check_folder, check_weights, load_whole

__all__ = ["check_positions", "context_length", "load_policy"]

logger = logging.get_logger(__name__)


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


def holds_weights_of(model: PreTrainedModel, name: str) -> bool:
    """
    Whether `model` has the weights saved under `name`, by three of its tensors: a model that was trained in memory
    keeps the name of what it was loaded from. True where it cannot be told, as for a quantised model.
    """
    file = _weights_file(name)
    if file is None or getattr(model, "is_quantized", False):
        return True
    own = {key.replace(".base_layer", ""): parameter for key, parameter in model.named_parameters()}
    with safe_open(file, framework="pt") as saved:
        keys = sorted(
            key for key in saved.keys() if key in own and list(own[key].shape) == saved.get_slice(key).get_shape()
        )
        return all(
            torch.equal(own[key].detach().cpu(), saved.get_tensor(key).to(own[key].dtype))
            for key in {*keys[:1], *keys[len(keys) // 2 :][:1], *keys[-1:]}
        )


def _weights_file(name: str) -> str | None:
    """A safetensors file of a folder's or a cached hub model's weights, the first of several."""

    def find(file: str) -> str | None:
        path = Path(name) / file if Path(name).is_dir() else try_to_load_from_cache(name, file)
        return str(path) if isinstance(path, str | Path) and Path(path).is_file() else None

    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return find(SAFE_WEIGHTS_NAME)
    return find(min(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))


@contextmanager
def restored(owner: Any, *names: str) -> Iterator[None]:
    """Afterwards these attributes are what they were before, whatever happened."""
    before = {name: getattr(owner, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence in tokens; `None` if the config has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def warn_beyond_context(config: PreTrainedConfig, prompt: int | None, completion: int) -> None:
    """
    Warn if a prompt and a completion of these lengths exceed the context. Rotary positions go on past it, worse and
    worse; of learned ones see [`check_positions`].
    """
    context = context_length(config)
    if context is not None and (prompt or 0) + completion > context:
        logger.warning(
            f"max_prompt_length={prompt} and max_completion_length={completion} together exceed the model's context "
            f"of {context} tokens; lower them"
        )


def check_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise [`InputError`] if a tokenizer has no token at which a completion ends."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: its tokenizer has no EOS token, at which a completion ends; set eos_token in it")


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """
    Raise [`InputError`] if a model has no embedding of a token that is always there; of one that may never be (some
    published tokenizers have an image's) it is said.
    """
    words = model.get_input_embeddings()
    weight = getattr(getattr(words, "original_module", words), "weight", None)  # PEFT's wrapper of single tokens
    last = max(tokenizer.get_vocab().values(), default=0)
    if weight is None or last < len(weight):
        return
    always = {token: getattr(tokenizer, f"{token}_id") for token in ("pad_token", "eos_token", "bos_token")}
    beyond = [token for token, id in always.items() if id is not None and id >= len(weight)]
    hint = "call model.resize_token_embeddings(len(tokenizer)) and save both again"
    if beyond:
        has = f"its {beyond[0]} has the id {always[beyond[0]]}, and the model {len(weight)} embeddings"
        raise InputError(f"{name}: {has}; {hint}")
    token = tokenizer.convert_ids_to_tokens(last)
    logger.warning(
        f"{name}: its tokenizer has the token {token!r} with id {last}, and the model {len(weight)} embeddings; if it "
        f"occurs, {hint}"
    )


def check_positions(model: nn.Module, longest: Callable[[], int], what: str, setting: str) -> None:
    """
    Raise [`InputError`] if the longest sequence, in tokens, goes past a table of learned positions, where there is
    one. Other positions go on, worse and worse.
    """
    context, words = context_length(model.config), model.get_input_embeddings()
    own = {id(module) for module in words.modules()}
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding) and id(one) not in own]
    # OPT's has two more
    if context and any(0 <= one.num_embeddings - context <= 2 for one in tables) and (most := longest()) > context:
        raise InputError(f"{what}: {most} tokens, and the model has positions for {context}; lower {setting}")


def load_tokenizer(path: str, base: str | None = None, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `path`, else that of its `base`. Raises [`InputError`] if there is none."""
    has_own = not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").is_file()
    source = path if has_own or base is None else base
    if Path(source).is_dir():
        check_folder(source)
    try:
        return AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **kwargs})
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        reason = " ".join(str(error).split())[:600]
        raise InputError(f"no tokenizer in {source}: {reason}; save the tokenizer beside the model") from error


def fit_vocabulary(
    model: PreTrainedModel, shapes: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """
    Give a base as many embeddings as an adapter was trained with: those saved with it, else as many as its tokenizer
    has tokens, if these are more. New rows are the same each time; what the adapter knows of them it brings.

    Args:
        model: the base, in place.
        shapes: of the adapter's weights, under their saved names.
        tokenizer: the adapter's, if there is one.
    """
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    saved = shapes.get(f"base_model.model.{name}.weight")
    rows = max(len(tokenizer or ()), embeddings.num_embeddings) if saved is None else saved[0]
    if rows != embeddings.num_embeddings:
        with preserved_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(rows, mean_resizing=False)


def adapter_shapes(path: str) -> dict[str, list[int]]:
    """Shapes of the weights in an adapter's folder, under their saved names; none of an adapter of the hub."""
    return weight_shapes(Path(path) / "adapter_model.safetensors")


def weight_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of a safetensors file's weights by name; none where it is not there."""
    if not file.is_file():
        return {}
    check_weights(file)
    with safe_open(file, framework="pt") as weights:
        return {key: weights.get_slice(key).get_shape() for key in weights.keys()}


def does_not_fit(path: str, error: Exception) -> InputError:
    """What torch or PEFT says of an adapter and another base, on one line."""
    return InputError(f"{path}: the adapter does not fit its base: {' '.join(str(error).split())[:300]}")


def load_policy(
    path: str, trainable: bool = True, **model_init_kwargs
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """
    A causal language model and its tokenizer from a full model (folder or hub id) or from an adapter folder, whose
    base is found from the adapter's config and whose weights are trained on.

    Args:
        path (`str`): folder or hub id.
        trainable (`bool`): whether an adapter is to be trained on.
        model_init_kwargs: passed to `from_pretrained` of the base; float32 unless `dtype` says otherwise.

    Raises:
        [`InputError`]: the folder holds neither, or the adapter's base cannot be found.
    """
    adapter = is_adapter(path)
    if adapter:
        check_folder(path)
    base = adapter_base(path) if adapter else path
    if Path(path).is_dir() and not adapter and not (Path(path) / "config.json").is_file():
        raise InputError(
            f"{path}: neither config.json nor adapter_config.json is in it; expected a model or an adapter"
        )
    where = f"base model '{base}' of the adapter {path}" if adapter else f"model '{path}'"
    model, _ = load_whole(base, where, AutoModelForCausalLM, **model_init_kwargs)
    kwargs = {key: model_init_kwargs[key] for key in ("trust_remote_code", "revision") if key in model_init_kwargs}
    tokenizer = load_tokenizer(path, base, **kwargs)
    keep_gradients(model)
    if adapter:
        model = _with_adapter(model, path, tokenizer, trainable)
    check_vocabulary(model, tokenizer, path)
    return model, tokenizer


def _with_adapter(model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, trainable: bool) -> PeftModel:
    shapes = adapter_shapes(path)
    if not shapes and Path(path).is_dir():
        raise InputError(f"{path}: no adapter_model.safetensors in it; save the adapter with PEFT's save_pretrained")
    fit_vocabulary(model, shapes, tokenizer)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            network = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    except (KeyError, RuntimeError) as error:
        raise does_not_fit(path, error) from None
    except NoMatchingPeftModuleError as error:
        raise does_not_fit(path, error) from None
    check_fit(network, path)
    return network


def check_fit(network: PreTrainedModel | PeftModel, path: str) -> None:
    """
    Raise [`InputError`] unless a folder's weights are those of a network, by name and shape: PEFT and Trainer go on
    with what they find. Not of a hub id, nor of weights in several files.
    """
    if isinstance(network, PeftModel):
        name = "default" if "default" in network.peft_config else network.active_adapter  # which is at the root
        own = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
        saved, model = adapter_shapes(path), network.get_base_model()
        # Resized embeddings are saved in several forms, tied ones under two names
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
        others = tuple(f"base_model.model.{name}." for name, module in model.named_modules() if module in embeddings)
    else:
        saved, others = weight_shapes(Path(path) / SAFE_WEIGHTS_NAME), ()
        own = network.state_dict()
        there = {tensor.data_ptr() for key, tensor in own.items() if key in saved}
        own = {key: tensor for key, tensor in own.items() if key in saved or tensor.data_ptr() not in there}  # tied
    if not saved:
        return
    own = {key: list(tensor.shape) for key, tensor in own.items()}
    keys = sorted(key for key in own.keys() | saved.keys() if not key.startswith(others))
    wrong = [key for key in keys if own.get(key) != saved.get(key)]
    if wrong:
        what = "the adapter does not fit its base" if isinstance(network, PeftModel) else "of another model"
        raise InputError(f"{path}: {what}: {len(wrong)} weights differ, first {wrong[0]}")


def keep_gradients(network: nn.Module) -> None:
    """
    On CPUs with bf16 instructions bitsandbytes packs 4-bit weights anew when a layer is first evaluated, into a form
    that computes in bfloat16 and lets no gradient through, in training too from then on, with a warning from torch at
    most (bitsandbytes 0.50, `Linear4bit.forward`). Not so the layers of this network.

    Raises:
        [`InputError`]: it was evaluated before, and is packed already.
    """
    for name, module in network.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"{name}: bitsandbytes has packed its 4-bit weights for evaluation on this CPU, and no gradient "
                f"passes them; load the model anew and train it before it is evaluated"
            )


def fold_last_position(model: PreTrainedModel) -> RemovableHandle:
    """
    Give the LM head the last position of many rows as one matrix. As it comes, torch multiplies each row by a copy of
    a frozen head of its own in bfloat16 on a CPU: 7 GB for 128 rows and SmolLM2's vocabulary, a hundred times slower.
    """

    def folded(head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args[0].contiguous(), *args[1:]

    return model.get_output_embeddings().register_forward_pre_hook(folded)


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
