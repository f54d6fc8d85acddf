"""What is optimised: one function a method, all with the same signature, to be read beside one another.

    loss, stats = diffsmooth(logp, old_logp, mask, rewards, group_size, gamma_p=0.1)

    logp      (B, T) log-probability of each sampled token under the current weights; carries the gradient
    old_logp  (B, T) the same at the weights that sampled; a constant (detached here)
    mask      (B, T) 1 on sampled tokens up to and including the stop token; what stands elsewhere is never read
    rewards   (B,)   one an answer; B = prompts x group_size, the rows of one prompt contiguous
    entropy   (B, T) or None: of the whole next-token distribution; carries a gradient too
    ref_logp  (B, T) or None: the frozen reference's log-probabilities, for the KL terms
    ->        loss, a scalar to be minimised; stats, a flat dict of floats

Every call sees the WHOLE optimiser batch, so advantages and denominators are formed here and any split into micro-batches
is the caller's business. "Correct" means reward == 1, never reward > 0: a format bonus does not make an answer right.

Letters: G = group_size, c = how many of a group are correct, S = sum of an answer's old log-probabilities, M = S / length.
The advantage A (B,) is all that most methods differ in. Where one update follows each rollout, the ratio is 1 everywhere:
every clip is then inert, grpo, gspo (and dapo, cispo) agree in gradient, and the VALUE of the loss says nothing.
"""
import math

import torch

EPS = 1e-6                                             # added to the group's std, outside the root


# ---------------------------------------------------------------------------------------------------------- shared steps

def group_advantages(rewards, group_size):
    """(r - group mean) / (group std + 1e-6), Eq. (5); std with ddof 0. Exactly 0 where all rewards of a group are equal.

    1, 0, 0, 0 gives 1.732, -0.577 three times (ddof 1, torch's default, would give 1.5 and -0.5).
    """
    r = rewards.view(-1, group_size)                                            # (prompts, G)
    A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + EPS)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)                  # rounding of the mean, divided by EPS
    return torch.where(equal, 0.0, A).flatten()                                 # (B,)


def kl(logp, ref_logp, kind="k3"):
    """Estimates of KL(pi, ref) from tokens sampled from pi; with d = logp - ref_logp, (B, T):

    k1  d               unbiased; inside a reward its gradient is right, inside a loss its expected gradient is ZERO
    k2  d^2 / 2         inside a loss: the gradient of KL(pi, ref)
    k3  e^-d + d - 1    never negative; inside a loss: the gradient of the FORWARD KL(ref, pi), though its value estimates
                        KL(pi, ref). What GRPO uses.
    d = 0.5 gives .5, .125, .106531.
    """
    d = logp - ref_logp.detach()
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d                     # e^-d + d - 1 would round to 0, or below it, for small d
    raise ValueError(f"unknown kind of KL estimate '{kind}'; these exist: k1, k2, k3.")


def _inputs(logp, old_logp, mask, rewards, group_size):
    """Checked (logp, old_logp, mask); masked positions become 0 before anything can exponentiate what they hold."""
    if logp.dim() != 2 or logp.shape != old_logp.shape or logp.shape != mask.shape or rewards.shape != logp.shape[:1]:
        raise ValueError(f"shapes do not fit: logp {tuple(logp.shape)}, old_logp {tuple(old_logp.shape)}, mask "
                         f"{tuple(mask.shape)} must be (B, T) and rewards {tuple(rewards.shape)} (B,).")
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {len(rewards)} rows.")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold 0 and 1 only.")
    if not rewards.isfinite().all():
        raise ValueError("rewards must be finite.")
    mask = mask.bool()
    logp, old_logp = torch.where(mask, logp, 0.0), torch.where(mask, old_logp.detach(), 0.0)
    if (logp > 1e-4).any() or (old_logp > 1e-4).any():  # a little above 0 is rounding
        raise ValueError("a log-probability is above 0: these are not log-probabilities, or the mask is wrong.")
    return logp, old_logp, mask


def _correct(rewards):
    """(B,) bool, reward == 1. Refuses rewards outside [0, 1], where 'correct' would have no meaning."""
    if ((rewards < 0) | (rewards > 1)).any():
        raise ValueError("this loss tells correct (1) from wrong answers, so rewards must lie in [0, 1].")
    return rewards == 1


def _aggregate(l, mask, agg):
    """Token losses (B, T) -> scalar. Rows without a token count nowhere; an all-zero mask gives 0."""
    l, lengths = torch.where(mask, l, 0.0), mask.sum(1)
    rows = (lengths > 0).sum().clamp(min=1)
    if agg == "seq_mean":                              # every answer weighs the same (GRPO's paper)
        return (l.sum(1) / lengths.clamp(min=1)).sum() / rows
    if agg == "token_mean":                            # every token weighs the same (DAPO, and the authors' runs)
        return l.sum() / lengths.sum().clamp(min=1)
    if agg == "seq_sum":                               # every token, unbiased for REINFORCE on whole answers
        return l.sum() / rows
    raise ValueError(f"unknown agg '{agg}'; these exist: seq_mean, token_mean, seq_sum.")


def _need(value, name, weight):
    if value is None:
        raise ValueError(f"a weight of {weight} on it needs {name}, which was not given.")
    return value


def _length_mean(x, mask):
    """Sum and mean over an answer's tokens, (B,) each."""
    total = torch.where(mask, x, 0.0).sum(1)
    return total, total / mask.sum(1).clamp(min=1)


def _stats(A, rewards, group_size, logp, old_logp, mask, entropy=None, cut=None, **extra):
    """What every loss reports, as floats; one transfer from the device."""
    with torch.no_grad():
        tokens, log_ratio = mask.sum().clamp(min=1), logp - old_logp            # masked positions are 0 in both
        r = rewards.view(-1, group_size)
        values = {"adv_abs": A.abs().mean(), "ratio_max": log_ratio.amax().exp() if mask.any() else torch.ones(()),
                  "clip_frac": (cut & mask).sum() / tokens if cut is not None else torch.zeros(()),
                  "zero_std_frac": (r.amax(1) == r.amin(1)).float().mean(),
                  "kl_old": kl(old_logp, logp.detach()).sum() / tokens, **extra}
        if entropy is not None:
            values["entropy"] = torch.where(mask, entropy, 0.0).sum() / tokens
        numbers = torch.stack([value.detach().to(logp).reshape(()) for value in values.values()]).tolist()
    return dict(zip(values, numbers))


def _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta=0.0, ref_logp=None, entropy=None,
             entropy_coef=0.0, **extra):
    """PPO's clipped surrogate for given advantages A (B,), with GRPO's optional beta * k3 and an entropy term.

    Clip 0.2, ratio 1.5: A = +1 gives -1.2 and no gradient; A = -1 gives +1.5 with gradient.
    """
    ratio, A = (logp - old_logp).exp(), A[:, None]                              # (B, T), (B, 1)
    l = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if beta:
        penalty = kl(logp, torch.where(mask, _need(ref_logp, "ref_logp", beta), 0.0))
        l, extra = l + beta * penalty, extra | {"kl": penalty.sum() / mask.sum().clamp(min=1)}
    if entropy_coef:
        l = l - entropy_coef * torch.where(mask, _need(entropy, "entropy", entropy_coef), 0.0)
    cut = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))   # where no gradient flows
    return _aggregate(l, mask, agg), _stats(A, rewards, group_size, logp, old_logp, mask, entropy, cut, **extra)


# -------------------------------------------------------------------------------------------------- without a clip

def reinforce(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, baseline=0.0, beta=0.0):
    """REINFORCE (Williams 1992). Against GRPO: no group, no ratio, no clip; a constant baseline known before sampling.

    Unbiased for one update a rollout. A = 1, logp -0.2, one row: loss +0.2, gradient -1. All-correct groups push too.
    beta puts k1 into the reward. Trap: dividing by the length is another objective.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    A = _minus_kl(rewards, old_logp, mask, beta, ref_logp) - baseline
    return (_aggregate(-A[:, None] * logp, mask, "seq_sum"),
            _stats(A, rewards, group_size, logp, old_logp, mask, entropy))


def rloo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, beta=0.0):
    """Leave-one-out (2402.14740). Against GRPO: the baseline is the mean of the OTHER answers, no std, whole answers.

    1, 0, 0, 0 gives A = 1, -1/3, -1/3, -1/3. Unbiased; equals G/(G-1) times dr_grpo's advantage. beta: k1 in the reward,
    before the baseline. One update a rollout.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    if group_size < 2:
        raise ValueError("rloo needs a group_size of at least 2: the baseline is the other answers' mean.")
    r = _minus_kl(rewards, old_logp, mask, beta, ref_logp).view(-1, group_size)
    A = ((r - r.mean(1, keepdim=True)) * group_size / (group_size - 1)).flatten()    # = r_i - mean of the others
    return (_aggregate(-A[:, None] * logp, mask, "seq_sum"),
            _stats(A, rewards, group_size, logp, old_logp, mask, entropy))


def _minus_kl(rewards, old_logp, mask, beta, ref_logp):
    """r - beta * k1, summed over the answer; a constant."""
    if not beta:
        return rewards
    ref_logp = torch.where(mask, _need(ref_logp, "ref_logp", beta), 0.0)
    return rewards - beta * kl(old_logp, ref_logp, "k1").sum(1)


# --------------------------------------------------------------------------------------------------------- GRPO and kin

def grpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=0.2, clip_high=0.2, beta=0.0,
         agg="seq_mean"):
    """GRPO (2402.03300; the paper's vanilla baseline). The yardstick of this file.

    1, 1, 0, 0 gives A = +-1. A group without contrast has A = 0 but stays in the denominators, and the KL acts on it.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    A = group_advantages(rewards, group_size)                                   # Eq. (5)
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy)


def dr_grpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=0.2, clip_high=0.2,
            max_len=512):
    """Dr. GRPO (2503.20783). Against GRPO: no std, and tokens are summed and divided by a constant, not by the length.

    The constant is the generation budget (train.py passes its own); the padded width would change every step.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    r = rewards.view(-1, group_size)
    A = (r - r.mean(1, keepdim=True)).flatten()                                 # differs from GRPO here
    loss, stats = _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, "seq_sum", entropy=entropy)
    return loss / max_len, stats                                                # and here


def dapo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=0.2, clip_high=0.28):
    """DAPO (2503.14476). Against GRPO: a higher upper clip, and every token weighs the same.

    Equals grpo(agg="token_mean", clip_high=0.28). Its dynamic sampling is train.py's --dynamic-sampling.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    A = group_advantages(rewards, group_size)
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, "token_mean", entropy=entropy)


def gspo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=3e-4, clip_high=4e-4):
    """GSPO (2507.18071). Against GRPO: one ratio an answer, the geometric mean of its tokens', and a far narrower clip.

    Log-ratios .1, -.1, .3 give s = e^0.1 = 1.105171. A clip of 0.2 would never act; a product of ratios explodes.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    A = group_advantages(rewards, group_size)
    s = _length_mean(logp - old_logp, mask)[1].exp()                            # (B,), differs from GRPO here
    l = -torch.minimum(s * A, s.clamp(1 - clip_low, 1 + clip_high) * A)
    cut = ((A > 0) & (s > 1 + clip_high)) | ((A < 0) & (s < 1 - clip_low))
    return (_aggregate(l[:, None].expand_as(logp), mask, "seq_mean"),
            _stats(A, rewards, group_size, logp, old_logp, mask, entropy, cut[:, None]))


def cispo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=1.0, clip_high=4.0):
    """CISPO (2506.13585, 2510.13786). Against GRPO: the clipped ratio is a constant WEIGHT on logp, so every token keeps
    its gradient; every token weighs the same.

    Both clips are distances: the weight lies in [0, 5]. A = 1 and log-ratio ln 10: gradient -5, where PPO has 0.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    A = group_advantages(rewards, group_size)
    weight = (logp - old_logp).exp().clamp(1 - clip_low, 1 + clip_high).detach()     # (B, T), differs from GRPO here
    return (_aggregate(-weight * A[:, None] * logp, mask, "token_mean"),
            _stats(A, rewards, group_size, logp, old_logp, mask, entropy))


def entropy(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, entropy_coef=1e-3, clip_low=0.2,
            clip_high=0.2, beta=0.0, agg="seq_mean"):
    """Global entropy bonus (entropy_coef > 0) or penalty (< 0), the paper's two heuristics. Against GRPO: - coef * H.

    H is the exact entropy of each next-token distribution, at the sampling temperature. The form on whole answers is
    diffsmooth(gamma_p=a, gamma_n=-a) for a bonus. A coefficient for one agg does not carry over to another.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    A = group_advantages(rewards, group_size)
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy,
                    entropy_coef)


# ---------------------------------------------------------------------------------------------- differential smoothing

def diffsmooth(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, gamma_p=0.1, gamma_n=0.0,
               reduction="sum", clip_low=0.2, clip_high=0.2, beta=0.0, agg="seq_mean"):
    """DS-GRPO (2511.19942), Eq. (6) as printed. Against GRPO: after normalisation, -gamma_p log pi_old on correct answers
    and +gamma_n log pi_old on wrong ones.

    log pi <= 0: every correct answer is raised, the RARE ones most; every wrong one lowered, the RARE ones most. It acts
    in groups of equal rewards too, and group sums are not 0. Ablations: gamma_n = 0 (Positive), gamma_p = 0 (Negative).
    S = -10, -20, -10, -20, r = 1, 1, 0, 0, gammas .03, .01: A = 1.3, 1.6, -1.1, -1.2.
    reduction: "sum" takes log pi of the answer (the paper; .03 / .01 for a 3B model), "mean" its mean over tokens. A gamma
    does not carry over from one to the other: they differ by the length. Watch stats["ds_ratio"], well below 1.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    A = group_advantages(rewards, group_size)                                   # Eq. (5)
    term = _smoothing(old_logp, mask, rewards, gamma_p, gamma_n, reduction)     # Eq. (6), differs from GRPO here only
    ds_ratio = term.abs().mean() / A.abs().mean().clamp(min=EPS)
    return _clipped(logp, old_logp, mask, rewards, group_size, A + term, clip_low, clip_high, agg, beta, ref_logp, entropy,
                    ds_ratio=ds_ratio)


def diffsmooth_reward(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, gamma_p=0.1, gamma_n=0.0,
                      reduction="sum", clip_low=0.2, clip_high=0.2, beta=0.0, agg="token_mean"):
    """Differential smoothing in the reward (2511.19942, Eq. (4) with pi_old), as in the last version of the authors' code.
    Against diffsmooth: the term enters before the group mean is subtracted, and nothing is divided by the std.

    Group sums of A are 0. An all-correct group is a pure ranking: rare answers up, likely ones DOWN. With gamma_n > 0 an
    all-wrong group pushes its likely wrong answers UP. With both gammas 0 this is dr_grpo up to a constant factor.
    S = -10, -20, -10, -20, r = 1, 1, 0, 0, gammas .03, .01: A = .65, .95, -.75, -.85.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    term = _smoothing(old_logp, mask, rewards, gamma_p, gamma_n, reduction)
    r = (rewards + term).view(-1, group_size)                                   # Eq. (4)
    A = (r - r.mean(1, keepdim=True)).flatten()
    plain = rewards.view(-1, group_size)
    ds_ratio = term.abs().mean() / (plain - plain.mean(1, keepdim=True)).abs().mean().clamp(min=EPS)
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy,
                    ds_ratio=ds_ratio)


def _smoothing(old_logp, mask, rewards, gamma_p, gamma_n, reduction):
    """(B,): -gamma_p log pi_old(y) on correct answers, +gamma_n log pi_old(y) on the rest; a constant."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"unknown reduction '{reduction}'; these exist: sum, mean.")
    L = _length_mean(old_logp, mask)[reduction == "mean"]
    return torch.where(_correct(rewards), -gamma_p * L, gamma_n * L)


# ------------------------------------------------------------------------------- other advantages on GRPO's surrogate

def unlikeliness(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, rank_coef=0.25, clip_low=0.2,
                 clip_high=0.2, beta=0.0, agg="seq_mean"):
    """Unlikeliness reward (2506.02355). Against GRPO: a correct answer's reward shrinks with its likelihood rank.

    Ranks by M over the whole group, 0 = least likely; r' = r (1 - rank_coef * rank / G). r = 1, 1, 0, 0 with M = -.1, -.5,
    -.3, -.9: r' = .8125, .9375, 0, 0. Trap, kept: in an all-correct group the std cancels rank_coef, so A is a full-size
    ranking.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    M = _length_mean(old_logp, mask)[1].view(-1, group_size)
    rank = M.argsort(dim=1, stable=True).argsort(dim=1).flatten()                     # (B,)
    A = group_advantages(rewards * (1 - rank_coef * rank / group_size), group_size)  # differs from GRPO here only
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy)


def passk(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, k=4, clip_low=0.2, clip_high=0.2,
          beta=0.0, agg="seq_mean"):
    """Pass@k training, analytic (2508.10751); the paper's GR-PKPO baseline. Against GRPO: the advantage of the average
    k-subset that holds the answer, with pass@k as the subset's reward.

    k = 1 is grpo. G 4, k 2: c = 2 gives +-.447; c = 1 gives 1, -1/3. Nothing to learn once G - c < k.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    right, c = _counts(rewards, group_size, k)
    R = [1 - _choose(group_size - i, k) / _choose(group_size, k) for i in range(group_size + 1)]   # pass@k of c = i
    s = [math.sqrt(x * (1 - x)) + EPS for x in R]
    up = [(1 - R[i]) / s[i] for i in range(group_size + 1)]
    down = [(1 - R[i] - _choose(group_size - i - 1, k - 1) / _choose(group_size - 1, k - 1)) / s[i]
            for i in range(group_size + 1)]
    up[0] = down[0] = 0.0                                                       # nothing correct, nothing to compare
    A = torch.where(right, rewards.new_tensor(up)[c], rewards.new_tensor(down)[c])
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy)


def pkpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, k=4, clip_low=0.2, clip_high=0.2,
         beta=0.0, agg="seq_mean"):
    """PKPO, sloo-minus-one (2505.15201). Against GRPO: an unbiased gradient of pass@k; correct answers only, weighted the
    more the fewer others are correct; no std, no baseline beyond it.

    A = k C(G-c, k-1) / C(G-1, k-1) if correct, else 0 (the paper sums over a group, we average over rows: hence G times).
    G 4, k 2: c = 2 gives 4/3, c = 1 gives 2. k = 1 is A = r.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    right, c = _counts(rewards, group_size, k)
    weight = [k * _choose(group_size - i, k - 1) / _choose(group_size - 1, k - 1) for i in range(group_size + 1)]
    A = torch.where(right, rewards.new_tensor(weight)[c], 0.0)
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy)


def _counts(rewards, group_size, k):
    """Which answers are correct (B,), and how many are in each one's group (B,)."""
    if not 1 <= k <= group_size:
        raise ValueError(f"k must lie between 1 and the group size {group_size}, not {k}.")
    right = _correct(rewards)
    return right, right.view(-1, group_size).sum(1).repeat_interleave(group_size)


def _choose(a, b):
    return math.comb(a, b) if 0 <= b <= a else 0


def w_reinforce(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, w_pos=0.1, w_neg=1.0,
                clip_low=0.2, clip_high=0.2, beta=0.0, agg="seq_mean"):
    """Weighted REINFORCE (2506.01347). Against GRPO: A = +w_pos if correct, -w_neg otherwise; no baseline, no std.

    (1, 0) is positive, (0, 1) negative reinforcement alone; the authors drop rows of weight 0, here they stay in the
    denominators. It is reinforce with baseline w_neg / (w_pos + w_neg), scaled. Trap: NSR lowers without bound.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    A = torch.where(_correct(rewards), w_pos, -w_neg).to(logp.dtype)
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy)


def maxrl(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, clip_low=0.2, clip_high=0.2, beta=0.0,
          agg="seq_mean"):
    """MaxRL (2602.02710). Against GRPO: divided by the mean instead of the std: follows sum_{j<G} pass@j / j.

    1, 0, 0, 0 gives 3, -1, -1, -1. A = 0 where nothing, or everything, is right. Needs rewards >= 0.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    if (rewards < 0).any():
        raise ValueError("maxrl divides by the mean reward, so rewards must not be negative.")
    r = rewards.view(-1, group_size)
    mean = r.mean(1, keepdim=True)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    A = torch.where(equal, 0.0, (r - mean) / (mean + EPS)).flatten()            # differs from GRPO here only
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy)


def ucpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, tau=0.2, clip_low=0.2, clip_high=0.2,
         beta=0.0, agg="seq_mean"):
    """UCPO (2605.00365). Against GRPO: a group's positive advantage is redistributed among its correct answers, towards
    the unlikely ones; the total and the wrong answers stay.

    Correct A times (1 - tau) + tau c (1/q_i) / sum_j (1/q_j), q = softmax of M over the correct. M = -.1, -.5: factors
    .960525, 1.039475. Trap: length means make q nearly uniform, so the effect is small.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    right = _correct(rewards).view(-1, group_size)                              # (prompts, G)
    M = _length_mean(old_logp, mask)[1].view(-1, group_size)
    q = torch.where(right, M, -1e9).softmax(1).clamp(min=1e-6)
    inverse = torch.where(right, 1 / q, 0.0)
    share = right.sum(1, keepdim=True) * inverse / inverse.sum(1, keepdim=True).clamp(min=EPS)
    factor = torch.where(right, (1 - tau) + tau * share, 1.0).flatten()
    A = group_advantages(rewards, group_size) * factor                          # differs from GRPO here only
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy)


def focal(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, focal_gamma=0.5, clip_low=0.2,
          clip_high=0.2, beta=0.0, agg="seq_mean"):
    """F-GRPO (2602.06717). Against GRPO: one factor a group, (1 - c/G)^focal_gamma: easy prompts weigh less.

    G 4: c = 2 gives +-.7071, c = 1 gives 1.5, -.5. Mean |A| falls by a third, so compare with a lower-lr grpo.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    accuracy = _correct(rewards).view(-1, group_size).to(logp.dtype).mean(1).repeat_interleave(group_size)
    A = (1 - accuracy) ** focal_gamma * group_advantages(rewards, group_size)   # differs from GRPO here only
    return _clipped(logp, old_logp, mask, rewards, group_size, A, clip_low, clip_high, agg, beta, ref_logp, entropy)


# --------------------------------------------------------------------------------------------------------- supervised

def sft(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """Cross-entropy per token on the rows as they are; rewards and old_logp are not used. The stop token is a target.

    logp (-1, -2) and (-3): 2.0; a mean of row means would be 2.25. Equals rft where every reward is 1.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    return (_aggregate(-logp, mask, "token_mean"),
            _stats(torch.ones_like(rewards), rewards, group_size, logp, old_logp, mask, entropy))


def rft(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """Rejection-sampling fine-tuning: sft on the correct rows alone, per token of those rows. None kept: loss 0.

    Removing duplicate answers needs token ids; do it outside, by zeroing a row of the mask.
    """
    logp, old_logp, mask = _inputs(logp, old_logp, mask, rewards, group_size)
    right = _correct(rewards)
    return (_aggregate(-logp, mask & right[:, None], "token_mean"),
            _stats(right.to(logp.dtype), rewards, group_size, logp, old_logp, mask, entropy,
                   kept_frac=right.to(logp.dtype).mean()))
