"""Winogender and CrowS-Pairs on probabilities that are known."""

import json
import math

import bias
import numpy as np
import pytest
from bias import PREFIXES, Pair, entropies, measure, read_crows_pairs, read_winogender
from conftest import make_llama
from language_model import LanguageModel


class Known:
    """Log-probabilities by text."""

    def __init__(self, found):
        self.found, self.asked = found, []

    def logprobs(self, prompts, completions):
        self.asked += zip(prompts, completions, strict=True)
        return [self.found[text.strip()] for text in completions]


def test_entropy_by_hand():
    """Equal: 1 bit. 3 to 1: -(3/4 log2 3/4 + 1/4 log2 1/4) = 0.811. Certain: 0, without a NaN."""
    found = entropies([0.0, math.log(3), -math.log(3), 1000.0, -1000.0])
    assert found.tolist() == pytest.approx([1, 0.8112781, 0.8112781, 0, 0], abs=1e-7)


def test_three_prefixes_and_the_stereotype_score():
    """Of four pairs the more stereotyping sentence is preferred twice, once neither: 62.5 %."""
    lm = Known({"s1": -1.0, "s2": -2.0, "s3": -5.0, "s4": -5.0, "s5": -9.0, "s6": -3.0})
    pairs = [Pair("s1", "s2"), Pair("s6", "s5"), Pair("s3", "s4"), Pair("s5", "s6")]
    found = measure(lm, pairs, stereotypes=True)
    assert list(found) == ["basic", "respectful", "biased"]
    for of in found.values():
        assert of["stereotype_score"][0] == 62.5 and of["n"] == 4
        assert of["entropy"][0] == pytest.approx(np.mean(entropies([1.0, 6.0, 0.0, -6.0])))
        assert of["entropy"][1] <= of["entropy"][0] <= of["entropy"][2]
    assert lm.asked[0] == ("", "s1") and lm.asked[-1] == (PREFIXES["biased"], " s6")
    assert "stereotype_score" not in measure(lm, pairs, stereotypes=False)["basic"]


def test_winogender_has_a_pair_of_each_template_with_a_participant(tmp_path):
    file = tmp_path / "w.tsv"
    rows = ["sentid\tsentence"]
    for who in ("customer", "someone"):
        for answer in "01":
            rows += [
                f"cook.{who}.{answer}.{gender}.txt\t{who}{answer} {gender}."
                for gender in ("male", "female", "neutral")
            ]
    file.write_text("\n".join(rows) + "\n")
    assert read_winogender(file) == [
        Pair("customer0 male.", "customer0 female."),
        Pair("customer1 male.", "customer1 female."),
    ]
    file.write_text("\n".join(rows[:2]) + "\n")
    with pytest.raises(ValueError, match="no male and female sentence of cook.customer.0"):
        read_winogender(file)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("winogender", "sentid\tsentence\nx.male.txt\ts\n", "row 1: `sentid` is 'x.male.txt'; expected OCCUPATION"),
        ("winogender", "sentid\tsentence\nx.y.0.male.txt\n", "row 1: expected 2 values"),
        ("crows_pairs", "sent_more,sent_less\na,b\nc\n", "row 2: expected 2 values"),
        ("crows_pairs", "sent_more,sent_less\na,b,c\n", "row 1: expected 2 values"),
        ("crows_pairs", 'sent_more,sent_less\n"a,b\n', "expected CSV in UTF-8"),
        ("crows_pairs", "sent_more,sent_less\n", "no rows below the header"),
    ],
)
def test_pairs_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / "in").write_text(text)
    with pytest.raises(SystemExit, match=f"error: .*/in(, |: ){message}"):
        bias.main(["--model", "x", f"--{name}", str(tmp_path / "in"), "--output", str(tmp_path / "out.json")])


def test_crows_pairs(tmp_path):
    file = tmp_path / "c.csv"
    file.write_text(',sent_more,sent_less,stereo_antistereo\n0,"a, b",c,stereo\n1,d,e,antistereo\n')
    assert read_crows_pairs(file) == [Pair("a, b", "c"), Pair("d", "e")]
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column sent_more, sent_less"):
        read_crows_pairs(file)


@pytest.fixture
def folder(tmp_path, tokenizer):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_log_probabilities_are_those_of_the_model(folder, tokenizer):
    """A sum over a completion's tokens, or an average; behind nothing EOS begins the text."""
    import torch

    lm = LanguageModel(folder, batch_size=2)
    prompts, completions = ["ab", "abc", ""], [" cd", "e", "xyz"]

    def expected(prompt, completion):
        start = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
        ids = start + tokenizer(completion)["input_ids"]
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [logits[i - 1, ids[i]].item() for i in range(len(start), len(ids))]

    each = [expected(*pair) for pair in zip(prompts, completions, strict=True)]
    assert lm.logprobs(prompts, completions) == pytest.approx([sum(one) for one in each], abs=1e-4)
    lm.per_token = True
    assert lm.logprobs(prompts, completions) == pytest.approx([sum(one) / len(one) for one in each], abs=1e-4)


def test_from_the_command_line(folder, tmp_path):
    file, output = tmp_path / "c.csv", tmp_path / "out.json"
    file.write_text("sent_more,sent_less\nab,ac\nbd,cd\n")
    bias.main(["--model", folder, "--crows_pairs", str(file), "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["crows_pairs"]["basic"]["n"] == 2 and 0 <= found["crows_pairs"]["biased"]["entropy"][0] <= 1
    with pytest.raises(SystemExit, match="nothing to measure"):
        bias.main(["--model", folder, "--output", str(output)])
    with pytest.raises(SystemExit, match="none.csv"):
        bias.main(["--model", folder, "--crows_pairs", "none.csv", "--output", str(output)])
    (tmp_path / "no_model").mkdir()
    for name in ("gone", "no_model"):
        with pytest.raises(SystemExit, match=f"error: .*{name}: cannot be loaded .*expected the folder of a model"):
            bias.main(["--model", str(tmp_path / name), "--crows_pairs", str(file), "--output", str(output)])
    with pytest.raises(SystemExit, match="is a folder; expected a file"):
        bias.main(["--model", folder, "--crows_pairs", str(file), "--output", str(tmp_path)])
