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
from test_train import G, SMOOTH, TOY, rollout_of, sampling, small


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Everything below was done by one Python that forks, for an import costs more than all of it
    -> its folder."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True,
                         env=environment, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def together(n, work, said):
    """`work()` in n processes, joined as torchrun joins them -> their exit codes; what process i
    prints is in `said`.i."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {
            "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT":
            str(free.getsockname()[1])
        }
    children = []
    for i in range(n):
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(os.open(f"{said}.{i}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            os.environ.update(joined | {"RANK": str(i), "LOCAL_RANK": str(i)} if n > 1 else {})
            signal.alarm(120)
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
    codes += together(1, lambda: steps(one, 3), folder / "said") + together(
        2, lambda: steps(two, 3), folder / "said")
    for other in (again, back):
        other.mkdir()
        shutil.copy(two / "0000002.safetensors", other)
    codes += together(2, lambda: steps(again, 3), folder / "said") + together(
        1, lambda: steps(back, 3), folder / "said")
    assert codes == [0] * 7, (codes, *((folder / f"said.{i}").read_text() for i in range(2)))

    # A run of two processes and its table; the same table, and eval.py's, by one and by two.
    base = folder / "runs" / "base"
    policy_module.save(*small(), base / "model")
    flags = {
        "task": "countdown", "prompt": "bare", "counts": [3], "high": 9, "targets": [1, 20],
        "max_new_tokens": 8
    }
    (base / "flags.json").write_text(json.dumps(flags))
    run, table = folder / "runs" / "run", [
        "--eval-problems", "5", "--eval-samples", "3", "--rows", "6"
    ]
    command = [
        *TOY.split(), "--loss", "entropy", "--out",
        str(folder / "runs"), "--name", "run", "--steps", "2", *table, "--counts", "3", "--high",
        "9", "--targets", "1", "20"
    ]
    codes = together(2, lambda: train.main(command), folder / "trained")
    (run / "eval.json").rename(folder / "two.json")
    codes += together(1, lambda: train.main([*command, "--resume"]), folder / "tabled")
    (run / "eval.json").rename(folder / "one.json")
    for n in (1, 2):
        measured = [
            str(base / "model"),
            str(run), "--n", "3", "--problems", "5", "--rows", "6", "--device", "cpu", "--json"
        ]
        codes += together(
            n, lambda: evaluation.main([*measured, str(folder / f"eval{n}.json")]),
            folder / f"eval{n}")
    assert codes == [0] * 6, (codes, *(file.read_text() for file in folder.glob("*.[01]")))

    # The first process is killed while it writes a checkpoint; then the second one fails by itself.
    import safetensors.torch
    def killed(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    safetensors.torch.save_file, whole = killed, safetensors.torch.save_file
    codes = together(
        2, lambda: train.main([*command, "--resume", "--steps", "9", "--save-every", "3"]),
        folder / "killed")
    safetensors.torch.save_file = whole
    take_step = train.train_step
    def failing(*args, **kwargs):
        if train.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take_step(*args, **kwargs)
    train.train_step = failing
    codes += together(2, lambda: train.main([*command, "--resume", "--steps", "9"]),
                      folder / "failing")
    train.train_step = take_step
    codes += together(1, lambda: train.main([*command, "--resume", "--steps", "3"]),
                      folder / "after")
    (folder / "codes.json").write_text(json.dumps(codes))


def tensors(file):
    from safetensors.torch import load_file
    return {name: value for name, value in load_file(file).items() if name != "generator"}


def everything(file):
    """Facts and tensors, the random states too; the order of a file's header is left to chance."""
    from safetensors import safe_open
    with safe_open(file, framework="pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name).tolist() for name in opened.keys()}


def test_a_run_goes_on_with_more_or_fewer_processes(done):
    """The same weights and moments up to rounding; with as many processes the same file, bit for
    bit."""
    for step, folder in ((2, "two"), (3, "two"), (3, "back")):
        ours, theirs = tensors(done / folder /
                               f"{step:07d}.safetensors"), tensors(done / "one" /
                                                                   f"{step:07d}.safetensors")
        assert ours.keys() == theirs.keys() and len(ours) > 40
        for name in ours:
            assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), \
                f"{folder}, step {step}: {name} differs"
    before = tensors(done / "one" / "0000002.safetensors")
    assert all((before[name] != theirs[name]).any() for name in before
               if name.startswith("weight")), "nothing moved"
    two, again = (everything(done / folder / "0000003.safetensors") for folder in ("two", "again"))
    assert two == again, "as many processes go on bit for bit"
    assert "it goes on with other draws" in (done / "said.0").read_text()


def test_a_table_is_shared_out_and_stays_the_same(done):
    """5 problems in batches of 2, 2 and 1: the first process has two of these. One table and one
    file."""
    two, one = (json.loads(file.read_text())["models"]
                for file in (done / "two.json", done / "one.json"))
    assert two == one and all(len(model["records"]) == 5 for model in one.values())
    one, two = (json.loads((done / f"eval{n}.json").read_text())["records"] for n in (1, 2))
    assert one == two and one["0.7"]["run"] != one["0.7"]["model"]
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
