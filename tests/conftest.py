"""Tiny models and rows for every test: made from code in milliseconds, nothing downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.environ.get("TEST_GPU"):  # which tests/test_gpu.py is for
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # numbers are compared with those of a CPU

import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

disable_progress_bar()
torch.set_num_threads(1)
torch.backends.mps.is_available = lambda: False

# Like SmolLM2's: the turn ends at EOS, and the template puts a newline after it
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tokenizer(pad_token: str = "<pad>", extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: 256 bytes, `<pad>`, `<eos>` and `extra`; `pad_token="<eos>"` for the case pad == EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<eos>", *extra)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad_token, eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def make_llama(seed: int = 0, hidden: int = 16, vocab: int = 258, **config) -> LlamaForCausalLM:
    """A Llama of two layers, with weights large enough that its outputs differ clearly between inputs."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=256,
        eos_token_id=257,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config}))


def make_gpt2(seed: int = 0, hidden: int = 16) -> GPT2LMHeadModel:
    """A GPT-2 of two layers: learned positions and residual dropout of its own."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=258,
            n_embd=hidden,
            n_layer=2,
            n_head=2,
            n_positions=256,
            initializer_range=0.2,
            pad_token_id=256,
            eos_token_id=257,
            bos_token_id=257,
        )
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def folders(base_dir, tmp_path_factory):
    """Policies and reward models in all their forms, as `ppo_helpers.Folders` makes them on first use."""
    from ppo_helpers import Folders

    return Folders(base_dir, tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """As `folders`, with rows of 64, bitsandbytes' smallest block."""
    from ppo_helpers import Folders

    path = tmp_path_factory.mktemp("wide")
    make_llama(hidden=64).save_pretrained(path / "base")
    make_tokenizer().save_pretrained(path / "base")
    return Folders(str(path / "base"), path)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> str:
    """Folder of a tiny Llama and its tokenizer, as `from_pretrained` reads it."""
    path = str(tmp_path_factory.mktemp("base"))
    make_llama().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("gpt2"))
    make_gpt2().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def demonstrations() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"say {word}: ", "completion": f"{word} {word}"} for word in ("one", "two", "three", "four")]
    )


@pytest.fixture
def rankings() -> Dataset:
    """Ragged K = 2..5, with ties; the text with more 'a' is better."""
    return Dataset.from_list(
        [
            {"prompt": "p: ", "completions": ["aaa", "aab", "abb"], "ranks": [1, 2, 3]},
            {"prompt": "longer prompt: ", "completions": ["bb", "aa"], "ranks": [2, 1]},
            {"prompt": "q: ", "completions": ["a", "b", "c", "dd", "eee"], "ranks": [1, 2, 2, 3, 3]},
            {"prompt": "r: ", "completions": ["xyz", "aaaa", "ab", "ba"], "ranks": [4, 1, 2, 2]},
        ]
    )


@pytest.fixture
def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": f"prompt {i}{'.' * i}"} for i in range(16)])


@pytest.fixture
def texts() -> Dataset:
    return Dataset.from_list([{"text": f"plain text number {i} of the corpus"} for i in range(64)])
