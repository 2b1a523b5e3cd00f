"""Loading a policy: vocabularies that grew, in every stage that reads the folder of the one before it; its LM head."""

from contextlib import nullcontext

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_llama, make_tokenizer
from datasets import Dataset
from peft import get_peft_model
from ppo_helpers import config, known, logged, lora
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from instructgpt_trl import PPOTrainer, RewardConfig, RewardModel, RewardTrainer, SFTConfig, SFTTrainer
from instructgpt_trl.data import InputError
from instructgpt_trl.models.loading import fold_last_position, load_policy

# PEFT's, of its own wrapper of a tied LM head: peft/tuners/trainable_tokens/layer.py, TrainableTokensLayer.__init__
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type '<class 'peft:UserWarning")

SETTINGS = dict(
    per_device_train_batch_size=2,
    max_steps=2,
    learning_rate=1e-2,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """
    SFT with the chat template of another model, whose turn end is a token that the base does not have; then the RM.
    The LM head is not tied: TRL's fused head does not find the bias of PEFT's wrapper of a tied one.
    """
    path = tmp_path_factory.mktemp("chain")
    make_llama(tie_word_embeddings=False).save_pretrained(path / "base")
    make_tokenizer().save_pretrained(path / "base")
    other = make_tokenizer(extra=("<end>",))
    other.chat_template = CHAT_TEMPLATE.replace("<eos>", "<end>")
    other.eos_token = "<end>"
    other.save_pretrained(path / "template")
    rows = Dataset.from_list([{"prompt": user(f"say {i}"), "completion": answer(str(i))} for i in range(4)])
    args = SFTConfig(str(path / "sft"), chat_template_path=str(path / "template"), residual_dropout=0, **SETTINGS)
    sft = SFTTrainer(str(path / "base"), args, train_dataset=rows, peft_config=lora(task_type="CAUSAL_LM"))
    sft.train()
    sft.save_model()
    ranked = Dataset.from_list(
        [{"prompt": user(f"say {i}"), "completions": [answer("a"), answer("bb")], "ranks": [1, 2]} for i in range(4)]
    )
    reward = RewardTrainer(str(path / "sft"), RewardConfig(str(path / "reward"), **SETTINGS), train_dataset=ranked)
    reward.train()
    reward.save_model()
    return path, sft, reward


def test_a_policy_with_new_tokens_is_read_as_it_was_trained(chain):
    path, sft, _ = chain
    model, tokenizer = load_policy(str(path / "sft"))
    assert len(tokenizer) > 258 and model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    ids = torch.tensor([[65, 66, len(tokenizer) - 1, 67]])
    sft.model.eval()
    expected = sft.model(input_ids=ids).logits
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_reward_model_with_new_tokens_scores_as_it_was_trained(chain):
    path, _, reward = chain
    asked = [user("say 1")], [answer("bb")]
    loaded = RewardModel.from_pretrained(str(path / "reward"))
    assert loaded.score(*asked) == pytest.approx(reward.reward_model.score(*asked), rel=1e-5)


def test_ppo_of_models_with_new_tokens_has_one_base_and_starts_at_zero_kl(chain, tmp_path):
    path, _, reward = chain
    rows = Dataset.from_list([{"prompt": user(f"say {i}")} for i in range(4)])
    args = config(tmp_path, max_steps=2)
    trainer = PPOTrainer(str(path / "sft"), reward_model=str(path / "reward"), args=args, train_dataset=rows)
    assert len({id(role.network) for role in trainer.roles}) == 1
    trainer.train()
    assert logged(trainer, "objective/kl")[0] == 0.0
    assert logged(trainer, "policy/approxkl")[0] == 0.0
    trainer.save_model()
    load_policy(str(tmp_path))


def resized(base_dir: str, path, rows: int, seed: int = 0):
    """An adapter that plain PEFT saved on a base whose embeddings were padded to `rows`, with those embeddings."""
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    network = get_peft_model(model, lora(task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="resized during finetuning"):
        network.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return network


def test_embeddings_saved_with_an_adapter_are_read(base_dir, tmp_path):
    network = resized(base_dir, tmp_path, 264)
    model, _ = load_policy(str(tmp_path))
    assert torch.equal(model.get_input_embeddings().weight, network.get_input_embeddings().weight)


def test_an_adapter_of_another_shape_is_one_line(tmp_path):
    """Saved on a model of another width."""
    make_llama(hidden=32).save_pretrained(tmp_path / "wide")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    get_peft_model(model, lora(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    make_llama(hidden=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="the adapter does not fit its base: .*size mismatch") as error:
        load_policy(str(tmp_path / "sft"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "settings", "refused"),
    [
        ("model.layers.2.self_attn.q_proj.weight", {}, True),
        ("model.layers.1.mlp.experts.7.gate_proj.weight", {}, False),  # an expert is no layer
        ("model.layers.2.enorm.weight", {"num_nextn_predict_layers": 1}, False),  # predicts the token after the next
        ("model.layers.3.enorm.weight", {"num_nextn_predict_layers": 1}, True),
        ("other.5.weight", {}, False),
    ],
)
def test_weights_of_layers_that_the_config_lacks_are_refused(tmp_path, key, settings, refused):
    model = make_llama(**settings)
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), key: torch.zeros(2, 2)})
    make_tokenizer().save_pretrained(tmp_path)
    if not refused:
        load_policy(str(tmp_path))
        return
    layer = int(key.split(".")[2]) + 1
    with pytest.raises(InputError, match=f"by its config it has 2 layers, and its weights are of {layer}"):
        load_policy(str(tmp_path))


def test_fewer_layers_may_be_asked_for(base_dir):
    model, _ = load_policy(base_dir, num_hidden_layers=1)
    assert len(model.model.layers) == 1


class Products(TorchDispatchMode):
    """Names of the operations whose result has `size` columns."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.size(-1) == self.size and "mm" in func.__name__:
            self.names.append(func.__name__.split(".")[0])
        return out


def test_the_head_gets_the_last_positions_as_one_matrix():
    """Not row by row, `bmm`, for which torch copies a frozen bfloat16 head once a row on a CPU."""
    model = make_llama().bfloat16().requires_grad_(False)
    names = []
    for fold in (nullcontext, fold_last_position, nullcontext):
        with fold(model), Products(258) as products:
            model(torch.zeros(3, 5, dtype=torch.long), logits_to_keep=1)
        names.append(products.names)
    assert names == [["bmm"], ["mm"], ["bmm"]]


def test_the_policy_samples_so(folders, tmp_path, prompts):
    trainer = PPOTrainer(folders.sft, reward_funcs=known([1.0] * 4), args=config(tmp_path), train_dataset=prompts)
    head, seen = trainer.roles.policy.model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, out: seen.append(args[0].is_contiguous()))
    trainer.rollout([prompts[i] for i in range(4)])
    assert len(seen) > 1 and all(seen)
