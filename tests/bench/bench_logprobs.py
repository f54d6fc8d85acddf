"""token_logprobs beside what others use: time, errors, memory.

    python tests/bench/bench_logprobs.py            # some minutes on two CPU cores; --quick: one
    python tests/bench/bench_logprobs.py --against FOLDER   # another checkout of this repo as well
    pip install trl liger-kernel                    # the peers; a missing one is skipped and named
                                                    # (without a GPU: pip install --no-deps
                                                    # liger-kernel triton)

One process; all methods get the same hidden states, weight, targets and upstream gradient (one
number per group of rows, because Liger's loss cannot take others), and run in shuffled order, one
round after the other. Logits have a standard deviation of 4. Errors are the largest ones against
float64, relative to the largest true value. All give logp, d hidden and d weight; ours gives the
entropy as well. The floor is the three matrix products alone (6NDV), written into arrays that
exist. Peak memory is that of a child process per method, minus what it had before the call.
"""
import argparse
import importlib
import importlib.metadata
import json
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import policy

GROUPS, TEMPERATURE = 8, 0.9
FILES = ("losses", "rewards", "policy", "sample", "eval", "train")


def modules_of(folder, *names):
    """Modules of another checkout of this repo, beside ours; `--against` measures them."""
    ours = {name: sys.modules.pop(name) for name in FILES if name in sys.modules}
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        del sys.path[0]
        for name in FILES:
            sys.modules.pop(name, None)
        sys.modules.update(ours)


def naive(hidden, weight, targets):
    all_logp = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    return all_logp.gather(1, targets[:, None])[:, 0]


def naive_both(hidden, weight, targets):
    all_logp = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    return all_logp.gather(1, targets[:, None])[:, 0], -(all_logp.exp() * all_logp).sum(-1)


def ours(hidden, weight, targets):
    return policy.token_logprobs(hidden, weight, targets, TEMPERATURE)[0]


def ours_recomputed(hidden, weight, targets):
    """Ours if there is no room to keep the logits."""
    before = policy.MEMORY["cpu"]
    policy.MEMORY["cpu"] = before._replace(kept=0)
    try:
        return ours(hidden, weight, targets)
    finally:
        policy.MEMORY["cpu"] = before


def torch_chunked(hidden, weight, targets):
    return -F.linear_cross_entropy(hidden / TEMPERATURE, weight, targets, reduction="none",
                                   options=torch.nn.LinearCrossEntropyOptions())


def trl_chunked(hidden, weight, targets):
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction
    return _ChunkedLogProbFunction.apply(hidden, weight, None, targets, TEMPERATURE,
                                         _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[0]


def liger_loss(hidden, weight, targets, advantages):
    """Liger's GRPO loss, whose gradient in the log-probabilities is -advantage / N."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    loss = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="dapo", temperature=TEMPERATURE,
                                    compiled=False, use_ref_model=False)
    hidden = hidden.view(len(advantages), -1, hidden.shape[1])
    targets = targets.view(len(advantages), -1)
    return loss(hidden, weight, targets, torch.ones(targets.shape), advantages)[0]


def inputs(N, D, V):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D), torch.randn(V, D) * (4 / D ** 0.5)
    groups = GROUPS if N % GROUPS == 0 else 1
    advantages = torch.randn(groups)
    return (hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,)), advantages,
            (-advantages / N).repeat_interleave(N // groups))


def methods(hidden, weight, targets, advantages, g, quick, against=None):
    """{name: function that leaves gradients in hidden.grad and weight.grad, and returns logp or
    None}; against: another checkout's policy module."""
    def backward(f):
        def run():
            hidden.grad = weight.grad = None
            logp = f(hidden, weight, targets)
            logp.backward(g)
            return logp
        return run

    def liger():
        hidden.grad = weight.grad = None
        liger_loss(hidden, weight, targets, advantages).backward()

    found = {"naive": backward(naive), "ours": backward(ours),
             "ours, recomputed": backward(ours_recomputed), "torch LCE": backward(torch_chunked),
             "TRL": backward(trl_chunked), "Liger GRPO": liger}
    if against:
        found["against"] = backward(lambda *given: against.token_logprobs(*given, TEMPERATURE)[0])
    if not quick:
        found["compiled naive"] = backward(torch.compile(naive))
    return found


def quartiles(times):
    return statistics.quantiles(times, n=4) if len(times) > 1 else times * 3


def clock():
    """Seconds; with one thread of processor time, which other programs do not disturb."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleave(runs, rounds):
    """{name: seconds of each round}: every method once per round, in shuffled order."""
    times = {name: [] for name in runs}
    for name in runs:
        runs[name]()                                   # warm-up
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


def peak(name, shape, folder):
    """MB that one call adds to the peak of a fresh process; None also where there is no /proc."""
    command = [sys.executable, __file__, "--child", name, *map(str, shape)]
    done = subprocess.run(command + (["--against", folder] if folder else []), capture_output=True,
                          text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def peak_kb():
    """Linux's VmHWM; ru_maxrss would begin with the peak of the process that started this one."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def child(name, N, D, V, against):
    hidden, weight, targets, advantages, g = inputs(N, D, V)
    small = [hidden[:GROUPS].detach().requires_grad_(), weight[:64].detach().requires_grad_(),
             targets[:GROUPS] % 64]
    quick = name != "compiled naive"
    methods(*small, advantages, g[:GROUPS], quick, against)[name]()             # imports, threads
    before = peak_kb()
    methods(hidden, weight, targets, advantages, g, quick, against)[name]()
    print((peak_kb() - before) // 1024)


def bench(N, D, V, rounds, quick, folder, against):
    hidden, weight, targets, advantages, g = inputs(N, D, V)
    exact = None
    if N * V <= 2 ** 26:
        exact_in = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        exact_logp = naive(*exact_in, targets)
        exact = [exact_logp.detach(), *torch.autograd.grad(exact_logp, exact_in, g.double())]
    logits, dh, dw = torch.empty(N, V), torch.empty(N, D), torch.empty(V, D)

    @torch.no_grad()
    def floor():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=dh)
        torch.mm(logits.T, hidden, out=dw)

    runs, skipped, errors = {"floor 6NDV": floor}, {}, {}
    found = methods(hidden, weight, targets, advantages, g, quick, against)
    for name, run in found.items():
        try:
            logp = run()
        except Exception as error:                     # a peer is missing, or does not run
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        if exact:
            results = [logp, hidden.grad, weight.grad]
            errors[name] = [None if result is None else
                            ((result - true).abs().max() / true.abs().max()).item()
                            for result, true in zip(results, exact)]
        runs[name] = run
    with torch.no_grad():
        runs |= {"no grad: floor 2NDV": lambda: floor_forward(hidden, weight, logits),
                 "no grad: naive": torch.no_grad()(lambda: naive_both(hidden, weight, targets)),
                 "no grad: ours": torch.no_grad()(lambda: ours(hidden, weight, targets))}
        if against:
            runs["no grad: against"] = torch.no_grad()(
                lambda: against.token_logprobs(hidden, weight, targets, TEMPERATURE)[0])
    times = {name: quartiles(ts) for name, ts in interleave(runs, rounds).items()}
    memory = {name: peak(name, (N, D, V), folder) for name in runs
              if "floor" not in name and "no grad" not in name}
    report(N, D, V, times, errors, memory, skipped)
    return {"N": N, "D": D, "V": V, "seconds_quartiles": times, "errors_logp_dh_dw": errors,
            "peak_mb": memory, "skipped": skipped}


@torch.no_grad()
def floor_forward(hidden, weight, logits):
    torch.mm(hidden, weight.T, out=logits)


def report(N, D, V, times, errors, memory, skipped):
    print(f"\nN {N}, D {D}, V {V}; one (N, V) array is {N * V * 4 / 2 ** 20:.0f} MB")
    print(f"{'':22}{'ms (quartiles)':>28}{'/ floor':>9}{'/ naive':>9}{'peak MB':>9}"
          "   errors in logp, dH, dW")
    for name, (low, middle, high) in times.items():
        part = "no grad: " if name.startswith("no grad") else ""
        floor = times[part + ("floor 2NDV" if part else "floor 6NDV")][1]
        naive_time = times[part + "naive"][1]
        wrong = " ".join("-" if error is None else f"{error:.0e}" for error in errors.get(name, []))
        spread = f"{middle * 1e3:.1f} ({low * 1e3:.1f}-{high * 1e3:.1f})"
        print(f"{name:22}{spread:>28}{middle / floor:>9.2f}{middle / naive_time:>9.2f}"
              f"{str(memory.get(name, '')):>9}   {wrong}")
    for name, why in skipped.items():
        print(f"{name:22}skipped ({why})")
    compare(times)


def compare(times):
    """One line for each pair of `ours ...` and `against ...`: median time against : ours."""
    for name, (_, middle, _) in times.items():
        if "against" in name:
            ratio = middle / times[name.replace("against", "ours")][1]
            print(f"{name} : ours = {ratio:.3f} (above 1: ours is faster)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three small shapes, few rounds")
    parser.add_argument("--shape", help="N,D,V instead of the usual ones")
    parser.add_argument("--threads", type=int,
                        help="with 1, processor time is measured: for a busy machine")
    parser.add_argument("--rounds", type=int, help="rounds per shape")
    parser.add_argument("--against", metavar="FOLDER", help="another checkout of this repo")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    against, = modules_of(args.against, "policy") if args.against else (None,)
    if args.child:
        return child(args.child[0], *map(int, args.child[1:]), against)
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "liger-kernel")}
    print(f"{versions}, {torch.get_num_threads()} threads")
    shapes = [(1, 128, 4096), (2048, 128, 64), (2048, 128, 4096), (1024, 256, 32768),
              (4096, 512, 8192), (512, 896, 151936)]
    if args.quick:
        shapes = [(2048, 128, 64), (2048, 128, 4096), (512, 512, 8192)]
    if args.shape:
        shapes = [tuple(map(int, args.shape.split(",")))]
    rounds = args.rounds or (5 if args.quick else 15)
    rows = [bench(*shape, rounds, args.quick, args.against, against) for shape in shapes]
    print(json.dumps({"bench": "logprobs", "versions": versions,
                      "threads": torch.get_num_threads(), "rows": rows}))


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
