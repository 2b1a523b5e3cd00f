"""Nothing that comes with a model, its template or its rows is executed, unless its code is asked for by name."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from generate import Policy
from language_model import LanguageModel
from ppo_helpers import config, mean_id, save_reward_model, save_sft_adapter
from safetensors.torch import load_file

from instructgpt_trl import PPOTrainer, RewardConfig, RewardModel, RewardTrainer, SFTConfig, SFTTrainer
from instructgpt_trl.data import InputError, encode_completion, encode_prompt
from instructgpt_trl.models.loading import load_policy, load_tokenizer
from instructgpt_trl.models.reward_parts import reward_parts

TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def touched(tmp_path) -> Path:
    """A file that is there once somebody's code has run."""
    return tmp_path / "touched"


@pytest.fixture(params=["model", "adapter"])
def folder(request, tmp_path, touched) -> str:
    """A model, or an adapter on one, whose files name code of their own: for the config, the model, the tokenizer."""
    path, base = tmp_path / "it", tmp_path / "base"
    make_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    if request.param == "adapter":
        save_sft_adapter(str(base), str(path))
    else:
        path = base
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokens", None]}
    names["AutoModelForSequenceClassification"] = "own.Model"
    for one in {path, base}:
        (one / "own.py").write_text(f"open({str(touched)!r}, 'w').close()\nclass Config: pass\n")
        for name, changed in (("config.json", {"model_type": "own"}), ("tokenizer_config.json", {})):
            if (one / name).is_file():
                known = json.loads((one / name).read_text())
                known |= {"auto_map": names, **changed}
                known.pop("tokenizer_class", None)
                (one / name).write_text(json.dumps(known))
    return str(path)


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    """transformers asks at a terminal whether the code may run, and takes what goes wrong there for a no."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    yield
    assert asked == []


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch, tmp_path):
    """Code that runs is copied into a cache first."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_no_code_of_a_model_runs(folder, touched, tmp_path, prompts, rankings, demonstrations):
    calls = {
        "load_policy": lambda: load_policy(folder),
        "RewardModel": lambda: RewardModel.from_pretrained(folder),
        "SFTTrainer": lambda: SFTTrainer(folder, SFTConfig(str(tmp_path / "run")), train_dataset=demonstrations),
        "RewardTrainer": lambda: RewardTrainer(folder, RewardConfig(str(tmp_path / "run")), train_dataset=rankings),
        "eval/generate.py": lambda: Policy(folder),
        "eval/language_model.py": lambda: LanguageModel(folder),
        "PPOTrainer": lambda: PPOTrainer(folder, mean_id, args=config(tmp_path / "run"), train_dataset=prompts),
    }
    for name, call in calls.items():
        with pytest.raises(InputError, match="trust_remote_code|contains custom code"):
            call()
            pytest.fail(name)
        assert not touched.exists(), name
    try:
        load_tokenizer(folder)
    except InputError:
        pass
    assert not touched.exists()


def test_it_runs_where_it_is_asked_for_by_name(folder, touched):
    """Else the test above would hold nothing."""
    with pytest.raises(InputError):  # the code has no model in it
        load_policy(folder, trust_remote_code=True)
    assert touched.exists()


def test_weights_that_are_a_pickle_are_not_read(tmp_path, touched):
    make_llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors"):
        load_policy(str(tmp_path))


def test_a_reward_model_on_such_a_base_runs_nothing(folder, touched, tmp_path, base_dir, prompts):
    reward = save_reward_model(base_dir, str(tmp_path / "reward"), adapter=True)
    file = Path(reward, "adapter_config.json")
    base = folder if Path(folder, "config.json").is_file() else str(Path(folder).with_name("base"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(InputError, match="trust_remote_code"):
        RewardModel.from_pretrained(reward)
    with pytest.raises(InputError, match="trust_remote_code"):
        PPOTrainer(base_dir, reward_model=reward, args=config(tmp_path / "run"), train_dataset=prompts)
    assert reward_parts(reward).path == reward and not touched.exists()


EVIL = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch TOUCHED') }}",
    "self": "{{ self.__init__.__globals__.__builtins__.open('TOUCHED', 'w') }}",
    "imports": "{% import 'os' as os %}{{ os.system('touch TOUCHED') }}",
    "changes": "{{ messages.append(1) }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "includes": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("what", EVIL)
def test_a_template_reaches_nothing(tokenizer, touched, what):
    tokenizer.chat_template = EVIL[what].replace("TOUCHED", str(touched))
    for encode in (lambda: encode_prompt(tokenizer, TALK), lambda: encode_completion(tokenizer, TALK, "yes")):
        with pytest.raises(InputError, match="the chat template cannot render this conversation of [12] messages"):
            encode()
    assert not touched.exists()


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for", "{{ raise_exception('no system role') }}", "{{ 'a' + 1 }}", "{{ a.b.c }}"]
)
def test_a_template_that_fails_is_one_line(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="the chat template cannot render .* or chat_template in") as error:
        encode_prompt(tokenizer, TALK)
    assert "\n" not in str(error.value)


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_row_that_a_template_refuses_is_named(base_dir, tmp_path, stage):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM + tokenizer.chat_template
    talks = [TALK, TALK, [{"role": "system", "content": "be kind"}, *TALK], TALK]
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    rows = [{"prompt": talk, "completion": answers[0]} for talk in talks]
    ranked = [{"prompt": talk, "completions": answers, "ranks": [1, 2]} for talk in talks]
    calls = {
        "sft": lambda: SFTTrainer(
            base_dir, SFTConfig(str(tmp_path)), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        ),
        "reward": lambda: RewardTrainer(
            base_dir, RewardConfig(str(tmp_path)), train_dataset=Dataset.from_list(ranked), processing_class=tokenizer
        ),
        "ppo": lambda: PPOTrainer(
            base_dir,
            mean_id,
            args=config(tmp_path),
            train_dataset=Dataset.from_list(rows).select_columns("prompt"),
            processing_class=tokenizer,
        ),
    }
    with pytest.raises(InputError, match=r"train_dataset, row 2: the chat template cannot render .*no system role"):
        calls[stage]()


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{% include '/etc/passwd' %}", "../../etc/passwd", "<eos>"])
def test_a_row_is_text_and_no_template(tokenizer, text):
    """What it says stands in the prompt as it is."""
    ids = encode_prompt(tokenizer, [{"role": "user", "content": text}])
    assert tokenizer.decode(ids) == f"<user>{text}<eos>\n<assistant>"
