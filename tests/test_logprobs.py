"""token_logprobs: the tiled softmax with its hand-written gradient, held to the two lines of its
docstring.

Bugs killed here: temperature left out of a gradient or applied twice, entropy of a tile taken for
that of the row, target in another tile, last tile cut, -inf - -inf in the first tile, tiles
overwritten and then read again, gradient of an unused output made up, bf16 logits, gradient rounded
to bf16 on its way to fp32 weights, a kept (N, V) array beyond the budget.
"""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import policy
from policy import token_logprobs
from test_losses import check, claim

core, care = pytest.mark.core, pytest.mark.care       # with the function that a test grades

SHAPES = [(1, 3, 2), (1, 8, 97), (5, 7, 1), (37, 16, 101), (64, 5, 30), (130, 12, 1009),
          (3, 4, 24)]                                  # (N, D, V)


def definition(hidden, weight, targets, temperature):
    all_logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return all_logp.gather(1, targets[:, None])[:, 0], -(all_logp.exp() * all_logp).sum(-1)


def inputs(N, D, V, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    # logits of size 4
    return (draw(N, D).requires_grad_(), (4 * D ** -0.5 * draw(V, D)).requires_grad_(),
            torch.randint(V, (N,), generator=generator), draw(N), draw(N))


def small_tiles(monkeypatch, keep, rows=16):
    """Tiles of `rows` x `rows` entries, and room to keep all logits or none."""
    for device in policy.MEMORY:
        monkeypatch.setitem(policy.MEMORY, device,
                            policy.Memory(1 << 30 if keep else 0, rows * rows * 4, rows))


@core("token_logprobs")
@pytest.mark.parametrize("tiles", ["one tile", "kept", "computed again"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("N, D, V", SHAPES)
def test_definition_in_float64(N, D, V, temperature, tiles, monkeypatch):
    """Values, and gradients of both outputs, alone and together."""
    if tiles != "one tile":
        small_tiles(monkeypatch, keep=tiles == "kept")
    hidden, weight, targets, g, e = inputs(N, D, V)
    ours, naive = token_logprobs(hidden, weight, targets,
                                 temperature), definition(hidden, weight, targets, temperature)
    for a, b, what in zip(ours, naive, ("log-probability", "entropy")):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), (
            f"{what} off by {(a - b).abs().max():.1e}")
    both = zip(ours, (g, e)), zip(naive, (g, e))
    losses = [[(ours[0] * g).sum(), (naive[0] * g).sum()],
              [(ours[1] * e).sum(), (naive[1] * e).sum()],
              [sum((x * y).sum() for x, y in pairs) for pairs in both]]
    for (loss, reference), what in zip(losses, ("log-probability", "entropy", "both")):
        for a, b, name in zip(torch.autograd.grad(loss, [hidden, weight], retain_graph=True),
                              torch.autograd.grad(reference, [hidden, weight], retain_graph=True),
                              ("hidden", "weight")):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), (
                f"d {what} / d {name} off by {(a - b).abs().max():.1e}")


def test_gradcheck(monkeypatch):
    small_tiles(monkeypatch, keep=False)
    hidden, weight, targets, *_ = inputs(6, 3, 40)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, 0.7),
                                    (hidden, weight))


@care("token_logprobs")
@pytest.mark.parametrize("keep", [True, False])
def test_fp32_against_float64(keep, device, monkeypatch):
    """On a GPU this is the one test of the kernels as they are compiled; both outputs, parts of the
    vocabulary joined."""
    small_tiles(monkeypatch, keep, rows=64)
    hidden, weight, targets, g, e = inputs(100, 64, 777)
    exact = definition(hidden, weight, targets, 0.9)
    h, w = (x.detach().float().to(device).requires_grad_() for x in (hidden, weight))
    ours = token_logprobs(h, w, targets.to(device), 0.9)
    assert all(x.dtype == torch.float32 and x.device.type == device for x in ours)
    tolerance = 1e-5 if device == "cpu" else 1e-4      # a GPU's exp is rounded less exactly
    for outputs, upstream in (([0], [g]), ([1], [e]), ([0, 1], [g, e])):
        exact_gradients = torch.autograd.grad([exact[i] for i in outputs], [hidden, weight],
                                              upstream, retain_graph=True)
        gradients = torch.autograd.grad([ours[i] for i in outputs], [h, w],
                                        [u.float().to(device) for u in upstream], retain_graph=True)
        for a, b in zip([*ours, *gradients], [*exact, *exact_gradients]):
            assert torch.allclose(a.double().cpu(), b, rtol=tolerance, atol=tolerance), (
                f"off by {(a.cpu() - b).abs().max():.1e}")


@care("token_logprobs")
def test_large_and_peaked_logits():
    """Logits of +-300 and a distribution on one token: finite, and an entropy near 0 that is not a
    rounding error."""
    weight = torch.eye(4) * 300
    hidden = torch.tensor([[1.0, 0, 0, 0], [-1, -1, -1, -1], [0.1, 0.08, 0, 0]], requires_grad=True)
    targets = torch.tensor([0, 1, 1])
    logp, entropy = token_logprobs(hidden, weight, targets)
    exact = definition(hidden.double(), weight.double(), targets, 1.0)
    assert torch.allclose(logp.double(), exact[0],
                          atol=1e-5) and torch.allclose(entropy.double(), exact[1], atol=1e-6)
    (logp + entropy).sum().backward()
    assert hidden.grad.isfinite().all()


@care("token_logprobs")
def test_bf16_hidden_with_fp32_weight(device):
    """Only the inputs are rounded: results are fp32, and the gradient reaches the fp32 weight, on a
    CPU unrounded. A GPU reads the weight as bf16, too, and its gradient in the logits is bf16."""
    hidden, weight, targets, g, _ = inputs(50, 32, 301, torch.float32)
    h = hidden.detach().to(device).bfloat16().requires_grad_()
    w = weight.detach().to(device).requires_grad_()
    logp, entropy = token_logprobs(h, w, targets.to(device), 0.7)
    read = weight if device == "cpu" else weight.bfloat16().float()
    exact = definition(h.cpu().double(), read.double(), targets, 0.7)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp.cpu() - exact[0]).abs().max() < (2e-5 if device == "cpu" else 1e-4), (
        "the logits were rounded to bf16")
    (logp * g.to(device)).sum().backward()
    wanted, = torch.autograd.grad((exact[0] * g).sum(), read if device == "cpu" else weight)
    assert h.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    error = (w.grad.cpu() - wanted).abs().max()
    assert error < (1e-5 if device == "cpu" else 1e-2 * wanted.abs().max()), (
        f"the weight's gradient was rounded: off by {error:.1e}")


@care("token_logprobs")
def test_shape_and_no_token():
    hidden, weight, targets, *_ = inputs(12, 4, 9)
    flat = token_logprobs(hidden, weight, targets)
    shaped = token_logprobs(hidden.view(3, 4, 4), weight, targets.view(3, 4))
    assert all(torch.equal(a.view(3, 4), b) and b.shape == (3, 4) for a, b in zip(flat, shaped))
    logp, entropy = token_logprobs(hidden[:0], weight, targets[:0])
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert weight.grad.abs().sum() == 0


@care("token_logprobs")
@pytest.mark.parametrize("keep", [True, False])
def test_inputs_are_not_written_and_backward_repeats(keep, monkeypatch):
    small_tiles(monkeypatch, keep)
    hidden, weight, targets, g, e = inputs(40, 6, 50)
    before = [x.clone() for x in (hidden, weight, targets, g, e)]
    logp, entropy = token_logprobs(hidden, weight, targets, 1.3)
    first, second = (torch.autograd.grad((logp, entropy), (hidden, weight), (g, e),
                                         retain_graph=True) for _ in range(2))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(first, second)), (
        "the second backward read used tiles")
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, targets, g, e)))


class Counter(TorchDispatchMode):
    """Counts matrix products, and the bytes of the largest array made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.addmm_,
                                                     torch.ops.aten.mm)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def count(hidden, weight, targets, grad):
    with Counter() as counter, torch.set_grad_enabled(grad):
        logp, entropy = token_logprobs(hidden, weight, targets)
        if grad:
            logp.sum().backward()
    return counter


def test_only_the_needed_products():
    """One tile: 1 product without gradient, 2 with a frozen head, 3 with all."""
    hidden, weight, targets, *_ = inputs(20, 4, 30)
    assert count(hidden, weight, targets, False).products == 1
    assert count(hidden, weight.detach(), targets, True).products == 2
    assert count(hidden.detach(), weight, targets, True).products == 2
    assert count(hidden, weight, targets, True).products == 3


@care("token_logprobs")
def test_frozen_head_gets_no_gradient():
    hidden, weight, targets, g, _ = inputs(20, 4, 30)
    (token_logprobs(hidden, weight.detach(), targets)[0] * g).sum().backward()
    wanted, = torch.autograd.grad((definition(hidden, weight, targets, 1.0)[0] * g).sum(), hidden)
    assert weight.grad is None and torch.allclose(hidden.grad, wanted)


PEAK = r"""
import re, torch, policy
status = lambda: open("/proc/self/status").read()
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", status())[1]) // 1024  # MB; not ru_maxrss
torch.set_num_threads(1)
N, D, V = 4096, 8, 20011                               # the logits: 328 MB
hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
targets = torch.randint(V, (N,))
policy.token_logprobs(hidden[:8], weight, targets[:8])[0].sum().backward()    # threads started
before = peak()
logp, entropy = policy.token_logprobs(hidden, weight, targets)
(logp + entropy).sum().backward()
print(peak() - before)
"""


def test_memory_beyond_the_budget():
    """Over the budget nothing of the size of the logits is ever held: a child process's peak shows
    it."""
    hidden, weight, targets, *_ = inputs(4096, 2, 3001, torch.float32)
    tile = policy.MEMORY["cpu"].tile
    assert count(hidden, weight, targets, False).largest <= tile, "a tile is larger than stated"
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of a process is read from /proc")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True,
                          cwd=Path(policy.__file__).parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60, (
        f"{done.stdout.strip()} MB more than before, where the logits have 328")


TRITON = """
import torch, policy
torch.manual_seed(0)
x, V, first = torch.randn(7, 9001) * 5, 9001, 300      # a tile that starts at entry 300
target = torch.tensor([300, 9300, 5000, 299, 9301, 301, 4396])  # two of them outside
column, whole = target - first, x.double()
assert policy.triton, "triton is not there"
plain = policy.lse_entropy(x)
policy.by_kernel = lambda x: True
lse, entropy = policy.lse_entropy(x)
assert torch.allclose(lse, plain[0]) and torch.allclose(entropy, plain[1], atol=1e-5)
exact = torch.distributions.Categorical(logits=whole)
assert torch.allclose(lse.double(), whole.logsumexp(1)), "lse"
assert torch.allclose(entropy.double(), exact.entropy(), atol=1e-5), "entropy"
g, e = torch.randn(2, 7)
for upstream in (None, e):
    for dtype in (torch.float32, torch.bfloat16):
        gradient = []
        for kernel in (True, False):
            policy.by_kernel = lambda x: kernel
            gradient.append(policy.logit_gradient(x.clone(), column, lse, entropy, g, upstream,
                                                  dtype))
        ours, plain = gradient
        close = torch.allclose(ours, plain, atol=1e-6 if dtype == torch.float32 else 1e-2)
        assert ours.dtype == dtype and close, "gradient"
"""


def test_triton_kernels_in_the_interpreter():
    """The GPU's two kernels against the plain lines, run on the CPU by Triton's interpreter."""
    pytest.importorskip("triton",
                        reason="triton is not installed: it comes with a torch built for CUDA")
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True,
                          cwd=Path(policy.__file__).parent,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


# ------------- for those who write the log-probabilities themselves: failures that know the mistake

@core("token_logprobs")
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_by_hand(temperature):
    """Logits log 1, log 2, log 5 at temperature 1: probabilities 1/8, 2/8, 5/8; at .5 they are
    1/30, 4/30, 25/30."""
    z = torch.tensor([1., 2, 5], dtype=torch.float64).log()
    hidden, weight, targets = torch.ones(3, 1, dtype=torch.float64), z[:, None], torch.arange(3)
    p = torch.tensor([1., 2, 5] if temperature == 1 else [1., 4, 25], dtype=torch.float64)
    p, plain, hot = p / p.sum(), z.log_softmax(0), (z * temperature).log_softmax(0)
    logp, entropy = token_logprobs(hidden, weight, targets, temperature)
    check(f"log-probabilities of the three tokens, temperature {temperature}", logp, p.log(), bugs={
        "the temperature missing": plain,
        "log-probabilities divided by the temperature, not logits": plain / temperature,
        "logits multiplied by the temperature": hot, "probabilities, not their logarithms": p,
        "the sign": -p.log(),
        "logits that are not normalised": z / temperature,
        "another token's column": p.log().roll(-1)})
    right = -(p * p.log()).sum().expand(3)
    check(f"entropy, temperature {temperature}", entropy, right, bugs={
        "the temperature missing": -(plain.exp() * plain).sum().expand(3), "the sign": -right,
        "bits in place of nats": right / math.log(2),
        "-log p of the token, which is no entropy": -p.log(),
        "a mean over the vocabulary in place of the sum": right / 3})


def apply(hidden, weight, targets, temperature=0.7, keep=False):
    return policy.TokenLogprobs.apply(hidden, weight, targets, temperature, keep)


@core("TokenLogprobs.forward")
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("N, D, V", [(37, 16, 101), (5, 7, 16), (130, 12, 1009)])
def test_tiles_give_the_definition(N, D, V, temperature, monkeypatch):
    """Tiles of 16 x 16: targets lie in all of them, and the last tile is not a full one."""
    small_tiles(monkeypatch, keep=False)
    hidden, weight, targets, *_ = inputs(N, D, V)
    with torch.no_grad():
        logp, entropy = apply(hidden, weight, targets, temperature)
        right, right_entropy = definition(hidden, weight, targets, temperature)
        plain, plain_entropy = definition(hidden, weight, targets, 1.0)
        whole = V // 16 * 16 or V
        cut = definition(hidden, weight[:whole], targets.clamp(max=whole - 1), temperature)
        last = definition(hidden, weight[(V - 1) // 16 * 16:], targets * 0, temperature)
        check("log-probabilities, tile by tile", logp, right,
              bugs={
            "the temperature missing": plain,
            "logits that are not normalised": (hidden * weight[targets]).sum(1) / temperature})
        check("entropies, tile by tile", entropy, right_entropy,
              bugs={
            "the temperature missing": plain_entropy, "the sign": -right_entropy,
            "the last tile, which is not a full one, left out": cut[1],
            "the entropy of the last tile for that of the row": last[1]})


@core("TokenLogprobs.backward")
@pytest.mark.parametrize("keep", [False, True], ids=["computed again", "kept"])
@pytest.mark.parametrize("used", ["log-probability", "entropy", "both"])
def test_gradient_of_the_tiles(used, keep, monkeypatch):
    """d loss / d hidden and d weight against autograd through the two lines, in float64."""
    small_tiles(monkeypatch, keep)
    hidden, weight, targets, g, e = inputs(37, 6, 53)
    g, e = g * (used != "entropy"), e * (used != "log-probability")
    parts = {"log-probability": [0], "entropy": [1], "both": [0, 1]}[used]

    def slopes(pair, upstream=(g, e)):
        return torch.autograd.grad([pair[i] for i in parts], [hidden, weight],
                                   [upstream[i] for i in parts], retain_graph=True)

    ours = slopes(apply(hidden, weight, targets, 0.7, keep))
    naive = definition(hidden, weight, targets, 0.7)
    ones = torch.ones_like(g)
    for i, what in enumerate(("hidden", "weight")):
        right = slopes(naive)[i]
        bugs = {"the temperature left out": right * 0.7,
                "the temperature divided by twice": right / 0.7, "the sign": -right,
                "upstream gradients that are not looked at": slopes(naive, (ones, ones))[i],
                "the entropy's gradient dropped": slopes(naive, (g, 0 * e))[i],
                "the entropy's gradient with the wrong sign": slopes(naive, (g, -e))[i]}
        p = (hidden @ weight.T / 0.7).softmax(1) * g[:, None] / 0.7
        if used != "entropy":
            minus_p = p @ weight if i == 0 else p.T @ hidden
            bugs["no onehot: only -P"] = slopes(naive, (0 * g, e))[i] - minus_p
        check(f"d {used} / d {what}", ours[i], right, bugs=bugs)


@care("TokenLogprobs.forward")
def test_no_tile_is_larger_than_stated(monkeypatch):
    hidden, weight, targets, *_ = inputs(512, 2, 3001, torch.float32)
    counter = Counter()
    with counter, torch.no_grad():
        apply(hidden, weight, targets)
    claim(counter.largest <= policy.MEMORY["cpu"].tile,
          f"an array of {counter.largest:,} bytes was made: the logits must come in tiles of "
          f"{policy.MEMORY['cpu'].tile:,}")


@care("TokenLogprobs.forward")
def test_large_logits_in_tiles(monkeypatch):
    """Logits of +-300: exp of them overflows, and the first tile has no log-sum-exp before it."""
    small_tiles(monkeypatch, keep=False, rows=2)
    weight, targets = torch.eye(4) * 300, torch.tensor([0, 1, 3])
    hidden = torch.tensor([[1.0, 0, 0, 0], [-1, -1, -1, -1], [0.1, 0.08, 0, 0]])
    with torch.no_grad():
        ours = apply(hidden, weight, targets, 1.0)
        exact = definition(hidden.double(), weight.double(), targets, 1.0)
    for x, right, what in zip(ours, exact, ("log-probability", "entropy")):
        check(f"{what} for logits of +-300", x, right, 1e-4)


@care("TokenLogprobs.backward")
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
def test_a_second_backward_is_the_first(keep, monkeypatch):
    small_tiles(monkeypatch, keep)
    hidden, weight, targets, g, e = inputs(40, 6, 50)
    before = [x.detach().clone() for x in (hidden, weight, g, e)]
    results = apply(hidden, weight, targets, 1.3, keep)
    first, second = (torch.autograd.grad(results, (hidden, weight), (g, e), retain_graph=True)
                     for _ in range(2))
    check("the gradient of a second backward (tiles that were overwritten?)", second[0], first[0])
    claim(all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, g, e))),
          "backward wrote into its inputs")


@care("TokenLogprobs.backward")
def test_a_frozen_head_costs_nothing():
    hidden, weight, targets, g, _ = inputs(20, 4, 30)
    (apply(hidden, weight.detach(), targets)[0] * g).sum().backward()
    wanted, = torch.autograd.grad((definition(hidden, weight, targets, 0.7)[0] * g).sum(), hidden)
    check("d log-probability / d hidden with a frozen head", hidden.grad, wanted)
