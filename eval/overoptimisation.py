"""
Does the reward model's score still mean something? Score, and win rate or gold reward, against the distance from the
start, for the checkpoints of one run, with best-of-n of the start as the curve to compare with.

    python eval/overoptimisation.py --run runs/ppo_ptx --start runs/sft --reward_model runs/reward \\
        --prompts prompts.jsonl --judge reward_model:runs/other_reward --output over.json
    python eval/overoptimisation.py ... --gold python:gold.py:gold --output over.json

Distance is sqrt(KL), the KL in nats a completion: of a checkpoint the mean of log p - log p_start over its own
samples, of best-of-n log n - (n - 1) / n [Gao et al. 2022, sections 1 and 3]. `--gold` scores (prompt, completion);
`--judge` (see judges.py) compares a completion with the start's own. Samples are at temperature 1, one a prompt.
Completions that are there are not sampled again.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from files import cached, fingerprint, key_of, positive, refuse_input, write_json
from generate import Policy
from intervals import with_interval
from judges import Comparison, each, load_function, make_judge, reward_score

from instructgpt_trl.data import InputError, load_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of its backend

Measure = Callable[[Sequence[Any], Sequence[str]], list[float]]


def checkpoints(run: Path) -> list[Path]:
    """Folders of a run's checkpoints, by step.

    Raises:
        [`InputError`]: there are none.
    """
    named = [path for path in run.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    found = sorted(named, key=lambda path: int(path.name.split("-")[1]))
    if not found:
        raise InputError(
            f"{run}: no checkpoint-*; train with --save_steps and --save_total_limit as large as you like"
        )
    return found


def best_of(scores: np.ndarray, gold: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Score and gold of the best of `n` by score, expected over all draws of `n` of a prompt's samples without repeats.

    Args:
        scores (`np.ndarray`): (prompts, N), by which the best is chosen.
        gold (`np.ndarray`): (prompts, N).
        n (`int`): Draws, N at most.

    Returns:
        (prompts,) each. Of N samples in rising order the i-th is the best of C(i - 1, n - 1) of C(N, n) draws.

    Source: WebGPT (Nakano et al. 2021), Appendix I.
    """
    order = scores.argsort(axis=1, kind="stable")
    of = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) for i in range(of)]) / math.comb(of, n)
    return tuple((np.take_along_axis(values, order, axis=1) * weights).sum(1) for values in (scores, gold))


def best_of_kl(n: int) -> float:
    """KL of best-of-n from its policy in nats, log n - (n - 1) / n: an upper bound, exact without ties."""
    return math.log(n) - (n - 1) / n


def make_gold(args: argparse.Namespace, opponents: dict[str, str], keep: Path) -> tuple[str, Measure]:
    """
    What is held against the score, by name: a function's figure, or the preference to the start's completion of a
    prompt (`opponents`, by `key_of`), which is none of those that best-of-n chooses from. NaN where it failed.
    """
    if (args.gold is None) == (args.judge is None):
        raise InputError("expected --gold or --judge, one of them")
    if args.gold:
        if not args.gold.startswith("python:"):
            raise InputError(f"--gold {args.gold}: expected python:FILE.py:FUNCTION")
        function = load_function(args.gold.removeprefix("python:"))

        def rewarded(of: Sequence[Any], texts: Sequence[str]) -> list[float]:
            return _numbers(each(function, list(zip(of, texts, strict=True)), "gold reward", bounds=None))

        return "gold reward", rewarded
    judge = make_judge(args.judge, keep)

    def preferred(of: Sequence[Any], texts: Sequence[str]) -> list[float]:
        compared = [Comparison(one, text, opponents[key_of(one)]) for one, text in zip(of, texts, strict=True)]
        return _numbers(judge(compared))

    return "win rate against the start", preferred


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def curves(of_run: dict[int, np.ndarray], of_start: np.ndarray, draws: Sequence[int]) -> dict[str, Any]:
    """
    Points of both curves: `kl`, `score` and `gold`, with intervals over the prompts of which all of them are numbers,
    so that curves are of the same prompts; `left_out` are the others.

    Args:
        of_run (`dict[int, np.ndarray]`): By step (3, prompts), KL, score and gold of a checkpoint's completions.
        of_start (`np.ndarray`): (2, prompts, N), score and gold of the start's.
        draws (`Sequence[int]`): Of best-of-n.

    Raises:
        [`InputError`]: there is no such prompt.
    """
    best = {n: np.array(best_of(*of_start, n)) for n in draws}
    there = np.isfinite([*chain(*of_run.values(), *best.values())]).all(0)
    if not there.any():
        raise InputError(f"none of {len(there)} prompts has a score and a gold figure for all of its completions")

    def figures(names: Sequence[str], values: np.ndarray) -> dict[str, list[float]]:
        return {name: with_interval(of[there]) for name, of in zip(names, values, strict=True)}

    return {
        "run": [{"step": step, **figures(("kl", "score", "gold"), of)} for step, of in of_run.items()],
        "best_of_n": [{"n": n, "kl": best_of_kl(n), **figures(("score", "gold"), of)} for n, of in best.items()],
        "prompts": int(there.sum()),
        "left_out": int((~there).sum()),
    }


def measure(args: argparse.Namespace, rows: Path) -> dict[str, Any]:
    """What [`curves`] gives, on what the gold figure `failed`, and `notes`. One model is loaded at a time."""
    opponents: dict[str, str] = {}
    what, gold = make_gold(args, opponents, rows / "judgements.jsonl")
    prompts = list({key_of(one): one for one in load_rows(args.prompts, "prompt")["prompt"]}.values())[: args.limit]
    folders, most = checkpoints(Path(args.run)), max(args.best_of)
    settings = {"prompts": prompts, "tokens": args.max_new_tokens, "seed": args.seed, "batch": args.batch_size}

    def load(path: Path | str) -> Policy:
        return Policy(str(path), args.batch_size, args.max_new_tokens, temperature=1.0, seed=args.seed)

    def of_start() -> list[str]:
        start = load(args.start)
        return [start.text(ids) for ids in start.sample(repeated, "best of n")]

    def of_checkpoint(folder: Path) -> dict[str, list]:
        policy = load(folder)
        sampled = policy.sample(prompts, folder.name)
        texts = [policy.text(ids) for ids in sampled]
        return {"ids": sampled, "texts": texts, "logprobs": policy.logprobs(prompts, sampled)}

    def known(path: Path | str, count: int, make: Callable[[], Any]) -> Any:
        """What an earlier call sampled from the same policy for the same prompts, or `make` gives."""
        own = {**settings, "policy": fingerprint(path), "samples": count}
        return cached(rows / f"{Path(path).parent.name}_{Path(path).name}_{count}.json", own, make)

    repeated = [prompt for prompt in prompts for _ in range(most + 1)]
    drawn = known(args.start, most + 1, of_start)
    samples = {folder: known(folder, 1, partial(of_checkpoint, folder)) for folder in folders}
    start = load(args.start)
    kl = [np.subtract(of["logprobs"], start.logprobs(prompts, of["ids"])) for of in samples.values()]
    del start
    score = reward_score(args.reward_model)
    candidates = [i for i in range(len(drawn)) if i % (most + 1)]
    given, texts = [repeated[i] for i in candidates], [drawn[i] for i in candidates]
    scores = [score(given, texts), *(score(prompts, of["texts"]) for of in samples.values())]
    del score
    opponents |= zip(map(key_of, prompts), drawn[:: most + 1], strict=True)
    golds = [gold(given, texts), *(gold(prompts, of["texts"]) for of in samples.values())]
    steps = [int(folder.name.split("-")[1]) for folder in folders]
    of_run = dict(zip(steps, map(np.array, zip(kl, scores[1:], golds[1:], strict=True)), strict=True))
    of_start_by_prompt = np.array([scores[0], golds[0]]).reshape(2, len(prompts), most)
    found = {"gold": what, **curves(of_run, of_start_by_prompt, args.best_of)}
    found["failed"] = int(sum(np.isnan(of).sum() for of in golds))
    note = f"{what} failed on {found['failed']} of {sum(map(len, golds))} completions; {found['left_out']} of "
    note += f"{len(prompts)} prompts are left out of all points"
    return {**found, "notes": [note] * bool(found["left_out"])}


def draw(found: dict[str, Any], file: Path | BytesIO) -> None:
    """Score and gold against sqrt(KL), the run and best-of-n, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    curves = {"run": ("o-", "#cc5a49", "checkpoints"), "best_of_n": ("s--", "#4477aa", "best-of-n of the start")}
    for axis, (name, title) in zip(axes, (("score", "reward-model score"), ("gold", found["gold"])), strict=True):
        for curve, (style, colour, label) in curves.items():
            kl = [point["kl"] if curve == "best_of_n" else point["kl"][0] for point in found[curve]]
            x = np.sqrt(np.maximum(kl, 0))
            value, low, high = np.array([point[name] for point in found[curve]], dtype=float).T
            order = np.arange(len(x)) if curve == "run" else x.argsort()
            axis.plot(x[order], value[order], style, color=colour, label=label, markersize=4)
            axis.fill_between(x[order], low[order], high[order], color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel("sqrt(KL from the start, nats)")
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="output folder of ppo_ptx.py with its checkpoints")
    parser.add_argument("--start", required=True, help="the policy that the run started from")
    parser.add_argument("--reward_model", required=True, help="the reward model that it was trained against")
    parser.add_argument("--prompts", required=True, help="rows with `prompt`, not those of the training")
    parser.add_argument("--judge", help="who compares with the start's completions, see judges.py")
    parser.add_argument("--gold", help="python:FILE.py:FUNCTION of (prompt, completion), instead of a judge")
    parser.add_argument("--best_of", type=positive, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--limit", type=positive, default=256, help="prompts at most")
    parser.add_argument("--max_new_tokens", type=positive, default=256)
    parser.add_argument("--batch_size", type=positive, default=16, help="completions at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--png", type=Path, help="picture; the output's name with .png if not given")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write; completions beside it")
    args = parser.parse_args(argv)
    try:
        inputs = (args.prompts, args.judge, args.gold)
        refuse_input(args.output, *inputs)
        refuse_input(args.png or args.output.with_suffix(".png"), *inputs, args.output, flag="--png")
        found = measure(args, args.output.with_suffix(".rows"))
        write_json(found, args.output)
        draw(found, args.png or args.output.with_suffix(".png"))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    for note in found["notes"]:
        print(f"note: {note}")
    print(f"overoptimisation: {args.output}, {args.png or args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
