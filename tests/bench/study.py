"""The paper's experiment on two CPU cores: what does smoothing keep, on which task, against what?

    python tests/bench/study.py                          # everything: twenty hours
    python tests/bench/study.py --tasks many --methods grpo diffsmooth --seeds 4 5 6
    python tests/bench/study.py --only-print > tests/bench/study.md
    python tests/bench/study.py --plot tests/bench/study.png                   # needs matplotlib

Two tasks: `many` (train.py's default: several solutions a problem) and `one` (mostly a single one).
This file says which runs there are, and makes them. What they say is study_page.py: the page, with
the rules by which settings are chosen and a claim is shown, not shown or contradicted.

Two runs go side by side, one thread each. A finished run is one line of study.json and is not made
again. A kill loses nothing: the same command goes on, within a run by train.py --resume. A run that
fails is named, and the others go on. By hand: train.py with the flags of the line and of its task.
"""
import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import eval as evaluation                              # found by the line above

TASKS = {"many": "", "one": "--counts 3 --high 20 --targets 1 60"}
HALF, RATE, TWICE = RATES = ("5e-5", "1e-4", "2e-4")        # RATE is train.py's default
LOWER = "2.5e-5"                                       # tried too where the lowest of RATES is best


def rates(loss):
    return [f"--loss {loss} --lr {lr}" for lr in RATES]


def strengths(flags, *values):
    return [f"--loss {flags} {value} --lr {RATE}" for value in values]


# Three settings each. Until all three have been tried, the middle one stands for the method.
METHODS = {
    "grpo": rates("grpo"),
    "diffsmooth": strengths("diffsmooth --gamma_p", 0.1, 0.2, 0.4),
    "both gammas": strengths("diffsmooth --gamma_p 0.2 --gamma_n", 0.01, 0.03, 0.1),
    "gamma_n alone": strengths("diffsmooth --gamma_p 0 --gamma_n", 0.01, 0.03, 0.1),
    "reward form": strengths("diffsmooth_reward --gamma_p", 0.1, 0.2, 0.4),
    "bonus": strengths("entropy --entropy_coef", 0.01, 0.03, 0.1),
    "penalty": strengths("entropy --entropy_coef", -0.003, -0.01, -0.03),
    "passk": strengths("passk --k", 2, 4, 8),
    "unlikeliness": strengths("unlikeliness --rank_coef", 0.1, 0.25, 0.5),
    "cispo": rates("cispo"),
    "maxrl": rates("maxrl"),
    "focal": strengths("focal --focal_gamma", 0.5, 1, 2),
}
DEFAULT = METHODS["diffsmooth"][1]                     # of train.py; measured even if another is kept
# Whose frontier is drawn, over which learning rates.
FRONTIER = {"grpo": RATES, "diffsmooth": RATES,
            "bonus": RATES[:2], "passk": RATES[:2], "maxrl": RATES[:2]}
LONGER, LONG = ("grpo", "diffsmooth", "bonus", "penalty", "passk"), " --steps 2400"
PATH = (100, 300, 600, 900, 1200, 1800, 2400)          # steps at which a run is measured on its way
TEMPERATURES = ("0.4", "0.7", "1.0", "1.3")
PROBLEMS, SAMPLES = 512, 64
KS = [1, 2, 4, 8, 16, 32, 64]
PASS = np.array([[100 * evaluation.pass_at_k(SAMPLES, c, k) for k in range(1, SAMPLES + 1)]
                 for c in range(SAMPLES + 1)])         # (correct answers, k - 1): Pass@k in percent
COLUMNS = {k: np.eye(SAMPLES)[k - 1] for k in KS}       # Pass@1, 2, 3 .. 64 @ COLUMNS[k] = Pass@k
COLUMNS["score"] = COLUMNS[1] / 2 + sum(COLUMNS[k] for k in KS[1:]) / 12   # k = 1: as the rest


class Study(NamedTuple):
    results: dict                                      # the name of a run -> its line of study.json
    task: str
    seeds: list


# ----------------------------------------------------------------------------- which runs there are

def name_of(task, flags, seed):
    return f"{task}: {flags}, seed {seed}"


def with_rate(flags, lr):
    return re.sub(r"--lr \S+", f"--lr {lr}", flags)


def scores(study, settings):
    """On the validation problems, with seed 0; None for what was not tried yet."""
    return [study.results.get(name_of(study.task, x, 0), {}).get("score") for x in settings]


def best(study, settings):
    found = scores(study, settings)
    return None if None in found else settings[int(np.argmax(found))]


def tried(study, method):
    """The settings of a method. Smoothing also gets GRPO's learning rates, at its best strength."""
    settings = METHODS[method]
    found = best(study, settings)
    if method == "diffsmooth" and found:
        rates = [flags.split()[-1] for flags in tried(study, "grpo")]
        settings = list(dict.fromkeys(settings + [with_rate(found, lr) for lr in rates]))
    elif found and found == with_rate(found, HALF):
        settings = [with_rate(found, LOWER), *settings]
    return settings


def kept(study, method):
    return best(study, tried(study, method)) or METHODS[method][1]


def longer(study):
    """{method: setting} of the long runs, which have no need of the lower rate. GRPO also has the
    rate of smoothing."""
    found = {}
    for method in LONGER:
        settings = [flags for flags in tried(study, method) if LOWER not in flags]
        found[method] = (best(study, settings) or METHODS[method][1]) + LONG
    rate = re.search(r"--lr (\S+)", found["diffsmooth"])[1]
    return found | {"grpo, same rate": with_rate(found["grpo"], rate)}


def at_rates(study, method):
    """The kept setting; where the frontier is wanted, also its neighbours at the other rates."""
    setting = kept(study, method)
    others = [with_rate(setting, lr) for lr in FRONTIER.get(method, ())]
    return list(dict.fromkeys([setting, *others]))


def wanted(study, methods):
    """The runs that can be made by now, in order: a study that is cut short has all methods."""
    names = [name_of(study.task, flags, 0) for m in methods for flags in tried(study, m)]
    ready = [m for m in methods if best(study, tried(study, m))]
    names += [name_of(study.task, flags, seed) for seed in study.seeds for m in ready
              for flags in at_rates(study, m) + [DEFAULT] * (m == "diffsmooth")]
    if study.task == "many":
        names += [name_of("many", flags, seed) for seed in study.seeds[:3]
                  for m, flags in longer(study).items() if m.split(",")[0] in ready]
    return list(dict.fromkeys(names))


# -------------------------------------------------------------------------------------- making them

def place_of(out, name):
    """The folder of a run. Beside it: its .log, and as .json its line of study.json as it grows."""
    task, rest = name.split(": ", 1)
    return Path(out) / task / re.sub(r"[^\w.+-]+", "_", rest.replace("--", ""))


def run_one(out, name):
    """A run, from wherever it stands, in this process -> exit code."""
    import torch
    import policy as policy_module
    import train
    task, flags, seed = re.fullmatch(r"(\w+): (.+?)(?:, seed (\d+))?", name).groups()
    place, parent, plain = place_of(out, name), os.getppid(), train.save_checkpoint
    file, device = Path(f"{place}.json"), ["--device", "cpu", "--out", str(place.parent)]
    line = read(file) or {"commit": commit(), "seconds": 0}
    before, args = line["seconds"], train.parse([*TASKS[task].split(), *device])

    def note(**news):
        line.update(news, seconds=before + round(time.process_time()))
        evaluation.write_json(file, line)

    def measure(policy, part, temperature):
        """-> a record a problem; problems and draws are those of train.py's table."""
        tokenizer = policy_module.tiny()[1]
        train.fill_task_flags(args, tokenizer)
        judge = train.make_task(args)
        problems = judge.held_out_problems(2 * PROBLEMS)[part]
        return evaluation.evaluate(policy, tokenizer, judge, problems, SAMPLES, args.max_new_tokens,
                                   float(temperature), torch.Generator().manual_seed(0))

    def validation(policy):
        """{k: Pass@k, and the score} on the validation problems."""
        curve = PASS[[r["c"] for r in measure(policy, slice(PROBLEMS, None), 0.7)]].mean(0)
        return {key: round(float(curve @ column), 2) for key, column in COLUMNS.items()}

    def note_point(policy, step):
        found = validation(policy)
        before_it = [point for point in line.get("path", []) if point[0] < step]
        note(path=[*before_it, [step, [found[k] for k in KS]]])

    def save_checkpoint(folder, policy, optimizer, step, rng, generator):
        """train.py's own, and a look at the policy, which draws by a generator of its own."""
        if step in PATH and seed != "0":
            note_point(policy, step)
        plain(folder, policy, optimizer, step, rng, generator)
        note()
        if os.getppid() != parent:                     # the study was killed; this run is saved
            sys.exit(1)

    if seed is None:                                   # the base, from which all runs start
        train.start_policy(args, "cpu", torch.float32)
    else:
        train.save_checkpoint = save_checkpoint
        resume = ["--resume"] if (place / "flags.json").is_file() else []
        code = train.main([*f"{flags} {TASKS[task]} --seed {seed} --eval-problems 0".split(),
                           *device, "--name", place.name, *resume])
        if code:
            return code
    policy, _ = policy_module.load(place / "model")
    if seed is None:
        note_point(policy, 0)
    if seed == "0":                                    # to choose by: never on the test problems
        note(score=validation(policy)["score"])
        return 0
    for temperature in (t for t in TEMPERATURES if t not in line.get("test", {})):
        records = measure(policy, slice(PROBLEMS), temperature)
        test = {"c": [r["c"] for r in records]}
        for key in ("distinct", "sigma"):
            found = [r[key] for r in records if r[key] is not None]
            test[key] = round(sum(found) / max(1, len(found)), 3)
        note(test=line.get("test", {}) | {temperature: test}, path=line.get("path", []))
    return 0


def run_apart(out, name):
    """The same in a process of its own, so that what goes wrong there reaches no other run."""
    place = place_of(out, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    threads = {} if name.endswith(": base") else {"OMP_NUM_THREADS": "1"}
    with open(f"{place}.log", "a") as log:
        code = subprocess.run([sys.executable, __file__, "--out", str(out), "--run", name],
                              stdout=log, stderr=log, env=os.environ | threads).returncode
    print(f"{name}: " + (f"failed, see {place}.log" if code else "done"), file=sys.stderr)
    return name, None if code else read(Path(f"{place}.json"))


def run_all(args, results):
    """Two at a time -> the names of those that failed."""
    failed = set()

    def make(names):
        pool = ThreadPoolExecutor(2)
        try:
            for name, line in pool.map(functools.partial(run_apart, args.out), names):
                failed.update(set() if line else {name})
                results.update({name: line} if line else {})
                save(args.results, results)
        finally:                                       # Ctrl-C reaches the runs too, and they save
            pool.shutdown(cancel_futures=True)

    for task in args.tasks:
        study, base = Study(results, task, args.seeds), f"{task}: base"
        if base not in results or not (place_of(args.out, base) / "model").is_dir():
            make([base])
        while base not in failed and (todo := [name for name in wanted(study, args.methods)
                                               if name not in results and name not in failed]):
            make(todo)                                 # then settings are chosen: more is wanted
    return failed


def commit():
    """The last one that changed the six files, so that a commit of results changes nothing."""
    words = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", ":(top,glob)*.py"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:                                    # no git here
        return "unknown"


def read(file):
    return json.loads(file.read_text()) if file.is_file() else {}


def save(file, results):
    """A line a run; aside, then renamed, so that the file is there whole or not at all."""
    lines = (f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results))
    aside = file.with_name(file.name + ".tmp")
    aside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(aside, file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[4, 5, 6, 7, 8])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study", help="of the runs")
    parser.add_argument("--only-print", action="store_true", help="the page, of what is finished")
    parser.add_argument("--plot", metavar="FILE", help="the frontier, of the first of --tasks")
    parser.add_argument("--run", metavar="NAME", help="only this one, as study.json names it")
    args = parser.parse_args()
    if args.run:
        return run_one(args.out, args.run)
    if 0 in args.seeds:
        parser.error("seed 0 is for choosing settings: --seeds takes others.")
    import study_page
    results = read(args.results)
    if args.plot:
        study_page.draw(Study(results, args.tasks[0], args.seeds), args.plot)
        return 0
    failed = set() if args.only_print else run_all(args, results)
    study_page.print_page(results, args.tasks, args.seeds)
    for name in sorted(failed):
        print(f"failed: {name}; the same command tries it again.", file=sys.stderr)
    return min(1, len(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here.")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
