"""Folders of models as they come from a disk: files that are cut short or broken are named before they are loaded."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .._trl import create_model_from_path
from ..data import InputError
from ..data.files import unique_keys

# Of those that transformers and PEFT read; what else lies in a folder is nobody's business
OBJECTS = ("config.json", "generation_config.json", "adapter_config.json", SAFE_WEIGHTS_INDEX_NAME)
OBJECTS += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """
    What other libraries raise of files that are not as they expect becomes an [`InputError`], of whatever type it is:
    a config with a wrong value ends in any of them. Not what is missing on the machine, nor its memory.
    """
    try:
        yield
    except (InputError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}, "
        raise InputError(f"{what} cannot be loaded: {kind}{' '.join(str(error).split())[:600]}") from error


def check_folder(path: str) -> None:
    """
    Refuse a folder with a broken file in it: JSON that is none, safetensors that end too early. Reads no weights.

    Raises:
        [`InputError`]: the file and what is wrong with it.
    """
    folder = Path(path)
    objects = {name: read_object(folder / name) for name in OBJECTS if (folder / name).is_file()}
    ends = objects.get("generation_config.json", {}).get("eos_token_id")
    if not all(end is None or type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise InputError(f"{folder}/generation_config.json: eos_token_id={ends!r}: expected whole numbers; correct it")
    for file in sorted(folder.glob("*.safetensors")):
        check_weights(file)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        places = read_object(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise InputError(f"{folder / SAFE_WEIGHTS_INDEX_NAME}: no weight_map is in it; copy the model again")
        for name in sorted(set(places.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{folder}: {name} is missing, which its index names; copy the model again")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a file. Raises [`InputError`] if there is none in it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read ({error}); copy or save it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(value).__name__}; copy or save it again")
    return value


def check_weights(file: Path | str) -> None:
    """Raise [`InputError`] unless a safetensors file is whole, by its header and its size."""
    try:
        with safe_open(file, "pt") as weights:
            weights.keys()
    except Exception as error:  # safetensors', and those of the system
        raise InputError(f"{file}: no whole safetensors file ({error}); copy or save it again") from None


def read_adapter_config(path: str) -> PeftConfig:
    """
    The config of an adapter, folder or hub id.

    Raises:
        [`InputError`]: it cannot be read, or lacks what the adapter's weights mean nothing without.
    """
    file = Path(path) / "adapter_config.json"
    if file.is_file():
        saved = read_object(file)
        if saved.get("peft_type") == "LORA":
            for name, kind in (("r", Integral), ("lora_alpha", Real)):
                value = saved.get(name)
                if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31:
                    raise InputError(f"{file}: {name}={value!r}: expected a number above 0; save the adapter again")
            dropout = saved.get("lora_dropout", 0)
            if not isinstance(dropout, Real) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
                raise InputError(f"{file}: lora_dropout={dropout!r}: expected a number from 0 to 1; correct it")
            if saved.get("target_modules") is None and saved.get("target_parameters") is None:
                raise InputError(f"{file}: target_modules is missing; save the adapter again")
    with loading(str(file) if file.is_file() else f"the config of the adapter {path}"):
        return PeftConfig.from_pretrained(path)


def adapter_base(path: str) -> str:
    """The name of an adapter's base, from its adapter_config.json."""
    base = read_adapter_config(path).base_model_name_or_path
    if not base or not isinstance(base, str):
        raise InputError(f"{path}: adapter_config.json names no base model; set base_model_name_or_path in it")
    if (Path(base) / "adapter_config.json").is_file():
        raise InputError(f"{path}: its base {base} is itself an adapter; merge that one into its base first")
    return base


def load_whole(name: str, what: str, architecture: Any = None, **kwargs: Any) -> tuple[PreTrainedModel, set[str]]:
    """
    A model from a folder or a hub id, with all its weights, which transformers would make up where they are missing.

    Args:
        name (`str`): folder or hub id.
        what (`str`): what messages call it.
        architecture: of transformers' auto classes; without it, as TRL chooses it.
        kwargs: passed to `from_pretrained`.

    Returns:
        the model, and which weights of a new head are missing (`score`).

    Raises:
        [`InputError`]: it cannot be loaded, weights are missing or have another shape than the config says.
    """
    if Path(name).is_dir():
        check_folder(name)
    # Mismatches are told below, with their names; without an answer transformers would ask whether to run code
    safe = {"trust_remote_code": False, "use_safetensors": True}  # no pickle
    kwargs = {"ignore_mismatched_sizes": True, **safe, **kwargs}
    with loading(what):
        model, info = create_model_from_path(name, architecture, output_loading_info=True, **kwargs)
    kind = read_object(Path(name) / "config.json").get("model_type") if Path(name).is_dir() else None
    if kind is not None and kind != type(model.config).model_type:  # TRL goes by the names of architectures alone
        raise InputError(
            f"{what}: its config.json says model_type={kind!r}, and its architectures another; correct it"
        )
    for key, saved, wanted in sorted(info["mismatched_keys"], key=lambda one: one[0]):
        raise InputError(
            f"{what}: {key} has the shape {list(saved)}, and by the config {list(wanted)}; config and weights are of "
            f"different models, copy both again"
        )
    if "num_hidden_layers" not in kwargs:
        _check_layers(model, info["unexpected_keys"], what)
    head = {key for key in info["missing_keys"] if key.startswith("score.")}
    missing = sorted(info["missing_keys"] - head)
    if missing:
        raise InputError(f"{what}: {len(missing)} weights are missing, first {missing[0]}; the folder is incomplete")
    if "score.weight" in info["unexpected_keys"]:
        raise InputError(f"{what}: a reward model, with a head 'score'; expected a language model")
    return model, head


def _check_layers(model: PreTrainedModel, unexpected: Iterable[str], what: str) -> None:
    """Raise [`InputError`] if there are weights of layers that the config does not have, which would be left out."""
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    found = [re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.", key) for key in unexpected]
    last = max((int(match[1]) for match in found if match), default=-1)
    further = getattr(config, "num_nextn_predict_layers", None) or 0  # that predict tokens further on
    if isinstance(count, int) and last >= count + further:
        raise InputError(
            f"{what}: by its config it has {count} layers, and its weights are of {last + 1}; config and weights are "
            f"of different models, copy both again"
        )
