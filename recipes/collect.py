r"""
Several completions a prompt from one or several policies, as tasks for recipes/label.py [InstructGPT 3.2, 3.4].

    python recipes/collect.py --policies runs/sft runs/ppo_ptx --dataset prompts.jsonl --output tasks.jsonl

The completions of a prompt are drawn in equal parts from the policies (the paper mixes SFT and PPO policies); where
two say the same, further ones are drawn, and what is still the same is left out. A task has `id`, `prompt`,
`completions`, `models` (the policy of each, which label.py does not show) and the other columns of the prompt, its
own `id` as `prompt_id`. Stopped, it goes on where it was. Flags of `trl.ModelConfig` (`--load_in_4bit`, `--dtype`)
and `--config` count as in sft.py.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import ModelArguments, check_model, ends_of, load_model, parse_arguments, run
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig

from instructgpt_trl.data import (
    InputError,
    as_conversations,
    check_output_dir,
    encode_prompt,
    load_rows,
    write_rows,
)
from instructgpt_trl.models.loading import check_positions, context_length
from instructgpt_trl.ranges import COUNT, SEED, Range, check_ranges

Row = dict[str, Any]
FEWEST, MOST = 4, 9  # completions a prompt [InstructGPT 3.4]
TRIES = 3  # draws of a policy for a prompt on which it repeats itself


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    """Flags of this recipe besides those of `trl.ModelConfig`."""

    policies: list[str] = field(metadata={"help": "Folders of policies, full models or adapters, or hub ids."})
    dataset: str = field(metadata={"help": "Prompts: JSONL, CSV, Parquet, a `datasets` folder or a hub id."})
    output: str = field(metadata={"help": "JSON Lines file of tasks to write."})
    completions: int = field(default=FEWEST, metadata={"help": "Completions a prompt, 4 to 9."})
    num_prompts: int | None = field(default=None, metadata={"help": "The first so many prompts; all if not given."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling."})
    batch_size: int = field(default=16, metadata={"help": "Completions at a time."})
    conversational: bool = field(default=False, metadata={"help": "Prompts as user messages, for a chat model."})
    seed: int = field(default=0, metadata={"help": "Of the sampling; each batch has one of its own."})


def check(args: Arguments) -> None:
    counts = dict.fromkeys(("num_prompts", "max_new_tokens", "batch_size"), COUNT)
    own = {"completions": Range(FEWEST, MOST, whole=True), "temperature": Range(1e-4), "seed": SEED}
    check_ranges(args, {**counts, **own})
    if len(args.policies) > args.completions:
        raise InputError(f"--policies: {len(args.policies)} for {args.completions} completions; expected no more")
    if Path(args.output).suffix != ".jsonl":
        raise InputError(f"--output {args.output}: expected a name that ends with .jsonl")
    if Path(args.output).exists():
        raise InputError(f"{args.output}: is there already; delete it or choose another --output")
    check_output_dir(Path(args.output).parent)


class Sampler:
    """A policy that draws completions."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Arguments):
        self.model, self.tokenizer, self.args = model.eval(), tokenizer, args

    def check_lengths(self, prompts: list[Any], name: str) -> None:
        """
        Raise [`InputError`] if a prompt has no tokens, or goes past learned positions with its completion; of others
        that go past the context it is said how many.
        """
        lengths = [len(encode_prompt(self.tokenizer, prompt)) for prompt in prompts]
        if 0 in lengths:
            raise InputError(
                f"{self.args.dataset}, row {lengths.index(0)}: the prompt has no tokens; fill it in, or correct "
                f"the chat template of {name}"
            )
        most = max(lengths) + self.args.max_new_tokens
        check_positions(self.model, lambda: most, f"{self.args.dataset} in {name}", "max_new_tokens")
        context = context_length(self.model.config) or most
        long = sum(length + self.args.max_new_tokens > context for length in lengths)
        if long:
            print(
                f"{long} of {len(prompts)} prompts go past the {context} tokens that {name} has learned, with "
                f"max_new_tokens={self.args.max_new_tokens} behind them",
                file=sys.stderr,
            )

    def draw(self, prompts: list[Any], each: int, seed: int) -> list[list[str]]:
        """`each` completions of every prompt."""
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(one)) + one for one in encoded], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in encoded], device=ids.device)
        ends = sorted({end for prompt in prompts for end in ends_of(self.model, self.tokenizer, prompt)})
        set_seed(seed)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=self.args.temperature,
                top_k=0,
                top_p=1.0,
                num_return_sequences=each,
                max_new_tokens=self.args.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=ends,
            )
        texts = [self._text(row, ends) for row in out[:, longest:].tolist()]
        return [texts[start : start + each] for start in range(0, len(texts), each)]

    def _text(self, ids: list[int], ends: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)

    def distinct(self, prompts: list[Any], known: list[list[str]], each: int, seed: int) -> list[list[str]]:
        """
        Of every prompt `each` completions that say something, and other things than each other and those `known`;
        fewer where the policy keeps repeating itself.
        """
        found: list[list[str]] = [[] for _ in prompts]
        for attempt in range(TRIES):
            short = [k for k, texts in enumerate(found) if len(texts) < each]
            if not short:
                break
            for k, drawn in zip(short, self.draw([prompts[k] for k in short], each, seed + attempt), strict=True):
                seen = {text.strip() for text in known[k] + found[k]} | {""}  # which nobody could rank
                new = list({text.strip(): text for text in drawn if text.strip() not in seen}.values())
                found[k] += new[: each - len(found[k])]
        return found


def shares(args: Arguments) -> list[int]:
    """Completions of a prompt from each policy."""
    whole, rest = divmod(args.completions, len(args.policies))
    return [whole + (place < rest) for place in range(len(args.policies))]


class Drawn:
    """What was drawn, in OUTPUT.part: its first line has the settings, each other a batch of one policy."""

    def __init__(self, path: Path, settings: Row):
        self.path = path
        self.batches: dict[tuple[int, int], list[list[str]]] = {}
        self.settings = settings
        if path.exists():
            self._read(settings)

    def _read(self, settings: Row) -> None:
        lines = self.path.read_bytes().decode("utf-8", "ignore").split("\n")[:-1]  # behind the last newline: cut off
        try:
            begun, *rows = map(json.loads, lines) if lines else [None]
            if begun is not None and begun["settings"] != settings:
                raise InputError(
                    f"{self.path}: was begun with other settings or prompts; delete it, or choose --output"
                )
            self.batches = {(row["policy"], row["start"]): row["texts"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: holds no completions; delete it, or choose another --output") from None
        if begun is None:
            self.path.unlink()
        else:
            self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def add(self, policy: int, start: int, texts: list[list[str]]) -> None:
        if not self.path.exists():
            self._add({"settings": self.settings})
        self._add({"policy": policy, "start": start, "texts": texts})
        self.batches[policy, start] = texts

    def _add(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, policy: int, start: int) -> list[list[str]]:
        """Completions that policies before this one gave to a batch of prompts, together."""
        before = [self.batches[p, start] for p in range(policy)]
        return [sum(texts, []) for texts in zip(*before, strict=True)]


def weights_of(args: Arguments) -> list[list]:
    """Size and time of each policy's files of weights, by which one that was trained on is another."""
    files = [file for name in args.policies for file in sorted(Path(name).glob("*.safetensors"))]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def starts_of(args: Arguments, prompts: int) -> range:
    return range(0, prompts, max(1, args.batch_size // max(shares(args))))


def draw_all(args: Arguments, model: ModelConfig, prompts: list[Any], drawn: Drawn) -> None:
    """Every policy's share, one policy in memory at a time."""
    starts = starts_of(args, len(prompts))
    for policy, (name, each) in enumerate(zip(args.policies, shares(args), strict=True)):
        left = [start for start in starts if (policy, start) not in drawn.batches]
        if not left:
            continue
        sampler = Sampler(*load_model(args, replace(model, model_name_or_path=name)), args)
        sampler.check_lengths(prompts, name)
        for start in tqdm(left, desc=f"{name}", initial=len(starts) - len(left), total=len(starts)):
            batch = prompts[start : start + starts.step]
            known = drawn.of(policy, start) or [[] for _ in batch]
            seed = (args.seed * 1_000_003 + start) * 1_009 + policy * TRIES
            drawn.add(policy, start, sampler.distinct(batch, known, each, seed % 2**32))


def tasks(args: Arguments, rows: list[Row], drawn: Drawn) -> Iterator[Row]:
    """A task of each prompt that has two completions or more."""
    starts = starts_of(args, len(rows))
    for place, row in enumerate(rows):
        start = place - place % starts.step
        of = [drawn.batches[policy, start][place - start] for policy in range(len(args.policies))]
        texts = [text for each in of for text in each]
        models = [name for name, each in zip(args.policies, of, strict=True) for _ in each]
        if len(texts) < 2:
            continue
        talks = not isinstance(row["prompt"], str)
        completions = [[{"role": "assistant", "content": text}] if talks else text for text in texts]
        name = hashlib.sha256(json.dumps([row["prompt"], texts], ensure_ascii=False).encode()).hexdigest()[:16]
        own = {} if row.get("id") is None else {"prompt_id": row["id"]}
        yield {**row, **own, "id": f"{name}-{place}", "completions": completions, "models": models}


def main(argv: list[str]) -> None:
    args, model = parse_arguments(argv, (Arguments, ModelConfig))
    check(args)
    if model.dtype is None:  # as saved, where memory is the card's
        model = replace(model, dtype="auto" if torch.cuda.is_available() else "float32")
    for name in args.policies:
        check_model(replace(model, model_name_or_path=name), args.trust_remote_code)
    dataset = load_rows(args.dataset, "prompt")
    rows = list(as_conversations(dataset) if args.conversational else dataset)[: args.num_prompts]
    known = ("policies", "completions", "max_new_tokens", "temperature", "batch_size", "seed")
    prompts = hashlib.sha256(json.dumps([row["prompt"] for row in rows]).encode()).hexdigest()
    settings = {name: getattr(args, name) for name in known} | {"prompts": prompts, "weights": weights_of(args)}
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn = Drawn(output.with_name(output.name + ".part"), settings)
    draw_all(args, model, [row["prompt"] for row in rows], drawn)
    found = list(tasks(args, rows, drawn))
    if not found:
        raise InputError(f"no prompt has two completions that differ; raise --temperature {args.temperature}")
    write_rows(found, output)
    drawn.path.unlink()
    few = sum(len(row["completions"]) < args.completions for row in found)
    print(
        f"tasks: {output} ({len(found)} of {len(rows)} prompts, {few} with fewer than {args.completions} completions)"
    )
    if len(found) < len(rows):
        print(f"left out: {len(rows) - len(found)} prompts on which the policies say only one thing")
    print(f"next:  python recipes/label.py --tasks {output} --output {output.with_name('rankings.jsonl')}")


if __name__ == "__main__":
    run(main)
