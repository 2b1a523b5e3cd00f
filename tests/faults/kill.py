"""
Runs that are killed (-9), and go on: does each end with what the run that nobody killed ends with, bit for bit?

    python tests/faults/kill.py --kills 50 --seed 0

Each run is a process forked from this one, in which everything is imported already. It is killed at a random moment
and started again, until it comes to its end; chains of the three stages, LoRA and full, take turns until there were
enough kills. Prints a line a chain, and ends with 1 if a single one differs.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stages import STAGES, World, differences, result_of

from instructgpt_trl.checkpoints import last_checkpoint


def in_a_child(work: Callable[[], None], log: Path) -> int:
    """Fork, do `work`, exit; what it prints goes to `log`. The id of the process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", help="as in sft-lora; all six are the default")
    args = parser.parse_args()
    stages = [one for one in STAGES if not args.stages or "-".join(one) in args.stages]
    draw, kills, wrong, chains = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        whole = {}
        for stage, kind in stages:
            own = Path(folder, f"straight-{stage}-{kind}")
            seconds = straight(world, stage, kind, own)
            whole[stage, kind] = seconds, result_of(own)
        while kills < args.kills:
            stage, kind = stages[chains % len(stages)]
            seconds, expected = whole[stage, kind]
            own = Path(folder, f"killed-{chains}")
            here = killed(world, stage, kind, own, seconds, draw, min(10, args.kills - kills))
            found = differences(expected, result_of(own))
            kills, chains, wrong = kills + here, chains + 1, wrong + bool(found)
            print(f"{stage:6} {kind:4}  {here:2} kills  {'the same' if not found else found[:3]}", flush=True)
            shutil.rmtree(own)
    print(f"{kills} kills in {chains} runs, {chains - wrong} of which ended as if nobody had killed them")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
