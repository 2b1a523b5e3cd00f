"""
The recipes on a GPU, with the settings of the folders of `recipes/configs` that are named by a card: peak memory,
predicted and measured.

    python eval/bench/cards.py                                   # all of them
    python eval/bench/cards.py qwen2.5_0.5b_4gb --json out.json

Models have these shapes and random weights, prompts 512 and completions 256 tokens, ptx blocks 768; nothing is
downloaded. Each recipe runs in a process of its own, in which torch gets what the card has less what the planner
leaves to CUDA, so that what does not fit fails here too. All three figures are without CUDA's own memory: `reserved`
is what torch took from the card (`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`), `used` what tensors took of it.
"""

import argparse
import json
import re
import runpy
import sys
import tempfile
import time
from contextlib import redirect_stderr
from io import StringIO
from math import ceil
from pathlib import Path
from typing import Any

import torch
from bench import side, texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from yaml import safe_load

from instructgpt_trl.memory import CUDA_CONTEXT

RECIPES = Path(__file__).parents[2] / "recipes"
PROMPT, COMPLETION, K = 512, 256, 9
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads")
# GB of the card, and the shape as in the model's config.json on the hub; all as Llama, of which Qwen2 differs by the
# biases of attention alone
CARDS: dict[str, tuple[float, tuple[int, ...], dict[str, Any]]] = {
    "qwen2.5_0.5b_4gb": (4, (151936, 896, 4864, 24, 14, 2), {"attention_bias": True}),
    "qwen2.5_1.5b_6gb": (6, (151936, 1536, 8960, 28, 12, 2), {"attention_bias": True}),
    "llama3.2_3b_8gb": (8, (128256, 3072, 8192, 28, 24, 8), {}),
    "qwen2.5_7b_12gb": (12, (152064, 3584, 18944, 28, 28, 4), {"attention_bias": True, "tie_word_embeddings": False}),
    "tiny": (1, (4096, 64, 128, 2, 2, 1), {}),  # for a test of this script
}
COLUMNS = ("predicted", "reserved", "used")
CONTEXT = CUDA_CONTEXT / 1e9  # GB that the planner leaves to CUDA
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
STAGES = {
    "sft": ["--dataset", "demonstrations.jsonl"],
    "reward": ["--dataset", "rankings.jsonl", "--demonstrations", "demonstrations.jsonl"],
    "ppo_ptx": ["--dataset", "prompts.jsonl", "--ptx_dataset", "text.txt", "--reward_model", "reward"],
}


def make_base(folder: Path, config: Any) -> None:
    """The model in bfloat16, made on the GPU if there is one, and a tokenizer of as many words, with a template."""
    words = ["<pad>", "<eos>", "<user>", "<assistant>"]
    vocab = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(len(words), config.vocab_size))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config.pad_token_id, config.eos_token_id, config.bos_token_id, config.max_position_embeddings = 0, 1, None, 4096
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def make_rows(folder: Path, tokenizer: Any, rows: int) -> None:
    """Rows for the three recipes, of the lengths above with the template's own tokens."""
    prompts, completions = texts(tokenizer, rows, PROMPT - 3), texts(tokenizer, K * rows, COMPLETION - 1)
    ranked = [completions[K * i : K * i + K] for i in range(rows)]
    tables = {
        "prompts": [{"prompt": prompt} for prompt in prompts],
        "demonstrations": [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=False)],
        "rankings": [
            {"prompt": p, "completions": some, "ranks": list(range(1, K + 1))}
            for p, some in zip(prompts, ranked, strict=True)
        ],
    }
    for name, table in tables.items():
        lines = "".join(json.dumps(row) + "\n" for row in table)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    text = " ".join(texts(tokenizer, 2 * rows, PROMPT + COMPLETION))
    (folder / "text.txt").write_text(text, encoding="utf-8")


def arguments(folder: Path, card: str, stage: str) -> list[str]:
    """
    A recipe's words: those of the folder's README, but two steps of two or more passes; in PPO each of a rollout, as
    large as the completions that are sampled at a time. The second one finds optimizer states.
    """
    files = [str(folder / word) if not word.startswith("--") else word for word in STAGES[stage]]
    model = folder / ("base" if stage == "sft" else "sft")
    words = ["--model_name_or_path", str(model), "--output_dir", str(folder / stage), *files]
    file, passes = RECIPES / "configs" / card / f"{stage}.yaml", 2
    if file.is_file():
        words = ["--config", str(file), *words]
        if stage == "ppo_ptx":
            yaml = safe_load(file.read_text(encoding="utf-8"))
            passes = ceil(yaml["generation_micro_batch_size"] / yaml["per_device_train_batch_size"])
            words += ["--steps_per_generation", str(passes)]
    words += ["--gradient_accumulation_steps", str(passes), "--max_steps", "2", "--logging_steps", "1"]
    return [*words, "--report_to", "none", "--save_strategy", "no"]


def run(setting: dict[str, Any]) -> dict[str, Any]:
    """One recipe in this process, on a part of the GPU: GB, seconds, and what it said if it failed."""
    gpu = torch.cuda.is_available()
    if gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (setting["card"] - CONTEXT) * 1e9 / total))
    sys.path.insert(0, str(RECIPES))
    script, said, error = str(RECIPES / f"{setting['stage']}.py"), StringIO(), ""
    sys.argv = [script, *setting["words"]]
    started = time.perf_counter()
    with redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except (Exception, SystemExit) as problem:  # what a card does to a recipe is what is measured
            error = f"{said.getvalue()[-2000:]}\n{type(problem).__name__}: {problem}"
    # The recipe's own words
    peak = re.search(r"memory: peak ([\d.]+) GB, ([\d.]+) GB predicted", said.getvalue())
    reserved, predicted = map(float, peak.groups()) if peak else (None, None)
    used = torch.cuda.max_memory_allocated() / 1e9 if gpu else None
    return {
        **{"predicted_gb": predicted, "reserved_gb": reserved, "used_gb": used},
        **{"seconds": time.perf_counter() - started, "error": error},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", choices=[*CARDS, []], help="folders of recipes/configs")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="each needs those before")
    parser.add_argument("--json", help="file for the table")
    args = parser.parse_args()
    found = []
    print(f"{'card':<18} {'stage':<8} " + " ".join(f"{name:>9}" for name in COLUMNS) + "   GB", flush=True)
    for card in args.cards or [card for card in CARDS if card != "tiny"]:
        size, sizes, options = CARDS[card]
        config = LlamaConfig(**{"tie_word_embeddings": True, **dict(zip(SIZES, sizes, strict=True)), **options})
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_base(folder / "base", config)
            torch.cuda.empty_cache()
            make_rows(folder, PreTrainedTokenizerFast.from_pretrained(folder / "base"), rows=128)
            for stage in args.stages:
                words = arguments(folder, card, stage)
                file = folder / "setting.json"
                file.write_text(json.dumps({"card": size, "stage": stage, "words": words}), encoding="utf-8")
                got = side(__file__, "--side", file, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
                found.append({"card": card, "stage": stage, **got})
                shown = ["-" if got[f"{name}_gb"] is None else f"{got[f'{name}_gb']:.2f}" for name in COLUMNS]
                print(
                    f"{card:<18} {stage:<8} " + " ".join(f"{x:>9}" for x in shown) + f"   {got['seconds']:.0f} s",
                    flush=True,
                )
                if got["error"]:
                    break  # the stages behind it need what it writes
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if failed := [row for row in found if row["error"]]:
        raise SystemExit("\n".join(f"{row['card']}, {row['stage']}: {row['error']}" for row in failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        Path(sys.argv[3]).write_text(json.dumps(run(json.loads(Path(sys.argv[2]).read_text()))), encoding="utf-8")
    else:
        main()
