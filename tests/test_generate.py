"""Completions of a policy: equal to the model's own, resumable, nothing overwritten."""

import json
from pathlib import Path

import generate
import pytest
import torch
from conftest import make_llama
from files import fingerprint, fingerprint_of
from generate import Policy

from instructgpt_trl.data import encode_prompt

CHAT = [{"role": "user", "content": "hi"}]
PROMPTS = ["ab", "a longer prompt", CHAT, "c", "ab"]


@pytest.fixture
def folder(tmp_path, tokenizer):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def greedy(policy, prompt, tokens) -> str:
    """One token after the other, without a cache or a batch."""
    ids = encode_prompt(policy.tokenizer, prompt)
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(policy.model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == policy.tokenizer.eos_token_id:
            break
    return policy.tokenizer.decode(ids[start:], skip_special_tokens=True)  # with the space around it


def test_greedy_completions_are_the_models_own(folder):
    policy = Policy(folder, batch_size=2, max_new_tokens=9)
    assert policy.complete(PROMPTS) == [greedy(policy, prompt, 9) for prompt in PROMPTS]


def test_cut_before_the_first_newline(folder, monkeypatch):
    policy = Policy(folder, batch_size=8, cut_at_newline=True)
    texts = {"a": " one\ntwo", "b": "\nthree", "c": "four "}

    def sampled(input_ids, eos_token_id, **kwargs):
        assert {policy.tokenizer.decode([token]) for token in eos_token_id} >= {"\n"}
        new = [policy.tokenizer(text)["input_ids"] for text in texts.values()]
        longest = max(map(len, new))
        return torch.cat([input_ids, torch.tensor([ids + [256] * (longest - len(ids)) for ids in new])], dim=1)

    monkeypatch.setattr(policy.model, "generate", sampled)
    assert policy.complete(list(texts)) == ["one", "", "four"]


def test_sampling_ends_with_a_newline(folder):
    """Also in the middle of a token, which some vocabularies have; only then."""
    policies = [Policy(folder, 4, 30, temperature=1.0, cut_at_newline=cut) for cut in (False, True)]
    newlines = policies[1]._newlines
    assert newlines == set(policies[0].tokenizer("\n")["input_ids"])
    whole, cut = (policy.sample(["ab", "c"] * 100) for policy in policies)
    ends = [next((i + 1 for i, token in enumerate(ids) if token in newlines), len(ids)) for ids in whole]
    assert cut == [ids[:end] for ids, end in zip(whole, ends, strict=True)] != whole
    policies[1].tokenizer.add_tokens(["x\n\n"])
    del policies[1]._newlines
    assert len(policies[1]._newlines) == len(newlines) + 1


def test_log_probabilities_are_of_the_sampled_tokens(folder):
    """With the end only where a sample came to one, not of a text that is encoded again."""
    policy = Policy(folder, batch_size=2, max_new_tokens=7, temperature=1.0)
    ends = set(range(32))  # so that some come to one
    policy._ends = lambda prompt: ends
    prompts = PROMPTS * 8
    sampled = policy.sample(prompts)
    assert {ids[-1] in ends for ids in sampled} == {True, False} and not any(ends & {*ids[:-1]} for ids in sampled)
    assert all(len(ids) == 7 or ids[-1] in ends for ids in sampled)
    for prompt, ids, found in zip(prompts, sampled, policy.logprobs(prompts, sampled), strict=True):
        start = encode_prompt(policy.tokenizer, prompt)
        with torch.no_grad():
            each = policy.model(torch.tensor([start + ids])).logits[0].log_softmax(-1)
        expected = sum(each[len(start) + i - 1, token].item() for i, token in enumerate(ids))
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def run(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt, "category": str(i)} for i, prompt in enumerate(["ab", "cde", "f", "ab", "gh"])]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(name="out.jsonl", *flags) -> Path:
        output = tmp_path / name
        given = ["--model", folder, "--prompts", str(prompts), "--output", str(output), "--max_new_tokens", "6"]
        generate.main([*given, "--batch_size", "2", *flags])
        return output

    return call


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_rows_in_their_order_with_all_columns(run):
    rows = rows_of(run())
    assert [(row["prompt"], row["category"]) for row in rows] == [
        ("ab", "0"), ("cde", "1"), ("f", "2"), ("ab", "3"), ("gh", "4")
    ]  # fmt: skip
    assert rows[0]["completion"] == rows[3]["completion"] and "sample" not in rows[0]
    several = rows_of(run("several.jsonl", "--samples", "2", "--temperature", "1"))
    assert [row["sample"] for row in several] == [0, 1] * 5
    assert len({row["completion"] for row in several}) > 5


@pytest.mark.parametrize("flags", [(), ("--samples", "3", "--temperature", "1", "--seed", "7")])
def test_goes_on_where_it_stopped_with_the_same_rows(run, flags, monkeypatch):
    whole = run("whole.jsonl", *flags).read_text(encoding="utf-8")
    calls, batch = [], Policy.batch

    def stops(self, prompts, start):
        calls.append(start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch(self, prompts, start)

    monkeypatch.setattr(Policy, "batch", stops)
    with pytest.raises(KeyboardInterrupt):
        run("part.jsonl", *flags)
    monkeypatch.setattr(
        Policy, "batch", lambda self, prompts, start: calls.append(start) or batch(self, prompts, start)
    )
    again = run("part.jsonl", *flags)
    assert calls[:3] == [0, 2, 2]
    assert again.read_text(encoding="utf-8") == whole
    assert not list(again.parent.glob("part.jsonl.*"))


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5])
def test_a_line_cut_off_by_a_crash_is_written_again(run, tmp_path, kept):
    """And a batch of which only some rows were written is sampled again, with its own seed."""
    flags = ("--temperature", "1")
    whole = run("whole.jsonl", *flags).read_text(encoding="utf-8")
    begun = json.dumps({"settings": settings_of(tmp_path, run, *flags)})
    lines = whole.split("\n")
    part = tmp_path / "out.jsonl.part"
    part.write_text("\n".join([begun, *lines[:kept], lines[kept][:9]]), encoding="utf-8")
    assert run("out.jsonl", *flags).read_text(encoding="utf-8") == whole


def settings_of(tmp_path, run, *flags) -> dict:
    """What a run with these flags writes first."""
    seen = []
    original = generate.write_completions
    generate.write_completions = lambda rows, output, settings, policy: seen.append(settings)
    try:
        run("settings.jsonl", *flags)
    finally:
        generate.write_completions = original
    return seen[0]


def test_nothing_is_overwritten_or_mixed(run, tmp_path):
    output = run()
    before = output.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="out.jsonl: is there already"):
        run()
    assert output.read_text(encoding="utf-8") == before
    part = tmp_path / "other.jsonl.part"
    part.write_text(json.dumps({"settings": {**settings_of(tmp_path, run), "seed": 5, "samples": 9}}) + "\n")
    with pytest.raises(SystemExit, match=r"begun with other samples, seed \(9, 5\)"):
        run("other.jsonl")
    part = tmp_path / "prompts2.jsonl.part"
    rows = [{"prompt": "other", "completion": "x"}]
    part.write_text("".join(json.dumps(one) + "\n" for one in [{"settings": settings_of(tmp_path, run)}, *rows]))
    with pytest.raises(SystemExit, match="begun with other prompts"):
        run("prompts2.jsonl")
    with pytest.raises(SystemExit, match="nothing.jsonl"):
        generate.main(["--model", "x", "--prompts", str(tmp_path / "nothing.jsonl"), "--output", str(tmp_path / "o")])


@pytest.mark.parametrize("text", ["\\x00\n", "[]\n", '{"settings": 1}\n', '{"settings": {}}\n{"completion": "a"}\n'])
def test_a_begun_file_that_is_none_is_named(run, tmp_path, text):
    (tmp_path / "out.jsonl.part").write_text(text)
    with pytest.raises(SystemExit, match="out.jsonl.part: holds no completions; delete it"):
        run()
    assert (tmp_path / "out.jsonl.part").read_text() == text


def test_a_folder_that_is_no_model_or_no_output(run, tmp_path):
    (tmp_path / "no_model").mkdir()
    (tmp_path / "no_model" / "config.json").write_text("{}")
    for name in ("gone", "no_model"):
        with pytest.raises(SystemExit, match=f"error: .*{name}: cannot be loaded .*expected the folder of a model"):
            run("out.jsonl", "--model", str(tmp_path / name))
    with pytest.raises(SystemExit, match="no_model: is a folder; expected a file"):
        run("no_model")


@pytest.mark.parametrize("flag", ["--batch_size", "--samples", "--max_new_tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_numbers_below_one_are_refused(run, capsys, flag, value):
    with pytest.raises(SystemExit, match="2"):
        run("out.jsonl", flag, value)
    assert f"argument {flag}: expected a whole number, 1 or more, found '{value}'" in capsys.readouterr().err


def test_a_temperature_below_zero_is_refused(run, capsys):
    for value in ("-1", "warm", "nan"):
        with pytest.raises(SystemExit, match="2"):
            run("out.jsonl", "--temperature", value)
        assert f"expected a number, 0 or more, found '{value}'" in capsys.readouterr().err


def test_what_a_model_depends_on(tmp_path):
    """Its own files and its base's, not the folders in it; a broken adapter is named where it is loaded."""
    for name in ("base", "adapter", "adapter/report"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("a")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    before = fingerprint(tmp_path / "adapter")
    (tmp_path / "adapter" / "report" / "report.json").write_text("{}")
    assert fingerprint(tmp_path / "adapter") == before
    (tmp_path / "base" / "model.safetensors").write_text("ab")
    assert fingerprint(tmp_path / "adapter") != before
    for broken in ("{", "[]", '{"base_model_name_or_path": null}'):
        (tmp_path / "adapter" / "adapter_config.json").write_text(broken)
        assert fingerprint(tmp_path / "adapter")[0] == str(tmp_path / "adapter")


def test_what_a_judge_depends_on(tmp_path, monkeypatch):
    """Its file; of no judge nothing, not the folder that one happens to be in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text("a")
    before, none = fingerprint_of("python:judge.py:f"), fingerprint_of(None)
    assert none == [None] and fingerprint_of("openai:m@http://x") == ["openai:m@http://x"]
    (tmp_path / "judge.py").write_text("ab")
    assert fingerprint_of("python:judge.py:f") != before and fingerprint_of(None) == none
    assert json.loads(json.dumps(before)) == before
