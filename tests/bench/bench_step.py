"""One whole step of RL (sampling, scoring, backward, update) beside trl.GRPOTrainer.

    python tests/bench/bench_step.py                # minutes on two CPU cores; --quick: about one
    python tests/bench/bench_step.py --against FOLDER       # another checkout of this repo as well
    pip install trl                                 # the peer; without it only ours is timed

Both have the same model, prompts, G and loss: they train the default policy in fp32 with AdamW,
beta 0, one update per rollout, one micro-batch and a reward that costs nothing. TRL runs with
gradient_checkpointing=False, top_k=0 and no logging; its steps and ours take turns in one process.
Both stop at the same token, so lengths are distributed alike; they are printed. The floor is the
matrix products alone, on arrays that exist: one per step of sampling for the rows that are not
finished, three (forward, two backward) for the update.
"""
import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import losses
import policy as policy_module
import sample as sample_module
import train
from bench_logprobs import clock, compare, modules_of, quartiles, version
from sample import sample

PROMPT = "4 7 2 9,24="


def our_step(prompts, G, new, modules):
    """A function that makes one step -> (seconds of sampling, seconds of all, mean length)."""
    policy_module, sample_module, losses, train = modules
    policy, tokenizer = policy_module.tiny()
    optimizer, generator = train.make_optimizer(policy, 1e-5), torch.Generator().manual_seed(0)

    def step():
        start = clock()
        rollout = sample_module.sample(policy, tokenizer, [PROMPT] * prompts, G, new, 1.0,
                                       generator)
        sampled = clock() - start
        rewards = torch.tensor([float(len(text) % 2) for text in rollout.texts])
        train.train_step(policy, optimizer, rollout, rewards, losses.grpo, G)
        return sampled, clock() - start, rollout.mask.sum(1).float().mean().item()
    return step


def floor(prompts, G, new):
    """Seconds of the bare matrix products of one such step, without those of the prompts."""
    policy, tokenizer = policy_module.tiny()
    generator = torch.Generator().manual_seed(0)
    mask = sample(policy, tokenizer, [PROMPT] * prompts, G, new, 1.0, generator).mask
    # A tied head is a product, too.
    weights = [w.detach() for w in policy.parameters() if w.dim() == 2]

    def forward(rows):
        return [lambda x=torch.randn(rows, w.shape[1]), w=w: torch.mm(x, w.T) for w in weights]

    def backward(rows):
        found = []
        for w in weights:
            x, y = torch.randn(rows, w.shape[1]), torch.randn(rows, w.shape[0])
            found += [lambda y=y, w=w: torch.mm(y, w), lambda x=x, y=y: torch.mm(y.T, x)]
        return found
    tokens = int(mask.sum())
    products = [f for rows in mask.sum(0).tolist()[:-1] for f in forward(rows)]
    products += forward(tokens) + backward(tokens)
    start = clock()
    for product in products:
        product()
    return clock() - start


def with_trl(prompts, G, new, rounds, ours, folder):
    """A TRL step and one of ours, by turns -> (TRL's seconds, its mean lengths, ours' results)."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    policy_module.save(*policy_module.tiny(), folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    _, tokenizer = policy_module.tiny()
    seconds, lengths, results = [], [], []

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = clock()

        def on_step_end(self, *args, **kwargs):
            seconds.append(clock() - self.start)
            results.append(ours())

    def reward(completions, **kwargs):
        lengths.append(sum(len(text) for text in completions) / len(completions))
        return [float(len(text) % 2) for text in completions]

    config = GRPOConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, beta=0.0,
                        num_generations=G, per_device_train_batch_size=prompts * G,
                        gradient_accumulation_steps=1, max_completion_length=new,
                        max_steps=rounds, learning_rate=1e-5, temperature=1.0, top_k=0, top_p=1.0,
                        loss_type="grpo", gradient_checkpointing=False, report_to=[],
                        logging_strategy="no", save_strategy="no", disable_tqdm=True,
                        dataloader_pin_memory=False)
    GRPOTrainer(model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
                callbacks=[Turns()],
                train_dataset=Dataset.from_list([{"prompt": PROMPT}] * prompts)).train()
    return seconds, lengths, results


def bench(prompts, G, new, rounds, against):
    steps = {"ours": our_step(prompts, G, new, (policy_module, sample_module, losses, train))}
    if against:
        steps["against"] = our_step(prompts, G, new, against)

    def ours():
        return {name: steps[name]() for name in random.sample(list(steps), len(steps))}
    ours()                                             # warm-up
    try:
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            theirs, lengths, results = with_trl(prompts, G, new, rounds + 1, ours, Path(folder))
        assert torch.get_num_threads() == threads, "TRL changed the number of threads"
    except ImportError as error:
        print(f"TRL skipped ({error})")
        theirs, lengths, results = [], [], [ours() for _ in range(rounds + 1)]
    floors = [floor(prompts, G, new) for _ in range(rounds)]
    times = {"floor": quartiles(floors)}
    for name in steps:
        sampling, whole, own_lengths = zip(*(result[name] for result in results[1:]))
        times |= {f"{name}, sampling": quartiles(sampling), f"{name}, whole step": quartiles(whole)}
        if name == "ours":
            our_lengths = own_lengths
    if theirs:
        times["TRL, whole step"] = quartiles(theirs[1:])
    mean = lambda xs: sum(xs) / len(xs) if xs else 0
    print(f"\n{prompts} prompts x {G} answers, at most {new} tokens; "
          f"mean length ours {mean(our_lengths):.1f} tokens, TRL's {mean(lengths):.1f} characters")
    for name, (low, middle, high) in times.items():
        share = middle / times["ours, whole step"][1]
        spread = f"{middle * 1e3:.0f} ms ({low * 1e3:.0f}-{high * 1e3:.0f})"
        print(f"{name:20}{spread:>26}{share:>8.2f}")
    compare(times)
    return {"prompts": prompts, "G": G, "new": new, "seconds_quartiles": times}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small batch, few rounds")
    parser.add_argument("--threads", type=int,
                        help="with 1, processor time is measured: for a busy machine")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--against", metavar="FOLDER", help="another checkout of this repo")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    print(f"{versions}, {torch.get_num_threads()} threads")
    shapes = [(8, 16, 20)] if args.quick else [(8, 16, 20), (32, 16, 20), (16, 16, 64)]
    names = "policy", "sample", "losses", "train"
    against = modules_of(args.against, *names) if args.against else None
    rows = [bench(*shape, args.rounds or (5 if args.quick else 15), against) for shape in shapes]
    print(json.dumps({"bench": "step", "versions": versions, "threads": torch.get_num_threads(),
                      "rows": rows}))


if __name__ == "__main__":
    main()
