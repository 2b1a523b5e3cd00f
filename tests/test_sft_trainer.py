"""sft_trainer.py: neutral equals the parent; dropout, mix, score and adapters do exactly what they say."""

import json
import logging
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from conftest import make_gpt2, make_llama, make_tokenizer
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
)

from instructgpt_trl.checkpoints import RunStopped
from instructgpt_trl.data import InputError, pack_texts
from instructgpt_trl.models.lora import fuse_lora
from instructgpt_trl.models.reward_model import RewardModel
from instructgpt_trl.sft_config import SFTConfig
from instructgpt_trl.sft_trainer import SFTTrainer

SETTINGS = dict(
    num_train_epochs=2,
    per_device_train_batch_size=2,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
    report_to="none",
    bf16=False,
    use_cpu=True,
)
NEUTRAL = dict(residual_dropout=0.0)


def config(tmp_path, **settings) -> SFTConfig:
    return SFTConfig(str(tmp_path / "out"), **{**SETTINGS, **settings})


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def differs(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(first[name], second[name]) for name in first)


class ScriptedReward:
    """Scores one number an evaluation, whatever was said; a batch of it draws random numbers, as a model might."""

    def __init__(self, *means: float):
        self.means, self.calls, self.seen = means, 0, []

    def score(self, prompts, completions):
        torch.rand(3), random.random(), np.random.rand()
        self.seen.append((prompts, completions))
        mean = self.means[min(self.calls, len(self.means) - 1)]
        self.calls += 1
        return [mean + 0.5, mean - 0.5][: len(prompts)] if len(prompts) == 2 else [mean] * len(prompts)


# ---- neutral setting ----


def long_rows() -> Dataset:
    words = ["one", "two", "three", "four", "five" * 8]
    return Dataset.from_list([{"prompt": f"say {word}: ", "completion": f"{word} {word}"} for word in words])


@pytest.mark.parametrize(
    ("make", "settings", "adapter"),
    [
        (make_llama, {}, False),
        (make_llama, {"max_length": 20, "shuffle_dataset": True}, False),
        (make_llama, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}, False),
        (make_llama, {"max_length": None, "gradient_accumulation_steps": 2}, False),
        (make_llama, {}, True),
        (make_gpt2, {}, False),  # its own dropout of 0.1 stays on
    ],
)
def test_neutral_equals_the_parent(tmp_path, make, settings, adapter):
    settings = {**SETTINGS, "lr_scheduler_type": "linear", "adam_beta2": 0.95, **settings}
    trained = []
    for trainer_class, args in (
        (trl.SFTTrainer, trl.SFTConfig(str(tmp_path / "parent"), **settings)),
        (SFTTrainer, SFTConfig(str(tmp_path / "ours"), **settings, **NEUTRAL)),
    ):
        trainer = trainer_class(
            make(),
            args,
            train_dataset=long_rows(),
            eval_dataset=long_rows(),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=4, lora_dropout=0.1) if adapter else None,
        )
        start = weights(trainer)
        trainer.train()
        assert differs(start, weights(trainer))
        trained.append((start, weights(trainer), trainer.evaluate()["eval_loss"]))
    assert_same(trained[0][0], trained[1][0])
    assert_same(trained[0][1], trained[1][1])
    assert trained[0][2] == trained[1][2]


def test_neutral_equals_the_parent_from_a_folder(tmp_path, base_dir, demonstrations):
    """Bit for bit once the parent's adapter is computed as ours are, which rounds otherwise (test_lora.py)."""
    trained = []
    settings = {**SETTINGS, "lr_scheduler_type": "linear", "adam_beta2": 0.95}
    for trainer_class, args in (
        (trl.SFTTrainer, trl.SFTConfig(str(tmp_path / "parent"), **settings)),
        (SFTTrainer, SFTConfig(str(tmp_path / "ours"), **settings, **NEUTRAL)),
    ):
        trainer = trainer_class(base_dir, args, train_dataset=demonstrations, peft_config=LoraConfig(r=4))
        fuse_lora(trainer.model)
        trainer.train()
        trained.append(weights(trainer))
    assert_same(*trained)


def test_takes_the_parents_arguments_in_the_parents_order():
    import inspect

    parent = list(inspect.signature(trl.SFTTrainer.__init__).parameters)
    ours = inspect.signature(SFTTrainer.__init__).parameters
    assert list(ours)[: len(parent)] == parent
    assert [ours[name].default for name in list(ours)[len(parent) :]] == [None] * 3


# ---- training ----


def test_steps_schedule_and_betas_are_exact(tmp_path, demonstrations):
    args = config(tmp_path, num_train_epochs=3)
    trainer = SFTTrainer(make_llama(), args, train_dataset=demonstrations, processing_class=make_tokenizer())
    trainer.train()
    steps, peak = 6, 1e-2  # 4 rows, 2 a batch, 3 epochs
    assert trainer.state.global_step == steps
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    expected = [peak * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2) for step in range(steps + 1)]
    assert rates == pytest.approx(expected[:-1], rel=1e-12)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(peak / 10, rel=1e-12)
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.95)}


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_residual_dropout_acts_in_training_and_not_in_evaluation(tmp_path, demonstrations, make):
    model = make()

    def run(**settings):
        trainer = SFTTrainer(
            make(),
            config(tmp_path, num_train_epochs=1, per_device_train_batch_size=4, **settings),
            train_dataset=demonstrations,
            eval_dataset=demonstrations,
            processing_class=make_tokenizer(),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return trainer, before

    plain, before = run(residual_dropout=0.0)
    dropped, same = run(residual_dropout=0.2)
    assert before == same
    assert differs(weights(plain), weights(dropped))
    hooks = [sum(len(module._forward_hooks) for module in t.model.modules()) for t in (plain, dropped)]
    assert hooks[0] == hooks[1]
    assert dropped.model.config.to_dict() == plain.model.config.to_dict()
    assert getattr(model.config, "resid_pdrop", None) == getattr(dropped.model.config, "resid_pdrop", None)


def test_residual_dropout_equals_the_architectures_own(tmp_path, demonstrations):
    """GPT-2 with 0.2 in its config, trained by the parent, against ours that sets it."""
    trained = []
    for own, args in ((0.2, NEUTRAL), (0.05, {"residual_dropout": 0.2})):
        model = make_gpt2()
        for block in model.transformer.h:
            block.attn.resid_dropout.p = block.mlp.dropout.p = own
        trainer = SFTTrainer(
            model, config(tmp_path, **args), train_dataset=demonstrations, processing_class=make_tokenizer()
        )
        trainer.train()
        trained.append(weights(trainer))
    assert_same(*trained)


def test_unknown_architecture_is_refused_before_training(tmp_path, demonstrations):
    model = MambaForCausalLM(
        MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=256)
    )
    arguments = dict(train_dataset=demonstrations, processing_class=make_tokenizer())
    with pytest.raises(InputError, match="'mamba'.*residual_dropout=0"):
        SFTTrainer(model, config(tmp_path), **arguments)
    SFTTrainer(model, config(tmp_path, **NEUTRAL), **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_pitfall_12_runs_with_no_flags(tmp_path, monkeypatch, base_dir, demonstrations):
    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(base_dir, train_dataset=demonstrations)
    trainer.train()
    assert trainer.state.global_step == 16  # one batch of 8 holds the 4 rows
    trainer.save_model()
    folder = Path(f"{Path(base_dir).name}-SFT")
    assert_same(weights(trainer), dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()


def test_parents_config_is_taken(tmp_path, demonstrations):
    args = trl.SFTConfig(str(tmp_path / "out"), eos_token="<eos>", **SETTINGS)
    trainer = SFTTrainer(make_llama(), args, train_dataset=demonstrations, processing_class=make_tokenizer())
    assert isinstance(trainer.args, SFTConfig)
    assert (trainer.args.learning_rate, trainer.args.eos_token) == (1e-2, "<eos>")
    assert (trainer.args.lr_scheduler_type, trainer.args.residual_dropout) == ("linear", 0.2)


def test_pitfall_20_seeds(tmp_path, demonstrations):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    trained = []
    for caller_seed in (1, 2):
        model = make_llama()
        random.seed(caller_seed), np.random.seed(caller_seed), torch.manual_seed(caller_seed)
        before = states()
        trainer = SFTTrainer(model, config(tmp_path), train_dataset=demonstrations, processing_class=make_tokenizer())
        assert states() == before
        trainer.train()
        trained.append(weights(trainer))
    assert_same(*trained)


def test_pitfall_11_resume_is_exact(tmp_path, demonstrations, texts):
    def trainer():
        args = config(tmp_path, save_strategy="epoch", residual_dropout=0.2, pretraining_fraction=0.5)
        arguments = dict(train_dataset=demonstrations, pretraining_dataset=texts, processing_class=make_tokenizer())
        return SFTTrainer(make_llama(), args, **arguments)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))  # of 8 steps
    assert_same(weights(whole), weights(resumed))
    assert resumed.state.global_step == 8


# ---- rows ----


def test_pitfall_13_cut_rows_are_counted_and_named(tmp_path, caplog):
    rows = Dataset.from_list(
        [
            {"prompt": "p", "completion": "short"},
            {"prompt": "p", "completion": "x" * 30},
            {"prompt": "q" * 30, "completion": "c"},
            {"prompt": "p", "completion": "y" * 40},
        ]
    )
    with caplog.at_level(logging.WARNING, logger="instructgpt_trl"):
        trainer = SFTTrainer(
            make_llama(), config(tmp_path, max_length=20), train_dataset=rows, processing_class=make_tokenizer()
        )
    (line,) = [record.message for record in caplog.records if record.name.startswith("instructgpt_trl")]
    assert line.endswith(
        "train dataset, max_length=20: 2 of 4 rows shortened: rows 1, 3; 1 of 4 rows dropped, no label left: rows 2"
    )
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [7, 20, 20]  # one byte a token, then EOS


def test_no_row_left_is_an_error(tmp_path, demonstrations):
    with pytest.raises(InputError, match="train dataset: no row has a completion token within max_length=3; raise it"):
        SFTTrainer(
            make_llama(),
            config(tmp_path, max_length=3),
            train_dataset=demonstrations,
            processing_class=make_tokenizer(),
        )


def test_pitfall_16_wrong_input_is_refused_before_a_model_is_loaded(tmp_path, demonstrations):
    wrong = Dataset.from_list([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}])
    missing = str(tmp_path / "no such model")
    cases = [
        (dict(train_dataset=wrong), "train_dataset, row 1, column 'completion': the text is empty"),
        (dict(eval_dataset={"a": demonstrations, "b": wrong}), r"eval_dataset\['b'\], row 1, column 'completion'"),
        (dict(pretraining_dataset=demonstrations), "pretraining_dataset, row 0: column 'text' is missing"),
        (dict(prompt_dataset=demonstrations), "prompt_dataset: nothing scores it; give a reward_model"),
        (
            dict(reward_model=ScriptedReward(1)),
            "reward_model: its score is part of an evaluation.*give an eval_dataset",
        ),
        (
            dict(reward_model=ScriptedReward(1), prompt_dataset=demonstrations),
            "eval_strategy='no', no eval_dataset.*set eval_strategy to 'epoch'",
        ),
        (
            dict(reward_model=ScriptedReward(1), eval_dataset=Dataset.from_list([{"text": "t"}])),
            "eval_dataset: no column 'prompt'.*give a prompt_dataset",
        ),
        (
            dict(reward_model=ScriptedReward(1), eval_dataset=demonstrations, prompt_dataset=wrong.select([])),
            "prompt_dataset: no rows",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message) as error:
            SFTTrainer(missing, config(tmp_path), **{"train_dataset": demonstrations, **arguments})
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="metric_for_best_model='eval_rm_score'.*give a reward_model"):
        args = config(tmp_path, metric_for_best_model="rm_score", eval_strategy="epoch")
        SFTTrainer(missing, args, train_dataset=demonstrations, eval_dataset=demonstrations)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output folder .*file/out: cannot be written"):
        SFTTrainer(missing, SFTConfig(str(tmp_path / "file" / "out"), **SETTINGS), train_dataset=demonstrations)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_rows_that_the_caller_formats_or_prepares_pass(tmp_path):
    rows = Dataset.from_list([{"question": "p", "answer": "c"}])
    arguments = dict(train_dataset=rows, processing_class=make_tokenizer())
    trainer = SFTTrainer(make_llama(), config(tmp_path), **arguments, formatting_func=lambda row: row["question"])
    assert trainer.train_dataset[0]["input_ids"] == [*make_tokenizer()("p")["input_ids"], 257]
    args = config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
    assert SFTTrainer(make_llama(), args, **arguments).train_dataset is rows
    with pytest.raises(InputError, match="column 'prompt' is missing"):
        SFTTrainer(make_llama(), config(tmp_path), **arguments)


def test_streams_and_other_forms_train(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 4
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "p", "completion": "c"}] * 4))
    for dataset in (Dataset.from_list(rows), stream):
        args = config(tmp_path, max_steps=2)
        trainer = SFTTrainer(make_llama(), args, train_dataset=dataset, processing_class=make_tokenizer())
        trainer.train()
        assert trainer.state.global_step == 2


# ---- pretraining mix ----


def test_mix_counts_and_steps_are_exact(tmp_path, texts):
    rows = Dataset.from_list([{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(18)])
    trainer = SFTTrainer(
        make_llama(),
        config(tmp_path, max_length=32, num_train_epochs=3),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        pretraining_dataset=texts,
    )
    mixed = trainer.train_dataset
    assert len(mixed) == 20  # 18 are 90 %
    # One byte a token: the texts, each with EOS, cut every 32
    stream = [token for row in texts for token in [*make_tokenizer()(row["text"])["input_ids"], 257]]
    assert mixed[18]["input_ids"] == mixed[18]["labels"] == stream[:32]
    assert mixed[19]["input_ids"] == mixed[19]["labels"] == stream[32:64]
    assert len(trainer.eval_dataset) == 18
    trainer.train()
    assert trainer.state.global_step == 30  # 20 examples, 2 a batch, 3 epochs


def test_mix_is_neutral_at_zero(tmp_path, demonstrations, texts):
    trained = []
    for arguments in ({}, {"pretraining_dataset": texts}):
        trainer = SFTTrainer(
            make_llama(),
            config(tmp_path, pretraining_fraction=0.0, **NEUTRAL),
            train_dataset=demonstrations,
            processing_class=make_tokenizer(),
            **arguments,
        )
        trainer.train()
        trained.append(weights(trainer))
    assert_same(*trained)


def test_gradient_is_the_mean_over_the_tokens_of_both(tmp_path, demonstrations, texts):
    """One SGD step of size 1 on everything at once moves the weights by minus the gradient, computed here by hand."""
    tokenizer, model = make_tokenizer(), make_llama()
    nll, count = 0.0, 0
    examples = [
        ([*tokenizer(row["prompt"] + row["completion"])["input_ids"], 257], len(row["prompt"]))
        for row in demonstrations
    ]
    examples += [(block["input_ids"], 1) for block in pack_texts(texts, tokenizer, 24).select(range(4))]
    for ids, first in examples:
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nll = nll - sum(logprobs[t - 1, ids[t]] for t in range(first, len(ids)))
        count += len(ids) - first
    (nll / count).backward()
    expected = {name: p.detach() - p.grad for name, p in model.named_parameters()}

    settings = dict(num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1.0, max_grad_norm=0.0)
    trainer = SFTTrainer(
        make_llama(),
        config(tmp_path, **settings, **NEUTRAL, optim="sgd", max_length=24, pretraining_fraction=0.5),
        train_dataset=demonstrations,
        processing_class=tokenizer,
        pretraining_dataset=texts,
    )
    assert len(trainer.train_dataset) == 8
    trainer.train()
    for name, value in weights(trainer).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_blocks_fit_the_models_context_and_are_repeated_when_few(tmp_path, demonstrations, texts, caplog):
    # 2 texts of 33 bytes are 68 tokens with their EOS: 64 and 4
    model = make_llama(max_position_embeddings=64)
    with caplog.at_level(logging.WARNING, logger="instructgpt_trl"):
        trainer = SFTTrainer(
            model,
            config(tmp_path, pretraining_fraction=0.5),
            train_dataset=demonstrations,
            processing_class=make_tokenizer(),
            pretraining_dataset=texts.select(range(2)),
        )
    assert [len(ids) for ids in list(trainer.train_dataset["input_ids"])[4:]] == [64, 4, 64, 4]
    assert any("4 pretraining blocks of 64 tokens" in record.message for record in caplog.records)
    assert any("from 2 different blocks" in record.message for record in caplog.records)


def test_mix_from_a_folder_reads_its_context(tmp_path, base_dir, demonstrations, texts):
    args = config(tmp_path, pretraining_fraction=0.5, max_length=None)
    trainer = SFTTrainer(base_dir, args, train_dataset=demonstrations, pretraining_dataset=texts)
    assert [len(ids) for ids in list(trainer.train_dataset["input_ids"])[4:]] == [256] * 4


@pytest.mark.parametrize("strategy", ["wrapped", "bfd"])
def test_mix_comes_after_packing(tmp_path, demonstrations, texts, strategy):
    trainer = SFTTrainer(
        make_llama(),
        config(tmp_path, packing=True, packing_strategy=strategy, max_length=64, pretraining_fraction=0.5),
        train_dataset=demonstrations,
        processing_class=make_tokenizer(),
        pretraining_dataset=texts,
    )
    packed = len(trainer.train_dataset) // 2
    assert packed == 2  # 4 rows of 17, 17, 23 and 19 tokens with EOS: at most three fit, and 76 fill two blocks
    lengths = [len(ids) for ids in list(trainer.train_dataset["input_ids"])[packed:]]
    assert lengths == [64] * packed
    if strategy == "bfd":
        assert list(trainer.train_dataset["seq_lengths"])[packed:] == [[64]] * packed
    trainer.train()


def test_mix_refuses_what_it_cannot_do(tmp_path, demonstrations, texts):
    def build(**arguments):
        args = config(tmp_path, max_steps=1, **arguments.pop("settings", {}))
        defaults = dict(train_dataset=demonstrations, processing_class=make_tokenizer(), pretraining_dataset=texts)
        SFTTrainer(arguments.pop("model", make_llama()), args, **{**defaults, **arguments})

    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "p", "completion": "c", "text": "t"}]))
    with pytest.raises(InputError, match="train_dataset: mixing in.*IterableDataset"):
        build(train_dataset=stream)
    with pytest.raises(InputError, match="pretraining_dataset: mixing in.*IterableDataset"):
        build(pretraining_dataset=stream)
    with pytest.raises(InputError, match="skip_prepare_dataset=True.*leave it out"):
        build(settings={"dataset_kwargs": {"skip_prepare_dataset": True}})
    bloom = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=16, n_layer=2, n_head=2, pad_token_id=256))
    with pytest.raises(InputError, match="max_length=None.*set max_length"):
        build(model=bloom, settings={"max_length": None})


# ---- reward-model score ----


def scored(tmp_path, demonstrations, reward_model, arguments=None, **settings):
    args = config(
        tmp_path,
        **{
            "num_train_epochs": 3,
            "per_device_eval_batch_size": 2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "rm_score_max_new_tokens": 4,
            **settings,
        },
    )
    return SFTTrainer(
        make_llama(),
        args,
        train_dataset=demonstrations,
        processing_class=make_tokenizer(),
        **{"eval_dataset": demonstrations, "reward_model": reward_model, **(arguments or {})},
    )


def test_best_checkpoint_is_the_one_with_the_best_score(tmp_path, demonstrations):
    # Two batches an evaluation, so that each mean is of [x, x] per evaluation
    reward = ScriptedReward(1.0, 1.0, 3.0, 3.0, 2.0, 2.0)
    trainer = scored(
        tmp_path,
        demonstrations,
        reward,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rm_score",
        greater_is_better=True,
    )
    trainer.train()
    logged = [log["eval_rm_score"] for log in trainer.state.log_history if "eval_rm_score" in log]
    assert logged == [1.0, 3.0, 2.0]
    assert trainer.state.best_metric == 3.0
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    folders = [load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4, 6)]
    assert_same(folders[1], {name: value for name, value in weights(trainer).items() if name in folders[1]})
    assert differs(folders[0], folders[1]) and differs(folders[1], folders[2])


def test_early_stopping_sees_the_score(tmp_path, demonstrations):
    trainer = scored(
        tmp_path,
        demonstrations,
        ScriptedReward(3.0, 3.0, 1.0),
        {"callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]},
        load_best_model_at_end=True,
        metric_for_best_model="eval_rm_score",
    )
    trainer.train()
    assert trainer.state.global_step == 4


def test_the_score_changes_nothing_else(tmp_path, demonstrations):
    trained = []
    for reward in (None, ScriptedReward(1.0)):
        trainer = scored(tmp_path, demonstrations, reward, save_strategy="no", gradient_checkpointing=True)
        generation = trainer.model.generation_config.to_dict()
        trainer.train()
        assert trainer.model.is_activation_checkpointing
        trained.append(
            (weights(trainer), generation, [log["loss"] for log in trainer.state.log_history if "loss" in log])
        )
    assert_same(trained[0][0], trained[1][0])
    assert trained[0][1:] == trained[1][1:]

    for training in (True, False):
        trainer.model.train(training)
        torch.manual_seed(7)
        state = torch.get_rng_state()
        assert trainer._rm_score() == 1.0
        assert torch.equal(torch.get_rng_state(), state)
        assert trainer.model.training is training


def test_scored_are_greedy_completions_in_the_prompts_form(tmp_path, demonstrations):
    reward = ScriptedReward(1.0)
    chat = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}])
    texts = [{"prompt": "a: "}, {"prompt": "bb: "}, {"prompt": "ccc: "}]
    for rows in (Dataset.from_list(texts), chat):
        trainer = scored(tmp_path, demonstrations, reward, {"prompt_dataset": rows})
        assert trainer.evaluate()["eval_rm_score"] == 1.0
    assert [prompts for prompts, _ in reward.seen] == [["a: ", "bb: "], ["ccc: "], [chat[0]["prompt"]]]
    model, tokenizer = make_llama().eval(), make_tokenizer()
    expected = []
    for text in ("a: ", "bb: ", "ccc: ", "<user>hi<eos>\n<assistant>"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        expected.append(tokenizer.decode(ids[0, -4:], skip_special_tokens=True))
    completions = [completion for _, batch in reward.seen for completion in batch]
    assert completions == [*expected[:3], [{"role": "assistant", "content": expected[3]}]]


def test_pitfall_06_reward_model_from_a_folder_sees_the_ids_that_were_generated(tmp_path, demonstrations):
    torch.manual_seed(4)
    network = LlamaForSequenceClassification(LlamaConfig(**make_llama().config.to_diff_dict(), num_labels=1))
    folder = str(tmp_path / "reward")
    RewardModel(network, make_tokenizer(), bias=0.25).save_pretrained(folder)
    trainer = scored(tmp_path, demonstrations, folder, rm_score_max_new_tokens=3)
    found = trainer.evaluate()["eval_rm_score"]

    policy, tokenizer, expected = make_llama().eval(), make_tokenizer(), []
    for prompt in demonstrations["prompt"]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        # Pitfall 6: the ids that were generated, some of which are no text, and no EOS where none was generated
        for _ in range(3):
            ids = torch.cat([ids, policy(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        assert 257 not in ids
        expected.append(network(input_ids=ids).logits.item() + 0.25)
    assert found == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_several_evaluation_sets_share_one_score(tmp_path, demonstrations):
    reward = ScriptedReward(1.0)
    sets = {"first": demonstrations.select([0, 1]), "second": demonstrations.select([2])}
    trainer = scored(tmp_path, demonstrations, reward, {"eval_dataset": sets})
    metrics = trainer.evaluate()
    assert [prompts for prompts, _ in reward.seen] == [["say one: ", "say two: "], ["say three: "]]
    assert [key for key in metrics if "rm_score" in key] == ["eval_rm_score"]
    assert {"eval_first_loss", "eval_second_loss"} <= metrics.keys()


def test_other_sets_get_no_score(tmp_path, demonstrations):
    reward = ScriptedReward(1.0)
    trainer = scored(tmp_path, demonstrations, reward)
    for other in (demonstrations.select([0]), {"a": demonstrations.select([0])}):
        assert not [key for key in trainer.evaluate(other, metric_key_prefix="test") if "rm_score" in key]
    trainer.predict(trainer.eval_dataset)
    assert reward.calls == 0
    assert trainer.evaluate(metric_key_prefix="valid")["valid_rm_score"] == 1.0


def test_prompts_without_room_for_a_completion_are_named(tmp_path, demonstrations, caplog):
    rows = Dataset.from_list([{"prompt": "short"}, {"prompt": "x" * 253}, {"prompt": "y" * 252}])
    with caplog.at_level(logging.WARNING, logger="instructgpt_trl"):
        trainer = scored(tmp_path, demonstrations, ScriptedReward(1.0), {"prompt_dataset": rows})
    assert "1 of 3 validation prompts over 252 tokens dropped: rows 1 (" + "x" * 30 + "..)" in caplog.text
    assert len(trainer._score_prompts) == 2
    with pytest.raises(InputError, match="1 of 1 validation prompts over 252 tokens dropped.*none is left"):
        scored(tmp_path, demonstrations, ScriptedReward(1.0), {"prompt_dataset": rows.select([1])})


def test_pitfall_18_a_score_that_is_not_finite_stops(tmp_path, demonstrations):
    trainer = scored(tmp_path, demonstrations, ScriptedReward(float("nan")))
    with pytest.raises(RunStopped, match="step 2: the mean reward-model score is nan"):
        trainer.train()


# ---- adapters ----


@pytest.fixture
def adapter_dir(tmp_path, base_dir) -> str:
    """An adapter on `base_dir` that is not the identity, with a tokenizer that differs from the base's."""
    torch.manual_seed(9)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_dir), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    path = str(tmp_path / "adapter")
    model.save_pretrained(path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(path)
    return path


def test_adapter_folder_is_trained_on(tmp_path, base_dir, adapter_dir, demonstrations):
    trainer = SFTTrainer(adapter_dir, config(tmp_path), train_dataset=demonstrations)
    assert trainer.processing_class.chat_template == "{{ messages[0]['content'] }}"
    saved = load_file(Path(adapter_dir) / "adapter_model.safetensors")
    start = {name.replace(".default", ""): value for name, value in weights(trainer).items() if "lora" in name}
    assert_same(saved, start)
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(trainable) == len(saved) and all("lora" in name for name in trainable)

    trainer.train()
    trainer.save_model()
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(not torch.equal(after[name], saved[name]) for name in saved)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == base_dir
    base = dict(AutoModelForCausalLM.from_pretrained(base_dir).named_parameters())
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in weights(trainer).items()
        if "lora" not in name
    }
    assert_same(frozen, {name: p.detach() for name, p in base.items()})
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), tmp_path / "out")
    assert_same(weights(trainer), dict(reloaded.named_parameters()))


def test_adapter_folder_equals_the_parent_on_the_loaded_model(tmp_path, base_dir, adapter_dir, demonstrations):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir, is_trainable=True)
    settings = {**SETTINGS, "lr_scheduler_type": "linear", "adam_beta2": 0.95}
    parent = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path / "parent"), **settings),
        train_dataset=demonstrations,
        processing_class=make_tokenizer(),
    )
    ours = SFTTrainer(
        adapter_dir, SFTConfig(str(tmp_path / "ours"), **settings, **NEUTRAL), train_dataset=demonstrations
    )
    fuse_lora(parent.model)  # as ours are computed, which rounds otherwise
    parent.train()
    ours.train()
    assert_same(weights(parent), weights(ours))


def test_adapter_folder_keeps_its_shape_beside_a_peft_config(tmp_path, adapter_dir, demonstrations, caplog):
    trainer = SFTTrainer(adapter_dir, config(tmp_path), train_dataset=demonstrations, peft_config=LoraConfig(r=3))
    assert "keeps its own shape" in caplog.text
    saved = json.loads((Path(adapter_dir) / "adapter_config.json").read_text(encoding="utf-8"))
    assert trainer.model.peft_config["default"].r == saved["r"] != 3
    assert_same(load_file(Path(adapter_dir) / "adapter_model.safetensors"), get_peft_model_state_dict(trainer.model))


@pytest.mark.parametrize("fresh", [True, False])
def test_adapters_stay_float32_on_a_quantised_base(tmp_path, adapter_dir, base_dir, demonstrations, fresh):
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    base.is_loaded_in_4bit = True  # what the parent looks at
    model = base if fresh else PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)
    trainer = SFTTrainer(
        model,
        config(tmp_path),
        train_dataset=demonstrations,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4) if fresh else None,
    )
    lora = {name: p for name, p in trainer.model.named_parameters() if "lora" in name}
    assert {p.dtype for p in lora.values()} == {torch.float32}
    assert all(p.requires_grad for p in lora.values())
    if not fresh:
        saved = load_file(Path(adapter_dir) / "adapter_model.safetensors")
        assert_same(saved, {name.replace(".default", ""): p.detach() for name, p in lora.items()})


def test_adapter_is_chosen_by_score_too(tmp_path, adapter_dir, demonstrations):
    args = config(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_rm_score",
        rm_score_max_new_tokens=2,
    )
    trainer = SFTTrainer(
        adapter_dir,
        args,
        train_dataset=demonstrations,
        eval_dataset=demonstrations,
        reward_model=ScriptedReward(2.0, 1.0),
    )
    trainer.train()
    best = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")
    assert_same(best, {name.replace(".default", ""): p for name, p in weights(trainer).items() if "lora" in name})


def test_pitfall_18_a_gradient_that_is_no_number_stops_the_run(tmp_path, base_dir, demonstrations):
    trainer = SFTTrainer(base_dir, config(tmp_path, max_grad_norm=0.0), train_dataset=demonstrations)
    weight = next(p for name, p in trainer.model.named_parameters() if "down_proj" in name)
    weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RuntimeError, match=r"step 0: the gradient of .*down_proj.* is NaN or infinite"):
        trainer.train()


def test_pitfall_07_a_reward_model_of_another_tokenizer_is_refused(tmp_path, demonstrations):
    network = LlamaForSequenceClassification(LlamaConfig(**make_llama(vocab=259).config.to_diff_dict(), num_labels=1))
    folder = str(tmp_path / "reward")
    RewardModel(network, make_tokenizer(extra=("<x>",)), bias=0.0).save_pretrained(folder)
    with pytest.raises(InputError, match=f"the tokenizers of the model and {folder} differ"):
        scored(tmp_path, demonstrations, folder)


def test_single_tokens_of_a_tied_head_are_refused(tmp_path, demonstrations):
    model = make_llama(tie_word_embeddings=True)
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3])
    with pytest.raises(InputError, match="trainable_token_indices: TRL's loss does not read such an LM head"):
        SFTTrainer(
            model,
            config(tmp_path),
            train_dataset=demonstrations,
            processing_class=make_tokenizer(),
            peft_config=peft_config,
        )
