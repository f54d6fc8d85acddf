"""Runs that survive, inputs that bite: kills, signals, NaN, full disks, damaged files, odd batches,
wrong flags.

    python -m pytest -q tests/test_survival.py
    python tests/test_survival.py 25       # kill -9 a run at 25 random moments: minutes

Bugs killed here: a resumed run that differs in one bit, a half-made base that is believed, --resume
refused before the first checkpoint, a signal that loses the step, shows a traceback or is answered
late, a flipped bit or a cut file that is believed, a NaN that moves weights or optimiser or blames
the wrong rows, a full disk that costs the checkpoint before, a bad flag told after hours or after
files were written, runs measured on another run's task, an empty or one-sided batch that gives NaN,
network traffic without a hub name, anything unpickled or executed.
"""
import ast
import errno
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

# for the script; pytest does it by itself
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
import losses
import policy as policy_module
import train
from test_train import (G, HELD_OUT, REWARDS, ROOT, SMOOTH, TOY, base, go, rollout_of, rows, small,
                        untimed)


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def checkpoints(folder):
    return [file.name for file in sorted((folder / "checkpoints").glob("*.pt"))]


# ------------------------------------------------------------------------------------------ kill -9

RUN = [*TOY.split(), "--loss", "diffsmooth", "--warm-steps", "5", "--save-every", "2",
       "--name", "run"]


def launch(out, steps):
    """The run as a process of its own: started, or gone on with once its folder says that it is
    one. What it prints is beside its folder of runs."""
    again = ["--resume"] if (out / "run" / "flags.json").is_file() else []
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *RUN, "--out", str(out),
                             "--steps", str(steps), *again],
                            stdout=open(said(out), "w"), stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})


def said(out):
    return Path(f"{out}.said")


def steps_logged(out):
    log = out / "run" / "log.csv"
    return max(0, len(log.read_text().splitlines()) - 1) if log.is_file() else 0


# Name -> has it come? (out, steps logged when the process started)
MOMENTS = {
    "during the warm start": lambda out, before: "warm start" in said(out).read_text(),
    "while the base is saved": lambda out, before: any(out.glob("base.*.tmp")),
    "before the first checkpoint": lambda out, before: (out / "run" / "flags.json").is_file(),
    "while a checkpoint is written": lambda out, before: any(out.glob("run/checkpoints/*.tmp")),
    "any time": lambda out, before: steps_logged(out) != before,
}


def kill_at(moment, out, steps, rng):
    """Launch, wait for the moment and a random while more, kill -9 -> what was found on disk; None
    if it finished before."""
    before = steps_logged(out)
    delay = rng.uniform(0, 2.0 if moment in ("any time", "during the warm start") else 0.01)
    process = launch(out, steps)
    while not MOMENTS[moment](out, before):
        if process.poll() is not None:
            assert process.returncode == 0, said(out).read_text()
            return None
        time.sleep(0.0003)
    time.sleep(delay)
    process.kill()
    process.wait()
    half = [file.name for file in [*out.glob("*.tmp"), *out.glob("*/*.tmp"),
                                   *out.glob("*/checkpoints/*.tmp")]]
    made = [(out / "base" / name).exists() for name in ("", "flags.json", "model")]
    assert len(set(made)) == 1, "half a base"
    return steps_logged(out), checkpoints(out / "run"), half


def kill_and_resume(out, moments, steps, rng, say=lambda *line: None):
    """Kill one run at each of the moments in turn, let it finish, and compare it with one that
    nobody disturbed."""
    unbroken = launch(out / "unbroken", steps)
    for number, moment in enumerate(moments, 1):
        found = kill_at(moment, out / "broken", steps, rng)
        assert found, f"the run was over before kill {number}: give it more steps"
        say(number, moment, *found)
    one, two = out / "unbroken", out / "broken"
    for process, folder in ((launch(two, steps), two), (unbroken, one)):
        assert process.wait() == 0, said(folder).read_text()
    assert weights(one / "base") == weights(two / "base"), "the base differs from one made in peace"
    assert untimed(one, "run") == untimed(two, "run"), "the log differs from the unbroken run's"
    assert len(untimed(two, "run")) == steps
    assert weights(one / "run") == weights(two / "run"), \
        "the weights differ from the unbroken run's"
    for folder in (one, two):
        left = sorted(file.name for file in (folder / "run" / "checkpoints").iterdir())
        assert left == [f"{steps - 2:07d}.pt", f"{steps:07d}.pt"], "not the last two, or more"


def test_killed_runs_go_on_bit_for_bit(tmp_path):
    moments = ["while the base is saved", "before the first checkpoint",
               "while a checkpoint is written"]
    kill_and_resume(tmp_path, moments, 8, random.Random(0))


def test_resume_before_the_first_checkpoint_starts_the_same_run(base):
    assert go(base, "--loss", "grpo", "--steps", 3, "--name", "early") == 0
    before = untimed(base, "early"), weights(base / "early")
    # killed ever earlier
    for left in ((), ("flags.json", "log.csv"), ("flags.json.tmp",)):
        for file in [file for file in (base / "early").iterdir() if file.name not in left]:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        again = ["--resume"] if "flags.json" in left else []
        assert go(base, "--loss", "grpo", "--steps", 3, "--name", "early", *again) == 0
        assert before == (untimed(base, "early"), weights(base / "early"))
        (base / "early" / "flags.json.tmp").write_text("{")


def test_a_finished_run_says_so(base, capsys):
    flags = ("--loss", "grpo", "--steps", 2, "--name", "finished")
    assert go(base, *flags) == 0
    before, log = weights(base / "finished"), rows(base, "finished")
    capsys.readouterr()
    assert go(base, *flags, "--resume") == 0
    assert "all 2 steps are done already" in capsys.readouterr().out
    assert before == weights(base / "finished") and log == rows(base, "finished")


# ------------------------------------------------------------------------------------------ signals

@pytest.fixture
def signals():
    """Handlers as they were, afterwards."""
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    yield
    for sign, handler in before.items():
        signal.signal(sign, handler)


def raising(sign, function, at=1):
    """`function`, and in its call number `at` the signal arrives."""
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(sign)
        return function(*args, **kwargs)
    return wrapped


AGAIN = "the same command with --resume goes on"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_is_answered_at_once_ends_the_step_and_saves(base, sign, monkeypatch, capfd,
                                                              signals):
    flags = ("--loss", "grpo", "--steps", 5, "--save-every", 100)
    name = f"half{sign}"
    assert go(base, *flags, "--name", f"whole{sign}") == 0
    steps, at_once, collect = [], [], train.collect
    def interrupted(*args):
        steps.append(None)
        if len(steps) == 3:
            capfd.readouterr()
            signal.raise_signal(sign)
            at_once.append(capfd.readouterr().err)
            signal.raise_signal(sign)                  # torchrun's, of the same Ctrl-C
        return collect(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "collect", interrupted)
        assert go(base, *flags, "--name", name) == 128 + sign
    assert "stopping after this step" in at_once[0], "it is silent until the step ends"
    text = capfd.readouterr()
    assert f"stopped after step 3, all saved; {AGAIN}" in text.out and text.err == "", text
    assert len(rows(base, name)) == 3 and checkpoints(base / name) == ["0000003.pt"]
    assert go(base, *flags, "--name", name, "--resume") == 0
    assert untimed(base, name) == untimed(base, f"whole{sign}")
    assert weights(base / name) == weights(base / f"whole{sign}"), "weights differ after the signal"


def test_a_signal_in_the_warm_start_or_the_table_is_one_line(tmp_path, monkeypatch, capsys,
                                                             signals):
    flags = [*TOY.split(), "--loss", "grpo", "--steps", "1", "--warm-steps", "3", "--out",
             str(tmp_path), "--name", "run", "--eval-problems", "2", "--eval-samples", "2"]
    for sign in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patch:
            patch.setattr(train, "demonstrations", raising(sign, train.demonstrations, at=2))
            assert train.main(flags) == 128 + sign
        error = capsys.readouterr().err
        assert error == "stopped before the first step; the same command starts it again.\n"
        assert not any(tmp_path.iterdir()), "something looks like a base or a run"
    for sign, more in ((signal.SIGINT, []), (signal.SIGTERM, ["--resume"])):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "evaluate", raising(sign, evaluation.evaluate))
            assert train.main([*flags, *more]) == 128 + sign
        error = capsys.readouterr().err
        assert error.startswith(f"stopped after the last step, all saved; {AGAIN}")
        assert error.count("\n") == 1, error
    assert train.main([*flags, "--resume"]) == 0, "the same command makes the table"
    assert "Pass@2" in capsys.readouterr().out and (tmp_path / "run" / "eval.json").is_file()


def test_a_second_signal_does_not_wait_for_the_step(base, monkeypatch, capsys, signals):
    """Within a second it is the first one, passed on; later somebody has pressed it again."""
    now = [time.time()]
    monkeypatch.setattr(train.time, "time", lambda: now[0])
    def impatient(*args):
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.9
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.2
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the step went on")
    monkeypatch.setattr(train, "collect", impatient)
    assert go(base, "--loss", "grpo", "--steps", 2, "--name", "impatient") == 130
    assert f"stopped within a step; {AGAIN}" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- checkpoints

def trained(folder, steps=(1, 2, 3)):
    """A small policy, its optimiser and draws, after `steps`, each of them saved -> what
    load_checkpoint restores into."""
    policy, tokenizer = policy_module.tiny(width=8, layers=1, heads=1, kv_heads=1, inner=8)
    optimizer = train.make_optimizer(policy, 1e-2)
    rng, generator = random.Random(0), torch.Generator()
    rollout = rollout_of(policy, tokenizer)
    for step in steps:
        train.train_step(policy, optimizer, rollout, REWARDS, SMOOTH, G)
        rng.random(), torch.rand(1, generator=generator)
        train.save_checkpoint(folder, policy, optimizer, step, rng, generator)
    return policy, optimizer, rng, generator


def everything(policy, optimizer, rng, generator):
    numbers = [value for w in policy.parameters() for value in (w, *optimizer.state[w].values())]
    return [x.tolist() for x in numbers], rng.getstate(), generator.get_state().tolist()


def test_a_flipped_bit_or_a_cut_file_never_passes(tmp_path, capsys):
    """Directory, step, weights, optimiser, random states: after damage at random places either the
    file is refused and the one before it is used, or what is restored is the same to the last bit.
    """
    state, draw, refused = trained(tmp_path), random.Random(0), []
    older, newest = sorted(tmp_path.glob("*.pt"))
    assert [older.name, newest.name] == ["0000002.pt", "0000003.pt"], "the last two are kept"
    after = {}
    whole = newest.read_bytes()
    for content in (whole, b""):                       # what the two hold; they disagree
        newest.write_bytes(content)
        step = train.load_checkpoint(tmp_path, *state)
        after[step] = everything(*state)
    assert set(after) == {2, 3} and all(a != b for a, b in zip(after[2], after[3])), \
        "some part is not restored"
    places = [*draw.sample(range(len(whole)), 70), *draw.sample(range(4000), 30),
              *draw.sample(range(len(whole) - 8000, len(whole)), 60)]
    flipped = [bytes([*whole[:at], whole[at] ^ 1 << draw.randrange(8), *whole[at + 1:]])
               for at in places]
    cut = [whole[:n] for n in (0, 7, 8, 100, 4000, len(whole) // 2, len(whole) - 1)]
    for damaged in [*flipped, *cut, bytes(len(whole)), whole + b"\0"]:
        newest.write_bytes(damaged)
        step = train.load_checkpoint(tmp_path, *state)
        assert everything(*state) == after[step], "damage was believed"
        refused.append(step == 2)
    assert sum(refused) > 70 and all(refused[len(places):-1]), sum(refused)
    assert "0000003.pt is damaged" in capsys.readouterr().out
    older.unlink()
    newest.write_bytes(b"")
    with pytest.raises(train.UserError, match="no usable checkpoint"):
        train.load_checkpoint(tmp_path, *state)


def test_every_number_in_a_checkpoint_is_guarded_by_a_checksum(tmp_path):
    """A bit that flips in a tensor's own bytes, or in what is pickled, is noticed."""
    state = trained(tmp_path)
    newest = tmp_path / "0000003.pt"
    whole = newest.read_bytes()
    with zipfile.ZipFile(newest) as parts:
        contents = {part.filename: parts.read(part) for part in parts.infolist()
                    if "/data/" in part.filename or part.filename.endswith("data.pkl")}
    assert len(contents) > 40
    for name, content in contents.items():
        at = whole.index(content) + len(content) // 2
        newest.write_bytes(bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1:]]))
        assert train.load_checkpoint(tmp_path, *state) == 2, f"a bit of {name} flipped unseen"


def test_a_run_that_went_on_from_before_a_damaged_checkpoint_keeps_two_whole_ones(tmp_path):
    state = trained(tmp_path, steps=(4, 8))
    (tmp_path / "0000008.pt").write_bytes(b"half")
    (tmp_path / "0000007.tmp").write_bytes(b"a killed save's")
    assert train.load_checkpoint(tmp_path, *state) == 4
    for step in (5, 6):
        train.save_checkpoint(tmp_path, state[0], state[1], step, *state[2:])
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["0000005.pt", "0000006.pt"]


# ---------------------------------------------------------------------------- numbers that are none

def poisoned(bad_calls, poison, grpo=losses.grpo):
    """grpo whose value in some of its calls (the first is 1) is spoilt through the log-probability
    of row 2."""
    calls = []
    @functools.wraps(grpo)                             # the flags are read from the signature
    def loss(logp, *args, **kwargs):
        value, stats = grpo(logp, *args, **kwargs)
        calls.append(None)
        return (value + (poison * logp[2]).sum()
                if logp.requires_grad and len(calls) - 1 in bad_calls else value), stats
    return loss                                        # call 0 checks the options


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_step_is_named_and_skipped(base, poison, monkeypatch, capsys):
    """Step 2 of 3 is bad."""
    name = f"poison{poison}"
    monkeypatch.setattr(losses, "grpo", poisoned({2}, poison))
    texts, note = [], train.note_bad_steps
    monkeypatch.setattr(train, "note_bad_steps", lambda this, step, stats, rollout, rows: (
        texts.extend(rollout.texts * (step == 2)), note(this, step, stats, rollout, rows)))
    assert go(base, "--loss", "grpo", "--steps", 3, "--save-every", 1, "--name", name) == 0
    text = capsys.readouterr().out
    assert "step 2 is skipped" in text and text.count(" is skipped") == 1
    assert f"caused by row 2 {texts[2]!r}\n" in text, text
    assert [float(row["grad_norm"]) < 1e9 for row in rows(base, name)] == [True, False, True], \
        "the log says so as well"
    policy, _ = policy_module.load(base / name / "model")
    assert all(w.isfinite().all() for w in policy.parameters())


def test_a_bad_step_leaves_weights_and_optimiser_alone():
    policy, tokenizer = small()
    optimizer, rollout = train.make_optimizer(policy, 1e-2), rollout_of(policy, tokenizer)
    step = functools.partial(train.train_step, policy, optimizer, rollout, REWARDS, group_size=G)
    state = lambda: [x.clone() for w in policy.parameters()
                     for x in (w.detach(), *optimizer.state[w].values())]
    assert not step(loss_fn=SMOOTH)["bad"]
    before = state()
    def broken(logp, *args, **kwargs):
        return logp[5].sum() * float("inf"), {}
    assert step(loss_fn=broken)["bad_rows"] == [5]
    assert all(torch.equal(a, b) for a, b in zip(before, state())), \
        "a bad step moved the weights or the optimiser"
    assert not step(loss_fn=SMOOTH)["bad"], "and the next step is a good one"


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_nan_born_in_the_backward_moves_nothing(micro_batch):
    """Log-probabilities and their gradients are all finite; the model's own backward overflows on
    one answer."""
    policy, tokenizer = small()
    rollout, forward = rollout_of(policy, tokenizer), policy.forward
    def overflowing(tokens, mask=None, cache=None):
        hidden = forward(tokens, mask, cache)
        if tokens.shape[1] > 1 and hidden.requires_grad:
            hidden.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        return hidden
    policy.forward = overflowing
    before = [w.detach().clone() for w in policy.parameters()]
    stats = train.train_step(policy, train.make_optimizer(policy, 1e-2), rollout, REWARDS, SMOOTH,
                             G, micro_batch=micro_batch)
    assert stats["bad"] and stats["bad_rows"] == [], "no row's log-probability is to blame"
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters())), \
        "weights moved on a NaN"


def test_three_bad_steps_in_a_row_end_the_run(base, monkeypatch, capsys):
    flags = ("--loss", "grpo", "--steps", 9, "--save-every", 3, "--name", "thrice")
    with monkeypatch.context() as patch:
        patch.setattr(losses, "grpo", poisoned({2, 3, 5, 6, 7}, float("nan")))
        assert go(base, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "three steps in a row" in error, error
    assert str(base / "thrice" / "checkpoints" / "0000006.pt") in error, \
        "the last good checkpoint is named"
    assert len(rows(base, "thrice")) == 7, "two bad steps in a row do not end it"
    assert go(base, *flags, "--resume", "--lr", "1e-4") == 0, \
        "and the run can go on from there with a smaller --lr"
    assert "lr was 0.001 and is 0.0001 from here on." in capsys.readouterr().out, \
        "an --lr that changes is never silent"
    assert [row["step"] for row in rows(base, "thrice")] == [str(step) for step in range(1, 10)]


# ----------------------------------------------------------------------------- full disk, no memory

def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_nothing_that_was_saved(base, monkeypatch, capsys):
    """/dev/full refuses the log for real, a limit on the size of files the checkpoint; then each
    flush to disk fails."""
    flags = ("--loss", "grpo", "--save-every", 2, "--name", "full")
    assert go(base, *flags, "--steps", 4) == 0
    saved = base / "full" / "checkpoints"
    good = {name: (saved / name).read_bytes() for name in checkpoints(base / "full")}
    def fails(steps, says):
        capsys.readouterr()
        assert go(base, *flags, "--steps", steps, "--resume") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1, error
        assert good == {name: (saved / name).read_bytes() for name in good}, "a checkpoint changed"
    if Path("/dev/full").exists():
        with monkeypatch.context() as patch:
            patch.setattr(train, "open_log", lambda path, done: open("/dev/full", "a", newline=""))
            fails(8, "the disk is full")
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Bytes that a file may have: fewer than a checkpoint's.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        fails(8, "the disk is full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for place in ("save_checkpoint", "write_line", "save_model"):
        with monkeypatch.context() as patch:
            inner = getattr(train, place)
            def on_a_full_disk(*args):
                patch.setattr(os, "fsync", full_disk)
                return inner(*args)
            patch.setattr(train, place, on_a_full_disk)
            fails(4 if place == "save_model" else 8, "the disk is full")
    assert go(base, *flags, "--steps", 8, "--resume") == 0, "with room again the run goes on"
    assert len(rows(base, "full")) == 8


def no_memory_cpu(*args, **kwargs):
    torch.empty(1 << 50)                               # what the allocator says, in its own words


def no_memory_gpu(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("trouble", [no_memory_cpu, no_memory_gpu])
def test_out_of_memory_names_the_flags_and_they_may_change_on_resume(base, trouble, monkeypatch,
                                                                     capsys):
    flags, name = ("--loss", "grpo", "--save-every", 1, "--steps", 2), trouble.__name__
    assert go(base, *flags[:-1], 1, "--name", name) == 0
    for where in ("sample", "train_step"):
        with monkeypatch.context() as patch:
            patch.setattr(train, where, trouble)
            capsys.readouterr()
            assert go(base, *flags, "--name", name, "--resume") == 2
        error = capsys.readouterr().err
        assert "out of memory" in error and "--micro-batch" in error and "--rows" in error
        assert error.count("\n") == 1, error
    assert go(base, *flags, "--name", name, "--resume", "--micro-batch", 3, "--rows", 8) == 0
    monkeypatch.setattr(evaluation, "sample", trouble)
    capsys.readouterr()
    assert evaluation.main([str(base / name), "--n", "2", "--problems", "2", "--device",
                            "cpu"]) == 2
    assert "--rows" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- wrong input

BAD = {  # command line -> what the one sentence must say
    # flags of train.py: unknown, of the wrong type, out of range, contradictory
    "train --loss nonsense": "unknown loss 'nonsense'; these exist:",
    "train --loss grpo --gamma_p 0.1": "'--gamma-p' is not a flag, nor an option of loss grpo",
    "train --loss sft --clip_low 0.1": "nor an option of loss sft, which has: none",
    "train --loss grpo --stps 3": "'--stps'",
    "train --loss grpo --prompt rude": "--prompt: invalid choice",
    "train --loss grpo --task poetry": "--task: invalid choice",
    "train --loss grpo --name": "--name: expected one argument",
    **{f"train --loss grpo --{flag} {value}": f"--{flag}"
       for value in ("three", "1e3", "2.5", "-1")
       for flag in ("prompts", "group-size", "dynamic-sampling", "steps", "updates", "warmup",
                    "micro-batch", "warm-steps", "eval-every", "eval-problems", "eval-samples",
                    "rows", "save-every", "show-every", "seed", "max-new-tokens")},
    **{f"train --loss grpo --{flag} 0": f"--{flag}"
       for flag in ("prompts", "group-size", "steps", "updates", "warm-steps", "eval-samples",
                    "rows", "save-every", "show-every", "max-new-tokens", "temperature", "lr",
                    "grad-clip", "warm-lr")},
    **{f"train --loss grpo --{flag} {value}": f"--{flag}"
       for flag in ("temperature", "lr", "grad-clip", "warm-lr")
       for value in ("warm", "nan", "-1")},
    "train --loss grpo --lr inf": "--lr",
    "train --loss grpo --temperature inf": "--temperature",
    "train --loss grpo --seed 99999999999999999999": "--seed",
    "train --loss grpo --counts 1 --base new": "counts must be integers from 2 to 5",
    "train --loss grpo --counts two": "--counts",
    "train --loss grpo --high 0 --base new": "high must be an integer from 1",
    "train --loss grpo --targets 9 1 --base new": "targets must be a pair",
    "train --loss grpo --targets 9": "--targets: expected 2 arguments",
    "train --loss grpo --targets 900 901 --base new": "widen targets",
    "train --loss grpo --updates 3": "--updates must divide --prompts",
    "train --loss grpo --eval-problems 99999": "held-out problems found",
    "train --loss passk --k 99": "k = 99 must be between 1 and the group size 8",
    "train --loss passk --k 2.5": "k = 2.5 must be",
    "train --loss passk --k two": "losses.passk takes a number, not 'two'",
    "train --loss grpo --agg median": "unknown agg",
    "train --loss diffsmooth --reduction max": "unknown reduction",
    "train --loss diffsmooth --gamma_p nan": "the options of --loss diffsmooth make its value nan",
    "train --loss diffsmooth --gamma_p much": "--gamma-p",
    "train --loss focal --focal_gamma -1": "focal_gamma",
    "train --loss grpo --device quantum": "--device quantum is not available",
    "train --loss grpo --device meta": "--device meta is not available",
    # what it starts from
    "train --loss grpo --counts 3": "/base' was made with counts [2], not [3]: --base",
    "train --loss grpo --high 5": "was made with high 4, not 5",
    "train --loss grpo --model no/such/model": "no/such/model",
    "train --loss grpo --model {out}/notes": "notes' (a folder here, or a name on",
    "train --loss grpo --model {out}/empty": "empty' (a folder here, or a name on",
    "train --loss grpo --model {out}/notes/diary.txt": "diary.txt' (a folder here, or a name",
    "train --loss grpo --model {out}/halved": "halved' (safetensors only",
    "train --loss grpo --model {out}/unreadable": "unreadable",
    "train --loss grpo --model {out}/mixed": "its tokenizer has 23 tokens, but its config",
    "train --loss grpo --base flagless": "flags.json is missing or damaged",
    "train --loss grpo --base scrambled": "flags.json is missing or damaged",
    "train --loss grpo --base foreign": "was made with another tokenizer",
    "train --loss grpo --base taskless": "flags.json is missing or damaged (KeyError: 'high')",
    "train --loss grpo --base notes": "is not empty and holds no base",
    "train --loss grpo --name base": "--name and --base must differ",
    "train --loss grpo --name base --base other": "no run is called base",
    "train --loss grpo --eval-temperature 0": "--eval-temperature",
    "train --loss grpo --eval-every no": "--eval-every",
    "train --loss grpo --schedule cosine": "--schedule: invalid choice",
    # the task and its data
    "train --loss grpo --task math": "without --model there is only --task countdown",
    "train --loss grpo --prompt think": "without --model there is only",
    "train --loss grpo --data x.jsonl": "Cannot read x.jsonl",
    "train --loss grpo --verifier ours": "belongs to --task math",
    "train --loss grpo --eval-data x.jsonl": "--eval-data belongs to --task math",
    "math --prompt think": "does not go with",
    "math": "--task math needs --data",
    "math --data {out}/problems.jsonl --counts 3": "belong to --task countdown",
    "math --data no.jsonl": "Cannot read no.jsonl",
    "math --data {out}/notes": "Is a directory",
    "math --data {out}/empty.jsonl": "holds no problems",
    "math --data {out}/binary.jsonl": "binary.jsonl holds no problems; line 1",
    "math --data {out}/unreadable.jsonl": "Cannot read",
    "math --data hf://nobody": "is not of the form hf://owner/repo/file.jsonl",
    "math --data {out}/problems.jsonl --eval-data no.jsonl": "Cannot read no.jsonl",
    "math --data {out}/problems.jsonl": "leaves no problem to train on",
    # the run's folder
    "train --loss grpo --name taken": "holds a run already",
    "train --loss grpo --name other --resume": "no run to resume",
    "train --loss dapo --name taken --resume": "but loss was grpo and is dapo now",
    "train --loss grpo --name taken --resume --seed 1": "but seed was 0 and is 1 now",
    "train --loss grpo --name notes": "holds no run",
    "train --loss grpo --name torn --resume": "flags.json is missing or damaged",
    "train --loss grpo --name cut --resume": "no usable checkpoint",
    "train --loss grpo --out {out}/notes/diary.txt": "File exists",
    "train --loss grpo --name notes/diary.txt": "Not a directory",
    # eval.py
    "eval": "models",
    "eval no/such/model": "no/such/model",
    "eval {out}/notes": "notes' (a folder here, or a name on the hub) is missing",
    "eval {out}/torn": "flags.json is missing or damaged",
    "eval {out}/unfinished": "has no model yet: finish it by train.py --resume",
    "eval {out}/taken {out}/longer": "was trained with max_new_tokens 9, a run before it with 8",
    "eval {out}/halved": "halved' (safetensors only",
    **{f"eval {{out}}/taken --{flag} {value}": f"--{flag}"
       for flag in ("n", "problems", "rows", "temperature", "show")
       for value in ("0", "-1", "many", "nan")},
    "eval {out}/taken --show 2,3,5,7": "--show takes a number, or a problem such as",
    "eval {out}/taken --show =17": "--show takes a number, or a problem such as",
    "eval {out}/empty --curves {out}/x.png": "empty' is no run of train.py",
    "eval {out}/taken --curves {out}/x.xyz": "'xyz' is no picture format",
    "eval {out}/taken --curves {out}/notes": "cannot be written",
    "eval {out}/taken --temperature inf": "--temperature",
    "eval {out}/taken --seed x": "--seed",
    "eval {out}/taken --problems 9999": "held-out problems found",
    "eval {out}/taken --device quantum": "--device quantum is not available",
    "eval {out}/taken --json {out}/notes": "cannot be written",
    "eval {out}/taken --json {out}/nowhere/x.json": "cannot be written",
    "eval {out}/taken --plot {out}/notes": "cannot be written",
    "eval {out}/taken --task math": "does not go with",
    "eval {out}/taken --data x.jsonl": "Cannot read x.jsonl",
    "eval {out}/taken --max-new-tokens 9999": "exceed the model's context",
    "eval {out}/taken --gamma_p 1": "--gamma-p",
}


@pytest.fixture(scope="module")
def crime(base):
    """A folder of runs with everything in it that can be wrong."""
    go(base, "--loss", "grpo", "--steps", 1, "--name", "taken")
    for name in ("torn", "unfinished", "cut", "longer"):
        shutil.copytree(base / "taken", base / name)
        flags = json.loads((base / "taken" / "flags.json").read_text()) | {"name": name}
        flags |= {"max_new_tokens": 9} if name == "longer" else {}
        (base / name / "flags.json").write_text(json.dumps(flags))
    (base / "torn" / "flags.json").write_text('{"task": "count')
    shutil.rmtree(base / "unfinished" / "model")
    for file in (base / "cut" / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    for name in ("flagless", "scrambled", "taskless", "foreign"):
        shutil.copytree(base / "base", base / name)
    other = {"width": 8, "layers": 1, "heads": 1, "kv_heads": 1, "inner": 8}
    policy_module.save(*policy_module.tiny(**other, characters="0123456789abcdefghi"),
                       base / "foreign" / "model")
    (base / "flagless" / "flags.json").unlink()
    (base / "scrambled" / "flags.json").write_text("[1, 2]")
    flags = json.loads((base / "base" / "flags.json").read_text())
    del flags["high"]
    (base / "taskless" / "flags.json").write_text(json.dumps(flags))
    for name in ("halved", "unreadable", "mixed"):
        shutil.copytree(base / "base" / "model", base / name)
    file = base / "halved" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    for file in (base / "unreadable" / "model.safetensors", base / "unreadable.jsonl"):
        file.unlink(missing_ok=True)
        file.symlink_to(file.name)                     # to itself: nobody can read it, nor root
    _, more = policy_module.tiny(characters=policy_module.CHARACTERS + "?")
    more.save_pretrained(base / "mixed")
    (base / "notes").mkdir()
    (base / "notes" / "diary.txt").write_text("mine")
    (base / "empty").mkdir()
    (base / "empty.jsonl").write_text("\n")
    (base / "binary.jsonl").write_bytes(b"\x89PNG\xff\xfe\n")
    (base / "problems.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    return base


def snapshot(folder):
    """Every file with its content."""
    return {file: file.is_file() and file.read_bytes() for file in folder.rglob("*")}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(crime, line, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program, *flags = line.replace("{out}", str(crime)).split()
    if "--curves" in flags or "--plot" in flags:
        pytest.importorskip("matplotlib")
    before = snapshot(crime)
    capsys.readouterr()
    if program == "train":
        code = go(crime, *["--steps", 1, *flags])
    elif program == "math":
        code = train.main(["--out", str(crime), "--loss", "grpo", "--task", "math", "--model",
                           str(crime / "base" / "model"), "--device", "cpu", *flags])
    else:
        code = evaluation.main(["--device", "cpu", "--n", "2", "--problems", "2", *flags])
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("error: ") and BAD[line] in message, message
    assert message.count("\n") == 1, f"not one sentence: {message}"
    after = snapshot(crime)
    assert before.keys() == after.keys(), f"came or went: {before.keys() ^ after.keys()}"
    assert before == after, f"changed: {[file for file in before if before[file] != after[file]]}"


def test_a_bug_of_ours_keeps_its_traceback(base, monkeypatch):
    monkeypatch.setattr(train, "collect", lambda *args: [][1])
    with pytest.raises(IndexError):
        go(base, "--loss", "grpo", "--steps", 1, "--name", "bug")


def test_runs_are_measured_on_their_own_task(crime, capsys):
    """And a flag given by hand wins over all of them."""
    flags = ["--n", "2", "--problems", "2", "--device", "cpu", "--json",
             str(crime / "measured.json")]
    for more, length in (([], 8), (["--max-new-tokens", "3"], 3)):
        runs = [str(crime / "taken"), str(crime / ("longer" if more else "base")),
                str(crime / "base" / "model")]
        assert evaluation.main([*runs, *flags, *more]) == 0, capsys.readouterr().err
        written = json.loads((crime / "measured.json").read_text())
        assert written["flags"]["counts"] == [2] and written["flags"]["max_new_tokens"] == length
        records = [record for some in written["records"]["0.7"].values() for record in some]
        assert [len(record["problem"][0]) for record in records] == [2] * 6
    (crime / "measured.json").unlink()


# -------------------------------------------------------------------------- data, terminals, memory

def questions(path, numbers, word="What is"):
    path.write_text("".join(json.dumps({"problem": f"{word} {i}+{i}?", "answer": str(2 * i)}) + "\n"
                            for i in numbers))
    return str(path)


def go_math(base, tmp_path, *flags):
    return train.main(["--task", "math", "--model", str(base / "base" / "model"), "--loss", "grpo",
                       "--steps", "1", "--prompts", "2", "--group-size", "2", "--max-new-tokens",
                       "8", "--eval-samples", "2", "--device", "cpu", "--out", str(tmp_path),
                       *map(str, flags)])


def test_a_math_run_is_measured_on_what_it_was_not_trained_on(base, tmp_path, capsys):
    """By train.py and by eval.py: its own held-out tenth; of another file what is new; and a
    problem that is measured is not trained on."""
    data = questions(tmp_path / "d.jsonl", range(100))
    test_data = questions(tmp_path / "test.jsonl", range(95, 110))
    def measured(*flags):
        capsys.readouterr()
        assert evaluation.main([*map(str, flags), "--n", "2", "--device", "cpu",
                                "--json", str(tmp_path / "x.json")]) == 0
        records = json.loads((tmp_path / "x.json").read_text())["records"]["0.7"]
        asked = {record["problem"][0] for record in next(iter(records.values()))}
        return asked, capsys.readouterr().out
    assert go_math(base, tmp_path, "--data", data, "--name", "own") == 0
    records = json.loads((tmp_path / "own" / "eval.json").read_text())["models"]["own"]["records"]
    own = {record["problem"][0] for record in records}
    assert 1 <= len(own) < 30
    left_out = f"{100 - len(own)} problems are left out: {tmp_path / 'own'} was trained on them."
    for flags in ([], ["--data", data]):
        asked, text = measured(tmp_path / "own", *flags)
        assert asked == own and left_out in text
    asked, _ = measured(tmp_path / "own", "--data", test_data)
    old = {f"What is {i}+{i}?" for i in range(100)}
    assert len(asked) >= 10 and not asked & (old - own), "asked what it was trained on"

    capsys.readouterr()
    assert go_math(base, tmp_path, "--data", data, "--eval-data", test_data, "--name", "other") == 0
    text = capsys.readouterr().out
    assert f"{data}: 5 problems are left out: they stand in {test_data}, too." in text
    assert "15 held-out problems" in text and len(measured(tmp_path / "other")[0]) == 15
    asked, _ = measured(tmp_path / "other", "--data", data)
    assert asked == {f"What is {i}+{i}?" for i in range(95, 100)}, "all else was trained on"
    assert go_math(base, tmp_path, "--data", data, "--eval-data", data, "--name", "same") == 2
    assert "leaves no problem to train on" in capsys.readouterr().err
    os.unlink(data)
    assert f"what {tmp_path / 'own'} was trained on is not known" in measured(
        tmp_path / "own", "--data", test_data)[1]


def test_a_held_out_problem_without_room_is_left_out(base, tmp_path, capsys):
    data, test_data = questions(tmp_path / "d.jsonl", range(20)), tmp_path / "test.jsonl"
    questions(test_data, [10 ** 600, *range(30, 34)])
    assert go_math(base, tmp_path, "--data", data, "--eval-data", test_data) == 0
    text = capsys.readouterr().out
    assert f"{test_data}: 1 problems are left out: prompts over 504 tokens" in text
    assert "4 held-out problems" in text
    assert evaluation.main([str(tmp_path / "grpo"), "--n", "2", "--device", "cpu",
                            "--json", str(tmp_path / "x.json")]) == 0
    assert "4 held-out problems" in capsys.readouterr().out


def test_nothing_is_said_of_different_answers_where_all_correct_ones_are_equal(base, tmp_path,
                                                                              capsys, monkeypatch):
    """--task math: on the screen, in log.csv, eval.json and the tables of both programs."""
    monkeypatch.setattr(train, "TRACKED", 2)
    data = questions(tmp_path / "d.jsonl", range(100))
    assert go_math(base, tmp_path, "--data", data, "--eval-every", 1, "--eval-problems", 2) == 0
    run, written = tmp_path / "grpo", tmp_path / "x.json"
    assert evaluation.main([str(run), "--n", "2", "--device", "cpu", "--json", str(written)]) == 0
    log = rows(tmp_path, "grpo")[0]
    assert log["held_out_1"] and "equal" in log, "what is there is measured"
    spoken = [capsys.readouterr().out, " ".join(log), (run / "eval.json").read_text(),
              written.read_text()]
    for text in spoken:
        assert "Pass@2" in text or "held_out_16" in text or '"wrong"' in text
        for word in ("distinct", "as_text", "sigma"):
            assert word not in text, text


def test_resume_notices_other_data_and_another_start(base, tmp_path, capsys):
    data, model = questions(tmp_path / "d.jsonl", range(50)), tmp_path / "model"
    shutil.copytree(base / "base" / "model", model)
    flags = "--data", data, "--model", model, "--eval-problems", 0
    assert go_math(base, tmp_path, *flags) == 0
    questions(tmp_path / "d.jsonl", range(50), "How much is")
    assert go_math(base, tmp_path, *flags, "--resume") == 2
    assert "but --data has changed since it began" in capsys.readouterr().err
    questions(tmp_path / "d.jsonl", range(50))
    weights, tokenizer = policy_module.load(model)
    next(weights.parameters()).data[0] += 1
    policy_module.save(weights, tokenizer, model)
    assert go_math(base, tmp_path, *flags, "--resume") == 2
    assert "but the base has changed since it began" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_character_loses_nothing(monkeypatch):
    import io
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "cp1252"))
    assert train.main(["--loss", "因此"]) == 2 and evaluation.main(["答案/答案"]) == 2
    sys.stderr.flush()
    assert sys.stderr.buffer.getvalue().count(b"\\u") >= 4


def test_the_optimiser_is_gone_when_the_table_is_made(base, monkeypatch):
    """What tensors are alive then, counted in models: the one that is measured, and not the one of
    before."""
    import gc
    alive, evaluate = [], evaluation.evaluate
    def spy(policy, *rest, **options):
        size, storages = sum(w.nbytes for w in policy.parameters()), {}
        for x in gc.get_objects():
            for y in (x, x.grad if x.is_leaf else None) if isinstance(x, torch.Tensor) else ():
                if y is not None and y.nbytes > size / 1000:
                    storages[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        alive.append(sum(storages.values()) / size)
        return evaluate(policy, *rest, **options)
    monkeypatch.setattr(evaluation, "evaluate", spy)
    # what other tests have left
    before = sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.Tensor))
    size = sum(w.nbytes for w in policy_module.load(base / "base" / "model")[0].parameters())
    assert go(base, "--loss", "grpo", "--beta", 0.1, "--steps", 1, "--name", "lean",
              "--eval-problems", 2, "--eval-samples", 2) == 0
    assert len(alive) == 2 and max(alive) < 2 + before / size, \
        f"alive: {alive} models, {before / size} of them from before"


# -------------------------------------------------------------------------------------- odd batches

class Odd:
    """A task with any prompts and any reward."""
    style, system, problems, notes, several_answers = "bare", "", None, [], True

    def __init__(self, prompts, reward):
        self.prompts, self.calls, self.verdict = prompts, 0, reward

    def problem(self, rng):
        return rng.choice(self.prompts)

    def held_out_problems(self, n):
        return self.prompts[:n]

    def prompt(self, problem):
        return problem

    def reward(self, problem, text):
        self.calls += 1
        return self.verdict(self.calls)

    def canonical(self, text):
        return text or None


def run_odd(base, monkeypatch, name, task, stop_ids=None, *flags):
    """A run of this task -> its log as floats, and whether the weights moved. stop_ids:
    (vocabulary) -> what ends answers."""
    load, make_task = policy_module.load, evaluation.make_task
    def loaded(*args):
        policy, tokenizer = load(*args)
        if stop_ids is not None:
            policy.stop_ids = stop_ids(policy.config.vocab_size)
        return policy, tokenizer
    monkeypatch.setattr(policy_module, "load", loaded)
    # make_task still fills in the flags.
    monkeypatch.setattr(evaluation, "make_task",
                        lambda *args, **kwargs: make_task(*args, **kwargs) and task)
    assert go(base, "--steps", 6, "--name", name, *flags) == 0
    log = [{key: float(value) for key, value in row.items() if key not in HELD_OUT}
           for row in rows(base, name)]
    assert all(value == value and abs(value) < 1e9 for row in log for value in row.values()), \
        f"a NaN in the log: {log}"
    start = flags[flags.index("--model") + 1] if "--model" in flags else base / "base" / "model"
    one, two = load(start)[0], load(base / name / "model")[0]
    assert all(w.isfinite().all() for w in two.parameters())
    return log, any(not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


EVEN = lambda call: float(call % 2)


def test_prompts_of_one_token_and_of_four_hundred(base, monkeypatch):
    log, moved = run_odd(base, monkeypatch, "ragged", Odd(["4", "1 2" * 133, "3 4,7="], EVEN), None,
                         "--loss", "diffsmooth")
    assert moved and all(row["grad_norm"] > 0 for row in log)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_left_out(base, tmp_path, capsys):
    lines = [json.dumps({"problem": "1" * (600 if i % 4 == 0 else i), "answer": "2"})
             for i in range(1, 41)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    flags = ["--loss", "grpo", "--task", "math", "--data", str(tmp_path / "problems.jsonl"),
             "--model", str(base / "base" / "model"), "--max-new-tokens", "8", "--prompts", "4",
             "--group-size", "2", "--steps", "4", "--eval-problems", "0"]
    assert train.main([*flags, "--out", str(tmp_path), "--device", "cpu"]) == 0, \
        capsys.readouterr().err
    assert "problems are left out: prompts over 504 tokens" in capsys.readouterr().out
    assert len(rows(tmp_path, "grpo")) == 4


def test_answers_that_never_stop(base, monkeypatch):
    log, _ = run_odd(base, monkeypatch, "endless", Odd(["1 2,3="], EVEN), lambda V: [], "--loss",
                     "grpo")
    assert all(row["cut"] == 1 and row["length"] == 8 for row in log), \
        "the log must say that no answer ends"


def test_answers_that_stop_at_once(base, monkeypatch):
    log, _ = run_odd(base, monkeypatch, "curt", Odd(["1 2,3="], EVEN), lambda V: list(range(V)),
                     "--loss", "diffsmooth")
    assert all(row["cut"] == 0 and row["length"] == 1 for row in log)


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("loss", sorted(train.variants()))
def test_groups_all_right_or_all_wrong_then_mixed(base, loss, reward, monkeypatch):
    """Six steps without contrast: no NaN, and where the method asks for contrast no gradient and no
    moved weight."""
    task = Odd(["1 2,3=", "3 4,7="], lambda call: reward)
    log, moved = run_odd(base, monkeypatch, f"{loss}{reward}", task, None, "--loss", loss)
    assert all(row["equal"] == 1 and row["reward"] == reward for row in log)
    if loss in ("grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "passk", "maxrl", "focal",
                "ucpo"):
        assert not moved and all(row["grad_norm"] == 0 for row in log), \
            "equal rewards must give no policy gradient"


def test_contrast_after_a_long_drought_trains_again(base, monkeypatch):
    """AdamW's moments are 0 after five steps without gradient: 0 / (0 + eps), and then the first
    real step."""
    task = Odd(["1 2,3="], lambda call: 0.0 if call <= 5 * 64 else float(call % 2))
    log, moved = run_odd(base, monkeypatch, "drought", task, None, "--loss", "grpo")
    assert [row["grad_norm"] > 0 for row in log] == [False] * 5 + [True] and moved


def test_a_vocabulary_of_two(base, tmp_path, monkeypatch):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    letters = Tokenizer(models.WordLevel({"1": 0, "<eos>": 1}, unk_token="1"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", unk_token="1")
    policy = policy_module.Policy(
        LlamaConfig(vocab_size=2, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1, num_key_value_heads=1, eos_token_id=1,
                    bos_token_id=None))
    policy_module.save(policy, tokenizer, tmp_path / "two")
    log, moved = run_odd(base, monkeypatch, "two", Odd(["1", "11111"], EVEN), None, "--loss",
                         "diffsmooth", "--model", str(tmp_path / "two"))
    assert moved and all(0 < row["entropy"] <= 0.6932 for row in log), \
        "two tokens have at most log 2 nats"


# ----------------------------------------------------------------------------------------- security

def test_no_network_without_a_hub_name(tmp_path, monkeypatch, capsys):
    """Warm start, training, table, resume and eval.py with every way to a socket barred, and told
    of attempts."""
    attempts = []
    def barred(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, barred)
    flags = [*TOY.split(), "--loss", "grpo", "--warm-steps", "2", "--out", str(tmp_path),
             "--eval-problems", "2", "--eval-samples", "2"]
    assert train.main([*flags, "--steps", "1"]) == 0, capsys.readouterr().err
    assert train.main([*flags, "--steps", "2", "--resume"]) == 0, capsys.readouterr().err
    assert evaluation.main([str(tmp_path / "base"), str(tmp_path / "grpo"), "--n", "2",
                            "--problems", "2", "--device", "cpu",
                            "--json", str(tmp_path / "x.json")]) == 0
    assert attempts == [], "something went for the network"
    assert train.main([*flags, "--model", "owner/model", "--name", "hub"]) == 2, "a hub name does"


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("*.py")))
def test_nothing_is_unpickled_or_executed(file):
    """Read off the syntax tree: what is imported, what is called."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names}
            names.add((getattr(node, "module", "") or "").split(".")[0])
            assert not names & {"pickle", "marshal", "shelve", "dill", "joblib", "subprocess",
                                "ctypes", "runpy"}, where
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert node.value.value is False, where
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system",
                                  "os.popen"), where
            if called == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True
                           for k in node.keywords), where
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                assert any(k.arg == "trust_remote_code" for k in node.keywords), where


# ------------------------------------------------------------------------------- as a script: kills

def main(kills):
    import tempfile
    rng = random.Random(0)
    early = [moment for moment in list(MOMENTS)[:3] for _ in range(2)]
    later = rng.choices(["while a checkpoint is written", "any time"], k=kills - len(early))
    print(f"{'kill':>4}  {'moment':30}  {'steps':>5}  {'checkpoints':24}  half-written")
    def say(number, moment, steps, saved, half):
        kept = ", ".join(name[:7].lstrip("0") for name in saved)
        print(f"{number:4d}  {moment:30}  {steps:5d}  {kept:24}  {', '.join(half)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), [*early, *later], steps=12 * kills, rng=rng, say=say)
    print(f"{kills} kills; log and weights are those of the unbroken run, bit for bit")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
