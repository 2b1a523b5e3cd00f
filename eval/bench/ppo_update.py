"""
Episodes a second of PPO updates, ours against TRL 1.12's `PPOTrainer`, in processes that take turns.

    python eval/bench/ppo_update.py                  # SmolLM2-135M's shape, batch 16, prompt 128, 64 new tokens
    python eval/bench/ppo_update.py --dtype bfloat16 --model DIR --json out.json
    python eval/bench/ppo_update.py --quick          # a small model

The policy is a LoRA adapter on both sides, EOS does not end a completion, an update is one minibatch and one epoch.
Ours runs without a pretraining gradient and with one (ratio 1, blocks as long as an episode), TRL has none. First both
must generate as many tokens and take as many steps. Of each process the first update is left out. `limit` is the rate
of matrix products measured here, in the same type, and the share that of the operations neither can do without.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from bench import SMOLLM2, install_peer, make_model, make_stages, product_rate, side
from planner import SHAPES
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig

SCRIPT = str(Path(__file__).with_name("ppo_side.py"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model; without, random weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and passes")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, on both sides")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--updates", type=int, default=3, help="in a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--ours_only", action="store_true", help="leave TRL out")
    parser.add_argument("--quick", action="store_true", help="a small model and short texts")
    parser.add_argument("--peer_dir", default="runs/bench/trl-1.12.0", help="where TRL 1.12 is or will be installed")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def operations(config: PreTrainedConfig, prompt: int, completion: int, ptx: bool) -> float:
    """
    Of an episode: products with the layers' weights and with the LM head, and attention. A policy that samples, four
    models forward, two of them backward through weights that get no gradient; with `ptx` a text as long, both ways.
    """
    weights = config.num_hidden_layers * (
        config.hidden_size * 3 * config.intermediate_size
        + 2 * config.hidden_size**2 * (1 + config.num_key_value_heads / config.num_attention_heads)
    )
    tokens = prompt + completion
    a_pass = 2 * weights * tokens + 4 * config.hidden_size * config.num_hidden_layers * tokens * (tokens + 1) / 2
    head = 2 * config.hidden_size * config.vocab_size
    return (7 + 2 * ptx) * a_pass + head * (4 * completion + 2 * ptx * tokens)


def parts_of(runs: list[dict]) -> dict[str, float]:
    """Of updates behind the first of each run, and the rest."""
    total = sum(s for run in runs for s in run["seconds"][1:])
    parts: dict[str, float] = {}
    for run in runs:
        for name, seconds in run["parts"].items():
            parts[name] = parts.get(name, 0.0) + sum(seconds[len(seconds) // len(run["seconds"]) :]) / total
    return parts | {"rest": 1 - sum(parts.values())}


def main() -> None:
    args = arguments()
    if args.quick:
        args.batch, args.prompt, args.completion, args.rounds = 4, 16, 8, 1
    sides = {"ours": False, "ours_ptx": True, "trl": False}
    if args.ours_only:
        del sides["trl"]
    found: dict[str, list[dict]] = {name: [] for name in sides}
    peer = None if args.ours_only else install_peer(Path(args.peer_dir))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = Path(args.model) if args.model else make_model(folder / "base", SHAPES["1M"] if args.quick else SMOLLM2)
        sft, reward = make_stages(base, folder, full=False)
        config = AutoConfig.from_pretrained(base)
        setting = {name: getattr(args, name) for name in ("dtype", "batch", "prompt", "completion", "updates")}
        setting |= {"base": str(base), "sft": sft, "reward": reward, "full": False, "bits": None, "anonymous": True}
        for who in tqdm([*sides] * args.rounds, desc="processes"):
            own = {"side": who.split("_")[0], "ptx": sides[who], "checkpointing": args.checkpointing}
            file = folder / "setting.json"
            file.write_text(json.dumps({**setting, **own}), encoding="utf-8")
            found[who].append(side(SCRIPT, file, path=peer if who == "trl" else None))
    work = {name: {(run["generated"], run["steps"]) for run in runs} for name, runs in found.items()}
    if len(set.union(*work.values())) != 1:
        raise SystemExit(f"the sides did not do the same: (generated tokens, steps) {work}")
    seconds = {name: [s for run in runs for s in run["seconds"][1:]] for name, runs in found.items()}
    rate = {name: args.batch / statistics.median(s) for name, s in seconds.items()}
    limit = product_rate(getattr(torch, args.dtype))
    print(f"limit: {limit / 1e9:.0f} billion operations a second, {args.dtype}, {torch.get_num_threads()} threads")
    print(
        f"{'':>8}  {'seconds':>8}  {'from':>7} {'to':>7}  {'episodes/s':>10}  {'generated/s':>11}  share of the limit"
    )
    for name, s in seconds.items():
        share = operations(config, args.prompt, args.completion, sides[name]) * rate[name] / limit
        shown = f"{statistics.median(s):8.2f}  {min(s):7.2f} {max(s):7.2f}  {rate[name]:10.2f}"
        print(f"{name:>8}  {shown}  {rate[name] * args.completion:11.0f}  {share:.0%}")
    print("\nwhere the time of ours_ptx goes, in parts of an update")
    for name, part in parts_of(found["ours_ptx"]).items():
        print(f"  {name:<22} {part:4.0%}")
    figures = {f"{name}_episodes_per_s": of for name, of in rate.items()}
    if not args.ours_only:
        figures["ratio_vs_trl"] = rate["ours"] / rate["trl"]
        figures["ratio_ptx_vs_trl"] = rate["ours_ptx"] / rate["trl"]
    print("  ".join(f"{name}: {figure:.2f}" for name, figure in figures.items()))
    if args.json:
        parts = {name: parts_of(runs) for name, runs in found.items() if name != "trl"}
        Path(args.json).write_text(
            json.dumps({**figures, "seconds": seconds, "parts": parts}) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
