"""`instructgpt_trl.functional` against NumPy loops, by hand, by gradcheck, and by what must not matter."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructgpt_trl import functional as F

CLOSE = dict(rtol=1e-10, atol=1e-12)  # float64 throughout, unless a test says otherwise
cases = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# Every function of a mask as f(mask, *tensors), with the number of (B, T) tensors it takes. token_rewards' scores are
# made from the number of rows, so that all seven have one form.
MASKED = {
    "token_rewards": (2, lambda m, a, b: F.token_rewards(torch.arange(1.0, 1 + len(m)).to(a.dtype), a, b, m, 0.3)),
    "gae": (2, lambda m, r, v: torch.stack(F.gae(r, v, m, 0.9, 0.7))),
    "whiten": (1, lambda m, x: F.whiten(x, m)),
    "whiten, mean kept": (1, lambda m, x: F.whiten(x, m, shift_mean=False)),
    "policy_loss": (3, lambda m, a, b, c: F.policy_loss(a, b, c, m)),
    "value_loss": (3, lambda m, a, b, c: F.value_loss(a, b, c, m)),
}
masked = pytest.mark.parametrize("count, function", MASKED.values(), ids=MASKED.keys())


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows[0] if len(rows) == 1 else rows, dtype=torch.float64)


def mask_of(*lengths: int, width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def normal(count: int, *shape: int, seed: int = 0, requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [x.requires_grad_(requires_grad) for x in tensors]


def gradients(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of the sum of all outputs, weighted so that they cannot cancel."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    weights = torch.arange(1.0, 1 + output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


@st.composite
def rankings(draw):
    """Scores with some equal ones, ranks with ties, B = 0..5 prompts of K = 1..6."""
    group_sizes = draw(st.lists(st.integers(1, 6), max_size=5))
    n = sum(group_sizes)
    numbers = st.one_of(st.floats(-8, 8), st.sampled_from([-1.0, 0.0, 1.0]))
    scores = draw(st.lists(numbers, min_size=n, max_size=n))
    ranks = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    return np.array(scores, dtype=np.float64), np.array(ranks, dtype=np.int64), group_sizes


@st.composite
def token_batches(draw, count: int):
    """A mask with ragged, empty or holed rows, and `count` arrays that are NaN outside it; the mask may be ints."""
    b, t = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, t), min_size=b, max_size=b))
        mask = np.arange(t) < np.array(lengths)[:, None]
    else:
        mask = np.array(draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t))).reshape(b, t)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = [
        np.where(mask, draw(st.sampled_from([0.2, 1.0])) * random.normal(size=(b, t)), np.nan) for _ in range(count)
    ]
    return mask, arrays


def as_tensors(mask, arrays, integer_mask: bool = False):
    mask = torch.from_numpy(mask)
    return [torch.from_numpy(x) for x in arrays], mask.long() if integer_mask else mask


# ---- against the reference


@cases
@given(rankings())
def test_ranking_loss_equals_the_reference(case):
    scores, ranks, group_sizes = case
    ours = F.ranking_loss(torch.from_numpy(scores), torch.from_numpy(ranks), group_sizes)
    assert ours.dtype == torch.float64 and ours.shape == ()
    np.testing.assert_allclose(ours.item(), reference.ranking_loss(scores, ranks, group_sizes), **CLOSE)


@cases
@given(rankings())
def test_ranking_accuracy_equals_the_reference(case):
    scores, ranks, group_sizes = case
    ours = F.ranking_accuracy(torch.from_numpy(scores), torch.from_numpy(ranks), group_sizes)
    np.testing.assert_allclose(ours.item(), reference.ranking_accuracy(scores, ranks, group_sizes), **CLOSE)


@cases
@given(rankings())
def test_untied_pairs_are_those_of_the_reference(case):
    _, ranks, group_sizes = case
    better, worse, group = F._untied_pairs(torch.from_numpy(ranks), group_sizes)
    assert better.dtype == worse.dtype == group.dtype == torch.long
    ours = [set() for _ in group_sizes]
    for i, j, prompt in zip(better.tolist(), worse.tolist(), group.tolist(), strict=True):
        assert (i, j) not in ours[prompt]
        ours[prompt].add((i, j))
    assert ours == [set(pairs) for pairs in reference.untied_pairs(ranks, group_sizes)]
    assert group.tolist() == sorted(group.tolist())


@cases
@given(token_batches(2), st.floats(-1, 2), st.booleans())
def test_token_rewards_equal_the_reference(case, kl_coef, integer_mask):
    mask, arrays = case
    scores = np.linspace(-2.0, 3.0, len(mask))
    scores[~mask.any(1)] = np.nan  # the score of an empty completion goes nowhere
    (logprobs, ref_logprobs), mask_tensor = as_tensors(mask, arrays, integer_mask)
    ours = F.token_rewards(torch.from_numpy(scores), logprobs, ref_logprobs, mask_tensor, kl_coef)
    np.testing.assert_allclose(ours.numpy(), reference.token_rewards(scores, *arrays, mask, kl_coef), **CLOSE)


@cases
@given(token_batches(2), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_equals_the_reference(case, gamma, lam, integer_mask):
    mask, arrays = case
    (rewards, values), mask_tensor = as_tensors(mask, arrays, integer_mask)
    ours = F.gae(rewards, values, mask_tensor, gamma, lam)
    for got, expected in zip(ours, reference.gae(*arrays, mask, gamma, lam), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, **CLOSE)


@cases
@given(token_batches(1), st.booleans(), st.booleans())
def test_whiten_equals_the_reference(case, shift_mean, integer_mask):
    mask, arrays = case
    (x,), mask_tensor = as_tensors(mask, arrays, integer_mask)
    # A root of 1e-8 turns rounding of the mean of one entry into 1e-12
    expected = reference.whiten(*arrays, mask, shift_mean)
    np.testing.assert_allclose(F.whiten(x, mask_tensor, shift_mean).numpy(), expected, rtol=1e-10, atol=1e-10)


@cases
@given(token_batches(3), st.floats(0.05, 0.5), st.booleans())
def test_policy_loss_equals_the_reference(case, cliprange, integer_mask):
    mask, arrays = case
    tensors, mask_tensor = as_tensors(mask, arrays, integer_mask)
    expected = reference.policy_loss(*arrays, mask, cliprange)
    np.testing.assert_allclose(F.policy_loss(*tensors, mask_tensor, cliprange).item(), expected, **CLOSE)


@cases
@given(token_batches(3), st.floats(0.05, 0.5), st.booleans())
def test_value_loss_equals_the_reference(case, cliprange, integer_mask):
    mask, arrays = case
    tensors, mask_tensor = as_tensors(mask, arrays, integer_mask)
    expected = reference.value_loss(*arrays, mask, cliprange)
    np.testing.assert_allclose(F.value_loss(*tensors, mask_tensor, cliprange).item(), expected, **CLOSE)


@cases
@given(token_batches(3))
def test_defaults_are_those_of_the_design(case):
    mask, arrays = case
    (a, b, c), m = as_tensors(mask, arrays)
    for got, expected in zip(F.gae(a, b, m), reference.gae(*arrays[:2], mask, 1.0, 0.95), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, **CLOSE)
    np.testing.assert_allclose(F.policy_loss(a, b, c, m).item(), reference.policy_loss(*arrays, mask, 0.2), **CLOSE)
    np.testing.assert_allclose(F.value_loss(a, b, c, m).item(), reference.value_loss(*arrays, mask, 0.2), **CLOSE)
    np.testing.assert_allclose(F.whiten(a, m).numpy(), reference.whiten(arrays[0], mask, True), rtol=1e-10, atol=1e-10)


# ---- by hand


def test_ranking_loss_by_hand():
    # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4.
    # Prompt 1, one pair, ln 3 over 0:                            -ln 3/4 = ln 4/3
    # Prompt 2, ranks 1 1 2: the tie is no pair; 0 under ln 3 twice: (ln 4 + ln 4) / 2 = ln 4
    # Prompt 3, a tie, and prompt 4, one completion: not in the mean
    # Mean over the two prompts: (ln 4/3 + ln 4) / 2 = ln(16/3) / 2   (over the three pairs it would be ln(64/3) / 3)
    scores = tensor([math.log(3), 0, 0, 0, math.log(3), 5, 7, 9])
    ranks = torch.tensor([1, 2, 1, 1, 2, 1, 1, 1])
    loss = F.ranking_loss(scores, ranks, [2, 3, 2, 1])
    assert loss.item() == pytest.approx(math.log(16 / 3) / 2, rel=1e-12)


def test_ranking_accuracy_by_hand():
    # Prompt 1: 2 > 1, right. Prompt 2, ranks 1 1 2: 0 > 3 wrong, 3 = 3 one half.
    # (1 + 0 + 1/2) / 3 pairs = 1/2   (a mean over prompts would be (1 + 1/4) / 2)
    accuracy = F.ranking_accuracy(tensor([2, 1, 0, 3, 3]), torch.tensor([1, 2, 1, 1, 2]), [2, 3])
    assert accuracy.item() == 0.5


def test_token_rewards_by_hand():
    # Row 1, score 2: -0.1 * (-1 + 1.5) = -0.05; -0.1 * (-2 + 1) = 0.1; -0.1 * 0 + 2 = 2
    # Row 2, score -1, one token: -0.1 * (-1 + 3) - 1 = -1.2
    rewards = F.token_rewards(
        tensor([2, -1]),
        tensor([-1, -2, -3], [-1, -2, -3]),
        tensor([-1.5, -1, -3], [-3, -3, -9]),
        mask_of(3, 1, width=3),
        kl_coef=0.1,
    )
    torch.testing.assert_close(rewards, tensor([-0.05, 0.1, 2.0], [-1.2, 0, 0]), **CLOSE)


def test_gae_by_hand():
    # gamma = lam = 1/2. delta_1 = 2 - 4 = -2 (the episode ends); delta_0 = 1 + 1/2 * 4 - 3 = 0
    # A_1 = -2; A_0 = 0 + 1/4 * -2 = -1/2; returns A + V: -1/2 + 3 = 5/2, -2 + 4 = 2
    advantages, returns = F.gae(tensor([[1, 2, 8]]), tensor([[3, 4, 8]]), mask_of(2, width=3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.5, -2, 0]] and returns.tolist() == [[2.5, 2, 0]]


def test_whiten_by_hand():
    # Entries 0 and 2e-4: mean 1e-4, population variance 1e-8, root of (1e-8 + 1e-8) = sqrt(2) * 1e-4:
    # -1 / sqrt(2) and 1 / sqrt(2). An eps beside the root, or a variance of 1/(n-1), would give other numbers.
    x, mask = tensor([[0, 2e-4, 5]]), mask_of(2, width=3)
    half = 1 / math.sqrt(2)
    torch.testing.assert_close(F.whiten(x, mask), tensor([[-half, half, 0]]), **CLOSE)
    torch.testing.assert_close(F.whiten(x, mask, shift_mean=False), tensor([[1e-4 - half, 1e-4 + half, 0]]), **CLOSE)


def test_policy_loss_by_hand():
    # ratio, A: min(ratio * A, clip(ratio, 0.8, 1.2) * A)
    # 3/2, +1: min(1.5, 1.2)   =  1.2     1/2, +1: min(0.5, 0.8)   =  0.5
    # 3/2, -1: min(-1.5, -1.2) = -1.5     1/2, -1: min(-0.5, -0.8) = -0.8
    # sum -0.6, mean over four tokens -0.15, loss 0.15. Old log-probabilities are -1, so log ratio = logprobs + 1.
    up, down = math.log(1.5) - 1, math.log(0.5) - 1
    logprobs, advantages = tensor([up, down, 9], [up, down, 9]), tensor([1, 1, 9], [-1, -1, 9])
    loss = F.policy_loss(logprobs, -torch.ones_like(logprobs), advantages, mask_of(2, 2, width=3), cliprange=0.2)
    assert loss.item() == pytest.approx(0.15, rel=1e-12)


def test_value_loss_by_hand():
    # Old values 0, clip 0.2. V = 1, return 2: max(1, (0.2 - 2)^2 = 3.24); V = 1, return 0: max(1, 0.04);
    # V = 0.1, return 0: 0.01. 0.5 * (3.24 + 1 + 0.01) / 3 = 4.25 / 6
    values, returns = tensor([[1, 1, 0.1, 9]]), tensor([[2, 0, 0, 9]])
    loss = F.value_loss(values, torch.zeros_like(values), returns, mask_of(3, width=4), cliprange=0.2)
    assert loss.item() == pytest.approx(4.25 / 6, rel=1e-12)


# ---- gradients


def test_ranking_loss_gradcheck():
    (scores,) = normal(1, 9, requires_grad=True)
    ranks = torch.tensor([1, 2, 2, 4, 3, 1, 1, 2, 1])
    assert torch.autograd.gradcheck(lambda s: F.ranking_loss(s, ranks, [4, 2, 2, 1]), (scores,))


@masked
@pytest.mark.parametrize("lengths", [(4, 2, 0), (0, 0, 0)])
def test_masked_functions_gradcheck(count, function, lengths):
    tensors = normal(count, 3, 4, seed=1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: function(mask_of(*lengths, width=4), *x), tensors)


def test_token_rewards_gradcheck_of_the_scores():
    scores, logprobs = normal(1, 3, requires_grad=True)[0], normal(2, 3, 4)
    assert torch.autograd.gradcheck(lambda s: F.token_rewards(s, *logprobs, mask_of(4, 2, 0, width=4), 0.1), (scores,))


def test_policy_loss_at_ratio_1_is_minus_the_mean_advantage_and_so_is_its_gradient():
    logprobs, advantages = normal(2, 3, 5)
    mask = mask_of(5, 2, 3, width=5)
    selected = torch.where(mask, advantages, 0.0)
    loss = F.policy_loss(logprobs, logprobs.clone(), advantages, mask)
    assert loss.item() == pytest.approx(-selected.sum().item() / 10, rel=1e-12)
    # d/dlogp of -ratio * A / 10 at ratio 1
    (gradient,) = gradients(lambda x: F.policy_loss(x, logprobs, advantages, mask), logprobs)
    torch.testing.assert_close(gradient, -selected / 10, **CLOSE)


@pytest.mark.parametrize(
    "ratio, advantage, slope",
    [
        (1.5, 2.0, 0.0),  # moved far with a good token: clipped, no gradient
        (0.5, 2.0, -2.0 * 0.5),  # a good token became rarer: not clipped, -A * ratio
        (1.5, -2.0, 2.0 * 1.5),  # a bad token became likelier: not clipped
        (0.5, -2.0, 0.0),  # moved far from a bad token: clipped
        (1.1, 2.0, -2.0 * 1.1),  # inside the range
        (0.9, -2.0, 2.0 * 0.9),
    ],
)
def test_policy_loss_clips_only_moves_along_the_advantage(ratio, advantage, slope):
    logprobs = torch.full((1, 1), math.log(ratio), dtype=torch.float64)
    old, advantages, mask = torch.zeros_like(logprobs), torch.full_like(logprobs, advantage), mask_of(1, width=1)
    (gradient,) = gradients(lambda x: F.policy_loss(x, old, advantages, mask), logprobs)
    assert gradient.item() == pytest.approx(slope, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    "value, target, slope",
    [
        (0.1, 1.0, 0.1 - 1.0),  # inside the range: the plain error
        (0.5, 1.0, 0.0),  # moved far towards the target: clipped error is larger, and constant
        (0.5, -1.0, 0.5 + 1.0),  # moved away from it: the plain error
        (-0.5, -1.0, 0.0),
    ],
)
def test_value_loss_clips_only_moves_towards_the_return(value, target, slope):
    values = torch.full((1, 1), value, dtype=torch.float64)
    old, returns, mask = torch.zeros_like(values), torch.full_like(values, target), mask_of(1, width=1)
    (gradient,) = gradients(lambda x: F.value_loss(x, old, returns, mask), values)
    assert gradient.item() == pytest.approx(slope, rel=1e-12, abs=0)


# ---- ranking: what must not matter, and limits


def test_ranking_loss_at_k_2_is_the_pairwise_loss():
    """The parent's formula, to the last bit, gradients included."""
    (scores,) = normal(1, 12)
    ranks = torch.tensor([1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 5, 3])
    chosen, rejected = [0, 3, 4, 7, 8, 11], [1, 2, 5, 6, 9, 10]

    def pairwise(s):
        return -torch.nn.functional.logsigmoid(s[chosen] - s[rejected]).mean()

    def ours(s):
        return F.ranking_loss(s, ranks, [2] * 6)

    assert ours(scores).item() == pairwise(scores).item()
    assert torch.equal(gradients(ours, scores)[0], gradients(pairwise, scores)[0])


def test_ranking_shift_of_all_scores_of_a_prompt_does_not_matter():
    (scores,) = normal(1, 9)
    ranks, sizes = torch.tensor([1, 2, 2, 4, 3, 1, 3, 2, 1]), [4, 2, 3]
    shifted = scores + tensor([7.0] * 4 + [-3.0] * 2 + [0.5] * 3)
    torch.testing.assert_close(F.ranking_loss(shifted, ranks, sizes), F.ranking_loss(scores, ranks, sizes), **CLOSE)
    assert F.ranking_accuracy(shifted, ranks, sizes) == F.ranking_accuracy(scores, ranks, sizes)
    (gradient,) = gradients(lambda s: F.ranking_loss(s, ranks, sizes), scores)
    for part in gradient.split(sizes):
        assert part.abs().sum() > 0 and abs(part.sum().item()) < 1e-15


def test_ranking_order_of_prompts_and_of_completions_does_not_matter():
    (scores,) = normal(1, 9)
    ranks = torch.tensor([1, 2, 2, 4, 3, 1, 3, 2, 1])
    orders = {"prompts": [6, 7, 8, 0, 1, 2, 3, 4, 5], "completions": [2, 0, 3, 1, 5, 4, 8, 6, 7]}
    sizes = {"prompts": [3, 4, 2], "completions": [4, 2, 3]}
    loss, accuracy = (f(scores, ranks, [4, 2, 3]) for f in (F.ranking_loss, F.ranking_accuracy))
    (gradient,) = gradients(lambda s: F.ranking_loss(s, ranks, [4, 2, 3]), scores)
    for name, order in orders.items():
        moved, of = scores[order], (ranks[order], sizes[name])
        torch.testing.assert_close(F.ranking_loss(moved, *of), loss, **CLOSE)
        assert F.ranking_accuracy(moved, *of) == accuracy
        (moved_gradient,) = gradients(lambda s, of=of: F.ranking_loss(s, *of), moved)
        torch.testing.assert_close(moved_gradient, gradient[order], **CLOSE)


def test_ranking_uses_the_order_of_ranks_only():
    (scores,) = normal(1, 5)
    plain, other = torch.tensor([1, 2, 2, 3, 4]), tensor([-7.5, 1, 1, 40, 41])
    assert F.ranking_loss(scores, plain, [5]) == F.ranking_loss(scores, other, [5])
    assert F.ranking_accuracy(scores, plain, [5]) == F.ranking_accuracy(scores, other, [5])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_ranking_scores_of_a_prompt_without_a_pair_do_not_matter(garbage):
    scores = tensor([1, 0, garbage, garbage, garbage])
    ranks = torch.tensor([1, 2, 3, 3, 1])

    def loss(s):
        return F.ranking_loss(s, ranks, [2, 2, 1])

    assert loss(scores).item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-12)
    assert F.ranking_accuracy(scores, ranks, [2, 2, 1]) == 1
    slope = 0.5 * (math.tanh(0.5) - 1)  # d -log sigmoid(x) at 1 = sigmoid(1) - 1
    torch.testing.assert_close(gradients(loss, scores)[0], tensor([slope, -slope, 0, 0, 0]), **CLOSE)


@pytest.mark.parametrize("ranks, sizes", [([1, 1, 2], [2, 1]), ([1, 1, 1], [3]), ([], [])])
def test_ranking_without_any_pair(ranks, sizes):
    scores = torch.ones(len(ranks), requires_grad=True)
    loss = F.ranking_loss(scores, torch.tensor(ranks), sizes)
    loss.backward()
    assert loss.item() == 0 and loss.requires_grad and torch.equal(scores.grad, torch.zeros(len(ranks)))
    assert math.isnan(F.ranking_accuracy(scores, torch.tensor(ranks), sizes).item())


def test_ranking_loss_is_finite_for_extreme_scores():
    # -log sigmoid(-2000) = 2000 (1 + e^-2000 is 1); slope of the pair is -1 on the better one
    scores = torch.tensor([-1000.0, 1000.0])
    assert F.ranking_loss(scores, torch.tensor([1, 2]), [2]).item() == 2000
    assert gradients(lambda s: F.ranking_loss(s, torch.tensor([1, 2]), [2]), scores)[0].tolist() == [-1, 1]


# ---- masks: what must not matter


@masked
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300, -1e300])
def test_what_stands_outside_the_mask_does_not_matter(count, function, garbage):
    """Neither to the result nor to the gradient, which is 0 there: selected before the exponential."""
    mask = tensor([1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]).bool()
    clean = [x.masked_fill(~mask, 0) for x in normal(count, 3, 5)]
    dirty = [x.masked_fill(~mask, garbage) for x in clean]
    expected = function(mask, *clean)
    assert torch.isfinite(expected).all() and torch.equal(function(mask, *dirty), expected)
    expected = gradients(lambda *x: function(mask, *x), *clean)
    for got, want in zip(gradients(lambda *x: function(mask, *x), *dirty), expected, strict=True):
        assert torch.isfinite(want).all() and (want[mask] != 0).any() and not want[~mask].any()
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "count, function, position",
    [pytest.param(n, f, i, id=f"{name}-{i}") for name, (n, f) in MASKED.items() for i in range(n)],
)
def test_garbage_in_one_tensor_only_does_not_matter(count, function, position):
    """The other tensors being finite there: 0 * inf would be NaN."""
    mask = mask_of(2, 3, width=4)
    clean = normal(count, 2, 4)
    dirty = [x.masked_fill(~mask, math.inf) if i == position else x for i, x in enumerate(clean)]
    assert torch.equal(function(mask, *dirty), function(mask, *clean))
    for got, want in zip(
        gradients(lambda *x: function(mask, *x), *dirty), gradients(lambda *x: function(mask, *x), *clean), strict=True
    ):
        assert torch.equal(got, want)


@masked
def test_inside_the_mask_garbage_is_not_hidden(count, function):
    """A NaN that counts must reach the guard of the trainer."""
    mask = mask_of(2, 3, width=4)
    tensors = normal(count, 2, 4)
    tensors[0][1, 1] = math.nan
    assert torch.isnan(function(mask, *tensors)).any()


@masked
def test_pitfall_08_padding_and_its_side_do_not_matter(count, function):
    tensors = normal(count, 3, 5)
    mask = mask_of(5, 2, 3, width=5)
    plain = function(mask, *tensors)
    for left, right in [(0, 3), (3, 0), (2, 1)]:
        wide = [torch.nn.functional.pad(x, (left, right), value=math.nan) for x in tensors]
        moved = function(torch.nn.functional.pad(mask, (left, right)), *wide)
        if plain.dim():
            assert not moved[..., :left].any() and not moved[..., left + 5 :].any()
            moved = moved[..., left : left + 5]
        torch.testing.assert_close(moved, plain, **CLOSE)


@masked
def test_pitfall_08_holes_are_skipped(count, function):
    """Rows with holes give what their true tokens give when they are put side by side."""
    mask = tensor([0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0]).bool()
    tensors = normal(count, 2, 6)
    packed = [torch.zeros(2, 6, dtype=torch.float64) for _ in tensors]
    for x, y in zip(tensors, packed, strict=True):
        y[0, :3], y[1, :2] = x[0, [1, 3, 4]], x[1, [0, 3]]
    holed, dense = function(mask, *tensors), function(mask_of(3, 2, width=6), *packed)
    if holed.dim():
        holed, dense = holed[..., mask], dense[..., mask_of(3, 2, width=6)]
    torch.testing.assert_close(holed, dense, **CLOSE)


def test_pitfall_08_score_and_gradient_reach_the_last_true_token():
    """The first EOS is the last true token, by mask and not by id: it carries the score, and is learned."""
    mask = tensor([1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]).bool()
    zeros = torch.zeros(5, 4, dtype=torch.float64)
    rewards = F.token_rewards(tensor([1, 2, 3, 4, 5]), zeros, zeros, mask, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [0] * 4, [0, 0, 4, 0], [0, 0, 0, 5]]
    advantages, _ = F.gae(rewards, zeros, mask)
    (gradient,) = gradients(lambda x: F.policy_loss(x, zeros, advantages, mask), zeros)
    assert torch.equal(gradient != 0, mask)


@pytest.mark.parametrize("loss", [F.policy_loss, F.value_loss])
def test_pitfall_09_mean_over_all_true_tokens(loss):
    """Not a mean of row means; micro-batches add up to the minibatch when weighted by their tokens."""
    tensors, mask = normal(3, 4, 6), mask_of(6, 1, 3, 2, width=6)
    rows = [loss(*(x[i : i + 1] for x in tensors), mask[i : i + 1]) for i in range(4)]
    whole = loss(*tensors, mask)
    weighted = sum(row * n for row, n in zip(rows, (6, 1, 3, 2), strict=True)) / 12
    torch.testing.assert_close(whole, weighted, **CLOSE)
    assert abs(whole - sum(rows) / 4) > 1e-3


def test_whiten_is_over_the_batch_and_gives_mean_0_and_variance_1():
    (x,) = normal(1, 3, 6)
    mask = mask_of(6, 2, 4, width=6)
    white = F.whiten(5 * x + 3, mask)[mask]
    assert abs(white.mean().item()) < 1e-12 and white.var(unbiased=False).item() == pytest.approx(1, rel=1e-8)
    kept = F.whiten(5 * x + 3, mask, shift_mean=False)[mask]
    torch.testing.assert_close(kept - white, (5 * x + 3)[mask].mean().expand(12), **CLOSE)


@masked
def test_pitfall_18_an_all_empty_batch_gives_zeros_and_zero_gradients(count, function):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    tensors = normal(count, 2, 3)
    output = function(mask, *(x.requires_grad_() for x in tensors))
    assert output.requires_grad and torch.equal(output, torch.zeros_like(output))
    output.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in tensors)


@masked
def test_pitfall_18_an_empty_row_does_not_change_the_others(count, function):
    tensors, mask = normal(count, 3, 4), mask_of(4, 2, 0, width=4)
    output, without = function(mask, *tensors), function(mask[:2], *(x[:2] for x in tensors))
    if output.dim():
        assert not output[..., 2, :].any()
        output = output[..., :2, :]
    torch.testing.assert_close(output, without, **CLOSE)


# ---- limits of GAE


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_at_lambda_1_is_reward_to_go_minus_value(gamma):
    rewards, values = normal(2, 3, 5)
    lengths = (5, 2, 3)
    advantages, returns = F.gae(rewards, values, mask_of(*lengths, width=5), gamma=gamma, lam=1.0)
    for b, length in enumerate(lengths):
        for t in range(length):
            to_go = sum(gamma ** (u - t) * rewards[b, u].item() for u in range(t, length))
            assert returns[b, t].item() == pytest.approx(to_go, rel=1e-10, abs=1e-12)
            assert advantages[b, t].item() == pytest.approx(to_go - values[b, t].item(), rel=1e-10, abs=1e-12)


def test_gae_at_lambda_0_is_the_one_step_error():
    rewards, values = normal(2, 2, 4)
    advantages, _ = F.gae(rewards, values, mask_of(4, 2, width=4), gamma=0.9, lam=0.0)
    next_values = torch.stack([values[0].roll(-1), values[1].roll(-1)])
    next_values[0, 3] = next_values[1, 1] = 0  # the episode ends
    expected = (rewards + 0.9 * next_values - values) * mask_of(4, 2, width=4)
    torch.testing.assert_close(advantages, expected, **CLOSE)


def test_gae_of_a_perfect_value_model_is_0():
    (rewards,) = normal(1, 2, 4)
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = F.gae(rewards, values, mask_of(4, 4, width=4), gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), **CLOSE)
    torch.testing.assert_close(returns, values, **CLOSE)


# ---- dtypes and shapes


@masked
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(count, function, dtype):
    mask, tensors = mask_of(4, 2, width=4), [x.to(dtype) for x in normal(count, 2, 4)]
    output = function(mask, *tensors)
    assert output.dtype == torch.float32 and torch.equal(output, function(mask, *(x.float() for x in tensors)))


def test_ranking_in_low_precision_is_computed_in_float32():
    scores, ranks = normal(1, 6)[0].bfloat16(), torch.tensor([1, 2, 3, 3, 1, 2])
    loss = F.ranking_loss(scores, ranks, [4, 2])
    assert loss.dtype == torch.float32 and torch.equal(loss, F.ranking_loss(scores.float(), ranks, [4, 2]))
    (gradient,) = gradients(lambda s: F.ranking_loss(s, ranks, [4, 2]), scores)
    assert gradient.dtype == torch.bfloat16
    assert F.ranking_accuracy(scores, ranks, [4, 2]).dtype == torch.float32


@masked
def test_inputs_are_left_as_they_are(count, function):
    tensors, mask = normal(count, 2, 4), mask_of(4, 2, width=4)
    before = [x.clone() for x in tensors]
    function(mask, *tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert torch.equal(mask, mask_of(4, 2, width=4))


@pytest.mark.parametrize("function", [F.ranking_loss, F.ranking_accuracy])
@pytest.mark.parametrize(
    "scores, ranks, sizes, message",
    [
        ((4,), (4,), [2, 1], r"group_sizes sums to 3; expected 4"),
        ((4,), (4,), [4, 0], r"size below 1: \[4, 0\]"),
        ((4,), (4,), [5, -1], r"size below 1: \[5, -1\]"),
        ((4,), (3,), [4], r"scores has shape \(4,\), ranks \(3,\); expected \(N,\)"),
        ((4, 1), (4, 1), [4], r"scores has shape \(4, 1\), ranks \(4, 1\); expected \(N,\)"),
    ],
)
def test_ranking_refuses_wrong_shapes(function, scores, ranks, sizes, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(scores), torch.ones(ranks), sizes)


@masked
def test_masked_functions_refuse_wrong_shapes(count, function):
    for position in range(count):
        tensors = [torch.zeros(2, 3) for _ in range(count)]
        tensors[position] = torch.zeros(2, 1)  # would broadcast without a word
        with pytest.raises(ValueError, match=r"has shape \(2, 1\); expected \(2, 3\), the shape of mask"):
            function(torch.ones(2, 3, dtype=torch.bool), *tensors)


def test_token_functions_refuse_what_is_not_a_batch_of_rows():
    x, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\); expected 2 dimensions, \(B, T\)"):
        F.gae(x, x, mask)
    for scores in (torch.zeros(2, 1), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"scores has shape .* expected \(2,\), one a row of mask"):
            F.token_rewards(scores, torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), 0.1)


@pytest.mark.parametrize("name", ["token_rewards", "gae", "whiten", "policy_loss", "value_loss"])
def test_no_columns_are_no_error(name):
    count, function = MASKED[name]
    output = function(torch.ones(2, 0, dtype=torch.bool), *normal(count, 2, 0))
    assert output.numel() == 0 or output.item() == 0
