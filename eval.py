"""How it is measured: Pass@k with intervals, and how many different correct answers a model still has.

    python eval.py runs/base runs/diffsmooth --n 128

draws n answers to each held-out problem from every model named (a run of train.py, a model folder, or a hub name), all on
the same problems, prints one table, and writes it beside the per-problem counts as JSON.

What the columns mean, for a problem with n samples of which c are correct:
- Pass@k   the chance that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k), without bias (arXiv 2107.03374,
           and the paper's choice), averaged over problems last. Pass@1 is the paper's correctness C(pi).
- distinct the number of different correct answers among the n, in canonical form (up to the order of + and *), and "as
           text" by their characters. Pass@k cannot see this: it depends on the problem's success probability only.
- sigma    Gini-Simpson diversity of the correct answers, 1 - sum q^2, the chance that two correct samples differ; without
           bias from counts as 1 - sum n_j (n_j - 1) / (c (c - 1)); mean over the problems with c >= 2.
- nats     mean of -log pi(y|x): an estimate of the entropy of whole answers.
Intervals are 95 % bootstrap intervals over PROBLEMS, paired across models; resampling answers would show sampling noise only.
"""
import argparse
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
from sample import chat, sample


def pass_at_k(n, c, k):
    """Unbiased estimate of Pass@k from c correct among n samples: 1 - C(n-c, k) / C(n, k).

    pass_at_k(10, 3, 5) is 0.916667. ValueError where n < k: there is no unbiased estimate then.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct among {n} samples is impossible.")
    if not 1 <= k <= n:
        raise ValueError(f"Pass@{k} needs at least {k} samples a problem, but there are {n}: raise --n or lower k.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def ks_for(n):
    """1, 2, 4, ... up to n."""
    return [2 ** i for i in range(n.bit_length()) if 2 ** i <= n]


def evaluate(policy, tokenizer, task, problems, n, max_new_tokens, temperature=1.0, generator=None, rows=1024):
    """n answers to each problem -> one dict a problem (counts and means; see `summary`). rows: answers in flight at once."""
    records, each = [], max(1, min(n, rows))
    per_batch = max(1, rows // n)
    for start in tqdm(range(0, len(problems), per_batch), desc="evaluate", leave=False, disable=not sys.stderr.isatty()):
        batch = problems[start:start + per_batch]
        prompts = [chat(tokenizer, task.system, task.prompt(problem), task.style) for problem in batch]
        answers = [[] for _ in batch]                  # per problem: (text, tokens, nats, finished)
        for done in range(0, n, each):                 # a group larger than `rows` is drawn in several goes
            G = min(each, n - done)
            rollout = sample(policy, tokenizer, prompts, G, max_new_tokens, temperature, generator)
            facts = zip(rollout.texts, rollout.mask.sum(1).tolist(), (-rollout.logp.sum(1)).tolist(),
                        rollout.finished.tolist())
            for row, fact in enumerate(facts):
                answers[row // G].append(fact)
        records += [record(task, problem, drawn) for problem, drawn in zip(batch, answers)]
    return records


def record(task, problem, drawn):
    """What the table needs to know of one problem; drawn: list of (text, tokens, nats, finished)."""
    texts, tokens, nats, finished = zip(*drawn)
    verdict = {text: (task.reward(problem, text) == 1.0, task.canonical(text)) for text in set(texts)}
    correct = [text for text in texts if verdict[text][0]]
    forms = Counter(verdict[text][1] for text in correct)
    c, n = len(correct), len(texts)
    same = sum(m * (m - 1) for m in forms.values())    # ordered pairs of correct samples that say the same
    return {"problem": list(problem), "n": n, "c": c, "distinct": len(forms), "as_text": len(set(correct)),
            "sigma": 1 - same / (c * (c - 1)) if c >= 2 else None,
            "parsed": sum(verdict[text][1] is not None for text in texts) / n,
            "finished": sum(finished) / n, "tokens": sum(tokens) / n, "nats": sum(nats) / n}


def columns(records):
    """{column: (problems,) array}: what is averaged over problems. NaN marks a problem without a value."""
    n = records[0]["n"]
    table = {f"Pass@{k}": [100 * pass_at_k(n, r["c"], k) for r in records] for k in ks_for(n)}
    for name in ("distinct", "as_text", "sigma", "parsed", "finished", "tokens", "nats"):
        table[name] = [math.nan if r[name] is None else r[name] for r in records]
    return {name: np.array(values, dtype=float) for name, values in table.items()}


def summary(results, resamples=2000, seed=0):
    """{model: records} -> {model: {column: {"mean", "low", "high"} and, against the first model, "gain": the same}}.

    The same resampled problems serve every model, so the interval of a gain is a paired one.
    """
    first, size = next(iter(results)), len(next(iter(results.values())))
    picks = np.random.default_rng(seed).integers(0, size, (resamples, size))    # (resamples, problems)
    values = {model: columns(records) for model, records in results.items()}
    return {model: {name: interval(x, picks) | ({} if model == first else {"gain": interval(x - values[first][name], picks)})
                    for name, x in table.items()} for model, table in values.items()}


def interval(x, picks):
    """Mean of (problems,) values and its bootstrap interval; NaN marks a problem without a value, None a mean without any."""
    exists = ~np.isnan(x)
    size = exists[picks].sum(1)                                                 # (resamples,)
    if not size.any():
        return {"mean": None, "low": None, "high": None}
    means = np.where(exists, x, 0)[picks].sum(1)[size > 0] / size[size > 0]
    return {"mean": float(x[exists].mean()), "low": float(np.quantile(means, 0.025)), "high": float(np.quantile(means, 0.975))}


def table(summaries):
    """The summaries as text: a line a measure, a column a model with its interval, then the gains over the first model."""
    def cell(entry, name, sign=""):
        if entry["mean"] is None:                      # sigma of a model that is never right twice
            return "-".rjust(7)
        digits = 2 if name in ("sigma", "parsed", "finished") else 1
        mean, low, high = (f"{entry[part]:{sign}.{digits}f}" for part in ("mean", "low", "high"))
        return f"{mean:>7} [{low}, {high}]"
    first, *others = summaries
    head = ["", *summaries, *(f"{model} - {first}" for model in others)]
    lines = [[name, *(cell(row[name], name) for row in summaries.values()),
              *(cell(summaries[model][name]["gain"], name, "+") for model in others)] for name in summaries[first]]
    widths = [max(map(len, column)) + 3 for column in zip(head, *lines)]
    return "\n".join("".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in [head, *lines])


def plot(summaries, file):
    """Pass@k against k, one curve a model with its interval as a band."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not among the requirements: pip install matplotlib.")
    for model, row in summaries.items():
        ks = [int(name[5:]) for name in row if name.startswith("Pass@")]
        mean, low, high = ([row[f"Pass@{k}"][part] for k in ks] for part in ("mean", "low", "high"))
        plt.plot(ks, mean, marker="o", label=model)
        plt.fill_between(ks, low, high, alpha=0.2)
    plt.xscale("log", base=2)
    plt.xlabel("k")
    plt.ylabel("Pass@k (%)")
    plt.legend()
    plt.savefig(file, dpi=150, bbox_inches="tight")


# ------------------------------------------------------------------------------------- what train.py and eval.py share


class Parser(argparse.ArgumentParser):
    """Bad flags are told in one sentence, like all bad input."""

    def error(self, message):
        raise ValueError(f"{message}.")


def pick_device(name):
    """cuda, else mps, else cpu, unless `name` says which -> (device, dtype of the activations)."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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
    """The flags.json of a run or of runs/base; ValueError where it is missing, damaged or without a task."""
    def reader():
        flags = {"verifier": None} | json.loads(file.read_text())               # a run from before --verifier has none
        return flags | {key: flags[key] for key in SETTING}
    return policy_module.read(file, reader)


def run(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("models", nargs="+", help="a run folder of train.py, a model folder, or a hub name; gains are over the first")
    add_task_flags(parser)
    parser.set_defaults(task=None)                     # None: that of the runs named, else countdown
    parser.add_argument("--n", type=int, default=128, help="answers a problem")
    parser.add_argument("--problems", type=int, default=512, help="held-out problems (math: at most what --data has)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the draws; the problems are always the same")
    parser.add_argument("--rows", type=int, default=1024, help="answers in flight at once: lower it when memory runs out")
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    parser.add_argument("--json", help="where to write the numbers; default: eval.json in the last run named, else ./eval.json")
    parser.add_argument("--plot", help="draw the Pass@k curves into this file (needs matplotlib)")
    args = parser.parse_args(argv)
    if min(args.n, args.problems, args.rows) < 1 or not 0 < args.temperature < math.inf:
        raise ValueError("--n, --problems and --rows must be at least 1, and --temperature above 0.")
    device, dtype = pick_device(args.device)
    # A run is measured on the task that it was trained on, and so is everything beside it, unless a flag says otherwise.
    runs = [name for name in args.models if (Path(name) / "flags.json").is_file()]
    given = vars(args).copy()
    for name in runs:
        flags = read_flags(Path(name) / "flags.json")
        for key in (key for key in SETTING if given[key] is None):
            if getattr(args, key) not in (None, flags[key]):
                raise ValueError(f"'{name}' was trained with {key} {flags[key]}, a run before it with {getattr(args, key)}: "
                                 f"say by --{key.replace('_', '-')} on which to measure.")
            setattr(args, key, flags[key])
        if not (Path(name) / "model").is_dir():
            raise ValueError(f"'{name}' has no finished model yet: go on with it by train.py --resume.")
    args.task = args.task or "countdown"
    where = Path(args.json or Path(runs[-1] if runs else "") / "eval.json")
    for file in (where, Path(args.plot or "plot.png")):                         # told now, not after an hour's evaluation
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(f"'{file}' cannot be written: it must be a file in a folder that exists.")
    results = {}
    for name in args.models:
        policy, tokenizer = policy_module.load(Path(name) / "model" if name in runs else name, device, dtype)
        fill_task_flags(args, tokenizer)
        task = make_task(args, held_out=1.0 if args.task == "math" else 0.1)
        if not results and task.notes:
            print(*task.notes, sep="\n")
        label = name.rstrip("/").split("/")[-1]
        generator = torch.Generator(device).manual_seed(args.seed)
        results[label if label not in results else name] = evaluate(
            policy, tokenizer, task, task.held_out_problems(args.problems), args.n, args.max_new_tokens, args.temperature,
            generator, args.rows)
    summaries = summary(results)
    size = len(next(iter(results.values())))
    print(f"{size} held-out problems, {args.n} samples each, temperature {args.temperature}, seed {args.seed}")
    print(table(summaries))
    write_json(where, {"flags": vars(args), "summary": summaries, "records": results})
    print(f"written: {where}")
    if args.plot:
        plot(summaries, args.plot)


def main(argv=None):
    """Run, and turn what a user can get wrong into one sentence and exit code 2."""
    try:
        run(argv)
    except KeyboardInterrupt:
        print("stopped; nothing was written.", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


def explain(error):
    """One sentence for what a user can mend. Anything else is a bug of ours and keeps its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "tried to allocate" in text or "out of memory" in text:
        return "out of memory: lower --rows if this was sampling or evaluation, --micro-batch if it was an update."
    if "No space left on device" in text:
        return f"the disk is full ({text}); what was saved before is whole: make room, then go on with train.py --resume."
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return text
    raise error


if __name__ == "__main__":
    sys.exit(main())
