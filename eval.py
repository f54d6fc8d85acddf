"""How it is measured: Pass@k with intervals, and how many different right answers a model has.

    python eval.py runs/base runs/grpo runs/diffsmooth --n 128
    python eval.py runs/grpo runs/diffsmooth --temperatures 0.4 0.7 1 1.3 --plot frontier.png

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
Intervals are 95 % bootstrap intervals over problems, and those of a difference are paired: the same
resampled problems serve all models.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

import policy as policy_module
from rewards import SETTING, add_task_flags, fill_task_flags, make_task
from sample import chat, encode, sample


def pass_at_k(n, c, k):
    """Unbiased estimate of Pass@k from c correct among n samples: 1 - C(n-c, k) / C(n, k).

    pass_at_k(10, 3, 5) is 0.916667. ValueError where n < k: there is no unbiased estimate then;
    and where k < 1 or c is not one of 0..n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct among {n} samples is impossible.")
    if not 1 <= k <= n:
        raise ValueError(f"Pass@{k} needs at least {k} samples a problem, but there are {n}: raise "
                         "--n or lower k.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(policy, tokenizer, task, problems, n, max_new_tokens, temperature=1.0, generator=None,
             rows=1024):
    """n answers to each problem -> one dict a problem, see `record`. rows: answers in flight.

    Under torchrun the batches of problems are dealt out to the processes, and each gets the records
    of all: those of one process, bit for bit."""
    records = {}                                       # number of a batch -> its records
    problems_at_once, answers_at_once = max(1, rows // n), max(1, min(n, rows))
    for start in tqdm(range(0, len(problems), problems_at_once), desc="evaluate", leave=False,
                      disable=rank() > 0 or not sys.stderr.isatty()):
        batch, number = problems[start:start + problems_at_once], start // problems_at_once
        if number % world() != rank():                 # another's: only the generator goes past it
            for drawn in range(0, n, answers_at_once):
                torch.rand(len(batch) * min(answers_at_once, n - drawn), max_new_tokens,
                           generator=generator, device=policy.device)
            continue
        prompts = [chat(tokenizer, task.system, task.prompt(x), task.style) for x in batch]
        answers = [[] for _ in batch]                  # a problem: (text, tokens, nats, finished)
        for drawn in range(0, n, answers_at_once):     # a group larger than `rows` in several goes
            G = min(answers_at_once, n - drawn)
            rollout = sample(policy, tokenizer, prompts, G, max_new_tokens, temperature, generator)
            facts = zip(rollout.texts, rollout.mask.sum(1).tolist(),
                        (-rollout.logp.sum(1)).tolist(), rollout.finished.tolist())
            for row, fact in enumerate(facts):
                answers[row // G].append(fact)
        records[number] = [record(task, problem, given) for problem, given in zip(batch, answers)]
    parts = [records]
    if world() > 1:
        parts = [None] * world()
        torch.distributed.all_gather_object(parts, records)
    records = {number: some for part in parts for number, some in part.items()}
    return [one for number in sorted(records) for one in records[number]]


def record(task, problem, answers):
    """What the table needs of one problem; answers: list of (text, tokens, nats, finished)."""
    texts, tokens, nats, finished = zip(*answers)
    judged = {text: (task.reward(problem, text) == 1, task.canonical(text)) for text in set(texts)}
    correct = [text for text in texts if judged[text][0]]
    forms = Counter(judged[text][1] for text in correct)
    c, n = len(correct), len(texts)
    same = sum(m * (m - 1) for m in forms.values())    # ordered pairs of correct samples that agree
    return {"problem": list(problem), "n": n, "c": c, "distinct": len(forms),
            "as_text": len(set(correct)), "sigma": 1 - same / (c * (c - 1)) if c >= 2 else None,
            "parsed": sum(judged[text][1] is not None for text in texts) / n,
            "finished": sum(finished) / n, "tokens": sum(tokens) / n, "nats": sum(nats) / n}


def columns(records):
    """{column: (problems,) array}: what is averaged over problems. NaN where one has no value."""
    n = records[0]["n"]
    ks = [2 ** i for i in range(n.bit_length())]       # 1, 2, 4, ... up to n
    values = {f"Pass@{k}": [100 * pass_at_k(n, r["c"], k) for r in records] for k in ks}
    for name in ("distinct", "as_text", "sigma", "parsed", "finished", "tokens", "nats"):
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


def table(summaries):
    """The summaries as text: a line a measure, a column a model. The first has its own interval,
    the others have their gain over it with the interval of the gain."""
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


# ----------------------------------------------- a first reading ends here; below: pictures, flags

def chart(summaries, height=12):
    """The Pass@k curves in characters, a letter a model, for those who sit at a terminal."""
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


def plot(summaries, file, title):
    """{temperature: summaries} as a picture. One temperature: Pass@k against k, with intervals as
    bands. Several: the frontier, Pass@1 against Pass@(largest k up to 64), a curve a model."""
    import matplotlib
    matplotlib.use("Agg")                              # no screen is needed
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4.5))
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
                axes.annotate(f"T {temperature}", point, textcoords="offset points", xytext=(4, 4))
        axes.set(xlabel="Pass@1 (%)", ylabel=f"Pass@{k} (%)")
    axes.set_title(title)
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], usage="python eval.py MODEL ... [flags]")
    parser.add_argument("models", nargs="+", help="a run folder of train.py, a model folder, or a "
                        "hub name; gains are over the first")
    flag = parser.add_argument_group("what is measured").add_argument
    flag("--n", "--samples", type=int, default=128, help="answers a problem; torchrun takes an --n "
         "for its own, and passes --samples on")
    flag("--problems", type=int, default=512, help="held-out problems (math: at most what --data "
         "has)")
    flag("--temperature", "--temperatures", type=float, nargs="+", default=[0.7],
         dest="temperatures", help="several: a table each, and --plot the frontier")
    flag("--seed", type=int, default=0, help="of the draws; the problems are always the same")
    flag("--stop", nargs="+", default=[], help="further tokens that end an answer")
    add_task_flags(parser)
    parser.set_defaults(task=None)                     # that of the runs named, else countdown
    flag = parser.add_argument_group("the machine").add_argument
    flag("--rows", type=int, default=1024, help="answers in flight at once: lower it when memory "
         "runs out")
    flag("--device", help="default: cuda, else cpu")
    flag = parser.add_argument_group("what is written").add_argument
    flag("--json", default="eval.json", help="the numbers")
    flag("--plot", help="a picture of the Pass@k curves, or of the frontier where there are "
         "several temperatures (needs matplotlib)")
    args = parser.parse_args(argv)
    if min(args.n, args.problems, args.rows) < 1:
        raise ValueError("--n, --problems and --rows must be at least 1.")
    if not all(0 < temperature < math.inf for temperature in args.temperatures):
        raise ValueError("--temperature must be above 0.")
    # What can be told now is not told after an hour.
    for file in (Path(args.json), Path(args.plot or "plot.png")):
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(f"'{file}' cannot be written: it must be a file in a folder that "
                             "exists.")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not among the requirements: "
                         "pip install matplotlib.")
    if args.plot:
        from matplotlib.backend_bases import FigureCanvasBase
        ending = Path(args.plot).suffix[1:] or "png"
        if ending not in FigureCanvasBase.filetypes:
            raise ValueError(f"--plot: '{ending}' is no picture format; png, pdf and svg are some.")
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
                raise ValueError(f"'{name}' was trained with {key} {value}, a run before it "
                                 f"with {getattr(args, key)}: say by --{key.replace('_', '-')} on "
                                 "which to measure.")
            setattr(args, key, value)
        folders[name] = Path(name) / "model"
        if not folders[name].is_dir():
            raise ValueError(f"'{name}' has no finished model yet: go on with it by "
                             "train.py --resume.")
    args.task = args.task or "countdown"
    return folders, runs


def run(argv=None):
    args = parse(argv)
    device, dtype = start_processes(args.device)       # as many as torchrun started
    results = {temperature: {} for temperature in args.temperatures}
    measured = results[args.temperatures[0]]           # by their labels, the models so far
    folders, runs = task_of_runs(args)
    for name, folder in folders.items():
        policy, tokenizer = policy_module.load(folder, device, dtype, args.stop)
        fill_task_flags(args, tokenizer)
        task = make_task(args, held_out=1.0 if args.task == "math" else 0.1)
        notes = leave_out_too_long(task, tokenizer, policy, args.max_new_tokens)
        notes += leave_out_trained(task, runs) if args.task == "math" else []
        if notes and not measured and rank() == 0:
            print(*notes, sep="\n")
        problems = task.held_out_problems(args.problems)
        if not problems:
            raise ValueError(f"'{args.data}' holds no problem to evaluate on.")
        if measured and problems != asked:
            raise ValueError(f"'{name}' has another context than the model before it, so other "
                             "problems fit into it: measure it alone.")
        asked = problems
        label = name if Path(name).name in measured else Path(name).name
        for temperature, records in results.items():
            generator = torch.Generator(device).manual_seed(args.seed)
            records[label] = evaluate(policy, tokenizer, task, problems, args.n,
                                      args.max_new_tokens, temperature, generator, args.rows)
    if rank() > 0:
        return
    summaries = {temperature: summary(records) for temperature, records in results.items()}
    for temperature, some in summaries.items():
        print(f"{len(problems)} held-out problems, {args.n} samples each, temperature "
              f"{temperature:g}, seed {args.seed}")
        print(table(some))
    if sys.stdout.isatty():
        print(chart(summaries[args.temperatures[0]]))
    write_json(args.json, {"flags": vars(args), "summary": summaries, "records": results})
    print(f"written: {args.json}")
    if args.plot:
        at = f", T {args.temperatures[0]:g}" if len(args.temperatures) == 1 else ""
        plot(summaries, args.plot, f"{args.task}, {len(problems)} problems, {args.n} samples{at}")


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

class Help(argparse.HelpFormatter):
    """Behind each flag's help stands its default, where it has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)

    def _get_help_string(self, action):
        without = action.default is None or action.default is False or action.nargs == 0
        return action.help if without else f"{action.help} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "NAME")


class Parser(argparse.ArgumentParser):
    """Bad flags are told in one sentence, as all bad input is; a dash may be an underscore."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(f"{message}.")

    def parse_known_args(self, args=None, namespace=None):
        known = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        spelled = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            spelled.append(known.get(flag.replace("_", "-"), flag) + equals + value
                           if flag.startswith("--") else word)
        return super().parse_known_args(spelled, namespace)


def any_character():
    """A terminal or log file that lacks a character shows its number instead, and ends no run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def start_processes(device):
    """Join the other processes, if torchrun started this one -> (device, activation dtype)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if "LOCAL_RANK" in os.environ and device in (None, "cuda") and torch.cuda.is_available():
        if local >= torch.cuda.device_count():         # NCCL refuses two on one
            raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs here: "
                             "torchrun may start one a GPU, or all with --device cpu.")
        torch.cuda.set_device(local)
    device, dtype = pick_device(device)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return device, dtype


def leave(code):
    """End the program. The threads of process groups now and then abort a Python that shuts down,
    whereupon torchrun ends the other processes, at work or not: so there is no shutting down."""
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def pick_device(name):
    """cuda, else cpu, unless `name` says which -> (device, dtype of the activations)."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name} is not available on this machine.")
    return name, torch.bfloat16 if name.startswith("cuda") else torch.float32


def write_json(path, value):
    """Write aside, then rename: the file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_flags(file):
    """The flags.json of a run or of runs/base; ValueError where it is missing, damaged or without
    a task."""
    def reader():
        lacking = {"verifier": None, "data": None, "eval_data": None}   # older runs, and the base
        flags = lacking | json.loads(file.read_text())
        return flags | {key: flags[key] for key in SETTING}
    return policy_module.read(file, reader)


def leave_out_too_long(task, tokenizer, policy, max_new_tokens):
    """Drop the problems of a file whose prompt leaves no room for an answer: one of them must not
    end a night's work -> what there is to say about the file, a list of sentences."""
    if task.problems is None:                          # made up, not read: none is too long
        return []
    room = policy.config.max_position_embeddings - max_new_tokens

    def tokens_of(problem):
        prompt = chat(tokenizer, task.system, task.prompt(problem), task.style)
        return encode(tokenizer, [prompt], "cpu")[0].shape[1]

    left_out = task.problems.leave_out(tokens_of, room)
    return task.notes + [f"{task.problems.path}: {left_out} problems are left out: prompts over "
                         f"{room} tokens."] * (left_out > 0)


def split(flags):
    """What a run with these flags trains on, and what it is measured on -> two tasks, or twice the
    one that holds out a tenth. A problem that stands in --eval-data, too, is not trained on."""
    if not flags.eval_data:
        return [make_task(flags)] * 2
    task = make_task(flags, held_out=0.0)
    exam = make_task(argparse.Namespace(**vars(flags) | {"data": flags.eval_data}), held_out=1.0)
    asked, before = {x.question for x in exam.problems.held_out}, len(task.problems.train)
    task.problems.train = [x for x in task.problems.train if x.question not in asked]
    if left_out := before - len(task.problems.train):
        task.notes.append(f"{flags.data}: {left_out} problems are not trained on, as they are "
                          f"held-out problems of {flags.eval_data}, too.")
    return task, exam


def leave_out_trained(task, runs):
    """Drop the problems that one of these runs, {name: flags}, was trained on -> what there is to
    say of it, a list of sentences."""
    notes = []
    for name, flags in runs.items():
        if flags["task"] != "math":
            continue
        try:
            trained = {x.question for x in split(argparse.Namespace(**flags))[0].problems.train}
        except ValueError as error:                    # its file is gone, say
            notes.append(f"what {name} was trained on is not known ({error}): it may be asked.")
            continue
        before = len(task.problems.held_out)
        task.problems.held_out = [x for x in task.problems.held_out if x.question not in trained]
        if left_out := before - len(task.problems.held_out):
            notes.append(f"{task.problems.path}: {left_out} problems are left out, as {name} was "
                         "trained on them.")
    return notes


def fingerprint(path):
    """What tells a data file, or the weights of a model folder, from others: a hash of the file; of
    names, sizes and the first megabyte of each. A name that is no path here stands for itself."""
    path = Path(path)
    total, size = hashlib.sha256(), 1 << 20 if path.is_dir() else -1
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        if not file.is_file():
            return str(path)
        with open(file, "rb") as opened:
            total.update(f"{file.name} {file.stat().st_size} ".encode() + opened.read(size))
    return total.hexdigest()


def explain(error):
    """One sentence for what a user can mend. Anything else is a bug: it keeps its traceback."""
    text = " ".join(str(error).split())
    if (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "tried to allocate" in text or "out of memory" in text):
        return ("out of memory: lower --rows if this was sampling or evaluation, --micro-batch if "
                "it was an update.")
    if "No space left on device" in text:
        return (f"the disk is full ({text}); what was saved before is whole: make room, then go on "
                "with train.py --resume.")
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return text
    if world() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in text):
        return "another process has ended, so this one ends, too."
    raise error


if __name__ == "__main__":
    leave(main())
