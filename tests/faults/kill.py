"""
Runs that are killed (-9), and go on: does each end with what the run that nobody killed ends with, bit for bit?

    python tests/faults/kill.py --kills 50 --seed 0
    python tests/faults/kill.py --moments

Each run is a process forked from this one, in which everything is imported already. It is killed at a random moment
and started again, until it comes to its end; chains of the three stages, LoRA and full, take turns until there were
enough kills. `--moments` kills at each of the worst moments instead: inside a rollout, between its steps, at every
part of a save. Prints a line a chain, and ends with 1 if a single one differs.
"""

import argparse
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stages import STAGES, World, differences, result_of
from tqdm import tqdm
from transformers import Trainer

from instructgpt_trl import PPOTrainer, checkpoints, resume
from instructgpt_trl.checkpoints import last_checkpoint

# Where, and at which call: the third checkpoint is between the steps of PPO's first rollout
MOMENTS = {
    "as the weights are saved": (Trainer, "save_model", 3),
    "as the optimizer is saved": (Trainer, "_save_optimizer_and_scheduler", 3),
    "as the generators are saved": (Trainer, "_save_rng_state", 3),
    "as it is flushed": (resume, "seal", 3),
    "inside of that": (checkpoints.hashlib, "file_digest", 40),
    "before it is renamed": (checkpoints.os, "rename", 3),
    "behind that": (resume, "rotate", 3),
    "as an old one is deleted": (checkpoints.shutil, "rmtree", 7),  # one at the start, two a checkpoint
    "inside a rollout": (PPOTrainer, "_scores", 3),  # the second is that of an evaluation
    "between a rollout's steps": (PPOTrainer, "_accumulate", 7),
}


def kinds_of(kind: type) -> list[type]:
    """A class and all below it."""
    return [kind, *(one for below in kind.__subclasses__() for one in kinds_of(below))]


def in_a_child(work: Callable[[], None], log: Path) -> int:
    """Fork, do `work`, exit; what it prints goes to `log`. The id of the process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    for kind in kinds_of(tqdm):  # their own lock is shared, and stays locked by who is killed with it
        kind.set_lock(threading.RLock())
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def train(world: World, stage: str, kind: str, folder: Path, **settings) -> None:
    """What a user's script does each time it is started: from the last whole checkpoint, if there is one."""
    trainer = world.trainer(stage, kind, folder, **settings)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()


def wait(child: int) -> int:
    """The exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def straight(world: World, stage: str, kind: str, folder: Path) -> float:
    """The run that nobody kills; its seconds."""
    started = time.perf_counter()
    if wait(in_a_child(lambda: train(world, stage, kind, folder), folder.with_suffix(".log"))):
        raise RuntimeError(folder.with_suffix(".log").read_text())
    return time.perf_counter() - started


def killed(world: World, stage: str, kind: str, folder: Path, seconds: float, draw: random.Random, most: int) -> int:
    """A chain: killed at random moments, `most` times at most, and started again until it ends. The kills."""
    kills = 0
    while True:
        child = in_a_child(lambda: train(world, stage, kind, folder), folder.with_suffix(".log"))
        deadline = time.perf_counter() + draw.uniform(0, seconds)
        while kills < most and time.perf_counter() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.002)
        else:
            done = 0
        if not done and kills < most:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(status if done else os.waitpid(child, 0)[1])
        if status == -signal.SIGKILL:
            kills += 1
        elif status == 0:
            return kills
        else:
            raise RuntimeError(f"{folder}: {folder.with_suffix('.log').read_text()[-3000:]}")


def killed_at(moment: str, world: World, stage: str, kind: str, folder: Path) -> int:
    """Killed by itself at that moment, and started again. 0 if the moment did not come: the run had ended already."""
    owner, name, call = MOMENTS[moment]

    def work() -> None:
        calls, function = iter(range(1, 1_000_000)), getattr(owner, name)

        def counted(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(owner, name, counted)
        train(world, stage, kind, folder)

    status = wait(in_a_child(work, folder.with_suffix(".log")))
    straight(world, stage, kind, folder)
    return int(status == -signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", nargs="*", help="at these, not at random ones; without names at all of them")
    parser.add_argument("--stages", nargs="*", help="as in sft-lora; all six are the default")
    args = parser.parse_args()
    stages = [one for one in STAGES if not args.stages or "-".join(one) in args.stages]
    with tempfile.TemporaryDirectory() as folder:
        wrong = run(args, stages, Path(folder))
    sys.exit(wrong > 0)


def run(args: argparse.Namespace, stages: list[tuple[str, str]], folder: Path) -> int:
    """All chains; how many ended otherwise than the run that nobody killed."""
    world, whole = World(folder), {}
    draw, kills, wrong, chains = random.Random(args.seed), 0, 0, 0
    for stage, kind in stages:
        own = folder / f"straight-{stage}-{kind}"
        seconds = straight(world, stage, kind, own)
        whole[stage, kind] = seconds, result_of(own)
    names = [moment for moment in MOMENTS if not args.moments or moment in args.moments]
    moments = [(moment, *one) for moment in names for one in stages] if args.moments is not None else []
    while moments or args.moments is None and kills < args.kills:
        moment, stage, kind = moments.pop(0) if moments else ("", *stages[chains % len(stages)])
        seconds, expected = whole[stage, kind]
        own = folder / f"killed-{chains}"
        if moment:
            here = killed_at(moment, world, stage, kind, own)
        else:
            most = min(math.ceil(args.kills / len(stages) / 2), args.kills - kills)
            here = killed(world, stage, kind, own, seconds, draw, most)
        found = differences(expected, result_of(own))
        kills, chains, wrong = kills + here, chains + 1, wrong + bool(found)
        print(f"{stage:6} {kind:4}  {here:2} kills  {'the same' if not found else found[:3]}  {moment}", flush=True)
        shutil.rmtree(own)
    print(f"{kills} kills in {chains} runs, {chains - wrong} of which ended as if nobody had killed them")
    return wrong


if __name__ == "__main__":
    main()
