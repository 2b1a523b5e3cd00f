"""What a machine does to a run: a full disk, no memory, SIGTERM, rows that are gone. Each in a process of its own."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer

from instructgpt_trl.checkpoints import flaw, last_checkpoint

SFT = str(Path(__file__).parents[1] / "recipes" / "sft.py")
ROWS = [{"prompt": f"say {i}: ", "completion": f"{i} {i}"} for i in range(16)]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def run(tmp_path):
    """A run of SFT that saves every step, in a folder, and the command for it."""
    make_llama(hidden=32).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = {
        "model_name_or_path": tmp_path / "base",
        "dataset": rows,
        "output_dir": tmp_path / "out",
        "max_steps": 400,
    }
    flags |= {"save_steps": 1, "save_total_limit": 2, "logging_steps": 100, "report_to": "none", "use_cpu": "true"}
    flags |= {"per_device_train_batch_size": 2, "gradient_checkpointing": "false", "save_strategy": "steps"}
    command = [sys.executable, SFT, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    return tmp_path / "out", command


def ended(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **kwargs)


def until_saved(command: list[str], folder: Path, step: int) -> subprocess.Popen:
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=ENVIRONMENT)
    for _ in range(3000):
        found = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]
        if found and max(found) >= step:
            return process
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise RuntimeError("no checkpoint came")


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line of a recipe that ended by it."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def goes_on(command: list[str], folder: Path, steps: int = 3) -> None:
    """Every checkpoint is whole, and the run goes on from the last."""
    assert all(flaw(path) is None for path in folder.glob("checkpoint-*"))
    last = int(last_checkpoint(folder).rsplit("-", 1)[1])
    done = ended([*command, "--resume_from_checkpoint", "true", "--max_steps", str(last + steps)])
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == last + steps and not (folder / ".unfinished-checkpoint").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a megabyte, filled; None where nothing may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", "-l", str(place)])


def test_a_disk_that_is_full(run, small_disk):
    """A real one, where one can be mounted; else files that may not grow, which the system refuses alike."""
    folder, command = run
    if small_disk is not None:
        folder = small_disk / "out"
        command = [*command, "--output_dir", str(folder), "--save_total_limit", "100"]
        done = ended(command)
    else:
        process = until_saved(command, folder, 2)
        process.kill(), process.wait()
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
        done = ended([*command, "--resume_from_checkpoint", "true"], preexec_fn=limit)
    line = error_of(done)
    assert line.startswith("error: step ") and "the checkpoint could not be written to" in line, line
    assert not (folder / ".unfinished-checkpoint").exists()
    if small_disk is not None:
        assert "MB are free there" in line
        shutil.rmtree(min(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
        command = [*command, "--save_total_limit", "1"]
    goes_on(command, folder)


@pytest.mark.slow
def test_sigterm_ends_it_and_it_goes_on(run):
    folder, command = run
    process = until_saved(command, folder, 3)
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    goes_on(command, folder)


@pytest.mark.slow
def test_sigterm_saves_first_if_asked(run):
    """transformers' own way, whose checkpoint is one like any other."""
    folder, command = run
    command = [*command, "--enable_jit_checkpoint", "true", "--save_steps", "1000", "--logging_steps", "1"]
    command += ["--disable_tqdm", "true"]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=ENVIRONMENT, **pipe) as process:
        assert any("'loss'" in line for line in process.stdout)  # read up to the first log
        process.terminate()
        output = process.communicate(timeout=120)[0]
    assert len(list(folder.glob("checkpoint-*"))) == 1, output[-2000:]
    goes_on(command, folder)


@pytest.mark.slow
def test_no_memory_left(run, tmp_path):
    """One row in sixteen is too long for what memory is left; what was saved before is whole."""
    folder, command = run
    make_llama(hidden=32, max_position_embeddings=8192).save_pretrained(tmp_path / "base")
    rows = [*ROWS, {"prompt": "say it: ", "completion": "it " * 2000}]
    Path(command[command.index("--dataset") + 1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*command, "--max_length", "6000", "--attn_implementation", "eager"]
    process = until_saved(command, folder, 1)
    size = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(process.pid, resource.RLIMIT_AS, (size + 10**8, size + 10**8))
    assert process.wait(timeout=300) == 2 and "error: out of memory" in folder.with_suffix(".log").read_text()
    goes_on(command, folder)


@pytest.mark.slow
def test_rows_that_are_gone(run):
    folder, command = run
    process = until_saved(command, folder, 2)
    process.kill(), process.wait()
    rows = Path(command[command.index("--dataset") + 1])
    rows.rename(rows.with_suffix(".gone"))
    done = ended([*command, "--resume_from_checkpoint", "true"])
    assert error_of(done).startswith(f"error: {rows}: no such file")
    rows.with_suffix(".gone").rename(rows)
    goes_on(command, folder)
