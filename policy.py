"""What pi(y given x) is: a decoder-only transformer, and the log-probability of its tokens.

    policy, tokenizer = tiny()                         # about 1M parameters, characters as tokens
    hidden = policy(tokens, mask)                      # (B, T), (B, T) -> (B, T, D)
    logp, entropy = token_logprobs(hidden[:, :-1], policy.head, tokens[:, 1:])

One class covers Llama, Qwen2/2.5, Qwen3 and Mistral/Ministral: one stack (RMSNorm, rotary
positions, grouped-query attention, SwiGLU) with a few switches that the `transformers` config
names. Parameters have their Hugging Face names, and what `save` writes opens there.

Parameters are fp32 whatever the compute dtype: with bf16 weights of size 0.02 a step of 1e-6 would
move only 2 % of them. They are cast where they are used, so bf16 lives inside matmuls only.

Letters: B rows, T new tokens, S tokens seen including the new ones, D width, V vocabulary, N tokens
in a flat list.
"""
import contextlib
import itertools
import json
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """One sentence for the user: what is wrong with a flag, a file or a model, and what to do."""


# --------------------------------------------------------------------------------------- the model

class Policy(nn.Module):
    """A causal language model from a `transformers` config; UserError where it is none of ours."""

    def __init__(self, config):
        super().__init__()
        refuse_unsupported(config)
        self.config = config
        self.dtype = torch.float32                     # of the activations; parameters stay fp32
        self.recompute = False                         # see `recomputed`: less memory, more time
        self.windows = sliding_windows(config)         # how far back each layer sees; None: all
        self.stop_ids = sorted(ids_of(config.eos_token_id))    # any of these ends an answer
        self.model = nn.ModuleDict({                   # all but the head, as checkpoints name it
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    @property
    def head(self):
        """(V, D), fp32: logits are hidden @ head.T."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def forward(self, tokens, mask=None, cache=None):
        """Hidden states of the new tokens, after the last norm: what `head` reads.

        tokens (B, T) int64, the new ones. mask (B, S) is 1 on real tokens among all S seen, cached
        ones included; None says that nothing is padded. cache: a KVCache, which is extended.
        Returns (B, T, D) in `self.dtype`. Padding may stand anywhere: positions count real tokens
        only, and no real token sees a padded one.
        """
        B, T = tokens.shape
        S = T + (cache.length if cache is not None else 0)
        if mask is None:
            positions = torch.arange(S - T, S, device=tokens.device)            # (T,)
        else:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]        # (B, T)
        angles = positions[..., None, None] * self.inv_freq                # (B, T, 1, head_dim / 2)
        rope = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        attend = {w: allowed(mask, T, S, w, tokens.device) for w in set(self.windows)}
        x = F.embedding(tokens, self.model.embed_tokens.weight).to(self.dtype)  # (B, T, D)
        for layer, block in enumerate(self.model.layers):
            call = recomputed if self.recompute and torch.is_grad_enabled() else Block.__call__
            x = call(block, x, rope, attend[self.windows[layer]], layer, cache)
        if cache is not None:
            cache.length = S
        return self.model.norm(x)


class Block(nn.Module):
    """One layer: attention looks at other positions, then SwiGLU at its own; both are added."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = nn.ModuleDict({"gate_proj": Linear(width, inner, bias=bias),
                                  "up_proj": Linear(width, inner, bias=bias),
                                  "down_proj": Linear(inner, width, bias=bias)})

    def forward(self, x, rope, attend, layer, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, layer, cache)
        mlp, y = self.mlp, self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; q/k norm for Qwen3, qkv bias for Qwen2."""

    def __init__(self, config):
        super().__init__()
        width, self.head_dim = config.hidden_size, head_dim(config)
        q_width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        all_bias = getattr(config, "attention_bias", False)
        qkv_bias = all_bias or config.model_type == "qwen2"
        self.q_proj = Linear(width, q_width, bias=qkv_bias)
        self.k_proj = Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = Linear(width, kv_width, bias=qkv_bias)
        self.o_proj = Linear(q_width, width, bias=all_bias)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, rope, attend, layer, cache):
        """x (B, T, D); rope: cos and sin; attend: a mask or None, see `allowed` -> (B, T, D)."""
        by_head = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, by_head)                          # (B, T, heads, head_dim)
        k = self.k_proj(x).unflatten(-1, by_head)                          # (B, T, kv_heads, ..)
        v = self.v_proj(x).unflatten(-1, by_head).transpose(1, 2)          # (B, kv_heads, T, ..)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope).transpose(1, 2), rotate(k, *rope).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)                               # (B, kv_heads, S, ..)
        causal = attend is None and x.shape[1] > 1
        mixed = F.scaled_dot_product_attention(q, k, v, attend, is_causal=causal,
                                               enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x_i, x_{i + head_dim/2}) by its angle.

    x (B, T, heads, head_dim); cos, sin (T or B x T, 1, head_dim / 2). Returns x's shape and dtype;
    x stays as it is.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class KVCache:
    """Keys and values of the tokens read so far, per layer (B, kv_heads, S, head_dim) each. The
    sampler goes on with arrays that do not have to grow (sample.Stepper)."""

    def __init__(self):
        self.keys, self.values = [], []
        self.length = 0                                # tokens read by all layers: Policy.forward

    def update(self, layer, k, v):
        """Add the new tokens' k, v (B, kv_heads, T, head_dim); return all keys and values, which
        are what stands in `keys` and `values`. Gradients flow through both, old and new."""
        if layer == len(self.keys):                    # the first tokens
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k], dim=2)
            self.values[layer] = torch.cat([self.values[layer], v], dim=2)
        return self.keys[layer], self.values[layer]


# ---------------------------------------------------------------- the log-probability of an answer

def score(policy, rollout, rows, group_size, temperature):
    """log pi(y|x): log-probability and entropy of the sampled tokens of `rows` (an index tensor) of
    a sample.Rollout -> two (len(rows), T) fp32, 0 off the mask; differentiable.

    By definition one forward pass of each prompt with its answer. Here each prompt is read once,
    and the answers of its group attend to its keys and values; equal answers are read once, too.
    Answers go through in buckets of similar length: little padding is read, none by the head.
    """
    # The prompts of these rows, each once; prompt_of_row (rows,) says which one a row answers.
    group, prompt_of_row = torch.unique(rows // group_size, return_inverse=True)
    P, first = rollout.prompt_mask.shape[1], group * group_size             # a row of each group
    prompt, prompt_mask = rollout.tokens[first, :P], rollout.prompt_mask[first]
    padded, cache = not prompt_mask.all(), KVCache()
    last = policy(prompt, prompt_mask if padded else None, cache)[:, -1]    # (prompts, D)

    # The different answers, each once; answer_of_row (rows,) says which one a row gave.
    response, mask, prompt_of, answer_of_row = different_answers(rollout, rows, prompt_of_row)
    hidden, position = [], []
    # Four buckets however many answers are equal: sharded processes must forward equally often.
    buckets = mask.sum(1).argsort(descending=True).tensor_split(min(4, len(rows)))
    for bucket in buckets:                             # indices of answers, the longest first
        longest, prompts = int(mask[bucket].any(0).sum()), prompt_of[bucket]
        tokens = response[bucket, :max(1, longest - 1)]        # the last token is only predicted
        seen = F.pad(prompt_mask[prompts], (0, tokens.shape[1]), value=True) if padded else None
        later = policy(tokens, seen, cache_of_rows(cache, prompts))[:, :longest - 1]
        # The prompt's last hidden state predicts the first token, an answer's own the others.
        predicting = torch.cat([last[prompts, None], later], dim=1)         # (.., longest, D)
        row, column = mask[bucket, :longest].nonzero(as_tuple=True)
        hidden.append(predicting[row, column])                              # (tokens, D)
        position.append(torch.stack([bucket[row], column]))
    row, column = torch.cat(position, dim=1)
    flat = token_logprobs(torch.cat(hidden), policy.head, response[row, column], temperature)
    zeros = torch.zeros(mask.shape, device=rows.device)
    return [zeros.index_put((row, column), values)[answer_of_row] for values in flat]


def token_logprobs(hidden, weight, targets, temperature=1.0):
    """log pi(target) and the entropy of the whole next-token distribution, at `temperature`.

    hidden (..., D); weight (V, D) fp32; targets (...) int64. Returns logp (...) and entropy (...),
    fp32 (float64 for float64 hidden), differentiable in both; `weight` is read in the precision of
    the results. By definition

        logits = hidden @ weight.T / temperature
        logp = log_softmax(logits)[targets]
        entropy = -(softmax(logits) * log_softmax(logits)).sum(-1)

    computed here tile by tile. Logits (N, V) of more than MEMORY's `kept` bytes are never held as a
    whole, forward or backward: one tile is at a time, and the backward pass makes each again.
    """
    shape, targets = targets.shape, targets.reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    fit = len(targets) * len(weight) * 4 <= MEMORY.get(hidden.device.type, MEMORY["cpu"]).kept
    keep_logits = torch.is_grad_enabled() and fit
    logp, entropy = TokenLogprobs.apply(hidden, weight, targets, temperature, keep_logits)
    return logp.view(shape), entropy.view(shape)


# ----------------------- a first reading ends here; below: small parts, tiles, checkpoints, `tiny`

class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, computed in fp32."""

    def forward(self, x):
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Linear(nn.Linear):
    """`nn.Linear` whose fp32 weight is cast to the dtype of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return product(x, self.weight.to(x.dtype), bias)


def product(x, weight, bias=None, residual=None):
    """x @ weight.T + bias + residual. For fp32 on a CPU PyTorch calls MKL, which leaves half of an
    AMD processor's AVX-512 idle; oneDNN does not, so large products go there."""
    large = min(weight.shape) > 128 and x.numel() > 0
    if ONE_DNN and large and x.is_cpu and x.dtype == torch.float32:
        y = LargeProduct.apply(x, weight, bias)
        return y if residual is None else y.add_(residual)
    return F.linear(x, weight, bias) if residual is None else torch.addmm(residual, x, weight.T)


class LargeProduct(torch.autograd.Function):
    """x @ weight.T + bias by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return one_dnn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        g_rows, x_rows = g.flatten(0, -2), x.flatten(0, -2)                 # (rows, ..) each
        bias = g_rows.sum(0) if ctx.needs_input_grad[2] else None
        return one_dnn(g, weight.T), one_dnn(g_rows.T, x_rows.T), bias


ONE_DNN = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def one_dnn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def allowed(mask, T, S, window, device):
    """Which of the S cached keys each of the last T queries may read -> (1 or B, 1, T, S) bool.

    It may be None where plain causal attention does the same: T is 1 or S, nothing is padded, and
    no window is shorter than S. mask: as in Policy.forward. window: how many slots back a query
    sees, itself included, None for all; it counts slots of the cache, padded ones as well.
    """
    if mask is None and (window is None or window >= S) and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None]
    ok = (key <= query)[None, None]
    if window is not None:
        ok = ok & (key > query - window)
    if mask is not None:
        ok = ok & mask.bool()[:, None, None, :]
    return ok | (key == query)         # a padded query reads itself: no empty softmax, no NaN


def recomputed(block, x, rope, attend, layer, cache):
    """block(...) that keeps its inputs only: the backward pass computes what is inside once more.
    That must not add to the cache again, so each call begins with one of its own."""
    def call(x, *past):
        before = KVCache()
        before.keys, before.values = list(past[:1]), list(past[1:])
        return block(x, rope, attend, 0, before), before.keys[0], before.values[0]

    cache = KVCache() if cache is None else cache
    past = [*cache.keys[layer:layer + 1], *cache.values[layer:layer + 1]]
    x, k, v = checkpoint(call, x, *past, use_reentrant=False, preserve_rng_state=False)
    cache.keys[layer:layer + 1], cache.values[layer:layer + 1] = [k], [v]
    return x


def cache_of_rows(cache, rows):
    """A copy of a KVCache that holds `rows` alone (an index tensor; a row may repeat)."""
    chosen = KVCache()
    chosen.length = cache.length
    chosen.keys = [k.index_select(0, rows) for k in cache.keys]
    chosen.values = [v.index_select(0, rows) for v in cache.values]
    return chosen


def different_answers(rollout, rows, prompt_of_row):
    """The answers of `rows`, equal ones to one prompt only once -> response and mask (answers, T),
    the prompt of each (answers,), and which of them each row gave (rows,)."""
    answers = torch.where(rollout.mask[rows], rollout.response[rows], -1)   # (rows, T)
    answers = torch.cat([prompt_of_row[:, None], answers], dim=1).cpu()    # not every device can
    both = torch.unique(answers, dim=0, return_inverse=True)               # compare rows
    answers, answer_of_row = (x.to(rows.device) for x in both)
    return answers[:, 1:].clamp(min=0), answers[:, 1:] >= 0, answers[:, 0], answer_of_row


# -------------------------------------------------------------- the log-probabilities, tile by tile

# Bytes of logits on a device: up to `kept` they stay for the backward pass, else they are computed
# again. A tile has `tile` bytes, few enough for a CPU's cache, but at least `rows` rows.
Memory = namedtuple("Memory", "kept tile rows")
MEMORY = {"cpu": Memory(256 << 20, 1 << 20, 512), "cuda": Memory(4 << 30, 256 << 20, 8192)}


class TokenLogprobs(torch.autograd.Function):
    """The softmax's own gradient, written out. With P = softmax(x), H its entropy, g and e the
    upstream gradients of the two results:

        d logp / d x = onehot(target) - P             dx = g onehot(target) - P (g + e (log P + H))
        d H / d x = -P (log P + H)                    d hidden = dx W / temperature
                                                      d weight = dx^T hidden / temperature
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, keep_logits):
        h, w = operands(hidden, weight)                                     # (N, D), (V, D)
        dtype = torch.promote_types(h.dtype, torch.float32)
        lse = h.new_full(targets.shape, torch.finfo(dtype).min, dtype=dtype)    # (N,) of no logits
        chosen, entropy, kept = torch.zeros_like(lse), torch.zeros_like(lse), []
        for rows, part in tiles(len(h), len(w), h.device):
            x = logits_of(h[rows], w[part], temperature)                    # (rows, part)
            column = targets[rows, None] - part.start  # of the targets, or outside of this part
            inside = (column >= 0) & (column < x.shape[1])
            chosen[rows] += torch.where(inside, x.gather(1, column * inside), 0)[:, 0]
            # Parts of a distribution join by the chain rule: -log of each part's share is a, b.
            more, more_entropy = lse_entropy(x)
            total = torch.logaddexp(lse[rows], more)
            a, b = total - lse[rows], total - more
            entropy[rows] = (-a).exp() * (entropy[rows] + a) + (-b).exp() * (more_entropy + b)
            lse[rows] = total
            if keep_logits:
                kept.append(x)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.kept, ctx.temperature = kept, temperature
        ctx.set_materialize_grads(False)               # an output that no loss uses costs nothing
        return chosen - lse, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, e):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        h, w = operands(hidden, weight)
        dh = torch.zeros_like(h, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(w, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        g = torch.zeros_like(lse) if g is None else g
        kept, ctx.kept = ctx.kept[::-1], []            # tiles are overwritten: a second backward
        for rows, part in tiles(len(h), len(w), h.device):     # computes them again
            x = kept.pop() if kept else logits_of(h[rows], w[part], ctx.temperature)
            dx = logit_gradient(x, targets[rows] - part.start, lse[rows], entropy[rows], g[rows],
                                None if e is None else e[rows], h.dtype)
            if dh is not None:
                add_product(dh[rows], dx, w[part], ctx.temperature)
            if dw is not None:
                add_product(dw[part], dx.T, h[rows], ctx.temperature)
        return dh, dw, None, None, None                # autograd casts them to the inputs' dtypes


def tiles(N, V, device):
    """(N, V) cut into (slice of rows, slice of the vocabulary), of whole rows where many fit."""
    limit = MEMORY.get(device.type, MEMORY["cpu"])
    rows = max(1, min(N, max(limit.rows, limit.tile // (4 * V))))
    width = max(1, limit.tile // (4 * rows))
    return itertools.product([slice(i, min(N, i + rows)) for i in range(0, N, rows)],
                             [slice(i, min(V, i + width)) for i in range(0, V, width)])


def operands(hidden, weight):
    """Both in the dtype of the products: bf16 as it comes on a GPU, at least fp32 elsewhere."""
    if hidden.device.type != "cuda":
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return hidden, weight.to(hidden.dtype)


def logits_of(h, w, temperature):
    """h @ w.T / temperature, fp32 for bf16 operands: rounding would shift every log-probability."""
    half = h.dtype not in (torch.float32, torch.float64)
    x = torch.mm(h, w.T, out_dtype=torch.float32) if half else product(h, w)
    return x if temperature == 1 else x.div_(temperature)


def add_product(total, a, b, temperature):
    """total += a @ b / temperature, in the precision of total."""
    x = product(a, b.T) if a.dtype == total.dtype else torch.mm(a, b, out_dtype=total.dtype)
    total.add_(x, alpha=1 / temperature)


def lse_entropy(x):
    """Log-sum-exp and entropy of each row of x (rows, part), which stays as it is."""
    if by_kernel(x):
        lse, entropy = x.new_empty(2, len(x))
        lse_entropy_kernel[(len(x),)](x, lse, entropy, x.shape[1], BLOCK=4096, num_warps=8)
        return lse, entropy
    top = x.amax(1, keepdim=True)
    below = x - top                                    # small numbers: little is lost in p * below
    p = below.exp()
    total = p.sum(1)
    return top[:, 0] + total.log(), total.log() - below.mul_(p).sum(1) / total


def logit_gradient(x, column, lse, entropy, g, e, dtype):
    """g onehot - P (g + e (log P + H)) in `dtype`, written over x where it can be. column (rows,):
    those of the targets, which may lie outside of x."""
    if by_kernel(x):
        dx = torch.empty_like(x, dtype=dtype)
        upstream = g.contiguous(), (g if e is None else e).contiguous()
        grid = len(x), triton.cdiv(x.shape[1], 4096)
        logit_gradient_kernel[grid](x, dx, column, lse, entropy, *upstream, x.shape[1],
                                    ENTROPY=e is not None, BLOCK=4096, num_warps=8)
        return dx
    x.sub_(lse[:, None])                               # log P
    if e is None:
        x.exp_().mul_(-g[:, None])
    else:
        factor = x.add(entropy[:, None]).mul_(-e[:, None]).sub_(g[:, None])
        x.exp_().mul_(factor)
    here = (column >= 0) & (column < x.shape[1])       # where the target is in this part
    return x.scatter_add_(1, (column * here)[:, None], (g * here)[:, None]).to(dtype)


try:                           # comes with a torch that was built for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def by_kernel(x):
    return triton and x.is_cuda and x.dtype == torch.float32


# The last two on a GPU, one pass over the tile each. A row is one program (on grid x, which alone
# goes beyond 65,535); row offsets are int64, because 16,384 rows x 152k is over 2^31.
if triton:
    @triton.jit
    def lse_entropy_kernel(x, lse, entropy, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        # The largest x; sum of exp(x - top); sum of (x - top) exp(x - top).
        top, total, mean = -1e30, 0.0, 0.0
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(x + row * V + column, column < V, -1e30)
            higher = tl.maximum(top, tl.max(value, 0))
            shrink = tl.exp(top - higher)
            p = tl.exp(value - higher)
            mean = (mean + total * (top - higher)) * shrink + tl.sum((value - higher) * p, 0)
            total = total * shrink + tl.sum(p, 0)
            top = higher
        tl.store(lse + row, top + tl.log(total))
        tl.store(entropy + row, tl.log(total) - mean / total)

    @triton.jit
    def logit_gradient_kernel(x, dx, target, lse, entropy, g, e, V,
                              ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        log_p = tl.load(x + row * V + column, column < V, 0.0) - tl.load(lse + row)
        upstream = tl.load(g + row)
        factor = upstream
        if ENTROPY:
            factor += tl.load(e + row) * (log_p + tl.load(entropy + row))
        onehot = tl.where(column == tl.load(target + row), upstream, 0.0)
        value = onehot - tl.exp(log_p) * factor
        tl.store(dx + row * V + column, value.to(dx.dtype.element_ty), column < V)


# ------------------------------------------------------------------------------ what a config says

FAMILIES = "llama", "qwen2", "qwen3", "mistral", "ministral"


def refuse_unsupported(config):
    """UserError for an architecture that `Policy` is not."""
    rope = getattr(config, "rope_parameters", None) or {}
    for what, value, known in (
            ("model type", config.model_type, FAMILIES),
            ("activation", getattr(config, "hidden_act", None), ("silu", "swish")),
            ("rope scaling", rope.get("rope_type"), ("default", "llama3"))):
        if value not in known:
            raise UserError(f"{what} '{value}' is not supported; these are: {', '.join(known)}.")


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def ids_of(value):
    """The token ids in a config entry, which may be None, one id, or a list."""
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def sliding_windows(config):
    """How many tokens back each layer sees (itself included); None means all of them."""
    window = getattr(config, "sliding_window", None)
    mistral = ["sliding_attention"] * config.num_hidden_layers     # one window for all layers
    kinds = getattr(config, "layer_types", None) or mistral
    return [window if kind == "sliding_attention" else None for kind in kinds]


def inverse_frequencies(config):
    """Rotary frequencies (head_dim / 2,): theta^(-2i / head_dim), stretched for Llama 3.1."""
    rope, dim = config.rope_parameters, head_dim(config)
    freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    if rope["rope_type"] == "default":
        return freq
    # Long wavelengths are divided by `factor`, short ones kept, those between blended linearly.
    turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    unchanged = ((turns - low) / (high - low)).clamp(0, 1)
    return unchanged * freq + (1 - unchanged) * freq / rope["factor"]


# ------------------------------------------------------------------------------------- checkpoints

def load(name_or_path, device="cpu", dtype=torch.float32, stop=()):
    """A folder, or a name on the Hugging Face hub -> (policy, tokenizer).

    Parameters become fp32; `dtype` is that of the activations (bf16 on a GPU). stop: tokens (as
    text) that end an answer beside the checkpoint's own. Only safetensors are read, and no code of
    a checkpoint is run. UserError for what is missing, damaged, quantised or not in FAMILIES.
    """
    from transformers import AutoModelForCausalLM
    config = load_config(name_or_path)
    with torch.device("meta"):                         # without memory; the loaded tensors go in
        policy = Policy(config)
    tokenizer = load_tokenizer(name_or_path)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"'{name_or_path}' is mixed up: its tokenizer has {len(tokenizer)} tokens, "
                        f"but its config says that the model knows {config.vocab_size}.")
    model, report = readable(
        f"a file of weights of '{name_or_path}' (safetensors only, never .bin or .pth)",
        lambda: AutoModelForCausalLM.from_pretrained(
            name_or_path, config=config, dtype=torch.float32, use_safetensors=True,
            trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True))
    # transformers would go on with chance in place of what is missing or has another shape.
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"'{name_or_path}' has '{name}' of shape {tuple(found)}, but its config "
                        f"asks for {tuple(wanted)}.")
    for name in sorted(report["missing_keys"]):
        raise UserError(f"'{name_or_path}' lacks the weight '{name}'.")
    weights = model.state_dict()                       # a tied head stands in it under two names
    policy.load_state_dict({name: weights[name] for name in policy.state_dict()}, assign=True)
    policy.dtype = dtype
    policy.stop_ids = sorted({*policy.stop_ids, *stop_tokens(name_or_path, tokenizer, stop)})
    return policy.to(device), tokenizer


def load_config(name):
    """The config of a checkpoint; UserError where it is missing, damaged or quantised."""
    from transformers import AutoConfig, logging
    logging.set_verbosity_error()                      # what is wrong is said here
    if Path(name).is_dir():                            # a download needs its bar
        logging.disable_progress_bar()
    config = readable(f"the config.json of '{name}' (a folder here, or a name on the hub)",
                      lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))
    if getattr(config, "quantization_config", None):
        raise UserError(f"'{name}' is quantised; weights must be fp32, bf16 or fp16.")
    return config


def load_tokenizer(name):
    """The tokenizer of a checkpoint, with a pad token in any case."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import has_file
    files = "tokenizer.json", "tokenizer.model", "vocab.json"
    if not any(has_file(name, file) for file in files):
        raise UserError(f"'{name}' has no tokenizer: none of {', '.join(files)}.")
    # AutoTokenizer rebuilds some tokenizers from their vocabulary alone, and then text becomes
    # other ids than the model was trained on. The plain class takes tokenizer.json as it is.
    kind = PreTrainedTokenizerFast if has_file(name, files[0]) else AutoTokenizer
    tokenizer = readable(f"the tokenizer of '{name}'",
                         lambda: kind.from_pretrained(name, trust_remote_code=False))
    if tokenizer.pad_token is None:                    # masks come from positions: any will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def stop_tokens(name, tokenizer, more):
    """The ids that end an answer: those that the tokenizer and generation_config.json name, the one
    that ends a turn of the chat template, and `more` tokens, given as text."""
    from transformers import GenerationConfig
    from transformers.utils import has_file
    found, vocabulary = ids_of(tokenizer.eos_token_id), tokenizer.get_vocab()
    if has_file(name, "generation_config.json"):
        generation = readable(f"the generation_config.json of '{name}'",
                              lambda: GenerationConfig.from_pretrained(name))
        found |= ids_of(generation.eos_token_id)
    for token in more:
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if token in vocabulary:                        # by its name, that of unknown text included
            ids = [vocabulary[token]]
        elif len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(f"'{token}' cannot end an answer: it is not one token of '{name}'.")
        found.update(ids)
    # A base model may have the template of its chat sibling and name another token as its last:
    # what the template writes behind an answer ends it, if it is a token of its own, no mere text.
    with contextlib.suppress(Exception):               # no template; or sample.chat says what it is
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "an-answer"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        behind = tokenizer(text.rpartition("an-answer")[2].strip(), add_special_tokens=False)
        found |= {*behind.input_ids[:1]} & tokenizer.added_tokens_decoder.keys()
    return found


def says_when_it_stops(policy, tokenizer):
    names = tokenizer.convert_ids_to_tokens(policy.stop_ids)
    return f"an answer ends with {' or '.join(map(str, names)) or 'nothing but --max-new-tokens'}"


def readable(what, reader):
    """reader(), whose many kinds of error become one sentence that names `what`."""
    try:
        return reader()
    except Exception as error:
        first = str(error).partition("\n")[0].rstrip(" :.")
        raise UserError(f"{what} is missing or damaged ({type(error).__name__}: {first}).")


def save(policy, tokenizer, path, weights=None, file_size="5GB"):
    """Write a folder that `load` and transformers' Auto classes open, those of version 4 as well;
    it appears whole or not at all, its weights in files of `file_size` at most. weights: {name:
    tensor} in place of the policy's own, where those are sharded over processes."""
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig
    path, aside = Path(path), Path(path).with_name(Path(path).name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    weights = policy.state_dict() if weights is None else weights
    save_torch_state_dict(weights, aside, max_shard_size=file_size)
    config, stops, pad = policy.config, policy.stop_ids or None, tokenizer.pad_token_id
    config.architectures = [f"{config.model_type.capitalize()}ForCausalLM"]
    config.dtype = torch.float32
    config.save_pretrained(aside)
    GenerationConfig(eos_token_id=stops, pad_token_id=pad).save_pretrained(aside)
    if hasattr(tokenizer, "backend_tokenizer"):        # its file would keep the last call's padding
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(aside)
    # transformers 5 has new names for what version 4, and servers built on it, look for under the
    # old ones. A config without the old ones would be read as theta 10000, without a word.
    scaling = dict(config.rope_parameters)
    theta, default = scaling.pop("rope_theta"), scaling["rope_type"] == "default"
    amend(aside / "config.json", rope_theta=theta, rope_scaling=None if default else scaling)
    if (aside / "tokenizer.json").is_file():
        more = [str(token) for token in tokenizer.extra_special_tokens]
        amend(aside / "tokenizer_config.json", without="extra_special_tokens",
              additional_special_tokens=more, tokenizer_class="PreTrainedTokenizerFast")
    for file in filter(Path.is_file, aside.rglob("*")):     # in a folder of chat templates, too
        with open(file, "r+b") as written:             # Windows syncs only what could be written
            os.fsync(written.fileno())
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)


def amend(file, without=None, **entries):
    """Write `entries` into a JSON file, and take the one named `without` out of it."""
    contents = json.loads(file.read_bytes()) | entries
    contents.pop(without, None)
    file.write_text(json.dumps(contents, indent=2) + "\n")


def try_to_save(policy, tokenizer, path):
    """Save all but the weights, and remove it: UserError now for what would be one at the end."""
    trial = Path(path).with_name("trial")
    try:
        save(policy, tokenizer, trial, weights={})
        shutil.rmtree(trial)
    except Exception as error:                         # whatever transformers or the disk says
        raise UserError(f"a model cannot be saved as '{path}' ({type(error).__name__}: {error}).")


# ------------------------------------------------------------------------------------- the default

CHARACTERS = "0123456789+-*/()=, "


def tiny(width=128, layers=4, heads=4, kv_heads=2, inner=384, seed=0, characters=CHARACTERS):
    """A fresh Llama of about 1M parameters whose tokens are characters -> (policy, tokenizer)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    characterwise = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    characterwise.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characterwise.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characterwise, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width // heads,
        max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-6,
        bos_token_id=None, eos_token_id=1, pad_token_id=0)
    policy = Policy(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.named_parameters():
        if weight.dim() == 2:          # 1/sqrt(fan in); what adds to the residual stream is smaller
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * layers) ** -0.5 if adds else 1.0
            nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5, generator=generator)
    return policy, tokenizer
