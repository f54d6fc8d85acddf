"""An autograder for losses.py, ours or yours.

    pytest tests/test_losses.py                       # grades losses.py, all of it
    IMPL=my_losses pytest tests/test_losses.py -m core -k "[grpo"   # your grpo: the mathematics
    IMPL=my_losses pytest tests/test_losses.py -m care -k "[grpo"   # then: real batches

IMPL names a module on sys.path or in the current folder. Nothing falls back to ours: a function
that is missing fails its own tests by name and no others. Every test is marked

    core    the mathematics of one function, on float64 batches without any trap: no NaN in the
            padding, no empty row, rewards 0 or 1 (unless the test is about another), and stats may
            be an empty dict
    care    what real batches need besides: padding, empty rows and masks, dtypes, errors in words,
            stats

and its id begins with the function that it grades, in a bracket: -k "[grpo" selects grpo and not
dr_grpo, and -k "[diffsmooth and not reward" selects diffsmooth alone. No core test of one function
calls another one of yours. A failure is a sentence that says what is wrong. If the numbers are
those of a well-known bug, it names the bug: `oracle` is a second implementation, in plain Python
lists and loops, that can also make each of the `mistakes`. "Or:" separates bugs that give the same
numbers in that one test.

There are four kinds of test: worked numbers that can be redone on paper; comparison with the
oracle, on a ragged random batch, token by token; exact expected gradients, summed over every
possible group of a softmax policy; and properties: what must change nothing, and what must change
something. tests/mutants.py puts each well-known bug into losses.py and checks that a test fails.

A case is followed through two helpers: `check_batch` or `check_advantages`, then `run`.
"""
import importlib
import inspect
import itertools
import math
import os
import sys
from typing import NamedTuple

import pytest
import torch

IMPL = os.environ.get("IMPL", "losses")
F64 = torch.float64
NAN, INF = float("nan"), float("inf")

sys.path.insert(0, os.getcwd())
MODULE = importlib.import_module(IMPL)


class Implementation:
    """`L.grpo` is the function under test; a missing one fails the test that asks for it."""

    def __getattr__(self, name):
        if name.startswith("__"):                      # pytest looking around
            raise AttributeError(name)
        if not callable(getattr(MODULE, name, None)):
            pytest.fail(f"{IMPL} has no function '{name}'", pytrace=False)
        return getattr(MODULE, name)


L = Implementation()
core, care = pytest.mark.core, pytest.mark.care

# Every loss with settings that leave nothing to a default that may be tuned to the task.
DS = dict(reduction="sum", gamma_p=0.03, gamma_n=0.01)
ALL = {"reinforce": {}, "rloo": {}, "grpo": {}, "dr_grpo": dict(max_len=10), "dapo": {}, "gspo": {},
       "cispo": {}, "entropy": dict(entropy_coef=0.05), "diffsmooth": dict(DS, agg="seq_mean"),
       "diffsmooth_reward": dict(DS, agg="token_mean"), "unlikeliness": {}, "passk": dict(k=2),
       "pkpo": dict(k=2), "w_reinforce": {}, "maxrl": {}, "ucpo": {}, "focal": {}, "sft": {},
       "rft": {}}
# These take clip_low, clip_high, beta and agg.
CLIPPED = ["grpo", "entropy", "diffsmooth", "diffsmooth_reward", "unlikeliness", "passk", "pkpo",
           "w_reinforce", "maxrl", "ucpo", "focal"]
# What the others use, if it is not seq_mean.
AGGREGATOR = {"reinforce": "seq_sum", "rloo": "seq_sum", "dr_grpo": "seq_const",
              "dapo": "token_mean", "cispo": "token_mean", "sft": "token_mean", "rft": "token_mean"}
RL = [name for name in ALL if name not in ("sft", "rft")]
CORRECT_IS_ONE = ["diffsmooth", "diffsmooth_reward", "passk", "pkpo", "w_reinforce", "ucpo",
                  "focal", "rft"]
DEFAULTS = {"reinforce": dict(baseline=0, beta=0), "rloo": dict(beta=0), "grpo": {},
            "dr_grpo": dict(clip_low=.2, clip_high=.2, max_len=512),
            "dapo": dict(clip_low=.2, clip_high=.28), "gspo": dict(clip_low=3e-4, clip_high=4e-4),
            "cispo": dict(clip_low=1, clip_high=4), "entropy": dict(entropy_coef=1e-3),
            "diffsmooth": {}, "diffsmooth_reward": {}, "unlikeliness": dict(rank_coef=.25),
            "passk": dict(k=4), "pkpo": dict(k=4), "w_reinforce": dict(w_pos=.1, w_neg=1),
            "maxrl": {}, "ucpo": dict(tau=.2), "focal": dict(focal_gamma=.5)}


def of(*names):
    """The test's argument `name`, which begins its id: the function or functions that it grades."""
    return pytest.mark.parametrize("name", names)


def cases(arguments, rows):
    """A table of cases; its first two columns are the id, of which the first is the function."""
    def said(x):
        if isinstance(x, dict):
            return ",".join(f"{k}={v}" for k, v in x.items()) or "defaults"
        return str(x).replace(" ", "")
    return pytest.mark.parametrize(arguments, rows,
                                   ids=[f"{row[0]}-{said(row[1])}" for row in rows])


every = of(*ALL)


# -------------------------------------------------------------------------------------------- tools

def tensor(values):
    return torch.tensor(values, dtype=F64)


def column(values):
    """One-token answers: (B,) numbers -> (B, 1)."""
    return tensor(values)[:, None]


def near(actual, expected, atol=1e-7, rtol=1e-5):
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=rtol, atol=atol)


def shown(x):
    many = x.numel() > 8                               # if so, show a few, to fit on a screen
    numbers = ", ".join(f"{v:.7g}" if abs(v) > 1e-12 else "0"
                        for v in x.flatten()[:4 if many else 8].tolist())
    numbers += ", ..." if many else ""
    return numbers if x.dim() == 0 else f"[{numbers}]"


def check(what, actual, expected, atol=1e-7, rtol=1e-5, bugs=None):
    """Numbers agree, or the test fails in words. bugs: {mistake: its number}, or a call for it."""
    __tracebackhide__ = True
    actual, expected = (torch.as_tensor(x, dtype=F64).detach() for x in (actual, expected))
    if near(actual, expected, atol, rtol):
        return
    bugs = bugs() if callable(bugs) else bugs or {}
    guess = [bug for bug, number in bugs.items()
             if near(actual, torch.as_tensor(number, dtype=F64), max(atol, 1e-7), max(rtol, 1e-5))]
    hint = f" This is what you get with: {', or: '.join(guess)}." if guess else ""
    pytest.fail(f"{what}: it should be {shown(expected)}, but is {shown(actual)}.{hint}",
                pytrace=False)


def claim(holds, sentence):
    """An assertion whose failure is one sentence and no traceback."""
    __tracebackhide__ = True
    if not holds:
        pytest.fail(sentence, pytrace=False)


class Stats(dict):
    """A number that is not there fails the test that asks for it, and no other."""

    def __missing__(self, key):
        pytest.fail(f"stats lacks '{key}'", pytrace=False)


class Batch(NamedTuple):
    """The arguments of a loss, in its order."""
    logp: torch.Tensor                                 # (B, T)
    old_logp: torch.Tensor                             # (B, T)
    mask: torch.Tensor                                 # (B, T)
    rewards: torch.Tensor                              # (B,)
    G: int                                             # group_size
    entropy: torch.Tensor                              # (B, T), or None
    ref_logp: torch.Tensor                             # (B, T), or None


def make_batch(rewards, G, old_logp=None, mask=None, **more):
    """A batch with logp = old_logp; without old_logp, answers are one token with logp -.7."""
    rewards = tensor(rewards) if isinstance(rewards, (list, tuple)) else rewards
    old_logp = column([-0.7] * len(rewards)) if old_logp is None else old_logp
    mask = torch.ones(old_logp.shape, dtype=torch.bool) if mask is None else mask.bool()
    given = dict(logp=old_logp, entropy=torch.zeros_like(old_logp), ref_logp=old_logp) | more
    return Batch(old_logp=old_logp, mask=mask, rewards=rewards, G=G, **given)


def run(name, batch, **options):
    """Call loss `name` -> (loss, d loss / d logp (B, T), stats), all detached."""
    __tracebackhide__ = True
    leaf = batch.logp.detach().clone().requires_grad_()
    result = getattr(L, name)(leaf, batch.old_logp, batch.mask, batch.rewards, batch.G,
                              entropy=batch.entropy, ref_logp=batch.ref_logp, **options)
    claim(isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict),
          f"{name} must return a pair, (loss, stats); an empty dict will do as stats here.")
    loss, stats = result
    claim(isinstance(loss, torch.Tensor) and loss.dim() == 0 and loss.requires_grad,
          f"{name}: the loss must be a 0-dim tensor that depends on logp, even where it is 0, for "
          "backward() to work.")
    gradient, = torch.autograd.grad(loss, leaf, allow_unused=True)
    claim(gradient is not None, f"{name}: the loss does not depend on logp, so nothing is learnt.")
    return loss.detach(), gradient, Stats(stats)


def advantages(name, batch, **options):
    """A (B,), read off the gradient on-policy: -A_i / B per row, for one token or seq_mean."""
    __tracebackhide__ = True
    return -run(name, batch, **options)[1].sum(1) * len(batch.rewards)


def check_advantages(what, name, batch, expected, atol=6e-7, rtol=1e-5, **options):
    """Advantages against worked numbers; a failure names the mistakes that give those seen."""
    __tracebackhide__ = True
    A = -run(name, batch, **options)[1].sum(1) * len(batch.rewards)
    check(what, A, expected, atol, rtol,
          lambda: {bug: -tensor(gradient).sum(1) * len(batch.rewards)
                   for bug, (_, gradient) in mistakes(name, options, batch).items()})


def settings(name, **more):
    """A loss's settings of ALL with some changed; dr_grpo divides by 1, for one-token answers."""
    return dict(ALL[name], **({"max_len": 1} if name == "dr_grpo" else {}), **more)


# ------------------------------------------------------------------------------------ three batches

def draw(seed, scale):
    return torch.randn(20, 7, dtype=F64, generator=torch.Generator().manual_seed(seed)) * scale


def with_nan_padding(batch):
    blank = torch.where(batch.mask, 0, NAN)
    fields = {key: getattr(batch, key) + blank
              for key in ("logp", "old_logp", "ref_logp", "entropy")}
    return batch._replace(**fields)


def worked_batch():
    """Eight answers of 1 to 3 tokens in two groups, for paper. Padding repeats its row's numbers.

    row               1    2    3           4    5    6    7    8
    reward            1    1    0           0    1    0    0    0
    old_logp         -.5  -1   -.75        -2   -1.5 -.5  -1   -.25    on each token
    logp - old_logp   .3  -.1   .1 -.1 .3  -.3   .05  .4  -.4   0
    entropy          1.2  1.2  1.2        1.2    .4   .4   .4   .4     ref_logp = old_logp - .2
    """
    wide = lambda values: column(values).repeat(1, 3)
    shift = wide([.3, -.1, 0, -.3, .05, .4, -.4, 0])
    shift[2] = tensor([.1, -.1, .3])
    old = wide([-.5, -1, -.75, -2, -1.5, -.5, -1, -.25])
    mask = torch.arange(3) < torch.tensor([1, 2, 3, 2, 3, 2, 1, 3])[:, None]
    return make_batch([1, 1, 0, 0, 1, 0, 0, 0], 4, old, mask, logp=old + shift, ref_logp=old - .2,
                      entropy=wide([1.2] * 4 + [.4] * 4))


def ragged_batch(rough=False):
    """Five groups of G = 4, T = 7: two mixed, one all correct, one all wrong, one mixed.

    rough: an empty row, a format reward of 0.1, and NaN in the padding.
    """
    lengths = torch.tensor([3, 7, 1, 5, 2, 4, 6, 1, 5, 2,
                            7, 3, 4, 1, 6, 2, 7, 0 if rough else 2, 3, 5])
    rewards = tensor([1, 0, 0, 1, 1, .1 if rough else 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1])
    old = -1.5 - draw(1, .5).abs()
    batch = make_batch(rewards, 4, old, torch.arange(7) < lengths[:, None], logp=old + draw(2, .35),
                       ref_logp=old + draw(3, .2), entropy=1 + draw(4, .2).abs())
    return with_nan_padding(batch) if rough else batch


WORKED, RAGGED, ROUGH = worked_batch(), ragged_batch(), ragged_batch(rough=True)
WORKED_NAN = with_nan_padding(WORKED)


# -------------------------------------------------------------- a second implementation: the oracle

def normalised(r, everyone=(), bug=None):
    """Eq. (5) for one group, in plain Python; everyone: all rewards, for the bugs that use them."""
    if max(r) == min(r) and bug != "mean and std over the batch":
        return [0.0] * len(r)
    centre = everyone if bug == "mean and std over the batch" else r
    mean = sum(centre) / len(centre)
    spread = everyone if bug == "std over the batch instead of the group" else centre
    middle, ddof = sum(spread) / len(spread), 1 if bug == "std with ddof 1" else 0
    std = math.sqrt(sum((x - middle) ** 2 for x in spread) / (len(spread) - ddof))
    return [(x - mean) / (std + 1e-6) for x in r]


def oracle_advantages(name, r, S, n, o, everyone=(), bug=None):
    """One group. r rewards, S summed old log-probabilities, n their divisors (the lengths), o
    options; bug: a mistake to make."""
    G, M = len(r), [s / max(length, 1) for s, length in zip(S, n)]
    good = [x > 0 if bug == "correct read as r > 0" else x == 1 for x in r]
    c, mean = sum(good), sum(r) / len(r)
    grpo = normalised(r, everyone, bug)
    if bug == "GRPO's advantages, its own idea missing":
        return grpo
    subsets = list(itertools.combinations(range(G), o["k"])) if name in ("passk", "pkpo") else []
    best = lambda members: max([float(good[j]) for j in members], default=0.0)
    if name == "reinforce":
        return [x - o.get("baseline", 0) for x in r]
    if name == "rloo":
        if bug == "the answer's own reward in its baseline":
            return [x - mean for x in r]
        return [x - (sum(r) - x) / (G - 1) for x in r]
    if name == "dr_grpo":
        return [x - mean for x in r]
    if name in ("diffsmooth", "diffsmooth_reward"):
        term = [(-o["gamma_p"] if g else o["gamma_n"]) * x
                for g, x in zip(good, S if o["reduction"] == "sum" else M)]
        smoothed = [x + t for x, t in zip(r, term)]
        if name == "diffsmooth":
            if bug == "the smoothing term added before normalisation":
                return normalised(smoothed)
            return [a + t for a, t in zip(grpo, term)]
        if bug == "the reward's mean taken off without the smoothing term":
            return [x - mean for x in smoothed]
        if bug == "divided by the std":
            return normalised(smoothed)
        return [x - sum(smoothed) / G for x in smoothed]
    if name == "unlikeliness":
        by = S if bug == "ranks by the sum of log-probabilities" else M
        order = sorted(range(G), key=lambda i: by[i])  # Python sorts stably
        rank = [order.index(i) for i in range(G)]
        if bug == "the sorting order (one argsort) for the rank":
            rank = order
        if bug == "ranks the other way round (0 = most likely)":
            rank = [G - 1 - x for x in rank]
        return normalised([x * (1 - o.get("rank_coef", .25) * k / G) for x, k in zip(r, rank)],
                          everyone, bug)
    if name == "passk":
        R = [best(s) for s in subsets]
        mean = sum(R) / len(R)
        std = math.sqrt(sum((x - mean) ** 2 for x in R) / len(R))
        mine = lambda i: [(x - mean) / (std + 1e-6) for x, s in zip(R, subsets) if i in s]
        return [sum(mine(i)) / len(mine(i)) for i in range(G)]
    if name == "pkpo":
        def s(i):
            others = list(itertools.combinations([j for j in range(G) if j != i], o["k"] - 1))
            with_me = sum(best(x) for x in subsets if i in x) / len(subsets)
            return with_me - o["k"] / G * sum(best(x) for x in others) / len(others)
        factor = {"the factor G is lost": 1, "the factor k is lost": G / o["k"]}.get(bug, G)
        return [factor * s(i) for i in range(G)]
    if name == "w_reinforce":
        return [o.get("w_pos", .1) if g else -o.get("w_neg", 1) for g in good]
    if name == "maxrl":
        return [(x - mean) / (mean + 1e-6) for x in r]
    if name == "ucpo":
        if c == 0:
            return grpo
        M = S if bug == "the likelihood q from the sum of log-probabilities" else M
        z = sum(math.exp(m) for m, g in zip(M, good) if g)
        rare = [1 / max(math.exp(m) / z, 1e-6) if g else 0 for m, g in zip(M, good)]
        tau = o.get("tau", .2)
        return [a * (1 - tau + tau * c * x / sum(rare)) if g else a
                for a, x, g in zip(grpo, rare, good)]
    if name == "focal":
        p = 1 - c / G if bug == "p for 1 - p" else c / G
        return [(1 - p) ** o.get("focal_gamma", .5) * a for a in grpo]
    return grpo


def oracle(name, o, batch, bug=None):
    """Loss and gradient of a batch, token by token; bug: one of `BUGS`, a mistake to make."""
    tensors = batch._replace(G=torch.tensor(batch.G))
    logp, old, mask, r, G, H, ref = (x.tolist() for x in tensors)
    o = dict(DEFAULTS.get(name, {}), **o)
    B, T, beta = len(r), len(mask[0]), o.get("beta", 0)
    if bug == "the stop token left out of the mask":
        mask = [[on and any(row[t + 1:]) for t, on in enumerate(row)] for row in mask]
    tokens = [[t for t in range(T) if row[t] or bug == "padding counted like tokens"]
              for row in mask]
    n = [len(ts) for ts in tokens]
    source = logp if bug == "logp for old_logp in log pi" else old
    summed = [range(T)] * B if bug == "log pi summed over padding too" else tokens
    S = [sum(source[i][t] for t in summed[i]) for i in range(B)]
    if name in ("reinforce", "rloo"):
        r = [r[i] - beta * sum(old[i][t] - ref[i][t] for t in tokens[i]) for i in range(B)]
    groups = [[*range(g, g + G)] for g in range(0, B, G)]
    if bug == "groups interleaved, where a prompt's rows are neighbours":
        groups = [[*range(g, B, B // G)] for g in range(B // G)]
    A = [0.0] * B
    for rows in groups:
        divisors = [T if bug == "the mean of log pi over the padded width" else n[i] for i in rows]
        group = [r[i] for i in rows], [S[i] for i in rows], divisors
        for i, a in zip(rows, oracle_advantages(name, *group, o, r, bug)):
            A[i] = a
    kept = [name != "rft" or x == 1 or (bug == "correct read as r > 0" and x > 0) for x in r]
    used = [i for i in range(B) if n[i] > 0 and kept[i]]
    counted = sum(n) if bug == "divided by all tokens" else sum(n[i] for i in used)
    agg = o.get("agg", AGGREGATOR.get(name, "seq_mean"))
    low, high = 1 - o.get("clip_low", .2), 1 + o.get("clip_high", .2)
    loss, gradient = 0.0, [[0.0] * T for _ in range(B)]
    for i in used:
        weight = {"seq_mean": 1 / len(used) / n[i], "token_mean": 1 / counted,
                  "seq_sum": 1 / len(used), "seq_const": 1 / len(used) / o.get("max_len", 1)}[agg]
        if bug == "divided by the padded width":
            weight = 1 / len(used) / T
        log_ratio = [logp[i][t] - old[i][t] for t in tokens[i]]
        mean_ratio = math.exp(sum(log_ratio) / n[i])
        if bug == "mean of the token ratios":
            mean_ratio = sum(map(math.exp, log_ratio)) / n[i]
        if bug == "product of the token ratios":
            mean_ratio = math.exp(sum(log_ratio))
        for t in tokens[i]:
            ratio = mean_ratio if name == "gspo" else math.exp(logp[i][t] - old[i][t])
            ratio = 1 / ratio if bug == "the ratio upside down" else ratio
            inside = min(max(ratio, low), high)
            if name in ("sft", "rft"):
                l, slope = -logp[i][t], -1.0
            elif name in ("reinforce", "rloo"):
                l, slope = -A[i] * logp[i][t], -A[i]
            elif name == "cispo":
                leaks = bug == "a weight that is not detached" and inside == ratio
                leak = ratio * logp[i][t] if leaks else 0
                l, slope = -inside * A[i] * logp[i][t], -(inside + leak) * A[i]
            else:
                pick = max if bug == "the clip on the wrong side: max for min" else min
                if bug == "the clip whatever the sign of A":
                    pick = lambda free, clipped: clipped
                l = -pick(ratio * A[i], inside * A[i])
                cut = l == -inside * A[i] and inside != ratio
                slope = 0.0 if cut else -ratio * A[i]
                if bug == "the ratio upside down":
                    slope = -slope
                if beta:
                    d = logp[i][t] - ref[i][t]
                    wrong = {"the KL by k1": (d, 1), "the KL by k2": (d * d / 2, d),
                             "the KL's direction flipped": (math.exp(d) - d - 1, math.exp(d) - 1)}
                    value, its_slope = wrong.get(bug, (math.exp(-d) + d - 1, 1 - math.exp(-d)))
                    l, slope = l + beta * value, slope + beta * its_slope
                if name == "entropy":
                    l -= o["entropy_coef"] * H[i][t]
            if bug == "the sign of the loss flipped":
                l, slope = -l, -slope
            loss, gradient[i][t] = loss + weight * l, slope * weight
    return loss, gradient


BUGS = ["std with ddof 1", "std over the batch instead of the group", "mean and std over the batch",
        "groups interleaved, where a prompt's rows are neighbours", "correct read as r > 0",
        "the sign of the loss flipped", "the clip on the wrong side: max for min",
        "the clip whatever the sign of A", "the ratio upside down",
        "the stop token left out of the mask", "padding counted like tokens",
        "divided by the padded width", "the smoothing term added before normalisation",
        "logp for old_logp in log pi", "log pi summed over padding too",
        "the mean of log pi over the padded width",
        "the reward's mean taken off without the smoothing term", "divided by the std",
        "the KL by k1", "the KL by k2", "the KL's direction flipped",
        "the answer's own reward in its baseline", "GRPO's advantages, its own idea missing",
        "mean of the token ratios", "product of the token ratios", "a weight that is not detached",
        "ranks by the sum of log-probabilities", "ranks the other way round (0 = most likely)",
        "the sorting order (one argsort) for the rank",
        "the likelihood q from the sum of log-probabilities", "p for 1 - p", "the factor G is lost",
        "the factor k is lost", "divided by all tokens"]


def other_options(name, o):
    """{a mistake: the options that it amounts to}."""
    o = dict(DEFAULTS.get(name, {}), **o)
    agg = o.get("agg", AGGREGATOR.get(name, "seq_mean"))
    low, high = o.get("clip_low", .2), o.get("clip_high", .2)
    found = {"no clip": dict(clip_low=INF, clip_high=INF),
             "only the upper bound clipped": dict(clip_low=INF),
             "only the lower bound clipped": dict(clip_high=INF),
             "clip_low and clip_high swapped": dict(clip_low=high, clip_high=low)}
    if name == "dapo":
        found["GRPO's upper clip, 0.2"] = dict(clip_high=.2)
    if name == "gspo":
        found["GRPO's clips, 0.2"] = dict(clip_low=.2, clip_high=.2)
    if name == "grpo":
        found["DAPO's upper clip, 0.28"] = dict(clip_high=.28)
    if name == "cispo":
        found |= {"clip_high read as the cap itself": dict(clip_high=high - 1),
                  "a floor of 0.8": dict(clip_low=.2)}
    if agg != "token_mean":
        found["mean over tokens instead of mean over answers (token_mean)"] = dict(agg="token_mean")
    if agg != "seq_mean":
        found["mean over answers of the mean over their tokens (seq_mean)"] = dict(agg="seq_mean")
    if agg != "seq_sum":
        bug = "sum over an answer's tokens, not divided by its length (seq_sum)"
        found[bug] = dict(agg="seq_sum")
    if "gamma_p" in o:
        p, n = o["gamma_p"], o["gamma_n"]
        exchanged = "mean" if o["reduction"] == "sum" else "sum"
        found |= {"gammas swapped": dict(gamma_p=n, gamma_n=p),
                  "sign of gamma_p flipped": dict(gamma_p=-p),
                  "sign of gamma_n flipped": dict(gamma_n=-n),
                  "signs of both gammas flipped": dict(gamma_p=-p, gamma_n=-n),
                  "a smoothing term that is silently zero": dict(gamma_p=0, gamma_n=0),
                  "mean and sum over tokens exchanged in log pi": dict(reduction=exchanged)}
    if o.get("beta"):
        found |= {"the KL term missing": dict(beta=0),
                  "the sign of the KL term flipped": dict(beta=-o["beta"])}
    if o.get("entropy_coef"):
        found |= {"the entropy term missing": dict(entropy_coef=0),
                  "the sign of the entropy term flipped": dict(entropy_coef=-o["entropy_coef"])}
    if "k" in o:
        found["k ignored"] = dict(k=1)
    if "w_neg" in o:
        found["the sign of w_neg flipped"] = dict(w_neg=-o["w_neg"])
    return found


def mistakes(name, options, batch):
    """{a well-known bug: (loss, gradient) that it gives}, for those that change anything here."""
    correct = oracle(name, options, batch)
    made = {bug: oracle(name, dict(options, **changed), batch)
            for bug, changed in other_options(name, options).items()}
    made |= {bug: oracle(name, options, batch, bug) for bug in BUGS}
    return {bug: result for bug, result in made.items() if result != correct}


def check_batch(what, name, batch, expected, expected_gradient=None, atol=1e-7, rtol=1e-5,
                **options):
    """Loss and gradient of a batch, token by token; a failure names the bugs that give the same."""
    __tracebackhide__ = True
    loss, gradient, _ = run(name, batch, **options)
    correct = oracle(name, options, batch)
    expected_gradient = correct[1] if expected_gradient is None else expected_gradient
    right_loss = near(loss, tensor(expected), atol, rtol)
    right_gradient = near(gradient, tensor(expected_gradient), 1e-7, 1e-5)
    if right_loss and right_gradient:
        return
    made = mistakes(name, options, batch)

    def with_same(i, actual):
        """The mistakes that give this loss (i = 0) or this gradient (i = 1), and change it."""
        return {bug for bug, wrong in made.items() if near(actual, tensor(wrong[i]))
                and not near(tensor(wrong[i]), tensor(correct[i]))}
    same_loss, same_gradient = with_same(0, loss), with_same(1, gradient)
    guess = same_loss & same_gradient or same_gradient or same_loss
    if right_gradient:                                 # only the value is wrong
        guess = same_loss
    guess = [bug for bug in made if bug in guess]      # in the order of the list
    check(f"{what}: loss", loss, expected, atol, rtol, dict.fromkeys(guess, loss))
    check(f"{what}: gradient, token by token", gradient, expected_gradient,
          bugs=dict.fromkeys(guess, gradient))


# ================================================================================= core: the pieces

@core
@pytest.mark.parametrize("rewards, G, expected", [
    ([1, 1, 0, 0], 4, [.999998, .999998, -.999998, -.999998]),
    ([1, 0, 0, 0], 4, [1.732047] + [-.577349] * 3),
    ([1, 1, 0, 0, 1, 0, 0, 0], 4, [.999998] * 2 + [-.999998] * 2 + [1.732047] + [-.577349] * 3),
    ([3, 1, 2, 2], 2, [.999999, -.999999, 0, 0])])
@of("group_advantages")
def test_normalised_rewards(name, rewards, G, expected):
    """(1, 0, 0, 0): mean .25, population std .4330: .75/.433014 = 1.732047, -.577349.

    With ddof 1 it would be 1.5, -.5.
    """
    P, groups = len(rewards) // G, [rewards[i:i + G] for i in range(0, len(rewards), G)]
    bugs = {bug: [a for r in groups for a in normalised(r, rewards, bug)] for bug in BUGS[:3]}
    bugs["the std missing"] = [x - sum(r) / G for r in groups for x in r]
    interleaved = [normalised(rewards[i::P]) for i in range(P)]
    bugs[BUGS[3]] = tensor(interleaved).T.flatten()
    check(f"group_advantages of {rewards} in groups of {G}", L.group_advantages(tensor(rewards), G),
          expected, 6e-7, bugs=bugs)


@core
@pytest.mark.parametrize("c", range(1, 8))
@of("group_advantages")
def test_normalised_correct_or_wrong(name, c):
    """p correct in general: +sqrt((1-p)/p) and -sqrt(p/(1-p)), mean |A| = 2 sqrt(p(1-p))."""
    a, p = L.group_advantages(tensor([1] * c + [0] * (8 - c)), 8), c / 8
    expected = [math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p))]
    check(f"group_advantages, {c} of 8 correct", a[[0, 7]], expected, rtol=1e-5,
          bugs={"std with ddof 1": [x * math.sqrt(7 / 8) for x in expected]})
    check(f"mean |A|, {c} of 8 correct", a.abs().mean(), 2 * math.sqrt(p * (1 - p)), rtol=1e-5)


@core
@of("kl")
def test_kl_values(name):
    """d = +.5: k1 .5, k3 e^-.5 + .5 - 1 = .106531. d = -.5: -.5, e^.5 - .5 - 1 = .148721."""
    logp, ref = tensor([[-1.0, -1.5]]), tensor([[-1.5, -1.0]])
    check("kl k1 (d = logp - ref_logp)", L.kl(logp, ref, "k1"), [[.5, -.5]],
          bugs={"d with the wrong sign": [[-.5, .5]]})
    check("kl k3", L.kl(logp, ref, "k3"), [[.106531, .148721]], 6e-7,
          bugs={"d with the wrong sign": [[.148721, .106531]], "k2": [[.125, .125]]})
    check("kl without a kind is k3", L.kl(logp, ref), [[.106531, .148721]], 6e-7)


@core
@of("kl")
def test_slope_of_k3(name):
    """d k3 / d logp = 1 - e^-d: +.393469 at d = .5, -.648721 at d = -.5; at d = 0 it is 0."""
    logp = tensor([[-1.0, -1.5, -1.0]]).requires_grad_()
    g, = torch.autograd.grad(L.kl(logp, tensor([[-1.5, -1.0, -1.0]])).sum(), logp)
    check("slope of k3 at d = .5, -.5, 0", g, [[.393469, -.648721, 0]], 6e-7,
          bugs={"k2": [[.5, -.5, 0]], "d with the wrong sign": [[.648721, -.393469, 0]]})


PI, REF = tensor([.7, .2, .1]), tensor([.5, .25, .25])


@core
@pytest.mark.parametrize("kind, value, slope",
                         [("k1", .099273, (0, 0, 0)), ("k3", .099273, (.2, -.05, -.15))])
@of("kl")
def test_kl_in_expectation(name, kind, value, slope):
    """pi = (.7, .2, .1), ref = (.5, .25, .25), exactly: E k1 = E k3 = KL(pi, ref) = .099273.

    Expected gradient as a loss, in the logits: k1 zero, k3 pi - ref, that of KL(ref, pi).
    """
    logits = PI.log().requires_grad_()
    estimate = L.kl(logits.log_softmax(0)[None], REF.log()[None], kind)[0]
    check(f"expected {kind}", (PI * estimate).sum(), value, 6e-7,
          bugs={"the direction flipped, e^d - d - 1": .080727, "KL(ref, pi)": .116622,
                "k2": .086583})
    g, = torch.autograd.grad((PI * estimate).sum(), logits)
    check(f"expected gradient of {kind} in the logits", g, slope, 6e-6,
          bugs={"k2": [.16604, -.06448, -.10156]})


# ============================================================= core: the batch of eight, end to end

# label: (options, on-policy loss, loss, d loss / d logp summed over each row x 1000)
WORKED_NUMBERS = {
    "reinforce": ({}, .875, .843750, (-125, -250, 0, 0, -375, 0, 0, 0)),
    "rloo": ({}, .135417, .100000, (-83.33, -166.67, 250, 166.67, -375, 83.33, 41.67, 125)),
    "rloo, beta .04": (dict(beta=.04), .129833, .094967,
                       (-84.67, -166.67, 254, 166.67, -372, 82.67, 40, 128)),
    "grpo": ({}, 0, -.013150, (0, -113.10, 139.99, 0, -227.61, 107.66, 0, 72.17)),
    "grpo, beta .04": (dict(beta=.04), .000749, -.011225,
                       (1.97, -112.63, 141.24, -.53, -226.50, 109.92, -1.11, 73.07)),
    "dr_grpo": (dict(max_len=10), .003125, .003821, (0, -11.31, 21.00, 0, -29.57, 9.32, 0, 9.375)),
    "dapo": ({}, .015762, .019069, (0, -106.45, 197.64, 0, -321.33, 101.33, 0, 101.89)),
    "gspo": ({}, 0, .060340, (0, -113.10, 138.15, 0, 0, 107.66, 0, 72.17)),
    "cispo": ({}, .144501, .207739,
              (-79.40, -106.45, 197.64, 87.15, -321.33, 101.33, 22.77, 101.89)),
    "entropy": (dict(entropy_coef=1e-3), -.000800, -.013950,
                (0, -113.10, 139.99, 0, -227.61, 107.66, 0, 72.17)),
    "diffsmooth, sum": (dict(DS, agg="seq_mean"), -.015000, -.028974,
                        (0, -119.89, 143.14, 0, -245.35, 109.53, 0, 73.11)),
    "diffsmooth, sum, token_mean": (dict(DS, agg="token_mean"), -.004238, .003045, None),
    "diffsmooth, mean": (dict(DS, reduction="mean", agg="seq_mean"), -.005625, -.019412,
                         (0, -116.50, 141.04, 0, -233.52, 108.60, 0, 72.48)),
    "diffsmooth, DS-Positive": (dict(DS, gamma_n=0.0, agg="seq_mean"), -.026250, -.039927,
                                (0, -119.89, 139.99, 0, -245.35, 107.66, 0, 72.17)),
    "diffsmooth, DS-Negative": (dict(DS, gamma_p=0.0, agg="seq_mean"), .011250, -.002198,
                                (0, -113.10, 143.14, 0, -227.61, 109.53, 0, 73.11)),
    "diffsmooth_reward, mean": (dict(DS, reduction="mean", agg="token_mean"), None, .016602,
                                (0, -55.95, 101.17, 0, -146.21, 45.96, 0, 45.77)),
    "diffsmooth_reward, sum": (dict(DS, agg="token_mean"), None, .014424,
                               (0, -59.28, 103.88, 0, -159.20, 50.35, 0, 50.18)),
    "unlikeliness": ({}, 0, -.007789, (0, -128.61, 139.29, 0, -227.61, 107.66, 0, 72.17)),
    "passk": (dict(k=2), 0, -.004585, (0, -50.58, 62.61, 0, -131.41, 62.16, 0, 41.67)),
    "pkpo": (dict(k=2), -.583333, -.613624, (0, -150.81, 0, 0, -262.82, 0, 0, 0)),
    "w_reinforce": ({}, .587500, .612021, (0, -11.31, 139.99, 0, -13.14, 186.48, 0, 125)),
    "maxrl": ({}, 0, -.005859, (0, -113.10, 139.99, 0, -394.23, 186.48, 0, 125)),
    "ucpo": ({}, 0, -.011343, (0, -118.64, 139.99, 0, -227.61, 107.66, 0, 72.17)),
    "focal": ({}, 0, -.007716, (0, -79.98, 98.99, 0, -197.11, 93.24, 0, 62.50)),
    "sft": ({}, .941176, .920588, tuple(-1000 / 17 * n for n in (1, 2, 3, 2, 3, 2, 1, 3))),
    "rft": ({}, 1.166667, 1.125000, (-166.67, -333.33, 0, 0, -500, 0, 0, 0)),
}


@core
@pytest.mark.parametrize("label", WORKED_NUMBERS)
def test_worked_batch(label):
    """`worked_batch`. rft by hand: rows 1, 2, 5 are kept, 6 tokens; .2 + 2 * 1.1 + 3 * 1.45 = 6.75,
    and 6.75 / 6 = 1.125.

    grpo, row 8: A = -.577349, ratio 1, three tokens of 1/(8 * 3) each: 3 * .577349 / 24 = .07217;
    row 3, A = -.999998: ratios e^.1, e^-.1, e^.3, so 46.05, 37.70, 56.24 thousandths.
    """
    name, (options, on_policy, loss, rows) = label.split(",")[0], WORKED_NUMBERS[label]
    on = WORKED._replace(logp=WORKED.old_logp)
    check_batch(f"{label}: the worked batch", name, WORKED, loss, atol=6e-7, rtol=0, **options)
    if on_policy is not None:
        check_batch(f"{label}: the worked batch with logp = old_logp", name, on, on_policy,
                    atol=6e-7, rtol=0, **options)
    if rows is not None:
        gradient = run(name, WORKED, **options)[1]
        check(f"{label}: gradient summed over each row x 1000", 1000 * gradient.sum(1), rows,
              6e-3, 0)


# ====================================================================== core: aggregators and clips

AGG = [("w_reinforce", dict(w_pos=1.0, w_neg=1.0, agg="seq_mean"), 0.0),
       ("w_reinforce", dict(w_pos=1.0, w_neg=1.0, agg="token_mean"), .5),
       ("w_reinforce", dict(w_pos=1.0, w_neg=1.0, agg="seq_sum"), 2.0),
       ("grpo", dict(agg="seq_mean"), 0.0), ("grpo", dict(agg="token_mean"), .499999),
       ("grpo", dict(agg="seq_sum"), 1.999996), ("dapo", {}, .499999),
       ("dr_grpo", dict(max_len=10), 0.1), ("gspo", {}, 0.0), ("rloo", {}, -1.0),
       ("cispo", {}, -.2499995)]


@core
@cases("name, options, expected", AGG)
def test_aggregators(name, options, expected):
    """Lengths 2 and 6, A = +1 and -1, on-policy, so each token loss is -A:

    seq_mean (-1 + 1)/2 = 0; token_mean (-2 + 6)/8 = .5; seq_sum (-2 + 6)/2 = 2; dr_grpo, A = +-.5:
    (-1 + 3)/2/10 = .1. In rloo and cispo a token loss is -A logp = A/2 instead: rloo (1 - 3)/2 =
    -1, cispo (1 - 3)/8 = -.25.
    """
    mask = torch.arange(7) < torch.tensor([[2], [6]])
    batch = make_batch([1, 0], 2, torch.full((2, 7), -0.5, dtype=F64), mask)
    agg = options.get("agg", AGGREGATOR.get(name, "seq_mean"))
    check_batch(f"{name} aggregates by {agg}: lengths 2 and 6, A = +1 and -1", name, batch,
                expected, atol=6e-7, **options)


CLIP = [(+1, 1.5, .2, -1.2, 0), (+1, 1.5, .28, -1.28, 0), (+1, .5, .2, -.5, -.5),
        (+1, 1.1, .2, -1.1, -1.1), (-1, .5, .2, .8, 0), (-1, 1.5, .2, 1.5, 1.5), (-1, 5, .2, 5, 5),
        (-1, .9, .2, .9, .9)]


@core
@pytest.mark.parametrize("A, ratio, clip_high, loss, slope", CLIP)
@of("grpo", "w_reinforce", "dapo", "dr_grpo")
def test_clip(name, A, ratio, clip_high, loss, slope):
    """l = -min(ratio A, clip(ratio) A); its slope is -ratio A, or 0 where clipped; lower clip .2.

    A = +1: ratio 1.5 gives -1.2 and no slope (-1.28 with clip_high .28), ratio .5 gives -.5 and
    slope -.5. A = -1: ratio .5 gives +.8 and no slope, ratio 5 gives +5 and slope +5, unbounded on
    purpose.
    """
    size = {"grpo": 1 / (1 + 2e-6), "dapo": 1 / (1 + 2e-6), "dr_grpo": .5}
    scale = size.get(name, 1)                          # |A| of rewards (1, 0)
    options = {"w_reinforce": dict(w_pos=1.0, w_neg=1.0), "dr_grpo": dict(max_len=1)}.get(name, {})
    row = 0 if A > 0 else 1
    old = column([-2, -2])
    logp = old.clone()
    logp[row] += math.log(ratio)
    other = -scale if row else scale                   # the row at ratio 1 contributes its -A
    slopes = [[other / 2], [other / 2]]
    slopes[row] = [scale * slope / 2]
    check_batch(f"{name}, A = {A:+d}, ratio {ratio}, clip .2/{clip_high}", name,
                make_batch([1, 0], 2, old, logp=logp), (scale * loss + other) / 2, slopes,
                clip_low=.2, clip_high=clip_high, **options)


# ================================================================================= core: advantages

TABLE = {  # G = 8, k = 4; (correct, wrong) for c = 1, 2, 4, 6, 8, 0 correct answers
    "reinforce": [(1, 0), (1, 0), (1, 0), (1, 0), (1, None), (None, 0)],
    "dr_grpo": [(.875, -.125), (.75, -.25), (.5, -.5), (.25, -.75), (0, None), (None, 0)],
    "rloo": [(1, -.1429), (.8571, -.2857), (.5714, -.5714), (.2857, -.8571), (0, None), (None, 0)],
    "grpo": [(2.6457, -.3780), (1.7320, -.5773), (1, -1), (.5773, -1.7320), (0, None), (None, 0)],
    "diffsmooth": [(2.9457, -.4780), (2.0320, -.6773), (1.3, -1.1), (.8773, -1.8320), (.3, None),
                   (None, -.1)],
    "passk": [(1, -.1429), (.5222, -.1741), (.1204, -.1204), (0, 0), (0, None), (None, 0)],
    "pkpo": [(4, 0), (2.2857, 0), (.4571, 0), (0, 0), (0, None), (None, 0)],
    "w_reinforce": [(.1, -1), (.1, -1), (.1, -1), (.1, -1), (.1, None), (None, -1)],
    "maxrl": [(6.9999, -1), (3, -1), (1, -1), (.3333, -1), (0, None), (None, 0)],
    "focal": [(2.4749, -.3536), (1.5, -.5), (.7071, -.7071), (.2887, -.8660), (0, None), (None, 0)],
    "focal-1": [(2.3150, -.3307), (1.2990, -.4330), (.5, -.5), (.1443, -.4330), (0, None),
                (None, 0)],
}
TABLE |= {name: TABLE["grpo"] for name in ("dapo", "gspo", "cispo", "entropy", "ucpo")}


@core
@pytest.mark.parametrize("label", TABLE)
def test_advantages_by_number_correct(label):
    """Group of 8 with c correct. GRPO at c = 2: mean .25, std sqrt(.25 * .75) = .4330; .75/.4330 =
    1.7320, -.25/.4330 = -.5773."""
    name = label.removesuffix("-1")
    changed = {"passk": dict(k=4), "pkpo": dict(k=4), "focal-1": dict(focal_gamma=1.0)}
    options = settings(name, **changed.get(label, {}))
    for c, (right, wrong) in zip((1, 2, 4, 6, 8, 0), TABLE[label]):
        old = column([-10.0] * 8)                      # diffsmooth: log pi = -10 for all
        batch = make_batch([1] * c + [0] * (8 - c), 8, old)
        check_advantages(f"{label}: advantages with {c} of 8 correct", name, batch,
                         [right] * c + [wrong] * (8 - c), 6e-5, 0, **options)


GROUPS = [("grpo", {}, (1, 1, 0, 0), (.999998, .999998, -.999998, -.999998)),
          ("grpo", {}, (1, 0, 0, 0), (1.732047, -.577349, -.577349, -.577349)),
          ("rloo", {}, (1, 0, 0, 0), (1, -1 / 3, -1 / 3, -1 / 3)),
          ("dr_grpo", dict(max_len=1), (1, 0, 0, 0), (.75, -.25, -.25, -.25)),
          ("passk", dict(k=2), (1, 1, 0, 0), (.447212, .447212, -.447212, -.447212)),
          ("passk", dict(k=2), (1, 0, 0, 0), (.999998, -.333333, -.333333, -.333333)),
          ("pkpo", dict(k=2), (1, 1, 0, 0), (4 / 3, 4 / 3, 0, 0)),
          ("pkpo", dict(k=2), (1, 0, 0, 0), (2, 0, 0, 0)),
          ("maxrl", {}, (1, 0, 0, 0), (2.999988, -.999996, -.999996, -.999996)),
          ("focal", {}, (1, 1, 0, 0), (.707105, .707105, -.707105, -.707105)),
          ("focal", {}, (1, 0, 0, 0), (1.499997, -.499999, -.499999, -.499999)),
          ("reinforce", dict(baseline=.25), (1, 0, 0, 0), (.75, -.25, -.25, -.25)),
          ("w_reinforce", dict(w_pos=0.0, w_neg=1.0), (1, 0, 0, 0), (0, -1, -1, -1))]


@core
@pytest.mark.parametrize("name, options, rewards, expected", GROUPS,
                         ids=[f"{n}-{r}" for n, _, r, _ in GROUPS])
def test_advantages_of_one_group(name, options, rewards, expected):
    """GRPO, (1, 0, 0, 0): mean .25, population std .4330: .75/.433014 = 1.732047, -.577349.

    With ddof 1 it would be 1.5, -.5.
    """
    check_advantages(f"{name}: advantages of rewards {rewards}", name, make_batch(rewards, 4),
                     expected, **options)


LOG_PI = [-10, -20, -10, -20]
SMOOTHED = [("diffsmooth", (1, 1, 0, 0), (1.299998, 1.599998, -1.099998, -1.199998)),
            ("diffsmooth", (1, 1, 1, 1), (.3, .6, .3, .6)),
            ("diffsmooth", (0, 0, 0, 0), (-.1, -.2, -.1, -.2)),
            ("diffsmooth_reward", (1, 1, 0, 0), (.65, .95, -.75, -.85)),
            ("diffsmooth_reward", (1, 1, 1, 1), (-.15, .15, -.15, .15)),
            ("diffsmooth_reward", (0, 0, 0, 0), (.05, -.05, .05, -.05))]


@core
@cases("name, rewards, expected", SMOOTHED)
def test_smoothed_advantages(name, rewards, expected):
    """log pi = (-10, -20, -10, -20), gammas .03 and .01: correct gain .3, .6; wrong lose .1, .2,
    Eq. (6).

    r = (1, 1, 0, 0): 1.3, 1.6, -1.1, -1.2. In the reward form (Eq. 4) r' = 1.3, 1.6, -.1, -.2,
    minus their mean .65.
    """
    check_advantages(f"{name}: advantages of rewards {rewards} at log pi = -10, -20, -10, -20",
                     name, make_batch(rewards, 4, column(LOG_PI)), expected, **ALL[name])


@core
@pytest.mark.parametrize("reduction, right, wrong",
                         [("mean", 1.029998, -1.009998), ("sum", 1.059998, -1.019998)])
@of("diffsmooth")
def test_smoothing_by_sum_and_by_mean(name, reduction, right, wrong):
    """Two tokens of -1 each: their sum is -2, their mean -1. r = (1, 1, 0, 0), gammas .03, .01."""
    batch = make_batch([1, 1, 0, 0], 4, torch.full((4, 2), -1.0, dtype=F64))
    check_advantages(f"{name}, reduction {reduction}, two tokens of -1", name, batch,
                     [right, right, wrong, wrong], **dict(ALL[name], reduction=reduction))


@core
@of("diffsmooth", "diffsmooth_reward")
def test_repeating_the_tokens_of_an_answer(name):
    """If an answer's tokens are repeated, the mean log-probability stays and the sum doubles.

    So a gamma tuned for one does not suit the other.
    """
    once = tensor([[-1, -2], [-2, -3], [-1, -1], [-3, -1]])
    twice = torch.cat([once, once], dim=1)

    def term(old, reduction):
        batch = make_batch([1, 1, 0, 0], 4, old)
        on, off = (advantages(name, batch, reduction=reduction, gamma_p=p, gamma_n=n,
                              agg="seq_mean") for p, n in ((.03, .02), (0.0, 0.0)))
        return on - off
    claim(term(once, "sum").any(), f"{name}: the smoothing term is silently zero")
    check(f"{name}: smoothing term by mean, tokens repeated", term(twice, "mean"),
          term(once, "mean"), bugs={"the sum for the mean": 2 * term(once, "mean")})
    check(f"{name}: smoothing term by sum, tokens repeated", term(twice, "sum"),
          2 * term(once, "sum"), bugs={"the mean for the sum": term(once, "sum")})


@core
@pytest.mark.parametrize("gamma_p, gamma_n, moves",
                         [(.1, 0.0, [.5, .9, 0, 0, 0]), (0.0, .1, [0, 0, -.5, -.9, -.7])],
                         ids=["DS-Positive", "DS-Negative"])
@of("diffsmooth")
def test_one_gamma_moves_one_kind_of_answer(name, gamma_p, gamma_n, moves):
    """log pi = -5, -9, -5, -9, -7, rewards (1, 1, 0, 0, 0).

    gamma_n = 0: correct answers rise, the rarer by more, and the rest keep GRPO's advantage.
    gamma_p = 0: wrong ones fall.
    """
    batch = make_batch([1, 1, 0, 0, 0], 5, column([-5, -9, -5, -9, -7]))
    on, off = (advantages(name, batch, reduction="sum", gamma_p=p, gamma_n=n, agg="seq_mean")
               for p, n in ((gamma_p, gamma_n), (0.0, 0.0)))
    sign = "gamma_p" if gamma_p else "gamma_n"
    swapped = [0, 0, -.5, -.9, -.7] if gamma_p else [.5, .9, 0, 0, 0]
    check(f"{name}, gammas {gamma_p} and {gamma_n}: what is added to GRPO's advantages (the rarer "
          "moves by more)", on - off, moves,
          bugs={f"sign of {sign} flipped": -tensor(moves), "gammas swapped": swapped,
                "a smoothing term that is silently zero": [0] * 5})


@core
@pytest.mark.parametrize("rewards", [(1, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0)],
                         ids=["mixed", "all correct", "all wrong"])
@of("diffsmooth", "diffsmooth_reward")
def test_the_smoothing_term_is_never_silently_zero(name, rewards):
    """A gamma != 0 changes the gradient, in mixed, all-correct and all-wrong groups."""
    batch = make_batch(rewards, 4, tensor([[-1, -2], [-2, -3], [-1, -1], [-3, -1]]))
    on = dict(reduction="sum", gamma_p=.03, gamma_n=.01, agg="seq_mean")
    change = run(name, batch, **on)[1] - run(name, batch, **dict(on, gamma_p=0.0, gamma_n=0.0))[1]
    claim(change.abs().max() > 1e-4,
          f"{name}: the smoothing term changes nothing for rewards {rewards}; it must act in "
          "groups of equal rewards too")


FORMAT = [("diffsmooth", [1, 1, .1, 0, 0]), ("diffsmooth_reward", [1, 1, .1, 0, 0]),
          ("passk", [1, 1, .1, 0, 0]), ("pkpo", [1, 1, .1, 0, 0]),
          ("w_reinforce", [1, 1, .1, 0, 0]), ("ucpo", [1, 1, .1, 0, 0]),
          ("focal", [1, 1, .1, 0, 0]), ("rft", [1, 1, .1, 0, 0])]


@core
@cases("name, rewards", FORMAT)
def test_correct_means_a_reward_of_one(name, rewards):
    """A format reward of .1 is a wrong answer: not smoothed, kept or counted like a correct one."""
    batch = make_batch(rewards, 5, column([-1, -2, -3, -2, -4]))
    check_batch(f"{name}, rewards {rewards} (the .1 is for format, the answer is wrong)", name,
                batch, oracle(name, ALL[name], batch)[0], **ALL[name])


@core
@of("unlikeliness")
def test_unlikeliness_ranks(name):
    """M = (-.1, -.5, -.3, -.9): ranks 3, 1, 2, 0 (0 = least likely); r' = 1 - .25 * 3/4 = .8125,
    then .9375, 0, 0.

    There the sorting order happens to equal the ranks. M = (-.3, -.5, -.1, -.9) has ranks 2, 1, 3,
    0 and the order 3, 1, 0, 2.
    """
    first = make_batch([1, 1, 0, 0], 4, column([-.1, -.5, -.3, -.9]))
    check_advantages(f"{name}: advantages at M = -.1, -.5, -.3, -.9", name, first,
                     [.852801, 1.137068, -.994934, -.994934])
    second = make_batch([1, 1, 0, 0], 4, column([-.3, -.5, -.1, -.9]))
    check_advantages(f"{name}: advantages at M = -.3, -.5, -.1, -.9", name, second,
                     normalised([.875, .9375, 0, 0]))


@core
@of("unlikeliness")
def test_ranks_of_an_all_correct_group(name):
    """In an all-correct group the std cancels rank_coef: A runs from -1.5275 to 1.5275 for G = 8,
    and to 1.6787 for G = 32."""
    for G, extreme in ((8, 1.5275), (32, 1.6787)):
        for coef in (.01, .25):
            batch = make_batch([1] * G, G, column([-.1 * i for i in range(1, G + 1)]))
            a = advantages(name, batch, rank_coef=coef)
            check(f"{name}, {G} correct of {G}, rank_coef {coef}: most and least likely answer",
                  a[[0, -1]], [-extreme, extreme], 1e-3,
                  bugs={"ranks the other way round": [extreme, -extreme]})


@core
@of("ucpo")
def test_ucpo_factors(name):
    """M = -.1, -.5, both correct: q = .598688, .401312; 2 (1/q)/sum = .802625, 1.197375; so the
    factors are .960525, 1.039475."""
    old = column([-.1, -.5, -.3, -.9])
    batch = make_batch([1, 1, 0, 0], 4, old)
    factor = advantages(name, batch, tau=.2) / advantages(name, batch, tau=0.0)
    check(f"{name}: factors on GRPO's advantages at M = -.1, -.5 of the correct answers", factor,
          [.960525, 1.039475, 1, 1], 6e-7,
          bugs={"more to the likely ones": [1.039475, .960525, 1, 1]})
    for rewards in ([1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
        check_advantages(f"{name} does nothing for rewards {rewards}", name,
                         make_batch(rewards, 4, old), normalised(rewards))


@core
@pytest.mark.parametrize("focal_gamma, factor", [(.5, .679), (1.0, .5)])
@of("focal")
def test_focal_lowers_the_mean_advantage(name, focal_gamma, factor):
    """Over uniform accuracies mean |A| falls to B(1.5, 1.5 + gamma)/B(1.5, 1.5) of GRPO's: .679 for
    gamma .5, .5 for 1."""
    rewards = (torch.arange(100)[None] < torch.arange(101)[:, None]).to(F64)    # 0, 1, ... correct
    grpo = tensor([normalised(r) for r in rewards.tolist()]).abs().mean()
    a = advantages(name, make_batch(rewards.flatten(), 100), focal_gamma=focal_gamma)
    check(f"{name}, focal_gamma {focal_gamma}: mean |A| over GRPO's", a.abs().mean() / grpo,
          factor, 1e-3)


@core
@pytest.mark.parametrize("G, k", [(5, 1), (5, 2), (6, 3), (5, 5), (7, 4)])
@of("passk", "pkpo")
def test_against_all_subsets(name, G, k):
    """The closed forms against a sum over every k-subset of the group, for each number of correct
    answers."""
    for c in range(G + 1):
        r = [1] * c + [0] * (G - c)
        check_advantages(f"{name}, G {G}, k {k}, {c} correct, against all {k}-subsets", name,
                         make_batch(r, G), oracle_advantages(name, r, [-1] * G, [1] * G, dict(k=k)),
                         1e-6, k=k)


@core
@pytest.mark.parametrize("repeat", [1, 2])
@of("gspo")
def test_geometric_mean_of_the_ratios(name, repeat):
    """Log-ratios .1, -.1, .3: s = e^.1 = 1.105171, also with the tokens repeated. The arithmetic
    mean is 1.119956, the product 1.349859."""
    old = torch.full((2, 3 * repeat), -2.0, dtype=F64)
    log_ratio = tensor([[.1, -.1, .3], [0, 0, 0]]).repeat(1, repeat)
    batch = make_batch([1, 0], 2, old, logp=old + log_ratio)
    a = 1 / (1 + 2e-6)
    slopes = [[-1.105171 * a / 2 / (3 * repeat)] * 3 * repeat, [a / 2 / (3 * repeat)] * 3 * repeat]
    check_batch(f"{name}, log-ratios .1, -.1, .3{' repeated' * (repeat - 1)}", name, batch,
                (a - 1.105171 * a) / 2, slopes, atol=6e-7, clip_low=5.0, clip_high=5.0)


@core
@pytest.mark.parametrize("log_ratio, slope",
                         [(math.log(10), -5), (.5, -1.648721), (-3.0, -.049787)])
@of("cispo")
def test_clipped_weight(name, log_ratio, slope):
    """A = +1, one token: gradient -min(ratio, 5). Ratio 10: -5 (PPO: 0); e^.5: -1.648721; e^-3:
    -.049787."""
    old = column([-4, -4])
    logp = old + column([log_ratio, 0])
    _, g, _ = run(name, make_batch([1, 0], 2, old, logp=logp, entropy=None, ref_logp=None))
    a, ratio, r5 = .999998, math.exp(log_ratio), min(math.exp(log_ratio), 5)
    leak = logp[0, 0].item() * ratio if ratio < 5 else 0
    bugs = {"clip_high read as the absolute cap 4": -4 * a, "PPO's clip": 0.0,
            "a floor of .8": -.8 * a, "a weight that is not detached": -(r5 + leak) * a}
    check(f"{name}: gradient at ratio {ratio:.4g}", 2 * g[0, 0], slope * a, 2e-6, bugs=bugs)


@core
@of("reinforce")
def test_by_hand(name):
    """A = 1, one token of logp -.2: loss +.2, gradient -1. Two tokens are summed, never averaged.
    """
    check_batch(f"{name}, A = 1, logp -.2", name, make_batch([1], 1, column([-.2])), .2, [[-1]])
    check_batch(f"{name}, A = 1, logp -.2 and -.3 (the length does not divide)", name,
                make_batch([1], 1, tensor([[-.2, -.3]])), .5, [[-1, -1]])


IMITATED = make_batch([1, 0], 2, tensor([[-1, -2], [-3, -3]]), torch.tensor([[1, 1], [1, 0]]))


@core
@cases("name, loss, gradient", [("sft", 2.0, [[-1 / 3, -1 / 3], [-1 / 3, 0]]),
                                ("rft", 1.5, [[-.5, -.5], [0, 0]])])
def test_imitation_by_hand(name, loss, gradient):
    """logp (-1, -2) correct and (-3) wrong. sft: 6 nats over 3 tokens = 2.0. rft keeps the first
    answer: 3 nats over 2 tokens = 1.5."""
    check_batch(f"{name}: logp (-1, -2) correct, (-3) wrong", name, IMITATED, loss, gradient)


# ================================================================= core: comparison with the oracle

@core
@of("dapo")
def test_one_mean_over_all_tokens(name):
    """Rows 1-4 and 5-8 apart give two means; their mean .030997 is not the loss .019069, which has
    one denominator for all tokens."""
    W = WORKED
    halves = [run(name, Batch(W.logp[rows], W.old_logp[rows], W.mask[rows], W.rewards[rows], 4,
                              None, None)) for rows in (slice(0, 4), slice(4, 8))]
    whole, gradient, _ = run(name, W)
    check(f"{name}: the worked batch", whole, .019069, 6e-7, 0,
          bugs={"mean of two micro-batch means": .030997})
    check(f"{name}: the halves weighted by their tokens, 8 and 9 of 17",
          (8 * halves[0][0] + 9 * halves[1][0]) / 17, whole)
    check(f"{name}: gradients of the halves, rescaled to the whole",
          torch.cat([halves[0][1] * 8 / 17, halves[1][1] * 9 / 17]), gradient)


@core
@of("entropy")
def test_slope_in_the_entropies(name):
    """d loss / d entropy = -entropy_coef / (n_seq len_i): row 1 (one token) -1e-3/8 = -.000125, row
    3 -1e-3/24 per token."""
    W, leaf = WORKED, WORKED.entropy.clone().requires_grad_()
    loss, _ = L.entropy(W.logp, W.old_logp, W.mask, W.rewards, 4, entropy=leaf, entropy_coef=1e-3)
    claim(loss.requires_grad, f"{name}: no gradient reaches the entropy; it must not be detached")
    g, = torch.autograd.grad(loss, leaf)
    expected = torch.where(W.mask, -1e-3 / (8 * W.mask.sum(1, keepdim=True)), 0)
    check(f"{name}: gradient with respect to the entropies", g, expected, 1e-9,
          bugs={"a bonus with the wrong sign": -expected, "token_mean": -1e-3 / 17 * W.mask})


@core
@of("diffsmooth")
def test_worked_batch_with_a_format_reward(name):
    """Row 8 earns 0.1 for its format and is WRONG: A = -.423606 (r > 0 would make it -.393606)."""
    rewards = WORKED.rewards.clone()
    rewards[7] = 0.1
    check_batch(f"{name}: the worked batch with a format reward of .1 in row 8", name,
                WORKED._replace(rewards=rewards), -.026130, atol=6e-7, rtol=0, **ALL[name])


CASES = [(name, options) for name, options in ALL.items() if name not in ("dapo", "ucpo", "focal")]
CASES += [("dapo", {}), ("dapo", dict(clip_low=.1, clip_high=.4)), ("ucpo", dict(tau=.2)),
          ("ucpo", dict(tau=.9, clip_low=.3)), ("focal", dict(focal_gamma=.5)),
          ("focal", dict(focal_gamma=2.0)),
          ("gspo", dict(clip_low=.1, clip_high=.05)), ("cispo", dict(clip_low=.3, clip_high=.2)),
          ("reinforce", dict(baseline=.4, beta=.2)), ("rloo", dict(beta=.2)),
          ("dr_grpo", dict(max_len=7, clip_low=.3, clip_high=.1)),
          ("unlikeliness", dict(rank_coef=.7)), ("passk", dict(k=1)), ("passk", dict(k=3)),
          ("passk", dict(k=4)),
          ("pkpo", dict(k=1)), ("pkpo", dict(k=3)), ("pkpo", dict(k=4)),
          ("w_reinforce", dict(w_pos=1.0, w_neg=.3)),
          ("entropy", dict(entropy_coef=-.2, agg="token_mean"))]
CASES += [(name, dict(gamma_p=.05, gamma_n=-.02, reduction=reduction, agg=agg))
          for name in ("diffsmooth", "diffsmooth_reward") for reduction in ("sum", "mean")
          for agg in ("seq_mean", "token_mean")]
CASES += [(name, dict(ALL[name], beta=.3, agg=agg, clip_low=.3, clip_high=.1))
          for name in CLIPPED for agg in ("seq_mean", "token_mean", "seq_sum")]


@core
@cases("name, options", CASES)
def test_against_the_oracle(name, options):
    """Loss and gradient of the ragged batch, token by token, against plain Python lists and loops.
    """
    check_batch(f"{name} with {options}, the ragged batch", name, RAGGED,
                oracle(name, options, RAGGED)[0], **options)


SAME = [("passk", dict(k=1), "grpo", {}), ("focal", dict(focal_gamma=0.0), "grpo", {}),
        ("ucpo", dict(tau=0.0), "grpo", {}),
        ("diffsmooth", dict(reduction="sum", gamma_p=0.0, gamma_n=0.0, agg="seq_mean"), "grpo", {}),
        ("diffsmooth", dict(reduction="mean", gamma_p=0.0, gamma_n=0.0, agg="token_mean"), "grpo",
         dict(agg="token_mean")),
        ("diffsmooth_reward", dict(DS, gamma_p=0.0, gamma_n=0.0, agg="seq_sum"), "dr_grpo",
         dict(max_len=1)),
        ("entropy", dict(entropy_coef=0.0), "grpo", {}),
        ("unlikeliness", dict(rank_coef=0.0), "grpo", {}),
        ("dapo", {}, "grpo", dict(agg="token_mean", clip_high=.28))]


@core
@pytest.mark.parametrize("name, options, other, its_options", SAME,
                         ids=[f"{row[0]}-own idea off" if row[0] != "dapo" else "dapo"
                              for row in SAME])
def test_same_as(name, options, other, its_options):
    """Without its own idea each variant is GRPO (diffsmooth_reward: dr_grpo), in loss and gradient.
    """
    check_batch(f"{name} with {options} must be {other}", name, RAGGED,
                *oracle(other, its_options, RAGGED), **options)


@core
@cases("name, options, factor, other, its_options", [
    ("rloo", {}, 4 / 3, "dr_grpo", dict(max_len=1)), ("pkpo", dict(k=1), 1, "reinforce", {}),
    ("w_reinforce", dict(w_pos=.3, w_neg=.9), 1.2, "reinforce", dict(baseline=.75))])
def test_advantages_same_as(name, options, factor, other, its_options):
    """rloo = G/(G-1) dr_grpo; pkpo(k=1) has A = r; w_reinforce is reinforce with the baseline
    w_neg/(w_pos + w_neg)."""
    batch = make_batch(RAGGED.rewards, 4)
    expected = -factor * 20 * tensor(oracle(other, its_options, batch)[1]).sum(1)
    check_advantages(f"{name} with {options}: advantages are {factor:.4g} times those of {other} "
                     f"with {its_options}", name, batch, expected, **options)


@core
@of(*RL)
def test_gradient_on_policy(name):
    """At ratio 1 nothing is clipped: d loss / d logp is -A_i times the weight of the token. The
    gradient of gspo is that of grpo, the gradient of cispo that of dapo."""
    on = RAGGED._replace(logp=RAGGED.old_logp)
    twin = {"gspo": "grpo", "cispo": "dapo"}.get(name, name)
    expected = oracle(twin, dict(settings(name), clip_low=.9, clip_high=9), on)[1]
    check_batch(f"on-policy, {name}", name, on, oracle(name, settings(name), on)[0], expected,
                **settings(name))


@core
@of("grpo")
def test_loss_on_policy_is_zero_and_still_teaches(name):
    """seq_mean with A summing to 0: the loss is 0, its gradient is not. With token_mean the loss
    need not be 0."""
    on = WORKED._replace(logp=WORKED.old_logp)
    loss, g, _ = run(name, on)
    by_tokens = oracle(name, dict(agg="token_mean"), on)[0]
    check(f"on-policy, {name}'s loss by seq_mean", loss, 0,
          bugs={"mean over tokens instead of mean over answers": by_tokens})
    claim(g.any(), f"on-policy, {name}: a loss of 0 still has a gradient; does the ratio depend on "
          "logp?")


CENTRED = ["grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "maxrl", "passk", "unlikeliness",
           "ucpo", "focal", "diffsmooth_reward"]


@core
@of(*RL)
def test_sum_of_the_advantages_of_a_group(name):
    """0 where a group mean is subtracted; not 0 in reinforce, pkpo, w_reinforce and diffsmooth."""
    old = RAGGED.old_logp[:, :1]
    if name in CENTRED or name == "entropy":
        a = advantages(name, make_batch(RAGGED.rewards, 4, old), **settings(name)).view(-1, 4)
        check(f"{name}: sum of the advantages of each group", a.sum(1), [0] * 5, 1e-6)
    else:
        batch = make_batch([1, 1, 0, 0, 0], 5, column([-1, -2, -3, -4, -5]))
        a = advantages(name, batch, **ALL[name])
        claim(abs(a.sum()) > 1e-3,
              f"{name}: its advantages are not centred; was a group mean subtracted?")


# =============================== core: exact expected gradients, over every group of a small policy

class Toy:
    """A softmax over V = 5 one-token answers, two of them correct; all groups of G = 3, with their
    probabilities."""
    G, V = 3, 5
    logits = tensor([.3, -.5, .9, 0, -1.2])
    correct = tensor([0, 1, 0, 1, 0])
    ref = tensor([.1, .3, .2, .15, .25])
    groups = torch.tensor(list(itertools.product(range(5), repeat=3)))          # (125, 3)


def expected_gradient(name, **options):
    """Exact expectation over all groups of d loss / d logits, on-policy. (5,)

    One call holds all 125 groups, each row with weight 1/375, so a factor 125 * P(group) turns
    their sum into an expectation.
    """
    theta = Toy.logits.clone().requires_grad_()
    log_pi = theta.log_softmax(0)
    answers = Toy.groups.flatten()
    chance = log_pi.detach().exp()[Toy.groups].prod(1).repeat_interleave(3)     # (375,)
    logp = log_pi[answers][:, None]
    ones = torch.ones(375, 1, dtype=torch.bool)
    old = logp.detach()
    entropy = -(log_pi.exp() * log_pi).sum() * torch.ones(375, 1, dtype=F64)
    leaf, H = old.clone().requires_grad_(), entropy.detach().requires_grad_()
    loss, _ = getattr(L, name)(leaf, old, ones, Toy.correct[answers], 3, entropy=H,
                               ref_logp=Toy.ref.log()[answers][:, None], **options)
    g, h = torch.autograd.grad(loss, [leaf, H], allow_unused=True)
    weight = 125 * chance[:, None]
    total = (logp * g * weight).sum() + (0 if h is None else (entropy * h * weight).sum())
    return torch.autograd.grad(total, theta)[0]


def exact_gradient(objective):
    """d objective(pi) / d logits, pi the softmax policy."""
    theta = Toy.logits.clone().requires_grad_()
    return torch.autograd.grad(objective(theta.softmax(0)), theta)[0]


def success(pi):
    return (pi * Toy.correct).sum()


def pass_at(k):
    return lambda pi: 1 - (1 - success(pi)) ** k


def kl_to_ref(pi):
    return (pi * (pi / Toy.ref).log()).sum()


def p_minus_kl(pi):
    return success(pi) - .3 * kl_to_ref(pi)


DS_OFF = dict(DS, gamma_p=0.0, gamma_n=0.0, agg="token_mean")
EXACT = {  # label: (options, what the loss that it begins with climbs)
    "reinforce climbs p": ({}, success),
    "reinforce with a baseline climbs p": (dict(baseline=.4), success),
    "reinforce with beta climbs p - beta KL(pi, ref)": (dict(beta=.3), p_minus_kl),
    "rloo climbs p": ({}, success),
    "rloo with beta climbs p - beta KL(pi, ref)": (dict(beta=.3), p_minus_kl),
    "dr_grpo climbs (G-1)/G p / max_len": (dict(max_len=4), lambda pi: success(pi) * 2 / 3 / 4),
    "w_reinforce climbs (w_pos + w_neg) p": ({}, lambda pi: 1.1 * success(pi)),
    "pkpo with k = 1 climbs p": (dict(k=1), success),
    "pkpo with k = 2 climbs pass@2": (dict(k=2), pass_at(2)),
    "pkpo with k = 3 climbs pass@3": (dict(k=3), pass_at(3)),
    "maxrl climbs pass@1 + pass@2 / 2": ({}, lambda pi: pass_at(1)(pi) + pass_at(2)(pi) / 2),
    "diffsmooth_reward with gammas 0 climbs (G-1)/G p": (DS_OFF, lambda pi: success(pi) * 2 / 3),
}


@core
@pytest.mark.parametrize("label", EXACT)
def test_expected_gradient(label):
    """The average over every possible group of 3 is minus the gradient of the paper's objective."""
    options, objective = EXACT[label]
    gradient = exact_gradient(objective)
    check(label, expected_gradient(label.split()[0], **options), -gradient, 2e-6,
          bugs={"the wrong sign": gradient})


def smoothing_objective(gamma_p, gamma_n):
    """gamma_p (H_C + p) + gamma_n (p - H_W), H_C = -sum of pi log pi over correct answers, H_W over
    wrong ones."""
    def objective(pi):
        H_C, H_W = -(pi * pi.log() * Toy.correct).sum(), -(pi * pi.log() * (1 - Toy.correct)).sum()
        return gamma_p * (H_C + success(pi)) + gamma_n * (success(pi) - H_W)
    return objective


@core
@pytest.mark.parametrize("gamma_p, gamma_n", [(.3, 0), (0, .2), (.3, .2), (-.1, .4)])
@of("diffsmooth")
def test_expected_gradient_of_the_smoothing_term(name, gamma_p, gamma_n):
    """What the term adds to GRPO: more entropy among correct answers, less among wrong ones, and
    more p."""
    on, off = (expected_gradient(name, reduction="sum", gamma_p=float(p), gamma_n=float(n),
                                 agg="seq_mean") for p, n in ((gamma_p, gamma_n), (0, 0)))
    added = on - off
    of_gammas = lambda p, n: -exact_gradient(smoothing_objective(p, n))
    check(f"{name}, gammas {gamma_p}, {gamma_n}: what the term adds to the expected gradient",
          added, of_gammas(gamma_p, gamma_n),
          bugs={"signs of both gammas flipped": of_gammas(-gamma_p, -gamma_n),
                "gammas swapped": of_gammas(gamma_n, gamma_p),
                "sign of gamma_p flipped": of_gammas(-gamma_p, gamma_n),
                "sign of gamma_n flipped": of_gammas(gamma_p, -gamma_n),
                "a smoothing term that is silently zero": [0] * 5})


@core
@pytest.mark.parametrize("gamma_p, gamma_n", [(.3, 0), (0, .2), (.3, .2)])
@of("diffsmooth_reward")
def test_expected_gradient_of_the_smoothed_reward(name, gamma_p, gamma_n):
    """The smoothed reward, centred: the mean contains the answer itself, hence a factor (G-1)/G, as
    in dr_grpo."""
    objective = smoothing_objective(gamma_p, gamma_n)
    gradient = exact_gradient(lambda pi: 2 / 3 * (success(pi) + objective(pi)))
    check(f"{name}, gammas {gamma_p}, {gamma_n}: expected gradient",
          expected_gradient(name, reduction="sum", gamma_p=float(gamma_p), gamma_n=float(gamma_n),
                            agg="token_mean"), -gradient)


@core
@pytest.mark.parametrize("coef", [.2, -.1])
@of("entropy", "diffsmooth")
def test_expected_gradient_of_a_bonus(name, coef):
    """For one-token answers, `entropy` and the reward form, gammas (a, -a), both climb a H."""
    gradient = exact_gradient(lambda pi: -coef * (pi * pi.log()).sum())
    def of_coefficient(x):
        if name == "entropy":
            return expected_gradient(name, entropy_coef=x)
        return expected_gradient(name, **dict(DS, gamma_p=x, gamma_n=-x, agg="seq_mean"))
    added = of_coefficient(coef) - of_coefficient(0.0)
    check(f"{name}, coefficient {coef}: it climbs {coef} H", added, -gradient,
          bugs={"the wrong sign": gradient, "no gradient in the entropy term": [0.0] * 5})


@core
@of("grpo")
def test_expected_gradient_of_the_kl_term(name):
    """beta k3 as a loss, on-policy: the gradient of beta KL(ref, pi), which is beta (pi - ref) in
    the logits."""
    added = expected_gradient(name, beta=.3) - expected_gradient(name)
    pi = Toy.logits.softmax(0)
    check(f"{name}, beta .3: expected gradient of the KL term", added, .3 * (pi - Toy.ref),
          bugs={"the wrong sign": -.3 * (pi - Toy.ref), "k1 (zero on average)": [0.0] * 5,
                "k2, the gradient of KL(pi, ref)": exact_gradient(lambda p: .3 * kl_to_ref(p))})
    step = (Toy.logits - .5 * added).softmax(0)
    claim(kl_to_ref(step) < kl_to_ref(pi),
          f"{name}: a step along the KL term must lower the KL to the reference")


@core
@of(*RL)
def test_one_step_raises_the_chance_of_a_correct_answer(name):
    """One step down the expected gradient raises p: nothing has the wrong sign."""
    step = (Toy.logits - .1 * expected_gradient(name, **settings(name))).softmax(0)
    claim(success(step) > success(Toy.logits.softmax(0)),
          f"{name}: a step downhill LOWERS the chance of a correct answer; check the sign")


@core
@every
def test_sign_of_the_gradient(name):
    """A correct token is pushed up (d loss / d logp < 0); a wrong one is not, except by sft, which
    knows no rewards."""
    batch = make_batch([1, 0, 0, 0, 1, 0], 3, column([-1, -2, -3, -1, -2, -3]))
    g = run(name, batch, **settings(name))[1]
    claim((g[[0, 4]] < 0).all(),
          f"{name}: the gradient of a correct answer must be negative, so that descent raises it")
    claim(name == "sft" or (g[[1, 2, 3, 5]] >= 0).all(),
          f"{name}: the gradient of a wrong answer must not be negative")


BERNOULLI = [("maxrl", {}, .1, .469533, 5e-6, {"all-wrong groups at A = -1": .512580}),
             ("rft", {}, .1, .512580, 6e-7, {}),
             ("pkpo", dict(k=4), .05, .1629, 6e-5, {"one more leave-one-out baseline": .1666}),
             ("pkpo", dict(k=4), .2, .3277, 6e-5, {"one more leave-one-out baseline": .3628}),
             ("pkpo", dict(k=4), .5, .1250, 6e-5, {"one more leave-one-out baseline": .1786})]


@core
@pytest.mark.parametrize("name, options, p, slope, atol, bugs", BERNOULLI,
                         ids=[f"{row[0]}-{row[2]}" for row in BERNOULLI])
def test_expected_gradient_in_a_bernoulli_logit(name, options, p, slope, atol, bugs):
    """G = 8 answers, each correct with probability p. With respect to the logit of p, the slope of
    a correct answer is q = 1 - p, that of a wrong one -p.

    maxrl: q(1 - q^7) = .9 * .5217 = .4695. rft, one group per batch, divides by its kept rows:
    q(1 - q^8) = .512580. pkpo, k = 4, p = .5: k q^(k-1) pq = 4 * .125 * .25 = .125; with one more
    leave-one-out baseline .1786.
    """
    q, ascent = 1 - p, 0.0
    for c in range(9):
        batch = make_batch([1] * c + [0] * (8 - c), 8, torch.full((8, 1), -1.0, dtype=F64))
        g = run(name, batch, **options)[1]
        chance = math.comb(8, c) * p ** c * q ** (8 - c)
        ascent -= chance * (g[:c].sum() * q - g[c:].sum() * p).item()
    check(f"{name}, Bernoulli({p}), G 8: expected ascent in the logit", ascent, slope,
          atol, 0, bugs)


# =================================================================== core: what must change nothing

def reordered(name, order):
    rows = {key: x[order] for key, x in RAGGED._asdict().items() if key != "G"}
    return run(name, RAGGED._replace(**rows), **ALL[name])


@core
@every
def test_order_of_groups_and_rows_does_not_matter(name):
    """Permuting whole groups, or rows inside a group, permutes the gradient and nothing else."""
    loss, g, _ = run(name, RAGGED, **ALL[name])
    generator = torch.Generator().manual_seed(5)
    groups = torch.randperm(5, generator=generator)
    inside = torch.stack([torch.randperm(4, generator=generator) for _ in range(5)])
    for what, order in (("groups", (groups[:, None] * 4 + torch.arange(4)).flatten()),
                        ("rows inside their groups",
                         (torch.arange(5)[:, None] * 4 + inside).flatten())):
        value, g_reordered, _ = reordered(name, order)
        check(f"{name}: loss after permuting {what} (groups are neighbouring rows, not every G-th)",
              value, loss)
        check(f"{name}: gradient after permuting {what}", g_reordered, g[order])


@core
@of(*(name for name in RL if name not in ("reinforce", "w_reinforce")))
def test_swapping_rows_across_groups_matters(name):
    """Rows 0 (correct, of a mixed group) and 12 (wrong, of an all-wrong group) change places, which
    changes both groups."""
    order = torch.arange(20)
    order[[0, 12]] = torch.tensor([12, 0])
    g, g_swapped = run(name, RAGGED, **ALL[name])[1], reordered(name, order)[1]
    claim((g_swapped - g[order]).abs().max() > 1e-4,
          f"{name}: advantages must come from the own group, but another group made no difference")


def with_rewards(name, rewards):
    return run(name, RAGGED._replace(rewards=rewards), **ALL[name])[1]


@core
@of("grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "entropy", "maxrl")
def test_other_groups_rewards_do_not_matter(name):
    """Halving the rewards of group 2 leaves the gradient of group 1 alone: mean and std are those
    of a group, not of the batch."""
    rewards = RAGGED.rewards.clone()
    rewards[4:8] *= .5
    check(f"{name}: gradient of group 1 after halving group 2's rewards (mean and std are those of "
          "the group)", with_rewards(name, rewards)[:4], with_rewards(name, RAGGED.rewards)[:4])


@core
@of("rloo", "dr_grpo", "grpo", "dapo", "gspo", "cispo", "entropy")
def test_a_constant_added_to_a_groups_rewards_changes_nothing(name):
    shift = tensor([.5, -2, 3, 0, 1]).repeat_interleave(4)
    check(f"{name}: gradient after adding a constant to each group's rewards",
          with_rewards(name, RAGGED.rewards + shift),
          with_rewards(name, RAGGED.rewards))


@core
@of("grpo", "dapo", "gspo", "cispo", "dr_grpo", "rloo")
def test_the_scale_of_the_rewards(name):
    """Rewards x 10 change GRPO's advantages only through eps = 1e-6; without a std A is 10 times as
    large."""
    once, ten = with_rewards(name, RAGGED.rewards), with_rewards(name, 10 * RAGGED.rewards)
    if name in ("dr_grpo", "rloo"):
        check(f"{name}: gradient after multiplying rewards by 10 (there is no std to cancel it)",
              ten, 10 * once, bugs={"divided by the std": once})
    else:
        check(f"{name}: gradient after multiplying rewards by 10 (the std cancels it)", ten, once,
              1e-6, 3e-5, bugs={"the std missing": 10 * once})


@core
@of("grpo", "dapo", "gspo", "cispo")
def test_a_group_of_equal_rewards_gives_no_gradient_but_stays_in_the_denominator(name):
    """One mixed group, then the same beside an all-correct group: half the gradient, and none on
    the new rows."""
    old = torch.full((8, 3), -0.5, dtype=F64)
    alone = run(name, make_batch([1, 0, 0, 1], 4, old[:4]))[1]
    both = run(name, make_batch([1, 0, 0, 1, 1, 1, 1, 1], 4, old))[1]
    claim(alone.any(), f"{name}: a mixed group must give a gradient")
    claim(not both[4:].any(), f"{name}: a group of equal rewards must give no gradient")
    check(f"{name}: gradient of a mixed group beside an all-correct one", both[:4], alone / 2,
          bugs={"tokens of groups without contrast left out of the denominators": alone})


@core
@of(*CLIPPED)
def test_aggregators_agree_for_equal_lengths(name):
    """All answers of length L: seq_mean = token_mean = seq_sum / L."""
    batch = make_batch(RAGGED.rewards, 4, RAGGED.old_logp[:, :5], logp=RAGGED.logp[:, :5],
                       entropy=RAGGED.entropy[:, :5])
    seq_mean, token_mean, seq_sum = (run(name, batch, **dict(ALL[name], agg=agg))[0]
                                     for agg in ("seq_mean", "token_mean", "seq_sum"))
    check(f"{name}: seq_mean and token_mean for equal lengths", seq_mean, token_mean)
    check(f"{name}: seq_mean and seq_sum / L for equal lengths", seq_mean, seq_sum / 5)


@core
@of("rft")
def test_rft_of_correct_answers_only_is_sft(name):
    batch = RAGGED._replace(rewards=torch.ones(20, dtype=F64))
    check_batch(f"{name} with all rewards 1 is cross-entropy on all", name, batch,
                *oracle("sft", {}, batch))


@core
@of("sft")
def test_what_sft_does_not_look_at(name):
    """Rewards, group_size and old_logp are ignored."""
    batch = IMITATED._replace(rewards=tensor([.3, -5]), G=5,
                              old_logp=torch.full((2, 2), -7.0).to(F64))
    check(f"{name} ignores rewards, group_size and old_logp", run(name, batch)[0], 2.0)


@core
@every
def test_first_and_last_generated_token_get_gradient(name):
    """The stop token is the last one under the mask and is trained like any other."""
    on = RAGGED._replace(logp=RAGGED.old_logp)
    g, i = run(name, on, **ALL[name])[1], 3            # a correct answer of 5 tokens, mixed group
    claim(g[i, 0] != 0, f"{name}: the first generated token of row {i} gets no gradient; is the "
          "mask shifted?")
    claim(g[i, 4] != 0, f"{name}: the stop token, the last of row {i}, gets no gradient; is the "
          "mask shifted?")
    check(f"{name}: number of tokens with a gradient in row {i}, which has 5", (g[i] != 0).sum(), 5)


@core
@every
def test_no_gradient_by_way_of_constants(name):
    """f(logp, logp) has the gradient of f(logp, logp.detach()): what follows from old_logp is
    constant."""
    W, leaf = WORKED, WORKED.logp.clone().requires_grad_()
    loss, _ = getattr(L, name)(leaf, leaf, W.mask, W.rewards, 4, entropy=W.entropy, **ALL[name])
    same, = torch.autograd.grad(loss, leaf)
    apart = run(name, W._replace(old_logp=W.logp), **ALL[name])[1]
    check(f"{name}: gradient with logp itself as old_logp (old_logp, weights and advantages must "
          "be detached)", same, apart,
          bugs={"old_logp not detached: the ratio is 1 for ever": torch.zeros_like(apart)})


# =============================================================================== care: the contract

@care
@every
def test_signature(name):
    """f(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, options), where
    the default of an option is an int, a float or a str."""
    parameters = inspect.signature(getattr(L, name)).parameters
    first = list(parameters)[:5]
    assert first == ["logp", "old_logp", "mask", "rewards", "group_size"], \
        f"{name} must start with the five tensors' names"
    for key, p in list(parameters.items())[5:]:
        assert p.kind is p.KEYWORD_ONLY, \
            f"{name}: '{key}' must be keyword-only (a **kwargs would swallow misspelt options)"
        if key in ("entropy", "ref_logp"):
            assert p.default is None, f"{name}: '{key}' must default to None"
        else:
            assert type(p.default) in (int, float, str), \
                f"{name}: '{key}' becomes a flag and needs a number or a word as default"
    assert {"entropy", "ref_logp"} <= set(parameters), \
        f"{name} must accept entropy and ref_logp, used or not"


@care
@of(*RL)
def test_default_options(name):
    """Defaults are the papers': clips .2 / .2, DAPO's upper one .28, GSPO's 3e-4 / 4e-4, beta 0,
    k 4, ..."""
    expected = dict(DEFAULTS[name],
                    **(dict(clip_low=.2, clip_high=.2, beta=0) if name in CLIPPED else {}))
    if name in CLIPPED and not name.startswith("diffsmooth"):
        expected["agg"] = "seq_mean"
    parameters = inspect.signature(getattr(L, name)).parameters
    for key, value in expected.items():
        assert key in parameters, f"{name} has no option '{key}'"
        assert parameters[key].default == value, f"{name}: the default of '{key}' should be {value}"


@care
@every
def test_misspelt_option_is_refused(name):
    with pytest.raises(TypeError):
        run(name, RAGGED, clip_hihg=0.3)
        pytest.fail(f"{name} accepted the misspelt option clip_hihg silently: no **kwargs, please.")


@care
@every
def test_nothing_is_written_into_the_arguments(name):
    """The arguments are the same after the call as before it; they may be expanded views of one
    number."""
    fields = ("logp", "old_logp", "mask", "rewards", "entropy", "ref_logp")
    given, kept = ({key: getattr(ROUGH, key).clone() for key in fields} for _ in range(2))
    getattr(L, name)(group_size=4, **given, **ALL[name])
    for key in given:
        same = torch.equal(given[key].to(F64).nan_to_num(9), kept[key].to(F64).nan_to_num(9))
        assert same, f"{name} wrote into its argument '{key}'; the caller still needs it"
    views = {key: tensor(-1.0).expand(4, 3) for key in fields}
    views |= dict(mask=tensor(1.0).expand(4, 3), rewards=tensor(1.0).expand(4))
    loss, _ = getattr(L, name)(group_size=2, **views, **ALL[name])
    assert loss.isfinite(), f"{name} must take expanded views as mask and rewards"


@care
@every
def test_constants_receive_no_gradient(name):
    """Neither old_logp nor ref_logp receives any, even if they ask for it."""
    W, options = WORKED, dict(ALL[name])
    leaf, old, ref = (x.clone().requires_grad_() for x in (W.logp, W.old_logp, W.ref_logp))
    if "beta" in inspect.signature(getattr(L, name)).parameters:
        options["beta"] = 0.04
    loss, _ = getattr(L, name)(leaf, old, W.mask, W.rewards, 4, entropy=W.entropy, ref_logp=ref,
                               **options)
    for key, g in zip(("old_logp", "ref_logp"),
                      torch.autograd.grad(loss, [old, ref], allow_unused=True)):
        assert g is None or not g.any(), \
            f"{name}: {key} is a constant, but a gradient reached it: detach it"


@care
@of(*(name for name in ALL if name != "entropy"))
def test_no_bonus_by_accident(name):
    """Only one loss optimises the entropy; elsewhere it is a number in stats."""
    W = WORKED
    leaf, logp = (x.clone().requires_grad_() for x in (W.entropy, W.logp))
    loss, stats = getattr(L, name)(logp, W.old_logp, W.mask, W.rewards, 4, entropy=leaf,
                                   **ALL[name])
    g, = torch.autograd.grad(loss, leaf, allow_unused=True)
    assert g is None or not g.any(), f"{name} must not optimise the entropy"
    check(f"{name}: stats['entropy'], mean over tokens", stats["entropy"], (8 * 1.2 + 9 * .4) / 17,
          1e-6)


@care
@every
def test_float32_mask_of_numbers_and_integer_rewards(name):
    """Training passes float32, perhaps a mask of numbers and integer rewards: the same loss as in
    float64."""
    W = WORKED_NAN
    single = Batch(W.logp.float(), W.old_logp.float(), W.mask.int(), W.rewards.long(), 4,
                   W.entropy.float(), None)
    loss, _, _ = run(name, single, **ALL[name])
    assert loss.dtype == torch.float32, f"{name}: float32 in, so float32 out, not {loss.dtype}"
    check(f"{name}: loss in float32 with integer mask and rewards", loss,
          oracle(name, ALL[name], WORKED)[0], 2e-6, 1e-5)
    loss, _, _ = run(name, W._replace(mask=W.mask.to(F64), ref_logp=None), **ALL[name])
    check(f"{name}: loss with a mask of 0.0 and 1.0", loss, oracle(name, ALL[name], WORKED)[0])


@care
@of("grpo", "entropy", "dapo", "diffsmooth")
def test_any_chunking_gives_the_same_update(name):
    """The chain rule, split at logp: d loss / d logp of the whole batch is pushed through a softmax
    in chunks of rows.

    The gradient of the (B, T) entropies goes the same way.
    """
    R, V = RAGGED, 6
    logits = torch.randn(20, 7, V, dtype=F64, generator=torch.Generator().manual_seed(6))
    ids = torch.randint(V, (20, 7), generator=torch.Generator().manual_seed(7))

    def score(weight, rows):
        log_pi = (logits[rows] * weight).log_softmax(-1)
        return log_pi.gather(-1, ids[rows][..., None])[..., 0], -(log_pi.exp() * log_pi).sum(-1)
    weight = torch.ones(V, dtype=F64, requires_grad=True)
    old = score(weight.detach(), slice(None))[0] - .1
    logp, entropy = score(weight, slice(None))
    loss, _ = getattr(L, name)(logp, old, R.mask, R.rewards, R.G, entropy=entropy, **ALL[name])
    plain, = torch.autograd.grad(loss, weight)
    assert plain.any()
    leaves = [x.detach().requires_grad_() for x in score(weight, slice(None))]
    loss, _ = getattr(L, name)(leaves[0], old, R.mask, R.rewards, R.G, entropy=leaves[1],
                               **ALL[name])
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]
    for size in (1, 3, 20):
        total = torch.zeros(V, dtype=F64)
        for rows in torch.arange(20).split(size):
            outputs = score(weight, rows)
            pushed = sum((x * g[rows]).sum() for x, g in zip(outputs, gradients))
            total += torch.autograd.grad(pushed, weight)[0]
        check(f"{name}: gradient of the weights in chunks of {size} rows", total, plain)


# ======================================================================== care: padding, empty rows

@care
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@every
def test_padding_may_hold_anything(name, garbage):
    """NaN, inf or 1e30 where mask is 0 changes nothing and gets gradient 0. It must be replaced
    before exp, since inf * 0 is NaN."""
    R, options = ROUGH, dict(ALL[name])
    if "beta" in inspect.signature(getattr(L, name)).parameters:
        options["beta"] = 0.1

    def outcome(filler):
        filled = {key: torch.where(R.mask, getattr(R, key), filler)
                  for key in ("logp", "old_logp", "entropy", "ref_logp")}
        return run(name, R._replace(**filled), **options)
    (clean, clean_g, clean_stats), (loss, g, stats) = outcome(-1.0), outcome(garbage)
    assert not g[~R.mask].any() and g.isfinite().all(), \
        f"{name}: {garbage} in the padding reached the gradient; where mask is 0 it must be 0"
    check(f"{name}: loss with {garbage} in the padding against harmless padding", loss, clean)
    check(f"{name}: gradient with {garbage} in the padding against harmless padding", g, clean_g)
    for key in stats:
        check(f"{name}: stats['{key}'] with {garbage} in the padding", stats[key], clean_stats[key])


@care
@cases("name, options", [(name, dict(options, **(dict(beta=.3) if name in CLIPPED else {})))
                         for name, options in ALL.items()])
def test_rough_batch_against_the_oracle(name, options):
    """The ragged batch with NaN in the padding, a row without a token and a reward of .1."""
    filled = {key: getattr(ROUGH, key).nan_to_num(-1)
              for key in ("logp", "old_logp", "entropy", "ref_logp")}
    loss, gradient = oracle(name, options, ROUGH._replace(**filled))
    value, g, _ = run(name, ROUGH, **options)
    check(f"{name} with {options}: loss of the rough batch", value, loss)
    check(f"{name} with {options}: gradient of the rough batch, token by token", g, gradient)


@care
@every
def test_extra_padding_changes_nothing(name):
    """Three more columns with mask 0: the padded width must not matter, not even for dr_grpo's
    constant."""
    wider = {key: torch.cat([getattr(ROUGH, key), torch.full((20, 3), NAN, dtype=F64)], dim=1)
             for key in ("logp", "old_logp", "entropy", "ref_logp")}
    wider["mask"] = torch.cat([ROUGH.mask, torch.zeros(20, 3, dtype=torch.bool)], dim=1)
    loss, g, _ = run(name, ROUGH, **ALL[name])
    value, g_wider, _ = run(name, ROUGH._replace(**wider), **ALL[name])
    check(f"{name}: loss with three more columns of padding", value, loss)
    check(f"{name}: gradient with three more columns of padding", g_wider[:, :7], g)


@care
@every
def test_empty_mask(name):
    """No token at all: loss 0 and gradient 0, not 0/0, and backward works."""
    nothing = torch.full((6, 5), NAN, dtype=F64)
    batch = make_batch([1, 0, 1, 0, 0, 1], 3, nothing, torch.zeros(6, 5))
    loss, g, _ = run(name, batch, **ALL[name])
    assert loss == 0, \
        f"{name}: with an all-zero mask the loss must be 0, not {loss.item()}; clamp denominators"
    assert not g.any(), f"{name}: with an all-zero mask the gradient must be 0"


@care
@every
def test_an_all_masked_group_changes_nothing(name):
    """Rows without a token are not counted in any denominator."""
    R, empty = ROUGH, torch.full((4, 7), NAN, dtype=F64)
    longer = {key: torch.cat([getattr(R, key), empty])
              for key in ("logp", "old_logp", "entropy", "ref_logp")}
    longer |= dict(mask=torch.cat([R.mask, torch.zeros(4, 7, dtype=torch.bool)]),
                   rewards=torch.cat([R.rewards, tensor([1, 0, 1, 0])]))
    loss, g, _ = run(name, R, **ALL[name])
    value, g_longer, _ = run(name, R._replace(**longer), **ALL[name])
    check(f"{name}: loss after appending a group without tokens (such rows must not be counted)",
          value, loss)
    check(f"{name}: gradient after appending a group without tokens", g_longer[:20], g)
    assert not g_longer[20:].any(), f"{name}: rows without tokens must get no gradient"


@care
@of("grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "maxrl")
def test_the_reward_of_an_all_masked_row_counts_in_its_group(name):
    """Rewards (1, 0, 0), third row empty: the mean is still 1/3, so A = 1.4142, -0.7071, not
    1, -1."""
    batch = make_batch([1, 0, 0], 3, torch.full((3, 2), -0.5, dtype=F64),
                       torch.tensor([[1, 1], [1, 1], [0, 0]]))
    _, g, _ = run(name, batch, **({"max_len": 2} if name == "dr_grpo" else {}))
    a = -g.sum(1) * (2 if name != "rloo" else 1)       # rloo sums two tokens over two rows
    check(f"{name}: advantages of rewards (1, 0, 0) when the third answer has no token", a[:2],
          oracle_advantages(name, [1, 0, 0], [0] * 3, [1] * 3, {})[:2])


@care
@every
def test_a_nan_on_a_generated_token_is_not_hidden(name):
    logp = RAGGED.logp.clone()
    logp[3, 2] = NAN                                   # a correct answer in a mixed group
    loss, _, _ = run(name, RAGGED._replace(logp=logp), **ALL[name])
    assert loss.isnan(), \
        f"{name}: NaN on a generated token must show in the loss, to stop the loop; it was hidden"


# ========================================================================== care: edges of formulas

@care
@of(*(name for name in ALL if name not in ("rloo", "passk", "pkpo")))
def test_groups_of_one(name):
    """G = 1: there is nothing to compare with, so group-relative advantages are 0 and never NaN (a
    std with ddof 1 would be 0/0)."""
    loss, g, _ = run(name, WORKED._replace(G=1), **ALL[name])
    assert loss.isfinite() and g.isfinite().all(), \
        f"{name}: groups of one must give a finite loss and gradient"
    if name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "entropy", "maxrl", "unlikeliness",
                "focal", "ucpo"):
        assert not g.any(), f"{name}: in a group of one the advantage must be 0"


@care
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1 / 3, 0.9])
@of("group_advantages", "grpo")
def test_equal_rewards_are_exactly_zero_in_float32(name, value):
    """In float32 the mean of equal numbers can be wrong in the last digit; divided by 1e-6 that is
    .01."""
    for G in range(2, 40):
        rewards, old = torch.full((2 * G,), value), torch.full((2 * G, 1), -1.0)
        if name == "group_advantages":
            a = L.group_advantages(rewards, G)
        else:
            a = run(name, Batch(old, old, torch.ones(2 * G, 1), rewards, G, None, None))[1]
        assert not a.any(), \
            f"{name}: {G} equal rewards of {value:.3g} in float32 must give exactly 0, not " \
            f"{a.abs().max():.2g}"


@care
@of("group_advantages")
def test_tiny_differences_become_full_size(name):
    """Seven 1.0 and one 1 - 1e-5: -8.75e-6 / (3.3072e-6 + 1e-6) = -2.0315; with eps under the root
    it would be -0.0087."""
    a = L.group_advantages(tensor([1] * 7 + [1 - 1e-5]), 8)
    check(f"{name}, seven 1.0 and one 1 - 1e-5 (eps = 1e-6 outside the root)", a[7], -2.031497,
          5e-5, bugs={"eps under the root": -0.00875, "eps 1e-4": -0.0847, "eps 1e-8": -2.63776,
                      "no eps": -2.645751})


@care
@of("kl")
def test_k3_is_never_negative_and_exact_for_small_d(name):
    """In float32 at d = 1e-4, exp(-d) + d - 1 is 0 or negative, expm1(-d) + d is 5.0e-9."""
    d = torch.linspace(-3, 0, 301)
    assert (L.kl(d, torch.zeros(301)) >= 0).all() and (L.kl(torch.zeros(301), d) >= 0).all(), \
        "k3 must never be negative"
    small = L.kl(torch.full((1, 1), -1e-4), torch.full((1, 1), -2e-4))
    check("k3 at d = 1e-4 in float32 (use expm1)", small, [[5e-9]], atol=5e-10)


@care
@of("rft")
def test_nothing_kept(name):
    loss, g, stats = run(name, WORKED._replace(rewards=tensor([0, .1] * 4)))
    assert loss == 0 and not g.any(), \
        f"{name}: without a correct answer loss and gradient must be 0"
    assert stats.get("kept_frac") == 0, f"{name}: stats['kept_frac'] must be 0 when nothing is kept"


@care
@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
@of("passk", "pkpo")
def test_edges_of_the_subsets(name, k):
    """c = 0, c = G, fewer wrong answers than k, k = 1, k = G: finite, and 0 if all subsets are
    equal."""
    for c in range(7):
        a = advantages(name, make_batch([1] * c + [0] * (6 - c), 6), k=k)
        assert a.isfinite().all(), f"{name}, G 6, k {k}, c {c}: advantages must be finite"
        if c == 0 or (name == "passk" and 6 - c < k) or (name == "pkpo" and 6 - c < k - 1):
            assert not a.any(), \
                f"{name}, G 6, k {k}, c {c}: every {k}-subset has the same reward, so A must be 0"


@care
@of("unlikeliness")
def test_ties_go_by_row(name):
    """Equal likelihoods: ranks 0, 1, 2 in row order. r = (1, 1, 0) gives r' = 1, 1 - .25/3, 0."""
    check_advantages(f"{name}: ties in row order", name, make_batch([1, 1, 0], 3),
                     normalised([1, 1 - .25 / 3, 0]))


# ================================================================================== care: bad input

def refused(what, call):
    """`call` must raise a ValueError of one sentence."""
    __tracebackhide__ = True
    try:
        call()
    except ValueError as error:
        if not str(error).strip() or "\n" in str(error):
            pytest.fail(f"{what}: the ValueError should say in one sentence what is wrong, not "
                        f"{str(error)!r}")
        return
    except pytest.fail.Exception:
        raise
    except Exception as error:
        pytest.fail(f"{what}: a ValueError was due, not {type(error).__name__}: {error}")
    pytest.fail(f"{what}: accepted, where a ValueError was due")


@care
@every
def test_bad_input_is_refused(name):
    """Shapes, a mask that is not 0/1, a log-probability above 0 on a generated token."""
    f = getattr(L, name)
    fine = dict(logp=torch.full((6, 4), -1.0, dtype=F64),
                old_logp=torch.full((6, 4), -1.0, dtype=F64), mask=torch.ones(6, 4, dtype=F64),
                rewards=tensor([1, 0, 1, 0, 0, 1]), group_size=3,
                entropy=torch.ones(6, 4, dtype=F64), **ALL[name])
    f(**fine)
    refused(f"{name}, mask one column short", lambda: f(**dict(fine, mask=fine["mask"][:, 1:])))
    refused(f"{name}, mask of 0.5", lambda: f(**dict(fine, mask=fine["mask"] / 2)))
    positive = fine["logp"].clone()
    positive[2, 1] = 0.3
    refused(f"{name}, a log-probability of +0.3", lambda: f(**dict(fine, logp=positive)))
    rounded = torch.where(positive > 0, 5e-5, positive)
    f(**dict(fine, logp=rounded, old_logp=rounded))    # 5e-5 above 0 is rounding, and allowed
    if name == "sft":
        return                                         # ignores old_logp, rewards and group_size
    refused(f"{name}, old_logp of another shape",
            lambda: f(**dict(fine, old_logp=fine["logp"][:, :3])))
    refused(f"{name}, an old log-probability of +0.3", lambda: f(**dict(fine, old_logp=positive)))
    refused(f"{name}, rewards one short",
            lambda: f(**dict(fine, rewards=fine["rewards"][:5], group_size=1)))
    refused(f"{name}, rewards per token", lambda: f(**dict(fine, rewards=fine["mask"])))
    refused(f"{name}, 6 rows in groups of 4", lambda: f(**dict(fine, group_size=4)))
    refused(f"{name}, group_size 0", lambda: f(**dict(fine, group_size=0)))
    refused(f"{name}, a reward of NaN", lambda: f(**dict(fine, rewards=fine["rewards"] * NAN)))


@care
@of("reinforce", "rloo", *CLIPPED)
def test_beta_without_reference_is_refused(name):
    """A KL weight without reference log-probabilities must not become a silent zero."""
    W, options = WORKED, dict(ALL[name], beta=0.1, entropy=WORKED.entropy)
    refused(f"{name}, beta 0.1 without ref_logp",
            lambda: getattr(L, name)(W.logp, W.old_logp, W.mask, W.rewards, 4, **options))


@care
@of("entropy")
def test_coefficient_without_its_input_is_refused(name):
    W = WORKED
    refused(f"{name}, coefficient 0.1 without entropy",
            lambda: L.entropy(W.logp, W.old_logp, W.mask, W.rewards, 4, entropy_coef=0.1))


@care
@of(*CLIPPED)
def test_unknown_agg_is_refused(name):
    refused(f"{name}, agg 'mean'", lambda: run(name, RAGGED, **dict(ALL[name], agg="mean")))


@care
@of("diffsmooth", "diffsmooth_reward")
def test_unknown_reduction_is_refused(name):
    refused(f"{name}, reduction 'avg'",
            lambda: run(name, RAGGED, **dict(ALL[name], reduction="avg")))


@care
@of("kl")
def test_unknown_kind_is_refused(name):
    refused("kl, kind 'k4'", lambda: L.kl(tensor([[-1.0]]), tensor([[-1.5]]), "k4"))


@care
@pytest.mark.parametrize("k", [0, 5])
@of("passk", "pkpo")
def test_k_outside_the_group_is_refused(name, k):
    refused(f"{name}, k = {k} with groups of 4", lambda: run(name, RAGGED, k=k))


@care
@of("rloo", "group_advantages")
def test_group_sizes_that_a_formula_cannot_take_are_refused(name):
    if name == "rloo":
        refused(f"{name}, groups of one (no other answer to compare with)",
                lambda: run(name, WORKED._replace(G=1)))
    else:
        refused(f"{name}, 5 rewards in groups of 2",
                lambda: L.group_advantages(tensor([1, 0, 1, 0, 0]), 2))


@care
@of("maxrl", "unlikeliness")
def test_negative_rewards_are_refused_where_the_formula_needs_them_positive(name):
    """MaxRL divides by the mean reward; a rank that shrinks a reward of -1 would favour likely
    mistakes."""
    refused(f"{name}, rewards of -1", lambda: run(
        name, RAGGED._replace(rewards=2 * RAGGED.rewards - 1)))


@care
@of(*CORRECT_IS_ONE)
def test_rewards_above_one_are_refused_where_correct_means_one(name):
    """With a bonus on top (1.1) a correct answer would silently count as wrong."""
    refused(f"{name}, rewards of 1.1", lambda: run(
        name, RAGGED._replace(rewards=1.1 * RAGGED.rewards), **ALL[name]))


# ====================================================================================== care: stats

@care
@every
def test_stats_are_a_flat_dict_of_floats(name):
    _, _, stats = run(name, ROUGH, **ALL[name])
    for key in ("adv_abs", "ratio_max", "clip_frac", "kl_old"):
        assert key in stats, f"{name}: stats lacks '{key}'"
    for key, value in stats.items():
        assert type(value) is float and math.isfinite(value), \
            f"{name}: stats['{key}'] must be a finite Python float, not {value!r}"


@care
@of("grpo")
def test_stats_of_the_worked_batch(name):
    """Rows 1 (A > 0, ratio 1.35), 4 (A < 0, .74), 7 (A < 0, .67) are clipped: 1 + 2 + 1 of 17
    tokens, not |ratio - 1| > .2.

    ratio_max e^.4; mean |A| (4 * .999998 + 1.732047 + 3 * .577349) / 8; kl_old is the mean of
    ratio - 1 - log ratio.
    """
    _, _, stats = run(name, WORKED_NAN)
    check(f"{name}: stats['clip_frac']", stats["clip_frac"], 4 / 17, 1e-6,
          bugs={"|ratio - 1| > .2, which over-counts": 7 / 17, "a mean over padding too": 4 / 24})
    check(f"{name}: stats['ratio_max']", stats["ratio_max"], math.exp(.4), 1e-6)
    check(f"{name}: stats['adv_abs']", stats["adv_abs"], (4 * .999998 + 1.732047 + 3 * .577349) / 8,
          1e-6)
    d = (WORKED.logp - WORKED.old_logp)[WORKED.mask]
    check(f"{name}: stats['kl_old'], k3 of tokens drawn from the old policy", stats["kl_old"],
          (d.exp() - 1 - d).mean(), 1e-6,
          bugs={"the other direction": (torch.exp(-d) - 1 + d).mean()})
    d = (WORKED.logp - WORKED.ref_logp)[WORKED.mask]
    check(f"{name}: stats['kl'], k3 to the reference", stats["kl"], (torch.exp(-d) - 1 + d).mean(),
          1e-6)


@care
@of(*RL)
def test_stats_on_policy(name):
    stats = run(name, ROUGH._replace(logp=ROUGH.old_logp), **ALL[name])[2]
    check(f"on-policy, {name}: stats ratio_max, clip_frac, kl_old",
          [stats[key] for key in ("ratio_max", "clip_frac", "kl_old")], [1, 0, 0])


@care
@pytest.mark.parametrize("A, ratio, clip_high, loss, slope", CLIP)
@of("grpo", "w_reinforce", "dapo", "dr_grpo")
def test_clip_frac(name, A, ratio, clip_high, loss, slope):
    """A token counts if the clip removes its gradient: 1 of 2 where the slope is 0."""
    old = column([-2, -2])
    logp = old + column([math.log(ratio), 0] if A > 0 else [0, math.log(ratio)])
    stats = run(name, make_batch([1, 0], 2, old, logp=logp), clip_low=.2, clip_high=clip_high)[2]
    check(f"{name}, A = {A:+d}, ratio {ratio}, clip .2/{clip_high}: stats['clip_frac']",
          stats["clip_frac"], .5 if slope == 0 else 0)


@care
@cases("name, expected", [("gspo", 7 / 17), ("cispo", 0)])
def test_clip_frac_of_other_clips(name, expected):
    """gspo: a clipped answer has no gradient on any token: rows 1, 4, 5 and 7, 7 of 17 tokens.
    cispo clips no gradient."""
    check(f"{name}: stats['clip_frac']", run(name, WORKED_NAN)[2]["clip_frac"], expected, 1e-6)


@care
@pytest.mark.parametrize("rewards", [(1, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0)],
                         ids=["mixed", "all correct", "all wrong"])
@of("diffsmooth", "diffsmooth_reward")
def test_ds_ratio(name, rewards):
    """Above 0 where a gamma is, and 0 with both gammas 0."""
    batch = make_batch(rewards, 4, tensor([[-1, -2], [-2, -3], [-1, -1], [-3, -1]]))
    stats, off = (run(name, batch, **dict(ALL[name], **more))[2]
                  for more in ({}, dict(gamma_p=0.0, gamma_n=0.0)))
    assert stats["ds_ratio"] > 0, f"{name}: stats['ds_ratio'] must be above 0 when a gamma is"
    assert off["ds_ratio"] == 0, f"{name}: stats['ds_ratio'] must be 0 with both gammas 0"


@care
@of("rft")
def test_kept_frac(name):
    check(f"{name}: stats['kept_frac']", run(name, IMITATED)[2]["kept_frac"], .5)


@care
def test_every_test_here_is_core_or_care():
    """`-m core` and `-m care` together are all of this file."""
    for key, test in list(globals().items()):
        if key.startswith("test_"):
            marks = [mark.name for mark in test.pytestmark if mark.name in ("core", "care")]
            assert len(marks) == 1, f"{key} must be marked core or care"
