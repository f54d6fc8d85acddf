"""What the runs of study.py say: methods compared, claims and verdicts, the page, the figure.

PAGE, the page's own text, has the rules. Letters: R, how many times a mean over problems is there:
for each of 2000 draws of the problems, for each seed, or once over all.
"""
import functools
from typing import NamedTuple

import numpy as np

from study import (COLUMNS, DEFAULT, FRONTIER, HALF, KS, LONG, METHODS, PASS, PATH, PROBLEMS, RATE,
                   RATES, SAMPLES, TASKS, TEMPERATURES, TWICE, Study, at_rates, best, kept, longer,
                   name_of, scores, tried, with_rate)
import eval as evaluation                              # study.py has told where it lies

SHOWN = (1, 4, 16, 64, "score")


def runs(study, flags):
    """{seed: line} of the finished runs with these flags; the base is the same for every seed."""
    names = {seed: f"{study.task}: base" if flags == "base" else name_of(study.task, flags, seed)
             for seed in study.seeds}
    return {seed: study.results[name] for seed, name in names.items() if name in study.results}


def lines_of(study, flags):
    """The finished lines, that of the base once."""
    return list({id(line): line for line in runs(study, flags).values()}.values())


def passes(study, settings, temperature):
    """-> (the seeds that all of these settings have, Pass@k (settings, seeds, problems, 64))."""
    found = [runs(study, flags) for flags in settings]
    seeds = [seed for seed in study.seeds if all(seed in lines for lines in found)]
    return seeds, np.array([[PASS[lines[seed]["test"][temperature]["c"]] for seed in seeds]
                            for lines in found])


@functools.cache
def weights(problems):
    """(R, problems): how much a problem counts in each of R = 2000 draws, those of eval.summary."""
    picks = np.random.default_rng(0).integers(0, problems, (2000, problems))
    return np.array([np.bincount(pick, minlength=problems) for pick in picks]) / problems


class Gain(NamedTuple):
    mean: float
    low: float
    high: float
    by_seed: np.ndarray                                # (seeds,)

    def side(self, level=0.0):
        """1 above `level`, -1 below, 0 neither: the interval decides, and every seed must agree."""
        for sign, end in ((1, self.low), (-1, self.high)):
            if sign * (end - level) > 0 and (sign * (self.by_seed - level) > 0).all():
                return sign
        return 0

    def __str__(self):
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def gain(function, x, *options):
    """As eval.interval, but of what need not be a mean over problems: function takes such means,
    (settings, R, ...), to (R,); x is (settings, seeds, problems, ...)."""
    drawn = np.einsum("rp,sp...->sr...", weights(x.shape[2]), x.mean(1), optimize=True)
    low, high = np.quantile(function(drawn, *options), [0.025, 0.975])
    whole = function(x.mean((1, 2))[:, None], *options)
    return Gain(whole[0], low, high, function(x.mean(2), *options))


def lead(means):
    """(settings, R) -> (R,): the first over whichever of the others is highest."""
    return means[0] - means[1:].max(0)


def samples_needed(curves):
    """(2, R, 64) -> (R,): the smallest k at which the first has the Pass@64 of the second."""
    reached = curves[0] >= curves[1][:, -1:]
    return np.where(reached.any(1), reached.argmax(1) + 1, SAMPLES + 1)


def envelope(curves, levels):
    """(rates, T, R, 2) and (L, R) -> (L, R): the highest Pass@1 with a Pass@64 of `levels` or more,
    on straight lines between neighbouring temperatures; -inf where there is none."""
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
    much higher Pass@1 is at equal Pass@64, from GRPO's highest Pass@1 to the highest Pass@64 that
    both reach. part: the "mean" of that, or one end of it, "cold" or "hot"."""
    ours, grpo = np.split(points.transpose(0, 2, 1, 3), [ours])             # (rates, T, R, 2)
    x, y = grpo.reshape(-1, *grpo.shape[2:]).transpose(2, 0, 1)             # (points, R) each
    top = np.minimum(y.max(0), ours[..., 1].max((0, 1)))                    # (R,)
    bottom = np.minimum(y[x.argmax(0), np.arange(len(top))], top)
    levels = np.linspace(bottom, top, 21)                                   # (21, R)
    gains = envelope(ours, levels) - envelope(grpo, levels)
    return {"mean": gains.mean(0), "cold": gains[0], "hot": gains[-1]}[part]


def frontier(study, method):
    """What a method gains over GRPO's frontier -> (seeds, {part: Gain}); None: not yet measured."""
    grpo, ours = at_rates(study, "grpo"), at_rates(study, method)
    seeds, _ = passes(study, [*grpo, *ours], "0.7")    # fair only with all rates of both
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


def said(seeds):
    return "seeds " + ", ".join(map(str, seeds))


def compare(study, ours, *rivals, want=dict.fromkeys(KS, 1), enough=any):
    """Ours against the best of the rivals -> (verdict, numbers), or None where runs are missing.
    want: {k, or "score": the sign that the claim says}. T 0.7 decides."""
    signs, texts = [], []
    for temperature in ("0.7", "1.0"):
        seeds, x = passes(study, [ours, *rivals], temperature)
        if not seeds:
            return None
        gains = {key: gain(lead, x @ COLUMNS[key]) for key in want}
        signs = signs or [want[key] * gains[key].side() for key in want]
        texts.append(f"T {float(temperature):g}: " + ", ".join(
            f"{gains[key]} in the score" if key == "score" else f"{gains[key]} at k = {key}"
            for key in want if key in SHOWN))
    return verdict(signs, enough), "; ".join([*texts, said(seeds)])


def compare_samples(study, ours, grpo):
    seeds, x = passes(study, [ours, grpo], "0.7")
    if not seeds:
        return None
    k = gain(samples_needed, x)
    return verdict([-k.side(SAMPLES / 4 + 0.5)]), (
        f"T 0.7: k = {k.mean} [{k.low:.0f}, {k.high:.0f}] (65: more than 64); {said(seeds)}")


def compare_frontier(study, method):
    found = frontier(study, method)
    if not found:
        return None
    seeds, gains = found
    return verdict([gains["mean"].side()]), (
        "Pass@1 at equal Pass@64: {mean} in the mean, {cold} at the cold end, {hot} at the hot "
        "end; ".format(**gains) + said(seeds))


def claims(study):
    """[(claim, (verdict, numbers), or None where runs are missing)]."""
    own = {method: kept(study, method) for method in METHODS}
    ours, grpo, two = own["diffsmooth"], own["grpo"], [own["bonus"], own["penalty"]]
    long = longer(study)
    level = "Smoothing is at least as good as"
    found = [("RL sharpens: Pass@1 rises and Pass@64 falls",
              compare(study, grpo, "base", want={1: 1, 64: -1}, enough=all)),
             (f"{level} the base at every k", compare(study, ours, "base")),
             ("Pass@k training is at least as good as the base at every k",
              compare(study, own["passk"], "base"))]
    for lr in RATES:
        found.append((f"{level} GRPO at every k, both with lr {lr}",
                      compare(study, with_rate(ours, lr), with_rate(grpo, lr))))
    found += [
        (f"{level} GRPO at every k, each with its best setting", compare(study, ours, grpo)),
        ("Smoothing has a higher score than GRPO at whichever rate has its highest",
         compare(study, ours, *at_rates(study, "grpo"), want={"score": 1})),
        ("Smoothing lies outside GRPO's frontier over rate and temperature",
         compare_frontier(study, "diffsmooth")),
        (f"Four times fewer samples: smoothing has GRPO's Pass@64 at k = 16, both with lr {RATE}",
         compare_samples(study, with_rate(ours, RATE), with_rate(grpo, RATE))),
        ("With many solutions the bonus is better than the penalty, with one the other way round",
         compare(study, *two[::-1 if study.task == "one" else 1], want={"score": 1})),
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
    return found


# ----------------------------------------------------------------------------------------- the page

# Commits of which 60 steps, of grpo or of diffsmooth, end in the same weights and the same table.
ALIKE = {"a8c012a", "e303feb", "9ae2d2d", "dc35352", "c4da8b3"}

PAGE = """# The study

`python tests/bench/study.py` makes these runs; with `--only-print` it prints this page. So far:
{lines} runs, {hours:.1f} hours of one core, from commit {commits}{alike}.

- **A run** is `train.py` with the flags given, else its defaults: a learning rate that falls to 0
  in {steps} steps; a longer one has `{longer}` and the setting kept for {steps} (GRPO also
  has the rate of smoothing). It is measured as by the table at its end: {problems} different
  held-out problems, {samples} answers each, draws of seed 0. T is the temperature of these answers.
- **Settings.** Each method has three, tried on seed 0: a strength, or the learning rate where it
  has none, and then a lower rate if the lowest was best (nothing above the highest, even where that
  was best). Smoothing also has GRPO's learning rates, at its best strength. The highest score on
  {problems} other held-out problems is kept: the mean of Pass@1 and of the mean of Pass@2, 4 .. 64,
  at T 0.7. All else is of fresh seeds, and two methods are compared on the seeds that both have.
  Smoothing's default, gamma_p 0.2, is there too where another strength is kept.
- **A weakness.** The other problems are harder: the generator repeats easy problems, so the first
  {problems} different ones are easier than the next, and of those that are left too few have many
  solutions to match them. Training wins less there and costs more (the base has a score too), so
  what is kept was trained less, or collapsed less, than the test problems would have it. The claims
  that name a rate, and the frontier, depend on that by strengths alone.{untried}
- **A difference** is one of means over seeds, with a paired 95 % bootstrap interval over problems.
  What other seeds would change is not in that; so a difference counts as above (below) 0 only
  where the interval is, and every one of the seeds by itself.
- **Verdicts** are at T 0.7. At every k (1, 2, 4 .. 64): *shown* if above 0 at some k and below at
  none, *contradicted* if below at some k (a trade is), else *not shown*. Sharpening: *shown* if
  both changes are as said, *contradicted* if one is the opposite. Others: by the number they name.
- **The frontier** is the highest Pass@1 that goes with a Pass@64 or more, over T 0.4, 0.7, 1, 1.3
  (straight lines between) and learning rates: the one kept; of GRPO and smoothing also {rates};
  of bonus, passk and maxrl the first two of these. It is drawn once all of these are measured; the
  other methods, with their one rate, have less room than GRPO. A gain over GRPO's is in Pass@1 at
  equal Pass@64: at GRPO's highest Pass@1 (the cold end), at the highest Pass@64 that both reach
  (the hot end), and in the mean from the one to the other, by which it is judged.

## The claims
"""


def table(title, head, rows):
    if rows:
        print(f"\n**{title}**\n")
    for cells in (head, ["---"] * len(head), *rows) if rows else ():
        print("| " + " | ".join(map(str, cells)) + " |")


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
                      hours=sum(line["seconds"] for line in results.values()) / 3600,
                      commits=", ".join(commits) or "none",
                      alike=alike * (len(commits) > 1 and ALIKE.issuperset(commits)),
                      untried="".join(untried)))
    for rows in zip(*map(claims, studies)):
        found = {task: row[1] or ("not yet measured", "") for task, row in zip(tasks, rows)}
        verdicts = ", ".join(f"{verdict} on `{task}`" for task, (verdict, _) in found.items())
        print(f"- **{rows[0][0]}: {verdicts}.**")
        for task, (_, numbers) in found.items():
            if numbers:
                print(f"  - `{task}`: {numbers}.")
    for study in studies:
        print_task(study)


def solutions(task):
    """Of the test problems, how many different ones each has."""
    import policy as policy_module
    import train
    flags = train.parse(TASKS[task].split())
    train.fill_task_flags(flags, policy_module.tiny()[1])
    judge = train.make_task(flags)
    return np.array([len(judge.solutions(x)) for x in judge.held_out_problems(PROBLEMS)])


def print_task(study):
    numbers = solutions(study.task)
    print(f"\n## `{study.task}` ({TASKS[study.task] or 'the default task'}): {numbers.mean():.1f} "
          f"solutions a problem, {100 * np.mean(numbers == 1):.0f} % of the problems have one")
    own = {"base": "base"} | {m: kept(study, m) for m in METHODS}
    if own["diffsmooth"] != DEFAULT:
        own["diffsmooth 0.2"] = DEFAULT
    rows = [[m, "; ".join(f"{flags} ({score or 'not yet'})" for flags, score in
                          zip(tried(study, m), scores(study, tried(study, m)))), own[m]]
            for m in METHODS if any(scores(study, METHODS[m]))]
    for _, curve in study.results.get(f"{study.task}: base", {}).get("path", []):
        score = np.dot(curve, [COLUMNS["score"][k - 1] for k in KS])
        rows.insert(0, ["base", f"({score:.2f})", "base"])
    table("Settings tried, with their score, and the one that is kept",
          ["method", "tried", "kept"], rows)
    measured = {m: flags for m, flags in own.items() if runs(study, flags)}
    rivals = dict.fromkeys([own["grpo"], with_rate(own["grpo"], RATE)])
    for T in ("0.7", "1.0"):
        print_temperature(study, measured, T, *rivals)
    table("Pass@1 / Pass@64 by temperature", ["flags", "seeds", *(f"T {T}" for T in TEMPERATURES)],
          [[flags, len(runs(study, flags)),
            *(ends(passes(study, [flags], T)[1].mean((0, 1, 2))) for T in TEMPERATURES)]
           for m in FRONTIER for flags in at_rates(study, m) if runs(study, flags)])
    gains = {m: frontier(study, m) for m in METHODS if m != "grpo"}
    table("Gain over GRPO's frontier: Pass@1 at equal Pass@64",
          ["method", "seeds", "in the mean", "cold end", "hot end"],
          [[m, len(found[0]), *found[1].values()] for m, found in gains.items() if found])
    print_path(study, "The path", measured, PATH[:5])
    long = longer(study)
    rivals = dict.fromkeys([long["grpo"], long["grpo, same rate"]])
    long = {m: flags for m, flags in long.items() if runs(study, flags)}
    if long:
        print_path(study, "The longer runs", long, PATH)
        print_temperature(study, long, "0.7", *rivals)


def print_temperature(study, settings, T, *rivals):
    """{method: flags} by themselves, and minus each of these settings of GRPO."""
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
                                          "score", "k for the Pass@64 of grpo"], rows)


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
    """The frontier: Pass@1 against Pass@64 over temperatures, a curve for a method and a rate."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib.")
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
