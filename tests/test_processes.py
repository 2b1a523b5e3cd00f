"""One process and two: the same losses, gradients, weights and metrics of the same global batch; who writes what."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from faults.stages import STAGES, World
from safetensors.torch import load_file

from instructgpt_trl.data import InputError
from instructgpt_trl.processes import UNTESTED, check_launch

SCRIPT = str(Path(__file__).parent / "faults" / "processes.py")
TIMES = ("_runtime", "_per_second", "step_time", "_flos")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    """The folders of all stages in one and in two processes."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    for processes, command in ((1, [sys.executable]), (2, launch)):
        own = [*command, SCRIPT, str(folder / "world"), str(folder / str(processes))]
        done = subprocess.run(own, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    return {1: folder / "1", 2: folder / "2"}


@pytest.mark.parametrize("stage, kind", STAGES)
def test_gradients_and_weights_of_two_processes_are_those_of_one(runs, stage, kind):
    one, two = (load_file(runs[n] / f"{stage}-{kind}" / "gradients.safetensors") for n in (1, 2))
    assert one.keys() == two.keys() and {name.split(".")[0] for name in one} == {"0", "1", "2", "end"}
    for name, expected in one.items():
        assert (two[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("stage, kind", STAGES)
def test_metrics_of_two_processes_are_those_of_one(runs, stage, kind):
    one, two = (json.loads((runs[n] / f"{stage}-{kind}" / "log.json").read_text()) for n in (1, 2))
    assert len(one) == len(two) == 5
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            of_the_parent = stage == "sft" and name == "eval_loss"  # a mean over processes of means over tokens
            if not name.endswith(TIMES) and not of_the_parent:
                assert math.isclose(found[name], value, rel_tol=1e-4, abs_tol=1e-5), name


def test_only_the_first_process_writes(runs):
    for name in ("completions.jsonl", "eval_completions.jsonl"):
        one, two = ((runs[n] / "ppo-lora" / name).read_text().splitlines() for n in (1, 2))
        one, two = ([json.loads(line) for line in lines] for lines in (one, two))
        assert len(one) == {"completions.jsonl": 12, "eval_completions.jsonl": 3}[name]
        assert [(row["step"], row["prompt"], row["completion"]) for row in two] == [
            (row["step"], row["prompt"], row["completion"]) for row in one
        ]
        for a, b in zip(one, two, strict=True):
            assert math.isclose(a["score"], b["score"], abs_tol=1e-5) and math.isclose(a["kl"], b["kl"], abs_tol=1e-5)
    train = [json.loads(line) for line in (runs[2] / "ppo-lora" / "completions.jsonl").read_text().splitlines()]
    for step in range(2):  # ten prompts an epoch, four a step: no prompt twice in a rollout
        prompts = [row["prompt"] for row in train if row["step"] == step]
        assert len(set(prompts)) == 4


def test_two_processes_go_on_inside_a_rollout_as_one_does(runs):
    for processes, folder in runs.items():
        found = [json.loads((folder / f"resumed-{rank}.json").read_text()) for rank in range(processes)]
        assert found == [True] * processes
        assert len(list((folder / "straight" / "checkpoint-7").glob("rollout*.safetensors"))) == processes


def args(**own):
    kinds = {"world_size": 1, "output_dir": "out", "distributed_state": None}
    return SimpleNamespace(**{**kinds, **own})


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    """On a machine without GPUs accelerate starts two, and each would train alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match="2 processes were launched, and each would train alone into out: set use_cpu"
    ):
        check_launch(args())
    check_launch(args(world_size=2))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_what_nobody_has_run_is_refused(monkeypatch, kind):
    state = SimpleNamespace(distributed_type=kind)
    with pytest.raises(InputError, match=f"{kind.value}: nobody has run this trainer under it"):
        check_launch(args(distributed_state=state))
    monkeypatch.setenv(UNTESTED, "1")
    check_launch(args(distributed_state=state))


@pytest.mark.parametrize("named", [False, True])
def test_an_evaluation_set_that_is_a_stream_is_refused_in_several(named):
    """Its last rows would count twice, since nobody knows which they are."""
    stream = Dataset.from_list([{"prompt": "p"}]).to_iterable_dataset()
    eval_dataset = {"a": Dataset.from_list([{"prompt": "p"}]), "b": stream} if named else stream
    check_launch(args(), eval_dataset)
    with pytest.raises(InputError, match="eval_dataset: a stream, whose last rows 2 processes would count twice"):
        check_launch(args(world_size=2), eval_dataset)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_so_is_one_that_is_given_to_evaluate(tmp_path, monkeypatch, stage):
    trainer = World(tmp_path / "world").trainer(stage, "lora", tmp_path / "run")
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(InputError, match="eval_dataset: a stream"):
        trainer.evaluate(Dataset.from_list([{"prompt": "p"}]).to_iterable_dataset())


def test_whitening_is_of_all_processes(monkeypatch):
    """Against NumPy on all rows at once; the two processes' parts are given."""
    import numpy as np

    from instructgpt_trl import processes

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    masks = [torch.rand(3, 4, generator=generator) > 0.4 for _ in range(2)]
    parts = [x[mask] for x, mask in zip(rows, masks, strict=True)]
    monkeypatch.setattr(processes, "gather_object", lambda own: parts)
    whole = np.concatenate([part.numpy() for part in parts])
    expected = (whole - whole.mean()) / np.sqrt(whole.var() + 1e-8)
    for rank, (x, mask) in enumerate(zip(rows, masks, strict=True)):
        accelerator = SimpleNamespace(num_processes=2, process_index=rank)
        out = processes.whiten_over_all(accelerator, x, mask)
        own = expected[: len(parts[0])] if rank == 0 else expected[len(parts[0]) :]
        np.testing.assert_allclose(out[mask].numpy(), own, rtol=1e-12)
        assert (out[~mask] == 0).all()
