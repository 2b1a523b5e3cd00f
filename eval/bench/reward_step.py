"""
Seconds of a reward-model step, forward and backward, for the K ranked completions of a prompt: ours with the prompt
encoded once, ours with K separate sequences, and TRL's `RewardTrainer` on the K(K-1)/2 pairs.

    python eval/bench/reward_step.py                       # K = 9, prompt 256, completions 64, SmolLM2-135M's shape
    python eval/bench/reward_step.py --k 4 --model DIR --dtype bfloat16 --json out.json
    python eval/bench/reward_step.py --quick               # a small model, seconds

All weights are trained, with gradient checkpointing (the default of both), in alternation in one process. First all
three must have the same loss and gradient. TRL's step is micro-batches of four pairs. `limit` is the rate of matrix
products measured here, in the same type, and the share is that of the operations which a step cannot do without.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from bench import SMOLLM2, make_model, product_rate
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from instructgpt_trl import RewardConfig, RewardTrainer

SMALL = {**SMOLLM2, "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 3, "num_key_value_heads": 1}
PAIRS_AT_ONCE = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model; without, random weights")
    parser.add_argument("--k", type=int, default=9, help="completions a prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and passes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small model and short texts")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def ranking(vocab: int, k: int, prompt: int, completion: int) -> dict[str, Any]:
    """An encoded ranking of random ids without ties; 0 pads and 1 is EOS."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(2, vocab, (n,), generator=generator).tolist()

    completions = [[*ids(completion - 1), 1] for _ in range(k)]
    return {"prompt_ids": ids(prompt), "completions_ids": completions, "ranks": [*range(1, k + 1)], "shortened": 0}


def pairs_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """TRL's rows for the same ranking."""
    texts = [row["prompt_ids"] + ids for ids in row["completions_ids"]]
    return [{"chosen_ids": better, "rejected_ids": worse} for better, worse in itertools.combinations(texts, 2)]


def trainer_of(cls: type, config: type, base: Path, rows: list[dict[str, Any]], dtype: str, **settings: Any) -> Any:
    """A trainer whose network is in training mode, as at the first step."""
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(network.score.weight, std=0.02, generator=generator)
    args = config(
        output_dir=tempfile.mkdtemp(),
        bf16=dtype == "bfloat16",
        max_length=None,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = cls(network, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    return trainer


def step_of(trainer: Any, size: int) -> Callable[[], float]:
    """Loss of all rows, `size` at a time, and their gradient in place of the one before."""
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]

    def step() -> float:
        trainer.model.zero_grad()
        total = 0.0
        for some in batches:
            inputs = trainer._prepare_inputs(trainer.data_collator(some))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, inputs) * len(some) / len(rows)
            trainer.accelerator.backward(loss)
            total += loss.item()
        return total

    return step


def difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Norm of the difference of two gradients, over the norm of the second."""
    with torch.no_grad():
        pairs = [(p.grad.float(), q.grad.float()) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    apart = sum((p - q).pow(2).sum() for p, q in pairs)
    return (apart / sum(q.pow(2).sum() for _, q in pairs)).sqrt().item()


def operations(model: PreTrainedModel, segments: list[tuple[int, int]]) -> float:
    """
    Of a training step: the products with the layers' weights, and attention of what is seen only. A segment is so many
    tokens behind so many others. Backward is twice forward, and checkpointing is another forward.
    """
    config = model.config
    weights = sum(p.numel() for p in model.base_model.layers.parameters() if p.dim() == 2)
    seen = sum(tokens * before + tokens * (tokens + 1) / 2 for tokens, before in segments)
    tokens = sum(tokens for tokens, _ in segments)
    return 4 * (2 * weights * tokens + 4 * config.hidden_size * config.num_hidden_layers * seen)


def main() -> None:
    args = arguments()
    if args.quick:
        args.k, args.prompt, args.completion, args.repeats = 5, 64, 16, 3
    k, prompt, completion = args.k, args.prompt, args.completion
    with tempfile.TemporaryDirectory() as folder:
        base = Path(args.model) if args.model else make_model(Path(folder), SMALL if args.quick else SMOLLM2)
        row = ranking(len(AutoTokenizer.from_pretrained(base)), k, prompt, completion)
        sides = {
            "ours": trainer_of(RewardTrainer, RewardConfig, base, [row], args.dtype, prefix_sharing="on"),
            "separate": trainer_of(RewardTrainer, RewardConfig, base, [row], args.dtype, prefix_sharing="off"),
            "pairs": trainer_of(trl.RewardTrainer, trl.RewardConfig, base, pairs_of(row), args.dtype),
        }
    steps = {name: step_of(side, PAIRS_AT_ONCE if name == "pairs" else 1) for name, side in sides.items()}
    losses = {name: step() for name, step in steps.items()}
    apart = {name: difference(side.model, sides["pairs"].model) for name, side in sides.items()}
    print(f"loss: {losses['pairs']:.6f}; differences from that of the pairs, and of gradients in parts of their norm:")
    for name in ("ours", "separate"):
        print(f"  {name:>8}: {abs(losses[name] - losses['pairs']):.1e}, {apart[name]:.1e}")
        if args.dtype == "float32" and not (abs(losses[name] - losses["pairs"]) < 1e-4 and apart[name] < 1e-4):
            raise SystemExit("the sides do not compute the same")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name in tqdm([*sides] * args.repeats, desc="steps"):
        start = time.perf_counter()
        steps[name]()
        seconds[name].append(time.perf_counter() - start)
    segments = {
        "ours": [(prompt, 0), *[(completion, prompt)] * k],
        "separate": [(prompt + completion, 0)] * k,
        "pairs": [(prompt + completion, 0)] * (k * (k - 1)),
    }
    rate, median = product_rate(getattr(torch, args.dtype)), {n: statistics.median(s) for n, s in seconds.items()}
    print(f"\nlimit: {rate / 1e9:.0f} billion operations a second, {args.dtype}, {torch.get_num_threads()} threads")
    print(f"{'':>8}  {'tokens':>6}  {'seconds':>8}  {'from':>7} {'to':>7}  share of the limit")
    for name, found in seconds.items():
        tokens = sum(tokens for tokens, _ in segments[name])
        share = operations(sides[name].model, segments[name]) / median[name] / rate
        print(f"{name:>8}  {tokens:6}  {median[name]:8.2f}  {min(found):7.2f} {max(found):7.2f}  {share:.0%}")
    figures = {
        "ratio_vs_pairs": median["pairs"] / median["ours"],
        "ratio_vs_separate": median["separate"] / median["ours"],
        "token_ratio": k * (prompt + completion) / (prompt + k * completion),
    }
    print("  ".join(f"{name}: {figure:.2f}" for name, figure in figures.items()))
    if args.json:
        Path(args.json).write_text(json.dumps({**figures, "seconds": seconds}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
