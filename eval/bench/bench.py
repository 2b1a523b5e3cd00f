"""What the benchmarks share: models and rows made on the spot, sides in processes of their own, the peer's package."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

logging.set_verbosity_error()  # a new head is no news here
logging.disable_progress_bar()

PEER = "trl==1.12.0"  # the last one with a PPOTrainer
SMOLLM2 = {  # shape of SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def make_model(folder: Path, shape: dict[str, int], dtype: torch.dtype = torch.float32) -> Path:
    """A Llama of this shape with random weights, saved in `dtype`, and a tokenizer of as many words."""
    size = shape["vocab_size"]
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(**{"tie_word_embeddings": True, "max_position_embeddings": 8192, **shape, **special})
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def make_stages(base: Path, folder: Path, full: bool, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """An SFT model and a reward model on this base: adapters, or whole models saved in `dtype`."""
    out = []
    for name, auto, options in (
        ("sft", AutoModelForCausalLM, {}),
        ("reward", AutoModelForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(0)
        model = auto.from_pretrained(base, dtype=dtype, **options)
        if not full:
            config = lora()
            config.task_type = "SEQ_CLS" if options else "CAUSAL_LM"
            model = get_peft_model(model, config)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / name)
        out.append(str(folder / name))
    return out[0], out[1]


def texts(tokenizer: Any, rows: int, tokens: int) -> list[str]:
    """Texts of exactly so many tokens each, joined from words that are one token behind another."""
    words, generator = [], torch.Generator().manual_seed(0)
    for index in torch.randperm(len(tokenizer), generator=generator).tolist():
        word = tokenizer.decode([index], skip_special_tokens=True).strip()
        if word and tokenizer(f"{word} {word}", add_special_tokens=False)["input_ids"][-1:] == [index]:
            words.append(word)
        if len(words) == 64:
            break
    out = []
    for row in range(rows):
        chosen = [words[(7 * row + i) % len(words)] for i in range(tokens)]
        ids = tokenizer(" ".join(chosen), add_special_tokens=False)["input_ids"][:tokens]
        out.append(tokenizer.decode(ids))
    return out


def prompts(tokenizer: Any, rows: int, tokens: int) -> Dataset:
    return Dataset.from_dict({"prompt": texts(tokenizer, rows, tokens)})


def install_peer(folder: Path) -> Path:
    """The peer's package, without its requirements, which are ours."""
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), PEER]
        subprocess.run(command, check=True)
    return folder


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a matrix product, the fastest of five."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(2048, 2048, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def side(script: str, *words: Any, path: Path | None = None, **variables: str) -> dict[str, Any]:
    """
    Run a script with these words in a process of its own, which writes a JSON file named last; what is in it. `path`
    is put before where Python looks for packages, `variables` are of its environment.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
        run = subprocess.run(
            [sys.executable, script, *map(str, words), out.name], env=environment, capture_output=True, text=True
        )
        if run.returncode:
            raise SystemExit(f"{script} {' '.join(map(str, words))} failed:\n{run.stderr[-3000:]}")
        return json.loads(Path(out.name).read_text(encoding="utf-8"))
