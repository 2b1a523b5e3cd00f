"""Reward-model training: K-way rankings, the head, the bias, and equality with TRL where nothing is added."""

import copy
import json
import logging
import math
import random
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import trl
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from instructgpt_trl import RewardConfig, RewardModel, RewardTrainer
from instructgpt_trl.data import InputError
from instructgpt_trl.models.reward_network import head_of

EOS = 257


def make_args(tmp_path, config=RewardConfig, **settings):
    defaults = dict(
        output_dir=str(tmp_path / "out"),
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        bf16=False,
        use_cpu=True,
    )
    return config(**{**defaults, **settings})


def make_network(seed: int = 0, **config):
    causal = make_llama(seed, **config)
    causal.config.num_labels = 1
    network = AutoModelForSequenceClassification.from_config(causal.config)
    network.model.load_state_dict(causal.model.state_dict())
    with torch.no_grad():
        network.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return network


@pytest.fixture
def sft_dir(tmp_path, base_dir) -> str:
    """An SFT adapter on `base_dir` with weights that matter, and a tokenizer with a template of its own."""
    torch.manual_seed(2)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    path = str(tmp_path / "sft")
    network.save_pretrained(path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{# sft #}" + tokenizer.chat_template
    tokenizer.save_pretrained(path)
    return path


def plain_score(network, tokenizer, prompt: str, completion: str) -> float:
    """The head at the last token of one text, without padding and without the trainer."""
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"] + [EOS]
    with torch.no_grad():
        hidden = network.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(hidden.double() @ network.score.weight[0].double())


def all_scores(network, tokenizer, rows) -> tuple[np.ndarray, list[int], list[int]]:
    scores = [plain_score(network, tokenizer, row["prompt"], text) for row in rows for text in row["completions"]]
    ranks = [rank for row in rows for rank in row["ranks"]]
    return np.array(scores), ranks, [len(row["ranks"]) for row in rows]


def whole_batch(trainer) -> dict:
    return trainer.data_collator(list(trainer.train_dataset))


# Neutral setting


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("prompted", [True, False], ids=["explicit_prompt", "implicit_prompt"])
@pytest.mark.parametrize("sharing", ["off", "on"])
def test_two_completions_a_prompt_equal_the_parent(tmp_path, center, prompted, sharing):
    """In float64, so that the order of the completions in a batch, which differs, does not show."""
    words = ["good", "bad one", "x", "some longer text", "yes", "no!", "maybe so", "zz"]
    rows = [{"prompt": f"prompt {i}: ", "chosen": words[i], "rejected": words[(3 * i + 1) % 8]} for i in range(8)]
    if not prompted:
        rows = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in rows]
    settings = dict(
        learning_rate=1e-3,
        max_steps=5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_length=None,
        center_rewards_coefficient=center,
        lr_scheduler_type="constant",
    )
    trained = []
    for trainer_class in (trl.RewardTrainer, RewardTrainer):
        args = make_args(tmp_path, trl.RewardConfig, **settings)
        args.prefix_sharing = sharing
        trainer = trainer_class(
            model=make_network().double(),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        trained.append((dict(trainer.model.named_parameters()), logs))
    (theirs, their_logs), (ours, our_logs) = trained
    start = dict(make_network().double().named_parameters())
    assert theirs.keys() == ours.keys()
    for name, parameter in theirs.items():
        assert (parameter - start[name]).abs().max() > 1e-3, name  # they did move
        # Llama's norms compute in float32, which shows where the sums are others
        torch.testing.assert_close(ours[name], parameter, atol=1e-10 if sharing == "off" else 1e-6, rtol=0)
    assert len(our_logs) == 5
    for theirs, ours in zip(their_logs, our_logs, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


# Loss


@pytest.mark.parametrize("center", [None, 0.1])
def test_ragged_rankings_with_ties_have_the_papers_loss(tmp_path, rankings, tokenizer, center):
    network = make_network().eval()
    scores, ranks, sizes = all_scores(network, tokenizer, rankings)
    expected = reference.ranking_loss(scores, ranks, sizes)
    if center is not None:
        prompts = [pairs for pairs in reference.untied_pairs(ranks, sizes) if pairs]
        expected += center * np.mean([np.mean([(scores[i] + scores[j]) ** 2 for i, j in pairs]) for pairs in prompts])
    args = make_args(tmp_path, center_rewards_coefficient=center)
    trainer = RewardTrainer(network, args, train_dataset=rankings, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_one_forward_holds_all_completions_of_the_prompts_of_a_batch(tmp_path, rankings, tokenizer):
    for sharing, rows in (("off", 3 + 2 + 5 + 4), ("on", 4)):  # every completion once, or every prompt
        network, sizes = make_network(), []
        args = make_args(tmp_path, per_device_train_batch_size=2, num_train_epochs=1, prefix_sharing=sharing)
        trainer = RewardTrainer(network, args, train_dataset=rankings, processing_class=tokenizer)
        network.model.register_forward_hook(
            lambda module, arguments, keywords, output, sizes=sizes: sizes.append(len(keywords["input_ids"])),
            with_kwargs=True,
        )
        trainer.train()
        assert trainer.state.global_step == 2
        assert len(sizes) == 2  # two batches, two forwards
        assert sum(sizes) == rows


def test_the_gradient_is_that_of_all_untied_pairs(tmp_path, tokenizer):
    """K = 3 with a tie: the mean of two pairs, differentiated through three separate forwards."""
    rows = [{"prompt": "p: ", "completions": ["one", "three three", "x"], "ranks": [2, 1, 2]}]
    network = make_network()
    twin = copy.deepcopy(network)
    outputs = []
    for text in rows[0]["completions"]:
        ids = tokenizer("p: " + text)["input_ids"] + [EOS]
        outputs.append(twin.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ twin.score.weight[0])
    loss = sum(torch.log1p(torch.exp(outputs[k] - outputs[1])) for k in (0, 2)) / 2
    loss.backward()
    args = make_args(tmp_path)
    trainer = RewardTrainer(network, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.compute_loss(trainer.model, whole_batch(trainer)).backward()
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(tmp_path, rankings, base_dir, peft_config):
    trained = []
    for checkpointing in (False, True):
        args = make_args(tmp_path, learning_rate=1e-3, max_steps=3, gradient_checkpointing=checkpointing)
        trainer = RewardTrainer(base_dir, args, train_dataset=rankings, peft_config=peft_config)
        trainer.train()
        assert trainer.model.is_activation_checkpointing == checkpointing
        trained.append(dict(trainer.model.named_parameters()))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=1e-6, rtol=0)


# Metrics


def test_evaluation_metrics_are_over_all_prompts_and_pairs(tmp_path, rankings, tokenizer):
    """Batches of 3 and 1 prompts: a mean of batch means would be another number."""
    network = make_network()
    scores, ranks, sizes = all_scores(network, tokenizer, rankings)
    pairs = reference.untied_pairs(ranks, sizes)
    flat = [pair for prompt in pairs for pair in prompt]
    args = make_args(tmp_path, per_device_eval_batch_size=3)
    trainer = RewardTrainer(network, args, train_dataset=rankings, eval_dataset=rankings, processing_class=tokenizer)
    for metrics in (trainer.evaluate(), trainer.evaluate(rankings), trainer.evaluate(trainer.eval_dataset)):
        expected = {
            "eval_loss": reference.ranking_loss(scores, ranks, sizes),
            "eval_accuracy": reference.ranking_accuracy(scores, ranks, sizes),
            "eval_prompt_accuracy": np.mean([np.mean([scores[w] > scores[l] for w, l in prompt]) for prompt in pairs]),
            "eval_margin": np.mean([scores[w] - scores[l] for w, l in flat]),
            "eval_min_reward": scores.min(),
            "eval_mean_reward": scores.mean(),
            "eval_max_reward": scores.max(),
            "eval_score_std": scores.std(),
            "eval_tied_pairs": 3 * 1 + 10 + 6 + 1 - len(flat),
            "eval_shortened_rows": 0,
        }
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, abs=1e-4), name


def test_training_metrics_are_those_since_the_last_log(tmp_path, rankings, tokenizer):
    network = make_network()
    scores, ranks, sizes = all_scores(network, tokenizer, rankings)
    args = make_args(
        tmp_path, per_device_train_batch_size=3, logging_steps=2, num_train_epochs=2, learning_rate=0.0, max_length=18
    )
    # "longer prompt: bb" has 18 tokens with its EOS; one completion more is over the limit
    rows = [dict(row) for row in rankings]
    rows[1] = {**rows[1], "completions": [*rows[1]["completions"], "ccc"], "ranks": [*rows[1]["ranks"], 3]}
    trainer = RewardTrainer(network, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "accuracy" in entry]
    tokens = sum(len(row["prompt"]) + len(text) + 1 for row in rankings for text in row["completions"])
    assert len(logs) == 2  # 4 steps
    for epoch, entry in enumerate(logs, start=1):
        assert entry["accuracy"] == pytest.approx(reference.ranking_accuracy(scores, ranks, sizes), abs=1e-6)
        assert entry["score_std"] == pytest.approx(scores.std(), abs=1e-4)
        assert entry["shortened_rows"] == 1
        assert entry["tied_pairs"] == 3
        assert entry["num_tokens"] == epoch * tokens


def test_an_equal_score_counts_one_half(tmp_path, tokenizer):
    rows = Dataset.from_list([{"prompt": "p: ", "completions": ["a", "b"], "ranks": [1, 2]}])
    network = make_network()
    network.score.weight.data.zero_()
    trainer = RewardTrainer(
        network, make_args(tmp_path), train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == metrics["eval_prompt_accuracy"] == 0.5
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_best_checkpoint_is_chosen_by_a_metric_of_ours(tmp_path, rankings, base_dir):
    args = make_args(
        tmp_path,
        learning_rate=1e-2,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer = RewardTrainer(base_dir, args, train_dataset=rankings, eval_dataset=rankings, peft_config=LoraConfig(r=2))
    trainer.train()
    evaluations = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert trainer.state.best_metric == max(evaluations)
    assert trainer.evaluate()["eval_accuracy"] == max(evaluations)


# Head and adapters


def test_a_causal_model_gets_a_seeded_head_of_known_scale(tmp_path, rankings, base_dir):
    trainer = RewardTrainer(base_dir, make_args(tmp_path, seed=5), train_dataset=rankings)
    normal = torch.randn(1, 16, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(trainer.model.score.weight.detach(), normal / math.sqrt(17), atol=1e-7, rtol=0)
    assert trainer.processing_class.get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "config",
    [LoraConfig(task_type=None, r=2), LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"])],
    ids=["no_task", "causal"],
)
def test_pitfall_04_the_head_is_trained_and_saved(tmp_path, rankings, demonstrations, base_dir, config):
    before = copy.deepcopy(config)
    args = make_args(tmp_path, learning_rate=1e-2, num_train_epochs=3)
    trainer = RewardTrainer(base_dir, args, train_dataset=rankings, peft_config=config)
    assert config == before  # the user's object is not touched
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, start[name])}
    # q_proj and v_proj of two layers, A and B; the head
    assert len(moved) == 2 * 2 * 2 + 1
    assert "base_model.model.score.modules_to_save.default.weight" in moved
    scores = trainer.reward_model.score(demonstrations["prompt"], demonstrations["completion"])
    trainer.save_model()
    loaded = RewardModel.from_pretrained(args.output_dir)
    assert loaded.score(demonstrations["prompt"], demonstrations["completion"]) == scores


def test_pitfall_04_a_frozen_head_is_an_error(tmp_path, rankings, tokenizer):
    frozen = make_network()
    frozen.score.requires_grad_(False)
    wrapped = get_peft_model(make_network(), LoraConfig(task_type=None, target_modules=["q_proj"]))
    for network in (frozen, wrapped):
        with pytest.raises(InputError, match=r"the reward head \('score'\) is frozen"):
            RewardTrainer(network, make_args(tmp_path), train_dataset=rankings, processing_class=tokenizer)


def test_a_wrapped_model_object_keeps_its_adapter_and_head(tmp_path, rankings, tokenizer):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    network = get_peft_model(make_network(), config)
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    trainer = RewardTrainer(network, make_args(tmp_path), train_dataset=rankings, processing_class=tokenizer)
    assert trainer.model is network
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, start[name]) and parameter.requires_grad == flags[name], name


def test_an_sft_adapter_is_continued_not_zeroed(tmp_path, rankings, base_dir, sft_dir, caplog):
    with caplog.at_level(logging.WARNING, logger="instructgpt_trl"):
        args = make_args(tmp_path, learning_rate=1e-2, num_train_epochs=2)
        trainer = RewardTrainer(sft_dir, args, train_dataset=rankings, peft_config=LoraConfig(r=64))
    assert f"{sft_dir} is an adapter and keeps its own shape; peft_config is not used" in caplog.text
    assert trainer.model.peft_config["default"].r == 4
    assert trainer.processing_class.chat_template.startswith("{# sft #}")  # from the adapter's folder
    ids = torch.tensor([[5, 6, 7, EOS]])
    sft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), sft_dir)
    with torch.no_grad():
        expected = sft.get_base_model().model(input_ids=ids).last_hidden_state
        hidden = trainer.model.get_base_model().model(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, expected)
    files = {file.name: file.read_bytes() for file in Path(sft_dir).iterdir()}
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    trainer.save_model()
    assert len([p for p in trainer.model.parameters() if p.requires_grad]) == 2 * 2 * 2 + 1
    for name, parameter in trainer.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
    assert files == {file.name: file.read_bytes() for file in Path(sft_dir).iterdir()}  # a copy was trained
    assert json.loads((tmp_path / "out" / "reward_model.json").read_text())["base"] == base_dir


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_a_reward_model_folder_is_trained_on_with_its_head_and_bias(
    tmp_path, rankings, demonstrations, base_dir, peft_config
):
    args = make_args(tmp_path, learning_rate=1e-2)
    texts = demonstrations["prompt"], demonstrations["completion"]
    first = RewardTrainer(
        base_dir, args, train_dataset=rankings, demonstration_dataset=demonstrations, peft_config=peft_config
    )
    first.train()
    first.save_model(str(tmp_path / "rm"))
    again = RewardTrainer(str(tmp_path / "rm"), make_args(tmp_path, seed=9), train_dataset=rankings)
    assert torch.equal(head_of(again.model).weight, head_of(first.model).weight)
    assert again.reward_model.score(*texts) == first.reward_model.score(*texts)
    assert again.reward_model.calibrated
    again.train()
    assert not again.reward_model.calibrated  # the bias is that of another network now


# Bias


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_pitfall_05_demonstrations_score_zero_after_training_and_loading(
    tmp_path, rankings, demonstrations, base_dir, peft_config
):
    args = make_args(tmp_path, learning_rate=1e-2, num_train_epochs=2, save_strategy="epoch")
    trainer = RewardTrainer(
        base_dir, args, train_dataset=rankings, demonstration_dataset=demonstrations, peft_config=peft_config
    )
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert saved["calibrated"] and saved["kind"] == ("full" if peft_config is None else "adapter")
    assert abs(saved["bias"]) > 0.01
    loaded = RewardModel.from_pretrained(args.output_dir)
    scores = loaded.score(demonstrations["prompt"], demonstrations["completion"])
    assert abs(sum(scores) / 4) <= 1e-5
    assert scores == trainer.reward_model.score(demonstrations["prompt"], demonstrations["completion"])
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        earlier = json.loads((checkpoint / "reward_model.json").read_text())
        assert (earlier["bias"], earlier["calibrated"]) == (0.0, False)
        assert RewardModel.from_pretrained(str(checkpoint)).tokenizer.eos_token_id == EOS


def test_pitfall_13_over_long_demonstrations_are_left_out_and_named(
    tmp_path, rankings, demonstrations, caplog, base_dir
):
    rows = [*demonstrations, {"prompt": "say it: ", "completion": "x" * 40}]
    with caplog.at_level(logging.WARNING, logger="instructgpt_trl"):
        trainer = RewardTrainer(
            base_dir,
            make_args(tmp_path, max_length=24),
            train_dataset=rankings,
            demonstration_dataset=Dataset.from_list(rows),
        )
    assert "demonstration_dataset: 1 of 5 demonstrations over 24 tokens dropped: rows 4 (say it:)" in caplog.text
    trainer.train()
    scores = trainer.reward_model.score(demonstrations["prompt"], demonstrations["completion"])
    assert abs(sum(scores) / 4) <= 1e-5
    with pytest.raises(InputError, match="none of its 5 rows is within max_length=19"):
        RewardTrainer(
            base_dir,
            make_args(tmp_path, max_length=19),
            train_dataset=rankings,
            demonstration_dataset=Dataset.from_list(5 * [rows[-1]]),
        )


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_pitfall_05_the_bias_fits_the_saved_model_after_training_in_bfloat16(
    tmp_path, rankings, demonstrations, base_dir, peft_config
):
    """The trainer's autocast is not in what is loaded, so the bias must not come from scores under it."""
    args = make_args(tmp_path, learning_rate=1e-2, bf16=True)
    trainer = RewardTrainer(
        base_dir,
        args,
        train_dataset=rankings,
        eval_dataset=rankings,
        demonstration_dataset=demonstrations,
        peft_config=peft_config,
    )
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    scores = RewardModel.from_pretrained(args.output_dir).score(demonstrations["prompt"], demonstrations["completion"])
    assert abs(sum(scores) / 4) <= 1e-5
    assert trainer.reward_model.score(demonstrations["prompt"], demonstrations["completion"]) == scores
    assert trainer.evaluate()["eval_loss"] > 0  # the autocast is back in its place


def test_without_demonstrations_the_bias_is_zero(tmp_path, rankings, base_dir):
    trainer = RewardTrainer(base_dir, make_args(tmp_path), train_dataset=rankings)
    trainer.train()
    assert (trainer.reward_model.bias, trainer.reward_model.calibrated) == (0.0, False)


def test_the_bias_is_not_part_of_the_training_loss(tmp_path, rankings, tokenizer):
    trainer = RewardTrainer(make_network(), make_args(tmp_path), train_dataset=rankings, processing_class=tokenizer)
    before = trainer.compute_loss(trainer.model, whole_batch(trainer)).item()
    trainer.reward_model.bias = 100.0
    assert trainer.compute_loss(trainer.model, whole_batch(trainer)).item() == before


# Rows and folders


def explode(*arguments, **keywords):
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    "name, rows, message",
    [
        (
            "train_dataset",
            [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 0]}],
            "train_dataset, row 0, rank 1",
        ),
        ("train_dataset", [{"prompt": "p", "chosen": "a", "rejected": ""}], "train_dataset, row 0, completion 1"),
        (
            "train_dataset",
            [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.0}],
            "'margin' is not supported",
        ),
        ("eval_dataset", [{"prompt": "p", "completions": ["a"], "ranks": [1]}], "eval_dataset, row 0"),
        ("demonstration_dataset", [{"prompt": "p"}], "demonstration_dataset, row 0: column 'completion' is missing"),
    ],
)
def test_pitfall_16_a_wrong_row_is_answered_before_anything_is_loaded_or_written(
    tmp_path, rankings, base_dir, monkeypatch, name, rows, message
):
    monkeypatch.setattr("instructgpt_trl.reward_trainer.load_reward_network", explode)
    datasets = {"train_dataset": rankings, name: Dataset.from_list(rows)}
    with pytest.raises(InputError, match=message):
        RewardTrainer(base_dir, make_args(tmp_path), **datasets)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_first(tmp_path, rankings, base_dir, monkeypatch):
    monkeypatch.setattr("instructgpt_trl.reward_trainer.load_reward_network", explode)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output folder .* cannot be written"):
        RewardTrainer(base_dir, make_args(tmp_path, output_dir=str(tmp_path / "file" / "out")), train_dataset=rankings)
    with pytest.raises(InputError, match="train_dataset is missing"):
        RewardTrainer(base_dir, make_args(tmp_path))


def test_pitfall_16_conversations_train(tmp_path, base_dir):
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completions": [[{"role": "assistant", "content": text}] for text in ("yes", "no", "so")],
        "ranks": [1, 2, 2],
    }
    trainer = RewardTrainer(base_dir, make_args(tmp_path), train_dataset=Dataset.from_list([row]))
    assert trainer.train().global_step == 1
    assert trainer.state.log_history[0]["tied_pairs"] == 1


@pytest.mark.parametrize("prefix_sharing", ["on", "off"])
def test_a_stream_trains_and_evaluates_like_the_dataset(tmp_path, rankings, base_dir, prefix_sharing):
    """Of a batch with shared prompts the tensors have several lengths."""
    rankings = rankings.map(lambda row: {"prompt": 8 * row["prompt"]})
    found = []
    for rows in (rankings, rankings.to_iterable_dataset()):
        settings = dict(max_steps=3, learning_rate=1e-3, per_device_train_batch_size=4, per_device_eval_batch_size=3)
        args = make_args(tmp_path, prefix_sharing=prefix_sharing, **settings)
        trainer = RewardTrainer(base_dir, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append([*losses, *(trainer.evaluate()[f"eval_{name}"] for name in ("tied_pairs", "mean_reward"))])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_stream_is_evaluated_beside_a_dataset_that_is_trained_on(tmp_path, rankings, base_dir):
    rankings = rankings.map(lambda row: {"prompt": 8 * row["prompt"]})
    found = []
    for rows in (rankings, rankings.to_iterable_dataset()):
        args = make_args(tmp_path, prefix_sharing="on", per_device_eval_batch_size=3)
        metrics = RewardTrainer(base_dir, args, train_dataset=rankings, eval_dataset=rows).evaluate()
        found.append([metrics[f"eval_{name}"] for name in ("tied_pairs", "mean_reward", "accuracy")])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_dictionaries_of_evaluation_datasets(tmp_path, rankings, base_dir):
    trainer = RewardTrainer(
        base_dir, make_args(tmp_path), train_dataset=rankings, eval_dataset={"a": rankings, "b": rankings.select([1])}
    )
    metrics = trainer.evaluate()
    assert metrics["eval_a_tied_pairs"] == 3 and metrics["eval_b_tied_pairs"] == 0


# Seeds


def test_pitfall_20_two_runs_with_one_seed_are_identical(tmp_path, rankings, base_dir):
    runs = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)  # what the caller did before does not matter
        args = make_args(tmp_path, learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=2)
        trainer = RewardTrainer(base_dir, args, train_dataset=rankings, peft_config=LoraConfig(r=2))
        torch.randn(disturbance)  # nor what is drawn between
        trainer.train()
        runs.append({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})
    for name, parameter in runs[0].items():
        assert torch.equal(parameter, runs[1][name]), name


def test_pitfall_20_the_constructor_restores_the_callers_generators(tmp_path, rankings, base_dir):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    RewardTrainer(base_dir, make_args(tmp_path), train_dataset=rankings, peft_config=LoraConfig(r=2))
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_resumed_training_equals_the_whole(tmp_path, rankings, base_dir):
    def run(resume):
        args = make_args(
            tmp_path, learning_rate=1e-2, num_train_epochs=3, per_device_train_batch_size=2, save_strategy="epoch"
        )
        trainer = RewardTrainer(base_dir, args, train_dataset=rankings, peft_config=LoraConfig(r=2))
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if resume else None)
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    whole, resumed = run(False), run(True)
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name


# Config


def test_the_defaults_are_the_papers(tmp_path):
    config = RewardConfig(str(tmp_path))
    assert config.learning_rate == 9e-6 and config.num_train_epochs == 1
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.95)
    assert config.lr_scheduler_type == "cosine_with_min_lr"
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (config.warmup_steps, config.weight_decay) == (0, 0)
    assert not (tmp_path / "out").exists()


def test_other_schedules_and_their_arguments_are_the_users(tmp_path):
    assert not RewardConfig(str(tmp_path), lr_scheduler_type="linear").lr_scheduler_kwargs
    kwargs = RewardConfig(str(tmp_path), lr_scheduler_kwargs={"min_lr": 1e-7}).lr_scheduler_kwargs
    assert kwargs == {"min_lr": 1e-7}


@pytest.mark.parametrize("schedule, last", [(None, 0.1), ("linear", 0.0)])
def test_the_learning_rate_ends_at_a_tenth_of_its_peak(tmp_path, rankings, base_dir, schedule, last):
    settings = {} if schedule is None else {"lr_scheduler_type": schedule}
    trainer = RewardTrainer(base_dir, make_args(tmp_path, max_steps=4, **settings), train_dataset=rankings)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == pytest.approx(9e-6, abs=1e-12)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(last * 9e-6, abs=1e-12)


# Golden


def test_a_separable_toy_is_learnt(tmp_path, rankings, base_dir):
    """The text with more 'a' is better; 40 steps reach accuracy 1 on the training rankings."""
    args = make_args(tmp_path, learning_rate=1e-2, num_train_epochs=20, per_device_train_batch_size=2)
    trainer = RewardTrainer(base_dir, args, train_dataset=rankings, eval_dataset=rankings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 1
    assert after["eval_accuracy"] == after["eval_prompt_accuracy"] == 1
    assert after["eval_loss"] < 0.05
    scores = trainer.reward_model.score(["p: "] * 3, ["aaa", "aab", "abb"])
    assert scores == sorted(scores, reverse=True)


def test_pitfall_18_a_gradient_that_is_no_number_stops_the_run(tmp_path, base_dir, rankings):
    trainer = RewardTrainer(base_dir, make_args(tmp_path, num_train_epochs=3), train_dataset=rankings)
    weight = next(p for name, p in trainer.model.named_parameters() if "down_proj" in name)
    weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RuntimeError, match=r"step 0: the gradient of .*down_proj.* is NaN or infinite"):
        trainer.train()
