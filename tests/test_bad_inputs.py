"""
Generated bad inputs through the recipes: each ends in one line that names its cause and exit code 2, none in a stack
trace or a run, and what was in the output folder stays as it was.
"""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from faults.bad_configs import CONFIGS, CONTRARY
from faults.bad_folders import Folders, bad_checkpoints, bad_folders
from faults.bad_inputs import Bad, examples
from faults.bad_rows import ROWS
from faults.stages import World
from transformers import Trainer

common, *SCRIPTS = (importlib.import_module(name) for name in ("common", "sft", "reward", "ppo_ptx"))
MAIN = {script.__name__: script.main for script in SCRIPTS}
COUNTS = {"rows": 240, "configs": 300, "contrary": len(CONTRARY), "folders": 150, "checkpoints": 70}


def test_there_are_five_hundred():
    assert sum(COUNTS.values()) >= 500


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def good(world, tmp_path_factory) -> dict[str, dict[str, str]]:
    """Flags of each recipe with which it runs."""
    folder = tmp_path_factory.mktemp("good")
    files = {name: str(folder / f"{name}.jsonl") for name in ("demonstrations", "rankings", "prompts")}
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


@pytest.fixture
def quick(monkeypatch, tmp_path) -> None:
    def predict(*args, **kwargs):
        raise RuntimeError("a prediction of memory takes a second, and refuses nothing")

    monkeypatch.setattr(common, "predict", predict)
    monkeypatch.chdir(tmp_path)


class SilentPass(Exception):
    """A bad input was trained with."""


@pytest.fixture
def no_training(monkeypatch) -> None:
    def train(*args, **kwargs):
        raise SilentPass

    monkeypatch.setattr(Trainer, "train", train)


@pytest.fixture
def check(good, quick, tmp_path, capsys, monkeypatch):
    """Run the cases; all that is wrong is shown, not the first alone."""

    def run(cases: list[Bad], count: int, **flags: str) -> None:
        assert len(cases) == count
        wrong = []
        for case in cases:
            problem = run_of(case, {**good[case.stage], **flags}, tmp_path / "one", capsys, monkeypatch)
            if problem is not None:
                shown = case.what or {name: (content or b"")[:200] for name, content in case.files.items()}
                wrong.append(f"{case.stage} {case.flags} {shown}\n    {problem}")
        assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)

    return run


def run_of(case: Bad, good: dict[str, str], folder: Path, capsys, monkeypatch) -> str | None:
    """What is wrong with what the recipe made of a case; none if it refused it as it should."""
    shutil.rmtree(folder, ignore_errors=True)
    here, out = folder / "case", folder / "out"
    write({f"case/{name}": content for name, content in case.files.items()}, folder)
    write({"out/model.safetensors": b"an earlier model", "out/ema/notes": b"", "out/completions.jsonl": b"{}"}, folder)
    before = contents(out)
    own = {name: value.replace("HERE", str(here)) for name, value in case.flags.items()}
    in_file = yaml_of(here / "x.yaml")  # over which flags would go
    flags = {**good, "--output_dir": str(out)}
    flags = {**{name: text for name, text in flags.items() if name[2:] not in in_file}, **own}
    monkeypatch.setattr(sys, "argv", ["recipe", *(f"{name}={value}" for name, value in flags.items())])
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


def write(files: dict[str, bytes | None], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def yaml_of(file: Path) -> dict:
    try:
        return dict(yaml.safe_load(file.read_bytes()))
    except Exception:  # some are none
        return {}


def test_bad_rows(check, no_training):
    check(examples(ROWS, COUNTS["rows"]), COUNTS["rows"])


def test_bad_configs(check, no_training):
    check(examples(CONFIGS, COUNTS["configs"]), COUNTS["configs"])


@pytest.mark.filterwarnings("ignore:target_parameters")  # PEFT says so too
def test_settings_that_contradict_each_other_or_the_rows(check, no_training):
    check(CONTRARY, COUNTS["contrary"])


def test_bad_folders(check, no_training, world):
    paths = {"base": world.base, "sft": world.sft, **world.reward}
    folders = Folders({name: contents(Path(path)) for name, path in paths.items()})
    check(examples(bad_folders(folders), COUNTS["folders"]), COUNTS["folders"])


def test_bad_checkpoints(check, good, world, tmp_path, monkeypatch):
    lora = {"--use_peft": "true", "--lora_r": "2", "--save_strategy": "steps", "--save_steps": "1"}
    monkeypatch.setattr(common, "predict", lambda *_: {})
    runs = Folders()
    for stage, main in MAIN.items():
        flags = {**good[stage], **lora, "--output_dir": str(tmp_path / stage)}
        main([word for pair in flags.items() for word in pair])
        runs[stage] = contents(tmp_path / stage / "checkpoint-1")
    check(examples(bad_checkpoints(runs), COUNTS["checkpoints"]), COUNTS["checkpoints"], **lora)


def test_what_is_not_bad_runs(check, good, quick, no_training, tmp_path):
    """Else everything would be refused, whatever it is."""
    for stage, main in MAIN.items():
        with pytest.raises(SilentPass):
            main([word for pair in {**good[stage], "--output_dir": str(tmp_path / stage)}.items() for word in pair])
