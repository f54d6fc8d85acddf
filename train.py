"""The loop, written by hand: sample -> reward -> loss -> update.

    python train.py --loss diffsmooth            # tiny policy, Countdown, two CPU cores, minutes
    python train.py --loss diffsmooth --model Qwen/Qwen2.5-3B-Instruct --gamma_p 0.03 --gamma_n 0.01

One step draws G answers to each of some prompts, gives each answer 1 or 0, calls one function of losses.py on the whole
batch, and moves the weights. Without --model, the start is a tiny policy that first learns to answer at all, by cross-
entropy on solver-made answers; it is made once and kept in runs/base.

The update is exact for every chunk size, because the chain rule is cut at the log-probabilities (`train_step`): the loss
sees the whole batch, its gradient with respect to (B, T) log-probabilities is a small array, and that array is pushed
through the model a chunk of rows at a time. `--micro-batch` is the one memory knob. Under torchrun every process computes
the same loss on the gathered arrays and pushes its own rows through.

Letters: B rows = prompts x G, the rows of one prompt contiguous; P prompt length; T response length; D width.
"""
import argparse
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
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import losses
import policy as policy_module
from eval import Parser, evaluate, explain, pick_device, read_flags, summary, table, write_json
from policy import token_logprobs
from rewards import SETTING, add_task_flags, fill_task_flags, make_task
from sample import Rollout, chat, encode, sample

BUCKETS = 4                   # groups of like answer length in one forward pass
BAD_STEPS = 3                 # this many steps in a row with a NaN or infinite gradient end the run
# What may be another when a run goes on: its length, what cures a NaN or a lack of memory, and what is shown or saved.
FREE = ("steps", "lr", "micro_batch", "rows", "save_every", "show_every", "eval_problems", "eval_samples", "out",
        "resume")


# ------------------------------------------------------------------------------------------------------------- one step

def score(policy, rollout, rows, group_size, temperature):
    """Log-probability and entropy of the rows' sampled tokens -> two (len(rows), T) fp32, 0 off the mask; differentiable.

    Each prompt is read once, and the answers of its group attend to its keys and values; an answer that was given several
    times is read once, too. Answers go through the model in buckets of like length, so that little padding is computed.
    Padding never reaches the head.
    """
    group, row_prompt = torch.unique(rows // group_size, return_inverse=True)   # row_prompt: index into the prompts here
    P = rollout.prompt_mask.shape[1]
    prompt, prompt_mask = rollout.tokens[group * group_size, :P], rollout.prompt_mask[group * group_size]
    padded, cache = not prompt_mask.all(), policy.new_cache()
    last = policy(prompt, prompt_mask if padded else None, cache)[:, -1]        # (prompts, D) predicts first tokens
    said = torch.where(rollout.mask[rows], rollout.response[rows], -1)          # (rows, T)
    said = torch.cat([row_prompt[:, None], said], dim=1).cpu()                  # not every device can compare rows
    said, answer = (x.to(rows.device) for x in torch.unique(said, dim=0, return_inverse=True))
    row_prompt, response, mask = said[:, 0], said[:, 1:].clamp(min=0), said[:, 1:] >= 0     # of the different answers
    hidden, target, place = [], [], []
    # As many buckets for 16 like answers as for 16 different ones (some are empty): sharded processes forward alike.
    for bucket in mask.sum(1).argsort(descending=True).tensor_split(min(BUCKETS, len(rows))):    # indices, longest first
        longest = int(mask[bucket].any(0).sum())
        fed = response[bucket, :max(1, longest - 1)]   # the last token is only predicted; never an empty forward
        seen = F.pad(prompt_mask[row_prompt[bucket]], (0, fed.shape[1]), value=True) if padded else None
        later = policy(fed, seen, cache.select(row_prompt[bucket]))[:, :longest - 1]    # (bucket, longest - 1, D)
        row, column = mask[bucket, :longest].nonzero(as_tuple=True)
        hidden.append(torch.cat([last[row_prompt[bucket], None], later], dim=1)[row, column])   # (tokens, D)
        target.append(response[bucket[row], column])
        place.append(torch.stack([bucket[row], column]))
    row, column = torch.cat(place, dim=1)
    flat = token_logprobs(torch.cat(hidden), policy.head, torch.cat(target), temperature)
    return [torch.zeros(mask.shape, device=rows.device).index_put((row, column), values)[answer] for values in flat]


def train_step(policy, optimizer, rollout, rewards, loss_fn, group_size, *, temperature=1.0, micro_batch=None,
               grad_clip=1.0, old_logp=None, ref_logp=None):
    """One optimiser step on the whole of `rollout` -> stats (flat dict of floats).

    rollout: this process's B rows; rewards (B,); loss_fn: a function of losses.py with its hyperparameters bound.
    old_logp, ref_logp (B, T): None takes the current policy as the sampling one, and no reference. micro_batch: rows in one
    chunk; None is all. A NaN or infinite gradient leaves weights and optimiser as they were; stats["bad"] then says so.
    """
    chunks = torch.arange(len(rewards), device=rewards.device).split(micro_batch or len(rewards))
    whole = len(chunks) == 1                           # one chunk: the plain backward, without a second forward
    with torch.set_grad_enabled(whole):
        scored = [score(policy, rollout, chunk, group_size, temperature) for chunk in chunks]
    logp, entropy = (gather(torch.cat(parts).detach()).requires_grad_() for parts in zip(*scored))
    old_logp = logp if old_logp is None else gather(old_logp)
    ref_logp = None if ref_logp is None else gather(ref_logp)
    mask = gather(rollout.mask)
    loss, stats = loss_fn(logp, old_logp, mask, gather(rewards), group_size, entropy=entropy, ref_logp=ref_logp)
    gradients = torch.autograd.grad(loss, [logp, entropy], allow_unused=True)
    gradients = [torch.zeros_like(logp) if g is None else g for g in gradients]
    # Every process backpropagates its own rows. Sharded gradients are averaged over processes, ours have to be summed.
    mine = slice(rank() * len(rewards), (rank() + 1) * len(rewards))
    gradients = [g[mine, :rollout.mask.shape[1]] * world() for g in gradients]
    optimizer.zero_grad()
    for i, chunk in enumerate(chunks):
        outputs = scored[i] if whole else score(policy, rollout, chunk, group_size, temperature)
        used = [(out, g[chunk]) for out, g in zip(outputs, gradients) if out.requires_grad and g.any()] or \
               [(outputs[0], gradients[0][chunk])]
        torch.autograd.backward(*zip(*used))
    norm = full(torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip)).item()
    stats = stats | {"loss": loss.item(), "grad_norm": norm,
                     "entropy": (torch.where(mask, entropy.detach(), 0).sum() / mask.sum()).item()}
    stats["bad"] = not (math.isfinite(norm) and math.isfinite(stats["loss"]))
    if stats["bad"]:
        stats["bad_rows"] = culprits(policy, rollout, gradients, group_size, temperature)
    else:
        optimizer.step()
    return stats


def culprits(policy, rollout, gradients, group_size, temperature):
    """The rows to blame for a NaN or infinite step -> list: those whose log-probability is bad; else those whose gradient in
    it is; else those that, pushed through the model alone, give bad gradients in the weights."""
    bad = lambda x: ~x.isfinite().all(1)               # (B, T) -> (B,)
    alone = []
    for row in torch.arange(len(rollout.mask), device=rollout.mask.device).split(1):
        policy.zero_grad()
        outputs = score(policy, rollout, row, group_size, temperature)
        torch.autograd.backward(outputs, [g[row].nan_to_num() for g in gradients])
        norm = full(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
        alone.append(torch.stack([bad(outputs[0])[0], bad(gradients[0])[row][0], ~norm.isfinite()]))
    policy.zero_grad()
    symptoms = torch.stack(alone).T                    # (3, B), the earlier in the chain first
    return next((rows.nonzero()[:, 0].tolist() for rows in symptoms if rows.any()), [])


# ------------------------------------------------------------------------------------------------- several processes

def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather(x):
    """Rows of every process, in process order, padded with 0 to the widest; x itself when there is one process."""
    if world() == 1:
        return x
    if x.dim() == 2:
        widest = torch.tensor(x.shape[1], device=x.device)
        torch.distributed.all_reduce(widest, torch.distributed.ReduceOp.MAX)
        x = F.pad(x, (0, int(widest) - x.shape[1]))
    parts = [torch.empty_like(x) for _ in range(world())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def full(x):
    """A sharded tensor, whole; a plain one as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard(policy):
    """PyTorch's own FSDP2: parameters, gradients and optimiser state split over the processes."""
    from torch.distributed.fsdp import fully_shard
    for block in policy.model.layers:
        fully_shard(block, reshard_after_forward=False)
    fully_shard(policy, reshard_after_forward=False)   # weights stay gathered between forwards: sampling needs no traffic
    return policy


# ---------------------------------------------------------------------------------------------------------- warm start

def demonstrations(tokenizer, prompts, answers, stop_id, device):
    """(prompt, answer) strings as a Rollout, so that cross-entropy runs through the same step as everything else."""
    prompt, prompt_mask = encode(tokenizer, prompts, device)
    ids = [torch.tensor([*line, stop_id]) for line in tokenizer(answers, add_special_tokens=False).input_ids]
    mask = pad_sequence([torch.ones(len(line), dtype=torch.bool) for line in ids], batch_first=True).to(device)
    response = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id).to(device)      # (B, T)
    return Rollout(torch.cat([prompt, response], dim=1), prompt_mask, response, mask,
                   torch.zeros(mask.shape, device=device), answers, torch.ones(len(ids), dtype=torch.bool, device=device))


def warm_start(policy, tokenizer, task, steps, batch=256, lr=2e-3, seed=0, say=print):
    """Cross-entropy on `steps` batches of random solver-made answers; the policy learns to answer at all, in place."""
    rng, start = random.Random(seed), time.time()
    optimizer = make_optimizer(policy, lr, weight_decay=0.1)
    ones = torch.ones(batch, device=policy.device)
    for step in tqdm(range(1, steps + 1), desc="warm start", disable=not sys.stderr.isatty()):
        pairs = [task.example(rng) for _ in range(batch)]
        prompts = [chat(tokenizer, task.system, task.prompt(problem), task.style) for problem, _ in pairs]
        rollout = demonstrations(tokenizer, prompts, [answer for _, answer in pairs], policy.stop_ids[0], policy.device)
        for group in optimizer.param_groups:           # 20 steps up, then a cosine down to a twentieth
            group["lr"] = lr * min(1, step / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
        stats = train_step(policy, optimizer, rollout, ones, losses.sft, 1)
        if step == 1 or step % 25 == 0 or step == steps:
            say(f"warm start {step:4d}/{steps}  cross-entropy {stats['loss']:.3f} nats/token  {time.time() - start:.0f} s")


def make_optimizer(policy, lr, weight_decay=0.0):
    """AdamW; weight decay on matrices only."""
    groups = [{"params": [w for w in policy.parameters() if w.dim() == 2], "weight_decay": weight_decay},
              {"params": [w for w in policy.parameters() if w.dim() != 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=world() == 1)


# -------------------------------------------------------------------------------------------------------------- rollouts

def join(rollouts, pad):
    """Several rollouts as one: prompts padded on the left to the widest, responses on the right."""
    P, T = (max(getattr(r, name).shape[1] for r in rollouts) for name in ("prompt_mask", "mask"))
    left = lambda x, value: F.pad(x, (P - x.shape[1], 0), value=value)
    right = lambda x, value: F.pad(x, (0, T - x.shape[1]), value=value)
    prompt = torch.cat([left(r.tokens[:, :r.prompt_mask.shape[1]], pad) for r in rollouts])
    response = torch.cat([right(r.response, pad) for r in rollouts])
    return Rollout(torch.cat([prompt, response], dim=1), torch.cat([left(r.prompt_mask, False) for r in rollouts]), response,
                   torch.cat([right(r.mask, False) for r in rollouts]), torch.cat([right(r.logp, 0.0) for r in rollouts]),
                   [text for r in rollouts for text in r.texts], torch.cat([r.finished for r in rollouts]))


def take(rollout, rows):
    """The rollout of `rows` alone."""
    fields = {name: value[rows] for name, value in vars(rollout).items() if name != "texts"}
    return Rollout(**fields, texts=[rollout.texts[row] for row in rows.tolist()])


def draw(task, fixed, rng):
    """A problem to train on: a new one, or with --fixed-problems N one of N, number i being what the random seed i gives."""
    return task.problem(random.Random(rng.randrange(fixed)) if fixed else rng)


def collect(policy, tokenizer, task, args, rng, generator):
    """Problems, answers, rewards -> (problems, rollout, rewards (B,)), B = this process's prompts x G.

    --dynamic-sampling N (DAPO): groups that are all right or all wrong are thrown away and redrawn, at most N times; if
    that was not enough the last draw fills the batch. Decided on accuracy, never on a shaped reward.
    """
    G, mine = args.group_size, args.prompts // world()
    rng = random.Random(rng.getrandbits(64))           # one draw from the run's state a step, however many attempts follow
    problems, rollouts, rewards = [], [], []
    for attempt in range(args.dynamic_sampling + 1):
        drawn = [draw(task, args.fixed_problems, rng) for _ in range(args.prompts)][rank() * mine:(rank() + 1) * mine]
        prompts = [chat(tokenizer, task.system, task.prompt(problem), task.style) for problem in drawn]
        at_once = max(1, args.rows // G)               # prompts in flight: their caches are what fills a GPU
        rollout = join([sample(policy, tokenizer, prompts[i:i + at_once], G, args.max_new_tokens, args.temperature, generator)
                        for i in range(0, mine, at_once)], tokenizer.pad_token_id)
        reward = torch.tensor([task.reward(drawn[row // G], text) for row, text in enumerate(rollout.texts)])
        accuracy = (reward == 1).view(mine, G).float().mean(1)                  # (prompts,)
        mixed = (accuracy > 0) & (accuracy < 1)
        order = torch.argsort(~mixed, stable=True)[:mine - len(problems)]       # mixed groups first
        if attempt < args.dynamic_sampling:
            order = order[mixed[order]]
        rows = (order[:, None] * G + torch.arange(G)).flatten()
        problems += [drawn[i] for i in order.tolist()]
        rollouts.append(take(rollout, rows.to(policy.device)))
        rewards.append(reward[rows])
        if len(problems) == mine:
            break
    return problems, join(rollouts, tokenizer.pad_token_id), torch.cat(rewards).to(policy.device)


# ----------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(folder, policy, optimizer, step, rng, generator):
    """One safetensors file: weights, optimiser state, all random states; written aside, fsynced, renamed; two are kept."""
    from safetensors.torch import save_file
    tensors = {f"weight.{name}": full(w.detach()).cpu() for name, w in policy.named_parameters()}
    for name, w in policy.named_parameters():
        for key, value in optimizer.state[w].items():
            tensors[f"{key}.{name}"] = full(value).cpu()
    tensors["generator"] = gather(generator.get_state()[None])                  # (processes, bytes)
    if rank() > 0:
        return
    facts = {"step": str(step), "rng": json.dumps(rng.getstate())}
    facts["digest"] = digest(tensors, facts)
    file = Path(folder) / f"{step:07d}.safetensors"
    aside = file.with_name("next.tmp")                 # a folder: whatever a killed save leaves in it goes with the next one
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, aside / file.name, metadata=facts)
    with open(aside / file.name, "rb") as written:
        os.fsync(written.fileno())
    os.replace(aside / file.name, file)
    aside.rmdir()
    files = sorted(file.parent.glob("*.safetensors"))
    at = files.index(file)                             # later ones are damaged: this run went on from before them
    for other in files[:max(0, at - 1)] + files[at + 1:]:
        other.unlink()


def load_checkpoint(folder, policy, optimizer, rng, generator):
    """Restore the newest whole checkpoint in place -> its step, 0 if the run was stopped before the first. A damaged one is
    named, and the one before it is used."""
    from safetensors import SafetensorError, safe_open
    damaged = []
    for file in sorted(Path(folder).glob("*.safetensors"), reverse=True):
        try:
            with safe_open(file, framework="pt") as opened:
                facts, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
            if facts.pop("digest") != digest(tensors, facts):
                raise ValueError("its checksum is wrong")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append(f"{file.name} is damaged ({error})")
            continue
        if damaged:
            print(f"{', '.join(damaged)}; going on from {file.name}.", file=sys.stderr)
        if len(tensors["generator"]) != world():
            raise ValueError(f"the run has {len(tensors['generator'])} processes: it cannot go on with {world()}.")
        if any(tensors[f"weight.{name}"].shape != w.shape for name, w in policy.named_parameters()):
            raise ValueError(f"{file} is of another model than the one the run starts from now.")
        for name, w in policy.named_parameters():
            state = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            place(w.data, tensors[f"weight.{name}"])
            optimizer.state[w] = {"step": state["step"]} | {
                key: place(torch.zeros_like(w.data), state[key]) for key in ("exp_avg", "exp_avg_sq")}
        version, internal, gauss = json.loads(facts["rng"])
        rng.setstate((version, tuple(internal), gauss))
        generator.set_state(tensors["generator"][rank()].clone())
        return int(facts["step"])
    if damaged:
        raise ValueError(f"'{folder}' holds no usable checkpoint: {', '.join(damaged)}. Start anew under another --name.")
    return 0


def place(destination, whole):
    """Write a whole tensor into a plain or sharded one; return it."""
    if hasattr(destination, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        whole = distribute_tensor(whole.to(destination.device), destination.device_mesh, destination.placements)
    return destination.copy_(whole)


def digest(tensors, facts):
    """SHA-256 over names, shapes and bytes, and over the facts beside them: a flipped bit is noticed."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        total.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------------------- the flags

def variants():
    """{name: function} of every loss in losses.py."""
    return {name: f for name, f in inspect.getmembers(losses, inspect.isfunction)
            if not name.startswith("_") and list(inspect.signature(f).parameters)[:2] == ["logp", "old_logp"]}


def hyperparameters(loss):
    """{name: default} of a loss function's own options, read from its signature."""
    return {name: p.default for name, p in inspect.signature(variants()[loss]).parameters.items()
            if p.kind is p.KEYWORD_ONLY and name not in ("entropy", "ref_logp")}


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--loss", default="diffsmooth", help="one of: " + ", ".join(variants()) + "; its hyperparameters are flags too")
    flag("--model", help="start from this folder or hub name; default: the tiny policy of runs/base")
    add_task_flags(parser)
    flag("--eval-data", help="math: evaluate on this file; default: a tenth of --data that is held out")
    flag("--prompts", type=int, default=32, help="problems a step")
    flag("--fixed-problems", type=int, help="train on this many problems, again and again; default: every step draws anew")
    flag("--group-size", type=int, default=16, help="answers a problem (G)")
    flag("--temperature", type=float, default=1.0, help="of sampling, and of every log-probability")
    flag("--dynamic-sampling", type=int, default=0, help="redraw groups that are all right or all wrong, at most this often")
    flag("--steps", type=int, default=1000, help="rollouts")
    flag("--updates", type=int, default=1, help="optimiser steps a rollout, each on its share of the prompts")
    flag("--lr", type=float, default=1e-4)
    flag("--warmup", type=int, default=10, help="steps over which the learning rate rises to --lr")
    flag("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    flag("--micro-batch", type=int, default=0, help="rows in one forward and backward: lower it when memory runs out; 0: all")
    flag("--base", default="base", help="the warm-started policy, made once as runs/BASE")
    flag("--warm-steps", type=int, default=600, help="warm start: steps of cross-entropy")
    flag("--eval-problems", type=int, default=512, help="held-out problems in the table at the end; 0: no table")
    flag("--eval-samples", type=int, default=64, help="answers to each of them")
    flag("--rows", type=int, default=1024, help="answers sampled at once: lower it when memory runs out")
    flag("--name", help="the run's folder is runs/NAME; default: the loss's name")
    flag("--out", default="runs", help="the folder of runs")
    flag("--resume", action="store_true", help="go on from the last checkpoint of runs/NAME")
    flag("--save-every", type=int, default=50, help="steps between checkpoints")
    flag("--show-every", type=int, default=25, help="steps between two answers shown in full")
    flag("--seed", type=int, default=0)
    flag("--device", help="default: cuda, else mps, else cpu")
    known, _ = parser.parse_known_args(argv)
    if known.loss not in variants():
        raise ValueError(f"unknown loss '{known.loss}'; these exist: {', '.join(variants())}.")
    own = parser.add_argument_group(f"of {known.loss}")
    for name, default in hyperparameters(known.loss).items():
        # dr_grpo divides by the generation budget, which is known once the task is
        own.add_argument(f"--{name}", type=type(default), default=None if name == "max_len" else default)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not a flag, nor an option of loss {known.loss}, which has: "
                         + (", ".join(f"--{name}" for name in hyperparameters(known.loss)) or "none") + ".")
    args.name = args.name or args.loss
    check(args)
    return args


def check(args):
    """Contradictions and impossible values, told before anything is written."""
    def need(ok, message):
        if not ok:
            raise ValueError(message)
    for name in ("prompts", "steps", "updates", "save_every", "show_every", "warm_steps", "eval_samples", "rows"):
        need(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1.")
    for name in ("dynamic_sampling", "warmup", "micro_batch", "eval_problems"):
        need(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must not be negative.")
    need(args.fixed_problems is None or args.fixed_problems >= 1, "--fixed-problems must be at least 1.")
    need(args.group_size >= 2, "--group-size must be at least 2: with one answer a group there is nothing to compare it with.")
    need(0 < args.temperature < math.inf, "--temperature must be above 0: training scores what was sampled.")
    need(args.model or args.task == "countdown" and args.prompt in (None, "bare"),
         "the tiny policy knows digits and operators only: --task math and --prompt other than bare need --model.")
    need(0 < args.lr < math.inf and args.grad_clip > 0, "--lr and --grad-clip must be above 0.")
    need(0 <= args.seed < 2 ** 63, "--seed must be from 0 to 2**63 - 1.")
    need(args.name != args.base or args.model, "--name and --base must differ: the start is kept apart from the runs.")
    need(args.task == "math" or args.eval_data is None, "--eval-data belongs to --task math.")
    need(args.prompts % args.updates == 0, f"--updates {args.updates} does not divide --prompts {args.prompts}.")
    need(args.prompts // args.updates % world() == 0,
         f"{world()} processes do not divide the {args.prompts // args.updates} prompts of an update.")
    # A trial call on one group: the loss itself knows best what its options may be.
    own = {name: getattr(args, name) for name in hyperparameters(args.loss) if getattr(args, name) is not None}
    batch, rewards = torch.full((args.group_size, 1), -1.0), (torch.arange(args.group_size) == 0).float()
    loss, _ = variants()[args.loss](batch, batch, batch < 0, rewards, args.group_size, entropy=-batch, ref_logp=batch, **own)
    need(loss.isfinite(), f"the options of --loss {args.loss} make its value {loss}.")


# --------------------------------------------------------------------------------------------------------------- the run

def start_policy(args, device, dtype):
    """The policy to begin with, its tokenizer and its folder: --model, or the warm-started tiny one."""
    if args.model:
        return *policy_module.load(args.model, device, dtype), args.model
    base = Path(args.out) / args.base
    if not (base / "model").is_dir():
        if world() > 1:
            raise ValueError(f"'{base}' is not there yet: make it once in a single process, without torchrun.")
        policy, tokenizer = policy_module.tiny(seed=args.seed)
        fill_task_flags(args, tokenizer)
        task = make_task(args)
        task.problem(random.Random(0))                 # an impossible task is told before anything is written
        base.mkdir(parents=True, exist_ok=True)
        lock = lock_file(base / "lock")                # held until this function returns: one process makes the base
        warm_start(policy.to(device), tokenizer, task, args.warm_steps, seed=args.seed, say=tqdm.write)
        flags = {key: getattr(args, key) for key in SETTING}
        write_json(base / "flags.json", flags | {"warm_steps": args.warm_steps, "seed": args.seed})
        policy_module.save(policy, tokenizer, base / "model")
    policy, tokenizer = policy_module.load(base / "model", device, dtype)
    fill_task_flags(args, tokenizer)
    made = read_flags(base / "flags.json")
    if tokenizer.unk_token_id in tokenizer(policy_module.CHARACTERS).input_ids:
        raise ValueError(f"'{base}' was made with another tokenizer, which lacks some of '{policy_module.CHARACTERS}': "
                         "name another start with --base.")
    for key in ("counts", "high", "targets", "prompt"):
        if made[key] != getattr(args, key):
            raise ValueError(f"'{base}' was warm-started with {key} {made[key]}, not {getattr(args, key)}: "
                             "name another start with --base.")
    return policy, tokenizer, base / "model"


def in_first(action):
    """`action` in the first process only -> its result there, None elsewhere. If it raises, no process goes on."""
    result = error = None
    if rank() == 0:
        try:
            result = action()
        except Exception as raised:
            error = raised
    if gather(torch.tensor([float(error is not None)])).any():
        raise error or ValueError("the first process ended the run and says why.")
    return result


def open_run(folder, args):
    """Make or reopen runs/NAME and lock it -> the lock. A folder that holds another run is never written to."""
    if (folder / "flags.json").is_file():
        if not args.resume:
            raise ValueError(f"'{folder}' holds a run already: go on with --resume, or choose another --name.")
        before = read_flags(folder / "flags.json")
        for key, now in (before | vars(args)).items():
            if before.get(key) != now and key not in FREE:
                raise ValueError(f"--resume goes on with the run's own flags, but {key} was {before.get(key)} and is {now} now.")
        if before.get("lr") != args.lr:
            print(f"lr was {before.get('lr')} and is {args.lr} from here on.")
    elif args.resume:
        raise ValueError(f"there is no run to resume in '{folder}': without --resume it is started.")
    elif folder.exists() and {file.name for file in folder.iterdir()} - {"lock", "flags.json.tmp"}:
        raise ValueError(f"'{folder}' is not empty and holds no run: choose another --name.")
    folder.mkdir(parents=True, exist_ok=True)
    return lock_file(folder / "lock")


def lock_file(path):
    """Hold `path` until this process ends, however it ends; ValueError if another process holds it."""
    file = open(path, "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:                                # Windows: no lock
        pass
    except BlockingIOError:
        raise ValueError(f"another process is writing to '{path.parent}': wait for it, or choose another --name.")
    return file


def on_signal(sentence, stop=None):
    """From now on Ctrl-C and SIGTERM end the process with `sentence`. With a list `stop` they fill it, and the loop leaves
    after its step; only the third signal does not wait (torchrun passes on what the terminal has sent already)."""
    def handler(number, frame):
        if stop is None or len(stop) == 2:
            raise KeyboardInterrupt(number, sentence)
        stop.append(number)
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, handler)


def command(argv, *more):
    """The command that was typed, and `more`, ready to be pasted."""
    typed = sys.argv[1:] if argv is None else list(argv)
    start = ["torchrun", f"--nproc_per_node={world()}"] if world() > 1 else [sys.executable]
    return shlex.join([*start, __file__, *typed, *(flag for flag in more if flag not in typed)])


def run(argv=None):
    on_signal(f"stopped before the first step; start again with: {command(argv)}")
    args = parse(argv)
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device, dtype = pick_device(args.device)
    if "RANK" in os.environ:                           # started by torchrun
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        check(args)
    if rank() == 0:
        print(f"{args.loss} on {args.task}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    policy, tokenizer, start = start_policy(args, device, dtype)
    fill_task_flags(args, tokenizer)
    task = make_task(args, held_out=0.0 if args.eval_data else 0.1)
    if getattr(args, "max_len", 0) is None:
        args.max_len = args.max_new_tokens
    judge = task if args.eval_data is None else make_task(
        argparse.Namespace(**vars(args) | {"data": args.eval_data}), held_out=1.0)
    if args.data:                                      # one prompt without room for an answer must not end a night's run
        room = policy.config.max_position_embeddings - args.max_new_tokens
        def tokens_of(problem):
            return len(tokenizer(chat(tokenizer, task.system, task.prompt(problem), task.style)).input_ids)
        for each in [task] if judge is task else [task, judge]:
            left_out = each.problems.leave_out(tokens_of, room)
            if rank() == 0 and left_out:
                print(f"{each.problems.path}: {left_out} problems are left out: prompts over {room} tokens.")
            if rank() == 0 and each.notes:
                print(*each.notes, sep="\n")
    exam = judge.held_out_problems(args.eval_problems)                          # told now if there are too few, not at the end
    if args.eval_problems and not exam:
        raise ValueError(f"'{args.eval_data or args.data}' holds no problem to evaluate on: --eval-problems 0 does without.")
    task.problem(random.Random(0))                     # none left is told now, too
    folder = Path(args.out) / args.name
    lock = in_first(lambda: open_run(folder, args))    # held until the process ends

    own = {name: getattr(args, name) for name in hyperparameters(args.loss)}
    loss_fn = functools.partial(variants()[args.loss], **own)
    reference = copy.deepcopy(policy).requires_grad_(False) if own.get("beta") else None
    if world() > 1:
        policy = shard(policy)
    optimizer = make_optimizer(policy, args.lr)
    rng = random.Random(args.seed)
    generator = torch.Generator(policy.device).manual_seed(args.seed + 7919 * rank())
    done = load_checkpoint(folder / "checkpoints", policy, optimizer, rng, generator) if args.resume else 0
    if rank() == 0:
        write_json(folder / "flags.json", vars(args))
    if done >= args.steps and rank() == 0:
        print(f"all {done} steps are done already" + (", only the table is made." if args.eval_problems else "."), flush=True)

    log = open_log(folder / "log.csv", done)
    again, stop, bad = command(argv, "--resume"), [], 0
    on_signal(f"stopped within a step; go on from the last checkpoint with: {again}", stop)
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, disable=not sys.stderr.isatty())
    for step in bar:
        began = time.time()

        # Sample and reward.
        problems, rollout, rewards = collect(policy, tokenizer, task, args, rng, generator)
        sampled = time.time()

        # Loss and update; the first of several updates a rollout is on-policy, the rest are not.
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / max(1, args.warmup))
        step_fn = functools.partial(train_step, policy, optimizer, loss_fn=loss_fn, group_size=args.group_size,
                                    temperature=args.temperature, micro_batch=args.micro_batch, grad_clip=args.grad_clip)
        every = torch.arange(len(rewards), device=policy.device)
        constant = lambda model: score_all(model, rollout, args) if model is not None else None
        ref_logp, old_logp = constant(reference), constant(policy if args.updates > 1 else None)
        for rows in every.chunk(args.updates):
            stats = step_fn(rollout=take(rollout, rows), rewards=rewards[rows],
                            old_logp=None if old_logp is None else old_logp[rows],
                            ref_logp=None if ref_logp is None else ref_logp[rows])
            if stats["bad"]:
                break

        # Log, show, save.
        bad = bad + 1 if stats["bad"] else 0
        if stats["bad"]:
            tqdm.write(complain(step, stats, rollout, rows))
        line = facts_of(step, task, problems, rollout, rewards, args) | {
            key: value for key, value in stats.items() if not key.startswith("bad")}
        line |= timing(rollout, sampled - began, time.time() - sampled, policy.device)
        if rank() == 0:
            write_line(log, line)
            tqdm.write(show_line(line))
            if step % args.show_every == 0 or step == done + 1:
                tqdm.write(f"    {task.prompt(problems[0])!r} -> {rollout.texts[0]!r}  reward {rewards[0]:.0f}")
        if bad == BAD_STEPS:
            newest = max((folder / "checkpoints").glob("*.safetensors"), default="none yet")
            raise ValueError(f"{BAD_STEPS} steps in a row gave a NaN or infinite gradient; the last good checkpoint is {newest}: "
                             "go on from it with --resume and a smaller --lr.")
        leave = gather(torch.tensor([float(len(stop))])).any()                  # a signal may reach one process a step earlier
        if step % args.save_every == 0 or step == args.steps or leave:          # a skipped step left good weights, too
            save_checkpoint(folder / "checkpoints", policy, optimizer, step, rng, generator)
        if leave:
            tqdm.write(f"stopped after step {step}, all saved; go on with: {again}")
            return 128 + max(stop, default=signal.SIGTERM)
    on_signal(f"stopped after the last step, all saved; make the table with: {again}")
    save_model(policy, tokenizer, folder / "model")
    if args.eval_problems and rank() == 0:
        compare(start, folder, tokenizer, judge, exam, args, device, dtype)
    return 0


def score_all(policy, rollout, args):
    """log-probabilities of the whole rollout without gradient, in the chunks of --micro-batch."""
    rows = torch.arange(len(rollout.mask), device=rollout.mask.device)
    with torch.no_grad():
        return torch.cat([score(policy, rollout, chunk, args.group_size, args.temperature)[0]
                          for chunk in rows.split(args.micro_batch or len(rows))])


def facts_of(step, task, problems, rollout, rewards, args):
    """The columns that say how the policy is doing; every process's rows count."""
    G = args.group_size
    share = lambda x: gather(x.float()).mean().item()
    groups = rewards.view(-1, G)
    forms = [task.canonical(text) for text in rollout.texts]
    right = [forms[row] if rewards[row] == 1 else None for row in range(len(rewards))]
    distinct = [len({form for form in right[i * G:(i + 1) * G] if form is not None}) for i in range(len(problems))]
    device = rewards.device
    return {"step": step, "reward": share(rewards), "solved": share((groups == 1).any(1)),
            "distinct": share(torch.tensor(distinct, device=device)),
            "equal": share((groups == groups[:, :1]).all(1)),
            "parsed": share(torch.tensor([form is not None for form in forms], device=device)),
            "length": share(rollout.mask.sum(1)), "cut": share(~rollout.finished)}


def timing(rollout, sampling, updating, device):
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss()
    return {"sample_s": sampling, "update_s": updating, "memory_gb": memory / 2 ** 30,
            "tokens_s": int(rollout.mask.sum()) * world() / (sampling + updating)}


def peak_rss():
    """Largest memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show_line(line):
    """One line a step, the informative columns first."""
    short = {"step": "{:5d}", "reward": "{:.3f}", "solved": "{:.2f}", "distinct": "{:.2f}", "equal": "{:.2f}",
             "parsed": "{:.2f}", "length": "{:.1f}", "cut": "{:.2f}", "entropy": "{:.3f}", "grad_norm": "{:.2f}",
             "loss": "{:+.4f}", "tokens_s": "{:.0f}"}
    return "  ".join(f"{name} {form.format(line[name])}" for name, form in short.items())


def complain(step, stats, rollout, rows):
    """Which rows made the gradient NaN or infinite, with their text."""
    named = [f"row {int(rows[row])} {rollout.texts[rows[row]][:200]!r}" for row in stats["bad_rows"]]
    return (f"step {step} is skipped, weights and optimiser stay as they were: loss {stats['loss']}, gradient norm "
            f"{stats['grad_norm']}, caused by {', '.join(named[:3]) or 'no row alone'}" + " and others" * (len(named) > 3))


def open_log(path, done):
    """log.csv, cut back to the steps that the checkpoint knows; a file open for appending."""
    if rank() > 0:
        return None
    kept = path.read_text().splitlines()[:done + 1] if done and path.is_file() else []    # one line a step, below the head
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(line + "\n" for line in kept))
    os.replace(aside, path)
    return open(path, "a", newline="")


def write_line(log, line):
    writer = csv.DictWriter(log, line, lineterminator="\n")
    if log.tell() == 0:
        writer.writeheader()
    writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in line.items()})
    log.flush()
    os.fsync(log.fileno())


def save_model(policy, tokenizer, path):
    """The trained policy as a folder that transformers opens; sharded weights are gathered first."""
    state = {name: full(w.detach()) for name, w in policy.state_dict().items()}
    if rank() == 0:
        policy_module.save(policy, tokenizer, path, state)


def compare(start, folder, tokenizer, task, problems, args, device, dtype):
    """The table at the end: the start and the trained policy on the same held-out problems."""
    results = {}
    for label, where in (("start", start), (args.name, folder / "model")):
        policy, _ = policy_module.load(where, device, dtype)
        generator = torch.Generator(policy.device).manual_seed(0)
        results[label] = evaluate(policy, tokenizer, task, problems, args.eval_samples, args.max_new_tokens,
                                  args.temperature, generator, args.rows)
    summaries = summary(results)
    write_json(folder / "eval.json", {"flags": vars(args), "summary": summaries, "records": results})
    print(f"{len(problems)} held-out problems, {args.eval_samples} samples each, temperature {args.temperature}")
    print(table(summaries))
    print(f"log, model and table are in {folder}")


def main(argv=None):
    """Run, and turn what a user can get wrong into one sentence and exit code 2."""
    try:
        return run(argv)
    except KeyboardInterrupt as interrupt:             # from on_signal: in the loop a signal only ends the step
        number, sentence = interrupt.args
        print(sentence, file=sys.stderr)
        return 128 + number
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    if torch.distributed.is_initialized():             # its threads now and then abort a Python that shuts down, whereupon
        sys.stdout.flush()                             # torchrun ends the other processes, at work or not: so no shutting down
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
