"""Generated bad inputs through the recipes: one line that names the cause, no stack trace, no folder damaged."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from faults.bad_inputs import ROWS, Bad, examples
from faults.stages import World
from transformers import Trainer

common, *SCRIPTS = (importlib.import_module(name) for name in ("common", "sft", "reward", "ppo_ptx"))
MAIN = {script.__name__: script.main for script in SCRIPTS}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def good(world, tmp_path_factory) -> dict[str, dict[str, str]]:
    """Flags of each recipe with which it would run."""
    folder = tmp_path_factory.mktemp("good")
    files = {name: str(folder / f"{name}.jsonl") for name in ("demonstrations", "rankings", "prompts", "texts")}
    for name, file in files.items():
        getattr(world, name).to_json(file)
    shared = {"--per_device_train_batch_size": "1", "--gradient_accumulation_steps": "2", "--report_to": "none"}
    shared |= {"--max_steps": "2", "--disable_tqdm": "true", "--model_name_or_path": world.base}
    ppo = {"--max_completion_length": "4", "--max_prompt_length": "64", "--reward_model": world.reward["lora"]}
    return {
        "sft": {**shared, "--dataset": files["demonstrations"]},
        "reward": {**shared, "--dataset": files["rankings"]},
        "ppo_ptx": {**shared, **ppo, "--dataset": files["prompts"]},
    }


class SilentPass(Exception):
    pass


def run_of(case: Bad, good: dict[str, str], folder: Path, capsys, monkeypatch) -> str | None:
    """What is wrong with what the recipe made of a case; none if it refused it as it should."""
    shutil.rmtree(folder, ignore_errors=True)
    here, out = folder / "case", folder / "out"
    for name, content in {**case.files, "../out/model.safetensors": b"an earlier model", "../out/notes": b""}.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).mkdir() if content is None else (here / name).write_bytes(content)
    before = contents(out)
    flags = {**good, "--output_dir": str(out), **{k: v.replace("HERE", str(here)) for k, v in case.flags.items()}}
    monkeypatch.setattr(sys, "argv", ["recipe", *(word for pair in flags.items() for word in pair)])
    try:
        common.run(MAIN[case.stage])
        return "silent pass"
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    if code != 2 or len(lines) != 1 or "Traceback" in captured.err:
        return f"not one line: {captured.err[-300:]}"
    for name in case.names:
        one_of = [one.replace("HERE", str(here)) for one in ([name] if isinstance(name, str) else name)]
        if not any(one in lines[0] for one in one_of):
            return f"{one_of} is not named in: {lines[0][:400]}"
    if contents(out) != before:
        return f"the output folder is another: {sorted(contents(out))}"
    return None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COUNTS = {"rows": 260}
KINDS = {"rows": ROWS}


@pytest.mark.parametrize("kind", COUNTS)
def test_every_bad_input_is_refused_with_its_cause(kind, good, tmp_path, capsys, monkeypatch):
    def train(*args, **kwargs):
        raise SilentPass

    monkeypatch.setattr(Trainer, "train", train)
    cases = examples(KINDS[kind], COUNTS[kind])
    assert len(cases) == COUNTS[kind]
    wrong = []
    for case in cases:
        problem = run_of(case, good[case.stage], tmp_path / "one", capsys, monkeypatch)
        if problem is not None:
            files = {name: (content or b"")[:200] for name, content in case.files.items()}
            wrong.append(f"{case.stage} {case.flags} {files}\n    {problem}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
