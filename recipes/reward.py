r"""
Stage 2: train a reward model on K-way rankings, from the SFT model [InstructGPT 3.5, C.2].

    python recipes/reward.py --model_name_or_path SFT --dataset rankings.jsonl --demonstrations rows.jsonl \
        --output_dir RM

A row has `prompt`, `completions` and `ranks` (1 is best, equal ranks tie), or `chosen` and `rejected`. Demonstrations
score 0 on average afterwards. From an SFT adapter, a copy of it is trained on, and its base is found from its config.
Flags and `--config` are as in sft.py.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    DataArguments,
    final_evaluation,
    finish,
    load_tokenizer,
    next_command,
    parse,
    read,
    read_and_split,
    run,
    watched_memory,
)
from datasets import Dataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from instructgpt_trl import RewardConfig, RewardTrainer
from instructgpt_trl.data import encode_completion, encode_prompt
from instructgpt_trl.functional import ranking_accuracy


@dataclass(kw_only=True)
class Arguments(DataArguments):
    """Flags of this recipe besides those of its rows, `RewardConfig` and `trl.ModelConfig`."""

    demonstrations: str | None = field(
        default=None, metadata={"help": "Rows of `prompt` and `completion` that score 0 on average after training."}
    )


def sizes(config: RewardConfig, model: ModelConfig, rankings: Dataset) -> dict[str, int]:
    """
    The largest step that rankings can make, for the prediction of memory: from the longest of their texts, since the
    trainer will encode them all.
    """
    tokenizer = load_tokenizer(model, config.trust_remote_code)
    prompt = max(len(encode_prompt(tokenizer, text)) for text in longest(rankings["prompt"]))
    pairs = ((row["prompt"], text) for row in rankings for text in row["completions"])
    completion = max(len(encode_completion(tokenizer, *pair)) for pair in longest(pairs, lambda pair: str(pair[1])))
    most = max(map(len, rankings["ranks"]))
    limit = config.max_length or math.inf  # what is longer is left out; of what fits, long completions take most
    completion = min(completion, limit - 1)
    return {
        "rows": config.per_device_train_batch_size * most,
        "shared": 1 if config.prefix_sharing == "off" else most,
        "prompt": min(prompt, limit - completion),
        "completion": completion,
    }


def longest(texts: Iterable, as_text: Callable[[Any], str] = str) -> list:
    """The hundred with the most characters, among which the one with the most tokens is looked for."""
    return heapq.nlargest(100, texts, key=lambda text: len(as_text(text)))


def main(argv: list[str]) -> None:
    args, config, model = parse(argv, Arguments, RewardConfig, output_dir="runs/reward")
    rankings, held_out = read_and_split(args, config, "ranking")
    demonstrations = read(args, args.demonstrations, "demonstration")
    with watched_memory(config, model, stage="reward", **sizes(config, model, rankings)):
        trainer = RewardTrainer(
            model=model.model_name_or_path,
            args=config,
            train_dataset=rankings,
            eval_dataset=held_out,
            demonstration_dataset=demonstrations,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        trainer.train(config.resume_from_checkpoint)
    if held_out is not None:
        accuracy = final_evaluation(trainer).get("eval_accuracy", float("nan"))
        longer = longer_wins(trainer.eval_dataset)
        trainer.accelerator.print(f"\nheld-out accuracy: {accuracy:.4f}   'the longer one wins': {longer:.4f}")
    if args.demonstrations is not None:
        bias = trainer.reward_model.bias
        trainer.accelerator.print(f"demonstrations score 0 on average with the bias {bias:+.4f}")
    then = next_command(
        args,
        config.output_dir,
        "ppo_ptx.py",
        model_name_or_path=model.model_name_or_path,
        reward_model=config.output_dir,
        dataset="PROMPTS.jsonl",
        ptx_dataset="TEXT.txt",
    )
    finish(trainer, then)


def longer_wins(rankings: Dataset) -> float:
    """Accuracy of preferring the completion with more tokens, on the pairs that the reward model was evaluated on."""
    lengths = [float(len(ids)) for row in rankings for ids in row["completions_ids"]]
    ranks = [rank for row in rankings for rank in row["ranks"]]
    sizes = [len(row["ranks"]) for row in rankings]
    return ranking_accuracy(torch.tensor(lengths), torch.tensor(ranks), sizes).item()


if __name__ == "__main__":
    run(main)
