"""recipes/plan.py: what it prints, and that the recipes take the files it writes."""

import importlib
from dataclasses import replace
from pathlib import Path

import common
import pytest
import yaml
from conftest import make_llama
from transformers import LlamaConfig, Qwen2Config

from instructgpt_trl import PPOConfig, RewardConfig, SFTConfig
from instructgpt_trl.memory import peak, predict

PLAN = importlib.import_module("plan")
RECIPES = {"sft": SFTConfig, "reward": RewardConfig, "ppo_ptx": PPOConfig}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Only a config.json: no weights, no tokenizer."""
    path = tmp_path_factory.mktemp("shape")
    make_llama(hidden=32, max_position_embeddings=64).config.save_pretrained(path)
    return str(path / "config.json")


def planned(capsys, model, output_dir, *flags: str) -> list[str]:
    sizes = ["--prompt", "16", "--completion", "16", "--completions", "4", "--tokens_per_second", "1000"]
    PLAN.main(["--model", model, "--output_dir", str(output_dir), *sizes, *flags])
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str) -> list[str]:
    return next(line for line in lines if line.startswith(name)).removeprefix(name).split()


def test_three_stages_that_fit_and_settings_that_the_recipes_take(capsys, model, tmp_path):
    lines = planned(capsys, model, tmp_path, "--gpu", "1")
    assert row(lines, "GB") == ["sft", "reward", "ppo_ptx"]
    assert row(lines, "of 0.9") == ["fits"] * 3
    for part in PLAN.PARTS:
        assert len(row(lines, part)) == 3
    assert all(int(rows) >= 1 for rows in row(lines, "rows a pass"))
    # 1,000 demonstrations twice, 1,000 rankings of 4, all of 32 tokens; 10,000 episodes, 32 tokens in 3 and 4/3 passes
    assert "sft 0.0, reward 0.0, ppo_ptx 0.4" in "\n".join(lines)
    for name, config in RECIPES.items():
        settings = yaml.safe_load((tmp_path / f"{name}.yaml").read_text(encoding="utf-8"))
        batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        assert batch == (32 if name == "sft" else 64)
        settings["bf16"] = False  # which a config refuses without a GPU
        file = tmp_path / f"{name}-cpu.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        flags = ["--config", str(file), "--output_dir", str(tmp_path / "out")]
        _, read = common.parse_arguments(flags, (common.ModelConfig, config))
        assert read.per_device_train_batch_size == settings["per_device_train_batch_size"]


def test_what_does_not_fit_says_which_part(capsys, model, tmp_path):
    lines = planned(capsys, model, tmp_path, "--gpu", "0.0001", "--recipe", "sft")
    assert row(lines, "of 0.0") == ["context", "too", "large"]
    assert row(lines, "rows a pass") == ["0"]
    assert "(context too large)" in (tmp_path / "sft.yaml").read_text(encoding="utf-8")


def test_hours_are_measured_here(capsys, model, tmp_path):
    flags = ["--gpu", "1", "--recipe", "sft", "--prompt", "16", "--completion", "16", "--output_dir", str(tmp_path)]
    PLAN.main(["--model", model, *flags])
    text = capsys.readouterr().out
    assert "hours on this CPU, not the card" in text and "tokens/s trained" in text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "no/such"], "--model no/such: .* give an id, a folder or a config.json"),
        (["--model", "MODEL", "--recipe", "dpo"], "--recipe dpo: expected one of sft, reward, ppo_ptx"),
        (["--model", "MODEL/../nosuch.json"], "no such config.json"),
        (["--model", "MODEL", "--gpu", "nan"], "gpu=nan: expected a number above 0"),
        (["--model", "MODEL", "--gpu", "0"], "gpu=0.0"),
        (["--model", "MODEL", "--gpu", "inf"], "gpu=inf"),
        (["--model", "MODEL", "--tokens_per_second", "0"], "tokens_per_second=0.0"),
        (["--model", "MODEL", "--prompt", "0"], "prompt=0"),
        (["--model", "MODEL", "--completion", "-1"], "completion=-1"),
        (["--model", "MODEL", "--completions", "1"], "completions=1"),
        (["--model", "MODEL", "--rankings", "-1"], "rankings=-1"),
        (["--model", "MODEL", "--dtype", "nn"], "--dtype nn: expected one of float32, bfloat16, float16"),
        (["--model", "MODEL", "--optim", "x"], "--optim x: expected one of adamw_torch"),
        (["--model", "MODEL", "--load_in_4bit", "--full"], "quantised weights are not trained"),
    ],
)
def test_wrong_arguments_are_one_line(model, tmp_path, flags, message):
    flags = [flag.replace("MODEL", model) for flag in flags]
    with pytest.raises(common.InputError, match=message) as error:
        PLAN.main([*flags, "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


CARDS = {  # hidden size, intermediate size, layers, heads, key-value heads, words, tied
    "qwen2.5_0.5b_4gb": (896, 4864, 24, 14, 2, 151936, True),
    "llama3.2_3b_8gb": (3072, 8192, 28, 24, 8, 128256, True),
}


@pytest.mark.parametrize("card", CARDS)
def test_the_table_of_a_card_is_what_is_predicted_for_its_settings(card):
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    *sizes, tied = CARDS[card]
    cls = Qwen2Config if "qwen" in card else LlamaConfig
    config = cls(**dict(zip(names.split(), sizes, strict=True)), tie_word_embeddings=tied)
    folder = Path(PLAN.__file__).parent / "configs" / card
    table = folder.joinpath("README.md").read_text(encoding="utf-8").splitlines()
    settings = yaml.safe_load((folder / "ppo_ptx.yaml").read_text(encoding="utf-8"))
    args = PLAN.Arguments(model=card, gpu=1, load_in_4bit=settings["load_in_4bit"], dtype=settings["dtype"])
    load = replace(
        PLAN.load_of(args, "ppo_ptx"),
        rows=settings["per_device_train_batch_size"],
        sampled=settings["generation_micro_batch_size"],
    )
    parts = predict(config, load)
    for part in PLAN.PARTS:
        assert float(row(table, part)[2]) == pytest.approx(parts[part] / 1e9, abs=0.0051), part
    assert float(row(table, "peak")[2]) == pytest.approx(peak(parts) / 1e9, abs=0.0051)
    assert f"predicted peak {peak(parts) / 1e9:.2f} of" in (folder / "ppo_ptx.yaml").read_text(encoding="utf-8")
