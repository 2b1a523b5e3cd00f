"""Rankings as token ids and as batches."""

import logging

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset, IterableDataset

from instructgpt_trl.data import InputError
from instructgpt_trl.data.rankings import DataCollatorForRanking, check_rankings, prepare_rankings

EOS = 257


@pytest.fixture
def messages(caplog):
    """The warnings of the package so far."""
    caplog.set_level(logging.WARNING, logger="instructgpt_trl")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("instructgpt_trl")]


def ids(text: str) -> list[int]:
    """Ids of ASCII text in the byte-level tokenizer of the tests: the place of each character in its alphabet."""
    vocabulary = make_tokenizer().get_vocab()
    return [vocabulary["\u0120" if character == " " else character] for character in text]


def test_collator_keeps_a_prompts_completions_together_and_pads_on_the_right():
    batch = DataCollatorForRanking(pad_token_id=9)(
        [
            {"prompt_ids": [1, 2], "completions_ids": [[3], [4, 5, 6], [7]], "ranks": [2, 1, 2], "shortened": 0},
            {"prompt_ids": [], "completions_ids": [[8, 9], [3]], "ranks": [1, 2], "shortened": 3},
        ]
    )
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 9, 9],
        [1, 2, 4, 5, 6],
        [1, 2, 7, 9, 9],
        [8, 9, 9, 9, 9],
        [3, 9, 9, 9, 9],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 3, 2, 1]
    assert all(row == sorted(row, reverse=True) for row in batch["attention_mask"].tolist())
    assert batch["ranks"].tolist() == [2, 1, 2, 1, 2]
    assert batch["group_sizes"] == [3, 2]
    assert batch["shortened"].tolist() == [0, 3]


@pytest.mark.parametrize("multiple, length", [(4, 8), (5, 5), (None, 5)])
def test_collator_rounds_the_length_up(multiple, length):
    row = {"prompt_ids": [1, 2], "completions_ids": [[3, 4, 5], [6]], "ranks": [1, 2], "shortened": 0}
    batch = DataCollatorForRanking(0, multiple)([row])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, length)
    assert batch["attention_mask"].sum().item() == 8


def test_prompt_and_completion_are_encoded_apart_and_end_at_eos(rankings, tokenizer):
    prepared = prepare_rankings(rankings, tokenizer, None)
    assert prepared.column_names == ["prompt_ids", "completions_ids", "ranks", "shortened"]
    assert prepared[1] == {
        "prompt_ids": ids("longer prompt: "),
        "completions_ids": [[*ids("bb"), EOS], [*ids("aa"), EOS]],
        "ranks": [2, 1],
        "shortened": 0,
    }
    assert prepared["ranks"][:] == [[1, 2, 3], [2, 1], [1, 2, 2, 3, 3], [4, 1, 2, 2]]


def test_pitfall_16_conversations_are_encoded_by_the_template(tokenizer):
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completions": [[{"role": "assistant", "content": text}] for text in ("yes", "no")],
        "ranks": [1, 2],
    }
    prepared = prepare_rankings(check_rankings(Dataset.from_list([row])), tokenizer, None)
    newline = [tokenizer.get_vocab()["\u010a"]]
    assert prepared[0]["prompt_ids"] == [*ids("<user>hi"), EOS, *newline, *ids("<assistant>")]
    # The newline that the template puts after EOS is cut: a policy stops at EOS
    assert prepared[0]["completions_ids"] == [[*ids("yes"), EOS], [*ids("no"), EOS]]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p", "completions": ["a"], "ranks": [1]}, "rows, row 1, column 'completions'"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "rows, row 1, column 'ranks'"),
        ({"prompt": "p", "completions": ["a", " "], "ranks": [1, 2]}, "rows, row 1, completion 1"),
        ({"prompt": "p", "completions": ["a", "b"]}, "rows, row 1: column 'ranks' is missing"),
    ],
)
def test_pitfall_16_a_wrong_ranking_is_named(row, message):
    good = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
    with pytest.raises(InputError, match=message):
        check_rankings(Dataset.from_list([good, row]), "rows")


@pytest.mark.parametrize("column", ["completions_ids", "chosen_ids"])
def test_columns_of_encoded_rankings_are_not_mixed_with_text(column):
    rows = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b", column: [1]}])
    with pytest.raises(InputError, match=f"rows: the column '{column}' is of encoded rankings"):
        check_rankings(rows, "rows")


def test_a_template_that_leaves_the_answers_out_is_refused():
    tokenizer = make_tokenizer()
    known = "{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{known}{{% endfor %}}"
    answers = [[{"role": "gpt", "content": text}] for text in ("yes", "no")]
    row = {"prompt": [{"role": "user", "content": "hi"}], "completions": answers, "ranks": [1, 2]}
    with pytest.raises(InputError, match="rows: in every ranking all completions are the same token ids"):
        prepare_rankings(Dataset.from_list([row]), tokenizer, None, "rows")
    answered = {**row, "completions": [[{"role": "assistant", "content": text}] for text in ("yes", "no")]}
    assert len(prepare_rankings(Dataset.from_list([row, answered]), tokenizer, None, "rows")) == 2


def test_margin_is_refused():
    rows = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.0}])
    for dataset in (rows, rows.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(rows))):
        with pytest.raises(InputError, match="rows: the column 'margin' is not supported"):
            check_rankings(dataset, "rows")


def lengthy() -> Dataset:
    """Prompt of 2 tokens. Completions count their EOS: 3, 6, 3, ... tokens."""
    return Dataset.from_list(
        [
            {"prompt": "p:", "completions": ["aa", "aaaaa", "bb"], "ranks": [1, 2, 3]},  # loses completion 1
            {"prompt": "p:", "completions": ["aa", "bb"], "ranks": [2, 1]},  # stays as it is
            {"prompt": "p:", "completions": ["aaaaa", "bb"], "ranks": [1, 2]},  # one is left: dropped
            {"prompt": "p:", "completions": ["aa", "bb", "cc"], "ranks": [2, 2, 2]},  # all tie: dropped
            {"prompt": "p:", "completions": ["aa", "bbbbb", "cc"], "ranks": [1, 2, 1]},  # what is left ties: dropped
            {"prompt": "p:", "completions": ["aaaaaa", "bbbbb", "cc", "dd"], "ranks": [1, 2, 3, 4]},  # loses two
        ]
    )


def test_pitfall_13_the_over_long_completion_is_taken_out_not_its_ranking(tokenizer, messages):
    prepared = prepare_rankings(lengthy(), tokenizer, 5, "train_dataset")
    assert [list(row) for row in prepared["ranks"]] == [[1, 3], [2, 1], [3, 4]]
    assert list(prepared["shortened"]) == [1, 0, 2]
    assert prepared[0]["completions_ids"] == [[*ids("aa"), EOS], [*ids("bb"), EOS]]
    assert messages() == [
        "train_dataset: 3 completions over 5 tokens taken out of 2 of 6 rankings: rows 0 (p:), 5 (p:)",
        "train_dataset: 1 of 6 rankings dropped, fewer than 2 completions within the length limit: rows 2 (p:)",
        "train_dataset: 2 of 6 rankings dropped, no untied pair: rows 3 (p:), 4 (p:)",
    ]


def test_preparing_twice_changes_nothing(tokenizer, messages):
    once = prepare_rankings(lengthy(), tokenizer, 5)
    before = len(messages())
    twice = prepare_rankings(check_rankings(once), tokenizer, 5)
    assert twice.to_list() == once.to_list()
    assert len(messages()) == before


def test_a_stream_gives_the_same_rows_and_names_what_it_drops(tokenizer, messages):
    expected = prepare_rankings(lengthy(), tokenizer, 5).to_list()
    before = len(messages())
    streams = [lengthy().to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(lengthy()))]
    for stream in streams:
        assert list(prepare_rankings(check_rankings(stream, "rows"), tokenizer, 5, "rows")) == expected
    assert messages()[before:] == 2 * [
        "rows, row 0: 1 over-long completions taken out of the ranking",
        "rows, row 2: ranking dropped, fewer than 2 completions within the length limit",
        "rows, row 3: ranking dropped, no untied pair",
        "rows, row 4: ranking dropped, no untied pair",
        "rows, row 5: 2 over-long completions taken out of the ranking",
    ]


def test_nothing_left_is_an_error(rankings, tokenizer):
    with pytest.raises(InputError, match="rows: none of its 4 rankings is left.*max_length=3"):
        prepare_rankings(rankings, tokenizer, 3, "rows")


def test_pairs_are_rankings_of_two(tokenizer):
    pairs = Dataset.from_list([{"prompt": "p: ", "chosen": "a", "rejected": "b"}])
    prepared = prepare_rankings(check_rankings(pairs), tokenizer, None)
    assert prepared[0]["ranks"] == [1, 2]
    assert prepared[0]["completions_ids"] == [[*ids("a"), EOS], [*ids("b"), EOS]]
    encoded = Dataset.from_list([{"chosen_ids": [5, 6], "rejected_ids": [5, 7]}])
    prepared = prepare_rankings(check_rankings(encoded), tokenizer, None)
    assert prepared[0] == {"prompt_ids": [], "completions_ids": [[5, 6], [5, 7]], "ranks": [1, 2], "shortened": 0}


def test_rows_without_a_prompt_may_stand_before_rows_with_one(tokenizer):
    rows = [{"prompt": "", "completions": ["a", "b"], "ranks": [1, 2]}] * 1001
    rows.append({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]})
    prepared = prepare_rankings(Dataset.from_list(rows), tokenizer, None)
    assert prepared[0]["prompt_ids"] == []
    assert prepared[1001]["prompt_ids"] == ids("p")


def test_template_arguments_and_tools_of_a_row_reach_the_template(tokenizer):
    tokenizer.chat_template = (
        "{{ style }}{% if tools %}{{ tools[0]['name'] }}{% endif %}{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completions": [[{"role": "assistant", "content": text}] for text in ("a", "b")],
        "ranks": [1, 2],
        "tools": '[{"name": "T"}]',
        "chat_template_kwargs": {"style": "S"},
    }
    prepared = prepare_rankings(Dataset.from_list([row]), tokenizer, None)
    assert prepared[0]["prompt_ids"] == ids("SThi")
    assert prepared[0]["completions_ids"] == [[*ids("a"), EOS], [*ids("b"), EOS]]


def test_batches_of_prepared_rows_have_integer_tensors(rankings, tokenizer):
    rows = prepare_rankings(rankings, tokenizer, None)
    batch = DataCollatorForRanking(tokenizer.pad_token_id)([rows[0], rows[2]])
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "ranks", "shortened"))
