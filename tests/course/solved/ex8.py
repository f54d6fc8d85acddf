"""A right solution of exercise 8, unlike the reference: its own sums, another algebra."""
import torch

from losses import _aggregate, _prepare, _stats, _surrogate, group_advantages


def nats(batch, reduction):
    if reduction not in ("sum", "mean"):
        raise ValueError("sum or mean")
    whole = (batch.old_logp * batch.mask).sum(1)
    return whole / batch.mask.sum(1).clamp(min=1) if reduction == "mean" else whole


def term_of(batch, reduction, gamma_p, gamma_n):
    correct = (batch.rewards == 1).to(batch.logp.dtype)
    return (gamma_n * (1 - correct) - gamma_p * correct) * nats(batch, reduction)


def diffsmooth(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
               clip_low=0.2, clip_high=0.2, beta=0.0, reduction="sum", gamma_p=0.2, gamma_n=0.0,
               agg="seq_mean"):
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    term = term_of(batch, reduction, gamma_p, gamma_n)
    advantages = term + group_advantages(batch.rewards, group_size)
    losses, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)
    ratio = term.abs().mean() / advantages.abs().mean().clamp(min=1e-6)
    return _aggregate(losses, batch.mask, agg), _stats(batch, advantages, clipped, ds_ratio=ratio)


def diffsmooth_reward(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                      clip_low=0.2, clip_high=0.2, beta=0.0, reduction="sum", gamma_p=0.2,
                      gamma_n=0.0, agg="token_mean"):
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    term = term_of(batch, reduction, gamma_p, gamma_n)
    shaped = (batch.rewards + term).view(-1, group_size)
    advantages = (shaped - shaped.mean(1)[:, None]).view(-1)
    losses, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)
    rest = term.view(-1, group_size)
    rest = rest - rest.mean(1)[:, None]
    ratio = rest.abs().mean() / advantages.abs().mean().clamp(min=1e-6)
    return _aggregate(losses, batch.mask, agg), _stats(batch, advantages, clipped, ds_ratio=ratio)
