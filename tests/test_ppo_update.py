"""One update, number by number: against plain transformers, one row at a time, and the equations in NumPy."""

import numpy as np
import pytest
import reference
import torch
from conftest import make_tokenizer
from datasets import Dataset
from ppo_helpers import (
    EOS,
    GPT2_TARGETS,
    LLAMA_TARGETS,
    assert_close,
    assert_equal,
    config,
    load_weights,
    logged,
    lora,
    mean_id,
    plain_logprobs,
    plain_policy,
    plain_scalars,
    plain_value_model,
    record,
    split_head,
    store_completions,
    trainer_of,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from instructgpt_trl import PPOTrainer
from instructgpt_trl.data.episodes import by_length
from instructgpt_trl.models.lora import fuse_lora
from instructgpt_trl.models.roles import Role

SET_UPS = pytest.mark.parametrize("policy, reward", [("sft", "adapter"), ("fresh", "full"), ("full", "full")])


def padded(rows: list[torch.Tensor]) -> np.ndarray:
    """(B, T) float64, NaN where a row has no token."""
    out = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row.detach().double().numpy()
    return out


class Plain:
    """The rollout of a set-up, from the weights and the completions alone."""

    def __init__(self, folders, policy, reward, start, episodes, args, kl_coef=None):
        self.args, self.episodes = args, episodes
        self.policy = load_weights(plain_policy(folders, policy), start["policy"])
        sft = plain_policy(folders, policy)  # a fresh adapter adds nothing, whatever its random half
        self.value, self.score = plain_value_model(folders, policy, reward), folders.plain_reward(reward)
        with torch.no_grad():
            self.old, self.old_values = padded(self.logprobs()), padded(self.values(start["value"]))
            self.ref = padded(self.logprobs(sft))
        self.mask = ~np.isnan(self.old)
        self.scores = np.array([self.score(*episode) for episode in episodes])
        rewards = reference.token_rewards(self.scores, self.old, self.ref, self.mask, kl_coef or args.beta)
        self.raw_advantages, self.returns = reference.gae(rewards, self.old_values, self.mask, args.gamma, args.lam)
        self.advantages = self.raw_advantages
        if args.normalize_advantages:
            self.advantages = reference.whiten(self.raw_advantages, self.mask)
        self.kl = np.where(self.mask, self.old - self.ref, 0).sum(1)

    def logprobs(self, model=None, rows=None) -> list[torch.Tensor]:
        rows = range(len(self.episodes)) if rows is None else rows
        return [plain_logprobs(model or self.policy, *self.episodes[i], self.args.temperature) for i in rows]

    def values(self, weights, rows=None) -> list[torch.Tensor]:
        """Values before each token, read one position before it."""
        own, weight, bias = split_head(weights)
        model = load_weights(self.value, own)
        rows = range(len(self.episodes)) if rows is None else rows
        episodes = [self.episodes[i] for i in rows]
        return [plain_scalars(model, weight, bias, [*p, *c])[len(p) - 1 : -1] for p, c in episodes]

    def minibatch(self, step, rows: list[int]) -> dict:
        """Losses, gradients and metrics of one optimizer step at the weights `step`, its losses in plain loops."""
        args, take = self.args, np.array(rows)
        load_weights(self.policy, step["policy"])
        self.policy.zero_grad()
        self.value.zero_grad()
        head = {name: step["value"][name].clone().requires_grad_() for name in ("head.weight", "head.bias")}
        logprobs, values = self.logprobs(rows=rows), self.values({**step["value"], **head}, rows=rows)
        count, policy, value = int(self.mask[take].sum()), 0.0, 0.0
        for row, i in enumerate(rows):
            for t in range(len(self.episodes[i][1])):
                ratio = (logprobs[row][t] - self.old[i, t]).exp()
                advantage, old, target = self.advantages[i, t], self.old_values[i, t], self.returns[i, t]
                near = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
                policy = policy - torch.minimum(ratio * advantage, near * advantage) / count
                kept = values[row][t].clamp(old - args.cliprange_value, old + args.cliprange_value)
                error = torch.maximum((values[row][t] - target) ** 2, (kept - target) ** 2)
                value = value + 0.5 * error / count
        (policy + args.vf_coef * value).backward()
        policy_grad = {n: p.grad.clone() for n, p in self.policy.named_parameters() if p.requires_grad}
        own = {n.replace(".default.", ".value."): p.grad for n, p in self.value.named_parameters() if p.requires_grad}
        width = max(map(len, logprobs))
        mask = self.mask[take][:, :width]

        def flat(x: np.ndarray) -> np.ndarray:
            return x[take][:, :width][mask]

        change, moved = padded(logprobs)[mask] - flat(self.old), padded(values)[mask] - flat(self.old_values)
        ratio, target = np.exp(change), flat(self.returns - self.old_values)
        near = moved.clip(-args.cliprange_value, args.cliprange_value)
        return {
            "policy": policy_grad,
            "value": {n: grad for n, grad in own.items() if n in step["value"]} | {n: p.grad for n, p in head.items()},
            "loss/policy": policy.item(),
            "loss/value": value.item(),
            "policy/approxkl": (change**2).mean() / 2,
            "policy/ratio": ratio.mean(),
            "policy/clipfrac": np.mean((ratio - 1) * np.sign(flat(self.advantages)) > args.epsilon),
            "value/clipfrac": np.mean((near - target) ** 2 > (moved - target) ** 2),
        }

    def entropy(self) -> float:
        """Of the distributions sampled from: mean over a completion's tokens, then over completions."""
        means = []
        for prompt, completion in self.episodes:
            logits = self.policy(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            probs = (logits / self.args.temperature).double().softmax(-1)
            means.append(-(probs * probs.log()).sum(-1).mean().item())
        return sum(means) / len(means)


def close(got: float, expected: float, name: str) -> None:
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-5), name


OTHER = {"temperature": 0.7, "gamma": 0.9, "lam": 0.8, "normalize_advantages": False}


@pytest.mark.parametrize("settings", [{}, OTHER])
@SET_UPS
def test_updates_equal_plain_passes_and_the_equations(
    folders, tmp_path, monkeypatch, prompts, policy, reward, settings
):
    """
    Two rollouts of two minibatches: log-probs, KL, scores, token rewards, GAE, whitening, both losses and both
    gradients. The steps are so large that the second rollout has a KL and that each second minibatch is clipped.
    """
    batches = store_completions(monkeypatch)
    rates = dict(learning_rate=0.05, value_learning_rate=0.05)
    args = config(tmp_path, max_steps=4, beta=0.3, vf_coef=0.5, cliprange_value=0.02, **rates, **settings)
    trainer = trainer_of(folders, policy, reward, args, prompts)
    recorder = record(trainer)
    trainer.train()
    assert [len(batch) for batch in batches] == [4, 4] and len(recorder.steps) == 4
    for update in range(2):
        plain = Plain(folders, policy, reward, recorder.steps[2 * update], batches[update], args)
        assert len(set(plain.mask.sum(1))) > 1  # ragged
        residual = (plain.returns - plain.old_values)[plain.mask]
        expected = {
            "objective/kl": plain.kl.mean(),
            "objective/scores": plain.scores.mean(),
            "objective/scores_std": plain.scores.std(),
            "objective/rlhf_reward": (plain.scores - 0.3 * plain.kl).mean(),
            "objective/entropy": plain.entropy(),
            "value/explained_variance": 1 - residual.var() / plain.returns[plain.mask].var(),
        }
        for name, number in expected.items():
            close(logged(trainer, name)[update], number, name)
        assert (plain.kl == 0).all() if update == 0 else np.abs(plain.kl).max() > 0.01
        for minibatch, rows in enumerate(([0, 1], [2, 3])):
            step = 2 * update + minibatch
            expected = plain.minibatch(recorder.steps[step], rows)
            assert_close(recorder.steps[step]["policy_grad"], expected.pop("policy"), rtol=1e-3, atol=1e-5)
            assert_close(recorder.steps[step]["value_grad"], expected.pop("value"), rtol=1e-3, atol=1e-5)
            for name, number in expected.items():
                close(logged(trainer, name)[step], number, name)
            close(logged(trainer, "loss")[step], expected["loss/policy"] + 0.5 * expected["loss/value"], "loss")
    for name in ("policy/clipfrac", "value/clipfrac"):
        fractions = logged(trainer, name)
        assert fractions[::2] == [0, 0] and max(fractions[1::2]) > 0


def one_step(folders, tmp_path, prompts, tokenizer=None, policy="sft", reward="adapter", texts=None, **settings):
    """The first optimizer step's record, and the trainer."""
    args = config(tmp_path, **{"max_steps": 1, **settings})
    trainer = trainer_of(folders, policy, reward, args, prompts, processing_class=tokenizer, ptx_dataset=texts)
    recorder = record(trainer)
    trainer.train()
    return recorder.steps[0], trainer


@SET_UPS
def test_pitfall_08_pad_equal_to_eos_changes_nothing(folders, tmp_path, monkeypatch, prompts, policy, reward):
    """EOS counts, whatever the pad token is: the test above counts it, and this is equal bit for bit."""
    store_completions(monkeypatch)
    steps = []
    for pad in ("<pad>", "<eos>"):
        step, trainer = one_step(folders, tmp_path, prompts, make_tokenizer(pad), policy, reward)
        assert trainer._tokenizer.pad_token == pad
        steps.append(step)
    for name in ("policy_grad", "value_grad"):
        assert_equal(steps[0][name], steps[1][name])


def test_pitfall_08_the_mask_ends_with_the_first_eos(folders, tmp_path, monkeypatch, prompts):
    """What `generate` returns behind EOS is cut; EOS itself, and only one, gets log-prob, reward and gradient."""
    tail = torch.tensor(
        [[40, EOS, 41, EOS, EOS, 42], [EOS] * 6, [43, 44, 45, 46, 47, 48], [256, 49, EOS, 256, 256, 256]]
    )

    def generate(self, input_ids, **kwargs):
        return torch.cat([input_ids, tail], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    for pad in ("<pad>", "<eos>"):
        args = config(tmp_path, max_steps=1, steps_per_generation=4, gradient_accumulation_steps=4)
        trainer = trainer_of(folders, "full", "full", args, prompts, processing_class=make_tokenizer(pad))
        trainer.model.train()
        episodes = trainer.rollout([prompts[i] for i in (0, 5, 9, 15)])
        assert episodes["mask"].sum(1).tolist() == [2, 1, 6, 3]
        assert episodes["ended"].tolist() == [True, True, False, True]
        assert trainer._metrics["train"]["completions/eos_rate"] == [1, 1, 0, 1]
        outside = ~episodes["mask"]
        assert (episodes["advantages"][outside] == 0).all() and (episodes["advantages"][~outside] != 0).all()


@pytest.mark.parametrize("size, accumulation", [(2, 2), (4, 1)])
def test_pitfall_08_09_micro_batches_do_not_change_the_gradient(
    folders, tmp_path, monkeypatch, prompts, texts, size, accumulation
):
    """The mean is over all tokens of the minibatch, not a mean of micro-batch means, ptx included."""
    store_completions(monkeypatch)
    steps = [
        one_step(
            folders,
            tmp_path,
            prompts,
            texts=texts,
            ptx_coef=0.5,
            ptx_ratio=1,
            ptx_max_length=20,
            per_device_train_batch_size=n,
            gradient_accumulation_steps=m,
            steps_per_generation=m,
        )
        for n, m in ((1, 4), (size, accumulation))
    ]
    for name in ("policy_grad", "value_grad"):
        assert_close(steps[0][0][name], steps[1][0][name], rtol=1e-5, atol=1e-6)
    names = ("loss", "loss/policy", "loss/value", "loss/ptx", "grad_norm/policy", "grad_norm/ptx", "policy/ratio")
    for name in (*names, "objective/scores"):
        assert logged(steps[0][1], name) == pytest.approx(logged(steps[1][1], name), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("policy, reward", [("sft", "adapter"), ("fresh", "full"), ("full", "full")])
def test_pitfall_10_gradient_checkpointing_is_on_and_changes_nothing(
    folders, tmp_path, monkeypatch, prompts, texts, policy, reward
):
    """Gradients equal, in policy and value model; each layer of both runs once more in the backward pass."""
    store_completions(monkeypatch)
    passes, steps = {}, {}
    forward = LlamaMLP.forward

    def counted(layer, *args, **kwargs):
        passes[on] += torch.is_grad_enabled()
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    for on in (False, True):
        passes[on] = 0
        settings = dict(max_steps=1, gradient_checkpointing=on, ptx_ratio=1)
        trainer = trainer_of(folders, policy, reward, config(tmp_path, **settings), prompts, ptx_dataset=texts)
        recorder = record(trainer)
        trainer.train()
        steps[on] = recorder.steps[0]
    # 2 layers; 2 policy, 2 value and 2 ptx passes, and as many again where they are recomputed
    assert passes == {False: 12, True: 24}
    for name in ("policy_grad", "value_grad"):
        assert_close(steps[True][name], steps[False][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama-lora", "llama-full", "gpt2-lora", "gpt2-full"])
def test_pitfall_03_the_ratio_is_1_where_nothing_moved(
    tmp_path, monkeypatch, prompts, base_dir, gpt2_dir, kind, checkpointing
):
    """
    With every dropout that a config can ask for, LoRA's and the base's own: at a rate of 0 the ratio is exactly 1 in
    every minibatch, and the KL exactly 0.
    """
    folder = base_dir if kind.startswith("llama") else gpt2_dir
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **DROPOUT[kind[:5]])
    targets = LLAMA_TARGETS if kind.startswith("llama") else GPT2_TARGETS
    peft_config = lora(lora_dropout=0.3, target_modules=targets) if kind.endswith("lora") else None
    settings = dict(learning_rate=0.0, value_learning_rate=0.0, gradient_checkpointing=checkpointing, max_steps=4)
    args = config(tmp_path, per_device_train_batch_size=2, steps_per_generation=4, **settings)
    store_completions(monkeypatch)
    trainer = PPOTrainer(model=model, reward_funcs=mean_id, args=args, train_dataset=prompts, peft_config=peft_config)
    losses = []
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: (step(*a, **k), losses.append(trainer._sums["policy/approxkl"]))[0]
    trainer.train()
    assert logged(trainer, "policy/approxkl") == [0.0] * 4
    assert logged(trainer, "policy/clipfrac") == [0.0] * 4
    assert logged(trainer, "policy/ratio") == pytest.approx([1.0] * 4, rel=1e-6)
    assert logged(trainer, "objective/kl") == [0.0] * 2
    assert losses == [0.0] * 8  # in every micro-batch
    assert any(number != 0 for number in logged(trainer, "loss/value"))


@pytest.mark.parametrize("policy, reward", [("sft", "adapter"), ("full", "full")])
def test_pitfall_02_03_are_exact_in_mixed_precision_too(folders, tmp_path, monkeypatch, prompts, policy, reward):
    """bfloat16 on a CPU: old, new and reference log-probs come from one computation; weights and heads are float32."""
    batches = store_completions(monkeypatch)
    settings = dict(bf16=True, use_cpu=True, max_steps=4, learning_rate=1e-5, value_learning_rate=1e-5)
    trainer = trainer_of(folders, policy, reward, config(tmp_path, **settings), prompts)
    trainer.train()
    assert logged(trainer, "policy/approxkl")[0] == 0.0 and logged(trainer, "objective/kl")[0] == 0.0
    score = folders.plain_reward(reward)
    fuse_lora(score.model)  # rounds otherwise than PEFT
    with torch.autocast("cpu", torch.bfloat16):
        plain = [score(*episode) for episode in batches[1]]
    assert logged(trainer, "objective/scores")[1] == pytest.approx(sum(plain) / 4, rel=1e-3)
    assert {p.dtype for role in trainer.roles for p in role.parameters().values()} == {torch.float32}


DROPOUT = {
    "llama": {"attention_dropout": 0.3},
    "gpt2-": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
}


class Blocks:
    """The pretraining blocks that a trainer takes, one list a minibatch."""

    def __init__(self, trainer):
        self.taken = []
        take = trainer._ptx_stream.take
        trainer._ptx_stream.take = lambda *args: self.taken.append(take(*args)) or self.taken[-1]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"per_device_train_batch_size": 2}])
@SET_UPS
def test_pitfall_15_the_gradient_is_the_sum_of_its_parts(
    folders, tmp_path, monkeypatch, prompts, texts, policy, reward, settings
):
    """
    The pretraining part by plain transformers' own language-model loss, without any temperature; the policy part is
    the run without ptx; the value model's gradient is not touched.
    """
    store_completions(monkeypatch)
    settings = dict(max_steps=1, ptx_coef=3.0, ptx_ratio=3, ptx_max_length=12, **settings)
    alone, _ = one_step(folders, tmp_path, prompts, policy=policy, reward=reward, **settings)
    trainer = trainer_of(folders, policy, reward, config(tmp_path, **settings), prompts, ptx_dataset=texts)
    recorder, blocks = record(trainer), Blocks(trainer)
    trainer.train()
    episodes = 2 * settings.get("per_device_train_batch_size", 1)
    assert [len(taken) for taken in blocks.taken] == [3 * episodes]  # ptx_ratio examples an episode

    plain = load_weights(plain_policy(folders, policy), recorder.steps[0]["policy"])
    total, count = 0.0, 0
    for block in blocks.taken[0]:
        logits = plain(torch.tensor([block])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(block[1:]), reduction="sum")
        count += len(block) - 1
    (3.0 * total / count).backward()
    ptx = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    expected = {name: grad + ptx[name] for name, grad in alone["policy_grad"].items()}
    assert_close(recorder.steps[0]["policy_grad"], expected, rtol=1e-4, atol=1e-5)
    assert_equal(recorder.steps[0]["value_grad"], alone["value_grad"])

    def norm(grads) -> float:
        return sum((grad**2).sum().item() for grad in grads.values()) ** 0.5

    close(logged(trainer, "loss/ptx")[0], (total / count).item(), "loss/ptx")
    close(logged(trainer, "grad_norm/ptx")[0], norm(ptx), "grad_norm/ptx")
    close(logged(trainer, "grad_norm/policy")[0], norm(alone["policy_grad"]), "grad_norm/policy")
    losses = {name: logged(trainer, name)[0] for name in ("loss/policy", "loss/value", "loss/ptx")}
    loss = losses["loss/policy"] + 0.1 * losses["loss/value"] + 3.0 * losses["loss/ptx"]
    close(logged(trainer, "loss")[0], loss, "loss")


@pytest.mark.parametrize("policy, reward", [("sft", "adapter"), ("full", "full")])
def test_pitfall_15_without_a_coefficient_it_is_plain_ppo_bit_for_bit(
    folders, tmp_path, prompts, texts, policy, reward
):
    """With true generation, which would show any use of the caller's random numbers."""
    trained = []
    for kwargs in ({"ptx_coef": 0.0}, {}):
        args = config(tmp_path, learning_rate=0.01, value_learning_rate=0.01, max_steps=6, **kwargs)
        trainer = trainer_of(folders, policy, reward, args, prompts, ptx_dataset=texts if kwargs else None)
        trainer.train()
        trained.append(
            {f"{i}.{k}": p.detach() for i, r in enumerate(trainer.roles) for k, p in r.parameters().items()}
        )
        assert logged(trainer, "loss/ptx") == []
    assert_equal(*trained)


def test_pitfall_15_each_minibatch_has_blocks_of_its_own(folders, tmp_path, monkeypatch, prompts, texts):
    store_completions(monkeypatch)
    args = config(tmp_path, max_steps=4, ptx_ratio=2, ptx_max_length=40, num_iterations=2)
    trainer = trainer_of(folders, "sft", "adapter", args, prompts, ptx_dataset=texts)
    blocks = Blocks(trainer)
    trainer.train()
    size = len(trainer._ptx_stream.blocks)
    taken = [tuple(block) for minibatch in blocks.taken for block in minibatch]
    assert [len(minibatch) for minibatch in blocks.taken] == [4] * 4 and size >= 16
    assert len(set(taken)) == 16  # an epoch of the stream repeats nothing
    assert max(map(len, taken)) == 40


def test_the_length_of_blocks_is_that_of_an_episode_within_the_context(folders, tmp_path, prompts, texts):
    lengths = {}
    for settings in ({"max_prompt_length": 30, "max_completion_length": 12}, {"max_prompt_length": 1024}):
        trainer = trainer_of(folders, "sft", "adapter", config(tmp_path, **settings), prompts, ptx_dataset=texts)
        lengths[settings["max_prompt_length"]] = max(len(ids) for ids in trainer._ptx_stream.blocks["input_ids"])
    assert lengths == {30: 42, 1024: 256}


@pytest.mark.parametrize("iterations", [1, 2])
def test_pitfall_09_update_counts_are_exact(folders, tmp_path, monkeypatch, iterations):
    """
    18 prompts, rollouts of 4 in minibatches of 2, longest first, 2 epochs: 4 whole rollouts an epoch, 2 prompts wait
    for the next order; each rollout gives 2 steps an inner epoch, each episode counts once in each.
    """
    batches = store_completions(monkeypatch)
    rows = Dataset.from_list([{"prompt": f"prompt {i}{'.' * i}"} for i in range(18)])
    args = config(tmp_path, max_steps=-1, num_train_epochs=2, num_iterations=iterations)
    trainer = trainer_of(folders, "sft", "adapter", args, rows)
    seen, rolled, states = [], [], set()
    backward, rollout = trainer._policy_backward, trainer.rollout

    def note(batch, share):
        seen.append((rolled[-1], batch["input_ids"][0].tolist(), round(share.item() * 1e6)))
        states.add(tuple(torch.get_rng_state().tolist()))
        return backward(batch, share)

    trainer._policy_backward = note
    trainer.rollout = lambda inputs: (rolled.append(len(rolled)), rollout(inputs))[1]
    recorder = record(trainer)
    trainer.train()
    assert trainer.state.global_step == len(recorder.steps) == 2 * 4 * 2 * iterations
    assert [len(batch) for batch in batches] == [4] * 8
    assert len(seen) == 2 * trainer.state.global_step  # two micro-batches a step
    for number, batch in enumerate(batches):
        stored = [[*prompt, *completion] for prompt, completion in batch]
        used = [ids for rollout, ids, _ in seen if rollout == number]
        epochs = [used[i : i + 4] for i in range(0, len(used), 4)]
        pairs = (sorted(stored[i : i + 2], key=len, reverse=True) for i in (0, 2))
        assert len(epochs) == iterations and epochs[0] == sum(pairs, [])  # the first in the order of the rollout
        assert all(sorted(epoch) == sorted(stored) for epoch in epochs)
    orders = [[ids for rollout, ids, _ in seen if rollout == number] for number in range(8)]
    assert iterations == 1 or any(order[4:] != order[:4] for order in orders)  # later ones are reshuffled
    # The micro-batches' shares of a minibatch sum to one
    assert all(abs(seen[i][2] + seen[i + 1][2] - 1e6) <= 1 for i in range(0, len(seen), 2))
    assert len(states) <= 2  # reshuffling has a generator of its own; only an epoch's data loader draws from torch's
    for epoch in (batches[:4], batches[4:]):
        assert len({tuple(prompt) for batch in epoch for prompt, _ in batch}) == 16  # no prompt twice in an epoch


def test_pitfall_09_gradients_are_clipped_policy_and_value_model_apart(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    free, trainer = one_step(folders, tmp_path, prompts)
    norms = {name: sum((g**2).sum() for g in free[f"{name}_grad"].values()).sqrt() for name in ("policy", "value")}
    assert logged(trainer, "grad_norm") == [pytest.approx(norms["policy"].item(), rel=1e-5)]
    assert logged(trainer, "grad_norm/value") == [pytest.approx(norms["value"].item(), rel=1e-5)]
    limit = (norms["policy"] * norms["value"]).sqrt().item()  # between the two: one is clipped and the other is not
    clipped, trainer = one_step(folders, tmp_path, prompts, max_grad_norm=limit)
    for name, norm in norms.items():
        scale = min(1.0, limit / (norm.item() + 1e-6))
        assert_close(clipped[f"{name}_grad"], {k: g * scale for k, g in free[f"{name}_grad"].items()}, rtol=1e-5)
    assert logged(trainer, "grad_norm") == [pytest.approx(norms["policy"].item(), rel=1e-5)]  # before clipping


def test_gradients_do_not_leak_into_the_next_minibatch(folders, tmp_path, monkeypatch, prompts):
    """The loop zeroes the policy's network only; the value model's own network is zeroed too."""
    store_completions(monkeypatch)
    args = config(tmp_path, max_steps=2, learning_rate=0.0, value_learning_rate=0.0)
    trainer = trainer_of(folders, "full", "full", args, prompts)
    recorder = record(trainer)
    trainer.train()
    second = config(tmp_path, max_steps=1, learning_rate=0.0, value_learning_rate=0.0)
    alone = trainer_of(folders, "full", "full", second, prompts)
    rows = alone._rows_of
    alone._rows_of = lambda micro_batch, count: rows(micro_batch + 2, count)  # start with the second minibatch
    alone_recorder = record(alone)
    alone.train()
    for name in ("policy_grad", "value_grad"):
        assert_equal(recorder.steps[1][name], alone_recorder.steps[0][name])


@SET_UPS
def test_a_run_equals_a_loop_of_plain_torch(folders, tmp_path, monkeypatch, prompts, texts, policy, reward):
    """
    Three rollouts of PPO-ptx from the start weights alone: plain passes, equations in NumPy, torch's AdamW with both
    rates and their warm-up, clipping apart, weight decay and the average. Final weights and averages agree.
    """
    batches = store_completions(monkeypatch)
    settings = dict(learning_rate=4e-3, value_learning_rate=2e-3, warmup_updates=2, weight_decay=0.1)
    settings |= dict(ptx_coef=0.3, ptx_ratio=1, ptx_max_length=20, max_grad_norm=0.4, ema_decay=0.8, beta=0.2)
    args = config(tmp_path, max_steps=6, **settings)
    trainer = trainer_of(folders, policy, reward, args, prompts, ptx_dataset=texts)
    blocks = Blocks(trainer)
    now = {
        name: {k: p.detach().clone() for k, p in getattr(trainer, f"_{name}_parameters").items()}
        for name in ("policy", "value")
    }
    trainer.train()

    groups = []
    for name, rate in (("policy", 4e-3), ("value", 2e-3)):
        for matrices in (True, False):
            chosen = [p for p in now[name].values() if (p.dim() >= 2) == matrices]
            groups += [{"params": chosen, "lr": rate, "peak": rate, "weight_decay": 0.1 * matrices}] if chosen else []
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5)
    average = {name: tensor.clone() for name, tensor in now["policy"].items()}
    for step in range(6):
        if step % 2 == 0:
            plain = Plain(folders, policy, reward, now, batches[step // 2], args)
        grads = plain.minibatch(now, [0, 1] if step % 2 == 0 else [2, 3])
        plain.policy.zero_grad()
        rows = [torch.tensor(block) for block in blocks.taken[step]]
        losses = [-plain_logprobs(plain.policy, row[:1].tolist(), row[1:].tolist()).sum() for row in rows]
        policy_grads = dict(grads["policy"])
        (0.3 * sum(losses) / sum(len(row) - 1 for row in rows)).backward()
        for name, p in plain.policy.named_parameters():
            if p.requires_grad:
                policy_grads[name] = policy_grads[name] + p.grad
        for name, own in (("policy", policy_grads), ("value", grads["value"])):
            norm = sum((grad**2).sum() for grad in own.values()).sqrt()
            for key, tensor in now[name].items():
                tensor.grad = own[key] * min(1.0, 0.4 / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, 0.1 + 0.9 * step / 4)
        optimizer.step()
        average = {name: 0.8 * old + 0.2 * now["policy"][name] for name, old in average.items()}
    assert_close({k: p.detach() for k, p in trainer._policy_parameters.items()}, now["policy"], rtol=1e-3, atol=2e-5)
    assert_close({k: p.detach() for k, p in trainer._value_parameters.items()}, now["value"], rtol=1e-3, atol=2e-5)
    assert_close(trainer.ema.averages, average, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@SET_UPS
def test_the_first_pass_of_a_rollout_is_trained_on(
    folders, tmp_path, monkeypatch, prompts, policy, reward, checkpointing
):
    """4 micro-batches in 2 optimizer steps: 4 and 3 passes of the policy, and the gradients of 4 and 4 bit for bit."""
    store_completions(monkeypatch)
    logprobs, take_kept, runs = Role.logprobs, Role.take_kept, []
    for keeps in (True, False):
        passes = []
        monkeypatch.setattr(
            Role, "logprobs", lambda role, *rest, to=passes: (to.append(role), logprobs(role, *rest))[1]
        )
        if not keeps:
            monkeypatch.setattr(Role, "take_kept", lambda role, batch: take_kept(role, batch) and None)
        args = config(tmp_path, gradient_checkpointing=checkpointing, learning_rate=0.01, max_steps=2)
        trainer = trainer_of(folders, policy, reward, args, prompts)
        recorder = record(trainer)
        trainer.train()
        runs.append(recorder.steps)
        assert passes.count(trainer.roles.policy) == (7 if keeps else 8)
    for kept, again in zip(*runs, strict=True):
        for name in ("policy_grad", "value_grad"):
            assert_equal(kept[name], again[name])


@SET_UPS
def test_a_rollout_of_one_pass_is_trained_on_by_both_models_where_memory_is_given_for_time(
    folders, tmp_path, monkeypatch, prompts, policy, reward
):
    """2 updates of 1 pass: the value model's is done once each, with checkpointing twice; gradients bit for bit."""
    store_completions(monkeypatch)
    values, runs = Role.values, []
    for checkpointing in (False, True):
        passes = []
        monkeypatch.setattr(Role, "values", lambda role, batch, to=passes: (to.append(role), values(role, batch))[1])
        settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=1)
        args = config(tmp_path, gradient_checkpointing=checkpointing, learning_rate=0.01, max_steps=2, **settings)
        trainer = trainer_of(folders, policy, reward, args, prompts)
        recorder = record(trainer)
        trainer.train()
        runs.append(recorder.steps)
        assert passes == [trainer.roles.value] * (4 if checkpointing else 2)
    for kept, again in zip(*runs, strict=True):
        for name in ("policy_grad", "value_grad"):
            assert_equal(kept[name], again[name])


def test_micro_batches_of_one_length_change_no_update(folders, tmp_path, monkeypatch, prompts):
    """Longest first inside a minibatch of four takes fewer positions than the order of the prompts."""
    store_completions(monkeypatch)
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_iterations=2, max_steps=4)
    backward, runs = PPOTrainer._policy_backward, []
    for order in (by_length, lambda episodes, rows, group: rows):
        positions = []
        monkeypatch.setattr("instructgpt_trl.ppo_trainer.by_length", order)
        monkeypatch.setattr(
            PPOTrainer,
            "_policy_backward",
            lambda trainer, batch, share, to=positions: (
                to.append(batch["input_ids"].numel()),
                backward(trainer, batch, share),
            )[1],
        )
        trainer = trainer_of(folders, "sft", "adapter", config(tmp_path, **settings), prompts)
        recorder = record(trainer)
        trainer.train()
        runs.append((recorder.steps, positions))
    (steps, positions), (others, more) = runs
    assert len(positions) == len(more) == 8 and sum(positions) < sum(more)
    for step, other in zip(steps, others, strict=True):
        for name in ("policy_grad", "value_grad"):
            assert_close(step[name], other[name], rtol=1e-4, atol=1e-6)
