"""An autograder for losses.py, ours or yours.

    pytest tests/test_losses.py                     # grades losses.py
    IMPL=my_losses pytest tests/test_losses.py      # grades my_losses.py, on sys.path or in the current folder

A function that is missing fails its own tests by name and no others. Nothing falls back to ours. A failure says in
words what is wrong, and where the number is the one that a well-known bug gives, it names the bug.

Four kinds of test: worked numbers that can be redone on paper; a second implementation in plain Python lists and loops
(`oracle`), against which every loss and gradient is compared on a ragged random batch; exact expected gradients, by
going through every possible group of a softmax policy; and properties: what must change nothing, and what must.

What they are built to catch, most frequent first: no clip, clip on the wrong side or with its two widths swapped; std
with ddof 1, or over the batch; interleaved groups; eps under the root; a mask that is off by one; the mean of means; a
wrong aggregator, or the padded width as a constant; old_logp, weights or advantages not detached; a sign (loss, KL,
entropy, smoothing); the KL direction; an entropy without gradient; writing into an argument; gammas swapped; a
smoothing term that is silently zero, added before normalisation, taken from logp or summed over padding; "correct"
read as r > 0; sum for mean in a likelihood; pass@k at its edges; NaN out of padding; empty masks; misspelt or
incomplete options that are silently accepted. tests/mutants.py puts each of them into losses.py and watches.

Everything runs in float64 with B, T, G and V all different, ragged masks and NaN in the padding, unless said otherwise.
"""
import importlib
import inspect
import itertools
import math
import os
import sys

import pytest
import torch

IMPL = os.environ.get("IMPL", "losses")
F64 = torch.float64
NAN, INF = float("nan"), float("inf")

sys.path.insert(0, os.getcwd())
MODULE = importlib.import_module(IMPL)


class Implementation:
    """`L.grpo` is the function under test; one that does not exist fails the test that asks for it."""

    def __getattr__(self, name):
        if name.startswith("__"):                      # pytest looking around
            raise AttributeError(name)
        if not callable(getattr(MODULE, name, None)):
            pytest.fail(f"{IMPL} has no function '{name}'", pytrace=False)
        return getattr(MODULE, name)


L = Implementation()

# Every loss with settings that leave nothing to a default that may be tuned to the task.
DS = dict(reduction="sum", gamma_p=0.03, gamma_n=0.01)
ALL = {"reinforce": {}, "rloo": {}, "grpo": {}, "dr_grpo": dict(max_len=10), "dapo": {}, "gspo": {}, "cispo": {},
       "entropy": dict(entropy_coef=0.05), "diffsmooth": dict(DS, agg="seq_mean"),
       "diffsmooth_reward": dict(DS, agg="token_mean"), "unlikeliness": {}, "passk": dict(k=2), "pkpo": dict(k=2),
       "w_reinforce": {}, "maxrl": {}, "ucpo": {}, "focal": {}, "sft": {}, "rft": {}}
CLIPPED = ["grpo", "entropy", "diffsmooth", "diffsmooth_reward", "unlikeliness", "passk", "pkpo", "w_reinforce", "maxrl",
           "ucpo", "focal"]                            # these take clip_low, clip_high, beta and agg
AGGREGATOR = {"reinforce": "seq_sum", "rloo": "seq_sum", "dr_grpo": "seq_const", "dapo": "token_mean",
              "cispo": "token_mean", "sft": "token_mean", "rft": "token_mean"}      # of those that have no choice
RL = [name for name in ALL if name not in ("sft", "rft")]
CORRECT_IS_ONE = ["diffsmooth", "diffsmooth_reward", "passk", "pkpo", "w_reinforce", "ucpo", "focal", "rft"]
every = pytest.mark.parametrize("name", ALL)


# ------------------------------------------------------------------------------------------------------------- tools

def tensor(values):
    return torch.tensor(values, dtype=F64)


def check(what, actual, expected, atol=1e-7, rtol=1e-5, bugs=None):
    """Numbers agree, or the test fails in words; `bugs` maps a known mistake to the number that it gives."""
    __tracebackhide__ = True
    actual, expected = (torch.as_tensor(x, dtype=F64).detach() for x in (actual, expected))
    near = lambda x: actual.shape == x.shape and torch.allclose(actual, x, rtol=rtol, atol=atol)
    if near(expected):
        return
    numbers = lambda x: ", ".join(f"{v:.7g}" for v in x.flatten()[:8].tolist()) + (", ..." if x.numel() > 8 else "")
    show = lambda x: numbers(x) if x.dim() == 0 else f"[{numbers(x)}]"
    guess = [bug for bug, value in (bugs or {}).items() if near(tensor(value))]
    hint = f" This number is what you get with: {' or: '.join(guess)}." if guess else ""
    pytest.fail(f"{what}: it should be {show(expected)}, but is {show(actual)}.{hint}")


def run(name, logp, old_logp, mask, rewards, group_size, **options):
    """Call loss `name` -> (loss, d loss / d logp (B, T), stats), all detached."""
    __tracebackhide__ = True
    leaf = logp.detach().clone().requires_grad_()
    loss, stats = getattr(L, name)(leaf, old_logp, mask, rewards, group_size, **options)
    if loss.dim() != 0 or not loss.requires_grad:
        pytest.fail(f"{name}: the loss must be a 0-dim tensor on logp's graph, even where it is 0, for backward() to work.")
    gradient, = torch.autograd.grad(loss, leaf, allow_unused=True)
    if gradient is None:
        pytest.fail(f"{name}: the loss is cut off from logp, so that nothing would be learnt.")
    return loss.detach(), gradient, stats


def advantages(name, rewards, group_size, old_logp=None, mask=None, **options):
    """A (B,), read off the on-policy gradient, which is -A_i / B a row under seq_mean, and for one-token answers always."""
    rewards = tensor(rewards) if isinstance(rewards, (list, tuple)) else rewards
    old = torch.full((len(rewards), 1), -0.7, dtype=F64) if old_logp is None else old_logp
    mask = torch.ones_like(old) if mask is None else mask
    return -run(name, old, old, mask, rewards, group_size, **options)[1].sum(1) * len(rewards)


def column(values):
    """One-token answers: (B,) numbers -> (B, 1)."""
    return tensor(values)[:, None]


def settings(name, **more):
    """A loss's settings of ALL with some changed; dr_grpo divides by 1, for one-token answers."""
    return dict(ALL[name], **({"max_len": 1} if name == "dr_grpo" else {}), **more)


class Worked:
    """Eight answers of 1 to 3 tokens in two groups; small enough for paper. NaN in all padding.

    row               1    2    3           4    5    6    7    8
    reward            1    1    0           0    1    0    0    0
    old_logp         -.5  -1   -.75        -2   -1.5 -.5  -1   -.25    on each token
    logp - old_logp   .3  -.1   .1 -.1 .3  -.3   .05  .4  -.4   0
    """
    G = 4
    rewards = tensor([1, 1, 0, 0, 1, 0, 0, 0])
    lengths = torch.tensor([1, 2, 3, 2, 3, 2, 1, 3])
    mask = (torch.arange(3) < lengths[:, None]).to(F64)
    _wide = lambda values: tensor(values)[:, None].repeat(1, 3)
    _shift = _wide([.3, -.1, NAN, -.3, .05, .4, -.4, 0])
    _shift[2] = tensor([.1, -.1, .3])
    _blank = torch.where(mask.bool(), 0, NAN)
    old_logp = _wide([-.5, -1, -.75, -2, -1.5, -.5, -1, -.25]) + _blank
    logp = old_logp + _shift
    ref_logp = old_logp - 0.2
    entropy = _wide([1.2] * 4 + [.4] * 4) + _blank


def worked(name, rewards=Worked.rewards, **options):
    return run(name, Worked.logp, Worked.old_logp, Worked.mask, rewards, Worked.G, entropy=Worked.entropy,
               ref_logp=Worked.ref_logp, **options)


class Ragged:
    """Five groups of G = 4, T = 7: mixed, with a format reward of 0.1, all right, all wrong, with an empty row."""
    G, B, T = 4, 20, 7
    rewards = tensor([1, 0, 0, 1, 1, .1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1])
    lengths = torch.tensor([3, 7, 1, 5, 2, 4, 6, 1, 5, 2, 7, 3, 4, 1, 6, 2, 7, 0, 3, 5])
    mask = (torch.arange(7) < lengths[:, None]).to(F64)
    _draw = lambda seed, scale: torch.randn(20, 7, dtype=F64, generator=torch.Generator().manual_seed(seed)) * scale
    _blank = torch.where(mask.bool(), 0, NAN)
    old_logp = -1.5 - _draw(1, .5).abs() + _blank
    logp = old_logp + _draw(2, .35)
    ref_logp = old_logp + _draw(3, .2)
    entropy = 1 + _draw(4, .2).abs() + _blank


def ragged(name, rewards=Ragged.rewards, **options):
    return run(name, Ragged.logp, Ragged.old_logp, Ragged.mask, rewards, Ragged.G, entropy=Ragged.entropy,
               ref_logp=Ragged.ref_logp, **options)


# ---------------------------------------------------------------------------------------------------- the contract

@every
def test_signature(name):
    """f(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None, <int, float or str options>)."""
    parameters = inspect.signature(getattr(L, name)).parameters
    first = list(parameters)[:5]
    assert first == ["logp", "old_logp", "mask", "rewards", "group_size"], \
        f"{name} must start with the five tensors' names"
    for key, p in list(parameters.items())[5:]:
        assert p.kind is p.KEYWORD_ONLY, \
            f"{name}: '{key}' must be keyword-only (a **kwargs would swallow misspelt options)"
        if key in ("entropy", "ref_logp"):
            assert p.default is None, f"{name}: '{key}' must default to None"
        else:
            assert type(p.default) in (int, float, str), \
                f"{name}: '{key}' becomes a flag and needs a number or a word as default"
    assert {"entropy", "ref_logp"} <= set(parameters), f"{name} must accept entropy and ref_logp, used or not"


DEFAULTS = {"reinforce": dict(baseline=0, beta=0), "rloo": dict(beta=0), "grpo": {},
            "dr_grpo": dict(clip_low=.2, clip_high=.2, max_len=512), "dapo": dict(clip_low=.2, clip_high=.28),
            "gspo": dict(clip_low=3e-4, clip_high=4e-4), "cispo": dict(clip_low=1, clip_high=4),
            "entropy": dict(entropy_coef=1e-3), "diffsmooth": {}, "diffsmooth_reward": {},
            "unlikeliness": dict(rank_coef=.25), "passk": dict(k=4), "pkpo": dict(k=4),
            "w_reinforce": dict(w_pos=.1, w_neg=1), "maxrl": {}, "ucpo": dict(tau=.2), "focal": dict(focal_gamma=.5)}


@pytest.mark.parametrize("name", RL)
def test_default_options(name):
    """Defaults are the papers': clips 0.2 / 0.2, DAPO's upper one 0.28, GSPO's 3e-4 / 4e-4, beta 0, k 4, ..."""
    expected = dict(DEFAULTS[name], **(dict(clip_low=.2, clip_high=.2, beta=0) if name in CLIPPED else {}))
    if name in CLIPPED and not name.startswith("diffsmooth"):
        expected["agg"] = "seq_mean"
    parameters = inspect.signature(getattr(L, name)).parameters
    for key, value in expected.items():
        assert key in parameters, f"{name} has no option '{key}'"
        assert parameters[key].default == value, f"{name}: the default of '{key}' should be {value}"


@every
def test_misspelt_option_is_refused(name):
    with pytest.raises(TypeError):
        getattr(L, name)(Ragged.logp, Ragged.old_logp, Ragged.mask, Ragged.rewards, Ragged.G, clip_hihg=0.3)
        pytest.fail(f"{name} accepted the misspelt option clip_hihg without a word: no **kwargs, please.")


@every
def test_stats_are_a_flat_dict_of_floats(name):
    _, _, stats = ragged(name, **ALL[name])
    for key in ("adv_abs", "ratio_max", "clip_frac", "kl_old"):
        assert key in stats, f"{name}: stats lacks '{key}'"
    for key, value in stats.items():
        assert type(value) is float and math.isfinite(value), \
            f"{name}: stats['{key}'] must be a finite Python float, not {value!r}"


@every
def test_nothing_is_written_into_the_arguments(name):
    """Clones taken before the call equal the arguments after it; mask and rewards may be expanded views of one number."""
    given = dict(logp=Ragged.logp, old_logp=Ragged.old_logp, mask=Ragged.mask, rewards=Ragged.rewards,
                 entropy=Ragged.entropy, ref_logp=Ragged.ref_logp)
    given = {key: x.clone() for key, x in given.items()}
    kept = {key: x.clone() for key, x in given.items()}
    getattr(L, name)(group_size=Ragged.G, **given, **ALL[name])
    for key in given:
        same = torch.equal(given[key].nan_to_num(9), kept[key].nan_to_num(9))
        assert same, f"{name} wrote into its argument '{key}'; the caller still needs it"
    views = dict(given, mask=tensor(1.0).expand(4, 3), rewards=tensor(1.0).expand(4))
    views = {key: x if key in ("mask", "rewards") else torch.full((4, 3), -1.0, dtype=F64) for key, x in views.items()}
    loss, _ = getattr(L, name)(group_size=2, **views, **ALL[name])
    assert loss.isfinite(), f"{name} must take expanded views as mask and rewards"


@every
def test_old_and_reference_log_probabilities_are_constants(name):
    """f(logp, logp) has the gradient of f(logp, logp.detach()), and neither old_logp nor ref_logp receives any."""
    W, options = Worked, ALL[name]
    rest = (W.mask, W.rewards, W.G)
    leaf = W.logp.clone().requires_grad_()
    same, = torch.autograd.grad(getattr(L, name)(leaf, leaf, *rest, entropy=W.entropy, **options)[0], leaf)
    _, apart, _ = run(name, W.logp, W.logp.clone(), *rest, entropy=W.entropy, **options)
    check(f"{name}: gradient with logp itself as old_logp (old_logp, weights and advantages must be detached)", same,
          apart)
    leaf, old, ref = (x.clone().requires_grad_() for x in (W.logp, W.old_logp, W.ref_logp))
    if "beta" in inspect.signature(getattr(L, name)).parameters:
        options = dict(options, beta=0.04)
    loss, _ = getattr(L, name)(leaf, old, *rest, entropy=W.entropy, ref_logp=ref, **options)
    for key, g in zip(("old_logp", "ref_logp"), torch.autograd.grad(loss, [old, ref], allow_unused=True)):
        assert g is None or not g.any(), f"{name}: {key} is a constant, but a gradient reached it: detach it"


@every
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_padding_may_hold_anything(name, garbage):
    """NaN, inf or 1e30 under mask 0 changes nothing and gets gradient 0: replace it before exp, since inf * 0 is NaN."""
    R, options = Ragged, dict(ALL[name])
    if "beta" in inspect.signature(getattr(L, name)).parameters:
        options["beta"] = 0.1

    def outcome(filler):
        fill = lambda x: torch.where(R.mask.bool(), x, filler)
        return run(name, fill(R.logp), fill(R.old_logp), R.mask, R.rewards, R.G, entropy=fill(R.entropy),
                   ref_logp=fill(R.ref_logp), **options)
    (clean, clean_g, clean_stats), (loss, g, stats) = outcome(-1.0), outcome(garbage)
    assert not g[~R.mask.bool()].any() and g.isfinite().all(), \
        f"{name}: {garbage} in the padding reached the gradient; masked positions must get exactly 0"
    check(f"{name}: loss with {garbage} in the padding against harmless padding", loss, clean)
    check(f"{name}: gradient with {garbage} in the padding against harmless padding", g, clean_g)
    for key in stats:
        check(f"{name}: stats['{key}'] with {garbage} in the padding", stats[key], clean_stats[key])


@every
def test_first_and_last_generated_token_get_gradient(name):
    """The stop token is the last one under the mask and is trained like any other."""
    R, options = Ragged, ALL[name]
    _, g, _ = run(name, R.old_logp, R.old_logp, R.mask, R.rewards, R.G, entropy=R.entropy, **options)
    i = 3                                              # a correct answer of 5 tokens in a mixed group
    assert g[i, 0] != 0, f"{name}: the first generated token of row {i} gets no gradient; is the mask shifted?"
    assert g[i, 4] != 0, \
        f"{name}: the last generated token (the stop token) of row {i} gets no gradient; is the mask shifted?"
    check(f"{name}: number of tokens with a gradient in row {i}, which has 5", (g[i] != 0).sum(), 5)


@every
def test_float32_bool_mask_and_integer_rewards(name):
    """Training passes float32, a bool mask and perhaps integer rewards; the number is that of float64."""
    options = dict(ALL[name], entropy=Worked.entropy.float())
    loss, g, _ = run(name, Worked.logp.float(), Worked.old_logp.float(), Worked.mask.bool(), Worked.rewards.long(), 4,
                     **options)
    assert loss.dtype == torch.float32, f"{name}: float32 in, so float32 out, not {loss.dtype}"
    check(f"{name}: loss in float32 with bool mask and integer rewards", loss, worked(name, **ALL[name])[0], 2e-6, 1e-5)


# ------------------------------------------------------------------------------------------------------------ bad input

def refused(what, call):
    """`call` must raise a ValueError of one sentence."""
    __tracebackhide__ = True
    try:
        call()
    except ValueError as error:
        if not str(error).strip() or "\n" in str(error):
            pytest.fail(f"{what}: the ValueError should say in one sentence what is wrong, not {str(error)!r}")
        return
    except pytest.fail.Exception:
        raise
    except Exception as error:
        pytest.fail(f"{what}: a ValueError was due, not {type(error).__name__}: {error}")
    pytest.fail(f"{what}: accepted without a word, where a ValueError was due")


@every
def test_bad_input_is_refused(name):
    """Shapes, a mask that is not 0/1, a log-probability above 0 on a generated token."""
    f = getattr(L, name)
    fine = dict(logp=torch.full((6, 4), -1.0, dtype=F64), old_logp=torch.full((6, 4), -1.0, dtype=F64),
                mask=torch.ones(6, 4, dtype=F64), rewards=tensor([1, 0, 1, 0, 0, 1]), group_size=3,
                entropy=torch.ones(6, 4, dtype=F64), **ALL[name])
    f(**fine)
    refused(f"{name}, mask one column short", lambda: f(**dict(fine, mask=fine["mask"][:, 1:])))
    refused(f"{name}, mask of 0.5", lambda: f(**dict(fine, mask=fine["mask"] / 2)))
    positive = fine["logp"].clone()
    positive[2, 1] = 0.3
    refused(f"{name}, a log-probability of +0.3", lambda: f(**dict(fine, logp=positive)))
    rounded = torch.where(positive > 0, 5e-5, positive)
    f(**dict(fine, logp=rounded, old_logp=rounded))    # 5e-5 above 0 is rounding, and allowed
    if name == "sft":
        return                                         # ignores old_logp, rewards and group_size
    refused(f"{name}, old_logp of another shape", lambda: f(**dict(fine, old_logp=fine["logp"][:, :3])))
    refused(f"{name}, an old log-probability of +0.3", lambda: f(**dict(fine, old_logp=positive)))
    refused(f"{name}, rewards one short", lambda: f(**dict(fine, rewards=fine["rewards"][:5], group_size=1)))
    refused(f"{name}, rewards a token", lambda: f(**dict(fine, rewards=fine["mask"])))
    refused(f"{name}, 6 rows in groups of 4", lambda: f(**dict(fine, group_size=4)))
    refused(f"{name}, group_size 0", lambda: f(**dict(fine, group_size=0)))
    refused(f"{name}, a reward of NaN", lambda: f(**dict(fine, rewards=fine["rewards"] * NAN)))


@pytest.mark.parametrize("name", ["reinforce", "rloo", *CLIPPED])
def test_beta_without_reference_is_refused(name):
    """A KL weight without reference log-probabilities must not become a silent zero."""
    options = dict(ALL[name], beta=0.1, entropy=Worked.entropy)
    refused(f"{name}, beta 0.1 without ref_logp", lambda: getattr(L, name)(Worked.logp, Worked.old_logp, Worked.mask,
                                                                        Worked.rewards, 4, **options))


def test_entropy_coefficient_without_entropy_is_refused():
    refused("entropy, coefficient 0.1 without entropy", lambda: L.entropy(Worked.logp, Worked.old_logp, Worked.mask,
                                                                          Worked.rewards, 4, entropy_coef=0.1))


@pytest.mark.parametrize("name", CLIPPED)
def test_unknown_agg_is_refused(name):
    refused(f"{name}, agg 'mean'", lambda: ragged(name, **dict(ALL[name], agg="mean")))


@pytest.mark.parametrize("name", ["diffsmooth", "diffsmooth_reward"])
def test_unknown_reduction_is_refused(name):
    refused(f"{name}, reduction 'avg'", lambda: ragged(name, **dict(ALL[name], reduction="avg")))


def test_unknown_kl_is_refused():
    refused("kl, kind 'k4'", lambda: L.kl(tensor([[-1.0]]), tensor([[-1.5]]), "k4"))


@pytest.mark.parametrize("name", ["passk", "pkpo"])
@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_group_is_refused(name, k):
    refused(f"{name}, k = {k} with groups of 4", lambda: ragged(name, k=k))


def test_group_sizes_that_a_formula_cannot_take_are_refused():
    one = (column([-1, -2]), column([-1, -2]), torch.ones(2, 1, dtype=F64), tensor([1, 0]), 1)
    refused("rloo, groups of one (no other answer to compare with)", lambda: L.rloo(*one))
    refused("group_advantages, 5 rewards in groups of 2", lambda: L.group_advantages(tensor([1, 0, 1, 0, 0]), 2))


@pytest.mark.parametrize("name", ["maxrl", "unlikeliness"])
def test_negative_rewards_are_refused_where_the_formula_needs_them_positive(name):
    """MaxRL divides by the mean reward; a likelihood rank that shrinks a reward of -1 would reward the likely mistake."""
    refused(f"{name}, rewards of -1", lambda: ragged(name, rewards=2 * (Ragged.rewards == 1).to(F64) - 1))


@pytest.mark.parametrize("name", CORRECT_IS_ONE)
def test_rewards_above_one_are_refused_where_correct_means_one(name):
    """With a bonus on top (1.1) a right answer would silently count as wrong."""
    refused(f"{name}, rewards of 1.1", lambda: ragged(name, rewards=Ragged.rewards * 1.1, **ALL[name]))


@every
def test_a_nan_on_a_generated_token_is_not_hidden(name):
    logp = Ragged.logp.clone()
    logp[3, 2] = NAN                                   # a correct answer in a mixed group
    loss, _, _ = run(name, logp, Ragged.old_logp, Ragged.mask, Ragged.rewards, Ragged.G, entropy=Ragged.entropy,
                     **ALL[name])
    assert loss.isnan(), \
        f"{name}: NaN on a generated token must show in the loss, so that the loop can stop; it was masked away"


# ----------------------------------------------------------------------------------------------------------- edge cases

@every
def test_empty_mask(name):
    """No token at all: loss 0 and gradient 0, not 0/0, and backward works."""
    nothing = torch.full((6, 5), NAN, dtype=F64)
    loss, g, _ = run(name, nothing, nothing, torch.zeros(6, 5, dtype=F64), tensor([1, 0, 1, 0, 0, 1]), 3,
                     entropy=nothing, **ALL[name])
    assert loss == 0, \
        f"{name}: with an all-zero mask the loss must be 0, but is {loss.item()} (clamp the denominators to 1)"
    assert not g.any(), f"{name}: with an all-zero mask the gradient must be 0"


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("rloo", "passk", "pkpo")])
def test_groups_of_one(name):
    """G = 1: nothing to compare with, so group-relative advantages are 0; never NaN (std with ddof 1 would be 0/0)."""
    loss, g, _ = run(name, Worked.logp, Worked.old_logp, Worked.mask, Worked.rewards, 1, entropy=Worked.entropy,
                     **ALL[name])
    assert loss.isfinite() and g.isfinite().all(), f"{name}: groups of one must give a finite loss and gradient"
    if name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "entropy", "maxrl", "unlikeliness", "focal", "ucpo"):
        assert not g.any(), f"{name}: in a group of one the advantage must be 0"


@every
def test_an_all_masked_group_changes_nothing(name):
    """Rows without a token count in no denominator."""
    R, options = Ragged, dict(ALL[name], entropy=Ragged.entropy)
    loss, g, _ = run(name, R.logp, R.old_logp, R.mask, R.rewards, R.G, **options)
    empty = lambda x, value: torch.cat([x, torch.full((R.G, R.T), value, dtype=F64)])
    options["entropy"] = empty(R.entropy, NAN)
    longer, g_longer, _ = run(name, empty(R.logp, NAN), empty(R.old_logp, NAN), empty(R.mask, 0.0),
                              torch.cat([R.rewards, tensor([1, 0, 1, 0])]), R.G, **options)
    check(f"{name}: loss after appending a group without tokens (rows without tokens must not be counted)", longer,
          loss)
    check(f"{name}: gradient after appending a group without tokens", g_longer[:R.B], g)
    assert not g_longer[R.B:].any(), f"{name}: rows without tokens must get no gradient"


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "maxrl"])
def test_the_reward_of_an_all_masked_row_counts_in_its_group(name):
    """Rewards (1, 0, 0), third row empty: the mean is still 1/3, so A = 1.4142, -0.7071 and not 1, -1."""
    mask = torch.tensor([[1, 1], [1, 1], [0, 0]])
    old = torch.full((3, 2), -0.5, dtype=F64)
    _, g, _ = run(name, old, old, mask, tensor([1, 0, 0]), 3, **({"max_len": 2} if name == "dr_grpo" else {}))
    full = advantages(name, [1, 0, 0], 3, **({"max_len": 1} if name == "dr_grpo" else {}))
    a = -g.sum(1) * (2 if name != "rloo" else 1)       # rloo sums two tokens over two rows
    check(f"{name}: advantages of rewards (1, 0, 0) when the third answer has no token", a[:2], full[:2])


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
def test_a_group_of_equal_rewards_gives_no_gradient_but_stays_in_the_denominator(name):
    """One mixed group, then the same with an all-correct group beside it: half the gradient, none on the new rows."""
    old = torch.full((8, 3), -0.5, dtype=F64)
    mask = torch.ones(8, 3, dtype=F64)
    _, alone, _ = run(name, old[:4], old[:4], mask[:4], tensor([1, 0, 0, 1]), 4)
    _, both, _ = run(name, old, old, mask, tensor([1, 0, 0, 1, 1, 1, 1, 1]), 4)
    assert alone.any(), f"{name}: a mixed group must give a gradient"
    assert not both[4:].any(), f"{name}: a group of equal rewards must give no gradient"
    check(f"{name}: gradient of a mixed group beside an all-correct one (its tokens stay in the denominators)",
          both[:4], alone / 2)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1 / 3, 0.9])
def test_equal_rewards_are_exactly_zero_in_float32(value):
    """In float32 the mean of equal numbers can be off in the last place; divided by 1e-6 that is an advantage of .01."""
    for G in range(2, 40):
        rewards, old = torch.full((2 * G,), value), torch.full((2 * G, 1), -1.0)
        assert not run("grpo", old, old, torch.ones(2 * G, 1), rewards, G)[1].any(), \
            f"grpo: {G} equal rewards of {value:.3g} in float32 must give a gradient of exactly 0"
        a = L.group_advantages(rewards, G)
        assert not a.any(), \
            f"{G} equal rewards of {value:.3g} in float32 must give advantages of exactly 0, not {a.abs().max():.2g}"


def test_tiny_differences_become_full_size():
    """Seven 1.0 and one 1 - 1e-5: -8.75e-6 / (3.3072e-6 + 1e-6) = -2.0315; with eps under the root it is -0.0087."""
    a = L.group_advantages(tensor([1] * 7 + [1 - 1e-5]), 8)
    check("group_advantages, seven 1.0 and one 1 - 1e-5 (eps = 1e-6 outside the root)", a[7], -2.031497, 5e-5,
          bugs={"eps under the root": -0.00875, "eps 1e-4": -0.0847, "eps 1e-8": -2.63776, "no eps": -2.645751})


def test_rft_with_nothing_kept():
    loss, g, stats = run("rft", Worked.logp, Worked.old_logp, Worked.mask, tensor([0, .1] * 4), 4)
    assert loss == 0 and not g.any(), "rft: without a correct answer loss and gradient must be 0"
    assert stats.get("kept_frac") == 0, "rft: stats['kept_frac'] must be 0 when nothing is kept"


@pytest.mark.parametrize("name", ["passk", "pkpo"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_passk_edges_are_finite(name, k):
    """c = 0, c = G, fewer wrong answers than k, k = 1, k = G: finite, and 0 where nothing is left to learn."""
    for c in range(7):
        a = advantages(name, [1] * c + [0] * (6 - c), 6, k=k)
        assert a.isfinite().all(), f"{name}, G 6, k {k}, c {c}: advantages must be finite"
        if c == 0 or (name == "passk" and 6 - c < k) or (name == "pkpo" and 6 - c < k - 1):
            assert not a.any(), f"{name}, G 6, k {k}, c {c}: every {k}-subset has the same reward, so nothing is learnt"


# ------------------------------------------------------------------------------------------- worked numbers: the pieces

AGG = [("w_reinforce", dict(w_pos=1.0, w_neg=1.0, agg="seq_mean"), 0.0),
       ("w_reinforce", dict(w_pos=1.0, w_neg=1.0, agg="token_mean"), .5),
       ("w_reinforce", dict(w_pos=1.0, w_neg=1.0, agg="seq_sum"), 2.0), ("grpo", dict(agg="seq_mean"), 0.0),
       ("grpo", dict(agg="token_mean"), .499999), ("grpo", dict(agg="seq_sum"), 1.999996), ("dapo", {}, .499999),
       ("dr_grpo", dict(max_len=10), 0.1), ("gspo", {}, 0.0), ("rloo", {}, -1.0), ("cispo", {}, -.2499995)]


@pytest.mark.parametrize("name, options, expected", AGG, ids=[f"{n}-{o.get('agg', 'own')}" for n, o, _ in AGG])
def test_aggregators(name, options, expected):
    """Lengths 2 and 6, A = +1 and -1, on-policy, so each token loss is -A:

    seq_mean (-1 + 1)/2 = 0; token_mean (-2 + 6)/8 = .5; seq_sum (-2 + 6)/2 = 2; dr_grpo, A = +-.5, (-1 + 3)/2/10 = .1.
    In rloo and cispo a token loss is -A logp = A/2 instead: rloo (1 - 3)/2 = -1, cispo (1 - 3)/8 = -.25.
    """
    mask = (torch.arange(7) < torch.tensor([[2], [6]])).to(F64)
    old = torch.full((2, 7), -0.5, dtype=F64)
    loss, g, _ = run(name, old, old, mask, tensor([1, 0]), 2, **options)
    agg = options.get("agg", AGGREGATOR.get(name, "seq_mean"))
    check(f"{name} aggregates by {agg}: lengths 2 and 6, A = +1 and -1", loss, expected)
    weight = {"seq_mean": (1 / 4, 1 / 12), "token_mean": (1 / 8, 1 / 8), "seq_sum": (1 / 2, 1 / 2),
              "seq_const": (1 / 40, 1 / 40)}[agg]
    check(f"{name} aggregates by {agg}: gradient of the first tokens of both rows", g[:, 0], [-weight[0], weight[1]],
          rtol=3e-6)


CLIP = [(+1, 1.5, .2, -1.2, 0), (+1, 1.5, .28, -1.28, 0), (+1, .5, .2, -.5, -.5), (+1, 1.1, .2, -1.1, -1.1),
        (-1, .5, .2, .8, 0), (-1, 1.5, .2, 1.5, 1.5), (-1, 5, .2, 5, 5), (-1, .9, .2, .9, .9)]


@pytest.mark.parametrize("A, ratio, clip_high, loss, slope", CLIP)
@pytest.mark.parametrize("name", ["w_reinforce", "grpo", "dapo", "dr_grpo"])
def test_clip(name, A, ratio, clip_high, loss, slope):
    """l = -min(ratio A, clip(ratio) A) and its slope -ratio A, or 0 where clipped; lower clip .2 throughout.

    A = +1: ratio 1.5 gives -1.2 and no slope (1.28 with clip_high .28), ratio .5 gives -.5 and slope -.5.
    A = -1: ratio .5 gives +.8 and no slope, ratio 5 gives +5 and slope +5, unbounded on purpose.
    """
    scale = {"grpo": 1 / (1 + 2e-6), "dapo": 1 / (1 + 2e-6), "dr_grpo": .5}.get(name, 1)     # |A| of rewards (1, 0)
    options = {"w_reinforce": dict(w_pos=1.0, w_neg=1.0), "dr_grpo": dict(max_len=1)}.get(name, {})
    row = 0 if A > 0 else 1
    old = column([-2, -2])
    logp = old.clone()
    logp[row] += math.log(ratio)
    other = -scale if row else scale                   # the row that stays at ratio 1 contributes its -A
    clipped = min(max(ratio, .8), 1 + clip_high)
    bugs = {"no clip": -ratio * A * scale, "max for min": -max(ratio * A, clipped * A) * scale,
            "the clip whatever the sign of A": -clipped * A * scale}
    value, g, stats = run(name, logp, old, torch.ones(2, 1), tensor([1, 0]), 2, clip_low=.2, clip_high=clip_high,
                          **options)
    what = f"{name}, A = {A:+d}, ratio {ratio}, clip .2/{clip_high}"
    check(f"{what}: token loss", 2 * value - other, scale * loss, bugs=bugs)
    check(f"{what}: gradient (cut where the clipped side is the smaller one, and nowhere else)", 2 * g[row, 0],
          scale * slope)
    check(f"{what}: stats['clip_frac'] counts tokens whose gradient is cut", stats["clip_frac"],
          0.5 if slope == 0 else 0.0)


def test_kl_values():
    """d = +.5: k1 .5, k3 e^-.5 + .5 - 1 = .106531. d = -.5: -.5, e^.5 - .5 - 1 = .148721."""
    logp, ref = tensor([[-1.0, -1.5]]), tensor([[-1.5, -1.0]])
    check("kl k1 (d = logp - ref_logp)", L.kl(logp, ref, "k1"), [[.5, -.5]],
          bugs={"d with the wrong sign": [[-.5, .5]]})
    check("kl k3", L.kl(logp, ref, "k3"), [[.106531, .148721]], 6e-7,
          bugs={"d with the wrong sign": [[.148721, .106531]]})
    check("kl without a kind is k3", L.kl(logp, ref), [[.106531, .148721]], 6e-7)


def test_k3_is_never_negative_and_exact_for_small_d():
    """In float32 at d = 1e-4, exp(-d) + d - 1 is 0 or negative, expm1(-d) + d is 5.0e-9."""
    d = torch.linspace(-3, 0, 301)
    assert (L.kl(d, torch.zeros(301)) >= 0).all() and (L.kl(torch.zeros(301), d) >= 0).all(), \
        "k3 must never be negative"
    small = L.kl(torch.full((1, 1), -1e-4), torch.full((1, 1), -2e-4))
    check("k3 at d = 1e-4 in float32 (use expm1)", small, [[5e-9]], atol=5e-10)


def test_k3_slope():
    """d k3 / d logp = 1 - e^-d: +.393469 at d = .5, -.648721 at d = -.5; at d = 0 it is 0."""
    logp = tensor([[-1.0, -1.5, -1.0]]).requires_grad_()
    g, = torch.autograd.grad(L.kl(logp, tensor([[-1.5, -1.0, -1.0]])).sum(), logp)
    check("slope of k3 at d = .5, -.5, 0", g, [[.393469, -.648721, 0]], 6e-7)


PI, REF = tensor([.7, .2, .1]), tensor([.5, .25, .25])


@pytest.mark.parametrize("kind, value, slope", [("k1", .099273, (0, 0, 0)), ("k3", .099273, (.2, -.05, -.15))])
def test_kl_in_expectation(kind, value, slope):
    """pi = (.7, .2, .1), ref = (.5, .25, .25), exactly: E k1 = E k3 = KL(pi, ref) = .099273.

    Expected gradient as a loss, in the logits: k1 zero, k3 pi - ref, that of KL(ref, pi).
    """
    logits = PI.log().requires_grad_()
    estimate = L.kl(logits.log_softmax(0)[None], REF.log()[None], kind)[0]
    check(f"expected {kind}", (PI * estimate).sum(), value, 6e-7,
          bugs={"the direction flipped, e^d - d - 1": .080727, "KL(ref, pi)": .116622})
    g, = torch.autograd.grad((PI * estimate).sum(), logits)
    check(f"expected gradient of {kind} in the logits", g, slope, 6e-6)


# ------------------------------------------------------------------------------- worked numbers: advantages, by variant

TABLE = {  # G = 8, k = 4; (correct, wrong) for c = 1, 2, 4, 6, 8, 0 correct answers
    "reinforce": [(1, 0), (1, 0), (1, 0), (1, 0), (1, None), (None, 0)],
    "dr_grpo": [(.875, -.125), (.75, -.25), (.5, -.5), (.25, -.75), (0, None), (None, 0)],
    "rloo": [(1, -.1429), (.8571, -.2857), (.5714, -.5714), (.2857, -.8571), (0, None), (None, 0)],
    "grpo": [(2.6457, -.3780), (1.7320, -.5773), (1, -1), (.5773, -1.7320), (0, None), (None, 0)],
    "diffsmooth": [(2.9457, -.4780), (2.0320, -.6773), (1.3, -1.1), (.8773, -1.8320), (.3, None), (None, -.1)],
    "passk": [(1, -.1429), (.5222, -.1741), (.1204, -.1204), (0, 0), (0, None), (None, 0)],
    "pkpo": [(4, 0), (2.2857, 0), (.4571, 0), (0, 0), (0, None), (None, 0)],
    "w_reinforce": [(.1, -1), (.1, -1), (.1, -1), (.1, -1), (.1, None), (None, -1)],
    "maxrl": [(6.9999, -1), (3, -1), (1, -1), (.3333, -1), (0, None), (None, 0)],
    "focal": [(2.4749, -.3536), (1.5, -.5), (.7071, -.7071), (.2887, -.8660), (0, None), (None, 0)],
    "focal-1": [(2.3150, -.3307), (1.2990, -.4330), (.5, -.5), (.1443, -.4330), (0, None), (None, 0)],
}
TABLE |= {name: TABLE["grpo"] for name in ("dapo", "gspo", "cispo", "entropy", "ucpo")}


@pytest.mark.parametrize("row", TABLE)
def test_advantages_by_number_correct(row):
    """Group of 8 with c correct. GRPO at c = 2: mean .25, std sqrt(.25 * .75) = .4330; .75/.4330 = 1.7320, -.5773."""
    name = row.removesuffix("-1")
    options = {"dr_grpo": dict(max_len=1), "passk": dict(k=4), "pkpo": dict(k=4),
               "diffsmooth": dict(DS, agg="seq_mean"),
               "focal-1": dict(focal_gamma=1.0)}.get(row, {})
    if name == "entropy":
        options = dict(entropy=torch.zeros(8, 1, dtype=F64))
    for c, (right, wrong) in zip((1, 2, 4, 6, 8, 0), TABLE[row]):
        old = column([-10.0] * 8)                      # diffsmooth: S = -10 for all
        a = advantages(name, [1] * c + [0] * (8 - c), 8, old, **options)
        ddof1 = [v * math.sqrt(7 / 8) for v in ([right] * c + [wrong] * (8 - c))]
        check(f"{row}: advantages with {c} of 8 correct", a, [right] * c + [wrong] * (8 - c), 6e-5, 0,
              bugs={"std with ddof 1": ddof1})


GROUPS = [("grpo", {}, (1, 1, 0, 0), (.999998, .999998, -.999998, -.999998)),
          ("grpo", {}, (1, 0, 0, 0), (1.732047, -.577349, -.577349, -.577349)),
          ("rloo", {}, (1, 0, 0, 0), (1, -1 / 3, -1 / 3, -1 / 3)),
          ("dr_grpo", dict(max_len=1), (1, 0, 0, 0), (.75, -.25, -.25, -.25)),
          ("passk", dict(k=2), (1, 1, 0, 0), (.447212, .447212, -.447212, -.447212)),
          ("passk", dict(k=2), (1, 0, 0, 0), (.999998, -.333333, -.333333, -.333333)),
          ("pkpo", dict(k=2), (1, 1, 0, 0), (4 / 3, 4 / 3, 0, 0)),
          ("pkpo", dict(k=2), (1, 0, 0, 0), (2, 0, 0, 0)),
          ("maxrl", {}, (1, 0, 0, 0), (2.999988, -.999996, -.999996, -.999996)),
          ("focal", {}, (1, 1, 0, 0), (.707105, .707105, -.707105, -.707105)),
          ("focal", {}, (1, 0, 0, 0), (1.499997, -.499999, -.499999, -.499999)),
          ("reinforce", dict(baseline=.25), (1, 0, 0, 0), (.75, -.25, -.25, -.25)),
          ("w_reinforce", dict(w_pos=0.0, w_neg=1.0), (1, 0, 0, 0), (0, -1, -1, -1))]


@pytest.mark.parametrize("name, options, rewards, expected", GROUPS, ids=[f"{n}-{r}" for n, _, r, _ in GROUPS])
def test_advantages_of_one_group(name, options, rewards, expected):
    """GRPO, (1, 0, 0, 0): mean .25, population std .4330: .75/.433014 = 1.732047, -.577349. With ddof 1: 1.5, -.5."""
    ddof1 = [a * math.sqrt(3) / 2 for a in expected]
    check(f"{name}: advantages of rewards {rewards}", advantages(name, rewards, 4, **options), expected, 6e-7,
          bugs={"std with ddof 1": ddof1})


def test_group_advantages():
    """Two groups of 4, and p correct in general: +sqrt((1-p)/p) and -sqrt(p/(1-p)), mean |A| = 2 sqrt(p(1-p))."""
    a = L.group_advantages(tensor([1, 1, 0, 0, 1, 0, 0, 0]), 4)
    check("group_advantages of (1, 1, 0, 0 | 1, 0, 0, 0)", a,
          [.999998, .999998, -.999998, -.999998, 1.732047, -.577349, -.577349, -.577349], 6e-7,
          bugs={"mean and std over the whole batch": [1.290992] * 2 + [-.774595] * 2 + [1.290992] + [-.774595] * 3})
    for c in range(1, 8):
        a, p = L.group_advantages(tensor([1] * c + [0] * (8 - c)), 8), c / 8
        check(f"group_advantages, {c} of 8 correct", a[[0, 7]], [math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p))],
              rtol=1e-5)
        check(f"mean |A|, {c} of 8 correct", a.abs().mean(), 2 * math.sqrt(p * (1 - p)), rtol=1e-5)


S = [-10, -20, -10, -20]
SMOOTHED = [("diffsmooth", (1, 1, 0, 0), (1.299998, 1.599998, -1.099998, -1.199998)),
            ("diffsmooth", (1, 1, 1, 1), (.3, .6, .3, .6)),
            ("diffsmooth", (0, 0, 0, 0), (-.1, -.2, -.1, -.2)),
            ("diffsmooth_reward", (1, 1, 0, 0), (.65, .95, -.75, -.85)),
            ("diffsmooth_reward", (1, 1, 1, 1), (-.15, .15, -.15, .15)),
            ("diffsmooth_reward", (0, 0, 0, 0), (.05, -.05, .05, -.05))]


@pytest.mark.parametrize("name, rewards, expected", SMOOTHED, ids=[f"{n}-{r}" for n, r, _ in SMOOTHED])
def test_smoothed_advantages(name, rewards, expected):
    """S = (-10, -20, -10, -20), gammas .03 and .01: correct gain -.03 S = .3, .6; wrong lose .01 S = -.1, -.2 (Eq. 6).

    r = (1, 1, 0, 0): 1.3, 1.6, -1.1, -1.2. In the reward form (Eq. 4) r' = 1.3, 1.6, -.1, -.2 minus their mean .65.
    """
    agg = "seq_mean" if name == "diffsmooth" else "token_mean"
    a = advantages(name, rewards, 4, column(S), **DS, agg=agg)
    bugs = {bug: oracle_advantages(name, rewards, S, S, dict(reduction="sum", gamma_p=p, gamma_n=n)) for bug, p, n in
            (("gamma_p and gamma_n swapped", .01, .03), ("gamma_p with the wrong sign", -.03, .01),
             ("gamma_n with the wrong sign", .03, -.01), ("a smoothing term that is silently zero", 0, 0))}
    check(f"{name}: advantages of rewards {rewards} at S = -10, -20, -10, -20", a, expected, 6e-7, bugs=bugs)


def test_smoothing_by_sum_and_by_mean():
    """Two tokens of -1 each: S = -2, M = -1. r = (1, 1, 0, 0), mean: 1.029998, -1.009998; sum: 1.059998, -1.019998."""
    old = torch.full((4, 2), -1.0, dtype=F64)
    for reduction, right, wrong in (("mean", 1.029998, -1.009998), ("sum", 1.059998, -1.019998)):
        a = advantages("diffsmooth", [1, 1, 0, 0], 4, old, reduction=reduction, gamma_p=.03, gamma_n=.01,
                       agg="seq_mean")
        check(f"diffsmooth, reduction {reduction}, two tokens of -1", a, [right, right, wrong, wrong], 6e-7)


@pytest.mark.parametrize("name", ["diffsmooth", "diffsmooth_reward"])
def test_repeating_the_tokens_of_an_answer(name):
    """An answer's tokens twice over: the mean log-probability stays, the sum doubles, so gammas do not carry over."""
    short = torch.tensor([[-1.0, -2], [-2, -3], [-1, -1], [-3, -1]], dtype=F64)
    options = dict(gamma_p=.03, gamma_n=.02, agg="seq_mean")
    term = lambda old, reduction: (advantages(name, [1, 1, 0, 0], 4, old, reduction=reduction, **options)
                                   - advantages(name, [1, 1, 0, 0], 4, old, reduction=reduction,
                                                **dict(options, gamma_p=0.0, gamma_n=0.0)))
    once, twice = short, torch.cat([short, short], dim=1)
    assert term(once, "sum").any(), f"{name}: the smoothing term is silently zero"
    check(f"{name}: smoothing term by mean, tokens repeated", term(twice, "mean"), term(once, "mean"))
    check(f"{name}: smoothing term by sum, tokens repeated", term(twice, "sum"), 2 * term(once, "sum"))


def test_ds_positive_changes_correct_answers_only():
    """gamma_n = 0: correct answers rise, the rarer by more; wrong ones keep GRPO's advantage."""
    old, r = column([-5, -9, -5, -9, -7]), [1, 1, 0, 0, .1]
    moved = advantages("diffsmooth", r, 5, old, reduction="sum", gamma_p=.1, gamma_n=0.0,
                       agg="seq_mean") - advantages("grpo", r, 5, old)
    check("diffsmooth, gamma_n = 0: change of the wrong answers' advantages", moved[2:], [0, 0, 0])
    assert (moved[:2] > 0).all(), "diffsmooth, gamma_p > 0: correct answers must rise (the sign of gamma_p is flipped)"
    check("diffsmooth, gamma_p = .1: rise of correct answers with log pi = -5 and -9 (the rarer gains more)", moved[:2],
          [.5, .9])


def test_ds_negative_changes_wrong_answers_only():
    """gamma_p = 0: wrong answers (.1 is wrong) fall, the rarer by more; correct ones keep GRPO's advantage."""
    old, r = column([-5, -9, -5, -9, -7]), [1, 1, 0, 0, .1]
    moved = advantages("diffsmooth", r, 5, old, reduction="sum", gamma_p=0.0, gamma_n=.1,
                       agg="seq_mean") - advantages("grpo", r, 5, old)
    check("diffsmooth, gamma_p = 0: change of the correct answers' advantages", moved[:2], [0, 0])
    assert (moved[2:] < 0).all(), "diffsmooth, gamma_n > 0: wrong answers must fall (the sign of gamma_n is flipped)"
    check("diffsmooth, gamma_n = .1: fall of wrong answers with log pi = -5, -9, -7 (the rarer loses more)", moved[2:],
          [-.5, -.9, -.7])


@pytest.mark.parametrize("name", ["diffsmooth", "diffsmooth_reward"])
@pytest.mark.parametrize("rewards", [(1, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0)])
def test_the_smoothing_term_is_never_silently_zero(name, rewards):
    """A gamma != 0 changes the gradient, in mixed, all-correct and all-wrong groups; stats['ds_ratio'] shows it."""
    old = torch.tensor([[-1.0, -2], [-2, -3], [-1, -1], [-3, -1]], dtype=F64)
    args = (old, old, torch.ones(4, 2, dtype=F64), tensor(rewards), 4)
    on = dict(reduction="sum", gamma_p=.03, gamma_n=.01, agg="seq_mean")
    _, g, stats = run(name, *args, **on)
    _, off, stats_off = run(name, *args, **dict(on, gamma_p=0.0, gamma_n=0.0))
    assert (g - off).abs().max() > 1e-4, \
        f"{name}: the smoothing term changes nothing for rewards {rewards}; it acts in equal groups too"
    assert stats["ds_ratio"] > 0, f"{name}: stats['ds_ratio'] must be above 0 when a gamma is"
    assert stats_off["ds_ratio"] == 0, f"{name}: stats['ds_ratio'] must be 0 with both gammas 0"


def normalised(r):
    return oracle_advantages("grpo", r, r, r, {})


def test_unlikeliness_ranks():
    """M = (-.1, -.5, -.3, -.9): ranks 3, 1, 2, 0 (0 = least likely); r' = 1 - .25 * 3/4 = .8125, 1 - .25/4 = .9375, 0, 0.

    There the sorting order happens to equal the ranks. M = (-.3, -.5, -.1, -.9) has ranks 2, 1, 3, 0, order 3, 1, 0, 2.
    """
    a = advantages("unlikeliness", [1, 1, 0, 0], 4, column([-.1, -.5, -.3, -.9]))
    check("unlikeliness: advantages at M = -.1, -.5, -.3, -.9", a, [.852801, 1.137068, -.994934, -.994934], 6e-7,
          bugs={"ranks the other way round (0 = most likely)": normalised([1, .875, 0, 0]),
                "ranks among the correct answers only": normalised([.9375, 1, 0, 0])})
    a = advantages("unlikeliness", [1, 1, 0, 0], 4, column([-.3, -.5, -.1, -.9]))
    check("unlikeliness: advantages at M = -.3, -.5, -.1, -.9", a, normalised([.875, .9375, 0, 0]),
          bugs={"the sorting order (one argsort) for the rank": normalised([.8125, .9375, 0, 0])})


def test_unlikeliness_ties_go_by_row():
    """Equal likelihoods: ranks 0, 1, 2 in row order. r = (1, 1, 0) gives r' = 1, 1 - .25/3, 0."""
    a = advantages("unlikeliness", [1, 1, 0], 3)
    check("unlikeliness: ties in row order", a, normalised([1, 1 - .25 / 3, 0]))


def test_unlikeliness_all_correct():
    """In an all-correct group the std cancels rank_coef: A runs from -1.5275 to 1.5275 (G = 8), 1.6787 (G = 32)."""
    for G, extreme in ((8, 1.5275), (32, 1.6787)):
        for coef in (.01, .25):
            a = advantages("unlikeliness", [1] * G, G, column([-.1 * i for i in range(1, G + 1)]), rank_coef=coef)
            check(f"unlikeliness, {G} correct of {G}, rank_coef {coef}: most and least likely answer", a[[0, -1]],
                  [-extreme, extreme], 1e-3)


def test_ucpo_factors():
    """M = -.1, -.5, both correct: q = .598688, .401312; 2 (1/q)/sum = .802625, 1.197375; factors .960525, 1.039475."""
    old = column([-.1, -.5, -.3, -.9])
    factor = advantages("ucpo", [1, 1, 0, 0], 4, old) / advantages("grpo", [1, 1, 0, 0], 4, old)
    check("ucpo: factors on GRPO's advantages at M = -.1, -.5 of the correct answers", factor,
          [.960525, 1.039475, 1, 1], 6e-7)
    for rewards in ([1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
        check(f"ucpo does nothing for rewards {rewards}", advantages("ucpo", rewards, 4, old),
              advantages("grpo", rewards, 4, old))


@pytest.mark.parametrize("focal_gamma, factor", [(.5, .679), (1.0, .5)])
def test_focal_lowers_the_mean_advantage(focal_gamma, factor):
    """Over uniform accuracies mean |A| falls to B(1.5, 1.5 + gamma)/B(1.5, 1.5) of GRPO's: .679 for .5, .5 for 1."""
    rewards = (torch.arange(100)[None] < torch.arange(101)[:, None]).to(F64).flatten()      # 0, 1, ..., 100 of 100
    size = lambda name, **o: advantages(name, rewards, 100, **o).abs().mean()
    check(f"focal_gamma {focal_gamma}: mean |A| over GRPO's", size("focal", focal_gamma=focal_gamma) / size("grpo"),
          factor, 1e-3)


@pytest.mark.parametrize("name", ["passk", "pkpo"])
@pytest.mark.parametrize("G, k", [(5, 1), (5, 2), (6, 3), (5, 5), (7, 4)])
def test_passk_and_pkpo_by_brute_force(name, G, k):
    """The closed forms against a sum over every k-subset of the group, for every number of correct answers."""
    for c in range(G + 1):
        r = [1] * c + [0] * (G - c)
        expected = oracle_advantages(name, r, [-1] * G, [-1] * G, dict(k=k))
        check(f"{name}, G {G}, k {k}, {c} correct, against all {k}-subsets", advantages(name, r, G, k=k), expected,
              1e-6)


def test_gspo_ratio_is_the_geometric_mean():
    """Log-ratios .1, -.1, .3: s = e^.1 = 1.105171, also with the tokens twice over. Mean 1.119956, product 1.349859."""
    old = torch.full((2, 3), -2.0, dtype=F64)
    logp = old + tensor([[.1, -.1, .3], [0, 0, 0]])
    a = 1 / (1 + 2e-6)
    for repeat in (1, 2):
        loss, g, _ = run("gspo", logp.repeat(1, repeat), old.repeat(1, repeat), torch.ones(2, 3 * repeat),
                         tensor([1, 0]), 2, clip_low=5.0, clip_high=5.0)
        check(f"gspo: s for log-ratios .1, -.1, .3{' repeated' * (repeat - 1)}", 1 - 2 * loss / a, 1.105171, 1e-6,
              bugs={"mean of the ratios": 1.119956, "product of the ratios": 1.349859,
                    "product, tokens repeated": 1.822119})
        check("gspo: gradient of a token, -s A / (n_seq len)", g[0, 0], -1.105171 * a / 2 / (3 * repeat), 1e-6)


CAPS = [(math.log(10), -5), (.5, -1.648721), (-3.0, -.049787)]


@pytest.mark.parametrize("log_ratio, slope", CAPS)
def test_cispo_weight(log_ratio, slope):
    """A = +1, one token: gradient -min(ratio, 5). Ratio 10: -5 (PPO: 0); e^.5: -1.648721; e^-3: -.049787."""
    old = column([-4, -4])
    logp = old + column([log_ratio, 0])
    _, g, stats = run("cispo", logp, old, torch.ones(2, 1), tensor([1, 0]), 2)
    a, ratio, r5 = .999998, math.exp(log_ratio), min(math.exp(log_ratio), 5)
    bugs = {"clip_high read as the absolute cap 4": -4 * a, "PPO's clip": 0.0, "a floor of .8": -.8 * a,
            "a weight that is not detached": -(r5 + (logp[0, 0].item() * ratio if ratio < 5 else 0)) * a}
    check(f"cispo: gradient at ratio {ratio:.4g}", 2 * g[0, 0], slope * a, 2e-6, bugs=bugs)
    assert stats["clip_frac"] == 0, "cispo: no token loses its gradient, so stats['clip_frac'] is 0"


def test_reinforce_by_hand():
    """A = 1, one token of logp -.2: loss +.2, gradient -1. Two tokens are summed, never averaged."""
    loss, g, _ = run("reinforce", column([-.2]), column([-.2]), torch.ones(1, 1), tensor([1]), 1)
    check("reinforce: loss of A = 1, logp -.2", loss, .2)
    check("reinforce: gradient of A = 1, logp -.2", g, [[-1]], bugs={"loss with the wrong sign": [[1]]})
    loss, g, _ = run("reinforce", tensor([[-.2, -.3]]), tensor([[-.2, -.3]]), torch.ones(1, 2), tensor([1]), 1)
    check("reinforce: gradient of two tokens (the length does not divide)", g, [[-1, -1]])


def test_sft_by_hand():
    """logp (-1, -2) and (-3): 6 nats over 3 tokens = 2.0; the mean of row means would be 2.25."""
    logp, mask = tensor([[-1, -2], [-3, NAN]]), torch.tensor([[1, 1], [1, 0]])
    loss, g, _ = run("sft", logp, logp, mask, tensor([1, 0]), 2)
    check("sft: logp (-1, -2) and (-3)", loss, 2.0, bugs={"mean of row means": 2.25})
    check("sft: gradient", g, [[-1 / 3, -1 / 3], [-1 / 3, 0]])
    other, g_other, _ = run("sft", logp, torch.full_like(logp, 7.0), mask, tensor([.3, -5]), 5)
    check("sft ignores rewards, group_size and old_logp", other, loss)


def test_rft_by_hand():
    """logp (-1, -2) correct, (-3) wrong: 3 nats over the 2 kept tokens = 1.5."""
    logp, mask = tensor([[-1, -2], [-3, NAN]]), torch.tensor([[1, 1], [1, 0]])
    loss, g, stats = run("rft", logp, logp, mask, tensor([1, 0]), 2)
    check("rft: logp (-1, -2) kept, (-3) not", loss, 1.5, bugs={"divided by all tokens": 1.0})
    check("rft: gradient", g, [[-.5, -.5], [0, 0]])
    check("rft: stats['kept_frac']", stats["kept_frac"], .5)


# ----------------------------------------------------------------------- worked numbers: the batch of eight, end to end

BATCH = {  # label: (loss, options, on-policy loss, loss, d loss / d logp summed over each row x 1000, {bug: loss})
    "reinforce": ("reinforce", {}, .875, .843750, (-125, -250, 0, 0, -375, 0, 0, 0), {}),
    "rloo": ("rloo", {}, .135417, .100000, (-83.33, -166.67, 250, 166.67, -375, 83.33, 41.67, 125), {}),
    "rloo, beta .04": ("rloo", dict(beta=.04), .129833, .094967, (-84.67, -166.67, 254, 166.67, -372, 82.67, 40, 128),
                       {}),
    "grpo": ("grpo", {}, 0, -.013150, (0, -113.10, 139.99, 0, -227.61, 107.66, 0, 72.17),
             {"no clip": -.048639, "clip whatever the sign of A": -.040455, "max for min": -.075944,
              "only the upper bound": -.029907, "only the lower bound": -.031882, "ratio inverted": .086687,
              "std with ddof 1": -.011388, "std over the batch": -.014959, "mean and std over the batch": -.004686,
              "groups interleaved": .000250, "token_mean": .023775,
              "clip_high .28": -.023150, "the wrong sign": .013150, "the last token of every row masked": .086328}),
    "grpo, beta .04": ("grpo", dict(beta=.04), .000749, -.011225,
                       (1.97, -112.63, 141.24, -.53, -226.50, 109.92, -1.11, 73.07),
                       {"KL direction flipped": -.010536, "KL term with the wrong sign": -.015075, "k1": -.004900,
                        "k2": -.010927, "KL term missing": -.013150}),
    "dr_grpo": ("dr_grpo", dict(max_len=10), .003125, .003821, (0, -11.31, 21.00, 0, -29.57, 9.32, 0, 9.375),
                {"divided by the padded width": .012735}),
    "dapo": ("dapo", {}, .015762, .019069, (0, -106.45, 197.64, 0, -321.33, 101.33, 0, 101.89),
             {"mean of two micro-batch means": .030997, "stop token masked": .031052, "clip_high .2": .023775,
              "seq_mean": -.023150}),
    "gspo": ("gspo", {}, 0, .060340, (0, -113.10, 138.15, 0, 0, 107.66, 0, 72.17),
             {"mean of ratios": .062188, "product of ratios": .154641, "clip .2": -.014998}),
    "cispo": ("cispo", {}, .144501, .207739, (-79.40, -106.45, 197.64, 87.15, -321.33, 101.33, 22.77, 101.89), {}),
    "entropy": ("entropy", {}, -.000800, -.013950, (0, -113.10, 139.99, 0, -227.61, 107.66, 0, 72.17),
                {"entropy averaged by token_mean": -.013927, "entropy with the wrong sign": -.012350,
                 "entropy term missing": -.013150}),
    "diffsmooth sum": ("diffsmooth", dict(DS, agg="seq_mean"), -.015000, -.028974,
                       (0, -119.89, 143.14, 0, -245.35, 109.53, 0, 73.11),
                       {"gamma_p with the wrong sign": .024578, "gamma_n with the wrong sign": -.050879,
                        "both signs wrong": .002674, "gammas swapped": .010781, "smoothing term silently zero": -.013150,
                        "added before normalisation": -.012179, "logp for old_logp in the term": -.028623,
                        "summed over padding too": -.031935, "mean for sum": -.019412}),
    "diffsmooth sum, token_mean": ("diffsmooth", dict(DS, agg="token_mean"), -.004238, .003045, None,
                                   {"seq_mean": -.028974}),
    "diffsmooth mean": ("diffsmooth", dict(DS, reduction="mean", agg="seq_mean"), -.005625, -.019412,
                        (0, -116.50, 141.04, 0, -233.52, 108.60, 0, 72.48), {"sum for mean": -.028974}),
    "DS-Positive": ("diffsmooth", dict(DS, gamma_n=0.0, agg="seq_mean"), -.026250, -.039927,
                    (0, -119.89, 139.99, 0, -245.35, 107.66, 0, 72.17), {}),
    "DS-Negative": ("diffsmooth", dict(DS, gamma_p=0.0, agg="seq_mean"), .011250, -.002198,
                    (0, -113.10, 143.14, 0, -227.61, 109.53, 0, 73.11), {}),
    "diffsmooth_reward mean": ("diffsmooth_reward", dict(DS, reduction="mean", agg="token_mean"), None, .016602,
                               (0, -55.95, 101.17, 0, -146.21, 45.96, 0, 45.77), {}),
    "diffsmooth_reward sum": ("diffsmooth_reward", dict(DS, agg="token_mean"), None, .014424,
                              (0, -59.28, 103.88, 0, -159.20, 50.35, 0, 50.18), {}),
    "unlikeliness": ("unlikeliness", {}, 0, -.007789, (0, -128.61, 139.29, 0, -227.61, 107.66, 0, 72.17), {}),
    "passk": ("passk", dict(k=2), 0, -.004585, (0, -50.58, 62.61, 0, -131.41, 62.16, 0, 41.67), {}),
    "pkpo": ("pkpo", dict(k=2), -.583333, -.613624, (0, -150.81, 0, 0, -262.82, 0, 0, 0), {}),
    "w_reinforce": ("w_reinforce", {}, .587500, .612021, (0, -11.31, 139.99, 0, -13.14, 186.48, 0, 125), {}),
    "maxrl": ("maxrl", {}, 0, -.005859, (0, -113.10, 139.99, 0, -394.23, 186.48, 0, 125), {}),
    "ucpo": ("ucpo", {}, 0, -.011343, (0, -118.64, 139.99, 0, -227.61, 107.66, 0, 72.17), {}),
    "focal": ("focal", {}, 0, -.007716, (0, -79.98, 98.99, 0, -197.11, 93.24, 0, 62.50), {}),
    "sft": ("sft", {}, .941176, .920588, tuple(-1000 / 17 * n for n in (1, 2, 3, 2, 3, 2, 1, 3)), {}),
    "rft": ("rft", {}, 1.166667, 1.125000, (-166.67, -333.33, 0, 0, -500, 0, 0, 0), {}),
}


@pytest.mark.parametrize("label", BATCH)
def test_worked_batch(label):
    """The batch of `Worked`. rft by hand: rows 1, 2, 5 are kept, 6 tokens; .2 + 2 * 1.1 + 3 * 1.45 = 6.75; / 6 = 1.125.

    grpo, row 8: A = -.577349, ratio 1, three tokens of 1/(8 * 3) each: 3 * .577349 / 24 = .07217.
    """
    name, options, on_policy, loss, rows, bugs = BATCH[label]
    value, g, _ = worked(name, **options)
    check(f"{label}: loss of the worked batch", value, loss, 6e-7, 0, bugs)
    if rows is not None:
        check(f"{label}: gradient summed over each row x 1000", 1000 * g.sum(1), rows, 6e-3, 0)
    assert g.any(), f"{label}: the gradient must not vanish"
    if on_policy is not None:
        value, _, _ = run(name, Worked.old_logp, Worked.old_logp, Worked.mask, Worked.rewards, 4,
                          entropy=Worked.entropy, ref_logp=Worked.ref_logp, **options)
        check(f"{label}: loss of the worked batch with logp = old_logp", value, on_policy, 6e-7, 0)


def test_worked_batch_by_token():
    """Row 3 (A = -.999998, three tokens, 1/24 each): ratios e^.1, e^-.1, e^.3, so 46.05, 37.70, 56.24 thousandths."""
    check("grpo: gradient of the tokens of row 3 x 1000", 1000 * worked("grpo")[1][2], [46.05, 37.70, 56.24], 6e-3, 0)


def test_dapo_is_one_mean_over_all_tokens():
    """Rows 1-4 and 5-8 apart give two means, whose mean .030997 is not the loss .019069: one denominator for all."""
    halves = [run("dapo", Worked.logp[part], Worked.old_logp[part], Worked.mask[part], Worked.rewards[part],
                  4) for part in
              (slice(0, 4), slice(4, 8))]
    whole, g, _ = worked("dapo")
    check("dapo: mean of the losses of the two halves", sum(h[0] for h in halves) / 2, .030997, 6e-7)
    check("dapo: the halves weighted by their tokens, 8 and 9 of 17", (8 * halves[0][0] + 9 * halves[1][0]) / 17, whole)
    check("dapo: gradients of the halves, rescaled to the whole",
          torch.cat([halves[0][1] * 8 / 17, halves[1][1] * 9 / 17]), g)


def test_entropy_gradient():
    """d loss / d entropy = -entropy_coef / (n_seq len_i): row 1 (one token) -1e-3/8 = -.000125, row 3 -1e-3/24 each."""
    leaf = Worked.entropy.clone().requires_grad_()
    loss, _ = L.entropy(Worked.logp, Worked.old_logp, Worked.mask, Worked.rewards, 4, entropy=leaf, entropy_coef=1e-3)
    assert loss.requires_grad, "entropy: no gradient reaches the entropy; it must not be detached"
    g, = torch.autograd.grad(loss, leaf)
    expected = torch.where(Worked.mask.bool(), -1e-3 / (8 * Worked.lengths[:, None]), 0)
    check("entropy: gradient with respect to the entropies", g, expected, 1e-9,
          bugs={"a bonus with the wrong sign": (-expected).tolist(), "token_mean": (-1e-3 / 17 * Worked.mask).tolist()})


@pytest.mark.parametrize("name", [n for n in ALL if n != "entropy"])
def test_entropy_is_not_optimised_elsewhere(name):
    """Only `entropy` uses the entropy; elsewhere it is a number in stats."""
    leaf = Worked.entropy.clone().requires_grad_()
    logp = Worked.logp.clone().requires_grad_()
    loss, stats = getattr(L, name)(logp, Worked.old_logp, Worked.mask, Worked.rewards, 4, entropy=leaf, **ALL[name])
    g, = torch.autograd.grad(loss, leaf, allow_unused=True)
    assert g is None or not g.any(), f"{name} must not optimise the entropy"
    check(f"{name}: stats['entropy'], mean over tokens", stats["entropy"], (8 * 1.2 + 9 * .4) / 17, 1e-6)


def test_worked_batch_with_a_format_reward():
    """Row 8 earns 0.1 for its format and is WRONG: A = -.423606 (r > 0 would make it -.393606)."""
    rewards, options = Worked.rewards.clone(), dict(DS, agg="seq_mean")
    rewards[7] = 0.1
    value, _, _ = worked("diffsmooth", rewards=rewards, **options)
    check("diffsmooth: loss with a format reward of .1 in row 8", value, -.026130, 6e-7, 0,
          {"correct as r > 0": -.029880})
    a = advantages("diffsmooth", rewards, 4, Worked.old_logp, Worked.mask, **options)
    check("diffsmooth: advantage of row 8 with a format reward of .1", a[7], -.423606, 6e-7,
          bugs={"correct as r > 0": -.393606})


def test_diffsmooth_advantages_of_the_worked_batch():
    """Row 1: .999998 - .03 * (-.5) = 1.014998; row 8: -.577349 + .01 * (-.75) = -.584849."""
    a = advantages("diffsmooth", Worked.rewards, 4, Worked.old_logp, Worked.mask, **DS, agg="seq_mean")
    check("diffsmooth: advantages of the worked batch", a,
          [1.014998, 1.059998, -1.022498, -1.039998, 1.867047, -.587349, -.587349, -.584849], 6e-7)


@pytest.mark.parametrize("name", CORRECT_IS_ONE)
def test_correct_means_a_reward_of_one(name):
    """A format reward of .1 is a wrong answer: where only right or wrong matters it must weigh like 0."""
    plain, shaped = [1, 1, 0, 0, 0], [1, 1, .1, 0, 0]
    old = column([-1, -2, -3, -2, -4])
    a = advantages(name, shaped, 5, old, **ALL[name])
    if name in ("passk", "pkpo", "w_reinforce", "rft"):
        check(f"{name}: a reward of .1 counts as wrong, like 0", a, advantages(name, plain, 5, old, **ALL[name]))
    else:
        expected = oracle_advantages(name, shaped, old[:, 0].tolist(), old[:, 0].tolist(),
                                     dict(DS, tau=.2, focal_gamma=.5))
        check(f"{name}: a reward of .1 counts as wrong in the split by correctness", a, expected)


# ---------------------------------------------------------------------------------- a second implementation: the oracle

def oracle_advantages(name, r, M, S, o):
    """One group in plain Python. r rewards, M mean and S summed old log-probabilities, o options."""
    G, good = len(r), [x == 1 for x in r]
    c, mean = sum(good), sum(r) / len(r)
    std = math.sqrt(sum((x - mean) ** 2 for x in r) / G)
    grpo = [0.0 if max(r) == min(r) else (x - mean) / (std + 1e-6) for x in r]
    subsets = list(itertools.combinations(range(G), o["k"])) if "k" in o else []
    best = lambda members: max([float(good[j]) for j in members], default=0.0)
    if name == "reinforce":
        return [x - o.get("baseline", 0) for x in r]
    if name == "rloo":
        return [x - (sum(r) - x) / (G - 1) for x in r]
    if name == "dr_grpo":
        return [x - mean for x in r]
    if name in ("diffsmooth", "diffsmooth_reward"):
        term = [(-o["gamma_p"] if g else o["gamma_n"]) * x for g, x in zip(good, S if o["reduction"] == "sum" else M)]
        if name == "diffsmooth":
            return [a + t for a, t in zip(grpo, term)]
        r = [x + t for x, t in zip(r, term)]
        return [x - sum(r) / G for x in r]
    if name == "unlikeliness":
        order = sorted(range(G), key=lambda i: M[i])   # Python sorts stably
        return oracle_advantages("grpo",
                                 [x * (1 - o.get("rank_coef", .25) * order.index(i) / G) for i, x in enumerate(r)], M,
                                 S, {})
    if name == "passk":
        R = [best(s) for s in subsets]
        mean = sum(R) / len(R)
        std = math.sqrt(sum((x - mean) ** 2 for x in R) / len(R))
        mine = lambda i: [(x - mean) / (std + 1e-6) for x, s in zip(R, subsets) if i in s]
        return [sum(mine(i)) / len(mine(i)) for i in range(G)]
    if name == "pkpo":
        def s(i):
            others = list(itertools.combinations([j for j in range(G) if j != i], o["k"] - 1))
            with_me = sum(best(x) for x in subsets if i in x) / len(subsets)
            return with_me - o["k"] / G * sum(best(x) for x in others) / len(others)
        return [G * s(i) for i in range(G)]
    if name == "w_reinforce":
        return [o.get("w_pos", .1) if g else -o.get("w_neg", 1) for g in good]
    if name == "maxrl":
        return [(x - mean) / (mean + 1e-6) for x in r]
    if name == "ucpo":
        if c == 0:
            return grpo
        z = sum(math.exp(m) for m, g in zip(M, good) if g)
        rare = [1 / max(math.exp(m) / z, 1e-6) if g else 0 for m, g in zip(M, good)]
        return [a * (1 - o["tau"] + o["tau"] * c * x / sum(rare)) if g else a for a, x, g in zip(grpo, rare, good)]
    if name == "focal":
        return [(1 - c / G) ** o["focal_gamma"] * a for a in grpo]
    return grpo


def oracle(name, o, B=Ragged):
    """Loss and gradient of a whole batch, one token at a time."""
    logp, old, ref, H, r = (x.tolist() for x in (B.logp, B.old_logp, B.ref_logp, B.entropy, B.rewards))
    n, G, beta = B.lengths.tolist(), B.G, o.get("beta", 0)
    rows = range(len(r))
    S = [sum(old[i][:n[i]]) for i in rows]
    M = [S[i] / max(n[i], 1) for i in rows]
    if name in ("reinforce", "rloo"):
        r = [r[i] - beta * sum(old[i][t] - ref[i][t] for t in range(n[i])) for i in rows]
    A = [a for g in range(0, len(r), G) for a in oracle_advantages(name, r[g:g + G], M[g:g + G], S[g:g + G], o)]
    used = [i for i in rows if n[i] > 0 and (name != "rft" or r[i] == 1)]
    agg = o.get("agg", AGGREGATOR.get(name, "seq_mean"))
    loss, g = 0.0, [[0.0] * B.T for _ in rows]
    low, high = 1 - o.get("clip_low", .2), 1 + o.get("clip_high", .2)
    for i in used:
        weight = {"seq_mean": 1 / len(used) / n[i], "token_mean": 1 / sum(n[j] for j in used), "seq_sum": 1 / len(used),
                  "seq_const": 1 / len(used) / o.get("max_len", 1)}[agg]
        s = math.exp(sum(logp[i][t] - old[i][t] for t in range(n[i])) / n[i])
        for t in range(n[i]):
            ratio = s if name == "gspo" else math.exp(logp[i][t] - old[i][t])
            if name in ("sft", "rft"):
                l, slope = -logp[i][t], -1.0
            elif name in ("reinforce", "rloo"):
                l, slope = -A[i] * logp[i][t], -A[i]
            elif name == "cispo":
                w = min(max(ratio, low), high)
                l, slope = -w * A[i] * logp[i][t], -w * A[i]
            else:
                cut = ratio > high if A[i] > 0 else ratio < low
                l = -min(ratio * A[i], min(max(ratio, low), high) * A[i])
                slope = 0.0 if cut else -ratio * A[i]
                if beta:
                    d = logp[i][t] - ref[i][t]
                    l, slope = l + beta * (math.exp(-d) + d - 1), slope + beta * (1 - math.exp(-d))
                if name == "entropy":
                    l -= o["entropy_coef"] * H[i][t]
            loss, g[i][t] = loss + weight * l, slope * weight
    return loss, g


CASES = [(name, options) for name, options in ALL.items() if name not in ("gspo", "dapo", "cispo", "ucpo", "focal")]
CASES += [("dapo", dict(clip_low=.2, clip_high=.28)), ("dapo", dict(clip_low=.1, clip_high=.4)), ("ucpo", dict(tau=.2)),
          ("ucpo", dict(tau=.9, clip_low=.3)), ("focal", dict(focal_gamma=.5)), ("focal", dict(focal_gamma=2.0)),
          ("gspo", dict(clip_low=3e-4, clip_high=4e-4)), ("gspo", dict(clip_low=.1, clip_high=.05)),
          ("cispo", dict(clip_low=1.0, clip_high=4.0)), ("cispo", dict(clip_low=.3, clip_high=.2)),
          ("reinforce", dict(baseline=.4, beta=.2)), ("rloo", dict(beta=.2)),
          ("dr_grpo", dict(max_len=7, clip_low=.3, clip_high=.1)),
          ("unlikeliness", dict(rank_coef=.7)), ("passk", dict(k=1)), ("passk", dict(k=3)), ("passk", dict(k=4)),
          ("pkpo", dict(k=1)), ("pkpo", dict(k=3)), ("pkpo", dict(k=4)), ("w_reinforce", dict(w_pos=1.0, w_neg=.3)),
          ("entropy", dict(entropy_coef=-.2, agg="token_mean"))]
CASES += [(name, dict(gamma_p=.05, gamma_n=-.02, reduction=reduction, agg=agg))
          for name in ("diffsmooth", "diffsmooth_reward") for reduction in ("sum", "mean")
          for agg in ("seq_mean", "token_mean")]
ORACLE_DEFAULTS = {"ucpo": dict(tau=.2), "focal": dict(focal_gamma=.5)}
CASES += [(name, dict(ALL[name], **ORACLE_DEFAULTS.get(name, {}), beta=.3, agg=agg, clip_low=.3, clip_high=.1))
          for name in CLIPPED for agg in ("seq_mean", "token_mean", "seq_sum")]


@pytest.mark.parametrize("name, options", CASES,
                         ids=[f"{n}-{'-'.join(f'{k}={v}' for k, v in o.items())}" for n, o in CASES])
def test_against_the_oracle(name, options):
    """Loss and gradient of the ragged batch, token by token, against plain Python lists and loops."""
    loss, g = oracle(name, options)
    value, gradient, _ = ragged(name, **options)
    check(f"{name} with {options}: loss of the ragged batch", value, loss)
    check(f"{name} with {options}: gradient of the ragged batch, token by token", gradient, g)


# -------------------------------------------------------------- exact expected gradients: every group of a small policy

class Toy:
    """A softmax over V = 5 one-token answers, two of them correct; every group of G = 3 answers with its probability."""
    G, V = 3, 5
    logits = tensor([.3, -.5, .9, 0, -1.2])
    correct = tensor([0, 1, 0, 1, 0])
    ref = tensor([.1, .3, .2, .15, .25])
    groups = torch.tensor(list(itertools.product(range(5), repeat=3)))          # (125, 3)


def expected_gradient(name, **options):
    """Exact expectation over all groups of d loss / d logits, on-policy. (5,)

    One call holds all 125 groups, each row with weight 1/375, so 125 * P(group) turns their sum into an expectation.
    """
    theta = Toy.logits.clone().requires_grad_()
    log_pi = theta.log_softmax(0)
    answers = Toy.groups.flatten()
    chance = log_pi.detach().exp()[Toy.groups].prod(1).repeat_interleave(3)     # (375,)
    logp = log_pi[answers][:, None]
    ones = torch.ones(375, 1, dtype=F64)
    old = logp.detach()
    entropy = -(log_pi.exp() * log_pi).sum() * ones
    leaf, H = old.clone().requires_grad_(), entropy.detach().requires_grad_()
    loss, _ = getattr(L, name)(leaf, old, ones, Toy.correct[answers], 3, entropy=H,
                               ref_logp=Toy.ref.log()[answers][:, None], **options)
    g, h = torch.autograd.grad(loss, [leaf, H], allow_unused=True)
    weight = 125 * chance[:, None]
    total = (logp * g * weight).sum() + (0 if h is None else (entropy * h * weight).sum())
    return torch.autograd.grad(total, theta)[0]


def exact_gradient(objective):
    """d objective(pi) / d logits, pi the softmax policy."""
    theta = Toy.logits.clone().requires_grad_()
    return torch.autograd.grad(objective(theta.softmax(0)), theta)[0]


def success(pi):
    return (pi * Toy.correct).sum()


def pass_at(k):
    return lambda pi: 1 - (1 - success(pi)) ** k


def kl_to_ref(pi):
    return (pi * (pi / Toy.ref).log()).sum()


EXACT = {  # label: (loss, options, what it climbs)
    "reinforce climbs p": ("reinforce", {}, success),
    "reinforce with a baseline climbs p": ("reinforce", dict(baseline=.4), success),
    "reinforce with beta climbs p - beta KL(pi, ref)": ("reinforce", dict(beta=.3),
                                                        lambda pi: success(pi) - .3 * kl_to_ref(pi)),
    "rloo climbs p": ("rloo", {}, success),
    "rloo with beta climbs p - beta KL(pi, ref)": ("rloo", dict(beta=.3), lambda pi: success(pi) - .3 * kl_to_ref(pi)),
    "dr_grpo climbs (G-1)/G p / max_len": ("dr_grpo", dict(max_len=4), lambda pi: success(pi) * 2 / 3 / 4),
    "w_reinforce climbs (w_pos + w_neg) p": ("w_reinforce", {}, lambda pi: 1.1 * success(pi)),
    "pkpo, k = 1, climbs p": ("pkpo", dict(k=1), success),
    "pkpo, k = 2, climbs pass@2": ("pkpo", dict(k=2), pass_at(2)),
    "pkpo, k = 3, climbs pass@3": ("pkpo", dict(k=3), pass_at(3)),
    "maxrl climbs pass@1 + pass@2 / 2": ("maxrl", {}, lambda pi: pass_at(1)(pi) + pass_at(2)(pi) / 2),
    "diffsmooth_reward with gammas 0 climbs (G-1)/G p": ("diffsmooth_reward",
                                                         dict(DS, gamma_p=0.0, gamma_n=0.0, agg="token_mean"),
                                                       lambda pi: success(pi) * 2 / 3),
}


@pytest.mark.parametrize("label", EXACT)
def test_expected_gradient(label):
    """The average over every possible group of 3 answers is minus the gradient of the objective that the paper names."""
    name, options, objective = EXACT[label]
    gradient = exact_gradient(objective)
    check(label, expected_gradient(name, **options), -gradient, 2e-6, bugs={"the wrong sign": gradient.tolist()})


def smoothing_objective(gamma_p, gamma_n):
    """gamma_p (H_C + p) + gamma_n (p - H_W), H_C = -sum of pi log pi over the correct answers, H_W over the wrong ones."""
    def objective(pi):
        H_C, H_W = -(pi * pi.log() * Toy.correct).sum(), -(pi * pi.log() * (1 - Toy.correct)).sum()
        return gamma_p * (H_C + success(pi)) + gamma_n * (success(pi) - H_W)
    return objective


@pytest.mark.parametrize("gamma_p, gamma_n", [(.3, 0), (0, .2), (.3, .2), (-.1, .4)])
def test_expected_gradient_of_the_smoothing_term(gamma_p, gamma_n):
    """What diffsmooth adds to GRPO: entropy among correct answers up, among wrong ones down, and p up by both."""
    options = dict(reduction="sum", gamma_p=float(gamma_p), gamma_n=float(gamma_n), agg="seq_mean")
    added = expected_gradient("diffsmooth", **options) - expected_gradient("grpo")
    gradient = exact_gradient(smoothing_objective(gamma_p, gamma_n))
    check(f"diffsmooth minus grpo, gammas {gamma_p}, {gamma_n}: expected gradient", added, -gradient,
          bugs={"both signs wrong": gradient.tolist(),
                "gammas swapped": (-exact_gradient(smoothing_objective(gamma_n, gamma_p))).tolist()})


@pytest.mark.parametrize("gamma_p, gamma_n", [(.3, 0), (0, .2), (.3, .2)])
def test_expected_gradient_of_the_smoothed_reward(gamma_p, gamma_n):
    """The smoothed reward, centred: the answer's own share in the mean costs a factor (G-1)/G, as in dr_grpo."""
    options = dict(reduction="sum", gamma_p=float(gamma_p), gamma_n=float(gamma_n), agg="token_mean")
    gradient = exact_gradient(lambda pi: 2 / 3 * (success(pi) + smoothing_objective(gamma_p, gamma_n)(pi)))
    check(f"diffsmooth_reward, gammas {gamma_p}, {gamma_n}: expected gradient",
          expected_gradient("diffsmooth_reward", **options), -gradient)


@pytest.mark.parametrize("coef", [.2, -.1])
def test_expected_gradient_of_the_entropy_term(coef):
    """For one-token answers the loss `entropy` and the reward form diffsmooth(a, -a) both climb a H."""
    gradient = exact_gradient(lambda pi: -coef * (pi * pi.log()).sum())
    grpo = expected_gradient("grpo")
    check(f"entropy, coefficient {coef}: it climbs {coef} H", expected_gradient("entropy", entropy_coef=coef) - grpo,
          -gradient, bugs={"the wrong sign": gradient.tolist(), "the entropy has no gradient": [0.0] * 5})
    ds = expected_gradient("diffsmooth", reduction="sum", gamma_p=coef, gamma_n=-coef, agg="seq_mean")
    check(f"diffsmooth({coef}, {-coef}) is an entropy bonus", ds - grpo, -gradient)


def test_expected_gradient_of_the_kl_term():
    """beta k3 as a loss, on-policy: the gradient of beta KL(ref, pi), which is beta (pi - ref) in the logits."""
    added = expected_gradient("grpo", beta=.3) - expected_gradient("grpo")
    pi = Toy.logits.softmax(0)
    check("grpo, beta .3: expected gradient of the KL term", added, .3 * (pi - Toy.ref),
          bugs={"the wrong sign": (-.3 * (pi - Toy.ref)).tolist(), "k1 (zero on average)": [0.0] * 5,
                "k2, the gradient of KL(pi, ref)": exact_gradient(lambda p: .3 * kl_to_ref(p)).tolist()})
    step = (Toy.logits - .5 * added).softmax(0)
    assert kl_to_ref(step) < kl_to_ref(pi), "a step along the KL term must lower the KL to the reference"


@pytest.mark.parametrize("name", RL)
def test_one_step_raises_the_chance_of_a_correct_answer(name):
    """One step down the expected gradient raises p: nothing has the wrong sign."""
    options = settings(name)
    step = (Toy.logits - .1 * expected_gradient(name, **options)).softmax(0)
    assert success(step) > success(Toy.logits.softmax(0)), \
        f"{name}: a step downhill LOWERS the chance of a correct answer; check the sign"


@pytest.mark.parametrize("name", ALL)
def test_sign_of_the_gradient(name):
    """A correct token is pushed up (d loss / d logp < 0); a wrong one is not (>= 0), except by sft, which cannot tell."""
    options = settings(name, entropy=torch.zeros(6, 1, dtype=F64))
    old = column([-1, -2, -3, -1, -2, -3])
    _, g, _ = run(name, old, old, torch.ones(6, 1), tensor([1, 0, 0, 0, 1, 0]), 3, **options)
    assert (g[[0, 4]] < 0).all(), \
        f"{name}: the gradient of a correct answer must be negative, so that descent raises it"
    if name != "sft":
        assert (g[[1, 2, 3, 5]] >= 0).all(), f"{name}: the gradient of a wrong answer must not be negative"


BERNOULLI = [("maxrl", {}, .1, .469533, 5e-6, {"all-wrong groups at A = -1": .512580}),
             ("rft", {}, .1, .512580, 6e-7, {}),
             ("pkpo", dict(k=4), .05, .1629, 6e-5, {"one more leave-one-out baseline": .1666}),
             ("pkpo", dict(k=4), .2, .3277, 6e-5, {"one more leave-one-out baseline": .3628}),
             ("pkpo", dict(k=4), .5, .1250, 6e-5, {"one more leave-one-out baseline": .1786})]


@pytest.mark.parametrize("name, options, p, slope, atol, bugs", BERNOULLI,
                         ids=[f"{row[0]}-{row[2]}" for row in BERNOULLI])
def test_expected_gradient_in_a_bernoulli_logit(name, options, p, slope, atol, bugs):
    """G = 8 answers, each right with chance p. In the logit of p a right answer's slope is q = 1 - p, a wrong one's -p.

    maxrl: q(1 - q^7) = .9 * .5217 = .4695. rft, one group a batch, divides by its kept rows: q(1 - q^8) = .512580.
    pkpo, k = 4, p = .5: k q^(k-1) pq = 4 * .125 * .25 = .125; with one more leave-one-out baseline .1786.
    """
    q, ascent = 1 - p, 0.0
    for c in range(9):
        old = torch.full((8, 1), -1.0, dtype=F64)
        _, g, _ = run(name, old, old, torch.ones(8, 1), tensor([1] * c + [0] * (8 - c)), 8, **options)
        ascent += math.comb(8, c) * p ** c * q ** (8 - c) * -(g[:c].sum() * q - g[c:].sum() * p).item()
    check(f"{name}, Bernoulli({p}), G 8: expected ascent in the logit", ascent, slope, atol, 0, bugs)


# ---------------------------------------------------------------------------------------------------------- identities

SAME = [("passk", dict(k=1), "grpo", {}), ("focal", dict(focal_gamma=0.0), "grpo", {}),
        ("ucpo", dict(tau=0.0), "grpo", {}),
        ("diffsmooth", dict(reduction="sum", gamma_p=0.0, gamma_n=0.0, agg="seq_mean"), "grpo", {}),
        ("diffsmooth", dict(reduction="mean", gamma_p=0.0, gamma_n=0.0, agg="token_mean"), "grpo",
         dict(agg="token_mean")),
        ("entropy", dict(entropy_coef=0.0), "grpo", {}), ("unlikeliness", dict(rank_coef=0.0), "grpo", {}),
        ("dapo", {}, "grpo", dict(agg="token_mean", clip_high=.28))]


@pytest.mark.parametrize("name, options, other, other_options", SAME, ids=[f"{a}-{b}" for a, _, b, _ in SAME])
def test_same_as(name, options, other, other_options):
    """With its own idea switched off, each variant is GRPO, in loss and gradient (0/1 rewards)."""
    rewards = (Ragged.rewards == 1).to(F64)
    loss, g, _ = ragged(name, rewards=rewards, **options)
    expected, g_expected, _ = ragged(other, rewards=rewards, **other_options)
    check(f"{name} with {options} is {other}: loss", loss, expected)
    check(f"{name} with {options} is {other}: gradient", g, g_expected)


RIGHT_OR_WRONG = (Ragged.rewards == 1).to(F64)
A_SAME = [("rloo", {}, 4 / 3, "dr_grpo", dict(max_len=1)), ("pkpo", dict(k=1), 1, "reinforce", {}),
          ("w_reinforce", dict(w_pos=.3, w_neg=.9), 1.2, "reinforce", dict(baseline=.75)),
          ("diffsmooth_reward", dict(DS, gamma_p=0.0, gamma_n=0.0, agg="token_mean"), 1, "dr_grpo", dict(max_len=1))]


@pytest.mark.parametrize("name, options, factor, other, other_options", A_SAME, ids=[f"{a[0]}-{a[3]}" for a in A_SAME])
def test_advantages_same_as(name, options, factor, other, other_options):
    """rloo = G/(G-1) dr_grpo; pkpo(k=1) has A = r; w_reinforce is reinforce with the baseline w_neg/(w_pos + w_neg)."""
    check(f"{name} with {options}: advantages are {factor:.4g} times those of {other} with {other_options}",
          advantages(name, RIGHT_OR_WRONG, 4, **options),
          factor * advantages(other, RIGHT_OR_WRONG, 4, **other_options))


def test_rft_of_correct_answers_only_is_sft():
    for which, what in enumerate(("loss", "gradient")):
        check(f"rft with all rewards 1 is sft: {what}", ragged("rft", rewards=torch.ones(20, dtype=F64))[which],
              ragged("sft")[which])


@pytest.mark.parametrize("name, other", [("gspo", "grpo"), ("cispo", "dapo")])
def test_same_gradient_on_policy(name, other):
    """At ratio 1 the gradient is -A times the weight of a token, so gspo = grpo and cispo = dapo."""
    on = lambda name: run(name, Ragged.old_logp, Ragged.old_logp, Ragged.mask, Ragged.rewards, Ragged.G)[1]
    check(f"on-policy, {name} has the gradient of {other}", on(name), on(other))


@pytest.mark.parametrize("name", RL)
def test_gradient_on_policy(name):
    """At ratio 1 d loss / d logp = -A_i times the weight of a token in the aggregate, and every clip is inert."""
    B, options = Ragged, dict(ALL[name], **ORACLE_DEFAULTS.get(name, {}))
    _, g, stats = run(name, B.old_logp, B.old_logp, B.mask, B.rewards, B.G, entropy=B.entropy, **options)
    S = torch.where(B.mask.bool(), B.old_logp, 0).sum(1)
    M = (S / B.lengths.clamp(min=1)).view(-1, B.G).tolist()
    groups = zip(B.rewards.view(-1, B.G).tolist(), M, S.view(-1, B.G).tolist())
    A = tensor([oracle_advantages(name, r, m, s, options) for r, m, s in groups]).flatten()
    lengths = B.lengths.clamp(min=1).to(F64)
    weight = {"seq_mean": 1 / 19 / lengths, "token_mean": 0 * lengths + 1 / B.lengths.sum(),
              "seq_sum": 0 * lengths + 1 / 19,
              "seq_const": 0 * lengths + 1 / 19 / options.get("max_len", 1)}[options.get("agg",
                                                                                         AGGREGATOR.get(name,
                                                                                                        "seq_mean"))]
    check(f"on-policy, {name}: gradient is -A times the weight of a token (19 rows have tokens)", g,
          -(A * weight)[:, None] * B.mask)
    check(f"on-policy, {name}: stats ratio_max, clip_frac, kl_old",
          [stats[key] for key in ("ratio_max", "clip_frac", "kl_old")], [1, 0, 0])


def test_loss_on_policy_is_zero_and_still_teaches():
    """seq_mean with A summing to 0: the loss is 0, the gradient is not. By token_mean with unequal lengths it is not 0."""
    loss, g, _ = run("grpo", Worked.old_logp, Worked.old_logp, Worked.mask, Worked.rewards, 4)
    check("on-policy, grpo's loss by seq_mean", loss, 0)
    assert g.any(), "on-policy, a loss of 0 still has a gradient"
    loss, _, _ = run("grpo", Worked.old_logp, Worked.old_logp, Worked.mask, Worked.rewards, 4, agg="token_mean")
    assert abs(loss) > 1e-3, "on-policy, the loss by token_mean with unequal lengths is not 0"


@pytest.mark.parametrize("name", CLIPPED)
def test_aggregators_agree_for_equal_lengths(name):
    """All answers of length L: seq_mean = token_mean = seq_sum / L."""
    R, options = Ragged, dict(ALL[name], entropy=torch.ones(20, 5, dtype=F64))
    args = (R.logp.nan_to_num(-1)[:, :5], R.old_logp.nan_to_num(-1)[:, :5], torch.ones(20, 5), R.rewards, 4)
    seq_mean, token_mean, seq_sum = (run(name, *args, **dict(options, agg=agg))[0] for agg in ("seq_mean", "token_mean",
                                                                                               "seq_sum"))
    check(f"{name}: seq_mean and token_mean for equal lengths", seq_mean, token_mean)
    check(f"{name}: seq_mean and seq_sum / L for equal lengths", seq_mean, seq_sum / 5)


CENTRED = ["grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "maxrl", "passk", "unlikeliness", "ucpo", "focal",
           "diffsmooth_reward"]


@pytest.mark.parametrize("name", CENTRED)
def test_advantages_sum_to_zero_in_each_group(name):
    options = settings(name)
    old = Ragged.old_logp[:, :1].nan_to_num(-1)
    a = advantages(name, Ragged.rewards, 4, old, **options).view(-1, 4)
    check(f"{name}: sum of the advantages of each group", a.sum(1), [0] * 5, 1e-6)


@pytest.mark.parametrize("name", ["reinforce", "pkpo", "w_reinforce", "diffsmooth"])
def test_advantages_do_not_sum_to_zero(name):
    a = advantages(name, [1, 1, 0, 0, 0], 5, column([-1, -2, -3, -4, -5]), **ALL[name])
    assert abs(a.sum()) > 1e-3, f"{name}: its advantages are not centred; was a group mean subtracted?"


# -------------------------------------------------------------------------------------------------------- invariances

@every
def test_extra_padding_changes_nothing(name):
    """Three more columns under mask 0: the padded width may appear nowhere, not even in dr_grpo's constant."""
    R, options = Ragged, dict(ALL[name])
    pad = lambda x, value: torch.cat([x, torch.full((20, 3), value, dtype=F64)], dim=1)
    loss, g, _ = ragged(name, **options)
    wider, g_wider, _ = run(name, pad(R.logp, NAN), pad(R.old_logp, NAN), pad(R.mask, 0.0), R.rewards, R.G,
                            entropy=pad(R.entropy, NAN), ref_logp=pad(R.ref_logp, NAN), **options)
    check(f"{name}: loss with three more columns of padding", wider, loss)
    check(f"{name}: gradient with three more columns of padding", g_wider[:, :7], g)


def permuted(name, order):
    R = Ragged
    return run(name, R.logp[order], R.old_logp[order], R.mask[order], R.rewards[order], R.G, entropy=R.entropy[order],
               ref_logp=R.ref_logp[order], **ALL[name])


@every
def test_order_of_groups_and_rows_does_not_matter(name):
    """Permuting whole groups, or rows inside a group, permutes the gradient and nothing else."""
    loss, g, _ = ragged(name, **ALL[name])
    generator = torch.Generator().manual_seed(5)
    groups = torch.randperm(5, generator=generator)
    inside = torch.stack([torch.randperm(4, generator=generator) for _ in range(5)])
    for what, order in (("groups", (groups[:, None] * 4 + torch.arange(4)).flatten()),
                        ("rows inside their groups", (torch.arange(5)[:, None] * 4 + inside).flatten())):
        value, g_permuted, _ = permuted(name, order)
        check(f"{name}: loss after permuting {what} (groups are neighbouring rows, not every G-th)", value, loss)
        check(f"{name}: gradient after permuting {what}", g_permuted, g[order])


@pytest.mark.parametrize("name", [n for n in RL if n not in ("reinforce", "w_reinforce")])
def test_swapping_rows_across_groups_matters(name):
    """Rows 0 (correct, of a mixed group) and 12 (wrong, of an all-wrong group) change places: their groups change."""
    order = torch.arange(20)
    order[[0, 12]] = torch.tensor([12, 0])
    _, g, _ = ragged(name, **ALL[name])
    _, g_swapped, _ = permuted(name, order)
    assert (g_swapped - g[order]).abs().max() > 1e-4, \
        f"{name}: advantages must come from the own group, but another group made no difference"


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "entropy", "maxrl"])
def test_other_groups_rewards_do_not_matter(name):
    """Halving the rewards of group 2 leaves group 1's gradient alone: mean and std are the group's, not the batch's."""
    rewards = Ragged.rewards.clone()
    _, g, _ = ragged(name, **ALL[name])
    rewards[4:8] *= .5
    _, other, _ = ragged(name, rewards=rewards, **ALL[name])
    check(f"{name}: gradient of group 1 after halving group 2's rewards", other[:4], g[:4])


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "grpo", "dapo", "gspo", "cispo", "entropy"])
def test_a_constant_added_to_a_groups_rewards_changes_nothing(name):
    shift = tensor([.5, -2, 3, 0, 1]).repeat_interleave(4)
    _, g, _ = ragged(name, **ALL[name])
    _, shifted, _ = ragged(name, rewards=Ragged.rewards + shift, **ALL[name])
    check(f"{name}: gradient after adding a constant to each group's rewards", shifted, g)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
def test_the_scale_of_the_rewards_does_not_matter(name):
    """Rewards x 10 change GRPO's advantages only through eps = 1e-6 (relative 1e-6 or so)."""
    check(f"{name}: gradient after multiplying rewards by 10", ragged(name, rewards=10 * Ragged.rewards)[1],
          ragged(name)[1], 1e-6, 3e-5)


@pytest.mark.parametrize("name", ["dr_grpo", "rloo"])
def test_without_std_the_scale_of_the_rewards_stays(name):
    check(f"{name}: gradient after multiplying rewards by 10 (there is no std to cancel it)",
          ragged(name, rewards=10 * Ragged.rewards, **ALL[name])[1], 10 * ragged(name, **ALL[name])[1])


@pytest.mark.parametrize("name", ["grpo", "entropy", "dapo", "diffsmooth"])
def test_any_chunking_gives_the_same_update(name):
    """The chain rule cut at logp: d loss / d logp of the whole batch, pushed through a softmax in chunks of 1, 3, 20 rows.

    The gradient of the (B, T) entropies goes the same way.
    """
    R, V = Ragged, 6
    logits = torch.randn(20, 7, V, dtype=F64, generator=torch.Generator().manual_seed(6))
    ids = torch.randint(V, (20, 7), generator=torch.Generator().manual_seed(7))

    def score(weight, rows):
        log_pi = (logits[rows] * weight).log_softmax(-1)
        return log_pi.gather(-1, ids[rows][..., None])[..., 0], -(log_pi.exp() * log_pi).sum(-1)
    weight = torch.ones(V, dtype=F64, requires_grad=True)
    old = score(weight.detach(), slice(None))[0] - .1
    logp, entropy = score(weight, slice(None))
    loss, _ = getattr(L, name)(logp, old, R.mask, R.rewards, R.G, entropy=entropy, **ALL[name])
    plain, = torch.autograd.grad(loss, weight)
    assert plain.any()
    leaves = [x.detach().requires_grad_() for x in score(weight, slice(None))]
    loss, _ = getattr(L, name)(leaves[0], old, R.mask, R.rewards, R.G, entropy=leaves[1], **ALL[name])
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]
    for size in (1, 3, 20):
        total = torch.zeros(V, dtype=F64)
        for rows in torch.arange(20).split(size):
            total += torch.autograd.grad(sum((x * g[rows]).sum() for x, g in zip(score(weight, rows), gradients)),
                                         weight)[0]
        check(f"{name}: gradient of the weights in chunks of {size} rows", total, plain)


# --------------------------------------------------------------------------------------------------------------- stats

def test_stats_of_the_worked_batch():
    """Rows 1 (A > 0, ratio 1.35), 4 (A < 0, .74), 7 (A < 0, .67) are cut: 1 + 2 + 1 of 17 tokens, not |ratio - 1| > .2.

    ratio_max e^.4; mean |A| (4 * .999998 + 1.732047 + 3 * .577349) / 8; kl_old is the mean of ratio - 1 - log ratio.
    """
    _, _, stats = worked("grpo")
    check("grpo: stats['clip_frac']", stats["clip_frac"], 4 / 17, 1e-6,
          bugs={"|ratio - 1| > .2, which over-counts": 7 / 17, "a mean over padding too": 4 / 24})
    check("grpo: stats['ratio_max']", stats["ratio_max"], math.exp(.4), 1e-6)
    check("grpo: stats['adv_abs']", stats["adv_abs"], (4 * .999998 + 1.732047 + 3 * .577349) / 8, 1e-6)
    d = (Worked.logp - Worked.old_logp)[Worked.mask.bool()]
    check("grpo: stats['kl_old'], k3 of tokens drawn from the old policy", stats["kl_old"], (d.exp() - 1 - d).mean(),
          1e-6, bugs={"the other direction": (torch.exp(-d) - 1 + d).mean().item()})
    d = (Worked.logp - Worked.ref_logp)[Worked.mask.bool()]
    check("grpo: stats['kl'], k3 to the reference", stats["kl"], (torch.exp(-d) - 1 + d).mean(), 1e-6)


def test_clip_frac_of_gspo():
    """A cut answer has no gradient on any token: rows 1, 4, 5 and 7, so 1 + 2 + 3 + 1 of 17."""
    check("gspo: stats['clip_frac']", worked("gspo")[2]["clip_frac"], 7 / 17, 1e-6)
