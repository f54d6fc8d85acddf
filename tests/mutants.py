"""Proof that the tests bite: well-known bugs, put on purpose into a copy of the repo, are caught.

    python tests/mutants.py                 # every mutant: the bug, the test that kills it
    python tests/mutants.py losses.py       # only those of one file
    python tests/mutants.py losses.py gspo  # only those with gspo in their name
    python tests/mutants.py course          # wrong solutions of the exercises: none gets full marks
    python tests/mutants.py --check         # whether every edit still applies: seconds

A mutant is one file with one or two small edits. It is graded in a temporary copy of the repo by
the tests of that file alone (`TESTS`), up to the first that fails. An edit is found by its words,
whatever blanks, line breaks and comments stand between them; one that does not apply exactly once
is an error: the list has to follow the code. Wrong solutions of the exercises are made and graded
by course/variants.py. Exit code 1 if a mutant survives. Some five minutes on two cores.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
TESTS = {
    "losses.py": ["test_losses.py"], "policy.py": ["test_policy.py", "test_logprobs.py"],
    "sample.py": ["test_sample.py"], "rewards.py": ["test_rewards.py"], "eval.py": ["test_eval.py"],
    "train.py": ["test_train.py"],
}
CORE, CARE = "-m core", "-m care"  # the tests of losses.py that must see it: see test_losses.py

CLAMP = "ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)"
MIN = "loss = -torch.min(unclipped, " + CLAMP
STD = "(r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + EPS)"
GROUPED = "r = _grouped(rewards, group_size)"
DS_TERM = """    term = torch.where(r == 1, -gamma_p * log_pi, gamma_n * log_pi)         # (B,)
    advantages = group_advantages(r, group_size) + term"""
DS_REWARD = "(r + term - (r + term).mean(1, keepdim=True)).flatten()"
TOKEN_MEAN = "        return token_loss.sum() / lengths.sum().clamp(min=1)\n"
BONUS = "token_loss = token_loss - entropy_coef * batch.entropy "
GSPO = "log_ratio = (batch.logp - batch.old_logp).sum(1, keepdim=True) / lengths"
WEIGHT = "weight = ratio.clamp(1 - clip_low, 1 + clip_high)"
PKPO = "[k * C(G - c, k - 1) / C(G - 1, k - 1) for c in counts]"
PKPO_A = "advantages = torch.where(batch.rewards == 1, right, 0)"
Q = "q = torch.where(correct, likelihood, -1e9).softmax(1).clamp(min=1e-6)"
LIKELIHOOD = '_answer_logp(batch, "mean"), group_size)          # (B/G, G)\n'
TOTAL = "total = batch.old_logp.sum(1) "
ON = "    generated = mask.bool()\n"
BLANK = "torch.where(generated, x, 0)"
KL = "beta * kl(batch.logp, batch.ref_logp)"

LOSSES = [
    # --- the clip
    ("no clip", (CLAMP, "ratio * advantages)"), CORE),
    ("clip whatever the sign of A", (MIN, "loss = -(" + CLAMP), CORE),
    ("max for min: the clip on the wrong side", (MIN, MIN.replace("min", "max")), CORE),
    (
        "only the upper bound is clipped", (CLAMP, "ratio.clamp(max=1 + clip_high) * advantages)"),
        CORE,
    ),
    (
        "only the lower bound is clipped", (CLAMP, "ratio.clamp(min=1 - clip_low) * advantages)"),
        CORE,
    ),
    (
        "clip_low and clip_high swapped",
        (CLAMP, "ratio.clamp(1 - clip_high, 1 + clip_low) * advantages)"), CORE,
    ),
    (
        "ratio inverted",
        ("torch.exp(batch.logp - batch.old_logp) ", "torch.exp(batch.old_logp - batch.logp) "),
        CORE,
    ),
    (
        "dapo with GRPO's upper clip",
        ("clip_low=0.2, clip_high=0.28", "clip_low=0.2, clip_high=0.2"), CORE,
    ),
    (
        "clip_frac counts |ratio - 1| > clip",
        (
            "return loss, too_high | too_low",
            "return loss, (ratio > 1 + clip_high) | (ratio < 1 - clip_low)",
        ),
        CARE,
    ),
    # --- advantages
    ("std with ddof 1", ("correction=0", "correction=1"), CORE),
    ("std over the batch", (STD, STD.replace("r.std(1, keepdim=True, ", "r.std(")), CORE),
    ("mean and std over the batch", (STD, "(r - r.mean()) / (r.std(correction=0) + EPS)"), CORE),
    (
        "groups interleaved",
        [
            (GROUPED, GROUPED + ".reshape(group_size, -1).T"),
            ("torch.where(equal, 0, a).flatten()", "torch.where(equal, 0, a).T.flatten()"),
        ],
        CORE,
    ),
    (
        "eps under the root",
        (
            STD,
            "(r - r.mean(1, keepdim=True)) / (r.var(1, keepdim=True, correction=0) + EPS).sqrt()",
        ),
        CORE,
    ),
    ("eps 1e-4", ("EPS = 1e-6", "EPS = 1e-4"), CORE),
    ("no guard against equal rewards in float32", ("torch.where(equal, 0, a)", "a"), CARE),
    ("the loss has the wrong sign", ("loss = -torch.min(", "loss = torch.min("), CORE),
    # --- mask, padding, aggregation
    ("mask off by one", (ON, "    mask = mask.roll(1, 1)\n" + ON), CORE),
    (
        "mask one column late",
        (ON, "    mask = mask * mask.roll(1, 1) * (torch.arange(mask.shape[1]) > 0)\n" + ON), CORE,
    ),
    (
        "stop token masked", (ON, "    mask = torch.cat([mask[:, 1:], mask[:, :1] * 0], 1)\n" + ON),
        CORE,
    ),
    ("masked by a product: NaN * 0 is NaN", (BLANK + " for", "x * generated for"), CARE),
    (
        "NaN on generated tokens masked away too", (BLANK + " for", BLANK + ".nan_to_num(0) for"),
        CARE,
    ),
    (
        "padding counted in the loss",
        ("token_loss = torch.where(mask, token_loss, 0)", "token_loss = token_loss"), CORE,
    ),
    (
        "token_mean in place of seq_mean",
        (
            "(token_loss.sum(1) / lengths.clamp(min=1)).sum() / rows",
            "token_loss.sum() / lengths.sum().clamp(min=1)",
        ),
        CORE,
    ),
    (
        "seq_mean in place of token_mean",
        (
            TOKEN_MEAN,
            TOKEN_MEAN.replace(
                "token_loss.sum() / lengths.sum().clamp(min=1)",
                "(token_loss.sum(1) / lengths.clamp(min=1)).sum() / rows",
            ),
        ),
        CORE,
    ),
    (
        "mean of two micro-batch means",
        (
            TOKEN_MEAN,
            (
                "        return sum(t.sum() / m.sum().clamp(min=1) for t, m in"
                " zip(token_loss.chunk(2), mask.chunk(2))) / 2\n"
            ),
        ),
        CORE,
    ),
    (
        "the padded width as dr_grpo's constant", ("/ rows / max_len", "/ rows / mask.shape[1]"),
        CORE,
    ),
    (
        "dr_grpo keeps the std",
        (
            "(r - r.mean(1, keepdim=True)).flatten() ",
            "group_advantages(batch.rewards, group_size) ",
        ),
        CORE,
    ),
    ("dr_grpo keeps the length", ('"seq_const", max_len)', '"token_mean")'), CORE),
    (
        "rows without a token counted",
        ("rows = (lengths > 0).sum().clamp(min=1)", "rows = len(lengths)"), CARE,
    ),
    (
        "an all-masked row is 0/0",
        ("(token_loss.sum(1) / lengths.clamp(min=1))", "(token_loss.sum(1) / lengths)"), CARE,
    ),
    (
        "an all-zero mask is 0/0",
        ("token_loss.sum() / lengths.sum().clamp(min=1)", "token_loss.sum() / lengths.sum()"), CARE,
    ),
    (
        "sft by the mean of row means",
        (
            '(-batch.logp, batch.mask, "token_mean"), _stats(batch, ones)',
            '(-batch.logp, batch.mask, "seq_mean"), _stats(batch, ones)',
        ),
        CORE,
    ),
    (
        "rft divides by all tokens",
        (
            'loss = _aggregate(-batch.logp, batch.mask & correct[:, None], "token_mean")',
            'loss = _aggregate(-batch.logp * kept[:, None], batch.mask, "token_mean")',
        ),
        CORE,
    ),
    (
        "reinforce divides by the length",
        (
            '"seq_sum"), _stats(batch, advantages)\n\n\ndef rloo',
            '"seq_mean"), _stats(batch, advantages)\n\n\ndef rloo',
        ),
        CORE,
    ),
    (
        "rloo divides by the length",
        (
            '"seq_sum"), _stats(batch, advantages)\n\n\ndef dr_',
            '"seq_mean"), _stats(batch, advantages)\n\n\ndef dr_',
        ),
        CORE,
    ),
    # --- constants that must be constant, arguments that must stay
    (
        "old_logp not detached", ('"old_logp": old_logp.detach()', '"old_logp": old_logp'),
        CORE,
    ),
    (
        "ref_logp not detached", ('["ref_logp"] = ref_logp.detach()', '["ref_logp"] = ref_logp'),
        CARE,
    ),
    (
        "gradient leaks through the advantages",
        (TOTAL, "total = (batch.old_logp + batch.logp - batch.logp.detach()).sum(1) "), CORE,
    ),
    ("smoothing term from logp, detached", (TOTAL, "total = batch.logp.detach().sum(1) "), CORE),
    (
        "cispo's weight not detached",
        (
            "torch.exp(batch.logp.detach() - batch.old_logp)",
            "torch.exp(batch.logp - batch.old_logp)",
        ),
        CORE,
    ),
    (
        "rewards centred in place",
        ("a = (r - r.mean(1, keepdim=True)) /", "a = r.sub_(r.mean(1, keepdim=True)) /"), CARE,
    ),
    (
        "padding of old_logp zeroed in place",
        (
            '"old_logp": old_logp.detach()',
            '"old_logp": old_logp.detach().masked_fill_(~mask.bool(), 0)',
        ),
        CARE,
    ),
    # --- KL
    ("KL direction flipped: d swapped", ("d = logp - ref_logp  ", "d = ref_logp - logp  "), CORE),
    ("KL term with the wrong sign", ("token_loss + beta * kl(", "token_loss - beta * kl("), CORE),
    ("k1 in the loss", (KL, KL.replace(")", ', "k1")')), CORE),
    ("k2 in the loss", (KL, "beta * (batch.logp - batch.ref_logp) ** 2 / 2"), CORE),
    (
        "k3 by exp: no digits left in float32", ("torch.expm1(-d) + d", "torch.exp(-d) - 1 + d"),
        CARE,
    ),
    (
        "KL in the reward with the wrong sign",
        ("return batch.rewards - penalty", "return batch.rewards + penalty"), CORE,
    ),
    (
        "rloo subtracts the KL after the baseline",
        [
            (
                "_grouped(_penalised_rewards(batch, beta), group_size)",
                "_grouped(batch.rewards, group_size)",
            ),
            (
                "(r - others).flatten()",
                "(r - others).flatten() + _penalised_rewards(batch, beta) - batch.rewards",
            ),
        ],
        CORE,
    ),
    (
        "beta without reference is a silent zero",
        ("    if beta:\n", "    if beta and batch.ref_logp is not None:\n"), CARE,
    ),
    # --- entropy
    ("entropy bonus with the wrong sign", (BONUS, BONUS.replace(" - ", " + ")), CORE),
    ("entropy without gradient", (BONUS, BONUS.rstrip() + ".detach() "), CORE),
    (
        "entropy averaged by token_mean",
        (
            BONUS,
            BONUS.rstrip()
            + " * batch.mask.sum(1, keepdim=True) * len(batch.mask) / batch.mask.sum() ",
        ),
        CORE,
    ),
    (
        "entropy_coef without entropy is a silent zero",
        [
            ("if entropy is None and entropy_coef:", "if False:"),
            ("    if entropy_coef:\n", "    if entropy is not None:\n"),
        ],
        CARE,
    ),
    # --- differential smoothing
    ("gamma_p with the wrong sign", (DS_TERM, DS_TERM.replace("-gamma_p", "gamma_p")), CORE),
    ("gamma_n with the wrong sign", (DS_TERM, DS_TERM.replace("gamma_n", "-gamma_n")), CORE),
    ("both gammas with the wrong sign", (DS_TERM, DS_TERM.replace("+ term", "- term")), CORE),
    (
        "gammas swapped",
        (
            DS_TERM,
            DS_TERM.replace("gamma_p", "X").replace("gamma_n", "gamma_p").replace("X", "gamma_n"),
        ),
        CORE,
    ),
    ("smoothing term silently zero", (DS_TERM, DS_TERM.replace("+ term", "+ 0 * term")), CORE),
    (
        "no smoothing in groups of equal rewards",
        (DS_TERM, DS_TERM.replace("+ term", "+ term * (group_advantages(r, group_size) != 0)")),
        CORE,
    ),
    (
        "smoothing before normalisation",
        (DS_TERM, DS_TERM.replace("r, group_size) + term", "r + term, group_size)")), CORE,
    ),
    (
        "log pi summed over padding too",
        (TOTAL, "total = batch.old_logp.sum(1) + (~batch.mask).sum(1) * batch.old_logp[:, 0] "),
        CORE,
    ),
    ("reduction: sum and mean exchanged", ('reduction == "sum"', 'reduction == "mean"'), CORE),
    (
        "mean over the padded width",
        ("total / batch.mask.sum(1).clamp(min=1)", "total / batch.mask.shape[1]"), CORE,
    ),
    ("diffsmooth: correct as r > 0", (DS_TERM, DS_TERM.replace("r == 1", "r > 0")), CORE),
    (
        "diffsmooth_reward: not centred",
        (DS_REWARD, "(r + term - r.mean(1, keepdim=True)).flatten()"), CORE,
    ),
    (
        "diffsmooth_reward: divided by the std",
        (DS_REWARD, "group_advantages((r + term).flatten(), group_size)"), CORE,
    ),
    ("diffsmooth_reward: gammas 0", (DS_REWARD, "(r - r.mean(1, keepdim=True)).flatten()"), CORE),
    # --- the other variants
    (
        "rloo's baseline includes the answer itself",
        (
            "others = (r.sum(1, keepdim=True) - r) / (group_size - 1)",
            "others = r.mean(1, keepdim=True)",
        ),
        CORE,
    ),
    (
        "reinforce subtracts the group mean",
        (
            "_penalised_rewards(batch, beta) - baseline ",
            "_penalised_rewards(batch, beta).sub(batch.rewards.mean()) - baseline ",
        ),
        CORE,
    ),
    ("gspo: product of ratios", (GSPO, GSPO.replace(" / lengths", "")), CORE),
    (
        "gspo: mean of ratios",
        (
            GSPO,
            (
                "token_ratio = torch.where(batch.mask, torch.exp(batch.logp - batch.old_logp), 0)\n"
                "    log_ratio = (token_ratio.sum(1, keepdim=True) / lengths).log()"
            ),
        ),
        CORE,
    ),
    (
        "gspo with GRPO's clip", ("clip_low=3e-4, clip_high=4e-4", "clip_low=0.2, clip_high=0.2"),
        CORE,
    ),
    ("cispo's cap read as absolute", (WEIGHT, WEIGHT.replace("1 + clip_high", "clip_high")), CORE),
    (
        "cispo with a floor of 0.8", ("clip_low=1.0, clip_high=4.0", "clip_low=0.2, clip_high=4.0"),
        CORE,
    ),
    (
        "cispo clips like PPO",
        (
            "token_loss = -weight * advantages[:, None] * batch.logp",
            "token_loss = -weight * advantages[:, None] * batch.logp * (ratio == weight)",
        ),
        CORE,
    ),
    (
        "unlikeliness: rank 0 is the likeliest",
        (
            "likelihood.argsort(dim=1, stable=True)",
            "likelihood.argsort(dim=1, stable=True, descending=True)",
        ),
        CORE,
    ),
    (
        "unlikeliness: ranks by the sum",
        (LIKELIHOOD + "    rank", LIKELIHOOD.replace("mean", "sum") + "    rank"), CORE,
    ),
    ("unlikeliness: order for rank", (".argsort(dim=1).flatten()", ".flatten()"), CORE),
    (
        "ucpo: q from the sum", (LIKELIHOOD + "    q", LIKELIHOOD.replace("mean", "sum") + "    q"),
        CORE,
    ),
    (
        "ucpo: more to the likely ones",
        ("rarity = torch.where(correct, 1 / q, 0)", "rarity = torch.where(correct, q, 0)"), CORE,
    ),
    ("ucpo: q over wrong answers too", (Q, "q = likelihood.softmax(1).clamp(min=1e-6) ** 2"), CORE),
    ("ucpo: the total is not kept", ("correct.sum(1, keepdim=True) * rarity", "rarity"), CORE),
    (
        "passk: wrong answers get -R only",
        ("[(f - w) / s for f, w, s in", "[(f - 1) / s for f, w, s in"), CORE,
    ),
    (
        "passk: k is ignored",
        ("fail = [C(G - c, k) / C(G, k) for c in counts]", "fail = [(G - c) / G for c in counts]"),
        CORE,
    ),
    ("pkpo: the factor k is lost", (PKPO, PKPO.replace("k * C(", "C(")), CORE),
    ("pkpo: the factor G is lost", (PKPO, PKPO.replace("k * C(", "k / G * C(")), CORE),
    (
        "pkpo: a std afterwards",
        (
            PKPO_A,
            "advantages = group_advantages(torch.where(batch.rewards == 1, right, 0), group_size)",
        ),
        CORE,
    ),
    (
        "pkpo: one more leave-one-out baseline",
        (
            PKPO_A,
            (
                "a = _grouped(torch.where(batch.rewards == 1, right, 0), G)\n"
                "    advantages = (a - (a.sum(1, keepdim=True) - a) / (G - 1)).flatten()"
            ),
        ),
        CORE,
    ),
    (
        "passk and pkpo: c counts r > 0",
        ("c = _grouped(batch.rewards == 1,", "c = _grouped(batch.rewards > 0,"), CORE,
    ),
    (
        "passk: correct as r > 0",
        (
            "torch.where(batch.rewards == 1, right, wrong)",
            "torch.where(batch.rewards > 0, right, wrong)",
        ),
        CORE,
    ),
    ("pkpo: correct as r > 0", (PKPO_A, PKPO_A.replace("== 1", "> 0")), CORE),
    (
        "w_reinforce: correct as r > 0",
        (
            "correct = (batch.rewards == 1).to(batch.logp)",
            "correct = (batch.rewards > 0).to(batch.logp)",
        ),
        CORE,
    ),
    (
        "ucpo: correct as r > 0",
        (
            "correct = _grouped(batch.rewards == 1, group_size)  ",
            "correct = _grouped(batch.rewards > 0, group_size)  ",
        ),
        CORE,
    ),
    (
        "rft: correct as r > 0",
        ("    correct = batch.rewards == 1  ", "    correct = batch.rewards > 0  "), CORE,
    ),
    (
        "w_reinforce rewards mistakes",
        ("w_pos * correct - w_neg * (1 - correct)", "w_pos * correct + w_neg * (1 - correct)"),
        CORE,
    ),
    (
        "maxrl: divided by the std",
        ("(r - mean) / (mean + EPS)", "(r - mean) / (r.std(1, keepdim=True, correction=0) + EPS)"),
        CORE,
    ),
    (
        "maxrl: all-wrong groups at A = -1",
        ("((r - mean) / (mean + EPS)).flatten()", "(r / (mean + EPS) - 1).flatten()"), CORE,
    ),
    (
        "focal: p for 1 - p",
        ("(1 - c / group_size) ** focal_gamma", "(c / group_size) ** focal_gamma"), CORE,
    ),
    # --- input that must not pass
    (
        "a **kwargs that swallows misspelt options",
        (
            'beta=0.0, agg="seq_mean"):\n    """GRPO (arXiv',
            'beta=0.0, agg="seq_mean", **unused):\n    """GRPO (arXiv',
        ),
        CARE,
    ),
    (
        "group_size that does not divide is accepted",
        ("if group_size < 1 or len(x) % group_size:", "if group_size < 1:"), CARE,
    ),
    ("positive log-probabilities are accepted", ("= x > 1e-4\n", "= x > 1e9\n"), CARE),
    ("a mask of 0.5 is accepted", ("mask != generated,", "mask < 0,"), CARE),
    (
        "k above the group size is accepted",
        ("if not 1 <= k <= group_size or k % 1:", "if k < 1:"), CARE,
    ),
    (
        "negative rewards pass maxrl",
        ("complaints = {\n", "min_reward = -math.inf\n    complaints = {\n"), CARE,
    ),
]

EVAL = [
    (
        "the biased plug-in estimate of Pass@k",
        ("return 1.0 - math.comb(n - c, k) / math.comb(n, k)", "return 1.0 - (1 - c / n) ** k"),
        "-k at_k_by_hand",
    ),
    (
        "Pass@k: all k correct",
        ("1.0 - math.comb(n - c, k) / math.comb(n, k)", "math.comb(c, k) / math.comb(n, k)"),
        "-k at_k_by_hand",
    ),
    (
        "Pass@k: c/n whatever k is", ("1.0 - math.comb(n - c, k) / math.comb(n, k)", "c / n"),
        "-k at_k_by_hand",
    ),
    (
        "Pass@k in floats that overflow",
        (
            "math.comb(n - c, k) / math.comb(n, k)",
            "float(math.comb(n - c, k)) / float(math.comb(n, k))",
        ),
        "-k many_samples",
    ),
    ("k above n gives a number", ("if not 1 <= k <= n:", "if k < 1:"), "-k refuses"),
    ("k of 0 gives a number", ("if not 1 <= k <= n:", "if k > n:"), "-k refuses"),
    ("c below 0 gives a number", ("if not 0 <= c <= n:", "if c > n:"), "-k refuses"),
    (
        "sigma counts an answer as its own pair",
        (
            "same = sum(m * (m - 1) for m in forms.values())",
            "same = sum(m * m for m in forms.values())",
        ),
        "-k sigma",
    ),
    (
        "sigma of one correct answer is 0, not missing",
        ("if c >= 2 else None", "if c >= 2 else 0.0"), "-k sigma",
    ),
    (
        "wrong answers counted as distinct",
        ("[text][1] for text in correct)", "[text][1] for text in texts)"), "-k record",
    ),
    (
        "distinct answers by their characters",
        ('"distinct": len(forms)', '"distinct": len(set(correct))'), "-k record",
    ),
    (
        "as_text counts every sample", ('"as_text": len(set(correct))', '"as_text": len(correct)'),
        "-k record",
    ),
    (
        "parsed means correct",
        ("judged[text][1] is not None for text in texts", "judged[text][0] for text in texts"),
        "-k record",
    ),
    (
        "any reward is correct",
        ("task.reward(problem, text) == 1,", "task.reward(problem, text) >= 0,"), "-k record",
    ),
    (
        "counts pooled over problems",
        (
            '[100 * pass_at_k(n, r["c"], k) for r in records]',
            '[100 * pass_at_k(n * len(records), sum(r["c"] for r in records), k)] * len(records)',
        ),
        "-k averages",
    ),
    ("intervals of 50 %", ("[0.025, 0.975]", "[0.25, 0.75]"), "-k intervals"),
    (
        "the gain with the wrong sign",
        ("interval(x - values[first][name], picks)", "interval(values[first][name] - x, picks)"),
        "-k paired",
    ),
    (
        "every model resampled on its own: unpaired gains",
        (
            "interval(x - values[first][name], picks)",
            "interval(x - values[first][name][np.random.permutation(size)], picks)",
        ),
        "-k paired",
    ),
    (
        "the last answers of a large group are not drawn",
        ("for drawn in range(0, n, most)]", "for drawn in range(0, n - most + 1, most)]"),
        "-k evaluate_ends",
    ),
    (
        "answers given to another problem",
        ("answers[row // G].append(answer)", "answers[row % len(batch)].append(answer)"),
        "-k goes_to_its_problem",
    ),
]

REWARDS = [
    (
        "grouped from the right: 9-4-3 is 8",
        (
            (
                "        while tokens[-1] in ops:\n            node = combine(tokens.pop(), node,"
                " part(depth))\n"
            ),
            (
                "        if tokens[-1] in ops:\n"
                "            return combine(tokens.pop(), node, chain(ops, part, depth))\n"
            ),
        ),
        "-k parse_by_hand",
    ),
    (
        "* binds no more tightly than +",
        ('chain(("+", "-"), product, depth)', 'chain(("+", "-", "*", "/"), atom, depth)'),
        "-k parse_by_hand",
    ),
    (
        "division drops the rest",
        ("return a * d, b * c, (op, x, y)", "return (a * d) // (b * c or 1), 1, (op, x, y)"),
        "-k parse_by_hand",
    ),
    (
        "floats in place of fractions",
        ("return a * d, b * c, (op, x, y)", "return (a / b) / (c / d), 1, (op, x, y)"),
        "-k parse_by_hand",
    ),
    ("left and right of - exchanged", ("a * d - c * b", "c * b - a * d"), "-k parse_by_hand"),
    (
        "other characters are skipped",
        (r'not re.fullmatch(r"[-+*/() \t\r\n0-9]*", text)', "False"), "-k no_expression",
    ),
    ("07 is a number", ('r"0|[1-9][0-9]*|', 'r"[0-9]+|'), "-k no_expression"),
    (
        "what is left over is ignored",
        ('return node if tokens == ["end"] else None', "return node"), "-k no_expression",
    ),
    (
        "a bracket may stay open",
        (
            """        if tokens.pop() != ")":
            raise ValueError("not closed")
""",
            """        if tokens[-1] == ")":
            tokens.pop()
""",
        ),
        "-k no_expression",
    ),
    ("no cap on depth", (" or depth == MAX_DEPTH", ""), "-k parse_is_bounded"),
    ("29 brackets are too many", ("MAX_DEPTH = 30", "MAX_DEPTH = 29"), "-k thirty_brackets"),
    ("no cap on length", ("len(text) > MAX_ANSWER or ", ""), "-k parse_is_bounded"),
    (
        "numbers compared as sets", ("used == sorted(numbers)", "set(used) == set(numbers)"),
        "-k reward_by_hand",
    ),
    (
        "numbers in the order of the prompt",
        (
            (
                'sorted(int(digits) for digits in re.findall("[0-9]+", answer))\n    return'
                " float(used == sorted(numbers)"
            ),
            (
                '[int(digits) for digits in re.findall("[0-9]+", answer)]\n'
                "    return float(used == list(numbers)"
            ),
        ),
        "-k reward_by_hand",
    ),
    ("any numbers will do", ("used == sorted(numbers) and ", ""), "-k reward_by_hand"),
    (
        "the value is not looked at", (" and numerator == target * denominator", ""),
        "-k reward_by_hand",
    ),
    (
        "a tolerance",
        (
            "numerator == target * denominator)",
            "abs(numerator - target * denominator) <= 1e-6 * denominator)",
        ),
        "-k reward_by_hand",
    ),
    ("0/0 meets a target of 0", (" and denominator != 0", ""), "-k reward_by_hand"),
    (
        "1/(1/0) is 0",
        (
            (
                "    if c == 0:  # without this line 1/(1/0) would be 0\n"
                "        return 0, 0, (op, x, y)\n"
            ),
            "",
        ),
        "-k exact_arithmetic",
    ),
    (
        "the first answer tag is read",
        (
            'return last.partition("</answer>")[0]',
            'return text.partition("<answer>")[2].partition("</answer>")[0]',
        ),
        "-k answer_tags",
    ),
    ("an open answer tag counts", (' or last.count("</answer>") != 1', ""), "-k answer_tags"),
    (
        "a-(b-c) is another answer than a-b+c", ("inverse != (op == ops[1])", "op == ops[1]"),
        "-k canonical_identifies",
    ),
    (
        "a needed bracket is left out",
        ('"-": ("", "+-")', '"-": ("", "")'),
        "-k generated_examples",
    ),
    (
        "held-out problems are trained on", (" and task.is_held_out(problem) == held_out", ""),
        "-k generated_examples",
    ),
]

POLICY = [
    (
        "rotary pairs of neighbours",
        ("a, b = x.chunk(2, dim=-1)", "a, b = x[..., ::2], x[..., 1::2]"), "-k rotate_by_hand",
    ),
    (
        "rotary angles with the wrong sign",
        ("a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),
        "-k rotate_by_hand",
    ),
    (
        "no causality", ("ok = (key <= query)[None, None]", "ok = (key <= S)[None, None]"),
        "-k who_sees",
    ),
    ("a window off by one", ("key > query - window", "key >= query - window"), "-k who_sees"),
    ("padding is read", ("ok = ok & mask.bool()[:, None, None, :]", "pass"), "-k who_sees"),
    ("a padded query reads nothing", ("return ok | (key == query)", "return ok"), "-k who_sees"),
    (
        "queries are the first positions",
        (
            "query = torch.arange(S - T, S, device=device)[:, None]",
            "query = torch.arange(T, device=device)[:, None]",
        ),
        "-k who_sees",
    ),
    (
        "None for a window, too",
        ("(window is None or window >= S) and T in (1, S)", "T in (1, S)"), "-k who_sees",
    ),
    (
        "new keys in front of old ones",
        ("torch.cat([self.keys[layer], k], dim=2)", "torch.cat([k, self.keys[layer]], dim=2)"),
        "-k cache_grows",
    ),
    (
        "the cache forgets old values", ("torch.cat([self.values[layer], v], dim=2)", "v"),
        "-k cache_grows",
    ),
    (
        "no gradient through the cache",
        (
            "torch.cat([self.keys[layer], k], dim=2)",
            "torch.cat([self.keys[layer], k], dim=2).detach()",
        ),
        "-k cache_keeps",
    ),
    (
        "keys without positions", ("rotate(k, *rope).transpose(1, 2)", "k.transpose(1, 2)"),
        "-k attention_by_loops",
    ),
    (
        "keys cached before they are rotated: only new ones are",
        (
            "            k, v = cache.update(layer, k, v) ",
            (
                "            k, v = cache.update(layer, self.k_proj(x).unflatten(-1, by_head)"
                ".transpose(1, 2), v) "
            ),
        ),
        "-k attention_by_loops",
    ),
    (
        "attention looks ahead", ("causal = attend is None and x.shape[1] > 1", "causal = False"),
        "-k attention_by_loops",
    ),
    (
        "one new token sees the first key alone",
        ("causal = attend is None and x.shape[1] > 1", "causal = attend is None"),
        "-k attention_by_loops",
    ),
    (
        "positions of new tokens start at 0 again",
        (
            "positions = torch.arange(S - T, S, device=tokens.device) ",
            "positions = torch.arange(T, device=tokens.device) ",
        ),
        "-k without_padding",
    ),
    (
        "another eps in the norm", ("x.shape[-1:], eps=self.eps)", "x.shape[-1:], eps=1e-2)"),
        "-k logits and llama and not rope and not biases",
    ),
    (
        "gate and up exchanged",
        (
            "F.silu(mlp.gate_proj(y)) * mlp.up_proj(y)",
            "F.silu(mlp.up_proj(y)) * mlp.gate_proj(y)",
        ),
        "-k logits and llama and not rope and not biases",
    ),
    (
        "Qwen2 without its biases", ('all_bias or config.model_type == "qwen2"', "all_bias"),
        "-k logits and qwen2 and not window",
    ),
    (
        "Qwen3 without its norms", ('if hasattr(self, "q_norm"):', "if False:"),
        "-k logits and qwen3",
    ),
    (
        "the window in every layer",
        (
            '[window if kind == "sliding_attention" else None for kind in kinds]',
            "[window for kind in kinds]",
        ),
        "-k logits and ministral",
    ),
    (
        "the temperature missing",
        (
            "TokenLogprobs.apply(hidden, weight, targets, temperature, ",
            "TokenLogprobs.apply(hidden, weight, targets, 1.0, ",
        ),
        "-k logprobs and by_hand",
    ),
    (
        "a target read in the wrong tile",
        (
            "torch.where(inside, x.gather(1, column * inside), 0)[:, 0]",
            "x.gather(1, column * inside)[:, 0]",
        ),
        "-k tiles_give",
    ),
    ("entropies of tiles simply mixed", ("(more_entropy + b)", "more_entropy"), "-k tiles_give"),
    (
        "the last tile left out",
        ("for i in range(0, V, width)])", "for i in range(0, V - width + 1, width)])"),
        "-k tiles_give",
    ),
    (
        "the entropy's gradient dropped",
        ("None if e is None else e[rows], h.dtype)", "None, h.dtype)"), "-k gradient_of_the_tiles",
    ),
    (
        "the head's gradient without temperature",
        (
            "add_product(dw[part], dx.T, h[rows], ctx.temperature)",
            "add_product(dw[part], dx.T, h[rows], 1.0)",
        ),
        "-k gradient_of_the_tiles",
    ),
    (
        "a large product without its bias's gradient",
        ("bias = g_rows.sum(0) if ctx.needs_input_grad[2] else None", "bias = None"),
        "-k large_products",
    ),
    ("oneDNN given no rows", ("> 128 and x.numel() > 0", "> 128"), "-k large_products"),
    (
        "a large product's residual forgotten",
        ("return y if residual is None else y.add_(residual)", "return y"), "-k which_products",
    ),
    (
        "kept tiles in the wrong order", ("ctx.kept[::-1], []", "ctx.kept, []"),
        "-k gradient_of_the_tiles",
    ),
    (
        "tiles overwritten and read again",
        ("kept, ctx.kept = ctx.kept[::-1], []", "kept = ctx.kept[::-1]"), "-k second_backward",
    ),
]

SAMPLE = [
    (
        "the stop token left out of the mask",
        ("torch.where(stopped, count + 1, ", "torch.where(stopped, count.clamp(min=1), "),
        "-k answer_ends_is_named",
    ),
    (
        "the temperature missing", ("self.head), temperature)", "self.head), 1.0)"),
        "-k recorded_is_named",
    ),
    (
        "the likeliest token's log-probability recorded",
        ("all_logp.gather(1, token[:, None])[:, 0]", "all_logp.amax(1)"), "-k recorded_is_named",
    ),
    (
        "probabilities recorded",
        (
            "all_logp.gather(1, token[:, None])[:, 0]",
            "all_logp.gather(1, token[:, None])[:, 0].exp()",
        ),
        "-k recorded_is_named",
    ),
    ("attention scores not scaled", ("alpha=size ** -0.5", "alpha=1.0"), "-k recorded_is_named"),
    (
        "the cache shifted by one",
        ("keys.index_copy_(1, self.slot, ", "keys.index_copy_(1, self.slot - 1, "),
        "-k recorded_is_named",
    ),
    (
        "padding counted as positions",
        ("position = self.slot - self.padding ", "position = self.slot - 0 * self.padding "),
        "-k recorded_is_named",
    ),
    (
        "padding is read",
        (
            "seen = F.pad(mask, (0, room), value=False)",
            "seen = F.pad(torch.ones_like(mask), (0, room), value=False)",
        ),
        "-k recorded_is_named",
    ),
    (
        "groups interleaved",
        (
            "device=device).repeat_interleave(group_size)    # (B,)",
            "device=device).repeat(group_size)    # (B,)",
        ),
        "-k neighbours",
    ),
    (
        "greedy decoding",
        (
            "token = draw(all_logp.exp(), self.uniform[rows, count]) ",
            "token = all_logp.argmax(-1) ",
        ),
        "-k seeds_and_rows",
    ),
    (
        "one chance for all rows",
        (
            "torch.rand(B, room, generator=generator, device=where)",
            "torch.rand(1, room, generator=generator, device=where).repeat(B, 1)",
        ),
        "-k seeds_and_rows",
    ),
    (
        "the generator is not used",
        (
            "torch.rand(B, room, generator=generator, device=where)",
            "torch.rand(B, room, device=where)",
        ),
        "-k seeds_and_rows",
    ),
    (
        "tokens drawn from a sharpened softmax",
        ("draw(all_logp.exp(), ", "draw((2 * all_logp).exp(), "), "-k draws_follow",
    ),
    (
        "a token of probability 0 is drawn", ("right=True)[:, 0]", "right=False)[:, 0]"),
        "-k impossible_token",
    ),
    (
        "the last cumulated value taken for 1",
        ("uniform[:, None] * cumulated[:, -1:]", "uniform[:, None]"), "-k impossible_token",
    ),
    (
        "the stop token is part of the text",
        ("shown = (length - finished.long()).tolist()", "shown = length.tolist()"),
        "-k stops_at_once",
    ),
    ("as wide as the budget", ("T = int(length.max())", "T = max_new_tokens"), "-k stops_at_once"),
    (
        "every answer is finished",
        (
            "torch.isin(response.gather(1, length[:, None] - 1)[:, 0], answers.stop_ids)",
            "length > 0",
        ),
        "-k answer_ends",
    ),
    (
        "special tokens hidden from the verifier",
        ("skip_special_tokens=False", "skip_special_tokens=True"), "-k is_hidden",
    ),
    (
        "a prompt that does not fit is begun",
        ("if P + max_new_tokens > context:", "if P > context:"), "-k does_not_fit",
    ),
    (
        "a prompt begins twice", ("add_special_tokens=not begun", "add_special_tokens=True"),
        "-k begins_once",
    ),
    (
        "joined prompts padded on the right",
        ("(gap, 0) if left else (0, gap)", "(0, gap)"), "-k joined",
    ),
    (
        "texts of other rows taken",
        ("texts=[rollout.texts[row] for row in rows.tolist()]", "texts=rollout.texts[:len(rows)]"),
        "-k joined",
    ),
]

TRAIN = [
    (
        "the gradient averaged over chunks",
        (
            "gradients = [own_rows(g, rollout) for g in gradients]",
            "gradients = [own_rows(g, rollout) / len(chunks) for g in gradients]",
        ),
        "-k whole_batch_is_named and 4",
    ),
    (
        "the entropy's gradient dropped",
        (
            "torch.autograd.grad(loss, [logp, entropy], allow_unused=True)",
            "[*torch.autograd.grad(loss, [logp], allow_unused=True), None]",
        ),
        "-k whole_batch_is_named and 4",
    ),
    (
        "no temperature in the second forward pass",
        (
            "else score(policy, rollout, chunk, group_size, temperature)",
            "else score(policy, rollout, chunk, group_size, 1.0)",
        ),
        "-k whole_batch_is_named and 4",
    ),
    (
        "no temperature in the score",
        (
            "scored = [score(policy, rollout, chunk, group_size, temperature)",
            "scored = [score(policy, rollout, chunk, group_size, 1.0)",
        ),
        "-k whole_batch_is_named and 4",
    ),
    (
        "the last chunk alone",
        (
            "        outputs = scored[i] if one_chunk",
            "        optimizer.zero_grad()\n        outputs = scored[i] if one_chunk",
        ),
        "-k whole_batch_is_named and 4",
    ),
    (
        "another chunk's rows of the gradient",
        ("[(out, g[chunk]) for out, g", "[(out, g[:len(chunk)]) for out, g"),
        "-k whole_batch_is_named and 4",
    ),
    ("uphill", ("[(out, g[chunk]) for out, g", "[(out, -g[chunk]) for out, g"), "-k downhill"),
    (
        "the gradient of the step before still in it",
        ("    optimizer.zero_grad()\n    for i, chunk", "    for i, chunk"), "-k downhill",
    ),
    (
        "no step", ("        optimizer.step()\n    return stats", "        pass\n    return stats"),
        "-k downhill",
    ),
    (
        "old_logp ignored",
        ("old_logp = logp if old_logp is None else whole_batch(old_logp)", "old_logp = logp"),
        "-k old_log_probabilities_are_used",
    ),
    (
        "the reference ignored",
        ("ref_logp = None if ref_logp is None else whole_batch(ref_logp)", "ref_logp = None"),
        "-k reference_reaches",
    ),
    (
        "a NaN reaches the weights",
        (
            'stats["bad"] = not (math.isfinite(norm) and math.isfinite(stats["loss"]))',
            'stats["bad"] = False',
        ),
        "-k nan_never",
    ),
    (
        "the gradient is not clipped",
        ("norm = clip_gradient(policy, grad_clip)", "norm = clip_gradient(policy, 1e9)"),
        "-k clipped_and",
    ),
    (
        "the stop token is not trained",
        (
            "torch.ones(len(line), dtype=torch.bool) for line",
            "torch.arange(len(line)) < len(line) - 1 for line",
        ),
        "-k stop_token_is_trained",
    ),
    (
        "the first step has rate 0", ("rise = step / warmup", "rise = (step - 1) / warmup"),
        "-k falls_by_hand",
    ),
    (
        "the last step has rate 0",
        ("fall = (args.steps + 1 - step) /", "fall = (args.steps - step) /"), "-k falls_by_hand",
    ),
    (
        "Muon without looking ahead",
        ("orthogonal(w.grad.lerp(momentum, 0.95))", "orthogonal(momentum)"), "-k step_of_muon",
    ),
    (
        "all-right groups pass dynamic sampling",
        ("mixed = (accuracy > 0) & (accuracy < 1)", "mixed = accuracy > 0"), "-k dynamic_sampling",
    ),
    (
        "dynamic sampling keeps equal groups", ("chosen = chosen[mixed[chosen]]", "pass"),
        "-k dynamic_sampling",
    ),
]

# file: [(what is wrong, (text, replacement) or a list of them, which tests to ask: options of
# pytest; "" is all), ...]
MUTANTS = {
    "losses.py": LOSSES, "eval.py": EVAL, "rewards.py": REWARDS, "policy.py": POLICY,
    "sample.py": SAMPLE, "train.py": TRAIN,
}


class Recorder:
    """A pytest plugin: the first failure and what it said."""

    def __init__(self):
        self.first = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.first is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = (crash.message if crash else str(report.longrepr)).split("\n")[0]
            self.first = report.nodeid.split("::")[-1], message.replace("Failed: ", "").replace(
                "AssertionError: ", ""
            )


def grade(job):
    """Run a file's tests in a copy of the repo, in a child process -> (exit code, (test, message)
    or None, output)."""
    folder, file, ask = job
    # Other plugins only cost time here; a tokenizer that has been forked would warn.
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.pop("IMPL", None)
    os.chdir(folder)
    elsewhere = [
        path for path in sys.path if Path(path or ".").resolve() not in (REPO, REPO / "tests")
    ]
    sys.path[:] = [str(folder), *elsewhere]
    recorder, output = Recorder(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        options = [
            "-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", "-p",
            "no:unraisableexception", *ask.split(" ", 1),
        ]  # that one costs a quarter second
        code = pytest.main(
            [str(folder / "tests" / test) for test in TESTS[file]] + list(filter(None, options)),
            plugins=[recorder],
        )
    shutil.rmtree(folder)
    return int(code), recorder.first, output.getvalue()


def import_packages(files):
    """What the files import from elsewhere, once for all children; ours is forgotten again, each
    child has its own."""
    sys.path.insert(0, str(REPO))
    for file in files:
        importlib.import_module(file.removesuffix(".py"))
    for file in REPO.glob("*.py"):
        sys.modules.pop(file.stem, None)


def copy_repo(folder):
    """What the tests need: the files on top and tests/*.py."""
    (folder / "tests").mkdir(parents=True)
    for file in [*REPO.glob("*.py"), *REPO.glob("tests/*.py")]:
        shutil.copy(file, folder / file.relative_to(REPO))


def all_asked(asks):
    """The tests that any of the mutants asks."""
    if not all(ask.startswith("-k ") for ask in asks):
        return ""
    return "-k " + " or ".join(f"({ask[3:]})" for ask in dict.fromkeys(asks))


def place(source, old):
    """Where an edit's text stands: its words in their order, with any blanks, line breaks and
    comments between them -> [(start, end)]."""
    words = re.findall(r"\w+|[^\w\s]", re.sub(r"(?m)(^|\s)#.*$", "", old))
    between = r"(?:\s|#[^\n]*\n)*"
    pattern = between.join(map(re.escape, words))
    before = r"(?<!\w)" if words[0][0].isalnum() else ""
    return [match.span() for match in re.finditer(before + pattern, source)]


def mutate(file, edits):
    """The file with its edits put in; ValueError with the text of one that does not apply."""
    source = (REPO / file).read_text()
    for old, new in [edits] if isinstance(edits, tuple) else edits:
        if source.count(old) == 1:
            source = source.replace(old, new)
            continue
        found = place(source, old)
        if len(found) != 1:
            raise ValueError(
                f"this must stand once in {file}, and stands {len(found)} times:\n{old}"
            )
        (start, end), indent = found[0], old[: len(old) - len(old.lstrip())]
        source = source[:start] + new.removeprefix(indent) + source[end:]
    return source


def lost_edits(chosen):
    """What to say of the edits that do not apply any more, a paragraph each."""
    said = []
    for file, name, edits, _ in chosen:
        try:
            compile(mutate(file, edits), file, "exec")
        except (ValueError, SyntaxError) as error:
            said.append(f"{file}, '{name}': {error}")
    return said


def wrong_solutions(wanted):
    """Grade those of the exercises -> exit code."""
    sys.path.insert(0, str(REPO / "tests" / "course"))
    import variants

    return variants.main([*wanted, "--short"])


def main(words):
    if words[:1] == ["course"]:
        return wrong_solutions(words[1:])
    check = "--check" in words
    words = [word for word in words if word != "--check"]
    files = [word for word in words if word in TESTS] or list(MUTANTS)
    wanted = " ".join(word for word in words if word not in TESTS)
    chosen = [
        (file, *mutant) for file in files for mutant in MUTANTS.get(file, []) if wanted in mutant[0]
    ]
    lost = lost_edits(chosen)
    if lost:
        sys.exit("mutants.py: the list has to follow the code.\n" + "\n".join(lost))
    if check:
        print(f"{len(chosen)} mutants: every edit applies.")
        return 0
    # First, the files as they are must pass their tests; else every mutant would seem to be killed.
    graded = [
        (file, "as it is", [], all_asked([ask for name, _, _, ask in chosen if name == file]))
        for file in dict.fromkeys(file for file, *_ in chosen)
    ] + chosen
    began, survivors = time.time(), []
    torch.set_num_threads(1)
    import_packages(dict.fromkeys(file for file, *_ in chosen))
    with tempfile.TemporaryDirectory() as top:
        jobs = []
        for i, (file, name, edits, ask) in enumerate(graded):
            folder = Path(top).resolve() / str(i)
            copy_repo(folder)
            (folder / file).write_text(mutate(file, edits))
            jobs.append((folder, file, ask))
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
            for (file, name, edits, ask), (code, first, output) in zip(
                graded, pool.imap(grade, jobs, chunksize=1)
            ):
                if not edits:
                    if code != 0:
                        sys.exit(f"mutants.py: {file} itself does not pass its tests:\n{output}")
                    continue
                if code not in (0, 1):  # 5: no test was asked
                    sys.exit(f"mutants.py: {file}, mutant '{name}' could not be graded:\n{output}")
                if first is None:
                    survivors.append(f"{file}: {name}")
                said = "SURVIVES" if first is None else f"{first[0]}\n    {first[1]}"
                print(f"{file}: {name}\n    {said}", flush=True)
    print(
        f"{len(chosen)} mutants, {len(chosen) - len(survivors)} killed, in"
        f" {time.time() - began:.0f} s."
    )
    if survivors:
        print("These survive: " + "; ".join(survivors))
    code = 1 if survivors else 0
    return code if words else max(code, wrong_solutions([]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
