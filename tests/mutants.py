"""Proof that the tests bite: each well-known bug, put on purpose into a copy of the repo, must be caught.

    python tests/mutants.py                 # every mutant, a line each: the bug, the test that kills it, what it says
    python tests/mutants.py losses.py       # only those of one file
    python tests/mutants.py losses.py gspo  # only those with gspo in their name

A mutant is one file with one or two small edits. It is graded in a temporary copy of the repo by the tests of that
file alone (`TESTS`), up to the first that fails. An edit whose text does not occur exactly once is an error: the list
has to follow the code. Exit code 1 if a mutant survives. Some two minutes on two cores.
"""
import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
TESTS = {"losses.py": ["test_losses.py"], "policy.py": ["test_policy.py", "test_logprobs.py"],
         "sample.py": ["test_sample.py"],
         "rewards.py": ["test_rewards.py"], "eval.py": ["test_eval.py"], "train.py": ["test_train.py"]}
CORE, CARE = "-m core", "-m care"                      # the tests of losses.py that must see it: see test_losses.py

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

LOSSES = [
    # --- the clip
    ("no clip", (CLAMP, "ratio * advantages)"), CORE),
    ("clip whatever the sign of A", (MIN, "loss = -(" + CLAMP), CORE),
    ("max for min: the clip on the wrong side", (MIN, MIN.replace("min", "max")), CORE),
    ("only the upper bound is clipped", (CLAMP, "ratio.clamp(max=1 + clip_high) * advantages)"), CORE),
    ("only the lower bound is clipped", (CLAMP, "ratio.clamp(min=1 - clip_low) * advantages)"), CORE),
    ("clip_low and clip_high swapped", (CLAMP, "ratio.clamp(1 - clip_high, 1 + clip_low) * advantages)"), CORE),
    ("ratio inverted", ("torch.exp(batch.logp - batch.old_logp) ", "torch.exp(batch.old_logp - batch.logp) "), CORE),
    ("dapo with GRPO's upper clip", ("clip_low=0.2, clip_high=0.28", "clip_low=0.2, clip_high=0.2"), CORE),
    ("clip_frac counts |ratio - 1| > clip", ("return loss, too_high | too_low",
     "return loss, (ratio > 1 + clip_high) | (ratio < 1 - clip_low)"), CARE),
    # --- advantages
    ("std with ddof 1", ("correction=0", "correction=1"), CORE),
    ("std over the batch", (STD, STD.replace("r.std(1, keepdim=True, ", "r.std(")), CORE),
    ("mean and std over the batch", (STD, "(r - r.mean()) / (r.std(correction=0) + EPS)"), CORE),
    ("groups interleaved", [(GROUPED, GROUPED + ".reshape(group_size, -1).T"),
                            ("torch.where(equal, 0, a).flatten()", "torch.where(equal, 0, a).T.flatten()")], CORE),
    ("eps under the root", (STD, "(r - r.mean(1, keepdim=True)) / (r.var(1, keepdim=True, correction=0) + EPS).sqrt()"),
     CORE),
    ("eps 1e-4", ("EPS = 1e-6", "EPS = 1e-4"), CORE),
    ("no guard against equal rewards in float32", ("torch.where(equal, 0, a)", "a"), CARE),
    ("the loss has the wrong sign", ("loss = -torch.min(", "loss = torch.min("), CORE),
    # --- mask, padding, aggregation
    ("mask off by one", (ON, "    mask = mask.roll(1, 1)\n" + ON), CORE),
    ("mask one column late", (ON, "    mask = mask * mask.roll(1, 1) * (torch.arange(mask.shape[1]) > 0)\n" + ON),
     CORE),
    ("stop token masked", (ON, "    mask = torch.cat([mask[:, 1:], mask[:, :1] * 0], 1)\n" + ON), CORE),
    ("masked by a product: NaN * 0 is NaN", (BLANK, "x * generated\n"), CARE),
    ("NaN on generated tokens masked away too", (BLANK, BLANK.replace("\n", ".nan_to_num(0)\n")), CARE),
    ("padding counted in the loss", ("token_loss = torch.where(mask, token_loss, 0)", "token_loss = token_loss"), CORE),
    ("token_mean in place of seq_mean",
     ("(token_loss.sum(1) / lengths.clamp(min=1)).sum() / rows", "token_loss.sum() / lengths.sum().clamp(min=1)"),
     CORE),
    ("seq_mean in place of token_mean", (TOKEN_MEAN, TOKEN_MEAN.replace("token_loss.sum() / lengths.sum().clamp(min=1)",
     "(token_loss.sum(1) / lengths.clamp(min=1)).sum() / rows")), CORE),
    ("mean of two micro-batch means",
     (TOKEN_MEAN, "        return sum(t.sum() / m.sum().clamp(min=1) for t, m in zip(token_loss.chunk(2), "
     "mask.chunk(2))) / 2\n"), CORE),
    ("the padded width as dr_grpo's constant", ("/ rows / max_len", "/ rows / mask.shape[1]"), CORE),
    ("dr_grpo keeps the std",
     ("(r - r.mean(1, keepdim=True)).flatten() ", "group_advantages(batch.rewards, group_size) "), CORE),
    ("dr_grpo keeps the length", ('"seq_const", max_len)', '"token_mean")'), CORE),
    ("rows without a token counted", ("rows = (lengths > 0).sum().clamp(min=1)", "rows = len(lengths)"), CARE),
    ("an all-masked row is 0/0", ("(token_loss.sum(1) / lengths.clamp(min=1))", "(token_loss.sum(1) / lengths)"), CARE),
    ("an all-zero mask is 0/0", ("token_loss.sum() / lengths.sum().clamp(min=1)", "token_loss.sum() / lengths.sum()"),
     CARE),
    ("sft by the mean of row means", ('(-batch.logp, batch.mask, "token_mean"), _stats(batch, ones)',
                                      '(-batch.logp, batch.mask, "seq_mean"), _stats(batch, ones)'), CORE),
    ("rft divides by all tokens",
     ('loss = _aggregate(-batch.logp, batch.mask & correct[:, None], "token_mean")',
                                   'loss = _aggregate(-batch.logp * kept[:, None], batch.mask, "token_mean")'), CORE),
    ("reinforce divides by the length",
     ('"seq_sum"), _stats(batch, advantages)\n\n\ndef rloo', '"seq_mean"), _stats(batch, advantages)\n\n\ndef rloo'),
     CORE),
    ("rloo divides by the length",
     ('"seq_sum"), _stats(batch, advantages)\n\n\ndef dr_', '"seq_mean"), _stats(batch, advantages)\n\n\ndef dr_'),
     CORE),
    # --- constants that must be constant, arguments that must stay
    ("old_logp not detached", ("_blank_padding(old_logp.detach()", "_blank_padding(old_logp"), CORE),
    ("ref_logp not detached", ("_blank_padding(ref_logp.detach()", "_blank_padding(ref_logp"), CARE),
    ("gradient leaks through the advantages",
     (TOTAL, "total = (batch.old_logp + batch.logp - batch.logp.detach()).sum(1) "), CORE),
    ("smoothing term from logp, detached", (TOTAL, "total = batch.logp.detach().sum(1) "), CORE),
    ("cispo's weight not detached",
     ("torch.exp(batch.logp.detach() - batch.old_logp)", "torch.exp(batch.logp - batch.old_logp)"), CORE),
    ("rewards centred in place", ("a = (r - r.mean(1, keepdim=True)) /", "a = r.sub_(r.mean(1, keepdim=True)) /"),
     CARE),
    ("padding of old_logp zeroed in place", ("_blank_padding(old_logp.detach(), generated)",
                                             "old_logp.detach().masked_fill_(~generated, 0)"), CARE),
    # --- KL
    ("KL direction flipped: d swapped", ("d = logp - ref_logp  ", "d = ref_logp - logp  "), CORE),
    ("KL term with the wrong sign", ("token_loss + beta * kl(", "token_loss - beta * kl("), CORE),
    ("k1 in the loss", (KL, KL.replace(")", ', "k1")')), CORE),
    ("k2 in the loss", (KL, "beta * (batch.logp - batch.ref_logp) ** 2 / 2"), CORE),
    ("k3 by exp: no digits left in float32", ("torch.expm1(-d) + d", "torch.exp(-d) - 1 + d"), CARE),
    ("KL in the reward with the wrong sign", ("batch.rewards - beta * " + K1, "batch.rewards + beta * " + K1), CORE),
    ("rloo subtracts the KL after the baseline",
     [("_grouped(_penalised_rewards(batch, beta), group_size)", "_grouped(batch.rewards, group_size)"),
     ("(r - others).flatten()", "(r - others).flatten() + _penalised_rewards(batch, beta) - batch.rewards")], CORE),
    ("beta without reference is a silent zero",
     ("    if beta:\n", "    if beta and batch.ref_logp is not None:\n"), CARE),
    # --- entropy
    ("entropy bonus with the wrong sign", (BONUS, BONUS.replace(" - ", " + ")), CORE),
    ("entropy without gradient", (BONUS, BONUS.rstrip() + ".detach() "), CORE),
    ("entropy averaged by token_mean",
     (BONUS, BONUS.rstrip() + " * batch.mask.sum(1, keepdim=True) * len(batch.mask) / batch.mask.sum() "), CORE),
    ("entropy_coef without entropy is a silent zero", [("if entropy is None and entropy_coef:", "if False:"),
     ("    if entropy_coef:\n", "    if entropy is not None:\n")], CARE),
    # --- differential smoothing
    ("gamma_p with the wrong sign", (DS_TERM, DS_TERM.replace("-gamma_p", "gamma_p")), CORE),
    ("gamma_n with the wrong sign", (DS_TERM, DS_TERM.replace("gamma_n", "-gamma_n")), CORE),
    ("both gammas with the wrong sign", (DS_TERM, DS_TERM.replace("+ term", "- term")), CORE),
    ("gammas swapped", (DS_TERM, DS_TERM.replace("gamma_p", "X").replace("gamma_n", "gamma_p").replace("X", "gamma_n")),
     CORE),
    ("smoothing term silently zero", (DS_TERM, DS_TERM.replace("+ term", "+ 0 * term")), CORE),
    ("no smoothing in groups of equal rewards",
     (DS_TERM, DS_TERM.replace("+ term", "+ term * (group_advantages(r, group_size) != 0)")), CORE),
    ("smoothing before normalisation",
     (DS_TERM, DS_TERM.replace("r, group_size) + term", "r + term, group_size)")), CORE),
    ("log pi summed over padding too",
     (TOTAL, "total = batch.old_logp.sum(1) + (~batch.mask).sum(1) * batch.old_logp[:, 0] "), CORE),
    ("reduction: sum and mean exchanged", ('reduction == "sum"', 'reduction == "mean"'), CORE),
    ("mean over the padded width", ("total / batch.mask.sum(1).clamp(min=1)", "total / batch.mask.shape[1]"), CORE),
    ("diffsmooth: correct as r > 0", (DS_TERM, DS_TERM.replace("r == 1", "r > 0")), CORE),
    ("diffsmooth_reward: not centred", (DS_REWARD, "(r + term - r.mean(1, keepdim=True)).flatten()"), CORE),
    ("diffsmooth_reward: divided by the std", (DS_REWARD, "group_advantages((r + term).flatten(), group_size)"), CORE),
    ("diffsmooth_reward: gammas 0", (DS_REWARD, "(r - r.mean(1, keepdim=True)).flatten()"), CORE),
    # --- the other variants
    ("rloo's baseline includes the answer itself",
     ("others = (r.sum(1, keepdim=True) - r) / (group_size - 1)", "others = r.mean(1, keepdim=True)"), CORE),
    ("reinforce subtracts the group mean",
     ("_penalised_rewards(batch, beta) - baseline ",
      "_penalised_rewards(batch, beta).sub(batch.rewards.mean()) - baseline "), CORE),
    ("gspo: product of ratios", (GSPO, GSPO.replace(" / lengths", "")), CORE),
    ("gspo: mean of ratios",
     (GSPO,
      "token_ratio = torch.where(batch.mask, torch.exp(batch.logp - batch.old_logp), 0)\n"
      "    log_ratio = (token_ratio.sum(1, keepdim=True) / lengths).log()"), CORE),
    ("gspo with GRPO's clip", ("clip_low=3e-4, clip_high=4e-4", "clip_low=0.2, clip_high=0.2"), CORE),
    ("cispo's cap read as absolute", (WEIGHT, WEIGHT.replace("1 + clip_high", "clip_high")), CORE),
    ("cispo with a floor of 0.8", ("clip_low=1.0, clip_high=4.0", "clip_low=0.2, clip_high=4.0"), CORE),
    ("cispo clips like PPO", ("token_loss = -weight * advantages[:, None] * batch.logp",
                              "token_loss = -weight * advantages[:, None] * batch.logp * (ratio == weight)"), CORE),
    ("unlikeliness: rank 0 is the likeliest",
     ("likelihood.argsort(dim=1, stable=True)", "likelihood.argsort(dim=1, stable=True, descending=True)"), CORE),
    ("unlikeliness: ranks by the sum", (LIKELIHOOD + "    order", LIKELIHOOD.replace("mean", "sum") + "    order"),
     CORE),
    ("unlikeliness: order for rank", (".argsort(dim=1).flatten()", ".flatten()"), CORE),
    ("ucpo: q from the sum", (LIKELIHOOD + "    q", LIKELIHOOD.replace("mean", "sum") + "    q"), CORE),
    ("ucpo: more to the likely ones",
     ("rarity = torch.where(correct, 1 / q, 0)", "rarity = torch.where(correct, q, 0)"), CORE),
    ("ucpo: q over wrong answers too", (Q, "q = likelihood.softmax(1).clamp(min=1e-6) ** 2"), CORE),
    ("ucpo: the total is not kept", ("correct.sum(1, keepdim=True) * rarity", "rarity"), CORE),
    ("passk: wrong answers get -R only", ("[(f - w) / s for f, w, s in", "[(f - 1) / s for f, w, s in"), CORE),
    ("passk: k is ignored", ("fail = [C(G - c, k) / C(G, k) for c in counts]", "fail = [(G - c) / G for c in counts]"),
     CORE),
    ("pkpo: the factor k is lost", (PKPO, PKPO.replace("k * C(", "C(")), CORE),
    ("pkpo: the factor G is lost", (PKPO, PKPO.replace("k * C(", "k / G * C(")), CORE),
    ("pkpo: a std afterwards",
     (PKPO_A, "advantages = group_advantages(torch.where(batch.rewards == 1, right, 0), group_size)"), CORE),
    ("pkpo: one more leave-one-out baseline", (PKPO_A, "a = _grouped(torch.where(batch.rewards == 1, right, 0), G)\n"
     "    advantages = (a - (a.sum(1, keepdim=True) - a) / (G - 1)).flatten()"), CORE),
    ("passk and pkpo: c counts r > 0", ("c = _grouped(batch.rewards == 1,", "c = _grouped(batch.rewards > 0,"), CORE),
    ("passk: correct as r > 0",
     ("torch.where(batch.rewards == 1, right, wrong)", "torch.where(batch.rewards > 0, right, wrong)"), CORE),
    ("pkpo: correct as r > 0", (PKPO_A, PKPO_A.replace("== 1", "> 0")), CORE),
    ("w_reinforce: correct as r > 0",
     ("correct = (batch.rewards == 1).to(batch.logp)", "correct = (batch.rewards > 0).to(batch.logp)"), CORE),
    ("ucpo: correct as r > 0",
     ("correct = _grouped(batch.rewards == 1, group_size)  ", "correct = _grouped(batch.rewards > 0, group_size)  "),
     CORE),
    ("rft: correct as r > 0",
     ("    correct = batch.rewards == 1  ", "    correct = batch.rewards > 0  "), CORE),
    ("w_reinforce rewards mistakes",
     ("w_pos * correct - w_neg * (1 - correct)", "w_pos * correct + w_neg * (1 - correct)"), CORE),
    ("maxrl: divided by the std",
     ("(r - mean) / (mean + EPS)", "(r - mean) / (r.std(1, keepdim=True, correction=0) + EPS)"), CORE),
    ("maxrl: all-wrong groups at A = -1", ("((r - mean) / (mean + EPS)).flatten()", "(r / (mean + EPS) - 1).flatten()"),
     CORE),
    ("focal: p for 1 - p", ("(1 - c / group_size) ** focal_gamma", "(c / group_size) ** focal_gamma"), CORE),
    # --- input that must not pass
    ("a **kwargs that swallows misspelt options",
     ('beta=0.0, agg="seq_mean"):\n    """GRPO (arXiv', 'beta=0.0, agg="seq_mean", **unused):\n    """GRPO (arXiv'),
     CARE),
    ("group_size that does not divide is accepted", ("if group_size < 1 or len(x) % group_size:", "if group_size < 1:"),
     CARE),
    ("positive log-probabilities are accepted", ("= x > 1e-4\n", "= x > 1e9\n"), CARE),
    ("a mask of 0.5 is accepted", ("mask != generated,", "mask < 0,"), CARE),
    ("k above the group size is accepted", ("if not 1 <= k <= group_size:", "if k < 1:"), CARE),
    ("negative rewards pass maxrl", ("complaints = {\n", "min_reward = -math.inf\n    complaints = {\n"), CARE),
]

EVAL = [
    ("the biased plug-in estimate of Pass@k", ("return 1.0 - math.comb(n - c, k) / math.comb(n, k)",
                                               "return 1.0 - (1 - c / n) ** k"), "-k pass_at_k"),
    ("sigma counts an answer as its own pair", ("same = sum(m * (m - 1) for m in forms.values())",
                                                "same = sum(m * m for m in forms.values())"), "-k sigma"),
    ("every model resampled on its own: unpaired gains", ("interval(x - values[first][name], picks)",
     "interval(x - values[first][name][np.random.permutation(size)], picks)"), "-k paired"),
]

# file: [(what is wrong, (text, replacement) or a list of them, options of pytest: which tests to ask; "" is all), ...]
MUTANTS = {"losses.py": LOSSES, "eval.py": EVAL}


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
    """Run a file's tests in a copy of the repo -> (exit code, (test, message) or None, output). In a child process."""
    folder, file, ask = job
    # Other plugins only cost time here; a tokenizer that has been forked would warn.
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.pop("IMPL", None)
    os.chdir(folder)
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() not in (REPO, REPO / "tests")]
    sys.path[:] = [str(folder), *elsewhere]
    recorder, output = Recorder(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        options = ["-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider",
                   "-p", "no:unraisableexception", *ask.split(" ", 1)]          # that one costs a quarter second
        code = pytest.main([str(folder / "tests" / test) for test in TESTS[file]] + list(filter(None, options)),
                           plugins=[recorder])
    shutil.rmtree(folder)
    return int(code), recorder.first, output.getvalue()


def import_packages(files):
    """What the files import from elsewhere, once for all children; ours is forgotten again, each child has its own."""
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


def mutate(file, edits):
    source = (REPO / file).read_text()
    for old, new in [edits] if isinstance(edits, tuple) else edits:
        if source.count(old) != 1:
            sys.exit(f"mutants.py: this text must occur once in {file}, but it does {source.count(old)} times:\n{old}")
        source = source.replace(old, new)
    return source


def main(words):
    files = [word for word in words if word in TESTS] or list(MUTANTS)
    wanted = " ".join(word for word in words if word not in TESTS)
    chosen = [(file, *mutant) for file in files for mutant in MUTANTS.get(file, []) if wanted in mutant[0]]
    # First, the files as they are must pass their tests; else every mutant would seem to be killed.
    graded = [(file, "as it is", [], "") for file in dict.fromkeys(file for file, *_ in chosen)] + chosen
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
            for (file, name, edits, ask), (code, first, output) in zip(graded, pool.imap(grade, jobs, chunksize=1)):
                if not edits:
                    if code != 0:
                        sys.exit(f"mutants.py: {file} itself does not pass its tests:\n{output}")
                    continue
                if code not in (0, 1):                 # 5: no test was asked
                    sys.exit(f"mutants.py: {file}, mutant '{name}' could not be graded:\n{output}")
                if first is None:
                    survivors.append(f"{file}: {name}")
                said = "SURVIVES" if first is None else f"{first[0]}\n    {first[1]}"
                print(f"{file}: {name}\n    {said}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - len(survivors)} killed, in {time.time() - began:.0f} s.")
    if survivors:
        print("These survive: " + "; ".join(survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
