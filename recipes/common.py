"""What the recipes share: settings, models, rows, the end of a run. A mistake of the user's is one line everywhere."""

import json
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# Which of its kernels bitsandbytes did not find is no news for who did not ask for 4 bits, and it tells when imported
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# TRL and PEFT use these old names by themselves
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing\\w*` is deprecated", FutureWarning)
# ruff: noqa: E402

import torch
from accelerate.utils.memory import should_reduce_batch_size
from arguments import DataArguments, ModelArguments, parse_arguments
from datasets import Dataset
from peft import NoMatchingPeftModuleError, PeftConfig
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_peft_config, get_quantization_config

from instructgpt_trl import RewardConfig
from instructgpt_trl.checkpoints import RunStopped, check_checkpoint, last_checkpoint
from instructgpt_trl.data import InputError, as_conversations, encode_completion, load_rows
from instructgpt_trl.memory import PARTS, Load, peak, predict
from instructgpt_trl.models.loading import load_policy
from instructgpt_trl.peak_memory import PeakMemory


def parse(argv: list[str], arguments: type[DataArguments], config: type[TrainingArguments], output_dir: str) -> tuple:
    """
    `arguments`, `config` and `trl.ModelConfig` from flags over the YAML file of `--config`, ready for a trainer.

    Raises:
        [`InputError`]: whatever is wrong with them, or there is no such model.
    """
    args, config, model = parse_arguments(argv, (arguments, config, ModelConfig), output_dir=output_dir)
    check_model(model, config.trust_remote_code)
    if model.dtype is None:
        # TRL's default would keep the embeddings of a quantised model in float32, and compute its products in it
        quantized = model.load_in_4bit or model.load_in_8bit
        model.dtype = str(_compute_type(config) if quantized else torch.float32).removeprefix("torch.")
    _check_output(args, config, model)
    tasks = ("CAUSAL_LM", "SEQ_CLS") if isinstance(config, RewardConfig) else ("CAUSAL_LM",)
    if model.use_peft and model.lora_task_type not in tasks:
        raise InputError(f"lora_task_type={model.lora_task_type}: expected {tasks[0]}; leave it out")
    config.resume_from_checkpoint = _checkpoint(config)
    init = {"revision": model.model_revision, "dtype": model.dtype, "attn_implementation": model.attn_implementation}
    config.model_init_kwargs = {**init, **(config.model_init_kwargs or {})}
    return args, config, model


def _check_output(args: DataArguments, config: TrainingArguments, model: ModelConfig) -> None:
    """Raise [`InputError`] if what is written would replace, or lie beside, a model of another stage."""
    output = os.path.realpath(config.output_dir)
    read = {"model_name_or_path": model.model_name_or_path, "reward_model": getattr(args, "reward_model", None)}
    bases = {f"the base of {name}": base_of(path) for name, path in read.items() if path}
    for name, path in {**read, **bases}.items():
        if path and Path(path).exists() and os.path.realpath(path) == output:
            raise InputError(f"output_dir={config.output_dir}: is {name}, which would be lost; give another folder")
    if (Path(output) / "reward_model.json").is_file() and not isinstance(config, RewardConfig):
        raise InputError(f"output_dir={config.output_dir}: holds a reward model; give another folder")


def parse_model(argv: list[str], arguments: type[ModelArguments], **defaults: Any) -> tuple:
    """As `parse`, for a recipe that trains nothing: `arguments` and `trl.ModelConfig`."""
    dtype = "auto" if torch.cuda.is_available() else "float32"  # as saved, where memory is the card's
    args, model = parse_arguments(argv, (arguments, ModelConfig), **{"dtype": dtype, **defaults})
    check_model(model, args.trust_remote_code)
    return args, model


def check_model(model: ModelConfig, trust_remote_code: bool) -> None:
    """Raise [`InputError`] if there is no such model, or nothing to quantise it with."""
    name = model.model_name_or_path
    if name is None:
        raise InputError("--model_name_or_path is missing; give the folder or hub id of a model")
    if not Path(name).is_dir():
        try:
            AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except OSError:
            raise InputError(
                f"--model_name_or_path {name}: no such folder, nor a model on the hub that can be read; check it"
            ) from None
    elif not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise InputError(
            f"--model_name_or_path {name}: neither config.json nor adapter_config.json is in it; check it"
        )
    elif not (Path(name) / "adapter_config.json").is_file() and not any(Path(name).glob("*token*")):
        raise InputError(f"--model_name_or_path {name}: no tokenizer is in it; save the tokenizer beside the model")
    if model.use_peft:
        check_lora(model)
    if (model.load_in_4bit or model.load_in_8bit) and not is_bitsandbytes_available():
        raise InputError("load_in_4bit, load_in_8bit: bitsandbytes is not installed; pip install bitsandbytes")


def check_lora(model: ModelConfig) -> None:
    """Raise [`InputError`] for a LoRA adapter that cannot be, or would be all zeros."""
    if model.lora_r < 1:
        raise InputError(f"lora_r={model.lora_r}: expected a whole number from 1 on; correct it")
    if model.lora_alpha <= 0:
        raise InputError(f"lora_alpha={model.lora_alpha}: expected a number above 0; correct it")
    if not 0 <= model.lora_dropout < 1:
        raise InputError(f"lora_dropout={model.lora_dropout}: expected a number from 0 to below 1; correct it")


def load_model(args: ModelArguments, model: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, or an adapter on its base, whole, on the GPU if there is one, and its tokenizer."""
    name = model.model_name_or_path
    if (Path(name) / "reward_model.json").is_file():
        raise InputError(f"{name} is a reward model, which generates nothing; give a policy")
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and PeftConfig.from_pretrained(name).task_type == "SEQ_CLS":
        raise InputError(f"{name} is an adapter of a classifier, which generates nothing; give a policy")
    quantization = get_quantization_config(model)
    return load_policy(
        name,
        trainable=False,
        revision=model.model_revision,
        trust_remote_code=args.trust_remote_code,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        device_map="auto" if torch.cuda.is_available() else None,
        **({} if quantization is None else {"quantization_config": quantization}),
    )


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    """What the model's config ends at, and what an answer to this prompt ends at in training."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own]), encode_completion(tokenizer, prompt, "a")[-1]} - {None})


@contextmanager
def loading(what: str) -> Iterator[None]:
    """What other libraries raise of files that are broken, or of options that they do not take, becomes one line."""
    try:
        yield
    except (InputError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:600]
        raise InputError(f"{what} cannot be loaded: {type(error).__name__}, {reason}; save it again") from error


def load_tokenizer(model: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """That of a model's or an adapter's folder, else that of the adapter's base."""
    name = model.model_name_or_path
    own = not Path(name).is_dir() or any(Path(name).glob("*token*"))
    options = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
    source = name if own else base_of(name)
    with loading(f"the tokenizer in {source}"):
        return AutoTokenizer.from_pretrained(source, **options)


def _checkpoint(config: TrainingArguments) -> str | None:
    """The checkpoint to go on from: a folder, or with `true` the last whole one in the output folder."""
    given = str(config.resume_from_checkpoint or False)
    if given.lower() == "false":
        return None
    folder = last_checkpoint(config.output_dir) if given.lower() == "true" else given
    if folder is None or not Path(folder).is_dir():
        raise InputError(
            f"--resume_from_checkpoint {given}: no checkpoint there; give a checkpoint's folder, or true where "
            f"{config.output_dir} holds one that is whole"
        )
    return check_checkpoint(folder)


def read(args: DataArguments, source: str | None, kind: str) -> Dataset | None:
    """The rows of `source`, as conversations if asked for; none without a source."""
    if source is None:
        return None
    rows = load_rows(source, kind)
    return as_conversations(rows) if args.conversational and kind != "pretraining" else rows


def read_and_split(args: DataArguments, config: TrainingArguments, kind: str) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to evaluate on, if any."""
    rows, held_out = read(args, args.dataset, kind), read(args, args.eval_dataset, kind)
    if held_out is None and args.eval_fraction:
        rows, held_out = split_by_prompt(rows, args.eval_fraction, config.seed)
    if held_out is None and config.eval_strategy != "no":
        raise InputError(
            f"eval_strategy={config.eval_strategy.value}: no rows for it; give eval_fraction or eval_dataset"
        )
    return rows, held_out


def split_by_prompt(rows: Dataset, fraction: float, seed: int) -> list[Dataset]:
    """Two parts, the second with `fraction` of the prompts: no prompt has rows in both."""
    of_prompt: dict[str, list[int]] = {}
    for index, row in enumerate(rows):  # a pair that holds its prompt in both texts is a prompt of its own
        of_prompt.setdefault(json.dumps(row["prompt"] or row, default=str), []).append(index)
    groups = list(of_prompt.values())
    if not 0 < fraction < 1 or not math.ceil(fraction * len(groups)) < len(groups):
        raise InputError(
            f"eval_fraction={fraction} of {len(groups)} prompts: expected a number between 0 and 1 that leaves some "
            f"on both sides; correct it or give eval_dataset"
        )
    parts = Dataset.from_dict({"group": range(len(groups))}).train_test_split(fraction, seed=seed)
    return [rows.select([index for group in part["group"] for index in groups[group]]) for part in parts.values()]


def final_evaluation(trainer: Trainer) -> dict[str, float]:
    """Metrics of the model as it is after training: those that were measured at the last step, else measured now."""
    last = [row for row in trainer.state.log_history if "eval_runtime" in row][-1:]
    if last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return last[0]
    return trainer.evaluate()


def next_command(args: DataArguments, output_dir: str, recipe: str, **flags: str) -> str:
    """The command of the next stage, with that stage's YAML file if it lies beside this one's."""
    script = Path(os.path.relpath(__file__)).with_name(recipe)
    file = args.config_file and Path(args.config_file).with_name(f"{script.stem}.yaml")
    words = ["python", str(script), *(["--config", str(file)] if file and file.is_file() else [])]
    for name, value in {**flags, "output_dir": Path(output_dir).with_name(script.stem)}.items():
        words += [f"--{name}", str(value)]
    return shlex.join(words + (["--conversational"] if args.conversational else []))


@contextmanager
def watched_memory(config: TrainingArguments, model: ModelConfig, **sizes: Any) -> Iterator[None]:
    """
    Say the predicted peak of memory and, after what happens inside, the measured one. `sizes` is for `Load`; without
    lengths among them, the longest row is `max_length`, all of it as if it were a completion.
    """

    def say(text: str) -> None:  # where progress bars go; of several processes the first
        if config.process_index == 0:
            print("memory:", text, file=sys.stderr, flush=True)

    gpu = torch.cuda.is_available()
    try:
        parts = predict(_base_config(config, model), _load_of(config, model, sizes))
        most = sorted(PARTS, key=parts.get, reverse=True)[:3]
        predicted = f"{peak(parts) / 1e9:.2f} GB predicted"
        say(f"{predicted}, of it " + ", ".join(f"{part} {parts[part] / 1e9:.2f}" for part in most))
        if gpu:  # what torch counts there is without the context
            predicted = f"{(peak(parts) - parts['context']) / 1e9:.2f} GB predicted, CUDA's own not counted"
        else:
            predicted += "; a CPU's allocator keeps freed tensors too while there is memory to spare"
    except Exception as error:  # a prediction is a service, and architectures differ; the run goes on without
        predicted = "no prediction for this model"
        say(f"{predicted} ({type(error).__name__}: {' '.join(str(error).split())[:100]})")
    # Of a file whose weights were packed into fewer bits, pages stay that nobody reads
    with PeakMemory(anonymous=model.load_in_4bit or model.load_in_8bit) as measured:
        yield
    say(f"peak {measured.bytes / 1e9:.2f} GB, {predicted}")


def _load_of(config: TrainingArguments, model: ModelConfig, sizes: dict[str, Any]) -> Load:
    if "completion" not in sizes:
        sizes = {**sizes, "prompt": 1, "completion": (config.max_length or 1024) - 1}
    dtype = _base_config(config, model).dtype if model.dtype == "auto" else model.dtype
    folder = Path(model.model_name_or_path)
    adapter = PeftConfig.from_pretrained(folder) if (folder / "adapter_config.json").is_file() else None
    return Load(
        lora=get_peft_config(model) or (adapter and replace(adapter, inference_mode=False)),  # it is trained on
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32,
        bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
        compute=_compute_type(config),
        checkpointing=config.gradient_checkpointing,
        state_bytes=2 if "8bit" in str(config.optim) else 8,
        cuda=torch.cuda.is_available(),
        **sizes,
    )


def _compute_type(config: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def base_of(name: str) -> str:
    """The base of an adapter's folder, or the full model itself: a hub id, or a folder without links or `..` in it."""
    file = Path(name) / "adapter_config.json"
    if file.is_file():
        with loading(str(file)):
            name = PeftConfig.from_pretrained(name).base_model_name_or_path
        if not isinstance(name, str):
            raise InputError(f"{file}: no base model is named in it; set base_model_name_or_path")
    return os.path.realpath(name) if Path(name).is_dir() else name


def _base_config(config: TrainingArguments, model: ModelConfig) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(base_of(model.model_name_or_path), trust_remote_code=config.trust_remote_code)


def finish(trainer: Trainer, then: str) -> None:
    """Save the model and the log of its training; say where it is and what comes next."""
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"\nmodel: {trainer.args.output_dir}\nnext:  {then}")


def run(main: Callable[[list[str]], None]) -> None:
    """Run a recipe: a mistake of the user's is one line and exit code 2; a mistake of ours keeps its traceback."""
    try:
        main(sys.argv[1:])
    # Flags for what is not there; files that are not to be read, and a full disk
    except (InputError, ImportError, NoMatchingPeftModuleError, RunStopped, OSError) as error:
        told = error
    except (ValueError, RuntimeError, KeyError, MemoryError) as error:
        if isinstance(error, MemoryError) or should_reduce_batch_size(error):
            told = (
                f"out of memory ({str(error)[:200]}): lower per_device_train_batch_size, the lengths or lora_r; "
                f"recipes/plan.py says what fits"
            )
        elif _raised_by_libraries(error):
            told = error
        else:
            raise
    else:
        return
    bar = "\n" if isinstance(told, RunStopped) else ""  # a progress bar stands on the line
    print(f"{bar}error:", " ".join(str(told).split()), file=sys.stderr)
    sys.exit(2)


_LIBRARIES = ("trl", "transformers", "peft", "accelerate", "huggingface_hub")


def _raised_by_libraries(error: BaseException) -> bool:
    """Whether one of Hugging Face's raised it itself, which is how they refuse settings."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_globals["__name__"].split(".")[0] in _LIBRARIES
