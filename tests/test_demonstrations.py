"""data/demonstrations.py: what passes the check, what the cut reports, what the mix holds."""

import pytest
from datasets import Dataset, IterableDataset

from instructgpt_trl.data import InputError, as_conversations
from instructgpt_trl.data.demonstrations import check_demonstrations, cut_report, mix

BLOCKS = Dataset.from_list([{"input_ids": [100 + i, 200 + i]} for i in range(3)])


def demonstrations(count: int) -> Dataset:
    return Dataset.from_list([{"input_ids": [i, i + 1, i + 2], "labels": [-100, -100, i + 2]} for i in range(count)])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c"},
        {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": ""}]},
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
        {"text": "a text"},
        {"input_ids": [1, 2]},
        {"prompt": "p", "completion": "", "images": [1]},
    ],
)
def test_trl_forms_pass(row):
    dataset = Dataset.from_list([row])
    assert check_demonstrations(dataset, "train_dataset") is dataset


def test_other_columns_do_not_pass():
    with pytest.raises(InputError, match="train_dataset, row 0: column 'prompt' is missing.*found question"):
        check_demonstrations(Dataset.from_list([{"question": "p"}]), "train_dataset")


def test_a_prompt_and_a_completion_of_two_forms_do_not_pass():
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "p"}], "completion": "c"}])
    with pytest.raises(InputError, match="train_dataset, row 0: .*use instructgpt_trl.data.as_conversations"):
        check_demonstrations(rows, "train_dataset")
    check_demonstrations(as_conversations(rows), "train_dataset")


@pytest.mark.parametrize("column", ["input_ids", "labels", "completion_mask"])
def test_columns_of_encoded_rows_are_not_mixed_with_text(column):
    rows = Dataset.from_list([{"prompt": "p", "completion": "c", column: [1, 2]}])
    with pytest.raises(InputError, match=f"train_dataset: the column '{column}' beside prompt and completion"):
        check_demonstrations(rows, "train_dataset")
    prepared = Dataset.from_list([{"prompt": "p", "completion": "c", "input_ids": [1, 2], "labels": [-100, 2]}])
    assert check_demonstrations(prepared, "train_dataset") is prepared  # by TRL


def test_another_text_column_passes():
    dataset = Dataset.from_list([{"body": "a text"}])
    assert check_demonstrations(dataset, "train_dataset", text_column="body") is dataset


def test_pitfall_16_wrong_rows_are_named():
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": " "}]
    with pytest.raises(InputError, match="train_dataset, row 1, column 'completion': the text is empty"):
        check_demonstrations(Dataset.from_list(rows), "train_dataset")
    with pytest.raises(InputError, match="train_dataset: no rows"):
        check_demonstrations(Dataset.from_list([]), "train_dataset")
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(InputError, match="train_dataset, row 1, column 'completion': the text is empty"):
        list(check_demonstrations(stream, "train_dataset"))


@pytest.mark.parametrize(
    ("count", "fraction", "blocks"),
    # round(f / (1 - f) * n): 1/9 * 9 = 1; 1/9 * 4 = 0.44; 1 * 4; 1/4 * 10 = 2.5 -> 2 (even); 3 * 4 = 12
    [(9, 0.1, 1), (4, 0.1, 0), (4, 0.5, 4), (10, 0.2, 2), (4, 0.75, 12), (4, 0.0, 0)],
)
def test_mix_has_exactly_the_fraction(count, fraction, blocks):
    mixed = mix(demonstrations(count), BLOCKS, fraction)
    assert len(mixed) == count + blocks
    assert mixed[:count] == demonstrations(count)[:]
    # In order, from the start again when they run out; every token counts
    expected = [[100 + i % 3, 200 + i % 3] for i in range(blocks)]
    assert list(mixed["input_ids"])[count:] == expected
    assert list(mixed["labels"])[count:] == expected


def test_mix_after_packing_tells_the_lengths():
    packed = demonstrations(4).map(lambda row: {"seq_lengths": [2, 1], "prompt": "p"})
    mixed = mix(packed, BLOCKS, 0.5)
    assert mixed.column_names == ["input_ids", "labels", "seq_lengths"]
    assert mixed["seq_lengths"][:] == [[2, 1]] * 4 + [[2]] * 4


def test_pitfall_13_cut_report_names_every_row():
    rows = Dataset.from_dict(
        {
            "input_ids": [[1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2]],
            "labels": [[-100, 2], [-100, -100, 3], [-100, 2, 3, 4], [-100, -100]],
        }
    )
    # keep 2: row 1 keeps no label, row 2 loses two tokens, row 3 has no label at all
    assert cut_report(rows, slice(2), drops_masked=True) == (
        "1 of 4 rows shortened: rows 2; 2 of 4 rows dropped, no label left: rows 1, 3"
    )
    # from the end: row 1 keeps its label
    assert cut_report(rows, slice(-2, None), drops_masked=True) == (
        "2 of 4 rows shortened: rows 1, 2; 1 of 4 rows dropped, no label left: rows 3"
    )
    assert cut_report(rows, slice(2), drops_masked=False) == "2 of 4 rows shortened: rows 1, 2"
    assert cut_report(rows, slice(4), drops_masked=False) is None
    assert cut_report(rows, None, drops_masked=False) is None
