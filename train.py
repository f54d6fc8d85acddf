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
answers that are right by construction (`warm_start`). It is made once and kept in runs/base: the
base that all runs start from and are measured against.

Letters: B rows = prompts x G, the rows of one prompt contiguous; T response length.
"""
import copy
import csv
import functools
import hashlib
import inspect
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, get_state_dict,
    set_model_state_dict, set_optimizer_state_dict)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import eval as evaluation
import losses
import policy as policy_module
from eval import Parser, explain, rank, read_flags, start_processes, world, write_json
from policy import score
from rewards import SETTING, add_task_flags, fill_task_flags, make_task
from sample import Rollout, chat, encode, join, sample, take

try:
    import resource                                    # not on Windows
except ImportError:
    resource = None


def run(args, typed):
    """One run, from its base to the table at the end -> exit code. typed: the command line."""
    # What learns, and on what. All that a user can have got wrong is told here, before any step.
    device, dtype = start_processes(args.device)       # as many as torchrun started
    if args.prompts // args.updates % world():
        raise ValueError(f"{world()} processes do not divide the {args.prompts // args.updates} "
                         "prompts of an update.")
    if rank() == 0:
        print(f"{args.loss} on {args.task}, {device}, {torch.get_num_threads()} threads, "
              f"torch {torch.__version__}", flush=True)
    policy, tokenizer, base = start_policy(args, device, dtype)
    policy.recompute = args.checkpoint_activations
    task, exam = make_tasks(args, tokenizer, policy)   # to train on; (task, problems) to measure on
    folder = Path(args.out) / args.name
    # A run goes on only with the files that it began with: their fingerprints are kept.
    files = {"--data": args.data, "--eval-data": args.eval_data, "the base": base}
    args.files = {what: evaluation.fingerprint(path) for what, path in files.items() if path}
    lock = in_first(lambda: open_run(folder, args))    # held until the process ends

    # The loss with its hyperparameters bound; a frozen copy of the base only where a KL term asks.
    own = {name: getattr(args, name) for name in hyperparameters(args.loss)}
    loss_fn = functools.partial(variants()[args.loss], **own)
    reference = copy.deepcopy(policy).requires_grad_(False) if own.get("beta") else None
    # Sharded first: the optimiser's moments then are sharded as their weights are.
    policy = shard(policy)
    optimizer = make_optimizer(policy, args.lr)

    # Two sources of chance, both saved with every checkpoint: rng draws problems, the same in all
    # processes; generator draws answers, each process its own.
    rng = random.Random(args.seed)
    generator = torch.Generator(policy.device).manual_seed(args.seed + 7919 * rank())
    done = restore(folder, policy, tokenizer, optimizer, rng, generator, args)
    log, bad = open_log(folder / "log.csv", done), 0
    again = command(typed, "--resume")
    # Ctrl-C is noted, and the loop leaves after its step, where weights, moments, random states
    # and log agree with each other.
    stop = on_signal(f"stopped within a step; go on from the last checkpoint with: {again}",
                     wait=True)
    for step in tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps,
                     disable=rank() > 0 or not sys.stderr.isatty()):
        began = time.time()

        # 1. Draw G answers to each of some problems, and judge them.
        problems, rollout, rewards = collect(policy, tokenizer, task, args, rng, generator)
        sampled = time.time()

        # 2. One loss on the whole batch, one exact gradient. With --updates > 1, on slices of it:
        #    the first is on-policy, the others need the log-probabilities of the sampling weights.
        lr = set_rate(optimizer, learning_rate(step, args))
        ref_logp = score_all(reference, rollout, args) if reference else None
        old_logp = score_all(policy, rollout, args) if args.updates > 1 else None
        for rows in torch.arange(len(rewards), device=policy.device).chunk(args.updates):
            # A slice of contiguous rows: whole groups, because --updates divides --prompts.
            stats = train_step(
                policy, optimizer, take(rollout, rows), rewards[rows], loss_fn, args.group_size,
                temperature=args.temperature, micro_batch=args.micro_batch,
                grad_clip=args.grad_clip, old_logp=None if old_logp is None else old_logp[rows],
                ref_logp=None if ref_logp is None else ref_logp[rows])
            if stats["bad"]:                           # a NaN or infinite gradient: nothing moved
                tqdm.write(complain(step, stats, rollout, rows))
                break

        # 3. Say what happened, and save.
        #    Reward first, loss last: at one update a rollout the loss says next to nothing.
        line = facts(step, task, problems, rollout, rewards, args.group_size)
        line |= {name: value for name, value in stats.items() if not name.startswith("bad")}
        line |= {"lr": lr} | costs(rollout, sampled - began, time.time() - sampled)
        if rank() == 0:
            write_line(log, line)
            tqdm.write(show(line))
            if step % args.show_every == 0 or step == done + 1:
                tqdm.write(f"    {task.prompt(problems[0])!r} -> {rollout.texts[0]!r}  "
                           f"reward {rewards[0]:.0f}")
            if step == 1 and line["solved"] == 0:
                tqdm.write("no answer of the first batch is correct; where none ever is, RL has "
                           "nothing to learn from. Take easier problems or a stronger model; "
                           "--warm-steps 200 first teaches one to answer Countdown.")
        # One bad batch is bad luck, and is skipped; several in a row will not mend themselves.
        bad = bad + 1 if stats["bad"] else 0
        if bad == BAD_STEPS:
            newest = max((folder / "checkpoints").glob("*.safetensors"), default="none yet")
            raise ValueError(f"{BAD_STEPS} steps in a row gave a NaN or infinite gradient; the "
                             f"last good checkpoint is {newest}: go on from it with --resume "
                             "and a smaller --lr.")
        # All leave after the same step: one that went on alone would wait for the others for ever.
        leave = gather(torch.tensor([float(len(stop))])).any()
        if step % args.save_every == 0 or step == args.steps or leave:
            save_checkpoint(folder / "checkpoints", policy, optimizer, step, rng, generator)
        if leave:
            tqdm.write(f"stopped after step {step}, all saved; go on with: {again}")
            return 128 + max(stop, default=signal.SIGTERM)

    # From here on nothing can be lost: Ctrl-C ends the process at once.
    on_signal(f"stopped after the last step, all saved; make the table with: {again}")
    save_model(policy, tokenizer, folder / "model")
    del policy, reference, optimizer                   # their memory is for the table now
    if args.eval_problems:
        compare(base, folder, *exam, args, device, dtype)
    return 0


def collect(policy, tokenizer, task, args, rng, generator):
    """Draw problems and answers, and judge them -> (problems, rollout, rewards (B,)), where the B
    rows are this process's prompts x G.

    --dynamic-sampling N (DAPO): groups that are all right or all wrong are thrown away and drawn
    again, at most N times; if that was not enough, the last draw fills the batch. It is decided on
    accuracy, never on a shaped reward.
    """
    G, wanted = args.group_size, args.prompts // world()
    # Every process draws the whole list of problems and answers its own part of it, so the batch
    # holds the same problems however many processes share it.
    own = slice(rank() * wanted, (rank() + 1) * wanted)
    # One number from the run's state a step, however many attempts follow.
    rng = random.Random(rng.getrandbits(64))
    problems, rollouts, rewards = [], [], []
    for attempt in range(args.dynamic_sampling + 1):
        drawn = [task.problem(rng) for _ in range(args.prompts)][own]
        prompts = [chat(tokenizer, task.system, task.prompt(x), task.style) for x in drawn]
        # The caches of all answers in flight are what fills a GPU, so --rows bounds them.
        at_once = max(1, args.rows // G)
        rollout = join([sample(policy, tokenizer, prompts[i:i + at_once], G, args.max_new_tokens,
                               args.temperature, generator)
                        for i in range(0, wanted, at_once)], tokenizer.pad_token_id)
        reward = torch.tensor([task.reward(drawn[row // G], text)
                               for row, text in enumerate(rollout.texts)])  # (prompts G,)
        # Without contrast in a group there is nothing to learn from it in most of the losses.
        accuracy = (reward == 1).view(wanted, G).float().mean(1)            # (prompts,)
        mixed = (accuracy > 0) & (accuracy < 1)
        chosen = torch.argsort(~mixed, stable=True)[:wanted - len(problems)]    # mixed groups first
        if attempt < args.dynamic_sampling:
            chosen = chosen[mixed[chosen]]
        # From places of problems to places of their rows.
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

    rollout: this process's B rows; rewards (B,); loss_fn: a function of losses.py with its
    hyperparameters bound. old_logp, ref_logp (B, T): None takes the current policy as the one that
    sampled, and no reference. micro_batch: rows in one chunk, None or 0 for all of them. A NaN or
    infinite gradient leaves weights and optimiser as they were; then stats["bad"] is True and
    stats["bad_rows"] a list of the rows that it came from.
    """
    # The loss needs the log-probabilities of all rows, but what autograd keeps of all rows at once
    # may not fit. So chunks are scored twice: for their values now, with gradient further down.
    chunks = torch.arange(len(rewards), device=rewards.device).split(micro_batch or len(rewards))
    one_chunk = len(chunks) == 1                       # then it is the plain backward, scored once
    with torch.set_grad_enabled(one_chunk):
        scored = [score(policy, rollout, chunk, group_size, temperature) for chunk in chunks]

    # The loss of the whole batch, and its gradient with respect to (B, T) logp and entropy. Under
    # torchrun every process gathers the rows of all, and computes the same.
    logp, entropy = (gather(torch.cat(parts).detach()).requires_grad_() for parts in zip(*scored))
    old_logp = logp if old_logp is None else gather(old_logp)
    ref_logp = None if ref_logp is None else gather(ref_logp)
    mask = gather(rollout.mask)
    loss, stats = loss_fn(logp, old_logp, mask, gather(rewards), group_size, entropy=entropy,
                          ref_logp=ref_logp)
    # Many losses use no entropy: it then has no gradient (None).
    gradients = torch.autograd.grad(loss, [logp, entropy], allow_unused=True)

    # Push this process's rows of it through the model. Sharded gradients are averaged over the
    # processes, ours have to be summed.
    own = slice(rank() * len(rewards), (rank() + 1) * len(rewards))
    gradients = [torch.zeros_like(logp) if g is None else g for g in gradients]
    gradients = [g[own, :rollout.mask.shape[1]] * world() for g in gradients]
    optimizer.zero_grad()
    for i, chunk in enumerate(chunks):
        outputs = scored[i] if one_chunk else score(policy, rollout, chunk, group_size, temperature)
        # What has no gradient is left out, for it would cost as much; but every chunk goes backward
        # at least once, because sharded processes wait for each other there.
        used = [(out, g[chunk]) for out, g in zip(outputs, gradients) if g.any()]
        torch.autograd.backward(*zip(*(used or [(outputs[0], gradients[0][chunk])])))

    # A bad gradient is noticed before it reaches a weight or a moment of AdamW.
    norm = full(torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip)).item()
    stats = stats | {"loss": loss.item(), "grad_norm": norm}
    stats["bad"] = not (math.isfinite(norm) and math.isfinite(stats["loss"]))
    if stats["bad"]:
        finite = torch.stack([x.detach().isfinite().all(1) for x in (logp[own], *gradients)])
        stats["bad_rows"] = (~finite.all(0)).nonzero()[:, 0].tolist()
    else:
        optimizer.step()
    return stats


def warm_start(policy, tokenizer, task, steps, optimizer, prompts=128, seed=0, say=print):
    """Learn to answer at all, in place: cross-entropy on answers that are right by construction.

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
            prompt = chat(tokenizer, task.system, task.prompt(problem), task.style)
            fresh.append((prompt, alike))
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


# ------------------------------------------- a first reading ends here; below: what serves the loop

BAD_STEPS = 3                 # this many steps in a row with a NaN or infinite gradient end the run
# What --resume lets one change: the run's length, what cures a NaN or a lack of memory, and what is
# shown or saved.
FREE = ("steps", "lr", "micro_batch", "rows", "save_every", "show_every", "eval_problems",
        "eval_samples", "eval_temperature", "out", "resume", "checkpoint_activations", "files")


def learning_rate(step, args):
    """Step 1, 2, ... -> its rate. It rises to --lr in --warmup steps, and then falls in a straight
    line, to 0 one step after the last. lr 1, warmup 2, steps 5: 0.5, 1, 0.75, 0.5, 0.25."""
    # Slowly at first, because AdamW's moments are means of few gradients then; and slowly at last,
    # because at a constant rate the weights go on shaking, and runs of other seeds end far apart.
    warmup = max(1, args.warmup)
    rise = step / warmup
    fall = (args.steps + 1 - step) / max(1, args.steps + 1 - warmup)
    return args.lr * min(1.0, rise, fall if args.schedule == "linear" else 1.0)


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def make_optimizer(policy, lr):
    """AdamW without weight decay."""
    # 0.95: a second moment of some twenty steps, as the gradients change with what is sampled.
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=world() == 1)


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal for the matrices of the blocks (Jordan et al. 2024),
    so that rare directions learn as fast as common ones; AdamW at 0.4 of the rate for all else.

    In the same time the warm start gets 1.5 points of Pass@1 further than with AdamW. torch.optim
    has a Muon too, in bf16 only, which a CPU without bf16 units does ten times as slowly.
    """

    def __init__(self, policy, lr):
        # The embedding is a table of rows, not a map: its step is AdamW's.
        matrices = [w for w in policy.model.layers.parameters() if w.dim() == 2]
        chosen = {id(w) for w in matrices}
        super().__init__(matrices, {"lr": lr})
        self.others = torch.optim.AdamW([w for w in policy.parameters() if id(w) not in chosen],
                                        betas=(0.9, 0.95), weight_decay=0.0)

    def zero_grad(self):
        super().zero_grad()
        self.others.zero_grad()

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for w in self.param_groups[0]["params"]:
            momentum = self.state[w].setdefault("momentum", torch.zeros_like(w))
            momentum.lerp_(w.grad, 0.05)               # a mean of some twenty gradients
            update = orthogonal(w.grad.lerp(momentum, 0.95))                # Nesterov's look ahead
            size = 0.2 * max(w.shape) ** 0.5           # an entry moves as far as with AdamW
            w.mul_(1 - 0.1 * lr).sub_(update, alpha=size * lr)
        set_rate(self.others, 0.4 * lr)
        self.others.step()


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


# ------------------------------------------------------------------------------- what is said of it

# On the screen, the informative columns first; log.csv has all of them.
SHOWN = {"step": "5d", "reward": ".3f", "solved": ".2f", "distinct": ".2f", "equal": ".2f",
         "parsed": ".2f", "length": ".1f", "cut": ".2f", "entropy": ".3f", "grad_norm": ".2f",
         "loss": "+.4f", "tokens_s": ".0f"}


def facts(step, task, problems, rollout, rewards, group_size):
    """The columns that say how the policy is doing; the rows of all processes count."""
    def share(x):
        return gather(x.float()).mean().item()

    device = rewards.device
    # Two answers are one where they differ by order or brackets only: 1+2 and (2+1).
    forms = [task.canonical(text) for text in rollout.texts]                # None where none parses
    right = [form if reward == 1 else None for form, reward in zip(forms, rewards.tolist())]
    distinct = [len({*right[i:i + group_size]} - {None}) for i in range(0, len(right), group_size)]
    groups = rewards.view(-1, group_size)
    return {"step": step, "reward": share(rewards), "solved": share((groups == 1).any(1)),
            "distinct": share(torch.tensor(distinct, device=device)),
            "equal": share((groups == groups[:, :1]).all(1)),
            "parsed": share(torch.tensor([form is not None for form in forms], device=device)),
            "length": share(rollout.mask.sum(1)), "cut": share(~rollout.finished)}


def costs(rollout, sampling, updating):
    """Seconds, tokens a second, and the peak of memory so far in GiB (0 where no one tells)."""
    peak = 0
    # On a GPU its own memory is what runs out, elsewhere the process's.
    if rollout.tokens.is_cuda:
        peak = torch.cuda.max_memory_allocated()
    elif resource:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"sample_s": sampling, "update_s": updating, "memory_gb": peak / 2 ** 30,
            "tokens_s": int(rollout.mask.sum()) * world() / (sampling + updating)}


def open_log(path, done):
    """log.csv, cut back to the steps that the checkpoint knows -> a file open for appending."""
    if rank() > 0:
        return None
    lines = path.read_text().splitlines() if done and path.is_file() else []
    # Lines of steps after the checkpoint would otherwise stand twice, once they are made again.
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(line + "\n" for line in lines[:done + 1]))     # head, a line a step
    os.replace(aside, path)
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


def show(line):
    return "  ".join(f"{name} {line[name]:{form}}" for name, form in SHOWN.items() if name in line)


def command(typed, *more):
    """The command that was typed, and `more`, ready to be pasted: under torchrun on this machine,
    and likewise on each of the others."""
    typed = sys.argv[1:] if typed is None else list(typed)
    start, env = [sys.executable], os.environ          # torchrun tells its processes all of this
    if int(env.get("WORLD_SIZE", 1)) > 1:
        start = ["torchrun", f"--nproc_per_node={env.get('LOCAL_WORLD_SIZE', env['WORLD_SIZE'])}"]
    if int(env.get("GROUP_WORLD_SIZE", 1)) > 1:       # machines
        start += [f"--nnodes={env['GROUP_WORLD_SIZE']}", f"--node_rank={env['GROUP_RANK']}",
                  "--rdzv_backend=static", f"--master_addr={env['MASTER_ADDR']}",
                  f"--master_port={env['MASTER_PORT']}"]
    return shlex.join([*start, __file__, *typed, *(flag for flag in more if flag not in typed)])


def on_signal(sentence, wait=False):
    """From now on Ctrl-C and SIGTERM end the process with `sentence`. With `wait` they are only
    noted in the list that is returned, and the loop leaves after its step; but the third does not
    wait (under torchrun each comes twice: from the terminal, and passed on)."""
    # A KeyboardInterrupt is no Exception: on its way to main nothing takes it for an error.
    noted = []

    def handler(number, frame):
        if not wait or len(noted) == 2:
            raise KeyboardInterrupt(number, sentence)
        noted.append(number)

    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, handler)
    return noted


def complain(step, stats, rollout, rows):
    """Which rows made the gradient NaN or infinite, with their text."""
    named = [f"row {int(rows[row])} {rollout.texts[rows[row]][:200]!r}"
             for row in stats["bad_rows"]]
    return (f"step {step} is skipped, weights and optimiser stay as they were: loss "
            f"{stats['loss']}, gradient norm {stats['grad_norm']}, caused by "
            f"{', '.join(named[:3]) or 'no row alone'}" + " and others" * (len(named) > 3))


# -------------------------------------------------------------------------------- several processes

def gather(x):
    """Rows of every process, in process order, padded with 0 to the widest; x itself if alone."""
    if world() == 1:
        return x
    if x.dim() == 2:
        widest = torch.tensor(x.shape[1], device=x.device)
        torch.distributed.all_reduce(widest, torch.distributed.ReduceOp.MAX)
        # What is padded lies off the mask, so 0 will do.
        x = F.pad(x, (0, int(widest) - x.shape[1]))
    # Each process drew answers of its own lengths, and all_gather wants one shape.
    parts = [torch.empty_like(x) for _ in range(world())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def full(x):
    """A sharded tensor, whole; a plain one as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard(policy):
    """PyTorch's own FSDP2: parameters, gradients and optimiser state split over the processes."""
    if world() == 1:
        return policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    # Left to itself, it takes the GPUs of a machine that has some, with --device cpu, too.
    mesh = init_device_mesh(policy.device.type, (world(),))
    # A block at a time, so that one block's gradients travel while the next is computed.
    for block in policy.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    # Weights stay gathered between forwards, so that sampling needs no traffic.
    fully_shard(policy, mesh=mesh, reshard_after_forward=False)
    return policy


def in_first(action):
    """`action` in the first process only -> its result there, None elsewhere. If it raises, no
    process goes on."""
    # The others do not even look at the run's folder: it may lie on the first's machine alone.
    result = error = None
    if rank() == 0:
        try:
            result = action()
        except Exception as raised:
            error = raised
    if gather(torch.tensor([float(error is not None)])).any():
        # Its own error in the first; the others end with it instead of waiting for it.
        raise error or ValueError("the first process ended the run and says why.")
    return result


def from_first(value):
    """The first process's value, in every process; no other has to see its files."""
    values = [value]
    if world() > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


# -------------------------------------------------------------------------- what a run starts from

def start_policy(args, device, dtype):
    """--model as it is, or what --warm-steps made of it or of the tiny policy
    -> (policy, tokenizer, where it lies)."""
    if not args.warm_steps:
        policy, tokenizer = policy_module.load(args.model, device, dtype, args.stop)
        if rank() == 0:
            print(policy_module.says_when_it_stops(policy, tokenizer), flush=True)
        return policy, tokenizer, args.model
    base = Path(args.out) / args.base
    if not (base / "model").is_dir():
        make_base(base, args, device)
    policy, tokenizer = policy_module.load(base / "model", device, dtype, args.stop)
    fill_task_flags(args, tokenizer)
    made = read_flags(base / "flags.json")
    # An older base may lack characters; its answers would then be read as unknown tokens.
    if not args.model and tokenizer.unk_token_id in tokenizer(policy_module.CHARACTERS).input_ids:
        raise ValueError(f"'{base}' was made with another tokenizer, which lacks some of "
                         f"'{policy_module.CHARACTERS}': name another base with --base.")
    # It has learned one task, and is a base for no other.
    for key in ("model", "counts", "high", "targets", "prompt"):
        if made.get(key) != getattr(args, key):        # older bases name no model: the tiny one
            raise ValueError(f"'{base}' was warm-started with {key} {made.get(key)}, not "
                             f"{getattr(args, key)}: name another base with --base.")
    return policy, tokenizer, base / "model"


def make_base(base, args, device):
    """Warm-start --model, or a tiny policy, and save it as the folder `base`, whole or not at
    all."""
    if world() > 1:
        raise ValueError(f"'{base}' is not there yet: make it once in a single process, without "
                         "torchrun.")
    # flags.json and the model are written at the end: a killed warm start leaves no half a base.
    if args.model:
        policy, tokenizer = policy_module.load(args.model, device, stop=args.stop)
        prompts, optimizer = 16, make_optimizer(policy, args.warm_lr)
    else:
        policy, tokenizer = policy_module.tiny(seed=args.seed)
        prompts, optimizer = 128, Muon(policy.to(device), args.warm_lr)
    fill_task_flags(args, tokenizer)
    task = make_task(args)
    # An impossible task is told before anything is written; so is one that teaches wrong answers.
    if not task.reward(*task.example(random.Random(0))):
        raise ValueError(f"--warm-steps imitates bare expressions, which are no answers to "
                         f"--prompt {args.prompt}: choose bare or ask, or --warm-steps 0.")
    base.mkdir(parents=True, exist_ok=True)
    lock = lock_file(base / "lock")                    # until this returns: one process makes it
    warm_start(policy, tokenizer, task, args.warm_steps, optimizer, prompts, args.seed, tqdm.write)
    taught = (*SETTING, "model", "warm_steps", "warm_lr", "seed")
    write_json(base / "flags.json", {key: getattr(args, key) for key in taught})
    policy_module.save(policy, tokenizer, base / "model")


def make_tasks(args, tokenizer, policy):
    """-> (the task to train on, (the task to measure on, its held-out problems))."""
    fill_task_flags(args, tokenizer)
    if getattr(args, "max_len", 0) is None:            # dr_grpo divides by the longest answer
        args.max_len = args.max_new_tokens
    task, judge = evaluation.split(args)
    for each in {task: None, judge: None}:             # in this order, and once if they are one
        notes = evaluation.leave_out_too_long(each, tokenizer, policy, args.max_new_tokens)
        if rank() == 0 and notes:
            print(*notes, sep="\n", flush=True)
    # What the end will need is asked for now: an error there would come after a night.
    exam = judge.held_out_problems(args.eval_problems)
    if args.eval_problems and not exam:
        raise ValueError(f"'{args.eval_data or args.data}' holds no problem to evaluate on: "
                         "--eval-problems 0 does without.")
    task.problem(random.Random(0))                     # none left is told now, too
    return task, (judge, exam)


def open_run(folder, args):
    """Make or reopen runs/NAME and lock it -> the lock. A folder that holds another run is never
    written to."""
    if (folder / "flags.json").is_file():
        if not args.resume:
            raise ValueError(f"'{folder}' holds a run already: go on with --resume, or choose "
                             "another --name.")
        before = read_flags(folder / "flags.json")
        # The union: a flag that this version has and the run's had not, or the other way round.
        for key, now in (before | vars(args)).items():
            if before.get(key) != now and key not in FREE:
                raise ValueError(f"--resume goes on with the run's own flags, but {key} was "
                                 f"{before.get(key)} and is {now} now.")
        for what, mark in before.get("files", {}).items():     # older runs have none
            if args.files[what] != mark:
                raise ValueError(f"--resume goes on with the run's own files, but {what} has "
                                 "changed since it began.")
        # These may change, but change what is learned from here on: it is said.
        for key in ("lr", "steps"):
            if before.get(key) != getattr(args, key):
                falls = key == "steps" and args.schedule == "linear"
                print(f"{key} was {before.get(key)} and is {getattr(args, key)} from here on"
                      + ", and the learning rate falls to 0 there" * falls + ".")
    elif args.resume:
        raise ValueError(f"there is no run to resume in '{folder}': without --resume it is "
                         "started.")
    elif folder.exists() and {file.name for file in folder.iterdir()} - {"lock", "flags.json.tmp"}:
        raise ValueError(f"'{folder}' is not empty and holds no run: choose another --name.")
    folder.mkdir(parents=True, exist_ok=True)
    return lock_file(folder / "lock")


def lock_file(path):
    """Hold `path` until this process ends, however it ends; ValueError if another one holds it."""
    # The system lets go of it with the process, kill -9 included: no lock is ever left behind.
    file = open(path, "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:                                # Windows: no lock
        pass
    except BlockingIOError:
        raise ValueError(f"another process is writing to '{path.parent}': wait for it, or choose "
                         "another --name.")
    return file


def restore(folder, policy, tokenizer, optimizer, rng, generator, args):
    """With --resume, the newest checkpoint -> steps done. Then the run's flags are written down."""
    done = 0
    # What cannot be saved is told now, not after a night.
    in_first(lambda: policy_module.try_to_save(policy, tokenizer, folder / "model"))
    if args.resume:
        done = load_checkpoint(folder / "checkpoints", policy, optimizer, rng, generator)
    if rank() == 0:
        # Only now, when nothing can be refused any more: a run that never began leaves no flags.
        write_json(folder / "flags.json", vars(args))
        if done >= args.steps:
            then = ", only the table is made." if args.eval_problems else "."
            print(f"all {done} steps are done already{then}", flush=True)
    return done


# ------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(folder, policy, optimizer, step, rng, generator):
    """One safetensors file with weights, optimiser state and all random states, on disk whole or
    not at all; the last two are kept. Sharded state is gathered in the first process only."""
    from safetensors.torch import save_file
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, optimiser = get_state_dict(policy, optimizer, options=gathered)
    # Each process draws answers of its own: all of their random states, in process order.
    generators = gather(generator.get_state()[None])                        # (processes, bytes)
    if rank() > 0:
        return
    tensors = {f"weight.{name}": w for name, w in weights.items()} | {"generator": generators}
    for name, moments in optimiser["state"].items():
        tensors |= {f"{key}.{name}": value for key, value in moments.items()}
    facts = {"step": str(step), "rng": json.dumps(rng.getstate())}
    # safetensors notices a file cut short, but no flipped bit.
    facts["digest"] = digest(tensors, facts)
    file = folder / f"{step:07d}.safetensors"
    aside = folder / "next.tmp"                        # what a killed save left in it goes first
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    save_file(tensors, aside / file.name, metadata=facts)
    with open(aside / file.name, "rb+") as written:
        os.fsync(written.fileno())
    # On the disk first, then renamed: after a power cut there is the whole file or none.
    os.replace(aside / file.name, file)
    aside.rmdir()
    files = sorted(folder.glob("*.safetensors"))
    place = files.index(file)                          # later ones are damaged: it began before
    for other in files[:max(0, place - 1)] + files[place + 1:]:
        other.unlink()


def load_checkpoint(folder, policy, optimizer, rng, generator):
    """Restore the newest whole checkpoint in place -> its step, 0 if the run was stopped before the
    first. A damaged one is named, and the one before it is used."""
    facts, tensors = in_first(lambda: newest_whole(folder)) or (None, {})
    facts, generators = from_first((facts, tensors.pop("generator", None)))
    if facts is None:
        return 0
    weights, moments = {}, {}                          # empty in all but the first process
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "weight":
            weights[name] = value
        else:
            moments.setdefault(name, {})[kind] = value
    if from_first({name: w.shape for name, w in weights.items()}) != {
            name: w.shape for name, w in policy.named_parameters()}:
        raise ValueError(f"'{folder}' is of another model than the one the run starts from now.")
    # The first process hands out what it has read; the others hold their own shards only. In two
    # calls: set_state_dict would take the empty `weights` of the others for "no weights at all".
    scattered = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world() > 1)
    optimiser = get_optimizer_state_dict(policy, optimizer)
    optimiser["state"] = moments
    set_model_state_dict(policy, weights, options=scattered)
    set_optimizer_state_dict(policy, optimizer, optimiser, options=scattered)
    version, internal, gauss = json.loads(facts["rng"])
    rng.setstate((version, tuple(internal), gauss))
    # Bit for bit only with as many processes as before: each draws from a state of its own.
    if len(generators) == world():
        generator.set_state(generators[rank()].clone())
    elif rank() == 0:
        print(f"the run had {len(generators)} processes and has {world()} now: it goes on with "
              "other draws.")
    return int(facts["step"])


def newest_whole(folder):
    """(facts, tensors) of the newest checkpoint that is not damaged; None if there is none yet."""
    from safetensors import SafetensorError, safe_open
    damaged = []
    # The last two are kept, so a damaged one costs --save-every steps, not the run.
    for file in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            with safe_open(file, framework="pt") as opened:
                facts = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            if facts.pop("digest") != digest(tensors, facts):
                raise ValueError("its checksum is wrong")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append(f"{file.name} is damaged ({error})")
            continue
        if damaged:
            print(f"{', '.join(damaged)}; going on from {file.name}.", file=sys.stderr)
        return facts, tensors
    if damaged:
        raise ValueError(f"'{folder}' holds no usable checkpoint: {', '.join(damaged)}. Start anew "
                         "under another --name.")


def digest(tensors, facts):
    """SHA-256 over names, shapes, bytes and the facts beside them: a flipped bit is noticed."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        total.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def save_model(policy, tokenizer, path):
    """The trained policy as a folder that transformers opens; sharded weights are gathered."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)
    if rank() == 0:
        policy_module.save(policy, tokenizer, path, weights)


def compare(base, folder, task, problems, args, device, dtype):
    """The table at the end: the base, this run, and every finished run beside it that was measured
    alike, on the same held-out problems. What was measured before is read from eval.json.

    The processes share the problems out. Only the first has the run's folder; the others begin with
    the base and are sent the weights."""
    # All that a number in the table depends on, apart from the model and the problems.
    setting = {key: getattr(args, key) for key in SETTING} | {
        "n": args.eval_samples, "temperature": args.eval_temperature}
    # Records are kept under a fingerprint of the weights that they are of: what has not changed is
    # not measured again, and what has changed is.
    beside = from_first(in_first(lambda: measured_alike(folder.parent, setting, problems,
                                                        args.files["the base"])))
    models = {}
    for name, where in (("base", base), (args.name, folder / "model")):
        known, mark = beside.pop(name, None), from_first(evaluation.fingerprint(where))
        if known is None or known["fingerprint"] != mark:
            policy, tokenizer = policy_module.load(where if rank() == 0 else base, device,
                                                   dtype, args.stop)
            # The others may stand on machines that do not see the run's folder.
            for w in policy.parameters() if world() > 1 else []:
                torch.distributed.broadcast(w.detach(), 0)
            # The same seed for every model: the same chance for all.
            generator = torch.Generator(policy.device).manual_seed(0)
            records = evaluation.evaluate(policy, tokenizer, task, problems, args.eval_samples,
                                          args.max_new_tokens, args.eval_temperature, generator,
                                          args.rows)
            known = {"fingerprint": mark, "loss": args.loss, "records": records}
            del policy                                 # one model at a time
        models[name] = known
    if rank() > 0:
        return
    write_json(folder / "eval.json", {"setting": setting, "flags": vars(args), "models": models})
    shown = {"base": models["base"]} | beside | {args.name: models[args.name]}
    summaries = evaluation.summary({name: model["records"] for name, model in shown.items()})
    print(f"{args.task}: {len(problems)} held-out problems, {args.eval_samples} samples each, "
          f"temperature {args.eval_temperature:g}")
    print(evaluation.table(summaries))
    # A picture for eyes; a pipe or a file gets numbers only.
    if sys.stdout.isatty():
        print(evaluation.chart(summaries))
    print(f"log, model and table are in {folder}")
    other = "diffsmooth" if args.loss == "grpo" else "grpo"
    # Someone who has typed one command should read its table against the other.
    if other not in (model["loss"] for model in beside.values()):
        print(f"To read it against {other}, on the same problems: python train.py --loss {other}")


def measured_alike(out, setting, problems, base):
    """{name: {"fingerprint", "loss", "records"}} of the base and of every finished run in `out`
    with this task, number of samples, temperature, base (a fingerprint) and these problems."""
    wanted, found = json.dumps([setting, [list(problem) for problem in problems]]), {}
    for file in sorted(out.glob("*/eval.json")):
        try:
            report = json.loads(file.read_text())
            asked = [record["problem"] for record in report["models"]["base"]["records"]]
            alike = json.dumps([report["setting"], asked]) == wanted
            if alike and report["models"]["base"]["fingerprint"] == base:
                found |= report["models"]
        except (ValueError, KeyError, TypeError, OSError):     # another program's, or cut in half
            continue
    return found


# --------------------------------------------------------------------------------------- the flags

def variants():
    """{name: function} of every loss in losses.py."""
    # A loss is told from a helper by its first two arguments.
    return {name: f for name, f in inspect.getmembers(losses, inspect.isfunction)
            if not name.startswith("_")
            and list(inspect.signature(f).parameters)[:2] == ["logp", "old_logp"]}


def hyperparameters(loss):
    """{name: default} of a loss function's own options, read from its signature."""
    # entropy and ref_logp belong to the batch; what else is given by name only is an option.
    parameters = inspect.signature(variants()[loss]).parameters.items()
    return {name: p.default for name, p in parameters
            if p.kind is p.KEYWORD_ONLY and name not in ("entropy", "ref_logp")}


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], add_help=False,
                    usage="python train.py --loss LOSS [flags]")
    flag = parser.add_argument_group("what is optimised").add_argument
    flag("--loss", default="diffsmooth", help="one of: " + ", ".join(variants()))
    flag("--model", help="the base: a folder or hub name; without it, a tiny policy, made once")
    flag("--base", default="base", help="the warm-started policy's folder in --out; one a task")
    flag("--warm-steps", type=int,
         help="steps of cross-entropy that make it; 500, with --model 0: that starts as it is")
    flag("--warm-lr", type=float,
         help="their largest learning rate; 1e-2 (Muon), with --model 2e-4 (AdamW)")
    flag("--stop", nargs="+", default=[], help="with --model: further tokens that end an answer")
    # The loss's own options: --help shows groups in the order in which they are made.
    own = parser.add_argument_group()                  # filled in below
    add_task_flags(parser)
    flag = parser.add_argument_group("one step").add_argument
    flag("--prompts", type=int, default=32, help="problems a step")
    flag("--group-size", type=int, default=16, help="answers a problem (G)")
    flag("--temperature", type=float, default=1.0, help="of sampling, and of every log-probability")
    flag("--dynamic-sampling", type=int, default=0,
         help="redraw groups that are all right or all wrong, at most this often")
    flag("--updates", type=int, default=1, help="optimiser steps a rollout, each on a part")
    flag("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    flag = parser.add_argument_group("how far and how fast").add_argument
    flag("--steps", type=int, default=1200, help="rollouts")
    flag("--lr", type=float, default=1e-4, help="largest learning rate")
    flag("--warmup", type=int, default=10, help="steps in which it rises to --lr")
    flag("--schedule", choices=["linear", "constant"], default="linear",
         help="then it falls to 0 at --steps, or stays")
    flag = parser.add_argument_group("the table at the end").add_argument
    flag("--eval-problems", type=int, default=512, help="held-out problems; 0: no table")
    flag("--eval-samples", type=int, default=64, help="answers to each of them")
    flag("--eval-temperature", type=float, default=0.7, help="of these answers")
    flag("--eval-data", help="math: measure on this file, not on a held-out tenth of --data")
    flag = parser.add_argument_group("the run").add_argument
    flag("--name", help="its folder is OUT/NAME; without it, the loss's name")
    flag("--out", default="runs", help="the folder of runs")
    flag("--resume", action="store_true", help="go on from the last checkpoint")
    flag("--save-every", type=int, default=50, help="steps between checkpoints")
    flag("--show-every", type=int, default=25, help="steps between two answers shown in full")
    flag("--seed", type=int, default=0, help="of problems and answers")
    flag = parser.add_argument_group("the machine; less memory: the first two").add_argument
    flag("--micro-batch", type=int, default=0, help="rows in one forward and backward; 0: all")
    flag("--rows", type=int, default=1024, help="answers sampled at once")
    flag("--checkpoint-activations", action="store_true",
         help="keep a layer's input only, compute the rest again: for long answers, a third slower "
         "at most")
    flag("--device", help="cuda, cpu or mps; without it, cuda where there is one")

    # Which loss it is decides which other flags there are.
    # Their names and defaults are read from the function's signature, so a new loss needs no line.
    known, _ = parser.parse_known_args(argv)
    if known.loss not in variants():
        raise ValueError(f"unknown loss '{known.loss}'; these exist: {', '.join(variants())}.")
    options = hyperparameters(known.loss)
    own.title = f"options of --loss {known.loss}, explained in losses.{known.loss}"
    for name, default in options.items():
        budget = name == "max_len"                     # dr_grpo's: known once the task is
        own.add_argument(f"--{name}", type=type(default), default=None if budget else default,
                         help="without it, --max-new-tokens" if budget else type(default).__name__)
    parser.add_argument("-h", "--help", action="help", help="show this; with --loss, its options")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        has = ", ".join(f"--{name}" for name in options) or "none"
        raise ValueError(f"'{unknown[0]}' is not a flag, nor an option of loss {known.loss}, which "
                         f"has: {has}.")
    args.name = args.name or args.loss
    if args.warm_steps is None:
        args.warm_steps = 0 if args.model else 500
    if args.warm_lr is None:
        args.warm_lr = 2e-4 if args.model else 1e-2
    check(args)
    return args


def check(args):
    """Contradictions and impossible values, told before anything is written."""
    def need(ok, message):
        if not ok:
            raise ValueError(message)

    for name in ("prompts", "steps", "updates", "save_every", "show_every",
                 "eval_samples", "rows"):
        need(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1.")
    for name in ("dynamic_sampling", "warmup", "micro_batch", "warm_steps", "eval_problems"):
        need(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must not be negative.")
    need(args.model or args.warm_steps, "--warm-steps must be at least 1 without --model.")
    need(args.group_size >= 2, "--group-size must be at least 2: with one answer a group there is "
         "nothing to compare it with.")
    need(0 < args.temperature < math.inf,
         "--temperature must be above 0: training scores what was sampled.")
    need(0 < args.eval_temperature < math.inf, "--eval-temperature must be above 0.")
    need(args.model or args.task == "countdown" and args.prompt in (None, "bare"),
         "the tiny policy knows digits and operators only: --task math and --prompt other than "
         "bare need --model.")
    need(args.task == "countdown" or not args.warm_steps,
         "--warm-steps imitates answers that are right by construction; --task math has none.")
    need(0 < args.lr < math.inf and args.grad_clip > 0, "--lr and --grad-clip must be above 0.")
    need(0 < args.warm_lr < math.inf, "--warm-lr must be above 0.")
    need(0 <= args.seed < 2 ** 63, "--seed must be from 0 to 2**63 - 1.")
    need(args.name != "base" and (args.name != args.base or not args.warm_steps),
         "--name and --base must differ, and no run is called base: it is kept apart.")
    need(args.task == "math" or args.eval_data is None, "--eval-data belongs to --task math.")
    need(args.prompts % args.updates == 0,
         f"--updates {args.updates} does not divide --prompts {args.prompts}.")
    check_loss(args)


def check_loss(args):
    """A trial call on one group: the loss itself knows best what its options may be."""
    own = {name: getattr(args, name) for name in hyperparameters(args.loss)
           if getattr(args, name) is not None}
    logp = torch.full((args.group_size, 1), -1.0)      # one token an answer
    rewards = (torch.arange(args.group_size) == 0).float()
    loss, _ = variants()[args.loss](logp, logp, logp < 0, rewards, args.group_size, entropy=-logp,
                                    ref_logp=logp, **own)
    if not loss.isfinite():
        raise ValueError(f"the options of --loss {args.loss} make its value {loss}.")


def main(argv=None):
    """Run, and turn what a user can get wrong into one sentence and exit code 2."""
    try:
        evaluation.any_character()
        on_signal(f"stopped before the first step; start again with: {command(argv)}")
        return run(parse(argv), argv)
    except KeyboardInterrupt as interrupt:             # from on_signal
        number, sentence = interrupt.args
        print(sentence, file=sys.stderr)
        return 128 + number
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    evaluation.leave(main())
