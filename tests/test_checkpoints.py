"""Checkpoints that are whole or not there; runs that go on exactly, or say why not."""

import errno
import fcntl
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from faults.stages import STEPS, World, differences, result_of
from ppo_helpers import config as ppo_config
from ppo_helpers import lora
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, TrainerCallback

from instructgpt_trl import PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, resume
from instructgpt_trl.checkpoints import LOCK, check_checkpoint, flaw, last_checkpoint, only_run, seal
from instructgpt_trl.data import InputError
from instructgpt_trl.models.guards import NotFinite

KILL = Path(__file__).parent / "faults" / "kill.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run of reward models to its end, with all its checkpoints. To be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer = world.trainer("reward", "lora", folder, save_total_limit=None)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def warnings_of(caplog):
    logging.getLogger("transformers").propagate = True
    return lambda: " ".join(record.message for record in caplog.records if record.levelname == "WARNING")


# A folder


def sealed(folder: Path) -> Path:
    (folder / "ema").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "ema" / "weights").write_bytes(b"67890")
    seal(folder, {"step": 3, "trainer": "T", "processes": 1, "versions": {}, "data": {}, "settings": {}})
    return folder


def test_what_is_whole_has_no_flaw(tmp_path):
    folder = sealed(tmp_path / "checkpoint-3")
    (folder / "notes.txt").write_text("somebody's own")
    assert flaw(folder) is None
    known = json.loads((folder / "checkpoint.json").read_text())
    assert known["step"] == 3 and sorted(known["files"]) == ["ema/weights", "weights"]
    assert known["files"]["weights"] == {
        "bytes": 5,
        "sha256": "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5",  # sha256sum
    }


def rewrite(folder: Path, **changed) -> None:
    """`checkpoint.json` with other values, or without one."""
    known = {**json.loads((folder / "checkpoint.json").read_text()), **changed}
    known = {name: value for name, value in known.items() if value is not ...}
    (folder / "checkpoint.json").write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "weights").write_bytes(b"123"), "weights has 3 bytes and had 5"),
        (lambda f: (f / "ema" / "weights").write_bytes(b"67891"), "ema/weights is not what was written"),
        (lambda f: (f / "weights").unlink(), "weights is missing"),
        (lambda f: (f / "checkpoint.json").unlink(), "no checkpoint.json is in it"),
        (lambda f: (f / "checkpoint.json").write_text('{"files": {"wei'), "checkpoint.json cannot be read"),
        (lambda f: (f / "checkpoint.json").write_text('{"files": [1]}'), "checkpoint.json cannot be read"),
        (lambda f: (f / "checkpoint.json").write_bytes(b"\xff\xfe"), "checkpoint.json cannot be read"),
        (lambda f: rewrite(f, settings=None), "checkpoint.json cannot be read"),
        (lambda f: rewrite(f, files={}), "checkpoint.json cannot be read"),
        (lambda f: rewrite(f, trainer=...), "checkpoint.json cannot be read"),
        (lambda f: rewrite(f, format=2), "has format '2', and this version reads 1"),
    ],
)
def test_what_is_not_whole_is_said(tmp_path, change, message):
    folder = sealed(tmp_path / "checkpoint-3")
    change(folder)
    assert message in flaw(folder)


def test_no_name_in_a_checkpoint_becomes_a_path(tmp_path):
    folder = sealed(tmp_path / "checkpoint-3")
    (tmp_path / "secret").write_bytes(b"12345")
    known = json.loads((folder / "checkpoint.json").read_text())
    known["files"]["../secret"] = known["files"].pop("weights")
    (folder / "checkpoint.json").write_text(json.dumps(known))
    assert flaw(folder) == "../secret is missing"


def test_the_last_whole_one_is_taken(tmp_path, warnings_of):
    for step in (2, 10, 9):
        sealed(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert "checkpoint-10 is passed over: weights has 0 bytes and had 5" in warnings_of()
    assert last_checkpoint(tmp_path / "nowhere") is None


# A folder is one run's


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(world, tmp_path):
    class Second(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (Path(args.output_dir) / ".unfinished-checkpoint").mkdir(exist_ok=True)
            with pytest.raises(InputError, match=f"{tmp_path}: another run is training into this folder"):
                world.trainer("reward", "lora", tmp_path).train()
            assert (Path(args.output_dir) / ".unfinished-checkpoint").is_dir()  # which may be the first's
            refused.append(state.global_step)

    refused = []
    trainer = world.trainer("sft", "lora", tmp_path, max_steps=2)
    trainer.add_callback(Second())
    trainer.train()
    assert refused == [1, 2] and flaw(tmp_path / "checkpoint-2") is None
    assert not list(tmp_path.glob("*.lock"))
    trainer.train()  # and it is free again


def test_a_link_in_the_place_of_an_unfinished_checkpoint_is_not_followed(world, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".unfinished-checkpoint").symlink_to(tmp_path / "elsewhere")
    world.trainer("sft", "lora", tmp_path / "run", max_steps=1).train()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["mine"]
    assert flaw(tmp_path / "run" / "checkpoint-1") is None and not (tmp_path / "run" / "checkpoint-1").is_symlink()


def test_a_killed_run_holds_no_folder(tmp_path):
    code = f"import os, signal\nfrom instructgpt_trl.checkpoints import only_run\nwith only_run({str(tmp_path)!r}):\n"
    done = subprocess.run([sys.executable, "-c", code + "    os.kill(os.getpid(), signal.SIGKILL)"])
    assert done.returncode == -9 and (tmp_path / LOCK).exists()
    with only_run(tmp_path):
        pass


def test_a_forked_process_that_ends_leaves_the_lock(tmp_path):
    child = None
    try:
        with only_run(tmp_path):
            child = os.fork()
            if child == 0:
                raise SystemExit
            os.waitpid(child, 0)
            with pytest.raises(InputError, match="another run is training"), only_run(tmp_path):
                pass
    finally:
        if child == 0:
            os._exit(0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_trained_on_all_the_same(tmp_path, monkeypatch, warnings_of, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_run(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked against a second run" in warnings_of()


# Writing


def test_a_checkpoint_that_fails_leaves_none_and_those_before(world, tmp_path, monkeypatch):
    """The disk is full while the third is written: one line, no half a checkpoint; then the run goes on exactly."""
    straight = world.trainer("sft", "lora", tmp_path / "straight")
    straight.train()
    straight.save_model()
    trainer = world.trainer("sft", "lora", tmp_path / "full")
    real, left = torch.save, iter([True] * 8)

    def save(*args, **kwargs):
        if next(left, None) is None:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470")
        real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save)
        with pytest.raises(InputError, match=r"step 3: the checkpoint could not be written to .*MB are free there"):
            trainer.train()
    assert sorted(path.name for path in (tmp_path / "full").glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    again = world.trainer("sft", "lora", tmp_path / "full")
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert differences(result_of(tmp_path / "straight"), result_of(tmp_path / "full")) == []


def test_the_one_before_goes_behind_the_renaming(world, tmp_path, monkeypatch):
    """With `save_total_limit=1` there is always one that is whole."""
    whole, real = [], resume.seal

    def looked(folder, facts):
        whole.append(last_checkpoint(tmp_path))
        real(folder, facts)

    monkeypatch.setattr(resume, "seal", looked)
    trainer = world.trainer("sft", "lora", tmp_path, save_total_limit=1, load_best_model_at_end=False, max_steps=3)
    trainer.train()
    assert whole == [None, str(tmp_path / "checkpoint-1"), str(tmp_path / "checkpoint-2")]
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-3"]


def test_leftovers_go_and_the_best_is_named_where_it_is(world, tmp_path):
    (tmp_path / ".unfinished-checkpoint" / "checkpoint-9").mkdir(parents=True)
    world.trainer("sft", "lora", tmp_path, max_steps=3).train()
    assert not (tmp_path / ".unfinished-checkpoint").exists()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    best = tmp_path / f"checkpoint-{state['best_global_step']}"
    assert state["best_model_checkpoint"] == str(best) and best.is_dir()


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth"])
def test_what_a_run_cannot_go_on_without(run, name):
    (run / "checkpoint-4" / name).unlink()
    (run / "checkpoint-4" / "checkpoint.json").unlink()  # as of a program that writes none
    with pytest.raises(InputError, match=f"checkpoint-4: {name.split('.')[0]} is missing"):
        check_checkpoint(run / "checkpoint-4")


def test_the_best_stays_when_the_run_moves(world, tmp_path):
    """Its path is written down, and is another then."""
    settings = dict(learning_rate=0.0, save_total_limit=2)  # the first is never beaten
    world.trainer("sft", "lora", tmp_path / "here", max_steps=4, **settings).train()
    (tmp_path / "here").rename(tmp_path / "there")
    trainer = world.trainer("sft", "lora", tmp_path / "there", max_steps=6, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-1")
    assert (tmp_path / "there" / "checkpoint-1").is_dir() and (tmp_path / "there" / "checkpoint-6").is_dir()


# Going on


def test_early_stopping_has_the_patience_that_was_left(world, tmp_path):
    """No evaluation is better by so much; at the fourth the run stops, begun again before it or not."""

    def trainer(folder: str) -> SFTTrainer:
        one = world.trainer("sft", "full", tmp_path / folder, save_total_limit=None)
        one.remove_callback(EarlyStoppingCallback)
        one.add_callback(EarlyStoppingCallback(3, early_stopping_threshold=1e9))
        return one

    straight = trainer("straight")
    straight.train()
    assert straight.state.global_step == 4
    for step in (2, 3):
        resumed = trainer("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 4


def test_a_run_that_had_ended_gets_no_further_step(world, run, finished):
    """Here `max_steps` is inside an epoch, where transformers would take one step more."""
    trainer = world.trainer("reward", "lora", run, save_total_limit=None)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert trainer.state.global_step == STEPS and differences(result_of(finished), result_of(run)) == []


def test_a_callback_that_is_new_is_no_error(world, run):
    trainer = world.trainer("reward", "lora", run, save_total_limit=None, metric_for_best_model="loss")
    trainer.add_callback(EarlyStoppingCallback(9))
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert trainer.state.global_step == STEPS


def test_a_named_checkpoint_that_is_not_whole_is_refused(run, world):
    (run / f"checkpoint-{STEPS}" / "adapter_model.safetensors").write_bytes(b"")
    message = f"checkpoint-{STEPS}: adapter_model.safetensors has 0 bytes .* go on from .*checkpoint-{STEPS - 1}"
    with pytest.raises(InputError, match=message):
        world.trainer("reward", "lora", run).train(resume_from_checkpoint=str(run / f"checkpoint-{STEPS}"))
    for folder in run.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    with pytest.raises(InputError, match="no whole checkpoint is in"):
        world.trainer("reward", "lora", run).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="no other checkpoint beside it is whole"):
        check_checkpoint(run / "checkpoint-3")
    with pytest.raises(InputError, match="no checkpoint, which has trainer_state.json"):
        check_checkpoint(run.parent)


def test_a_checkpoint_without_its_optimizer_is_refused(world, tmp_path):
    world.trainer("sft", "lora", tmp_path, save_only_model=True, load_best_model_at_end=False, max_steps=2).train()
    with pytest.raises(InputError, match="the optimizer's state is not in it"):
        world.trainer("sft", "lora", tmp_path).train(resume_from_checkpoint=True)


def test_one_of_another_stage_or_tokenizer_is_refused(world, run):
    with pytest.raises(InputError, match="a checkpoint of RewardTrainer, not of SFTTrainer"):
        world.trainer("sft", "lora", run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    make_tokenizer(extra=("<turn>",)).save_pretrained(run / "checkpoint-4")
    seal_again(run / "checkpoint-4")
    with pytest.raises(
        InputError, match="tokenizers of this run and .*checkpoint-4 differ: vocabulary of 258 and 259"
    ):
        world.trainer("reward", "lora", run).train(resume_from_checkpoint=str(run / "checkpoint-4"))


def seal_again(folder: Path) -> None:
    """As somebody would who knows the format."""
    known = json.loads((folder / "checkpoint.json").read_text())
    del known["files"]
    seal(folder, known)


def test_what_is_not_as_it_was_is_said(world, run, warnings_of):
    trainer = world.trainer("reward", "lora", run, learning_rate=0.02, logging_steps=7, save_total_limit=None)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    said = re.search(r"this is not exactly the run that was stopped: .*", warnings_of())[0]
    assert "settings learning_rate 0.02 and not 0.01" in said and "logging_steps" not in said and "rows" not in said
    known = json.loads((run / "checkpoint-6" / "checkpoint.json").read_text())
    known["versions"]["torch"], known["data"]["train_dataset"], known["processes"] = "1.0", "0" * 64, 2
    (run / "checkpoint-6" / "checkpoint.json").write_text(json.dumps(known))
    world.trainer("reward", "lora", run).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    said = warnings_of()
    assert f"versions torch {torch.__version__} and not 1.0" in said
    assert "other rows in train_dataset" in said and "1 processes and not 2" in said


def test_the_same_run_is_not_warned_of(world, run, warnings_of):
    world.trainer("reward", "lora", run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert "not exactly" not in warnings_of()


class Trap:
    """A pickle that runs code when it is read as one."""

    def __reduce__(self):
        return (open, (Trap.path, "w"))


def test_weights_that_are_spoiled_behind_finite_gradients_are_not_saved(world, tmp_path):
    """Without an epsilon Adam divides 0 by 0 where a gradient is 0, as a new adapter's first is."""
    for stage in ("sft", "reward"):
        trainer = world.trainer(stage, "lora", tmp_path / stage, adam_epsilon=0.0)
        with pytest.raises(NotFinite, match="step 1: .* is NaN .* nothing was saved; there is no checkpoint"):
            trainer.train()
        assert not list((tmp_path / stage).glob("checkpoint-*"))


def test_the_best_checkpoint_is_one_of_this_run_whatever_a_file_says(world, tmp_path):
    folder = tmp_path / "run"
    world.trainer("sft", "lora", folder, max_steps=2).train()
    shutil.copytree(folder / "checkpoint-1", tmp_path / "elsewhere")
    file = folder / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    state |= {"best_model_checkpoint": str(tmp_path / "elsewhere"), "best_global_step": 77, "best_metric": -1e9}
    file.write_text(json.dumps(state))
    (folder / "checkpoint-2" / "checkpoint.json").unlink()
    trainer = world.trainer("sft", "lora", folder, max_steps=3)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.best_model_checkpoint is None


def test_a_run_that_goes_on_does_not_evaluate_its_start_again(world, tmp_path):
    settings = dict(eval_on_start=True, load_best_model_at_end=False, max_steps=4)
    world.trainer("sft", "lora", tmp_path, **settings).train()
    again = world.trainer("sft", "lora", tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    steps = [row["step"] for row in again.state.log_history if "eval_loss" in row]
    assert steps == [0, 1, 2, 3, 4] and again.args.eval_on_start


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        (dict(ignore_data_skip=True), "which begins the epoch anew"),
        (dict(train_sampling_strategy="group_by_length"), "drawn from the generators of training"),
    ],
)
def test_a_setting_with_which_nothing_is_exact_is_said(world, tmp_path, warnings_of, setting, why):
    for resume_from in (None, True):
        trainer = world.trainer("sft", "lora", tmp_path, load_best_model_at_end=False, max_steps=2, **setting)
        trainer.train(resume_from_checkpoint=resume_from)
        assert ("does not go on exactly" in warnings_of() and why in warnings_of()) == bool(resume_from)


def test_another_optimizer_is_refused(world, run):
    trainer = world.trainer("reward", "lora", run, optim="sgd")
    with pytest.raises(InputError, match="of another optimizer than SGD, which has"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("then", "now"), [("adamw_torch", "adamw_torch_fused"), ("adamw_8bit", "paged_adamw_8bit")])
def test_another_name_of_the_optimizer_goes_on(world, tmp_path, warnings_of, then, now):
    if "8bit" in then:
        pytest.importorskip("bitsandbytes")
    world.trainer("sft", "lora", tmp_path, optim=then, max_steps=1, load_best_model_at_end=False).train()
    trainer = world.trainer("sft", "lora", tmp_path, optim=now, max_steps=2, load_best_model_at_end=False)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and f"optim {now} and not {then}" in warnings_of()


def test_a_new_generator_state_makes_no_other_base(world, tmp_path, warnings_of):
    """The head beside which a copy is trained is drawn at random, and not used."""
    args = RewardConfig(str(tmp_path), max_steps=2, save_steps=1, report_to="none", gradient_checkpointing=False)
    for seed in (0, 1):
        torch.manual_seed(seed)
        trainer = RewardTrainer(world.reward["lora"], args, train_dataset=world.rankings)
        trainer.train(resume_from_checkpoint=seed and str(tmp_path / "checkpoint-1"))
    assert "this is not exactly the run" not in warnings_of()


def of_a_stream(world: World, stage: str, folder: Path, **settings):
    """Ten rows, otherwise shuffled in each pass: five micro-batches of two, two of them a step, and one left over."""
    rows = {"sft": world.demonstrations, "reward": world.rankings, "ppo": world.prompts}[stage]
    stream = rows.select(range(10)).to_iterable_dataset().shuffle(seed=0, buffer_size=4)
    settings |= dict(save_strategy="steps", save_steps=1, report_to="none", disable_tqdm=True, learning_rate=0.01)
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=False)
    settings |= dict(lr_scheduler_type="constant")
    if stage == "sft":
        args = SFTConfig(str(folder), residual_dropout=0.2, **settings)
        return SFTTrainer(world.base, args, train_dataset=stream, peft_config=lora())
    if stage == "reward":
        args = RewardConfig(str(folder), **settings)
        return RewardTrainer(world.base, args, train_dataset=stream, peft_config=lora())
    args = ppo_config(folder, **{"steps_per_generation": 2, **settings})
    return PPOTrainer(world.sft, reward_model=world.reward["lora"], args=args, train_dataset=stream)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stream_goes_on_in_its_pass(world, tmp_path, stage):
    """Stopped twice."""
    straight = of_a_stream(world, stage, tmp_path / "straight", max_steps=8)
    straight.train()
    weights = {name: parameter.detach().clone() for name, parameter in straight._trained().items()}
    assert straight._passes > 2
    for stop in (2, 3, 5):  # at the end of a pass, and inside the second and third
        once = of_a_stream(world, stage, tmp_path / "once", max_steps=stop + 1)
        once.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
        twice = of_a_stream(world, stage, tmp_path / "once", max_steps=8)
        twice.train(resume_from_checkpoint=str(tmp_path / "once" / f"checkpoint-{stop + 1}"))
        for name, parameter in twice._trained().items():
            assert torch.equal(parameter, weights[name]), (stop, name)


@pytest.mark.parametrize(
    ("stage", "name", "change", "message"),
    [
        ("sft", "optimizer.pt", lambda x: x["state"][0].update(exp_avg=torch.zeros(1)), "exp_avg has the shape"),
        ("ppo", "ppo_state.json", lambda x: x.update(kl_coef=-5.0), "kl_coef=-5.0: expected a number from 0 on"),
        ("ppo", "ppo_state.json", lambda x: x.update(kl_coef=float("nan")), "kl_coef=nan: expected"),
        ("ppo", "progress.json", lambda x: x["rows"].update(train=0), "rows.train=0: expected a whole number"),
        ("ppo", "progress.json", lambda x: x.update(tokens="x"), "cannot be loaded"),
        ("ppo", "rollout.safetensors", lambda x: x["order"].fill_(0), "the order of the rollout is none"),
        ("ppo", "rollout.safetensors", lambda x: x.update(advantages=torch.zeros(4, 1)), "advantages of the rollout"),
        ("ppo", "adapter_model.safetensors", lambda x: next(iter(x.values())).fill_(torch.nan), "is NaN or infinite"),
        (
            "ppo",
            "ema/adapter_model.safetensors",
            lambda x: next(iter(x.values())).fill_(torch.inf),
            "is NaN or infinite",
        ),
        ("sft", "adapter_model.safetensors", lambda x: next(iter(x.values())).fill_(torch.nan), "is NaN or infinite"),
        ("sft", "trainer_state.json", lambda x: x.update(log_history=[1]), "log_history cannot be so"),
        ("sft", "trainer_state.json", lambda x: x.update(total_flos="x"), "total_flos cannot be so"),
        ("sft", "trainer_state.json", lambda x: x.update(best_global_step="../x"), "best_global_step cannot be so"),
    ],
)
def test_what_cannot_be_in_a_checkpoint_is_named(world, runs_of_a_step, tmp_path, stage, name, change, message):
    """Of one that somebody changed and sealed again."""
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(runs_of_a_step[stage] / "checkpoint-1", folder)
    file = folder / name
    load, save = {".pt": (torch.load, torch.save), ".safetensors": (load_file, save_file)}.get(
        file.suffix, (lambda f: json.loads(f.read_text()), lambda x, f: f.write_text(json.dumps(x)))
    )
    content = load(file)
    change(content)
    save(content, file)
    (folder / "checkpoint.json").unlink()
    with pytest.raises(InputError, match=message):
        world.trainer(stage, "lora", tmp_path).train(resume_from_checkpoint=str(folder))


@pytest.fixture(scope="module")
def runs_of_a_step(world, tmp_path_factory) -> dict[str, Path]:
    runs = {stage: tmp_path_factory.mktemp(stage) for stage in ("sft", "ppo")}
    for stage, folder in runs.items():
        world.trainer(stage, "lora", folder, max_steps=1, load_best_model_at_end=False).train()
    return runs


def test_another_adapter_or_base_is_said(world, tmp_path, warnings_of):
    settings = dict(max_steps=1, save_strategy="steps", save_steps=1, report_to="none", disable_tqdm=True)

    def trainer(base, **own):
        rows = dict(
            train_dataset=world.rankings, demonstration_dataset=world.demonstrations.select(range(own.pop("n", 3)))
        )
        return RewardTrainer(base, RewardConfig(str(tmp_path / "run"), **settings), peft_config=lora(**own), **rows)

    trainer(world.base).train()
    trainer(world.base).train(resume_from_checkpoint=True)
    assert "not exactly the run" not in warnings_of()
    make_llama(seed=5).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer(str(tmp_path / "base"), lora_alpha=77, n=4).train(resume_from_checkpoint=True)
    said = warnings_of()
    assert "lora_alpha 77 and not 4" in said and "frozen weights" in said and "demonstration_dataset" in said


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"])
def test_nothing_in_a_checkpoint_is_executed(world, run, tmp_path, name):
    Trap.path = str(tmp_path / "it ran")
    folder = run / "checkpoint-4"
    for data in (lambda f: torch.save(Trap(), f), lambda f: f.write_bytes(pickle.dumps(Trap()))):
        data(folder / name)
        seal_again(folder)
        trainer = world.trainer("reward", "lora", run, save_total_limit=None)
        try:
            trainer.train(resume_from_checkpoint=str(folder))
        except Exception as error:
            assert name != "training_args.bin", error
            assert "weights" in str(error).lower()
        assert not Path(Trap.path).exists()


# Killed (-9), by a harness of its own


def killed(*flags: str) -> str:
    done = subprocess.run([sys.executable, str(KILL), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_runs_that_are_killed_end_as_if_they_had_not_been():
    line = killed("--kills", "4", "--seed", "3", "--stages", "sft-full", "reward-lora", "ppo-full")
    assert re.fullmatch(r"4 kills in (\d+) runs, \1 of which ended as if nobody had killed them", line)


def test_inside_a_save_and_inside_a_rollout():
    moments = ("inside of that", "inside a rollout", "between a rollout's steps")
    line = killed("--moments", *moments, "--stages", "reward-full", "ppo-lora")
    assert line == "4 kills in 6 runs, 6 of which ended as if nobody had killed them"


@pytest.mark.slow
def test_at_every_moment_of_every_stage():
    line = killed("--moments")
    assert line == "52 kills in 60 runs, 60 of which ended as if nobody had killed them"
