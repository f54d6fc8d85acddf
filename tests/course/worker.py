"""The process that runs a submission's code. It computes what it is asked, and judges nothing.

grade.py starts it, in an empty place, and gives it sources and questions; values go back, as JSON.
No right answer is ever in this process: what is right is computed by the judge, which imports
nothing of a submission. `drivers` below are the questions, and the judge asks the reference the
very same ones in its own process.

First everything slow is imported once (`main`); then every part of a card is a fork of that.
"""

import base64
import contextlib
import importlib
import importlib.abc
import importlib.util
import json
import linecache
import os
import signal
import socket
import struct
import sys
from fractions import Fraction

import torch

from bodies import give

MEMORY, CPU_SECONDS = 12 << 30, 300


# ------------------------------------------------------------------------------- values as JSON


def pack(x):
    """A value as what json can write: numbers, text, lists, tensors bit for bit."""
    if x is None or type(x) in (bool, int, float, str):
        return x
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().contiguous()
        raw = bytes(x.flatten().view(torch.uint8).numpy()) if x.numel() else b""
        kind = str(x.dtype).removeprefix("torch.")
        return {
            "~": "tensor", "dtype": kind, "shape": list(x.shape),
            "bytes": base64.b64encode(raw).decode(),
        }
    if isinstance(x, Fraction):
        return {"~": "fraction", "of": [x.numerator, x.denominator]}
    if isinstance(x, (list, tuple)):
        return {"~": type(x).__name__, "of": [pack(y) for y in x]}
    if isinstance(x, dict):
        return {"~": "dict", "of": [[pack(key), pack(value)] for key, value in x.items()]}
    if isinstance(x, (int, float, str)):  # of a class of its own
        return pack(next(kind(x) for kind in (int, float, str) if isinstance(x, kind)))
    if type(x).__module__ == "numpy" and getattr(x, "ndim", 1) == 0:
        return pack(x.item())
    return {"~": "other", "is": f"{type(x).__name__}: {x!r:.100}"}


class Other(str):
    """Something that is neither number nor text, tensor, list or dict: what it looks like."""


def unpack(x):
    """The value again; whatever else came is an `Other`. No code of the sender is run."""
    if not isinstance(x, dict):
        return x
    if x["~"] == "tensor":
        dtype = getattr(torch, x["dtype"])
        raw = bytearray(base64.b64decode(x["bytes"]))
        flat = torch.frombuffer(raw, dtype=torch.uint8).view(dtype) if raw else torch.empty(0)
        return flat.to(dtype).reshape(x["shape"])
    if x["~"] == "fraction":
        return Fraction(*x["of"])
    if x["~"] == "dict":
        return {unpack(key): unpack(value) for key, value in x["of"]}
    if x["~"] == "other":
        return Other(x["is"])
    values = [unpack(y) for y in x["of"]]
    return values if x["~"] == "list" else tuple(values)


def told(error):
    """An exception as a value: its kind, what it says, and where in the submission."""
    where, trace = "", error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename in SOURCES:
            where = f" ({code.co_filename}, line {trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename in SOURCES:
        where = f" ({error.filename}, line {error.lineno})"
    says = error.msg if isinstance(error, SyntaxError) else str(error)
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {"error": kinds, "says": f"{kinds[0]}: {' '.join(says.split())[:300]}{where}"}


def attempt(call, *args, **options):
    """What a call gives, or how it fails."""
    try:
        return call(*args, **options)
    except Exception as error:
        return told(error)


# ------------------------------------------------------------------- a submission as modules

SOURCES = {}  # file name -> source, bytes: the modules that are there


class Submission(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules from sources in memory; then some functions are replaced, see bodies.py."""

    def __init__(self, sources, bodies, others):
        self.bodies, self.others = bodies, others
        SOURCES.update(sources)

    def find_spec(self, name, path=None, target=None):
        if f"{name}.py" in SOURCES:
            return importlib.util.spec_from_loader(name, self)

    def exec_module(self, module):
        file = f"{module.__name__}.py"
        code = compile(SOURCES[file], file, "exec", dont_inherit=True)
        module.__file__ = file
        text = importlib.util.decode_source(SOURCES[file])
        linecache.cache[file] = len(text), None, text.splitlines(True), file
        exec(code, module.__dict__)
        give(module, self.bodies.get(file, {}))
        answer = sys.modules.get("answer")  # a file by itself calls the reference's, too
        for name in self.others if answer is not None else ():
            if hasattr(answer, name) and hasattr(module, name):
                setattr(answer, name, getattr(module, name))


class Modules:
    """`m.losses` imports losses: the submission's here, the reference's in the judge."""

    def __getattr__(self, name):
        return importlib.import_module(name)


# --------------------------------------------------------------------------------- the questions

drivers = {}


def driver(function):
    drivers[function.__name__] = function
    return function


def leaves(*tensors):
    return [x if x is None else x.clone().requires_grad_() for x in tensors]


def slopes(value, of):
    """Gradients of a scalar; 0 where there is none."""
    found = torch.autograd.grad(value, of, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(of, found)]


@driver
def many(m, file, name, calls):
    """Many calls of one function: [(arguments, options)] -> what each gives."""
    function = getattr(getattr(m, file), name)
    return [attempt(function, *args, **options) for args, options in calls]


@driver
def advantages(m, rewards, group_size):
    """group_advantages of several rewards, and whether these were left as they were."""
    found = []
    for r in rewards:
        mine = r.clone()
        found.append((attempt(m.losses.group_advantages, mine, group_size), mine))
    return found


@driver
def loss(
    m, name, logp, old_logp, mask, rewards, group_size, options, entropy=None, ref_logp=None,
    stats=False,
):
    """One loss: its value, its gradient in every tensor, and what it left in its arguments.
    old_logp None: logp itself, as before the first update."""
    leaf, old, H, ref = leaves(logp, old_logp, entropy, ref_logp)
    mask, r = mask.clone(), rewards.clone()
    out = getattr(m.losses, name)(
        leaf, leaf if old is None else old, mask, r, group_size, entropy=H, ref_logp=ref, **options
    )
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        return {"shape": f"{name} must return a pair (loss, stats), stats a dict"}
    value, numbers = out
    if not (isinstance(value, torch.Tensor) and value.dim() == 0 and value.requires_grad):
        return {"shape": f"{name} must return a loss that is a 0-dim tensor with gradient"}
    of = {"logp": leaf, "old_logp": old, "entropy": H, "ref_logp": ref}
    of = {key: x for key, x in of.items() if x is not None}
    found = {"loss": value}
    for key, slope in zip(of, slopes(value, [*of.values()])):
        found[f"gradient in {key}"] = slope
    if stats:
        found |= {
            "stats": numbers,
            "arguments": [leaf, mask, r, *(x for x in (old, ref) if x is not None)],
        }
    return found


@driver
def turned(m, x, cos, sin, weight):
    (x,) = leaves(x)
    out = m.policy.rotate(x, cos, sin)
    return {"rotate": out, "gradient in x": slopes((out * weight.to(out.dtype)).sum(), [x])[0]}


@driver
def seen(m, cases):
    return [
        attempt(m.policy.allowed, mask, T, S, window, torch.device("cpu"))
        for mask, T, S, window in cases
    ]


@driver
def cached(m, steps, weights, rows):
    """update(layer, k, v) for each of the steps: what it returned, read when all are done; the
    gradient of a weighted sum of all that; the cache's own lists; a copy of some rows."""
    steps = [(layer, *leaves(k, v)) for layer, k, v in steps]
    cache, out = m.policy.KVCache(), []
    for layer, k, v in steps:
        out.append(cache.update(layer, k, v))
    keys = [k for k, _ in out]
    values = [v for _, v in out]
    total = sum((x * w).sum() for pair, two in zip(out, weights) for x, w in zip(pair, two))
    chosen = m.policy.cache_of_rows(cache, rows)
    return {
        "keys": keys, "values": values, "gradient in k": slopes(total, [k for _, k, _ in steps]),
        "gradient in v": slopes(total, [v for *_, v in steps]), "cache.keys": list(cache.keys),
        "cache.values": list(cache.values), "keys of some rows": list(chosen.keys),
        "values of some rows": list(chosen.values),
    }


SIZES = dict(
    vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, pad_token_id=0,
)
KINDS = {
    "llama": ("LlamaConfig", {}),
    "tied": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "biases": ("LlamaConfig", dict(attention_bias=True)),
    "one key head": ("LlamaConfig", dict(num_key_value_heads=1)),
    "as many key heads": ("LlamaConfig", dict(num_key_value_heads=4)),
    "head of its own size": ("LlamaConfig", dict(head_dim=16)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "window": ("MistralConfig", dict(sliding_window=4)),
    "layers of both kinds": (
        "MinistralConfig",
        dict(head_dim=8, sliding_window=3, layer_types=["full_attention", "sliding_attention"]),
    ),
}


def network(m, kind, seed=0, dtype=torch.float64, **sizes):
    """A policy of that kind with weights that the seed alone decides."""
    import transformers

    name, more = KINDS[kind]
    policy = m.policy.Policy(getattr(transformers, name)(**SIZES | more | sizes))
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    policy.dtype = dtype if dtype == torch.float64 else torch.float32
    return policy.to(dtype)


@driver
def attention(m, kind, x, pieces, masks, weight, with_cache=True, start=0):
    """One layer's attention over x (B, T, D), read piece by piece into a cache."""
    policy = network(m, kind)
    layer, inv_freq = policy.model.layers[0].self_attn, policy.inv_freq.double()
    (x,) = leaves(x)
    cache, parts, S = (m.policy.KVCache() if with_cache else None), [], 0
    for T, attend in zip(pieces, masks):
        angles = torch.arange(start + S, start + S + T)[:, None, None] * inv_freq
        S += T
        parts.append(layer(x[:, S - T : S], (angles.cos(), angles.sin()), attend, 0, cache))
    shapes = [list(part.shape) for part in parts]
    whole = torch.cat(parts, 1)
    of = [x, *layer.parameters()]
    found = slopes((whole * weight).sum(), of)
    return {
        "shapes": shapes, "attention": whole, "gradient in x": found[0],
        "gradient in the weights": found[1:],
    }


@driver
def forward(m, kind, tokens, mask, pieces, weight, rows=None):
    """The whole model on tokens (B, T), piece by piece; after the first piece the cache may be
    copied to `rows`, as training does with a prompt and its answers."""
    policy, parts, S = network(m, kind), [], 0
    cache = m.policy.KVCache() if len(pieces) > 1 else None
    for i, T in enumerate(pieces):
        S += T
        seen_so_far = None if mask is None else mask[:, :S]
        if rows is not None and i == 0:  # prompts are read once
            first = rows.unique_consecutive()
            some = None if mask is None else seen_so_far[[rows.tolist().index(r) for r in first]]
            own = tokens[[rows.tolist().index(r) for r in first], :S]
            out = policy(own, some, cache)[rows]
            cache = m.policy.cache_of_rows(cache, rows)
        else:
            out = policy(tokens[:, S - T : S], seen_so_far, cache)
        parts.append(out)
    whole = torch.cat(parts, 1)
    real = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask.bool()
    found = slopes((whole * weight * real[..., None]).sum(), [*policy.parameters()])
    return {"hidden states": whole[real], "gradient in the weights": found}


@driver
def logprobs(m, hidden, weight, targets, temperature, g, e, frozen="", twice=False):
    """token_logprobs and the gradient of (g logp + e entropy).sum() in both inputs."""
    h, w = hidden.clone(), weight.clone()
    h.requires_grad_("hidden" not in frozen), w.requires_grad_("weight" not in frozen)
    t = targets.clone()
    with torch.no_grad() if frozen == "all" else contextlib.nullcontext():
        logp, entropy = m.policy.token_logprobs(h, w, t, temperature)
    found = {"logp": logp, "entropy": entropy, "arguments": [h, w, t]}
    if frozen == "all":
        return found
    total = 0 if g is None else (logp * g).sum()
    total = total if e is None else total + (entropy * e).sum()
    of = {"hidden": h, "weight": w}
    of = {key: x for key, x in of.items() if x.requires_grad}
    for time in (1, 2) if twice else (1,):
        parts = torch.autograd.grad(total, [*of.values()], retain_graph=twice)
        for key, slope in zip(of, parts):
            found[f"gradient in {key}" + ", second time" * (time == 2)] = slope
    return found


@driver
def large_logprobs(m, N, D, V, temperature, with_gradient, ask=""):
    """The same on inputs too large for their logits to be kept; of the gradients only samples."""
    draw = torch.Generator().manual_seed(0)
    h, w = torch.randn(N, D, generator=draw), torch.randn(V, D, generator=draw)
    t = torch.randint(V, (N,), generator=draw)
    with torch.set_grad_enabled(with_gradient):
        h.requires_grad_(with_gradient), w.requires_grad_(with_gradient)
        logp, entropy = m.policy.token_logprobs(h, w, t, temperature)
    found = {"logp": logp, "entropy": entropy}
    if with_gradient:
        gh, gw = torch.autograd.grad((logp + 0.5 * entropy).sum(), [h, w])
        found |= {"gradient in hidden": gh[::97], "gradient in weight": gw[::97]}
    return found


def speaker(m, kind="llama", seed=0, chances=None, stop_ids=(1, 4, 9, 14)):
    """A small policy and its tokenizer. chances: {token: probability} of the next token wherever it
    stands: then no word depends on another, unless the sampler makes it so."""
    _, tokenizer = m.policy.tiny(width=16, layers=1, heads=1, kv_heads=1, inner=16)
    V = len(tokenizer)
    policy = network(
        m, kind, seed, torch.float32, vocab_size=V, tie_word_embeddings=chances is None,
        max_position_embeddings=64,
    )
    policy.stop_ids = list(stop_ids)
    if chances is not None:  # all tokens look alike, so all states are one
        with torch.no_grad():
            policy.model.embed_tokens.weight[:] = policy.model.embed_tokens.weight[0].clone()
            state = policy(torch.zeros(1, 1, dtype=torch.int64))[0, 0].double()
            logits = torch.full((V,), -60.0, dtype=torch.float64)
            for token, chance in chances.items():
                logits[int(token)] = torch.tensor(chance, dtype=torch.float64).log()
            head = logits[:, None] * state / state.square().sum()
            policy.head.copy_(head.to(torch.float32))
    return policy, tokenizer


FIELDS = ("tokens", "prompt_mask", "response", "mask", "logp", "texts", "finished")


@driver
def sampled(m, model, prompts, group_size, new, temperature, plan):
    """`sample`, once for each entry of the plan: (torch's own seed or None, the generator's name
    and seed or None). A generator of the same name goes on where it was."""
    policy, tokenizer = speaker(m, **model)
    generators, found = {}, []
    for torch_seed, name in plan:
        if torch_seed is not None:
            torch.manual_seed(torch_seed)
        generator = None
        if name is not None:
            if tuple(name) not in generators:
                generators[tuple(name)] = torch.Generator().manual_seed(name[1])
            generator = generators[tuple(name)]
        out = m.sample.sample(
            policy, tokenizer, list(prompts), group_size, new, temperature, generator
        )
        missing = [field for field in FIELDS if not hasattr(out, field)]
        if missing:
            return {"shape": f"sample must return a Rollout; what it returned has no {missing[0]}"}
        fields = {field: getattr(out, field) for field in FIELDS}
        found.append(fields | {"with gradient": out.logp.requires_grad})
    return {"rollouts": found}


# Losses for train_step that need nothing of a submission. All rows share one denominator and one
# square, so a loss of chunks is another number.


def coupled(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    n = mask.sum()
    weight = (rewards - rewards.mean())[:, None] * mask
    value = -((logp - old_logp.detach()).exp() * weight).sum() / n
    value = value - 0.3 * (entropy * mask).sum() / n + 0.1 * ((logp * mask).sum() / n) ** 2
    if ref_logp is not None:
        value = value + 0.2 * ((logp - ref_logp) ** 2 * mask).sum() / n
    ratio = ((logp - old_logp).exp() * mask).sum() / n
    return value, {"tokens": float(n), "ratio": ratio.item()}


def without_entropy(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    return -(logp * rewards[:, None] * mask).sum() / mask.sum(), {"width": float(mask.shape[1])}


def only_entropy(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    return -(entropy * mask).sum() / mask.sum(), {}


def some_rows(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
    """The gradient of most rows is 0."""
    return -(logp * mask)[4:6].sum(), {}


def spoilt(where):
    def broken(logp, old_logp, mask, rewards, group_size, *, entropy=None, ref_logp=None):
        value, stats = coupled(logp, old_logp, mask, rewards, group_size, entropy=entropy)
        zero = logp[2, 0] - logp[2, 0].detach()
        other = entropy[3, 0] - entropy[3, 0].detach()
        extra = {
            "infinite loss": torch.tensor(float("inf")), "loss of NaN": torch.tensor(float("nan")),
            "minus infinity": torch.tensor(float("-inf")), "NaN in the gradient": zero.sqrt() * 0,
            "NaN by the entropy": other.sqrt() * 0, "infinite gradient": zero * 1e30 * 1e30,
            "infinite norm": 1e30 * (logp * mask).sum(),
        }[where]
        return value + extra, stats

    return broken


SPOILT = (
    "infinite loss", "loss of NaN", "minus infinity", "NaN in the gradient", "NaN by the entropy",
    "infinite gradient", "infinite norm",
)
LOSSES = {
    function.__name__: function for function in (coupled, without_entropy, only_entropy, some_rows)
} | {name: spoilt(name) for name in SPOILT}


class Watcher(torch.optim.Optimizer):
    """An optimiser that notes the gradients of each step and moves along them, if asked to."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))
        self.noted = []

    @torch.no_grad()
    def step(self, closure=None):
        weights = [w for group in self.param_groups for w in group["params"]]
        grads = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
        self.noted.append(torch.cat([g.flatten() for g in grads]))
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    w.sub_(group["lr"] * w.grad)


@driver
def stepped(m, rollout, rewards, group_size, losses, options, lr=0.0, adam=False):
    """train_step, once for each of the losses on one policy -> stats and gradient of each, and the
    weights in the end."""
    policy, _ = m.policy.tiny(width=32, layers=2, heads=2, kv_heads=1, inner=64, seed=0)
    rollout = m.sample.Rollout(
        **{
            name: x.clone() if isinstance(x, torch.Tensor) else list(x)
            for name, x in rollout.items()
        }
    )
    kind = (lambda p, lr: torch.optim.AdamW(p, lr=lr)) if adam else Watcher
    optimizer = kind(policy.parameters(), lr)
    options = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    found = []
    for name in losses:
        before = torch.cat([w.detach().flatten().clone() for w in policy.parameters()])
        steps = len(getattr(optimizer, "noted", ()))
        stats = m.train.train_step(
            policy, optimizer, rollout, rewards.clone(), LOSSES[name], group_size, **options
        )
        after = torch.cat([w.detach().flatten() for w in policy.parameters()])
        one = {"stats": stats, "moved": not torch.equal(before, after)}
        if not adam:
            noted = optimizer.noted[steps:]
            one |= {"steps": len(noted)}
            if noted:
                one |= {"gradient": noted[-1]}
        else:
            one |= {"moments": len(optimizer.state)}
        found.append(one)
    return {"steps": found, "weights": after}


# ----------------------------------------------------------------------------------- the process


def send(connection, message):
    raw = json.dumps(message).encode()
    connection.sendall(struct.pack(">Q", len(raw)) + raw)


def receive(connection):
    """The next message, or None when the other side is gone."""
    head = read(connection, 8)
    raw = head and read(connection, struct.unpack(">Q", head)[0])
    return json.loads(raw) if raw else None


def read(connection, size):
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve(connection, user):
    """Load one submission and answer questions about it, until the judge hangs up."""
    os.setsid()
    confine(user)
    task = receive(connection)
    sources = {file: base64.b64decode(text) for file, text in task["sources"].items()}
    bodies = {
        file: {name: base64.b64decode(body) for name, body in them.items()}
        for file, them in task["bodies"].items()
    }
    sys.meta_path.insert(0, Submission(sources, bodies, task["others"]))
    watch([sys.prefix, sys.base_prefix, *filter(os.path.isabs, sys.path)])
    while task is not None:
        try:
            if "module" in task:  # the first message: what to import
                module = importlib.import_module(task["module"])
                answer = {"has": [name for name in task["functions"] if has(module, name)]}
            else:
                asked = unpack(task["options"])
                answer = drivers[task["driver"]](Modules(), **asked)
            answer = pack(answer)
        except BaseException as error:  # SystemExit at import, too
            answer = pack(told(error))
        send(connection, answer)
        task = receive(connection)
    os._exit(0)


def has(module, name):
    for part in name.split("."):
        module = getattr(module, part, None)
    return callable(module)


def confine(user):
    """Limits of this process; what it prints goes nowhere."""
    import resource

    for what, limit in (
        (resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, CPU_SECONDS),
    ):
        with contextlib.suppress(ValueError, OSError):  # not every system has each of them
            resource.setrlimit(what, (limit, limit))
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    if user is not None:
        import pwd

        known = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(known.pw_gid)
        os.setuid(known.pw_uid)


REFUSED = (
    "os.", "shutil.", "subprocess.", "socket.", "ctypes.", "sqlite3.", "pty.", "urllib.", "ftplib.",
    "smtplib.", "imaplib.", "poplib.", "telnetlib.", "webbrowser.", "syslog.", "resource.",
    "sys.addaudithook", "signal.",
)
HARMLESS = ("os.putenv", "os.unsetenv", "os.walk", "os.fwalk")


def watch(roots):
    """From here on Python reads below these folders alone, writes nowhere, starts nothing. (Native
    code is not seen by this; grade.py's --user and a container are for that.)"""
    roots = tuple(os.path.realpath(root) + os.sep for root in roots)
    real, inside = os.path.realpath, os.fspath

    def hook(event, args):
        if event in ("open", "os.listdir", "os.scandir"):
            path = args[0] if args else None
            if isinstance(path, int) or path is None:
                return
            path = real(os.fsdecode(inside(path)))
            mode = args[1] if event == "open" and len(args) > 1 else "r"
            flags = args[2] if event == "open" and len(args) > 2 else 0
            writes = any(c in (mode or "") for c in "wax+") or (
                isinstance(flags, int) and mode is None and flags & (os.O_WRONLY | os.O_RDWR)
            )
            if path == os.devnull or (not writes and (path + os.sep).startswith(roots)):
                return
            raise PermissionError(f"a submission may not open {path}")
        if event.startswith(REFUSED) and event not in HARMLESS:
            raise PermissionError(f"a submission may not do this: {event}")

    sys.addaudithook(hook)


def import_all():
    """What questions and answers import, once: in a worker nothing is to be found on the disk."""
    import numpy  # noqa: F401
    import tokenizers  # noqa: F401
    import transformers
    from torch.distributed.checkpoint import state_dict  # noqa: F401
    from torch.nn.utils.rnn import pad_sequence  # noqa: F401

    for name in (*dict(KINDS.values()), "PreTrainedTokenizerFast", "GenerationConfig"):
        getattr(transformers, name)  # found when first asked for
    for name in ("safetensors", "tqdm", "csv", "hashlib", "decimal", "shlex"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    one = torch.zeros(1, 1, 1, 1, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(one, one, one).sum().backward()
    torch.optim.AdamW([one]).step()
    torch.nn.utils.clip_grad_norm_([one], 1.0)


def main(fd, user):
    """Import all that is slow, then fork a worker for each connection that comes."""
    import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    orders = socket.socket(fileno=int(fd))
    orders.sendall(struct.pack(">Q", os.getpid()))  # ready
    while True:
        word, fds, *_ = socket.recv_fds(orders, 1, 1)
        if not word:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            try:
                orders.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                serve(socket.socket(fileno=fds[0]), user or None)
            finally:
                os._exit(1)
        os.close(fds[0])
        orders.sendall(struct.pack(">Q", pid))


if __name__ == "__main__":
    main(*sys.argv[1:])
