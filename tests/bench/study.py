"""The paper's experiment on two CPU cores: does smoothing keep Pass@k, on which task, against which baseline?

    python tests/bench/study.py                                 # everything: about twelve hours on two cores
    python tests/bench/study.py --tasks many --regimes long --methods grpo diffsmooth+ --seeds 1 2 3
    python tests/bench/study.py --only-print                    # the tables of what is finished so far

Two tasks: `many` (Countdown, 4 numbers to 9: several solutions a problem) and `one` (3 numbers to 20: mostly a single one).
Four more, only when asked for, are `many` with one thing changed: from a weaker start (`weak`), on 512 problems that come
again and again (`fixed`), with groups of 8 or 32 answers, 512 a step as before (`groups8`, `groups32`).
Two regimes, because they disagree: `long`, the learning rate and steps of train.py itself (1e-4, 1000), and `slow` (3e-5,
300), where RL collapses little. In `slow` every method gets the same effort: its three settings are trained on seed 0, and
the one with the highest mean of Pass@1, 2, 4 .. 64 on validation problems is kept. A third, when asked for: `fast`, half of
the steps of `long`, and more methods.
Everything is run on fresh seeds and measured on other held-out problems, at temperature 1 and 0.7, and on the way, so that
methods can be compared at equal Pass@1.

Two runs go side by side, one thread each. A run that is finished is one line of --results, by default study.json beside this
script, and is not made again: what others have measured is continued, and `--results mine.json` repeats it all. A kill loses
nothing: the same command goes on, within a run by train.py --resume. One run by hand:

    python train.py --counts 3 --high 20 --targets 1 60 --base one --loss diffsmooth --seed 1 --name mine
"""
import argparse
import contextlib
import json
import os
import random
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MANY = "--counts 4 --high 9 --targets 1 60"
TASKS = {"many": MANY, "one": "--counts 3 --high 20 --targets 1 60",
         # `many` with one thing changed
         "weak": f"{MANY} --warm-steps 200", "fixed": f"{MANY} --fixed-problems 512",
         "groups8": f"{MANY} --prompts 64 --group-size 8", "groups32": f"{MANY} --prompts 16 --group-size 32"}


def rates(loss):
    """Three learning rates, for a loss without a strength of its own."""
    return [f"--loss {loss} --lr {lr}" for lr in ("3e-5", "5e-5", "1e-4")]


def grid(flags, *values):
    """Three strengths, at the one of these learning rates that is best for grpo."""
    return [f"--loss {flags} {value} --lr 3e-5" for value in values]


METHODS = {                                            # regime -> name -> settings; of several the best is kept
    "fast": {
        "grpo": ["--loss grpo"],
        "diffsmooth+": ["--loss diffsmooth"],          # DS-GRPO-Positive, the default
        "bonus .01": ["--loss entropy --entropy_coef 0.01"],
        "penalty .01": ["--loss entropy --entropy_coef -0.01"],
        "passk": ["--loss passk --k 4"],
        "reward form": ["--loss diffsmooth_reward"],
        "no std": ["--loss diffsmooth_reward --gamma_p 0"],                             # the control of the row above
        "bonus .003": ["--loss entropy --entropy_coef 0.003"],
        "maxrl": ["--loss maxrl"],
        "focal": ["--loss focal --focal_gamma 2"],
        "token mean": ["--loss diffsmooth --reduction mean --gamma_p 4"],               # the same size, 8 tokens an answer
    },
    "slow": {
        "grpo": rates("grpo"),
        "diffsmooth+": grid("diffsmooth --gamma_n 0 --gamma_p", 0.1, 0.3, 1.0),
        "bonus": grid("entropy --entropy_coef", 0.003, 0.01, 0.03),
        "penalty": grid("entropy --entropy_coef", -0.003, -0.01, -0.03),
        "reward form": grid("diffsmooth_reward --gamma_n 0 --gamma_p", 0.03, 0.1, 0.3),
        "no std": rates("diffsmooth_reward --gamma_p 0 --gamma_n 0"),
        "diffsmooth": grid("diffsmooth --gamma_p 0.3 --gamma_n", 0.01, 0.03, 0.1),      # both gammas
        "diffsmooth-": grid("diffsmooth --gamma_p 0 --gamma_n", 0.01, 0.03, 0.1),       # DS-GRPO-Negative
        "passk": grid("passk --k", 2, 4, 8),
        "unlikeliness": grid("unlikeliness --rank_coef", 0.1, 0.25, 0.5),
        "cispo": rates("cispo"),
        "focal": grid("focal --focal_gamma", 0.5, 1.0, 2.0),
        "ucpo": grid("ucpo --tau", 0.1, 0.2, 0.4),
        "w_reinforce": grid("w_reinforce --w_pos", 0.1, 0.3, 1.0),
        "maxrl": rates("maxrl"),
    },
}
METHODS["long"] = {
    **{name: METHODS["fast"][name] for name in ("grpo", "diffsmooth+", "bonus .01", "penalty .01", "maxrl", "focal")},
    "grpo 3e-5": ["--loss grpo --lr 3e-5"],            # as many steps, but smaller ones
    "diffsmooth+ 3e-5": ["--loss diffsmooth --lr 3e-5"],
}
# Steps after which a run is measured; a tuning run only after the last.
STAGES = {"fast": (100, 200, 300, 400, 500), "slow": (50, 100, 200, 300), "long": (500, 750, 1000)}
PROBLEMS = {"test": 512, "validation": 256}
SAMPLES, SAMPLES_ON_THE_WAY = 128, 64
KS = [1, 2, 4, 8, 16, 32, 64, 128]
LEVELS = {"one": (50, 53, 56)}                          # of Pass@1, at which Pass@64 is compared
IN_FIGURES = ("base", "grpo", "diffsmooth+", "bonus", "bonus .01", "penalty", "penalty .01", "passk")


# --------------------------------------------------------------------------------------------------------------- running

def problems_of(task, part):
    """Held-out problems, drawn as training draws its own (an easy one may come twice), the same on every call. No problem is
    both for validation and for test."""
    from rewards import hashed_share
    rng, problems = random.Random(0), []
    while len(problems) < PROBLEMS[part]:
        problem = task.problem(rng, held_out=True)
        share = hashed_share(f"part {sorted(problem.numbers)} {problem.target}")
        if ("validation" if share < 1 / 3 else "test") == part:
            problems.append(problem)
    return problems


def measure(model, task, part, n, temperature):
    """Evaluate a model folder -> {"c": correct answers of n, a list over problems, "distinct", "sigma": means over them}."""
    import torch
    import eval as evaluation
    import policy as policy_module
    import train
    from rewards import fill_task_flags, make_task
    policy, tokenizer = policy_module.load(model)
    flags = train.parse(TASKS[task].split())
    fill_task_flags(flags, tokenizer)
    judge = make_task(flags)
    records = evaluation.evaluate(policy, tokenizer, judge, problems_of(judge, part), n, flags.max_new_tokens, temperature,
                                  torch.Generator().manual_seed(0))
    mean = lambda key: round(float(np.mean([r[key] for r in records if r[key] is not None] or [np.nan])), 3)
    return {"c": [r["c"] for r in records], "distinct": mean("distinct"), "sigma": mean("sigma")}


def on_the_way(model, task):
    """Pass@1, 2, 4 .. 64 on the validation problems."""
    c = measure(model, task, "validation", SAMPLES_ON_THE_WAY, 1.0)["c"]
    return pass_curve(c, SAMPLES_ON_THE_WAY, KS[:7]).mean(0).round(2).tolist()


def in_the_end(model, task):
    return {str(temperature): measure(model, task, "test", SAMPLES, temperature) for temperature in (1.0, 0.7)}


def start(out, task, results):
    """The base of a task, made once, and its own measurement."""
    import torch
    import train
    from rewards import make_task
    torch.set_num_threads(os.cpu_count())
    flags = train.parse([*TASKS[task].split(), "--out", str(out / task)])
    _, _, model = train.start_policy(flags, "cpu", torch.float32)
    if base_of(task) not in results:
        judge = make_task(flags)
        results[base_of(task)] = {"multiplicity": [len(judge.solutions(x)) for x in problems_of(judge, "test")],
                                  "path": [[0, on_the_way(model, task)]], "test": in_the_end(model, task)}


def one(out, task, regime, flags, seed):
    """One run from wherever it is -> (its name, its result). Seed 0 is for tuning: the test problems are not for it."""
    import torch
    import train
    from rewards import make_task
    torch.set_num_threads(1)
    name, began = name_of(task, regime, flags, seed), time.time()
    place = out / task / re.sub(r"[^\w.+-]+", "_", name)
    partial, path = place / "path.json", []
    if partial.is_file():
        path = json.loads(partial.read_text())
    with open(f"{place}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for step in (STAGES[regime] if seed else STAGES[regime][-1:])[len(path):]:
            more = ["--resume"] if (place / "flags.json").is_file() else []
            code = train.main([*f"{flags} {TASKS[task]} --seed {seed} --eval-problems 0 --steps {step}".split(),
                               "--out", str(out / task), "--name", place.name, *more])
            if code >= 128 or os.getppid() == 1:       # a signal, or the study is gone: this process takes no further run
                os._exit(code)
            if code:
                raise RuntimeError(f"'{name}' ended with exit code {code}: see {log.name}")
            path.append([step, on_the_way(place / "model", task)])
            write(partial, json.dumps(path))
        result = {"path": path, "test": in_the_end(place / "model", task)} if seed else {"score": round(np.mean(path[-1][1]), 2)}
    return name, result | {"seconds": round(time.time() - began)}


def name_of(task, regime, flags, seed):
    return f"{task}, {regime}: {flags}, seed {seed}"


def base_of(task):
    return f"{task}: base"


def read(file):
    import policy as policy_module
    return policy_module.read(file, lambda: json.loads(file.read_text())) if file.is_file() else {}


def save(file, results):
    """One line a run, so that a further run is a further line."""
    write(file, "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results)) + "\n}\n")


def write(file, text):
    """Aside, then renamed: the file is there whole or not at all."""
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, file)


# -------------------------------------------------------------------------------------------------------------- measuring

def pass_curve(c, n, ks):
    """(problems, len(ks)) Pass@k in percent."""
    from eval import pass_at_k
    return np.array([[100 * pass_at_k(n, correct, k) for k in ks] for correct in c])


def choose(results, task, regime, method):
    """The setting with the highest mean of Pass@1 .. 64 on validation after the last step -> (flags, [scores]); None before
    all were tried. A single one needs no trial."""
    settings = METHODS[regime][method]
    if len(settings) == 1:
        return settings[0], []
    tuned = [results.get(name_of(task, regime, flags, 0)) for flags in settings]
    if None in tuned:
        return None
    scores = [run["score"] for run in tuned]
    return settings[int(np.argmax(scores))], scores


def settings_of(results, task, regime, method, seed):
    """What a method is to be run with: on seed 0 each of several settings, on another seed the one that was chosen."""
    if seed:
        return [choose(results, task, regime, method)[0]]
    return METHODS[regime][method] if len(METHODS[regime][method]) > 1 else []


def interval(differences, resamples=4000):
    """Mean and 95 % bootstrap interval over problems of (problems,) differences."""
    picks = np.random.default_rng(0).integers(0, len(differences), (resamples, len(differences)))
    low, high = np.quantile(differences[picks].mean(1), [0.025, 0.975])
    return f"{differences.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def at_pass_1(path, level):
    """Pass@64 where the path (list of (Pass@1, Pass@64), by steps) first reaches Pass@1 = level; None if it never does."""
    for (x0, y0), (x1, y1) in zip(path, path[1:]):
        if x0 < level <= x1:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return None


def samples_for(curve, level):
    """The smallest k (of 1 .. 128) at which a mean Pass@k curve reaches `level`."""
    return next((str(k) for k, value in enumerate(curve, 1) if value >= level), "> 128")


def mean_sd(values, digits=1):
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


# --------------------------------------------------------------------------------------------------------------- printing

def table(title, head, rows):
    print(f"\n**{title}**\n")
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, cells)) + " |")


def chart(title, x_label, x, y_label, lines):
    """A Mermaid figure, as Markdown pages show it. lines: {name: values, as many as x or fewer}."""
    print(f'\n```mermaid\nxychart-beta\n    title "{title}"')
    print(f'    x-axis "{x_label}" [{", ".join(map(str, x))}]\n    y-axis "{y_label}"')
    for name, values in lines.items():
        print(f'    line "{name}" [{", ".join(f"{value:.1f}" for value in values)}]')
    print("```")


def print_study(results, task, regime, methods, seeds):
    base = results[base_of(task)]
    choice = {method: choose(results, task, regime, method) for method in methods}
    choice = {method: chosen for method, chosen in choice.items() if chosen}
    runs = {"base": {0: base}}                         # method -> {seed: what it gave}, as far as they are finished
    for method, (flags, _) in choice.items():
        found = {seed: results.get(name_of(task, regime, flags, seed)) for seed in seeds}
        runs |= {method: {seed: run for seed, run in found.items() if run}} if any(found.values()) else {}
    solutions = np.array(base["multiplicity"])
    single = 100 * (solutions == 1).mean()
    print(f"\n## {task}, {regime}: solution multiplicity {solutions.mean():.2f}, {single:.0f} % with one solution")

    table("Settings (with the mean of Pass@1 .. Pass@64 on validation problems, seed 0), and the one that is kept",
          ["method", "tried", "kept"],
          [[method, "; ".join(f"{flags} ({score:.1f})" for flags, score in zip(METHODS[regime][method], scores)) or "no other",
            flags] for method, (flags, scores) in choice.items()])

    for temperature in ("1.0", "0.7"):
        tests = {method: [run["test"][temperature] for run in some.values()] for method, some in runs.items()}
        curves = {method: np.array([pass_curve(test["c"], SAMPLES, KS) for test in some]) for method, some in tests.items()}
        table(f"Temperature {temperature}: mean ± sd over seeds, {len(solutions)} test problems, {SAMPLES} samples; Pass@1 is C",
              ["method", "seeds", *(f"Pass@{k}" for k in KS), "distinct", "sigma"],
              [[method, len(some), *(mean_sd(curve) for curve in curves[method].mean(1).T),       # (seeds, problems, ks)
                mean_sd([test["distinct"] for test in some]), mean_sd([test["sigma"] for test in some], 2)]
               for method, some in tests.items()])
        if "grpo" not in runs:
            continue
        # A seed draws the same training problems for every method: grpo counts with the seeds of the other (all, for the base).
        shared = {method: [seed in some for seed in runs["grpo"]] for method, some in runs.items()}
        rival = {method: curves["grpo"][mask if any(mask) else slice(None)] for method, mask in shared.items()}
        every = lambda some: np.mean([pass_curve(test["c"], SAMPLES, range(1, SAMPLES + 1)).mean(0) for test in some], 0)
        against = [KS.index(k) for k in (1, 4, 16, 64, 128)]
        table(f"Temperature {temperature}: minus grpo of the same seeds, 95 % paired bootstrap over problems",
              ["method", *(f"Pass@{KS[i]}" for i in against), "k for grpo's Pass@64"],
              [[method, *(interval((curves[method].mean(0) - rival[method].mean(0))[:, i]) for i in against),
                samples_for(every(tests[method]), rival[method][:, :, KS.index(64)].mean())]
               for method in runs if method != "grpo"])
        if temperature == "1.0":
            chart(f"{task}, {regime}: Pass@k at temperature 1", "k", KS, "Pass@k (%)",
                  {method: curves[method].mean((0, 1)) for method in IN_FIGURES if method in runs})

    points = lambda run: [(curve[0], curve[-1]) for _, curve in run["path"]]                      # Pass@1 and Pass@64
    start = points(base)[0]
    path = {method: [start, *np.mean([points(run) for run in some.values()], 0)]
            for method, some in runs.items() if method != "base"}
    levels = LEVELS.get(task, (20, 25, 30))
    table("The way there: Pass@1 / Pass@64 on validation problems, mean over seeds; then Pass@64 where Pass@1 is first reached",
          ["method", *(f"step {step}" for step in (0, *STAGES[regime])), *(f"Pass@1 = {level}" for level in levels)],
          [[method, *(f"{a:.1f} / {b:.1f}" for a, b in way),
            *("-" if y is None else f"{y:.1f}" for y in (at_pass_1(way, level) for level in levels))]
           for method, way in path.items()])
    ticks = range(int(start[0]) + 1, 100)
    paths = {method: [y for y in (at_pass_1(path[method], x) for x in ticks) if y] for method in IN_FIGURES if method in path}
    if paths:
        chart(f"{task}, {regime}: the way there", "Pass@1 (%)", list(ticks)[:max(map(len, paths.values()))], "Pass@64 (%)", paths)


def main():
    every = list(dict.fromkeys(method for methods in METHODS.values() for method in methods))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["many", "one"])
    parser.add_argument("--regimes", nargs="+", choices=METHODS, default=["long", "slow"])
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study", help="where the runs are")
    parser.add_argument("--only-print", action="store_true")
    args = parser.parse_args()
    if 0 in args.seeds:
        parser.error("seed 0 is for tuning: --seeds takes others.")
    results = read(args.results)
    rows = [(task, regime, method) for regime in args.regimes for task in args.tasks
            for method in args.methods if method in METHODS[regime]]
    if not args.only_print:
        for task in args.tasks:
            start(args.out, task, results)
            save(args.results, results)
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for seed in (0, *args.seeds):              # a study that is cut short has the same seeds of every method
                jobs = [(*row[:2], flags, seed) for row in rows for flags in settings_of(results, *row, seed)]
                waiting = [pool.submit(one, args.out, *job) for job in jobs if name_of(*job) not in results]
                for future in as_completed(waiting):
                    name, result = future.result()
                    results[name] = result
                    save(args.results, results)
                    print(f"{name}: {result['seconds']} s", flush=True)
    for regime in args.regimes:
        for task in args.tasks:
            if base_of(task) in results:
                print_study(results, task, regime, [m for m in args.methods if m in METHODS[regime]], args.seeds)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenProcessPool):     # Ctrl-C reaches the runs first, and they save
        print("stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
