"""The recipes by command line: the chain on a tiny model, what a user gets wrong, every YAML file and command."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from instructgpt_trl import PPOConfig, RewardConfig, RewardModel, SFTConfig
from instructgpt_trl.data import InputError

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
common, *SCRIPTS = (importlib.import_module(name) for name in ("common", "sft", "reward", "ppo_ptx"))
SFT, REWARD, PPO = SCRIPTS
MAIN = {script.__name__: script for script in SCRIPTS}
CONFIG = {"sft": SFTConfig, "reward": RewardConfig, "ppo_ptx": PPOConfig}

YAMLS = sorted((RECIPES / "configs").rglob("*.yaml"))
REQUIRED = {
    "sft": ["--model_name_or_path", "M", "--dataset", "D.jsonl"],
    "reward": ["--model_name_or_path", "M", "--dataset", "D.jsonl"],
    "ppo_ptx": ["--model_name_or_path", "M", "--dataset", "D.jsonl", "--reward_model", "RM"],
}
TINY = ["--per_device_train_batch_size", "2", "--num_train_epochs", "1", "--gradient_checkpointing", "false"]
TINY_PPO = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "2"]
TINY_PPO += ["--max_completion_length", "6", "--ptx_max_length", "16", "--ptx_ratio", "1"]

DEMONSTRATIONS = [
    {"prompt": f"say {word}: ", "completion": f"{word} {word}"} for word in ("one", "two", "three", "four")
]
RANKINGS = [{"prompt": f"{i}: ", "completions": ["a", "bb", "ccc"], "ranks": [2, 1, 3]} for i in range(5)]
PROMPTS = [{"prompt": f"prompt {i}"} for i in range(6)]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def rows(tmp_path) -> dict[str, str]:
    """Files of rows, under the names that printed commands have for them."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"plain text number {i}" for i in range(16)), encoding="utf-8")
    return {
        "demonstrations": write(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS),
        "RANKINGS.jsonl": write(tmp_path / "rankings.jsonl", RANKINGS),
        "PROMPTS.jsonl": write(tmp_path / "prompts.jsonl", PROMPTS),
        "TEXT.txt": str(text),
    }


def printed(output: str) -> tuple[str, list[str]]:
    """Folder and next command, from the last two lines of a run."""
    model, then = output.strip().splitlines()[-2:]
    assert model.startswith("model: ") and then.startswith("next:  ")
    return model.removeprefix("model: "), shlex.split(then.removeprefix("next:  "))


def fill(command: list[str], rows: dict[str, str], script: str) -> list[str]:
    """The flags of a printed command, its placeholders filled in."""
    assert command[0] == "python" and Path(command[1]).resolve() == RECIPES / script
    return [rows.get(word, word) for word in command[2:]]


@pytest.mark.parametrize("peft", [[], ["--use_peft", "--lora_r", "2"]], ids=["full", "lora"])
def test_chain_by_the_printed_commands(peft, base_dir, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = bool(peft)
    flags = ["--model_name_or_path", base_dir, "--dataset", rows["demonstrations"], "--output_dir", "out/SFT"]
    SFT.main([*flags, *peft, *TINY, "--pretraining_dataset", rows["TEXT.txt"]])
    folder, command = printed(capsys.readouterr().out)
    assert folder == "out/SFT"
    assert (tmp_path / folder / "adapter_config.json").is_file() is adapter
    assert command[2:] == [
        *("--model_name_or_path", "out/SFT", "--dataset", "RANKINGS.jsonl"),
        *("--demonstrations", rows["demonstrations"], "--output_dir", "out/reward"),
    ]

    REWARD.main([*fill(command, rows, "reward.py"), *TINY, "--eval_fraction", "0.2"])
    output = capsys.readouterr().out
    folder, command = printed(output)
    assert folder == "out/reward"
    # one ranking is held out, of lengths 1, 2, 3 (and EOS) with ranks 2, 1, 3: the longer one wins 1 pair of 3
    assert re.search(r"held-out accuracy: [01]\.\d{4}   'the longer one wins': 0\.3333\n", output)
    assert command[2:] == [
        *("--model_name_or_path", "out/SFT", "--reward_model", "out/reward"),
        *("--dataset", "PROMPTS.jsonl", "--ptx_dataset", "TEXT.txt", "--output_dir", "out/ppo_ptx"),
    ]
    reward_model = RewardModel.from_pretrained(folder)
    scores = reward_model.score(*([row[column] for row in DEMONSTRATIONS] for column in ("prompt", "completion")))
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-5)

    PPO.main(
        [*fill(command, rows, "ppo_ptx.py"), *TINY_PPO, "--eval_fraction", "0.2", "--per_device_eval_batch_size", "2"]
    )
    folder, command = printed(capsys.readouterr().out)
    assert folder == "out/ppo_ptx"
    assert (tmp_path / folder / "adapter_config.json").is_file() is adapter
    history = json.loads((tmp_path / folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert any("eval_objective/scores" in line for line in history)

    assert command[:2] == ["python", "-c"]
    exec(command[2], {})  # generates with the policy
    assert "Your prompt" in capsys.readouterr().out


@pytest.mark.parametrize("prefix_sharing, shared", [("auto", 3), ("off", 1)])
def test_the_reward_recipe_predicts_the_largest_step_of_its_rows(
    base_dir, rows, tmp_path, monkeypatch, prefix_sharing, shared
):
    """Two prompts a pass, each with three completions of up to three tokens and EOS behind a prompt of three."""
    loads, predict = [], common.predict
    monkeypatch.setattr(common, "predict", lambda config, load: (loads.append(load), predict(config, load))[1])
    flags = ["--model_name_or_path", base_dir, "--dataset", rows["RANKINGS.jsonl"], "--save_strategy", "no"]
    flags += ["--output_dir", str(tmp_path / "RM"), "--prefix_sharing", prefix_sharing, "--use_peft"]
    REWARD.main([*flags, *TINY, "--max_steps", "1"])
    (load,) = loads
    assert (load.stage, load.rows, load.shared, load.prompt, load.completion) == ("reward", 6, shared, 3, 4)


def test_the_reward_recipe_predicts_what_fits_of_longer_rows(base_dir, tmp_path):
    """A prompt over the limit is left out; in what fits, long completions take most."""
    config = RewardConfig("out", max_length=10, use_cpu=True)
    of = {"ranks": [1, 2], "completions": ["a" * 30, "b" * 4]}
    for text, expected in (("p" * 40, (1, 9)), ("pp", (1, 9))):
        found = REWARD.sizes(config, ModelConfig(base_dir), Dataset.from_list([{"prompt": text, **of}]))
        assert (found["prompt"], found["completion"]) == expected
    short = Dataset.from_list([{"prompt": "p" * 40, "ranks": [1, 2], "completions": ["a", "bb"]}])
    found = REWARD.sizes(config, ModelConfig(base_dir), short)
    assert (found["prompt"], found["completion"]) == (7, 3)  # two letters and the end


def test_an_adapter_that_goes_on_is_predicted_as_trained(base_dir, tmp_path):
    """PEFT saves adapters as frozen."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), LoraConfig()).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).inference_mode
    config, model = RewardConfig("out", use_cpu=True), ModelConfig(str(tmp_path))
    sizes = {"stage": "reward", "rows": 1, "prompt": 1, "completion": 1}
    assert not common._load_of(config, model, sizes).lora.inference_mode


def test_conversational_rows_and_the_yaml_file_beside_this_one(base_dir, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sft", "reward"):
        (tmp_path / f"{name}.yaml").write_text("num_train_epochs: 7\nmax_steps: 1\n", encoding="utf-8")
    flags = ["--config", "sft.yaml", "--model_name_or_path", base_dir, "--dataset", rows["demonstrations"]]
    SFT.main([*flags, "--output_dir", "SFT", "--conversational", "--save_strategy", "no"])
    _, command = printed(capsys.readouterr().out)
    assert command[2:4] == ["--config", "reward.yaml"] and command[-1] == "--conversational"
    REWARD.main([*fill(command, rows, "reward.py"), "--save_strategy", "no", "--per_device_train_batch_size", "2"])
    state = json.loads(Path("reward/trainer_state.json").read_text(encoding="utf-8"))
    assert (state["num_train_epochs"], state["global_step"]) == (1, 1)  # one step is within the first epoch
    messages = [
        ([{"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": row["completion"]}])
        for row in DEMONSTRATIONS
    ]
    scores = RewardModel.from_pretrained("reward").score(*zip(*messages, strict=True))
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-5)
    _, command = printed(capsys.readouterr().out)
    evaluation = ["--eval_fraction", "0.2", "--per_device_eval_batch_size", "2", "--eval_on_start", "true"]
    PPO.main([*fill(command, rows, "ppo_ptx.py"), *TINY_PPO, *evaluation])
    completions = [json.loads(line) for line in Path("ppo_ptx/completions.jsonl").read_text("utf-8").splitlines()]
    assert {row["prompt"][0]["role"] for row in completions} == {"user"}
    # Once before the first step and once after the last
    evaluated = [json.loads(line) for line in Path("ppo_ptx/eval_completions.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in evaluated] == [0, 0, 2, 2]
    _, command = printed(capsys.readouterr().out)
    exec(command[2], {})
    assert "{'role': 'assistant', 'content'" in capsys.readouterr().out


def test_what_is_held_out_shares_no_prompt_with_the_rest():
    pairs = [{"prompt": f"p{i % 5}", "completions": [f"a{i}", "b"], "ranks": [1, 2]} for i in range(20)]
    rows, held_out = common.split_by_prompt(Dataset.from_list(pairs), 0.4, seed=3)
    assert len(set(rows["prompt"])) == 3 and len(set(held_out["prompt"])) == 2
    assert len(rows) == 12 and not set(rows["prompt"]) & set(held_out["prompt"])
    assert sorted(map(str, [*rows, *held_out])) == sorted(map(str, pairs))
    whole = Dataset.from_list([{**pair, "prompt": ""} for pair in pairs])  # the prompt stands in both texts
    assert [len(part) for part in common.split_by_prompt(whole, 0.4, seed=3)] == [12, 8]
    single = Dataset.from_list([{"prompt": str(i)} for i in range(20)])
    expected = single.train_test_split(0.25, seed=3)
    assert [part["prompt"] for part in common.split_by_prompt(single, 0.25, seed=3)] == [
        expected["train"]["prompt"],
        expected["test"]["prompt"],
    ]


def test_accelerate_launch_of_ppo(folders, rows, tmp_path):
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / "ppo_ptx.py")),
        *("--model_name_or_path", folders.sft, "--reward_model", folders.reward_adapter),
        *("--dataset", rows["PROMPTS.jsonl"], "--ptx_dataset", rows["TEXT.txt"], "--output_dir", str(tmp_path / "P")),
        *TINY_PPO,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "P" / "adapter_model.safetensors").is_file() and "2/2" in result.stderr


def sft_flags(base_dir, rows, output_dir) -> list[str]:
    model, dataset = ("--model_name_or_path", base_dir), ("--dataset", rows["demonstrations"])
    return [*model, *dataset, "--output_dir", str(output_dir)]


def test_accelerate_launch_without_a_config(base_dir, rows, tmp_path):
    flags = sft_flags(base_dir, rows, tmp_path / "S")
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / "sft.py"), *flags, *TINY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder, command = printed(result.stdout)
    assert folder == str(tmp_path / "S") and (tmp_path / "S" / "model.safetensors").is_file()
    assert command[:2] == ["python", "recipes/reward.py"]
    assert "1/1" in result.stderr  # a progress bar


def test_python_prints_one_line_and_exits_with_2(base_dir, rows, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [*DEMONSTRATIONS, {"prompt": "p"}])
    flags = ["--model_name_or_path", base_dir, "--dataset", rows, "--output_dir", str(tmp_path / "S")]
    script = [sys.executable, str(RECIPES / "sft.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert re.fullmatch(f"error: {re.escape(rows)}, row 5: column 'completion' is missing.*\n", result.stderr)
    assert result.stdout == "" and not (tmp_path / "S").exists()


def refused(script, argv: list[str], capsys, monkeypatch) -> str:
    """The one line that a recipe prints before it exits with 2."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
    with pytest.raises(SystemExit) as exit:
        common.run(script.main)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == "" and "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert lines[-1].startswith("error: ") and sum("error" in line for line in lines) == 1
    return lines[-1]


GOOD = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
BAD_ROWS = {
    "missing column": ("sft", [{"prompt": "p"}], "row 1: column 'completion' is missing"),
    "not a string": ("sft", [{"prompt": "p", "completion": 3}], "row 1, column 'completion': expected a string"),
    "empty completion": ("sft", [{"prompt": "p", "completion": " "}], "row 1, column 'completion': the text is empty"),
    "no rows": ("sft", [], "no rows; expected"),
    "ranks of another length": (
        "reward",
        [GOOD, GOOD | {"ranks": [1]}],
        "row 2, column 'ranks': expected a list of 2",
    ),
    "K = 1": (
        "reward",
        [GOOD | {"completions": ["a"], "ranks": [1]}],
        "row 1, column 'completions': expected a list of",
    ),
    "NaN": ("reward", [GOOD | {"ranks": [1, float("nan")]}], "row 1, rank 1: expected an integer >= 1"),
    "empty completion of a ranking": (
        "reward",
        [GOOD | {"completions": ["a", ""]}],
        "row 1, completion 1: the text is",
    ),
    "only ties": ("reward", [GOOD | {"ranks": [1, 1]}], "none of its 1 rankings is left"),
    "no prompt": ("ppo_ptx", [{"text": "p"}], "row 1: column 'prompt' is missing"),
    "fewer prompts than a batch": ("ppo_ptx", [{"prompt": "p"}], "1 prompts, less than one batch of 8"),
}


@pytest.fixture(scope="session")
def reward_dir(base_dir, tmp_path_factory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("reward"), make_tokenizer())


def save_reward_model(folder: Path, tokenizer) -> str:
    from transformers import LlamaForSequenceClassification

    config = make_llama(vocab=len(tokenizer)).config
    config.num_labels = 1
    RewardModel(LlamaForSequenceClassification(config), tokenizer).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("name, rows, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_wrong_rows(name, rows, message, base_dir, reward_dir, tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "rows.jsonl", rows)
    argv = ["--model_name_or_path", base_dir, "--dataset", file, "--output_dir", tmp_path / "out"]
    line = refused(
        MAIN[name], argv + (["--reward_model", reward_dir] if name == "ppo_ptx" else []), capsys, monkeypatch
    )
    assert message in line
    assert file in line or "ties" in message or "batch" in message or "left" in message
    assert not (tmp_path / "out").exists()


def without_eos(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))


def with_a_new_pad_token(folder: Path) -> None:
    tokenizer = make_tokenizer(extra=("<new>",))
    tokenizer.pad_token = "<new>"
    tokenizer.save_pretrained(folder)


def with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_text_ends(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": "x"}))


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_eos, "no EOS token"),
        (with_a_new_pad_token, "its pad_token has the id 258, and the model 258 embeddings"),
        (with_nan, "model.norm.weight is NaN or infinite before the first step"),
        (of_text_ends, "eos_token_id='x': expected whole numbers"),
    ],
)
def test_models_that_cannot_be_trained(
    name, change, message, base_dir, rows, reward_dir, tmp_path, capsys, monkeypatch
):
    model = Path(shutil.copytree(base_dir, tmp_path / "model"))
    change(model)
    file = {"sft": "demonstrations", "reward": "RANKINGS.jsonl", "ppo_ptx": "PROMPTS.jsonl"}[name]
    argv = ["--model_name_or_path", model, "--dataset", rows[file], "--output_dir", tmp_path / "out", *TINY]
    argv += ["--reward_model", reward_dir, "--max_completion_length", "6"] if name == "ppo_ptx" else []
    assert message in refused(MAIN[name], argv, capsys, monkeypatch)
    assert not list((tmp_path / "out").glob("*"))


def test_a_classifier_is_no_model_for_sft(reward_dir, rows, tmp_path, capsys, monkeypatch):
    line = refused(SFT, sft_flags(reward_dir, rows, tmp_path / "out"), capsys, monkeypatch)
    assert "a LlamaForSequenceClassification, which generates nothing" in line


@pytest.mark.parametrize("name", MAIN)
def test_texts_beyond_learned_positions(name, gpt2_dir, reward_dir, tmp_path, capsys, monkeypatch):
    long = "word " * 100
    row = {"prompt": long, "completion": "a", "completions": ["a", "b"], "ranks": [1, 2]}
    kept = {"sft": "prompt completion", "reward": "prompt completions ranks", "ppo_ptx": "prompt"}[name].split()
    file = write(tmp_path / "rows.jsonl", [{key: row[key] for key in kept}] * 64)
    argv = ["--model_name_or_path", gpt2_dir, "--dataset", file, "--output_dir", tmp_path / "out", *TINY]
    argv += ["--reward_model", reward_dir, "--max_completion_length", "6"] if name == "ppo_ptx" else []
    line = refused(MAIN[name], argv, capsys, monkeypatch)
    assert re.search(r"train_dataset.*: 50\d tokens, and the model has positions for \d+; lower .*length", line)


@pytest.mark.parametrize("name", ["model_name_or_path", "reward_model", "the base of model_name_or_path"])
def test_what_is_read_is_not_written_over(name, base_dir, reward_dir, rows, tmp_path, capsys, monkeypatch):
    model, reward = shutil.copytree(base_dir, tmp_path / "base"), shutil.copytree(reward_dir, tmp_path / "reward")
    output = reward if name == "reward_model" else model
    if name.startswith("the base"):
        network = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2))
        network.save_pretrained(tmp_path / "adapter")
        model = tmp_path / "adapter"
    argv = ["--model_name_or_path", model, "--reward_model", reward, "--dataset", rows["PROMPTS.jsonl"]]
    line = refused(PPO, [*argv, "--output_dir", f"{output}/../{output.name}"], capsys, monkeypatch)
    assert f"is {name}, which would be lost" in line


def test_a_folder_of_a_reward_model_takes_no_other(base_dir, reward_dir, rows, capsys, monkeypatch):
    line = refused(SFT, sft_flags(base_dir, rows, reward_dir), capsys, monkeypatch)
    assert "holds a reward model; give another folder" in line


@pytest.mark.parametrize("text", ['{"a": 1}\n', "x\n", "[1]\n", '{"step": "x"}\n', None])
def test_a_file_of_completions_that_is_none(text, base_dir, reward_dir, rows, tmp_path, capsys, monkeypatch):
    file = tmp_path / "out" / "completions.jsonl"
    file.mkdir(parents=True) if text is None else (file.parent.mkdir(), file.write_text(text))
    argv = ["--model_name_or_path", base_dir, "--reward_model", reward_dir, "--dataset", rows["PROMPTS.jsonl"]]
    argv += ["--output_dir", file.parent, *TINY_PPO, "--max_prompt_length", "64"]
    line = refused(PPO, argv, capsys, monkeypatch)
    assert "not a file of completions that a run has written" in line
    assert text is None or file.read_text() == text


def test_a_link_to_nowhere_and_a_name_that_is_too_long(base_dir, rows, tmp_path, capsys, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    line = refused(SFT, sft_flags(base_dir, rows, tmp_path / "link" / "out"), capsys, monkeypatch)
    assert "is a link to nowhere" in line
    for name in ("output_dir", "dataset", "model_name_or_path"):
        flags = [*sft_flags(base_dir, rows, tmp_path / "out"), f"--{name}", "x" * 300]
        assert "File name too long" in refused(SFT, flags, capsys, monkeypatch)


def test_reward_model_of_another_tokenizer(base_dir, rows, tmp_path, capsys, monkeypatch):
    other = save_reward_model(tmp_path / "other", make_tokenizer(extra=("<new>",)))
    argv = ["--model_name_or_path", base_dir, "--dataset", rows["PROMPTS.jsonl"], "--reward_model", other]
    line = refused(PPO, [*argv, "--output_dir", tmp_path / "out"], capsys, monkeypatch)
    assert "vocabulary of 258 and 259 tokens ('<new>' is None and 258)" in line
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_written(base_dir, rows, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    argv = ["--model_name_or_path", base_dir, "--dataset", rows["demonstrations"]]
    for folder in ("file", "file/SFT"):
        line = refused(SFT, [*argv, "--output_dir", tmp_path / folder], capsys, monkeypatch)
        assert f"{tmp_path / folder}: cannot be written" in line and "choose another" in line
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


BAD_ARGUMENTS = {
    "unknown key": ("learning_rte: 1e-5", [], "FILE: unknown key 'learning_rte'; did you mean 'learning_rate'?"),
    "unknown key before a missing flag": (
        "datset: x",
        ["--dataset"],
        "FILE: unknown key 'datset'; did you mean 'dataset'?",
    ),
    "key like no other": ("qqqq: 1", [], "FILE: unknown key 'qqqq'; --help lists all there are"),
    "not a mapping": ("- learning_rate", [], "FILE must contain a YAML mapping"),
    "not YAML": ("a: [1", [], "FILE: while parsing a flow sequence"),
    "not a number": (
        "learning_rate: fast",
        [],
        "FILE: argument --learning_rate/--learning-rate: invalid float value: 'fast'",
    ),
    "out of range": ("residual_dropout: 1.5", [], "FILE: residual_dropout=1.5: expected a number from 0 to below 1"),
    "no such file": (None, [], "FILE: No such file or directory; give the path of a YAML file"),
    "unknown flag": ("", ["--learning_rte", "1"], "unknown key '--learning_rte'; did you mean '--learning_rate'?"),
    "no abbreviations": (
        "seed: 1",
        ["--learning_r", "1"],
        "unknown key '--learning_r'; did you mean '--learning_rate'?",
    ),
    "no model": ("seed: 1", ["--model_name_or_path"], "--model_name_or_path is missing"),
    "no such model": (
        "model_name_or_path: nowhere",
        ["--model_name_or_path"],
        "--model_name_or_path nowhere: no such folder",
    ),
    "no dataset": ("seed: 1", ["--dataset"], "the following arguments are required: --dataset"),
    "evaluation of nothing": (
        "eval_strategy: epoch",
        [],
        "eval_strategy=epoch: no rows for it; give eval_fraction or",
    ),
    "a share above 1": ("eval_fraction: 2", [], "eval_fraction=2 of 4 prompts: expected a number between 0 and 1"),
    "a share that leaves nothing": ("eval_fraction: 0.9", [], "eval_fraction=0.9 of 4 prompts: expected a number b"),
    "no checkpoint of that name": (
        "resume_from_checkpoint: nowhere",
        [],
        "--resume_from_checkpoint nowhere: no checkpoint there",
    ),
    "no checkpoint": (
        "seed: 1",
        ["--resume_from_checkpoint", "true"],
        "--resume_from_checkpoint true: no checkpoint there",
    ),
    "no such modules": (
        "lora_target_modules: foo",
        ["--use_peft", "true"],
        "Target modules foo not found in the base model",
    ),
    "no such rows": ("dataset: nowhere.jsonl", ["--dataset"], "nowhere.jsonl: no such file"),
}


@pytest.mark.parametrize("text, change, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_wrong_arguments(text, change, message, base_dir, rows, tmp_path, capsys, monkeypatch):
    """`change` is a required flag to leave out, or a flag and its value to add."""
    flags = {"--model_name_or_path": base_dir, "--dataset": rows["demonstrations"], "--output_dir": tmp_path / "out"}
    if len(change) == 1:
        del flags[change[0]]
    argv = [str(word) for item in flags.items() for word in item] + (change if len(change) == 2 else [])
    file = tmp_path / "file.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    if text != "":
        argv += ["--config", str(file)]
    line = refused(SFT, argv, capsys, monkeypatch)
    assert message.replace("FILE", str(file)) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "missing, message", [("config.json", "neither config.json nor"), ("tok*", "no tokenizer is in")]
)
def test_an_incomplete_model_folder(missing, message, base_dir, rows, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(base_dir, folder)
    for file in folder.glob(missing):
        file.unlink()
    assert message in refused(SFT, sft_flags(str(folder), rows, tmp_path / "o"), capsys, monkeypatch)


def test_resuming_by_flag_goes_on_from_the_last_checkpoint(base_dir, rows, tmp_path):
    flags = sft_flags(base_dir, rows, tmp_path / "S")
    flags += [*TINY, "--save_strategy", "steps", "--save_steps", "1", "--residual_dropout", "0"]
    SFT.main([*flags, "--max_steps", "1"])
    SFT.main([*flags, "--max_steps", "2", "--resume_from_checkpoint", "true"])
    log = json.loads((tmp_path / "S" / "trainer_state.json").read_text(encoding="utf-8"))
    assert log["global_step"] == 2 and (tmp_path / "S" / "checkpoint-2").is_dir()


def test_a_run_that_diverges_ends_in_one_line(base_dir, rows, tmp_path, capsys, monkeypatch):
    flags = [*sft_flags(base_dir, rows, tmp_path / "S"), "--learning_rate", "1e30"]
    line = refused(SCRIPTS[0], [*flags, *TINY], capsys, monkeypatch)
    assert "is NaN or infinite, so the run stops" in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: no room"),
    ],
)
def test_no_memory_is_one_line(error, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit):
        common.run(main)
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory (") and "lower per_device_train_batch_size" in line
    assert line.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback():
    def main(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        common.run(main)


def recipe_of(file: Path) -> str:
    return "sft" if file.stem.startswith("sft") else file.stem


def parse(recipe: str, argv: list[str]):
    return common.parse_arguments(
        argv, (MAIN[recipe].Arguments, CONFIG[recipe], common.ModelConfig), output_dir="runs"
    )


CARDS = ("qwen2.5_0.5b_4gb", "qwen2.5_1.5b_6gb", "llama3.2_3b_8gb", "qwen2.5_7b_12gb")


def test_there_is_a_file_for_every_recipe():
    names = {f"{file.parent.name}/{file.stem}" for file in YAMLS}
    folders = ("paper_1b3", "smollm2_135m_cpu", *CARDS)
    assert names == {f"{folder}/{name}" for folder in folders for name in MAIN} | {"paper_1b3/sft_rlhf_start"}


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_yaml_file_is_parsed_and_every_value_arrives(file, tmp_path):
    recipe = recipe_of(file)
    groups = parse(recipe, ["--config", str(file), *REQUIRED[recipe]])
    for key, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        assert [getattr(group, key) for group in groups if hasattr(group, key)] == [value], key
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(file.read_text(encoding="utf-8") + "\nwrong_key: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match="wrong_key"):
        parse(recipe, ["--config", str(wrong), *REQUIRED[recipe]])


def test_batches_of_the_paper_files():
    """[P C.1-C.4]: 32 demonstrations, 64 rankings, 512 episodes in minibatches of 64, 256,000 episodes."""

    def config(name: str):
        file = RECIPES / "configs" / "paper_1b3" / f"{name}.yaml"
        return parse(recipe_of(file), ["--config", str(file), *REQUIRED[recipe_of(file)]])[1]

    for name, batch in {"sft": 32, "sft_rlhf_start": 32, "reward": 64, "ppo_ptx": 64}.items():
        stage = config(name)
        assert stage.per_device_train_batch_size * stage.gradient_accumulation_steps == batch, name
    ppo = config("ppo_ptx")
    assert ppo.per_device_train_batch_size * ppo.steps_per_generation == 512
    assert ppo.max_steps * 64 == 256_000 * ppo.num_iterations
    assert ppo.save_steps % (512 // 64) == 0  # checkpoints at the end of an update


@pytest.mark.parametrize("card", CARDS)
def test_files_of_a_card_have_the_papers_batches_and_say_that_they_did_not_run(card):
    folder = RECIPES / "configs" / card
    assert "not run on such a card" in (folder / "README.md").read_text(encoding="utf-8").splitlines()[0]
    for name, batch in {"sft": 32, "reward": 64, "ppo_ptx": 64}.items():
        file = folder / f"{name}.yaml"
        assert "Not run on such a machine" in file.read_text(encoding="utf-8").splitlines()[0]
        stage = parse(name, ["--config", str(file), *REQUIRED[name]])[1]
        assert stage.per_device_train_batch_size * stage.gradient_accumulation_steps == batch
    assert stage.per_device_train_batch_size * stage.steps_per_generation == 512
    assert (stage.max_prompt_length, stage.max_completion_length) == (512, 256)


def commands() -> list[tuple[str, list[str]]]:
    """Every command that starts a recipe in the README files, with the file it stands in."""
    found = []
    for file in (ROOT / "README.md", *sorted((RECIPES / "configs").rglob("README.md"))):
        text = file.read_text(encoding="utf-8").replace("\\\n", " ") if file.is_file() else ""
        for line in re.findall(
            r"^\s*((?:python|accelerate launch)[^\n]* recipes/(?:sft|reward|ppo_ptx)\.py .*)$", text, re.M
        ):
            found.append((str(file.relative_to(ROOT)), shlex.split(line)))
    return found


def test_commands_of_the_readme_files_are_parsed(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(commands()) >= 5
    for file, words in commands():
        at = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
        try:
            parse(Path(words[at]).stem, words[at + 1 :])
        except InputError as error:
            raise AssertionError(f"{file}: {shlex.join(words)}") from error
