"""The paper's rules for prompts, each against a plain loop, and the recipe that runs them over files."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import prepare_prompts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructgpt_trl.data import InputError
from instructgpt_trl.data.pii import LEAST_SCORE, SIGNS, PersonalData
from instructgpt_trl.data.prompts import (
    USE_CASES,
    check_raw_prompt,
    expand_few_shot,
    first_of_each,
    longest_of_each,
    number_of,
    prefix_key,
    split_of,
    use_case,
)

PERSONAL = {
    "EMAIL_ADDRESS": ["ann.lee+x@example.com", "b@uni.co.uk"],
    "PHONE_NUMBER": ["(212) 555-0187", "+44 20 7946 0958", "415-867-5309", "555-123-4567", "+49 30 901820"],
    "CREDIT_CARD": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "IBAN_CODE": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "IP_ADDRESS": ["192.168.12.34", "2001:0db8:85a3:0000:0000:8a2e:0370:7334"],
    "US_SSN": ["536-22-8123"],
}
PLAIN = [
    "In 1987, 120 people",
    "version 3.11.7",
    "it is 12:30",
    "Add 12345 and 678.",
    "a @ b",
    "5 x 10 = 50; 2020-2021",
    "0.2916667 gallons, 12.84442185152504",
]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=40))
def test_longest_of_each_equals_a_loop(rows):
    best: dict[int, int] = {}
    for place, (key, length) in enumerate(rows):
        if key not in best or length > rows[best[key]][1]:
            best[key] = place
    keys, lengths = (np.array([row[i] for row in rows], dtype=np.uint64) for i in (0, 1))
    assert np.flatnonzero(longest_of_each(keys, lengths)).tolist() == sorted(best.values())


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 4))
def test_first_of_each_equals_a_loop(keys, most):
    seen: Counter = Counter()
    kept = []
    for place, key in enumerate(keys):
        seen[key] += 1
        if seen[key] <= most:
            kept.append(place)
    assert np.flatnonzero(first_of_each(np.array(keys, dtype=np.uint64), most)).tolist() == kept


def test_prefix_key_by_hand():
    same = prefix_key("Write  a\nPOEM about x", 12)
    assert prefix_key("write a poem on y", 12) == same  # "write a poem" is 12 characters
    assert prefix_key("write a poem on y", 14) != prefix_key("write a poem about x", 14)
    assert prefix_key("write a", 12) == prefix_key("Write A ", 12) != same  # shorter: only its like
    assert prefix_key("Caf\u00e9", 9) == prefix_key("Cafe\u0301", 9)  # one letter in two spellings
    assert number_of("a") == 0x40F89E395B66422F  # what `printf a | b2sum -l 64` says


def test_users_stay_in_their_split():
    splits = [split_of(user, 0, 0.2, 0.1) for user in range(20_000)]
    shares = {name: count / 20_000 for name, count in Counter(splits).items()}
    assert shares == pytest.approx({"train": 0.7, "valid": 0.2, "test": 0.1}, abs=0.01)  # 3 standard errors
    assert splits == [split_of(user, 0, 0.2, 0.1) for user in range(20_000)]
    assert splits != [split_of(user, 1, 0.2, 0.1) for user in range(20_000)]


def test_few_shot_prompts_become_their_examples():
    row = {"instruction": "Say the colour.", "user_id": 3, "category": "extract"}
    row["examples"] = [
        {"query": q, "response": r} for q, r in (("sky", "blue"), ("grass", "green"), ("snow", "white"))
    ]
    rows = expand_few_shot(check_raw_prompt(row, "here"))
    assert [one["completion"] for one in rows] == [" blue", " green", " white"]
    assert rows[1]["prompt"] == (
        "Say the colour.\n\nQuery: sky\nResponse: blue\n\nQuery: snow\nResponse: white\n\nQuery: grass\nResponse:"
    )
    assert all(set(one) == {"prompt", "completion", "user_id", "category"} for one in rows)
    same = expand_few_shot({**row, "prompt": None, "completion": None})  # as a table of several kinds has it
    assert same == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object"),
        ({"text": "a"}, "column 'prompt' is missing"),
        ({"prompt": " "}, "the text is empty"),
        ({"prompt": "a", "user_id": 1.5}, "column 'user_id': expected text or a whole number"),
        ({"prompt": "a", "user_id": True}, "column 'user_id'"),
        ({"prompt": "a", "category": 3}, "column 'category': expected text"),
        ({"prompt": "a", "source": {"a": 1}}, "column 'source': expected text"),
        ({"instruction": "", "examples": [{"query": "a", "response": "b"}]}, "column 'instruction': expected text"),
        ({"instruction": "a", "examples": []}, "column 'examples': expected a list"),
        ({"instruction": "a", "examples": [{"query": "a"}]}, "example 0: expected"),
        ({"instruction": "a", "examples": ["a"]}, "example 0: expected"),
    ],
)
def test_wrong_raw_rows(row, message):
    with pytest.raises(InputError, match=f"^here.*{message}"):
        check_raw_prompt(row, "here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Summarize this text: ...", "summarization"),
        ("Rewrite the sentence more politely", "rewrite"),
        ("Give me five ideas for a garden", "brainstorming"),
        ("Write a short story about a bear", "generation"),
        ("Who built the statue of liberty?", "open qa"),
        ("Classify the review as good or bad", "classification"),
        ("Answer from the text below, using the passage", "closed qa"),
        ("Extract all dates", "extract"),
        ("Human: hi\nAI:", "chat"),
        ("xyzzy", "other"),
    ],
)
def test_use_cases_by_words(text, expected):
    assert use_case(text) == expected and expected in {*USE_CASES, "other"}


# Personal data


@pytest.fixture(scope="module")
def personal() -> PersonalData:
    return PersonalData()


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in PERSONAL.items() for value in values])
def test_personal_data_are_found_and_masked(personal, kind, value):
    text = f"Please use {value} for this, thanks."
    assert personal.find(text) == [(11, 11 + len(value), kind)]
    assert personal.mask(text) == f"Please use <{kind}> for this, thanks."
    assert personal.suspects(text)


def test_nothing_is_left_where_two_overlap(personal):
    """Masked is what Presidio still finds, and not the more certain of the two alone."""
    for text in ("+49 30 901820 30569309025904", "123-45-6789 4111 1111 1111 1111, 123-45-6789"):
        assert personal.find(text) and not personal.find(personal.mask(text)), personal.mask(text)


@pytest.mark.parametrize("text", ["99.9fm@radio.com", "call 12.5bob@example.com", "1.2john@example.com"])
def test_addresses_that_begin_with_a_number(personal, text):
    assert [kind for _, _, kind in personal.find(text)] == ["EMAIL_ADDRESS"]


def test_presidio_sees_only_what_is_around_an_at_sign(personal, monkeypatch):
    """Its pattern of an address is cubic in the text: with 20 kB of "a.a.a" it would take a minute and a half."""
    search, lengths = personal._recognizers["EMAIL_ADDRESS"], []
    monkeypatch.setitem(personal._recognizers, "EMAIL_ADDRESS", lambda text: lengths.append(len(text)) or search(text))
    text = "a." * 2_000 + "@ and " + "x" * 1_000 + " ann@example.com " + "y" * 1_000
    assert [text[start:end] for start, end, _ in personal.find(text)] == ["ann@example.com"]
    assert len(lengths) == 2 and max(lengths) <= 340


@pytest.mark.parametrize("text", PLAIN)
def test_plain_texts_have_none(personal, text):
    assert personal.find(text) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([value for values in PERSONAL.values() for value in values] + PLAIN)
        | st.text("0123456789 .:-+()@abDEx", max_size=14),
        max_size=5,
    )
)
def test_signs_lose_nothing_that_presidio_finds(parts):
    """What the cheap questions let through is all that the recognisers find without them."""
    text = " ".join(parts)
    personal = PersonalData()
    for kind, recognise in personal._recognizers.items():
        if any(result.score >= LEAST_SCORE for result in recognise(text)):
            assert personal._signs[kind].search(text), (kind, text)
    assert set(personal._recognizers) == set(SIGNS)


def test_no_network_is_asked(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert PersonalData().mask("to ann@example.com") == "to <EMAIL_ADDRESS>"
    assert PersonalData().find("a @ b and x@nowhere.invalidtld") == []


# The recipe


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(folder: Path, rows: list, *flags: str, name: str = "out") -> tuple[dict[str, list[dict]], dict]:
    raw = write(folder / "raw.jsonl", rows)
    args = ["--input", str(raw), "--output_dir", str(folder / name), "--num_proc", "1", *flags]
    prepare_prompts.main(args)
    splits = {
        split: [json.loads(line) for line in (folder / name / f"{split}.jsonl").read_bytes().split(b"\n")[:-1]]
        for split in prepare_prompts.SPLITS
    }
    return splits, json.loads((folder / name / "report.json").read_text("utf-8"))


def planted(count: int, seed: int = 0) -> tuple[list[dict], dict[str, int]]:
    """Raw rows with known near-duplicates, heavy users and personal data; how many of each a rule has to take."""
    rng = random.Random(seed)
    values = [value for of in PERSONAL.values() for value in of]
    rows: list[dict] = []
    expected: Counter = Counter()
    for number in range(count):
        start = f"Prompt {number:07d} {'about this and that ' * 5}"
        user = f"user{number % (count // 20)}"
        if number % 50 == 7:  # the longer one, seen later, stays
            rows += [
                {"prompt": start + "short", "user_id": user},
                {"prompt": start.upper() + " much longer", "user_id": user},
            ]
            expected["near-duplicate"] += 1
        elif number % 50 == 8:
            rows.append({"prompt": f"{start} call {rng.choice(values)} now", "user_id": user, "planted": True})
        else:
            rows.append({"prompt": start + str(rng.random()), "user_id": user})
    for number in range(230):
        rows.append({"prompt": f"{number} of a heavy user", "user_id": "heavy"})
    expected["over the user's limit"] = 30
    return rows, expected


def test_planted_cases_are_handled_and_counted(tmp_path):
    rows, expected = planted(2_000)
    splits, report = prepare(tmp_path, rows)
    for rule, count in expected.items():
        assert report["dropped"][rule] == count
    everything = [row for of in splits.values() for row in of]
    assert report["prompts"] == report["rows"] == len(rows) == len(everything) + sum(report["dropped"].values())
    # Personal data leave the training split alone
    assert not any(row.get("planted") for row in splits["train"])
    kept_planted = sum(bool(row.get("planted")) for row in splits["valid"] + splits["test"])
    assert report["dropped"]["personal data"] + kept_planted == sum(bool(row.get("planted")) for row in rows) == 40
    assert sum(report["personal data found"].values()) == report["dropped"]["personal data"]
    users = {split: {row["user_id"] for row in of} for split, of in splits.items()}
    assert (
        not users["train"] & users["valid"]
        and not users["train"] & users["test"]
        and not users["valid"] & users["test"]
    )
    of_user = Counter(row["user_id"] for row in everything)
    assert of_user["heavy"] == report["splits"][next(s for s in users if "heavy" in users[s])]["most of a user"] == 200
    # Of two that begin alike the longer one, in the order of the input
    assert sum("MUCH" in row["prompt"].upper() for row in everything) == expected["near-duplicate"]
    places = {row["prompt"]: place for place, row in enumerate(rows)}
    for of in splits.values():
        order = [places[row["prompt"]] for row in of]
        assert order == sorted(order)
    for split, counts in report["splits"].items():
        assert (counts["prompts"], counts["users"]) == (len(splits[split]), len(users[split]))


def test_the_same_input_gives_the_same_output(tmp_path):
    rows, _ = planted(500)
    for name, processes in (("one", "1"), ("two", "2")):
        prepare(tmp_path, rows, "--num_proc", processes, name=name)
    for name in prepare_prompts.outputs():
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


EVERY = ("--valid_fraction", "0", "--test_fraction", "0")


def test_masking_and_keeping(tmp_path):
    rows = [
        {"prompt": "mail ann@example.com", "user_id": 1, "x": [1]},
        {"instruction": "Answer.", "examples": [{"query": "mail?", "response": "ann@example.com"}], "user_id": "3"},
    ]
    splits, report = prepare(tmp_path, rows, "--pii", "mask", *EVERY)
    assert [row["prompt"] for row in splits["train"]] == [
        "mail <EMAIL_ADDRESS>",
        "Answer.\n\nQuery: mail?\nResponse:",
    ]
    assert splits["train"][0]["x"] == [1] and splits["train"][1]["completion"] == " <EMAIL_ADDRESS>"
    assert report["masked"] == 2 and report["personal data found"] == {"EMAIL_ADDRESS": 2}
    splits, report = prepare(tmp_path, rows, "--pii", "keep", *EVERY, name="kept")
    assert splits["train"][0] == {**rows[0], "user_id": "1"} and report["personal data found"] == {}


def test_conversations_are_searched_too(tmp_path):
    said = [{"role": "assistant", "content": "ssn 536-22-8123"}]
    rows = [{"prompt": [{"role": "user", "content": "mail ann@example.com"}], "completion": said, "user_id": 1}]
    splits, report = prepare(tmp_path, rows, "--pii", "mask", *EVERY)
    assert splits["train"][0]["prompt"][0]["content"] == "mail <EMAIL_ADDRESS>"
    assert splits["train"][0]["completion"][0]["content"] == "ssn <US_SSN>" and report["masked"] == 1


def test_texts_and_conversations_are_not_mixed(tmp_path, capsys):
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}, {"prompt": "c"}]
    with pytest.raises(SystemExit):
        prepare(tmp_path, rows)
    assert "row 2: a conversation among texts" in capsys.readouterr().err


def test_masked_prompts_keep_their_users(tmp_path):
    rows = [{"prompt": f"mail {name}@example.com"} for name in ("ann", "bob", "eve")]
    splits, report = prepare(tmp_path, rows, "--pii", "mask", *EVERY)
    assert report["splits"]["train"]["users"] == 3 == len(splits["train"])


def test_examples_of_one_few_shot_prompt_stay_together(tmp_path):
    """Each stands in the prompts of the others."""
    rows = [
        {"instruction": f"Number {n}", "examples": [{"query": f"q{k}", "response": f"r{k}"} for k in range(5)]}
        for n in range(40)
    ]
    splits, _ = prepare(tmp_path, rows, "--valid_fraction", "0.3", "--test_fraction", "0.3")
    of_row: dict[str, set] = defaultdict(set)
    for split, found in splits.items():
        for row in found:
            of_row[row["prompt"].split("\n")[0]].add(split)
    assert len(of_row) == 40 and all(len(found) == 1 for found in of_row.values())
    assert all(splits.values())


def test_examples_of_odd_letters_are_no_near_duplicates(tmp_path):
    """Folding case makes a text longer: one letter becomes two."""
    examples = [{"query": f"query {k}", "response": "r"} for k in range(6)]
    row = {"instruction": "\u00df" * 300, "examples": examples}
    splits, report = prepare(tmp_path, [row], *EVERY)
    assert len(splits["train"]) == 6 and report["dropped"]["near-duplicate"] == 0


def test_lengths_categories_sources_and_no_users(tmp_path):
    rows = [
        {"prompt": "Write a poem", "source": "labeler"},
        {"prompt": "x" * 50},
        {"prompt": "hm", "category": "chat"},
        {"prompt": "Why is that so?", "source": "customer"},
    ]
    flags = ("--min_characters", "3", "--max_characters", "49", "--assign_categories", "--valid_fraction", "0")
    splits, report = prepare(tmp_path, rows, *flags, "--test_fraction", "0")
    assert report["dropped"]["too short"] == report["dropped"]["too long"] == 1
    assert [row["category"] for row in splits["train"]] == ["generation", "open qa"]
    assert report["splits"]["train"]["by source"] == {"customer": 1, "labeler": 1}
    assert report["splits"]["train"]["users"] == 2  # a prompt without a user is one of its own


def test_examples_of_a_few_shot_prompt_are_no_near_duplicates(tmp_path):
    examples = [{"query": f"query {k}", "response": f"response {k}"} for k in range(4)]
    row = {"instruction": "An instruction of more than a hundred characters. " * 3, "examples": examples, "user_id": 1}
    splits, report = prepare(tmp_path, [row, row], "--valid_fraction", "0", "--test_fraction", "0")
    assert report["few-shot rows expanded"] == 2 and report["prompts"] == 8
    assert report["dropped"]["near-duplicate"] == 4 and len(splits["train"]) == 4  # the second row says the same


def test_bad_rows_are_all_named_or_counted(tmp_path, capsys):
    lines = [b'{"prompt": "a"}', b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"", b'{"prompt": 3}']
    lines += [b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}", b"[" * 100_000]
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(b"\n".join(lines))
    args = ["--input", str(raw), "--output_dir", str(tmp_path / "out"), "--num_proc", "1"]
    with pytest.raises(SystemExit):
        prepare_prompts.main(args)
    error = capsys.readouterr().err
    assert "6 of 7 rows are wrong" in error
    for place, message in (
        (2, "not valid JSON"),
        (3, "not UTF-8"),
        (4, "half a surrogate"),
        (6, "column 'prompt'"),
        (7, "not to be read"),
        (8, "nested too deep"),
    ):
        assert f"row {place}" in error and message in error
    assert not (tmp_path / "out").exists()
    prepare_prompts.main([*args, "--skip_bad_rows"])
    assert json.loads((tmp_path / "out/report.json").read_text())["bad rows left out"] == 6


def test_odd_texts_come_out_as_they_were(tmp_path):
    texts = [
        "\u202eright to left\u202c \U0001f469\u200d\U0001f4bb",
        "a\u2028b\u0085c\x00d",
        "x" * 100_000,
        "\\u0041 \"'",
    ]
    rows = [{"prompt": text, "user_id": k} for k, text in enumerate(texts)]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits, _ = prepare(tmp_path, rows, "--valid_fraction", "0", "--test_fraction", "0")
    assert [row["prompt"] for row in splits["train"]] == texts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prefix_length", "0"), "--prefix_length 0"),
        (("--valid_fraction", "0.6", "--test_fraction", "0.5"), "leave something to train on"),
        (("--input", "nowhere.jsonl"), "no such file"),
        (("--max_characters", "0"), "--max_characters 0"),
        (("--min_characters", "-3"), "--min_characters -3"),
        (("--min_characters", "5", "--max_characters", "2"), "the first not above the second"),
        (("--min_characters", "9"), "none of its 1 prompts is left: too short 1; change the rules' flags"),
    ],
)
def test_wrong_settings(tmp_path, capsys, flags, message):
    raw = write(tmp_path / "raw.jsonl", [{"prompt": "a"}])
    with pytest.raises(SystemExit):
        prepare_prompts.main(["--input", str(raw), "--output_dir", str(tmp_path / "out"), *flags])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, capsys, monkeypatch):
    raw = write(tmp_path / "raw.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    args = ["--input", str(raw), "--output_dir", str(tmp_path / "out"), "--num_proc", "1"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(prepare_prompts.Writer, "write", full)
        with pytest.raises(SystemExit):
            prepare_prompts.main(args)
    assert "No space left" in capsys.readouterr().err and list((tmp_path / "out").iterdir()) == []
    prepare_prompts.main(args)
    with pytest.raises(SystemExit):
        prepare_prompts.main(args)
    assert "is there already" in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read(tmp_path, capsys, monkeypatch):
    raw = write(tmp_path / "raw.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    fates_of = prepare_prompts.fates_of

    def and_change(*args):
        found = fates_of(*args)
        write(raw, [{"prompt": "c"}, {"prompt": "d"}, {"prompt": "e"}])
        return found

    monkeypatch.setattr(prepare_prompts, "fates_of", and_change)
    with pytest.raises(SystemExit):
        prepare_prompts.main(["--input", str(raw), "--output_dir", str(tmp_path / "out"), "--num_proc", "1"])
    assert "was changed while it was read" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
