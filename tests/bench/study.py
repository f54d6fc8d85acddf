"""The paper's experiment on two CPU cores: does smoothing keep Pass@k, on which task, against which baseline?

    python tests/bench/study.py                                 # everything: about fifteen hours on two cores
    python tests/bench/study.py --tasks many --methods grpo diffsmooth --seeds 1 2 3
    python tests/bench/study.py --only-print                    # the tables of what is finished so far

Two tasks: `many` (Countdown, 4 numbers to 9: several solutions a problem) and `one` (3 numbers to 20: mostly a single one).
Every method gets the same effort: its six settings below are trained on seed 0, the one with the highest mean of Pass@1,
2, 4 .. 64 on the validation problems is kept, and runs on fresh seeds. Those are measured on other held-out problems, at temperature 1 and 0.7;
a run is also measured on the way, every 100 steps, so that methods can be compared at equal Pass@1.

Two runs go side by side, one thread each. A run that is finished is one file in OUT/results; a kill loses nothing: the same
command goes on, within the run by train.py --resume. A row of the tables by hand:

    python train.py --counts 3 --high 20 --targets 1 60 --base one --loss diffsmooth --gamma_p 0.5 --lr 5e-5 --seed 1 --name mine
"""
import argparse
import contextlib
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

TASKS = {"many": "--counts 4 --high 9 --targets 1 60", "one": "--counts 3 --high 20 --targets 1 60"}
def grid(flag, *values):
    """Three values at two learning rates: a low one keeps diversity by itself, and must not be what decides."""
    return [f"{flag} {value} --lr {lr}" for lr in ("5e-5", "1e-4") for value in values]


RATES = [f"--lr {lr}" for lr in ("2e-5", "3e-5", "5e-5", "7e-5", "1e-4", "2e-4")]
METHODS = {                                            # name -> (loss and fixed flags, the six settings tried)
    "grpo": ("grpo", RATES),
    "diffsmooth+": ("diffsmooth --gamma_n 0", grid("--gamma_p", 0.2, 0.5, 1.0)),            # DS-GRPO-Positive, the default
    "reward form": ("diffsmooth_reward --gamma_n 0", grid("--gamma_p", 0.1, 0.2, 0.5)),
    "no std": ("diffsmooth_reward --gamma_p 0 --gamma_n 0", RATES),                         # the control of the row above
    "bonus": ("entropy", grid("--entropy_coef", 0.01, 0.03, 0.1)),
    "penalty": ("entropy", grid("--entropy_coef", -0.003, -0.01, -0.03)),
    "diffsmooth": ("diffsmooth --gamma_p 0.5", grid("--gamma_n", 0.01, 0.03, 0.1)),         # both gammas
    "diffsmooth-": ("diffsmooth --gamma_p 0", grid("--gamma_n", 0.01, 0.03, 0.1)),          # DS-GRPO-Negative
    "passk": ("passk", grid("--k", 2, 4, 8)),
    "unlikeliness": ("unlikeliness", grid("--rank_coef", 0.1, 0.25, 0.5)),
    "cispo": ("cispo", RATES),
    "focal": ("focal", grid("--focal_gamma", 0.5, 1.0, 2.0)),
    "ucpo": ("ucpo", grid("--tau", 0.1, 0.2, 0.4)),
    "w_reinforce": ("w_reinforce", [f"--w_pos {w} --lr {lr}" for lr in ("2e-5", "5e-5") for w in (0.1, 0.3, 1.0)]),
    "maxrl": ("maxrl", RATES),
}
SETTINGS = 6
STAGES = (100, 200, 300, 400, 500)                     # steps after which a run is measured
# Of 768 held-out problems every third is for validation: the later ones in the list are rarer and harder.
PROBLEMS, PARTS = 768, {"test": (0, 1), "validation": (2,)}
SAMPLES, SAMPLES_ON_THE_WAY = 128, 64
KS = [1, 2, 4, 8, 16, 32, 64, 128]


# --------------------------------------------------------------------------------------------------------------- running

def counts(model, task, part, n, temperature):
    """Evaluate a model folder -> {"c", "distinct", "sigma"}, a list over problems each."""
    import torch
    import eval as evaluation
    import policy as policy_module
    import train
    policy, tokenizer = policy_module.load(model)
    flags = train.parse(TASKS[task].split())
    judge = evaluation.make_task(flags, tokenizer)
    problems = [problem for i, problem in enumerate(judge.held_out_problems(PROBLEMS)) if i % 3 in PARTS[part]]
    records = evaluation.evaluate(policy, tokenizer, judge, problems, n, flags.max_new_tokens, temperature,
                                  torch.Generator().manual_seed(0))
    return {"n": n} | {key: [r[key] for r in records] for key in ("c", "distinct", "sigma")}


def start(out, task):
    """The base of a task and its own measurement, made once."""
    import torch
    import train
    torch.set_num_threads(os.cpu_count())
    train.start_policy(train.parse([*TASKS[task].split(), "--out", str(out / task)]), "cpu", torch.float32)
    if not result(out, task, "base").is_file():
        model = out / task / "base" / "model"
        save(result(out, task, "base"), {"path": [[0, counts(model, task, "validation", SAMPLES_ON_THE_WAY, 1.0)]],
                                         "test": {str(t): counts(model, task, "test", SAMPLES, t) for t in (1.0, 0.7)}})


def one(out, task, method, setting, seed):
    """One run from wherever it is to its results file. Seed 0 is for tuning: it is never measured on the test problems."""
    import torch
    import train
    torch.set_num_threads(1)
    loss, settings = METHODS[method]
    name = f"{method.replace(' ', '_')}-{setting}-s{seed}"
    flags = f"--loss {loss} {settings[setting]} {TASKS[task]} --seed {seed} --eval-problems 0".split()
    place, path, began = out / task / name, [], time.time()
    partial = place / "path.json"
    if partial.is_file():
        path = json.loads(partial.read_text())
    with open(out / task / f"{name}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for step in STAGES[len(path):]:
            more = ["--resume"] if (place / "flags.json").is_file() else []
            code = train.main([*flags, "--out", str(out / task), "--name", name, "--steps", str(step), *more])
            if code >= 128 or os.getppid() == 1:       # a signal, or the study is gone: this process takes no further run
                os._exit(code)
            if code:
                raise RuntimeError(f"{name} on {task} ended with exit code {code}: see {log.name}")
            path.append([step, counts(place / "model", task, "validation", SAMPLES_ON_THE_WAY, 1.0)])
            save(partial, path)
        test = {str(t): counts(place / "model", task, "test", SAMPLES, t) for t in (1.0, 0.7)} if seed else None
    save(result(out, task, method, setting, seed), {"flags": " ".join(flags), "path": path, "test": test,
                                                    "seconds": time.time() - began})
    return f"{task}: {method} {settings[setting]}, seed {seed}: {time.time() - began:.0f} s"


def result(out, task, method, setting=0, seed=0):
    return out / "results" / f"{task}-{method.replace(' ', '_')}-{setting}-s{seed}.json"


def save(file, value):
    import eval as evaluation
    evaluation.write_json(file, value)


def load(file):
    return json.loads(file.read_text()) if file.is_file() else None


# -------------------------------------------------------------------------------------------------------------- measuring

def pass_curve(measured, ks=KS):
    """(problems, len(ks)) Pass@k in percent."""
    from eval import pass_at_k
    return np.array([[100 * pass_at_k(measured["n"], c, k) for k in ks] for c in measured["c"]])


def choose(out, task, method):
    """The setting with the highest mean of Pass@1 .. 64 on validation after the last step -> (setting, [scores]); None if untuned."""
    tuned = [load(result(out, task, method, setting)) for setting in range(SETTINGS)]
    if None in tuned:
        return None
    scores = [pass_curve(run["path"][-1][1], KS[:7]).mean() for run in tuned]
    return int(np.argmax(scores)), scores


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


def line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


def print_tables(out, tasks, methods, seeds):
    for task in tasks:
        base = load(result(out, task, "base"))
        if base is None:
            continue
        runs, choice = {}, {}
        for method in methods:
            choice[method] = choose(out, task, method)
            if choice[method]:
                found = [load(result(out, task, method, choice[method][0], seed)) for seed in seeds]
                runs[method] = [run for run in found if run]
        runs = {method: found for method, found in runs.items() if found}

        print(f"\n## {task}: tuning on seed 0, mean of Pass@1 .. Pass@64 on validation problems")
        line("method", "settings", "scores", "kept")
        for method, chosen in choice.items():
            if chosen:
                settings = METHODS[method][1]
                line(method, "; ".join(settings), " / ".join(f"{score:.1f}" for score in chosen[1]), settings[chosen[0]])

        for temperature in ("1.0", "0.7"):
            print(f"\n## {task}, temperature {temperature}: mean ± sd over seeds, {len(base['test'][temperature]['c'])} problems, {SAMPLES} samples")
            line("method", "seeds", *(f"Pass@{k}" for k in KS), "distinct", "sigma")
            line(*["---"] * (len(KS) + 4))
            for method, found in {"base": [base], **runs}.items():
                tests = [run["test"][temperature] for run in found]
                curves = [pass_curve(test).mean(0) for test in tests]
                sigma = [np.mean([s for s in test["sigma"] if s is not None] or [np.nan]) for test in tests]
                line(method, len(found), *(mean_sd([curve[i] for curve in curves]) for i in range(len(KS))),
                     mean_sd([np.mean(test["distinct"]) for test in tests]), mean_sd(sigma, 2))
            if "grpo" not in runs:
                continue
            print(f"\n## {task}, temperature {temperature}: minus grpo, 95 % bootstrap over problems, and samples for grpo's Pass@64")
            line("method", *(f"Pass@{k}" for k in KS), "k that reaches grpo's Pass@64")
            line(*["---"] * (len(KS) + 2))
            mean = {method: np.mean([pass_curve(run["test"][temperature]) for run in found], 0) for method, found in runs.items()}
            for method, found in runs.items():
                every = np.mean([pass_curve(run["test"][temperature], range(1, SAMPLES + 1)).mean(0) for run in found], 0)
                line(method, *(interval(mean[method][:, i] - mean["grpo"][:, i]) for i in range(len(KS))),
                     samples_for(every, mean["grpo"][:, KS.index(64)].mean()))

        print(f"\n## {task}: the way there, Pass@1 / Pass@64 on validation problems, mean over seeds")
        levels = (15, 18, 21, 24)
        line("method", *(f"step {step}" for step in (0, *STAGES)), *(f"Pass@64 at Pass@1 = {level}" for level in levels))
        line(*["---"] * (len(STAGES) + len(levels) + 2))
        first = [pass_curve(base["path"][0][1], (1, 64)).mean(0)]
        for method, found in runs.items():
            path = first + [np.mean([pass_curve(run["path"][i][1], (1, 64)).mean(0) for run in found], 0) for i in range(len(STAGES))]
            there = [at_pass_1(path, level) for level in levels]
            line(method, *(f"{a:.1f} / {b:.1f}" for a, b in path), *("-" if y is None else f"{y:.1f}" for y in there))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--only-print", action="store_true")
    args = parser.parse_args()
    if not args.only_print:
        for task in args.tasks:
            start(args.out, task)
        jobs = lambda kind: [(args.out, task, method, setting, seed) for task in args.tasks for method in args.methods
                             for setting, seed in kind(task, method)]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for kind in (lambda task, method: [(setting, 0) for setting in range(SETTINGS)],
                         lambda task, method: [(choose(args.out, task, method)[0], seed) for seed in args.seeds]):
                waiting = [pool.submit(one, *job) for job in jobs(kind) if not result(*job).is_file()]
                for future in waiting:
                    print(future.result(), flush=True)
    print_tables(args.out, args.tasks, args.methods, args.seeds)


if __name__ == "__main__":
    main()
