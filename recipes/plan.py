r"""
Whether a run fits, before it starts: memory of each stage by part, the largest batch and length, and hours.

    python recipes/plan.py --model Qwen/Qwen2.5-1.5B --recipe ppo_ptx --gpu 6 --load_in_4bit

MODEL is a hub id, a folder or a config.json; weights are not read. `--recipe` is the last of the stages to plan (sft,
reward, ppo_ptx). `--gpu` is a card's memory in GB, of which nine tenths are planned with; without it, this machine's.
The settings go to `--output_dir` as YAML files that the recipes take with `--config`. Hours come from a rate measured
here, on two short models of this shape; `--tokens_per_second` (forward and backward, from a run's log) replaces it for
another machine.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ModelArguments, loading, parse_arguments, run
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedConfig
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_quantization_config

from instructgpt_trl.data import InputError, check_output_dir
from instructgpt_trl.memory import PARTS, STAGES, Load, largest, peak, predict, predict_sampling, shortened
from instructgpt_trl.peak_memory import system_memory
from instructgpt_trl.ranges import ABOVE_0, COUNT, Range, check_ranges

GB = 1e9
USABLE = 0.9  # of a card's memory; the rest is for what its allocator rounds up and scatters, and for the display
BATCH = {"sft": 32, "reward": 64, "ppo_ptx": 64}  # rows of an optimizer step [P C.1, C.2, C.4]
ROLLOUT = 512  # [P C.4]
RANGES = {
    **dict.fromkeys(("gpu", "tokens_per_second"), ABOVE_0),
    **dict.fromkeys(("prompt", "completion", "lora_r"), COUNT),
    **dict.fromkeys(("demonstrations", "rankings", "episodes"), Range(0, whole=True)),
    "completions": Range(2, whole=True),
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    """Flags of the planner."""

    model: str = field(metadata={"help": "Hub id, folder, or config.json."})
    recipe: str = field(default="ppo_ptx", metadata={"help": "Last stage to plan: sft, reward or ppo_ptx."})
    gpu: float | None = field(default=None, metadata={"help": "Memory of the card, GB. Without: this machine's."})
    load_in_4bit: bool = field(default=False, metadata={"help": "A base of 4 bits a weight."})
    load_in_8bit: bool = field(default=False, metadata={"help": "A base of 8 bits a weight."})
    dtype: str | None = field(
        default=None, metadata={"help": "Of the weights. Without: bfloat16 on a GPU, where all are trained float32."}
    )
    full: bool = field(default=False, metadata={"help": "Train all weights, not LoRA adapters."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer, as in TrainingArguments."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations."})
    prompt: int = field(default=512, metadata={"help": "Longest prompt, tokens."})
    completion: int = field(default=256, metadata={"help": "Longest completion, tokens."})
    completions: int = field(default=9, metadata={"help": "Ranked completions a prompt, the most there are."})
    demonstrations: int = field(default=1000, metadata={"help": "Rows of stage 1, for the hours; two epochs."})
    rankings: int = field(default=1000, metadata={"help": "Rows of stage 2, for the hours; one epoch."})
    episodes: int = field(default=10_000, metadata={"help": "Episodes of stage 3, for the hours."})
    tokens_per_second: float | None = field(default=None, metadata={"help": "Rate of training, instead of measuring."})
    conversational: bool = field(default=False, metadata={"help": "Write it to the settings, as for a chat model."})
    output_dir: str = field(default="runs/plan", metadata={"help": "Where the YAML files go."})


def check(args: Arguments) -> None:
    check_ranges(args, RANGES)
    choices = {"recipe": STAGES, "dtype": (None, *DTYPES), "optim": [name.value for name in OptimizerNames]}
    for name, words in choices.items():
        if getattr(args, name) not in words:
            raise InputError(f"--{name} {getattr(args, name)}: expected one of {', '.join(filter(None, words))}")
    if args.load_in_4bit + args.load_in_8bit + args.full > 1:
        raise InputError(
            "--load_in_4bit, --load_in_8bit, --full: expected one of them; quantised weights are not trained"
        )
    check_output_dir(args.output_dir)


def read_config(args: Arguments) -> PreTrainedConfig:
    path = Path(args.model)
    if path.suffix == ".json" and not (path.name == "config.json" and path.is_file()):
        raise InputError(f"--model {args.model}: no such config.json; give an id, a folder or a config.json")
    try:
        return AutoConfig.from_pretrained(
            path.parent if path.suffix == ".json" else args.model, trust_remote_code=args.trust_remote_code
        )
    except Exception as error:  # a wrong value ends in any of them
        raise InputError(
            f"--model {args.model}: {' '.join(str(error).split())[:300]}; give an id, a folder or a config.json"
        ) from None


def load_of(args: Arguments, stage: str) -> Load:
    """What a stage asks for with one row a pass; a reward model's pass has all completions of a prompt."""
    dropout = ModelConfig().lora_dropout  # the recipes' default
    lora = LoraConfig(r=args.lora_r, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    ppo = stage == "ppo_ptx"
    return Load(
        stage=stage,
        rows=args.completions if stage == "reward" else 1,
        prompt=args.prompt,
        completion=args.completion,
        shared=args.completions if stage == "reward" else 1,
        rollout=ROLLOUT if ppo else 0,
        ptx_length=args.prompt + args.completion if ppo else 0,
        lora=None if args.full else lora,
        dtype=getattr(torch, args.dtype),
        bits=4 if args.load_in_4bit else 8 if args.load_in_8bit else None,
        compute=torch.bfloat16 if for_gpu(args) else torch.float32,  # as the configs pick it
        checkpointing=args.gradient_checkpointing,
        state_bytes=2 if "8bit" in args.optim else 8,
        cuda=for_gpu(args),
    )


def for_gpu(args: Arguments) -> bool:
    return args.gpu is not None or torch.cuda.is_available()


@dataclass
class Stage:
    """A planned stage: what fits, and what it then takes."""

    name: str
    load: Load  # as it will run, or with one row where nothing fits
    fits: int  # most rows a pass that fit: sequences, or a reward model's prompts
    rows: int  # rows a pass that it will run with: as many of these as divide a batch
    length: int  # longest prompt and completion, tokens, with one row
    parts: dict[str, int]


def plan(config: PreTrainedConfig, args: Arguments, name: str, limit: int) -> Stage:
    one = load_of(args, name)

    def at_once(n: int) -> Load:
        return replace(one, rows=n * one.rows)

    def length(n: int) -> Load:
        prompt = n * 64 * args.prompt // (args.prompt + args.completion)
        return replace(one, prompt=prompt, completion=64 * n - prompt, ptx_length=64 * n if one.ptx_length else 0)

    fits = largest(lambda n: peak(predict(config, at_once(n))), limit, most=BATCH[name])
    rows = max(n for n in range(1, max(fits, 1) + 1) if BATCH[name] % n == 0)
    load = at_once(rows)
    parts = predict(config, load)
    if name == "ppo_ptx":  # what a training pass leaves room for, and one completion takes less than that

        def with_sampled(n: int) -> dict[str, int]:
            return {**parts, "sampling": predict_sampling(config, replace(load, sampled=n))}

        most = largest(lambda n: peak(with_sampled(n)), limit, most=ROLLOUT)
        load = replace(load, sampled=max(most, 1))
        parts = with_sampled(load.sampled)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    longest = 64 * largest(lambda n: peak(predict(config, length(n))), limit, most=max(context // 64, 1))
    return Stage(name, load, fits, rows, longest, parts)


def table(stages: list[Stage], limit: int) -> str:
    """Peak memory by part, in GB, a column a stage, of which `limit` bytes there are to use."""
    lines = [["GB"] + [stage.name for stage in stages]]
    for part in PARTS:
        lines.append([part] + [f"{stage.parts[part] / GB:.2f}" for stage in stages])
    lines.append(["peak"] + [f"{peak(stage.parts) / GB:.2f}" for stage in stages])
    lines.append([f"of {limit / GB:.1f}"] + ["fits" if stage.fits else _too_large(stage) for stage in stages])
    lines.append(["rows a pass"] + [str(stage.rows if stage.fits else 0) for stage in stages])
    lines.append(["most rows"] + [str(stage.fits) for stage in stages])
    lines.append(["sampled at a time"] + [str(stage.load.sampled or "-") for stage in stages])
    lines.append(["longest, tokens"] + [str(stage.length) for stage in stages])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(cells) for cells in rows)


def _too_large(stage: Stage) -> str:
    part = max(stage.parts, key=stage.parts.get)
    return f"{part} too large"


# Settings for the recipes


def settings(args: Arguments, stage: Stage) -> dict[str, Any]:
    """What `recipes/<stage>.py --config` takes: the paper's batches, in passes that fit."""
    length, ppo = args.prompt + args.completion, stage.name == "ppo_ptx"
    batch = BATCH[stage.name]
    lora = {
        "use_peft": True,
        "lora_r": args.lora_r,
        "lora_alpha": 2 * args.lora_r,
        "lora_target_modules": "all-linear",
    }
    first = stage.name == "sft"
    values = {
        "conversational": args.conversational or None,
        "dtype": args.dtype,
        "load_in_4bit": args.load_in_4bit or None,
        "load_in_8bit": args.load_in_8bit or None,
        **(lora if first and not args.full else {}),  # later stages continue or copy the adapter of the first
        "learning_rate": None if args.full else 1e-4,
        "num_train_epochs": 2 if first else None,
        "residual_dropout": 0 if first else None,
        "per_device_train_batch_size": stage.rows,
        "gradient_accumulation_steps": batch // stage.rows,
        "per_device_eval_batch_size": stage.rows,
        "max_length": None if ppo else length,
        "gradient_checkpointing": args.gradient_checkpointing,
        "optim": args.optim,
    }
    if ppo:
        values |= {
            "value_learning_rate": None if args.full else 1e-4,
            "steps_per_generation": ROLLOUT // stage.rows,
            "generation_micro_batch_size": stage.load.sampled,
            "max_prompt_length": args.prompt,
            "max_completion_length": args.completion,
            "ptx_ratio": 1,
            "ptx_max_length": length,
        }
    return {name: value for name, value in values.items() if value is not None}


def write_settings(args: Arguments, stage: Stage, limit: int) -> Path:
    file = Path(args.output_dir) / f"{stage.name}.yaml"
    found = f"{peak(stage.parts) / GB:.2f} of {limit / GB:.1f} GB"
    fits = "fits" if stage.fits else _too_large(stage)
    head = f"# {args.model}, {stage.name}: predicted peak {found} ({fits}). Not run on such a machine.\n"
    file.write_text(head + yaml.safe_dump(settings(args, stage), sort_keys=False), encoding="utf-8")
    return file


# Hours


def seconds_a_token(config: PreTrainedConfig, args: Arguments, rows: int) -> tuple[float, float]:
    """
    Of a training pass as it will run (gradient checkpointing, quantised layers), and of decoding `rows` completions at
    a time: measured on models of one and of three layers of this shape, and carried on to all layers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, decoding = [], []
    ids = torch.zeros((1, 256), dtype=torch.long, device=device)
    for layers in (1, 3):
        model = short_model(config, args, layers).to(device)
        training.append(fastest(train_step, model, ids) / 256)
        cache = prefilled(model.eval(), ids.expand(rows, -1))
        decoding.append(fastest(decode, model, ids[:, :1].expand(rows, -1), cache) / rows)
    more = (config.get_text_config().num_hidden_layers - 1) / 2
    return tuple(max(few + more * (many - few), 1e-9) for few, many in (training, decoding))


def short_model(config: PreTrainedConfig, args: Arguments, layers: int) -> torch.nn.Module:
    """So many layers of this shape with random weights."""
    model = AutoModelForCausalLM.from_config(shortened(config, layers), dtype=getattr(torch, args.dtype))
    if quantization := quantization_of(args):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, quantization_config=quantization)
    network = model if args.full else get_peft_model(model, load_of(args, "sft").lora)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if not args.full:
            network.enable_input_require_grads()
    return network.train()


def quantization_of(args: Arguments) -> BitsAndBytesConfig | None:
    """As the recipes have it; none where bitsandbytes is not installed, since a plan needs no weights."""
    given = {"load_in_4bit": args.load_in_4bit, "load_in_8bit": args.load_in_8bit}
    if not is_bitsandbytes_available():
        return None
    return get_quantization_config(ModelConfig(**given, dtype=args.dtype, use_bnb_nested_quant=True))


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def prefilled(model: torch.nn.Module, prompts: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    backbone = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    backbone(input_ids=prompts, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def decode(model: torch.nn.Module, tokens: torch.Tensor, cache: DynamicCache) -> None:
    model(input_ids=tokens, past_key_values=cache, use_cache=True)


def fastest(work: Callable[..., None], *args: Any) -> float:
    """Seconds of the fastest of five times."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def hours(args: Arguments, stage: str, training: float, decoding: float) -> float:
    """
    A backward pass counts as two forward ones, and gradient checkpointing adds another. A reward model reads a prompt
    once for its completions. An episode of PPO takes four forward passes, three training passes and sampling.
    """
    length = args.prompt + args.completion
    forward = training / (4 if args.gradient_checkpointing else 3)
    seconds = {
        "sft": 2 * args.demonstrations * length * training,
        "reward": args.rankings * (args.prompt + args.completions * args.completion) * training,
        "ppo_ptx": args.episodes * (length * (3 * training + 4 * forward) + args.completion * decoding),
    }
    return seconds[stage] / 3600


def device_here(planned_for_gpu: bool) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return "this CPU, not the card" if planned_for_gpu else "this CPU"


def memory_here() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return system_memory()[1]


def main(argv: list[str]) -> None:
    (args,) = parse_arguments(argv, (Arguments,))
    check(args)
    gpu = for_gpu(args)
    args.dtype = args.dtype or ("bfloat16" if gpu and not args.full else "float32")
    limit = int(USABLE * (args.gpu * GB if args.gpu else memory_here()))
    config = read_config(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    stages = []
    for name in STAGES[: STAGES.index(args.recipe) + 1]:
        print(f"planning {name} ...", flush=True)
        with loading(f"the shape in {args.model}"):
            stages.append(plan(config, args, name, limit))
    print(f"\n{args.model}, {args.dtype}, prompts of {args.prompt} and completions of {args.completion} tokens\n")
    print(table(stages, limit))
    if args.tokens_per_second:
        training = decoding = 1 / args.tokens_per_second
        print(f"\nhours, at {args.tokens_per_second:.0f} tokens a second:", end=" ")
    else:
        at_once = stages[-1].load.sampled or 1
        training, decoding = seconds_a_token(config, args, at_once)
        rates = f"{1 / training:.0f} tokens/s trained, {1 / decoding:.0f} sampled {at_once} at a time, measured"
        if args.load_in_4bit + args.load_in_8bit and not is_bitsandbytes_available():
            rates += " without quantisation: bitsandbytes is not installed"
        print(f"\nhours on {device_here(gpu)} ({rates}):", end=" ")
    print(", ".join(f"{stage.name} {hours(args, stage.name, training, decoding):.1f}" for stage in stages))
    print(f"for {args.demonstrations} demonstrations, {args.rankings} rankings, {args.episodes} episodes\n")
    for stage in stages:
        print(f"settings: {write_settings(args, stage, limit)}")


if __name__ == "__main__":
    run(main)
