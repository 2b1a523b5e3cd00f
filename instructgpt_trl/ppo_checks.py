"""What PPO refuses before any work is done, each on one line."""

import inspect

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .data import InputError
from .models.rewards import is_model
from .ppo_config import PPOConfig

FIRST_KL = 1e-2  # nats a completion; 0 but for the rounding of kernels that add in another order each time
FIRST_CHANGE = 0.1  # nats a token: bfloat16 rounds a log-prob of 8 by 0.03


def check_arguments(model, args, rewards, train_dataset, processing_class, optimizers) -> None:
    if not isinstance(model, str | torch.nn.Module):
        raise InputError(f"model: expected a folder, a hub id or a model, got {type(model).__name__}")
    if args is not None and not isinstance(args, PPOConfig):
        raise InputError(f"args: expected a PPOConfig, got {type(args).__name__}")
    if not rewards:
        raise InputError("nothing to learn from: give reward_model (what RewardTrainer saved) or reward_funcs")
    for reward in rewards:
        if not callable(reward) and not is_model(reward):
            raise InputError(
                f"reward_funcs: expected functions, reward models or their folders, got {type(reward).__name__}"
            )
    if train_dataset is None:
        raise InputError("train_dataset is missing; expected rows with the column 'prompt'")
    if isinstance(processing_class, ProcessorMixin):
        raise InputError("processing_class: PPOTrainer trains on text; pass a tokenizer, not a processor of images")
    if optimizers[0] is not None:
        raise InputError("optimizers: the trainer builds its optimizer over two models; set optim and learning rates")


def check_process(args: PPOConfig, rewards: int) -> None:
    if args.n_gpu > 1:
        raise InputError(
            f"a process of PPOTrainer runs on one GPU, got {args.n_gpu}; start a process for each with accelerate "
            f"launch --num_processes {args.n_gpu}, or show it one with CUDA_VISIBLE_DEVICES=0"
        )
    if args.distributed_state is not None and args.distributed_state.distributed_type in ("DEEPSPEED", "FSDP"):
        raise InputError(
            f"PPOTrainer adds up gradients itself and does not run under "
            f"{args.distributed_state.distributed_type.value}; "
            f"launch with accelerate launch --multi_gpu, or plain python"
        )
    weights = args.reward_weights
    if weights is not None and len(weights) != rewards:
        raise InputError(
            f"reward_weights: expected {rewards} numbers, those of reward_model first and then those of reward_funcs, "
            f"got {len(weights)}"
        )


def check_evaluation(args: PPOConfig, eval_dataset: object) -> None:
    """Of several completions a prompt, those that even out a last batch of several processes cannot be told."""
    count = args.num_generations_eval or args.num_generations
    if eval_dataset is not None and args.world_size > 1 and count > 1:
        raise InputError(
            f"num_generations_eval: {count} completions a prompt are counted right in one process only; set it to 1"
        )


def check_generation(args: PPOConfig, model: PreTrainedModel | PeftModel) -> None:
    if args.use_vllm and getattr(model, "is_quantized", False):
        raise InputError(
            "use_vllm: it takes the policy's adapter merged into the base, which in 4 or 8 bits would be another "
            "policy; leave use_vllm out, or load the base without quantization"
        )
    if args.use_vllm and args.generation_micro_batch_size:
        raise InputError("generation_micro_batch_size: vLLM makes its batches itself; leave it out")
    if args.use_transformers_continuous_batching and (args.bf16 or args.fp16):
        raise InputError(
            "use_transformers_continuous_batching: TRL casts the whole policy for it, and adapters stay float32 here; "
            "leave it out, or set bf16 and fp16 to false"
        )


def check_template(args: PPOConfig, tokenizer: PreTrainedTokenizerBase, prompts: Dataset | IterableDataset) -> None:
    """A variable that a chat template does not know is passed over by jinja. Plain text has no template."""
    given = args.chat_template_kwargs or {}
    if not given or isinstance(next(iter(prompts))["prompt"], str):
        return
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    template = given.get("chat_template", tokenizer.chat_template)
    for name in given:
        if isinstance(template, str) and name not in own and name not in template:
            raise InputError(f"chat_template_kwargs['{name}']: the chat template never reads it; correct or remove it")


def check_first_kl(kl: torch.Tensor) -> None:
    """Pitfall 2: before the first step the policy is its reference. (B,) KL of completions, nats; NaN is left out."""
    worst = kl.abs().nan_to_num(0.0).max().item()
    if worst > FIRST_KL:
        raise InputError(
            f"before the first step a completion's KL to the reference is {worst:.4f} nats and not 0, so that the "
            f"policy is not the model it starts from: pass the SFT model as `model`, with its adapter as it was saved"
        )


def check_first_ratio(change: torch.Tensor) -> None:
    """Pitfall 3: log-probs of the first pass of training are those of the rollout. Differences a token, nats."""
    worst = change.abs().max().item() if change.numel() else 0.0
    if worst > FIRST_CHANGE:
        raise InputError(
            f"before the first step the log-prob of a token changed by {worst:.4f} nats between rollout and training, "
            f"so that the ratio is not 1: set disable_dropout to true, and use a model without noise of its own"
        )


def check_batches(args: PPOConfig, dataset) -> None:
    if isinstance(dataset, Dataset) and len(dataset) < args.generation_batch_size // args.num_generations:
        raise InputError(too_small(args, f"{len(dataset)} prompts"))


def too_small(args: PPOConfig, what: str) -> str:
    return (
        f"train_dataset has {what}, less than one batch of {args.generation_batch_size // args.num_generations}; add "
        f"prompts or lower steps_per_generation or per_device_train_batch_size"
    )
