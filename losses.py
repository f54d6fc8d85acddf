"""What is optimised: one function a method, to be read side by side.

    python train.py --loss diffsmooth --gamma_p 0.1    # a function's name, and one of its keywords

The policy pi draws G answers y to each prompt x, and each answer earns a reward. GRPO turns the
rewards of a group into advantages, one number A an answer: above 0 the answer becomes likelier,
below 0 less likely. Left alone, this collapses onto the answers that were likely before.
Differential smoothing (arXiv 2511.19942) adds one term to A, Eq. (6): among correct answers the
rare ones get more. Here it stands beside what it is compared with. In most of them only A differs
from GRPO's, and the line says so.

Every function has the same first arguments and returns (loss, stats), stats a dict of floats:

    logp      (B, T)  log-probability of each sampled token under the current weights; has gradient
    old_logp  (B, T)  the same under the weights that sampled, a constant; before the first update
                      `logp` itself will do
    mask      (B, T)  1 on generated tokens up to and including the first stop token; where it is
                      0, NaN does no harm
    rewards   (B,)    one an answer; the G = group_size rows of one prompt are neighbours
    entropy   (B, T)  of the whole next-token distribution; has gradient
    ref_logp  (B, T)  as old_logp, under a frozen reference policy

A call sees the whole optimiser batch, forms advantages and denominators itself, and writes into no
argument. "Correct" means rewards == 1: an answer that earned 0.1 for its format is wrong.
"""
import math
from typing import NamedTuple, Optional

import torch

EPS = 1e-6                                             # added to a std, never put under its root


def group_advantages(rewards, group_size):
    """A = (r - mean) / (std + 1e-6) within each group. (B,) -> (B,)    # Eq. (5)

    The std is the population's (ddof 0); torch.std and most libraries take ddof 1.
    (1, 0, 0, 0) -> 1.732047, -0.577349 three times; ddof 1 would give 1.5, -0.5. For 0/1 rewards
    with a share p correct: sqrt((1-p)/p) for correct and -sqrt(p/(1-p)) for wrong answers.
    Trap: equal rewards must give exactly 0. In float32 the mean of equal numbers can be off by one
    in the last place, and divided by 1e-6 that is an advantage.
    """
    rewards = rewards.detach() if rewards.is_floating_point() else rewards.float()
    r = _grouped(rewards, group_size)                                       # (B/G, G)
    a = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + EPS)  # Eq. (5)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)              # (B/G, 1)
    return torch.where(equal, 0, a).flatten()


def grpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, agg="seq_mean"):
    """GRPO (arXiv 2402.03300, Eq. 3): PPO's clipped surrogate, rewards normalised in the group.

        ratio = exp(logp - old_logp)    for each token
        loss  = mean over answers of the mean over their tokens of
                -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + beta KL(pi, ref)

    All others are measured against this one. Gradient: -ratio A a token where not clipped, else 0.
    agg names the mean over tokens; `_aggregate` has the table. Many libraries use token_mean.
    With one update a rollout every ratio is 1: no clip acts, and by seq_mean the loss is 0, but its
    gradient is not.
    Traps: a group of equal rewards gives no policy gradient, yet its tokens stay in the
    denominators and the KL acts on them; A = -1 with a large ratio is unbounded on purpose.
    r = (1, 1, 0, 0): A = 0.999998 twice, -0.999998 twice.
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
    gamma_p = 0 DS-GRPO-Negative, both 0 GRPO. The term acts in groups of equal rewards too, and
    the A of a group no longer sum to 0.
    log pi_old(y|x) is the sum of old_logp over the answer's tokens (reduction "sum", Eq. 6 as
    printed); the authors' code took their mean ("mean"). The two differ by the length, so a gamma
    never carries over from one to the other. As reported, a 3B model on Countdown had gamma_p
    0.03, gamma_n 0.01; the defaults here are measured on train.py's default task.
    Traps: either sign; a term that is silently 0; adding it before normalisation; logp in place of
    old_logp.
    log pi_old = -10, -20, -10, -20, r = (1, 1, 0, 0), gamma_p 0.03, gamma_n 0.01:
    A = 1.299998, 1.599998, -1.099998, -1.199998.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    r, log_pi = batch.rewards, _answer_logp(batch, reduction)               # (B,), (B,)
    term = torch.where(r == 1, -gamma_p * log_pi, gamma_n * log_pi)         # (B,)
    advantages = group_advantages(r, group_size) + term     # Eq. (6), differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    ds_ratio = term.abs().mean() / advantages.abs().mean().clamp(min=EPS)
    stats = _stats(batch, advantages, clipped, ds_ratio=ds_ratio)
    return _aggregate(token_loss, batch.mask, agg), stats


def diffsmooth_reward(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                      clip_low=0.2, clip_high=0.2, beta=0.0, reduction="sum", gamma_p=0.2,
                      gamma_n=0.0, agg="token_mean"):
    """Differential smoothing of the reward: Eq. 4 with pi_old, the authors' last working code.

    Against diffsmooth: the term enters the reward before the group mean is taken off, and there is
    no division by the std; with both gammas 0 it is dr_grpo up to a constant factor. The A of a
    group sum to 0, so an all-correct group pushes its likely answers DOWN, and an all-wrong group
    its likely ones UP: there gamma_n sharpens where the policy knows nothing yet.
    log pi_old = -10, -20, -10, -20, r = (1, 1, 0, 0), gamma_p 0.03, gamma_n 0.01:
    smoothed rewards 1.3, 1.6, -0.1, -0.2; minus their mean 0.65: A = 0.65, 0.95, -0.75, -0.85.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    r, log_pi = batch.rewards, _answer_logp(batch, reduction)               # (B,), (B,)
    term = torch.where(r == 1, -gamma_p * log_pi, gamma_n * log_pi)         # (B,) Eq. (4)
    r, term = _grouped(r, group_size), _grouped(term, group_size)           # (B/G, G) each
    advantages = (r + term - (r + term).mean(1, keepdim=True)).flatten()    # differs from GRPO here
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    centred = term - term.mean(1, keepdim=True)        # what of the term is left in the advantages
    ds_ratio = centred.abs().mean() / advantages.abs().mean().clamp(min=EPS)
    stats = _stats(batch, advantages, clipped, ds_ratio=ds_ratio)
    return _aggregate(token_loss, batch.mask, agg), stats


def entropy(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
            clip_low=0.2, clip_high=0.2, beta=0.0, entropy_coef=1e-3, agg="seq_mean"):
    """GRPO with a global entropy bonus (entropy_coef > 0) or penalty (< 0).

    Against GRPO: each token's loss is lowered by entropy_coef * H, on correct and wrong answers
    alike; H is the exact entropy at the sampling temperature. Its form in the advantages, -a log
    pi_old(y|x) added to every A, is diffsmooth with gamma_p = a and gamma_n = -a.
    Traps: `entropy` must have gradient, or the term is a constant; -logp of the samples is not H;
    a coefficient does not carry over from one agg to another.
    Uniform over 4 tokens: H = log 4 = 1.386294, so coefficient 0.001 lowers the loss by 0.001386.
    """
    if entropy is None and entropy_coef:
        raise ValueError("entropy_coef != 0 needs entropy, that of each next-token distribution.")
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
    running mean). With beta > 0 the reward first loses beta * sum_t (old_logp - ref_logp).
    Traps: right for one update a rollout only; dividing by the length is another objective; the
    loss value means nothing.
    A = 1, one token of logp -0.2: loss +0.2, gradient -1.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = _penalised_rewards(batch, beta) - baseline                 # (B,)
    token_loss = -advantages[:, None] * batch.logp                          # (B, T)
    return _aggregate(token_loss, batch.mask, "seq_sum"), _stats(batch, advantages)


def rloo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, beta=0.0):
    """RLOO (arXiv 2402.14740): REINFORCE, the baseline the mean reward of the OTHER answers.

    Against GRPO: leave-one-out mean, no std, no clip, and the answer is one action (its tokens are
    summed, not averaged). A equals G/(G-1) times dr_grpo's.
    Traps: dividing by the length; subtracting the KL after the baseline, not before; G = 1 has no
    others and is refused.
    r = (1, 0, 0, 0): A = 1, -1/3, -1/3, -1/3.
    """
    if group_size < 2:
        raise ValueError(f"rloo compares an answer with the others: group_size {group_size} < 2.")
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
    not by the length. max_len is the generation budget; train.py passes its own. Changing it
    rescales the learning rate.
    Traps: dividing by the padded width, which changes from step to step; doing only one of the two.
    r = (1, 0, 0, 0): A = 0.75, -0.25 three times.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, not {max_len}.")
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    r = _grouped(batch.rewards, group_size)                                 # (B/G, G)
    advantages = (r - r.mean(1, keepdim=True)).flatten()                    # differs from GRPO here
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high)        # (B, T)
    loss = _aggregate(token_loss, batch.mask, "seq_const", max_len)         # and here
    return loss, _stats(batch, advantages, clipped)


def dapo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.28):
    """DAPO (arXiv 2503.14476): clip-higher and the token-level loss.

    Against GRPO: the upper clip is wider, every token of the batch weighs the same, no KL; it is
    grpo(clip_high=0.28, agg="token_mean"). Dynamic sampling, its other half, is a flag of train.py.
    Trap: the mean of micro-batch means is not the mean.
    Ratio 1, lengths 2 and 6, A = +1 and -1: loss (-2 + 6) / 8 = +0.5.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high)        # (B, T)
    loss = _aggregate(token_loss, batch.mask, "token_mean")                 # differs from GRPO here
    return loss, _stats(batch, advantages, clipped)


def gspo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=3e-4, clip_high=4e-4):
    """GSPO (arXiv 2507.18071): one ratio an answer, exp(mean_t(logp - old_logp)), and clip that.

    Against GRPO: the ratio is the geometric mean of the token ratios, hence the far narrower clip;
    a clipped answer has no gradient on any token. At ratio 1 its gradient is GRPO's.
    Traps: a clip of 0.2 never acts here; the product of the token ratios explodes; their mean is
    another number.
    logp - old_logp = 0.1, -0.1, 0.3: ratio e^0.1 = 1.105171.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    lengths = batch.mask.sum(1, keepdim=True).clamp(min=1)                  # (B, 1)
    log_ratio = (batch.logp - batch.old_logp).sum(1, keepdim=True) / lengths        # (B, 1)
    ratio = torch.exp(log_ratio)                                            # differs from GRPO here
    answer_loss, clipped = _clip(ratio, advantages[:, None], clip_low, clip_high)   # (B, 1)
    loss = _aggregate(answer_loss, batch.mask, "seq_mean")                  # the same on each token
    return loss, _stats(batch, advantages, clipped)


def cispo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=1.0, clip_high=4.0):
    """CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE with a clipped importance weight.

        loss = mean over all tokens of -weight A logp
        weight = stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high))

    Against GRPO: the ratio is a constant weight on logp, so clipping never silences a token. The
    clips are distances from 1: 1 and 4 mean weights in [0, 5], the cap of ScaleRL (arXiv
    2510.13786); some libraries take the cap itself. At ratio 1 the gradient is dapo's.
    Traps: a weight that is differentiated; the loss value means nothing.
    A = 1, ratio 10: gradient -5, where PPO's clip leaves 0.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group_advantages(batch.rewards, group_size)                # (B,)
    ratio = torch.exp(batch.logp.detach() - batch.old_logp)                 # (B, T), a constant
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)                       # (B, T)
    capped = ratio != weight                                                # (B, T)
    token_loss = -weight * advantages[:, None] * batch.logp                 # differs from GRPO here
    stats = _stats(batch, advantages, capped_frac=_aggregate(capped, batch.mask, "token_mean"))
    return _aggregate(token_loss, batch.mask, "token_mean"), stats          # and here


def unlikeliness(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                 clip_low=0.2, clip_high=0.2, beta=0.0, rank_coef=0.25, agg="seq_mean"):
    """Unlikeliness reward (arXiv 2506.02355): r (1 - rank_coef rank / G), then as in GRPO.

    Against GRPO: a correct answer earns less the likelier it is. rank is its place in the group,
    wrong answers included, by the mean of old_logp over its tokens: 0 = least likely, ties in row
    order. rank_coef 0 is GRPO; the paper calls it beta.
    Trap: in an all-correct group the std cancels rank_coef, and A is a full-size ranking of noise
    (from -1.53 to 1.53 for G = 8).
    Mean old_logp -0.1, -0.5, -0.3, -0.9, r = (1, 1, 0, 0): ranks 3, 1, 2, 0;
    A = 0.852801, 1.137068, -0.994934, -0.994934.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, min_reward=0)
    likelihood = _grouped(_answer_logp(batch, "mean"), group_size)          # (B/G, G)
    order = likelihood.argsort(dim=1, stable=True)                          # (B/G, G)
    rank = order.argsort(dim=1).flatten()              # (B,) the inverse of a permutation
    r = batch.rewards * (1 - rank_coef * rank / group_size)         # differs from GRPO here only
    advantages = group_advantages(r, group_size)                            # (B,)
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def passk(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=0.2, clip_high=0.2, beta=0.0, k=4, agg="seq_mean"):
    """Pass@k training (arXiv 2508.10751, analytic), the GR-PKPO of the smoothing paper.

    Against GRPO: A is the mean, over all k-subsets that the answer is in, of the subset's best
    reward, normalised over subsets. k = 1 is GRPO. With c correct answers in the group a subset
    holds a correct one with chance 1 - C(G-c, k) / C(G, k), its pass@k.
    Edges: nothing is learnt from c = 0, nor once fewer than k answers are wrong.
    G = 4, k = 2: c = 2 gives 0.447212, -0.447212; c = 1 gives 0.999998, -0.333333.
    """
    _check_k(k, group_size)
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    G, C, counts = group_size, math.comb, range(group_size + 1)
    fail = [C(G - c, k) / C(G, k) for c in counts]     # a subset holds no correct answer
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

        A = k C(G-c, k-1) / C(G-1, k-1)  if correct, 0 otherwise; c correct answers in the group

    Against GRPO: no std, wrong answers weigh nothing, correct ones more when few others are. The
    paper sums its s_i over the group, here rows are averaged, hence A = G s_i. k = 1: A = r.
    Unbiased for one-token answers or agg="seq_sum".
    Traps: losing the factor G; a std afterwards; one more leave-one-out baseline, which biases it.
    G = 4, k = 2: c = 2 gives 4/3, c = 1 gives 2.
    """
    _check_k(k, group_size)
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    G, C, counts = group_size, math.comb, range(group_size + 1)
    values = [k * C(G - c, k - 1) / C(G - 1, k - 1) for c in counts]
    right = _by_number_correct(batch, values)                               # (B,)
    advantages = torch.where(batch.rewards == 1, right, 0)          # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def w_reinforce(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
                clip_low=0.2, clip_high=0.2, beta=0.0, w_pos=0.1, w_neg=1.0, agg="seq_mean"):
    """W-REINFORCE (arXiv 2506.01347): A = w_pos if correct, -w_neg if wrong.

    Against GRPO: no baseline and no std. It is reinforce with the constant baseline
    w_neg / (w_pos + w_neg), times (w_pos + w_neg). w_pos 1, w_neg 0 is the paper's PSR; 0 and 1
    NSR. The authors drop rows of weight zero, here they stay in the denominator.
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

    Against GRPO: divide by the mean, not the std. Its expected gradient is that of the sum of
    pass@j / j, j = 1..G-1, for one-token answers or agg="seq_sum". Rewards must not be negative.
    Traps: a single correct answer gets A = G-1; an all-wrong group stays at 0.
    r = (1, 0, 0, 0): A = 2.999988, -0.999996 three times.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, min_reward=0)
    r = _grouped(batch.rewards, group_size)                                 # (B/G, G)
    mean = r.mean(1, keepdim=True)                                          # (B/G, 1)
    advantages = ((r - mean) / (mean + EPS)).flatten()              # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def ucpo(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
         clip_low=0.2, clip_high=0.2, beta=0.0, tau=0.2, agg="seq_mean"):
    """UCPO (arXiv 2605.00365): a group's positive advantage, shared out in favour of the unlikely.

    Against GRPO: A of each of the c correct answers is multiplied by
    (1 - tau) + tau c (1/q_i) / sum_j (1/q_j), where q is the softmax, over the correct answers, of
    the mean of old_logp over their tokens; the group's total stays. tau 0 is GRPO, so is c <= 1.
    Trap: means over tokens lie close together, so q is almost uniform and the effect small.
    Mean old_logp -0.1, -0.5 of two correct answers: factors 0.960525, 1.039475.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    correct = _grouped(batch.rewards == 1, group_size)                      # (B/G, G)
    likelihood = _grouped(_answer_logp(batch, "mean"), group_size)          # (B/G, G)
    q = torch.where(correct, likelihood, -1e9).softmax(1).clamp(min=1e-6)   # over the correct
    rarity = torch.where(correct, 1 / q, 0)
    share = correct.sum(1, keepdim=True) * rarity / rarity.sum(1, keepdim=True).clamp(min=1)
    factor = torch.where(correct, 1 - tau + tau * share, 1).flatten()       # (B,)
    advantages = group_advantages(batch.rewards, group_size) * factor  # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def focal(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None,
          clip_low=0.2, clip_high=0.2, beta=0.0, focal_gamma=0.5, agg="seq_mean"):
    """F-GRPO (arXiv 2602.06717): A = (1 - c/G)^focal_gamma A_grpo, solved prompts count less.

    Against GRPO: one factor a group, by its number c of correct answers; focal_gamma 0 is GRPO.
    Trap: it also lowers mean |A| (by a third at 0.5, over uniform accuracies), so compare it with
    a GRPO of smaller learning rate.
    r = (1, 1, 0, 0): A = +-0.707105; (1, 0, 0, 0): 1.499997, -0.499999 three times.
    """
    if focal_gamma < 0:
        raise ValueError(f"focal_gamma must not be negative, and is {focal_gamma}.")
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    values = [(1 - c / group_size) ** focal_gamma for c in range(group_size + 1)]
    factor = _by_number_correct(batch, values)                              # (B,)
    advantages = group_advantages(batch.rewards, group_size) * factor  # differs from GRPO here only
    token_loss, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)  # (B, T)
    return _aggregate(token_loss, batch.mask, agg), _stats(batch, advantages, clipped)


def sft(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """Cross-entropy: minus the mean of logp over all tokens.

    Against GRPO: no reward at all; rewards, group_size and old_logp are not looked at. For
    demonstrations, score logp at temperature 1; the stop token is a target.
    logp (-1, -2) and (-3): 2.0; the mean of row means would be 2.25.
    """
    ones = logp.detach().new_ones(len(logp))                                # (B,)
    batch = _prepare(logp, logp, mask, ones, 1, entropy, ref_logp)
    return _aggregate(-batch.logp, batch.mask, "token_mean"), _stats(batch, ones)


def rft(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """Rejection-sampling fine-tuning: cross-entropy on the correct answers, over their tokens.

    Against GRPO: wrong answers are thrown away. With all rewards 1 it is sft. Nothing kept: loss
    0, gradient 0.
    Trap: kept duplicates speed up collapse; dropping them needs token ids, so set their mask rows
    to 0 before.
    logp (-1, -2) correct, (-3) wrong: 1.5.
    """
    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)
    correct = batch.rewards == 1                                            # (B,)
    kept = correct.to(batch.logp)                                           # (B,) 1 or 0
    loss = _aggregate(-batch.logp, batch.mask & correct[:, None], "token_mean")
    return loss, _stats(batch, kept, kept_frac=kept.mean())


# -------------------------------------------------------------------------------- what they share

class _Batch(NamedTuple):
    """The arguments, checked: 0 under mask 0, and only logp and entropy have gradient."""
    logp: torch.Tensor                                 # (B, T)
    old_logp: torch.Tensor                             # (B, T)
    mask: torch.Tensor                                 # (B, T) bool
    rewards: torch.Tensor                              # (B,) in the dtype of logp
    group_size: int
    entropy: Optional[torch.Tensor]                    # (B, T) or None
    ref_logp: Optional[torch.Tensor]                   # (B, T) or None


def _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp,
             min_reward=-math.inf, max_reward=math.inf):
    """Check a loss's arguments, blank the padding, detach what is constant -> _Batch.

    ValueError in one sentence for what cannot be right. NaN on a generated token is let through,
    so that the loss shows it.
    """
    if logp.dim() != 2 or 0 in logp.shape:
        raise ValueError(f"logp must be (rows, tokens), not empty, and is {tuple(logp.shape)}.")
    shape, B = tuple(logp.shape), len(logp)
    others = {"old_logp": old_logp, "mask": mask, "entropy": entropy, "ref_logp": ref_logp}
    for name, x in others.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape} as logp is, and is {tuple(x.shape)}.")
    if rewards.shape != (B,):
        raise ValueError(f"rewards must be {B} numbers, one a row, not {tuple(rewards.shape)}.")
    _grouped(rewards, group_size)                      # raises where these are not whole groups
    generated = mask.bool()
    logp, entropy = _blank_padding(logp, generated), _blank_padding(entropy, generated)
    old_logp = _blank_padding(old_logp.detach(), generated)
    if ref_logp is not None:
        ref_logp = _blank_padding(ref_logp.detach(), generated)
    rewards = rewards.detach().to(logp.dtype)
    complaints = {
        "mask must hold nothing but 0 and 1.": mask != generated,
        "rewards must be finite.": ~rewards.isfinite(),
        f"this loss needs rewards of at least {min_reward}.": rewards < min_reward,
        f"this loss needs rewards of at most {max_reward}: correct means rewards == 1.":
            rewards > max_reward}
    for name, x in {"logp": logp, "old_logp": old_logp, "ref_logp": ref_logp}.items():
        if x is not None:                              # rounding may lift a certain token above 0
            complaints[f"{name} is above 0 on a generated token: not a log-probability."] = x > 1e-4
    found = torch.stack([where.any() for where in complaints.values()]).tolist()   # one GPU sync
    if any(found):
        raise ValueError(list(complaints)[found.index(True)])
    return _Batch(logp, old_logp, generated, rewards, group_size, entropy, ref_logp)


def _blank_padding(x, generated):
    """0 for anything in padding, before exp or products: inf * 0 is NaN, in the gradient too."""
    return None if x is None else torch.where(generated, x, 0)


def _grouped(x, group_size):
    """(B,) -> (B/G, G): a row a prompt."""
    if group_size < 1 or len(x) % group_size:
        raise ValueError(f"group_size {group_size} must be above 0 and divide the {len(x)} rows.")
    return x.reshape(-1, group_size)


def _by_number_correct(batch, values):
    """Each answer's values[c], c = 0..G the number of correct answers in its group -> (B,)."""
    c = _grouped(batch.rewards == 1, batch.group_size).sum(1)               # (B/G,)
    return batch.logp.new_tensor(values)[c].repeat_interleave(batch.group_size)


def _check_k(k, group_size):
    if not 1 <= k <= group_size:
        raise ValueError(f"k = {k} must be between 1 and the group size {group_size}.")


def _answer_logp(batch, reduction):
    """log pi_old(y|x): old_logp summed over an answer's tokens, or their mean -> (B,), constant."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"unknown reduction {reduction!r}: sum or mean.")
    total = batch.old_logp.sum(1)                      # (B,) padding is 0
    return total if reduction == "sum" else total / batch.mask.sum(1).clamp(min=1)


def kl(logp, ref_logp, kind="k3"):
    """KL(pi, ref) a token, estimated from d = logp - ref_logp, tokens drawn from pi -> (B, T).

    k1 = d             for the reward (reinforce, rloo): the right gradient. In a loss its expected
                       gradient is zero.
    k3 = e^-d + d - 1  in a loss (GRPO): never negative, but its gradient is that of the other
                       direction, KL(ref, pi). (d^2 / 2, k2, has the gradient of KL(pi, ref).)

    d = 0.5: k1 0.5, k3 0.106531. d = -0.5: -0.5, 0.148721. No clamp: better seen than hidden.
    """
    if ref_logp is None:
        raise ValueError("a KL term (beta != 0) needs ref_logp, that of the reference model.")
    d = logp - ref_logp                                # (B, T)
    if kind == "k1":
        return d
    if kind == "k3":
        return torch.expm1(-d) + d                     # exp(-d) - 1 loses all digits of a small d
    raise ValueError(f"unknown KL estimator {kind!r}: k1 or k3.")


def _penalised_rewards(batch, beta):
    """Rewards minus beta times the answer's k1, a constant -> (B,)."""
    if not beta:
        return batch.rewards
    return batch.rewards - beta * kl(batch.old_logp, batch.ref_logp, "k1").sum(1)


def _surrogate(batch, advantages, clip_low, clip_high, beta=0.0):
    """GRPO's token loss for any advantages (B, T), and (B, T) where the clip cut the gradient."""
    ratio = torch.exp(batch.logp - batch.old_logp)                          # (B, T)
    token_loss, clipped = _clip(ratio, advantages[:, None], clip_low, clip_high)
    if beta:
        token_loss = token_loss + beta * kl(batch.logp, batch.ref_logp)
    return token_loss, clipped


def _clip(ratio, advantages, clip_low, clip_high):
    """PPO's clip: a loss, and where it has no gradient left; both as ratio is, (B, T) or (B, 1).

    Ratio 1.5, clips 0.2: A = +1 gives -1.2 and no gradient, A = -1 gives +1.5 with gradient. The
    min takes the worse of the two: what has moved far enough gains nothing by moving on.
    """
    unclipped = ratio * advantages
    loss = -torch.min(unclipped, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    too_high = (advantages > 0) & (ratio > 1 + clip_high)
    too_low = (advantages < 0) & (ratio < 1 - clip_low)
    return loss, too_high | too_low


def _aggregate(token_loss, mask, agg, max_len=None):
    """Token losses (B, T) -> the loss, a scalar. This is half of a method:

                                                               lengths 2 and 6, token losses -1, +1
        seq_mean    mean over answers of the mean over their tokens          (-1 + 1) / 2 =  0
        token_mean  mean over all tokens of the batch                        (-2 + 6) / 8 = +0.5
        seq_sum     mean over answers of the sum over their tokens           (-2 + 6) / 2 = +2
        seq_const   seq_sum divided by max_len, a fixed number; here 10                   = +0.2

    Rows without a token count nowhere; no token at all gives 0.
    """
    token_loss = torch.where(mask, token_loss, 0)      # (B, T), of a (B, 1) token_loss too
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


@torch.no_grad()
def _stats(batch, advantages, clipped=None, **more):
    """The numbers beside the loss, a dict of floats.

    adv_abs    mean |A|
    ratio_max  largest exp(logp - old_logp) of a token
    clip_frac  share of tokens whose gradient the clip took away; `clipped` (B, T) or (B, 1)
    kl_old     KL(old policy, current policy) a token, by k3
    kl         KL(current policy, reference) a token, by k3; only with ref_logp
    entropy    mean over tokens; only with entropy
    and what the loss adds as 0-dim tensors in `more`: ds_ratio = mean |smoothing term| / mean |A|,
    kept_frac = share of rows kept, capped_frac = share of tokens with a clipped weight.
    """
    mask, log_ratio = batch.mask, batch.logp - batch.old_logp               # (B, T) each
    each_token = {"clip_frac": torch.zeros_like(mask) if clipped is None else clipped,
                  "kl_old": kl(batch.old_logp, batch.logp)}                 # old drew the tokens
    if batch.ref_logp is not None:
        each_token["kl"] = kl(batch.logp, batch.ref_logp)
    if batch.entropy is not None:
        each_token["entropy"] = batch.entropy
    values = {"adv_abs": advantages.abs().mean(),
              "ratio_max": torch.where(mask, log_ratio, -math.inf).amax().exp()}
    values |= {name: _aggregate(x, mask, "token_mean") for name, x in each_token.items()} | more
    numbers = torch.stack([x.detach().to(log_ratio.dtype) for x in values.values()])
    return dict(zip(values, numbers.tolist()))         # one GPU sync for all
