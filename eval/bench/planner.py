"""
The planner against measurement: peak memory of a stage, predicted without weights and measured in processes.

    python eval/bench/planner.py            # eighteen settings of PPO-ptx, half an hour on two cores
    python eval/bench/planner.py --stage reward
    python eval/bench/planner.py --quick    # two small ones
    python eval/bench/planner.py --kinds LoRA --sizes 30M --dtype bfloat16 --rollout 128 --prompt 32 --completion 96

Three model sizes; LoRA, all weights, LoRA on a 4-bit base; gradient checkpointing on and off. The last one is about
sampling: 128 completions at a time, trained on in batches of 8. Measured is anonymous memory beyond the process's size
after imports, looked at every 10 ms, with an allocator that returns freed memory, as in a run that is short of it; on
a GPU what torch took from it.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import torch
from bench import SMOLLM2, lora, make_model, make_stages, side
from transformers import AutoConfig, PreTrainedConfig

from instructgpt_trl.memory import STAGES, Load, peak, predict

# Of glibc's allocator: what is predicted are tensors, not those it keeps after they were freed
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
SCRIPT = str(Path(__file__).with_name("ppo_side.py"))
MB = 2**20
SHAPES = {
    "1M": {**SMOLLM2, "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "30M": {**SMOLLM2, "hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 12, "num_attention_heads": 5}
    | {"num_key_value_heads": 1},
    "70M": {**SMOLLM2, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
    "135M": SMOLLM2,
}
K = 4  # completions of a prompt in the reward model's rows
KINDS = {"LoRA": (False, None), "all weights": (True, None), "LoRA, 4-bit": (False, 4), "LoRA, 8-bit": (False, 8)}
DEFAULT_KINDS = ["LoRA", "all weights", "LoRA, 4-bit"]


def load_of(setting: dict) -> Load:
    return Load(
        stage=setting["stage"],
        shared=setting["k"],
        rows=setting["batch"],
        prompt=setting["prompt"],
        completion=setting["completion"],
        sampled=setting["rollout"] if setting["ptx"] else 0,
        rollout=setting["rollout"] if setting["ptx"] else 0,
        ptx_length=setting["prompt"] + setting["completion"] if setting["ptx"] else 0,
        lora=None if setting["full"] else lora(),
        dtype=getattr(torch, setting["dtype"]),
        bits=setting["bits"],
        compute=getattr(torch, setting["dtype"]),
        checkpointing=setting["checkpointing"],
        cuda=torch.cuda.is_available(),
    )


def predicted_bytes(config: PreTrainedConfig, load: Load) -> int:
    """What [`PeakMemory`] will count: on a GPU without CUDA's own."""
    parts = predict(config, load)
    return peak(parts) - (parts["context"] if load.cuda else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=112, help="tokens")
    parser.add_argument("--completion", type=int, default=16, help="tokens; sampling in 4 bits is slow on a CPU")
    parser.add_argument("--rollout", type=int, help="completions sampled at a time; without, a batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and passes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=DEFAULT_KINDS, help="what is trained")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["30M", "70M", "135M"])
    parser.add_argument("--stage", choices=STAGES, default="ppo_ptx")
    parser.add_argument("--keep_freed", action="store_true", help="an allocator that keeps what was freed")
    parser.add_argument("--json", help="file for the table")
    args = parser.parse_args()
    sizes = ["1M"] if args.quick else args.sizes
    kinds = {name: KINDS[name] for name in (["LoRA"] if args.quick else args.kinds)}
    rows = []
    print(f"{'model':>6}  {'trained':<12} {'checkpointing':<13} {'predicted':>9} {'measured':>9}   MB")
    with tempfile.TemporaryDirectory() as name:
        for size, (kind, (full, bits)), checkpointing in itertools.product(sizes, kinds.items(), (True, False)):
            folder = Path(name) / f"{size}-{full}"
            if not folder.is_dir():
                # Loaded in another type than they are saved in, weights leave no pages of their file in memory
                saved = torch.bfloat16 if args.dtype == "float32" else torch.float32
                make_model(folder / "base", SHAPES[size], saved)
                make_stages(folder / "base", folder, full, saved)
            ppo = args.stage == "ppo_ptx"
            setting = {"stage": args.stage, "side": "ours" if ppo else args.stage, "ptx": ppo}
            setting |= {"k": K if args.stage == "reward" else 1}
            setting |= {"base": str(folder / "base"), "sft": str(folder / "sft")}
            setting |= {"reward": str(folder / "reward"), "full": full, "bits": bits, "checkpointing": checkpointing}
            setting |= {"batch": args.batch, "prompt": args.prompt, "completion": args.completion}
            setting |= {"rollout": args.rollout or args.batch}
            setting |= {"dtype": args.dtype, "updates": 2, "anonymous": True}
            file = folder / "setting.json"
            file.write_text(json.dumps(setting), encoding="utf-8")
            predicted = predicted_bytes(AutoConfig.from_pretrained(folder / "base"), load_of(setting)) / MB
            measured = side(SCRIPT, file, **({} if args.keep_freed else GIVES_BACK))["bytes"] / MB
            row = {"model": size, "trained": kind, "checkpointing": checkpointing}
            rows.append(row | {"predicted_mb": predicted, "measured_mb": measured, "off": predicted / measured - 1})
            shown = "on" if checkpointing else "off"
            print(
                f"{size:>6}  {kind:<12} {shown:<13} {predicted:9.0f} {measured:9.0f}   {rows[-1]['off']:+.1%}",
                flush=True,
            )
    print(f"largest difference: {max(abs(row['off']) for row in rows):.1%}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
