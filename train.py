"""The loop, written by hand: sample -> reward -> loss -> update.

    python train.py --loss diffsmooth          # tiny policy, Countdown, two CPU cores, minutes
    python train.py --loss grpo                # the baseline; its table has a column for both

One step, in `run`:
1. Draw G answers to each of some problems; an answer earns 1 or 0.                        collect
2. One function of losses.py turns the whole batch into one number.                        losses
3. The gradient of that number with respect to the (B, T) log-probabilities is a small
   array; it is pushed through the model a chunk of rows at a time, and AdamW moves.    train_step
So a loss sees the whole batch, and the update is the same however the batch is cut: into chunks
(`--micro-batch`, the one memory knob) or over processes (torchrun).

Without --model, the policy is a tiny one that first learns to answer at all, by cross-entropy on
answers that are correct by construction (`warm_start`). It is made once and kept in runs/base: the
base that all runs start from and are measured against.

Letters: B rows = prompts x G, the rows of one prompt contiguous; T response length.
"""
import argparse
import ast
import copy
import csv
import functools
import inspect
import itertools
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import eval as evaluation                              # first: it sets how torch's threads wait
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, get_state_dict,
    set_model_state_dict, set_optimizer_state_dict)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import losses
import policy as policy_module
from eval import Parser, clip_gradient, own_prompts, own_rows, read_flags, whole_batch, write_json
from policy import UserError, score
from rewards import SETTING, add_task_flags, fill_task_flags, make_task
from sample import Rollout, chat, encode, join, sample, take


def run(args):
    """One run, from its base to the table at the end -> exit code."""
    # What learns, on what, by which loss. Every user error is reported in here, before step 1.
    this = prepare(args)
    for step in tqdm(range(this.done + 1, args.steps + 1), initial=this.done, total=args.steps,
                     disable=this.quiet):
        # 1. Draw G answers to each of some problems, and judge them.
        began = time.time()
        problems, rollout, rewards = collect(this.policy, this.tokenizer, this.task, args,
                                             this.rng, this.generator)
        sampled = time.time()

        # 2. One loss on the whole batch, one exact gradient. With --updates > 1, on slices of it:
        #    the first is on-policy, the others need the log-probabilities of the sampling weights.
        lr = set_rate(this.optimizer, learning_rate(step, args))
        ref_logp = score_all(this.reference, rollout, args) if this.reference else None
        old_logp = score_all(this.policy, rollout, args) if args.updates > 1 else None
        for rows in torch.arange(len(rewards), device=rewards.device).chunk(args.updates):
            # A slice of contiguous rows: whole groups, because --updates divides --prompts.
            stats = train_step(
                this.policy, this.optimizer, take(rollout, rows), rewards[rows], this.loss_fn,
                args.group_size, temperature=args.temperature, micro_batch=args.micro_batch,
                grad_clip=args.grad_clip, old_logp=None if old_logp is None else old_logp[rows],
                ref_logp=None if ref_logp is None else ref_logp[rows])
            if stats["bad"]:                           # a NaN or infinite gradient: nothing moved
                break

        # 3. Measure held-out problems every so often, write down what happened, and save.
        line = evaluation.progress(step, this.task, rollout, rewards, args.group_size)
        line |= {name: value for name, value in stats.items() if not name.startswith("bad")}
        line |= {"lr": lr} | costs(rollout, sampled - began, time.time() - sampled)
        line |= evaluation.held_out(this, args, step)
        report(this, args, line, this.task.prompt(problems[0]), rollout.texts[0], rewards[0])
        note_bad_steps(this, step, stats, rollout, rows)
        stopped = asked_to_stop(this)                  # by Ctrl-C: the step is finished first
        if step % args.save_every == 0 or step == args.steps or stopped:
            save_checkpoint(this.folder / "checkpoints", this.policy, this.optimizer, step,
                            this.rng, this.generator)
        if stopped:
            print(f"stopped after step {step}, all saved; {AGAIN}", flush=True)
            return stopped
    return finish(this, args)


def collect(policy, tokenizer, task, args, rng, generator):
    """Draw problems and answers, and judge them -> (problems, rollout, rewards (B,)).

    --dynamic-sampling N (DAPO): groups that are all correct or all wrong are thrown away and drawn
    again, at most N times; if that was not enough, the last draw fills the batch. This is decided
    on accuracy, never on a shaped reward.
    """
    G, share = args.group_size, own_prompts(args.prompts)         # a slice; alone it is all of them
    wanted = share.stop - share.start
    # The caches of all answers in flight are what fills a GPU, so --rows bounds them: several
    # prompts at once, or a large group in several pieces.
    at_once, most = max(1, args.rows // G), min(args.rows, G)
    pieces = [min(most, G - drawn) for drawn in range(0, G, most)]
    # One number from the run's state per step, however many attempts follow.
    rng = random.Random(rng.getrandbits(64))
    problems, rollouts, rewards = [], [], []
    for attempt in range(args.dynamic_sampling + 1):
        # The whole list is drawn, and a part of it answered: a batch then holds the same problems
        # however many processes share it.
        drawn = [task.problem(rng) for _ in range(args.prompts)][share]
        prompts = [chat(tokenizer, task.system, task.prompt(x), task.style) for x in drawn]
        rollout = join([sample(policy, tokenizer, prompts[i:i + at_once], answers,
                               args.max_new_tokens, args.temperature, generator)
                        for i in range(0, wanted, at_once) for answers in pieces],
                       tokenizer.pad_token_id)
        reward = torch.tensor([task.reward(drawn[row // G], text)
                               for row, text in enumerate(rollout.texts)])  # (prompts G,)
        # Most losses learn nothing from a group without contrast.
        accuracy = (reward == 1).view(wanted, G).float().mean(1)            # (prompts,)
        mixed = (accuracy > 0) & (accuracy < 1)
        chosen = torch.argsort(~mixed, stable=True)[:wanted - len(problems)]    # mixed groups first
        if attempt < args.dynamic_sampling:
            chosen = chosen[mixed[chosen]]
        # From indices of problems to indices of their rows.
        rows = (chosen[:, None] * G + torch.arange(G)).flatten()
        problems += [drawn[i] for i in chosen.tolist()]
        rollouts.append(take(rollout, rows.to(policy.device)))
        rewards.append(reward[rows])
        if len(problems) == wanted:
            break
    return problems, join(rollouts, tokenizer.pad_token_id), torch.cat(rewards).to(policy.device)


def train_step(policy, optimizer, rollout, rewards, loss_fn, group_size, *, temperature=1.0,
               micro_batch=None, grad_clip=1.0, old_logp=None, ref_logp=None):
    """One optimiser step on the whole of `rollout` -> stats, a flat dict of floats.

    rewards (B,); loss_fn: a function of losses.py with its hyperparameters bound. old_logp,
    ref_logp (B, T): None takes the current policy as the one that sampled, and no reference.
    micro_batch: rows in one chunk, None or 0 for all of them. stats are those of the loss, "loss",
    "grad_norm" (before clipping) and "bad": True where the loss, the gradient or its norm is NaN or
    infinite; then weights and optimiser stay as they were, and stats["bad_rows"] lists the rows
    that it came from. Otherwise "bad" is False.
    """
    # The loss needs the log-probabilities of all rows, but what autograd keeps of all rows at once
    # may not fit. So chunks are scored twice: for their values now, with gradient further down.
    chunks = torch.arange(len(rewards), device=rewards.device).split(micro_batch or len(rewards))
    one_chunk = len(chunks) == 1                       # then it is the plain backward, scored once
    with torch.set_grad_enabled(one_chunk):
        scored = [score(policy, rollout, chunk, group_size, temperature) for chunk in chunks]

    # The loss of the whole batch, and its gradient with respect to (B, T) logp and entropy. Where
    # several processes share a batch, `whole_batch` has the rows of all of them.
    logp, entropy = (whole_batch(torch.cat(parts).detach()).requires_grad_()
                     for parts in zip(*scored))
    old_logp = logp if old_logp is None else whole_batch(old_logp)
    ref_logp = None if ref_logp is None else whole_batch(ref_logp)
    loss, stats = loss_fn(logp, old_logp, whole_batch(rollout.mask), whole_batch(rewards),
                          group_size, entropy=entropy, ref_logp=ref_logp)
    # Many losses use no entropy: it then has no gradient (None).
    gradients = torch.autograd.grad(loss, [logp, entropy], allow_unused=True)
    gradients = [torch.zeros_like(logp) if g is None else g for g in gradients]

    # Push the rows of this rollout through the model.
    gradients = [own_rows(g, rollout) for g in gradients]                   # (B, T) each
    optimizer.zero_grad()
    for i, chunk in enumerate(chunks):
        outputs = scored[i] if one_chunk else score(policy, rollout, chunk, group_size, temperature)
        # An output whose gradient is 0 is left out: backward through it costs as much as through
        # the other. But every chunk goes backward: processes that share a model wait there.
        used = [(out, g[chunk]) for out, g in zip(outputs, gradients) if g.any()]
        torch.autograd.backward(*zip(*(used or [(outputs[0], gradients[0][chunk])])))

    # A bad gradient is noticed before it reaches a weight or a moment of AdamW.
    norm = clip_gradient(policy, grad_clip)
    stats = stats | {"loss": loss.item(), "grad_norm": norm}
    stats["bad"] = not (math.isfinite(norm) and math.isfinite(stats["loss"]))
    if stats["bad"]:
        finite = torch.stack([x.isfinite().all(1) for x in (own_rows(logp.detach(), rollout),
                                                            *gradients)])
        stats["bad_rows"] = (~finite.all(0)).nonzero()[:, 0].tolist()
    else:
        optimizer.step()
    return stats


# ------------------------------------------- a first reading ends here; below: what serves the loop

import signal
from eval import TRACKED, in_first, rank, say, shard, start_processes, whole, world

AGAIN = "the same command with --resume goes on."
# What --resume lets one change: the run's length, what cures a NaN or a lack of memory, and what is
# shown, measured or saved.
FREE = ("steps", "lr", "micro_batch", "rows", "save_every", "show_every", "eval_every",
        "eval_problems", "eval_samples", "eval_temperature", "out", "resume",
        "checkpoint_activations", "files")


def prepare(args):
    """All that a run needs, in one namespace. What a user can have got wrong is reported here."""
    device, dtype = start_processes(args.device)
    this = SimpleNamespace(folder=Path(args.out) / args.name, device=device, dtype=dtype, done=0,
                           bad_steps=0, seconds=[], slow=False, quiet=rank() > 0 or None)
    if args.prompts // args.updates % world():
        raise UserError(f"{world()} processes must divide --prompts by --updates.")
    say(f"{args.loss} on {args.task}, {device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads\nseveral runs at once: OMP_NUM_THREADS=1 for each")
    policy, this.tokenizer, this.base = start_policy(args, device, dtype)
    policy.recompute = args.checkpoint_activations
    make_tasks(this, policy, args)
    in_first(lambda: open_run(this, args))

    options = {name: getattr(args, name) for name in hyperparameters(args.loss)}
    this.loss_fn = functools.partial(variants()[args.loss], **options)
    # A frozen copy of the base only where the loss has a KL term.
    this.reference = copy.deepcopy(policy).requires_grad_(False) if options.get("beta") else None
    # Sharded first: the optimiser's moments are then sharded as their weights are.
    this.policy = shard(policy)
    this.optimizer = make_optimizer(policy, args.lr)
    # Two sources of chance, both saved with every checkpoint: rng draws problems, the same in all
    # processes; generator draws answers, each process its own.
    this.rng = random.Random(args.seed)
    this.generator = torch.Generator(policy.device).manual_seed(args.seed + 7919 * rank())
    in_first(lambda: try_to_save(this, args))
    if args.resume:
        this.done = load_checkpoint(this.folder / "checkpoints", policy, this.optimizer, this.rng,
                                    this.generator)
    if rank() == 0:
        # Only now, when nothing can be refused any more: a run that never began leaves no flags.
        write_json(this.folder / "flags.json", vars(args))
        this.log = open_log(this.folder / "log.csv", this.done)
    if this.done >= args.steps:
        say(f"all {this.done} steps are done already")
    this.signals = on_signal(f"stopped within a step; {AGAIN}", wait=True)
    return this


def finish(this, args):
    """Save the model, and make the table -> exit code. Ctrl-C loses nothing from here on."""
    on_signal(f"stopped after the last step, all saved; {AGAIN}")
    save_model(this.policy, this.tokenizer, this.folder / "model")
    this.optimizer.zero_grad()
    this.reference = this.optimizer = None             # their memory is for the table now
    if args.eval_problems:
        evaluation.compare(this, args)
    return 0


# ----------------------------------------------------------------------- the rate, the optimisers

def learning_rate(step, args):
    """Step 1, 2, ... -> its rate. It rises to --lr in --warmup steps, and then falls in a straight
    line, to 0 one step after the last. lr 1, warmup 2, steps 5: 0.5, 1, 0.75, 0.5, 0.25."""
    # AdamW's first moments are means of few gradients; its last steps would leave weights shaking.
    warmup = max(1, args.warmup)
    rise = step / warmup
    fall = (args.steps + 1 - step) / max(1, args.steps + 1 - warmup)
    return args.lr * min(1.0, rise, fall if args.schedule == "linear" else 1.0)


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def make_optimizer(policy, lr):
    """AdamW without weight decay; its second moment is a mean over some twenty steps."""
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=world() == 1)


class Muon(torch.optim.AdamW):
    """Momentum whose step is made orthogonal for the matrices of the blocks (Jordan et al. 2024),
    so that rare directions learn as fast as common ones; AdamW at 0.4 of the rate for all else.

    In the same time the warm start gets 1.5 points of Pass@1 further than with AdamW. torch.optim
    has a Muon too, in bf16 only, which a CPU without bf16 units does ten times as slowly.
    """

    def __init__(self, policy, lr):
        super().__init__(policy.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
        # The embedding is a table of rows, not a map: its step is AdamW's.
        self.matrices = [w for w in policy.model.layers.parameters() if w.dim() == 2]

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for w in self.matrices:
            momentum = self.state[w].setdefault("momentum", torch.zeros_like(w))
            momentum.lerp_(w.grad, 0.05)               # a mean of some twenty gradients
            update = orthogonal(w.grad.lerp(momentum, 0.95))                # Nesterov's look ahead
            size = 0.2 * max(w.shape) ** 0.5           # an entry moves as far as with AdamW
            w.mul_(1 - 0.1 * lr).sub_(update, alpha=size * lr)
            w.grad = None                              # AdamW leaves it alone then
        set_rate(self, 0.4 * lr)
        super().step()
        set_rate(self, lr)


def orthogonal(x):
    """U V^T of the matrix x = U S V^T, nearly: five steps of a Newton-Schulz iteration take every
    singular value to between 0.7 and 1.2."""
    # x x^T is the smaller of the two products when x is wide.
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    # The iteration converges for singular values up to 1; none is above the norm of all.
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def score_all(policy, rollout, args):
    """log-probabilities of the whole rollout (B, T), without gradient, in --micro-batch chunks."""
    rows = torch.arange(len(rollout.mask), device=rollout.mask.device)
    with torch.no_grad():
        return torch.cat([score(policy, rollout, chunk, args.group_size, args.temperature)[0]
                          for chunk in rows.split(args.micro_batch or len(rows))])


# ---------------------------------------------------------------------------------- the warm start

def warm_start(policy, tokenizer, task, steps, optimizer, prompts=128, seed=0, say=print):
    """Learn to answer at all, in place: cross-entropy on answers that are correct by construction.

    A step has `prompts` problems with two answers each, so that a prompt is read once for two. A
    problem comes with one answer, and shares those of earlier ones with its numbers and target.
    The rate rises to the optimizer's own in 20 steps, and falls to 0.
    """
    rng, began, G = random.Random(seed), time.time(), 2
    known = {}                                         # numbers and target -> answers, as they come
    lr = optimizer.param_groups[0]["lr"]
    rewards = torch.ones(prompts * G, device=policy.device)
    for step in tqdm(range(1, steps + 1), desc="warm start", disable=not sys.stderr.isatty()):
        fresh = []                                     # as many as there are rows, for variety
        for _ in range(prompts * G):
            problem, answer = task.example(rng)
            alike = known.setdefault((*sorted(problem.numbers), problem.target), [])
            alike.append(answer)
            fresh.append((chat(tokenizer, task.system, task.prompt(problem), task.style), alike))
        # Early on a problem has one known answer, given twice; later they differ.
        texts, answers = [], []
        for text, alike in fresh[:prompts]:
            texts += [text] * G
            answers += rng.choices(alike, k=G)
        rollout = demonstrations(tokenizer, texts, answers, policy.stop_ids[0], policy.device)
        set_rate(optimizer, lr * min(1, step / 20) * (1 - (step - 1) / steps))
        stats = train_step(policy, optimizer, rollout, rewards, losses.sft, G)
        if step == 1 or step % 25 == 0 or step == steps:
            say(f"warm start {step:4d}/{steps}  cross-entropy {stats['loss']:.3f} nats/token  "
                f"{time.time() - began:.0f} s")


def demonstrations(tokenizer, prompts, answers, stop_id, device):
    """(prompt, answer) strings as a Rollout, so that cross-entropy is the same step as all else."""
    # What was not sampled has no log-probability, and sft asks for none.
    prompt, prompt_mask = encode(tokenizer, prompts, device)
    ids = [torch.tensor([*line, stop_id])
           for line in tokenizer(answers, add_special_tokens=False).input_ids]
    mask = pad_sequence([torch.ones(len(line), dtype=torch.bool) for line in ids], batch_first=True)
    response = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id).to(device)
    return Rollout(tokens=torch.cat([prompt, response], dim=1), prompt_mask=prompt_mask,
                   response=response, mask=mask.to(device),                 # (B, T)
                   logp=torch.zeros(mask.shape, device=device), texts=answers,
                   finished=torch.ones(len(ids), dtype=torch.bool, device=device))


# ------------------------------------------------------------- what is measured, shown and written

# The screen's columns, at most 100 characters in all; log.csv has more.
SHOWN = {"step": "8d", "reward": "8.3f", "solved": "8.2f", "distinct": "8.2f", "equal": "8.2f",
         "parsed": "8.2f", "length": "8.1f", "cut": "8.2f", "entropy": "8.3f", "loss": "8.3f",
         "grad_norm": "9.2f"}


def costs(rollout, sampling, updating):
    """Seconds, tokens per second, and the peak in GiB of the GPU's memory, else the process's."""
    peak = 0
    if rollout.tokens.is_cuda:
        peak = torch.cuda.max_memory_allocated()
    elif sys.platform != "win32":
        import resource                                # not on Windows
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"sample_s": sampling, "update_s": updating, "memory_gb": peak / 2 ** 30,
            "tokens_s": int(rollout.mask.sum()) * world() / (sampling + updating)}


def report(this, args, line, prompt, answer, reward):
    """A step's line into log.csv, and every --show-every steps onto the screen, every tenth time
    with an answer in full and the names of the columns. What makes a run idle or slow is said."""
    if rank() > 0:
        return
    write_line(this.log, line)
    step, first = line["step"], line["step"] == this.done + 1
    shown = {name: f"{line[name]:{form}}" for name, form in SHOWN.items() if name in line}
    if first or step % (10 * args.show_every) == 0:
        say(f"{prompt!r} -> {answer!r}  reward {reward:.0f}")
        say(" ".join(name.rjust(len(text)) for name, text in shown.items()))
    if first or step % args.show_every == 0 or step == args.steps:
        say(" ".join(shown.values()))
    if step == 1 and line["solved"] == 0:
        say("no answer of the first batch is correct, and RL learns from correct answers: if it "
            "stays so, teach the model first (--warm-steps) or take easier problems.")
    # Per token, because answers may grow.
    this.seconds.append(1 / line["tokens_s"])
    usual, now = statistics.median(this.seconds[:10]), statistics.median(this.seconds[-5:])
    if len(this.seconds) > 15 and now > 3 * usual and not this.slow:
        this.slow = True
        say(f"a token takes {now / usual:.0f} times as long as at first: if another run shares "
            "these cores, start each of them with OMP_NUM_THREADS=1.")


def open_log(path, done):
    """log.csv, cut back to the steps that the checkpoint knows -> a file open for appending."""
    lines = path.read_text().splitlines() if done and path.is_file() else []
    # Lines of steps after the checkpoint would otherwise stand twice, once they are made again.
    with whole(path) as file:
        file.writelines(line + "\n" for line in lines[:done + 1])           # head, a line per step
    return open(path, "a", newline="")


def write_line(log, line):
    # The columns are the first line's: which stats there are is the loss's business.
    writer = csv.DictWriter(log, line, lineterminator="\n")
    if log.tell() == 0:
        writer.writeheader()
    writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                     for name, value in line.items()})
    log.flush()                                        # a killed run keeps its lines
    os.fsync(log.fileno())


def note_bad_steps(this, step, stats, rollout, rows):
    """Name the rows that made a gradient NaN or infinite. One bad batch is bad luck, and is
    skipped; several in a row will not mend themselves, and end the run."""
    this.bad_steps = this.bad_steps + 1 if stats["bad"] else 0
    if stats["bad"]:
        named = [f"row {int(rows[row])} {rollout.texts[rows[row]][:200]!r}"
                 for row in stats["bad_rows"][:3]]
        say(f"step {step} is skipped, and nothing moves: loss {stats['loss']}, gradient norm "
            f"{stats['grad_norm']}, caused by {', '.join(named) or 'no row alone'}")
    if this.bad_steps == 3:
        newest = max((this.folder / "checkpoints").glob("*.pt"), default="none yet")
        raise UserError("three steps in a row gave a NaN or infinite gradient: go on from the last "
                        f"checkpoint ({newest}) with --resume and a smaller --lr.")


def on_signal(sentence, wait=False):
    """From now on Ctrl-C and SIGTERM end the process with `sentence`. With `wait` the first is
    noted in the list that is returned, and the loop leaves after its step."""
    noted = []                                         # (number of the signal, when)

    def handler(number, frame):
        # torchrun passes on what the terminal has sent to all: within a moment that is the same.
        if not wait or noted and time.time() - noted[0][1] > 1:
            # A KeyboardInterrupt is no Exception: on its way to main nothing takes it for an error.
            raise KeyboardInterrupt(number, sentence)
        if not noted and rank() == 0:                  # at once, however long the step is
            os.write(2, b"\nstopping after this step, which is then saved; again: at once\n")
        noted.append((number, time.time()))

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return noted


def asked_to_stop(this):
    """The exit code that Ctrl-C or SIGTERM asked for since the loop began, None without one."""
    # All leave after the same step: one that went on alone would wait for the others for ever.
    if whole_batch(torch.tensor([float(len(this.signals))])).any():
        return 128 + max((number for number, _ in this.signals), default=signal.SIGTERM)


# -------------------------------------------------------------------------- what a run starts from

def start_policy(args, device, dtype):
    """Where RL starts from -> (policy, tokenizer, where it lies): --model as it is, or a base that
    was taught to answer (`warm_start`): the tiny policy, or --model with --warm-steps."""
    if not args.warm_steps:
        policy, tokenizer = policy_module.load(args.model, device, dtype, args.stop)
        say(policy_module.says_when_it_stops(policy, tokenizer))
        return policy, tokenizer, args.model
    base = Path(args.out) / args.base
    if not (base / "model").is_dir():
        make_base(base, args, device, dtype)
    policy, tokenizer = policy_module.load(base / "model", device, dtype, args.stop)
    fill_task_flags(args, tokenizer)
    made = {"model": None} | read_flags(base / "flags.json")
    # An older base may lack characters; its answers would then be read as unknown tokens.
    if not args.model and tokenizer.unk_token_id in tokenizer(policy_module.CHARACTERS).input_ids:
        raise UserError(f"'{base}' was made with another tokenizer: name another with --base.")
    for key in ("model", "counts", "high", "targets", "prompt"):   # it knows one task
        if made[key] != getattr(args, key):
            raise UserError(f"'{base}' was made with {key} {made[key]}, not "
                            f"{getattr(args, key)}: --base names another.")
    return policy, tokenizer, base / "model"


def make_base(base, args, device, dtype):
    """Warm-start a policy and save it as the folder `base`, whole or not at all."""
    if world() > 1:
        raise UserError(f"'{base}' is not there yet: make it once without torchrun.")
    if base.exists() and any(base.iterdir()):
        raise UserError(f"'{base}' is not empty and holds no base: name another with --base.")
    if args.model:
        policy, tokenizer = policy_module.load(args.model, device, dtype, args.stop)
        prompts, optimizer = 16, make_optimizer(policy, args.warm_lr)
    else:
        policy, tokenizer = policy_module.tiny(seed=args.seed)
        prompts, optimizer = 128, Muon(policy.to(device), args.warm_lr)
    fill_task_flags(args, tokenizer)
    task = make_task(args)
    # An impossible task is told before anything is written; so is one that teaches wrong answers.
    if not task.reward(*task.example(random.Random(0))):
        raise UserError(f"--warm-steps teaches bare expressions, not --prompt {args.prompt}.")
    base.parent.mkdir(parents=True, exist_ok=True)     # an error there is told now
    warm_start(policy, tokenizer, task, args.warm_steps, optimizer, prompts, args.seed, say)
    # Aside first: no half a base is left, and of two runs that make the same the first has it.
    aside = base.with_name(f"{base.name}.{os.getpid()}.tmp")
    write_json(aside / "flags.json", {key: getattr(args, key) for key in
                                      ("model", *SETTING, "warm_steps", "warm_lr", "seed")})
    policy_module.save(policy, tokenizer, aside / "model")
    try:
        aside.rename(base)
    except OSError:                                    # the other one was here first
        shutil.rmtree(aside)


def make_tasks(this, policy, args):
    """The task to train on, the one to measure on, and the problems for that."""
    fill_task_flags(args, this.tokenizer)
    if getattr(args, "max_len", 0) is None:            # dr_grpo divides by the longest answer
        args.max_len = args.max_new_tokens
    this.task, this.test_task = evaluation.split(args)
    for task in {this.task: None, this.test_task: None}:       # once, if they are one
        evaluation.leave_out_too_long(task, this.tokenizer, policy, args.max_new_tokens)
        for note in task.notes:
            say(note)
    # What the end will need is asked for now: an error there would come after a night.
    this.task.problem(random.Random(0))
    try:
        wanted = args.eval_problems + (TRACKED if args.eval_every else 0)
        problems = this.test_task.held_out_problems(wanted)
    except ValueError:                                 # a small task has no more
        problems = this.test_task.held_out_problems(args.eval_problems)
    this.test_problems = problems[:args.eval_problems]
    this.tracked_problems = problems[args.eval_problems:]
    if args.eval_problems and not problems:
        raise UserError(f"'{args.eval_data or args.data}' holds no problem to evaluate on.")
    if args.eval_every and not this.tracked_problems:
        say("--eval-every has nothing to measure: all held-out problems are in the last table.")


def open_run(this, args):
    """Make or reopen runs/NAME. A folder that holds another run is never written to."""
    folder = this.folder
    # A run goes on only with the files that it began with: their fingerprints are kept.
    files = {"--data": args.data, "--eval-data": args.eval_data, "the base": this.base}
    args.files = {what: evaluation.fingerprint(path) for what, path in files.items() if path}
    if not (folder / "flags.json").is_file():
        if args.resume:
            raise UserError(f"there is no run to resume in '{folder}'.")
        if folder.exists() and {x.name for x in folder.iterdir()} - {"flags.json.tmp"}:
            raise UserError(f"'{folder}' is not empty and holds no run: choose another --name.")
        folder.mkdir(parents=True, exist_ok=True)
        return
    if not args.resume:
        raise UserError(f"'{folder}' holds a run already: --resume it, or choose another --name.")
    before = read_flags(folder / "flags.json")
    # The union: a flag that this version has and the run's had not, or the other way round.
    for key, now in (before | vars(args)).items():
        then = before.get(key)
        if then != now and key not in FREE:
            raise UserError(f"--resume keeps a run's flags, but {key} was {then} and is {now} now.")
        if then != now and key in ("lr", "steps"):     # allowed, but it changes what is learned
            say(f"{key} was {then} and is {now} from here on.")
    for what, mark in before["files"].items():
        if args.files[what] != mark:
            raise UserError(f"--resume keeps a run's files, but {what} has changed since it began.")


def try_to_save(this, args):
    """What cannot be saved is told now, not after a night; and how much room checkpoints need."""
    policy_module.try_to_save(this.policy, this.tokenizer, this.folder / "model")
    # fp32 weights and two moments; two checkpoints are kept, and a third is being written.
    there = len(list((this.folder / "checkpoints").glob("*.pt")))
    size = max(1, 3 - there) * 12 * sum(w.numel() for w in this.policy.parameters()) / 1e9
    free = shutil.disk_usage(this.folder).free / 1e9
    room = f"checkpoints need {size:.1f} GB in '{this.folder}', and {free:.1f} GB are free"
    if size > free:
        raise UserError(f"{room}: choose another --out.")
    if size > 1:
        say(f"{room}; one is written every {args.save_every} steps.")


# ------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(folder, policy, optimizer, step, rng, generator):
    """One file with weights, optimiser state and all random states, on disk whole or not at all;
    the last two are kept. Sharded state is gathered in the first process only."""
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, optimiser = get_state_dict(policy, optimizer, options=gathered)
    # Each process draws answers of its own: all of their random states, in process order.
    generators = whole_batch(generator.get_state()[None])                   # (processes, bytes)
    if rank() > 0:
        return
    for half_written in folder.glob("*.tmp"):          # by a save that was killed
        half_written.unlink()
    file = folder / f"{step:07d}.pt"
    with whole(file, "wb") as opened:
        torch.save({"step": step, "weights": weights, "moments": optimiser["state"],
                    "rng": rng.getstate(), "generators": generators}, opened)
    files = sorted(folder.glob("*.pt"))
    place = files.index(file)              # later ones are damaged: the run went on from before
    for other in files[:max(0, place - 1)] + files[place + 1:]:
        other.unlink()


def load_checkpoint(folder, policy, optimizer, rng, generator):
    """Restore the newest whole checkpoint in place -> its step, 0 if the run was stopped before the
    first. A damaged one is named, and the one before it is used."""
    found = {}                                         # stays empty in all but the first process

    def look():
        found.update(newest_whole(folder))
        return [found.get(key) for key in ("step", "rng", "generators")]
    step, state, generators = in_first(look)
    if step is None:
        return 0
    # The first process hands out what it has read; the others hold their own shards only. In two
    # calls: set_state_dict would take the empty weights of the others for "no weights at all".
    scattered = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world() > 1)
    optimiser = get_optimizer_state_dict(policy, optimizer)
    optimiser["state"] = found.get("moments", {})
    set_model_state_dict(policy, found.get("weights", {}), options=scattered)
    set_optimizer_state_dict(policy, optimizer, optimiser, options=scattered)
    rng.setstate(state)
    # Bit for bit only with as many processes as before: each draws from a state of its own.
    if len(generators) == world():
        generator.set_state(generators[rank()].clone())
    else:
        say(f"{len(generators)} processes before, {world()} now: it goes on with other draws.")
    return step


def newest_whole(folder):
    """What is in the newest checkpoint that is not damaged; {} if there is none yet."""
    damaged = ""
    # The last two are kept, so a damaged one costs --save-every steps, not the run.
    for file in sorted(folder.glob("*.pt"), reverse=True):
        try:
            # torch.load looks at no checksum, but each tensor in the file has one.
            with zipfile.ZipFile(file) as parts:
                if parts.testzip():
                    raise zipfile.BadZipFile("a checksum is wrong")
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:                     # whatever a damaged file makes these say
            damaged = f"{file.name} is damaged ({type(error).__name__})"
            say(f"{damaged}: looking for the one before it.")
    if damaged:
        raise UserError(f"'{folder}' holds no usable checkpoint, {damaged}: choose another --name.")
    return {}


def save_model(policy, tokenizer, path):
    """The trained policy as a folder that transformers opens; sharded weights are gathered."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)
    if rank() == 0:
        policy_module.save(policy, tokenizer, path, weights)


# --------------------------------------------------------------------------------------- the flags

def variants():
    """{name: function} of every loss in losses.py: its first arguments are logp and old_logp."""
    return {name: f for name, f in inspect.getmembers(losses, inspect.isfunction)
            if not name.startswith("_")
            and list(inspect.signature(f).parameters)[:2] == ["logp", "old_logp"]}


def hyperparameters(loss):
    """{name: default} of a loss function's own options, read from its signature."""
    # entropy and ref_logp belong to the batch; what else is given by name only is an option.
    parameters = inspect.signature(variants()[loss]).parameters.items()
    return {name: p.default for name, p in parameters
            if p.kind is p.KEYWORD_ONLY and name not in ("entropy", "ref_logp")}


def option(loss, default, text):
    """The text after a loss's flag -> a value of the same type as the option's default."""
    kind = type(default)
    named = {"true": True, "false": False, "none": None, "nan": math.nan, "inf": math.inf}
    try:
        value = named[text.lower()] if text.lower() in named else ast.literal_eval(text)
    except (ValueError, SyntaxError):                  # no number, no tuple
        value = text
    if kind is str:
        return text
    if kind in (int, float) and type(value) in (int, float):
        return value if value % 1 else kind(value)
    if default is None or type(value) is kind:
        return value
    wanted = {bool: "True or False", tuple: "a tuple such as (1,2)"}.get(kind, "a number")
    raise argparse.ArgumentTypeError(f"losses.{loss} takes {wanted}, not '{text}'")


# Group -> flags: name, default, least value of a whole number (None: any above 0), help.
NUMBERS = {
    "the warm start": (
        ("warm-steps", None, 0, "of cross-entropy on correct answers; 500, or 0 with --model"),
        ("warm-lr", None, None, "their largest rate; 1e-2 (Muon), or 2e-4 (AdamW) with --model")),
    "one step": (
        ("prompts", 32, 1, "problems per step"),
        ("group-size", 16, 2, "answers per problem (G): each is compared with the others"),
        ("temperature", 1.0, None, "of sampling, and of every log-probability"),
        ("dynamic-sampling", 0, 0, "redraw all-correct and all-wrong groups, at most so often"),
        ("updates", 1, 1, "optimiser steps per rollout, each on a part"),
        ("grad-clip", 1.0, None, "largest gradient norm")),
    "how far and how fast": (
        ("steps", 1200, 1, "rollouts"),
        ("lr", 1e-4, None, "largest learning rate"),
        ("warmup", 10, 0, "steps in which it rises to --lr")),
    "what is measured on held-out problems": (
        ("eval-every", 100, 0, f"steps between two looks at {TRACKED} of them; 0: none"),
        ("eval-problems", 512, 0, "others, for the table at the end; 0: no table"),
        ("eval-samples", 64, 1, "answers to each of these"),
        ("eval-temperature", 0.7, None, "of these answers")),
    "the run": (
        ("save-every", 50, 1, "steps between checkpoints"),
        ("show-every", 10, 1, "steps between two lines on the screen"),
        ("seed", 0, 0, "of problems and answers")),
    "the machine; less memory: the first two": (
        ("micro-batch", 0, 0, "rows in one forward and backward; 0: all"),
        ("rows", 1024, 1, "answers sampled at once"))}


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], add_help=False, allow_abbrev=False,
                    usage="python train.py --loss LOSS [flags]")
    flag = parser.add_argument_group("what is optimised").add_argument
    flag("--loss", default="diffsmooth", help="one of: " + ", ".join(variants()))
    flag("--model", help="the base: a folder or hub name; without it, a tiny policy, made once")
    flag("--base", default="base", help="folder in --out of a base that was taught to answer")
    flag("--stop", nargs="+", default=[], help="with --model: further tokens that end an answer")
    # The loss's own options: --help shows groups in the order in which they are made.
    loss_group = parser.add_argument_group()           # filled in below
    add_task_flags(parser)
    groups = {title: parser.add_argument_group(title).add_argument for title in NUMBERS}
    for title, flags in NUMBERS.items():
        for name, default, least, meaning in flags:
            groups[title](f"--{name}", type=int if least is not None else float, default=default,
                          help=meaning + " (default: %(default)s)" * (default is not None))
    groups["how far and how fast"]("--schedule", choices=["linear", "constant"], default="linear",
                                   help="then it falls to 0 at --steps, or stays")
    flag = groups["the run"]
    flag("--name", help="its folder is OUT/NAME; without it, the loss's name")
    flag("--out", default="runs", help="the folder of runs")
    flag("--resume", action="store_true", help="go on from the last checkpoint")
    flag("--eval-data", help="math: measure on this file, not on a held-out tenth of --data")
    flag = groups["the machine; less memory: the first two"]
    flag("--checkpoint-activations", action="store_true", help="for long answers; a third slower")
    flag("--device", help="cuda, cpu or mps; without it, cuda where there is one")

    # The loss's own flags are read from its function's signature, so a new loss needs no line here.
    known, _ = parser.parse_known_args(argv)
    if known.loss not in variants():
        raise UserError(f"unknown loss '{known.loss}'; these exist: {', '.join(variants())}.")
    options = hyperparameters(known.loss)
    loss_group.title = f"options of --loss {known.loss}, explained in losses.{known.loss}"
    for name, default in options.items():
        if type(default) not in (bool, int, float, str, tuple, type(None)):
            raise UserError(f"losses.{known.loss}: {name} needs a default that a flag can stand "
                            "for: a number, a text, True or False, a tuple, or None.")
        budget = name == "max_len"                     # dr_grpo's: known once the task is
        loss_group.add_argument(f"--{name.replace('_', '-')}", default=None if budget else default,
                                type=functools.partial(option, known.loss, default), help="default:"
                                " --max-new-tokens" if budget else "default: %(default)s")
    parser.add_argument("-h", "--help", action="help", help="show this; with --loss, its options")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        has = ", ".join(f"--{name}" for name in options) or "none"
        raise UserError(f"'{unknown[0]}' is not a flag, nor an option of loss {args.loss}, which "
                        f"has: {has}.")
    args.name = args.name or args.loss
    for name, tiny, given in (("warm_steps", 500, 0), ("warm_lr", 1e-2, 2e-4)):
        if getattr(args, name) is None:
            setattr(args, name, given if args.model else tiny)
    check(args)
    return args


def check(args):
    """Contradictions between flags, told before anything is written."""
    def need(ok, message):
        if not ok:
            raise UserError(message)

    for name, _, least, _ in itertools.chain(*NUMBERS.values()):
        value = getattr(args, name.replace("-", "_"))
        need(0 < value < math.inf if least is None else least <= value < 2 ** 63,
             f"--{name} must be {'above 0' if least is None else f'{least} or more'}, not {value}.")
    need(args.model or args.task == "countdown" and args.prompt in (None, "bare"),
         "without --model there is only --task countdown with --prompt bare.")
    need(args.model or args.warm_steps, "--warm-steps 0 needs --model.")
    need(args.task == "countdown" or not args.warm_steps,
         "--warm-steps imitates correct answers, and --task math has none.")
    need(args.name != "base" and (args.name != args.base or not args.warm_steps),
         "--name and --base must differ, and no run is called base: it is kept apart.")
    need(args.task == "math" or args.eval_data is None, "--eval-data belongs to --task math.")
    need(args.prompts % args.updates == 0, "--updates must divide --prompts.")
    # A trial call on one group: the loss itself knows best what its options may be.
    options = {name: getattr(args, name) for name in hyperparameters(args.loss)
               if getattr(args, name) is not None}
    logp = torch.full((args.group_size, 1), -1.0)      # answers of one token
    rewards = (torch.arange(args.group_size) == 0).float()
    loss, _ = variants()[args.loss](logp, logp, logp < 0, rewards, args.group_size, entropy=-logp,
                                    ref_logp=logp, **options)
    need(loss.isfinite(), f"the options of --loss {args.loss} make its value {loss}.")


def main(argv=None):
    """Run, and turn what a user can get wrong into one sentence and exit code 2."""
    try:
        evaluation.any_character()
        on_signal("stopped before the first step; the same command starts it again.")
        return run(parse(argv))
    except KeyboardInterrupt as interrupt:             # from on_signal
        number, sentence = interrupt.args
        print(sentence, file=sys.stderr)
        return 128 + number
    except Exception as error:
        print(f"error: {evaluation.explain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    evaluation.leave(main())
