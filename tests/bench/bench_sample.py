"""The sampler beside transformers' `generate`: same weights, prompts and number of new tokens.

    python tests/bench/bench_sample.py              # some minutes on two CPU cores; --quick: one
    python tests/bench/bench_sample.py --against FOLDER     # another checkout of this repo as well
                                                    # no peers to install

One process, methods in shuffled order, one round after the other; medians and quartiles. Stops are
disabled. `generate` samples with top_k=0, top_p=1 and temperature 1, and reads every copy of a
prompt; ours reads a prompt once for its group of 16 rows or fewer. The floor is the matrix
products of the steps alone, on arrays that exist. A last row has real stops: ours drops rows that
have ended, and only tokens of answers count in its tokens/s. Greedy tokens of both are compared
first.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import policy as policy_module
from bench_logprobs import compare, interleave, modules_of, quartiles, version
from sample import sample

PROMPT = "4 7 2 9,24="


def sizes(width, layers, characters):
    return dict(width=width, layers=layers, heads=width // 32, kv_heads=max(1, width // 64),
                inner=3 * width, characters=characters)


def pair(width, layers, characters):
    """Our tiny policy and transformers' model with the same weights; no stop token."""
    from transformers import AutoModelForCausalLM
    ours, tokenizer = policy_module.tiny(**sizes(width, layers, characters))
    with tempfile.TemporaryDirectory() as folder:
        policy_module.save(ours, tokenizer, Path(folder) / "model")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    theirs.eval()
    ours.stop_ids, theirs.generation_config.eos_token_id = [], None
    return ours, theirs, tokenizer


def floor_of(policy, B):
    """A function: the matrix products of one step of B rows."""
    # A tied head is a product, too.
    weights = [w.detach() for w in policy.parameters() if w.dim() == 2]
    arrays = [(torch.randn(B, w.shape[1]), w.T, torch.empty(B, w.shape[0])) for w in weights]

    def step():
        for x, w, out in arrays:
            torch.mm(x, w, out=out)
    return step


@torch.no_grad()
def same_greedy(ours, theirs, tokenizer, new):
    """Our tokens at a temperature near 0 against theirs without sampling."""
    ids = tokenizer([PROMPT], return_tensors="pt").input_ids
    wanted = theirs.generate(ids, do_sample=False, max_new_tokens=new, pad_token_id=0)
    found = sample(ours, tokenizer, [PROMPT], 1, new, temperature=1e-4).response[0]
    return torch.equal(found, wanted[0, ids.shape[1]:])


def bench(width, layers, characters, B, new, rounds, compiled, against):
    ours, theirs, tokenizer = pair(width, layers, characters)
    G = min(16, B)
    ids = tokenizer([PROMPT] * B, return_tensors="pt").input_ids
    attention = torch.ones_like(ids)
    settings = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
                    pad_token_id=0)
    step = floor_of(ours, B)

    def floor():
        for _ in range(new):
            step()

    def static():
        theirs.generate(ids, attention_mask=attention, cache_implementation="static", **settings)

    def seeded():                                      # ours and against draw the same tokens
        return torch.Generator().manual_seed(0)

    runs = {"floor": torch.no_grad()(floor),
            "ours": lambda: sample(ours, tokenizer, [PROMPT] * (B // G), G, new, 1.0, seeded()),
            "generate, dynamic": lambda: theirs.generate(ids, attention_mask=attention, **settings),
            "generate, static": static}
    if against:
        other_policy, other_sample = against
        other, other_tokenizer = other_policy.tiny(**sizes(width, layers, characters))
        other.load_state_dict(ours.state_dict())
        other.stop_ids = ours.stop_ids
        runs["against"] = lambda: other_sample.sample(other, other_tokenizer, [PROMPT] * (B // G),
                                                      G, new, 1.0, seeded())
    if compiled:
        fast = torch.compile(theirs.forward)
        plain = theirs.forward

        def static_compiled():
            theirs.forward = fast
            static()
            theirs.forward = plain
        runs["generate, static, compiled"] = static_compiled
    greedy = same_greedy(ours, theirs, tokenizer, new)
    times = {name: quartiles(ts) for name, ts in interleave(runs, rounds).items()}
    lengths = None
    if len(tokenizer) < 100:                           # with stops: any of a few tokens is one
        ours.stop_ids = list(range(1, 1 + max(1, len(tokenizer) * 2 // new)))
        stopping = {"ours, with stops": runs["ours"]}
        if against:
            other.stop_ids = ours.stop_ids
            stopping["against, with stops"] = runs["against"]
        times |= {name: quartiles(ts) for name, ts in interleave(stopping, rounds).items()}
        lengths = runs["ours"]().mask.sum(1).float()
        lengths = {"mean": lengths.mean().item(), "longest": lengths.max().item()}
    best = min(t[1] for name, t in times.items() if name.startswith("generate"))
    print(f"\nD {width}, {layers} layers, V {len(tokenizer)}, B {B}, {new} new tokens; "
          f"greedy tokens equal: {greedy}"
          + (f"; with stops {lengths['mean']:.1f} tokens on average" if lengths else ""))
    print(f"{'':28}{'ms (quartiles)':>28}{'tokens/s':>10}{'/ floor':>9}{'best generate /':>17}")
    for name, (low, middle, high) in times.items():
        tokens = B * (lengths["mean"] if "stops" in name else new)
        spread = f"{middle * 1e3:.1f} ({low * 1e3:.1f}-{high * 1e3:.1f})"
        print(f"{name:28}{spread:>28}{tokens / middle:>10.0f}"
              f"{middle / times['floor'][1]:>9.2f}{best / middle:>17.2f}")
    compare(times)
    return {"D": width, "layers": layers, "V": len(tokenizer), "B": B, "new": new,
            "greedy_equal": greedy, "lengths": lengths, "seconds_quartiles": times}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true",
                        help="the default policy at three batch sizes, few rounds")
    parser.add_argument("--threads", type=int,
                        help="with 1, processor time is measured: for a busy machine")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--against", metavar="FOLDER", help="another checkout of this repo")
    parser.add_argument("--compiled", action="store_true",
                        help="also static cache with torch.compile: needs a compiler")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    versions = {name: version(name) for name in ("torch", "transformers")}
    print(f"{versions}, {torch.get_num_threads()} threads")
    many = [chr(0x4E00 + i) for i in range(4073)]      # for a vocabulary of 4096
    small, large = policy_module.CHARACTERS, policy_module.CHARACTERS + "".join(many)
    shapes = [(64, 2, small, 64)] + [(128, 4, small, B) for B in (1, 16, 64, 512)] \
        + [(256, 6, large, B) for B in (1, 16, 64)]
    if args.quick:
        shapes = [(128, 4, small, B) for B in (1, 16, 64)]
    against = modules_of(args.against, "policy", "sample") if args.against else None
    rounds = args.rounds or (5 if args.quick else 15)
    rows = [bench(*shape, 20, rounds, args.compiled, against) for shape in shapes]
    print(json.dumps({"bench": "sample", "versions": versions, "threads": torch.get_num_threads(),
                      "rows": rows}))


if __name__ == "__main__":
    main()
