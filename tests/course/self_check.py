"""Worked numbers, for those who write: a first check, no grade.

    python tests/self_check.py                     # every exercise that is written
    python tests/self_check.py 3                   # one

Each number is in a docstring or can be redone on paper. What passes here is a good start; the card
asks far more. Functions of other exercises that are not written yet are the reference's (run.py).
"""

import math
import sys
from fractions import Fraction
from pathlib import Path

TESTS = Path(__file__).resolve().parent
TESTS = TESTS if (TESTS / "exercises.py").is_file() else TESTS.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "course")]

from exercises import EXERCISES, functions_of, is_blank  # noqa: E402


def near(got, wanted, what, tolerance=1e-5):
    """Numbers agree, or a sentence with the first that does not."""
    import torch

    got = (
        [x.detach().item() if isinstance(x, torch.Tensor) and x.numel() == 1 else x for x in got]
        if isinstance(got, list)
        else got
    )
    got = torch.as_tensor(got, dtype=torch.float64).detach().flatten().tolist()
    wanted = torch.as_tensor(wanted, dtype=torch.float64).flatten().tolist()
    assert len(got) == len(wanted), f"{what}: {len(wanted)} numbers, please, not {len(got)}"
    for i, (a, b) in enumerate(zip(got, wanted)):
        place = f", number {i + 1}" if len(wanted) > 1 else ""
        assert abs(a - b) <= tolerance * max(
            1, abs(b)
        ), f"{what}{place}: {b:.7g}, please, not {a:.7g}"


def equal(got, wanted, what):
    assert got == wanted, f"{what} should be {wanted!r}, and is {got!r}"


def refused(call, what):
    try:
        got = call()
    except ValueError:
        return
    raise AssertionError(f"{what} must raise ValueError, and gives {got!r}")


def check_1():
    from rewards import countdown_reward, parse

    equal(parse("2*(1+3)"), (8, 1, ("*", 2, ("+", 1, 3))), 'parse("2*(1+3)")')
    for text in ("-1+2", "2**3", "07", "1 2", "1+2=3", "(1", ""):
        equal(parse(text), None, f"parse({text!r})")
    for text, numbers, target, reward in (
        ("6/(5/4)", (4, 5, 6), Fraction(24, 5), 1.0), ("4*(7-2)+4", (4, 7, 2, 9), 24, 0.0),
        ("2*(9+7-4)", (4, 7, 2, 9), 24, 1.0), ("5/(2-2)", (5, 2, 2), 0, 0.0),
    ):
        equal(
            countdown_reward(text, numbers, target), reward,
            f"countdown_reward({text!r}, {numbers}, {target})",
        )


def check_2():
    from eval import pass_at_k

    near(pass_at_k(10, 3, 5), 0.916667, "pass_at_k(10, 3, 5)", 1e-6)
    near(pass_at_k(4, 2, 1), 0.5, "pass_at_k(4, 2, 1)")
    near(pass_at_k(4, 2, 2), 5 / 6, "pass_at_k(4, 2, 2): of six pairs one holds no correct answer")
    refused(lambda: pass_at_k(4, 2, 5), "pass_at_k(4, 2, 5)")


def one_token(name, rewards, ratio=1.0, **options):
    """One-token answers of old log-probability -1 -> (loss, gradient in logp)."""
    import losses
    import torch

    old = torch.full((len(rewards), 1), -1.0, dtype=torch.float64)
    logp = (old + math.log(ratio)).requires_grad_()
    loss, _ = getattr(losses, name)(
        logp, old, torch.ones_like(old).bool(), torch.tensor(rewards, dtype=torch.float64),
        options.pop("group_size", len(rewards)), **options,
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.item(), gradient[:, 0]


def check_3():
    import torch
    from losses import _aggregate, group_advantages

    near(
        group_advantages(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), 4),
        [1.732047, -0.577349, -0.577349, -0.577349], "group_advantages of (1, 0, 0, 0)", 1e-6,
    )
    near(
        group_advantages(torch.tensor([0.1, 0.1, 0.1]), 3), [0, 0, 0],
        "group_advantages of equal rewards", 0,
    )
    losses, mask = (
        torch.tensor([[-1.0] * 6, [1.0] * 6]), torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6]).bool(),
    )
    for agg, wanted in (("seq_mean", 0), ("token_mean", 0.5), ("seq_sum", 2), ("seq_const", 0.2)):
        near(_aggregate(losses, mask, agg, 10), wanted, f"the table of _aggregate, {agg}")
    loss, gradient = one_token("reinforce", [1.0])
    near([loss, gradient], [1, -1], "reinforce, A = 1, one token of logp -1: loss and gradient")
    loss, gradient = one_token("grpo", [1.0, 1, 0, 0])
    near(loss, 0, "grpo at ratio 1: the loss")
    near(
        gradient, [-0.2499995, -0.2499995, 0.2499995, 0.2499995],
        "grpo at ratio 1: the gradient, -A / 4",
    )
    near(
        one_token("grpo", [1.0, 1, 0, 0], 1.5)[1], [0, 0, 0.3749993, 0.3749993],
        "grpo at ratio 1.5: the gradient; only A > 0 is clipped",
    )


def check_4():
    import policy as p
    import torch

    x, cos, sin = (
        torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4), torch.tensor([[[0.0, 1]]]),
        torch.tensor([[[1.0, 0]]]),
    )
    near(
        p.rotate(x, cos, sin), [-3, 2, 1, 4],
        "rotate((1, 2, 3, 4)), the first pair by a quarter turn, the second not",
    )
    got = p.allowed(torch.tensor([[0, 1, 1, 1]]).bool(), 2, 4, None, torch.device("cpu"))
    near(
        got[0, 0].double(), [[0, 1, 1, 0], [0, 1, 1, 1]],
        "allowed for two new tokens after one of padding and one real",
    )
    got = p.allowed(None, 4, 4, 2, torch.device("cpu"))
    near(
        got[0, 0].double(), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]],
        "allowed with a window of 2",
    )
    cache, make = p.KVCache(), lambda *values: torch.tensor(values).view(1, 1, -1, 1)
    cache.update(0, make(1.0, 2), make(10.0, 20))
    k, v = cache.update(0, make(3.0), make(30.0))
    near(
        torch.cat([k.flatten(), v.flatten()]), [1, 2, 3, 10, 20, 30],
        "keys and values after two updates",
    )
    policy, tokenizer = p.tiny(width=32, layers=2, heads=4, kv_heads=2, inner=32)
    tokens = torch.tensor([tokenizer("4 7 2 9,24=").input_ids])
    with torch.no_grad():
        whole, cache = policy(tokens), p.KVCache()
        parts = torch.cat(
            [
                policy(tokens[:, :6], None, cache), policy(tokens[:, 6:7], None, cache),
                policy(tokens[:, 7:], None, cache),
            ],
            1,
        )
        early = policy(tokens[:, :6])
    near(whole[:, :6], early, "the first six states, read with and without what follows", 1e-4)
    near(parts, whole, "states read in three pieces, and at once", 1e-4)


def check_5():
    import torch
    from policy import token_logprobs

    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64, requires_grad=True)
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([1]))
    near(
        [logp, entropy], [math.log(0.75), 0.5623351],
        "two words of probability 1/4 and 3/4: logp of the second, entropy",
    )
    near(
        torch.autograd.grad(logp.sum(), weight, retain_graph=True)[0], [-0.25, 0.25],
        "d logp / d weight, onehot - P",
    )
    near(
        torch.autograd.grad(entropy.sum(), weight)[0], [0.2059898, -0.2059898],
        "d entropy / d weight, -P (log P + H)",
    )
    logp, _ = token_logprobs(hidden, weight, torch.tensor([1]), 2.0)
    near(logp, -math.log(1 + 3**-0.5), "logp at temperature 2")


def check_6():
    import policy as p
    import torch
    from sample import sample

    policy, tokenizer = p.tiny(width=32, layers=2, heads=2, kv_heads=1, inner=32)
    policy.stop_ids = [1, 4, 9]
    draw = lambda seed: sample(
        policy, tokenizer, ["4 7=", "1 2 3,4="], 4, 8, 0.7, torch.Generator().manual_seed(seed)
    )
    one, again, other = draw(0), draw(0), draw(1)
    equal(one.texts, again.texts, "the texts of a generator of the same seed")
    assert one.texts != other.texts, "another seed, and the same texts: is the generator used?"
    equal(tuple(one.response.shape), tuple(one.mask.shape), "the shape of response")
    P = one.prompt_mask.shape[1]
    for row in range(8):
        n = int(one.mask[row].sum())
        ids = torch.cat([one.tokens[row, :P][one.prompt_mask[row]], one.response[row, :n]])
        with torch.no_grad():
            scores = (policy(ids[None])[0] @ policy.head.T / 0.7).log_softmax(-1)
        near(
            one.logp[row, :n], scores[len(ids) - n - 1 : -1].gather(1, ids[-n:, None])[:, 0],
            f"row {row}: the recorded log-probabilities, and those of the answer read alone", 1e-3,
        )
        stops = [t for t in range(n) if int(one.response[row, t]) in policy.stop_ids]
        assert stops == [n - 1] * bool(
            one.finished[row]
        ), f"row {row}: the mask ends with the first stop token"


def check_7():
    import policy as p
    import torch
    from sample import sample
    from train import train_step

    def loss_fn(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
        n = mask.sum()  # one denominator for the whole batch
        return -((rewards - 0.5)[:, None] * logp * mask).sum() / n - 0.1 * (
            entropy * mask
        ).sum() / n, {"tokens": float(n)}

    moved = []
    for size in (None, 3):
        policy, tokenizer = p.tiny(width=32, layers=2, heads=2, kv_heads=1, inner=32)
        made = sample(
            policy, tokenizer, ["4 7=", "1 2 3,4="], 4, 8, 1.0, torch.Generator().manual_seed(0)
        )
        before = torch.cat([w.detach().flatten() for w in policy.parameters()])
        stats = train_step(
            policy, torch.optim.SGD(policy.parameters(), lr=1.0), made,
            torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0]), loss_fn, 4, micro_batch=size, grad_clip=1e9,
        )
        moved.append(before - torch.cat([w.detach().flatten() for w in policy.parameters()]))
        assert (
            not {"loss", "grad_norm", "bad", "tokens"} - stats.keys()
        ), f"stats must have loss, grad_norm, bad and the loss's own; it has {list(stats)}"
        near(
            stats["grad_norm"], moved[-1].norm(), "grad_norm, and what a step of rate 1 took off",
            1e-3,
        )
    assert moved[0].norm() > 0, "the weights did not move"
    near(
        (moved[0] - moved[1]).norm() / moved[0].norm(), 0,
        "the update in chunks of 3, against that at once", 1e-3,
    )


def smoothed(name, **options):
    """Advantages of the docstring's group, read off the gradient."""
    import losses
    import torch

    old = torch.tensor([[-10.0], [-20], [-10], [-20]], dtype=torch.float64)
    logp = old.clone().requires_grad_()
    loss, _ = getattr(losses, name)(
        logp, old, torch.ones_like(old).bool(), torch.tensor([1.0, 1, 0, 0], dtype=torch.float64),
        4, **options,
    )
    return -4 * torch.autograd.grad(loss, logp)[0]


def check_8():
    gammas = dict(gamma_p=0.03, gamma_n=0.01)
    near(
        smoothed("diffsmooth", **gammas), [1.299998, 1.599998, -1.099998, -1.199998],
        "diffsmooth: the A of its docstring", 1e-6,
    )
    near(
        smoothed("diffsmooth_reward", **gammas), [0.65, 0.95, -0.75, -0.85],
        "diffsmooth_reward: the A of its docstring", 1e-6,
    )
    near(
        smoothed("diffsmooth", gamma_p=0.0, gamma_n=0.0),
        [0.999998, 0.999998, -0.999998, -0.999998], "both gammas 0: GRPO", 1e-6,
    )


def check_9():
    for rewards, wanted in (
        ((1.0, 1, 0, 0), (4 / 3, 4 / 3, 0, 0)), ((1.0, 0, 0, 0), (2, 0, 0, 0)),
        ((1.0, 1, 1, 1), (0, 0, 0, 0)),
    ):
        near(
            -4 * one_token("pkpo", list(rewards), k=2)[1], wanted,
            f"pkpo, k = 2, rewards {rewards}: A",
        )
    near(-4 * one_token("pkpo", [1.0, 1, 0, 0], k=1)[1], [1, 1, 0, 0], "pkpo, k = 1: A = r")
    refused(lambda: one_token("pkpo", [1.0, 0, 0, 0], k=5), "pkpo, k = 5 in a group of 4")


def state(one):
    """Whether an exercise is written."""
    try:
        nodes = functions_of((TESTS.parent / one.file).read_text(encoding="utf-8-sig"))
    except SyntaxError as error:
        return f"{one.file} cannot be read: {error}"
    blank = [name for name in one.functions if is_blank(nodes.get(name))]
    blank = blank[:1] if one.together else blank  # two lines will do for exercise 5
    return (
        f"{blank[0]} is not written yet"
        if blank and blank[0] in one.functions[: 1 if one.together else None]
        else None
    )


def main(words):
    chosen = [one for one in EXERCISES if one.file and (not words or str(one.number) in words)]
    if (TESTS / "reference.bin").is_file():
        import run

        run.complete(quiet=True)
    failed = 0
    for one in chosen:
        says = state(one)
        if says is None:
            try:
                globals()[f"check_{one.number}"]()
            except AssertionError as error:
                says = str(error)
            except Exception as error:  # in the code that is checked
                says = f"{type(error).__name__}: {error}"
        failed += says is not None
        print(f"{one.number} {one.title}: {says or 'these numbers are right'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
