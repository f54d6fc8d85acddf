"""The loop: one step's gradient, the update under any split, runs that are told what is wrong and
that can be resumed.

Bugs killed here: prompt token unmasked, last token dropped, stop token without gradient,
temperature ignored in the score, keys of another row's prompt, left padding read, gradient averaged
over chunks or processes, entropy gradient dropped, advantages formed per chunk, old
log-probabilities taken after the first update, bf16 master weights, a NaN that reaches the weights,
a resumed run that repeats problems or draws, a damaged checkpoint that is believed, a run
overwritten.
"""
import argparse
import copy
import functools
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import losses
import policy as policy_module
import train
from rewards import Countdown
import sample as sampling
from sample import sample
from test_losses import check, claim

ROOT = Path(train.__file__).parent
G = 4
core, care = pytest.mark.core, pytest.mark.care       # with the function that a test grades


def small(seed=0, device="cpu"):
    policy, tokenizer = policy_module.tiny(width=32, layers=2, heads=2, kv_heads=1, inner=64,
                                           seed=seed)
    return policy.to(device), tokenizer


def rollout_of(policy, tokenizer, temperature=1.0, prompts=("4 7 2 9,24=", "1 1,2=", "3 9 9,7=")):
    policy.stop_ids = [1, 4, 9, 14]                    # so that answers differ in length
    return sample(policy, tokenizer, list(prompts), G, 9, temperature,
                  torch.Generator().manual_seed(3))


def on(device, rollout):
    """The rollout on that device."""
    return sampling.Rollout(**{name: x if name == "texts" else x.to(device)
                               for name, x in vars(rollout).items()})


def naive_score(policy, rollout, temperature):
    """Every row alone and whole: no shared prompt, no bucket, no padding; full log-softmax."""
    logp, entropy = torch.zeros(rollout.mask.shape), torch.zeros(rollout.mask.shape)
    P = rollout.prompt_mask.shape[1]
    for row in range(len(logp)):
        prompt, n = rollout.tokens[row, :P][rollout.prompt_mask[row]], int(rollout.mask[row].sum())
        tokens = torch.cat([prompt, rollout.response[row, :n]])
        all_logp = (policy(tokens[None])[0] @ policy.head.T / temperature).log_softmax(-1)
        for t in range(n):
            at = len(prompt) - 1 + t
            logp[row, t] = all_logp[at, tokens[at + 1]]
            entropy[row, t] = -(all_logp[at].exp() * all_logp[at]).sum()
    return logp, entropy


def gradient(policy):
    return torch.cat([w.grad.flatten() for w in policy.parameters()])


class Still(torch.optim.SGD):
    """An optimiser that leaves weights alone, so that a test can look at the gradient."""

    def __init__(self, policy):
        super().__init__(policy.parameters(), lr=0.0)


REWARDS = torch.tensor([1., 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1])
SMOOTH = functools.partial(losses.diffsmooth, gamma_p=0.3, gamma_n=0.1, reduction="sum")
BONUS = functools.partial(losses.entropy, entropy_coef=0.5)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_score_is_the_definition(temperature):
    """Sharing prompts, bucketing by length and dropping padding change no log-probability."""
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer, temperature)
    assert len(set(rollout.mask.sum(1).tolist())) > 2 and not rollout.prompt_mask.all(), \
        "the batch must be ragged"
    for ours, naive, what in zip(
            policy_module.score(policy, rollout, torch.arange(12), G, temperature),
            naive_score(policy, rollout, temperature), ("log-probability", "entropy")):
        assert torch.allclose(ours, naive, atol=1e-5), \
            f"{what} off by {(ours - naive).abs().max():.2e}"
    ours = policy_module.score(policy, rollout, torch.arange(12), G, temperature)[0]
    assert torch.allclose(ours, rollout.logp, atol=1e-5), "what is scored is not what was sampled"


def said_alike(rollout):
    """Rows 1-3 answer what row 0 does; row 5 answers another prompt so; row 6 begins like it and is
    cut; all 8-11 differ."""
    rollout = sampling.take(rollout, torch.arange(len(rollout.mask)))
    for row in (1, 2, 3, 5, 6):
        rollout.response[row], rollout.mask[row] = rollout.response[0], rollout.mask[0]
    rollout.mask[6, 2:] = False
    return rollout


def test_an_answer_given_several_times_is_read_once_and_counts_as_often(monkeypatch):
    policy, tokenizer = small()
    rollout = said_alike(rollout_of(policy, tokenizer, 0.7))
    assert rollout.mask[0].sum() > 2
    assert len({tuple(ids) for ids in rollout.response[8:].tolist()}) == 4
    assert rollout.response[4, 0] != rollout.response[0, 0]
    assert rollout.response[7, 0] != rollout.response[0, 0]
    forward, read = policy_module.Policy.forward, []
    monkeypatch.setattr(
        policy_module.Policy, "forward",
        lambda self, tokens, *rest: read.append(len(tokens)) or forward(self, tokens, *rest))
    ours = policy_module.score(policy, rollout, torch.arange(12), G, 0.7)
    assert sum(read) == 3 + 9, f"3 prompts and 9 different answers were read as {read}"
    naive = naive_score(policy, rollout, 0.7)
    # each copy has its own
    weight = torch.randn(12, rollout.mask.shape[1], generator=torch.Generator().manual_seed(0))
    gradients = []
    for mine, theirs in zip(ours, naive):
        assert torch.allclose(mine, theirs, atol=1e-5), f"off by {(mine - theirs).abs().max():.1e}"
    for scored in (ours, naive):
        policy.zero_grad()
        sum((x * weight).sum() for x in scored).backward()
        gradients.append(gradient(policy))
    ours, naive = gradients
    assert naive.norm() > 1 and (ours - naive).norm() < 1e-5 * naive.norm(), \
        "the gradient is not the sum over the copies"


@core("train_step")
@pytest.mark.parametrize("loss", [SMOOTH, BONUS, losses.sft], ids=["diffsmooth", "entropy", "sft"])
@pytest.mark.parametrize("micro_batch", [None, 1, 3, 5, 12])
def test_any_micro_batch_gives_the_plain_gradient(loss, micro_batch):
    """Against autograd through the naive score of the whole batch; chunks of 3 and 5 cut groups in
    two."""
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer, 0.7)
    logp, entropy = naive_score(policy, rollout, 0.7)
    value, _ = loss(logp, logp.detach(), rollout.mask, REWARDS, G, entropy=entropy)
    value.backward()
    plain = gradient(policy)
    assert plain.norm() > 1e-3
    stats = train.train_step(policy, Still(policy), rollout, REWARDS, loss, G, temperature=0.7,
                             micro_batch=micro_batch, grad_clip=1e9)
    assert abs(stats["loss"] - value.item()) < 1e-5
    off = (gradient(policy) - plain).abs().max()
    assert off < 1e-5 * plain.abs().max(), f"micro-batch {micro_batch}: gradient off by {off:.1e}"


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_step_on_every_device_is_that_of_the_definition(micro_batch, device):
    """The gradient of autograd through the naive score, made on the CPU in fp32. With activations
    in bf16, as a GPU has them, it keeps its size and direction; and AdamW then moves every
    matrix."""
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer, 0.7)
    logp, entropy = naive_score(policy, rollout, 0.7)
    value, _ = BONUS(logp, logp.detach(), rollout.mask, REWARDS, G, entropy=entropy)
    value.backward()
    plain = gradient(policy)
    for dtype, most in ((torch.float32, 1e-5 if device == "cpu" else 1e-4), (torch.bfloat16, 0.1)):
        policy, _ = small(device=device)
        policy.dtype, optimizer = dtype, train.make_optimizer(policy, 1e-2)
        before = [w.detach().clone() for w in policy.parameters()]
        stats = train.train_step(policy, optimizer, on(device, rollout), REWARDS.to(device), BONUS,
                                 G, temperature=0.7, micro_batch=micro_batch, grad_clip=1e9)
        error = (gradient(policy).cpu() - plain).norm() / plain.norm()
        assert error < most and abs(stats["loss"] - value.item()) < most, \
            f"{dtype}: the gradient is off by {error:.1e} of its norm"
        for w, start in zip(policy.parameters(), before):
            assert (w.dtype, w.device.type) == (torch.float32, device) and not torch.equal(w, start)
            assert w.isfinite().all()


def test_a_checkpoint_gives_everything_back_on_every_device(tmp_path, device):
    """Weights, moments, steps and both sources of chance, bit for bit, where they were; activations
    are bf16."""
    states = []
    for seed in (0, 1):
        policy, tokenizer = small(seed, device)
        policy.dtype = torch.bfloat16
        rollout = rollout_of(policy, tokenizer)
        states.append((policy, train.make_optimizer(policy, 1e-2), random.Random(seed),
                       torch.Generator(device).manual_seed(seed)))
        for _ in range(2 - seed):
            train.train_step(*states[-1][:2], rollout, REWARDS.to(device), SMOOTH, G)
    train.save_checkpoint(tmp_path, *states[0][:2], 2, *states[0][2:])
    assert train.load_checkpoint(tmp_path, *states[1]) == 2
    (one, adam, rng, draws), (two, adam_2, rng_2, draws_2) = states
    for w, v in zip(one.parameters(), two.parameters()):
        assert torch.equal(w, v) and v.device.type == device
        assert adam.state[w].keys() == adam_2.state[v].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, x in adam.state[w].items():
            assert torch.equal(x, adam_2.state[v][name])
            assert adam_2.state[v][name].device == x.device, name
    assert rng.random() == rng_2.random()
    assert torch.equal(torch.rand(9, generator=draws, device=device),
                       torch.rand(9, generator=draws_2, device=device))


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_activations_computed_again_give_the_same_gradient_from_less_memory(micro_batch):
    """The prompts' keys are in a cache that a second forward must not extend; all prompts but one
    are padded."""
    gradients, kept = [], []
    for recompute in (False, True):
        policy, tokenizer = small()
        rollout, policy.recompute = rollout_of(policy, tokenizer, 0.7), recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            train.train_step(policy, Still(policy), rollout, REWARDS, BONUS, G, temperature=0.7,
                             micro_batch=micro_batch, grad_clip=1e9)
        gradients.append(gradient(policy))
        kept.append(sum(sizes))
    plain, again = gradients
    assert plain.norm() > 1e-3 and (plain - again).norm() < 1e-5 * plain.norm(), "another gradient"
    assert kept[1] < kept[0], "nothing was computed again"


@core("train_step")
def test_the_stop_token_is_trained():
    """One answer that is nothing but the stop token: raising it must move the weights, and raise
    exactly it."""
    policy, tokenizer = small()
    rollout = train.demonstrations(tokenizer, ["1 1,2="] * 2, ["", ""], policy.stop_ids[0],
                                   policy.device)
    assert rollout.mask.tolist() == [[True], [True]], "the stop token must be inside the mask"
    optimizer = train.make_optimizer(policy, 1e-2)
    before = policy_module.score(policy, rollout, torch.arange(2), 1, 1.0)[0][0, 0].item()
    train.train_step(policy, optimizer, rollout, torch.ones(2), losses.sft, 1)
    after = policy_module.score(policy, rollout, torch.arange(2), 1, 1.0)[0][0, 0].item()
    assert after > before + 0.01


@care("train_step")
def test_smallest_learning_rates_move_fp32_weights():
    policy, tokenizer = small()
    assert {w.dtype for w in policy.parameters()} == {torch.float32}
    before = torch.cat([w.detach().flatten().clone() for w in policy.parameters()])
    train.train_step(policy, train.make_optimizer(policy, 1e-6), rollout_of(policy, tokenizer),
                     REWARDS, SMOOTH, G)
    after = torch.cat([w.detach().flatten() for w in policy.parameters()])
    assert (after != before).float().mean() > 0.9, "a step of 1e-6 must change nearly every weight"


@pytest.mark.parametrize("shape", [(64, 128), (384, 128), (128, 128)])
def test_a_step_of_muon_is_orthogonal_and_as_torch_makes_it(shape):
    """U V^T up to the iteration's own 0.7 .. 1.2, where a singular value is not tiny;
    torch.optim.Muon up to bf16."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(train.orthogonal(x))
    large = torch.linalg.svdvals(x) > 0.1 * torch.linalg.matrix_norm(x, 2)
    assert (singular[large] > 0.6).all() and (singular < 1.25).all(), singular
    policy, _ = small()
    theirs = copy.deepcopy(policy)
    before = copy.deepcopy(policy)
    ours = train.Muon(policy, 0.01)
    rest = [w for w in theirs.model.layers.parameters() if w.dim() == 2]
    peer = torch.optim.Muon(rest, lr=0.01, weight_decay=0.1, momentum=0.95,
                            adjust_lr_fn="match_rms_adamw")
    for step in range(3):                              # other gradients, or looking ahead is unseen
        for w, v in zip(policy.parameters(), theirs.parameters()):
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(step))
            v.grad = w.grad.clone()
        ours.step(), peer.step()
    blocks = (model.model.layers.parameters() for model in (policy, before, theirs))
    moved = [(a - b, c - b) for a, b, c in zip(*blocks) if a.dim() == 2]
    assert all((mine - his).norm() < 0.05 * his.norm() for mine, his in moved), "not torch's step"
    assert all(not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters())), \
        "the others move, too"


@care("train_step")
def test_a_nan_never_reaches_the_weights():
    policy, tokenizer = small()
    def broken(logp, *rest, **options):
        loss, stats = SMOOTH(logp, *rest, **options)
        poison = torch.zeros_like(logp)
        poison[2, 0] = float("nan")
        return loss + (poison * logp).sum(), stats
    before = [w.detach().clone() for w in policy.parameters()]
    stats = train.train_step(policy, train.make_optimizer(policy, 1e-2),
                             rollout_of(policy, tokenizer), REWARDS, broken, G)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters())), \
        "weights moved on a NaN"
    assert stats["bad"] and stats["bad_rows"] == [2], \
        "stats['bad_rows'] must be [2], the row with the NaN"


# --------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """runs/base, warm-started for long enough on a toy setting (2 numbers) that some answers are
    correct."""
    out = tmp_path_factory.mktemp("runs")
    task = Countdown(counts=(2,), high=4, targets=(1, 8))
    policy, tokenizer = policy_module.tiny(width=64, layers=2, heads=2, kv_heads=1, inner=128)
    train.warm_start(policy, tokenizer, task, 40, train.Muon(policy, 1e-2), prompts=16,
                     say=lambda line: None)
    policy_module.save(policy, tokenizer, out / "base" / "model")
    flags = {"task": "countdown", "prompt": "bare", "counts": [2], "high": 4, "targets": [1, 8],
             "max_new_tokens": 8}
    (out / "base" / "flags.json").write_text(json.dumps(flags))
    return out


TOY = ("--counts 2 --high 4 --targets 1 8 --max-new-tokens 8 --prompts 8 --group-size 8 --lr 1e-3 "
       "--eval-every 0 --eval-problems 0 --device cpu")


def go(base, *flags):
    return train.main([*TOY.split(), "--out", str(base), *map(str, flags)])


def rows(base, name):
    lines = (base / name / "log.csv").read_text().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]


TWO_PROCESSES = """
import os, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_train as t, train
torch.set_num_threads(1)
assert train.main(sys.argv[1:]) == 0       # a run and its table; these processes then go on
device = sys.argv[-1]
policy, tokenizer = t.small()
prompts = "4 7 2 9,24=", "1 1,2=", "3 9 9,7=", "2 2,4="
rollout = t.rollout_of(policy, tokenizer, 0.7, prompts)        # on the CPU: alike in all
# One process has few different answers.
rollout.response[9:12], rollout.mask[9:12] = rollout.response[8], rollout.mask[8]
rollout, policy = t.on(device, rollout), policy.to(device)
policy.recompute = train.world() > 1       # shards and activations made again go together
rewards = torch.tensor([1., 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0], device=device)
mine = torch.arange(16, device=device).chunk(train.world())[train.rank()]
policy = train.shard(policy)
# Adam's first steps would blow rounding up to full size.
optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
for loss in (t.SMOOTH, t.BONUS):
    stats = train.train_step(policy, optimizer, t.sampling.take(rollout, mine), rewards[mine], loss,
                             t.G, temperature=0.7, micro_batch=16 if train.world() == 1 else 3)
weights = {{name: (w if train.world() == 1 else w.full_tensor()).detach().cpu()
           for name, w in policy.named_parameters()}}
if train.rank() == 0:
    torch.save((weights, stats["loss"], stats["grad_norm"]), "update.pt")
train.whole_batch(torch.zeros(1))          # nobody hangs up while the other still listens
os._exit(0)                                # as train.py ends, and for its reason
"""


def launched(script, folders, processes, flags):
    """The script under torchrun, with one launcher in each of the folders: a machine each, all of
    them this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(folders)}",
               f"--nproc_per_node={processes}", "--rdzv_backend=static",
               "--master_addr=127.0.0.1", f"--master_port={port}"]
    launchers = [subprocess.Popen([*command, f"--node_rank={i}", str(script), *flags], cwd=folder,
                                  stdout=open(folder / "said", "w"), stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
                 for i, folder in enumerate(folders)]
    try:
        codes = [launcher.wait(timeout=300) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert not any(codes), "\n".join((folder / "said").read_text() for folder in folders)


def test_the_room_that_checkpoints_need_is_told_at_the_start(base, tmp_path, monkeypatch, capsys):
    """Three at a time with 12 bytes per parameter: of a billion parameters 36 GB."""
    free = argparse.Namespace(free=90e9)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: free)
    monkeypatch.setattr(policy_module, "try_to_save", lambda *args: None)
    this, args = argparse.Namespace(folder=tmp_path, tokenizer=None), train.parse(TOY.split())
    this.policy = argparse.Namespace(parameters=lambda: [torch.empty(10 ** 9, device="meta")])
    train.try_to_save(this, args)
    said = capsys.readouterr().out
    assert "36.0 GB" in said and "90.0 GB are free" in said and "every 50 steps" in said
    free.free = 35e9
    with pytest.raises(train.UserError, match="need 36.0 GB in .*, and 35.0 GB are free"):
        train.try_to_save(this, args)
    (tmp_path / "checkpoints").mkdir()
    for step in (3, 6):                                # a run that goes on has two already
        (tmp_path / "checkpoints" / f"{step:07d}.pt").write_bytes(b"")
    train.try_to_save(this, args)
    assert "need 12.0 GB in" in capsys.readouterr().out
    free.free = 11e9
    with pytest.raises(train.UserError, match="need 12.0 GB in .*, and 11.0 GB are free"):
        train.try_to_save(this, args)
    free.free = 1000
    assert go(base, "--loss", "grpo", "--steps", 1, "--name", "crowded") == 2
    assert "GB are free" in capsys.readouterr().err
    assert not (base / "crowded" / "flags.json").exists(), "a run that never began"


def test_two_processes_make_the_update_and_the_table_of_one(base, tmp_path, device):
    """Two steps with FSDP2: same loss, same gradient norm, same weights as in one process. Before
    them a run: the same table of the base. On the CPU by two launchers, as two machines: the second
    has the base, and gets no other file."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes one process a GPU, and one GPU is here")
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(root=str(ROOT), tests=str(ROOT / "tests")))
    one, two, second = folders = [tmp_path / name for name in ("one", "two", "second")]
    for folder in folders:
        shutil.copytree(base / "base", folder / "runs" / "base")
    flags = [*TOY.split(), "--loss", "entropy", "--steps", "2", "--eval-problems", "2",
             "--eval-samples", "4", "--rows", "4", "--out", "runs", "--device", device]
    launched(script, [one], 1, flags)
    launched(script, *(([two, second], 1) if device == "cpu" else ([two], 2)), flags)
    results = [torch.load(folder / "update.pt", weights_only=True) for folder in (one, two)]
    (weights, loss, norm), (weights_2, loss_2, norm_2) = results
    close = 1 if device == "cpu" else 10               # a GPU rounds otherwise
    assert abs(loss - loss_2) < close * 1e-6 and abs(norm - norm_2) < close * 1e-5 * norm, \
        (loss, loss_2, norm, norm_2)
    for name, w in weights.items():
        assert torch.allclose(w, weights_2[name], atol=close * 1e-5), \
            f"{name} differs by {(w - weights_2[name]).abs().max()}"
    tables = [json.loads((folder / "runs" / "entropy" / "eval.json").read_text())["models"]
              for folder in (one, two)]
    assert tables[0]["base"] == tables[1]["base"] and len(tables[1]["entropy"]["records"]) == 2
    assert "Pass@4" in (two / "said").read_text()
    assert [file.name for file in (second / "runs").iterdir()] == ["base"]
    assert device == "cuda" or (second / "said").read_text() == ""


def test_a_refusal_of_the_first_process_ends_the_others(base):
    """Of two processes only the first looks at the folder; the second must not go on alone into a
    broken connection."""
    go(base, "--loss", "grpo", "--steps", 1, "--name", "taken")
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", str(ROOT / "train.py"), *TOY.split(),
                          "--out", str(base), "--loss", "grpo", "--name", "taken"],
                         capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = [line for line in ran.stderr.splitlines() if "error:" in line]
    assert ran.returncode and any("holds a run already" in line for line in said), ran.stderr
    assert all("holds a run already" in line or "the first process ended the run" in line
               for line in said), ran.stderr


TIMES = ("sample_s", "update_s", "memory_gb", "tokens_s")


def untimed(base, name):
    return [{key: value for key, value in row.items() if key not in TIMES}
            for row in rows(base, name)]


def test_twenty_steps_raise_the_reward(base):
    assert go(base, "--loss", "diffsmooth", "--gamma_p", 0.02, "--steps", 20,
              "--name", "learn") == 0
    reward = [float(row["reward"]) for row in rows(base, "learn")]
    assert sum(reward[-5:]) > sum(reward[:5]) + 0.5, \
        f"mean reward of five steps went {reward[:5]} -> {reward[-5:]}"
    policy_module.load(base / "learn" / "model")       # and the result is a checkpoint


@pytest.mark.parametrize("updates", [1, 2])
def test_resume_is_bit_for_bit(base, updates):
    """6 steps at once against 3, then 3 more after a restart: same log, same weights."""
    common = ("--loss", "grpo", "--updates", updates, "--save-every", 3, "--dynamic-sampling", 1,
              "--schedule", "constant")
    assert go(base, *common, "--steps", 6, "--name", f"whole{updates}") == 0
    assert go(base, *common, "--steps", 3, "--name", f"halves{updates}") == 0
    assert go(base, *common, "--steps", 6, "--name", f"halves{updates}", "--resume") == 0
    assert untimed(base, f"whole{updates}") == untimed(base, f"halves{updates}")
    one, two = (policy_module.load(base / f"{half}{updates}" / "model")[0]
                for half in ("whole", "halves"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters())), \
        "weights differ after --resume"
    ratios = [float(row["ratio_max"]) for row in rows(base, f"whole{updates}")]
    assert (max(ratios) > 1.001) == (updates > 1), \
        "the second update of a rollout must see ratios other than 1"


HELD_OUT = ("held_out_1", "held_out_16", "held_out_distinct")


def test_held_out_problems_are_measured_and_change_nothing(base, monkeypatch, capsys):
    """Every second step: the log has the numbers that the model of that step gets, and is else the
    one of a run that is not measured, as its weights are; also when it stops between and goes on.
    """
    monkeypatch.setattr(train, "TRACKED", 2)
    common = ("--loss", "grpo", "--save-every", 3, "--schedule", "constant")
    for name, steps, every in (("unseen", 4, 0), ("seen", 4, 2), ("stopped", 3, 2)):
        assert go(base, *common, "--steps", steps, "--name", name, "--eval-every", every) == 0
    text = capsys.readouterr().out
    assert text.count("held-out problems: Pass@1 ") == 3, text
    assert go(base, *common, "--steps", 4, "--name", "stopped", "--eval-every", 2, "--resume") == 0
    seen, again = untimed(base, "seen"), untimed(base, "stopped")
    assert seen == again
    measured = [[row.pop(name) for name in HELD_OUT] for row in seen]
    assert [all(row) for row in measured] == [False, True, False, True], measured
    assert measured[0] == measured[2] == ["", "", ""]
    unseen = untimed(base, "unseen")
    assert {row.pop(name) for row in unseen for name in HELD_OUT} == {""} and seen == unseen
    weights = {(base / name / "model" / "model.safetensors").read_bytes()
               for name in ("unseen", "seen", "stopped")}
    assert len(weights) == 1, "the weights depend on whether held-out problems are measured"

    task = Countdown(counts=(2,), high=4, targets=(1, 8))
    records = evaluation.evaluate(*policy_module.load(base / "seen" / "model"), task,
                                  task.held_out_problems(2), 16, 8)
    c, distinct = ([record[name] for record in records] for name in ("c", "distinct"))
    right = [100 * sum(c) / 32, 100 * sum(x > 0 for x in c) / 2, sum(distinct) / 2]
    assert [float(x) for x in measured[3]] == pytest.approx(right)


def test_a_task_with_few_held_out_problems_is_trained_on_all_the_same(base, capsys):
    """It has two, and both are in the table; --eval-every keeps its default."""
    i = TOY.split().index("--eval-every")
    flags = [*TOY.split()[:i], *TOY.split()[i + 2:], "--out", str(base), "--name", "few"]
    assert train.main([*flags, "--steps", "1", "--eval-problems", "2", "--eval-samples", "1"]) == 0
    assert "--eval-every has nothing to measure" in capsys.readouterr().out


def test_damaged_checkpoint_is_noticed_and_the_one_before_is_used(base, capsys):
    common = ("--loss", "grpo", "--save-every", 2, "--name", "damaged")
    assert go(base, *common, "--steps", 4) == 0
    saved = sorted((base / "damaged" / "checkpoints").iterdir())
    assert [file.name for file in saved] == ["0000002.pt", "0000004.pt"]
    newest = saved[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1                          # one bit
    newest.write_bytes(data)
    assert go(base, *common, "--steps", 5, "--resume") == 0
    assert "0000004.pt is damaged" in capsys.readouterr().out
    assert [row["step"] for row in rows(base, "damaged")] == ["1", "2", "3", "4", "5"]
    saved = sorted((base / "damaged" / "checkpoints").iterdir())
    assert [file.name for file in saved] == ["0000004.pt", "0000005.pt"], \
        "the last step is saved in any case"
    for file in (base / "damaged" / "checkpoints").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    assert go(base, *common, "--steps", 8, "--resume") == 2
    assert "no usable checkpoint" in capsys.readouterr().err


def test_a_whole_run_on_every_device(base, device, capsys):
    """What a run has besides its steps: a reference, redraws, two updates a rollout, chunks,
    checkpoints, a table; it goes on."""
    flags = ("--loss", "grpo", "--beta", 0.1, "--updates", 2, "--dynamic-sampling", 1,
             "--micro-batch", 24, "--checkpoint-activations", "--eval-problems", 2,
             "--eval-samples", 3, "--name", f"on {device}", "--device", device)
    for steps, more in ((2, []), (3, ["--resume"])):
        assert go(base, *flags, "--steps", steps, *more) == 0
        assert f"on {device} (gain over base)" in table_of(capsys.readouterr().out)
    log = rows(base, f"on {device}")
    assert [row["step"] for row in log] == ["1", "2", "3"]
    assert all(math.isfinite(float(x)) for row in log for name, x in row.items()
               if not name.startswith("held_out")), log


class Scripted(Countdown):
    """A task whose reward is decided by the group's number: group 0 all correct, 1 all wrong, then
    mixed, and so on."""

    def __init__(self):
        super().__init__(counts=(2,), high=4, targets=(1, 8))
        self.calls = 0

    def reward(self, problem, text):
        group, self.calls = self.calls // G, self.calls + 1
        return [1.0, 0.0, float(self.calls % 2)][group % 3]


def test_dynamic_sampling_keeps_mixed_groups_and_is_bounded():
    policy, tokenizer = small()
    # rows: one prompt at a time
    flags = dict(group_size=G, prompts=3, max_new_tokens=4, temperature=1.0, rows=5)
    for redraws, mixed in ((0, 1), (1, 2), (2, 3), (9, 3)):
        args = argparse.Namespace(**flags, dynamic_sampling=redraws)
        problems, rollout, rewards = train.collect(policy, tokenizer, Scripted(), args,
                                                   random.Random(0),
                                                   torch.Generator().manual_seed(0))
        assert len(problems) == 3 and len(rewards) == len(rollout.texts) == 12, \
            "the batch must be full"
        share = rewards.view(3, G).mean(1)
        assert ((share > 0) & (share < 1)).sum() == mixed, f"{redraws} redraws: {share.tolist()}"


def test_no_more_answers_are_in_flight_than_rows_allow(monkeypatch):
    """Groups of 4: cut in pieces of 3, whole, two at once, all at once; on a CPU the same draws."""
    policy, tokenizer = small()
    drawn, seen = [], []
    def counted(policy, tokenizer, prompts, group_size, *rest):
        seen.append(len(prompts) * group_size)
        return sample(policy, tokenizer, prompts, group_size, *rest)
    monkeypatch.setattr(train, "sample", counted)
    for rows, calls in ((3, [3, 1] * 3), (4, [4] * 3), (9, [8, 4]), (100, [12])):
        seen.clear()
        args = argparse.Namespace(group_size=G, prompts=3, max_new_tokens=9, temperature=1.0,
                                  rows=rows, dynamic_sampling=0)
        drawn.append(train.collect(policy, tokenizer, Countdown(), args, random.Random(0),
                                   torch.Generator().manual_seed(0)))
        assert seen == calls, f"--rows {rows}: answers in flight {seen}"
    problems, rollout, rewards = drawn.pop()
    assert len(set(rollout.texts)) > 6
    for other_problems, other, _ in drawn:
        assert problems == other_problems and rollout.texts == other.texts
        assert torch.equal(rollout.tokens, other.tokens)
        assert torch.allclose(rollout.logp, other.logp, atol=1e-5)


def test_the_learning_rate_rises_and_falls_by_hand():
    """lr 1, warmup 2, 5 steps: up in two, then down by a quarter a step, 0 one step after the
    last."""
    def rates(steps, warmup, schedule="linear"):
        args = argparse.Namespace(lr=1.0, steps=steps, warmup=warmup, schedule=schedule)
        return [train.learning_rate(step, args) for step in range(1, steps + 1)]
    assert rates(5, 2) == [0.5, 1.0, 0.75, 0.5, 0.25]
    assert rates(4, 0) == [1.0, 0.75, 0.5, 0.25], "without a rise it falls from the start"
    assert rates(2, 4) == [0.25, 0.5], "a run shorter than the warm-up only rises"
    assert rates(4, 2, "constant") == [0.5, 1.0, 1.0, 1.0]


def test_the_progress_of_a_step_by_hand():
    """Of two problems the first has three correct answers, two of them one; the second has none,
    and so no contrast."""
    texts = ["1+2", "2+1", "3*1", "((", "1+1", "1+1", "1+1", ""]
    lengths = torch.tensor([4, 4, 4, 2, 4, 4, 4, 1])
    rollout = argparse.Namespace(texts=texts, mask=torch.arange(4) < lengths[:, None],
                                 finished=torch.arange(8) != 3)
    line = evaluation.progress(7, Countdown(), rollout, torch.tensor([1., 1, 1, 0, 0, 0, 0, 0]), 4)
    assert line == {"step": 7, "reward": 3 / 8, "solved": 1 / 2, "distinct": (2 + 0) / 2,
                    "equal": 1 / 2, "parsed": 6 / 8, "length": 27 / 8, "cut": 1 / 8}


def test_the_costs_of_a_step_by_hand():
    """Six tokens in three seconds; a Python that has imported torch takes more than a twentieth of
    a GiB."""
    rollout = argparse.Namespace(tokens=torch.zeros(2, 5),
                                 mask=torch.tensor([[True] * 4, [True, True, False, False]]))
    line = train.costs(rollout, 1.0, 2.0)
    assert (line["sample_s"], line["update_s"], line["tokens_s"]) == (1, 2, 2)
    assert 0.05 < line["memory_gb"] < 1000 if sys.platform != "win32" else line["memory_gb"] == 0


def test_flags_at_the_edge_of_what_is_allowed():
    """What lies beyond is refused: test_survival.py."""
    args = train.parse(["--group-size", "2", "--prompts", "1", "--steps", "1", "--warmup", "0",
                        "--seed", str(2 ** 63 - 1)])
    assert (args.group_size, args.prompts, args.seed) == (2, 1, 2 ** 63 - 1)


def test_the_defaults_are_those_that_the_study_was_made_with():
    args = vars(train.parse([]))
    assert args | {"loss": "diffsmooth", "prompts": 32, "group_size": 16, "steps": 1200, "lr": 1e-4,
                   "warmup": 10, "temperature": 1.0, "eval_problems": 512, "eval_samples": 64,
                   "eval_temperature": 0.7, "warm_steps": 500} == args


@pytest.mark.parametrize("loss, option", [("diffsmooth", "gamma_p"), ("diffsmooth", "gamma_n"),
                                          ("entropy", "entropy_coef")])
def test_an_option_that_makes_the_loss_infinite_is_refused(loss, option):
    with pytest.raises(ValueError, match=f"the options of --loss {loss} make its value"):
        train.parse(["--loss", loss, f"--{option}", "inf"])


def mine(monkeypatch, default, heard):
    """A user's own loss in losses.py: sft with one more option, x, whose values it notes."""
    def loss(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, x=default):
        heard.append(x)
        return losses.sft(logp, old_logp, mask, rewards, group_size)
    if default is ...:
        loss.__kwdefaults__.pop("x")
    monkeypatch.setattr(losses, "mine", loss, raising=False)


@pytest.mark.parametrize("default, typed, value", [
    (True, "False", False), (False, "true", True), (True, "0", "True or False"),
    (True, "maybe", "True or False"),
    (None, "0.5", 0.5), (None, "mean", "mean"), (None, "None", None), (None, "True", True),
    (3, "4", 4), (3, "0.5", 0.5), (3, "True", "a number"), (3, "much", "a number"),
    (3, "None", "a number"),
    (0.1, "1", 1.0), (0.1, "1e-3", 1e-3), (0.1, "inf", math.inf), (0.1, "(1,)", "a number"),
    ("sum", "mean", "mean"), ("sum", "7", "7"), ((1, 2), "(3, 4)", (3, 4)),
    ((1, 2), "3", "a tuple")])
def test_options_of_a_users_own_loss(monkeypatch, default, typed, value, capsys):
    """A value that the loss gets, of its kind; or the kind that it takes, in one sentence."""
    heard = []
    mine(monkeypatch, default, heard)
    if isinstance(value, str) and value not in (typed, "7"):
        assert train.main(["--loss", "mine", "--x", typed]) == 2
        error = capsys.readouterr().err
        assert f"losses.mine takes {value}" in error and f", not '{typed}'" in error
        assert error.count("\n") == 1
    else:
        args = train.parse(["--loss", "mine", "--x", typed])
        assert args.x == value and type(args.x) is type(value)
        assert heard == [value if value is not None else default], "the trial call's option"
        assert train.parse(["--loss", "mine"]).x == default


@pytest.mark.parametrize("default", [{"a": 1}, [1], ...])
def test_an_option_that_no_flag_can_give_is_refused(monkeypatch, default, capsys):
    mine(monkeypatch, default, [])
    assert train.main(["--loss", "mine"]) == 2
    error = capsys.readouterr().err
    assert "losses.mine" in error and " x" in error and error.count("\n") == 1, error


def test_a_students_mistake_keeps_its_traceback(monkeypatch):
    def loss(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
        rows, tokens, vocabulary = logp.shape
    monkeypatch.setattr(losses, "mine", loss, raising=False)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        train.main(["--loss", "mine"])


def test_a_run_follows_the_schedule_and_a_resumed_one_that_of_its_new_length(base, capsys):
    flags = ("--loss", "grpo", "--warmup", 2, "--name", "rates")
    assert go(base, *flags, "--steps", 5) == 0
    lr = [float(row["lr"]) for row in rows(base, "rates")]
    assert lr == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4]), lr
    assert go(base, *flags, "--steps", 9, "--resume") == 0
    assert "steps was 5 and is 9 from here on" in capsys.readouterr().out
    lr = [float(row["lr"]) for row in rows(base, "rates")][5:]
    assert lr == pytest.approx([5e-4, 3.75e-4, 2.5e-4, 1.25e-4]), \
        f"steps 6 to 9 of a run of 9: {lr}"


SCREEN = ["step", "reward", "solved", "distinct", "equal", "parsed", "length", "cut", "entropy",
          "loss", "grad_norm"]


def test_the_screen_has_a_line_every_so_many_steps_and_the_log_has_all(base, capsys):
    """The first, every second and the last; an answer and the names above the first and every
    tenth of these."""
    flags = ("--loss", "grpo", "--show-every", 2, "--name", "shown")
    assert go(base, *flags, "--steps", 23) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    at = [i for i, words in enumerate(lines) if len(words) == 11 and words[0].isdigit()]
    assert [int(lines[i][0]) for i in at] == [1, *range(2, 23, 2), 23]
    named = [i for i, words in enumerate(lines) if words[0] == "step"]
    assert [int(lines[i + 1][0]) for i in named] == [1, 20]
    for i in named:
        assert lines[i] == SCREEN and "->" in lines[i - 1] and lines[i - 1][-2] == "reward"
    log = rows(base, "shown")
    assert [int(row["step"]) for row in log] == list(range(1, 24))
    for i in at:                                       # each number stands under its name
        row = log[int(lines[i][0]) - 1]
        assert [float(x) for x in lines[i]] == pytest.approx([float(row[x]) for x in SCREEN],
                                                             abs=0.05)


def reported(tmp_path, capsys, *lines):
    """What `report` says of steps of which some columns are these -> its lines on the screen."""
    this = argparse.Namespace(log=open(tmp_path / "log.csv", "w"), done=0, seconds=[], slow=False)
    for step, line in enumerate(lines, 1):
        line = dict.fromkeys(SCREEN, 0.5) | {"step": step, "tokens_s": 1.0} | line
        train.report(this, train.parse([]), line, "9 9 9 9,60=", "9*9-9-9", 1.0)
    return capsys.readouterr().out.splitlines()


def test_a_screen_line_has_room_in_a_hundred_columns(base, tmp_path, capsys):
    """All lines of a run with numbers as large as they get, and the names stand above them."""
    large = {"step": 1000000, "length": 16384.0, "grad_norm": 12345.678, "loss": -99.5,
             "entropy": 11.93, "reward": 1.0, "distinct": 256.0}
    assert max(map(len, reported(tmp_path, capsys, {}, large))) <= 100
    _, names, values = reported(tmp_path, capsys, {})
    ends = [i for i in range(1, len(names) + 1) if names[i - 1] != " " == (names + " ")[i]]
    assert len(ends) == 11 and all(values[:end][-1:].isdigit() for end in ends), (names, values)
    assert go(base, "--loss", "diffsmooth", "--steps", 2, "--name", "narrow", "--eval-problems", 2,
              "--eval-samples", 5) == 0
    table = ("gain over base", "base ", "Pass@")       # as wide as its models are many
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 100 or any(word in line for word in table) or str(base) in line, line


@pytest.mark.parametrize("slower, times", [(4, 1), (2, 0)])
def test_steps_that_become_slow_are_said_once_with_the_remedy(tmp_path, capsys, slower, times):
    """A token takes four times as long as in the first ten steps; twice is no news, and nor are a
    first step that compiles or one slow step."""
    speeds = [1.0, *[100.0] * 12, 1.0, *[100.0] * 5, *[100.0 / slower] * 15]
    lines = reported(tmp_path, capsys, *({"tokens_s": speed} for speed in speeds))
    said = [line for line in lines if "times as long" in line]
    assert len(said) == times and all("OMP_NUM_THREADS=1" in line and " 4 times" in line
                                      for line in said), lines


def test_a_run_folder_is_made_however_deep_it_lies(tmp_path):
    this = argparse.Namespace(folder=tmp_path / "a" / "b" / "run", base="owner/model")
    train.open_run(this, train.parse(TOY.split()))
    assert this.folder.is_dir()


def test_a_base_is_made_by_one_process_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world", lambda: 2)
    with pytest.raises(train.UserError, match="make it once without torchrun"):
        train.make_base(tmp_path / "base", train.parse(TOY.split()), "cpu", torch.float32)
    assert not any(tmp_path.iterdir())


def model_with(path, chat_template=None):
    """A fresh small model in a folder, as --model takes it."""
    policy, tokenizer = small()
    tokenizer.chat_template = chat_template
    policy_module.save(policy, tokenizer, path)
    return path


def test_a_model_is_taught_to_answer_once_and_the_base_is_kept(tmp_path, capsys):
    """--warm-steps with --model: what RL starts from is the model after so many steps; the second
    run finds it, and another model's run refuses it."""
    model = model_with(tmp_path / "given")
    flags = ["--model", model, "--prompt", "bare", "--warm-steps", 60, "--warm-lr", 1e-2,
             "--steps", 1, "--loss", "grpo"]
    assert go(tmp_path, *flags, "--name", "first") == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()
            if line.startswith("warm start")]
    assert [line[2] for line in told] == ["1/60", "25/60", "50/60", "60/60"]
    assert float(told[-1][4]) < 0.6 * float(told[0][4]), "the cross-entropy must fall"
    made = json.loads((tmp_path / "base" / "flags.json").read_text())
    taught = [made[key] for key in ("model", "warm_steps", "warm_lr", "counts")]
    assert taught == [str(model), 60, 1e-2, [2]]
    mark = evaluation.fingerprint(tmp_path / "base" / "model")
    assert mark != evaluation.fingerprint(model)
    assert json.loads((tmp_path / "first" / "flags.json").read_text())["files"]["the base"] == mark
    assert go(tmp_path, *flags, "--name", "second") == 0
    assert "warm start" not in capsys.readouterr().out
    assert rows(tmp_path, "first")[0]["reward"] == rows(tmp_path, "second")[0]["reward"]
    assert go(tmp_path, *flags, "--name", "second", "--steps", 2, "--resume") == 0
    other = model_with(tmp_path / "other")
    assert go(tmp_path, *flags, "--name", "third", "--model", other) == 2
    assert f"was made with model {model}, not {other}" in capsys.readouterr().err
    assert go(tmp_path, "--name", "third", "--loss", "grpo", "--steps", 1) == 2
    assert f"was made with model {model}, not None" in capsys.readouterr().err


def test_a_model_starts_as_it_is_and_one_that_never_answers_is_told_of(base, tmp_path, capsys):
    model = model_with(tmp_path / "given")
    flags = ["--model", model, "--prompt", "bare", "--steps", 2, "--loss", "grpo", "--lr", 1e-9]
    assert go(tmp_path, *flags) == 0
    told = capsys.readouterr().out
    assert not (tmp_path / "base").exists() and rows(tmp_path, "grpo")[0]["solved"] == "0"
    assert told.count("no answer of the first batch is correct") == 1 and "--warm-steps" in told
    files = json.loads((tmp_path / "grpo" / "flags.json").read_text())["files"]
    assert files["the base"] == evaluation.fingerprint(model)
    assert go(base, "--loss", "grpo", "--steps", 1, "--name", "hopeful") == 0
    assert float(rows(base, "hopeful")[0]["solved"]) > 0
    assert "no answer of the first batch" not in capsys.readouterr().out


def test_a_model_is_taught_as_it_will_be_asked(tmp_path, monkeypatch):
    """A chat model behind its template, word for word what `collect` asks; by AdamW, up to the
    rate asked for. The tiny policy by Muon."""
    template = ("{% for m in messages %}({{ m['role'] }}){{ m['content'] }}{% endfor %}"
                "(assistant)")
    asked, rates, make = [], [], train.demonstrations
    monkeypatch.setattr(train, "demonstrations",
                        lambda *given: asked.extend(given[1]) or make(*given))
    monkeypatch.setattr(train, "set_rate", lambda optimizer, lr: rates.append(
        (type(optimizer), pytest.approx(lr))) or lr)
    monkeypatch.setattr(train, "run",
                        lambda args: train.start_policy(args, "cpu", torch.float32) and 0)
    model = model_with(tmp_path / "given", template)
    assert go(tmp_path, "--model", model, "--prompt", "ask", "--warm-steps", 2,
              "--warm-lr", 3e-4) == 0
    task, rng = Countdown(counts=(2,), high=4, targets=(1, 8), style="ask"), random.Random(0)
    first = sampling.chat(policy_module.load(model)[1], task.system,
                          task.prompt(task.example(rng)[0]), "ask")
    assert asked[:2] == [first] * 2 and len(asked) == 2 * 32
    assert first.startswith("(system)You are") and first.endswith("(assistant)")
    assert rates == [(torch.optim.AdamW, 3e-4 / 20)] * 2
    rates.clear()
    made = small()
    monkeypatch.setattr(policy_module, "tiny", lambda seed: made)
    assert go(tmp_path, "--base", "tiny", "--warm-steps", 1) == 0
    assert rates[0] == (train.Muon, 1e-2 / 20)


@pytest.mark.parametrize("flags, sentence", [
    (["--prompt", "think", "--warm-steps", "1"], "not --prompt think"),
    (["--task", "math", "--data", "{out}.jsonl", "--warm-steps", "1"], "--task math"),
    (["--prompt", "bare", "--warm-steps", "1", "--warm-lr", "0"], "--warm-lr"),
    (["--prompt", "bare", "--warm-steps", "-1"], "--warm-steps")])
def test_what_cannot_be_taught_is_refused(tmp_path, capsys, flags, sentence):
    (tmp_path / "runs.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    out, model = tmp_path / "runs", model_with(tmp_path / "given")
    flags = [flag.replace("{out}", str(out)) for flag in flags]
    toy = [] if "math" in flags else TOY.split()
    assert train.main([*toy, "--out", str(out), "--model", str(model), *flags]) == 2
    assert sentence in capsys.readouterr().err and not out.exists()


def table_of(text):
    """The head of a printed table: its columns."""
    return next(line for line in text.splitlines() if "(gain over base)" in line)


def test_the_table_has_a_column_for_what_was_measured_alike(base, capsys, monkeypatch):
    """A run beside this one counts where task, base, samples, temperature and problems are the
    same; and nothing is measured twice."""
    measured, evaluate = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate",
                        lambda *args, **options: measured.append(len(args[3]))
                        or evaluate(*args, **options))
    table = ("--steps", 1, "--eval-problems", 2, "--eval-samples", 2)
    assert go(base, "--loss", "rloo", "--name", "first", *table) == 0
    text = capsys.readouterr().out
    assert "first (gain over base)" in table_of(text) and len(measured) == 2, "the base and the run"
    assert text.splitlines()[-1].endswith("python train.py --loss grpo"), \
        "alone, it names the other command"
    assert go(base, "--loss", "grpo", "--name", "second", *table) == 0
    text = capsys.readouterr().out
    assert "first (gain over base)" in text and "second (gain over base)" in text
    assert len(measured) == 3, "the base is known"
    one, two = (json.loads((base / name / "eval.json").read_text())["models"]
                for name in ("first", "second"))
    assert one["base"] == two["base"] and set(two) == {"base", "second"}
    for name, more in (("n", ("--eval-samples", 4)), ("T", ("--eval-temperature", 1.3)),
                       ("problems", ("--eval-problems", 1)), ("length", ("--max-new-tokens", 7)),
                       ("stop", ("--stop", "7"))):
        flags = dict(zip(table[::2], table[1::2])) | dict([more])
        assert go(base, "--loss", "grpo", "--name", f"other {name}",
                  *[x for pair in flags.items() for x in pair]) == 0
        assert "first" not in table_of(capsys.readouterr().out), f"another {name} is another table"
    with monkeypatch.context() as patch:
        start = train.start_processes
        patch.setattr(train, "start_processes", lambda device: (start(device)[0], torch.bfloat16))
        assert go(base, "--loss", "grpo", "--name", "other dtype", *table) == 0
        assert "first" not in table_of(capsys.readouterr().out), "another dtype is another table"
    (base / "first" / "eval.json").write_text('{"setting": ')
    assert go(base, "--loss", "grpo", "--name", "third", *table) == 0
    text = table_of(capsys.readouterr().out)
    assert "first" not in text and "second" in text, "a file cut in half is passed over"


def test_a_base_that_differs_in_one_late_matrix_is_another_base(tmp_path, capsys):
    """A model of 4 MB: what tells two apart must be all of their bytes."""
    policy, tokenizer = policy_module.tiny()
    for number, name in enumerate(("one", "two")):
        policy.model.layers[-1].mlp.down_proj.weight.data[-1, -1] += number
        policy_module.save(policy, tokenizer, tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0][:2 << 20] == weights[1][:2 << 20], "the difference has to be a late one"
    flags = ["--loss", "rloo", "--steps", 1, "--eval-problems", 2, "--eval-samples", 2]
    assert go(tmp_path, *flags, "--model", tmp_path / "one", "--name", "first") == 0
    assert go(tmp_path, *flags, "--model", tmp_path / "two", "--name", "second") == 0
    assert "first (gain" not in table_of(capsys.readouterr().out.partition("second")[2])
    one, two = (json.loads((tmp_path / name / "eval.json").read_text())["models"]["base"]
                for name in ("first", "second"))
    assert one["fingerprint"] != two["fingerprint"]
    shutil.copytree(tmp_path / "two", tmp_path / "one", dirs_exist_ok=True)
    assert go(tmp_path, *flags, "--model", tmp_path / "one", "--name", "first", "--resume") == 2
    assert "the base has changed since it began" in capsys.readouterr().err


def test_a_kl_weight_loads_the_frozen_reference(base):
    assert go(base, "--loss", "grpo", "--beta", 0.1, "--steps", 2, "--name", "kl") == 0
    first, second = (float(row["kl"]) for row in rows(base, "kl"))
    assert first < 1e-6 < second


# -------------------------- for those who write the step themselves: failures that know the mistake

def probed(gradients):
    """A gradient of the model as three numbers: its norm, and its products with two fixed
    directions."""
    g = torch.cat([x.flatten() for x in gradients])
    directions = torch.randn(2, len(g), generator=torch.Generator().manual_seed(5))
    return torch.cat([g.norm()[None], directions @ g])


@core("train_step")
@pytest.mark.parametrize("micro_batch", [None, 4, 8])
def test_the_gradient_of_the_whole_batch_is_named(micro_batch):
    """A mean over all tokens of the batch, and an entropy bonus; chunks of whole groups, so that a
    loss a chunk would not fail."""
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer, 0.7)
    loss_fn = functools.partial(losses.entropy, entropy_coef=0.3, agg="token_mean")

    def slopes(rows=slice(0, 12), temperature=0.7, bonus=True):
        logp, entropy = naive_score(policy, rollout, temperature)
        loss, _ = loss_fn(logp[rows], logp[rows].detach(), rollout.mask[rows], REWARDS[rows], G,
                          entropy=(entropy if bonus else entropy.detach())[rows])
        return torch.autograd.grad(loss, list(policy.parameters()))

    whole = probed(slopes())
    size = micro_batch or 12
    chunks = [probed(slopes(slice(i, i + size))) for i in range(0, 12, size)]
    value, plain = (loss_fn(logp, logp, rollout.mask, REWARDS, G, entropy=entropy)[0].item()
                    for logp, entropy in (naive_score(policy, rollout, T) for T in (0.7, 1.0)))
    stats = train.train_step(policy, Still(policy), rollout, REWARDS, loss_fn, G, temperature=0.7,
                             micro_batch=micro_batch, grad_clip=1e9)
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in policy.parameters()]
    linear = lambda parts: torch.cat([whole[:1] * 0, sum(parts)[1:]])       # norms do not add up
    bugs = lambda: {
        "the mean of the chunks' losses, where the batch has one": linear(chunks) / len(chunks),
        "the sum of the chunks' losses": linear(chunks),
        "the last chunk's gradient alone": linear(chunks[-1:]),
        "the first chunk's gradient alone": linear(chunks[:1]),
        "the gradient divided by the chunks once more": linear([whole]) / len(chunks),
        "a temperature of 1 in the score": linear([probed(slopes(temperature=1.0))]),
        "the entropy's gradient dropped": linear([probed(slopes(bonus=False))]),
        "the sign": -linear([whole]), "no gradient at all: is the loss cut off?": 0 * whole}
    check(f"the gradient with micro_batch {micro_batch}, probed in two directions",
          linear([probed(grads)]), linear([whole]), 1e-4, 1e-3, bugs=bugs)
    check("the norm of the gradient", probed(grads)[0], whole[0], 1e-4, 1e-3)
    check(f"stats['loss'] with micro_batch {micro_batch}", stats["loss"], value, 1e-4, 1e-4,
          bugs={"a temperature of 1 in the score": plain})


@core("train_step")
def test_old_log_probabilities_are_used():
    """Given old_logp, the ratio is not 1: the loss of reinforcement is that of losses.py for these
    numbers."""
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer)
    logp, entropy = (x.detach() for x in naive_score(policy, rollout, 1.0))
    # by one factor each, A would cancel
    old = torch.where(rollout.mask, logp - 0.15 * REWARDS[:, None], 0.0)
    right, same = (losses.grpo(logp, x, rollout.mask, REWARDS, G)[0].item() for x in (old, logp))
    stats = train.train_step(policy, Still(policy), rollout, REWARDS, losses.grpo, G, old_logp=old)
    check(
        "stats['loss'] with old_logp given", stats["loss"], right, 1e-4, 1e-4, bugs={
            "old_logp ignored": same, "logp and old_logp exchanged":
            losses.grpo(old, logp, rollout.mask, REWARDS, G)[0].item()
        })


@core("train_step")
def test_a_step_goes_downhill_and_begins_afresh():
    """Plain gradient descent: w becomes w - lr g, in the second step as well: no gradient is left
    over from the first."""
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    left = None
    for step in (1, 2):
        logp, entropy = naive_score(policy, rollout, 1.0)
        loss, _ = SMOOTH(logp, logp.detach(), rollout.mask, REWARDS, G, entropy=entropy)
        right = probed(torch.autograd.grad(loss, list(policy.parameters())))
        before = [w.detach().clone() for w in policy.parameters()]
        train.train_step(policy, optimizer, rollout, REWARDS, SMOOTH, G, grad_clip=1e9)
        moved = probed([(a - w.detach()) / 0.01 for a, w in zip(before, policy.parameters())])
        bugs = {
            "the sign: uphill": right * torch.tensor([1., -1, -1]), "no optimizer.step()": 0 * right
        }
        if left is not None:
            bugs["the gradient of the step before still in it: zero_grad is missing"] = torch.cat(
                [moved[:1], (right + left)[1:]])
        check(f"what step {step} took off the weights, by lr", moved, right, 2e-3, 2e-3, bugs=bugs)
        left = right


@care("train_step")
def test_the_gradient_is_clipped_and_its_norm_told():
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer)
    stats = train.train_step(policy, Still(policy), rollout, REWARDS, SMOOTH, G, grad_clip=1e9)
    whole = gradient(policy).norm().item()
    check("stats['grad_norm'], before clipping", stats["grad_norm"], whole, 1e-5, 1e-4)
    stats = train.train_step(policy, Still(policy), rollout, REWARDS, SMOOTH, G,
                             grad_clip=whole / 2)
    check("the norm of a gradient clipped at half its norm",
          gradient(policy).norm(), whole / 2, 1e-5, 1e-3)
    check("stats['grad_norm'], before clipping", stats["grad_norm"], whole, 1e-5, 1e-4)
    claim(
        all(isinstance(value, (float, int)) for name, value in stats.items() if name != "bad_rows"),
        "stats must be a flat dict of floats")


@care("train_step")
def test_the_reference_reaches_the_loss():
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer)
    reference = torch.where(rollout.mask, naive_score(policy, rollout, 1.0)[0].detach() - 0.5, 0.0)
    stats = train.train_step(policy, Still(policy), rollout, REWARDS,
                             functools.partial(losses.grpo, beta=0.1), G, ref_logp=reference)
    check("stats['kl'] for a reference 0.5 below on each token", stats["kl"],
          0.5 + 2.718281828**-0.5 - 1, 1e-4, 1e-4)
