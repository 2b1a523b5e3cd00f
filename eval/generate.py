"""
Completions of a policy for prompts, as JSON Lines: greedy, batched, and going on where an earlier run stopped.

    python eval/generate.py --model runs/ppo_ptx --prompts prompts.jsonl --output completions/ppo_ptx.jsonl
    python eval/generate.py --model DIR --prompts prompts.jsonl --output out.jsonl --samples 16 --temperature 1

Rows out are those of the prompts in their order, each with its `completion` (and `sample`, its number, with several).
Prompts are strings or conversations. While it runs rows stand in OUTPUT.part, whose first line holds the settings; the
file itself appears when it is complete. `--cut_at_newline` is how the paper samples the public sets [Appendix D].
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from files import cached, fingerprint, loading, not_negative, positive, refuse_input
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from instructgpt_trl.data import InputError, encode_completion, encode_prompt, load_rows

Row = dict[str, Any]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a policy (full or an adapter), or hub id")
    parser.add_argument("--prompts", required=True, help="rows with `prompt`: .jsonl, .csv, .parquet or a hub id")
    parser.add_argument("--output", required=True, type=Path, help="JSON Lines file to write")
    parser.add_argument("--samples", type=positive, default=1, help="completions a prompt")
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="0 is greedy")
    parser.add_argument("--max_new_tokens", type=positive, default=256, help="longest completion in tokens")
    parser.add_argument("--cut_at_newline", action="store_true", help="a completion ends before its first newline")
    parser.add_argument("--batch_size", type=positive, default=8, help="completions at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; each batch has one of its own")
    return parser.parse_args(argv)


class Policy:
    """
    A policy that completes prompts.

    Args:
        path (`str`): Folder of a full model or an adapter, or hub id.
        batch_size (`int`): Completions at a time.
        max_new_tokens (`int`): Tokens of one at most.
        temperature (`float`): 0 is greedy; above, from the whole distribution.
        cut_at_newline (`bool`): A completion ends before its first newline, as the paper has it for public sets.
        seed (`int`): Of the sampling; a batch starts from it and its place, whether or not there was a stop before.

    Raises:
        [`InputError`]: there is no such model.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        cut_at_newline: bool = False,
        seed: int = 0,
    ):
        device = PartialState().default_device
        with loading(path):
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            options = {"dtype": "auto", "device_map": device, "trust_remote_code": False}
            self.model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
        self.batch_size, self.max_new_tokens, self.temperature = batch_size, max_new_tokens, temperature
        self.cut_at_newline, self.seed = cut_at_newline, seed

    def complete(self, prompts: Sequence[Any], name: str = "completions") -> list[str]:
        """The texts of [`sample`]."""
        return [self.text(ids) for ids in self.sample(prompts, name)]

    def sample(self, prompts: Sequence[Any], name: str = "completions") -> list[list[int]]:
        """Token ids of a completion of each prompt, strings or conversations, with the end if it came to one."""
        starts = tqdm(range(0, len(prompts), self.batch_size), desc=name)
        return [ids for start in starts for ids in self.batch(prompts[start : start + self.batch_size], start)]

    def text(self, ids: list[int]) -> str:
        """Without special tokens; with `cut_at_newline` without what follows a newline and space around."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.split("\n")[0].strip() if self.cut_at_newline else text

    def batch(self, prompts: Sequence[Any], start: int) -> list[list[int]]:
        """Completions of prompts that begin at `start` of all, at once."""
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        ends = {end for prompt in prompts for end in self._ends(prompt)}
        if self.cut_at_newline:
            ends |= self._newlines
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        set_seed(self.seed + start)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=self._tensor([[pad] * (longest - len(ids)) + ids for ids in encoded]),
                attention_mask=self._tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(ends),
                **(sampling if self.temperature > 0 else greedy),
            )
        return [_until(ids, ends) for ids in out[:, longest:].tolist()]

    def logprobs(self, prompts: Sequence[Any], sampled: Sequence[list[int]], name: str = "log-probs") -> list[float]:
        """Log-probability in nats, at temperature 1, of what [`sample`] gave."""
        found = []
        for start in tqdm(range(0, len(prompts), self.batch_size), desc=name):
            batch = slice(start, start + self.batch_size)
            found += self._logprobs(prompts[batch], sampled[batch])
        return found

    def _logprobs(self, prompts: Sequence[Any], sampled: Sequence[list[int]]) -> list[float]:
        before = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        whole = [start + ids for start, ids in zip(before, sampled, strict=True)]
        longest = max(map(len, whole))  # padded on the right, which earlier tokens do not see
        ids = self._tensor([one + [0] * (longest - len(one)) for one in whole])
        mask = self._tensor([[1] * len(one) + [0] * (longest - len(one)) for one in whole])
        with torch.inference_mode():
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        ends = zip(each, before, whole, strict=True)
        return [row[len(start) - 1 : len(end) - 1].sum().item() for row, start, end in ends]

    @cached_property
    def _newlines(self) -> set[int]:
        """Tokens with a newline in their text."""
        ids = list(range(len(self.tokenizer)))
        texts = self.tokenizer.batch_decode([[token] for token in ids])
        return {token for token, text in zip(ids, texts, strict=True) if "\n" in text}

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)

    def _ends(self, prompt: Any) -> set[int]:
        """What the model's config ends at, and what an answer to this prompt ends at in training."""
        own = self.model.generation_config.eos_token_id
        of_training = encode_completion(self.tokenizer, prompt, "a")[-1]
        return {*(own if isinstance(own, list) else [own]), of_training} - {None}


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Up to the first of the ends and with it."""
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]


def completer(folder: Path, path: str, **settings: Any) -> Callable[[Sequence[Any]], list[str]]:
    """
    `complete` of a [`Policy`], which is loaded when it is first needed. What it said stands in `folder` and is not
    sampled again, whatever becomes of it: a judge may fail.
    """
    load = cache(partial(Policy, path, **settings))

    def complete(prompts: Sequence[Any]) -> list[str]:
        own = {"policy": fingerprint(path), **settings, "prompts": list(prompts)}
        return cached(folder / "said.json", own, lambda: load().complete(prompts))

    return complete


def write_completions(rows: list[Row], output: Path, settings: dict[str, Any], policy: Policy) -> None:
    """
    Write `rows`, each with the policy's completion, going on behind those of an earlier run.

    Raises:
        [`InputError`]: the output is there already, or was begun with other settings or prompts, or is no such file.
    """
    if output.exists():
        raise InputError(f"{output}: is there already; delete it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    done = _done(part, settings, rows, policy.batch_size)
    with part.open("a", encoding="utf-8") as file, tqdm(total=len(rows), initial=done, desc=output.stem) as bar:
        if not part.stat().st_size:
            _write(file, [{"settings": settings}])
        for start in range(done, len(rows), policy.batch_size):
            batch = rows[start : start + policy.batch_size]
            sampled = policy.batch([row["prompt"] for row in batch], start)
            _write(file, [{**row, "completion": policy.text(ids)} for row, ids in zip(batch, sampled, strict=True)])
            bar.update(len(batch))
    lines = part.read_text(encoding="utf-8").split("\n")
    whole = part.with_suffix(".whole")
    whole.write_text("\n".join(lines[1:]), encoding="utf-8")
    whole.replace(output)
    part.unlink()


def _write(file: Any, rows: list[Row]) -> None:
    file.write("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def _done(part: Path, settings: dict[str, Any], rows: list[Row], batch_size: int) -> int:
    """Rows of whole batches in a begun file, which is cut behind them."""
    if not part.exists():
        return 0
    lines = part.read_bytes().decode("utf-8", "ignore").split("\n")[:-1]  # what is behind the last newline was cut off
    if not lines:
        part.unlink()
        return 0
    try:
        begun, *written = map(json.loads, lines)
        known, prompts = dict(begun["settings"]), [row["prompt"] for row in written]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{part}: holds no completions; delete it, or choose another --output") from None
    other = [name for name in settings if known.get(name) != settings[name]]
    if other:
        values = ", ".join(str(known.get(name)) for name in other)
        raise InputError(
            f"{part}: was begun with other {', '.join(other)} ({values}); delete it, or choose another --output"
        )
    if any(own != row["prompt"] for own, row in zip(prompts, rows, strict=False)):
        raise InputError(f"{part}: was begun with other prompts; delete it, or choose another --output")
    done = len(written) // batch_size * batch_size if len(written) < len(rows) else len(rows)
    part.write_text("\n".join(lines[: 1 + done]) + "\n", encoding="utf-8")
    return done


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        refuse_input(args.output, args.prompts)
        prompts = load_rows(args.prompts, "prompt")
        rows = [{**row, **({"sample": n} if args.samples > 1 else {})} for row in prompts for n in range(args.samples)]
        names = (
            "model",
            "prompts",
            "samples",
            "temperature",
            "max_new_tokens",
            "cut_at_newline",
            "batch_size",
            "seed",
        )
        settings = {name: getattr(args, name) for name in names} | {"rows": len(rows)}
        settings["weights"] = fingerprint(args.model)
        own = ("batch_size", "max_new_tokens", "temperature", "cut_at_newline", "seed")
        policy = Policy(args.model, **{name: getattr(args, name) for name in own})
        write_completions(rows, args.output, settings, policy)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"completions: {args.output} ({len(rows)} rows)")


if __name__ == "__main__":
    main()
