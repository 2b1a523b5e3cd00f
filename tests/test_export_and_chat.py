"""recipes/export.py merges an adapter, recipes/chat.py talks to what the stages wrote."""

import builtins
import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructgpt_trl.data import InputError

EXPORT, CHAT, COMMON = (importlib.import_module(name) for name in ("export", "chat", "common"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_is_the_adapter_on_its_base(folders, tmp_path, capsys, dtype):
    out = tmp_path / "merged"
    EXPORT.main(["--model_name_or_path", folders.sft, "--output_dir", str(out), "--dtype", dtype])
    difference = float(re.search("mean difference ([0-9.]+) nats", capsys.readouterr().out)[1])
    assert difference <= (1e-4 if dtype == "float32" else 0.05)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert type(merged).__name__ == "LlamaForCausalLM" and merged.dtype == getattr(torch, dtype)
    apart = AutoPeftModelForCausalLM.from_pretrained(folders.sft, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folders.base, dtype=torch.float32)
    ids = torch.arange(65, 97)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits.float() for model in (merged, apart, base)]
    tolerance = 1e-4 if dtype == "float32" else 0.2
    assert (logits[0] - logits[1]).abs().max() < tolerance < (logits[2] - logits[1]).abs().max()
    saved, tokenizer = AutoTokenizer.from_pretrained(out), make_tokenizer()
    assert saved.chat_template == tokenizer.chat_template and saved("ab<eos>") == tokenizer("ab<eos>")


def test_a_merge_that_does_not_agree_is_not_written(folders, tmp_path):
    flags = ["--model_name_or_path", folders.sft, "--output_dir", str(tmp_path / "o"), "--tolerance", "-1"]
    with pytest.raises(InputError, match="over tolerance=-1.0, nothing is written"):
        EXPORT.main(flags)
    assert not (tmp_path / "o" / "config.json").exists()


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_merge_that_does_nothing_is_not_written(folders, tmp_path, monkeypatch, scale):
    """However little the adapter does, and so however close to the merged model the base is."""
    adapter = tmp_path / "adapter"
    model = AutoPeftModelForCausalLM.from_pretrained(folders.sft, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= scale
    model.save_pretrained(adapter)
    make_tokenizer().save_pretrained(adapter)
    monkeypatch.setattr("peft.tuners.lora.Linear.merge", lambda self, *args, **kwargs: None)
    flags = ["--model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "o"), "--dtype", "float32"]
    with pytest.raises(InputError, match="nothing is written"):
        EXPORT.main(flags)
    assert not (tmp_path / "o" / "config.json").exists()


def test_a_folder_that_holds_something_is_not_written_to(folders, tmp_path):
    """Adapter and merged model in one folder would be neither."""
    adapter = shutil.copytree(folders.sft, tmp_path / "adapter")
    before = sorted(path.name for path in Path(adapter).iterdir())
    with pytest.raises(InputError, match="adapter: it is not empty; give another output_dir"):
        EXPORT.main(["--model_name_or_path", str(adapter), "--output_dir", str(adapter)])
    assert sorted(path.name for path in Path(adapter).iterdir()) == before


@pytest.mark.parametrize("name", ["reward_adapter", "reward_full"])
def test_nobody_talks_to_a_reward_model(folders, name):
    with pytest.raises(InputError, match="is a reward model, which generates nothing; give a policy"):
        CHAT.main(["--model_name_or_path", getattr(folders, name)])


@pytest.mark.parametrize("name, message", [("base", "only an adapter has"), ("reward_adapter", "is a reward model")])
def test_what_cannot_be_merged_is_refused(folders, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        EXPORT.main(["--model_name_or_path", getattr(folders, name), "--output_dir", str(tmp_path / "o")])


@pytest.fixture
def say(monkeypatch):
    """Lines typed at the prompt, then the end of the input."""

    def lines(*typed: str) -> None:
        left = iter(typed)

        def ask(prompt: str) -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", ask)

    return lines


def test_a_conversation_grows_until_it_starts_afresh(folders, say, monkeypatch, capsys):
    prompts = []

    def answer(model, tokenizer, prompt, args):
        prompts.append(prompt)
        return f"answer {len(prompts)}"

    monkeypatch.setattr(CHAT, "answer", answer)
    say("one", "", "two", "/new", "three", "/quit", "four")
    CHAT.main(["--model_name_or_path", folders.sft, "--system", "be kind", "--reward_model", folders.reward_adapter])
    system = {"role": "system", "content": "be kind"}
    user = [{"role": "user", "content": text} for text in ("one", "two", "three")]
    first = {"role": "assistant", "content": "answer 1"}
    assert prompts == [[system, user[0]], [system, user[0], first, user[1]], [system, user[2]]]
    assert capsys.readouterr().out.count("[score ") == 3


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_answers_are_printed_as_they_come(folders, say, capsys, temperature):
    """Sampled from the adapter, by the seed; the end of the input ends it."""
    printed = []
    for _ in range(2):
        say("hello")
        flags = ["--model_name_or_path", folders.sft, "--max_new_tokens", "8", "--temperature", temperature]
        CHAT.main(flags)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].strip()


def test_an_answer_ends_where_the_templates_turn_ends():
    """As a base model under ChatML, whose own EOS is another token."""
    tokenizer, model = make_tokenizer(extra=("<end>",)), make_llama(vocab=259)
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<end>")
    model.generation_config.eos_token_id = 77
    assert COMMON.ends_of(model, tokenizer, [{"role": "user", "content": "hi"}]) == [77, 258]
    assert COMMON.ends_of(model, tokenizer, "hi") == [77, 257]


@pytest.mark.parametrize("recipe", ["export", "chat"])
@pytest.mark.parametrize("weights", ["renamed", "none"])
def test_an_adapter_that_does_not_fit_is_refused(folders, tmp_path, recipe, weights):
    folder = Path(shutil.copytree(folders.sft, tmp_path / "adapter"))
    state = load_file(folder / "adapter_model.safetensors")
    state = {name.replace("layers.0", "layers.7"): x for name, x in state.items()} if weights == "renamed" else {}
    save_file(state, folder / "adapter_model.safetensors")
    flags = ["--model_name_or_path", str(folder)]
    with pytest.raises(InputError, match="the adapter does not fit its base|no adapter_model"):
        if recipe == "export":
            EXPORT.main([*flags, "--output_dir", str(tmp_path / "out")])
        else:
            CHAT.main(flags)
    assert not (tmp_path / "out").exists()


def test_a_system_message_needs_a_template(folders, tmp_path):
    folder = shutil.copytree(folders.sft, tmp_path / "adapter", ignore=shutil.ignore_patterns("chat_template*"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="has no chat template to put it into"):
        CHAT.main(["--model_name_or_path", str(folder), "--system", "be kind"])


OUT_OF_RANGE = [("temperature", "-1"), ("temperature", "nan"), ("top_p", "0"), ("max_new_tokens", "0"), ("seed", "-1")]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_settings_out_of_range_are_one_line(folders, name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        CHAT.main(["--model_name_or_path", folders.sft, f"--{name}", value])
