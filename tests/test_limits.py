"""Rows a pass takes: halved where memory ends, with the update unchanged."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from ppo_helpers import assert_close, config, logged, record, store_completions, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode
from trl import RLOOTrainer

from instructgpt_trl import SFTConfig, SFTTrainer
from instructgpt_trl.models.limits import RowLimit
from instructgpt_trl.models.roles import Role
from instructgpt_trl.peak_memory import system_memory


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class FullInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise out_of_memory()


@pytest.fixture(autouse=True)
def _messages(caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True


def test_rows_are_halved_until_they_fit_and_stay_so(caplog):
    limit, tried = RowLimit(8, "a pass"), []

    def attempt(rows: int) -> str:
        tried.append(rows)
        if rows > 2:
            raise out_of_memory()
        return "done"

    assert limit.run(attempt) == limit.run(attempt) == "done"
    assert tried == [8, 4, 2, 2]
    assert "a pass takes 4 rows at a time now, not 8" in caplog.text
    assert "a pass takes 2 rows at a time now, not 4" in caplog.text


@pytest.mark.parametrize("rows, error", [(1, out_of_memory()), (8, RuntimeError("shapes do not fit"))])
def test_what_cannot_be_halved_away_is_raised(rows, error):
    def attempt(rows: int) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        RowLimit(rows, "a pass").run(attempt)
    assert raised.value is error


@pytest.mark.parametrize("where", ["policy forward", "policy backward", "value backward", "ptx backward"])
def test_out_of_memory_in_an_update_leaves_it_as_it_was(folders, tmp_path, monkeypatch, prompts, texts, where, caplog):
    """
    In the second micro-batch of the first minibatch, when the first one's gradient and a part of the second's are in
    the buffers already. Every gradient and metric equals that of a run with memory enough.
    """
    store_completions(monkeypatch)
    settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=2, ptx_ratio=1)
    settings |= dict(learning_rate=0.01, value_learning_rate=0.01, max_steps=2)
    passes = {"policy": 0, "value": 0, "ptx": 0}
    role, place = where.split()
    logprobs, values = Role.logprobs, Role.values

    def checked(kind: str, batch, output: tuple) -> tuple:
        if not torch.is_grad_enabled() or not memory.small:
            return output
        passes[kind] += 1
        if kind != role or passes[kind] == 1 or len(batch["input_ids"]) <= 2:
            return output
        if place == "forward":
            raise out_of_memory()
        return (FullInBackward.apply(output[0]), *output[1:])

    def own_logprobs(self, batch, model=None):
        return checked("policy" if model is None else "ptx", batch, logprobs(self, batch, model))

    monkeypatch.setattr(Role, "logprobs", own_logprobs)
    monkeypatch.setattr(Role, "values", lambda self, batch: checked("value", batch, values(self, batch)))
    memory, runs = SimpleNamespace(small=False), []
    for memory.small in (False, True):
        trainer = trainer_of(folders, "sft", "adapter", config(tmp_path, **settings), prompts, ptx_dataset=texts)
        recorder = record(trainer)
        trainer.train()
        runs.append((trainer, recorder.steps))
    assert trainer._limits["train"].rows == 2 and "a training pass takes 2 rows at a time now" in caplog.text
    for plenty, little in zip(runs[0][1], runs[1][1], strict=True):
        for name in ("policy_grad", "value_grad"):
            assert_close(little[name], plenty[name], rtol=1e-4, atol=1e-6)
    names = ["loss/policy", "loss/value", "loss/ptx", "policy/approxkl", "value/clipfrac", "grad_norm/ptx"]
    for name in (*names, "grad_norm/policy", "grad_norm/value", "policy/ratio"):
        assert logged(runs[1][0], name) == pytest.approx(logged(runs[0][0], name), rel=1e-4, abs=1e-6), name


def test_out_of_memory_in_a_rollout_leaves_it_as_it_was(folders, tmp_path, monkeypatch, prompts, caplog):
    store_completions(monkeypatch)
    settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=1)
    trainer = trainer_of(folders, "sft", "adapter", config(tmp_path, **settings), prompts)
    trainer.model.train()
    rows = [prompts[i] for i in range(4)]
    expected = trainer.rollout(rows)
    scores = Role.scores

    def checked(self, batch):
        if len(batch["input_ids"]) > 1:
            raise out_of_memory()
        return scores(self, batch)

    monkeypatch.setattr(Role, "scores", checked)
    got = trainer.rollout(rows)
    assert trainer._limits["train"].rows == 1
    assert_close({k: v.float() for k, v in got.items()}, {k: v.float() for k, v in expected.items()}, rtol=1e-4)


@pytest.mark.parametrize(
    "size, fits, sampled", [(None, 9, [6]), (4, 9, [4, 2]), (None, 3, [6, 3, 3]), (4, 1, [4, 2, *[1] * 6])]
)
def test_completions_are_sampled_so_many_at_a_time(folders, tmp_path, monkeypatch, prompts, size, fits, sampled):
    """In the order of the prompts. Six at once do not fit: three and three do."""
    calls = []

    def generate(self, prompt_ids, *_):
        calls.append(len(prompt_ids))
        if len(prompt_ids) > fits:
            raise out_of_memory()
        return [[ids[-1], 65] for ids in prompt_ids]

    monkeypatch.setattr(RLOOTrainer, "_generate_single_turn", generate)
    args = config(tmp_path, steps_per_generation=6, generation_micro_batch_size=size)
    trainer = trainer_of(folders, "sft", "adapter", args, prompts)
    tokenizer = make_tokenizer()
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts["prompt"][:6]]
    assert trainer._generate_single_turn(ids, None, {}) == [[row[-1], 65] for row in ids]
    assert calls == sampled


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_sft_holds_no_wide_tile_of_logits_on_a_cpu(tmp_path):
    """1,196 positions and 5,000 words: a tile of TRL has 39 million logits, ours 0.6 million."""
    rows = Dataset.from_list([{"prompt": "p" * 99, "completion": "c" * 200}] * 4)
    args = SFTConfig(
        str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=1, residual_dropout=0
    )
    model = make_llama(vocab=5000, hidden=16, max_position_embeddings=512)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer())
    for run in (trainer.train, trainer.evaluate):
        with Largest() as largest:
            run()
        assert largest.elements == 4 * 299 * 512


ALLOCATOR = """
import psutil, time, torch
from instructgpt_trl.models import limits
def megabytes(): return psutil.Process().memory_info().rss >> 20
def blocks(): return [(torch.ones(2**21), torch.ones(2**13)) for _ in range(20)]  # 8 MiB, and a small one
limits.system_memory = lambda: (available, 10)
available = {available}
before = megabytes()
with limits.freed_memory_reused(interval=0.01):
    time.sleep(0.1)
    held = [small for _, small in blocks()]  # the large ones are freed, between small ones that are not
    more = blocks()  # in their place
    held += [small for _, small in more]
    available = {then}
    time.sleep(0.3)
    del more
    time.sleep(0.3)
    print(megabytes() - before)
print(megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("available", "then", "environment", "kept"),
    [
        (3, 3, {}, True),
        (3, 2, {}, False),  # short while the large ones are alive
        (2, 3, {}, False),
        (3, 3, {"MALLOC_MMAP_THRESHOLD_": "131072"}, False),  # what the user sets
        (3, 2, {"MALLOC_MMAP_THRESHOLD_": "33554432"}, False),  # until memory is short
    ],
)
def test_freed_memory_is_kept_until_memory_is_short(available, then, environment, kept):
    """In a process of its own: of 160 MB that are freed none goes back before the end, or all but rounding."""
    script = ALLOCATOR.format(available=available, then=then)
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**own, **environment}
    )
    inside, after = map(int, run.stdout.split())
    assert (inside > 150) == kept and (inside < 40) == (not kept) and after < 40


def test_a_containers_limit_is_memory_too(tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=600, total=1000))
    assert system_memory(tmp_path) == (600, 1000)  # no limit's files
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 50\n")
    (tmp_path / "memory.current").write_text("300\n")
    for limit, found in (("max", (600, 1000)), ("400", (150, 400)), ("900", (600, 1000))):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert system_memory(tmp_path) == found
