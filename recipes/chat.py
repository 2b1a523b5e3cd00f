r"""
Talk in the terminal to a model that sft.py or ppo_ptx.py wrote, or to any causal language model.

    python recipes/chat.py --model_name_or_path runs/ppo_ptx --reward_model runs/reward

With a chat template the whole conversation is the prompt, without one the last line alone. `/new` starts afresh,
`/quit` or Ctrl-D ends, Ctrl-C ends an answer. With `--reward_model` each answer is followed by its score. Flags of
`trl.ModelConfig` (`--load_in_4bit`, `--dtype`) count as in sft.py.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from common import ModelArguments, ends_of, load_model, parse_model, run
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from instructgpt_trl import RewardModel
from instructgpt_trl.data import InputError, encode_prompt
from instructgpt_trl.ranges import COUNT, FROM_0, SEED, Range, check_ranges

COLDEST = 1e-4  # of the temperatures that are not greedy; below, logits become infinite
RANGES = {"temperature": FROM_0, "max_new_tokens": COUNT, "top_p": Range(0, 1, open=(0,)), "seed": SEED}


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    """Flags of this recipe besides those of `trl.ModelConfig`."""

    reward_model: str | None = field(default=None, metadata={"help": "Folder of a reward model that scores answers."})
    system: str | None = field(default=None, metadata={"help": "System message that starts a conversation."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Share of the probability to sample from."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


Message = dict[str, str]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], args: Arguments
) -> str:
    """Sample an answer, printed as it comes; Ctrl-C keeps what there is of it."""
    encoded = encode_prompt(tokenizer, prompt)
    if not encoded:
        raise InputError("the prompt has no tokens: the chat template renders nothing of it; correct the template")
    ids = torch.tensor([encoded], device=model.device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    streamer = _Kept(tokenizer)
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            eos_token_id=ends_of(model, tokenizer, prompt),
            **(sampling if args.temperature >= COLDEST else {"do_sample": False, "temperature": None, "top_p": None}),
        )
    except KeyboardInterrupt:
        streamer.end()
    return streamer.text


class _Kept(TextStreamer):
    """Prints text as it comes and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def chat(model: Any, tokenizer: Any, reward_model: RewardModel | None, args: Arguments) -> None:
    """Ask, answer, score, until the input ends."""
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        line = line.encode("utf-8", "replace").decode()  # bytes that are no UTF-8
        if line == "/quit":
            return
        if line == "/new":
            messages = list(start)
            continue
        if not line:
            continue
        messages = [*messages, {"role": "user", "content": line}]
        prompt = messages if tokenizer.chat_template else line
        text = answer(model, tokenizer, prompt, args)
        messages = [*messages, {"role": "assistant", "content": text}]
        if reward_model is not None:
            completion = messages[-1:] if tokenizer.chat_template else text
            print(f"[score {reward_model.score([prompt], [completion])[0]:+.2f}]")


def main(argv: list[str]) -> None:
    args, config = parse_model(argv, Arguments)
    check_ranges(args, RANGES)
    model, tokenizer = load_model(args, config)
    if args.system and not tokenizer.chat_template:
        raise InputError(f"--system: {config.model_name_or_path} has no chat template to put it into; leave it out")
    reward_model = RewardModel.from_pretrained(args.reward_model) if args.reward_model else None
    set_seed(args.seed)
    chat(model.eval(), tokenizer, reward_model, args)


if __name__ == "__main__":
    run(main)
