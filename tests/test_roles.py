"""Four roles on one base: who is active, what is trained, and that each computes what its own model would."""

import pytest
import torch
import trl
from conftest import make_llama
from peft import IA3Config, PeftModel, get_peft_model
from ppo_helpers import Folders, chunks, lora, plain_logprobs, plain_scalars, randomise, save_reward_model
from transformers import AutoModelForCausalLM

from instructgpt_trl._trl import add_fused_lm_head
from instructgpt_trl.data import InputError
from instructgpt_trl.data.episodes import pad_episodes, take_rows
from instructgpt_trl.models.reward_model import RewardModel
from instructgpt_trl.models.reward_parts import reward_parts
from instructgpt_trl.models.role_building import build_roles
from instructgpt_trl.models.roles import Role, load_parameters, save_parameters

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[20, 21, 257], [256, 22], [23]]  # 256 is the pad id, and a token like any other


def policy_of(folders: Folders, name: str, temperature: float = 1.0):
    """A policy as `RLOOTrainer.__init__` leaves it."""
    if name == "sft":
        model = PeftModel.from_pretrained(load(folders.base), folders.sft, is_trainable=True)
        model.add_adapter("ref", model.peft_config["default"])
    elif name == "fresh":
        torch.manual_seed(0)
        model = get_peft_model(load(folders.base), lora(task_type="CAUSAL_LM"))
    else:
        model = load(folders.base)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    add_fused_lm_head(base, temperature=temperature, outputs=("log_probs", "entropy"))
    return model


def load(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32")


def roles_of(folders: Folders, policy: str, *rewards: str, **kwargs):
    parts = [reward_parts(folders.reward(name)) for name in rewards]
    return build_roles(policy_of(folders, policy, kwargs.get("temperature", 1.0)), parts, **kwargs)


def episodes():
    return pad_episodes(PROMPTS, COMPLETIONS, 256)


SET_UPS = [("sft", "adapter"), ("fresh", "adapter"), ("fresh", "full"), ("full", "full"), ("full", "adapter")]
set_ups = pytest.mark.parametrize("policy, reward", SET_UPS)


def flags(*networks) -> list[bool]:
    return [parameter.requires_grad for network in networks for parameter in network.parameters()]


@set_ups
def test_active_changes_no_flag_inside_or_after(folders, policy, reward):
    roles = roles_of(folders, policy, reward)
    networks = [role.network for role in roles]
    before, names = flags(*networks), [getattr(network, "active_adapter", None) for network in networks]
    for role in roles:
        with role.active():
            assert flags(*networks) == before
            if role.adapter is not None:
                assert role.network.active_adapters == [role.adapter]
        assert flags(*networks) == before
        with pytest.raises(KeyError), role.active():
            raise KeyError
        assert flags(*networks) == before
        assert [getattr(network, "active_adapter", None) for network in networks] == names


@set_ups
def test_pitfall_01_what_is_trained(folders, policy, reward):
    """The policy's and the value model's own parameters, and nothing of reference and reward model."""
    roles = roles_of(folders, policy, reward)
    trained = {id(p) for role in (roles.policy, roles.value) for p in role.parameters().values()}
    assert trained == {id(p) for role in roles for p in role.parameters().values() if p.requires_grad}
    everything = {id(p) for role in roles for p in role.network.parameters() if p.requires_grad}
    everything |= {id(p) for role in roles if role.head is not None for p in role.head.parameters() if p.requires_grad}
    assert everything == trained
    assert not {id(p) for p in roles.policy.parameters().values()} & {id(p) for p in roles.value.parameters().values()}
    for name in roles.policy.parameters():
        assert policy == "full" or (".default." in name and "lora_" in name)
    assert {"head.weight", "head.bias"} <= roles.value.parameters().keys()
    if policy != "full" or reward == "adapter":
        assert all(".value." in name or name.startswith("head.") for name in roles.value.parameters())


def test_pitfall_01_one_base_is_stored_once(folders):
    roles = roles_of(folders, "sft", "adapter")
    assert len({id(role.network) for role in roles}) == 1
    stored = {p.untyped_storage().data_ptr(): p.numel() for p in roles.policy.network.parameters()}
    heads = {
        p.untyped_storage().data_ptr(): p.numel() for r in roles if r.head is not None for p in r.head.parameters()
    }
    base = sum(p.numel() for p in make_llama().parameters())
    # q_proj 16 -> 16 and v_proj 16 -> 8 on two layers: rank 2 for policy and reference, 3 for reward and value
    adapters = 2 * 2 * 2 * (16 + 16 + 16 + 8) + 2 * 3 * 2 * (16 + 16 + 16 + 8)
    assert sum(stored.values()) == base + adapters
    assert sum(heads.values()) == 2 * (16 + 1) and len(heads) == 4


def test_pitfall_01_a_full_reward_model_makes_two_bases(folders):
    roles = roles_of(folders, "fresh", "full", peft_config=lora(r=5))
    assert roles.policy.network is roles.reference.network and roles.rewards[0].network is roles.value.network
    assert roles.policy.network is not roles.value.network
    assert [name for name in roles.value.parameters() if "lora_A" in name] != []
    assert all(p.shape[0] == 5 for name, p in roles.value.parameters().items() if "lora_A" in name)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@set_ups
def test_logprobs_and_entropies_equal_plain_passes(folders, policy, reward, temperature):
    roles = roles_of(folders, policy, reward, temperature=temperature)
    plain = load(folders.base)
    if policy == "sft":
        plain = PeftModel.from_pretrained(plain, folders.sft)
    for role in (roles.policy, roles.reference):
        logprobs = role.evaluate(role.logprobs, episodes(), chunks(episodes(), 2))[0]
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            expected = plain_logprobs(plain, prompt, completion, temperature)
            torch.testing.assert_close(logprobs[row, : len(completion)], expected, rtol=1e-5, atol=1e-6)
    entropies = roles.policy.evaluate(roles.policy.logprobs, episodes(), chunks(episodes(), 2))[1]
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = plain(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] / temperature
        expected = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(entropies[row, : len(completion)], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("peft", [False, True])
def test_learned_positions_do_not_mind_the_padding(gpt2_dir, peft):
    """GPT-2: log-probs and values of ragged rows equal those of each row alone."""
    model, plain = load(gpt2_dir), load(gpt2_dir)
    policy = get_peft_model(model, lora(task_type="CAUSAL_LM", target_modules=["c_attn"])) if peft else model
    add_fused_lm_head(policy.get_base_model() if peft else policy, outputs=("log_probs", "entropy"))
    roles = build_roles(policy, [])
    with torch.no_grad():
        roles.value.head.weight.fill_(1.0)
    logprobs = roles.policy.evaluate(roles.policy.logprobs, episodes(), chunks(episodes(), 3))[0]
    values = roles.value.evaluate(roles.value.values, episodes(), chunks(episodes(), 3))[0]
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            expected = plain_logprobs(plain.eval(), prompt, completion)
            before = plain_scalars(plain, torch.ones(1, 16), 0.0, [*prompt, *completion])[len(prompt) - 1 : -1]
        torch.testing.assert_close(logprobs[row, : len(completion)], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values[row, : len(completion)], before, rtol=1e-5, atol=1e-5)


@set_ups
def test_pitfall_14_the_value_model_is_the_reward_model(folders, policy, reward):
    """
    Scores and values by plain passes, bias included; and `values` of a completion with one token more holds, at that
    token, the score without it: the value model's output at the last token's position.
    """
    roles = roles_of(folders, policy, reward)
    plain = folders.plain_reward(reward)
    longer = pad_episodes(PROMPTS, [[*ids, 3] for ids in COMPLETIONS], 256)
    scores = roles.rewards[0].evaluate(roles.rewards[0].scores, episodes(), chunks(episodes(), 2))[0]
    values = roles.value.evaluate(roles.value.values, longer, chunks(longer, 2))[0]
    assert scores.shape == (3, 1)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            expected = plain_scalars(plain.model, plain.weight, plain.bias, [*prompt, *completion])[len(prompt) - 1 :]
        # values[t] is before token t: one token before the prompt's end is not asked for, the last is the score
        torch.testing.assert_close(values[row, : len(completion) + 1], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores[row, 0], expected[-1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values[row, len(completion)], scores[row, 0], rtol=1e-5, atol=1e-6)


def test_pitfall_06_scores_equal_the_reward_model_class(folders):
    roles = roles_of(folders, "sft", "adapter", "full")
    for role, path in zip(roles.rewards, (folders.reward_adapter, folders.reward_full), strict=True):
        expected = RewardModel.from_pretrained(path).score_ids(PROMPTS, COMPLETIONS)
        scores = role.evaluate(role.scores, episodes(), chunks(episodes(), 3))[0][:, 0]
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_two_reward_adapters_on_one_base(folders, tmp_path):
    other = save_reward_model(folders.base, str(tmp_path / "other"), adapter=True, bias=2.0, seed=9)
    parts = [reward_parts(folders.reward_adapter), reward_parts(other)]
    roles = build_roles(policy_of(folders, "sft"), parts)
    assert [role.adapter for role in roles.rewards] == ["reward", "reward_1"]
    assert not roles.rewards[0].parameters().keys() & {k for k in roles.rewards[1].parameters() if "head" not in k}
    for role, path in zip(roles.rewards, (folders.reward_adapter, other), strict=True):
        expected = RewardModel.from_pretrained(path).score_ids(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(
            role.evaluate(role.scores, episodes(), chunks(episodes(), 3))[0][:, 0],
            expected,
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("policy", ["sft", "fresh", "full"])
def test_without_a_reward_model_the_value_model_is_the_policy_with_a_head_of_zeros(folders, policy):
    roles = build_roles(policy_of(folders, policy), [])
    assert roles.rewards == []
    assert (roles.value.evaluate(roles.value.values, episodes(), chunks(episodes(), 2))[0] == 0).all()
    with torch.no_grad():
        roles.value.head.weight.fill_(1.0)
    values = roles.value.evaluate(roles.value.values, episodes(), chunks(episodes(), 2))[0]
    plain = load(folders.base)
    plain = PeftModel.from_pretrained(plain, folders.sft) if policy == "sft" else plain
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            expected = plain_scalars(plain, torch.ones(1, 16), 0.0, [*prompt, *completion])[len(prompt) - 1 : -1]
        torch.testing.assert_close(values[row, : len(completion)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@set_ups
def test_a_backward_pass_reaches_its_own_role_only(folders, policy, reward, checkpointing):
    """The trap: PEFT's switches clear `requires_grad`, and recomputation under the wrong adapter is silent."""
    roles = roles_of(folders, policy, reward)
    gradients = {}
    for name in ("policy", "value"):
        role = getattr(roles, name)
        if checkpointing:
            role.network.gradient_checkpointing_enable()
            if isinstance(role.network, PeftModel):
                role.network.enable_input_require_grads()
        role.network.train()
        with role.active():
            out = role.logprobs(episodes())[0] if name == "policy" else role.values(episodes())[0]
            (out * episodes()["mask"]).sum().backward()
        for other in roles:
            touched = {key for key, p in other.parameters().items() if p.grad is not None}
            assert touched == (set(role.parameters()) if other is role else set()), (name, other.adapter)
        gradients[name] = {key: p.grad.clone() for key, p in role.parameters().items()}
        for p in role.parameters().values():
            p.grad = None
        assert sum(grad.abs().sum() for grad in gradients[name].values()) > 0
    if checkpointing:
        plain = roles_of(folders, policy, reward)
        for name in ("policy", "value"):
            role = getattr(plain, name)
            with role.active():
                out = role.logprobs(episodes())[0] if name == "policy" else role.values(episodes())[0]
                (out * episodes()["mask"]).sum().backward()
            for key, p in role.parameters().items():
                torch.testing.assert_close(gradients[name][key], p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "embed_tokens"]}, {"use_dora": True}])
def test_every_kind_of_adapter_weight_belongs_to_its_role(folders, settings):
    """An embedding's LoRA sits in a ParameterDict: its name ends in the adapter's, without a dot behind it."""
    torch.manual_seed(0)
    policy = get_peft_model(load(folders.base), lora(task_type="CAUSAL_LM", **settings))
    add_fused_lm_head(policy.get_base_model())
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    roles = build_roles(policy, [])
    assert roles.policy.parameters().keys() == trained
    assert len(roles.value.parameters()) == len(trained) + 2


def test_ia3_is_trained_too(folders):
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])
    policy = get_peft_model(load(folders.base), config)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert build_roles(policy, []).policy.parameters().keys() == trained


def test_the_reference_is_the_policy_as_it_is_now_embeddings_included(folders):
    """TRL copies by name `.default.`, which an embedding's LoRA does not have."""
    policy = get_peft_model(load(folders.base), lora(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    policy.add_adapter("ref", policy.peft_config["default"])
    add_fused_lm_head(policy.get_base_model())
    roles = build_roles(policy, [])
    logprobs = [
        role.evaluate(role.logprobs, episodes(), chunks(episodes(), 3))[0] for role in (roles.policy, roles.reference)
    ]
    assert torch.equal(*logprobs)


def test_a_base_with_modules_named_like_a_role(folders):
    """Some architectures have a layer called `value`; it is of the base, whatever its name."""
    model = load(folders.base)
    for layer in model.model.layers:
        layer.self_attn.value = layer.self_attn.v_proj
        del layer.self_attn.v_proj
        layer.self_attn.__class__.v_proj = property(lambda self: self.value)
    try:
        policy = get_peft_model(model, lora(task_type="CAUSAL_LM", target_modules=["q_proj", "value"]))
        randomise(policy)
        roles = build_roles(policy, [])
        assert all("lora_" in name and name.endswith(".default.weight") for name in roles.policy.parameters())
        own = {k for k in roles.value.parameters() if not k.startswith("head.")}
        assert len(own) == len(roles.policy.parameters()) and all(k.endswith(".value.weight") for k in own)
        assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters() if "ref" not in name)
    finally:
        del model.model.layers[0].self_attn.__class__.v_proj


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pitfall_08_the_size_of_a_pass_does_not_matter(folders, size):
    roles = roles_of(folders, "sft", "adapter")
    whole = roles.policy.evaluate(roles.policy.logprobs, episodes(), chunks(episodes(), 3))[0]
    mask = episodes()["mask"]
    part = roles.policy.evaluate(roles.policy.logprobs, episodes(), chunks(episodes(), size))[0]
    assert part.shape == whole.shape
    torch.testing.assert_close(part[mask], whole[mask], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_another_shape_is_refused(folders, tmp_path):
    parts = reward_parts(folders.reward_adapter)
    parts.state.pop(next(key for key in parts.state if "lora_B" in key))
    with pytest.raises(InputError, match="does not fit the base"):
        build_roles(policy_of(folders, "sft"), [parts])


def test_half_precision_adapters_become_float32(folders):
    policy = policy_of(folders, "sft")
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    roles = build_roles(policy, [reward_parts(folders.reward_adapter)])
    for role in roles:
        assert {p.dtype for p in role.parameters().values()} <= {torch.float32}


def test_parameters_survive_a_file_and_others_are_refused(folders, tmp_path):
    role = roles_of(folders, "sft", "adapter").value
    before = {name: p.detach().clone() for name, p in role.parameters().items()}
    save_parameters(role.parameters(), str(tmp_path / "value.safetensors"))
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.zero_()
    load_parameters(role.parameters(), str(tmp_path / "value.safetensors"))
    assert all(torch.equal(p, before[name]) for name, p in role.parameters().items())
    fewer = dict(list(role.parameters().items())[1:])
    with pytest.raises(InputError, match="another model"):
        load_parameters(fewer, str(tmp_path / "value.safetensors"))


@pytest.mark.parametrize("changed", [False, True])
def test_a_base_that_was_trained_in_memory_is_not_the_reward_models_base(folders, changed):
    """Its config still names the folder; the reward model then brings a base of its own, and scores as it should."""
    policy = load(folders.base)
    if changed:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1)
    policy = get_peft_model(policy, lora(task_type="CAUSAL_LM"))
    add_fused_lm_head(policy.get_base_model(), temperature=1.0, outputs=("log_probs", "entropy"))
    roles = build_roles(policy, [reward_parts(folders.reward("adapter"))])
    assert (roles.rewards[0].network is policy) == (not changed)
    assert roles.value.network is roles.rewards[0].network
    with torch.no_grad(), roles.rewards[0].active():
        scores = roles.rewards[0].scores(episodes())[0][:, 0]
    plain = folders.plain_reward("adapter")
    expected = [plain(*episode) for episode in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_lm_head_sees_only_what_predicts_a_completion(folders):
    """Not the prompt, whose log-probs nobody reads: 3 and 1 tokens behind prompts of 20 and 9 are 2 x 3 positions."""
    model = AutoModelForCausalLM.from_pretrained(folders.base)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    batch = pad_episodes([list(range(2, 22)), list(range(30, 39))], [[7, 8, 9], [11]], 0)
    plain = [plain_logprobs(model, *episode) for episode in (([*range(2, 22)], [7, 8, 9]), ([*range(30, 39)], [11]))]
    sizes = []
    apply = trl.trainer.utils._ChunkedLogProbFunction.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trl.trainer.utils._ChunkedLogProbFunction,
            "apply",
            lambda x, *rest: sizes.append(len(x)) or apply(x, *rest),
        )
        logprobs, _ = Role(model).logprobs(batch)
    assert sizes == [6]
    torch.testing.assert_close(logprobs[0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logprobs[1, :1], plain[1], rtol=1e-5, atol=1e-6)


def test_a_pass_may_be_kept_to_be_trained_on(folders):
    roles = roles_of(folders, "sft", "adapter")
    policy, (first, second) = roles.policy, chunks(episodes(), 2)
    plain = policy.evaluate(policy.logprobs, episodes(), (first, second))
    kept = policy.evaluate(policy.logprobs, episodes(), (first, second), keep=True)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(plain, kept, strict=True))
    batch = take_rows(episodes(), first)
    logprobs, _ = policy.take_kept(batch)
    with policy.active():
        again, _ = policy.logprobs(batch)
        grads = [torch.autograd.grad(x.sum(), list(policy.parameters().values())) for x in (logprobs, again)]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))
    assert policy.take_kept(batch) is None  # once
    policy.evaluate(policy.logprobs, episodes(), (first, second), keep=True)
    assert policy.take_kept(take_rows(episodes(), second)) is None and policy.kept is None  # of these rows only
    policy.evaluate(policy.logprobs, episodes(), (first, second), keep=True)
    policy.evaluate(policy.logprobs, episodes(), (first, second))
    assert policy.kept is None
    reference = roles.reference
    reference.evaluate(reference.logprobs, episodes(), (first, second), keep=True)
    assert reference.kept is None  # frozen


def test_passes_give_the_order_of_the_episodes_whatever_theirs_is(folders):
    policy = roles_of(folders, "sft", "adapter").policy
    plain = policy.evaluate(policy.logprobs, episodes(), chunks(episodes(), 1))
    other = policy.evaluate(policy.logprobs, episodes(), [torch.tensor([i]) for i in (2, 0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
