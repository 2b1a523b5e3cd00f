"""data/encoding.py: the one way to token ids, and which tokenizers agree."""

import pytest
from conftest import make_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from instructgpt_trl.data import InputError, check_tokenizers, encode_completion, encode_prompt, pack_texts

EOS = 257
USER, ASSISTANT = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}]


def ids(text: str) -> list[int]:
    return make_tokenizer()(text)["input_ids"]


def test_prompt_ids():
    tokenizer = make_tokenizer()
    assert encode_prompt(tokenizer, "ab") == ids("ab")
    assert encode_prompt(tokenizer, USER) == [*ids("<user>hi"), EOS, *ids("\n<assistant>")]
    assert encode_prompt(tokenizer, "") == []


def test_prompt_does_not_end_at_eos():
    class Ending:
        """A tokenizer that ends every text with EOS."""

        eos_token, eos_token_id = "<eos>", EOS

        def __call__(self, text):
            return {"input_ids": [*ids(text), EOS]}

    assert encode_prompt(Ending(), "ab") == ids("ab")
    assert encode_prompt(Ending(), "ab<eos>")[-1] == EOS


def test_pitfall_06_completion_is_encoded_apart_and_ends_at_eos():
    tokenizer = make_tokenizer()
    assert encode_completion(tokenizer, "ab", "cd") == [*ids("cd"), EOS]
    assert encode_completion(tokenizer, "ab", "cd<eos>") == [*ids("cd"), EOS]
    # The template writes '\n' after EOS, which the policy never reaches
    assert encode_completion(tokenizer, USER, ASSISTANT) == [*ids("ho"), EOS]
    assert encode_completion(tokenizer, USER, "ho") == [*ids("ho"), EOS]
    # Of several turns only what follows the last EOS is cut
    turns = [*ASSISTANT, *USER, {"role": "assistant", "content": "so"}]
    expected = [*ids("ho"), EOS, *ids("\n<user>hi"), EOS, *ids("\n<assistant>so"), EOS]
    assert encode_completion(tokenizer, USER, turns) == expected
    assert encode_completion(tokenizer, "", "") == [EOS]


def test_a_special_token_before_the_turns_end_does_not_end_it():
    """As tool calls of LFM2 (`<|tool_call_end|><|im_end|>`) and answers of Command R7B."""
    tokenizer = make_tokenizer(extra=("<tool>",))
    called = [{"role": "assistant", "content": "f()<tool>"}]
    assert encode_completion(tokenizer, USER, called) == [*ids("f()"), 258, EOS]
    inside = [{"role": "assistant", "content": "<tool> f"}]
    assert encode_completion(tokenizer, USER, inside) == [258, *ids(" f"), EOS]


@pytest.mark.parametrize("behind", ["\n", "\n<eos>", ""])
def test_pitfall_06_completion_ends_where_the_templates_turn_ends(behind):
    """As Gemma's (`<end_of_turn>`, newline) and Phi-3's (`<|end|>`, newline, EOS): the policy stops at the first."""
    tokenizer, end = make_tokenizer(extra=("<end>",)), 258
    start = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    tokenizer.chat_template = start + "{{ '<assistant>' if add_generation_prompt else '" + behind + "' }}"
    assert encode_completion(tokenizer, USER, ASSISTANT) == [*ids("ho"), end]
    spaced = [{"role": "assistant", "content": "ho \n"}]
    assert encode_completion(tokenizer, USER, spaced) == [*ids("ho \n"), end]
    turns = [*ASSISTANT, *USER, {"role": "assistant", "content": "so"}]
    expected = [*ids("ho"), end, *ids("<user>hi"), end, *ids("<assistant>so"), end]
    assert encode_completion(tokenizer, USER, turns) == expected


def test_completion_under_a_template_without_eos_gets_one():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
    assert encode_completion(tokenizer, USER, ASSISTANT) == [*ids("assistant:ho;"), EOS]


def test_encoding_refuses_what_it_cannot_do():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="renders the prompt differently once an answer follows"):
        encode_completion(tokenizer, USER, ASSISTANT)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no EOS token; set tokenizer.eos_token"):
        encode_completion(tokenizer, "a", "b")
    with pytest.raises(InputError, match="has no EOS token; set tokenizer.eos_token"):
        pack_texts(Dataset.from_list([{"text": "t"}]), tokenizer, 4)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.text(min_size=1, max_size=12))
def test_joined_ids_decode_to_the_joined_text(prompt, completion):
    tokenizer = make_tokenizer()
    joined = encode_prompt(tokenizer, prompt) + encode_completion(tokenizer, prompt, completion)
    assert joined[-1] == EOS and joined.count(EOS) == 1
    assert tokenizer.decode(joined[:-1]) == prompt + completion


def test_packed_texts_lose_nothing_but_a_single_token():
    texts = ["abc", "d", "efghij", "k"]  # 3 + 1 + 6 + 1 letters and 4 EOS: 15 tokens
    stream = [token for text in texts for token in [*ids(text), EOS]]
    rows = Dataset.from_list([{"text": text, "source": "s"} for text in texts])
    packed = pack_texts(rows, make_tokenizer(), 4)
    assert packed.column_names == ["input_ids"]
    assert list(packed["input_ids"]) == [stream[:4], stream[4:8], stream[8:12], stream[12:]]
    # 15 tokens in blocks of 7: the one left over predicts nothing and goes
    assert list(pack_texts(rows, make_tokenizer(), 7)["input_ids"]) == [stream[:7], stream[7:14]]


def test_pitfall_07_tokenizers_must_agree():
    check_tokenizers(make_tokenizer(), make_tokenizer(), ("policy", "reward model"))
    # The pad token never reaches a model unmasked
    check_tokenizers(make_tokenizer(), make_tokenizer("<eos>"), ("policy", "reward model"))

    def message(change) -> str:
        other = make_tokenizer()
        other = change(other) or other
        with pytest.raises(InputError, match="^the tokenizers of policy and reward model differ: ") as error:
            check_tokenizers(make_tokenizer(), other, ("policy", "reward model"))
        return str(error.value)

    assert "vocabulary of 258 and 259 tokens ('<more>' is None and 258)" in message(
        lambda other: make_tokenizer(extra=("<more>",))
    )
    assert "differ: chat template; train both" in message(lambda other: setattr(other, "chat_template", "x"))
    assert "eos_token_id 257 and 256" in message(lambda other: setattr(other, "eos_token", "<pad>"))
    assert "bos_token_id None and 257" in message(lambda other: setattr(other, "bos_token", "<eos>"))

    def lower(other):
        from tokenizers.normalizers import Lowercase

        other.backend_tokenizer.normalizer = Lowercase()

    assert "token ids of 'The quick" in message(lower)
