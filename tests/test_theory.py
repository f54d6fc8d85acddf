"""The theory of differential smoothing (arXiv 2511.19942) as a program.

Every claim is computed; none is sampled unless sampling is the claim.

One problem is a finite set of trajectories with a base policy b and a reward r in {0, 1}: correct
means r == 1. Everything here follows from one fact. An objective  E_pi[s] - lam KL(pi || c)  has
the maximiser  pi* ∝ c e^{s/lam},  because it equals  lam log Z - lam KL(pi || pi*)  for EVERY pi.
And one identity is used again and again: split a policy into its correctness C, its conditional
law q on the correct set and w on the wrong set; then
    KL(pi || b) = KL(C || B) + C KL(q || b_correct) + (1 - C) KL(w || b_wrong),
where B is the C of the base policy.

Three things are not as a first reading of the paper suggests. They are computed below:
- Theorem 3.4 with gamma_n >= 0 fails if entropy is strong and reward weak (test_6c); with
  gamma_n < 0 allowed it always holds (test_6d).
- At equal KL to the base an entropy PENALTY lowers C too: pi_van is the best policy at its KL
  (test_5b).
- A problem with its own policy cannot lose Pass@k under the exact gradient; problems that SHARE a
  policy do (test_4b).

    python tests/test_theory.py     # the table: claim, random cases, worst error, verdict
    pytest tests/test_theory.py     # the same as tests
"""
import importlib
import itertools
import math
import os
import sys

import numpy as np
import torch

ROWS = []  # what the table prints: (claim, number of random cases, worst error, verdict)


# ------------------------------------------------------------------------------------- closed forms
# b is (..., K), r is (K,) or (..., K); scalars may also be (N, 1), to go with (N, K) policies.

def gibbs(log_weight):
    """The distribution ∝ e^log_weight (a softmax). Example: gibbs(log b) = b."""
    w = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def pi_van(b, r, beta):
    """Eq. 1: the maximiser of  E r - beta KL(pi || b)."""
    return gibbs(np.log(b) + r / beta)


def pi_ent(b, r, beta, gamma):
    """The maximiser of  E r + gamma H(pi) - beta KL(pi || b);  gamma > 0 is the bonus, gamma < 0
    the penalty."""
    a = beta / (beta + gamma)  # b^a is flatter than b for a bonus, sharper for a penalty
    return gibbs(a * np.log(b) + r / (beta + gamma))


def pi_ds(b, r, beta, gamma_p, gamma_n):
    """The maximiser of  E r_DS - beta KL(pi || b)."""
    r_ds = np.where(r == 1, r - gamma_p * np.log(b), r + gamma_n * np.log(b))  # Eq. 4
    return gibbs(np.log(b) + r_ds / beta)


def correctness(pi, r):
    """C(pi): the probability of a correct trajectory, that is Pass@1."""
    return (pi * r).sum(-1)


def diversity(pi, r):
    """sigma(pi) = 1 - sum q^2, q = pi given correct. Example: two equally likely correct answers
    give 0.5."""
    q = given(pi, r)
    return 1 - (q * q).sum(-1)


def pass_at_k(c, k):
    """The chance that one of k independent samples is correct, where each is with probability c."""
    return 1 - (1 - c) ** k


def given(pi, event):
    """pi conditioned on a set, given by its 0/1 indicator."""
    return pi * event / (pi * event).sum(-1, keepdims=True)


def kl(p, q):
    """KL(p || q); 0 log 0 = 0."""
    return (p * np.log(np.where(p > 0, p / np.where(q > 0, q, 1), 1))).sum(-1)


def kl_bernoulli(c, d):
    return c * np.log(c / d) + (1 - c) * np.log((1 - c) / (1 - d))


def logit(p):
    return np.log(p) - np.log1p(-p)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ----------------------------------------------------------------------------- helpers of the tests

def problems(n, K, seed, spread=1.0, correct=2):
    """n random problems: b (n, K) with normal logits, r (n, K) with at least `correct` correct ones
    and two wrong."""
    rng = np.random.default_rng(seed)
    b = gibbs(spread * rng.normal(size=(n, K)))
    n_right = rng.integers(correct, K - 1, size=(n, 1))
    r = (rng.random((n, K)).argsort(1).argsort(1) < n_right).astype(float)
    return b, r, rng


def bisect(f, lo, hi, steps=100):
    """Roots of increasing functions, elementwise; f(lo) <= 0 <= f(hi), the result has f <= 0."""
    lo, hi = np.broadcast_arrays(np.asarray(lo, float), np.asarray(hi, float))
    for _ in range(steps):
        mid = (lo + hi) / 2
        low = f(mid) <= 0
        lo, hi = np.where(low, mid, lo), np.where(low, hi, mid)
    return lo


def record(claim, cases, worst, verdict):
    ROWS.append((claim, str(cases), worst if isinstance(worst, str) else f"{worst:.0e}", verdict))


# -------------------------------------------------------------------- 1. The three optimal policies

def test_1a_closed_forms():
    """Claim: the maximisers of Eq. 1, of its entropy-regularised version and of the Eq. 4 objective
    are the three Gibbs policies above.
    Proof: J(pi*) - J(pi) = lam KL(pi || pi*) for every pi, lam = beta, or beta + gamma with the
    entropy term.
    Numbers: each J is written in torch as in the paper and climbed by gradient ascent on logits,
    from uniform: the result and the closed form agree to 1e-8; and the identity of the proof holds
    at random pi, to 1e-12.
    """
    n, K = 60, 6
    b, r, rng = problems(n, K, seed=10, spread=.7)
    beta, share = rng.uniform(.7, 2, (n, 1)), rng.uniform(-.3, 1, (n, 1))
    gamma, gamma_p = share * beta, rng.uniform(0, 1, (n, 1)) * beta
    gamma_n = rng.uniform(0, .5, (n, 1)) * beta
    closed = np.stack([pi_van(b, r, beta), pi_ent(b, r, beta, gamma),
                       pi_ds(b, r, beta, gamma_p, gamma_n)])
    lam = torch.tensor(np.stack([beta, beta + gamma, beta])[..., 0])  # (3, n)
    tb, tr, tbeta, tgamma, tgp, tgn = map(torch.tensor, (b, r, beta, gamma, gamma_p, gamma_n))

    def objectives(pi):  # (3, n, K) -> (3, n), the objectives as printed
        KL = lambda p: (p * (p / tb).log()).sum(-1)
        H = lambda p: -(p * p.log()).sum(-1)
        r_ds = torch.where(tr == 1, tr - tgp * tb.log(), tr + tgn * tb.log())  # Eq. 4
        reward = torch.stack([(pi[0] * tr).sum(-1), (pi[1] * tr).sum(-1) + tgamma[:, 0] * H(pi[1]),
                              (pi[2] * r_ds).sum(-1)])
        return reward - tbeta[:, 0] * KL(pi)

    z = torch.zeros(3, n, K, dtype=torch.float64, requires_grad=True)
    ascent = torch.optim.SGD([z], lr=1, momentum=.9, nesterov=True, maximize=True)
    for _ in range(2500):
        ascent.zero_grad()
        # J / lam: one step size fits every problem.
        (objectives(z.softmax(-1)) / lam).sum().backward()
        ascent.step()
    error = np.abs(z.detach().softmax(-1).numpy() - closed).max()
    assert error < 1e-8, f"gradient ascent and the closed form differ by {error:.1e}"

    pi = gibbs(rng.normal(size=(3, n, K)))
    gap = (objectives(torch.tensor(closed)) - objectives(torch.tensor(pi))).numpy()
    identity = np.abs(gap - lam.numpy() * kl(pi, closed)).max()
    assert identity < 1e-12, f"J(pi*) - J(pi) is not lam KL(pi || pi*): off by {identity:.1e}"
    record("1a  pi_van, pi_ent, pi_DS are these Gibbs policies", 3 * n, error, "shown")


def test_1b_pi_old_for_pi_base():
    """Claim: using pi_old for pi_base in Eq. 4 is a re-parametrisation (the paper says so, and
    trains that way).
    Proof: one step with base pi_t multiplies the exponent of b by x = 1 - gamma_p/beta on the
    correct set and by y = 1 + gamma_n/beta on the wrong one. After T steps the exponents are x^T
    and y^T, and all constants together only set C: again Eq. 4's family around b, with
    gamma_p'/beta' = 1 - x^T, gamma_n'/beta' = y^T - 1.
    Numbers: T = 4 steps equal ONE step of Eq. 4 with the primed values, to 1e-12. The condition:
    1/beta', read off C, must be positive: always so if gamma_n = 0 (every Z >= 1 then), else in the
    share of cases that the table gives.
    """
    n, K, T = 2000, 8, 4
    b, r, rng = problems(n, K, seed=11)
    beta = rng.uniform(.5, 10, (n, 1))
    gamma_p, gamma_n = rng.uniform(0, .9, (n, 1)) * beta, rng.uniform(0, .9, (n, 1)) * beta
    gamma_n[: n // 2] = 0
    pi = b
    for _ in range(T):
        # Eq. 4 with pi_old.
        r_ds = np.where(r == 1, r - gamma_p * np.log(pi), r + gamma_n * np.log(pi))
        pi = gibbs(np.log(pi) + r_ds / beta)
    x, y = (1 - gamma_p / beta) ** T, (1 + gamma_n / beta) ** T
    # pi_DS has log odds of C = 1/beta + log sum_correct b^x - log sum_wrong b^y: solved for 1/beta
    log_odds = np.log((pi * r).sum(-1) / (pi * (1 - r)).sum(-1))
    one_over_beta = log_odds + np.log((b**y * (1 - r)).sum(-1) / (b**x * r).sum(-1))
    beta1 = 1 / one_over_beta[:, None]
    error = np.abs(pi_ds(b, r, beta1, (1 - x) * beta1, (y - 1) * beta1) - pi).max()
    assert error < 1e-11, f"four steps with pi_old are not one step of Eq. 4: off by {error:.1e}"
    valid = one_over_beta > 0
    assert valid[: n // 2].all(), "1/beta' must be positive where gamma_n = 0"
    record("1b  pi_old in Eq. 4 = pi_base with other beta, gammas", n, error,
           f"shown; beta' > 0 always if gamma_n = 0, else in {valid[n // 2:].mean():.0%}")


# ----------------------------------------------------------- 2 and 3. Where the collapse comes from

def reinforced(pick, b, r, beta):
    """Which trajectories gain from one group: pick (S, n) sampled indices -> two (S, K) boolean
    arrays.

    First by the paper's model, pi_van of the reward that knows the sampled trajectories only; then
    by GRPO's sign.
    """
    known = np.zeros((len(pick), len(b)))
    np.put_along_axis(known, pick, 1, axis=1)
    advantage = r - r[pick].mean(1, keepdims=True)  # Eq. 5 up to a positive factor, (S, K)
    return pi_van(b, known * r, beta) > b * (1 + 1e-12), known * r * advantage > 0


def test_2_selection_bias():
    """Claim: the chance that a correct trajectory is reinforced rises with its base probability b.
    Proof: with reward known on the n sampled trajectories only, Z = sum b e^{r^/beta} < e^{1/beta},
    so exactly the sampled correct ones gain: P = 1 - (1-b)^n. GRPO's advantage is positive on them
    too unless the whole group is correct: P = 1 - (1-b)^n - B^n + (B-b)^n, with slope n((1-b)^{n-1}
    - (B-b)^{n-1}) > 0 at fixed B.
    Numbers: both formulas against ALL K^n groups (K 5, n 4), exact; then against 20,000 simulated
    groups (K 9, n 8): every deviation within 4.5 standard errors and about 95 % within 1.96.
    """
    P_model = lambda b, n: 1 - (1 - b) ** n
    P_grpo = lambda b, B, n: 1 - (1 - b) ** n - B**n + (B - b) ** n

    error = 0
    bs, rs, rng = problems(40, 5, seed=20)
    groups = np.array(list(itertools.product(range(5), repeat=4)))  # (625, 4)
    for b, r in zip(bs, rs):
        weight = b[groups].prod(1)[:, None]
        model, grpo = reinforced(groups, b, r, beta=.7)
        right = r == 1
        p, B = b[right], correctness(b, r)
        error = max(error, np.abs((weight * model).sum(0)[right] - P_model(p, 4)).max(),
                    np.abs((weight * grpo).sum(0)[right] - P_grpo(p, B, 4)).max())
        by_b = np.argsort(p)
        for what, gains in (("pi_van", model), ("GRPO's advantage", grpo)):
            chance = (weight * gains).sum(0)[right][by_b]
            assert (np.diff(chance) > 0).all(), f"{what}: likelier must mean reinforced more often"
    assert error < 1e-12, f"formula and enumeration differ by {error:.1e}"

    z, S = [], 20_000
    for b, r in zip(*problems(20, 9, seed=21)[:2]):
        pick = rng.choice(9, size=(S, 8), p=b)
        for got, P in zip(reinforced(pick, b, r, beta=.7),
                          (P_model(b, 8), P_grpo(b, correctness(b, r), 8))):
            z += list(((got.mean(0) - P) / np.sqrt(P * (1 - P) / S))[r == 1])
    z = np.abs(z)
    assert z.max() < 4.5 and (z < 1.96).mean() > .85, \
        f"the simulation leaves its interval: worst {z.max():.1f} s.e."
    record("2   selection bias: P(reinforced) rises with b", 40, error,
           f"shown; simulated {len(z)} P's: {(z < 1.96).mean():.0%} in their 95% interval")


def test_3a_reinforcement_bias():
    """Claim: a reinforced trajectory gains b (e^{1/beta}/Z - 1), in proportion to b; all others,
    the wrong ones among them, lose b (1 - 1/Z): the likely mistake loses most. DS turns the first
    around.
    Proof: pi_van = b e^{r^/beta}/Z. Note what it does NOT say: within one set the factor is the
    same for all, so the conditional laws stay; it is selection (test 2) that makes the EXPECTED
    relative gain rise with b. Under pi_DS the factor is b^{-gamma_p/beta} e^{1/beta}/Z, larger for
    the rare.
    Numbers: 2,000 random groups, errors at rounding; the expected relative gain over all K^n groups
    rises with b in every problem; under pi_DS with full knowledge the relative gain falls with b in
    every problem.
    """
    n_cases, K, beta = 2000, 8, .7
    b, r, rng = problems(n_cases, K, seed=30)
    pick = np.stack([rng.choice(K, 6, p=p) for p in b])
    known = np.zeros_like(b)
    np.put_along_axis(known, pick, 1, axis=1)
    r_hat = known * r
    Z = (b * np.exp(r_hat / beta)).sum(-1, keepdims=True)
    gain = pi_van(b, r_hat, beta) - b
    error = np.abs(gain - b * np.where(r_hat == 1, np.exp(1 / beta) / Z - 1, 1 / Z - 1)).max()
    assert error < 1e-14, f"gain is not proportional to b: off by {error:.1e}"
    assert (gain[r_hat == 1] > 0).all() and (gain[r_hat == 0] < 1e-15).all()

    groups = np.array(list(itertools.product(range(5), repeat=4)))
    seen = np.zeros((len(groups), 5))
    np.put_along_axis(seen, groups, 1, axis=1)
    for b5, r5 in zip(*problems(40, 5, seed=31)[:2]):
        mean = (b5[groups].prod(1)[:, None] * pi_van(b5, seen * r5, beta)).sum(0)
        right = np.flatnonzero(r5 == 1)
        right = right[np.argsort(b5[right])]
        gain5 = (mean / b5)[right]
        assert (np.diff(gain5) > 0).all(), "the expected relative gain must rise with b"
        ds = pi_ds(b5, r5, beta, gamma_p=.3, gamma_n=0)
        assert (np.diff((ds / b5)[right]) < 0).all(), "under DS the rare correct one must gain most"
    record("3a  gain = b (e^{1/beta}/Z - 1), loss = b (1 - 1/Z)", n_cases, error,
           "shown; DS: the rare gain most")


def test_3b_wrong_trajectories_reversed():
    """Claim: under the policy gradient the likely correct trajectory gains most even in RATIO, and
    on wrong ones the dynamic is reversed: the likely mistake loses most. So correct answers sharpen
    while wrong ones flatten.
    Proof: dE r/dz_i = pi_i (r_i - C). After a step eta, log(pi'/pi) = eta pi_i (r_i - C) - const,
    for ANY eta: increasing in pi_i where r_i = 1, decreasing where r_i = 0.
    Numbers: autograd through the softmax, three step sizes, 500 problems: log-ratio as stated, to
    rounding; both orders hold in every case, so sigma falls on the correct set and rises on the
    wrong one.
    """
    n, K, error = 500, 8, 0
    b, r, _ = problems(n, K, seed=32)
    z = torch.tensor(np.log(b), requires_grad=True)
    (z.softmax(-1) * torch.tensor(r)).sum().backward()
    C = correctness(b, r)[:, None]
    for eta in (.1, 1., 5.):
        new = gibbs(np.log(b) + eta * z.grad.numpy())
        step = np.log(new / b) - eta * b * (r - C)  # should be the same constant for all i
        error = max(error, np.abs(step - step.mean(-1, keepdims=True)).max())
        assert (diversity(new, r) < diversity(b, r)).all(), "correct answers must sharpen"
        assert (diversity(new, 1 - r) > diversity(b, 1 - r)).all(), "wrong answers must flatten"
    assert error < 1e-13, f"the step is not eta pi (r - C) + const: off by {error:.1e}"
    record("3b  policy gradient sharpens correct, flattens wrong ones", 3 * n, error,
           "shown, for any step size")


# ---------------------------------------------------------------------------- 4. Sharpening in time

def flow(b, r, gamma_p=0., gamma_n=0., stop=None, dt=1., steps=2500, watch=None):
    """Exact policy-gradient flow dz = pi (A - E A) from b (RK4); A = r, with the DS term of Eq. 6
    where gammas say so.

    r may be a MEAN over problems that share the policy: then A is the mean over problems of each
    one's r_DS. stop(pi) (n,) ends a row where it turns positive (interpolated there); rows that
    never do run to the end.
    """
    z, n = np.log(b), len(b)
    out, done = z.copy(), np.zeros(n, bool)

    def dz(z):
        pi = gibbs(z)
        A = r - gamma_p * r * np.log(pi) + gamma_n * (1 - r) * np.log(pi)
        return pi * (A - (pi * A).sum(-1, keepdims=True))

    before = stop(b) if stop else None
    for _ in range(steps):
        k1 = dz(z)
        k2 = dz(z + dt / 2 * k1)
        k3 = dz(z + dt / 2 * k2)
        k4 = dz(z + dt * k3)
        new = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if watch:
            watch(gibbs(z), gibbs(new))
        if stop:
            after = stop(gibbs(new))
            hit = ~done & (after >= 0)
            out[hit] = (z + (-before / (after - before))[:, None] * (new - z))[hit]
            done |= hit
            before = after
            if done.all():
                break
        z = new
    out[~done] = z[~done]
    return gibbs(out)


def test_4a_flow_sharpens():
    """Claim: along the exact policy-gradient flow of one problem C rises and sigma falls, at every
    moment.
    Proof: d/dt log(q_i/q_j) = (1 - C)(pi_i - pi_j) on the correct set: the richer gets richer, so
    q(t) majorises q(s) for t > s, and sigma is Schur-concave. On the wrong set the factor is -C: it
    flattens. dC/dt = |grad C|^2.
    Numbers: three monotone statements in 300 problems x 200 steps of time 0.5. Since C never falls,
    neither does Pass@k for ANY k: a problem that has its policy to itself does not show the Pass@k
    drop (for that see 4b).
    """
    b, r, _ = problems(300, 10, seed=40)
    worst = [0.]

    def watch(old, new):
        rise_C = correctness(new, r) - correctness(old, r)
        fall_s = diversity(old, r) - diversity(new, r)
        rise_w = diversity(new, 1 - r) - diversity(old, 1 - r)
        worst[0] = min(worst[0], rise_C.min(), fall_s.min(), rise_w.min())

    end = flow(b, r, dt=.5, steps=200, watch=watch)
    assert worst[0] > -1e-12, f"C, -sigma or sigma of the wrong set went down by {-worst[0]:.1e}"
    assert (correctness(end, r) > correctness(b, r)).all()
    assert (diversity(end, r) < diversity(b, r)).all()
    record("4a  flow, one problem: C up, sigma down, at all times", 300, abs(worst[0]),
           f"shown; mean C {correctness(b, r).mean():.2f}->{correctness(end, r).mean():.2f}, "
           f"sigma {diversity(b, r).mean():.2f}->{diversity(end, r).mean():.2f}")


def shared(n=200, S=8, W=8, m=2, seed=41):
    """S problems that share ONE policy over S strategies and W hopeless ones; strategy s solves
    problems s .. s+m-1.

    Returns b (n, S+W), the rate r (S+W,) of problems that each trajectory solves, and pass@k of a
    policy (n,). Each problem has m correct strategies: m is the solution multiplicity.
    """
    b = gibbs(np.random.default_rng(seed).normal(size=(n, S + W)))
    solves = np.zeros((S, S + W))
    for s in range(S):
        solves[(s + np.arange(m)) % S, s] = 1
    return b, solves.mean(0), lambda pi, k: pass_at_k(pi @ solves.T, k).mean(1)


def test_4b_pass_at_k_falls():
    """Claim: RL raises Pass@1 and lowers Pass@k for large k below the base model.
    Proof: not for a problem alone (4a). Let problems share a policy, as prompts share weights: the
    flow concentrates on one strategy, Pass@k tends to the share of problems which that one solves,
    and base Pass@k tends to 1 as k grows.
    Numbers: 200 random bases, 8 problems, m = 2, flow up to 90 % of mass on useful strategies:
    Pass@1 up in all, sigma down in all; Pass@64 below the base in nearly all (the table), not by
    theorem at a fixed k: stopped at 70 % it is below in half of them, at 97 % in all; after long
    training (time 50,000; 20 bases) in all.
    """
    b, r, passk = shared()
    useful = (r > 0).astype(float)
    van = flow(b, r, stop=lambda pi: correctness(pi, useful) - .9)
    late = flow(b[:20], r, dt=10, steps=5000)
    assert (passk(van, 1) > passk(b, 1)).all()
    assert (diversity(van, useful) < diversity(b, useful)).all()
    fell, fell_late = passk(van, 64) < passk(b, 64), passk(late, 64) < passk(b[:20], 64)
    assert fell.mean() > .9 and fell_late.all(), \
        f"Pass@64 fell in {fell.mean():.0%} ({fell_late.mean():.0%} late)"
    record("4b  shared policy: Pass@1 up, Pass@64 below base", 200, f"{(~fell).sum()} of 200",
           f"shown in {fell.mean():.0%} (late: all); Pass@1 "
           f"{passk(b, 1).mean():.2f}->{passk(van, 1).mean():.2f}, "
           f"@16 {passk(b, 16).mean():.2f}->{passk(van, 16).mean():.2f}, "
           f"@64 {passk(b, 64).mean():.2f}->{passk(van, 64).mean():.2f}")


def test_4c_ds_ends_higher():
    """Claim: with the DS term both C and Pass@k end higher; smoothing of the correct trajectories
    alone is enough.
    Idea: vanilla's flow spends KL on sharpening q (4a) and wins nothing for it. The DS term keeps q
    near b, so the same KL to the base buys more C.
    Numbers: DS (gamma_p 0.3, gamma_n 0) stopped at the KL of vanilla's run of 4b. Not a theorem:
    the table gives the share of 200 bases where C and Pass@64 are BOTH higher; a scan gave 99, 99,
    98, 89 % at gamma_p 0.03, 0.1, 0.3, 1. gamma_p alone is enough: adding gamma_n = 0.1 lowers both
    (last share; what fails on this problem is right on another). 0.03 would do no visible harm, nor
    0.1 where m = 4: the harm is that of a gamma_n large for the task.
    """
    b, r, passk = shared()
    useful = (r > 0).astype(float)
    van = flow(b, r, stop=lambda pi: correctness(pi, useful) - .9)
    budget = kl(van, b)
    ds = flow(b, r, gamma_p=.3, stop=lambda pi: kl(pi, b) - budget)
    both = flow(b, r, gamma_p=.3, gamma_n=.1, stop=lambda pi: kl(pi, b) - budget)
    spent = kl(ds, b)
    assert (spent <= budget * (1 + 1e-3)).all(), "the comparison must be at equal KL, or at less"
    more_C, more_P = passk(ds, 1) > passk(van, 1), passk(ds, 64) > passk(van, 64)
    assert (more_C & more_P).mean() > .95, \
        f"DS is ahead in both in {(more_C & more_P).mean():.0%} only"
    for k in (1, 64):
        assert passk(ds, k).mean() > passk(both, k).mean()
    alone = (passk(both, 1) < passk(ds, 1)) & (passk(both, 64) < passk(ds, 64))
    record("4c  DS at the same KL: C and Pass@64 higher", 200,
           f"{(~(more_C & more_P)).sum()} of 200",
           f"shown in {(more_C & more_P).mean():.0%}: Pass@1 {passk(ds, 1).mean():.3f} "
           f"(van {passk(van, 1).mean():.3f}), @16 {passk(ds, 16).mean():.2f}, @64 "
           f"{passk(ds, 64).mean():.2f}; "
           f"gamma_n .1 worse in {alone.mean():.0%}")


# --------------------------------------------------------------------- 5. Entropy bonus and penalty

def test_5a_bonus_raises_sigma():
    """Claim: an entropy bonus raises sigma, a penalty lowers it, whatever the reward, beta or KL.
    Proof: pi_ent given correct is q_a ∝ b^a: only a = beta/(beta + gamma) matters, a < 1 for a
    bonus, and q_a for the larger a majorises q_a for the smaller one.
    Numbers: 5 values of gamma in 2,000 problems, strictly ordered in all.
    """
    b, r, rng = problems(2000, 8, seed=50)
    beta = rng.uniform(.3, 3, (2000, 1))
    sigma = np.stack([diversity(pi_ent(b, r, beta, g * beta), r) for g in (-.5, -.2, 0, .3, 2)])
    wrong = (np.diff(sigma, axis=0) <= 0).sum()
    assert wrong == 0, f"sigma must rise with gamma; {wrong} steps fell"
    record("5a  entropy bonus raises sigma, penalty lowers it", 2000, f"{wrong} violated", "shown")


def test_5b_bonus_and_C():
    """Claim: a bonus lowers C at equal KL, and a penalty raises it. The first half is true. The
    second is NOT.
    Proof: pi_van maximises E r - beta KL, so no other policy has its C at its KL: both heuristics
    lower C. At equal beta:  dlogit C/dgamma at 0 = -(1 + beta (E_q log b - E_w log b))/beta^2. A
    bonus lowers C and a penalty raises it, unless the correct answers are on average 1/beta nats
    less likely than the wrong ones.
    Numbers: gamma = +-0.3 beta, 2,000 problems. Equal KL: both lower C in all. Equal beta: the
    derivative is as stated (central differences, relative error); the table gives how often the
    bonus lowers C, with random b.
    """
    n = 2000
    b, r, rng = problems(n, 8, seed=51)
    beta = rng.uniform(.3, 3, (n, 1))
    van = pi_van(b, r, beta)
    B, budget = correctness(b, r), kl(van, b)

    worse, cases = {}, {}
    for name, g in (("bonus", .3), ("penalty", -.3)):
        ent = pi_ent(b, r, beta, g * beta)
        kl_q, kl_w = kl(given(ent, r), given(b, r)), kl(given(ent, 1 - r), given(b, 1 - r))
        price = lambda x: kl_bernoulli(sigmoid(x), B) + sigmoid(x) * kl_q + sigmoid(-x) * kl_w
        cost = lambda x: price(x) - budget
        # Logit of the C with the least KL; from there on KL rises with C.
        cheapest = logit(B) - kl_q + kl_w
        fits = cost(cheapest) < 0  # else not even the flattening alone fits into the budget
        # The LARGEST C at this KL with the conditional laws of pi_ent.
        C = sigmoid(bisect(cost, cheapest, 30.))
        worse[name], cases[name] = (C < correctness(van, r))[fits], fits.sum()
    assert worse["bonus"].all() and worse["penalty"].all(), \
        "pi_van must have the largest C at its KL"

    h = 1e-4
    up, down = (logit(correctness(pi_ent(b, r, beta, x), r)) for x in (h, -h))
    slope = (up - down) / (2 * h)
    mean_log = lambda event: (given(b, event) * np.log(b)).sum(-1)
    beta = beta[:, 0]
    # The law q of pi_van is that of b.
    predicted = -(1 / beta**2 + (mean_log(r) - mean_log(1 - r)) / beta)
    error = np.abs(slope - predicted).max() / np.abs(predicted).max()
    assert error < 1e-6, f"dlogit C / dgamma is not as derived: {error:.1e}"
    record("5b  equal KL: bonus lowers C", cases["bonus"], f"{(~worse['bonus']).sum()} violated",
           "shown")
    record("5b' equal KL: penalty raises C", cases["penalty"], f"{worse['penalty'].sum()} violated",
           "contradicted: it lowers C too (pi_van is optimal at its KL)")
    record("5b\" equal beta: bonus lowers C, penalty raises it", n, error,
           f"holds iff 1 + beta(E_q log b - E_w log b) > 0: {(predicted < 0).mean():.0%} of draws")


def heuristic(m, B, a, k, wrong=32, rollouts=8, budget=.2):
    """Mean Pass@k of a task after KL-regularised training with b^a: a < 1 bonus, a = 1 none, a > 1
    penalty.

    Every problem has m correct trajectories that share base mass B, and `wrong` others. Reward is
    heard only where one of `rollouts` base samples is correct; on the deaf problems the entropy
    term acts alone. The reward weight is chosen so that the mean KL over both kinds is `budget`. B
    and k may be arrays (N, 1) and (N,).
    """
    r = np.concatenate([np.ones(m), np.zeros(wrong)])
    log_b = np.log(np.where(r == 1, B / m, (1 - B) / wrong))
    b, B = np.exp(log_b), np.ravel(B)
    heard, deaf = 1 - (1 - B) ** rollouts, gibbs(a * log_b)
    tilted = lambda u: gibbs(a * log_b + u[..., None] * r)
    cost = lambda u: heard * kl(tilted(u), b) + (1 - heard) * kl(deaf, b) - budget
    # tilted(start) has C = B; from there on KL rises with u.
    start = logit(B) - logit(correctness(deaf, r))
    assert (cost(start) < 0).all(), "flattening alone is over the budget"
    u = bisect(cost, start, start + 30, steps=60)
    trained, other = (pass_at_k(correctness(pi, r), k) for pi in (tilted(u), deaf))
    return heard * trained + (1 - heard) * other


def test_5c_multiplicity_decides():
    """Claim: which of bonus and penalty helps Pass@k depends on solution multiplicity (bonus where
    it is high).
    Proof: where no reward is heard, pi ∝ b^a and dlogit C/da = E_q log b - E_w log b = logit B -
    H(q) + H(w). So a bonus raises C iff  e^{H(q)} / e^{H(w)} > B/(1-B):  iff the EFFECTIVE number
    of correct answers per wrong one exceeds the base odds, i.e. single correct answers are rarer
    than single wrong ones. (Where reward is heard it just sets C.)
    Numbers: the derivative in 1,000 random problems. Then a family of tasks in two parameters, m
    correct answers of joint base mass B against 32 wrong ones, at EQUAL mean KL, gains against no
    entropy term: the B where the gain of the bonus, and of the penalty, is zero, found numerically
    for each m and k = 1, 4, 16, is on the curve B/(1-B) = m/32: more correct answers than that at
    the same B, and the bonus helps; fewer, and the penalty does. At fixed B = 0.1 (so the switch is
    at m = 3.6) the table gives the gains at m = 1 and m = 16, in points of Pass@16. DS with gamma_n
    = 0 leaves deaf problems alone and b uniform on the correct set: it is the zero line of this
    family.
    """
    b, r, _ = problems(1000, 8, seed=52)
    H = lambda p: -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    h, B = 1e-5, correctness(b, r)
    slope = (logit(correctness(b ** (1 + h) / (b ** (1 + h)).sum(-1, keepdims=True), r)) -
             logit(correctness(b ** (1 - h) / (b ** (1 - h)).sum(-1, keepdims=True), r))) / (2 * h)
    off = np.abs(slope - (logit(B) - H(given(b, r)) + H(given(b, 1 - r)))).max()
    assert off < 1e-8, f"dlogit C / da is not logit B - H(q) + H(w): {off:.1e}"

    k, error, cases = np.array([1, 4, 16]), 0, 0
    for m in (1, 2, 4, 8, 16):
        for a in (.8, 1.25):
            side = 1 if a > 1 else -1  # the penalty's gain rises with B, the bonus's falls
            by = lambda B, a: heuristic(m, B[:, None], a, k)
            gain = lambda B: side * (by(B, a) - by(B, 1.))
            odds = m / 32
            # half and twice the odds
            lo, hi = np.full(3, odds / (2 + odds)), np.full(3, 2 * odds / (1 + 2 * odds))
            assert (gain(lo) < -1e-8).all() and (gain(hi) > 1e-8).all(), "the gain must change sign"
            root = bisect(gain, lo, hi, steps=40)
            error, cases = max(error, np.abs(root / (1 - root) / odds - 1).max()), cases + 3
    assert error < 1e-5, f"the crossing is not at B/(1-B) = m/32: relative error {error:.1e}"
    points = {(m, a): 100 * (heuristic(m, .1, a, 16) - heuristic(m, .1, 1., 16))[0]
              for m in (1, 16) for a in (.8, 1.25)}
    assert points[1, .8] < 0 < points[1, 1.25] and points[16, .8] > 0 > points[16, 1.25]
    record("5c  multiplicity decides: switch at B/(1-B) = m/32", cases, error,
           f"shown; Pass@16 at B .1, bonus/penalty: m=1 "
           f"{points[1, .8]:+.1f}/{points[1, 1.25]:+.1f}, "
           f"m=16 {points[16, .8]:+.1f}/{points[16, 1.25]:+.1f}")


# ------------------------ 6. Theorem 3.4: differential smoothing against any entropy regularisation

def entropy_draws(n, seed):
    """n random (b, r, beta, gamma > 0) with their pi_ent, from weak to strong entropy and reward.
    """
    b, r, rng = problems(n, 8, seed=seed)
    beta = np.exp(rng.uniform(np.log(.2), np.log(3), (n, 1)))
    gamma = beta * np.exp(rng.uniform(-3, 1.5, (n, 1)))
    return b, r, beta, gamma, beta / (beta + gamma), pi_ent(b, r, beta, gamma)


def safe_inverse_beta(b, r, a, ent):
    """1/beta_DS of the safe form; equals 1/(beta+gamma) - log(sum_wrong b^a / sum_wrong b): reward
    minus flattening."""
    return logit(correctness(ent, r)) + np.log((b * (1 - r)).sum(-1)) - np.log((b**a * r).sum(-1))


def test_6a_safe_form():
    """Claim (safe form of Theorem 3.4): if  1/beta_DS = logit C_ent + log sum_wrong b - log
    sum_correct b^a  is > 0, then pi_DS with that beta_DS, gamma_p = beta_DS (1 - a), gamma_n = 0
    has the C and the sigma of pi_ent at less KL.
    Proof: gamma_p makes the exponent on the correct set a, so q is the same; 1/beta_DS makes C the
    same; on the wrong set pi_DS keeps b, so in the split of KL only (1 - C) KL(w_ent || b_wrong) is
    saved, the price of flattening mistakes. Against a penalty (gamma < 0) plain pi_van with the
    same C does it: larger sigma, less KL, if C_ent > B.
    Numbers: C, every probability on the correct set, and the saved KL to rounding, in every draw
    with the condition.
    """
    b, r, beta, gamma, a, ent = entropy_draws(5000, seed=60)
    inv = safe_inverse_beta(b, r, a, ent)
    flattening = np.log((b**a * (1 - r)).sum(-1) / (b * (1 - r)).sum(-1))
    reward_minus_flattening = 1 / (beta + gamma)[:, 0] - flattening
    assert np.abs(inv - reward_minus_flattening).max() < 1e-10
    ok = inv > 0
    b, r, a, ent, beta_ds = b[ok], r[ok], a[ok], ent[ok], 1 / inv[ok, None]
    ds = pi_ds(b, r, beta_ds, beta_ds * (1 - a), 0)
    saved = (1 - correctness(ent, r)) * kl(given(ent, 1 - r), given(b, 1 - r))
    error = max(np.abs((ds - ent) * r).max(), np.abs(diversity(ds, r) - diversity(ent, r)).max(),
                np.abs(kl(ent, b) - kl(ds, b) - saved).max())
    assert error < 1e-12 and (saved > 0).all(), \
        f"same C, same q, KL smaller by the stated amount: off by {error:.1e}"
    record("6a  Thm 3.4, safe form: same C, same sigma, less KL", ok.sum(), error,
           f"shown where 1/beta_DS > 0 ({ok.mean():.0%} of draws); it saves "
           f"{(saved / kl(ent, b)).mean():.0%} of the KL")

    b, r, rng = problems(5000, 8, seed=61)
    beta = np.exp(rng.uniform(np.log(.2), np.log(3), (5000, 1)))
    ent = pi_ent(b, r, beta, -beta * rng.uniform(.05, .8, (5000, 1)))
    inv = logit(correctness(ent, r)) - logit(correctness(b, r))
    ok = inv > 0
    b, r, ent = b[ok], r[ok], ent[ok]
    van = pi_ds(b, r, 1 / inv[ok, None], 0, 0)
    error = np.abs(correctness(van, r) - correctness(ent, r)).max()
    assert error < 1e-12 and (kl(van, b) < kl(ent, b)).all()
    assert (diversity(van, r) > diversity(ent, r)).all()
    record("6a' against a penalty: same C, more sigma, less KL", ok.sum(), error,
           f"shown where C_ent > B ({ok.mean():.0%} of draws)")


def test_6b_spend_the_slack():
    """Claim: the KL that 6a saves buys strictly more C, at the same sigma and exactly pi_ent's KL.
    Proof: keep gamma_p/beta_DS = 1 - a and raise 1/beta_DS. C rises, q stays, and dKL/dC = logit C
    - logit B + KL(q || b_correct) is at least 1/beta_DS > 0: continue until the KL is used up.
    Numbers: by bisection; where even C -> 1 costs less than pi_ent, C -> 1 is taken (1/beta_DS =
    40).
    """
    b, r, beta, gamma, a, ent = entropy_draws(5000, seed=60)
    inv = safe_inverse_beta(b, r, a, ent)
    ok = inv > 0
    b, r, a, ent, inv = b[ok], r[ok], a[ok], ent[ok], inv[ok]
    ds = lambda x: pi_ds(b, r, 1 / x[:, None], (1 - a) / x[:, None], 0)
    more = ds(bisect(lambda x: kl(ds(x), b) - kl(ent, b), inv, 40., steps=60))
    log_odds = lambda pi: np.log((pi * r).sum(-1) / (pi * (1 - r)).sum(-1))
    gain = log_odds(more) - log_odds(ent)  # in log odds: visible also where C is 1 - 1e-9
    used = kl(more, b) - kl(ent, b)
    capped = used < -1e-9
    assert (gain > 0).all(), f"C must rise strictly; smallest gain {gain.min():.1e}"
    assert used.max() < 1e-12 and (correctness(more, r)[capped] > 1 - 1e-12).all()
    error = np.abs(diversity(more, r) - diversity(ent, r)).max()
    assert error < 1e-12, "sigma must stay"
    record("6b  the slack buys C: same KL, same sigma, more C", ok.sum(), error,
           f"shown; C {correctness(ent, r).mean():.3f}->{correctness(more, r).mean():.3f}, "
           f"log odds +{np.median(gain):.1e} (median), +{gain.max():.2f} (largest)")


def test_6c_where_the_condition_fails():
    """Claim: Theorem 3.4 as reported, for EVERY pi_ent, with Eq. 4 and gammas >= 0. NOT so where
    1/beta_DS <= 0.
    Proof: Eq. 4 has u = 1/beta > 0 and exponents 1 - x on the correct, 1 + y on the wrong set.
    sigma >= sigma_ent needs x >= 1 - a; then C >= C0 = its value at the corner u = 0, x = 1 - a, y
    = 0, and C0 >= C_ent here: C comes for free, too much of it. From C0 on KL rises with C, with x
    and with y, so the family dominates iff KL(corner) < KL(pi_ent).
    Numbers: a random search of 4,000 members for each draw of this region. It never beats the
    corner's verdict, and agrees with it in nearly all draws. The table gives the honest share where
    some member dominates.
    """
    b, r, beta, gamma, a, ent = entropy_draws(1500, seed=62)
    fails = safe_inverse_beta(b, r, a, ent) <= 0
    b, r, a, ent = b[fails], r[fails], a[fails], ent[fails]
    corner = gibbs(np.where(r == 1, a, 1.) * np.log(b))
    assert (correctness(corner, r) >= correctness(ent, r)).all()
    verdict = kl(corner, b) < kl(ent, b)

    rng, S, found = np.random.default_rng(63), 4000, []
    for i in range(len(b)):
        # Half of the members near the corner, half anywhere.
        tiny = np.exp(rng.uniform(-12, 1, (3, S, 1)))
        u, y = tiny[0], tiny[2]
        x = np.where(np.arange(S)[:, None] % 2, 1 - a[i] + tiny[1], 1.5 * rng.random((S, 1)))
        y = np.where(rng.random((S, 1)) < .5, 0, y)
        pi = pi_ds(b[i], r[i], 1 / u, x / u, y / u)
        found.append(((kl(pi, b[i]) <= kl(ent[i], b[i]))
                      & (correctness(pi, r[i]) >= correctness(ent[i], r[i]))
                      & (diversity(pi, r[i]) >= diversity(ent[i], r[i]))).any())
    found = np.array(found)
    assert not (found & ~verdict).any(), \
        "the search found a member that dominates where the corner says none does"
    assert (found == verdict).mean() > .95, \
        f"search and corner agree in {(found == verdict).mean():.0%} only"
    record("6c  Thm 3.4 with gammas >= 0 where 1/beta_DS <= 0", len(b),
           f"{(~verdict).sum()} of {len(b)}",
           f"contradicted: dominates in {verdict.mean():.0%} (search of 4,000 each: "
           f"{found.mean():.0%})")


def test_6d_negative_gamma_n():
    """Claim: if gamma_n may be negative, Theorem 3.4 holds for every pi_ent, and strictly.
    Proof: pi_ent IS pi_DS with beta_DS = beta + gamma, gamma_p = gamma, gamma_n = -gamma. Now raise
    gamma_n/beta_DS from -(1 - a) towards 0 at fixed q and C: w moves to b_wrong, so KL falls, while
    1/beta_DS falls continuously from 1/(beta+gamma) > 0. Stop when it has fallen by half, or at
    gamma_n = 0.
    Numbers: 5,000 draws of 6a, the condition of 6a ignored: same C and sigma to rounding, KL
    smaller in all.
    """
    b, r, beta, gamma, a, ent = entropy_draws(5000, seed=60)
    same = np.abs(pi_ds(b, r, beta + gamma, gamma, -gamma) - ent).max()
    log_odds = logit(correctness(ent, r))[:, None]
    of_correct = np.log((b**a * r).sum(-1, keepdims=True))
    of_wrong = lambda y: np.log((b ** (1 + y) * (1 - r)).sum(-1, keepdims=True))
    inverse_beta = lambda y: log_odds + of_wrong(y) - of_correct   # falls as gamma_n rises
    y = bisect(lambda y: .5 / (beta + gamma) - inverse_beta(y), a - 1, np.zeros_like(a), steps=60)
    beta_ds = 1 / inverse_beta(y)
    ds = pi_ds(b, r, beta_ds, beta_ds * (1 - a), beta_ds * y)
    error = max(same, np.abs((ds - ent) * r).max())
    assert error < 1e-12 and (beta_ds > 0).all() and (kl(ds, b) < kl(ent, b)).all()
    record("6d  Thm 3.4 with gamma_n < 0 allowed, every draw", 5000, error,
           "shown, with strictly less KL")


# ------------------------------------------------------------- 7. What the training losses estimate

def expected_ascent(name, z, r, G, lengths=None, **hyper):
    """-d/dz of the expectation of losses.<name> over ALL K^G groups drawn from softmax(z),
    on-policy.

    `lengths` (K,) spreads log pi of each trajectory evenly over that many tokens; default one token
    each.
    """
    loss_of = getattr(importlib.import_module(os.environ.get("IMPL", "losses")), name)
    z = z.clone().requires_grad_()
    log_pi = z.log_softmax(0)
    lengths = torch.ones(len(z), dtype=torch.long) if lengths is None else lengths
    total = 0.
    for group in itertools.product(range(len(z)), repeat=G):
        y = torch.tensor(group)
        mask = (torch.arange(int(lengths.max())) < lengths[y][:, None]).double()  # (G, T)
        logp = (log_pi[y] / lengths[y])[:, None] * mask                           # (G, T)
        loss, _ = loss_of(logp, logp.detach(), mask, r[y], G, **hyper)
        total = total + log_pi[y].sum().detach().exp() * loss
    return -torch.autograd.grad(total, z)[0]


def objective_gradient(objective, z, r):
    """d/dz of objective(pi, p), p = C(pi)."""
    z = z.clone().requires_grad_()
    pi = z.softmax(0)
    return torch.autograd.grad(objective(pi, pi[r == 1].sum()), z)[0]


def grpo_weight(p, G):
    """g(p) = E[std of a group] / (p (1-p)): what dividing by the std does to grad p. G -> inf:
    1/sqrt(p(1-p))."""
    std = lambda c: math.sqrt(c / G * (1 - c / G))
    return sum(math.comb(G, c) * p**c * (1 - p) ** (G - c) * std(c)
               for c in range(G + 1)) / (p * (1 - p))


def entropy_C(pi, r):
    return -(pi * pi.log())[r == 1].sum()


def small_policies(n=6, K=4, seed=70):
    rng = np.random.default_rng(seed)
    for i in range(n):
        r = np.zeros(K)
        r[rng.permutation(K)[:1 + i % (K - 1)]] = 1  # 1, 2 or 3 correct
        yield torch.tensor(rng.normal(size=K)), torch.tensor(r)


def test_7a_what_each_loss_follows():
    """Claim: the estimator follows its paper's objective. p = pass@1, H_C, H_W = -sum pi log pi
    over correct / wrong.
    - reinforce, rloo: grad p.  dr_grpo: (G-1)/G grad p (the mean contains the answer itself), /
      max_len.
    - pkpo: grad pass@k.  maxrl: grad sum_{j<G} pass@j/j (eps 1e-6 in its denominator: error 1e-6,
      not rounding).
    - grpo: NOT grad p but g(p) grad p, g > 0: per problem the direction is right, the length is
      not.
    - diffsmooth (Eq. 6): g(p) grad p + gamma_p grad(H_C + p) + gamma_n grad(p - H_W). The DS term
      itself is exact, as no baseline touches it; but only the reward is divided by the std, so the
      weight of DS against reward is gamma/g(p).
    - diffsmooth_reward: (G-1)/G times the gradient of Eq. 4 at pi_base = pi_old = pi, exactly; no
      such distortion.
    Proof: E[-log pi(y) grad log pi(y); correct] = grad(H_C + p), the pi_old in it being constant.
    For grpo: given c correct, both conditional means of grad log pi are +-grad p / (their
    probability).
    Numbers: autograd of the losses over all 4^4 groups against autograd of the objective, 3
    policies.
    """
    G, gp, gn = 4, .3, .1
    H_W = lambda pi, r: entropy_C(pi, 1 - r)
    cases = {  # name: (hyperparameters, the objective; g(p) enters as a number, not as a function)
        "reinforce": ({}, lambda pi, p, r: p),
        "rloo": ({}, lambda pi, p, r: p),
        "dr_grpo": ({"max_len": 1}, lambda pi, p, r: (G - 1) / G * p),
        "pkpo": ({"k": 2}, lambda pi, p, r: 1 - (1 - p) ** 2),
        "maxrl": ({}, lambda pi, p, r: sum((1 - (1 - p) ** j) / j for j in range(1, G))),
        "grpo": ({}, lambda pi, p, r: grpo_weight(p.item(), G) * p),
        "diffsmooth": ({"gamma_p": gp, "gamma_n": gn}, lambda pi, p, r: grpo_weight(p.item(), G) * p
                       + gp * (entropy_C(pi, r) + p) + gn * (p - H_W(pi, r))),
        "diffsmooth_reward": ({"gamma_p": gp, "gamma_n": gn}, lambda pi, p, r: (G - 1) / G * (
            p + gp * (entropy_C(pi, r) + p) + gn * (p - H_W(pi, r)))),
    }
    weights = f"G=8: g(.05) {grpo_weight(.05, 8):.2f}, g(.5) {grpo_weight(.5, 8):.2f}"
    verdicts = {"reinforce": "shown: unbiased for p", "rloo": "shown: unbiased for p",
                "dr_grpo": "shown: unbiased for p up to (G-1)/G",
                "pkpo": "shown: unbiased for pass@k",
                "maxrl": "shown: grad sum_{j<G} pass@j/j (eps 1e-6)",
                "grpo": f"biased: g(p) grad p; {weights}",
                "diffsmooth": "g(p) grad p + gamma_p grad(H_C+p) + gamma_n grad(p-H_W)",
                "diffsmooth_reward": "shown: Eq. 4 at pi_base = pi_old, up to (G-1)/G"}
    for name, (hyper, objective) in cases.items():
        error, size = 0., 0.
        for z, r in small_policies(3):
            got = expected_ascent(name, z, r, G, **hyper)
            want = objective_gradient(lambda pi, p: objective(pi, p, r), z, r)
            error = max(error, (got - want).abs().max().item())
            size = max(size, want.abs().max().item())
        # These three divide by something + 1e-6.
        eps = 1e-5 if name in ("maxrl", "grpo", "diffsmooth") else 1e-12
        assert size > .01 and error < eps, \
            f"{name}: expected gradient and objective differ by {error:.1e}"
        record(f"7a  {name}", 3, error, verdicts[name])


def test_7b_what_the_std_changes():
    """Claim: on ONE problem dividing by the std only rescales; over SEVERAL it changes the
    objective.
    Proof: mean_x g(p_x) grad p_x is the gradient of mean_x F(p_x), F' = g: for large G, F = 2
    arcsin sqrt p, not p. So problems near p = 0 or 1 weigh more than in mean p, and there the DS
    term, not divided, acts less: gamma/g(p).
    Numbers: two problems with logits of their own, p = 0.05 and 0.5, G = 8, all 2^8 groups of each.
    rloo follows mean p exactly, grpo weighs the hard problem g(.05)/g(.5) = 1.33 times too much
    (2.3 for G -> inf). With G = 2 or 3 every mixed group has the same std, g is constant (1, sqrt
    2), and there is no bias at all.
    """
    G, r, ps = 8, torch.tensor([1., 0]).double(), (.05, .5)
    z = [torch.tensor([p, 1 - p]).double().log() for p in ps]
    true = [objective_gradient(lambda pi, p: p, z_x, r) for z_x in z]
    weight = {name: [(expected_ascent(name, z_x, r, G)[0] / t[0]).item() for z_x, t in zip(z, true)]
              for name in ("rloo", "grpo")}
    exact = max(abs(w - 1) for w in weight["rloo"])
    error = max(abs(w / grpo_weight(p, G) - 1) for w, p in zip(weight["grpo"], ps))
    ratio = weight["grpo"][0] / weight["grpo"][1]
    assert exact < 1e-12, f"rloo must follow the mean success: off by {exact:.1e}"
    assert error < 1e-5 and ratio > 1.3, \
        f"grpo must weigh problems by g(p): off by {error:.1e}, ratio {ratio:.2f}"
    assert abs(grpo_weight(.1, 1000) * math.sqrt(.09) - 1) < 3e-3, \
        "g(p) should tend to 1/sqrt(p(1-p))"
    for p in (.05, .3, .9):
        assert abs(grpo_weight(p, 2) - 1) < 1e-12 and abs(grpo_weight(p, 3) - math.sqrt(2)) < 1e-12
    record("7b  two problems: rloo follows mean p, grpo does not", 2, max(exact, error),
           f"grpo biased: weighs p=.05 {ratio:.2f}x against p=.5 (G=8); G<=3: no bias")


def test_7c_what_lengths_change():
    """Claim: losses that SUM the tokens of an answer stay unbiased when lengths differ; those that
    average them do not.
    Proof: grad log pi(y) is the sum of the token gradients. seq_mean weighs each answer's by
    1/length, so that short answers count more, and no objective in p alone has that gradient. grpo
    is defined so; pkpo and maxrl share it here by default, and with agg="seq_sum" they are what
    their papers prove.
    Numbers: trajectories of 1, 2, 3, 5 tokens, all 4^3 groups. rloo, reinforce, dr_grpo and the two
    with seq_sum exact; with seq_mean the worst cosine to what they follow otherwise. Without a
    baseline (pkpo) the length bias is largest: all weights are positive, so between correct answers
    only the length decides.
    """
    G, lengths = 3, torch.tensor([1, 2, 3, 5])
    objectives = {"rloo": ({}, lambda p: p), "reinforce": ({}, lambda p: p),
                  "dr_grpo": ({"max_len": 1}, lambda p: (G - 1) / G * p),
                  "pkpo": ({"k": 2, "agg": "seq_sum"}, lambda p: 1 - (1 - p) ** 2),
                  "maxrl": ({"agg": "seq_sum"}, lambda p: p + (1 - (1 - p) ** 2) / 2)}
    exact, worst = {}, {}
    for z, r in small_policies():
        for name, (hyper, objective) in objectives.items():
            want = objective_gradient(lambda pi, p: objective(p), z, r)
            error = (expected_ascent(name, z, r, G, lengths, **hyper) - want).abs().max().item()
            exact[name] = max(exact.get(name, 0), error)
        # On one problem all three follow grad p.
        for name, hyper in (("grpo", {}), ("pkpo", {"k": 2}), ("maxrl", {})):
            got = expected_ascent(name, z, r, G, lengths, **hyper)
            cos = torch.cosine_similarity(got, want, dim=0).item()
            worst[name] = min(worst.get(name, 1), cos)
    assert exact.pop("maxrl") < 1e-5, "maxrl with seq_sum must not see the length (eps 1e-6)"
    assert max(exact.values()) < 1e-12, f"these must not see the length: {exact}"
    assert max(worst.values()) < 1 - 1e-3, "dividing rows by their length must be visible here"
    record("7c  lengths 1,2,3,5, tokens summed", 6, max(exact.values()),
           "shown: rloo, reinforce, dr_grpo unbiased; pkpo, maxrl with agg=seq_sum")
    record("7c' lengths 1,2,3,5, tokens averaged (seq_mean)", 6,
           f"cosine {min(worst.values()):.2f}",
           "biased: worst cosine " + ", ".join(f"{n} {c:.2f}" for n, c in worst.items()))


def main():
    """Run every test in order and print the table; the exit status is 1 if one failed."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for losses.py
    failed = 0
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_")]:
        try:
            test()
        except Exception as e:  # a table with the other rows says more than a traceback
            failed += 1
            record(name, "-", "-", f"FAILED: {type(e).__name__}: {e}")
    ROWS.insert(0, ("claim", "cases", "worst error", "verdict"))
    width = [max(len(row[i]) for row in ROWS) for i in range(3)]
    for row in ROWS:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, width)), row[3], sep="  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
