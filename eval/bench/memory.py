"""
Peak memory of one PPO update, ours against TRL 1.12's `PPOTrainer`, each in a process of its own.

    python eval/bench/memory.py                 # SmolLM2-135M, LoRA, bf16, batch 8, 64 + 64 tokens
    python eval/bench/memory.py --dtype float32 --full --model DIR --json out.json

Ours is a PPO-ptx update: four LoRA roles on one base and a pretraining pass beside. TRL's has no ptx; its LoRA is the
policy's, reward and value model are whole. Counted is what the process takes beyond its size after imports: anonymous
memory, looked at every 10 ms; on a GPU what torch reserved. Without `--model`: SmolLM2-135M's shape, random weights.
"""

import argparse
import json
import tempfile
from pathlib import Path

from bench import SMOLLM2, install_peer, make_model, make_stages, side

SCRIPT = str(Path(__file__).with_name("ppo_side.py"))
MB = 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--full", action="store_true", help="train all weights, not LoRA")
    parser.add_argument("--no_checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=SMOLLM2["vocab_size"], help="of the random model")
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"], help="of the random model")
    parser.add_argument("--ours_only", action="store_true", help="leave TRL out")
    parser.add_argument("--peer_dir", default="runs/bench/trl-1.12.0", help="where TRL 1.12 is or will be installed")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {**SMOLLM2, "vocab_size": args.vocab, "num_hidden_layers": args.layers}
        base = Path(args.model) if args.model else make_model(folder / "base", shape)
        sft, reward = make_stages(base, folder, args.full)
        setting = {
            **{name: getattr(args, name) for name in ("dtype", "full", "batch", "prompt", "completion", "updates")},
            **{"base": str(base), "sft": sft, "reward": reward, "bits": None},
            **{"checkpointing": not args.no_checkpointing, "ptx": True, "anonymous": True},
        }
        found = {}
        for who in ("ours",) if args.ours_only else ("ours", "trl"):
            file = folder / f"{who}.json"
            file.write_text(json.dumps({**setting, "side": who}), encoding="utf-8")
            found[who] = side(SCRIPT, file, path=install_peer(Path(args.peer_dir)) if who == "trl" else None)
            peak, seconds = found[who]["bytes"] / MB, found[who]["seconds"]
            print(f"{who:>5}: {peak:8.0f} MB   {min(seconds):6.1f} s an update, {found[who]['steps']} updates")
    figures = {f"{who}_mb": result["bytes"] / MB for who, result in found.items()}
    if "trl_mb" in figures:
        figures["ratio"] = figures["ours_mb"] / figures["trl_mb"]
        print(f"ratio: {figures['ratio']:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
