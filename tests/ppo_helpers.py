"""What the tests of the PPO stage share: settings of seconds, stored completions, passes of plain transformers."""

import json
from pathlib import Path

import torch
from conftest import make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl import RLOOTrainer

from instructgpt_trl import PPOConfig, PPOTrainer

EOS = 257
LLAMA_TARGETS, GPT2_TARGETS = ["q_proj", "v_proj"], ["c_attn"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{**dict(r=2, lora_alpha=4, target_modules=LLAMA_TARGETS), **settings})


def nf4(compute: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    options = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def config(path, **settings) -> PPOConfig:
    """Two minibatches of two micro-batches of one episode; no clipping, no warm-up, no files."""
    small = dict(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        max_completion_length=6,
        max_steps=2,
        max_grad_norm=1e9,
        warmup_updates=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        save_completions=False,
        dataloader_pin_memory=False,
    )
    return PPOConfig(output_dir=str(path), **{**small, **settings})


def mean_id(completion_ids, **_) -> list[float]:
    """A reward that differs between nearly all completions: the mean of its token ids, scaled."""
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


def stored_completion(prompt_ids: list[int]) -> list[int]:
    """A completion that depends on the prompt alone: 1 to 6 tokens, two in three end with EOS."""
    generator = torch.Generator().manual_seed(sum(prompt_ids) + len(prompt_ids))
    length, ends = (int(torch.randint(high, (), generator=generator)) for high in (5, 3))
    ids = torch.randint(256, (length + 1,), generator=generator).tolist()
    return ids + [EOS] * (ends > 0)


def store_completions(monkeypatch, complete=stored_completion) -> list[list[tuple[list[int], list[int]]]]:
    """
    Replace TRL's generation by `complete(prompt_ids)` for each prompt.

    Returns:
        a list that grows by one for each batch of prompts: its prompts' and completions' ids in order.
    """
    batches = []

    def generate(self, prompt_ids, *_):
        batches.append([(list(ids), complete(list(ids))) for ids in prompt_ids])
        return [completion for _, completion in batches[-1]]

    monkeypatch.setattr(RLOOTrainer, "_generate_single_turn", generate)
    return batches


def chunks(episodes, size: int) -> tuple[torch.Tensor, ...]:
    """All rows in their order, so many at a time."""
    return torch.arange(len(episodes["mask"])).split(size)


def logged(trainer: PPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


class Recorder(TrainerCallback):
    """Weights and gradients of policy and value model just before each optimizer step (behind the clipping)."""

    def __init__(self, trainer: PPOTrainer | None = None):
        self.steps: list[dict[str, dict[str, torch.Tensor]]] = []
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step = {}
        for role in ("policy", "value"):
            trained = {k: p for k, p in getattr(self.trainer.roles, role).parameters().items() if p.requires_grad}
            step[role] = {name: p.detach().clone() for name, p in trained.items()}
            step[f"{role}_grad"] = {name: p.grad.clone() for name, p in trained.items()}
        self.steps.append(step)


def record(trainer: PPOTrainer) -> Recorder:
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    return recorder


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol=1e-5, atol=1e-6) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert_close(got, expected, rtol=0, atol=0)


# What other software leaves on a disk


def randomise(model, scale: float = 0.3, seed: int = 0) -> None:
    """A fresh adapter adds nothing; give it weights that do."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale, generator=generator)


def save_sft_adapter(base: str, path: str, seed: int = 1, **settings) -> str:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(task_type="CAUSAL_LM", **settings))
    randomise(model, seed=seed)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def save_reward_model(
    base: str, path: str, adapter: bool, bias: float = 0.7, seed: int = 2, tokenizer=None, r=3
) -> str:
    """A reward model as plain transformers and PEFT save it, and a `reward_model.json` beside it."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
    head = model.score.weight.data
    head.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    if adapter:
        model = get_peft_model(model, lora(task_type="SEQ_CLS", modules_to_save=["score"], r=r))
        randomise(model, seed=seed)
    model.save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    file = {"format": 1, "kind": "adapter" if adapter else "full", "base": base if adapter else None}
    file |= {"bias": bias, "calibrated": True, "quantization": None}
    Path(path, "reward_model.json").write_text(json.dumps(file), encoding="utf-8")
    return path


# Passes of plain transformers, one row at a time and without padding


def plain_logprobs(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """(T,) log-probs of a completion's tokens."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def plain_scalars(model, weight: torch.Tensor, bias, ids: list[int]) -> torch.Tensor:
    """(L,): a head's output at every position of one row."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = base.base_model(torch.tensor([ids])).last_hidden_state[0]
    with torch.autocast("cpu", enabled=False):
        return hidden.float() @ weight[0] + bias


def plain_reward_model(path: str, base: str | None = None):
    """`f(prompt_ids, completion_ids)`: the score at the last token, by plain transformers and the bias in the file."""
    bias = json.loads(Path(path, "reward_model.json").read_text(encoding="utf-8"))["bias"]
    model = AutoModelForSequenceClassification.from_pretrained(base or path, num_labels=1)
    if base:
        model = PeftModel.from_pretrained(model, path)
        weight = model.get_base_model().score.modules_to_save["default"].weight.detach()
    else:
        weight = model.score.weight.detach()
    model.eval()

    @torch.no_grad()
    def score(prompt: list[int], completion: list[int]) -> float:
        return plain_scalars(model, weight, bias, [*prompt, *completion])[-1].item()

    score.model, score.weight, score.bias = model, weight, bias
    return score


class Folders:
    """A base, an SFT adapter on it, and two reward models of it: an adapter and a full one."""

    def __init__(self, base: str, path):
        self.base = base
        self.sft = save_sft_adapter(base, f"{path}/sft")
        self.reward_adapter = save_reward_model(base, f"{path}/reward_adapter", adapter=True, bias=0.7)
        self.reward_full = save_reward_model(base, f"{path}/reward_full", adapter=False, bias=-0.4)

    def policy(self, name: str):
        """`model` and `peft_config` of a trainer: full fine-tuning, a fresh adapter, or the SFT adapter."""
        return {"full": (self.base, None), "fresh": (self.base, lora()), "sft": (self.sft, None)}[name]

    def reward(self, name: str) -> str:
        return {"adapter": self.reward_adapter, "full": self.reward_full}[name]

    def plain_reward(self, name: str):
        """Scoring by plain transformers."""
        return plain_reward_model(self.reward(name), self.base if name == "adapter" else None)


def load_weights(model, weights: dict[str, torch.Tensor]):
    """Set parameters by name, exactly those that are trained."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return model


def plain_policy(folders: Folders, name: str):
    """The policy (and reference) of a set-up by plain transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(folders.base, dtype="float32")
    if name == "sft":
        return PeftModel.from_pretrained(model, folders.sft, is_trainable=True)
    return get_peft_model(model, lora(task_type="CAUSAL_LM")) if name == "fresh" else model


def plain_value_model(folders: Folders, policy: str, reward: str):
    """The value model of a set-up, its names like ours but for the adapter's; the head is passed around beside it."""
    model = AutoModelForSequenceClassification.from_pretrained(folders.base, num_labels=1, dtype="float32")
    if reward == "adapter":
        return PeftModel.from_pretrained(model, folders.reward_adapter, is_trainable=True)
    model = AutoModelForSequenceClassification.from_pretrained(folders.reward_full, dtype="float32").model
    return model if policy == "full" else get_peft_model(model, lora())


def split_head(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A value model's own weights under the names of its plain twin, head weight and head bias."""
    own = {name.replace(".value.", ".default."): t for name, t in weights.items() if not name.startswith("head.")}
    return own, weights["head.weight"], weights["head.bias"]


# Trainers


def trainer_of(folders, policy, reward, args, rows, **kwargs) -> PPOTrainer:
    model, peft_config = folders.policy(policy)
    path = folders.reward(reward)
    return PPOTrainer(model=model, reward_model=path, args=args, train_dataset=rows, peft_config=peft_config, **kwargs)


def with_function(model, path, rows, function=mean_id, peft_config=None, ptx_dataset=None, **settings) -> PPOTrainer:
    return PPOTrainer(
        model=model,
        reward_funcs=function,
        args=config(path, **settings),
        train_dataset=rows,
        peft_config=peft_config,
        ptx_dataset=ptx_dataset,
    )


def known(values):
    """A reward function that gives these values, whatever the completions."""

    def reward(completions, **kwargs):
        return values

    return reward


def scores_of(trainer, rows, n: int = 4):
    trainer.model.train()
    episodes = trainer.rollout([rows[i] for i in range(n)])
    return episodes, trainer._metrics["train"]
