"""Several processes: runs that go on with more or fewer of them, a table that they share out, and
one that dies.

    python -m pytest -q tests/test_processes.py

Bugs killed here: weights or moments that only some processes get back, a resumed run of as many
processes that differs in one bit, a killed save that costs the checkpoint before, an evaluation
whose draws depend on how it was shared out, a problem measured twice or by nobody, a process that
waits for one that has died, a traceback from one that only waited.
"""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
# for the script; pytest does it by itself
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
import policy as policy_module
import train
from rewards import Countdown
from test_train import G, SMOOTH, TOY, rollout_of, sampling, small


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Everything below was done by one Python that forks, for an import costs more than all of it
    -> its folder."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True,
                         env=environment, timeout=1800)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def together(n, work, said):
    """`work()` in n processes, joined as torchrun joins them -> their exit codes; what process i
    prints is in `said`.i."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for i in range(n):
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(os.open(f"{said}.{i}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            os.environ.update(joined | {"RANK": str(i), "LOCAL_RANK": str(i)} if n > 1 else {})
            signal.alarm(300)
            try:
                code = work()
            except BaseException:
                code = 1
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def steps(folder, last):
    """Go on from the checkpoint in `folder` to step `last`, on one batch, and save each step."""
    evaluation.start_processes("cpu")
    policy, tokenizer = small()
    rollout = rollout_of(policy, tokenizer, 0.7, ("4 7 2 9,24=", "1 1,2=", "3 9 9,7=", "2 2,4="))
    rewards = torch.tensor([1., 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0])
    mine = torch.arange(16).chunk(train.world())[train.rank()]
    policy = train.shard(policy)
    # a small eps blows rounding up to full size
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, eps=0.01)
    state = policy, optimizer, random.Random(0), torch.Generator().manual_seed(train.rank())
    for step in range(train.load_checkpoint(folder, *state) + 1, last + 1):
        train.train_step(policy, optimizer, sampling.take(rollout, mine), rewards[mine], SMOOTH, G,
                         temperature=0.7)
        torch.rand(3, generator=state[3])
        train.save_checkpoint(folder, policy, optimizer, step, *state[2:])
    return 0


def main(folder):
    # One process makes step 1; two go on to 3, and the one does, too; from step 2 of the two, two
    # and one go on.
    one, two, again, back = (folder / name for name in ("one", "two", "again", "back"))
    codes = together(1, lambda: steps(one, 1), folder / "said")
    shutil.copytree(one, two)
    codes += together(1, lambda: steps(one, 3), folder / "said")
    codes += together(2, lambda: steps(two, 3), folder / "said")
    for other in (again, back):
        other.mkdir()
        shutil.copy(two / "0000002.pt", other)
    codes += together(2, lambda: steps(again, 3), folder / "said")
    codes += together(1, lambda: steps(back, 3), folder / "said")
    assert codes == [0] * 7, (codes, *((folder / f"said.{i}").read_text() for i in range(2)))

    # A run of two processes and its table; the same table, and eval.py's, by one and by two. What
    # --eval-every measures is few problems, in groups larger than --rows.
    train.TRACKED = 5
    base = folder / "runs" / "base"
    policy_module.save(*small(), base / "model")
    flags = {"task": "countdown", "prompt": "bare", "counts": [3], "high": 9, "targets": [1, 20],
             "max_new_tokens": 8}
    (base / "flags.json").write_text(json.dumps(flags))
    run = folder / "runs" / "run"
    command = [*TOY.split(), "--loss", "entropy", "--out", str(folder / "runs"), "--name", "run",
               "--steps", "2", "--eval-problems", "5", "--eval-samples", "3", "--rows", "6",
               "--eval-every", "2", "--counts", "3", "--high", "9", "--targets", "1", "20"]
    codes = together(2, lambda: train.main(command), folder / "trained")
    shutil.copy(run / "log.csv", folder)
    (run / "eval.json").rename(folder / "two.json")
    codes += together(1, lambda: train.main([*command, "--resume"]), folder / "tabled")
    (run / "eval.json").rename(folder / "one.json")
    for n in (1, 2):
        measured = [str(base / "model"), str(run), "--n", "3", "--problems", "5", "--device", "cpu",
                    "--json", str(folder / f"eval{n}.json")]
        codes += together(n, lambda: evaluation.main(measured), folder / f"eval{n}")
    assert codes == [0] * 6, (codes, *(file.read_text() for file in folder.glob("*.[01]")))

    # The first process is killed while it writes a checkpoint; then the second one fails by itself.
    save = torch.save
    def killed(value, file, **options):
        if options:                                    # how tensors travel between processes
            return save(value, file, **options)
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    further = [*command, "--resume", "--steps", "9"]
    torch.save = killed
    codes = together(2, lambda: train.main([*further, "--save-every", "3"]), folder / "killed")
    torch.save = save
    take_step = train.train_step
    def failing(*args, **kwargs):
        if train.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take_step(*args, **kwargs)
    train.train_step = failing
    codes += together(2, lambda: train.main(further), folder / "failing")
    train.train_step = take_step
    codes += together(1, lambda: train.main([*command, "--resume", "--steps", "3"]),
                      folder / "after")
    (folder / "codes.json").write_text(json.dumps(codes))


def contents(file):
    return torch.load(file, weights_only=True)


def numbers(checkpoint):
    """Weights and moments, {name: tensor}."""
    return checkpoint["weights"] | {f"{kind} of {name}": x for name, some in
                                    checkpoint["moments"].items() for kind, x in some.items()}


def test_a_run_goes_on_with_more_or_fewer_processes(done):
    """The same weights and moments up to rounding; with as many processes the same state, the
    random ones too, bit for bit."""
    for step, folder in ((2, "two"), (3, "two"), (3, "back")):
        ours, theirs = (numbers(contents(done / name / f"{step:07d}.pt"))
                        for name in (folder, "one"))
        assert ours.keys() == theirs.keys() and len(ours) > 40
        for name in ours:
            assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), \
                f"{folder}, step {step}: {name} differs"
    before, after = (contents(done / "one" / f"{step:07d}.pt")["weights"] for step in (2, 3))
    assert all((before[name] != after[name]).any() for name in before), "nothing moved"
    two, again = (contents(done / folder / "0000003.pt") for folder in ("two", "again"))
    ours, theirs = numbers(two), numbers(again)
    assert ours.keys() == theirs.keys(), "as many processes go on bit for bit"
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(two["generators"], again["generators"]) and len(two["generators"]) == 2
    assert (two["step"], two["rng"]) == (again["step"], again["rng"])
    assert "it goes on with other draws" in (done / "said.0").read_text()


def test_held_out_problems_are_shared_out_and_measured_alike(done):
    """In the last step of two processes: what one process measures of the model that they saved."""
    lines = (done / "log.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    names = ("held_out_1", "held_out_16", "held_out_distinct")
    assert [rows[0][name] for name in names] == ["", "", ""]
    task = Countdown(counts=(3,), high=9, targets=(1, 20))
    problems = task.held_out_problems(10)[5:]          # those after the table's
    records = evaluation.evaluate(*policy_module.load(done / "runs" / "run" / "model"), task,
                                  problems, 16, 8, rows=6)
    columns = evaluation.columns(records)
    assert [float(rows[1][name]) for name in names] == pytest.approx(
        [columns[name].mean() for name in ("Pass@1", "Pass@16", "distinct")], abs=1e-4)
    assert (done / "trained.0").read_text().count("held-out problems: Pass@1") == 1


def test_a_table_is_shared_out_and_stays_the_same(done):
    """5 problems, a batch each: the first process has three of these. One table and one file."""
    two, one = (json.loads(file.read_text())["models"]
                for file in (done / "two.json", done / "one.json"))
    for name in ("base", "run"):
        assert two[name]["records"] == one[name]["records"] and len(one[name]["records"]) == 5
    one, two = (json.loads((done / f"eval{n}.json").read_text())["records"] for n in (1, 2))
    assert one["0.7"]["run"] != one["0.7"]["model"]
    assert one == two
    for said in ("trained", "eval2"):
        assert "Pass@2" in (done / f"{said}.0").read_text()
        assert (done / f"{said}.1").read_text() == ""


def test_a_process_that_dies_ends_the_others_in_one_sentence(done):
    """Killed in the middle of a save: the checkpoint before is whole. Out of memory: it says so,
    the other one that it ends."""
    assert json.loads((done / "codes.json").read_text()) == [-9, 2, 2, 2, 0]
    for waiting in ("killed.1", "failing.0"):
        text = (done / waiting).read_text()
        assert text.count("error: another process has ended") == 1 and "Traceback" not in text, text
    assert (done / "failing.1").read_text().startswith("error: out of memory")
    assert "damaged" not in (done / "after.0").read_text(), "the file that was half written is none"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
