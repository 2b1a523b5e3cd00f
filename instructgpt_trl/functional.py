"""
The equations of InstructGPT (Ouyang et al. 2022) as pure functions on tensors.

Throughout: scores are one a sequence and rewards one a token; log-probabilities are natural logarithms, in nats; a
mask is True (or 1) where a token counts. What stands outside a mask never matters, not even NaN or inf, neither to a
result nor to a gradient: it is replaced by 0 before anything is computed. Nothing is detached. Results are float64 if
an input is, else float32. With an all-False mask, losses are 0 with gradient 0, and everything else is 0.
Shapes: B prompts, K completions of one, N their sum, T completion tokens.

[L] is the public code of Ziegler et al. 2019, https://github.com/openai/lm-human-preferences.
"""

import torch
from torch import Tensor

__all__ = ["ranking_loss", "ranking_accuracy", "token_rewards", "gae", "whiten", "policy_loss", "value_loss"]


def ranking_loss(scores: Tensor, ranks: Tensor, group_sizes: list[int]) -> Tensor:
    """
    K-way ranking loss: every untied pair of a prompt's completions is a comparison, every prompt weighs the same.

        loss = mean over prompts of (1 / pairs) * sum over pairs of -log sigmoid(s_better - s_worse)

    Equal ranks tie and make no pair. A prompt with no untied pair is not in the mean, and its scores do not matter;
    with no pair at all the loss is 0 and its gradient is 0.

    Args:
        scores (`torch.Tensor` of shape `(N,)`):
            Scalar scores of all completions, prompt after prompt.
        ranks (`torch.Tensor` of shape `(N,)`):
            Ranks within each prompt, 1 is best.
        group_sizes (`list[int]` of length `B`):
            K of each prompt, at least 1, summing to N.

    Returns:
        `torch.Tensor` of shape `()`, in nats a comparison.

    Raises:
        `ValueError`: if the shapes do not agree.

    Source: Ouyang et al. 2022, section 3.5, Eq. 1; ties dropped, so 1 / C(K,2) becomes 1 / (number of untied pairs).

    Differs from TRL: `RewardTrainer` knows pairs only, each with the same weight. Equal to it at K = 2.
    """
    _check_scores(scores, ranks)
    better, worse, group = _untied_pairs(ranks, group_sizes)
    scores = _upcast(scores)
    pairs = torch.bincount(group, minlength=len(group_sizes))
    losses = -torch.nn.functional.logsigmoid(scores[better] - scores[worse]) / pairs[group]
    return losses.sum() / (pairs > 0).sum().clamp(min=1)


def ranking_accuracy(scores: Tensor, ranks: Tensor, group_sizes: list[int]) -> Tensor:
    """
    Share of all untied pairs that the scores order as the ranks do; an equal score counts one half.

        accuracy = mean over all pairs, of whatever prompt, of [s_better > s_worse] + [s_better = s_worse] / 2

    Args:
        scores, ranks, group_sizes:
            As in [`ranking_loss`].

    Returns:
        `torch.Tensor` of shape `()`, a share in [0, 1]; NaN if there is no pair. It has no gradient.

    Raises:
        `ValueError`: if the shapes do not agree.

    Source: Ouyang et al. 2022, appendix C.2 (accuracy of predicting the labelers' preferred output).

    Differs from TRL: `RewardTrainer` counts an equal score as wrong.
    """
    _check_scores(scores, ranks)
    better, worse, _ = _untied_pairs(ranks, group_sizes)
    scores = _upcast(scores)
    better, worse = scores[better], scores[worse]
    return ((better > worse).to(scores.dtype) + 0.5 * (better == worse)).mean()


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """
    Rewards a token: the KL penalty at each, and the sequence's score at the last one.

        r_t = -kl_coef * (logprobs_t - ref_logprobs_t) + [t is the row's last true position] * score

    Args:
        scores (`torch.Tensor` of shape `(B,)`):
            Score of each completion. That of a row without a true token goes nowhere.
        logprobs, ref_logprobs (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the sampled tokens under the policy that sampled them and the reference, in nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            True where a token counts, EOS included.
        kl_coef (`float`):
            The paper's beta, in units of score a nat.

    Returns:
        `torch.Tensor` of shape `(B, T)`, in units of score; 0 outside the mask.

    Raises:
        `ValueError`: if the shapes do not agree.

    Source: Ouyang et al. 2022, section 3.5, Eq. 2, and appendix C.4 (per token);
    [L] lm_human_preferences/train_policy.py, `compute_rewards`.

    Differs from TRL: `RLOOTrainer` subtracts the summed KL from the score and has one reward a sequence.
    """
    mask, logprobs, ref_logprobs = _select(mask, 2, logprobs=logprobs, ref_logprobs=ref_logprobs)
    if scores.shape != mask.shape[:1]:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}; expected {tuple(mask.shape[:1])}, one a row of mask"
        )
    after = mask.long().flip(1).cumsum(1).flip(1)  # true positions from here on, this one included
    last = mask & (after == 1)
    return -kl_coef * (logprobs - ref_logprobs) + torch.where(last, _upcast(scores)[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """
    Generalised advantage estimation over a row's true tokens, and the returns that the value model learns.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}
        returns = A + V

    V and A are 0 after the last true token: the episode ends there. t + 1 is the next *true* token; a hole is skipped.

    Args:
        rewards, mask (`torch.Tensor` of shape `(B, T)`):
            Reward of each token, see [`token_rewards`]; True where a token counts.
        values (`torch.Tensor` of shape `(B, T)`):
            `values[:, t]` is V *before* token t, read at the position that predicts it.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount a token.
        lam (`float`, *optional*, defaults to `0.95`):
            0 gives the one-step error delta, 1 the discounted sum of rewards to go minus V.

    Returns:
        `tuple` of advantages and returns, `torch.Tensor` of shape `(B, T)`, in units of reward; 0 outside the mask.

    Raises:
        `ValueError`: if the shapes do not agree.

    Source: Schulman et al. 2016 (arXiv 1506.02438), Eq. 16; [L] lm_human_preferences/train_policy.py, `loss`, whose
    responses all have the same length. gamma 1 is Ouyang et al. 2022, appendix C.4; lambda 0.95 is [L].

    Differs from TRL: `RLOOTrainer` has no value model and one advantage a sequence.
    """
    mask, rewards, values = _select(mask, 2, rewards=rewards, values=values)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Outside the mask the last true token's V and A are carried on, so that nothing sees a hole
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], next_advantage, 0.0)
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """
    Scale the true entries to variance 1, and shift them to mean 0 if `shift_mean`.

        y = (x - mean) / sqrt(variance + 1e-8), plus mean if not shift_mean

    Mean and population variance (1/n) are over all true entries, not row by row.

    Args:
        x, mask (`torch.Tensor`):
            Values of any shape, usually `(B, T)`, with a mask of the same shape.
        shift_mean (`bool`, *optional*, defaults to `True`):
            Whether to take the mean away. `False` keeps it, as for rewards.

    Returns:
        `torch.Tensor` of the same shape, without unit; 0 outside the mask.

    Raises:
        `ValueError`: if the shapes do not agree.

    Source: [L] lm_human_preferences/utils/core.py, `whiten`.

    Differs from TRL: `RLOOTrainer` divides by the sample standard deviation (1/(n-1)) plus 1e-4.
    """
    mask, x = _select(mask, None, x=x)
    mean = _masked_mean(x, mask)
    centred = x - mean
    whitened = centred * torch.rsqrt(_masked_mean(centred**2, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float = 0.2
) -> Tensor:
    """
    PPO's clipped surrogate, a ratio a token, averaged over all true tokens.

        ratio = exp(logprobs - old_logprobs)
        loss  = -mean over true tokens of min(ratio * A, clip(ratio, 1 - cliprange, 1 + cliprange) * A)

    The mean is over the tokens of the whole batch, so a long completion weighs more than a short one.

    Args:
        logprobs (`torch.Tensor`):
            Log-probabilities of the sampled tokens under the policy that is trained, in nats; usually `(B, T)`.
        old_logprobs, advantages, mask (`torch.Tensor` of the same shape):
            Log-probabilities under the policy that sampled the tokens; advantages; True where a token counts.
        cliprange (`float`, *optional*, defaults to `0.2`):
            Half width of the range of ratios that still have a gradient when they move with the advantage.

    Returns:
        `torch.Tensor` of shape `()`, in units of advantage.

    Raises:
        `ValueError`: if the shapes do not agree.

    Source: Schulman et al. 2017 (arXiv 1707.06347), Eq. 7; 0.2 is Ouyang et al. 2022, appendix C.4; the mean over
    tokens is that of [L] lm_human_preferences/train_policy.py, `loss`.

    Differs from TRL: `RLOOTrainer` has one ratio, one clip and one advantage a sequence, and averages over sequences.
    """
    mask, logprobs, old_logprobs, advantages = _select(
        mask, None, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    ratio = torch.exp(logprobs - old_logprobs)  # 1 outside the mask, where an extreme log-ratio would overflow
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)
    return -_masked_mean(surrogate, mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float = 0.2) -> Tensor:
    """
    Half the mean squared error of the values, or of the values kept near the old ones, whichever is larger.

        near = clip(V, V_old - cliprange, V_old + cliprange)
        loss = 0.5 * mean over true tokens of max((V - returns)^2, (near - returns)^2)

    Args:
        values (`torch.Tensor`):
            V before each token from the value model that is trained; usually `(B, T)`.
        old_values, returns, mask (`torch.Tensor` of the same shape):
            V at the time of the rollout; what V should be, see [`gae`]; True where a token counts.
        cliprange (`float`, *optional*, defaults to `0.2`):
            How far V may move from `old_values`, in units of reward.

    Returns:
        `torch.Tensor` of shape `()`, in units of reward squared.

    Raises:
        `ValueError`: if the shapes do not agree.

    Source: [L] lm_human_preferences/train_policy.py, `loss` (clip and 0.2; Ouyang et al. 2022 does not say).

    Differs from TRL: `RLOOTrainer` has no value model.
    """
    mask, values, old_values, returns = _select(mask, None, values=values, old_values=old_values, returns=returns)
    near = values.clamp(old_values - cliprange, old_values + cliprange)
    return 0.5 * _masked_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def _untied_pairs(ranks: Tensor, group_sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """
    All pairs of one prompt's completions with unequal ranks: positions in `ranks` of the better and the worse, and
    the prompt's number, each long of shape `(pairs,)`, prompt after prompt. `ValueError` if the sizes do not fit.
    """
    if any(size < 1 for size in group_sizes):
        raise ValueError(f"group_sizes has a size below 1: {list(group_sizes)}")
    if sum(group_sizes) != len(ranks):
        raise ValueError(f"group_sizes sums to {sum(group_sizes)}; expected {len(ranks)}, one rank a completion")
    sizes = torch.tensor(group_sizes, dtype=torch.long, device=ranks.device)
    group = torch.arange(len(sizes), device=ranks.device).repeat_interleave(sizes)
    better, worse = torch.where((group[:, None] == group) & (ranks[:, None] < ranks))
    return better, worse, group[better]


def _check_scores(scores: Tensor, ranks: Tensor) -> None:
    if scores.dim() != 1 or scores.shape != ranks.shape:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, ranks {tuple(ranks.shape)}; expected (N,) for both")


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _select(mask: Tensor, dim: int | None, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The mask as bool, then the tensors in one dtype with 0 outside it."""
    for name, x in tensors.items():
        if x.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {tuple(mask.shape)}, the shape of mask")
    if dim is not None and mask.dim() != dim:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {dim} dimensions, (B, T)")
    mask = mask.bool()
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32
    return mask, *(x.to(dtype).masked_fill(~mask, 0.0) for x in tensors.values())


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
