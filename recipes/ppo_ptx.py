r"""
Stage 3: PPO against the reward model, with pretraining gradients [InstructGPT 3.5, C.4, Eq. 2].

    accelerate launch recipes/ppo_ptx.py --model_name_or_path SFT --reward_model RM --dataset prompts.jsonl \
        --ptx_dataset text.txt --output_dir PPO

A row has `prompt`. SFT and RM may each be a full model or an adapter; adapters of one base share it, loaded once.
Without `--ptx_dataset` this is PPO. Flags and `--config` are as in sft.py.
"""

from dataclasses import dataclass, field
from typing import Any

from common import DataArguments, base_of, final_evaluation, finish, parse, read, read_and_split, run, watched_memory
from trl import ModelConfig, get_peft_config, get_quantization_config

from instructgpt_trl import PPOConfig, PPOTrainer


@dataclass(kw_only=True)
class Arguments(DataArguments):
    """Flags of this recipe besides those of its rows, `PPOConfig` and `trl.ModelConfig`."""

    reward_model: str = field(metadata={"help": "Folder that reward.py wrote; the value model starts from it too."})
    ptx_dataset: str | None = field(
        default=None, metadata={"help": "Plain text for the pretraining gradient: .txt, or rows with `text`."}
    )


def main(argv: list[str]) -> None:
    args, config, model = parse(argv, Arguments, PPOConfig, output_dir="runs/ppo_ptx")
    prompts, held_out = read_and_split(args, config, "prompt")
    texts = read(args, args.ptx_dataset, "pretraining")
    with watched_memory(config, model, **sizes(args, config, model)):
        trainer = PPOTrainer(
            model=model.model_name_or_path,
            reward_model=args.reward_model,
            args=config,
            train_dataset=prompts,
            eval_dataset=held_out,
            ptx_dataset=texts,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        trainer.train(config.resume_from_checkpoint)
    if held_out is not None:
        final_evaluation(trainer)
    prompt = "[{'role': 'user', 'content': 'Your prompt'}]" if args.conversational else "'Your prompt'"
    generate = f"pipeline('text-generation', '{config.output_dir}')({prompt}, max_new_tokens=64)"
    finish(trainer, f'python -c "from transformers import pipeline; print({generate})"')


def sizes(args: Arguments, config: PPOConfig, model: ModelConfig) -> dict[str, Any]:
    """For the prediction of memory."""
    prompt, completion = config.max_prompt_length or 1024, config.max_completion_length
    return {
        "stage": "ppo_ptx",
        "rows": config.per_device_train_batch_size,
        "prompt": prompt,
        "completion": completion,
        "sampled": config.generation_micro_batch_size or config.generation_batch_size,
        "rollout": config.generation_batch_size,
        "ptx_length": (config.ptx_max_length or prompt + completion) if args.ptx_dataset and config.ptx_coef else 0,
        "reference": config.beta != 0,
        "ema": config.ema_decay > 0,
        "reward_base": base_of(args.reward_model) != base_of(model.model_name_or_path),
    }


if __name__ == "__main__":
    run(main)
