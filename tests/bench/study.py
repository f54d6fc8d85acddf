"""The paper's experiment on two CPU cores: what does smoothing keep, on which task, against what?

    python tests/bench/study.py                          # everything: twenty hours on two cores
    python tests/bench/study.py --tasks many --methods grpo diffsmooth --seeds 4 5 6
    python tests/bench/study.py --only-print > tests/bench/study.md
    python tests/bench/study.py --readme                 # the tables that README shows
    python tests/bench/study.py --plot tests/bench/study.png                   # needs matplotlib

Two tasks: `many` (train.py's default: several solutions per problem) and `one` (mostly one).
This file lists the runs and makes them. study_page.py evaluates them: it prints the page, with the
rules by which settings are chosen and by which a claim is shown, not shown or contradicted.

Two runs go side by side, with one thread each. A finished run is one line of study.json and is not
made again. A kill loses nothing: the same command continues, within a run by train.py --resume. A
run that fails is named, and the others go on. To repeat one by hand: train.py with the flags of the
line and of its task.

Every run starts from a base, a policy warm-started with the base's number as its seed. study.json
records how each base was made and a hash of its weights; a run refuses to start from another one.
"""
import argparse
import functools
import hashlib
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
import policy as policy_module
from policy import UserError

TASKS = {"many": "", "one": "--counts 3 --high 20 --targets 1 60"}
HALF, RATE, TWICE = RATES = ("5e-5", "1e-4", "2e-4")        # RATE is train.py's default
LOWER = "2.5e-5"                                       # also tried where RATES[0] is best


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
DEFAULT = METHODS["diffsmooth"][1]                     # of train.py; always measured, kept or not
# Methods whose frontier is drawn, and over which learning rates.
FRONTIER = {"grpo": RATES, "diffsmooth": RATES,
            "bonus": RATES[:2], "passk": RATES[:2], "maxrl": RATES[:2]}
LONGER, LONG = ("grpo", "diffsmooth", "bonus", "penalty", "passk"), " --steps 2400"
# The runs that are repeated on further bases, once per base, with seed base + 4: never the seed
# that made the base, so that warm start and RL share no draws.
HEADLINE, BASES = (DEFAULT, *METHODS["grpo"][1::-1]), (1, 2, 3, 4)
MADE = ("seed", "warm_steps", "counts", "high", "targets")     # what a base depends on
# One order of additions on all x86 processors, so that the recorded bases come out bit for bit.
ARITHMETIC = {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2",
              "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
PATH = (100, 300, 600, 900, 1200, 1800, 2400)          # a run is measured at these steps
TEMPERATURES = ("0.4", "0.7", "1.0", "1.3")
PROBLEMS, SAMPLES = 512, 64
KS = [1, 2, 4, 8, 16, 32, 64]
PASS = np.array([[100 * evaluation.pass_at_k(SAMPLES, c, k) for k in range(1, SAMPLES + 1)]
                 for c in range(SAMPLES + 1)])         # (correct answers, k - 1): Pass@k in percent
COLUMNS = {k: np.eye(SAMPLES)[k - 1] for k in KS}       # Pass@1, 2, 3 .. 64 @ COLUMNS[k] = Pass@k
# One number per model: half Pass@1, half the mean of Pass@2, 4 .. 64.
WEIGHTED = "weighted mean"
COLUMNS[WEIGHTED] = COLUMNS[1] / 2 + sum(COLUMNS[k] for k in KS[1:]) / 12


class Study(NamedTuple):
    results: dict                                      # the name of a run -> its line of study.json
    task: str
    seeds: list


class Run(NamedTuple):
    task: str
    flags: str | None                                  # None: the base itself
    base: int
    seed: str | None


# ----------------------------------------------------------------------------- which runs there are

def name_of(task, flags, seed, base=0):
    """The name of a run in study.json. Base 0, which most runs start from, is not mentioned."""
    return f"{task}: {flags}{f', base {base}' if base else ''}, seed {seed}"


def base_name(task, base=0):
    return f"{task}: base" + (f" {base}" if base else "")


def parts_of(name):
    """The inverse of both -> Run."""
    found = re.fullmatch(r"(\w+): (?:base(?: (\d+))?|(.+?)(?:, base (\d+))?, seed (\d+))", name)
    if not found or found[1] not in TASKS:
        raise UserError(f"'{name}' names no run; names are like '{base_name('many')}' and "
                         f"'{name_of('many', DEFAULT, 4)}'.")
    task, base, flags, on, seed = found.groups()
    return Run(task, flags, int(base or on or 0), seed)


def base_of(name):
    """The name of the base that a run starts from; of a base, its own."""
    run = parts_of(name)
    return base_name(run.task, run.base)


def with_rate(flags, lr):
    return re.sub(r"--lr \S+", f"--lr {lr}", flags)


def validated(study, settings):
    """Their weighted means on the validation problems with seed 0; None where not yet tried."""
    return [study.results.get(name_of(study.task, x, 0), {}).get(WEIGHTED) for x in settings]


def best(study, settings):
    found = validated(study, settings)
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
    """{method: setting} of the longer runs, without the lower rate. GRPO also gets the rate of
    smoothing."""
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
    """The names of all runs that can be made by now, in an order that gives every method some runs
    even if the study is cut short."""
    names = [base_name(study.task)]
    names += [name_of(study.task, flags, 0) for m in methods for flags in tried(study, m)]
    ready = [m for m in methods if best(study, tried(study, m))]
    names += [name_of(study.task, flags, seed) for seed in study.seeds for m in ready
              for flags in at_rates(study, m) + [DEFAULT] * (m == "diffsmooth")]
    if study.task == "many":
        names += [name_of("many", flags, seed) for seed in study.seeds[:3]
                  for m, flags in longer(study).items() if m.split(",")[0] in ready]
        names += [name_of("many", flags, base + 4, base) for base in BASES for flags in HEADLINE
                  if flags.split()[1] in methods]
    return list(dict.fromkeys(names))


# -------------------------------------------------------------------------------------- making them

def place_of(out, name):
    """The folder of a run. Beside it: its .log, and as .json its line of study.json as it grows."""
    task, rest = name.split(": ", 1)
    return Path(out) / task / re.sub(r"[^\w.+-]+", "_", rest.replace("--", ""))


def run_one(out, name, results):
    """Make a run, or continue it, in this process -> exit code. results: those of study.json."""
    import torch
    import train
    from rewards import fill_task_flags, make_task
    run, place, parent = parts_of(name), place_of(out, name), os.getppid()
    file, base = Path(f"{place}.json"), base_of(name)
    flags = [*TASKS[run.task].split(), "--device", "cpu", "--out", str(place.parent)]
    line = read(file) or {"commit": commit(), "seconds": 0}
    before, save_as_usual = line["seconds"], train.save_checkpoint

    def note(**news):
        line.update(news, seconds=before + round(time.process_time()))
        write(file, json.dumps(line))

    def measure(policy, part, temperature):
        """-> one record per problem; problems and draws are those of train.py's table."""
        tokenizer, args = policy_module.tiny()[1], train.parse(flags)
        fill_task_flags(args, tokenizer)
        task = make_task(args)
        problems = task.held_out_problems(2 * PROBLEMS)[part]
        return evaluation.evaluate(policy, tokenizer, task, problems, SAMPLES, args.max_new_tokens,
                                   float(temperature))

    def validation(policy):
        """{k, or WEIGHTED: Pass@k on the validation problems}."""
        curve = PASS[[r["c"] for r in measure(policy, slice(PROBLEMS, None), 0.7)]].mean(0)
        return {key: round(float(curve @ column), 2) for key, column in COLUMNS.items()}

    def note_point(policy, step):
        found = validation(policy)
        before_it = [point for point in line.get("path", []) if point[0] < step]
        note(path=[*before_it, [step, [found[k] for k in KS]]])

    def save_checkpoint(folder, policy, optimizer, step, rng, generator):
        """train.py's own, after a measurement, which draws from a generator of its own."""
        if step in PATH and run.seed != "0":
            note_point(policy, step)
        save_as_usual(folder, policy, optimizer, step, rng, generator)
        note()
        if os.getppid() != parent:                     # the study was killed; this run is saved
            sys.exit(1)

    if run.flags is None:
        made_by = train.parse([*flags, "--base", place.name, "--seed", str(run.base)])
        train.start_policy(made_by, "cpu", torch.float32)      # makes it unless it is there
    else:
        note(base=check_base(out, base, results))      # the hash of the weights it starts from
        train.save_checkpoint = save_checkpoint
        resume = ["--resume"] if (place / "flags.json").is_file() else []
        code = train.main([*run.flags.split(), *flags, "--seed", run.seed, "--eval-problems", "0",
                           "--base", place_of(out, base).name, "--name", place.name, *resume])
        if code:
            return code
    policy, _ = policy_module.load(place / "model")
    if run.flags is None:
        note(made=made_with(place), weights=hash_of(policy))
        check_base(out, name, results)                 # before minutes go into measuring it
        note_point(policy, 0)
    if run.seed == "0":                                # for choosing: never on the test problems
        note(**{WEIGHTED: validation(policy)[WEIGHTED]})
        return 0
    for temperature in (t for t in TEMPERATURES if t not in line.get("test", {})):
        records = measure(policy, slice(PROBLEMS), temperature)
        test = {"c": [r["c"] for r in records]}
        for key in ("distinct", "sigma"):
            found = [r[key] for r in records if r[key] is not None]
            test[key] = round(sum(found) / max(1, len(found)), 3)
        note(test=line.get("test", {}) | {temperature: test}, path=line.get("path", []))
    return 0


def hash_of(policy):
    """SHA-256 of the names, shapes and bytes of all weights, whatever the file looks like."""
    total = hashlib.sha256()
    for name, w in sorted(policy.named_parameters()):
        total.update(f"{name} {w.dtype} {tuple(w.shape)} ".encode() + w.detach().numpy().tobytes())
    return total.hexdigest()


def made_with(place):
    """What a base depends on besides the code and the arithmetic of the machine."""
    flags = read(place / "flags.json")
    return {key: flags[key] for key in MADE}


def check_base(out, name, results):
    """-> the hash of the weights of this base. UserError unless it is there and is the one that
    study.json records, or, in a study that has not recorded it yet, the one made for it."""
    place = place_of(out, name)
    recorded = results.get(name) or read(Path(f"{place}.json"))
    make = f'python tests/bench/study.py --run "{name}"'
    if "weights" not in recorded or not (place / "model").is_dir():
        raise UserError(f"'{place}' is missing or not recorded, and runs start from it: make it "
                        f"with {make}.")
    made, weights = made_with(place), hash_of(policy_module.load(place / "model")[0])
    for key, value in recorded["made"].items():
        if made[key] != value:
            raise UserError(f"'{place}' was made with {key} {made[key]}, the study's base with "
                            f"{value}: delete it and make it with {make}.")
    if weights != recorded["weights"]:
        raise UserError(f"'{place}' has other weights ({weights[:16]}) than the base of the study "
                        f"({recorded['weights'][:16]}). Delete it and make it with {make}. If it "
                        "still differs, this processor or version of torch rounds differently: "
                        "begin a study of your own with --results and --out.")
    return weights


def run_apart(args, name):
    """The same in a process of its own, so that an error there reaches no other run."""
    place = place_of(args.out, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--out", str(args.out), "--results", str(args.results)]
    with open(f"{place}.log", "a") as log:
        code = subprocess.run([*command, "--run", name], stdout=log, stderr=log,
                              env=os.environ | ARITHMETIC).returncode
    print(f"{name}: " + (f"failed, see {place}.log" if code else "done"), file=sys.stderr)
    return name, None if code else read(Path(f"{place}.json"))


def run_all(args, results):
    """Two at a time -> the names of those that failed."""
    failed = set()

    def make(names):
        pool = ThreadPoolExecutor(2)
        try:
            for name, line in pool.map(functools.partial(run_apart, args), names):
                failed.update(set() if line else {name})
                # A base may be made again for its folder; its line stays as it was recorded.
                results.update({name: line} if line and name not in results else {})
                save(args.results, results)
        finally:                                       # Ctrl-C reaches the runs too, and they save
            pool.shutdown(cancel_futures=True)

    for task in args.tasks:
        study = Study(results, task, args.seeds)
        while todo := [name for name in wanted(study, args.methods)
                       if name not in results and not {name, base_of(name)} & failed]:
            bases = [name for name in dict.fromkeys(map(base_of, todo)) if name not in results
                     or not (place_of(args.out, name) / "model").is_dir()]
            make(bases or todo)                        # once settings are chosen, more is wanted
    return failed


def commit():
    """The last commit that changed one of the six files; a commit of results does not count."""
    words = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", ":(top,glob)*.py"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:                                    # no git here
        return "unknown"


def read(file):
    return json.loads(file.read_text()) if file.is_file() else {}


def write(file, text):
    """Under another name, then renamed, so that the file is there whole or not at all."""
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, file)


def save(file, results):
    """study.json: one line per run."""
    lines = (f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results))
    write(file, "{\n" + ",\n".join(lines) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[4, 5, 6, 7, 8])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"),
                        help="the file of the finished runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study", help="their folder")
    parser.add_argument("--only-print", action="store_true", help="print the page, make no run")
    parser.add_argument("--readme", action="store_true", help="print the tables that README shows")
    parser.add_argument("--plot", metavar="FILE", help="draw the frontier on the first of --tasks")
    parser.add_argument("--run", metavar="NAME", help="make only this one; a name of study.json")
    args = parser.parse_args()
    if args.run and not ARITHMETIC.items() <= os.environ.items():      # read when torch starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ARITHMETIC)
    if args.run:
        return run_one(args.out, args.run, read(args.results))
    if 0 in args.seeds:
        parser.error("seed 0 is for choosing settings: --seeds takes others.")
    import study_page
    results = read(args.results)
    if args.plot:
        study_page.draw(Study(results, args.tasks[0], args.seeds), args.plot)
        return 0
    if args.readme:
        print(study_page.readme_tables(results, args.seeds))
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
    except UserError as error:
        sys.exit(f"error: {error}")
