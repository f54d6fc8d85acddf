"""How it is measured: Pass@k with intervals, and how many different correct answers a model has.

    python eval.py runs/base runs/grpo runs/diffsmooth --n 128 --show 3
    python eval.py runs/grpo runs/diffsmooth --temperatures 0.4 0.7 1 1.3 --plot frontier.png
    python eval.py runs/grpo runs/diffsmooth --curves curves.png       # what their log.csv says

draws n answers to each held-out problem from every model named (a run of train.py, a model folder,
or a hub name), all on the same problems, prints a table, and writes it with the per-problem counts.

For a problem with n samples of which c are correct:
- Pass@k   the chance that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k), without
           bias (arXiv 2107.03374); averaged over problems last. Pass@1 is the paper's C(pi).
- distinct the number of different correct answers among the n, up to the order of + and *;
           as_text  by their characters. Pass@k cannot see this: the same chance of success gives
           the same Pass@k, however alike the answers are.
- sigma    Gini-Simpson diversity of the correct answers, the chance that two correct samples
           differ: 1 - sum_j n_j (n_j - 1) / (c (c - 1)), without bias; over problems with c >= 2.
- nats     mean of -log pi(y|x): an estimate of the entropy of whole answers.
distinct, as_text and sigma are left out for --task math, where all correct answers are equal.
Intervals are 95 % bootstrap intervals over problems, and those of a difference are paired: the same
resampled problems serve all models.
"""
import argparse
import contextlib
import csv
import datetime
import errno
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

# Threads without work spin for a while, and two runs on one machine spin against each other. A
# shorter while costs a single run nothing. GNU's OpenMP reads this when torch is imported.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import losses
import policy as policy_module
import rewards
from policy import UserError
from rewards import Problem, SETTING, add_task_flags, fill_task_flags, make_task
from sample import chat, encode, sample

MEASURES = ("distinct", "as_text", "sigma", "parsed", "finished", "tokens", "nats")


def pass_at_k(n, c, k):
    """Unbiased estimate of Pass@k from c correct among n samples: 1 - C(n-c, k) / C(n, k).

    pass_at_k(10, 3, 5) is 0.916667. ValueError where n < k: there is no unbiased estimate then;
    and where k < 1 or c is not one of 0..n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct among {n} samples is impossible.")
    if not 1 <= k <= n:
        raise ValueError(f"Pass@{k} needs at least {k} samples per problem, but there are {n}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(policy, tokenizer, task, problems, n, max_new_tokens, temperature=1.0, seed=0,
             rows=1024):
    """n answers to each problem -> one dict per problem, see `record`. rows: answers in flight."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    gather_weights(policy)
    most = min(n, rows)                                # a large n is drawn in several pieces
    pieces = [min(most, n - drawn) for drawn in range(0, n, most)]

    def measure(batch):
        prompts = [chat(tokenizer, task.system, task.prompt(x), task.style) for x in batch]
        answers = [[] for _ in batch]                  # per problem: (text, tokens, nats, finished)
        for G in pieces:
            rollout = sample(policy, tokenizer, prompts, G, max_new_tokens, temperature, generator)
            columns = zip(rollout.texts, rollout.mask.sum(1).tolist(),
                          (-rollout.logp.sum(1)).tolist(), rollout.finished.tolist())
            for row, answer in enumerate(columns):
                answers[row // G].append(answer)
        return [record(task, problem, some) for problem, some in zip(batch, answers)]

    def pass_over(batch):                              # the generator, without an answer
        for G in pieces:
            torch.rand(len(batch) * G, max_new_tokens, generator=generator, device=policy.device)

    at_once = problems_at_once(len(problems), n, rows)
    batches = [problems[start:start + at_once] for start in range(0, len(problems), at_once)]
    return share_out(batches, measure, pass_over)


def record(task, problem, answers):
    """What the table needs of one problem; answers: list of (text, tokens, nats, finished)."""
    texts, tokens, nats, finished = zip(*answers)
    judged = {text: (task.reward(problem, text) == 1, task.canonical(text)) for text in set(texts)}
    correct = [text for text in texts if judged[text][0]]
    forms = Counter(judged[text][1] for text in correct)
    wrong = Counter(judged[text][1] or text[:60] for text in texts if not judged[text][0])
    c, n = len(correct), len(texts)
    found = {"problem": list(problem), "n": n, "c": c, "correct": dict(forms.most_common()),
             "wrong": dict(wrong.most_common(3))}
    if task.several_answers:
        same = sum(m * (m - 1) for m in forms.values())        # ordered pairs that agree
        found |= {"distinct": len(forms), "as_text": len(set(correct)),
                  "sigma": 1 - same / (c * (c - 1)) if c >= 2 else None}
    return found | {"parsed": sum(judged[text][1] is not None for text in texts) / n,
                    "finished": sum(finished) / n, "tokens": sum(tokens) / n,
                    "nats": sum(nats) / n}


def columns(records):
    """{column: (problems,) array}: what is averaged over problems. NaN where one has no value."""
    n = records[0]["n"]
    ks = [2 ** i for i in range(n.bit_length())]       # 1, 2, 4, ... up to n
    values = {f"Pass@{k}": [100 * pass_at_k(n, r["c"], k) for r in records] for k in ks}
    for name in MEASURES:
        if name in records[0]:
            values[name] = [math.nan if r[name] is None else r[name] for r in records]
    return {name: np.array(column, dtype=float) for name, column in values.items()}


def summary(results, resamples=2000, seed=0):
    """{model: records} -> {model: {column: {"mean", "low", "high", "gain": the same over the first
    model, for all but that one}}}."""
    first, size = next(iter(results)), len(next(iter(results.values())))
    # The same resampled problems serve every model, so the interval of a gain is a paired one.
    picks = np.random.default_rng(seed).integers(0, size, (resamples, size))
    values = {model: columns(records) for model, records in results.items()}
    summaries = {}
    for model, table in values.items():
        summaries[model] = {name: interval(x, picks) for name, x in table.items()}
        if model != first:
            for name, x in table.items():
                summaries[model][name]["gain"] = interval(x - values[first][name], picks)
    return summaries


def interval(x, picks):
    """(problems,) values -> their mean and its bootstrap interval; None where none has a value."""
    exists = ~np.isnan(x)
    size = exists[picks].sum(1)                                             # (resamples,)
    if not size.any():
        return {"mean": None, "low": None, "high": None}
    means = np.where(exists, x, 0)[picks].sum(1)[size > 0] / size[size > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(x[exists].mean()), "low": float(low), "high": float(high)}


# ----------------------------------------------- a first reading ends here; below: tables, pictures

def table(summaries):
    """The summaries as text: a line per measure, a column per model. The first has its own
    interval, the others have their gain over it with the interval of the gain."""
    first = next(iter(summaries))
    others = [model for model in summaries if model != first]
    lines = [["", first, *(f"{model} (gain over {first})" for model in others)]]
    for name in summaries[first]:
        digits = 2 if name in ("sigma", "parsed", "finished") else 1
        line = [name]
        for model, row in summaries.items():
            mean, gain = row[name]["mean"], row[name].get("gain", row[name])
            if mean is None or gain["mean"] is None:   # sigma of a model that is never right twice
                line.append("-".rjust(6))
            elif model == first:
                line.append(f"{mean:6.{digits}f} [{gain['low']:.{digits}f}, "
                            f"{gain['high']:.{digits}f}]")
            else:
                line.append(f"{mean:6.{digits}f}  {gain['mean']:+.{digits}f} "
                            f"[{gain['low']:+.{digits}f}, {gain['high']:+.{digits}f}]")
        lines.append(line)
    widths = [max(map(len, column)) + 3 for column in zip(*lines)]
    return "\n".join("".join(text.ljust(width) for text, width in zip(line, widths)).rstrip()
                     for line in lines)


def curve(row, part="mean"):
    """One model's Pass@k from its summary -> ([k], [value])."""
    ks = [int(name[5:]) for name in row if name.startswith("Pass@")]
    return ks, [row[f"Pass@{k}"][part] for k in ks]


def chart(summaries, height=12):
    """The Pass@k curves in characters, a letter per model, for those who sit at a terminal."""
    ks, _ = curve(next(iter(summaries.values())))
    top = max(max(curve(row)[1]) for row in summaries.values()) or 1.0
    grid = [[" "] * (len(ks) * (len(summaries) + 3)) for _ in range(height + 1)]
    for i, row in enumerate(summaries.values()):
        for j, value in enumerate(curve(row)[1]):      # side by side, so that none hides another
            grid[height - round(height * value / top)][j * (len(summaries) + 3) + i] = chr(97 + i)
    lines = [f"{top * (height - y) / height:5.0f} |" + "".join(line) for y, line in enumerate(grid)]
    labels = "".join(str(k).ljust(len(summaries) + 3) for k in ks)
    names = ", ".join(f"{chr(97 + i)} {model}" for i, model in enumerate(summaries))
    lines += [f"{'k':>5}  {labels}", f"Pass@k: {names}"]
    return "\n".join(line.rstrip() for line in lines)


def print_table(summaries):
    """The table; a picture for eyes, but a pipe or a file gets numbers only."""
    print(table(summaries))
    if sys.stdout.isatty():
        print(chart(summaries))


def answers_of(task, problem, records):
    """What each model says to a problem: the different correct answers with their shares of its
    samples, most frequent first, and the most frequent wrong ones (x), as text with bars.

    records: {model: its record of this problem}."""
    lines = [" ".join(task.prompt(problem).split())[:90]]
    for model, one in records.items():
        lines.append(f"  {model}: {one['c']} of {one['n']} correct")
        wrong = list(one["wrong"].items())[:1 if task.several_answers else 3]
        marked = [(" ", *x) for x in one["correct"].items()] + [("x", *x) for x in wrong]
        lines += [f"  {mark} {' '.join(text.split())[:36]:36} {100 * count / one['n']:5.1f} % "
                  + "#" * round(40 * count / one["n"]) for mark, text, count in marked]
    return "\n".join(lines)


def most_changed(task, problems, before, after, name):
    """Three lines on the problem whose correct answers changed their shares most in training."""
    def change(i):
        old, new = before[i]["correct"], after[i]["correct"]
        return sum(abs(old.get(form, 0) - new.get(form, 0)) for form in old | new)

    several = [i for i, one in enumerate(before) if len(one["correct"]) > 1]
    at = max(several or range(len(before)), key=change)
    lines = [f"{' '.join(task.prompt(problems[at]).split())[:70]} has changed most; correct are"]
    for model, one in (("base", before[at]), (name, after[at])):
        said = [f"{form} {100 * n / one['n']:.0f} %" for form, n in one["correct"].items()]
        lines.append(f"  {model}: " + (", ".join(said[:4]) or "never correct")
                     + f", {len(said) - 4} more" * (len(said) > 4))
    return "\n".join(lines)


def plot(summaries, file, title):
    """{temperature: summaries} as a picture. One temperature: Pass@k against k, with intervals as
    bands. Several: the frontier, Pass@1 against Pass@(largest k up to 64), a curve per model."""
    with figure(file, 1) as axes:
        models = next(iter(summaries.values()))
        ks, _ = curve(next(iter(models.values())))
        if len(summaries) == 1:
            for model, row in models.items():
                axes.plot(ks, curve(row)[1], marker="o", label=model)
                axes.fill_between(ks, curve(row, "low")[1], curve(row, "high")[1], alpha=0.2)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.set(xlabel="k", ylabel="Pass@k (%)")
        else:
            k = max(k for k in ks if k <= 64)
            for model in models:
                rows = [some[model] for some in summaries.values()]
                points = [(row["Pass@1"]["mean"], row[f"Pass@{k}"]["mean"]) for row in rows]
                axes.plot(*zip(*points), marker="o", label=model)
                for temperature, point in zip(summaries, points):
                    axes.annotate(f"T {temperature}", point, textcoords="offset points",
                                  xytext=(4, 4))
            axes.set(xlabel="Pass@1 (%)", ylabel=f"Pass@{k} (%)")
        axes.set_title(title)
        axes.legend()


# What --curves draws: columns of log.csv, the first that a log has; those of every step smoothed.
PANELS = {"Pass@1, held out (%)": ["held_out_1"], "Pass@16, held out (%)": ["held_out_16"],
          "entropy (nats per token)": ["entropy"],
          "different correct answers per problem": ["held_out_distinct", "distinct"]}


def plot_curves(folders, file):
    """What happened during training, from log.csv alone: four panels, a line per run."""
    logs = {}
    for folder in folders:
        try:
            with open(Path(folder) / "log.csv", newline="") as opened:
                logs[folder] = list(csv.DictReader(opened))
        except OSError:
            raise UserError(f"--curves: '{folder}' is no run of train.py: it has no log.csv.")
    with figure(file, 4) as panels:
        for axes, (title, names) in zip(panels.flat, PANELS.items()):
            for folder, rows in logs.items():
                name = next((x for x in names if any(row.get(x) for row in rows)), None)
                points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
                steps, values = zip(*points) if points else ((), ())
                width = 1 if name and name.startswith("held_out") else min(25, len(values) or 1)
                smooth = np.convolve(values, np.ones(width) / width, "valid") if values else ()
                axes.plot(steps[len(steps) - len(smooth):], smooth, label=Path(folder).name,
                          marker="." if width == 1 else None)
            axes.set(title=title, xlabel="step")
        panels.flat[0].legend(fontsize="small")


@contextlib.contextmanager
def figure(file, panels):
    """Axes to draw on, which are then written to `file`: one, or 2 x 2 for 4 panels."""
    import matplotlib
    matplotlib.use("Agg")                              # no screen is needed
    import matplotlib.pyplot as plt
    side = math.isqrt(panels)
    drawn, axes = plt.subplots(side, side, figsize=(6, 4.5) if side == 1 else (10, 7),
                               layout="constrained")
    yield axes
    drawn.savefig(file, dpi=150)
    plt.close(drawn)


# -------------------------------------------------------------------------------- during training

TRACKED, TRACKED_ANSWERS = 128, 16     # held-out problems that --eval-every measures, answers each


def progress(step, task, rollout, rewards, group_size):
    """The columns that say how the policy is doing; the rows of all processes count."""
    def share(x):
        return whole_batch(x.float()).mean().item()

    device = rewards.device
    forms = [task.canonical(text) for text in rollout.texts]                # None where none parses
    groups = rewards.view(-1, group_size)
    line = {"step": step, "reward": share(rewards), "solved": share((groups == 1).any(1))}
    if task.several_answers:
        # Two answers are one where they differ by order or brackets only: 1+2 and (2+1).
        correct = [form if reward == 1 else None for form, reward in zip(forms, rewards.tolist())]
        distinct = [len({*correct[i:i + group_size]} - {None})
                    for i in range(0, len(correct), group_size)]
        line["distinct"] = share(torch.tensor(distinct, device=device))
    return line | {"equal": share((groups == groups[:, :1]).all(1)),
                   "parsed": share(torch.tensor([form is not None for form in forms],
                                                device=device)),
                   "length": share(rollout.mask.sum(1)), "cut": share(~rollout.finished)}


def held_out(this, args, step):
    """Every --eval-every steps the tracked problems are measured -> columns; else None in them."""
    names = {"Pass@1": "held_out_1", f"Pass@{TRACKED_ANSWERS}": f"held_out_{TRACKED_ANSWERS}"}
    if this.test_task.several_answers:
        names["distinct"] = "held_out_distinct"
    if not this.tracked_problems or step % args.eval_every:
        return dict.fromkeys(names.values())
    found = columns(evaluate(
        this.policy, this.tokenizer, this.test_task, this.tracked_problems, TRACKED_ANSWERS,
        args.max_new_tokens, args.temperature, rows=args.rows))
    say(f"step {step}, held-out problems: " + ", ".join(f"{name} {found[name].mean():.1f}"
                                                        for name in names))
    return {short: float(found[name].mean()) for name, short in names.items()}


# ------------------------------------------------------------------- the table at the end of a run

def compare(this, args):
    """The table at the end: the base, this run, and every finished run beside it that was measured
    alike, on the same held-out problems. What was measured before is read from eval.json."""
    marks = in_first(lambda: {"base": fingerprint(this.base),
                              args.name: fingerprint(this.folder / "model")})
    # All that a number in the table depends on, apart from the model.
    setting = {key: getattr(args, key) for key in SETTING} | {
        "stop": args.stop, "dtype": str(this.dtype), "n": args.eval_samples,
        "temperature": args.eval_temperature, "problems": [list(x) for x in this.test_problems],
        "base": marks["base"]}
    known = in_first(lambda: measured_alike(this.folder.parent, setting))
    if args.name in known and known[args.name]["fingerprint"] != marks[args.name]:
        del known[args.name]                           # it went on since
    policy = this.policy
    for name in (args.name, "base"):
        if name not in known:
            policy = policy or policy_module.load(this.base, this.device, this.dtype, args.stop)[0]
            records = evaluate(policy, this.tokenizer, this.test_task, this.test_problems,
                               args.eval_samples, args.max_new_tokens, args.eval_temperature,
                               rows=args.rows)
            known[name] = {"fingerprint": marks[name], "loss": args.loss, "records": records}
        policy = this.policy = None                    # one model at a time
    if rank() > 0:
        return
    order = ["base", *(name for name in known if name not in marks), args.name]
    results = {name: known[name]["records"] for name in order}
    write_json(this.folder / "eval.json", {"setting": setting, "flags": vars(args),
                                           "models": {name: known[name] for name in marks}})
    print(f"{args.task}: {len(this.test_problems)} held-out problems, {args.eval_samples} samples "
          f"each, temperature {args.eval_temperature:g}")
    print_table(summary(results))
    print(most_changed(this.test_task, this.test_problems, results["base"], results[args.name],
                       args.name))
    print(f"log, model and table are in {this.folder}")
    # Suggest the other half of the comparison if it has not been run.
    other = "diffsmooth" if args.loss == "grpo" else "grpo"
    if other not in (model["loss"] for model in known.values()):
        print(f"To read it against {other}, on the same problems: python train.py --loss {other}")


def measured_alike(folder, setting):
    """{name: {"fingerprint", "loss", "records"}} of the base and of every run in `folder` that was
    measured with this setting."""
    wanted, found = json.dumps(setting), {}
    for file in sorted(folder.glob("*/eval.json")):
        try:
            seen = json.loads(file.read_text())
            found |= seen["models"] if json.dumps(seen["setting"]) == wanted else {}
        except (ValueError, KeyError, TypeError, OSError):     # another program's, or cut in half
            continue
    return found


# ---------------------------------------------------------------------------------------- the flags

def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], usage="python eval.py MODEL ... [flags]",
                    allow_abbrev=False)
    parser.add_argument("models", nargs="+", help="a run folder of train.py, a model folder, or a "
                        "hub name; gains are over the first")
    flag = parser.add_argument_group("what is measured").add_argument
    flag("--n", "--samples", type=int, default=128, help="answers per problem (default: 128); "
         "torchrun takes an --n for its own, and passes --samples on")
    flag("--problems", type=int, default=512, help="held-out problems, if there are so many "
         "(default: 512)")
    flag("--temperature", "--temperatures", type=float, nargs="+", default=[0.7], help="default: "
         "0.7; several: a table each, and --plot the frontier", dest="temperatures")
    flag("--seed", type=int, default=0, help="of the draws, not of the problems (default: 0)")
    flag("--stop", nargs="+", default=[], help="further tokens that end an answer")
    add_task_flags(parser)
    parser.set_defaults(task=None)                     # that of the runs named, else countdown
    flag = parser.add_argument_group("the machine").add_argument
    flag("--rows", type=int, default=1024, help="answers drawn at once: lower it when memory runs "
         "out (default: 1024)")
    flag("--device", help="without it, cuda where there is one")
    flag = parser.add_argument_group("what is written").add_argument
    flag("--json", default="eval.json", help="the numbers (default: eval.json)")
    flag("--show", metavar="N", help="the answers to N problems, with their shares; or to one "
         "countdown problem of yours, such as 2,3,5,7=17, and nothing else")
    flag("--plot", help="a picture of the Pass@k curves, or of the frontier where there are "
         "several temperatures (needs matplotlib)")
    flag("--curves", help="a picture of the runs' training, and nothing else (needs matplotlib)")
    args = parser.parse_args(argv)
    if min(args.n, args.problems, args.rows) < 1:
        raise UserError("--n, --problems and --rows must be at least 1.")
    if not all(0 < temperature < math.inf for temperature in args.temperatures):
        raise UserError("--temperature must be above 0.")
    if args.show and not re.fullmatch(r"[1-9]\d*|\d+(,\d+)+=-?\d+", args.show):
        raise UserError(f"--show takes a number, or a problem such as 2,3,5,7=17, not {args.show}.")
    # What can be told now is not told after an hour.
    for flag, file in (("json", args.json), ("plot", args.plot), ("curves", args.curves)):
        path = Path(file or "nothing")
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"--{flag}: '{file}' cannot be written: no file in an existing folder.")
        if file and flag != "json":
            if importlib.util.find_spec("matplotlib") is None:
                raise UserError(f"--{flag} needs matplotlib: pip install matplotlib.")
            from matplotlib.backend_bases import FigureCanvasBase
            if (path.suffix[1:] or "png") not in FigureCanvasBase.filetypes:
                raise UserError(f"--{flag}: '{path.suffix[1:]}' is no picture format; png is one.")
    return args


def task_of_runs(args):
    """Fill in what the flags leave open: a run is measured on the task that it was trained on, and
    so is everything beside it -> {name: folder of its model}, {name: flags of a run}."""
    given, folders, runs = vars(args).copy(), {}, {}
    for name in args.models:
        folders[name] = name
        if not (Path(name) / "flags.json").is_file():
            continue
        flags = runs[name] = read_flags(Path(name) / "flags.json")
        wanted = flags | {"data": flags["eval_data"] or flags["data"]}
        for key, value in wanted.items():
            if key not in (*SETTING, "data") or given[key] is not None or value is None:
                continue
            if getattr(args, key) not in (None, value):
                raise UserError(f"'{name}' was trained with {key} {value}, a run before it with "
                                f"{getattr(args, key)}: say by --{key.replace('_', '-')} on which "
                                "to measure.")
            setattr(args, key, value)
        folders[name] = Path(name) / "model"
        if not folders[name].is_dir():
            raise UserError(f"'{name}' has no model yet: finish it by train.py --resume.")
    args.task = args.task or "countdown"
    return folders, runs


def run(argv=None):
    args = parse(argv)
    if args.curves:
        plot_curves(args.models, args.curves)
        print(f"written: {args.curves}")
        return
    device, dtype = start_processes(args.device)       # as many as torchrun started
    folders, runs = task_of_runs(args)
    task, problems = task_for_all(args, folders, runs)
    results = {temperature: {} for temperature in args.temperatures}
    for name, folder in folders.items():
        policy, tokenizer = policy_module.load(folder, device, dtype, args.stop)
        label = name if Path(name).name in results[args.temperatures[0]] else Path(name).name
        for temperature, records in results.items():
            records[label] = evaluate(policy, tokenizer, task, problems, args.n,
                                      args.max_new_tokens, temperature, args.seed, args.rows)
        del policy                                     # its memory is for the next one
    if rank() > 0:
        return
    summaries = {temperature: summary(records) for temperature, records in results.items()}
    one_alone = "=" in (args.show or "")               # a problem from the command line
    several = (i for i, problem in enumerate(problems)  # of Math simply the first
               if not task.several_answers or len(task.solutions(problem)) > 2)
    shown = range(1) if one_alone else list(itertools.islice(several, int(args.show or 0)))
    for temperature, records in results.items():
        print(f"{'one problem' if one_alone else f'{len(problems)} held-out problems'}, {args.n} "
              f"samples each, temperature {temperature:g}, seed {args.seed}")
        if not one_alone:
            print_table(summaries[temperature])
        for i in shown:
            print(answers_of(task, problems[i], {model: records[model][i] for model in records}))
    write_json(args.json, {"flags": vars(args), "summary": summaries, "records": results})
    print(f"written: {args.json}")
    if args.plot:
        at = f", T {args.temperatures[0]:g}" if len(args.temperatures) == 1 else ""
        plot(summaries, args.plot, f"{args.task}, {len(problems)} problems, {args.n} samples{at}")


def task_for_all(args, folders, runs):
    """The task and the problems on which all of these models are measured."""
    # Configs first: what is no model at all is refused there.
    configs = {name: policy_module.load_config(folder) for name, folder in folders.items()}
    tokenizers = {name: policy_module.load_tokenizer(folder) for name, folder in folders.items()}
    # The same whichever is named first: if one has a chat template, all are asked as it is.
    chats = [name for name in folders if tokenizers[name].chat_template]
    chosen = args.prompt
    fill_task_flags(args, tokenizers[(chats or list(folders))[0]])
    notes = []
    if chosen is None and 0 < len(chats) < len(folders):
        notes.append(f"all are asked in style {args.prompt}, as '{chats[0]}' has a chat template; "
                     "those without one would be asked in style bare: --prompt chooses.")
    if "=" in (args.show or ""):
        if args.task != "countdown":
            raise UserError("--show: a problem of one's own is a countdown problem.")
        numbers, target = args.show.split("=")
        problem = Problem(tuple(map(int, numbers.split(","))), int(target))
        return make_task(args), [problem]
    task = make_task(args, held_out=1.0 if args.task == "math" else 0.1)
    for name in folders:
        model = SimpleNamespace(config=configs[name])
        leave_out_too_long(task, tokenizers[name], model, args.max_new_tokens)
    if args.task == "math":
        leave_out_trained(task, runs)
    for note in notes + task.notes:
        say(note)
    problems = task.held_out_problems(args.problems)
    if not problems:
        raise UserError(f"'{args.data}' holds no problem to evaluate on.")
    return task, problems


def main(argv=None):
    """Run, and turn what a user can get wrong into one sentence and exit code 2."""
    try:
        any_character()
        run(argv)
    except KeyboardInterrupt:
        print("stopped; nothing was written.", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


# ----------------------------------------------------------------------- what both programs share

class Parser(argparse.ArgumentParser):
    """Bad flags are told in one sentence, as all bad input is; a dash may be an underscore."""

    def error(self, message):
        raise UserError(f"{message}.")

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([
            re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words],
            namespace)


def any_character():
    """A terminal or log file that lacks a character shows its number instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def whole(path, mode="w"):
    """A file to write, which is then at `path`: whole, even after a power cut, or not at all."""
    aside = Path(f"{path}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    with open(aside, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path, value):
    with whole(path) as file:
        json.dump(value, file, indent=1)


def read_flags(file):
    """The flags.json of a run or of a base; UserError where it is missing, damaged or without a
    task."""
    def reader():
        lacking = {"verifier": None, "data": None, "eval_data": None}   # a base has none
        flags = lacking | json.loads(file.read_text())
        return flags | {key: flags[key] for key in SETTING}
    return policy_module.readable(file, reader)


def leave_out_too_long(task, tokenizer, model, max_new_tokens):
    """Drop the problems of a file whose prompt leaves no room for an answer: one of them must not
    end a night's work."""
    if task.problems is None:                          # made up, not read: none is too long
        return
    room = model.config.max_position_embeddings - max_new_tokens

    def too_long(problems):
        bar.update(len(problems))
        prompts = [chat(tokenizer, task.system, task.prompt(x), task.style) for x in problems]
        # A token is a byte at least, apart from those that begin a text: few have to be counted.
        doubtful = [i for i, prompt in enumerate(prompts) if len(prompt.encode()) > room - 8]
        masks = encode(tokenizer, [prompts[i] for i in doubtful], "cpu")[1] if doubtful else ()
        long = {i for i, mask in zip(doubtful, masks) if mask.sum() > room}
        return [i in long for i in range(len(problems))]

    with tqdm(desc="prompts", leave=False, disable=rank() > 0 or None) as bar:
        task.problems.leave_out(too_long, f"prompts over {room} tokens", at_once=100)


def split(flags):
    """What a run with these flags trains on, and what it is measured on -> two tasks, or twice the
    one that holds out a tenth. A problem that stands in --eval-data, too, is not trained on."""
    if not flags.eval_data:
        return [make_task(flags)] * 2
    task = make_task(flags, held_out=0.0)
    test = make_task(argparse.Namespace(**vars(flags) | {"data": flags.eval_data}), held_out=1.0)
    leave_out_questions(task, test.problems.held_out, f"they stand in {flags.eval_data}, too")
    return task, test


def leave_out_questions(task, problems, why):
    questions = {x.question for x in problems}
    task.problems.leave_out(lambda some: [x.question in questions for x in some], why)


def leave_out_trained(task, runs):
    """Drop the problems that one of these runs, {name: flags}, was trained on."""
    for name, flags in runs.items():
        if flags["task"] == "math":
            try:
                trained = split(argparse.Namespace(**flags))[0].problems.train
                leave_out_questions(task, trained, f"{name} was trained on them")
            except rewards.UserError as error:         # its file is gone, say
                task.notes.append(f"what {name} was trained on is not known: {error}")


def fingerprint(path):
    """What tells a data file or a model folder from others: a hash of all bytes that a number may
    depend on (weights, configs, tokenizer, template). A name that is no path stands for itself."""
    path = Path(path)
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = [path] if not path.is_dir() else sorted(x for x in path.iterdir() if x.suffix in kinds)
    if not path.exists():
        return str(path)
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name} {file.stat().st_size} ".encode())
        with open(file, "rb") as opened:
            while piece := opened.read(1 << 22):
                total.update(piece)
    return total.hexdigest()


def explain(error):
    """One sentence for what a user can mend. Anything else is a bug: it keeps its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, (UserError, rewards.UserError, losses.UserError)):
        return text
    if (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "tried to allocate" in text or "out of memory" in text):
        return ("out of memory: lower --rows if this was sampling or evaluation, --micro-batch if "
                "it was an update.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({text}): make room; train.py --resume then goes on."
    if isinstance(error, OSError) and error.filename:  # a folder that cannot be written, say
        return text
    if world() > 1 and "imed out" in text:
        return "another process has not answered for a week, so this one ends."
    if world() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in text):
        return "another process has ended, so this one ends, too."
    raise error


# ------------------------------------------------------------------------------- several processes

def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def start_processes(device):
    """Join the other processes, if torchrun started this one -> (device, activation dtype)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if "LOCAL_RANK" in os.environ and device in (None, "cuda") and torch.cuda.is_available():
        if local >= torch.cuda.device_count():         # NCCL refuses two on one
            raise UserError(f"more processes than the {torch.cuda.device_count()} GPUs here: "
                            "torchrun may start one per GPU, or all with --device cpu.")
        torch.cuda.set_device(local)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device} is not available on this machine.")
    if "RANK" in os.environ:
        # One process may wait for hours while another saves or evaluates; torch's own limit is
        # half an hour. One that has died is noticed at once, by its broken connection.
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                                             timeout=datetime.timedelta(days=7))
    return device, torch.bfloat16 if device.startswith("cuda") else torch.float32


def in_first(action):
    """action() in the first process alone -> its result, in all. If it raises, none goes on."""
    # The others do not even look at the run's folder: it may lie on the first's machine alone.
    if world() == 1:
        return action()
    found, error = [None], None
    if rank() == 0:
        try:
            found = [(action(),)]
        except Exception as raised:
            error = raised
    torch.distributed.broadcast_object_list(found)
    if found == [None]:
        # Its own error in the first; the others end with it instead of waiting for it.
        raise error or UserError("the first process ended the run and says why.")
    return found[0][0]


def problems_at_once(problems, n, rows):
    """How many problems are asked in one batch: no more answers than `rows`, and an eighth of the
    problems, so that eight processes have work, and the batches are the same for any number."""
    return max(1, min(rows // n, -(-problems // 8)))


def share_out(batches, measure, pass_over):
    """Under torchrun the batches are dealt out to the processes -> the records of all, in order.

    pass_over(batch) makes the draws of a batch that another process measures, so that an answer
    does not depend on who draws it."""
    found = {}                                         # number of a batch -> its records
    for number, batch in enumerate(tqdm(batches, desc="evaluate", leave=False,
                                        disable=rank() > 0 or not sys.stderr.isatty())):
        if number % world() == rank():
            found[number] = measure(batch)
        else:
            pass_over(batch)
    if world() > 1:
        parts = [None] * world()
        torch.distributed.all_gather_object(parts, found)
        found = {number: some for part in parts for number, some in part.items()}
    return [one for number in sorted(found) for one in found[number]]


def leave(code):
    """End the program. The threads of process groups now and then abort a Python that shuts down,
    whereupon torchrun ends the other processes, at work or not: so there is no shutting down."""
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def own_prompts(prompts):
    """Which of a batch's prompts this process answers: a slice; all of them if it is alone."""
    return slice(rank() * prompts // world(), (rank() + 1) * prompts // world())


def say(text):
    if rank() == 0:
        tqdm.write(text)


def whole_batch(x):
    """Rows of every process, in process order, padded with 0 to the widest; x itself if alone."""
    if world() == 1:
        return x
    if x.dim() == 2:
        widest = torch.tensor(x.shape[1], device=x.device)
        torch.distributed.all_reduce(widest, torch.distributed.ReduceOp.MAX)
        # Padding is masked, so its value does not matter.
        x = F.pad(x, (0, int(widest) - x.shape[1]))
    # Each process drew answers of its own lengths, and all_gather wants one shape.
    parts = [torch.empty_like(x) for _ in range(world())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def own_rows(x, rollout):
    """The rows of `rollout` in a (B, T) tensor of the whole batch; x itself if alone."""
    rows, width = rollout.mask.shape
    # Sharded gradients are averaged over the processes, ours have to be summed.
    return x[rank() * rows:(rank() + 1) * rows, :width] * world()


@torch.no_grad()
def gather_weights(policy):
    """Sharded weights come together in a process's first forward, for which it needs all others.
    Here all go through it, so that those with nothing to measure are not waited for later."""
    if world() > 1:
        policy(torch.zeros(1, 1, dtype=torch.int64, device=policy.device))


def clip_gradient(policy, most):
    """Scale the gradient to a norm of at most `most` -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), most)
    return (norm if world() == 1 else norm.full_tensor()).item()


def shard(policy):
    """PyTorch's own FSDP2: parameters, gradients and optimiser state split over the processes."""
    if world() == 1:
        return policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    # Left to itself, it takes the GPUs of a machine that has some, with --device cpu, too.
    mesh = init_device_mesh(policy.device.type, (world(),))
    # One block at a time, so that one block's gradients travel while the next is computed.
    for block in policy.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    # Weights stay gathered between forwards, so that sampling needs no traffic.
    fully_shard(policy, mesh=mesh, reshard_after_forward=False)
    return policy


if __name__ == "__main__":
    leave(main())
