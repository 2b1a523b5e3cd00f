"""
What a reward model's folder holds beside the weights and the tokenizer: `reward_model.json`,

    {"format": 1, "kind": "full" | "adapter", "base": <the adapter's base> | null, "bias": <added to every score>,
     "calibrated": <whether the bias comes from demonstrations>, "quantization": <config of a quantised base> | null}

in a file of its own because neither transformers' head nor an adapter_config.json has a place for a bias.
"""

import json
import logging
import os
from numbers import Real
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from ..data import InputError
from .folders import loading, read_object
from .loading import is_adapter
from .reward_examples import EXAMPLES

logger = logging.getLogger(__name__)

CONFIG_NAME = "reward_model.json"
FORMAT = 1


def read_reward_config(path: str) -> dict[str, Any]:
    """
    `reward_model.json` of a folder. Without one: bias 0, not calibrated, and an info log.

    Raises:
        [`InputError`]: the file is broken, or of a later format.
    """
    file = Path(path) / CONFIG_NAME
    default = {"format": FORMAT, "kind": "full", "base": None, "bias": 0.0, "calibrated": False, "quantization": None}
    if not file.is_file():
        logger.info(f"{path}: no {CONFIG_NAME}; a reward model of others, its bias is 0")
        return default | ({"kind": "adapter"} if is_adapter(path) else {})
    saved = read_object(file)
    missing = [name for name in ("format", "bias") if name not in saved]
    if missing:
        raise InputError(f"{file}: {missing[0]} is missing; save the reward model again")
    config = default | saved
    types = {"format": int, "bias": Real, "calibrated": bool, "quantization": dict | None, "base": str | None}
    for name, kind in types.items():
        if not isinstance(config[name], kind) or isinstance(config[name], bool) and kind is not bool:
            raise InputError(f"{file}: {name}={config[name]!r} cannot be; save the reward model again")
    kind = "adapter" if is_adapter(path) else "full"
    if config["kind"] != kind:
        raise InputError(
            f"{file}: it is of the kind {config['kind']!r}, and the folder's weights are {kind!r}; copy both again"
        )
    if config["format"] != FORMAT or not abs(config["bias"]) < 1e30:
        raise InputError(
            f"{file}: expected format {FORMAT} and a finite bias, got format {config['format']} and bias "
            f"{config['bias']}; save the reward model again with this version"
        )
    return config


def write_reward_config(
    path: str,
    bias: float,
    calibrated: bool = False,
    kind: str = "full",
    base: str | None = None,
    quantization: dict | None = None,
) -> None:
    """Write `reward_model.json` at once or not at all. See the top of this file for its fields."""
    config = {
        "format": FORMAT,
        "kind": kind,
        "base": base,
        "bias": bias,
        "calibrated": calibrated,
        "quantization": quantization,
    }
    file = Path(path) / CONFIG_NAME
    temporary = file.with_name(f"{CONFIG_NAME}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def forget_reward_config(path: str) -> None:
    """
    Remove `reward_model.json` and the scores of examples before new weights or another bias are written, so that the
    old ones never stand beside them.
    """
    for name in (CONFIG_NAME, EXAMPLES):
        (Path(path) / name).unlink(missing_ok=True)


def quantized_by(model: PreTrainedModel | PeftModel) -> dict[str, Any] | None:
    """Config of the bitsandbytes quantisation of a model, as JSON."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return None
    config = model.config.quantization_config
    return json.loads(json.dumps(config if isinstance(config, dict) else config.to_dict(), default=str))


def quantization_for(path: str, saved: dict[str, Any], asked: Any) -> Any:
    """The quantisation to load with: the one asked for, none for `False`, else the one trained with."""
    if asked is not None or saved["quantization"] is None:
        return asked or None
    if not is_bitsandbytes_available():
        raise InputError(
            f"{path}: trained on a base quantised by bitsandbytes, which is not installed; install it, or pass "
            f"quantization_config=False to score on the base in full precision"
        )
    with loading(f"quantization in {Path(path) / CONFIG_NAME}"):
        return BitsAndBytesConfig.from_dict(saved["quantization"])
