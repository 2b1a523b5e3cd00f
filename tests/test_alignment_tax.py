"""The public sets on rows of our own: prompts word for word, figures by hand, and what happens without data."""

import json

import alignment_tax
import pytest
import sacrebleu
from alignment_tax import SHOTS, figure_of, measure, plan, run_task, text_loss, with_change
from conftest import make_llama
from language_model import LanguageModel
from metrics import Bleu

from instructgpt_trl.data import InputError

SQUAD = [
    {
        "title": "Oil", "context": "Oil was found.", "question": question,
        "answers": {"text": answers, "answer_start": [0] * len(answers)},
    }
    for question, answers in (("What was found?", ["Oil", "the oil"]), ("By whom?", []), ("When?", []))
]  # fmt: skip
NO_DATE = {"day": "", "month": "", "year": ""}
ROWS = {
    "squadv2": SQUAD,
    "drop": [
        {
            "query_id": str(i), "passage": "3 men, Ann and Eve.", "question": question,
            "answer": {"number": number, "date": NO_DATE, "spans": spans},
            "validated_answers": {"number": [""], "date": [NO_DATE], "spans": [["three"]]},
        }
        for i, (question, number, spans) in enumerate([("Who?", "", ["Ann", "Eve"]), ("How many?", "3", [])])
    ],
    "quac": [
        {
            "wikipedia_page_title": "T", "context": "C. CANNOTANSWER", "questions": ["Q1?", "Q2?"],
            "answers": {"texts": [["one", "1"], ["CANNOTANSWER"]], "answer_starts": [[0, 0], [0]]},
        }
    ],
    "hellaswag": [{"ctx": "A man", "endings": ["sits.", "flies."], "label": "0"}],
    "rte": [{"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}],
    "sst": [{"sentence": "good film", "label": 1}],
    "wsc": [
        {"text": "Ann saw Eve, she ran.", "span1_text": "Ann", "span2_text": "she", "span2_index": 3, "label": 1},
        {"text": "Ann saw Eve, she ran.", "span1_text": "Eve", "span2_text": "she", "span2_index": 3, "label": 0},
    ],
    "fr_to_en": [{"translation": {"fr": "Le chat dort bien ici.", "en": "The cat sleeps well here."}}],
    "cnn_dm": [{"article": "A long story.", "highlights": "Short story."}],
    "tldr": [{"prompt": "POST: Long.\n\nTL;DR:", "completion": " Short."}],
}  # fmt: skip
PROMPTS = {  # what a model goes on from, and what it is taken to say: the answer to the last row
    "squadv2": (
        "Answer each question using information in the preceding background paragraph.\n"
        'If there is not enough information provided, answer with "Not in background."\n\n'
        "Title: Oil\n\nBackground: Oil was found.\n\nQ: What was found?\n\n"
        "A: Oil\n\nQ: By whom?\n\nA: Not in background.\n\nQ: When?\n\nA:"
    ),
    "drop": (
        "Answer each question using information in the preceding passage.\n\n"
        "Passage: 3 men, Ann and Eve.\n\nQuestion: How many?\n\nAnswer:"
    ),
    "quac": (
        "Answer each question using information in the preceding background paragraph.\n"
        'If there is not enough information provided, answer with "I don\'t know."\n\n'
        "TITLE: T\n\nPARAGRAPH: C.\n\nQ: Q1?\n\nA: one\n\nQ: Q2?\n\nA:"
    ),
    "wsc": (
        "Final Exam with Answer Key\n"
        "Instructions: Please carefully read the following passages. For each passage, you "
        "must identify which noun the pronoun marked in bold refers to.\n\nPassage: Ann saw Eve, *she* ran.\n\n"
        'Question: In the passage above, what does the pronoun "*she*" refer to?\n\nAnswer:'
    ),
    "fr_to_en": (
        "Translate the following sentences from French into English.\n\nFrench: Le chat dort bien ici.\nEnglish:"
    ),
    "cnn_dm": "A long story.\n\nTL;DR:",
    "tldr": "POST: Long.\n\nTL;DR:",
}


@pytest.fixture
def lm(tmp_path, tokenizer):
    make_llama(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return LanguageModel(str(tmp_path / "model"), batch_size=4)


@pytest.fixture
def file_of(tmp_path):
    def make(task, rows=None):
        file = tmp_path / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[task]))
        return str(file)

    return make


def answering(monkeypatch, lm, texts):
    """The contexts that are asked, which are answered with `texts` in turn."""
    asked = []

    def generate_until(requests, **kwargs):
        asked.extend(request.args for request in requests)
        return list(texts[: len(requests)])

    monkeypatch.setattr(lm, "generate_until", generate_until)
    return asked


@pytest.mark.parametrize(
    "task, said, expected",
    [
        ("squadv2", [" the oil!", " Not in background.", " Ann"], {"f1": [100, 100, 0], "em": [100, 100, 0]}),
        ("drop", [" Ann", " three"], {"f1": [50, 100], "em": [0, 100]}),  # one of two spans; either of two answers
        ("quac", [" number one", " I don't know."], {"f1": [pytest.approx(200 / 3), 100]}),
        ("wsc", [" Ann", " Ann"], {"acc": [1, 1]}),  # named where it is meant, not named where it is not
        ("cnn_dm", [" Short story."], {"rougeL": [1]}),
        ("tldr", [" Short"], {"rougeL": [1]}),
    ],
)
def test_prompts_word_for_word_and_figures(monkeypatch, lm, file_of, task, said, expected):
    asked = answering(monkeypatch, lm, said)
    assert run_task(lm, task, 0, None, [file_of(task)]) == expected
    context, how = asked[-1]
    assert context == PROMPTS[task]
    assert how["until"] == ["\n"] and not how["do_sample"]


def test_translation_is_scored_as_a_corpus(monkeypatch, lm, file_of):
    asked = answering(monkeypatch, lm, [" The cat sleeps well here."] * 2)
    found = run_task(lm, "fr_to_en", 0, None, [file_of("fr_to_en", ROWS["fr_to_en"] * 2)])
    assert asked[-1][0] == PROMPTS["fr_to_en"]
    said, references = ["the cat sat on a mat", "it is so"], ["the cat sat on the mat", "it is not so"]
    counts = Bleu.counts(said, [[one] for one in references])
    assert figure_of("bleu", counts) == pytest.approx(sacrebleu.corpus_bleu(said, [references]).score)
    assert with_change("bleu", found["bleu"], None)["value"][0] == pytest.approx(100)


@pytest.mark.parametrize(
    "task, context, choices",
    [
        (
            "hellaswag",
            "Complete each independent paragraph using common-sense reasoning.\n\nA man",
            [" sits.", " flies."],
        ),
        ("rte", "It rains.\n\nQuestion: It is wet. True or False?\n\nAnswer:", [" True", " False"]),
        (
            "sst",
            "For each snippet of text, label the sentiment of the text as positive or negative.\n\n"
            "Text: good film\n\nLabel:",
            [" negative", " positive"],
        ),
    ],
)
def test_a_choice_is_by_the_average_over_tokens(monkeypatch, lm, file_of, task, context, choices):
    """A long right answer of sum -10 loses by its sum to one of -6, and wins by its average a token."""
    right = choices[{"hellaswag": 0, "rte": 0, "sst": 1}[task]]
    asked = []

    def loglikelihood(self, requests, **kwargs):
        asked.extend(request[0] for request in requests)
        return [(-10.0 if request[0][1] == right else -6.0, False) for request in requests]

    monkeypatch.setattr(LanguageModel.__mro__[1], "_loglikelihood_tokens", loglikelihood)
    lengths = {choice: len(lm.tok_encode(choice)) for choice in choices}
    wrong = next(choice for choice in choices if choice != right)
    wins = 10 / lengths[right] < 6 / lengths[wrong]
    assert run_task(lm, task, 0, None, [file_of(task)]) == {"acc": [float(wins)]}
    assert sorted(set(asked)) == sorted((context, choice) for choice in choices)
    assert not lm.per_token


def test_too_few_examples_are_named(lm, file_of):
    with pytest.raises(InputError, match="expected 15 rows of examples or more, as TASK=ROWS,EXAMPLES"):
        run_task(lm, "sst", 15, None, [file_of("sst"), file_of("sst")])


def test_examples_come_from_the_second_file(monkeypatch, lm, file_of):
    asked = answering(monkeypatch, lm, [" x"])
    examples = [{"translation": {"fr": f"f{i}", "en": f"e{i}"}} for i in range(3)]
    files = [file_of("fr_to_en"), file_of("examples", examples)]
    run_task(lm, "fr_to_en", 2, None, files)
    context = asked[0][0]
    assert context.count("English: e") == 2 and context.count("Translate the following") == 1
    assert context.endswith("\n\nFrench: Le chat dort bien ici.\nEnglish:")


def test_text_loss_is_over_tokens(lm, tmp_path, tokenizer):
    import torch

    (tmp_path / "text.txt").write_text("abc\nlonger text\n")
    found = text_loss(lm, str(tmp_path / "text.txt"), None)["loss"]
    expected = []
    for text in ("abc", "longer text"):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            each = lm.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        expected.append([-each.sum().item(), len(text)])
    for own, of in zip(found, expected, strict=True):
        assert own == pytest.approx(of, abs=1e-3)
    loss = with_change("loss", found, found)
    assert loss["value"][0] == pytest.approx(sum(of[0] for of in expected) / 14, abs=1e-4)
    assert loss["change"] == [0, 0, 0]


def test_a_change_is_between_answers_to_the_same_row():
    """Both answers vary between rows, the difference does not: its interval is narrow, unlike those of the values."""
    base = [0.0, 1.0] * 50
    found = with_change("f1", [value + 0.25 for value in base], base)
    assert found["change"] == pytest.approx([0.25, 0.25, 0.25])
    assert found["value"][2] - found["value"][1] > 0.15
    assert "change" not in with_change("f1", [1.0], None) and "change" not in with_change("f1", [1.0], [1.0, 2.0])


def test_what_runs_runs_and_is_not_run_again(lm, file_of, tmp_path, monkeypatch):
    """Without data for a task, and with a model that is not there, the rest is done; a second call runs nothing."""
    models = {"base": lm.path, "gone": str(tmp_path / "gone"), "same": lm.path}
    data = {"sst": [file_of("sst", ROWS["sst"] * 4)], "rte": ["none.jsonl"]}
    todo = plan(["sst", "rte"], False, None)
    assert todo == [("sst", 0), ("rte", 0)] and plan(["sst", "tldr"], True, "x")[-2:] == [
        ("tldr", 0),
        ("pretraining text", 0),
    ]
    found = measure(models, todo, tmp_path / "rows", data=data)
    assert list(found["tasks"]) == ["sst, 0-shot"]
    assert found["tasks"]["sst, 0-shot"]["acc"]["same"]["change"] == [0, 0, 0]
    assert [note.split(":")[0] for note in found["notes"]] == [
        "base, rte, 0 examples", "gone, sst, 0 examples", "gone, rte, 0 examples", "same, rte, 0 examples"
    ]  # fmt: skip
    assert "none.jsonl" in found["notes"][0]
    monkeypatch.setattr(alignment_tax, "run_task", None)
    again = measure({"base": lm.path, "same": lm.path}, todo[:1], tmp_path / "rows", data=data)
    assert again["tasks"] == {
        "sst, 0-shot": {"acc": {name: found["tasks"]["sst, 0-shot"]["acc"][name] for name in ("base", "same")}}
    }
    other = measure({"base": lm.path}, todo[:1], tmp_path / "rows", data=data, limit=2)  # other rows: not those
    assert other["tasks"] == {} and other["notes"]


def test_every_task_has_a_file_and_shots():
    assert {file.stem for file in alignment_tax.TASKS.glob("[!_]*.yaml")} == set(SHOTS) == set(ROWS)


def test_from_the_command_line(lm, file_of, tmp_path, capsys):
    output = tmp_path / "tax.json"
    given = ["--models", f"base={lm.path}", f"own={lm.path}", "--tasks", "sst", "--output", str(output)]
    alignment_tax.main([*given, "--data", f"sst={file_of('sst')}", "--zero_shot_only"])
    assert json.loads(output.read_text())["tasks"]["sst, 0-shot"]["acc"]["own"]["n"] == 1
    assert "sst, 0-shot" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is a folder; expected a file"):
        alignment_tax.main([*given, "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data nope"):
        alignment_tax.main([*given, "--data", "nope=x.jsonl"])
