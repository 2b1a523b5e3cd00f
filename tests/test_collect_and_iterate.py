"""Collecting completions, and the loop of collecting, labelling and training, on tiny models."""

import importlib
import json
import sys
import threading
import time
from pathlib import Path

import collect
import iterate
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructgpt_trl import RewardModel
from instructgpt_trl.data import InputError, load_rows

TINY = ["--max_new_tokens", "5", "--batch_size", "4"]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.fixture
def prompts(tmp_path) -> str:
    return write(tmp_path / "prompts.jsonl", [{"prompt": f"prompt {i}: ", "category": "qa"} for i in range(5)])


@pytest.fixture(scope="module")
def adapter(base_dir, tmp_path_factory) -> str:
    """A policy that is an adapter on the base, and says other things."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(folder)
    return str(folder)


def test_each_policy_gives_its_share(base_dir, adapter, prompts, tmp_path, capsys):
    output = tmp_path / "tasks.jsonl"
    collect.main(
        ["--policies", base_dir, adapter, "--dataset", prompts, "--output", str(output), "--completions", "5", *TINY]
    )
    rows = read(output)
    assert [row["prompt"] for row in rows] == [f"prompt {i}: " for i in range(5)]
    for row in rows:
        assert row["models"] == [base_dir] * 3 + [adapter] * 2 and row["category"] == "qa"
        assert len({text.strip() for text in row["completions"]}) == 5
    assert len({row["id"] for row in rows}) == 5
    out = capsys.readouterr().out
    assert "5 of 5 prompts, 0 with fewer than 5 completions" in out and "label.py --tasks" in out
    assert not list(tmp_path.glob("*.part"))
    collect.main(
        [
            "--policies",
            base_dir,
            adapter,
            "--dataset",
            prompts,
            "--output",
            str(tmp_path / "again.jsonl"),
            "--completions",
            "5",
            *TINY,
        ]
    )
    assert read(tmp_path / "again.jsonl") == rows


def test_it_goes_on_where_it_stopped(base_dir, prompts, tmp_path, monkeypatch, capsys):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "tasks.jsonl"
    flags = ["--policies", base_dir, "--dataset", prompts, "--completions", "4", *TINY]
    collect.main([*flags, "--output", str(whole)])
    draw, calls = collect.Sampler.draw, []

    def stop_at_the_third(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(collect.Sampler, "draw", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            collect.main([*flags, "--output", str(output)])
    part = output.with_name("tasks.jsonl.part")
    part.write_bytes(part.read_bytes() + b'{"policy": 0, "sta')  # killed while it wrote
    with pytest.raises(InputError, match="begun with other settings"):
        collect.main([*flags, "--output", str(output), "--seed", "1"])
    calls.clear()
    monkeypatch.setattr(collect.Sampler, "draw", lambda self, *args: calls.append(args) or draw(self, *args))
    collect.main([*flags, "--output", str(output)])
    assert len(calls) == 3 and read(output) == read(whole)  # a prompt a batch, two of five were there


def test_duplicates_are_left_out_and_counted(base_dir, prompts, tmp_path, monkeypatch, capsys):
    """A policy that says "a", "b" or "c" and no more."""
    said = iter("aabc" + "abca" * 100)
    monkeypatch.setattr(
        collect.Sampler, "draw", lambda self, prompts, each, seed: [[next(said) for _ in range(each)] for _ in prompts]
    )
    output = tmp_path / "tasks.jsonl"
    collect.main(["--policies", base_dir, "--dataset", prompts, "--output", str(output), *TINY])
    assert [row["completions"] for row in read(output)] == [["a", "b", "c"]] * 5
    assert "5 with fewer than 4" in capsys.readouterr().out
    monkeypatch.setattr(collect.Sampler, "draw", lambda self, prompts, each, seed: [["a"] * each for _ in prompts])
    with pytest.raises(InputError, match="no prompt has two completions that differ"):
        collect.main(["--policies", base_dir, "--dataset", prompts, "--output", str(tmp_path / "x.jsonl"), *TINY])


def test_conversations(base_dir, prompts, tmp_path):
    output = tmp_path / "tasks.jsonl"
    flags = ["--conversational", "--num_prompts", "2", *TINY]
    collect.main(["--policies", base_dir, "--dataset", prompts, "--output", str(output), *flags])
    rows = read(output)
    assert len(rows) == 2 and rows[0]["prompt"] == [{"role": "user", "content": "prompt 0: "}]
    assert all(one[0]["role"] == "assistant" for row in rows for one in row["completions"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--completions", "3"], "completions=3: expected a whole number from 4 to 9"),
        (["--temperature", "0"], "temperature=0"),
        (["--temperature", "inf"], "temperature=inf"),
        (["--num_prompts", "0"], "num_prompts=0"),
        (["--seed", "-1"], "seed=-1"),
        (["--attn_implementation", "nosuch"], "nosuch"),
        (["--output", "tasks.csv"], "ends with .jsonl"),
        (["--policies", "nowhere"], "nowhere: no such folder"),
        (["--batch_size", "0"], "batch_size=0"),
    ],
)
def test_wrong_settings_of_collect(base_dir, prompts, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        collect.main(["--policies", base_dir, "--dataset", prompts, "--output", str(tmp_path / "t.jsonl"), *flags])
    assert not list(tmp_path.glob("t.jsonl*"))  # nor what was drawn so far, since nothing was


def test_prompts_that_go_past_the_context(base_dir, gpt2_dir, prompts, tmp_path, capsys):
    flags = ["--dataset", prompts, "--output", str(tmp_path / "t.jsonl"), "--max_new_tokens", "300"]
    with pytest.raises(InputError, match="310 tokens, and the model has positions for .*; lower max_new_tokens"):
        collect.main(["--policies", gpt2_dir, *flags])
    collect.main(["--policies", base_dir, *flags, "--num_prompts", "1"])
    assert "1 of 1 prompts go past the 256 tokens" in capsys.readouterr().err


# The loop


@pytest.fixture
def loop(base_dir, prompts, tmp_path, monkeypatch):
    """A loop of two rounds of two prompts on a tiny model, its recipes run in this process; `ran` names them."""
    (tmp_path / "collect.yaml").write_text("max_new_tokens: 5\nbatch_size: 8\n")
    (tmp_path / "reward.yaml").write_text(
        "per_device_train_batch_size: 2\nmax_steps: 1\ngradient_checkpointing: false\nsave_strategy: 'no'\n"
    )
    (tmp_path / "ppo.yaml").write_text(
        "per_device_train_batch_size: 2\ngradient_accumulation_steps: 1\nmax_steps: 1\nmax_completion_length: 5\n"
        "gradient_checkpointing: false\nsave_strategy: 'no'\n"
    )
    ran: list[str] = []

    def recipe(name, config, flags):
        ran.append(name)
        script = importlib.import_module(name.removesuffix(".py"))
        script.main([*(["--config", str(config)] if config else []), *flags])

    monkeypatch.setattr(iterate, "recipe", recipe)
    made = iterate.Loop(
        sft=base_dir,
        dataset=Path(prompts),
        output_dir=tmp_path / "loop",
        rounds=2,
        num_prompts=2,
        reward_config=tmp_path / "reward.yaml",
        ppo_config=tmp_path / "ppo.yaml",
        collect_config=tmp_path / "collect.yaml",
        rank=lambda row: [1 + sorted(row["completions"]).index(text) for text in row["completions"]],
    )
    return made, ran


STAGES = ["collect.py", "reward.py", "ppo_ptx.py"]


def test_two_rounds_and_going_on(loop, base_dir, tmp_path):
    made, ran = loop
    made.run()
    assert ran == STAGES * 2
    first, second = (made.folder(n) for n in (1, 2))
    assert [row["prompt"] for row in read(first / "rankings.jsonl")] == ["prompt 0: ", "prompt 1: "]
    assert [row["prompt"] for row in read(second / "rankings.jsonl")] == ["prompt 2: ", "prompt 3: "]
    assert {model for row in read(first / "tasks.jsonl") for model in row["models"]} == {base_dir}
    both = {base_dir, str(first / "policy")}  # the SFT model's too, with which PPO starts again
    assert {model for row in read(second / "tasks.jsonl") for model in row["models"]} == both
    everything = load_rows(str(second / "all_rankings.jsonl"), "ranking")
    assert everything["prompt"] == [f"prompt {n}: " for n in range(4)]  # all rankings so far
    RewardModel.from_pretrained(str(second / "reward"))
    AutoModelForCausalLM.from_pretrained(second / "policy")
    made.run()
    assert ran == STAGES * 2  # all is there
    # A stage that was stopped is done again; at half a checkpoint nothing goes on
    (second / ".policy.finished").unlink()
    (second / "policy" / "checkpoint-1").mkdir()
    (second / "policy" / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    made.run()
    assert ran == [*STAGES * 2, "ppo_ptx.py"] and not (second / "policy" / "checkpoint-1").exists()
    AutoModelForCausalLM.from_pretrained(second / "policy")


def test_other_settings_are_refused(loop, tmp_path):
    made, ran = loop
    made._begin([{"prompt": "p"}] * 5)
    (tmp_path / "ppo.yaml").write_text("max_steps: 2\n")
    with pytest.raises(InputError, match="begun with other prompts, ppo_config"):
        made.run()
    assert ran == []


def test_a_round_without_labels_leaves_those_of_others(loop):
    made, ran = loop
    for number, text in ((1, '{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}\n'), (2, "")):
        made.folder(number).mkdir(parents=True)
        (made.folder(number) / "rankings.jsonl").write_text(text)
    made.reward(2)
    assert ran == ["reward.py"] and len(read(made.folder(2) / "all_rankings.jsonl")) == 1
    (made.folder(1) / "rankings.jsonl").write_text("")
    with pytest.raises(InputError, match="no rankings so far"):
        made.reward(1)


def test_it_waits_for_people(loop, monkeypatch, capsys):
    """Labels that come one by one, a skip among them, as recipes/label.py writes them."""
    made, _ = loop
    monkeypatch.setattr(iterate, "LOOK", 0.05)
    object.__setattr__(made, "rank", None)
    folder = made.folder(1)
    folder.mkdir(parents=True)
    tasks = [{"id": f"t{n}", "prompt": "p", "completions": ["a", "b"]} for n in range(3)]
    write(folder / "tasks.jsonl", tasks)

    def people():
        for n in (0, 1):
            time.sleep(0.1)
            with (folder / "rankings.jsonl").open("a") as file:
                file.write(
                    json.dumps({"id": str(n), "task": f"t{n}", **tasks[n], "ranks": [1, 2]} | {"task": f"t{n}"}) + "\n"
                )
        (folder / "rankings.skips.jsonl").write_text('{"id": "x", "task": "t2"}\n')

    thread = threading.Thread(target=people)
    thread.start()
    made.label(1)
    thread.join()
    out = capsys.readouterr().out
    assert (
        "label.py --tasks" in out and "waiting for 3 of 3 labels" in out and len(read(folder / "rankings.jsonl")) == 2
    )


def test_wrong_settings_of_the_loop(loop, base_dir, prompts, tmp_path, capsys):
    good = ["--sft", base_dir, "--dataset", prompts, "--output_dir", str(tmp_path / "out")]
    good += ["--reward_config", str(tmp_path / "reward.yaml"), "--ppo_config", str(tmp_path / "ppo.yaml")]
    (tmp_path / "judge.py").write_text("x = 1\n")
    for flags, message in (
        (["--rounds", "0"], "expected 1 or more"),
        (["--ppo_config", "nowhere.yaml"], "no such file"),
        (["--labeler", "judge.py"], "expected FILE.py:FUNCTION"),
        (["--labeler", f"{tmp_path / 'judge.py'}:rank"], "has no function rank"),
        (["--num_prompts", "3"], "5 prompts, of which 2 rounds of 3 want 6"),
    ):
        with pytest.raises(SystemExit):
            iterate.main([*good, *flags])
        assert message in capsys.readouterr().err


def test_a_recipe_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(iterate, "RECIPES", tmp_path)
    (tmp_path / "bad.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(InputError, match="bad.py ended with 3"):
        iterate.recipe("bad.py", None, [])
    assert sys.executable
