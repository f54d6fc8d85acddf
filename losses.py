"""What is optimised: one function per method, to be read side by side.

    python train.py --loss diffsmooth --gamma_p 0.1    # a function's name, and one of its options

The policy pi draws G answers y to each prompt x, and each answer earns a reward. GRPO turns the
rewards of a group into advantages, one number A per answer: if A > 0 the answer becomes more
likely, if A < 0 less likely. GRPO alone collapses onto the answers that were likely before.
Differential smoothing (arXiv 2511.19942) adds one term to A, Eq. (6): among correct answers, the
rare ones get more. Most of the other methods differ from GRPO only in A; a comment marks the line.

Every function takes the same first arguments and returns (loss, stats), stats a dict of floats:

    logp      (B, T)  log-probability of each sampled token under the current weights; has gradient
    old_logp  (B, T)  the same under the weights that sampled, a constant; `logp` itself on-policy
    mask      (B, T)  1 on generated tokens up to and including the first stop token; entries where
                      mask is 0 are ignored, NaN included
    rewards   (B,)    one per answer; the G = group_size answers to a prompt are neighbouring rows
    entropy   (B, T)  of the whole next-token distribution; has gradient
    ref_logp  (B, T)  as old_logp, under a frozen reference policy

A call sees the whole optimiser batch, computes advantages and denominators from it, and never
writes into its arguments. "Correct" means rewards == 1; 0.1 for the right format is still wrong.
"""
import math
from typing import NamedTuple

import torch

EPS = 1e-6                                             # added to the std, outside its root


class UserError(ValueError):
    """An option that cannot be used as given, in one sentence for the user."""


def group_advantages(rewards, group_size):
    """A = (r - mean) / (std + 1e-6) within each group. (B,) -> (B,)    # Eq. (5)

    The std is that of the population (ddof 0); torch.std and most libraries use ddof 1.
    (1, 0, 0, 0) -> 1.732047, -0.577349 three times; ddof 1 would give 1.5, -0.5. If rewards are 0
    or 1 and a share p is correct: sqrt((1-p)/p) if correct, -sqrt(p/(1-p)) if wrong.
    Trap: equal rewards must give exactly 0. In float32 the mean of equal numbers can be wrong in
    the last digit, and divided by 1e-6 that error becomes an advantage.
    Whole numbers count as floats; rewards are not written to.
    ValueError: group_size is below 1 or does not divide B.
    """
    rewards = rewards.detach() if rewards.is_floating_point() else rewards.float()
    r = _grouped(rewards, group_size)                                       # (B/G, G)
    a = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + EPS)  # Eq. (5)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)              # (B/G, 1)
    return torch.where(equal, 0, a).flatten()


def grpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, agg="seq_mean"):
    """GRPO (arXiv 2402.03300, Eq. 3): PPO's clipped surrogate, with rewards normalised per group.

        ratio = exp(logp - old_logp), per token
        loss  = mean over answers of the mean over their tokens of
                -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + beta KL(pi, ref)

    Per token, the gradient is -ratio * A where not clipped, else 0. agg says how tokens are
    averaged: seq_mean, token_mean (as in many libraries) or seq_sum, explained in `_aggregate`.
    With one update per rollout all ratios are 1, so nothing is clipped; under seq_mean the loss is
    0, its gradient is not.
    Traps: a group of equal rewards gives no policy gradient, yet its tokens count in denominators
    and in the KL; for A = -1 the loss of a large ratio is unbounded on purpose.
    r = (1, 1, 0, 0): A = 0.999998 twice, -0.999998 twice.
    ValueError: logp is not (B, T), or other shapes do not fit it; group_size is below 1 or does
    not divide B; mask holds more than 0 and 1; a reward is not finite; a log-probability is above
    0 on a generated token; agg is unknown, or seq_const (dr_grpo's); beta != 0 without ref_logp.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T) Eq. 3
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def diffsmooth(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
               clip_low=0.2, clip_high=0.2, beta=0.0, reduction="sum", gamma_p=0.2, gamma_n=0.0,
               agg="seq_mean"):
    """DS-GRPO (arXiv 2511.19942, Eq. 6): smooth among correct answers, sharpen among wrong ones.

        A = A_grpo - gamma_p log pi_old(y|x)    if r == 1
        A = A_grpo + gamma_n log pi_old(y|x)    otherwise

    Against GRPO: that term, added after normalisation. log pi is below 0, so correct answers rise,
    the RARE ones most, and wrong ones fall, the RARE ones most. gamma_n = 0 is DS-GRPO-Positive,
    gamma_p = 0 DS-GRPO-Negative; with both 0 it is GRPO. The term also acts in groups of equal
    rewards, and the A of a group no longer sum to 0: at ratio 1 the loss is about -0.2, not 0.
    log pi_old(y|x) is the sum of old_logp over the answer's tokens (reduction "sum", as Eq. 6 is
    printed); the authors' code took the mean ("mean"). The two differ by a factor, the length, so
    a gamma tuned for one does not suit the other. Reported for a 3B model on Countdown: gamma_p
    0.03, gamma_n 0.01; the defaults here were measured on train.py's default task.
    Traps: a wrong sign; a term that is silently 0; adding it before normalisation; using logp.
    log pi_old = -10, -20, -10, -20, r = (1, 1, 0, 0), gamma_p 0.03, gamma_n 0.01:
    A = 1.299998, 1.599998, -1.099998, -1.199998.
    ValueError: as in grpo, with the same agg; a reward is above 1; reduction is unknown.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    r, log_pi = batch.rewards, _answer_logp(batch, reduction)               # (B,), (B,)
    term = torch.where(r == 1, -gamma_p * log_pi, gamma_n * log_pi)         # (B,)
    advantages = group_advantages(r, group_size) + term     # Eq. (6), differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped, term)


def diffsmooth_reward(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                      clip_low=0.2, clip_high=0.2, beta=0.0, reduction="sum", gamma_p=0.2,
                      gamma_n=0.0, agg="token_mean"):
    """Differential smoothing of the reward: Eq. 4 with pi_old, the authors' last working code.

    Against diffsmooth: the term is added to the reward before the group mean is subtracted, and
    nothing is divided by the std; with both gammas 0 it is dr_grpo up to a constant factor. The A
    of a group sum to 0. So in an all-correct group the likely answers are pushed DOWN, and in an
    all-wrong group UP: there gamma_n sharpens where the policy knows nothing yet.
    log pi_old = -10, -20, -10, -20, r = (1, 1, 0, 0), gamma_p 0.03, gamma_n 0.01:
    smoothed rewards 1.3, 1.6, -0.1, -0.2; minus their mean 0.65: A = 0.65, 0.95, -0.75, -0.85.
    ValueError: as in diffsmooth.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    r, log_pi = batch.rewards, _answer_logp(batch, reduction)               # (B,), (B,)
    term = torch.where(r == 1, -gamma_p * log_pi, gamma_n * log_pi)         # (B,) Eq. (4)
    r, term = _grouped(r, group_size), _grouped(term, group_size)           # (B/G, G) each
    advantages = (r + term - (r + term).mean(1, keepdim=True)).flatten()    # differs from GRPO here
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    term = term - term.mean(1, keepdim=True)           # the part of it in the advantages
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped, term)


def entropy(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
            clip_low=0.2, clip_high=0.2, beta=0.0, entropy_coef=1e-3, agg="seq_mean"):
    """GRPO with a global entropy bonus (entropy_coef > 0) or penalty (< 0).

    Against GRPO: entropy_coef * H is subtracted from each token's loss, on correct and wrong
    answers alike; H is the exact entropy at the sampling temperature. The same idea in the
    advantages, -a log pi_old(y|x) added to every A, is diffsmooth with gamma_p = a, gamma_n = -a.
    Traps: `entropy` must have gradient, or the term is a constant; -logp of the samples is not H;
    a coefficient tuned for one agg does not suit another.
    Uniform over 4 tokens: H = log 4 = 1.386294, so coefficient 0.001 lowers the loss by 0.001386.
    """
    if entropy is None and entropy_coef:
        raise UserError("entropy_coef != 0 needs entropy: that of each next-token distribution.")
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    if entropy_coef:
        token_loss = token_loss - entropy_coef * batch.entropy      # differs from GRPO here only
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


# ---------------------------- a first reading ends here; below: the other losses, what they share

def reinforce(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
              baseline=0.0, beta=0.0):
    """REINFORCE (Williams 1992): loss = -(r - baseline) log pi(y|x), averaged over answers.

    Against GRPO: no group, no ratio, no clip; the baseline is a constant known beforehand (0, or a
    running mean), and beta * sum_t (old_logp - ref_logp) is first subtracted from r.
    Traps: right for one update per rollout only; dividing by the length gives another objective.
    A = 1, one token of logp -0.2: loss +0.2, gradient -1. ValueError: as in grpo, except for agg.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = _penalised_rewards(batch, beta) - baseline                 # (B,)
    token_loss = -advantages[:, None] * batch.logp                          # (B, T)
    return _aggregate(token_loss, batch.mask, "seq_sum"), _stats(batch, advantages)


def rloo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, beta=0.0):
    """RLOO (arXiv 2402.14740): REINFORCE whose baseline is the mean reward of the OTHER answers.

    Against GRPO: leave-one-out mean, no std, no clip, and the answer is one action (its tokens are
    summed, not averaged). A is G/(G-1) times that of dr_grpo.
    Traps: dividing by the length; subtracting the KL after the baseline instead of before it.
    r = (1, 0, 0, 0): A = 1, -1/3, -1/3, -1/3. G = 1 is refused: there are no other answers.
    """
    if group_size < 2:
        raise UserError(f"rloo compares an answer with the others: group_size {group_size} < 2.")
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    r = _grouped(_penalised_rewards(batch, beta), group_size)               # (B/G, G)
    others = (r.sum(1, keepdim=True) - r) / (group_size - 1)                # (B/G, G)
    advantages = (r - others).flatten()                                     # (B,)
    token_loss = -advantages[:, None] * batch.logp                          # (B, T)
    return _aggregate(token_loss, batch.mask, "seq_sum"), _stats(batch, advantages)


def dr_grpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
            clip_low=0.2, clip_high=0.2, max_len=512):
    """Dr. GRPO (arXiv 2503.20783): GRPO without its two biases.

    Against GRPO: no division by the std, and token losses are summed and divided by a constant,
    max_len, not by the length. train.py passes its --max-new-tokens; a change rescales the rate.
    Traps: dividing by the padded width, which changes from step to step; doing only one of the two.
    r = (1, 0, 0, 0): A = 0.75, -0.25 three times.
    """
    if max_len < 1:
        raise UserError(f"max_len must be at least 1, not {max_len}.")
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    r = _grouped(batch.rewards, group_size)                                 # (B/G, G)
    advantages = (r - r.mean(1, keepdim=True)).flatten()                    # differs from GRPO here
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high)        # (B, T)
    loss = _aggregate(token_loss, batch.mask, "seq_const", max_len)         # and here
    return loss, _stats(batch, advantages, clipped)


def dapo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.28):
    """DAPO (arXiv 2503.14476): clip-higher and the token-level loss.

    Against GRPO: a wider upper clip and the same weight for every token of the batch, as by
    grpo(clip_high=0.28, agg="token_mean"); no KL. Its dynamic sampling is a flag of train.py.
    Trap: the mean of the micro-batches' means is not the mean of the batch.
    Ratio 1, lengths 2 and 6, A = +1 and -1: loss (-2 + 6) / 8 = +0.5.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high)        # (B, T)
    loss = _aggregate(token_loss, batch.mask, "token_mean")                 # differs from GRPO here
    return loss, _stats(batch, advantages, clipped)


def gspo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=3e-4, clip_high=4e-4):
    """GSPO (arXiv 2507.18071): one ratio per answer, exp(mean_t(logp - old_logp)), is clipped.

    Against GRPO: the ratio is the geometric mean of the token ratios, so the clip is far narrower;
    a clipped answer has no gradient on any token. At ratio 1 the gradient is that of GRPO.
    Traps: a clip of 0.2 never acts here; the product of the token ratios explodes.
    logp - old_logp = 0.1, -0.1, 0.3: ratio e^0.1 = 1.105171.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    lengths = batch.mask.sum(1, keepdim=True).clamp(min=1)                  # (B, 1)
    log_ratio = (batch.logp - batch.old_logp).sum(1, keepdim=True) / lengths        # (B, 1)
    ratio = torch.exp(log_ratio)                                            # differs from GRPO here
    answer_loss, clipped = _clip(ratio, advantages[:, None], clip_low, clip_high)   # (B, 1)
    loss = _aggregate(answer_loss, batch.mask, "seq_mean")                  # the same on all tokens
    return loss, _stats(batch, advantages, clipped)


def cispo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=1.0, clip_high=4.0):
    """CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE with a clipped importance weight.

        loss = mean over all tokens of -weight A logp
        weight = stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high))

    Against GRPO: the ratio is a constant weight on logp, so a clipped token keeps its gradient.
    The clips are distances from 1: 1 and 4 mean weights in [0, 5], the cap of ScaleRL (arXiv
    2510.13786); some libraries expect the cap itself. At ratio 1 the gradient is that of dapo.
    Trap: a weight that has gradient. A = 1, ratio 10: gradient -5, where PPO's clip leaves 0.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    ratio = torch.exp(batch.logp.detach() - batch.old_logp)                 # (B, T), a constant
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)                       # (B, T)
    token_loss = -weight * advantages[:, None] * batch.logp                 # differs from GRPO here
    loss = _aggregate(token_loss, batch.mask, "token_mean")                 # and here
    capped_frac = _aggregate(ratio != weight, batch.mask, "token_mean")
    return loss, _stats(batch, advantages, capped_frac=capped_frac)


def unlikeliness(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                 clip_low=0.2, clip_high=0.2, beta=0.0, rank_coef=0.25, agg="seq_mean"):
    """Unlikeliness reward (arXiv 2506.02355): r (1 - rank_coef rank / G), then as in GRPO.

    Against GRPO: the likelier a correct answer is, the less it earns. rank is the place of an
    answer in its group, wrong answers included, when sorted by the mean of old_logp over its
    tokens: 0 = least likely, ties in row order. rank_coef 0 is GRPO; the paper calls it beta.
    Trap: in an all-correct group the std cancels rank_coef, and A is -1.53 to 1.53 (G = 8): noise.
    Mean old_logp -0.1, -0.5, -0.3, -0.9, r = (1, 1, 0, 0): ranks 3, 1, 2, 0;
    A = 0.852801, 1.137068, -0.994934, -0.994934.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, min_reward=0)
    likelihood = _grouped(_answer_logp(batch, "mean"), group_size)          # (B/G, G)
    rank = likelihood.argsort(dim=1, stable=True).argsort(dim=1).flatten()  # (B,)
    r = batch.rewards * (1 - rank_coef * rank / group_size)         # differs from GRPO here only
    advantages = group_advantages(r, group_size)                            # (B,)
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def passk(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=0.2, clip_high=0.2, beta=0.0, k=4, agg="seq_mean"):
    """Pass@k training (arXiv 2508.10751, analytic), called GR-PKPO in the smoothing paper.

    Against GRPO: the best reward of each subset of k answers is normalised over all subsets; A of
    an answer is the mean over the subsets that contain it. k = 1 is GRPO. With c correct answers
    in the group, a subset contains a correct one with probability 1 - C(G-c, k) / C(G, k): pass@k.
    Traps: A is 0 if no answer is correct, and also as soon as fewer than k answers are wrong.
    G = 4, k = 2: c = 2 gives 0.447212, -0.447212; c = 1 gives 0.999998, -0.333333.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1,
                     k=k)
    G, C, counts = group_size, math.comb, range(group_size + 1)
    fail = [C(G - c, k) / C(G, k) for c in counts]     # P(no correct answer in a subset)
    fail_if_in = [C(max(G - c - 1, 0), k - 1) / C(G - 1, k - 1) for c in counts]  # with a wrong one
    std = [math.sqrt(f * (1 - f)) + EPS for f in fail]
    right = _by_number_correct(batch, [f / s for f, s in zip(fail, std)])   # (B,)
    wrong = _by_number_correct(batch, [(f - w) / s for f, w, s in zip(fail, fail_if_in, std)])
    advantages = torch.where(batch.rewards == 1, right, wrong)      # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def pkpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, k=4, agg="seq_mean"):
    """PKPO (arXiv 2505.15201, sloo-minus-one): an unbiased gradient of pass@k.

        A = k C(G-c, k-1) / C(G-1, k-1)  if r == 1, 0 otherwise; c answers of the group have r == 1

    Against GRPO: no std; wrong answers have no weight; correct ones weigh more if they are few.
    Unbiased for one-token answers or agg="seq_sum". The paper sums its s_i over the group; rows are
    averaged here, so A = G s_i. Traps: losing that G; a std; one more leave-one-out baseline.
    G = 4, k = 2: c = 2 gives 4/3, c = 1 gives 2. With k = 1, A = r.
    ValueError: as in grpo, with the same agg; a reward is above 1; k is not in 1..group_size.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1,
                     k=k)
    G, C, counts = group_size, math.comb, range(group_size + 1)
    values = [k * C(G - c, k - 1) / C(G - 1, k - 1) for c in counts]
    right = _by_number_correct(batch, values)                               # (B,)
    advantages = torch.where(batch.rewards == 1, right, 0)          # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def w_reinforce(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                clip_low=0.2, clip_high=0.2, beta=0.0, w_pos=0.1, w_neg=1.0, agg="seq_mean"):
    """W-REINFORCE (arXiv 2506.01347): A = w_pos if correct, -w_neg if wrong.

    Against GRPO: no std, no group; it is (w_pos + w_neg) times reinforce with the baseline
    w_neg / (w_pos + w_neg). w_pos 1, w_neg 0 is the paper's PSR; 0 and 1 is NSR. The authors drop
    rows of weight zero; here they stay in the denominator.
    Trap: NSR lowers probabilities without bound. Whatever the group, A = 0.1 or -1.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    correct = (batch.rewards == 1).to(batch.logp)                           # (B,) 1 or 0
    advantages = w_pos * correct - w_neg * (1 - correct)            # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def maxrl(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=0.2, clip_high=0.2, beta=0.0, agg="seq_mean"):
    """MaxRL (arXiv 2602.02710): A = (r - mean) / mean, from mean reward to maximum likelihood.

    Against GRPO: divided by the mean, not by the std. The expected gradient is that of the sum of
    pass@j / j, j = 1..G-1, for one-token answers or agg="seq_sum". Rewards must not be negative.
    r = (1, 0, 0, 0): A = 2.999988 (G - 1), -0.999996 three times. An all-wrong group stays at 0.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, min_reward=0)
    r = _grouped(batch.rewards, group_size)                                 # (B/G, G)
    mean = r.mean(1, keepdim=True)                                          # (B/G, 1)
    advantages = ((r - mean) / (mean + EPS)).flatten()              # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def ucpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, tau=0.2, agg="seq_mean"):
    """UCPO (arXiv 2605.00365): a group's positive advantage, moved towards its unlikely answers.

    Against GRPO: A of each of the c correct answers is multiplied by
    (1 - tau) + tau c (1/q_i) / sum_j (1/q_j), where q is the softmax, over the correct answers, of
    the mean of old_logp over their tokens; the sum over the group stays. tau 0 is GRPO.
    Trap: means over tokens are close to each other, so q is almost uniform and the effect small.
    Mean old_logp -0.1, -0.5 of two correct answers: factors 0.960525, 1.039475.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    correct = _grouped(batch.rewards == 1, group_size)                      # (B/G, G)
    likelihood = _grouped(_answer_logp(batch, "mean"), group_size)          # (B/G, G)
    q = torch.where(correct, likelihood, -1e9).softmax(1).clamp(min=1e-6)   # of correct answers
    rarity = torch.where(correct, 1 / q, 0)
    share = correct.sum(1, keepdim=True) * rarity / rarity.sum(1, keepdim=True).clamp(min=1)
    factor = torch.where(correct, 1 - tau + tau * share, 1).flatten()       # (B,)
    advantages = group_advantages(batch.rewards, group_size) * factor  # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def focal(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=0.2, clip_high=0.2, beta=0.0, focal_gamma=0.5, agg="seq_mean"):
    """F-GRPO (arXiv 2602.06717): A = (1 - c/G)^focal_gamma A_grpo: solved prompts count less.

    Against GRPO: one factor per group, from its number c of correct answers; focal_gamma 0 is GRPO.
    Trap: mean |A| falls too (by a third at 0.5), so compare with GRPO at a smaller learning rate.
    r = (1, 1, 0, 0): A = +-0.707105; (1, 0, 0, 0): 1.499997, -0.499999 three times.
    """
    if focal_gamma < 0:
        raise UserError(f"focal_gamma must not be negative, and is {focal_gamma}.")
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    values = [(1 - c / group_size) ** focal_gamma for c in range(group_size + 1)]
    factor = _by_number_correct(batch, values)                              # (B,)
    advantages = group_advantages(batch.rewards, group_size) * factor  # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def sft(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """Cross-entropy: minus the mean of logp over all tokens.

    Against GRPO: rewards, group_size and old_logp are ignored. Compute logp at temperature 1.
    logp (-1, -2) and (-3): 2.0; the mean of the rows' means would be 2.25.
    """
    ones = logp.detach().new_ones(len(logp))                                # (B,)
    batch = _prepare(logp, logp, mask, ones, 1, entropy, ref_logp)
    return _aggregate(-batch.logp, batch.mask, "token_mean"), _stats(batch, ones)


def rft(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """Rejection-sampling fine-tuning: cross-entropy on the tokens of the correct answers.

    Against GRPO: wrong answers are ignored. If no answer is correct, loss and gradient are 0.
    Trap: duplicates of correct answers speed up collapse; to drop them, set their mask rows to 0.
    logp (-1, -2) correct, (-3) wrong: 1.5.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    correct = batch.rewards == 1                                            # (B,)
    kept = correct.to(batch.logp)                                           # (B,) 1 or 0
    loss = _aggregate(-batch.logp, batch.mask & correct[:, None], "token_mean")
    return loss, _stats(batch, kept, kept_frac=kept.mean())


# -------------------------------------------------------------------------------- what they share

class _Batch(NamedTuple):
    """The arguments, checked: 0 where mask is 0; only logp and entropy have gradient."""
    logp: torch.Tensor                                 # (B, T)
    old_logp: torch.Tensor                             # (B, T)
    mask: torch.Tensor                                 # (B, T) bool
    rewards: torch.Tensor                              # (B,) in the dtype of logp
    group_size: int
    entropy: torch.Tensor = None                       # (B, T)
    ref_logp: torch.Tensor = None                      # (B, T)


def _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp,
             min_reward=-math.inf, max_reward=math.inf, k=1):
    """Check the arguments of a loss, set masked entries to 0, detach what is constant -> _Batch.
    NaN on a generated token is not refused: it must show in the loss, so that training can stop."""
    if logp.dim() != 2 or 0 in logp.shape:
        raise ValueError(f"logp must be (rows, tokens), not empty, and is {tuple(logp.shape)}.")
    given = {"logp": logp, "old_logp": old_logp.detach()}
    if entropy is not None:
        given["entropy"] = entropy
    if ref_logp is not None:
        given["ref_logp"] = ref_logp.detach()
    for name, x in (given | {"mask": mask, "rewards": rewards}).items():
        shape = logp.shape[:1] if name == "rewards" else logp.shape
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, not {tuple(x.shape)}.")
    _grouped(rewards, group_size)                      # raises if these are not whole groups
    if not 1 <= k <= group_size or k % 1:
        raise UserError(f"k = {k} must be between 1 and the group size {group_size}.")
    generated = mask.bool()
    rewards = rewards.detach().to(logp.dtype)
    # Padding becomes 0 before any exp or product: inf * 0 is NaN, also in the gradient.
    given = {name: torch.where(generated, x, 0) for name, x in given.items()}
    complaints = {
        "mask must hold nothing but 0 and 1.": mask != generated,
        f"rewards must be finite and from {min_reward} to {max_reward}; correct means 1.":
            ~rewards.isfinite() | (rewards < min_reward) | (rewards > max_reward)}
    for name, x in given.items():
        if name != "entropy":                          # rounding may put a likely token above 0
            complaints[f"{name} is above 0 on a generated token: no log-probability."] = x > 1e-4
    found = torch.stack([where.any() for where in complaints.values()]).tolist()   # one GPU sync
    if any(found):
        raise ValueError(list(complaints)[found.index(True)])
    return _Batch(mask=generated, rewards=rewards, group_size=group_size, **given)


def _grouped(x, group_size):
    """(B,) -> (B/G, G): one row per prompt."""
    if group_size < 1 or len(x) % group_size:
        raise ValueError(f"group_size {group_size} must be above 0 and divide the {len(x)} rows.")
    return x.reshape(-1, group_size)


def _by_number_correct(batch, values):
    """For each answer values[c], where c = 0..G answers of its group are correct -> (B,)."""
    c = _grouped(batch.rewards == 1, batch.group_size).sum(1)               # (B/G,)
    return batch.logp.new_tensor(values)[c].repeat_interleave(batch.group_size)


def _answer_logp(batch, reduction):
    """log pi_old(y|x): old_logp summed over an answer's tokens, or their mean -> (B,), constant."""
    if reduction not in ("sum", "mean"):
        raise UserError(f"unknown reduction {reduction!r}: sum or mean.")
    total = batch.old_logp.sum(1)                      # (B,) padding is 0
    return total if reduction == "sum" else total / batch.mask.sum(1).clamp(min=1)


def kl(logp, ref_logp, kind="k3"):
    """KL(pi, ref) per token, estimated from d = logp - ref_logp of tokens drawn from pi -> (B, T).

    k1 = d             in the reward (reinforce, rloo); as a loss its expected gradient is zero
    k3 = e^-d + d - 1  in the loss (GRPO); never negative, but its gradient is that of the other
                       direction, KL(ref, pi). (k2 = d^2 / 2 has the gradient of KL(pi, ref).)
    d = 0.5: k1 0.5, k3 0.106531. d = -0.5: -0.5, 0.148721. Not clamped: a huge value should show.
    """
    if ref_logp is None:
        raise UserError("beta != 0 needs ref_logp: log-probabilities under a reference policy.")
    if kind not in ("k1", "k3"):
        raise ValueError(f"unknown KL estimator {kind!r}: k1 or k3.")
    d = logp - ref_logp                                # (B, T)
    return d if kind == "k1" else torch.expm1(-d) + d  # exp(-d) - 1 loses all digits if d is small


def _penalised_rewards(batch, beta):
    """Rewards minus beta times the k1 estimate of each answer's KL; a constant -> (B,)."""
    penalty = beta * kl(batch.old_logp, batch.ref_logp, "k1").sum(1) if beta else 0
    return batch.rewards - penalty


def _surrogate(batch, advantages, clip_low, clip_high, beta=0.0):
    """GRPO's token loss for given advantages, and where the clip cut its gradient: (B, T) each."""
    ratio = torch.exp(batch.logp - batch.old_logp)                          # (B, T)
    token_loss, clipped = _clip(ratio, advantages[:, None], clip_low, clip_high)
    if beta:
        token_loss = token_loss + beta * kl(batch.logp, batch.ref_logp)
    return token_loss, clipped


def _clip(ratio, advantages, clip_low, clip_high):
    """PPO's clip: the loss, and where it has no gradient; both shaped as ratio, (B, T) or (B, 1).

    Ratio 1.5, clips 0.2: A = +1 gives -1.2 and no gradient, A = -1 gives +1.5 with gradient. The
    min is the worse of the two: what has moved far enough gains nothing by moving further.
    """
    unclipped = ratio * advantages
    loss = -torch.min(unclipped, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    too_high = (advantages > 0) & (ratio > 1 + clip_high)
    too_low = (advantages < 0) & (ratio < 1 - clip_low)
    return loss, too_high | too_low


def _aggregate(token_loss, mask, agg, max_len=None):
    """Token losses (B, T) -> the loss, a scalar. Half of what makes a method is how it averages:

                                                               lengths 2 and 6, token losses -1, +1
        seq_mean    mean over answers of the mean over their tokens          (-1 + 1) / 2 =  0
        token_mean  mean over all tokens of the batch                        (-2 + 6) / 8 = +0.5
        seq_sum     mean over answers of the sum over their tokens           (-2 + 6) / 2 = +2
        seq_const   seq_sum divided by a constant, max_len; here 10                       = +0.2

    Answers without a token are not counted; if there is no token at all, the result is 0.
    ValueError: agg is unknown, or seq_const comes without max_len.
    """
    token_loss = torch.where(mask, token_loss, 0)      # (B, T), if token_loss is (B, 1) too
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
    raise UserError(f"unknown agg {agg!r}: seq_mean, token_mean or seq_sum.")


@torch.no_grad()
def _stats(batch, advantages, clipped=None, term=None, **more):
    """The numbers returned with the loss, a dict of floats. clipped: (B, T) or (B, 1) bool; term:
    the smoothing term; more: what a loss adds, 0-dim tensors."""
    mask, log_ratio = batch.mask, batch.logp - batch.old_logp               # (B, T) each
    values = {"adv_abs": advantages.abs().mean(),
              "ratio_max": torch.where(mask, log_ratio, -math.inf).amax().exp()}
    per_token = {"clip_frac": torch.zeros_like(mask) if clipped is None else clipped,
                 "kl_old": kl(batch.old_logp, batch.logp),     # in this order: old drew the tokens
                 "kl": None if batch.ref_logp is None else kl(batch.logp, batch.ref_logp),
                 "entropy": batch.entropy}
    values |= {name: _aggregate(x, mask, "token_mean")
               for name, x in per_token.items() if x is not None} | more
    if term is not None:
        values["ds_ratio"] = term.abs().mean() / values["adv_abs"].clamp(min=EPS)
    numbers = torch.stack([x.detach().to(log_ratio.dtype) for x in values.values()])
    return dict(zip(values, numbers.tolist()))         # one GPU sync for all
