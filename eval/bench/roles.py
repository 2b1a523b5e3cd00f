"""
Bytes of PPO's four roles on one quantised base, each storage counted once, beside those of the base alone.

    python eval/bench/roles.py                       # SmolLM2-135M's shape, 4 bits
    python eval/bench/roles.py --model DIR --bits 8
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from bench import make_model, make_stages
from planner import SHAPES
from ppo_side import Clock, ours, quantized
from torch import nn
from transformers import AutoModelForCausalLM

MB = 2**20


def stored(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of these tensors and, of packed ones, of their scales."""
    found = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        parts = [tensor, getattr(tensor, "SCB", None)]
        if state is not None:
            parts += [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]
        for part in parts:
            if part is not None:
                storage = part.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def of(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--shape", choices=SHAPES, default="135M", help="of the random model without one")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = Path(args.model) if args.model else make_model(folder / "base", SHAPES[args.shape])
        sft, reward = make_stages(base, folder, full=False)
        setting = {"base": str(base), "sft": sft, "reward": reward, "bits": args.bits, "dtype": "float32"}
        setting |= {"batch": 2, "prompt": 16, "completion": 16, "updates": 1, "checkpointing": True, "ptx": False}
        trainer = ours(setting, name, Clock())
        trainer.train()
        roles = list(trainer.roles)
        own = stored({id(p): p for role in roles for p in role.parameters().values()}.values())
        states = stored(t for state in trainer.optimizer.optimizer.state.values() for t in state.values())
        heads = [t for role in roles if role.head is not None for t in of(role.head)]
        networks = {id(role.network): role.network for role in roles}.values()
        everything = stored([t for network in networks for t in of(network)] + heads)
        alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantized(setting))
        figures = {
            "base_mb": stored(of(alone)) / MB,
            "adapters_and_heads_mb": own / MB,
            "optimizer_mb": states / MB,
            "roles_mb": everything / MB,
            "ratio": (everything - own) / stored(of(alone)),
        }
    for what, figure in figures.items():
        print(f"{what:>22}: {figure:8.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
