"""What the runs of study.py show: methods compared, claims and verdicts, the page, the figure.

The rules stand in PAGE, the text of the page. Letter: R, the number of means over problems: one for
each of 2000 resamplings of the problems, one for each seed, or one over all.
"""
import functools
import re
from typing import NamedTuple

import numpy as np

from study import (BASES, COLUMNS, DEFAULT, FRONTIER, HALF, HEADLINE, KS, LONG, METHODS, PASS, PATH,
                   PROBLEMS, RATE, RATES, SAMPLES, TASKS, TEMPERATURES, TWICE, WEIGHTED, Study,
                   at_rates, base_name, base_of, best, kept, longer, name_of, tried, validated,
                   with_rate)
import eval as evaluation                              # found because study.py extends sys.path
import policy as policy_module
from policy import UserError

SHOWN = (1, 4, 16, 64, WEIGHTED)
# The 97.5 % quantile of Student's t, for 2, 3, 4 and 5 bases: 1 to 4 degrees of freedom.
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def runs(study, flags, base=0):
    """{seed: line} of the finished runs with these flags. The base itself has no seed of its own:
    its line stands for every seed."""
    names = {seed: base_name(study.task, base) if flags == "base"
             else name_of(study.task, flags, seed, base) for seed in study.seeds}
    return {seed: study.results[name] for seed, name in names.items() if name in study.results}


def lines_of(study, flags):
    """The finished lines, that of the base once."""
    return list({id(line): line for line in runs(study, flags).values()}.values())


def passes(study, settings, temperature, base=0):
    """-> (the seeds that all of these settings have, Pass@k (settings, seeds, problems, 64))."""
    found = [runs(study, flags, base) for flags in settings]
    seeds = [seed for seed in study.seeds if all(seed in lines for lines in found)]
    return seeds, np.array([[PASS[lines[seed]["test"][temperature]["c"]] for seed in seeds]
                            for lines in found])


def passes_over_bases(study, settings, temperature):
    """-> (the bases that have runs of all these settings, Pass@k (settings, bases, problems, 64), a
    mean over the seeds of each base). With fewer than two bases there is nothing to say: ([], .)"""
    found = {}
    for base in (0, *BASES):
        seeds, x = passes(study, settings, temperature, base)
        found |= {base: x.mean(1)} if seeds else {}
    bases = list(found) if len(found) > 1 else []
    return bases, np.stack(list(found.values()), axis=1) if bases else np.zeros(0)


@functools.cache
def weights(problems):
    """(R, problems): the weight of a problem in each of R = 2000 resamplings, as eval.summary."""
    picks = np.random.default_rng(0).integers(0, problems, (2000, problems))
    return np.array([np.bincount(pick, minlength=problems) for pick in picks]) / problems


class Gain(NamedTuple):
    mean: float
    low: float
    high: float
    parts: np.ndarray                                  # one per seed, or one per base

    def side(self, level=0.0):
        """1 above `level`, -1 below, 0 neither: the whole interval lies there, and every part."""
        for sign, end in ((1, self.low), (-1, self.high)):
            if sign * (end - level) > 0 and (sign * (self.parts - level) > 0).all():
                return sign
        return 0

    def __str__(self):
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def gain(function, x, *options):
    """As eval.interval, for what need not be a mean over problems itself: function turns such
    means, (settings, R, ...), into (R,); x is (settings, seeds, problems, ...)."""
    drawn = np.einsum("rp,sp...->sr...", weights(x.shape[2]), x.mean(1), optimize=True)
    low, high = np.quantile(function(drawn, *options), [0.025, 0.975])
    whole = function(x.mean((1, 2))[:, None], *options)
    return Gain(whole[0], low, high, function(x.mean(2), *options))


def gain_over_bases(function, x):
    """The mean of the bases' gains; x (settings, bases, problems), bases >= 2. Its interval joins
    two, as independent errors add: a t interval over the bases, and the bootstrap over problems."""
    parts = function(x.mean(2))                                             # (bases,)
    drawn = function(np.einsum("rp,sbp->srb", weights(x.shape[2]), x, optimize=True)).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean = parts.mean()
    half = T_QUANTILE[len(parts)] * parts.std(ddof=1) / np.sqrt(len(parts))
    return Gain(mean, mean - np.hypot(half, mean - low), mean + np.hypot(half, high - mean), parts)


def lead(means):
    """(settings, ...) -> (...): the first minus the highest of the others."""
    return means[0] - means[1:].max(0)


def samples_needed(curves):
    """(2, R, 64) -> (R,): the smallest k at which the first has the Pass@64 of the second."""
    reached = curves[0] >= curves[1][:, -1:]
    return np.where(reached.any(1), reached.argmax(1) + 1, SAMPLES + 1)


def envelope(curves, levels):
    """(rates, T, R, 2) and (L, R) -> (L, R): the highest Pass@1 at which Pass@64 is at least
    `levels`, on straight lines between neighbouring temperatures; -inf where there is none."""
    highest = np.full(levels.shape, -np.inf)
    for curve in curves.transpose(0, 1, 3, 2):         # (T, 2, R)
        for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
            crossing = np.clip((levels - y0) / (y1 - y0 + 1e-12), 0, 1)
            for share in (0, crossing, 1):
                reached = y0 + share * (y1 - y0) >= levels - 1e-9
                x = np.where(reached, x0 + share * (x1 - x0), -np.inf)
                highest = np.maximum(highest, x)
    return highest


def outside(points, ours, part):
    """(rates, R, T, 2), of which the first `ours` are one method's, the others GRPO's -> (R,): how
    much higher Pass@1 is at equal Pass@64, between GRPO's highest Pass@1 and the highest Pass@64
    that both reach. part: the "mean" over that range, or one end of it, "cold" or "hot"."""
    ours, grpo = np.split(points.transpose(0, 2, 1, 3), [ours])             # (rates, T, R, 2)
    x, y = grpo.reshape(-1, *grpo.shape[2:]).transpose(2, 0, 1)             # (points, R) each
    top = np.minimum(y.max(0), ours[..., 1].max((0, 1)))                    # (R,)
    bottom = np.minimum(y[x.argmax(0), np.arange(len(top))], top)
    levels = np.linspace(bottom, top, 21)                                   # (21, R)
    gains = envelope(ours, levels) - envelope(grpo, levels)
    return {"mean": gains.mean(0), "cold": gains[0], "hot": gains[-1]}[part]


def frontier(study, method):
    """A method's gain over GRPO's frontier -> (seeds, {part: Gain}); None: not yet measured."""
    grpo, ours = at_rates(study, "grpo"), at_rates(study, method)
    seeds, _ = passes(study, [*grpo, *ours], "0.7")    # only fair with all rates of both
    if not seeds:
        return None
    study = study._replace(seeds=seeds)
    points = np.stack([passes(study, [*ours, *grpo], temperature)[1][..., [0, -1]]
                       for temperature in TEMPERATURES], axis=3)   # (rates, seeds, problems, T, 2)
    return seeds, {part: gain(outside, points, len(ours), part) for part in ("mean", "cold", "hot")}


# ------------------------------------------------------------------------------------------- claims

def verdict(signs, enough=any):
    """signs: 1 as the claim says, -1 the opposite, 0 neither."""
    return "contradicted" if -1 in signs else "shown" if enough(signs) else "not shown"


def verdicts(found):
    """{task: (verdict, numbers) or None} in words."""
    return ", ".join(f"{one[0] if one else 'not yet measured'} on `{task}`"
                     for task, one in found.items())


def listed(what, numbers):
    return f"{what} " + ", ".join(map(str, numbers))


def compare(study, ours, *rivals, want=dict.fromkeys(KS, 1), enough=any, over="seeds"):
    """Ours against the best of the rivals -> (verdict, numbers), or None where runs are missing.
    want: {k, or WEIGHTED: the sign that the claim predicts}; over: "seeds", of base 0, or "bases".
    T 0.7 decides."""
    measure, measure_gain = ((passes, gain) if over == "seeds"
                             else (passes_over_bases, gain_over_bases))
    signs, texts = [], []
    for temperature in ("0.7", "1.0"):
        found, x = measure(study, [ours, *rivals], temperature)
        if not found:
            return None
        gains = {key: measure_gain(lead, x @ COLUMNS[key]) for key in want}
        signs = signs or [want[key] * gains[key].side() for key in want]
        texts.append(f"T {float(temperature):g}: " + ", ".join(
            f"{gains[key]} in the {key}" if key == WEIGHTED else f"{gains[key]} at k = {key}"
            for key in want if key in SHOWN))
    return verdict(signs, enough), "; ".join([*texts, listed(over, found)])


def compare_samples(study, ours, grpo):
    seeds, x = passes(study, [ours, grpo], "0.7")
    if not seeds:
        return None
    k = gain(samples_needed, x)
    return verdict([-k.side(SAMPLES / 4 + 0.5)]), (
        f"T 0.7: k = {k.mean} [{k.low:.0f}, {k.high:.0f}] (65: more than 64); "
        + listed("seeds", seeds))


def compare_frontier(study, method):
    found = frontier(study, method)
    if not found:
        return None
    seeds, gains = found
    return verdict([gains["mean"].side()]), (
        "Pass@1 at equal Pass@64: {mean} on average, {cold} at the cold end, {hot} at the hot "
        "end; ".format(**gains) + listed("seeds", seeds))


def claims(study):
    """[(claim, (verdict, numbers), or None where runs are missing)]."""
    own = {method: kept(study, method) for method in METHODS}
    ours, grpo, two = own["diffsmooth"], own["grpo"], [own["bonus"], own["penalty"]]
    long = longer(study)
    sharpens = dict(want={1: 1, 64: -1}, enough=all)
    level = "Smoothing is at least as good as"
    found = [("RL sharpens: Pass@1 rises and Pass@64 falls",
              compare(study, grpo, "base", **sharpens)),
             (f"{level} the base at every k", compare(study, ours, "base")),
             ("Pass@k training is at least as good as the base at every k",
              compare(study, own["passk"], "base"))]
    for lr in RATES:
        found.append((f"{level} GRPO at every k, both with lr {lr}",
                      compare(study, with_rate(ours, lr), with_rate(grpo, lr))))
    found += [
        (f"{level} GRPO at every k, each with its best setting", compare(study, ours, grpo)),
        (f"Smoothing has a higher {WEIGHTED} than GRPO at the best of GRPO's rates",
         compare(study, ours, *at_rates(study, "grpo"), want={WEIGHTED: 1})),
        ("Smoothing lies outside GRPO's frontier over rate and temperature",
         compare_frontier(study, "diffsmooth")),
        ("Four times fewer samples: smoothing reaches GRPO's Pass@64 at k = 16, both with lr "
         + RATE,
         compare_samples(study, with_rate(ours, RATE), with_rate(grpo, RATE))),
        ("The bonus beats the penalty with many solutions, the penalty the bonus with one",
         compare(study, *two[::-1 if study.task == "one" else 1], want={WEIGHTED: 1})),
        (f"{level} the better of bonus and penalty at every k", compare(study, ours, *two)),
        (f"{level} GRPO at every k in the longer runs",
         compare(study, long["diffsmooth"], long["grpo"])),
        (f"{level} GRPO at every k in the longer runs, both with one rate",
         compare(study, long["diffsmooth"], long["grpo, same rate"])),
        ("Four times fewer samples in the longer runs, both with one rate",
         compare_samples(study, long["diffsmooth"], long["grpo, same rate"])),
        (f"{level} the better of bonus and penalty at every k in the longer runs",
         compare(study, long["diffsmooth"], long["bonus"], long["penalty"])),
        (f"The positive half matters: {level.lower()} gamma_n alone at every k",
         compare(study, ours, own["gamma_n alone"])),
        ("The positive half is enough: it is at least as good as both gammas at every k, all "
         "with gamma_p 0.2", compare(study, DEFAULT, own["both gammas"]))]
    for m in ("passk", "unlikeliness", "cispo", "maxrl", "focal"):
        beyond = "Beyond the paper. " * (m in ("maxrl", "focal"))
        found.append((f"{beyond}{level} {m} at every k", compare(study, ours, own[m])))
    ours, *rates = HEADLINE
    over = dict(over="bases")
    return found + [
        (f"Over bases, RL sharpens: Pass@1 rises and Pass@64 falls, with lr {RATE}",
         compare(study, rates[0], "base", **sharpens, **over)),
        (f"Over bases, {level.lower()} GRPO at every k, both with lr {RATE}",
         compare(study, ours, rates[0], **over)),
        (f"Over bases, {level.lower()} GRPO at every k, at the better of lr {RATE} and {HALF} "
         "for that k", compare(study, ours, *rates, **over)),
        (f"Over bases, smoothing has a higher {WEIGHTED} than GRPO at the better of lr {RATE} "
         f"and {HALF}", compare(study, ours, *rates, want={WEIGHTED: 1}, **over))]


# ----------------------------------------------------------------------------------------- the page

# Commits with which 60 steps of grpo and of diffsmooth end in the same weights and the same table.
ALIKE = {"a8c012a", "e303feb", "9ae2d2d", "dc35352", "c4da8b3"}

PAGE = """# The study

`python tests/bench/study.py` makes these runs; with `--only-print` it prints this page. So far:
{lines} runs, {hours:.1f} hours of one core, from commit {commits}{alike}.

- **A run** is `train.py` with the flags given and otherwise its defaults; the learning rate falls
  to 0 within {steps} steps. A longer run has `{longer}` and the setting kept for {steps} steps
  (GRPO also gets the rate of smoothing). Each is measured like the table at the end of a run:
  {problems} different held-out problems, {samples} answers each, draws of seed 0. T is the
  temperature of these answers.
- **A base** is the warm-started policy from which a run starts; its number is the seed of its warm
  start. A run starts from base 0 of its task unless its name says another. Each base is recorded
  below with a hash of its weights, and a run refuses to start from any other. The seed alone does
  not fix a base: without the study's settings for the arithmetic of the processor (`ARITHMETIC` in
  study.py), rounding turns the same seed into another base. With AVX-512, base 0 of `many` solves
  387 of the {problems} problems a different number of times at T 0.7; base 2 differs on 420.
- **The {weighted}** of a model is the mean of two numbers: Pass@1, and the mean of Pass@2, 4 .. 64.
- **Settings.** Each method has three, tried with seed 0: strengths, or learning rates where it has
  no strength; where the lowest rate is best, a lower one is tried too (never one above the
  highest, even where that is best). Smoothing also gets GRPO's learning rates, at its best
  strength. The setting with the highest {weighted} at T 0.7 on {problems} validation problems,
  other than the test problems, is kept. All other results are from other seeds; two methods are
  compared on the seeds that both have. Smoothing's default, gamma_p 0.2, is always measured.
- **A weakness of that choice.** The validation problems are harder: the generator repeats easy
  problems, so the first {problems} different ones are easier than the next, and among the rest too
  few have many solutions to match them. On them training gains less and loses more (the table
  below shows the base's {weighted} too), so the settings kept are gentler than the test problems
  would choose. The claims that name a rate, and the frontier, are affected through strengths
  only.{untried}
- **A difference** is between means over seeds, with a paired 95 % bootstrap interval over problems.
  That interval leaves out what other seeds would change; therefore a difference counts as above
  (below) 0 only if the whole interval is, and every single seed too.
- **Over bases.** Smoothing at its default and GRPO at {pair} are repeated on further
  bases, with one seed each; base 0 counts with the mean over its seeds. A difference over bases is
  the mean of the differences on each base. Its 95 % interval combines, as a root of summed squares,
  a t interval with the base as the unit (what another base and another seed would change) and the
  bootstrap over problems. It counts as above (below) 0 only if the whole interval is, and every
  single base too.
- **Verdicts** are for T 0.7. At every k (1, 2, 4 .. 64): *shown* if above 0 at some k and below at
  none, *contradicted* if below 0 at some k (so is a trade), else *not shown*. Sharpening: *shown*
  if both changes are as claimed, *contradicted* if one is the opposite. Other claims are judged by
  the number that they name.
- **The frontier** is the highest Pass@1 that comes with at least a given Pass@64, over T 0.4, 0.7,
  1, 1.3 (straight lines in between) and learning rates: the one kept; for GRPO and smoothing also
  {rates}; for bonus, passk and maxrl the first two of these. It is computed once all of these are
  measured; the other methods have one rate only, hence less room than GRPO. A gain over GRPO's
  frontier is in Pass@1 at equal Pass@64: at GRPO's highest Pass@1 (the cold end), at the highest
  Pass@64 that both reach (the hot end), and on average in between, which decides the verdict.

## The claims
"""


def table(title, head, rows):
    if rows:
        print(f"\n**{title}**\n")
    for cells in (head, ["---"] * len(head), *rows) if rows else ():
        print(row_of(cells))


def mean_sd(values, digits=1):
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def ends(curve):
    return f"{curve[0]:.1f} / {curve[-1]:.1f}"


def print_page(results, tasks, seeds):
    studies = [Study(results, task, seeds) for task in tasks]
    untried = [f"\n- **Not all settings are tried yet** on `{study.task}`, and the middle one "
               f"stands for these: {', '.join(missing)}." for study in studies
               if (missing := [m for m in METHODS if not best(study, tried(study, m))])]
    commits = list(dict.fromkeys(line["commit"] for line in results.values()))
    alike = (",\nwhich compute the same: 60 steps of grpo and of diffsmooth end in the same "
             "weights, bit for bit")
    import train
    print(PAGE.format(lines=len(results), problems=PROBLEMS, samples=SAMPLES,
                      steps=train.parse([]).steps, longer=LONG.strip(), rates=", ".join(RATES),
                      weighted=WEIGHTED, pair=f"{RATE} and {HALF}",
                      hours=sum(line["seconds"] for line in results.values()) / 3600,
                      commits=", ".join(commits) or "none",
                      alike=alike * (len(commits) > 1 and ALIKE.issuperset(commits)),
                      untried="".join(untried)))
    for rows in zip(*map(claims, studies)):
        found = {task: row[1] for task, row in zip(tasks, rows)}
        print(f"- **{rows[0][0]}: {verdicts(found)}.**")
        for task, one in found.items():
            if one:
                print(f"  - `{task}`: {one[1]}.")
    print_bases(results)
    for study in studies:
        print_task(study)


def print_bases(results):
    """Which bases there are, how they were made, and how many lines stand on each."""
    used = [base_of(name) for name in results]
    rows = []
    for name in dict.fromkeys(used):
        line = results.get(name, {})
        made = "; ".join(f"{key} {value}" for key, value in line.get("made", {}).items())
        rows.append([f"`{name}`", made, line.get("weights", "not recorded")[:16],
                     used.count(name) - (name in results)])
    table("The bases", ["base", "made with", "weights, SHA-256", "runs from it"], rows)


def solutions(name):
    """The number of different solutions of each test problem of this task."""
    import train
    from rewards import fill_task_flags, make_task
    flags = train.parse(TASKS[name].split())
    fill_task_flags(flags, policy_module.tiny()[1])
    task = make_task(flags)
    return np.array([len(task.solutions(x)) for x in task.held_out_problems(PROBLEMS)])


def print_task(study):
    numbers = solutions(study.task)
    print(f"\n## `{study.task}` ({TASKS[study.task] or 'the default task'}): {numbers.mean():.1f} "
          f"solutions per problem, {100 * np.mean(numbers == 1):.0f} % of the problems have one")
    own = {"base": "base"} | {m: kept(study, m) for m in METHODS}
    if own["diffsmooth"] != DEFAULT:
        own["diffsmooth 0.2"] = DEFAULT
    rows = [[m, "; ".join(f"{flags} ({number or 'not yet'})" for flags, number in
                          zip(tried(study, m), validated(study, tried(study, m)))), own[m]]
            for m in METHODS if any(validated(study, METHODS[m]))]
    for _, curve in study.results.get(base_name(study.task), {}).get("path", []):
        number = np.dot(curve, [COLUMNS[WEIGHTED][k - 1] for k in KS])
        rows.insert(0, ["base", f"({number:.2f})", "base"])
    table(f"Settings tried, with their {WEIGHTED} on the validation problems, and the one kept",
          ["method", "tried", "kept"], rows)
    measured = {m: flags for m, flags in own.items() if runs(study, flags)}
    rivals = dict.fromkeys([own["grpo"], with_rate(own["grpo"], RATE)])
    print_over_bases(study)
    for T in ("0.7", "1.0"):
        print_temperature(study, measured, T, *rivals)
    table("Pass@1 / Pass@64 by temperature", ["flags", "seeds", *(f"T {T}" for T in TEMPERATURES)],
          [[flags, len(runs(study, flags)),
            *(ends(passes(study, [flags], T)[1].mean((0, 1, 2))) for T in TEMPERATURES)]
           for m in FRONTIER for flags in at_rates(study, m) if runs(study, flags)])
    gains = {m: frontier(study, m) for m in METHODS if m != "grpo"}
    table("Gain over GRPO's frontier: Pass@1 at equal Pass@64",
          ["method", "seeds", "on average", "cold end", "hot end"],
          [[m, len(found[0]), *found[1].values()] for m, found in gains.items() if found])
    print_path(study, "The path", measured, PATH[:5])
    long = longer(study)
    rivals = dict.fromkeys([long["grpo"], long["grpo, same rate"]])
    long = {m: flags for m, flags in long.items() if runs(study, flags)}
    if long:
        print_path(study, "The longer runs", long, PATH)
        print_temperature(study, long, "0.7", *rivals)


def print_over_bases(study):
    """Each base by itself, then smoothing minus GRPO on each and over all of them."""
    ours, *rates = HEADLINE
    rows = []
    for base in (0, *BASES):
        for flags in ("base", *HEADLINE):
            seeds, x = passes(study, [flags], "0.7", base)
            if seeds and runs(study, ours, base):
                seeds = [] if flags == "base" else seeds
                rows.append([base, flags, ", ".join(map(str, seeds)),
                             *(f"{(x @ COLUMNS[key]).mean():.1f}" for key in SHOWN)])
    if len({base for base, *_ in rows}) < 2:
        return
    head = [f"k = {k}" for k in SHOWN[:-1]] + [WEIGHTED]
    table("Over bases, T 0.7: means over seeds", ["base", "flags", "seeds", *head], rows)
    for rivals, against in (*(([rate], rate) for rate in rates),
                            (rates, "the better of the two, for each number")):
        bases, x = passes_over_bases(study, [ours, *rivals], "0.7")
        rows = [[base, *(gain(lead, x[:, i:i + 1] @ COLUMNS[key]) for key in SHOWN)]
                for i, base in enumerate(bases)]
        if bases:
            rows.append(["mean", *(gain_over_bases(lead, x @ COLUMNS[key]) for key in SHOWN)])
        table(f"Over bases, T 0.7: {ours} minus {against}", ["base", *head], rows)


def print_temperature(study, settings, T, *rivals):
    """{method: flags} alone, and minus each of these settings of GRPO."""
    title, rows = f"T {float(T):g}", []
    for m, flags in settings.items():
        tests = [line["test"][T] for line in lines_of(study, flags)]
        x = PASS[[test["c"] for test in tests]]                             # (seeds, problems, 64)
        rows.append([m, len(x), *(mean_sd((x @ COLUMNS[k]).mean(1)) for k in KS),
                     *(mean_sd([test[key] for test in tests], 2) for key in ("distinct", "sigma"))])
    table(f"{title}{LONG * (LONG in rivals[0])}: mean ± sd over seeds",
          ["method", "seeds", *(f"Pass@{k}" for k in KS), "distinct", "sigma"], rows)
    for rival in rivals:
        rows = []
        for m, flags in settings.items():
            seeds, x = passes(study, [flags, rival], T)
            if seeds and flags != rival:
                k = gain(samples_needed, x)
                rows.append([m, len(seeds), *(gain(lead, x @ COLUMNS[key]) for key in SHOWN),
                             f"{k.mean} [{k.low:.0f}, {k.high:.0f}]"])
        table(f"{title}: minus {rival}", ["method", "seeds", *(f"k = {k}" for k in SHOWN[:-1]),
                                          WEIGHTED, "k that reaches grpo's Pass@64"], rows)


def print_path(study, title, settings, steps):
    rows = []
    for m, flags in settings.items():
        paths = [dict(line["path"]) for line in lines_of(study, flags) if line["path"]]
        known = [step for step in (0, *steps) if paths and all(step in path for path in paths)]
        cells = {step: ends(np.mean([path[step] for path in paths], 0)) for step in known}
        rows += [[m, len(paths), *(cells.get(step, "") for step in (0, *steps))]] * bool(paths)
    table(f"{title}: Pass@1 / Pass@64 on the validation problems, T 0.7",
          ["method", "seeds", *(f"step {step}" for step in (0, *steps))], rows)


def draw(study, file):
    """The frontier: Pass@1 against Pass@64 over temperatures, one curve per method and rate."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib.")
    figure, axes = plt.subplots(figsize=(7, 5))
    for color, method in enumerate(FRONTIER):
        for flags in (flags for flags in at_rates(study, method) if runs(study, flags)):
            points = [passes(study, [flags], T)[1].mean((0, 1, 2))[[0, -1]] for T in TEMPERATURES]
            lr = flags.split()[-1]
            axes.plot(*zip(*points), marker=".", color=f"C{color}", label=f"{method}, lr {lr}",
                      linestyle={RATE: "-", HALF: "--", TWICE: ":"}.get(lr, "-."))
            for T, point in zip(TEMPERATURES, points if flags == kept(study, "grpo") else ()):
                axes.annotate(f"T {float(T):g}", point, (-30, -3), textcoords="offset points")
    axes.set(xlabel="Pass@1 (%)", ylabel="Pass@64 (%)",
             title=f"{study.task}: {PROBLEMS} problems, {SAMPLES} answers, four temperatures")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3.5)
    figure.savefig(file, dpi=150, bbox_inches="tight")


# ---------------------------------------------------------------------------------- README's tables

# What README shows. A claim's rule, by a word of the claim: the first that occurs in it.
README_METHODS = ("grpo", "bonus", "passk", "unlikeliness", "maxrl", "diffsmooth")
RULES = {"sharpens": "both changes as claimed", "every k": "above 0 at some k, below 0 at none",
         "frontier": "above 0 on average", "samples": f"k at most {SAMPLES // 4}",
         WEIGHTED: f"above 0 in the {WEIGHTED}", "bonus": f"above 0 in the {WEIGHTED}"}
RESULTS_HEAD = ["", "setting chosen by", "k = 1", "4", "16", "64"]
CLAIMS_HEAD = ["claim", "verdict", "numbers on `many`", "rule"]


def readme_tables(results, seeds):
    """All rows of both tables; README may leave claims out, but no result."""
    studies = {task: Study(results, task, seeds) for task in TASKS}
    blocks = [(CLAIMS_HEAD, readme_claims(*studies.values())),
              *((RESULTS_HEAD, readme_results(study)) for study in studies.values())]
    return "\n\n".join("\n".join(row_of(cells) for cells in (head, ["---"] * len(head), *rows))
                       for head, rows in blocks)


def row_of(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def short(flags):
    """The words after --loss, without what is train.py's default anyway."""
    import train
    words, same = flags.split()[1:], vars(train.parse(flags.split()))
    for i in range(len(words) - 2, 0, -2):
        rest = words[:i] + words[i + 2:]
        words = rest if vars(train.parse(["--loss", *rest])) == same else words
    return f"`{' '.join(words)}`"


def readme_results(study):
    """Every method at the setting that validation keeps; GRPO and smoothing at train.py's default
    too; smoothing minus GRPO by either rule, and over bases. Rows of missing runs are left out."""
    ours, rate = HEADLINE[:2]
    chosen = {"base": ""} | {kept(study, m): "validation" for m in README_METHODS}
    for flags in (rate, ours):
        chosen[flags] = "validation and default" if flags in chosen else "default"
    rows = []
    for flags, rule in chosen.items():
        found, x = passes(study, [flags], "0.7")
        if found:
            name = flags if flags == "base" else short(flags)
            rows.append([name, rule, *(f"{x[..., k - 1].mean():.1f}" for k in SHOWN[:-1])])
    pairs = [(kept(study, "diffsmooth"), kept(study, "grpo"), passes, gain, "validation"),
             (ours, rate, passes, gain, "default"),
             (ours, rate, passes_over_bases, gain_over_bases, "default, {} bases")]
    for one, other, measure, measure_gain, rule in pairs:
        found, x = measure(study, [one, other], "0.7")
        if found:
            rows.append([f"{short(one)} minus {short(other)}", rule.format(len(found)),
                         *(measure_gain(lead, x[..., k - 1]) for k in SHOWN[:-1])])
    return rows


def readme_claims(many, one):
    """[claim, verdict as on the page, T 0.7 on `many` (of four or more numbers the ends), rule]."""
    rows = []
    for (claim, found), (_, second) in zip(claims(many), claims(one)):
        numbers = (found or ("", ""))[1].split("; ")[0].removeprefix("T 0.7: ")
        at_k = re.findall(r"\S+ \[[^]]+\] at k = \d+", numbers)
        if len(at_k) > 2:
            numbers = f"{at_k[0]}, {at_k[-1]}"
        rule = next(rule for word, rule in RULES.items() if word in claim)
        rows.append([claim, verdicts({"many": found, "one": second}), numbers, rule])
    return rows
