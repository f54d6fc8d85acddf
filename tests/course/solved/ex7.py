"""A right solution of exercise 7, unlike the reference: one retained graph, its own norm."""
import math

import torch

from policy import score


def train_step(policy, optimizer, rollout, rewards, loss_fn, group_size, *, temperature=1.0,
               micro_batch=None, grad_clip=1.0, old_logp=None, ref_logp=None):
    B = len(rewards)
    size = micro_batch or B
    parts = []
    for start in range(0, B, size):
        rows = torch.arange(start, min(start + size, B))
        parts.append(score(policy, rollout, rows, group_size, temperature))
    logp = torch.cat([part[0].detach() for part in parts]).requires_grad_()
    entropy = torch.cat([part[1].detach() for part in parts]).requires_grad_()
    old = logp if old_logp is None else old_logp
    loss, stats = loss_fn(logp, old, rollout.mask, rewards, group_size, entropy=entropy,
                          ref_logp=ref_logp)
    g, e = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    g = torch.zeros_like(logp) if g is None else g
    e = torch.zeros_like(logp) if e is None else e
    optimizer.zero_grad()
    start = 0
    for part in parts:
        rows = slice(start, start + len(part[0]))
        torch.autograd.backward(part, (g[rows], e[rows]))
        start += len(part[0])
    weights = [w for w in policy.parameters() if w.grad is not None]
    norm = torch.stack([w.grad.norm() for w in weights]).norm().item()
    stats = dict(stats)
    stats["loss"] = loss.item()
    stats["grad_norm"] = norm
    stats["bad"] = not math.isfinite(norm) or not math.isfinite(stats["loss"])
    if stats["bad"]:
        fine = g.isfinite().all(1) & e.isfinite().all(1) & logp.isfinite().all(1)
        stats["bad_rows"] = [i for i, ok in enumerate(fine.tolist()) if not ok]
        return stats
    if norm > grad_clip:
        for w in weights:
            w.grad *= grad_clip / norm
    optimizer.step()
    return stats
