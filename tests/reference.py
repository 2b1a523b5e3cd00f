"""
The equations of `instructgpt_trl.functional`, in NumPy and plain Python loops, written from the paper and design; and
the rules of SQuAD v2's evaluation.

Nothing here comes from the package: one loop for one sum, one `if` for one case. Slow and obvious on purpose. Only
what a mask selects is ever read, so garbage elsewhere cannot matter.
"""

import string

import numpy as np


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def true_positions(mask_row):
    """Positions of one row that count, in order."""
    return [t for t in range(len(mask_row)) if mask_row[t]]


def untied_pairs(ranks, group_sizes):
    """One list of (better, worse) a prompt, as positions in `ranks`; rank 1 is best, equal ranks are no pair."""
    prompts, start = [], 0
    for size in group_sizes:
        pairs = []
        for i in range(start, start + size):
            for j in range(i + 1, start + size):
                if ranks[i] < ranks[j]:
                    pairs.append((i, j))
                elif ranks[j] < ranks[i]:
                    pairs.append((j, i))
        prompts.append(pairs)
        start += size
    return prompts


def ranking_loss(scores, ranks, group_sizes):
    """Eq. 1, ties dropped: mean over prompts of the mean over a prompt's pairs of -log sigmoid(s_w - s_l)."""
    prompt_losses = []
    for pairs in untied_pairs(ranks, group_sizes):
        if pairs:
            losses = [-np.log(sigmoid(scores[w] - scores[l])) for w, l in pairs]
            prompt_losses.append(sum(losses) / len(losses))
    return sum(prompt_losses) / len(prompt_losses) if prompt_losses else 0.0


def ranking_accuracy(scores, ranks, group_sizes):
    """Share of all pairs whose better completion scores higher; an equal score is half right."""
    right, total = 0.0, 0
    for pairs in untied_pairs(ranks, group_sizes):
        for w, l in pairs:
            total += 1
            if scores[w] > scores[l]:
                right += 1.0
            elif scores[w] == scores[l]:
                right += 0.5
    return right / total if total else float("nan")


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Eq. 2, a token at a time: -beta * log(pi / pi_ref); the score comes with a completion's last token."""
    rewards = np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        positions = true_positions(mask[b])
        for t in positions:
            rewards[b, t] = -kl_coef * (logprobs[b, t] - ref_logprobs[b, t])
        if positions:
            rewards[b, positions[-1]] += scores[b]
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    Schulman et al. 2016, Eq. 16, as a sum and not as a recursion: A_t = sum_l (gamma * lam)^l * delta_{t+l}, with
    delta_t = r_t + gamma * V_{t+1} - V_t, over the true tokens of a row; after the last one V is 0.
    """
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        positions = true_positions(mask[b])
        deltas = []
        for n, t in enumerate(positions):
            next_value = values[b, positions[n + 1]] if n + 1 < len(positions) else 0.0
            deltas.append(rewards[b, t] + gamma * next_value - values[b, t])
        for n, t in enumerate(positions):
            advantages[b, t] = sum((gamma * lam) ** l * deltas[n + l] for l in range(len(positions) - n))
            returns[b, t] = advantages[b, t] + values[b, t]
    return advantages, returns


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(variance + 1e-8) over the true entries, variance with 1/n; the mean is put back if asked."""
    whitened = np.zeros(mask.shape)
    true = [(b, t) for b in range(mask.shape[0]) for t in true_positions(mask[b])]
    if not true:
        return whitened
    mean = sum(x[p] for p in true) / len(true)
    variance = sum((x[p] - mean) ** 2 for p in true) / len(true)
    for p in true:
        whitened[p] = (x[p] - mean) / np.sqrt(variance + 1e-8)
        if not shift_mean:
            whitened[p] += mean
    return whitened


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=0.2):
    """Schulman et al. 2017, Eq. 7: minus the mean over true tokens of min(ratio * A, clip(ratio) * A)."""
    total, count = 0.0, 0
    for b in range(mask.shape[0]):
        for t in true_positions(mask[b]):
            ratio = np.exp(logprobs[b, t] - old_logprobs[b, t])
            clipped = min(max(ratio, 1.0 - cliprange), 1.0 + cliprange)
            total += min(ratio * advantages[b, t], clipped * advantages[b, t])
            count += 1
    return -total / count if count else 0.0


def value_loss(values, old_values, returns, mask, cliprange=0.2):
    """Half the mean over true tokens of the larger of two squared errors: of V, and of V kept near the old V."""
    total, count = 0.0, 0
    for b in range(mask.shape[0]):
        for t in true_positions(mask[b]):
            near = min(max(values[b, t], old_values[b, t] - cliprange), old_values[b, t] + cliprange)
            total += max((values[b, t] - returns[b, t]) ** 2, (near - returns[b, t]) ** 2)
            count += 1
    return 0.5 * total / count if count else 0.0


def squad_tokens(text):
    """Lower case, without ASCII punctuation, without the whole words a, an and the, cut at white space."""
    runs = [""]  # of letters, digits and their like, and of everything else, in turn
    for char in text.lower():
        if char not in string.punctuation:
            if runs[-1] and char.isalnum() != runs[-1][-1].isalnum():
                runs.append("")
            runs[-1] += char
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def squad_scores(prediction, answers):
    """Exact match and F1 against the best of the answers that have a word, or against no answer if none has."""
    words, exact, best = squad_tokens(prediction), 0.0, 0.0
    for answer in [squad_tokens(one) for one in answers if squad_tokens(one)] or [[]]:
        exact = max(exact, 1.0 if answer == words else 0.0)
        same, left = 0, list(answer)
        for word in words:
            if word in left:
                left.remove(word)
                same += 1
        if not words or not answer:  # no answer is right if both are empty, and wrong if one is
            f1 = 1.0 if words == answer else 0.0
        elif same == 0:
            f1 = 0.0
        else:
            precision, recall = same / len(words), same / len(answer)
            f1 = 2 * precision * recall / (precision + recall)
        best = max(best, f1)
    return exact, best
