"""
Stage 1: fine-tune a language model on demonstrations [InstructGPT 3.5, C.1], or make the start of RLHF [C.3].

    python recipes/sft.py --model_name_or_path DIR --dataset rows.jsonl --output_dir SFT

DIR is a model, a folder or a hub id, or an adapter folder. A row has `prompt` and `completion`. Every argument below,
of `SFTConfig` and of `trl.ModelConfig` is a flag, and a key of the YAML file that `--config` names, over which flags
go; `--help` lists them. `--use_peft` trains a LoRA adapter.
"""

from dataclasses import dataclass, field

from common import (
    DataArguments,
    final_evaluation,
    finish,
    next_command,
    parse,
    read,
    read_and_split,
    run,
    watched_memory,
)
from trl import get_peft_config, get_quantization_config

from instructgpt_trl import SFTConfig, SFTTrainer


@dataclass(kw_only=True)
class Arguments(DataArguments):
    """Flags of this recipe besides those of its rows, `SFTConfig` and `trl.ModelConfig`."""

    pretraining_dataset: str | None = field(
        default=None,
        metadata={"help": "Plain text to mix in, `pretraining_fraction` of the examples: .txt, or `text`."},
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Reward model that scores each evaluation: `eval_rm_score`, to choose by."}
    )


def main(argv: list[str]) -> None:
    args, config, model = parse(argv, Arguments, SFTConfig, output_dir="runs/sft")
    demonstrations, held_out = read_and_split(args, config, "demonstration")
    texts = read(args, args.pretraining_dataset, "pretraining")
    with watched_memory(config, model, stage="sft", rows=config.per_device_train_batch_size):
        trainer = SFTTrainer(
            model=model.model_name_or_path,
            args=config,
            train_dataset=demonstrations,
            eval_dataset=held_out,
            pretraining_dataset=texts,
            reward_model=args.reward_model,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        trainer.train(config.resume_from_checkpoint)
    if held_out is not None:
        final_evaluation(trainer)
    then = next_command(
        args,
        config.output_dir,
        "reward.py",
        model_name_or_path=config.output_dir,
        dataset="RANKINGS.jsonl",
        demonstrations=args.dataset,
    )
    finish(trainer, then)


if __name__ == "__main__":
    run(main)
