"""A right solution of exercise 9, unlike the reference: a loop over groups, products for C."""
import torch

from losses import _aggregate, _prepare, _stats, _surrogate


def factor(G, c, k):
    value = float(k)
    for i in range(1, k):
        value *= max(0, G - c - i + 1) / (G - i)
    return value


def pkpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, k=4, agg="seq_mean"):
    if k < 1 or k > group_size:
        raise ValueError("k must lie in 1 .. G")
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    advantages = torch.zeros_like(batch.rewards)
    for start in range(0, len(advantages), group_size):
        correct = batch.rewards[start:start + group_size] == 1
        value = factor(group_size, int(correct.sum()), k)
        advantages[start:start + group_size] = value * correct
    losses, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)
    return _aggregate(losses, batch.mask, agg), _stats(batch, advantages, clipped)
