r"""
Make one 16-bit model of an adapter and its base, to run, share or convert it anywhere.

    python recipes/export.py --model_name_or_path runs/ppo_ptx --output_dir runs/ppo_ptx-merged

The adapter is merged into the 16-bit base, also if it was trained on a 4-bit one (a merge into 4-bit weights is not
exact). Before anything is written, the log-probs of a few texts under the merged model are compared with those under
the adapter on the same base: they may differ by rounding, and by less than what the adapter does. The folder holds
safetensors, tokenizer and chat template; llama.cpp's convert_hf_to_gguf.py reads it as it is. `--dtype` is bfloat16
(default), float16 or float32.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import ModelArguments, load_model, parse_model, run
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_trl.data import InputError, check_output_dir, load_rows

TEXTS = [
    "Plants make sugar from light, water and air, and give off the oxygen that animals breathe.",
    "To sort a list, split it in two, sort each half, and merge the halves by taking the smaller head each time.",
    "Dear Ms. Gray, thank you for your letter of 3 May. I am sorry that the parcel was late; a new one is on its way.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(area(2.0))",
]


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    """Flags of this recipe besides those of `trl.ModelConfig`."""

    output_dir: str = field(metadata={"help": "Where the merged model goes."})
    texts: str | None = field(default=None, metadata={"help": "Texts to compare log-probs on: .txt, or rows of text."})
    tolerance: float = field(
        default=0.1,
        metadata={"help": "Largest mean difference of log-probs, nats a token; in bfloat16 rounding alone is 0.05."},
    )


@torch.no_grad()
def logprobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """Log-probs of all tokens of `texts` but their first ones, in one row."""
    rows = [tokenizer(text, return_tensors="pt", truncation=True, max_length=256)["input_ids"] for text in texts]
    found = []
    for ids in rows:
        logits = model(input_ids=ids.to(model.device)).logits[:, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, ids[:, 1:, None].to(model.device))[0, :, 0])
    if not any(map(len, found)):
        raise InputError("--texts: none has two tokens, so that there is nothing to compare; give longer ones")
    return torch.cat(found)


def main(argv: list[str]) -> None:
    args, config = parse_model(argv, Arguments, dtype="bfloat16")
    source, target = Path(config.model_name_or_path), Path(args.output_dir)
    if (source / "reward_model.json").is_file():
        raise InputError(f"{source} is a reward model; load it with instructgpt_trl.RewardModel.from_pretrained")
    if not (source / "adapter_config.json").is_file():
        raise InputError(f"{source}: no adapter_config.json in it; only an adapter has something to merge")
    if config.load_in_4bit or config.load_in_8bit:
        raise InputError("an adapter is merged into a 16-bit base; leave load_in_4bit and load_in_8bit out")
    check_output_dir(args.output_dir)
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"output folder {target}: it is not empty; give another output_dir")
    texts = TEXTS if args.texts is None else load_rows(args.texts, "pretraining")["text"][:64]
    model, tokenizer = load_model(args, config)
    if not hasattr(model, "merge_and_unload"):
        raise InputError(f"{source}: {type(model.base_model).__name__} is no adapter that is merged into weights")
    apart = logprobs(model.eval(), tokenizer, texts)
    with model.disable_adapter():
        effect = (logprobs(model, tokenizer, texts) - apart).abs().mean()
    merged = model.merge_and_unload(progressbar=True, safe_merge=True).eval()
    difference = (logprobs(merged, tokenizer, texts) - apart).abs()
    report = (
        f"log-probs of {len(difference)} tokens, merged against adapter: mean difference {difference.mean():.4f} "
        f"nats, largest {difference.max():.4f}; the adapter itself changes them by {effect:.4f}"
    )
    if not difference.mean() <= args.tolerance:  # NaN does not agree either
        raise InputError(f"{report}: over tolerance={args.tolerance}, nothing is written; try --dtype float32")
    if effect > 0 and not difference.mean() <= effect / 2:  # as far away as without the adapter
        raise InputError(
            f"{report}: too close to the base to tell whether it was merged, nothing is written; use --dtype float16, "
            f"which rounds less, or float32"
        )
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"{report}\n\nmodel: {target}\nnext:  python recipes/chat.py --model_name_or_path {target}")


if __name__ == "__main__":
    run(main)
