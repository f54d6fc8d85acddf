"""Proof that tests/test_losses.py bites: each well-known bug, put into losses.py on purpose, must be caught.

    python tests/mutants.py            # every mutant, a line each: the bug, the test that kills it, what that test says
    python tests/mutants.py gspo       # only those with gspo in their name

A mutant is losses.py with one or two small edits. It is written to a temporary folder and graded there with IMPL, as a
student's file would be, by the tests that should see that bug. An edit whose text does not occur exactly once is an
error: the list has to follow losses.py. Exit code 1 if a mutant survives. About a minute on two cores.
"""
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
SOURCE = (HERE.parent / "losses.py").read_text()

CLAMP = "ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)"
MIN = "loss = -torch.min(unclipped, " + CLAMP
STD = "(r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + EPS)"
GROUPED = "r = _grouped(rewards, group_size)"
DS_TERM = """    term = torch.where(r == 1, -gamma_p * log_pi, gamma_n * log_pi)         # (B,)
    advantages = group_advantages(r, group_size) + term"""
DS_REWARD = "(r + term - (r + term).mean(1, keepdim=True)).flatten()"
K1 = 'kl(batch.old_logp, batch.ref_logp, "k1").sum(1)'
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
BLANK = "torch.where(generated, x, 0)\n"
KL = "beta * kl(batch.logp, batch.ref_logp)"

# (what is wrong, [(text, replacement), ...] or (text, replacement), which tests to ask: a pytest -k expression, or all)
MUTANTS = [
    # --- the clip
    ("no clip", (CLAMP, "ratio * advantages)"), "worked_batch or test_clip"),
    ("clip whatever the sign of A", (MIN, "loss = -(" + CLAMP), "worked_batch or test_clip"),
    ("max for min: the clip on the wrong side", (MIN, MIN.replace("min", "max")), "worked_batch or test_clip"),
    ("only the upper bound is clipped", (CLAMP, "ratio.clamp(max=1 + clip_high) * advantages)"),
     "worked_batch or test_clip"),
    ("only the lower bound is clipped", (CLAMP, "ratio.clamp(min=1 - clip_low) * advantages)"),
     "worked_batch or test_clip"),
    ("clip_low and clip_high swapped", (CLAMP, "ratio.clamp(1 - clip_high, 1 + clip_low) * advantages)"),
     "worked_batch or test_clip"),
    ("ratio inverted", ("torch.exp(batch.logp - batch.old_logp) ", "torch.exp(batch.old_logp - batch.logp) "),
     "worked_batch"),
    ("dapo with GRPO's upper clip", ("clip_low=0.2, clip_high=0.28", "clip_low=0.2, clip_high=0.2"), "worked_batch"),
    ("clip_frac counts |ratio - 1| > clip", ("return loss, too_high | too_low",
     "return loss, (ratio > 1 + clip_high) | (ratio < 1 - clip_low)"), "stats_of or test_clip"),
    # --- advantages
    ("std with ddof 1", ("correction=0", "correction=1"), "worked_batch or one_group"),
    ("std over the batch", (STD, STD.replace("r.std(1, keepdim=True, ", "r.std(")), "worked_batch"),
    ("mean and std over the batch", (STD, "(r - r.mean()) / (r.std(correction=0) + EPS)"), "worked_batch"),
    ("groups interleaved", [(GROUPED, GROUPED + ".reshape(group_size, -1).T"),
                            ("torch.where(equal, 0, a).flatten()", "torch.where(equal, 0, a).T.flatten()")],
     "worked_batch"),
    ("eps under the root", (STD, "(r - r.mean(1, keepdim=True)) / (r.var(1, keepdim=True, correction=0) + EPS).sqrt()"),
     "tiny"),
    ("eps 1e-4", ("EPS = 1e-6", "EPS = 1e-4"), "tiny"),
    ("no guard against equal rewards in float32", ("torch.where(equal, 0, a)", "a"), "exactly_zero"),
    ("the loss has the wrong sign", ("loss = -torch.min(", "loss = torch.min("), "worked_batch"),
    # --- mask, padding, aggregation
    ("mask off by one", (ON, "    mask = mask.roll(1, 1)\n" + ON), "padding_may_hold"),
    ("mask one column late", (ON, "    mask = mask * mask.roll(1, 1) * (torch.arange(mask.shape[1]) > 0)\n" + ON),
     "first_and_last"),
    ("stop token masked", (ON, "    mask = torch.cat([mask[:, 1:], mask[:, :1] * 0], 1)\n" + ON), "first_and_last"),
    ("masked by a product: NaN * 0 is NaN", (BLANK, "x * generated\n"), "padding_may_hold"),
    ("NaN on generated tokens masked away too", (BLANK, BLANK.replace("\n", ".nan_to_num(0)\n")),
     "not_hidden"),
    ("padding counted in the loss", ("token_loss = torch.where(mask, token_loss, 0)", "token_loss = token_loss"),
     "extra_padding"),
    ("token_mean in place of seq_mean",
     ("(token_loss.sum(1) / lengths.clamp(min=1)).sum() / rows", "token_loss.sum() / lengths.sum().clamp(min=1)"),
     "worked_batch or aggregators"),
    ("seq_mean in place of token_mean", (TOKEN_MEAN, TOKEN_MEAN.replace("token_loss.sum() / lengths.sum().clamp(min=1)",
     "(token_loss.sum(1) / lengths.clamp(min=1)).sum() / rows")), "worked_batch or aggregators"),
    ("mean of two micro-batch means",
     (TOKEN_MEAN, "        return sum(t.sum() / m.sum().clamp(min=1) for t, m in zip(token_loss.chunk(2), "
     "mask.chunk(2))) / 2\n"), "worked_batch or one_mean"),
    ("the padded width as dr_grpo's constant", ("/ rows / max_len", "/ rows / mask.shape[1]"), "worked_batch"),
    ("dr_grpo keeps the std",
     ("(r - r.mean(1, keepdim=True)).flatten() ", "group_advantages(batch.rewards, group_size) "), "one_group"),
    ("dr_grpo keeps the length", ('"seq_const", max_len)', '"token_mean")'), "aggregators"),
    ("rows without a token counted", ("rows = (lengths > 0).sum().clamp(min=1)", "rows = len(lengths)"),
     "all_masked_group"),
    ("an all-masked row is 0/0", ("(token_loss.sum(1) / lengths.clamp(min=1))", "(token_loss.sum(1) / lengths)"),
     "empty_mask or all_masked"),
    ("an all-zero mask is 0/0", ("token_loss.sum() / lengths.sum().clamp(min=1)", "token_loss.sum() / lengths.sum()"),
     "empty_mask"),
    ("sft by the mean of row means", ('(-batch.logp, batch.mask, "token_mean"), _stats(batch, ones)',
                                      '(-batch.logp, batch.mask, "seq_mean"), _stats(batch, ones)'), "sft_by_hand"),
    ("rft divides by all tokens",
     ('loss = _aggregate(-batch.logp, batch.mask & correct[:, None], "token_mean")',
                                   'loss = _aggregate(-batch.logp * kept[:, None], batch.mask, "token_mean")'),
     "rft_by_hand"),
    ("reinforce divides by the length",
     ('"seq_sum"), _stats(batch, advantages)\n\n\ndef rloo', '"seq_mean"), _stats(batch, advantages)\n\n\ndef rloo'),
     "reinforce"),
    ("rloo divides by the length",
     ('"seq_sum"), _stats(batch, advantages)\n\n\ndef dr_', '"seq_mean"), _stats(batch, advantages)\n\n\ndef dr_'),
     "aggregators or worked_batch"),
    # --- constants that must be constant, arguments that must stay
    ("old_logp not detached", ("_blank_padding(old_logp.detach()", "_blank_padding(old_logp"), "are_constants"),
    ("ref_logp not detached", ("_blank_padding(ref_logp.detach()", "_blank_padding(ref_logp"), "are_constants"),
    ("gradient leaks through the advantages",
     (TOTAL, "total = (batch.old_logp + batch.logp - batch.logp.detach()).sum(1) "), "worked_batch"),
    ("smoothing term from logp, detached", (TOTAL, "total = batch.logp.detach().sum(1) "), "worked_batch"),
    ("cispo's weight not detached",
     ("torch.exp(batch.logp.detach() - batch.old_logp)", "torch.exp(batch.logp - batch.old_logp)"), "cispo_weight"),
    ("rewards centred in place", ("a = (r - r.mean(1, keepdim=True)) /", "a = r.sub_(r.mean(1, keepdim=True)) /"),
     "nothing_is_written"),
    ("padding of old_logp zeroed in place", ("_blank_padding(old_logp.detach(), generated)", "old_logp.detach().masked_fill_(~generated, 0)"),
     "nothing_is_written"),
    # --- KL
    ("KL direction flipped: d swapped", ("d = logp - ref_logp  ", "d = ref_logp - logp  "), "kl or worked_batch"),
    ("KL term with the wrong sign", ("token_loss + beta * kl(", "token_loss - beta * kl("), "worked_batch or kl_term"),
    ("k1 in the loss", (KL, KL.replace(")", ', "k1")')),
     "worked_batch or kl_term"),
    ("k2 in the loss", (KL, "beta * (batch.logp - batch.ref_logp) ** 2 / 2"),
     "worked_batch or kl_term"),
    ("k3 by exp: no digits left in float32", ("torch.expm1(-d) + d", "torch.exp(-d) - 1 + d"), "k3_is_never"),
    ("KL in the reward with the wrong sign", ("batch.rewards - beta * " + K1, "batch.rewards + beta * " + K1),
     "worked_batch or expected_gradient"),
    ("rloo subtracts the KL after the baseline",
     [("_grouped(_penalised_rewards(batch, beta), group_size)", "_grouped(batch.rewards, group_size)"),
     ("(r - others).flatten()", "(r - others).flatten() + _penalised_rewards(batch, beta) - batch.rewards")], "worked_batch"),
    ("beta without reference is a silent zero",
     ("    if beta:\n", "    if beta and batch.ref_logp is not None:\n"), "refused"),
    # --- entropy
    ("entropy bonus with the wrong sign", (BONUS, BONUS.replace(" - ", " + ")), "entropy"),
    ("entropy without gradient", (BONUS, BONUS.rstrip() + ".detach() "), "entropy_gradient"),
    ("entropy averaged by token_mean",
     (BONUS, BONUS.rstrip() + " * batch.mask.sum(1, keepdim=True) * len(batch.mask) / batch.mask.sum() "),
     "worked_batch or entropy_gradient"),
    ("entropy_coef without entropy is a silent zero", [("if entropy is None and entropy_coef:", "if False:"),
     ("    if entropy_coef:\n", "    if entropy is not None:\n")], "without_entropy"),
    # --- differential smoothing
    ("gamma_p with the wrong sign", (DS_TERM, DS_TERM.replace("-gamma_p", "gamma_p")), "worked_batch or ds_positive"),
    ("gamma_n with the wrong sign", (DS_TERM, DS_TERM.replace("gamma_n", "-gamma_n")), "worked_batch or ds_negative"),
    ("both gammas with the wrong sign", (DS_TERM, DS_TERM.replace("+ term", "- term")), "worked_batch"),
    ("gammas swapped", (DS_TERM, DS_TERM.replace("gamma_p", "X").replace("gamma_n", "gamma_p").replace("X", "gamma_n")),
     "worked_batch or smoothed"),
    ("smoothing term silently zero", (DS_TERM, DS_TERM.replace("+ term", "+ 0 * term")), "worked_batch or silently"),
    ("no smoothing in groups of equal rewards",
     (DS_TERM, DS_TERM.replace("+ term", "+ term * (group_advantages(r, group_size) != 0)")),
     "silently or smoothed"),
    ("smoothing before normalisation",
     (DS_TERM, DS_TERM.replace("r, group_size) + term", "r + term, group_size)")),
     "worked_batch"),
    ("log pi summed over padding too",
     (TOTAL, "total = batch.old_logp.sum(1) + (~batch.mask).sum(1) * batch.old_logp[:, 0] "), "worked_batch"),
    ("reduction: sum and mean exchanged", ('reduction == "sum"', 'reduction == "mean"'), "worked_batch"),
    ("mean over the padded width", ("total / batch.mask.sum(1).clamp(min=1)", "total / batch.mask.shape[1]"),
     "worked_batch or extra_padding"),
    ("diffsmooth: correct as r > 0", (DS_TERM, DS_TERM.replace("r == 1", "r > 0")),
     "format_reward or correct_means"),
    ("diffsmooth_reward: not centred", (DS_REWARD, "(r + term - r.mean(1, keepdim=True)).flatten()"), "smoothed"),
    ("diffsmooth_reward: divided by the std", (DS_REWARD, "group_advantages((r + term).flatten(), group_size)"),
     "smoothed"),
    ("diffsmooth_reward: gammas 0", (DS_REWARD, "(r - r.mean(1, keepdim=True)).flatten()"), "smoothed or silently"),
    # --- the other variants
    ("rloo's baseline includes the answer itself",
     ("others = (r.sum(1, keepdim=True) - r) / (group_size - 1)", "others = r.mean(1, keepdim=True)"),
     "one_group"),
    ("reinforce subtracts the group mean",
     ("_penalised_rewards(batch, beta) - baseline ", "_penalised_rewards(batch, beta).sub(batch.rewards.mean()) - baseline "), "number_correct"),
    ("gspo: product of ratios", (GSPO, GSPO.replace(" / lengths", "")), "gspo_ratio"),
    ("gspo: mean of ratios",
     (GSPO,
      "log_ratio = (torch.where(batch.mask, torch.exp(batch.logp - batch.old_logp), 0).sum(1, keepdim=True) / lengths).log()"),
     "gspo_ratio"),
    ("gspo with GRPO's clip", ("clip_low=3e-4, clip_high=4e-4", "clip_low=0.2, clip_high=0.2"), "worked_batch"),
    ("cispo's cap read as absolute", (WEIGHT, WEIGHT.replace("1 + clip_high", "clip_high")), "cispo_weight"),
    ("cispo with a floor of 0.8", ("clip_low=1.0, clip_high=4.0", "clip_low=0.2, clip_high=4.0"), "cispo_weight"),
    ("cispo clips like PPO", ("token_loss = -weight * advantages[:, None] * batch.logp",
                              "token_loss = -weight * advantages[:, None] * batch.logp * (ratio == weight)"),
     "cispo_weight"),
    ("unlikeliness: rank 0 is the likeliest",
     ("likelihood.argsort(dim=1, stable=True)", "likelihood.argsort(dim=1, stable=True, descending=True)"),
     "unlikeliness_ranks"),
    ("unlikeliness: ranks by the sum", (LIKELIHOOD + "    order", LIKELIHOOD.replace("mean", "sum") + "    order"),
     "worked_batch"),
    ("unlikeliness: order for rank", (".argsort(dim=1).flatten()", ".flatten()"), "unlikeliness_ranks"),
    ("ucpo: q from the sum", (LIKELIHOOD + "    q", LIKELIHOOD.replace("mean", "sum") + "    q"), "worked_batch"),
    ("ucpo: more to the likely ones",
     ("rarity = torch.where(correct, 1 / q, 0)", "rarity = torch.where(correct, q, 0)"), "ucpo"),
    ("ucpo: q over wrong answers too", (Q, "q = likelihood.softmax(1).clamp(min=1e-6) ** 2"), "ucpo"),
    ("ucpo: the total is not kept", ("correct.sum(1, keepdim=True) * rarity", "rarity"), "ucpo"),
    ("passk: wrong answers get -R only", ("[(f - w) / s for f, w, s in", "[(f - 1) / s for f, w, s in"), "one_group"),
    ("passk: k is ignored", ("fail = [C(G - c, k) / C(G, k) for c in counts]", "fail = [(G - c) / G for c in counts]"),
     "one_group"),
    ("pkpo: the factor k is lost", (PKPO, PKPO.replace("k * C(", "C(")), "one_group"),
    ("pkpo: the factor G is lost", (PKPO, PKPO.replace("k * C(", "k / G * C(")), "one_group"),
    ("pkpo: a std afterwards",
     (PKPO_A, "advantages = group_advantages(torch.where(batch.rewards == 1, right, 0), group_size)"), "one_group"),
    ("pkpo: one more leave-one-out baseline", (PKPO_A, "a = _grouped(torch.where(batch.rewards == 1, right, 0), G)\n"
     "    advantages = (a - (a.sum(1, keepdim=True) - a) / (G - 1)).flatten()"), "bernoulli"),
    ("passk and pkpo: c counts r > 0", ("c = _grouped(batch.rewards == 1,", "c = _grouped(batch.rewards > 0,"),
     "correct_means"),
    ("passk: correct as r > 0",
     ("torch.where(batch.rewards == 1, right, wrong)", "torch.where(batch.rewards > 0, right, wrong)"),
     "correct_means"),
    ("pkpo: correct as r > 0", (PKPO_A, PKPO_A.replace("== 1", "> 0")), "correct_means"),
    ("w_reinforce: correct as r > 0",
     ("correct = (batch.rewards == 1).to(batch.logp)", "correct = (batch.rewards > 0).to(batch.logp)"),
     "correct_means"),
    ("ucpo: correct as r > 0",
     ("correct = _grouped(batch.rewards == 1, group_size)  ", "correct = _grouped(batch.rewards > 0, group_size)  "),
     "correct_means"),
    ("rft: correct as r > 0",
     ("    correct = batch.rewards == 1  ", "    correct = batch.rewards > 0  "), "correct_means"),
    ("w_reinforce rewards mistakes",
     ("w_pos * correct - w_neg * (1 - correct)", "w_pos * correct + w_neg * (1 - correct)"),
     "number_correct or one_step"),
    ("maxrl: divided by the std",
     ("(r - mean) / (mean + EPS)", "(r - mean) / (r.std(1, keepdim=True, correction=0) + EPS)"), "one_group"),
    ("maxrl: all-wrong groups at A = -1", ("((r - mean) / (mean + EPS)).flatten()", "(r / (mean + EPS) - 1).flatten()"),
     "bernoulli or number_correct"),
    ("focal: p for 1 - p", ("(1 - c / group_size) ** focal_gamma", "(c / group_size) ** focal_gamma"),
     "one_group or worked_batch"),
    # --- input that must not pass
    ("a **kwargs that swallows misspelt options",
     ('beta=0.0, agg="seq_mean"):\n    """GRPO (arXiv', 'beta=0.0, agg="seq_mean", **unused):\n    """GRPO (arXiv'),
     "misspelt"),
    ("group_size that does not divide is accepted", ("if group_size < 1 or len(x) % group_size:", "if group_size < 1:"),
     "refused"),
    ("positive log-probabilities are accepted", ("= x > 1e-4\n", "= x > 1e9\n"), "refused"),
    ("a mask of 0.5 is accepted", ("mask != generated,", "mask < 0,"), "refused"),
    ("k above the group size is accepted", ("if not 1 <= k <= group_size:", "if k < 1:"), "refused"),
    ("negative rewards pass maxrl", ("complaints = {\n", "min_reward = -math.inf\n    complaints = {\n"), "negative_rewards"),
]


class Recorder:
    """A pytest plugin: the first failure and what it said."""

    def __init__(self):
        self.first = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.first is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = (crash.message if crash else str(report.longrepr)).split("\n")[0]
            self.first = report.nodeid.split("::")[-1], message.replace("Failed: ", "").replace("AssertionError: ", "")


def grade(job):
    """Run the tests on folder/mutant.py -> (exit code, (test, message) or None, output). Called in a child process."""
    folder, ask = job
    os.environ |= {"IMPL": "mutant", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}   # other plugins only cost time here
    sys.path.insert(0, str(folder))
    recorder, output = Recorder(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        options = ["-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", *(["-k", ask] if ask else [])]
        code = pytest.main([str(HERE / "test_losses.py"), *options], plugins=[recorder])
    return int(code), recorder.first, output.getvalue()


def mutate(edits):
    source = SOURCE
    for old, new in [edits] if isinstance(edits, tuple) else edits:
        if source.count(old) != 1:
            sys.exit(f"mutants.py: this text must occur once in losses.py, but it does {source.count(old)} times:\n{old}")
        source = source.replace(old, new)
    return source


def main():
    wanted = " ".join(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if wanted in mutant[0]]
    jobs, began = [], time.time()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as top:
        for i, (source, ask) in enumerate([(SOURCE, "")] + [(mutate(edits), ask) for _, edits, ask in chosen]):
            folder = Path(top) / str(i)
            folder.mkdir()
            (folder / "mutant.py").write_text(source)
            jobs.append((folder, ask))
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
            results = pool.imap(grade, jobs, chunksize=1)
            code, first, output = next(results)
            if code != 0:
                sys.exit(f"mutants.py: losses.py itself does not pass its tests:\n{output}")
            survivors = []
            for (name, _, _), (code, first, output) in zip(chosen, results):
                if code not in (0, 1, 5):
                    sys.exit(f"mutants.py: mutant '{name}' could not be graded:\n{output}")
                if first is None:
                    survivors.append(name)
                print(f"{name}\n    " + ("SURVIVES" if first is None else f"{first[0]}\n    {first[1]}"), flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - len(survivors)} killed, in {time.time() - began:.0f} s.")
    if survivors:
        print("These survive: " + "; ".join(survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
