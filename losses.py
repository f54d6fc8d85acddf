"""What is optimised: one function a method, to be read side by side.

    python train.py --loss diffsmooth --gamma_p 0.1    # the word is the function, its keywords are the flags

Differential smoothing (arXiv 2511.19942) adds one line to GRPO, Eq. (6): among correct answers the rare ones get more
advantage, so that learning does not collapse onto the likely ones. Here it stands beside what it is compared with.
Every function has the same first arguments and returns (loss, stats):

    logp      (B, T)  log-probability of each sampled token under the current weights; carries the gradient
    old_logp  (B, T)  the same at the weights that sampled; a constant, and `logp` itself will do on-policy
    mask      (B, T)  1 on generated tokens up to and including the first stop token; where it is 0, NaN does no harm
    rewards   (B,)    one per answer; the G = group_size rows of one prompt are neighbours
    entropy   (B, T)  of the next-token distribution, carries gradient; ref_logp (B, T) under a frozen reference

A call sees the whole optimiser batch, forms advantages A (B,) and denominators itself, and writes into no argument.
How one number comes out of (B, T) token losses is half of a method, and named in its `agg`:

    seq_mean    mean over answers of the mean over their tokens     token_mean   mean over all tokens of the batch
    seq_sum     mean over answers of the sum over their tokens      seq_const    seq_sum / max_len, a fixed number

Lengths 2 and 6, A = +1 and -1, ratio 1: 0 by seq_mean, +0.5 by token_mean, +2 by seq_sum, +0.2 by seq_const (10).

Read `grpo` first. In most others only A differs, and the line says so. "Correct" is rewards == 1, never rewards > 0: an
answer that earned 0.1 for its format is wrong. With one update a rollout (logp equals old_logp) every ratio is 1: then
no clip does anything, gspo has the gradient of grpo and cispo that of dapo, and a loss of 0 under seq_mean still has a
gradient. The std within a group is the population's (ddof 0); most libraries use ddof 1.

stats, floats: adv_abs = mean |A|; ratio_max = largest token ratio; clip_frac = share of tokens whose gradient a clip
removed; zero_std_frac = share of groups with equal rewards; kl_old = KL(old, current) in nats a token (k3); and where
they apply kl (to the reference), entropy, ds_ratio = mean |smoothing term| / mean |A|, kept_frac = share of rows kept,
capped_frac = share of tokens with a clipped weight.
"""
import math
from typing import NamedTuple, Optional

import torch

EPS = 1e-6                                             # added to a std or a mean, never put under the root


# ----------------------------------------------------------------------------------------------- shared by the losses

class _Batch(NamedTuple):
    """The checked arguments: 0 instead of anything under mask 0, and only logp and entropy carry gradient."""
    logp: torch.Tensor                                 # (B, T)
    old_logp: torch.Tensor                             # (B, T)
    mask: torch.Tensor                                 # (B, T) bool
    rewards: torch.Tensor                              # (B,) in the dtype of logp
    group_size: int
    entropy: Optional[torch.Tensor]                    # (B, T) or None
    ref_logp: Optional[torch.Tensor]                   # (B, T) or None


def _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, lowest=-math.inf, highest=math.inf):
    """Check the arguments (ValueError in one sentence) -> _Batch. Rewards outside [lowest, highest] are refused.

    NaN on a generated token is let through, so that the loss shows it. NaN in padding has to go before any exp or
    product, because inf * 0 is NaN, in the gradient too.
    """
    if logp.dim() != 2 or 0 in logp.shape:
        raise ValueError(f"logp must be (rows, tokens) and not empty, but its shape is {tuple(logp.shape)}.")
    for name, x in {"old_logp": old_logp, "mask": mask, "entropy": entropy, "ref_logp": ref_logp}.items():
        if x is not None and x.shape != logp.shape:
            raise ValueError(f"{name} must have the shape of logp, {tuple(logp.shape)}, but has {tuple(x.shape)}.")
    if rewards.shape != logp.shape[:1]:
        raise ValueError(f"rewards must be {len(logp)} numbers, one a row, but its shape is {tuple(rewards.shape)}.")
    _groups(rewards, group_size)
    on = mask.bool()
    clean = lambda x: None if x is None else torch.where(on, x, 0)
    constant = lambda x: None if x is None else clean(x.detach())
    logp, old_logp, ref_logp, entropy = clean(logp), constant(old_logp), constant(ref_logp), clean(entropy)
    rewards = rewards.detach().to(logp.dtype)
    wrong = {"mask must hold nothing but 0 and 1.": mask != on, "rewards must be finite.": ~rewards.isfinite(),
             f"this loss needs rewards of at least {lowest}.": rewards < lowest,
             f"this loss needs rewards of at most {highest}: correct means rewards == 1.": rewards > highest}
    for name, x in {"logp": logp, "old_logp": old_logp, "ref_logp": ref_logp}.items():
        if x is not None:                              # 1e-4: rounding may lift a certain token a little above 0
            wrong[f"{name} is above 0 on a generated token, which no log-probability can be."] = x > 1e-4
    for message, bad in zip(wrong, torch.stack([x.any() for x in wrong.values()]).tolist()):  # one GPU sync for all
        if bad:
            raise ValueError(message)
    return _Batch(logp, old_logp, on, rewards, group_size, entropy, ref_logp)


def _groups(x, group_size):
    """(B,) -> (B / G, G), one prompt a row."""
    if group_size < 1 or len(x) % group_size:
        raise ValueError(f"group_size {group_size} must be at least 1 and divide the {len(x)} rows.")
    return x.reshape(-1, group_size)


def group_advantages(rewards, group_size):
    """A = (r - mean) / (std + 1e-6) within each group, std with ddof 0. (B,) -> (B,)    # Eq. (5)

    (1, 0, 0, 0) -> 1.732047, -0.577349 three times; ddof 1 would give 1.5, -0.5. For 0/1 rewards with a share p correct
    it is sqrt((1-p)/p) for correct and -sqrt(p/(1-p)) for wrong answers. Equal rewards give exactly 0: in float32 the
    mean of equal numbers can be off by one in the last place, which dividing by 1e-6 would blow up.
    """
    r = _groups(rewards.detach() if rewards.is_floating_point() else rewards.float(), group_size)  # (B/G, G)
    a = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + EPS)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return torch.where(equal, 0, a).flatten()


def kl(logp, ref_logp, kind="k3"):
    """Estimates of KL(pi, ref) a token from d = logp - ref_logp, tokens drawn from pi. (B, T) -> (B, T).

    k1 = d            for the reward (reinforce, rloo): the right gradient. In a loss its expected gradient is zero.
    k2 = d^2 / 2      in a loss it has the gradient of KL(pi, ref), though its own value is biased.
    k3 = e^-d + d - 1 in a loss (GRPO): never negative, but its gradient is that of the other direction, KL(ref, pi).

    d = 0.5: 0.5, 0.125, 0.106531. d = -0.5: -0.5, 0.125, 0.148721. No clamp: a huge value is better seen than hidden.
    """
    if ref_logp is None:
        raise ValueError("a KL term (beta != 0) needs ref_logp, the log-probabilities under the reference model.")
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d ** 2 / 2
    if kind == "k3":
        return torch.expm1(-d) + d                     # exp(-d) - 1 would lose every digit of a small d in float32
    raise ValueError(f"unknown KL estimator {kind!r}: k1, k2 or k3.")


def _clip(ratio, advantages, clip_low, clip_high):
    """PPO's surrogate as a loss, and where it has no gradient left; both in the shape of ratio, (B, T) or (B, 1).

    Ratio 1.5, clip 0.2: A = +1 gives -1.2 and no gradient, A = -1 gives +1.5 with gradient (min is the pessimist).
    """
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    cut = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    return loss, cut


def _surrogate(batch, advantages, clip_low, clip_high, beta=0.0):
    """GRPO's token loss for any advantages: clipped surrogate plus beta * k3 -> (B, T), (B, T) where it was cut."""
    ratio = torch.exp(batch.logp - batch.old_logp)     # (B, T)
    token_loss, cut = _clip(ratio, advantages[:, None], clip_low, clip_high)
    return (token_loss + beta * kl(batch.logp, batch.ref_logp) if beta else token_loss), cut


def _aggregate(token_loss, mask, agg, max_len=None):
    """(B, T) -> scalar; see the table at the top. Rows without a token count nowhere; no token at all gives 0."""
    token_loss = torch.where(mask, token_loss, 0)
    lengths = mask.sum(1)                              # (B,)
    rows = (lengths > 0).sum().clamp(min=1)
    if agg == "seq_mean":
        return (token_loss.sum(1) / lengths.clamp(min=1)).sum() / rows
    if agg == "token_mean":
        return token_loss.sum() / lengths.sum().clamp(min=1)
    if agg == "seq_sum":
        return token_loss.sum() / rows
    if agg == "seq_const" and max_len is not None:
        return token_loss.sum() / rows / max_len
    raise ValueError(f"unknown agg {agg!r}: seq_mean, token_mean or seq_sum.")


def _sequence_logp(batch, reduction):
    """log pi_old(y|x), summed over an answer's tokens or its mean a token -> (B,). Not of logp: it is a constant."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"unknown reduction {reduction!r}: sum or mean.")
    total = batch.old_logp.sum(1)                      # padding is 0
    return total if reduction == "sum" else total / batch.mask.sum(1).clamp(min=1)


def _minus_kl(batch, beta):
    """Rewards minus beta times the answer's k1, a constant -> (B,)."""
    return batch.rewards - beta * kl(batch.old_logp, batch.ref_logp, "k1").sum(1) if beta else batch.rewards


def _by_count(batch, values):
    """values[c] for a group with c correct answers, c = 0..G -> (B,)."""
    c = _groups(batch.rewards == 1, batch.group_size).sum(1)                # (B/G,)
    return batch.logp.new_tensor(values)[c].repeat_interleave(batch.group_size)


def _check_k(k, group_size):
    if not 1 <= k <= group_size:
        raise ValueError(f"k = {k} must be between 1 and the group size {group_size}.")


@torch.no_grad()
def _stats(batch, advantages, cut=None, **more):
    """The numbers beside the loss, as floats. cut (B, T) or (B, 1): no gradient is left there; more: 0-dim tensors."""
    tokens = batch.mask.sum().clamp(min=1)
    per_token = lambda x: x.sum() / tokens             # padding is 0 in all that goes in
    log_ratio = batch.logp - batch.old_logp            # (B, T)
    r = _groups(batch.rewards, batch.group_size)
    values = {"adv_abs": advantages.abs().mean(),
              "ratio_max": torch.where(batch.mask, log_ratio, -math.inf).amax().exp(),
              "clip_frac": tokens * 0 if cut is None else per_token(cut & batch.mask),
              "zero_std_frac": (r.amax(1) == r.amin(1)).to(r.dtype).mean(),
              "kl_old": per_token(kl(batch.old_logp, batch.logp))}  # the tokens were drawn from old: it comes first
    if batch.ref_logp is not None:
        values["kl"] = per_token(kl(batch.logp, batch.ref_logp))
    if batch.entropy is not None:
        values["entropy"] = per_token(batch.entropy)
    values |= more
    return dict(zip(values, torch.stack([x.detach().to(log_ratio.dtype) for x in values.values()]).tolist()))


# ---------------------------------------------------------------------------------- the losses: policy gradient, GRPO

def reinforce(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, baseline=0.0, beta=0.0):
    """REINFORCE (Williams 1992): loss = -(r - baseline) log pi(y|x), averaged over answers.

    Against GRPO: no group, no ratio, no clip; the baseline is a constant known beforehand (0, or a running mean).
    With beta > 0 the reward first loses beta * sum_t (old_logp - ref_logp), as a constant.
    Traps: right for one update a rollout only; dividing by the length is another objective; its value means nothing.
    A = 1, one token of logp -0.2: loss +0.2, gradient -1.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = _minus_kl(batch, beta) - baseline     # (B,)
    token_loss = -advantages[:, None] * batch.logp     # (B, T)
    return _aggregate(token_loss, batch.mask, "seq_sum"), _stats(batch, advantages)


def rloo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, beta=0.0):
    """RLOO (arXiv 2402.14740): REINFORCE whose baseline is the mean reward of the OTHER answers to the prompt.

    Against GRPO: leave-one-out mean, no std, no clip, and the answer is one action (tokens summed, not averaged).
    A equals G/(G-1) times dr_grpo's. KL, if any, goes into the reward as k1 before the baseline.
    Traps: dividing by the length; KL after the baseline; G = 1 has no others and is refused.
    r = (1, 0, 0, 0): A = 1, -1/3, -1/3, -1/3.
    """
    if group_size < 2:
        raise ValueError(f"rloo compares an answer with the others: group_size must be at least 2, not {group_size}.")
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    r = _groups(_minus_kl(batch, beta), group_size)    # (B/G, G)
    others = (r.sum(1, keepdim=True) - r) / (group_size - 1)
    advantages = (r - others).flatten()                # (B,)
    token_loss = -advantages[:, None] * batch.logp     # (B, T)
    return _aggregate(token_loss, batch.mask, "seq_sum"), _stats(batch, advantages)


def grpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, agg="seq_mean"):
    """GRPO (arXiv 2402.03300, Eq. 3): the clipped surrogate of PPO with rewards normalised within the prompt's group.

        loss = mean_i mean_t [ -min(ratio A_i, clip(ratio, 1 - clip_low, 1 + clip_high) A_i) + beta k3 ]

    All others are measured against this one. Differentiated: -ratio A where not clipped, else 0.
    Traps: a group of equal rewards gives no policy gradient, yet its tokens stay in the denominators and KL acts on
    them; A = -1 with a large ratio is unbounded on purpose. Many libraries use token_mean; the paper has seq_mean.
    r = (1, 1, 0, 0): A = +-0.999998.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


def dr_grpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
            clip_low=0.2, clip_high=0.2, max_len=512):
    """Dr. GRPO (arXiv 2503.20783): GRPO without its two biases.

    Against GRPO: no division by the std, and token losses are summed and divided by a constant, not by the length.
    max_len is the generation budget; train.py passes its own. Changing it rescales the learning rate.
    Traps: dividing by the padded width, which changes from step to step; doing only one of the two changes.
    r = (1, 0, 0, 0): A = 0.75, -0.25 three times.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, not {max_len}.")
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    r = _groups(batch.rewards, group_size)             # (B/G, G)
    advantages = (r - r.mean(1, keepdim=True)).flatten()                    # differs from GRPO here
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high)
    return _aggregate(token_loss, batch.mask, "seq_const", max_len), _stats(batch, advantages, cut)  # and here


def dapo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=0.2, clip_high=0.28):
    """DAPO (arXiv 2503.14476): clip-higher and the token-level loss. Equals grpo(clip_high=0.28, agg="token_mean").

    Against GRPO: the upper clip is wider, every token of the batch weighs the same, no KL. Dynamic sampling, its other
    half, is a flag of train.py. Trap: the mean of micro-batch means is not the mean.
    On-policy, lengths 2 and 6, A = +1 and -1: +0.5.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high)    # (B, T)
    return _aggregate(token_loss, batch.mask, "token_mean"), _stats(batch, advantages, cut)  # differs from GRPO here


def gspo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=3e-4, clip_high=4e-4):
    """GSPO (arXiv 2507.18071): one ratio an answer, s_i = exp(mean_t(logp - old_logp)), and clip that.

    Against GRPO: the ratio is the geometric mean of the token ratios, hence the far narrower clip; a clipped answer has
    no gradient on any token. On-policy its gradient is GRPO's.
    Traps: a clip of 0.2 never acts here; the product of ratios explodes; the mean of ratios is another number.
    Log-ratios 0.1, -0.1, 0.3: s = e^0.1 = 1.105171.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    lengths = batch.mask.sum(1, keepdim=True).clamp(min=1)                  # (B, 1)
    ratio = torch.exp((batch.logp - batch.old_logp).sum(1, keepdim=True) / lengths)  # differs from GRPO here
    answer_loss, cut = _clip(ratio, advantages[:, None], clip_low, clip_high)  # (B, 1), the same on each token
    return _aggregate(answer_loss, batch.mask, "seq_mean"), _stats(batch, advantages, cut)


def cispo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=1.0, clip_high=4.0):
    """CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE with a clipped importance weight, averaged over tokens.

        loss = -stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) A logp

    Against GRPO: the ratio is a constant weight on logp, so clipping never silences a token. Both are distances:
    1 and 4 mean weights in [0, 5], the cap of ScaleRL (arXiv 2510.13786); some libraries take the cap itself.
    On-policy the gradient is dapo's. Traps: a weight that is differentiated; the loss value means nothing.
    A = 1, ratio 10: gradient -5, where PPO's clip leaves 0.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    ratio = torch.exp(batch.logp.detach() - batch.old_logp)                 # (B, T) a constant
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = -weight * advantages[:, None] * batch.logp                 # differs from GRPO here
    capped = (ratio != weight).sum() / batch.mask.sum().clamp(min=1)
    return _aggregate(token_loss, batch.mask, "token_mean"), _stats(batch, advantages, capped_frac=capped)


def entropy(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
            clip_low=0.2, clip_high=0.2, beta=0.0, entropy_coef=1e-3, agg="seq_mean"):
    """GRPO with a global entropy bonus (entropy_coef > 0) or penalty (< 0): token loss minus entropy_coef * H.

    Against GRPO: only that term, on correct and wrong answers alike; H is exact and at the sampling temperature. The
    reward form of it (-a log pi_old(y) added to every A) is diffsmooth with gamma_p = a, gamma_n = -a.
    Traps: `entropy` must carry gradient, or the term is a constant; -logp of the samples is not H; a coefficient does
    not carry over from one agg to another. Uniform over 4 tokens: H = 1.386294, so the loss falls by 0.001386.
    """
    if entropy is None and entropy_coef:
        raise ValueError("entropy_coef != 0 needs entropy, the (B, T) entropies of the next-token distributions.")
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    if entropy_coef:
        token_loss = token_loss - entropy_coef * batch.entropy              # differs from GRPO here only
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


# --------------------------------------------------------------------------------- the losses: against lost diversity

def diffsmooth(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
               clip_low=0.2, clip_high=0.2, beta=0.0, reduction="sum", gamma_p=0.2, gamma_n=0.0, agg="seq_mean"):
    """DS-GRPO (arXiv 2511.19942, Eq. 6): smooth among the correct answers, sharpen among the wrong ones.

        A_i - gamma_p log pi_old(y_i|x)  if r_i == 1,    A_i + gamma_n log pi_old(y_i|x)  otherwise

    Against GRPO: that term, added after normalisation. log pi <= 0, so correct answers rise, the RARE ones most, and
    wrong ones fall, the RARE ones most. gamma_n = 0 is DS-GRPO-Positive, gamma_p = 0 DS-GRPO-Negative, both 0 GRPO.
    The term acts in groups of equal rewards too; group sums of A are not 0. reduction "sum" is Eq. 6 as printed, the
    authors' code took the mean a token; the two differ by the length, so a gamma never carries over. As reported, a 3B
    model on Countdown: gamma_p 0.03, gamma_n 0.01; the defaults here are measured on train.py's default task.
    Traps: either sign; the term silently 0; adding it before normalisation; logp in place of old_logp.
    S = (-10, -20, -10, -20), r = (1, 1, 0, 0), gammas 0.03, 0.01: A = 1.299998, 1.599998, -1.099998, -1.199998.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, highest=1)
    log_pi = _sequence_logp(batch, reduction)          # (B,)
    term = torch.where(batch.rewards == 1, -gamma_p * log_pi, gamma_n * log_pi)
    advantages = group_advantages(batch.rewards, group_size) + term         # Eq. (6), differs from GRPO here only
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    ds_ratio = term.abs().mean() / advantages.abs().mean().clamp(min=EPS)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut, ds_ratio=ds_ratio)


def diffsmooth_reward(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                      clip_low=0.2, clip_high=0.2, beta=0.0, reduction="sum", gamma_p=0.2, gamma_n=0.0,
                      agg="token_mean"):
    """Differential smoothing of the reward (arXiv 2511.19942, Eq. 4 with pi_old), as in the authors' last working code.

    Against diffsmooth: the term enters the reward before the group mean is taken off, and there is no division by the
    std. With gammas 0 it is dr_grpo up to a constant factor. Group sums of A are 0, so an all-correct group pushes its
    likely answers DOWN, and an all-wrong group its likely ones UP: gamma_n sharpens where the policy knows nothing yet.
    S = (-10, -20, -10, -20), r = (1, 1, 0, 0), gammas 0.03, 0.01: A = 0.65, 0.95, -0.75, -0.85.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, highest=1)
    log_pi = _sequence_logp(batch, reduction)          # (B,)
    term = torch.where(batch.rewards == 1, -gamma_p * log_pi, gamma_n * log_pi)  # Eq. (4)
    term, r = _groups(term, group_size), _groups(batch.rewards, group_size)  # (B/G, G)
    advantages = (r + term - (r + term).mean(1, keepdim=True)).flatten()    # differs from GRPO here only
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    ds_ratio = (term - term.mean(1, keepdim=True)).abs().mean() / advantages.abs().mean().clamp(min=EPS)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut, ds_ratio=ds_ratio)


def unlikeliness(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                 clip_low=0.2, clip_high=0.2, beta=0.0, rank_coef=0.25, agg="seq_mean"):
    """Unlikeliness reward (arXiv 2506.02355): r_i (1 - rank_coef rank_i / G), then normalised as in GRPO.

    Against GRPO: a correct answer earns less the likelier it is. rank_i is its place by mean old_logp a token among ALL
    answers of the group, 0 = least likely, ties in row order. rank_coef 0 is GRPO; the paper calls it beta.
    Trap: in an all-correct group the std cancels rank_coef, and A is a full-size ranking of noise (+-1.53 for G = 8).
    M = (-0.1, -0.5, -0.3, -0.9), r = (1, 1, 0, 0): ranks 3, 1, 2, 0; A = 0.852801, 1.137068, -0.994934, -0.994934.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, lowest=0)
    likelihood = _groups(_sequence_logp(batch, "mean"), group_size)         # (B/G, G)
    rank = likelihood.argsort(dim=1, stable=True).argsort(dim=1).flatten()  # (B,)
    r = batch.rewards * (1 - rank_coef * rank / group_size)                 # differs from GRPO here only
    advantages = group_advantages(r, group_size)       # (B,)
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


def passk(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=0.2, clip_high=0.2, beta=0.0, k=4, agg="seq_mean"):
    """Pass@k training (arXiv 2508.10751, analytic form); the GR-PKPO baseline of the differential smoothing paper.

    Against GRPO: A is the mean, over all k-subsets with the answer in them, of the subset's normalised best reward.
    k = 1 is GRPO. R = 1 - C(G-c, k)/C(G, k) is pass@k of a group with c correct answers.
    Edges: nothing is learnt from c = 0, nor once fewer than k answers are wrong. Only rewards == 1 count as correct.
    G = 4, k = 2: c = 2 gives +-0.447212; c = 1 gives 0.999998, -0.333333.
    """
    _check_k(k, group_size)
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, highest=1)
    G, C, counts = group_size, math.comb, range(group_size + 1)
    fail = [C(G - c, k) / C(G, k) for c in counts]     # 1 - R: a subset holds no correct answer
    fail_with_wrong = [C(max(G - c - 1, 0), k - 1) / C(G - 1, k - 1) for c in counts]  # given one wrong member
    std = [math.sqrt(f * (1 - f)) + EPS for f in fail]
    right = _by_count(batch, [f / s for f, s in zip(fail, std)])            # (B,)
    wrong = _by_count(batch, [(f - w) / s for f, w, s in zip(fail, fail_with_wrong, std)])
    advantages = torch.where(batch.rewards == 1, right, wrong)              # differs from GRPO here only
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


def pkpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, k=4, agg="seq_mean"):
    """PKPO (arXiv 2505.15201, sloo-minus-one): an unbiased gradient of pass@k.

        A = k C(G-c, k-1) / C(G-1, k-1)  if correct, 0 otherwise

    Against GRPO: no std, wrong answers weigh nothing, correct ones more when few others are. The paper sums s_i over
    the group, here rows are averaged, hence A = G s_i; k = 1: A = r. Unbiased for one-token answers or agg="seq_sum".
    Traps: losing the factor G; a std afterwards; one more leave-one-out baseline, which biases it.
    G = 4, k = 2: c = 2 gives 4/3, c = 1 gives 2.
    """
    _check_k(k, group_size)
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, highest=1)
    G, C = group_size, math.comb
    right = _by_count(batch, [k * C(G - c, k - 1) / C(G - 1, k - 1) for c in range(G + 1)])  # (B,)
    advantages = torch.where(batch.rewards == 1, right, 0)                  # differs from GRPO here only
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


def w_reinforce(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                clip_low=0.2, clip_high=0.2, beta=0.0, w_pos=0.1, w_neg=1.0, agg="seq_mean"):
    """W-REINFORCE (arXiv 2506.01347): +w_pos for correct, -w_neg for wrong answers. (1, 0) is PSR, (0, 1) NSR.

    Against GRPO: no baseline and no std. It is reinforce with the constant baseline w_neg / (w_pos + w_neg), times
    (w_pos + w_neg). The authors drop rows of weight zero, here they stay in the denominator.
    Trap: NSR lowers probabilities without bound. Whatever the group, A = 0.1 or -1.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, highest=1)
    correct = (batch.rewards == 1).to(batch.logp)      # (B,) 1 or 0
    advantages = w_pos * correct - w_neg * (1 - correct)                    # differs from GRPO here only
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


def maxrl(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=0.2, clip_high=0.2, beta=0.0, agg="seq_mean"):
    """MaxRL (arXiv 2602.02710): A = (r - mean) / mean, a step from mean reward towards maximum likelihood.

    Against GRPO: divide by the mean, not the std. Its expected gradient is that of the sum of pass@j / j, j = 1..G-1,
    for one-token answers or agg="seq_sum". Rewards must not be negative.
    Traps: a single correct answer gets A = G-1; an all-wrong group stays at 0.
    r = (1, 0, 0, 0): A = 2.999988, -0.999996.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, lowest=0)
    r = _groups(batch.rewards, group_size)             # (B/G, G)
    mean = r.mean(1, keepdim=True)
    advantages = ((r - mean) / (mean + EPS)).flatten()                      # differs from GRPO here only
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


def ucpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, tau=0.2, agg="seq_mean"):
    """UCPO (arXiv 2605.00365): share a group's positive advantage among its correct answers, more to the unlikely.

    Against GRPO: A of the c correct answers is multiplied by (1-tau) + tau c (1/q_i) / sum_j (1/q_j), q the softmax
    of their mean old_logp a token; the group's total stays. tau 0 is GRPO, and so is c <= 1.
    Trap: means a token lie close together, so q is almost uniform and the effect small.
    M = (-0.1, -0.5) of two correct answers: factors 0.960525, 1.039475.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, highest=1)
    correct = _groups(batch.rewards == 1, group_size)  # (B/G, G)
    likelihood = _groups(_sequence_logp(batch, "mean"), group_size)
    q = torch.where(correct, likelihood, -1e9).softmax(1).clamp(min=1e-6)   # over the correct
    rarity = torch.where(correct, 1 / q, 0)
    share = correct.sum(1, keepdim=True) * rarity / rarity.sum(1, keepdim=True).clamp(min=1)
    factor = torch.where(correct, 1 - tau + tau * share, 1).flatten()       # (B,)
    advantages = group_advantages(batch.rewards, group_size) * factor       # differs from GRPO here only
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


def focal(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=0.2, clip_high=0.2, beta=0.0, focal_gamma=0.5, agg="seq_mean"):
    """F-GRPO (arXiv 2602.06717): A = (1 - c/G)^focal_gamma A_grpo, so that prompts already solved count less.

    Against GRPO: one factor a group; focal_gamma 0 is GRPO. Trap: it also lowers mean |A| (by a third at 0.5 over
    uniform accuracies), so compare with a GRPO of smaller learning rate.
    r = (1, 1, 0, 0): +-0.707105; (1, 0, 0, 0): 1.499997, -0.499999.
    """
    if focal_gamma < 0:
        raise ValueError(f"focal_gamma must not be negative, and is {focal_gamma}.")
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, highest=1)
    factor = _by_count(batch, [(1 - c / group_size) ** focal_gamma for c in range(group_size + 1)])  # (B,)
    advantages = group_advantages(batch.rewards, group_size) * factor       # differs from GRPO here only
    token_loss, cut = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, cut)


# ---------------------------------------------------------------------------------------------- the losses: imitation

def sft(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """Cross-entropy: minus the mean of logp over all tokens. Looks at neither rewards, nor group_size, nor old_logp.

    Against GRPO: no reward at all. For demonstrations, score logp at temperature 1; the stop token is a target.
    logp (-1, -2) and (-3): 2.0; the mean of row means would be 2.25.
    """
    ones = logp.detach().new_ones(len(logp))           # (B,)
    batch = _inputs(logp, logp, mask, ones, 1, entropy, ref_logp)
    return _aggregate(-batch.logp, batch.mask, "token_mean"), _stats(batch, ones)


def rft(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """Rejection-sampling fine-tuning: cross-entropy on the answers with rewards == 1, over their tokens.

    Against GRPO: wrong answers are thrown away. With all rewards 1 it is sft. Nothing kept: loss 0, gradient 0.
    Trap: kept duplicates speed up collapse; dropping them needs token ids, so zero their mask rows before.
    logp (-1, -2) correct, (-3) wrong: 1.5.
    """
    batch = _inputs(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, highest=1)
    kept = (batch.rewards == 1).to(batch.logp)         # (B,)
    loss = _aggregate(-batch.logp, batch.mask & (batch.rewards == 1)[:, None], "token_mean")
    return loss, _stats(batch, kept, kept_frac=kept.mean())
