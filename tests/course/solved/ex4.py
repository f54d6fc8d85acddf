"""A right solution of exercise 4, unlike the reference: complex numbers, einsum, never None."""
import torch
from torch import nn

from policy import Linear, RMSNorm, head_dim


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out


def allowed(mask, T, S, window, device):
    rows = 1 if mask is None else len(mask)
    query = torch.arange(T, device=device)[:, None] + (S - T)
    key = torch.arange(S, device=device)[None, :]
    see = key <= query
    if window is not None:
        see = see & (query - key < window)
    see = see.expand(rows, 1, T, S).clone()
    if mask is not None:
        see &= mask.bool()[:, None, None, :]
    see |= query == key
    return see


class KVCache:
    def __init__(self):
        self.keys, self.values = [], []
        self.length = 0

    def update(self, layer, k, v):
        if len(self.keys) <= layer:
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], k), -2)
            self.values[layer] = torch.cat((self.values[layer], v), -2)
        return self.keys[layer], self.values[layer]


class Attention(nn.Module):
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
        B, T, _ = x.shape
        d = self.head_dim
        q = self.q_proj(x).view(B, T, -1, d)
        k = self.k_proj(x).view(B, T, -1, d)
        v = self.v_proj(x).view(B, T, -1, d)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        share = q.shape[2] // k.shape[1]
        k = k.repeat_interleave(share, 1)
        v = v.repeat_interleave(share, 1)
        scores = torch.einsum("bthd,bhsd->bhts", q, k) / d ** 0.5
        S = k.shape[2]
        if attend is None:
            attend = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        scores = scores.masked_fill(~attend, float("-inf"))
        mixed = torch.einsum("bhts,bhsd->bthd", scores.softmax(-1), v)
        return self.o_proj(mixed.reshape(B, T, -1))
